"""`bgjob worker` runs workers of several databases in one process, by real processes."""

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import has_failed
from faults.proxy import Proxy
from prometheus_client.parser import text_string_to_metric_families
from psycopg.conninfo import conninfo_to_dict
from support.databases import Databases
from support.documents import ROOT
from support.nursery import Forked, fork
from support.waiting import PATIENCE, eventually

from bgjob import AsyncClient, AsyncWorker, BgjobError, Client, EnqueueRequest, Mux, Worker
from bgjob._cli.probing import ask
from bgjob._cli.worker.metering import Metering
from bgjob.ext.prometheus import Metrics

APP = """
import os, sys, time
import bgjob.workers
from bgjob import AsyncClient, AsyncWorker, Client, Mux, Worker
from bgjob._worker.control import QueueControl

bgjob.workers.LATE = 0.3
NEAR, FAR = os.environ["NEAR"], os.environ["FAR"]
OPTIONS = {"poll_interval": 0.05, "init_timeout": 1.0, "concurrency": 2}
mux = Mux()


def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())


@mux.handler("say")
def handle(job):
    say("did", job.id)


@mux.handler("gate")
def gate(job):
    say("entered", job.id)
    while not os.path.exists("open"):
        time.sleep(0.01)
    say("left", job.id)


@mux.handler("ends")
def ends(job):
    far.shutdown()


@mux.handler("breaks")
def breaks(job):
    def broken():
        raise RuntimeError("the turn is broken")

    far._group._controls[0]._turn = broken
    far._group._controls[0]._waker.shout()


near, far = Worker(Client(NEAR), "q", mux, **OPTIONS), Worker(Client(FAR), "q", mux, **OPTIONS)
workers = [near, far]
nothing = []
with_mux = (near, mux)
twice = [near, near]
names = {"near": near}


def make():
    return workers


def each():
    yield near
    yield far


def makes_nothing():
    return []


async def make_both_colours():
    return [
        Worker(Client(NEAR), "q", mux, **OPTIONS), AsyncWorker(AsyncClient(FAR), "q", mux, **OPTIONS)
    ]


async def make_async():
    return [AsyncWorker(AsyncClient(dsn), "q", mux, **OPTIONS) for dsn in (NEAR, FAR)]
"""


class Program:
    """`bgjob worker app:NAME`, whose workers have two databases, one of them behind a proxy."""

    def __init__(self, folder: Path, near: str, far: str, proxy: Proxy) -> None:
        self.folder = folder
        self.near, self.far = Client(near), Client(far)
        self.proxy = proxy
        self.env = {"NEAR": near, "FAR": proxy.dsn(far)}
        self.process: Forked | None = None
        (folder / "app.py").write_text(APP)

    def start(self, name: str, *args: str, **env: str) -> None:
        with (self.folder / "out").open("ab") as out:
            self.process = fork(
                "bgjob",
                "worker",
                f"app:{name}",
                f"--health=unix:{self.folder / 's'}",
                *args,
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.env, **env},
                output=out,
                cwd=self.folder,
            )
        assert self.process.stdin is not None
        self.process.stdin.close()

    def enqueue(self, client: Client, *ids: str, type: str = "say") -> None:
        client.bulk_enqueue([EnqueueRequest("q", type, id=id) for id in ids])

    def heard(self, *texts: str) -> bool:
        return eventually(lambda: all(text in self.out for text in texts))

    def ended(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def stopped(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def get(self, path: str) -> tuple[int, Any]:
        """Return status and body; 0 if it does not answer."""
        try:
            status, body = ask(self.folder / "s", path, 5.0)
        except BgjobError:
            return 0, {}
        return status, body if path == "/metrics" else json.loads(body)

    @property
    def statuses(self) -> tuple[int, int, int]:
        """Those of live, ready and startup."""
        return self.get("/livez")[0], self.get("/readyz")[0], self.get("/startupz")[0]

    def value(self, name: str) -> float:
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return next((s.value for f in families for s in f.samples if s.name == name), -1.0)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()


@pytest.fixture
def far_dsn(databases: Databases, template: str) -> Iterator[str]:
    with databases.lend(template, may_keep=lambda: False) as far:  # programs outlive a failed test
        yield far


@pytest.fixture
def program(dsn: str, far_dsn: str) -> Iterator[Program]:
    # A Unix socket needs a short path.
    with tempfile.TemporaryDirectory() as folder, Proxy(far_dsn) as proxy:
        program = Program(Path(folder), dsn, far_dsn, proxy)
        yield program
        if program.process is not None and program.process.poll() is None:
            program.process.send_signal(signal.SIGKILL)
            program.process.wait(PATIENCE)
        program.near.close()
        program.far.close()


@pytest.mark.parametrize("name", ["workers", "make", "each", "make_async", "make_both_colours"])
def test_one_process_works_on_the_queues_of_several_databases_until_a_signal(
    program: Program, name: str
) -> None:
    program.enqueue(program.near, "near")
    program.enqueue(program.far, "far")
    program.start(name)
    assert program.heard(f"app:{name} is running", "did near", "did far")
    program.enqueue(program.near, "near gate", type="gate")
    program.enqueue(program.far, "far gate", type="gate")
    assert program.heard("entered near gate", "entered far gate")
    assert program.process is not None
    program.process.send_signal(signal.SIGTERM)
    assert program.heard("shutting down")
    (program.folder / "open").touch()
    assert program.ended() == 0
    assert program.heard("left near gate", "left far gate", f"app:{name} has ended")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_database_that_goes_away_stops_no_work_of_another(
    program: Program, processes: int
) -> None:
    program.start("workers", f"--processes={processes}")
    assert eventually(lambda: program.statuses == (200, 200, 200)), program.out
    program.proxy.cut()
    assert eventually(lambda: program.statuses == (200, 503, 200))
    program.enqueue(program.near, *"abc")
    program.enqueue(program.far, "later")
    assert program.heard("did a", "did b", "did c")

    def connected() -> dict[str, bool]:
        body = program.get("/readyz")[1]
        said = body["processes"][0] if processes > 1 else body
        return {each["database"]: each["queues"]["q"]["connected"] for each in said["workers"]}

    near, far = (conninfo_to_dict(program.env[name]) for name in ("NEAR", "FAR"))
    far_name = f"{far['dbname']}@{far['host']}:{far['port']}"
    assert eventually(lambda: connected() == {near["dbname"]: True, far_name: False})
    # The metrics have queues and types; those of the same name are one.
    assert program.value("bgjob_worker_slots") == 4 * processes

    program.proxy.forward()
    assert program.heard("did later")
    assert eventually(lambda: program.statuses == (200, 200, 200))
    assert program.stopped() == 0


@pytest.mark.parametrize("name", ["workers", "make_async"])
def test_a_database_that_is_away_at_the_start_keeps_no_other_from_its_work(
    program: Program, name: str
) -> None:
    program.enqueue(program.near, "near")
    program.enqueue(program.far, "far")
    program.proxy.cut()
    program.start(name)
    assert program.heard("did near", "cannot start: ", f"app:{name} is running")
    assert "worker 2, of " in program.out
    assert program.statuses == (200, 503, 200)
    program.proxy.forward()
    assert program.heard("did far", " has started")
    assert eventually(lambda: program.statuses == (200, 200, 200))
    assert program.stopped() == 0


def test_a_signal_does_not_wait_for_a_database_that_is_away(program: Program) -> None:
    program.proxy.silence()
    program.start("workers", "--grace=1000")
    program.enqueue(program.near, "near")
    assert program.heard("did near")
    assert program.stopped() == 0
    assert "has ended" in program.out


def test_where_no_database_answers_at_the_start_the_process_ends_as_with_one(
    program: Program,
) -> None:
    nowhere = "postgresql://somebody:s3cret@127.0.0.1:1/db"
    program.start("workers", NEAR=nowhere, FAR=nowhere)
    assert program.ended() == 1
    assert "worker 1, of db@127.0.0.1:1, cannot start: " in program.out
    assert program.out.splitlines()[-1].startswith("bgjob: connection failed")
    assert "s3cret" not in program.out


def test_missing_tables_in_one_database_end_the_start_of_all(
    program: Program, empty_dsn: str
) -> None:
    program.start("workers", FAR=empty_dsn)
    assert program.ended() == 1
    assert f"worker 2, of {conninfo_to_dict(empty_dsn)['dbname']}, cannot start" in program.out
    assert "migration/init.sql" in program.out.splitlines()[-1]


def test_a_worker_that_ends_on_its_own_ends_the_others_gracefully(program: Program) -> None:
    program.enqueue(program.near, "gate", type="gate")
    program.start("workers")
    assert program.heard("entered gate")
    program.enqueue(program.near, "breaks", type="breaks")
    assert program.heard("worker 2, of ", "has ended on its own")
    program.enqueue(program.near, "late")
    (program.folder / "open").touch()
    assert program.ended() == 1
    assert program.heard("left gate", "RuntimeError: the turn is broken")
    assert program.out.splitlines()[-1] == "bgjob: app:workers has ended on its own"
    assert "did late" not in program.out


def test_a_program_may_shut_down_one_of_its_workers(program: Program) -> None:
    program.start("workers")
    program.enqueue(program.near, "ends", type="ends")
    gone: Callable[[], bool] = lambda: program.get("/livez")[1]["workers"][1]["stopping"]
    assert program.heard("is running") and eventually(gone)
    program.enqueue(program.near, "near")
    assert program.heard("did near")
    assert program.stopped() == 0


FAULTS = {
    "nothing": "is a list without a worker; name a Mux, ",
    "makes_nothing": "returned a list without a worker; ",
    "with_mux": "is a tuple whose item 2 is a Mux: it must be a Worker or an AsyncWorker",
    "twice": "is a list that has item 2 twice",
    "names": "is a dict; name a Mux, a Worker, an AsyncWorker, a list of workers, or a callable ",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_list_that_cannot_be_served_is_explained(program: Program, name: str) -> None:
    program.start(name)
    assert program.ended() == 1
    assert program.out.startswith(f"bgjob: app:{name} {FAULTS[name]}")
    assert program.out.count("\n") == 1


def test_options_that_a_list_cannot_take_are_refused(program: Program) -> None:
    program.start("workers", "--dsn", "dbname=x")
    assert program.ended() == 1
    assert program.out.startswith("bgjob: app:workers is a list, which --dsn cannot change; ")


def test_workers_of_one_process_have_the_same_metrics_or_an_error_says_so() -> None:
    client = Client("dbname=x")
    metrics = Metrics(registry=None)
    workers = [Worker(client, "q", Mux(), observer=[metrics]) for _ in range(2)]
    Metering().attach([worker._group for worker in workers])
    other = Worker(client, "q", Mux())
    with pytest.raises(BgjobError, match="pass the same one to all of them"):
        Metering().attach([workers[0]._group, other._group])
