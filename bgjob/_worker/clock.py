"""Knows the server's time, and detects that its clock was set."""

from datetime import datetime
from time import monotonic, time

STEP = 60.0
"""The least seconds of a reported step: less is a corrected clock or a busy host."""


class ServerClock:
    """Compares the server's time with a monotonic clock, once for each exchange."""

    def __init__(self) -> None:
        self._bounds: tuple[float, float] | None = None
        self.offset = time() - monotonic()
        """The server's time less the monotonic one; of this host until there is an answer."""

    def now(self) -> float:
        """Return the server's time in seconds since 1970, as well as it is known.

        It is that of the last observation, and the time passed since then by a clock that
        is never set. Until the first one it is this host's.
        """
        return self.offset + monotonic()

    def connected(self, at: datetime, sent_at: float, answered_at: float) -> None:
        """Take over the time of a server; the arguments are as for `observe`."""
        self.offset = at.timestamp() - (sent_at + answered_at) / 2

    def observe(self, at: datetime, sent_at: float, answered_at: float) -> float:
        """Return by how many seconds the clock was set since the last call; 0 if it was not.

        Args:
            at: the server's time, somewhere between the next two.
            sent_at: when the exchange was sent, by the monotonic clock.
            answered_at: when its answer was read.

        """
        # Between the two times the process may have been stopped for any time.
        lowest, highest = at.timestamp() - answered_at, at.timestamp() - sent_at
        self.offset = min(max(self.offset, lowest), highest)
        before, self._bounds = self._bounds, (lowest, highest)
        if before is None:
            return 0.0
        if lowest > before[1] + STEP:
            return lowest - before[1]
        if highest < before[0] - STEP:
            return highest - before[0]
        return 0.0
