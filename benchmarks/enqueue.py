"""How fast jobs are written: in bulk, one by one, and by several processes beside a worker."""

import multiprocessing
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier
from time import monotonic, perf_counter

import harness
import psycopg
from harness import Bench, Figures

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

_QUEUE = "benchmark"
_PRODUCERS = 4
_PATIENCE = 120.0  # seconds, before a run that does not end is given up

_Row = tuple[str, str, str, bytes | None, int, datetime]

_COPY = """
    copy bgjob_job (id, queue, type, arg, priority, next_run_at) from stdin (format binary)
"""
_COPY_TYPES = ["text", "text", "text", "bytea", "int2", "timestamptz"]

_INSERT = """
    insert into bgjob_job (id, queue, type, arg, priority, next_run_at)
    values (%s, %s, %s, %s, %s, %s)
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Compare each way to enqueue with its floor."""
    bulk, singles, each = (10_000, 500, 500) if bench.options.quick else (50_000, 3000, 1500)
    return {
        "benchmark": "enqueue",
        "bulk": {
            "jobs": bulk,
            "floor": "binary copy",
            **bench.compare("bulk", lambda: _bulk(bench, bulk), lambda: _copy(bench, bulk)),
        },
        "single": {
            "jobs": singles,
            "floor": "prepared insert on one connection",
            **bench.compare(
                "single", lambda: _single(bench, singles), lambda: _insert(bench, singles)
            ),
        },
        "notification": {
            "producers": _PRODUCERS,
            "jobs_each": each,
            "floor": "the same without notification",
            **bench.compare(
                "notification",
                lambda: _beside_worker(bench, each, notify=True),
                lambda: _beside_worker(bench, each, notify=False),
            ),
        },
    }


def _requests(count: int) -> list[EnqueueRequest]:
    return [EnqueueRequest(_QUEUE, "noop", {"n": n}) for n in range(count)]


def _rows(count: int) -> list[_Row]:
    now = datetime.now(UTC)
    return [(r.id, r.queue, r.type, r.payload, r.priority, now) for r in _requests(count)]


def _timed(bench: Bench, count: int, write: Callable[[], object]) -> Figures:
    began = perf_counter()
    write()
    took = perf_counter() - began
    if bench.jobs() != count:
        raise RuntimeError(f"{bench.jobs()} jobs were written, not {count}")
    return {"jobs_per_s": count / took}


# Requests and rows are made outside of the timing, and so is the connection.


def _bulk(bench: Bench, count: int) -> Figures:
    bench.fresh()
    requests = _requests(count)
    with Client(bench.dsn) as client:
        _connect(client)
        return _timed(bench, count, lambda: client.bulk_enqueue(requests))


def _copy(bench: Bench, count: int) -> Figures:
    bench.fresh()
    rows = _rows(count)

    def write() -> None:
        with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
            copy.set_types(_COPY_TYPES)
            for row in rows:
                copy.write_row(row)

    with psycopg.connect(bench.dsn, autocommit=True) as connection:
        return _timed(bench, count, write)


def _single(bench: Bench, count: int) -> Figures:
    bench.fresh()
    requests = _requests(count)

    def write() -> None:
        for request in requests:
            client.enqueue(request)

    with Client(bench.dsn) as client:
        _connect(client)
        return _timed(bench, count, write)


def _insert(bench: Bench, count: int) -> Figures:
    bench.fresh()
    rows = _rows(count)

    def write() -> None:
        for row in rows:
            cursor.execute(_INSERT, row)

    with (
        psycopg.connect(bench.dsn, autocommit=True, prepare_threshold=0) as connection,
        connection.cursor() as cursor,
    ):
        return _timed(bench, count, write)


def _connect(client: Client) -> None:
    client.dlq.list(limit=1)


def _beside_worker(bench: Bench, each: int, *, notify: bool) -> Figures:
    """Enqueue from several processes, one job a transaction, while a worker drains them."""
    bench.fresh()
    count = each * _PRODUCERS
    ran: list[str] = []
    all_ran = threading.Event()

    def handler(job: Job) -> None:
        ran.append(job.id)
        if len(ran) == count:
            all_ran.set()

    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(_PRODUCERS)
    spans = context.SimpleQueue()
    producers = [
        context.Process(
            target=_produce, args=(bench.dsn, each, notify, begin, spans.put), daemon=True
        )
        for _ in range(_PRODUCERS)
    ]
    mux = Mux().register("noop", handler)
    with (
        Client(bench.dsn) as client,
        Worker(client, _QUEUE, mux, concurrency=10, notify=notify),
    ):
        for producer in producers:
            producer.start()
        for producer in producers:
            producer.join(_PATIENCE)
            if producer.exitcode != 0:
                raise RuntimeError(f"a producer ended with {producer.exitcode}")
        all_ran.wait(_PATIENCE)
    if len(ran) != count or len(set(ran)) != count:
        raise RuntimeError(f"{len(ran)} runs of {count} jobs")
    began, ended = zip(*(spans.get() for _ in producers), strict=True)
    return {"jobs_per_s": count / (max(ended) - min(began))}


def _produce(
    dsn: str,
    count: int,
    notify: bool,
    begin: Barrier,
    tell: Callable[[tuple[float, float]], None],
) -> None:
    requests = _requests(count)
    with Client(dsn, notify=notify) as client:
        _connect(client)
        begin.wait(_PATIENCE)
        began = monotonic()  # one clock for all processes of a host
        for request in requests:
            client.enqueue(request)
        tell((began, monotonic()))


if __name__ == "__main__":
    harness.main(main, __doc__)
