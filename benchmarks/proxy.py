"""A proxy of a PostgreSQL server that counts round trips and bytes."""

import contextlib
import selectors
import socket
import threading
from typing import Self

from psycopg import ConnectionInfo
from psycopg.conninfo import make_conninfo


class Proxy:
    """Forwards all data between clients and server, on a thread of its own.

    A round trip begins when a client sends after the server did. All that a client sends
    before the next answer belongs to it.
    """

    def __init__(self, server: ConnectionInfo) -> None:
        self._server = server
        self.round_trips = 0
        """Of all connections since the start, including those that open a connection."""
        self.bytes = 0
        """In both directions, of all connections since the start; without TCP's own."""

    def __enter__(self) -> Self:
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._waiting: set[socket.socket] = set()  # clients that sent last
        self._clients: set[socket.socket] = set()
        self._door = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._heard, self._waker = socket.socketpair()
        self._selector.register(self._door, selectors.EVENT_READ)
        self._selector.register(self._heard, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waker.close()
        self._thread.join()
        self._selector.close()
        for end in (self._door, self._heard, *self._peers):
            end.close()

    def through(self, dsn: str) -> str:
        """Return a connection string that leads through the proxy."""
        host, port = self._door.getsockname()
        return make_conninfo(
            dsn, host=host, hostaddr=host, port=port, sslmode="disable", gssencmode="disable"
        )

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                end = key.fileobj
                if end is self._heard:
                    return
                if end is self._door:
                    self._accept()
                elif isinstance(end, socket.socket) and end in self._peers:
                    self._pass_on(end)

    def _accept(self) -> None:
        client, _ = self._door.accept()
        server = self._connect()
        for end in (client, server):
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(end, selectors.EVENT_READ)
        self._peers |= {client: server, server: client}
        self._clients.add(client)

    def _connect(self) -> socket.socket:
        host, port = self._server.hostaddr or self._server.host, self._server.port
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def _pass_on(self, end: socket.socket) -> None:
        peer = self._peers[end]
        with contextlib.suppress(OSError):  # either side may be gone
            if said := end.recv(65536):
                self._count(end, peer)
                self.bytes += len(said)
                peer.sendall(said)
                return
        for side in (end, peer):
            self._selector.unregister(side)
            del self._peers[side]
            side.close()

    def _count(self, end: socket.socket, peer: socket.socket) -> None:
        if end not in self._clients:
            self._waiting.discard(peer)
        elif end not in self._waiting:
            self._waiting.add(end)
            self.round_trips += 1
