"""Probes, the liveness file and systemd learn how a worker's process is, by real processes."""

import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from faults.proxy import Proxy
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families
from support.documents import ROOT
from support.nursery import Forked, fork
from support.waiting import PATIENCE, eventually
from support.workers import Launcher

from bgjob import BgjobError, Client, EnqueueRequest, Mux, cli
from bgjob._cli.listener import Answer, HttpServer, ListenError, Request, TcpAddress
from bgjob._cli.probing import ask
from bgjob._cli.worker import metering as metering_module
from bgjob._cli.worker import reports
from bgjob._cli.worker.metering import Metering
from bgjob._cli.worker.reports import Place
from bgjob._cli.worker.stalls import Stalls
from bgjob._cli.worker.systemd import Systemd
from bgjob._postgres.connection import ConnectionParameters
from bgjob.ext.prometheus import Metrics
from bgjob.workers import QueueHealth, WorkerHealth

APP = """
import os, sys, time
import bgjob.workers
from bgjob import BgjobError, Client, Mux, Worker

bgjob.workers.LATE = 0.3
while not os.path.exists("load"):
    time.sleep(0.005)

class Blocks:
    def run(self, conn):
        while os.path.exists("block"):
            time.sleep(0.01)
        return 0.02

def handle(job):
    print("prometheus", "prometheus_client" in sys.modules, flush=True)
    while job.json() == "wait" and not os.path.exists("open"):
        time.sleep(0.01)

mux = Mux().register("t", handle)
client = Client(os.environ["BGJOB_DSN"])
worker = Worker(client, "q", mux, concurrency=2, services=[Blocks()], poll_interval=0.05)
"""

both = pytest.mark.parametrize("processes", [1, 2])


class Program:
    """`bgjob worker app:worker`, in a folder whose files steer it."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        self.socket = folder / "s"
        self.process: Forked | None = None
        self._dsn = dsn
        (folder / "app.py").write_text(APP)

    def start(self, *args: str, **env: str) -> Forked:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "BGJOB_DSN": self._dsn, **env}
        with (self.folder / "out").open("ab") as out:
            self.process = fork(
                "bgjob", "worker", "app:worker", *args, env=env, output=out, cwd=self.folder
            )
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process

    def make(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body; 0 if it does not answer."""
        try:
            return ask(self.socket, path, 5.0)
        except BgjobError:
            return 0, ""

    def statuses(self) -> tuple[int, int, int]:
        """Return those of live, ready and startup."""
        return self.get("/livez")[0], self.get("/readyz")[0], self.get("/startupz")[0]

    def value(self, name: str, **labels: str) -> float:
        """Return the value of a sample; -1 if there is none."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        samples = [s for family in families for s in family.samples if s.name == name]
        return next((s.value for s in samples if labels.items() <= s.labels.items()), -1.0)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for a Unix socket."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture
def program(folder: Path, dsn: str) -> Iterator[Program]:
    with Proxy(dsn) as proxy:
        program = Program(folder, proxy.dsn(dsn))
        program.proxy = proxy  # type: ignore[attr-defined]
        yield program
        if program.process is not None and program.process.poll() is None:
            os.kill(program.process.pid, signal.SIGKILL)
            program.process.wait(PATIENCE)


def enqueue(dsn: str, *args: str) -> None:
    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", arg) for arg in args])


# -- a process --------------------------------------------------------------------------------


@both
def test_probes_follow_a_worker_from_its_import_to_its_last_handler(
    program: Any, dsn: str, processes: int
) -> None:
    enqueue(dsn, *["quick"] * 10)
    process = program.start("--health", f"unix:{program.socket}", f"--processes={processes}")
    assert eventually(lambda: program.statuses() == (200, 503, 503))  # it imports
    program.make("load")
    assert eventually(lambda: program.statuses() == (200, 200, 200)), program.statuses()
    completed: dict[str, str] = {"queue": "q", "type": "t", "outcome": "completed"}
    assert eventually(lambda: program.value("bgjob_jobs_total", **completed) == 10)
    assert program.value("bgjob_job_run_seconds_count", queue="q") == 10
    assert program.value("bgjob_worker_slots", queue="q") == 2 * processes
    assert "prometheus True" in program.out

    program.proxy.cut()  # the database is away
    assert eventually(lambda: program.statuses() == (200, 503, 200))
    assert eventually(lambda: program.value("bgjob_worker_connected", queue="q") == 0)
    assert json.loads(program.get("/readyz")[1])["live"] is True
    program.proxy.forward()
    assert eventually(lambda: program.statuses() == (200, 200, 200))
    assert program.value("bgjob_jobs_total", **completed) == 10

    enqueue(dsn, "wait")
    assert eventually(lambda: program.value("bgjob_worker_busy", queue="q") == 1)
    os.kill(process.pid, signal.SIGTERM)
    assert eventually(lambda: program.statuses()[:2] == (200, 503))
    program.make("open")
    assert process.wait(PATIENCE) == 0
    assert not program.socket.exists()


def test_a_control_thread_that_is_stuck_is_not_live(program: Any) -> None:
    alive = program.folder / "alive"
    program.make("load")
    program.start("--health", f"unix:{program.socket}", "--alive-file", str(alive))
    assert eventually(lambda: program.statuses() == (200, 200, 200))
    assert alive.exists()
    program.make("block")
    assert eventually(lambda: program.statuses()[0] == 503)
    assert program.out.count("this process is not live: the control thread of queue 'q'") == 1
    queue = json.loads(program.get("/livez")[1])["queues"]["q"]
    assert queue["late"] > 0.3
    program.remove("block")
    assert eventually(lambda: program.statuses() == (200, 200, 200))
    os.kill(program.process.pid, signal.SIGTERM)
    assert program.process.wait(PATIENCE) == 0
    assert not alive.exists()


def test_a_parent_restarts_a_process_whose_control_thread_is_stuck_and_keeps_its_counts(
    program: Any, dsn: str
) -> None:
    program.make("load")
    enqueue(dsn, *["quick"] * 10)
    program.start("--health", f"unix:{program.socket}", "--processes=2")
    assert eventually(lambda: program.statuses() == (200, 200, 200))
    completed: dict[str, str] = {"type": "t", "outcome": "completed"}
    assert eventually(lambda: program.value("bgjob_jobs_total", **completed) == 10)

    def pids() -> set[int]:
        return {p["pid"] for p in json.loads(program.get("/livez")[1])["processes"]}

    before = pids()
    program.make("block")
    assert eventually(lambda: program.out.count(", and is killed") >= 2)
    assert "is not live (the control thread of queue 'q' is late by " in program.out
    program.remove("block")
    assert eventually(lambda: program.statuses() == (200, 200, 200))
    assert pids().isdisjoint(before)
    assert program.value("bgjob_jobs_total", **completed) == 10
    os.kill(program.process.pid, signal.SIGTERM)
    assert program.process.wait(PATIENCE) == 0


@both
@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_is_told_of_start_and_end_and_of_each_beat_also_without_a_database(
    program: Any, dsn: str, processes: int, is_abstract: bool
) -> None:
    name = f"@bgjob-{os.getpid()}-{program.folder.name}"
    address = name if is_abstract else str(program.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name[1:]}" if is_abstract else address)
        manager.settimeout(PATIENCE)

        def hear() -> list[str]:
            return manager.recv(1024).decode().split("\n")

        enqueue(dsn, "quick")
        process = program.start(
            f"--processes={processes}", NOTIFY_SOCKET=address, WATCHDOG_USEC="200000"
        )
        assert hear() == ["WATCHDOG=1"]  # while it loads
        program.make("load")
        while (heard := hear()) == ["WATCHDOG=1"]:
            pass
        assert heard[0] == "READY=1"
        assert eventually(lambda: "prometheus False" in program.out)  # nobody asked for metrics
        program.proxy.cut()
        for _ in range(10):
            assert hear() == ["WATCHDOG=1"]
        program.proxy.forward()
        os.kill(process.pid, signal.SIGTERM)
        while (heard := hear()) == ["WATCHDOG=1"]:
            pass
        assert heard[0] == "STOPPING=1"
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("environ", "watchdog"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": "/s"}, None),
        ({"NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "3000000"}, 3.0),
        ({"NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "3000000"}, None),
    ],
)
def test_a_watchdog_of_another_process_gets_no_beat(
    environ: dict[str, str], watchdog: float | None
) -> None:
    manager = Systemd(environ)
    assert manager.watchdog == watchdog
    manager.tell("READY=1")  # nobody listens


def test_an_address_that_is_in_use_ends_the_start(program: Any) -> None:
    program.make("load")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = program.start("--health", f"127.0.0.1:{taken.getsockname()[1]}")
        assert process.wait(PATIENCE) == 1
    assert "bgjob: cannot listen on 127.0.0.1:" in program.out


# -- the processes of a parent ----------------------------------------------------------------


def test_a_silent_process_is_at_fault_until_it_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(reports, "monotonic", lambda: now[0])
    place = Place()
    assert (place.fault, place.is_live) == (None, True)
    place.begin(7)
    now[0] += 59
    assert place.fault is None  # it may still start
    place.hear({"live": True})
    now[0] += 16
    assert place.fault == "is silent"
    place.forgive()  # the parent was stopped, too
    assert place.fault is None
    place.hear({"live": False})
    assert place.fault == "is not live (no queue says why)"
    place.killed()
    assert (place.fault, place.is_live) == (None, True)
    now[0] += 16
    assert not place.is_live  # it cannot be killed
    place.end()
    assert place.is_live


# -- a queue that stands still ----------------------------------------------------------------


class Idle:
    """A worker that claims nothing."""

    def __init__(self, dsn: str) -> None:
        self.connection_parameters: ConnectionParameters = (dsn, {})
        self.has_ended = False
        self.busy = 0

    def health(self) -> WorkerHealth:
        queue = QueueHealth(2, self.busy, True, 0.0, 0.0, None)
        return WorkerHealth(True, False, self.has_ended, {"q": queue}, 1, None, "app", None)


def test_a_queue_with_due_jobs_and_free_slots_that_claims_nothing_stands_still(
    dsn: str, conn: psycopg.Connection
) -> None:
    worker = Idle(dsn)
    stalls = Stalls(0.1, worker)
    with Client(dsn) as client:
        try:
            client.enqueue(EnqueueRequest("other", "t"))
            client.enqueue(EnqueueRequest("q", "t"))
            assert eventually(lambda: set(stalls.queues) == {"q"})
            client.pause("q")
            assert eventually(lambda: not stalls.queues)
            client.resume("q")
            assert eventually(lambda: stalls.queues)
            worker.busy = 2
            assert eventually(lambda: not stalls.queues)
            worker.busy = 0
            assert eventually(lambda: stalls.queues)
            worker.connection_parameters = ("host=/nowhere", {})
            assert eventually(lambda: not stalls.queues)  # a restart mends no database
        finally:
            worker.has_ended = True


# -- metrics of a program ---------------------------------------------------------------------


@pytest.mark.parametrize("is_registered", [False, True])
def test_metrics_that_a_program_passes_to_its_worker_are_served_and_no_second_ones(
    launcher: Launcher, is_registered: bool
) -> None:
    registry = CollectorRegistry()
    Counter("program_things", "Its own.", registry=registry).inc()
    metrics = Metrics(registry=registry if is_registered else None)
    worker = launcher.make(Mux().register("t", lambda _: None), observer=[metrics])
    metering = Metering()
    assert metering.take() is None
    metering.attach([worker._group])
    launcher.run(worker.run())
    launcher.enqueue("a")

    def text() -> str:
        return metering.render("").body.decode()

    one = 'bgjob_jobs_total{outcome="completed",queue="q",type="t"} 1.0'
    assert eventually(lambda: one in text())
    assert ("program_things_total 1.0" in text()) is is_registered

    def changed() -> list[tuple[str, str, list[float]]]:
        sent = metering.take()
        assert sent is not None
        pairs: list[tuple[str, str, list[float]]] = sent["pairs"]
        return pairs

    [(queue, type_, numbers)] = changed()
    assert (queue, type_, numbers[0]) == ("q", "t", 1)
    assert changed() == []
    assert launcher.shutdown(worker)


def test_registered_metrics_that_do_not_observe_the_worker_are_an_error_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr(metering_module, "Metrics", partial(Metrics, registry=registry))
    Metrics(registry=registry)
    with pytest.raises(BgjobError, match="pass them to it, as Worker"):
        metering_module._registered()


# -- the server -------------------------------------------------------------------------------


def answer(request: Request) -> Answer | None:
    match request.path:
        case "/well":
            return Answer(200, b"x" * 300_000, "text/plain")
        case "/broken":
            raise ValueError("broken")
        case _:
            return None


@pytest.fixture
def server() -> Iterator[tuple[str, int]]:
    server = HttpServer(TcpAddress("127.0.0.1", 0), answer)
    assert isinstance(server.address, TcpAddress)
    yield server.address
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address)


def send(address: tuple[str, int], request: bytes) -> bytes:
    with socket.create_connection(address, PATIENCE) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(
    ("request_", "status", "size"),
    [
        (b"GET /well HTTP/1.1\r\nHost: x\r\n\r\n", 200, 300_000),
        (b"GET /well?probe=1 HTTP/1.0\r\n\r\n", 200, 300_000),
        (b"HEAD /well HTTP/1.1\r\n\r\n", 200, 0),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500, None),
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404, None),
        (b"POST /well HTTP/1.1\r\n\r\n", 405, None),
        (b"nonsense\r\n\r\n", 400, None),
        (b"GET /well FTP/1\r\n\r\n", 400, None),
        (b"\x16\x03\x01\x02\r\n\r\n", 400, None),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 8192, 431, None),
    ],
)
def test_requests_are_answered_or_refused(
    server: tuple[str, int], request_: bytes, status: int, size: int | None
) -> None:
    head, _, body = send(server, request_).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"Connection: close" in head
    assert size is None or len(body) == size


def test_clients_that_send_nothing_keep_no_probe_waiting(server: tuple[str, int]) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(server)) for _ in range(100)]
        idle[-1].sendall(b"GET /we")
        assert send(server, b"GET /well HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert idle[0].recv(1) == b""  # there were too many
        idle[-2].settimeout(PATIENCE)
        assert idle[-2].recv(1) == b""  # its time is over


def test_a_socket_that_a_killed_process_left_is_taken_over_and_a_live_one_is_not(
    folder: Path,
) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    server = HttpServer(path, answer)
    try:
        with pytest.raises(ListenError, match=r"cannot listen on unix:.*in use"):
            HttpServer(path, answer)
    finally:
        server.close()
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(ListenError, match="cannot listen on unix:"):
        HttpServer(path, answer)
    assert path.read_text() == "a file"


# -- bgjob health -----------------------------------------------------------------------------


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    monkeypatch.delenv("BGJOB_HEALTH", raising=False)

    def run(*args: str) -> tuple[int, str]:
        status = cli.main(["health", *args])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_health_of_the_database_is_its_answer_and_its_tables(
    run: Callable[..., tuple[int, str]], dsn: str, empty_dsn: str, launcher: Launcher
) -> None:
    assert run("--dsn", dsn) == (0, "ready\n")
    status, told = run("--dsn", empty_dsn)
    assert status == 3
    assert told.startswith("not ready: ")
    assert run("--dsn", "host=/nowhere")[0] == 1
    host = socket.gethostname()
    lost = "0 not seen for three beats"
    assert run("--dsn", dsn, "--worker") == (3, f"not ready on {host}: 0 at work, {lost}\n")
    launcher.start(Mux())
    assert run("--dsn", dsn, "--worker") == (0, f"ready on {host}: 1 at work, {lost}\n")
    assert run("--dsn", dsn, "--worker", "--queue", "q")[0] == 0
    assert run("--dsn", dsn, "--worker", "--queue", "other")[0] == 3


def test_health_of_a_worker_is_what_its_probes_answer(
    run: Callable[..., tuple[int, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = {"/livez": 200, "/readyz": 503, "/startupz": 200}

    def probe(request: Request) -> Answer | None:
        status = statuses.get(request.path)
        return None if status is None else Answer(status, b'{"live":true}\n', "application/json")

    server = HttpServer(folder / "s", probe)
    worker = ("--worker", f"unix:{folder / 's'}")
    try:
        assert run(*worker) == (3, '{"live":true}\n')
        assert run(*worker, "--probe", "live")[0] == 0
        assert run(*worker, "--probe", "startup")[0] == 0
        monkeypatch.setenv("BGJOB_HEALTH", f"unix:{folder / 's'}")
        assert run("--worker")[0] == 3
        statuses["/readyz"] = 404
        assert run("--worker") == (
            1,
            f'{{"live":true}}\nbgjob: unix:{folder / "s"} answers 404: no worker with --health is there\n',
        )
    finally:
        server.close()
    status, told = run(*worker)
    assert status == 1
    assert told.startswith(f"bgjob: no answer from unix:{folder / 's'}: ")


@pytest.mark.parametrize(
    ("args", "environment", "told"),
    [
        (["--probe", "live"], None, "--probe asks a worker"),
        (["--queue", "q"], None, "--queue is for a worker in the list"),
        (["--worker", "127.0.0.1:1", "--queue", "q"], None, "--queue is for a worker in the list"),
        (["--worker"], "nonsense", "BGJOB_HEALTH: HOST:PORT, :PORT for all interfaces"),
    ],
)
def test_health_refuses_arguments_that_contradict_each_other(
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    environment: str | None,
    told: str,
) -> None:
    if environment is not None:
        monkeypatch.setenv("BGJOB_HEALTH", environment)
    status, text = run(*args)
    assert status == 2
    assert told in text


@pytest.mark.parametrize("text", ["8321", "host", "host:", "host:99999", "a:b:1", "unix:", "[::1]"])
def test_an_address_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["worker", "app:mux", "--health", text])
    assert "HOST:PORT, :PORT for all interfaces, or unix:PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "environment", "told"),
    [
        (["--live-within", "5m"], "", "--live-within has no effect on its own"),
        ([], "nonsense", "BGJOB_HEALTH: HOST:PORT"),
    ],
)
def test_a_worker_refuses_options_without_an_effect_and_an_address_that_is_none(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    environment: str,
    told: str,
) -> None:
    monkeypatch.setenv("BGJOB_HEALTH", environment)
    assert cli.main(["worker", "app:mux", "--queue", "q", *args]) == 2
    assert told in capsys.readouterr().err
