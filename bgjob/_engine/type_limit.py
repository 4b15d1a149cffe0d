"""The limit of a type, as far as one worker's queue is concerned."""

from collections import deque
from collections.abc import Collection
from math import inf

from bgjob._engine.limits import Limits
from bgjob._engine.pace import Pace
from bgjob._sql.settlements import Claimed

_ENOUGH = 1 << 30
"""Stands for no limit."""


class TypeLimit:
    """What a worker knows of the limit of a type, in its queue.

    Args:
        limits: its ration.
        pace: how quick jobs are.
        slots: the worker's slots.
        in_batches: whether its jobs are handled in batches.

    """

    __slots__ = (
        "_in_batches",
        "_pace",
        "_slots",
        "busy",
        "held",
        "idle_at",
        "limits",
        "rests",
        "waits",
    )

    def __init__(self, limits: Limits, pace: Pace, slots: int, *, in_batches: bool) -> None:
        self.limits = limits
        self._pace = pace
        self._slots = slots
        self._in_batches = in_batches
        self.waits = False
        """Whether jobs of the type wait aside, as far as is known."""
        self.busy = 0
        """Its jobs that have a place of this worker's, and have not ended."""
        self.held: deque[Claimed] = deque()
        """Its claimed jobs that wait for a place."""
        self.idle_at = -inf
        self.rests = True
        """Whether it has had no job for a while, or none yet."""

    @property
    def is_used(self) -> bool:
        """Whether it has jobs, here or aside."""
        return self.waits or self.busy > 0 or bool(self.held)

    @property
    def is_bound(self) -> bool:
        """Whether its places bound how many jobs may be handed out.

        They do not if there is one for each slot. But each job of a batch takes a place.
        """
        limits, slots = self.limits, self._slots
        return limits.bounds_places and (self._in_batches or limits.places(slots) < slots)

    @property
    def is_ample(self) -> bool:
        """Whether its jobs are claimed like others, within its ration.

        Also while some wait aside: otherwise those that are claimed now would have to wait behind
        them, and as many again behind these, as long as jobs flow.
        """
        limits = self.limits
        return limits.is_on and limits.got_all and not (self.rests or self.is_bound)

    def count(self, busy: int) -> None:
        """Record how many jobs of the type have been handed out, and have not ended."""
        self.busy = busy
        # Of those with a slot each, the others wait for one.
        self.limits.shrink(busy if self._in_batches else min(busy, self._slots))

    def drop(self, claims: Collection[Claimed]) -> list[Claimed]:
        """Drop claims that are lost; return those that had no place yet."""
        dropped = [claimed for claimed in self.held if claimed in claims]
        if dropped:
            self.held = deque(claimed for claimed in self.held if claimed not in claims)
        return dropped

    def free(self, slots: int) -> int:
        """Return how many more jobs may be handed out, as far as its places are concerned."""
        return self.limits.places(slots) - self.busy if self.is_bound else _ENOUGH

    def most(self, now: float, slots: int) -> int:
        """Return how many jobs that wait aside may be claimed."""
        return min(self.limits.most(now), self.room(slots))

    def room(self, slots: int) -> int:
        """Return how many more jobs may be claimed, as far as its places are concerned."""
        limits = self.limits
        if not limits.bounds_places:
            return _ENOUGH
        if not limits.is_known:
            return slots - self.busy
        if not self.is_bound:
            return _ENOUGH
        places = limits.places(slots)
        ahead = self._pace.ahead(places, is_bounded=True) if limits.is_tight(slots) else 0
        return places + ahead - self.busy - len(self.held)
