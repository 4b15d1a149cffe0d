"""The control thread of one queue, between the engine, its connection and the slots.

It has over 400 lines because one turn may use each part, and any part may be cut short by the
end of the grace period.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from math import inf
from random import uniform
from time import monotonic, sleep
from typing import TypeVar

import psycopg
from psycopg.errors import (
    CharacterNotInRepertoire,
    DatatypeMismatch,
    FeatureNotSupported,
    InvalidSqlStatementName,
    LockNotAvailable,
    ReadOnlySqlTransaction,
    UndefinedFunction,
    UntranslatableCharacter,
)

from bgjob._engine.batch_pace import BatchPace
from bgjob._engine.engine import Engine
from bgjob._engine.protocol import Exchange, Sleep, Stop, Withdraw
from bgjob._engine.reply import Notice, Plan, Reply
from bgjob._logger import log as _log
from bgjob._postgres.connection import ConnectionParameters, Silence
from bgjob._postgres.fork import ForkGuard
from bgjob._running.loop import Loop
from bgjob._running.transaction import Transactions
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob._sql.tokens import Tokens
from bgjob._worker.answer import Answer, UnreadError
from bgjob._worker.batches import Gathering
from bgjob._worker.events import Events
from bgjob._worker.executor import Executor
from bgjob._worker.minutes import MinuteWriter
from bgjob._worker.options import WorkerOptions
from bgjob._worker.registry import Registry
from bgjob._worker.repairs import clock_was_set, dead_letter_unclaimable, dead_letter_unreadable
from bgjob._worker.results import ResultExpiry
from bgjob._worker.session import Session
from bgjob._worker.slots import Slots, inside
from bgjob._worker.waker import Waker
from bgjob.errors import BgjobError, ScheduleError
from bgjob.event import JobTimedOut, WorkerError
from bgjob.mux import Mux
from bgjob.service import ServiceTimer
from bgjob.workers import QueueHealth

T = TypeVar("T")

_FIRST_PAUSE = 0.05  # seconds between two attempts to reconnect; doubles
_LONGEST_PAUSE = 1.0

_MOMENT = 0.001
"""Seconds for a thread that is handed jobs: it needs the interpreter, and may be quick."""

_YIELD = 1e-5
"""The same where other work waits: any sleep passes the interpreter on. Without it this thread
keeps it until it waits for the server, and the places of a type's limit were used for 0.92 of the
time instead of 0.97 (benchmarks/limits.py)."""

_DOZE = 0.002
"""Seconds in which the ends of jobs that need no exchange are collected together, while others wait
for their slots: to wake this thread for each of them costs a fifth of a transactional job
(benchmarks/transactional.py)."""

_WATCH = 1.0
"""Seconds between two checks that all slots live; a death that Python reports is seen sooner."""

_WATCH_AGAIN = 0.01
"""Seconds to the next check if one could not decide what became of a job."""

_UNWINDING = 0.5
"""Seconds after the grace period within which cancelled coroutines should end."""

LAST_WORDS = 1.0
"""Seconds after the grace period to settle the finished jobs."""

_OF_DATA = ("22", "23", "P0")
"""Classes of errors that concern single rows: their values, a constraint, a trigger."""

_MOST_FAULTS = 5
"""The faults of its own that it survives within so many seconds; more would repeat."""
_FAULTS_WITHIN = 10.0

_CONNECTING = 60.0
"""Seconds that an attempt to connect may take: each host has its time, and so has its name."""

_STREAM = 0.5
"""Seconds for which exchanges flow: a notification comes between two streams, not within one."""

_STALE = (FeatureNotSupported, InvalidSqlStatementName, UndefinedFunction, DatatypeMismatch)
"""The errors of a prepared statement after its table was changed or made again."""


class QueueControl:
    """The control thread of one queue: asks the engine, exchanges, hands out jobs, sleeps.

    It alone touches the engine and the connection, and no handler runs on it,
    so that leases are extended whatever handlers and event loops do.
    """

    def __init__(
        self,
        connection_parameters: Callable[[], ConnectionParameters],
        queue: str,
        options: WorkerOptions,
        *,
        events: Events,
        service_timer: ServiceTimer,
        tokens: Tokens,
        registry: Registry | None,
        minutes: MinuteWriter | None,
    ) -> None:
        self._connection_parameters = connection_parameters
        self._queue = queue
        self._options = options
        self._service_timer = service_timer
        self._expires_results = False
        self._tokens = tokens
        self._registry = registry
        self._minutes = minutes
        self._session = Session(
            connection_parameters,
            queue,
            options,
            meanwhile=self._meanwhile,
            ends_at=lambda: inf if self._give_up_at is None else self._give_up_at + LAST_WORDS,
        )
        self._events = events
        # Made by start(): a thread object from before a fork cannot start after it.
        self._thread: threading.Thread | None = None
        self._give_up_at: float | None = None  # None: not asked to stop
        self._has_collected = False
        """Whether jobs have ended since the turn before."""
        self._pause = _FIRST_PAUSE
        self._reopen_at = 0.0
        self._was_silent = False
        self._watched_at = -inf
        self._faults: deque[float] = deque(maxlen=_MOST_FAULTS + 1)
        self._stream_until = 0.0
        self._turned_at = 0.0
        self._turns_by = inf
        self._claimed_at: float | None = None
        self._ends = ExitStack()
        self.failure: BaseException | None = None
        """Why it ends on its own."""
        self.done: Future[None] = Future()
        self.abandoned = 0

    def connect(self, patience: float) -> None:
        """Connect, and run the services; raise whatever prevents the start.

        It can be called again.

        Args:
            patience: seconds.

        """
        self._session.open(patience)
        self._tell_warning()
        self._service_timer.begin()
        self._service_timer.run(self._session.lend, monotonic, self._service_cannot_start)
        if self._registry is not None:
            self._registry.enter(self._queue, lambda: self._running)

    def register(self) -> None:
        """Write the worker's row, when all queues are connected."""
        if self._registry is not None:
            self._write_row(self._registry)

    @property
    def _running(self) -> list[Claimed]:
        return self._executor.in_handlers if self.has_run else []

    def _tell_warning(self) -> None:
        if self._session.warning is not None:
            self._events.tell([WorkerError(BgjobError(self._session.warning))])

    def disconnect(self) -> None:
        """Close the connection of a worker that does not start."""
        self._leave()
        self._session.close()

    def start(self, mux: Mux, loop: Loop, leave: Callable[[], None]) -> None:
        """Start to work; `leave` is called when the last handler has ended.

        If this fails the control has ended.
        """
        self._ends.callback(self.done.set_result, None)
        self._ends.callback(leave)
        try:
            self._waker = Waker()
            self._ends.callback(self._waker.close)
            self._engine = Engine(
                concurrency=self._options.concurrency[self._queue],
                poll_interval=self._options.poll_interval,
                lease=self._options.lease,
                notify=self._session.can_notify,
                tokens=self._make_tokens(),
                queue=self._queue,
                transactional=mux.transactional,
                checkpointed=mux.checkpointed,
                names_keys=mux.names_keys,
                slots=mux.slots,
                kept=mux.kept,
                batches=_sizes(mux),
                only_batches=len(mux.batches) == len(mux.types),
                limit=self._options.limits.get(self._queue),
                type_limits=mux.limits,
                holder=self._tokens.make(self._session.clock.now()),
            )
            fork_guard = ForkGuard()
            self._transactions = Transactions(
                self._connection_parameters(),
                fork_guard,
                prepares=self._session.is_direct,
                has_watch=True,
            )
            self._ends.callback(self._transactions.close)
            self._slots = Slots(
                mux,
                self._transactions,
                fork_guard,
                queue=self._queue,
                clock=self._session.clock,
                concurrency=self._options.concurrency[self._queue],
                lease=self._options.lease,
                started=self._events.started(self._session.clock),
                timed_out=lambda job, limit: self._events.tell([JobTimedOut(job, limit)]),
                finished=self._waker.ring,
                idle=self._waker.call,
                hindered=self._events.error,
            )
            self._executor = Executor(self._slots, loop)
            self._ends.callback(self._executor.close)
            if mux.has_coroutines:
                loop.open()
            self._ends.callback(self._session.close)
            self._turned_at = self._turns_by = monotonic()
            self._thread = threading.Thread(
                target=self._run, name=f"bgjob-worker-{self._queue}", daemon=True
            )
            self._thread.start()
        except BaseException:
            self._session.close()
            self._ends.close()
            raise

    def _make_tokens(self) -> Iterator[int]:
        while True:
            yield self._tokens.make(self._session.clock.now())

    def stop(self, give_up_at: float) -> None:
        """Begin to shut down; of several times at which to give up the first applies."""
        if self._give_up_at is None or give_up_at < self._give_up_at:
            self._give_up_at = give_up_at
        if self.has_run:
            self._slots.is_stopping = True
            self._transactions.leave()
            self._waker.shout()

    def look(self) -> None:
        """Check immediately that all slots live. From any thread."""
        if self.has_run:
            self._slots.needs_watch = True
            self._waker.ring()

    @property
    def is_inside(self) -> bool:
        """Whether the caller is one of its handlers."""
        return self.has_run and inside.get() is self._slots

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The tasks that are left on the caller's loop."""
        return set(self._executor.tasks.all) if self.has_run else set()

    @property
    def interrupted(self) -> int:
        """Jobs that were cancelled at the end of the grace period and released."""
        return self._executor.tasks.interrupted if self.has_run else 0

    @property
    def has_run(self) -> bool:
        """Whether `start` got as far as starting the thread."""
        return self._thread is not None and self._thread.ident is not None

    @property
    def health(self) -> QueueHealth:
        """How it is. From any thread."""
        now = monotonic()
        is_at_work = self.has_run and not self.done.done()
        return QueueHealth(
            slots=self._options.concurrency[self._queue],
            busy=self._slots.concurrency - self._slots.free if self.has_run else 0,
            is_connected=self._session.is_connected,
            turned=now - self._turned_at if is_at_work else 0.0,
            late=max(now - self._turns_by, 0.0) if is_at_work else 0.0,
            claimed=None if self._claimed_at is None else now - self._claimed_at,
        )

    def _run(self) -> None:
        with self._ends:
            try:
                while self._goes_on():
                    pass
            except BaseException as error:  # more faults than it survives
                self._fail(error)
                self.abandoned = self._engine.unsettled
            self._turns_by = inf  # it only ends, which may take the rest of the grace period
            self._leave()

    def _leave(self) -> None:
        """Write what was counted, and that the worker has ended, if this is its last queue."""
        if self._minutes is not None:
            with suppress(Exception):
                self._minutes.leave(self._ask_last)
        if self._registry is not None:
            with suppress(Exception):  # without a connection it shows as lost
                self._registry.leave(self._queue, self._ask_last, self.failure)

    def _ask_last(self, statement: Statement[T]) -> T:
        if self.failure is not None and not self._session.is_open:
            self._session.open(LAST_WORDS)  # its faults have closed the connection
        return self._session.ask(statement)

    def _goes_on(self) -> bool:
        """Take one step, and survive its faults; False when the worker has ended."""
        try:
            return self._turn()
        except psycopg.Error as error:
            self._disconnected(error)
        except BaseException as error:  # a fault of bgjob: report it and continue
            if self.failure is not None:
                raise  # it only settles what it can
            _log.exception("worker of queue %r failed; it connects again and goes on", self._queue)
            now = monotonic()
            self._faults.append(now)
            if len(self._faults) > _MOST_FAULTS and now - self._faults[0] <= _FAULTS_WITHIN:
                self._fail(error)
            self._disconnected(error)
            self._executor.suspect()
        return True

    def _turn(self) -> bool:
        """Take one step; False when the worker has ended."""
        engine, executor = self._engine, self._executor
        now = self._turned_at = self._turns_by = monotonic()
        if self._give_up_at is not None:
            engine.shutdown()
            self._service_timer.end()
            if now >= self._give_up_at:
                executor.tasks.cancel()
                if now >= self._give_up_at + _UNWINDING or not executor.tasks.is_unwinding:
                    engine.abandon()
            if now >= self._give_up_at + LAST_WORDS:
                # The database is away: leave the jobs to their leases.
                self.abandoned = engine.unsettled
                return False
        if executor.gathering is not None and not engine.ends_sessions:
            executor.run_rests()
        executor.spread()
        if executor.next_timeout <= now:
            engine.give_up(executor.expire(now))
        self._collect()
        if now >= self._watch_at:
            self._watched_at = now
            executor.watch(engine.running, self._options.lease / 3)
            self._collect()
            if executor.failure is not None and self._give_up_at is None:
                self._fail(executor.failure)
                return True
        if notice := self._session.take_notice():
            if notice.cancelled and (events := engine.cancelled(notice.cancelled)):
                self._events.tell(events)
            if notice.wakes:
                engine.wake(notice)
        now = monotonic()
        if cancelled := engine.to_interrupt:
            given_up = executor.interrupt(cancelled, now)
            for claimed in given_up.silent:
                if claimed.job.exclusive is not None:
                    self._slots.leave_line(claimed, None)
            engine.handlers_given_up(given_up.silent)
            engine.give_up(given_up.all)
            self._collect()
        if (blocked := executor.tasks.blocked(now, self._options.lease / 3)) is not None:
            self._events.tell([WorkerError(blocked)])
        if not self._session.is_open:
            self._reopen(now)
            return True
        if engine.keeps_results and not self._expires_results and self._give_up_at is None:
            self._expires_results = True
            self._service_timer.add(ResultExpiry())
        if now >= self._service_timer.pressing_at:
            self._serve()
            return True
        if self._registry is not None and now >= self._row_due_at:
            self._write_row(self._registry)
            return True
        if self._session.can_notify and self._session.subscription != engine.subscription:
            if self._session.subscribe(engine.subscription):
                engine.wake(Notice(relief=True))  # of jobs before that it was not notified
            return True
        if self._session.unread:
            self._repair(dead_letter_unreadable)
            return True
        if self._session.step:
            self._repair(clock_was_set)
            engine.wake(Notice(later=True))
            return True
        match engine.step(now):
            case Exchange() as exchange:
                self._exchange(exchange)
            case Withdraw():
                is_end = self._give_up_at is not None
                engine.withdrawn(executor.withdraw(engine.lost, is_end=is_end))
            case Sleep() if now >= self._service_timer.due_at:
                self._serve()
            case Sleep(until):
                self._sleep(min(until, self._service_timer.due_at, self._row_due_at))
            case Stop(abandoned):
                self.abandoned = abandoned
                return False
        return True

    @property
    def _watch_at(self) -> float:
        often = _WATCH_AGAIN if self._slots.needs_watch else min(_WATCH, self._options.lease / 12)
        return self._watched_at + often

    def _fail(self, error: BaseException) -> None:
        """End on its own, without waiting for handlers."""
        if self.failure is None:
            self.failure = error
            self._events.tell([WorkerError(error)])
            self.stop(monotonic())

    def _exchange(self, exchange: Exchange) -> None:
        try:
            if self._engine.flows(exchange):
                self._stream(exchange)
            elif self._acknowledge(self._session.exchange(exchange)):
                self._sleep(monotonic() + _MOMENT)
        except psycopg.Error as error:
            if self._must_reconnect(error):
                raise
            if isinstance(error, UnreadError):
                self._events.error(error)
                self._engine.disconnect(monotonic())  # the exchange may have happened or not
                return
            is_text = isinstance(error, UntranslatableCharacter | CharacterNotInRepertoire)
            if isinstance(error, _STALE):
                self._session.forget_plans()
            elif is_text:
                self._session.use_server_encoding()
            for_lock = isinstance(error, LockNotAvailable)
            for_data = (error.sqlstate or "")[:2] in _OF_DATA
            if self._engine.reject(monotonic(), for_lock=for_lock, for_data=for_data):
                self._events.error(error)
            if events := self._engine.refused():
                self._events.tell(events)
            if for_data and not is_text and exchange.claims_only:
                self._repair(dead_letter_unclaimable)

    def _repair(self, repair: Callable[[Session, str], Iterable[BgjobError]]) -> None:
        try:
            for error in repair(self._session, self._queue):
                self._events.tell([WorkerError(error)])
        except psycopg.Error as error:
            if self._must_reconnect(error):
                raise
            self._events.error(error)

    def _must_reconnect(self, error: psycopg.Error) -> bool:
        # A primary that became a standby: the next one may be elsewhere.
        return not self._session.is_open or isinstance(error, ReadOnlySqlTransaction)

    def _stream(self, exchange: Exchange) -> None:
        """Exchange while jobs flow; each answer is processed while the server makes the next.

        What was tried: planning the next exchange while this one is awaited, once the slots
        are idle. It gained nothing.
        """
        session = self._session
        self._stream_until = monotonic() + _STREAM
        with session.streaming():
            answer: Answer | None = session.send(session.plan(exchange))
            while answer is not None:
                answer.wait()
                following = self._follow()
                try:
                    coming = session.send(following) if following else None
                finally:
                    self._acknowledge(session.read(answer))
                answer = coming

    def _follow(self) -> Plan | None:
        """Plan the exchange after the current one, if jobs flow."""
        self._collect()
        now = self._turned_at = self._turns_by = monotonic()
        due_at = min(self._service_timer.pressing_at, self._executor.next_timeout, self._row_due_at)
        due_at = min(due_at, self._stream_until)
        needed = self._session.unread or self._session.step or self._slots.needs_watch
        goes_on = self._give_up_at is None and now < due_at and not needed
        ahead = self._engine.ahead(now) if goes_on else None
        return self._session.plan(ahead) if ahead else None

    def _meanwhile(self) -> None:
        """Work while the server works."""
        if not self.has_run:
            return
        self._executor.spread()  # jobs that were assumed quick, and given one slot, may not be

    @property
    def _row_due_at(self) -> float:
        return inf if self._registry is None else self._registry.due_at(self._queue)

    def _write_row(self, registry: Registry) -> None:
        try:
            is_stopping = self._give_up_at is not None
            registry.write(self._session.ask, is_stopping=is_stopping)
        except psycopg.Error as error:
            if self._must_reconnect(error):
                raise
            self._events.error(error)

    def _serve(self) -> None:
        self._service_timer.run(self._session.lend, monotonic, self._service_failed)

    def _service_failed(self, error: BaseException) -> None:
        if isinstance(error, psycopg.Error) and self._must_reconnect(error):
            raise error
        self._events.error(error)

    def _service_cannot_start(self, error: BaseException) -> None:
        is_told = isinstance(error, Exception) and not isinstance(error, BgjobError)
        if not is_told and not isinstance(error, ScheduleError):
            raise error
        self._service_failed(error)

    def _collect(self) -> None:
        engine, lines = self._engine, self._slots.lines
        self._limit()
        if self._executor.gathering is not None:
            self._measure(self._executor.gathering)
        self._has_collected = bool(self._slots.outcomes)
        if self._has_collected:
            events = engine.finish(self._slots.collect())
            if events:
                self._events.tell(events)
            while severed := self._transactions.severed:
                engine.sever(severed.popleft())
        if engine.uses_keys:
            lines.held_until = engine.held_until
            if ended := lines.take_ended():
                engine.withdrawn(ended)
        if run := engine.take_startable():
            self._hand_out(run)
            sleep(_YIELD)
        if self._has_collected or self._slots.behind:
            self._slots.behind = engine.unsettled_outcomes + self._events.waiting

    def _limit(self) -> None:
        """Run no more handlers than the limits allow this worker."""
        engine, slots, throttle = self._engine, self._slots, self._engine.throttle
        limit = throttle.queue
        if limit.is_on:
            limit.shrink(slots.concurrency - slots.free)
        engine.slots = self._executor.usable
        if throttle.is_used or slots.is_limited:
            slots.allowed = limit.places(slots.concurrency)
            slots.limit(throttle.start_by, limit.run_until, is_on=throttle.is_used)
            if self._executor.gathering is not None:
                self._executor.gathering.most_wait = throttle.patience

    def _measure(self, gathering: Gathering) -> None:
        """Report to the engine how many of its running jobs need no slot."""
        pace = self._engine.pace
        if isinstance(pace, BatchPace):
            pace.merged, pace.gathered = gathering.merged, len(gathering.waiting)
            pace.free = self._slots.usable
            if gathering.has_flushed:
                gathering.has_flushed = False
                pace.flushed(monotonic())

    def _acknowledge(self, reply: Reply) -> bool:
        """Hand out jobs and queue events; True if there were jobs."""
        if self._engine.throttle.queue.is_on:
            self._limit()  # slots that were taken since the last turn keep their places
        effects = self._engine.acknowledge(reply, monotonic())
        if self._engine.throttle.is_used:
            self._limit()
        if effects.run:
            self._claimed_at = self._turned_at
            self._hand_out(effects.run)
        if effects.events:
            self._events.tell(effects.events)
        if effects.locked:
            self._events.error(
                BgjobError(
                    f"results of jobs {effects.locked[:10]} of queue {self._queue!r} wait: another "
                    "session has locked their rows, or their keys, for some seconds: end its "
                    "transaction (pg_locks and pg_stat_activity show it)"
                )
            )
        return bool(effects.run)

    def _hand_out(self, run: Sequence[Claimed]) -> None:
        if self._engine.uses_keys:
            self._slots.lines.held_until = self._engine.held_until
            run = self._slots.lines.enter(run, self._engine.places)
        if self._executor.gathering is not None:
            run = self._executor.gathering.add(run, self._engine.suspects, monotonic())
        self._executor.submit(run, quick=self._engine.pace.is_quick)

    def _sleep(self, until: float) -> None:
        if self._give_up_at is not None:
            now = monotonic()
            ends = (self._give_up_at + more for more in (0, _UNWINDING, LAST_WORDS))
            until = min(until, *(end for end in ends if now < end), now + LAST_WORDS)
        executor, slots = self._executor, self._slots
        is_dozing = self._has_collected and bool(slots.jobs)
        if is_dozing:
            self._waker.doze()
            is_dozing = not slots.free
        if is_dozing:
            until = min(until, monotonic() + _DOZE)
        else:
            self._waker.arm()
        if slots.needs_watch:
            until = min(until, self._watch_at)
        has_news = (slots.outcomes and not is_dozing) or self._session.notice is not None
        waits = not has_news and executor.usable == self._engine.slots
        if waits:
            self._turns_by = min(until, executor.next_timeout)
            self._session.wait(self._waker, self._turns_by - monotonic())
        self._waker.silence()
        if waits and self._session.notice is not None:
            self._claim_at_once(self._session.notice, until)

    def _claim_at_once(self, notice: Notice, until: float) -> None:
        """Claim for a usual notification, if idle, before all else that a turn looks at."""
        now = monotonic()
        if now >= until or self._give_up_at is not None:
            return
        exchange = self._engine.at_once(notice, now)
        if exchange is not None:
            self._session.take_notice()
            self._turned_at = self._turns_by = now
            self._exchange(exchange)

    def _disconnected(self, error: BaseException) -> None:
        self._was_silent |= isinstance(error, Silence)
        self._events.error(error)
        self._session.close()
        now, rarity = monotonic(), self._engine.rarity
        if rarity > 1.0:  # the server needs its time for those that others rely on
            self._pause = _LONGEST_PAUSE * rarity
            self._rest(now)
        self._engine.disconnect(now)

    def _rest(self, now: float) -> None:
        """Leave the server alone for a while; not all workers of a fleet for the same time."""
        self._reopen_at = now + self._pause * uniform(0.5, 1.0)  # noqa: S311
        self._pause = max(self._pause, min(2 * self._pause, _LONGEST_PAUSE))

    def _reopen(self, now: float) -> None:
        if self._give_up_at is not None and self._pause > _LONGEST_PAUSE:
            self._pause, self._reopen_at = _FIRST_PAUSE, now  # a spare must not keep its program
        if now < self._reopen_at:
            # The waker is not armed: only a shutdown interrupts this.
            end = self._reopen_at
            if self._give_up_at is not None:
                end = min(end, self._give_up_at + LAST_WORDS)
            self._turns_by = end
            self._session.wait(self._waker, end - now)
            self._waker.silence()
            return
        self._turns_by = now + _CONNECTING
        try:
            left = inf if self._give_up_at is None else self._give_up_at + LAST_WORDS - now
            self._session.open(None if left == inf else max(left, 0.1))
        except (psycopg.Error, BgjobError) as error:
            self._events.error(error)
            # From the begin of this attempt: where a host is silent, it took longer than the pause.
            self._rest(now)
        else:
            self._pause = _FIRST_PAUSE
            self._tell_warning()
            if self._was_silent:
                self._was_silent = False
                self._transactions.doubt()
            self._engine.reconnect()


def _sizes(mux: Mux) -> dict[str, int]:
    return {type_: route.policy.batch or 1 for type_, route in mux.batches.items()}
