"""Reservations: while a slot commits a transactional job, the next one is reserved for it.

1. A slot that commits while jobs wait, and no slot is free, reserves the first of them, and sends
   the begin of its transaction in the message that commits: a round trip less for each job.
2. It runs that job next, in that session; with a begin of its own if the message failed.
3. If the commit takes long while another slot is free, or the worker takes its jobs back, the
   control thread puts the reserved job back in front of those that wait.
4. A slot that finds its job put back, or ends before it runs it, rolls back that transaction.

Who removes a reservation has its job. One that is made or put back moves under the lock of the
slots, so that a search for lost jobs (executor) finds it on either side.
"""

from math import inf
from time import monotonic
from typing import NamedTuple

from bgjob._handlers.route import Route
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.batch import Batch
from bgjob._worker.slots import Slot, Slots

_LONGEST = 0.05
"""Seconds after which a free slot runs a job that is reserved for a slot that still commits."""


class _Reservation(NamedTuple):
    claimed: Claimed
    since: float


class Reservations:
    """The jobs that are reserved for slots. Thread-safe.

    Args:
        slots: the slots, and the jobs that wait for any of them.

    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._of: dict[Slot, _Reservation] = {}

    def reserve(self, slot: Slot, *, on_loop: bool) -> Claimed | None:
        """Reserve the next job for a slot that commits now; None if a begin would be too early.

        That is, if another slot could start the job now, or it needs something else first.
        """
        slots = self._slots
        if slots.free or slots.is_limited or slots.is_stopping or slots.names_keys:
            return None
        try:
            first = slots.jobs[0]
            if not self._can_begin(first, on_loop=on_loop):
                return None
            with slots.lock:
                slot.reserved = claimed = slots.jobs.popleft()
                self._of[slot] = _Reservation(claimed, monotonic())
        except IndexError:
            return None
        if claimed is first or self._can_begin(claimed, on_loop=on_loop):
            return claimed
        self.put_back(slot)  # another slot has taken the first one
        return None

    def _can_begin(self, claimed: Claimed, *, on_loop: bool) -> bool:
        if isinstance(claimed, Batch) or claimed.job.arg is ELSEWHERE:
            return False
        route = self._slots.mux.route(claimed.job)
        return (
            isinstance(route, Route)
            and route.is_transactional
            and not route.needs_store
            and route.is_coroutine == on_loop
        )

    def take(self, slot: Slot) -> Claimed:
        """Take the job that is reserved for a slot, or the next of all if it was put back.

        Raises:
            IndexError: there is none.

        """
        reservation = self._of.pop(slot, None)
        if reservation is None:
            self.cancel(slot)
        slot.reserved = None
        return self._slots.next_job() if reservation is None else reservation.claimed

    def cancel(self, slot: Slot) -> None:
        """Put back the job of a slot that does not run it, and end its transaction. Idempotent."""
        if slot.reserved is not None:
            self.put_back(slot)
            self._slots.transactions.drop(slot.reserved)

    def put_back(self, slot: Slot) -> None:
        """Put back the job that is reserved for a slot: any may take it, and that one finds out."""
        slots = self._slots
        with slots.lock:
            reservation = self._of.pop(slot, None)
            if reservation is not None:
                slots.jobs.appendleft(reservation.claimed)
        if reservation is not None:
            slots.finished()

    def put_back_all(self) -> None:
        """Put back all reserved jobs."""
        for slot in reversed(self._of.copy()):
            self.put_back(slot)

    def put_back_overdue(self, now: float) -> None:
        """Put back the jobs whose slots have been committing for too long, if a slot is free."""
        if self._slots.free and self._of:
            for slot, reservation in reversed(self._of.copy().items()):
                if now >= reservation.since + _LONGEST:
                    self.put_back(slot)

    @property
    def overdue_at(self) -> float:
        """When to call `put_back_overdue` next."""
        if not self._of or not self._slots.free:
            return inf
        return min((r.since for r in self._of.copy().values()), default=inf) + _LONGEST

    @property
    def jobs(self) -> list[Claimed]:
        """The reserved jobs."""
        return [reservation.claimed for reservation in self._of.copy().values()]
