"""How many jobs a worker holds: one for each slot, and more while they are quick."""

from collections.abc import Sequence
from math import inf

from bgjob._engine.outcome import Outcome
from bgjob._sql.settlements import Claimed

MOST_AHEAD = 2000
"""The most jobs claimed beyond the slots."""

_AHEAD = 0.02
"""Seconds of work claimed beyond the slots, or two round trips if they take longer: quick
jobs arrive in large batches, and slow ones are not claimed before there is a slot."""

_AHEAD_OF_BACKLOG = 0.05
"""The same for jobs as quick, once there is a backlog: jobs of a few milliseconds need fewer claims
(benchmarks/transactional.py). A burst that two workers are to share is over before that
(benchmarks/shares.py)."""

_BACKLOG = 0.1
"""Seconds in which no claim was less than full, after which there is a backlog."""

_GROWTH = 4
"""The factor by which claims may grow while jobs prove to be quick."""

_MOST_WORTHWHILE = 20
"""The room that is always worth a claim."""

_STALE = 0.1
"""Seconds without a claim after which jobs that were claimed ahead and have not started are
released: they are slower than the ones before."""

_QUICK = 20e-6
"""Seconds in a handler up to which one slot equals ten: waking a thread takes longer."""

_QUICK_CALL = _STALE / 2
"""Seconds in a handler up to which the next job is claimed meanwhile, if a limit or its batches
leave it few calls. Jobs that were claimed ahead and do not start in twice the time are released."""

_MEMORY = 20
"""Outcomes after which the earlier durations are forgotten."""


_MOST_BYTES = 16 * 1024 * 1024
"""The most bytes of payloads claimed beyond the slots."""

_SAMPLE = 16
"""The jobs of a claim whose payload sizes are measured."""


class Pace:
    """Measures how quick one queue's jobs are."""

    def __init__(self, concurrency: int) -> None:
        self.slots = concurrency
        """How many jobs may be in handlers; fewer than configured if some do not end."""
        self.running = 0
        """Jobs that are claimed and not finished: in a handler, or waiting for a slot or a key."""
        self.behind = 0
        """Those of them that take no slot, as they wait for one before them of the same key, or for
        a place of the limit of their type."""
        self.is_bounded = False
        """Whether a limit bounds the slots."""
        self._took = inf  # recent seconds in a handler
        self._ramp = concurrency  # grows from claim to claim: a few quick jobs prove little
        self._round_trip = 0.0
        self._claimed_at = -inf
        self._full_since = inf
        self._has_backlog = False
        self._ahead = MOST_AHEAD  # limited by the size of their payloads

    @property
    def capacity(self) -> int:
        """How many jobs may be in flight now."""
        return self.slots + self.beyond_slots

    @property
    def beyond_slots(self) -> int:
        """How many of them wait for a slot: more while jobs are quick."""
        return self.ahead(self.slots, is_bounded=self.is_bounded)

    def ahead(self, slots: int, *, is_bounded: bool) -> int:
        """Return how many jobs may be claimed beyond so many slots.

        Where a limit bounds the slots, no others can do the work while a job is claimed: one for
        each unless jobs are slow. Without that five places of a limit were used for 0.87 of the
        time by jobs of 20 ms (benchmarks/limits.py).
        """
        rounds = self._rounds
        if is_bounded and self._took <= _QUICK_CALL:
            rounds = max(rounds, 1)
        return min(rounds * slots, self._ramp, self._ahead)

    @property
    def _rounds(self) -> int:
        """How many jobs of what is claimed ahead one slot runs."""
        took, ahead = max(self._took, 1e-6), max(_AHEAD, 2 * self._round_trip)
        if took <= ahead and self._has_backlog:
            ahead = max(_AHEAD_OF_BACKLOG, ahead)
        return int(ahead / took)

    @property
    def free_slots(self) -> int:
        """How many jobs that are claimed now start now; it may be negative."""
        return self.slots - self.running + self.behind

    @property
    def has_free_slot(self) -> bool:
        """Whether a job that is claimed now starts now."""
        return self.free_slots > 0

    @property
    def room(self) -> int:
        """How many more jobs may be in flight; it may be negative."""
        capacity = self.capacity
        most = max(capacity, self.slots + MOST_AHEAD)
        return min(capacity + self.behind, most) - self.running

    def room_beside(self, wanting: int) -> int:
        """Return how many more jobs may be in flight beside those that wait for a key.

        The key of a job is granted by the exchange after its claim. While jobs are quick, so many
        are claimed meanwhile as if it had been granted. Without that the server waited while the
        worker ran the jobs of one claim, and the worker while the server granted the keys of the
        next (benchmarks/exclusive.py, 100 keys).
        """
        return self.room + min(wanting, self.beyond_slots)

    @property
    def worthwhile(self) -> int:
        """The least room for which a claim is worth its round trip and its commit.

        Any, if a slot is free. Otherwise jobs wait already, and the next claim waits until half of
        them have started: jobs of some milliseconds would be claimed one by one, as each one ends
        (benchmarks/transactional.py).
        """
        if self.has_free_slot:
            return 1
        return max(min((self.capacity - self.slots) // 2, _MOST_WORTHWHILE), 1)

    @property
    def in_a_row(self) -> int:
        """How many jobs one slot runs soon: so many of a key are claimed at once.

        As long as nothing is known of them, as many as there are slots. They hold up none but one
        another.
        """
        if self._took == inf:
            return self.slots
        return 1 + min(self._rounds, MOST_AHEAD)

    @property
    def is_quick(self) -> bool:
        """Whether jobs are so quick that one slot runs a batch as soon as several slots would."""
        return self._took < _QUICK

    def finished(self, outcomes: Sequence[Outcome]) -> None:
        """Record the end of jobs, and how long their handlers ran."""
        self.running -= len(outcomes)
        took = [outcome.ran for outcome in outcomes if outcome.ran is not None]
        if took:
            weight = 1.0 if self._took == inf else min(1.0, len(took) / _MEMORY)
            before = 0.0 if self._took == inf else self._took
            self._took = before + weight * (sum(took) / len(took) - before)

    def exchanged(self, seconds: float) -> None:
        """Record how long an exchange took."""
        self._round_trip = seconds

    def looked(self, now: float, *, has_more: bool) -> None:
        """Record whether the last claim was full."""
        self._full_since = min(self._full_since, now) if has_more else inf
        self._has_backlog = now - self._full_since >= _BACKLOG

    def claimed(self, jobs: Sequence[Claimed], now: float) -> None:
        """Record a claim, and the size of its payloads."""
        self.running += len(jobs)
        self._claimed_at = now
        some = jobs[:: len(jobs) // _SAMPLE + 1]
        size = sum(len(claimed.job.arg or b"") for claimed in some) // len(some)
        self._ahead = min(_MOST_BYTES // (size + 1), MOST_AHEAD)
        self._ramp = min(_GROWTH * self._ramp, MOST_AHEAD)

    @property
    def stale_at(self) -> float:
        """When to release jobs that were claimed ahead and have not started."""
        return self._claimed_at + _STALE if self.running > self.slots or self.behind else inf

    def slow_down(self, now: float) -> None:
        """Assume that jobs are slow, until the next ones show."""
        self._claimed_at = now
        self._took = _STALE if self._took == inf else max(self._took, _STALE)
        self._ramp = max(self.slots, 1)

    def hurry_back(self) -> None:
        """Release jobs that have not started at the next step."""
        self._claimed_at = -inf
