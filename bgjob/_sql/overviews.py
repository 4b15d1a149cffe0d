"""Count the jobs of each queue up to a cap, whatever the tables hold.

No number here needs a scan of a table. Each comes from looks: index scans in order that end
after `cap` rows. A look is a lateral sub-select with an order and a limit, which the planner
cannot join in another way. What an overview costs grows with the number of queues and
priorities, and not with that of jobs (benchmarks/overview.py):

- The queues and priorities in use are found by a skip scan of bgjob_job_due.
- For each of them one look takes the oldest jobs that are due or running, and another those
  that are delayed. Running jobs keep their due time, so they lie before the due ones; a
  third look follows only where they fill the first.
- Jobs that wait for the limit of their type are due, and not in that index. They have their own.
- Jobs that wait for an exclusive key are not in that index. They are found by the first keys
  of bgjob_exclusive.
- Dead jobs lie in the order of their death.

The planner must neither read a large queue and sort it, nor compile the query, which takes ten
times as long as to run it. In a session of the library's own `plan_by_index` sees to that. In a
caller's session nothing is set: there the ends of a line are given as rows, for which the planner
expects a ninth of the table, whatever it knows of a queue, and the lines by arrays, for which it
expects ten. It errs where the table has never been analyzed.

The time is statement_timestamp(), and not now(): in the caller's transaction its own jobs
would be due in the future.
"""

from collections.abc import Sequence

from bgjob._sql.statement import Row, Statement, in_range, nothing
from bgjob.stats import CappedCount, Overview, QueueOverview

_RECENT = 3600.0
"""Seconds: dead jobs of this time are counted."""

_LINES = """
    with recursive line (queue, priority) as (
        (
            select j.queue, j.priority from bgjob_job j
            where not j.waits {and_queue}
            order by j.queue, j.priority limit 1
        )
        union all
        select n.queue, n.priority
        from line cross join lateral (
            select j.queue, j.priority from bgjob_job j
            where (j.queue, j.priority) > (line.queue, line.priority)
                and not j.waits {and_queue}
            order by j.queue, j.priority limit 1
        ) as n
    )
"""

_EARLIEST = "'0001-01-02 00:00+00'"

_IS_DUE = """
    (j.queue, j.priority) >= (line.queue, line.priority)
    and (j.queue, j.priority, j.next_run_at)
        <= (line.queue, line.priority, statement_timestamp())
    and not j.waits
"""
_IS_DELAYED = """
    (j.queue, j.priority, j.next_run_at)
        > (line.queue, line.priority, statement_timestamp())
    and (j.queue, j.priority) <= (line.queue, line.priority)
    and not j.waits
"""

# A line's numbers, and whether each is exact. The server skips the second look unless running
# jobs were in the way of the first. The coalesce() there hides from the planner that few jobs
# have a lease.
_COUNTED = f"""
    select line.queue,
        case when oldest.is_crowded then due.n else oldest.n - oldest.running end as due,
        case when oldest.is_crowded then due.n else oldest.n end < %(cap)s as is_due_exact,
        later.n as delayed,
        later.n < %(cap)s as is_delayed_exact,
        oldest.running,
        oldest.n < %(cap)s as is_running_exact,
        case when oldest.is_crowded then due.since else oldest.since end as since
    from unnest(
        array(select queue from line), array(select priority from line)
    ) as line (queue, priority)
    cross join lateral (
        select count(*) as n, count(*) filter (where is_running) as running,
            count(*) = %(cap)s and bool_or(is_running) as is_crowded,
            min(greatest(s.next_run_at, {_EARLIEST})) filter (where not is_running) as since
        from (
            select j.next_run_at,
                coalesce(j.lease_until > statement_timestamp(), false) as is_running
            from bgjob_job j
            where {_IS_DUE}
            order by j.queue, j.priority, j.next_run_at limit %(cap)s
        ) as s
    ) as oldest
    cross join lateral (
        select count(*) as n, min(greatest(s.next_run_at, {_EARLIEST})) as since
        from (
            select j.next_run_at from bgjob_job j
            where oldest.is_crowded and {_IS_DUE}
                and coalesce(j.lease_until <= statement_timestamp(), true)
            order by j.queue, j.priority, j.next_run_at limit %(cap)s
        ) as s
    ) as due
    cross join lateral (
        select count(*) as n
        from (
            select from bgjob_job j
            where {_IS_DELAYED}
            order by j.queue, j.priority, j.next_run_at limit %(cap)s
        ) as s
    ) as later
"""

# Of the keys, and of the dead jobs, it is said once whether all of them were looked at.
_QUEUES = f"""
    {_LINES}, counted as (
        {_COUNTED}
    ), held (queue) as (
        (
            select j.queue from bgjob_job j
            where j.limited and j.waits {{and_queue}} order by j.queue limit 1
        )
        union all
        select (
            select j.queue from bgjob_job j
            where j.limited and j.waits and j.queue > held.queue {{and_queue}}
            order by j.queue limit 1
        ) from held where held.queue is not null
    ), limited as materialized (
        select held.queue, s.n, s.since
        from held cross join lateral (
            select count(*) as n, min(greatest(w.next_run_at, {_EARLIEST})) as since
            from (
                select j.next_run_at from bgjob_job j
                where j.queue = held.queue and j.limited and j.waits
                order by j.type, j.priority, j.next_run_at limit %(cap)s
            ) as w
        ) as s
        where held.queue is not null
    ), key as materialized (
        select e.key from bgjob_exclusive e where e.place = 0 order by e.key limit %(cap)s
    ), waiting as materialized (
        select w.queue
        from key cross join lateral (
            select j.queue from bgjob_job j
            where j.exclusive is not null
                and (j.exclusive, j.waits) >= (key.key, true)
                and (j.exclusive, j.waits) <= (key.key, true)
            order by j.exclusive, j.waits limit %(cap)s
        ) as w
        limit %(cap)s
    ), dead as materialized (
        select d.queue
        from (
            select d.queue, d.moved_at from bgjob_dead_job d order by d.id desc limit %(cap)s
        ) as d
        where d.moved_at > statement_timestamp() - %(recent)s * interval '1 second'
    ), fact as (
        select queue, due, is_due_exact, delayed, is_delayed_exact, running, is_running_exact,
            since, 0 as waiting, 0 as dead, null::timestamptz as until
        from counted
        union all
        select queue, n, n < %(cap)s, 0, true, 0, true, since, 0, 0, null from limited
        union all select queue, 0, true, 0, true, 0, true, null, 1, 0, null from waiting
        union all select queue, 0, true, 0, true, 0, true, null, 0, 1, null from dead
        union all
        select queue, 0, true, 0, true, 0, true, null, 0, 0, until
        from bgjob_pause where until > statement_timestamp()
    ), queue as (
        select queue,
            sum(due)::bigint as due, bool_and(is_due_exact) as is_due_exact,
            sum(delayed)::bigint as delayed, bool_and(is_delayed_exact) as is_delayed_exact,
            sum(running)::bigint as running, bool_and(is_running_exact) as is_running_exact,
            sum(waiting) as waiting, sum(dead) as dead, min(since) as since, max(until) as until
        from fact {{of_queue}} group by queue
    )
"""

_OVERVIEW = f"""
    {_QUEUES}
    select statement_timestamp(), queue.queue,
        extract(epoch from statement_timestamp() - queue.since)::float8,
        queue.until is not null,
        case when queue.until < 'infinity' then {in_range("queue.until")} end,
        due, is_due_exact, delayed, is_delayed_exact, running, is_running_exact,
        queue.waiting, n.keys < %(cap)s and n.waiting < %(cap)s, queue.dead, n.dead < %(cap)s
    from (
        select (select count(*) from key) as keys, (select count(*) from waiting) as waiting,
            (select count(*) from dead) as dead
    ) as n
    left join queue on true
    order by queue.queue
"""


# For a query of Django's, which cannot pass parameters to what it selects from.
QUEUES = (
    f"""
    {_QUEUES}
    select queue as name, due, running, delayed, waiting, dead, since,
        until is not null as is_paused,
        case when until < 'infinity' then {in_range("until")} end as paused_until
    from queue
    """.format(and_queue="", of_queue="")
    .replace("%(cap)s", "1000")
    .replace("%(recent)s", "3600")
)


def plan_by_index() -> Statement[None]:
    """Make the next statements of this transaction walk in the order of an index."""
    return Statement(
        """
        select set_config('enable_bitmapscan', 'off', true),
            set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true)
        """,
        None,
        nothing,
    )


def overview(queue: str | None, *, cap: int) -> Statement[Overview]:
    """Count the jobs of all queues, or of one, up to `cap` in each look."""
    params = {"cap": cap, "recent": _RECENT}
    if queue is None:
        return Statement(_OVERVIEW.format(and_queue="", of_queue=""), params, _read)
    text = _OVERVIEW.format(and_queue="and j.queue = %(queue)s", of_queue="where queue = %(queue)s")
    return Statement(text, params | {"queue": queue}, _read)


def _read(rows: Sequence[Row]) -> Overview:
    return Overview(rows[0][0], tuple(_queue(row) for row in rows if row[1] is not None))


def _queue(row: Row) -> QueueOverview:
    _, queue, age, is_paused, until, *numbers = row
    due, delayed, running, waiting, dead = map(CappedCount, numbers[::2], numbers[1::2])
    return QueueOverview(queue, due, delayed, running, waiting, dead, age, is_paused, until)
