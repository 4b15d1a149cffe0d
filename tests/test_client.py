"""Clients of both colours write jobs, run single ones and manage dead jobs."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.errors import FeatureNotSupported, SyntaxError
from psycopg.rows import dict_row
from support.clients import HOSTILE, Blocking, Colour, dead_letter
from support.database import clock, count, row, rows
from support.databases import KEEPER
from support.jobs import requests
from support.waiting import NEVER, eventually

from bgjob import (
    AsyncClient,
    BgjobError,
    AsyncWorker,
    Client,
    ClientClosedError,
    Complete,
    DlqRetention,
    EmptyQueueError,
    EnqueueConflictError,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    LeaseLostError,
    MoveToDlq,
    Mux,
    RequestsRequiredError,
    Reschedule,
    Result,
    Retry,
    UnknownTypeError,
    Worker,
)
from bgjob._postgres.connection import AsyncConnection, Connection
from bgjob._sql import enqueues
from bgjob.schema import init_sql


def sessions(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    """The server processes of this database's other sessions."""
    return rows(
        conn,
        "select pid from pg_stat_activity where datname = current_database() "
        f"and pid <> pg_backend_pid() and application_name <> '{KEEPER}' "
        "and backend_type = 'client backend'",
    )


def waiting(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    return rows(
        conn,
        "select pid from pg_stat_activity where wait_event_type = 'Lock' "
        "and datname = current_database()",
    )


def both(*calls: Callable[[], Any], conn: psycopg.Connection, then: Callable[[], Any]) -> list[Any]:
    """Start calls, each when the one before waits for a lock or has ended; then do the last."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures: list[Future[Any]] = []
        for call in calls:
            futures.append(pool.submit(call))
            assert eventually(
                lambda: len(waiting(conn)) + sum(f.done() for f in futures) == len(futures)
            )
        then()
        return [future.result() for future in futures]


def returning(result: Any) -> Mux:
    return Mux().register("t", lambda _: result)


# -- enqueue ----------------------------------------------------------------------------


def test_an_enqueue_writes_a_row_and_returns_its_generated_id(
    client: Any, conn: psycopg.Connection
) -> None:
    before = clock(conn)
    id_ = client.enqueue(EnqueueRequest("mail", "welcome", {"n": 1}, priority=-3))
    assert row(
        conn,
        "select id, queue, type, arg, attempt, last_error, priority, token, lease_until "
        "from bgjob_job",
    ) == (id_, "mail", "welcome", b'{"n":1}', 0, None, -3, None, None)
    due, created, updated, now = row(
        conn, "select next_run_at, created_at, updated_at, clock_timestamp() from bgjob_job"
    )
    for written in (due, created, updated):
        assert before <= written <= now


def test_an_enqueue_keeps_the_id_it_is_given(client: Any, conn: psycopg.Connection) -> None:
    assert client.enqueue(EnqueueRequest("q", "t", id="mine")) == "mine"
    assert rows(conn, "select id from bgjob_job") == [("mine",)]


@pytest.mark.parametrize("arg", [None, b"", b"\0", bytes(range(256)), b"x" * 1_000_000])
def test_a_payload_is_stored_as_it_is(
    client: Any, conn: psycopg.Connection, arg: bytes | None
) -> None:
    client.enqueue(EnqueueRequest("q", "t", arg))
    client.bulk_enqueue([EnqueueRequest("q", "t", arg)])
    assert rows(conn, "select arg from bgjob_job") == [(arg,), (arg,)]


def test_an_id_that_a_live_job_has_is_refused(client: Any, conn: psycopg.Connection) -> None:
    client.enqueue(EnqueueRequest("q", "t", b"first", id="a"))
    with pytest.raises(JobAlreadyExistsError, match="'a'") as caught:
        client.enqueue(EnqueueRequest("q", "t", b"second", id="a"))
    assert caught.value.ids == ("a",)
    assert rows(conn, "select arg from bgjob_job") == [(b"first",)]


def test_an_id_is_free_again_once_its_job_is_done(client: Any) -> None:
    for _ in range(2):
        client.enqueue(EnqueueRequest("q", "t", id="a"))
        client.do("q", returning(Complete()))


@pytest.mark.both_colours
def test_enqueues_of_a_connection_are_the_same_once_their_statement_is_prepared(
    client: Any, conn: psycopg.Connection
) -> None:
    args = [None, b"", bytes(range(256)), {"é": "\U0001f600"}, b"x" * 100_000]
    given = [
        EnqueueRequest(f"q \U0001f600 {n}", "'%s \\t", arg, priority=n - 4)
        for n, arg in enumerate(args * 2)
    ]
    assert [client.enqueue(request) for request in given] == [request.id for request in given]
    assert client.target._pool._idle[-1].prepared is not None
    rows = conn.execute("select id, queue, type, arg, priority from bgjob_job order by priority")
    assert rows.fetchall() == [(r.id, r.queue, r.type, r.payload, r.priority) for r in given]
    with pytest.raises(JobAlreadyExistsError, match=given[0].id):
        client.enqueue(given[0])
    assert client.enqueue(given[0], on_conflict="skip") is None
    client.enqueue(EnqueueRequest("q", "t", delay=60))  # which is another statement
    conn.execute("alter table bgjob_job add constraint no_bad check (queue <> 'bad')")
    with pytest.raises(psycopg.errors.CheckViolation):
        client.enqueue(EnqueueRequest("bad", "t"))
    client.enqueue(EnqueueRequest("good", "t"))
    assert count(conn) == 12


def test_an_enqueue_joins_the_callers_transaction(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect()
    client.enqueue(EnqueueRequest("q", "t"), conn=caller)
    assert count(conn) == 0
    caller.rollback()
    assert count(conn) == 0
    client.enqueue(EnqueueRequest("q", "t", id="kept"), conn=caller)
    caller.commit()
    assert rows(conn, "select id from bgjob_job") == [("kept",)]


def test_a_bulk_enqueue_joins_the_callers_transaction(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect()
    caller.execute("create table order_ (id int)")
    client.bulk_enqueue(requests("a", "b"), conn=caller)
    assert count(conn) == 0
    caller.rollback()
    assert count(conn) == 0


def test_a_bulk_enqueue_that_comes_first_begins_the_callers_transaction(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect()
    client.bulk_enqueue(requests("a", "b"), conn=caller)
    assert count(conn) == 0
    caller.rollback()
    assert count(conn) == 0
    client.bulk_enqueue(requests("a", "b"), conn=caller)
    caller.commit()
    assert count(conn) == 2


def test_a_callers_autocommit_connection_commits_immediately(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect(autocommit=True, row_factory=dict_row)
    client.enqueue(EnqueueRequest("q", "t"), conn=caller)
    client.bulk_enqueue(requests("a", "b"), conn=caller)
    assert count(conn) == 3
    assert caller.autocommit is True


def test_a_taken_id_does_not_abort_the_callers_transaction(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect()
    client.enqueue(EnqueueRequest("q", "t", id="a"), conn=caller)
    with pytest.raises(JobAlreadyExistsError):
        client.enqueue(EnqueueRequest("q", "t", id="a"), conn=caller)
    with pytest.raises(JobAlreadyExistsError):
        client.bulk_enqueue(requests("b", "a"), conn=caller)
    client.enqueue(EnqueueRequest("q", "t", id="c"), conn=caller)
    caller.commit()
    assert rows(conn, "select id from bgjob_job order by id") == [("a",), ("c",)]


LEVELS = list(psycopg.IsolationLevel)


@pytest.mark.parametrize("level", LEVELS)
def test_an_enqueue_joins_a_transaction_of_any_isolation_level(
    colour: Colour, client: Any, conn: psycopg.Connection, level: psycopg.IsolationLevel
) -> None:
    many = [f"{n:03}" for n in range(600)]  # a COPY
    client.enqueue(EnqueueRequest("q", "t", id="taken"))
    caller = colour.connect()
    caller.execute(
        sql.SQL("set default_transaction_isolation = {}").format(
            level.name.lower().replace("_", " ")
        )
    )
    caller.commit()
    client.enqueue(EnqueueRequest("q", "t", id="a"), conn=caller)
    client.bulk_enqueue(requests("b", "c"), conn=caller)
    client.bulk_enqueue(requests(*many), conn=caller)
    with pytest.raises(JobAlreadyExistsError):
        client.enqueue(EnqueueRequest("q", "t", id="taken"), conn=caller)
    with pytest.raises(JobAlreadyExistsError):
        client.bulk_enqueue(requests(*many, "taken"), conn=caller)
    assert client.bulk_enqueue(requests("taken", "d"), conn=caller, on_conflict="skip") == [
        None,
        "d",
    ]
    assert count(conn) == 1
    caller.commit()
    assert count(conn) == 605


@pytest.mark.parametrize("bulk", [0, 1, 600])
@pytest.mark.parametrize("level", LEVELS)
def test_an_id_that_was_taken_since_the_callers_transaction_began_is_named_in_the_error(
    colour: Colour,
    client: Any,
    conn: psycopg.Connection,
    level: psycopg.IsolationLevel,
    bulk: int,
) -> None:
    def enqueue() -> None:
        if bulk:
            client.bulk_enqueue(requests(*(f"{n:03}" for n in range(bulk))), conn=caller)
        else:
            client.enqueue(EnqueueRequest("q", "t", id="000"), conn=caller)

    caller = colour.connect()
    caller.execute("begin isolation level " + level.name.lower().replace("_", " "))
    caller.execute("select count(*) from bgjob_job")
    colour.client().enqueue(EnqueueRequest("q", "t", id="000"))
    if level < psycopg.IsolationLevel.REPEATABLE_READ:
        with pytest.raises(JobAlreadyExistsError):
            enqueue()
        client.enqueue(EnqueueRequest("q", "t", id="a"), conn=caller)
        caller.commit()
        assert count(conn) == 2
        return
    with pytest.raises(EnqueueConflictError, match="'000'.* repeat the whole transaction") as told:
        enqueue()
    assert isinstance(told.value, psycopg.errors.SerializationFailure)
    assert told.value.ids[0] == "000"
    caller.rollback()
    with pytest.raises(JobAlreadyExistsError):
        enqueue()


@pytest.mark.parametrize("source", ["string", "pool"])
def test_a_clients_own_transactions_do_not_mind_the_databases_isolation_level(
    colour: Colour, client: Any, dsn: str, conn: psycopg.Connection, source: str
) -> None:
    dead_letter(client, *requests("dead"))
    database = sql.Identifier(conn.info.dbname)
    alter = "alter database {} set default_transaction_isolation = 'repeatable read'"
    conn.execute(sql.SQL(alter).format(database))
    client = colour.client(colour.pool() if source == "pool" else dsn)

    def taken(call: Callable[[], Any]) -> Callable[[], Any]:
        def called() -> Any:
            with pytest.raises(JobAlreadyExistsError):
                call()

        return called

    calls = [
        taken(lambda: client.enqueue(EnqueueRequest("q", "t", id="a"))),
        taken(lambda: client.bulk_enqueue(requests("a"))),
        taken(lambda: client.bulk_enqueue(r for r in requests("a"))),
        lambda: client.dlq.requeue("dead"),
    ]
    for call in calls:
        with psycopg.connect(dsn) as blocker:
            blocker.execute("delete from bgjob_job")
            blocker.commit()
            Client(dsn).enqueue(EnqueueRequest("q", "t", id="a"), conn=blocker)
            blocker.execute("delete from bgjob_dead_job")
            both(call, conn=conn, then=blocker.commit)
            if call is calls[-2]:
                dead_letter(Client(dsn), *requests("dead"))


def test_a_job_in_an_open_transaction_is_not_seen(colour: Colour, client: Any) -> None:
    caller = colour.connect()
    client.enqueue(EnqueueRequest("q", "t"), conn=caller)
    with pytest.raises(EmptyQueueError):
        client.do("q", returning(Complete()))
    caller.commit()
    assert client.do("q", returning(Complete())) == Complete()


@pytest.mark.parametrize("bulk", [False, True])
def test_a_delay_counts_from_the_enqueue_by_the_databases_clock(
    client: Any, conn: psycopg.Connection, bulk: bool
) -> None:
    request = EnqueueRequest("q", "t", delay=timedelta(minutes=5))
    before = clock(conn)
    client.bulk_enqueue([request]) if bulk else client.enqueue(request)
    [due] = row(conn, "select next_run_at from bgjob_job")
    assert before <= due - timedelta(minutes=5) <= clock(conn)
    with pytest.raises(EmptyQueueError):
        client.do("q", returning(Complete()))


@pytest.mark.parametrize("bulk", [False, True])
def test_run_at_is_kept_and_one_in_the_past_means_now(
    client: Any, conn: psycopg.Connection, bulk: bool
) -> None:
    future = datetime(2999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    past = datetime(1, 1, 2, tzinfo=UTC)
    both = [EnqueueRequest("q", "t", id=str(at.year), run_at=at) for at in (future, past)]
    before = clock(conn)
    client.bulk_enqueue(both) if bulk else [client.enqueue(request) for request in both]
    assert row(conn, "select next_run_at from bgjob_job where id = '2999'") == (future,)
    [due] = row(conn, "select next_run_at from bgjob_job where id = '1'")
    assert before <= due <= clock(conn)


# -- bulk enqueue -------------------------------------------------------------------------


few_and_many = pytest.mark.parametrize("size", [11, 1_100])
"""Many are written by COPY."""


@pytest.fixture(params=[5, 1], ids=["by_a_cursor", "prepared"])
def prepares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a few jobs as a connection does at first, and as it does after some enqueues."""
    monkeypatch.setattr("bgjob._sql.execute._FEW", request.param)


@pytest.mark.usefixtures("prepares")
@few_and_many
def test_a_bulk_enqueue_writes_every_setting_and_returns_the_ids_in_order(
    client: Any, conn: psycopg.Connection, size: int
) -> None:
    batch = [
        EnqueueRequest(f"q{n % 3}", f"t'{n} é", None if n % 2 else b"\0%d" % n, priority=n - 5)
        for n in range(size)
    ]
    assert client.bulk_enqueue(batch) == [request.id for request in batch]
    written = rows(
        conn, "select id, queue, type, arg, priority from bgjob_job order by next_run_at, id"
    )
    assert written == [(r.id, r.queue, r.type, r.payload, r.priority) for r in batch]


@pytest.mark.usefixtures("prepares")
@few_and_many
def test_a_bulk_enqueue_reads_no_due_time_before_its_transaction_has_a_number(
    client: Any, conn: psycopg.Connection, size: int
) -> None:
    # A worker assumes that a transaction with a later number wrote later due times, too.
    conn.execute(
        """
        create function has_number() returns trigger language plpgsql as $$ begin
            if pg_current_xact_id_if_assigned() is null then raise 'no number'; end if;
            return new;
        end $$;
        create trigger has_number before insert on bgjob_job
            for each row execute function has_number()
        """
    )
    client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(size)])
    assert count(conn) == size


def test_a_bulk_enqueue_needs_a_request(client: Any) -> None:
    with pytest.raises(RequestsRequiredError, match="at least one"):
        client.bulk_enqueue([])


@pytest.mark.usefixtures("prepares")
def test_a_bulk_enqueue_of_a_few_jobs_is_one_round_trip(
    colour: Colour, client: Any, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [EnqueueRequest("q", "t") for _ in range(6)]
    client.bulk_enqueue(batch[:2])  # it may connect, and prepare the statement
    connection: Any = AsyncConnection if colour.is_async else Connection
    wait, waits = connection.wait, []

    def counted(self: Any, *args: Any) -> Any:
        waits.append(self)
        return wait(self, *args)

    monkeypatch.setattr(connection, "wait", counted)
    others: dict[str, Any] = {"delay": 5, "headers": {"n": 1}, "exclusive": "k", "expires": 60}
    client.bulk_enqueue(batch[2:4])
    client.bulk_enqueue([batch[5], batch[4]])
    client.bulk_enqueue([EnqueueRequest("q", "t", **{name: others[name]}) for name in others])
    assert len(waits) == 3
    assert count(conn) == 10


@pytest.mark.usefixtures("prepares")
@pytest.mark.parametrize("headers", [{}, {"n": 1}])
def test_requests_that_are_enqueued_twice_in_bulk_are_refused_together(
    client: Any, conn: psycopg.Connection, headers: dict[str, int]
) -> None:
    batch = [EnqueueRequest("q", "t", headers=headers) for _ in range(4)]
    client.bulk_enqueue(batch[1:3])
    with pytest.raises(JobAlreadyExistsError) as caught:
        client.bulk_enqueue(batch)
    assert caught.value.ids == (batch[1].id, batch[2].id)
    with pytest.raises(JobAlreadyExistsError) as caught:
        client.bulk_enqueue([batch[3], batch[3]])
    assert caught.value.ids == (batch[3].id,)
    assert count(conn) == 2


@pytest.mark.usefixtures("prepares")
def test_a_taken_id_of_the_programs_is_no_error_in_the_servers_log(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.bulk_enqueue(requests("b"))
    monkeypatch.setattr(psycopg.errors.UniqueViolation, "__init__", pytest.fail)
    with pytest.raises(JobAlreadyExistsError):
        client.bulk_enqueue(requests("a", "b", "c"))


def test_a_bulk_enqueue_is_all_or_nothing(client: Any, conn: psycopg.Connection) -> None:
    client.bulk_enqueue(requests("b", "d"))
    with pytest.raises(JobAlreadyExistsError) as caught:
        client.bulk_enqueue(requests("d", "c", "b", "a"))
    assert caught.value.ids == ("d", "b")
    assert count(conn) == 2


def test_a_large_bulk_enqueue_names_the_taken_ids_and_leaves_the_callers_transaction_as_it_was(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    ids = [f"{n:04}" for n in range(1_000)]
    client.bulk_enqueue(requests("0500", "0998"))
    caller = colour.connect()
    client.enqueue(EnqueueRequest("q", "t", id="before"), conn=caller)
    with pytest.raises(JobAlreadyExistsError) as caught:
        client.bulk_enqueue(requests(*ids, "0999"), conn=caller)
    assert caught.value.ids == ("0500", "0998", "0999")
    client.bulk_enqueue(requests(*(f"x{id_}" for id_ in ids)), conn=caller)
    assert count(conn) == 2
    caller.commit()
    assert count(conn) == 1_003


def test_a_large_bulk_enqueue_can_be_part_of_a_pipeline(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect(autocommit=True)
    with colour.pipeline(caller):
        client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(1_000)], conn=caller)
    assert count(conn) == 1_000


def test_some_requests_of_a_large_bulk_enqueue_may_be_delayed(
    client: Any, conn: psycopg.Connection
) -> None:
    client.bulk_enqueue([EnqueueRequest("q", "t", delay=n % 2 * 60) for n in range(1_000)])
    late = "select count(*) from bgjob_job where next_run_at > now() + interval '50 s'"
    assert row(conn, late) == (500,)


def test_a_bulk_enqueue_can_skip_taken_ids_and_returns_none_in_their_places(
    client: Any, conn: psycopg.Connection
) -> None:
    client.bulk_enqueue(requests("b", "d"))
    placed = client.bulk_enqueue(requests("d", "c", "b", "a"), on_conflict="skip")
    assert placed == [None, "c", None, "a"]
    assert count(conn) == 4


def test_an_id_that_stands_twice_in_a_bulk_enqueue_is_refused(
    client: Any, conn: psycopg.Connection
) -> None:
    with pytest.raises(JobAlreadyExistsError) as caught:
        client.bulk_enqueue(requests("a", "b", "a"))
    assert caught.value.ids == ("a",)
    assert count(conn) == 0


def test_of_two_requests_with_one_id_the_first_is_written(
    client: Any, conn: psycopg.Connection
) -> None:
    ids = [f"{n:03}" for n in range(500)]
    random.Random(1).shuffle(ids)
    batch = [EnqueueRequest("q", "t", arg, id=id_) for arg in (b"first", b"second") for id_ in ids]
    placed = client.bulk_enqueue(batch, on_conflict="skip")
    assert placed == ids + [None] * 500
    assert rows(conn, "select distinct arg from bgjob_job") == [(b"first",)]


def test_a_bulk_enqueue_of_any_size_is_one_transaction(
    client: Any, conn: psycopg.Connection
) -> None:
    client.enqueue(EnqueueRequest("q", "t", id="taken"))
    batch = [EnqueueRequest("q", "t") for _ in range(20_001)]
    with pytest.raises(JobAlreadyExistsError):
        client.bulk_enqueue([*batch, *requests("taken")])
    assert count(conn) == 1
    placed = client.bulk_enqueue((r for r in [*batch, *requests("taken")]), on_conflict="skip")
    assert placed == [*(request.id for request in batch), None]
    assert row(conn, "select count(*), count(distinct xmin::text) from bgjob_job") == (20_002, 2)


def test_a_generator_that_fails_leaves_nothing_behind(
    client: Any, conn: psycopg.Connection
) -> None:
    def failing() -> Iterator[EnqueueRequest]:
        for _ in range(10_001):
            yield EnqueueRequest("q", "t")
        raise LookupError("no more")

    with pytest.raises(LookupError):
        client.bulk_enqueue(failing())
    assert count(conn) == 0


def test_two_bulk_enqueues_in_opposite_order_do_not_deadlock(
    colour: Colour, dsn: str, conn: psycopg.Connection
) -> None:
    ids = [f"{n:03}" for n in range(101)]

    def both_wait() -> bool:
        waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        return row(conn, f"{waiting} and datname = current_database()") == (2,)

    def let_go() -> None:
        assert eventually(both_wait)
        blocker.rollback()

    with psycopg.connect(dsn) as blocker, Client(dsn) as other:
        other.enqueue(EnqueueRequest("q", "t", id="050"), conn=blocker)
        referee = threading.Thread(target=let_go)
        referee.start()
        placed = colour.at_once(
            lambda client: client.bulk_enqueue(requests(*ids), on_conflict="skip"),
            lambda client: client.bulk_enqueue(requests(*reversed(ids)), on_conflict="skip"),
        )
        referee.join()
    assert sorted(id_ for ids in placed for id_ in ids if id_) == ids


@pytest.mark.parametrize("first", ["copy", "insert"])
def test_a_copy_and_an_insert_of_the_same_ids_wait_for_each_other_in_any_collation(
    dsn: str, conn: psycopg.Connection, first: str
) -> None:
    # By their bytes the ids with B come first, in a language those with a.
    ids = sorted(f"{letter}{n:03}" for n in range(300) for letter in "aB")
    name = f"{conn.info.dbname}_und"
    und = make_conninfo(dsn, dbname=name)
    made = sql.SQL("create database {} template template0 locale_provider icu icu_locale 'und'")
    try:
        conn.execute(made.format(sql.Identifier(name)))
    except (SyntaxError, FeatureNotSupported):
        pytest.skip("this server has no collation but that of bytes")
    try:
        with (
            psycopg.connect(und, autocommit=True) as conn_,
            psycopg.connect(und) as blocker,
            psycopg.connect(und) as copying,
            psycopg.connect(und) as inserting,
            Client(und) as client,
        ):
            conn_.execute(init_sql().encode())
            assert row(conn_, "select 'a' collate \"default\" < 'B'") == (True,)
            client.enqueue(EnqueueRequest("q", "t", id="a150"), conn=blocker)

            def copy() -> Any:
                with copying:
                    return client.bulk_enqueue(requests(*ids), conn=copying)

            def insert() -> Any:
                with inserting:
                    return client.bulk_enqueue(
                        requests(*reversed(ids)), on_conflict="skip", conn=inserting
                    )

            calls = [copy, insert] if first == "copy" else [insert, copy]
            with suppress(JobAlreadyExistsError):
                both(*calls, conn=conn_, then=blocker.rollback)
    finally:
        conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def test_a_bulk_enqueue_writes_in_byte_order_in_any_collation(
    conn: psycopg.Connection,
) -> None:
    statement = enqueues.enqueue_many(requests("a", "b"), notify=False)
    assert isinstance(statement.text, str)
    plan = conn.execute("explain (verbose) " + statement.text, statement.params).fetchall()
    keys = [line for (line,) in plan if "Sort Key" in line]
    assert len(keys) == 1
    assert 'COLLATE "C"' in keys[0]


def test_the_due_times_of_a_bulk_enqueue_keep_its_order(
    client: Any, conn: psycopg.Connection
) -> None:
    ids = [f"{n:04}" for n in range(2_000)]
    random.Random(2).shuffle(ids)
    client.bulk_enqueue(requests(*ids))
    due = dict(rows(conn, "select id, next_run_at from bgjob_job"))
    assert [due[id_] for id_ in ids] == sorted(due.values())


# -- do -----------------------------------------------------------------------------------


def test_do_passes_its_job_to_a_plain_handler(client: Any, conn: psycopg.Connection) -> None:
    seen: list[Job] = []
    id_ = client.enqueue(EnqueueRequest("q", "t", {"n": 1}, priority=4))
    due, created = row(conn, "select next_run_at, created_at from bgjob_job")
    assert client.do("q", Mux().register("t", seen.append)) == Complete()
    assert seen == [Job(id_, "q", "t", b'{"n":1}', 1, None, 4, due, created, seen[0].updated_at)]
    assert count(conn) == 0


def test_do_runs_a_coroutine_handler(client: Any, conn: psycopg.Connection) -> None:
    async def handle(job: Job) -> Result:
        await asyncio.sleep(0)
        return MoveToDlq(f"seen {job.id}")

    id_ = client.enqueue(EnqueueRequest("q", "t"))
    assert client.do("q", Mux().register("t", handle)) == MoveToDlq(f"seen {id_}")
    assert count(conn) == 0


def test_do_deletes_a_completed_job(client: Any, conn: psycopg.Connection) -> None:
    client.bulk_enqueue(requests("a", "b"))
    assert client.do("q", returning(Complete())) == Complete()
    assert rows(conn, "select id, attempt, token from bgjob_job") == [("b", 0, None)]
    assert client.dlq.list() == []


@pytest.mark.parametrize("delay", [60.0, timedelta(minutes=1)])
def test_do_stores_a_retry_with_its_error_and_delay(
    client: Any, conn: psycopg.Connection, delay: Any
) -> None:
    client.enqueue(EnqueueRequest("q", "t"))
    before = clock(conn)
    assert client.do("q", returning(Retry(delay, error="why"))) == Retry(delay, "why")
    attempt, error, due, token, lease_until, updated = row(
        conn,
        "select attempt, last_error, next_run_at, token, lease_until, updated_at from bgjob_job",
    )
    assert (attempt, error, token, lease_until) == (1, "why", None, None)
    assert before <= due - timedelta(minutes=1) <= clock(conn)
    assert before <= updated <= clock(conn)
    with pytest.raises(EmptyQueueError):
        client.do("q", returning(Complete()))


def test_do_refunds_the_attempt_of_a_rescheduled_job(client: Any, conn: psycopg.Connection) -> None:
    client.enqueue(EnqueueRequest("q", "t"))
    client.do("q", returning(Retry(0, error="why")))
    before = clock(conn)
    assert client.do("q", returning(Reschedule(60))) == Reschedule(60)
    attempt, error, due, token = row(
        conn, "select attempt, last_error, next_run_at, token from bgjob_job"
    )
    assert (attempt, error, token) == (1, "why", None)
    assert before <= due - timedelta(minutes=1) <= clock(conn)


def test_do_moves_a_job_to_the_dlq_with_its_columns(client: Any, conn: psycopg.Connection) -> None:
    client.enqueue(EnqueueRequest("q", "t", b"arg", id="a", priority=3))
    job = row(conn, "select next_run_at, created_at, updated_at from bgjob_job")
    before = clock(conn)
    client.do("q", returning(MoveToDlq(ValueError("why"))))
    assert count(conn) == 0
    [dead] = client.dlq.list()
    assert (dead.id, dead.queue, dead.type, dead.arg, dead.attempt, dead.last_error) == (
        ("a", "q", "t", b"arg", 1, "ValueError: why")
    )
    assert dead.priority == 3
    assert (dead.next_run_at, dead.created_at, dead.updated_at) == job
    assert before <= dead.moved_at <= clock(conn)


def test_do_moves_a_job_of_an_unknown_type_to_the_dlq(client: Any) -> None:
    client.enqueue(EnqueueRequest("q", "mystery"))
    result = client.do("q", Mux())
    assert isinstance(result, MoveToDlq) and isinstance(result.error, UnknownTypeError)
    [dead] = client.dlq.list()
    assert "UnknownTypeError: no handler is registered for job type 'mystery'" in dead.last_error


def test_do_stores_the_exception_of_a_handler_and_returns_the_result(
    client: Any, conn: psycopg.Connection
) -> None:
    error = ValueError("a\0b")

    def fail(_: Job) -> Result:
        raise error

    mux = Mux().register("t", fail, max_attempts=2, backoff=lambda _: 0.0)
    client.enqueue(EnqueueRequest("q", "t"))
    assert client.do("q", mux) == Retry(0.0, error)
    [(attempt, text)] = rows(conn, "select attempt, last_error from bgjob_job")
    assert (attempt, text.splitlines()[0]) == (1, "ValueError: a\ufffdb")
    assert client.do("q", mux) == MoveToDlq(error)
    assert count(conn) == 0


@pytest.mark.parametrize("coroutine", [False, True])
def test_do_stores_a_failed_attempt_before_it_raises_an_interrupt(
    client: Any, conn: psycopg.Connection, coroutine: bool
) -> None:
    async def interrupted(_: Job) -> Result:
        raise asyncio.CancelledError

    def exits(_: Job) -> Result:
        raise SystemExit

    client.enqueue(EnqueueRequest("q", "t"))
    with pytest.raises(asyncio.CancelledError if coroutine else SystemExit):
        client.do("q", Mux().register("t", interrupted if coroutine else exits))
    assert row(conn, "select attempt, token, lease_until from bgjob_job") == (1, None, None)


def test_do_raises_where_no_job_is_due(client: Any) -> None:
    client.enqueue(EnqueueRequest("other", "t"))
    client.enqueue(EnqueueRequest("q", "t", delay=60))
    with pytest.raises(EmptyQueueError, match="no job of queue 'q' is due"):
        client.do("q", returning(Complete()))


def test_do_takes_jobs_by_priority_and_then_by_due_time(client: Any) -> None:
    order = []
    client.bulk_enqueue(
        [EnqueueRequest("q", "t", n, priority=p) for n, p in enumerate([5, 0, -5, 5, 0, -5])]
    )
    for _ in range(6):
        client.do("q", Mux().register("t", lambda job: order.append(job.json())))
    assert order == [2, 5, 1, 4, 0, 3]


def test_do_claims_a_job_whose_lease_has_ended_and_no_other(
    client: Any, conn: psycopg.Connection
) -> None:
    client.bulk_enqueue(requests("ended", "held"))
    conn.execute(
        "update bgjob_job set token = 1, attempt = 1, last_error = 'why', lease_until = "
        "clock_timestamp() + case id when 'held' then interval '1 hour' else '-1 ms' end"
    )
    seen: list[Job] = []
    client.do("q", Mux().register("t", seen.append))
    assert [(job.id, job.attempt, job.last_error) for job in seen] == [("ended", 2, "why")]
    with pytest.raises(EmptyQueueError):
        client.do("q", returning(Complete()))


@pytest.mark.parametrize("result", [Complete(), Retry(0), Reschedule(0), MoveToDlq("why")])
def test_do_drops_its_result_where_the_lease_was_lost(
    client: Any, conn: psycopg.Connection, result: Result
) -> None:
    def lose(_: Job) -> Result:
        conn.execute("update bgjob_job set token = 1, attempt = 7")
        return result

    client.enqueue(EnqueueRequest("q", "t", id="a"))
    with pytest.raises(LeaseLostError, match="'a' of type 't' outlived its lease of 30 s"):
        client.do("q", Mux().register("t", lose), lease=30)
    assert rows(conn, "select token, attempt, last_error from bgjob_job") == [(1, 7, None)]
    assert client.dlq.list() == []


@pytest.mark.parametrize("coroutine", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_what_do_runs_changes_no_context_variable_of_its_caller(
    dsn: str, is_async: bool, coroutine: bool
) -> None:
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    seen: list[str] = []

    def act(what: str) -> str:
        seen.append(tenant.get())
        tenant.set(what)
        return what

    async def handle(_: Job) -> None:
        act("handler")

    handler: Any = handle if coroutine else lambda _: act("handler") and None
    mux = Mux().register("t", handler, exclusive=lambda _: act("key"))

    async def in_a_task() -> None:
        tenant.set("caller")
        async with AsyncClient(dsn) as client:
            await client.do("q", mux)
        assert tenant.get() == "caller"

    def on_a_thread() -> None:
        tenant.set("caller")
        with Client(dsn) as client:
            client.do("q", mux)
        assert tenant.get() == "caller"

    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t"))
    if is_async:
        asyncio.run(in_a_task())
    else:
        copy_context().run(on_a_thread)
    assert seen == ["caller", "caller"]


@pytest.mark.parametrize("transactional", [False, True])
def test_do_runs_coroutine_handlers_where_a_loop_runs_as_in_a_notebook(
    dsn: str, conn: psycopg.Connection, transactional: Any
) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def handle(job: Job, *_: object) -> Result:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return Complete() if job.id == "good" else Retry(60)

    handler: Any = handle
    mux = Mux().register("t", handler, transactional=transactional)

    async def cells() -> None:
        client = Client(dsn)  # which is not closed
        client.enqueue(EnqueueRequest("q", "t", id="good"))
        assert client.do("q", mux) == Complete()
        client.enqueue(EnqueueRequest("q", "t", id="bad"))
        assert client.do("q", mux) == Retry(60)
        async with AsyncClient(dsn) as other:
            await other.enqueue(EnqueueRequest("q", "t", id="good"))
            assert await other.do("q", mux) == Complete()
        assert loops[0] is loops[1] is not loops[2] is asyncio.get_running_loop()

    asyncio.run(cells())
    assert rows(conn, "select id from bgjob_job") == [("bad",)]


@pytest.mark.parametrize("transactional", [False, True])
def test_a_cancelled_do_stores_the_result_of_its_plain_handler_once_that_has_ended(
    dsn: str, conn: psycopg.Connection, transactional: bool
) -> None:
    started, go_on = threading.Event(), threading.Event()
    runs: list[str] = []

    def slow(job: Job, *_: object) -> Result:
        runs.append(job.id)
        started.set()
        assert go_on.wait(20)
        return MoveToDlq("why")

    register: Any = Mux().register
    mux = register("t", slow, transactional=transactional)

    async def cancelled() -> None:
        async with AsyncClient(dsn) as client:
            await client.enqueue(EnqueueRequest("q", "t", id="a", exclusive="k"))
            doing = asyncio.create_task(client.do("q", mux))
            assert await asyncio.to_thread(started.wait, 20)
            doing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doing  # which does not wait for the thread
            with pytest.raises(EmptyQueueError):
                await client.do("q", mux)  # nothing overlaps itself
            go_on.set()
        assert rows(conn, "select job_id, last_error from bgjob_dead_job") == [("a", "why")]

    asyncio.run(cancelled())
    assert runs == ["a"]
    assert count(conn) == 0


def test_an_async_client_says_that_trio_is_not_asyncio(dsn: str) -> None:
    import trio  # a third of a second, in each process of the suite

    client = AsyncClient(dsn)
    with pytest.raises(BgjobError, match=r"asyncio only.* use a Client, by trio\.to_thread"):
        trio.run(client.enqueue, EnqueueRequest("q", "t"))


def test_a_client_closes_while_a_cancelled_do_is_left_in_another_loop(
    dsn: str, conn: psycopg.Connection
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(_: Job) -> None:
        started.set()
        assert go_on.wait(20)

    async def cancelled() -> None:
        await client.enqueue(EnqueueRequest("q", "t"))
        doing = asyncio.create_task(client.do("q", Mux().register("t", slow)))
        assert await asyncio.to_thread(started.wait, 20)
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing

    client = AsyncClient(dsn)
    with asyncio.Runner() as runner:
        runner.run(cancelled())
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, client.close()).result(20)
        go_on.set()


def test_a_program_that_ends_after_a_cancelled_do_has_stored_the_handlers_result(
    dsn: str, conn: psycopg.Connection
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(_: Job) -> None:
        started.set()
        assert go_on.wait(20)

    async def main(client: AsyncClient) -> None:
        await client.enqueue(EnqueueRequest("q", "t"))
        doing = asyncio.create_task(client.do("q", Mux().register("t", slow)))
        assert await asyncio.to_thread(started.wait, 20)
        doing.cancel()
        with suppress(asyncio.CancelledError):
            await doing
        # While the event loop waits for the rest of the program.
        asyncio.get_running_loop().call_later(0.1, go_on.set)

    asyncio.run(main(AsyncClient(dsn)))
    assert count(conn) == 0


@pytest.mark.parametrize("loop_ends", [False, True])
def test_a_cancelled_do_cancels_its_coroutine_handler_once_and_stores_that_it_failed(
    dsn: str, conn: psycopg.Connection, loop_ends: bool
) -> None:
    order: list[str] = []

    async def handle(_: Job) -> None:
        started.set()
        try:
            await asyncio.sleep(NEVER)
        finally:
            order.append("cancelled")
            await asyncio.sleep(0.01)
            order.append("cleaned up")

    async def main(client: AsyncClient) -> None:
        await client.enqueue(EnqueueRequest("q", "t", exclusive="k"))
        doing = asyncio.create_task(client.do("q", Mux().register("t", handle, max_attempts=1)))
        await started.wait()
        if loop_ends:
            return  # asyncio.run() cancels all tasks, those of the client, too
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing
        order.append("raised")

    started = asyncio.Event()
    asyncio.run(main(AsyncClient(dsn)))
    assert order == ["cancelled", "cleaned up", *(() if loop_ends else ("raised",))]
    [(text,)] = rows(conn, "select last_error from bgjob_dead_job")
    assert text.splitlines()[0] == "CancelledError"
    assert count(conn) == count(conn, "bgjob_exclusive") == 0


def test_a_do_that_is_cancelled_while_it_claims_releases_the_job(
    dsn: str, conn: psycopg.Connection
) -> None:
    runs: list[Job] = []

    async def cancelled() -> None:
        async with AsyncClient(dsn) as client:
            await client.enqueue(EnqueueRequest("q", "t", id="a"))
            with psycopg.connect(dsn) as blocker:
                blocker.execute("lock table bgjob_job in exclusive mode")
                doing = asyncio.create_task(client.do("q", Mux().register("t", runs.append)))
                assert await asyncio.to_thread(eventually, lambda: len(waiting(conn)) == 1)
                doing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await doing

    asyncio.run(cancelled())
    assert rows(conn, "select id, attempt, token from bgjob_job") == [("a", 0, None)]
    assert runs == []


def test_no_transaction_is_open_while_a_handler_runs(client: Any, conn: psycopg.Connection) -> None:
    def sessions(_: Job) -> Result:
        states = rows(
            conn,
            "select state from pg_stat_activity where datname = current_database() "
            "and pid <> pg_backend_pid() and xact_start is not null",
        )
        return Complete() if not states else MoveToDlq(str(states))

    client.enqueue(EnqueueRequest("q", "t"))
    assert client.do("q", Mux().register("t", sessions)) == Complete()


# -- pools, processes, secrets ----------------------------------------------------------------


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_client_only_borrows_from_the_users_pool(
    colour: Colour, conn: psycopg.Connection, autocommit: bool
) -> None:
    pool = colour.pool(autocommit=autocommit, row_factory=dict_row)
    client = colour.client(pool)
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    client.bulk_enqueue(requests("b", "c"))
    with pytest.raises(JobAlreadyExistsError):
        client.bulk_enqueue(requests("a"))
    assert client.do("q", returning(MoveToDlq("why"))) == MoveToDlq("why")
    assert [dead.id for dead in client.dlq.list()] == ["a"]
    assert count(conn) == 2
    client.close()
    borrowed = pool.getconn()
    try:
        assert borrowed.autocommit is autocommit
        assert borrowed.row_factory is dict_row
        assert borrowed.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    finally:
        pool.putconn(borrowed)


@pytest.mark.both_colours
def test_a_handler_may_use_the_only_connection_of_its_pool(
    colour: Colour, conn: psycopg.Connection
) -> None:
    client = colour.client(colour.pool())

    def enqueue(_: Job) -> None:
        client.target.enqueue(EnqueueRequest("q", "child", id="child"))

    async def enqueue_async(_: Job) -> None:
        await client.target.enqueue(EnqueueRequest("q", "child", id="child"))

    client.enqueue(EnqueueRequest("q", "t"))
    client.do("q", Mux().register("t", enqueue_async if colour.is_async else enqueue))
    assert rows(conn, "select id from bgjob_job") == [("child",)]


def test_a_closed_client_stays_closed_and_its_error_names_that(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    client.close()
    calls: list[Callable[[], Any]] = [
        lambda: client.enqueue(EnqueueRequest("q", "t", id="b")),
        lambda: client.bulk_enqueue(requests("b")),
        lambda: client.do("q", returning(None)),
        lambda: client.dlq.list(),
        lambda: client.stats(),
    ]
    for call in calls:
        with pytest.raises(ClientClosedError, match="make a new one"):
            call()
    client.close()
    assert rows(conn, "select id from bgjob_job") == [("a",)]
    assert eventually(lambda: sessions(conn) == [])

    pool = colour.pool()
    borrower = colour.client(pool)
    borrower.close()
    with pytest.raises(ClientClosedError, match="make a new one"):
        borrower.enqueue(EnqueueRequest("q", "t", id="b"))
    pool.putconn(pool.getconn())


@pytest.mark.both_colours
def test_a_call_during_the_close_of_a_client_is_completed(colour: Colour, dsn: str) -> None:
    with psycopg.connect(dsn) as blocker, psycopg.connect(dsn, autocommit=True) as conn:
        client = colour.client().target
        Client(dsn).enqueue(EnqueueRequest("q", "t", id="a"), conn=blocker)

        async def closed_meanwhile() -> str:
            task = asyncio.create_task(client.enqueue(EnqueueRequest("q", "t", id="a")))
            await asyncio.to_thread(eventually, lambda: len(waiting(conn)) == 1)
            await client.close()
            blocker.rollback()
            return str(await task)

        if colour.is_async:
            assert colour.run(closed_meanwhile()) == "a"
        else:
            with ThreadPoolExecutor() as threads:
                call = threads.submit(client.enqueue, EnqueueRequest("q", "t", id="a"))
                assert eventually(lambda: len(waiting(conn)) == 1)
                client.close()
                blocker.rollback()
                assert call.result() == "a"
        assert count(conn) == 1
        assert eventually(lambda: len(sessions(conn)) == 1)  # the blocker's


@pytest.mark.parametrize("source", ["string", "pool"])
def test_sessions_that_the_server_ended_while_they_were_idle_fail_nothing(
    colour: Colour, dsn: str, conn: psycopg.Connection, source: str
) -> None:
    client = colour.client(colour.pool(size=3) if source == "pool" else dsn)
    calls: list[Callable[[Any], Any]] = [
        lambda c: c.enqueue(EnqueueRequest("q", "t")),
        lambda c: c.bulk_enqueue(requests("a")),
        lambda c: c.bulk_enqueue(requests(*(f"{n:04}" for n in range(600)))),  # a COPY
        lambda c: c.stats(),
        lambda c: c.do("q", returning(None)),
    ]
    for call in calls:
        colour.at_once(*[lambda c: c.enqueue(EnqueueRequest("q", "t"))] * 4, client=client)
        ended = sessions(conn)
        assert ended
        conn.execute(
            "select pg_terminate_backend(pid) from unnest(%s) pid", [[p for (p,) in ended]]
        )
        assert eventually(lambda: not {*ended} & {*sessions(conn)})
        colour.at_once(call, client=client)


def test_a_low_idle_session_timeout_fails_no_enqueue(
    colour: Colour, dsn: str, conn: psycopg.Connection
) -> None:
    database = sql.Identifier(conn.info.dbname)
    conn.execute(sql.SQL("alter database {} set idle_session_timeout = '50ms'").format(database))
    own, borrower = colour.client(), colour.client(colour.pool())
    for _ in range(4):
        borrower.enqueue(EnqueueRequest("q", "t"))
        own.enqueue(EnqueueRequest("q", "t"))
        # A session of the user's pool ends, one of the client's own does not.
        assert eventually(lambda: len(sessions(conn)) == 1)
    assert count(conn) == 8


@pytest.mark.parametrize("source", ["string", "pool"])
def test_a_client_leaves_a_server_that_has_become_a_standby(
    colour: Colour, dsn: str, conn: psycopg.Connection, source: str
) -> None:
    def read_only(value: LiteralString) -> None:
        alter = sql.SQL("alter database {} set default_transaction_read_only = " + value)
        conn.execute(alter.format(sql.Identifier(conn.info.dbname)))

    calls: list[Callable[[Any], Any]] = [
        lambda client: client.enqueue(EnqueueRequest("q", "t", id="a")),
        lambda client: client.bulk_enqueue(requests("b", "c")),
        lambda client: client.bulk_enqueue(requests(*(f"{n:03}" for n in range(600)))),
    ]
    for call in calls:
        # Sessions that are open keep what they began with, as those of a former primary do.
        read_only("on")
        client = colour.client(colour.pool() if source == "pool" else dsn)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            call(client)
        client.stats()
        read_only("off")
        call(client)
    assert count(conn) == 603


def test_connections_that_were_idle_for_long_are_closed_and_old_ones_replaced(
    colour: Colour, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = colour.client()
    with psycopg.connect(colour.dsn) as blocker:
        Client(colour.dsn).enqueue(EnqueueRequest("q", "t", id="a"), conn=blocker)
        skip = [lambda c: c.bulk_enqueue(requests("a"), on_conflict="skip")] * 3
        with ThreadPoolExecutor(1) as threads:
            calls = threads.submit(colour.at_once, *skip, client=client)
            assert eventually(lambda: len(waiting(conn)) == 3)
            blocker.rollback()
            calls.result()
    assert eventually(lambda: len(sessions(conn)) == 3)
    client.enqueue(EnqueueRequest("q", "t"))
    assert len(sessions(conn)) == 3
    monkeypatch.setattr("bgjob._postgres.pool._IDLE", 0.0)
    client.enqueue(EnqueueRequest("q", "t"))
    assert eventually(lambda: len(sessions(conn)) == 1)
    [before] = sessions(conn)
    client.enqueue(EnqueueRequest("q", "t"))
    assert sessions(conn) == [before]
    monkeypatch.setattr("bgjob._postgres.pool._AGE", 0.0)
    client.enqueue(EnqueueRequest("q", "t"))
    assert eventually(lambda: sessions(conn) not in ([before], []) and len(sessions(conn)) == 1)


@pytest.mark.both_colours
def test_leaving_a_client_closes_it(colour: Colour, conn: psycopg.Connection) -> None:
    def use() -> None:
        with Client(colour.dsn) as client:
            client.enqueue(EnqueueRequest("q", "t"))

    async def use_async() -> None:
        async with AsyncClient(colour.dsn) as client:
            await client.enqueue(EnqueueRequest("q", "t"))

    colour.run(use_async()) if colour.is_async else use()
    assert eventually(lambda: not sessions(conn))


def test_nothing_shows_the_password(colour: Colour) -> None:
    client = colour.client("postgresql://me:s3cret@nowhere.invalid/db").target
    worker = (AsyncWorker if colour.is_async else Worker)(client, "q", Mux())
    for shown in (client, client.dlq, client.dlq.list, client.enqueue, worker, worker.run):
        assert "s3cret" not in f"{shown!r} {shown!s}"
    Blocking(worker, colour.run).shutdown()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_client_that_was_used_before_a_fork_works_in_the_child(
    dsn: str, conn: psycopg.Connection
) -> None:
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="before"))
        child = os.fork()
        if child == 0:
            try:
                client.enqueue(EnqueueRequest("q", "t", id="child"))
                client.close()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        client.enqueue(EnqueueRequest("q", "t", id="parent"))
    assert rows(conn, "select id from bgjob_job order by id") == [
        ("before",),
        ("child",),
        ("parent",),
    ]


@pytest.mark.both_colours
def test_a_client_whose_connections_are_all_in_use_for_long_reports_it(
    colour: Colour, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgjob.client.PATIENCE", 0.2)
    client = colour.client()

    refused = threading.Event()
    too_many = pytest.raises(psycopg.OperationalError, match="all 10 connections .* in use")

    async def enqueue_async(c: AsyncClient) -> None:
        with too_many:
            await c.enqueue(EnqueueRequest("q", "t"))
        refused.set()

    def enqueue(c: Client) -> None:
        assert eventually(lambda: len(waiting(conn)) == 10)
        with too_many:
            c.enqueue(EnqueueRequest("q", "t"))
        refused.set()

    skip: list[Callable[[Any], Any]] = [
        lambda c: c.bulk_enqueue(requests("a"), on_conflict="skip")
    ] * 10
    with psycopg.connect(colour.dsn) as blocker, ThreadPoolExecutor(1) as threads:
        Client(colour.dsn).enqueue(EnqueueRequest("q", "t", id="a"), conn=blocker)
        late: Any = enqueue_async if colour.is_async else enqueue
        calls = threads.submit(colour.at_once, *skip, late, client=client)
        assert refused.wait(20)
        blocker.rollback()
        calls.result()
    client.enqueue(EnqueueRequest("q", "t"))
    assert count(conn) == 2


def test_an_async_client_serves_several_event_loops(dsn: str, conn: psycopg.Connection) -> None:
    client = AsyncClient(dsn)

    async def enqueue() -> None:
        for _ in range(3):
            await asyncio.gather(*(client.enqueue(EnqueueRequest("q", "t")) for _ in range(30)))

    asyncio.run(enqueue())  # one after another
    with ThreadPoolExecutor() as threads:  # and concurrently
        for ended in [threads.submit(asyncio.run, enqueue()) for _ in range(2)]:
            ended.result()
    asyncio.run(client.close())
    assert count(conn) == 270
    assert eventually(lambda: sessions(conn) == [])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_is_not_held_up_by_the_parents_threads_that_use_its_client(
    dsn: str, conn: psycopg.Connection
) -> None:
    with (
        Client(dsn) as client,
        psycopg.connect(dsn) as blocker,
        ThreadPoolExecutor(10) as threads,  # as many as there are connections
    ):
        Client(dsn).enqueue(EnqueueRequest("q", "t", id="a"), conn=blocker)
        skip = partial(client.bulk_enqueue, requests("a"), on_conflict="skip")
        calls = [threads.submit(skip) for _ in range(10)]
        assert eventually(lambda: len(waiting(conn)) == 10)
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(10)
                client.enqueue(EnqueueRequest("q", "t", id="child"))
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        blocker.rollback()
        assert os.waitstatus_to_exitcode(status) == 0
        assert sum(call.result() == ["a"] for call in calls) == 1


LEFT_OPEN = """
import sys, threading
from bgjob import Client, EnqueueRequest

client = Client(sys.argv[1])
client.enqueue(EnqueueRequest("q", "t"))
print([thread.name for thread in threading.enumerate()])
"""


def test_a_program_that_does_not_close_its_client_ends_immediately(dsn: str) -> None:
    # On Python 3.13.0 a thread that waits for work held the end up for 5 s.
    script = [sys.executable, "-W", "error", "-c", LEFT_OPEN, dsn]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=15)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "['MainThread']\n", "")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_passes_through_every_statement(
    client: Any, conn: psycopg.Connection, text: str
) -> None:
    def request(id_: str) -> EnqueueRequest:
        return EnqueueRequest(text, text, text, id=id_)

    assert client.enqueue(request(text)) == text
    assert client.bulk_enqueue([request(text), request("b")], on_conflict="skip") == [None, "b"]
    for result in (Retry(0, error=text), Complete(), MoveToDlq(text)):
        assert client.do(text, Mux().register(text, lambda _, result=result: result)) == result
    assert count(conn) == 0
    [dead] = client.dlq.list(queue=text, type=text)
    assert client.dlq.get(text) == dead
    assert (dead.id, dead.queue, dead.type, dead.json(), dead.last_error) == (text,) * 5
    assert client.dlq.requeue(text, queue=text, type=text) == [text]
    assert rows(conn, "select id, last_error from bgjob_job") == [(text, text)]


# -- the dead-letter table ------------------------------------------------------------------


def test_dead_jobs_are_listed_the_latest_first_by_queue_and_type(client: Any) -> None:
    dead_letter(
        client,
        EnqueueRequest("a", "x", id="1"),
        EnqueueRequest("a", "y", id="2"),
        EnqueueRequest("b", "x", id="3"),
    )

    def listed(*args: Any, **options: Any) -> list[str]:
        return [dead.id for dead in client.dlq.list(*args, **options)]

    assert listed() == ["3", "2", "1"]
    assert listed(queue="a") == ["2", "1"]
    assert listed(type="x") == ["3", "1"]
    assert listed(queue="a", type="x") == ["1"]
    assert listed(queue="c") == []
    assert listed(limit=1) == ["3"]
    assert listed("2") == ["2"]
    assert listed(iter(["1", "3", "unknown"]), queue="a") == ["1"]


def test_pages_of_dead_jobs_neither_repeat_nor_omit_one_while_jobs_die_and_leave(
    client: Any,
) -> None:
    dead_letter(client, *requests(*"12345"))
    first = client.dlq.list(limit=2)
    dead_letter(client, *requests("6"))
    client.dlq.purge("4")
    second = client.dlq.list(limit=2, before=first[-1])
    third = client.dlq.list(limit=2, before=second[-1].number)
    assert [[dead.id for dead in page] for page in (first, second, third)] == [
        ["5", "4"],
        ["3", "2"],
        ["1"],
    ]
    assert client.dlq.list(before=third[-1]) == []


def test_one_dead_job_is_found_by_its_id(client: Any) -> None:
    dead_letter(client, EnqueueRequest("q", "t", id="a"))
    assert client.dlq.get("a") == client.dlq.list()[0]
    assert client.dlq.get("b") is None


def test_of_several_dead_jobs_with_one_id_the_latest_counts(
    client: Any, conn: psycopg.Connection
) -> None:
    for error in ("first", "second"):
        dead_letter(client, EnqueueRequest("q", "t", error, id="a"), error=error)
    assert client.dlq.get("a").last_error == "second"
    assert client.dlq.requeue("a") == ["a"]
    assert rows(conn, "select arg, last_error from bgjob_job") == [(b'"second"', "second")]
    assert [dead.last_error for dead in client.dlq.list()] == ["first"]


def test_a_requeued_job_keeps_every_setting_and_begins_afresh(
    client: Any, conn: psycopg.Connection
) -> None:
    dead_letter(client, EnqueueRequest("q", "t", b"arg", id="a", priority=-7))
    created = client.dlq.get("a").created_at
    before = clock(conn)
    assert client.dlq.requeue("a") == ["a"]
    assert client.dlq.list() == []
    due = row(conn, "select next_run_at from bgjob_job")[0]
    assert before <= due <= clock(conn)
    seen: list[Job] = []
    client.do("q", Mux().register("t", seen.append))
    [job] = seen
    assert (job.id, job.queue, job.type, job.arg, job.priority) == ("a", "q", "t", b"arg", -7)
    assert (job.attempt, job.last_error, job.created_at) == (1, "why", created)


def test_dead_jobs_are_requeued_by_id_or_by_filter(client: Any) -> None:
    dead_letter(
        client,
        *(EnqueueRequest("a", "x", id=id_) for id_ in "123"),
        EnqueueRequest("a", "y", id="4"),
        EnqueueRequest("b", "x", id="5"),
        EnqueueRequest("b", "y", id="6"),
    )
    assert client.dlq.requeue([]) == []
    assert client.dlq.requeue("unknown") == []
    assert client.dlq.requeue("4", queue="b") == []
    assert sorted(client.dlq.requeue(iter(["1", "4", "unknown"]))) == ["1", "4"]
    assert client.dlq.requeue(queue="b", type="y") == ["6"]
    assert sorted(client.dlq.requeue(type="x")) == ["2", "3", "5"]
    assert client.dlq.list() == []


def test_a_dead_job_whose_id_a_live_job_has_stays_dead(
    client: Any, conn: psycopg.Connection
) -> None:
    dead_letter(client, EnqueueRequest("q", "t", b"dead", id="a"), EnqueueRequest("q", "t", id="b"))
    client.enqueue(EnqueueRequest("q", "t", b"live", id="a"))
    assert client.dlq.requeue() == ["b"]
    assert [dead.id for dead in client.dlq.list()] == ["a"]
    assert row(conn, "select arg from bgjob_job where id = 'a'") == (b"live",)


def test_dead_jobs_are_purged_by_id_or_by_filter(client: Any, conn: psycopg.Connection) -> None:
    dead_letter(client, *(EnqueueRequest("a", "x", id=id_) for id_ in "123"))
    between = clock(conn)
    dead_letter(client, EnqueueRequest("a", "y", id="4"), EnqueueRequest("b", "x", id="5"))
    assert client.dlq.purge("unknown") == 0
    assert client.dlq.purge([]) == 0
    assert client.dlq.purge(["1"]) == 1
    assert client.dlq.purge(moved_before=between) == 2
    assert client.dlq.purge(queue="a", type="x") == 0
    assert client.dlq.purge(queue="b") == 1
    assert client.dlq.purge() == 1
    assert client.dlq.list() == []


def test_every_filter_restricts_list_requeue_and_purge(
    client: Any, conn: psycopg.Connection
) -> None:
    conn.execute("set timezone to 'UTC'")
    old, new = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
    filters: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["6", "5", "4", "3", "2", "1"]),
        ({"queue": "b"}, ["6"]),
        ({"type": "y"}, ["5"]),
        ({"error": "100% \\o/_"}, ["4"]),
        ({"error": "100% \\O/_"}, []),
        ({"moved_before": new}, ["2", "1"]),
        ({"moved_before": old}, ["1"]),
        ({"moved_after": new}, ["6", "5", "4", "3"]),
        ({"moved_after": old, "moved_before": new}, ["2"]),
        ({"older_than": timedelta(days=365)}, ["3", "2", "1"]),
        ({"older_than": 0.0, "queue": "a"}, ["5", "4", "3", "2", "1"]),
        ({"queue": "b", "type": "y"}, []),
        ({"queue": None, "type": None, "error": None}, ["6", "5", "4", "3", "2", "1"]),
    ]

    def fill() -> None:
        conn.execute("truncate bgjob_job, bgjob_dead_job")
        dead_letter(client, *(EnqueueRequest("a", "x", id=id_) for id_ in "123"))
        dead_letter(client, EnqueueRequest("a", "x", id="4"), error="at 100% \\o/_ of it")
        dead_letter(client, EnqueueRequest("a", "y", id="5"), EnqueueRequest("b", "x", id="6"))
        conn.execute("update bgjob_dead_job set moved_at = '2019-01-01' where job_id = '1'")
        conn.execute("update bgjob_dead_job set moved_at = '2020-01-01' where job_id = '2'")
        conn.execute("update bgjob_dead_job set moved_at = '2021-01-01' where job_id = '3'")

    fill()
    for where, ids in filters:
        assert [dead.id for dead in client.dlq.list(**where)] == ids, where
        assert [dead.id for dead in client.dlq.list(["3", "6"], **where)] == [
            id_ for id_ in ids if id_ in "36"
        ]
    for where, ids in filters:
        fill()
        assert sorted(client.dlq.requeue(**where), reverse=True) == ids, where
        assert [i for (i,) in rows(conn, "select id from bgjob_job order by id desc")] == ids
    for where, ids in filters:
        fill()
        assert client.dlq.purge(**where) == len(ids), where
        assert not {dead.id for dead in client.dlq.list()} & set(ids)
        assert len(client.dlq.list()) == 6 - len(ids)


@pytest.mark.parametrize("method", ["list", "requeue", "purge"])
def test_a_bad_filter_is_refused_by_name_and_changes_nothing(client: Any, method: str) -> None:
    dead_letter(client, *requests("a"))
    call = getattr(client.dlq, method)
    naive = datetime(2030, 1, 1)
    with pytest.raises(ValueError, match="moved_before must be an aware datetime"):
        call(moved_before=naive)
    with pytest.raises(ValueError, match="moved_after must be an aware datetime"):
        call(moved_after=naive)
    with pytest.raises(ValueError, match="older_than must be from 0 seconds"):
        call(older_than=-1)
    with pytest.raises(TypeError, match="older_than must be seconds"):
        call(older_than="1 d")
    with pytest.raises(TypeError, match="'quene' is not a filter; there are queue, type, error"):
        call(quene="q")
    assert [dead.id for dead in client.dlq.list()] == ["a"]


@pytest.mark.parametrize("in_transaction", [False, True])
def test_a_requeue_wakes_a_worker_that_sleeps_and_a_rolled_back_one_does_not(
    colour: Colour, client: Any, conn: psycopg.Connection, in_transaction: bool
) -> None:
    dead_letter(client, EnqueueRequest("q", "t", id="a", priority=9), *requests("b"))
    dead_letter(client, EnqueueRequest("other", "t", id="c"))
    seen: list[str] = []
    mux = Mux().register("t", lambda job: seen.append(job.id))
    with Worker(Client(colour.dsn), "q", mux, poll_interval=3600):
        asleep: LiteralString = (
            "select count(*) from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' "
            "and objsubid = 2 and database = (select oid from pg_database where datname = current_database())"
        )
        assert eventually(lambda: row(conn, asleep) == (1,))
        if in_transaction:
            caller = colour.connect()
            assert len(client.dlq.requeue(conn=caller)) == 3
            caller.rollback()
            assert client.dlq.requeue("a", conn=caller) == ["a"]
            caller.commit()
        else:
            assert client.dlq.requeue("a") == ["a"]
        assert eventually(lambda: seen == ["a"])
    assert {dead.id for dead in client.dlq.list()} == {"b", "c"}


# -- retention ------------------------------------------------------------------------------


def write_dead(conn: psycopg.Connection, count: int, moved_at: LiteralString) -> None:
    conn.execute(
        "insert into bgjob_dead_job (job_id, queue, type, attempt, priority, next_run_at, "
        "job_created_at, job_updated_at, moved_at) select n::text, 'q', 't', 1, 0, now(), now(), "
        "now(), " + moved_at + " from generate_series(1, %s::int) n",
        [count],
    )


def test_a_retention_purges_jobs_that_have_been_dead_for_longer_than_its_age(
    conn: psycopg.Connection,
) -> None:
    write_dead(conn, 3, "now() - interval '31 d'")
    write_dead(conn, 2, "now() - interval '29 d'")
    retention = DlqRetention(timedelta(days=30), every=60)
    assert retention.run(conn) == 60.0
    assert row(conn, "select count(*), max(moved_at) < now() from bgjob_dead_job") == (2, True)
    assert retention.run(conn) == 60.0
    assert row(conn, "select count(*) from bgjob_dead_job") == (2,)


def test_a_retention_purges_a_batch_at_a_time_and_returns_immediately_for_the_next(
    conn: psycopg.Connection,
) -> None:
    write_dead(conn, 2_500, "now() - interval '2 s'")
    write_dead(conn, 1_500, "now()")
    retention = DlqRetention(1.0)
    conn.execute("update bgjob_dead_job set moved_at = now() + interval '1 h' where id > 2500")
    waits: list[float] = []
    left: list[int] = []
    for _ in range(4):
        waits.append(retention.run(conn))
        left += row(conn, "select count(*) from bgjob_dead_job")
    assert left == [3_000, 2_000, 1_500, 1_500]
    assert waits == [0.05, 0.05, 3600.0, 3600.0]


def test_a_retention_runs_on_any_connection(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
        assert DlqRetention(0).run(conn) == 3600.0


def test_a_retention_refuses_bad_options_by_name() -> None:
    with pytest.raises(ValueError, match="age must be from 0 seconds"):
        DlqRetention(-1)
    with pytest.raises(TypeError, match="age must be seconds"):
        DlqRetention("30 d")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every must be at least 1 second, not 0"):
        DlqRetention(1, every=0)


def test_a_job_that_two_requeues_meet_goes_back_once_whenever_it_runs(
    colour: Colour, client: Any, dsn: str, conn: psycopg.Connection
) -> None:
    dead_letter(client, *requests("a", "b"))
    runs: list[str] = []
    mux = Mux().register("t", lambda job: runs.append(job.id))

    def second() -> Any:
        with Client(dsn) as other:
            return other.dlq.requeue("b")

    def drain() -> None:
        with Client(dsn) as other, suppress(EmptyQueueError):
            while True:
                other.do("q", mux)

    def let_go() -> None:
        drain()  # what the second call has moved, if it did not wait
        blocker.rollback()

    with psycopg.connect(dsn) as blocker, Client(dsn) as other:
        # The first call waits here, with a snapshot that is older than what the second one does.
        other.enqueue(EnqueueRequest("q", "t", id="a"), conn=blocker)
        back = both(lambda: client.dlq.requeue(queue="q"), second, conn=conn, then=let_go)
    drain()
    assert sorted(runs) == ["a", "b"]
    assert sorted(id_ for ids in back for id_ in ids) == ["a", "b"]
    assert client.dlq.list() == []


@pytest.mark.parametrize("order", [1, -1], ids=["purge waits", "requeue waits"])
def test_a_purge_and_a_requeue_of_the_same_jobs_wait_for_each_other(
    client: Any, dsn: str, conn: psycopg.Connection, order: int
) -> None:
    ids = [f"{n:03}" for n in range(200)]
    dead_letter(client, *requests(*ids))
    # Purged in another order than that in which they died.
    conn.execute("create index on bgjob_dead_job (type, queue, id desc)")

    def meanwhile(call: Callable[[Client], Any]) -> Callable[[], Any]:
        def called() -> Any:
            with Client(dsn) as other:
                return call(other)

        return called

    calls = [
        meanwhile(lambda other: len(other.dlq.requeue(queue="q", type="t"))),
        meanwhile(lambda other: other.dlq.purge(queue="q", type="t")),
    ]
    with psycopg.connect(dsn) as blocker:
        blocker.execute("select from bgjob_dead_job where job_id = '100' for update")
        moved = both(*calls[::order], conn=conn, then=blocker.rollback)
    assert sorted(moved) == [0, len(ids)]


def test_a_retention_does_not_wait_for_a_requeue(
    client: Any, dsn: str, conn: psycopg.Connection
) -> None:
    dead_letter(client, *requests("a", "b"))
    with psycopg.connect(dsn) as other, Client(dsn) as plain:
        assert plain.dlq.requeue("a", conn=other) == ["a"]
        conn.execute("set lock_timeout = '1s'")
        DlqRetention(age=0).run(conn)
        assert [dead.id for dead in client.dlq.list()] == ["a"]


def test_the_dlq_works_inside_the_callers_transaction(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect(row_factory=dict_row)
    dead_letter(client, *requests("a", "b"))
    assert client.dlq.requeue("a", conn=caller) == ["a"]
    assert client.dlq.purge("b", conn=caller) == 1
    assert client.dlq.list(conn=caller) == []
    assert client.dlq.get("a", conn=caller) is None
    assert len(client.dlq.list()) == 2
    caller.rollback()
    assert (len(client.dlq.list()), count(conn)) == (2, 0)


def test_a_dead_job_with_times_out_of_pythons_range_does_not_hide_the_others(
    client: Any, conn: psycopg.Connection
) -> None:
    dead_letter(client, *requests("a"))
    client.enqueue(EnqueueRequest("q", "t", id="b"))
    conn.execute("update bgjob_job set next_run_at = '-infinity', created_at = '-infinity'")
    client.do("q", returning(MoveToDlq("why")))
    conn.execute("update bgjob_dead_job set moved_at = 'infinity' where job_id = 'b'")
    assert [dead.id for dead in client.dlq.list()] == ["b", "a"]
