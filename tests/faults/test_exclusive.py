"""Exclusive keys, while the processes that hold them are killed or stopped."""

import random
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal

import pytest
from psycopg.types.json import Jsonb
from support.waiting import eventually

from faults.world import Process, World

Colour = Literal["thread", "async"]
Type = Literal["plain", "transactional"]

both_types = pytest.mark.parametrize("type", ["plain", "transactional"])

# The end of a killed attempt is not known; it was over when its process was gone. One whose
# lease was lost on a busy host is another's by right.
OVERLAPS = """
    with gone as (
        select * from unnest(%s::int[], %s::timestamptz[]) as g (pid, at)
    ), span as (
        select row_number() over () as n, run.*, coalesce(ended, gone.at, 'infinity') as until
        from run left join gone using (pid)
        where (job_id, attempt) not in (
            select * from unnest(%s::text[], %s::int[])
        )
    )
    select a.key, a.job_id, a.attempt, a.began, array_agg((b.job_id, b.attempt, b.began, b.until))
    from span a join span b on b.key = a.key and b.began <= a.began and b.until > a.began
    group by a.n, a.key, a.job_id, a.attempt, a.began
    having count(*) > coalesce((%s::jsonb ->> a.key)::int, 1)
"""
"""The moments at which more jobs of a key ran than it has slots."""

FIRST_STARTS = "select job_id from run where job_id = any (%s) group by job_id order by min(began)"

WAITING = "select count(*) from bgjob_job where waits and id = any (%s)"


def lost(workers: list[Process]) -> list[tuple[str, int]]:
    """List the attempts whose lease was lost."""
    return [(id, attempt) for w in workers for _, id, attempt in w.of("lost")]


def holds(world: World, *pids: int) -> int:
    """Count the jobs that have begun in these processes and not ended."""
    runs = "select count(*) from run where ended is null and pid = any (%s)"
    return int(world.value(runs, [list(pids)]))


def check_ledger(
    world: World,
    killed: dict[int, datetime],
    jobs: dict[tuple[str, str], list[str]],
    cancelled: Iterable[str] = (),
    slots: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Fail unless so many jobs of a key ran at a time, and in each queue in their due order.

    The thread of a job that is cancelled while it runs is given up, and may run beside the next.
    """
    attempts = "select job_id, attempt from run where job_id = any (%s)"
    away = lost(world.processes) + world.query(attempts, [[*cancelled]])
    overlaps = world.query(
        OVERLAPS,
        [
            list(killed),
            list(killed.values()),
            [id for id, _ in away],
            [attempt for _, attempt in away],
            Jsonb(dict(slots)),
        ],
    )
    assert not overlaps, overlaps[:5]
    for line, all_due in jobs.items():
        due = [id for id in all_due if id not in cancelled]
        for (id,) in world.query(FIRST_STARTS, [due]):
            # The jobs that start at the same time tell so in any order.
            assert due.index(id) < slots.get(line[0], 1), (line, id)
            due.remove(id)
        assert not due


@pytest.mark.parametrize(("seed", "colour"), [(1, "thread"), (2, "async")])
def test_jobs_of_a_key_never_overlap_while_workers_are_killed_at_random(
    world: World, seed: int, colour: Colour
) -> None:
    dice = random.Random(seed)
    jobs: dict[tuple[str, str], list[str]] = {
        (f"key {n}", queue): [] for n in range(20) for queue in "qr"
    }
    slots = {f"key {n}": n % 3 + 1 for n in range(20)}
    killed: dict[int, datetime] = {}

    def enqueue(count: int) -> None:
        for _ in range(count):
            key, queue = line = dice.choice(list(jobs))
            type = dice.choice(["plain", "transactional"])
            sleep = dice.uniform(0.001, 0.02)
            jobs[line] += world.enqueue(
                type, queue=queue, exclusive=key, slots=slots[key], timed=True, sleep=sleep
            )

    def start(queue: str) -> Process:
        return world.start(queue=queue, colour=colour, lease=1.5)

    enqueue(100)
    workers = [start(queue) for queue in "qrqr"]
    for _ in range(3):
        enqueue(30)
        victim = workers.pop(dice.randrange(4))
        while not holds(world, victim.pid):
            enqueue(4)  # the others may have been quicker
        victim.kill()
        killed[victim.pid] = world.value("select clock_timestamp()")
        workers.append(start(victim.settings.queue))
    world.done()
    world.saw("holders were killed", holds(world, *killed))
    check_ledger(world, killed, jobs, slots=slots)
    assert eventually(lambda: world.value("select count(*) from bgjob_exclusive") == 0)


@pytest.mark.parametrize(("seed", "colour"), [(3, "thread"), (4, "async")])
def test_quick_jobs_of_a_key_never_overlap_whatever_becomes_of_them(
    world: World, seed: int, colour: Colour
) -> None:
    dice = random.Random(seed)
    # Of a key that both queues have, a job of the other queue is found by a poll.
    lines = [(f"key {n}", "qr"[n % 2]) for n in range(6)] + [("both", "q"), ("both", "r")]
    jobs: dict[tuple[str, str], list[str]] = {line: [] for line in lines}
    slots = {"key 1": 2, "key 4": 3, "key 5": 3, "both": 2}
    cancelled: set[str] = set()
    killed: dict[int, datetime] = {}

    def enqueue(count: int) -> None:
        for _ in range(count):
            key, queue = line = dice.choice(lines)
            what: dict[str, Any] = dice.choice(
                [{}, {}, {}, {"then": "retry", "until": 2}, {"then": "reschedule"}]
            )
            jobs[line] += world.enqueue(
                dice.choice(["plain", "transactional"]),
                queue=queue,
                priority=dice.choice([0, 0, 5]),
                exclusive=key,
                slots=slots.get(key),
                timed=True,
                sleep=dice.choice([0.0, 0.001, 0.003]),
                **what,
            )

    def start(queue: str) -> Process:
        return world.start(queue=queue, colour=colour, lease=1.5, backoff=0.05)

    enqueue(100)
    workers = [start(queue) for queue in "qrqr"]
    for _ in range(4):
        enqueue(40)
        ids = dice.sample([id for line in jobs.values() for id in line[-30:]], 6)
        changes = world.client.jobs.cancel(ids, by="me")
        gone = [*changes.waiting, *changes.running]
        cancelled.update(gone)
        assert set(world.client.dlq.requeue(ids=gone)) == set(gone)
        queue = dice.choice("qr")
        world.client.pause(queue)
        enqueue(10)
        world.client.resume(queue)
        victim = workers.pop(dice.randrange(4))
        victim.kill()
        killed[victim.pid] = world.value("select clock_timestamp()")
        workers.append(start(victim.settings.queue))
    world.done()
    world.saw("jobs were cancelled", len(cancelled))
    check_ledger(world, killed, jobs, cancelled, slots)
    assert eventually(lambda: world.value("select count(*) from bgjob_exclusive") == 0)


def test_as_many_jobs_of_a_key_run_as_it_has_slots_wherever_there_is_room(world: World) -> None:
    begun = "select count(*) from run where ended is null and pid <> all (%s)"

    def runs(count: int, *killed: int) -> bool:
        return eventually(lambda: world.value(begun, [list(killed)]) == count)

    jobs: dict[tuple[str, str], list[str]] = {("k", "q"): [], ("k", "r"): []}
    for n in range(6):
        queue, type = "qqr"[n % 3], "plain" if n % 2 else "transactional"
        jobs["k", queue] += world.enqueue(
            type, str(n), queue=queue, exclusive="k", slots=3, timed=True, hold=f"gate {n}"
        )
    workers = [world.start(queue=queue, concurrency=1, lease=1.5) for queue in "qqrr"]
    assert runs(3)
    # 0, 1 and 2 or 3; the fourth worker is idle, and claims others meanwhile.
    world.enqueue("plain", "neighbour", queue="r")
    assert eventually(lambda: any(w.heard("completed", "neighbour") for w in workers[2:]))
    ends, killed = iter(running(world)), {}
    world.release(f"gate {next(ends)}", 1, 2)
    assert eventually(lambda: world.value("select count(*) from run") == 4) and runs(3)
    [(pid,)] = world.query("select pid from run where job_id = %s", [next(ends)])
    victim = next(worker for worker in workers if worker.pid == pid)
    victim.kill()
    killed[pid] = world.value("select clock_timestamp()")
    world.saw("a holder was killed", holds(world, pid))
    # Its slot is another job's when its lease has ended.
    assert runs(3, pid)
    for n in range(6):
        world.release(f"gate {n}", 1, 2)
    world.done()
    check_ledger(world, killed, jobs, slots={"k": 3})
    assert eventually(lambda: world.value("select count(*) from bgjob_exclusive") == 0)


def running(world: World) -> list[str]:
    """List the jobs that have begun and not ended."""
    return [id for (id,) in world.query("select job_id from run where ended is null order by 1")]


@both_types
def test_a_holder_that_slept_longer_than_its_lease_changes_nothing_of_the_next_ones_claim(
    world: World, type: Type
) -> None:
    holder = "select until_id, tokens from bgjob_exclusive"
    world.enqueue(type, "a", exclusive="k", timed=True, hold="gate a")
    first = world.start()
    first.wait_for("effect", "a")
    world.enqueue(type, "b", exclusive="k", timed=True, hold="gate b")
    world.enqueue(type, "c", exclusive="k", timed=True)
    assert eventually(lambda: world.value(WAITING, [["b", "c"]]) == 2)
    first.stop()
    second = world.start()
    world.release("gate a", 2)
    second.wait_for("completed", "a")
    second.wait_for("effect", "b")
    # The next one is given back if it was claimed with this one.
    assert eventually(lambda: world.value(WAITING, [["c"]]) == 1)
    before = world.query(holder)
    first.cont()
    world.release("gate a", 1)
    world.witness(first, "lost", "a")
    # It goes on, and has had the time to release the key, or to start the next job.
    world.enqueue("plain", "d")
    world.done("d")
    assert world.query(holder) == before and before[0][0] in ("b", "c")
    assert world.value(WAITING, [["c"]]) == 1
    world.release("gate b", 1)
    world.done()
    spans = world.query("select job_id, attempt from run order by began")
    assert spans == [("a", 1), ("a", 2), ("b", 1), ("c", 1)]
    assert eventually(lambda: world.value("select count(*) from bgjob_exclusive") == 0)


@both_types
def test_a_key_whose_holder_was_killed_is_free_for_another_queue_after_its_lease(
    world: World, type: Type
) -> None:
    world.enqueue(type, "a", queue="r", exclusive="k", hold="gate")
    first = world.start(queue="r")
    first.wait_for("effect", "a")
    world.enqueue(type, "b", exclusive="k")
    second = world.start()
    assert eventually(lambda: world.value(WAITING, [["b"]]) == 1)
    first.kill()
    # Nobody is left who works for queue r.
    world.witness(second, "completed", "b")
    assert world.query("select id, token, deaths from bgjob_job") == [("a", None, 1)]
