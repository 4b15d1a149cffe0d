"""Limits over all workers: what one that is never reached costs, and how closely one is reached.

Of a queue, and of a type.
"""

from collections.abc import Mapping
from time import perf_counter, sleep

import harness
import replicas
import work
from figures import Figures, at_least
from harness import Bench
from replicas import Plan
from work import CONCURRENCY

from bgjob import Limit
from bgjob.limit import Scope

_WORKERS = 5
_RATE = 200.0
_PLACES = 5
_TAKES = 0.02
"""Seconds of a handler."""

_SLACK = 2
"""Seconds before the measurement: the burst is used up, and the places are shared."""


def main(bench: Bench) -> Mapping[str, object]:
    """Drain with a limit and without; run workers of five processes at a limit.

    A drain is so long that its start, before the worker has a ration, does not count.
    """
    count = 20_000 if bench.options.quick else 400_000
    seconds = 3.0 if bench.options.quick else 10.0
    figures: dict[Scope, dict[str, object]] = {"queue": {}, "type": {}}
    for scope, found in figures.items():
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
        "queue": figures["queue"],
        "type": figures["type"],
    }


def _drain(
    bench: Bench, count: int, *, queue: Limit | None = None, type: Limit | None = None
) -> Figures:
    ids = work.fill(bench, count)
    return work.drain(bench, ids, lambda ran: ran.plain, limits=queue, type_limit=type)


def _at_limit(bench: Bench, scope: Scope, limit: Limit, seconds: float, most: float) -> Figures:
    """Return the share of the possible starts, of five processes with more jobs than they may run."""
    work.fill(bench, int(2 * most * (seconds + _SLACK + 1)))
    plan = Plan(1, concurrency=CONCURRENCY, handler_s=_TAKES, limit_of=(scope, limit))
    with replicas.running(bench.dsn, [plan] * _WORKERS) as workers:
        sleep(_SLACK)
        before, began = workers.read(), perf_counter()
        sleep(seconds)
        after, ended = workers.read(), perf_counter()
    ran = sum(sum(late.ran) - sum(early.ran) for early, late in zip(before, after, strict=True))
    return {"share": ran / (most * (ended - began))}


if __name__ == "__main__":
    harness.main(main, __doc__)
