"""The events of a worker as values: the argument of an observer that is a plain callable.

Those of a job's end have two times, in seconds. `ran` is how long its handler ran, with the
commit of a transactional one. `waited` is how long the job was due before its handler was called,
by the database's clock. A retry waits from its own due time, so neither contains the delay.
Both are None if the handler did not run: a job of an unknown type is dead-lettered without.
They have defaults, so that a test can make an event of a job alone.
"""

from dataclasses import dataclass
from typing import TypeAlias

from bgjob.job import Job


@dataclass(frozen=True, slots=True)
class JobStarted:
    """A handler is about to run the job, which was due for `waited` seconds."""

    job: Job
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class JobCompleted:
    """The job is done and its row deleted."""

    job: Job
    ran: float | None = None
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class JobRescheduled:
    """The handler returned Reschedule: the job will run again in `delay` seconds."""

    job: Job
    delay: float
    ran: float | None = None
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class JobWillBeRetried:
    """An attempt failed with `error`, and the job will run again in `delay` seconds."""

    job: Job
    delay: float
    error: str | BaseException | None
    ran: float | None = None
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class JobMovedToDlq:
    """The job was moved to the dead-letter table, because of `error`."""

    job: Job
    error: str | BaseException
    ran: float | None = None
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class JobLeaseLost:
    """The job's lease ended while it ran: another worker may have it, its result is dropped.

    `ran` and `waited` are None unless its handler has ended.
    """

    job: Job
    ran: float | None = None
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """The job was cancelled while this worker had it, and is in the dead-letter table.

    Its result is dropped, if it has one. `ran` and `waited` are None unless its handler has
    ended.
    """

    job: Job
    ran: float | None = None
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class JobTimedOut:
    """The job's handler ran for longer than its timeout of `seconds`.

    A second event says what becomes of the job, and how long it ran: JobWillBeRetried or
    JobMovedToDlq.
    """

    job: Job
    seconds: float


@dataclass(frozen=True, slots=True)
class QueueIsEmpty:
    """No job of the queue is due, and the worker begins to wait."""

    queue: str


@dataclass(frozen=True, slots=True)
class WorkerError:
    """The worker had an error, mostly with the database; it tries again on its own."""

    error: BaseException


Event: TypeAlias = (
    JobStarted
    | JobCompleted
    | JobRescheduled
    | JobWillBeRetried
    | JobMovedToDlq
    | JobLeaseLost
    | JobCancelled
    | JobTimedOut
    | QueueIsEmpty
    | WorkerError
)
"""Any event; each has a method of Observer with the same arguments."""
