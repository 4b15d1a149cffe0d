"""What counting minutes and keeping completed jobs cost a worker, and how long the counts are read."""

from collections.abc import Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import harness
import work
from figures import Figures, at_least, at_most, percentile
from harness import Bench

from bgjob import Client, Minutes
from bgjob.service import Service

_CALLS = 5

# A week of twenty types in each of three queues.
_WEEK = """
    insert into bgjob_minute
    select date_bin('1 minute', now(), '2020-01-01') - n / 60 * interval '1 minute',
        'queue ' || n %% 3, 'a type of job ' || n / 3 %% 20, 100, 3, 0, 1, 0, 0, 0, 100, 1, 1, 1, 1
    from generate_series(0, 60 * %(minutes)s - 1) as n
"""
_MINUTES = 7 * 1440

_READS: Mapping[str, tuple[dict[str, Any], float]] = {
    "10_minutes": ({"last": 600}, 5),
    "an_hour_by_minutes": ({"last": 3600, "step": 60}, 15),
    "6_hours_by_5_minutes": ({"last": 6 * 3600, "step": 300}, 60),
    "7_days_by_hours": ({"last": 7 * 86400, "step": 3600}, 1500),
    "7_days_by_type": ({"last": 7 * 86400, "by": "type"}, 1500),
}
"""Arguments of client.minutes(), and the most milliseconds."""


def main(bench: Bench) -> Mapping[str, object]:
    """Drain jobs with and without each of both; then read."""
    jobs = 20_000 if bench.options.quick else 100_000
    plain = partial(_drain, bench, jobs)
    report: dict[str, object] = {"benchmark": "minutes", "jobs": jobs, "calls": _CALLS}
    report["counted"] = bench.compare(
        "counted",
        partial(_drain, bench, jobs, services=[Minutes()]),
        plain,
        {"jobs_per_s": at_least(0.95)},
    )
    report["kept"] = bench.compare("kept", partial(_drain, bench, jobs, keep=True), plain)
    bench.fresh(lambda: bench.admin.execute(_WEEK, {"minutes": _MINUTES}))
    bench.admin.execute("vacuum (analyze) bgjob_minute")
    with Client(bench.dsn) as client:
        for title, (arguments, most) in _READS.items():
            read = partial(client.minutes, **arguments)
            report[title] = bench.compare(
                title,
                partial(_timed, read),
                dict,
                {"median_ms": at_most(most, "median")},
            )
    return report


def _drain(
    bench: Bench, jobs: int, *, services: Sequence[Service] = (), keep: bool = False
) -> Figures:
    ids = work.fill(bench, jobs)
    return work.drain(bench, ids, lambda ran: ran.plain, services=services, keep=keep)


def _timed(read: partial[Any]) -> Figures:
    took = []
    for _ in range(_CALLS):
        began = perf_counter()
        read()
        took.append((perf_counter() - began) * 1000)
    return {"median_ms": percentile(took, 0.5)}


if __name__ == "__main__":
    harness.main(main, __doc__)
