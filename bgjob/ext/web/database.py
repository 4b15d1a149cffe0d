"""The connections of the page: a few to read, one to write."""

from functools import partial
from typing import Any, TypeVar

import psycopg
from typing_extensions import override

from bgjob import schema
from bgjob._postgres.connection import ConnectionParameters, options_async
from bgjob._postgres.cursor import AsyncCursor
from bgjob._postgres.pool import AsyncPool, AsyncPooledConnection
from bgjob._sql.execute import send_async
from bgjob._sql.server import Server, bounds, server
from bgjob._sql.session import SETTINGS, schema_comment, session
from bgjob._sql.statement import Statement
from bgjob.client import AsyncClient, Client

T = TypeVar("T")

NAME = "bgjob web"
"""The name of the page's sessions in pg_stat_activity."""

_READERS = 4
_LONGEST = 2
"""Seconds that a statement of a page may take."""

_PATIENCE = 5.0
"""Seconds to wait for a connection: who looks at a page does not wait for longer."""

_WRITER = SETTINGS | {
    "application_name": NAME,
    "statement_timeout": "10s",
    "lock_timeout": "2s",
}


class Reader(AsyncClient):
    """Reads for the pages: every statement is read-only, and takes at most 2 s.

    The limits are set in each transaction, so that they also hold behind a pooler.
    """

    def __init__(self, parameters: ConnectionParameters) -> None:
        super().__init__("", notify=False)
        self._pool = _pool(parameters, _READERS, SETTINGS)

    @override
    async def _run(
        self,
        statement: Statement[T],
        conn: psycopg.AsyncConnection[Any] | None,
        *,
        keep: bool = False,
        before: Statement[None] | None = None,
    ) -> T:
        return await super()._run(statement, conn, before=bounds(NAME, seconds=_LONGEST))

    async def read(self, statement: Statement[T]) -> T:
        """Send a statement of the pages' own."""
        return await self._run(statement, None)

    async def check(self) -> Server:
        """Return what the server is; raise SchemaError unless the tables are there."""
        schema.check_version(await self.read(schema_comment()))
        return await self.read(server())


class Writer(AsyncClient):
    """Does what a button asks for, one after the other on one connection."""

    def __init__(self, parameters: ConnectionParameters) -> None:
        super().__init__("")
        self._pool = _pool(parameters, 1, _WRITER)

    async def write(self, statement: Statement[T]) -> T:
        """Send a statement of the pages' own."""
        return await self._run(statement, None)


def parameters_of(source: "str | Client | AsyncClient") -> ConnectionParameters:
    """Return how to connect to the database of a client.

    Raises:
        TypeError: neither a client nor a connection string, or a client whose pool has a
            connection class of its own.
        ValueError: not a valid connection string.

    """
    if isinstance(source, str):
        return AsyncClient(source).connection_parameters
    if isinstance(source, Client | AsyncClient):
        return source.connection_parameters
    raise TypeError(
        f"give a connection string, a Client or an AsyncClient, not {type(source).__name__}"
    )


def _pool(parameters: ConnectionParameters, size: int, settings: dict[str, str]) -> AsyncPool:
    async def configure(connection: AsyncPooledConnection) -> None:
        statement = session(connection.info.backend_pid, settings)
        cursor = await send_async(AsyncCursor(connection), statement)
        if not cursor.rowcount:  # see the client's own
            connection.prepare_threshold = None

    return AsyncPool(partial(options_async, parameters), configure, patience=_PATIENCE, size=size)
