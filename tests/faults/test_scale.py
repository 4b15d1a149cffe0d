"""Faults 28 and 30: clocks that are wrong, delays, many jobs and many queues."""

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from support.waiting import PATIENCE, eventually

from bgjob import AsyncClient, Client, EnqueueRequest, Job, Mux, Reschedule, Result, Retry
from faults.app import Colour
from faults.world import Process, World

LEDGER_ROW = "insert into ledger (job_id, attempt, kind, pid) values (%s, %s, %s, %s)"

HOST = pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
COLOUR = pytest.mark.parametrize("colour", ["thread", "async"])

CLOCK = "select clock_timestamp()"


def runs(world: World, id: str) -> list[datetime]:
    """The times when the runs of a job wrote the ledger, by the database's clock."""
    return [
        at for (at,) in world.query("select at from ledger where job_id = %s order by at", [id])
    ]


# -- 28: a clock that is an hour off --------------------------------------------------------------

# What a process learns of the wall clock through Python is shifted: time.time() and time_ns(),
# datetime.now(), utcnow() and today(), date.today(). The monotonic clock is not, as on a host
# whose clock is set wrong; what C code asks the kernel is not, and bgjob has none.

SHIFT = pytest.mark.parametrize("shift", [3600, -3600], ids=["an hour ahead", "an hour behind"])


def start_shifted(world: World, shift: int, **options: Any) -> Process:
    """Start a worker process whose wall clock is off by so many seconds."""
    process = world.command(
        "-m", "faults.clocks", env={"PROGRAM": "faults.app", "SHIFT": str(shift)}, **options
    )
    process.wait_for("running")
    world.saw("the clock is shifted", f"shifted by {shift}" in process.output)
    return process


@SHIFT
@COLOUR
def test_28_a_worker_whose_clock_is_off_runs_nothing_early(
    world: World, shift: int, colour: Any
) -> None:
    delayed = world.enqueue("plain", "delayed 1", "delayed 2", delay=1.5)
    due = dict(world.query("select id, next_run_at from bgjob_job"))
    worker = start_shifted(world, shift, colour=colour, backoff=0.7)
    world.enqueue("plain", "delayed while it ran", delay=1.0)
    due |= dict(world.query("select id, next_run_at from bgjob_job"))
    world.enqueue("plain", "retried", then="retry", until=3)
    run_at = world.value(CLOCK) + timedelta(seconds=1.2)
    world.client.enqueue(EnqueueRequest("q", "plain", id="run at", run_at=run_at))
    world.acknowledge("run at")
    due["run at"] = run_at
    world.done()
    for id in (*delayed, "delayed while it ran", "run at"):
        world.witness(worker, "completed", id)
        [at] = runs(world, id)
        assert at >= due[id], id
    first, second, third = runs(world, "retried")
    assert second - first >= timedelta(seconds=0.7)
    assert third - second >= timedelta(seconds=0.7)


@SHIFT
@COLOUR
def test_28_a_worker_whose_clock_is_off_rescues_nothing_early(
    world: World, shift: int, colour: Any
) -> None:
    victim = world.start(lease=2.0)
    world.enqueue("plain", "orphan", linger=0.5, then="kill", until=2)
    victim.wait_for("effect", "orphan")
    rescuer = start_shifted(world, shift, lease=2.0, colour=colour)
    assert victim.wait() == -9
    [(end,)] = world.query("select lease_until from bgjob_job where id = 'orphan'")
    assert end is not None
    world.witness(rescuer, "completed", "orphan")
    _, second = runs(world, "orphan")
    assert second >= end


@SHIFT
@COLOUR
def test_28_a_worker_whose_clock_is_off_takes_no_job_that_another_holds(
    world: World, shift: int, colour: Any
) -> None:
    holder = world.start()
    world.enqueue("plain", "held", sleep=2.5)
    holder.wait_for("started", "held")
    beside = start_shifted(world, shift, colour=colour)
    world.enqueue("plain", "other", sleep=0.1)
    world.witness(holder, "completed", "held")
    world.done()
    assert len(runs(world, "held")) == 1
    assert not beside.heard("started", "held")
    assert holder.of("lost") == []


@SHIFT
def test_28_a_worker_whose_clock_is_off_keeps_the_jobs_that_it_holds(
    world: World, shift: int
) -> None:
    holder = start_shifted(world, shift)
    world.enqueue("plain", "held", sleep=2.5)
    holder.wait_for("started", "held")
    beside = world.start()
    world.witness(holder, "completed", "held")
    assert len(runs(world, "held")) == 1
    assert not beside.heard("started", "held")
    assert holder.of("lost") == []


# -- 30: a delay never ends early ----------------------------------------------------------------

DELAY = 0.5


@COLOUR
def test_30_a_delay_of_half_a_second_never_ends_early(world: World, colour: Any) -> None:
    workers = [world.start(colour=colour, concurrency=10) for _ in range(2)]
    due: dict[str, datetime] = {}
    for n in range(100):
        # One after another: the delays end all the time, just before and just after a poll.
        [id] = world.enqueue("plain", f"one {n}", delay=DELAY)
        due |= dict(world.query("select id, next_run_at from bgjob_job where id = %s", [id]))
    many = set(world.enqueue_many("plain", 200, delay=DELAY))
    due |= {id: at for id, at in world.query("select id, next_run_at from bgjob_job") if id in many}
    world.done()
    started = dict(world.query("select job_id, min(at) from ledger group by job_id"))
    assert set(started) == set(world.jobs)
    # A busy host may not have asked for the due time before its job had run.
    assert len(due) > len(world.jobs) / 2
    early = {id: due[id] - started[id] for id in due if started[id] < due[id]}
    assert early == {}
    for worker in workers:
        world.witness(worker, "completed")


@HOST
def test_30_a_retry_and_a_reschedule_never_come_back_early(world: World, is_async: bool) -> None:
    rescheduled: set[str] = set()  # that gives the attempt back: it cannot be told by that

    def row(job: Job) -> list[object]:
        return [job.id, job.attempt, "plain", 0]

    def again(job: Job) -> Result | None:
        if job.id.startswith("retry") and job.attempt == 1:
            return Retry(DELAY)
        if job.id.startswith("raise") and job.attempt == 1:
            raise ValueError("once")
        if job.id.startswith("reschedule") and job.id not in rescheduled:
            rescheduled.add(job.id)
            return Reschedule(timedelta(seconds=DELAY))
        return None

    def handler(job: Job) -> Result | None:
        with psycopg.connect(world.dsn, autocommit=True) as conn:
            conn.execute(LEDGER_ROW, row(job))
        return again(job)

    async def coroutine(job: Job) -> Result | None:
        async with await psycopg.AsyncConnection.connect(world.dsn, autocommit=True) as conn:
            await conn.execute(LEDGER_ROW, row(job))
        return again(job)

    mux = Mux().register("plain", coroutine if is_async else handler, backoff=lambda _: DELAY)
    ids = [f"{how} {n}" for how in ("retry", "raise", "reschedule") for n in range(10)]
    world.enqueue("plain", *ids)
    # Half of an interval, so that a poll comes while they wait, and one as they end.
    worker = world.worker(
        mux, is_async=is_async, concurrency=5, lease=10.0, poll_interval=DELAY / 2
    )
    world.done()
    for id in ids:
        world.witness(worker, "completed", id)
        first, second = runs(world, id)
        assert second - first >= timedelta(seconds=DELAY), id


# -- 30: many jobs -----------------------------------------------------------------------------------


def test_30_two_workers_run_each_of_100_000_jobs_once(world: World) -> None:
    count = 100_000
    colours: list[Colour] = ["thread", "async"]
    workers = [
        world.command("-m", "faults.counting", colour=colour, concurrency=10, lease=10.0)
        for colour in colours
    ]
    for worker in workers:
        worker.wait_for("running")
    for _ in range(10):
        world.enqueue_many("plain", count // 10)
    assert eventually(lambda: world.live() == 0, 2 * PATIENCE)
    for worker in workers:
        worker.terminate()
        assert worker.wait() == 0, worker.output
        [(_, ran)] = worker.of("ran")
        world.saw(f"{worker!r} ran {ran} jobs", ran > 0)
        assert worker.of("lost", "error") == []
    assert world.query(
        "select count(*), count(distinct job_id), min(attempt), max(attempt) from ledger"
    ) == [(count, count, 1, 1)]


# -- 30: many queues -----------------------------------------------------------------------------------

QUEUES = 10_000


def in_each_queue(ids: str) -> Iterator[EnqueueRequest]:
    """A job for each queue; `ids` is the prefix of their ids."""
    for n in range(QUEUES):
        yield EnqueueRequest(f"queue {n}", "plain", id=f"{ids} {n}")


@HOST
def test_30_a_worker_reads_nothing_of_ten_thousand_other_queues(
    world: World, is_async: bool
) -> None:
    with Client(world.dsn) as client:
        for ids in ("a", "b", "c"):
            client.bulk_enqueue(in_each_queue(ids))
    # Without statistics, which a queue's never deserve: the plans have to be right anyway.
    ran: list[str] = []
    gone = threading.Event()

    def handler(job: Job) -> None:
        ran.append(job.id)
        if len(ran) == 3:
            gone.set()

    read = "select idx_tup_read from pg_stat_user_indexes where indexrelname = 'bgjob_job_due'"
    before = world.value(read)
    worker = world.worker(
        Mux().register("plain", handler),
        is_async=is_async,
        queue="queue 5000",
        lease=10.0,
        poll_interval=0.05,
    )
    for id in ("a 5000", "b 5000", "c 5000"):
        world.witness(worker, "completed", id)
    assert gone.wait(PATIENCE)
    sessions = (
        "select count(*) from pg_stat_activity "
        "where datname = current_database() and application_name = 'bgjob'"
    )
    assert world.value(sessions) == 1
    # A notification for another queue that shares its channel is none for this one.
    world.client.enqueue(EnqueueRequest("queue 5000", "plain", id="d"))
    world.witness(worker, "completed", "d")
    assert worker.shutdown()
    # The server counts what a session has read when it ends, which a worker does not wait for.
    assert eventually(lambda: world.value(sessions) == 0)
    assert eventually(lambda: world.value(read) > before)
    assert world.value(read) - before < 1000
    assert sorted(ran) == ["a 5000", "b 5000", "c 5000", "d"]
    assert world.live() == 3 * (QUEUES - 1)


@pytest.mark.parametrize("is_async", [False, True], ids=["Client", "AsyncClient"])
def test_30_an_enqueue_into_ten_thousand_queues_takes_few_locks_and_wakes_sleeping_workers(
    world: World, is_async: bool
) -> None:
    sleepers = [
        world.worker(Mux().register("plain", lambda _: None), queue=f"queue {n}", poll_interval=600)
        for n in (0, 5_000, 9_999)
    ]
    parked = (
        "select count(*) from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' "
        "and objsubid = 2 and granted and database = (select oid from pg_database "
        "where datname = current_database())"
    )
    assert eventually(lambda: world.value(parked) == len(sleepers))
    held = "select count(*) from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'"

    async def enqueue() -> list[tuple[Any, ...]]:
        async with (
            AsyncClient(world.dsn) as client,
            await psycopg.AsyncConnection.connect(world.dsn) as conn,
        ):
            await client.bulk_enqueue(in_each_queue("a"), conn=conn)
            return await (await conn.execute(held)).fetchall()

    if is_async:
        [(locks,)] = world.run(enqueue())
    else:
        with psycopg.connect(world.dsn) as conn:
            world.client.bulk_enqueue(in_each_queue("a"), conn=conn)
            [(locks,)] = conn.execute(held).fetchall()
    world.saw(f"{locks} advisory locks", 0 < locks <= 128)
    for worker, n in zip(sleepers, (0, 5_000, 9_999), strict=True):
        # By notification: no poll comes before ten minutes are over.
        world.witness(worker, "completed", f"a {n}")
    assert world.live() == QUEUES - len(sleepers)


def test_idle_workers_alongside_an_open_enqueue_rarely_query_the_server(
    world: World,
) -> None:
    commits = "select xact_commit from pg_stat_database where datname = current_database()"
    workers = [world.worker(world.mux(), poll_interval=1.0, lease=30.0) for _ in range(5)]
    with psycopg.connect(world.dsn) as producer:
        [id] = world.enqueue("plain", conn=producer)
        threading.Event().wait(1.5)  # what a session counts, it reports once a second
        before = world.value(commits)
        threading.Event().wait(3.0)
        a_second = (world.value(commits) - before) / 3
    print(f"{a_second:.1f} transactions/s of five idle workers beside an open enqueue")
    assert a_second < 60
    world.saw("transactions", a_second)
    world.acknowledge(id)
    world.done()
    for worker in workers:
        worker.shutdown()
