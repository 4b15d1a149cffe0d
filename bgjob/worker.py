"""Workers: a control thread between the engine, one connection and the handlers."""

import asyncio
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from itertools import count
from math import inf
from secrets import randbits
from time import monotonic
from typing import Self

import psycopg
from psycopg.errors import ReadOnlySqlTransaction

from bgjob._connection import Silence
from bgjob._duration import Duration, seconds
from bgjob._engine import Engine
from bgjob._events import Events
from bgjob._exchange import Exchange, Reply, Sleep, Stop, Withdraw
from bgjob._fork import Lineage
from bgjob._link import Answer, Bell, Link
from bgjob._runner import Runner, inside
from bgjob._transaction import Transactions
from bgjob.client import AsyncClient, Client
from bgjob.errors import BgjobError, QueueRequiredError
from bgjob.job import check_name
from bgjob.mux import Mux
from bgjob.observer import LoggingObserver, Observer

_FIRST_PAUSE = 0.05  # seconds between two attempts to reconnect; doubles
_LONGEST_PAUSE = 1.0
_LAST_WORDS = 1.0  # seconds, after the grace period, to settle what has finished

_log = logging.getLogger("bgjob")


class _Control:
    """The control thread: asks the engine, exchanges, hands out jobs, sleeps.

    It alone touches the engine and the connection, and no handler runs on it,
    so that leases are extended whatever handlers and event loops do.
    """

    def __init__(
        self,
        client: Client | AsyncClient,
        queue: str | Mapping[str, int],
        mux: Mux,
        *,
        concurrency: int,
        poll_interval: Duration,
        lease: Duration,
        observer: Observer | None,
        notify: bool,
    ) -> None:
        if isinstance(queue, Mapping):
            [(queue, concurrency)] = queue.items()
        if not queue:
            raise QueueRequiredError("queue is required: name the queue to work on")
        check_name("queue", queue)
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency!r}")
        self._poll_interval = seconds(poll_interval, "poll_interval")
        self._lease = seconds(lease, "lease")
        if self._poll_interval < 0.001:  # noqa: PLR2004
            raise ValueError(f"poll_interval must be at least 0.001 s, not {poll_interval!r}")
        if self._lease < 1:
            raise ValueError(f"lease must be at least 1 s, not {lease!r}")
        self._client = client
        self._queue = queue
        self._mux = mux
        self._concurrency = concurrency
        self._notify = notify
        self._link = Link(
            lambda: client.recipe,
            queue,
            lease=self._lease,
            notify=notify,
            # What was taken for quick jobs, and given one slot, may not be quick.
            slow=lambda: self._runner.spread(),  # noqa: PLW0108 (made later)
        )
        self._events = Events(observer or LoggingObserver(), queue)
        # Made by open(): a thread that was made before a fork cannot start after it.
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._state = threading.Lock()
        self._opened = False
        self._give_up_at: float | None = None  # None: not asked to stop
        self._pause = _FIRST_PAUSE
        self._reopen_at = 0.0
        self._was_silent = False
        self.done: Future[None] = Future()
        self.abandoned = 0

    def open(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Connect and start; raises what keeps the worker from working."""
        with self._state:
            if self._opened or self._give_up_at is not None:
                raise RuntimeError("a worker runs once: make a new one")
            self._link.open()
            self._opened = True
            self._pid = os.getpid()
            self._bell = Bell()
            self._engine = Engine(
                concurrency=self._concurrency,
                poll_interval=self._poll_interval,
                lease=self._lease,
                notify=self._link.can_notify,
                tokens=count(randbits(62)),
                transactional=self._mux.transactional,
            )
            lineage = Lineage()
            self._transactions = Transactions(self._client.recipe, lineage)
            self._runner = Runner(
                self._mux,
                self._transactions,
                lineage,
                queue=self._queue,
                concurrency=self._concurrency,
                started=self._events.started,
                finished=self._bell.ring,
                loop=loop,
            )
            self._runner.open()
            self._events.open()
            self._thread = threading.Thread(
                target=self._run, name=f"bgjob-worker-{self._queue}", daemon=True
            )
            self._thread.start()

    def stop(self, timeout: Duration | None) -> None:
        """Begin to shut down; of several grace periods the one that ends first counts."""
        if os.getpid() != self._pid:
            raise BgjobError(
                "this worker runs in the process that called run(), not in a fork of it"
            )
        end = inf if timeout is None else monotonic() + seconds(timeout, "timeout")
        with self._state:
            if self._give_up_at is None or end < self._give_up_at:
                self._give_up_at = end
            if not self._opened:
                self._opened = True
                self.done.set_result(None)
            elif self._has_run:
                self._bell.shout()

    @property
    def was_asked(self) -> bool:
        """Whether somebody shut it down; it may also end by itself, where nothing can run."""
        return self._give_up_at is not None and self._runner.failure is None

    @property
    def is_inside(self) -> bool:
        """Whether the caller is one whom the worker waits for: a handler, or the observer."""
        return self._has_run and (
            inside.get() is self._runner or threading.current_thread() is self._events.thread
        )

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """What is left on the caller's loop."""
        return self._runner.tasks if self._has_run else set()

    @property
    def _has_run(self) -> bool:
        """Whether `open` got so far as to start the thread, with all that it works with."""
        return self._thread is not None and self._thread.ident is not None

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            self._link.close()
            self._runner.close()
            self._transactions.close()
            self._events.close(_LAST_WORDS)
            self._bell.close()
            self.done.set_result(None)

    def _turn(self) -> bool:
        """Take one step; False when the worker has ended."""
        engine, runner = self._engine, self._runner
        runner.spread()
        self._collect()
        if notice := self._link.take_notice():
            engine.wake(notice)
        now = monotonic()
        if runner.failure is not None and self._give_up_at is None:
            self._events.error(runner.failure)
            self._give_up_at = now
        if (blocked := runner.blocked(now, self._lease / 3)) is not None:
            self._events.tell([blocked])
        if self._give_up_at is not None:
            engine.shutdown()
            if now >= self._give_up_at:
                engine.abandon()
            if now >= self._give_up_at + _LAST_WORDS:
                self.abandoned = engine.unsettled  # the database is away: the leases decide
                return False
        try:
            if not self._link.is_open:
                self._reopen(now)
                return True
            match engine.step(now):
                case Exchange() as exchange:
                    self._exchange(exchange)
                case Withdraw():
                    engine.withdrawn(runner.withdraw())
                case Sleep(until):
                    self._sleep(until)
                case Stop(abandoned):
                    self.abandoned = abandoned
                    return False
        except psycopg.Error as error:
            self._disconnected(error)
        except Exception as error:  # a fault of ours: say so, and work on
            _log.exception("worker of queue %r failed; it connects again and goes on", self._queue)
            self._disconnected(error)
        return True

    def _exchange(self, exchange: Exchange) -> None:
        try:
            if self._engine.flows(exchange):
                self._stream(exchange)
            else:
                self._acknowledge(self._link.exchange(exchange))
        except psycopg.Error as error:
            if not self._link.is_open or isinstance(error, ReadOnlySqlTransaction):
                raise  # a primary that became a standby: the next one may be elsewhere
            self._events.error(error)
            self._engine.reject(monotonic())

    def _stream(self, exchange: Exchange) -> None:
        """Exchange for as long as jobs flow, each answer worked on while the next is made."""
        engine, link = self._engine, self._link
        with link.streaming():
            answer: Answer | None = link.send(exchange)
            while answer is not None:
                link.receive(answer)
                self._collect()
                ahead = engine.ahead(monotonic()) if self._give_up_at is None else None
                try:
                    coming = link.send(ahead) if ahead else None
                finally:
                    self._acknowledge(answer.read())
                answer = coming

    def _collect(self) -> None:
        if self._runner.has_outcomes:
            events = self._engine.finish(self._runner.collect())
            if events:
                self._events.tell(events)

    def _acknowledge(self, reply: Reply) -> None:
        news = self._engine.acknowledge(reply, monotonic())
        if news.run:
            self._runner.submit(news.run, quick=self._engine.is_quick)
        if news.events:
            self._events.tell(news.events)

    def _sleep(self, until: float) -> None:
        if self._give_up_at is not None:
            now = monotonic()
            ends = self._give_up_at if now < self._give_up_at else self._give_up_at + _LAST_WORDS
            until = min(until, ends)
        self._bell.arm()
        if not self._runner.has_outcomes and not self._link.has_notice:
            self._link.wait(self._bell, until - monotonic())
        self._bell.silence()

    def _disconnected(self, error: Exception) -> None:
        self._was_silent |= isinstance(error, Silence)
        self._events.error(error)
        self._link.close()
        self._engine.disconnect(monotonic())

    def _reopen(self, now: float) -> None:
        if now < self._reopen_at:
            # The bell is not armed: only a shutdown interrupts this.
            end = self._reopen_at
            if self._give_up_at is not None:
                end = min(end, self._give_up_at + _LAST_WORDS)
            self._link.wait(self._bell, end - now)
            self._bell.silence()
            return
        try:
            self._link.open()
        except (psycopg.Error, BgjobError) as error:
            self._events.error(error)
            self._reopen_at = monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._pause = _FIRST_PAUSE
            if self._was_silent:
                self._was_silent = False
                self._transactions.doubt()
            self._engine.reconnect()


class Worker:
    """Runs the due jobs of a queue with the handlers of a Mux, until it is shut down.

    Args:
        client: where the queue is. The worker opens one connection of its own
            and takes none from the client's pool.
        queue: the queue to work on.
        mux: the handlers.
        concurrency: handlers at once; 1 by default, so that nobody's code meets
            itself unasked. Plain handlers run on so many threads, coroutine
            handlers on one event loop, both within this bound.
        poll_interval: seconds or a timedelta between two looks at an idle
            queue; 1 s by default. Enqueues of a Client wake the worker at
            once; this bounds what a lost notification, a retry of another
            worker or an ended lease costs. At least 0.001 s.
        lease: seconds or a timedelta after which the jobs of a worker that died
            are due again; 30 s by default: longer than most pauses of a host,
            short enough to wait for. It is extended while the job is held, so
            that handlers may run for as long as they like. At least 1 s.
        observer: receives the events; by default they are logged.
        notify: whether enqueues wake the worker; True by default. Behind a
            pooler in transaction mode it polls whatever this says.

    Jobs run at least once: a handler whose worker dies before its result is
    stored runs again elsewhere. A context manager: entering runs it, leaving
    shuts it down. Thread-safe. A worker runs once, and not across a fork.
    """

    def __init__(
        self,
        client: Client,
        queue: str | Mapping[str, int],
        mux: Mux,
        *,
        concurrency: int = 1,
        poll_interval: Duration = 1.0,
        lease: Duration = 30.0,
        observer: Observer | None = None,
        notify: bool = True,
    ) -> None:
        self._control = _Control(
            client,
            queue,
            mux,
            concurrency=concurrency,
            poll_interval=poll_interval,
            lease=lease,
            observer=observer,
            notify=notify,
        )

    def run(self) -> None:
        """Connect, check the schema, and start to work; returns at once.

        Raises:
            SchemaError: the tables are missing or of another version.
            psycopg.Error: the server cannot be reached, or refuses.
            RuntimeError: the worker has been run or shut down before.

        """
        self._control.open(None)

    def shutdown(self, timeout: Duration | None = 30.0) -> bool:
        """Claim nothing more, give back what has not started, finish what runs, return.

        Idempotent, from any thread. From inside a handler or the observer it
        does not wait, for it would wait for itself.

        Args:
            timeout: the grace period, seconds or a timedelta, after which what
                still runs is left to its lease; 30 s by default, what most
                supervisors grant. None waits for as long as it takes.

        Returns:
            Whether every job that had started is settled.

        """
        self._control.stop(timeout)
        if not self._control.is_inside:
            self._control.done.result()
        return not self._control.abandoned

    def wait(self, timeout: Duration | None = None) -> bool:
        """Wait until the worker has ended, by a shutdown from elsewhere or a fault of its own.

        Args:
            timeout: seconds or a timedelta; None (the default) waits for as long as it takes.

        Returns:
            Whether it has ended.

        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        return self._control.done in wait([self._control.done], limit).done

    def __enter__(self) -> Self:
        self.run()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


class AsyncWorker:
    """Runs the due jobs of a queue; as Worker, with coroutine handlers on the caller's loop.

    The arguments are Worker's, with an AsyncClient. A handler that blocks the
    loop delays other coroutines, but no lease: those are extended by a thread.
    An async context manager.
    """

    def __init__(
        self,
        client: AsyncClient,
        queue: str | Mapping[str, int],
        mux: Mux,
        *,
        concurrency: int = 1,
        poll_interval: Duration = 1.0,
        lease: Duration = 30.0,
        observer: Observer | None = None,
        notify: bool = True,
    ) -> None:
        self._control = _Control(
            client,
            queue,
            mux,
            concurrency=concurrency,
            poll_interval=poll_interval,
            lease=lease,
            observer=observer,
            notify=notify,
        )

    async def run(self) -> None:
        """Connect, check the schema, and start to work; as Worker.run."""
        await asyncio.to_thread(self._control.open, asyncio.get_running_loop())

    async def shutdown(self, timeout: Duration | None = 30.0) -> bool:  # noqa: ASYNC109
        """Finish what runs and return; as Worker.shutdown.

        A coroutine that still runs after the grace period is cancelled.
        """
        self._control.stop(timeout)
        if not self._control.is_inside:
            await asyncio.shield(asyncio.wrap_future(self._control.done))
            if tasks := self._control.tasks:
                await asyncio.wait(tasks, timeout=_LAST_WORDS)
        return not self._control.abandoned

    async def wait(self, timeout: Duration | None = None) -> bool:  # noqa: ASYNC109
        """Wait until the worker has ended; as Worker.wait."""
        limit = None if timeout is None else seconds(timeout, "timeout")
        ended = asyncio.shield(asyncio.wrap_future(self._control.done))
        return ended in (await asyncio.wait([ended], timeout=limit))[0]

    async def __aenter__(self) -> Self:
        await self.run()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()
