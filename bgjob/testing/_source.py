"""The source of a test's jobs: its own connection, a client or a connection string."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg import AsyncConnection, Connection

from bgjob._postgres.connection import ConnectionParameters, check_conninfo, options, options_async
from bgjob.client import AsyncClient, Client

Source: TypeAlias = Client | str | Connection[Any]
"""Where the queue is: a client, a connection string, or the test's own connection."""

AsyncSource: TypeAlias = AsyncClient | str | AsyncConnection[Any]
"""The async variant of Source."""


@contextmanager
def connected(source: Source) -> Iterator[tuple[Connection[Any], ConnectionParameters | None]]:
    """Yield the test's own connection, or a new one with the parameters for more."""
    if isinstance(source, Connection):
        yield source, None
        return
    if not isinstance(source, str | Client):
        raise TypeError(
            "pass a Client, a connection string or a psycopg.Connection, not "
            f"{type(source).__name__}; for an AsyncClient or AsyncConnection use the function "
            "whose name begins with a, such as adrain()"
        )
    connection_parameters = (
        (check_conninfo(source), {}) if isinstance(source, str) else source.connection_parameters
    )
    with psycopg.connect(**{**options(connection_parameters), "autocommit": True}) as conn:
        yield conn, connection_parameters


@asynccontextmanager
async def connected_async(
    source: AsyncSource,
) -> AsyncIterator[tuple[AsyncConnection[Any], ConnectionParameters | None]]:
    """Yield a connection. Async variant of connected."""
    if isinstance(source, AsyncConnection):
        yield source, None
        return
    if not isinstance(source, str | AsyncClient):
        raise TypeError(
            "pass an AsyncClient, a connection string or a psycopg.AsyncConnection, not "
            f"{type(source).__name__}; for others use the function whose name begins without "
            "the a, such as drain()"
        )
    connection_parameters = (
        (check_conninfo(source), {}) if isinstance(source, str) else source.connection_parameters
    )
    arguments = {**await options_async(connection_parameters), "autocommit": True}
    async with await AsyncConnection.connect(**arguments) as conn:
        yield conn, connection_parameters
