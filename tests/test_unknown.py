"""Jobs of unknown types are put back while they are young, if the Mux says so."""

import logging
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from support.database import row, rows
from support.jobs import a_job
from support.waiting import NEVER, eventually
from support.workers import Launcher, Recorder

from bgjob import EnqueueRequest, MoveToDlq, Mux, Reschedule, UnknownTypeError, testing
from bgjob._handlers.unknown import UnknownTypes

HOUR = timedelta(hours=1)


def test_a_worker_puts_it_back_without_an_attempt_and_goes_on_with_other_jobs(
    launcher: Launcher, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    observer = Recorder()
    old, new = Mux(unknown_for=HOUR).register("t", lambda _: None), Mux()
    seen: list[tuple[str, int, str | None]] = []
    new.register("new", lambda job: seen.append((job.id, job.attempt, job.last_error)))
    with caplog.at_level(logging.WARNING, "bgjob"):
        worker = launcher.start(old, observer=observer, poll_interval=NEVER)
        launcher.enqueue("a", "b", type="new", exclusive="k")
        launcher.enqueue("known", exclusive="k")
        for id_ in ("a", "b"):
            observer.wait_for("rescheduled", id_)
        observer.wait_for("completed", "known")  # so the key is free again
        launcher.shutdown(worker)
    assert all(delay <= 1.0 for _, _, _, delay in observer.of("rescheduled"))
    assert observer.of("dead", "retried", "lost", "error") == []
    assert [name for name, *_ in observer.of("started")] == ["started"]
    warnings = [r.getMessage() for r in caplog.records if "is put back" in r.getMessage()]
    assert len(warnings) == 1
    assert "no handler is registered for job type 'new': job 'a' of queue 'q'" in warnings[0]
    assert "for another 59 min 59 s at most" in warnings[0]
    query = "select attempt, last_error, deaths, token from bgjob_job"
    assert rows(conn, query) == [(0, None, 0, None)] * 2

    observer = Recorder()
    launcher.start(new, observer=observer, poll_interval=NEVER)
    launcher.client.jobs.run_now(["a", "b"])
    observer.wait_for("completed", "a")
    observer.wait_for("completed", "b")
    assert sorted(seen) == [("a", 1, None), ("b", 1, None)]


def test_after_that_time_a_worker_moves_it_to_the_dead_letter_table(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    launcher.enqueue("a", type="new")
    conn.execute("update bgjob_job set created_at = created_at - interval '1 h'")
    launcher.start(Mux(unknown_for=HOUR), observer=observer)
    observer.wait_for("dead", "a")
    assert observer.of("rescheduled") == []
    [dead] = launcher.client.dlq.list()
    assert str(dead.last_error).startswith("UnknownTypeError: no handler is registered for")
    assert row(conn, "select fingerprint <> 0 from bgjob_dead_job") == (True,)


def test_a_worker_whose_own_clock_is_wrong_goes_by_the_databases(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    from time import time

    monkeypatch.setattr("bgjob._worker.clock.time", lambda: time() + 7200)
    observer = Recorder()
    launcher.enqueue("a", type="new")
    launcher.start(Mux(unknown_for=HOUR), observer=observer)
    observer.wait_for("rescheduled", "a")


def test_do_puts_it_back_too(client: Any, conn: psycopg.Connection) -> None:
    client.enqueue(EnqueueRequest("q", "new", id="a"))
    mux = Mux(unknown_for=HOUR)
    result = client.do("q", mux.bound(object()))
    assert isinstance(result, Reschedule)
    assert isinstance(result.delay, float) and 0.8 <= result.delay <= 1.0
    assert row(conn, "select attempt, token from bgjob_job") == (0, None)
    conn.execute(
        "update bgjob_job set created_at = created_at - interval '1 h', next_run_at = now()"
    )
    assert isinstance(client.do("q", mux), MoveToDlq)


def test_drain_puts_it_back_and_raises_unless_it_is_told_to_store(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("insert into bgjob_job (id, queue, type) values ('a', 'q', 'new')")
    with pytest.raises(UnknownTypeError, match="no handler is registered for job type 'new'"):
        testing.drain(dsn, "q", Mux(unknown_for=HOUR))
    assert row(conn, "select attempt, token from bgjob_job") == (0, None)
    conn.execute("update bgjob_job set next_run_at = now()")
    [(job, result)] = testing.drain(dsn, "q", Mux(unknown_for=HOUR), on_error="store")
    assert job.id == "a" and isinstance(result, Reschedule)


def test_a_job_is_put_back_for_a_quarter_of_its_age_from_a_second_to_a_minute() -> None:
    job, types = a_job(), UnknownTypes(3600.0)
    created = job.created_at.timestamp()
    for seconds, longest in [(0, 1), (4, 1), (100, 25), (239, 59.75), (240, 60), (3500, 60)]:
        delays = [types.decide(job, created + seconds) for _ in range(20)]
        found = [d.delay for d in delays if isinstance(d, Reschedule)]
        assert all(0.8 * longest <= d <= longest for d in found)  # type: ignore[operator]
        assert len(set(found)) == 20
    last = types.decide(job, created + 3598.9)
    assert isinstance(last, Reschedule) and last.delay == pytest.approx(1.1)
    assert isinstance(types.decide(job, created + 3600), MoveToDlq)
    assert isinstance(types.decide(job, created - 60), Reschedule)  # the clock was set back
    # Of a job that nobody knows.
    age = 0.0
    claims = 0
    while isinstance(result := types.decide(job, created + age), Reschedule):
        assert isinstance(result.delay, float)
        age += result.delay
        claims += 1
    assert claims < 110


def test_it_is_warned_of_once_a_minute_for_each_type_and_of_at_most_100_types(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr("bgjob._handlers.unknown.monotonic", lambda: now)
    types = UnknownTypes(3600.0)

    def warned(*names: str) -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bgjob"):
            for name in names:
                job = a_job(name)
                types.decide(job, job.created_at.timestamp())
        return len(caplog.records)

    assert warned("a", "b", "a") == 2
    now = 59.9
    assert warned("a", "b") == 0
    now = 60.0
    assert warned("a", "b") == 2
    many = [f"t{n}" for n in range(1000)]
    assert warned(*many) == 98
    assert warned(*many, "a") == 0
    now = 120.0
    assert warned(*many) == 100


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), ("1h", TypeError), (float("nan"), ValueError)]
)
def test_a_bad_unknown_for_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="unknown_for must be"):
        Mux(unknown_for=value)


def test_without_it_or_with_0_nothing_is_put_back() -> None:
    for mux in (Mux(), Mux(unknown_for=0)):
        assert mux.unknown_for is None
        assert isinstance(mux.route(a_job("new")), MoveToDlq)


def test_an_old_and_a_new_worker_side_by_side_bury_nothing(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    launcher.start(Mux(unknown_for=HOUR).register("t", lambda _: None))
    launcher.start(Mux(unknown_for=HOUR).register("new", lambda _: None), observer=observer)
    launcher.enqueue(*map(str, range(50)), type="new")
    assert eventually(lambda: len(observer.of("completed")) == 50)
    assert rows(conn, "select from bgjob_dead_job") == []
