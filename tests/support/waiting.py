"""Waiting for other threads and processes."""

import time
from collections.abc import Callable

PATIENCE = 30.0
"""Seconds after which a test that waits has failed."""

NEVER = 3600.0
"""A poll interval longer than any test: nothing happens because of polling."""

_SHORTEST, _LONGEST = 0.005, 0.05
"""Seconds between two looks: a tenth of the time waited, within these bounds."""


def eventually(condition: Callable[[], object], timeout: float = PATIENCE) -> bool:
    """Wait until the condition holds; return whether it did."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > timeout:
            return False
        time.sleep(min(max(waited / 10, _SHORTEST), _LONGEST))
    return True
