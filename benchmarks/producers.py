"""What notification costs eight processes that enqueue one by one while a worker runs."""

from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from time import monotonic

import harness
import work
from figures import Figures, at_least
from harness import Bench
from work import CONCURRENCY, PATIENCE, QUEUE, Child, Ran

from bgjob import Client, Mux, Worker

_PRODUCERS = 8


def main(bench: Bench) -> Mapping[str, object]:
    """Enqueue the same jobs with notification and without."""
    each = 300 if bench.options.quick else 1500

    def told() -> Figures:
        return _enqueue(bench, each, notify=True, poll_interval=1.0)

    def polled(poll_interval: float) -> Figures:
        return _enqueue(bench, each, notify=False, poll_interval=poll_interval)

    return {
        "benchmark": "producers",
        "producers": _PRODUCERS,
        "jobs_each": each,
        "concurrency": CONCURRENCY,
        "floor": "the same without notification; beside looks, with a poll every 2 ms",
        "notification": bench.compare(
            "notification", told, lambda: polled(1.0), {"jobs_per_s": at_least(0.95)}
        ),
        # While jobs flow, a worker with notification polls as often, and is not notified.
        "beside_looks": bench.compare("beside looks", told, lambda: polled(0.002)),
    }


def _enqueue(bench: Bench, each: int, *, notify: bool, poll_interval: float) -> Figures:
    """Enqueue from several processes, one job in each transaction, while a worker drains."""
    bench.fresh()
    count = each * _PRODUCERS
    ran = Ran(count)
    begin = get_context("spawn").Barrier(_PRODUCERS)
    mux = Mux().register("noop", ran.plain)
    with (
        Client(bench.dsn) as client,
        Worker(
            client,
            QUEUE,
            mux,
            concurrency=CONCURRENCY,
            notify=notify,
            poll_interval=poll_interval,
        ),
    ):
        children = [Child(_produce, bench.dsn, each, notify, begin) for _ in range(_PRODUCERS)]
        spans, ids = [], []
        for child in children:
            span, enqueued = child.result()
            spans.append(span)
            ids += enqueued
        ran.wait()
    work.check(ran.ids, ids)
    began, ended = zip(*spans, strict=True)
    return {"jobs_per_s": count / (max(ended) - min(began))}


def _produce(
    dsn: str, count: int, notify: bool, begin: Barrier
) -> tuple[tuple[float, float], list[str]]:
    """Enqueue one by one; return when that began and ended, and the ids."""
    requests = work.requests(count)
    with Client(dsn, notify=notify) as client:
        client.dlq.list(limit=1)
        begin.wait(PATIENCE)
        began = monotonic()  # one clock for all processes of a host
        ids = [client.enqueue(request) for request in requests]
        return (began, monotonic()), ids


if __name__ == "__main__":
    harness.main(main, __doc__)
