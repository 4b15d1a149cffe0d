"""Transactional handlers whose connections cannot be had, are lost, or are left in disorder."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from bgjob import AsyncClient, Client, Job, Mux
from bgjob.ext.embedded import EmbeddedServer
from bgjob.testing import adrain, drain
from faults.world import World, eventually

Host = Literal["Worker-plain", "Worker-coroutine", "AsyncWorker-coroutine"]
hosts = pytest.mark.parametrize(
    "host", ["Worker-plain", "Worker-coroutine", "AsyncWorker-coroutine"]
)

LEDGER_ROW = "insert into ledger (job_id, attempt, kind, pid) values (%s, %s, %s, %s)"

LONG = 30.0
"""A lease that no pause of the tests outlives: what runs again was not owed to its end."""


class Effects:
    """Transactional handlers, plain and coroutine, that count their calls."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _count(self, job: Job) -> None:
        with self._lock:
            self.called[job.id] += 1

    def plain(self, job: Job, conn: psycopg.Connection[Any]) -> None:
        self._count(job)
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    async def coroutine(self, job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        self._count(job)
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    def mux(self, host: Host, **options: Any) -> Mux:
        register: Any = Mux().register
        handler = self.plain if host == "Worker-plain" else self.coroutine
        mux: Mux = register("transactional", handler, transactional=True, **options)
        return mux


# -- 5: where there is no connection, no attempt begins ---------------------------------------


@contextmanager
def limited(world: World) -> Iterator[tuple[str, str]]:
    """Give a role that may use the tables, and a DSN of it."""
    name = f"limited_{world.value('select current_database()')}"
    world.query(f"create role {name} login")
    world.query(f"grant all on all tables in schema public to {name}")
    try:
        yield name, make_conninfo(world.dsn, user=name)
    finally:
        world.query(
            f"select pg_terminate_backend(pid) from pg_stat_activity where usename = '{name}'"
        )
        world.query(f"drop owned by {name}; drop role {name}")


@hosts
def test_a_connection_limit_charges_no_job_and_is_told_once_a_second(
    world: World, host: Host
) -> None:
    effects = Effects()
    with limited(world) as (role, dsn):
        ids = world.enqueue_many("transactional", 30)
        # The worker's own connection is there; there is no other.
        world.query(f"alter role {role} connection limit 1")
        began = time.monotonic()
        worker = world.worker(
            effects.mux(host, max_attempts=1),
            dsn=dsn,
            is_async=host.startswith("Async"),
            concurrency=4,
            lease=LONG,
        )
        world.witness(worker, "error", "too many connections", times=2)
        claims = world.value(
            "select sum(n_tup_upd) from pg_stat_user_tables where relname = 'bgjob_job'"
        )
        passed = time.monotonic() - began
        assert len(worker.of("error")) <= passed + 1
        # 4 slots, each with at most one job a pause, and a batch that is given back.
        assert claims <= 200 * (passed + 1)
        assert not effects.called
        assert not worker.of("started", "retried", "buried")
        world.query(f"alter role {role} connection limit 100")
        for id in ids:
            worker.wait_for("completed", id)
        assert {attempt for _, _, attempt in worker.of("completed")} == {1}
        assert effects.called == Counter(ids)
        assert worker.shutdown()


@hosts
def test_a_worker_without_connections_gives_its_jobs_back_when_it_is_shut_down(
    world: World, host: Host
) -> None:
    effects = Effects()
    with limited(world) as (role, dsn):
        ids = world.enqueue_many("transactional", 8)
        world.query(f"alter role {role} connection limit 1")
        worker = world.worker(
            effects.mux(host), dsn=dsn, is_async=host.startswith("Async"), concurrency=4, lease=LONG
        )
        # The pauses have grown to their longest.
        world.witness(worker, "error", "too many connections", times=3)
        assert worker.shutdown(0.5)
        held = "select count(*) from bgjob_job where attempt = 0 and lease_until is null and deaths = 0"
        assert world.value(held) == len(ids)
        assert not effects.called


@pytest.mark.parametrize("how", ["do", "do async", "drain", "adrain"])
def test_what_runs_one_job_here_and_now_gives_it_back_where_there_is_no_connection(
    world: World, how: str
) -> None:
    effects = Effects()
    is_async = "a" in how.removeprefix("drain")

    async def run_async(dsn: str, mux: Mux) -> None:
        async with AsyncClient(dsn) as client:
            await (client.do("q", mux) if how == "do async" else adrain(client, "q", mux))

    def run(dsn: str, mux: Mux) -> None:
        with Client(dsn) as client:
            client.do("q", mux) if how == "do" else drain(client, "q", mux)

    mux = effects.mux("AsyncWorker-coroutine" if is_async else "Worker-plain", exclusive=True)
    with limited(world) as (role, dsn):
        world.enqueue("transactional", "a")
        world.query(f"alter role {role} connection limit 1")
        with pytest.raises(psycopg.OperationalError, match="too many connections"):
            world.run(run_async(dsn, mux)) if is_async else run(dsn, mux)
        world.saw("that there was no connection")
        assert not effects.called
        assert world.query("select attempt, lease_until, waits from bgjob_job") == [
            (0, None, False)
        ]
        world.query(f"alter role {role} connection limit 100")
        world.run(run_async(dsn, mux)) if is_async else run(dsn, mux)
    assert effects.called == {"a": 1}
    assert world.live() == 0


def test_a_restart_under_transactional_jobs_of_one_attempt_buries_none_that_was_not_entered(
    hurt: World, server: EmbeddedServer
) -> None:
    effects = Effects()
    ids = hurt.enqueue_many("transactional", 3000)
    worker = hurt.worker(effects.mux("Worker-plain", max_attempts=1), concurrency=8, lease=LONG)
    assert eventually(lambda: len(effects.called) > 200)
    server.stop("immediate")
    # Each slot finds its connection gone, and no other.
    hurt.witness(worker, "error", times=2)
    server.start()
    hurt.done()
    [buried] = hurt.query("select array_agg(job_id) from bgjob_dead_job")[0]
    assert set(buried or ()) <= set(effects.called)
    assert set(ids) == set(effects.called)
