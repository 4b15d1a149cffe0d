"""The handler threads of a queue, which run plain handlers.

A thread without a job gives up its slot and waits for the next one. With a job whose handler
is a coroutine function, the slot moves to the loop.
"""

import threading
from collections.abc import Callable
from contextvars import Context
from functools import partial
from math import inf
from time import monotonic

from typing_extensions import override

from bgjob._engine.outcome import Outcome, Release
from bgjob._handlers.route import COMPLETE, Awaiting, Route
from bgjob._running.ending import Ending, NotBegun
from bgjob._running.payloads import with_payload
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.batch import Batch
from bgjob._worker.batches import BatchCalls, Told
from bgjob._worker.failures import drop_locals, error_of
from bgjob._worker.reservations import Reservations
from bgjob._worker.slots import Slot, Slots, quick_outcome
from bgjob._worker.tasks import Tasks
from bgjob.errors import BgjobError

_FIRST_PAUSE = 0.05
"""Seconds after which starting a thread is tried again; doubles."""
_LONGEST_PAUSE = 2.0

_BEGINS_WITHIN = 2.0
"""Seconds after which a thread that was started and does not run is given up."""


def _never() -> bool:
    """Return whether a thread's call was cancelled: it cannot be."""
    return False


class _HasBegun(threading.Event):
    """What `threading.Thread.start` waits for, but not forever.

    A thread that dies before it runs its target, because memory is exhausted or because another
    thread raises an exception in it, would block the thread that started it: the control
    thread, which extends the leases, or the event loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_set = False
        # Not the event's own, which a thread that dies in set() may leave locked.
        self._unset = threading.Lock()
        self._unset.acquire()

    @override
    def is_set(self) -> bool:
        return self._is_set

    @override
    def set(self) -> None:
        self._is_set = True
        self._unset.release()

    @override
    def wait(self, timeout: float | None = None) -> bool:
        if not self._unset.acquire(timeout=_BEGINS_WITHIN):
            raise RuntimeError("a new thread did not begin")
        self._unset.release()
        return True


class _SystemThread(threading.Thread):
    """A thread whose start fails if it does not begin."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        # A daemon: a handler that never returns must not keep the process alive.
        super().__init__(target=target, name=name, daemon=True)
        self._started = _HasBegun()


class Thread(Slot):
    """A handler thread, and the lock on which it waits for work."""

    __slots__ = ("has_begun", "is_over", "pause", "thread", "threads")

    def __init__(
        self, threads: "Threads", claimed: Claimed | None, *, has_slot: bool = True
    ) -> None:
        super().__init__(claimed, has_slot=has_slot)
        self.threads = threads
        self.pause = threading.Lock()
        self.thread: threading.Thread | None = None
        """None until it has started."""
        self.has_begun = False
        """Whether it runs, and was not given up before."""
        self.is_over = False

    @override
    def rest(self) -> None:
        if self.threads.slots.is_closed:
            self.pause.release()
        else:
            self.threads.resting.append(self)


class Threads:
    """The handler threads of a queue.

    Args:
        slots: where jobs come from, and outcomes go.
        tasks: where coroutine handlers run.
        reservations: the jobs that threads run next.

    """

    def __init__(self, slots: Slots, tasks: Tasks, reservations: Reservations) -> None:
        self.slots = slots
        self._tasks = tasks
        self._reservations = reservations
        self._batches = BatchCalls(slots)
        self.all: set[Thread] = set()
        self.resting: list[Thread] = []
        self._started = 0
        self._pause = _FIRST_PAUSE
        self.retry_at = inf
        """When to try again to start a thread."""

    def start(self, claimed: Claimed | None) -> None:
        """Continue a slot on a thread, with its job if it has one already."""
        slots = self.slots
        with slots.lock:
            thread = self.resting.pop() if self.resting else None
            if thread is not None:
                thread.claimed, thread.has_slot = claimed, True
        if thread is not None:
            thread.pause.release()
        elif self.retry_at < inf or not self._start(Thread(self, claimed)):
            # Another thread takes the job, or it is released.
            with slots.lock:
                if claimed is not None:
                    slots.jobs.appendleft(claimed)
                slots.free += 1
            if claimed is not None:
                slots.finished()

    def retry(self) -> None:
        """Try again to start a thread after that failed; it has no slot yet."""
        self.retry_at = inf
        thread = Thread(self, None, has_slot=False)
        thread.pause.acquire()
        if self._start(thread):
            self._pause = _FIRST_PAUSE
            with self.slots.lock:
                thread.rest()

    def take_dead(self) -> list[Slot]:
        """Return the threads that have ended since the last call."""
        with self.slots.lock:
            dead = [
                thread
                for thread in self.all
                if thread.is_over or (thread.thread is not None and not thread.thread.is_alive())
            ]
            self.all.difference_update(dead)
            self.resting = [thread for thread in self.resting if thread not in dead]
        return [*dead]

    @property
    def busy(self) -> list[Slot]:
        """The threads that have a slot."""
        with self.slots.lock:
            resting = set(self.resting)
            return [thread for thread in self.all if thread not in resting]

    def close(self) -> None:
        """End the idle threads; the others end with their jobs."""
        with self.slots.lock:
            self.slots.is_closed = True
            resting, self.resting = self.resting, []
        for thread in resting:
            thread.pause.release()

    def _start(self, me: Thread) -> bool:
        """Start a thread; False if the system has no more threads or memory."""
        self._started += 1
        name = f"bgjob-{self.slots.queue}-{self._started}"
        thread = _SystemThread(lambda: self._thread(me), name)
        with self.slots.lock:
            self.all.add(me)
        try:
            thread.start()
        except Exception as error:
            with self.slots.lock:
                if me.has_begun:  # it was only late
                    me.thread = thread
                    return True
                self.all.discard(me)
            self.retry_at = monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            hindrance = BgjobError(
                f"no thread can start for a handler of queue {self.slots.queue!r}: {error}; jobs "
                f"run on the {len(self.all)} existing ones, and the start is tried again: raise "
                "the limit of processes or memory, or lower the concurrency"
            )
            hindrance.__cause__ = error
            self.slots.hindered(hindrance)
            return False
        me.thread = thread
        return True

    def _thread(self, me: Thread) -> None:
        try:
            me.pause.acquire()
            with self.slots.lock:
                me.has_begun = me in self.all
            if not me.has_begun:
                return  # it was given up
            while not self.slots.is_closed:
                context = self.slots.context.copy()
                if not context.run(self._work, me, context):
                    self._reservations.cancel(me)
                    me.pause.acquire()  # until start() or close() releases it
            self._reservations.cancel(me)
        except BaseException as error:  # not a handler's: another thread raised it in this one
            me.error = error
        finally:
            me.is_over = self.slots.needs_watch = True
            self.slots.finished()

    def _work(self, me: Thread, context: Context) -> bool:
        """Run jobs until there are none, the slot moves to the loop, or a job changed `context`.

        To compare the context costs 25 ns a job, to make one for each job 110 ns.

        Args:
            me: the thread.
            context: the one that this thread runs in.

        Returns:
            True if the thread still has its slot, and needs a fresh context.

        """
        slots = self.slots
        take, outcomes, route_of, started, finished, fork_guard, clock, clean = (
            slots.next_job,
            slots.outcomes,
            slots.route_of,
            slots.started,
            slots.finished,
            slots.fork_guard,
            slots.clock,
            slots.context,
        )
        claimed, take_reserved = me.claimed, self._reservations.take
        whole: Claimed | None
        while True:
            if claimed is None:
                try:
                    claimed = me.claimed = take() if me.reserved is None else take_reserved(me)
                except IndexError:
                    if slots.give_up(me):
                        return False
                    take = slots.next_job
                    continue
            whole, job = claimed, claimed.job
            if job.arg is ELSEWHERE:
                if slots.mux.runs_on_loop(job):
                    self._move(me, claimed)
                    return False
                whole = self._fetch(claimed)
                if whole is None:
                    ended, claimed, me.claimed = claimed, None, None
                    if me.interrupt is not None and slots.was_given_up(me, ended):
                        return slots.come_back(me)
                    continue
                job = whole.job
            route = route_of(job)
            # Once for most jobs.
            if not isinstance(route, Route) and not isinstance(
                route := slots.decided(route), Route
            ):
                slots.done(Outcome(claimed, route, None))
            elif route.is_coroutine:
                self._move(me, claimed)
                return False
            else:
                if started is not None and not route.reports_start:
                    started(job)
                began = monotonic()
                result: Ending | Release | Awaiting | Told | None
                result = route.run(job) if route.is_simple else self._run(me, route, claimed, whole)
                ran: float | None = monotonic() - began
                if fork_guard.is_child:
                    fork_guard.end(error_of(result))
                if result is not COMPLETE:  # nearly all are
                    if result is None:
                        return slots.come_back(me)
                    if isinstance(result, Told):
                        me.claimed = None
                        was_given_up = me.interrupt and slots.was_given_up(me, claimed)
                        return slots.come_back(me) if was_given_up else True
                    if isinstance(result, Awaiting):
                        self._move(me, claimed, result.route, context.copy())
                        return False
                    if isinstance(result, Release):
                        ran = None
                    if whole is not claimed or slots.is_behind:
                        drop_locals(result)
                outcomes.append(quick_outcome((claimed, result, ran, clock.offset + began)))
                finished()
                if job.exclusive is not None:
                    slots.leave_line(claimed, result)
            ended = claimed
            claimed = me.claimed = None
            if me.interrupt is not None and slots.was_given_up(me, ended):
                return slots.come_back(me)
            del whole, job, ended
            if context != clean:  # never compares values of a user: `clean` has none
                return True

    def _move(
        self,
        me: Thread,
        claimed: Claimed,
        route: Route | None = None,
        context: Context | None = None,
    ) -> None:
        """Move the slot to the loop with its job; the thread becomes idle."""
        if self._tasks.take_over(me, claimed, route, context):
            with self.slots.lock:
                me.rest()

    def _run(
        self, me: Thread, route: Route, claimed: Claimed, whole: Claimed
    ) -> Ending | Release | Awaiting | Told | None:
        """Run a handler with a session, a timeout or a batch; None if it was given up.

        Args:
            me: the thread.
            route: the handler's route.
            claimed: the job.
            whole: the job with its payload, if the claim did not return it.

        """
        slots = self.slots
        if isinstance(claimed, Batch):
            return self._batches.run(me, claimed, _never)
        if route.needs_store:
            store = slots.store(me, claimed)
            if (why := store.load()) is not None:
                return self._not_begun(why)
            route = route.holding(store)
            if slots.started is not None:
                slots.started(whole.job)
        run = None if route.policy.timeout is None else slots.timeouts.limit(route, claimed)
        if run is not None:
            route, me.run = run.route, run
        result: Ending | Awaiting
        if route.is_transactional:
            reserve = partial(self._reservations.reserve, me, on_loop=False)
            result = slots.transactions.run(route, whole, slots.started, reserve)
            if isinstance(result, NotBegun):
                return self._not_begun(result)
        else:
            if route.reports_start and slots.started is not None:
                slots.started(whole.job)
            result = route.run(whole.job)
        # Again: another thread may have raised an exception in this one before its end.
        if run is not None and not slots.timeouts.ended(run):
            return None
        me.run = None
        return result

    def _fetch(self, claimed: Claimed) -> Claimed | None:
        """Return the job with its payload; None if that failed and the job was released."""
        whole = with_payload(self.slots.transactions, claimed)
        if isinstance(whole, NotBegun):
            self.slots.done(Outcome(claimed, self._not_begun(whole), None))
            return None
        return whole

    def _not_begun(self, why: NotBegun) -> Release:
        """Report why a job did not start, and wait."""
        self.slots.hindered(why.error)
        self.slots.transactions.rest()
        return Release()
