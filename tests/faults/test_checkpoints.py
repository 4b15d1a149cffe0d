"""Fault 67: whatever happens to a job of many chunks, each has its effect once."""

import random
import time
from collections import Counter
from typing import Any, Literal

import pytest
from support.waiting import PATIENCE, eventually

from bgjob.ext.embedded import EmbeddedServer
from faults.proxy import Proxy
from faults.world import Process, World

Colour = Literal["thread", "async"]

both_colours = pytest.mark.parametrize("colour", ["thread", "async"])

CHUNKS = 200


def chunks_of(world: World, id: str) -> list[int]:
    """The chunks whose effects are committed, in the order of their numbers."""
    found = world.query("select token from ledger where job_id = %s and kind = 'chunks'", [id])
    return sorted(int(number) for [number] in found)


def tried(*workers: Process) -> Counter[int]:
    """How often each chunk was begun."""
    return Counter(event[3] for worker in workers for event in worker.of("chunk"))


@pytest.mark.parametrize(("seed", "colour"), [(1, "thread"), (2, "async")])
def test_processes_killed_at_random_repeat_at_most_a_chunk_each_and_no_effect(
    world: World, seed: int, colour: Colour
) -> None:
    dice = random.Random(seed)
    world.enqueue("chunks", "a", count=CHUNKS, sleep=0.002)
    kills, workers = 0, [world.start(colour=colour) for _ in range(2)]

    def holder() -> Process | None:
        """The worker that is at it, once it has come some way."""
        attempt = world.query("select attempt, token from bgjob_job where token is not null")
        return next(
            (
                worker
                for worker in workers
                if worker.alive
                and attempt
                and sum(e[2] == attempt[0][0] for e in worker.of("chunk")) >= enough
            ),
            None,
        )

    while kills < 4:
        enough = dice.randint(1, 30)
        assert eventually(lambda: holder() or not world.live("a"))
        if (victim := holder()) is None:
            break
        victim.kill()
        kills += 1
        workers.append(world.start(colour=colour))
    world.done("a")
    again = sum(tried(*workers).values()) - CHUNKS
    print(f"seed {seed}: {kills} kills, {again} chunks begun again")
    world.saw("a worker was killed in the middle", kills)
    assert chunks_of(world, "a") == [*range(CHUNKS)]
    assert again <= kills


@both_colours
@pytest.mark.parametrize("where", ["within", "between"])
def test_a_worker_that_slept_for_longer_than_its_lease_learns_it_at_its_next_save(
    world: World, colour: Colour, where: str
) -> None:
    hold: dict[str, Any] = {f"hold_{where}": 3}
    world.enqueue("chunks", "a", count=6, **hold)
    sleeper = world.start(colour=colour)
    sleeper.wait_for("held")
    sleeper.stop()
    world.release("a", 2)
    other = world.start(colour=colour)
    other.wait_for("completed", "a")
    world.release("a", 1)
    sleeper.cont()
    world.witness(sleeper, "told", "a")
    world.witness(sleeper, "lost", "a")
    assert chunks_of(world, "a") == [*range(6)]
    assert tried(sleeper) == Counter(range(4))  # the last one was undone
    assert tried(other) == Counter(range(3, 6))


@both_colours
def test_a_deploy_gives_the_job_with_its_attempt_to_the_next_worker(
    world: World, colour: Colour
) -> None:
    world.enqueue("chunks", "a", count=CHUNKS, sleep=0.01)
    first = world.start(colour=colour)
    assert eventually(lambda: len(first.of("chunk")) > 5)
    first.terminate()
    asked = time.monotonic()
    assert eventually(lambda: world.query("select 1 from bgjob_job where token is null"))
    took = time.monotonic() - asked
    print(f"{colour}: given back {took:.3f} s after SIGTERM")
    assert world.value("select attempt from bgjob_job") == 0
    assert first.wait() == 0
    world.witness(first, "rescheduled", "a")
    second = world.start(colour=colour)
    second.wait_for("completed", "a")
    assert [event[2] for event in second.of("started")] == [1]
    assert chunks_of(world, "a") == [*range(CHUNKS)]
    assert max(tried(first, second).values()) == 1


@pytest.mark.every_combination
@both_colours
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("by", ["save", "transaction"])
def test_a_save_whose_commit_or_its_answer_was_lost_is_made_once(
    proxy: Proxy, world: World, colour: Colour, moment: str, by: str
) -> None:
    world.enqueue(
        "chunks", "a", count=5, hold_between=1, saves_only=by == "save", ledger=by != "save"
    )
    worker = world.start(colour=colour, dsn=proxy.dsn(world.dsn), lease=30.0)
    worker.wait_for("held")
    cut = proxy.cut_after_commit if moment == "after" else proxy.cut_before_commit
    was_cut = cut("checkpoint =") if by == "save" else cut("set local bgjob.claim")
    world.release("a", 1, 2)
    worker.wait_for("completed", "a")
    world.saw("the connection was cut", was_cut.wait(PATIENCE))
    if by == "save":  # it is sent again, and the handler hears nothing of it
        assert [event[3] for event in worker.of("chunk")] == [*range(5)]
        assert not worker.of("retried")
    else:  # only the next attempt knows
        world.witness(worker, "retried", "a")
        assert chunks_of(world, "a") == [*range(5)]
        assert tried(worker)[1] == (1 if moment == "after" else 2)


@both_colours
def test_a_job_whose_transaction_was_lost_goes_on_without_the_locks_of_that_session(
    proxy: Proxy, world: World, colour: Colour
) -> None:
    # The second attempt waits for what the first has written and not ended.
    world.query("create unique index on ledger (job_id, token) where kind = 'chunks'")
    world.enqueue("chunks", "a", count=5, hold_within=2)
    worker = world.start(colour=colour, dsn=proxy.dsn(world.dsn), lease=30.0)
    worker.wait_for("held")
    proxy.abandon()
    world.release("a", 1, 2)
    world.witness(worker, "retried", "a")
    world.witness(worker, "completed", "a")
    world.witness(worker, "error")
    assert chunks_of(world, "a") == [*range(5)]
    assert tried(worker) == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1}
    world.end_sessions()


@both_colours
def test_a_job_goes_on_when_the_database_was_restarted_between_two_saves(
    hurt: World, server: EmbeddedServer, colour: Colour
) -> None:
    hurt.enqueue("chunks", "a", count=8, sleep=0.2, saves_only=True, ledger=False)
    worker = hurt.start(colour=colour, lease=30.0)
    worker.wait_for("chunk", times=3)
    server.restart("immediate")
    hurt.witness(worker, "completed", "a")
    assert [event[2:] for event in worker.of("chunk")] == [(1, number) for number in range(8)]


@both_colours
def test_jobs_of_a_key_wait_until_the_one_that_goes_on_has_ended(
    world: World, colour: Colour
) -> None:
    world.enqueue("chunks", "a", count=CHUNKS, sleep=0.002, exclusive="k")
    world.enqueue("chunks", "b", count=20, exclusive="k")
    workers = [world.start(colour=colour) for _ in range(2)]
    assert eventually(lambda: any(len(worker.of("chunk")) > 5 for worker in workers))
    victim = next(worker for worker in workers if worker.of("chunk"))
    victim.kill()
    world.start(colour=colour)
    world.done("a", "b")
    world.saw("both are done", chunks_of(world, "a") == [*range(CHUNKS)])
    assert chunks_of(world, "b") == [*range(20)]
    order = world.query(
        "select job_id from ledger where kind = 'chunks' group by job_id, attempt order by min(at)"
    )
    assert world.query(
        "select count(*) from ledger a join (select min(at), max(at) from ledger "
        "where job_id = 'b') b (first, last) on a.at between first and last where job_id = 'a'"
    ) == [(0,)], order
