"""Jobs in the transactions of asyncpg, on connections and pools.

With the oldest version: as in test_sqlalchemy, with 'asyncpg==0.29.0'.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, cast

import asyncpg
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from support.clients import HOSTILE
from support.database import count, rows, sleeper
from support.jobs import requests
from support.waiting import NEVER, eventually
from support.workers import Launcher, Recorder

from bgjob import (
    Client,
    EnqueueConflictError,
    EnqueueRequest,
    JobAlreadyExistsError,
    Mux,
    PayloadError,
    RequestsRequiredError,
)
from bgjob.ext.asyncpg import bulk_enqueue, enqueue

TARGETS = ["connection", "pooled", "pool"]


@dataclass(frozen=True)
class SendMail:
    queue: ClassVar[str] = "mail"

    to: str


@asynccontextmanager
async def opened(dsn: str, kind: str, **settings: str) -> AsyncIterator[Any]:
    """Yield a connection, a connection of a pool, or a pool."""
    parts = conninfo_to_dict(dsn)
    options: dict[str, Any] = {
        "host": parts["host"],
        "port": parts["port"],
        "user": parts["user"],
        "database": parts["dbname"],
        "server_settings": settings,
    }
    if kind == "connection":
        connection = await asyncpg.connect(**options)
        try:
            yield connection
        finally:
            await connection.close()
        return
    async with asyncpg.create_pool(min_size=1, max_size=1, **options) as pool:
        if kind == "pool":
            yield pool
        else:
            async with pool.acquire() as connection:
                yield connection


Body = Callable[[Any], Awaitable[None]]


def use(dsn: str, kind: str, body: Body, **settings: str) -> None:
    async def main() -> None:
        async with opened(dsn, kind, **settings) as target:
            await body(target)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["connection", "pooled"])
def test_a_job_exists_and_wakes_a_worker_when_its_transaction_commits(
    dsn: str, conn: psycopg.Connection, kind: str
) -> None:
    observer = Recorder()

    async def body(connection: Any) -> None:
        for name in ("one", "many"):

            async def write(id_: str) -> None:
                if name == "one":
                    assert await enqueue(connection, EnqueueRequest("q", "t", id=id_)) == id_
                else:
                    assert await bulk_enqueue(connection, requests(id_)) == [id_]

            undone = connection.transaction()
            await undone.start()
            await write(f"undone {name}")
            await undone.rollback()
            assert eventually(lambda: sleeper(conn) is not None)
            async with connection.transaction():
                await write(name)
                assert count(conn) == 0
            observer.wait_for("completed", name)

    with closing(Launcher(dsn, is_async=False)) as launcher:
        mux = Mux().register("t", lambda _: None)
        launcher.start(mux, observer=observer, poll_interval=NEVER)
        use(dsn, kind, body)
    assert sorted(event[1] for event in observer.of("started")) == ["many", "one"]


@pytest.mark.parametrize("kind", TARGETS)
def test_outside_of_a_transaction_a_job_is_committed_and_wakes_a_worker(
    dsn: str, conn: psycopg.Connection, kind: str
) -> None:
    observer = Recorder()

    async def body(target: Any) -> None:
        for id_ in ("one", "many"):
            assert eventually(lambda: sleeper(conn) is not None)
            if id_ == "one":
                await enqueue(target, EnqueueRequest("q", "t", id=id_))
            else:
                await bulk_enqueue(target, requests(id_))
            observer.wait_for("completed", id_)

    with closing(Launcher(dsn, is_async=False)) as launcher:
        mux = Mux().register("t", lambda _: None)
        launcher.start(mux, observer=observer, poll_interval=NEVER)
        use(dsn, kind, body)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_duplicate_is_refused_and_the_transaction_goes_on(
    dsn: str, conn: psycopg.Connection, kind: str
) -> None:
    async def body(target: Any) -> None:
        await enqueue(target, EnqueueRequest("q", "t", id="taken"))
        with pytest.raises(JobAlreadyExistsError, match="'taken'"):
            await enqueue(target, EnqueueRequest("q", "t", id="taken"))
        with pytest.raises(JobAlreadyExistsError) as raised:
            await bulk_enqueue(target, requests("a", "taken", "b", "b"))
        assert raised.value.ids == ("taken", "b")
        many = requests("c", "taken", "c")
        assert await bulk_enqueue(target, iter(many), on_conflict="skip") == ["c", None, None]
        newer = EnqueueRequest("q", "newer", id="taken", headers={"n": 1}, expires=60)
        assert await enqueue(target, newer, on_conflict="skip") is None
        assert await enqueue(target, newer, on_conflict="replace") == "taken"
        assert await bulk_enqueue(target, [newer, newer], on_conflict="replace") == ["taken"] * 2
        with pytest.raises(RequestsRequiredError):
            await bulk_enqueue(target, [])

    async def in_a_transaction(connection: Any) -> None:
        async with connection.transaction():
            await body(connection)

    for program in (body,) if kind == "pool" else (body, in_a_transaction):
        use(dsn, kind, program)
        assert rows(conn, "select id from bgjob_job order by id") == [("c",), ("taken",)]
        conn.execute("delete from bgjob_job")


def test_every_option_arrives(dsn: str, conn: psycopg.Connection) -> None:
    run_at = datetime.now(UTC) + timedelta(hours=1)
    made = [
        EnqueueRequest("q", "t", bytes(range(256)), id="bytes", priority=-3, exclusive="key"),
        EnqueueRequest("q", "t", {"é": None}, id="delayed", delay=timedelta(seconds=60)),
        EnqueueRequest("q", "t", id="timed", run_at=run_at, headers={"é": ["✓", 1]}),
        *(EnqueueRequest(name, name, id=name, exclusive=name[:99]) for name in HOSTILE),
    ]
    select = (
        "select id, queue, type, arg, priority, exclusive, headers::text, case when id = 'timed' then next_run_at "
        "end, round(extract(epoch from next_run_at - created_at)) = 60 from bgjob_job order by id"
    )
    with Client(dsn) as client:
        client.bulk_enqueue(made)
    expected = rows(conn, select)
    conn.execute("delete from bgjob_job")

    async def one_by_one(target: Any) -> None:
        for request in made:
            assert await enqueue(target, request) == request.id

    async def together(target: Any) -> None:
        assert await bulk_enqueue(target, made) == [request.id for request in made]

    for body in (one_by_one, together):
        use(dsn, "connection", body)
        assert rows(conn, select) == expected
        conn.execute("delete from bgjob_job")


def test_a_typed_job_is_enqueued_as_by_a_client(dsn: str, conn: psycopg.Connection) -> None:
    async def body(target: Any) -> None:
        await enqueue(target, SendMail("ann"), id="a", queue="letters", priority=3)
        with pytest.raises(PayloadError):
            await enqueue(target, SendMail(cast(str, 1)))
        with pytest.raises(TypeError, match="priority given together with a request"):
            await enqueue(target, EnqueueRequest("q", "t"), priority=1)

    use(dsn, "pool", body)
    select = "select id, queue, type, arg, priority from bgjob_job"
    assert rows(conn, select) == [("a", "letters", "SendMail", b'{"to":"ann"}', 3)]


def test_a_bulk_of_several_statements_is_written_whole_or_not_at_all(
    dsn: str, conn: psycopg.Connection
) -> None:
    many = [EnqueueRequest("q", "t", id=f"{n:05}") for n in range(10_001)]

    async def body(target: Any) -> None:
        with pytest.raises(JobAlreadyExistsError, match="'00000'"):
            await bulk_enqueue(target, [*many, many[0]])
        assert count(conn) == 0
        assert await bulk_enqueue(target, iter(many)) == [request.id for request in many]

    use(dsn, "pool", body)
    assert count(conn) == 10_001


@pytest.mark.parametrize("level", ["repeatable_read", "serializable"])
def test_a_conflict_that_the_transaction_cannot_see_names_the_remedy(
    dsn: str, conn: psycopg.Connection, level: str
) -> None:
    async def conflicting(connection: Any, id_: str, call: Callable[[], Awaitable[Any]]) -> None:
        async with connection.transaction(isolation=level):
            await connection.execute("select count(*) from bgjob_job")
            conn.execute("insert into bgjob_job (id, queue, type) values (%s, 'q', 't')", [id_])
            await call()

    async def body(connection: Any) -> None:
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "one": lambda: enqueue(connection, EnqueueRequest("q", "t", id="one")),
            "many": lambda: bulk_enqueue(connection, requests("many")),
        }
        for id_, call in calls.items():
            with pytest.raises(EnqueueConflictError, match="repeat the whole") as raised:
                await conflicting(connection, id_, call)
            assert raised.value.ids == (id_,)
            with pytest.raises(JobAlreadyExistsError):
                await call()

    use(dsn, "connection", body)


def test_a_pool_of_serializable_sessions_writes_a_bulk(dsn: str, conn: psycopg.Connection) -> None:
    async def body(pool: Any) -> None:
        assert await bulk_enqueue(pool, requests("a")) == ["a"]

    use(dsn, "pool", body, default_transaction_isolation="serializable")
    assert count(conn) == 1


def test_another_target_is_refused_with_the_remedy(dsn: str) -> None:
    async def body(connection: Any) -> None:
        for target, error in [
            (dsn, "must be a connection or a pool of asyncpg, not str"),
            (connection.transaction(), "pass the connection that has the transaction"),
        ]:
            with pytest.raises(TypeError, match=error):
                await enqueue(target, EnqueueRequest("q", "t"))
            with pytest.raises(TypeError, match=error):
                await bulk_enqueue(target, requests("a"))

    use(dsn, "connection", body)


def test_an_error_of_the_database_is_asyncpgs(dsn: str) -> None:
    async def body(connection: Any) -> None:
        for call in (
            enqueue(connection, EnqueueRequest("q", "t")),
            bulk_enqueue(connection, requests("a")),
        ):
            with pytest.raises(asyncpg.UndefinedTableError):
                await call

    use(dsn, "connection", body, search_path="pg_catalog")
