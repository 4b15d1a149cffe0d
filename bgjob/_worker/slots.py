"""The slots of a queue: how many are free, how jobs reach them, and how outcomes return.

A slot is the right to run one handler. A thread or a task of the loop has it, and takes jobs
from one shared deque for as long as there are any, so that a job crosses a thread once per
batch, and a slow job never holds up one behind it while a slot is idle. Measured per job:
under 0.3 µs for a shared deque, 2.3 µs for call_soon_threadsafe per batch of 500, 100 µs for
an awaited to_thread.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from bgjob._engine.outcome import Outcome, Release
from bgjob._handlers.expiry import Decided, Routed, decided
from bgjob._postgres.fork import ForkGuard
from bgjob._running.transaction import Transactions
from bgjob._sql.settlements import Claimed
from bgjob._worker.batch import Batch, members
from bgjob._worker.clock import ServerClock
from bgjob._worker.lines import Lines
from bgjob._worker.timeouts import Attempt, Timeouts
from bgjob.job import Job
from bgjob.mux import Mux

if TYPE_CHECKING:
    from bgjob._running.checkpoints import AsyncSessionStore, SessionStore

_MOST_LOCALS = 8
"""Failures that keep the variables of their frames while they wait to be settled and told.

Of 20,000 that came at once, each with 200 kB of variables, all waited for the log: 4 GB. See
benchmarks/failures.py."""

quick_outcome = partial(tuple.__new__, Outcome)  # half the time of Outcome(...)

inside: ContextVar["Slots | None"] = ContextVar("bgjob_inside", default=None)
"""The slots whose handler is running in this context."""


class Slot:
    """A thread or a task of the loop: whether it has a slot, and its job."""

    __slots__ = ("claimed", "error", "has_slot", "interrupt", "is_lost", "reserved", "run")

    def __init__(self, claimed: Claimed | None, *, has_slot: bool = True) -> None:
        self.claimed = claimed
        """The job that it runs; None while it takes the next one, or is idle."""
        self.has_slot = has_slot
        self.run: Attempt | None = None
        """The timeout of its handler, if it has one; or how it was given up."""
        self.interrupt: Attempt | None = None
        """Set by the control thread, which gives up the handler of a cancelled job."""
        self.error: BaseException | None = None
        """The exception that ended it."""
        self.is_lost = False
        """Whether its job has an outcome already, because its loop will not continue."""
        self.reserved: Claimed | None = None
        """The job that was reserved for it (reservations), until it takes the next one."""

    def rest(self) -> None:
        """Become idle, under the lock; a task ends instead."""

    def has_given_up(self, claimed: Claimed) -> bool:
        """Whether the run of a job was given up: it was cancelled, or took too long."""
        attempts = (self.run, self.interrupt)
        return any(a is not None and a.is_overdue and a.is_of(claimed) for a in attempts)


class Slots:
    """The slots of a queue, and what the threads and tasks that have them share. Thread-safe.

    Args:
        mux: the handlers.
        transactions: the connections of transactional handlers.
        fork_guard: detects a fork.
        queue: used in names and error texts.
        clock: the server's time.
        concurrency: the number of slots.
        lease: seconds to which a checkpoint extends a job's lease.
        started: called on the handler's thread before it runs.
        timed_out: called with jobs whose handlers do not end.
        finished: called from any thread when there are outcomes to collect or slots to check.
        idle: called from any thread when a slot has found no job.
        hindered: called from any thread with an error that prevents jobs from running.

    """

    def __init__(
        self,
        mux: Mux,
        transactions: Transactions,
        fork_guard: ForkGuard,
        *,
        queue: str,
        clock: ServerClock,
        concurrency: int,
        lease: float,
        started: Callable[[Job], None] | None,
        timed_out: Callable[[Job, float], None],
        finished: Callable[[], None],
        idle: Callable[[], None],
        hindered: Callable[[BaseException], None],
    ) -> None:
        self.mux = mux
        self.transactions = transactions
        self.fork_guard = fork_guard
        self.queue = queue
        self.clock = clock
        self.lease = lease
        self.started = started
        self.timed_out = timed_out
        self.finished = finished
        self._idle = idle
        self.hindered = hindered
        self.context = Context()
        """Jobs run in copies of it, and a copy that a job changed is not used for the next.

        It is empty, so that a job does not depend on which thread started its slot.
        """
        self.context.run(inside.set, self)
        self.names_keys = mux.names_keys
        self.route_of = self.isolated if self.names_keys else mux.route
        self.jobs: deque[Claimed] = deque()
        self.lines = Lines(self.jobs)
        self.outcomes: deque[Outcome] = deque()
        self.lock = threading.Lock()
        """Guards the free slots, which threads are idle, and which waiting jobs are reserved."""
        self.concurrency = self.free = concurrency
        self.allowed = concurrency
        """How many slots may be in use, by the queue's limit; only `take` obeys it."""
        self.is_limited = False
        """Whether jobs have to start in time, because of that limit."""
        self.start_by: Mapping[int, float] = {}
        """When the jobs of a claim must not start any more, by its token."""
        self.run_until = inf
        """When no job may start any more."""
        self.next_job: Callable[[], Claimed] = self.jobs.popleft
        """Takes the next job; raises IndexError if there is none."""
        self.timeouts = Timeouts(concurrency, finished)
        self.behind = 0
        """How many outcomes and events waited when the control thread last looked."""
        self.is_closed = False
        self.is_stopping = False
        """Whether the worker shuts down: a batch that failed is not run again."""
        self.needs_watch = False
        """Whether a slot has died since they were last checked."""

    @property
    def is_behind(self) -> bool:
        """Whether so many outcomes wait that a failure must not keep its variables."""
        return len(self.outcomes) + self.behind >= _MOST_LOCALS

    def collect(self) -> list[Outcome]:
        """Return the outcomes since the last call."""
        outcomes, lines = self.outcomes, self.lines
        collected = [outcomes.popleft() for _ in range(len(outcomes))]
        if lines.is_used:
            for outcome in lines.still_in(collected):
                self.leave_line(outcome.claimed, outcome.result)
        return collected

    def leave_line(self, claimed: Claimed, result: object) -> None:
        """Start the next job of a key after one has ended."""
        if self.lines.leave(claimed, goes_on=not isinstance(result, Release)):
            self.finished()

    def release(self, claimed: Claimed) -> None:
        """Release a job, or those of a batch, that did not start."""
        for each in members(claimed):
            self.done(Outcome(each, Release(), None))
        if isinstance(claimed, Batch):
            claimed.left = 0

    def done(self, outcome: Outcome) -> None:
        """Pass an outcome to the control thread."""
        self.outcomes.append(outcome)
        self.finished()

    def take(self, most: int) -> int:
        """Take up to so many free slots; return how many."""
        with self.lock:
            count = max(min(self.usable, most), 0)
            self.free -= count
        return count

    @property
    def usable(self) -> int:
        """How many free slots may be taken."""
        return self.free - (self.concurrency - self.allowed)

    def limit(self, start_by: Mapping[int, float], run_until: float, *, is_on: bool) -> None:
        """Record until when jobs may start, because of the queue's limit."""
        self.start_by, self.run_until, self.is_limited = start_by, run_until, is_on
        self.next_job = self._next_in_time if is_on else self.jobs.popleft

    def _next_in_time(self) -> Claimed:
        """Take the next job that may still start; release those that come too late."""
        jobs = self.jobs
        while True:
            claimed = jobs.popleft()
            now, start_by = monotonic(), self.start_by
            if now < self.run_until:
                if type(claimed) is Batch:
                    is_late = any(now >= start_by.get(each.token, inf) for each in claimed.all)
                else:
                    # As a generator over its one job it took three times as long.
                    is_late = now >= start_by.get(claimed.token, inf)
                if not is_late:
                    return claimed
            self.release(claimed)

    def free_again(self, count: int = 1) -> None:
        """Make slots free again."""
        with self.lock:
            self.free += count

    def free_slot(self, slot: Slot) -> None:
        """Free the slot of a thread that is about to be idle."""
        with self.lock:
            self.free += 1
            slot.claimed = None
            slot.has_slot = False

    def give_up(self, slot: Slot) -> bool:
        """Free the slot and make its thread idle; False if a job came meanwhile."""
        with self.lock:
            # submit() appends before it takes the lock: it sees the slot free,
            # or this sees its job.
            if self.jobs and not self.is_closed:
                return False
            self.free += 1
            slot.has_slot = False
            slot.rest()
        self._idle()
        return True

    def was_given_up(self, slot: Slot, claimed: Claimed) -> bool:
        """Whether the handler of a cancelled job, which has just ended, was given up before.

        It is called after the slot's `claimed` was changed, and the control thread sets
        `interrupt` before it reads that: so at least one of the two sees the other. If both do,
        the first decides.
        """
        interrupt, slot.interrupt = slot.interrupt, None
        if interrupt is None or not interrupt.is_of(claimed):
            return False
        if interrupt.decide(is_overdue=False):
            slot.run = interrupt
            return True
        return False

    def come_back(self, slot: Slot) -> bool:
        """Continue after a job that was given up; False if its slot was replaced."""
        if self.fork_guard.is_child:
            self.fork_guard.end(None)
        assert slot.run is not None  # noqa: S101 (it was given up)
        slot.has_slot = has_slot = self.timeouts.slot_recovered(slot.run)
        slot.claimed = slot.run = None
        if not has_slot:
            with self.lock:
                slot.rest()
        self.finished()  # the slot may be needed
        # Not the attribute: once its thread is idle, another one may give it a slot.
        return has_slot

    def decided(self, route: Routed) -> Decided:
        """Decide what depends on the server's time; return a route if the job runs after all."""
        return decided(route, self.clock.now())

    def store(self, slot: Slot, claimed: Claimed) -> "SessionStore":
        """Return where the checkpoint of a slot's job is kept, for a plain handler."""
        from bgjob._running.checkpoints import SessionStore  # noqa: PLC0415 (few jobs have one)

        return SessionStore(
            self.transactions,
            claimed,
            lease=self.lease,
            is_stopping=partial(self._is_stopping, slot, claimed),
        )

    def async_store(self, slot: Slot, claimed: Claimed) -> "AsyncSessionStore":
        """Return where the checkpoint of a slot's job is kept, for a coroutine handler."""
        from bgjob._running.checkpoints import AsyncSessionStore  # noqa: PLC0415 (few jobs have one)

        return AsyncSessionStore(
            self.transactions,
            claimed,
            lease=self.lease,
            is_stopping=partial(self._is_stopping, slot, claimed),
        )

    def _is_stopping(self, slot: Slot, claimed: Claimed) -> bool:
        return self.transactions.is_leaving or slot.has_given_up(claimed)

    def isolated(self, job: Job) -> Routed:
        """Route a job in a context of its own, because the type's key callable may change it."""
        return self.context.copy().run(self.mux.route, job)
