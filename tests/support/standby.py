"""A standby of an embedded server, made and run by that server's own programs."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import psycopg

from bgjob.ext.embedded import EmbeddedServer, _bin_dir_of_wheel
from support.waiting import PATIENCE, eventually


def programs_of(server: EmbeddedServer, bin_dir: Path | None) -> Path:
    """Return the folder of the programs that the server runs: its own copy, if it has one."""
    for copy in server.data_dir.parent.glob("site/*/*/bin"):
        return copy
    return bin_dir or _bin_dir_of_wheel()


class Standby:
    """A running standby; its DSN, and its end."""

    def __init__(self, dsn: str, postmaster: subprocess.Popen[bytes]) -> None:
        self.dsn = dsn
        self._postmaster = postmaster

    def kill(self) -> None:
        """End it, as if its host were lost."""
        self._postmaster.send_signal(signal.SIGQUIT)
        self._postmaster.wait(PATIENCE)


@contextlib.contextmanager
def standby_of(
    server: EmbeddedServer, bin_dir: Path | None, *, slot: str | None = None
) -> Iterator[Standby]:
    """Yield a standby that tells the primary which rows its queries need."""
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="bgjob-", dir="/tmp"))
    programs = programs_of(server, bin_dir)

    def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={k: v for k, v in os.environ.items() if not k.startswith("PG")},
                user=account and account.pw_uid,
                group=account and account.pw_gid,
                extra_groups=account and [],
            )

    postmaster = None
    try:
        if account:
            os.chown(folder, account.pw_uid, account.pw_gid)
        data = str(folder / "data")
        copied = start(
            *("pg_basebackup", "-D", data, "-d", server.dsn, "--write-recovery-conf"),
            *("--checkpoint=fast", "--no-sync", "--wal-method=stream"),
            *(("--slot", slot) if slot else ()),
        )
        assert copied.wait(PATIENCE) == 0, (folder / "log").read_text()
        settings: Mapping[str, str] = {
            "unix_socket_directories": str(folder),
            "port": "5432",
            "listen_addresses": "",
            "fsync": "off",
            # Not fewer than the primary.
            "max_connections": "300",
            "max_prepared_transactions": "20",
            "hot_standby_feedback": "on",
            "wal_receiver_status_interval": "1s",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        postmaster = start("postgres", "-D", data, *options)
        dsn = f"postgresql://postgres@/postgres?host={quote(str(folder))}&port=5432"

        def answers() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(dsn).close()
                return True
            return False

        assert eventually(answers), (folder / "log").read_text()
        yield Standby(dsn, postmaster)
    finally:
        if postmaster is not None and postmaster.poll() is None:
            postmaster.send_signal(signal.SIGQUIT)
            postmaster.wait(PATIENCE)
        shutil.rmtree(folder, ignore_errors=True)
