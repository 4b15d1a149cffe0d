"""Where a commit is in the write-ahead log: what a change of the primary keeps, to the byte.

Each change begins a new timeline at some place of the one before. The new primary has every commit
up to there, and none after it. So the place of a commit, asked of the server that acknowledged it,
tells whether it outlived all changes, whatever the clocks say.
"""

from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import psycopg

from bgjob import AsyncClient, Client

_NOW = """
    select ('x' || left(pg_walfile_name(lsn), 8))::bit(32)::int, (lsn - '0/0')::bigint
    from pg_current_wal_flush_lsn() as lsn
"""
"""The place up to which this server has flushed: it contains the session's last commit."""

_HISTORY = """
    select pg_read_file('pg_wal/' || left(pg_walfile_name(lsn), 8) || '.history', 0, 100000, true)
    from pg_current_wal_flush_lsn() as lsn
"""


class Place(NamedTuple):
    """A place in the write-ahead log."""

    timeline: int
    lsn: int


_last: ContextVar[Place | None] = ContextVar("place", default=None)


def place(conn: psycopg.Connection[Any]) -> Place:
    """Return a place right after the last commit of a connection.

    Raises:
        psycopg.Error: the server is not there any more.

    """
    [[timeline, lsn]] = conn.execute(_NOW).fetchall()
    return Place(timeline, lsn)


async def place_async(conn: psycopg.AsyncConnection[Any]) -> Place:
    """Return a place right after the last commit of a connection. Async variant of `place`."""
    [[timeline, lsn]] = await (await conn.execute(_NOW)).fetchall()
    return Place(timeline, lsn)


def ask_for_places(client: Client | AsyncClient) -> None:
    """Ask for the place of each operation of a client, on the connection that it used."""
    pool: Any = client._pool
    release = pool.release

    def ask(conn: psycopg.Connection[Any]) -> None:
        _last.set(None)
        with suppress(psycopg.Error):
            _last.set(place(conn))
        release(conn)

    async def ask_async(conn: psycopg.AsyncConnection[Any]) -> None:
        _last.set(None)
        with suppress(psycopg.Error):
            _last.set(await place_async(conn))
        await release(conn)

    pool.release = ask_async if isinstance(client, AsyncClient) else ask


def last_place() -> Place:
    """Return the place of the last operation in this thread or task.

    Raises:
        psycopg.OperationalError: the server ended before it told.

    """
    found = _last.get()
    if found is None:
        raise psycopg.OperationalError("it is not known where this commit is")
    return found


class Timelines:
    """What the log of a server consists of.

    Attributes:
        ends: of each timeline before its own, where the next one begins.

    """

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        [[text]] = conn.execute(_HISTORY).fetchall()
        self.ends: dict[int, int] = {}
        for line in (text or "").splitlines():
            if line.strip():
                timeline, lsn = line.split()[:2]
                high, low = lsn.split("/")
                self.ends[int(timeline)] = (int(high, 16) << 32) + int(low, 16)
        self.own = place(conn).timeline

    def has(self, place: Place | Sequence[int]) -> bool:
        """Whether the server has all that was committed up to a place."""
        timeline, lsn = place
        return timeline == self.own or lsn <= self.ends.get(timeline, 0)
