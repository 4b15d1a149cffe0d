"""Fault 62: jobs are cancelled while their workers are killed, stopped, cut off, or about to settle.

After a cancel has committed, the attempt that it ends changes nothing in the queue, and nothing
through its transaction. The canceller was told which way it went.
"""

from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Literal

import psycopg
import pytest
from support.waiting import PATIENCE, eventually

from bgjob import Client
from bgjob._sql import steering
from bgjob._sql.execute import run
from bgjob._sql.jobs import JobFilter
from bgjob.jobs import JobChanges
from faults.proxy import Proxy
from faults.world import World

Colour = Literal["thread", "async"]
Type = Literal["plain", "transactional"]

both_types = pytest.mark.parametrize("type", ["plain", "transactional"])
both_colours = pytest.mark.parametrize("colour", ["thread", "async"])

NEVER = 3600.0


def dead(world: World) -> list[tuple[str, str]]:
    return world.query("select job_id, last_error from bgjob_dead_job order by id")


@both_types
@pytest.mark.parametrize("first", ["cancel", "kill"])
def test_a_cancelled_job_whose_worker_is_killed_stays_dead_and_its_key_is_free(
    world: World, type: Type, first: str
) -> None:
    world.enqueue(type, "a", exclusive="k", hold="gate")
    victim = world.start()
    victim.wait_for("effect", "a")
    world.enqueue("plain", "b", exclusive="k")
    if first == "kill":
        victim.kill()
    assert world.client.jobs.cancel("a", by="me") == JobChanges((), ("a",))
    if first == "cancel":
        victim.kill()
    world.start()
    world.done("b")  # by the other one, unless the first was quicker
    world.saw("the cancelled job is dead", dead(world) == [("a", "cancelled by me")])
    assert world.rows("a") == (type == "plain")
    world.release("gate", 1)
    assert world.client.dlq.requeue("a") == ["a"]  # as if it had never run
    world.done()
    assert world.rows("a", type) == (2 if type == "plain" else 1)


@both_types
def test_a_worker_that_slept_through_a_cancel_and_a_requeue_changes_nothing(
    world: World, type: Type
) -> None:
    world.enqueue(type, "a", hold="gate")
    sleeper = world.start()
    sleeper.wait_for("effect", "a")
    sleeper.stop()
    assert world.client.jobs.cancel("a", by="me").running == ("a",)
    assert world.client.dlq.requeue("a") == ["a"]
    other = world.start()
    other.wait_for("effect", "a")
    holder = world.query("select token, attempt from bgjob_job where id = 'a'")
    sleeper.cont()
    world.witness(sleeper, "cancelled", "a")
    world.enqueue("plain", "b")  # it works on
    world.done("b")
    assert world.query("select token, attempt from bgjob_job where id = 'a'") == holder
    world.release("gate", 1)
    world.done()
    assert world.rows("a", type) == (2 if type == "plain" else 1)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_cancel_whose_answer_was_lost_can_be_repeated(
    proxy: Proxy, world: World, moment: str
) -> None:
    world.enqueue("plain", "a", hold="gate")
    worker = world.start(lease=1.5)
    worker.wait_for("effect", "a")
    with Client(proxy.dsn(world.dsn)) as client:
        cut = (proxy.cut_after_commit if moment == "after" else proxy.cut_before_commit)(
            "insert into bgjob_dead_job"
        )
        with pytest.raises(psycopg.OperationalError) as lost:
            client.jobs.cancel("a", by="me")
        assert cut.wait(PATIENCE)
        world.saw(str(lost.value))
        again = client.jobs.cancel("a", by="me")
    if moment == "after":
        assert again == JobChanges((), (), {"a": "dead"})
    else:
        assert again == JobChanges((), ("a",))
    # Where the notification was lost with the answer, the next extension finds it.
    world.witness(worker, "cancelled", "a")
    assert dead(world) == [("a", "cancelled by me")]
    world.release("gate", 1)


WAIT_AT_COMMIT = """
    create function wait() returns trigger language plpgsql as
        $$ begin perform pg_advisory_xact_lock(1); return null; end $$;
    create constraint trigger wait after insert on ledger deferrable initially deferred
        for each row when (new.kind = 'transactional') execute function wait()
"""


@both_colours
def test_a_transaction_that_commits_meanwhile_was_first_or_has_no_effect(
    world: World, colour: Colour
) -> None:
    world.query(WAIT_AT_COMMIT)
    committing = (
        "select count(*) from pg_locks where locktype = 'advisory' and not granted and objid = 1 "
        "and database = (select oid from pg_database where datname = current_database())"
    )
    with psycopg.connect(world.dsn, autocommit=True) as other:
        other.execute("select pg_advisory_lock(1)")
        world.enqueue("transactional", "a", "b", hold="gate")
        worker = world.start(colour=colour, lease=30.0, poll_interval=0.1)
        worker.wait_for("effect", "a")
        worker.wait_for("effect", "b")
        # The row of `a` is deleted, and the commit of that is on its way. `b` is still in its
        # handler when the cancel is made, and comes to its commit before that is.
        with psycopg.connect(world.dsn) as mine:
            assert world.client.jobs.cancel("b", by="me", conn=mine).running == ("b",)
            world.release("gate", 1)
            assert eventually(lambda: world.value(committing) == 1)
            assert world.client.jobs.cancel("a", by="me") == JobChanges((), (), {"a": "locked"})
        other.execute("select pg_advisory_unlock(1)")
    worker.wait_for("completed", "a")
    assert world.client.jobs.cancel("a", by="me") == JobChanges((), (), {"a": "absent"})
    world.witness(worker, "cancelled", "b")
    assert (world.rows("a"), world.rows("b")) == (1, 0)
    assert dead(world) == [("b", "cancelled by me")]


@pytest.mark.both_colours
@both_colours
def test_the_key_of_a_holder_that_never_returns_goes_to_the_next_job_with_its_cancel(
    world: World, colour: Colour
) -> None:
    world.enqueue("plain", "a", exclusive="k", hold="never")
    worker = world.start(colour=colour, lease=NEVER, poll_interval=NEVER, concurrency=2)
    worker.wait_for("effect", "a")
    world.enqueue("plain", "b", exclusive="k")
    waits = "select count(*) from bgjob_job where waits"
    assert eventually(lambda: world.value(waits) == 1)
    assert world.client.jobs.cancel("a", by="me").running == ("a",)
    world.witness(worker, "cancelled", "a")
    world.done("b")
    world.release("never", 1)


def test_the_key_of_a_job_whose_canceller_was_killed_is_found_by_polling(world: World) -> None:
    world.enqueue("plain", "a", exclusive="k", hold="gate")
    worker = world.start(lease=30.0)
    worker.wait_for("effect", "a")
    world.enqueue("plain", "b", exclusive="k")
    assert eventually(lambda: world.value("select count(*) from bgjob_job where waits") == 1)
    with psycopg.connect(world.dsn) as killed:
        # What it does first, and no more.
        [cancelled] = run(killed, steering.cancel(["a"], JobFilter(), by="me", reason=""))
    assert cancelled.answer == "running"
    world.done("b")
    world.release("gate", 1)
    # No notification: the worker finds it when it settles.
    world.witness(worker, "cancelled", "a")


def test_a_retry_that_waits_is_cancelled_and_begins_again_when_it_is_requeued(
    world: World,
) -> None:
    world.enqueue("plain", "a", then="retry", until=2)
    worker = world.start(backoff=NEVER)
    world.witness(worker, "retried", "a")
    assert world.client.jobs.cancel("a", by="me", reason="why") == JobChanges(("a",))
    assert world.client.jobs.run_now("a") == JobChanges((), (), {"a": "dead"})
    assert dead(world) == [("a", "cancelled by me: why")]
    assert world.client.dlq.requeue("a") == ["a"]
    worker.wait_for("retried", "a", times=2)
    assert world.client.jobs.run_now("a") == JobChanges(("a",))
    world.done("a")
    assert world.rows("a") == 3


@both_types
def test_of_jobs_that_are_cancelled_as_they_are_claimed_each_went_the_way_that_was_told(
    world: World, type: Type
) -> None:
    count = 400
    ids = [f"job {n}" for n in range(count)]
    told: dict[str, str] = {}
    enqueued: Queue[list[str]] = Queue()
    workers = [world.start(colour=colour, lease=30.0) for colour in ("thread", "async")]

    def cancel() -> None:
        with Client(world.dsn) as client:
            while some := enqueued.get(timeout=PATIENCE):
                changes = client.jobs.cancel(some, by="me")
                told.update(dict.fromkeys(changes.waiting, "waiting"))
                told.update(dict.fromkeys(changes.running, "running"))
                told.update(changes.unchanged)

    def enqueue() -> None:
        # Nearly all are cancelled in the moment of their claim, the last ones after their end.
        for start in range(0, count, 20):
            world.enqueue(type, *ids[start : start + 20])
            for some in range(start, start + 16, 4):
                enqueued.put(ids[some : some + 4])
        late = [id for start in range(0, count, 20) for id in ids[start + 16 : start + 20]]
        world.done(*late)
        for last in (late, [], []):
            enqueued.put(last)

    with ThreadPoolExecutor(3) as pool:
        parts = [pool.submit(cancel), pool.submit(cancel), pool.submit(enqueue)]
        for part in parts:
            part.result()
    absent = [id for id, how in told.items() if how == "absent"]
    world.done(*ids)
    assert eventually(lambda: not world.live())
    cancelled = {id for id, _ in dead(world)}
    assert cancelled == {id for id, how in told.items() if how in ("waiting", "running")}
    for id, how in told.items():
        rows = world.rows(id)
        if how == "waiting" or (how == "running" and type == "transactional"):
            assert rows == 0, (id, how)
        elif how == "absent":
            assert rows == 1, (id, how)
    heard = [e for worker in workers for e in worker.of("cancelled", "lost", "retried")]
    running = {id for id, how in told.items() if how == "running"}
    assert eventually(
        lambda: {e[1] for worker in workers for e in worker.of("cancelled")} == running
    ), (heard, running)
    world.saw("cancelled and completed jobs", cancelled and absent)
