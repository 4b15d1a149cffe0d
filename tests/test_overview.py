"""An overview counts the jobs of each queue up to a cap, and the ages are exact."""

import re
import threading
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
import yaml
from support.clients import Blocking, Colour, dead_letter
from support.documents import DOCS
from support.waiting import PATIENCE, eventually

from bgjob import (
    AsyncClient,
    CappedCount,
    Client,
    Complete,
    EnqueueRequest,
    Mux,
    QueueOverview,
    Retry,
    Worker,
    cli,
)

HELD: LiteralString = "token = 1, attempt = 1, lease_until = now() + interval '1 h'"
ENDED: LiteralString = "token = 1, attempt = 1, lease_until = now() - interval '1 h'"
LATER: LiteralString = "next_run_at = now() + interval '1 h'"
EARLIER: LiteralString = "next_run_at = now() - interval '1 h'"


def write(
    conn: psycopg.Connection, *settings: LiteralString, queue: str = "q", jobs: int = 1
) -> None:
    """Write jobs with columns in any state that can occur."""
    for _ in range(jobs):
        conn.execute("insert into bgjob_job (id, queue, type) values ('new', %s, 't')", [queue])
        conn.execute(
            "update bgjob_job set "
            + ", ".join(["id = gen_random_uuid()", *settings])
            + " where id = 'new'"
        )


def overview(client: Any, queue: str = "q", *, cap: int = 1000) -> QueueOverview:
    """Return the overview of a queue, which is the same from that of all."""
    of_queue: QueueOverview
    [of_queue] = client.overview(queue, cap=cap).queues
    assert of_queue.queue == queue
    [in_all] = [q for q in client.overview(cap=cap).queues if q.queue == queue]
    assert (in_all.due, in_all.delayed, in_all.running) == (
        of_queue.due,
        of_queue.delayed,
        of_queue.running,
    )
    return of_queue


def numbers(queue: QueueOverview) -> tuple[str, ...]:
    """Return the texts of due, delayed, running, waiting and dead jobs."""
    counts = queue.due, queue.delayed, queue.running, queue.waiting_for_keys, queue.dead
    return tuple(map(str, counts))


# -- what is counted ------------------------------------------------------------------------


def test_an_empty_database_has_no_queues(client: Any) -> None:
    assert client.overview().queues == ()
    assert client.overview("q").queues == ()


def test_each_job_is_counted_once_as_due_delayed_running_or_dead(
    client: Any, conn: psycopg.Connection
) -> None:
    dead_letter(client, EnqueueRequest("a", "x"), EnqueueRequest("gone", "x"))
    write(conn, queue="a", jobs=3)
    write(conn, LATER, queue="a", jobs=2)
    write(conn, HELD, queue="b", jobs=2)
    write(conn, ENDED, queue="b")
    write(conn, "attempt = 2, last_error = 'why'", LATER, queue="b")
    counted = {queue.queue: numbers(queue) for queue in client.overview().queues}
    assert counted == {
        "a": ("3", "2", "0", "0", "1"),
        "b": ("1", "1", "2", "0", "0"),
        "gone": ("0", "0", "0", "0", "1"),
    }


def test_a_job_is_counted_by_its_state_throughout_its_life(colour: Colour, client: Any) -> None:
    seen: list[QueueOverview] = []
    other = Colour(colour.dsn, is_async=False)

    def look(_: Any) -> Retry:
        seen.extend(other.client().overview().queues)
        return Retry(3600, error="why")

    client.enqueue(EnqueueRequest("q", "t"))
    waiting = overview(client)
    try:
        client.do("q", Mux().register("t", look))
    finally:
        other.close()
    [running] = seen
    failed = overview(client)
    assert [numbers(q)[:3] for q in (waiting, running, failed)] == [
        ("1", "0", "0"),
        ("0", "0", "1"),
        ("0", "1", "0"),
    ]
    ages = [q.oldest_due_age is None for q in (waiting, running, failed)]
    assert ages == [False, True, True]


def test_the_age_is_that_of_the_oldest_job_that_is_due_in_any_priority(
    client: Any, conn: psycopg.Connection
) -> None:
    write(conn, EARLIER)
    write(conn, "next_run_at = now() - interval '2 h'", "priority = 7")
    write(conn, "next_run_at = now() - interval '9 h'", HELD)
    write(conn, LATER, "priority = -7")
    for cap in (1, 1000):
        age = overview(client, cap=cap).oldest_due_age
        assert age is not None
        assert 2 * 3600 <= age < 3 * 3600


def test_jobs_that_wait_for_a_key_are_counted_apart(client: Any, conn: psycopg.Connection) -> None:
    conn.execute("insert into bgjob_exclusive (key) values ('k'), ('l'), ('m')")
    write(conn, "exclusive = 'k'", "waits = true", jobs=2)
    write(conn, "exclusive = 'k'", "waits = true", queue="elsewhere")
    write(conn, "exclusive = 'm'", "waits = true", LATER)
    write(conn, "exclusive = 'l'")
    assert numbers(overview(client)) == ("1", "0", "0", "3", "0")
    # It has no other jobs.
    assert numbers(overview(client, "elsewhere")) == ("0", "0", "0", "1", "0")


def test_jobs_that_a_worker_put_aside_are_shown_while_another_has_their_key(dsn: str) -> None:
    may_end = threading.Event()

    def wait(_: Any) -> Complete:
        may_end.wait(PATIENCE)
        return Complete()

    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", exclusive="k") for _ in range(3)])
        with Worker(client, "q", Mux().register("t", wait), concurrency=3):
            aside = [("0", "0", "1", "2", "0")]
            assert eventually(lambda: [*map(numbers, client.overview().queues)] == aside)
            may_end.set()
            assert eventually(lambda: client.overview().queues == ())


def test_dead_jobs_are_those_of_the_last_hour(client: Any, conn: psycopg.Connection) -> None:
    dead_letter(client, *[EnqueueRequest("q", "t", id=id_) for id_ in "abc"])
    ago: LiteralString = "update bgjob_dead_job set moved_at = now() - interval '61 min'"
    conn.execute(ago + " where job_id = 'a'")
    assert overview(client).dead == CappedCount(2, is_exact=True)
    conn.execute(ago)
    assert client.overview().queues == ()


def test_a_paused_queue_is_shown_with_its_end_and_without_jobs(client: Any) -> None:
    until = datetime.now(UTC) + timedelta(hours=1)
    client.pause("endless")
    client.pause("timed", until)
    client.enqueue(EnqueueRequest("timed", "t"))
    client.enqueue(EnqueueRequest("open", "t"))
    shown = {q.queue: (q.is_paused, q.paused_until) for q in client.overview().queues}
    assert shown == {"endless": (True, None), "open": (False, None), "timed": (True, until)}
    assert client.overview("endless").queues[0].is_paused
    client.resume("endless")
    client.resume("timed")
    assert [q.queue for q in client.overview().queues if q.is_paused] == []
    client.pause("over", datetime.now(UTC) - timedelta(seconds=1))
    assert [q.queue for q in client.overview().queues] == ["open", "timed"]


def test_the_queues_are_sorted_by_name_and_the_time_is_the_databases(
    client: Any, conn: psycopg.Connection
) -> None:
    for queue in ("z", "A", "b", "ä"):
        write(conn, queue=queue)
    before = conn.execute("select clock_timestamp()").fetchone()
    seen = client.overview()
    after = conn.execute("select clock_timestamp()").fetchone()
    assert [q.queue for q in seen.queues] == ["A", "b", "z", "ä"]
    assert before is not None
    assert after is not None
    assert before[0] <= seen.at <= after[0]


# -- the cap --------------------------------------------------------------------------------


def test_counts_stop_at_the_cap_and_say_so(client: Any, conn: psycopg.Connection) -> None:
    dead_letter(client, *[EnqueueRequest("q", "t", id=f"dead {n}") for n in range(6)])
    conn.execute("insert into bgjob_exclusive (key) values ('k')")
    write(conn, jobs=6)
    write(conn, LATER, jobs=6)
    write(conn, "exclusive = 'k'", "waits = true", jobs=6)
    # As many as the cap may be more.
    for cap in (5, 6):
        assert numbers(overview(client, cap=cap)) == (
            f"{cap}+",
            f"{cap}+",
            "0+",
            f"{cap}+",
            f"{cap}+",
        )
    assert numbers(overview(client, cap=7)) == ("6", "6", "0", "6", "6")
    assert str(CappedCount(1000, is_exact=False)) == "1,000+"


def test_a_cap_counts_for_each_priority(client: Any, conn: psycopg.Connection) -> None:
    for priority in ("priority = -1", "priority = 0", "priority = 9"):
        write(conn, priority, jobs=3)
    assert str(overview(client, cap=2).due) == "6+"
    assert str(overview(client, cap=4).due) == "9"


def test_running_jobs_at_the_front_do_not_hide_those_that_are_due(
    client: Any, conn: psycopg.Connection
) -> None:
    write(conn, HELD, "next_run_at = now() - interval '2 h'", jobs=5)
    write(conn, EARLIER, jobs=2)
    seen = overview(client, cap=3)
    assert numbers(seen)[:3] == ("2", "0", "3+")
    assert seen.oldest_due_age is not None
    assert 3600 <= seen.oldest_due_age < 2 * 3600
    write(conn, EARLIER)
    assert numbers(overview(client, cap=3))[:3] == ("3+", "0", "3+")


@pytest.mark.parametrize("cap", [0, -1])
def test_a_cap_below_one_is_refused(client: Any, cap: int) -> None:
    with pytest.raises(ValueError, match=f"cap must be a number from 1, not {cap}"):
        client.overview(cap=cap)


# -- circumstances --------------------------------------------------------------------------


def test_in_the_callers_transaction_its_own_jobs_are_due(colour: Colour, client: Any) -> None:
    caller = colour.connect()
    caller.execute("select 1")  # its now() stands still from here
    client.enqueue(EnqueueRequest("q", "t"), conn=caller)
    [counted] = client.overview(conn=caller).queues
    assert numbers(counted)[:2] == ("1", "0")
    assert counted.oldest_due_age >= 0
    assert client.overview().queues == ()
    caller.rollback()


def test_the_settings_for_an_overview_end_with_it(colour: Colour) -> None:
    pool = colour.pool()
    colour.client(pool).overview()
    session = Blocking(pool.getconn(), colour.run)
    settings = "select current_setting('jit'), current_setting('enable_bitmapscan')"
    answer = Blocking(session.execute(settings), colour.run).fetchone()
    pool.putconn(session.target)
    assert answer == ("on", "on")


def test_a_row_spoiled_by_hand_hides_no_other(client: Any, conn: psycopg.Connection) -> None:
    for due in ("'-infinity'", "'infinity'", "now()"):
        write(conn, f"next_run_at = {due}")
    conn.execute("insert into bgjob_pause (queue, until) values ('p', 'infinity')")
    counted = overview(client)
    assert numbers(counted)[:2] == ("2", "1")
    assert counted.oldest_due_age is not None
    assert counted.oldest_due_age > 0


# -- for a scaler ---------------------------------------------------------------------------


def keda_query() -> str:
    """Return the query of the trigger that the document shows."""
    [block] = re.findall(
        r"```yaml\n(triggers:.*?)```", (DOCS / "operations.md").read_text("utf-8"), re.DOTALL
    )
    [trigger] = yaml.safe_load(block)["triggers"]
    query = trigger["metadata"]["query"]
    assert isinstance(query, str)
    return query


def test_the_scalers_number_is_that_of_due_and_running_jobs_of_every_priority(
    dsn: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers() -> tuple[int, int]:
        [number] = conn.execute(keda_query().encode()).fetchall()
        assert cli.main(["stats", "--scale", "mail", "--dsn", dsn]) == 0
        return number[0], int(capsys.readouterr().out)

    assert answers() == (0, 0)
    write(conn, queue="mail", jobs=3)
    write(conn, "priority = -7", HELD, queue="mail", jobs=2)
    write(conn, "priority = 32767", ENDED, queue="mail")
    assert answers() == (6, 6)
    # None of these needs another worker.
    write(conn, LATER, queue="mail")
    write(conn, "exclusive = 'k'", "waits = true", queue="mail")
    write(conn, queue="mailbox")
    write(conn, queue="maid")
    assert answers() == (6, 6)
    conn.execute("delete from bgjob_job where lease_until is null or lease_until < now()")
    assert answers() == (2, 2)


def test_the_scalers_number_stops_at_a_cap(
    dsn: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type) "
        "select n, 'mail', 't' from generate_series(1, 6000) n"
    )
    [number] = conn.execute(keda_query().encode()).fetchall()
    assert number == (1000,)
    assert cli.main(["stats", "--scale", "mail", "--dsn", dsn]) == 0
    assert capsys.readouterr().out == "5000\n"


def test_a_queue_and_a_scale_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main("stats --queue q --scale q".split())
    assert exit.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_the_help_of_stats_says_that_it_counts_exactly(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["stats", "--help"])
    assert "exactly" in capsys.readouterr().out
    assert all("exactly" in (c.stats.__doc__ or "") for c in (Client, AsyncClient))
