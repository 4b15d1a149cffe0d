"""Clients of both colours look at live jobs, and cancel, hasten and reorder them."""

import threading
from typing import Any, LiteralString

import psycopg
import pytest
from support.clients import HOSTILE, Colour
from support.database import clock, count, row, rows
from support.jobs import requests
from support.statements import LONG_AGO, ask

from bgjob import EnqueueRequest, jobs
from bgjob._sql import steering
from bgjob._sql.claims import claim, claim_any
from bgjob._sql.key_rows import lock_keys
from bgjob._sql.keys import acquire, release
from bgjob._sql.leases import extend
from bgjob._sql.settlements import Claimed, complete, release_jobs
from bgjob._sql.tokens import EPOCH
from bgjob._sql import job_pages
from bgjob.jobs import JobChanges, JobPage, LiveJob

WAITING: LiteralString = "select id from bgjob_job where waits order by id"
CANCELLED: LiteralString = "select job_id, last_error from bgjob_dead_job order by id"


def claimed(conn: psycopg.Connection, *ids: str, token: int = 1) -> None:
    """Claim jobs, as if a worker without a row in bgjob_worker had."""
    conn.execute(
        "update bgjob_job set token = %s, lease_until = now() + interval '1 h', "
        "attempt = attempt + 1 where id = any (%s)",
        [token, list(ids)],
    )


# -- looks ----------------------------------------------------------------------------------


STATES: dict[str, LiteralString] = {
    "running": "token = 7, lease_until = now() + interval '1 min', attempt = 1",
    "due": "attempt = 0",
    "delayed": "next_run_at = now() + interval '1 h'",
    "retry": "next_run_at = now() + interval '1 h', attempt = 2",
    "key": "exclusive = 'k', waits = true",
    "suspect": "deaths = 2, attempt = 1",
}


@pytest.fixture
def states(client: Any, conn: psycopg.Connection) -> None:
    """A job in each state, of queues 'q' and 'other', and many that no filter finds."""
    for queue in ("q", "other"):
        for state, values in STATES.items():
            client.enqueue(EnqueueRequest(queue, state, {"n": 1}, id=f"{queue} {state}"))
            conn.execute(f"update bgjob_job set {values} where id = %s", [f"{queue} {state}"])
    conn.execute("insert into bgjob_exclusive (key) values ('k')")


@pytest.mark.usefixtures("states")
@pytest.mark.parametrize("state", STATES)
def test_each_job_is_in_one_state_and_is_listed_by_it(client: Any, state: Any) -> None:
    job: LiveJob = client.jobs.get(f"q {state}")
    assert (job.id, job.queue, job.type, job.state) == (f"q {state}", "q", state, state)
    assert (job.arg, job.size) == (b'{"n":1}', 7)
    by_state = client.jobs.list(state=state)
    assert sorted(job.id for job in by_state.jobs) == [f"other {state}", f"q {state}"]
    assert by_state.next is None
    assert [job.id for job in client.jobs.list(state=state, queue="q").jobs] == [f"q {state}"]
    assert [job.id for job in client.jobs.list(state=state, prefix="q").jobs] == [f"q {state}"]
    assert [job.arg for job in by_state.jobs] == [None, None]
    assert client.jobs.matching(state=state, queue="q") == [f"q {state}"]


FILTERS: list[tuple[dict[str, Any], LiteralString]] = [
    ({}, "true"),
    ({"prefix": "job 1"}, "id like 'job 1%%'"),
    ({"prefix": "job é"}, "id like 'job é%%'"),
    ({"queue": "q"}, "queue = 'q'"),
    ({"queue": "q", "type": "u"}, "queue = 'q' and type = 'u'"),
    ({"queue": "q", "state": "due"}, "queue = 'q' and not waits and next_run_at <= now()"),
    ({"queue": "q", "state": "key"}, "queue = 'q' and waits"),
    ({"queue": "q", "state": "delayed"}, "queue = 'q' and not waits and next_run_at > now()"),
    ({"exclusive": "even"}, "exclusive = 'even'"),
    ({"exclusive": "even", "state": "key"}, "exclusive = 'even' and waits"),
    ({"type": "u"}, "type = 'u'"),
    ({"error": "100 % 'of'"}, "last_error is not null"),
    ({"state": "due", "error": "of"}, "last_error is not null and not waits"),
]


@pytest.fixture
def many(client: Any, conn: psycopg.Connection) -> None:
    """25 jobs with all kinds of ties."""
    ids = [f"job {n:02}" for n in range(23)] + ["job é 1", "job é 2"]
    client.bulk_enqueue(
        EnqueueRequest(
            "q" if n % 5 else "other", "tu"[n % 2], id=id_, priority=n % 3, delay=3600 * (n > 20)
        )
        for n, id_ in enumerate(ids)
    )
    conn.execute(
        """
        update bgjob_job set exclusive = 'even', waits = n % 6 = 0
        from (select row_number() over (order by id) as n, id from bgjob_job) as of
        where of.id = bgjob_job.id and n % 3 = 0
        """
    )
    conn.execute("insert into bgjob_exclusive (key) values ('even'), ('none')")
    conn.execute(
        "update bgjob_job set next_run_at = date_trunc('hour', next_run_at), "
        "last_error = case when id like '%4' or id like '%8' then '100 % ''of'' them, say' end"
    )


def test_a_page_that_is_full_has_looked_at_few_rows(client: Any, conn: psycopg.Connection) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type) select n::text, 'q', 't' "
        "from generate_series(1, 3000) n"
    )
    page = client.jobs.list(queue="q", state="due", limit=50)
    assert (len(page.jobs), page.looked_at) == (50, 1000)
    assert client.jobs.list(queue="q", limit=50).looked_at == 50
    none = client.jobs.list(queue="q", type="u")
    assert (none.jobs, none.looked_at, none.next) == ((), 3000, None)


@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize(("filters", "condition"), FILTERS)
@pytest.mark.usefixtures("many")
def test_the_pages_of_a_list_have_each_job_once(
    client: Any,
    conn: psycopg.Connection,
    filters: dict[str, Any],
    condition: LiteralString,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_pages, "FIRST_ROWS", 2)  # several looks a page
    query: LiteralString = f"select id from bgjob_job where {condition} order by id"
    expected = [id_ for [id_] in rows(conn, query)]
    assert expected

    found: list[str] = []
    after = None
    while True:
        page: JobPage = client.jobs.list(after=after, limit=limit, **filters)
        assert len(page.jobs) <= limit
        found += [job.id for job in page.jobs]
        after = page.next
        if after is None:
            break
    assert sorted(found) == expected
    if filters:
        assert sorted(client.jobs.matching(**filters)) == expected


def test_a_page_of_another_list_is_refused(client: Any) -> None:
    client.bulk_enqueue(requests("a", "b", "c"))
    after = client.jobs.list(limit=1).next
    assert [job.id for job in client.jobs.list(after=after, limit=1).jobs] == ["b"]
    for text in ("", "b", "ids", "ids[1]", 'line[0,"never",0]', 'ids["a","b"]', "blocks[[]]"):
        with pytest.raises(ValueError, match="`next` of a page"):
            client.jobs.list(after=text)
    with pytest.raises(ValueError, match="same filters"):
        client.jobs.list(after=after, queue="q")


def test_a_filter_that_cannot_be_meant_is_refused(client: Any) -> None:
    for method in ("cancel", "abandon", "run_now", "matching"):
        with pytest.raises(TypeError, match="which jobs"):
            getattr(client.jobs, method)()
    with pytest.raises(TypeError, match="'name' is not a filter"):
        client.jobs.list(name="x")
    with pytest.raises(ValueError, match="state must be one of running"):
        client.jobs.list(state="dead")
    with pytest.raises(ValueError, match="without NUL"):
        client.jobs.list(error="\0")
    with pytest.raises(ValueError, match="queue must have 1 to"):
        client.jobs.list(queue="")
    with pytest.raises(ValueError, match="limit must be"):
        client.jobs.list(limit=0)
    with pytest.raises(ValueError, match="priority must be"):
        client.jobs.set_priority("a", priority=40_000)
    with pytest.raises(ValueError, match="id must have"):
        client.jobs.cancel(["a", ""])


def test_a_running_job_tells_who_runs_it_and_since_when(
    client: Any, conn: psycopg.Connection
) -> None:
    client.bulk_enqueue(requests("a", "b", "c", "d"))
    conn.execute(
        "insert into bgjob_worker (host, pid, program, version, queues, slots, types, lease, every)"
        " select 'web-' || n, n, 'shop', '1', '{q}', '{1}', '{t}', 30, 10"
        " from generate_series(1, 2) n"
    )
    at = clock(conn).replace(microsecond=0)
    claimed(conn, "a", token=int((at - EPOCH).total_seconds() * 1000) << 21 | 2)
    claimed(conn, "b", token=int((at - EPOCH).total_seconds() * 1000) << 21 | 99)
    claimed(conn, "c", token=2**62)
    found = {job.id: job for job in client.jobs.list(queue="q").jobs}
    worker = found["a"].worker
    assert worker is not None
    assert (worker.number, worker.host, worker.pid, worker.state) == (2, "web-2", 2, "working")
    assert (found["a"].claimed_at, found["a"].attempt) == (at, 1)
    assert 3500 < (found["a"].lease_left or 0) <= 3600
    for id_ in "bcd":  # no such worker, no such time, no claim
        assert (found[id_].claimed_at, found[id_].worker) == (None, None)
    assert [found[id_].state for id_ in "abcd"] == ["running", "running", "running", "due"]


# -- actions --------------------------------------------------------------------------------


def test_jobs_are_cancelled_whether_they_wait_or_run(client: Any, conn: psycopg.Connection) -> None:
    client.bulk_enqueue(requests("due", "delayed", "running", "retry", delay=60))
    claimed(conn, "running", token=5)
    conn.execute("update bgjob_job set attempt = 3, last_error = 'e' where id = 'retry'")
    client.enqueue(EnqueueRequest("q", "t", b"\0", id="left", priority=3, exclusive="k"))
    changes = client.jobs.cancel(
        ["retry", "due", "running", "none", "due", "delayed"], by="ann", reason="a\nb"
    )
    assert changes == JobChanges(("retry", "due", "delayed"), ("running",), {"none": "absent"})
    assert sorted(rows(conn, CANCELLED)) == [
        (id_, "cancelled by ann: a\nb") for id_ in ("delayed", "due", "retry", "running")
    ]
    assert rows(conn, "select job_id from bgjob_dead_job where token = 5") == [("running",)]
    assert rows(conn, "select id from bgjob_job") == [("left",)]
    again = client.jobs.cancel(["retry", "left"])
    assert again == JobChanges(("left",), (), {"retry": "dead"})
    [(_, error)] = rows(conn, CANCELLED)[4:]
    assert error == f"cancelled by {conn.info.user}"
    assert client.dlq.requeue("left") == ["left"]
    job = client.jobs.get("left")
    assert (job.arg, job.priority, job.exclusive, job.state) == (b"\0", 3, "k", "due")


def test_a_cancelled_attempt_settles_and_extends_nothing(
    client: Any, worker: psycopg.Connection
) -> None:
    client.bulk_enqueue(requests("a"))
    [job] = ask(worker, claim_any("q", lease=60, token=9))
    client.jobs.cancel("a")
    client.dlq.requeue("a")
    held = Claimed(job, 9)
    for statement in (
        complete([held]),
        extend([held], lease=60.0),
        release_jobs("q", [held], tell=False),
    ):
        assert ask(worker, statement) == []
    assert client.jobs.get("a").state == "due"


def test_only_running_jobs_are_abandoned(client: Any, conn: psycopg.Connection) -> None:
    client.bulk_enqueue(requests("a", "b"))
    claimed(conn, "b", token=5)
    changes = client.jobs.abandon(["a", "b", "c"], by="ann", reason="it hangs")
    assert changes == JobChanges((), ("b",), {"a": "waiting", "c": "absent"})
    assert rows(conn, "select job_id, last_error, token from bgjob_dead_job") == [
        ("b", "abandoned by ann: it hangs", None)
    ]


def test_delayed_jobs_are_due_now_and_never_in_the_past(
    client: Any, conn: psycopg.Connection
) -> None:
    client.bulk_enqueue(requests("delayed", "running", delay=60))
    client.bulk_enqueue(requests("due", "waits", exclusive="k"))
    claimed(conn, "running")
    conn.execute("update bgjob_job set next_run_at = 'infinity' where id = 'delayed'")
    before = clock(conn)
    changes = client.jobs.run_now(["delayed", "running", "due", "none"])
    assert changes.waiting == ("delayed",)
    assert changes.unchanged == {"running": "running", "due": "due", "none": "absent"}
    [at] = row(conn, "select next_run_at from bgjob_job where id = 'delayed'")
    assert before <= at <= clock(conn)


def test_a_new_priority_puts_a_job_behind_its_equals(client: Any, conn: psycopg.Connection) -> None:
    client.bulk_enqueue(requests("a", "b", "c"))
    client.bulk_enqueue(requests("d", "e", priority=5))
    client.bulk_enqueue(requests("later", delay=3600))
    client.bulk_enqueue(requests("keyed", exclusive="k"))
    conn.execute("update bgjob_job set waits = true where id = 'keyed'")
    claimed(conn, "c")
    times = dict(rows(conn, "select id, next_run_at from bgjob_job"))
    changes = client.jobs.set_priority(["b", "later", "c", "d", "keyed"], priority=5)
    assert changes == JobChanges(("b", "later", "keyed"), (), {"c": "running", "d": "same"})
    order: LiteralString = "select id from bgjob_job where not waits order by priority, next_run_at"
    assert [id_ for [id_] in rows(conn, order)] == ["a", "c", "d", "e", "b", "later"]
    after = dict(rows(conn, "select id, next_run_at from bgjob_job"))
    assert {id_ for id_ in times if times[id_] != after[id_]} == {"b"}


@pytest.mark.usefixtures("many")
def test_actions_by_filter_change_what_matches_and_no_more(
    client: Any, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "MOST", 3)
    before = count(conn)
    expected = set(client.jobs.matching(queue="q", type="u"))
    changes = client.jobs.cancel(queue="q", type="u")
    assert set(changes.waiting) == expected
    assert count(conn) == before - len(expected)
    assert client.jobs.matching(queue="q", type="u") == []
    assert client.jobs.cancel(["job 02", "job 00"], queue="q").unchanged == {"job 00": "unmatched"}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_listed_and_cancelled(client: Any, text: str) -> None:
    client.enqueue(EnqueueRequest(text, text, id=text, exclusive="k"))
    assert client.jobs.get(text).queue == text
    for filters in ({"queue": text}, {"type": text}, {"prefix": text}):
        assert [job.id for job in client.jobs.list(**filters).jobs] == [text]
    assert client.jobs.cancel(text, by=text, reason=text).changed == (text,)
    assert client.dlq.get(text).last_error == f"cancelled by {text}: {text}"


def test_actions_join_the_callers_transaction(
    client: Any, colour: Colour, conn: psycopg.Connection
) -> None:
    caller = colour.connect()
    client.bulk_enqueue(requests("a", "b", delay=60), conn=caller)
    assert client.jobs.list(queue="q", conn=caller).jobs[0].id == "a"
    assert client.jobs.run_now("a", conn=caller).changed == ("a",)
    assert client.jobs.cancel(queue="q", conn=caller).changed == ("a", "b")
    assert client.jobs.get("a", conn=caller) is None
    caller.rollback()
    assert count(conn) == count(conn, "bgjob_dead_job") == 0


def test_a_locked_job_is_looked_at_again_and_left_after_a_second(
    client: Any, colour: Colour, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.bulk_enqueue(requests("a", "b"))
    with psycopg.connect(colour.dsn) as other:
        other.execute("select from bgjob_job where id = 'a' for update")
        monkeypatch.setattr(jobs, "_PATIENCE", 0.02)
        assert client.jobs.cancel(["a", "b"]) == JobChanges(("b",), (), {"a": "locked"})
        monkeypatch.undo()
        other.execute("update bgjob_job set token = 3, lease_until = now() where id = 'a'")
        threading.Timer(0.05, other.commit).start()
        assert client.jobs.cancel("a") == JobChanges((), ("a",))


# -- keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["holder", "next"])
def test_the_next_job_of_a_key_is_woken_when_one_before_it_is_cancelled(
    client: Any, worker: psycopg.Connection, victim: str
) -> None:
    client.bulk_enqueue(requests("1", "2", "3", exclusive="k"))
    holders: list[Claimed] = []
    for token, has_key in (8, True), (9, False):
        claims = ask(
            worker, claim("q", limit=token - 7, lease=60, token=token, marks={0: LONG_AGO})
        )
        held = [Claimed(job, token) for job in claims]
        with worker.transaction():
            ask(worker, lock_keys(["k"]))
            assert {*ask(worker, acquire("q", held)).values()} == {has_key}
        holders += held if has_key else []
    assert rows(worker, WAITING) == [("2",), ("3",)]
    if victim == "next":
        ask(worker, complete(holders))
        with worker.transaction():
            ask(worker, lock_keys(["k"]))
            assert len(ask(worker, release("q", ["k"]))) == 1
        assert client.jobs.cancel("2").waiting == ("2",)
        assert rows(worker, WAITING) == []
        assert client.jobs.cancel("3").waiting == ("3",)
        assert count(worker, "bgjob_exclusive") == 0
    else:
        assert client.jobs.cancel("3").waiting == ("3",)
        assert rows(worker, WAITING) == [("2",)]
        assert client.jobs.cancel("1").running == ("1",)
        assert rows(worker, WAITING) == []
