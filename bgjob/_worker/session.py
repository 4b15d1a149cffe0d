"""The worker's one connection: opened, exchanged with, waited on, each with a deadline."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from math import inf
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg._encodings import pg2pyenc
from psycopg.errors import ProtocolViolation
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from bgjob import schema
from bgjob._engine.protocol import Exchange
from bgjob._engine.reply import Notice, Plan, Reply
from bgjob._postgres import polling
from bgjob._postgres.connection import (
    WORKER_PATIENCE,
    ConnectionParameters,
    WorkerConnection,
    options,
)
from bgjob._postgres.cursor import Cursor
from bgjob._postgres.pooler import asked_settings, check_lost, check_mode
from bgjob._sql.execute import run, send, send_all
from bgjob._sql.notices import BY_HAND, Subscription, subscribe
from bgjob._sql.session import (
    SERVICE_SETTINGS,
    WORKER_SETTINGS,
    backend,
    hidden,
    lacks,
    lost,
    schema_comment,
    session,
    transaction,
)
from bgjob._sql.statement import Statement
from bgjob._worker.answer import REFUSING, Answer, Text, Unread
from bgjob._worker.clock import ServerClock
from bgjob._worker.options import WorkerOptions
from bgjob._worker.waker import Waker

T = TypeVar("T")

_NEVER = datetime(1, 1, 3, tzinfo=UTC)
"""Later than the time that means none."""

_LONGEST_SLEEP = 3600.0

# After an exchange that the server refused, or whose statements could not be made.
_UNENDED = (TransactionStatus.INERROR, TransactionStatus.INTRANS)


class Session:
    """A connection to the server that can be lost and opened again. Belongs to one thread."""

    def __init__(
        self,
        connection_parameters: Callable[[], ConnectionParameters],
        queue: str,
        options: WorkerOptions,
        *,
        meanwhile: Callable[[], object] = lambda: None,
        ends_at: Callable[[], float] = lambda: inf,
    ) -> None:
        self._meanwhile = meanwhile
        self._ends_at = ends_at
        self._connection_parameters = connection_parameters
        self._queue = queue
        self._options = options
        self._connection: WorkerConnection | None = None
        self._cursors: dict[Text, Cursor] = {}  # for reuse
        self._heard: Notice | None = None
        self._has_opened = False
        self.is_direct = False
        """Whether the open connection has a session of its own, without a transaction pooler."""
        self.warning: str | None = None
        """A warning about the open connection, for the observer."""
        self.clock = ServerClock()
        self.step = 0.0
        """Seconds by which the server's clock was set; to report and correct."""
        self.unread: list[Unread] = []
        """Claimed jobs that could not be read, to move to the dead-letter table."""
        self.can_notify = False
        """Whether the open connection receives notifications."""
        self.subscription = Subscription()
        """Which of them it receives."""

    @property
    def connection(self) -> WorkerConnection:
        """The connection; raises psycopg.OperationalError if it is closed."""
        connection = self._connection
        if connection is None:
            raise psycopg.OperationalError("the connection is closed")
        return connection

    def open(self, patience: float | None = None) -> None:
        """Connect, check the schema, listen.

        Args:
            patience: seconds for all of that, 10 by default; see `options` for how
                much of it connecting may take.

        Raises:
            psycopg.Error: the server cannot be reached, or refuses.
            SchemaError: the tables are missing or of another version.
            PoolerError: a pooler loses settings, or has no transactions.

        """
        end = monotonic() + (patience or WORKER_PATIENCE)
        settings = options(self._connection_parameters(), within=patience)
        # Statements are few and long: prepare them immediately, unless a pool forbids it.
        asked = settings.get("prepare_threshold", 0)
        ours = {
            "autocommit": True,
            "prepare_threshold": None if asked is None else 0,
            "row_factory": tuple_row,
            "cursor_factory": None,
            "context": None,
            "client_encoding": "UTF8",
        }
        connection = WorkerConnection.connect(**settings | ours)
        connection.patience = max(end - monotonic(), 0.1)
        connection.ends_at = self._ends_at
        try:
            # A pooler in transaction mode uses another session for each transaction:
            # settings and locks would stay behind in other clients' sessions.
            sent_at = monotonic()
            answers = run(connection, backend())
            self.clock.connected(answers.at, sent_at, monotonic())
            if answers.is_read_only:
                raise psycopg.errors.ReadOnlySqlTransaction(
                    "the server, or this database or role, is read-only: connect to the primary"
                )
            self.is_direct = answers.pid == connection.info.backend_pid
            if self.is_direct:
                run(connection, session(answers.pid, WORKER_SETTINGS))
            else:
                if "prepare_threshold" not in settings:
                    connection.prepare_threshold = None  # nor would it find prepared statements
                self._check_pooler(connection)
            # A worker that has used the tables continues while they have what its statements
            # need, whatever their version: a deploy may have changed them meanwhile.
            check = schema.check_tables if self._has_opened else schema.check_version
            check(run(connection, schema_comment()))
            schema.check_lacks(run(connection, lacks()))
            self.warning = schema.hidden_text(run(connection, hidden()))
            self.can_notify = self._options.notify and self.is_direct
            if self.can_notify:
                self.subscription = Subscription()
                connection.add_notify_handler(self._notice)
                _listen(connection, self._queue, self.subscription)
        except BaseException:
            connection.close()
            raise
        connection.meanwhile = self._meanwhile
        connection.patience = WORKER_PATIENCE
        self._connection, self._cursors, self._has_opened = connection, {}, True

    def _check_pooler(self, connection: WorkerConnection) -> None:
        asked = asked_settings(connection.info.options)
        ours = {name: asked[name] for name in asked.keys() - WORKER_SETTINGS.keys()}
        try:
            with connection.transaction():
                check_lost(run(connection, lost(ours)))
        except ProtocolViolation as error:
            check_mode(error)
            raise

    def ask(self, statement: Statement[T]) -> T:
        """Run one statement in a transaction of its own, with a worker's settings."""
        if self.is_direct:
            return run(self.connection, statement)
        with self.connection.transaction():
            run(self.connection, transaction())
            return run(self.connection, statement)

    def exchange(self, exchange: Exchange) -> Reply:
        """Run an exchange in one round trip and one transaction.

        Raises:
            psycopg.Error: it was refused; or the connection was lost, then
                `is_open` is False.

        """
        plan = self.plan(exchange)
        if len(plan) == 1 and self.is_direct:
            answer = self._answer()
            answer.ask(plan)  # one statement is a transaction
        else:
            with self.streaming():
                answer = self._transact(plan)
        return self.read(answer)

    def read(self, answer: Answer) -> Reply:
        """Read an answer; `unread` gets the jobs of a claim that cannot be read."""
        reply = answer.read()
        self.unread += answer.unread
        at = reply.seen.at if reply.seen else max((x.since for x in reply.lines), default=_NEVER)
        if at > _NEVER:
            self.step += self.clock.observe(at, answer.sent_at, monotonic())
        return reply

    def subscribe(self, to: Subscription) -> bool:
        """Receive these notifications; return whether the connection did not receive them all."""
        _listen(self.connection, self._queue, to)
        before, self.subscription = self.subscription, to
        return before.enqueues < to.enqueues or to.seat not in (None, before.seat)

    def use_server_encoding(self) -> None:
        """Read text in its stored encoding: some of it has no equivalent in UTF-8."""
        connection = self.connection
        encoding = connection.info.parameter_status("server_encoding") or ""
        with contextlib.suppress(psycopg.NotSupportedError):
            pg2pyenc(encoding.encode())  # Python does not know some encodings
            self._set({"client_encoding": encoding})

    def _set(self, settings: Mapping[str, str]) -> None:
        run(self.connection, session(self.connection.info.backend_pid, settings))
        self._cursors = {}  # they convert text by the encoding of their first use

    def forget_plans(self) -> None:
        """Prepare all statements again, after the tables of their plans have changed."""
        # psycopg forgets its prepared statements when it sees a rollback.
        Cursor(self.connection).execute("rollback", prepare=False)

    def plan(self, exchange: Exchange) -> Plan:
        """Return the statements of an exchange, ready to send."""
        options = self._options
        with REFUSING:
            return exchange.statements(self._queue, options.lease, options.concurrency)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """Allow sending exchanges before the last one's answer is read; see `send`.

        Raises:
            psycopg.Error: as for `exchange`.

        """
        connection = self.connection
        try:
            with connection.pipeline():
                yield
        finally:
            if connection.info.transaction_status in _UNENDED:
                connection.rollback()

    def send(self, plan: Plan) -> Answer:
        """Send an exchange as a transaction; return its answer, to await and read later."""
        answer = self._transact(plan)
        answer.say("select")
        return answer

    def _answer(self) -> Answer:
        return Answer(self.connection, self._cursors)

    def _transact(self, plan: Plan) -> Answer:
        # The commit is sent with the rest: a process that is stopped or cut off while it
        # waits for the answers must not keep rows locked.
        answer = self._answer()
        answer.say("begin isolation level read committed")
        if not self.is_direct:
            settings = transaction()
            send(answer.cursor(settings.text), settings)
        answer.ask(plan)
        answer.say("commit")
        return answer

    def lend(self, use: Callable[[psycopg.Connection[Any]], float]) -> float:
        """Lend the connection to a service; roll back what it leaves uncommitted."""
        connection = self.connection
        self._set(SERVICE_SETTINGS)
        try:
            wait = use(connection)
        finally:
            if connection.info.transaction_status in _UNENDED:
                connection.rollback()
            if self.is_open:
                self._set(WORKER_SETTINGS)
        if not self.is_open:
            raise psycopg.OperationalError("a service closed the connection, or left it busy")
        return wait

    @property
    def is_open(self) -> bool:
        """Whether the connection can carry another exchange."""
        connection = self._connection
        return (  # a closed one's status is UNKNOWN
            connection is not None
            and connection.pgconn.transaction_status == TransactionStatus.IDLE
        )

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known. From any thread."""
        return self._connection is not None

    def wait(self, waker: Waker, timeout: float) -> None:
        """Wait for the waker, a notification, the loss of the connection, or the time.

        Raises:
            psycopg.Error: the connection was lost.

        """
        connection = self._connection
        if connection is not None:
            # A notification after the last answer is read already, and wakes no poll().
            self._take_notifies(connection)
            if self._heard is not None:
                return
        poll = polling.poll()
        poll.register(waker, polling.READ)
        if connection is not None:
            poll.register(connection.fileno(), polling.READ)
        # Rounded up: poll() takes whole milliseconds, and would return early.
        ready = poll.poll(min(max(timeout, 0.0), _LONGEST_SLEEP) * 1000 + 1)
        rung = waker.fileno()
        for fd, _ in ready:
            if fd == rung:
                waker.silence(rings=True)
            elif connection is not None:
                connection.pgconn.consume_input()
                self._take_notifies(connection)

    def _take_notifies(self, connection: WorkerConnection) -> None:
        while notice := connection.pgconn.notifies():
            self._hear(notice.relname.decode(), notice.be_pid, notice.extra.decode())

    @property
    def notice(self) -> Notice | None:
        """The notifications since `take_notice`."""
        return self._heard

    def take_notice(self) -> Notice | None:
        """Return the notifications since the last call."""
        heard, self._heard = self._heard, None
        return heard

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _notice(self, notice: psycopg.Notify) -> None:
        self._hear(notice.channel, notice.pid, notice.payload)

    def _hear(self, channel: str, pid: int, payload: str) -> None:
        read = Notice.read_by_hand if channel == BY_HAND else Notice.read
        notice = read(payload, self._queue)
        if notice is None:
            return
        connection = self._connection
        if notice.relief and connection is not None and pid == connection.info.backend_pid:
            return  # a worker that released the lock itself has claimed since
        self._heard = notice | self._heard if self._heard else notice


def _listen(connection: WorkerConnection, queue: str, to: Subscription) -> None:
    with connection.pipeline():  # in one round trip, and one transaction
        send_all(connection, subscribe(queue, to))
