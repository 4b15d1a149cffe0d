"""`Client.do` and `AsyncClient.do`: one job, for the caller.

The caller may be interrupted or cancelled at any step; a job that was claimed for it is
settled or released all the same, so that it is not held until its lease ends.

- A coroutine handler of `Client.do` runs on a loop of the client's, on a thread of its own: so the
  call works in a notebook, too, whose thread runs a loop, which it blocks meanwhile.
- On a thread an interrupt while a coroutine handler runs cancels the handler. Its failure is
  stored, and then the interrupt is raised.
- In a task, the whole job runs in a task of its own. If the caller is cancelled before the
  handler began, the job is released; a coroutine handler is cancelled, and its failure is
  stored; a plain handler goes on, and its result is stored when it has ended. Only a coroutine
  handler is waited for: the rest goes on without the caller. `close` waits for that.
"""

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import copy_context
from typing import Any, TypeVar

from bgjob._checks import Duration, seconds
from bgjob._logger import log
from bgjob._postgres.connection import ConnectionParameters
from bgjob._running.drive import drive, drive_async
from bgjob._running.ending import Ending, NotBegun
from bgjob._running.loop import Loop
from bgjob._running.one_job import Ended, Run, Step, one_job, run_in_task, run_on_thread
from bgjob._sql.statement import Statement
from bgjob.errors import EmptyQueueError, LeaseLostError
from bgjob.mux import Mux, Route
from bgjob.result import MoveToDlq, Result, Retry

T = TypeVar("T")

_LOOP_ENDS = 1.5
"""Seconds within which the tasks that coroutine handlers left behind must end."""


class Do:
    """Runs single jobs on the calling thread. It keeps one event loop for coroutine handlers.

    Args:
        send: sends statements in one transaction, and returns their answers.
        connection_parameters: returns how to open the connection of a transactional handler.

    """

    def __init__(
        self,
        send: Callable[[Sequence[Statement[Any]]], list[Any]],
        connection_parameters: Callable[[], ConnectionParameters],
    ) -> None:
        self._send = send
        self._connection_parameters = connection_parameters
        self._loop = Loop("bgjob-do")

    def __call__(self, queue: str, mux: Mux, lease: Duration) -> Result:
        """Run one job; see Client.do."""
        mux.check_bound()
        interrupts: list[BaseException] = []

        def wait(coroutine: Coroutine[Any, Any, Ending]) -> Ending:
            if not self._loop.is_open:
                # A client need not be closed, but the tasks on its loop must be cancelled.
                weakref.finalize(self, self._loop.close, _LOOP_ENDS)
            ending, interrupt = self._loop.run(coroutine)
            if interrupt is not None:
                interrupts.append(interrupt)
            return ending

        def take(step: Step) -> object:
            if isinstance(step, Run):
                return copy_context().run(run_on_thread, step, self._connection_parameters, wait)
            return self._send(step)

        limit = seconds(lease, "lease")
        ended = drive(one_job(queue, mux, limit), take)
        if interrupts:
            raise interrupts[0]
        return _result(ended, queue, limit)

    def close(self) -> None:
        """Cancel the tasks that coroutine handlers left behind, and end the loop."""
        self._loop.close(_LOOP_ENDS)


class AsyncDo:
    """Runs single jobs. Async variant of Do."""

    def __init__(
        self,
        send: Callable[[Sequence[Statement[Any]]], Awaitable[list[Any]]],
        connection_parameters: Callable[[], ConnectionParameters],
    ) -> None:
        self._send = send
        self._connection_parameters = connection_parameters
        self._left: set[asyncio.Task[Any]] = set()
        """The running tasks whose caller was cancelled."""

    async def __call__(self, queue: str, mux: Mux, lease: Duration) -> Result:
        """Run one job; see AsyncClient.do."""
        mux.check_bound()
        is_cancelled = has_run = False
        handling: asyncio.Task[Ending] | None = None  # the running coroutine handler

        async def take(step: Step) -> object:
            nonlocal has_run, handling
            if not isinstance(step, Run):
                try:
                    return await self._send(step)
                except asyncio.CancelledError:  # the loop ends
                    if not has_run:
                        raise
                    return await self._send(step)  # storing it twice does no harm
            has_run = True
            if is_cancelled:
                return NotBegun(asyncio.CancelledError())
            running = run_in_task(step, self._connection_parameters, _uncancelled)
            if not (isinstance(step.route, Route) and step.route.is_coroutine):
                return await running
            handling = asyncio.create_task(running)
            try:
                return await handling
            except asyncio.CancelledError as error:
                return NotBegun(error)

        limit = seconds(lease, "lease")
        task = asyncio.create_task(drive_async(one_job(queue, mux, limit), take))
        while True:
            try:
                ended = await asyncio.shield(task)
                break
            except asyncio.CancelledError:
                if handling is None or handling.done():
                    is_cancelled = True
                    self._left.add(task)
                    task.add_done_callback(self._has_ended)
                    raise
                if not task.cancelling():  # else the loop ends, and has cancelled all tasks
                    handling.cancel()
        return _result(ended, queue, limit)

    def _has_ended(self, task: "asyncio.Task[Any]") -> None:
        self._left.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("could not store the result of a cancelled do(): %s", error)

    async def close(self) -> None:
        """Wait for the jobs of cancelled callers in this event loop.

        Another loop may be at rest, or wait for this call.
        """
        loop = asyncio.get_running_loop()
        while left := [task for task in self._left if task.get_loop() is loop]:
            await asyncio.wait(left)


async def _uncancelled(call: Callable[[], T]) -> T:
    """Run a call on a thread and wait until it ends, even if the event loop ends."""
    future = asyncio.get_running_loop().run_in_executor(None, copy_context().run, call)
    while True:
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if future.done():
                raise


def _result(ended: Ended | None, queue: str, lease: float) -> Result:
    """Return the stored result, or raise what it means to the caller."""
    if ended is None:
        raise EmptyQueueError(f"no job of queue {queue!r} is due now, or the queue is paused")
    job, stored = ended
    match stored:
        case None:
            raise LeaseLostError(
                f"job {job.id!r} of type {job.type!r} outlived its lease of {lease:g} s and was "
                "claimed again; its result was dropped: call do() with a longer lease"
            )
        case NotBegun(error):
            raise error
        case Retry(error=BaseException() as error) | MoveToDlq(BaseException() as error) if (
            not isinstance(error, Exception)
        ):
            raise error
        case result:
            return result
