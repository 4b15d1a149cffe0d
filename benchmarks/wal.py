"""How many bytes of write-ahead log a job costs, from its enqueue to its settlement."""

from collections.abc import Callable, Mapping

import floor
import harness
import work
from figures import Figures, at_most
from harness import Bench
from work import CONCURRENCY, QUEUE, Ran

from bgjob import Client, EnqueueRequest, Mux, Worker


def main(bench: Bench) -> Mapping[str, object]:
    """Enqueue and drain the same jobs with the library and with the floor."""
    count = 10_000 if bench.options.quick else 100_000
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


def _worker(bench: Bench, requests: list[EnqueueRequest]) -> None:
    ran, ids = Ran(len(requests)), [request.id for request in requests]
    mux = Mux().register("noop", ran.plain)
    with Client(bench.dsn) as client, Worker(client, QUEUE, mux, concurrency=CONCURRENCY):
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
