"""The doctor names who or what is at fault, and its remedies work: each fault is made for real."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from conftest import MIGRATION, has_failed
from faults.pooler import Pooler
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool
from support.clients import Colour
from support.database import row, rows
from support.databases import KEEPER, Databases
from support.documents import DOCS, ROOT
from support.standby import standby_of
from support.waiting import PATIENCE, eventually

from bgjob import Client, EnqueueRequest, Limit, Mux, Worker, _words as words, cli, schema
from bgjob._diagnosis import blueprint, checks, queues, server, sessions, tables
from bgjob._diagnosis.checks import CHECKS, examine
from bgjob._sql import backlog, storage
from bgjob._sql.server import Connections, Holder, Server
from bgjob.doctor import LIMITS, Finding, Limits, exit_status
from bgjob.ext.embedded import EmbeddedServer

MANY = 10_001
"""More transactions than a holder of the horizon may be behind."""

SETTINGS = {
    "fsync": "off",
    "shared_buffers": "32MB",
    "wal_level": "logical",
    "max_prepared_transactions": "5",
    # On, as the doctor wants it, and not during a test: it freezes what a test has made old.
    "autovacuum_naptime": "1d",
}


@pytest.fixture(scope="module")
def own(quick_bin_dir: Path) -> Iterator[EmbeddedServer]:
    """A server of this module's own: on the shared one others have long transactions too."""
    with EmbeddedServer(bin_dir=quick_bin_dir, settings=SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def own_databases(own: EmbeddedServer) -> Iterator[tuple[Databases, str]]:
    """The databases of that server, and the template with the schema."""
    with psycopg.connect(own.dsn, autocommit=True) as admin:
        databases = Databases(own.dsn, "own", admin)
        with databases.make_template(MIGRATION.read_bytes()) as template:
            yield databases, template


@pytest.fixture
def dsn(own_databases: tuple[Databases, str], request: pytest.FixtureRequest) -> Iterator[str]:
    databases, template = own_databases
    with databases.lend(template, may_keep=lambda: not has_failed(request)) as dsn:
        yield dsn


@pytest.fixture
def empty_dsn(own_databases: tuple[Databases, str]) -> Iterator[str]:
    with own_databases[0].make() as (_, dsn):
        yield dsn


def doctor(dsn: str, *names: str, **limits: Any) -> list[Finding]:
    with Client(dsn) as client:
        return client.doctor(*names, limits=Limits(**limits))


def ills(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity != "ok"]


def only(findings: list[Finding]) -> Finding:
    found = ills(findings)
    assert len(found) == 1, findings
    return found[0]


def apply(conn: psycopg.Connection, remedy: str) -> None:
    """Run the remedy as a person would who copies it into psql."""
    for statement in remedy.split("; "):
        conn.execute(cast(Any, statement))


def burn(conn: psycopg.Connection, transactions: int = MANY) -> None:
    """Use up transaction numbers."""
    conn.execute(
        cast(
            Any,
            f"do $$ begin for n in 1..{transactions} loop "
            "perform pg_current_xact_id(); commit; end loop; end $$",
        )
    )


@contextmanager
def session(dsn: str, *statements: str, name: str = "analytics") -> Iterator[psycopg.Connection]:
    """Open a transaction of these statements, and leave it idle."""
    with closing(psycopg.connect(dsn, application_name=name)) as conn:
        for statement in statements:
            conn.execute(cast(Any, statement))
        yield conn


SNAPSHOT = ("set transaction isolation level repeatable read", "select 'a report of last year'")


@pytest.fixture
def stranger(dsn: str, conn: psycopg.Connection) -> Iterator[str]:
    """The DSN of a role without any privilege."""
    name = f"stranger_{conn.info.dbname}"
    conn.execute(cast(Any, f"create role {name} login"))
    yield make_conninfo(dsn, user=name)
    conn.execute(cast(Any, f"drop owned by {name}; drop role {name}"))


# -- as it should be -----------------------------------------------------------------------


def test_a_healthy_database_has_a_finding_for_each_check_and_nothing_to_do(client: Any) -> None:
    found = client.doctor()
    assert ills(found) == []
    assert list(dict.fromkeys(finding.check for finding in found)) == list(CHECKS)
    assert exit_status(found) == 0


def test_checks_can_be_chosen_by_name(client: Any) -> None:
    assert [finding.check for finding in client.doctor("locks", "horizon")] == ["horizon", "locks"]
    with pytest.raises(ValueError, match="no check 'none'; the checks are server, clock"):
        client.doctor("none")


def test_the_operations_guide_describes_each_check() -> None:
    told = (DOCS / "operations.md").read_text("utf-8")
    for name in CHECKS:
        assert f"\n| `{name}` |" in told


def test_a_finding_that_is_not_ok_needs_a_remedy() -> None:
    Finding("server", "ok", "fine")
    with pytest.raises(ValueError, match="remedy of server is required"):
        Finding("server", "note", "not fine")


def test_the_exit_status_is_that_of_the_worst_finding() -> None:
    def of(*severities: Any) -> int:
        return exit_status(Finding("x", severity, "t", "r") for severity in severities)

    assert [of(), of("ok", "note"), of("warn", "note"), of("ok", "bad", "warn")] == [0, 0, 3, 4]


def test_it_leaves_no_setting_no_transaction_and_no_lock_behind(colour: Colour) -> None:
    pool = colour.pool(autocommit=False)
    client = colour.client(pool)
    settings = "select name, setting from pg_settings"

    def read() -> dict[str, str]:
        conn = pool.getconn()
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert not conn.autocommit
        answer = conn.execute(settings)
        cursor = colour.run(answer) if colour.is_async else answer
        found = cursor.fetchall()
        found = dict(colour.run(found) if colour.is_async else found)
        ended = conn.rollback()
        if colour.is_async:
            colour.run(ended)
        pool.putconn(conn)
        return found

    before = read()
    with session(colour.dsn, EXCLUSIVE):  # a check fails
        assert ills(client.doctor("leases"))
    client.doctor()
    assert read() == before


def test_a_lost_connection_is_an_error_and_no_finding() -> None:
    steps = examine([], LIMITS, pid=1, prepares=False)
    next(steps)
    steps.send("bgjob schema 1")
    with pytest.raises(psycopg.OperationalError, match="gone"):
        steps.throw(psycopg.OperationalError("gone"))


# -- the server ------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["track_counts", "track_activities"])
def test_a_switched_off_setting_is_bad(dsn: str, conn: psycopg.Connection, setting: str) -> None:
    conn.execute(cast(Any, f"alter database {conn.info.dbname} set {setting} = off"))
    finding = only(doctor(dsn, "server"))
    assert (finding.severity, finding.text.split(":")[0]) == ("bad", f"{setting} is off")
    assert f"set {setting} = on" in finding.remedy


def test_read_only_transactions_are_bad(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute(
        cast(Any, f"alter database {conn.info.dbname} set default_transaction_read_only = on")
    )
    finding = only(doctor(dsn, "server"))
    assert finding.severity == "bad"
    assert "default_transaction_read_only to off" in finding.remedy


@pytest.mark.parametrize(
    ("offset", "severity"), [(0, "ok"), (90, "note"), (-90, "note"), (7200, "warn")]
)
def test_a_clock_that_is_wrong_is_harmless_up_to_an_hour(
    dsn: str, monkeypatch: pytest.MonkeyPatch, offset: float, severity: str
) -> None:
    monkeypatch.setattr(checks, "time", lambda: time.time() + offset)
    [finding] = doctor(dsn, "clock")
    assert finding.severity == severity
    if offset:
        assert ("ahead of" if offset > 0 else "behind") in finding.text
        assert abs(cast(float, finding.facts["ahead"]) - offset) < 30


def test_a_skew_within_the_round_trip_is_none() -> None:
    assert server.clock(4.0, 5.0)[0].severity == "ok"
    assert server.clock(5.1, 5.0)[0].severity == "note"


def test_a_pooler_is_seen(dsn: str) -> None:
    with Pooler(dsn) as pooler:
        pooled = pooler.dsn(dsn)
        finding = only(doctor(pooled, "pooler"))
        assert finding.severity == "note"
        assert "past the pooler" in finding.remedy
        assert exit_status(doctor(pooled)) == 0
        with ConnectionPool(pooled, min_size=1, max_size=1) as pool, Client(pool) as client:
            finding = only(client.doctor("pooler"))
    assert finding.severity == "warn"
    assert "prepare_threshold" in finding.remedy


@pytest.mark.parametrize("scope", ["role", "database"])
def test_connections_that_run_out_are_a_warning_and_then_bad(
    dsn: str, conn: psycopg.Connection, stranger: str, scope: str
) -> None:
    user = f"stranger_{conn.info.dbname}"
    name = user if scope == "role" else conn.info.dbname
    # This one's own connection, and those that are opened below.
    others = 1 if scope == "role" else 2
    conn.execute(
        "select pg_terminate_backend(pid, 30000) from pg_stat_activity "
        "where datname = current_database() and application_name = %s",
        [KEEPER],
    )
    conn.execute(cast(Any, f"alter {scope} {name} connection limit 10"))

    def severity() -> str:
        return doctor(stranger, "connections")[0].severity

    with Client(stranger) as client:
        assert client.doctor("connections")[0].severity == "ok"
    opened = [psycopg.connect(stranger) for _ in range(8 - others)]
    try:
        assert eventually(lambda: severity() == "warn")
        finding = only(doctor(stranger, "connections"))
        assert f"8 of 10 connections of {scope} {name} are in use" == finding.text
        assert f"alter {scope} {name} connection limit" in finding.remedy
        opened += [psycopg.connect(stranger) for _ in range(2)]
        assert severity() == "bad"
    finally:
        for each in opened:
            each.close()


def test_connections_of_the_server_run_out_too() -> None:
    found = [server.connections([Connections("server", None, n, 97)], LIMITS) for n in (77, 78, 93)]
    assert [each[0].severity for each in found] == ["ok", "warn", "bad"]
    assert "max_connections" in found[1][0].remedy


# -- who sees what ---------------------------------------------------------------------------


def test_a_stranger_is_told_what_is_hidden(dsn: str, stranger: str) -> None:
    assert ills(doctor(dsn, "rights")) == []
    with session(dsn, "select 1"):
        finding = only(doctor(stranger, "rights"))
    assert finding.severity == "note"
    assert finding.remedy.startswith("as a superuser: grant pg_read_all_stats to stranger_")


def test_a_stranger_is_told_which_checks_it_may_not_make(
    conn: psycopg.Connection, stranger: str
) -> None:
    found = ills(doctor(stranger, "leases", "workers", "due", "pauses", "schedules", "dead"))
    assert [finding.check for finding in found] == [
        "leases",
        "workers",
        "due",
        "pauses",
        "schedules",
        "dead",
    ]
    for finding in found:
        assert finding.severity == "warn"
        assert finding.text.startswith("not checked: permission denied for table bgjob_")
        assert "bgjob_operator" in finding.remedy


# -- the horizon -----------------------------------------------------------------------------


def test_an_idle_session_that_keeps_dead_rows_is_named_and_can_be_ended(
    dsn: str, conn: psycopg.Connection, client: Any
) -> None:
    with session(dsn, *SNAPSHOT) as old:
        assert ills(client.doctor("horizon")) == []
        burn(conn)
        finding = only(client.doctor("horizon"))
        assert finding.severity == "warn"
        pid = old.info.backend_pid
        assert finding.text.startswith(
            f"session {pid} (postgres, analytics, local, idle in transaction) keeps dead rows of "
            "the last 10,0"
        )
        assert finding.text.endswith("select 'a report of last year'")
        assert finding.remedy == f"select pg_terminate_backend({pid})"
        assert finding.facts["kind"] == "session"
        assert cast(int, finding.facts["transactions"]) >= MANY
        apply(conn, finding.remedy)
        assert eventually(lambda: ills(client.doctor("horizon")) == [])


def test_a_session_of_another_role_is_named_without_any_privilege(
    dsn: str, conn: psycopg.Connection, stranger: str
) -> None:
    with session(dsn, *SNAPSHOT) as old:
        burn(conn)
        finding = only(doctor(stranger, "horizon"))
        pid = old.info.backend_pid
        assert finding.text.startswith(
            f"session {pid} (postgres, analytics) keeps dead rows of the last 10,0"
        )
        assert "report" not in finding.text
        assert finding.remedy == (
            f"select pg_terminate_backend({pid})  -- as postgres or a superuser"
        )
        assert finding.facts["seconds"] is None
        assert finding.facts["may_end"] is False


def test_a_role_may_end_its_own_sessions_and_with_a_grant_those_of_others(
    dsn: str, conn: psycopg.Connection, stranger: str
) -> None:
    other = f"other_{conn.info.dbname}"
    conn.execute(cast(Any, f"create role {other} login"))
    try:
        with session(stranger, *SNAPSHOT), session(make_conninfo(dsn, user=other), *SNAPSHOT):
            burn(conn)

            def may_end() -> dict[Any, Any]:
                found = ills(doctor(stranger, "horizon"))
                return {finding.facts["role"]: finding.facts["may_end"] for finding in found}

            me = f"stranger_{conn.info.dbname}"
            assert may_end() == {me: True, other: False}
            conn.execute(cast(Any, f"grant pg_signal_backend to {me}"))
            assert may_end() == {me: True, other: True}
    finally:
        conn.execute(cast(Any, f"drop role {other}"))


def test_a_session_that_has_only_written_holds_the_horizon(
    dsn: str, conn: psycopg.Connection
) -> None:
    with session(dsn, "insert into bgjob_pause (queue) values ('q')") as old:
        finding = only(doctor(dsn, "horizon", horizon_seconds=0))
        assert finding.facts["name"] == str(old.info.backend_pid)


def test_a_transaction_of_another_database_is_to_blame_for_snapshots_that_begin_with_it(
    dsn: str, conn: psycopg.Connection, empty_dsn: str, stranger: str, own: EmbeddedServer
) -> None:
    other = psycopg.conninfo.conninfo_to_dict(empty_dsn)["dbname"]
    write, read = "create table t (a int)", "select 1"
    with session(empty_dsn, write) as culprit, session(empty_dsn, *SNAPSHOT):
        burn(conn)
        # A new snapshot here begins with the culprit. This session is innocent.
        with session(dsn, *SNAPSHOT, read):
            for asking in (dsn, stranger):
                finding = only(doctor(asking, "horizon"))
                pid = culprit.info.backend_pid
                assert finding.text.startswith(f"session {pid} of database {other} (postgres")
                assert f"pg_terminate_backend({pid})" in finding.remedy
            # Once it is as old, it is to blame as well.
            found = ills(doctor(dsn, "horizon", horizon_seconds=0))
            assert {finding.facts["database"] for finding in found} == {None, other}
        apply(conn, finding.remedy.partition("  --")[0])
        assert eventually(lambda: ills(doctor(dsn, "horizon")) == [])
    with psycopg.connect(empty_dsn) as elsewhere:
        elsewhere.execute("create table t (a int)")
        elsewhere.execute("prepare transaction 'elsewhere'")
    try:
        burn(conn)
        finding = only(doctor(dsn, "horizon"))
        assert finding.remedy == f"in database {other}: rollback prepared 'elsewhere'"
    finally:
        with psycopg.connect(empty_dsn, autocommit=True) as elsewhere:
            elsewhere.execute("rollback prepared 'elsewhere'")


def test_the_one_to_blame_is_found_among_many_that_are_not(
    dsn: str, conn: psycopg.Connection, stranger: str
) -> None:
    with ExitStack() as stack:
        write = "insert into bgjob_pause (queue) values ('q')"
        culprit = stack.enter_context(session(dsn, write))
        for _ in range(25):
            stack.enter_context(session(dsn, *SNAPSHOT))
        burn(conn)
        for asking in (dsn, stranger):
            name = only(doctor(asking, "horizon")).facts["name"]
            assert name == str(culprit.info.backend_pid)


def test_an_old_transaction_is_bad_once_there_are_many_dead_rows(
    dsn: str, conn: psycopg.Connection
) -> None:
    with session(dsn, *SNAPSHOT):
        with psycopg.connect(dsn) as writer:
            writer.execute(
                "insert into bgjob_dead_job (job_id, queue, type, attempt, priority, next_run_at, "
                "job_created_at, job_updated_at) select n, 'q', 't', 1, 0, now(), now(), now() "
                "from generate_series(1, 1001) n"
            )
            writer.execute("delete from bgjob_dead_job")

        def severities(**limits: Any) -> list[str]:
            found = doctor(dsn, "horizon", horizon_seconds=0, **limits)
            return [finding.severity for finding in found]

        assert eventually(lambda: severities(horizon_dead_rows=1000) == ["bad"])
        assert severities(horizon_dead_rows=1001) == ["warn"]
        finding = only(doctor(dsn, "horizon", horizon_seconds=0, horizon_dead_rows=1000))
        assert finding.text.endswith("; bgjob's tables have 1,001 dead rows")


def test_the_transaction_of_a_handler_is_called_one(dsn: str, conn: psycopg.Connection) -> None:
    inside, released = threading.Event(), threading.Event()

    def handler(job: Any, conn: psycopg.Connection) -> None:
        conn.execute("insert into bgjob_pause (queue) values ('other')")
        inside.set()
        assert released.wait(PATIENCE)

    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        with Worker(client, "q", Mux().register("t", handler, transactional=True)):
            assert inside.wait(PATIENCE)
            try:
                found = ills(doctor(dsn, "horizon", horizon_seconds=0))
            finally:
                released.set()
    assert any(", a transactional handler of a worker, keeps" in finding.text for finding in found)


@pytest.fixture
def prepared(conn: psycopg.Connection) -> Iterator[Callable[..., str]]:
    """Make a prepared transaction of statements, and forget it; returns its identifier."""
    name = f"forgotten '2pc' of {conn.info.dbname}"

    def prepare(*statements: str) -> str:
        with conn.transaction(), suppress(psycopg.Rollback):
            pass
        conn.execute("begin")
        for statement in statements:
            conn.execute(cast(Any, statement))
        conn.execute(sql.SQL("prepare transaction {}").format(name))
        return name

    yield prepare
    if row(conn, "select count(*) from pg_prepared_xacts where gid = %s", name)[0]:
        conn.execute(sql.SQL("rollback prepared {}").format(name))


def test_a_prepared_transaction_is_named_and_can_be_rolled_back(
    dsn: str, conn: psycopg.Connection, prepared: Callable[..., str], stranger: str
) -> None:
    gid = prepared("insert into bgjob_pause (queue) values ('q')")
    burn(conn)
    finding = only(doctor(dsn, "horizon"))
    assert finding.text.startswith(
        f"prepared transaction {gid} (postgres, prepared) keeps dead rows of the last 10,0"
    )
    [seen] = ills(doctor(stranger, "horizon"))
    assert seen.facts["name"] == gid
    assert seen.remedy == f"{finding.remedy}  -- as postgres or a superuser"
    apply(conn, finding.remedy)
    assert ills(doctor(dsn, "horizon")) == []


def test_a_vacuum_holds_nothing_back(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type) select n, 'q', 't' from generate_series(1, 20000) n"
    )
    with closing(psycopg.connect(dsn, autocommit=True)) as vacuuming:
        vacuuming.execute("set vacuum_cost_delay = '100ms'; set vacuum_cost_limit = 1")
        pid = vacuuming.info.backend_pid
        thread = threading.Thread(target=cancelled, args=[vacuuming, "vacuum bgjob_job"])
        thread.start()
        try:
            progress = "select count(*) from pg_stat_progress_vacuum where pid = %s"
            assert eventually(lambda: row(conn, progress, pid)[0])
            xmin = "select age(backend_xmin) is not null from pg_stat_activity where pid = %s"
            assert row(conn, xmin, pid) == (True,)
            found = doctor(dsn, "horizon", horizon_seconds=0, horizon_transactions=-1)
            assert str(pid) not in {finding.facts.get("name") for finding in found}
            assert row(conn, progress, pid)[0]
        finally:
            conn.execute("select pg_cancel_backend(%s)", [pid])
            thread.join()


def cancelled(conn: psycopg.Connection, statement: str) -> None:
    with suppress(psycopg.errors.QueryCanceled):
        conn.execute(cast(Any, statement))


# -- slots and standbys ----------------------------------------------------------------------


def test_a_logical_slot_keeps_no_dead_rows_of_jobs(
    own: EmbeddedServer, dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("select pg_create_logical_replication_slot('logical', 'pgoutput')")
    try:
        burn(conn)
        behind = "select age(catalog_xmin) from pg_replication_slots where slot_name = 'logical'"
        assert row(conn, behind)[0] >= MANY
        assert ills(doctor(dsn, "horizon")) == []
    finally:
        conn.execute("select pg_drop_replication_slot('logical')")


def test_a_query_of_a_standby_keeps_dead_rows_and_the_standby_is_named(
    own: EmbeddedServer, dsn: str, conn: psycopg.Connection, bin_dir: Path | None
) -> None:
    with standby_of(own, bin_dir) as standby, session(standby.dsn, *SNAPSHOT) as query:
        burn(conn)
        assert eventually(lambda: ills(doctor(dsn, "horizon")))
        finding = only(doctor(dsn, "horizon"))
        assert (finding.severity, finding.facts["kind"]) == ("warn", "standby")
        assert finding.text.startswith("standby ")
        assert "(postgres, walreceiver, local, streaming) keeps dead rows" in finding.text
        assert "hot_standby_feedback" in finding.remedy
        # The remedy's query, on the standby, finds who it is.
        asked = finding.remedy.partition(": ")[2].partition("; or")[0]
        with psycopg.connect(standby.dsn) as conn:
            assert conn.execute(cast(Any, asked)).fetchall()[0][0] == query.info.backend_pid
        query.rollback()
        assert eventually(lambda: ills(doctor(dsn, "horizon")) == [])


def test_a_slot_that_a_lost_standby_left_is_named_and_can_be_dropped(
    own: EmbeddedServer, dsn: str, conn: psycopg.Connection, bin_dir: Path | None
) -> None:
    conn.execute("select pg_create_physical_replication_slot('physical')")
    with (
        standby_of(own, bin_dir, slot="physical") as standby,
        session(standby.dsn, *SNAPSHOT),
    ):
        burn(conn)
        assert eventually(lambda: ills(doctor(dsn, "horizon")))
        finding = only(doctor(dsn, "horizon"))
        assert finding.text.startswith(
            "replication slot physical (walreceiver, active) keeps dead rows of the last "
        )
        assert "on that standby" in finding.remedy
        standby.kill()
    released = "select not active from pg_replication_slots"
    assert eventually(lambda: row(conn, released)[0])
    finding = only(doctor(dsn, "horizon"))
    assert finding.text.startswith("replication slot physical (inactive) keeps dead rows")
    apply(conn, finding.remedy.partition(": ")[2])
    assert ills(doctor(dsn, "horizon")) == []


def test_autovacuum_that_is_switched_off_is_bad(
    own: EmbeddedServer, dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("alter system set autovacuum = off")
    conn.execute("select pg_reload_conf()")
    try:
        assert eventually(lambda: ills(doctor(dsn, "server")))
        finding = only(doctor(dsn, "server"))
        assert (finding.severity, finding.text[:17]) == ("bad", "autovacuum is off")
        apply(conn, finding.remedy)
        assert eventually(lambda: ills(doctor(dsn, "server")) == [])
    finally:
        conn.execute("alter system reset autovacuum")
        conn.execute("select pg_reload_conf()")


def test_a_listener_whose_transaction_does_not_end_fills_the_queue_of_notifications(
    own: EmbeddedServer, dsn: str, conn: psycopg.Connection
) -> None:
    with closing(psycopg.connect(dsn, autocommit=True)) as listener:
        listener.execute("listen c")
        listener.execute("begin")
        listener.execute("select 1")
        for n in range(30):
            conn.execute("select pg_notify('c', %s)", [f"{n}".ljust(7000)])
        usage = row(conn, "select pg_notification_queue_usage()")[0]
        assert usage > 0
        assert ills(doctor(dsn, "notify")) == []
        finding = only(doctor(dsn, "notify", notify=usage))
        assert finding.severity == "warn"
        finding = only(doctor(dsn, "notify", notify=usage, notify_bad=usage))
        assert finding.severity == "bad"
        assert f"pg_terminate_backend({listener.info.backend_pid})" in finding.remedy
        apply(conn, finding.remedy.partition(": ")[2])
        assert eventually(lambda: ills(doctor(dsn, "notify", notify=usage / 2)) == [])


# -- locks -----------------------------------------------------------------------------------

EXCLUSIVE = "lock table bgjob_job in access exclusive mode"
INSERT = "insert into bgjob_job (id, queue, type) values ('waits', 'q', 't')"


@contextmanager
def waiting(dsn: str, conn: psycopg.Connection, statement: str = INSERT) -> Iterator[int]:
    """Run a statement that has to wait for a lock; yields the session's process."""
    with closing(psycopg.connect(dsn, autocommit=True, application_name="waiter")) as waiter:
        pid = waiter.info.backend_pid
        thread = threading.Thread(target=terminated, args=[waiter, statement])
        thread.start()
        try:
            waits = "select count(*) from pg_locks where pid = %s and waitstart is not null"
            assert eventually(lambda: row(conn, waits, pid)[0])
            yield pid
        finally:
            conn.execute("select pg_terminate_backend(%s)", [pid])
            thread.join()


def terminated(conn: psycopg.Connection, statement: str) -> None:
    with suppress(psycopg.OperationalError):
        conn.execute(cast(Any, statement))


@pytest.mark.parametrize("role", ["owner", "stranger"])
def test_who_waits_for_a_lock_and_who_has_it_are_named_and_the_remedy_ends_it(
    dsn: str, conn: psycopg.Connection, stranger: str, role: str
) -> None:
    asking = dsn if role == "owner" else stranger
    with session(dsn, EXCLUSIVE, name="migration") as holder, waiting(dsn, conn) as pid:
        assert ills(doctor(asking, "locks", lock_seconds=3600)) == []
        finding = only(doctor(asking, "locks", lock_seconds=0))
        assert finding.severity == "bad"
        told = f"session {pid} (postgres, waiter), which uses bgjob_job, waits for a lock for "
        assert finding.text.startswith(told)
        state = ", idle in transaction" if role == "owner" else ""
        blocker = holder.info.backend_pid
        assert finding.text.endswith(f"session {blocker} (postgres, migration{state}) has it")
        assert finding.remedy.startswith(f"select pg_terminate_backend({blocker})")
        apply(conn, finding.remedy)
        assert eventually(lambda: rows(conn, "select id from bgjob_job") == [("waits",)])
        assert ills(doctor(asking, "locks", lock_seconds=0)) == []


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (EXCLUSIVE, INSERT),
        ("delete from bgjob_job where id = 'a'", "update bgjob_job set type = 'u' where id = 'a'"),
    ],
    ids=["table", "row"],
)
def test_a_prepared_transaction_that_has_a_lock_is_named(
    dsn: str, conn: psycopg.Connection, prepared: Callable[..., str], held: str, wanted: str
) -> None:
    conn.execute("insert into bgjob_job (id, queue, type) values ('a', 'q', 't')")
    gid = prepared(held)
    with waiting(dsn, conn, wanted) as pid:
        found = ills(doctor(dsn, "locks", lock_seconds=0))
        waits = found[0]
        assert waits.facts["pid"] == pid
        assert waits.text.endswith(f"; a prepared transaction has it: {gid}")
        assert {finding.remedy for finding in found} == {waits.remedy}
        apply(conn, waits.remedy)
        assert eventually(lambda: ills(doctor(dsn, "locks", lock_seconds=0)) == [])


def test_a_client_that_was_killed_while_it_waits_for_a_lock_is_named(
    dsn: str, conn: psycopg.Connection
) -> None:
    program = (
        "import psycopg, sys\n"
        "conn = psycopg.connect(sys.argv[1], autocommit=True)\n"
        "print(conn.info.backend_pid, flush=True)\n"
        f"conn.execute({INSERT!r})\n"
    )
    with session(dsn, EXCLUSIVE):
        with subprocess.Popen(
            [sys.executable, "-c", program, dsn], stdout=subprocess.PIPE
        ) as client:
            assert client.stdout
            pid = int(client.stdout.readline())
            waits = "select count(*) from pg_locks where pid = %s and waitstart is not null"
            assert eventually(lambda: row(conn, waits, pid)[0])
            os.kill(client.pid, signal.SIGKILL)
            client.wait()
        finding = only(doctor(dsn, "locks", lock_seconds=0))
        assert finding.facts["pid"] == pid


@pytest.mark.parametrize("mode", ["share", "access exclusive"])
def test_a_lock_of_a_whole_table_is_named_before_anybody_waits(
    dsn: str, conn: psycopg.Connection, mode: str
) -> None:
    with session(dsn, f"lock table bgjob_exclusive in {mode} mode", name="migration") as holder:
        finding = only(doctor(dsn, "locks", lock_seconds=0))
        assert finding.severity == "bad"
        assert f"has {mode.title().replace(' ', '')}Lock on bgjob_exclusive" in finding.text
        apply(conn, finding.remedy)
        assert eventually(lambda: ills(doctor(dsn, "locks", lock_seconds=0)) == [])
    with session(dsn, "lock table bgjob_exclusive in row exclusive mode"):
        assert ills(doctor(dsn, "locks", lock_seconds=0)) == []


def test_a_table_lock_of_a_prepared_transaction_is_named(
    dsn: str, conn: psycopg.Connection, prepared: Callable[..., str]
) -> None:
    gid = prepared("lock table bgjob_job in share mode")
    finding = only(doctor(dsn, "locks", lock_seconds=0))
    assert finding.text.startswith(f"prepared transaction {gid} (postgres) has ShareLock")
    apply(conn, finding.remedy)


def test_a_check_does_not_wait_for_long_for_a_locked_table(dsn: str) -> None:
    with session(dsn, EXCLUSIVE):
        finding = only(doctor(dsn, "leases", "schedules"))
    assert finding.check == "leases"
    assert finding.text == "not checked: canceling statement due to lock timeout"
    assert finding.remedy == "see the check locks for who has the table"


# -- the schema ------------------------------------------------------------------------------


def test_missing_tables_are_bad_and_the_other_checks_go_on(empty_dsn: str) -> None:
    found = doctor(empty_dsn)
    assert only(found).check == "schema"
    assert only(found).severity == "bad"
    assert "`bgjob schema` prints it" in only(found).remedy
    assert {finding.check for finding in found} == set(CHECKS[: CHECKS.index("tables")])


@pytest.mark.parametrize(
    ("comment", "remedy"),
    [
        ("bgjob schema 99", "pip install --upgrade bgjob"),
        ("bgjob schema 0", "CHANGELOG.md"),
        ("a comment", "`bgjob schema` prints it"),
        ("", "`bgjob schema` prints it"),
    ],
)
def test_another_version_of_the_schema_is_bad(
    dsn: str, conn: psycopg.Connection, comment: str, remedy: str
) -> None:
    conn.execute(sql.SQL("comment on table bgjob_job is {}").format(comment))
    finding = only(doctor(dsn, "schema"))
    assert finding.severity == "bad"
    assert remedy in finding.remedy


def test_the_blueprint_is_what_the_schema_makes(conn: psycopg.Connection) -> None:
    plan = blueprint.read(schema.init_sql())
    named = "select relname::text from pg_class where relname like 'bgjob%%' and relkind in "
    assert set(plan.tables) == {name for (name,) in rows(conn, named + "('r', 'p')")}
    # The indexes of partitions belong to that of their table.
    whole = named + "('i', 'I') and not relispartition"
    assert set(plan.indexes) == {name for (name,) in rows(conn, whole)}


def test_the_remedy_of_each_index_makes_it(dsn: str, conn: psycopg.Connection) -> None:
    for name, index in blueprint.read(schema.init_sql()).indexes.items():
        if index.is_primary:
            conn.execute(cast(Any, f"alter table {index.table} drop constraint {name}"))
        else:
            conn.execute(cast(Any, f"drop index {name}"))
        finding = only(doctor(dsn, "schema"))
        assert finding.severity == ("bad" if index.is_primary else "warn")
        assert finding.text == f"index {name} of table {index.table} is missing"
        apply(conn, finding.remedy)
        assert ills(doctor(dsn, "schema")) == []


@pytest.mark.parametrize(
    "other",
    [
        "(queue, priority) where not waits",
        "(queue, priority, next_run_at)",
        "(queue, priority, next_run_at desc) where not waits",
        "(queue, next_run_at, priority) where not waits",
    ],
)
def test_an_index_that_is_another_one_is_a_warning_and_can_be_replaced(
    dsn: str, conn: psycopg.Connection, other: str
) -> None:
    conn.execute(
        cast(Any, f"drop index bgjob_job_due; create index bgjob_job_due on bgjob_job {other}")
    )
    finding = only(doctor(dsn, "schema"))
    assert finding.severity == "warn"
    assert "is not the one of migration/init.sql: CREATE INDEX" in finding.text
    apply(conn, finding.remedy)
    assert ills(doctor(dsn, "schema")) == []


def test_tables_in_a_schema_with_a_name_to_quote_are_as_they_should_be(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as conn:
        conn.execute('create schema "on using btree"')
        conn.execute('set search_path to "on using btree"')
        conn.execute(MIGRATION.read_bytes())
    dsn = make_conninfo(empty_dsn, options='-csearch_path="on\\ using\\ btree"')
    assert ills(doctor(dsn)) == []


def test_a_missing_column_or_table_is_bad(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute("alter table bgjob_dead_job drop column exclusive")
    conn.execute("drop table bgjob_schedule")
    found = {finding.text: finding for finding in ills(doctor(dsn))}
    assert {finding.severity for finding in found.values()} == {"bad", "warn"}
    column = found["table bgjob_dead_job has no column exclusive"]
    assert column.remedy.startswith("alter table bgjob_dead_job add column exclusive")
    assert found["table bgjob_schedule is not in the search_path"].severity == "bad"
    conn.execute("drop table bgjob_worker")
    missing = {f.severity for f in ills(doctor(dsn, "schema")) if "bgjob_worker" in f.text}
    assert missing == {"warn"}
    write(conn, "a", next_run_at="now() - interval '10 min'")
    texts = {f.check: f.text.partition(":")[0] for f in ills(doctor(dsn, "workers", "due"))}
    assert texts == {"workers": "not checked", "due": "queue 'q'"}
    [late] = [finding for finding in found.values() if finding.check == "schedules"]
    assert late.text == 'not checked: relation "bgjob_schedule" does not exist'
    assert late.remedy == "see the check schema"


@pytest.mark.parametrize(
    "change", ["set (fillfactor = 100)", "reset (fillfactor)", "reset (vacuum_truncate)"]
)
def test_another_storage_parameter_is_told(dsn: str, conn: psycopg.Connection, change: str) -> None:
    conn.execute(cast(Any, f"alter table bgjob_job {change}"))
    finding = only(doctor(dsn, "schema"))
    assert finding.severity == "note"
    apply(conn, finding.remedy)
    assert ills(doctor(dsn, "schema")) == []


def test_the_same_storage_parameter_in_other_words_is_the_same(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("alter table bgjob_job set (vacuum_truncate = false)")
    assert ills(doctor(dsn, "schema")) == []


def test_a_workers_role_that_lacks_a_grant_is_bad(
    dsn: str, conn: psycopg.Connection, stranger: str
) -> None:
    me = f"stranger_{conn.info.dbname}"
    # Another role than a worker's needs nothing of it.
    conn.execute(cast(Any, f"grant select on bgjob_job to {me}"))
    assert ills(doctor(stranger, "schema")) == []
    conn.execute(cast(Any, f"grant select, update, delete on bgjob_job, bgjob_exclusive to {me}"))
    for _ in range(10):
        found = ills(doctor(stranger, "schema"))
        if not found:
            break
        assert {finding.severity for finding in found} == {"bad"}
        for finding in found:
            assert f"role '{me}' may not" in finding.text
            apply(conn, finding.remedy.partition(": ")[2])
    assert ills(doctor(stranger, "schema")) == []


def test_rows_that_are_hidden_by_a_policy_are_told(
    dsn: str, conn: psycopg.Connection, stranger: str
) -> None:
    me = f"stranger_{conn.info.dbname}"
    conn.execute("alter table bgjob_job enable row level security")
    conn.execute(cast(Any, f"grant select on bgjob_job to {me}"))
    finding = only(doctor(stranger, "schema"))
    assert finding.severity == "warn"
    assert "row-level security hides rows of table bgjob_job" in finding.text
    assert "create policy" in finding.remedy


# -- tables and indexes ----------------------------------------------------------------------


def fill(conn: psycopg.Connection, jobs: int) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type) select lpad(n::text, 36, '0'), 'q', 't' "
        "from generate_series(1, %s::int) n",
        [jobs],
    )


def test_more_dead_rows_than_live_ones_are_a_warning_until_a_vacuum(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("alter table bgjob_job set (autovacuum_vacuum_threshold = 1000000)")
    with psycopg.connect(dsn) as writer:
        fill(writer, 1000)
        writer.execute("delete from bgjob_job")

    def found(limit: int) -> list[Finding]:
        return ills(doctor(dsn, "tables", table_dead_rows=limit))

    assert eventually(lambda: found(999))
    assert found(1000) == []
    [finding] = found(999)
    assert finding.severity == "warn"
    assert finding.text.startswith("bgjob_job: 0 rows, 1,000 dead, ")
    apply(conn, finding.remedy.partition("; ")[0])
    assert eventually(lambda: found(0) == [])


def test_autovacuum_that_is_off_for_a_table_is_bad(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute("alter table bgjob_dead_job set (autovacuum_enabled = no)")
    finding = only(doctor(dsn, "tables"))
    assert (finding.severity, finding.facts["name"]) == ("bad", "bgjob_dead_job")
    apply(conn, finding.remedy)
    assert ills(doctor(dsn, "tables")) == []


@pytest.mark.parametrize("of", ["the table", "its toast table"])
def test_a_table_that_was_not_frozen_for_a_long_time_is_bad(
    dsn: str, conn: psycopg.Connection, of: str
) -> None:
    which = "oid" if of == "the table" else "reltoastrelid"
    conn.execute("set allow_system_table_mods = on")
    # The number of a transaction of long ago: an age of 1,000,000,001.
    conn.execute(
        cast(
            Any,
            "update pg_class set relfrozenxid = ((pg_snapshot_xmin(pg_current_snapshot())::text"
            "::bigint - 1000000001 + 4294967296) %% 4294967296)::text::xid where oid = (select "
            f"{which} from pg_class where relname = 'bgjob_job') returning %s",
        ),
        [1],
    )
    finding = only(doctor(dsn, "tables"))
    assert finding.severity == "bad"
    assert finding.text.startswith("bgjob_job: its oldest row is 1,000,000,0")
    assert finding.remedy.startswith("vacuum (freeze, verbose) bgjob_job")


def test_updates_that_are_not_heap_only_are_told(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute("alter table bgjob_job set (autovacuum_vacuum_threshold = 1000000)")
    with psycopg.connect(dsn) as writer:
        fill(writer, 1000)
        writer.execute(
            "do $$ begin for n in 1..101 loop update bgjob_job set next_run_at = now(); "
            "end loop; end $$"
        )
        writer.execute("delete from bgjob_job")
    assert eventually(lambda: ills(doctor(dsn, "tables", table_dead_rows=10**9)))
    finding = only(doctor(dsn, "tables", table_dead_rows=10**9))
    assert finding.severity == "note"
    assert "of 101,000 updates were heap-only" in finding.text


def test_a_bloated_index_is_a_warning_until_it_is_rebuilt(
    dsn: str, conn: psycopg.Connection
) -> None:
    live = "select n_live_tup from pg_stat_user_tables where relname = 'bgjob_job'"
    with psycopg.connect(dsn) as writer:
        fill(writer, 20_000)
    # What a session wrote is counted when it has ended.
    assert eventually(lambda: row(conn, live) == (20_000,))
    conn.execute("vacuum analyze bgjob_job")
    assert ills(doctor(dsn, "indexes", index_bytes=100_000)) == []
    with psycopg.connect(dsn) as writer:
        writer.execute("delete from bgjob_job where id > lpad('1000', 36, '0')")
    assert eventually(lambda: row(conn, live) == (1000,))
    conn.execute("vacuum analyze bgjob_job")
    found = ills(doctor(dsn, "indexes", index_bytes=100_000))
    assert {finding.severity for finding in found} == {"warn"}
    assert {finding.facts["name"] for finding in found} == {"bgjob_job_pkey", "bgjob_job_due"}
    assert all(finding.text.endswith(" for 1,000 entries") for finding in found)
    for finding in found:
        apply(conn, finding.remedy)
    assert ills(doctor(dsn, "indexes", index_bytes=100_000)) == []


def test_an_index_whose_build_failed_is_bad_until_it_is_gone(
    dsn: str, conn: psycopg.Connection
) -> None:
    fill(conn, 2)
    with pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute('create unique index concurrently "Mine" on bgjob_job (queue)')
    finding = only(doctor(dsn, "indexes"))
    assert finding.severity == "bad"
    assert finding.text.startswith('index "Mine" of table bgjob_job is invalid')
    apply(conn, finding.remedy.rpartition(": ")[2])
    assert ills(doctor(dsn, "indexes")) == []


# -- the queues ------------------------------------------------------------------------------


def write(conn: psycopg.Connection, id: str, queue: str = "q", **columns: str) -> None:
    """Write a job, with columns as SQL."""
    values = {"id": f"'{id}'", "type": "'t'"} | columns
    conn.execute(
        cast(
            Any,
            f"insert into bgjob_job (queue, {', '.join(values)}) "
            f"values (%s, {', '.join(values.values()).replace('%', '%%')})",
        ),
        [queue],
    )


def claimed(ago: str) -> dict[str, str]:
    return {"token": "1", "attempt": "1", "lease_until": f"now() - interval '{ago}'"}


def test_leases_that_have_ended_are_told_and_after_a_minute_a_warning(
    dsn: str, conn: psycopg.Connection
) -> None:
    write(conn, "held", **claimed("-1 h"))
    [finding] = doctor(dsn, "leases")
    assert (finding.severity, finding.facts) == ("ok", {"held": 1})
    write(conn, "a", **claimed("50 s"))
    assert only(doctor(dsn, "leases")).severity == "note"
    write(conn, "b", **claimed("2 h"))
    finding = only(doctor(dsn, "leases"))
    assert finding.severity == "warn"
    assert finding.text.startswith("queue 'q': 2 jobs of workers that died wait for a worker")
    assert "the first lease ended 2 h" in finding.text
    assert finding.remedy == "start a worker: bgjob worker MODULE:NAME --queue q"
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("other", "t"))
        ran = threading.Semaphore(0)
        with Worker(client, "q", Mux().register("t", lambda _: ran.release())):
            for _ in range(2):
                assert ran.acquire(timeout=PATIENCE)
    assert ills(doctor(dsn, "leases")) == []


def test_suspects_are_told(dsn: str, conn: psycopg.Connection) -> None:
    write(conn, "once", deaths="1")
    assert ills(doctor(dsn, "leases")) == []
    write(conn, "twice", "o'clock", deaths="2")
    finding = only(doctor(dsn, "leases"))
    assert finding.severity == "note"
    assert "two workers or more died with 1 job;" in finding.text
    assert [id for id, *_ in rows(conn, cast(Any, finding.remedy))] == ["twice"]


def test_a_lease_without_bound_is_shown(dsn: str, conn: psycopg.Connection) -> None:
    write(conn, "a", token="1", lease_until="'-infinity'")
    write(conn, "b", token="1", lease_until="'infinity'")
    assert only(doctor(dsn, "leases")).severity == "warn"


def test_a_table_that_is_too_large_is_read_in_part_and_this_is_told(
    conn: psycopg.Connection,
) -> None:
    fill(conn, 200)
    write(conn, "last", **claimed("1 h"))
    statement = backlog.leases(2)
    held = statement.parse(conn.execute(cast(Any, statement.text), statement.params).fetchall())
    assert held.pages > 2
    assert held.queues == []
    finding = only(queues.leases(held, LIMITS, pages=2))
    assert "of which only the first 2 were read" in finding.text
    assert rows(conn, cast(Any, finding.remedy.partition(": ")[2]))[0][:2] == ("q", 1)


def register(conn: psycopg.Connection, queue: str, **columns: str) -> int:
    """Write a worker's row, with columns as SQL."""
    values = {
        **{"host": "'web-1'", "pid": "4711", "program": "'shop'", "version": "'1.0'"},
        **{"queues": f"array['{queue}']", "slots": "'{4}'", "running": "'{4}'", "types": "'{t}'"},
        **{"lease": "30", "every": "10"},
    } | columns
    statement = f"""
        insert into bgjob_worker ({", ".join(values)}) values ({", ".join(values.values())})
        returning number
    """
    [[number]] = conn.execute(cast(Any, statement)).fetchall()
    return int(number)


def test_jobs_that_are_due_for_long_are_a_warning_and_bad_with_free_slots(
    dsn: str, conn: psycopg.Connection
) -> None:
    write(conn, "a", next_run_at="now() - interval '4 min'")
    [finding] = doctor(dsn, "due")
    assert finding.severity == "ok"
    assert finding.text.startswith("the oldest due job waits 4 min")
    write(conn, "b", "a b", next_run_at="now() - interval '10 min'")
    finding = only(doctor(dsn, "due"))
    assert finding.severity == "warn"
    assert finding.text.startswith("queue 'a b': its oldest due job has waited for 10 min")
    assert finding.remedy == "start a worker: bgjob worker MODULE:NAME --queue 'a b'"
    write(conn, "c", "a b", priority="5", next_run_at="now() - interval '2 h'")
    register(conn, "a b")
    finding = only(doctor(dsn, "due"))
    assert finding.severity == "warn"
    assert finding.text.endswith("; 0 of the 4 slots of its workers are free")
    assert finding.remedy.startswith("start more workers")
    register(conn, "a b", running="'{1}'")
    finding = only(doctor(dsn, "due"))
    assert finding.severity == "bad"
    assert finding.text.endswith("; 3 of the 8 slots of its workers are free")
    assert "restart" in finding.remedy


def test_due_jobs_that_a_limit_holds_up_are_no_reason_to_restart_a_worker(
    dsn: str, conn: psycopg.Connection
) -> None:
    write(conn, "a", limited="true", waits="true", next_run_at="now() - interval '2 h'")
    register(conn, "q", running="'{1}'")
    finding = only(doctor(dsn, "due"))
    assert finding.severity == "warn"
    assert finding.text.startswith("queue 'q': its oldest due job has waited for 2 h")
    assert finding.text.endswith("; it waits for a limit of its queue or its type")
    assert finding.remedy.startswith("bgjob limit list")
    write(conn, "b", next_run_at="now() - interval '1 h'")
    assert only(doctor(dsn, "due")).severity == "bad"
    with Client(dsn) as client:
        client.limits.set("queue", "q", Limit(1))
    finding = only(doctor(dsn, "due"))
    assert (finding.severity, finding.text[-8:]) == ("warn", "its type")


def test_a_queue_with_due_jobs_and_no_worker_is_bad(dsn: str, conn: psycopg.Connection) -> None:
    write(conn, "a", next_run_at="now() - interval '50 s'")
    assert ills(doctor(dsn, "workers")) == []
    write(conn, "b", next_run_at="now() - interval '70 s'")
    finding = only(doctor(dsn, "workers"))
    assert finding.severity == "bad"
    assert finding.text.startswith("queue 'q' has due jobs, the oldest for 1 min 10 s, and no w")
    assert finding.remedy == "start a worker: bgjob worker MODULE:NAME --queue q"
    mux = Mux().register("t", print)
    with Client(dsn) as client:
        # Another queue's worker does not help; nor does one that no session or row shows.
        with Worker(client, "elsewhere", mux):
            assert only(doctor(dsn, "workers")).severity == "bad"
        conn.execute("delete from bgjob_worker")
        client.pause("q")
        assert ills(doctor(dsn, "workers")) == []
        with Worker(client, "q", mux):
            assert eventually(lambda: ills(doctor(dsn, "workers")) == [])
            client.resume("q")
            assert ills(doctor(dsn, "workers")) == []


def test_a_queue_is_not_called_unserved_for_sure_while_workers_are_not_registered(
    dsn: str, conn: psycopg.Connection
) -> None:
    write(conn, "a", next_run_at="now() - interval '2 h'")
    with Client(dsn) as client, Worker(client, "elsewhere", Mux().register("t", print)):
        assert eventually(lambda: rows(conn, "delete from bgjob_worker returning 1"))
        finding = only(doctor(dsn, "workers"))
    assert finding.severity == "warn"
    assert finding.text.endswith("and no worker in bgjob_worker, which misses some")


def test_a_worker_that_was_killed_is_told_for_an_hour(dsn: str, conn: psycopg.Connection) -> None:
    program = (
        "import sys; from bgjob import Client, Mux, Worker\n"
        "Worker(Client(sys.argv[1]), 'q', Mux().register('t', print)).run()\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, dsn]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as worker:
        assert eventually(lambda: rows(conn, "select from bgjob_worker"))
        assert ills(doctor(dsn, "workers")) == []
        worker.kill()
    # As if so much time had passed since its last beat.
    conn.execute("update bgjob_worker set seen_at = seen_at - interval '4 min'")
    finding = only(doctor(dsn, "workers"))
    assert finding.severity == "note"
    assert finding.text.startswith("worker ")
    assert "has not been seen for 4 min" in finding.text
    assert f"look at process {worker.pid} on " in finding.remedy
    conn.execute("update bgjob_worker set seen_at = seen_at - interval '1 h'")
    assert ills(doctor(dsn, "workers")) == []


def test_a_worker_that_ended_on_its_own_is_a_warning(dsn: str, conn: psycopg.Connection) -> None:
    number = register(conn, "q", state="'failed'", note="'SchemaError: no table'")
    finding = only(doctor(dsn, "workers"))
    assert finding.severity == "warn"
    assert finding.text.startswith(f"worker {number} (web-1, pid 4711, shop) ended on its own ")
    assert finding.text.endswith(": SchemaError: no table")
    register(conn, "q", state="'ended'")
    assert len(ills(doctor(dsn, "workers"))) == 1


def test_several_releases_at_once_are_told(dsn: str, conn: psycopg.Connection) -> None:
    register(conn, "q", release="'2'")
    register(conn, "q", release="'2'")
    assert doctor(dsn, "workers")[0].text == "2 workers at work"
    register(conn, "q", version="'0.9'")
    register(conn, "q", release="'0'", state="'ended'")
    finding = only(doctor(dsn, "workers"))
    assert finding.severity == "note"
    assert finding.text == (
        "several releases at once: 2 of 2 (bgjob 1.0), 1 of no release (bgjob 0.9)"
    )


def test_jobs_that_run_wait_for_a_key_or_are_in_a_paused_queue_are_not_late(
    dsn: str, conn: psycopg.Connection
) -> None:
    long_ago = {"next_run_at": "now() - interval '1 d'"}
    write(conn, "runs", **claimed("-1 h"), **long_ago)
    write(conn, "waits", waits="true", exclusive="'k'", **long_ago)
    write(conn, "paused", "p", **long_ago)
    conn.execute("insert into bgjob_pause values ('p', 'infinity')")
    assert ills(doctor(dsn, "due")) == []
    write(conn, "freed", **claimed("1 s"), **long_ago)
    assert only(doctor(dsn, "due")).facts["queue"] == "q"


def test_due_times_of_all_times_are_shown(dsn: str, conn: psycopg.Connection) -> None:
    write(conn, "a", next_run_at="'-infinity'")
    write(conn, "b", next_run_at="'infinity'")
    assert only(doctor(dsn, "due")).severity == "warn"


def test_of_many_queues_a_hundred_are_listed(dsn: str, conn: psycopg.Connection) -> None:
    for n in range(103):
        write(conn, f"{n}", f"q{n}", next_run_at="now() - interval '10 min'")
    found = ills(doctor(dsn, "due"))
    assert len(found) == 101
    assert (found[-1].severity, found[-1].text) == ("note", "3 more queues with due jobs")


def test_a_pause_without_an_end_is_a_warning_once_jobs_are_due(
    dsn: str, conn: psycopg.Connection
) -> None:
    with Client(dsn) as client:
        client.pause("q")
        client.pause("r", datetime.now(UTC) + timedelta(hours=1))
        assert [finding.severity for finding in doctor(dsn, "pauses")] == ["note", "note"]
        client.enqueue(EnqueueRequest("r", "t"))
        client.enqueue(EnqueueRequest("q", "t"))
        found = doctor(dsn, "pauses")
        assert [finding.severity for finding in found] == ["warn", "note"]
        assert found[0].text.startswith("queue 'q' is paused until it is resumed; its oldest due")
        assert found[0].remedy == "bgjob resume q"
        assert cli.main([*found[0].remedy.split()[1:], "--dsn", dsn]) == 0
    assert [finding.severity for finding in doctor(dsn, "pauses")] == ["note"]


def test_a_schedule_that_no_worker_runs_is_a_warning(dsn: str, conn: psycopg.Connection) -> None:
    def schedule(name: str, next_run_at: str, *, paused: bool = False) -> None:
        conn.execute(
            cast(
                Any,
                "insert into bgjob_schedule (name, spec, queue, type, priority, next_run_at, "
                f"paused) values (%s, 'every 0:05:00', 'q', 't', 0, {next_run_at}, {paused})",
            ),
            [name],
        )

    schedule("on time", "now() - interval '30 s'")
    schedule("paused", "now() - interval '1 d'", paused=True)
    schedule("never", "'infinity'")
    schedule("not looked at", "null")
    assert ills(doctor(dsn, "schedules")) == []
    schedule("re fresh", "now() - interval '21 min'")
    finding = only(doctor(dsn, "schedules"))
    assert finding.severity == "warn"
    assert finding.text.startswith("schedule 're fresh' (every 0:05:00) was to run 21 min")
    assert finding.remedy.endswith("bgjob schedules remove 're fresh'")
    schedule("ever", "'-infinity'")
    assert len(ills(doctor(dsn, "schedules"))) == 2


def die(conn: psycopg.Connection, jobs: int, ago: str = "0", type: str = "t") -> None:
    conn.execute(
        cast(
            Any,
            "insert into bgjob_dead_job (job_id, queue, type, attempt, priority, next_run_at, "
            "job_created_at, job_updated_at, moved_at) select n, 'q', %s, 1, 0, now(), now(), "
            f"now(), now() - interval '{ago}' from generate_series(1, %s::int) n",
        ),
        [type, jobs],
    )


def test_many_jobs_that_died_within_the_hour_are_a_warning(
    dsn: str, conn: psycopg.Connection
) -> None:
    die(conn, 300, "61 min")
    die(conn, 100)
    [finding] = doctor(dsn, "dead")
    assert (finding.severity, finding.text) == ("ok", "100 jobs died within the last hour")
    die(conn, 20, type="u")
    finding = only(doctor(dsn, "dead"))
    assert finding.text == (
        "120 jobs died within the last hour; most, 100, of type 't' in queue 'q'"
    )
    assert cli.main([*finding.remedy.split()[1:], "--dsn", dsn]) == 0
    die(conn, backlog.MOST_DEAD)
    assert only(doctor(dsn, "dead")).text.startswith("10,000 jobs or more died")


def test_jobs_without_a_handler_are_told_with_the_command_that_brings_them_back(
    dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "newsletter", id="a"))
        client.do("q", Mux().register("other", print))
        finding = only(doctor(dsn, "dead"))
        assert finding.severity == "warn"
        assert "1 job of type 'newsletter' died within the last hour" in finding.text
        command = finding.remedy.partition("then: bgjob ")[2].split()
        assert cli.main([*command, "--dsn", dsn]) == 0
        assert "newsletter" in capsys.readouterr().out
        [group] = client.dlq.groups()
        assert cli.main(["triage", group.fingerprint, "--rest", "--dsn", dsn]) == 0
        assert client.stats()[0].due == 1


# -- rules without a database ----------------------------------------------------------------


def holder(**facts: Any) -> Holder:
    values: dict[str, Any] = {"kind": "session", "name": "7", "role": None, "application": ""}
    values |= {"address": None}
    values |= {"database": None, "state": None, "transactions": 10_001, "seconds": None}
    values |= {"query": None, "may_end": None, "follows": False}
    return Holder(**values | facts)


def test_a_holder_is_old_by_its_time_or_by_its_transactions() -> None:
    def severities(*holders: Holder, dead: int = 0) -> list[str]:
        return [finding.severity for finding in sessions.horizon(holders, dead, LIMITS)]

    assert severities() == ["ok"]
    assert severities(holder(transactions=10_000, seconds=60.0)) == ["ok"]
    assert severities(holder(), holder(transactions=0, seconds=60.1)) == ["warn", "warn"]
    assert severities(holder(), dead=100_000) == ["warn"]
    assert severities(holder(), dead=100_001) == ["bad"]


def test_a_query_of_several_lines_is_one_line() -> None:
    [finding] = sessions.horizon([holder(query="select\n\t1")], 0, LIMITS)
    assert finding.text.endswith(": select 1")


def test_an_index_of_which_nothing_is_known_is_not_called_bloated() -> None:
    index = storage.Index("bgjob_job_due", "bgjob_job", 10**9, None, True, "x where not waits")
    assert ills(tables.indexes([index], [], LIMITS)) == []
    assert ills(tables.indexes([index._replace(entries=0)], [], LIMITS))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0 s"),
        (7.94, "7.9 s"),
        (60, "1 min"),
        (620, "10 min 20 s"),
        (11_580, "3 h 13 min"),
        (86_400, "1 d"),
        (360_000_000, "4,166 d 16 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert words.lasting(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12 bytes"), (8192, "8.2 kB"), (635_400_000, "635 MB")]
)
def test_sizes_have_a_unit(number: int, text: str) -> None:
    assert words.size(number) == text


@pytest.mark.parametrize("text", ["plain", "it's", "back\\slash", "\\'; drop table x; --"])
def test_a_quoted_text_is_the_text(conn: psycopg.Connection, text: str) -> None:
    assert row(conn, cast(Any, f"select {words.literal(text)}".replace("%", "%%"))) == (text,)


def test_a_quoted_name_is_the_name(conn: psycopg.Connection) -> None:
    assert words.identifier("bgjob_job") == "bgjob_job"
    for name in ('say "x"', "Mine", "1st"):
        found = conn.execute(cast(Any, f"select 1 as {words.identifier(name)}")).description
        assert found is not None
        assert found[0].name == name


# -- the command -----------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("BGJOB_DSN", dsn)

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["doctor", *args])
        return status, *capsys.readouterr()

    return run


def test_the_command_prints_a_line_for_each_finding_and_one_for_its_remedy(
    run: Run, conn: psycopg.Connection
) -> None:
    status, told, errors = run()
    assert (status, errors) == (0, "")
    assert [line.split()[0] for line in told.splitlines()] == ["ok"] * len(told.splitlines())
    assert [line.split()[1] for line in told.splitlines()][:3] == ["server", "clock", "pooler"]
    assert run("--quiet") == (0, "", "")
    conn.execute("alter table bgjob_job set (fillfactor = 90)")
    status, told, _ = run("--quiet")
    assert status == 0
    assert [line.split()[:2] for line in told.splitlines()] == [
        ["note", "schema"],
        ["do", "schema"],
    ]
    write(conn, "a", **claimed("1 h"))
    assert run("--check", "leases", "--check", "pauses")[0] == 3
    conn.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    status, told, _ = run("--quiet")
    assert status == 4
    assert "\nBAD   tables       bgjob_job: autovacuum is switched off for this table\n" in told
    assert "\ndo    tables       alter table bgjob_job reset (autovacuum_enabled)\n" in told


def test_the_command_prints_json(run: Run, conn: psycopg.Connection) -> None:
    write(conn, "a", "q\x1b[31m", **claimed("1 h"))
    status, told, _ = run("--json", "--quiet", "--check", "leases")
    answer = json.loads(told)
    assert (status, answer["status"]) == (3, 3)
    [finding] = answer["findings"]
    assert (finding["check"], finding["severity"]) == ("leases", "warn")
    assert finding["facts"]["queue"] == "q\x1b[31m"
    assert {"text", "remedy"} < set(finding)
    assert len(json.loads(run("--json")[1])["findings"]) >= len(CHECKS)


def test_the_command_prints_no_control_characters(run: Run, conn: psycopg.Connection) -> None:
    write(conn, "a", "q\x1b[31m\u202e\n", **claimed("1 h"))
    _, told, _ = run("--check", "leases")
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert len(told.splitlines()) == 2


def test_the_command_reports_a_database_without_tables(
    empty_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--dsn", empty_dsn]) == 4
    assert "BAD   schema" in capsys.readouterr().out


def test_the_command_fails_where_there_is_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--dsn", "postgresql://somebody:s3cret@127.0.0.1:1/db"]) == 1
    told = capsys.readouterr().err
    assert "127.0.0.1" in told
    assert "s3cret" not in told


def test_the_help_names_the_checks_and_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["doctor", "--help"])
    assert exit.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for text in (*CHECKS, "3 look at it", "4 act now", "130 Ctrl-C"):
        assert text in told
    with pytest.raises(SystemExit) as exit:
        cli.main(["doctor", "--check", "none"])
    assert exit.value.code == 2
