"""A handler's SQL and the settlement of its job, in one transaction.

The handler receives a connection with an open transaction, and its result is stored
in that transaction: both commit, or neither does. A retry and an exception roll it
back, and are stored afterwards like any other handler's. Without a connection the
handler is not entered, and no attempt has begun.

The logic is one generator of steps, with a driver for threads and one for coroutines.
"""

import asyncio
import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from time import monotonic
from typing import Any, NoReturn, TypeAlias, cast

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.adapt import AdaptersMap
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGconn
from psycopg.rows import tuple_row
from typing_extensions import override

from bgjob._engine.outcome import Committed, CommitUnknown, Fenced, Outcome, Release
from bgjob._engine.protocol import Exchange
from bgjob._handlers.route import NeedsKey, Route
from bgjob._postgres import connection
from bgjob._postgres.connection import (
    AsyncCursor,
    ConnectionParameters,
    Cursor,
    options,
    server_codec,
)
from bgjob._postgres.fork import ForkGuard
from bgjob._sql.execute import (
    read,
    read_all,
    read_all_async,
    read_async,
    send,
    send_all,
    send_all_async,
    send_async,
)
from bgjob._sql.settlements import (
    COMMIT,
    DEALLOCATE,
    ROLLBACK,
    Claimed,
    begin,
    claim_of_transaction,
    payload,
)
from bgjob._sql.statement import Statement
from bgjob.errors import LeaseLostError
from bgjob.job import Job
from bgjob.mux import Mux
from bgjob.result import Complete, MoveToDlq, Reschedule, Result, Retry

_PATIENCE = 10.0
"""Seconds without an answer of the server, outside the handler."""

_FIRST_PAUSE = 0.05
"""Seconds that a slot waits after it could not connect; doubles with each failure."""
_LONGEST_PAUSE = 1.0

_NAP = 0.2
"""Seconds after which a waiting coroutine checks whether the worker shuts down."""


@dataclass(frozen=True, slots=True)
class NotBegun:
    """The handler was not entered: its transaction could not be opened."""

    error: BaseException


Ending: TypeAlias = Result | Committed | CommitUnknown | Fenced | NotBegun
"""How a job ended: settled already, or a result to store."""


_FETCH = (b"begin isolation level read committed", b"set local statement_timeout = 0")


class _Handle:
    """A step that runs the handler; the answer is its return value."""


class _End(Enum):
    """A step that ends the transaction; a rollback answers the token of a committed claim."""

    COMMIT = auto()
    ROLLBACK = auto()


@dataclass(frozen=True, slots=True)
class _Ask:
    """A step that runs statements; the answers, or None if the transaction is over."""

    statements: tuple[Statement[Any], ...]


_Step: TypeAlias = _Handle | _End | _Ask
_Steps: TypeAlias = Generator[_Step, Any, Ending]

_KEEPS = (Complete, Reschedule, MoveToDlq)


def _steps(route: Route, claimed: Claimed) -> _Steps:
    job, token = claimed.job, str(claimed.token)
    try:
        returned = yield _Handle()
        result = route.judge(job, returned)
        commits = returned is None or isinstance(returned, _KEEPS)
    except BaseException as error:
        result, commits = route.failed(job, error), False
    if commits:
        try:
            answers = yield _Ask((claim_of_transaction(), *settlement(claimed, result)))
            if answers is None or answers[0] != token:
                result, commits = MoveToDlq(route.transaction_ended()), False
            elif not answers[1]:
                yield _End.ROLLBACK
                return Fenced()
        except BaseException as error:
            result, commits = route.failed(job, error), False
    if not commits:
        committed = yield _End.ROLLBACK
        # Another run would repeat the part that the handler itself committed.
        return MoveToDlq(route.transaction_ended()) if committed == token else result
    try:
        yield _End.COMMIT
    except BaseException as error:
        return CommitUnknown(result, route.failed(job, error))
    return Committed(result)


def _end_with_sync(pipeline: Any) -> None:
    """Make a pipeline send nothing after its Sync.

    psycopg also sends a Flush. The server takes that for the next command: it stops the timer of
    idle_in_transaction_session_timeout, and starts it only with its next answer. A worker that
    vanished here would keep the job's row, and the handler's locks, forever.
    """
    pipeline._exit_gen = pipeline._sync_gen  # noqa: SLF001


def settlement(claimed: Claimed, result: Result | CommitUnknown | Release) -> list[Statement[Any]]:
    """Return the statements that settle one job; the first returns its id if it is still held."""
    exchange = Exchange()
    exchange.settle(Outcome(claimed, result, None))
    return [statement for statement, _ in exchange.statements(claimed.job.queue, 0.0)]


def unblocking(queue: str, keys: list[str]) -> list[Statement[Any]]:
    """Return the statements that release keys."""
    return [statement for statement, _ in Exchange(release=keys).statements(queue, 0.0)]


def conclusion(claimed: Claimed, ending: Ending | Release) -> list[Statement[Any]]:
    """Return the statements that settle one job and release its key; see `settlement`.

    A job that its own transaction settled needs only the release. That transaction does not
    release the key: it would keep it locked until it ends, and may not see other sessions'
    commits since it began.
    """
    if isinstance(ending, Fenced):
        return []
    job = claimed.job
    releases = [] if job.exclusive is None else unblocking(job.queue, [job.exclusive])
    if isinstance(ending, NotBegun):
        ending = Release()
    return releases if isinstance(ending, Committed) else settlement(claimed, ending) + releases


def routed(claimed: Claimed, mux: Mux) -> tuple[Claimed, Route | Retry | MoveToDlq]:
    """Return the claim, with the key that its type defines, and its route or result."""
    job, token, is_charged = claimed
    route = mux.route(job)
    if isinstance(route, NeedsKey):
        job = job._replace(exclusive=route.key)
        route = mux.route(job)
    assert not isinstance(route, NeedsKey)  # noqa: S101 (the job has its key)
    return Claimed(job, token, is_charged), route


def acquisition(claimed: Claimed) -> list[Statement[Any]]:
    """Return the statements that grant one job its key; `has_key` reads their answers."""
    exchange = Exchange(acquire=[claimed])
    return [statement for statement, _ in exchange.statements(claimed.job.queue, 0.0)]


def has_key(answers: list[Any]) -> bool | None:
    """Whether a job was granted its key; None if undecided: release the job."""
    [answer] = answers[-1].values() or [False]
    return cast("bool | None", answer)


_FORBIDDEN = (
    "a transactional handler cannot {} its connection: the worker does, with the job's "
    "settlement; raise or return Retry() to roll back"
)


_ENDED = "the handler that was given this connection has ended, and its transaction with it"

_GONE = psycopg.pq.PGconn.connect_start(b"host=/")
"""Replaces the session of a handler's connection when the next handler uses that session."""
_GONE.finish()

_NOBODY = object()


class _Connection(connection.Connection):
    token = ""
    ended_by: str | None = None
    """The claim's token, if the handler closed the connection after ending the transaction."""
    user: object = None
    """After the handler's end, the only thread (its number) or task that may use it."""

    @override
    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        # Threads that the handler left behind come here with each statement, after the lock.
        if self.user is not None and self.user != threading.get_ident():
            raise psycopg.ProgrammingError(_ENDED)
        return super().wait(gen, *args, **kwargs)

    @override
    def close(self) -> None:
        if _is_over(self):
            self.ended_by = self.token
        super().close()

    @override
    def commit(self) -> NoReturn:
        raise psycopg.ProgrammingError(_FORBIDDEN.format("commit"))

    @override
    def rollback(self) -> NoReturn:
        raise psycopg.ProgrammingError(_FORBIDDEN.format("roll back"))


class _AsyncConnection(connection.AsyncConnection):
    token = ""
    ended_by: str | None = None
    """See _Connection.ended_by."""
    user: object = None
    """See _Connection.user."""

    @override
    async def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        if self.user is not None and self.user is not asyncio.current_task():
            raise psycopg.ProgrammingError(_ENDED)
        return await super().wait(gen, *args, **kwargs)

    @override
    async def close(self) -> None:
        if _is_over(self):
            self.ended_by = self.token
        await super().close()

    @override
    async def commit(self) -> NoReturn:
        raise psycopg.ProgrammingError(_FORBIDDEN.format("commit"))

    @override
    async def rollback(self) -> NoReturn:
        raise psycopg.ProgrammingError(_FORBIDDEN.format("roll back"))


class Transactions:
    """Connections for transactional handlers: a session for each running one, then reused.

    No other code uses them, so that handlers that wait for a pool never wait for each
    other. Each handler gets a connection object of its own, which loses the session with
    the commit: a later use of it by the handler does not reach the next one. Thread-safe.
    """

    def __init__(self, connection_parameters: ConnectionParameters, fork_guard: ForkGuard) -> None:
        self._fork_guard = fork_guard
        self._options: dict[str, Any] = {**options(connection_parameters), "autocommit": True}
        # Through a pooler that forbids prepared statements, other clients would lose theirs.
        prepares = self._options.get("prepare_threshold", 0) is not None
        self._commit = COMMIT + DEALLOCATE if prepares else COMMIT
        self._idle: deque[PGconn] = deque()
        self._handling: set[_Connection | _AsyncConnection] = set()
        self._closed = False
        self._leaving = threading.Event()
        self._pause, self._pause_grows_at = _FIRST_PAUSE, -inf

    def run(
        self, route: Route, claimed: Claimed, started: Callable[[Job], None] | None = None
    ) -> Ending:
        """Run a plain handler; its exceptions become results.

        Args:
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.

        """
        try:
            connection = self._begin(claimed)
        except BaseException as error:
            return NotBegun(error)
        if started is not None:
            started(claimed.job)
        steps = _steps(route, claimed)
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._take(step, connection, route, claimed)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            ending: Ending = stop.value
            if isinstance(ending, Committed) and self._may_keep(connection):
                self._keep(connection)
            else:
                connection.close()
            return ending
        except BaseException:
            connection.close()
            raise

    async def run_async(
        self, route: Route, claimed: Claimed, started: Callable[[Job], None] | None = None
    ) -> Ending:
        """Run a coroutine handler. Async variant of `run`."""
        try:
            connection = await self._begin_async(claimed)
        except BaseException as error:
            return NotBegun(error)
        if started is not None:
            started(claimed.job)
        steps = _steps(route, claimed)
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._take_async(step, connection, route, claimed)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            ending: Ending = stop.value
            if isinstance(ending, Committed) and self._may_keep(connection):
                self._keep(connection)
            else:
                await connection.close()
            return ending
        except BaseException:
            await connection.close()
            raise

    def whole(self, claimed: Claimed) -> Claimed | NotBegun:
        """Return the job with its payload, which the claim did not return.

        It may take long, over a slow network, as long as it goes on.
        """
        try:
            while True:
                kept = self._kept()
                connection = self._connect() if kept is None else self._connection(kept)
                connection.patience = _PATIENCE
                try:
                    with connection.pipeline():
                        for text in _FETCH:
                            Cursor(connection).execute(text, prepare=False)
                        statement = payload(claimed)
                        cursor = send(Cursor(connection), statement)
                        Cursor(connection).execute(b"commit", prepare=False)
                        found = read(cursor, statement)
                except BaseException as error:
                    connection.close()
                    if kept is None or not isinstance(error, psycopg.Error):
                        raise
                else:
                    self._keep(connection)
                    return _with_payload(claimed, found)
        except BaseException as error:
            return NotBegun(error)

    async def whole_async(self, claimed: Claimed) -> Claimed | NotBegun:
        """Return the job with its payload. Async variant of `whole`."""
        try:
            while True:
                kept = self._kept()
                if kept is None:
                    connection = await self._connect_async()
                else:
                    connection = self._async_connection(kept)
                connection.patience = _PATIENCE
                try:
                    async with connection.pipeline():
                        for text in _FETCH:
                            await AsyncCursor(connection).execute(text, prepare=False)
                        statement = payload(claimed)
                        cursor = await send_async(AsyncCursor(connection), statement)
                        await AsyncCursor(connection).execute(b"commit", prepare=False)
                        found = await read_async(cursor, statement)
                except BaseException as error:
                    await connection.close()
                    if kept is None or not isinstance(error, psycopg.Error):
                        raise
                else:
                    self._keep(connection)
                    return _with_payload(claimed, found)
        except BaseException as error:
            return NotBegun(error)

    def rest(self) -> None:
        """Wait before the next attempt to connect; return immediately if the worker shuts down.

        A slot that could not connect keeps its job for as long: to give it back immediately
        would be to claim it again immediately.
        """
        self._leaving.wait(self._next_pause())

    async def rest_async(self) -> None:
        """Wait before the next attempt to connect. Async variant of `rest`; can be cancelled."""
        end = monotonic() + self._next_pause()
        with contextlib.suppress(asyncio.CancelledError):
            # Another thread sets the event, so there is no event of the loop to await.
            while (left := end - monotonic()) > 0 and not self._leaving.is_set():  # noqa: ASYNC110
                await asyncio.sleep(min(left, _NAP))

    def _next_pause(self) -> float:
        now = monotonic()
        if now >= self._pause_grows_at:  # once for all slots that failed together
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._pause_grows_at = now + self._pause
        return self._pause

    def leave(self) -> None:
        """Stop waiting for connections: the worker shuts down."""
        self._leaving.set()

    def doubt(self) -> None:
        """Abort queries that were sent before the network was lost; it is back."""
        for conn in self._handling.copy():
            conn.patience = _PATIENCE

    def close(self) -> None:
        """Close the idle connections; one in use closes after its handler."""
        self._closed = True
        while self._idle:
            self._idle.pop().finish()

    def _may_keep(self, connection: _Connection | _AsyncConnection) -> bool:
        return not self._closed and connection.info.transaction_status == TransactionStatus.IDLE

    def _furnish(self, connection: _Connection | _AsyncConnection) -> None:
        """Set the attributes that psycopg sets on the connections that it opens."""
        own: Any = connection
        own.row_factory = self._options.get("row_factory") or tuple_row
        if factory := self._options.get("cursor_factory"):
            own.cursor_factory = factory
        if context := self._options.get("context"):
            own._adapters = AdaptersMap(context.adapters)  # noqa: SLF001
        own._autocommit = True  # noqa: SLF001
        own.prepare_threshold = self._options.get("prepare_threshold", 5)

    def _connection(self, session: PGconn) -> _Connection:
        connection = _Connection(session)
        self._furnish(connection)
        return connection

    def _async_connection(self, session: PGconn) -> _AsyncConnection:
        connection = _AsyncConnection(session)
        self._furnish(connection)
        return connection

    def _keep(self, connection: _Connection | _AsyncConnection) -> None:
        session: PGconn = connection.pgconn
        connection.user, connection.pgconn = _NOBODY, _GONE
        if self._closed:
            session.finish()
        else:
            self._idle.append(session)

    def _kept(self) -> PGconn | None:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return None

    # -- driver for threads -----------------------------------------------------------

    def _begin(self, claimed: Claimed) -> _Connection:
        while True:
            kept = self._kept()
            connection = self._connect() if kept is None else self._connection(kept)
            connection.patience, connection.token = _PATIENCE, str(claimed.token)
            try:
                # Several commands in one string cannot be prepared.
                Cursor(connection).execute(_begin(connection, claimed), prepare=False)
            except BaseException as error:
                connection.close()
                if kept is None or not isinstance(error, psycopg.Error):
                    raise
            else:
                return connection

    def _connect(self) -> _Connection:
        connection = _Connection.connect(**self._options)
        self._pause = _FIRST_PAUSE
        return connection

    def _take(self, step: _Step, connection: _Connection, route: Route, claimed: Claimed) -> object:
        match step:
            case _Handle():
                connection.patience = inf  # its statements may take long
                self._handling.add(connection)
                try:
                    return route.handler(claimed.job, connection)
                finally:
                    if self._fork_guard.is_child:
                        self._fork_guard.end(sys.exc_info()[1])
                    self._handling.discard(connection)
                    connection.user, connection.patience = threading.get_ident(), _PATIENCE
            case _Ask(statements):
                if _is_over(connection):
                    return None
                with connection.pipeline() as pipeline:
                    _end_with_sync(pipeline)
                    return read_all(send_all(connection, statements), statements)
            case _End.COMMIT:
                Cursor(connection).execute(self._commit, prepare=False)
            case _End.ROLLBACK:
                if connection.ended_by is not None:
                    return connection.ended_by
                with contextlib.suppress(psycopg.Error):
                    cursor = Cursor(connection).execute(ROLLBACK, prepare=False)
                    cursor.nextset()
                    return cursor.fetchall()[0][0]
        return None

    # -- driver for coroutines --------------------------------------------------------

    async def _begin_async(self, claimed: Claimed) -> _AsyncConnection:
        while True:
            kept = self._kept()
            if kept is None:
                connection = await self._connect_async()
            else:
                connection = self._async_connection(kept)
            connection.patience, connection.token = _PATIENCE, str(claimed.token)
            try:
                await AsyncCursor(connection).execute(_begin(connection, claimed), prepare=False)
            except BaseException as error:
                await connection.close()
                if kept is None or not isinstance(error, psycopg.Error):
                    raise
            else:
                return connection

    async def _connect_async(self) -> _AsyncConnection:
        connection = await _AsyncConnection.connect(**self._options)
        self._pause = _FIRST_PAUSE
        return connection

    async def _take_async(
        self, step: _Step, connection: _AsyncConnection, route: Route, claimed: Claimed
    ) -> object:
        match step:
            case _Handle():
                connection.patience = inf  # its statements may take long
                self._handling.add(connection)
                try:
                    return await route.awaited(claimed.job, connection)
                finally:
                    if self._fork_guard.is_child:  # in which no loop runs
                        self._fork_guard.end(sys.exc_info()[1])
                    self._handling.discard(connection)
                    connection.user, connection.patience = asyncio.current_task(), _PATIENCE
            case _Ask(statements):
                if _is_over(connection):
                    return None
                async with connection.pipeline() as pipeline:
                    _end_with_sync(pipeline)
                    cursors = await send_all_async(connection, statements)
                    return await read_all_async(cursors, statements)
            case _End.COMMIT:
                await AsyncCursor(connection).execute(self._commit, prepare=False)
            case _End.ROLLBACK:
                if connection.ended_by is not None:
                    return connection.ended_by
                with contextlib.suppress(psycopg.Error):
                    cursor = AsyncCursor(connection)
                    await cursor.execute(ROLLBACK, prepare=False)
                    cursor.nextset()
                    return (await cursor.fetchall())[0][0]
        return None


def _with_payload(claimed: Claimed, found: list[bytes | None]) -> Claimed | NotBegun:
    if not found:
        return NotBegun(LeaseLostError(f"job {claimed.job.id!r} was lost before it started"))
    [arg] = found
    return claimed._replace(job=claimed.job._replace(arg=arg))


def _begin(connection: psycopg.BaseConnection[Any], claimed: Claimed) -> bytes:
    info = connection.info
    return begin(
        claimed,
        over_tcp=not info.host.startswith("/"),
        server_version=info.server_version,
        codec=server_codec(connection),
    )


def _is_over(connection: psycopg.BaseConnection[Any]) -> bool:
    return connection.info.transaction_status == TransactionStatus.IDLE
