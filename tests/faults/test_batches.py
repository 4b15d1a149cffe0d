"""Fault 66: workers with batch handlers are killed, stopped and ended in the middle of a call."""

import random
from typing import Any

import pytest
from support.waiting import eventually

from faults.app import Colour
from faults.world import World

BATCH = 40

both_colours = pytest.mark.parametrize("colour", ["thread", "async"])


def enqueue_some(world: World, dice: random.Random, count: int) -> None:
    """Enqueue jobs that raise, retry or put themselves back at first, among others."""
    for _ in range(count):
        arg: dict[str, Any] = {"sleep": 0.005}
        match dice.randrange(20):
            case 0:
                arg |= {"then": "raise", "until": 2}
            case 1:
                arg |= {"then": "retry", "until": 2}
            case 2:
                arg |= {"then": "reschedule"}
        world.enqueue(dice.choice(["plain", "transactional"]), **arg)


@both_colours
def test_batches_of_killed_workers_lose_nothing_and_repeat_no_transaction(
    world: World, colour: Colour
) -> None:
    """The oracle finds one row in the ledger for each transactional job."""
    dice = random.Random(5)
    workers = [world.start(colour=colour, batch=BATCH, concurrency=2) for _ in range(2)]
    for _ in range(3):
        enqueue_some(world, dice, 60)
        victim = workers.pop(dice.randrange(2))
        victim.wait_for("effect")
        seen = len(victim.of("effect"))
        assert eventually(lambda: len(victim.of("effect")) > seen or not world.live())
        victim.kill()
        workers.append(world.start(colour=colour, batch=BATCH, concurrency=2))
    world.done()
    # The death of a worker is the only thing that neighbours are charged for.
    [[most]] = world.query("select max(attempt) from ledger")
    assert most <= 2 + 3
    world.saw(
        "jobs of killed workers ran elsewhere",
        len({pid for (pid,) in world.query("select pid from ledger")}) > 2,
    )


@both_colours
def test_a_call_of_a_worker_that_was_stopped_for_longer_than_its_lease_changes_nothing(
    world: World, colour: Colour
) -> None:
    frozen = world.start(colour=colour, batch=BATCH)
    ids = [f"j{n}" for n in range(BATCH)]
    world.enqueue("transactional", *ids, linger=0.05)
    frozen.wait_for("effect")
    frozen.stop()
    world.start(colour=colour, batch=BATCH)
    world.done(*ids)
    frozen.cont()
    world.witness(frozen, "lost")
    assert all(world.rows(id_) == 1 for id_ in ids)
    assert frozen.of("completed") == []


@both_colours
def test_a_job_that_kills_its_worker_ends_alone_and_its_batch_completes(
    world: World, colour: Colour
) -> None:
    ids = [f"j{n}" for n in range(8)]
    world.enqueue("transactional", *ids)
    world.enqueue("transactional", "killer", then="kill", ledger=False)
    while world.live():
        worker = world.start(colour=colour, batch=BATCH, max_attempts=2)
        assert eventually(lambda: not worker.alive or not world.live())
    [[dead, error]] = world.query("select job_id, last_error from bgjob_dead_job")
    assert dead == "killer"
    assert "its worker died" in error
    world.saw("the killer is dead", dead)
    assert all(world.rows(id_) == 1 for id_ in ids)


@both_colours
def test_at_sigterm_jobs_that_have_not_started_go_back_while_a_call_runs(
    world: World, colour: Colour
) -> None:
    worker = world.start(colour=colour, batch=4, concurrency=1)
    running = [f"r{n}" for n in range(4)]
    world.enqueue("transactional", *running, hold="gate")
    worker.wait_for("effect")
    waiting = [f"w{n}" for n in range(3)]
    world.enqueue("transactional", *waiting, hold="gate")
    worker.terminate()
    worker.wait_for("stopping")
    held = (
        "select count(*) from bgjob_job where id = any(%s) and (token is not null or attempt > 0)"
    )
    assert eventually(lambda: world.value(held, [waiting]) == 0)
    world.release("gate", 1)
    assert worker.wait() == 0
    called = [event[1] for event in worker.of("started")]  # the first claims are small
    assert all(world.rows(id_, "transactional") == 1 for id_ in called)
    assert world.live() == len(running) + len(waiting) - len(called)
    world.start(colour=colour, batch=4)
    world.done()
    world.saw("the running call was waited for", worker.of("completed"))
