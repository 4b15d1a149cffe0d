"""Faults 16, 17 and 31: networks that go silent, connections cut at a commit, hosts that vanish."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import clients
from support.meetings import asked, meeting
from support.waiting import PATIENCE, eventually

import bgjob._postgres.connection
import bgjob._postgres.messages
import bgjob._running.transaction
import bgjob._shared
import bgjob.client
from bgjob import (
    AsyncClient,
    Client,
    Complete,
    EnqueueRequest,
    JobAlreadyExistsError,
    Result,
    Retry,
)
from bgjob._engine.engine import Engine
from bgjob._sql.notices import LOCK_CLASS
from bgjob._sql.settlements import Claimed
from faults.proxy import Proxy
from faults.world import Process, World

Colour = Literal["thread", "async"]

both_colours = pytest.mark.parametrize("colour", ["thread", "async"])
both_clients = pytest.mark.parametrize("is_async", [False, True], ids=["Client", "AsyncClient"])
both_moments = pytest.mark.parametrize("moment", ["before", "after"])

LONG = 30.0
"""A lease that no pause of the tests outlives: what runs again was not owed to its end."""

RECOVERY = 15.0
"""Seconds that are promised from the return of a network that was silent."""


# The proxies are requested before the world, and outlive its workers.


# -- 16: a network that goes silent -----------------------------------------------------------


class BusyWorkers:
    """Workers of both colours, one busy and one idle of each, through one proxy."""

    def __init__(self, world: World, proxy: Proxy, name: str) -> None:
        self._world = world
        self._name = name
        dsn = proxy.dsn(world.dsn)
        self.workers: dict[str, Process] = {}
        for colour in ("thread", "async"):
            for what in ("idle", "busy"):
                queue = f"{name} {what} {colour}"
                self.workers[queue] = world.start(dsn=dsn, queue=queue, colour=colour)
        for queue, worker in self.workers.items():
            if "busy" in queue:
                # In every slot a handler is at its end.
                for type in ("plain", "transactional"):
                    ids = [f"{queue} {type} {n}" for n in range(2)]
                    world.enqueue(type, *ids, queue=queue, hold="gate")
                worker.wait_for("effect", times=4)
            else:
                worker.wait_for("empty")

    def finish(self) -> None:
        """Release the handlers."""
        self._world.release("gate", 1, 2, 3, 4, 5)

    def recover(self, back: float) -> float:
        """Enqueue a job for each, and return the longest time from `back` to a job's start."""
        waits = {queue: len(worker.of("started")) for queue, worker in self.workers.items()}
        for queue in self.workers:
            self._world.enqueue("plain", f"{queue}: last", queue=queue)
        took = 0.0
        while waits:
            for queue, before in list(waits.items()):
                if len(self.workers[queue].of("started")) > before:
                    took = time.monotonic() - back
                    del waits[queue]
            assert time.monotonic() < back + PATIENCE, (waits, self.workers)
            time.sleep(0.02)
        print(f"{self._name}: working again after {took:.2f} s")
        return took


def test_workers_go_on_when_the_network_returns_and_resets_their_connections(
    proxy: Proxy, world: World
) -> None:
    busy = BusyWorkers(world, proxy, "reset")
    proxy.silence()
    busy.finish()
    time.sleep(2.0)
    proxy.forward(old="reset")
    assert busy.recover(time.monotonic()) <= RECOVERY
    world.done()
    for queue, worker in busy.workers.items():
        world.witness(worker, "error")
        world.witness(worker, "completed", f"{queue}: last")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("silent", [1.0, pytest.param(25.0, marks=pytest.mark.soak)])
def test_workers_give_up_connections_that_a_silent_network_does_not_give_back(
    proxy: Proxy, other_proxy: Proxy, world: World, silent: float
) -> None:
    # Some wait for an answer to what they asked, and some for one to their attempt to connect.
    asking = BusyWorkers(world, proxy, "asking")
    connecting = BusyWorkers(world, other_proxy, "connecting")
    other_proxy.cut()
    for worker in connecting.workers.values():
        worker.wait_for("error")
    other_proxy.silence()
    proxy.silence()
    asking.finish()
    time.sleep(silent + 1.0)  # each has tried to connect: that is once a second
    proxy.forward(old="dead")
    other_proxy.forward(old="dead")
    back = time.monotonic()
    assert asking.recover(back) <= RECOVERY
    assert connecting.recover(back) <= RECOVERY
    world.done()
    for worker in asking.workers.values():
        world.witness(worker, "error", "no answer from the server")
    for worker in connecting.workers.values():
        world.witness(worker, "error", "timeout expired")
    for queue, worker in (asking.workers | connecting.workers).items():
        world.witness(worker, "completed", f"{queue}: last")


@both_colours
@pytest.mark.parametrize("old", ["reset", "dead"])
def test_statements_of_handlers_end_with_the_connection_that_a_silent_network_has_lost(
    proxy: Proxy, world: World, colour: Colour, old: Literal["reset", "dead"]
) -> None:
    with psycopg.connect(world.dsn) as conn:
        # In every slot a handler waits for the answer to its own statement.
        conn.execute("lock table ledger in exclusive mode")
        ids = [f"waits {n}" for n in range(4)]
        world.enqueue("transactional", *ids)
        worker = world.start(colour=colour, dsn=proxy.dsn(world.dsn))
        waits = (
            "select count(*) from pg_stat_activity where datname = current_database() "
            "and pid <> pg_backend_pid() and query ~ 'into ledger' and state = %s"
        )
        assert eventually(lambda: world.value(waits, ["active"]) == 4)
        proxy.silence()
        conn.rollback()
        assert eventually(lambda: world.value(waits, ["idle in transaction"]) == 4)
    proxy.forward(old=old)
    back = time.monotonic()
    world.enqueue("plain", "last")
    worker.wait_for("completed", "last")
    print(f"working again after {time.monotonic() - back:.2f} s")
    assert time.monotonic() <= back + RECOVERY
    world.done()
    for id in ids:
        world.witness(worker, "completed", id)


@both_colours
def test_idle_sessions_that_a_silent_network_has_lost_hold_up_no_transaction(
    proxy: Proxy, world: World, colour: Colour
) -> None:
    dsn = make_conninfo(proxy.dsn(world.dsn), connect_timeout=2)
    worker = world.start(colour=colour, dsn=dsn, concurrency=3)
    before = world.enqueue("transactional", "a", "b", "c", hold="gate")
    worker.wait_for("effect", times=3)
    world.release("gate", 1)
    world.done(*before)
    worker.wait_for("completed", times=3)
    proxy.silence()
    world.witness(worker, "error", "no answer from the server")
    proxy.forward(old="dead")
    after = world.enqueue("transactional", "d", "e", "f")
    world.done(*after)
    assert proxy.lost_messages == 0


@both_clients
def test_an_idle_connection_is_not_used_again_after_a_worker_of_the_process_had_no_answer(
    proxy: Proxy, world: World, is_async: bool
) -> None:
    dsn = make_conninfo(proxy.dsn(world.dsn), connect_timeout=2)
    client: Any = AsyncClient(dsn) if is_async else Client(dsn)
    with ExitStack() as stack:
        stack.callback(lambda: world.answer(client.close()))
        worker = world.worker(world.mux(), dsn=dsn)
        world.answer(client.enqueue(EnqueueRequest("q", "plain", id="before")))
        world.acknowledge("before")
        world.done("before")
        proxy.silence()
        world.witness(worker, "error", "no answer from the server")
        proxy.forward(old="dead")
        world.answer(client.enqueue(EnqueueRequest("q", "plain", id="after")))
        world.acknowledge("after")
        assert proxy.lost_messages == 0
        world.done("after")


@pytest.mark.parametrize(
    ("patience", "connect_timeout"),
    [
        (6.0, 2),
        # The defaults, which are too long for every run.
        pytest.param(30.0, 10, marks=[pytest.mark.soak, pytest.mark.timeout(150)]),
    ],
)
def test_a_producer_gets_an_error_while_the_network_is_silent_and_works_again_afterwards(
    proxy: Proxy,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    patience: float,
    connect_timeout: int,
) -> None:
    for module, name, value in [
        (bgjob.client, "PATIENCE", patience),
        (bgjob._postgres.pool.PooledConnection, "patience", patience),
        (bgjob._postgres.pool.AsyncPooledConnection, "patience", patience),
    ]:
        assert value <= getattr(module, name)
        monkeypatch.setattr(module, name, value)
    assert connect_timeout <= bgjob._postgres.connection._DEFAULTS["connect_timeout"]
    monkeypatch.setitem(bgjob._postgres.connection._DEFAULTS, "connect_timeout", connect_timeout)
    dsn = proxy.dsn(world.dsn)
    clients: dict[str, Client | AsyncClient] = {}
    calls: dict[str, Callable[[], Any]] = {}
    stack = ExitStack()

    def job(name: str) -> EnqueueRequest:
        return EnqueueRequest("q", "plain", id=name)

    def add(name: str, client: Any) -> None:
        clients[name] = client
        stack.callback(lambda: world.answer(client.close()))
        calls[name] = {
            "enqueue": lambda: client.enqueue(job(name)),
            "bulk": lambda: client.bulk_enqueue([job(name)]),
            "list": lambda: client.dlq.list(),
        }[name.split()[0]]

    with stack:
        for method in ("enqueue", "bulk", "list"):
            for place in ("open", "new"):
                add(f"{method} {place}", Client(dsn))
                add(f"{method} {place} async", AsyncClient(dsn))
        for name, client in clients.items():
            if "open" in name:
                world.answer(client.enqueue(job(f"{name}: first")))
                world.acknowledge(f"{name}: first")

        failures: dict[str, BaseException | None] = dict.fromkeys(calls)

        def call(name: str) -> None:
            try:
                world.answer(calls[name]())
            except BaseException as error:
                failures[name] = error

        threads = [threading.Thread(target=call, args=[name]) for name in calls]
        proxy.silence()
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, began + patience + PATIENCE - time.monotonic()))
        hanging = [thread for thread in threads if thread.is_alive()]
        proxy.forward(old="dead")
        assert not hanging
        for name, failure in failures.items():
            assert isinstance(failure, psycopg.OperationalError), (name, failure)
            world.saw(f"{name}: {failure}")
        for name in calls:
            world.answer(calls[name]())
            if "list" not in name:
                world.acknowledge(name)
    assert world.live() == len(world.jobs)


# -- 17: the connection cut after COMMIT was sent and before its answer came ----------------


def trap(proxy: Proxy, moment: str, *sql: str) -> threading.Event:
    return (proxy.cut_after_commit if moment == "after" else proxy.cut_before_commit)(*sql)


@pytest.mark.every_combination
@both_clients
@both_moments
@pytest.mark.parametrize("how", ["enqueue", "bulk_enqueue", "transaction"])
@pytest.mark.parametrize("is_done", [False, True], ids=["live meanwhile", "done meanwhile"])
def test_an_enqueue_with_an_id_whose_answer_was_lost_can_be_repeated_while_its_job_is_live(
    proxy: Proxy, world: World, is_async: bool, moment: str, how: str, is_done: bool
) -> None:
    dsn = proxy.dsn(world.dsn)
    client: Any = AsyncClient(dsn) if is_async else Client(dsn)
    request = EnqueueRequest("q", "plain", id="a")

    async def enqueue_in_a_transaction() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            await client.enqueue(request, conn=conn)

    def enqueue() -> Any:
        if how == "bulk_enqueue":
            return world.answer(client.bulk_enqueue([request]))
        if how == "enqueue":
            return world.answer(client.enqueue(request))
        if is_async:
            return world.run(enqueue_in_a_transaction())
        with psycopg.connect(dsn) as conn:
            return client.enqueue(request, conn=conn)

    with ExitStack() as stack:
        stack.callback(lambda: world.answer(client.close()))
        cut = trap(proxy, moment, "insert into bgjob_job")
        with pytest.raises(psycopg.OperationalError) as lost:
            enqueue()
        assert cut.wait(PATIENCE)
        world.saw(str(lost.value))
        assert world.live("a") == (moment == "after")
        if is_done:
            world.start()
        if moment == "after" and is_done:
            # An id is free once its job is done: the repetition is another job.
            assert eventually(lambda: world.live("a") == 0)
            assert world.rows("a") == 1
            enqueue()
            world.acknowledge("a")
        elif moment == "after":
            world.acknowledge("a")
            with pytest.raises(JobAlreadyExistsError) as taken:
                enqueue()
            assert taken.value.ids == ("a",)
            again = world.answer(client.bulk_enqueue([request], on_conflict="skip"))
            assert again == [None]
        else:
            enqueue()
            world.acknowledge("a")
        if not is_done:
            assert world.live("a") == 1
            world.start()
    world.done()
    assert world.rows("a") == (2 if moment == "after" and is_done else 1)


@both_clients
@both_moments
def test_each_enqueue_of_a_shared_insert_whose_answer_was_lost_gets_an_error(
    proxy: Proxy, world: World, monkeypatch: pytest.MonkeyPatch, is_async: bool, moment: str
) -> None:
    monkeypatch.setattr(bgjob._shared, "_SLOW", PATIENCE)
    colour = clients.Colour(proxy.dsn(world.dsn), is_async=is_async)
    requests = [EnqueueRequest("q", "plain", {"n": n}) for n in range(5)]
    with ExitStack() as stack, psycopg.connect(world.dsn, autocommit=True) as conn:
        stack.callback(colour.close)
        client = colour.client()
        cut = trap(proxy, moment, "from unnest(")
        first, *errors = meeting(colour, conn, client, [asked(client, r) for r in requests])
        assert cut.wait(PATIENCE)
        world.acknowledge(first)
        assert [type(error) for error in errors] == [psycopg.OperationalError] * 5
        world.saw(str(errors[0]))
        assert world.live(*[r.id for r in requests]) == (5 if moment == "after" else 0)
        again = client.bulk_enqueue(requests, on_conflict="skip")
        assert again == ([None] * 5 if moment == "after" else [r.id for r in requests])
        world.acknowledge(*[r.id for r in requests])
    world.start()
    world.start(queue="first")
    world.done()


def told(worker: Process, id: str) -> list[tuple[str, int]]:
    """What a worker told of the ends of a job's runs, and of which attempt."""
    names = ("completed", "retried", "rescheduled", "dead", "lost")
    return [(event[0], event[2]) for event in worker.of(*names) if event[1] == id]


@pytest.mark.every_combination
@both_colours
@both_moments
@pytest.mark.parametrize("then", ["complete", "retry", "reschedule", "dlq"])
def test_a_settlement_whose_answer_was_lost_is_made_once_and_reported_once(
    proxy: Proxy, world: World, colour: Colour, moment: str, then: str
) -> None:
    world.enqueue("plain", "a", hold="gate", then=then, until=2)
    worker = world.start(colour=colour, dsn=proxy.dsn(world.dsn), lease=LONG)
    worker.wait_for("effect", "a")
    sql = {
        "complete": "delete from bgjob_job",
        "retry": "p.refund",
        "reschedule": "p.refund",
        "dlq": "insert into bgjob_dead_job",
    }
    cut = trap(proxy, moment, sql[then])
    world.release("gate", 1, 2)
    assert cut.wait(PATIENCE)
    world.done()
    world.witness(worker, "dead" if then == "dlq" else "completed", "a")
    world.witness(worker, "error")
    outcomes = {
        "complete": [("completed", 1)],
        "retry": [("retried", 1), ("completed", 2)],
        "reschedule": [("rescheduled", 1), ("completed", 1)],
        "dlq": [("dead", 1)],
    }
    # The next run may end before the look that tells what became of the first.
    assert sorted(told(worker, "a")) == sorted(outcomes[then])
    # No handler ran again for it.
    runs = world.rows("a", "plain") + world.rows("a", "rescheduled")
    assert runs == len(outcomes[then])
    assert world.value("select count(*) from bgjob_dead_job") == (then == "dlq")


@both_colours
@both_moments
def test_a_claim_whose_answer_was_lost_is_undone_at_once_and_charges_no_attempt(
    proxy: Proxy, world: World, colour: Colour, moment: str
) -> None:
    world.enqueue("plain", "busy", hold="gate")
    # It has no slot to claim for until the gate opens, and then settles and claims immediately.
    worker = world.start(colour=colour, dsn=proxy.dsn(world.dsn), concurrency=1, lease=LONG)
    worker.wait_for("effect", "busy")
    world.enqueue("plain", "a", hold="door")
    cut = trap(proxy, moment, "delete from bgjob_job", "for update skip locked")
    world.release("gate", 1)
    assert cut.wait(PATIENCE)
    began = time.monotonic()
    worker.wait_for("effect", "a")
    took = time.monotonic() - began
    print(f"run {took:.2f} s after its claim was lost")
    assert took <= LONG / 3
    assert world.query("select attempt, deaths from bgjob_job where id = 'a'") == [(1, 0)]
    world.release("door", 1)
    world.done()
    world.witness(worker, "completed", "busy")
    world.witness(worker, "completed", "a")
    world.witness(worker, "error")
    assert told(worker, "a") == [("completed", 1)]
    assert told(worker, "busy") == [("completed", 1)]
    assert world.rows("a", "plain") == world.rows("busy", "plain") == 1


@pytest.mark.every_combination
@both_colours
@both_moments
@pytest.mark.parametrize("then", ["complete", "reschedule", "dlq"])
def test_a_transaction_whose_commit_or_its_answer_was_lost_has_one_effect_and_is_reported_once(
    proxy: Proxy, world: World, colour: Colour, moment: str, then: str
) -> None:
    world.enqueue("transactional", "a", hold="gate", then=then)
    worker = world.start(colour=colour, dsn=proxy.dsn(world.dsn), lease=LONG)
    worker.wait_for("effect", "a")
    cut = trap(proxy, moment, "insert into ledger")
    world.release("gate", 1, 2)
    assert cut.wait(PATIENCE)
    world.done()
    world.witness(worker, "dead" if then == "dlq" else "completed", "a")
    heard = told(worker, "a")
    if moment == "before":
        # It was rolled back, and runs again from the start.
        assert heard.pop(0) == ("retried", 1)
    n = 1 if moment == "after" else 2
    outcomes = {
        "complete": [("completed", n)],
        "reschedule": [("rescheduled", n), ("completed", n)],
        "dlq": [("dead", n)],
    }
    assert heard == outcomes[then]
    assert world.rows("a", "transactional") == 1


@pytest.mark.both_colours
@pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
def test_a_job_whose_commit_alone_has_no_answer_runs_again_without_the_locks_of_that_session(
    proxy: Proxy, world: World, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    # A thread waits within libpq, which has no limit: the control thread counts the seconds.
    for module in (bgjob._postgres.messages, bgjob._running.transaction):
        monkeypatch.setattr(module, "WORKER_PATIENCE", 1.0)
    # The second attempt waits for what the first has written and not ended.
    world.query("create unique index on ledger (job_id)")
    world.enqueue("transactional", "a")
    lost = proxy.abandon_before_commit("insert into ledger")
    dsn = proxy.dsn(world.dsn)
    worker = world.worker(world.mux(is_async=is_async), dsn=dsn, is_async=is_async, lease=LONG)
    assert lost.wait(PATIENCE)
    world.witness(worker, "retried", "a")
    world.witness(worker, "completed", "a")
    assert world.rows("a", "transactional") == 1


@pytest.mark.both_colours
@pytest.mark.parametrize("is_async", [False, True], ids=["Client", "AsyncClient"])
def test_a_single_job_whose_commit_has_no_answer_leaves_no_locks_for_its_next_run(
    proxy: Proxy, world: World, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    monkeypatch.setattr(bgjob._running.transaction, "WORKER_PATIENCE", 1.0)
    world.query("create unique index on ledger (job_id)")
    world.enqueue("transactional", "a")
    lost = proxy.abandon_before_commit("insert into ledger")
    dsn, mux = proxy.dsn(world.dsn), world.mux(is_async=is_async, backoff=0.001)

    async def do_async() -> Result:
        async with AsyncClient(dsn) as client:
            return await client.do("q", mux)

    def do() -> Result:
        if is_async:
            return asyncio.run(do_async())
        with Client(dsn) as client:
            return client.do("q", mux)

    assert isinstance(do(), Retry)
    world.saw("a commit was lost", lost.is_set())
    assert eventually(lambda: world.value("select next_run_at <= now() from bgjob_job"))
    assert do() == Complete({"attempt": 2})
    assert world.rows("a", "transactional") == 1


@pytest.mark.both_colours
@pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
def test_a_commit_that_goes_on_without_an_answer_is_not_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    for module in (bgjob._postgres.messages, bgjob._running.transaction):
        monkeypatch.setattr(module, "WORKER_PATIENCE", 1.0)
    sever, severed = Engine.sever, threading.Event()

    def observed(engine: Engine, claimed: Claimed) -> None:
        sever(engine, claimed)
        severed.set()

    monkeypatch.setattr(Engine, "sever", observed)
    # As one that waits for a synchronous standby.
    world.query(
        "create function linger() returns trigger language plpgsql as "
        "'begin perform pg_advisory_xact_lock(7); return null; end'"
    )
    world.query(
        "create constraint trigger linger after insert on ledger "
        "deferrable initially deferred for each row when (new.kind = 'transactional') "
        "execute function linger()"
    )
    with psycopg.connect(world.dsn, autocommit=True) as standby:
        standby.execute("select pg_advisory_lock(7)")
        world.enqueue("transactional", "a")
        worker = world.worker(world.mux(is_async=is_async), is_async=is_async, lease=LONG)
        world.saw("the connection was given up", severed.wait(PATIENCE))
        # The end of a session would be sent before the claim of another job.
        world.enqueue("plain", "b")
        world.witness(worker, "completed", "b")
    world.witness(worker, "completed", "a")
    ends = [event[0] for event in worker.of("retried", "lost", "completed") if event[1] == "a"]
    assert ends == ["completed"]
    assert world.rows("a", "transactional") == 1


def test_a_thread_whose_commit_has_no_answer_does_not_outlive_its_worker(
    proxy: Proxy, world: World
) -> None:
    world.enqueue("transactional", "a")
    lost = proxy.abandon_before_commit("insert into ledger")
    worker = world.worker(world.mux(), dsn=proxy.dsn(world.dsn), lease=3.0)
    assert lost.wait(PATIENCE)
    assert not worker.shutdown(0.1)
    assert eventually(
        lambda: not any(each.name.startswith("bgjob-q-") for each in threading.enumerate()), 5.0
    )
    world.witness(world.worker(world.mux(), lease=3.0), "completed", "a")
    assert world.rows("a", "transactional") == 1


@both_colours
@both_moments
def test_a_batch_whose_commit_or_its_answer_was_lost_has_one_effect_and_is_reported_once(
    proxy: Proxy, world: World, colour: Colour, moment: str
) -> None:
    ids = ["a", "b", "c"]
    world.enqueue("transactional", *ids, hold="gate")
    worker = world.start(colour=colour, dsn=proxy.dsn(world.dsn), lease=LONG, batch=len(ids))
    worker.wait_for("effect", "a")
    cut = trap(proxy, moment, "insert into ledger")
    world.release("gate", 1, 2)
    assert cut.wait(PATIENCE)
    world.done()
    for id_ in ids:
        world.witness(worker, "completed", id_)
        first = [] if moment == "after" else [("retried", 1)]
        assert told(worker, id_) == [*first, ("completed", len(first) + 1)]
        assert world.rows(id_, "transactional") == 1


# -- 31: a worker's host vanishes, and its sessions stay half open ----------------------------


LEFT = 2.0
"""Seconds after which the server ends a transaction that its worker leaves open; by default 10 s
after a handler, and 20 s of a worker's own since version 17. A keepalive ends any within a minute."""

VANISHED = 5.0
"""Seconds that a busy host may add."""

OPEN = (
    "select count(*) from pg_stat_activity where datname = current_database() "
    "and pid <> pg_backend_pid() and xact_start is not null"
)
LOCK = (
    f"select pid from pg_locks where locktype = 'advisory' and granted and classid = {LOCK_CLASS} "
    "and database = (select oid from pg_database where datname = current_database())"
)


@both_colours
@pytest.mark.parametrize("type", ["transactional", "plain"])
def test_31_a_settlement_of_which_half_was_sent_locks_its_rows_for_seconds(
    proxy: Proxy, world: World, colour: Colour, type: str
) -> None:
    # Before version 17 no timeout ends such a transaction, only the keepalive.
    waits_for_keepalive = int(world.value("show server_version_num")) < 17_00_00
    # The next attempt waits until the first one's transaction is over.
    world.query("create unique index on ledger (job_id) where kind = 'transactional'")
    world.enqueue(type, "a", hold="gate")
    first = world.start(colour=colour, dsn=proxy.dsn(world.dsn), server_patience=LEFT)
    first.wait_for("effect", "a")
    second = world.start(colour=colour)
    sql = "insert into ledger" if type == "transactional" else "delete from bgjob_job"
    abandoned = proxy.abandon_before_commit(sql)
    world.release("gate", *range(1, 20))
    assert abandoned.wait(PATIENCE)
    proxy.abandon()
    first.kill()
    killed = time.monotonic()
    world.saw("the server believes that the worker is alive", world.value(OPEN))
    world.enqueue("plain", "neighbour")
    second.wait_for("completed", "neighbour")
    assert time.monotonic() - killed < world.poll_interval + VANISHED
    if waits_for_keepalive:
        world.end_sessions()
    world.witness(second, "completed", "a")
    took = time.monotonic() - killed
    print(f"completed elsewhere after {took:.2f} s")
    assert took < LEFT + world.lease + world.poll_interval + VANISHED
    if type == "transactional":
        assert world.rows("a", type) == 1
    world.end_sessions()


@both_colours
def test_31_the_notify_lock_of_a_host_that_vanished_makes_no_worker_deaf(
    proxy: Proxy, world: World, colour: Colour
) -> None:
    first = world.start(colour=colour, dsn=proxy.dsn(world.dsn), poll_interval=30.0)
    assert eventually(lambda: world.query(LOCK))
    held = set(world.query(LOCK))
    proxy.abandon()
    first.kill()
    second = world.start(colour=colour, poll_interval=30.0)
    second.wait_for("empty")
    world.saw("the server believes that the worker is alive", held <= set(world.query(LOCK)))
    took = []
    for n in range(3):
        world.enqueue("plain", f"{n}")
        began = time.monotonic()
        second.wait_for("started", f"{n}")
        took.append(time.monotonic() - began)
        second.wait_for("completed", f"{n}")
    print(f"picked up after {max(took):.3f} s")
    assert max(took) < 2.0
    assert held <= set(world.query(LOCK))
    world.end_sessions()
