"""A network that can be hurt: a proxy between PostgreSQL's clients and its server."""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, Self, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

T = TypeVar("T")

LIMIT = 1 << 20
SLOW_STEP = 1 << 16
"""Bytes that pass in one piece where the network is slow."""
Side = Literal["after", "before", "abandoned"]
BEGINS = re.compile(r"\s*begin\b", re.IGNORECASE)
COMMITS = re.compile(r"(\A|;)\s*commit\b", re.IGNORECASE)
ENDS = re.compile(r"(\A|;)\s*(commit|rollback(?! +to\b))\b", re.IGNORECASE)
WRITES = re.compile(r"\b(insert into|update|delete from)\b", re.IGNORECASE)


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return the type of the next message of PostgreSQL's protocol, and all its bytes."""
    head = await reader.readexactly(5)
    return head[:1], head + await reader.readexactly(int.from_bytes(head[1:]) - 4)


async def read_startup(reader: asyncio.StreamReader) -> bytes:
    """Return a client's first message, which has no type."""
    head = await reader.readexactly(4)
    return head + await reader.readexactly(int.from_bytes(head) - 4)


_ACCEPTING = 5
"""Turns of the loop after which a connection that was accepted has its task, and that has begun."""


def reset(writer: asyncio.StreamWriter | None) -> None:
    """Reset a connection, as a host that does not know it does: unsent data is lost."""
    if writer is not None and not writer.is_closing():
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()


class Service:
    """A TCP server before the PostgreSQL server of a DSN, on a thread of its own."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def __enter__(self) -> Self:
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=type(self).__name__, daemon=True
        )
        self._thread.start()
        self.port = self.call(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert not self._failures, self._failures

    def dsn(self, dsn: str) -> str:
        """Return a DSN that leads through here to the database of `dsn`."""
        return make_conninfo(
            dsn, host="127.0.0.1", port=self.port, sslmode="disable", gssencmode="disable"
        )

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function on the loop, and return its result."""

        async def run() -> T:
            return await function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection to PostgreSQL; it is closed with the service, if not before."""
        info = conninfo_to_dict(self._dsn)
        host, port = str(info.get("host") or "localhost"), int(info.get("port") or 5432)
        if host.startswith("/"):
            path = f"{host}/.s.PGSQL.{port}"
            reader, writer = await asyncio.open_unix_connection(path, limit=LIMIT)
        else:
            reader, writer = await asyncio.open_connection(host, port, limit=LIMIT)
        self._writers.append(writer)
        return reader, writer

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine on the loop until it ends, or the service does."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client; it ends with an error of the socket, or with a cancellation."""
        raise NotImplementedError

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=LIMIT)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def serve() -> None:
            try:
                with contextlib.suppress(OSError, EOFError):
                    await self.accept(reader, writer)
            finally:
                reset(writer)

        self.spawn(serve())

    async def _close(self) -> None:
        # asyncio leaves a connection open that it is accepting while its server closes.
        self._loop.remove_reader(self._server.sockets[0])
        for _ in range(_ACCEPTING):
            await asyncio.sleep(0)
        self._server.close()
        while tasks := [*self._tasks]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.5)  # asyncio may lose a cancellation
        for writer in self._writers:
            reset(writer)
        await asyncio.sleep(0)  # the transports that were aborted close now


class _Pair:
    """A client's connection and the proxy's to the server, and what passes between them."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.lost = False
        """Whether no data passes any more."""
        self.is_abandoned = False
        """Whether the server does not learn of it: its end stays open, without a peer."""
        self.cut: threading.Event | None = None
        """Set once the server has answered all that it was sent, and both ends are cut."""
        self.unanswered = 0
        """Messages that the server answers with ReadyForQuery."""
        self._prepared: dict[bytes, str] = {}
        self._sql: list[str] = []

    def reset(self) -> None:
        reset(self.client)
        reset(self.server)

    def note(self, kind: bytes, message: bytes) -> str | None:
        """Read a client's message; return the SQL of a transaction if this commits it."""
        said = None
        if kind == b"P":
            name, query, _ = message[5:].split(b"\0", 2)
            self._prepared[name] = query.decode()
        elif kind == b"B":
            self._sql.append(self._prepared[message[5:].split(b"\0", 2)[1]])
        elif kind == b"Q":
            self._sql.append(message[5:-1].decode())
        if self._sql:
            sql, last = "\n".join(self._sql), self._sql[-1]
            if ENDS.search(last):
                if kind in {b"E", b"Q"}:
                    said = sql if COMMITS.search(last) else None
                    self._sql.clear()
            elif kind in {b"S", b"Q"} and not any(map(BEGINS.match, self._sql)):
                said = sql if WRITES.search(sql) else None
                self._sql.clear()
        return said


class Proxy(Service):
    """Forwards between clients and the server of a DSN; the network can be lost and restored."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self._mode: Literal["forward", "silent", "cut"] = "forward"
        self._pairs: set[_Pair] = set()
        self._trap: tuple[tuple[str, ...], Side, threading.Event] | None = None
        self._restored = asyncio.Event()
        self.rate: float | None = None
        """Bytes per second that each connection brings from the server; None for all it can."""
        self.lost_messages = 0
        """Messages that clients sent on lost connections while the network worked.

        Those that close a connection do not count.
        """

    def forward(self, *, old: Literal["reset", "dead"] = "reset") -> None:
        """Restore the network.

        Args:
            old: what the connections find that were open while it was silent: they are
                reset, as by a host that has forgotten them, or remain without an answer,
                as behind a router that has. The server knows that they are gone.

        """

        async def act() -> None:
            for pair in self._pairs:
                if pair.lost and not pair.is_abandoned:
                    reset(pair.server)
                    if old == "reset":
                        reset(pair.client)
            self._mode = "forward"
            self._restored.set()

        self.call(act)

    def silence(self) -> None:
        """Forward nothing in either direction. Data is lost, and new connections open."""

        async def act() -> None:
            self._mode = "silent"
            self._restored.clear()
            for pair in self._pairs:
                pair.lost = True

        self.call(act)

    def abandon(self) -> None:
        """Lose each open connection, as when its host loses power: neither end is notified.

        Nothing passes any more, and the server's end stays open until the server, or the proxy,
        closes it. New connections are forwarded.
        """

        async def act() -> None:
            for pair in self._pairs:
                pair.lost = pair.is_abandoned = True

        self.call(act)

    def cut(self) -> None:
        """Reset all connections, and every new one."""

        async def act() -> None:
            self._mode = "cut"
            self._restored.set()
            for pair in self._pairs:
                pair.reset()

        self.call(act)

    def cut_after_commit(self, *sql: str) -> threading.Event:
        """Cut the next connection that commits a transaction with all of `sql`, its answer unsent.

        The event is set when the server has committed it and the connection is cut.
        """
        return self._set_trap(sql, "after")

    def cut_before_commit(self, *sql: str) -> threading.Event:
        """Cut the next connection that commits a transaction with all of `sql`, its commit unsent."""
        return self._set_trap(sql, "before")

    def abandon_before_commit(self, *sql: str) -> threading.Event:
        """Abandon the next connection that commits a transaction with all of `sql`, its commit unsent."""
        return self._set_trap(sql, "abandoned")

    def _set_trap(self, sql: tuple[str, ...], side: Side) -> threading.Event:
        event = threading.Event()
        self._trap = (sql, side, event)
        return event

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "cut":
            return
        pair = _Pair(writer)
        pair.lost = self._mode == "silent"
        self._pairs.add(pair)
        answering = None
        try:
            if not pair.lost:
                server, pair.server = await self.connect()
                answering = self.spawn(self._answer(server, pair))
            await self._ask(reader, pair, answering)
            if not pair.lost and pair.server is not None:
                pair.server.close()
        finally:
            # The server does not learn that its client is gone.
            if pair.is_abandoned and answering is not None:
                await asyncio.wait([answering])
            elif pair.lost and self._mode == "silent":
                await self._restored.wait()
            if answering is not None:
                answering.cancel()
            reset(pair.server)
            self._pairs.discard(pair)

    async def _ask(
        self, client: asyncio.StreamReader, pair: _Pair, answering: asyncio.Task[None] | None
    ) -> None:
        kind, message = b"", await read_startup(client)
        while True:
            sql = pair.note(kind, message)
            trap = None if sql is None or self._trap is None or pair.lost else self._trap
            if trap is not None and sql is not None and all(text in sql for text in trap[0]):
                self._trap = None
                match trap[1]:
                    case "before":
                        pair.reset()
                        trap[2].set()
                        return
                    case "abandoned":
                        pair.lost = pair.is_abandoned = True
                        trap[2].set()
                    case "after":
                        pair.cut = trap[2]
                        if kind == b"E":
                            message += b"S\0\0\0\4"  # a Sync: the server says when it has committed
            if pair.lost and self._mode == "forward" and kind not in {b"", b"X"}:
                self.lost_messages += 1
            if pair.server is not None and not pair.lost:
                if pair.cut is not None or kind in {b"", b"Q", b"S"}:
                    pair.unanswered += 1
                pair.server.write(message)
                await pair.server.drain()
            if pair.cut is not None and answering is not None:
                await asyncio.wait([answering])
                return
            try:
                kind, message = await read_message(client)
            except EOFError:
                return

    async def _answer(self, server: asyncio.StreamReader, pair: _Pair) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, message = await read_message(server)
                if kind == b"Z":
                    pair.unanswered -= 1
                if pair.cut is not None:
                    if pair.unanswered == 0:
                        pair.reset()
                        pair.cut.set()
                        return
                elif not pair.lost:
                    step = len(message) if self.rate is None else SLOW_STEP
                    for start in range(0, len(message), step):
                        pair.client.write(message[start : start + step])
                        await pair.client.drain()
                        if self.rate is not None:
                            await asyncio.sleep(min(step, len(message)) / self.rate)
        if not pair.lost:
            pair.client.close()
