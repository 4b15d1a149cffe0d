"""`poll`, also for systems whose `select` has none, such as Windows.

The original is what the library waits with wherever it can: its objects hold no descriptor, cost
one system call a wait, and take any number of descriptors. The stand-in has the few methods that
are used here, on what the standard library finds best.
"""

import select
import selectors
from typing import TYPE_CHECKING

__all__ = ["READ", "WRITE", "poll"]

if TYPE_CHECKING or hasattr(select, "poll"):
    from select import POLLIN as READ
    from select import POLLOUT as WRITE
    from select import poll
else:
    READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

    class poll:  # noqa: N801 (the original's name)
        """As `select.poll`."""

        def __init__(self) -> None:
            self._selector = selectors.DefaultSelector()
            self.register = self._selector.register
            self.modify = self._selector.modify

        def poll(self, timeout: float) -> list[tuple[int, int]]:
            """Wait so many milliseconds; return descriptors and events."""
            return [(key.fd, events) for key, events in self._selector.select(timeout / 1000)]
