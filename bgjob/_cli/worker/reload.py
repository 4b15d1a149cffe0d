"""The parent of `bgjob worker --reload`: starts the worker again when a Python file changes.

The worker runs in a child, which the parent lets go of when a file changes; see `child`. When it
has ended it is started again. One that ends without having been asked, because its program has
an error, waits for the next change.
"""

import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from time import monotonic
from types import FrameType

from bgjob._cli.worker.child import ChildProcess, how_ended
from bgjob._logger import log as _log
from bgjob.errors import BgjobError

_LOOK = 0.1
"""Seconds between two looks at the child."""
_LATE = 2.0
"""Seconds after the grace period within which the child has to end."""
_SIGNALLED = 128
"""The exit status after a second signal is its number and this."""
_LONGEST = 200
"""Characters of a file's path that are shown."""


class ReloadError(BgjobError):
    """The files cannot be watched."""


def check_extra() -> None:
    """Raise ReloadError unless watchfiles is installed."""
    try:
        import watchfiles  # noqa: F401, PLC0415 (an extra)
    except ModuleNotFoundError:
        raise ReloadError(
            '--reload needs watchfiles; remedy: pip install "bgjob[reload]"'
        ) from None


def reload(
    arguments: Sequence[str],
    *,
    module: str,
    folders: Sequence[Path],
    grace: float,
    env: Mapping[str, str],
) -> int:
    """Run a worker process until a signal comes, anew after each change of a Python file.

    After a change, and after a signal, the process has the grace period and 2 s to end. A second
    signal kills it, and ends this process immediately. From the main thread.

    Args:
        arguments: of `bgjob`, for the process.
        module: what it runs with python -m: bgjob, or a module that wraps it.
        folders: what to watch, with all folders in them.
        grace: seconds that the process waits for its handlers.
        env: its environment.

    Returns:
        The exit status: 0; or that of a process that a second signal has reached first.

    Raises:
        ReloadError: the folders cannot be watched.

    """
    return _Reloader(ChildProcess(arguments, env, module=module), grace).run(folders)


class _Reloader:
    """Also the event that ends the watch: watchfiles asks `is_set` every 50 ms."""

    def __init__(self, child: ChildProcess, grace: float) -> None:
        self._child = child
        self._grace = grace
        self._signum = 0
        self._is_wanted = True
        """Whether to start the child when it does not run."""
        self._kill_at = inf
        self._status = 0

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return bool(self._signum)

    def run(self, folders: Sequence[Path]) -> int:
        with self._signals():
            try:
                for changed in _changes(folders, self):
                    self._tend(changed)
            finally:
                self._let_go(signal.Signals(self._signum).name if self._signum else "")
                while self._child.runs:
                    self._child.wait(_LOOK)
                    self._tend([])
        return self._status

    @contextmanager
    def _signals(self) -> Iterator[None]:
        signums = (signal.SIGTERM, signal.SIGINT)
        before = {signum: signal.signal(signum, self._answer) for signum in signums}
        try:
            yield
        finally:
            for signum, answer in before.items():
                signal.signal(signum, answer)

    def _answer(self, signum: int, _: FrameType | None) -> None:
        if self._signum:
            self._child.kill()
            os._exit(128 + signum)
        self._signum = signum
        self._is_wanted = False

    def _tend(self, changed: Sequence[str]) -> None:
        """Release the child, kill it, notice its end, or start it, as is due."""
        if changed and not self._signum:
            self._is_wanted = True
            if self._child.is_held:
                _log.info("%s, reloading", _told(changed))
                self._let_go("reload")
            elif not self._child.runs:
                _log.info("%s, starting", _told(changed))
        if monotonic() > self._kill_at:
            _log.error("the worker does not end, and is killed")
            self._child.kill()
            self._kill_at = inf
        was_held = self._child.is_held
        if (status := self._child.ended()) is not None:
            self._kill_at = inf
            if was_held and not self._is_wanted and not self._signum:
                self._put_off(how_ended(status), is_well=status == 0)
            elif self._signum and status > _SIGNALLED:
                self._status = status
            elif status:
                _log.warning("the worker %s", how_ended(status))
        if self._is_wanted and not self._child.runs:
            self._is_wanted = False
            try:
                self._child.start()
            except OSError as error:  # the host has no more processes or memory
                self._child.let_go()
                self._put_off(f"cannot be started: {error}")

    def _put_off(self, how: str, *, is_well: bool = False) -> None:
        level = logging.INFO if is_well else logging.ERROR
        _log.log(level, "the worker %s; it is started again when a file changes", how)

    def _let_go(self, reason: str) -> None:
        if self._child.is_held:
            self._kill_at = monotonic() + self._grace + _LATE
        self._child.let_go(reason)


def _changes(folders: Sequence[Path], stop: _Reloader) -> Iterator[list[str]]:
    """Yield the Python files that changed, and nothing every 0.1 s, until it is stopped."""
    from watchfiles import Change, DefaultFilter, watch  # noqa: PLC0415 (an extra)

    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts the changes
    is_wanted = DefaultFilter(ignore_dirs=(*DefaultFilter.ignore_dirs, "site-packages"))

    def is_of_program(change: Change, path: str) -> bool:
        # Not the names of the folders above: a program may lie in one that is left out.
        inside = [Path(path).relative_to(x) for x in folders if Path(path).is_relative_to(x)]
        return path.endswith(".py") and all(is_wanted(change, str(each)) for each in inside)

    names = ", ".join(map(_shown, map(str, folders)))
    try:
        watched = watch(
            *folders,
            watch_filter=is_of_program,
            stop_event=stop,
            rust_timeout=round(_LOOK * 1000),
            yield_on_timeout=True,
            raise_interrupt=False,
        )
        # The first comes when the folders are watched; the child starts after that.
        for number, changes in enumerate(watched):
            if number == 0:
                _log.info("watching the Python files in %s", names)
            yield sorted(path for _, path in changes)
    except (OSError, RuntimeError) as error:  # too many folders, or one is gone
        raise ReloadError(f"cannot watch {names}: {error}") from error


def _told(changed: Sequence[str]) -> str:
    first, *others = changed
    if not others:
        return f"{_shown(first)} has changed"
    return f"{_shown(first)} and {len(others)} more have changed"


def _shown(path: str) -> str:
    """Return a path as the user would write it here."""
    if Path(path).is_relative_to(Path.cwd()):
        path = os.path.relpath(path)
    return path if len(path) <= _LONGEST else f"...{path[-_LONGEST:]}"
