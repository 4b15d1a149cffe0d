"""How many jobs a worker holds where some handlers take several jobs at once.

A batch of n jobs needs one slot, so that n - 1 of them count as none while it runs, and a free
slot has room for a whole batch, however long a call takes. While calls are quick, the next batch is
claimed while one runs. The jobs of a claim may be of other types, too: the worker claims no more of
those than it has slots for, by the share that they had in the last claims.
"""

from collections.abc import Mapping, Sequence
from math import inf

from typing_extensions import override

from bgjob._engine.pace import _MEMORY, _QUICK_CALL, _STALE, MOST_AHEAD, Pace
from bgjob._sql.settlements import Claimed


class BatchPace(Pace):
    """Measures how quick one queue's jobs are, and how many of them are in batches.

    Args:
        concurrency: the number of slots.
        sizes: by job type, the most jobs in one call.
        only_batches: whether the worker has no other types.

    """

    def __init__(
        self, concurrency: int, sizes: Mapping[str, int], *, only_batches: bool = False
    ) -> None:
        super().__init__(concurrency)
        self.merged = 0
        """Running jobs that need no slot, because they run in the calls of others."""
        self.gathered = 0
        """Jobs that wait for others of their type."""
        self.free = concurrency
        """How many slots are free."""
        self._must_hurry = False
        self._sizes = sizes
        self._largest = max(sizes.values())
        self._singles = 0.0 if only_batches else 1.0  # the share of other types in claims

    @property
    @override
    def capacity(self) -> int:
        is_quick = self._largest * self._took <= _QUICK_CALL
        most = self._largest * (self.free + is_quick)
        if self._singles:
            most = min(most, int(self.free / self._singles))
        return super().capacity + self.merged + min(most, self._ahead, MOST_AHEAD)

    @property
    @override
    def free_slots(self) -> int:
        return super().free_slots + self.merged + self.gathered

    @override
    def claimed(self, jobs: Sequence[Claimed], now: float) -> None:
        super().claimed(jobs, now)
        singles = sum(claimed.job.type not in self._sizes for claimed in jobs) / len(jobs)
        weight = min(1.0, len(jobs) / _MEMORY)
        self._singles += weight * (singles - self._singles)

    def flushed(self, now: float) -> None:
        """Record that jobs have waited for others for long enough: they are to start now."""
        self._claimed_at = now

    @property
    @override
    def stale_at(self) -> float:
        if self._must_hurry:
            return -inf
        is_ahead = self.running - self.merged - self.gathered > self.slots
        return self._claimed_at + _STALE if is_ahead or self.behind else inf

    @override
    def slow_down(self, now: float) -> None:
        self._must_hurry = False
        super().slow_down(now)

    @override
    def hurry_back(self) -> None:
        # Of the jobs that wait for others, too, though they do not wait for a slot.
        self._must_hurry = self.gathered > 0
        super().hurry_back()
