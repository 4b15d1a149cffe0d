"""Settings that a session inherits of its database, role or program change nothing."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg
import pytest
from faults.pooler import Pooler
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.datetime import TimestamptzBinaryLoader, TimestamptzLoader
from psycopg_pool import ConnectionPool
from support.waiting import eventually
from support.workers import Launcher, Recorder

from bgjob import (
    Client,
    DlqRetention,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    Retry,
    Schedule,
    Schedules,
    Worker,
)
from bgjob._postgres.connection import options

EVERY_BYTE = bytes(range(256)) + b"\\'\\\\"
NAMES = ["a", "NULL", "null", "\\", 'quo"te', "it's", "{}", "a,b"]

STRANGE = {
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kathmandu",
    "standard_conforming_strings": "off",
    "array_nulls": "off",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "transform_null_equals": "on",
    "client_encoding": "LATIN1",
    "default_transaction_isolation": "repeatable read",
    "default_transaction_deferrable": "on",
    "row_security": "off",
    "synchronous_commit": "off",
    "plan_cache_mode": "force_generic_plan",
    "enable_indexscan": "off",
}
STRANGER = {
    **STRANGE,
    "datestyle": "German",
    "intervalstyle": "iso_8601",
    "default_transaction_isolation": "serializable",
    "client_encoding": "EUC_JP",
    "plan_cache_mode": "force_custom_plan",
}
STRANGEST = {"datestyle": "Postgres, MDY", "intervalstyle": "postgres_verbose"}
EVERY_STRANGENESS = pytest.mark.parametrize("settings", [STRANGE, STRANGER, STRANGEST])


def inherit(dsn: str, settings: dict[str, str]) -> None:
    """Make each later session of the database begin with these settings."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        for name, value in settings.items():
            conn.execute(
                sql.SQL("alter database {} set {} = {}").format(
                    sql.Identifier(conn.info.dbname), sql.Identifier(name), value
                )
            )


def fill(client: Client, conn: psycopg.Connection[Any] | None = None) -> set[str]:
    """Enqueue in each way, and return the ids of the jobs, which are due within a second."""
    ids = []
    for n, name in enumerate(NAMES):
        request = EnqueueRequest(name, "t", EVERY_BYTE, id=f"one-{n}", exclusive=name)
        ids.append(client.enqueue(request, conn=conn))
    soon = datetime.now(UTC) + timedelta(seconds=0.1)
    ids.append(client.enqueue(EnqueueRequest("a", "t", id="timed", run_at=soon), conn=conn))
    ids.append(client.enqueue(EnqueueRequest("a", "t", id="late", delay=0.125), conn=conn))
    ids.append(client.enqueue(EnqueueRequest("a", "t", id="bare"), conn=conn))
    mixed = [
        EnqueueRequest("a", "t", None, id="none"),
        EnqueueRequest("a", "t", EVERY_BYTE, id="bytes", exclusive="NULL"),
        EnqueueRequest("a", "t", b"NULL", id="word", run_at=soon),
    ]
    alike = [
        EnqueueRequest("a", "t", None, id="delayed", delay=0.1),
        EnqueueRequest("a", "t", None, id="plain"),
    ]
    for requests in (mixed, alike):
        written = client.bulk_enqueue(requests, on_conflict="skip", conn=conn)
        ids += [id_ for id_ in written if id_]
    copied = [EnqueueRequest("a", "t", EVERY_BYTE, id=f"copied-{n:04}") for n in range(600)]
    client.bulk_enqueue(copied, conn=conn)
    return {*ids, *(request.id for request in copied)}


def is_intact(client: Client) -> None:
    """Fail if a payload or a key has changed."""
    with client._connection(None) as conn:  # noqa: SLF001
        found = dict(
            conn.execute("select id, coalesce(exclusive, '-none-') from bgjob_job").fetchall()
        )
        payloads = dict(conn.execute("select id, arg from bgjob_job", binary=True).fetchall())
    assert [found[f"one-{n}"] for n in range(len(NAMES))] == NAMES
    keys = [found[id_] for id_ in ("none", "bytes", "word", "delayed", "plain", "timed")]
    assert keys == ["-none-", "NULL", *["-none-"] * 4]
    nothing = {"none", "delayed", "plain", "timed", "late", "bare"}
    assert {id_ for id_, arg in payloads.items() if arg is None} == nothing
    assert payloads["word"] == b"NULL"
    assert {arg for id_, arg in payloads.items() if id_ not in nothing | {"word"}} == {EVERY_BYTE}


@EVERY_STRANGENESS
def test_a_client_writes_and_reads_the_same_regardless_of_inherited_settings(
    dsn: str, settings: dict[str, str]
) -> None:
    inherit(dsn, settings)
    with Client(dsn) as client:
        assert len(fill(client)) == 616
        is_intact(client)
        look_around(client)


@EVERY_STRANGENESS
@pytest.mark.parametrize("threshold", [0, 5, None])
def test_a_callers_session_keeps_its_settings_and_the_jobs_are_the_same(
    dsn: str, settings: dict[str, str], threshold: int | None
) -> None:
    inherit(dsn, settings)
    kwargs = {"prepare_threshold": threshold}
    with (
        ConnectionPool(dsn, kwargs=kwargs, min_size=1, max_size=2) as pool,
        Client(pool) as client,
        psycopg.connect(dsn, prepare_threshold=threshold) as conn,
    ):
        assert len(fill(client, conn)) == 616
        conn.commit()
        is_intact(Client(dsn))
        look_around(client)
        [[found]] = conn.execute("select current_setting('datestyle')").fetchall()
        assert found.startswith(settings["datestyle"].split(",")[0])


def look_around(client: Client) -> None:
    """Use the other methods of a client."""
    until = datetime.now(UTC) + timedelta(hours=1)
    client.pause("a", until)
    client.pause("NULL")
    assert client.paused() == {"a": until, "NULL": None}
    assert client.resume("a")
    assert client.resume("NULL")
    assert {(s.queue, s.type) for s in client.stats()} == {(name, "t") for name in NAMES}
    mux = Mux().register("t", lambda _: MoveToDlq("Müßiggang"))
    client.do("NULL", mux)
    [dead] = client.dlq.list(moved_after=datetime.now(UTC) - timedelta(hours=1))
    assert (dead.id, dead.arg, dead.last_error) == ("one-1", EVERY_BYTE, "Müßiggang")
    assert abs(dead.moved_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert client.dlq.requeue(ids="one-1") == ["one-1"]
    client.do("NULL", Mux().register("t", lambda _: Retry(delay=0.125, error="ärgerlich")))
    client.do("\\", Mux().register("t", lambda _: None))


@EVERY_STRANGENESS
def test_a_worker_works_the_same_regardless_of_inherited_settings(
    launcher: Launcher, dsn: str, settings: dict[str, str]
) -> None:
    inherit(dsn, settings)
    done: dict[str, bytes | None] = {}
    fails = {"timed", "one-2", "copied-0001", "copied-0002"}

    def handle(job: Job) -> None:
        if job.id in fails and job.attempt == 1:
            raise ValueError("Müßiggang")
        done[job.id] = job.arg

    mux = Mux().register("t", handle, max_attempts=3)
    mux.register("fatal", lambda _: MoveToDlq("Müßiggang"))
    recorder = Recorder()
    schedules = Schedules(
        [
            Schedule("s", request=EnqueueRequest("a", "t", EVERY_BYTE), every=1),
            Schedule("k", request=EnqueueRequest("a", "t", exclusive="NULL"), after_completion=1),
        ],
        poll_interval=0.05,
    )
    with Client(dsn) as client:
        ids = fill(client)
        client.enqueue(EnqueueRequest("a", "fatal", EVERY_BYTE, id="f"))
        launcher.start(
            mux,
            dict.fromkeys(NAMES, 2),
            observer=recorder,
            poll_interval=0.1,
            lease=1,
            services=[schedules, DlqRetention(3600)],
        )
        assert eventually(
            lambda: ids <= done.keys() and any(key.startswith("schedule:k:") for key in done)
        ), ids - done.keys()
        assert eventually(lambda: any(key.startswith("schedule:s:") for key in done))
        assert {arg for key, arg in done.items() if key.startswith("schedule:s:")} == {EVERY_BYTE}
        assert done["bytes"] == EVERY_BYTE
        assert done["word"] == b"NULL"
        assert {s.name: s.last_run_at for s in client.schedules.list()}["s"] is not None
        [dead] = client.dlq.list()
        assert (dead.id, dead.arg, dead.last_error) == ("f", EVERY_BYTE, "Müßiggang")
    assert not recorder.of("error")


# -- what a program registers for its own SQL ---------------------------------------------


class Loud(TimestamptzLoader):
    """A loader of a program with a time class of its own."""

    def load(self, data: Any) -> Any:
        return f"time {bytes(data)!r}"


class LoudBinary(TimestamptzBinaryLoader):
    def load(self, data: Any) -> Any:
        return "a time"


class LoudText(psycopg.adapt.Loader):
    def load(self, data: Any) -> Any:
        return ["text", bytes(data)]


class LoudBinaryText(LoudText):
    format = psycopg.pq.Format.BINARY


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registers such loaders for all connections, and takes them back."""
    with contextlib.ExitStack() as stack:
        adapters = psycopg.adapters
        for oid, loaders in (
            ("timestamptz", (Loud, LoudBinary)),
            ("text", (LoudText, LoudBinaryText)),
            ("varchar", (LoudText, LoudBinaryText)),
        ):
            for loader in loaders:
                number = adapters.types[oid].oid
                before = adapters.get_loader(number, loader.format)
                assert before is not None
                stack.callback(adapters.register_loader, number, before)
                adapters.register_loader(oid, loader)
        yield


def test_adapters_that_a_program_registers_do_not_change_the_librarys_values(
    registered: None, launcher: Launcher, dsn: str
) -> None:
    seen: list[Any] = []

    def handle(job: Job, conn: psycopg.Connection[Any]) -> None:
        seen.append(job)
        seen.extend(conn.execute("select now(), 'x'::text").fetchall())

    mux = Mux().register("t", handle, transactional=True)
    recorder = Recorder()
    schedules = Schedules([Schedule("s", request=EnqueueRequest("q", "other"), every=1)])
    launcher.start(mux, observer=recorder, services=[schedules])
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="a", delay=0.05))
        assert eventually(lambda: len(seen) >= 2)
        job, (time, text) = seen
        assert abs(job.next_run_at - datetime.now(UTC)) < timedelta(minutes=1)
        assert (job.id, time[:4], text) == ("a", "time", ["text", b"x"])  # a handler keeps its own
        [status] = client.schedules.list()
        assert (status.name, status.queue) == ("s", "q")
    assert not recorder.of("error")


def test_a_connection_string_may_ask_for_any_encoding(launcher: Launcher, dsn: str) -> None:
    with Client(make_conninfo(dsn, client_encoding="LATIN1")) as client:
        client.enqueue(EnqueueRequest("q", "t", id="ä✓"))
        client.do("q", Mux().register("t", lambda _: MoveToDlq("✓")))
        [dead] = client.dlq.list()
        assert (dead.id, dead.last_error) == ("ä✓", "✓")


def test_keepalive_settings_of_the_user_override_those_of_the_library() -> None:
    ours = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    assert options(("host=h", {})).items() >= {**ours, "tcp_user_timeout": 60_000}.items()
    assert options(("host=h keepalives_idle=7", {}))["keepalives_idle"] == "7"
    assert options(("host=h", {"tcp_user_timeout": 0}))["tcp_user_timeout"] == 0


# -- what a worker's session has instead ----------------------------------------------------

NOTE = """
    create table noted (name text, value text);
    create function note() returns trigger language plpgsql as $$ begin
        insert into noted select name, setting || coalesce(unit, '') from pg_settings
        where name = any (string_to_array('{names}', ' '))
            and current_query() like '%update bgjob_job set%token%';
        return null;
    end $$;
    create trigger note after update on bgjob_job for each statement execute function note();
"""


@pytest.mark.parametrize("way", ["direct", "pooler"])
def test_a_worker_claims_with_its_own_timeouts_and_plans_regardless_of_the_defaults(
    launcher: Launcher, dsn: str, conn: psycopg.Connection, way: str
) -> None:
    expected = {
        "statement_timeout": "10000ms",
        "lock_timeout": "100ms",
        "idle_in_transaction_session_timeout": "0ms",
        "transaction_isolation": "read committed",
        "enable_seqscan": "off",
        "enable_sort": "off",
        "enable_nestloop": "off",
        "jit": "off",
        "plan_cache_mode": "force_generic_plan",
    }
    if way == "direct":
        expected |= {"idle_session_timeout": "0ms"}
        if conn.info.server_version >= 17_00_00:
            expected |= {"transaction_timeout": "20000ms"}
    inherit(
        dsn,
        {
            "statement_timeout": "0",
            "lock_timeout": "0",
            "idle_in_transaction_session_timeout": "1h",
            "default_transaction_isolation": "serializable",
        },
    )
    conn.execute(cast(Any, NOTE.replace("{names}", " ".join(expected))))
    with Pooler(dsn) as pooler:
        source = pooler.dsn(dsn) if way == "pooler" else dsn
        done: list[str] = []
        mux = Mux().register("t", lambda job: done.append(job.id))
        worker = launcher.make(mux, dsn=source, poll_interval=0.05)
        launcher.run(worker.run())
        for id_ in "abc":
            launcher.enqueue(id_)
            assert eventually(lambda id_=id_: id_ in done)  # type: ignore[misc]
        assert launcher.shutdown(worker)
    found = conn.execute("select distinct name, value from noted").fetchall()
    assert sorted(found) == sorted(expected.items())


# -- row-level security ----------------------------------------------------------------------

TABLES = (
    "bgjob_job, bgjob_dead_job, bgjob_exclusive, bgjob_pause, bgjob_limit, bgjob_ration, "
    "bgjob_result, bgjob_worker"
)


@contextlib.contextmanager
def role(conn: psycopg.Connection[Any], dsn: str) -> Iterator[tuple[str, str]]:
    """A role with all privileges of a worker, and its DSN."""
    name = f"w_{conn.info.dbname}"
    conn.execute(cast(Any, f"create role {name} login; grant all on {TABLES} to {name}"))
    try:
        yield name, make_conninfo(dsn, user=name)
    finally:
        conn.execute(cast(Any, f"drop owned by {name}; drop role {name}"))


def test_row_level_security_that_may_hide_jobs_is_reported_with_the_remedy(
    launcher: Launcher, dsn: str, conn: psycopg.Connection
) -> None:
    def errors_of(source: str) -> list[str]:
        observer = Recorder()
        worker = launcher.make(Mux(), dsn=source, observer=observer)
        launcher.run(worker.run())
        assert eventually(lambda: bool(observer.of("empty")))
        assert launcher.shutdown(worker)
        return [str(error) for _, error in observer.of("error")]

    with role(conn, dsn) as (name, source):
        assert errors_of(source) == []
        conn.execute("alter table bgjob_job enable row level security")
        [text] = errors_of(source)
        assert f"hides rows of table bgjob_job from role '{name}'" in text
        assert errors_of(dsn) == []  # its owner sees all
        conn.execute("create policy part on bgjob_job using (queue = 'other')")
        assert len(errors_of(source)) == 1
        remedy = text.rpartition("as its owner: ")[2].split(", or: ")[0]
        conn.execute(cast(Any, remedy))
        assert errors_of(source) == []
        conn.execute("create policy less on bgjob_job as restrictive using (queue <> 'q')")
        assert len(errors_of(source)) == 1


# -- transactional handlers -------------------------------------------------------------------


@EVERY_STRANGENESS
@pytest.mark.parametrize("threshold", [0, 5, None])
def test_a_transactional_handler_is_settled_regardless_of_inherited_settings(
    dsn: str, conn: psycopg.Connection, settings: dict[str, str], threshold: int | None
) -> None:
    inherit(dsn, settings)
    conn.execute("create table effect (id text)")
    kwargs = {"prepare_threshold": threshold}

    def handle(job: Job, conn: psycopg.Connection[Any]) -> MoveToDlq | Retry | None:
        conn.execute("insert into effect values (%s)", [job.id])
        match job.json():
            case "retry" if job.attempt == 1:
                return Retry(delay=0.01, error="ärgerlich")
            case "dead_letter":
                return MoveToDlq("Müßiggang")
        return None

    mux = Mux().register("t", handle, transactional=True)
    # Not opened: a worker makes connections of its own, as the pool would.
    pool: ConnectionPool[Any] = ConnectionPool(dsn, kwargs=kwargs, open=False)
    recorder = Recorder()
    kinds = ["complete", "retry", "dead_letter"]
    with Client(dsn) as client:
        worker = Worker(Client(pool), "q", mux, observer=recorder, poll_interval=0.1)
        with worker:
            for n in range(8):
                for kind in kinds:
                    client.enqueue(EnqueueRequest("q", "t", kind, id=f"{kind}{n}"))
            assert eventually(
                lambda: not any(s.due + s.running + s.delayed for s in client.stats())
            )
        assert {dead.last_error for dead in client.dlq.list()} == {"Müßiggang"}
    found = conn.execute("select id from effect order by id").fetchall()
    assert found == sorted((f"{kind}{n}",) for kind in kinds for n in range(8))
    assert not recorder.of("error"), recorder.of("error")
