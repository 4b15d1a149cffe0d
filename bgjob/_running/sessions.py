"""Sessions for the transactions of handlers: one for each running handler, then reused.

Each handler gets a connection object of its own, which loses the session with the commit: a
later use of it by the handler does not reach the next one.

The module has over 400 lines because both colours are here; only the async one is written.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from math import inf
from time import monotonic
from typing import Any, NamedTuple, NoReturn, TypeVar

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.adapt import AdaptersMap
from psycopg.pq import Escaping, TransactionStatus
from psycopg.pq.abc import PGconn
from psycopg.rows import tuple_row
from typing_extensions import override

from bgjob._postgres import connection, hosts
from bgjob._postgres.commands import after_answers, send_only
from bgjob._postgres.connection import WORKER_PATIENCE, ConnectionParameters, options, options_async
from bgjob._sql.settlements import Claimed
from bgjob._sql.transactions import DEALLOCATE, LIST_PREPARED, RESET

T = TypeVar("T")

_FIRST_PAUSE = 0.05
"""Seconds that a slot waits after it could not connect; doubles with each failure."""
_LONGEST_PAUSE = 1.0

_NAP = 0.2
"""Seconds after which a waiting coroutine checks whether the worker shuts down."""

_FORBIDDEN = (
    "a handler cannot {} the connection it was given: the worker does, when a transactional "
    "handler or the transaction of a checkpoint ends; raise or return Retry() to roll back"
)


_ENDED = "the handler that was given this connection has ended, and its transaction with it"

_GONE = psycopg.pq.PGconn.connect_start(b"host=/")
"""Replaces the session of a handler's connection when the next handler uses that session."""
_GONE.finish()

_NO_USER = object()


# -- async -----------------------------------------------------------------------------


class AsyncHandlerConnection(connection.AsyncConnection):
    """The connection of one handler, for as long as that runs."""

    token = ""
    has_committed = False
    """Whether the worker has committed its transaction."""
    next: Claimed | None = None
    """The job whose transaction has begun with that commit, in the same session."""
    ended_by: str | None = None
    """The claim's token, if the handler closed the connection after ending the transaction."""
    is_new = True
    """Whether no handler has used the session before."""
    is_prepared = False
    """Whether the session has the statements of `transactions.PREPARE`."""
    left: Collection[bytes] | None = None
    """Names of prepared statements that are left in a session that was reset with the commit."""
    is_reset = True
    """Whether the server has said that it has reset the session."""
    user: object = None
    """After the handler's end, the only task, or thread by its number, that may use it."""

    @override
    async def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        # What the handler left behind comes here with each statement, after the lock.
        if self.user is not None and self.user != asyncio.current_task():
            raise psycopg.ProgrammingError(_ENDED)
        if not self.is_reset:
            self.is_reset = True
            gen = after_answers(self.pgconn, gen)
        return await super().wait(gen, *args, **kwargs)

    @override
    async def close(self) -> None:
        if is_over(self):
            self.ended_by = self.token
        await super().close()

    @override
    async def commit(self) -> NoReturn:
        raise psycopg.ProgrammingError(_FORBIDDEN.format("commit"))

    @override
    async def rollback(self) -> NoReturn:
        raise psycopg.ProgrammingError(_FORBIDDEN.format("roll back"))


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class HandlerConnection(connection.Connection):
    """The connection of one handler, for as long as that runs."""

    token = ""
    has_committed = False
    """Whether the worker has committed its transaction."""
    next: Claimed | None = None
    """The job whose transaction has begun with that commit, in the same session."""
    ended_by: str | None = None
    """The claim's token, if the handler closed the connection after ending the transaction."""
    is_new = True
    """Whether no handler has used the session before."""
    is_prepared = False
    """Whether the session has the statements of `transactions.PREPARE`."""
    left: Collection[bytes] | None = None
    """Names of prepared statements that are left in a session that was reset with the commit."""
    is_reset = True
    """Whether the server has said that it has reset the session."""
    user: object = None
    """After the handler's end, the only task, or thread by its number, that may use it."""

    @override
    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        # What the handler left behind comes here with each statement, after the lock.
        if self.user is not None and self.user != threading.get_ident():
            raise psycopg.ProgrammingError(_ENDED)
        if not self.is_reset:
            self.is_reset = True
            gen = after_answers(self.pgconn, gen)
        return super().wait(gen, *args, **kwargs)

    @override
    def close(self) -> None:
        if is_over(self):
            self.ended_by = self.token
        super().close()

    @override
    def commit(self) -> NoReturn:
        raise psycopg.ProgrammingError(_FORBIDDEN.format("commit"))

    @override
    def rollback(self) -> NoReturn:
        raise psycopg.ProgrammingError(_FORBIDDEN.format("roll back"))


# -- both colours ----------------------------------------------------------------------


class Idle(NamedTuple):
    """A session that no handler uses."""

    session: PGconn
    is_reset: bool
    is_prepared: bool
    since: float
    """When it became idle."""


class Sessions:
    """Sessions that no other code uses, so that handlers never wait for each other. Thread-safe."""

    def __init__(
        self, connection_parameters: ConnectionParameters, *, prepares: bool = True
    ) -> None:
        self._connection_parameters = connection_parameters
        # A pooler's other sessions would not find its prepared statements.
        self._defaults: dict[str, Any] = {} if prepares else {"prepare_threshold": None}
        self._options: dict[str, Any] = {}
        """Those of the last connection that was opened; no other session is idle before."""
        self._idle: deque[Idle] = deque()
        self._begun: dict[tuple[str, int], Idle] = {}
        """Sessions in which the transaction of a job has begun, before that runs."""
        self._handling: set[HandlerConnection | AsyncHandlerConnection] = set()
        self._closed = False
        self._leaving = threading.Event()
        self._pause, self._pause_grows_at = _FIRST_PAUSE, -inf

    # -- async -------------------------------------------------------------------------

    async def open_async(
        self, use: Callable[[AsyncHandlerConnection], Awaitable[T]]
    ) -> tuple[AsyncHandlerConnection, T]:
        """Use an idle session, or a new one; return the connection and what `use` returned.

        An idle session that fails may have ended meanwhile: then the next one is tried.
        """
        while True:
            idle = self._idle_session()
            if idle is None:
                asked = await options_async(self._connection_parameters)
                self._options = {**self._defaults, **asked, "autocommit": True}
                opened = await AsyncHandlerConnection.connect(**self._options)
                self._pause = _FIRST_PAUSE
            else:
                opened = self._opened_async(idle)
            opened.patience = WORKER_PATIENCE
            try:
                return opened, await use(opened)
            except BaseException as error:
                await opened.close()
                if idle is None or not isinstance(error, psycopg.Error):
                    raise

    def _opened_async(self, idle: Idle) -> AsyncHandlerConnection:
        """Return a connection of its own with a session that was used before."""
        opened = AsyncHandlerConnection(idle.session)
        self._furnish(opened, idle)
        return opened

    def take_begun_async(self, claimed: Claimed) -> AsyncHandlerConnection | None:
        """Return a connection with the transaction that has begun for a job, if one has."""
        idle = self._begun.pop(_key(claimed), None)
        if idle is None:
            return None
        opened = self._opened_async(idle)
        opened.token, opened.patience = str(claimed.token), WORKER_PATIENCE
        return opened

    # -- sync: made from the async text by .ci/colours.py; do not edit -----------------

    def open(self, use: Callable[[HandlerConnection], T]) -> tuple[HandlerConnection, T]:
        """Use an idle session, or a new one; return the connection and what `use` returned.

        An idle session that fails may have ended meanwhile: then the next one is tried.
        """
        while True:
            idle = self._idle_session()
            if idle is None:
                asked = options(self._connection_parameters)
                self._options = {**self._defaults, **asked, "autocommit": True}
                opened = HandlerConnection.connect(**self._options)
                self._pause = _FIRST_PAUSE
            else:
                opened = self._opened(idle)
            opened.patience = WORKER_PATIENCE
            try:
                return opened, use(opened)
            except BaseException as error:
                opened.close()
                if idle is None or not isinstance(error, psycopg.Error):
                    raise

    def _opened(self, idle: Idle) -> HandlerConnection:
        """Return a connection of its own with a session that was used before."""
        opened = HandlerConnection(idle.session)
        self._furnish(opened, idle)
        return opened

    def take_begun(self, claimed: Claimed) -> HandlerConnection | None:
        """Return a connection with the transaction that has begun for a job, if one has."""
        idle = self._begun.pop(_key(claimed), None)
        if idle is None:
            return None
        opened = self._opened(idle)
        opened.token, opened.patience = str(claimed.token), WORKER_PATIENCE
        return opened

    # -- both colours ------------------------------------------------------------------

    def _idle_session(self) -> Idle | None:
        with contextlib.suppress(IndexError):
            while hosts.was_silent_since((idle := self._idle.pop()).since):
                idle.session.finish()
            return idle
        return None

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

    @property
    def is_leaving(self) -> bool:
        """Whether the worker shuts down."""
        return self._leaving.is_set()

    def leave(self) -> None:
        """Stop waiting for connections: the worker shuts down."""
        self._leaving.set()

    def doubt(self) -> None:
        """Abort queries that were sent before the network was lost; it is back."""
        for conn in self._handling.copy():
            conn.patience = WORKER_PATIENCE

    def close(self) -> None:
        """Close the idle connections; one in use closes after its handler."""
        self._closed = True
        while self._idle:
            self._idle.pop().session.finish()

    def _furnish(self, connection: HandlerConnection | AsyncHandlerConnection, idle: Idle) -> None:
        """Set the attributes of a connection that has an idle session, and those of psycopg."""
        _, connection.is_reset, connection.is_prepared, _ = idle
        connection.is_new = False
        own: Any = connection
        own.row_factory = self._options.get("row_factory") or tuple_row
        if factory := self._options.get("cursor_factory"):
            own.cursor_factory = factory
        if context := self._options.get("context"):
            own._adapters = AdaptersMap(context.adapters)  # noqa: SLF001
        own._autocommit = True  # noqa: SLF001
        own.prepare_threshold = self._options.get("prepare_threshold", 5)

    @property
    def prepares(self) -> bool:
        """Whether sessions may have prepared statements.

        Through a pooler that forbids them, other clients would lose theirs.
        """
        return self._options.get("prepare_threshold", 0) is not None

    def reset(self, *, keeps_plans: bool) -> bytes:
        """Return the statements that reset a session.

        Args:
            keeps_plans: whether prepared statements are listed, and not dropped.

        """
        if keeps_plans:
            return RESET + LIST_PREPARED
        return RESET + DEALLOCATE if self.prepares else RESET

    def keep(self, connection: HandlerConnection | AsyncHandlerConnection) -> None:
        """Take the session away from a connection, for the next one.

        If a handler has used it, and it is not as before, the server resets it while this process
        goes on.
        """
        session = _taken(connection)
        reset, is_prepared = b"", connection.is_prepared
        if connection.has_committed:
            if connection.left is None:
                reset, is_prepared = self.reset(keeps_plans=False), False
            elif connection.left:
                reset = deallocate(session, connection.left)
        self._keep(session, reset, is_prepared=is_prepared)

    def keep_begun(
        self, connection: HandlerConnection | AsyncHandlerConnection, claimed: Claimed
    ) -> None:
        """Keep the session for a job, whose transaction has begun in it."""
        is_prepared = connection.is_prepared
        self._begun[_key(claimed)] = Idle(
            _taken(connection), is_reset=True, is_prepared=is_prepared, since=monotonic()
        )

    def drop(self, claimed: Claimed) -> None:
        """Roll back the transaction that has begun for a job, if the job has not run in it."""
        idle = self._begun.pop(_key(claimed), None)
        if idle is not None:
            self._keep(idle.session, b"rollback", is_prepared=idle.is_prepared)

    def _keep(self, session: PGconn, reset: bytes, *, is_prepared: bool) -> None:
        try:
            if not self._closed:
                if reset:
                    send_only(session, reset)
                self._idle.append(Idle(session, not reset, is_prepared, monotonic()))
                return
        except psycopg.Error:
            pass  # it has ended
        session.finish()


def _key(claimed: Claimed) -> tuple[str, int]:
    return claimed.job.id, claimed.token


def _taken(connection: HandlerConnection | AsyncHandlerConnection) -> PGconn:
    """Take the session away from a connection, which is of no use afterwards."""
    session: PGconn = connection.pgconn
    connection.user, connection.pgconn = _NO_USER, _GONE
    return session


def deallocate(session: PGconn, names: Collection[bytes]) -> bytes:
    """Return the statements that drop prepared statements."""
    quote = Escaping(session).escape_identifier
    return b"; ".join([b"deallocate " + quote(name) for name in names])


def is_over(connection: psycopg.BaseConnection[Any]) -> bool:
    """Whether no transaction is open."""
    return connection.pgconn.transaction_status == TransactionStatus.IDLE
