"""What a handler that forks leaves behind: a child with a copy of the worker.

The copy must not work: its connections are the parent's, and so are the jobs
that wait in it. A child that comes out of its handler ends there.
"""

import contextlib
import os
import sys
import traceback
from typing import NoReturn
from weakref import WeakSet


class Lineage:
    """Tells a worker's slots whether this is still the process that made them."""

    def __init__(self) -> None:
        self.is_child = False
        _lineages.add(self)

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


_lineages: WeakSet[Lineage] = WeakSet()


def _forked() -> None:
    for lineage in _lineages:
        lineage.is_child = True


os.register_at_fork(after_in_child=_forked)
