"""`bgjob worker --reload`: a worker that is started again when its program changes."""

import re
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from support.database import rows
from support.documents import ROOT
from support.platforms import environment
from support.waiting import PATIENCE, eventually

from bgjob import Client, EnqueueRequest, cli
from bgjob._cli.worker.child import ChildProcess

PROGRAM = """
import os, time
from pathlib import Path
from bgjob import Mux

mux = Mux()

@mux.handler("t")
def t(job):
    print("{version} runs", job.id, os.getpid(), flush=True)

@mux.handler("gate")
def gate(job):
    print("entered", os.getpid(), flush=True)
    while not Path("open").exists():
        time.sleep(0.01)
    print("{version} leaves", flush=True)
"""


class Reloaded:
    """A command that reloads, in a session of its own."""

    def __init__(self, folder: Path, dsn: str, *args: str, **env: str) -> None:
        self.folder = folder
        self.client = Client(dsn)
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **env}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bgjob", "worker", "jobs:mux"]
                + ["--queue", "q=2", "--reload", *args],
                cwd=folder,
                env={**env, "DATABASE_URL": dsn, "BGJOB_DSN": ""},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def heard(self, text: str, times: int = 1) -> None:
        """Wait until a text was written so many times."""
        eventually(
            lambda: (self.out + self.err).count(text) >= times or self.process.poll() is not None
        )
        assert (self.out + self.err).count(text) == times, self.out + self.err

    def write(self, version: str, name: str = "jobs.py") -> None:
        """Write the program; a text of another length, which Python's cache notices."""
        (self.folder / name).write_text(PROGRAM.replace("{version}", version))

    def ran(self, type: str, id: str, text: str) -> int:
        """Enqueue a job, wait for what it prints, and return the process that ran it."""
        self.client.enqueue(EnqueueRequest("q", type, id=id))
        self.heard(text)
        # Its line may be written in parts.
        assert eventually(lambda: re.search(rf"{text} \d+\s", self.out) is not None)
        return int(self.out.split(f"{text} ")[1].split()[0])

    def ended(self) -> int:
        return self.process.wait(PATIENCE)


Start = Callable[..., Reloaded]


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.fixture
def start(dsn: str, tmp_path: Path) -> Iterator[Start]:
    """Start the command in a folder with `jobs.py`, and wait until its worker runs."""
    begun: list[Reloaded] = []

    def start(*args: str, **env: str) -> Reloaded:
        (tmp_path / "jobs.py").write_text(PROGRAM.replace("{version}", "v1"))
        reloaded = Reloaded(tmp_path, dsn, *args, **env)
        begun.append(reloaded)
        reloaded.heard("jobs:mux is running")
        return reloaded

    yield start
    for reloaded in begun:
        reloaded.client.close()
        try:
            os.killpg(reloaded.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        reloaded.process.wait(PATIENCE)


def test_a_change_of_a_python_file_starts_the_worker_again_after_its_running_jobs(
    start: Start, conn: psycopg.Connection, tmp_path: Path
) -> None:
    (tmp_path / "package").mkdir()
    reloaded = start()
    first = reloaded.ran("gate", "gate", "entered")
    for name in ("notes.txt", ".venv/lib.py", "env/lib/site-packages/lib.py", "__pycache__/x.py"):
        (reloaded.folder / name).parent.mkdir(parents=True, exist_ok=True)
        reloaded.write("ignored", name)
    reloaded.write("second", "package/module.py")
    reloaded.heard("package/module.py has changed, reloading")
    reloaded.heard("jobs:mux: reload, shutting down")
    assert lives(first)
    reloaded.write("second")
    (reloaded.folder / "open").touch()
    reloaded.heard("v1 leaves")
    reloaded.heard("jobs:mux is running", 2)
    second = reloaded.ran("t", "a", "second runs a")
    assert first != second and not lives(first)

    (reloaded.folder / "jobs.py").write_text("def broken(:\n")
    reloaded.heard("it is started again when a file changes")
    assert (
        f'  File "{reloaded.folder}/jobs.py", line 1\n    def broken(:\n' in reloaded.err
        and "SyntaxError" in reloaded.err
        and "importlib" not in reloaded.err
        and "bgjob: importing jobs failed\n" in reloaded.err
    )
    reloaded.write("the third")
    reloaded.heard("jobs.py has changed, starting")
    third = reloaded.ran("t", "b", "the third runs b")
    reloaded.process.send_signal(signal.SIGTERM)
    assert reloaded.ended() == 0 and not lives(third)
    assert "jobs:mux: SIGTERM, shutting down" in reloaded.err
    assert reloaded.err.count("watching the Python files in .\n") == 1
    assert "ignored" not in reloaded.err and "detected" not in reloaded.err
    assert rows(conn, "select id from bgjob_job") == []


def test_a_job_that_outlives_the_grace_period_of_a_reload_gets_its_attempt_back(
    start: Start, conn: psycopg.Connection
) -> None:
    reloaded = start("--grace", "0.1")
    first = reloaded.ran("gate", "gate", "entered")
    reloaded.write("second")
    reloaded.heard("1 job still running, left to the lease")
    reloaded.ran("t", "a", "second runs a")
    assert not lives(first)
    assert eventually(lambda: rows(conn, "select id, attempt from bgjob_job") == [("gate", 0)])


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_terminal_ends_both_processes_gracefully_and_twice_at_once(
    start: Start, times: int, conn: psycopg.Connection
) -> None:
    reloaded = start()
    child = reloaded.ran("gate", "gate", "entered")
    os.killpg(reloaded.process.pid, signal.SIGINT)
    reloaded.heard("shutting down")
    if times == 1:
        (reloaded.folder / "open").touch()
    else:
        os.killpg(reloaded.process.pid, signal.SIGINT)
    assert reloaded.ended() == (0 if times == 1 else 130)
    assert eventually(lambda: not lives(child))
    assert ("v1 leaves" in reloaded.out) is (times == 1)
    assert len(rows(conn, "select id from bgjob_job")) == times - 1
    assert "Traceback" not in reloaded.err


def test_the_worker_shuts_down_when_its_parent_is_killed(
    start: Start, conn: psycopg.Connection
) -> None:
    reloaded = start()
    child = reloaded.ran("gate", "gate", "entered")
    reloaded.process.kill()
    text = "jobs:mux: the parent process ends, shutting down"
    assert eventually(lambda: text in reloaded.err), reloaded.err
    (reloaded.folder / "open").touch()
    assert eventually(lambda: not lives(child))
    assert "v1 leaves" in reloaded.out and rows(conn, "select id from bgjob_job") == []


def test_other_folders_are_watched_and_the_worker_has_the_options_of_the_command(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    alive = other / "alive"
    reloaded = start(
        *("--reload-dir", str(other), "--alive-file", str(alive), "--log-format", "json"),
        *("--health", "127.0.0.1:0", "--release", "r1"),
    )
    reloaded.heard("probes are answered on 127.0.0.1:")
    assert eventually(alive.exists)
    reloaded.write("unseen")
    (other / "shared.py").touch()
    reloaded.heard(f"{other}/shared.py has changed, reloading")
    reloaded.heard("jobs:mux is running", 2)
    assert "jobs.py has" not in reloaded.err
    [row] = [r for r in reloaded.client.workers() if r.seen_at is not None][-1:]
    assert row.release == "r1"
    os.kill(reloaded.process.pid, signal.SIGTERM)
    assert reloaded.ended() == 0


def test_it_reloads_where_no_pipe_can_be_inherited_as_on_windows(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shim = environment("Windows", tmp_path_factory.mktemp("shim"))
    reloaded = start(PYTHONPATH=shim["PYTHONPATH"])
    first = reloaded.ran("t", "a", "v1 runs a")
    reloaded.write("second")
    reloaded.heard("jobs:mux has ended")
    second = reloaded.ran("t", "b", "second runs b")
    reloaded.process.send_signal(signal.SIGINT)
    assert reloaded.ended() == 0 and not lives(first) and not lives(second)
    assert "jobs:mux: SIGINT, shutting down" in reloaded.err


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--reload", "--processes", "2"], 2, "--reload runs one process: leave out --processes"),
        (["--reload-dir", "."], 2, "--reload-dir has no effect on its own: pass --reload, too"),
        (["--reload", "--reload-dir", "nowhere"], 2, "there is no folder 'nowhere'"),
        (["--reload"], 1, '--reload needs watchfiles; remedy: pip install "bgjob[reload]"'),
    ],
)
def test_what_does_not_go_is_refused_with_the_remedy(
    arguments: list[str],
    status: int,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    try:
        answer: object = cli.main(["worker", "jobs:mux", *arguments])
    except SystemExit as error:
        answer = error.code
    assert answer == status
    assert complaint in capsys.readouterr().err


def test_a_child_of_a_program_that_runs_from_the_source_finds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder, is_safe in ((ROOT, False), (tmp_path, True)):
        monkeypatch.chdir(folder)
        assert ("-P" in ChildProcess([], {})._command) is is_safe
