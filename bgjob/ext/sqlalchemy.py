"""Jobs in the transactions of SQLAlchemy; needs `bgjob[sqlalchemy]`.

    with Session(engine) as session:
        session.add(order)
        enqueue(session, EnqueueRequest("mail", "confirm", {"order": order.id}))
        session.commit()  # the order and its job

The drivers are psycopg, psycopg2 and asyncpg. The functions whose names begin with `a` are for
AsyncSession and AsyncConnection. `Client(dsn(engine))` is a client of the same database.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Unpack, overload

from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo
from sqlalchemy import Connection, Engine, TwoPhaseTransaction
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session

from bgjob import sql
from bgjob._requests import OnConflict, in_chunks, placed, request_of
from bgjob.codec import TypedJob
from bgjob.errors import EnqueueConflictError, JobAlreadyExistsError
from bgjob.ext._sqlalchemy_session import asession_of, session_of
from bgjob.job import EnqueueOptions, EnqueueRequest

if TYPE_CHECKING:  # without greenlet it cannot be imported
    from sqlalchemy.ext.asyncio import (
        AsyncConnection,
        AsyncEngine,
        AsyncSession,
        async_scoped_session,
    )

__all__ = [
    "abulk_enqueue",
    "aenqueue",
    "asession_of",
    "bulk_enqueue",
    "dsn",
    "enqueue",
    "session_of",
]

Target: TypeAlias = Session | scoped_session[Any] | Connection
AsyncTarget: TypeAlias = "AsyncSession | async_scoped_session[Any] | AsyncConnection"

_PARAMSTYLES: dict[str, sql.Paramstyle] = {
    "psycopg": "pyformat",
    "psycopg2": "pyformat",
    "asyncpg": "dollar",
}

_SERIALIZATION_FAILURE = "40001"


@overload
def enqueue(
    target: Target,
    request: EnqueueRequest,
    *,
    on_conflict: Literal["raise", "replace"] = ...,
) -> str: ...


@overload
def enqueue(
    target: Target,
    request: TypedJob,
    *,
    on_conflict: Literal["raise", "replace"] = ...,
    **options: Unpack[EnqueueOptions],
) -> str: ...


@overload
def enqueue(target: Target, request: EnqueueRequest, *, on_conflict: OnConflict) -> str | None: ...


@overload
def enqueue(
    target: Target,
    request: TypedJob,
    *,
    on_conflict: OnConflict,
    **options: Unpack[EnqueueOptions],
) -> str | None: ...


def enqueue(
    target: Target,
    request: EnqueueRequest | TypedJob,
    *,
    on_conflict: OnConflict = "raise",
    **options: Unpack[EnqueueOptions],
) -> str | None:
    """Write a job in the transaction of a session or a connection, and return its id.

    The job exists, and workers are woken, when the transaction commits. Nothing is flushed: if
    the payload needs a generated key, flush the session before. In a two-phase transaction no
    worker is woken: workers find the job when they poll.

    Args:
        target: a Session, a scoped_session or a Connection. Of a session that has several
            binds, pass `session.connection(bind_arguments=...)`.
        request: the job: an EnqueueRequest, or a typed job, as for Client.enqueue.
        on_conflict: what to do if a live job has the id, as for Client.enqueue: "raise" (the
            default), "skip", which returns None, or "replace".
        options: queue, id, delay, run_at, priority, exclusive, slots, headers, expires and
            keep of a             typed job.

    Raises:
        QueueRequiredError, PayloadError, TypeError, ValueError: as Client.enqueue; a TypeError
            also for another target, driver or database.
        JobAlreadyExistsError: a live job has the id. Nothing was written, and the
            transaction goes on.
        EnqueueConflictError: the transaction is repeatable read or serializable and cannot
            see the job that has the id: repeat the transaction.
        sqlalchemy.exc.DBAPIError: the database's, as of any statement.

    """
    request = request_of(request, options)
    connection = _connection(target)
    rows = _send(connection, sql.enqueue, request, [request.id], on_conflict)
    if rows:
        return request.id
    if on_conflict == "raise":
        raise JobAlreadyExistsError([request.id])
    return None


@overload
async def aenqueue(
    target: AsyncTarget,
    request: EnqueueRequest,
    *,
    on_conflict: Literal["raise", "replace"] = ...,
) -> str: ...


@overload
async def aenqueue(
    target: AsyncTarget,
    request: TypedJob,
    *,
    on_conflict: Literal["raise", "replace"] = ...,
    **options: Unpack[EnqueueOptions],
) -> str: ...


@overload
async def aenqueue(
    target: AsyncTarget, request: EnqueueRequest, *, on_conflict: OnConflict
) -> str | None: ...


@overload
async def aenqueue(
    target: AsyncTarget,
    request: TypedJob,
    *,
    on_conflict: OnConflict,
    **options: Unpack[EnqueueOptions],
) -> str | None: ...


async def aenqueue(
    target: AsyncTarget,
    request: EnqueueRequest | TypedJob,
    *,
    on_conflict: OnConflict = "raise",
    **options: Unpack[EnqueueOptions],
) -> str | None:
    """Write a job in the transaction of an AsyncSession or an AsyncConnection.

    Async variant of `enqueue`; an async_scoped_session is a target too.
    """
    request = request_of(request, options)
    return await _awaitable(target).run_sync(enqueue, request, on_conflict=on_conflict)


def bulk_enqueue(
    target: Target, requests: Iterable[EnqueueRequest], *, on_conflict: OnConflict = "raise"
) -> list[str | None]:
    """Write jobs in the transaction of a session or a connection; return their ids in order.

    All or none are written, also on a connection in autocommit. The jobs exist, and workers are
    woken, when the transaction commits.

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
        TypeError, EnqueueConflictError, sqlalchemy.exc.DBAPIError: as for `enqueue`.

    """
    chunks = in_chunks(requests)
    connection = _connection(target)
    ids: list[str | None] = []
    with _whole(connection):
        for chunk in chunks:
            ids_of = [request.id for request in chunk]
            rows = _send(connection, sql.enqueue_many, chunk, ids_of, on_conflict)
            ids += placed(chunk, set(rows[0][0]), on_conflict)
    return ids


async def abulk_enqueue(
    target: AsyncTarget, requests: Iterable[EnqueueRequest], *, on_conflict: OnConflict = "raise"
) -> list[str | None]:
    """Write jobs in the transaction of an AsyncSession or an AsyncConnection.

    Async variant of `bulk_enqueue`; an async_scoped_session is a target too.
    """
    return await _awaitable(target).run_sync(bulk_enqueue, requests, on_conflict=on_conflict)


def dsn(source: "Engine | AsyncEngine | URL | str") -> str:
    """Return the connection string of an engine or a URL, for a Client.

    It contains the password. It does not contain other arguments of create_engine, such as
    `connect_args`.

    Raises:
        ValueError: it is not of PostgreSQL, or has a parameter that libpq does not know.

    """
    url = make_url(source if isinstance(source, URL | str) else source.url)
    if url.get_backend_name() != "postgresql":
        raise ValueError(f"bgjob needs PostgreSQL, not {url.get_backend_name()}")
    dialect = url.set(drivername="postgresql+psycopg").get_dialect()
    _, parameters = dialect().create_connect_args(url)
    if url.get_driver_name() == "asyncpg":
        for name in _ONLY_OF_ASYNCPG:
            parameters.pop(name, None)
        if "ssl" in parameters:
            parameters["sslmode"] = parameters.pop("ssl")
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    if unknown := sorted(set(parameters) - known):
        raise ValueError(
            f"libpq does not know {', '.join(unknown)} of this URL: pass "
            f"url.difference_update_query({unknown!r})"
        )
    return make_conninfo(**parameters)


_ONLY_OF_ASYNCPG = (
    "async_fallback",
    "prepared_statement_cache_size",
    "prepared_statement_name_func",
)
"""What the dialect takes out of a URL itself, and no connection needs."""


def _send(
    connection: Connection,
    statement: Callable[..., tuple[str, Any]],
    what: Any,
    ids: Sequence[str],
    on_conflict: OnConflict,
) -> Sequence[Any]:
    # Notifying would keep a transaction from being prepared.
    notify = not isinstance(connection.get_transaction(), TwoPhaseTransaction)
    style = _PARAMSTYLES[connection.dialect.driver]
    text, parameters = statement(what, style, notify=notify, on_conflict=on_conflict)
    if not isinstance(parameters, dict):
        parameters = tuple(parameters)  # a list would be many sets of parameters
    try:
        return connection.exec_driver_sql(text, parameters).all()
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        if state == _SERIALIZATION_FAILURE:
            raise EnqueueConflictError(ids) from error
        raise


@contextmanager
def _whole(connection: Connection) -> Iterator[None]:
    """Write all or nothing: in a savepoint, or in autocommit in a transaction of its own."""
    driver: Any = connection.connection.dbapi_connection
    if not driver.autocommit or connection.in_nested_transaction():
        with connection.begin_nested():
            yield
        return
    connection.exec_driver_sql("begin isolation level read committed")
    try:
        yield
    except BaseException:
        connection.exec_driver_sql("rollback")
        raise
    connection.exec_driver_sql("commit")


def _connection(target: Target) -> Connection:
    if isinstance(target, scoped_session):
        target = target()
    if isinstance(target, Session):
        target = target.connection()
    if not isinstance(target, Connection):
        raise TypeError(_not_a_target(target, "a Session or a Connection", "aenqueue"))
    dialect = target.dialect
    if dialect.name != "postgresql" or dialect.driver not in _PARAMSTYLES:
        raise TypeError(
            f"bgjob enqueues on PostgreSQL by the drivers {', '.join(_PARAMSTYLES)}, not on "
            f"{dialect.name} by {dialect.driver}"
        )
    return target


def _awaitable(target: AsyncTarget) -> "AsyncSession | AsyncConnection":
    from sqlalchemy.ext.asyncio import (  # noqa: PLC0415 (it needs greenlet)
        AsyncConnection,
        AsyncSession,
        async_scoped_session,
    )

    if isinstance(target, async_scoped_session):
        target = target()
    if not isinstance(target, AsyncSession | AsyncConnection):
        raise TypeError(_not_a_target(target, "an AsyncSession or an AsyncConnection", "enqueue"))
    return target


def _not_a_target(target: object, expected: str, other: str) -> str:
    name = type(target).__name__
    text = f"target must be {expected}, not {name}"
    if "Engine" in name:
        return f"{text}: open a transaction (with engine.begin() as connection)"
    if "Session" in name or "Connection" in name:
        return f"{text}: use {other} or {other.replace('enqueue', 'bulk_enqueue')}"
    return text
