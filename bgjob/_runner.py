"""Runs handlers in a bounded number of slots, on threads and on an event loop.

A slot is the right to run one handler. It lives on a thread or in a task of
the loop and takes jobs from one shared queue for as long as there are any, so
that a job crosses a thread once per batch, and a slow job never holds up one
behind it while a slot is idle. Measured per job: under 0.3 µs for a shared
queue, 2.3 µs for call_soon_threadsafe per batch of 500, 100 µs for an awaited
to_thread. A slot that takes a job of the other colour moves there with it, so
that plain and coroutine handlers share the same bound.
"""

import asyncio
import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context, ContextVar
from functools import partial
from math import inf
from time import perf_counter
from typing import cast

from bgjob._exchange import Outcome, Release
from bgjob._fork import Lineage
from bgjob._route import Wants
from bgjob._statements.claims import ELSEWHERE
from bgjob._statements.settlements import Claimed
from bgjob._timeouts import Timeouts
from bgjob._transaction import Ending, NotBegun, Transactions
from bgjob.errors import JobTimeoutError, LoopBlockedError
from bgjob.job import Job
from bgjob.mux import Mux, Route
from bgjob.result import Complete, MoveToDlq, Retry

_COMPLETE = Complete()
_outcome = partial(tuple.__new__, Outcome)  # half the time of Outcome(...)

inside: ContextVar["Runner | None"] = ContextVar("bgjob_inside", default=None)
"""The runner whose handler is running in this context."""

_TURN = 0.001
"""Seconds for which one task runs jobs before it lets the loop's other tasks run."""


class _Thread:
    """A handler thread at rest: the lock it waits on, and the job it is handed."""

    __slots__ = ("claimed", "rest")

    def __init__(self) -> None:
        self.rest = threading.Lock()
        self.claimed: Claimed | None = None


class _Task:
    """What a task of the loop is at."""

    __slots__ = ("claimed",)

    def __init__(self) -> None:
        self.claimed: Claimed | None = None


class Runner:
    """Slots for handlers; `submit` and `withdraw` belong to one thread."""

    def __init__(
        self,
        mux: Mux,
        transactions: Transactions,
        lineage: Lineage,
        *,
        queue: str,
        concurrency: int,
        started: Callable[[Job], None] | None,
        timed_out: Callable[[Job, float], None],
        finished: Callable[[], None],
        hindered: Callable[[BaseException], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._mux = mux
        self._transactions = transactions
        self._lineage = lineage
        self._queue = queue
        self._started = started
        self._timed_out = timed_out
        self._finished = finished
        self._hindered = hindered
        # Each job runs in a copy of it, so that what one sets is not seen by the next. It is
        # empty: what a job finds does not depend on which thread started its slot.
        self._context = Context()
        self._context.run(inside.set, self)
        self._route = self._isolated if mux.names_keys else mux.route
        self._jobs: deque[Claimed] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._lock = threading.Lock()
        self._concurrency = self._free = concurrency
        self._resting: list[_Thread] = []
        self._threads = 0
        self._timeouts = Timeouts(concurrency, finished)
        self._closed = False
        self._loop = loop
        self._loop_thread: threading.Thread | None = None
        self._tasks: dict[asyncio.Task[None], _Task] = {}
        self._last: _Task | None = None  # of them, that ran a job
        self._beat_at = inf  # when the loop was asked for a sign of life that has not come
        self._beat_due = -inf
        self._beat_told = False
        self.failure: RuntimeError | None = None
        """Why nothing can run any more."""

    def open(self) -> None:
        """Start the event loop, where coroutine handlers need one and none was given."""
        if self._loop is None and self._mux.has_coroutines:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(
                target=self._loop.run_forever, name=f"bgjob-loop-{self._queue}", daemon=True
            )
            self._loop_thread.start()

    def submit(self, batch: Sequence[Claimed], *, quick: bool = False) -> None:
        """Run jobs, in order, as slots become free.

        Jobs that are likely to be quick get one slot, until `spread` is called: to
        wake ten threads costs more than a hundred of them, and they would only
        contend for the interpreter.
        """
        self._jobs.extend(batch)
        if quick:
            self._take_slots(1 if self._free == self._concurrency else 0)
        else:
            self.spread()

    def spread(self) -> None:
        """Give a slot to each job that waits, as far as there are any."""
        if self._free and self._jobs:
            self._take_slots(len(self._jobs))

    def _take_slots(self, count: int) -> None:
        with self._lock:
            count = min(self._free, count)
            self._free -= count
        if count:
            self._place(count)

    def collect(self) -> list[Outcome]:
        """Take the outcomes since the last call."""
        outcomes = self._outcomes
        return [outcomes.popleft() for _ in range(len(outcomes))]

    @property
    def has_outcomes(self) -> bool:
        """Whether there is anything to collect."""
        return bool(self._outcomes)

    @property
    def is_idle(self) -> bool:
        """Whether each job that was submitted has its outcome, but for those given up."""
        return not self._jobs and self._free == self._concurrency

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The tasks that run on the loop."""
        return set(self._tasks)

    @property
    def next_timeout(self) -> float:
        """When `expire` has something to do."""
        return self._timeouts.next_at

    @property
    def slots(self) -> int:
        """The slots that are left: without those whose jobs have timed out and do not end."""
        return self._concurrency - self._timeouts.missing

    def expire(self, now: float) -> list[Claimed]:
        """Fail the jobs whose time is over, and that do not end; others take their slots.

        Returns those jobs.
        """
        overdue = self._timeouts.overdue(now)
        for run in overdue:
            if self._timeouts.lose():
                with self._lock:
                    self._free += 1
            self._timed_out(run.claimed.job, run.timeout)
            self._done(run.fail(now))
        self.spread()
        return [run.claimed for run in overdue]

    def blocked(self, now: float, patience: float) -> LoopBlockedError | None:
        """Tell once of a loop that has not turned for so many seconds; asked now and then."""
        if self._loop is None or not self._tasks:
            return None
        if self._beat_at == inf:
            if now < self._beat_due:
                return None
            self._beat_at, self._beat_due, self._beat_told = now, now + patience / 2, False
            with contextlib.suppress(RuntimeError):  # closed: whoever needs it says so
                self._loop.call_soon_threadsafe(self._beat)
        elif now - self._beat_at >= patience and not self._beat_told:
            self._beat_told = True
            task = self._tasks.get(cast("asyncio.Task[None]", asyncio.current_task(self._loop)))
            job = task.claimed.job if task is not None and task.claimed is not None else None
            return LoopBlockedError(job and job.id, job and job.type, now - self._beat_at)
        return None

    def _beat(self) -> None:
        self._beat_at = inf

    def withdraw(self) -> list[Claimed]:
        """Take back the jobs that have not started."""
        jobs: list[Claimed] = []
        try:
            while True:
                jobs.append(self._jobs.popleft())
        except IndexError:
            return jobs

    def close(self) -> None:
        """End the slots that rest, and the loop; a plain handler that still runs is left alone."""
        with self._lock:
            self._closed = True
            resting, self._resting = self._resting, []
        for thread in resting:
            thread.rest.release()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)
        if self._loop_thread is not None and threading.current_thread() is not self._loop_thread:
            self._loop_thread.join(1.0)
            if not self._loop_thread.is_alive() and self._loop is not None:
                self._loop.close()

    # -- slots ------------------------------------------------------------------------

    def _place(self, count: int) -> None:
        """Put so many slots to work, on the side of the job that is next."""
        try:
            on_loop = self._mux.runs_on_loop(self._jobs[0].job)
        except IndexError:
            on_loop = False
        if on_loop:
            self._on_loop(count, None)
        else:
            for _ in range(count):
                self._on_thread(None)

    def _give_up_slot(self, thread: _Thread | None) -> bool:
        """Free the slot and let its thread rest, unless a job came meanwhile."""
        with self._lock:
            # submit() appends before it takes the lock: it sees the slot free,
            # or this sees its job.
            if self._jobs and not self._closed:
                return False
            self._free += 1
            self._let_rest(thread)
            return True

    def _come_back(self, thread: _Thread | None) -> bool:
        """Go on after a job that was given up, if no other has taken the slot; else rest."""
        if self._lineage.is_child:
            self._lineage.end(None)
        has_slot = self._timeouts.find()
        if not has_slot:
            with self._lock:
                self._let_rest(thread)
        self._finished()  # it may be wanted
        return has_slot

    def _isolated(self, job: Job) -> Route | Wants | Retry | MoveToDlq:
        """Route a job; a callable that gives its key leaves nothing behind either."""
        return self._context.copy().run(self._mux.route, job)

    def _let_rest(self, thread: _Thread | None) -> None:
        if thread is not None:
            if self._closed:
                thread.rest.release()
            else:
                self._resting.append(thread)

    def _done(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._finished()

    # -- threads ------------------------------------------------------------------------

    def _on_thread(self, claimed: Claimed | None) -> None:
        with self._lock:
            thread = self._resting.pop() if self._resting else None
            if thread is None:
                self._threads += 1
        if thread is not None:
            thread.claimed = claimed
            thread.rest.release()
            return
        thread = _Thread()
        thread.claimed = claimed
        threading.Thread(
            target=self._thread,
            args=(thread,),
            name=f"bgjob-{self._queue}-{self._threads}",
            daemon=True,  # a handler that never returns must not keep the process
        ).start()

    def _thread(self, me: _Thread) -> None:
        me.rest.acquire()
        while not self._closed:
            claimed, me.claimed = me.claimed, None
            self._work(me, claimed)
            me.rest.acquire()  # until _on_thread() or close() lets go

    def _work(self, me: _Thread, claimed: Claimed | None) -> None:
        """Run jobs on this thread until there are none, or the slot moves to the loop."""
        take, outcomes, route_of, started, copy = (
            self._jobs.popleft,
            self._outcomes,
            self._route,
            self._started,
            self._context.copy,
        )
        while True:
            if claimed is None:
                try:
                    claimed = take()
                except IndexError:
                    if self._give_up_slot(me):
                        return
                    continue
            whole, job = claimed, claimed.job
            if job.arg == ELSEWHERE:
                if self._mux.runs_on_loop(job):
                    with self._lock:
                        self._let_rest(me)
                    self._on_loop(1, claimed)
                    return
                fetched = self._fetch(claimed)
                if fetched is None:
                    claimed = None
                    continue
                whole, job = fetched, fetched.job
                del fetched
            route = route_of(job)
            if not isinstance(route, Route):
                self._done(Outcome(claimed, route, None))
            elif route.is_coroutine:
                with self._lock:
                    self._let_rest(me)
                self._on_loop(1, claimed)
                return
            else:
                context = copy()  # costs 45 ns
                if started is not None and not route.is_transactional:
                    context.run(started, job)
                began = perf_counter()
                result: Ending | Release | None
                if route.is_simple:
                    result = context.run(route.run, job)
                else:
                    result = context.run(self._run, route, claimed, whole)
                    if result is None:
                        claimed = None
                        if self._come_back(me):
                            continue
                        return
                if self._lineage.is_child:
                    self._lineage.end(getattr(result, "error", None))
                if whole is not claimed:
                    _let_go(result)
                    del job, whole
                took = None if isinstance(result, Release) else perf_counter() - began
                outcomes.append(_outcome((claimed, result, took)))
                self._finished()
            claimed = None

    def _run(self, route: Route, claimed: Claimed, whole: Claimed) -> Ending | Release | None:
        """Run a handler that has a transaction or a timeout; None if it was given up.

        Args:
            route: whose handler it is.
            claimed: the job.
            whole: the job with its payload, if the claim left that behind.

        """
        run = None if route.timeout is None else self._timeouts.limit(route, claimed)
        if run is not None:
            route = run.route
        result: Ending
        if route.is_transactional:
            result = self._transactions.run(route, whole, self._started)
            if isinstance(result, NotBegun):
                return self._give_back(result)
        else:
            result = route.run(whole.job)
        return None if run is not None and run.is_given_up else result

    def _fetch(self, claimed: Claimed) -> Claimed | None:
        """Return the job with its payload; None if it was given back, because that failed."""
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
        """Tell why a job did not start, and rest."""
        self._hindered(why.error)
        self._transactions.rest()
        return Release()

    async def _give_back_async(self, why: NotBegun) -> Release:
        self._hindered(why.error)
        await self._transactions.rest_async()
        return Release()

    # -- tasks ------------------------------------------------------------------------------

    def _on_loop(self, count: int, claimed: Claimed | None) -> None:
        assert self._loop is not None  # noqa: S101 (open() made it)
        try:
            self._loop.call_soon_threadsafe(self._start_tasks, count, claimed)
        except RuntimeError as error:
            # The caller closed its loop under a running worker.
            self.failure = error
            with self._lock:
                self._free += count
            if claimed is not None:
                self._done(Outcome(claimed, Release(), None))

    def _start_tasks(self, count: int, claimed: Claimed | None) -> None:
        assert self._loop is not None  # noqa: S101
        for _ in range(count):
            me, context = _Task(), self._context.copy()
            task = self._loop.create_task(
                self._task(me, claimed, context), name=f"bgjob-{self._queue}", context=context
            )
            self._tasks[task] = me
            task.add_done_callback(self._tasks.pop)

    async def _task(self, me: _Task, claimed: Claimed | None, context: Context) -> None:
        """Run jobs on the loop until there are none, or the slot moves.

        It moves to a thread with a plain job, and to another task after one that changed
        `context`, this task's. To compare costs 30 ns a job, a task 5 µs.
        """
        clean = context.copy()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        take, outcomes, route_of, started = (
            self._jobs.popleft,
            self._outcomes,
            self._route,
            self._started,
        )
        self._last, turned = me, perf_counter()
        while not self._closed:
            if claimed is None:
                try:
                    claimed = take()
                except IndexError:
                    if self._give_up_slot(None):
                        return
                    continue
            whole, job = claimed, claimed.job
            if job.arg == ELSEWHERE:
                if not self._mux.runs_on_loop(job):
                    self._on_thread(claimed)
                    return
                fetched = await self._fetch_async(claimed)
                if fetched is None:
                    claimed = None
                    continue
                whole, job = fetched, fetched.job
                del fetched
            route = route_of(job)
            if not isinstance(route, Route):
                self._done(Outcome(claimed, route, None))
            elif not route.is_coroutine:
                self._on_thread(claimed)
                return
            else:
                if started is not None and not route.is_transactional:
                    started(job)
                me.claimed = claimed
                began = perf_counter()
                result: Ending | Release | None
                try:
                    if route.is_simple:
                        returned = await route.handler(job)
                        result = _COMPLETE if returned is None else route.judge(job, returned)
                    else:
                        result = await self._run_async(route, claimed, whole)
                        if result is None:
                            claimed = None
                            if self._come_back(None):
                                continue
                            return
                except BaseException as error:
                    result = route.failed(job, error)
                if self._lineage.is_child:
                    self._lineage.end(getattr(result, "error", None))
                if task.cancelling():
                    await _absorb_cancellation(task)
                if whole is not claimed:
                    _let_go(result)
                    del job, whole
                took = None if isinstance(result, Release) else perf_counter() - began
                outcomes.append(_outcome((claimed, result, took)))
                self._finished()
            claimed = me.claimed = None
            if not _is_same(context, clean):
                self._start_tasks(1, None)
                return
            if self._last is not me:
                self._last, turned = me, perf_counter()  # others have run since
            elif perf_counter() - turned > _TURN:
                await asyncio.sleep(0)
                turned = perf_counter()

    async def _run_async(
        self, route: Route, claimed: Claimed, whole: Claimed
    ) -> Ending | Release | None:
        """Run a handler that has a transaction or a timeout; as `_run`."""
        run = None if route.timeout is None else self._timeouts.limit(route, claimed)
        if run is not None:
            route = run.route
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
        if isinstance(getattr(result, "error", None), JobTimeoutError):
            self._timed_out(claimed.job, run.timeout)
        return result

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._loop_thread is not None and self._loop is not None:
            loop = self._loop
            ending = asyncio.gather(*self._tasks, return_exceptions=True)
            ending.add_done_callback(lambda _: loop.stop())


def _is_same(context: Context, clean: Context) -> bool:
    try:
        return context == clean
    except Exception:  # values that cannot be compared: one of them is new
        return False


def _let_go(result: object) -> None:
    """Drop a large payload that the frames of an error would keep until it is told."""
    error = getattr(result, "error", None)
    while isinstance(error, BaseException):
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


async def _absorb_cancellation(task: asyncio.Task[None]) -> None:
    """End a cancellation of its task by a handler, which must not reach the next job."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    while task.uncancel():
        pass
