"""The transactions of handlers: how a session takes the steps of `transaction_steps`.

The usual one ends with a single message, a completion: it deletes the jobs, commits, resets the
session, and may begin the transaction of a job that is reserved to run next (_worker/reservations).

The module has over 400 lines because both colours are here; only the async one is written.
"""

import asyncio
import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg.pq import Escaping, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult
from typing_extensions import override

from bgjob._handlers.route import Route
from bgjob._postgres.commands import check, execute, results_of
from bgjob._postgres.connection import WORKER_PATIENCE, ConnectionParameters
from bgjob._postgres.cursor import AsyncCursor, Cursor, client_codec, server_codec
from bgjob._postgres.fork import ForkGuard
from bgjob._postgres.messages import Messages
from bgjob._running.drive import drive, drive_async
from bgjob._running.ending import Ending, NotBegun
from bgjob._running.sessions import (
    AsyncHandlerConnection,
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
    SHOW_PREPARED,
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


class _Completion(NamedTuple):
    """The message that completes jobs, commits and resets the session."""

    text: bytes
    reserved: Claimed | None
    """The job whose transaction begins at its end, if any."""


class Transactions(Sessions):
    """Runs transactional handlers, each in a session of its own. Thread-safe."""

    def __init__(
        self,
        connection_parameters: ConnectionParameters,
        fork_guard: ForkGuard,
        *,
        prepares: bool = True,
        has_watch: bool = False,
    ) -> None:
        super().__init__(connection_parameters, prepares=prepares)
        self.fork_guard = fork_guard
        self.messages = Messages(has_watch=has_watch)
        self.severed: deque[Claimed] = deque()
        """The claims of transactions whose connections were lost: their sessions may go on."""

    # -- async -------------------------------------------------------------------------

    async def run_async(
        self,
        route: Route,
        claimed: Claimed,
        started: Callable[[Job], None] | None = None,
        reserve: Callable[[], Claimed | None] | None = None,
    ) -> Ending:
        """Run a handler; its exceptions become results.

        Args:
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.
            reserve: returns the job whose transaction is to begin in the message that commits
                this one's, if any.

        """
        steps = in_transaction(route, claimed, reserve)
        return await self.run_steps_async(steps, route, claimed, started)

    async def run_steps_async(
        self,
        steps: Generator[TransactionStep, Any, T],
        route: Route,
        claimed: Claimed,
        started: Callable[[Job], None] | None = None,
        jobs: list[Job] | None = None,
    ) -> T | NotBegun:
        """Run a handler in a transaction, whose session has the name of this claim.

        Args:
            steps: what to do in the transaction.
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.
            jobs: the argument of a batch handler.

        """
        try:
            connection = self.take_begun_async(claimed) or await self.begin_async(claimed)
        except BaseException as error:
            return NotBegun(error)
        if started is not None:
            started(claimed.job)
        try:
            ending = await drive_async(
                steps,
                partial(self._take_async, connection, route, jobs or claimed.job),
            )
        except BaseException:
            await self.discard_async(connection, claimed)
            raise
        if not self._keep_session(connection):
            await self.discard_async(connection, claimed)
        return ending

    async def _take_async(
        self,
        connection: AsyncHandlerConnection,
        route: Route,
        job: Job | list[Job],
        step: TransactionStep,
    ) -> object:
        match step:
            case Call():
                self.lend(connection)
                try:
                    return await route.awaited(job, connection)
                finally:
                    self.take_back_async(connection)
            case Finish():
                return await self._finish_async(connection, step)
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
            text = self._begin(connection, claimed)
            await connection.wait(execute(connection.pgconn, text))

        connection, _ = await self.open_async(begin)
        return connection

    async def discard_async(self, connection: AsyncHandlerConnection, claimed: Claimed) -> None:
        """Close a connection that is not kept, and note its claim if the connection was lost."""
        if connection.closed:
            self.severed.append(claimed)
        await connection.close()

    def take_back_async(self, connection: AsyncHandlerConnection) -> None:
        """End what `lend` has begun."""
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

    async def _finish_async(self, connection: AsyncHandlerConnection, step: Finish) -> bool:
        message = self._completion(connection, step)
        if message is None:
            return False
        async with connection.lock:
            last = await self.messages.last_result_async(connection, message.text)
            rest = self._answered(connection, message, last)
            if rest:
                try:
                    await connection.wait(execute(connection.pgconn, rest))
                except psycopg.Error:  # there is no savepoint, or no session any more
                    check(connection.pgconn, last)
        return connection.has_committed

    async def commit_async(self, connection: AsyncHandlerConnection) -> None:
        """Commit, and reset the session.

        In one message, since behind a pooler the next may reach another session. A mark that is
        left would tell the next handler of this claim that it has committed.
        """
        text = COMMIT + b"; " + self.reset(keeps_plans=connection.is_prepared)
        async with connection.lock:
            results = await connection.wait(results_of(connection.pgconn, text))
        if not _has_commit(results):
            check(connection.pgconn, results[-1])
        _committed(connection, results[-1])

    # -- sync: made from the async text by .ci/colours.py; do not edit -----------------

    def run(
        self,
        route: Route,
        claimed: Claimed,
        started: Callable[[Job], None] | None = None,
        reserve: Callable[[], Claimed | None] | None = None,
    ) -> Ending:
        """Run a handler; its exceptions become results.

        Args:
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.
            reserve: returns the job whose transaction is to begin in the message that commits
                this one's, if any.

        """
        steps = in_transaction(route, claimed, reserve)
        return self.run_steps(steps, route, claimed, started)

    def run_steps(
        self,
        steps: Generator[TransactionStep, Any, T],
        route: Route,
        claimed: Claimed,
        started: Callable[[Job], None] | None = None,
        jobs: list[Job] | None = None,
    ) -> T | NotBegun:
        """Run a handler in a transaction, whose session has the name of this claim.

        Args:
            steps: what to do in the transaction.
            route: the handler's route.
            claimed: the job.
            started: called when the transaction is open, before the handler.
            jobs: the argument of a batch handler.

        """
        try:
            connection = self.take_begun(claimed) or self.begin(claimed)
        except BaseException as error:
            return NotBegun(error)
        if started is not None:
            started(claimed.job)
        try:
            ending = drive(
                steps,
                partial(self._take, connection, route, jobs or claimed.job),
            )
        except BaseException:
            self.discard(connection, claimed)
            raise
        if not self._keep_session(connection):
            self.discard(connection, claimed)
        return ending

    def _take(
        self,
        connection: HandlerConnection,
        route: Route,
        job: Job | list[Job],
        step: TransactionStep,
    ) -> object:
        match step:
            case Call():
                self.lend(connection)
                try:
                    return route.handler(job, connection)
                finally:
                    self.take_back(connection)
            case Finish():
                return self._finish(connection, step)
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
            text = self._begin(connection, claimed)
            connection.wait(execute(connection.pgconn, text))

        connection, _ = self.open(begin)
        return connection

    def discard(self, connection: HandlerConnection, claimed: Claimed) -> None:
        """Close a connection that is not kept, and note its claim if the connection was lost."""
        if connection.closed:
            self.severed.append(claimed)
        connection.close()

    def take_back(self, connection: HandlerConnection) -> None:
        """End what `lend` has begun."""
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

    def _finish(self, connection: HandlerConnection, step: Finish) -> bool:
        message = self._completion(connection, step)
        if message is None:
            return False
        with connection.lock:
            last = self.messages.last_result(connection, message.text)
            rest = self._answered(connection, message, last)
            if rest:
                try:
                    connection.wait(execute(connection.pgconn, rest))
                except psycopg.Error:  # there is no savepoint, or no session any more
                    check(connection.pgconn, last)
        return connection.has_committed

    def commit(self, connection: HandlerConnection) -> None:
        """Commit, and reset the session.

        In one message, since behind a pooler the next may reach another session. A mark that is
        left would tell the next handler of this claim that it has committed.
        """
        text = COMMIT + b"; " + self.reset(keeps_plans=connection.is_prepared)
        with connection.lock:
            results = connection.wait(results_of(connection.pgconn, text))
        if not _has_commit(results):
            check(connection.pgconn, results[-1])
        _committed(connection, results[-1])

    # -- both colours ------------------------------------------------------------------

    @override
    def close(self) -> None:
        super().close()
        self.messages.close()

    def lend(self, connection: HandlerConnection | AsyncHandlerConnection) -> None:
        """Lend the connection to a handler, until `take_back`."""
        connection.patience = inf  # its statements may take long
        self._handling.add(connection)

    def _begin(
        self, connection: HandlerConnection | AsyncHandlerConnection, claimed: Claimed
    ) -> bytes:
        """Return the statements that begin a handler's transaction.

        They prepare what its end executes, unless the session is new and may be used only once.
        """
        prepares = self.prepares and not (connection.is_prepared or connection.is_new)
        connection.token = str(claimed.token)
        connection.is_prepared = connection.is_prepared or prepares
        return _begin(connection, claimed, prepares=prepares)

    def _completion(
        self, connection: HandlerConnection | AsyncHandlerConnection, step: Finish
    ) -> _Completion | None:
        """Return the message that completes jobs; None if no transaction can be committed."""
        if not _is_open(connection):
            return None  # the handler has ended it, or an error has
        has_plans = connection.is_prepared
        try:
            text = complete_and_commit(
                step.claims,
                Escaping(connection.pgconn).escape_literal,
                client_codec(connection),
                is_prepared=has_plans,
            )
        except UnicodeEncodeError:
            return None
        reset = self.reset(keeps_plans=has_plans)
        reserved = None if step.reserve is None else step.reserve()
        if reserved is None:
            return _Completion(text + b"; " + reset, None)
        begins = _begin(connection, reserved, prepares=self.prepares and not has_plans)
        # A begin alone would make the reset a part of the transaction that it begins.
        text += b"; begin; " + reset + b"; commit; " + begins
        return _Completion(text + SHOW_PREPARED if has_plans else text, reserved)

    def _answered(
        self,
        connection: HandlerConnection | AsyncHandlerConnection,
        message: _Completion,
        last: PGresult,
    ) -> bytes:
        """Record what the answer to a completion says; return the statements that must follow.

        After a deletion that was refused, the transaction can go on from the savepoint. If there is
        no such savepoint, the error came after the commit.

        Raises:
            psycopg.Error: why the commit failed, or may have failed.

        """
        if last.status == ExecStatus.FATAL_ERROR:
            if connection.pgconn.transaction_status != TransactionStatus.INERROR:
                check(connection.pgconn, last)
            return ROLLBACK_TO_SAVEPOINT
        _committed(connection, last)
        if message.reserved is None or connection.left is None or not _is_open(connection):
            return b""
        connection.next = message.reserved
        connection.is_prepared = connection.is_prepared or self.prepares
        return deallocate(connection.pgconn, connection.left)

    def _keep_session(self, connection: HandlerConnection | AsyncHandlerConnection) -> bool:
        """Keep the session of a handler that has ended. False if it is to be closed."""
        if not connection.has_committed:
            return False
        if is_over(connection):
            self.keep(connection)
        elif connection.next is not None and _is_open(connection):
            self.keep_begun(connection, connection.next)
        else:
            return False
        return True


def _begin(
    connection: HandlerConnection | AsyncHandlerConnection, claimed: Claimed, *, prepares: bool
) -> bytes:
    session = connection.pgconn
    text = begin(
        claimed,
        over_tcp=not session.host.startswith(b"/"),
        server_version=session.server_version,
        codec=server_codec(connection),
    )
    return PREPARE + text if prepares else text


def _is_open(connection: psycopg.BaseConnection[Any]) -> bool:
    return connection.pgconn.transaction_status == TransactionStatus.INTRANS


def _has_commit(results: Sequence[PGresult]) -> bool:
    return any(result.command_status == b"COMMIT" for result in results)


def _committed(connection: HandlerConnection | AsyncHandlerConnection, last: PGresult) -> None:
    """Record a commit, and which prepared statements the reset behind it has found.

    Args:
        connection: the connection.
        last: the last result: an error if the reset has failed, otherwise their names, if the
            session has any.

    """
    connection.has_committed = True
    if last.status == ExecStatus.FATAL_ERROR:
        connection.left = None
    elif not connection.is_prepared:
        connection.left = ()
    else:
        left = {*(last.get_value(0, 0) or b"").split(b",")}
        connection.left = left - PREPARED if left >= PREPARED else None
