"""The queues of one worker: a control thread for each, and what they share."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, wait
from math import inf
from time import monotonic
from types import EllipsisType
from typing import ClassVar

from bgjob._checks import Duration, seconds
from bgjob._postgres.connection import ConnectionParameters
from bgjob._running.loop import Loop
from bgjob._sql.tokens import Tokens
from bgjob._worker.control import LAST_WORDS, QueueControl
from bgjob._worker.events import Events
from bgjob._worker.history import HistoryKeeper
from bgjob._worker.minutes import MinuteWriter
from bgjob._worker.observers import Observers, combined, watchers
from bgjob._worker.options import WorkerOptions
from bgjob._worker.registry import Registry, program
from bgjob._worker.registry import release as worker_release
from bgjob._worker.state import State
from bgjob.client import AsyncClient, Client
from bgjob.errors import BgjobError
from bgjob.minutes import Minutes
from bgjob.mux import Mux
from bgjob.observer import Observer
from bgjob.service import Service, ServiceTimer
from bgjob.workers import WorkerHealth

_AFTER = 1.9
"""The most seconds after the grace period that a shutdown waits; it promises 2."""


class WorkerGroup:
    """Starts and ends the control threads together. Thread-safe."""

    minutes: ClassVar[Minutes | None] = None
    """The service of a worker that has none such; `bgjob worker` sets it."""

    def __init__(
        self,
        client: Client | AsyncClient,
        mux: Mux,
        options: WorkerOptions,
        *,
        observer: Observers | None,
        services: Iterable[Service],
        state: State | None,
        registry: bool,
        release: str | None,
    ) -> None:
        self._options = options
        self._client = client
        self._mux = mux
        self._shared = state
        self._queues = ", ".join(options.concurrency)
        whole = combined(observer)
        self._events = Events(whole, self._queues)
        self.watchers = watchers(whole)
        """The observers that also see how the worker is."""
        services, minutes = self._with_minutes(services)
        if mux.kept:
            services.append(HistoryKeeper())
        service_timer = ServiceTimer(services)
        self._release = worker_release(release)
        tokens = self._tokens = Tokens()
        row = (
            Registry(
                options.concurrency,
                lambda: self._mux.types,
                unknown_for=mux.unknown_for,
                lease=options.lease,
                release=self._release,
                tokens=tokens,
                events=self._events,
            )
            if registry
            else None
        )
        self._controls: list[QueueControl] = []
        for queue in options.concurrency:
            self._controls.append(
                QueueControl(
                    lambda: client.connection_parameters,
                    queue,
                    options,
                    events=self._events,
                    service_timer=service_timer,
                    tokens=tokens,
                    registry=row,
                    minutes=minutes,
                )
            )
            service_timer = ServiceTimer(())  # the first queue runs the services
        for watcher in self.watchers:
            watcher.watch_worker(self.health)
        self._loop: Loop | None = None
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._opened = self._asked = self._has_started = False
        self._opener: int | None = None
        """The thread that connects and starts."""
        self._give_up_at = inf
        self._at_work = 0  # controls whose handlers have not all ended
        self._alive = 0  # controls that have not ended
        self.done: Future[None] = Future()

    def observe_too(self, observer: Observer) -> None:
        """Add an observer, before the worker is opened."""
        self._events.add(observer)
        for watcher in watchers(observer):
            self.watchers.append(watcher)
            watcher.watch_worker(self.health)

    def _with_minutes(
        self, services: Iterable[Service]
    ) -> tuple[list[Service], MinuteWriter | None]:
        """Return the services, with a writer in place of Minutes, and that writer."""
        others: list[Service] = []
        minutes = self.minutes
        for service in services:
            if isinstance(service, Minutes):
                minutes = service
            else:
                others.append(service)
        if minutes is None:
            return others, None
        writer = MinuteWriter(minutes, self._events)
        return [*others, writer], writer

    def open(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Connect and start; raise whatever prevents the start.

        A worker that is shut down meanwhile, by a signal handler for example, does not start.
        """
        with self._lock:
            if self._opened or self._asked:
                raise RuntimeError("a worker runs once: make a new one")
            self._opened = True
            self._opener = threading.get_ident()
        try:
            # Without the lock, so that a shutdown does not wait for a server.
            mux = self._connect(loop)
        except BaseException:
            with self._lock:
                self._opened, self._opener = False, None
                if self._asked:
                    self._finish()
            raise
        with self._lock:
            self._opener = None
            if self._asked:
                self._undo()
                return
            try:
                self._start(mux, loop)
            except BaseException:
                # Out of threads or sockets: end the queues that were started.
                self._asked = True
                self._give_up(monotonic())
                for control in self._controls:
                    if not control.has_run:
                        control.disconnect()
                raise
            self._has_started = True

    async def open_async(self) -> None:
        """Connect and start on the caller's event loop; if cancelled, do not start, or end."""
        opening = asyncio.create_task(asyncio.to_thread(self.open, asyncio.get_running_loop()))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            self.stop(0)
            with contextlib.suppress(BaseException):  # whatever prevented the start
                await asyncio.wait([opening], timeout=self.time_left)
                await self.join_async()
            if opening.done() and not opening.cancelled():
                opening.exception()  # retrieve it, or asyncio logs that it was not
            raise

    def _connect(self, loop: asyncio.AbstractEventLoop | None) -> Mux:
        if self._shared is None:
            self._mux.check_bound()
        mux = self._mux = self._mux.copy()
        end = monotonic() + self._options.init_timeout
        try:
            # The first queue, which runs the services, connects after the others.
            for control in reversed(self._controls):
                if not self._asked:
                    control.connect(max(end - monotonic(), 0.1))
            if not self._asked:
                self._controls[0].register()
            if self._shared is not None and not self._asked:
                mux = mux.bound(self._shared.open(loop))
            self._events.open()
        except BaseException:
            for control in self._controls:
                control.disconnect()
            self._close_state()
            raise
        return mux

    def _undo(self) -> None:
        """End a worker that was shut down before it had started."""
        self._opened = True
        for control in self._controls:
            control.disconnect()
        self._close_state()
        self._events.close(self._patience_of(LAST_WORDS))
        self._finish()

    def _finish(self) -> None:
        self._opened = True
        if not self.done.done():
            self.done.set_result(None)

    def _start(self, mux: Mux, loop: asyncio.AbstractEventLoop | None) -> None:
        self._pid = os.getpid()
        self._loop = Loop(f"bgjob-loop-{self._queues}", given=loop, told=self._interrupted)
        self._loop.guard(self.done, self._look)
        for control in self._controls:
            self._at_work += 1
            self._alive += 1
            control.done.add_done_callback(self._ended)
            control.start(mux, self._loop, self._leave)

    def _look(self) -> None:
        for control in self._controls:
            control.look()

    def _interrupted(self, error: BaseException) -> None:
        error.add_note("it left a task of the worker's event loop, which goes on")
        self._events.error(error)

    def stop(self, timeout: Duration | EllipsisType | None = ...) -> None:
        """Begin to shut down; of several grace periods the one that ends first applies."""
        if isinstance(timeout, EllipsisType):
            timeout = self._options.grace
        if os.getpid() != self._pid:
            raise BgjobError(
                "this worker runs in the process that called run(), not in a fork of it"
            )
        end = inf if timeout is None else monotonic() + seconds(timeout, "timeout")
        with self._lock:
            self._asked = True
            if not self._opened:
                self._finish()
        self._give_up(end)

    @property
    def time_left(self) -> float:
        """Seconds for which a shutdown may still wait: it takes the grace period and 2 s."""
        return max(self._give_up_at + _AFTER - monotonic(), 0.0)

    def join(self) -> None:
        """Wait until it has ended after `stop`, or its time is over, whatever hangs."""
        while not self.done.done() and (left := self.time_left):
            # In pieces: another shutdown may allow less time.
            wait([self.done], min(left, 1.0))

    async def join_async(self) -> None:
        """Wait until it has ended, and its tasks with it. Async variant of `join`."""
        ended = asyncio.wrap_future(self.done)
        while not ended.done() and (left := self.time_left):
            await asyncio.wait([ended], timeout=min(left, 1.0))
        if tasks := self.tasks:
            await asyncio.wait(tasks, timeout=min(LAST_WORDS, max(self.time_left, 0.1)))

    def ended_within(self, timeout: float | None) -> bool:
        """Wait until it has ended, however that comes about; True if it has."""
        return self.done in wait([self.done], timeout).done

    async def ended_within_async(self, timeout: float | None) -> bool:
        """Wait until it has ended. Async variant of `ended_within`."""
        ended = asyncio.shield(asyncio.wrap_future(self.done))
        return ended in (await asyncio.wait([ended], timeout=timeout))[0]

    def _give_up(self, end: float) -> None:
        self._give_up_at = min(end, self._give_up_at)
        for control in self._controls:
            control.stop(end)

    @property
    def connection_parameters(self) -> ConnectionParameters:
        """How its client connects."""
        return self._client.connection_parameters

    def health(self) -> WorkerHealth:
        """How it is. From any thread, without waiting."""
        return WorkerHealth(
            has_started=self._has_started,
            is_stopping=self._asked or self.failure is not None or self.done.done(),
            has_ended=self.done.done(),
            queues={
                queue: control.health
                for queue, control in zip(self._options.concurrency, self._controls, strict=True)
            },
            number=self._tokens.number,
            note=self._events.tally.note,
            program=program(),
            release=self._release,
        )

    @property
    def failure(self) -> BaseException | None:
        """Why it ended on its own."""
        return next((c.failure for c in self._controls if c.failure is not None), None)

    @property
    def was_asked(self) -> bool:
        """Whether it was shut down; it may also end on its own, if it cannot run handlers."""
        return self._asked and self.failure is None

    @property
    def is_inside(self) -> bool:
        """Whether the worker waits for the caller: a handler, the observer, or its starter."""
        is_observer = threading.current_thread() is self._events.thread
        is_opener = threading.get_ident() == self._opener
        return is_observer or is_opener or any(control.is_inside for control in self._controls)

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The tasks that are left on the caller's loop."""
        return self._handling | (set() if self._loop is None else self._loop.tasks)

    @property
    def _handling(self) -> set[asyncio.Task[None]]:
        return {task for control in self._controls for task in control.tasks}

    @property
    def abandoned(self) -> int:
        """The number of jobs left to their leases."""
        return sum(control.abandoned for control in self._controls)

    @property
    def has_finished(self) -> bool:
        """Whether it has ended and stored a result for every job that had started."""
        is_cut_short = any(c.abandoned or c.interrupted for c in self._controls)
        return self.done.done() and not is_cut_short

    def _leave(self) -> None:
        """Close the shared state when the last handler of the last queue has ended."""
        with self._lock:
            self._at_work -= 1
            is_last = not self._at_work
        if is_last:
            if self._loop is not None:
                self._loop.close(self._patience_of(LAST_WORDS))
            self._close_state()
            self._events.close(self._patience_of(LAST_WORDS))

    def _patience_of(self, seconds: float) -> float:
        """Return how long to wait: all waits together must not exceed the limit."""
        return min(seconds, max(self.time_left - 0.4, 0.1)) if self._asked else seconds

    def _close_state(self) -> None:
        if self._shared is None:
            return
        patience = LAST_WORDS
        if self._asked:
            patience = max(self._patience_of(LAST_WORDS), self._give_up_at - monotonic())
        try:
            self._shared.close(None if patience == inf else patience, lambda: self._handling)
        except BaseException as error:
            self._events.error(error)

    def _ended(self, _: "Future[None]") -> None:
        with self._lock:
            self._alive -= 1
            is_last = not self._alive
        if is_last:
            self._finish()
        elif not self._asked:  # a queue that fails ends the others
            self._give_up(monotonic() + LAST_WORDS)
