"""What a fork leaves in the child: copies of clients and workers, which must not be used.

Their connections are the parent's, and so are the jobs that wait in a worker. A client gets other
connections; a child that comes out of its handler ends there.
"""

import contextlib
import os
import sys
import traceback
from typing import NoReturn, Protocol
from weakref import WeakSet


class _Watched(Protocol):
    def in_child(self) -> None: ...


_watched: WeakSet[_Watched] = WeakSet()


def watch(watched: _Watched) -> None:
    """Call `in_child` in every child that is forked while the object lives."""
    _watched.add(watched)


class Lineage:
    """Tells a worker's slots whether this is still the process that made them."""

    def __init__(self) -> None:
        self.is_child = False
        watch(self)

    def in_child(self) -> None:
        """Remember it."""
        self.is_child = True

    def end(self, error: object) -> NoReturn:
        """End the child, as the handler's `error` says, without a word to the parent's server."""
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


os.register_at_fork(after_in_child=_forked)
