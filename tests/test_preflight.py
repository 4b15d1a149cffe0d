"""A preflight tells what a release would do with the jobs that are there, and does nothing."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import psycopg
import pytest
from faults.pooler import Pooler
from psycopg.errors import QueryCanceled, ReadOnlySqlTransaction
from support.clients import HOSTILE
from support.database import row, rows
from support.workers import Launcher

from bgjob import (
    Client,
    EmptyQueueError,
    EnqueueRequest,
    Job,
    JsonCodec,
    Mux,
    PayloadError,
    Result,
    Retry,
    Schedule,
    Schedules,
    SchemaError,
    cli,
    preflight,
)
from bgjob._postgres.connection import Connection
from bgjob._preflight.judge import Judge
from bgjob._preflight.sample import Sample
from bgjob._preflight.steps import Options, inspect
from bgjob._sql.preflight import LIVE, Candidate, Page
from bgjob._sql.statement import Statement
from bgjob.preflight import Finding, Report

AT = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Mail:
    job_type: ClassVar[str] = "mail"
    to: str
    lines: list[int] = field(default_factory=list)


class Raising:
    """A codec whose decoder raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def encode(self, value: object) -> bytes:
        return b"x"

    def decode(self, data: bytes) -> NoReturn:
        raise self.error


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def never(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a preflight runs no handler")


def candidate(id_: str = "a", **columns: Any) -> Candidate:
    given: dict[str, Any] = {
        "key": id_,
        "id": id_,
        "queue": "q",
        "type": "mail",
        "attempt": 0,
        "priority": 0,
        "next_run_at": AT,
        "exclusive": None,
        "created_at": None,
        "updated_at": None,
        "last_error": None,
        "size": None,
        "arg": None,
    }
    return Candidate(**given | columns)


def insert(conn: psycopg.Connection, id_: str, type_: str = "mail", **columns: Any) -> None:
    """Write a job as it is after some attempts, or as another program wrote it."""
    given = {"queue": "q", "arg": None, "attempt": 0, "exclusive": None, "due": "now"} | columns
    conn.execute(
        "insert into bgjob_job (id, queue, type, arg, attempt, exclusive, next_run_at) values "
        "(%(id)s, %(queue)s, %(type)s, %(arg)s, %(attempt)s, %(exclusive)s, %(due)s::timestamptz)",
        given | {"id": id_, "type": type_},
    )


def bury(conn: psycopg.Connection, id_: str, error: str, arg: bytes | None, type_: str) -> None:
    """Write a dead job."""
    conn.execute(
        "insert into bgjob_dead_job (job_id, queue, type, arg, attempt, last_error, priority, "
        "next_run_at, job_created_at, job_updated_at) "
        "values (%s, 'q', %s, %s, 1, %s, 0, now(), now(), now())",
        [id_, type_, arg, error],
    )


def mails(**policy: Any) -> Mux:
    return Mux().register(Mail, never, **policy)


def found(report: Report) -> dict[str, Finding]:
    """The only finding of each code."""
    by_code = {finding.code: finding for finding in report.findings}
    assert len(by_code) == len(report.findings), report.findings
    return by_code


FIT = b'{"to":"a"}'

# -- payloads and types ------------------------------------------------------------------------


def test_an_empty_database_has_nothing_to_say(dsn: str) -> None:
    report = preflight.check(dsn, Mux())
    assert (report.findings, report.types, report.jobs, report.dead) == ((), (), 0, 0)
    assert (report.status, report.lost, report.is_complete) == (0, 0, True)


def test_jobs_that_fit_are_counted_by_queue_and_type(dsn: str, conn: psycopg.Connection) -> None:
    insert(conn, "a", arg=FIT)
    insert(conn, "b", arg=FIT, queue="other", due="infinity")
    insert(conn, "c", "plain", arg=b"\0\xff")
    mux = mails().register("plain", never)
    report = preflight.check(dsn, mux)
    assert [(f.queue, f.type, f.jobs, f.fit, f.lost, f.is_decoded) for f in report.types] == [
        ("other", "mail", 1, 1, 0, True),
        ("q", "mail", 1, 1, 0, True),
        ("q", "plain", 1, 1, 0, False),
    ]
    assert (report.findings, report.status, report.jobs) == ((), 0, 3)


def test_jobs_without_a_handler_are_named_with_their_due_time(
    dsn: str, conn: psycopg.Connection
) -> None:
    for n in range(5):
        insert(conn, f"a{n}", "rare")
    conn.execute("update bgjob_job set next_run_at = now() - interval '3 h' where id = 'a4'")
    report = preflight.check(dsn, mails())
    finding = found(report)["no_handler"]
    assert (finding.severity, finding.queue, finding.type) == ("bad", "q", "rare")
    assert (finding.count, finding.ids) == (5, ("a0", "a1", "a2"))
    assert finding.text == (
        "5 jobs of type 'rare' in queue 'q' have no handler; the first is 'a0', due for 3 h"
    )
    assert "--queue" in finding.remedy
    assert (report.status, report.lost) == (4, 5)
    assert not report.types[0].has_handler
    [finding] = preflight.check(dsn, Mux(unknown_for=timedelta(hours=1))).findings
    assert finding.text.endswith("; put back until 1 h after its enqueue")


def test_only_the_named_queues_are_looked_at(dsn: str, conn: psycopg.Connection) -> None:
    insert(conn, "a", arg=FIT)
    insert(conn, "b", "of another program", queue="other")
    bury(conn, "dead", "PayloadError: x", FIT, "mail")
    report = preflight.check(dsn, mails(), queues=["q"])
    assert (report.jobs, report.status) == (1, 0)
    assert "dead_fit" in found(report)
    report = preflight.check(dsn, mails(), queues=["other"])
    assert (report.jobs, report.status, report.lost) == (1, 4, 1)
    assert "dead_fit" not in found(report)
    assert preflight.check(dsn, mails(), queues=[]).jobs == 0


def test_a_payload_that_does_not_fit_names_the_field_and_the_first_jobs(
    dsn: str, conn: psycopg.Connection
) -> None:
    for n in range(5):
        insert(conn, f"a{n}", arg=b'{"lines":[1]}')
    insert(conn, "b", arg=b'{"to":1}')
    insert(conn, "c", arg=FIT)
    report = preflight.check(dsn, mails())
    first, second = report.findings
    assert (first.code, first.severity, first.count, first.ids) == (
        *("payload", "bad", 5),
        ("a0", "a1", "a2"),
    )
    assert first.problem == "field 'to' is missing"
    assert second.problem == "field 'to' must be str, not int"
    assert (report.types[0].jobs, report.types[0].fit, report.lost, report.status) == (7, 1, 6, 4)


HOSTILE_PAYLOADS = {
    "missing": (None, "is missing: it must be a Mail"),
    "empty": (b"", "is not JSON"),
    "not JSON": (b"{", "is not JSON"),
    "bytes": (b"\0\xff\xfe", "is not JSON"),
    "half a surrogate": (b'{"to":"\\ud800"}', "is not JSON"),
    "another shape": (b"[]", "must be"),
    "nested": (b"[" * 100_000, "is not JSON"),
    "a megabyte": (b'{"to":1,"x":"' + b"y" * 1_000_000 + b'"}', "field 'to' must be str"),
    "a megabyte of nothing": (b"\0" * 1_000_000, "is not JSON"),
}


@pytest.mark.parametrize("name", HOSTILE_PAYLOADS)
def test_a_hostile_payload_is_a_finding(dsn: str, conn: psycopg.Connection, name: str) -> None:
    payload, problem = HOSTILE_PAYLOADS[name]
    insert(conn, "a", arg=payload)
    insert(conn, "b", arg=FIT)
    report = preflight.check(dsn, mails())
    finding = found(report)["payload"]
    assert problem in finding.problem
    assert (finding.count, finding.ids, len(finding.problem) <= 200) == (1, ("a",), True)
    assert report.types[0].fit == 1


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ValueError("no"), "ValueError: no"),
        (KeyError("to"), "KeyError: 'to'"),
        (PayloadError("too old"), "too old"),
        (Unprintable(), "Unprintable (its text raised RuntimeError)"),
        (RecursionError("deep"), "RecursionError: deep"),
        (MemoryError(), "MemoryError"),
        (SystemExit(3), "SystemExit: 3"),
        (ValueError("x" * 100_000), "ValueError: " + "x" * 187 + "…"),
        (ValueError("two\nlines\0\x1b[31m"), "ValueError: two lines\ufffd\x1b[31m"),
    ],
)
def test_a_decoder_may_raise_anything(
    dsn: str, conn: psycopg.Connection, error: BaseException, problem: str
) -> None:
    insert(conn, "a", "t", arg=b"x")
    insert(conn, "none", "t")
    mux = Mux().register("t", never, codec=Raising(error))
    report = preflight.check(dsn, mux)
    assert found(report)["payload"].problem == problem
    assert found(report)["payload"].ids == ("a",)
    assert (report.lost, report.types[0].fit) == (1, 1)  # a missing payload is None


def test_ctrl_c_in_a_decoder_ends_the_preflight(dsn: str, conn: psycopg.Connection) -> None:
    insert(conn, "a", "t", arg=b"x")
    with pytest.raises(KeyboardInterrupt):
        preflight.check(dsn, Mux().register("t", never, codec=Raising(KeyboardInterrupt())))


def test_problems_beyond_the_first_twenty_of_a_type_are_counted_together() -> None:
    class Told:
        encode = JsonCodec.encode

        def decode(self, data: bytes) -> NoReturn:
            raise ValueError(data.decode())

    judge = Judge(Mux().register("mail", never, codec=Told()))
    for n in range(1000):
        job = candidate(str(n), arg=b"%d" % n, size=3)
        assert judge.count(job)
        judge.examine(job)
    groups = judge.tallies["q", "mail"].groups
    assert len(groups) == 21
    assert groups["payload", "other problems"].count == 980
    assert judge.tallies["q", "mail"].lost == 1000


def test_payloads_that_are_broken_in_different_places_are_one_finding(
    dsn: str, conn: psycopg.Connection
) -> None:
    for n in range(50):
        insert(conn, f"{n:02}", arg=b" " * n + b"x")
    finding = found(preflight.check(dsn, mails()))["payload"]
    assert (finding.count, finding.ids) == (50, ("00", "01", "02"))


def test_a_skipped_type_is_counted_and_not_decoded(dsn: str, conn: psycopg.Connection) -> None:
    insert(conn, "a", arg=b"encrypted", exclusive="k")
    mux = mails(middleware=[lambda handler: handler], exclusive=never)
    finding = found(preflight.check(dsn, mux))["payload"]
    assert "--skip mail" in finding.remedy
    report = preflight.check(dsn, mux, skip=["mail"])
    assert (report.findings, report.jobs, report.types[0].is_decoded) == ((), 1, False)


def test_names_of_any_characters_are_told_as_they_are(dsn: str, conn: psycopg.Connection) -> None:
    for name in HOSTILE:
        insert(conn, name, name, queue=name)
    report = preflight.check(dsn, Mux())
    assert {(f.queue, f.type, f.ids) for f in report.findings} == {(n, n, (n,)) for n in HOSTILE}
    mux = Mux()
    for name in HOSTILE:
        mux.register(name, never, codec=JsonCodec())
    assert preflight.check(dsn, mux, queues=HOSTILE).findings == ()


# -- attempts ----------------------------------------------------------------------------------


def test_jobs_whose_attempts_are_over_or_nearly_are_told_apart(
    dsn: str, conn: psycopg.Connection
) -> None:
    for attempt in range(8):
        insert(conn, str(attempt), arg=FIT, attempt=attempt)
    report = preflight.check(dsn, mails(max_attempts=3))
    by_code = found(report)
    last, over = by_code["last_attempt"], by_code["attempts_over"]
    assert (last.severity, last.count, last.ids) == ("warn", 2, ("3", "4"))
    assert (over.severity, over.count, over.ids) == ("bad", 3, ("5", "6", "7"))
    assert (report.lost, report.types[0].fit, report.status) == (3, 5, 4)
    assert preflight.check(dsn, mails(max_attempts=None)).findings == ()
    conn.execute("delete from bgjob_job where attempt > 4")
    assert preflight.check(dsn, mails(max_attempts=3)).status == 3


def test_the_attempt_that_runs_is_not_counted(dsn: str, conn: psycopg.Connection) -> None:
    for attempt in (3, 4, 5, 6):
        insert(conn, str(attempt), arg=FIT, attempt=attempt)
    conn.execute("update bgjob_job set token = 1, lease_until = now() + interval '1 h'")
    by_code = found(preflight.check(dsn, mails(max_attempts=3)))
    assert by_code["last_attempt"].ids == ("4", "5")
    assert by_code["attempts_over"].ids == ("6",)
    conn.execute("update bgjob_job set lease_until = now() - interval '1 s'")
    assert found(preflight.check(dsn, mails(max_attempts=3)))["attempts_over"].ids == ("5", "6")


# -- keys --------------------------------------------------------------------------------------


def key_of(job: Job) -> str | None:
    value: str | None = job.json().get("to")
    return value


def test_a_stored_key_that_this_release_would_not_give_is_told(
    dsn: str, conn: psycopg.Connection
) -> None:
    insert(conn, "a", arg=FIT, exclusive="a")
    insert(conn, "b", arg=FIT, exclusive="user:a")
    insert(conn, "c", arg=FIT)  # its worker computes one
    report = preflight.check(dsn, mails(exclusive=key_of))
    finding = found(report)["key_differs"]
    assert (finding.severity, finding.count, finding.ids) == ("warn", 1, ("b",))
    assert (report.status, report.lost, report.types[0].fit) == (3, 0, 3)
    assert found(preflight.check(dsn, mails(exclusive=True)))["key_differs"].count == 2
    assert preflight.check(dsn, mails()).findings == ()


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (lambda job: job.json()["user"], "KeyError: 'user'"),
        (lambda _: sys.exit("no"), "SystemExit: no"),
        (lambda _: "", "ValueError: the exclusive key of a job of type 'mail' must have 1 to"),
        (lambda _: 7, "TypeError: the exclusive key of a job of type 'mail' must be a str"),
    ],
)
def test_a_callable_for_keys_that_fails_is_told(
    dsn: str, conn: psycopg.Connection, key: Callable[[Job], Any], problem: str
) -> None:
    insert(conn, "a", arg=FIT)
    report = preflight.check(dsn, mails(exclusive=key))
    finding = found(report)["key_raises"]
    assert finding.problem.startswith(problem)
    assert (finding.severity, finding.ids, report.status, report.lost) == ("warn", ("a",), 3, 0)


def test_a_callable_for_keys_receives_the_job_as_a_worker_would_pass_it(
    dsn: str, conn: psycopg.Connection
) -> None:
    insert(conn, "a", "t", arg=b"x" * 100_000, attempt=2)
    insert(conn, "b", "t", arg=None)
    conn.execute("update bgjob_job set last_error = 'why', priority = 7")
    seen: list[Job] = []

    def key(job: Job) -> None:
        seen.append(job)

    mux = Mux().register("t", lambda _: None, exclusive=key)
    preflight.check(dsn, mux)
    told, seen[:] = sorted(seen), []
    with Client(dsn) as client:
        client.do("q", mux)
        client.do("q", mux)
    assert told == sorted(seen)
    assert len(told) == 2


# -- schedules ---------------------------------------------------------------------------------


def schedule(name: str, type_: str = "mail", arg: Any = None, **options: Any) -> Schedule:
    rule = {"every": 60} | options
    return Schedule(name, request=EnqueueRequest("q", type_, arg or {"to": "a"}), **rule)


def test_a_schedule_that_the_code_no_longer_has_is_told(dsn: str, conn: psycopg.Connection) -> None:
    Schedules([schedule("old"), schedule("kept")]).run(conn)
    new = Schedules([schedule("kept"), schedule("new")])
    finding = found(preflight.check(dsn, mails(), schedules=new))["schedule_gone"]
    assert (finding.severity, finding.ids) == ("warn", ("old",))
    assert finding.remedy == "bgjob schedules remove old"
    assert preflight.check(dsn, mails(), schedules=[*new, schedule("old")]).findings == ()
    assert preflight.check(dsn, mails()).findings == ()  # the code's are not known
    assert preflight.check(dsn, mails(), schedules=new, queues=["other"]).findings == ()


def test_a_schedule_whose_job_would_die_is_told(dsn: str, conn: psycopg.Connection) -> None:
    Schedules([schedule("unknown", "gone"), schedule("misfit", arg={"to": 1})]).run(conn)
    by_code = found(preflight.check(dsn, mails()))
    assert by_code["schedule_no_handler"].ids == ("unknown",)
    assert by_code["schedule_payload"].ids == ("misfit",)
    assert "field 'to' must be str" in by_code["schedule_payload"].text
    # A release that corrects them is judged by its own requests.
    assert {
        finding.code
        for finding in preflight.check(
            dsn, mails(), schedules=[schedule("unknown"), schedule("misfit")]
        ).findings
    } == {"schedule_changes"}
    report = preflight.check(dsn, Mux(), schedules=[schedule("new")], queues=["q"])
    assert [
        finding.ids for finding in report.findings if finding.code == "schedule_no_handler"
    ] == [("new",)]


def test_a_schedule_that_changes_is_a_note(dsn: str, conn: psycopg.Connection) -> None:
    Schedules([schedule("s")]).run(conn)
    changed = [schedule("s", arg={"to": "b"}, every=90)]
    report = preflight.check(dsn, mails(), schedules=changed)
    finding = found(report)["schedule_changes"]
    assert "spec 'every 0:01:00' becomes 'every 0:01:30', another payload" in finding.text
    assert (finding.severity, report.status) == ("note", 0)


# -- dead jobs ---------------------------------------------------------------------------------


def test_dead_jobs_that_would_be_handled_now_are_a_note(dsn: str, conn: psycopg.Connection) -> None:
    for n in range(4):
        bury(conn, f"fit{n}", "PayloadError: field 'to' must be int", FIT, "mail")
    bury(conn, "misfit", "PayloadError: field 'to' is missing", b"{}", "mail")
    bury(conn, "failed", "ValueError: no", FIT, "mail")
    bury(conn, "was unknown", "UnknownTypeError: no handler", b"?", "plain")
    bury(conn, "refused by its handler", "PayloadError: no", b"?", "plain")
    bury(conn, "unknown", "UnknownTypeError: no handler", FIT, "gone")
    bury(conn, "large", "PayloadError: x", b'{"to":"' + b"x" * 100_000 + b'"}', "mail")
    report = preflight.check(dsn, mails().register("plain", never))
    assert [(f.code, f.type, f.count, f.ids) for f in report.findings] == [
        ("dead_fit", "mail", 5, ("fit0", "fit1", "fit2")),
        ("dead_fit", "plain", 1, ("was unknown",)),
    ]
    assert (report.status, report.dead, report.jobs) == (0, 10, 0)
    assert "bgjob triage --queue q --type mail; " in report.findings[0].remedy


def test_live_workers_of_another_release_with_types_that_this_one_lacks_are_a_note(
    launcher: Launcher, dsn: str, conn: psycopg.Connection
) -> None:
    old = mails()
    for n in range(6):
        old.register(f"t{n}", never)
    insert(conn, "a", "t4", due="2030-01-01 00:00Z")
    insert(conn, "b", "t4", due="2030-01-01 00:00Z", queue="other")
    launcher.start(old, {"q": 1, "r": 1}, release="2026.10")
    launcher.shutdown(launcher.start(old, release="ended"))
    launcher.start(mails(), release="2026.11")
    notes = [f for f in preflight.check(dsn, mails()).findings if f.code == "other_release"]
    [note] = notes
    assert re.fullmatch(
        r"1 live worker \(release 2026\.10 of .+\) on 'q', 'r' has handlers for types that this "
        r"release lacks: 't4' \(1 live job\), 't0' \(0 live jobs\), 't1' .*, 't3' \(0 live jobs\), "
        r"1 more",
        note.text,
    )
    assert (note.severity, note.count) == ("note", 1)
    assert "let the old workers end last" in note.remedy
    assert [f.code for f in preflight.check(dsn, mails(), queues=["other"]).findings] == [
        "no_handler"
    ]
    report = preflight.check(dsn, old)
    assert (report.findings, report.status) == ((), 0)


def test_every_page_of_dead_jobs_is_read_whatever_their_ids(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_dead_job (job_id, queue, type, arg, attempt, last_error, priority, "
        "next_run_at, job_created_at, job_updated_at) select md5(n::text), 'q', 'mail', %s, 1, "
        "'PayloadError: x', 0, now(), now(), now() from generate_series(1, 12345) n",
        [FIT],
    )
    report = preflight.check(dsn, mails())
    assert (report.dead, found(report)["dead_fit"].count) == (12_345, 12_345)


# -- as a worker -------------------------------------------------------------------------------


def test_a_preflight_predicts_which_jobs_a_worker_dead_letters_unhandled(
    dsn: str, conn: psycopg.Connection
) -> None:
    payloads = [payload for payload, _ in HOSTILE_PAYLOADS.values()]
    payloads += [FIT, b'{"to":"a","lines":["1"]}', b'{"to":"a","more":1}', b"null"]
    for n, payload in enumerate(payloads):
        for type_ in ("mail", "json", "raw", "unknown"):
            for attempt in (0, 1, 2, 3, 4):
                insert(conn, f"{n} {type_} {attempt}", type_, arg=payload, attempt=attempt)
    handled: set[str] = set()

    def handle(_: object, job: Job) -> None:
        handled.add(job.id)

    mux = Mux()
    mux.register(Mail, handle, max_attempts=2, exclusive=lambda job: job.id)
    mux.register("json", handle, max_attempts=1, codec=JsonCodec())
    mux.register("raw", lambda job: handled.add(job.id), max_attempts=None)
    report = preflight.check(dsn, mux)
    jobs = [id_ for (id_,) in rows(conn, "select id from bgjob_job")]
    with Client(dsn) as client:
        for _ in jobs:
            client.do("q", mux)
    dead = {id_ for (id_,) in rows(conn, "select job_id from bgjob_dead_job")}
    assert dead == {*jobs} - handled
    assert (report.lost, report.jobs) == (len(dead), len(jobs))
    assert sum(fit.fit for fit in report.types) == len(handled)
    lost = {fit.type: fit.lost for fit in report.types}
    for type_, count in lost.items():
        assert count == len([id_ for id_ in dead if f" {type_} " in id_]), type_


def test_nothing_of_the_program_runs_and_nothing_changes(
    dsn: str, conn: psycopg.Connection
) -> None:
    Schedules([schedule("s")]).run(conn)
    conn.execute("update bgjob_schedule set next_run_at = now() - interval '1 h'")
    insert(conn, "a", arg=FIT)
    insert(conn, "b", arg=b"?")
    insert(conn, "c", "gone")
    bury(conn, "d", "PayloadError: x", FIT, "mail")

    def handler(_: Mail, *, state: object) -> NoReturn:
        never(state)

    def middleware(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: never(call, *arguments)

    mux = Mux(middleware=[middleware]).register(Mail, handler, backoff=never, exclusive=key_of)
    query = (
        "select (select array_agg(j) from bgjob_job j)::text, "
        "(select array_agg(d) from bgjob_dead_job d)::text, "
        "(select array_agg(s) from bgjob_schedule s)::text, "
        "(select array_agg(e) from bgjob_exclusive e)::text"
    )
    before = row(conn, query)
    preflight.check(dsn, mux, schedules=[])
    preflight.check(dsn, mux, sample=2)
    assert row(conn, query) == before


# -- the session -------------------------------------------------------------------------------


def test_no_transaction_is_open_while_a_payload_is_decoded(
    dsn: str, conn: psycopg.Connection
) -> None:
    sessions: list[tuple[Any, ...]] = []

    class Looking(JsonCodec):
        def decode(self, data: bytes) -> None:
            sessions.extend(
                rows(
                    conn,
                    "select state, backend_xmin, backend_xid from pg_stat_activity "
                    "where application_name = 'bgjob preflight' and datname = current_database()",
                )
            )

    insert(conn, "a", "t", arg=b"1")
    insert(conn, "b", "t", arg=b"1" * 50_000)
    preflight.check(dsn, Mux().register("t", never, codec=Looking()))
    assert sessions == [("idle", None, None)] * 2


@pytest.mark.parametrize("way", ["direct", "pooler"])
def test_the_session_is_read_only_and_has_limits(dsn: str, way: str) -> None:
    names = "statement_timeout", "lock_timeout", "jit", "transaction_read_only", "application_name"
    values = ", ".join(f"current_setting('{name}')" for name in names)
    asked = Statement(f"select {values}".encode(), None, lambda rows: rows[0])
    with Pooler(dsn) as pooler:
        source = pooler.dsn(dsn) if way == "pooler" else dsn
        with Connection.connect(source, autocommit=True) as conn:
            ask = preflight._sender(conn)
            for _ in range(3):
                assert ask(asked) == ("5s", "1s", "off", "on", "bgjob preflight")
            with pytest.raises(ReadOnlySqlTransaction):
                ask(Statement("delete from bgjob_job", None, lambda _: None))
        with Client(dsn) as client:
            client.enqueue(EnqueueRequest("q", "mail", {"to": "a"}))
        assert preflight.check(source, mails()).types[0].fit == 1


def test_a_job_that_another_session_has_locked_is_read_all_the_same(
    dsn: str, conn: psycopg.Connection
) -> None:
    insert(conn, "a", arg=FIT)
    with psycopg.connect(dsn) as other:
        other.execute("select from bgjob_job for update")
        other.execute("delete from bgjob_job")
        assert preflight.check(dsn, mails()).types[0].fit == 1


# -- large numbers -----------------------------------------------------------------------------


def fill(conn: psycopg.Connection, jobs: int, size: int = 10) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, arg) "
        "select lpad(n::text, 7, '0'), 'q', 'mail', "
        "convert_to('{\"to\":\"' || repeat('x', %s) || '\"}', 'UTF8') "
        "from generate_series(1, %s) n",
        [size, jobs],
    )


def test_pages_and_large_payloads_are_read_completely(dsn: str, conn: psycopg.Connection) -> None:
    fill(conn, 12_345)
    for size in (4_000, 5_000, 1_000_000):
        conn.execute(
            "update bgjob_job set arg = convert_to('{\"to\":\"' || repeat('x', %s) || '\"}', 'UTF8')"
            " where right(id, 3) = lpad(%s, 3, '0')",
            [size, str(size % 997 % 100)],
        )
    conn.execute("update bgjob_job set arg = '{}' where id = '0012345' or right(id, 4) = '0000'")
    report = preflight.check(dsn, mails())
    assert (report.jobs, report.lost, report.types[0].fit) == (12_345, 2, 12_343)
    assert found(report)["payload"].ids == ("0010000", "0012345")


def test_memory_does_not_grow_with_the_number_of_jobs(dsn: str, conn: psycopg.Connection) -> None:
    def peak() -> int:
        tracemalloc.start()
        try:
            assert preflight.check(dsn, mails()).status == 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    fill(conn, 10_000, 1_000)
    few = peak()
    conn.execute("truncate bgjob_job")
    fill(conn, 40_000, 1_000)
    assert peak() < 1.1 * few


def test_a_sample_decodes_the_first_the_last_and_others_of_each_type(
    dsn: str, conn: psycopg.Connection
) -> None:
    fill(conn, 7_000)
    conn.execute("update bgjob_job set arg = '{}' where id in ('0000001', '0007000')")
    conn.execute("update bgjob_job set arg = '[]' where id > '0001000' and id <= '0006000'")
    insert(conn, "x", "gone")
    report = preflight.check(dsn, mails(), sample=30)
    by_type = {fit.type: fit for fit in report.types}
    assert (by_type["mail"].jobs, by_type["gone"].lost) == (7_000, 1)
    assert by_type["mail"].fit + by_type["mail"].lost == 30
    by_problem = {finding.problem: finding for finding in report.findings}
    assert by_problem["field 'to' is missing"].ids == ("0000001", "0007000")
    everything = preflight.check(dsn, mails(), sample=10_000)
    assert everything.lost == preflight.check(dsn, mails()).lost == 5_003


def test_a_sample_of_dead_jobs_is_looked_at(dsn: str, conn: psycopg.Connection) -> None:
    for n in range(20):
        bury(conn, str(n), "PayloadError: x", FIT, "mail")
    assert found(preflight.check(dsn, mails(), sample=6))["dead_fit"].count == 6


@pytest.mark.parametrize("size", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("jobs", [0, 1, 5, 99, 100, 1000])
def test_a_sample_has_so_many_jobs_each_once(size: int, jobs: int) -> None:
    sample = Sample(size)
    for n in range(jobs):
        sample.add("t", n)
        sample.add("other", -n - 1)
    keys = list(sample.keys())
    mine = [key for key in keys if isinstance(key, int) and key >= 0]
    assert len(keys) == len(set(keys)) == 2 * min(size, jobs)
    assert len(mine) == min(size, jobs)
    assert {*range(min(size // 3, jobs))} <= {*mine}
    assert {*range(max(jobs - size // 3, 0), jobs)} <= {*mine}


def test_each_job_between_has_the_same_chance() -> None:
    chosen = [0] * 40
    for _ in range(2000):
        sample = Sample(3)
        for n in range(42):
            sample.add("t", n)
        for key in sample.keys():
            if isinstance(key, int) and 0 < key < 41:
                chosen[key - 1] += 1
    assert sum(chosen) == 2000
    assert max(chosen) < 110  # 50 are expected, with a deviation of 7


# -- steps, answered without a database ----------------------------------------------------------


def answer(
    mux: Mux, options: Options, clock: Callable[[], float], of_jobs: Callable[[Any], Any]
) -> Report:
    """Answer the steps of an inspection: as an empty database, but for pages of live jobs."""
    steps = inspect(mux, options, clock)
    statement = next(steps)
    try:
        while True:
            text = str(statement.text)
            if "obj_description" in text:
                reply: Any = "bgjob schema 1"
            elif "from bgjob_job" in text and "arg" in text:
                reply = of_jobs(statement)
            elif "from bgjob_dead_job" in text:
                reply = Page(0, None, [])
            elif "clock_timestamp" in text and "bgjob_worker" not in text:
                reply = AT
            else:
                reply = []
            statement = steps.throw(reply) if isinstance(reply, Exception) else steps.send(reply)
    except StopIteration as stop:
        report: Report = stop.value
        return report


def test_a_page_that_takes_too_long_is_read_in_smaller_ones() -> None:
    asked: list[int] = []

    def of_jobs(statement: Statement[Any]) -> Any:
        assert statement.params is not None
        wanted = int(str(statement.params["rows"]))
        asked.append(wanted)
        return QueryCanceled() if wanted > 1000 else Page(1, "a", [candidate("a", arg=FIT, size=9)])

    report = answer(mails(), Options(), lambda: 0.0, of_jobs)
    assert (asked, report.jobs) == ([5000, 1250, 312], 1)
    with pytest.raises(QueryCanceled):
        answer(mails(), Options(), lambda: 0.0, lambda _: QueryCanceled())


def test_a_time_limit_ends_it_between_two_pages() -> None:
    now = iter(range(1000))
    pages = iter(range(1000))

    def of_jobs(_: Statement[Any]) -> Page:
        n = next(pages)
        return Page(5000, str(n), [candidate(str(n), arg=FIT, size=9)])

    report = answer(mails(), Options(limit_time=10), lambda: float(next(now)), of_jobs)
    assert not report.is_complete
    assert report.jobs == 9
    assert report.status == 0


def test_a_job_that_ends_before_its_large_payload_is_read_is_not_counted() -> None:
    jobs = [candidate("a", size=5_000), candidate("b", size=5_000), candidate("c", arg=FIT, size=9)]

    def of_jobs(statement: Statement[Any]) -> Any:
        if "rows" in (statement.params or {}):
            return Page(3, "c", jobs)
        return {"b": b'{"to":"b"}'}

    report = answer(mails(), Options(), lambda: 0.0, of_jobs)
    assert [(fit.jobs, fit.fit, fit.lost) for fit in report.types] == [(2, 2, 0)]


def test_large_payloads_are_read_by_their_size() -> None:
    read: list[list[str]] = []
    sizes = [4_000_000, 4_000_000, 1, 20_000_000, 5_000]

    def of_jobs(statement: Statement[Any]) -> Any:
        params: Any = statement.params
        if "rows" in params:
            return Page(5, "4", [candidate(str(n), size=size) for n, size in enumerate(sizes)])
        read.append(params["keys"])
        return dict.fromkeys(params["keys"], FIT)

    assert answer(mails(), Options(), lambda: 0.0, of_jobs).types[0].fit == 5
    assert read == [["0", "1"], ["2"], ["3"], ["4"]]


# -- errors ------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused(dsn: str) -> None:
    for sample in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="sample must be a whole number from 1"):
            preflight.check(dsn, Mux(), sample=sample)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="collections of names"):
        preflight.check(dsn, Mux(), queues="q")
    with pytest.raises(ValueError, match="queue must have 1 to 255 characters"):
        preflight.check(dsn, Mux(), queues=[""])
    with pytest.raises(ValueError, match="not a connection string"):
        preflight.check("postgresql://u:p@ss@host/db", Mux())


def test_missing_tables_are_told(empty_dsn: str) -> None:
    with pytest.raises(SchemaError, match=r"migration/init\.sql"):
        preflight.check(empty_dsn, Mux())


# -- the command ---------------------------------------------------------------------------------

MODULE = """
from dataclasses import dataclass
from bgjob import EnqueueRequest, Mux, Schedule, Schedules

@dataclass
class Mail:
    to: str

def handler(mail):
    raise SystemExit("a handler ran")

mux = Mux().register(Mail, handler, max_attempts=2).register("plain", handler)
schedules = Schedules([Schedule("s", every=60, request=EnqueueRequest("q", "plain"))])
number = 7

def make():
    raise SystemExit("a factory ran")
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    dsn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Run]:
    """Run the command where a program's module is; return its exit status and output."""
    name = f"release_{os.urandom(4).hex()}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("BGJOB_DSN", dsn)

    def run(*args: str, target: str = ":mux") -> tuple[int, str, str]:
        status = cli.main(["preflight", name + target, *(a.replace("NAME", name) for a in args)])
        return status, *capsys.readouterr()

    yield run
    for module in (name, f"{name}_broken"):
        sys.modules.pop(module, None)


def test_the_command_shows_counts_findings_and_what_to_do(
    run: Run, conn: psycopg.Connection
) -> None:
    insert(conn, "a", "Mail", arg=FIT)
    insert(conn, "b", "Mail", arg=b"{}")
    insert(conn, "c\x1b[31m", "gone")
    insert(conn, "d", "plain")
    status, out, err = run()
    assert (status, err) == (4, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:4] == [
        "queue type jobs fit without handler problem",
        "q Mail 2 1 - 1 × field 'to' is missing",
        "q gone 1 - 1 1 × no handler",
        "q plain 1 1 - -",
    ]
    assert "BAD 1 job of type 'Mail' in queue 'q' has a payload that does not fit" in lines[4]
    assert lines[5].startswith("do make the type accept it")
    assert "\x1b" not in out
    assert lines[-2] == "not decoded, because the type has no codec or is left out: 'plain'"
    assert lines[-1].startswith("4 jobs in ")
    assert lines[-1].endswith(" s: this release would dead-letter 2 of them")


def test_the_command_exits_with_0_3_or_4(run: Run, conn: psycopg.Connection) -> None:
    assert run()[0] == 0
    insert(conn, "a", "Mail", arg=FIT, attempt=1)
    status, out, _ = run()
    assert (status, out.splitlines()[-1].split(":")[1]) == (
        0,
        " this release would dead-letter none",
    )
    insert(conn, "b", "Mail", arg=FIT, attempt=2)
    assert run()[0] == 3
    insert(conn, "c", "gone")
    assert run()[0] == 4
    assert run("--queue", "other")[0] == 0


def test_the_command_prints_json(run: Run, conn: psycopg.Connection) -> None:
    insert(conn, "a", "Mail", arg=b"?")
    status, out, _ = run("--json", "--limit-time", "1h", "--sample", "5")
    value = json.loads(out)
    assert (status, value["status"], value["lost"], value["is_complete"]) == (4, 4, 1, True)
    assert value["types"] == [
        {
            **{"queue": "q", "type": "Mail", "jobs": 1, "fit": 0, "lost": 1},
            **{"has_handler": True, "is_decoded": True},
        }
    ]
    [finding] = value["findings"]
    assert (finding["code"], finding["severity"], finding["ids"]) == ("payload", "bad", ["a"])
    assert run("--skip", "Mail")[0] == 0


def test_the_command_says_that_a_sample_or_a_time_limit_saw_not_all(
    run: Run, conn: psycopg.Connection
) -> None:
    insert(conn, "a", "Mail", arg=b"?")
    assert run("--sample", "1")[1].endswith("would dead-letter at least 1 of them\n")
    status, out, _ = run("--limit-time", "0")
    assert status == 0
    assert "then the time was up: nothing is known about the others" in out
    assert out.endswith("none found\n")


def test_the_command_compares_schedules(run: Run, conn: psycopg.Connection) -> None:
    Schedules([schedule("old", "plain")]).run(conn)
    assert run()[0] == 0
    status, out, _ = run("--schedules", "NAME:schedules")
    assert status == 3
    assert "warn  schedule 'old' is not in this release" in out
    assert "do    bgjob schedules remove old\n" in out


@pytest.mark.parametrize(
    ("target", "args", "told"),
    [
        (":number", [], "is an int; name the Mux itself"),
        (":make", [], "is a function; name the Mux itself"),
        (":nothing", [], "there is no 'nothing' in"),
        ("_none:mux", [], "there is no module"),
        ("_broken:mux", [], "ZeroDivisionError"),
        (":mux", ["--schedules", "NAME:mux"], "is a Mux; name a Schedules"),
        (":mux", ["--schedules", "NAME:number"], "is an int; name a Schedules"),
    ],
)
def test_the_command_refuses_what_is_not_a_mux(
    run: Run, target: str, args: Sequence[str], told: str
) -> None:
    status, out, err = run(*args, target=target)
    assert (status, out) == (1, "")
    assert told in err
    assert err.splitlines()[-1].startswith("bgjob: ")


@pytest.mark.parametrize(
    "args",
    [[], ["x"], ["x:y", "--sample", "0"], ["x:y", "--limit-time", "x"], ["x:y", "--queue", ""]],
)
def test_the_command_refuses_wrong_arguments(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["preflight", *args])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: bgjob preflight")


def test_the_help_tells_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["preflight", "--help"])
    assert exit.value.code == 0
    told = capsys.readouterr().out
    for word in ("MODULE:MUX", "--schedules MODULE:NAME", "--limit-time DURATION", "4    BAD"):
        assert word in told


def test_the_process_exits_with_the_status(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "release.py").write_text(MODULE)
    with psycopg.connect(dsn) as conn:
        insert(conn, "a", "gone")
    done = subprocess.run(
        [sys.executable, "-m", "bgjob", "preflight", "release:mux", "--dsn", dsn],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (4, "")
