"""Fork safety: the child's copies of clients and workers must not be used.

Their connections belong to the parent, and so do the jobs that wait in a worker. A client
opens other connections; a child that returns from its handler ends there.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, Protocol
from weakref import WeakSet


class _Watched(Protocol):
    def in_child(self) -> None: ...


_watched: WeakSet[_Watched] = WeakSet()


def watch(watched: _Watched) -> None:
    """Call `in_child` in every child that is forked while the object lives."""
    _watched.add(watched)


def call_in_children(function: Callable[[], object]) -> None:
    """Call a function in every child that is forked; a system without fork() has none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


class ForkGuard:
    """Knows whether this process is a fork of the one that made it."""

    def __init__(self) -> None:
        self.is_child = False
        watch(self)

    def in_child(self) -> None:
        """Record the fork."""
        self.is_child = True

    def end(self, error: object) -> NoReturn:
        """End the child with the exit status of `error`, and send the server nothing."""
        code: object = 0
        match error:
            case SystemExit():
                code = error.code or 0
            case BaseException():
                code = 1
                traceback.print_exception(error)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def _forked() -> None:
    for watched in _watched:
        watched.in_child()


call_in_children(_forked)
