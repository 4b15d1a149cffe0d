"""Fault 65: many producers replace one job while workers claim it, settle it, and are killed."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from random import Random
from typing import Any

import pytest
from support.waiting import eventually

from bgjob import Client, EnqueueRequest
from faults.app import Colour
from faults.world import World

PRODUCERS = 4
EACH = 120


def value(type: str, kind: str, **options: Any) -> EnqueueRequest:
    return EnqueueRequest("q", type, {"kind": kind}, id="a", **options)


def ran(world: World) -> list[tuple[int, int]]:
    """The values that have run, in their order: the producer, and its number."""
    found = world.query("select kind from ledger where job_id = 'a' order by at")
    return [(int(producer), int(n)) for producer, n in (kind.split(":") for (kind,) in found)]


@pytest.mark.parametrize("colour", ["thread", "async"])
@pytest.mark.parametrize(
    ("type", "kills"), [("plain", False), ("transactional", False), ("transactional", True)]
)
def test_the_newest_value_runs_and_none_twice_while_producers_and_workers_race(
    world: World, type: str, kills: bool, colour: Colour
) -> None:
    workers = [world.start(colour=colour, concurrency=2, poll_interval=0.02) for _ in range(3)]
    enough = threading.Event()

    def produce(producer: int) -> None:
        random = Random(producer)
        with Client(world.dsn) as client:
            for n in count():
                if n >= EACH and enough.is_set():
                    return
                made = value(type, f"{producer}:{n}", priority=random.choice([0, 0, 5]))
                if random.random() < 0.5:
                    client.enqueue(made, on_conflict="replace")
                else:
                    client.bulk_enqueue([made], on_conflict="replace")

    def kill() -> None:
        random = Random(0)
        for _ in range(3 * kills):
            before = len(ran(world))
            assert eventually(lambda: len(ran(world)) > before + 5)  # noqa: B023
            workers.pop(random.randrange(len(workers))).kill()
            workers.append(world.start(colour=colour, concurrency=2, poll_interval=0.02))
        assert eventually(lambda: len(ran(world)) > 10)  # the workers have started
        enough.set()

    with ThreadPoolExecutor(PRODUCERS + 1) as pool:
        racing = [pool.submit(kill)]
        racing += [pool.submit(produce, producer) for producer in range(PRODUCERS)]
        for each in racing:
            each.result()
        # The last of all, after which nothing replaces it.
        world.client.enqueue(value(type, f"{PRODUCERS}:0"), on_conflict="replace")
    assert eventually(lambda: world.query("select count(*) from bgjob_job") == [(0,)])
    values = ran(world)
    assert values[-1] == (PRODUCERS, 0)
    assert len(values) == len(set(values))
    for producer in range(PRODUCERS):
        own = [n for who, n in values if who == producer]
        assert own == sorted(own)
    world.saw("values ran between", len(values) > 10)
    assert world.query("select count(*) from bgjob_dead_job") == [(0,)]


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("type", ["plain", "transactional"])
def test_a_replaced_job_whose_worker_is_killed_or_stopped_runs_again_before_its_successor(
    world: World, type: str, how: str
) -> None:
    held = {"kind": "old", "hold": "gate"}
    world.client.enqueue(EnqueueRequest("q", type, held, id="a"))
    victim = world.start(concurrency=1)
    victim.wait_for("effect", "a")
    for n in range(3):
        world.client.enqueue(value(type, f"new-{n}"), on_conflict="replace")
    if how == "killed":
        victim.kill()
    else:
        victim.stop()
    world.release("gate", 2)  # the attempt of the other worker
    other = world.start()
    other.wait_for("completed", "a", times=2)
    world.release("gate", 1)
    if how == "stopped":
        victim.cont()
        world.witness(victim, "lost", "a")
    else:
        world.saw("the successor ran", other.heard("completed", "a", times=2))
    kinds = world.query("select kind from ledger where kind <> 'gate' order by at")
    assert kinds == [("old",)] * (1 + (type == "plain")) + [("new-2",)]
