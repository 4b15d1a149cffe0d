"""Completed jobs of types that are kept leave a row for a week; those of others leave nothing."""

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from support.database import all_done, clock, count, row, rows
from support.plans import PLAN_CACHE_MODES, handled, nodes, prepare, run
from support.roles import Roles
from support.waiting import PATIENCE, eventually
from support.workers import Launcher, Recorder, Style, both_styles, handler

from bgjob import (
    Client,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    PastJob,
    Reschedule,
    Result,
    Retry,
    SchemaError,
    cli,
)
from bgjob._sql.history import of_job
from bgjob._sql.settlements import Claimed, complete
from bgjob.testing import drain


def kept(conn: psycopg.Connection) -> list[str]:
    return [id_ for (id_,) in rows(conn, "select job_id from bgjob_history order by job_id")]


def handle(job: Job) -> Result | None:
    match job.id:
        case "retried" if job.attempt == 1:
            return Retry(delay=0)
        case "dead":
            return MoveToDlq("why")
    return None


# -- what is kept ----------------------------------------------------------------------------------


@both_styles
def test_completed_jobs_of_a_kept_type_are_kept_with_when_and_where_they_ran(
    style: Style, launcher: Launcher, conn: psycopg.Connection
) -> None:
    before = clock(conn)
    mux = Mux().register("t", handler(style, handle), keep=True)
    mux.register("u", handler(style, handle))
    launcher.enqueue("a", "retried", "dead")
    launcher.enqueue("b", type="u")
    worker = launcher.start(mux, concurrency=2, observer=[])
    assert all_done(conn)
    [seen] = launcher.client.workers()
    launcher.shutdown(worker)
    assert kept(conn) == ["a", "retried"]
    [past] = launcher.client.history("retried")
    assert (past.id, past.queue, past.type, past.attempt) == ("retried", "q", "t", 2)
    assert past.worker == seen.number
    assert past.started_at is not None
    assert before <= past.ended_at <= clock(conn)
    assert (past.ended_at - past.started_at).total_seconds() < PATIENCE
    for id_ in ("b", "dead", "never"):
        assert launcher.client.history(id_) == []


@pytest.mark.both_colours
def test_transactional_jobs_single_ones_and_those_of_a_test_are_kept(
    launcher: Launcher, dsn: str, conn: psycopg.Connection
) -> None:
    def plain(_: Job, conn: psycopg.Connection) -> None:
        conn.execute("select 1")

    async def coroutine(_: Job, conn: psycopg.AsyncConnection) -> None:
        await conn.execute("select 1")

    body: Any = coroutine if launcher.is_async else plain
    mux = Mux().register("t", body, transactional=True, keep=True)
    mux.register("u", lambda _: None, keep=True)
    launcher.enqueue("a")
    worker = launcher.start(mux, observer=[])
    assert all_done(conn)
    launcher.shutdown(worker)
    with Client(dsn) as client:
        for id_, type_ in ("b", "t"), ("c", "u"):
            client.enqueue(EnqueueRequest("q", type_, id=id_))
            client.do("q", mux)
        client.enqueue(EnqueueRequest("q", "u", id="d"))
    assert kept(conn) == ["a", "b", "c"]


def test_a_job_whose_claim_was_lost_is_not_kept(conn: psycopg.Connection) -> None:
    with Client(conn.info.dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="a"))
    conn.execute("update bgjob_job set token = 2")
    job = Job(*row(conn, "select id, queue, type, arg, 1, null, priority, next_run_at, created_at, "
                         "updated_at from bgjob_job"))  # fmt: skip
    for token, expected in (1, []), (2, ["a"]):
        statement = complete([Claimed(job, token)], {"t"})
        conn.execute(statement.text, statement.params)
        assert kept(conn) == expected


def test_where_no_type_is_kept_not_a_byte_of_the_statement_changes() -> None:
    job = Job._make(["a", "q", "t", *[None] * (len(Job._fields) - 3)])
    for types in ((), {"u"}):
        assert complete([Claimed(job, 1)], types).text == complete([Claimed(job, 1)]).text
    assert "bgjob_history" not in str(complete([Claimed(job, 1)]).text)
    assert "bgjob_history" in str(complete([Claimed(job, 1)], {"t"}).text)


@pytest.mark.parametrize("keep", [1, "yes", None])
def test_keep_is_true_or_false(keep: Any) -> None:
    with pytest.raises(TypeError, match="keep of job type 't' must be True or False"):
        Mux().register("t", handle, keep=keep)


def test_a_worker_without_the_table_is_refused_if_it_has_kept_types(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute("drop table bgjob_history")
    worker = launcher.make(Mux().register("t", handle, keep=True))
    with pytest.raises(SchemaError, match="bgjob_history"):
        launcher.run(worker.run())
    launcher.shutdown(worker)
    with pytest.raises(SchemaError, match="bgjob_history"):
        launcher.client.history("a")
    launcher.enqueue("a")
    launcher.start(Mux().register("t", handle), observer=[])
    assert all_done(conn)


# -- a week ----------------------------------------------------------------------------------------

FILL = b"""
    insert into bgjob_history (day, job_id, queue, type, attempt, token, ended_at)
    select mod(floor(extract(epoch from at) / 86400)::bigint, 8), 'day ' || n, 'q', 't', 1, 1, at
    from generate_series(0, 7) as n, lateral (select now() - n * interval '1 day' as at) as moment
"""


def test_a_worker_empties_the_day_of_a_week_ago_for_tomorrow(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgjob._worker.history._SOON", 0.01)
    conn.execute(FILL)
    with psycopg.connect(conn.info.dsn) as reader:
        reader.execute("select from bgjob_history")  # its locks are in the way
        launcher.start(Mux().register("t", handle, keep=True), observer=[])
        assert kept(conn) == [f"day {n}" for n in range(8)]
    assert eventually(lambda: kept(conn) == [f"day {n}" for n in range(7)])


# -- who may ---------------------------------------------------------------------------------------


def test_a_worker_needs_only_its_role_to_keep_jobs(roles: Roles, conn: psycopg.Connection) -> None:
    conn.execute(FILL)
    launcher, recorder = Launcher(roles.dsn, is_async=False), Recorder()
    try:
        dsn = roles.login("worker")
        launcher.start(Mux().register("t", handle, keep=True), dsn=dsn, observer=recorder)
        launcher.enqueue("a")
        recorder.wait_for("completed", "a")
        assert recorder.of("error") == []
        assert kept(conn) == ["a", *(f"day {n}" for n in range(7))]
        with Client(roles.login("operator")) as client:
            assert [past.id for past in client.history("a")] == ["a"]
    finally:
        launcher.close()


# -- reading ---------------------------------------------------------------------------------------


def test_an_id_that_was_used_again_has_several_times(client: Any, conn: psycopg.Connection) -> None:
    conn.execute(FILL.replace(b"'day ' || n", b"'a'"))
    past = client.history("a")
    assert len(past) == 8
    assert past == sorted(past, key=lambda job: job.ended_at, reverse=True)
    assert client.history("a", limit=2) == past[:2]
    assert isinstance(past[0], PastJob)
    with pytest.raises(ValueError, match="id must have"):
        client.history("")


def test_a_kept_job_is_explained(
    launcher: Launcher, dsn: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    mux = Mux().register("t", handle, keep=True)
    launcher.start(mux, release="v7", observer=[])
    launcher.enqueue("order-2")
    assert eventually(lambda: kept(conn) == ["order-2"])
    found = launcher.client.explain("order-2")
    [reason] = found.reasons
    assert (found.state, found.queue, found.status) == ("completed", "q", 0)
    assert (reason.code, reason.facts["attempt"], reason.facts["type"]) == ("completed", 1, "t")
    assert reason.text.startswith("It was completed at ")
    assert " ago), attempt 1, on worker " in reason.text
    assert "release v7" in reason.text
    assert "after it was claimed." in reason.text
    launcher.enqueue("order-2")
    assert eventually(lambda: len(kept(conn)) == 2)
    assert cli.main(["explain", "order-2", "--dsn", dsn]) == 0
    assert "a job with this id was also completed" in capsys.readouterr().out


def test_a_look_for_an_id_reads_its_rows_only(conn: psycopg.Connection) -> None:
    conn.execute(
        "insert into bgjob_history (day, job_id, queue, type, attempt, token) "
        "select mod(n, 8), n, 'q', 't', 1, n from generate_series(1, 20000) as n"
    )
    explain = prepare(conn, "history", of_job("77", limit=100))
    for statistics in "", "analyze bgjob_history":
        if statistics:
            conn.execute(statistics.encode())
        for mode in PLAN_CACHE_MODES:
            for node in nodes(run(conn, explain, mode)):
                assert handled(node) <= 1, node
