"""Jobs of one type that a slot runs in one call of their handler."""

from collections.abc import Sequence
from typing import Self

from bgjob._sql.settlements import Claimed


class Batch(Claimed):
    """Jobs that a slot runs in one call, or in several after one that failed.

    It takes the place of a job in the deque, and in a slot, and poses there as its first.
    """

    all: list[Claimed]
    """Its jobs, also those that have ended."""
    calls: list[list[Claimed]]
    """The jobs of the calls that are to follow."""
    current: list[Claimed]
    """Those of the call that runs, or has run last."""
    left: int
    """How many of its jobs have no outcome."""
    gone: set[Claimed]
    """The cancelled jobs: they are in no further call."""
    has_begun = False
    """Whether a slot runs it."""
    is_rest = False
    """Whether it is what a slot that was given up has left."""
    interrupted = 0
    """How many of its jobs were cancelled at the end and released."""
    is_told = False
    """Whether the observer was told that its jobs start."""
    has_strangers = False
    """Whether the observer was told of ids that are not of its jobs."""

    @classmethod
    def of(cls, claims: list[Claimed]) -> Self:
        """Make a batch of jobs of one type."""
        first = claims[0]
        if first.job.expires is not None:
            # Each of its jobs may have expired: its slot checks that.
            first = first._replace(job=first.job._replace(expires=None))
        batch = cls(*first)
        batch.all, batch.calls, batch.current = claims, [[*claims]], []
        batch.left, batch.gone = len(claims), set()
        return batch

    @property
    def waiting(self) -> list[Claimed]:
        """The jobs of the calls that are to follow."""
        return [claimed for claims in self.calls for claimed in claims]


def members(claimed: Claimed) -> Sequence[Claimed]:
    """Return the jobs of a batch, or the single one."""
    return claimed.all if isinstance(claimed, Batch) else (claimed,)


def running(claimed: Claimed) -> Sequence[Claimed]:
    """Return the jobs of the call that a slot runs."""
    return claimed.current if isinstance(claimed, Batch) else (claimed,)


def unfinished(claimed: Claimed) -> Sequence[Claimed]:
    """Return the job, or those of a running batch that have no outcome."""
    return [*claimed.current, *claimed.waiting] if isinstance(claimed, Batch) else (claimed,)
