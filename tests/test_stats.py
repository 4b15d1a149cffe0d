"""Stats count due, delayed, running, dead and retried jobs, by queue and type, at one moment."""

from typing import Any, LiteralString

import psycopg
import pytest
from support.clients import Colour, dead_letter

from bgjob import Complete, EnqueueRequest, Mux, QueueStats, Retry
from bgjob._sql.views import stats


def write(conn: psycopg.Connection, settings: LiteralString, *, queue: str, type: str) -> None:
    """Write a job with columns in any state that can occur."""
    conn.execute("insert into bgjob_job (id, queue, type) values ('new', %s, %s)", [queue, type])
    conn.execute("update bgjob_job set id = gen_random_uuid(), " + settings + " where id = 'new'")


HELD: LiteralString = "token = 1, attempt = 1, lease_until = now() + interval '1 h'"
ENDED: LiteralString = "token = 1, attempt = 1, lease_until = now() - interval '1 h'"
FAILED: LiteralString = "attempt = 2, last_error = 'why', next_run_at = now() + interval '1 h'"


def test_an_empty_database_has_no_stats(client: Any) -> None:
    assert client.stats() == []
    assert client.stats("q") == []


def test_each_job_is_counted_once_as_due_delayed_running_or_dead(
    client: Any, conn: psycopg.Connection
) -> None:
    dead_letter(client, EnqueueRequest("a", "x"), EnqueueRequest("a", "gone"))
    client.bulk_enqueue([EnqueueRequest("a", "x", delay=3600) for _ in range(2)])
    client.bulk_enqueue([EnqueueRequest("a", "x") for _ in range(3)])
    client.bulk_enqueue([EnqueueRequest("b", "x"), EnqueueRequest("a", "y")])
    for settings in (HELD, HELD, ENDED, FAILED):
        write(conn, settings, queue="b", type="z")
    counted = {(s.queue, s.type): s for s in client.stats()}
    assert list(counted) == [("a", "gone"), ("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")]

    def numbers(queue: str, type: str) -> tuple[int, ...]:
        s = counted[queue, type]
        return s.due, s.delayed, s.running, s.dead, s.retries

    assert numbers("a", "gone") == (0, 0, 0, 1, 0)
    assert numbers("a", "x") == (3, 2, 0, 1, 0)
    assert numbers("a", "y") == (1, 0, 0, 0, 0)
    assert numbers("b", "x") == (1, 0, 0, 0, 0)
    assert numbers("b", "z") == (1, 1, 2, 0, 2)


def test_a_job_is_counted_by_its_state_throughout_its_life(client: Any) -> None:
    client.enqueue(EnqueueRequest("q", "t"))

    def numbers(s: QueueStats) -> tuple[int, ...]:
        return s.due, s.delayed, s.running, s.dead, s.retries

    [waiting] = client.stats()
    client.do("q", Mux().register("t", lambda _: Retry(3600, error="why")))
    [failed] = client.stats()
    assert (numbers(waiting), numbers(failed)) == ((1, 0, 0, 0, 0), (0, 1, 0, 0, 1))
    assert (waiting.oldest_due_age is None, failed.oldest_due_age) == (False, None)


def test_a_job_in_its_handler_is_running(colour: Colour, client: Any) -> None:
    seen: list[list[QueueStats]] = []
    other = Colour(colour.dsn, is_async=False)

    def look(_: Any) -> Complete:
        seen.append(other.client().stats())
        return Complete()

    try:
        client.enqueue(EnqueueRequest("q", "t"))
        client.do("q", Mux().register("t", look))
    finally:
        other.close()
    assert seen == [[QueueStats("q", "t", 0, 0, 1, 0, None, 0)]]


def test_the_age_is_that_of_the_oldest_job_that_is_due(
    client: Any, conn: psycopg.Connection
) -> None:
    for settings in (
        "next_run_at = now() - interval '1 h'",
        "next_run_at = now() - interval '2 h'",
        "next_run_at = now() - interval '9 h', lease_until = now() + interval '1 h'",
        "next_run_at = now() + interval '9 h'",
    ):
        write(conn, settings, queue="q", type="t")
    [counted] = client.stats()
    assert (counted.due, counted.running, counted.delayed) == (2, 1, 1)
    assert 2 * 3600 <= counted.oldest_due_age < 3 * 3600


def test_one_queue_can_be_asked_for(client: Any) -> None:
    dead_letter(client, EnqueueRequest("a", "x"), EnqueueRequest("b", "x"))
    client.bulk_enqueue([EnqueueRequest("a", "y"), EnqueueRequest("b", "y")])
    assert [(s.queue, s.type, s.due, s.dead) for s in client.stats("b")] == [
        ("b", "x", 0, 1),
        ("b", "y", 1, 0),
    ]
    assert client.stats("c") == []


def test_in_the_callers_transaction_its_own_jobs_are_due(colour: Colour, client: Any) -> None:
    caller = colour.connect()
    caller.execute("select 1")  # its now() stands still from here
    client.enqueue(EnqueueRequest("q", "t"), conn=caller)
    [counted] = client.stats(conn=caller)
    assert (counted.due, counted.delayed) == (1, 0)
    assert counted.oldest_due_age >= 0
    assert client.stats() == []
    caller.rollback()


def test_a_row_spoiled_by_hand_hides_no_other(client: Any, conn: psycopg.Connection) -> None:
    for due in ("'-infinity'", "'infinity'", "now()"):
        write(conn, f"next_run_at = {due}", queue="q", type="t")
    [counted] = client.stats()
    assert (counted.due, counted.delayed) == (2, 1)
    assert counted.oldest_due_age > 0


@pytest.mark.parametrize("queue", [None, "q"])
def test_stats_are_one_statement_that_reads_each_table_once(
    conn: psycopg.Connection, queue: str | None
) -> None:
    statement = stats(queue)
    text = f"explain (format json) {statement.text!s}"
    [[[plan]]] = conn.execute(text.encode(), statement.params).fetchall()

    def tables(node: dict[str, Any]) -> list[str]:
        below = [name for child in node.get("Plans", []) for name in tables(child)]
        return [*below, *([node["Relation Name"]] if "Relation Name" in node else [])]

    assert sorted(tables(plan["Plan"])) == ["bgjob_dead_job", "bgjob_job"]
