"""Sends statements: no other module passes a statement's text to a cursor.

Values travel in binary, so that no setting of the session changes how they are read. A
statement says whether its plan may be kept, unless the session knows better: a worker's
keeps all of them.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.pq.abc import PGresult

from bgjob._postgres.commands import Prepared, execute_prepared, prepare
from bgjob._postgres.cursor import AsyncCursor, Cursor
from bgjob._postgres.pool import AsyncPooledConnection, PooledConnection
from bgjob._sql import prepared
from bgjob._sql.statement import Statement
from bgjob.job import EnqueueRequest

T = TypeVar("T")

_FEW = 5
"""Enqueues of a connection before their statement is prepared, which is one more round trip."""


# -- async -----------------------------------------------------------------------------


async def send_async(
    cursor: AsyncCursor, statement: Statement[Any], *, keeps_plans: bool = False
) -> AsyncCursor:
    """Execute a statement; in a pipeline its answer comes later.

    Args:
        cursor: of the connection. It takes no factory that the user may have set.
        statement: what to send.
        keeps_plans: whether the connection decides what is prepared, and not the statement.

    """
    prepare = None if keeps_plans else statement.prepare
    return await cursor.execute(statement.text, statement.params, binary=True, prepare=prepare)


async def read_async(cursor: AsyncCursor, statement: Statement[T]) -> T:
    """Read the rows that answer a statement; in a pipeline it waits for them."""
    return statement.parse(await cursor.fetchall())


async def run_async(
    connection: psycopg.AsyncConnection[Any], statement: Statement[T], *, keeps_plans: bool = False
) -> T:
    """Execute a statement and read its rows, if it has any; as `send_async`."""
    cursor = await send_async(AsyncCursor(connection), statement, keeps_plans=keeps_plans)
    return statement.parse(await cursor.fetchall() if cursor.description else [])


async def insert_async(
    connection: AsyncPooledConnection, request: EnqueueRequest, *, notify: bool
) -> bool | None:
    """Write a plain job by a prepared statement; None until the connection has one.

    A cursor converts parameters by the types of their values, and keeps what it sent: 50 µs of
    70 (benchmarks/costs.py).
    """
    params = prepared.values(request, notify=notify)
    result = await _execute_prepared_async(connection, prepared.ENQUEUE[notify], params)
    return None if result is None else result.ntuples > 0


async def insert_any_async(
    connection: AsyncPooledConnection, requests: Sequence[EnqueueRequest], *, notify: bool
) -> set[str] | None:
    """Write plain jobs with generated ids; return the written ids. None as `insert_async`."""
    params = prepared.values_of_many(requests, notify=notify)
    result = await _execute_prepared_async(connection, prepared.ENQUEUE_ANY[notify], params)
    return None if result is None else {*(result.get_value(0, 0) or b"").decode().split()}


async def insert_all_async(
    connection: AsyncPooledConnection, requests: Sequence[EnqueueRequest], *, notify: bool
) -> bool:
    """Write plain jobs in the order of their ids; False until the connection has the statement.

    Raises:
        psycopg.errors.UniqueViolation: an id is taken, and nothing was written.

    """
    params = prepared.values_of_many(requests, notify=notify)
    statement = prepared.ENQUEUE_ALL[notify]
    return await _execute_prepared_async(connection, statement, params) is not None


async def _execute_prepared_async(
    connection: AsyncPooledConnection, statement: Prepared, params: Sequence[bytes | None]
) -> PGresult | None:
    """Execute a statement; None before the connection has prepared it, or if it must not."""
    if statement.name not in connection.prepared:
        connection.enqueues += 1
        is_text = connection.pgconn.parameter_status(b"client_encoding") == b"UTF8"
        if connection.enqueues < _FEW or connection.prepare_threshold is None or not is_text:
            return None
        await connection.wait(prepare(connection.pgconn, statement))
        connection.prepared |= {statement.name}
    return await connection.wait(execute_prepared(connection.pgconn, statement, params))


async def send_all_async(
    connection: psycopg.AsyncConnection[Any], statements: Sequence[Statement[Any]]
) -> list[AsyncCursor]:
    """Send statements one after the other, each by a cursor of its own, in a pipeline."""
    return [await send_async(AsyncCursor(connection), statement) for statement in statements]


async def read_all_async(
    cursors: Sequence[AsyncCursor], statements: Sequence[Statement[Any]]
) -> list[Any]:
    """Read the answers to what `send_all_async` has sent."""
    pairs = zip(cursors, statements, strict=True)
    return [await read_async(cursor, statement) for cursor, statement in pairs]


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


def send(cursor: Cursor, statement: Statement[Any], *, keeps_plans: bool = False) -> Cursor:
    """Execute a statement; in a pipeline its answer comes later.

    Args:
        cursor: of the connection. It takes no factory that the user may have set.
        statement: what to send.
        keeps_plans: whether the connection decides what is prepared, and not the statement.

    """
    prepare = None if keeps_plans else statement.prepare
    return cursor.execute(statement.text, statement.params, binary=True, prepare=prepare)


def read(cursor: Cursor, statement: Statement[T]) -> T:
    """Read the rows that answer a statement; in a pipeline it waits for them."""
    return statement.parse(cursor.fetchall())


def run(
    connection: psycopg.Connection[Any], statement: Statement[T], *, keeps_plans: bool = False
) -> T:
    """Execute a statement and read its rows, if it has any; as `send`."""
    cursor = send(Cursor(connection), statement, keeps_plans=keeps_plans)
    return statement.parse(cursor.fetchall() if cursor.description else [])


def insert(connection: PooledConnection, request: EnqueueRequest, *, notify: bool) -> bool | None:
    """Write a plain job by a prepared statement; None until the connection has one.

    A cursor converts parameters by the types of their values, and keeps what it sent: 50 µs of
    70 (benchmarks/costs.py).
    """
    params = prepared.values(request, notify=notify)
    result = _execute_prepared(connection, prepared.ENQUEUE[notify], params)
    return None if result is None else result.ntuples > 0


def insert_any(
    connection: PooledConnection, requests: Sequence[EnqueueRequest], *, notify: bool
) -> set[str] | None:
    """Write plain jobs with generated ids; return the written ids. None as `insert`."""
    params = prepared.values_of_many(requests, notify=notify)
    result = _execute_prepared(connection, prepared.ENQUEUE_ANY[notify], params)
    return None if result is None else {*(result.get_value(0, 0) or b"").decode().split()}


def insert_all(
    connection: PooledConnection, requests: Sequence[EnqueueRequest], *, notify: bool
) -> bool:
    """Write plain jobs in the order of their ids; False until the connection has the statement.

    Raises:
        psycopg.errors.UniqueViolation: an id is taken, and nothing was written.

    """
    params = prepared.values_of_many(requests, notify=notify)
    statement = prepared.ENQUEUE_ALL[notify]
    return _execute_prepared(connection, statement, params) is not None


def _execute_prepared(
    connection: PooledConnection, statement: Prepared, params: Sequence[bytes | None]
) -> PGresult | None:
    """Execute a statement; None before the connection has prepared it, or if it must not."""
    if statement.name not in connection.prepared:
        connection.enqueues += 1
        is_text = connection.pgconn.parameter_status(b"client_encoding") == b"UTF8"
        if connection.enqueues < _FEW or connection.prepare_threshold is None or not is_text:
            return None
        connection.wait(prepare(connection.pgconn, statement))
        connection.prepared |= {statement.name}
    return connection.wait(execute_prepared(connection.pgconn, statement, params))


def send_all(
    connection: psycopg.Connection[Any], statements: Sequence[Statement[Any]]
) -> list[Cursor]:
    """Send statements one after the other, each by a cursor of its own, in a pipeline."""
    return [send(Cursor(connection), statement) for statement in statements]


def read_all(cursors: Sequence[Cursor], statements: Sequence[Statement[Any]]) -> list[Any]:
    """Read the answers to what `send_all` has sent."""
    pairs = zip(cursors, statements, strict=True)
    return [read(cursor, statement) for cursor, statement in pairs]
