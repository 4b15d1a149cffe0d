"""Fault 29: schedules on five hosts, over outages, deploys and wrong clocks.

The steps of daylight saving are in tests/test_schedules.py: which tick is due is a function of the
last one and the database's time, which no test can set.
"""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from support.waiting import eventually

from faults.scheduling import SCHEDULES
from faults.world import Process, World

EVERY_SECOND = {"name": "s", "cron": "* * * * * *", "missed": "all"}
SECOND = timedelta(seconds=1)
HOSTS = 5


def start(world: World, *schedules: dict[str, Any], wait: bool = True, **options: Any) -> Process:
    """Start a worker process with these schedules."""
    env = {SCHEDULES: json.dumps(schedules)}
    process = world.command("-m", "faults.scheduling", env=env, **options)
    if wait:
        process.wait_for("running")
    return process


def ticks(world: World, name: str = "s") -> list[datetime]:
    """The ticks whose jobs have had their effect, in order, as often as they had it."""
    prefix = f"schedule:{name}:"
    found = world.query("select job_id from ledger where job_id like %s", [f"{prefix}%"])
    return sorted(datetime.fromisoformat(id_.removeprefix(prefix)) for (id_,) in found)


def has_ticks(world: World, count: int) -> bool:
    """Whether there have been so many."""
    return len(ticks(world)) >= count


def clock_is_at(world: World, time: datetime) -> Callable[[], bool]:
    """Whether it is that late, by the database's clock."""
    return lambda: bool(world.value("select clock_timestamp() >= %s", [time]))


def check_one_run_a_second(world: World, began: datetime) -> None:
    """Fail unless every second from then to the last tick had its job, once."""
    world.query("update bgjob_schedule set paused = true")
    assert eventually(lambda: world.live() == 0)
    last = world.value("select tick from bgjob_schedule where name = 's'")
    first = began.replace(microsecond=0) + SECOND
    expected = [first + n * SECOND for n in range(round((last - first) / SECOND) + 1)]
    assert ticks(world) == expected


def test_29_five_hosts_run_a_tick_once(world: World) -> None:
    start(world, EVERY_SECOND)
    began = world.value("select coalesce(last_run_at - interval '1 s', tick) from bgjob_schedule")
    for _ in range(HOSTS - 1):
        start(world, EVERY_SECOND, wait=False)
    for process in world.processes:
        process.wait_for("running")
    seen = len(ticks(world))
    assert eventually(lambda: len(ticks(world)) >= seen + 5)
    world.saw("ticks while five workers ran")
    check_one_run_a_second(world, min(began, ticks(world)[0] - SECOND))


def test_29_workers_that_are_killed_and_started_on_the_tick_neither_lose_nor_repeat_a_tick(
    world: World,
) -> None:
    survivor = start(world, EVERY_SECOND)
    assert eventually(lambda: ticks(world))
    first = ticks(world)[0]
    for _ in range(4):
        victim = start(world, EVERY_SECOND)
        last = world.value("select tick from bgjob_schedule")
        assert eventually(clock_is_at(world, last + SECOND))
        victim.kill()
    # And the last one of all: for a while there is none.
    survivor.kill()
    last = world.value("select tick from bgjob_schedule")
    assert eventually(clock_is_at(world, last + 3 * SECOND))
    start(world, EVERY_SECOND)
    assert eventually(lambda: ticks(world)[-1:] > [last + 4 * SECOND])
    world.saw("workers were killed on the tick")
    check_one_run_a_second(world, first - SECOND)


POLICIES = {"one": 1, "all": 36, "skip": 0}


@pytest.mark.parametrize("hosts", [1, HOSTS])
def test_29_after_an_outage_of_three_hours_each_policy_is_followed(
    world: World, hosts: int
) -> None:
    schedules = [
        {"name": missed, "every": 300, "missed": missed, "after_completion": None}
        for missed in POLICIES
    ]
    schedules.append({"name": "after", "after_completion": 300, "missed": "all"})
    start(world, *schedules).terminate()
    world.processes[0].wait()
    assert ticks(world, "one") == []
    world.query(
        "update bgjob_schedule set tick = tick - interval '3 hours 2 minutes', "
        "next_run_at = next_run_at - interval '3 hours 2 minutes'"
    )
    for _ in range(hosts):
        start(world, *schedules, wait=False)
    late = (
        "select count(*) from bgjob_schedule where tick < clock_timestamp() - interval '5 minutes' "
        "and name <> 'after'"
    )
    assert eventually(lambda: world.value(late) == 0)
    for process in world.processes[1:]:
        process.wait_for("running")
    assert eventually(lambda: ticks(world, "after") and world.live() == 0)
    world.saw("ticks were missed")
    counts = {missed: len(ticks(world, missed)) for missed in POLICIES}
    assert counts == POLICIES
    assert len(ticks(world, "after")) == 1
    ahead = "select count(*) from bgjob_schedule where next_run_at > clock_timestamp()"
    assert eventually(lambda: world.value(ahead) == 4)


def test_29_a_deploy_on_the_tick_runs_it_once_under_any_policy(world: World) -> None:
    schedules = [{"name": missed, "every": 3600, "missed": missed} for missed in POLICIES]
    start(world, *schedules).terminate()
    world.processes[0].wait()
    # The tick came five seconds ago, when no worker ran.
    world.query("update bgjob_schedule set tick = clock_timestamp() - interval '3605 s'")
    last = dict(world.query("select name, tick from bgjob_schedule"))
    for _ in range(2):
        start(world, *schedules, wait=False)
    for process in world.processes[1:]:
        process.wait_for("running")
    assert eventually(lambda: all(ticks(world, missed) for missed in POLICIES))
    world.saw("the tick was run by the new workers")
    assert eventually(lambda: world.live() == 0)
    for missed in POLICIES:
        assert ticks(world, missed) == [last[missed] + 3600 * SECOND]


def test_29_an_interval_after_completion_never_overlaps_itself_though_workers_are_killed(
    world: World,
) -> None:
    schedule = {"name": "s", "after_completion": 1}
    start(world, schedule)
    for _ in range(2):
        seen = len(ticks(world))
        assert eventually(partial(has_ticks, world, seen + 1))
        world.processes[-1].kill()
        start(world, schedule)
    start(world, schedule)
    assert eventually(partial(has_ticks, world, 4))
    world.saw("runs over kills")
    found = ticks(world)
    effects = [at for (at,) in world.query("select at from ledger order by at")]
    assert all(tick - effect >= SECOND for effect, tick in zip(effects, found[1:]))


@pytest.mark.parametrize("shift", [3600, -3600], ids=["an hour ahead", "an hour behind"])
def test_29_a_worker_whose_clock_is_off_enqueues_nothing_early_and_nothing_late(
    world: World, shift: int
) -> None:
    schedules = [EVERY_SECOND, {"name": "hourly", "every": 1800, "missed": "all"}]
    env = {
        SCHEDULES: json.dumps(schedules),
        "PROGRAM": "faults.scheduling",
        "SHIFT": str(shift),
    }
    process = world.command("-m", "faults.clocks", env=env)
    process.wait_for("running")
    world.saw("the clock is shifted", f"shifted by {shift}" in process.output)
    assert eventually(lambda: len(ticks(world)) >= 3)
    early = (
        "select job_id, at from ledger where at < replace(job_id, 'schedule:s:', '')::timestamptz"
    )
    assert world.query(early) == []
    assert ticks(world, "hourly") == []
    check_one_run_a_second(world, ticks(world)[0] - SECOND)
