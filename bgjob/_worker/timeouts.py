"""Handlers with a timeout, and what happens to those that exceed it.

A coroutine is cancelled, and ends with a JobTimeoutError. A thread cannot be
stopped, and a coroutine may ignore its cancellation: such a run is given up. Its
job fails immediately, another slot replaces its slot, its later result is
dropped, and its transaction is rolled back. The same happens to the handler of a
job that was cancelled, with a timeout or without; but the job is gone already.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Any

from bgjob._engine.outcome import Outcome
from bgjob._handlers.route import Route
from bgjob._sql.settlements import Claimed
from bgjob._worker.batch import running
from bgjob.errors import JobTimeoutError
from bgjob.job import Job

UNWINDING = 1.0
"""Seconds within which a cancelled coroutine should end."""


class Attempt:
    """A handler's run of a job, and the decision whether it is given up before it ends."""

    __slots__ = ("_decision", "claimed", "is_slot_kept")

    def __init__(self, claimed: Claimed) -> None:
        self.claimed = claimed
        self._decision: dict[str, bool] = {}
        self.is_slot_kept: bool | None = None
        """Of a run that was given up and has ended: whether its slot was not replaced."""

    def decide(self, *, is_overdue: bool) -> bool:
        """Decide whether the run is given up; the first decision holds, and is returned.

        Without a lock, which a handler's fork might find locked, and another thread's exception
        might leave undecided.
        """
        return self._decision.setdefault("is_overdue", is_overdue)

    @property
    def is_overdue(self) -> bool:
        """Whether it was given up: its job has ended, whether the handler returned or not."""
        return self._decision.get("is_overdue", False)

    def is_of(self, claimed: Claimed | None) -> bool:
        """Whether it is a run of this claim."""
        ours = self.claimed
        return claimed is not None and (claimed.token, claimed.job.id) == (ours.token, ours.job.id)


class Run(Attempt):
    """One run of a handler with a timeout; `route` is the route to run."""

    __slots__ = ("_began", "_limited", "_timeouts", "ends", "route", "timeout")

    def __init__(self, timeouts: "Timeouts", limited: Route, claimed: Claimed) -> None:
        super().__init__(claimed)
        assert limited.policy.timeout is not None  # noqa: S101 (it is why there is a Run)
        self.timeout = limited.policy.timeout
        """Seconds."""
        self.route = replace(limited, handler=self._await if limited.is_coroutine else self._call)
        self._timeouts = timeouts
        self._limited = limited

    def fail(self, now: float, offset: float) -> Outcome:
        """Return the outcome of a run that is given up.

        Args:
            now: by the monotonic clock.
            offset: the server's time less the monotonic one.

        """
        [claimed] = running(self.claimed)
        error = self._limited.timed_out(claimed.job)
        return Outcome(
            claimed,
            self._limited.failed(claimed.job, error),
            now - self._began,
            offset + self._began,
        )

    def timed_out(self) -> JobTimeoutError:
        """Return the error of a run that is given up."""
        return self._limited.timed_out([claimed.job for claimed in running(self.claimed)])

    def _call(self, job: Job, *conn: Any) -> object:
        self._begin(0.0)
        try:
            return self._limited.handler(job, *conn)
        finally:
            self._end(job)

    async def _await(self, job: Job, *conn: Any) -> object:
        self._begin(UNWINDING)
        try:
            return await self._limited.awaited(job, *conn)
        finally:
            self._end(job)

    def _begin(self, more: float) -> None:
        self._began = monotonic()
        self.ends = self._began + self.timeout + more
        self._timeouts.began(self)

    def _end(self, job: Job) -> None:
        if not self._timeouts.ended(self):
            raise self._limited.timed_out(job)  # a transaction must roll back


class Timeouts:
    """The runs with a timeout of one queue of a worker. Thread-safe.

    Args:
        slots: the number of slots, and how many lost slots are replaced at most: each
            abandoned run may keep a thread, and whatever else its handler holds.
        began: called when a run has begun.

    """

    def __init__(self, slots: int, began: Callable[[], None]) -> None:
        self._slots = slots
        self._began = began
        self._runs: dict[Run, None] = {}
        self._lock = threading.Lock()
        self._lost = 0  # runs that were given up and have not returned

    @property
    def next_at(self) -> float:
        """When to give up the first of them."""
        if not self._runs:
            return inf
        # An atomic copy: other runs begin and end meanwhile.
        return min((run.ends for run in self._runs.copy()), default=inf)

    @property
    def missing(self) -> int:
        """The number of slots that are lost and not replaced."""
        return max(self._lost - self._slots, 0)

    def limit(self, route: Route, claimed: Claimed) -> Run:
        """Return a run of a job; its timeout starts when its handler is called."""
        return Run(self, route, claimed)

    def began(self, run: Run) -> None:
        """Start the timeout of a run."""
        self._runs[run] = None
        self._began()

    def ended(self, run: Run) -> bool:
        """End the timeout of a run; False if it was given up before. Idempotent."""
        self._runs.pop(run, None)
        return not run.decide(is_overdue=False)

    def overdue(self, now: float) -> list[Run]:
        """Return the runs that exceeded their timeouts, and give them up."""
        ended = [run for run in self._runs.copy() if run.ends <= now]
        return [run for run in ended if self.give_up(run)]

    def give_up(self, run: Run) -> bool:
        """Give up a run; False if it has ended, or was given up before."""
        self._runs.pop(run, None)
        return not run.is_overdue and run.decide(is_overdue=True)

    def slot_lost(self) -> bool:
        """Record that a handler is abandoned. True if its slot is replaced."""
        with self._lock:
            self._lost += 1
            return self._lost <= self._slots

    def slot_recovered(self, run: Attempt) -> bool:
        """Record that an abandoned handler returned. True if its slot was not replaced.

        Idempotent, because its thread may be ended just after this.
        """
        with self._lock:
            if run.is_slot_kept is None:
                self._lost -= 1
                run.is_slot_kept = self._lost >= self._slots
            return run.is_slot_kept
