"""Jobs in the transactions of asyncpg; needs `bgjob[asyncpg]`.

async with connection.transaction():
    await connection.execute("insert into orders (id) values ($1)", order)
    await enqueue(connection, EnqueueRequest("mail", "confirm", {"order": order}))
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal, TypeAlias, Unpack, overload

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from bgjob import sql
from bgjob._requests import OnConflict, in_chunks, placed, request_of
from bgjob.codec import TypedJob
from bgjob.errors import EnqueueConflictError, JobAlreadyExistsError
from bgjob.job import EnqueueOptions, EnqueueRequest

__all__ = ["bulk_enqueue", "enqueue"]

Target: TypeAlias = asyncpg.Connection | PoolConnectionProxy | asyncpg.Pool


@overload
async def enqueue(
    target: Target,
    request: EnqueueRequest,
    *,
    on_conflict: Literal["raise", "replace"] = ...,
) -> str: ...


@overload
async def enqueue(
    target: Target,
    request: TypedJob,
    *,
    on_conflict: Literal["raise", "replace"] = ...,
    **options: Unpack[EnqueueOptions],
) -> str: ...


@overload
async def enqueue(
    target: Target, request: EnqueueRequest, *, on_conflict: OnConflict
) -> str | None: ...


@overload
async def enqueue(
    target: Target,
    request: TypedJob,
    *,
    on_conflict: OnConflict,
    **options: Unpack[EnqueueOptions],
) -> str | None: ...


async def enqueue(
    target: Target,
    request: EnqueueRequest | TypedJob,
    *,
    on_conflict: OnConflict = "raise",
    **options: Unpack[EnqueueOptions],
) -> str | None:
    """Write a job and return its id.

    Args:
        target: a connection, in whose transaction the job is written: it exists, and
            workers are woken, when that commits. Or a pool, or a connection that is in no
            transaction: the job is committed.
        request: the job: an EnqueueRequest, or a typed job, as for Client.enqueue.
        on_conflict: what to do if a live job has the id, as for Client.enqueue: "raise" (the
            default), "skip", which returns None, or "replace".
        options: queue, id, delay, run_at, priority, exclusive, slots, headers, expires and
            keep of a typed job.

    Raises:
        QueueRequiredError, PayloadError, TypeError, ValueError: as Client.enqueue; a TypeError
            also for another target.
        JobAlreadyExistsError: a live job has the id. Nothing was written, and the
            transaction goes on.
        EnqueueConflictError: the transaction is repeatable read or serializable and cannot
            see the job that has the id: repeat the transaction.
        asyncpg.PostgresError: the database's, as of any statement.

    """
    request = request_of(request, options)
    text, parameters = sql.enqueue(request, "dollar", on_conflict=on_conflict)
    with _conflicts(request):
        row = await _checked(target).fetchrow(text, *parameters)
    if row is not None:
        return request.id
    if on_conflict == "raise":
        raise JobAlreadyExistsError([request.id])
    return None


async def bulk_enqueue(
    target: Target, requests: Iterable[EnqueueRequest], *, on_conflict: OnConflict = "raise"
) -> list[str | None]:
    """Write jobs, all or none, and return their ids in order.

    Args:
        target: as for `enqueue`.
        requests: the jobs; any number of them, consumed in chunks of 10,000. Make those of
            typed jobs with EnqueueRequest.of.
        on_conflict: "raise" (the default) writes nothing if any id is taken; "skip" leaves out
            jobs whose id is taken, and returns None in their places; "replace" lets each
            replace the job that has its id.

    Raises:
        RequestsRequiredError: there are no requests.
        JobAlreadyExistsError: an id is taken, or occurs twice in the requests. Nothing was
            written, and the transaction goes on.
        TypeError, EnqueueConflictError, asyncpg.PostgresError: as for `enqueue`.

    """
    chunks = in_chunks(requests)
    ids: list[str | None] = []
    async with _transaction(_checked(target)) as connection:
        for chunk in chunks:
            text, parameters = sql.enqueue_many(chunk, "dollar", on_conflict=on_conflict)
            with _conflicts(*chunk):
                [written, *_] = await connection.fetchrow(text, *parameters)
            ids += placed(chunk, set(written), on_conflict)
    return ids


@asynccontextmanager
async def _transaction(target: Any) -> AsyncIterator[Any]:
    if isinstance(target, asyncpg.Pool):
        async with (
            target.acquire() as connection,
            connection.transaction(isolation="read_committed"),
        ):
            yield connection
    else:
        async with target.transaction():  # in the caller's it is a savepoint
            yield target


@contextmanager
def _conflicts(*requests: EnqueueRequest) -> Iterator[None]:
    try:
        yield
    except asyncpg.SerializationError as error:
        raise EnqueueConflictError([request.id for request in requests]) from error


def _checked(target: Target) -> Any:
    if isinstance(target, asyncpg.Connection | PoolConnectionProxy | asyncpg.Pool):
        return target
    text = f"target must be a connection or a pool of asyncpg, not {type(target).__name__}"
    if isinstance(target, asyncpg.transaction.Transaction):
        text += ": pass the connection that has the transaction"
    raise TypeError(text)
