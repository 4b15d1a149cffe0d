"""Many jobs in flight when their worker dies, once or again and again."""

import time
from math import log2
from typing import Any

import pytest
from support.waiting import eventually

from faults.world import Process, World

AT_ONCE = 3.0
"""Seconds within which a job starts that is due: a second, a poll interval, and a busy host."""


def end_leases(world: World) -> None:
    """End the leases of a dead worker now, so that the test is quick."""
    world.query("update bgjob_job set lease_until = clock_timestamp() where token is not null")


def dead_letter(world: World, killers: list[str], **options: Any) -> list[Process]:
    """Run one worker process after the other until the killers are dead letters."""
    dead = "select count(*) from bgjob_dead_job"
    processes: list[Process] = []
    while world.value(dead) < len(killers):
        process = world.start(colour="async", **options)
        processes.append(process)
        ended = eventually(lambda: not process.alive or world.value(dead) == len(killers))
        assert ended, process.tail()
        end_leases(world)
    return processes


@pytest.mark.parametrize(("neighbours", "killers"), [(50, 2), (200, 1), (1000, 1)])
def test_a_killer_is_alone_after_a_few_deaths_and_its_neighbours_complete(
    world: World, neighbours: int, killers: int
) -> None:
    bad = [f"killer {n}" for n in range(killers)]
    world.enqueue_many("plain", neighbours // 2, mute=True, sleep=0.15, ledger=False)
    world.enqueue("plain", *bad, sleep=0.1, then="kill", ledger=False)
    world.enqueue_many("plain", neighbours - neighbours // 2, mute=True, sleep=0.15, ledger=False)
    everything = neighbours + killers
    processes = dead_letter(world, bad, concurrency=everything, max_attempts=1)
    world.done()
    deaths = sum(not process.alive for process in processes)
    dead = world.query("select job_id, last_error from bgjob_dead_job")
    assert sorted(id for id, _ in dead) == bad
    world.saw("errors that say that the worker died", all("died" in error for _, error in dead))
    # Two deaths of all, those of groups that halve, and one alone.
    print(f"{neighbours} neighbours, {killers} killers: {deaths} deaths")
    assert deaths <= killers * (2 + log2(everything) + 1 + 1)
    # A process that was killed may have settled jobs without telling of any.
    told = [event for process in processes for event in process.of("started", "completed")]
    assert max((attempt for _, id, attempt in told if id not in bad), default=1) <= 3


def test_one_death_keeps_neither_its_jobs_nor_others_waiting(world: World) -> None:
    long = world.enqueue_many("plain", 60, mute=True, sleep=20, ledger=False)
    first = world.start(colour="async", concurrency=60)
    first.wait_for("started", times=60)
    second = world.start(colour="async", concurrency=200, grace=0.1)
    first.kill()
    end_leases(world)
    began = time.monotonic()
    for n in range(5):
        world.enqueue("plain", f"fresh {n}", mute=True, ledger=False)
        second.wait_for("completed", f"fresh {n}", timeout=AT_ONCE)
    assert eventually(lambda: set(long) <= {event[1] for event in second.of("started")})
    assert time.monotonic() < began + 2 * AT_ONCE
    assert world.query("select distinct attempt, deaths from bgjob_job") == [(2, 1)]
    world.saw("all of them run at once", world.live() == 60)


def test_an_urgent_job_waits_for_suspects_no_longer_than_a_second(world: World) -> None:
    world.enqueue_many("plain", 60, mute=True, sleep=2.0, ledger=False)
    world.query("update bgjob_job set deaths = 2, attempt = 2")
    workers = [world.start(colour="async", concurrency=100, grace=0.1) for _ in range(2)]
    waits: list[float] = []
    end = time.monotonic() + 4.0
    while (began := time.monotonic()) < end:
        n = len(waits)
        world.enqueue("plain", f"urgent {n}", priority=-1, mute=True, ledger=False)
        started = eventually(lambda: any(w.heard("started", f"urgent {n}") for w in workers))
        assert started
        waits.append(time.monotonic() - began)
    print(f"urgent jobs waited for {max(waits):.2f} s at most beside 60 suspects")
    assert max(waits) <= AT_ONCE
    running = "select count(*) from bgjob_job where deaths = 2"
    world.saw("suspects are about", world.value(running) > 0)
