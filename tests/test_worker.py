"""Workers run jobs despite any handlers, observers, connections and rows."""

import asyncio
import gc
import logging
import os
import random
import re
import select
import threading
import time
import warnings
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support.database import all_done, clock, count, row, rows, sleeper, terminate_workers
from support.databases import KEEPER
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import (
    Gate,
    Launcher,
    Recorder,
    Style,
    both_styles,
    handler,
    running,
    session_of,
)

from bgjob import (
    BgjobError,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    NoopObserver,
    QueueRequiredError,
    Reschedule,
    Result,
    Retry,
    SchemaError,
    Worker,
)
from bgjob._engine.protocol import Exchange, Sweep
from bgjob._engine.reply import Notice
from bgjob._sql.claims import claim_any
from bgjob._sql.execute import run as ask
from bgjob._sql.notices import POSTS, _seated, channel
from bgjob._sql.settlements import Claimed, Postponed, release_jobs
from bgjob._worker import control, tasks
from bgjob._worker.waker import Waker
from bgjob.schema import init_sql

# -- results ----------------------------------------------------------------------------


@both_styles
def test_a_job_runs_and_its_row_is_deleted(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    seen: list[Job] = []
    observer = Recorder()
    launcher.enqueue("a", arg={"n": 1})
    launcher.start(Mux().register("t", handler(style, seen.append)), observer=observer)
    observer.wait_for("completed", "a")
    assert [(job.id, job.queue, job.type, job.json(), job.attempt) for job in seen] == [
        ("a", "q", "t", {"n": 1}, 1)
    ]
    assert count(conn) == 0
    assert launcher.client.dlq.list() == []


@both_styles
def test_a_retry_waits_for_its_delay_and_the_next_attempt_sees_its_error(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    seen: list[tuple[int, str]] = []
    began: list[datetime] = []

    def fail_twice(job: Job) -> Result:
        began.append(clock(conn))
        seen.append((job.attempt, (job.last_error or "").partition("\n")[0]))
        if job.attempt == 1:
            return Retry(timedelta(milliseconds=300), error="first")
        if job.attempt == 2:
            raise ValueError("second")
        return Complete()

    observer = Recorder()
    mux = Mux().register("t", handler(style, fail_twice), backoff=lambda attempt: attempt / 10)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer, poll_interval=NEVER)
    observer.wait_for("completed", "a")
    assert seen == [(1, ""), (2, "first"), (3, "ValueError: second")]
    assert began[1] - began[0] >= timedelta(seconds=0.3)
    assert began[2] - began[1] >= timedelta(seconds=0.2)
    assert observer.of("retried") == [
        ("retried", "a", 1, 0.3, "first"),
        ("retried", "a", 2, 0.2, "second"),
    ]


def test_a_job_that_fails_max_attempts_times_goes_to_the_dlq(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    def fail(job: Job) -> Result:
        raise ValueError(f"attempt {job.attempt}")

    observer = Recorder()
    launcher.enqueue("a", arg=b"arg", priority=2)
    launcher.start(
        Mux().register("t", fail, max_attempts=3, backoff=lambda _: 0.0), observer=observer
    )
    observer.wait_for("dead", "a")
    assert len(observer.of("started")) == 3
    assert count(conn) == 0
    [dead] = launcher.client.dlq.list()
    assert (dead.id, dead.attempt) == ("a", 3)
    assert re.fullmatch(
        r"ValueError: attempt 3\n  at test_worker\.py:\d+ in fail", dead.last_error or ""
    )
    assert (dead.queue, dead.type, dead.arg, dead.priority) == ("q", "t", b"arg", 2)


def test_a_reschedule_does_not_count_as_an_attempt(launcher: Launcher) -> None:
    seen: list[int] = []

    def look_again(job: Job) -> Result:
        seen.append(job.attempt)
        return Reschedule(0.01) if len(seen) < 5 else Complete()

    observer = Recorder()
    launcher.enqueue("a")
    launcher.start(
        Mux().register("t", look_again, max_attempts=1), observer=observer, poll_interval=NEVER
    )
    observer.wait_for("completed", "a")
    assert seen == [1] * 5
    assert observer.of("rescheduled") == [("rescheduled", "a", 1, 0.01)] * 4


def test_a_job_of_an_unknown_type_goes_to_the_dlq_with_its_columns(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    launcher.enqueue("a", type="mystery", arg=b"arg", priority=2)
    due, created, updated = row(conn, "select next_run_at, created_at, updated_at from bgjob_job")
    before = clock(conn)
    launcher.start(Mux(), observer=observer)
    observer.wait_for("dead", "a")
    [dead] = launcher.client.dlq.list()
    assert (dead.id, dead.queue, dead.type, dead.arg, dead.attempt, dead.priority) == (
        ("a", "q", "mystery", b"arg", 1, 2)
    )
    assert dead.last_error is not None
    assert dead.last_error.startswith("UnknownTypeError: no handler is registered")
    assert (dead.next_run_at, dead.created_at, dead.updated_at) == (due, created, updated)
    assert before <= dead.moved_at <= clock(conn)
    assert observer.of("started") == []


@both_styles
def test_a_return_value_that_is_not_a_result_is_retried_with_an_error_that_names_handler_and_type(
    launcher: Launcher, style: Style
) -> None:
    errors: list[str | None] = []

    def body(job: Job) -> object:
        errors.append(job.last_error)
        return "done" if job.attempt == 1 else None

    observer = Recorder()
    mux = Mux().register("t", handler(style, body), backoff=lambda _: 0.0)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", "a")
    assert errors[1] is not None
    assert errors[1].startswith("TypeError: handler ")
    assert "of job type 't' returned str" in errors[1]


@both_styles
@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
)
def test_after_any_exception_of_a_handler_its_job_is_retried_and_the_worker_lives(
    launcher: Launcher, style: Style, error: type[BaseException]
) -> None:
    def body(job: Job) -> None:
        if job.id == "bad" and job.attempt == 1:
            raise error

    observer = Recorder()
    mux = Mux().register("t", handler(style, body), backoff=lambda _: 0.0)
    launcher.enqueue("bad", "good")
    worker = launcher.start(mux, observer=observer)
    observer.wait_for("completed", "good")
    observer.wait_for("completed", "bad")
    assert len(observer.of("retried")) == 1
    launcher.enqueue("later")
    observer.wait_for("completed", "later")
    assert launcher.shutdown(worker)


def test_a_coroutine_that_cancels_its_own_task_harms_no_neighbour(launcher: Launcher) -> None:
    async def body(job: Job) -> None:
        if job.id == "bad":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        else:
            await asyncio.sleep(0)

    # Quick jobs are claimed many at a time, so that the same task runs the next.
    good = [f"{n:03}" for n in range(300)]
    observer = Recorder()
    launcher.enqueue(*good[:150], "bad", *good[150:])
    launcher.start(Mux().register("t", body, backoff=lambda _: NEVER), observer=observer)
    observer.wait_for("completed", good[-1])
    assert {event[1] for event in observer.of("retried")} <= {"bad"}


def test_hostile_error_texts_are_stored_cleaned_and_harm_no_neighbour(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    texts: dict[str, Any] = {
        "nul": "a\0b",
        "surrogate": "a\ud800b",
        "huge": "x" * 50_000_000,
        "mute": Mute(),
        "quotes": "{'\"\\,NULL}",
    }

    def fail(job: Job) -> Result | None:
        return Retry(NEVER, error=texts[job.id]) if job.id in texts else None

    launcher.enqueue(*texts, "good")
    observer = NoopObserver()
    launcher.start(Mux().register("t", fail), concurrency=3, observer=observer)
    assert eventually(lambda: row(conn, "select count(last_error) from bgjob_job") == (5,))
    assert eventually(lambda: count(conn) == 5)
    stored = dict(rows(conn, "select id, last_error from bgjob_job"))
    assert stored["nul"] == "a\ufffdb"
    assert stored["surrogate"] == "a?b"
    assert len(stored["huge"]) < 10_100
    assert stored["mute"] == "Mute (its text raised RuntimeError)"
    assert stored["quotes"] == "{'\"\\,NULL}"


# -- concurrency and order ------------------------------------------------------------------


@pytest.mark.parametrize("styles", [["plain"], ["coroutine"], ["plain", "coroutine"]])
def test_as_many_handlers_run_concurrently_as_the_worker_allows(
    launcher: Launcher, conn: psycopg.Connection, styles: list[Style]
) -> None:
    lock = threading.Lock()
    full = threading.Event()
    running = peak = 0

    def enter() -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
            if running == 3:
                full.set()

    def leave() -> None:
        nonlocal running
        with lock:
            running -= 1

    def plain(_: Job) -> None:
        enter()
        assert full.wait(PATIENCE)
        leave()

    async def coroutine(_: Job) -> None:
        enter()
        while not full.is_set():
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        leave()

    mux = Mux().register("plain", plain).register("coroutine", coroutine)
    dice = random.Random(3)
    launcher.client.bulk_enqueue([EnqueueRequest("q", dice.choice(styles)) for _ in range(600)])
    launcher.start(mux, concurrency=3)
    assert all_done(conn)
    assert peak == 3


def test_by_default_jobs_run_one_at_a_time_in_order_of_priority_and_due_time(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, priority, next_run_at) "
        "select n::text, 'q', 't', n * 7919 % 5 - 2, now() - n * 104729 % 997 * interval '1 s' "
        "from generate_series(1, 500) n"
    )
    expected = [
        id_ for (id_,) in rows(conn, "select id from bgjob_job order by priority, next_run_at")
    ]
    order: list[str] = []
    launcher.start(Mux().register("t", lambda job: order.append(job.id)), poll_interval=NEVER)
    assert all_done(conn)
    assert order == expected


def test_jobs_keep_their_order_around_one_that_is_slow(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, priority, next_run_at) "
        "select n::text, 'q', 't', n / 2500, now() - interval '1 h' + n * interval '1 ms' "
        "from generate_series(1, 4000) n"
    )
    expected = [
        id_ for (id_,) in rows(conn, "select id from bgjob_job order by priority, next_run_at")
    ]
    order: list[str] = []

    def run(job: Job) -> None:
        order.append(job.id)
        if job.id == "1500":
            time.sleep(0.4)  # the jobs claimed with it are released meanwhile

    launcher.start(Mux().register("t", run), poll_interval=NEVER)
    assert all_done(conn)
    assert order == expected


def test_a_sleeping_worker_is_woken_by_a_job_that_another_releases(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    launcher.start(Mux().register("t", lambda _: None), poll_interval=NEVER)
    assert eventually(lambda: sleeper(conn) is not None)
    with conn.transaction():  # so that no worker is notified before the job is claimed
        conn.execute(
            "insert into bgjob_job (id, queue, type, next_run_at) values ('a', 'q', 't', now())"
        )
        [job] = ask(conn, claim_any("q", lease=NEVER, token=1))
    ask(conn, release_jobs("q", [Claimed(job, 1)], tell=False))
    assert all_done(conn)


def test_two_workers_never_run_the_same_job_twice(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    runs: Counter[str] = Counter()
    lock = threading.Lock()

    def note(job: Job) -> None:
        with lock:
            runs[job.id] += 1

    ids = [f"{n:04}" for n in range(3_000)]
    for style in ("plain", "coroutine"):
        mux = Mux().register("t", handler(style, note))
        launcher.start(mux, concurrency=4, poll_interval=0.05)
    for n in range(0, 3_000, 500):
        launcher.enqueue(*ids[n : n + 500])
    assert all_done(conn)
    assert runs == Counter(ids)


def test_a_job_that_blocks_does_not_hold_up_those_claimed_with_it(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate = Gate()
    mux = Mux().register("slow", gate).register("quick", lambda _: None)
    launcher.enqueue(*(f"{n:03}" for n in range(300)), type="quick")
    launcher.enqueue("slow", type="slow")
    launcher.enqueue(*(f"{n:03}" for n in range(300, 600)), type="quick")
    launcher.start(mux, concurrency=2)
    gate.wait()
    assert eventually(lambda: rows(conn, "select id from bgjob_job") == [("slow",)])
    gate.released.set()
    assert all_done(conn)


def test_a_worker_works_on_its_own_queue_only(launcher: Launcher, conn: psycopg.Connection) -> None:
    launcher.enqueue("mine")
    launcher.enqueue("other", queue="Q")
    observer = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=observer)
    observer.wait_for("completed", "mine")
    observer.wait_for("empty", "q")
    assert rows(conn, "select id, attempt from bgjob_job") == [("other", 0)]


def test_coroutines_that_compute_let_the_loop_turn_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "_TURN", 0.0)  # each of them computes for longer
    turns: list[None] = []
    seen: list[int] = []
    others: list[asyncio.Task[None]] = []
    ended = threading.Event()

    async def other() -> None:
        while len(seen) < 10:
            turns.append(None)
            await asyncio.sleep(0)
        ended.set()

    async def body(_: Job) -> None:
        if not others:
            others.append(asyncio.create_task(other()))
        seen.append(len(turns))

    with running(body, *map(str, range(10))):
        assert ended.wait(PATIENCE)
    assert seen == sorted(set(seen))


@both_styles
def test_nothing_of_a_job_is_kept_by_the_slot_that_ran_it(style: Style) -> None:
    def alive() -> bool:
        return any(type(o) is Job and o.id == "to be forgotten" for o in gc.get_objects())

    with running(handler(style, lambda _: None), "to be forgotten") as (slots, _):
        assert eventually(lambda: slots.free and slots.outcomes)
        assert alive()
        slots.collect()
        assert eventually(lambda: not alive())


# -- when a job starts ----------------------------------------------------------------------


def test_a_delayed_job_starts_at_its_time_and_not_at_the_next_poll(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    began: dict[str, tuple[datetime, datetime]] = {}

    def note(job: Job) -> None:
        began[job.id] = clock(conn), job.next_run_at

    observer = Recorder()
    launcher.enqueue("before", delay=0.5)
    launcher.start(Mux().register("t", note), observer=observer, poll_interval=NEVER)
    observer.wait_for("empty")
    launcher.enqueue("while idle", delay=0.5)
    observer.wait_for("completed", "before")
    observer.wait_for("completed", "while idle")
    for started, due in began.values():
        assert started >= due


def test_an_enqueue_wakes_an_idle_worker(launcher: Launcher, conn: psycopg.Connection) -> None:
    observer = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)
    for n in range(5):
        assert eventually(lambda: sleeper(conn) is not None)
        launcher.enqueue(str(n))
        observer.wait_for("completed", str(n))


def test_an_enqueue_wakes_a_worker_when_it_commits(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)
    assert eventually(lambda: sleeper(conn) is not None)
    with conn.transaction():
        launcher.client.enqueue(EnqueueRequest("q", "t", id="a"), conn=conn)
        launcher.enqueue("b")
        observer.wait_for("completed", "b")
    observer.wait_for("completed", "a")


def test_a_thread_that_dozes_is_woken_by_a_call_and_not_by_a_ring() -> None:
    waker = Waker()
    try:
        waker.doze()
        waker.ring()
        assert not select.select([waker], [], [], 0)[0]
        waker.call()
        assert select.select([waker], [], [], 0)[0]
        waker.silence()
        waker.call()  # it is awake
        assert not select.select([waker], [], [], 0)[0]
    finally:
        waker.close()


def test_one_ring_ends_one_wait_even_if_the_thread_that_rings_is_late(dsn: str) -> None:
    waker = Waker()
    session = session_of(dsn)
    try:
        waker.arm()
        waker._rope.send(b"!")  # and it has not run since: the waker does not know yet
        session.wait(waker, PATIENCE)
        waker.silence()
        waker._rings = True
        assert not select.select([waker], [], [], 0)[0]
        waker.silence()
        waker.shout()
        assert select.select([waker], [], [], 0)[0]
    finally:
        waker.close()


def test_a_notification_that_was_read_behind_an_answer_is_not_slept_through(dsn: str) -> None:
    waker = Waker()
    session = session_of(dsn)
    session.open()
    try:
        connection = session.connection
        with psycopg.connect(dsn, autocommit=True) as other:
            other.execute("select pg_notify(%s, '0 5 q')", [channel("q")])
        select.select([connection.fileno()], [], [], 30)
        connection.pgconn.consume_input()
        session.wait(waker, 1.0)
        assert session.take_notice() == Notice({5: datetime.fromtimestamp(0, UTC)})
    finally:
        session.close()
        waker.close()


def test_two_concurrent_enqueues_are_both_noticed_for_any_delays_and_priorities(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    launcher.start(
        Mux().register("t", lambda _: None),
        concurrency=2,
        observer=NoopObserver(),
        poll_interval=NEVER,
    )
    for n in range(20):
        launcher.client.enqueue(EnqueueRequest("q", "t"))
        launcher.client.enqueue(EnqueueRequest("q", "t", delay=n % 2 / 20, priority=n // 2))
        assert all_done(conn), (n, rows(conn, "select priority, token from bgjob_job"))


def test_a_retry_is_noticed_by_another_worker_that_polls(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    launcher.enqueue("a")
    launcher.client.do("q", Mux().register("t", lambda _: Retry(0.2)))
    launcher.start(Mux().register("t", lambda _: None), poll_interval=0.05)
    assert all_done(conn)


@pytest.mark.parametrize("who", ["client", "worker"])
def test_polling_finds_jobs_without_a_notification(
    launcher: Launcher, conn: psycopg.Connection, who: str
) -> None:
    observer = Recorder()
    launcher.start(
        Mux().register("t", lambda _: None),
        observer=observer,
        poll_interval=0.05,
        notify=who == "client",
    )
    observer.wait_for("empty")
    with Client(launcher.dsn, notify=who == "worker") as client:
        client.enqueue(EnqueueRequest("q", "t", id="now"))
        client.enqueue(EnqueueRequest("q", "t", id="soon", delay=0.2))
    assert all_done(conn)


def test_an_idle_worker_relieves_the_one_that_was_shut_down(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    # One worker asks to be notified, on behalf of all that share its queue.
    observer = Recorder()
    workers = []
    for n in range(2):
        mux = Mux().register("t", lambda _: None)
        workers.append(launcher.start(mux, observer=observer, poll_interval=NEVER))
        assert eventually(lambda: sleeper(conn) is not None)
    for n, worker in enumerate(workers):
        launcher.enqueue(str(n))
        observer.wait_for("completed", str(n))
        launcher.shutdown(worker)


def fleet(launcher: Launcher, conn: psycopg.Connection, mux: Mux, spares: int) -> list[Any]:
    """Start as many workers as are notified, and spares; wait until all have their places."""
    workers = [
        launcher.start(mux, observer=NoopObserver(), concurrency=1, poll_interval=NEVER)
        for _ in range(POSTS + 1 + spares)
    ]
    # They have had time to read the answer, and to subscribe.
    seated = (
        "select count(distinct pid) from pg_locks join pg_stat_activity using (pid) "
        "where locktype = 'advisory' and objid = %s and state = 'idle' "
        "and state_change < clock_timestamp() - interval '0.2 s'"
    )
    assert eventually(lambda: row(conn, seated, _seated("q") % 2**32) == (spares,))
    return workers


def test_spares_are_called_while_all_that_are_notified_are_busy(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate, spares = Gate(), 3
    fleet(launcher, conn, Mux().register("t", gate), spares)
    for n in range(POSTS + 1 + spares):
        launcher.enqueue(f"one {n}")
        gate.wait()  # the others are busy, one after the other
    gate.released.set()
    assert all_done(conn)


def test_an_idle_spare_leaves_a_server_that_comes_back_to_the_others(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def longest(_: float, most: float) -> float:
        pauses.append(most)
        return most

    monkeypatch.setattr(control, "_LONGEST_PAUSE", NEVER)
    workers = fleet(launcher, conn, Mux(), spares=2)
    monkeypatch.setattr(control, "uniform", longest)
    terminate_workers(conn)

    def connected() -> int:
        healths = [worker.health().queues["q"] for worker in workers]
        return sum(health.is_connected for health in healths)

    assert eventually(lambda: len(pauses) == 2 and connected() == POSTS + 1)
    asked = [launcher.run(worker.shutdown(timeout=NEVER)) for worker in workers]
    assert asked == [True] * len(workers)


# -- shutdown -----------------------------------------------------------------------------


@both_styles
def test_shutdown_finishes_running_jobs_and_releases_those_that_have_not_started(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    gate = Gate()
    mux = Mux().register("quick", handler(style, lambda _: None)).register("slow", gate.of(style))
    launcher.enqueue(*(f"quick {n:03}" for n in range(200)), type="quick")
    launcher.enqueue("slow", type="slow")
    launcher.enqueue(*(f"unstarted {n:03}" for n in range(200)), type="quick")
    worker = launcher.start(mux)
    gate.wait()
    answers: list[bool] = []
    ending = threading.Thread(
        target=lambda: answers.append(launcher.shutdown(worker, timeout=None))
    )
    ending.start()
    held = "select id, attempt from bgjob_job where token is not null or attempt <> 0"
    assert eventually(lambda: rows(conn, held) == [("slow", 1)])
    gate.released.set()
    ending.join()
    assert answers == [True]
    assert rows(conn, held) == []
    left = "select count(*), count(*) filter (where lease_until is null) from bgjob_job"
    assert row(conn, left + " where id like 'unstarted%%'") == (200, 200)
    assert count(conn) == 200


def test_shutdown_may_be_called_again(launcher: Launcher) -> None:
    worker = launcher.start(Mux())
    assert launcher.shutdown(worker)
    assert launcher.shutdown(worker)
    assert launcher.shutdown(worker, timeout=0)


def test_a_worker_that_was_shut_down_before_it_ran_does_not_run(launcher: Launcher) -> None:
    worker = launcher.make(Mux())
    assert launcher.shutdown(worker)
    with pytest.raises(RuntimeError, match="runs once"):
        launcher.run(worker.run())


def test_a_worker_runs_once(launcher: Launcher) -> None:
    worker = launcher.start(Mux())
    with pytest.raises(RuntimeError, match="runs once"):
        launcher.run(worker.run())
    launcher.shutdown(worker)
    with pytest.raises(RuntimeError, match="runs once"):
        launcher.run(worker.run())


@pytest.mark.every_combination
@pytest.mark.both_colours
@both_styles
def test_a_handler_may_shut_its_worker_down(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    returned = threading.Event()

    def plain(_: Job) -> None:
        worker = workers[0]
        if launcher.is_async:
            asyncio.run(worker.shutdown())
        else:
            worker.shutdown()
        returned.set()

    async def coroutine(_: Job) -> None:
        worker = workers[0]
        if launcher.is_async:
            await worker.shutdown()
        else:
            worker.shutdown()
        returned.set()

    launcher.enqueue("a", "b")
    workers: list[Any] = [
        launcher.make(Mux().register("t", plain if style == "plain" else coroutine))
    ]
    launcher.run(workers[0].run())
    assert returned.wait(PATIENCE)
    assert launcher.shutdown(workers[0])
    assert rows(conn, "select id, attempt, token from bgjob_job") == [("b", 0, None)]


@pytest.mark.both_colours
def test_an_observer_may_shut_its_worker_down(launcher: Launcher, conn: psycopg.Connection) -> None:
    returned = threading.Event()

    class Last(NoopObserver):
        def job_completed(self, _: Job, /) -> None:
            answer = workers[0].shutdown()
            if launcher.is_async:
                asyncio.run(answer)
            returned.set()

    launcher.enqueue("a")
    workers: list[Any] = [launcher.make(Mux().register("t", lambda _: None), observer=Last())]
    launcher.run(workers[0].run())
    assert returned.wait(PATIENCE)
    assert launcher.shutdown(workers[0])
    assert count(conn) == 0


@pytest.mark.both_colours
@both_styles
def test_several_threads_may_shut_a_worker_down(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    gate = Gate()
    launcher.enqueue("a")
    worker = launcher.start(Mux().register("t", gate.of(style)))
    gate.wait()
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.append(launcher.shutdown(worker))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    gate.released.set()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4
    assert count(conn) == 0


@both_styles
def test_after_its_grace_period_shutdown_abandons_running_jobs_and_refunds_their_attempts(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    gate = Gate()
    launcher.enqueue("a", "b")
    worker = launcher.start(Mux().register("t", gate.of(style)))
    gate.wait()
    assert launcher.shutdown(worker, timeout=timedelta(milliseconds=50)) is False
    gate.released.set()
    claims = rows(
        conn,
        "select id, attempt, token is not null, lease_until > clock_timestamp() "
        "from bgjob_job order by id",
    )
    # A thread may run on, and keeps its lease; a coroutine was cancelled, and is due again.
    held = ("a", 0, True, True) if style == "plain" else ("a", 0, False, None)
    assert claims == [held, ("b", 0, False, None)]
    assert len(gate.runs) == 1


def test_shutdown_returns_false_where_a_result_could_not_be_stored(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate = Gate()
    observer = Recorder()
    launcher.enqueue("a")
    worker = launcher.start(Mux().register("t", gate), observer=observer)
    gate.wait()
    database = conn.info.dbname
    with psycopg.connect(make_conninfo(launcher.dsn, dbname="postgres"), autocommit=True) as admin:
        admin.execute(f'alter database "{database}" allow_connections false')
        terminate_workers(conn)
        observer.wait_for("error")
        gate.released.set()
        assert launcher.shutdown(worker, timeout=0.5) is False
        admin.execute(f'alter database "{database}" allow_connections true')
    assert count(conn) == 1


@pytest.mark.both_colours
def test_leaving_a_worker_shuts_it_down(launcher: Launcher, conn: psycopg.Connection) -> None:
    observer = Recorder()
    launcher.enqueue("a", "b")
    worker = launcher.make(Mux().register("t", lambda _: None), observer=observer)

    async def use() -> None:
        async with worker as entered:
            assert entered is worker
            await asyncio.to_thread(observer.wait_for, "completed", "b")

    if launcher.is_async:
        launcher.run(use())
    else:
        with worker as entered:
            assert entered is worker
            observer.wait_for("completed", "b")
    with pytest.raises(RuntimeError):
        launcher.run(worker.run())


def test_nothing_is_left_after_shutdown_and_close(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    threads = set(threading.enumerate())
    mux = Mux().register("t", lambda _: None).register("c", handler("coroutine", lambda _: None))
    client = Client(launcher.dsn)
    for type_ in "tc":
        client.bulk_enqueue([EnqueueRequest("q", type_) for _ in range(50)])
    worker = launcher.start(mux, concurrency=5)
    assert all_done(conn)
    assert launcher.shutdown(worker)
    client.close()
    # Those of the launcher's own client are recognised by their names.
    assert eventually(
        lambda: (
            not [
                t for t in set(threading.enumerate()) - threads if not t.name.startswith("asyncio_")
            ]
        )
    )
    assert eventually(
        lambda: (
            row(
                conn,
                "select count(*) from pg_stat_activity "
                "where datname = current_database() and pid <> pg_backend_pid() "
                f"and application_name <> '{KEEPER}'",
            )
            == (0,)
        )
    )
    assert eventually(
        lambda: (
            row(
                conn,
                "select count(*) from pg_locks where locktype = 'advisory' and database = "
                "(select oid from pg_database where datname = current_database())",
            )
            == (0,)
        )
    )


@pytest.mark.both_colours
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_refuses_to_be_shut_down_in_a_fork(launcher: Launcher) -> None:
    observer = Recorder()
    worker = launcher.start(Mux().register("t", lambda _: None), observer=observer)
    child = os.fork()
    if child == 0:
        try:
            answer = worker.shutdown(timeout=0)
            asyncio.run(answer) if launcher.is_async else answer
        except BgjobError:
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    launcher.enqueue("a")
    observer.wait_for("completed", "a")


# -- leases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["plain", "coroutine", "blocking coroutine"])
def test_the_lease_of_a_long_handler_is_extended(
    launcher: Launcher, conn: psycopg.Connection, style: str
) -> None:
    never = threading.Event()
    runs: list[int] = []

    def plain(job: Job) -> None:
        runs.append(job.attempt)
        never.wait(2.2)

    async def coroutine(job: Job) -> None:
        runs.append(job.attempt)
        await asyncio.sleep(2.2)

    async def blocking(job: Job) -> None:
        plain(job)

    handlers: dict[str, Any] = {
        "plain": plain,
        "coroutine": coroutine,
        "blocking coroutine": blocking,
    }
    mux = Mux().register("t", handlers[style])
    launcher.enqueue("a")
    launcher.start(mux, lease=1, poll_interval=0.1)
    with Client(launcher.dsn) as client:
        other = Worker(client, "q", Mux().register("t", plain), lease=1, poll_interval=0.1)
        with other:
            assert all_done(conn)
    assert runs == [1]


@pytest.mark.parametrize("result", [Complete(), Retry(0), Reschedule(0), MoveToDlq("why")])
def test_a_result_that_comes_after_the_lease_was_lost_leaves_the_newer_claim_alone(
    launcher: Launcher, conn: psycopg.Connection, result: Result
) -> None:
    gate = Gate(result)
    observer = Recorder()
    launcher.enqueue("a")
    launcher.start(Mux().register("t", gate), observer=observer)
    gate.wait()
    conn.execute(
        "update bgjob_job set token = 1, attempt = 2, last_error = 'newer', "
        "lease_until = clock_timestamp() + interval '1 hour'"
    )
    newer = rows(conn, "select * from bgjob_job")
    gate.released.set()
    observer.wait_for("lost", "a")
    assert rows(conn, "select * from bgjob_job") == newer
    assert launcher.client.dlq.list() == []
    assert observer.of("completed", "retried", "rescheduled", "dead") == []


def test_a_lost_lease_is_noticed_while_the_handler_runs(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate = Gate()
    observer = Recorder()
    launcher.enqueue("a")
    worker = launcher.start(Mux().register("t", gate), observer=observer, lease=1)
    gate.wait()
    conn.execute("update bgjob_job set token = 1, lease_until = 'infinity'")
    observer.wait_for("lost", "a")
    gate.released.set()
    launcher.enqueue("b")
    observer.wait_for("completed", "b")
    assert launcher.shutdown(worker)
    assert observer.of("lost") == [("lost", "a", 1)]
    assert rows(conn, "select id, token from bgjob_job") == [("a", 1)]


def test_the_job_of_a_worker_that_died_is_run_again_when_its_lease_has_ended(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    launcher.enqueue("a", "b")
    conn.execute(
        "update bgjob_job set token = 1, attempt = 1, lease_until = clock_timestamp() "
        "+ case id when 'b' then interval '1 hour' else '0.5 s' end"
    )
    [ends] = row(conn, "select lease_until from bgjob_job where id = 'a'")
    began: list[tuple[str, int, bool]] = []
    launcher.start(
        Mux().register("t", lambda job: began.append((job.id, job.attempt, clock(conn) >= ends))),
        poll_interval=0.05,
    )
    assert eventually(lambda: rows(conn, "select id, attempt from bgjob_job") == [("b", 1)])
    assert began == [("a", 2, True)]


def test_a_job_that_keeps_killing_its_worker_runs_out_of_attempts(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate = Gate()
    gate.released.set()
    observer = Recorder()
    launcher.enqueue("killer", "last chance")
    conn.execute(
        "update bgjob_job set token = 1, lease_until = clock_timestamp() - interval '1 s', "
        "last_error = 'why', deaths = 1, attempt = case id when 'killer' then 5 else 4 end"
    )
    launcher.start(Mux().register("t", gate, max_attempts=3), observer=observer)
    observer.wait_for("dead", "killer")
    observer.wait_for("completed", "last chance")
    [dead] = launcher.client.dlq.list()
    assert dead.last_error is not None
    assert "out of attempts: 3 of 3 were charged" in dead.last_error
    assert "its worker died or lost the lease; last error: why" in dead.last_error
    assert [(job.id, job.attempt) for job in gate.runs] == [("last chance", 5)]


def test_the_last_attempt_of_a_job_that_was_not_alone_when_its_worker_died_is_given_again(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    launcher.enqueue("a")
    conn.execute("update bgjob_job set token = 1, lease_until = '-infinity', attempt = 3")
    launcher.start(Mux().register("t", lambda _: Retry(0), max_attempts=3), observer=observer)
    observer.wait_for("dead", "a")
    assert observer.of("started") == [("started", "a", 4)]


# -- a connection that is killed ---------------------------------------------------------------


def test_an_idle_worker_whose_connection_was_killed_connects_again(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    killed: set[int | None] = {None}
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)
    for n in range(3):
        assert eventually(lambda: sleeper(conn) not in killed)
        killed.add(sleeper(conn))
        assert terminate_workers(conn) == 1
        assert eventually(lambda: sleeper(conn) not in killed)
        launcher.enqueue(str(n))
        observer.wait_for("completed", str(n))
    [first, *_] = observer.of("error")
    assert isinstance(first[1], psycopg.OperationalError)


@both_styles
def test_results_outlive_the_connection_that_was_killed_while_handlers_ran(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    gate = Gate()
    observer = Recorder()
    launcher.enqueue(*"abc")
    launcher.start(Mux().register("t", gate.of(style)), observer=observer, concurrency=3)
    for _ in "abc":
        gate.wait()
    assert terminate_workers(conn) == 1
    gate.released.set()
    for id_ in "abc":
        observer.wait_for("completed", id_)
    assert count(conn) == 0
    assert sorted(job.id for job in gate.runs) == ["a", "b", "c"]


def test_an_exchange_on_a_killed_connection_raises_and_leaves_nothing_unraisable(
    dsn: str,
    conn: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # psycopg's generators still speak to the connection when they are collected, which
    # a logged error would put off.
    caplog.set_level(logging.CRITICAL, logger="psycopg")
    complaints: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", complaints.append)
    for number in range(10):
        session = session_of(dsn)
        session.open()
        assert terminate_workers(conn) == 1
        assert eventually(lambda: terminate_workers(conn) == 0)
        with pytest.raises(psycopg.OperationalError):
            session.exchange(Exchange(claim=Sweep(1, number)))
        assert not session.is_open
        session.close()
        gc.collect()
    assert complaints == []


def test_an_exchange_that_cannot_be_encoded_leaves_nothing_behind(
    dsn: str, launcher: Launcher, conn: psycopg.Connection
) -> None:
    launcher.enqueue("a", "b")
    session = session_of(dsn)
    session.open()
    [job] = session.exchange(Exchange(claim=Sweep(1, 1))).swept.jobs
    delay: Any = "soon"
    exchange = Exchange(claim=Sweep(1, 2))
    exchange.postpone.append(Postponed(Claimed(job, 1), delay, None, refund=False))
    exchange.postpone.append(Postponed(Claimed(job, 1), 1.0, None, refund=False))
    with pytest.raises(psycopg.DataError):
        session.exchange(exchange)
    assert session.is_open
    assert rows(conn, "select token from bgjob_job order by id") == [(1,), (None,)]
    session.close()


def test_a_settlement_whose_connection_was_killed_is_sent_again(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    results: dict[str, Result] = {
        "a": Complete(),
        "b": MoveToDlq("why"),
        "c": Retry(NEVER, "why"),
    }
    gate = Gate()
    observer = Recorder()
    runs: list[str] = []

    def body(job: Job) -> Result:
        runs.append(job.id)
        gate(job)
        return results[job.id]

    launcher.enqueue(*"abc")
    launcher.start(Mux().register("t", body), observer=observer, concurrency=3)
    for _ in "abc":
        gate.wait()

    def settles() -> bool:
        waiting = (
            "select count(*) from pg_stat_activity where datname = current_database() "
            "and application_name = 'bgjob' and wait_event_type = 'Lock'"
        )
        return row(conn, waiting) == (1,)

    with psycopg.connect(launcher.dsn) as blocker:
        blocker.execute("lock table bgjob_job in share mode")
        gate.released.set()
        assert eventually(settles)
        assert terminate_workers(conn) == 1
    observer.wait_for("completed", "a")
    observer.wait_for("dead", "b")
    observer.wait_for("retried", "c")
    assert sorted(runs) == ["a", "b", "c"]
    assert rows(conn, "select id, attempt, last_error, token from bgjob_job") == [
        ("c", 1, "why", None)
    ]
    assert [dead.id for dead in launcher.client.dlq.list()] == ["b"]


def test_a_settlement_that_the_server_refuses_is_kept_and_blocks_no_other(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute(
        "create function refuse() returns trigger language plpgsql as "
        "$$ begin if old.id = 'refused' then raise disk_full; end if; return old; end $$"
    )
    conn.execute(
        "create trigger refuse before delete on bgjob_job for each row execute function refuse()"
    )
    runs: Counter[str] = Counter()
    observer = Recorder()
    launcher.enqueue("refused", *(str(n) for n in range(100)))
    launcher.start(
        Mux().register("t", lambda job: runs.update([job.id])),
        observer=observer,
        concurrency=4,
        poll_interval=0.1,
    )
    assert eventually(lambda: rows(conn, "select id from bgjob_job") == [("refused",)])
    assert observer.of("error")
    conn.execute("drop trigger refuse on bgjob_job")
    observer.wait_for("completed", "refused")
    assert set(runs.values()) == {1}


REFUSALS: dict[str, LiteralString] = {
    "constraint": "alter table bgjob_job add check (id not like 'bad%' or attempt = 0)",
    "trigger": (
        "create function refuse() returns trigger language plpgsql as "
        "$$ begin if old.id like 'bad%' then raise 'not this one'; end if; return new; end $$; "
        "create trigger refuse before update on bgjob_job for each row execute function refuse()"
    ),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_jobs_whose_claim_the_server_refuses_are_dead_lettered_alone(
    launcher: Launcher, conn: psycopg.Connection, how: str
) -> None:
    conn.execute(REFUSALS[how])
    bad = [f"bad {n}" for n in range(32)]
    good = [f"{n}" for n in range(60)]
    launcher.enqueue(*bad[:30], *good[:30], bad[30], *good[30:], bad[31])
    observer = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=0.1)
    for id in good:
        observer.wait_for("completed", id)
    assert eventually(lambda: len(launcher.client.dlq.list()) == len(bad))
    for dead in launcher.client.dlq.list():
        assert dead.id in bad
        assert "could not be claimed" in (dead.last_error or "")
    assert [group.jobs for group in launcher.client.dlq.groups()] == [len(bad)]
    assert {event[1] for event in observer.of("started")} == set(good)
    assert eventually(lambda: any("bad 0" in str(event[1]) for event in observer.of("error")))


def test_where_the_server_refuses_every_claim_no_job_is_dead_lettered(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute(
        "create function refuse() returns trigger language plpgsql as "
        "$$ begin raise 'closed for maintenance'; end $$; "
        "create trigger refuse before update on bgjob_job for each row execute function refuse()"
    )
    ids = [f"{n}" for n in range(70)]
    launcher.enqueue(*ids)
    observer = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=0.1)
    observer.wait_for("error", times=2)
    assert count(conn) == len(ids)
    conn.execute("drop trigger refuse on bgjob_job")
    for id in ids:
        observer.wait_for("completed", id)
    assert launcher.client.dlq.list() == []


# -- observers ---------------------------------------------------------------------------------


def test_an_observer_receives_each_event_of_a_job_in_order_and_after_its_commit(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    looked = threading.Event()
    stored: list[tuple[str, tuple[Any, ...]]] = []

    class Looking(Recorder):
        def job_will_be_retried(self, job: Job, delay: float, error: Any, /) -> None:
            super().job_will_be_retried(job, delay, error)
            stored.append(("retried", row(conn, "select last_error from bgjob_job")))
            looked.set()

        def job_completed(self, job: Job, /) -> None:
            stored.append(("completed", row(conn, "select count(*) from bgjob_job")))
            super().job_completed(job)

    def fail_once(job: Job) -> Result:
        if job.attempt == 1:
            return Retry(0, error="why")
        assert looked.wait(PATIENCE)
        return Complete()

    observer = Looking()
    launcher.enqueue("a")
    launcher.start(Mux().register("t", fail_once), observer=observer)
    observer.wait_for("completed", "a")
    mine = [event for event in observer.events if event[1] == "a"]
    assert [e for e in mine if e[0] == "started"] == [("started", "a", 1), ("started", "a", 2)]
    outcomes = [e for e in mine if e[0] != "started"]
    assert outcomes == [("retried", "a", 1, 0, "why"), ("completed", "a", 2)]
    assert mine.index(("started", "a", 1)) < mine.index(outcomes[0])
    assert mine.index(("started", "a", 2)) < mine.index(outcomes[1])
    assert stored == [("retried", ("why",)), ("completed", (0,))]


@both_styles
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_observer_that_raises_harms_nothing(
    launcher: Launcher,
    conn: psycopg.Connection,
    style: Style,
    error: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Recorder):
        def job_started(self, job: Job, /) -> None:
            super().job_started(job)
            raise error("in job_started")

        def job_completed(self, job: Job, /) -> None:
            super().job_completed(job)
            raise error("in job_completed")

    observer = Broken()
    launcher.enqueue(*"abc")
    worker = launcher.start(Mux().register("t", handler(style, lambda _: None)), observer=observer)
    assert all_done(conn)
    observer.wait_for("completed", times=3)
    assert launcher.shutdown(worker)
    assert {r.getMessage() for r in caplog.records if "observer" in r.getMessage()} == {
        "observer failed in job_started",
        "observer failed on Complete",
    }


def test_a_large_bulk_enqueue_wakes_a_worker(launcher: Launcher) -> None:
    observer = Recorder()
    mux = Mux().register("t", handler("plain", lambda _: None))
    worker = launcher.start(mux, poll_interval=NEVER, observer=observer)
    observer.wait_for("empty")
    launcher.enqueue(*(f"{n:04}" for n in range(1_000)))
    observer.wait_for("completed", times=1_000)
    assert launcher.shutdown(worker)


@both_styles
def test_a_slow_job_among_quick_ones_delays_no_job_while_a_slot_is_idle(
    launcher: Launcher, style: Style
) -> None:
    gate, followed = Gate(), threading.Event()
    mux = Mux().register("quick", handler(style, lambda _: None))
    mux.register("slow", gate.of(style)).register("next", handler(style, lambda _: followed.set()))
    quick = [EnqueueRequest("q", "quick") for _ in range(3000)]
    launcher.client.bulk_enqueue([*quick, EnqueueRequest("q", "slow"), EnqueueRequest("q", "next")])
    observer = Recorder()
    worker = launcher.start(mux, concurrency=2, poll_interval=NEVER, observer=observer)
    assert followed.wait(PATIENCE)
    gate.released.set()
    observer.wait_for("completed", times=3002)
    assert launcher.shutdown(worker)


def test_an_observer_that_blocks_delays_no_job(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    blocked, released = threading.Event(), threading.Event()

    class Blocking(Recorder):
        def job_completed(self, job: Job, /) -> None:
            blocked.set()
            assert released.wait(PATIENCE)
            super().job_completed(job)

    observer = Blocking()
    launcher.enqueue(*(str(n) for n in range(50)))
    launcher.start(Mux().register("t", lambda _: None), observer=observer)
    assert blocked.wait(PATIENCE)
    assert all_done(conn)
    assert observer.of("completed") == []
    released.set()
    observer.wait_for("completed", times=50)


def test_an_observer_that_blocks_does_not_keep_a_worker_from_its_shutdown(
    launcher: Launcher, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    blocked, released = threading.Event(), threading.Event()

    class Blocking(NoopObserver):
        def job_completed(self, _: Job, /) -> None:
            blocked.set()
            assert released.wait(PATIENCE)

    launcher.enqueue("a")
    worker = launcher.start(Mux().register("t", lambda _: None), observer=Blocking())
    assert blocked.wait(PATIENCE)
    assert launcher.shutdown(worker)
    assert "observer of queue 'q' blocks" in caplog.text
    released.set()


def test_an_observer_is_notified_each_time_the_queue_has_become_empty(launcher: Launcher) -> None:
    gate = Gate()
    observer = Recorder()
    launcher.enqueue("0")
    launcher.start(Mux().register("t", gate), observer=observer, poll_interval=NEVER)
    gate.wait()
    assert observer.of("empty") == []
    gate.released.set()
    for n in range(10):
        observer.wait_for("completed", str(n))
        assert eventually(lambda: observer.events[-1] == ("empty", "q")), observer.events
        launcher.enqueue(str(n + 1))


# -- what keeps a worker from its start -------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ("drop table bgjob_job, bgjob_dead_job", "apply migration/init.sql"),
        ("drop table bgjob_dead_job", "apply migration/init.sql"),
        ("drop table bgjob_job", "apply migration/init.sql"),
        ("drop table bgjob_pause", "apply migration/init.sql"),
        ("comment on table bgjob_job is null", "apply migration/init.sql completely"),
        ("comment on table bgjob_job is 'ours'", "apply migration/init.sql completely"),
        ("comment on table bgjob_job is 'bgjob schema 0'", "version 0, .*: upgrade the schema"),
        ("comment on table bgjob_job is 'bgjob schema 99'", "version 99, .*: upgrade the bgjob"),
        (
            "comment on table bgjob_job is 'bgjob schema 4, works with 2'",
            "version 4, .* needs 1: upgrade the bgjob",
        ),
        ("comment on table bgjob_job is 'bgjob schema 2, works'", "migration/init.sql completely"),
        ("create schema s; alter table bgjob_job set schema s", "set the search_path"),
    ],
)
def test_a_worker_refuses_a_schema_that_is_not_its_own_and_names_the_remedy(
    launcher: Launcher, conn: psycopg.Connection, change: LiteralString, remedy: str
) -> None:
    conn.execute(change)
    worker = launcher.make(Mux())
    with pytest.raises(SchemaError, match=remedy):
        launcher.run(worker.run())
    launcher.shutdown(worker)


def test_a_deploy_that_adds_a_column_stops_no_worker_of_the_older_version(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    mux = Mux().register("t", lambda _: Complete())
    launcher.start(mux, observer=observer, poll_interval=0.1)
    launcher.enqueue("a")
    observer.wait_for("completed", "a")
    conn.execute(
        "alter table bgjob_job add column colour text; "
        "comment on table bgjob_job is 'bgjob schema 2, works with 1'"
    )
    terminate_workers(conn)
    launcher.enqueue("b")
    observer.wait_for("completed", "b")
    other = Recorder()
    launcher.start(mux, observer=other, queue="r")  # one that starts works as well
    launcher.enqueue("c", queue="r")
    other.wait_for("completed", "c")


@pytest.mark.parametrize("comment", ["'bgjob schema 2'", "'ours'", "null"])
def test_a_worker_goes_on_after_a_deploy_while_the_tables_have_the_columns_that_it_needs(
    launcher: Launcher, conn: psycopg.Connection, comment: LiteralString
) -> None:
    observer = Recorder()
    mux = Mux().register("t", lambda _: Complete())
    launcher.start(mux, observer=observer, poll_interval=0.1)
    conn.execute(f"comment on table bgjob_job is {comment}")
    terminate_workers(conn)
    launcher.enqueue("a")
    observer.wait_for("completed", "a")
    conn.execute("alter table bgjob_job rename column deaths to lives")
    terminate_workers(conn)
    assert eventually(lambda: "no column deaths" in str(observer.of("error")))
    conn.execute("alter table bgjob_job rename column lives to deaths")
    launcher.enqueue("b")
    observer.wait_for("completed", "b")


def test_a_worker_that_could_not_start_can_be_run_again(launcher: Launcher, empty_dsn: str) -> None:
    worker = launcher.make(Mux(), dsn=empty_dsn)
    with pytest.raises(SchemaError):
        launcher.run(worker.run())
    with psycopg.connect(empty_dsn) as conn:
        conn.execute(init_sql().encode())
    launcher.run(worker.run())
    assert launcher.shutdown(worker)


def test_the_tables_may_lie_in_any_schema_of_the_search_path(
    launcher: Launcher, empty_dsn: str
) -> None:
    observer = Recorder()
    with psycopg.connect(empty_dsn) as conn:
        conn.execute("create schema jobs")
        conn.execute("set search_path to jobs")
        conn.execute(init_sql().encode())
    dsn = make_conninfo(empty_dsn, options="-csearch_path=jobs")
    worker = launcher.make(Mux().register("t", lambda _: None), dsn=dsn, observer=observer)
    launcher.run(worker.run())
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="a"))
    observer.wait_for("completed", "a")
    assert launcher.shutdown(worker)


def test_a_worker_that_cannot_connect_raises_immediately(launcher: Launcher) -> None:
    worker = launcher.make(Mux(), dsn="host=127.0.0.1 port=1 dbname=none")
    with pytest.raises(psycopg.OperationalError):
        launcher.run(worker.run())
    launcher.shutdown(worker)


def test_a_worker_that_never_ran_leaves_nothing_open(launcher: Launcher, empty_dsn: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launcher.make(Mux())
        failed = launcher.make(Mux(), dsn=empty_dsn)
        with pytest.raises(SchemaError) as error:
            launcher.run(failed.run())
        del failed, error
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"queue": ""}, "queue is required"),
        ({"queue": "a\0"}, "queue must not contain NUL"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"poll_interval": 0}, "poll_interval must be at least 0.001 s"),
        ({"poll_interval": float("nan")}, "poll_interval must be from 0"),
        ({"lease": 0.5}, "lease must be at least 1 s"),
        ({"lease": -1}, "lease must be from 0"),
        ({"grace": -1}, "grace must be from 0"),
    ],
)
def test_a_worker_refuses_bad_options_by_name(
    launcher: Launcher, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        launcher.make(Mux(), **options)
    assert issubclass(QueueRequiredError, ValueError)


# -- rows that were spoiled ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        "next_run_at = '-infinity'",
        "next_run_at = '4713-01-01 BC'",
        "created_at = '-infinity', updated_at = 'infinity'",
        "attempt = 2147483647",
        "attempt = -5",
        "arg = 'no json'",
        "token = -1, lease_until = '-infinity'",
        "queue = 'q', last_error = repeat('x', 1000000)",
    ],
)
@pytest.mark.parametrize("result", [Complete(), Retry(NEVER, "e"), Reschedule(NEVER)])
def test_a_spoiled_row_affects_itself_only(
    launcher: Launcher, conn: psycopg.Connection, spoil: LiteralString, result: Result
) -> None:
    def handle(job: Job) -> Result | None:
        if job.id != "bad":
            return None
        job.json()
        return result

    launcher.enqueue("1", "2", "bad", "3")
    conn.execute("update bgjob_job set " + spoil + " where id = 'bad'")
    observer = Recorder()
    mux = Mux().register("t", handle, max_attempts=None, backoff=lambda _: NEVER)
    launcher.start(mux, observer=observer, poll_interval=0.05)
    for id_ in "123":
        observer.wait_for("completed", id_)
    assert eventually(lambda: rows(conn, "select 1 from bgjob_job where token is not null") == [])
    launcher.enqueue("4")
    observer.wait_for("completed", "4")
    assert observer.of("error") == []
    assert len([event for event in observer.of("started") if event[1] == "bad"]) == 1


@pytest.mark.parametrize("never", ["next_run_at = 'infinity'", "lease_until = 'infinity'"])
def test_a_row_that_is_never_due_is_left_alone(
    launcher: Launcher, conn: psycopg.Connection, never: LiteralString
) -> None:
    observer = Recorder()
    launcher.enqueue("1", "bad", "2")
    conn.execute("update bgjob_job set " + never + " where id = 'bad'")
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=0.05)
    for id_ in "12345":
        observer.wait_for("completed", id_)
        launcher.enqueue(str(int(id_) + 2))
    observer.wait_for("completed", "7")
    assert rows(conn, "select id, attempt from bgjob_job") == [("bad", 0)]
    assert observer.of("error") == []
