"""Jobs that share a key run one at a time, in the order of their due times."""

import asyncio
import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from random import Random
from typing import Any, cast

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from support.database import count
from support.waiting import NEVER, PATIENCE, eventually

from bgjob import (
    AsyncClient,
    Client,
    Complete,
    EmptyQueueError,
    EnqueueRequest,
    Job,
    MoveToDlq,
    Mux,
    NoopObserver,
    Reschedule,
    Result,
    Retry,
    Schedule,
    Worker,
)
from bgjob._engine.engine import Engine
from bgjob._engine.outcome import Committed, Outcome, Release
from bgjob._engine.pace import Pace
from bgjob._engine.protocol import ClaimGroup, Exchange, Sleep, Sweep, Withdraw
from bgjob._engine.reply import Reply
from bgjob._handlers.route import NeedsKey
from bgjob._running.one_job import conclusion
from bgjob._running.ending import Ending, NotBegun
from bgjob._sql.survey import Line
from bgjob._sql.claims import Swept, claim, claim_any
from bgjob._sql.key_rows import lock_keys
from bgjob._sql.keys import acquire, blocked, release
from bgjob._sql.settlements import Claimed, Postponed, complete, postpone, release_jobs
from bgjob._sql.statement import Statement
from bgjob._worker.lines import Lines
from bgjob.testing import drain


def keyed(key: str | None, id_: str, **options: Any) -> EnqueueRequest:
    return EnqueueRequest("q", "t", id=id_, exclusive=key, **options)


LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)


def _never(_: int) -> float:
    return NEVER


class Diary:
    """The times at which jobs ran."""

    def __init__(self) -> None:
        self.order: defaultdict[str | None, list[str]] = defaultdict(list)
        self.running: defaultdict[str | None, int] = defaultdict(int)
        self.most: defaultdict[str | None, int] = defaultdict(int)
        self._lock = threading.Lock()

    def handle(self, job: Job) -> Result:
        key = job.exclusive
        with self._lock:
            self.order[key].append(job.id)
            self.running[key] += 1
            self.most[key] = max(self.most[key], self.running[key])
        time.sleep(0.0005)
        with self._lock:
            self.running[key] -= 1
        return Complete()


@pytest.fixture
def launcher(dsn: str) -> Iterator[Callable[..., Worker]]:
    with ExitStack() as stack:
        client = stack.enter_context(Client(dsn))

        def start(mux: Mux, **options: Any) -> Worker:
            options.setdefault("concurrency", 4)
            options.setdefault("poll_interval", 0.2)
            options.setdefault("observer", NoopObserver())
            return stack.enter_context(Worker(client, "q", mux, **options))

        yield start


@pytest.mark.parametrize("workers", [1, 3])
def test_jobs_of_a_key_run_one_at_a_time_and_in_the_order_in_which_they_are_due(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker], workers: int
) -> None:
    diary = Diary()
    requests = [keyed([None, "a", "b", "c"][n % 4], f"{n:04}") for n in range(400)]
    with Client(dsn) as client:
        client.bulk_enqueue(requests)
    for _ in range(workers):
        launcher(Mux().register("t", diary.handle))
    assert eventually(lambda: count(conn, "bgjob_job") == 0)
    for key in "abc":
        assert diary.order[key] == [r.id for r in requests if r.exclusive == key]
        assert diary.most[key] == 1
    assert len(diary.order[None]) == 100
    assert eventually(lambda: count(conn, "bgjob_exclusive") == 0)


@pytest.mark.parametrize("ending", ["complete", "retry", "reschedule", "dlq", "raise"])
@pytest.mark.parametrize("transactional", [False, True])
def test_the_next_job_starts_however_the_one_before_it_ends(
    dsn: str,
    conn: psycopg.Connection,
    launcher: Callable[..., Worker],
    ending: str,
    transactional: bool,
) -> None:
    ran: list[str] = []

    def handle(job: Job) -> Result:
        ran.append(job.id)
        match ending:
            case "retry":
                return Retry(NEVER)
            case "reschedule":
                return Reschedule(NEVER)
            case "dlq":
                return MoveToDlq("no")
            case "raise":
                raise ValueError("no")
        return Complete()

    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", str(n)) for n in range(4)])
    # Nothing is owed to polling.
    mux = Mux()
    if transactional:
        mux.register("t", lambda job, conn: handle(job), transactional=True, backoff=_never)
    else:
        mux.register("t", handle, backoff=_never)
    launcher(mux, poll_interval=NEVER)
    assert eventually(lambda: len(ran) == 4), ran
    assert ran == ["0", "1", "2", "3"]


def test_jobs_that_wait_for_a_key_leave_the_way_to_others(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker]
) -> None:
    gate, ran = threading.Event(), []

    def handle(job: Job) -> None:
        ran.append(job.id)
        if job.id == "first":
            gate.wait(PATIENCE)

    with Client(dsn) as client:
        client.enqueue(keyed("k", "first"))
        client.bulk_enqueue([keyed("k", f"held-{n:04}") for n in range(1200)])
        client.bulk_enqueue([keyed(None, f"free-{n:04}") for n in range(100)])
        launcher(Mux().register("t", handle), concurrency=2)
        assert eventually(lambda: len(ran) == 101)
        # The first claim had two jobs of the key. After a while it gives the second one back.
        waiting = count(conn, "bgjob_job where waits")
        assert waiting in (1199, 1200)
        assert conn.execute("select attempt from bgjob_job where waits").fetchone() == (0,)
        conn.execute("delete from bgjob_job where id like 'held%' and id not like '%0'")
        gate.set()
        assert eventually(lambda: count(conn, "bgjob_job") == 0)
    assert ran[101:] == [f"held-{n:04}" for n in range(0, 1200, 10)]


def test_a_key_is_one_in_all_queues(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker]
) -> None:
    diary = Diary()
    with Client(dsn) as client, ExitStack() as stack:
        for n in range(30):
            client.enqueue(EnqueueRequest("qr"[n % 2], "t", id=f"{n:02}", exclusive="k"))
        for queue in "qr":
            mux = Mux().register("t", diary.handle)
            stack.enter_context(Worker(client, queue, mux, concurrency=3, poll_interval=0.05))
        assert eventually(lambda: count(conn, "bgjob_job") == 0)
    assert diary.most["k"] == 1
    for first in (0, 1):
        assert [i for i in diary.order["k"] if int(i) % 2 == first] == [
            f"{n:02}" for n in range(first, 30, 2)
        ]


def test_a_job_whose_holder_was_deleted_by_hand_runs_after_the_next_extension(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker]
) -> None:
    started = threading.Event()
    gate = threading.Event()

    def handle(job: Job) -> None:
        if job.id == "0":
            started.set()
            gate.wait(PATIENCE)

    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", str(n)) for n in range(3)])
        launcher(Mux().register("t", handle), poll_interval=0.05, lease=1.0)
        assert started.wait(PATIENCE)
        assert eventually(lambda: count(conn, "bgjob_job where token is not null") == 3)
        conn.execute("delete from bgjob_job where id = '0'")
        assert eventually(lambda: count(conn, "bgjob_job") == 0)
        gate.set()


def test_do_passes_over_a_job_whose_key_is_held(dsn: str, conn: psycopg.Connection) -> None:
    ran: list[str] = []
    mux = Mux().register("t", lambda job: ran.append(job.id))
    with Client(dsn) as client:

        def outer(job: Job) -> None:
            ran.append(job.id)
            client.do("q", mux)
            with pytest.raises(EmptyQueueError):
                client.do("q", mux)

        client.bulk_enqueue([keyed("k", "a"), keyed("k", "b"), keyed(None, "c")])
        client.do("q", Mux().register("t", outer))
        assert ran == ["a", "c"]
        client.do("q", mux)
        assert ran == ["a", "c", "b"]
    assert count(conn, "bgjob_job") == count(conn, "bgjob_exclusive") == 0


def test_an_async_client_keeps_keys_as_well(dsn: str) -> None:
    asyncio.run(_keeps_keys(dsn))


async def _keeps_keys(dsn: str) -> None:
    ran: list[str] = []

    async def note(job: Job) -> None:
        ran.append(job.id)

    async with AsyncClient(dsn) as client:

        async def outer(job: Job) -> None:
            ran.append(job.id)
            with pytest.raises(EmptyQueueError):
                await client.do("q", Mux().register("t", note))

        await client.bulk_enqueue([keyed("k", "a"), keyed("k", "b")])
        await client.do("q", Mux().register("t", outer))
        await client.do("q", Mux().register("t", note))
    assert ran == ["a", "b"]


@pytest.mark.parametrize("by", ["do", "async do", "drain", "worker"])
def test_a_job_that_others_look_at_when_it_wants_its_key_runs_soon(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker], by: str
) -> None:
    attempts: list[int] = []
    other = psycopg.connect(dsn)

    def key(job: Job) -> str:
        # Between the claim of a job and the question for its key.
        if not other.closed and other.info.transaction_status == TransactionStatus.IDLE:
            other.execute("select from bgjob_job for update")
            threading.Timer(0.1, other.close).start()
        return "k"

    mux = Mux().register("t", lambda job: attempts.append(job.attempt), exclusive=key)

    async def do() -> None:
        async with AsyncClient(dsn) as client:
            await client.do("q", mux)

    with Client(dsn) as client:
        client.enqueue(keyed(None, "a"))
        match by:
            case "do":
                client.do("q", mux)
            case "async do":
                asyncio.run(do())
            case "drain":
                assert [ran.job.id for ran in drain(client, "q", mux)] == ["a"]
            case _:
                launcher(mux, poll_interval=NEVER)
    assert eventually(lambda: count(conn, "bgjob_job") == 0)
    assert other.closed
    assert attempts == [1]


def test_a_dead_job_keeps_its_key(dsn: str, conn: psycopg.Connection) -> None:
    with Client(dsn) as client:
        client.enqueue(keyed("k", "a"))
        client.do("q", Mux().register("t", lambda _: MoveToDlq("no")))
        [dead] = client.dlq.list()
        assert dead.exclusive == "k"
        assert client.dlq.requeue(ids=["a"]) == ["a"]
    assert conn.execute("select exclusive from bgjob_job").fetchall() == [("k",)]


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0b", "\ud800", 7])
def test_a_key_that_cannot_be_stored_is_refused_where_it_is_written(key: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="exclusive"):
        keyed(key, "a")


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("colour", ["plain", "coroutine"])
def test_a_type_may_name_the_keys_of_its_jobs(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker], stamped: bool, colour: str
) -> None:
    diary = Diary()

    async def coroutine(job: Job) -> Result:
        return await asyncio.to_thread(diary.handle, job)

    handler: Any = diary.handle if colour == "plain" else coroutine
    mux = Mux()
    mux.register("one", handler, exclusive=True, queue="q")
    mux.register("t", handler, exclusive=lambda job: job.json()["key"], queue="q")
    requests = []
    for n in range(60):
        type_ = "t" if n % 4 else "one"
        arg, id_ = {"key": [None, "a", "b"][n % 3]}, f"{n:02}"
        if stamped:
            requests.append(mux.request(type_, arg, id=id_))
        else:
            requests.append(EnqueueRequest("q", type_, arg, id=id_))
    with Client(dsn) as client:
        client.bulk_enqueue(requests)
    for _ in range(2):
        launcher(mux)
    assert eventually(lambda: count(conn, "bgjob_job") == 0)
    assert sum(len(ids) for ids in diary.order.values()) == 60
    assert {key for key in diary.order if key} == {"a", "b", "type:one"}
    assert all(most == 1 for key, most in diary.most.items() if key is not None)
    if stamped:
        assert all(ids == sorted(ids) for key, ids in diary.order.items() if key is not None)


def test_a_key_callable_that_fails_fails_the_attempt(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker]
) -> None:
    mux = Mux().register(
        "t", lambda _: None, exclusive=lambda job: job.json()["no"], max_attempts=1
    )
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", {"a": 1}))
        client.enqueue(EnqueueRequest("q", "t", {"no": "x" * 256}))
        launcher(mux)
        assert eventually(lambda: count(conn, "bgjob_dead_job") == 2)
        errors = {str(dead.last_error) for dead in client.dlq.list()}
    assert any("KeyError" in error for error in errors)
    assert any("exclusive key" in error for error in errors)


# -- what others do meanwhile ---------------------------------------------------------------


COMMIT_HANGS = """
    create table effect (id text);
    create function hang() returns trigger language plpgsql as $$
        begin perform pg_advisory_xact_lock(7); return null; end
    $$;
    create constraint trigger hang after insert on effect
        deferrable initially deferred for each row execute function hang();
"""


def test_a_transactional_handler_whose_commit_hangs_holds_up_its_own_key_only(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker]
) -> None:
    ran: list[str] = []
    waits_for_7 = (
        "pg_locks where locktype = 'advisory' and (classid, objid) = (0, 7) and not granted "
        "and database = (select oid from pg_database where datname = current_database())"
    )

    def write(job: Job, conn: psycopg.Connection) -> None:
        conn.execute("insert into effect values (%s)", [job.id])

    conn.execute(COMMIT_HANGS)
    mux = Mux().register("t", write, transactional=True, backoff=_never)
    mux.register("plain", lambda job: ran.append(job.id))
    with Client(dsn) as client, conn.transaction():
        conn.execute("select pg_advisory_xact_lock(7)")
        client.enqueue(keyed("a", "0"))
        launcher(mux)
        assert eventually(lambda: count(conn, waits_for_7) == 1)
        for id_, key in [("1", "a"), ("2", "b"), ("3", "b"), ("4", None)]:
            client.enqueue(EnqueueRequest("q", "plain", id=id_, exclusive=key))
        assert eventually(lambda: len(ran) == 3)
        assert set(ran) == {"2", "3", "4"}
    assert eventually(lambda: ran[3:] == ["1"])
    assert eventually(lambda: count(conn, "bgjob_job") == count(conn, "bgjob_exclusive") == 0)
    assert count(conn, "effect") == 1


@pytest.mark.parametrize("by", ["worker", "do"])
@pytest.mark.parametrize("transactional", [False, True])
def test_keys_are_kept_where_transactions_see_one_snapshot(
    dsn: str, conn: psycopg.Connection, by: str, transactional: bool
) -> None:
    ran: list[str] = []
    database = conn.info.dbname
    conn.execute(
        cast(Any, f"alter database {database} set default_transaction_isolation = 'serializable'")
    )

    def handle(job: Job, own: Any = None) -> None:
        ran.append(f"{job.id}, attempt {job.attempt}")
        if own is not None:
            own.execute("select count(*) from bgjob_exclusive")
        if job.id == "0":
            client.enqueue(keyed("k", "1"))
            if by == "do":
                with pytest.raises(EmptyQueueError):
                    client.do("q", mux)
            waits = "token is not null" if by == "worker" else "waits"
            assert eventually(lambda: count(conn, f"bgjob_job where id = '1' and {waits}") == 1)

    mux = Mux()
    if transactional:
        mux.register("t", handle, transactional=True, backoff=_never)
    else:
        mux.register("t", handle, backoff=_never)
    with Client(dsn) as client, ExitStack() as stack:
        client.enqueue(keyed("k", "0"))
        if by == "worker":
            stack.enter_context(Worker(client, "q", mux, concurrency=2, poll_interval=NEVER))
        else:
            client.do("q", mux)
            client.do("q", mux)
        assert eventually(lambda: count(conn, "bgjob_job") == 0)
        assert eventually(lambda: count(conn, "bgjob_exclusive") == 0)
    assert ran == ["0, attempt 1", "1, attempt 1"]


def ask_all(conn: psycopg.Connection, statements: list[Any]) -> list[Any]:
    with conn.transaction():
        return [s.parse(conn.execute(s.text, s.params).fetchall()) for s in statements]


def exchange(conn: psycopg.Connection, asked: Exchange, queue: str) -> Reply:
    reply, plan = Reply(), asked.statements(queue, 0.0)
    for (_, store), answer in zip(plan, ask_all(conn, [s for s, _ in plan]), strict=True):
        store(reply, answer)
    return reply


def granted(conn: psycopg.Connection, claimed: Claimed) -> Any:
    """Ask for the key of a job; whether it has it, by id and token."""
    return exchange(conn, Exchange(acquire=[claimed]), claimed.job.queue).acquired


def settled(conn: psycopg.Connection, claimed: Claimed, ending: Ending) -> set[str]:
    """Settle a job and release its key; the ids of those that were held."""
    return exchange(conn, conclusion(claimed, ending), claimed.job.queue).settled


def take(conn: psycopg.Connection, queue: str, *, lease: float, token: int = 1) -> Claimed:
    """Claim a job that has a key, and the key, like a worker that then stops."""
    [[[job]]] = [ask_all(conn, [claim_any(queue, lease=lease, token=token)])]
    claimed = Claimed(job, token)
    assert granted(conn, claimed) == {(job.id, 1): True}
    return claimed


def test_a_key_is_free_when_its_holder_died_in_a_queue_that_has_no_worker_left(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker]
) -> None:
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("r", "t", id="dead", exclusive="k"))
        dead = take(conn, "r", lease=0.5)
        client.bulk_enqueue([keyed("k", str(n)) for n in range(3)])
        launcher(Mux().register("t", lambda _: None), poll_interval=0.05)
        assert eventually(lambda: count(conn, "bgjob_job where queue = 'q'") == 0)
    # It is fenced off, and a suspect.
    assert settled(conn, dead, Complete()) == set()
    assert conn.execute("select token, deaths from bgjob_job").fetchall() == [(None, 1)]


def test_jobs_do_not_wait_for_those_of_a_queue_that_has_no_worker(
    dsn: str, conn: psycopg.Connection, launcher: Callable[..., Worker]
) -> None:
    with Client(dsn) as client:
        client.enqueue(keyed("k", "0"))
        take(conn, "q", lease=NEVER)
        client.enqueue(keyed("k", "1"))
        launcher(Mux().register("t", lambda _: None), poll_interval=0.05)
        assert eventually(lambda: count(conn, "bgjob_job where waits") == 1)
        client.enqueue(EnqueueRequest("r", "t", id="2", exclusive="k"))
        conn.execute("delete from bgjob_job where id = '0'")
        assert eventually(lambda: count(conn, "bgjob_job") == 1)
    assert conn.execute("select id from bgjob_job").fetchall() == [("2",)]


def test_do_finds_a_job_whose_holder_was_deleted(dsn: str, conn: psycopg.Connection) -> None:
    ran: list[str] = []
    inner = Mux().register("t", lambda job: ran.append(job.id))
    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", "0"), keyed("k", "1")])
        take(conn, "q", lease=NEVER)
        with pytest.raises(EmptyQueueError):
            client.do("q", inner)
        conn.execute("delete from bgjob_job where id = '0'")
        client.do("q", inner)
    assert ran == ["1"]
    assert count(conn, "bgjob_exclusive") == 0


def test_a_job_that_is_given_back_keeps_its_place(dsn: str, conn: psycopg.Connection) -> None:
    ran: list[str] = []
    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", str(n)) for n in range(3)])
        first = take(conn, "q", lease=NEVER)
        assert settled(conn, first, NotBegun(TimeoutError())) == {"0"}
        for _ in range(3):
            client.do("q", Mux().register("t", lambda job: ran.append(job.id)))
    assert ran == ["0", "1", "2"]


def test_a_job_that_was_replaced_while_it_ran_holds_its_key_until_its_successor_is_written(
    dsn: str, conn: psycopg.Connection
) -> None:
    ran: list[str] = []
    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", "0"), keyed("k", "1")])
        first = take(conn, "q", lease=NEVER)
        client.enqueue(keyed("k", "0"), on_conflict="replace")
        ends = conclusion(first, Complete())
        assert exchange(conn, ends, "q").settled == set()  # passed over
        with pytest.raises(EmptyQueueError):
            client.do("q", Mux())
        assert exchange(conn, replace(ends, follows=True), "q").settled == {"0"}
        for _ in range(2):
            client.do("q", Mux().register("t", lambda job: ran.append(job.id)))
    assert ran == ["1", "0"]
    assert count(conn, "bgjob_exclusive") == 0


@pytest.mark.parametrize("earlier", ["is due", "is claimed"])
def test_a_job_that_waits_is_not_woken_before_an_earlier_one_of_its_key(
    dsn: str, conn: psycopg.Connection, earlier: str
) -> None:
    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", str(n)) for n in range(3)])
    conn.execute("update bgjob_job set waits = true where id <> '0'")
    ask_all(conn, [lock_keys(["k"])])
    if earlier == "is claimed":  # and has not asked for its key
        conn.execute("update bgjob_job set token = 1, lease_until = 'infinity' where id = '0'")
    assert ask_all(conn, [lock_keys(["k"]), release("q", ["k"])])[-1] == []
    assert conn.execute("select id from bgjob_job where waits order by id").fetchall() == [
        ("1",),
        ("2",),
    ]
    conn.execute("delete from bgjob_job where id = '0'")
    assert len(ask_all(conn, [lock_keys(["k"]), release("q", ["k"])])[-1]) == 1
    assert conn.execute("select id from bgjob_job where waits").fetchall() == [("2",)]


def test_a_key_is_locked_until_the_end_of_the_transaction_and_not_written(
    dsn: str, conn: psycopg.Connection
) -> None:
    ask_all(conn, [lock_keys(["k"])])
    [before] = conn.execute("select ctid from bgjob_exclusive").fetchall()
    with psycopg.connect(dsn) as other, conn.transaction():
        ask_all(conn, [lock_keys(["k"])])
        other.execute("set lock_timeout = '50ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            ask_all(other, [lock_keys(["a", "k"])])
    assert conn.execute("select ctid from bgjob_exclusive").fetchall() == [before]


def test_a_key_that_is_deleted_while_it_is_waited_for_is_locked_all_the_same(
    dsn: str, conn: psycopg.Connection
) -> None:
    waits = "pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    ask_all(conn, [lock_keys(["k"])])

    def lock_second() -> None:
        ask_all(second, [lock_keys(["k"])])
        # The transaction of the caller is still open.

    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second:
        first.execute("delete from bgjob_exclusive")
        with second.transaction():
            thread = threading.Thread(target=lock_second)
            thread.start()
            assert eventually(lambda: count(conn, waits) == 1)
            first.commit()
            thread.join(PATIENCE)
            with psycopg.connect(dsn) as third, pytest.raises(psycopg.errors.LockNotAvailable):
                third.execute("set lock_timeout = '50ms'")
                ask_all(third, [lock_keys(["k"])])


def test_acquiring_a_key_waits_for_no_job_that_others_have_locked(
    dsn: str, conn: psycopg.Connection
) -> None:
    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", "0"), keyed("k", "1")])
    [[[first]]] = [ask_all(conn, [claim_any("q", lease=NEVER, token=1)])]
    [[[second]]] = [ask_all(conn, [claim_any("q", lease=NEVER, token=2)])]
    conn.execute("set lock_timeout = '50ms'")
    with psycopg.connect(dsn) as other:
        other.execute("select from bgjob_job for update")
        assert granted(conn, Claimed(first, 1)) == {("0", 1): True}
        assert granted(conn, Claimed(second, 2)) == {("1", 2): None}
    assert granted(conn, Claimed(second, 3)) == {}
    assert granted(conn, Claimed(second, 2)) == {("1", 2): False}


def test_a_handler_that_names_a_key_has_it_when_nobody_has_locked_its_job(
    dsn: str, conn: psycopg.Connection
) -> None:
    with Client(dsn) as client:
        client.enqueue(keyed(None, "0"))
    [[[job]]] = [ask_all(conn, [claim_any("q", lease=NEVER, token=1)])]
    named = Claimed(job._replace(exclusive="k"), 1)
    conn.execute("set lock_timeout = '50ms'")
    with psycopg.connect(dsn) as other:
        other.execute("select from bgjob_job for update")
        assert granted(conn, named) == {("0", 1): None}
    assert granted(conn, named) == {("0", 1): True}


@pytest.mark.parametrize(
    "meets", ["no other", "another", "one of another queue", "slots", "no key", "a later claim"]
)
def test_a_job_that_meets_no_other_of_its_key_has_it_with_the_first_write_of_its_row(
    dsn: str, conn: psycopg.Connection, meets: str
) -> None:
    with Client(dsn) as client:
        slots = 2 if meets == "slots" else None
        client.enqueue(keyed(None if meets == "no key" else "k", "a", slots=slots))
        [[[job]]] = [ask_all(conn, [claim_any("q", lease=NEVER, token=1)])]
        if meets in ("another", "one of another queue"):
            queue = "r" if "queue" in meets else "q"
            client.enqueue(EnqueueRequest(queue, "t", id="b", exclusive="k"))
        if meets == "a later claim":
            conn.execute("update bgjob_job set token = 2")
    claimed = Claimed(job._replace(exclusive="k"), 1)
    row = Statement("select ctid, tokens from bgjob_exclusive", None, lambda rows: rows[0])
    asked = [lock_keys([], [claimed]), row, acquire("q", [claimed]), row]
    _, locked, answer, after = ask_all(conn, asked)
    assert answer == ({} if meets == "a later claim" else {("a", 1): slots or 1})
    if meets == "no other":
        assert after == locked
    else:
        assert locked[1] is None
    assert after[1] == (None if meets == "a later claim" else [1])


def test_each_of_several_keys_is_granted_as_its_own_jobs_allow(
    dsn: str, conn: psycopg.Connection
) -> None:
    names = ("alone", "elsewhere", "held", "late", "met", "named", "ours", "slots", "surplus")
    with Client(dsn) as client:
        client.enqueue(keyed("held", "held 0"))
        take(conn, "q", lease=NEVER)
        client.enqueue(keyed("met", "met 0"))
        ask_all(conn, [claim_any("q", lease=NEVER, token=1)])  # it has not asked for its key yet
        client.enqueue(keyed("late", "late 0"))
        conn.execute("update bgjob_job set waits = true where id = 'late 0'")
        client.enqueue(EnqueueRequest("r", "t", id="elsewhere 0", exclusive="elsewhere"))
        for key in names:
            slots = 2 if key == "slots" else None
            stored = None if key == "named" else key
            client.bulk_enqueue([keyed(stored, f"{key} {n}", slots=slots) for n in (1, 2)])
    [jobs] = ask_all(conn, [claim("q", limit=100, lease=NEVER, token=2, marks={0: LONG_AGO})])
    claimed = {job.id: Claimed(job, 2) for job in jobs}
    for id_ in ("named 1", "named 2"):
        claimed[id_] = Claimed(claimed[id_].job._replace(exclusive="named"), 2)

    def ask(*ids: str) -> Any:
        asked = [claimed[id_] for id_ in ids]
        ahead = [3 if id_ == "surplus 2" else int(id_[-1]) for id_ in ids]
        acquires = acquire("q", asked, ahead=ahead, in_a_row=2, most=2)
        answer = ask_all(conn, [lock_keys(str(c.job.exclusive) for c in asked), acquires])[-1]
        return {id_: slots for (id_, _), slots in answer.items()}

    assert ask("ours 1") == {"ours 1": 1}
    answer = ask(*(id_ for id_ in claimed if id_ != "ours 1"))
    granted = {f"{key} {n}": 1 for key in ("alone", "elsewhere", "named") for n in (1, 2)}
    granted |= {"ours 2": 1, "surplus 1": 1, "slots 1": 2, "slots 2": 2}
    refused = [f"{key} {n}" for key in ("held", "late", "met") for n in (1, 2)] + ["surplus 2"]
    assert answer == granted | dict.fromkeys(refused, 0)
    waits = conn.execute("select id from bgjob_job where waits order by id").fetchall()
    assert [id_ for (id_,) in waits] == sorted([*refused, "late 0"])
    # As after an answer that was lost.
    assert ask("ours 1", *granted) == {"ours 1": 1, **granted}


def test_jobs_that_come_first_are_not_put_aside_with_the_surplus_of_later_ones(
    dsn: str, conn: psycopg.Connection
) -> None:
    with Client(dsn) as client:
        client.enqueue(keyed("k", "running", slots=2))
        [[running]] = ask_all(conn, [claim_any("q", lease=NEVER, token=1)])
        ask_all(conn, [lock_keys(["k"]), acquire("q", [Claimed(running, 1)])])
        client.bulk_enqueue([keyed("k", id_, slots=2) for id_ in ("a", "b", "c", "d")])
    # No usual claim meets it, so that nothing would wake it while its slot is free.
    conn.execute("update bgjob_job set deaths = 2 where id = 'a'")
    [jobs] = ask_all(conn, [claim("q", limit=2, lease=NEVER, token=2, marks={0: LONG_AGO})])
    assert [job.id for job in jobs] == ["b", "c"]
    asked = [Claimed(job, 2) for job in jobs]
    acquires = acquire("q", asked, holding=[1], ahead=[2, 3], in_a_row=1, most=2)
    assert {*ask_all(conn, [lock_keys(["k"]), acquires])[-1].values()} == {0}
    waits = conn.execute("select id from bgjob_job where waits order by id").fetchall()
    assert waits == [("b",), ("c",), ("d",)]


class Chains:
    """Workers of two queues that claim, ask, settle, give back and die, statement by statement."""

    def __init__(
        self, conn: psycopg.Connection, client: Client, seed: int, numbers: list[int | None]
    ) -> None:
        self.numbers = numbers  # of slots
        self.conn, self.client, self.random = conn, client, Random(seed)
        self.slots: dict[str, int] = {}
        self.jobs = {w: deque[Claimed]() for w in "abc"}
        self.lines = {w: Lines(self.jobs[w]) for w in "abc"}
        self.running: dict[str, list[Claimed]] = {w: [] for w in "abc"}
        self.places = dict.fromkeys("abc", 1)
        self.most = 0
        self.tokens = itertools.count(1)
        self.queue = {"a": "q", "b": "q", "c": "r"}
        self.claimed: dict[str, list[Claimed]] = {w: [] for w in self.queue}
        self.chain: dict[str, list[Claimed]] = {w: [] for w in self.queue}  # has the key
        self.enqueued, self.done = 0, 0

    def enqueue(self) -> None:
        queue, id_ = self.random.choice("qqr"), f"{self.enqueued:03}"
        slots = self.random.choice(self.numbers)
        self.client.enqueue(EnqueueRequest(queue, "t", id=id_, exclusive="k", slots=slots))
        self.slots[id_] = slots or 1
        self.enqueued += 1

    def claim(self, worker: str) -> None:
        token, limit = next(self.tokens), self.random.randint(1, 4)
        marks = {0: datetime(2001, 1, 1, tzinfo=UTC)}
        claims = claim(self.queue[worker], limit=limit, lease=NEVER, token=token, marks=marks)
        self.claimed[worker] += [
            Claimed(job, token) for [jobs] in [ask_all(self.conn, [claims])] for job in jobs
        ]

    def ask(self, worker: str) -> None:
        """Ask for the first of the claimed jobs; perhaps the worker wants some of these only."""
        queue, chain = self.queue[worker], self.chain[worker]
        claimed = sorted(self.claimed[worker], key=lambda c: (c.job.next_run_at, c.job.id))
        if not claimed:
            return
        count = self.random.randint(1, len(claimed))
        asking, self.claimed[worker] = claimed[:count], claimed[count:]
        holding = {c.token for c in (*claimed, *chain)}
        enough, most = self.random.randint(1, len(asking)), {"a": 1, "b": 2, "c": 3}[worker]
        first = self.due(queue)
        asked = acquire(
            queue,
            asking,
            holding=holding,
            ahead=range(1, len(asking) + 1),
            in_a_row=enough,
            most=most,
        )
        answer = ask_all(self.conn, [lock_keys(["k"]), asked])[-1]
        granted = [c for c in asking if answer[c.job.id, c.token]]
        if granted:
            self.places[worker] = min(answer[granted[0].job.id, granted[0].token], most)
            self.start(worker, granted)
        chain += granted
        # They come before any other due job of the key and the queue.
        held = {c.job.id for chain in self.chain.values() for c in chain}
        assert {*first[: first.index(granted[-1].job.id)]} <= held if granted else True
        assert len(granted) <= enough * self.places[worker]

    def start(self, worker: str, granted: list[Claimed]) -> None:
        """Start the first jobs of a worker that has been granted more, and count all that run."""
        places = {"k": self.places[worker]}
        self.running[worker] += self.lines[worker].enter(granted, places)
        self.check()

    def check(self) -> None:
        """Fail if more jobs run than each of them allows."""
        running = [c.job.id for started in self.running.values() for c in started]
        assert len(running) <= min([self.slots[id_] for id_ in running], default=0), self.running
        self.most = max(self.most, len(running))

    def due(self, queue: str) -> list[str]:
        due = "where queue = %s and next_run_at <= now() order by next_run_at, id"
        jobs = self.conn.execute(f"select id from bgjob_job {due}", [queue]).fetchall()
        return [id_ for (id_,) in jobs]

    def end_first(self, worker: str, *, drains: bool) -> None:
        chain, lines, running = self.chain[worker], self.lines[worker], self.running[worker]
        if not running:
            return
        first = self.random.choice(running)
        events = ["complete", "retry", "give back", "delete", "die"]
        event = "complete" if drains else self.random.choice([*events[:1] * 3, *events[1:]])
        ended = [first]
        match event:
            case "complete":
                ask_all(self.conn, [complete(ended)])
                self.done += 1
            case "retry":
                ask_all(self.conn, [postpone([Postponed(first, 0.0, "again", refund=False)])])
            case "give back":
                ended = [first, *lines.waiting]
                ask_all(self.conn, [release_jobs(first.job.queue, ended, tell=False)])
            case "delete":
                self.conn.execute("delete from bgjob_job where id = %s", [first.job.id])
                self.done += 1
            case _:
                ended = chain.copy()
                tokens = [c.token for c in (*chain, *self.claimed[worker])]
                self.claimed[worker].clear()
                self.conn.execute(
                    "update bgjob_job set token = null, lease_until = null where token = any (%s)",
                    [tokens],
                )
        self.chain[worker] = [c for c in chain if c not in ended]
        for each in [c for c in running if c in ended]:
            running.remove(each)
            lines.leave(each, goes_on=event not in ("give back", "die"))
        lines.take_ended()
        running += self.jobs[worker]
        self.jobs[worker].clear()
        self.check()
        if len(self.chain[worker]) < self.places[worker] and event not in ("delete", "die"):
            self.release(first.job.queue)

    def release(self, queue: str) -> None:
        ask_all(
            self.conn, [lock_keys(["k"]), release(queue, ["k"], most=self.random.randint(1, 4))]
        )

    def look(self, worker: str) -> None:
        if ask_all(self.conn, [blocked(self.queue[worker], after="", limit=9)])[0].keys:
            self.release(self.queue[worker])

    def step(self, *, drains: bool) -> None:
        worker = self.random.choice("abc")
        if self.random.random() < 0.5:
            self.look(worker)
        if self.random.random() < 0.7:
            self.claim(worker)
        if self.random.random() < 0.7:
            self.ask(worker)
        if self.random.random() < 0.7:
            self.end_first(worker, drains=drains)


@pytest.mark.parametrize("numbers", [[None], [3], [None, 2, 2, 3]], ids=str)
@pytest.mark.parametrize(
    "seed", [n if n < 3 else pytest.param(n, marks=pytest.mark.soak) for n in range(30)]
)
def test_the_first_jobs_of_a_key_and_a_queue_always_go_first_and_no_more_than_it_has_slots(
    dsn: str, conn: psycopg.Connection, seed: int, numbers: list[int | None]
) -> None:
    with Client(dsn) as client:
        world = Chains(conn, client, seed, numbers)
        for _ in range(120):
            if world.random.random() < 0.5:
                world.enqueue()
            world.step(drains=False)
        left = 3000
        while count(conn) and left:
            world.step(drains=True)
            left -= 1
    assert world.done == world.enqueued
    assert world.most == (numbers[0] or 1) or len(numbers) > 1 < world.most
    world.look("a")
    assert count(conn, "bgjob_exclusive") == 0


def test_a_job_that_waits_where_no_look_is_expected_to_find_it_is_found_at_the_end(
    dsn: str, conn: psycopg.Connection
) -> None:
    ran: list[str] = []
    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", str(n)) for n in range(4)])
        take(conn, "q", lease=NEVER)
        conn.execute("update bgjob_job set waits = true where id <> '0'")
        conn.execute("update bgjob_job set next_run_at = '2001-01-01 00:00+00' where id = '2'")
        conn.execute("delete from bgjob_job where id = '0'")
        for _ in range(3):
            client.do("q", Mux().register("t", lambda job: ran.append(job.id)))
    assert ran == ["1", "3", "2"]
    assert count(conn, "bgjob_exclusive") == 0


def test_what_a_key_knows_of_a_time_to_come_is_not_believed(
    dsn: str, conn: psycopg.Connection
) -> None:
    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", str(n)) for n in range(3)])
    take(conn, "q", lease=NEVER)
    # The clock has been set back since.
    conn.execute("update bgjob_exclusive set since = now() + interval '1 h'")
    conn.execute("update bgjob_job set waits = id = '1'")
    conn.execute("delete from bgjob_job where id = '0'")
    [[[job]]] = [ask_all(conn, [claim_any("q", lease=NEVER, token=1)])]
    assert granted(conn, Claimed(job, 1)) == {("2", 1): False}
    assert len(ask_all(conn, [lock_keys(["k"]), release("q", ["k"])])[-1]) == 1
    assert conn.execute("select id from bgjob_job where not waits").fetchall() == [("1",)]


@pytest.mark.parametrize("asks_again", [False, True])
def test_a_job_that_is_committed_late_waits_before_those_that_are_due_later(
    dsn: str, conn: psycopg.Connection, asks_again: bool
) -> None:
    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", str(n)) for n in range(2)])
        held = take(conn, "q", lease=NEVER)
        conn.execute("update bgjob_job set waits = true where id = '1'")
        client.enqueue(keyed("k", "late"))
    conn.execute(
        "update bgjob_job set next_run_at = next_run_at - interval '1 h' where id = 'late'"
    )
    [[[job]]] = [ask_all(conn, [claim_any("q", lease=NEVER, token=2)])]
    assert granted(conn, Claimed(job, 2)) == {("late", 2): False}
    if asks_again:  # after an unanswered request for its key
        assert granted(conn, held) == {("0", 1): True}
    assert settled(conn, held, Complete()) == {"0"}
    assert conn.execute("select id from bgjob_job where not waits").fetchall() == [("late",)]


def test_a_key_that_is_released_wakes_the_first_job_of_each_queue(
    dsn: str, conn: psycopg.Connection
) -> None:
    queues = ["a", "q", "r", "s"]
    requests = [EnqueueRequest(q, "t", id=f"{q}{n}", exclusive="k") for q in queues for n in "123"]
    with Client(dsn) as client:
        client.bulk_enqueue(requests)
    held = take(conn, "q", lease=NEVER)
    conn.execute("update bgjob_job set waits = true where id <> 'q1'")
    assert settled(conn, held, Complete()) == {"q1"}
    woken = conn.execute("select id from bgjob_job where not waits order by id").fetchall()
    assert woken == [("a1",), ("q2",), ("r1",), ("s1",)]


# -- what the engine makes of it ------------------------------------------------------------


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def engine_with(*keys: str, transactional: bool = False) -> tuple[Engine, list[Claimed]]:
    """Make an engine that has claimed a job for each key, and has yet to acquire them."""
    engine = Engine(
        concurrency=len(keys),
        poll_interval=1.0,
        lease=30.0,
        notify=False,
        tokens=itertools.count(1),
        transactional={"t"} if transactional else (),
    )
    jobs = [Job(f"job of {key}", "q", "t", None, 1, None, 0, NOON, NOON, NOON, key) for key in keys]
    assert isinstance(engine.step(0.0), Exchange)
    reply = Reply(swept=Swept(jobs, 0), lines=[Line(0, NOON, None, has_suspects=False)])
    assert engine.acknowledge(reply, 0.0).run == []
    return engine, [Claimed(job, 1) for job in jobs]


def exchanges(engine: Engine, now: float, refused: Callable[[Exchange], bool]) -> list[Exchange]:
    """Run the engine for some time, and return the exchanges it sent, some of them refused."""
    end, sent = now + 5.0, []
    while now < end:
        match engine.step(now):
            case Exchange() as exchange:
                sent.append(exchange)
                if refused(exchange):
                    engine.reject(now)
                else:
                    granted = dict.fromkeys(((c.job.id, c.token) for c in exchange.acquire), True)
                    settled = {c.job.id for c in exchange.complete}
                    extended = {c.job.id for c in exchange.extend}
                    engine.acknowledge(
                        Reply(acquired=granted, settled=settled, extended=extended), now
                    )
            case Sleep(until):
                now = until
            case step:
                raise AssertionError(step)
    return sent


def test_a_key_that_cannot_be_locked_delays_no_other() -> None:
    engine, claimed = engine_with("a", "b", "c", "d")

    def refused(exchange: Exchange) -> bool:
        return any(c.job.exclusive == "a" for c in exchange.acquire)

    sent = exchanges(engine, 0.0, refused)
    taken = [c for exchange in sent if not refused(exchange) for c in exchange.acquire]
    assert sorted(taken) == claimed[1:]
    # What is refused comes to stand alone, and is tried again.
    last = max(n for n, e in enumerate(sent) if e.acquire and not refused(e))
    alone = [e for e in sent[last:] if refused(e)]
    assert alone
    assert all(len(e.acquire) == 1 and not e.claim and not e.extend for e in alone)


def test_a_key_that_others_have_locked_holds_no_slot() -> None:
    engine, claimed = engine_with("a", "b")
    step = engine.step(0.0)
    assert isinstance(step, Exchange)
    assert step.acquire == claimed
    engine.reject(0.1, for_lock=True)
    step = engine.step(0.1)
    assert isinstance(step, Exchange)
    assert step.probe_keys == ["a", "b"]
    assert engine.pace.running == 0
    engine.acknowledge(Reply(barred_keys=["a"]), 0.1)
    assert engine.pace.running == 1
    sent = exchanges(engine, 0.1, lambda _: False)
    assert [c for exchange in sent for c in exchange.acquire] == claimed[1:] + claimed[:1]
    assert engine.pace.running == 2


def test_a_job_that_others_had_locked_asks_for_its_key_again_and_soon() -> None:
    engine, claimed = engine_with("a", "b")
    now, asked, ran = 1.0, list[float](), list[Claimed]()
    while len(ran) < 2:
        match engine.step(now):
            case Exchange(acquire=[]):
                engine.acknowledge(Reply(), now)
            case Exchange() as exchange:
                asked.append(now)
                # "b" is locked until it has been asked for ten times.
                is_locked = len(asked) < 10
                granted = {
                    (c.job.id, c.token): None if is_locked and c == claimed[1] else True
                    for c in exchange.acquire
                }
                ran += engine.acknowledge(Reply(acquired=granted), now).run
            case Sleep(until):
                now = until
            case step:
                raise AssertionError(step)
    assert ran == claimed
    pauses = [after - before for before, after in itertools.pairwise(asked)]
    assert pauses == pytest.approx([0.002, 0.004, 0.008, 0.016, 0.032, *4 * [0.05]])


def test_a_job_that_is_lost_before_it_has_its_key_is_forgotten() -> None:
    engine, [claimed] = engine_with("a")
    step = engine.step(1.0)
    assert isinstance(step, Exchange)
    assert step.acquire == [claimed]
    assert engine.acknowledge(Reply(acquired={(claimed.job.id, 9): True}), 1.0).run == []
    assert engine.pace.running == 0


@pytest.mark.parametrize("how", ["answered", "refused", "disconnected"])
def test_the_key_of_a_job_that_its_own_transaction_settled_is_released_in_the_end(
    how: str,
) -> None:
    engine, claimed = engine_with("a", "b", transactional=True)
    exchanges(engine, 0.0, lambda _: False)
    engine.finish([Outcome(c, Committed(Complete()), 0.1) for c in claimed])
    if how == "refused":
        sent = exchanges(engine, 10.0, lambda e: "a" in e.release)
        assert ["b"] in [e.release for e in sent]
    elif how == "disconnected":
        step = engine.step(10.0)
        assert isinstance(step, Exchange) and step.release == ["a", "b"]
        engine.disconnect(10.0)
        engine.reconnect()
    sent = exchanges(engine, 20.0, lambda _: False)
    released = [key for exchange in sent for key in exchange.release]
    assert released == (["a"] if how == "refused" else ["a", "b"])


# -- a worker's chain of jobs of one key -----------------------------------------------------


def chained(*jobs: Job, concurrency: int = 10) -> tuple[Engine, list[Claimed]]:
    """Make an engine whose claim has these jobs, and that was granted their keys."""
    engine = Engine(
        concurrency=concurrency,
        poll_interval=1.0,
        lease=30.0,
        notify=False,
        tokens=itertools.count(1),
    )
    assert isinstance(engine.step(0.0), Exchange)
    reply = Reply(swept=Swept([*jobs], 0), lines=[Line(0, NOON, None, has_suspects=False)])
    assert engine.acknowledge(reply, 0.0).run == []
    asked = engine.step(0.0)
    assert isinstance(asked, Exchange)
    assert not asked.release
    granted = {(c.job.id, c.token): True for c in asked.acquire}
    return engine, engine.acknowledge(Reply(acquired=granted), 0.0).run


def job_of(key: str, id_: str, minute: int = 0, priority: int = 0) -> Job:
    due = NOON.replace(minute=minute)
    return Job(id_, "q", "t", None, 1, None, priority, due, NOON, NOON, key)


def end(engine: Engine, now: float, *outcomes: Outcome) -> Exchange:
    """End jobs; return the exchange that settles them, answered."""
    engine.finish(outcomes)
    step = engine.step(now)
    assert isinstance(step, Exchange)
    engine.acknowledge(Reply(settled={o.claimed.job.id for o in step.outcomes}), now)
    return step


def test_a_key_is_released_when_the_last_job_of_its_claim_is_settled() -> None:
    engine, run = chained(*(job_of("k", str(n)) for n in range(3)), job_of("l", "3"))
    assert [c.job.id for c in run] == ["0", "1", "2", "3"]
    first, second, last, other = (Outcome(c, Complete(), 0.0) for c in run)
    assert end(engine, 0.01, first, other).release == ["l"]
    assert end(engine, 0.02, second).release == []
    step = end(engine, 0.03, last)
    assert step.release == ["k"]
    assert step.in_a_row > 100  # as many as one slot runs soon: these were quick


@pytest.mark.parametrize("is_granted", [True, False])
def test_a_key_for_which_the_next_jobs_ask_is_released_if_these_do_not_get_it(
    is_granted: bool,
) -> None:
    engine, [first] = chained(job_of("k", "0"))
    now, found = 1.0, [job_of("k", "1", 1)]
    while not (isinstance(step := engine.step(now), Exchange) and step.claim and step.claim.limit):
        now += 1.0
        assert isinstance(step, Sleep) and now < 9.0
    engine.finish([Outcome(first, Complete(), 0.0)])
    lines = [Line(0, NOON, None, has_suspects=False)]
    is_sweep = isinstance(step.claim, Sweep)
    swept = Reply(swept=Swept(found, 0), lines=lines)
    engine.acknowledge(swept if is_sweep else Reply(claimed=found), now)
    step = engine.step(now)
    assert isinstance(step, Exchange)
    assert [o.claimed.job.id for o in step.outcomes] == ["0"]
    assert ([c.job.id for c in step.acquire], step.release) == (["1"], [])
    [claimed] = step.acquire
    answer = {("1", claimed.token): int(is_granted)}
    run = engine.acknowledge(Reply(settled={"0"}, acquired=answer), now).run
    assert [c.job.id for c in run] == ["1"] * is_granted
    if is_granted:
        assert end(engine, now, Outcome(claimed, Complete(), 0.0)).release == ["k"]
    else:
        step = engine.step(now)
        assert isinstance(step, Exchange) and step.release == ["k"]


def test_quick_jobs_are_claimed_while_others_wait_for_their_keys_and_slow_ones_are_not() -> None:
    for took, is_quick in ((1e-6, True), (1.0, False)):
        pace = Pace(10)
        pace.finished([])
        for _ in range(6):
            first = [Claimed(job_of(f"k{n}", str(n)), 1) for n in range(10)]
            pace.claimed(first, 0.0)
            pace.finished([Outcome(claimed, Complete(), took) for claimed in first])
        pace.running = pace.capacity
        assert pace.room == 0
        assert pace.room_beside(1000) == (1000 if is_quick else 0)


def test_the_jobs_of_a_key_run_in_the_order_in_which_they_are_due_whatever_their_priority() -> None:
    jobs = [
        job_of("k", "late", 9, -1),
        job_of("l", "other", 5),
        job_of("k", "b", 1),
        job_of("k", "a", 1, 5),
    ]
    assert [c.job.id for c in chained(*jobs)[1]] == ["a", "other", "b", "late"]


def test_a_key_whose_last_settlement_is_refused_is_released_with_the_next() -> None:
    engine, [first, last] = chained(job_of("k", "0"), job_of("k", "1"))
    engine.finish([Outcome(c, Complete(), 0.0) for c in (first, last)])
    step = engine.step(0.1)
    assert isinstance(step, Exchange) and step.release == ["k"]
    engine.reject(0.1)
    released = [
        (len(e.complete), e.release) for e in exchanges(engine, 0.1, lambda _: False) if e.outcomes
    ]
    assert released == [(1, ["k"]), (1, ["k"])]


@pytest.mark.parametrize("how", ["it did not start", "it is lost"])
def test_what_comes_after_a_job_that_is_given_back_or_lost_is_given_back(how: str) -> None:
    engine, run = chained(*(job_of("k", str(n)) for n in range(3)))
    if how == "it did not start":
        engine.finish([Outcome(run[0], Release(), None)])
    else:
        engine.cancelled([(run[0].token, "0")])
    assert isinstance(engine.step(0.1), Withdraw)
    engine.withdrawn(run[1:])
    step = engine.step(0.1)
    assert isinstance(step, Exchange)
    back = [c.job.id for c in step.release_jobs]
    assert sorted(back) == (["0", "1", "2"] if how == "it did not start" else ["1", "2"])
    assert step.release == ["k"]
    assert not step.claim


@pytest.mark.parametrize("then", ["it is settled once more", "it is cancelled"])
def test_the_key_of_a_job_that_its_settlement_passed_over_is_released_again(then: str) -> None:
    engine, [claimed] = chained(job_of("k", "0"))
    engine.finish([Outcome(claimed, Complete(), 0.0)])
    step = engine.step(0.1)
    assert isinstance(step, Exchange)
    assert (step.follows, step.release) == (False, ["k"])
    engine.acknowledge(Reply(), 0.1)
    if then == "it is cancelled":
        engine.cancelled([(claimed.token, "0")])
    step = engine.step(0.1)
    assert isinstance(step, Exchange)
    assert (step.follows, step.release) == (then != "it is cancelled", ["k"])
    assert len(step.outcomes) == step.follows


def test_a_job_that_is_cancelled_behind_another_of_its_key_does_not_start() -> None:
    engine, run = chained(*(job_of("k", str(n)) for n in range(2)))
    engine.cancelled([(run[1].token, "1")])
    assert isinstance(engine.step(0.01), Withdraw)
    engine.withdrawn(run[1:])
    step = engine.step(0.01)
    assert not isinstance(step, Withdraw)
    assert engine.running() == run[:1]


def test_a_worker_has_as_many_jobs_of_a_key_as_one_slot_runs_soon() -> None:
    engine, [first] = chained(job_of("k", "slow"))
    end(engine, 0.1, Outcome(first, Complete(), 1.0))
    # What took a second is no reason to take two of the next.
    claims = [job_of("k", str(n), n) for n in range(3)] + [job_of("l", "other", 4)]
    surplus = []
    for now in range(1, 9):
        match engine.step(float(now)):
            case Exchange() as exchange:
                asked = zip(exchange.acquire, exchange.ahead, strict=True)
                surplus += [c.job.id for c, number in asked if number > exchange.in_a_row]
                found = claims if exchange.claim and exchange.claim.limit else []
                claims = claims if not found else []
                lines = [Line(0, NOON, None, has_suspects=False)]
                is_sweep = isinstance(exchange.claim, Sweep)
                engine.acknowledge(
                    Reply(
                        swept=Swept(found if is_sweep else [], 0),
                        claimed=[] if is_sweep else found,
                        lines=lines,
                    ),
                    float(now),
                )
    assert surplus == ["1", "2"]


def test_jobs_behind_a_slow_one_of_their_key_are_given_back_and_not_claimed_again() -> None:
    engine, run = chained(*(job_of("k", str(n)) for n in range(3)))
    assert isinstance(engine.step(1.0), Withdraw)  # nothing is known of the first but that
    engine.withdrawn(run[1:])
    step = engine.step(1.0)
    assert isinstance(step, Exchange)
    assert [c.job.id for c in step.release_jobs] == ["1", "2"]
    engine.acknowledge(Reply(settled={"1", "2"}), 1.0)
    assert engine.pace.in_a_row == 1


def test_jobs_behind_one_of_their_key_take_no_slot() -> None:
    engine, run = chained(*(job_of("k", str(n)) for n in range(4)), concurrency=4)
    assert len(run) == 4
    assert engine.pace.has_free_slot
    step = engine.step(0.01)
    assert isinstance(step, Exchange) and step.claim is not None and step.claim.limit >= 3


def test_suspects_are_claimed_for_the_slots_that_jobs_behind_one_of_their_key_leave_free() -> None:
    engine, _ = chained(*(job_of("k", str(n)) for n in range(3)), concurrency=3)
    now, groups = 0.0, list[int]()
    while now < 5.0:
        match engine.step(now):
            case Exchange() as exchange:
                if isinstance(exchange.claim, ClaimGroup):
                    groups.append(exchange.claim.limit)
                found = [Line(0, NOON, None, has_suspects=True)]
                engine.acknowledge(Reply(lines=found), now)
            case Sleep(until):
                now = until
            case Withdraw():
                engine.withdrawn([])
            case step:
                raise AssertionError(step)
    assert set(groups) == {2}


def test_a_job_that_gets_its_key_after_one_before_it_was_given_back_is_given_back_too() -> None:
    engine, [first] = chained(job_of("k", "0"))
    engine.finish([Outcome(first, NeedsKey("l"), None)])  # of no concern
    engine, [first] = chained(job_of("k", "0"))
    later = Claimed(job_of("k", "1", 1), 2)
    engine._keys.wanting.append(later)
    engine._leases.hold([later], 0.0)
    engine.pace.running += 1
    step = engine.step(0.0)
    assert isinstance(step, Exchange) and step.acquire == [later]
    engine.finish([Outcome(first, Release(), None)])
    effects = engine.acknowledge(Reply(acquired={("1", 2): True}), 0.0)
    assert effects.run == []
    step = engine.step(0.0)
    assert isinstance(step, Exchange)
    assert sorted(c.job.id for c in step.release_jobs) == ["0", "1"]
    assert step.release == ["k"]


def test_a_line_goes_on_only_while_the_lease_lasts() -> None:
    now = 0.0
    jobs: deque[Claimed] = deque()
    lines = Lines(jobs, lambda: now)
    claims = [Claimed(job_of("k", str(n)), 1) for n in range(4)]
    jobs += lines.enter(claims)
    assert [*jobs] == claims[:1]
    lines.held_until = 10.0
    first = jobs.popleft()
    assert not lines.leave(first)
    assert not lines.leave(first)  # told twice
    assert [*jobs] == claims[1:2]
    assert lines.waiting == claims[2:]
    now = 10.0  # the process was frozen
    assert lines.leave(jobs.popleft())
    assert not jobs
    assert lines.take_ended() == claims[2:]
    assert lines.take_ended() == lines.waiting == []
    # The key may be granted again.
    assert lines.enter(claims[2:]) == claims[2:3]


def test_a_line_whose_first_job_is_given_back_is_given_back() -> None:
    jobs: deque[Claimed] = deque()
    lines = Lines(jobs)
    claims = [Claimed(job_of("k", str(n)), 1) for n in range(3)]
    jobs += lines.enter(claims)
    assert lines.leave(jobs.popleft(), goes_on=False)
    assert not jobs
    assert lines.take_ended() == claims[1:]


def test_a_line_whose_first_job_is_lost_does_not_hold_up_later_claims() -> None:
    jobs: deque[Claimed] = deque()
    lines = Lines(jobs)
    claims = [Claimed(job_of("k", str(n)), 1) for n in range(3)]
    jobs += lines.enter(claims)
    first = jobs.popleft()  # it runs
    assert lines.withdraw(()) == claims[1:]
    assert lines.enter(claims[1:]) == []
    assert lines.withdraw([first]) == claims[1:]
    assert lines.enter(claims[1:]) == claims[1:2]
    assert not lines.leave(first)


# -- long keys --------------------------------------------------------------------------------

WIDE = "😀" * 255


def test_a_key_that_no_index_can_hold_is_refused_at_the_enqueue() -> None:
    with pytest.raises(ValueError, match=r"at most 2600 bytes together.*shorter key"):
        EnqueueRequest(WIDE, "t", id=WIDE, exclusive=WIDE)
    request = EnqueueRequest("q", "t", exclusive=WIDE[:100])
    with pytest.raises(ValueError, match="at most 2600 bytes"):
        Schedule("😀" * 200, request=EnqueueRequest(WIDE, "t", exclusive=WIDE), every=60)
    Schedule("😀" * 200, request=request, every=60)


def test_the_longest_key_is_held_and_one_that_is_too_long_fails_alone(
    dsn: str,
) -> None:
    done: list[str] = []
    mux = Mux().register("t", lambda job: done.append(job.id))
    mux.register("wide", lambda _: None, exclusive=lambda _: WIDE, max_attempts=1)
    ids = [f"{n}".ljust(255, "x") for n in range(3)]
    long = [EnqueueRequest(WIDE, "t", id=id_, exclusive="k" * 255) for id_ in ids]
    edge = [EnqueueRequest(WIDE, "t", id=WIDE[:-1] + n, exclusive="é" * 255) for n in "ab"]
    with Client(dsn) as client, Worker(client, WIDE, mux, poll_interval=0.1):
        client.bulk_enqueue([*long, *edge])
        client.enqueue(EnqueueRequest(WIDE, "wide", id=WIDE))
        assert eventually(lambda: len(done) == 5)
        assert eventually(lambda: len(client.dlq.list()) == 1)
        [dead] = client.dlq.list()
        assert dead.id == WIDE
        assert "at most 2600 bytes" in str(dead.last_error)
