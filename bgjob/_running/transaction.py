"""The transactions of handlers: one takes the steps of `transaction_steps` on a session."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Sequence
from math import inf
from typing import Any, TypeVar

import psycopg
from psycopg.pq import DiagnosticField, Escaping, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from bgjob._handlers.route import Route
from bgjob._postgres.commands import check, execute, results_of
from bgjob._postgres.connection import WORKER_PATIENCE, ConnectionParameters
from bgjob._postgres.cursor import AsyncCursor, Cursor, client_codec, server_codec
from bgjob._postgres.fork import ForkGuard
from bgjob._running.drive import drive, drive_async
from bgjob._running.ending import Ending, NotBegun
from bgjob._running.sessions import (
    AsyncHandlerConnection,
    Following,
    HandlerConnection,
    Sessions,
    deallocate,
    is_over,
)
from bgjob._running.transaction_steps import (
    Call,
    End,
    Finish,
    Settle,
    Settled,
    TransactionStep,
    in_transaction,
)
from bgjob._sql.execute import read_all, read_all_async, send_all, send_all_async
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob._sql.transactions import (
    COMMIT,
    PREPARE,
    PREPARED,
    ROLLBACK,
    ROLLBACK_TO_SAVEPOINT,
    begin,
    claim_of_transaction,
    complete_and_commit,
)
from bgjob.job import Job

T = TypeVar("T")


def _end_with_sync(pipeline: Any) -> None:
    """Make a pipeline send nothing after its Sync.

    psycopg also sends a Flush. The server takes that for the next command: it stops the timer of
    idle_in_transaction_session_timeout, and starts it only with its next answer. A worker that
    vanished here would keep the job's row, and the handler's locks, forever.
    """
    pipeline._exit_gen = pipeline._sync_gen  # noqa: SLF001


class Transactions(Sessions):
    """Runs transactional handlers, each in a session of its own. Thread-safe."""

    def __init__(
        self,
        connection_parameters: ConnectionParameters,
        fork_guard: ForkGuard,
        *,
        prepares: bool = True,
    ) -> None:
        super().__init__(connection_parameters, prepares=prepares)
        self.fork_guard = fork_guard

    def _begin(
        self,
        connection: HandlerConnection | AsyncHandlerConnection,
        claimed: Claimed,
        *,
        is_new: bool = False,
    ) -> bytes:
        """Return the statements that begin a handler's transaction.

        They prepare what its end executes, unless the session is new and may be used only once.
        """
        session = connection.pgconn
        text = begin(
            claimed,
            over_tcp=not session.host.startswith(b"/"),
            server_version=session.server_version,
            codec=server_codec(connection),
        )
        if self.prepares and not (connection.is_prepared or is_new):
            text = PREPARE + text
            connection.is_prepared = True
        return text

    # -- async -------------------------------------------------------------------------

    async def run_async(
        self,
        route: Route,
        claimed: Claimed,
        started: Callable[[Job], None] | None = None,
        following: Following | None = None,
    ) -> Ending:
        """Run a handler; its exceptions become results.

        Args:
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.
            following: the next job of the same slot, whose transaction may begin with this one's
                commit; and this job's, if that has begun so.

        """
        return await self.run_steps_async(
            in_transaction(route, claimed), route, claimed, started, following=following
        )

    async def run_steps_async(
        self,
        steps: Generator[TransactionStep, Any, T],
        route: Route,
        claimed: Claimed,
        started: Callable[[Job], None] | None = None,
        jobs: list[Job] | None = None,
        following: Following | None = None,
    ) -> T | NotBegun:
        """Run a handler in a transaction, whose session has the name of this claim.

        Args:
            steps: what to do in the transaction.
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.
            jobs: the argument of a batch handler.
            following: see `run_async`.

        """
        try:
            if following is None or following.session is None:
                connection = await self.begin_async(claimed)
            else:
                connection = self._begun_async(claimed, following)
        except BaseException as error:
            return NotBegun(error)
        if started is not None:
            started(claimed.job)
        try:
            ending = await drive_async(
                steps,
                lambda step: self._take_async(
                    step, connection, route, jobs or claimed.job, following
                ),
            )
        except BaseException:
            await connection.close()
            raise
        if connection.has_begun_next and following is not None:
            self.keep_begun(connection, following)
        elif connection.has_committed and is_over(connection):
            self.keep(connection)
        else:
            await connection.close()
        return ending

    async def _take_async(
        self,
        step: TransactionStep,
        connection: AsyncHandlerConnection,
        route: Route,
        job: Job | list[Job],
        following: Following | None,
    ) -> object:
        match step:
            case Call():
                async with self.lent_async(connection):
                    return await route.awaited(job, connection)
            case Finish(claims):
                return await self._finish_async(connection, claims, following)
            case Settle(statements):
                return await self.settle_async(connection, statements)
            case End.COMMIT:
                await self.commit_async(connection)
            case End.ROLLBACK:
                if connection.ended_by is not None:
                    return connection.ended_by
                with contextlib.suppress(psycopg.Error):
                    cursor = AsyncCursor(connection)
                    await cursor.execute(ROLLBACK, prepare=False)
                    cursor.nextset()
                    rows = await cursor.fetchall()
                    return rows[0][0] or ""
        return None

    async def begin_async(self, claimed: Claimed) -> AsyncHandlerConnection:
        """Return a connection with an open transaction, which is marked with the claim."""

        async def begin(connection: AsyncHandlerConnection) -> None:
            connection.token = str(claimed.token)
            text = self._begin(connection, claimed, is_new=connection.is_new)
            await connection.wait(execute(connection.pgconn, text))

        connection, _ = await self.open_async(begin)
        return connection

    def _begun_async(self, claimed: Claimed, following: Following) -> AsyncHandlerConnection:
        """Return a connection with the transaction that has begun with the last one's commit."""
        idle, following.session = following.session, None
        assert idle is not None  # noqa: S101 (its caller has looked)
        connection = self._opened_async(idle)
        connection.token, connection.patience = str(claimed.token), WORKER_PATIENCE
        return connection

    @contextlib.asynccontextmanager
    async def lent_async(self, connection: AsyncHandlerConnection) -> AsyncIterator[None]:
        """Lend the connection to a handler."""
        connection.patience = inf  # its statements may take long
        self._handling.add(connection)
        try:
            yield
        finally:
            if self.fork_guard.is_child:
                self.fork_guard.end(sys.exc_info()[1])
            self._handling.discard(connection)
            connection.user, connection.patience = asyncio.current_task(), WORKER_PATIENCE

    async def settle_async(
        self, connection: AsyncHandlerConnection, statements: Sequence[Statement[list[str]]]
    ) -> Settled | None:
        """Send statements that settle jobs; None if the handler has ended the transaction."""
        if is_over(connection):
            return None
        settling = (claim_of_transaction(), *statements)
        async with connection.pipeline() as pipeline:
            _end_with_sync(pipeline)
            cursors = await send_all_async(connection, settling)
        # After the end of the pipeline: to read within it takes a round trip more.
        token, *settled = await read_all_async(cursors, settling)
        return Settled(token, [id_ for ids in settled for id_ in ids])

    async def _finish_async(
        self,
        connection: AsyncHandlerConnection,
        claims: Sequence[Claimed],
        following: Following | None,
    ) -> bool:
        if connection.pgconn.transaction_status != TransactionStatus.INTRANS:
            return False  # the handler has ended it, or an error has
        try:
            text = _complete_and_commit(connection, claims)
        except UnicodeEncodeError:
            return False
        has_plans = connection.is_prepared
        reset = self.reset(keeps_plans=has_plans)
        claimed = None if following is None else following.reserve()
        if claimed is None:
            text += b"; " + reset
        else:
            # A begin alone would make the reset a part of the transaction that it begins.
            text += b"; begin; " + reset + b"; commit; " + self._begin(connection, claimed)
        next_has_plans, connection.is_prepared = connection.is_prepared, has_plans
        async with connection.lock:
            results = await connection.wait(results_of(connection.pgconn, text))
            if not _has_committed(connection, results):
                with contextlib.suppress(psycopg.Error):  # a lost one is the next step's
                    await connection.wait(execute(connection.pgconn, ROLLBACK_TO_SAVEPOINT))
                return False
            connection.has_committed = True
            # With a begin behind them the names are the last rows.
            rows = [result for result in results if result.status == ExecStatus.TUPLES_OK]
            is_listed = claimed is not None and has_plans and not is_over(connection)
            left = _left(connection, rows[-1] if is_listed else results[-1])
            connection.left, connection.is_prepared = left, next_has_plans
            if not is_over(connection) and left is not None:
                if left:
                    with contextlib.suppress(psycopg.Error):
                        drop = deallocate(connection.pgconn, left)
                        await connection.wait(execute(connection.pgconn, drop))
                status = connection.pgconn.transaction_status
                connection.has_begun_next = status == TransactionStatus.INTRANS
        return True

    async def commit_async(self, connection: AsyncHandlerConnection) -> None:
        """Commit, and reset the session.

        In one message, since behind a pooler the next may reach another session. A mark that is
        left would tell the next handler of this claim that it has committed.
        """
        text = COMMIT + b"; " + self.reset(keeps_plans=connection.is_prepared)
        async with connection.lock:
            results = await connection.wait(results_of(connection.pgconn, text))
        if not any(result.command_status == b"COMMIT" for result in results):
            check(connection.pgconn, results[-1])
        connection.has_committed = True
        connection.left = _left(connection, results[-1])

    # -- sync: made from the async text by .ci/colours.py; do not edit -----------------

    def run(
        self,
        route: Route,
        claimed: Claimed,
        started: Callable[[Job], None] | None = None,
        following: Following | None = None,
    ) -> Ending:
        """Run a handler; its exceptions become results.

        Args:
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.
            following: the next job of the same slot, whose transaction may begin with this one's
                commit; and this job's, if that has begun so.

        """
        return self.run_steps(
            in_transaction(route, claimed), route, claimed, started, following=following
        )

    def run_steps(
        self,
        steps: Generator[TransactionStep, Any, T],
        route: Route,
        claimed: Claimed,
        started: Callable[[Job], None] | None = None,
        jobs: list[Job] | None = None,
        following: Following | None = None,
    ) -> T | NotBegun:
        """Run a handler in a transaction, whose session has the name of this claim.

        Args:
            steps: what to do in the transaction.
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.
            jobs: the argument of a batch handler.
            following: see `run`.

        """
        try:
            if following is None or following.session is None:
                connection = self.begin(claimed)
            else:
                connection = self._begun(claimed, following)
        except BaseException as error:
            return NotBegun(error)
        if started is not None:
            started(claimed.job)
        try:
            ending = drive(
                steps,
                lambda step: self._take(step, connection, route, jobs or claimed.job, following),
            )
        except BaseException:
            connection.close()
            raise
        if connection.has_begun_next and following is not None:
            self.keep_begun(connection, following)
        elif connection.has_committed and is_over(connection):
            self.keep(connection)
        else:
            connection.close()
        return ending

    def _take(
        self,
        step: TransactionStep,
        connection: HandlerConnection,
        route: Route,
        job: Job | list[Job],
        following: Following | None,
    ) -> object:
        match step:
            case Call():
                with self.lent(connection):
                    return route.handler(job, connection)
            case Finish(claims):
                return self._finish(connection, claims, following)
            case Settle(statements):
                return self.settle(connection, statements)
            case End.COMMIT:
                self.commit(connection)
            case End.ROLLBACK:
                if connection.ended_by is not None:
                    return connection.ended_by
                with contextlib.suppress(psycopg.Error):
                    cursor = Cursor(connection)
                    cursor.execute(ROLLBACK, prepare=False)
                    cursor.nextset()
                    rows = cursor.fetchall()
                    return rows[0][0] or ""
        return None

    def begin(self, claimed: Claimed) -> HandlerConnection:
        """Return a connection with an open transaction, which is marked with the claim."""

        def begin(connection: HandlerConnection) -> None:
            connection.token = str(claimed.token)
            text = self._begin(connection, claimed, is_new=connection.is_new)
            connection.wait(execute(connection.pgconn, text))

        connection, _ = self.open(begin)
        return connection

    def _begun(self, claimed: Claimed, following: Following) -> HandlerConnection:
        """Return a connection with the transaction that has begun with the last one's commit."""
        idle, following.session = following.session, None
        assert idle is not None  # noqa: S101 (its caller has looked)
        connection = self._opened(idle)
        connection.token, connection.patience = str(claimed.token), WORKER_PATIENCE
        return connection

    @contextlib.contextmanager
    def lent(self, connection: HandlerConnection) -> Iterator[None]:
        """Lend the connection to a handler."""
        connection.patience = inf  # its statements may take long
        self._handling.add(connection)
        try:
            yield
        finally:
            if self.fork_guard.is_child:
                self.fork_guard.end(sys.exc_info()[1])
            self._handling.discard(connection)
            connection.user, connection.patience = threading.get_ident(), WORKER_PATIENCE

    def settle(
        self, connection: HandlerConnection, statements: Sequence[Statement[list[str]]]
    ) -> Settled | None:
        """Send statements that settle jobs; None if the handler has ended the transaction."""
        if is_over(connection):
            return None
        settling = (claim_of_transaction(), *statements)
        with connection.pipeline() as pipeline:
            _end_with_sync(pipeline)
            cursors = send_all(connection, settling)
        # After the end of the pipeline: to read within it takes a round trip more.
        token, *settled = read_all(cursors, settling)
        return Settled(token, [id_ for ids in settled for id_ in ids])

    def _finish(
        self,
        connection: HandlerConnection,
        claims: Sequence[Claimed],
        following: Following | None,
    ) -> bool:
        if connection.pgconn.transaction_status != TransactionStatus.INTRANS:
            return False  # the handler has ended it, or an error has
        try:
            text = _complete_and_commit(connection, claims)
        except UnicodeEncodeError:
            return False
        has_plans = connection.is_prepared
        reset = self.reset(keeps_plans=has_plans)
        claimed = None if following is None else following.reserve()
        if claimed is None:
            text += b"; " + reset
        else:
            # A begin alone would make the reset a part of the transaction that it begins.
            text += b"; begin; " + reset + b"; commit; " + self._begin(connection, claimed)
        next_has_plans, connection.is_prepared = connection.is_prepared, has_plans
        with connection.lock:
            results = connection.wait(results_of(connection.pgconn, text))
            if not _has_committed(connection, results):
                with contextlib.suppress(psycopg.Error):  # a lost one is the next step's
                    connection.wait(execute(connection.pgconn, ROLLBACK_TO_SAVEPOINT))
                return False
            connection.has_committed = True
            # With a begin behind them the names are the last rows.
            rows = [result for result in results if result.status == ExecStatus.TUPLES_OK]
            is_listed = claimed is not None and has_plans and not is_over(connection)
            left = _left(connection, rows[-1] if is_listed else results[-1])
            connection.left, connection.is_prepared = left, next_has_plans
            if not is_over(connection) and left is not None:
                if left:
                    with contextlib.suppress(psycopg.Error):
                        drop = deallocate(connection.pgconn, left)
                        connection.wait(execute(connection.pgconn, drop))
                status = connection.pgconn.transaction_status
                connection.has_begun_next = status == TransactionStatus.INTRANS
        return True

    def commit(self, connection: HandlerConnection) -> None:
        """Commit, and reset the session.

        In one message, since behind a pooler the next may reach another session. A mark that is
        left would tell the next handler of this claim that it has committed.
        """
        text = COMMIT + b"; " + self.reset(keeps_plans=connection.is_prepared)
        with connection.lock:
            results = connection.wait(results_of(connection.pgconn, text))
        if not any(result.command_status == b"COMMIT" for result in results):
            check(connection.pgconn, results[-1])
        connection.has_committed = True
        connection.left = _left(connection, results[-1])


# -- both colours ----------------------------------------------------------------------


def _has_committed(connection: psycopg.BaseConnection[Any], results: Sequence[PGresult]) -> bool:
    """Whether the jobs were deleted, and that is committed; raise why it is not, or may not be.

    False if the deletion was refused, or what comes before it.
    """
    if any(result.command_status == b"COMMIT" for result in results):
        return True
    error = results[-1]
    is_deleted = any(result.status == ExecStatus.TUPLES_OK for result in results)
    if is_deleted or not error.error_field(DiagnosticField.SQLSTATE):  # or it is not the server's
        check(connection.pgconn, error)
    return False


def _left(
    connection: HandlerConnection | AsyncHandlerConnection, last: PGresult
) -> Collection[bytes] | None:
    """Return the prepared statements that the handler has left; None if the reset has failed."""
    if not connection.is_prepared:
        return None if last.status == ExecStatus.FATAL_ERROR else ()
    names = last.get_value(0, 0) if last.status == ExecStatus.TUPLES_OK else None
    left = {*(names or b"").split(b",")}
    return left - PREPARED if left >= PREPARED else None


def _complete_and_commit(
    connection: HandlerConnection | AsyncHandlerConnection, claims: Sequence[Claimed]
) -> bytes:
    return complete_and_commit(
        claims,
        Escaping(connection.pgconn).escape_literal,
        client_codec(connection),
        is_prepared=connection.is_prepared,
    )
