"""The server's clock is set while workers run: they report it, and correct due times where known."""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg
import pytest
from support.database import rows
from support.waiting import eventually
from support.workers import Launcher, Recorder

import bgjob._worker.session
from bgjob import EnqueueRequest, Job, Mux, Retry
from bgjob._sql.repairs import catch_up
from bgjob._worker.clock import ServerClock

HOUR = 3600.0


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(1_900_000_000 + seconds, UTC)


@pytest.mark.parametrize("step", [-HOUR, HOUR, -120, 120])
def test_a_step_is_noticed_once_and_measured(step: float) -> None:
    clock = ServerClock()
    assert clock.observe(at(0), 0, 0.01) == 0
    assert clock.observe(at(100), 100, 100.5) == 0
    assert clock.observe(at(110 + step), 110, 110.01) == pytest.approx(step, abs=1)
    assert clock.observe(at(120 + step), 120, 120.01) == 0


def test_a_drifting_clock_and_a_stopped_process_are_not_steps() -> None:
    clock = ServerClock()
    for n in range(100):
        assert clock.observe(at(n * 1.5), n, n + 0.01) == 0
    clock = ServerClock()
    assert clock.observe(at(0), 0, 0.1) == 0
    assert clock.observe(at(1), 1, 1 + HOUR) == 0  # stopped before it read the answer
    assert clock.observe(at(2 * HOUR), HOUR + 2, 2 * HOUR + 1) == 0  # before the server began
    assert clock.observe(at(2 * HOUR + 5), 2 * HOUR + 5, 2 * HOUR + 6) == 0


def set_back(conn: psycopg.Connection[Any]) -> None:
    """Move all times that were written so far an hour ahead, by the server's clock."""
    conn.execute(
        "update bgjob_job set next_run_at = next_run_at + interval '1 hour', "
        "updated_at = updated_at + interval '1 hour', created_at = created_at + interval '1 hour'"
    )


def catch_up_all(conn: psycopg.Connection[Any], limit: int = 1000) -> int:
    statement = catch_up("q", limit=limit)
    found: int = statement.parse(
        conn.execute(cast(Any, statement.text), statement.params).fetchall()
    )
    return found


def test_jobs_written_before_a_clock_was_set_back_keep_their_delays(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    launcher.enqueue("now")
    launcher.client.bulk_enqueue([EnqueueRequest("q", "t", id=f"many{n}") for n in range(3)])
    launcher.enqueue("delayed", delay=600)
    launcher.enqueue("other", queue="r")
    launcher.client.enqueue(EnqueueRequest("q", "retry", id="retried", priority=-1))
    mux = Mux().register("retry", lambda _: Retry(delay=300))
    launcher.client.do("q", mux)
    set_back(conn)
    launcher.enqueue("after", delay=600)
    assert catch_up_all(conn, limit=3) == 3
    assert catch_up_all(conn) == 2
    assert catch_up_all(conn) == 0
    waits = dict(rows(conn, "select id, next_run_at - clock_timestamp() from bgjob_job"))
    for id_ in ("now", "many0", "many1", "many2"):
        assert waits[id_] <= timedelta(0)
    assert timedelta(seconds=200) < waits["retried"] <= timedelta(seconds=300)
    # These may be of a calendar; and nothing is known of another queue.
    assert waits["delayed"] > timedelta(seconds=3600)
    assert waits["other"] > timedelta(seconds=3000)
    assert timedelta(seconds=500) < waits["after"] <= timedelta(seconds=600)


def test_a_worker_reports_a_clock_that_was_set_back_and_retries_do_not_wait_for_it(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = [HOUR]

    class Shifted(ServerClock):
        """A clock whose readings are ahead by `offset`, until the test sets that to 0."""

        def observe(self, at: datetime, sent_at: float, answered_at: float) -> float:
            return super().observe(at + timedelta(seconds=offset[0]), sent_at, answered_at)

    monkeypatch.setattr(bgjob._worker.session, "ServerClock", Shifted)
    done: list[str] = []

    def handle(job: Job) -> Retry | None:
        if job.id == "a" and job.attempt == 1:
            return Retry(delay=0.2)
        done.append(job.id)
        return None

    recorder = Recorder()
    launcher.start(Mux().register("t", handle), observer=recorder, poll_interval=0.1)
    launcher.enqueue("busy", delay=HOUR)  # so that there is something to look at
    launcher.enqueue("a")
    recorder.wait_for("retried", "a")
    conn.execute(
        "update bgjob_job set next_run_at = next_run_at + interval '1 hour', "
        "updated_at = updated_at + interval '1 hour' where id = 'a' and token is null"
    )
    offset[0] = 0.0
    assert eventually(lambda: bool(recorder.of("error")))
    [(_, error)] = recorder.of("error")
    assert "the database's clock was set back by 3600 s" in str(error)
    assert eventually(lambda: "a" in done)
    launcher.enqueue("b")
    assert eventually(lambda: "b" in done)
    offset[0] = HOUR
    assert eventually(lambda: len(recorder.of("error")) == 2)
    assert "set forward by 3600 s" in str(recorder.of("error")[1][1])
