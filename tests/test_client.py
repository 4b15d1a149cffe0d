"""Clients write jobs, run single ones and look after the dead, in both colours alike."""

import asyncio
import inspect
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from bgjob import (
    AsyncClient,
    AsyncWorker,
    Client,
    Complete,
    EmptyQueueError,
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

HOSTILE = [
    "'; drop table bgjob_job; --",
    'say "x", {NULL}',
    "back\\slash\\",
    "%s %(id)s %%",
    "line\nfeed\ttab\x7f",
    "null",
    " ",
    "é \u202e \U0001f600 \uffff",
    "x" * 255,
    "\U0001f600" * 255,
]


class Blocking:
    """An object whose coroutines are run to their end, so that a test is written once."""

    def __init__(self, target: Any, run: Callable[[Any], Any]) -> None:
        self.target = target
        self._run = run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.target, name)
        if not callable(value):
            return Blocking(value, self._run) if name == "dlq" else value

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs = {k: getattr(v, "target", v) for k, v in kwargs.items()}
            answer = value(*args, **kwargs)
            return self._run(answer) if inspect.isawaitable(answer) else answer

        return call


class Colour:
    """Makes clients, pools and connections of one colour, all to be used without `await`."""

    def __init__(self, dsn: str, *, is_async: bool) -> None:
        self.dsn = dsn
        self.is_async = is_async
        self._stack = ExitStack()
        if is_async:
            self._runner = self._stack.enter_context(asyncio.Runner())

    def run(self, awaitable: Any) -> Any:
        async def awaited() -> Any:
            return await awaitable

        return self._runner.run(awaited())

    def client(self, source: Any = None, **options: Any) -> Any:
        source = getattr(source, "target", source or self.dsn)
        made = AsyncClient(source, **options) if self.is_async else Client(source, **options)
        return self._closed_later(made)

    def connect(self, **options: Any) -> Any:
        if self.is_async:
            return self._closed_later(
                self.run(psycopg.AsyncConnection.connect(self.dsn, **options))
            )
        return self._closed_later(psycopg.connect(self.dsn, **options))

    def pool(self, **kwargs: Any) -> Any:
        kind: Any = AsyncConnectionPool if self.is_async else ConnectionPool
        pool = kind(self.dsn, min_size=1, max_size=1, timeout=10, open=False, kwargs=kwargs)
        blocking = self._closed_later(pool)
        blocking.open()
        return blocking

    @contextmanager
    def pipeline(self, caller: Blocking) -> Iterator[None]:
        """Put a connection into pipeline mode."""
        pipeline = caller.target.pipeline()
        with ExitStack() as stack:
            if self.is_async:
                self.run(pipeline.__aenter__())
                stack.callback(lambda: self.run(pipeline.__aexit__(None, None, None)))
            else:
                stack.enter_context(pipeline)
            yield

    def at_once(self, *calls: Callable[[Any], Any]) -> list[Any]:
        """Make calls of one client at the same time, each given the client."""
        client = self.client().target
        if self.is_async:

            async def gathered() -> list[Any]:
                return await asyncio.gather(*(call(client) for call in calls))

            return list(self.run(gathered()))
        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(lambda call: call(client), calls))

    def _closed_later(self, target: Any) -> Blocking:
        blocking = Blocking(target, self.run)
        self._stack.callback(blocking.close)
        return blocking

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(params=[False, True], ids=["Client", "AsyncClient"])
def colour(request: pytest.FixtureRequest, dsn: str) -> Iterator[Colour]:
    colour = Colour(dsn, is_async=request.param)
    try:
        yield colour
    finally:
        colour.close()


@pytest.fixture
def client(colour: Colour) -> Any:
    return colour.client()


def rows(conn: psycopg.Connection, query: LiteralString, *params: object) -> list[tuple[Any, ...]]:
    return conn.execute(query, params).fetchall()


def row(conn: psycopg.Connection, query: LiteralString, *params: object) -> tuple[Any, ...]:
    [only] = rows(conn, query, *params)
    return only


def count(conn: psycopg.Connection) -> int:
    return int(row(conn, "select count(*) from bgjob_job")[0])


def clock(conn: psycopg.Connection) -> datetime:
    now = row(conn, "select clock_timestamp()")[0]
    assert isinstance(now, datetime)
    return now


def eventually(condition: Callable[[], bool], timeout: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def requests(*ids: str, **options: Any) -> list[EnqueueRequest]:
    return [EnqueueRequest("q", "t", id=id_, **options) for id_ in ids]


def returning(result: Any) -> Mux:
    return Mux().register("t", lambda _: result)


# -- enqueue ----------------------------------------------------------------------------


def test_an_enqueue_writes_a_row_and_gives_its_generated_id(
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


def test_a_callers_autocommit_connection_commits_at_once(
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


@few_and_many
def test_a_bulk_enqueue_writes_every_setting_and_gives_the_ids_in_order(
    client: Any, conn: psycopg.Connection, size: int
) -> None:
    batch = [
        EnqueueRequest(f"q{n % 3}", f"t'{n} é", None if n % 2 else b"\0%d" % n, priority=n - 5)
        for n in range(size)
    ]
    assert client.bulk_enqueue(batch) == [request.id for request in batch]
    written = rows(conn, "select id, queue, type, arg, priority from bgjob_job order by id")
    assert written == [(r.id, r.queue, r.type, r.payload, r.priority) for r in batch]


def test_a_bulk_enqueue_needs_a_request(client: Any) -> None:
    with pytest.raises(RequestsRequiredError, match="at least one"):
        client.bulk_enqueue([])


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


def test_a_bulk_enqueue_can_skip_taken_ids_and_gives_none_in_their_places(
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


def test_the_due_times_of_a_bulk_enqueue_keep_its_order(
    client: Any, conn: psycopg.Connection
) -> None:
    ids = [f"{n:04}" for n in range(2_000)]
    random.Random(2).shuffle(ids)
    client.bulk_enqueue(requests(*ids))
    due = dict(rows(conn, "select id, next_run_at from bgjob_job"))
    assert [due[id_] for id_ in ids] == sorted(due.values())


# -- do -----------------------------------------------------------------------------------


def test_do_gives_a_plain_handler_its_job(client: Any, conn: psycopg.Connection) -> None:
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


def test_do_gives_the_attempt_back_where_a_job_is_rescheduled(
    client: Any, conn: psycopg.Connection
) -> None:
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


def test_do_stores_what_a_handler_raised_and_gives_the_result(
    client: Any, conn: psycopg.Connection
) -> None:
    error = ValueError("a\0b")

    def fail(_: Job) -> Result:
        raise error

    mux = Mux().register("t", fail, max_attempts=2, backoff=lambda _: 0.0)
    client.enqueue(EnqueueRequest("q", "t"))
    assert client.do("q", mux) == Retry(0.0, error)
    assert row(conn, "select attempt, last_error from bgjob_job") == (1, "ValueError: a\ufffdb")
    assert client.do("q", mux) == MoveToDlq(error)
    assert count(conn) == 0


@pytest.mark.parametrize("coroutine", [False, True])
def test_do_stores_a_failed_attempt_before_it_lets_an_interrupt_through(
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


def test_a_client_is_closed_more_than_once(client: Any) -> None:
    client.close()
    client.enqueue(EnqueueRequest("q", "t"))
    client.close()
    client.close()


def test_leaving_a_client_closes_it(colour: Colour, conn: psycopg.Connection) -> None:
    def use() -> None:
        with Client(colour.dsn) as client:
            client.enqueue(EnqueueRequest("q", "t"))

    async def use_async() -> None:
        async with AsyncClient(colour.dsn) as client:
            await client.enqueue(EnqueueRequest("q", "t"))

    colour.run(use_async()) if colour.is_async else use()
    assert eventually(
        lambda: (
            row(
                conn,
                "select count(*) from pg_stat_activity where datname = current_database() "
                "and pid <> pg_backend_pid()",
            )
            == (0,)
        )
    )


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


def bury(client: Any, *requests: EnqueueRequest, error: str = "why") -> None:
    """Let jobs die, one after another."""
    for request in requests:
        client.enqueue(request)
        client.do(request.queue, Mux().register(request.type, lambda _: MoveToDlq(error)))


def test_dead_jobs_are_listed_the_latest_first_by_queue_and_type(client: Any) -> None:
    bury(
        client,
        EnqueueRequest("a", "x", id="1"),
        EnqueueRequest("a", "y", id="2"),
        EnqueueRequest("b", "x", id="3"),
    )

    def listed(**options: Any) -> list[str]:
        return [dead.id for dead in client.dlq.list(**options)]

    assert listed() == ["3", "2", "1"]
    assert listed(queue="a") == ["2", "1"]
    assert listed(type="x") == ["3", "1"]
    assert listed(queue="a", type="x") == ["1"]
    assert listed(queue="c") == []
    assert listed(limit=1) == ["3"]
    assert listed(limit=2, offset=2) == ["1"]


def test_one_dead_job_is_found_by_its_id(client: Any) -> None:
    bury(client, EnqueueRequest("q", "t", id="a"))
    assert client.dlq.get("a") == client.dlq.list()[0]
    assert client.dlq.get("b") is None


def test_of_several_dead_jobs_with_one_id_the_latest_counts(
    client: Any, conn: psycopg.Connection
) -> None:
    for error in ("first", "second"):
        bury(client, EnqueueRequest("q", "t", error, id="a"), error=error)
    assert client.dlq.get("a").last_error == "second"
    assert client.dlq.requeue("a") == ["a"]
    assert rows(conn, "select arg, last_error from bgjob_job") == [(b'"second"', "second")]
    assert [dead.last_error for dead in client.dlq.list()] == ["first"]


def test_a_requeued_job_keeps_every_setting_and_begins_afresh(
    client: Any, conn: psycopg.Connection
) -> None:
    bury(client, EnqueueRequest("q", "t", b"arg", id="a", priority=-7))
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
    bury(
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
    bury(client, EnqueueRequest("q", "t", b"dead", id="a"), EnqueueRequest("q", "t", id="b"))
    client.enqueue(EnqueueRequest("q", "t", b"live", id="a"))
    assert client.dlq.requeue() == ["b"]
    assert [dead.id for dead in client.dlq.list()] == ["a"]
    assert row(conn, "select arg from bgjob_job where id = 'a'") == (b"live",)


def test_dead_jobs_are_purged_by_id_or_by_filter(client: Any, conn: psycopg.Connection) -> None:
    bury(client, *(EnqueueRequest("a", "x", id=id_) for id_ in "123"))
    between = clock(conn)
    bury(client, EnqueueRequest("a", "y", id="4"), EnqueueRequest("b", "x", id="5"))
    assert client.dlq.purge("unknown") == 0
    assert client.dlq.purge([]) == 0
    assert client.dlq.purge(["1"]) == 1
    assert client.dlq.purge(moved_before=between) == 2
    assert client.dlq.purge(queue="a", type="x") == 0
    assert client.dlq.purge(queue="b") == 1
    assert client.dlq.purge() == 1
    assert client.dlq.list() == []
    with pytest.raises(ValueError, match="moved_before must be an aware datetime"):
        client.dlq.purge(moved_before=datetime(2030, 1, 1))


def test_the_dlq_works_inside_the_callers_transaction(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect(row_factory=dict_row)
    bury(client, *requests("a", "b"))
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
    bury(client, *requests("a"))
    client.enqueue(EnqueueRequest("q", "t", id="b"))
    conn.execute("update bgjob_job set next_run_at = '-infinity', created_at = '-infinity'")
    client.do("q", returning(MoveToDlq("why")))
    conn.execute("update bgjob_dead_job set moved_at = 'infinity' where job_id = 'b'")
    assert [dead.id for dead in client.dlq.list()] == ["b", "a"]
