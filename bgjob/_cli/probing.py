"""Asks a server of probes, by TCP or on a Unix socket."""

import socket
from http.client import HTTPConnection, HTTPException

from typing_extensions import override

from bgjob._cli.listener import Address, TcpAddress, shown
from bgjob.errors import BgjobError


def ask(address: Address, path: str, timeout: float) -> tuple[int, str]:
    """Return the status and the body of an answer.

    Args:
        address: the server's.
        path: what to ask for.
        timeout: seconds to wait.

    Raises:
        BgjobError: it does not answer.

    """
    connection = _Connection(address, timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace").strip()
    except (OSError, HTTPException) as error:
        raise BgjobError(f"no answer from {shown(address)}: {error}") from error
    finally:
        connection.close()


class _Connection(HTTPConnection):
    def __init__(self, address: Address, timeout: float) -> None:
        self._address = address
        host = address.host if isinstance(address, TcpAddress) else "localhost"
        port = address.port if isinstance(address, TcpAddress) else None
        super().__init__(host or "localhost", port, timeout=timeout)

    @override
    def connect(self) -> None:
        if isinstance(self._address, TcpAddress):
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._address))
