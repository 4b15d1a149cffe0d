"""How long an idle worker takes to start a job, against a bare LISTEN loop that claims a row."""

import random
import select
import threading
from collections.abc import Callable, Mapping
from time import perf_counter, sleep
from typing import Any
from uuid import uuid4

import harness
import psycopg
from harness import Bench, Figures, percentile

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

_QUEUE = "benchmark"
_PATIENCE = 10.0  # seconds, before a job that does not start is given up
_PAUSE = 0.01, 0.05  # seconds between two jobs, the least and the most

_INSERT = f"""
    with written as (
        insert into bgjob_job (id, queue, type) values (%s, '{_QUEUE}', 'noop') returning queue
    )
    select pg_notify('bgjob_benchmark', queue) from written
"""

_CLAIM = f"""
    update bgjob_job
    set token = 1, lease_until = clock_timestamp() + interval '30 s', attempt = attempt + 1
    where ctid = any (array(
        select ctid from bgjob_job
        where queue = '{_QUEUE}' and priority = 0 and next_run_at <= now()
            and (lease_until is null or lease_until <= now())
        order by next_run_at
        limit 1
        for update skip locked
    ))
    returning id, type, arg, attempt
"""


class _Started:
    """When the job that was written last was started."""

    def __init__(self) -> None:
        self.at = 0.0
        self._event = threading.Event()

    def now(self) -> None:
        self.at = perf_counter()
        self._event.set()

    def wait(self) -> float:
        if not self._event.wait(_PATIENCE):
            raise RuntimeError(f"no job was started within {_PATIENCE:g} s")
        self._event.clear()
        return self.at


def main(bench: Bench) -> Mapping[str, object]:
    """Compare a worker of each colour with the floor, in blocks."""
    count = 50 if bench.options.quick else 200
    chance = random.Random(bench.options.seed)

    def floor() -> Figures:
        return _floor(bench, count, chance)

    def worker(handler: Callable[[_Started], Callable[[Job], Any]]) -> Callable[[], Figures]:
        return lambda: _worker(bench, count, chance, handler)

    return {
        "benchmark": "latency",
        "jobs": count,
        "floor": "a thread that listens, and claims one row when told",
        "threads": bench.compare("threads", worker(_plain), floor),
        "coroutines": bench.compare("coroutines", worker(_coroutine), floor),
    }


def _plain(started: _Started) -> Callable[[Job], None]:
    def handler(_: Job) -> None:
        started.now()

    return handler


def _coroutine(started: _Started) -> Callable[[Job], Any]:
    async def handler(_: Job) -> None:
        started.now()

    return handler


def _block(
    count: int, chance: random.Random, enqueue: Callable[[], object], started: _Started
) -> Figures:
    """Enqueue at random intervals, each job into an idle queue."""
    waited = []
    for _ in range(count):
        sleep(chance.uniform(*_PAUSE))
        enqueue()
        returned = perf_counter()
        waited.append((started.wait() - returned) * 1000)
    return {"p50_ms": percentile(waited, 0.5), "p99_ms": percentile(waited, 0.99)}


def _worker(
    bench: Bench,
    count: int,
    chance: random.Random,
    handler: Callable[[_Started], Callable[[Job], Any]],
) -> Figures:
    bench.fresh()
    started = _Started()
    mux = Mux().register("noop", handler(started))
    with Client(bench.dsn) as client, Worker(client, _QUEUE, mux):
        return _block(
            count, chance, lambda: client.enqueue(EnqueueRequest(_QUEUE, "noop")), started
        )


def _floor(bench: Bench, count: int, chance: random.Random) -> Figures:
    bench.fresh()
    started, stopping = _Started(), threading.Event()
    with (
        psycopg.connect(bench.dsn, autocommit=True, prepare_threshold=0) as producer,
        psycopg.connect(bench.dsn, autocommit=True, prepare_threshold=0) as consumer,
    ):
        consumer.execute("listen bgjob_benchmark")
        thread = threading.Thread(target=_listen, args=(consumer, started, stopping))
        thread.start()
        try:
            return _block(count, chance, lambda: producer.execute(_INSERT, [str(uuid4())]), started)
        finally:
            stopping.set()
            producer.execute("notify bgjob_benchmark")
            thread.join()


def _listen(
    connection: psycopg.Connection[Any], started: _Started, stopping: threading.Event
) -> None:
    # Not connection.notifies(): it takes a lock and a selector for each wait.
    told: list[psycopg.Notify] = []  # came with the answer to a statement
    connection.add_notify_handler(told.append)
    while not stopping.is_set():
        if not told:
            select.select([connection], [], [])
            connection.pgconn.consume_input()
            while connection.pgconn.notifies():
                pass
        told.clear()
        for row in connection.execute(_CLAIM).fetchall():
            started.now()
            connection.execute("delete from bgjob_job where id = %s and token = 1", [row[0]])


if __name__ == "__main__":
    harness.main(main, __doc__)
