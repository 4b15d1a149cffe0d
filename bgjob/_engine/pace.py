"""How many jobs a worker holds at once: one a slot, and more while they are quick."""

from collections.abc import Sequence
from math import inf

from bgjob._engine.protocol import Outcome
from bgjob._sql.settlements import Claimed

MOST_AHEAD = 2000
"""Jobs that are claimed beyond the slots, at most."""

_AHEAD = 0.02
"""Seconds of work claimed beyond the slots, or two round trips where they take longer: quick
jobs arrive in large batches, and slower ones are not claimed before there is a slot."""

_GROWTH = 4
"""How many times as many jobs as before a claim may bring while they prove to be quick."""

_STALE = 0.1
"""Seconds without a claim after which jobs that were claimed ahead and have not started are
given back: they are slower than those before them were."""

_QUICK = 20e-6
"""Seconds in a handler up to which one slot is as good as ten: a thread takes longer to wake."""

_MEMORY = 20
"""Outcomes after which what was known of their quickness is forgotten."""


_MOST_BYTES = 16 * 1024 * 1024
"""Payloads that are claimed beyond the slots, at most."""

_SAMPLE = 16
"""Jobs of a claim that are looked at for the size of their payloads."""


class Pace:
    """Follows how quick the jobs are; one queue's."""

    def __init__(self, concurrency: int) -> None:
        self.slots = concurrency
        """How many there are now."""
        self._took = inf  # seconds in a handler, of late
        self._ramp = concurrency  # a few quick jobs prove little: it grows from claim to claim
        self._round_trip = 0.0
        self._claimed_at = -inf
        self._ahead = MOST_AHEAD  # as far as their payloads may be kept

    @property
    def capacity(self) -> int:
        """Jobs that may be in flight now."""
        rounds = int(max(_AHEAD, 2 * self._round_trip) / max(self._took, 1e-6))
        return self.slots + min(rounds * self.slots, self._ramp, self._ahead)

    @property
    def is_quick(self) -> bool:
        """Whether jobs are so quick that one slot runs a batch of them as soon as several do."""
        return self._took < _QUICK

    def finished(self, outcomes: Sequence[Outcome]) -> None:
        """Learn from jobs that ran."""
        took = [outcome.took for outcome in outcomes if outcome.took is not None]
        if took:
            weight = 1.0 if self._took == inf else min(1.0, len(took) / _MEMORY)
            before = 0.0 if self._took == inf else self._took
            self._took = before + weight * (sum(took) / len(took) - before)

    def exchanged(self, seconds: float) -> None:
        """Learn how long an exchange takes."""
        self._round_trip = seconds

    def claimed(self, jobs: Sequence[Claimed], now: float) -> None:
        """Record that a claim brought jobs, and of what size."""
        self._claimed_at = now
        some = jobs[:: len(jobs) // _SAMPLE + 1]
        size = sum(len(claimed.job.arg or b"") for claimed in some) // len(some)
        self._ahead = min(_MOST_BYTES // (size + 1), MOST_AHEAD)
        self._ramp = min(_GROWTH * self._ramp, MOST_AHEAD)

    def stale_at(self, running: int) -> float:
        """Give the time at which those of the running that have not started are to go back."""
        return self._claimed_at + _STALE if running > self.slots else inf

    def slow_down(self, now: float) -> None:
        """Take jobs for slow from here on; the next ones tell."""
        self._claimed_at = now
        self._took, self._ramp = max(self._took, _STALE), max(self.slots, 1)

    def hurry_back(self) -> None:
        """Let what has not started go back at once."""
        self._claimed_at = -inf
