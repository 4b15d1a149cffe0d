"""Limits over all workers: what one that is never reached costs, and how closely one is reached.

Of a queue, and of a type.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from threading import Event
from time import perf_counter, sleep

import harness
import work
from figures import Figures, at_least
from harness import Bench
from work import CONCURRENCY, QUEUE

from bgjob import Client, Job, Limit, Mux, Worker
from bgjob.limit import Scope

_WORKERS = 5
_RATE = 200.0
_PLACES = 5
_TAKES = 0.02
"""Seconds of a handler."""

_SLACK = 2
"""Seconds before the measurement: the burst is used up, and the places are shared."""


def main(bench: Bench) -> Mapping[str, object]:
    """Drain with a limit and without; run five workers at a limit."""
    count = 20_000 if bench.options.quick else 100_000
    seconds = 3.0 if bench.options.quick else 10.0
    of_queue: dict[str, object] = {}
    of_type: dict[str, object] = {}
    for scope, found in (("queue", of_queue), ("type", of_type)):
        found["never"] = {
            "floor": "the same without a limit",
            **bench.compare(
                f"never reached, of a {scope}",
                lambda: _drain(bench, count, **{scope: Limit(1000, "10000000/s")}),  # noqa: B023 (called at once)
                lambda: _drain(bench, count),
                {"jobs_per_s": at_least(0.95)},
            ),
        }
        found["rate"] = bench.compare(
            f"rate of a {scope}",
            lambda: _at_limit(bench, scope, Limit(rate=f"{_RATE:g}/s"), seconds, _RATE),  # noqa: B023
            dict,
            {"share": at_least(0.95, "median")},
        )
        found["places"] = bench.compare(
            f"concurrency of a {scope}",
            lambda: _at_limit(bench, scope, Limit(_PLACES), seconds, _PLACES / _TAKES),  # noqa: B023
            dict,
            {"share": at_least(0.95, "median")},
        )
    return {
        "benchmark": "limits",
        "jobs": count,
        "concurrency": CONCURRENCY,
        "workers": _WORKERS,
        "queue": of_queue,
        "type": of_type,
    }


def _drain(
    bench: Bench, count: int, *, queue: Limit | None = None, type: Limit | None = None
) -> Figures:
    ids = work.fill(bench, count)
    return work.drain(bench, ids, lambda ran: ran.plain, limits=queue, type_limit=type)


def _at_limit(bench: Bench, scope: Scope, limit: Limit, seconds: float, most: float) -> Figures:
    """Return the share of the possible starts, of five workers with more jobs than they may run."""
    work.fill(bench, int(2 * most * (seconds + _SLACK + 1)))
    starts: list[float] = []
    over = Event()

    def handle(_: Job) -> None:
        starts.append(perf_counter())
        over.wait(_TAKES)

    mux = Mux().register("noop", handle, limit=limit if scope == "type" else None)
    limits = limit if scope == "queue" else None
    with ExitStack() as stack:
        client = stack.enter_context(Client(bench.dsn))
        for _ in range(_WORKERS):
            stack.enter_context(
                Worker(client, QUEUE, mux, concurrency=CONCURRENCY, limits=limits, grace=1)
            )
        sleep(_SLACK)
        began = perf_counter()
        sleep(seconds)
        ended = perf_counter()
        over.set()
    ran = sum(began <= at < ended for at in starts)
    return {"share": ran / (most * (ended - began))}


if __name__ == "__main__":
    harness.main(main, __doc__)
