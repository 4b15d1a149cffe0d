"""How many no-op jobs a second one worker drains, compared with bare psycopg."""

from collections.abc import Callable, Mapping
from time import perf_counter

import floor
import harness
import work
from figures import Figures, at_least
from harness import Bench
from work import Handler, Ran


def main(bench: Bench) -> Mapping[str, object]:
    """Drain the same jobs with a worker of each colour and with the floor."""
    count = 20_000 if bench.options.quick else 100_000

    def compare(title: str, handler: Callable[[Ran], Handler]) -> dict[str, object]:
        return bench.compare(
            title,
            lambda: work.drain(bench, work.fill(bench, count), handler),
            lambda: _floor(bench, count),
            {"jobs_per_s": at_least(1.0)},
        )

    return {
        "benchmark": "drain",
        "jobs": count,
        "concurrency": work.CONCURRENCY,
        "floor": f"claims of {floor.BATCH}, each followed by its delete",
        "threads": compare("threads", lambda ran: ran.plain),
        "coroutines": compare("coroutines", lambda ran: ran.coroutine),
    }


def _floor(bench: Bench, count: int) -> Figures:
    work.fill(bench, count)
    began = perf_counter()
    with floor.connect(bench.dsn) as connection:
        floor.drain(connection, count)
        took = perf_counter() - began
    work.check_left(bench)
    return {"jobs_per_s": count / took}


if __name__ == "__main__":
    harness.main(main, __doc__)
