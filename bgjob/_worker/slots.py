"""Runs handlers in a bounded number of slots, on threads and on an event loop.

A slot is the right to run one handler. It lives on a thread or in a task of
the loop and takes jobs from one shared queue for as long as there are any, so
that a job crosses a thread once per batch, and a slow job never holds up one
behind it while a slot is idle. Measured per job: under 0.3 µs for a shared
queue, 2.3 µs for call_soon_threadsafe per batch of 500, 100 µs for an awaited
to_thread. A slot that takes a job of the other kind moves to the loop or to a thread
with it, so that plain and coroutine handlers share the same bound.
"""

import asyncio
import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextvars import Context, ContextVar
from functools import partial
from math import inf
from time import monotonic, perf_counter

from bgjob._engine.outcome import Outcome, Release
from bgjob._handlers.route import COMPLETE, Awaiting, NeedsKey
from bgjob._postgres.fork import ForkGuard
from bgjob._running.loop import Loop
from bgjob._running.transaction import Ending, NotBegun, Transactions
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.timeouts import Run, Timeouts
from bgjob.errors import BgjobError, JobTimeoutError, LoopBlockedError
from bgjob.job import Job
from bgjob.mux import Mux, Route
from bgjob.result import MoveToDlq, Result, Retry

_outcome = partial(tuple.__new__, Outcome)  # half the time of Outcome(...)

inside: ContextVar["Slots | None"] = ContextVar("bgjob_inside", default=None)
"""The slots whose handler is running in this context."""

_TURN = 0.001
"""Seconds for which one task runs jobs before it yields to the loop's other tasks."""


_FIRST_PAUSE = 0.05
"""Seconds after which starting a thread is tried again; doubles."""
_LONGEST_PAUSE = 2.0


class _Slot:
    """The right to run one handler: where it runs, and its job."""

    __slots__ = ("claimed", "error", "has_slot", "is_lost", "run")

    def __init__(self, claimed: Claimed | None, *, has_slot: bool = True) -> None:
        self.claimed = claimed
        """The job that it runs; None while it takes the next one, or is idle."""
        self.has_slot = has_slot
        self.run: Run | None = None
        """The timeout of its handler, if it has one."""
        self.error: BaseException | None = None
        """The exception that ended it."""
        self.is_lost = False
        """Whether its job has an outcome already, because its loop will not continue."""


class _Thread(_Slot):
    """A handler thread, and the lock on which it waits for work."""

    __slots__ = ("is_over", "rest", "thread")

    def __init__(self, claimed: Claimed | None, *, has_slot: bool = True) -> None:
        super().__init__(claimed, has_slot=has_slot)
        self.rest = threading.Lock()
        self.thread: threading.Thread | None = None
        """None until it has started."""
        self.is_over = False


class _Task(_Slot):
    """A task of the loop."""

    __slots__ = ()


class _Move:
    """Slots on their way to the loop."""

    __slots__ = ("claimed", "context", "count", "route")

    def __init__(
        self, count: int, claimed: Claimed | None, route: Route | None, context: Context | None
    ) -> None:
        self.count = count
        self.claimed = claimed
        self.route = route
        """The job's route, if a thread has routed it and reported its start."""
        self.context = context


class Slots:
    """Slots for handlers; the public methods are for the control thread only.

    Args:
        mux: the handlers.
        transactions: the connections of transactional handlers.
        fork_guard: detects a fork.
        loop: runs coroutine handlers.
        queue: used in the names of threads and tasks.
        concurrency: the number of slots.
        started: called on the handler's thread before it runs.
        timed_out: called with jobs whose handlers do not end.
        finished: called from any thread when there are outcomes to collect or slots to check.
        hindered: called from any thread with an error that prevents jobs from running.

    """

    def __init__(
        self,
        mux: Mux,
        transactions: Transactions,
        fork_guard: ForkGuard,
        loop: Loop,
        *,
        queue: str,
        concurrency: int,
        started: Callable[[Job], None] | None,
        timed_out: Callable[[Job, float], None],
        finished: Callable[[], None],
        hindered: Callable[[BaseException], None],
    ) -> None:
        self._mux = mux
        self._transactions = transactions
        self._fork_guard = fork_guard
        self._queue = queue
        self._started = started
        self._timed_out = timed_out
        self._finished = finished
        self._hindered = hindered
        # Jobs run in copies of it. A copy that a job changed is not used for the next job. It
        # is empty, so that a job does not depend on which thread started its slot.
        self._context = Context()
        self._context.run(inside.set, self)
        self._route = self._isolated if mux.names_keys else mux.route
        self._jobs: deque[Claimed] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._lock = threading.Lock()
        self._concurrency = self._free = concurrency
        self._resting: list[_Thread] = []
        self._threads: set[_Thread] = set()
        self._started_threads = 0
        self._retry_at = inf  # when to try again to start a thread
        self._pause = _FIRST_PAUSE
        self._timeouts = Timeouts(concurrency, finished)
        self._closed = False
        self._loop = loop
        self._generation = 0  # of the loop
        self._tasks: dict[asyncio.Task[None], _Task] = {}
        self._moving: set[_Move] = set()
        self._dead_tasks: deque[_Task] = deque()
        self._is_cancelled = False
        self._is_unclear = False
        self._last: _Task | None = None  # the task that last ran a job
        self.needs_watch = False
        """Whether a slot has died since `watch` was called."""
        self.failure: RuntimeError | None = None
        """Why no handler can run any more."""
        self.interrupted = 0
        """Jobs that were cancelled at the end and released."""

    def open(self) -> None:
        """Start the event loop if there are coroutine handlers; may raise RuntimeError."""
        if self._mux.has_coroutines:
            self._loop.open()

    def submit(self, batch: Sequence[Claimed], *, quick: bool = False) -> None:
        """Run jobs, in order, as slots become free.

        Jobs that are likely to be quick get one slot, until `spread` is called: waking
        ten threads costs more than a hundred such jobs, and they would only compete
        for the interpreter.
        """
        self._jobs.extend(batch)
        if quick:
            self._take_slots(1 if self._free == self._concurrency else 0)
        else:
            self.spread()

    def spread(self) -> None:
        """Use a free slot for each waiting job, as far as there are any."""
        if self._free and self._jobs:
            self._take_slots(len(self._jobs))

    def _take_slots(self, count: int) -> None:
        with self._lock:
            count = min(self._free, count)
            self._free -= count
        if count:
            self._place(count)

    def collect(self) -> list[Outcome]:
        """Return the outcomes since the last call."""
        outcomes = self._outcomes
        return [outcomes.popleft() for _ in range(len(outcomes))]

    @property
    def has_outcomes(self) -> bool:
        """Whether there are outcomes to collect."""
        return bool(self._outcomes)

    @property
    def is_idle(self) -> bool:
        """Whether each submitted job has its outcome, except for those given up."""
        return not self._jobs and self._free == self._concurrency

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The tasks that run on the loop."""
        return set(self._tasks)

    @property
    def is_unwinding(self) -> bool:
        """Whether coroutines still run."""
        return bool(self._tasks or self._moving)

    @property
    def next_timeout(self) -> float:
        """When to call `expire` next."""
        return min(self._timeouts.next_at, self._retry_at)

    @property
    def usable(self) -> int:
        """The number of slots without those whose jobs have timed out and do not end.

        If no thread can start, it is the number of running ones.
        """
        slots = self._concurrency - self._timeouts.missing
        if self._retry_at == inf:
            return slots
        return min(slots, len(self._threads) + len(self._tasks))

    def expire(self, now: float) -> list[Claimed]:
        """Fail the jobs that exceeded their timeouts and do not end; replace their slots.

        If a thread could not be started, try again.

        Returns:
            The failed jobs.

        """
        overdue = self._timeouts.overdue(now)
        for run in overdue:
            if self._timeouts.lose():
                with self._lock:
                    self._free += 1
            self._timed_out(run.claimed.job, run.timeout)
            self._done(run.fail(now))
        if self._retry_at <= now:
            self._retry_at = inf
            thread = _Thread(None, has_slot=False)
            thread.rest.acquire()
            if self._start(thread):
                self._pause = _FIRST_PAUSE
                with self._lock:
                    self._let_rest(thread)
        self.spread()
        return [run.claimed for run in overdue]

    def blocked(self, now: float, patience: float) -> LoopBlockedError | None:
        """Return an error, once, for a loop that is blocked for `patience` seconds."""
        found = self._loop.blocked(now, patience) if self._tasks else None
        if found is None:
            return None
        task, blocked_for = found
        slot = None if task is None else self._loop.slots.get(task)
        job = slot.claimed.job if slot is not None and slot.claimed is not None else None
        return LoopBlockedError(job and job.id, job and job.type, blocked_for)

    def withdraw(self) -> list[Claimed]:
        """Take back the jobs that have not started."""
        jobs: list[Claimed] = []
        try:
            while True:
                jobs.append(self._jobs.popleft())
        except IndexError:
            return jobs

    def cancel(self) -> None:
        """Cancel the coroutines that still run: the grace period is over. Idempotent.

        A job that ends because of it is released, and its attempt not counted.
        """
        if not self._is_cancelled:
            self._is_cancelled = True
            self._cancel()

    def close(self) -> None:
        """End the idle slots, and cancel the others; a running thread is left alone."""
        with self._lock:
            self._closed = True
            resting, self._resting = self._resting, []
        for thread in resting:
            thread.rest.release()
        self._cancel()

    def _cancel(self) -> None:
        if self._tasks or self._moving:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed
                self._loop.call(self._cancel_tasks)

    def _cancel_tasks(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()

    # -- dead slots ----------------------------------------------------------------------

    def suspect(self) -> None:
        """Search for lost jobs at the next `watch`: a fault may have lost some."""
        self._is_unclear = self.needs_watch = True

    def watch(self, running: Callable[[], Collection[Claimed]], patience: float) -> None:
        """Check that each thread, task and loop lives, so that no dead one holds a job.

        A job that ran on a dead one fails with an error that says so. One that never started is
        released, and its attempt not counted. Call `collect` first.

        Args:
            running: returns the submitted jobs without an outcome.
            patience: seconds for which a caller's loop may stand still.

        """
        self.needs_watch = False
        dead = self._dead_threads()
        try:
            self._loop.look()
        except RuntimeError as error:  # no thread can start; the next check tries again
            self._hindered(error)
        # First: a loop that is closed after this is left to the next check, which knows why.
        is_closed = self._loop.is_closed
        self.failure = self._loop.failure(patience, has_work=self.is_unwinding)
        if is_closed or self._loop.generation != self._generation:
            self._generation = self._loop.generation
            dead += self._lose_loop()
        while self._dead_tasks:
            dead.append(self._dead_tasks.popleft())
        for slot in dead:
            self._free_slot(slot)
        if dead or self._is_unclear:
            self._settle(dead, running())
            self.spread()

    def _dead_threads(self) -> list[_Slot]:
        with self._lock:
            dead = [
                thread
                for thread in self._threads
                if thread.is_over or (thread.thread is not None and not thread.thread.is_alive())
            ]
            self._threads.difference_update(dead)
            self._resting = [thread for thread in self._resting if thread not in dead]
        return [*dead]

    def _lose_loop(self) -> list[_Slot]:
        """Fail the jobs of a loop that will not continue."""
        lost: list[_Slot] = [*self._tasks.values()]
        for slot in lost:
            slot.is_lost = True
        self._tasks.clear()
        while self._moving:
            move = self._moving.pop()
            with self._lock:
                self._free += move.count
        self._is_unclear = True  # the jobs that were moving
        return lost

    def _free_slot(self, slot: _Slot) -> None:
        run, has_slot = slot.run, slot.has_slot
        if run is not None and run.is_overdue:
            has_slot = self._timeouts.find()
        elif run is not None:
            self._timeouts.ended(run)
        if has_slot:
            with self._lock:
                self._free += 1

    def _settle(self, dead: Iterable[_Slot], running: Collection[Claimed]) -> None:
        """Make an outcome for each job that is in no queue, no live slot and no outcome."""
        errors = {_key(slot.claimed): slot.error for slot in dead if slot.claimed is not None}
        # In the order in which a job moves, so that none is missed.
        held = {_key(claimed) for claimed in tuple(self._jobs)}
        slots: list[_Slot | _Move] = [*tuple(self._moving), *self._busy()]
        held |= {_key(slot.claimed) for slot in slots if slot.claimed is not None}
        held |= {_key(outcome.claimed) for outcome in tuple(self._outcomes)}
        takes = any(slot.claimed is None for slot in slots)
        self._is_unclear = False
        for claimed in running:
            key = _key(claimed)
            if key in held:
                continue
            if key in errors:
                self._done(Outcome(claimed, self._killed(claimed, errors[key]), None))
            elif takes:
                self._is_unclear = self.needs_watch = True  # a live slot may be taking it now
            else:
                self._done(Outcome(claimed, Release(), None))

    def _busy(self) -> list[_Slot]:
        with self._lock:
            resting = set(self._resting)
            busy: list[_Slot] = [thread for thread in self._threads if thread not in resting]
        return [*busy, *tuple(self._tasks.values())]

    def _killed(self, claimed: Claimed, error: BaseException | None) -> Result | Release | NeedsKey:
        """Return the result of a job whose thread or task was ended."""
        if self.failure is not None or isinstance(error, asyncio.CancelledError):
            return Release()  # the caller's code ended its loop
        route = self._isolated(claimed.job)
        if not isinstance(route, Route):
            return route
        failure = BgjobError(
            "the thread or event loop that ran the job was ended"
            + ("" if error is None else f", by {type(error).__name__}: {error}")
        )
        failure.__cause__ = error
        return route.failed(claimed.job, failure)

    # -- slots ------------------------------------------------------------------------

    def _place(self, count: int) -> None:
        """Start `count` slots, on a thread or on the loop as the next job needs."""
        try:
            on_loop = self._mux.runs_on_loop(self._jobs[0].job)
        except IndexError:
            on_loop = False
        if on_loop:
            self._on_loop(count, None)
        else:
            for _ in range(count):
                self._on_thread(None)

    def _give_up_slot(self, slot: _Slot) -> bool:
        """Free the slot and make its thread idle, unless a job came meanwhile."""
        with self._lock:
            # submit() appends before it takes the lock: it sees the slot free,
            # or this sees its job.
            if self._jobs and not self._closed:
                return False
            self._free += 1
            slot.has_slot = False
            self._let_rest(slot)
            return True

    def _come_back(self, slot: _Slot) -> bool:
        """Continue after a job that was given up, if its slot was not replaced."""
        if self._fork_guard.is_child:
            self._fork_guard.end(None)
        slot.has_slot = self._timeouts.find()
        slot.claimed = slot.run = None
        if not slot.has_slot:
            with self._lock:
                self._let_rest(slot)
        self._finished()  # the slot may be needed
        return slot.has_slot

    def _isolated(self, job: Job) -> Route | NeedsKey | Retry | MoveToDlq:
        """Route a job in a context of its own, because the type's key callable may change it."""
        return self._context.copy().run(self._mux.route, job)

    def _let_rest(self, slot: _Slot) -> None:
        if isinstance(slot, _Thread):
            if self._closed:
                slot.rest.release()
            else:
                self._resting.append(slot)

    def _done(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._finished()

    # -- threads ------------------------------------------------------------------------

    def _on_thread(self, claimed: Claimed | None) -> None:
        with self._lock:
            thread = self._resting.pop() if self._resting else None
            if thread is not None:
                thread.claimed, thread.has_slot = claimed, True
        if thread is not None:
            thread.rest.release()
        elif self._retry_at < inf or not self._start(_Thread(claimed)):
            # Another thread takes the job, or it is released.
            with self._lock:
                if claimed is not None:
                    self._jobs.appendleft(claimed)
                self._free += 1
            if claimed is not None:
                self._finished()

    def _start(self, me: _Thread) -> bool:
        """Start a thread; False if the system has no more threads or memory."""
        self._started_threads += 1
        thread = threading.Thread(
            target=self._thread,
            args=(me,),
            name=f"bgjob-{self._queue}-{self._started_threads}",
            daemon=True,  # a handler that never returns must not keep the process alive
        )
        with self._lock:
            self._threads.add(me)
        try:
            thread.start()
        except Exception as error:
            with self._lock:
                self._threads.discard(me)
            self._retry_at = monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            hindrance = BgjobError(
                f"no thread can start for a handler of queue {self._queue!r}: {error}; jobs run "
                f"on the {len(self._threads)} existing ones, and the start is tried again: "
                "raise the limit of processes or memory, or lower the concurrency"
            )
            hindrance.__cause__ = error
            self._hindered(hindrance)
            return False
        me.thread = thread
        return True

    def _thread(self, me: _Thread) -> None:
        try:
            me.rest.acquire()
            while not self._closed:
                context = self._context.copy()
                if not context.run(self._work, me, context):
                    me.rest.acquire()  # until _on_thread() or close() releases it
        except BaseException as error:  # not a handler's: another thread raised it in this one
            me.error = error
        finally:
            me.is_over = self.needs_watch = True
            self._finished()

    def _work(self, me: _Thread, context: Context) -> bool:
        """Run jobs until there are none, the slot moves to the loop, or a job changed `context`.

        To compare the context costs 25 ns a job, to make one for each job 110 ns.

        Args:
            me: the slot.
            context: the one that this thread runs in.

        Returns:
            True if the thread still has its slot, and needs a fresh context.

        """
        take, outcomes, route_of, started, clean = (
            self._jobs.popleft,
            self._outcomes,
            self._route,
            self._started,
            self._context,
        )
        claimed = me.claimed
        while True:
            if claimed is None:
                try:
                    claimed = me.claimed = take()
                except IndexError:
                    if self._give_up_slot(me):
                        return False
                    continue
            whole, job = claimed, claimed.job
            if job.arg is ELSEWHERE:
                if self._mux.runs_on_loop(job):
                    self._to_loop(me, claimed)
                    return False
                fetched = self._fetch(claimed)
                if fetched is None:
                    claimed = me.claimed = None
                    continue
                whole, job = fetched, fetched.job
                del fetched
            route = route_of(job)
            if not isinstance(route, Route):
                self._done(Outcome(claimed, route, None))
            elif route.is_coroutine:
                self._to_loop(me, claimed)
                return False
            else:
                if started is not None and not route.is_transactional:
                    started(job)
                began = perf_counter()
                result: Ending | Release | Awaiting | None
                result = route.run(job) if route.is_simple else self._run(me, route, claimed, whole)
                took: float | None = perf_counter() - began
                if self._fork_guard.is_child:
                    self._fork_guard.end(getattr(result, "error", None))
                if result is not COMPLETE:  # nearly all are
                    if result is None:
                        return self._come_back(me)
                    if isinstance(result, Awaiting):
                        self._to_loop(me, claimed, result.route, context.copy())
                        return False
                    if isinstance(result, Release):
                        took = None
                    if whole is not claimed:
                        _let_go(result)
                outcomes.append(_outcome((claimed, result, took)))
                self._finished()
            claimed = me.claimed = None
            del whole, job
            if context != clean:  # never compares values of a user: `clean` has none
                return True

    def _to_loop(
        self,
        me: _Thread,
        claimed: Claimed,
        route: Route | None = None,
        context: Context | None = None,
    ) -> None:
        """Move the slot to the loop with its job; the thread becomes idle."""
        self._on_loop(1, claimed, route, context)
        with self._lock:
            me.claimed, me.has_slot = None, False
            self._let_rest(me)

    def _run(
        self, me: _Thread, route: Route, claimed: Claimed, whole: Claimed
    ) -> Ending | Release | Awaiting | None:
        """Run a handler with a transaction or a timeout; None if it was given up.

        Args:
            me: the slot.
            route: the handler's route.
            claimed: the job.
            whole: the job with its payload, if the claim did not return it.

        """
        run = None if route.policy.timeout is None else self._timeouts.limit(route, claimed)
        if run is not None:
            route, me.run = run.route, run
        result: Ending | Awaiting
        if route.is_transactional:
            result = self._transactions.run(route, whole, self._started)
            if isinstance(result, NotBegun):
                return self._give_back(result)
        else:
            result = route.run(whole.job)
        if run is not None and run.is_given_up:
            return None
        me.run = None
        return result

    def _fetch(self, claimed: Claimed) -> Claimed | None:
        """Return the job with its payload; None if that failed and the job was released."""
        whole = self._transactions.whole(claimed)
        if isinstance(whole, NotBegun):
            self._done(Outcome(claimed, self._give_back(whole), None))
            return None
        return whole

    async def _fetch_async(self, claimed: Claimed) -> Claimed | None:
        whole = await self._transactions.whole_async(claimed)
        if isinstance(whole, NotBegun):
            self._done(Outcome(claimed, await self._give_back_async(whole), None))
            return None
        return whole

    def _give_back(self, why: NotBegun) -> Release:
        """Report why a job did not start, and wait."""
        self._hindered(why.error)
        self._transactions.rest()
        return Release()

    async def _give_back_async(self, why: NotBegun) -> Release:
        self._hindered(why.error)
        await self._transactions.rest_async()
        return Release()

    # -- tasks ------------------------------------------------------------------------------

    def _on_loop(
        self,
        count: int,
        claimed: Claimed | None,
        route: Route | None = None,
        context: Context | None = None,
    ) -> None:
        move = _Move(count, claimed, route, context)
        self._moving.add(move)
        try:
            self._loop.call(self._start_tasks, move)
        except RuntimeError as error:
            # The caller closed its loop while the worker ran, or no thread can start.
            self._moving.discard(move)
            self._hindered(error)
            with self._lock:
                self._free += count
            if claimed is not None:
                self._done(Outcome(claimed, Release(), None))
            self.needs_watch = True

    def _start_tasks(self, move: _Move) -> None:
        for _ in range(move.count):
            self._start_task(move.claimed, move.route, move.context)
        self._moving.discard(move)

    def _start_task(
        self, claimed: Claimed | None, route: Route | None = None, context: Context | None = None
    ) -> None:
        me, context = _Task(claimed), self._context.copy() if context is None else context
        task = asyncio.get_running_loop().create_task(
            self._task(me, route, context), name=f"bgjob-{self._queue}", context=context
        )
        self._tasks[task] = self._loop.slots[task] = me
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._loop.slots.pop(task, None)
        me = self._tasks.pop(task, None)
        if me is not None and me.has_slot:
            # It did not end on its own: it was cancelled between two jobs, or before it began.
            me.error = asyncio.CancelledError() if task.cancelled() else task.exception()
            self._dead_tasks.append(me)
            self.needs_watch = True
            self._finished()

    async def _task(self, me: _Task, known: Route | None, context: Context) -> None:
        """Run jobs on the loop until there are none, or the slot moves.

        It moves to a thread with a plain job, and to another task after a job that changed
        `context`, this task's. Comparing costs 30 ns a job, a task 5 µs.

        Args:
            me: the slot.
            known: the route of its first job, whose start was reported already.
            context: the task's context.

        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        take, outcomes, route_of, started, clean = (
            self._jobs.popleft,
            self._outcomes,
            self._route,
            self._started,
            self._context,
        )
        self._last, turned = me, perf_counter()
        claimed, is_leaving = me.claimed, False
        while not self._closed:
            if claimed is None:
                try:
                    claimed = me.claimed = take()
                except IndexError:
                    if self._give_up_slot(me):
                        return
                    continue
            whole, job = claimed, claimed.job
            if job.arg is ELSEWHERE and known is None:
                if not self._mux.runs_on_loop(job):
                    me.has_slot = False
                    self._on_thread(claimed)
                    return
                fetched = await self._fetch_async(claimed)
                if fetched is None:
                    claimed = me.claimed = None
                    continue
                whole, job = fetched, fetched.job
                del fetched
            route = route_of(job) if known is None else known
            if not isinstance(route, Route):
                self._done(Outcome(claimed, route, None))
            elif not route.is_coroutine:
                me.has_slot = False
                self._on_thread(claimed)
                return
            else:
                if started is not None and known is None and not route.is_transactional:
                    started(job)
                known = None
                began = perf_counter()
                result: Ending | Release | None
                try:
                    if route.is_simple:
                        returned = await route.handler(job)
                        result = COMPLETE if returned is None else route.judge(job, returned)
                    else:
                        result = await self._run_async(me, route, claimed, whole)
                        if result is None:
                            if self._come_back(me):
                                me.has_slot = False
                                self._start_task(None)
                            return
                except BaseException as error:
                    result = route.failed(job, error)
                took: float | None = perf_counter() - began
                if self._fork_guard.is_child:
                    self._fork_guard.end(getattr(result, "error", None))
                if me.is_lost or (result is not COMPLETE and not _is_running(task)):
                    return  # its coroutine was discarded with a closed loop
                if task.cancelling():
                    await _absorb_cancellation(task)
                    is_leaving = self._is_ending
                    if is_leaving and _was_cancelled(result):
                        result = Release()
                        self.interrupted += 1
                if result is not COMPLETE:  # nearly all are
                    if isinstance(result, Release):
                        took = None
                    if whole is not claimed:
                        _let_go(result)
                outcomes.append(_outcome((claimed, result, took)))
                self._finished()
            claimed = me.claimed = None
            del whole, job
            if is_leaving:
                return
            if context != clean:
                me.has_slot = False
                self._start_task(None)
                return
            if self._last is not me:
                self._last, turned = me, perf_counter()  # other tasks have run since
            elif perf_counter() - turned > _TURN:
                await asyncio.sleep(0)
                turned = perf_counter()

    @property
    def _is_ending(self) -> bool:
        """Whether tasks are cancelled because the worker or its loop ends."""
        return self._is_cancelled or self._closed or self._loop.is_ending

    async def _run_async(
        self, me: _Task, route: Route, claimed: Claimed, whole: Claimed
    ) -> Ending | Release | None:
        """Run a handler with a transaction or a timeout. Async variant of `_run`."""
        run = None if route.policy.timeout is None else self._timeouts.limit(route, claimed)
        if run is not None:
            route, me.run = run.route, run
        result: Ending
        if route.is_transactional:
            result = await self._transactions.run_async(route, whole, self._started)
            if isinstance(result, NotBegun):
                return await self._give_back_async(result)
        else:
            try:
                result = route.judge(whole.job, await route.handler(whole.job))
            except BaseException as error:
                result = route.failed(whole.job, error)
        if run is None:
            return result
        if run.is_given_up:
            return None
        me.run = None
        if isinstance(getattr(result, "error", None), JobTimeoutError):
            self._timed_out(claimed.job, run.timeout)
        return result


def _let_go(result: object) -> None:
    """Drop a large payload that the frames of an error would keep until it is reported."""
    error = getattr(result, "error", None)
    while isinstance(error, BaseException):
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _is_running(task: asyncio.Task[None]) -> bool:
    try:
        return asyncio.get_running_loop() is task.get_loop()
    except RuntimeError:
        return False


def _was_cancelled(result: object) -> bool:
    return isinstance(getattr(result, "error", None), asyncio.CancelledError)


def _key(claimed: Claimed) -> tuple[str, int]:
    return claimed.job.id, claimed.token


async def _absorb_cancellation(task: asyncio.Task[None]) -> None:
    """Absorb a cancellation by a handler, so that it does not reach the next job."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    while task.uncancel():
        pass
