"""A job that was replaced while it ran is followed by its successor, however it ends."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest
from support.database import row, rows
from support.statements import ask
from support.waiting import eventually

from bgjob._sql.claims import claim_any, free, sweep
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

Ends = Callable[..., Statement[list[str]]]


def end(conn: psycopg.Connection, ends: Ends, held: list[Claimed]) -> list[str]:
    """End claims as a worker does: by the usual statement, and those left by the second one."""
    ended = ask(conn, ends(held))
    left = [claimed for claimed in held if claimed.job.id not in ended]
    return sorted(ended + (ask(conn, ends(left, follows=True)) if left else []))


def postponed(held: list[Claimed], **options: bool) -> Statement[list[str]]:
    return postpone([Postponed(c, 60.0, "why", refund=False) for c in held], **options)


def buried(held: list[Claimed], **options: bool) -> Statement[list[str]]:
    return dead_letter([DeadLettered(c, "why", 1) for c in held], **options)


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
        (partial(complete, kept={"t"}), False),
        (postponed, True),
        (buried, False),
    ],
    ids=["complete", "complete and keep", "postpone", "dead_letter"],
)
def test_the_statement_that_ends_it_writes_its_successor_as_a_fresh_job(
    worker: psycopg.Connection, ends: Ends, is_left: bool
) -> None:
    held = hold(worker)
    worker.execute("listen bgjob")
    assert ask(worker, ends(held[1:], follows=True)) == []
    assert ask(worker, ends(held[:1])) == []
    assert end(worker, ends, held) == ["a", "b"]
    check_successor(worker)
    assert row(worker, "select count(*) from bgjob_job where id = 'b'") == (int(is_left),)
    # The workers of its queue are told.
    [told] = worker.notifies(timeout=5, stop_after=1)
    assert told.payload == "other"
    # Its old claim is over.
    assert end(worker, ends, held[:1]) == []
    check_successor(worker)


def test_what_it_was_is_kept_or_dead(worker: psycopg.Connection) -> None:
    held = hold(worker)
    end(worker, partial(complete, kept={"t"}), held)
    assert [job.past.type for job in ask(worker, of_job("a", limit=9))] == ["t"]
    worker.execute("delete from bgjob_job")
    held = hold(worker)
    end(worker, buried, held)
    dead = "select job_id, type, arg, attempt, exclusive from bgjob_dead_job order by job_id"
    assert rows(worker, dead) == [("a", "t", b"old", 1, "k1"), ("b", "t", b"other", 1, None)]


def test_of_a_job_that_cannot_be_read_the_successor_is_left(worker: psycopg.Connection) -> None:
    hold(worker)
    [(place,)] = worker.execute("select ctid::text from bgjob_job where id = 'a'").fetchall()
    ask(worker, dead_letter_unread([place], [5], "unreadable"))
    check_successor(worker)
    assert rows(worker, "select job_id from bgjob_dead_job") == [("a",)]


@pytest.mark.parametrize("how", ["release", "death"])
def test_a_job_whose_claim_ends_without_an_outcome_keeps_its_successor(
    worker: psycopg.Connection, how: str
) -> None:
    held = hold(worker)
    if how == "release":
        assert sorted(ask(worker, release_jobs("q", held, tell=False))) == ["a", "b"]
    else:
        worker.execute("update bgjob_job set lease_until = now() - interval '1 s'")
        assert ask(worker, free("q", limit=10)).freed == 2
    [job] = [j for j in ask(worker, claim_any("q", lease=60, token=7)) if j.id == "a"]
    assert (job.arg, job.attempt) == (b"old", 1 if how == "release" else 2)
    assert end(worker, complete, [Claimed(job, 7)]) == ["a"]
    check_successor(worker)


@pytest.mark.parametrize("level", ["read committed", "serializable"])
def test_a_replacement_that_commits_while_its_end_waits_is_not_lost(
    worker: psycopg.Connection, dsn: str, level: str
) -> None:
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
        ending = pool.submit(end, worker, complete, held)
        waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and pid = %s"
        pid = worker.info.backend_pid
        assert eventually(lambda: other.execute(waits, [pid]).fetchone() == (1,))
        other.commit()
        assert ending.result() == ["a", "b"]
    query = "select id, arg, token from bgjob_job"
    assert rows(worker, query) == [("a", b"newest", None)]
