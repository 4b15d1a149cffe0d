"""Transactional handlers whose connections cannot be had, are lost, or are left in disorder."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, LiteralString, TypeAlias

import psycopg
import pytest
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row, tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from support.waiting import PATIENCE, eventually

from bgjob import (
    AsyncClient,
    AsyncWorker,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    Mux,
    NoopObserver,
    Worker,
)
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.session import WORKER_SETTINGS
from bgjob._sql.settlements import Claimed
from bgjob._sql.transactions import begin, end_sessions, session_name
from bgjob.ext.embedded import EmbeddedServer
from bgjob.testing import adrain, drain
from faults.proxy import Proxy
from faults.world import World

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


# -- 5: without a connection no attempt begins ------------------------------------------------


@contextmanager
def limited(world: World) -> Iterator[tuple[str, str]]:
    """Yield a role that may use the tables, and a DSN of it."""
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
def test_a_connection_limit_charges_no_job_and_is_reported_once_a_second(
    world: World, host: Host
) -> None:
    effects = Effects()
    with limited(world) as (role, dsn):
        ids = world.enqueue_many("transactional", 30)
        # The worker has its own connection; there is no other.
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
        assert not worker.of("started", "retried", "dead")
        world.query(f"alter role {role} connection limit 100")
        for id in ids:
            worker.wait_for("completed", id)
        assert {attempt for _, _, attempt in worker.of("completed")} == {1}
        assert effects.called == Counter(ids)
        assert worker.shutdown()


@hosts
def test_a_worker_without_connections_releases_its_jobs_when_it_is_shut_down(
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
def test_do_and_drain_release_their_job_where_there_is_no_connection(
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


def test_a_restart_under_transactional_jobs_of_one_attempt_dead_letters_none_that_had_not_begun(
    hurt: World, server: EmbeddedServer
) -> None:
    effects = Effects()
    ids = hurt.enqueue_many("transactional", 1000)
    worker = hurt.worker(effects.mux("Worker-plain", max_attempts=1), concurrency=8, lease=LONG)
    assert eventually(lambda: len(effects.called) > 200)
    server.stop("immediate")
    # Each slot finds its connection gone, and no other.
    hurt.witness(worker, "error", times=2)
    server.start()
    hurt.done()
    [dead] = hurt.query("select array_agg(job_id) from bgjob_dead_job")[0]
    assert set(dead or ()) <= set(effects.called)
    assert set(ids) == set(effects.called)


# -- 12: nothing of one job reaches the next, and nothing of it commits there -------------------


class _Number(Loader):
    """Reads every number as 42."""

    def load(self, data: Buffer) -> int:
        return 42


def _shout(conn: psycopg.Connection[Any], said: list[str]) -> None:
    conn.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))


def _hear(conn: psycopg.Connection[Any], said: list[str]) -> None:
    conn.add_notify_handler(lambda notify: said.append(notify.payload))
    conn.execute("listen news")


def _say(conn: psycopg.Connection[Any], id: str) -> None:
    conn.execute(f"do $$ begin raise notice '{id}'; end $$".encode())
    conn.execute(f"notify news, '{id}'".encode())


Spoil: TypeAlias = Callable[[psycopg.Connection[Any], list[str]], object]


def _statement(text: LiteralString) -> Spoil:
    return lambda conn, _: conn.execute(text)


def _attribute(name: str, value: object) -> Spoil:
    return lambda conn, _: setattr(conn, name, value)


LEFT: dict[str, Spoil] = {
    "row factory": _attribute("row_factory", dict_row),
    "cursor factory": _attribute("cursor_factory", psycopg.ClientCursor),
    "threshold": _attribute("prepare_threshold", None),
    "notice handler": _shout,
    "notify handler": _hear,
    "loader": lambda conn, _: conn.adapters.register_loader("int4", _Number),
    "search_path": _statement("set search_path to elsewhere, public"),
    "setting": _statement("set work_mem = '1MB'"),
    "own setting": _statement("set my.own = 'set'"),
    "isolation": _statement(
        "set session characteristics as transaction isolation level serializable"
    ),
    "temporary table": _statement("create temp table ledger (like public.ledger including all)"),
    "prepared statement": _statement("prepare p as select 1"),
    "statement of psycopg": lambda conn, _: [conn.execute("select 2") for _ in range(10)],
    "no statement": _statement("deallocate all"),
    "cursor": _statement("declare c cursor with hold for select 1"),
    "lock": _statement("select pg_advisory_lock(7)"),
    "listen": _statement("listen news"),
}

STATE = """
    select current_setting('search_path'), current_setting('work_mem'),
        coalesce(current_setting('my.own', true), ''),
        current_setting('default_transaction_isolation'), to_regclass('ledger')::text,
        (select count(*) from pg_prepared_statements where name not like 'bgjob%'),
        (select count(*) from pg_cursors),
        (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
        array(select pg_listening_channels())
"""


@pytest.mark.parametrize("left", LEFT)
def test_nothing_that_a_handler_leaves_on_its_connection_is_seen_by_the_next(
    world: World, left: str
) -> None:
    world.query("create schema elsewhere")
    seen: list[tuple[Any, ...]] = []
    sessions: set[int] = set()
    said: dict[str, list[str]] = {}

    def handler(job: Job, conn: psycopg.Connection[Any]) -> None:
        attributes = (conn.row_factory, conn.cursor_factory, conn.prepare_threshold)
        state = psycopg.Cursor(conn, row_factory=tuple_row).execute(STATE).fetchone()
        number = conn.execute("select 1").fetchone()
        seen.append((attributes, state, number))
        sessions.add(conn.info.backend_pid)
        _say(conn, job.id)
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        LEFT[left](conn, said.setdefault(job.id, []))
        if len(said) == 1:
            _say(conn, job.id)

    world.enqueue_many("transactional", 3)
    mux = Mux().register("transactional", handler, transactional=True, max_attempts=1)
    worker = world.worker(mux, lease=LONG)
    world.done()
    world.witness(worker, "completed", times=3)
    assert len(sessions) == 1  # it is kept nevertheless
    assert seen == [seen[0]] * 3
    assert seen[0][2] == (1,)
    # Each hears of itself at most.
    assert all({*heard} <= {id} for id, heard in said.items())
    assert any(said.values()) == (left == "notice handler")


def test_nothing_that_a_coroutine_leaves_on_its_connection_is_seen_by_the_next(
    world: World,
) -> None:
    seen: list[tuple[Any, ...]] = []
    said: list[str] = []

    async def handler(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        row = await (await conn.execute("select 1")).fetchone()
        seen.append((conn.info.backend_pid, conn.row_factory, conn.prepare_threshold, row))
        await conn.execute("do $$ begin raise notice 'notice'; end $$")
        conn.row_factory = dict_row
        conn.prepare_threshold = None
        conn.adapters.register_loader("int4", _Number)
        conn.add_notice_handler(lambda _: said.append(job.id))
        await conn.execute("prepare p as select 1")
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    world.enqueue_many("transactional", 3)
    mux = Mux().register("transactional", handler, transactional=True, max_attempts=1)
    worker = world.worker(mux, is_async=True, lease=LONG)
    world.done()
    world.witness(worker, "completed", times=3)
    assert seen == [seen[0]] * 3
    assert not said


def test_a_statement_that_a_thread_sends_after_its_handler_has_ended_is_refused(
    world: World,
) -> None:
    world.query("create table late (job_id text)")
    refused: list[BaseException] = []
    threads: list[threading.Thread] = []
    ready = threading.Event()

    def insert(conn: psycopg.Connection[Any], cursor: psycopg.Cursor[Any], id: str) -> None:
        for execute in (cursor.execute, conn.execute):
            try:
                while True:
                    execute("insert into late values (%s)", [id])
                    ready.set()
            except psycopg.Error as error:
                refused.append(error)

    def handler(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        ready.clear()
        threads.append(threading.Thread(target=insert, args=(conn, conn.cursor(), job.id)))
        threads[-1].start()
        assert ready.wait(PATIENCE)

    ids = world.enqueue_many("transactional", 20)
    mux = Mux().register("transactional", handler, transactional=True, max_attempts=1)
    worker = world.worker(mux, lease=LONG)
    world.done()
    world.witness(worker, "completed", times=len(ids))
    for thread in threads:
        thread.join(PATIENCE)
    world.saw("that late statements are refused", len(refused) == 2 * len(ids))
    # Each was committed with its own job, or not at all.
    strays = "select count(*) from late l join ledger r using (job_id) where l.xmin <> r.xmin"
    assert world.value(strays) == 0
    assert world.value("select count(distinct job_id) from late") == len(ids)


def test_a_statement_that_a_task_sends_after_its_handler_has_ended_is_refused(
    world: World,
) -> None:
    world.query("create table late (job_id text)")
    refused: list[BaseException] = []
    tasks: set[asyncio.Task[None]] = set()

    async def insert(conn: psycopg.AsyncConnection[Any], ready: asyncio.Event, id: str) -> None:
        try:
            while True:
                await conn.execute("insert into late values (%s)", [id])
                ready.set()
        except psycopg.Error as error:
            refused.append(error)

    async def handler(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        ready = asyncio.Event()
        tasks.add(asyncio.create_task(insert(conn, ready, job.id)))
        await ready.wait()

    ids = world.enqueue_many("transactional", 20)
    mux = Mux().register("transactional", handler, transactional=True, max_attempts=1)
    worker = world.worker(mux, is_async=True, lease=LONG)
    world.done()
    world.witness(worker, "completed", times=len(ids))
    world.saw("that late statements are refused", eventually(lambda: len(refused) == len(ids)))
    strays = "select count(*) from late l join ledger r using (job_id) where l.xmin <> r.xmin"
    assert world.value(strays) == 0
    assert world.value("select count(distinct job_id) from late") == len(ids)


# -- 13: settings of the database and of the client do not reach the library's transactions -----


@pytest.mark.parametrize("threshold", [0, 1, None])
@pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
def test_transactional_handlers_work_regardless_of_prepared_statements(
    world: World, is_async: bool, threshold: int | None
) -> None:
    effects = Effects()
    ids = world.enqueue_many("transactional", 3)
    mux = effects.mux("AsyncWorker-coroutine" if is_async else "Worker-plain", max_attempts=1)
    options: dict[str, Any] = {
        "min_size": 1,
        "open": False,
        "kwargs": {"prepare_threshold": threshold},
    }

    async def work_async() -> None:
        async with AsyncConnectionPool(world.dsn, **options) as pool, AsyncClient(pool) as client:
            assert await client.do("q", mux) == Complete()
            async with AsyncWorker(client, "q", mux, poll_interval=0.05):
                await asyncio.to_thread(world.done)

    if is_async:
        world.run(work_async())
    else:
        with ConnectionPool(world.dsn, **options) as pool, Client(pool) as client:
            assert client.do("q", mux) == Complete()
            with Worker(client, "q", mux, poll_interval=0.05):
                world.done()
    assert effects.called == Counter(ids)
    world.saw("that all have completed", world.value("select count(*) from ledger") == len(ids))


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
def test_a_transaction_outlives_the_extension_of_its_lease_at_any_default_isolation(
    world: World, level: str, is_async: bool
) -> None:
    name = world.value("select current_database()")
    world.query(f"alter database {name} set default_transaction_isolation = '{level}'")
    until = "select lease_until from bgjob_job where id = %s"
    levels = []

    def wait(id: str) -> None:
        before = world.value(until, [id])
        assert eventually(lambda: world.value(until, [id]) > before)

    def plain(job: Job, conn: psycopg.Connection[Any]) -> None:
        levels.append(conn.execute("show transaction_isolation").fetchone())
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        wait(job.id)

    async def coroutine(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        levels.append(await (await conn.execute("show transaction_isolation")).fetchone())
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        await asyncio.to_thread(wait, job.id)

    register: Any = Mux().register
    handler = coroutine if is_async else plain
    mux = register("transactional", handler, transactional=True, max_attempts=1)
    world.enqueue("transactional", "a", "b")
    worker = world.worker(mux, is_async=is_async, concurrency=2)
    for id in "ab":
        world.witness(worker, "completed", id)
    assert levels == [("read committed",)] * 2
    assert not worker.of("error", "retried", "dead", "lost")


@hosts
def test_a_handler_may_choose_the_isolation_of_its_transaction(world: World, host: Host) -> None:
    levels: list[str] = []

    def plain(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute("set transaction isolation level repeatable read")
        levels.extend(conn.execute("show transaction_isolation").fetchone() or ())
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    async def coroutine(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute("set transaction isolation level repeatable read")
        cursor = await conn.execute("show transaction_isolation")
        levels.extend(await cursor.fetchone() or ())
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])

    ids = world.enqueue_many("transactional", 3)
    mux = Mux()
    register: Any = mux.register
    handler = plain if host == "Worker-plain" else coroutine
    register("transactional", handler, transactional=True, max_attempts=1)
    worker = world.worker(mux, is_async=host.startswith("Async"), concurrency=1, lease=LONG)
    world.done()
    world.witness(worker, "completed", times=len(ids))
    assert levels == ["repeatable read"] * 3


def test_a_deferred_trigger_runs_with_the_settings_of_the_session(world: World) -> None:
    world.query("""
        create table seen (setting text);
        create function note() returns trigger language plpgsql as $$ begin
            insert into seen values (current_setting('enable_seqscan')); return null;
        end $$;
        create constraint trigger note after insert on ledger
            deferrable initially deferred for each row execute function note()
    """)
    ids = world.enqueue_many("transactional", 4)
    mux = Effects().mux("Worker-plain", max_attempts=1)
    worker = world.worker(mux, concurrency=1, lease=LONG)
    world.done()
    world.witness(worker, "completed", times=len(ids))
    assert world.query("select setting, count(*) from seen group by 1") == [("on", len(ids))]


# -- 11: a claim that is given up or freed ends its transaction, with its locks ------------------


ONE_AT_A_TIME = "create unique index on ledger (job_id) where kind = 'transactional'"
"""A second attempt waits for what the first has written and not ended."""


@hosts
def test_a_transaction_that_has_timed_out_gives_its_locks_to_the_next_attempt(
    world: World, host: Host
) -> None:
    world.query(ONE_AT_A_TIME)
    neighbours: set[int] = set()
    released = threading.Event()

    def plain(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        if job.id == "neighbour":
            neighbours.add(conn.info.backend_pid)
        if job.attempt == 1:
            released.wait(PATIENCE)

    async def coroutine(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute(LEDGER_ROW, [job.id, job.attempt, job.type, 0])
        if job.id == "neighbour":
            neighbours.add(conn.info.backend_pid)
        while job.attempt == 1 and not released.is_set():
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                continue  # it will not be told

    mux = Mux()
    handler = plain if host == "Worker-plain" else coroutine
    register: Any = mux.register
    policy: dict[str, Any] = {"transactional": True, "max_attempts": 2, "backoff": lambda _: 0.0}
    register("transactional", handler, timeout=0.2, **policy)
    register("untimed", handler, **policy)
    # Claimed together: they have one token.
    world.enqueue("transactional", "a", "b")
    world.enqueue("untimed", "neighbour")
    began = time.monotonic()
    worker = world.worker(mux, is_async=host.startswith("Async"), concurrency=4, lease=LONG)
    for id in "ab":
        world.witness(worker, "timed_out", id)
        worker.wait_for("completed", id)
    assert time.monotonic() - began < 8  # seconds: about two for a coroutine that is cancelled
    assert not worker.of("dead")
    released.set()
    worker.wait_for("completed", "neighbour")
    assert worker.of("completed")[-1] == ("completed", "neighbour", 1)
    assert len(neighbours) == 1
    assert sorted(world.query("select job_id, attempt from ledger")) == [
        ("a", 2),
        ("b", 2),
        ("neighbour", 1),
    ]


@pytest.mark.parametrize("colour", ["thread", "async"])
def test_the_transaction_of_a_worker_that_is_stopped_ends_when_its_claim_is_freed(
    world: World, colour: Literal["thread", "async"]
) -> None:
    world.query(ONE_AT_A_TIME)
    world.enqueue("transactional", "a", hold="gate")
    first = world.start(colour=colour)
    first.wait_for("effect", "a")
    first.stop()
    stopped = time.monotonic()
    second = world.start(colour=colour)
    world.release("gate", 1, 2)
    second.wait_for("completed", "a")
    took = time.monotonic() - stopped
    print(f"completed {took:.2f} s after the stop, lease {world.lease:g} s")
    assert took < world.lease + 8  # seconds; forever before
    first.cont()
    world.witness(first, "lost", "a")
    assert world.query("select attempt from ledger where job_id = 'a'") == [(2,)]


def test_the_transaction_of_a_worker_whose_host_vanished_ends_when_its_claim_is_freed(
    world: World,
) -> None:
    world.query(ONE_AT_A_TIME)
    world.enqueue("transactional", "a", hold="gate")
    with Proxy(world.dsn) as proxy:
        first = world.start(dsn=proxy.dsn(world.dsn))
        first.wait_for("effect", "a")
        proxy.abandon()
        first.kill()
        second = world.start()
        world.release("gate", 2)
        world.witness(second, "completed", "a")
        assert world.query("select attempt from ledger where job_id = 'a'") == [(2,)]
        # The proxy's other session is half open: only the server's keepalive would end it.
        world.query(
            "select pg_terminate_backend(pid, 30000) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid() "
            "and application_name ^@ 'bgjob'"
        )
        second.wait_for("empty")


def test_do_ends_the_transaction_of_the_claim_that_it_takes_over(world: World) -> None:
    effects = Effects()
    world.enqueue("transactional", "a")
    with psycopg.connect(world.dsn) as zombie:
        world.query(
            "update bgjob_job set token = 7, attempt = 1, lease_until = now() - interval '1 s'"
        )
        now = datetime.now(UTC)
        claimed = Claimed(Job("a", "q", "t", None, 1, None, 0, now, now, now), 7)
        zombie.execute(begin(claimed, over_tcp=True, server_version=zombie.info.server_version))
        zombie.execute(LEDGER_ROW, ["a", 1, "transactional", 0])
        assert world.client.do("q", effects.mux("Worker-plain")) == Complete()
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            zombie.execute("select 1")
    world.saw("that the older transaction was ended")
    assert world.query("select attempt from ledger") == [(2,)]


def test_freeing_a_claim_ends_no_other_session(world: World) -> None:
    def claim(id: str, token: int) -> Claimed:
        now = datetime.now(UTC)
        return Claimed(Job(id, "q", "t", None, 1, None, 0, now, now, now), token)

    claims = [claim("a", 1), claim("a", 2), claim("b", 1)]
    names = list(map(session_name, claims))
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 63
    assert len(session_name(claim("ä" * 255, 2**63 - 1))) <= 63
    with ExitStack() as stack:
        conns = [
            stack.enter_context(psycopg.connect(world.dsn, application_name=name)) for name in names
        ]
        with psycopg.connect(world.dsn, autocommit=True) as conn:
            statement = end_sessions(claims[:1])
            conn.execute(statement.text, statement.params)
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            conns[0].execute("select 1")
        for conn in conns[1:]:
            conn.execute("select 1")
    world.saw("the session of the claim was ended")


# -- 15: a large payload costs its own handler only ----------------------------------------------


LARGE = bytes(range(256)) * 400  # more than a claim brings


class Payloads(NoopObserver):
    """Notes what handlers and observers see of payloads."""

    def __init__(self) -> None:
        self.given: dict[str, set[bytes | None]] = {}
        self.told: dict[str, set[bytes | None]] = {}

    def job_started(self, job: Job, /) -> None:
        self.given.setdefault(job.id, set()).add(job.arg)

    def job_completed(self, job: Job, /) -> None:
        self.told.setdefault(job.id, set()).add(job.arg)

    def job_will_be_retried(self, job: Job, delay: float, error: object, /) -> None:
        self.told.setdefault(job.id, set()).add(job.arg)

    def plain(self, job: Job, *conn: object) -> None:
        self.given.setdefault(job.id, set()).add(job.arg)
        if job.attempt == 1:
            raise ValueError(job.id)

    async def coroutine(self, job: Job, *conn: object) -> None:
        self.plain(job)


@pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
def test_handlers_are_given_payloads_of_any_size_and_observers_small_ones(
    world: World, is_async: bool
) -> None:
    payloads = Payloads()
    sent = {"none": None, "empty": b"", "small": LARGE[:65536], "large": LARGE, "sign": ELSEWHERE}
    mux = Mux()
    register: Any = mux.register
    policy: dict[str, Any] = {"backoff": lambda _: 0.0}
    register("plain", payloads.plain, **policy)
    register("timed", payloads.plain, timeout=PATIENCE, **policy)
    register("keyed", payloads.plain, exclusive=lambda job: str(len(job.arg or b"")), **policy)
    register("coroutine", payloads.coroutine, **policy)
    register("timed coroutine", payloads.coroutine, timeout=PATIENCE, **policy)
    if is_async:
        register("transactional", payloads.coroutine, transactional=True, **policy)
    else:
        register("transactional", payloads.plain, transactional=True, **policy)
    types = ("plain", "timed", "keyed", "coroutine", "timed coroutine", "transactional")
    requests = {
        f"{type} {name}": EnqueueRequest("q", type, arg, id=f"{type} {name}")
        for type in types
        for name, arg in sent.items()
    }
    world.client.bulk_enqueue(list(requests.values()))
    world.worker(mux, is_async=is_async, concurrency=3, lease=LONG, observer=payloads)
    assert eventually(lambda: world.live() == 0)
    assert eventually(lambda: len(payloads.told) == len(requests))
    for id, request in requests.items():
        assert payloads.given[id] == {request.arg}, id
        seen = None if request.arg in (LARGE, ELSEWHERE) else request.arg
        assert payloads.told[id] == {seen}, id
    world.saw("that each was retried and completed")


def test_a_large_payload_that_cannot_be_fetched_costs_no_attempt(world: World) -> None:
    payloads = Payloads()
    with limited(world) as (role, dsn):
        world.client.enqueue(EnqueueRequest("q", "plain", LARGE, id="large"))
        world.query(f"alter role {role} connection limit 1")
        worker = world.worker(
            Mux().register("plain", payloads.plain, max_attempts=2, backoff=lambda _: 0.0),
            dsn=dsn,
            lease=LONG,
        )
        world.witness(worker, "error", "too many connections")
        assert not payloads.given
        world.query(f"alter role {role} connection limit 100")
        worker.wait_for("completed", "large")
        assert worker.of("completed") == [("completed", "large", 2)]
        assert payloads.given == {"large": {LARGE}}
        assert worker.shutdown()


@pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
def test_a_large_payload_over_a_slow_network_arrives_and_delays_no_other(
    world: World, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORKER_SETTINGS, "statement_timeout", "1500ms")
    name = world.value("select current_database()")
    world.query(f"alter database {name} set statement_timeout = '1500ms'")
    sizes: dict[str, int] = {}

    def plain(job: Job) -> None:
        sizes[job.id] = len(job.arg or b"")

    async def coroutine(job: Job) -> None:
        plain(job)

    mux = Mux()
    register: Any = mux.register
    register("t", coroutine if is_async else plain, max_attempts=1)
    large = LARGE * 60  # 6 MB
    with psycopg.connect(world.dsn) as conn:
        client = world.client
        client.enqueue(EnqueueRequest("q", "t", large, id="large"), conn=conn)
        client.bulk_enqueue(
            [EnqueueRequest("q", "t", b"small", id=f"{n}") for n in range(50)], conn=conn
        )
    with Proxy(world.dsn) as proxy:
        proxy.rate = 1_500_000.0
        worker = world.worker(
            mux, is_async=is_async, dsn=proxy.dsn(world.dsn), concurrency=2, lease=1.0
        )
        world.witness(worker, "completed", "large")
        assert sizes == {"large": len(large), **{f"{n}": 5 for n in range(50)}}
        assert worker.of("completed")[-1] == ("completed", "large", 1)
        assert not worker.of("lost", "error")
        assert worker.shutdown()
