"""Transactional jobs that write one row each, one by one, compared with a loop of bare psycopg."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, LiteralString

import harness
import psycopg
import work
from figures import Figures, at_least, figure
from harness import Bench
from proxy import Proxy
from work import CONCURRENCY, QUEUE

from bgjob import Client, Job, Mux, Worker
from bgjob._sql.transactions import RESET

_COUNTED = 500  # jobs whose round trips are counted

_LEDGER = "create table ledger (job_id text not null)"

_WRITE: LiteralString = "insert into ledger (job_id) values (%s)"

_TAKE: LiteralString = f"""
    select id, type, arg, attempt from bgjob_job
    where queue = '{QUEUE}' and priority = 0 and next_run_at <= now() and not waits
    order by next_run_at
    limit 1
    for update skip locked
"""

_DELETE: LiteralString = "delete from bgjob_job where id = %s"

Register = Callable[[Mux], Mux]


def main(bench: Bench) -> Mapping[str, object]:
    """Drain the jobs by a worker of each colour and by a loop, then count round trips."""
    count = 1000 if bench.options.quick else 4000
    return {
        "benchmark": "transactional",
        "jobs": count,
        "concurrency": CONCURRENCY,
        "threads": {
            "floor": "a plain loop in as many threads, each with a connection: lock one job that "
            "no other has locked, write its row, delete it, commit",
            **bench.compare(
                "threads",
                lambda: _drain(bench, count, _threads),
                lambda: _loop(bench, count, _in_threads),
                {"jobs_per_s": at_least(1.5)},
            ),
        },
        "coroutines": {
            "floor": "the same loop in as many tasks",
            **bench.compare(
                "coroutines",
                lambda: _drain(bench, count, _coroutines),
                lambda: _loop(bench, count, _in_tasks),
                {"jobs_per_s": at_least(1.5)},
            ),
        },
        # What no worker can exceed that has a session for each handler, and leaves nothing in it.
        "fewest_exchanges": {
            "floor": "the loop in threads",
            "without_reset": bench.compare(
                "fewest exchanges, without reset",
                lambda: _fewest(bench, count, b""),
                lambda: _loop(bench, count, _in_threads),
            ),
            "with_reset": bench.compare(
                "fewest exchanges, with reset",
                lambda: _fewest(bench, count, b"begin; " + RESET + b"; commit; "),
                lambda: _loop(bench, count, _in_threads),
            ),
        },
        "round_trips": {
            "per_job": figure(
                bench.repeat("round trips", lambda: _round_trips(bench))["per_job"],
            )
        },
    }


def _threads(mux: Mux) -> Mux:
    def write(job: Job, conn: psycopg.Connection[Any]) -> None:
        conn.execute(_WRITE, [job.id])

    return mux.register("noop", write, transactional=True)


def _coroutines(mux: Mux) -> Mux:
    async def write(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute(_WRITE, [job.id])

    return mux.register("noop", write, transactional=True)


def _drain(bench: Bench, count: int, register: Register) -> Figures:
    ids = work.fill(bench, count)
    bench.admin.execute(_LEDGER)
    with Client(bench.dsn) as client:
        worker = Worker(client, QUEUE, register(Mux()), concurrency=CONCURRENCY)
        began = perf_counter()
        with worker:
            drained_at = work.settled_at(bench, ids, pause=0.02)
    _check(bench, count)
    return {"jobs_per_s": count / (drained_at - began)}


def _loop(bench: Bench, count: int, run: Callable[[str], None]) -> Figures:
    work.fill(bench, count)
    bench.admin.execute(_LEDGER)
    began = perf_counter()
    run(bench.dsn)
    ended = perf_counter()
    _check(bench, count)
    return {"jobs_per_s": count / (ended - began)}


def _in_threads(dsn: str) -> None:
    def loop() -> None:
        with psycopg.connect(dsn, prepare_threshold=0) as connection:
            while row := connection.execute(_TAKE).fetchone():
                connection.execute(_WRITE, row[:1])
                connection.execute(_DELETE, row[:1])
                connection.commit()

    with ThreadPoolExecutor(CONCURRENCY) as threads:
        for ended in [threads.submit(loop) for _ in range(CONCURRENCY)]:
            ended.result()


def _fewest(bench: Bench, count: int, reset: bytes) -> Figures:
    """Run jobs that need no claim, in the fewest exchanges: the write, and the rest as one message."""
    ids = work.fill(bench, count)
    bench.admin.execute(_LEDGER)
    prepare = b"prepare gone (text) as delete from bgjob_job where id = $1; begin"

    def run(part: Sequence[str]) -> None:
        with psycopg.connect(bench.dsn, autocommit=True, prepare_threshold=0) as connection:
            connection.pgconn.exec_(prepare)
            for id_ in part:
                connection.execute(_WRITE, [id_])
                message = f"execute gone ('{id_}'); commit; ".encode() + reset + b"begin"
                connection.pgconn.exec_(message)
            connection.pgconn.exec_(b"commit")

    began = perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        parts = [ids[number::CONCURRENCY] for number in range(CONCURRENCY)]
        for ended in [threads.submit(run, part) for part in parts]:
            ended.result()
    ended_at = perf_counter()
    _check(bench, count)
    return {"jobs_per_s": count / (ended_at - began)}


def _in_tasks(dsn: str) -> None:
    async def loop() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, prepare_threshold=0) as connection:
            while row := await (await connection.execute(_TAKE)).fetchone():
                await connection.execute(_WRITE, row[:1])
                await connection.execute(_DELETE, row[:1])
                await connection.commit()

    async def loops() -> None:
        await asyncio.gather(*(loop() for _ in range(CONCURRENCY)))

    asyncio.run(loops())


def _round_trips(bench: Bench) -> Figures:
    """Count those of the handlers' connections and of the worker's, without the ones that connect."""
    ids = work.fill(bench, _COUNTED)
    bench.admin.execute(_LEDGER)
    with Proxy(bench.admin.info) as proxy, Client(proxy.through(bench.dsn)) as client:
        worker = Worker(client, QUEUE, _threads(Mux()), concurrency=CONCURRENCY)
        with worker:
            work.settled_at(bench, ids, pause=0.02)
            counted = proxy.round_trips
    _check(bench, _COUNTED)
    return {"per_job": counted / _COUNTED}


def _check(bench: Bench, count: int) -> None:
    row = bench.admin.execute("select count(*), count(distinct job_id) from ledger").fetchone()
    if row != (count, count):
        raise RuntimeError(f"the ledger has {row}, not {count} rows of as many jobs")
    work.check_left(bench)


if __name__ == "__main__":
    harness.main(main, __doc__)
