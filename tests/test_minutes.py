"""Workers count what ends in each minute; charts, ratios and `bgjob top` read it."""

import json
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString, cast

import psycopg
import pytest
from support.database import all_done, clock, row, rows
from support.documents import ROOT
from support.nursery import fork
from support.plans import (
    PLAN_CACHE_MODES,
    STATISTICS,
    fill_with_statistics,
    handled,
    nodes,
    prepare,
    run,
)
from support.waiting import PATIENCE, eventually
from support.workers import Gate, Launcher, Recorder

from bgjob import (
    Client,
    EnqueueRequest,
    Job,
    MinuteCounts,
    Minutes,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
    SchemaError,
    cli,
)
from bgjob._sql.execute import run as execute
from bgjob._sql.minutes import Span, add, expire, plan_in_memory
from bgjob._sql.minutes import report as report_of
from bgjob._sql.session import WORKER_SETTINGS, session


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the workers of this process write often."""
    monkeypatch.setattr("bgjob._worker.minutes.EVERY", 0.02)
    monkeypatch.setattr("bgjob._worker.minutes.LOOK_AGAIN", 0.02)


def written(conn: psycopg.Connection) -> dict[tuple[str, str], list[int]]:
    """What the table has of all minutes together, by queue and type."""
    found = rows(
        conn,
        "select queue, type, sum(completed)::int, sum(retried)::int, sum(rescheduled)::int, "
        "sum(dead)::int, sum(lost)::int, sum(timed_out)::int, sum(runs)::int "
        "from bgjob_minute group by 1, 2",
    )
    return {(queue, type_): counts for queue, type_, *counts in found}


# -- a worker that counts --------------------------------------------------------------------------


@pytest.mark.usefixtures("often")
def test_a_worker_counts_what_ends_by_queue_and_type(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    again: list[str] = []

    def handle(job: Job) -> Result | None:
        match job.id:
            case "retried" if job.attempt == 1:
                return Retry(delay=0)
            case "rescheduled" if not again:
                again.append(job.id)
                return Reschedule(0)
            case "dead":
                return MoveToDlq("why")
        return None

    def transactional(_: Job, conn: psycopg.Connection) -> None:
        conn.execute("select 1")

    gate = Gate()
    mux = Mux().register("t", handle).register("u", transactional, transactional=True)
    mux.register("slow", gate, timeout=0.05, max_attempts=1)
    launcher.enqueue("a", "b", "retried", "rescheduled", "dead")
    launcher.enqueue("c", type="u")
    launcher.enqueue("d", type="unknown")
    launcher.enqueue("e", queue="r")
    launcher.enqueue("f", type="slow")
    launcher.start(mux, {"q": 2, "r": 1}, services=[Minutes()], observer=[])
    expected = {
        ("q", "t"): [4, 1, 1, 1, 0, 0, 7],
        ("q", "u"): [1, 0, 0, 0, 0, 0, 1],
        ("q", "unknown"): [0, 0, 0, 1, 0, 0, 0],
        ("q", "slow"): [0, 0, 0, 1, 0, 1, 1],
        ("r", "t"): [1, 0, 0, 0, 0, 0, 1],
    }
    assert eventually(lambda: written(conn) == expected), written(conn)
    gate.released.set()


@pytest.mark.usefixtures("often")
def test_a_lost_lease_and_a_cancelled_job_are_counted(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate = Gate()
    mux = Mux().register("t", gate).register("u", gate)
    launcher.start(mux, concurrency=2, services=[Minutes()], observer=[])
    launcher.enqueue("a")
    launcher.enqueue("b", type="u")
    for _ in range(2):
        gate.wait()
    conn.execute("delete from bgjob_job where id = 'a'")
    launcher.client.jobs.cancel("b", reason="why")
    gate.released.set()
    counted = "select type, sum(lost)::int, sum(cancelled)::int from bgjob_minute group by 1"
    assert eventually(lambda: {*rows(conn, counted)} == {("t", 1, 0), ("u", 0, 1)})


def test_what_was_not_written_yet_is_written_at_a_graceful_end_and_added_to_the_minute(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    before = clock(conn)
    for _ in range(2):
        worker = launcher.start(
            Mux().register("t", lambda _: None), {"q": 1, "r": 1}, services=[Minutes()]
        )
        launcher.enqueue("a", delay=0.05)
        launcher.enqueue("b", queue="r")
        assert all_done(conn)
        assert launcher.shutdown(worker)
    assert {key: counts[0] for key, counts in written(conn).items()} == {
        ("q", "t"): 2,
        ("r", "t"): 2,
    }
    minute, run_seconds, longest, waited = row(
        conn,
        "select min(minute), sum(run_seconds), max(longest_run), max(longest_wait) "
        "from bgjob_minute",
    )
    assert before - timedelta(minutes=1) < minute <= clock(conn)
    assert (minute.second, minute.microsecond) == (0, 0)
    assert 0 < longest <= run_seconds < PATIENCE
    assert 0 < waited < PATIENCE


@pytest.mark.usefixtures("often")
def test_counts_that_could_not_be_written_are_written_later(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    recorder = Recorder()
    launcher.start(Mux().register("t", lambda _: None), services=[Minutes()], observer=recorder)
    conn.execute("alter table bgjob_minute add constraint no check (completed > 1)")
    launcher.enqueue("a")
    recorder.wait_for("error")
    launcher.enqueue("b")
    assert eventually(lambda: written(conn) != {})
    assert written(conn)["q", "t"][0] == 2


def test_a_worker_without_the_service_writes_nothing(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    worker = launcher.start(Mux().register("t", lambda _: None))
    launcher.enqueue("a")
    assert all_done(conn)
    assert launcher.shutdown(worker)
    assert written(conn) == {}


@pytest.mark.usefixtures("often")
def test_a_worker_without_the_table_says_so_once_and_counts_once_it_is_there(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    recorder = Recorder()
    launcher.start(Mux().register("t", lambda _: None), services=[Minutes()], observer=recorder)
    launcher.enqueue("a")
    assert eventually(lambda: written(conn) != {})
    conn.execute("alter table bgjob_minute rename to elsewhere")
    launcher.enqueue("b")
    recorder.wait_for("error")
    launcher.enqueue("c")
    recorder.wait_for("completed", "c")
    conn.execute("alter table elsewhere rename to bgjob_minute")

    def counts_again() -> bool:
        launcher.client.enqueue(EnqueueRequest("q", "t"))
        return written(conn)["q", "t"][0] > 1

    assert eventually(counts_again)
    [(_, error)] = recorder.of("error")
    assert "client.minutes()" in str(error)
    assert "bgjob_minute" in str(error)


def test_bgjob_worker_counts_unless_it_is_told_not_to(
    dsn: str, conn: psycopg.Connection, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text("from bgjob import Mux\nmux = Mux().register('t', print)\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": dsn}
    with Client(dsn) as client:
        for arguments, expected in (("--minutes=0",), 0), ((), 1), (("--processes=2",), 2):
            client.enqueue(EnqueueRequest("q", "t"))
            with (tmp_path / "out").open("ab") as output:
                process = fork(
                    "bgjob", "worker", "app:mux", "--queue=q", *arguments,
                    env=env, output=output, cwd=tmp_path,
                )  # fmt: skip
            assert process.stdin is not None
            process.stdin.close()
            try:
                assert all_done(conn)
            finally:
                os.kill(process.pid, signal.SIGTERM)
                process.wait(PATIENCE)
            found = client.minutes(by=None)
            assert sum(series.total.completed for series in found.series) == expected


# -- old counts ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("often")
def test_counts_that_are_older_than_the_days_are_deleted_in_pieces(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgjob.minutes._SOON", 0.0)
    fill(conn, 6000)  # of 600 minutes
    launcher.start(Mux(), services=[Minutes(days=0.25)])

    def ages() -> tuple[int, bool]:
        found = row(
            conn,
            "select count(distinct minute)::int, min(minute) > now() - interval '361 min' "
            "from bgjob_minute",
        )
        return cast(tuple[int, bool], found)

    assert eventually(lambda: ages()[1]), ages()
    assert ages()[0] >= 359


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf"), "7", True])
def test_days_that_are_no_positive_number_are_refused(days: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="days must be"):
        Minutes(days)


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("within_a_minute")
def test_a_report_adds_up_by_queue_by_type_and_all_together(
    client: Any, conn: psycopg.Connection
) -> None:
    put(conn, "q", "t", 0, completed=5, dead=1, runs=6, run_seconds=3, longest_run=1)
    put(conn, "q", "u", 1, completed=2, retried=2, runs=4, wait_seconds=8, longest_run=2)
    put(conn, "r", "t", 2, completed=1, runs=1)
    put(conn, "r", "t", 70, completed=100)
    put(conn, "r", "t", -5, completed=100)  # the clock was set back
    found = client.minutes()
    assert [(s.queue, s.type, s.total.completed) for s in found.series] == [
        ("q", None, 7),
        ("r", None, 1),
    ]
    q = found.series[0]
    assert q.steps == (q.total,)
    assert q.total == MinuteCounts(7, 2, 0, 1, 0, 0, 0, 10, 3.0, 2.0, 8.0, 0.0)
    assert (q.total.ended, q.total.failed, q.total.failure_ratio) == (10, 3, 0.3)
    assert (q.total.mean_run, q.total.mean_wait) == (0.3, 0.8)
    assert (found.step, found.now - found.since > timedelta(minutes=59)) == (3600, True)
    by_type = client.minutes(timedelta(hours=2), by="type")
    assert [(s.queue, s.type, s.total.completed) for s in by_type.series] == [
        ("q", "t", 5),
        ("q", "u", 2),
        ("r", "t", 101),
    ]
    [all_] = client.minutes(by=None).series
    assert (all_.queue, all_.type, all_.total.completed) == (None, None, 8)
    [only] = client.minutes(queue="r").series
    assert only.total.completed == 1
    assert [s.queue for s in client.minutes(type="u").series] == ["q"]
    assert client.minutes(60, type="u").series == ()


@pytest.mark.usefixtures("within_a_minute")
def test_a_chart_has_a_bar_for_each_step_up_to_the_current_one(
    client: Any, conn: psycopg.Connection
) -> None:
    for minutes in range(0, 130):
        put(conn, "q", "t", minutes, completed=1)
    put(conn, "r", "t", 1, dead=1)
    found = client.minutes(step=60)
    q, r = found.series
    assert [counts.completed for counts in q.steps] == [1] * 60
    assert [counts.dead for counts in r.steps] == [0] * 58 + [1, 0]
    assert (found.since.second, found.step) == (0, 60)
    assert 59 <= (found.now - found.since) / timedelta(minutes=1) <= 60
    quarters = client.minutes(7200, step=timedelta(minutes=15))
    assert quarters.since.minute % 15 == 0
    bars = [counts.completed for counts in quarters.series[0].steps]
    assert bars[:7] == [15] * 7
    assert 1 <= bars[7] <= 15
    assert len(client.minutes(timedelta(days=7), step=3600).series[0].steps) == 168


def test_a_minute_that_nobody_counted_has_an_empty_report(client: Any) -> None:
    found = client.minutes(step=60)
    assert found.series == ()
    assert found.since < found.now
    assert MinuteCounts().failure_ratio is MinuteCounts().mean_run is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"last": 0}, "last"),
        ({"last": "1h"}, "last"),
        ({"step": 59}, "step"),
        ({"step": 90}, "step"),
        ({"last": 86400 * 8, "step": 60}, "11,520 steps"),
        ({"by": "minute"}, "by"),
        ({"queue": ""}, "queue"),
        ({"type": "x" * 256}, "type"),
    ],
)
def test_a_wrong_argument_of_a_report_is_refused(
    client: Any, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        client.minutes(**arguments)


def test_without_the_table_the_report_names_it(client: Any, conn: psycopg.Connection) -> None:
    conn.execute("drop table bgjob_minute")
    with pytest.raises(SchemaError, match="create table|init.sql"):
        client.minutes()


@pytest.mark.usefixtures("within_a_minute")
def test_bgjob_stats_shows_what_ended(
    dsn: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    put(conn, "q", "t", 0, completed=1500, dead=500, runs=2000, run_seconds=3, longest_run=1.5)
    put(conn, "q", "u", 0, dead=1)
    put(conn, "r", "t", 90, completed=7)
    assert cli.main(["stats", "--dsn", dsn, "--last", "1h"]) == 0
    titles, t, u = capsys.readouterr().out.splitlines()
    assert titles.split()[:5] == ["queue", "type", "completed", "retried", "rescheduled"]
    expected = [*"q t 1,500 0 0 500 0 0 0 25.0 1.5 1,500.0 0.0 0.0".split()]
    assert t.split() == expected
    assert u.split() == [*"q u 0 0 0 1 0 0 0 100.0 - - - -".split()]
    assert cli.main(["stats", "--dsn", dsn, "--last", "1h", "--json", "--queue", "r"]) == 0
    assert json.loads(capsys.readouterr().out)["series"] == []
    assert cli.main(["stats", "--dsn", dsn, "--last", "2h", "--json", "--queue", "r"]) == 0
    [series] = json.loads(capsys.readouterr().out)["series"]
    assert (series["type"], series["completed"], series["run_seconds"]) == ("t", 7, 0.0)
    for wrong in (["--last", "0"], ["--last", "1h", "--scale", "q"]):
        assert cli.main(["stats", "--dsn", dsn, *wrong]) == 2


# -- plans -----------------------------------------------------------------------------------------

# Rows by the minute of ten types in two queues.
FILL: LiteralString = """
    insert into bgjob_minute
    select date_bin('1 minute', now(), '2020-01-01') - n / 10 * interval '1 minute',
        'q' || n %% 2, 't' || n %% 10, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1
    from generate_series(0, %(jobs)s - 1) as n
"""


def fill(conn: psycopg.Connection, jobs: int) -> None:
    conn.execute(FILL, {"jobs": jobs})


@pytest.fixture
def within_a_minute(conn: psycopg.Connection) -> None:
    """The server's minute does not end for some seconds: what is written and read is of one."""
    second = "select extract(second from clock_timestamp())"
    assert eventually(lambda: row(conn, second) < (56,))


def put(conn: psycopg.Connection, queue: str, type_: str, minutes: int, **counts: float) -> None:
    """Write counts of a minute that began so many minutes ago."""
    given = MinuteCounts(**counts)  # type: ignore[arg-type]
    conn.execute(
        f"insert into bgjob_minute (minute, queue, type, {', '.join(given._fields)}) values "
        "(date_bin('1 minute', now(), '2020-01-01') - %s * interval '1 minute', %s, %s, "
        f"{', '.join(['%s'] * len(given))})".encode(),
        [minutes, queue, type_, *given],
    )


@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_report_reads_no_row_of_another_time(conn: psycopg.Connection, statistics: str) -> None:
    fill_with_statistics(conn, statistics, fill, 20_000, ["bgjob_minute"])
    text: Any = plan_in_memory().text
    conn.execute(text.replace(", true", ", false"))
    for span in Span(60, 60), Span(60, 60, is_whole=True):
        for by in None, "queue", "type":
            statement = report_of(span, by=by, queue=None, type_=None)
            explain = prepare(conn, f"{by} {span.is_whole}", statement)
            for node in nodes(plan := run(conn, explain, "auto")):
                assert handled(node) <= 600, node
                assert node is plan or node["Node Type"] != "Sort", node


@pytest.mark.parametrize("statistics", STATISTICS)
def test_writing_and_deleting_minutes_touches_only_their_rows(
    conn: psycopg.Connection, statistics: str
) -> None:
    fill_with_statistics(conn, statistics, fill, 20_000, ["bgjob_minute"])
    execute(conn, session(conn.info.backend_pid, WORKER_SETTINGS))
    counted = {("q", f"t{n}"): MinuteCounts(1) for n in range(20)}
    for name, statement in ("add", add(counted)), ("expire", expire(1.0, limit=100)):
        explain = prepare(conn, name, statement)
        for mode in PLAN_CACHE_MODES:
            for node in nodes(run(conn, explain, mode)):
                assert handled(node) <= 120, node
                assert node["Node Type"] != "Sort", node


def test_workers_that_write_the_same_minute_do_not_wait_for_the_disk(
    conn: psycopg.Connection,
) -> None:
    counted = {
        ("q", "b"): MinuteCounts(1),
        ("q", "a"): MinuteCounts(1),
        ("p", "c"): MinuteCounts(1),
    }
    with conn.transaction():
        second = execute(conn, add(counted))
        assert row(conn, "select current_setting('synchronous_commit')") == ("off",)
    assert 0 <= second < 60
    assert [*add(counted).params["queues"]] == ["p", "q", "q"]  # type: ignore[index, misc]
    assert [*add(counted).params["types"]] == ["c", "a", "b"]  # type: ignore[index, misc]
