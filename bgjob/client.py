"""Clients: enqueue jobs, pause queues, count jobs, run one job."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from contextvars import copy_context
from datetime import datetime
from functools import partial
from itertools import islice
from secrets import randbits
from time import monotonic, sleep
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import psycopg
from psycopg import BaseConnection, IsolationLevel
from psycopg.errors import (
    DeadlockDetected,
    IdleSessionTimeout,
    ProtocolViolation,
    ReadOnlySqlTransaction,
    SerializationFailure,
    UniqueViolation,
)
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from bgjob._checks import Duration, seconds
from bgjob._engine.outcome import Committed, CommitUnknown, Fenced, Release
from bgjob._handlers.route import Awaiting
from bgjob._logger import log
from bgjob._postgres.connection import (
    UNENCODABLE,
    AsyncCursor,
    ConnectionParameters,
    Cursor,
    check_conninfo,
    is_two_phase,
    options,
    unencodable,
)
from bgjob._postgres.fork import ForkGuard
from bgjob._postgres.pool import (
    PATIENCE,
    AsyncBorrowedPool,
    AsyncPool,
    AsyncPooledConnection,
    BorrowedPool,
    Pool,
    PooledConnection,
)
from bgjob._running.loop import Loop
from bgjob._running.transaction import (
    Ending,
    NotBegun,
    Transactions,
    acquisition,
    conclusion,
    has_key,
    routed,
    settlement,
    unblocking,
)
from bgjob._sql import claims, enqueues, keys, pauses, views
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
from bgjob._sql.session import session
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob.codec import TypedJob
from bgjob.dlq import AsyncDlq, Dlq
from bgjob.errors import (
    BgjobError,
    EmptyQueueError,
    EnqueueConflictError,
    JobAlreadyExistsError,
    LeaseLostError,
    RequestsRequiredError,
)
from bgjob.job import EnqueueOptions, EnqueueRequest, Job, check_name
from bgjob.mux import Mux, Route
from bgjob.result import MoveToDlq, Result, Retry
from bgjob.stats import QueueStats
from bgjob.timetable import AsyncTimetable, Timetable

T = TypeVar("T")

_LOOP_ENDS = 1.5
"""Seconds within which the tasks that coroutine handlers of do() left behind must end."""

OnConflict = Literal["raise", "skip"]

_CHUNK = 10_000
"""Requests in one statement, so that a million in one call need bounded memory."""

_FEW = 500
"""Requests below which COPY's round trips cost more than they save."""

_DO_LEASE = 300.0

_MOST_KEYS = 1_000_000
"""The most exclusive keys that do() checks when no job is due."""

_NOTHING_WRITTEN = (
    DeadlockDetected,
    SerializationFailure,
    IdleSessionTimeout,
    ReadOnlySqlTransaction,
)
"""Errors after which the client can repeat a statement or transaction of its own."""

_REPETITIONS = 3
"""The most repetitions: each deadlock costs the server's deadlock_timeout."""

_LOOK = 0.005
"""Seconds between two checks whether the claims that a pause found running have ended."""


class Client:
    """Enqueues jobs on PostgreSQL, and manages queues and dead jobs. Thread-safe.

    Args:
        source: a connection string, or a psycopg_pool.ConnectionPool. From a string
            the client opens up to 10 connections as it needs them, and closes them
            with `close()`; a forked child opens its own; a server that is silent or
            away for 30 s raises psycopg.OperationalError. Your own pool is only
            borrowed, with the timeouts that you gave it.
        notify: whether enqueues notify sleeping workers; True by default. Set it to
            False if no worker can listen: behind a pooler in transaction mode
            workers poll.

    Raises:
        ValueError: the string is not a connection string.

    A context manager; leaving it closes it.
    """

    def __init__(self, source: str | ConnectionPool[Any], *, notify: bool = True) -> None:
        self._source = check_conninfo(source) if isinstance(source, str) else source
        self._notify = notify
        self._pool: Pool | BorrowedPool = (
            Pool(partial(options, (source, {})), _configure, patience=PATIENCE)
            if isinstance(source, str)
            else BorrowedPool(source)
        )
        self._loop = Loop("bgjob-do")
        self.dlq = Dlq(self._run, notify=notify)
        """The dead-letter table."""
        self.schedules = Timetable(self._run, self.enqueue)
        """The database's schedules, which workers wrote."""

    @overload
    def enqueue(
        self, request: EnqueueRequest, *, conn: psycopg.Connection[Any] | None = None
    ) -> str: ...

    @overload
    def enqueue(
        self,
        request: TypedJob,
        *,
        conn: psycopg.Connection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str: ...

    def enqueue(
        self,
        request: EnqueueRequest | TypedJob,
        *,
        conn: psycopg.Connection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str:
        """Write a job and return its id.

        Args:
            request: the job: an EnqueueRequest, or a typed job (for example a value of a
                dataclass) whose class names the type and may name the queue, as for
                EnqueueRequest.of.
            conn: a connection of the caller's: the job is written in its
                transaction and exists if that commits. In a transaction begun with
                `tpc_begin` no worker is notified: workers find the job when they poll.
            options: queue, id, delay, run_at, priority and exclusive of a typed job;
                they take precedence over the class.

        Raises:
            QueueRequiredError, PayloadError, TypeError, ValueError: as
                EnqueueRequest.of; a TypeError also for options together with a request.
            JobAlreadyExistsError: a live job has the id. Nothing was written,
                and the caller's transaction goes on.
            EnqueueConflictError: the caller's transaction is repeatable read or
                serializable and cannot see the job that has the id: repeat the
                transaction. Also a psycopg.errors.SerializationFailure.
            ValueError: a name that the database's encoding cannot hold.
            psycopg.Error: the database's. After a lost connection the job may or may
                not have been written. Enqueuing a request with an id again is refused
                while the first job is in the queue; if that has already completed, the
                job is written, and runs, again.

        """
        request = _request(request, options)
        statement = enqueues.enqueue(request, notify=self._notify and not is_two_phase(conn))
        try:
            is_written = self._run(statement, conn, keep=True)
        except SerializationFailure as error:
            if conn is None:
                raise
            raise EnqueueConflictError([request.id]) from error
        if not is_written:
            raise JobAlreadyExistsError([request.id])
        return request.id

    def bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        *,
        on_conflict: OnConflict = "raise",
        conn: psycopg.Connection[Any] | None = None,
    ) -> list[str | None]:
        """Write jobs, all or none, and return their ids in order.

        Args:
            requests: the jobs; any number of them, consumed in chunks of 10,000. Make
                those of typed jobs with EnqueueRequest.of.
            on_conflict: "raise" (the default) writes nothing if any id is taken;
                "skip" leaves out jobs whose id is taken, and returns None in their
                places.
            conn: a connection of the caller's: the jobs are written in its
                transaction and exist if that commits.

        Raises:
            RequestsRequiredError: there are no requests.
            JobAlreadyExistsError: an id is taken, or occurs twice in the
                requests. Nothing was written, and the caller's transaction goes on.
            EnqueueConflictError, ValueError: as for enqueue.
            psycopg.Error: the database's. Two calls of over 10,000 requests that
                share ids may deadlock: the client repeats the call if `requests` is a
                list or a tuple and `conn` is not given.

        """
        if conn is None and isinstance(requests, list | tuple):
            for _ in range(_REPETITIONS):
                with suppress(*_NOTHING_WRITTEN):
                    return self._bulk_enqueue(requests, on_conflict, None)
        return self._bulk_enqueue(requests, on_conflict, conn)

    def _bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        on_conflict: OnConflict,
        conn: psycopg.Connection[Any] | None,
    ) -> list[str | None]:
        chunks = _chunks(requests)
        ids: list[str | None] = []
        if conn is not None and _may_begin(conn):
            conn.execute(_BEGIN)
        with (
            self._connection(conn) as connection,
            _levelled(connection, is_own=conn is None),
            connection.transaction(),
        ):
            for chunk in chunks:
                if on_conflict == "raise" and self._copied(connection, chunk):
                    ids += [request.id for request in chunk]
                    continue
                statement = enqueues.enqueue_many(
                    chunk, notify=self._notify and not is_two_phase(conn)
                )
                try:
                    written = _execute(connection, statement)
                except SerializationFailure as error:
                    if conn is None:
                        raise
                    raise EnqueueConflictError([request.id for request in chunk]) from error
                ids += _placed(chunk, written, on_conflict)
        return ids

    def _copied(self, connection: psycopg.Connection[Any], chunk: list[EnqueueRequest]) -> bool:
        """Write jobs by COPY; False if that is not possible, and nothing was written."""
        copy = _copy_of(connection, chunk)
        if copy is None:
            return False
        _execute(connection, enqueues.begin_copy())
        try:
            with (
                connection.transaction(),
                Cursor(connection) as cursor,
                cursor.copy(copy.text) as stream,
            ):
                stream.set_types(copy.types)
                for row in copy.rows:
                    stream.write_row(row)
        except (UniqueViolation, ProtocolViolation):
            return (
                False  # which ids are taken is for an insert to tell; or a column has another type
            )
        except UNENCODABLE as error:
            names = [name for r in chunk for name in (r.id, r.queue, r.type)]
            raise unencodable(connection, names, error) from error
        if self._notify and not is_two_phase(connection):
            _execute(connection, enqueues.tell_many(chunk))
        return True

    def do(self, queue: str, mux: Mux, *, lease: Duration = _DO_LEASE) -> Result:
        """Claim one due job, run its handler, and store the result.

        Args:
            queue: the queue to claim from.
            mux: the handlers. Coroutine handlers run on an event loop that the client
                keeps on a thread of its own until it is closed, and only they are
                cancelled at their timeouts; a plain handler runs on the calling thread.
            lease: seconds or a timedelta for which no worker can claim the job again;
                it is not extended. 300 s by default.

        Returns:
            The stored result; for example a Retry if the handler raised.

        Raises:
            EmptyQueueError: no job is due, or the queue is paused.
            LeaseLostError: the handler outlived the lease; its result was dropped.
            StateRequiredError: a handler has a parameter `state`: pass `mux.bound(state)`.
            RuntimeError: the mux has coroutine handlers, and a loop runs in this thread.
            KeyboardInterrupt, SystemExit: the handler's, after the attempt was
                stored as failed.
            psycopg.Error: the database's. The job is due again when its lease ends; or
                immediately, without counting the attempt, if a transactional handler
                got no connection.

        """
        mux.check_bound()
        if mux.has_coroutines and _runs_a_loop():
            raise RuntimeError("do() cannot run coroutine handlers inside a loop: use AsyncClient")
        lease = seconds(lease, "lease")
        token = randbits(63)
        claim = claims.claim_any(queue, lease=lease, token=token)
        while True:
            jobs = self._run(claim, None) or self._unblocked(queue, claim)
            claimed, route = copy_context().run(routed, _only(jobs, queue, token), mux)
            if claimed.job.exclusive is None or (
                granted := has_key(self._run_all(acquisition(claimed)))
            ):
                break  # otherwise the job waits for its key: claim another
            if granted is None:
                self._run_all(settlement(claimed, Release()))
        job = claimed.job
        ends_at = monotonic() + lease
        ran: Ending | Awaiting
        interrupt: BaseException | None = None
        if not isinstance(route, Route):
            ran = route
        elif route.is_coroutine:
            ran = Awaiting(route)
        elif route.is_transactional:
            with closing(Transactions(self.connection_parameters, ForkGuard())) as transactions:
                ran = copy_context().run(transactions.run, route, claimed)
        else:
            ran = copy_context().run(route.run, job)
        if isinstance(ran, Awaiting):
            ending, interrupt = self._await(
                _run_async(ran.route, claimed, self.connection_parameters)
            )
        else:
            ending = ran
        settled = any(self._run_all(conclusion(claimed, ending))[:1])
        if interrupt is not None:
            raise interrupt
        return _result(claimed, ending, settled=settled, lease=lease, alive=monotonic() < ends_at)

    def stats(
        self, queue: str | None = None, *, conn: psycopg.Connection[Any] | None = None
    ) -> list[QueueStats]:
        """Count the jobs of each queue and type at one moment; sorted by both.

        One query that reads both tables once, however large they are: call it every few
        seconds, not for every request.

        Args:
            queue: only this queue; by default all queues that have jobs, live or dead.
            conn: a connection of the caller's.

        """
        return self._run(views.stats(queue), conn)

    def pause(
        self,
        queue: str,
        until: datetime | None = None,
        *,
        conn: psycopg.Connection[Any] | None = None,
    ) -> None:
        """Pause a queue: no worker claims from it; running jobs go on.

        Once this has returned, no worker on any host and no `do` claims from the queue.
        Jobs can still be enqueued. A worker may hold quick jobs that it claimed before and
        has not started yet: they run. Each worker's observer is told once that the queue
        is empty. Pausing a paused queue replaces its pause.

        Args:
            queue: the queue.
            until: an aware datetime at which the pause ends, by the database's
                clock; workers notice within their poll interval. None (the
                default) pauses until `resume`.
            conn: a connection of the caller's: the queue is paused when its
                transaction commits, and a claim that runs at that moment may still
                take jobs.

        Raises:
            ValueError: a naive `until`, or an invalid queue name.
            BgjobError: the queue is paused, but a transaction that may have claimed from
                it before did not end within 30 s.
            psycopg.Error: the database's.

        """
        self._run(_pause(queue, until), conn)
        if conn is None:
            deadline = monotonic() + PATIENCE
            claiming = self._run(pauses.claiming_transactions(), None)
            while claiming:
                _check_patience(queue, deadline)
                sleep(_LOOK)
                claiming &= self._run(pauses.claiming_transactions(), None)

    def resume(self, queue: str, *, conn: psycopg.Connection[Any] | None = None) -> bool:
        """End the pause of a queue and notify its workers; True if it was paused.

        Args:
            queue: the queue.
            conn: a connection of the caller's: the pause ends when its transaction
                commits.

        """
        return self._run(pauses.resume(queue, notify=not is_two_phase(conn)), conn)

    def paused(self, *, conn: psycopg.Connection[Any] | None = None) -> dict[str, datetime | None]:
        """Return the paused queues, each with the end of its pause; None for no end."""
        return self._run(pauses.paused(), conn)

    def close(self) -> None:
        """Close the client's own connections; a borrowed pool stays open. Idempotent.

        Tasks that coroutine handlers of `do` left behind are cancelled. A closed client stays
        closed: every later call raises ClientClosedError.
        """
        self._loop.close(_LOOP_ENDS)
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x}>"  # never the connection string

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> tuple[T, BaseException | None]:
        """Run a coroutine on the client's loop; see Loop.run."""
        if not self._loop.is_open:
            # A client need not be closed, but the tasks on its loop must be cancelled.
            weakref.finalize(self, self._loop.close, _LOOP_ENDS)
        return self._loop.run(coroutine)

    @property
    def connection_parameters(self) -> ConnectionParameters:
        """How a worker opens a connection of its own."""
        return _connection_parameters(self._source)

    @contextmanager
    def _connection(
        self, conn: psycopg.Connection[Any] | None
    ) -> Iterator[psycopg.Connection[Any]]:
        if conn is not None:
            yield conn
            return
        # pool.connection() would commit, with nothing to commit. In autocommit one
        # statement is a transaction and one round trip.
        pool: Any = self._pool
        pooled = pool.take()
        try:
            if pooled.autocommit:
                yield pooled
                return
            pooled.autocommit = True
            try:
                yield pooled
            finally:
                if pooled.info.transaction_status == TransactionStatus.IDLE:
                    pooled.autocommit = False
        except ReadOnlySqlTransaction:
            pooled.close()  # its server is not a primary any more: the next one may be
            raise
        finally:
            pool.release(pooled)

    def _run(
        self, statement: Statement[T], conn: psycopg.Connection[Any] | None, *, keep: bool = False
    ) -> T:
        if conn is not None:
            return _execute(conn, statement)
        repetitions = 0
        while True:
            try:
                with self._connection(None) as connection:
                    return _execute(connection, statement, keep=keep)
            except _NOTHING_WRITTEN:
                if (repetitions := repetitions + 1) > _REPETITIONS:
                    raise

    def _unblocked(self, queue: str, claim: Statement[list[Job]]) -> list[Job]:
        """Release jobs that wait for a free key, and claim again; workers do so as they poll."""
        look = keys.blocked(queue, after="", limit=_MOST_KEYS)
        if not (blocked := self._run(look, None).keys):
            return []
        self._run_all(unblocking(queue, blocked))
        return self._run(claim, None)

    def _run_all(self, statements: Sequence[Statement[Any]]) -> list[Any]:
        if len(statements) < 2:  # noqa: PLR2004
            return [self._run(statement, None) for statement in statements]
        with self._connection(None) as connection:
            # In one go: a process that is stopped meanwhile must not keep a key locked.
            with connection.pipeline(), connection.transaction():
                # Each statement is to see what others did before the lock was had.
                connection.execute("set transaction isolation level read committed")
                cursors = send_all(connection, statements)
            return read_all(cursors, statements)


def _configure(connection: psycopg.Connection[Any]) -> None:
    cursor = send(Cursor(connection), session(connection.info.backend_pid))
    if not cursor.rowcount:  # a pooler may use another session for each transaction
        connection.prepare_threshold = None


@contextmanager
def _levelled(connection: psycopg.Connection[Any], *, is_own: bool) -> Iterator[None]:
    """Begin transactions as read committed, whatever a borrowed pool's level is."""
    level = connection.isolation_level
    if not is_own or level == IsolationLevel.READ_COMMITTED:
        yield
        return
    connection.isolation_level = IsolationLevel.READ_COMMITTED
    try:
        yield
    finally:
        if connection.info.transaction_status == TransactionStatus.IDLE:
            connection.isolation_level = level


def _execute(
    connection: psycopg.Connection[Any], statement: Statement[T], *, keep: bool = False
) -> T:
    # A plain cursor, whatever factories the caller's connection has. A kept cursor
    # keeps its rows too, so only an enqueue uses one: it returns almost none.
    if keep and isinstance(connection, PooledConnection):
        cursor = connection.enqueuing
    else:
        cursor = Cursor(connection)
    try:
        send(cursor, statement)
    except UNENCODABLE as error:
        raise unencodable(connection, (statement.params or {}).values(), error) from error
    return read(cursor, statement)


class AsyncClient:
    """Enqueues jobs on PostgreSQL, and manages queues. Async variant of Client.

    For use from the tasks of one event loop; with a connection string, of several loops.

    Args:
        source: a connection string, or a psycopg_pool.AsyncConnectionPool; as for
            Client.
        notify: as for Client.

    An async context manager; leaving it closes it.
    """

    def __init__(self, source: str | AsyncConnectionPool[Any], *, notify: bool = True) -> None:
        self._source = check_conninfo(source) if isinstance(source, str) else source
        self._notify = notify
        self._pool: AsyncPool | AsyncBorrowedPool = (
            AsyncPool(partial(options, (source, {})), _configure_async, patience=PATIENCE)
            if isinstance(source, str)
            else AsyncBorrowedPool(source)
        )
        self._begun: set[asyncio.Task[Any]] = set()
        """The running tasks: the event loop itself keeps only weak references."""
        self._left: set[asyncio.Task[Any]] = set()
        """The running tasks whose caller was cancelled."""
        self.dlq = AsyncDlq(self._run, notify=notify)
        """The dead-letter table."""
        self.schedules = AsyncTimetable(self._run, self.enqueue)
        """The database's schedules, which workers wrote."""

    @overload
    async def enqueue(
        self, request: EnqueueRequest, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> str: ...

    @overload
    async def enqueue(
        self,
        request: TypedJob,
        *,
        conn: psycopg.AsyncConnection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str: ...

    async def enqueue(
        self,
        request: EnqueueRequest | TypedJob,
        *,
        conn: psycopg.AsyncConnection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str:
        """Write a job and return its id. Async variant of Client.enqueue."""
        request = _request(request, options)
        statement = enqueues.enqueue(request, notify=self._notify and not is_two_phase(conn))
        try:
            is_written = await self._run(statement, conn, keep=True)
        except SerializationFailure as error:
            if conn is None:
                raise
            raise EnqueueConflictError([request.id]) from error
        if not is_written:
            raise JobAlreadyExistsError([request.id])
        return request.id

    async def bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        *,
        on_conflict: OnConflict = "raise",
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> list[str | None]:
        """Write jobs, all or none. Async variant of Client.bulk_enqueue."""
        if conn is None and isinstance(requests, list | tuple):
            for _ in range(_REPETITIONS):
                with suppress(*_NOTHING_WRITTEN):
                    return await self._bulk_enqueue(requests, on_conflict, None)
        return await self._bulk_enqueue(requests, on_conflict, conn)

    async def _bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        on_conflict: OnConflict,
        conn: psycopg.AsyncConnection[Any] | None,
    ) -> list[str | None]:
        chunks = _chunks(requests)
        ids: list[str | None] = []
        if conn is not None and _may_begin(conn):
            await conn.execute(_BEGIN)
        async with (
            self._connection(conn) as connection,
            _levelled_async(connection, is_own=conn is None),
            connection.transaction(),
        ):
            for chunk in chunks:
                if on_conflict == "raise" and await self._copied(connection, chunk):
                    ids += [request.id for request in chunk]
                    continue
                statement = enqueues.enqueue_many(
                    chunk, notify=self._notify and not is_two_phase(conn)
                )
                try:
                    written = await _execute_async(connection, statement)
                except SerializationFailure as error:
                    if conn is None:
                        raise
                    raise EnqueueConflictError([request.id for request in chunk]) from error
                ids += _placed(chunk, written, on_conflict)
        return ids

    async def _copied(
        self, connection: psycopg.AsyncConnection[Any], chunk: list[EnqueueRequest]
    ) -> bool:
        copy = _copy_of(connection, chunk)
        if copy is None:
            return False
        await _execute_async(connection, enqueues.begin_copy())
        try:
            async with (
                connection.transaction(),
                AsyncCursor(connection) as cursor,
                cursor.copy(copy.text) as stream,
            ):
                stream.set_types(copy.types)
                for row in copy.rows:
                    await stream.write_row(row)
        except (UniqueViolation, ProtocolViolation):
            return False
        except UNENCODABLE as error:
            names = [name for r in chunk for name in (r.id, r.queue, r.type)]
            raise unencodable(connection, names, error) from error
        if self._notify and not is_two_phase(connection):
            await _execute_async(connection, enqueues.tell_many(chunk))
        return True

    async def do(self, queue: str, mux: Mux, *, lease: Duration = _DO_LEASE) -> Result:
        """Claim one due job, run its handler, and store the result.

        Async variant of Client.do. A coroutine handler is awaited here; a plain one runs on
        a thread, without its timeout. If the call is cancelled, it cancels a coroutine
        handler, and the attempt has failed. A plain handler cannot be cancelled: it goes on,
        and its result is stored when it ends; `close` waits for that.
        """
        mux.check_bound()
        claiming = self._begin(self._claimed(queue, mux, seconds(lease, "lease")))
        try:
            claimed, route, ends_at = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            self._leave(self._begin(self._give_back(claiming)))
            raise
        if isinstance(route, Route) and route.is_coroutine:
            # A task, so that the handler cannot change the caller's context variables.
            handling = asyncio.create_task(_run_async(route, claimed, self.connection_parameters))
            try:
                result: Ending | Release = await handling
            except asyncio.CancelledError:
                result = Release()  # the handler had not started
            concluding = self._begin(self._concluded(claimed, result))
        else:
            concluding = self._begin(self._run_plain(claimed, route))
        try:
            ending, settled = await asyncio.shield(concluding)
        except asyncio.CancelledError:
            self._leave(concluding)
            raise
        if isinstance(ending, Release):
            raise asyncio.CancelledError
        return _result(
            claimed,
            ending,
            settled=settled,
            lease=seconds(lease, "lease"),
            alive=monotonic() < ends_at,
        )

    async def _claimed(
        self, queue: str, mux: Mux, lease: float
    ) -> tuple[Claimed, Route | Retry | MoveToDlq, float]:
        """Claim a job and its key; return it, its route, and the local time its lease ends."""
        token = randbits(63)
        claim = claims.claim_any(queue, lease=lease, token=token)
        while True:
            jobs = await self._run(claim, None) or await self._unblocked(queue, claim)
            claimed, route = copy_context().run(routed, _only(jobs, queue, token), mux)
            if claimed.job.exclusive is None or (
                granted := has_key(await self._run_all(acquisition(claimed)))
            ):
                return claimed, route, monotonic() + lease
            # Otherwise the job waits for its key: claim another.
            if granted is None:
                await self._run_all(settlement(claimed, Release()))

    async def _run_plain(
        self, claimed: Claimed, route: Route | Retry | MoveToDlq
    ) -> tuple[Ending | Release, bool]:
        """Run a plain handler on a thread, and store its result; see _concluded."""
        if not isinstance(route, Route):
            return await self._concluded(claimed, route)
        loop, context = asyncio.get_running_loop(), copy_context()
        if not route.is_transactional:
            ran = await _uncancelled(loop, lambda: context.run(route.run, claimed.job))
            if not isinstance(ran, Awaiting):
                return await self._concluded(claimed, ran)
            awaited = await _run_async(ran.route, claimed, self.connection_parameters)
            return await self._concluded(claimed, awaited)
        with closing(Transactions(self.connection_parameters, ForkGuard())) as transactions:
            ending = await _uncancelled(loop, lambda: context.run(transactions.run, route, claimed))
        return await self._concluded(claimed, ending)

    async def _concluded(
        self, claimed: Claimed, ending: Ending | Release
    ) -> tuple[Ending | Release, bool]:
        """Store how a job ended; return that, and whether the claim was still held."""
        statements = conclusion(claimed, ending)
        try:
            answers = await self._run_all(statements)
        except asyncio.CancelledError:  # the loop ends; storing it twice does no harm
            answers = await self._run_all(statements)
        return ending, any(answers[:1])

    async def _give_back(
        self, claiming: "asyncio.Task[tuple[Claimed, Route | Retry | MoveToDlq, float]]"
    ) -> None:
        """Release the job that was claimed for a cancelled call."""
        with suppress(EmptyQueueError):
            claimed, *_ = await claiming
            await self._concluded(claimed, Release())

    def _begin(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Start a task that goes on when the caller is cancelled."""
        task = asyncio.create_task(work)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return task

    def _leave(self, task: "asyncio.Task[Any]") -> None:
        """Keep a task running for a caller that was cancelled."""
        self._left.add(task)
        task.add_done_callback(self._has_ended)

    def _has_ended(self, task: "asyncio.Task[Any]") -> None:
        self._left.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("could not store the result of a cancelled do(): %s", error)

    async def stats(
        self, queue: str | None = None, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> list[QueueStats]:
        """Count the jobs of each queue and type. Async variant of Client.stats."""
        return await self._run(views.stats(queue), conn)

    async def pause(
        self,
        queue: str,
        until: datetime | None = None,
        *,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> None:
        """Pause a queue: no worker claims from it. Async variant of Client.pause."""
        await self._run(_pause(queue, until), conn)
        if conn is None:
            deadline = monotonic() + PATIENCE
            claiming = await self._run(pauses.claiming_transactions(), None)
            while claiming:
                _check_patience(queue, deadline)
                await asyncio.sleep(_LOOK)
                claiming &= await self._run(pauses.claiming_transactions(), None)

    async def resume(self, queue: str, *, conn: psycopg.AsyncConnection[Any] | None = None) -> bool:
        """End the pause of a queue. Async variant of Client.resume."""
        return await self._run(pauses.resume(queue, notify=not is_two_phase(conn)), conn)

    async def paused(
        self, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> dict[str, datetime | None]:
        """Return the paused queues with their ends. Async variant of Client.paused."""
        return await self._run(pauses.paused(), conn)

    async def close(self) -> None:
        """Close the client's own connections. Async variant of Client.close.

        It waits for the plain handlers of cancelled calls of `do`.
        """
        while self._left:
            await asyncio.wait(self._left)
        await self._pool.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x}>"  # never the connection string

    @property
    def connection_parameters(self) -> ConnectionParameters:
        """How a worker opens a connection of its own."""
        return _connection_parameters(self._source)

    @asynccontextmanager
    async def _connection(
        self, conn: psycopg.AsyncConnection[Any] | None
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        if conn is not None:
            yield conn
            return
        pool: Any = self._pool
        pooled = await pool.take()
        try:
            if pooled.autocommit:
                yield pooled
                return
            await pooled.set_autocommit(True)
            try:
                yield pooled
            finally:
                if pooled.info.transaction_status == TransactionStatus.IDLE:
                    await pooled.set_autocommit(False)
        except ReadOnlySqlTransaction:
            await pooled.close()  # its server is not a primary any more: the next one may be
            raise
        finally:
            await pool.release(pooled)

    async def _run(
        self,
        statement: Statement[T],
        conn: psycopg.AsyncConnection[Any] | None,
        *,
        keep: bool = False,
    ) -> T:
        if conn is not None:
            return await _execute_async(conn, statement)
        repetitions = 0
        while True:
            try:
                async with self._connection(None) as connection:
                    return await _execute_async(connection, statement, keep=keep)
            except _NOTHING_WRITTEN:
                if (repetitions := repetitions + 1) > _REPETITIONS:
                    raise

    async def _unblocked(self, queue: str, claim: Statement[list[Job]]) -> list[Job]:
        look = keys.blocked(queue, after="", limit=_MOST_KEYS)
        if not (blocked := (await self._run(look, None)).keys):
            return []
        await self._run_all(unblocking(queue, blocked))
        return await self._run(claim, None)

    async def _run_all(self, statements: Sequence[Statement[Any]]) -> list[Any]:
        if len(statements) < 2:  # noqa: PLR2004
            return [await self._run(statement, None) for statement in statements]
        async with self._connection(None) as connection:
            # In one go: a process that is stopped meanwhile must not keep a key locked.
            async with connection.pipeline(), connection.transaction():
                # Each statement is to see what others did before the lock was had.
                await connection.execute("set transaction isolation level read committed")
                cursors = await send_all_async(connection, statements)
            return await read_all_async(cursors, statements)


async def _configure_async(connection: psycopg.AsyncConnection[Any]) -> None:
    cursor = await send_async(AsyncCursor(connection), session(connection.info.backend_pid))
    if not cursor.rowcount:
        connection.prepare_threshold = None


@asynccontextmanager
async def _levelled_async(
    connection: psycopg.AsyncConnection[Any], *, is_own: bool
) -> AsyncIterator[None]:
    level = connection.isolation_level
    if not is_own or level == IsolationLevel.READ_COMMITTED:
        yield
        return
    await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
    try:
        yield
    finally:
        if connection.info.transaction_status == TransactionStatus.IDLE:
            await connection.set_isolation_level(level)


async def _execute_async(
    connection: psycopg.AsyncConnection[Any], statement: Statement[T], *, keep: bool = False
) -> T:
    if keep and isinstance(connection, AsyncPooledConnection):
        cursor = connection.enqueuing
    else:
        cursor = AsyncCursor(connection)
    try:
        await send_async(cursor, statement)
    except UNENCODABLE as error:
        raise unencodable(connection, (statement.params or {}).values(), error) from error
    return await read_async(cursor, statement)


# -- shared by Client and AsyncClient -----------------------------------------------


def _connection_parameters(
    source: str | ConnectionPool[Any] | AsyncConnectionPool[Any],
) -> ConnectionParameters:
    if isinstance(source, str):
        return source, {}
    if callable(source.conninfo) or callable(source.kwargs):
        raise TypeError(
            "a worker opens a connection of its own, and cannot do so with a pool whose "
            "conninfo or kwargs are callables; give the Client a connection string"
        )
    return source.conninfo, dict(source.kwargs or {})


_BEGIN = "select"
"""Any statement begins a transaction on a connection that is not in autocommit."""


def _may_begin(conn: BaseConnection[Any]) -> bool:
    # conn.transaction() commits a transaction that it began. Only the caller may commit
    # the caller's transaction, so it must have begun before.
    return not conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _request(request: EnqueueRequest | TypedJob, options: EnqueueOptions) -> EnqueueRequest:
    if not isinstance(request, EnqueueRequest):
        return EnqueueRequest.of(request, **options)
    if options:
        raise TypeError(
            f"{', '.join(options)} given together with a request: these options are for typed "
            "jobs; set them on the EnqueueRequest"
        )
    return request


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


def _copy_of(connection: BaseConnection[Any], chunk: list[EnqueueRequest]) -> enqueues.Copy | None:
    if len(chunk) < _FEW or connection.pgconn.pipeline_status != PipelineStatus.OFF:
        return None
    return enqueues.copy_many(chunk)


def _placed(
    chunk: list[EnqueueRequest], written: set[str], on_conflict: OnConflict
) -> list[str | None]:
    ids: list[str | None] = []
    taken = []
    for request in chunk:
        if request.id in written:
            written.discard(request.id)  # a second request with this id was not written
            ids.append(request.id)
        else:
            taken.append(request.id)
            ids.append(None)
    if taken and on_conflict == "raise":
        raise JobAlreadyExistsError(taken)
    return ids


def _pause(queue: str, until: datetime | None) -> Statement[None]:
    check_name("queue", queue)
    if until is not None and until.utcoffset() is None:
        raise ValueError(
            "until must be an aware datetime, such as datetime.now(UTC) + timedelta(hours=1): "
            f"{until!r} has no time zone"
        )
    return pauses.pause(queue, until)


def _check_patience(queue: str, deadline: float) -> None:
    if monotonic() > deadline:
        raise BgjobError(
            f"queue {queue!r} is paused, but a transaction that may have claimed from it before "
            f"has not ended for {PATIENCE:g} s: look for it in pg_stat_activity"
        )


def _only(jobs: list[Job], queue: str, token: int) -> Claimed:
    if not jobs:
        raise EmptyQueueError(f"no job of queue {queue!r} is due now, or the queue is paused")
    [job] = jobs
    return Claimed(job, token)


async def _run_async(
    route: Route, claimed: Claimed, connection_parameters: ConnectionParameters
) -> Ending:
    if route.is_transactional:
        with closing(Transactions(connection_parameters, ForkGuard())) as transactions:
            return await transactions.run_async(route, claimed)
    try:
        return route.judge(claimed.job, await route.awaited(claimed.job))
    except BaseException as error:
        return route.failed(claimed.job, error)


async def _uncancelled(loop: asyncio.AbstractEventLoop, call: Callable[[], T]) -> T:
    """Run a call on a thread and wait until it ends, even if the event loop ends."""
    future = loop.run_in_executor(None, call)
    while True:
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if future.done():
                raise


def _result(
    claimed: Claimed, ending: Ending, *, settled: bool, lease: float, alive: bool
) -> Result:
    """Return the stored result; raise the handler's interrupt, or LeaseLostError."""
    if isinstance(ending, Committed):
        return ending.result
    if isinstance(ending, NotBegun):
        raise ending.error
    if isinstance(ending, CommitUnknown):
        if not settled and alive:
            # The lease had not ended, so only the commit can have removed the job.
            return ending.result
        ending = ending.otherwise
    if isinstance(ending, Fenced) or not settled:
        job = claimed.job
        raise LeaseLostError(
            f"job {job.id!r} of type {job.type!r} outlived its lease of {lease:g} s and was "
            "claimed again; its result was dropped: call do() with a longer lease"
        )
    if isinstance(ending, Retry | MoveToDlq):
        error = ending.error
        if isinstance(error, BaseException) and not isinstance(error, Exception):
            raise error
    return ending
