"""A worker process that ends when its parent lets go of it, or dies.

It holds one end of a pipe, its lifeline, and shuts down when the other end is closed. So the
parent forwards no signals, and a child that also gets one from a terminal or from systemd does
not count it twice. What the parent writes before it closes is the reason, for the child's log.

Where a child cannot inherit a pipe (on Windows), its standard input is the lifeline.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_STDIN = 0


class ChildProcess:
    """A place for a process, which may be started again when it has ended.

    Args:
        arguments: of `bgjob`.
        env: its environment.
        module: what it runs with python -m: bgjob, or a module that wraps it.

    """

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], *, module: str = "bgjob"
    ) -> None:
        self._command = [sys.executable, *_flags(), "-m", module, *arguments]
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None

    @property
    def runs(self) -> bool:
        """Whether it was started, and its end not seen yet."""
        return self._process is not None

    @property
    def is_held(self) -> bool:
        """Whether it was started, and not let go."""
        return self._lifeline is not None

    @property
    def pid(self) -> int:
        """The process id; 0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self, *, reports: bool = False) -> int | None:
        """Start the process.

        Args:
            reports: whether it is to report to this one. POSIX only.

        Returns:
            The descriptor to read its reports from.

        Raises:
            OSError: the host has no more processes or memory.

        """
        if not hasattr(os, "fork"):
            command = [*self._command, f"--lifeline={_STDIN}"]
            self._process = subprocess.Popen(  # noqa: S603
                command, env=self._env, stdin=subprocess.PIPE
            )
            assert self._process.stdin is not None  # noqa: S101 (a pipe)
            self._lifeline = os.dup(self._process.stdin.fileno())
            self._process.stdin.close()
            return None
        theirs, self._lifeline = os.pipe()
        pipes = {"--lifeline": theirs}
        heard: int | None = None
        try:
            if reports:
                heard, pipes["--report"] = os.pipe()
            self._process = subprocess.Popen(  # noqa: S603
                [*self._command, *(f"{name}={fd}" for name, fd in pipes.items())],
                env=self._env,
                pass_fds=[*pipes.values()],
            )
        except BaseException:
            if heard is not None:
                os.close(heard)
            raise
        finally:
            for fd in pipes.values():
                os.close(fd)
        return heard

    def ended(self) -> int | None:
        """Return the exit status if the process has ended since the last call."""
        status = self._process.poll() if self._process is not None else None
        if status is not None:
            self._process = None
            self.let_go()
        return status

    def let_go(self, reason: str = "") -> None:
        """Close the lifeline: the process shuts down, and logs the reason."""
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            with suppress(OSError):  # it has ended
                os.write(lifeline, reason.encode(errors="replace"))
            os.close(lifeline)

    def kill(self) -> None:
        """Kill it, if it runs."""
        if self._process is not None:
            self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end, so many seconds at most."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)


def how_ended(status: int) -> str:
    """Return an exit status in words."""
    if status >= 0:
        return f"has ended with status {status}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def _flags() -> list[str]:
    # -W, -X, -I and so on; a private name, but multiprocessing uses it too.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    # A child loads the same bgjob, not one in the current directory.
    if "-P" not in flags and Path(__file__).parents[3] != Path.cwd():
        flags.append("-P")
    return flags
