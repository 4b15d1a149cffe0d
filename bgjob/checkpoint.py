"""What a long job has done so far: saved by its handler, and given to the next attempt.

    @mux.handler("import")
    def import_file(job: Job, checkpoint: Checkpoint[int]) -> Result | None:
        for number in range(checkpoint.value or 0, 200):
            with checkpoint.transaction() as conn:
                load_chunk(conn, number)
                checkpoint.save(number + 1)
            if checkpoint.stopping:
                return Reschedule(0)
        return None

A handler with a parameter `checkpoint` receives one: a Checkpoint if it is a plain function, an
AsyncCheckpoint if it is a coroutine function. The parameter's annotation names the type of the
value.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Generic, Protocol

from psycopg import AsyncConnection, Connection
from typing_extensions import TypeVar

from bgjob.codec import Codec
from bgjob.errors import BgjobError

__all__ = ["AsyncCheckpoint", "Checkpoint"]

T = TypeVar("T", default=Any)

_MOST = 1_000_000
"""Bytes: each save writes the whole value, and so does the server's log."""

_NOTHING: Any = object()


class CommitUnknownError(BgjobError):
    """The answer to a commit did not come; the handler is raised the cause."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(
            "whether its last transaction has committed is unknown; let the error end the "
            "handler: the next attempt is given the value that was stored"
        )
        self.cause = cause


class TransactionEndedError(BgjobError):
    """A handler ended the transaction that it was given."""


# -- async -----------------------------------------------------------------------------


class AsyncSaving:
    """An open transaction, and the bytes to save with it."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self.connection = connection
        self.data: bytes | None = None
        """None leaves the saved value as it is."""


class AsyncStore(Protocol):
    """Where the checkpoint of one run of a job is kept, under the token of its claim."""

    data: bytes | None
    """What was saved last."""

    @property
    def is_stopping(self) -> bool:
        """Whether the handler should end."""
        ...

    async def save(self, data: bytes) -> None:
        """Store bytes, and extend the lease; raise LeaseLostError if the job is not held."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[AsyncSaving]:
        """Open a transaction that commits with the bytes, if the job is still held."""
        ...

    async def end(self) -> None:
        """Roll back a transaction that the handler has left open."""
        ...


class AsyncCheckpoint(Generic[T]):
    """What the attempts of a job have saved.

    A retry, a worker's death, a deploy and a requeue keep it, and the job's completion drops
    it. Only its handler may use it, one call at a time.
    """

    def __init__(self, store: AsyncStore, codec: Codec[T], of: str) -> None:
        self._store = store
        self._codec = codec
        self._of = of
        self._value: T | None = None if store.data is None else codec.decode(store.data)
        self._saving: AsyncSaving | None = None
        self._unsaved: T = _NOTHING
        self._unusable: BgjobError | None = None

    @property
    def value(self) -> T | None:
        """The value that was saved last, by this attempt or an earlier one; None before.

        In a transaction it is the one from before until that has committed.
        """
        return self._value

    @property
    def stopping(self) -> bool:
        """Whether the handler should save and return. From any thread, without waiting.

        True once the worker shuts down: then `return Reschedule(0)` gives the job to the next
        worker, with its attempt and its checkpoint. Also true once the worker has given up this
        attempt, which was cancelled or has exceeded its timeout: what it returns is dropped. In
        `do` and `drain` it is False.
        """
        return self._store.is_stopping

    async def save(self, value: T) -> None:
        """Store a value for this attempt and the next ones, and extend the lease.

        It takes one round trip, on a session of the worker's and not on the client's pool, and
        is committed when it returns. Inside `transaction` it is stored when that commits. While
        the server cannot be reached it is tried again, for the length of a lease.

        If the call is cancelled, the value is stored or not.

        Args:
            value: at most 1,000,000 bytes as JSON: save where the work is, and write its data
                to tables of your own.

        Raises:
            LeaseLostError: the job is not this worker's any more: its lease has ended, or it
                was cancelled. Nothing was stored; let the error end the handler.
            PayloadError: the value does not match the annotation of the parameter.
            ValueError: it is too large.
            psycopg.Error: the database's. The value is stored or not.

        """
        data = self._encoded(value)
        self._check()
        if self._saving is not None:
            self._saving.data, self._unsaved = data, value
            return
        await self._store.save(data)
        self._value = value

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection[Any]]:
        """Open a transaction for a part of the work: `async with ... as conn`.

        The SQL on `conn`, the jobs that are enqueued with `conn=conn` and the value that `save`
        is given inside commit together at the end of the block, which also extends the lease.
        So each part has its effect once, however often its worker dies. An exception in the
        block rolls it back. The connection is one of the worker's; leave commit and rollback to
        the block.

        If the call is cancelled at its end, the transaction has committed or not.

        Raises:
            LeaseLostError: at the end: the job is not this worker's any more. The transaction
                is rolled back; let the error end the handler.
            BgjobError: another transaction of this checkpoint is open. Or whether one has
                committed is unknown, because the connection was lost: the next attempt knows.
            psycopg.Error: the database's.

        """
        self._check()
        if self._saving is not None:
            raise BgjobError(f"a transaction of the {self._of} is open: end it before the next one")
        try:
            async with self._store.transaction() as self._saving:
                self._unsaved = _NOTHING
                yield self._saving.connection
            if self._unsaved is not _NOTHING:
                self._value = self._unsaved
        except CommitUnknownError as error:
            self._unusable = error
            raise error.cause from error.cause.__cause__
        except TransactionEndedError as error:
            self._unusable = error
            raise
        finally:
            self._saving, self._unsaved = None, _NOTHING

    def _check(self) -> None:
        if self._unusable is not None:
            raise BgjobError(f"the {self._of} cannot be used: {self._unusable}")

    def _encoded(self, value: T) -> bytes:
        return _checked(self._codec.encode(value), self._of)


async def end_async(checkpoint: AsyncCheckpoint[Any]) -> TransactionEndedError | None:
    """Refuse later uses of a checkpoint: its handler has ended.

    Returns:
        The error of a handler that ended a transaction itself, and must not run again.

    """
    why = checkpoint._unusable  # noqa: SLF001 (of this module)
    checkpoint._unusable = BgjobError("its handler has ended")  # noqa: SLF001
    await checkpoint._store.end()  # noqa: SLF001
    return why if isinstance(why, TransactionEndedError) else None


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class Saving:
    """An open transaction, and the bytes to save with it."""

    def __init__(self, connection: Connection[Any]) -> None:
        self.connection = connection
        self.data: bytes | None = None
        """None leaves the saved value as it is."""


class Store(Protocol):
    """Where the checkpoint of one run of a job is kept, under the token of its claim."""

    data: bytes | None
    """What was saved last."""

    @property
    def is_stopping(self) -> bool:
        """Whether the handler should end."""
        ...

    def save(self, data: bytes) -> None:
        """Store bytes, and extend the lease; raise LeaseLostError if the job is not held."""
        ...

    def transaction(self) -> AbstractContextManager[Saving]:
        """Open a transaction that commits with the bytes, if the job is still held."""
        ...

    def end(self) -> None:
        """Roll back a transaction that the handler has left open."""
        ...


class Checkpoint(Generic[T]):
    """What the attempts of a job have saved.

    A retry, a worker's death, a deploy and a requeue keep it, and the job's completion drops
    it. Only its handler may use it, one call at a time.
    """

    def __init__(self, store: Store, codec: Codec[T], of: str) -> None:
        self._store = store
        self._codec = codec
        self._of = of
        self._value: T | None = None if store.data is None else codec.decode(store.data)
        self._saving: Saving | None = None
        self._unsaved: T = _NOTHING
        self._unusable: BgjobError | None = None

    @property
    def value(self) -> T | None:
        """The value that was saved last, by this attempt or an earlier one; None before.

        In a transaction it is the one from before until that has committed.
        """
        return self._value

    @property
    def stopping(self) -> bool:
        """Whether the handler should save and return. From any thread, without waiting.

        True once the worker shuts down: then `return Reschedule(0)` gives the job to the next
        worker, with its attempt and its checkpoint. Also true once the worker has given up this
        attempt, which was cancelled or has exceeded its timeout: what it returns is dropped. In
        `do` and `drain` it is False.
        """
        return self._store.is_stopping

    def save(self, value: T) -> None:
        """Store a value for this attempt and the next ones, and extend the lease.

        It takes one round trip, on a session of the worker's and not on the client's pool, and
        is committed when it returns. Inside `transaction` it is stored when that commits. While
        the server cannot be reached it is tried again, for the length of a lease.

        Args:
            value: at most 1,000,000 bytes as JSON: save where the work is, and write its data
                to tables of your own.

        Raises:
            LeaseLostError: the job is not this worker's any more: its lease has ended, or it
                was cancelled. Nothing was stored; let the error end the handler.
            PayloadError: the value does not match the annotation of the parameter.
            ValueError: it is too large.
            psycopg.Error: the database's. The value is stored or not.

        """
        data = self._encoded(value)
        self._check()
        if self._saving is not None:
            self._saving.data, self._unsaved = data, value
            return
        self._store.save(data)
        self._value = value

    @contextmanager
    def transaction(self) -> Iterator[Connection[Any]]:
        """Open a transaction for a part of the work: `with ... as conn`.

        The SQL on `conn`, the jobs that are enqueued with `conn=conn` and the value that `save`
        is given inside commit together at the end of the block, which also extends the lease.
        So each part has its effect once, however often its worker dies. An exception in the
        block rolls it back. The connection is one of the worker's; leave commit and rollback to
        the block.

        Raises:
            LeaseLostError: at the end: the job is not this worker's any more. The transaction
                is rolled back; let the error end the handler.
            BgjobError: another transaction of this checkpoint is open. Or whether one has
                committed is unknown, because the connection was lost: the next attempt knows.
            psycopg.Error: the database's.

        """
        self._check()
        if self._saving is not None:
            raise BgjobError(f"a transaction of the {self._of} is open: end it before the next one")
        try:
            with self._store.transaction() as self._saving:
                self._unsaved = _NOTHING
                yield self._saving.connection
            if self._unsaved is not _NOTHING:
                self._value = self._unsaved
        except CommitUnknownError as error:
            self._unusable = error
            raise error.cause from error.cause.__cause__
        except TransactionEndedError as error:
            self._unusable = error
            raise
        finally:
            self._saving, self._unsaved = None, _NOTHING

    def _check(self) -> None:
        if self._unusable is not None:
            raise BgjobError(f"the {self._of} cannot be used: {self._unusable}")

    def _encoded(self, value: T) -> bytes:
        return _checked(self._codec.encode(value), self._of)


def end(checkpoint: Checkpoint[Any]) -> TransactionEndedError | None:
    """Refuse later uses of a checkpoint: its handler has ended.

    Returns:
        The error of a handler that ended a transaction itself, and must not run again.

    """
    why = checkpoint._unusable  # noqa: SLF001 (of this module)
    checkpoint._unusable = BgjobError("its handler has ended")  # noqa: SLF001
    checkpoint._store.end()  # noqa: SLF001
    return why if isinstance(why, TransactionEndedError) else None


# -- both colours ----------------------------------------------------------------------


def _checked(data: object, of: str) -> bytes:
    if not isinstance(data, bytes):
        raise TypeError(f"the codec of the {of} returned {type(data).__name__}, not bytes")
    if len(data) > _MOST:
        raise ValueError(
            f"the {of} has {len(data):,} bytes, and at most {_MOST:,} can be saved: save where "
            "the work is, and write its data to tables of your own"
        )
    return data
