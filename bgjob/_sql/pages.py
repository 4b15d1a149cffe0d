"""What pages show that no other part of the library asks for."""

from collections.abc import Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._sql.dead import DeadFilter
from bgjob._sql.statement import Row, Statement, finite, in_range, number_array, scalar

_MOST_LINES = "100"


class DeadListed(NamedTuple):
    """A dead job in a list."""

    number: int
    id: str
    queue: str
    type: str
    attempt: int
    last_error: str | None
    """Its first 1,000 characters."""
    moved_at: datetime
    worker: int | None


_DEAD: LiteralString = f"""
    d.id, d.job_id, d.queue, d.type, d.attempt, left(d.last_error, 1000), {in_range("d.moved_at")},
    d.worker
"""


def dead_of(id_: str) -> Statement[list[DeadListed]]:
    """List the dead jobs with an id, the latest first, at most ten."""
    return Statement(
        f"""
        -- All with this id first: see looks.find.
        select {_DEAD} from (
            select * from bgjob_dead_job where job_id = %(id)s offset 0
        ) as d order by d.id desc limit 10
        """,
        {"id": id_},
        lambda rows: [DeadListed._make(row) for row in rows],
    )


def latest_of(fingerprint: int, *, limit: int) -> Statement[list[DeadListed]]:
    """List the dead jobs of a group, the latest first."""
    return Statement(
        f"""
        select {_DEAD} from bgjob_dead_job d
        where (d.fingerprint, d.id) >= (%(fingerprint)s, 0)
            and (d.fingerprint, d.id) <= (%(fingerprint)s, 9223372036854775807)
        order by d.fingerprint desc, d.id desc limit %(limit)s
        """,
        {"fingerprint": fingerprint, "limit": limit},
        lambda rows: [DeadListed._make(row) for row in rows],
    )


class DeadStep(NamedTuple):
    """A page of dead jobs, and how far was looked for it."""

    found: list[DeadListed]
    looked: int
    last: int | None
    """The number of the last one that was looked at; None if there was none."""


SHOWN = 50
"""Dead jobs on a page."""

LOOKED = 50_000
"""Dead jobs that are looked at for a page."""


def dead_list(
    before: int | None, *, queue: str | None, type_: str | None, error: str | None
) -> Statement[DeadStep]:
    """List dead jobs that meet all conditions, the latest first, among the next 50,000."""
    conditions: list[LiteralString] = ["true"]
    if queue is not None:
        conditions.append("d.queue = %(queue)s")
    if type_ is not None:
        conditions.append("d.type = %(type)s")
    if error is not None:
        conditions.append("position(%(error)s in d.last_error) > 0")
    most = LOOKED if len(conditions) > 1 else SHOWN + 1
    condition: LiteralString = " and ".join(conditions)
    place: LiteralString = "" if before is None else "where id < %(before)s"
    return Statement(
        f"""
        with looked_at as materialized (
            select id from bgjob_dead_job {place} order by id desc limit %(most)s
        ), bound as (
            select count(*) as n, min(id) as last, max(id) as first from looked_at
        )
        select bound.n, bound.last, d.*
        from bound left join lateral (
            select {_DEAD} from bgjob_dead_job d
            where d.id between bound.last and bound.first and {condition}
            order by d.id desc limit %(shown)s
        ) as d on true
        """,
        {
            "before": before,
            "queue": queue,
            "type": type_,
            "error": error,
            "most": most,
            "shown": SHOWN + 1,
        },
        _dead_step,
    )


def _dead_step(rows: Sequence[Row]) -> DeadStep:
    looked, last, *_ = rows[0]
    return DeadStep([DeadListed(*row[2:]) for row in rows if row[2] is not None], looked, last)


class Line(NamedTuple):
    """The due jobs of one priority of a queue."""

    priority: int
    due: int
    """Counted up to the cap."""
    oldest: datetime | None


def lines_of(queue: str, *, cap: int) -> Statement[list[Line]]:
    """Count the due jobs of each priority of a queue, running ones left out, up to a cap.

    Those that wait for the limit of their type are due, and have an index of their own.
    """
    return Statement(
        f"""
        with recursive line (priority) as (
            (
                select priority from bgjob_job where queue = %(queue)s and not waits
                order by priority limit 1
            )
            union all
            select (
                select j.priority from bgjob_job j
                where j.queue = %(queue)s and j.priority > line.priority and not j.waits
                order by j.priority limit 1
            ) from line where line.priority is not null
        ), known as materialized (
            select priority from line where priority is not null limit {_MOST_LINES}
        ), held (type, priority) as (
            (
                select type, priority from bgjob_job
                where queue = %(queue)s and limited and waits
                order by type, priority limit 1
            )
            union all
            select n.type, n.priority
            from held cross join lateral (
                select j.type, j.priority from bgjob_job j
                where j.queue = %(queue)s and (j.type, j.priority) > (held.type, held.priority)
                    and j.limited and j.waits
                order by j.type, j.priority limit 1
            ) as n
        ), aside as materialized (
            select type, priority from held limit {_MOST_LINES}
        ), counted as (
            select known.priority, due.n, due.oldest
            from known cross join lateral (
                select count(*) as n, {in_range("min(s.next_run_at)")} as oldest from (
                    select j.next_run_at from bgjob_job j
                    where j.queue = %(queue)s and j.priority = known.priority
                        and j.next_run_at <= now() and not j.waits
                        and (j.lease_until is null or j.lease_until <= now())
                    order by j.next_run_at limit %(cap)s
                ) as s
            ) as due
            union all
            select aside.priority, due.n, due.oldest
            from aside cross join lateral (
                select count(*) as n, {in_range("min(s.next_run_at)")} as oldest from (
                    select j.next_run_at from bgjob_job j
                    where j.queue = %(queue)s and j.type = aside.type
                        and j.priority = aside.priority and j.limited and j.waits
                    order by j.next_run_at limit %(cap)s
                ) as s
            ) as due
        )
        select priority, least(sum(n), %(cap)s)::bigint, min(oldest)
        from counted group by priority order by priority
        """,
        {"queue": queue, "cap": cap},
        lambda rows: [Line._make(row) for row in rows],
    )


class ScheduleRow(NamedTuple):
    """A schedule, and what became of its last job."""

    name: str
    spec: str
    queue: str
    type: str
    is_paused: bool
    next_run_at: datetime | None
    is_late: bool
    last_run_at: datetime | None
    last_job_id: str | None
    last_state: str | None
    """"running", "due", "delayed", "dead" or "absent"; None without a last job."""


def schedules(*, late: float) -> Statement[list[ScheduleRow]]:
    """List the schedules by name; one is late if its tick was to come so many seconds ago."""
    return Statement(
        f"""
        select s.name, s.spec, s.queue, s.type, s.paused,
            case when not s.paused then {finite("s.next_run_at")} end,
            coalesce(
                not s.paused and s.next_run_at < now() - %(late)s::float8 * interval '1 second',
                false
            ),
            {finite("s.last_run_at")}, s.last_job_id,
            case when s.last_job_id is not null then coalesce((
                select case when j.lease_until > now() then 'running'
                    when j.next_run_at <= now() then 'due' else 'delayed' end
                from bgjob_job j where j.id = s.last_job_id
            ), (
                select 'dead' from bgjob_dead_job d where d.job_id = s.last_job_id limit 1
            ), 'absent') end
        from bgjob_schedule s order by s.name limit 1000
        """,
        {"late": late},
        lambda rows: [ScheduleRow._make(row) for row in rows],
    )


def last_dead() -> Statement[int]:
    """Return the number of the job that died last; 0 without one."""
    return Statement(
        "select coalesce((select id from bgjob_dead_job order by id desc limit 1), 0)", None, scalar
    )


def count_dead(where: DeadFilter, *, most: int) -> Statement[int]:
    """Count dead jobs up to `most`.

    Those of a group are bounded in its index only: with a bound of the number alone the plan may
    follow the primary key, past all dead jobs of other groups.
    """
    condition = where.condition
    order: LiteralString = ""
    if where.fingerprint is not None:
        condition = where._replace(upto=None).condition
        order = "order by fingerprint, id"
        if where.upto is not None:
            condition += " and (fingerprint, id) <= (%(fingerprint)s, %(upto)s)"
    return Statement(
        f"""
        select count(*) from (
            select from bgjob_dead_job where {condition} {order} limit %(most)s
        ) as d
        """,
        where.params | {"most": most},
        scalar,
    )


_HOURS: LiteralString = "24"
_MOST_IN_AN_HOUR: LiteralString = "500"


def hours_of(fingerprints: Sequence[int]) -> Statement[dict[int, tuple[int, ...]]]:
    """Count the jobs of groups that died in each of the last 24 hours, the latest last.

    No index has the time of death, but the numbers grow with it: each hour's first number is
    found by halves, and the jobs between two of them are in the index of the groups, of which 500
    are counted.
    """
    return Statement(
        f"""
        with recursive clock as materialized (select now() as now), search (hour, low, high) as (
            select hour, ends.low, ends.high
            from generate_series(1, {_HOURS}) as hour, (
                select coalesce((select id from bgjob_dead_job order by id limit 1), 1) as low,
                    coalesce((select id from bgjob_dead_job order by id desc limit 1), 0) + 1
                        as high
            ) as ends
            union all
            select s.hour,
                case when probe.is_earlier then probe.id + 1 else s.low end,
                case when probe.is_earlier then s.high else (s.low + s.high) / 2 end
            from search s cross join clock cross join lateral (
                select d.id, d.moved_at < clock.now - s.hour * interval '1 hour' as is_earlier
                from bgjob_dead_job d where d.id >= (s.low + s.high) / 2 order by d.id limit 1
            ) as probe
            where s.low < s.high
        ), bound as materialized (
            select hour, low from search where low >= high
            union all select 0, 9223372036854775807
        )
        select f.fingerprint, counted.hours
        from unnest(%(fingerprints)s::bigint[]) as f (fingerprint)
        cross join lateral (
            select array_agg(died.n order by begun.hour desc) as hours
            from bound begun join bound ended on ended.hour = begun.hour - 1
            cross join lateral (
                select count(*)::int as n from (
                    select from bgjob_dead_job d
                    where (d.fingerprint, d.id) >= (f.fingerprint, begun.low)
                        and (d.fingerprint, d.id) < (f.fingerprint, ended.low)
                    order by d.fingerprint, d.id limit {_MOST_IN_AN_HOUR}
                ) as few
            ) as died
        ) as counted
        """,
        {"fingerprints": number_array(fingerprints)},
        lambda rows: {fingerprint: tuple(hours) for fingerprint, hours in rows},
    )
