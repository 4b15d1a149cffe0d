"""The tasks of a queue on the event loop, which run coroutine handlers.

A task without a job gives up its slot and ends. With a job whose handler is plain, the slot
moves to a thread.

The module has over 400 lines because a task may be cancelled at each await, and what keeps its slot
and its job then has to be beside it.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from contextvars import Context
from functools import partial
from time import monotonic
from typing import NamedTuple

from bgjob._engine.outcome import Outcome, Release
from bgjob._handlers.route import COMPLETE, Route
from bgjob._running.ending import Ending, NotBegun
from bgjob._running.loop import Loop
from bgjob._running.payloads import with_payload_async
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.batch import Batch
from bgjob._worker.batches import BatchCalls, Told
from bgjob._worker.failures import drop_locals, error_of
from bgjob._worker.reservations import Reservations
from bgjob._worker.slots import Slot, Slots, quick_outcome
from bgjob.errors import JobTimeoutError, LoopBlockedError

_TURN = 0.001
"""Seconds for which one task runs jobs before it yields to the loop's other tasks."""


class _Move(NamedTuple):
    """The way of a slot to a loop."""

    loop: asyncio.AbstractEventLoop
    route: Route | None = None
    """The job's route, if a thread has reported its start."""
    context: Context | None = None
    """The job's context, if it has run on a thread."""


class Tasks:
    """The tasks of a queue on the event loop.

    Args:
        slots: where jobs come from, and outcomes go.
        loop: where they run.
        reservations: the jobs that tasks run next.
        to_thread: continues a slot on a thread with its job.

    """

    def __init__(
        self,
        slots: Slots,
        loop: Loop,
        reservations: Reservations,
        to_thread: Callable[[Claimed], None],
    ) -> None:
        self._slots = slots
        self._loop = loop
        self._reservations = reservations
        self._to_thread = to_thread
        self.all: dict[asyncio.Task[None], Slot] = {}
        self.moving: dict[Slot, _Move] = {}
        """Slots on their way to a loop; the thread that removes one starts or frees it."""
        self.dead: deque[Slot] = deque()
        """Slots whose tasks were ended."""
        self._batches = BatchCalls(slots)
        self._is_cancelled = False
        self._last: Slot | None = None  # the task that last ran a job
        self.interrupted = 0
        """Jobs that were cancelled at the end and released."""

    @property
    def is_unwinding(self) -> bool:
        """Whether coroutines still run."""
        return bool(self.all or self.moving)

    def blocked(self, now: float, patience: float) -> LoopBlockedError | None:
        """Return an error, once, for a loop that is blocked for `patience` seconds."""
        found = self._loop.blocked(now, patience) if self.all else None
        if found is None:
            return None
        task, blocked_for = found
        slot = None if task is None else self._loop.slots.get(task)
        job = slot.claimed.job if slot is not None and slot.claimed is not None else None
        return LoopBlockedError(job and job.id, job and job.type, blocked_for)

    def start(self, count: int) -> None:
        """Continue free slots on the loop."""
        try:
            move = _Move(self._loop.event_loop())
        except RuntimeError as error:  # no thread can start
            self._slots.hindered(error)
            self._slots.free_again(count)
            self._slots.needs_watch = True
            return
        moving = [Slot(None) for _ in range(count)]
        self.moving.update(dict.fromkeys(moving, move))
        self._schedule(move.loop, moving)

    def take_over(
        self, thread: Slot, claimed: Claimed, route: Route | None, context: Context | None
    ) -> bool:
        """Continue a thread's slot on the loop, with its job.

        Args:
            thread: the slot of the thread, which has none afterwards.
            claimed: the job.
            route: the job's route, if the thread has reported its start.
            context: the job's context, if it has run on the thread.

        Returns:
            True if the thread must become idle; False if it has, because its job was given up.

        """
        slot = Slot(claimed)
        try:
            move = _Move(self._loop.event_loop(), route, context)
        except RuntimeError as error:  # no thread can start
            self._slots.hindered(error)
            self._slots.release(claimed)
            thread.claimed = None
            was_given_up = thread.interrupt and self._slots.was_given_up(thread, claimed)
            if was_given_up and not self._slots.come_back(thread):
                return False
            self._slots.free_slot(thread)
            return True
        # Another thread may raise an exception in this one, but not between these: there is no
        # call. Before them the slot is the thread's, and after them `start_again` completes this.
        self.moving[slot] = move
        thread.claimed = None
        thread.has_slot = False
        slot.interrupt, thread.interrupt = thread.interrupt, None
        self._schedule(move.loop, [slot])
        return True

    def start_again(self) -> None:
        """Schedule the start of moving slots once more: their threads may have died before."""
        for slot, move in self.moving.copy().items():
            self._schedule(move.loop, [slot])

    def _schedule(self, loop: asyncio.AbstractEventLoop, moving: list[Slot]) -> None:
        try:
            loop.call_soon_threadsafe(self._start, moving)
        except RuntimeError as error:  # it was closed: the next check frees them
            self._slots.hindered(error)
            self._slots.needs_watch = True

    def _not_started(self, slot: Slot) -> None:
        """Free a slot that did not reach the loop, and release its job."""
        self._slots.free_again()
        if slot.claimed is not None:
            self._slots.release(slot.claimed)

    def cancel(self) -> None:
        """Cancel the coroutines that still run: the grace period is over. Idempotent.

        A job that ends because of it is released, and its attempt not counted.
        """
        if not self._is_cancelled:
            self._is_cancelled = True
            self.close()

    def interrupt(self, slot: Slot, claimed: Claimed) -> None:
        """Cancel the coroutine of a cancelled job, unless it has ended when the loop does so."""

        def cancel() -> None:
            for task, its_slot in self.all.items():
                if its_slot is slot and slot.claimed is claimed:
                    task.cancel()

        with contextlib.suppress(RuntimeError):  # the caller's loop is closed
            self._loop.call(cancel)

    def close(self) -> None:
        """Cancel the tasks."""
        if self.all or self.moving:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed
                self._loop.call(self._cancel_tasks)

    def _cancel_tasks(self) -> None:
        for task in tuple(self.all):
            task.cancel()

    def lose(self, *, is_closed: bool) -> list[Slot]:
        """Free what was on its way to a loop that will not continue; return its tasks' slots.

        Other threads use the next loop as soon as there is one, so that its slots are here too.

        Args:
            is_closed: whether the caller's loop is closed, which no other replaces.

        """
        lost: list[Slot] = []
        for task, slot in tuple(self.all.items()):
            if is_closed or self._loop.was_replaced(task.get_loop()):
                slot.is_lost = True
                self.all.pop(task, None)
                lost.append(slot)
        for slot, move in self.moving.copy().items():
            is_lost = is_closed or self._loop.was_replaced(move.loop)
            if is_lost and self.moving.pop(slot, None) is not None:
                self._not_started(slot)
        return lost

    def _start(self, moving: list[Slot]) -> None:
        for me in moving:
            move = self.moving.get(me)
            if move is not None:  # else it was started before
                self._start_task(me, move.route, move.context)
                del self.moving[me]

    def _start_task(
        self, me: Slot, route: Route | None = None, context: Context | None = None
    ) -> None:
        context = self._slots.context.copy() if context is None else context
        task = asyncio.get_running_loop().create_task(
            self._task(me, route, context), name=f"bgjob-{self._slots.queue}", context=context
        )
        self.all[task] = self._loop.slots[task] = me
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._loop.slots.pop(task, None)
        me = self.all.pop(task, None)
        if me is not None and me.has_slot:
            # It did not end on its own: it was cancelled between two jobs, or before it began.
            me.error = asyncio.CancelledError() if task.cancelled() else task.exception()
            self.dead.append(me)
            self._slots.needs_watch = True
            self._slots.finished()

    async def _task(self, me: Slot, known: Route | None, context: Context) -> None:
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
        slots = self._slots
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
        self._last, turned = me, monotonic()
        claimed, is_leaving = me.claimed, False
        take_reserved = self._reservations.take
        whole: Claimed | None
        while not slots.is_closed:
            if claimed is None:
                try:
                    claimed = me.claimed = take() if me.reserved is None else take_reserved(me)
                except IndexError:
                    if slots.give_up(me):
                        return
                    take = slots.next_job
                    continue
            whole, job = claimed, claimed.job
            if job.arg is ELSEWHERE and known is None:
                if not slots.mux.runs_on_loop(job):
                    self._leave(me, claimed)
                    return
                whole = await self._fetch(claimed)
                if whole is None:
                    ended, claimed, me.claimed = claimed, None, None
                    if me.interrupt is not None and slots.was_given_up(me, ended):
                        self._come_back(me)
                        return
                    continue
                job = whole.job
            route = route_of(job) if known is None else known
            # Once for most jobs.
            if not isinstance(route, Route) and not isinstance(
                route := slots.decided(route), Route
            ):
                slots.done(Outcome(claimed, route, None))
            elif not route.is_coroutine:
                self._leave(me, claimed)
                return
            else:
                if started is not None and known is None and not route.reports_start:
                    started(job)
                known = None
                began = monotonic()
                result: Ending | Release | Told | None
                try:
                    if route.is_simple:
                        returned = await route.handler(job)
                        result = COMPLETE if returned is None else route.judge(job, returned)
                    else:
                        result = await self._run(me, route, claimed, whole)
                except BaseException as error:
                    result = route.failed(job, error)
                if result is None:
                    self._come_back(me)
                    return
                ran: float | None = monotonic() - began
                if fork_guard.is_child:
                    fork_guard.end(error_of(result))
                if me.is_lost or (result is not COMPLETE and not _is_running(task)):
                    self._reservations.cancel(me)
                    return  # its coroutine was discarded with a closed loop
                if task.cancelling():
                    await _absorb_cancellation(task)
                    # Tasks are cancelled because the worker or its loop ends.
                    is_leaving = self._is_cancelled or slots.is_closed or self._loop.is_ending
                    if is_leaving and isinstance(error_of(result), asyncio.CancelledError):
                        result = Release()
                        self.interrupted += 1
                if result is not COMPLETE:  # nearly all are
                    if isinstance(result, Told):
                        me.claimed = None
                        if me.interrupt is not None and slots.was_given_up(me, claimed):
                            self._come_back(me)
                        elif not is_leaving:
                            self._continue(me)
                        return
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
                self._come_back(me)
                return
            del whole, job, ended
            if is_leaving:
                break
            if context != clean:
                self._continue(me)
                return
            if self._last is not me:
                self._last, turned = me, monotonic()  # other tasks have run since
            elif monotonic() - turned > _TURN:
                await asyncio.sleep(0)
                turned = monotonic()
        self._reservations.cancel(me)

    def _leave(self, me: Slot, claimed: Claimed) -> None:
        """Move the slot to a thread, with a job whose handler is plain."""
        me.claimed = None
        if me.interrupt is not None and self._slots.was_given_up(me, claimed):
            self._come_back(me)
            return
        me.has_slot = False
        self._to_thread(claimed)

    def _come_back(self, me: Slot) -> None:
        """End a task after a job that was given up; another continues with the slot, if any."""
        if self._slots.come_back(me):
            self._continue(me)
        else:
            self._reservations.cancel(me)

    def _continue(self, me: Slot) -> None:
        """End a task; another one continues with its slot."""
        self._reservations.cancel(me)
        me.has_slot = False
        self._start_task(Slot(None))

    async def _run(
        self, me: Slot, route: Route, claimed: Claimed, whole: Claimed
    ) -> Ending | Release | Told | None:
        """Run a handler with a session, a timeout or a batch. Async variant of Threads._run."""
        slots = self._slots
        if isinstance(claimed, Batch):
            return await self._run_batch(me, claimed)
        if route.needs_store:
            store = slots.async_store(me, claimed)
            if (why := await store.load()) is not None:
                return await self._not_begun(why)
            route = route.holding(store)
            if slots.started is not None:
                slots.started(whole.job)
        run = None if route.policy.timeout is None else slots.timeouts.limit(route, claimed)
        if run is not None:
            route, me.run = run.route, run
        result: Ending
        if route.is_transactional:
            reserve = partial(self._reservations.reserve, me, on_loop=True)
            result = await slots.transactions.run_async(route, whole, slots.started, reserve)
            if isinstance(result, NotBegun):
                return await self._not_begun(result)
        else:
            if route.reports_start and slots.started is not None:
                slots.started(whole.job)
            try:
                result = route.judge(whole.job, await route.handler(whole.job))
            except BaseException as error:
                result = route.failed(whole.job, error)
        if run is None:
            return result
        if not slots.timeouts.ended(run):
            return None
        me.run = None
        if isinstance(error_of(result), JobTimeoutError):
            slots.timed_out(claimed.job, run.timeout)
        return result

    async def _run_batch(self, me: Slot, batch: Batch) -> Told | None:
        def is_ending() -> bool:
            return self._is_cancelled or self._slots.is_closed or self._loop.is_ending

        told = await self._batches.run_async(me, batch, is_ending)
        self.interrupted += batch.interrupted
        return told

    async def _fetch(self, claimed: Claimed) -> Claimed | None:
        """Return the job with its payload. Async variant of Threads._fetch."""
        whole = await with_payload_async(self._slots.transactions, claimed)
        if isinstance(whole, NotBegun):
            self._slots.done(Outcome(claimed, await self._not_begun(whole), None))
            return None
        return whole

    async def _not_begun(self, why: NotBegun) -> Release:
        if isinstance(why.error, asyncio.CancelledError):
            return Release()  # the job was cancelled, or the worker ends
        self._slots.hindered(why.error)
        await self._slots.transactions.rest_async()
        return Release()


def _is_running(task: asyncio.Task[None]) -> bool:
    try:
        return asyncio.get_running_loop() is task.get_loop()
    except RuntimeError:
        return False


async def _absorb_cancellation(task: asyncio.Task[None]) -> None:
    """Absorb a cancellation by a handler, so that it does not reach the next job."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    while task.uncancel():
        pass
