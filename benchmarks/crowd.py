"""Whether a worker drains its queue as fast in a table that is full of jobs for others."""

from collections.abc import Mapping

import harness
import work
from figures import Figures, at_least
from harness import Bench

from bgjob import Client

_QUEUES = 100

# The delayed ones are in the queue that is drained, next to what is due; the due ones
# in queues on both sides of it.
_FILL = f"""
    insert into bgjob_job (id, queue, type, next_run_at)
    select 'crowd-delayed-' || n, '{work.QUEUE}', 'noop',
        now() + interval '1 day' + n * interval '1 ms'
    from generate_series(1, %(count)s) as n
    union all
    select 'crowd-due-' || n, case when n %% 2 = 0 then 'a' else 'z' end || n %% {_QUEUES},
        'noop', now() - n * interval '1 ms'
    from generate_series(1, %(count)s) as n
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Drain the same jobs in a full and in an empty table."""
    count, each = (20_000, 100_000) if bench.options.quick else (100_000, 1_000_000)
    with bench.beside() as crowded:
        crowded.fresh(lambda: crowded.admin.execute(_FILL, {"count": each}))
        return {
            "benchmark": "crowd",
            "jobs": count,
            "delayed": each,
            "due_in_other_queues": each,
            "concurrency": work.CONCURRENCY,
            "floor": "the empty table",
            "crowd": bench.compare(
                "crowd",
                lambda: _crowded(crowded, count, 2 * each),
                lambda: work.drain(bench, work.fill(bench, count), lambda ran: ran.plain),
                {"jobs_per_s": at_least(0.95)},
            ),
        }


def _crowded(bench: Bench, count: int, others: int) -> Figures:
    requests = work.requests(count)
    with Client(bench.dsn) as client:
        client.bulk_enqueue(requests)
    bench.settle()
    work.check_left(bench, count + others)
    return work.drain(bench, [request.id for request in requests], lambda ran: ran.plain)


if __name__ == "__main__":
    harness.main(main, __doc__)
