"""A small HTTP server for probes and metrics, on one thread of its own.

It answers GET and HEAD, one request a connection. Each client has two seconds for its whole
request and answer, however slowly it sends; where there are too many clients the oldest is
dropped. So a client that does nothing keeps no other waiting. The answers are made on the
server's thread, one after the other.
"""

import os
import selectors
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from typing import NamedTuple, TypeAlias

from bgjob._logger import log as _log
from bgjob._postgres.fork import call_in_children
from bgjob.errors import BgjobError

_PATIENCE = 2.0
"""Seconds for a client."""

_MOST_CLIENTS = 32
_LONGEST_REQUEST = 8192
_PIECE = 65536


class TcpAddress(NamedTuple):
    """A host, which is empty for all interfaces, and a port, which is 0 for a free one."""

    host: str
    port: int


Address: TypeAlias = TcpAddress | Path
"""Where a server listens: by TCP, or on a Unix socket."""


class Request(NamedTuple):
    """What a client asks for."""

    path: str
    accept: str
    """The media types that it takes."""


class Answer(NamedTuple):
    """What it gets."""

    status: int
    body: bytes
    media_type: str


class ListenError(BgjobError):
    """The server cannot listen on its address."""


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.received = bytearray()
        self.unsent: memoryview | None = None
        """The rest of its answer; None while its request is incomplete."""
        self.ends_at = monotonic() + _PATIENCE


class HttpServer:
    """Answers requests on an address until it is closed.

    Args:
        address: where to listen.
        answer: makes the answers, on the server's thread; None for a path that there is not.

    Raises:
        ListenError: it cannot listen there.

    """

    def __init__(self, address: Address, answer: Callable[[Request], Answer | None]) -> None:
        self._answer = answer
        self._pid = os.getpid()
        self._path = address if isinstance(address, Path) else None
        try:
            self._listener = _bound(address)
        except OSError as error:
            raise ListenError(f"cannot listen on {shown(address)}: {error}") from error
        self._listener.setblocking(False)
        self.address: Address = address
        """Where it listens."""
        if isinstance(address, TcpAddress):
            self.address = TcpAddress(*self._listener.getsockname()[:2])
        self._clients: dict[socket.socket, _Client] = {}  # the oldest first
        self._waker, self._woken = socket.socketpair()
        # A forked child that outlives this process would keep the port.
        call_in_children(self._close_sockets)
        self._thread = threading.Thread(target=self._run, name="bgjob-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._waker.send(b"\0")
        self._thread.join(_PATIENCE)
        if self._path is not None and os.getpid() == self._pid:
            self._path.unlink(missing_ok=True)

    def _close_sockets(self) -> None:
        for each in (self._listener, self._waker, self._woken, *self._clients):
            with suppress(OSError):
                each.close()

    def _run(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._close_sockets)
            selector = self._selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                now = monotonic()
                for client in [c for c in self._clients.values() if c.ends_at <= now]:
                    self._drop(client)
                end = min((c.ends_at for c in self._clients.values()), default=None)
                for key, _ in selector.select(None if end is None else end - now):
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif client := self._clients.get(key.fileobj):  # type: ignore[call-overload]
                        self._serve(client)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it was reset before, or the process has too many files
            return
        client = _Client(connection)
        self._clients[connection] = client
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._clients) > _MOST_CLIENTS:
            self._drop(next(iter(self._clients.values())))

    def _drop(self, client: _Client) -> None:
        del self._clients[client.socket]
        self._selector.unregister(client.socket)
        client.socket.close()

    def _serve(self, client: _Client) -> None:
        try:
            is_over = self._receive(client) if client.unsent is None else self._send(client)
        except BlockingIOError:
            return
        except OSError:
            is_over = True
        if is_over:
            self._drop(client)

    def _receive(self, client: _Client) -> bool:
        piece = client.socket.recv(_PIECE)
        client.received += piece
        if b"\r\n\r\n" in client.received:
            answer = self._answered(bytes(client.received))
        elif len(client.received) > _LONGEST_REQUEST:
            answer = _whole(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            return not piece
        client.unsent = memoryview(answer)
        client.ends_at = monotonic() + _PATIENCE
        self._selector.modify(client.socket, selectors.EVENT_WRITE)
        return self._send(client)

    def _send(self, client: _Client) -> bool:
        assert client.unsent is not None  # noqa: S101 (the callers check)
        sent = client.socket.send(client.unsent[:_PIECE])
        client.unsent = client.unsent[sent:]
        if len(client.unsent):
            return False
        client.socket.shutdown(socket.SHUT_WR)
        return True

    def _answered(self, received: bytes) -> bytes:
        head, *lines = received.decode("latin-1").partition("\r\n\r\n")[0].split("\r\n")
        match head.split(" "):
            case [("GET" | "HEAD") as method, target, version] if version.startswith("HTTP/1."):
                pass
            case [_, _, version] if version.startswith("HTTP/"):
                return _whole(HTTPStatus.METHOD_NOT_ALLOWED, allow="GET, HEAD")
            case _:
                return _whole(HTTPStatus.BAD_REQUEST)
        headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        request = Request(target.partition("?")[0], headers.get("accept", ""))
        try:
            answer = self._answer(request)
        except Exception:
            _log.exception("no answer to %s", request.path)
            return _whole(HTTPStatus.INTERNAL_SERVER_ERROR, is_head=method == "HEAD")
        if answer is None:
            return _whole(HTTPStatus.NOT_FOUND, is_head=method == "HEAD")
        status = HTTPStatus(answer.status)
        return _whole(status, answer.body, answer.media_type, is_head=method == "HEAD")


def _whole(
    status: HTTPStatus,
    body: bytes | None = None,
    media_type: str = "text/plain; charset=utf-8",
    *,
    is_head: bool = False,
    allow: str | None = None,
) -> bytes:
    body = f"{status.phrase}\n".encode() if body is None else body
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {media_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *([f"Allow: {allow}"] if allow else []),
    ]
    return "\r\n".join([*head, "", ""]).encode() + (b"" if is_head else body)


def _bound(address: Address) -> socket.socket:
    if isinstance(address, Path):
        return _bound_to_path(address)
    host, port = address
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    family, _, _, _, place = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server((str(place[0]), int(place[1])), family=family)


def _bound_to_path(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        with suppress(FileNotFoundError):
            # One that a killed process has left behind; a live one answers.
            if stat.S_ISSOCK(path.stat().st_mode) and not _is_served(path):
                path.unlink()
        listener.bind(str(path))
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_PATIENCE)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def shown(address: Address) -> str:
    """Return an address as the command line takes it."""
    if isinstance(address, Path):
        return f"unix:{address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
