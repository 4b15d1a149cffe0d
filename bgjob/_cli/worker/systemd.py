"""systemd's notify protocol: a datagram to the socket that the unit's environment names.

It is not taken from a library: the protocol is these few lines, and has been the same since
systemd 209.
"""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""What a child must not inherit: it would speak for the parent."""


class Systemd:
    """The service manager, if there is one: `Type=notify` in the unit.

    Args:
        environ: the environment.

    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An abstract socket's name begins with a zero byte, which no variable can contain.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        is_for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = environ.get("WATCHDOG_USEC", "")
        self.watchdog: float | None = None
        """Seconds within which it wants a beat; None if it does not watch."""
        if self._address and is_for_us and limit.isdecimal() and int(limit):
            self.watchdog = int(limit) / 1e6

    @property
    def is_there(self) -> bool:
        """Whether a service manager wants to be told."""
        return self._address[:1] in {"/", "\0"} and hasattr(socket, "AF_UNIX")

    def tell(self, *assignments: str) -> None:
        """Send a state; without a service manager, or if it does not listen, nothing happens."""
        if not self.is_there:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1.0)
            sender.sendto("\n".join(assignments).encode(), self._address)
