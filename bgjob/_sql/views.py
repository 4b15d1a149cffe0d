"""Count and list jobs; advance time for a test."""

from bgjob._sql.claims import JOB_COLUMNS, jobs_of
from bgjob._sql.statement import Statement, scalar
from bgjob.job import Job
from bgjob.stats import QueueStats

_COUNTED = """
    select coalesce(live.queue, dead.queue), coalesce(live.type, dead.type),
        coalesce(live.waiting - live.delayed, 0), coalesce(live.delayed, 0),
        coalesce(live.jobs - live.waiting, 0), coalesce(dead.jobs, 0),
        extract(epoch from statement_timestamp() - live.oldest)::float8, coalesce(live.retries, 0)
    from (
        select queue, type, count(*) as jobs,
            count(*) filter (where {waits}) as waiting,
            count(*) filter (where {waits} and next_run_at > statement_timestamp()) as delayed,
            count(*) filter (where {waits} and attempt > 0) as retries,
            min(greatest(next_run_at, '0001-01-02 00:00+00')) filter (
                where {waits} and next_run_at <= statement_timestamp()
            ) as oldest
        from bgjob_job {where} group by queue, type
    ) as live
    full join (
        select queue, type, count(*) as jobs from bgjob_dead_job {where} group by queue, type
    ) as dead on (dead.queue, dead.type) = (live.queue, live.type)
    order by 1, 2
"""


def stats(queue: str | None) -> Statement[list[QueueStats]]:
    """Count the jobs of each queue and type, or of one queue only."""
    # Not now(): in the caller's transaction its own jobs would be due in the future.
    waits = "(lease_until is null or lease_until <= statement_timestamp())"
    where = "" if queue is None else "where queue = %(queue)s"
    return Statement(
        _COUNTED.format(waits=waits, where=where),
        None if queue is None else {"queue": queue},
        lambda rows: [QueueStats._make(row) for row in rows],
    )


_WAITS = """
    j.queue = %(queue)s and j.lease_until is null
    and j.next_run_at > clock_timestamp() and j.next_run_at < 'infinity'
"""


def let_pass(queue: str, seconds: float) -> Statement[float]:
    """Move the due times of waiting jobs back, by at most `seconds`, until one is due.

    Returns by how many seconds.
    """
    return Statement(
        f"""
        with step as materialized (
            select greatest(0, least(
                %(seconds)s::float8,
                extract(epoch from min(j.next_run_at) - clock_timestamp())::float8
            )) as seconds
            from bgjob_job j where {_WAITS}
        ), moved as (
            update bgjob_job j set next_run_at = j.next_run_at - step.seconds * interval '1 second'
            from step where {_WAITS}
        )
        select seconds from step
        """,
        {"queue": queue, "seconds": seconds},
        scalar,
    )


def live_jobs() -> Statement[list[Job]]:
    """List all jobs, waiting or running, of all queues."""
    return Statement(
        f"select {JOB_COLUMNS} from bgjob_job order by queue, priority, next_run_at, id",
        None,
        jobs_of,
    )
