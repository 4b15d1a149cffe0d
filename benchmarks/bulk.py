"""How many jobs a second are enqueued in bulk, compared with a binary COPY of their rows."""

from collections.abc import Mapping

import floor
import harness
import work
from figures import Figures, at_least
from harness import Bench

from bgjob import Client

# The requests, the rows and the connection are made before the time is taken.


def main(bench: Bench) -> Mapping[str, object]:
    """Write the same rows both ways."""
    count = 10_000 if bench.options.quick else 50_000
    return {
        "benchmark": "bulk",
        "jobs": count,
        "floor": "binary copy",
        "bulk": bench.compare(
            "bulk",
            lambda: _enqueue(bench, count),
            lambda: _copy(bench, count),
            {"jobs_per_s": at_least(0.7)},
        ),
    }


def _enqueue(bench: Bench, count: int) -> Figures:
    bench.fresh()
    requests = work.requests(count)
    with Client(bench.dsn) as client:
        client.dlq.list(limit=1)
        return work.write(bench, count, lambda: client.bulk_enqueue(requests))


def _copy(bench: Bench, count: int) -> Figures:
    bench.fresh()
    rows = floor.rows(work.requests(count))
    with floor.connect(bench.dsn) as connection:
        return work.write(bench, count, lambda: floor.copy(connection, rows))


if __name__ == "__main__":
    harness.main(main, __doc__)
