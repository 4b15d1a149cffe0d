"""Processes in milliseconds: forks of one process that has imported everything.

An interpreter that imports bgjob anew takes a quarter of a second of a core, hundreds of times,
and one that imports Django, too, half a second.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from support.waiting import PATIENCE

import bgjob._cli.worker.serve
import bgjob.cli  # noqa: F401 (with all that a worker needs)

TESTS = Path(__file__).parents[1]


class Nursery:
    """The process that forks, as its owner sees it: the parent of all. Thread-safe.

    Args:
        modules: what it imports, beside bgjob.

    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "support.nursery", str(theirs.fileno()), *modules],
                cwd=TESTS,
                pass_fds=[theirs.fileno()],
            )
        self._answers = self._socket.makefile("rb")

    def close(self) -> None:
        """End it."""
        self._answers.close()
        self._socket.close()
        self._popen.wait()

    def fork(
        self, module: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path, *fds: int
    ) -> int:
        """Run a module as a program in a fork with these standard files; return its pid."""
        return int(self._ask(["fork", module, list(argv), dict(env), str(cwd)], fds))

    def waitpid(self, pid: int, options: int) -> tuple[int, int]:
        """As os.waitpid, of its child."""
        [pid, status] = self._ask(["wait", pid, options])
        return pid, status

    def _ask(self, request: list[Any], fds: Sequence[int] = ()) -> Any:
        with self._lock:
            words = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(self._socket, [words], fds)
            self._socket.sendall(words[sent:])
            return json.loads(self._answers.readline())


@functools.cache
def _nursery(*modules: str) -> Nursery:
    nursery = Nursery(modules)
    atexit.register(nursery.close)
    return nursery


class Forked:
    """A process of a nursery's; as subprocess.Popen."""

    def __init__(self, nursery: Nursery, pid: int, stdin: IO[bytes]) -> None:
        self._nursery = nursery
        self.pid = pid
        self.stdin: IO[bytes] | None = stdin
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, or None while it has not ended."""
        if self.returncode is None:
            pid, status = self._nursery.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self._doze(end - time.monotonic())
        return code

    def _doze(self, seconds: float) -> None:
        """Sleep for so long, or until it ends; or for 5 ms where the system cannot say when."""
        if not hasattr(os, "pidfd_open"):
            time.sleep(0.005)
            return
        fd = os.pidfd_open(self.pid)  # which lives, or waits to be reaped
        try:
            select.select([fd], [], [], seconds)
        finally:
            os.close(fd)

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        self.send_signal(signal.SIGKILL)

    def stop(self) -> bool:
        """Stop it, and wait until it has stopped; False where it ended instead."""
        self.send_signal(signal.SIGSTOP)
        while self.returncode is None:
            pid, status = self._nursery.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                return True
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        return False


def fork(
    module: str,
    *argv: str,
    env: Mapping[str, str],
    output: IO[bytes],
    errors: IO[bytes] | None = None,
    cwd: Path = TESTS,
    imports: Sequence[str] = (),
) -> Forked:
    """Run a module, or a file, as a program; it reads a pipe, and writes to `output`.

    As with `python -P`, and `-W error` where PYTHONWARNINGS says so. It finds these `imports` done,
    as it does that of bgjob.
    """
    theirs, ours = os.pipe()
    stdin = os.fdopen(ours, "wb")
    files = theirs, output.fileno(), (errors or output).fileno()
    nursery = _nursery(*imports)
    try:
        return Forked(nursery, nursery.fork(module, argv, env, cwd, *files), stdin)
    finally:
        os.close(theirs)


def run(
    module: str,
    *argv: str,
    env: Mapping[str, str],
    cwd: Path = TESTS,
    imports: Sequence[str] = (),
    timeout: float = 2 * PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, without input; as `fork`, and subprocess.run."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = fork(
            module, *argv, env=env, output=output, errors=errors, cwd=cwd, imports=imports
        )
        assert process.stdin is not None
        process.stdin.close()
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(
            [module, *argv], code, output.read().decode(), errors.read().decode()
        )


def _serve(owner: socket.socket) -> None:
    """Fork and wait on the owner's requests; in a fork, become the requested program."""
    gc.freeze()  # no fork has to walk over all that was imported when it ends
    while True:
        words, fds, _, _ = socket.recv_fds(owner, 1 << 16, 3)
        while words and not words.endswith(b"\n"):
            words += owner.recv(1 << 16)
        if not words:
            return
        match json.loads(words):
            case ["fork", module, argv, env, cwd]:
                answer: Any = os.fork()
                if not answer:
                    owner.close()
                    for number, fd in enumerate(fds):
                        os.dup2(fd, number)
                        os.close(fd)
                    os.environ.clear()
                    os.environ.update(env)
                    sys.argv[1:] = argv
                    os.chdir(cwd)
                    if Path(cwd) != TESTS:
                        sys.path[:1] = filter(None, env["PYTHONPATH"].split(os.pathsep))
                    if env.get("PYTHONWARNINGS") == "error":
                        warnings.simplefilter("error")
                    if module.endswith(".py"):
                        runpy.run_path(module, run_name="__main__")
                    else:
                        runpy.run_module(module, run_name="__main__", alter_sys=True)
                    return
                for fd in fds:
                    os.close(fd)
            case ["wait", pid, options]:
                answer = os.waitpid(pid, options)
        owner.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    _serve(socket.socket(fileno=int(sys.argv[1])))
