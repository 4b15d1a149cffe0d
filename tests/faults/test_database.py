"""Faults 14, 15 and 18 to 23: faults of the database and of the connection to it."""

import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Literal, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from support.waiting import PATIENCE, eventually

import bgjob._worker.session
from bgjob import (
    AsyncClient,
    AsyncWorker,
    Client,
    EnqueueRequest,
    Job,
    Mux,
    SchemaError,
    Worker,
)
from bgjob._engine.protocol import Exchange
from bgjob._engine.reply import Part, Plan, Reply
from bgjob._sql.statement import Statement
from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql
from faults import oracle
from faults.app import Event, Handlers, Ledger, Recorder
from faults.pooler import Pooler
from faults.world import Local, Process, World

Colour = Literal["thread", "async"]
Type = Literal["plain", "transactional"]

both_colours = pytest.mark.parametrize("colour", ["thread", "async"])
both_workers = pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
both_types = pytest.mark.parametrize("type", ["plain", "transactional"])

LONG = 30.0
"""A lease that no pause of the tests outlives: no job runs again because it ended."""


def enqueue(world: World, type: Type, *ids: str, count: int = 0, **arg: Any) -> None:
    """Enqueue jobs through a new connection, which no fault has touched."""
    wanted = ids or tuple(f"{type} {len(world.jobs) + n}" for n in range(count))
    with psycopg.connect(world.dsn) as conn:
        world.enqueue(type, *wanted, conn=conn, **arg)
    world.acknowledge(*wanted, type=type, **arg)


# -- 14: pg_terminate_backend on each connection of the worker ------------------------------


def start(world: World, colour: Colour, **options: Any) -> Process:
    """Start a worker process whose connections can be told from the test's."""
    dsn = make_conninfo(world.dsn, application_name="worker")
    return world.start(colour=colour, dsn=dsn, **options)


def sessions(world: World, where: LiteralString = "true") -> list[int]:
    """The server processes of the worker's connections."""
    query = (
        "select pid from pg_stat_activity where datname = current_database() "
        f"and (application_name ^@ 'bgjob' or application_name = 'worker') and {where}"
    )
    return [pid for (pid,) in world.query(query)]


def terminate(world: World, pid: int) -> None:
    assert world.value("select pg_terminate_backend(%s, 30000)", [pid])


WAITS = "wait_event_type = 'Lock'"


@contextmanager
def locked(world: World, statement: LiteralString) -> Iterator[None]:
    """Hold the locks of a statement during a `with` block."""
    with psycopg.connect(world.dsn) as conn:
        conn.execute(statement)
        yield


def waiting(world: World, where: LiteralString = "true") -> int:
    """The worker's session that waits for a lock."""
    found: list[int] = []

    def is_waiting() -> bool:
        found[:] = sessions(world, f"{WAITS} and {where}")
        return bool(found)

    assert eventually(is_waiting)
    return found[0]


@both_colours
def test_a_worker_whose_idle_connections_are_terminated_connects_again(
    world: World, colour: Colour
) -> None:
    worker = start(world, colour)
    for n in range(3):
        world.enqueue("plain", f"plain {n}")
        world.enqueue("transactional", f"transactional {n}")
        world.done()
        killed = sessions(world)
        for pid in killed:
            terminate(world, pid)
        assert eventually(lambda: set(sessions(world)) - set(killed))
    world.witness(worker, "error")
    world.enqueue("plain", "last")
    world.witness(worker, "completed", "last")


@both_colours
def test_a_claim_that_is_terminated_is_made_again(world: World, colour: Colour) -> None:
    worker = start(world, colour)
    with locked(world, "lock table bgjob_job in share row exclusive mode"):
        terminate(world, waiting(world))
    world.enqueue("plain", "a")
    world.witness(worker, "completed", "a")
    world.witness(worker, "error")


@both_colours
@pytest.mark.parametrize("then", ["complete", "retry", "dlq", "reschedule"])
def test_a_settlement_that_is_terminated_is_made_again(
    world: World, colour: Colour, then: str
) -> None:
    world.enqueue("plain", "a", hold="gate", then=then, until=2)
    worker = start(world, colour, lease=LONG)
    worker.wait_for("effect", "a")
    # It waits for a tenth of a second, again and again.
    with locked(world, "lock table bgjob_job in share row exclusive mode"):
        world.release("gate", 1, 2)
        terminate(world, waiting(world))
    world.done()
    world.witness(worker, "error")
    worker.wait_for("dead" if then == "dlq" else "completed", "a")
    told = [event[0] for event in worker.of("completed", "retried", "rescheduled", "dead", "lost")]
    outcomes = {
        "complete": ["completed"],
        "retry": ["retried", "completed"],
        "dlq": ["dead"],
        "reschedule": ["rescheduled", "completed"],
    }
    assert told == outcomes[then]
    # No handler ran again for it.
    assert world.rows("a") == len(told)


@both_colours
def test_an_extension_that_is_terminated_is_made_again(world: World, colour: Colour) -> None:
    world.enqueue("plain", "a", hold="gate")
    # It has no slot to claim for.
    worker = start(world, colour, lease=6.0, concurrency=1)
    worker.wait_for("effect", "a")
    until = world.value("select lease_until from bgjob_job")
    with locked(world, "lock table bgjob_job in share row exclusive mode"):
        terminate(world, waiting(world))
    assert eventually(lambda: world.value("select lease_until from bgjob_job") > until)
    world.release("gate", 1)
    world.witness(worker, "completed", "a")
    world.witness(worker, "error")
    assert world.rows("a") == 1


@both_colours
@pytest.mark.parametrize("moment", ["idle", "statement", "settlement"])
def test_a_transaction_that_is_terminated_is_rolled_back_and_runs_again(
    world: World, colour: Colour, moment: str
) -> None:
    with ExitStack() as stack:
        if moment == "statement":
            stack.enter_context(locked(world, "lock table ledger in exclusive mode"))
        world.enqueue("transactional", "a", hold="gate")
        worker = start(world, colour, lease=LONG)
        if moment == "statement":
            terminate(world, waiting(world, "query ~ 'insert into ledger'"))
        else:
            worker.wait_for("effect", "a")
        if moment == "idle":
            [pid] = sessions(world, "state = 'idle in transaction'")
            terminate(world, pid)
        if moment == "settlement":
            stack.enter_context(locked(world, "select from bgjob_job where id = 'a' for update"))
            world.release("gate", 1)
            terminate(world, waiting(world))
    world.release("gate", 1, 2)
    world.done()
    world.witness(worker, "retried", "a")
    worker.wait_for("completed", "a")
    assert worker.of("completed") == [("completed", "a", 2)]
    assert not worker.of("lost")


@both_workers
def test_terminations_amid_a_stream_of_quick_jobs_lose_none(world: World, is_async: bool) -> None:
    ran: Counter[str] = Counter()

    def plain(job: Job) -> None:
        ran[job.id] += 1

    async def coroutine(job: Job) -> None:
        ran[job.id] += 1

    ids = world.enqueue_many("quick", 5000, ledger=False)
    mux = Mux().register("quick", coroutine if is_async else plain)
    worker = world.worker(mux, is_async=is_async)
    for n in range(1, 4):
        assert eventually(lambda: len(ran) >= n * 1000 and sessions(world))
        for pid in sessions(world):
            terminate(world, pid)
    world.done()
    assert set(ran) == set(ids)
    world.witness(worker, "error")
    # Of each job one run was told as completed.
    worker.wait_for("completed", times=len(ids))
    assert sorted(id for _, id, _ in worker.of("completed")) == sorted(ids)


# -- 15: the server crashes, or is away ------------------------------------------------------


def started(*workers: Process) -> int:
    return sum(len(worker.of("started")) for worker in workers)


def test_ten_crashes_of_the_server_under_load_lose_nothing(
    hurt: World, server: EmbeddedServer
) -> None:
    workers = [hurt.start(colour="thread"), hurt.start(colour="async")]
    recoveries = []
    for _ in range(10):
        enqueue(hurt, "plain", count=15, sleep=0.03, linger=0.03)
        enqueue(hurt, "transactional", count=15, sleep=0.03, linger=0.03, children=1)
        before = started(*workers)
        assert eventually(lambda: started(*workers) >= before + 5)
        server.restart("immediate")
        back = time.monotonic()
        before = started(*workers)
        enqueue(hurt, "plain", count=1)
        assert eventually(lambda: started(*workers) > before)
        recoveries.append(time.monotonic() - back)
    hurt.done()
    print(
        f"{len(hurt.jobs)} jobs, 10 crashes; from the server's return to the first start: "
        f"{max(recoveries):.2f} s at most"
    )
    for worker in workers:
        hurt.witness(worker, "error")


@both_colours
@pytest.mark.parametrize(
    "away", [3.0, pytest.param(60.0, marks=[pytest.mark.soak, pytest.mark.timeout(180)])]
)
def test_a_worker_waits_for_a_database_that_is_away_and_runs_nothing_twice(
    hurt: World, server: EmbeddedServer, colour: Colour, away: float
) -> None:
    # The only worker there is, and a database that is away for several leases.
    assert away >= 3 * hurt.lease
    worker = hurt.start(colour=colour, concurrency=8)
    enqueue(hurt, "plain", "quick")
    hurt.done()
    enqueue(hurt, "plain", "ends while it is away", linger=away / 2)
    enqueue(hurt, "plain", "ends after it", linger=away + 1.5)
    enqueue(hurt, "plain", "has a key", linger=away + 1.5, exclusive="key")
    enqueue(hurt, "plain", "has the key next", exclusive="key")
    enqueue(hurt, "plain", "raises", linger=away / 2, then="raise", until=2)
    enqueue(hurt, "transactional", "b", linger=away / 2)
    for id in ("ends while it is away", "ends after it", "has a key", "raises", "b"):
        worker.wait_for("effect", id)
    told, began = len(worker.of("error")), time.monotonic()
    server.stop("fast")
    time.sleep(away)
    told = len(worker.of("error")) - told
    passed = time.monotonic() - began
    server.start()
    back, before = time.monotonic(), started(worker)
    enqueue(hurt, "plain", "c")
    assert eventually(lambda: started(worker) > before)
    print(f"away for {passed:.1f} s, told {told} times; back after {time.monotonic() - back:.2f} s")
    hurt.saw("it says that the database is away", told >= 1)
    assert told <= passed + 1
    hurt.done(timeout=PATIENCE + away)  # what lingers for half of it may have to run again
    hurt.witness(worker, "completed", "c")
    assert not worker.of("lost")
    # A transaction ends with its server. What has no part in the database did not run again.
    runs = Counter(event[1] for event in worker.of("started"))
    assert runs == Counter(list(hurt.jobs)) + Counter({"b": 1, "raises": 1})
    for id in hurt.jobs:
        assert hurt.rows(id) == runs[id] - (id == "b"), id


@pytest.mark.both_colours
@pytest.mark.parametrize("is_async", [False, True], ids=["Client", "AsyncClient"])
def test_a_client_is_back_half_a_second_after_the_server(
    hurt: World, server: EmbeddedServer, is_async: bool
) -> None:
    client: Any = AsyncClient(hurt.dsn) if is_async else Client(hurt.dsn)

    def call(id: str) -> float:
        answer = client.enqueue(EnqueueRequest("q", "plain", id=id))
        hurt.run(answer) if is_async else None
        hurt.acknowledge(id)
        return time.monotonic()

    with ThreadPoolExecutor() as threads:
        call("before")
        server.stop("fast")
        enqueued = threads.submit(call, "meanwhile")
        # psycopg_pool would try again 1 s and 3 s after its first attempt.
        time.sleep(1.2)
        server.start()
        back = time.monotonic()
        late = enqueued.result() - back
    print(f"the first enqueue returned {late:.2f} s after the server was back")
    assert late < 0.75
    call("after")
    hurt.run(client.close()) if is_async else client.close()
    hurt.saw("an enqueue waits for the server", late > 0)
    hurt.start()
    hurt.done()


# -- 18: fail-over to a read-only server; low timeouts; serializable -------------------------


READ_ONLY = "read-only"


@both_colours
@pytest.mark.parametrize(
    "away", [3.0, pytest.param(20.0, marks=[pytest.mark.soak, pytest.mark.timeout(120)])]
)
def test_results_outlive_a_fail_over_to_a_server_that_is_read_only_for_a_while(
    hurt: World, server: EmbeddedServer, colour: Colour, away: float
) -> None:
    worker = hurt.start(colour=colour, lease=60.0, backoff=1.0)
    finished = [f"finished {n}" for n in range(3)]
    enqueue(hurt, "plain", *finished, linger=1.5)
    enqueue(hurt, "transactional", "open", linger=1.5)
    for id in (*finished, "open"):
        worker.wait_for("effect", id)
    server.stop("fast")
    Path(server.data_dir, "standby.signal").touch()
    server.start()
    try:
        assert hurt.value("select pg_is_in_recovery()")
        worker.wait_for("error", READ_ONLY)
        time.sleep(away)
        assert hurt.live() == 4
    finally:
        hurt.query("select pg_promote()")
    hurt.done()
    hurt.witness(worker, "error", READ_ONLY)
    for id in finished:
        worker.wait_for("completed", id)
        assert hurt.rows(id) == 1


@both_colours
def test_a_worker_outlives_a_time_in_which_the_database_is_read_only(
    world: World, colour: Colour
) -> None:
    # The ledger of the ordinary handlers can be written throughout.
    ledger = make_conninfo(world.dsn, options="-c default_transaction_read_only=off")
    name = world.value("select current_database()")
    worker = start(world, colour, ledger=ledger, lease=LONG, backoff=0.3)
    world.enqueue("plain", "a", hold="gate")
    world.enqueue("transactional", "b", hold="gate")
    for id in "ab":
        worker.wait_for("effect", id)
    world.query(f"alter database {name} set default_transaction_read_only = on")
    for pid in sessions(world):
        terminate(world, pid)
    world.query("set default_transaction_read_only = off")
    world.release("gate", 1, 2, 3, 4, 5, 6)
    worker.wait_for("error", READ_ONLY)
    world.query(f"alter database {name} reset default_transaction_read_only")
    # A session keeps the default that it began with: those that began meanwhile stay.
    enqueue(world, "transactional", "c")
    enqueue(world, "plain", "d")
    world.done()
    world.witness(worker, "error", READ_ONLY)
    assert world.rows("a") == 1
    for id in "abcd":
        world.witness(worker, "completed", id)


def set_standbys(admin: psycopg.Connection, names: str) -> None:
    """Make commits wait for these standbys, which do not exist; "" for no wait."""
    admin.execute(f"alter system set synchronous_standby_names = '{names}'".encode())
    admin.execute("select pg_reload_conf()")


def test_jobs_whose_claim_waits_for_a_standby_that_is_away_are_charged_nothing(
    hurt: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bgjob._worker.session, "WORKER_PATIENCE", 1.0)
    ids = [f"job {n}" for n in range(10)]
    hurt.enqueue("plain", *ids)
    with ExitStack() as stack, psycopg.connect(hurt.dsn, autocommit=True) as admin:
        admin.execute("set synchronous_commit = local")
        admin.execute("create table probe ()")

        def waits() -> bool:
            conn = psycopg.connect(hurt.dsn, autocommit=True)
            stack.callback(conn.close)
            conn.pgconn.send_query(b"insert into probe default values")
            waiting = "select from pg_stat_activity where wait_event = 'SyncRep'"
            return eventually(lambda: admin.execute(waiting).rowcount, timeout=0.2)

        try:
            set_standbys(admin, "nobody")
            assert eventually(waits)
            worker = hurt.worker(hurt.mux(), lease=LONG)
            worker.wait_for("error")
            assert not worker.of("started")
        finally:
            set_standbys(admin, "")
    began = time.monotonic()
    hurt.done()
    print(f"done {time.monotonic() - began:.2f} s after the standby was given up")
    assert time.monotonic() - began <= LONG / 2
    for id in ids:
        hurt.witness(worker, "completed", id)
    assert {event[2] for event in worker.of("completed")} == {1}


def set_timeouts(world: World, whose: str) -> None:
    """Set low timeouts for the new sessions of the database, or of the role there."""
    name = world.value("select current_database()")
    target = f"database {name}" if whose == "database" else f"role postgres in database {name}"
    for timeout, limit in {
        "idle_in_transaction_session_timeout": "100ms",
        "idle_session_timeout": "100ms",
        "statement_timeout": "100ms",
        "lock_timeout": "20ms",
    }.items():
        world.query(f"alter {target} set {timeout} = '{limit}'")


whosever = pytest.mark.parametrize("whose", ["database", "role"])


@both_colours
@whosever
def test_low_timeouts_break_off_nothing_that_a_worker_does_itself(
    world: World, colour: Colour, whose: str
) -> None:
    set_timeouts(world, whose)
    # What a handler does on a connection of its own is not the worker's.
    ledger = make_conninfo(world.dsn, options="-c idle_session_timeout=0 -c statement_timeout=0")
    world.enqueue("plain", "a", hold="gate")
    worker = start(world, colour, ledger=ledger, lease=LONG, poll_interval=0.5)
    worker.wait_for("effect", "a")
    # A locked row is for longer out of reach than any of them; the others are settled.
    with locked(
        world,
        "set statement_timeout = 0; set idle_in_transaction_session_timeout = 0;"
        " select from bgjob_job where id = 'a' for update",
    ):
        world.release("gate", 1)
        world.enqueue("plain", "b")
        worker.wait_for("completed", "b")
        assert not worker.of("error")
    world.done()
    world.witness(worker, "completed", "a")
    assert not worker.of("error", "retried", "lost")
    assert world.rows("a") == 1


TWICE = "select job_id from ledger where kind <> 'gate' group by job_id having count(*) > 1"


def settlement_paces(world: World, seconds: float) -> list[float]:
    """The seconds from a job's enqueue until it is settled, of one after the other."""
    paces = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        [id] = world.enqueue("plain")
        assert eventually(lambda: not world.live(id))  # noqa: B023
        paces.append(time.monotonic() - began)
    return paces


@both_colours
@pytest.mark.parametrize("what", ["row", "key"])
def test_a_row_that_another_session_has_locked_delays_its_own_settlement_only(
    world: World, colour: Colour, what: str
) -> None:
    exclusive = "k" if what == "key" else None
    world.enqueue("plain", "locked", hold="gate", exclusive=exclusive)
    world.enqueue("plain", "slow", linger=2.5)
    worker = start(world, colour, concurrency=2, lease=1.0)
    worker.wait_for("effect", "locked")
    worker.wait_for("effect", "slow")
    lock: LiteralString = (
        "select from bgjob_exclusive where key = 'k' for update"
        if what == "key"
        else "select from bgjob_job where id = 'locked' for update"
    )
    with locked(world, lock):
        world.release("gate", *range(1, 9))
        if what == "key":
            world.enqueue("plain", "next", exclusive="k")
        paces = settlement_paces(world, 2.0)
        assert not worker.heard("completed", "locked")
    world.done()
    print(f"{what}: neighbours were settled within {median(paces):.3f} s, {max(paces):.3f} s")
    assert median(paces) < 0.5
    world.witness(worker, "completed", "locked")
    assert world.rows("slow") == 1
    assert world.query(TWICE) == []


@both_colours
@whosever
def test_low_timeouts_do_not_end_the_transaction_of_a_handler_that_takes_its_time(
    world: World, colour: Colour, whose: str
) -> None:
    set_timeouts(world, whose)
    worker = start(world, colour, max_attempts=3)
    enqueue(world, "transactional", "a", "b", linger=0.5)
    world.done()
    assert world.query("select job_id, last_error from bgjob_dead_job") == []
    for id in "ab":
        world.witness(worker, "completed", id)
    assert not worker.of("error", "retried", "lost")


def test_workers_are_indifferent_to_serializable_as_the_default(world: World) -> None:
    name = world.value("select current_database()")
    world.query(f"alter database {name} set default_transaction_isolation = 'serializable'")
    workers = [start(world, colour, max_attempts=None) for colour in ("thread", "async")]
    # The leases are extended while some of the transactions are open.
    for linger in (0.0, 0.5, 0.0):
        enqueue(world, "plain", count=10, children=1)
        enqueue(world, "transactional", count=10, children=1, linger=linger)
    world.done()
    assert eventually(lambda: world.live() == 0)
    assert world.value("select count(*) from bgjob_dead_job") == 0
    for worker in workers:
        world.witness(worker, "completed")
        # What handlers do in their own transactions may collide, and is tried again.
        assert not worker.of("error", "lost")


# -- 19: the disk is full ----------------------------------------------------------------------


FULL = """
    create function full_disk() returns trigger language plpgsql as $$
    begin
        raise exception using errcode = '53100', message = 'could not extend file "base/1/1"',
            hint = 'Check free disk space.';
    end $$;
"""

ON_SETTLEMENT = """
    create trigger full_disk_1 before delete on bgjob_job for each row execute function full_disk();
    create trigger full_disk_2 before update on bgjob_job for each row
        when (new.token is null) execute function full_disk();
    create trigger full_disk_3 before insert on bgjob_dead_job execute function full_disk();
"""

ON_EVERY_WRITE = """
    create trigger full_disk_1 before insert or update or delete on bgjob_job
        execute function full_disk();
    create trigger full_disk_2 before insert or update or delete on bgjob_dead_job
        execute function full_disk();
"""


@both_colours
@pytest.mark.parametrize("triggers", [ON_SETTLEMENT, ON_EVERY_WRITE], ids=["settlement", "all"])
def test_results_are_kept_while_the_disk_is_full_and_no_handler_runs_again_for_it(
    world: World, colour: Colour, triggers: str
) -> None:
    outcomes = {"complete": "completed", "retry": "retried", "dlq": "dead"}
    for then in outcomes:
        world.enqueue("plain", *[f"{then} {n}" for n in range(5)], hold="gate", then=then, until=2)
    worker = start(world, colour, concurrency=20, lease=LONG)
    worker.wait_for("effect", times=15)
    world.query(FULL + triggers)
    world.release("gate", 1, 2)
    worker.wait_for("error", "could not extend file")
    time.sleep(2.0)
    assert not worker.of(*outcomes.values())
    world.query("drop function full_disk cascade")
    world.done()
    world.witness(worker, "error", "could not extend file")
    for then, event in outcomes.items():
        for n in range(5):
            worker.wait_for(event, f"{then} {n}")
            assert world.rows(f"{then} {n}") == 1 + (then == "retry")


@both_colours
def test_a_settlement_that_is_refused_delays_no_other_and_repeats_no_job(
    world: World, colour: Colour
) -> None:
    world.query(FULL)
    world.query(
        "create trigger full_disk before delete on bgjob_job for each row "
        "when (old.id like 'refused%') execute function full_disk()"
    )
    world.enqueue("plain", *[f"refused {n}" for n in range(20)])
    world.enqueue("plain", "slow", linger=2.5)
    worker = start(world, colour, concurrency=2, lease=1.0)
    worker.wait_for("error", "could not extend file")
    worker.wait_for("effect", "slow")
    paces = settlement_paces(world, 2.0)
    assert not [event for event in worker.of("completed") if event[1].startswith("refused")]
    world.query("drop function full_disk cascade")
    world.done()
    print(f"beside refused ones: settled within {median(paces):.3f} s, {max(paces):.3f} s")
    assert median(paces) < 0.5
    world.witness(worker, "completed", "refused 0")
    assert world.query(TWICE) == []


@both_colours
def test_a_transaction_for_which_the_disk_is_full_is_rolled_back_and_runs_again(
    world: World, colour: Colour
) -> None:
    world.enqueue("transactional", "a", hold="gate")
    worker = start(world, colour, lease=2.0, backoff=0.3, max_attempts=None)
    worker.wait_for("effect", "a")
    world.query(FULL + ON_SETTLEMENT)
    world.release("gate", *range(1, 100))
    worker.wait_for("error", "could not extend file")
    time.sleep(1.0)
    world.query("drop function full_disk cascade")
    world.done()
    world.witness(worker, "completed", "a")


# -- 20: a snapshot held open for the whole run -----------------------------------------------


class Work:
    """Counts the index entries that this process's workers read, and the jobs they claimed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.claims: list[tuple[str, int, int]] = []
        """Of each: its kind, its jobs, and the index entries it read, those of dead rows too."""
        self._count = 0
        plan = Exchange.statements

        def counted(exchange: Exchange, queue: str, lease: float, served: Collection[str]) -> Plan:
            statements = plan(exchange, queue, lease, served)
            if exchange.claim is not None:
                kind = type(exchange.claim).__name__
                claim, store = statements[0]
                got: list[int] = []

                def parse(rows: Sequence[tuple[Any, ...]]) -> Any:
                    got.append(len(rows))
                    return claim.parse(rows)

                def note(rows: Sequence[tuple[Any, ...]]) -> list[str]:
                    # The session's own count, which the server takes away now and then.
                    [[count]] = rows
                    read = count - self._count if count >= self._count else count
                    self.claims.append((kind, got[0], read))
                    self._count = count
                    return []

                query = b"select pg_stat_get_xact_tuples_returned('bgjob_job_due'::regclass)"
                at = 2 if kind == "Sweep" else 1  # a survey belongs to it
                statements[:at] = [
                    Part(claim._replace(parse=parse), store),
                    *statements[1:at],
                    Part(Statement(query, None, note), Reply.add_settled),
                ]
            return statements

        monkeypatch.setattr(Exchange, "statements", counted)

    def since(self, start: int) -> tuple[int, int]:
        """Return the jobs claimed from the marks since then, and the entries read for them.

        Without the sweeps, which have a twentieth of the time at most, and the looks that found
        nothing: those walk over what the producer has not committed yet, as often as they come.
        """
        claims = [(jobs, read) for kind, jobs, read in self.claims[start:] if kind == "Claim"]
        return sum(jobs for jobs, _ in claims), sum(read for jobs, read in claims if jobs)


def test_an_old_snapshot_makes_neither_claims_nor_pick_ups_dearer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(monkeypatch)
    batch = 2000

    def run(count: int) -> tuple[int, int]:
        start = len(work.claims)
        world.client.bulk_enqueue([EnqueueRequest("q", "quick") for _ in range(count)])
        assert eventually(lambda: world.live() == 0)
        return work.since(start)

    def pick_up() -> float:
        """What is read, at the median, to find a job that an idle worker is notified of."""
        found = [run(1) for _ in range(21)]
        return float(median(read for jobs, read in found if jobs))

    with psycopg.connect(world.dsn) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        conn.execute("select count(*) from bgjob_job")
        mux = Mux().register("quick", lambda _: None)
        worker = world.worker(mux, concurrency=4)
        run(batch)  # the marks are known, and the pace
        first_pick_up = pick_up()
        tenths = [run(batch) for _ in range(10)]
        last_pick_up = pick_up()
        dead = "select n_dead_tup from pg_stat_user_tables where relname = 'bgjob_job'"
        kept = eventually(lambda: world.value(dead) >= 10 * batch)
    by_tenths = [read / jobs for jobs, read in tenths if jobs]
    print("read for a job, by tenths:", *[f"{read:.2f}" for read in by_tenths])
    print(f"read for a pick-up: {first_pick_up:g} at first, {last_pick_up:g} at last")
    world.saw("the snapshot keeps what is dead", kept)
    # In one of them a wide look may fall, where a transaction has ended that was under way
    # when the worker started: another test's, say.
    assert median(by_tenths[5:]) <= 2 * by_tenths[0] + 1
    assert last_pick_up <= 2 * first_pick_up + 10
    worker.wait_for("completed", times=11 * batch)


@both_colours
def test_a_table_that_is_rewritten_while_its_jobs_are_held_loses_none(
    world: World, colour: Colour
) -> None:
    # A claim tells where its rows are, and each of these moves them all.
    enqueue(world, "plain", count=300)
    worker = start(world, colour, concurrency=10, lease=LONG)
    rewritten = 0
    while world.live():
        world.query("vacuum full bgjob_job")
        rewritten += 1
    assert rewritten > 1
    world.witness(worker, "completed", times=300)
    assert worker.of("lost", "retried", "error") == []
    assert all(world.rows(id) == 1 for id in world.jobs)


# -- 21: PgBouncer in transaction mode -------------------------------------------------------

LEDGER_ROW = "insert into ledger (job_id, attempt, kind, pid) values (%s, %s, %s, 0)"


@contextmanager
def pooled(
    world: World, dsn: str, *, is_async: bool, **options: Any
) -> Iterator[tuple[Client | AsyncClient, Any]]:
    """A client on a pool of the user's, and the pool."""
    settings: dict[str, Any] = {"open": False, "timeout": PATIENCE, "min_size": 1, **options}
    pool: Any
    client: Client | AsyncClient
    if is_async:
        pool = AsyncConnectionPool(dsn, **settings)
        client = AsyncClient(pool, notify=False)
    else:
        pool = ConnectionPool(dsn, **settings)
        client = Client(pool, notify=False)
    world.answer(pool.open())
    try:
        yield client, pool
    finally:
        world.answer(pool.close())


@contextmanager
def working(world: World, client: Client | AsyncClient, mux: Mux) -> Iterator[Local]:
    """A worker made from this client, for the length of a `with` block."""
    heard: list[Event] = []
    options: dict[str, Any] = {
        "concurrency": 4,
        "lease": world.lease,
        "poll_interval": world.poll_interval,
        "observer": Recorder(heard.append),
    }
    if isinstance(client, AsyncClient):
        local = Local(AsyncWorker(client, "q", mux, **options), world.run, heard)
    else:
        local = Local(Worker(client, "q", mux, **options), lambda it: it, heard)
    world.locals.append(local)
    world.answer(local.worker.run())
    yield local
    oracle.check_claims(world)
    assert local.shutdown()


@pytest.fixture(params=[False, True], ids=["transaction mode", "session mode"])
def pooler(request: pytest.FixtureRequest, dsn: str) -> Iterator[Pooler]:
    """Requested before the world, which it outlives."""
    with Pooler(dsn, size=50 if request.param else 2, keeps=request.param) as pooler:
        yield pooler


@both_workers
def test_a_pooler_needs_no_configuration(pooler: Pooler, world: World, is_async: bool) -> None:
    dsn = pooler.dsn(world.dsn)
    with Client(dsn) as client:
        worker = world.worker(
            world.mux(is_async=is_async), is_async=is_async, dsn=dsn, concurrency=4
        )
        for n in range(20):  # more often than psycopg takes before it prepares
            world.enqueue("plain", f"a{n}", client=client)
            world.enqueue("transactional", f"b{n}", client=client)
        world.done()
        world.enqueue("plain", *(f"c{n}" for n in range(8)), client=client, exclusive="k")
        world.done()
        world.witness(worker, "completed", "b19")
        assert client.dlq.list() == []
        for _ in range(10):
            client.stats()
            client.schedules.list()
        assert not worker.of("error", "lost")


@both_workers
def test_everything_works_through_a_pooler(pooler: Pooler, world: World, is_async: bool) -> None:
    dsn = pooler.dsn(world.dsn)
    unprepared = {"prepare_threshold": None}
    with pooled(world, dsn, is_async=is_async, kwargs=unprepared) as (client, pool):

        async def enqueue_with_a_row(request: EnqueueRequest) -> None:
            async with pool.connection() as conn:
                await conn.execute(LEDGER_ROW, [request.id, 0, "enqueued"])
                await client.enqueue(request, conn=conn)  # type: ignore[misc]

        def enqueue_in_a_transaction(request: EnqueueRequest) -> None:
            if is_async:
                return world.run(enqueue_with_a_row(request))
            with pool.connection() as conn:
                conn.execute(LEDGER_ROW, [request.id, 0, "enqueued"])
                client.enqueue(request, conn=conn)
            return None

        handlers = Handlers(client, Ledger(world.dsn), lambda _: None)
        mux = handlers.register(Mux(), max_attempts=25, backoff=0.05)
        outcomes = ("complete", "retry", "raise", "reschedule", "dlq")
        with working(world, client, mux) as worker:
            for type in ("plain", "transactional"):
                for then in outcomes:
                    ids = [f"{type} {then} {n}" for n in range(4)]
                    arg: dict[str, Any] = {"then": then, "until": 2, "children": 1}
                    requests = [EnqueueRequest("q", type, arg, id=id) for id in ids]
                    assert world.answer(client.enqueue(requests[0])) == ids[0]
                    assert world.answer(client.bulk_enqueue(requests[1:3])) == ids[1:3]
                    enqueue_in_a_transaction(requests[3])
                    world.acknowledge(*ids, type=type, **arg)
            world.done()
            dead = [f"{type} dlq {n}" for type in ("plain", "transactional") for n in range(4)]
            died = {job.id: job for job in world.answer(client.dlq.list())}
            assert died.keys() == set(dead), died
            for then, event in zip(
                outcomes, ("completed", "retried", "retried", "rescheduled", "dead"), strict=True
            ):
                world.witness(worker, event, f"plain {then} 0")
                world.witness(worker, event, f"transactional {then} 0")
            assert world.answer(client.dlq.purge("plain dlq 0")) == 1
            assert world.answer(client.dlq.requeue("plain dlq 1")) == ["plain dlq 1"]
            assert eventually(lambda: world.live() == 0)
            assert not worker.of("error", "lost")


@both_workers
def test_a_job_that_raises_is_retried_in_a_session_that_committed_another_of_its_claim(
    pooler: Pooler, world: World, is_async: bool
) -> None:
    with pooled(world, pooler.dsn(world.dsn), is_async=is_async) as (client, _):
        handlers = Handlers(client, Ledger(world.dsn), lambda _: None)
        mux = handlers.register(Mux(), max_attempts=25, backoff=0.05)
        for then in ("reschedule", "raise") * 10:
            world.enqueue_many("transactional", 1, then=then, until=2)
        with working(world, client, mux) as worker:
            world.done()
            for event in ("rescheduled", "retried"):
                world.witness(worker, event)
        assert world.answer(client.dlq.list()) == []


# -- 22: a pool of size 1 whose handlers use the same pool -----------------------------------


@pytest.mark.both_colours
@both_types
@both_workers
def test_handlers_may_use_the_only_connection_of_the_pool_that_their_worker_was_made_from(
    world: World, type: Type, is_async: bool
) -> None:
    with pooled(world, world.dsn, is_async=is_async, max_size=1) as (client, pool):

        def plain(job: Job, conn: Any = None) -> None:
            client.enqueue(EnqueueRequest("q", "plain", id=f"{job.id}/0"))
            with pool.connection() as own:
                (conn or own).execute(LEDGER_ROW, [job.id, job.attempt, type])

        async def coroutine(job: Job, conn: Any = None) -> None:
            await client.enqueue(EnqueueRequest("q", "plain", id=f"{job.id}/0"))  # type: ignore[misc]
            async with pool.connection() as own:
                await (conn or own).execute(LEDGER_ROW, [job.id, job.attempt, type])

        def child(job: Job) -> None:
            with psycopg.connect(world.dsn) as own:
                own.execute(LEDGER_ROW, [job.id, job.attempt, "plain"])

        mux = Mux().register("plain", child)
        handler: Any = coroutine if is_async else plain
        if type == "plain":
            mux.register("parent", handler)
        else:
            mux.register("parent", handler, transactional=True)
        with working(world, client, mux) as worker:
            ids = [f"parent {n}" for n in range(20)]
            for id in ids:
                world.answer(client.enqueue(EnqueueRequest("q", "parent", id=id)))
            world.acknowledge(*ids, type=type)
            world.acknowledge(*[f"{id}/0" for id in ids])
            world.done()
            for id in ids:
                world.witness(worker, "completed", id)
            assert not worker.of("error", "retried", "dead", "lost")


# -- 23: the schema, and the privileges of the role --------------------------------------------


STATEMENTS = [
    f"{statement};"
    for statement in re.sub("(?m)^ *--.*$", "", init_sql()).split(";")
    if statement.strip()
]


def refused(world: World, *, is_async: bool, dsn: str | None = None) -> str:
    """Return the error of a worker that does not start."""
    local = world.make(world.mux(is_async=is_async), is_async=is_async, dsn=dsn)
    with pytest.raises(SchemaError) as caught:
        world.answer(local.worker.run())
    local.shutdown()
    return str(caught.value)


def starts(world: World, id: str, *, is_async: bool, dsn: str | None = None) -> Local:
    """Show that a worker starts now, and works."""
    local = world.worker(world.mux(is_async=is_async), is_async=is_async, dsn=dsn)
    with psycopg.connect(dsn or world.dsn) as conn:
        world.enqueue("plain", id, conn=conn)
    world.acknowledge(id)
    local.wait_for("completed", id)
    return local


@both_workers
def test_a_worker_without_its_tables_names_them_and_the_remedy(
    world: World, is_async: bool
) -> None:
    world.query(
        "drop table bgjob_job, bgjob_dead_job, bgjob_exclusive, bgjob_pause, bgjob_schedule, "
        "bgjob_worker, bgjob_minute, bgjob_history, bgjob_result, bgjob_limit, bgjob_ration"
    )
    error = refused(world, is_async=is_async)
    for word in ("bgjob_job", "bgjob_dead_job", "apply", "migration/init.sql", "search_path"):
        world.saw(f"{word!r} in: {error}", word in error)
    world.query(init_sql())
    starts(world, "a", is_async=is_async)


@both_workers
@pytest.mark.parametrize(
    ("comment", "remedy"),
    [
        ("'bgjob schema 0'", "upgrade the schema"),
        ("'bgjob schema 99'", "upgrade the bgjob package"),
        ("'our jobs'", "apply migration/init.sql"),
        ("null", "apply migration/init.sql"),
    ],
    ids=["older", "newer", "foreign", "none"],
)
def test_a_worker_whose_schema_is_of_another_version_names_the_table_and_the_remedy(
    world: World, is_async: bool, comment: str, remedy: str
) -> None:
    world.query(f"comment on table bgjob_job is {comment}")
    error = refused(world, is_async=is_async)
    for word in ("bgjob_job", remedy):
        world.saw(f"{word!r} in: {error}", word in error)
    world.query(STATEMENTS[-1])
    starts(world, "a", is_async=is_async)


@both_workers
def test_a_worker_whose_schema_is_half_applied_names_the_table_and_the_remedy(
    world: World, is_async: bool
) -> None:
    assert len(STATEMENTS) >= 5
    for applied in range(len(STATEMENTS)):
        schema = f"half_{applied}"
        world.query(f"create schema {schema}")
        dsn = make_conninfo(world.dsn, options=f"-c search_path={schema}")
        with psycopg.connect(dsn, autocommit=True) as conn:
            for statement in STATEMENTS[:applied]:
                conn.execute(statement.encode())
            error = refused(world, is_async=is_async, dsn=dsn)
            for word in ("bgjob_job", "migration/init.sql"):
                world.saw(f"{word!r} in: {error}", word in error)
            for statement in STATEMENTS[applied:]:
                conn.execute(statement.encode())
        local = world.worker(world.mux(is_async=is_async), is_async=is_async, dsn=dsn)
        local.shutdown()


@both_workers
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("drop table bgjob_dead_job", "bgjob_dead_job"),
        ("drop table bgjob_exclusive", "bgjob_exclusive"),
        ("drop table bgjob_pause", "bgjob_pause"),
        ("drop table bgjob_limit", "bgjob_limit"),
        ("alter table bgjob_dead_job drop column last_error", "last_error"),
        ("alter table bgjob_job drop column deaths", "deaths"),
    ],
)
def test_a_worker_whose_schema_has_lost_a_part_names_it_and_the_remedy(
    world: World, is_async: bool, damage: str, named: str
) -> None:
    world.query(damage)
    error = refused(world, is_async=is_async)
    for word in (named, "migration/init.sql"):
        world.saw(f"{word!r} in: {error}", word in error)
    world.query(
        "drop table bgjob_job; drop table if exists bgjob_dead_job, bgjob_exclusive, "
        "bgjob_pause, bgjob_schedule, bgjob_worker, bgjob_minute, bgjob_history, bgjob_result, "
        "bgjob_limit, bgjob_ration;"
    )
    world.query(init_sql())
    starts(world, "a", is_async=is_async)


GRANTS = [
    ("bgjob_job", "select"),
    ("bgjob_job", "insert"),
    ("bgjob_job", "update"),
    ("bgjob_job", "delete"),
    ("bgjob_exclusive", "select"),
    ("bgjob_exclusive", "insert"),
    ("bgjob_exclusive", "update"),
    ("bgjob_exclusive", "delete"),
    ("bgjob_dead_job", "insert"),
    ("bgjob_dead_job", "select"),
    ("bgjob_pause", "select"),
]
"""And those of limits and results, which `test_security.py` takes away one by one."""


@pytest.fixture
def role(world: World) -> Iterator[str]:
    """A role with no privileges in the world's database; roles are the whole server's."""
    name = f"role_{world.value('select current_database()')}"
    world.query(f"create role {name} login")
    # It has nothing that everybody has by default.
    world.query("revoke all on schema public from public")
    yield name
    world.query(f"drop owned by {name}; drop role {name}")


@both_workers
@pytest.mark.parametrize(("table", "privilege"), GRANTS)
def test_a_worker_whose_role_lacks_a_privilege_names_the_grant_and_the_remedy(
    world: World, role: str, is_async: bool, table: str, privilege: str
) -> None:
    dsn = make_conninfo(world.dsn, user=role)
    world.query(f"grant usage on schema public to {role}")
    others = "bgjob_limit, bgjob_ration, bgjob_result"
    world.query(f"grant select, insert, update, delete on {others} to {role}")
    for other in GRANTS:
        if other != (table, privilege):
            world.query(f"grant {other[1]} on {other[0]} to {role}")
    error = refused(world, is_async=is_async, dsn=dsn)
    for word in (table, privilege, role, "grant "):
        world.saw(f"{word!r} in: {error}", word in error)
    # The remedy that it names is one.
    [remedy] = re.findall(r"grant .*", error)
    world.query(remedy)
    # These are all that a worker needs, and its job ends in each way.
    outcomes = {"complete": "completed", "retry": "retried", "dlq": "dead"}
    handlers = Handlers(world.client, Ledger(world.dsn), lambda _: None)
    mux = handlers.register(Mux(), max_attempts=25, backoff=0.05)
    worker = world.worker(mux, dsn=dsn)
    for then in outcomes:
        world.enqueue("plain", then, then=then, until=2)
    world.done()
    for then, event in outcomes.items():
        worker.wait_for(event, then)
    # Only its row in the list of workers it may not write.
    [(_, error)] = worker.of("error")
    assert "does not list this worker" in error
    assert "bgjob_worker" in error


@both_workers
def test_a_worker_whose_role_may_not_use_the_schema_names_the_tables_and_the_remedy(
    world: World, role: str, is_async: bool
) -> None:
    error = refused(world, is_async=is_async, dsn=make_conninfo(world.dsn, user=role))
    for word in ("bgjob_job", "bgjob_dead_job", "search_path", "grant"):
        world.saw(f"{word!r} in: {error}", word in error)
