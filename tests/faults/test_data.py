"""Faults 24 to 27: odd payloads, spoiled rows, enormous calls and names harm no other job."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.jobs import requests
from support.nursery import TESTS
from support.waiting import NEVER, PATIENCE, eventually

from bgjob import (
    AsyncClient,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    MoveToDlq,
    Mux,
    QueueRequiredError,
    Reschedule,
    Result,
    Retry,
    TypeRequiredError,
    UnknownTypeError,
    Worker,
)
from faults.world import World

HOST = pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])
COLOUR = pytest.mark.parametrize("is_async", [False, True], ids=["Client", "AsyncClient"])


LEASE = 10.0
"""Seconds, in each world here: so long that no busy host loses it. Leases are not the subject."""


class Enqueuer:
    """A client of either colour, to be used without await."""

    def __init__(self, world: World, *, is_async: bool) -> None:
        self._world = world
        self._is_async = is_async

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        async def call() -> Any:
            async with AsyncClient(self._world.dsn) as client:
                return await getattr(client, method)(*args, **options)

        if self._is_async:
            return self._world.run(call())
        with Client(self._world.dsn) as client:
            return getattr(client, method)(*args, **options)

    def enqueue(self, request: EnqueueRequest) -> str:
        return str(self._call("enqueue", request))

    def bulk_enqueue(self, requests: Any, **options: Any) -> list[str | None]:
        ids: list[str | None] = self._call("bulk_enqueue", requests, **options)
        return ids


# -- 24: payloads --------------------------------------------------------------------------------


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


PAYLOADS: dict[str, bytes | None] = {
    "none": None,
    "empty": b"",
    "NUL": b"\0",
    "NULs": b"\0" * 1000,
    "every byte value": bytes(range(256)),
    "every byte value, backwards": bytes(range(255, -1, -1)) * 100,
    "no UTF-8": b"\xff\xfe\x80",
    "escapes": rb"\x00 \\ \000 E'\x41' " + b'"{NULL}"',
    "null": b"null",
    "no JSON": b"{'a': 1",
    "NaN": b"NaN",
    "deep": deep(100_000),
    "2**64": b"18446744073709551616",
    "a surrogate": b'"\\ud800"',
    "a raw surrogate": b'"\xed\xa0\x80"',
    "twice a key": b'{"a": 1, "a": 2}',
    "10 MB of one byte": b"x" * 10_000_000,
    "like COPY's end": b"\\.\n",
}


@HOST
def test_24_bytes_come_back_as_they_were(world: World, is_async: bool) -> None:
    enqueuer = Enqueuer(world, is_async=is_async)
    one = [EnqueueRequest("q", "t", arg, id=f"one: {name}") for name, arg in PAYLOADS.items()]
    many = [EnqueueRequest("q", "t", arg, id=f"many: {name}") for name, arg in PAYLOADS.items()]
    for request in one:
        world.acknowledge(enqueuer.enqueue(request), type="t", ledger=False)
    assert enqueuer.bulk_enqueue(many) == [request.id for request in many]
    world.acknowledge(*(request.id for request in many), type="t", ledger=False)
    seen: dict[str, list[bytes | None]] = {}

    def handler(job: Job) -> Result:
        seen.setdefault(job.id, []).append(job.arg)
        # Twice through a settlement, then through the dead-letter table, then done.
        match len(seen[job.id]):
            case 1:
                return Retry(0, error="once")
            case 2:
                return Reschedule(0)
            case 3:
                return MoveToDlq("why")
            case _:
                return Complete()

    async def coroutine(job: Job) -> Result:
        return handler(job)

    worker = world.worker(
        Mux().register("t", coroutine if is_async else handler), is_async=is_async, concurrency=2
    )
    world.done()
    world.witness(worker, "dead", times=len(one) + len(many))
    dead = {job.id: job.arg for job in world.client.dlq.list(queue="q")}
    assert dead == {request.id: request.payload for request in one + many}
    assert len(world.client.dlq.requeue(queue="q")) == len(dead)
    world.witness(worker, "completed", times=len(dead))
    assert seen == {request.id: [request.payload] * 4 for request in one + many}
    assert worker.of("error", "lost") == []


def test_24_a_payload_that_is_not_json_fails_the_job_that_decodes_it(world: World) -> None:
    def decode(job: Job) -> None:
        job.json()

    bad = ["empty", "no UTF-8", "no JSON", "NaN", "deep", "a raw surrogate", "NUL"]
    for name in bad:
        world.client.enqueue(EnqueueRequest("q", "t", PAYLOADS[name], id=name))
        world.client.enqueue(EnqueueRequest("q", "t", [name], id=f"neighbour of {name}"))
        world.acknowledge(name, f"neighbour of {name}", type="t", ledger=False)
    worker = world.worker(Mux().register("t", decode, max_attempts=1), concurrency=2)
    world.done()
    for name in bad:
        world.witness(worker, "dead", name)
        world.witness(worker, "completed", f"neighbour of {name}")
    assert all("JSONDecodeError" in str(dead.last_error) for dead in world.client.dlq.list())


@pytest.mark.timeout(180)
@HOST
def test_24_a_payload_of_100_mb_comes_back_and_delays_no_neighbour(
    world: World, is_async: bool
) -> None:
    # A part that no size of a chunk divides, again and again: to draw it all takes a second.
    payload = (random.Random(24).randbytes(1_234_567) * 82)[:100_000_000]
    enqueuer = Enqueuer(world, is_async=is_async)
    neighbours = [EnqueueRequest("q", "t", n, id=f"neighbour {n}") for n in range(6)]
    enqueuer.bulk_enqueue(neighbours[:3])
    enqueuer.enqueue(EnqueueRequest("q", "t", payload, id="large"))
    enqueuer.bulk_enqueue(neighbours[3:])
    world.acknowledge("large", *(n.id for n in neighbours), type="t", ledger=False)
    same: list[bool] = []

    def handler(job: Job) -> None:
        if job.id == "large":
            same.append(job.arg == payload)

    worker = world.worker(Mux().register("t", handler), is_async=is_async)
    world.done()
    for id in world.jobs:
        world.witness(worker, "completed", id)
    assert same == [True]


class Unknown:
    """A value that JSON cannot express."""


def endless() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


def nested(depth: int) -> list[Any]:
    items: list[Any] = []
    for _ in range(depth):
        items = [items]
    return items


REFUSED: dict[str, Callable[[], Any]] = {
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "NaN inside": lambda: {"a": [1, {"b": float("nan")}]},
    "NaN beside null": lambda: [None, float("-inf")],
    "2**64": lambda: 2**64,
    "-2**63 - 1": lambda: -(2**63) - 1,
    "a surrogate": lambda: "\ud800",
    "a surrogate as a key": lambda: {"\udfff": 1},
    "a number as a key": lambda: {1: 2},
    "bytes inside": lambda: {"a": b"bytes"},
    "a set": lambda: {1, 2},
    "an object": Unknown,
    "a class": lambda: Unknown,
    "a recursive list": endless,
    "too deep a list": lambda: nested(2_000),
}


@COLOUR
def test_24_values_that_json_cannot_express_are_refused_at_the_enqueue(
    world: World, is_async: bool
) -> None:
    enqueuer = Enqueuer(world, is_async=is_async)

    def requests(made: Callable[[], Any]) -> Iterator[EnqueueRequest]:
        yield EnqueueRequest("q", "fine", 1)
        yield EnqueueRequest("q", "my type", made())

    for name, made in REFUSED.items():
        with pytest.raises((TypeError, ValueError), match="arg of job type 'my type'") as error:
            enqueuer.enqueue(EnqueueRequest("q", "my type", made()))
        world.saw(f"{name}: {error.value}")
        with pytest.raises(type(error.value), match="arg of job type 'my type'"):
            enqueuer.bulk_enqueue(requests(made))
    assert world.live() == 0


@HOST
def test_24_extreme_values_that_json_can_express_come_back_equal(
    world: World, is_async: bool
) -> None:
    values: dict[str, Any] = {
        "2**64 - 1": 2**64 - 1,
        "-2**63": -(2**63),
        "a small float": 5e-324,
        "a large float": 1.7976931348623157e308,
        "deep": nested(200),
        "NUL in a text": "a\0b",
        "controls": "".join(map(chr, range(32))),
        "beyond the BMP": "\U0001f600\U0010ffff",
        "separators": "\u2028\u2029\ufeff\uffff",
        "an empty key": {"": {}},
        "1 MB of keys": {str(n): n for n in range(100_000)},
        "none inside": [None],
    }
    seen: dict[str, Any] = {}

    def handler(job: Job) -> None:
        seen[job.id] = job.json()

    enqueuer = Enqueuer(world, is_async=is_async)
    requests = [EnqueueRequest("q", "t", value, id=id) for id, value in values.items()]
    enqueuer.bulk_enqueue(requests)
    world.acknowledge(*values, type="t", ledger=False)
    worker = world.worker(Mux().register("t", handler), is_async=is_async)
    world.done()
    world.witness(worker, "completed", times=len(values))
    assert seen == values


# -- 25: rows that were spoiled by hand -------------------------------------------------------------

TIMES = ["'-infinity'", "'4713-01-01 BC'", "'0001-01-01 BC'", "'294276-01-01'", "'infinity'"]

SPOILS: list[str] = [
    *(f"next_run_at = {time}" for time in TIMES),
    *(f"created_at = {time}, updated_at = {time}" for time in TIMES),
    *(f"lease_until = {time}, token = 1" for time in TIMES),
    *(f"lease_until = {time}, token = null" for time in TIMES),
    "token = -1, lease_until = null",
    "token = 9223372036854775807, lease_until = null",
    "token = -9223372036854775808, lease_until = '-infinity'",
    "token = 0, lease_until = clock_timestamp()",
    "arg = null",
    "arg = ''",
    "arg = 'no json'",
    r"arg = '\x00ff'",
    "attempt = -5",
    "attempt = -2147483648",
    "attempt = 24",
    "attempt = 25",
    "attempt = 2147483646",
    "attempt = 2147483647",
    "last_error = null",
    "last_error = ''",
    "last_error = repeat('x', 1000000)",
    "last_error = '{\"\\'",
    "priority = -32768",
    "priority = 32767",
    "deaths = -32768",
    "deaths = -1",
    "deaths = 1",
    "deaths = 2",
    "deaths = 100",
    "deaths = 2000",
    "deaths = 32767",
    "deaths = 1, attempt = 2147483647",
    "deaths = 32767, token = 1, lease_until = '-infinity'",
    "type = 'unknown'",
    "type = repeat('\U0001f600', 255)",
]

NEVER_DUE = {
    spoil
    for spoil in SPOILS
    if spoil.startswith(("next_run_at", "lease_until"))
    and ("'infinity'" in spoil or "294276" in spoil)
}
"""Jobs that wait for a time that never comes stay as they are."""


@HOST
@pytest.mark.parametrize(
    "result", [Complete(), Retry(NEVER, "e"), Reschedule(NEVER), MoveToDlq("")]
)
def test_25_a_spoiled_row_affects_itself_only(world: World, is_async: bool, result: Result) -> None:
    def handle(job: Job) -> Result | None:
        if job.id.startswith("neighbour"):
            return None
        job.json()
        return result

    async def coroutine(job: Job) -> Result | None:
        return handle(job)

    for spoil in SPOILS:
        world.enqueue("t", f"neighbour: {spoil}", ledger=False)
        world.enqueue("t", spoil, ledger=False)
        world.query(f"update bgjob_job set {spoil} where id = %s", [spoil])
    neighbours = [id for id in world.jobs if id.startswith("neighbour")]
    mux = Mux().register("t", coroutine if is_async else handle, backoff=lambda _: NEVER)
    worker = world.worker(mux, is_async=is_async, concurrency=4)
    world.done(*neighbours)
    waiting = {spoil for spoil in SPOILS if spoil not in NEVER_DUE}

    def undone() -> set[str]:
        due = "select id from bgjob_job where next_run_at <= now() and lease_until is null"
        held = "select id from bgjob_job where lease_until < 'infinity'"
        return {id for (id,) in world.query(f"{due} union {held}")} & waiting

    eventually(lambda: not undone())
    assert undone() == set()
    for id in neighbours:
        world.witness(worker, "completed", id)
    world.enqueue("t", "neighbour: last", ledger=False)
    world.witness(worker, "completed", "neighbour: last")
    assert worker.of("error", "lost") == []
    ran = [event[1] for event in worker.of("started")]
    assert sorted(ran) == sorted(set(ran))
    assert not NEVER_DUE & set(ran)
    # The dead ones can be looked at and requeued, whatever their columns hold.
    dead = {job.id for job in world.client.dlq.list(limit=1000)}
    assert world.value("select count(*) from bgjob_dead_job") == len(dead)
    assert set(world.client.dlq.requeue(list(dead))) == dead
    assert worker.shutdown()


@pytest.mark.parametrize(
    "spoil",
    [
        "id = ''",
        "queue = ''",
        "type = ''",
        "id = repeat('x', 10000)",
        "queue = repeat('x', 256)",
        "type = repeat('x', 256)",
        "id = null",
        "queue = null",
        "type = null",
        "attempt = null",
        "priority = null",
        "deaths = null",
        "next_run_at = null",
        "created_at = null",
        "updated_at = null",
    ],
)
def test_25_the_schema_refuses_rows_that_a_worker_could_not_read(world: World, spoil: str) -> None:
    world.enqueue("t", "a", ledger=False)
    with pytest.raises((psycopg.IntegrityError, psycopg.DataError)) as error:
        world.query(f"update bgjob_job set {spoil}")
    world.saw(f"{type(error.value).__name__}: {error.value}")


@HOST
def test_25_a_row_whose_columns_were_spoiled_while_it_ran_affects_itself_only(
    world: World, is_async: bool
) -> None:
    gate = threading.Event()
    spoils = [
        "attempt = -2147483648",
        "attempt = 2147483647",
        "token = null",
        "token = -1",
        "token = null, lease_until = null",
        "lease_until = 'infinity'",
        "lease_until = '-infinity'",
        "lease_until = null",
        "deaths = 32767",
        "next_run_at = 'infinity'",
        "queue = 'other'",
        "type = 'other'",
        "id = 'other'",
    ]
    results: list[Result] = [Complete(), Retry(NEVER, "e"), Reschedule(NEVER), MoveToDlq("why")]
    jobs = {f"{n}: {spoil}": result for spoil in spoils for n, result in enumerate(results)}
    del jobs["0: id = 'other'"], jobs["1: id = 'other'"], jobs["2: id = 'other'"]
    first_runs: set[str] = set()

    def handle(job: Job) -> Result | None:
        if job.id in jobs and job.id not in first_runs:
            first_runs.add(job.id)
            assert gate.wait(PATIENCE)
            return jobs[job.id]
        return None

    world.enqueue("t", *jobs, ledger=False)
    world.enqueue("t", "neighbour 1", "neighbour 2", ledger=False)
    worker = world.worker(Mux().register("t", handle), is_async=is_async, concurrency=len(jobs))
    try:
        assert eventually(lambda: first_runs == set(jobs))
        for id in jobs:
            spoil = id.partition(": ")[2]
            world.query(f"update bgjob_job set {spoil} where id = %s", [id])
            if spoil == "id = 'other'":
                world.acknowledge("other", type="t", ledger=False)
                del world.jobs[id]
    finally:
        gate.set()
    world.done("neighbour 1", "neighbour 2")
    world.enqueue("t", "neighbour 3", ledger=False)
    for n in (1, 2, 3):
        world.witness(worker, "completed", f"neighbour {n}")
    for id in jobs:
        if "token = null" in id or "token = -1" in id:
            world.witness(worker, "lost", id)
    assert worker.of("error") == []
    # Only these can hold a job forever: a claim without an end, and a due time of infinity.
    left = {id for (id,) in world.query("select id from bgjob_job where lease_until = 'infinity'")}
    assert all("lease_until = 'infinity'" in id for id in left)
    assert worker.shutdown()
    world.query("update bgjob_job set lease_until = null where lease_until is not null")


# -- 26: enormous calls --------------------------------------------------------------------------

BULK = """
import asyncio, resource, sys
from bgjob import AsyncClient, Client, EnqueueRequest

dsn, colour, count, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "pause"

def requests():
    for n in range(count):
        if pause and n == count - 1:
            print("almost", flush=True)
            sys.stdin.read()
        yield EnqueueRequest("q", "t", n.to_bytes(8) * 125, id=f"{n:07}")

async def bulk_enqueue():
    async with AsyncClient(dsn) as client:
        return await client.bulk_enqueue(requests())

if colour == "async":
    ids = asyncio.run(bulk_enqueue())
else:
    with Client(dsn) as client:
        ids = client.bulk_enqueue(requests())
assert len(ids) == count, len(ids)
assert ids[::1000] == [f"{n:07}" for n in range(0, count, 1000)], ids[::1000]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak if sys.platform != "darwin" else peak // 1024)
"""
"""A process that enqueues so many jobs of 1 kB in one call, and prints its peak in kB."""


class Bulk:
    """A process that makes one enormous call."""

    def __init__(self, world: World, count: int, *, is_async: bool, pause: bool = False) -> None:
        self._popen = subprocess.Popen(
            [
                sys.executable,
                "-c",
                BULK,
                world.dsn,
                "async" if is_async else "thread",
                str(count),
                "pause" if pause else "go",
            ],
            cwd=TESTS,
            env={**os.environ, "PYTHONPATH": str(Path(TESTS).parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Bulk":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._popen.communicate()

    def line(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().strip()

    def go_on(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def kill(self) -> None:
        self._popen.send_signal(signal.SIGKILL)
        self._popen.wait(PATIENCE)
        if self._popen.stdin is not None:
            self._popen.stdin.close()
            self._popen.stdin = None


def enormous(world: World, count: int, *, is_async: bool) -> None:
    """Check that a call with so many requests is atomic, and its memory bounded."""
    # Three chunks: with the second one at the latest the memory has reached its height.
    with Bulk(world, 30_000, is_async=is_async) as small:
        usual = int(small.line())
    world.query("truncate bgjob_job")
    with Bulk(world, count, is_async=is_async, pause=True) as large:
        assert large.line() == "almost"
        assert world.live() == 0  # nothing is seen before all of it is
        large.go_on()
        peak = int(large.line())
    assert world.live() == count
    # What comes back is an id a request, about 100 bytes each; a request takes 1.5 kB and more.
    allowed = usual + 15_000 + (count - 30_000) * 200 // 1000
    world.saw(f"a peak of {peak} kB, with 30,000 {usual} kB", peak < allowed)
    world.query("truncate bgjob_job")


@pytest.mark.timeout(180)
@COLOUR
def test_26_an_enormous_call_is_atomic_and_its_memory_bounded(world: World, is_async: bool) -> None:
    enormous(world, 60_000, is_async=is_async)


@pytest.mark.soak
@pytest.mark.timeout(600)
@COLOUR
def test_26_a_call_with_a_million_requests_is_atomic_and_its_memory_bounded(
    world: World, is_async: bool
) -> None:
    enormous(world, 1_000_000, is_async=is_async)


@COLOUR
def test_26_a_process_that_is_killed_in_an_enormous_call_has_enqueued_nothing(
    world: World, is_async: bool
) -> None:
    sessions = (
        "select count(*) from pg_stat_activity where datname = current_database() "
        "and xact_start is not null and pid <> pg_backend_pid() "
        "and backend_type = 'client backend'"
    )
    with Bulk(world, 30_001, is_async=is_async, pause=True) as bulk:
        assert bulk.line() == "almost"
        assert eventually(lambda: world.value(sessions) == 1)
        bulk.kill()
    assert eventually(lambda: world.value(sessions) == 0)
    world.saw("nothing was written", world.live() == 0)


@COLOUR
def test_26_duplicates_are_found_inside_one_call_and_against_live_jobs(
    world: World, is_async: bool
) -> None:
    enqueuer = Enqueuer(world, is_async=is_async)
    many = [f"{n:05}" for n in range(25_000)]
    world.enqueue("t", "00007", "15000", ledger=False)
    # In the same chunk, in another, next to its twin, and already live in each place.
    calls = {
        "twice in a chunk": [*many[100:200], many[150]],
        "beside its twin": [many[1], many[1]],
        "in another chunk": [*many[16_000:], *many[16:15_000], many[16_001]],
        "live, first": ["00007", *many[100:200]],
        "live, in another chunk": [*many[16:15_000], "15000"],
    }
    for name, ids in calls.items():
        with pytest.raises(JobAlreadyExistsError) as error:
            enqueuer.bulk_enqueue(iter(requests(*ids)))
        world.saw(f"{name}: {error.value}", set(error.value.ids) <= {*ids})
        assert world.live() == 2, name
    placed = enqueuer.bulk_enqueue(requests(*many, *reversed(many)), on_conflict="skip")
    assert placed == [
        *(None if id in {"00007", "15000"} else id for id in many),
        *[None] * len(many),
    ]
    assert world.live() == len(many)


def at_once(
    world: World, is_async: bool, calls: list[list[EnqueueRequest]], on_conflict: str
) -> list[Any]:
    """Make concurrent bulk calls, and return the result or exception of each."""

    async def gathered() -> list[Any]:
        async with AsyncClient(world.dsn) as client:
            method: Any = client.bulk_enqueue
            return await asyncio.gather(
                *(method(call, on_conflict=on_conflict) for call in calls), return_exceptions=True
            )

    if is_async:
        return world.run(gathered())

    def call(requests: list[EnqueueRequest]) -> Any:
        method: Any = world.client.bulk_enqueue
        try:
            return method(requests, on_conflict=on_conflict)
        except JobAlreadyExistsError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


@COLOUR
@pytest.mark.parametrize("on_conflict", ["skip", "raise"])
def test_26_concurrent_small_calls_in_opposite_orders_lose_nothing(
    world: World, is_async: bool, on_conflict: str
) -> None:
    for round in range(5):
        ids = [f"{round} {n:03}" for n in range(200)]
        shuffled = random.Random(round).sample(ids, len(ids))
        calls = [requests(*ids), requests(*reversed(ids)), requests(*shuffled), requests(*ids)]
        check_placed(world, ids, at_once(world, is_async, calls, on_conflict))


def check_placed(world: World, ids: list[str], answers: list[Any]) -> None:
    """Each id was placed by exactly one call, and is live."""
    placed = [id for answer in answers if isinstance(answer, list) for id in answer if id]
    assert sorted(placed) == sorted(ids)
    refused = [answer for answer in answers if not isinstance(answer, list)]
    assert all(isinstance(error, JobAlreadyExistsError) for error in refused), refused
    world.acknowledge(*placed, type="t", ledger=False)
    assert world.live(*ids) == len(ids)
    world.saw(f"{len(answers) - len(refused)} calls were answered, {len(refused)} refused")


@COLOUR
@pytest.mark.parametrize("on_conflict", ["skip", "raise"])
def test_26_large_calls_in_opposite_orders_deadlock_and_lose_nothing(
    world: World, is_async: bool, on_conflict: str
) -> None:
    low = [f"low {n:05}" for n in range(10_000)]
    high = [f"high {n:05}" for n in range(10_000)]
    waiting = (
        "select count(*) from pg_stat_activity where datname = current_database() "
        "and wait_event_type = 'Lock'"
    )
    was_certain = threading.Event()

    def let_go() -> None:
        # Each has written most of its first chunk by now, and wants the other's next.
        if eventually(lambda: world.value(waiting) == 2):
            was_certain.set()
        blocker.rollback()

    with psycopg.connect(world.dsn) as blocker:
        world.client.bulk_enqueue(requests(low[-1], high[-1]), conn=blocker)
        referee = threading.Thread(target=let_go)
        referee.start()
        answers = at_once(
            world, is_async, [requests(*low, *high), requests(*high, *low)], on_conflict
        )
        referee.join()
    world.saw("a deadlock was certain", was_certain.is_set())
    check_placed(world, [*low, *high], answers)


# -- 27: names -----------------------------------------------------------------------------------

BAD_NAMES: dict[str, tuple[Any, str]] = {
    "empty": ("", "required|1 to 255"),
    "NUL": ("a\0b", "NUL"),
    "only NUL": ("\0", "NUL"),
    "256": ("x" * 256, "1 to 255 characters, not 256"),
    "10 kB": ("'" * 10_000, "1 to 255 characters, not 10000"),
    "a surrogate": ("a\ud800", "Unicode"),
    "bytes": (b"abc", "must be a str, not bytes"),
    "a number": (7, "must be a str, not int"),
}


@COLOUR
def test_27_names_that_a_database_cannot_hold_are_refused_before_it_sees_them(
    world: World, is_async: bool
) -> None:
    enqueuer = Enqueuer(world, is_async=is_async)

    def made(**spoiled: Any) -> Iterator[EnqueueRequest]:
        yield EnqueueRequest("q", "t")
        yield EnqueueRequest(**{"queue": "q", "type": "t", **spoiled})

    for name, (value, complaint) in BAD_NAMES.items():
        for field in ("queue", "type", "id"):
            with pytest.raises((ValueError, TypeError), match=complaint) as error:
                enqueuer.bulk_enqueue(made(**{field: value}))
            world.saw(f"{name}: {error.value}", field in str(error.value))
        with pytest.raises((ValueError, TypeError), match=complaint):
            Worker(world.client, value, Mux())
        with pytest.raises((ValueError, TypeError), match=complaint):
            Mux().register(value, lambda _: None)
    with pytest.raises(QueueRequiredError):
        EnqueueRequest("", "t")
    with pytest.raises(TypeRequiredError):
        EnqueueRequest("q", "")
    assert world.live() == 0


def test_27_looking_for_an_impossible_name_is_refused_or_finds_nothing(world: World) -> None:
    client = world.client
    found: list[Any] = []
    for value in ("", "x" * 10_000, "'", '"', "a\0b"):
        for call in (
            lambda value=value: client.dlq.get(value),
            lambda value=value: client.dlq.list(queue=value),
            lambda value=value: client.dlq.list(type=value),
            lambda value=value: client.dlq.requeue(value),
            lambda value=value: client.dlq.purge([value]),
        ):
            try:
                found.append(call())
            except (psycopg.DataError, ValueError) as error:
                world.saw(str(error), "\0" in value and "NUL" in str(error))
    assert not any(found)


NAMES = [
    "'",
    '"',
    "''; --",
    "\\",
    "a b\tc\nd",
    "%s",
    "{}",
    "é\U0001f600",
    "x" * 255,
    "'" * 255,
    "\\" * 255,
    "\U0001f600" * 255,
    "\u202eltr",
    ".",
    "null",
    "NULL",
]


@HOST
@pytest.mark.parametrize("transactional", [False, True], ids=["ordinary", "transactional"])
def test_27_every_other_name_passes_through_a_worker(
    world: World, is_async: bool, transactional: bool
) -> None:
    seen: list[tuple[str, str, str]] = []

    def handler(job: Job, *_: Any) -> None:
        seen.append((job.queue, job.type, job.id))

    async def coroutine(job: Job, *_: Any) -> None:
        handler(job)

    mux = Mux()
    register: Any = mux.register
    for name in NAMES[:-1]:
        register(name, coroutine if is_async else handler, transactional=transactional)
    for name in NAMES:
        world.client.enqueue(EnqueueRequest(name, name, id=name))
        world.acknowledge(name, type=name, ledger=False)
        worker = world.worker(mux, is_async=is_async, queue=name)
        event = "completed" if name != NAMES[-1] else "dead"
        world.witness(worker, event, name)
        assert worker.shutdown()
        assert worker.of("error") == []
    assert seen == [(name, name, name) for name in NAMES[:-1]]
    dead = world.client.dlq.get(NAMES[-1])
    assert dead is not None
    assert UnknownTypeError.__name__ in str(dead.last_error)
