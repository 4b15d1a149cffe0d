"""The core works in a database that is nothing like those of the other tests.

Those are UTF8 and C, over a Unix socket, as superuser, with PostgreSQL's default settings. Here
it is LATIN1 (with a language's order, where the server has ICU), over TCP with a password, as a
role that owns nothing and has the privileges of bgjob/docs/privileges.sql, in a schema of its
own, with defaults that an administrator may have set.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from faults.proxy import Proxy
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support.clients import Colour
from support.documents import SCRIPT
from support.waiting import eventually
from support.workers import Launcher, Recorder

from bgjob import (
    AsyncClient,
    Complete,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
    Schedule,
    Schedules,
)
from bgjob.client import _FEW
from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql
from bgjob.testing import adrain, drain

SLOW = 1.3
"""Seconds for which a transactional handler runs: longer than each of the timeouts, and than
what an extension needs."""

DEFAULTS: Mapping[LiteralString, str] = {
    "default_transaction_isolation": "repeatable read",
    "default_transaction_deferrable": "on",
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kathmandu",
    "standard_conforming_strings": "off",
    "escape_string_warning": "off",
    "backslash_quote": "on",
    "array_nulls": "off",
    "bytea_output": "escape",
    "extra_float_digits": "-10",
    "transform_null_equals": "on",
    "quote_all_identifiers": "on",
    "search_path": "jobs",
    "idle_session_timeout": "400ms",
    "idle_in_transaction_session_timeout": "400ms",
    "statement_timeout": "400ms",
    "lock_timeout": "300ms",
    "plan_cache_mode": "force_generic_plan",
}

NEWER: Mapping[LiteralString, str] = {"transaction_timeout": "600ms"}
"""Since version 17."""


@pytest.fixture(scope="session")
def elsewhere(second_server: EmbeddedServer) -> Iterator[tuple[EmbeddedServer, Proxy]]:
    """A server whose plain roles need a password, and the TCP port in front of it."""
    server = second_server
    server.start()
    access = server.data_dir / "pg_hba.conf"
    access.write_text(f"local all plain scram-sha-256\n{access.read_text()}")
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute("select pg_reload_conf()")
        admin.execute("set password_encryption = 'scram-sha-256'")
        admin.execute("create role plain login password 'a ''word'")
        admin.execute("create role owner")
        [[has_icu]] = admin.execute(
            "select exists (select from pg_collation where collname = 'de-x-icu')"
        ).fetchall()
        icu: LiteralString = (
            "locale_provider icu icu_locale 'de'"
            if has_icu and admin.info.server_version >= 15_00_00
            else ""
        )
        admin.execute(
            sql.SQL(
                "create database elsewhere template template0 encoding 'LATIN1' locale 'C' {}"
            ).format(sql.SQL(icu))
        )
    dsn = make_conninfo(server.dsn, dbname="elsewhere")
    with psycopg.connect(dsn) as owner:
        owner.execute("create schema jobs authorization owner")
        owner.execute("set search_path = jobs")
        owner.execute("set role owner")
        owner.execute(init_sql().encode())
        owner.execute("reset role")
        owner.execute(SCRIPT.encode())
        groups = sorted(set(re.findall(r"create role (\w+)", SCRIPT)))
        for group in groups:
            owner.execute(sql.SQL("grant usage on schema jobs to {}").format(sql.Identifier(group)))
            owner.execute(sql.SQL("grant {} to plain").format(sql.Identifier(group)))
        owner.execute("create table effect (id text, at text)")
        owner.execute("grant select, insert on effect to plain")
        defaults = dict(DEFAULTS)
        if owner.info.server_version >= 17_00_00:
            defaults |= NEWER
        for name, value in defaults.items():
            owner.execute(
                sql.SQL("alter database elsewhere set {} = {}").format(
                    sql.Identifier(name), sql.Literal(value)
                )
            )
    with Proxy(dsn) as proxy:
        yield server, proxy


@pytest.fixture
def dsn(elsewhere: tuple[EmbeddedServer, Proxy]) -> Iterator[str]:
    """The DSN of the plain role, over TCP and by password; the tables are emptied after the test."""
    server, proxy = elsewhere
    yield proxy.dsn(f"dbname=elsewhere user=plain password='a \\'word'")
    admin = make_conninfo(server.dsn, dbname="elsewhere")
    with psycopg.connect(admin) as conn:
        conn.execute(
            "truncate effect, bgjob_job, bgjob_dead_job, bgjob_exclusive, bgjob_schedule, bgjob_pause"
        )


@pytest.fixture
def colour(launcher: Launcher) -> Iterator[Colour]:
    colour = Colour(launcher.dsn, is_async=launcher.is_async)
    yield colour
    colour.close()


def handled(launcher: Launcher, mux: Mux, name: str, body: Any, **options: Any) -> Mux:
    """Register a handler of the launcher's colour."""

    def plain(job: Job, *conn: Any) -> Any:
        return body(job)

    async def coroutine(job: Job, *conn: Any) -> Any:
        return body(job)

    return mux.register(name, coroutine if launcher.is_async else plain, **options)


ARG = b"\\x00 \\ ' \" \x00\xff {NULL}"
"""A payload that wrong escaping would change."""

NAME = "caf\xe9 \\ ' {NULL}"
"""An id that LATIN1 holds."""


def test_jobs_are_enqueued_one_by_one_and_in_bulk_and_come_back_as_they_were(
    colour: Colour, launcher: Launcher
) -> None:
    client = colour.client()
    seen: dict[str, Any] = {}
    assert client.enqueue(EnqueueRequest("q", "t", ARG, id=NAME)) == NAME
    with pytest.raises(JobAlreadyExistsError):
        client.enqueue(EnqueueRequest("q", "t", id=NAME))
    some = [EnqueueRequest("q", "t", {"n": n}, id=f"null{n}") for n in range(3)]
    many = [EnqueueRequest("q", "t", ARG, id=f"{NAME}{n}") for n in range(_FEW)]
    assert client.bulk_enqueue(some) == [r.id for r in some]
    assert client.bulk_enqueue(many) == [r.id for r in many]
    assert client.bulk_enqueue(some, on_conflict="skip") == [None] * 3
    caller = colour.connect()
    client.enqueue(EnqueueRequest("q", "t", id="in a transaction"), conn=caller)
    client.bulk_enqueue([EnqueueRequest("q", "t", id="too")], conn=caller)
    caller.commit()
    launcher.start(handled(launcher, Mux(), "t", lambda job: seen.update({job.id: job.arg})))
    wanted = {NAME: ARG, **{r.id: ARG for r in many}, "in a transaction": None, "too": None}
    assert eventually(lambda: len(seen) == len(wanted) + 3)
    assert wanted.items() <= seen.items()
    assert seen["null1"] == b'{"n":1}'


def test_an_enqueue_works_when_its_client_was_idle_for_longer_than_a_session_may_be(
    colour: Colour, elsewhere: tuple[EmbeddedServer, Proxy]
) -> None:
    client = colour.client()
    client.enqueue(EnqueueRequest("q", "t", id="first"))
    sessions = "select count(*) from pg_stat_activity where usename = 'plain'"
    with psycopg.connect(elsewhere[0].dsn, autocommit=True) as admin:
        # The library may keep the server from ending it: that is as good.
        eventually(lambda: admin.execute(sessions).fetchone() == (0,), timeout=1.0)
    assert client.enqueue(EnqueueRequest("q", "t", id="second")) == "second"


def test_every_result_is_settled_and_reported(colour: Colour, launcher: Launcher) -> None:
    def act(job: Job) -> Result | None:
        if job.attempt > 1:
            return Complete()
        match job.id:
            case "retry":
                return Retry(0, error="5 \u20ac \u2713")
            case "dlq":
                return MoveToDlq("caf\xe9 \u2713 \\ '")
            case "raise":
                raise ValueError("5 \u20ac \u2713")
            case "reschedule" if not rescheduled:
                rescheduled.append(job.id)
                return Reschedule(0.05)
        return None

    rescheduled: list[str] = []
    recorder = Recorder()
    client = colour.client()
    ids = ["complete", "retry", "dlq", "raise", "reschedule"]
    client.bulk_enqueue([EnqueueRequest("q", "t", ARG, id=id) for id in ids])
    client.enqueue(EnqueueRequest("q", "unknown", id="unknown"))
    mux = handled(launcher, Mux(), "t", act, backoff=lambda _: 0.0)
    worker = launcher.start(mux, observer=recorder, poll_interval=0.1)
    for id in ("complete", "retry", "raise", "reschedule"):
        recorder.wait_for("completed", id)
    for id in ("dlq", "unknown"):
        recorder.wait_for("dead", id)
    assert not recorder.of("error")
    assert worker.failure is None
    dead = {job.id: job for job in client.dlq.list()}
    assert set(dead) == {"dlq", "unknown"}
    assert "caf\xe9" in (dead["dlq"].last_error or "")
    assert dead["dlq"].arg == ARG
    assert client.dlq.requeue("dlq") == ["dlq"]
    recorder.wait_for("dead", "dlq", times=2)
    assert client.dlq.purge(["dlq", "unknown"]) == 2


def test_a_transactional_handler_of_more_than_a_second_has_one_effect(
    colour: Colour, launcher: Launcher
) -> None:
    insert = "insert into effect values (%s, clock_timestamp()::text)"

    def plain(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute(insert, [job.id])
        time.sleep(SLOW)
        launcher.client.enqueue(EnqueueRequest("children", "t", id=f"child of {job.id}"), conn=conn)

    async def coroutine(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute(insert, [job.id])
        await asyncio.sleep(SLOW)
        await child.enqueue(EnqueueRequest("children", "t", id=f"child of {job.id}"), conn=conn)

    child: AsyncClient = colour.client().target
    recorder = Recorder()
    ids = ["a", "b", "c"]
    colour.client().bulk_enqueue([EnqueueRequest("q", "t", id=id) for id in ids])
    mux = Mux().register("t", coroutine if launcher.is_async else plain, transactional=True)
    launcher.start(mux, observer=recorder, lease=1.0, poll_interval=0.1, concurrency=3)
    for id in ids:
        recorder.wait_for("completed", id)
    assert {event for event in recorder.of("started")} == {("started", id, 1) for id in ids}
    assert not recorder.of("retried", "lost", "error")
    with psycopg.connect(colour.dsn) as conn:
        effects = Counter(id for (id,) in conn.execute("select id from effect"))
        children = {id for (id,) in conn.execute("select id from bgjob_job")}
    assert effects == Counter(ids)
    assert children == {f"child of {id}" for id in ids}


def test_jobs_of_a_key_run_one_at_a_time(colour: Colour, launcher: Launcher) -> None:
    running, most, ran = [0], [0], list[str]()

    def body(job: Job) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1
        ran.append(job.id)

    ids = [f"{n}" for n in range(6)]
    requests = [EnqueueRequest("q", "t", id=id, exclusive=NAME) for id in ids]
    colour.client().bulk_enqueue(requests)
    launcher.start(handled(launcher, Mux(), "t", body), poll_interval=0.1)
    assert eventually(lambda: len(ran) == len(ids))
    assert (sorted(ran), most) == (ids, [1])


def test_schedules_tick_with_their_payload(colour: Colour, launcher: Launcher) -> None:
    ran: list[tuple[str, bytes | None]] = []
    request = EnqueueRequest("q", "t", ARG, exclusive=NAME)
    recorder = Recorder()
    schedules = Schedules([Schedule(NAME, request=request, every=1)], poll_interval=0.1)
    mux = handled(launcher, Mux(), "t", lambda job: ran.append((job.id, job.arg)))
    launcher.start(mux, services=[schedules], observer=recorder)
    assert eventually(lambda: bool(ran))
    [(id, arg)] = ran[:1]
    assert id.startswith(f"schedule:{NAME}:")
    assert arg == ARG
    table = launcher.client.schedules
    table.pause(NAME)
    [status] = table.list()
    assert (status.name, status.paused) == (NAME, True)
    table.resume(NAME)
    assert table.run(NAME)
    assert not recorder.of("error")


def test_queues_are_paused_and_counted_and_their_jobs_done_by_hand(
    colour: Colour, launcher: Launcher
) -> None:
    client = colour.client()
    client.bulk_enqueue([EnqueueRequest("q", "t", id=f"{n}") for n in range(5)])
    client.pause("q", datetime.now(UTC) + timedelta(hours=1))
    ran: list[str] = []
    mux = handled(launcher, Mux(), "t", lambda job: ran.append(job.id))
    worker = launcher.start(mux, poll_interval=0.1)
    [until] = client.paused().values()
    assert until.utcoffset() is not None
    [stats] = client.stats("q")
    assert (stats.queue, stats.type, stats.due) == ("q", "t", 5)
    assert stats.oldest_due_age >= 0
    assert launcher.shutdown(worker)
    assert client.resume("q")
    assert not ran
    assert client.do("q", mux) == Complete()
    drained = (
        colour.run(adrain(colour.dsn, "q", mux)) if colour.is_async else drain(colour.dsn, "q", mux)
    )
    assert sorted(ran) == [f"{n}" for n in range(5)]
    assert len(drained) == 4
