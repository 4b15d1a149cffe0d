"""PgBouncer itself: what works, what polls, and what is refused with its remedy."""

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from support.pgbouncer import Mode, PgBouncer, find_pgbouncer, pgbouncer, version_of
from support.waiting import eventually

from bgjob import (
    AsyncClient,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    PoolerError,
    Result,
    Retry,
    Worker,
    WorkerError,
    only,
)

PROGRAM = find_pgbouncer() or ""
KNOWS_STATEMENTS = bool(PROGRAM) and version_of(PROGRAM) >= (1, 21)
"""Whether it prepares a client's statements in the session that it gives it."""

pytestmark = pytest.mark.skipif(not PROGRAM, reason="PgBouncer is not installed")


@pytest.fixture(params=["session", "transaction"])
def mode(request: pytest.FixtureRequest) -> Mode:
    """A mode in which there are transactions."""
    chosen: Mode = request.param
    return chosen


@pytest.fixture
def pooler(mode: Mode, dsn: str) -> Iterator[PgBouncer]:
    with pgbouncer(PROGRAM, dsn, mode) as running:
        yield running


def test_everything_works_by_polling(pooler: PgBouncer, dsn: str) -> None:
    def plain(job: Job) -> Result:
        return Retry(0) if job.attempt == 1 else Complete()

    def transactional(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute("insert into ledger values (%s)", [job.id])

    async def coroutine(job: Job) -> Result:
        return MoveToDlq("as asked")

    heard: list[Exception] = []
    mux = Mux().register("plain", plain).register("coroutine", coroutine)
    mux.register("transactional", transactional, transactional=True)
    types = ["plain", "transactional", "coroutine"]
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("create table ledger (id text)")
    with Client(pooler.dsn(dsn)) as client:
        worker = Worker(
            client,
            "q",
            mux,
            concurrency=4,
            poll_interval=0.05,
            observer=only(lambda event: heard.append(event.error), WorkerError),
        )
        worker.run()
        for n in range(20):  # more often than psycopg takes before it prepares
            for type in types:
                client.enqueue(EnqueueRequest("q", type, id=f"{type} {n}"))
        client.enqueue(EnqueueRequest("q", "plain", exclusive="k"))
        client.bulk_enqueue([EnqueueRequest("q", "transactional", exclusive="k") for _ in types])
        client.bulk_enqueue([EnqueueRequest("later", "plain", str(n)) for n in range(600)])
        assert eventually(lambda: sum(s.due + s.delayed + s.running for s in client.stats()) == 600)
        worker.shutdown()
        assert len(client.dlq.list()) == 20
        [finding] = client.doctor("pooler")
        assert "workers are not notified" in finding.text
    with psycopg.connect(dsn) as conn:
        assert conn.execute("select count(*), count(distinct id) from ledger").fetchone() == (
            23,
            23,
        )
    assert not heard


def test_a_pool_that_prepares_statements_works_or_is_told_how_to(
    pooler: PgBouncer, mode: Mode, dsn: str
) -> None:
    prepares = {"autocommit": True, "prepare_threshold": 0}
    with (
        ConnectionPool(pooler.dsn(dsn), min_size=2, open=True, kwargs=prepares) as pool,
        Client(pool, notify=False) as client,
    ):
        pool.wait()

        def enqueue_on_both() -> None:
            for _ in range(4):  # the pool gives the one that rested longest
                client.enqueue(EnqueueRequest("q", "t"))

        if mode == "session" or KNOWS_STATEMENTS:
            enqueue_on_both()
        else:
            with pytest.raises(PoolerError, match='kwargs={"prepare_threshold": None}'):
                enqueue_on_both()


def test_a_pool_that_prepares_nothing_works(pooler: PgBouncer, dsn: str) -> None:
    unprepared = {"autocommit": True, "prepare_threshold": None}
    with (
        ConnectionPool(pooler.dsn(dsn), min_size=2, open=True, kwargs=unprepared) as pool,
        Client(pool) as client,
    ):
        pool.wait()
        for _ in range(12):
            client.enqueue(EnqueueRequest("q", "t"))
        assert [each.due for each in client.stats()] == [12]


def test_an_async_pool_is_told_the_same(dsn: str) -> None:
    async def check() -> None:
        prepares = {"autocommit": True, "prepare_threshold": 0}
        with pgbouncer(PROGRAM, dsn, "transaction") as pooler:
            pool = AsyncConnectionPool(pooler.dsn(dsn), min_size=2, open=False, kwargs=prepares)
            async with pool, AsyncClient(pool, notify=False) as client:
                await pool.wait()
                for _ in range(4):
                    try:
                        await client.enqueue(EnqueueRequest("q", "t"))
                    except PoolerError as error:
                        assert not KNOWS_STATEMENTS
                        assert "max_prepared_statements" in str(error)
                        break
                else:
                    assert KNOWS_STATEMENTS

    asyncio.run(check())


def test_statement_mode_is_refused_with_the_remedy(dsn: str) -> None:
    with pgbouncer(PROGRAM, dsn, "statement") as pooler, Client(pooler.dsn(dsn)) as client:
        id = client.enqueue(EnqueueRequest("q", "t"))  # one statement
        worker = Worker(client, "q", Mux())
        with pytest.raises(PoolerError, match="pool_mode = transaction or session"):
            worker.run()
        with pytest.raises(PoolerError, match="pool_mode = transaction or session"):
            client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(600)])
        assert [(each.queue, each.due) for each in client.stats()] == [("q", 1)]
        assert client.jobs.get(id) is not None


@pytest.mark.parametrize("setting", ["search_path=jobs,public", "geqo=off"])
def test_a_setting_that_is_lost_is_named(dsn: str, mode: Mode, setting: str) -> None:
    name, _, value = setting.partition("=")
    asks = f"-c {setting} --statement-timeout=7s"
    with pgbouncer(PROGRAM, dsn, mode, ignore_startup_parameters="options") as pooler:
        lossy = make_conninfo(pooler.dsn(dsn), options=asks)
        with Client(lossy) as client:
            with pytest.raises(PoolerError, match=f"sets: {name}, statement_timeout. Set it for"):
                client.enqueue(EnqueueRequest("q", "t"))
            with pytest.raises(PoolerError, match=f"sets: {name}. Set it for"):
                Worker(client, "q", Mux()).run()  # it sets the other one itself
        with psycopg.connect(dsn, autocommit=True) as conn:
            [database] = conn.execute("select current_database()").fetchone() or ("",)
            for name, value in [(name, value), ("statement_timeout", "7000")]:
                conn.execute(f"alter database {database} set {name} = {value}".encode())
        with pgbouncer(PROGRAM, dsn, mode, ignore_startup_parameters="options") as renewed:
            lossy = make_conninfo(renewed.dsn(dsn), options=asks)
            with Client(lossy) as client:
                client.enqueue(EnqueueRequest("q", "t"))
                worker = Worker(client, "q", Mux().register("t", lambda _: None))
                worker.run()
                assert eventually(lambda: client.stats() == [])
                worker.shutdown()


def test_an_async_client_names_what_is_lost(dsn: str) -> None:
    async def check() -> None:
        with pgbouncer(PROGRAM, dsn, "transaction", ignore_startup_parameters="options") as pooler:
            asks = make_conninfo(pooler.dsn(dsn), options=r"-capplication_name=a\ b")
            async with AsyncClient(asks) as client:
                with pytest.raises(PoolerError, match="has lost .* application_name"):
                    await client.enqueue(EnqueueRequest("q", "t"))

    asyncio.run(check())
