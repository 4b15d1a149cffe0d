"""Of the jobs that share a key one runs at a time, in the order in which they are due."""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import psycopg
import pytest

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
    Worker,
)

PATIENCE = 20.0
NEVER = 3600.0


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def count(conn: psycopg.Connection, table: str) -> int:
    [(number,)] = conn.execute(cast(Any, f"select count(*) from {table}")).fetchall()
    return int(number)


def keyed(key: str | None, id_: str, **options: Any) -> EnqueueRequest:
    return EnqueueRequest("q", "t", id=id_, exclusive=key, **options)


def _never(_: int) -> float:
    return NEVER


class Diary:
    """Who ran when."""

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
def crew(dsn: str) -> Iterator[Callable[..., Worker]]:
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
    dsn: str, conn: psycopg.Connection, crew: Callable[..., Worker], workers: int
) -> None:
    diary = Diary()
    requests = [keyed([None, "a", "b", "c"][n % 4], f"{n:04}") for n in range(400)]
    with Client(dsn) as client:
        client.bulk_enqueue(requests)
    for _ in range(workers):
        crew(Mux().register("t", diary.handle))
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
    crew: Callable[..., Worker],
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
    crew(mux, poll_interval=NEVER)
    assert eventually(lambda: len(ran) == 4), ran
    assert ran == ["0", "1", "2", "3"]


def test_jobs_that_wait_for_a_key_leave_the_way_to_others(
    dsn: str, conn: psycopg.Connection, crew: Callable[..., Worker]
) -> None:
    gate, ran = threading.Event(), []

    def handle(job: Job) -> None:
        ran.append(job.id)
        if job.id == "first":
            gate.wait(PATIENCE)

    with Client(dsn) as client:
        client.enqueue(keyed("k", "first"))
        client.bulk_enqueue([keyed("k", f"held-{n:04}") for n in range(2500)])
        client.bulk_enqueue([keyed(None, f"free-{n:04}") for n in range(100)])
        crew(Mux().register("t", handle), concurrency=2)
        assert eventually(lambda: len(ran) == 101)
        assert [(True, 2500)] == conn.execute(
            "select waits, count(*) from bgjob_job where id like 'held%' group by waits"
        ).fetchall()
        assert conn.execute("select attempt from bgjob_job where waits").fetchone() == (0,)
        gate.set()
        assert eventually(lambda: count(conn, "bgjob_job") == 0)
    assert ran[101:] == sorted(ran[101:])


def test_a_key_is_one_in_all_queues(
    dsn: str, conn: psycopg.Connection, crew: Callable[..., Worker]
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


def test_a_job_whose_holder_was_deleted_by_hand_runs_after_the_next_look(
    dsn: str, conn: psycopg.Connection, crew: Callable[..., Worker]
) -> None:
    started = threading.Event()
    gate = threading.Event()

    def handle(job: Job) -> None:
        if job.id == "0":
            started.set()
            gate.wait(PATIENCE)

    with Client(dsn) as client:
        client.bulk_enqueue([keyed("k", str(n)) for n in range(3)])
        crew(Mux().register("t", handle), poll_interval=0.05)
        assert started.wait(PATIENCE)
        assert eventually(lambda: conn.execute("select from bgjob_job where waits").rowcount == 2)
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
    dsn: str, conn: psycopg.Connection, crew: Callable[..., Worker], stamped: bool, colour: str
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
        crew(mux)
    assert eventually(lambda: count(conn, "bgjob_job") == 0)
    assert sum(len(ids) for ids in diary.order.values()) == 60
    assert {key for key in diary.order if key} == {"a", "b", "type:one"}
    assert all(most == 1 for key, most in diary.most.items() if key is not None)
    if stamped:
        assert all(ids == sorted(ids) for key, ids in diary.order.items() if key is not None)


def test_a_callable_that_finds_no_key_fails_the_attempt(
    dsn: str, conn: psycopg.Connection, crew: Callable[..., Worker]
) -> None:
    mux = Mux().register(
        "t", lambda _: None, exclusive=lambda job: job.json()["no"], max_attempts=1
    )
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", {"a": 1}))
        client.enqueue(EnqueueRequest("q", "t", {"no": "x" * 256}))
        crew(mux)
        assert eventually(lambda: count(conn, "bgjob_dead_job") == 2)
        errors = {str(dead.last_error) for dead in client.dlq.list()}
    assert any("KeyError" in error for error in errors)
    assert any("exclusive key" in error for error in errors)
