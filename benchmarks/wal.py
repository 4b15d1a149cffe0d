"""How many bytes a job costs: of write-ahead log, from enqueue to settlement; on disk and network."""

from collections.abc import Callable, Mapping
from time import perf_counter

import floor
import harness
import work
from figures import Figures, at_most, figure
from harness import Bench
from proxy import Proxy
from work import CONCURRENCY, QUEUE, Ran

from bgjob import Client, EnqueueRequest, Mux, Worker


def main(bench: Bench) -> Mapping[str, object]:
    """Enqueue and drain the same jobs with the library and with the floor; then look further."""
    count = 10_000 if bench.options.quick else 100_000
    few = count // 50
    kept = bench.repeat("on disk", lambda: _kept(bench, count))
    one = bench.repeat("one by one", lambda: _one_by_one(bench, few))
    network = bench.repeat("network", lambda: _network(bench, few))
    return {
        "benchmark": "wal",
        "jobs": count,
        "floor": f"the same insert, then claims of {floor.BATCH}, each followed by its delete",
        "wal": bench.compare(
            "wal",
            lambda: _bytes_per_job(bench, count, _worker),
            lambda: _bytes_per_job(bench, count, _floor),
            {"bytes_per_job": at_most(1.1)},
        ),
        "one_by_one": {name: figure(runs) for name, runs in one.items()},
        "on_disk": {name: figure(runs) for name, runs in kept.items()},
        "network": {name: figure(runs) for name, runs in network.items()},
    }


def _bytes_per_job(
    bench: Bench, count: int, drain: Callable[[Bench, list[EnqueueRequest]], None]
) -> Figures:
    # So that it can be repeated: the table is empty and a checkpoint is just done, so that
    # no page is logged whole for being old; and autovacuum leaves the table alone.
    bench.fresh()
    bench.admin.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    requests = work.requests(count)
    before = _position(bench)
    with Client(bench.dsn) as client:
        client.bulk_enqueue(requests)
    drain(bench, requests)
    return {"bytes_per_job": (_position(bench) - before) / count}


def _one_by_one(bench: Bench, count: int) -> Figures:
    """Enqueue jobs in a commit each, and drain them."""
    bench.fresh()
    bench.admin.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    requests = work.requests(count)
    before = _position(bench)
    with Client(bench.dsn) as client:
        for request in requests:
            client.enqueue(request)
    _worker(bench, requests)
    return {"wal_bytes_per_job": (_position(bench) - before) / count}


def _kept(bench: Bench, count: int) -> Figures:
    """Measure the table and its indexes while jobs wait, and the vacuum after they ran."""
    bench.fresh()
    bench.admin.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    requests = work.requests(count)
    with Client(bench.dsn) as client:
        client.bulk_enqueue(requests)
    waiting = _size(bench)
    _worker(bench, requests)
    ran = _size(bench)
    before, began = _position(bench), perf_counter()
    bench.admin.execute("vacuum bgjob_job")
    took = perf_counter() - began
    return {
        "bytes_per_waiting_job": waiting / count,
        "bytes_per_job_until_vacuum": ran / count,
        "vacuum_us_per_job": took / count * 1e6,
        "vacuum_wal_bytes_per_job": (_position(bench) - before) / count,
    }


def _network(bench: Bench, count: int) -> Figures:
    """Count what passes between the processes and the server, from enqueue to settlement."""
    bench.fresh()
    requests = work.requests(count)
    with Proxy(bench.admin.info) as proxy:
        through = proxy.through(bench.dsn)
        with Client(through) as client:
            client.bulk_enqueue(requests)
        enqueued = proxy.bytes
        _worker(bench, requests, through)
        return {
            "bytes_per_enqueue": enqueued / count,
            "bytes_per_run": (proxy.bytes - enqueued) / count,
        }


def _size(bench: Bench) -> int:
    row = bench.admin.execute("select pg_total_relation_size('bgjob_job')").fetchone()
    assert row is not None
    return int(row[0])


def _worker(bench: Bench, requests: list[EnqueueRequest], dsn: str | None = None) -> None:
    ran, ids = Ran(len(requests)), [request.id for request in requests]
    mux = Mux().register("noop", ran.plain)
    with Client(dsn or bench.dsn) as client, Worker(client, QUEUE, mux, concurrency=CONCURRENCY):
        ran.wait()
    work.settled_at(bench, ids)
    work.check(ran.ids, ids)


def _floor(bench: Bench, requests: list[EnqueueRequest]) -> None:
    with floor.connect(bench.dsn) as connection:
        floor.drain(connection, len(requests))
    work.check_left(bench)


def _position(bench: Bench) -> int:
    """Return the end of the log, which pg_current_wal_lsn() shows only once it is written."""
    row = bench.admin.execute(
        "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
    ).fetchone()
    assert row is not None
    return int(row[0])


if __name__ == "__main__":
    harness.main(main, __doc__)
