"""Least privileges suffice, values are never executed, and secrets are never shown."""

import ast
import contextlib
import dataclasses
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, LiteralString, cast

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import InsufficientPrivilege
from support.clients import HOSTILE as HOSTILE_NAMES
from support.database import rows, sleeper
from support.documents import DOCS, ROOT, SCRIPT
from support.jobs import a_job
from support.roles import GROUPS, Grant, Roles
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Launcher, Gate, Recorder

import bgjob.cli
import bgjob.schema
from bgjob import (
    AsyncClient,
    Client,
    Complete,
    DlqRetention,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    JsonCodec,
    Limit,
    MinuteCounts,
    Minutes,
    MoveToDlq,
    Mux,
    PayloadError,
    Reschedule,
    Result,
    Retry,
    Schedule,
    Schedules,
    SchemaError,
    WorkerCounts,
    preflight,
)
from bgjob._sql import (
    claims,
    dead,
    enqueues,
    groups,
    history,
    key_rows,
    keys,
    leases,
    minutes,
    limits,
    overviews,
    pauses,
    schedules,
    settlements,
    steering,
    survey,
    transactions,
    workers,
    results,
)
from bgjob._sql.jobs import JobFilter
from bgjob._sql.settlements import DeadLettered, Claimed, Postponed
from bgjob._sql.statement import Statement
from bgjob.ext.embedded import EmbeddedServer
from bgjob.schedule import Firing

# -- privileges ---------------------------------------------------------------------------


def parse(script: str) -> list[Grant]:
    script = re.sub(r"--.*", "", script)
    return [
        Grant(role.removeprefix("bgjob_"), privilege, " ".join(columns.split()), table.strip())
        for what, tables, role in re.findall(
            r"\bgrant\s+(.*?)\s+on\s+(.*?)\s+to\s+(\w+)", script, re.DOTALL
        )
        for privilege, columns in re.findall(r"(\w+)\s*(\([^)]*\))?", what)
        for table in tables.split(",")
    ]


GRANTS = parse(SCRIPT)


def test_the_privileges_script_speaks_of_all_roles_and_tables() -> None:
    assert {grant.group for grant in GRANTS} == set(GROUPS)
    tables = set(re.findall(r"^create table (\w+)", bgjob.schema.init_sql(), re.MULTILINE))
    assert {grant.table for grant in GRANTS} == tables
    assert {grant.privilege for grant in GRANTS} == {
        *("select", "insert", "update", "delete", "truncate")
    }


def test_a_producer_needs_only_its_role(
    launcher: Launcher, roles: Roles, conn: psycopg.Connection
) -> None:
    producer = roles.login("producer")
    observer = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)

    def request(id_: str, **options: Any) -> EnqueueRequest:
        return EnqueueRequest("q", "t", {"n": 1}, id=id_, **options)

    client: Any = AsyncClient(producer) if launcher.is_async else Client(producer)
    try:
        for id_ in ("one", "many"):
            assert eventually(lambda: sleeper(conn) is not None)  # it has to be notified
            if id_ == "one":
                assert launcher.run(client.enqueue(request(id_))) == id_
            else:
                assert launcher.run(client.bulk_enqueue([request(id_)])) == [id_]
            observer.wait_for("completed", id_)
        launcher.run(client.enqueue(request("taken", delay=NEVER, priority=3, exclusive="key")))
        with pytest.raises(JobAlreadyExistsError):
            launcher.run(client.enqueue(request("taken")))
        with pytest.raises(JobAlreadyExistsError):
            launcher.run(client.bulk_enqueue([request("new"), request("taken")]))
        both = [request("taken"), request("new", delay=NEVER)]
        assert launcher.run(client.bulk_enqueue(both, on_conflict="skip")) == [None, "new"]
    finally:
        launcher.run(client.close())
    with Client(producer, notify=False) as quiet, psycopg.connect(producer) as transaction:
        quiet.enqueue(request("mine", delay=NEVER), conn=transaction)
        transaction.rollback()
    assert rows(conn, "select id from bgjob_job order by id") == [("new",), ("taken",)]


@pytest.mark.parametrize("transactional", [False, True])
def test_a_worker_needs_only_its_role(
    launcher: Launcher, roles: Roles, conn: psycopg.Connection, transactional: bool
) -> None:
    results: dict[str, list[Result]] = {
        "complete": [Complete()],
        "retry": [Retry(0.0, "once"), Complete()],
        "reschedule": [Reschedule(0.0), Complete()],
        "dead_letter": [MoveToDlq("why")],
        "exhaust": [Retry(0.0, "never")],
    }

    def handle(job: Job, *_: Any) -> Result:
        return results[job.id].pop(0)

    async def handle_async(job: Job, *_: Any) -> Result:
        return handle(job)

    observer = Recorder()
    launcher.enqueue(*results)
    mux: Any = Mux()
    mux.register(
        "t",
        handle_async if launcher.is_async else handle,
        max_attempts=2,
        transactional=transactional,
    )
    results["exhaust"] *= 2
    worker = launcher.make(mux, dsn=roles.login("worker"), observer=observer, poll_interval=0.1)
    launcher.run(worker.run())
    try:
        for id_ in ("complete", "retry", "reschedule"):
            observer.wait_for("completed", id_)
        for id_ in ("dead_letter", "exhaust"):
            observer.wait_for("dead", id_)
        launcher.enqueue("unknown", type="nobody's")
        observer.wait_for("dead", "unknown")
    finally:
        assert launcher.shutdown(worker)
    assert observer.of("error") == []
    assert rows(conn, "select id from bgjob_job") == []


def test_a_worker_with_its_role_extends_leases_frees_ended_ones_and_releases(
    launcher: Launcher, roles: Roles, conn: psycopg.Connection
) -> None:
    gate = Gate()
    observer = Recorder()
    mux = Mux().register("quick", lambda _: None)
    mux.register("slow", gate.of("coroutine" if launcher.is_async else "plain"))
    launcher.enqueue("orphan", type="quick")
    conn.execute(
        "update bgjob_job set token = 1, attempt = 1, lease_until = now() - interval '1 second'"
    )
    worker = launcher.make(
        mux, dsn=roles.login("worker"), observer=observer, lease=3.0, poll_interval=0.1
    )
    launcher.run(worker.run())
    try:
        observer.wait_for("completed", "orphan")
        launcher.enqueue(*(f"quick {n:03}" for n in range(200)), type="quick")
        launcher.enqueue("slow", type="slow")
        launcher.enqueue(*(f"unstarted {n:03}" for n in range(200)), type="quick")
        gate.wait()
        held = "select lease_until from bgjob_job where id = 'slow'"
        [(first,)] = rows(conn, held)
        assert eventually(lambda: rows(conn, held)[0][0] > first)
    finally:
        ending = threading.Thread(target=lambda: launcher.shutdown(worker, timeout=None))
        ending.start()
        claimed = "select id from bgjob_job where token is not null or attempt <> 0"
        released = eventually(lambda: rows(conn, claimed) == [("slow",)])
        gate.released.set()
        ending.join()
    assert released
    assert observer.of("error") == []
    assert rows(conn, claimed) == []
    assert rows(conn, "select count(*) from bgjob_job") == [(200,)]


@pytest.mark.parametrize("transactional", [False, True])
def test_a_worker_needs_only_its_role_for_keys_and_priorities(
    launcher: Launcher, roles: Roles, conn: psycopg.Connection, transactional: bool
) -> None:
    def handle(job: Job, *_: Any) -> Result:
        if job.type == "dies":
            return MoveToDlq("why")
        return Retry(0.0, priority=-1) if job.attempt == 1 else Complete()

    async def handle_async(job: Job, *_: Any) -> Result:
        return handle(job)

    requests = [EnqueueRequest("q", "named", id=f"named {n}", exclusive="key") for n in range(5)]
    requests += [EnqueueRequest("q", "found", id=f"found {n}") for n in range(5)]
    requests += [EnqueueRequest("q", "dies", id=f"dies {n}", exclusive="key") for n in range(2)]
    launcher.client.bulk_enqueue(requests)
    observer = Recorder()
    mux: Any = Mux()
    handler = handle_async if launcher.is_async else handle
    for type_, exclusive in (("named", None), ("found", True), ("dies", None)):
        mux.register(type_, handler, exclusive=exclusive, transactional=transactional)
    dsn = roles.login("worker")
    worker = launcher.make(mux, dsn=dsn, observer=observer, concurrency=4, poll_interval=0.1)
    launcher.run(worker.run())
    try:
        for request in requests:
            observer.wait_for("dead" if request.type == "dies" else "completed", request.id)
        assert eventually(lambda: rows(conn, "select key from bgjob_exclusive") == [])
    finally:
        assert launcher.shutdown(worker)
    assert observer.of("error") == []


def test_do_needs_only_the_role_of_a_worker(
    launcher: Launcher, roles: Roles, conn: psycopg.Connection
) -> None:
    worker = roles.login("worker")
    client: Any = AsyncClient(worker) if launcher.is_async else Client(worker)
    launcher.client.enqueue(EnqueueRequest("q", "t", id="a", exclusive="key"))
    try:
        for result in (Retry(0, error="e"), Reschedule(0), MoveToDlq("why")):
            mux = Mux().register("t", lambda _, result=result: result)
            assert launcher.run(client.do("q", mux)) == result
    finally:
        launcher.run(client.close())
    assert rows(conn, "select job_id from bgjob_dead_job") == [("a",)]


def test_a_transactional_handler_that_enqueues_also_needs_the_role_of_a_producer(
    launcher: Launcher, roles: Roles, conn: psycopg.Connection
) -> None:
    dsn = roles.login("worker", "producer")

    def handle(_: Job, conn: psycopg.Connection) -> None:
        with Client(dsn) as client:
            client.enqueue(EnqueueRequest("q", "child", id="child"), conn=conn)

    async def handle_async(_: Job, conn: psycopg.AsyncConnection) -> None:
        async with AsyncClient(dsn) as client:
            await client.enqueue(EnqueueRequest("q", "child", id="child"), conn=conn)

    observer = Recorder()
    mux = Mux().register("child", lambda _: None)
    mux.register("t", handle_async if launcher.is_async else handle, transactional=True)
    launcher.enqueue("parent")
    worker = launcher.make(mux, dsn=dsn, observer=observer, poll_interval=0.1)
    launcher.run(worker.run())
    try:
        observer.wait_for("completed", "child")
    finally:
        assert launcher.shutdown(worker)
    assert observer.of("error", "retried", "dead") == []


def test_a_worker_with_schedules_also_needs_the_role_of_a_scheduler(
    launcher: Launcher, roles: Roles
) -> None:
    dsn = roles.login("worker", "scheduler")
    options: dict[str, Any] = {"request": EnqueueRequest("q", "t"), "every": 1}
    observer = Recorder()
    mux = Mux().register("t", lambda _: None)
    # The role of a worker lets it read the ids of jobs, and write successors.
    lacking = [g for g in GRANTS if g.group == "scheduler" and "bgjob_job" not in g.table]
    for grant in lacking:
        roles.revoke(grant)
        services = [Schedules([Schedule("s", **options)])]
        worker = launcher.make(mux, dsn=dsn, services=services)
        with pytest.raises(SchemaError, match=f"may not {grant.privilege}.*on.*{grant.table}"):
            launcher.run(worker.run())
        roles.conn.execute(roles.named(f"grant {grant} to bgjob_scheduler"))
    services = [Schedules([Schedule("s", **options)])]
    launcher.start(mux, dsn=dsn, services=services, observer=observer)
    observer.wait_for("completed")
    launcher.client.schedules.pause("s")
    launcher.client.schedules.resume("s")
    observer.wait_for("completed", times=2)
    assert observer.of("error") == []


def test_a_worker_with_a_retention_also_needs_the_role_of_an_operator(
    roles: Roles, conn: psycopg.Connection
) -> None:
    with Client(roles.dsn) as owner:
        owner.enqueue(EnqueueRequest("q", "t"))
        owner.do("q", Mux().register("t", lambda _: MoveToDlq("why")))
    with (
        psycopg.connect(roles.login("worker"), autocommit=True) as worker,
        pytest.raises(InsufficientPrivilege),
    ):
        DlqRetention(0).run(worker)
    with psycopg.connect(roles.login("worker", "operator"), autocommit=True) as both:
        DlqRetention(0).run(both)
    assert rows(conn, "select count(*) from bgjob_dead_job") == [(0,)]


def test_an_operator_needs_only_its_role(
    launcher: Launcher, roles: Roles, conn: psycopg.Connection
) -> None:
    Schedules([Schedule("s", every=60, request=EnqueueRequest("other", "t"))]).run(conn)
    ids = ["a", "b", "c"]
    launcher.enqueue(*ids, "live", "failing", arg=b"arg")
    for _ in ids:
        launcher.client.do("q", Mux().register("t", lambda _: MoveToDlq("why")))
    launcher.client.do("q", Mux().register("t", lambda _: Retry(NEVER, error="no")))
    dsn = roles.login("operator")
    client: Any = AsyncClient(dsn) if launcher.is_async else Client(dsn)
    try:
        assert {dead.id for dead in launcher.run(client.dlq.list(queue="q"))} == set(ids)
        dead = launcher.run(client.dlq.get("a"))
        assert (dead.arg, dead.last_error) == (b"arg", "why")
        assert launcher.run(client.dlq.requeue("a")) == ["a"]
        assert launcher.run(client.dlq.requeue(type="t", ids=["b"])) == ["b"]
        assert launcher.run(client.dlq.purge(queue="q")) == 1
        launcher.run(client.schedules.pause("s"))
        assert [s.paused for s in launcher.run(client.schedules.list())] == [True]
        launcher.run(client.schedules.resume("s"))
        launcher.run(client.schedules.run("s"))
        launcher.run(client.schedules.remove("s"))
        assert launcher.run(client.schedules.list()) == []
        assert (3, 1) in {(s.due, s.delayed) for s in launcher.run(client.stats())}
        launcher.run(client.pause("q"))
        assert launcher.run(client.paused()) == {"q": None}
        seen = launcher.run(client.overview()).queues
        assert {(q.queue, q.load, q.is_paused) for q in seen} >= {("q", 3, True)}
        assert launcher.run(client.resume("q"))
    finally:
        launcher.run(client.close())
    monitoring = (DOCS / "monitoring.sql").read_text("utf-8")
    operations = (DOCS / "operations.md").read_text("utf-8")
    answers = []
    with psycopg.connect(dsn) as conn:
        for query in monitoring.split(";"):
            if query.strip():
                answers.append(conn.execute(query.encode()).fetchall())
        [query] = re.findall(r"query: >\n(.*?)```", operations, re.DOTALL)
        assert conn.execute(query.replace("'mail'", "'q'").encode()).fetchall() == [(3,)]
    assert {row[:3] for row in answers[0]} == {("q", "t", 3), ("other", "t", 1)}
    assert len(answers) == monitoring.count(";")


def test_an_editor_needs_only_its_role(
    launcher: Launcher, roles: Roles, conn: psycopg.Connection
) -> None:
    gate = Gate()
    mux = Mux().register("t", gate.coroutine)
    launcher.client.bulk_enqueue(
        [EnqueueRequest("q", "t", id=id_, exclusive="k") for id_ in ("first", "second")]
    )
    launcher.enqueue("third", "late", delay=NEVER)
    launcher.start(mux, concurrency=4)
    gate.wait()
    assert eventually(lambda: rows(conn, "select id from bgjob_job where waits"))
    dsn = roles.login("editor")
    client: Any = AsyncClient(dsn) if launcher.is_async else Client(dsn)
    try:
        [running] = launcher.run(client.jobs.list(state="running")).jobs
        assert running.worker is not None
        assert launcher.run(client.jobs.set_priority("late", priority=-1)).waiting == ("late",)
        assert launcher.run(client.jobs.cancel("first", by="me")).running == ("first",)
        gate.wait()
        assert launcher.run(client.jobs.abandon("second", by="me")).running == ("second",)
        assert launcher.run(client.jobs.run_now("third")).waiting == ("third",)
        gate.wait()
        assert launcher.run(client.jobs.cancel(queue="q")).changed == ("late", "third")
    finally:
        launcher.run(client.close())
    gate.released.set()
    assert rows(conn, "select job_id, last_error from bgjob_dead_job order by id") == [
        ("first", "cancelled by me"),
        ("second", "abandoned by me"),
        ("late", f"cancelled by {conninfo_to_dict(dsn)['user']}"),
        ("third", f"cancelled by {conninfo_to_dict(dsn)['user']}"),
    ]


def jobs_for_a_preflight(roles: Roles) -> Mux:
    """Write a live, a dead and a scheduled job that fit no handler of the returned Mux."""
    with Client(roles.dsn) as owner:
        owner.enqueue(EnqueueRequest("q", "json", b"dead", id="dead"))
        owner.do("q", Mux().register("json", lambda _: MoveToDlq(PayloadError("why"))))
        owner.enqueue(EnqueueRequest("q", "json", b"live", id="live"))
    Schedules([Schedule("s", every=60, request=EnqueueRequest("q", "none"))]).run(roles.conn)
    roles.conn.execute("update bgjob_dead_job set arg = '1'")
    return Mux().register("json", lambda _: None, codec=JsonCodec())


def test_a_preflight_needs_only_the_role_of_an_operator(roles: Roles) -> None:
    mux = jobs_for_a_preflight(roles)
    report = preflight.check(roles.login("operator"), mux)
    assert report == dataclasses.replace(preflight.check(roles.dsn, mux), seconds=report.seconds)
    codes = ["payload", "schedule_no_handler", "dead_fit"]
    assert [finding.code for finding in report.findings] == codes


def test_a_preflight_needs_no_privilege_but_to_read(roles: Roles) -> None:
    mux = jobs_for_a_preflight(roles)
    dsn = roles.login()
    reader = sql.Identifier(str(conninfo_to_dict(dsn)["user"]))
    roles.conn.execute(
        sql.SQL(
            "grant select on bgjob_job, bgjob_dead_job, bgjob_schedule, bgjob_worker to {}"
        ).format(reader)
    )
    assert len(preflight.check(dsn, mux).findings) == 3


def test_a_preflight_of_a_workers_role_says_what_it_may_not_read(roles: Roles) -> None:
    mux = jobs_for_a_preflight(roles)
    report = preflight.check(roles.login("worker"), mux, schedules=[])
    payload, *unread = report.findings
    assert (payload.code, payload.ids, report.jobs, report.dead) == ("payload", ("live",), 1, 0)
    assert [finding.code for finding in unread] == ["unread"] * 3
    for table in ("bgjob_dead_job", "bgjob_schedule", "bgjob_worker"):
        [finding] = [finding for finding in unread if table in finding.text]
        assert finding.severity == "note"
        assert f"grant select on {table} to app_" in finding.remedy


@pytest.mark.parametrize("role", ["producer", "scheduler", "nobody"])
def test_a_preflight_without_the_privilege_to_read_jobs_names_it(roles: Roles, role: str) -> None:
    dsn = roles.login(*({role} & set(GROUPS)))
    with pytest.raises(SchemaError, match=r"grant select .* on bgjob_job to app_"):
        preflight.check(dsn, Mux())


def test_a_preflight_says_that_jobs_may_be_hidden_from_its_role(roles: Roles) -> None:
    mux = jobs_for_a_preflight(roles)
    dsn = roles.login("operator")
    roles.conn.execute("alter table bgjob_job enable row level security")
    report = preflight.check(dsn, mux)
    assert (report.jobs, report.status) == (0, 3)
    [finding] = [finding for finding in report.findings if finding.code == "hidden"]
    roles.conn.execute(finding.remedy.removeprefix("as its owner: ").encode())
    report = preflight.check(dsn, mux)
    assert (report.jobs, report.status) == (1, 4)
    assert "hidden" not in {finding.code for finding in report.findings}


def test_an_operator_makes_every_check_of_the_doctor_with_only_its_role(
    launcher: Launcher, roles: Roles
) -> None:
    def refused(dsn: str) -> set[str]:
        client: Any = AsyncClient(dsn) if launcher.is_async else Client(dsn)
        try:
            found = launcher.run(client.doctor())
        finally:
            launcher.run(client.close())
        return {finding.check for finding in found if finding.text.startswith("not checked")}

    assert refused(roles.login("operator")) == set()
    assert refused(roles.login()) == {"leases", "workers", "due", "pauses", "schedules", "dead"}


REFUSED: dict[str, list[LiteralString]] = {
    "producer": [
        "select arg from bgjob_job",
        "select last_error from bgjob_job",
        "select * from bgjob_job",
        "select count(*) from bgjob_dead_job",
        "select job_id from bgjob_dead_job",
        "update bgjob_job set arg = null",
        "update bgjob_job set next_run_at = now()",
        "select id from bgjob_job for update",
        "insert into bgjob_job (id, queue, type, attempt) values ('x', 'q', 't', -9)",
        "insert into bgjob_job (id, queue, type) values ('a', 'q', 't') "
        "on conflict (id) do update set type = 'other'",
        "insert into bgjob_dead_job (job_id, queue, type) values ('x', 'q', 't')",
        "delete from bgjob_job",
        "delete from bgjob_dead_job",
        "insert into bgjob_job (id, queue, type, waits) values ('x', 'q', 't', true)",
        "select key from bgjob_exclusive",
        "insert into bgjob_exclusive (key) values ('k')",
        "select arg from bgjob_schedule",
        "update bgjob_schedule set tick = now()",
        "select queue from bgjob_pause",
        "select number from bgjob_worker",
        "select dead from bgjob_minute",
    ],
    "worker": [
        "update bgjob_minute set queue = 'x'",
        "select host from bgjob_worker",
        "update bgjob_worker set host = 'x'",
        "insert into bgjob_worker (state) values ('x')",
        "select name from bgjob_schedule",
        "update bgjob_schedule set tick = now()",
        "insert into bgjob_job (id, queue, type, attempt) values ('x', 'q', 't', 1)",
        "update bgjob_job set arg = null",
        "update bgjob_job set id = 'x'",
        "update bgjob_job set queue = 'x'",
        "update bgjob_job set type = 'x'",
        "update bgjob_job set created_at = now()",
        "update bgjob_exclusive set key = 'x'",
        "select arg from bgjob_dead_job",
        "select last_error from bgjob_dead_job",
        "insert into bgjob_dead_job (moved_at) values (now())",
        "update bgjob_dead_job set last_error = null",
        "delete from bgjob_dead_job",
        "insert into bgjob_pause (queue) values ('q')",
        "update bgjob_pause set until = now()",
        "delete from bgjob_pause",
    ],
    "operator": [
        "insert into bgjob_job (id, queue, type, token) values ('x', 'q', 't', 1)",
        "update bgjob_job set next_run_at = now()",
        "update bgjob_job set token = 1",
        "select id from bgjob_job for update",
        "delete from bgjob_job",
        "insert into bgjob_exclusive (key) values ('k')",
        "update bgjob_exclusive set tokens = null",
        "delete from bgjob_exclusive",
        "insert into bgjob_dead_job (job_id, queue, type) values ('x', 'q', 't')",
        "update bgjob_dead_job set arg = null",
        "update bgjob_worker set note = null",
        "delete from bgjob_worker",
        "update bgjob_minute set dead = 0",
        "delete from bgjob_minute",
        "update bgjob_schedule set type = 'other'",
        "insert into bgjob_schedule (name, spec, queue, type, priority) "
        "values ('x', 'x', 'q', 't', 0)",
    ],
    "editor": [
        "insert into bgjob_job (id, queue, type) values ('x', 'q', 't')",
        "update bgjob_job set token = 1",
        "update bgjob_job set arg = null",
        "update bgjob_job set attempt = 0",
        "update bgjob_job set exclusive = null",
        "update bgjob_exclusive set tokens = null",
        "insert into bgjob_exclusive (key, tokens) values ('x', '{1}')",
        "select last_error from bgjob_dead_job",
        "insert into bgjob_dead_job (moved_at) values (now())",
        "update bgjob_dead_job set last_error = null",
        "delete from bgjob_dead_job",
        "select queue from bgjob_pause",
        "insert into bgjob_pause (queue) values ('q')",
        "update bgjob_worker set note = null",
        "select name from bgjob_schedule",
    ],
    "scheduler": [
        "select arg from bgjob_job",
        "insert into bgjob_job (id, queue, type, attempt) values ('x', 'q', 't', -9)",
        "update bgjob_job set next_run_at = now()",
        "delete from bgjob_job",
        "select id from bgjob_dead_job",
        "select key from bgjob_exclusive",
        "update bgjob_schedule set paused = false",
        "update bgjob_schedule set name = 'other'",
        "delete from bgjob_schedule",
        "select number from bgjob_worker",
        "select dead from bgjob_minute",
    ],
    "nobody": [
        "select name from bgjob_schedule",
        "select key from bgjob_exclusive",
        "select id from bgjob_job",
        "select id from bgjob_dead_job",
        "insert into bgjob_job (id, queue, type) values ('x', 'q', 't')",
    ],
}
"""Statements that a role must not run, besides those that no role may."""

REFUSED_TO_ALL: list[LiteralString] = [
    "truncate bgjob_job",
    "truncate bgjob_dead_job",
    "truncate bgjob_exclusive",
    "truncate bgjob_schedule",
    "truncate bgjob_pause",
    "truncate bgjob_worker",
    "truncate bgjob_minute",
    "truncate bgjob_history",
    "truncate bgjob_result",
    "drop table bgjob_job",
    "drop table bgjob_dead_job",
    "alter table bgjob_job add column x int",
    "comment on table bgjob_job is 'bgjob schema 99'",
    "create index on bgjob_job (token)",
    "create trigger t before insert on bgjob_job for each row execute function "
    "suppress_redundant_updates_trigger()",
    "grant select on bgjob_job to public",
]


@pytest.mark.parametrize("role", REFUSED)
def test_a_role_lacks_every_privilege_that_it_does_not_need(
    roles: Roles, conn: psycopg.Connection, role: str
) -> None:
    with Client(roles.dsn) as owner:
        owner.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in "abc"])
        owner.do("q", Mux().register("t", lambda _: MoveToDlq("why")))
    before = rows(conn, "select * from bgjob_job order by id")
    dead = rows(conn, "select * from bgjob_dead_job")
    with psycopg.connect(roles.login(*({role} & set(GROUPS))), autocommit=True) as restricted:
        for statement in [*REFUSED[role], *REFUSED_TO_ALL]:
            try:
                restricted.execute(statement)
            except InsufficientPrivilege:
                continue
            # Some of it is passed over with a warning.
            assert statement.startswith("grant"), f"{role} may: {statement}"
    assert rows(conn, "select * from bgjob_job order by id") == before
    assert rows(conn, "select * from bgjob_dead_job") == dead
    table = "select has_table_privilege('public', 'bgjob_job', 'select')"
    assert rows(conn, table) == [(False,)]


METHODS: dict[str, Callable[[Any], Any]] = {
    "enqueue": lambda client: client.enqueue(EnqueueRequest("q", "t")),
    "bulk_enqueue": lambda client: client.bulk_enqueue([EnqueueRequest("q", "t")]),
    "do": lambda client: client.do("q", Mux().register("t", lambda _: None)),
    "dlq.list": lambda client: client.dlq.list(),
    "dlq.get": lambda client: client.dlq.get("a"),
    "dlq.requeue": lambda client: client.dlq.requeue("a"),
    "dlq.purge": lambda client: client.dlq.purge("a"),
    "jobs.get": lambda client: client.jobs.get("b"),
    "jobs.list": lambda client: client.jobs.list(state="running"),
    "jobs.matching": lambda client: client.jobs.matching(type="none"),
    "jobs.run_now": lambda client: client.jobs.run_now("b"),
    "jobs.set_priority": lambda client: client.jobs.set_priority("b", priority=1),
    "jobs.abandon": lambda client: client.jobs.abandon("b"),
    "jobs.cancel": lambda client: client.jobs.cancel("none"),
    "schedules.list": lambda client: client.schedules.list(),
    "schedules.pause": lambda client: client.schedules.pause("s"),
    "schedules.resume": lambda client: client.schedules.resume("s"),
    "schedules.run": lambda client: client.schedules.run("s"),
    "schedules.remove": lambda client: client.schedules.remove("s"),
    "stats": lambda client: client.stats(),
    "overview": lambda client: client.overview(),
    "workers": lambda client: client.workers(),
    "minutes": lambda client: client.minutes(),
    "pause": lambda client: client.pause("other"),
    "paused": lambda client: client.paused(),
    "resume": lambda client: client.resume("other"),
    "explain": lambda client: client.explain("b"),
    # What a role may not look at it reports.
    "doctor": lambda client: client.doctor(),
}

LOOKS = {"jobs.get", "jobs.list", "jobs.matching"}

MAY = {
    "producer": {"enqueue", "bulk_enqueue", "doctor"},
    "worker": {
        *("do", "enqueue", "bulk_enqueue", "paused", "minutes", "doctor"),
        *("jobs.run_now", "jobs.set_priority"),
    }
    | LOOKS,
    # Who may requeue writes jobs, and so may enqueue them.
    "operator": {
        *("enqueue", "bulk_enqueue"),
        *("stats", "overview", "workers", "minutes", "pause", "paused", "resume", "explain"),
        "doctor",
        *(name for name in METHODS if "." in name and not name.startswith("jobs.")),
    }
    | LOOKS,
    "editor": {"doctor", "workers", *(name for name in METHODS if name.startswith("jobs."))},
    "scheduler": {"schedules.list", "doctor"},
    "nobody": {"doctor"},
}


@pytest.mark.parametrize("role", MAY)
def test_a_role_may_call_only_its_own_methods_of_a_client(
    roles: Roles, conn: psycopg.Connection, role: str
) -> None:
    with Client(roles.dsn) as owner:
        owner.enqueue(EnqueueRequest("q", "t", id="a"))
        owner.do("q", Mux().register("t", lambda _: MoveToDlq("why")))
        owner.enqueue(EnqueueRequest("q", "t", id="b"))
    Schedules([Schedule("s", every=60, request=EnqueueRequest("q", "t"))]).run(conn)
    may = set()
    with Client(roles.login(*({role} & set(GROUPS)))) as client:
        for name, method in METHODS.items():
            with contextlib.suppress(InsufficientPrivilege):
                method(client)
                may.add(name)
    assert may == MAY[role]


@pytest.mark.parametrize("role", ["producer", "scheduler", "operator", "editor", "nobody"])
def test_a_role_without_the_privileges_of_a_worker_cannot_start_one(
    launcher: Launcher, roles: Roles, role: str
) -> None:
    worker = launcher.make(Mux(), dsn=roles.login(*({role} & set(GROUPS))))
    try:
        with pytest.raises(SchemaError, match="bgjob_(job|result|ration)"):
            launcher.run(worker.run())
    finally:
        launcher.shutdown(worker, timeout=1)


WORKERS_GRANTS = [
    grant
    for grant in GRANTS
    if grant.group == "worker" and grant.table not in {"bgjob_worker", "bgjob_minute"}
]
OWN_ROWS_GRANTS = [
    grant
    for grant in GRANTS
    if grant.group == "worker" and grant.table in {"bgjob_worker", "bgjob_minute"}
]


@pytest.mark.parametrize("grant", WORKERS_GRANTS, ids=lambda g: f"{g.privilege} on {g.table}")
def test_a_worker_that_lacks_a_grant_does_not_start_and_names_it(
    launcher: Launcher, roles: Roles, grant: Grant
) -> None:
    dsn = roles.login("worker")
    roles.revoke(grant)
    worker = launcher.make(Mux().register("t", lambda _: None, keep=True), dsn=dsn)
    try:
        with pytest.raises(SchemaError) as error:
            launcher.run(worker.run())
        text = str(error.value).lower()
        assert re.search(rf"grant\b.*\b{grant.privilege}\b.*\b{grant.table}\b", text), text
        roles.conn.execute(roles.named(f"grant {grant} to bgjob_worker"))
        launcher.run(worker.run())  # the remedy is one
    finally:
        assert launcher.shutdown(worker, timeout=1)


def test_a_worker_that_lacks_one_column_of_a_grant_does_not_start(
    launcher: Launcher, roles: Roles
) -> None:
    dsn = roles.login("worker")
    started = []
    for grant in [single for grant in WORKERS_GRANTS for single in grant.single]:
        roles.revoke(grant)
        worker = launcher.make(Mux().register("t", lambda _: None, keep=True), dsn=dsn)
        try:
            launcher.run(worker.run())
            started.append(str(grant))
        except SchemaError as error:
            assert grant.table in str(error)
        launcher.shutdown(worker, timeout=0)
        roles.conn.execute(roles.named(f"grant {grant} to bgjob_worker"))
    assert started == []


@pytest.mark.parametrize("grant", OWN_ROWS_GRANTS, ids=lambda g: f"{g.privilege} on {g.table}")
def test_a_worker_that_may_not_write_its_row_or_counts_names_the_grant_once_and_works(
    roles: Roles, conn: psycopg.Connection, grant: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("registry", "minutes"):
        monkeypatch.setattr(f"bgjob._worker.{module}.EVERY", 0.01)
        monkeypatch.setattr(f"bgjob._worker.{module}.LOOK_AGAIN", 0.01)
    dsn = roles.login("worker")
    for single in grant.single:
        conn.execute("truncate bgjob_worker, bgjob_minute")
        with contextlib.closing(Launcher(roles.dsn, is_async=False)) as launcher:
            check_that_it_works_without(single, launcher, dsn, roles, conn)


def check_that_it_works_without(
    grant: Grant, launcher: Launcher, dsn: str, roles: Roles, conn: psycopg.Connection
) -> None:
    written = sql.SQL("select from {}").format(sql.Identifier(grant.table))
    roles.revoke(grant)
    recorder = Recorder()
    launcher.start(
        Mux().register("t", lambda _: None), dsn=dsn, observer=recorder, services=[Minutes()]
    )
    launcher.enqueue("a")
    recorder.wait_for("completed", "a")
    [(_, error)] = recorder.of("error")
    assert re.search(rf"grant\b.*\b{grant.privilege}\b.*\b{grant.table}\b", str(error)), grant
    assert conn.execute(written).fetchall() == [], grant
    roles.conn.execute(roles.named(f"grant {grant} to bgjob_worker"))

    def is_written() -> bool:
        launcher.client.enqueue(EnqueueRequest("q", "t"))
        return conn.execute(written).fetchall() != []

    assert eventually(is_written), grant
    assert len(recorder.of("error")) == 1, grant


def test_a_worker_whose_grants_are_withdrawn_goes_on(
    launcher: Launcher, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgjob._worker.registry.EVERY", 0.01)
    dsn, recorder = roles.login("worker"), Recorder()
    launcher.start(Mux().register("t", lambda _: None), dsn=dsn, observer=recorder)
    for grant in OWN_ROWS_GRANTS:
        roles.revoke(grant)
    recorder.wait_for("error")
    launcher.enqueue("a")
    recorder.wait_for("completed", "a")
    [(_, error)] = recorder.of("error")
    assert "does not list this worker" in str(error)


def _everything(group: str) -> list[Statement[Any]]:
    """Every statement of a role, each of which is refused whole if any privilege is missing."""
    request = EnqueueRequest("q", "t")
    whole = EnqueueRequest("q", "t", headers={"tenant": 7}, expires=60, exclusive="k", slots=2)
    claimed = Claimed(a_job(id="x")._replace(exclusive="k"), 1)
    keeping = EnqueueRequest("q", "t", keep=60)
    where = dead.DeadFilter()
    marks = {0: datetime.now(UTC)}
    match group:
        case "producer":
            return [
                enqueues.enqueue(whole, notify=True),
                enqueues.enqueue_many([whole], notify=True, group="g"),
                groups.open_group(whole),
                enqueues.enqueue(keeping, notify=True),
                enqueues.enqueue_many([keeping], notify=True),
            ]
        case "worker":
            return [
                claims.claim("q", limit=1, lease=1, token=1, marks=marks),
                claims.claim("q", limit=1, lease=1, token=1, marks={**marks, 1: marks[0]}),
                claims.sweep("q", limit=1, lease=1, token=1),
                claims.claim_others(
                    "q",
                    limit=1,
                    lease=1,
                    token=1,
                    marks=marks,
                    rations=claims.Rations(limited=("t",)),
                ),
                survey.survey("q"),
                groups.hold("x", "g"),
                groups.end_groups(["g"], notify=True),
                leases.extend([claimed], lease=1),
                settlements.complete([claimed]),
                settlements.postpone([Postponed(claimed, 0, "e", refund=False)]),
                settlements.dead_letter([DeadLettered(claimed, "e", 1)]),
                settlements.complete([claimed], follows=True),
                settlements.dead_letter([DeadLettered(claimed, "e", 1)], follows=True),
                settlements.keep_results([settlements.Returned(claimed, b"1")]),
                settlements.dead_letter([DeadLettered(claimed, "e", 1)], keeps=True),
                results.expire(limit=1),
                limits.declare(limits.Subject("queue", "q")),
                limits.lock(limits.Subject("queue", "q")),
                limits.take(
                    limits.Subject("queue", "q"),
                    limits.Ask(1, 0, 1, 1, 1, 0, None),
                    code=Limit(1),
                    lease=1,
                ),
                key_rows.lock_keys(["k"]),
                keys.acquire("q", [claimed]),
                keys.release("q", ["k"]),
                keys.blocked("q", after="", limit=1),
                workers.register(
                    workers.Registration("h", 1, "p", None, "1", {"q": 1}, ["t"], 30, 10)
                ),
                workers.beat(1, workers.Beat("working", [0], WorkerCounts(), [], None)),
                minutes.add({("q", "t"): MinuteCounts(1)}),
                minutes.expire(1, limit=1),
                settlements.complete([claimed], {claimed.job.type}),
                history.old(),
                *map(history.empty, range(8)),
                steering.were_cancelled([claimed]),
                transactions.save_checkpoint(claimed, b"1", lease=1),
            ]
        case "editor":
            live = JobFilter()
            return [
                steering.cancel(["x"], live, by=None, reason=""),
                steering.run_now(["x"], live),
                steering.set_priority(["x"], live, 1),
                key_rows.lock_keys(["k"]),
                keys.release("q", ["k"]),
                Statement("select * from bgjob_job", None, lambda _: None),
                Statement("select * from bgjob_exclusive", None, lambda _: None),
                workers.workers(),
            ]
        case "scheduler":
            schedule = Schedule("s", every=60, request=request)
            now = datetime.now(UTC)
            return [
                schedules.register([schedule]),
                schedules.look(["s"]),
                schedules.fire([(schedule, now, Firing(now, now, (now,)))]),
            ]
        case _:
            return [
                dead.listed(where, limit=1),
                dead.requeue(where),
                dead.purge(where),
                pauses.pause("q", None),
                pauses.resume("q"),
                limits.set_limit(limits.Subject("queue", "q"), Limit(1)),
                limits.remove_limit(limits.Subject("queue", "q")),
                limits.limits(),
                overviews.overview(None, cap=1),
                Statement("select * from bgjob_job", None, lambda _: None),
                workers.workers(),
                history.of_job("a", limit=1),
                results.outcomes(["a"]),
                minutes.report(minutes.Span(60, 1), by=None, queue=None, type_=None),
                schedules.listed(),
                schedules.resume("s"),
                schedules.remove("s"),
            ]


@pytest.mark.parametrize("group", GROUPS)
def test_every_privilege_of_the_script_is_needed(roles: Roles, group: str) -> None:
    def is_refused(statement: Statement[Any]) -> bool:
        try:
            with roles.conn.transaction(force_rollback=True):
                role = sql.Identifier(roles.name(group))
                roles.conn.execute(sql.SQL("set local role {}").format(role))
                roles.conn.execute(cast(Any, statement.text), statement.params)
        except InsufficientPrivilege:
            return True
        return False

    everything = _everything(group)
    assert not any(map(is_refused, everything))
    idle = []
    for grant in [single for g in GRANTS if g.group == group for single in g.single]:
        with roles.conn.transaction(force_rollback=True):
            roles.revoke(grant)
            # Those that name the table come first, so that few have to run.
            nearest = sorted(everything, key=lambda statement: grant.table not in statement.text)
            if not any(map(is_refused, nearest)):
                idle.append(str(grant))
    assert idle == []


# -- values stay values ------------------------------------------------------------------------

HOSTILE = [
    *HOSTILE_NAMES,
    "'); delete from bgjob_job; --",
    "$1 $2 $$; select 1; $$",
    "{}",
    '{"a",NULL,"b\\"}',
    "\\x00 E'\\047'",
    ":name ? ?? %b %%s",
    "../../etc/passwd\r\n",
    "\u2028\u2029\u0085",
    "notify bgjob_1, ''; listen \"*\"",
]


@pytest.fixture
def canary(conn: psycopg.Connection) -> Iterator[None]:
    """After any hostile texts, no object of the database has changed."""
    objects: LiteralString = (
        "select c.oid, c.relname, c.relkind, a.attname, a.atttypid from pg_class c "
        "left join pg_attribute a on a.attrelid = c.oid order by c.oid, a.attnum"
    )
    conn.execute("create table canary as select 'alive' as state")
    before = rows(conn, objects)
    yield
    assert rows(conn, objects) == before
    assert rows(conn, "select state from canary") == [("alive",)]


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("transactional", [False, True], ids=["ordinary", "transactional"])
def test_hostile_texts_pass_through_a_worker_and_its_notifications(
    launcher: Launcher, conn: psycopg.Connection, transactional: bool
) -> None:
    seen: list[tuple[object, ...]] = []

    def handle(job: Job, *_: Any) -> Result:
        seen.append((job.queue, job.id, job.type, job.arg, job.attempt, job.last_error))
        match job.attempt:
            case 1:
                return Retry(0.0, error=job.type)
            case 2:
                raise ValueError(job.type)
            case 3:
                return MoveToDlq(job.type)
            case _:
                raise AssertionError(job)

    async def handle_async(job: Job, *_: Any) -> Result:
        return handle(job)

    mux: Any = Mux()
    for text in HOSTILE:
        mux.register(
            text,
            handle_async if launcher.is_async else handle,
            backoff=lambda _: 0.0,
            transactional=transactional,
        )
    for n, queue in enumerate(HOSTILE):
        if n % 2 == transactional:
            continue  # each name is tried with one kind, and each text with both
        texts = [*HOSTILE[n:], *HOSTILE[:n]][:4]
        observer = Recorder()
        seen.clear()
        worker = launcher.start(mux, queue, observer=observer, concurrency=4, poll_interval=NEVER)
        assert eventually(lambda: sleeper(conn) is not None)
        wanted = [EnqueueRequest(queue, text, text.encode(), id=text) for text in texts]
        launcher.client.enqueue(wanted[0])  # only the notification tells the worker
        observer.wait_for("dead", wanted[0].id)
        launcher.client.bulk_enqueue(wanted[1:])
        observer.wait_for("dead", times=len(wanted))
        assert launcher.shutdown(worker)
        for text in texts:
            *runs, (*last, last_error) = [run for run in seen if run[1] == text]
            assert runs == [
                (queue, text, text, text.encode(), attempt, last_error)
                for attempt, last_error in enumerate([None, text], 1)
            ]
            assert last == [queue, text, text, text.encode(), 3]
            assert str(last_error).startswith(f"ValueError: {text}\n  at test_security.py:")
        assert observer.of("error", "completed", "lost") == []
        for text in texts:
            [dead] = launcher.client.dlq.list(queue=queue, type=text)
            assert (dead.id, dead.arg, dead.last_error) == (text, text.encode(), text)
        first, *others = texts
        assert launcher.client.dlq.purge(first, queue=queue, type=first) == 1
        assert launcher.client.dlq.purge(first, queue=queue, type=first) == 0
        assert sorted(launcher.client.dlq.requeue(others, queue=queue)) == sorted(others)
        done = Mux()
        for text in others:
            done.register(text, lambda _: None)
        worker = launcher.start(done, queue, observer=observer, concurrency=4)
        observer.wait_for("completed", times=len(others))
        assert launcher.shutdown(worker)
    assert rows(conn, "select count(*) from bgjob_job") == [(0,)]
    assert rows(conn, "select count(*) from bgjob_dead_job") == [(0,)]


@pytest.mark.usefixtures("canary")
def test_hostile_texts_pass_through_do(launcher: Launcher, conn: psycopg.Connection) -> None:
    def fail(job: Job, *_: Any) -> None:
        raise ValueError(job.type)

    async def fail_async(job: Job, *_: Any) -> None:
        fail(job)

    client: Any = AsyncClient(launcher.dsn) if launcher.is_async else Client(launcher.dsn)
    try:
        for text in HOSTILE:
            launcher.run(client.enqueue(EnqueueRequest(text, text, text.encode(), id=text)))
            for transactional in (False, True):
                mux: Any = Mux()
                mux.register(
                    text,
                    fail_async if launcher.is_async else fail,
                    backoff=lambda _: 0.0,
                    max_attempts=2,
                    transactional=transactional,
                )
                launcher.run(client.do(text, mux))
            dead = launcher.run(client.dlq.get(text))
            assert (dead.queue, dead.type, dead.arg) == (text, text, text.encode())
            assert dead.last_error.startswith(f"ValueError: {text}\n  at test_security.py:")
            assert launcher.run(client.dlq.requeue(text)) == [text]
            launcher.run(client.do(text, Mux()))
            dead = launcher.run(client.dlq.get(text))
            assert "no handler is registered" in dead.last_error
            assert repr(text) in dead.last_error
            assert launcher.run(client.dlq.purge(text)) == 1
    finally:
        launcher.run(client.close())
    assert rows(conn, "select count(*) from bgjob_job") == [(0,)]


# -- nothing from the database is imported or evaluated -----------------------------------------

MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "runpy", "code", "imp"}
FUNCTIONS = {"eval", "exec", "compile", "__import__"}
METHODS_THAT_IMPORT = {"import_module", "resolve_name", "load_module", "exec_module", "__import__"}


def dangers(source: str) -> list[str]:
    """List the calls in this Python source that could import, unpickle or evaluate a value."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found += [a.name for a in names if a.name.partition(".")[0] in MODULES]
            case ast.ImportFrom(module, names):
                if (module or "").partition(".")[0] in MODULES:
                    found.append(str(module))
                found += [a.name for a in names if a.name in METHODS_THAT_IMPORT | MODULES]
            case ast.Name(id) if id in FUNCTIONS:
                found.append(id)
            case ast.Attribute(ast.Name("builtins" | "__builtins__"), name) if name in FUNCTIONS:
                found.append(name)
            case ast.Attribute(_, name) if name in METHODS_THAT_IMPORT:
                found.append(name)
    return found


def test_no_source_imports_unpickles_or_evaluates_a_value() -> None:
    package = Path(bgjob.__file__).parent
    found = [
        (path.relative_to(package).as_posix(), danger)
        for path in sorted(package.rglob("*.py"))
        for danger in dangers(path.read_text("utf-8"))
    ]
    # The package imports modules of its own, when a program asks for a name; the command line the
    # module that is named on it; the playground is a prompt, and runs what is typed at it.
    assert found == [
        ("__init__.py", "import_module"),
        ("_cli/playground.py", "code"),
        ("_cli/worker/target.py", "import_module"),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import yaml.constructor",
        "from marshal import loads as harmless",
        "from importlib import import_module",
        "import importlib; importlib.import_module(name)",
        "pkgutil.resolve_name(text)",
        "__import__(name)",
        "eval(text)",
        "run = exec",
        "compile(text, '', 'eval')",
        "builtins.eval(text)",
        "spec.loader.exec_module(module)",
    ],
)
def test_the_search_for_dangers_finds_them(source: str) -> None:
    assert dangers(source)


class Bomb:
    """An object that leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_payloads_and_types_that_want_to_run_arrive_as_bytes_and_rest_in_the_dlq(
    launcher: Launcher, conn: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "bgjob_spy.py").write_text(f"open({str(mark)!r}, 'w')\ndef run(*_): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    payloads = {
        "pickle": pickle.dumps(Bomb(mark)),
        "yaml": f"!!python/object/apply:os.system ['touch {mark}']".encode(),
        "python": f"__import__('os').system('touch {mark}')".encode(),
        "json": b'{"__reduce__": ["os.system", ["touch mark"]], "py/object": "bgjob_spy.run"}',
    }
    types = ["os:system", "bgjob_spy", "bgjob_spy:run", "bgjob_spy.run", f"touch {mark}", "eval"]
    seen: dict[str, bytes | None] = {}
    observer = Recorder()
    mux = Mux().register("t", lambda job: seen.update({job.id: job.arg}))
    for id_, payload in payloads.items():
        launcher.enqueue(id_, arg=payload)
        for type_ in types:
            launcher.enqueue(f"{id_} {type_}", type=type_, arg=payload)
    launcher.start(mux, observer=observer, concurrency=4)
    observer.wait_for("completed", times=len(payloads))
    observer.wait_for("dead", times=len(payloads) * len(types))
    assert seen == payloads
    dead = launcher.client.dlq.list()
    assert {(d.id, d.type, d.arg) for d in dead} == {
        (f"{id_} {type_}", type_, payload) for id_, payload in payloads.items() for type_ in types
    }
    assert all("UnknownTypeError" in str(d.last_error) for d in dead)
    assert not mark.exists()
    assert "bgjob_spy" not in sys.modules
    os.system(f"touch {mark}")  # that a mark would have been seen
    assert mark.exists()


# -- secrets -----------------------------------------------------------------------------------

SECRET = "Tr0ub4dor"
"""A text that must appear nowhere; the password has it, and characters that need quoting."""

PASSWORD = f"{SECRET}&3 '\\"

RIGHT = {
    "url": f"postgresql://app:{SECRET}%263%20%27%5C@/postgres?{{0}}",
    "keywords": f"user=app dbname=postgres password='{SECRET}&3 \\'\\\\' {{1}}",
}

WRONG = {
    "wrong host": f"postgresql://app:{SECRET}@nowhere.invalid/db",
    "wrong host, keywords": f"host=nowhere.invalid user=app password={SECRET} dbname=db",
    "wrong port": f"postgresql://app:{SECRET}@127.0.0.1:1/db",
    "wrong port, keywords": f"host=127.0.0.1 port=1 user=app password={SECRET} dbname=db",
    "no port": f"postgresql://app:{SECRET}@127.0.0.1:port/db",
    "no colon": f"postgres//app:{SECRET}@127.0.0.1/db",
    "another scheme": f"mysql://app:{SECRET}@127.0.0.1/db",
    "a space in the password": f"host=127.0.0.1 user=app password=x {SECRET}",
    "no closing quote": f"host=127.0.0.1 user=app password='{SECRET}",
    "a percent sign in the password": f"postgresql://app:{SECRET}%zz@127.0.0.1/db",
    "an at sign in the password": f"postgresql://app:x@{SECRET}@127.0.0.1/db",
    "no closing bracket": f"postgresql://app:{SECRET}@[::1/db",
    "an unknown option": f"host=127.0.0.1 user=app password={SECRET} pasword={SECRET}",
}


@pytest.fixture(scope="session")
def guarded(second_server: EmbeddedServer) -> EmbeddedServer:
    """A server that asks the role `app` for its password."""
    second_server.start()
    with psycopg.connect(second_server.dsn, autocommit=True) as conn:
        conn.execute(bgjob.schema.init_sql().encode())
        conn.execute(
            sql.SQL("create role app superuser login password {}").format(sql.Literal(PASSWORD))
        )
        access = second_server.data_dir / "pg_hba.conf"
        access.write_text(f"local all app scram-sha-256\n{access.read_text()}")
        conn.execute("select pg_reload_conf()")
    return second_server


def right(guarded: EmbeddedServer, form: str) -> str:
    place = psycopg.conninfo.conninfo_to_dict(guarded.dsn)
    words = {"host": place["host"], "port": place["port"]}
    return RIGHT[form].format(
        "&".join(f"{k}={v}" for k, v in words.items()),
        " ".join(f"{k}={v}" for k, v in words.items()),
    )


class Output:
    """All visible output of a test: logs, standard streams, errors, reprs."""

    def __init__(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        for name in ("", "bgjob", "psycopg", "psycopg.pool"):
            caplog.set_level(logging.DEBUG, logger=name)
        self._log = caplog
        self._capfd = capfd
        self._shown: list[str] = []

    def show(self, *things: object) -> None:
        self._shown += [f"{thing!r} {thing!s}" for thing in things]

    def call(self, call: Callable[[], object]) -> BaseException | None:
        """Call it, and record its result or exception."""
        try:
            self.show(call())
        except Exception as error:
            self.show(error)
            self._shown += traceback.format_exception(error)
            return error
        return None

    def text(self) -> str:
        self._shown += self._capfd.readouterr()
        records = (f"{record!r} {record.args!r} {record.exc_text}" for record in self._log.records)
        return "\n".join([*self._shown, self._log.text, *records])

    def assert_secret(self) -> None:
        leaks = [line for line in self.text().splitlines() if SECRET in line]
        assert leaks == []


@pytest.fixture
def output(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Output:
    return Output(caplog, capfd)


@pytest.mark.parametrize("form", RIGHT)
def test_a_right_password_is_shown_nowhere(
    launcher: Launcher, guarded: EmbeddedServer, output: Output, form: str
) -> None:
    def handle(job: Job) -> Result | None:
        if job.id == "raise":
            raise ValueError("no")
        return None

    dsn = right(guarded, form)
    client: Any = AsyncClient(dsn) if launcher.is_async else Client(dsn)
    worker = launcher.make(Mux().register("t", handle, max_attempts=1), dsn=dsn, poll_interval=0.1)
    with psycopg.connect(guarded.dsn, autocommit=True) as conn:
        try:
            output.show(client, client.dlq, client.enqueue, worker, worker.run)
            both = [EnqueueRequest("q", "t", id=id_) for id_ in ("a", "raise")]
            launcher.run(client.bulk_enqueue(both))
            output.call(lambda: launcher.run(client.enqueue(both[0])))
            launcher.run(worker.run())
            output.show(client, worker)
            assert eventually(lambda: rows(conn, "select id from bgjob_job") == [])
            assert rows(
                conn,
                "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'",
            )
            assert eventually(lambda: "worker: " in output.text())
            output.call(lambda: launcher.run(client.dlq.list()))
        finally:
            launcher.shutdown(worker)
            launcher.run(client.close())
            conn.execute("delete from bgjob_dead_job")
    output.show(client, worker)
    assert "t a (attempt 1) completed" in output.text()
    output.assert_secret()


def test_a_password_that_is_wrong_is_shown_nowhere(
    launcher: Launcher, guarded: EmbeddedServer, output: Output
) -> None:
    for form in RIGHT:
        dsn = right(guarded, form).replace(SECRET, f"{SECRET}-not")
        worker = launcher.make(Mux(), dsn=dsn)
        error = output.call(lambda: launcher.run(worker.run()))
        assert isinstance(error, psycopg.OperationalError)
        assert "password authentication failed" in str(error)
        launcher.shutdown(worker)
        output.show(worker)
    output.assert_secret()


def test_a_worker_whose_password_was_changed_shows_neither(
    launcher: Launcher, guarded: EmbeddedServer, output: Output
) -> None:
    worker = launcher.make(Mux(), dsn=right(guarded, "url"), poll_interval=0.1)
    with psycopg.connect(guarded.dsn, autocommit=True) as conn:
        launcher.run(worker.run())
        try:
            conn.execute(f"alter role app password '{SECRET}-new'")
            conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where usename='app'"
            )
            assert eventually(lambda: "password authentication failed" in output.text())
        finally:
            conn.execute(sql.SQL("alter role app password {}").format(sql.Literal(PASSWORD)))
            launcher.shutdown(worker)
    output.assert_secret()


def test_a_worker_with_a_wrong_dsn_shows_no_password(launcher: Launcher, output: Output) -> None:
    def use(dsn: str) -> None:
        worker = launcher.make(Mux(), dsn=dsn)
        output.show(worker)
        try:
            launcher.run(worker.run())
        finally:
            launcher.shutdown(worker)
            output.show(worker)

    for dsn in WRONG.values():
        assert output.call(partial(use, dsn)) is not None
    output.assert_secret()


def test_a_client_with_a_wrong_dsn_shows_no_password(
    launcher: Launcher, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A client waits for a while whether the server comes back; it says the same after a second.
    monkeypatch.setattr("bgjob.client.PATIENCE", 1.0)

    def use(dsn: str) -> None:
        client: Any = AsyncClient(dsn) if launcher.is_async else Client(dsn)
        output.show(client)
        try:
            launcher.run(client.enqueue(EnqueueRequest("q", "t")))
        finally:
            launcher.run(client.close())

    with ThreadPoolExecutor(len(WRONG)) as pool:
        errors = pool.map(lambda dsn: output.call(partial(use, dsn)), WRONG.values())
    assert None not in errors
    output.assert_secret()


@pytest.mark.parametrize("case", WRONG)
def test_the_demo_shows_no_password(case: str, output: Output) -> None:
    try:
        status = bgjob.cli.main(["demo", "--dsn", WRONG[case]])
    except SystemExit as exit:
        status = cast(int, exit.code)
    assert status in {1, 2}
    output.assert_secret()


APP = """
import logging, os
from bgjob import Client, Mux, Worker

logging.basicConfig(level=logging.DEBUG)
worker = Worker(Client(os.environ["BGJOB_DSN"]), "q", Mux())
"""


def test_the_worker_command_shows_no_password(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "-m", "bgjob", "worker", "app:worker"]

    def run(dsn: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "BGJOB_DSN": dsn, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )

    cases = ("wrong port", "wrong host", "no colon", "an at sign in the password")
    with ThreadPoolExecutor(2) as pool:
        for ended in pool.map(run, [WRONG[case] for case in cases]):
            assert ended.returncode == 1
            assert "bgjob:" in ended.stderr
            assert SECRET not in ended.stdout + ended.stderr
