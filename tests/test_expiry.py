"""Jobs that expire: started later they are not run, but moved to the dead-letter table."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import psycopg
import pytest
from support.database import clock, row, rows
from support.pages import opened
from support.waiting import NEVER, eventually
from support.workers import Gate, Launcher, Recorder

from bgjob import (
    Client,
    EnqueueRequest,
    Job,
    JobExpiredError,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
    Schedule,
    Schedules,
    cli,
    sql,
    testing,
)
from bgjob._postgres.cursor import Cursor
from bgjob._sql import claims, enqueues

HOUR = timedelta(hours=1)
LONG_AGO = datetime(2020, 1, 31, 9, tzinfo=UTC)


def request(id: str = "a", **options: Any) -> EnqueueRequest:
    return EnqueueRequest("q", "t", id=id, **options)


def expire(conn: psycopg.Connection, id: str = "a") -> None:
    """Let a job's expiry pass."""
    conn.execute("update bgjob_job set expires = clock_timestamp() where id = %s", [id])


def never(_: Job) -> None:
    raise AssertionError("an expired job was run")


# -- requests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"expires": "1h"}, TypeError, "expires must be seconds .* or a timedelta, not str"),
        ({"expires": -1}, ValueError, "expires must be from 0 seconds"),
        ({"expires": float("nan")}, ValueError, "expires must be from 0 seconds"),
        ({"expires": datetime(2030, 1, 1)}, ValueError, "expires must be an aware datetime"),
        ({"expires": 0}, ValueError, "the job expires .* before it is due"),
        ({"expires": 60, "delay": 60}, ValueError, "the job expires .* before it is due"),
        ({"expires": LONG_AGO, "run_at": LONG_AGO}, ValueError, "before it is due"),
    ],
)
def test_a_bad_expiry_is_refused_where_it_is_written(
    options: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        request(**options)


@pytest.mark.parametrize("size", [1, 3, 700], ids=["one", "many", "a copy's worth"])
def test_a_duration_runs_from_the_enqueue_by_the_databases_clock_and_a_time_is_stored_as_it_is(
    client: Any, conn: psycopg.Connection, size: int
) -> None:
    before = clock(conn)
    at = datetime(2040, 1, 1, 12, tzinfo=UTC)
    ids = [f"{n:03}" for n in range(size)]
    expiries: list[Any] = [HOUR, at, None]
    made = [request(id_, expires=expiries[n % 3]) for n, id_ in enumerate(ids)]
    if size == 1:
        client.enqueue(made[0])
    else:
        client.bulk_enqueue(made)
    found = [when for (when,) in rows(conn, "select expires from bgjob_job order by id")]
    assert all(before + HOUR <= when <= clock(conn) + HOUR for when in found[::3])
    assert set(found[1::3]) <= {at} and set(found[2::3]) <= {None}


def test_an_enqueue_without_one_is_as_before() -> None:
    for made in (request(), request(exclusive="k")):
        many = enqueues.enqueue_many([made], notify=True)
        assert "expires" not in str(many.text) and "expires_ats" not in (many.params or {})
    assert "expires" not in str(enqueues.enqueue(request(), notify=True).text)
    copied = enqueues.copy_many([request()])
    assert copied is not None and "expires" not in copied.text


@pytest.mark.parametrize("style", ["pyformat", "dollar"])
def test_the_public_statements_write_it(conn: psycopg.Connection, style: Any) -> None:
    text, params = sql.enqueue(request(expires=HOUR), style)
    assert 3600.0 in (params.values() if isinstance(params, dict) else params)
    if style == "pyformat":
        conn.execute(text, params)
        conn.execute(*sql.enqueue_many([request("b", expires=LONG_AGO), request("c")]))
        found = rows(conn, "select id, expires is null from bgjob_job order by id")
        assert found == [("a", False), ("b", False), ("c", True)]


@dataclass
class Mail:
    queue: ClassVar[str] = "q"
    to: str


def test_a_typed_job_may_expire(client: Any) -> None:
    id_ = client.enqueue(Mail("ann"), expires=HOUR)
    assert client.jobs.get(id_).expires > client.jobs.get(id_).created_at


# -- runs ------------------------------------------------------------------------------


def test_an_expired_job_is_moved_to_the_dead_letter_table_unrun_and_its_key_is_free(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer, ran = Recorder(), list[str]()
    launcher.client.bulk_enqueue(
        [
            request("a", expires=LONG_AGO, exclusive="k"),
            request("b", expires=LONG_AGO, exclusive="k"),
            request("c", expires=HOUR, exclusive="k"),
        ]
    )
    launcher.start(Mux().register("t", lambda job: ran.append(job.id)), observer=observer)
    observer.wait_for("completed", "c")
    assert ran == ["c"]
    assert [id_ for _, id_, *_ in observer.of("dead")] == ["a", "b"]
    assert [id_ for _, id_, *_ in observer.of("started")] == ["c"]
    found = launcher.client.dlq.list(type="t")
    assert [(dead.id, dead.attempt, dead.expires) for dead in found] == [
        ("b", 1, LONG_AGO),
        ("a", 1, LONG_AGO),
    ]
    lines = str(found[0].last_error).splitlines()
    assert lines[0] == (
        "JobExpiredError: the job expired at 2020-01-31 09:00:00 UTC, and was not run"
    )
    assert lines[1].strip().startswith("note: a worker was about to start it ")
    # All that expire are one group of their type.
    conn.execute("update bgjob_dead_job set job_id = job_id || 'x'")
    launcher.client.enqueue(request("d", expires=datetime(2021, 2, 2, 10, 11, 12, tzinfo=UTC)))
    observer.wait_for("dead", "d")
    assert row(conn, "select count(distinct fingerprint) from bgjob_dead_job") == (1,)


def test_a_retry_that_waits_beyond_it_is_not_run_and_its_error_is_kept(
    client: Any, conn: psycopg.Connection
) -> None:
    def fail(_: Job) -> None:
        raise ValueError("no answer")

    client.enqueue(request(expires=HOUR))
    assert isinstance(client.do("q", Mux().register("t", fail, backoff=lambda _: 0.0)), Retry)
    expire(conn)
    result = client.do("q", Mux().register("t", never))
    assert isinstance(result, MoveToDlq) and isinstance(result.error, JobExpiredError)
    [dead] = client.dlq.list()
    assert "its last attempt had failed: ValueError: no answer" in dead.last_error
    assert dead.attempt == 2


def test_a_job_that_runs_when_it_expires_goes_on(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer, gate = Recorder(), Gate()
    launcher.client.enqueue(request(expires=HOUR))
    launcher.start(Mux().register("t", gate), observer=observer)
    gate.wait()
    expire(conn)
    gate.released.set()
    observer.wait_for("completed", "a")
    assert observer.of("dead") == []


def test_a_job_that_waits_for_a_slot_of_its_worker_may_expire_there(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer, gate = Recorder(), Gate()
    launcher.client.bulk_enqueue([request("a"), request("b", expires=0.3)])
    launcher.start(Mux().register("t", gate), observer=observer, concurrency=1)
    gate.wait()
    expired = "select expires < clock_timestamp() from bgjob_job where id = 'b'"
    assert eventually(lambda: row(conn, expired) == (True,))
    gate.released.set()
    observer.wait_for("dead", "b")
    assert [job.id for job in gate.runs] == ["a"]


def test_a_worker_whose_own_clock_is_wrong_goes_by_the_databases(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    from time import time

    monkeypatch.setattr("bgjob._worker.clock.time", lambda: time() + 7200)
    observer = Recorder()
    launcher.client.enqueue(request(expires=HOUR))
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)
    observer.wait_for("completed", "a")


def test_an_expired_job_of_an_unknown_type_has_expired_also_while_it_is_put_back(
    client: Any, conn: psycopg.Connection
) -> None:
    client.enqueue(request(expires=HOUR))
    mux = Mux(unknown_for=HOUR)
    assert isinstance(client.do("q", mux), Reschedule)
    conn.execute("update bgjob_job set next_run_at = now()")
    expire(conn)
    result = client.do("q", mux)
    assert isinstance(result, MoveToDlq) and isinstance(result.error, JobExpiredError)


def test_drain_raises_it(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute("insert into bgjob_job (id, queue, type, expires) values ('a', 'q', 't', now())")
    with pytest.raises(JobExpiredError, match="the job expired at"):
        testing.drain(dsn, "q", Mux().register("t", never))
    assert rows(conn, "select job_id from bgjob_dead_job") == [("a",)]


def test_a_handler_sees_when_its_job_expires(client: Any, conn: psycopg.Connection) -> None:
    seen: list[Any] = []
    answers: list[Result | None] = [Retry(0), Reschedule(0), None]

    def handle(job: Job) -> Result | None:
        seen.append(job.expires)
        return answers[len(seen) - 1]

    client.enqueue(request(expires=HOUR))
    [(at,)] = rows(conn, "select expires from bgjob_job")
    for _ in answers:
        client.do("q", Mux().register("t", handle))
    assert seen == [at] * 3


# -- afterwards ------------------------------------------------------------------------


def test_a_claim_returns_expiry_and_headers_exactly_in_any_time_zone(
    plain_client: Client, conn: psycopg.Connection
) -> None:
    at = datetime(2040, 2, 29, 23, 59, 59, 999999, UTC)
    text = '{"n":-0.10,"ünï":"€\\u2028","a":[1,{"b":12345678901234567}]}'
    for id_ in ("plain", "expires", "headers", "both", "forever", "spoiled"):
        plain_client.enqueue(request(id_))
    conn.execute("update bgjob_job set expires = %s where id in ('expires', 'both')", [at])
    conn.execute("update bgjob_job set headers = %s where id in ('headers', 'both')", [text])
    conn.execute("update bgjob_job set expires = 'infinity' where id = 'forever'")
    conn.execute("update bgjob_job set headers = '[1]', expires = %s where id = 'spoiled'", [at])
    conn.execute("set timezone = 'Asia/Kathmandu'")
    statement = claims.sweep("q", limit=9, lease=1, token=1)
    found = statement.parse(Cursor(conn).execute(statement.text, statement.params).fetchall())

    headers = {"n": -0.1, "ünï": "€\u2028", "a": [1, {"b": 12345678901234567}]}
    forever = datetime(9999, 12, 30, tzinfo=UTC)
    assert {job.id: (job.expires, dict(job.headers)) for job in found.jobs} == {
        "plain": (None, {}),
        "expires": (at, {}),
        "headers": (None, headers),
        "both": (at, headers),
        "forever": (forever, {}),
        "spoiled": (at, {}),
    }
    assert list(found.jobs[3].headers) == list(headers)


def test_a_requeue_keeps_an_expiry_to_come_and_drops_one_that_has_passed(
    client: Any, conn: psycopg.Connection
) -> None:
    client.bulk_enqueue([request("a", expires=LONG_AGO), request("b", expires=HOUR)])
    client.do("q", Mux().register("t", never))
    client.jobs.cancel("b")
    assert sorted(client.dlq.requeue(["a", "b"])) == ["a", "b"]
    assert client.jobs.get("a").expires is None
    assert client.jobs.get("b").expires is not None
    ran: list[str] = []
    for _ in range(2):
        client.do("q", Mux().register("t", lambda job: ran.append(job.id)))
    assert sorted(ran) == ["a", "b"]


def test_explain_says_when_it_expires_or_that_it_has(client: Any, conn: psycopg.Connection) -> None:
    client.enqueue(request(expires=HOUR, delay=60))
    explanation = client.explain("a")
    [_, reason, *_] = explanation.reasons
    assert reason.code == "expires" and not reason.blocks
    assert reason.text.startswith("It expires in 59 min 59 s, at 2")
    client.enqueue(request("b", expires=LONG_AGO))
    [reason] = [r for r in client.explain("b").reasons if r.code == "expired"]
    assert "ago, at 2020-01-31 09:00:00 UTC: the worker that claims it does not run" in reason.text
    assert reason.remedy.endswith("bgjob dlq requeue --id b")


def test_a_job_that_only_expires_is_ready(
    launcher: Launcher, conn: psycopg.Connection, plain_client: Client
) -> None:
    plain_client.pause("q")
    launcher.start(Mux().register("t", lambda _: None))
    plain_client.enqueue(request(expires=HOUR))
    codes = [reason.code for reason in plain_client.explain("a").reasons]
    assert codes == ["expires", "paused"]


def test_commands_write_and_show_it(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str, status: int = 0) -> str:
        assert cli.main([*args]) == status
        out, err = capsys.readouterr()
        return out if status == 0 else err

    monkeypatch.setenv("BGJOB_DSN", dsn)
    run("enqueue", "q", "t", "--id", "a", "--expires", "2h")
    run("enqueue", "q", "t", "--id", "b", "--expires", "2020-01-31T09:00Z")
    run("enqueue", "q", "t", "--id", "c")
    assert "expires       2020-01-31 09:00:00+00:00" in run("job", "show", "b")
    assert "expires" not in run("job", "show", "c")
    shown = json.loads(run("job", "show", "a", "--json"))
    assert shown["expires"] > shown["created_at"]
    run("job", "cancel", "b", "c")
    assert "2020-01-31 09:00:00+00:00" in run("dlq", "show", "b")
    with pytest.raises(SystemExit):
        cli.main(["enqueue", "q", "t", "--expires", "soon"])
    assert "a time with its offset" in capsys.readouterr().err


def test_the_page_shows_it(plain_client: Client, dsn: str) -> None:
    plain_client.bulk_enqueue([request(id_, expires=LONG_AGO) for id_ in "ab"])
    plain_client.jobs.cancel("b")
    with opened(dsn) as pages:
        for url in ("/jobs/a", "/dead/1"):
            assert pages.json(url)["job"]["expires"].startswith("2020-01-31T09:00:00")
            assert "<dt>Expires</dt>" in pages.get(url).text
        plain_client.enqueue(request("c"))
        assert "<dt>Expires</dt>" not in pages.get("/jobs/c").text


# -- schedules -------------------------------------------------------------------------


def test_the_jobs_of_a_schedule_expire_after_a_duration(
    plain_client: Client, conn: psycopg.Connection
) -> None:
    def run(expires: float | None) -> None:
        made = EnqueueRequest("q", "t", expires=expires)
        Schedules([Schedule("s", every=60, request=made)]).run(conn)

    run(90)
    conn.execute("update bgjob_schedule set tick = tick - interval '1 h', next_run_at = null")
    run(90)
    run(90)
    query = "select expires - created_at from bgjob_job"
    [(lasts,)] = rows(conn, query)
    assert timedelta(seconds=89) < lasts < timedelta(seconds=91)
    plain_client.schedules.run("s")
    assert len(rows(conn, query)) == 2
    assert all(found[0] > timedelta(seconds=89) for found in rows(conn, query))
    run(None)
    assert row(conn, "select expires from bgjob_schedule") == (None,)


def test_a_schedule_refuses_an_expiry_at_a_time() -> None:
    with pytest.raises(ValueError, match="schedule 's': its request must expire after a duration"):
        Schedule("s", every=60, request=request(expires=LONG_AGO))
