"""How many no-op jobs a second one worker drains, against the least that bare psycopg needs."""

import threading
from collections.abc import Callable, Mapping
from time import perf_counter, sleep
from typing import Any

import harness
import psycopg
from harness import Bench, Figures

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

_QUEUE = "benchmark"
_CONCURRENCY = 10
_PATIENCE = 120.0  # seconds, before a run that does not end is given up

# The floor's best form of those that were tried. Binary results, prepared
# statements and one array literal, not a list that psycopg dumps item by item,
# are each faster than without; 1000 a claim is faster than 500, 2000 is not.
_FLOOR_BATCH = 1000

_FLOOR_CLAIM = f"""
    update bgjob_job
    set token = %(token)s, lease_until = clock_timestamp() + interval '30 s', attempt = attempt + 1
    where ctid = any (array(
        select ctid from bgjob_job
        where queue = '{_QUEUE}' and priority = 0
            and next_run_at >= %(mark)s and next_run_at <= now()
            and (lease_until is null or lease_until <= now())
        order by next_run_at
        limit {_FLOOR_BATCH}
        for update skip locked
    ))
    returning id, type, arg, attempt, next_run_at
"""

_FLOOR_DELETE = "delete from bgjob_job where id = any (%s::text[]) and token = %s"


class _Ran:
    """The ids of the jobs that ran; tells when the last one has."""

    def __init__(self, expected: int) -> None:
        self.ids: list[str] = []
        self.ended_at = 0.0
        self.all = threading.Event()
        self._expected = expected

    def plain(self, job: Job) -> None:
        self.ids.append(job.id)
        if len(self.ids) == self._expected:
            self.ended_at = perf_counter()
            self.all.set()

    async def coroutine(self, job: Job) -> None:
        self.plain(job)


def main(bench: Bench) -> Mapping[str, object]:
    """Drain the same jobs by a worker of each colour and by the floor."""
    count = 20_000 if bench.options.quick else 100_000

    def floor() -> Figures:
        return _floor(bench, count)

    def worker(handler: Callable[[_Ran], Callable[[Job], Any]]) -> Callable[[], Figures]:
        return lambda: _worker(bench, count, handler)

    return {
        "benchmark": "throughput",
        "jobs": count,
        "concurrency": _CONCURRENCY,
        "floor": f"claims of {_FLOOR_BATCH}, each followed by its delete",
        "threads": bench.compare("threads", worker(lambda ran: ran.plain), floor),
        "coroutines": bench.compare("coroutines", worker(lambda ran: ran.coroutine), floor),
    }


def _enqueue(bench: Bench, count: int) -> list[str]:
    requests = [EnqueueRequest(_QUEUE, "noop", {"n": n}) for n in range(count)]
    with Client(bench.dsn) as client:
        bench.fresh(lambda: client.bulk_enqueue(requests))
    return [request.id for request in requests]


def _worker(bench: Bench, count: int, handler: Callable[[_Ran], Callable[[Job], Any]]) -> Figures:
    ids = _enqueue(bench, count)
    ran = _Ran(count)
    with Client(bench.dsn) as client, psycopg.connect(bench.dsn, autocommit=True) as watch:
        worker = Worker(
            client, _QUEUE, Mux().register("noop", handler(ran)), concurrency=_CONCURRENCY
        )
        began = perf_counter()
        worker.run()
        try:
            if not ran.all.wait(_PATIENCE):
                raise RuntimeError(f"{len(ran.ids)} of {count} jobs ran in {_PATIENCE:g} s")
            # The jobs that are settled last are among those that were enqueued last;
            # to look at the whole table would take longer than the settlement.
            watch.execute("set enable_seqscan = off")
            last = "select from bgjob_job where id >= %s limit 1"
            while watch.execute(last, [ids[-min(count, 5000)]]).rowcount:
                sleep(0.0005)
            drained_at = perf_counter()
            left = bench.jobs()
        finally:
            worker.shutdown()
    if left or sorted(ran.ids) != sorted(ids):
        raise RuntimeError(f"{len(ran.ids)} runs of {count} jobs, of which {left} were left")
    return {
        "jobs_per_s": count / (drained_at - began),
        "jobs_per_s_to_last_handler": count / (ran.ended_at - began),
    }


def _floor(bench: Bench, count: int) -> Figures:
    _enqueue(bench, count)
    began = perf_counter()
    with psycopg.connect(bench.dsn, autocommit=True, prepare_threshold=0) as connection:
        claim, delete = connection.cursor(binary=True), connection.cursor()
        mark: object = "-infinity"
        token = deleted = 0
        while True:
            token += 1
            rows = claim.execute(_FLOOR_CLAIM, {"token": token, "mark": mark}).fetchall()
            if not rows:
                break
            mark = max(row[4] for row in rows)
            ids = ",".join([row[0] for row in rows])
            deleted += delete.execute(_FLOOR_DELETE, [f"{{{ids}}}", token]).rowcount
        took = perf_counter() - began
    if deleted != count or bench.jobs():
        raise RuntimeError(f"the floor deleted {deleted} of {count} jobs")
    return {"jobs_per_s": count / took}


if __name__ == "__main__":
    harness.main(main, __doc__)
