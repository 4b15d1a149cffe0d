"""How many notifications a worker asks for while jobs arrive steadily, and how long they wait."""

from collections.abc import Mapping
from threading import Lock
from time import monotonic, process_time, sleep

import harness
import psycopg
import work
from figures import Figures, figure, percentile
from harness import Bench
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from work import CONCURRENCY, PATIENCE, QUEUE, Child

from bgjob import Client, EnqueueRequest, Job, Mux, Worker
from bgjob._sql.notices import channel

_RATES = {200: 1, 2000: 1, 20_000: 20}
"""Jobs a second, and how many of them are one transaction."""

_END = "counted"
"""Ends the count; bgjob's workers ignore it."""


def main(bench: Bench) -> Mapping[str, object]:
    """Offer jobs at each rate, and count the notifications."""
    seconds = 3 if bench.options.quick else 10

    def offered(rate: int) -> dict[str, object]:
        runs = bench.repeat(f"{rate} jobs/s", lambda: _run(bench, rate, seconds))
        return {name: figure(values) for name, values in runs.items()}

    return {
        "benchmark": "notifications",
        "seconds": seconds,
        "concurrency": CONCURRENCY,
        "jobs_per_transaction": {f"{rate}_per_s": jobs for rate, jobs in _RATES.items()},
        **{f"at_{rate}_per_s": offered(rate) for rate in _RATES},
    }


def _run(bench: Bench, rate: int, seconds: int) -> Figures:
    bench.fresh()
    count = rate * seconds
    started: list[tuple[int, float]] = []  # the job's number, and when
    done = Lock()
    done.acquire()

    def handler(job: Job) -> None:
        started.append((int(job.arg or b""), monotonic()))
        if len(started) == count:
            done.release()

    with Client(bench.dsn) as client:
        with Worker(client, QUEUE, Mux().register("noop", handler), concurrency=CONCURRENCY):
            counter = Child(_count, bench.dsn)
            producer = Child(_produce, bench.dsn, rate, count)
            spent = process_time()
            returned = producer.result(seconds + PATIENCE)
            if not done.acquire(timeout=PATIENCE):
                raise RuntimeError(f"{len(started)} of {count} jobs ran in {PATIENCE:g} s")
            spent = process_time() - spent
        bench.admin.execute("select pg_notify(%s, %s)", [channel(QUEUE), _END])
        notifications = counter.result()
    if sorted(number for number, _ in started) != list(range(count)):
        raise RuntimeError(f"{len(started)} runs of {count} jobs; each of them must run once")
    work.check_left(bench)
    waited = [(at - returned[number]) * 1000 for number, at in started]
    return {
        "notifications_per_job": notifications / count,
        "p50_ms": percentile(waited, 0.5),
        "p99_ms": percentile(waited, 0.99),
        "process_us": spent / count * 1e6,
        "enqueued_per_s": (count - 1) / (returned[-1] - returned[0]),
    }


def _count(dsn: str) -> int:
    """Count the notifications of enqueues until the last one."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"listen {channel(QUEUE)}".encode())
        count = 0
        for notification in connection.notifies():
            if notification.payload == _END:
                break
            count += bool(notification.payload)  # an empty one is a worker's
    return count


def _produce(dsn: str, rate: int, count: int) -> list[float]:
    """Enqueue on schedule; return when each job's enqueue returned."""
    together = _RATES[rate]
    returned: list[float] = []
    # So that the disk does not limit the rate.
    options = f"{conninfo_to_dict(dsn)['options']} -c synchronous_commit=off"
    with Client(make_conninfo(dsn, options=options)) as client:
        client.dlq.list(limit=1)
        sleep(0.5)  # the worker is idle, and the notifications are counted
        began = monotonic()  # one clock for all processes of a host
        while (first := len(returned)) < count:
            sleep(max(0.0, began + first / rate - monotonic()))
            numbers = range(first, min(first + together, count))
            requests = [EnqueueRequest(QUEUE, "noop", b"%d" % n) for n in numbers]
            client.bulk_enqueue(requests) if together > 1 else client.enqueue(*requests)
            returned += [monotonic()] * len(numbers)
    return returned


if __name__ == "__main__":
    harness.main(main, __doc__)
