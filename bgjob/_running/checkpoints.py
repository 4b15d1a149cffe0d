"""Where the checkpoint of a running job is kept: in its row, under the token of its claim.

It is fetched before the handler is called, and only for a handler that has a checkpoint: the
claim does not return it. A save takes a session of the worker's for one round trip, one of those
that transactional handlers use. So it waits neither for a connection of the client's pool, which
handlers may have taken, nor for another handler. A `transaction` has its session until its end,
and begins, is fenced and commits like that of a transactional handler; see `transaction`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic, sleep
from typing import TypeVar

import psycopg
from psycopg.errors import ReadOnlySqlTransaction

from bgjob._postgres.cursor import AsyncCursor, Cursor
from bgjob._running.ending import NotBegun
from bgjob._running.sessions import AsyncHandlerConnection, HandlerConnection
from bgjob._running.transaction import Transactions
from bgjob._sql.execute import read, read_async, send, send_async
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob._sql.transactions import checkpoint, save_checkpoint
from bgjob.checkpoint import (
    AsyncSaving,
    CommitUnknownError,
    Saving,
    TransactionEndedError,
)
from bgjob.errors import BgjobError, LeaseLostError

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds before a save is tried again; doubles."""

_AWAY = (psycopg.OperationalError, ReadOnlySqlTransaction)
"""The errors of a server that is away, or not the primary any more."""

_BEGIN = b"begin isolation level read committed"


# -- async -----------------------------------------------------------------------------


class AsyncSessionStore:
    """The checkpoint of one run of a job.

    Args:
        sessions: where it gets a session for each call.
        claimed: the job.
        lease: seconds to which a save extends the lease, and for which it is tried again.
        is_stopping: whether the handler should end.

    """

    def __init__(
        self,
        sessions: Transactions,
        claimed: Claimed,
        *,
        lease: float,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sessions = sessions
        self._claimed = claimed
        self._lease = lease
        self._is_stopping = is_stopping
        self._open: AsyncHandlerConnection | None = None
        self.data: bytes | None = None

    @property
    def is_stopping(self) -> bool:
        """Whether the handler should end."""
        return self._is_stopping()

    async def load(self) -> NotBegun | None:
        """Fetch what was saved last, before the handler begins; return why that failed."""
        try:
            found = await self._run(checkpoint(self._claimed))
            if not found:
                return NotBegun(lost(self._claimed, "it had not started"))
        except BaseException as error:
            return NotBegun(error)
        [self.data] = found
        return None

    async def save(self, data: bytes) -> None:
        """Store bytes, and extend the lease; raise LeaseLostError if the job is not held."""
        statement = save_checkpoint(self._claimed, data, lease=self._lease)
        # Repeated after an answer was lost, it stores the same.
        if not await self._patiently(lambda: self._run(statement)):
            raise lost(self._claimed, "nothing was saved")
        self.data = data

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSaving]:
        """Open a transaction that commits with the bytes, if the job is still held."""
        sessions, claimed = self._sessions, self._claimed
        connection = await self._patiently(self._begin)
        try:
            self._open, saving = connection, AsyncSaving(connection)
            sessions.lend(connection)
            try:
                yield saving
            finally:
                sessions.take_back_async(connection)
            statement = save_checkpoint(claimed, saving.data, lease=self._lease)
            settled = await sessions.settle_async(connection, [statement])
            if settled is None or settled.token != connection.token:
                raise ended(claimed)
            if not settled.ids:
                raise lost(claimed, "the transaction was rolled back")
            try:
                await sessions.commit_async(connection)
            except BaseException as error:
                raise CommitUnknownError(error) from error
        except psycopg.OperationalError as error:
            await sessions.discard_async(connection, claimed)
            if await self._is_lost():  # and the worker that freed the job has ended the session
                raise lost(claimed, "the transaction was rolled back") from error
            raise
        except BaseException:
            await sessions.discard_async(connection, claimed)
            raise
        finally:
            self._open = None
        sessions.keep(connection)
        if saving.data is not None:
            self.data = saving.data

    async def end(self) -> None:
        """Roll back a transaction that the handler has left open."""
        if self._open is not None:
            await self._open.close()

    async def _is_lost(self) -> bool:
        try:
            return not await self._run(checkpoint(self._claimed))
        except psycopg.Error:
            return False

    async def _begin(self) -> AsyncHandlerConnection:
        self._check_process()
        return await self._sessions.begin_async(self._claimed)

    async def _run(self, statement: Statement[T]) -> T:
        """Run a statement in one round trip, as a transaction that no setting makes fail."""
        self._check_process()

        async def use(connection: AsyncHandlerConnection) -> T:
            async with connection.pipeline():
                await AsyncCursor(connection).execute(_BEGIN, prepare=False)
                cursor = await send_async(AsyncCursor(connection), statement)
                await AsyncCursor(connection).execute(b"commit", prepare=False)
            return await read_async(cursor, statement)

        connection, answer = await self._sessions.open_async(use)
        self._sessions.keep(connection)
        return answer

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what a call returns; while the server is away, try it for a lease's time."""
        end, pause = monotonic() + self._lease, _FIRST_PAUSE
        while True:
            try:
                return await call()
            except _AWAY:
                if monotonic() + pause >= end:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _check_process(self) -> None:
        if self._sessions.fork_guard.is_child:
            raise BgjobError(
                "a checkpoint belongs to the process of its worker, not to a fork of it"
            )


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class SessionStore:
    """The checkpoint of one run of a job.

    Args:
        sessions: where it gets a session for each call.
        claimed: the job.
        lease: seconds to which a save extends the lease, and for which it is tried again.
        is_stopping: whether the handler should end.

    """

    def __init__(
        self,
        sessions: Transactions,
        claimed: Claimed,
        *,
        lease: float,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sessions = sessions
        self._claimed = claimed
        self._lease = lease
        self._is_stopping = is_stopping
        self._open: HandlerConnection | None = None
        self.data: bytes | None = None

    @property
    def is_stopping(self) -> bool:
        """Whether the handler should end."""
        return self._is_stopping()

    def load(self) -> NotBegun | None:
        """Fetch what was saved last, before the handler begins; return why that failed."""
        try:
            found = self._run(checkpoint(self._claimed))
            if not found:
                return NotBegun(lost(self._claimed, "it had not started"))
        except BaseException as error:
            return NotBegun(error)
        [self.data] = found
        return None

    def save(self, data: bytes) -> None:
        """Store bytes, and extend the lease; raise LeaseLostError if the job is not held."""
        statement = save_checkpoint(self._claimed, data, lease=self._lease)
        # Repeated after an answer was lost, it stores the same.
        if not self._patiently(lambda: self._run(statement)):
            raise lost(self._claimed, "nothing was saved")
        self.data = data

    @contextmanager
    def transaction(self) -> Iterator[Saving]:
        """Open a transaction that commits with the bytes, if the job is still held."""
        sessions, claimed = self._sessions, self._claimed
        connection = self._patiently(self._begin)
        try:
            self._open, saving = connection, Saving(connection)
            sessions.lend(connection)
            try:
                yield saving
            finally:
                sessions.take_back(connection)
            statement = save_checkpoint(claimed, saving.data, lease=self._lease)
            settled = sessions.settle(connection, [statement])
            if settled is None or settled.token != connection.token:
                raise ended(claimed)
            if not settled.ids:
                raise lost(claimed, "the transaction was rolled back")
            try:
                sessions.commit(connection)
            except BaseException as error:
                raise CommitUnknownError(error) from error
        except psycopg.OperationalError as error:
            sessions.discard(connection, claimed)
            if self._is_lost():  # and the worker that freed the job has ended the session
                raise lost(claimed, "the transaction was rolled back") from error
            raise
        except BaseException:
            sessions.discard(connection, claimed)
            raise
        finally:
            self._open = None
        sessions.keep(connection)
        if saving.data is not None:
            self.data = saving.data

    def end(self) -> None:
        """Roll back a transaction that the handler has left open."""
        if self._open is not None:
            self._open.close()

    def _is_lost(self) -> bool:
        try:
            return not self._run(checkpoint(self._claimed))
        except psycopg.Error:
            return False

    def _begin(self) -> HandlerConnection:
        self._check_process()
        return self._sessions.begin(self._claimed)

    def _run(self, statement: Statement[T]) -> T:
        """Run a statement in one round trip, as a transaction that no setting makes fail."""
        self._check_process()

        def use(connection: HandlerConnection) -> T:
            with connection.pipeline():
                Cursor(connection).execute(_BEGIN, prepare=False)
                cursor = send(Cursor(connection), statement)
                Cursor(connection).execute(b"commit", prepare=False)
            return read(cursor, statement)

        connection, answer = self._sessions.open(use)
        self._sessions.keep(connection)
        return answer

    def _patiently(self, call: Callable[[], T]) -> T:
        """Return what a call returns; while the server is away, try it for a lease's time."""
        end, pause = monotonic() + self._lease, _FIRST_PAUSE
        while True:
            try:
                return call()
            except _AWAY:
                if monotonic() + pause >= end:
                    raise
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _check_process(self) -> None:
        if self._sessions.fork_guard.is_child:
            raise BgjobError(
                "a checkpoint belongs to the process of its worker, not to a fork of it"
            )


# -- both colours ----------------------------------------------------------------------


def lost(claimed: Claimed, so: str) -> LeaseLostError:
    """Make the error of a job that its worker does not hold any more."""
    job = claimed.job
    return LeaseLostError(
        f"job {job.id!r} of type {job.type!r} is not held any more, {so}: its lease has ended, or "
        "it was cancelled. Let this error end the handler: what it returns is dropped"
    )


def ended(claimed: Claimed) -> TransactionEndedError:
    """Make the error of a handler that has ended the transaction of its checkpoint."""
    job = claimed.job
    return TransactionEndedError(
        f"the handler of job {job.id!r} of type {job.type!r} ended the transaction of its "
        "checkpoint, and anything that it committed stays; the job does not run again: leave "
        "commit and rollback to `with checkpoint.transaction()`"
    )
