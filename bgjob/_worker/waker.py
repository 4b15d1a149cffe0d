"""Wakes the control thread while it waits on its sockets."""

import contextlib
import socket


class Waker:
    """Wakes a thread that waits on sockets."""

    def __init__(self) -> None:
        # Sockets, not a pipe: a send to a closed socket fails, but a write to a closed
        # descriptor may reach the file that has its number now.
        self._heard, self._rope = socket.socketpair()
        self._heard.setblocking(False)
        self._rope.setblocking(False)
        self._armed = self._dozes = self._rings = False

    def fileno(self) -> int:
        """Return the file descriptor to wait on."""
        return self._heard.fileno()

    def arm(self) -> None:
        """Make the next `ring` wake the thread; after this check for work, then wait."""
        self._armed = True

    def doze(self) -> None:
        """Make the next `call` wake the thread, and no `ring`; after this check, then wait."""
        self._dozes = True

    def ring(self) -> None:
        """Wake the thread if it is armed; otherwise this only tests a flag. From any thread."""
        if self._armed:
            self._armed = False
            self.shout()

    def call(self) -> None:
        """Wake the thread if it is armed or dozes. From any thread."""
        if self._armed or self._dozes:
            self._armed = self._dozes = False
            self.shout()

    def shout(self) -> None:
        """Wake the thread now, or at its next wait. From any thread."""
        with contextlib.suppress(OSError):  # full: it rings already; or closed
            self._rope.send(b"!")
        self._rings = True  # after the send: at worst the second wait silences it

    def silence(self, *, rings: bool = False) -> None:
        """Stop ringing.

        Args:
            rings: whether a wait found it ringing. The thread that rings may have sent, and not
                run since: without this the next wait would return immediately.

        """
        self._armed = self._dozes = False
        if self._rings or rings:
            self._rings = False
            with contextlib.suppress(BlockingIOError):
                self._heard.recv(4096)

    def close(self) -> None:
        """Close both ends."""
        self._armed = self._dozes = False
        self._heard.close()
        self._rope.close()
