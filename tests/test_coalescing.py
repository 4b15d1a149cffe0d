"""An enqueue whose id is taken is refused, skipped, or replaces: the newest request wins."""

import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege
from support.clients import Colour
from support.database import all_done, clock, row, rows
from support.documents import SCRIPT
from support.roles import Roles
from support.statements import ask
from support.waiting import NEVER, eventually
from support.workers import Gate, Launcher, Recorder

from bgjob import (
    Client,
    EnqueueConflictError,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
    sql,
)
from bgjob._sql.claims import claim_any, sweep

HOUR = timedelta(hours=1)


def request(id: str = "a", arg: Any = b"new", **options: Any) -> EnqueueRequest:
    return EnqueueRequest("q", "t", arg, id=id, **options)


SETTINGS = "queue, type, arg, priority, exclusive, headers, expires"


# -- a job that waits ------------------------------------------------------------------


def test_skip_writes_nothing_and_returns_none(client: Any, conn: psycopg.Connection) -> None:
    assert client.enqueue(request(arg=b"old"), on_conflict="skip") == "a"
    assert client.enqueue(request(), on_conflict="skip") is None
    with pytest.raises(JobAlreadyExistsError):
        client.enqueue(request(), on_conflict="raise")
    assert rows(conn, "select arg from bgjob_job") == [(b"old",)]


@pytest.mark.parametrize("how", ["one", "many"])
def test_a_job_that_waits_becomes_the_new_request_and_keeps_its_id_and_the_time_of_its_enqueue(
    client: Any, conn: psycopg.Connection, how: str
) -> None:
    client.enqueue(request(arg=b"old", headers={"n": 1}, exclusive="k", delay=60, expires=HOUR))
    [(created,)] = rows(conn, "select created_at from bgjob_job")
    new = EnqueueRequest(
        "other", "new", b"\0new", id="a", priority=-3, exclusive="k2", headers={"n": None}
    )
    if how == "one":
        assert client.enqueue(new, on_conflict="replace") == "a"
    else:
        found = client.bulk_enqueue([request("b"), new, request("b")], on_conflict="replace")
        assert found == ["b", "a", "b"]
    assert row(conn, f"select {SETTINGS} from bgjob_job where id = 'a'") == (
        ("other", "new", b"\0new", -3, "k2", {"n": None}, None)
    )
    query = "select created_at, next_run_at, successor is null from bgjob_job where id = 'a'"
    assert row(conn, query)[::2] == (created, True)
    assert created < row(conn, query)[1] <= clock(conn)
    assert row(conn, "select count(*) from bgjob_job") == (1 if how == "one" else 2,)


def test_an_id_that_is_free_is_written_as_by_any_enqueue(
    client: Any, conn: psycopg.Connection
) -> None:
    new = request(priority=4, exclusive="k", headers={"n": 1}, delay=60, expires=HOUR)
    client.enqueue(new, on_conflict="replace")
    client.enqueue(
        request("b", priority=4, exclusive="k", headers={"n": 1}, delay=60, expires=HOUR)
    )
    a, b = rows(
        conn,
        "select queue, type, arg, priority, exclusive, headers::text, attempt, waits, deaths, "
        "extract(epoch from next_run_at - created_at)::int, "
        "extract(epoch from expires - created_at)::int from bgjob_job order by id",
    )
    assert a == b and a[-2:] == (60, 3600)


def test_of_several_requests_in_one_call_the_last_counts_and_many_are_written(
    client: Any, conn: psycopg.Connection
) -> None:
    made = [request(f"{n % 700:03}", b"%d" % n) for n in range(2100)]
    assert client.bulk_enqueue(made, on_conflict="replace") == [r.id for r in made]
    assert client.bulk_enqueue(made, on_conflict="replace") == [r.id for r in made]
    found = rows(conn, "select arg from bgjob_job order by id")
    assert found == [(b"%d" % (1400 + n),) for n in range(700)]


def test_a_job_that_has_failed_begins_anew(client: Any, conn: psycopg.Connection) -> None:
    client.enqueue(request(arg=b"old"))
    client.do("q", Mux().register("t", lambda _: Retry(60, "no")))
    before = clock(conn)
    client.enqueue(request(), on_conflict="replace")
    assert row(conn, "select arg, attempt, last_error, deaths from bgjob_job") == (
        (b"new", 0, None, 0)
    )
    assert row(conn, "select created_at from bgjob_job")[0] > before


def test_a_due_time_in_the_past_is_now_and_a_later_one_delays_a_job_that_was_due(
    client: Any, conn: psycopg.Connection
) -> None:
    client.enqueue(request(delay=60))
    before = clock(conn)
    client.enqueue(request(run_at=datetime(2020, 1, 1, tzinfo=UTC)), on_conflict="replace")
    assert before < row(conn, "select next_run_at from bgjob_job")[0] <= clock(conn)
    client.enqueue(request(delay=60), on_conflict="replace")
    assert row(conn, "select next_run_at from bgjob_job")[0] > clock(conn)


def test_a_job_that_waits_for_its_key_is_looked_at_again(
    worker: psycopg.Connection, plain_client: Client
) -> None:
    plain_client.enqueue(request("a", exclusive="k"))
    worker.execute("update bgjob_job set waits = true")
    plain_client.enqueue(request(arg=b"newer"), on_conflict="replace")
    assert row(worker, "select waits, exclusive from bgjob_job where id = 'a'") == (False, None)
    [job] = ask(worker, claim_any("q", lease=60, token=6))
    assert (job.id, job.arg) == ("a", b"newer")


def test_jobs_of_a_key_whose_waiting_ones_are_replaced_run_one_at_a_time_and_all_run(
    launcher: Launcher,
) -> None:
    observer, gate = Recorder(), Gate()
    launcher.enqueue("first", exclusive="k")
    launcher.start(Mux().register("t", gate), observer=observer, concurrency=4, poll_interval=0.05)
    gate.wait()
    launcher.enqueue("a", "b", "c", exclusive="k")
    query = "select count(*) from bgjob_job where waits"
    with psycopg.connect(launcher.dsn, autocommit=True) as conn:
        assert eventually(lambda: row(conn, query) == (3,))
    launcher.client.bulk_enqueue(
        [request("a", exclusive="k", priority=-5), request("b"), request("c", exclusive="k2")],
        on_conflict="replace",
    )
    for _ in range(2):
        gate.wait()  # b and c, whose keys are free
    assert sorted(job.id for job in gate.runs[1:]) == ["b", "c"]
    gate.released.set()
    observer.wait_for("completed", "a")


def test_a_sleeping_worker_is_woken_for_a_job_that_is_due_sooner(launcher: Launcher) -> None:
    observer = Recorder()
    launcher.enqueue("a", delay=NEVER)
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)
    observer.wait_for("empty")
    launcher.client.enqueue(request(), on_conflict="replace")
    observer.wait_for("completed", "a")


# -- a job that runs -------------------------------------------------------------------


def test_a_job_that_runs_is_followed_by_the_newest_request_once(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer, gate = Recorder(), Gate()
    launcher.enqueue("a", arg=b"0")
    launcher.start(Mux().register("t", gate), observer=observer, poll_interval=NEVER)
    gate.wait()
    for n in range(1, 4):
        newer = request(arg=b"%d" % n, headers={"n": n})
        assert launcher.client.enqueue(newer, on_conflict="replace") == "a"
    with pytest.raises(JobAlreadyExistsError):
        launcher.client.enqueue(request())
    assert row(conn, "select arg, attempt from bgjob_job") == (b"0", 1)
    gate.released.set()
    observer.wait_for("completed", "a", times=2)
    assert [(job.arg, job.attempt, job.headers) for job in gate.runs] == [
        (b"0", 1, {}),
        (b"3", 1, {"n": 3}),
    ]
    assert row(conn, "select count(*) from bgjob_job") == (0,)


def test_jobs_of_a_key_that_are_replaced_while_they_run_never_run_beside_another(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    """Each replaces itself once. Its key is held until its successor is written."""
    ran: list[str] = []
    running, most, lock = Counter[str | None](), Counter[str | None](), threading.Lock()

    def handle(job: Job) -> None:
        with lock:
            ran.append(job.id)
            running[job.exclusive] += 1
            most[job.exclusive] = max(most[job.exclusive], running[job.exclusive])
        if job.arg == b"old":
            newer = request(job.id, exclusive=job.exclusive)
            launcher.client.enqueue(newer, on_conflict="replace")
        with lock:
            running[job.exclusive] -= 1

    ids = [f"{key}{n:02}" for n in range(15) for key in "abc"]
    launcher.client.bulk_enqueue([request(id_, b"old", exclusive=id_[0]) for id_ in ids])
    for _ in range(2):
        launcher.start(Mux().register("t", handle), concurrency=4, poll_interval=0.05)
    assert all_done(conn)
    assert Counter(ran) == dict.fromkeys(ids, 2)
    assert most == dict.fromkeys("abc", 1)
    for key in "abc":
        assert [id_ for id_ in dict.fromkeys(ran) if id_[0] == key] == ids["abc".index(key) :: 3]
    assert eventually(lambda: row(conn, "select count(*) from bgjob_exclusive") == (0,))


@pytest.mark.parametrize("result", [Retry(60, "no"), Reschedule(60), MoveToDlq("no")])
def test_it_is_followed_however_it_ends(
    client: Any, plain_client: Client, conn: psycopg.Connection, result: Result
) -> None:
    def replaced(_: Job) -> Result:
        plain_client.enqueue(request(exclusive="k", expires=HOUR), on_conflict="replace")
        return result

    client.enqueue(request(arg=b"old"))
    assert client.do("q", Mux().register("t", replaced)) == result
    seen: list[Job] = []
    client.do("q", Mux().register("t", seen.append))
    assert [(job.arg, job.attempt, job.last_error, job.exclusive) for job in seen] == [
        (b"new", 1, None, "k")
    ]
    assert seen[0].expires is not None
    assert [dead.arg for dead in client.dlq.list()] == ([b"old"] * isinstance(result, MoveToDlq))
    assert row(conn, "select count(*) from bgjob_job") == (0,)


@pytest.mark.parametrize("options", [{}, {"batch": 10}], ids=["alone", "batch"])
def test_the_transaction_of_a_job_that_is_replaced_while_it_runs_commits(
    launcher: Launcher, conn: psycopg.Connection, options: dict[str, int]
) -> None:
    conn.execute("create table effects (arg bytea)")
    observer = Recorder()

    def handle(given: Any, own: psycopg.Connection[Any]) -> None:
        jobs = given if isinstance(given, list) else [given]
        for job in jobs:
            own.execute("insert into effects values (%s)", [job.arg])
            if job.arg == b"old":
                launcher.client.enqueue(request(), on_conflict="replace")

    launcher.enqueue("a", arg=b"old")
    mux, route = Mux(), dict[str, Any](transactional=True, **options)
    launcher.start(mux.register("t", handle, **route), observer=observer, poll_interval=NEVER)
    observer.wait_for("completed", "a", times=2)
    assert rows(conn, "select arg from effects order by arg desc") == [(b"old",), (b"new",)]
    assert row(conn, "select count(*) from bgjob_job") == (0,)


def test_a_job_replaces_itself_in_its_own_transaction_or_not_at_all(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    seen: list[tuple[bytes | None, int]] = []

    def handle(job: Job, own: psycopg.Connection[Any]) -> Result | None:
        seen.append((job.arg, job.attempt))
        if len(seen) < 4:
            newer = request(arg=b"%d" % len(seen))
            launcher.client.enqueue(newer, on_conflict="replace", conn=own)
        return Retry(0) if len(seen) == 2 else None  # which rolls back

    launcher.enqueue("a", arg=b"0")
    launcher.start(
        Mux().register("t", handle, transactional=True), observer=observer, poll_interval=0.05
    )
    observer.wait_for("completed", "a", times=3)
    assert seen == [(b"0", 1), (b"1", 1), (b"1", 2), (b"3", 1)]
    assert row(conn, "select count(*) from bgjob_job") == (0,)


def test_a_cancel_takes_the_successor_with_it_and_a_requeue_brings_the_newest_back(
    client: Any, plain_client: Client
) -> None:
    def cancelled(_: Job) -> None:
        plain_client.enqueue(request(headers={"n": 1}, priority=3), on_conflict="replace")
        assert plain_client.jobs.cancel("a", by="me").running == ("a",)

    client.enqueue(request(arg=b"old"))
    with pytest.raises(Exception, match="lease|cancel"):
        client.do("q", Mux().register("t", cancelled))
    assert client.jobs.get("a") is None
    found = [(dead.arg, dead.attempt, dead.last_error) for dead in client.dlq.list()]
    assert found == [(b"new", 0, "cancelled by me"), (b"old", 1, "cancelled by me")]
    assert client.dlq.requeue("a") == ["a"]
    live = client.jobs.get("a")
    assert (live.arg, live.headers, live.priority) == (b"new", {"n": 1}, 3)


def test_a_successor_that_is_due_later_waits_until_then(
    client: Any, plain_client: Client, conn: psycopg.Connection
) -> None:
    def replaced(_: Job) -> None:
        plain_client.enqueue(request(delay=60), on_conflict="replace")

    client.enqueue(request(arg=b"old"))
    client.do("q", Mux().register("t", replaced))
    [(due,)] = rows(conn, "select next_run_at from bgjob_job where arg = 'new'")
    assert timedelta(seconds=50) < due - clock(conn) <= timedelta(seconds=60)


def test_explain_and_the_list_of_live_jobs_say_that_a_running_job_was_replaced(
    client: Any, plain_client: Client
) -> None:
    told: list[Any] = []

    def replaced(_: Job) -> None:
        told.append(plain_client.explain("a").reasons[0].text)
        plain_client.enqueue(request(), on_conflict="replace")
        told.append(plain_client.explain("a").reasons[0].text)
        told.append([job.is_replaced for job in plain_client.jobs.list().jobs])

    client.enqueue(request())
    client.do("q", Mux().register("t", replaced))
    assert "newer" not in told[0]
    assert told[1].endswith(" A newer request with its id waits for its end.")
    assert told[2] == [True]
    assert client.jobs.get("a").is_replaced is False


# -- the caller's transaction ------------------------------------------------------------


@pytest.mark.parametrize("how", ["one", "many"])
@pytest.mark.parametrize("state", ["waits", "runs"])
def test_a_replacement_joins_the_callers_transaction(
    colour: Colour, conn: psycopg.Connection, how: str, state: str
) -> None:
    client = colour.client()
    client.enqueue(request(arg=b"old"))
    if state == "runs":
        ask(conn, claim_any("q", lease=60, token=5))
    query = "select arg, successor_arg from bgjob_job"
    for commits in (False, True):
        with closing(colour.connect()) as own:
            if how == "one":
                client.enqueue(request(), on_conflict="replace", conn=own)
            else:
                client.bulk_enqueue([request()], on_conflict="replace", conn=own)
            assert rows(conn, query) == [(b"old", None)]
            if commits:
                own.commit()
            else:
                own.rollback()
    assert rows(conn, query) == [(b"new", None) if state == "waits" else (b"old", b"new")]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_transaction_that_cannot_see_the_jobs_last_change_is_told_to_repeat(
    plain_client: Client, dsn: str, conn: psycopg.Connection, level: str
) -> None:
    plain_client.enqueue(request(arg=b"old"))
    with psycopg.connect(dsn) as own:
        own.execute(f"set transaction isolation level {level}".encode())
        own.execute("select 1 from bgjob_job")
        plain_client.enqueue(request(arg=b"other"), on_conflict="replace")
        with pytest.raises(EnqueueConflictError, match="'a'"):
            plain_client.enqueue(request(), on_conflict="replace", conn=own)
        own.rollback()
        own.execute(f"set transaction isolation level {level}".encode())
        plain_client.enqueue(request(), on_conflict="replace", conn=own)
    assert rows(conn, "select arg from bgjob_job") == [(b"new",)]


def test_a_claim_passes_over_a_job_that_is_being_replaced(
    worker: psycopg.Connection, plain_client: Client, dsn: str
) -> None:
    plain_client.enqueue(request(arg=b"old"))
    with psycopg.connect(dsn) as own:
        plain_client.enqueue(request(), on_conflict="replace", conn=own)
        assert ask(worker, sweep("q", limit=1, lease=60, token=5)).jobs == []
    [job] = ask(worker, sweep("q", limit=1, lease=60, token=6)).jobs
    assert job.arg == b"new"


def test_calls_with_the_same_ids_in_opposite_order_wait_for_each_other(
    plain_client: Client, conn: psycopg.Connection
) -> None:
    ids = [f"{n:03}" for n in range(300)]

    def write(n: int) -> None:
        made = [request(id_, b"%d" % n) for id_ in (ids if n % 2 else reversed(ids))]
        plain_client.bulk_enqueue(made, on_conflict="replace")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(12)))
    assert row(conn, "select count(*), count(distinct arg) from bgjob_job") == (300, 1)


# -- debounce --------------------------------------------------------------------------


def due_in(conn: psycopg.Connection) -> float:
    query = "select extract(epoch from next_run_at - clock_timestamp())::float8 from bgjob_job"
    found: float = row(conn, query)[0]
    return found


def test_each_call_moves_the_due_time_until_the_limit_after_the_first(
    client: Any, conn: psycopg.Connection
) -> None:
    for n in range(3):
        assert client.debounce(request(arg=b"%d" % n), 30, at_most=100) == "a"
        assert 25 < due_in(conn) <= 30
        conn.execute(
            "update bgjob_job set created_at = created_at - interval '10 s', "
            "next_run_at = next_run_at - interval '10 s'"
        )
    conn.execute("update bgjob_job set created_at = clock_timestamp() - interval '90 s'")
    client.debounce(request(arg=b"last"), 30, at_most=100)
    assert 5 < due_in(conn) <= 10
    conn.execute("update bgjob_job set created_at = clock_timestamp() - interval '1 h'")
    client.debounce(request(arg=b"last"), 30, at_most=100)
    assert -5 < due_in(conn) <= 0
    client.debounce(request(arg=b"last"), timedelta(seconds=30))
    assert 25 < due_in(conn) <= 30
    assert rows(conn, "select arg from bgjob_job") == [(b"last",)]


def test_calls_while_it_runs_are_debounced_among_themselves(
    client: Any, plain_client: Client, conn: psycopg.Connection
) -> None:
    def replaced(_: Job) -> None:
        conn.execute("update bgjob_job set created_at = created_at - interval '1 h'")
        for _n in range(2):
            plain_client.debounce(request(), 30, at_most=40)

    client.debounce(request(arg=b"old"), 0, at_most=60)
    client.do("q", Mux().register("t", replaced))
    assert 20 < due_in(conn) <= 30


def test_calls_after_a_failure_do_not_run_it_before_their_delay(
    client: Any, conn: psycopg.Connection
) -> None:
    client.debounce(request(), 0)
    client.do("q", Mux().register("t", lambda _: Retry(NEVER, "no")))
    conn.execute("update bgjob_job set created_at = created_at - interval '1 h'")
    client.debounce(request(), 30, at_most=60)
    assert 25 < due_in(conn) <= 30


@dataclass
class Sync:
    queue: ClassVar[str] = "q"
    user: int


def test_typed_jobs_are_coalesced_and_debounced_too(client: Any, conn: psycopg.Connection) -> None:
    assert client.enqueue(Sync(1), id="a") == "a"
    assert client.enqueue(Sync(2), id="a", on_conflict="skip") is None
    assert client.enqueue(Sync(3), id="a", on_conflict="replace") == "a"
    assert client.debounce(Sync(4), 30, id="a", priority=2) == "a"
    assert row(conn, "select arg, priority from bgjob_job") == (b'{"user":4}', 2)
    with pytest.raises(TypeError, match="id is required"):
        client.debounce(Sync(4), 30)


@pytest.mark.parametrize(
    ("made", "delay", "at_most", "error", "text"),
    [
        (request(delay=1), 1, None, ValueError, "must have no delay"),
        (request(), -1, None, ValueError, "delay must be from 0"),
        (request(), "1 s", None, TypeError, "delay must be seconds"),
        (request(), 10, 9, ValueError, "at_most .9. must not be below the delay .10."),
        (request(expires=5), 10, None, ValueError, "before it is due"),
    ],
)
def test_a_bad_debounce_is_refused(
    client: Any, made: Any, delay: Any, at_most: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        client.debounce(made, delay, at_most=at_most)


def test_an_unknown_choice_is_refused(client: Any, conn: psycopg.Connection) -> None:
    for write in (client.enqueue, lambda made, **o: client.bulk_enqueue([made], **o)):
        with pytest.raises(ValueError, match="on_conflict must be 'raise', 'skip' or 'replace'"):
            write(request(), on_conflict="ignore")
    assert rows(conn, "select from bgjob_job") == []


# -- other drivers -----------------------------------------------------------------------


def test_the_public_statements_replace(plain_client: Client, conn: psycopg.Connection) -> None:
    plain_client.enqueue(request(arg=b"old"))
    for style in ("pyformat", "named", "numeric", "dollar"):
        text, params = sql.enqueue(request(), style, on_conflict="replace")
        many, _ = sql.enqueue_many([request()], style, on_conflict="replace")
        assert text == many and len(params) > 10
        assert "::" not in text
    assert conn.execute(*sql.enqueue(request(), on_conflict="skip")).fetchall() == []
    assert len(conn.execute(*sql.enqueue(request(), on_conflict="replace")).fetchall()) == 1
    assert rows(conn, "select arg from bgjob_job") == [(b"new",)]


# -- privileges ----------------------------------------------------------------------------


def test_a_producer_that_replaces_needs_the_optional_grant_and_every_column_of_it(
    roles: Roles,
) -> None:
    [lines] = re.findall(r"^-- Optional, for on_conflict=.*\n((?:-- .*\n)+)", SCRIPT, re.MULTILINE)
    grant = lines.replace("-- ", "")
    whole = request(exclusive="k", headers={"n": 1}, expires=HOUR)
    dsn = roles.login("producer")

    def write() -> None:
        with Client(dsn) as producer:
            producer.enqueue(whole, on_conflict="replace")
            producer.debounce(whole, 1, at_most=2)
            producer.bulk_enqueue([whole], on_conflict="replace")

    with pytest.raises(InsufficientPrivilege):
        write()
    roles.conn.execute(roles.named(grant))
    write()
    parts = re.findall(r"(select|update) \(([^)]*)\)", grant)
    assert len(parts) == 2
    for privilege, columns in parts:
        for column in columns.split(","):
            one = f"{privilege} ({column.strip()}) on bgjob_job"
            roles.conn.execute(roles.named(f"revoke {one} from bgjob_producer"))
            with pytest.raises(InsufficientPrivilege):
                write()
            roles.conn.execute(roles.named(f"grant {one} to bgjob_producer"))
