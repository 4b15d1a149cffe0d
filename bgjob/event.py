"""The events of a worker as values: the argument of an observer that is a plain callable."""

from dataclasses import dataclass
from typing import TypeAlias

from bgjob.job import Job


@dataclass(frozen=True, slots=True)
class JobStarted:
    """A handler is about to run the job."""

    job: Job


@dataclass(frozen=True, slots=True)
class JobCompleted:
    """The job is done and its row deleted."""

    job: Job


@dataclass(frozen=True, slots=True)
class JobRescheduled:
    """The handler returned Reschedule: the job will run again in `delay` seconds."""

    job: Job
    delay: float


@dataclass(frozen=True, slots=True)
class JobWillBeRetried:
    """An attempt failed with `error`, and the job will run again in `delay` seconds."""

    job: Job
    delay: float
    error: str | BaseException | None


@dataclass(frozen=True, slots=True)
class JobMovedToDlq:
    """The job was moved to the dead-letter table, because of `error`."""

    job: Job
    error: str | BaseException


@dataclass(frozen=True, slots=True)
class JobLeaseLost:
    """The job's lease ended while it ran: another worker may have it, its result is dropped."""

    job: Job


@dataclass(frozen=True, slots=True)
class JobTimedOut:
    """The job's handler ran for longer than its timeout of `seconds`.

    A second event says what becomes of the job: JobWillBeRetried or JobMovedToDlq.
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
    | JobTimedOut
    | QueueIsEmpty
    | WorkerError
)
"""Any event; each has a method of Observer with the same arguments."""
