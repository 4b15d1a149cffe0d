"""Writes jobs; claims and runs a single one."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from itertools import islice
from secrets import randbits
from typing import Any, Literal, Self, TypeVar

from psycopg import AsyncConnection, AsyncCursor, BaseConnection, Connection, Cursor
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from bgjob import _statements
from bgjob._duration import Duration, seconds
from bgjob._exchange import Exchange, Outcome
from bgjob._statements import Claimed, Statement, Suspect
from bgjob.dlq import AsyncDlq, Dlq
from bgjob.errors import (
    EmptyQueueError,
    JobAlreadyExistsError,
    LeaseLostError,
    RequestsRequiredError,
)
from bgjob.job import EnqueueRequest, Job
from bgjob.mux import Mux
from bgjob.result import MoveToDlq, Result

T = TypeVar("T")

Recipe = tuple[str, Mapping[str, Any]]
"""How to connect: a connection string, and keyword arguments."""

OnConflict = Literal["raise", "skip"]

_CHUNK = 10_000
"""Requests in one statement, so that a million in one call take bounded memory."""

_POOL_SIZE = 10
_DO_LEASE = 300.0


class Client:
    """Writes jobs to PostgreSQL, and reads the dead-letter table. Thread-safe.

    Args:
        source: a connection string, or a psycopg_pool.ConnectionPool of yours. From
            a string the client makes a pool at its first use, of at most 10
            connections, and closes it with `close()`; a fork gets a new one.
            Your own pool is only borrowed.
        notify: whether enqueues wake workers that sleep; True by default. Switch
            it off where nobody listens: behind a pooler in transaction mode the
            workers poll.

    A context manager; leaving it closes it.
    """

    def __init__(self, source: str | ConnectionPool[Any], *, notify: bool = True) -> None:
        self._source = source
        self._notify = notify
        self._own: ConnectionPool[Connection[Any]] | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self.dlq = Dlq(self._run)
        """The dead-letter table."""

    def enqueue(self, request: EnqueueRequest, *, conn: Connection[Any] | None = None) -> str:
        """Write a job; give its id.

        Args:
            request: the job.
            conn: a connection of the caller's: the job is written in its
                transaction and exists if that commits.

        Raises:
            JobAlreadyExistsError: a live job has the id. Nothing was written,
                and the caller's transaction goes on.
            psycopg.Error: the database's. After a lost connection it is not
                known whether the job was written: a request with an id can
                safely be enqueued again.

        """
        if not self._run(_statements.enqueue(request, notify=self._notify), conn):
            raise JobAlreadyExistsError([request.id])
        return request.id

    def bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        *,
        on_conflict: OnConflict = "raise",
        conn: Connection[Any] | None = None,
    ) -> list[str | None]:
        """Write jobs, all or none; give their ids, in order.

        Args:
            requests: the jobs; any number of them, consumed in chunks.
            on_conflict: "raise" (the default) writes nothing if any id is taken;
                "skip" passes over the taken ones and gives None in their places.
            conn: a connection of the caller's: the jobs are written in its
                transaction and exist if that commits.

        Raises:
            RequestsRequiredError: there is no request.
            JobAlreadyExistsError: an id is taken, or stands twice in the
                requests. Nothing was written, and the caller's transaction goes on.
            psycopg.Error: the database's.

        """
        chunks = _chunks(requests)
        ids: list[str | None] = []
        if conn is not None and _may_begin(conn):
            conn.execute(_BEGIN)
        with self._connection(conn) as connection, connection.transaction():
            for chunk in chunks:
                statement = _statements.enqueue_many(chunk, notify=self._notify)
                ids += _placed(chunk, _execute(connection, statement), on_conflict)
        return ids

    def do(self, queue: str, mux: Mux, *, lease: Duration = _DO_LEASE) -> Result:
        """Claim one due job, run its handler here and now, and store the result.

        Args:
            queue: the queue to claim from.
            mux: the handlers; a coroutine handler is run with asyncio.run.
            lease: seconds or a timedelta for which nobody else may have the
                job; it is not extended. 300 s by default.

        Returns:
            The result that was stored: Retry, say, where the handler raised.

        Raises:
            EmptyQueueError: no job is due.
            LeaseLostError: the handler outlived the lease; its result was dropped.
            RuntimeError: there are coroutine handlers, and a loop runs in this thread.
            KeyboardInterrupt, SystemExit: the handler's, after the attempt was
                stored as failed.
            psycopg.Error: the database's; the job is due again when its lease ends.

        """
        if mux.has_coroutines and _runs_a_loop():
            raise RuntimeError("do() cannot run coroutine handlers inside a loop: use AsyncClient")
        token = randbits(63)
        lease = seconds(lease, "lease")
        claim = _statements.claim_any(queue, lease=lease, token=token)
        job, deaths = _only(self._run(claim, None), queue)
        route = mux.route(job, deaths)
        if isinstance(route, MoveToDlq):
            result: Result = route
        else:
            try:
                handler = route.handler
                returned = asyncio.run(handler(job)) if route.is_coroutine else handler(job)
                result = route.judge(job, returned)
            except Exception as error:
                result = route.failed(job, error)
            except BaseException as error:
                self._run(_settlement(job, token, route.failed(job, error)), None)
                raise
        settlement = _settlement(job, token, result)
        if job.id not in self._run(settlement, None):
            raise _lost(job, lease)
        return result

    def close(self) -> None:
        """Close the client's own pool; a pool that was passed in stays open. Idempotent."""
        with self._lock:
            pool, self._own = self._own, None
        if pool is not None and self._pid == os.getpid():
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x}>"  # never the connection string

    @property
    def recipe(self) -> Recipe:
        """How a worker opens a connection of its own."""
        return _recipe(self._source)

    def _pool(self) -> ConnectionPool[Any]:
        if not isinstance(self._source, str):
            return self._source
        with self._lock:
            if self._own is None or self._pid != os.getpid():
                # The parent's pool is left alone: its sockets are the parent's.
                self._pid = os.getpid()
                self._own = ConnectionPool(
                    self._source,
                    kwargs={"autocommit": True},
                    min_size=0,
                    max_size=_POOL_SIZE,
                    open=False,
                    name="bgjob",
                )
                self._own.open()
            return self._own

    @contextmanager
    def _connection(self, conn: Connection[Any] | None) -> Iterator[Connection[Any]]:
        if conn is not None:
            yield conn
            return
        with self._pool().connection() as pooled:
            if pooled.autocommit:
                yield pooled
                return
            # One statement is a transaction by itself, and one round trip.
            pooled.autocommit = True
            try:
                yield pooled
            finally:
                if not pooled.closed:
                    pooled.autocommit = False

    def _run(self, statement: Statement[T], conn: Connection[Any] | None) -> T:
        with self._connection(conn) as connection:
            return _execute(connection, statement)


def _execute(connection: Connection[Any], statement: Statement[T]) -> T:
    # A plain cursor, whatever factories the caller's connection has.
    with Cursor(connection, row_factory=tuple_row) as cursor:
        cursor.execute(statement.text, statement.params, binary=statement.binary)
        return statement.parse(cursor.fetchall())


class AsyncClient:
    """Writes jobs to PostgreSQL, and reads the dead-letter table; as Client, awaited.

    For use from the tasks of one event loop.

    Args:
        source: a connection string, or a psycopg_pool.AsyncConnectionPool of
            yours; as for Client.
        notify: as for Client.

    An async context manager; leaving it closes it.
    """

    def __init__(self, source: str | AsyncConnectionPool[Any], *, notify: bool = True) -> None:
        self._source = source
        self._notify = notify
        self._own: AsyncConnectionPool[AsyncConnection[Any]] | None = None
        self._pid = os.getpid()
        self.dlq = AsyncDlq(self._run)
        """The dead-letter table."""

    async def enqueue(
        self, request: EnqueueRequest, *, conn: AsyncConnection[Any] | None = None
    ) -> str:
        """Write a job; give its id. As Client.enqueue."""
        if not await self._run(_statements.enqueue(request, notify=self._notify), conn):
            raise JobAlreadyExistsError([request.id])
        return request.id

    async def bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        *,
        on_conflict: OnConflict = "raise",
        conn: AsyncConnection[Any] | None = None,
    ) -> list[str | None]:
        """Write jobs, all or none; give their ids, in order. As Client.bulk_enqueue."""
        chunks = _chunks(requests)
        ids: list[str | None] = []
        if conn is not None and _may_begin(conn):
            await conn.execute(_BEGIN)
        async with self._connection(conn) as connection, connection.transaction():
            for chunk in chunks:
                statement = _statements.enqueue_many(chunk, notify=self._notify)
                ids += _placed(chunk, await _execute_async(connection, statement), on_conflict)
        return ids

    async def do(self, queue: str, mux: Mux, *, lease: Duration = _DO_LEASE) -> Result:
        """Claim one due job, run its handler, and store the result. As Client.do.

        A coroutine handler is awaited here, a plain one runs on a thread.
        """
        token = randbits(63)
        lease = seconds(lease, "lease")
        claim = _statements.claim_any(queue, lease=lease, token=token)
        job, deaths = _only(await self._run(claim, None), queue)
        route = mux.route(job, deaths)
        if isinstance(route, MoveToDlq):
            result: Result = route
        else:
            try:
                handler = route.handler
                running = handler(job) if route.is_coroutine else asyncio.to_thread(handler, job)
                result = route.judge(job, await running)
            except Exception as error:
                result = route.failed(job, error)
            except BaseException as error:
                settlement = _settlement(job, token, route.failed(job, error))
                await asyncio.shield(self._run(settlement, None))
                raise
        settlement = _settlement(job, token, result)
        if job.id not in await self._run(settlement, None):
            raise _lost(job, lease)
        return result

    async def close(self) -> None:
        """Close the client's own pool; a pool that was passed in stays open. Idempotent."""
        pool, self._own = self._own, None
        if pool is not None and self._pid == os.getpid():
            await pool.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x}>"  # never the connection string

    @property
    def recipe(self) -> Recipe:
        """How a worker opens a connection of its own."""
        return _recipe(self._source)

    async def _pool(self) -> AsyncConnectionPool[Any]:
        if not isinstance(self._source, str):
            return self._source
        if self._own is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._own = AsyncConnectionPool(
                self._source,
                kwargs={"autocommit": True},
                min_size=0,
                max_size=_POOL_SIZE,
                open=False,
                name="bgjob",
            )
            await self._own.open()
        return self._own

    @asynccontextmanager
    async def _connection(
        self, conn: AsyncConnection[Any] | None
    ) -> AsyncIterator[AsyncConnection[Any]]:
        if conn is not None:
            yield conn
            return
        async with (await self._pool()).connection() as pooled:
            if pooled.autocommit:
                yield pooled
                return
            await pooled.set_autocommit(True)
            try:
                yield pooled
            finally:
                if not pooled.closed:
                    await pooled.set_autocommit(False)

    async def _run(self, statement: Statement[T], conn: AsyncConnection[Any] | None) -> T:
        async with self._connection(conn) as connection:
            return await _execute_async(connection, statement)


async def _execute_async(connection: AsyncConnection[Any], statement: Statement[T]) -> T:
    async with AsyncCursor(connection, row_factory=tuple_row) as cursor:
        await cursor.execute(statement.text, statement.params, binary=statement.binary)
        return statement.parse(await cursor.fetchall())


# -- what both colours share --------------------------------------------------------


def _recipe(source: str | ConnectionPool[Any] | AsyncConnectionPool[Any]) -> Recipe:
    if isinstance(source, str):
        return source, {}
    if callable(source.conninfo) or callable(source.kwargs):
        raise TypeError(
            "a worker needs a connection of its own, and cannot make one from a pool whose "
            "conninfo or kwargs are callables; give the Client a connection string"
        )
    return source.conninfo, dict(source.kwargs or {})


_BEGIN = "select"
"""Any statement begins the transaction of a connection that is not in autocommit."""


def _may_begin(conn: BaseConnection[Any]) -> bool:
    # conn.transaction() commits what it began; the caller's transaction is the caller's
    # to commit, so it has to be there before.
    return not conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _chunks(requests: Iterable[EnqueueRequest]) -> Iterator[list[EnqueueRequest]]:
    pending = iter(requests)
    first = list(islice(pending, _CHUNK))
    if not first:
        raise RequestsRequiredError("requests are required: a bulk enqueue needs at least one")

    def rest() -> Iterator[list[EnqueueRequest]]:
        yield first
        while chunk := list(islice(pending, _CHUNK)):
            yield chunk

    return rest()


def _placed(
    chunk: list[EnqueueRequest], written: set[str], on_conflict: OnConflict
) -> list[str | None]:
    ids: list[str | None] = []
    taken = []
    for request in chunk:
        if request.id in written:
            written.discard(request.id)  # a second request with this id is none that was written
            ids.append(request.id)
        else:
            taken.append(request.id)
            ids.append(None)
    if taken and on_conflict == "raise":
        raise JobAlreadyExistsError(taken)
    return ids


def _only(claimed: list[Suspect], queue: str) -> Suspect:
    if not claimed:
        raise EmptyQueueError(f"no job of queue {queue!r} is due now")
    return claimed[0]


def _settlement(job: Job, token: int, result: Result) -> Statement[list[str]]:
    exchange = Exchange()
    exchange.settle(Outcome(Claimed(job, token), result, None))
    [(statement, _)] = exchange.statements(job.queue, 0.0)
    return statement


def _lost(job: Job, lease: float) -> LeaseLostError:
    return LeaseLostError(
        f"job {job.id!r} of type {job.type!r} outlived its lease of {lease:g} s and was claimed "
        "again; its result was dropped: give do() a longer lease"
    )
