"""Three PostgreSQL servers under Patroni with etcd, on this host, in temporary folders."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from cluster.pipe import Pipe

PATIENCE = 300.0
"""Seconds for the cluster to be whole, on a busy host."""

_PATIENCE = {"GET": 2.0, "POST": 60.0}
"""Seconds for an answer of Patroni: one that is stopped gives none."""

_SIZE = 4 << 30
"""Bytes that the servers may need, most of them for WAL."""

_TTL = 20
"""Seconds after which the leader's key ends; Patroni allows no fewer."""


def in_time(condition: Callable[[], object]) -> bool:
    """Wait until the cluster is as it should be. True if it was in time.

    It is asked four times a second: each question costs processes that the cluster needs itself.
    """
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.25)
    return True


def missing() -> str | None:
    """Return which program is not installed; None if all are there."""
    needed = ("patroni", "etcd")
    return next((f"{name} is not installed" for name in needed if _found(name) is None), None)


def _found(program: str) -> str | None:
    """Return the path of a program: of this environment, or of the system."""
    return shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _parents() -> dict[int, int]:
    """Return the parent of each process of this host."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return parents


def _family(*pids: int) -> set[int]:
    """Return these processes with all their descendants."""
    parents = _parents()
    family = {pid for pid in pids if pid in parents}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


class Node:
    """A server and its Patroni.

    Attributes:
        name: in the cluster.
        port: where clients reach the server, whatever is cut.

    """

    def __init__(self, name: str, cluster: "Cluster", etcd: Pipe) -> None:
        self.name = name
        self.port = _free_port()
        self.api = _free_port()
        self._ways = etcd, cluster.enter(Pipe(self.port)), cluster.enter(Pipe(self.api))
        """To etcd; from the other servers, and from their Patroni."""
        self._cluster = cluster
        self._folder = cluster.folder / name
        self._folder.mkdir()
        self._patroni: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start Patroni, which starts the server."""
        (self._folder / "patroni.json").write_text(json.dumps(self._settings()))
        self._cluster.own(self._folder)
        self._patroni = self._cluster.start(
            self._folder / "log", "patroni", str(self._folder / "patroni.json")
        )

    def _settings(self) -> Mapping[str, Any]:
        etcd, others, others_patroni = self._ways
        synchronous = self._cluster.is_synchronous
        return {
            "scope": "bgjob",
            "name": self.name,
            "restapi": {
                "listen": f"127.0.0.1:{self.api}",
                "connect_address": f"127.0.0.1:{others_patroni.port}",
            },
            # Only this way to etcd: it would ask etcd for its addresses. And by version 2 of etcd's
            # interface: by version 3, a Patroni before 3.0.3 that was stopped for longer than its
            # lease takes the leader's key back from its new owner. The new primary's commits are lost,
            # and no replica is ever synchronous again.
            "etcd": {"proxy": f"http://127.0.0.1:{etcd.port}"},
            "bootstrap": {
                "dcs": {
                    "ttl": _TTL,
                    "loop_wait": 2,
                    "retry_timeout": 3,
                    "maximum_lag_on_failover": 100_000_000,
                    "primary_start_timeout": 0,
                    "master_start_timeout": 0,  # the older name of it
                    "synchronous_mode": synchronous,
                    "postgresql": {
                        "use_pg_rewind": True,
                        "remove_data_directory_on_rewind_failure": True,
                        "parameters": {
                            "max_connections": 200,
                            "wal_log_hints": "on",
                            "fsync": "off",  # no host crashes here
                            "wal_keep_size": "256MB",
                            "max_wal_size": "256MB",
                            "wal_receiver_status_interval": "1s",
                            "wal_sender_timeout": "5s",
                            "wal_receiver_timeout": "5s",
                            "shared_buffers": "32MB",
                        },
                    },
                },
                "initdb": [{"encoding": "UTF8"}, "no-sync"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{others.port}",
                "data_dir": str(self._folder / "data"),
                "bin_dir": str(self._cluster.bin_dir),
                "pgpass": str(self._folder / "pgpass"),
                "pg_hba": [
                    "host all all 127.0.0.1/32 trust",
                    "local all all trust",
                    "host replication all 127.0.0.1/32 trust",
                ],
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "postgres"},
                    "rewind": {"username": "postgres"},
                },
                "parameters": {"unix_socket_directories": str(self._folder)},
                "basebackup": {"checkpoint": "fast", "no-sync": ""},
            },
        }

    @property
    def postmaster(self) -> int | None:
        """The process id of the server; None while it is stopped."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        return None

    def ask(self, method: str, path: str, body: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Ask Patroni; return its status and answer, 0 if it does not answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.api}/{path}",
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE[method]) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def is_writable(self) -> bool:
        """Whether the server takes writes, as far as it says itself."""
        return self._is_in_recovery() is False

    def is_standby(self) -> bool:
        """Whether the server says that it is a standby."""
        return self._is_in_recovery() is True

    def _is_in_recovery(self) -> bool | None:
        """Ask the server; None if it does not answer."""
        with (
            contextlib.suppress(psycopg.OperationalError),
            psycopg.connect(self._cluster.dsn_of(self), connect_timeout=2) as conn,
        ):
            conn.execute("set statement_timeout = '2s'")
            [[answer]] = conn.execute("select pg_is_in_recovery()").fetchall()
            return bool(answer)
        return None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to Patroni, the server and all their processes."""
        assert self._patroni is not None
        pids = [self._patroni.pid, self.postmaster]
        for pid in _family(*(pid for pid in pids if pid is not None)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def cut_off(self) -> None:
        """Cut it off from etcd and from the others; clients still reach it."""
        for way in self._ways:
            way.cut()

    def mend(self) -> None:
        """Let it reach them again."""
        for way in self._ways:
            way.mend()

    def kill_server(self) -> None:
        """Kill the server's first process, upon which the others end."""
        assert self.postmaster is not None
        os.kill(self.postmaster, signal.SIGKILL)

    def kill(self) -> None:
        """Kill all of it, as the loss of its host does."""
        if self._patroni is not None:
            self.signal(signal.SIGKILL)
            self._patroni.wait(30)

    @property
    def log(self) -> str:
        """The end of Patroni's log."""
        return (self._folder / "log").read_text()[-3000:]


class Cluster:
    """The servers, their etcd, and connection strings that find the primary."""

    def __init__(self, folder: Path, bin_dir: Path, *, is_synchronous: bool) -> None:
        self.folder = folder
        self.bin_dir = bin_dir
        self.is_synchronous = is_synchronous
        self._stack = contextlib.ExitStack()
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self.own(folder)
        port = _free_port()
        self._etcd = self._start_etcd(port)
        pipes = [self.enter(Pipe(port)) for _ in range(3)]
        self.nodes = [Node(f"node{n}", self, pipe) for n, pipe in enumerate(pipes)]

    def enter(self, pipe: Pipe) -> Pipe:
        """Keep a pipe open until the end."""
        return self._stack.enter_context(pipe)

    def own(self, folder: Path) -> None:
        """Give a folder to the account that the servers run under."""
        if self._account is not None:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def start(self, log: Path, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start a program under that account, in a session of its own."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [_found(program) or program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith(("PG", "PYTHON"))},
                    "HOME": str(self.folder),
                },
                user=self._account and self._account.pw_uid,
                group=self._account and self._account.pw_gid,
                extra_groups=self._account and [],
                start_new_session=True,
            )

    def _start_etcd(self, port: int) -> "subprocess.Popen[bytes]":
        url, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{_free_port()}"
        return self.start(
            self.folder / "etcd.log",
            "etcd",
            *("--data-dir", str(self.folder / "etcd"), "--unsafe-no-fsync", "--enable-v2"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
            *("--initial-cluster", f"default={peers}"),
        )

    def begin(self) -> None:
        """Start the servers one after the other; wait until all are there."""
        self.nodes[0].start()
        self.wait_for_primary()
        for node in self.nodes[1:]:
            node.start()
        self.wait_until_whole()

    def dsn_of(self, *nodes: Node, **options: Any) -> str:
        """Return a connection string for these servers, in this order."""
        return make_conninfo(
            host=",".join("127.0.0.1" for _ in nodes),
            port=",".join(str(node.port) for node in nodes),
            user="postgres",
            **{"dbname": "postgres", **options},
        )

    def dsn(self, **options: Any) -> str:
        """Return a connection string that leads to the primary, whichever it is."""
        return self.dsn_of(*self.nodes, target_session_attrs="read-write", **options)

    def primary(self) -> Node | None:
        """The server that has the leader's key, by what Patroni says."""
        return next((node for node in self.nodes if node.ask("GET", "primary")[0] == 200), None)

    def wait_for_primary(
        self, *, other_than: Node | None = None, than_process: int | None = None
    ) -> Node:
        """Wait until a server is the primary and takes writes.

        Args:
            other_than: a server that is not meant.
            than_process: the process id of one that was killed: started again, it is meant.

        """

        def found() -> bool:
            primary = self.primary()
            return (
                primary is not None
                and primary is not other_than
                and primary.is_writable()
                and primary.postmaster != than_process
            )

        assert in_time(found), "\n\n".join(node.log for node in self.nodes)
        primary = self.primary()
        if primary is None:
            return self.wait_for_primary(other_than=other_than, than_process=than_process)
        return primary

    def wait_until_whole(self) -> None:
        """Wait until the primary has two replicas, in synchronous mode one of them synchronous."""

        def is_whole() -> bool:
            _, answer = self.nodes[0].ask("GET", "cluster")
            members = json.loads(answer)["members"] if answer else []
            states = sorted(f"{member['role']} {member['state']}" for member in members)
            told = [
                state.replace("master", "leader").replace("primary", "leader") for state in states
            ]
            replicas = [state for state in told if not state.startswith("leader")]
            return (
                len(told) == 3
                and len(replicas) == 2
                and all(state.endswith(("running", "streaming")) for state in told)
                # One that was a primary runs, too, before it is rewound to where the others are.
                and len({member.get("timeline") for member in members}) == 1
                and (not self.is_synchronous or any(s.startswith("sync") for s in replicas))
            )

        assert in_time(is_whole), "\n\n".join(
            [self.nodes[0].ask("GET", "cluster")[1], *(node.log for node in self.nodes)]
        )

    def close(self) -> None:
        """End all processes, and close the pipes."""
        for node in self.nodes:
            node.kill()
        os.killpg(self._etcd.pid, signal.SIGKILL)
        self._etcd.wait(30)
        self._stack.close()


def _place() -> str:
    """Where to put the servers: in memory, since pg_rewind waits for the disk after each change."""
    memory = Path("/dev/shm")
    is_large = memory.is_dir() and shutil.disk_usage(memory).free > _SIZE
    return str(memory) if is_large and os.access(memory, os.W_OK) else "/tmp"


@contextlib.contextmanager
def cluster_of(bin_dir: Path, *, is_synchronous: bool) -> Iterator[Cluster]:
    """Run a cluster for the length of a `with` block."""
    folder = Path(tempfile.mkdtemp(prefix="bgjob-", dir=_place()))
    folder.chmod(0o755)
    cluster = Cluster(folder, bin_dir, is_synchronous=is_synchronous)
    try:
        cluster.begin()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
