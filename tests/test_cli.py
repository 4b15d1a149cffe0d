"""The worker command loads a worker, runs it, and ends when and how it is asked to."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.documents import ROOT
from support.nursery import fork
from support.waiting import PATIENCE

from bgjob import Client, EnqueueRequest, cli

LATE = 2.0
"""Seconds after the grace period in which a process has to exit."""
NOISE = 4.0
"""Seconds by which a busy machine may be late."""

JOBS = """
import asyncio
import atexit
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from bgjob import AsyncClient, AsyncWorker, Client, Mux, Worker

LONG = 3600.0
DSN = os.environ["DATABASE_URL"]
mux = Mux()


def say(*words):
    # One write a line: the lines of other threads and processes come before or after it.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


@mux.handler("hello")
def hello(job):
    say("hello", job.id)


@mux.handler("hello_async")
async def hello_async(job):
    say("hello", job.id)


@mux.handler("frozen")
def frozen(job):
    say("frozen:", all(looked_at is not mux for looked_at in gc.get_objects()))


@mux.handler("gate")
def gate(job):
    say("entered", job.id)
    while not Path("open").exists():
        time.sleep(0.01)


@mux.handler("gate_async")
async def gate_async(job):
    say("entered", job.id)
    while not Path("open").exists():
        await asyncio.sleep(0.01)


@mux.handler("fails")
def fails(job):
    raise ValueError("it failed")


@mux.handler("thread")
def thread(job):
    say("entered")
    time.sleep(LONG)


@mux.handler("coroutine")
async def coroutine(job):
    say("entered")
    await asyncio.sleep(LONG)


@mux.handler("stubborn_coroutine")
async def stubborn_coroutine(job):
    say("entered")
    while True:
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            pass


@mux.handler("blocked_loop")
async def blocked_loop(job):
    say("entered")
    time.sleep(LONG)


@mux.handler("leaves_a_thread")
def leaves_a_thread(job):
    threading.Thread(target=time.sleep, args=(LONG,)).start()
    say("entered")


@mux.handler("leaves_an_executor")
async def leaves_an_executor(job):
    asyncio.get_running_loop().run_in_executor(None, time.sleep, LONG)
    say("entered")


@mux.handler("leaves_at_exit")
def leaves_at_exit(job):
    def hang():
        say("exiting")
        time.sleep(LONG)

    atexit.register(hang)
    say("entered")


@mux.handler("forks")
def forks(job):
    # As for any program, a fork of one that has threads is not without its dangers.
    warnings.simplefilter("ignore", DeprecationWarning)
    context = multiprocessing.get_context("fork")
    # Before the child has run a line of Python's.
    children = [context.Process(target=time.sleep, args=(20,)) for _ in range(12)]
    for child in children:
        child.start()
        os.kill(child.pid, getattr(signal, job.id))
    for child in children:
        child.join(0.5)
    say("alive:", sum(child.is_alive() for child in children))
    for child in children:
        child.kill()


@mux.handler("stops_the_worker")
def stops_the_worker(job):
    worker.shutdown()


@mux.handler("stops_the_loop")
async def stops_the_loop(job):
    asyncio.get_running_loop().stop()


@mux.handler("breaks_the_worker")
def breaks_the_worker(job):
    def broken():
        raise SystemExit

    worker._group._controls[0]._turn = broken
    worker._group._controls[0]._waker.shout()


OPTIONS = {"concurrency": 1, "poll_interval": 0.1}
worker = Worker(Client(DSN), "q", mux, **OPTIONS)
async_worker = AsyncWorker(AsyncClient(DSN), "q", mux, **OPTIONS)


def make():
    return worker


def make_async():
    return async_worker


async def make_on_loop():
    loop = asyncio.get_running_loop()

    async def same_loop(job):
        say("the same loop:", asyncio.get_running_loop() is loop)

    await asyncio.sleep(0)
    return AsyncWorker(AsyncClient(DSN), "q", mux.register("loop", same_loop), **OPTIONS)


async def make_on_blocked_loop():
    asyncio.get_running_loop().call_soon(time.sleep, LONG)  # it begins while the worker starts
    return async_worker


async def make_plain_on_loop():
    return worker


def make_of(dsn, *, queues, concurrency=None):
    say("made of", dsn == DSN, queues, concurrency)
    [(queue, number)] = queues.items()
    return Worker(Client(dsn), queue, mux, concurrency=number, poll_interval=0.1)


async def make_async_of(queues, **others):
    say("made of", queues, others)
    return async_worker


class Workers:
    main = worker
"""

each_target = pytest.mark.parametrize("target", ["worker", "async_worker"])


class Command:
    """A worker command that has been started."""

    def __init__(
        self, args: list[str], folder: Path, env: dict[str, str], *, module: str = "bgjob"
    ) -> None:
        self._out = folder / "stdout"
        self._err = folder / "stderr"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **env}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            # The current directory is on the module path by the command's own doing.
            self.process = fork(
                module, "worker", *args, env=env, output=out, errors=err, cwd=folder
            )
        assert self.process.stdin is not None
        self.process.stdin.close()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def heard(self, text: str) -> None:
        """Wait until the process has written a text."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.out + self.err:
            ended = self.process.poll() is not None and text not in self.out + self.err
            assert not ended, f"it ended without {text!r}: {self.out}{self.err}"
            assert time.monotonic() < deadline, f"no {text!r} in: {self.out}{self.err}"
            time.sleep(0.01)

    def send(self, signum: int = signal.SIGTERM) -> None:
        self.process.send_signal(signum)

    def ended(self) -> int:
        """Wait until the process has ended, and return its exit status."""
        return self.process.wait(PATIENCE)

    def stopped(self, signum: int = signal.SIGTERM) -> int:
        self.send(signum)
        return self.ended()


Start = Callable[..., Command]


@pytest.fixture
def start(dsn: str, tmp_path: Path) -> Iterator[Start]:
    """Start `bgjob worker` with these arguments, in a folder that has `jobs.py`."""
    commands: list[Command] = []

    def start(*args: str, module: str = "bgjob", **env: str) -> Command:
        command = Command(list(args), tmp_path, {"DATABASE_URL": dsn, **env}, module=module)
        commands.append(command)
        return command

    (tmp_path / "jobs.py").write_text(JOBS)
    yield start
    for command in commands:
        command.process.kill()
        command.process.wait(PATIENCE)


@pytest.fixture
def client(plain_client: Client) -> Client:
    return plain_client


def enqueue(client: Client, type_: str, id_: str = "a") -> None:
    client.enqueue(EnqueueRequest("q", type_, id=id_))


def live(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    """Return the id, the attempt and whether there is a lease, of each live job."""
    return conn.execute(
        "select id, attempt, lease_until is not null from bgjob_job order by id"
    ).fetchall()


# -- what can be served --------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("type_", ["hello", "hello_async"])
@each_target
def test_the_command_runs_jobs_until_a_signal(
    start: Start,
    client: Client,
    conn: psycopg.Connection,
    target: str,
    type_: str,
    signum: signal.Signals,
) -> None:
    command = start(f"jobs:{target}")
    enqueue(client, type_)
    command.heard("hello a")

    assert command.stopped(signum) == 0

    assert live(conn) == []
    assert f"jobs:{target} is running" in command.err
    assert signum.name in command.err
    assert command.err.endswith(f"jobs:{target} has ended\n")


@pytest.mark.parametrize(
    "name", ["make", "make_async", "make_on_loop", "make_plain_on_loop", "Workers.main"]
)
def test_the_command_serves_the_worker_that_a_factory_makes(
    start: Start, client: Client, name: str
) -> None:
    command = start(f"jobs:{name}")
    enqueue(client, "hello_async")
    command.heard("hello a")
    assert command.stopped() == 0


def test_imported_objects_are_never_examined_by_the_garbage_collector_again(
    start: Start, client: Client
) -> None:
    command = start("jobs:worker")
    enqueue(client, "frozen")
    command.heard("frozen: True")
    assert command.stopped() == 0


def test_a_coroutine_factory_is_awaited_on_the_loop_that_handlers_run_on(
    start: Start, client: Client
) -> None:
    command = start("jobs:make_on_loop")
    enqueue(client, "loop")
    command.heard("the same loop: True")
    assert command.stopped() == 0


def test_the_current_directory_comes_first_on_the_module_path(
    start: Start, client: Client, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "jobs.py").write_text("raise RuntimeError('the wrong module')")
    command = start("jobs:worker", PYTHONPATH=f"{elsewhere}{os.pathsep}{ROOT}")
    enqueue(client, "hello")
    command.heard("hello a")
    assert command.stopped() == 0


def test_readmes_example_runs_as_printed(
    start: Start, client: Client, tmp_path: Path, conn: psycopg.Connection
) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    section = re.search(r"^## The worker command$(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    assert section
    module = re.search(r"^```python\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    line = re.search(r"^```sh\nbgjob worker (.*)\n```$", section[1], re.MULTILINE)
    assert module
    assert line
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "jobs.py").write_text(module[1], "utf-8")

    command = start(*line[1].split())
    client.enqueue(EnqueueRequest("mail", "confirm", {"order": "order-2"}))
    command.heard("confirming order order-2")

    assert command.stopped() == 0
    assert live(conn) == []


# -- what the command line says of the worker ----------------------------------------------


@pytest.mark.parametrize(
    ("args", "at_once"),
    [
        (["--queue", "q"], 1),
        (["--queue", "q=2"], 2),
        (["--queue", "q", "--concurrency", "2"], 2),
        (["--queue", "q=2", "--concurrency", "1"], 2),
    ],
)
def test_the_command_runs_as_many_handlers_concurrently_as_requested(
    start: Start, client: Client, tmp_path: Path, args: list[str], at_once: int
) -> None:
    for id_ in "abc":
        enqueue(client, "gate", id_)
    command = start("jobs:mux", *args)
    for id_ in "abc"[:at_once]:
        command.heard(f"entered {id_}")
    enqueue(client, "hello", "d")
    command.send()
    command.heard("shutting down")
    (tmp_path / "open").touch()
    assert command.ended() == 0
    assert command.out.count("entered") == at_once


@pytest.mark.parametrize("processes", [1, 2])
def test_each_of_several_queues_has_its_own_concurrency_in_each_process(
    start: Start, client: Client, conn: psycopg.Connection, tmp_path: Path, processes: int
) -> None:
    at_once = {"high": 10, "low": 2}
    ids = {queue: [f"{queue} {n:02}" for n in range(30)] for queue in at_once}
    for queue in at_once:
        client.bulk_enqueue([EnqueueRequest(queue, "gate", id=id_) for id_ in ids[queue]])
    queues = [f"--queue={queue}={number}" for queue, number in at_once.items()]
    command = start("jobs:mux", *queues, "--processes", str(processes))

    def entered() -> dict[str, int]:
        return {queue: command.out.count(f"entered {queue} ") for queue in at_once}

    expected = {queue: processes * number for queue, number in at_once.items()}
    deadline = time.monotonic() + PATIENCE
    while entered() != expected:
        assert time.monotonic() < deadline, (entered(), command.err)
        time.sleep(0.01)
    # A worker claims for free slots only: the held jobs are the running ones.
    counts = conn.execute("select queue, count(token) from bgjob_job group by queue").fetchall()
    assert dict(counts) == expected
    command.send()
    command.heard("SIGTERM")
    (tmp_path / "open").touch()
    assert command.ended() == 0
    left = [id_.split()[0] for id_, _, _ in live(conn)]
    assert entered() == {queue: 30 - left.count(queue) for queue in at_once}
    assert not any(is_held for _, _, is_held in live(conn))


def test_the_command_works_on_a_mux_in_the_named_database(start: Start, client: Client) -> None:
    nowhere = "postgresql://somebody@127.0.0.1:1/db"
    dsn = str(client.connection_parameters[0])
    for env in ({"BGJOB_DSN": dsn}, {"DATABASE_URL": dsn, "BGJOB_DSN": ""}):
        command = start("jobs:mux", "--queue", "q", **{"DATABASE_URL": nowhere, **env})
        command.heard("is running")
        assert command.stopped() == 0
    command = start("jobs:mux", "--queue", "q", "--dsn", dsn, BGJOB_DSN=nowhere)
    command.heard("is running")
    assert command.stopped() == 0


def test_a_factory_receives_the_arguments_that_it_accepts(start: Start, client: Client) -> None:
    enqueue(client, "hello")
    command = start("jobs:make_of", "--queue", "q=3")
    command.heard("made of True {'q': 3} None")
    command.heard("hello a")
    assert command.stopped() == 0

    dsn = str(client.connection_parameters[0])
    args = ["--queue", "a=2", "--queue", "b=c=3", "--queue", "d", "--concurrency", "4"]
    command = start("jobs:make_async_of", *args, "--dsn", dsn)
    queues = {"a": 2, "b=c": 3, "d": 4}
    command.heard(f"made of {queues} {{'dsn': {dsn!r}, 'concurrency': 4}}")
    command.heard("is running")
    assert command.stopped() == 0


@pytest.mark.parametrize(
    ("target", "args", "told"),
    [
        ("worker", ["--queue", "q"], "is a Worker, which --queue cannot change; name a Mux"),
        ("async_worker", ["--concurrency", "2"], "is an AsyncWorker, which --concurrency cannot"),
        ("worker", ["--dsn", "dbname=x"], "is a Worker, which --dsn cannot change; "),
        ("make", ["--queue", "q"], "does not accept --queue: it has no parameter queues"),
        ("make_on_loop", ["--dsn", ""], "does not accept --dsn: it has no parameter dsn"),
    ],
)
def test_options_that_the_command_line_cannot_change_are_refused_in_one_line(
    start: Start, target: str, args: list[str], told: str
) -> None:
    command = start(f"jobs:{target}", *args)
    assert command.ended() == 1
    assert command.err.startswith(f"bgjob: jobs:{target} {told}")
    assert command.err.count("\n") == 1


# -- the end -------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["gate", "gate_async"])
@each_target
def test_the_command_finishes_running_jobs_and_releases_those_that_have_not_started(
    start: Start,
    client: Client,
    conn: psycopg.Connection,
    tmp_path: Path,
    target: str,
    type_: str,
) -> None:
    enqueue(client, type_, "a")
    command = start(f"jobs:{target}")
    command.heard("entered a")
    for id_ in "bcd":
        enqueue(client, type_, id_)
    command.send()
    command.heard("shutting down")
    enqueue(client, type_, "e")

    (tmp_path / "open").touch()

    assert command.ended() == 0
    assert live(conn) == [(id_, 0, False) for id_ in "bcde"]
    assert command.out == "entered a\n"


@pytest.mark.parametrize("type_", ["thread", "coroutine", "stubborn_coroutine", "blocked_loop"])
@each_target
def test_a_job_that_outlives_the_grace_period_gets_its_attempt_back_and_keeps_its_lease_if_it_runs_on(
    start: Start, client: Client, conn: psycopg.Connection, target: str, type_: str
) -> None:
    enqueue(client, type_)
    command = start(f"jobs:{target}", "--grace", "0.5")
    command.heard("entered")
    began = time.monotonic()

    assert command.stopped() == 0

    assert 0.5 <= time.monotonic() - began < 0.5 + LATE + NOISE
    assert live(conn) == [("a", 0, type_ != "coroutine")]  # that one was cancelled, and is due
    told = re.search("WARNING.* still running, left to the lease", command.err)
    assert bool(told) == (type_ != "coroutine")


@pytest.mark.parametrize("type_", ["leaves_a_thread", "leaves_an_executor", "leaves_at_exit"])
@each_target
def test_the_command_exits_despite_threads_and_tasks_that_handlers_left_behind(
    start: Start, client: Client, conn: psycopg.Connection, target: str, type_: str
) -> None:
    enqueue(client, type_)
    command = start(f"jobs:{target}", "--grace", "0.5")
    command.heard("entered")
    began = time.monotonic()

    assert command.stopped() == 0

    assert time.monotonic() - began < 0.5 + LATE + NOISE
    assert live(conn) == []


@pytest.mark.parametrize("type_", ["thread", "blocked_loop", "leaves_at_exit"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@each_target
def test_a_second_signal_ends_the_command_immediately(
    start: Start, client: Client, target: str, signum: signal.Signals, type_: str
) -> None:
    enqueue(client, type_)
    command = start(f"jobs:{target}", "--grace", "1000")
    command.heard("entered")
    command.send()
    command.heard("exiting" if type_ == "leaves_at_exit" else "shutting down")

    assert command.stopped(signum) == 128 + signum


@each_target
def test_a_signal_that_comes_while_the_process_is_stopped_is_answered_when_it_goes_on(
    start: Start, client: Client, conn: psycopg.Connection, target: str
) -> None:
    # The kernel hands it to any thread of the process then, and none is woken by it.
    enqueue(client, "hello")
    command = start(f"jobs:{target}")
    command.heard("hello")
    assert command.process.stop()
    command.send()
    command.send(signal.SIGCONT)
    assert command.ended() == 0
    assert live(conn) == []


def test_a_loop_that_is_blocked_from_the_start_does_not_cost_the_grace_period(
    start: Start, client: Client
) -> None:
    enqueue(client, "gate")
    command = start("jobs:make_on_blocked_loop", "--grace", "1000")
    command.heard("entered a")
    command.send()
    command.heard("shutting down")
    assert command.stopped() == 128 + signal.SIGTERM


def test_ends_when_the_program_shuts_its_worker_down(start: Start, client: Client) -> None:
    enqueue(client, "stops_the_worker")
    command = start("jobs:worker")
    assert command.ended() == 0
    assert command.err.endswith("jobs:worker has ended\n")


@pytest.mark.parametrize(
    ("target", "type_", "words"),
    [
        ("worker", "breaks_the_worker", "bgjob: jobs:worker has ended on its own\n"),
        ("async_worker", "stops_the_loop", "bgjob: jobs:async_worker broke\n"),
    ],
)
def test_exits_with_1_when_the_worker_ends_by_itself(
    start: Start, client: Client, target: str, type_: str, words: str
) -> None:
    enqueue(client, type_)
    command = start(f"jobs:{target}")
    assert command.ended() == 1
    assert command.err.endswith(words)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_processes_that_handlers_fork_however_early_it_comes(
    start: Start, client: Client, tmp_path: Path, name: str
) -> None:
    # The first hook of a child waits, so that the signal comes before the child is prepared.
    # One that comes later is Python's own to notice; 3.13.0 does not always.
    (tmp_path / "slow.py").write_text(
        "import os, runpy, time\n"
        "os.register_at_fork(after_in_child=lambda: time.sleep(0.2))\n"
        "runpy.run_module('bgjob', run_name='__main__', alter_sys=True)\n"
    )
    enqueue(client, "forks", name)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    command = start("jobs:worker", module="slow", PYTHONPATH=path)
    command.heard("alive: ")
    assert "alive: 0" in command.out
    assert command.stopped() == 0


def test_a_programs_own_signal_handlers_give_way(
    start: Start, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nfrom jobs import make\n"
    )
    enqueue(client, "hello")
    command = start("own:make")
    command.heard("hello a")
    assert command.stopped() == 0


# -- the start -----------------------------------------------------------------------------


WAITS = {
    "a module": "say('waiting')\ntime.sleep(LONG)",
    "a module that catches everything": (
        "try:\n    say('waiting')\n    time.sleep(LONG)\nexcept BaseException:\n    pass\n"
        "def make():\n    return worker"
    ),
    "a module that cannot be interrupted": (
        "say('waiting')\n"
        "while True:\n"
        "    try:\n        time.sleep(LONG)\n"
        "    except BaseException:\n        pass"
    ),
    "a factory": "def make():\n    say('waiting')\n    time.sleep(LONG)",
    "a coroutine factory": "async def make():\n    say('waiting')\n    await asyncio.sleep(LONG)",
    "a coroutine factory that blocks": "async def make():\n    say('waiting')\n    time.sleep(LONG)",
}


@pytest.mark.parametrize("body", WAITS.values(), ids=WAITS)
def test_a_signal_ends_it_while_the_program_is_loaded(
    start: Start, tmp_path: Path, body: str
) -> None:
    (tmp_path / "waits.py").write_text(f"from jobs import *\n{body}\n")
    command = start("waits:make", "--grace", "1000")
    command.heard("waiting")

    assert command.stopped() == 0

    assert "is running" not in command.err
    assert "Traceback" not in command.err
    assert command.out.strip() == "waiting"


@each_target
def test_a_signal_ends_it_while_it_connects(start: Start, target: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        port = silent.getsockname()[1]
        command = start(
            f"jobs:{target}", "--grace", "1000", DATABASE_URL=f"postgresql://u@127.0.0.1:{port}/db"
        )
        connection, _ = silent.accept()
        with connection:
            assert command.stopped() == 0
    assert "its start was broken off" in command.err or command.err == ""


FAULTS = {
    "missing:worker": "there is no module 'missing' ",
    "jobs.missing:worker": "there is no module 'jobs.missing' ",
    "jobs:missing": "there is no 'missing' in jobs",
    "jobs:Workers.missing": "there is no 'missing' in jobs.Workers",
    "jobs:mux": "jobs:mux is a Mux: name the queues to work on with --queue NAME[=N]",
    "jobs:DSN": "jobs:DSN is a str; name a Mux, a Worker, an AsyncWorker, a list of workers, or a "
    "callable that returns a worker or a list",
    "jobs:hello": "jobs:hello cannot be called: missing a required argument: 'job'; ",
    "jobs:make_of": "jobs:make_of needs --queue",
    "faulty:make_nothing": "faulty:make_nothing returned None; ",
    "faulty:make_mux": "faulty:make_mux returned a Mux; ",
}
FAULTY = """
from jobs import *

def make_nothing():
    pass

async def make_mux():
    return mux

def raises():
    raise LookupError("raised by the factory")

async def raises_on_loop():
    raise LookupError("raised by the factory")

worker.run()
"""


@pytest.mark.parametrize("target", FAULTS)
def test_a_target_that_cannot_be_served_is_explained_in_one_line(
    start: Start, tmp_path: Path, target: str
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY.replace("worker.run()", ""))
    command = start(target)
    assert command.ended() == 1
    assert command.err.startswith(f"bgjob: {FAULTS[target]}")
    assert command.err.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import missing", "No module named 'missing'"),
        ("from jobs import missing", "cannot import name 'missing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError: "),
    ],
)
def test_shows_where_the_programs_own_code_failed(
    start: Start, tmp_path: Path, body: str, told: str
) -> None:
    (tmp_path / "faulty.py").write_text(body)
    command = start("faulty:worker")
    assert command.ended() == 1
    assert f'faulty.py", line 1' in command.err
    assert told in command.err
    assert command.err.endswith("\nbgjob: importing faulty failed\n")


@pytest.mark.parametrize("name", ["raises", "raises_on_loop"])
def test_shows_where_a_factory_failed(start: Start, tmp_path: Path, name: str) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY.replace("worker.run()", ""))
    command = start(f"faulty:{name}")
    assert command.ended() == 1
    assert f"in {name}\n" in command.err
    assert "LookupError: raised by the factory\n" in command.err
    assert command.err.endswith(f"\nbgjob: faulty:{name} failed\n")


def test_a_worker_that_runs_already_cannot_be_served(start: Start, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    command = start("faulty:worker")
    assert command.ended() == 1
    assert "RuntimeError: a worker runs once" in command.err


@each_target
def test_missing_tables_are_reported_in_one_line(start: Start, empty_dsn: str, target: str) -> None:
    command = start(f"jobs:{target}", DATABASE_URL=empty_dsn)
    assert command.ended() == 1
    assert command.err.startswith("bgjob: ")
    assert "migration/init.sql" in command.err
    assert command.err.count("\n") == 1


@each_target
def test_a_server_that_cannot_be_reached_is_reported_in_one_line_without_the_password(
    start: Start, target: str
) -> None:
    address = "postgresql://somebody:s3cret@127.0.0.1:1/db"
    command = start(f"jobs:{target}", DATABASE_URL=address)
    assert command.ended() == 1
    assert command.err.startswith("bgjob: ")
    assert "127.0.0.1" in command.err
    assert command.err.count("\n") == 1
    assert "s3cret" not in command.err


# -- logging -------------------------------------------------------------------------------


@each_target
def test_retries_are_seen(start: Start, client: Client, target: str) -> None:
    enqueue(client, "fails")
    command = start(f"jobs:{target}")
    command.heard("it failed")
    assert command.stopped() == 0
    assert "WARNING fails a (attempt 1) failed and runs again" in command.err


def test_the_programs_own_logging_is_left_alone(
    start: Start, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "from jobs import *\n"
        "async def make():\n"
        "    logging.basicConfig(level=logging.WARNING, format='own format: %(message)s')\n"
        "    return await make_on_loop()\n"
    )
    enqueue(client, "fails")
    command = start("own:make")
    command.heard("it failed")
    assert command.stopped() == 0
    assert command.err.count("own format: ") == 1
    assert "is running" not in command.err


def test_a_level_that_is_given_counts_for_the_programs_own_logging(
    start: Start, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "from jobs import *\n"
        "logging.basicConfig(level=logging.WARNING, format='own format: %(message)s')\n"
    )
    enqueue(client, "hello")
    command = start("own:worker", "--log-level", "debug")
    command.heard("own format: hello a (attempt 1) completed")
    assert command.stopped() == 0


def test_json_lines_replace_the_programs_own_logging(
    start: Start, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "from jobs import *\n"
        "logging.basicConfig(level=logging.WARNING, format='own format: %(message)s')\n"
        "@mux.handler('odd')\n"
        "def odd(job):\n"
        "    logging.getLogger('shop').warning('odd \\ud800', extra={'size': 2**70, 'at': Path()})\n"
    )
    enqueue(client, "odd", "b")
    enqueue(client, "fails")
    command = start("own:worker", "--log-format", "json")
    command.heard("odd")
    command.heard("it failed")
    assert command.stopped() == 0
    lines = [json.loads(line) for line in command.err.splitlines()]
    [failed] = [line for line in lines if line.get("job_id") == "a"]
    assert failed["level"] == "WARNING"
    assert failed["logger"] == "bgjob"
    assert failed["pid"] == command.process.pid
    assert "it failed" in failed["message"]
    assert failed["job_queue"] == "q"
    assert failed["job_type"] == "fails"
    assert failed["job_attempt"] == 1
    assert "ValueError: it failed" in failed["exception"]
    assert datetime.fromisoformat(failed["time"]).utcoffset() == timedelta(0)
    [odd] = [line for line in lines if line["logger"] == "shop"]
    assert (odd["message"], odd["size"], odd["at"]) == ("odd \ud800", 2**70, ".")
    assert not [line for line in lines if line["level"] in ("DEBUG", "INFO")]  # its own level


def test_json_lines_include_the_last_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text("1 / 0")
    command = start("faulty:worker", "--log-format", "json")
    assert command.ended() == 1
    [line] = command.err.splitlines()
    told = json.loads(line)
    assert (told["level"], told["message"]) == ("CRITICAL", "importing faulty failed")
    assert "ZeroDivisionError" in told["exception"]


def test_a_logger_of_the_programs_own_prints_its_lines_once(
    start: Start, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "from jobs import *\n"
        "shop = logging.getLogger('shop')\n"
        "shop.addHandler(logging.StreamHandler())\n"
        "logging.getLogger('library').addHandler(logging.NullHandler())\n"
        "logging.getLogger('ledger').addHandler(logging.FileHandler('ledger.log'))\n"
        "@mux.handler('sells')\n"
        "def sells(job):\n"
        "    logging.getLogger('shop.cart').warning('sold one')\n"
        "    logging.getLogger('ledger').info('noted one')\n"
        "    logging.getLogger('library').info('bought one')\n"
    )
    enqueue(client, "sells")
    enqueue(client, "fails", "b")
    command = start("own:worker")
    for line in ("bought one", "it failed"):
        command.heard(line)
    assert command.stopped() == 0
    # Neither a library's logger nor one with a file shows its lines itself.
    for line in ("sold one", "bought one", "noted one"):
        assert command.err.count(line) == 1


def test_json_lines_replace_the_lines_of_a_logger_of_the_programs_own(
    start: Start, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "from jobs import *\n"
        "logging.getLogger('shop').addHandler(logging.StreamHandler())\n"
        "logging.getLogger('shop').addHandler(logging.FileHandler('shop.log'))\n"
        "@mux.handler('sells')\n"
        "def sells(job):\n"
        "    logging.getLogger('shop.cart').warning('sold one')\n"
    )
    enqueue(client, "sells")
    command = start("own:worker", "--log-format", "json")
    command.heard("sold one")
    assert command.stopped() == 0
    lines = [json.loads(line) for line in command.err.splitlines()]
    assert [line["logger"] for line in lines if line["message"] == "sold one"] == ["shop.cart"]
    assert (tmp_path / "shop.log").read_text() == "sold one\n"


@pytest.mark.parametrize("way", ["dictConfig", "fileConfig"])
def test_a_configuration_that_disables_existing_loggers_does_not_silence_the_worker(
    start: Start, client: Client, tmp_path: Path, way: str
) -> None:
    # As Alembic's stock env.py does, here within a job.
    (tmp_path / "alembic.ini").write_text(
        "[loggers]\nkeys=root\n[handlers]\nkeys=console\n[formatters]\nkeys=own\n"
        "[logger_root]\nlevel=WARNING\nhandlers=console\n"
        "[handler_console]\nclass=StreamHandler\nargs=(sys.stderr,)\nformatter=own\n"
        "[formatter_own]\nformat=own: %(message)s\n"
    )
    (tmp_path / "own.py").write_text(
        "import logging.config\n"
        "from jobs import *\n"
        "def configure():\n"
        f"    if {way == 'fileConfig'}:\n"
        "        logging.config.fileConfig('alembic.ini')\n"
        "    else:\n"
        "        logging.config.dictConfig({'version': 1,\n"
        "            'formatters': {'own': {'format': 'own: %(message)s'}},\n"
        "            'handlers': {'console': {'class': 'logging.StreamHandler',\n"
        "                'formatter': 'own'}},\n"
        "            'root': {'level': 'WARNING', 'handlers': ['console']}})\n"
        "@mux.handler('migrates', max_attempts=1)\n"
        "def migrates(job):\n"
        "    configure()\n"
        "    raise ValueError('no such table')\n"
    )
    enqueue(client, "migrates")
    command = start("own:worker")
    command.heard("own: migrates a (attempt 1)")
    assert "no such table" in command.err
    assert command.stopped() == 0


# -- arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["jobs"],
        ["jobs:"],
        [":worker"],
        ["jobs.py:worker()"],
        ["jobs:worker:worker"],
        ["jobs:worker", "--grace", "-1"],
        ["jobs:worker", "--grace", "nan"],
        ["jobs:worker", "--grace", "inf"],
        ["jobs:worker", "--grace", "long"],
        ["jobs:mux", "--queue", ""],
        ["jobs:mux", "--queue", "=3"],
        ["jobs:mux", "--queue", "q=0"],
        ["jobs:mux", "--queue", "q=many"],
        ["jobs:mux", "--queue", "q" * 256],
        ["jobs:mux", "--concurrency", "0"],
        ["jobs:mux", "--processes", "-1"],
        ["jobs:mux", "--log-level", "loud"],
        ["jobs:mux", "--log-format", "xml"],
        ["jobs:mux", "--dsn", "no connection string"],
    ],
)
def test_wrong_usage_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["worker", *args])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: bgjob worker")


def test_help_describes_signals_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["worker", "--help"])
    assert exit.value.code == 0
    told = capsys.readouterr().out
    for word in ("MODULE:NAME", "--grace DURATION", "--processes N", "SIGTERM, SIGINT", "130, 143"):
        assert word in told
