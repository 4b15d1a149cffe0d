"""A stand-in for PgBouncer before it supported prepared statements."""

import asyncio
import contextlib
import os

from faults.proxy import Service, read_message, read_startup, reset

CANCEL = (80877102).to_bytes(4)


class _Session:
    """A connection to the server, which serves one transaction after the other."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, greeting: bytes
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.greeting = greeting
        """The parameters that the server reported."""
        self.unanswered = 0


class Pooler(Service):
    """Gives each transaction of its clients the one of `size` sessions that rested longest.

    So a client that is alone never has the same session twice in a row. Whatever else
    belongs to a session stays there: settings, listening, locks, prepared statements.
    It trusts everybody, and it ignores requests to cancel.

    In session mode (`keeps=True`) a client has one session of its own for as long as it stays.
    """

    def __init__(self, dsn: str, *, size: int = 2, keeps: bool = False) -> None:
        super().__init__(dsn)
        self._size = size
        self._keeps = keeps
        self._pools: dict[bytes, asyncio.Queue[_Session | None]] = {}

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        startup = await read_startup(reader)
        if startup[4:8] == CANCEL:
            return
        pool = self._pools.get(startup)
        if pool is None:
            pool = self._pools[startup] = asyncio.Queue()
            for _ in range(self._size):
                pool.put_nowait(None)
        session = await self._take(pool, startup)
        # A key of its own: behind it is another session each time.
        key = b"K\0\0\0\x0c" + os.urandom(8)
        writer.write(session.greeting + key + b"Z\0\0\0\5I")
        pool.put_nowait(session)
        relay: asyncio.Task[None] | None = None
        try:
            while True:
                kind, message = await read_message(reader)
                if kind == b"X":
                    break
                if relay is None or (relay.done() and not self._keeps):
                    session = await self._take(pool, startup)
                    relay = self.spawn(self._relay(session, pool, writer))
                if kind in {b"Q", b"S"}:
                    session.unanswered += 1
                session.writer.write(message)
                await session.writer.drain()
        finally:
            if relay is not None and not relay.done():
                relay.cancel()

    async def _take(self, pool: asyncio.Queue[_Session | None], startup: bytes) -> _Session:
        session = await pool.get()
        try:
            if session is None or session.reader.at_eof():
                session = await self._begin(startup)
        except BaseException:
            pool.put_nowait(None)
            raise
        return session

    async def _begin(self, startup: bytes) -> _Session:
        reader, writer = await self.connect()
        writer.write(startup)
        greeting = b""
        while True:
            kind, message = await read_message(reader)
            if kind == b"E":
                raise ConnectionError(message)
            if kind == b"Z":
                return _Session(reader, writer, greeting)
            if kind != b"K":
                greeting += message

    async def _relay(
        self,
        session: _Session,
        pool: asyncio.Queue[_Session | None],
        client: asyncio.StreamWriter,
    ) -> None:
        """Forward the session's answers until its transaction has ended, and free it."""
        rested = None
        try:
            while rested is None:
                kind, message = await read_message(session.reader)
                client.write(message)
                if kind == b"Z":
                    session.unanswered -= 1
                    is_over = session.unanswered == 0 and message[-1:] == b"I"
                    if is_over and not self._keeps:
                        rested = session
        except (OSError, EOFError):
            with contextlib.suppress(OSError):
                client.close()
        finally:
            if rested is None:
                reset(session.writer)  # in the middle of a transaction: of no use to others
            pool.put_nowait(rested)
