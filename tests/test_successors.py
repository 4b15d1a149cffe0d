"""A job that was replaced while it ran is followed by its successor, however it ends."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from support.database import row, rows
from support.statements import ask

from bgjob._sql.claims import Window, claim_any, free, free_within, sweep
from bgjob._sql.history import of_job
from bgjob._sql.repairs import dead_letter_unread
from bgjob._sql.settlements import (
    Claimed,
    DeadLettered,
    Postponed,
    complete,
    dead_letter,
    postpone,
    release_jobs,
)
from bgjob._sql.statement import Statement

COLUMNS = """
    id, queue, type, arg, attempt, last_error, priority, deaths, exclusive, waits, token,
    lease_until, successor, successor_arg, headers
"""
FRESH = (
    "a",
    "other",
    "new",
    b"\0new",
    0,
    None,
    7,
    0,
    "k2",
    False,
    None,
    None,
    None,
    None,
    {"tenant": None},
)

Ends = Callable[[list[Claimed]], Statement[Any]]


def hold(conn: psycopg.Connection) -> list[Claimed]:
    """Claim two jobs, of which the first is replaced while it runs."""
    conn.execute(
        "insert into bgjob_job (id, queue, type, arg, exclusive) "
        "values ('a', 'q', 't', 'old', 'k1'), ('b', 'q', 't', 'other', null)"
    )
    jobs = ask(conn, sweep("q", limit=2, lease=60, token=5)).jobs
    conn.execute(
        """
        update bgjob_job set successor_arg = '\\x006e6577', successor = json_build_object(
            'queue', 'other', 'type', 'new', 'priority', 7, 'exclusive', 'k2',
            'headers', '{"tenant": null}',
            'next_run_at', clock_timestamp() - interval '1 h',
            'created_at', timestamptz '2030-01-01 00:00:00.123456+00'
        ) where id = 'a'
        """
    )
    return [Claimed(job, 5) for job in jobs]


def check_successor(conn: psycopg.Connection) -> None:
    assert row(conn, f"select {COLUMNS} from bgjob_job where id = 'a'") == FRESH
    # A due time in the past is stored as now, so that the claims' marks are not behind it.
    assert row(
        conn,
        "select created_at = timestamptz '2030-01-01 00:00:00.123456+00', "
        "clock_timestamp() - next_run_at < interval '1 min' from bgjob_job where id = 'a'",
    ) == (True, True)


@pytest.mark.parametrize(
    ("ends", "is_left"),
    [
        (complete, False),
        (lambda held: complete(held, {"t"}), False),
        (lambda held: postpone([Postponed(c, 60.0, "why", refund=False) for c in held]), True),
        (lambda held: dead_letter([DeadLettered(c, "why", 1) for c in held]), False),
    ],
    ids=["complete", "complete and keep", "postpone", "dead_letter"],
)
def test_the_statement_that_ends_it_writes_its_successor_as_a_fresh_job(
    worker: psycopg.Connection, ends: Ends, is_left: bool
) -> None:
    held = hold(worker)
    worker.execute("listen bgjob")
    assert sorted(ask(worker, ends(held))) == ["a", "b"]
    check_successor(worker)
    assert row(worker, "select count(*) from bgjob_job where id = 'b'") == (int(is_left),)
    # The workers of its queue are told.
    [told] = worker.notifies(timeout=5, stop_after=1)
    assert told.payload == "other"
    # Its old claim is over.
    assert ask(worker, ends(held[:1])) == []
    check_successor(worker)


def test_what_it_was_is_kept_or_dead(worker: psycopg.Connection) -> None:
    held = hold(worker)
    ask(worker, complete(held, {"t"}))
    assert [job.past.type for job in ask(worker, of_job("a", limit=9))] == ["t"]
    worker.execute("delete from bgjob_job")
    held = hold(worker)
    ask(worker, dead_letter([DeadLettered(c, "why", 1) for c in held]))
    dead = "select job_id, type, arg, attempt, exclusive from bgjob_dead_job order by job_id"
    assert rows(worker, dead) == [("a", "t", b"old", 1, "k1"), ("b", "t", b"other", 1, None)]


@pytest.mark.parametrize("how", ["sweep", "free", "free_within"])
def test_of_a_dead_workers_job_the_successor_is_left(worker: psycopg.Connection, how: str) -> None:
    hold(worker)
    worker.execute("update bgjob_job set lease_until = now() - interval '1 s'")
    if how == "sweep":
        swept = ask(worker, sweep("q", limit=10, lease=60, token=6))
    elif how == "free":
        swept = ask(worker, free("q", limit=10))
    else:
        [(since, until)] = worker.execute(
            "select now() - interval '1 h', now() + interval '1 h'"
        ).fetchall()
        swept = ask(worker, free_within("q", Window(since, until, (0,)), limit=10))
    assert (swept.jobs, swept.freed) == ([], 2)
    check_successor(worker)
    assert row(worker, "select attempt, deaths, token from bgjob_job where id = 'b'") == (
        (1, 1, None)
    )


def test_of_a_job_that_cannot_be_read_the_successor_is_left(worker: psycopg.Connection) -> None:
    hold(worker)
    [(place,)] = worker.execute("select ctid::text from bgjob_job where id = 'a'").fetchall()
    ask(worker, dead_letter_unread([place], [5], "unreadable"))
    check_successor(worker)
    assert rows(worker, "select job_id from bgjob_dead_job") == [("a",)]


def test_a_job_that_is_given_back_unstarted_keeps_its_successor(worker: psycopg.Connection) -> None:
    held = hold(worker)
    assert sorted(ask(worker, release_jobs("q", held, tell=False))) == ["a", "b"]
    [job] = [j for j in ask(worker, claim_any("q", lease=60, token=7)) if j.id == "a"]
    assert (job.arg, job.attempt) == (b"old", 1)
    assert ask(worker, complete([Claimed(job, 7)])) == ["a"]
    check_successor(worker)


@pytest.mark.parametrize("level", ["read committed", "serializable"])
def test_a_replacement_that_commits_while_its_end_waits_is_not_lost(
    worker: psycopg.Connection, dsn: str, level: str
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from support.waiting import eventually

    held = hold(worker)
    worker.execute("update bgjob_job set successor = null, successor_arg = null")
    with psycopg.connect(dsn) as other, ThreadPoolExecutor(1) as pool:
        other.execute(f"set transaction isolation level {level}".encode())
        other.execute(
            "update bgjob_job set successor_arg = 'newest', successor = json_build_object("
            "'queue', 'q', 'type', 't', 'priority', 0, 'next_run_at', now(), 'created_at', now()) "
            "where id = 'a'"
        )
        worker.execute("set lock_timeout = 0")
        ending = pool.submit(ask, worker, complete(held))
        waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and pid = %s"
        pid = worker.info.backend_pid
        assert eventually(lambda: other.execute(waits, [pid]).fetchone() == (1,))
        other.commit()
        assert sorted(ending.result()) == ["a", "b"]
    query = "select id, arg, token from bgjob_job"
    assert rows(worker, query) == [("a", b"newest", None)]
