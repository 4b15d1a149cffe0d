"""A worker that cannot start raises in time; one with a fault goes on, or ends with an error."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from faults.proxy import Proxy
from psycopg.conninfo import make_conninfo
from support.database import row
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Launcher, Gate, Recorder

import bgjob._worker.control
from bgjob import Client, Job, MoveToDlq, Mux, SchemaError, Worker
from bgjob._cli.worker.served import Serving
from bgjob._engine.protocol import Exchange
from bgjob._postgres.cursor import Cursor
from bgjob._sql.session import schema_comment
from bgjob._worker.control import QueueControl
from bgjob.schema import init_sql

DEFAULT = 10.0
"""Seconds after which a worker gives up by default: an earlier end is due to init_timeout."""


# -- starts that fail ----------------------------------------------------------------------------


@contextmanager
def black_hole() -> Iterator[int]:
    """Yield a port that drops all data: its queue is full, and no server accepts."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextmanager
def mute() -> Iterator[int]:
    """Yield a port that accepts every connection and answers none."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield listener.getsockname()[1]


def refused(launcher: Launcher, dsn: str, error: type[BaseException], **options: Any) -> float:
    """Run a worker that cannot start, and return the seconds until it raised."""
    threads = set(threading.enumerate())
    worker = launcher.make(Mux(), dsn=dsn, **options)
    began = time.monotonic()
    with pytest.raises(error):
        launcher.run(worker.run())
    took = time.monotonic() - began
    left = {t.name for t in set(threading.enumerate()) - threads if t.name.startswith("bgjob")}
    assert not left
    assert launcher.shutdown(worker)
    return took


@pytest.mark.parametrize(("place", "hosts"), [(black_hole, 1), (mute, 1), (mute, 3)])
def test_a_run_against_a_server_that_does_not_answer_fails_within_its_time(
    launcher: Launcher, place: Any, hosts: int
) -> None:
    with place() as port:
        dsn = make_conninfo(
            launcher.dsn,
            host=",".join(["127.0.0.1"] * hosts),
            port=",".join([str(port)] * hosts),
            sslmode="disable",
            gssencmode="disable",
        )
        # Each host is given 2 s at least.
        assert refused(launcher, dsn, psycopg.Error, init_timeout=1) < DEFAULT


def test_a_run_against_a_server_that_falls_silent_fails_within_its_time(
    launcher: Launcher, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(dsn) as proxy:

        def silenced() -> Any:
            proxy.silence()
            return schema_comment()

        monkeypatch.setattr("bgjob._worker.session.schema_comment", silenced)
        try:
            assert refused(launcher, proxy.dsn(dsn), psycopg.Error, init_timeout=1) < DEFAULT
        finally:
            proxy.forward()


def test_a_connect_timeout_of_the_connection_string_may_be_shorter(launcher: Launcher) -> None:
    with mute() as port:
        dsn = make_conninfo(launcher.dsn, host="127.0.0.1", port=port, connect_timeout=2)
        assert refused(launcher, dsn, psycopg.Error, init_timeout=60) < 2 * DEFAULT


def test_a_run_without_the_tables_fails_immediately_and_can_be_repeated(
    empty_dsn: str, dsn: str
) -> None:
    launcher = Launcher(dsn, is_async=False)
    try:
        worker = launcher.make(Mux(), dsn=empty_dsn, init_timeout=60)
        with pytest.raises(SchemaError, match="init.sql"):
            worker.run()
        with psycopg.connect(empty_dsn) as conn:
            conn.execute(init_sql().encode())
        worker.run()
        assert worker.shutdown()
    finally:
        launcher.close()


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (0.5, ValueError), ("1", TypeError), (-1, ValueError)]
)
def test_an_invalid_init_timeout_is_refused_immediately(
    dsn: str, value: Any, error: type[Exception]
) -> None:
    with Client(dsn) as client, pytest.raises(error, match="init_timeout"):
        Worker(client, "q", Mux(), init_timeout=value)


# -- faults of its own ------------------------------------------------------------------------------


class Faults:
    """Breaks a method of the control thread so many times, from `begin` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.errors: list[BaseException] = []
        self._left = 0
        before = getattr(QueueControl, method)

        def broken(control: QueueControl, *args: Any) -> Any:
            if self._left:
                self._left -= 1
                self.errors.append(RuntimeError(f"fault {len(self.errors) + 1}"))
                raise self.errors[-1]
            return before(control, *args)

        monkeypatch.setattr(QueueControl, method, broken)

    def begin(self, times: int) -> None:
        self._left = times

    @property
    def are_over(self) -> bool:
        return not self._left


everywhere = pytest.mark.parametrize("method", ["_turn", "_exchange", "_collect", "_acknowledge"])


@everywhere
def test_five_faults_are_survived(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    faults, observer, gate = Faults(monkeypatch, method), Recorder(), Gate()
    mux = Mux().register("t", lambda _: None).register("slow", gate)
    launcher.enqueue("before", type="slow")
    worker = launcher.start(mux, observer=observer, concurrency=2, lease=1)
    gate.wait()
    faults.begin(5)
    launcher.enqueue("after")
    # What a fault loses on its way is another's when its lease has ended.
    observer.wait_for("completed", "after")
    gate.released.set()
    observer.wait_for("completed", "before")
    assert faults.are_over
    assert ("error", faults.errors[0]) in observer.events
    assert worker.failure is None
    assert not launcher.run(worker.wait(0))


@everywhere
def test_the_sixth_fault_ends_the_worker_and_leases_decide(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    faults, observer, gate = Faults(monkeypatch, method), Recorder(), Gate()
    mux = Mux().register("t", lambda _: None).register("slow", gate)
    launcher.enqueue("held", type="slow")
    worker = launcher.start(mux, observer=observer, concurrency=2)
    gate.wait()
    faults.begin(6)
    launcher.enqueue("after")
    assert launcher.run(worker.wait(PATIENCE))
    assert len(faults.errors) == 6
    assert worker.failure is faults.errors[5]
    assert ("error", faults.errors[5]) in observer.events
    assert not launcher.shutdown(worker)  # a job that had started is not settled
    assert row(conn, "select token is null from bgjob_job where id = 'held'") == (False,)
    gate.released.set()


@everywhere
def test_a_fault_without_end_ends_the_worker(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    faults, observer = Faults(monkeypatch, method), Recorder()
    worker = launcher.start(Mux().register("t", lambda _: None), observer=observer)
    faults.begin(10**9)
    launcher.enqueue("a")
    assert launcher.run(worker.wait(PATIENCE))
    assert worker.failure is faults.errors[5]
    assert len(faults.errors) <= 7


def test_faults_that_are_seldom_are_survived_for_ever(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bgjob._worker.control, "_FAULTS_WITHIN", 0.0)
    faults, observer = Faults(monkeypatch, "_turn"), Recorder()
    worker = launcher.start(Mux().register("t", lambda _: None), observer=observer)
    faults.begin(20)
    launcher.enqueue("a")
    observer.wait_for("completed", "a")
    assert len(faults.errors) == 20
    assert worker.failure is None


def test_a_loss_of_the_connection_is_no_fault(launcher: Launcher, conn: psycopg.Connection) -> None:
    observer = Recorder()
    worker = launcher.start(Mux().register("t", lambda _: None), observer=observer)
    for n in range(10):
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and application_name = 'bgjob'"
        )
        launcher.enqueue(f"a{n}")
        observer.wait_for("completed", f"a{n}")
    assert worker.failure is None


def test_a_fault_while_jobs_time_out_is_survived(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_backoff(attempt: int) -> float:
        raise SystemExit("whatever a backoff raises")

    gate, observer = Gate(), Recorder()
    mux = Mux().register("t", gate, timeout=0.05, max_attempts=2, backoff=no_backoff)
    launcher.enqueue("a")
    worker = launcher.start(mux, observer=observer, poll_interval=NEVER)
    observer.wait_for("retried", "a")
    assert worker.failure is None
    gate.released.set()


# -- the command ------------------------------------------------------------------------------------

PROGRAM = """
import os
from bgjob import Client, Mux, Worker
from bgjob._worker.control import QueueControl
from bgjob._engine.protocol import Exchange

def broken(control):
    raise RuntimeError("the turn is broken")

def worker():
    return Worker(Client(os.environ["DATABASE_URL"]), {"a": 1, "b": 1}, Mux())

def breaks():
    QueueControl._turn = broken
    return worker()
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_command_exits_with_1_and_explains_why_its_worker_has_ended(
    dsn: str, tmp_path: Path, log_format: str
) -> None:
    Path(tmp_path, "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "bgjob", "worker", "program:breaks"]
    ended = subprocess.run(
        [*command, "--log-format", log_format],
        cwd=tmp_path,
        env={**os.environ, "DATABASE_URL": dsn},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "program:breaks has ended on its own" in last
    assert "RuntimeError: the turn is broken" in ended.stderr


def test_the_command_exits_with_1_and_an_error_where_no_server_answers(tmp_path: Path) -> None:
    Path(tmp_path, "program.py").write_text(PROGRAM.replace("Mux())", "Mux(), init_timeout=1)"))
    with mute() as port:
        ended = subprocess.run(
            [sys.executable, "-m", "bgjob", "worker", "program:worker"],
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": f"postgresql://127.0.0.1:{port}/x"},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
    assert ended.returncode == 1, ended.stderr
    assert "timeout" in ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("where", ["statements", "execute"])
def test_whatever_is_raised_before_an_exchange_is_sent_is_a_refusal_of_that_exchange(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    spoiled = threading.Event()
    spoiled.set()
    if where == "statements":
        make = Exchange.statements

        def statements(self: Exchange, *args: Any) -> Any:
            if spoiled.is_set() and any(b.claimed.job.id == "bad" for b in self.dead_letter):
                raise RuntimeError("no words for it")
            return make(self, *args)

        monkeypatch.setattr(Exchange, "statements", statements)
    else:
        execute = Cursor.execute

        def refuse(self: Cursor, query: Any, params: Any = None, **options: Any) -> Any:
            if (
                spoiled.is_set()
                and "insert into bgjob_dead_job" in str(query)
                and "bad" in str(params)
            ):
                raise RuntimeError("no words for it")
            return execute(self, query, params, **options)

        monkeypatch.setattr(Cursor, "execute", refuse)
    done: list[str] = []
    recorder = Recorder()
    launcher.enqueue(*(f"a{n:03}" for n in range(100)), "bad")

    def handle(job: Job) -> MoveToDlq | None:
        done.append(job.id)
        return MoveToDlq("bad") if job.id == "bad" else None

    worker = launcher.start(
        Mux().register("t", handle),
        observer=recorder,
        poll_interval=0.1,
        concurrency=4,
    )
    ids = "select count(*) from bgjob_job"
    assert eventually(lambda: len(done) == 101 and row(conn, ids) == (1,)), recorder.events
    assert eventually(lambda: "no words for it" in str(recorder.of("error")))
    launcher.enqueue("later")
    assert eventually(lambda: "later" in done)
    assert worker.failure is None
    spoiled.clear()
    assert eventually(lambda: row(conn, ids) == (0,))
    assert done.count("bad") == 1


def test_a_worker_can_say_how_it_ended_after_its_programs_loop_was_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # asyncio cancels the main task, and what it waits for with it.
    serving = object.__new__(Serving)
    served = SimpleNamespace(works=Future[bool](), ended=Future[None]())

    def begin(*_: object) -> None:
        serving._served = [served]  # type: ignore[list-item]

    monkeypatch.setattr(serving, "_begin", begin, raising=False)

    async def stop() -> None:
        task = asyncio.create_task(serving._run_on_loop([]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(stop())
    served.works.set_result(True)
    asyncio.run(stop())
    served.ended.set_result(None)
