"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable

PATIENCE = 20.0
"""Seconds after which a test that waits has failed."""


NEVER = 3600.0
"""A poll interval that no test lives to see: what happens is not owed to polling."""


def eventually(condition: Callable[[], bool], timeout: float = PATIENCE) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
