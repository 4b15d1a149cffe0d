"""The control thread between the engine, one connection and the handlers of one queue."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from secrets import randbits
from time import monotonic

import psycopg
from psycopg.errors import ReadOnlySqlTransaction

from bgjob._connection import Recipe, Silence
from bgjob._engine import Engine
from bgjob._events import Events
from bgjob._exchange import Exchange, Reply, Sleep, Stop, TimedOut, Withdraw
from bgjob._fork import Lineage
from bgjob._link import Answer, Bell, Link
from bgjob._runner import Runner, inside
from bgjob._transaction import Transactions
from bgjob.errors import BgjobError
from bgjob.mux import Mux
from bgjob.observer import Observer
from bgjob.service import Rota

_FIRST_PAUSE = 0.05  # seconds between two attempts to reconnect; doubles
_LONGEST_PAUSE = 1.0

LAST_WORDS = 1.0
"""Seconds, after the grace period, to settle what has finished."""

_MOST_FAULTS = 5
"""Faults of its own that it survives within so many seconds; more would come again."""
_FAULTS_WITHIN = 10.0

_log = logging.getLogger("bgjob")


class Control:
    """The control thread of one queue: asks the engine, exchanges, hands out jobs, sleeps.

    It alone touches the engine and the connection, and no handler runs on it,
    so that leases are extended whatever handlers and event loops do.
    """

    def __init__(
        self,
        recipe: Callable[[], Recipe],
        queue: str,
        *,
        concurrency: int,
        poll_interval: float,
        lease: float,
        observer: Observer,
        notify: bool,
        rota: Rota,
    ) -> None:
        self._recipe = recipe
        self._queue = queue
        self._concurrency = concurrency
        self._poll_interval = poll_interval
        self._lease = lease
        self._rota = rota
        self._link = Link(
            recipe,
            queue,
            lease=lease,
            notify=notify,
            # What was taken for quick jobs, and given one slot, may not be quick.
            slow=lambda: self._runner.spread() if self.has_run else None,
        )
        self._events = Events(observer, queue)
        # Made by start(): a thread that was made before a fork cannot start after it.
        self._thread: threading.Thread | None = None
        self._give_up_at: float | None = None  # None: not asked to stop
        self._pause = _FIRST_PAUSE
        self._reopen_at = 0.0
        self._was_silent = False
        self._faults: deque[float] = deque(maxlen=_MOST_FAULTS + 1)
        self.failure: BaseException | None = None
        """Why it ends by itself."""
        self.done: Future[None] = Future()
        self.abandoned = 0

    def connect(self, patience: float) -> None:
        """Connect, and run the services; raises what keeps the worker from working.

        Args:
            patience: seconds.

        """
        self._link.open(patience)
        self._rota.run(self._link.lend, monotonic, self._service_cannot_start)

    def disconnect(self) -> None:
        """Close the connection of a worker that does not start."""
        self._link.close()

    def start(
        self,
        mux: Mux,
        loop: asyncio.AbstractEventLoop | None,
        leave: Callable[["Control"], None],
    ) -> None:
        """Start to work; `leave` is called when the last handler has ended."""
        self._leave = leave
        self._bell = Bell()
        self._engine = Engine(
            concurrency=self._concurrency,
            poll_interval=self._poll_interval,
            lease=self._lease,
            notify=self._link.can_notify,
            tokens=count(randbits(62)),
            transactional=mux.transactional,
            names_keys=mux.names_keys,
        )
        lineage = Lineage()
        self._transactions = Transactions(self._recipe(), lineage)
        self._runner = Runner(
            mux,
            self._transactions,
            lineage,
            queue=self._queue,
            concurrency=self._concurrency,
            started=self._events.started,
            timed_out=lambda job, limit: self._events.tell([TimedOut(job, limit)]),
            finished=self._bell.ring,
            loop=loop,
        )
        self._runner.open()
        self._events.open()
        self._thread = threading.Thread(
            target=self._run, name=f"bgjob-worker-{self._queue}", daemon=True
        )
        self._thread.start()

    def stop(self, give_up_at: float) -> None:
        """Begin to shut down; of several times at which to give up the first counts."""
        if self._give_up_at is None or give_up_at < self._give_up_at:
            self._give_up_at = give_up_at
        if self.has_run:
            self._bell.shout()

    def tell(self, error: BaseException) -> None:
        """Tell the observer of trouble."""
        self._events.error(error)

    @property
    def is_inside(self) -> bool:
        """Whether the caller is one whom the worker waits for: a handler, or the observer."""
        return self.has_run and (
            inside.get() is self._runner or threading.current_thread() is self._events.thread
        )

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """What is left on the caller's loop."""
        return self._runner.tasks if self.has_run else set()

    @property
    def has_run(self) -> bool:
        """Whether `start` got so far as to start the thread, with all that it works with."""
        return self._thread is not None and self._thread.ident is not None

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            self._link.close()
            self._runner.close()
            self._transactions.close()
            self._leave(self)
            self._events.close(LAST_WORDS)
            self._bell.close()
            self.done.set_result(None)

    def _turn(self) -> bool:
        """Take one step; False when the worker has ended."""
        engine, runner = self._engine, self._runner
        runner.spread()
        now = monotonic()
        if runner.next_timeout <= now:
            runner.expire(now)
        engine.missing = runner.missing
        self._collect()
        if notice := self._link.take_notice():
            engine.wake(notice)
        now = monotonic()
        if runner.failure is not None and self._give_up_at is None:
            self._fail(runner.failure, now)
        if (blocked := runner.blocked(now, self._lease / 3)) is not None:
            self._events.tell([blocked])
        if self._give_up_at is not None:
            engine.shutdown()
            self._rota.end()
            if now >= self._give_up_at:
                engine.abandon()
            if now >= self._give_up_at + LAST_WORDS:
                self.abandoned = engine.unsettled  # the database is away: the leases decide
                return False
        try:
            if not self._link.is_open:
                self._reopen(now)
                return True
            if now >= self._rota.pressing_at:
                self._serve()
                return True
            match engine.step(now):
                case Exchange() as exchange:
                    self._exchange(exchange)
                case Withdraw():
                    engine.withdrawn(runner.withdraw())
                case Sleep() if now >= self._rota.due_at:
                    self._serve()
                case Sleep(until):
                    self._sleep(min(until, self._rota.due_at, runner.next_timeout))
                case Stop(abandoned):
                    self.abandoned = abandoned
                    return False
        except psycopg.Error as error:
            self._disconnected(error)
        except Exception as error:  # a fault of ours: say so, and work on
            _log.exception("worker of queue %r failed; it connects again and goes on", self._queue)
            self._disconnected(error)
            self._faults.append(now)
            if len(self._faults) > _MOST_FAULTS and now - self._faults[0] <= _FAULTS_WITHIN:
                self._fail(error, now)
        return True

    def _fail(self, error: BaseException, now: float) -> None:
        """End by itself, without waiting for handlers."""
        self.failure = error
        self._events.error(error)
        self._give_up_at = now

    def _exchange(self, exchange: Exchange) -> None:
        try:
            if self._engine.flows(exchange):
                self._stream(exchange)
            else:
                self._acknowledge(self._link.exchange(exchange))
        except psycopg.Error as error:
            if self._must_reconnect(error):
                raise
            self._events.error(error)
            self._engine.reject(monotonic())

    def _must_reconnect(self, error: psycopg.Error) -> bool:
        # A primary that became a standby: the next one may be elsewhere.
        return not self._link.is_open or isinstance(error, ReadOnlySqlTransaction)

    def _stream(self, exchange: Exchange) -> None:
        """Exchange for as long as jobs flow, each answer worked on while the next is made."""
        engine, link = self._engine, self._link
        with link.streaming():
            answer: Answer | None = link.send(exchange)
            while answer is not None:
                link.receive(answer)
                self._collect()
                now = monotonic()
                due_at = min(self._rota.pressing_at, self._runner.next_timeout)
                goes_on = self._give_up_at is None and now < due_at
                ahead = engine.ahead(now) if goes_on else None
                try:
                    coming = link.send(ahead) if ahead else None
                finally:
                    self._acknowledge(answer.read())
                answer = coming

    def _serve(self) -> None:
        self._rota.run(self._link.lend, monotonic, self._service_failed)

    def _service_failed(self, error: BaseException) -> None:
        if isinstance(error, psycopg.Error) and self._must_reconnect(error):
            raise error
        self._events.error(error)

    def _service_cannot_start(self, error: BaseException) -> None:
        if isinstance(error, BgjobError) or not isinstance(error, Exception):
            raise error
        self._service_failed(error)

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
            ends = self._give_up_at if now < self._give_up_at else self._give_up_at + LAST_WORDS
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
                end = min(end, self._give_up_at + LAST_WORDS)
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
