"""The oracle of the faults finds each error that it looks for."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import psycopg
import pytest

from bgjob import Mux
from faults import oracle
from faults.world import World


@pytest.fixture
def world(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world without a fault, until the test damages it."""
    monkeypatch.setattr(oracle, "_PATIENCE", 0.1)
    monkeypatch.setattr(oracle, "_SLACK", 0.1)
    world = World(dsn)
    world.saw("nothing")
    yield world
    world.close(judge=False)


def judge(world: World) -> str:
    """Return the errors that the oracle finds."""
    with pytest.raises(AssertionError) as caught:
        world.close()
    return str(caught.value)


def test_a_world_in_which_all_is_well_passes(world: World) -> None:
    worker = world.worker(world.mux())
    world.enqueue("plain", "plain", children=1)
    world.enqueue("transactional", "transactional", children=1, then="retry", until=2)
    world.enqueue("transactional", "rescheduled", then="reschedule", times=2)
    world.enqueue("transactional", "dead", then="dlq", children=1)
    world.enqueue("transactional", "failed", then="raise")
    world.enqueue("plain", "mute", ledger=False, mute=True)
    world.done("plain", "transactional", "rescheduled", "dead", "mute")
    worker.wait_for("retried", "failed")
    world.close()


def test_a_test_that_names_no_event_fails(world: World) -> None:
    world.named.clear()
    assert "named no error or event" in judge(world)


def test_an_expected_event_that_was_not_seen_fails_the_test(world: World) -> None:
    with pytest.raises(AssertionError, match="not seen: it"):
        world.saw("it", [])


@pytest.mark.parametrize("type", ["plain", "transactional"])
def test_a_job_that_is_neither_done_nor_live_nor_dead_is_lost(world: World, type: str) -> None:
    world.enqueue(type, "a", "b")
    world.query("delete from bgjob_job where id = 'a'")
    assert "1 jobs are lost: ['a" in judge(world)


def test_a_job_without_a_ledger_is_lost_unless_its_end_was_reported(world: World) -> None:
    worker = world.worker(world.mux())
    world.enqueue("plain", "done", mute=True, ledger=False)
    world.done()
    worker.wait_for("completed", "done")
    worker.shutdown()
    world.enqueue("plain", "seen", "gone", ledger=False)
    world.query("delete from bgjob_job")
    world.end("seen")
    assert "1 jobs are lost: ['gone" in judge(world)


def test_a_child_that_a_committed_parent_enqueued_may_not_be_lost(world: World) -> None:
    world.worker(world.mux())
    world.enqueue("transactional", "a", children=2)
    world.done()
    assert world.children("a") == ["a/0", "a/1"]
    world.done("a/0", "a/1")
    world.query("delete from ledger where job_id = 'a/1'")
    assert "lost: ['a/1" in judge(world)


def test_a_child_of_a_parent_that_did_not_commit_is_wrong(world: World) -> None:
    world.enqueue("transactional", "a", children=2)
    world.enqueue("plain", "a/0")
    assert "a/0 exists" in judge(world)


ROW = "insert into ledger (job_id, attempt, kind, pid) values ('a', 1, %s, 0)"


@pytest.mark.parametrize(
    ("then", "spoil", "says"),
    [
        ("complete", lambda world: world.query(ROW, ["transactional"]), "2 ledger rows"),
        ("retry", lambda world: world.query(ROW, ["transactional"]), "live and has 1 ledger rows"),
        ("reschedule", lambda world: world.query(ROW, ["rescheduled"]), "2 rows of reschedules"),
        ("dlq", lambda world: world.query("delete from ledger"), "dead and has 0 ledger rows"),
    ],
)
def test_a_transactional_effect_too_many_or_too_few_is_wrong(
    world: World, then: str, spoil: Callable[[World], object], says: str
) -> None:
    worker = world.worker(world.mux())
    world.enqueue("transactional", "a", then=then)
    if then == "retry":
        worker.wait_for("retried")
    else:
        world.done()
    spoil(world)
    assert says in judge(world)


def test_a_claim_that_nobody_takes_over_is_too_old(world: World) -> None:
    # This worker has another queue, and the claims of all queues count.
    world.worker(Mux(), queue="other")
    world.enqueue("plain", "a")
    world.query("update bgjob_job set token = 1, lease_until = now() - interval '9 s'")
    assert "claims outlived lease + poll interval" in judge(world)


def test_a_transaction_that_stays_open_is_seen(world: World) -> None:
    with psycopg.connect(world.dsn) as conn:
        conn.execute("select")
        assert "transactions are open" in judge(world)


def test_an_advisory_lock_that_stays_is_seen(world: World) -> None:
    with psycopg.connect(world.dsn, autocommit=True) as conn:
        conn.execute("select pg_advisory_lock(1)")
        assert "locks are left" in judge(world)


def test_a_thread_that_stays_is_seen(world: World) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    try:
        assert "forgotten" in judge(world)
    finally:
        end.set()
        thread.join()


def test_a_task_that_stays_is_seen(world: World) -> None:
    ended = threading.Event()
    tasks = []

    async def forget() -> None:
        tasks.append(asyncio.create_task(wait(), name="forgotten"))

    async def wait() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async def cancel() -> None:
        tasks[0].cancel()
        await asyncio.wait(tasks)

    world.run(forget())
    with pytest.raises(AssertionError, match="forgotten"):
        oracle.check(world)
    world.run(cancel())
    assert ended.is_set()


def test_a_worker_process_that_ends_badly_is_seen(world: World) -> None:
    process = world.command("-c", "import time\nprint('up', flush=True)\ntime.sleep(3600)")
    while "up" not in process.output:
        assert process.alive
    # It does not handle SIGTERM.
    assert "exit code -15" in judge(world)


def test_a_worker_process_that_prints_a_traceback_is_seen(world: World) -> None:
    process = world.command("-c", "import logging; logging.exception('x') or 1 / 0")
    process.wait()
    assert "ZeroDivisionError" in judge(world)
