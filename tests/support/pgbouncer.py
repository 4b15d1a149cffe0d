"""PgBouncer itself, where it is installed."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from support.waiting import PATIENCE, eventually

Mode = Literal["session", "transaction", "statement"]


def find_pgbouncer() -> str | None:
    """Return the path of the program; Debian's is not on an ordinary user's PATH."""
    return shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def version_of(program: str) -> tuple[int, ...]:
    """Return its version, such as (1, 18, 0)."""
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return tuple(map(int, told.stdout.split()[1].split(".")))


class PgBouncer:
    """A running PgBouncer before a server."""

    def __init__(self, port: int) -> None:
        self._port = port

    def dsn(self, dsn: str) -> str:
        """Return a DSN that leads through here to the database of `dsn`."""
        return make_conninfo(
            dsn, host="127.0.0.1", port=self._port, sslmode="disable", gssencmode="disable"
        )


@contextlib.contextmanager
def pgbouncer(
    program: str, server_dsn: str, mode: Mode, *, size: int = 4, **settings: str
) -> Iterator[PgBouncer]:
    """Run one before all databases of a server.

    It has `size` sessions for each database, or, in session mode, 50.
    """
    # It does not run as root.
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = conninfo_to_dict(server_dsn)
    options = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(port),
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": mode,
        "default_pool_size": str(50 if mode == "session" else size),
        **({"max_prepared_statements": "100"} if version_of(program) >= (1, 21) else {}),
        **settings,
    }
    with tempfile.TemporaryDirectory(prefix="bgjob-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "ini").write_text(
            f"[databases]\n* = host={server['host']} port={server['port']} user={server['user']}\n"
            "[pgbouncer]\n" + "".join(f"{key} = {value}\n" for key, value in options.items())
        )
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, folder / "ini"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=account and account.pw_uid,
                group=account and account.pw_gid,
                extra_groups=account and [],
            )
        running = PgBouncer(port)

        def answers() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(running.dsn(server_dsn)).close()
                return True
            return False

        try:
            assert eventually(answers), (folder / "log").read_text()
            yield running
        finally:
            process.terminate()
            process.wait(PATIENCE)
