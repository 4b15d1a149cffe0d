"""How jobs ended, and the effects of an acknowledged exchange."""

from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeAlias

from typing_extensions import TypeVar

from bgjob._handlers.route import NeedsKey
from bgjob._sql.settlements import Claimed, delay_of
from bgjob.event import JobCancelled, JobLeaseLost, JobTimedOut, QueueIsEmpty, WorkerError
from bgjob.job import Job
from bgjob.result import Result


@dataclass(frozen=True, slots=True)
class Release:
    """The result of a job that did not start: it is released, and its attempt not counted."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The result of a job that its handler's own transaction settled."""

    result: Result


@dataclass(frozen=True, slots=True)
class Fenced:
    """The handler's own transaction found the lease lost, and was rolled back."""


@dataclass(frozen=True, slots=True)
class CommitUnknown:
    """The commit of the handler's own transaction failed, or its answer was lost."""

    result: Result
    """Applies if it was committed, so that the job is no longer held."""
    otherwise: Result


_AnyResult: TypeAlias = Result | Release | NeedsKey | Committed | Fenced | CommitUnknown
R_co = TypeVar("R_co", bound=_AnyResult, default=_AnyResult, covariant=True)


_R = TypeVar("_R", bound=_AnyResult)


class Outcome(NamedTuple, Generic[R_co]):
    """How a claimed job ended: with any result, unless its type says less."""

    claimed: Claimed
    result: R_co
    ran: float | None
    """Seconds in its handler; None if it did not run."""
    started: float | None = None
    """When its handler was called, by the server's clock, in seconds since 1970."""

    @property
    def waited(self) -> float | None:
        """Seconds between its due time and the call of its handler; None if that did not run."""
        return None if self.started is None else wait_of(self.claimed.job, self.started)

    def with_result(self, result: _R) -> "Outcome[_R]":
        """Return the same with another result."""
        return Outcome(self.claimed, result, self.ran, self.started)

    @property
    def delay(self) -> float:
        """Seconds until the job is due again; the delay of a retry is already decided."""
        result = self.result
        return delay_of(result.otherwise if isinstance(result, CommitUnknown) else result)


def wait_of(job: Job, started: float) -> float:
    """Return the seconds between a job's due time and its start, by the server's clock."""
    # What is known of that clock may be off by half a round trip.
    waited = started - job.next_run_at.timestamp()
    return waited if waited > 0 else 0.0  # half the time of max()


Unsettled: TypeAlias = Outcome[Result | Release | CommitUnknown]
"""An outcome that a settlement stores."""


# -- effects of an acknowledged exchange -------------------------------------------------


Event: TypeAlias = (
    Outcome[Result] | JobLeaseLost | JobCancelled | JobTimedOut | QueueIsEmpty | WorkerError
)
"""An event for the observer: a public value, or the outcome of a job that was settled."""


@dataclass(slots=True)
class Effects:
    """Jobs to run, and events to tell."""

    run: list[Claimed] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    locked: list[str] = field(default_factory=list)
    """Jobs whose rows or keys have been locked for so long that the observer is told."""
