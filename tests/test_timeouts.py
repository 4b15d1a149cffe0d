"""A handler's time is limited: an attempt that outlives it fails, and delays no other."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from support.database import all_done, row, rows
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Launcher, Gate, Recorder, Style, both_styles, handler

from bgjob import (
    AsyncClient,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
)
from bgjob.errors import JobTimeoutError
from bgjob.mux import Handler

EFFECT = "create table effect (job_id text, attempt int)"


class Sleepless:
    """A coroutine handler that ignores every cancellation until it is let go."""

    def __init__(self) -> None:
        self.released = threading.Event()

    async def __call__(self, job: Job) -> None:
        while not self.released.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                continue


class Errors(Recorder):
    """Keeps the errors themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Any] = []

    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        self.errors.append(error)
        super().job_moved_to_dlq(job, error)


def on_first_attempt(gate: Gate, style: Style) -> Handler:
    """Make a handler that waits at a gate at its first attempt, and completes at later ones."""

    def plain(job: Job) -> Result | None:
        return gate(job) if job.attempt == 1 else None

    async def coroutine(job: Job) -> Result | None:
        return await gate.coroutine(job) if job.attempt == 1 else None

    return plain if style == "plain" else coroutine


# -- an attempt that takes too long has failed -------------------------------------------------


@both_styles
def test_a_job_that_times_out_is_reported_once_and_then_retried(
    launcher: Launcher, style: Style
) -> None:
    gate, observer = Gate(), Recorder()
    mux = Mux().register("t", on_first_attempt(gate, style), timeout=0.1, backoff=lambda _: 0.05)
    launcher.enqueue("a")
    # Nobody polls: the worker wakes up for the timeout itself.
    launcher.start(mux, observer=observer, poll_interval=NEVER)
    observer.wait_for("completed", "a")
    message = "job 'a' of type 't' did not end within its timeout of 0.1 s"
    assert observer.of("timed_out", "retried", "completed", "lost") == [
        ("timed_out", "a", 1, 0.1),
        ("retried", "a", 1, 0.05, message),
        ("completed", "a", 2),
    ]
    gate.released.set()


@both_styles
def test_a_job_that_times_out_at_its_last_attempt_goes_to_the_dlq(
    launcher: Launcher, style: Style
) -> None:
    gate, observer = Gate(), Errors()
    mux = Mux().register("t", gate.of(style), timeout=0.1, max_attempts=1)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", "a")
    assert [event[0] for event in observer.of("timed_out", "dead")] == ["timed_out", "dead"]
    [dead] = launcher.client.dlq.list()
    first, *places = (dead.last_error or "").splitlines()
    assert first == "JobTimeoutError: job 'a' of type 't' did not end within its timeout of 0.1 s"
    if style == "coroutine":  # where the handler was
        assert places[-2].endswith("in sleep")
        assert places[-1].endswith("in Gate.coroutine")
    [error] = observer.errors
    assert isinstance(error, JobTimeoutError)
    assert isinstance(error, TimeoutError)
    gate.released.set()


@both_styles
@pytest.mark.parametrize(
    ("result", "event"),
    [
        (None, "completed"),
        (Reschedule(NEVER), "rescheduled"),
        (Retry(NEVER), "retried"),
        (MoveToDlq("no"), "dead"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_handler_that_ends_in_time_is_as_without_a_timeout(
    launcher: Launcher, style: Style, result: Result | None, event: str
) -> None:
    observer = Recorder()
    mux = Mux().register("t", handler(style, lambda _: result), timeout=NEVER)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for(event, "a")
    assert observer.of("timed_out", "lost", "error") == []


@both_styles
@pytest.mark.parametrize("transactional", [False, True], ids=["", "transactional"])
def test_a_handler_that_ends_at_its_timeout_has_one_outcome_and_one_effect(
    launcher: Launcher, conn: psycopg.Connection, style: Style, transactional: bool
) -> None:
    conn.execute(EFFECT)
    waits = iter(0.05 + (n - 20) / 2000 for n in range(40))
    insert = "insert into effect values (%s, 1)"

    def plain(job: Job, conn: psycopg.Connection | None = None) -> None:
        if conn is not None:
            conn.execute(insert, [job.id])
        time.sleep(next(waits))

    async def coroutine(job: Job, conn: psycopg.AsyncConnection | None = None) -> None:
        if conn is not None:
            await conn.execute(insert, [job.id])
        await asyncio.sleep(next(waits))

    register: Any = Mux().register
    mux = register(
        "t",
        plain if style == "plain" else coroutine,
        timeout=0.05,
        max_attempts=1,
        transactional=transactional,
    )
    observer = Recorder()
    ids = [f"j{n}" for n in range(40)]
    launcher.enqueue(*ids)
    launcher.start(mux, observer=observer, concurrency=4)
    assert all_done(conn)
    assert eventually(lambda: len(observer.of("completed", "dead", "lost")) >= 40)
    completed = {event[1] for event in observer.of("completed")}
    dead = {event[1] for event in observer.of("dead")}
    assert sorted(completed | dead) == sorted(ids)
    assert not completed & dead
    assert observer.of("lost") == []
    assert Counter(event[1] for event in observer.of("timed_out")) == Counter(dead)
    if transactional:
        effects = [id_ for [id_] in rows(conn, "select job_id from effect")]
        assert sorted(effects) == sorted(completed)


def test_the_late_result_of_a_thread_is_dropped_and_the_thread_works_on(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate, observer = Gate(Reschedule(0)), Recorder()
    mux = Mux().register("t", gate, timeout=0.1, max_attempts=1).register("u", lambda _: None)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", "a")
    gate.released.set()
    launcher.enqueue(*[f"b{n}" for n in range(20)], type="u")
    assert all_done(conn)
    observer.wait_for("completed", times=20)
    assert observer.of("rescheduled", "retried", "lost", "error") == []
    assert len(observer.of("timed_out", "dead")) == 2


# -- transactions ------------------------------------------------------------------------------


def test_a_transaction_of_a_thread_that_ends_late_is_rolled_back(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute(EFFECT)
    gate, observer = Gate(), Recorder()

    def handle(job: Job, conn: psycopg.Connection) -> None:
        conn.execute("insert into effect values (%s, %s)", [job.id, job.attempt])
        if job.attempt == 1:
            gate(job)

    mux = Mux().register("t", handle, transactional=True, timeout=0.1, backoff=lambda _: 0.0)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", "a")
    gate.released.set()
    assert eventually(lambda: transactions(conn) == 0)
    # On a busy host later attempts may time out as well.
    [(_, _, attempt)] = observer.of("completed")
    assert attempt > 1
    assert rows(conn, "select * from effect") == [("a", attempt)]
    told = [event[0] for event in observer.of("timed_out", "retried", "completed", "lost")]
    assert told == ["timed_out", "retried"] * (attempt - 1) + ["completed"]


def test_a_transaction_of_a_coroutine_that_is_cancelled_is_rolled_back(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute(EFFECT)
    observer = Recorder()

    async def handle(job: Job, conn: psycopg.AsyncConnection) -> None:
        await conn.execute("insert into effect values (%s, %s)", [job.id, job.attempt])
        if job.attempt == 1:
            await conn.execute("select pg_sleep(%s)", [NEVER])

    mux = Mux().register("t", handle, transactional=True, timeout=0.3, backoff=lambda _: 0.0)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", "a")
    # On a busy host later attempts may time out as well.
    [(_, _, attempt)] = observer.of("completed")
    assert attempt > 1
    assert rows(conn, "select * from effect") == [("a", attempt)]
    assert eventually(lambda: transactions(conn) == 0)
    assert len(observer.of("timed_out")) == attempt - 1


@both_styles
def test_a_transaction_that_is_being_committed_when_its_time_ends_counts(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)
    conn.execute(
        "create function slow() returns trigger language plpgsql as "
        "$$ begin perform pg_sleep(1.5); return null; end $$"
    )
    conn.execute(
        "create constraint trigger slow after insert on effect deferrable initially deferred "
        "for each row execute function slow()"
    )
    insert = "insert into effect values (%s, %s)"

    def plain(job: Job, conn: psycopg.Connection) -> None:
        conn.execute(insert, [job.id, job.attempt])

    async def coroutine(job: Job, conn: psycopg.AsyncConnection) -> None:
        await conn.execute(insert, [job.id, job.attempt])

    observer = Recorder()
    mux = Mux().register(
        "t", plain if style == "plain" else coroutine, transactional=True, timeout=0.3
    )
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for("completed", "a")
    assert rows(conn, "select * from effect") == [("a", 1)]
    assert observer.of("timed_out", "retried", "lost") == []


def transactions(conn: psycopg.Connection) -> int:
    """How many transactions of others are open."""
    number: int = row(
        conn,
        "select count(*) from pg_stat_activity where datname = current_database() "
        "and xact_start is not null and pid <> pg_backend_pid()",
    )[0]
    return number


# -- coroutines and their cancellation ---------------------------------------------------------


def test_a_coroutine_that_answers_its_cancellation_has_failed_all_the_same(
    launcher: Launcher,
) -> None:
    async def saves(job: Job) -> Result:
        try:
            await asyncio.sleep(NEVER)
        except asyncio.CancelledError:
            return Complete()
        raise AssertionError("slept for ever")

    observer = Errors()
    mux = Mux().register("t", saves, timeout=0.1, max_attempts=1)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", "a")
    assert isinstance(observer.errors[0], JobTimeoutError)
    assert len(observer.of("timed_out")) == 1


def test_the_error_of_a_coroutine_that_was_cancelled_shows_where_it_was(launcher: Launcher) -> None:
    async def fails(job: Job) -> None:
        try:
            await asyncio.sleep(NEVER)
        finally:
            raise ValueError("while it cleaned up")

    observer = Errors()
    mux = Mux().register("t", fails, timeout=0.1, max_attempts=1)
    launcher.enqueue("a")
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", "a")
    [error] = observer.errors
    assert isinstance(error, JobTimeoutError)
    assert isinstance(error.__cause__, ValueError)


def test_a_cancellation_by_something_other_than_the_timeout_is_not_a_timeout(
    launcher: Launcher,
) -> None:
    async def cancels(job: Job) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(NEVER)

    observer = Errors()
    mux = Mux().register("t", cancels, timeout=NEVER, max_attempts=1)
    mux.register("u", handler("coroutine", lambda _: None), timeout=NEVER)
    launcher.enqueue("a")
    launcher.enqueue("b", type="u")
    launcher.start(mux, observer=observer)
    observer.wait_for("dead", "a")
    observer.wait_for("completed", "b")  # and it does not reach the next job
    assert isinstance(observer.errors[0], asyncio.CancelledError)
    assert observer.of("timed_out") == []


def test_a_coroutine_that_ignores_its_cancellation_is_given_up_and_others_go_on(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    sleepless, observer = Sleepless(), Recorder()
    mux = Mux().register("t", sleepless, timeout=0.1, max_attempts=1)
    mux.register("u", handler("coroutine", lambda _: None))
    launcher.enqueue("a")
    launcher.start(mux, observer=observer, poll_interval=NEVER)
    observer.wait_for("dead", "a")
    launcher.enqueue("b", type="u")
    observer.wait_for("completed", "b")
    sleepless.released.set()
    launcher.enqueue("c", type="u")
    observer.wait_for("completed", "c")
    assert len(observer.of("timed_out", "dead")) == 2
    assert observer.of("retried", "lost") == []


def test_a_coroutine_that_blocks_its_loop_is_given_up(launcher: Launcher) -> None:
    gate, observer = Gate(), Recorder()
    mux = Mux().register("t", handler("coroutine", gate), timeout=0.1, max_attempts=1)
    launcher.start(mux, observer=observer)
    launcher.enqueue("a")
    observer.wait_for("dead", "a")
    assert [event[0] for event in observer.of("timed_out", "dead")] == ["timed_out", "dead"]
    gate.released.set()


# -- slots that are lost -----------------------------------------------------------------------


def stick(launcher: Launcher, observer: Recorder, number: int) -> None:
    """Enqueue so many jobs that time out, and wait until they have."""
    before = len(observer.of("dead"))
    launcher.enqueue(*[f"stuck{before + n}" for n in range(number)], type="stuck")
    observer.wait_for("dead", times=before + number)


either_sticks = pytest.mark.parametrize("make", [Gate, Sleepless], ids=["threads", "coroutines"])


@either_sticks
def test_as_many_slots_are_replaced_as_there_are(
    launcher: Launcher, conn: psycopg.Connection, make: Callable[[], Any]
) -> None:
    stuck, gate, observer = make(), Gate(), Recorder()
    mux = Mux().register("stuck", stuck, timeout=0.05, max_attempts=1).register("t", gate)
    launcher.start(mux, observer=observer, concurrency=2)
    stick(launcher, observer, 2)
    launcher.enqueue("a", "b", "c")
    gate.wait()
    gate.wait()  # both slots work
    assert not gate.entered.acquire(blocking=False)
    assert row(conn, "select count(*) from bgjob_job where token is not null") == (2,)
    gate.released.set()
    assert all_done(conn)
    stuck.released.set()


@either_sticks
def test_a_worker_whose_slots_are_all_lost_leaves_jobs_to_others_until_they_come_back(
    launcher: Launcher, conn: psycopg.Connection, make: Callable[[], Any]
) -> None:
    stuck, observer, others = make(), Recorder(), Recorder()
    mux = Mux().register("stuck", stuck, timeout=0.05, max_attempts=1)
    mux.register("t", lambda _: None)
    launcher.start(mux, observer=observer, concurrency=2, poll_interval=NEVER)
    launcher.enqueue(*[f"first{n}" for n in range(50)])  # quick ones, so that it would claim ahead
    observer.wait_for("completed", times=50)
    stick(launcher, observer, 4)
    launcher.enqueue(*[f"left{n}" for n in range(50)])
    other = launcher.start(mux, observer=others)
    assert all_done(conn)
    others.wait_for("completed", times=50)
    launcher.shutdown(other)
    stuck.released.set()
    launcher.enqueue(*[f"last{n}" for n in range(50)])
    observer.wait_for("completed", times=100)
    assert {event[1][:4] for event in others.of("completed")} == {"left"}


def test_jobs_that_wait_for_slots_that_are_lost_go_back_with_their_attempt(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate, observer = Gate(), Recorder()
    mux = Mux().register("stuck", gate, timeout=0.05, max_attempts=1)
    mux.register("t", lambda _: None)
    launcher.enqueue(*[f"first{n}" for n in range(100)], priority=-1)
    launcher.enqueue(*[f"first{n}" for n in range(100, 200)])
    launcher.start(mux, observer=observer, poll_interval=NEVER)
    observer.wait_for("completed", times=200)
    # These are quick, and so those behind them are claimed with them.
    launcher.client.bulk_enqueue(
        [EnqueueRequest("q", "stuck", id=f"stuck{n}", priority=-1) for n in range(2)]
        + [EnqueueRequest("q", "t", id=f"left{n}") for n in range(200)]
    )
    observer.wait_for("dead", times=2)
    released = "select count(*) from bgjob_job where attempt = 0 and token is null"
    assert eventually(lambda: row(conn, released) == (200,))
    gate.released.set()
    assert all_done(conn)
    observer.wait_for("completed", times=400)
    assert all(event[2] == 1 for event in observer.of("completed"))


@pytest.mark.both_colours
@both_styles
def test_a_shutdown_without_end_ends_with_the_timeout(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    gate, observer = Gate(), Recorder()
    mux = Mux().register("t", gate.of(style), timeout=0.5, backoff=lambda _: NEVER)
    launcher.enqueue("a")
    worker = launcher.start(mux, observer=observer)
    gate.wait()
    assert launcher.shutdown(worker, timeout=None)
    assert [event[0] for event in observer.of("timed_out", "retried")] == ["timed_out", "retried"]
    assert row(conn, "select attempt, token is null from bgjob_job") == (1, True)
    gate.released.set()


def test_a_shutdown_does_not_wait_for_what_is_given_up(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate, observer = Gate(), Recorder()
    mux = Mux().register("stuck", gate, timeout=0.05, max_attempts=1)
    worker = launcher.start(mux, observer=observer, concurrency=2)
    stick(launcher, observer, 4)
    assert launcher.shutdown(worker, timeout=None)
    gate.released.set()


# -- do() ----------------------------------------------------------------------------------------


@pytest.mark.both_colours
@pytest.mark.parametrize("transactional", [False, True], ids=["", "transactional"])
@pytest.mark.parametrize("is_async", [False, True], ids=["Client", "AsyncClient"])
def test_do_cancels_a_coroutine_that_outlives_its_timeout(
    dsn: str, is_async: bool, transactional: bool
) -> None:
    async def handle(job: Job, conn: psycopg.AsyncConnection | None = None) -> None:
        await asyncio.sleep(NEVER)

    register: Any = Mux().register
    mux = register("t", handle, timeout=0.1, transactional=transactional)
    result = do(dsn, mux, is_async=is_async)
    assert isinstance(result, Retry)
    assert isinstance(result.error, JobTimeoutError)


@pytest.mark.both_colours
@pytest.mark.parametrize("is_async", [False, True], ids=["Client", "AsyncClient"])
def test_do_waits_for_a_plain_handler_regardless_of_its_timeout(dsn: str, is_async: bool) -> None:
    mux = Mux().register("t", lambda _: time.sleep(0.1), timeout=0.01)
    assert do(dsn, mux, is_async=is_async) == Complete()


def do(dsn: str, mux: Mux, *, is_async: bool) -> Result:
    request = EnqueueRequest("q", "t")
    if not is_async:
        with Client(dsn) as client:
            client.enqueue(request)
            return client.do("q", mux)

    async def run() -> Result:
        async with AsyncClient(dsn) as client:
            await client.enqueue(request)
            return await client.do("q", mux)

    return asyncio.run(asyncio.wait_for(run(), PATIENCE))
