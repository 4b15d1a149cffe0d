"""The event loop of a worker: one for the coroutine handlers of all its queues.

A Worker has one of its own, on a thread that starts when it is first needed. An
AsyncWorker uses its caller's. Pools and engines that a program keeps in a
module belong to the loop that first used them, so there is never a second.

An early end of a loop must not hold jobs forever:

- SystemExit and KeyboardInterrupt that leave a child task, and `loop.stop()`,
  only interrupt a loop. An own loop is run again, with all its tasks, and
  the task that awaits the child sees its exception.
An own loop whose thread was ended continues on a new thread. One that was
  closed, or fails again and again, is replaced; `generation` then increases, and
  the slots fail the jobs that ran on it.
- A caller's loop cannot be replaced. `failure` says why it ended. `asyncio.run`
  cancels all tasks before it closes a loop, so the guard, a task that only waits,
  notices immediately. A loop that was closed or abandoned otherwise is noticed by
  the next check.
"""

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextvars import Context
from math import inf
from time import monotonic
from typing import Any, Protocol, TypeVar

from bgjob._postgres.event_loop import new_event_loop
from bgjob._sql.settlements import Claimed

T = TypeVar("T")

_LOOK = 1.0
"""Seconds between two checks of a waiting thread whether the loop is alive."""

_MOST_FAULTS = 5
"""Faults of an own loop (not of a handler) within so many seconds, after which it is replaced."""
_FAULTS_WITHIN = 10.0

_UNWINDING = 1.0
"""Seconds that cancelled tasks have at the end of the loop."""

_MOST_STOPS = 5
"""The most runs of a loop that unwinds: the `loop.stop()` of `close` may interrupt it."""

_NAP = 0.01

_GUARD_WAITS = 2.0
"""Seconds for which the end of a caller's loop waits while its worker settles its jobs."""


class Slot(Protocol):
    """A slot that runs as a task of the loop."""

    claimed: Claimed | None


class Loop:
    """A supervised event loop. Thread-safe.

    Args:
        name: the name of its thread.
        given: the caller's loop; by default it has a loop of its own.
        told: called on an own loop's thread with the exception that interrupted it.

    """

    def __init__(
        self,
        name: str,
        *,
        given: asyncio.AbstractEventLoop | None = None,
        told: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._pid = os.getpid()
        self._name = name
        self._given = given
        self._told = told
        self._loop = given
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._closing = False
        self._guard_task: asyncio.Task[None] | None = None
        self._done: Future[None] = Future()
        self._ends: Callable[[], object] = lambda: None
        self._is_cancelled = False
        self._turned = asyncio.Event()
        self._still_since = inf  # when the caller's loop was first seen stopped
        self._has_failed = False
        self._beat_at = inf  # when an unanswered sign of life was requested
        self._beat_due = -inf
        self._beat_told = False
        self.generation = 0
        """Increases when a new loop replaces one that cannot be run again."""
        self.has_ended = False
        """Whether the thread of an own loop has ended before the loop was closed."""
        self.slots: dict[asyncio.Task[Any], Slot] = {}
        """The tasks of all queues."""

    def open(self) -> None:
        """Start an own loop unless it runs; raise RuntimeError if no thread can start."""
        with self._lock:
            if self._pid != os.getpid():  # leave the parent's alone
                self._pid, self._loop, self._thread = os.getpid(), None, None
            if self._loop is None:
                self._loop = new_event_loop()
            if self._thread is None and self._given is None and not self._closing:
                self._start(self._loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        thread = threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
        thread.start()
        self._thread, self.has_ended = thread, False

    def guard(self, done: "Future[None]", ends: Callable[[], object]) -> None:
        """Watch for the end of the caller's loop; call this on another thread than the loop's.

        Args:
            done: the end of the loop waits for it, for 2 s at most.
            ends: called when the loop is about to end.

        """
        self._done, self._ends = done, ends
        if self._given is not None:
            with contextlib.suppress(RuntimeError):  # closed: the next check notices
                self._given.call_soon_threadsafe(self._start_guard, self._given)

    def call(self, callback: Callable[..., object], *args: Any) -> asyncio.AbstractEventLoop:
        """Schedule a call on the loop; start an own loop if needed.

        Raises:
            RuntimeError: the caller's loop is closed, or no thread can start.

        """
        loop = self.event_loop()
        loop.call_soon_threadsafe(callback, *args)
        return loop

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop; start an own one if needed, or raise RuntimeError as `open` does."""
        if self._thread is None and self._given is None:
            self.open()
        loop = self._loop
        assert loop is not None  # noqa: S101 (opened)
        return loop

    def was_replaced(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether this loop died, and another one continues in its place."""
        return loop is not self._loop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> tuple[T, BaseException | None]:
        """Run a coroutine on an own loop, in a copy of the caller's context, and wait for it.

        Returns:
            Its result; and the KeyboardInterrupt, or whatever a signal handler raised,
            meanwhile, which cancels the coroutine. A second one is raised immediately.

        """
        tasks: list[asyncio.Task[T]] = []
        ended: Future[T] = Future()

        def begin() -> None:
            if not tasks:  # once: an interrupt may schedule this twice
                tasks.append(asyncio.get_running_loop().create_task(coroutine))
                tasks[0].add_done_callback(end)

        def end(task: asyncio.Task[T]) -> None:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is None:
                ended.set_result(task.result())
            else:
                ended.set_exception(error)

        def cancel() -> None:
            tasks[0].cancel()

        interrupt: BaseException | None = None
        self.open()
        assert self._loop is not None  # noqa: S101 (opened)
        loop, generation = self._loop, self.generation
        while True:
            try:
                if not tasks:
                    loop.call_soon_threadsafe(begin)
                if interrupt is not None:
                    loop.call_soon_threadsafe(cancel)
                wait([ended], _LOOK)
                if ended.done():
                    return ended.result(), interrupt
                self.look()
                if self.generation != generation:
                    raise RuntimeError("the event loop of do() was closed under its handler")
            except BaseException as error:
                if isinstance(error, Exception) or ended.done() or interrupt is not None:
                    raise
                interrupt = error

    @property
    def is_open(self) -> bool:
        """Whether an own loop has been started in this process."""
        return self._thread is not None and self._pid == os.getpid()

    @property
    def is_ending(self) -> bool:
        """Whether the code that runs the caller's loop has cancelled its tasks, to end it."""
        return self._is_cancelled

    @property
    def is_closed(self) -> bool:
        """Whether the caller's loop is closed: its tasks never go on."""
        return self._given is not None and self._given.is_closed()

    def failure(self, patience: float, *, has_work: bool) -> RuntimeError | None:
        """Return why the caller's loop can run no more handlers; None while it can.

        Args:
            patience: seconds for which a loop with work may stand still.
            has_work: whether handlers have to run on it.

        """
        loop = self._given
        if loop is None or self._closing:
            return None
        if self._is_cancelled:
            how = "is ending, and has cancelled its tasks"
        elif loop.is_closed():
            how = "was closed"
        elif loop.is_running() or not has_work:
            self._still_since = inf
            return None
        else:
            now = monotonic()
            self._still_since = min(self._still_since, now)
            if now - self._still_since < patience:
                return None
            how = "no longer runs"
        return RuntimeError(
            f"the event loop of the worker {how}: leave the worker's async with, or await its "
            "shutdown(), before the loop ends"
        )

    def look(self) -> None:
        """Restart an own loop whose thread has ended; raise RuntimeError as `open` does."""
        thread = self._thread
        if self._given is not None or thread is None or self._closing:
            return
        if not self.has_ended and thread.is_alive():
            return
        with self._lock:
            if self._thread is not thread:
                return  # another queue's control thread was faster
            loop = self._loop
            if loop is None or loop.is_closed() or loop.is_running() or self._has_failed:
                if loop is not None:
                    with contextlib.suppress(Exception):  # it may be broken
                        loop.close()
                self._loop = loop = new_event_loop()
                self.generation += 1
                self._has_failed = False
                self._beat_at = inf
                self.slots.clear()
            self._start(loop)

    def blocked(self, now: float, patience: float) -> tuple[asyncio.Task[Any] | None, float] | None:
        """Return the task that has blocked the loop for `patience` seconds, and how long; once.

        Call this regularly while handlers run on the loop.
        """
        with self._lock:
            loop = self._loop
            if loop is None:
                return None
            if self._beat_at == inf:
                if now >= self._beat_due:
                    self._beat_at, self._beat_due = now, now + patience / 2
                    self._beat_told = False
                    with contextlib.suppress(RuntimeError):  # closed: `failure` notices
                        loop.call_soon_threadsafe(self._beat)
            elif now - self._beat_at >= patience and not self._beat_told:
                self._beat_told = True
                return asyncio.current_task(loop), now - self._beat_at
            return None

    def _beat(self) -> None:
        self._beat_at = inf

    def close(self, patience: float) -> None:
        """Cancel the tasks of an own loop and end it; end the guard of a caller's.

        Args:
            patience: seconds to wait; tasks that do not end within them are left alone.

        """
        with self._lock:
            self._closing = True
            loop, thread = self._loop, self._thread
        if loop is None or loop.is_closed() or self._pid != os.getpid():
            return  # after a fork it is the parent's, including its file descriptors
        if self._given is not None:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(self._end_guard)
            return
        if thread is None or self.has_ended or not thread.is_alive():
            loop.close()
            return
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        if threading.current_thread() is not thread:
            thread.join(patience)

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The worker's own task on the caller's loop."""
        return set() if self._guard_task is None else {self._guard_task}

    # -- an own loop's thread ---------------------------------------------------------------

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        faults: deque[float] = deque(maxlen=_MOST_FAULTS + 1)
        try:
            while not self._closing and not loop.is_closed():
                try:
                    loop.run_forever()
                except (SystemExit, KeyboardInterrupt) as error:
                    self._told(
                        error
                    )  # a child task's; its parent receives it when the loop continues
                except BaseException as error:
                    self._told(error)
                    now = monotonic()
                    faults.append(now)
                    if len(faults) > _MOST_FAULTS and now - faults[0] <= _FAULTS_WITHIN:
                        self._has_failed = True
                        return
            if not loop.is_closed():
                _unwind(loop)
        finally:
            self.has_ended = True
            self._ends()

    # -- a caller's loop ---------------------------------------------------------------------

    def _start_guard(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._closing:
            # Not in the caller's context.
            self._guard_task = loop.create_task(
                self._guard(), name=f"{self._name}-guard", context=Context()
            )

    async def _guard(self) -> None:
        try:
            await self._turned.wait()
        except asyncio.CancelledError:
            if self._closing:
                raise
            self._is_cancelled = True
            self._ends()
            end = monotonic() + _GUARD_WAITS
            with contextlib.suppress(asyncio.CancelledError):
                # Not with a future of the loop: cancelling that would cancel the worker's.
                while not self._done.done() and monotonic() < end:  # noqa: ASYNC110
                    await asyncio.sleep(_NAP)
            raise

    def _end_guard(self) -> None:
        if self._guard_task is not None:
            self._turned.set()


def _unwind(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel and await the tasks that handlers left behind, and close the loop."""
    end = monotonic() + _UNWINDING
    while (tasks := asyncio.all_tasks(loop)) and (left := end - monotonic()) > 0:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(BaseException):  # for example SystemExit in one of them
            loop.run_until_complete(asyncio.wait(tasks, timeout=left))
    left = max(end - monotonic(), 0.1)
    closing = loop.create_task(asyncio.wait_for(loop.shutdown_asyncgens(), left))
    for _ in range(_MOST_STOPS):
        if not closing.done():
            with contextlib.suppress(BaseException):
                loop.run_until_complete(closing)
    loop.close()
