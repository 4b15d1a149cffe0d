"""Jobs on Django's connections, and so in the transaction of the code around."""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Unpack, overload

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import Error, connections, transaction

from bgjob import sql
from bgjob._requests import OnConflict, in_chunks, only, placed, request_of, wrapped
from bgjob.codec import TypedJob
from bgjob.errors import EnqueueConflictError, JobAlreadyExistsError
from bgjob.ext.django._database import checked
from bgjob.ext.django._settings import on_enqueue
from bgjob.job import EnqueueOptions, EnqueueRequest

_SERIALIZATION_FAILURE = "40001"


@overload
def enqueue(
    request: EnqueueRequest,
    *,
    using: str = "default",
    on_conflict: Literal["raise", "replace"] = ...,
) -> str: ...


@overload
def enqueue(
    request: TypedJob,
    *,
    using: str = "default",
    on_conflict: Literal["raise", "replace"] = ...,
    **options: Unpack[EnqueueOptions],
) -> str: ...


@overload
def enqueue(
    request: EnqueueRequest, *, using: str = "default", on_conflict: OnConflict
) -> str | None: ...


@overload
def enqueue(
    request: TypedJob,
    *,
    using: str = "default",
    on_conflict: OnConflict,
    **options: Unpack[EnqueueOptions],
) -> str | None: ...


def enqueue(
    request: EnqueueRequest | TypedJob,
    *,
    using: str = "default",
    on_conflict: OnConflict = "raise",
    **options: Unpack[EnqueueOptions],
) -> str | None:
    """Write a job on Django's connection, and return its id.

    Inside of `transaction.atomic` the job is a part of the transaction: it exists, and workers
    are woken, when the outermost block commits. Outside of it the job is committed. So
    `transaction.on_commit` is not needed.

    Args:
        request: the job: an EnqueueRequest, or a typed job, as for Client.enqueue.
        using: the alias of the database.
        on_conflict: what to do if a live job has the id, as for Client.enqueue: "raise" (the
            default), "skip", which returns None, or "replace".
        options: those of a typed job, as for Client.enqueue.

    Raises:
        QueueRequiredError, PayloadError, TypeError, ValueError: as Client.enqueue.
        JobAlreadyExistsError: a live job has the id. Nothing was written, and the
            transaction goes on.
        EnqueueConflictError: the transaction is repeatable read or serializable and cannot
            see the job that has the id: repeat the transaction.
        SynchronousOnlyOperation: an event loop runs in this thread: await `aenqueue`.
        ImproperlyConfigured: the database is not PostgreSQL.
        django.db.Error: the database's, as of any query.

    """
    request = request_of(request, options)
    _check_is_sync("aenqueue")
    if not (wrapping := on_enqueue()):
        return _enqueue(request, using, on_conflict)
    with wrapped(wrapping, (request,)) as changed:
        return _enqueue(only(changed), using, on_conflict)


def _enqueue(request: EnqueueRequest, using: str, on_conflict: OnConflict) -> str | None:
    rows = _send(using, *sql.enqueue(request, on_conflict=on_conflict), [request.id])
    if rows:
        return request.id
    if on_conflict == "raise":
        raise JobAlreadyExistsError([request.id])
    return None


@overload
async def aenqueue(
    request: EnqueueRequest,
    *,
    using: str = "default",
    on_conflict: Literal["raise", "replace"] = ...,
) -> str: ...


@overload
async def aenqueue(
    request: TypedJob,
    *,
    using: str = "default",
    on_conflict: Literal["raise", "replace"] = ...,
    **options: Unpack[EnqueueOptions],
) -> str: ...


@overload
async def aenqueue(
    request: EnqueueRequest, *, using: str = "default", on_conflict: OnConflict
) -> str | None: ...


@overload
async def aenqueue(
    request: TypedJob,
    *,
    using: str = "default",
    on_conflict: OnConflict,
    **options: Unpack[EnqueueOptions],
) -> str | None: ...


async def aenqueue(
    request: EnqueueRequest | TypedJob,
    *,
    using: str = "default",
    on_conflict: OnConflict = "raise",
    **options: Unpack[EnqueueOptions],
) -> str | None:
    """Write a job from a coroutine, on the connection that Django's async queries use.

    Async variant of `enqueue`. The job is committed: a coroutine cannot be inside of
    `transaction.atomic`. To write rows and a job in one transaction, do both in a plain function,
    and await `sync_to_async(function)()`. Under `async_to_sync` the job is a part of the
    transaction of the plain function around, as Django's async queries are.

    Raises:
        SynchronousOnlyOperation: a transaction is open in the thread of the event loop, for
            example around `asyncio.run`: the job would be written on the connection of another
            thread, and not be a part of it.

    """
    request = request_of(request, options)
    _check_has_no_transaction(using, "aenqueue")
    write: Callable[..., str | None] = enqueue
    return await sync_to_async(write)(request, using=using, on_conflict=on_conflict)


def bulk_enqueue(
    requests: Iterable[EnqueueRequest], *, using: str = "default", on_conflict: OnConflict = "raise"
) -> list[str | None]:
    """Write jobs on Django's connection, all or none, and return their ids in order.

    Args:
        requests: the jobs; any number of them, consumed in chunks of 10,000. Make those of
            typed jobs with EnqueueRequest.of.
        using: the alias of the database.
        on_conflict: "raise" (the default) writes nothing if any id is taken; "skip" leaves out
            jobs whose id is taken, and returns None in their places; "replace" lets each
            replace the job that has its id.

    Raises:
        RequestsRequiredError: there are no requests.
        JobAlreadyExistsError: an id is taken, or occurs twice in the requests. Nothing was
            written, and the transaction goes on.
        EnqueueConflictError, SynchronousOnlyOperation, ImproperlyConfigured, django.db.Error:
            as for `enqueue`.

    """
    checked(using)
    _check_is_sync("abulk_enqueue")
    if not (wrapping := on_enqueue()):
        return _bulk_enqueue(requests, using, on_conflict)
    with wrapped(wrapping, requests) as changed:
        return _bulk_enqueue(changed, using, on_conflict)


def _bulk_enqueue(
    requests: Iterable[EnqueueRequest], using: str, on_conflict: OnConflict
) -> list[str | None]:
    chunks = in_chunks(requests)
    ids: list[str | None] = []
    whole: Any = transaction.atomic(using)
    with whole:
        for chunk in chunks:
            statement = sql.enqueue_many(chunk, on_conflict=on_conflict)
            rows = _send(using, *statement, [request.id for request in chunk])
            ids += placed(chunk, set(rows[0][0]), on_conflict)
    return ids


async def abulk_enqueue(
    requests: Iterable[EnqueueRequest], *, using: str = "default", on_conflict: OnConflict = "raise"
) -> list[str | None]:
    """Write jobs from a coroutine, all or none. Async variant of `bulk_enqueue`."""
    _check_has_no_transaction(using, "abulk_enqueue")
    return await sync_to_async(bulk_enqueue)(requests, using=using, on_conflict=on_conflict)


def _send(using: str, text: str, parameters: Any, ids: Sequence[str]) -> list[Any]:
    cursor: Any
    with checked(using).cursor() as cursor, _conflicts(ids):
        cursor.execute(text, parameters)
        rows: list[Any] = cursor.fetchall()
    return rows


@contextmanager
def _conflicts(ids: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except Error as error:
        own = error.__cause__  # that of psycopg or psycopg2
        state = getattr(own, "sqlstate", None) or getattr(own, "pgcode", None)
        if state == _SERIALIZATION_FAILURE:
            raise EnqueueConflictError(ids) from error
        raise


def _check_is_sync(other: str) -> None:
    # Django would refuse the query as well, but knows no remedy.
    if os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE"):
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise SynchronousOnlyOperation(
        f"an event loop runs in this thread: await {other}(...); or, for rows and a job in one "
        "transaction, do both in a plain function and await sync_to_async(function)()"
    )


def _check_has_no_transaction(using: str, name: str) -> None:
    """Raise SynchronousOnlyOperation if this thread has a transaction.

    The job would be written by another thread, and connections belong to threads. Under
    async_to_sync the loop has a thread of its own, and the job is written by the caller's.
    """
    loop = asyncio.get_running_loop()
    has_one = _is_in_transaction(using)
    # Plain code in this thread, below the loop, has connections that a coroutine does not see.
    asyncio._set_running_loop(None)  # noqa: SLF001
    try:
        has_one |= _is_in_transaction(using)
    finally:
        asyncio._set_running_loop(loop)  # noqa: SLF001
    if has_one:
        raise SynchronousOnlyOperation(
            f"{name} would write outside of the transaction that is open in this thread: an "
            "event loop uses the connection of another thread. Call it by "
            "async_to_sync instead of asyncio.run; or enqueue in plain code, inside of atomic()"
        )


def _is_in_transaction(using: str) -> bool:
    return any(
        connection.alias == using and connection.in_atomic_block
        for connection in connections.all(initialized_only=True)
    )
