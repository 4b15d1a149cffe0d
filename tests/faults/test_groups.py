"""Fault 68: workers die between the end of a group and `then`, and while they run both."""

from contextlib import ExitStack
from random import Random
from typing import Any

import psycopg
import pytest
from support.waiting import PATIENCE, eventually

from bgjob import AsyncClient, Client, EnqueueRequest, JobAlreadyExistsError
from faults.app import Colour
from faults.proxy import Proxy
from faults.world import World

LOOK = "group_dead = ("
"""Part of the statement that looks whether a group is over."""


def write(world: World, then: EnqueueRequest, *jobs: EnqueueRequest) -> None:
    with world.client.group(then=then) as group:
        group.enqueue_many(jobs)
    for each in (then, *jobs):
        if each.arg is None or "told" not in each.arg:  # its row has another kind
            world.acknowledge(each.id, type=each.type, **(each.arg or {}))


@pytest.mark.parametrize("colour", ["thread", "async"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_then_runs_once_where_a_worker_dies_between_the_last_settlement_and_the_look(
    proxy: Proxy, world: World, colour: Colour, moment: str
) -> None:
    victim = world.start(colour=colour, dsn=proxy.dsn(world.dsn), poll_interval=300)
    trap = proxy.cut_before_commit if moment == "before" else proxy.cut_after_commit
    cut = trap(LOOK)
    write(world, EnqueueRequest("q", "plain", id="then"), EnqueueRequest("q", "plain", id="a"))
    assert cut.wait(PATIENCE)
    victim.kill()
    world.saw("the job was settled", world.live("a") == 0)
    due = world.value("select next_run_at < 'infinity' from bgjob_job where id = 'then'")
    world.saw("then waits, or is due", due == (moment == "after"))
    world.start(colour=colour)
    world.done()
    assert world.rows("then") == 1


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_group_whose_answer_was_lost_is_written_or_not_and_can_be_repeated(
    proxy: Proxy, world: World, is_async: bool, moment: str
) -> None:
    dsn = proxy.dsn(world.dsn)
    client: Any = AsyncClient(dsn) if is_async else Client(dsn)
    then = EnqueueRequest("q", "plain", id="then")

    async def write_async() -> None:
        async with client.group(then=then) as group:
            group.enqueue(EnqueueRequest("q", "plain", id="a"))

    def write() -> None:
        if is_async:
            world.run(write_async())
        else:
            with client.group(then=then) as group:
                group.enqueue(EnqueueRequest("q", "plain", id="a"))

    with ExitStack() as stack:
        stack.callback(lambda: world.answer(client.close()))
        trap = proxy.cut_before_commit if moment == "before" else proxy.cut_after_commit
        cut = trap("insert into bgjob_job")
        with pytest.raises(psycopg.OperationalError) as lost:
            write()
        assert cut.wait(PATIENCE)
        world.saw(str(lost.value))
        assert world.live("a", "then") == (2 if moment == "after" else 0)
        if moment == "after":
            with pytest.raises(JobAlreadyExistsError) as taken:
                write()
            assert taken.value.ids == ("then",)
        else:
            write()
    world.acknowledge("a", "then")
    world.start()
    world.done()
    assert (world.rows("a"), world.rows("then")) == (1, 1)


GROUPS = 25


@pytest.mark.parametrize("colour", ["thread", "async"])
def test_each_then_runs_once_and_after_its_group_while_workers_are_killed(
    world: World, colour: Colour
) -> None:
    random = Random(0)

    def start() -> Any:
        return world.start(colour=colour, concurrency=3, poll_interval=0.05)

    workers = [start() for _ in range(3)]
    for n in range(GROUPS):
        dies = {"sleep": 0.02, "then": "dlq"}
        jobs = [
            EnqueueRequest("q", "plain", dies if m < n % 4 else None, id=f"{n}/{m}")
            for m in range(3)
        ]
        write(world, EnqueueRequest("q", "transactional", {"told": True}, id=f"{n}"), *jobs)
    for killed in range(2):
        ran = "select count(*) from ledger"
        assert eventually(lambda: world.value(ran) > 10 * (killed + 1))  # noqa: B023
        workers.pop(random.randrange(3)).kill()
        workers.append(start())
    assert eventually(lambda: world.live() == 0)
    last = dict(world.query("select job_id, max(at) from ledger group by job_id"))
    for n in range(GROUPS):
        assert last[f"{n}"] > max(last[f"{n}/{m}"] for m in range(3))
    told = world.query("select job_id, kind from ledger where kind like 'told %'")
    assert sorted(told) == sorted((f"{n}", f"told {n % 4}") for n in range(GROUPS))
    world.saw("jobs died", world.value("select count(*) from bgjob_dead_job") > GROUPS)
