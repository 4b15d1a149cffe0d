"""bgjob on Windows and macOS, or on what is left of this system without what they lack."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import psycopg
import pytest
from support.database import rows
from support.documents import ROOT
from support.platforms import System, environment, run_on
from support.waiting import PATIENCE

from bgjob import Client, EnqueueRequest

both_systems = pytest.mark.parametrize("system", get_args(System))

POSIX = re.compile(
    r"\b(os\.(register_at_fork|fork\w*|get[a-z]*[gsu]id\b|killpg|set[a-z]*[gsu]id|pidfd\w*"
    r"|eventfd\w*|sched_\w+|wait\w+|uname|statvfs|chown|pipe2|mkfifo)"
    r"|select\.(poll|epoll|kqueue)|selectors\.(Poll|Epoll|Kqueue)\w+"
    r"|signal\.(SIG(?!INT|TERM|_DFL|_IGN|nals)\w+|pthread_\w+|alarm|sigwait)|AF_UNIX|\w+_fds\b"
    r"|(from|import) (fcntl|termios|tty|resource|pwd|grp|syslog|curses)\b|/proc/)"
)

USES = {
    "_cli/listener.py": "Unix sockets, which `arguments.address` refuses",
    "_cli/probing.py": "Unix sockets, which `arguments.address` refuses",
    "_cli/top/terminal.py": "imported where `can_draw` is true",
    "_cli/worker/child.py": "asks whether there is such a thing",
    "_cli/worker/processes.py": "`--processes` refuses before",
    "_cli/worker/signals.py": "asks whether there is such a thing",
    "_cli/worker/systemd.py": "asks whether there is such a thing",
    "_cli/arguments.py": "asks whether there is such a thing",
    "job.py": "asks whether there is such a thing",
    "_postgres/fork.py": "asks whether there is such a thing",
    "_postgres/polling.py": "asks whether there is such a thing",
    "ext/pytest_plugin.py": "only where there is /dev/shm",
    "ext/_guardian.py": "a program of its own, which EmbeddedServer starts, or refuses to",
}
"""The modules that use what some system has not, and why they may."""


def test_what_windows_has_not_is_used_in_known_places_only() -> None:
    used = {
        str(path.relative_to(ROOT / "bgjob"))
        for path in (ROOT / "bgjob").rglob("*.py")
        if POSIX.search(path.read_text("utf-8"))
    }
    assert used == set(USES)


IMPORTS = """
import importlib, pkgutil, bgjob
for module in pkgutil.walk_packages(bgjob.__path__, "bgjob."):
    if module.name not in ("bgjob.__main__", "bgjob.demo") and ".ext.django" not in module.name:
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(module.name)
"""


@both_systems
def test_every_module_can_be_imported(system: System, tmp_path: Path) -> None:
    run = run_on(system, tmp_path, "-W", "error", "-c", IMPORTS)
    missing = ["bgjob._cli.top.terminal", "bgjob.ext._guardian"] if system == "Windows" else []
    assert (run.stdout.split(), run.stderr) == (missing, "")


PROGRAM = """
import asyncio, os, threading
from psycopg_pool import ConnectionPool
from bgjob import *
from bgjob.testing import adrain, drain

DSN = os.environ["DSN"]
mux = Mux()
ran = []
ready = threading.Semaphore(0)

def done(name, job):
    ran.append((name, job.id))
    ready.release()

@mux.handler("plain")
def plain(job): done("plain", job)

@mux.handler("coroutine")
async def coroutine(job):
    await asyncio.sleep(0)
    done("coroutine", job)

@mux.handler("transactional", transactional=True)
async def transactional(job, conn):
    await conn.execute("select 1")
    done("transactional", job)

TYPES = ["plain", "coroutine", "transactional"]

def requests(prefix):
    return [EnqueueRequest("q", type, id=f"{prefix} {type}") for type in TYPES]

def taken(prefix):
    for _ in TYPES:
        assert ready.acquire(timeout=20)
    assert sorted(ran) == sorted((type, f"{prefix} {type}") for type in TYPES), ran
    ran.clear()

with ConnectionPool(DSN, min_size=1, open=True) as pool:
    for client in Client(DSN), Client(pool):
        client.bulk_enqueue(requests("do"))
        assert [client.do("q", mux) for _ in TYPES] == [Complete()] * 3
        taken("do")
        client.close()
client = Client(DSN)
client.bulk_enqueue(requests("drain"))
drain(client, "q", mux)
taken("drain")
with Worker(client, "q", mux, poll_interval=3600):
    for request in requests("worker"):
        client.enqueue(request)
    taken("worker")

async def main():
    async with AsyncClient(DSN) as client:
        await client.bulk_enqueue(requests("async do"))
        for _ in TYPES:
            await client.do("q", mux)
        taken("async do")
        await client.bulk_enqueue(requests("adrain"))
        await adrain(client, "q", mux)
        taken("adrain")
        async with AsyncWorker(client, "q", mux, poll_interval=3600):
            for request in requests("async worker"):
                await client.enqueue(request)
            await asyncio.to_thread(taken, "async worker")

with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
    runner.run(main())
"""


@both_systems
def test_clients_do_drain_and_workers_work(
    system: System, tmp_path: Path, dsn: str, conn: psycopg.Connection
) -> None:
    run = run_on(system, tmp_path, "-W", "error", "-c", PROGRAM, env={"DSN": dsn})
    assert (run.returncode, run.stderr) == (0, "")
    assert rows(conn, "select id from bgjob_job") == []


PROACTOR = """
import asyncio, os, threading
import psycopg
from psycopg_pool import AsyncConnectionPool
from bgjob import *
from bgjob.testing import adrain

DSN = os.environ["DSN"]

async def main():
    assert isinstance(asyncio.get_running_loop(), asyncio.ProactorEventLoop)
    pool = AsyncConnectionPool(DSN, open=False)
    for source in DSN, pool:
        try:
            await AsyncClient(source).enqueue(EnqueueRequest("q", "t"))
        except psycopg.InterfaceError as error:
            print(error)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Observer(NoopObserver):
        def worker_error(self, error):
            print(error)
            loop.call_soon_threadsafe(told.set)

    mux = Mux()

    @mux.handler("t", transactional=True)
    async def handle(job, conn): ...

    Client(DSN).enqueue(EnqueueRequest("q", "t"))
    async with AsyncWorker(AsyncClient(DSN), "q", mux, observer=Observer()):
        await told.wait()

asyncio.run(main())
"""


def test_the_default_event_loop_of_windows_is_refused_with_the_remedy(
    tmp_path: Path, dsn: str
) -> None:
    run = run_on("Windows", tmp_path, "-c", PROACTOR, env={"DSN": dsn})
    assert (run.returncode, run.stderr) == (0, "")
    first, *others = run.stdout.splitlines()
    assert first == (
        "psycopg cannot work on asyncio's ProactorEventLoop, the default on Windows: run the "
        "program with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop), or uvicorn with "
        "--loop asyncio:SelectorEventLoop"
    )
    assert len(others) >= 2 and all(first in other for other in others)


COMMANDS = """
import shlex, sys
from bgjob import cli

for line in filter(str.strip, sys.stdin):
    try:
        status = cli.main(shlex.split(line))
    except SystemExit as error:
        status = error.code
    if status in (1, 2):
        print(line.strip(), "->", status)
"""

WORK = """
schema --check
enqueue q t --id one
enqueue q t --id two
stats
job list
explain one
job cancel two --reason why
dlq list
triage
pause q
resume q
schedules list
workers
top
"""

REFUSED = {
    "worker jobs:mux --queue q --health unix:place": (2, "Python has no Unix sockets on this"),
    "worker jobs:mux --queue q --processes 2": (2, "--processes needs a POSIX system"),
    "playground": (1, "the embedded server needs a POSIX system"),
}


@both_systems
def test_the_commands_of_a_client_work_and_others_refuse_with_a_sentence(
    system: System, tmp_path: Path, dsn: str
) -> None:
    lines = WORK + ("\n".join(REFUSED) if system == "Windows" else "")
    run = run_on(
        system,
        tmp_path,
        *("-W", "error", "-c", COMMANDS),
        env={"BGJOB_DSN": dsn, "PYTHONIOENCODING": "cp1252"},
        input=lines,
    )
    failed = [line for line in run.stdout.splitlines() if "->" in line]
    assert failed == [f"{line} -> {status}" for line, (status, _) in REFUSED.items()] * (
        system == "Windows"
    ), run.stderr
    for _, error in REFUSED.values():
        assert (error in run.stderr) is (system == "Windows")
    assert "Traceback" not in run.stderr


JOBS = """
from bgjob import Mux

mux = Mux()

@mux.handler("t")
async def handle(job):
    print("ran", job.id, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, 21], ids=["Ctrl-C", "Ctrl-Break"])
def test_the_command_runs_a_worker_until_a_signal_of_windows(
    number: int, tmp_path: Path, dsn: str, conn: psycopg.Connection
) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    with subprocess.Popen(
        [sys.executable, "-m", "bgjob", "worker", "jobs:mux", "--queue", "q"],
        cwd=tmp_path,
        env=environment("Windows", tmp_path, BGJOB_DSN=dsn),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            with Client(dsn) as client:
                client.enqueue(EnqueueRequest("q", "t", id="one"))
            assert process.stdout is not None
            assert process.stdout.readline() == "ran one\n"
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "shutting down" in errors and "Traceback" not in errors
    assert rows(conn, "select id from bgjob_job") == []
