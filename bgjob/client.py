"""Clients: enqueue jobs, pause queues, count and explain jobs, run one job.

The module has over 400 lines because both colours are here; only the async one is written.
What answers questions is imported by the method that asks: an enqueue needs none of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from datetime import datetime
from functools import cached_property, partial
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, get_origin, overload

import psycopg
from psycopg import BaseConnection, IsolationLevel
from psycopg.errors import (
    DeadlockDetected,
    IdleSessionTimeout,
    ProtocolViolation,
    ReadOnlySqlTransaction,
    SerializationFailure,
    UndefinedTable,
    UniqueViolation,
)
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from bgjob._checks import Duration
from bgjob._postgres.connection import (
    AsyncSource,
    ConnectionParameters,
    Source,
    checked_source,
    is_two_phase,
    not_a_connection,
    options,
    options_async,
)
from bgjob._postgres.cursor import UNENCODABLE, AsyncCursor, Cursor, unencodable
from bgjob._postgres.pool import (
    PATIENCE,
    AsyncBorrowedPool,
    AsyncPool,
    AsyncPooledConnection,
    BorrowedPool,
    Pool,
    PooledConnection,
)
from bgjob._postgres.pooler import MIXED_UP, asked_settings, check_lost, mixed_up
from bgjob._requests import (
    OnConflict,
    OnEnqueue,
    check_on_conflict,
    debounced,
    in_chunks,
    only,
    placed,
    request_of,
    wrapped,
    wrappers,
)
from bgjob._running.drive import drive, drive_async
from bgjob._running.joining import check_joined, grouped, joins
from bgjob._running.waiting import AsyncWaiting, Waiting, result_of
from bgjob._shared import AsyncSharedInserts, SharedInserts, may_share
from bgjob._sql import enqueues, history, pauses
from bgjob._sql.execute import (
    insert,
    insert_all,
    insert_all_async,
    insert_any,
    insert_any_async,
    insert_async,
    read,
    read_all,
    read_all_async,
    read_async,
    run,
    run_async,
    send,
    send_all,
    send_all_async,
    send_async,
)
from bgjob._sql.groups import end_groups
from bgjob._sql.replacements import replace
from bgjob._sql.results import outcomes
from bgjob._sql.server import bounds
from bgjob._sql.session import lost, session
from bgjob._sql.statement import Statement
from bgjob.codec import TypedJob
from bgjob.doctor import LIMITS
from bgjob.errors import (
    BgjobError,
    EnqueueConflictError,
    JobAlreadyExistsError,
    SchemaError,
)
from bgjob.group import Group
from bgjob.job import (
    DebounceOptions,
    EnqueueOptions,
    EnqueueRequest,
    Job,
    JobResult,
    PastJob,
    check_name,
)

if TYPE_CHECKING:
    from bgjob._explanation.steps import Steps
    from bgjob._running.do import AsyncDo, Do
    from bgjob.dlq import AsyncDlq, Dlq
    from bgjob.doctor import Finding, Limits
    from bgjob.explanation import Explanation
    from bgjob.jobs import AsyncJobs, Jobs
    from bgjob.limits import AsyncJobLimits, JobLimits
    from bgjob.measurements import Measurements
    from bgjob.minutes import By
    from bgjob.mux import Mux
    from bgjob.result import Result
    from bgjob.stats import MinuteReport, Overview, QueueStats
    from bgjob.timetable import AsyncTimetable, Timetable
    from bgjob.workers import WorkerStatus

__all__ = ["AsyncClient", "Client", "OnConflict", "OnEnqueue"]

T = TypeVar("T")

_FEW = 500
"""Requests below which COPY's round trips cost more than they save."""

_DO_LEASE = 300.0

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


# -- async -----------------------------------------------------------------------------


class AsyncClient:
    """Enqueues jobs on PostgreSQL, and manages queues and dead jobs.

    Args:
        source: a connection string, a function that gives one, or a
            psycopg_pool.AsyncConnectionPool. The driver in a URL such as
            postgresql+psycopg://... does not matter. The client opens up to 10 connections
            as it needs them, and closes them with `close()`; a forked child opens its own; a
            server that is silent or away for 30 s raises psycopg.OperationalError. A
            function without arguments returns a connection string or a mapping of
            parameters (host, user, password). It is called for each connection that the
            client and its workers open, from any of their threads, so that a password may
            change. What it raises is the cause of a psycopg.OperationalError: a client
            raises that immediately, a running worker tries again. Your own pool is only
            borrowed, with the timeouts that you gave it; a worker's connections use its
            parameters, and refuse a `connection_class` of its own.
        notify: whether enqueues notify sleeping workers; True by default. Set it to
            False if no worker can listen: behind a pooler in transaction mode
            workers poll.
        on_enqueue: wraps every enqueue of this client, the first outermost: a function of the
            requests that returns a context manager, which yields those to write, for example
            with more headers; or a sequence of such functions. See OnEnqueue. None by default.

    Raises:
        TypeError: not such a source; the error of an engine or a URL of SQLAlchemy names
            the remedy.
        ValueError: the string is not a connection string.

    Safe to share between tasks. An async context manager; leaving it closes it.

    The caller's event loop may be one of several, one after the other or at the same
    time, if the source is not a pool: each has up to 10 connections. It awaits a source that
    is a coroutine function; a worker's other threads run it in event loops of their own.
    """

    def __init__(
        self,
        source: AsyncSource | AsyncConnectionPool[Any],
        *,
        notify: bool = True,
        on_enqueue: OnEnqueue | Sequence[OnEnqueue] = (),
    ) -> None:
        source = checked_source(source, AsyncConnectionPool)
        self._source = source
        self._notify = notify
        self._on_enqueue = wrappers(on_enqueue)
        self._pool: AsyncPool | AsyncBorrowedPool = (
            AsyncBorrowedPool(source)
            if isinstance(source, AsyncConnectionPool)
            else AsyncPool(
                partial(options_async, (source, {})), _configure_async, patience=PATIENCE
            )
        )
        self._shared = AsyncSharedInserts(self._insert, self._insert_many)
        self._waiting = AsyncWaiting(self._run, partial(_connection_parameters, source))

    # What follows is imported by the programs that use it, at their first use.

    @cached_property
    def dlq(self) -> AsyncDlq:
        """The dead-letter table."""
        from bgjob.dlq import AsyncDlq

        return AsyncDlq(self._run, notify=self._notify)

    @cached_property
    def jobs(self) -> AsyncJobs:
        """The live jobs."""
        from bgjob.jobs import AsyncJobs

        return AsyncJobs(self._run, self._run_all, notify=self._notify)

    @cached_property
    def limits(self) -> AsyncJobLimits:
        """The limits of queues over all workers."""
        from bgjob.limits import AsyncJobLimits

        return AsyncJobLimits(self._run, notify=self._notify)

    @cached_property
    def schedules(self) -> AsyncTimetable:
        """The database's schedules, which workers wrote."""
        from bgjob.timetable import AsyncTimetable

        return AsyncTimetable(self._run, self.enqueue)

    @cached_property
    def _do(self) -> AsyncDo:
        from bgjob._running.do import AsyncDo

        made = AsyncDo(self._run_all, partial(_connection_parameters, self._source))
        # Of two that were made at once, by two threads, one is used, which `close` ends.
        kept: AsyncDo = vars(self).setdefault("_do", made)
        return kept

    @overload
    async def enqueue(
        self,
        request: EnqueueRequest,
        *,
        on_conflict: Literal["raise", "replace"] = ...,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> str: ...

    @overload
    async def enqueue(
        self,
        request: TypedJob,
        *,
        on_conflict: Literal["raise", "replace"] = ...,
        conn: psycopg.AsyncConnection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str: ...

    @overload
    async def enqueue(
        self,
        request: EnqueueRequest,
        *,
        on_conflict: OnConflict,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> str | None: ...

    @overload
    async def enqueue(
        self,
        request: TypedJob,
        *,
        on_conflict: OnConflict,
        conn: psycopg.AsyncConnection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str | None: ...

    async def enqueue(
        self,
        request: EnqueueRequest | TypedJob,
        *,
        on_conflict: OnConflict = "raise",
        conn: psycopg.AsyncConnection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str | None:
        """Write a job and return its id.

        While an insert of the client is under way, the next one writes all jobs that other
        calls ask for meanwhile, for 10 ms at most; a single one is written immediately. Each
        call gets an answer of its own. Jobs with an id of yours are written alone.

        Args:
            request: the job: an EnqueueRequest, or a typed job (for example a value of a
                dataclass) whose class names the type and may name the queue, as for
                EnqueueRequest.of.
            on_conflict: what to do if a live job has the id, or, for a request with `keep`,
                a kept result. "raise" (the default) raises JobAlreadyExistsError. "skip"
                writes nothing, and returns None. "replace" gives a job that waits everything
                of the new request: payload, queue, type, due time, priority, key, headers and
                expiry; its attempts begin again. A job that a worker has claimed is followed
                by the new request, once, when its attempt has ended in whatever way: it waits
                as the job's successor, and replaces an earlier one. The new request has no
                `keep`; that of the job stays.
            conn: a connection of the caller's: the job is written in its
                transaction and exists if that commits. In a transaction begun with
                `tpc_begin` no worker is notified: workers find the job when they poll.
            options: queue, id, delay, run_at, priority, exclusive, slots, headers, expires and
                keep of a typed job; they take precedence over the class.

        Raises:
            QueueRequiredError, PayloadError, TypeError, ValueError: as
                EnqueueRequest.of; a TypeError also for options together with a request.
            JobAlreadyExistsError: the id is taken. Nothing was written,
                and the caller's transaction goes on. Only with "raise".
            EnqueueConflictError: the caller's transaction is repeatable read or
                serializable and cannot see the job that has the id, or with "replace" its
                last change: repeat the transaction. Also a psycopg.errors.SerializationFailure.
            ValueError: a name that the database's encoding cannot hold.
            psycopg.Error: the database's. After a lost connection the job may or may
                not have been written. Enqueuing a request with an id again is refused
                while the first job is in the queue; if that has already completed, the
                job is written, and runs, again, unless the request has `keep`.

        """
        request = request_of(request, options)
        if not self._on_enqueue:
            return await self._enqueue(request, on_conflict, None, conn)
        with wrapped(self._on_enqueue, (request,)) as changed:
            return await self._enqueue(only(changed), on_conflict, None, conn)

    @overload
    async def debounce(
        self,
        request: EnqueueRequest,
        delay: Duration,
        *,
        at_most: Duration | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> str: ...

    @overload
    async def debounce(
        self,
        request: TypedJob,
        delay: Duration,
        *,
        at_most: Duration | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
        **options: Unpack[DebounceOptions],
    ) -> str: ...

    async def debounce(
        self,
        request: EnqueueRequest | TypedJob,
        delay: Duration,
        *,
        at_most: Duration | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
        **options: Any,
    ) -> str:
        """Write a job that runs once the calls with its id have paused; return its id.

        Each call replaces the job that waits, as `enqueue(on_conflict="replace")`, and moves
        its due time: it runs `delay` after the last call, with the request of that one. A
        call while it runs begins anew: the next run is `delay` after the last of them.

        Args:
            request: the job, with an id of yours, and without delay and run_at.
            delay: seconds or a timedelta from the last call, by the database's clock.
            at_most: seconds or a timedelta from the first call since the job last began, at
                which it is due in any case; at least `delay`. None (the default): as long
                as calls keep coming it does not run.
            conn: as for enqueue.
            options: as for enqueue; the id is required.

        Raises:
            TypeError: a typed job without an id, and as for enqueue.
            ValueError: the request has a due time, `at_most` is below `delay`, and as for
                enqueue.
            EnqueueConflictError, psycopg.Error: as for enqueue.

        """
        request, limit = debounced(request, delay, at_most, options)
        if not self._on_enqueue:
            return str(await self._enqueue(request, "replace", limit, conn))
        with wrapped(self._on_enqueue, (request,)) as changed:
            return str(await self._enqueue(only(changed), "replace", limit, conn))

    async def _enqueue(
        self,
        request: EnqueueRequest,
        on_conflict: OnConflict,
        at_most: float | None,
        conn: psycopg.AsyncConnection[Any] | None,
    ) -> str | None:
        if on_conflict != "raise":
            check_on_conflict(on_conflict)
        if conn is None and on_conflict != "replace":
            insert = self._shared.write if may_share(request) else self._insert
            is_written = await insert(request)
        else:
            notify = self._notify and not is_two_phase(conn)
            statement: Statement[Any] = (
                replace([request], notify=notify, at_most=at_most)
                if on_conflict == "replace"
                else enqueues.enqueue(request, notify=notify)
            )
            try:
                is_written = await self._run(statement, conn)
            except SerializationFailure as error:
                if conn is None:
                    raise
                raise EnqueueConflictError([request.id]) from error
        if is_written:
            return request.id
        if on_conflict == "raise":
            raise JobAlreadyExistsError([request.id])
        return None

    async def _insert(self, request: EnqueueRequest) -> bool:
        return await self._on_own(partial(_insert_async, request=request, notify=self._notify))

    async def _insert_many(self, requests: Sequence[EnqueueRequest]) -> set[str]:
        send = partial(_insert_many_async, requests=requests, notify=self._notify)
        return await self._on_own(send)

    async def bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        *,
        on_conflict: OnConflict = "raise",
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> list[str | None]:
        """Write jobs, all or none, and return their ids in order.

        Args:
            requests: the jobs; any number of them, consumed in chunks of 10,000. Make
                those of typed jobs with EnqueueRequest.of.
            on_conflict: "raise" (the default) writes nothing if any id is taken;
                "skip" leaves out jobs whose id is taken, and returns None in their
                places; "replace" lets each replace the job that has its id, as for
                enqueue. Of several with the same id the last one counts.
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
        return await self._bulk_enqueue_wrapped(requests, on_conflict, conn)

    @overload
    def group(
        self,
        *,
        then: EnqueueRequest | TypedJob,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> AbstractAsyncContextManager[Group]: ...

    @overload
    def group(
        self, *, of: Job, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> AbstractAsyncContextManager[Group]: ...

    def group(
        self,
        *,
        then: EnqueueRequest | TypedJob | None = None,
        of: Job | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> AbstractAsyncContextManager[Group]:
        """Write jobs and one that runs when none of them is live any more, all or none.

            async with client.group(then=EnqueueRequest("reports", "summary")) as group:
                group.enqueue(EnqueueRequest("reports", "page", {"n": 1}))

        The block collects the jobs, and its end writes them and `then` in one transaction. If it
        ends by an exception, nothing is written. A job of a group is live while it waits, runs, is
        retried or rescheduled. It is over when it is completed or in the dead-letter table; a
        requeue makes it live again. When none is live any more, also if there never was one,
        `then` becomes due once, and is told by `job.group_dead` how many jobs of the group are in
        the dead-letter table. From there on it is a job like any other.

        Args:
            then: the job that runs afterwards, without a delay and a run_at, in any queue. Its id
                is that of the group. Its `expires` counts from the end of the block.
            of: instead of `then`, a job of a group that runs: adds jobs to its group. It is kept
                live until the transaction ends.
            conn: a connection of the caller's: all is written in its transaction and exists if
                that commits.

        Raises:
            TypeError: both `then` and `of`, or neither.
            ValueError: `then` has a delay or a run_at; or `of` is not in a group, or is the job
                that runs after it.
            JobAlreadyExistsError: at the end of the block: the id of `then` or of a job is taken,
                or occurs twice. Nothing was written, and the caller's transaction goes on.
            LeaseLostError: at the end of the block: `of` is over, as another worker has had it.
                Nothing was written.
            EnqueueConflictError, psycopg.Error: at the end of the block, as for bulk_enqueue.

        """
        return self._grouped(*grouped(then, of), conn)

    @asynccontextmanager
    async def _grouped(
        self,
        group: Group,
        then: Sequence[EnqueueRequest],
        conn: psycopg.AsyncConnection[Any] | None,
    ) -> AsyncIterator[Group]:
        try:
            yield group
        finally:
            requests = group.close(*then)
        await self._bulk_enqueue_wrapped(requests, "raise", conn, group)

    async def _bulk_enqueue_wrapped(
        self,
        requests: Iterable[EnqueueRequest],
        on_conflict: OnConflict,
        conn: psycopg.AsyncConnection[Any] | None,
        group: Group | None = None,
    ) -> list[str | None]:
        if not self._on_enqueue:
            return await self._bulk_enqueue(requests, on_conflict, conn, group)
        with wrapped(self._on_enqueue, requests) as changed:
            may_repeat = isinstance(requests, list | tuple)
            given = list(changed) if may_repeat else changed
            return await self._bulk_enqueue(given, on_conflict, conn, group)

    async def _bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        on_conflict: OnConflict,
        conn: psycopg.AsyncConnection[Any] | None,
        group: Group | None,
    ) -> list[str | None]:
        if conn is None and isinstance(requests, list | tuple):
            if on_conflict == "raise" and group is None and len(requests) < _FEW:
                send = partial(_insert_all_async, requests=requests, notify=self._notify)
                if await self._on_own(send):
                    return [request.id for request in requests]
            for _ in range(_REPETITIONS):
                with suppress(*_NOTHING_WRITTEN):
                    return await self._write_all(requests, on_conflict, None, group)
        return await self._write_all(requests, on_conflict, conn, group)

    async def _write_all(
        self,
        requests: Iterable[EnqueueRequest],
        on_conflict: OnConflict,
        conn: psycopg.AsyncConnection[Any] | None,
        group: Group | None,
    ) -> list[str | None]:
        check_on_conflict(on_conflict)
        pending = iter(requests)
        then = next(pending) if group is not None and group.of is None else None
        group_id = None if group is None else then.id if then else group.id
        chunks = in_chunks(pending, may_be_none=group is not None)
        notify = self._notify and not is_two_phase(conn)
        ids: list[str | None] = []
        if conn is not None and not isinstance(conn, psycopg.AsyncConnection):
            raise TypeError(not_a_connection(conn, psycopg.AsyncConnection))
        if conn is not None and _may_begin(conn):
            await conn.execute(_BEGIN)
        async with (
            self._connection(conn) as connection,
            _levelled_async(connection, is_own=conn is None),
            connection.transaction(),
        ):
            if group is not None:
                with _conflicts([group.id], conn):
                    check_joined(group, then, await _execute_async(connection, joins(group, then)))
            for chunk in chunks:
                if on_conflict == "raise" and await self._copied(connection, chunk, group_id):
                    ids += [request.id for request in chunk]
                    continue
                if on_conflict == "replace":
                    statement = replace(chunk, notify=notify)
                else:
                    statement = enqueues.enqueue_many(chunk, notify=notify, group=group_id)
                with _conflicts([request.id for request in chunk], conn):
                    written = await _execute_async(connection, statement)
                ids += placed(chunk, written, on_conflict)
            if then is not None and not ids:
                await _execute_async(connection, end_groups([then.id], notify=notify))
        return ids

    async def _copied(
        self,
        connection: psycopg.AsyncConnection[Any],
        chunk: list[EnqueueRequest],
        group: str | None,
    ) -> bool:
        """Write jobs by COPY; False if that is not possible, and nothing was written."""
        copy = _copy_of(connection, chunk, group)
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
            # Which ids are taken an insert tells; or a column has another type.
            return False
        except UNENCODABLE as error:
            names = [name for r in chunk for name in (r.id, r.queue, r.type)]
            raise unencodable(connection, names, error) from error
        if self._notify and not is_two_phase(connection):
            await _execute_async(connection, enqueues.tell_many(chunk))
        return True

    async def do(self, queue: str, mux: Mux, *, lease: Duration = _DO_LEASE) -> Result:
        """Claim one due job, run its handler, and store the result.

        If the call is cancelled, so is a coroutine handler, and the attempt has failed. A
        plain handler goes on, and its result is stored when it ends; `close` waits for it.

        `Client.do` also works where an event loop runs in the thread, as in a
        notebook; it blocks that loop until the handler has ended.

        Args:
            queue: the queue to claim from.
            mux: the handlers. The client runs coroutine ones on the caller's event loop,
                and cancels only these at their timeouts. Plain ones run on another thread.
            lease: seconds or a timedelta for which no worker can claim the job again;
                it is not extended. 300 s by default.

        Returns:
            The stored result; for example a Retry if the handler raised.

        Raises:
            EmptyQueueError: no job is due, or the queue is paused.
            LeaseLostError: the handler outlived the lease; its result was dropped.
            StateRequiredError: a handler has a parameter `state`: pass `mux.bound(state)`.
            KeyboardInterrupt, SystemExit: the handler's, after the attempt was
                stored as failed.
            psycopg.Error: the database's. The job is due again when its lease ends; or
                immediately, without counting the attempt, if a transactional handler
                got no connection.

        """
        return await self._do(queue, mux, lease)

    async def stats(
        self, queue: str | None = None, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> list[QueueStats]:
        """Count the jobs of each queue and type exactly, at one moment; sorted by both.

        One query that reads both tables from end to end: with a million jobs it takes a
        second or more. For a page, an alert or a scaler take `overview`, which counts up
        to a cap.

        Args:
            queue: only this queue; by default all queues that have jobs, live or dead.
            conn: a connection of the caller's.

        """
        from bgjob._sql import views

        return await self._run(views.stats(queue), conn)

    async def overview(
        self,
        queue: str | None = None,
        *,
        cap: int = 1000,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> Overview:
        """Count the jobs of each queue up to a cap, with the age of its oldest due job.

        One query that reads a few rows of each queue, however many it has. It takes a few
        milliseconds for a few queues, and a fifth of a millisecond more for each further
        one. Ages and pauses are exact.

        Args:
            queue: only this queue; by default all queues that have jobs, are paused, or
                lost a job to the dead-letter table within the last hour.
            cap: the number of jobs after which each count stops; from 1, 1,000 by
                default. Due, delayed and running jobs are counted up to it for each
                priority of a queue. Running jobs are looked for among the `cap` oldest
                jobs of a priority, those that wait for an exclusive key among the first
                `cap` keys, and dead jobs among the last `cap`.
            conn: a connection of the caller's.

        Raises:
            ValueError: a cap below 1.

        """
        from bgjob._sql import overviews

        _check_cap(cap)
        statement = overviews.overview(queue, cap=cap)
        return await self._run(statement, conn, before=overviews.plan_by_index())

    async def workers(
        self, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> list[WorkerStatus]:
        """List the workers that were seen within a day: the lost ones, the live ones, the others.

        Each worker writes a row every 10 s, so what it tells of its jobs may be as old.

        Args:
            conn: a connection of the caller's.

        Raises:
            SchemaError: the schema is from before its table.

        """
        from bgjob._sql.workers import workers
        from bgjob.workers import NO_TABLE

        try:
            return await self._run(workers(), conn)
        except UndefinedTable as error:
            raise SchemaError(NO_TABLE) from error

    async def minutes(
        self,
        last: Duration = 3600.0,
        *,
        step: Duration | None = None,
        by: By | None = "queue",
        queue: str | None = None,
        type: str | None = None,  # noqa: A002
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> MinuteReport:
        """Return what ended recently, as the workers with the service Minutes have counted it.

        `bgjob worker` has it by default. One query, which reads only the rows of that time:
        milliseconds for some hours.

        Args:
            last: seconds or a timedelta back from now; an hour by default.
            step: seconds or a timedelta, whole minutes: counts each of these for itself,
                for a chart. None (the default) adds all up. At most 10,080 steps. They
                begin at full minutes, hours or days of UTC, and the last one is the
                current one: the last hour by minutes is 60 steps.
            by: "queue" (the default) for a series of each queue, "type" for one of each
                type in each queue, None for one of all.
            queue: only what ended in this queue.
            type: only jobs of this type.
            conn: a connection of the caller's.

        Raises:
            SchemaError: the schema is from before its table.
            ValueError: an argument is out of its range.

        """
        from bgjob import minutes
        from bgjob._sql.minutes import plan_in_memory

        statement = minutes.report(last, step=step, by=by, queue=queue, type_=type)
        try:
            return await self._run(statement, conn, before=plan_in_memory())
        except UndefinedTable as error:
            raise SchemaError(minutes.NO_TABLE) from error

    async def history(
        self,
        id: str,  # noqa: A002
        *,
        limit: int = 100,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> list[PastJob]:
        """Return when and where a job was completed, if its type is registered with `keep=True`.

        Completed jobs of such types are kept for a week. Those of others leave nothing.

        Args:
            id: the job's id.
            limit: the most jobs to return, where an id was used several times; 100 by
                default.
            conn: a connection of the caller's.

        Returns:
            The completed jobs with this id, the latest first.

        Raises:
            SchemaError: the schema is from before its table.

        """
        check_name("id", id)
        try:
            kept = await self._run(history.of_job(id, limit=limit), conn)
        except UndefinedTable as error:
            raise SchemaError(history.NO_TABLE) from error
        return [job.past for job in kept]

    async def result(
        self,
        id: str,  # noqa: A002
        *,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> JobResult:
        """Return what is known of a job that was enqueued with `keep`.

        That is its state while it is live, and what it has come to for `keep` after its end.
        One query.

        Args:
            id: the job's id.
            conn: a connection of the caller's.

        Raises:
            UnknownResultError: nothing is known: the job had no `keep`, or that is over.
            ValueError: an invalid id.
            psycopg.Error: the database's.

        """
        check_name("id", id)
        return result_of(id, (await self._run(outcomes([id]), conn)).get(id))

    async def wait(self, id: str, *, timeout: Duration | None = None) -> Any:  # noqa: A002
        """Wait until a job that was enqueued with `keep` has ended, and return its value.

        The end is notified, and looked for twice a second as well. All waiters of this client
        share one connection, which is none of its pool. It stays open half a second after the
        last of them. Losing it only delays.

        Args:
            id: the job's id. Its enqueue is committed.
            timeout: seconds or a timedelta; None (the default) waits for as long as the job is
                live.

        Returns:
            What the handler gave as `Complete(value)`, decoded from JSON; None if it gave
            nothing.

        Raises:
            JobFailedError: the job has failed for good, and is in the dead-letter table.
            TimeoutError: it has not ended within the timeout. It goes on.
            UnknownResultError: nothing is known of it: it had no `keep`, or that is over.
            ClientClosedError: the client was closed meanwhile.
            ValueError: an invalid id or timeout.
            psycopg.Error: the database's, if that is away for over 30 s.

        """
        check_name("id", id)
        return await self._waiting.wait(id, timeout)

    async def doctor(self, *checks: str, limits: Limits = LIMITS) -> list[Finding]:
        """Look for what is wrong with the database, and return findings with their remedies.

        Changes nothing. Some 30 statements, each in a transaction of its own, which takes at
        most 5 s and waits at most 1 s for a lock. One of them reads the table of jobs
        once, up to 1 GB: about a second at a million jobs.

        Any role may call it. A check that needs a privilege which this role does not have
        becomes a finding that says so; `bgjob_operator` of privileges.sql has all.

        Args:
            checks: the names of the checks, such as "horizon"; by default all. The
                operations guide lists them.
            limits: what counts as too much.

        Returns:
            The findings in the order of the checks, at least one for each; what is as it
            should be is a finding with the severity "ok". `bgjob.doctor.exit_status`
            makes one number of them.

        Raises:
            ValueError: there is no check of this name.
            psycopg.Error: the server cannot be reached.

        """
        from bgjob._diagnosis.checks import examine

        async with self._connection(None) as connection:
            steps = examine(
                checks,
                limits,
                pid=connection.info.backend_pid,
                prepares=connection.prepare_threshold is not None,
            )
            return await drive_async(steps, partial(_execute_both_async, connection, bounds()))

    async def measure(self, *, cap: int = 10_000) -> Measurements:
        """Measure queues, workers, schedules and tables, for an exporter of metrics.

        Changes nothing. Seven statements, each in a transaction of its own, which takes at most
        5 s and waits at most 1 s for a lock. None of them reads a table from end to end.
        `bgjob.ext.prometheus.DatabaseMetrics` makes metrics of it.

        Any role may call it: a part that needs a privilege which this role does not have is
        named in `failures`. `bgjob_operator` of privileges.sql has all.

        Args:
            cap: the number of jobs after which each count of a queue stops, as for
                `overview`; 10,000 by default.

        Raises:
            ValueError: a cap below 1.
            psycopg.Error: the server cannot be reached.

        """
        from bgjob._diagnosis.measuring import measure

        _check_cap(cap)
        async with self._connection(None) as connection:
            before = bounds("bgjob metrics")
            return await drive_async(measure(cap), partial(_execute_both_async, connection, before))

    async def explain(
        self,
        id: str | None = None,  # noqa: A002
        *,
        queue: str | None = None,
    ) -> Explanation:
        """Return why a job does not run: every reason that holds, with its remedy.

        Changes nothing, and locks nothing. Up to ten statements, each in a transaction of its
        own, which takes at most 5 s. Each reads a few rows, or up to 20,000 where it counts
        the jobs that come first, however many there are. What the workers do is as they
        last wrote it, at most 10 s ago.

        It needs the privileges of `bgjob_operator`. Without those on jobs it raises; of what
        else this role may not read, a reason says that it was not looked at.

        Args:
            id: the job's id. A job that is completed does not exist any more.
            queue: instead of an id: explain the job of this queue that has been due for
                longest.

        Returns:
            The reasons, in the order in which they matter; the operations guide lists them.
            At least one: a job that runs, is ready, is dead or does not exist has one for
            that.

        Raises:
            TypeError: neither an id nor a queue is given, or both are.
            ValueError: an invalid id or name of a queue.
            psycopg.Error: the database's.

        """
        steps = _explaining(id, queue)
        async with self._connection(None) as connection:
            before = bounds("bgjob explain")
            return await drive_async(steps, partial(_execute_both_async, connection, before))

    async def pause(
        self,
        queue: str,
        until: datetime | None = None,
        *,
        conn: psycopg.AsyncConnection[Any] | None = None,
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
        await self._run(_pause(queue, until), conn)
        if conn is None:
            deadline = monotonic() + PATIENCE
            claiming = await self._run(pauses.claiming_transactions(), None)
            while claiming:
                _check_patience(queue, deadline)
                await asyncio.sleep(_LOOK)
                claiming &= await self._run(pauses.claiming_transactions(), None)

    async def resume(self, queue: str, *, conn: psycopg.AsyncConnection[Any] | None = None) -> bool:
        """End the pause of a queue and notify its workers; True if it was paused.

        Args:
            queue: the queue.
            conn: a connection of the caller's: the pause ends when its transaction
                commits.

        """
        return await self._run(pauses.resume(queue, notify=not is_two_phase(conn)), conn)

    async def paused(
        self, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> dict[str, datetime | None]:
        """Return the paused queues, each with the end of its pause; None for no end."""
        return await self._run(pauses.paused(), conn)

    async def close(self) -> None:
        """Close the client's own connections; a borrowed pool stays open. Idempotent.

        Tasks that coroutine handlers of `do` left behind go on. A closed client stays
        closed: every later call raises ClientClosedError.

        If calls of `do` in this event loop were cancelled, it waits until their plain
        handlers have ended.
        """
        await self._waiting.close()
        if "_do" in vars(self):
            await self._do.close()
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
            async with _autocommit_async(pooled):
                yield pooled
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
        before: Statement[None] | None = None,
    ) -> T:
        if conn is not None:
            if not isinstance(conn, psycopg.AsyncConnection):
                raise TypeError(not_a_connection(conn, psycopg.AsyncConnection))
            return await _execute_async(conn, statement)
        if before is not None:
            both = partial(_execute_both_async, before=before, statement=statement)
            return await self._on_own(both)
        return await self._on_own(partial(_execute_async, statement=statement))

    async def _on_own(self, send: Callable[[psycopg.AsyncConnection[Any]], Awaitable[T]]) -> T:
        """Send a statement on a connection of the client's, again if nothing was written."""
        pool: Any = self._pool
        repetitions = 0
        while True:
            pooled = await pool.take()
            try:
                if pooled.autocommit:  # those of its own pool: a context manager takes 7 µs
                    return await send(pooled)
                async with _autocommit_async(pooled):
                    return await send(pooled)
            except _NOTHING_WRITTEN as error:
                if isinstance(error, ReadOnlySqlTransaction):
                    await pooled.close()  # as above
                if (repetitions := repetitions + 1) > _REPETITIONS:
                    raise
            finally:
                await pool.release(pooled)

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
    if not cursor.rowcount:  # a pooler may use another session for each transaction
        connection.prepare_threshold = None
        if asked := asked_settings(connection.info.options):
            check_lost(await run_async(connection, lost(asked)))


@asynccontextmanager
async def _autocommit_async(connection: psycopg.AsyncConnection[Any]) -> AsyncIterator[None]:
    """Put a connection into autocommit: a statement is a transaction and one round trip."""
    # pool.connection() would commit, with nothing to commit.
    if connection.autocommit:
        yield
        return
    await connection.set_autocommit(True)
    try:
        yield
    finally:
        if connection.info.transaction_status == TransactionStatus.IDLE:
            await connection.set_autocommit(False)


@asynccontextmanager
async def _levelled_async(
    connection: psycopg.AsyncConnection[Any], *, is_own: bool
) -> AsyncIterator[None]:
    """Begin transactions as read committed, whatever a borrowed pool's level is."""
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


async def _execute_async(connection: psycopg.AsyncConnection[Any], statement: Statement[T]) -> T:
    cursor = AsyncCursor(connection)  # whatever factories the caller's connection has
    try:
        await send_async(cursor, statement)
    except UNENCODABLE as error:
        raise unencodable(connection, (statement.params or {}).values(), error) from error
    except MIXED_UP as error:
        raise mixed_up() from error
    return await read_async(cursor, statement)


async def _insert_async(
    connection: psycopg.AsyncConnection[Any], request: EnqueueRequest, *, notify: bool
) -> bool:
    if request.is_plain and isinstance(connection, AsyncPooledConnection):
        try:
            is_written = await insert_async(connection, request, notify=notify)
        except UNENCODABLE as error:
            names = request.id, request.queue, request.type
            raise unencodable(connection, names, error) from error
        except MIXED_UP as error:
            raise mixed_up() from error
        if is_written is not None:
            return is_written
    return await _execute_async(connection, enqueues.enqueue(request, notify=notify))


async def _insert_many_async(
    connection: psycopg.AsyncConnection[Any], requests: Sequence[EnqueueRequest], *, notify: bool
) -> set[str]:
    if isinstance(connection, AsyncPooledConnection) and all(r.is_plain for r in requests):
        written = await insert_any_async(connection, requests, notify=notify)
        if written is not None:
            return written
    return await _execute_async(connection, enqueues.enqueue_many(requests, notify=notify))


async def _insert_all_async(
    connection: psycopg.AsyncConnection[Any], requests: Sequence[EnqueueRequest], *, notify: bool
) -> bool:
    """Write jobs by one statement; False if it cannot, and nothing was written.

    Ids of the program's are left to an insert that does not fail where one is taken: each
    failure is an error in the server's log.
    """
    if not requests or not all(map(may_share, requests)):
        return False
    try:
        if (
            isinstance(connection, AsyncPooledConnection)
            and _are_plain_in_order(requests)
            and await insert_all_async(connection, requests, notify=notify)
        ):
            return True
        statement = enqueues.enqueue_many(requests, notify=notify, skips_taken=False)
        await _execute_async(connection, statement)
    except MIXED_UP as error:
        raise mixed_up() from error
    except (UniqueViolation, *UNENCODABLE):
        return False  # which id is taken, or which name cannot be stored, another insert tells
    return True


async def _execute_both_async(
    connection: psycopg.AsyncConnection[Any], before: Statement[None], statement: Statement[T]
) -> T:
    """Send two statements together, which makes them one transaction; return the second's."""
    try:
        async with connection.pipeline():
            cursors = await send_all_async(connection, [before, statement])
    except UNENCODABLE as error:
        raise unencodable(connection, (statement.params or {}).values(), error) from error
    return await read_async(cursors[1], statement)


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class Client:
    """Enqueues jobs on PostgreSQL, and manages queues and dead jobs.

    Args:
        source: a connection string, a function that gives one, or a
            psycopg_pool.ConnectionPool. The driver in a URL such as
            postgresql+psycopg://... does not matter. The client opens up to 10 connections
            as it needs them, and closes them with `close()`; a forked child opens its own; a
            server that is silent or away for 30 s raises psycopg.OperationalError. A
            function without arguments returns a connection string or a mapping of
            parameters (host, user, password). It is called for each connection that the
            client and its workers open, from any of their threads, so that a password may
            change. What it raises is the cause of a psycopg.OperationalError: a client
            raises that immediately, a running worker tries again. Your own pool is only
            borrowed, with the timeouts that you gave it; a worker's connections use its
            parameters, and refuse a `connection_class` of its own.
        notify: whether enqueues notify sleeping workers; True by default. Set it to
            False if no worker can listen: behind a pooler in transaction mode
            workers poll.
        on_enqueue: wraps every enqueue of this client, the first outermost: a function of the
            requests that returns a context manager, which yields those to write, for example
            with more headers; or a sequence of such functions. See OnEnqueue. None by default.

    Raises:
        TypeError: not such a source; the error of an engine or a URL of SQLAlchemy names
            the remedy.
        ValueError: the string is not a connection string.

    Thread-safe. A context manager; leaving it closes it.
    """

    def __init__(
        self,
        source: Source | ConnectionPool[Any],
        *,
        notify: bool = True,
        on_enqueue: OnEnqueue | Sequence[OnEnqueue] = (),
    ) -> None:
        source = checked_source(source, ConnectionPool)
        self._source = source
        self._notify = notify
        self._on_enqueue = wrappers(on_enqueue)
        self._pool: Pool | BorrowedPool = (
            BorrowedPool(source)
            if isinstance(source, ConnectionPool)
            else Pool(partial(options, (source, {})), _configure, patience=PATIENCE)
        )
        self._shared = SharedInserts(self._insert, self._insert_many)
        self._waiting = Waiting(self._run, partial(_connection_parameters, source))

    # What follows is imported by the programs that use it, at their first use.

    @cached_property
    def dlq(self) -> Dlq:
        """The dead-letter table."""
        from bgjob.dlq import Dlq

        return Dlq(self._run, notify=self._notify)

    @cached_property
    def jobs(self) -> Jobs:
        """The live jobs."""
        from bgjob.jobs import Jobs

        return Jobs(self._run, self._run_all, notify=self._notify)

    @cached_property
    def limits(self) -> JobLimits:
        """The limits of queues over all workers."""
        from bgjob.limits import JobLimits

        return JobLimits(self._run, notify=self._notify)

    @cached_property
    def schedules(self) -> Timetable:
        """The database's schedules, which workers wrote."""
        from bgjob.timetable import Timetable

        return Timetable(self._run, self.enqueue)

    @cached_property
    def _do(self) -> Do:
        from bgjob._running.do import Do

        made = Do(self._run_all, partial(_connection_parameters, self._source))
        # Of two that were made at once, by two threads, one is used, which `close` ends.
        kept: Do = vars(self).setdefault("_do", made)
        return kept

    @overload
    def enqueue(
        self,
        request: EnqueueRequest,
        *,
        on_conflict: Literal["raise", "replace"] = ...,
        conn: psycopg.Connection[Any] | None = None,
    ) -> str: ...

    @overload
    def enqueue(
        self,
        request: TypedJob,
        *,
        on_conflict: Literal["raise", "replace"] = ...,
        conn: psycopg.Connection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str: ...

    @overload
    def enqueue(
        self,
        request: EnqueueRequest,
        *,
        on_conflict: OnConflict,
        conn: psycopg.Connection[Any] | None = None,
    ) -> str | None: ...

    @overload
    def enqueue(
        self,
        request: TypedJob,
        *,
        on_conflict: OnConflict,
        conn: psycopg.Connection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str | None: ...

    def enqueue(
        self,
        request: EnqueueRequest | TypedJob,
        *,
        on_conflict: OnConflict = "raise",
        conn: psycopg.Connection[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> str | None:
        """Write a job and return its id.

        While an insert of the client is under way, the next one writes all jobs that other
        calls ask for meanwhile, for 10 ms at most; a single one is written immediately. Each
        call gets an answer of its own. Jobs with an id of yours are written alone.

        Args:
            request: the job: an EnqueueRequest, or a typed job (for example a value of a
                dataclass) whose class names the type and may name the queue, as for
                EnqueueRequest.of.
            on_conflict: what to do if a live job has the id, or, for a request with `keep`,
                a kept result. "raise" (the default) raises JobAlreadyExistsError. "skip"
                writes nothing, and returns None. "replace" gives a job that waits everything
                of the new request: payload, queue, type, due time, priority, key, headers and
                expiry; its attempts begin again. A job that a worker has claimed is followed
                by the new request, once, when its attempt has ended in whatever way: it waits
                as the job's successor, and replaces an earlier one. The new request has no
                `keep`; that of the job stays.
            conn: a connection of the caller's: the job is written in its
                transaction and exists if that commits. In a transaction begun with
                `tpc_begin` no worker is notified: workers find the job when they poll.
            options: queue, id, delay, run_at, priority, exclusive, slots, headers, expires and
                keep of a typed job; they take precedence over the class.

        Raises:
            QueueRequiredError, PayloadError, TypeError, ValueError: as
                EnqueueRequest.of; a TypeError also for options together with a request.
            JobAlreadyExistsError: the id is taken. Nothing was written,
                and the caller's transaction goes on. Only with "raise".
            EnqueueConflictError: the caller's transaction is repeatable read or
                serializable and cannot see the job that has the id, or with "replace" its
                last change: repeat the transaction. Also a psycopg.errors.SerializationFailure.
            ValueError: a name that the database's encoding cannot hold.
            psycopg.Error: the database's. After a lost connection the job may or may
                not have been written. Enqueuing a request with an id again is refused
                while the first job is in the queue; if that has already completed, the
                job is written, and runs, again, unless the request has `keep`.

        """
        request = request_of(request, options)
        if not self._on_enqueue:
            return self._enqueue(request, on_conflict, None, conn)
        with wrapped(self._on_enqueue, (request,)) as changed:
            return self._enqueue(only(changed), on_conflict, None, conn)

    @overload
    def debounce(
        self,
        request: EnqueueRequest,
        delay: Duration,
        *,
        at_most: Duration | None = None,
        conn: psycopg.Connection[Any] | None = None,
    ) -> str: ...

    @overload
    def debounce(
        self,
        request: TypedJob,
        delay: Duration,
        *,
        at_most: Duration | None = None,
        conn: psycopg.Connection[Any] | None = None,
        **options: Unpack[DebounceOptions],
    ) -> str: ...

    def debounce(
        self,
        request: EnqueueRequest | TypedJob,
        delay: Duration,
        *,
        at_most: Duration | None = None,
        conn: psycopg.Connection[Any] | None = None,
        **options: Any,
    ) -> str:
        """Write a job that runs once the calls with its id have paused; return its id.

        Each call replaces the job that waits, as `enqueue(on_conflict="replace")`, and moves
        its due time: it runs `delay` after the last call, with the request of that one. A
        call while it runs begins anew: the next run is `delay` after the last of them.

        Args:
            request: the job, with an id of yours, and without delay and run_at.
            delay: seconds or a timedelta from the last call, by the database's clock.
            at_most: seconds or a timedelta from the first call since the job last began, at
                which it is due in any case; at least `delay`. None (the default): as long
                as calls keep coming it does not run.
            conn: as for enqueue.
            options: as for enqueue; the id is required.

        Raises:
            TypeError: a typed job without an id, and as for enqueue.
            ValueError: the request has a due time, `at_most` is below `delay`, and as for
                enqueue.
            EnqueueConflictError, psycopg.Error: as for enqueue.

        """
        request, limit = debounced(request, delay, at_most, options)
        if not self._on_enqueue:
            return str(self._enqueue(request, "replace", limit, conn))
        with wrapped(self._on_enqueue, (request,)) as changed:
            return str(self._enqueue(only(changed), "replace", limit, conn))

    def _enqueue(
        self,
        request: EnqueueRequest,
        on_conflict: OnConflict,
        at_most: float | None,
        conn: psycopg.Connection[Any] | None,
    ) -> str | None:
        if on_conflict != "raise":
            check_on_conflict(on_conflict)
        if conn is None and on_conflict != "replace":
            insert = self._shared.write if may_share(request) else self._insert
            is_written = insert(request)
        else:
            notify = self._notify and not is_two_phase(conn)
            statement: Statement[Any] = (
                replace([request], notify=notify, at_most=at_most)
                if on_conflict == "replace"
                else enqueues.enqueue(request, notify=notify)
            )
            try:
                is_written = self._run(statement, conn)
            except SerializationFailure as error:
                if conn is None:
                    raise
                raise EnqueueConflictError([request.id]) from error
        if is_written:
            return request.id
        if on_conflict == "raise":
            raise JobAlreadyExistsError([request.id])
        return None

    def _insert(self, request: EnqueueRequest) -> bool:
        return self._on_own(partial(_insert, request=request, notify=self._notify))

    def _insert_many(self, requests: Sequence[EnqueueRequest]) -> set[str]:
        send = partial(_insert_many, requests=requests, notify=self._notify)
        return self._on_own(send)

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
                places; "replace" lets each replace the job that has its id, as for
                enqueue. Of several with the same id the last one counts.
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
        return self._bulk_enqueue_wrapped(requests, on_conflict, conn)

    @overload
    def group(
        self,
        *,
        then: EnqueueRequest | TypedJob,
        conn: psycopg.Connection[Any] | None = None,
    ) -> AbstractContextManager[Group]: ...

    @overload
    def group(
        self, *, of: Job, conn: psycopg.Connection[Any] | None = None
    ) -> AbstractContextManager[Group]: ...

    def group(
        self,
        *,
        then: EnqueueRequest | TypedJob | None = None,
        of: Job | None = None,
        conn: psycopg.Connection[Any] | None = None,
    ) -> AbstractContextManager[Group]:
        """Write jobs and one that runs when none of them is live any more, all or none.

            with client.group(then=EnqueueRequest("reports", "summary")) as group:
                group.enqueue(EnqueueRequest("reports", "page", {"n": 1}))

        The block collects the jobs, and its end writes them and `then` in one transaction. If it
        ends by an exception, nothing is written. A job of a group is live while it waits, runs, is
        retried or rescheduled. It is over when it is completed or in the dead-letter table; a
        requeue makes it live again. When none is live any more, also if there never was one,
        `then` becomes due once, and is told by `job.group_dead` how many jobs of the group are in
        the dead-letter table. From there on it is a job like any other.

        Args:
            then: the job that runs afterwards, without a delay and a run_at, in any queue. Its id
                is that of the group. Its `expires` counts from the end of the block.
            of: instead of `then`, a job of a group that runs: adds jobs to its group. It is kept
                live until the transaction ends.
            conn: a connection of the caller's: all is written in its transaction and exists if
                that commits.

        Raises:
            TypeError: both `then` and `of`, or neither.
            ValueError: `then` has a delay or a run_at; or `of` is not in a group, or is the job
                that runs after it.
            JobAlreadyExistsError: at the end of the block: the id of `then` or of a job is taken,
                or occurs twice. Nothing was written, and the caller's transaction goes on.
            LeaseLostError: at the end of the block: `of` is over, as another worker has had it.
                Nothing was written.
            EnqueueConflictError, psycopg.Error: at the end of the block, as for bulk_enqueue.

        """
        return self._grouped(*grouped(then, of), conn)

    @contextmanager
    def _grouped(
        self,
        group: Group,
        then: Sequence[EnqueueRequest],
        conn: psycopg.Connection[Any] | None,
    ) -> Iterator[Group]:
        try:
            yield group
        finally:
            requests = group.close(*then)
        self._bulk_enqueue_wrapped(requests, "raise", conn, group)

    def _bulk_enqueue_wrapped(
        self,
        requests: Iterable[EnqueueRequest],
        on_conflict: OnConflict,
        conn: psycopg.Connection[Any] | None,
        group: Group | None = None,
    ) -> list[str | None]:
        if not self._on_enqueue:
            return self._bulk_enqueue(requests, on_conflict, conn, group)
        with wrapped(self._on_enqueue, requests) as changed:
            may_repeat = isinstance(requests, list | tuple)
            given = list(changed) if may_repeat else changed
            return self._bulk_enqueue(given, on_conflict, conn, group)

    def _bulk_enqueue(
        self,
        requests: Iterable[EnqueueRequest],
        on_conflict: OnConflict,
        conn: psycopg.Connection[Any] | None,
        group: Group | None,
    ) -> list[str | None]:
        if conn is None and isinstance(requests, list | tuple):
            if on_conflict == "raise" and group is None and len(requests) < _FEW:
                send = partial(_insert_all, requests=requests, notify=self._notify)
                if self._on_own(send):
                    return [request.id for request in requests]
            for _ in range(_REPETITIONS):
                with suppress(*_NOTHING_WRITTEN):
                    return self._write_all(requests, on_conflict, None, group)
        return self._write_all(requests, on_conflict, conn, group)

    def _write_all(
        self,
        requests: Iterable[EnqueueRequest],
        on_conflict: OnConflict,
        conn: psycopg.Connection[Any] | None,
        group: Group | None,
    ) -> list[str | None]:
        check_on_conflict(on_conflict)
        pending = iter(requests)
        then = next(pending) if group is not None and group.of is None else None
        group_id = None if group is None else then.id if then else group.id
        chunks = in_chunks(pending, may_be_none=group is not None)
        notify = self._notify and not is_two_phase(conn)
        ids: list[str | None] = []
        if conn is not None and not isinstance(conn, psycopg.Connection):
            raise TypeError(not_a_connection(conn, psycopg.Connection))
        if conn is not None and _may_begin(conn):
            conn.execute(_BEGIN)
        with (
            self._connection(conn) as connection,
            _levelled(connection, is_own=conn is None),
            connection.transaction(),
        ):
            if group is not None:
                with _conflicts([group.id], conn):
                    check_joined(group, then, _execute(connection, joins(group, then)))
            for chunk in chunks:
                if on_conflict == "raise" and self._copied(connection, chunk, group_id):
                    ids += [request.id for request in chunk]
                    continue
                if on_conflict == "replace":
                    statement = replace(chunk, notify=notify)
                else:
                    statement = enqueues.enqueue_many(chunk, notify=notify, group=group_id)
                with _conflicts([request.id for request in chunk], conn):
                    written = _execute(connection, statement)
                ids += placed(chunk, written, on_conflict)
            if then is not None and not ids:
                _execute(connection, end_groups([then.id], notify=notify))
        return ids

    def _copied(
        self,
        connection: psycopg.Connection[Any],
        chunk: list[EnqueueRequest],
        group: str | None,
    ) -> bool:
        """Write jobs by COPY; False if that is not possible, and nothing was written."""
        copy = _copy_of(connection, chunk, group)
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
            # Which ids are taken an insert tells; or a column has another type.
            return False
        except UNENCODABLE as error:
            names = [name for r in chunk for name in (r.id, r.queue, r.type)]
            raise unencodable(connection, names, error) from error
        if self._notify and not is_two_phase(connection):
            _execute(connection, enqueues.tell_many(chunk))
        return True

    def do(self, queue: str, mux: Mux, *, lease: Duration = _DO_LEASE) -> Result:
        """Claim one due job, run its handler, and store the result.

        `Client.do` also works where an event loop runs in the thread, as in a
        notebook; it blocks that loop until the handler has ended.

        Args:
            queue: the queue to claim from.
            mux: the handlers. The client runs coroutine ones on an event loop of its own,
                and cancels only these at their timeouts. Plain ones run on the calling thread.
            lease: seconds or a timedelta for which no worker can claim the job again;
                it is not extended. 300 s by default.

        Returns:
            The stored result; for example a Retry if the handler raised.

        Raises:
            EmptyQueueError: no job is due, or the queue is paused.
            LeaseLostError: the handler outlived the lease; its result was dropped.
            StateRequiredError: a handler has a parameter `state`: pass `mux.bound(state)`.
            KeyboardInterrupt, SystemExit: the handler's, after the attempt was
                stored as failed.
            psycopg.Error: the database's. The job is due again when its lease ends; or
                immediately, without counting the attempt, if a transactional handler
                got no connection.

        """
        return self._do(queue, mux, lease)

    def stats(
        self, queue: str | None = None, *, conn: psycopg.Connection[Any] | None = None
    ) -> list[QueueStats]:
        """Count the jobs of each queue and type exactly, at one moment; sorted by both.

        One query that reads both tables from end to end: with a million jobs it takes a
        second or more. For a page, an alert or a scaler take `overview`, which counts up
        to a cap.

        Args:
            queue: only this queue; by default all queues that have jobs, live or dead.
            conn: a connection of the caller's.

        """
        from bgjob._sql import views

        return self._run(views.stats(queue), conn)

    def overview(
        self,
        queue: str | None = None,
        *,
        cap: int = 1000,
        conn: psycopg.Connection[Any] | None = None,
    ) -> Overview:
        """Count the jobs of each queue up to a cap, with the age of its oldest due job.

        One query that reads a few rows of each queue, however many it has. It takes a few
        milliseconds for a few queues, and a fifth of a millisecond more for each further
        one. Ages and pauses are exact.

        Args:
            queue: only this queue; by default all queues that have jobs, are paused, or
                lost a job to the dead-letter table within the last hour.
            cap: the number of jobs after which each count stops; from 1, 1,000 by
                default. Due, delayed and running jobs are counted up to it for each
                priority of a queue. Running jobs are looked for among the `cap` oldest
                jobs of a priority, those that wait for an exclusive key among the first
                `cap` keys, and dead jobs among the last `cap`.
            conn: a connection of the caller's.

        Raises:
            ValueError: a cap below 1.

        """
        from bgjob._sql import overviews

        _check_cap(cap)
        statement = overviews.overview(queue, cap=cap)
        return self._run(statement, conn, before=overviews.plan_by_index())

    def workers(self, *, conn: psycopg.Connection[Any] | None = None) -> list[WorkerStatus]:
        """List the workers that were seen within a day: the lost ones, the live ones, the others.

        Each worker writes a row every 10 s, so what it tells of its jobs may be as old.

        Args:
            conn: a connection of the caller's.

        Raises:
            SchemaError: the schema is from before its table.

        """
        from bgjob._sql.workers import workers
        from bgjob.workers import NO_TABLE

        try:
            return self._run(workers(), conn)
        except UndefinedTable as error:
            raise SchemaError(NO_TABLE) from error

    def minutes(
        self,
        last: Duration = 3600.0,
        *,
        step: Duration | None = None,
        by: By | None = "queue",
        queue: str | None = None,
        type: str | None = None,  # noqa: A002
        conn: psycopg.Connection[Any] | None = None,
    ) -> MinuteReport:
        """Return what ended recently, as the workers with the service Minutes have counted it.

        `bgjob worker` has it by default. One query, which reads only the rows of that time:
        milliseconds for some hours.

        Args:
            last: seconds or a timedelta back from now; an hour by default.
            step: seconds or a timedelta, whole minutes: counts each of these for itself,
                for a chart. None (the default) adds all up. At most 10,080 steps. They
                begin at full minutes, hours or days of UTC, and the last one is the
                current one: the last hour by minutes is 60 steps.
            by: "queue" (the default) for a series of each queue, "type" for one of each
                type in each queue, None for one of all.
            queue: only what ended in this queue.
            type: only jobs of this type.
            conn: a connection of the caller's.

        Raises:
            SchemaError: the schema is from before its table.
            ValueError: an argument is out of its range.

        """
        from bgjob import minutes
        from bgjob._sql.minutes import plan_in_memory

        statement = minutes.report(last, step=step, by=by, queue=queue, type_=type)
        try:
            return self._run(statement, conn, before=plan_in_memory())
        except UndefinedTable as error:
            raise SchemaError(minutes.NO_TABLE) from error

    def history(
        self,
        id: str,  # noqa: A002
        *,
        limit: int = 100,
        conn: psycopg.Connection[Any] | None = None,
    ) -> list[PastJob]:
        """Return when and where a job was completed, if its type is registered with `keep=True`.

        Completed jobs of such types are kept for a week. Those of others leave nothing.

        Args:
            id: the job's id.
            limit: the most jobs to return, where an id was used several times; 100 by
                default.
            conn: a connection of the caller's.

        Returns:
            The completed jobs with this id, the latest first.

        Raises:
            SchemaError: the schema is from before its table.

        """
        check_name("id", id)
        try:
            kept = self._run(history.of_job(id, limit=limit), conn)
        except UndefinedTable as error:
            raise SchemaError(history.NO_TABLE) from error
        return [job.past for job in kept]

    def result(
        self,
        id: str,  # noqa: A002
        *,
        conn: psycopg.Connection[Any] | None = None,
    ) -> JobResult:
        """Return what is known of a job that was enqueued with `keep`.

        That is its state while it is live, and what it has come to for `keep` after its end.
        One query.

        Args:
            id: the job's id.
            conn: a connection of the caller's.

        Raises:
            UnknownResultError: nothing is known: the job had no `keep`, or that is over.
            ValueError: an invalid id.
            psycopg.Error: the database's.

        """
        check_name("id", id)
        return result_of(id, (self._run(outcomes([id]), conn)).get(id))

    def wait(self, id: str, *, timeout: Duration | None = None) -> Any:  # noqa: A002
        """Wait until a job that was enqueued with `keep` has ended, and return its value.

        The end is notified, and looked for twice a second as well. All waiters of this client
        share one connection, which is none of its pool. It stays open half a second after the
        last of them. Losing it only delays.

        Args:
            id: the job's id. Its enqueue is committed.
            timeout: seconds or a timedelta; None (the default) waits for as long as the job is
                live.

        Returns:
            What the handler gave as `Complete(value)`, decoded from JSON; None if it gave
            nothing.

        Raises:
            JobFailedError: the job has failed for good, and is in the dead-letter table.
            TimeoutError: it has not ended within the timeout. It goes on.
            UnknownResultError: nothing is known of it: it had no `keep`, or that is over.
            ClientClosedError: the client was closed meanwhile.
            ValueError: an invalid id or timeout.
            psycopg.Error: the database's, if that is away for over 30 s.

        """
        check_name("id", id)
        return self._waiting.wait(id, timeout)

    def doctor(self, *checks: str, limits: Limits = LIMITS) -> list[Finding]:
        """Look for what is wrong with the database, and return findings with their remedies.

        Changes nothing. Some 30 statements, each in a transaction of its own, which takes at
        most 5 s and waits at most 1 s for a lock. One of them reads the table of jobs
        once, up to 1 GB: about a second at a million jobs.

        Any role may call it. A check that needs a privilege which this role does not have
        becomes a finding that says so; `bgjob_operator` of privileges.sql has all.

        Args:
            checks: the names of the checks, such as "horizon"; by default all. The
                operations guide lists them.
            limits: what counts as too much.

        Returns:
            The findings in the order of the checks, at least one for each; what is as it
            should be is a finding with the severity "ok". `bgjob.doctor.exit_status`
            makes one number of them.

        Raises:
            ValueError: there is no check of this name.
            psycopg.Error: the server cannot be reached.

        """
        from bgjob._diagnosis.checks import examine

        with self._connection(None) as connection:
            steps = examine(
                checks,
                limits,
                pid=connection.info.backend_pid,
                prepares=connection.prepare_threshold is not None,
            )
            return drive(steps, partial(_execute_both, connection, bounds()))

    def measure(self, *, cap: int = 10_000) -> Measurements:
        """Measure queues, workers, schedules and tables, for an exporter of metrics.

        Changes nothing. Seven statements, each in a transaction of its own, which takes at most
        5 s and waits at most 1 s for a lock. None of them reads a table from end to end.
        `bgjob.ext.prometheus.DatabaseMetrics` makes metrics of it.

        Any role may call it: a part that needs a privilege which this role does not have is
        named in `failures`. `bgjob_operator` of privileges.sql has all.

        Args:
            cap: the number of jobs after which each count of a queue stops, as for
                `overview`; 10,000 by default.

        Raises:
            ValueError: a cap below 1.
            psycopg.Error: the server cannot be reached.

        """
        from bgjob._diagnosis.measuring import measure

        _check_cap(cap)
        with self._connection(None) as connection:
            before = bounds("bgjob metrics")
            return drive(measure(cap), partial(_execute_both, connection, before))

    def explain(
        self,
        id: str | None = None,  # noqa: A002
        *,
        queue: str | None = None,
    ) -> Explanation:
        """Return why a job does not run: every reason that holds, with its remedy.

        Changes nothing, and locks nothing. Up to ten statements, each in a transaction of its
        own, which takes at most 5 s. Each reads a few rows, or up to 20,000 where it counts
        the jobs that come first, however many there are. What the workers do is as they
        last wrote it, at most 10 s ago.

        It needs the privileges of `bgjob_operator`. Without those on jobs it raises; of what
        else this role may not read, a reason says that it was not looked at.

        Args:
            id: the job's id. A job that is completed does not exist any more.
            queue: instead of an id: explain the job of this queue that has been due for
                longest.

        Returns:
            The reasons, in the order in which they matter; the operations guide lists them.
            At least one: a job that runs, is ready, is dead or does not exist has one for
            that.

        Raises:
            TypeError: neither an id nor a queue is given, or both are.
            ValueError: an invalid id or name of a queue.
            psycopg.Error: the database's.

        """
        steps = _explaining(id, queue)
        with self._connection(None) as connection:
            before = bounds("bgjob explain")
            return drive(steps, partial(_execute_both, connection, before))

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
        self._waiting.close()
        if "_do" in vars(self):
            self._do.close()
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x}>"  # never the connection string

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
        pool: Any = self._pool
        pooled = pool.take()
        try:
            with _autocommit(pooled):
                yield pooled
        except ReadOnlySqlTransaction:
            pooled.close()  # its server is not a primary any more: the next one may be
            raise
        finally:
            pool.release(pooled)

    def _run(
        self,
        statement: Statement[T],
        conn: psycopg.Connection[Any] | None,
        *,
        before: Statement[None] | None = None,
    ) -> T:
        if conn is not None:
            if not isinstance(conn, psycopg.Connection):
                raise TypeError(not_a_connection(conn, psycopg.Connection))
            return _execute(conn, statement)
        if before is not None:
            both = partial(_execute_both, before=before, statement=statement)
            return self._on_own(both)
        return self._on_own(partial(_execute, statement=statement))

    def _on_own(self, send: Callable[[psycopg.Connection[Any]], T]) -> T:
        """Send a statement on a connection of the client's, again if nothing was written."""
        pool: Any = self._pool
        repetitions = 0
        while True:
            pooled = pool.take()
            try:
                if pooled.autocommit:  # those of its own pool: a context manager takes 7 µs
                    return send(pooled)
                with _autocommit(pooled):
                    return send(pooled)
            except _NOTHING_WRITTEN as error:
                if isinstance(error, ReadOnlySqlTransaction):
                    pooled.close()  # as above
                if (repetitions := repetitions + 1) > _REPETITIONS:
                    raise
            finally:
                pool.release(pooled)

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
        if asked := asked_settings(connection.info.options):
            check_lost(run(connection, lost(asked)))


@contextmanager
def _autocommit(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Put a connection into autocommit: a statement is a transaction and one round trip."""
    # pool.connection() would commit, with nothing to commit.
    if connection.autocommit:
        yield
        return
    connection.set_autocommit(True)
    try:
        yield
    finally:
        if connection.info.transaction_status == TransactionStatus.IDLE:
            connection.set_autocommit(False)


@contextmanager
def _levelled(connection: psycopg.Connection[Any], *, is_own: bool) -> Iterator[None]:
    """Begin transactions as read committed, whatever a borrowed pool's level is."""
    level = connection.isolation_level
    if not is_own or level == IsolationLevel.READ_COMMITTED:
        yield
        return
    connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
    try:
        yield
    finally:
        if connection.info.transaction_status == TransactionStatus.IDLE:
            connection.set_isolation_level(level)


def _execute(connection: psycopg.Connection[Any], statement: Statement[T]) -> T:
    cursor = Cursor(connection)  # whatever factories the caller's connection has
    try:
        send(cursor, statement)
    except UNENCODABLE as error:
        raise unencodable(connection, (statement.params or {}).values(), error) from error
    except MIXED_UP as error:
        raise mixed_up() from error
    return read(cursor, statement)


def _insert(connection: psycopg.Connection[Any], request: EnqueueRequest, *, notify: bool) -> bool:
    if request.is_plain and isinstance(connection, PooledConnection):
        try:
            is_written = insert(connection, request, notify=notify)
        except UNENCODABLE as error:
            names = request.id, request.queue, request.type
            raise unencodable(connection, names, error) from error
        except MIXED_UP as error:
            raise mixed_up() from error
        if is_written is not None:
            return is_written
    return _execute(connection, enqueues.enqueue(request, notify=notify))


def _insert_many(
    connection: psycopg.Connection[Any], requests: Sequence[EnqueueRequest], *, notify: bool
) -> set[str]:
    if isinstance(connection, PooledConnection) and all(r.is_plain for r in requests):
        written = insert_any(connection, requests, notify=notify)
        if written is not None:
            return written
    return _execute(connection, enqueues.enqueue_many(requests, notify=notify))


def _insert_all(
    connection: psycopg.Connection[Any], requests: Sequence[EnqueueRequest], *, notify: bool
) -> bool:
    """Write jobs by one statement; False if it cannot, and nothing was written.

    Ids of the program's are left to an insert that does not fail where one is taken: each
    failure is an error in the server's log.
    """
    if not requests or not all(map(may_share, requests)):
        return False
    try:
        if (
            isinstance(connection, PooledConnection)
            and _are_plain_in_order(requests)
            and insert_all(connection, requests, notify=notify)
        ):
            return True
        statement = enqueues.enqueue_many(requests, notify=notify, skips_taken=False)
        _execute(connection, statement)
    except MIXED_UP as error:
        raise mixed_up() from error
    except (UniqueViolation, *UNENCODABLE):
        return False  # which id is taken, or which name cannot be stored, another insert tells
    return True


def _execute_both(
    connection: psycopg.Connection[Any], before: Statement[None], statement: Statement[T]
) -> T:
    """Send two statements together, which makes them one transaction; return the second's."""
    try:
        with connection.pipeline():
            cursors = send_all(connection, [before, statement])
    except UNENCODABLE as error:
        raise unencodable(connection, (statement.params or {}).values(), error) from error
    return read(cursors[1], statement)


# -- both colours ----------------------------------------------------------------------


def _are_plain_in_order(requests: Sequence[EnqueueRequest]) -> bool:
    # In any other order two calls with the same ids may deadlock.
    ids = [request.id for request in requests]
    return ids == sorted(ids) and all(request.is_plain for request in requests)


def _connection_parameters(
    source: AsyncSource | ConnectionPool[Any] | AsyncConnectionPool[Any],
) -> ConnectionParameters:
    if not isinstance(source, ConnectionPool | AsyncConnectionPool):
        return source, {}
    cls: Any = source.connection_class
    if (get_origin(cls) or cls) not in (psycopg.Connection, psycopg.AsyncConnection):
        raise TypeError(
            "a worker opens connections of its own, and cannot make them of this pool's "
            f"connection_class {cls.__qualname__}: give the worker's Client a connection string, "
            "or a function that returns the connection parameters"
        )
    return source.conninfo or "", source.kwargs or {}


_BEGIN = "select"
"""Any statement begins a transaction on a connection that is not in autocommit."""


def _may_begin(conn: BaseConnection[Any]) -> bool:
    # conn.transaction() commits a transaction that it began. Only the caller may commit
    # the caller's transaction, so it must have begun before.
    return not conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE


def _copy_of(
    connection: BaseConnection[Any], chunk: list[EnqueueRequest], group: str | None
) -> enqueues.Copy | None:
    if len(chunk) < _FEW or connection.pgconn.pipeline_status != PipelineStatus.OFF:
        return None
    return enqueues.copy_many(chunk, group)


@contextmanager
def _conflicts(ids: Sequence[str], conn: BaseConnection[Any] | None) -> Iterator[None]:
    """Raise an EnqueueConflictError if the caller's transaction cannot be serialized."""
    try:
        yield
    except SerializationFailure as error:
        if conn is None:
            raise
        raise EnqueueConflictError(ids) from error


def _check_cap(cap: int) -> None:
    if cap < 1:
        raise ValueError(f"cap must be a number from 1, not {cap!r}")


def _explaining(id_: str | None, queue: str | None) -> Steps:
    from bgjob._explanation.steps import explain, explain_queue

    if id_ is None and queue is not None:
        check_name("queue", queue)
        return explain_queue(queue)
    if id_ is None or queue is not None:
        raise TypeError("give the id of a job, or a queue: explain(id), or explain(queue=…)")
    check_name("id", id_)
    return explain(id_)


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
