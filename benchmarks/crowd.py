"""Whether a worker drains its queue as fast in a table full of other jobs."""

from collections.abc import Mapping, Sequence
from time import sleep

import harness
import work
from figures import Figures, at_least, at_most
from harness import Bench
from work import Ran

from bgjob import Client, Mux, Worker

_QUEUES = 100
_COUNTED = 1.0  # seconds until the statistics of an ended session are visible

# The delayed jobs are in the drained queue, next to its due jobs. The due ones are in queues
# on both sides of it in the index.
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
                lambda: work.drain(crowded, _add(crowded, count, 2 * each), lambda ran: ran.plain),
                lambda: work.drain(bench, work.fill(bench, count), lambda ran: ran.plain),
                {"jobs_per_s": at_least(0.95)},
            ),
            "looked_at": bench.compare(
                "looked at",
                lambda: _look(crowded, _add(crowded, count, 2 * each)),
                lambda: _look(bench, work.fill(bench, count)),
                {"pages_per_job": at_most(1.05)},
            ),
        }


def _add(bench: Bench, count: int, others: int) -> list[str]:
    requests = work.requests(count)
    with Client(bench.dsn) as client:
        client.bulk_enqueue(requests)
    bench.settle()
    work.check_left(bench, count + others)
    return [request.id for request in requests]


def _look(bench: Bench, ids: Sequence[str]) -> Figures:
    """Drain; return how often a page of the table or its indexes was read, for each job."""
    before = _pages(bench)
    ran = Ran(len(ids))
    with Client(bench.dsn) as client:
        mux = Mux().register("noop", ran.plain)
        with Worker(client, work.QUEUE, mux, concurrency=work.CONCURRENCY):
            ran.wait()
    work.check(ran.ids, ids)
    return {"pages_per_job": (_pages(bench) - before) / len(ids)}


def _pages(bench: Bench) -> int:
    sleep(_COUNTED)
    row = bench.admin.execute(
        """
        select heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit
        from pg_statio_all_tables where relid = 'bgjob_job'::regclass
        """
    ).fetchone()
    assert row is not None
    return int(row[0])


if __name__ == "__main__":
    harness.main(main, __doc__)
