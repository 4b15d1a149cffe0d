"""Limits of a queue and of a type, while the processes that have rations of them are killed."""

import random
from datetime import datetime

import pytest
from support.waiting import eventually

from bgjob import Client, Limit
from bgjob.limit import Scope
from faults.world import World

STARTS = """
    select extract(epoch from began)::float8 from run where job_id = any (%s) order by began
"""

BEGUN = "select count(*) from run"

# A killed attempt had ended when its process was gone.
MOST_AT_ONCE = """
    with run as (
        select * from run where job_id = any (%s)
    ), gone as (
        select * from unnest(%s::int[], %s::timestamptz[]) as g (pid, at)
    ), change as (
        select began as at, 1 as more from run
        union all
        select coalesce(ended, gone.at), -1 from run left join gone using (pid)
        where coalesce(ended, gone.at) is not null
    )
    select max(running) from (
        select sum(more) over (order by at, more rows unbounded preceding) as running from change
    ) as counted
"""


def most_beyond(starts: list[float], rate: float) -> float:
    """Return by how many the starts in any time exceed what the rate alone allows in it."""
    most, least = 0.0, float("inf")
    for number, at in enumerate(starts):
        least = min(least, number - rate * at)
        most = max(most, number + 1 - rate * at - least)
    return most


@pytest.mark.parametrize(("scope", "seed"), [("queue", 1), ("type", 2)])
def test_no_limit_is_exceeded_while_five_workers_are_killed_at_random(
    world: World, scope: Scope, seed: int
) -> None:
    dice = random.Random(seed)
    limit = Limit(concurrency=4, rate="60/s", burst=40)
    with Client(world.dsn) as client:
        client.limits.set(scope, "plain" if scope == "type" else "q", limit)
    ids: dict[str, list[str]] = {"plain": [], "transactional": []}
    for n in range(130 if scope == "queue" else 200):
        type_ = dice.choice([*ids])
        # First the concurrency is in the way, also of workers that are slow; then the rate.
        longest = 2.0 if n < 12 else 0.3 if n < 60 else 0.08
        sleep = dice.uniform(longest / 4, longest)
        ids[type_] += world.enqueue(type_, timed=True, sleep=sleep)
    every = [*ids["plain"], *ids["transactional"]]
    limited = ids["plain"] if scope == "type" else every
    colours = ["thread", "async"]
    workers = [world.start(colour=colours[n % 2], concurrency=3) for n in range(5)]
    killed: dict[int, datetime] = {}
    in_flight = 0
    for n in range(4):
        begun = world.value(BEGUN) + dice.randint(5, 20)
        assert eventually(lambda: world.value(BEGUN) >= begun)  # noqa: B023 (called at once)
        busy = {pid for (pid,) in world.query("select pid from run where ended is null")}
        victim = dice.choice([worker for worker in workers if worker.pid in busy] or workers)
        workers.remove(victim)
        victim.kill()
        killed[victim.pid] = world.value("select clock_timestamp()")
        in_flight += world.value(
            "select count(*) from run where ended is null and pid = %s", [victim.pid]
        )
        workers.append(world.start(colour=colours[n % 2], concurrency=3))
    world.done(*every)
    starts = [at for (at,) in world.query(STARTS, [limited])]
    assert limit.burst is not None
    assert most_beyond(starts, limit.per_second) <= limit.burst
    at_once = world.value(MOST_AT_ONCE, [limited, [*killed], [*killed.values()]])
    assert at_once <= (limit.concurrency or 0)
    world.saw("jobs of killed workers", in_flight)
    world.saw("as many at once as may be", at_once == limit.concurrency)
