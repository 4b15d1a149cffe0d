"""Transactional jobs that write one row each: 500 in a call, one by one, and by bare psycopg."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import floor
import harness
import psycopg
import work
from figures import Figures, at_least
from harness import Bench
from work import QUEUE

from bgjob import Client, Job, Mux, Worker

BATCH = 500

_LEDGER = "create table ledger (job_id text not null)"
_WRITE_ONE = "insert into ledger (job_id) values (%s)"
_WRITE = "insert into ledger (job_id) select unnest(%s::text[])"

Register = Callable[[Mux, work.Ran], Mux]


def main(bench: Bench) -> Mapping[str, object]:
    """Drain the jobs in batches, against bare psycopg, and against a call for each."""
    count = 20_000 if bench.options.quick else 100_000
    alone = count // 50
    return {
        "benchmark": "batches",
        "jobs": count,
        "jobs_one_by_one": alone,
        "batch": BATCH,
        "concurrency": work.CONCURRENCY,
        "bare": {
            "floor": "one connection: a claim of 500; their rows, by insert … select unnest, and "
            "their deletion in one transaction",
            **bench.compare(
                "bare",
                lambda: _drain(bench, count, _in_batches),
                lambda: _by_hand(bench, count),
                {"jobs_per_s": at_least(0.7)},
            ),
        },
        "one_by_one": {
            "floor": "the same handler for single jobs",
            **bench.compare(
                "one by one",
                lambda: _drain(bench, count, _in_batches),
                lambda: _drain(bench, alone, _one_by_one),
                {"jobs_per_s": at_least(30)},
            ),
        },
    }


def _in_batches(mux: Mux, ran: work.Ran) -> Mux:
    def write(jobs: list[Job], conn: psycopg.Connection[Any]) -> None:
        ids = [job.id for job in jobs]
        conn.execute(_WRITE, [ids])
        ran.batch(ids)

    return mux.register("noop", write, transactional=True, batch=BATCH)


def _one_by_one(mux: Mux, ran: work.Ran) -> Mux:
    def write(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute(_WRITE_ONE, [job.id])
        ran.plain(job)

    return mux.register("noop", write, transactional=True)


def _drain(bench: Bench, count: int, register: Register) -> Figures:
    ids = work.fill(bench, count)
    bench.admin.execute(_LEDGER)
    ran = work.Ran(count)
    with Client(bench.dsn) as client:
        worker = Worker(client, QUEUE, register(Mux(), ran), concurrency=work.CONCURRENCY)
        began = perf_counter()
        with worker:
            ran.wait()  # queries meanwhile would compete with it
            drained_at = work.settled_at(bench, ids)
    _check(bench, count)
    return {"jobs_per_s": count / (drained_at - began)}


def _by_hand(bench: Bench, count: int) -> Figures:
    work.fill(bench, count)
    bench.admin.execute(_LEDGER)
    with floor.connect(bench.dsn) as connection:
        began = perf_counter()
        floor.drain_with_effects(connection, count, BATCH, _WRITE)
        ended = perf_counter()
    _check(bench, count)
    return {"jobs_per_s": count / (ended - began)}


def _check(bench: Bench, count: int) -> None:
    row = bench.admin.execute("select count(*), count(distinct job_id) from ledger").fetchone()
    if row != (count, count):
        raise RuntimeError(f"the ledger has {row}, not {count} rows of as many jobs")
    work.check_left(bench)


if __name__ == "__main__":
    harness.main(main, __doc__)
