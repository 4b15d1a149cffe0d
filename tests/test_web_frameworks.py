"""The examples for web frameworks serve requests and run jobs under real servers, and end."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import httpx
import psycopg
import pytest
from support.database import count, row
from support.databases import KEEPER, url_of
from support.documents import ROOT
from support.waiting import PATIENCE, eventually

from bgjob import Client, EnqueueRequest

EXAMPLES = ROOT / "tests" / "examples" / "web"

ORDERS = """
    create table orders (
        id int generated always as identity primary key, confirmed bool not null default false
    )
"""

SLOW = """
import asyncio
from pathlib import Path

from {module} import app, mux


@mux.handler("slow")
async def slow(job):
    Path("started").touch()
    while not Path("released").exists():
        await asyncio.sleep(0.01)
"""
"""The example, with a job that a shutdown has to wait for."""

CONNECTED = """
import os

import flask_orders
from bgjob import Client, EnqueueRequest
from flask_orders import create_worker

client = Client(os.environ["DATABASE_URL"] + "&application_name=elsewhere")
client.stats()  # with --preload its connection is there before the fork


def create_app():
    app = flask_orders.create_app()

    @app.post("/elsewhere")
    def elsewhere():
        return {"pid": os.getpid(), "id": client.enqueue(EnqueueRequest("elsewhere", "t"))}

    return app
"""
"""The example, with a client that was made when the module was imported."""

VERSION = """
from fastapi_orders import app, mux


@app.get("/version")
async def version():
    return {number}
"""


class Program:
    """A program, started by a command of an example's text, on a free port."""

    def __init__(self, command: str, folder: Path, dsn: str, output: IO[bytes]) -> None:
        name, *arguments = shlex.split(re.sub(r"\b8000\b", "0", command))
        self._log = Path(output.name)
        self._process = subprocess.Popen(
            [sys.executable, "-m", name, *arguments],
            cwd=folder,
            env={
                **os.environ,
                "DATABASE_URL": dsn,
                "BGJOB_DSN": "",
                "HOME": str(folder),  # where gunicorn has a socket
                "PYTHONPATH": str(EXAMPLES),
                "PYTHONDONTWRITEBYTECODE": "1",  # a reload looks at the times of files
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wrote(self, pattern: str) -> bool:
        """Wait until its log has the pattern."""
        return eventually(
            lambda: re.search(pattern, self.log) or self._process.poll() is not None
        ) and bool(re.search(pattern, self.log))

    def address(self) -> str:
        """Wait until it serves."""
        assert self.wrote("Application startup complete|Booting worker"), self.log
        listening = r"(?:running on|Listening at:) (http://127\.0\.0\.1:\d+)"
        assert self.wrote(listening), self.log
        [address] = re.findall(listening, self.log)
        return str(address)

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Wait for its end, and return how it ended."""
        return self._process.wait(PATIENCE)

    def has_left(self) -> bool:
        """Whether it has ended, with all processes that it started."""
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


Start = Callable[[str], Program]


@pytest.fixture
def start(dsn: str, conn: psycopg.Connection, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a program in a folder of the test's own."""
    conn.execute(ORDERS)
    with ExitStack() as stack:

        def start(command: str) -> Program:
            name = f"log-{len(list(tmp_path.glob('log-*')))}"
            output = stack.enter_context((tmp_path / name).open("wb"))
            program = Program(command, tmp_path, url_of(dsn), output)
            stack.callback(program.close)
            return program

        yield start


def commands_of(example: str) -> list[tuple[str, str]]:
    """Return the commands of an example's text, each with its output."""
    text = (EXAMPLES / f"{example}.txt").read_text()
    return re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", text, re.MULTILINE)


def follow(example: str, start: Start, *options: str) -> tuple[list[Program], str]:
    """Do what an example's text says, with the module `served` in its place."""
    programs: list[Program] = []
    address = ""
    for command, output in commands_of(example):
        if not command.startswith("curl "):
            words = [*shlex.split(command.replace(f"{example}:", "served:"))]
            words += [] if programs else options
            programs.append(start(shlex.join(words)))
            address = address or programs[0].address()
            continue
        method, path = re.findall(r"curl(?: --request (\w+))? localhost:8000(/\S+)", command)[0]

        def is_answered(method: str = method or "GET", path: str = path) -> bool:
            answer = httpx.request(method, address + path, timeout=PATIENCE)
            assert answer.is_success, programs[0].log
            return answer.text.strip() == output.strip()

        # A post is sent once; a job ends a little later.
        is_right = is_answered() or (not method and eventually(is_answered))
        assert is_right, "\n".join(program.log for program in programs)
    return programs, address


def nothing_is_left(conn: psycopg.Connection, *programs: Program) -> bool:
    """Wait until no process and no session is left, and see that no job and no worker is."""
    assert eventually(lambda: all(program.has_left() for program in programs))
    sessions = (
        "select count(*) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid() "
        f"and application_name <> '{KEEPER}'"
    )
    assert eventually(lambda: row(conn, sessions) == (0,))
    assert row(conn, "select count(*) from bgjob_worker where state <> 'ended'") == (0,)
    return [count(conn), count(conn, "bgjob_dead_job")] == [0, 0]


@pytest.mark.parametrize("example", ["fastapi_orders", "starlette_orders", "litestar_orders"])
def test_an_application_under_uvicorn_runs_its_jobs_and_ends_when_they_have(
    example: str, start: Start, dsn: str, conn: psycopg.Connection, tmp_path: Path
) -> None:
    (tmp_path / "served.py").write_text(SLOW.format(module=example))
    [server], address = follow(example, start)
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("mail", "slow"))
    assert eventually((tmp_path / "started").exists), server.log
    server.terminate()
    assert server.wrote("Waiting for application shutdown")
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)
    (tmp_path / "released").touch()
    assert server.ended() in (0, -signal.SIGTERM), server.log  # uvicorn raises the signal again
    assert "Traceback" not in server.log
    assert nothing_is_left(conn, server)


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["prefork", "preload"])
def test_an_application_under_gunicorn_shares_no_connection_between_its_processes(
    options: tuple[str, ...], start: Start, conn: psycopg.Connection, tmp_path: Path
) -> None:
    (tmp_path / "served.py").write_text(CONNECTED)
    programs, address = follow("flask_orders", start, *options)
    answers: dict[str, int] = {}

    def both_answered() -> bool:
        answer = httpx.post(f"{address}/elsewhere", timeout=PATIENCE)
        assert answer.is_success, programs[0].log
        answers[answer.json()["id"]] = answer.json()["pid"]
        return len(set(answers.values())) == 2

    assert eventually(both_answered)
    # Of gunicorn's two processes, of the worker's, and of the one that forked.
    clients = (
        "select count(*) from pg_stat_activity "
        "where datname = current_database() and application_name = 'elsewhere'"
    )
    assert row(conn, clients) == (4 if options else 3,)
    jobs = conn.execute("delete from bgjob_job where queue = 'elsewhere' returning id").fetchall()
    assert sorted(id for (id,) in jobs) == sorted(answers)
    for program in programs:
        program.terminate()
    assert [program.ended() for program in programs] == [0, 0]
    assert not any("Traceback" in program.log for program in programs)
    assert nothing_is_left(conn, *programs)


def test_a_reload_of_uvicorn_ends_the_worker_and_the_connections_of_the_old_code(
    start: Start, dsn: str, conn: psycopg.Connection, tmp_path: Path
) -> None:
    served = tmp_path / "served.py"
    served.write_text(VERSION.format(number=1))
    [server], address = follow("fastapi_orders", start, "--reload")
    assert httpx.get(f"{address}/version", timeout=PATIENCE).json() == 1
    working = "select pid from bgjob_worker where state <> 'ended'"
    before = row(conn, working)
    [now] = row(conn, "select clock_timestamp()")

    served.write_text(VERSION.format(number=2))

    def is_new() -> bool:
        try:
            return bool(httpx.get(f"{address}/version", timeout=PATIENCE).json() == 2)
        except httpx.TransportError:
            return False

    assert eventually(is_new), server.log
    after = row(conn, working)  # there is one
    assert after != before
    with pytest.raises(ProcessLookupError):
        os.kill(before[0], 0)
    older = (
        "select count(*) from pg_stat_activity where datname = current_database() "
        f"and pid <> pg_backend_pid() and application_name <> '{KEEPER}' and backend_start < %s"
    )
    assert eventually(lambda: row(conn, older, now) == (0,))
    server.terminate()
    assert server.ended() in (0, -signal.SIGTERM), server.log
    assert "Traceback" not in server.log
    assert nothing_is_left(conn, server)
