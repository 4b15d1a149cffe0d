"""Sessions of SQLAlchemy on the connection of a transactional handler.

The connection is psycopg's, and is in a transaction that the worker began and will end. An engine
"connects" by being handed it, and its dialect ends no transaction and closes no connection. The
session makes a savepoint when it first sends something, so that its own commit and rollback have
the usual meaning for what the handler has done through it: two more round trips for each job.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, overload

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import Dialect, Engine, NullPool, create_engine
from sqlalchemy.orm import Session

if TYPE_CHECKING:  # without greenlet it cannot be imported
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

S = TypeVar("S", bound=Session)
AS = TypeVar("AS", bound="AsyncSession")


@overload
def session_of(conn: psycopg.Connection[Any]) -> AbstractContextManager[Session]: ...


@overload
def session_of(
    conn: psycopg.Connection[Any], make: Callable[..., S]
) -> AbstractContextManager[S]: ...


def session_of(
    conn: psycopg.Connection[Any], make: Callable[..., Session] = Session
) -> AbstractContextManager[Session]:
    """Return a context manager with a session on the connection of a transactional handler.

        @mux.handler("confirm", transactional=True)
        def confirm(job: Job, conn: psycopg.Connection) -> None:
            with session_of(conn) as session:
                session.get(Order, job.json()["order"]).confirmed = True

    The worker commits the transaction, with the job's settlement, or rolls it back. The session
    works within a savepoint: its `commit` keeps what it has done so far, if the worker commits, and
    its `rollback` undoes what it has done since. Leaving the block commits the session in this
    sense; an exception that leaves it rolls the session back.

    Args:
        conn: the connection; any other one of psycopg that is in a transaction will do.
        make: makes the session: a sessionmaker or a subclass of Session. It is passed the bind.

    Raises:
        TypeError: it is not such a connection.
        ValueError: the connection is in autocommit, and in no transaction.

    """
    return _session_of(conn, make)


@contextmanager
def _session_of(conn: psycopg.Connection[Any], make: Callable[..., S]) -> Iterator[S]:
    _check_connection(conn, psycopg.Connection, "asession_of")
    handed = _handed.set(conn)
    try:
        connection = _engine(conn.info.server_version).connect()
    finally:
        _handed.reset(handed)
    with connection, connection.begin(), make(bind=connection, **_BOUND) as session:
        yield session
        session.commit()


@overload
def asession_of(
    conn: psycopg.AsyncConnection[Any],
) -> "AbstractAsyncContextManager[AsyncSession]": ...


@overload
def asession_of(
    conn: psycopg.AsyncConnection[Any], make: Callable[..., AS]
) -> AbstractAsyncContextManager[AS]: ...


def asession_of(
    conn: psycopg.AsyncConnection[Any], make: "Callable[..., AsyncSession] | None" = None
) -> "AbstractAsyncContextManager[AsyncSession]":
    """Return a context manager with an AsyncSession on the connection of a coroutine handler.

    Async variant of `session_of`; `make` is AsyncSession by default.
    """
    from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415 (it needs greenlet)

    return _asession_of(conn, make or AsyncSession)


@asynccontextmanager
async def _asession_of(
    conn: psycopg.AsyncConnection[Any], make: Callable[..., AS]
) -> AsyncIterator[AS]:
    _check_connection(conn, psycopg.AsyncConnection, "session_of")
    handed = _handed.set(conn)
    try:
        connection = await _async_engine(conn.info.server_version).connect()
    finally:
        _handed.reset(handed)
    try:
        async with connection.begin(), make(bind=connection, **_BOUND) as session:
            yield session
            await session.commit()
    finally:
        await connection.close()


_BOUND: dict[str, Any] = {"binds": None, "join_transaction_mode": "create_savepoint"}
"""Options of a session, whatever a sessionmaker has for others."""

_handed: ContextVar[Any] = ContextVar("handed")
"""The connection of a handler, for the engine that is to connect."""

_ENGINE_OPTIONS: dict[str, Any] = {
    "poolclass": NullPool,
    "pool_reset_on_return": None,
    # Its loader would be registered with the first connection only.
    "use_native_hstore": False,
}


# An engine asks its first connection about the server, and so there is one for each version.
@cache
def _engine(_: int) -> Engine:
    engine = create_engine("postgresql+psycopg://", creator=_handed.get, **_ENGINE_OPTIONS)
    _leave_to_worker(engine.dialect)
    return engine


@cache
def _async_engine(_: int) -> "AsyncEngine":
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415

    async def creator() -> Any:
        return _handed.get()

    engine = create_async_engine("postgresql+psycopg://", async_creator=creator, **_ENGINE_OPTIONS)
    _leave_to_worker(engine.dialect)
    return engine


def _leave_to_worker(dialect: Dialect) -> None:
    """Make a dialect end no transaction and close no connection; savepoints it still makes."""
    for name in ("do_commit", "do_rollback", "do_close", "do_terminate"):
        setattr(dialect, name, lambda _: None)


def _check_connection(conn: psycopg.BaseConnection[Any], expected: type, other: str) -> None:
    if not isinstance(conn, expected):
        raise TypeError(
            f"conn must be a psycopg.{expected.__name__}, not {type(conn).__name__}: see {other}"
        )
    if conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
        raise ValueError(
            "the connection is in autocommit, and in no transaction: pass that of a transactional "
            "handler, or begin one (with conn.transaction())"
        )
