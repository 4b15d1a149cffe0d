"""A worker whose job is cancelled interrupts the handler, and tells the observer."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import psycopg
import pytest
from support.database import count, row, rows
from support.jobs import a_job
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Gate, Launcher, Recorder, Style, both_styles, handler, running

from bgjob import Job, Mux
from bgjob._running.payloads import with_payload, with_payload_async
from bgjob._running.sessions import Sessions
from bgjob._sql.settlements import Claimed
from bgjob._worker import tasks, threads

NOTIFIED = pytest.mark.parametrize("notify", [True, False], ids=["notified", "polling"])


def waits_for(conn: psycopg.Connection, *ids: str) -> None:
    """Wait until workers hold jobs."""
    query = "select id from bgjob_job where token is not null order by id"
    assert eventually(lambda: [id_ for [id_] in rows(conn, query)] == sorted(ids))


@pytest.mark.parametrize(("notify", "timeout"), [(True, None), (True, NEVER), (False, None)])
def test_a_coroutine_is_cancelled_and_its_slot_goes_on(
    launcher: Launcher, conn: psycopg.Connection, notify: bool, timeout: float | None
) -> None:
    observer = Recorder()
    entered, cancelled = threading.Event(), threading.Event()

    async def handler(job: Job) -> None:
        if job.id == "next":
            return
        entered.set()
        try:
            await asyncio.sleep(NEVER)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    launcher.enqueue("a", "next", exclusive="k")
    launcher.start(
        Mux().register("t", handler, timeout=timeout),
        observer=observer,
        concurrency=1,
        # Without notifications it is heard at the next extension, a third of the lease later.
        lease=30.0 if notify else 1.5,
        poll_interval=NEVER if notify else 0.05,
        notify=notify,
    )
    assert entered.wait(PATIENCE)
    assert launcher.client.jobs.cancel("a", by="me").running == ("a",)
    assert cancelled.wait(PATIENCE)
    observer.wait_for("completed", "next")
    assert observer.of("cancelled", "lost", "retried", "dead", "error") == [("cancelled", "a", 1)]
    assert rows(conn, "select job_id, last_error from bgjob_dead_job") == [("a", "cancelled by me")]


@pytest.mark.parametrize(("notify", "timeout"), [(True, None), (True, NEVER), (False, None)])
@both_styles
def test_a_handler_that_does_not_end_is_given_up_and_its_slot_replaced(
    launcher: Launcher,
    conn: psycopg.Connection,
    notify: bool,
    timeout: float | None,
    style: Style,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bgjob._worker.executor.UNWINDING", 0.1)
    observer, gate = Recorder(), Gate()
    late: list[str] = []

    def plain(job: Job) -> None:
        if job.id != "next":
            gate(job)
            late.append(job.id)

    async def coroutine(job: Job) -> None:
        while job.id != "next":
            try:
                await gate.coroutine(job)
                late.append(job.id)
                return
            except asyncio.CancelledError:
                continue

    worker = launcher.start(
        Mux().register("t", plain if style == "plain" else coroutine, timeout=timeout),
        observer=observer,
        concurrency=1,
        lease=30.0 if notify else 1.5,
        poll_interval=0.05,
        notify=notify,
    )
    launcher.enqueue("a")
    gate.wait()
    launcher.enqueue("next")
    assert launcher.client.jobs.cancel("a", by="me").running == ("a",)
    observer.wait_for("completed", "next")  # on the slot that replaces that of `a`
    assert launcher.client.dlq.requeue("a") == ["a"]
    gate.wait()
    gate.released.set()
    observer.wait_for("completed", "a")
    assert eventually(lambda: late == ["a", "a"])
    launcher.enqueue("last", "next")
    observer.wait_for("completed", "last")
    observer.wait_for("completed", "next", times=2)
    assert observer.of("cancelled", "lost", "retried", "dead", "error", "timed_out") == [
        ("cancelled", "a", 1)
    ]
    assert count(conn) == 0
    assert launcher.shutdown(worker, timeout=5)


@NOTIFIED
@both_styles
def test_a_transaction_of_a_cancelled_job_is_rolled_back(
    launcher: Launcher, conn: psycopg.Connection, notify: bool, style: Style
) -> None:
    conn.execute("create table effect (id text)")
    observer = Recorder()
    entered = threading.Semaphore(0)

    def plain(job: Job, own: psycopg.Connection) -> None:
        own.execute("insert into effect values (%s)", [job.id])
        if job.id == "a":
            entered.release()
            own.execute("select pg_sleep(3600)")

    async def coroutine(job: Job, own: psycopg.AsyncConnection) -> None:
        await own.execute("insert into effect values (%s)", [job.id])
        if job.id == "a":
            entered.release()
            await own.execute("select pg_sleep(3600)")

    handler: Callable[..., Any] = plain if style == "plain" else coroutine
    launcher.enqueue("a", "b")
    launcher.start(
        Mux().register("t", handler, transactional=True),
        observer=observer,
        lease=30.0 if notify else 1.5,
        poll_interval=0.05,
        notify=notify,
    )
    assert entered.acquire(timeout=PATIENCE)
    assert launcher.client.jobs.cancel("a").running == ("a",)
    observer.wait_for("cancelled", "a")
    # The session ends, and with it whatever it has locked.
    sleeping = (
        "select pid from pg_stat_activity where query like '%%pg_sleep%%' "
        "and state = 'active' and datname = current_database() and pid <> pg_backend_pid()"
    )
    assert eventually(lambda: not rows(conn, sleeping))
    observer.wait_for("completed", "b")
    assert rows(conn, "select id from effect") == [("b",)]
    assert observer.of("lost", "retried", "dead") == []


def test_a_job_that_has_not_started_never_starts_once_it_is_cancelled(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer, gate = Recorder(), Gate()
    mux = Mux().register("quick", lambda _: None).register("t", gate)
    launcher.start(mux, observer=observer, concurrency=1, poll_interval=NEVER)
    launcher.enqueue(*map(str, range(300)), type="quick")  # so that it claims ahead
    observer.wait_for("completed", times=300)
    launcher.enqueue("a", "b", "c", exclusive="k")
    gate.wait()
    assert launcher.client.jobs.cancel(["b", "c"]).changed == ("b", "c")
    gate.released.set()
    observer.wait_for("completed", "a")
    launcher.enqueue("last", type="quick")
    observer.wait_for("completed", "last")
    assert [job.id for job in gate.runs] == ["a"]
    assert count(conn) == count(conn, "bgjob_exclusive") == 0


def test_a_cancel_is_heard_while_quick_jobs_flow(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    entered, cancelled, ends = threading.Event(), threading.Event(), threading.Event()

    async def slow(job: Job) -> None:
        entered.set()
        try:
            await asyncio.sleep(NEVER)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    launcher.enqueue("a", type="slow")
    launcher.start(
        Mux().register("t", lambda _: None).register("slow", slow),
        observer=observer,
        concurrency=4,
        lease=3600.0,
    )
    assert entered.wait(PATIENCE)

    def flood() -> None:
        number = 0
        while not ends.is_set():
            launcher.enqueue(*(f"{number}-{n}" for n in range(2000)))
            number += 1

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        observer.wait_for("completed", times=4000)
        assert launcher.client.jobs.cancel("a").running == ("a",)
        assert cancelled.wait(PATIENCE)
    finally:
        ends.set()
        thread.join()
    observer.wait_for("cancelled", "a")


@both_styles
def test_a_slot_is_never_lost_or_doubled_if_a_handler_ends_as_it_is_given_up(
    style: Style, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgjob._worker.executor.UNWINDING", 0.0)
    ends = threading.Event()

    def plain(_: Job) -> None:
        ends.wait()

    async def coroutine(_: Job) -> None:
        while not ends.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)

    with running(plain if style == "plain" else coroutine, "first") as (slots, executor):
        ends.set()
        assert eventually(lambda: slots.free == 1)
        given_up = 0
        for number in range(100):
            ends.clear()
            claimed = Claimed(a_job(id=str(number)), 1)
            executor.submit([claimed])
            assert eventually(lambda: claimed in executor.in_handlers)  # noqa: B023
            ender = threading.Timer(number % 10 * 2e-5, ends.set)
            ender.start()
            while claimed in executor.in_handlers:
                if executor.interrupt([claimed], monotonic()).silent:
                    given_up += 1
                    assert eventually(lambda: claimed not in executor.in_handlers)  # noqa: B023
            ender.join()
            assert eventually(lambda: slots.free == 1), number
        assert slots.timeouts.missing == 0
        print(f"{given_up} of 100 were given up")
        assert 0 < given_up


@both_styles
def test_a_job_that_is_cancelled_while_its_payload_is_fetched_keeps_no_slot(
    launcher: Launcher, style: Style, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer, fetching, fetched = Recorder(), threading.Event(), threading.Event()

    def slow(sessions: Sessions, claimed: Claimed) -> Any:
        if claimed.job.id == "a":
            fetching.set()
            assert fetched.wait(PATIENCE)
        return with_payload(sessions, claimed)

    async def slow_async(sessions: Sessions, claimed: Claimed) -> Any:
        if claimed.job.id == "a":
            fetching.set()
            await asyncio.sleep(NEVER)
        return await with_payload_async(sessions, claimed)

    monkeypatch.setattr(threads, "with_payload", slow)
    monkeypatch.setattr(tasks, "with_payload_async", slow_async)
    runs: list[str] = []
    worker = launcher.start(
        Mux().register("t", handler(style, lambda job: runs.append(job.id))),
        observer=observer,
        concurrency=1,
        poll_interval=NEVER,
    )
    launcher.enqueue("a", arg=bytes(100_000))
    assert fetching.wait(PATIENCE)
    launcher.enqueue("b", "c")
    assert launcher.client.jobs.cancel("a").running == ("a",)
    observer.wait_for("completed", "b")
    observer.wait_for("completed", "c")
    fetched.set()
    launcher.enqueue("d")
    observer.wait_for("completed", "d")
    assert runs == ["b", "c", "d"]
    assert launcher.shutdown(worker, timeout=5)


@both_styles
def test_the_handler_of_an_abandoned_job_runs_on_beside_the_next_job_of_its_key(
    launcher: Launcher, style: Style
) -> None:
    observer, gate = Recorder(), Gate()
    launcher.start(
        Mux().register("t", gate.of(style)).register("next", lambda _: None),
        observer=observer,
        concurrency=2,
        lease=1.5,
        poll_interval=0.05,
    )
    launcher.enqueue("a", exclusive="k")
    gate.wait()
    launcher.enqueue("b", type="next", exclusive="k")
    assert launcher.client.jobs.abandon("a", by="me", reason="why").running == ("a",)
    observer.wait_for("completed", "b")
    observer.wait_for("lost", "a")
    gate.released.set()
    launcher.enqueue("c", "d", type="next")
    for id_ in "cd":
        observer.wait_for("completed", id_)
    assert observer.of("cancelled", "retried", "dead", "error") == []
    dead = launcher.client.dlq.get("a")
    assert dead is not None
    assert dead.last_error == "abandoned by me: why"
