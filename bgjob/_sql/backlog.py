"""What waits too long: due jobs, ended leases, schedules; and what died recently.

Each statement is bounded in what it reads, not only in what it returns: the doctor asks these
when a database is in trouble.
"""

from typing import LiteralString, NamedTuple

from bgjob._sql.limits import IN_USE
from bgjob._sql.statement import Statement

MOST_LINES = 10_000
"""The most queues and priorities in which the oldest due job is looked for."""

MOST_PAGES = 131_072
"""The most pages of bgjob_job that are read for leases: 1 GB, over 1,500,000 jobs."""

MOST_DEAD = 10_000
"""The most dead jobs that are looked at, the latest ones."""

_MOST: LiteralString = "100"
"""The most rows of an answer."""

_TOTAL: LiteralString = "count(*) over ()"


class Due(NamedTuple):
    """A queue with due jobs."""

    queue: str
    seconds: float
    """Since its oldest due job became due."""
    unlimited_seconds: float | None
    """The same of those that no limit holds up; None if there are none."""
    is_paused: bool
    is_endless: bool
    """Whether it is paused until it is resumed."""
    queues: int
    """All such queues; at most 100 are listed."""


def due() -> Statement[list[Due]]:
    """List queues with due jobs, the one with the oldest first.

    Each queue and priority is found by one look into the index, and its first due job by another;
    and so are those of the jobs that wait for the limit of their type.
    """
    return Statement(
        f"""
        with recursive line (queue, priority) as (
            (
                select queue, priority from bgjob_job where not waits
                order by queue, priority limit 1
            )
            union all
            select n.queue, n.priority
            from line cross join lateral (
                select j.queue, j.priority from bgjob_job j
                where (j.queue, j.priority) > (line.queue, line.priority) and not j.waits
                order by j.queue, j.priority limit 1
            ) as n
        ), aside (queue, type, priority) as (
            (
                select queue, type, priority from bgjob_job where limited and waits
                order by queue, type, priority limit 1
            )
            union all
            select n.queue, n.type, n.priority
            from aside cross join lateral (
                select j.queue, j.type, j.priority from bgjob_job j
                where (j.queue, j.type, j.priority) > (aside.queue, aside.type, aside.priority)
                    and j.limited and j.waits
                order by j.queue, j.type, j.priority limit 1
            ) as n
        ), oldest as (
            select line.queue, first.at, true as is_free
            from (select queue, priority from line limit %(lines)s) as line
            cross join lateral (
                select j.next_run_at as at from bgjob_job j
                where j.queue = line.queue and j.priority = line.priority
                    and j.next_run_at <= now() and not j.waits
                    and (j.lease_until is null or j.lease_until <= now())
                order by j.next_run_at limit 1
            ) as first
            union all
            select aside.queue, first.at, false
            from (select * from aside limit %(lines)s) as aside
            cross join lateral (
                select j.next_run_at as at from bgjob_job j
                where j.queue = aside.queue and j.type = aside.type
                    and j.priority = aside.priority and j.limited and j.waits
                order by j.next_run_at limit 1
            ) as first
        )
        select q.queue, q.seconds, case when l.name is null then q.free_seconds end,
            p.queue is not null, p.until is not distinct from 'infinity', {_TOTAL}
        from (
            select queue, max(seconds) as seconds,
                max(seconds) filter (where is_free) as free_seconds
            from (
                select queue, is_free, extract(epoch from
                    clock_timestamp() - greatest(at, '0001-01-02 00:00+00'))::float8 as seconds
                from oldest
            ) as o
            group by queue
        ) as q
        left join bgjob_pause p on p.queue = q.queue and p.until > clock_timestamp()
        left join lateral (
            select l.name from bgjob_limit l
            where l.scope = 'queue' and l.name = q.queue and {IN_USE}
        ) as l on true
        order by q.seconds desc, q.queue limit {_MOST}
        """,
        {"lines": MOST_LINES},
        lambda rows: [Due(*row) for row in rows],
    )


class Leases(NamedTuple):
    """The leases and suspects of a queue."""

    queue: str
    held: int
    ended: int
    """Jobs whose lease has ended, and that no worker has set free yet."""
    ended_ago: float | None
    """Seconds since the first of these ended."""
    suspects: int
    """Jobs that two workers or more died with."""


class Held(NamedTuple):
    """The leases of all queues."""

    pages: int
    """Of the table."""
    queues: list[Leases]


def leases(pages: int = MOST_PAGES) -> Statement[Held]:
    """List queues with held jobs or suspects; reads the table once, up to so many pages.

    No index covers a lease, so that claims are heap-only updates.
    """
    return Statement(
        f"""
        select p.pages, l.*
        from (
            select pg_relation_size('bgjob_job')
                / current_setting('block_size')::bigint as pages
        ) as p
        left join (
            select queue, count(*) filter (where lease_until > now()),
                count(*) filter (where lease_until <= now()),
                extract(epoch from clock_timestamp() - min(
                    greatest(lease_until, '0001-01-02 00:00+00')
                ) filter (where lease_until <= now()))::float8,
                count(*) filter (where deaths > 1)
            from bgjob_job
            where ctid < %(end)s::tid and (lease_until is not null or deaths > 1)
            group by queue order by 3 desc, 5 desc, queue limit {_MOST}
        ) as l on true
        """,
        {"end": f"({pages},0)"},
        lambda rows: Held(rows[0][0], [Leases(*row[1:]) for row in rows if row[1] is not None]),
    )


class LateSchedule(NamedTuple):
    """A schedule whose tick has passed without a job."""

    name: str
    spec: str
    queue: str
    seconds: float
    """Since its next job was to be enqueued."""
    schedules: int
    """All late ones; at most 100 are listed."""


def late_schedules(seconds: float) -> Statement[list[LateSchedule]]:
    """List schedules that are over so many seconds late, the latest first."""
    return Statement(
        f"""
        select s.name, s.spec, s.queue, s.seconds, {_TOTAL}
        from (
            select name, spec, queue, extract(epoch from clock_timestamp()
                - greatest(next_run_at, '0001-01-02 00:00+00'))::float8 as seconds
            from bgjob_schedule where not paused and next_run_at < 'infinity'
        ) as s
        where s.seconds > %(seconds)s::float8
        order by s.seconds desc, s.name limit {_MOST}
        """,
        {"seconds": seconds},
        lambda rows: [LateSchedule(*row) for row in rows],
    )


class Died(NamedTuple):
    """Jobs of one type in one queue that died within the last hour."""

    queue: str
    type: str
    jobs: int
    unknown: int
    """Those for whose type a worker had no handler."""
    looked_at: int
    """All dead jobs that were looked at, of any time."""


def died() -> Statement[list[Died]]:
    """Count the jobs that died within the last hour, among the latest 10,000."""
    return Statement(
        f"""
        with recent as materialized (
            select queue, type, moved_at, starts_with(last_error, 'UnknownTypeError:') as is_unknown
            from bgjob_dead_job order by id desc limit %(most)s
        )
        select queue, type, count(*), count(*) filter (where is_unknown),
            (select count(*) from recent)
        from recent where moved_at > clock_timestamp() - interval '1 hour'
        group by queue, type order by 3 desc, queue, type limit {_MOST}
        """,
        {"most": MOST_DEAD},
        lambda rows: [Died(*row) for row in rows],
    )
