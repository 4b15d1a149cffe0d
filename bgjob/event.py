"""The events of a worker, as values: what an observer that is a plain callable is given."""

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
    """The job will run again in `delay` seconds, by its own wish."""

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
    """The job rests in the dead-letter table, because of `error`."""

    job: Job
    error: str | BaseException


@dataclass(frozen=True, slots=True)
class JobLeaseLost:
    """The job outlived its lease: another worker has it, this result is dropped."""

    job: Job


@dataclass(frozen=True, slots=True)
class JobTimedOut:
    """The job's handler ran for longer than its timeout of `seconds`.

    What becomes of the job is an event of its own: a retry, or the
    dead-letter table.
    """

    job: Job
    seconds: float


@dataclass(frozen=True, slots=True)
class QueueIsEmpty:
    """No job of the queue is due, and the worker begins to wait."""

    queue: str


@dataclass(frozen=True, slots=True)
class WorkerError:
    """Trouble, mostly with the database; the worker tries again by itself."""

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
"""What a worker tells; each value has a method of Observer beside it, with the same arguments."""
