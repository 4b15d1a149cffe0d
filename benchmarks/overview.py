"""How long the capped overview of a million jobs takes, beside the exact statistics."""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter

import harness
from figures import Figures, at_most, percentile
from harness import Bench

from bgjob import Client

_CALLS = 20

# Of 1,000,000 jobs 620,000 are due, 20 of them running, 200,000 are delayed, 20,000 wait for
# another attempt, and 60,000 of 80,000 with a key wait for it. Where there are many queues,
# each has jobs of four priorities.
_JOBS = """
    insert into bgjob_job (
        id, queue, type, arg, priority, exclusive, waits, next_run_at, attempt, token, lease_until
    )
    select 'job-' || n,
        case
            when n %% 100 < 10 and %(queues)s > 3 then 'tenant ' || n / 100 %% (%(queues)s - 3)
            when n %% 100 < 18 then 'charges'
            when n %% 100 < 40 then 'reports'
            else 'mail'
        end,
        'send', '{}',
        case when n %% 100 < 10 and %(queues)s > 3 then n / 100000 %% 4 else 0 end,
        case when n %% 100 between 10 and 17 then 'user ' || n / 100 %% 500 end,
        n %% 100 between 10 and 15,
        case
            when n %% 100 between 18 and 37 then now() + n * interval '1 s'
            when n %% 100 between 38 and 39 then now() + n * interval '1 ms'
            else now() - (%(jobs)s - n) * interval '10 ms'
        end,
        (n %% 100 between 38 and 39 or n <= 20)::int,
        case when n <= 20 then 1 end,
        case when n <= 20 then now() + interval '1 day' end
    from generate_series(1, %(jobs)s) as n
"""
_KEYS = """
    insert into bgjob_exclusive (key, tokens)
    select exclusive, '{1}' from bgjob_job where exclusive is not null group by exclusive
"""
_DEAD = """
    insert into bgjob_dead_job (
        job_id, queue, type, arg, attempt, last_error, priority, next_run_at, job_created_at,
        job_updated_at, moved_at
    )
    select 'dead-' || n, 'mail', 'send', '{}', 3, repeat('an error of some length ', 10), 0,
        now(), now(), now(), now() - (%(jobs)s - n) * interval '400 ms'
    from generate_series(1, %(jobs)s) as n
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Fill the tables with few and with many queues, and ask for both."""
    jobs = 100_000 if bench.options.quick else 1_000_000
    report: dict[str, object] = {
        "benchmark": "overview",
        "jobs": jobs,
        "dead": jobs,
        "calls": _CALLS,
        "floor": "client.stats(), which counts exactly",
    }
    for title, queues, most in (("three_queues", 3, 15.0), ("1000_queues", 1000, 400.0)):
        bench.fresh(partial(fill, bench, jobs, queues))
        bench.admin.execute("vacuum (analyze) bgjob_dead_job, bgjob_exclusive")
        with Client(bench.dsn) as client:
            report[title] = bench.compare(
                title,
                partial(_timed, client.overview, _CALLS),
                partial(_timed, client.stats, 1),
                {"median_ms": at_most(most, "median")},
            )
    return report


def fill(bench: Bench, jobs: int, queues: int) -> None:
    """Fill the tables with jobs of so many queues, and with as many dead ones."""
    for statement in (_JOBS, _KEYS, _DEAD):
        bench.admin.execute(statement, {"jobs": jobs, "queues": queues})


def _timed(call: Callable[[], object], times: int) -> Figures:
    took = []
    for _ in range(times):
        began = perf_counter()
        call()
        took.append((perf_counter() - began) * 1000)
    return {"median_ms": percentile(took, 0.5)}


if __name__ == "__main__":
    harness.main(main, __doc__)
