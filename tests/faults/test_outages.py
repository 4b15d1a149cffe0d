"""A worker that was away for longer than its lease: no server, SIGSTOP, a starved interpreter."""

import re
import time
from typing import Literal

import psycopg
import pytest
from support.waiting import eventually

from bgjob import Job, Mux
from bgjob._sql.keys import blocked
from bgjob.ext.embedded import EmbeddedServer
from faults.world import Process, World

Colour = Literal["thread", "async"]

both_colours = pytest.mark.parametrize("colour", ["thread", "async"])

AWAY = 2.0
"""Seconds; the lease is 1 s."""


def starts(world: World, worker: Process) -> dict[str, int]:
    """How often each job was started."""
    began = [event[1] for event in worker.of("started")]
    return {id: began.count(id) for id in world.jobs}


FINISHED = [f"finished {n}" for n in range(5)]
RUNNING = [f"running {n}" for n in range(5)]


def hold_some(world: World, worker: Process) -> None:
    """Start jobs that end during the outage, and others that end after it."""
    world.enqueue("plain", *RUNNING, linger=AWAY + 1.5)
    world.enqueue("plain", "exclusive", exclusive="key", linger=AWAY + 1.5)
    world.enqueue("plain", *FINISHED, linger=0.7)
    for id in world.jobs:
        worker.wait_for("effect", id)
    world.enqueue("plain", "later", delay=0.5)


@both_colours
def test_a_server_that_is_away_for_longer_than_the_lease_repeats_no_job_of_the_only_worker(
    hurt: World, server: EmbeddedServer, colour: Colour
) -> None:
    worker = hurt.start(colour=colour, concurrency=20)
    hold_some(hurt, worker)
    server.stop("fast")
    time.sleep(AWAY)
    server.start()
    hurt.done("later", *FINISHED)
    assert hurt.live() == len(RUNNING) + 1
    hurt.done()
    hurt.witness(worker, "error")
    assert set(starts(hurt, worker).values()) == {1}


@both_colours
def test_a_worker_that_slept_longer_than_its_lease_repeats_nothing_unless_another_took_the_job(
    world: World, colour: Colour
) -> None:
    worker = world.start(colour=colour, concurrency=20)
    hold_some(world, worker)
    worker.stop()
    ended = "select count(*) from bgjob_job where lease_until < clock_timestamp()"
    world.saw("leases that have ended", eventually(lambda: world.value(ended) > len(RUNNING)))
    worker.cont()
    world.done()
    assert set(starts(world, worker).values()) == {1}


def test_a_handler_that_keeps_the_interpreter_for_longer_than_the_lease_is_not_started_again(
    world: World,
) -> None:
    began: list[str] = []
    pattern, text = re.compile(r"(a|a)*b"), "a" * 22

    def handle(job: Job) -> None:
        began.append(job.id)
        first = time.monotonic()
        while job.id == "greedy" and time.monotonic() < first + 1.5:
            pattern.match(text)

    once = time.monotonic()
    pattern.match(text)
    call = time.monotonic() - once
    # One call of C that lasts for longer than the lease.
    while call < 1.3:
        text += "a"
        call *= 2
    worker = world.worker(Mux().register("plain", handle, max_attempts=1), concurrency=2)
    world.enqueue("plain", "greedy", ledger=False)
    assert eventually(lambda: "greedy" in began)
    world.enqueue("plain", *(f"job {n}" for n in range(10)), ledger=False)
    world.done()
    world.saw("each job started once", sorted(began) == sorted(world.jobs))
    assert not worker.of("lost")


def test_the_key_of_a_queue_that_the_same_worker_serves_is_not_freed_by_its_other_queue(
    world: World,
) -> None:
    world.enqueue("plain", "holder", exclusive="key", queue="other", ledger=False)
    world.query(
        "update bgjob_job set token = 1, attempt = 1, lease_until = clock_timestamp() - interval '1 s'"
    )
    world.query(
        "insert into bgjob_exclusive (key, tokens, queue, since, since_id, until, until_id) "
        "select 'key', '{1}', queue, next_run_at, id, next_run_at, id "
        "from bgjob_job"
    )
    world.enqueue("plain", "waits", exclusive="key", ledger=False)
    world.query("update bgjob_job set waits = true where id = 'waits'")
    token = "select token from bgjob_job where id = 'holder'"
    with psycopg.connect(world.dsn) as conn:
        ours = blocked("q", after="", limit=10, served=["q", "other"])
        conn.execute(ours.text, ours.params)
        assert world.value(token) == 1
        others = blocked("q", after="", limit=10, served=["q"])
        conn.execute(others.text, others.params)
    world.saw("a worker of one queue frees it", world.value(token) is None)
