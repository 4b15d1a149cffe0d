"""The guardian: a process that runs one PostgreSQL server for its owner, which started it.

It is a process of its own, so that it can stop the server and remove its folder however the
owner dies. Its stdin is a socket from the owner, which reaches its end when the owner closes
it, exits, or is killed. It leads its own session, so a Ctrl-C for the owner does not reach the
server before the owner has finished with it. It is run by path and imports only the standard
library: it is ready in some 30 ms, and needs no path to bgjob.

`argv[1]` holds the options, as JSON: `owner` (process id), `bin_dir`, `tmp_dir` (the folder to
make the server's own folder in), `settings`. Commands are lines on stdin: `start` and
`stop MODE`. It answers each with a line of JSON on stdout, with `dsn`, `data_dir` and `pid`, or
with `error`. It sends the first line when the server has started, without a command. It ends at
the end of stdin.
"""

import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

PORT = 5432  # no port is opened: the number only names the socket's file
LONGEST_SOCKET_PATH = 100  # bytes; the kernel's limit is 107 on Linux and 103 on macOS
START_TIMEOUT = 60.0
STOP_TIMEOUT = 10.0
LINGER = 5.0
OWNER_CHECK_INTERVAL = 1.0
STOP_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "kill": signal.SIGKILL}


class ServerError(Exception):
    """The server could not be made or started; the text contains its output."""


def open_to_all(path: Path) -> bool:
    """Whether every user of this host may enter a folder, or run a file."""
    path = path.resolve()
    return all(p.stat().st_mode & stat.S_IXOTH for p in (path, *path.parents))


def make_folder(tmp_dir: Path, account: pwd.struct_passwd | None) -> Path:
    """Make the server's folder in `tmp_dir`, or in /tmp if that does not work.

    `tmp_dir` does not work if the socket's path would be too long or contain a comma, which
    separates hosts in a DSN, or if the server's user may not enter it.
    """
    for parent in (tmp_dir, Path("/tmp")):  # noqa: S108 (mkdtemp's folder is private)
        if account is not None and not open_to_all(parent):
            continue
        folder = Path(tempfile.mkdtemp(prefix="bgjob-", dir=parent))
        socket_path = os.fsencode(folder / f".s.PGSQL.{PORT}")
        if len(socket_path) <= LONGEST_SOCKET_PATH and b"," not in socket_path:
            if account is not None:
                os.chown(folder, account.pw_uid, account.pw_gid)
            return folder
        folder.rmdir()
    raise ServerError(
        f"no folder for a PostgreSQL server: the path of {tmp_dir} is too long or has a comma, or "
        "the server's user may not enter it; set TMPDIR to a folder that all users may enter"
    )


def copy_installation(bin_dir: Path, folder: Path, account: pwd.struct_passwd) -> Path:
    """Copy the server's programs to a folder from which its user may run them; return it."""
    prefix = bin_dir.resolve().parent
    # A wheel's programs look for their libraries in a folder next to their package.
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
    site = folder / "site"
    copy = site / prefix.parent.name / prefix.name
    for part in (prefix / "bin", prefix / "lib", prefix / "share"):
        if part.is_dir():
            shutil.copytree(part, copy / part.name, symlinks=True)
    if libraries.is_dir():
        shutil.copytree(libraries, site / libraries.name, symlinks=True)
    for path in (site, *site.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    return copy / "bin"


class Server:
    """A data folder, and its server while that runs."""

    def __init__(self, bin_dir: Path, tmp_dir: Path, settings: Mapping[str, str]) -> None:
        # PostgreSQL refuses to run as root.
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._folder = make_folder(tmp_dir, self._account)
        self._bin_dir = bin_dir
        self._settings = settings
        self._postmaster: subprocess.Popen[bytes] | None = None

    @property
    def data_dir(self) -> Path:
        return self._folder / "data"

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    @property
    def _pid_file(self) -> Path:
        return self.data_dir / "postmaster.pid"

    def facts(self) -> dict[str, str | int | None]:
        return {
            "dsn": f"postgresql://postgres@/postgres?host={quote(str(self._folder))}&port={PORT}",
            "data_dir": str(self.data_dir),
            "pid": self._postmaster.pid if self._postmaster else None,
        }

    def create(self) -> None:
        """Make the data folder."""
        if self._account is not None and not open_to_all(self._bin_dir / "initdb"):
            self._bin_dir = copy_installation(self._bin_dir, self._folder, self._account)
        command = ["initdb", "-D", str(self.data_dir), "-U", "postgres", "-A", "trust"]
        if self._spawn(*command, "--encoding=UTF8", "--locale=C", "--no-sync").wait() != 0:
            raise ServerError(f"initdb failed:\n{self._end_of_log()}")

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        if self._postmaster is not None and self._postmaster.poll() is None:
            return
        # After a postmaster was killed, its backends hold the data folder until they notice.
        killed = self._pid_file.exists()
        deadline = time.monotonic() + (LINGER if killed else 0.0)
        while not self._try_start():
            if time.monotonic() >= deadline:
                raise ServerError(f"PostgreSQL did not start:\n{self._end_of_log()}")
            time.sleep(0.1)

    def _try_start(self) -> bool:
        settings = {
            **self._settings,
            "listen_addresses": "",
            "unix_socket_directories": f'"{self._folder}"',
            "port": str(PORT),
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        postmaster = self._spawn("postgres", "-D", str(self.data_dir), *options)
        self._postmaster = postmaster
        deadline = time.monotonic() + START_TIMEOUT
        while postmaster.poll() is None:
            if self._accepts_connections(postmaster.pid):
                return True
            if time.monotonic() >= deadline:
                self.stop("immediate")
                break
            time.sleep(0.01)
        return False

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Run one of the server's programs as the server's user, with its output in the log."""
        account = self._account
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603
                [self._bin_dir / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                # The owner's PGPORT, PGDATA and so on are for another server.
                env={k: v for k, v in os.environ.items() if not k.startswith("PG")},
                user=account and account.pw_uid,
                group=account and account.pw_gid,
                extra_groups=account and [],
            )

    def _end_of_log(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])

    def _accepts_connections(self, pid: int) -> bool:
        """Read the status file, as pg_ctl does: line 1 is the pid, line 8 the state."""
        try:
            lines = self._pid_file.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"  # noqa: PLR2004

    def stop(self, mode: str) -> None:
        """Stop the server if it runs: in this mode, then in ever harder ones."""
        if self._postmaster is None:
            return
        for signum in (STOP_SIGNALS[mode], signal.SIGQUIT, signal.SIGKILL):
            self._postmaster.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._postmaster.wait(STOP_TIMEOUT)
                break
        self._postmaster = None

    def remove(self) -> None:
        """Stop the server, and remove its processes, shared memory and folder."""
        self.stop("fast")
        if self._pid_file.exists():
            # It was killed. Only a new start finds the shared memory that it left, and frees it.
            with contextlib.suppress(ServerError):
                self.start()
            self.stop("fast")
        shutil.rmtree(self._folder, ignore_errors=True)


def reply(values: Mapping[str, object]) -> None:
    """Answer the owner; if it is gone, stdin ends as well."""
    with contextlib.suppress(ConnectionError):
        os.write(sys.stdout.fileno(), json.dumps(values).encode() + b"\n")


def obey(command: bytes, server: Server) -> None:
    """Execute one command of the owner and answer it."""
    try:
        match command.decode().split():
            case ["start"]:
                server.start()
            case ["stop", mode] if mode in STOP_SIGNALS:
                server.stop(mode)
            case _:
                raise ServerError(f"unknown command {command!r}")
    except (ServerError, OSError) as error:
        reply({"error": str(error)})
    else:
        reply(server.facts())


def main() -> None:
    """Serve the owner until it closes the socket or ends, or until a SIGTERM."""
    options = json.loads(sys.argv[1])
    terminated: list[int] = []
    # Handlers, not SIG_IGN: the server would inherit that.
    signal.signal(signal.SIGTERM, lambda signum, _: terminated.append(signum))
    signal.signal(signal.SIGINT, lambda *_: None)
    stdin = sys.stdin.fileno()
    # An owner that dies with an unread answer resets the connection instead of ending it.
    with contextlib.suppress(ConnectionResetError), contextlib.ExitStack() as stack:
        try:
            bin_dir, tmp_dir = Path(options["bin_dir"]), Path(options["tmp_dir"])
            server = Server(bin_dir, tmp_dir, options["settings"])
            stack.callback(server.remove)
            server.create()
            server.start()
        except (ServerError, OSError) as error:
            reply({"error": str(error)})
            return
        reply(server.facts())
        # A forked child keeps the socket open after the owner's death: check the parent too.
        while not terminated and os.getppid() == options["owner"]:
            if select.select([stdin], [], [], OWNER_CHECK_INTERVAL)[0]:
                command = os.read(stdin, 1024)
                if not command:
                    break
                obey(command, server)


if __name__ == "__main__":
    main()
