"""The connections of a client: its own, or those of the user's pool.

A client's own pool has no thread and no task. A caller takes an idle connection or opens
one; a caller that returns one closes those that have been idle for long. psycopg_pool, which
was used before, was replaced for four measured reasons:

- It connects again after 1, 3, 7, 15 s: after an outage of 5, 10 and 20 s the first enqueue
  returned 1.3, 3.9 and 8.2 s after the server was back.
- Each connection that the server ended while it was idle failed one enqueue.
- On Python 3.13.0 its threads kept a program that did not close its client for 20.8 s.
- Its lock stayed locked in a child that was forked while another thread was in the pool.

An idle connection is checked before it is used: a socket with something to read while no
query is open has the server's last message, or its end. That needs no round trip. It does not
show a host that vanished silently. When such a connection fails, the idle ones are closed too, and
also when any other connection of the process, for example a worker's, has had no answer.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from psycopg import BaseConnection, IsolationLevel
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from bgjob._postgres import fork, hosts, polling
from bgjob._postgres.connection import AsyncConnection, Connection, SourceError
from bgjob._postgres.event_loop import check_event_loop
from bgjob.errors import BgjobError, ClientClosedError

_SIZE = 10
"""The most connections in use."""

_IDLE = 600.0
"""Seconds after which an idle connection is closed, when another one is returned."""

_AGE = 3600.0
"""Seconds after which a connection is replaced, which frees the caches of its session."""

_PAUSE = 0.1
"""Seconds between two attempts to connect."""

PATIENCE = 30.0
"""Seconds without an answer, or without a connection, before an operation fails."""


class PooledConnection(Connection):
    """A connection of a client's own pool."""

    patience = PATIENCE
    opened_at = idle_since = 0.0
    siblings: "deque[PooledConnection]"
    """The idle connections of the process that opened it; a forked child has others."""
    _pool = None  # keeps psycopg from warning if the program ends without closing it

    enqueues = 0
    """How many enqueues it has sent; after a few their statements are prepared."""
    prepared: frozenset[bytes] = frozenset()
    """The names of those that are."""


class AsyncPooledConnection(AsyncConnection):
    """A connection of an async client's own pool. Async variant of PooledConnection."""

    patience = PATIENCE
    opened_at = idle_since = 0.0
    siblings: "deque[AsyncPooledConnection]"
    """See PooledConnection.siblings."""
    permits: asyncio.Semaphore
    """Those of the event loop that uses it."""
    enqueues = 0
    """See PooledConnection.enqueues."""
    prepared: frozenset[bytes] = frozenset()
    _pool = None


_NO_LOOP = (
    "an AsyncClient works on asyncio only, and no event loop of asyncio runs in this thread: under "
    "trio use a Client, by trio.to_thread.run_sync"
)

C = TypeVar("C", PooledConnection, AsyncPooledConnection)


def has_news(connection: BaseConnection[Any]) -> bool:
    """Whether there is something to read from a connection without an open query."""
    if connection.closed:
        return True
    poll = polling.poll()
    poll.register(connection.fileno(), polling.READ)
    return bool(poll.poll(0))


def _take(idle: deque[C]) -> C | None:
    """Take the most recently used connection that works; None without one."""
    try:
        while True:
            connection = idle.pop()
            if (
                monotonic() < connection.opened_at + _AGE
                and not hosts.was_silent_since(connection.idle_since)
                and not has_news(connection)
            ):
                return connection
            connection.pgconn.finish()
    except IndexError:
        return None


def _keep(idle: deque[C], connection: C) -> None:
    """Keep a connection for the next caller, if it can be used; close those that are old."""
    status = connection.pgconn.transaction_status
    if status != TransactionStatus.IDLE:
        connection.pgconn.finish()
        if status == TransactionStatus.UNKNOWN:
            _close(idle)  # a broken connection is hardly the only one
        return
    connection.idle_since = now = monotonic()
    idle.append(connection)
    try:  # suppress() costs 0.4 µs; a take and a release together cost 1.7
        while idle[0].idle_since < now - _IDLE:
            idle.popleft().pgconn.finish()
    except IndexError:  # another thread took it
        pass


def _close(idle: deque[C]) -> None:
    with suppress(IndexError):
        while True:
            idle.pop().pgconn.finish()


class Pool:
    """A client's own connections, at most 10; thread-safe, and empty in a forked child."""

    def __init__(
        self,
        options: Callable[[], dict[str, Any]],
        configure: Callable[[PooledConnection], None],
        *,
        patience: float,
    ) -> None:
        self._options = options
        self._configure = configure
        self._patience = patience
        self._is_closed = False
        self.in_child()
        fork.watch(self)

    def in_child(self) -> None:
        """Start empty: the connections are the parent's, and a lock may stay locked forever."""
        self._idle: deque[PooledConnection] = deque()
        # The standard library's semaphore takes ten times as long.
        self._permits: SimpleQueue[None] = SimpleQueue()
        for _ in range(_SIZE):
            self._permits.put(None)

    def take(self) -> PooledConnection:
        """Take a connection in autocommit; try to open one for `patience` seconds.

        Raises:
            ClientClosedError: the pool is closed.
            psycopg.OperationalError: none could be opened, or all stayed in use.

        """
        _check_open(is_closed=self._is_closed)
        idle, permits = self._idle, self._permits
        until = monotonic() + self._patience
        try:
            permits.get(timeout=self._patience)
        except Empty:
            raise _all_in_use(self._patience) from None
        try:
            while (connection := _take(idle)) is None:
                try:
                    connection = PooledConnection.connect(**self._options(), autocommit=True)
                    self._configure(connection)
                except psycopg.OperationalError as error:
                    if isinstance(error, SourceError) or monotonic() + _PAUSE > until:
                        raise
                    sleep(_PAUSE)
                    _check_open(is_closed=self._is_closed)
                else:
                    connection.isolation_level = IsolationLevel.READ_COMMITTED
                    connection.siblings, connection.opened_at = idle, monotonic()
                    break
        except BaseException:
            permits.put(None)
            raise
        return connection

    def release(self, connection: PooledConnection) -> None:
        """Return a connection; one that was taken before a fork belongs to the parent."""
        idle = connection.siblings
        if idle is not self._idle:
            return
        _keep(idle, connection)
        self._permits.put(None)
        if self._is_closed:
            _close(idle)

    def close(self) -> None:
        """Close the idle connections, and the others when they are returned. Idempotent."""
        self._is_closed = True
        _close(self._idle)


class AsyncPool:
    """An async client's own connections, by default at most 10 for each event loop; see Pool."""

    def __init__(
        self,
        options: Callable[[], Awaitable[dict[str, Any]]],
        configure: Callable[[AsyncPooledConnection], Awaitable[None]],
        *,
        patience: float,
        size: int = _SIZE,
    ) -> None:
        self._options = options
        self._configure = configure
        self._patience = patience
        self._size = size
        self._is_closed = False
        self.in_child()
        fork.watch(self)

    def in_child(self) -> None:
        """Start empty; see Pool.in_child."""
        self._idle: deque[AsyncPooledConnection] = deque()
        self._permits: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            WeakKeyDictionary()
        )

    async def take(self) -> AsyncPooledConnection:
        """Take a connection in autocommit. Async variant of Pool.take."""
        _check_open(is_closed=self._is_closed)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise BgjobError(_NO_LOOP) from None
        if (permits := self._permits.get(loop)) is None:
            permits = self._permits[loop] = asyncio.Semaphore(self._size)
        idle = self._idle
        until = monotonic() + self._patience
        if permits.locked():
            try:
                async with asyncio.timeout(self._patience):
                    await permits.acquire()
            except TimeoutError:
                raise _all_in_use(self._patience, self._size) from None
        else:
            await permits.acquire()
        try:
            while (connection := _take(idle)) is None:
                try:
                    connection = await AsyncPooledConnection.connect(
                        **await self._options(), autocommit=True
                    )
                    await self._configure(connection)
                except psycopg.OperationalError as error:
                    if isinstance(error, SourceError) or monotonic() + _PAUSE > until:
                        raise
                    await asyncio.sleep(_PAUSE)
                    _check_open(is_closed=self._is_closed)
                else:
                    await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
                    connection.siblings, connection.opened_at = idle, monotonic()
                    break
        except BaseException:
            permits.release()
            raise
        connection.permits = permits
        return connection

    async def release(self, connection: AsyncPooledConnection) -> None:
        """Return a connection. Async variant of Pool.release."""
        idle = connection.siblings
        if idle is not self._idle:
            return
        permits = connection.permits
        _keep(idle, connection)
        permits.release()
        if self._is_closed:
            _close(idle)

    async def close(self) -> None:
        """Close the idle connections. Async variant of Pool.close."""
        self._is_closed = True
        _close(self._idle)


class BorrowedPool:
    """The user's pool, whose connections are checked before they are used."""

    def __init__(self, pool: ConnectionPool[Any]) -> None:
        self._pool = pool
        self._is_closed = False
        # A child has only the thread that forked.
        workers = getattr(pool, "_workers", ())
        self._is_inherited = bool(workers) and not any(each.is_alive() for each in workers)
        fork.watch(self)

    def in_child(self) -> None:
        """Refuse an open pool: its sockets and its threads are the parent's."""
        self._is_inherited = not self._pool.closed

    def take(self) -> psycopg.Connection[Any]:
        """Take a connection, as the pool returns it."""
        _check_open(is_closed=self._is_closed)
        _check_not_inherited(is_inherited=self._is_inherited)
        connection: psycopg.Connection[Any]
        while has_news(connection := self._pool.getconn()):
            try:
                ConnectionPool.check_connection(connection)
            except psycopg.Error:
                connection.close()
                self._pool.putconn(connection)  # the pool opens another one
            else:
                break  # a notification was waiting
        return connection

    def release(self, connection: psycopg.Connection[Any]) -> None:
        """Return a connection."""
        self._pool.putconn(connection)

    def close(self) -> None:
        """Stop borrowing; the pool stays open."""
        self._is_closed = True


class AsyncBorrowedPool:
    """The user's async pool. Async variant of BorrowedPool."""

    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        self._pool = pool
        self._is_closed = self._is_inherited = False
        fork.watch(self)

    def in_child(self) -> None:
        """Refuse an open pool; see BorrowedPool.in_child."""
        self._is_inherited = not self._pool.closed

    async def take(self) -> psycopg.AsyncConnection[Any]:
        """Take a connection, as the pool returns it."""
        _check_open(is_closed=self._is_closed)
        _check_not_inherited(is_inherited=self._is_inherited)
        check_event_loop()  # the pool itself would try again and again
        connection: psycopg.AsyncConnection[Any]
        while has_news(connection := await self._pool.getconn()):
            try:
                await AsyncConnectionPool.check_connection(connection)
            except psycopg.Error:
                await connection.close()
                await self._pool.putconn(connection)
            except BaseException:
                await self._pool.putconn(connection)
                raise
            else:
                break
        return connection

    async def release(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Return a connection."""
        await self._pool.putconn(connection)

    async def close(self) -> None:
        """Stop borrowing; the pool stays open."""
        self._is_closed = True


def _check_open(*, is_closed: bool) -> None:
    if is_closed:
        raise ClientClosedError("this client is closed: make a new one")


def _all_in_use(patience: float, size: int = _SIZE) -> psycopg.OperationalError:
    return psycopg.OperationalError(
        f"all {size} connections of this client were in use for {patience:g} s: use fewer at a "
        "time, or give the client a psycopg_pool of the size that you need"
    )


def _check_not_inherited(*, is_inherited: bool) -> None:
    if is_inherited:
        raise BgjobError(
            "the pool of this client was opened before the fork, and its sockets are the "
            "parent's: make a pool and a client in the child, or open the pool there, or give "
            "the client a connection string"
        )
