"""The common part of the systems on PostgreSQL."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import ClassVar

import psycopg
from adapters.peer import Peer


class OnPostgres(Peer):
    """A system whose unfinished jobs a query counts."""

    unfinished: ClassVar[str]
    """The query that counts the jobs that are not done."""

    @asynccontextmanager
    async def counter(self) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        """Yield a function that counts, over a connection of its own."""
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as connection:

            async def left() -> int:
                row = await (await connection.execute(self.unfinished.encode())).fetchone()
                assert row is not None
                return int(row[0])

            yield left
