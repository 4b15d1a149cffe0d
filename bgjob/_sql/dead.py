"""The dead-letter table."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._sql.statement import Row, Statement, column, in_range, scalar, text_array
from bgjob.job import DeadJob
from bgjob.stats import CappedCount
from bgjob.triage import DeadGroup

_FINGERPRINT = re.compile(r"[0-9a-f]{12,16}")
_WORD = 1 << 64

_NEAR: LiteralString = "100"
"""The latest jobs of a group whose queues are named."""

_LONGEST_ERROR: LiteralString = "2000"

_DEAD_COLUMNS = f"""
    job_id, queue, type, arg, attempt, last_error, priority, {in_range("next_run_at")},
    {in_range("job_created_at")}, {in_range("job_updated_at")}, exclusive,
    {in_range("moved_at")}, id, fingerprint, worker
"""

_DEAD_CONDITIONS: Mapping[str, LiteralString] = {
    "ids": "job_id = any (%(ids)s::text[])",
    "queue": "queue = %(queue)s",
    "type": "type = %(type)s",
    "error": "position(%(error)s in last_error) > 0",
    "moved_before": "moved_at < %(moved_before)s",
    "moved_after": "moved_at >= %(moved_after)s",
    "older_than": "moved_at < clock_timestamp() - %(older_than)s * interval '1 second'",
    "before": "id < %(before)s",
    "upto": "id <= %(upto)s",
    "numbers": "id = any (%(numbers)s::bigint[])",
    # As bounds of a range, for which the planner takes the index of both columns. With an equation
    # it may follow the primary key, whose order is the same, past all dead jobs of other groups.
    "fingerprint": (
        "(fingerprint, id) >= (%(fingerprint)s, 0) "
        "and (fingerprint, id) <= (%(fingerprint)s, 9223372036854775807)"
    ),
}


class DeadFilter(NamedTuple):
    """Filters of dead jobs; None does not filter."""

    ids: Sequence[str] | None = None
    queue: str | None = None
    type: str | None = None
    error: str | None = None
    moved_before: datetime | None = None
    moved_after: datetime | None = None
    older_than: float | None = None
    before: int | None = None
    upto: int | None = None
    numbers: Sequence[int] | None = None
    fingerprint: int | None = None

    @property
    def params(self) -> dict[str, object]:
        """The parameters of the condition."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @property
    def condition(self) -> LiteralString:
        """The condition that dead jobs have to meet."""
        return " and ".join(["true", *(_DEAD_CONDITIONS[name] for name in self.params)])

    @property
    def source(self) -> LiteralString:
        """Where dead jobs that meet the condition are.

        Those with given ids or numbers are found before they are put in an order: in that of an
        index, which a plan with statistics of an empty table prefers, all dead jobs may be read.
        """
        for name in ("numbers", "ids"):
            if name in self.params:
                condition = _DEAD_CONDITIONS[name]
                return f"(select * from bgjob_dead_job where {condition} offset 0) as found"
        return "bgjob_dead_job"


def fingerprint_of(number: int) -> str:
    """Return the text of a fingerprint."""
    return f"{number % _WORD:012x}"


def number_of(fingerprint: str) -> int:
    """Return the number of a fingerprint's text.

    Raises:
        ValueError: it is not one.

    """
    if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
        raise ValueError(
            f"a fingerprint has 12 hexadecimal digits, such as 4f1c9a0e2b77, not {fingerprint!r}; "
            "client.dlq.groups() and bgjob triage list those that there are"
        )
    number = int(fingerprint, 16)
    return number - _WORD if number >= _WORD // 2 else number


def listed(where: DeadFilter, *, limit: int) -> Statement[list[DeadJob]]:
    """List dead jobs, the latest first."""
    order: LiteralString = "id desc" if where.fingerprint is None else "fingerprint desc, id desc"
    return Statement(
        f"""
        select {_DEAD_COLUMNS} from {where.source} where {where.condition}
        order by {order} limit %(limit)s
        """,
        {**where.params, "limit": limit},
        lambda rows: [_dead_job(row) for row in rows],
    )


def _dead_job(row: Row) -> DeadJob:
    *columns, fingerprint, worker = row
    return DeadJob._make((*columns, fingerprint_of(fingerprint), worker))


def groups(where: DeadFilter, *, limit: int) -> Statement[list[DeadGroup]]:
    """Group dead jobs by their fingerprints, the largest group first.

    Without a filter the index has all that is needed to count them. The first and the last
    number of a group lead to the rest. With 1,000,000 dead jobs in 40 groups it takes 0.1 to 0.2 s
    (benchmarks/triage.py).
    """
    return Statement(
        f"""
        with grouped as materialized (
            select fingerprint, count(*) as jobs, min(id) as first, max(id) as last
            from bgjob_dead_job where {where.condition}
            group by fingerprint order by jobs desc, last desc limit %(limit)s
        )
        select g.fingerprint, g.jobs, array(
                select distinct near.queue from (
                    select d.queue from bgjob_dead_job d
                    where (d.fingerprint, d.id) <= (g.fingerprint, g.last)
                        and (d.fingerprint, d.id) >= (g.fingerprint, g.first)
                    order by d.fingerprint desc, d.id desc limit {_NEAR}
                ) as near
            ),
            l.type, {in_range("f.moved_at")}, {in_range("l.moved_at")}, g.last, l.job_id,
            coalesce(left(l.last_error, {_LONGEST_ERROR}), '')
        from grouped g
        cross join lateral (
            select d.moved_at from bgjob_dead_job d where d.id = g.first limit 1
        ) as f
        cross join lateral (
            select d.job_id, d.type, d.moved_at, d.last_error
            from bgjob_dead_job d where d.id = g.last limit 1
        ) as l
        order by g.jobs desc, g.last desc
        """,
        {**where.params, "limit": limit},
        lambda rows: [
            DeadGroup(fingerprint_of(number), jobs, tuple(sorted(queues)), *rest)
            for number, jobs, queues, *rest in rows
        ],
    )


class LastDeath(NamedTuple):
    """The job that died last."""

    at: datetime
    queue: str
    type: str
    error: str
    """The beginning of its error."""
    jobs: CappedCount
    """The dead jobs of its group."""


def last_death(*, within: float, cap: int) -> Statement[LastDeath | None]:
    """Return the job that died last, if that was within so many seconds, and count its group."""
    return Statement(
        f"""
        select {in_range("l.moved_at")}, l.queue, l.type,
            coalesce(left(l.last_error, {_LONGEST_ERROR}), ''), g.jobs
        from (
            select d.id, d.queue, d.type, d.last_error, d.moved_at, d.fingerprint
            from bgjob_dead_job d order by d.id desc limit 1
        ) as l
        cross join lateral (
            -- As a range: for a fingerprint that is equal, the primary key has the same order.
            select count(*) as jobs from (
                select from bgjob_dead_job d
                where (d.fingerprint, d.id) <= (l.fingerprint, l.id)
                    and (d.fingerprint, d.id) >= (l.fingerprint, 0)
                order by d.fingerprint desc, d.id desc limit %(cap)s
            ) as same
        ) as g
        where l.moved_at > clock_timestamp() - %(within)s * interval '1 second'
        """,
        {"within": within, "cap": cap},
        lambda rows: next(
            (
                LastDeath(at, queue, type_, error, CappedCount(jobs, is_exact=jobs < cap))
                for at, queue, type_, error, jobs in rows
            ),
            None,
        ),
    )


def matching(where: DeadFilter) -> Statement[list[str]]:
    """List the ids of dead jobs, each once, in the order in which they died."""
    return Statement(
        f"""
        select job_id from bgjob_dead_job where {where.condition}
        group by job_id order by min(id)
        """,
        where.params,
        column,
    )


class Requeued(NamedTuple):
    """The requeued jobs and their queues."""

    ids: list[str]
    queues: set[str]
    due: datetime | None
    """The due time of one of them."""


# A statement first locks the jobs that it moves or deletes, in the order of their numbers. If its
# snapshot is older than another statement's commit, it still sees the jobs that that one moved.
# Locking shows that they are gone, so that they are not inserted twice, and there is no deadlock.
_LOCKED: LiteralString = """
    select id, job_id from bgjob_dead_job where id = any (array({which}))
    order by id for update {others}
"""


def requeue(where: DeadFilter) -> Statement[Requeued]:
    """Move dead jobs back to their queues, due now.

    Of several dead jobs with one id only the latest is requeued. A job whose id a live job
    has stays dead. The statement waits for jobs that another session moves or purges, and
    leaves them to it.
    """
    latest: LiteralString = f"""
        select distinct on (job_id) id from {where.source} where {where.condition}
        order by job_id, id desc
    """
    return Statement(
        f"""
        with locked as materialized ({_LOCKED.format(which=latest, others="")}), back as (
            insert into bgjob_job (
                id, queue, type, arg, last_error, priority, exclusive, created_at
            )
            select job_id, queue, type, arg, last_error, priority, exclusive, job_created_at
            from bgjob_dead_job
            where id = any (array(select id from locked))
            order by job_id collate "C"
            on conflict (id) do nothing
            returning id, next_run_at
        )
        delete from bgjob_dead_job
        where id = any (array(
            -- Not a join: with statistics of a drained table it compared each with each.
            select id from locked where (job_id in (select id from back)) is true
        ))
        returning job_id, queue, (select next_run_at from back limit 1)
        """,
        where.params,
        lambda rows: Requeued(
            column(rows), {queue for _, queue, _ in rows}, rows[0][2] if rows else None
        ),
    )


def purge(where: DeadFilter) -> Statement[int]:
    """Delete dead jobs; return their number."""
    which: LiteralString = f"select id from {where.source} where {where.condition}"
    return Statement(
        f"""
        with locked as materialized ({_LOCKED.format(which=which, others="")}), gone as (
            delete from bgjob_dead_job where id = any (array(select id from locked)) returning id
        )
        select count(*) from gone
        """,
        where.params,
        scalar,
    )


def expire(age: float, *, limit: int) -> Statement[int]:
    """Delete dead jobs older than `age`, of the first `limit`; return their number.

    Dead jobs are numbered as they die: if the first ones are younger, all are. The statement
    skips jobs that another session has locked, for example to requeue them: a worker's control
    thread does not wait.
    """
    old: LiteralString = """
        select id from (
            select id, moved_at from bgjob_dead_job order by id limit %(limit)s
        ) as first
        where moved_at < clock_timestamp() - %(age)s * interval '1 second'
    """
    return Statement(
        f"""
        with locked as materialized (
            {_LOCKED.format(which=old, others="skip locked")}
        ), gone as (
            delete from bgjob_dead_job
            where id = any (array(select id from locked))
            returning id
        )
        select count(*) from gone
        """,
        {"age": age, "limit": limit},
        scalar,
    )


# -- a canary and the rest -----------------------------------------------------------------


_IN_GROUP: LiteralString = """
    (d.fingerprint, d.id) > (%(fingerprint)s, %(after)s)
    and (d.fingerprint, d.id) <= (%(fingerprint)s, %(upto)s)
"""
_LAST = 2**63 - 1

# As a look for each job: the planner must not join with all dead jobs.
_DIED_LATER: LiteralString = """
    exists (
        select from (
            select o.id, o.fingerprint from bgjob_dead_job o where o.job_id = d.job_id offset 0
        ) as o
        where o.id > d.id {and_in_group}
    )
"""


def canary(fingerprint: int) -> Statement[DeadJob | None]:
    """Find the latest dead job of a group whose id no live job has, and that died last here."""
    died_later = _DIED_LATER.format(and_in_group="")
    return Statement(
        f"""
        select {_DEAD_COLUMNS} from bgjob_dead_job d
        where {_IN_GROUP}
            and not exists (select from (select from bgjob_job j where j.id = d.job_id offset 0) j)
            and not {died_later}
        order by fingerprint desc, id desc limit 1
        """,
        {"fingerprint": fingerprint, "after": 0, "upto": _LAST},
        lambda rows: _dead_job(rows[0]) if rows else None,
    )


class State(NamedTuple):
    """A job that was requeued: its row as a live job, and as one that has died since."""

    attempt: int | None
    """None if it is not live."""
    token: int | None
    waits: bool | None
    next_run_at: datetime | None
    created_at: datetime | None
    number: int | None
    """Its number if it is dead again; else None."""
    error: str
    """Of the live or the dead one."""


def state(id_: str, number: int) -> Statement[State]:
    """Return the state of a job that had this number when it was dead."""
    return Statement(
        f"""
        select j.attempt, j.token, j.waits, j.next_run_at, j.created_at, d.id,
            coalesce(left(case when d.id is null then j.last_error else d.last_error end,
                {_LONGEST_ERROR}), '')
        from (select 1) as one
        left join lateral (
            select attempt, token, waits, {in_range("next_run_at")} as next_run_at,
                {in_range("created_at")} as created_at, last_error
            from bgjob_job where id = %(id)s
        ) as j on true
        left join lateral (
            select o.id, o.last_error
            from (select * from bgjob_dead_job where job_id = %(id)s offset 0) as o
            where o.id > %(number)s order by o.id limit 1
        ) as d on true
        """,
        {"id": id_, "number": number},
        lambda rows: State(*rows[0]),
    )


def give_up(id_: str, attempt: int, fingerprint: int) -> Statement[int | None]:
    """Move a job that waits for its next attempt to the dead-letter table, with its error.

    Returns its number; None if it is not in this attempt any more, or a worker has it.
    """
    return Statement(
        """
        with gone as (
            delete from bgjob_job
            where id = %(id)s and attempt = %(attempt)s and token is null
            returning *
        )
        insert into bgjob_dead_job (
            job_id, queue, type, arg, attempt, last_error, fingerprint, priority, exclusive,
            next_run_at, job_created_at, job_updated_at
        )
        select id, queue, type, arg, attempt, last_error, %(fingerprint)s, priority, exclusive,
            next_run_at, created_at, updated_at
        from gone
        returning id
        """,
        {"id": id_, "attempt": attempt, "fingerprint": fingerprint},
        lambda rows: rows[0][0] if rows else None,
    )


class Start(NamedTuple):
    """The dead jobs when the rest of a group begins to be moved."""

    last: int
    """The greatest number of any dead job; 0 without one."""
    jobs: int
    """The jobs of the group."""


def start(fingerprint: int, upto: int | None) -> Statement[Start]:
    """Count the jobs of a group, up to a number."""
    return Statement(
        f"""
        select coalesce((select id from bgjob_dead_job order by id desc limit 1), 0),
            (select count(*) from bgjob_dead_job d where {_IN_GROUP})
        """,
        {"fingerprint": fingerprint, "after": 0, "upto": _LAST if upto is None else upto},
        lambda rows: Start(*rows[0]),
    )


def batch(fingerprint: int, after: int, upto: int, *, limit: int) -> Statement[list[int]]:
    """Return the next numbers of a group; of several with one id only the latest."""
    died_later = _DIED_LATER.format(
        and_in_group="and o.fingerprint = %(fingerprint)s and o.id <= %(upto)s"
    )
    return Statement(
        f"""
        select d.id from bgjob_dead_job d where {_IN_GROUP} and not {died_later}
        order by d.fingerprint, d.id limit %(limit)s
        """,
        {"fingerprint": fingerprint, "after": after, "upto": upto, "limit": limit},
        column,
    )


def numbers(fingerprint: int, after: int, upto: int, *, limit: int) -> Statement[list[int]]:
    """Return the next numbers of a group."""
    return Statement(
        f"""
        select d.id from bgjob_dead_job d where {_IN_GROUP}
        order by d.fingerprint, d.id limit %(limit)s
        """,
        {"fingerprint": fingerprint, "after": after, "upto": upto, "limit": limit},
        column,
    )


def failed_again(fingerprint: int, since: int, ids: Sequence[str]) -> Statement[int]:
    """Count the jobs of a group that died after a number, and requeued jobs that failed otherwise.

    The first are counted up to 10,000.
    """
    return Statement(
        f"""
        select (
            select count(*) from (
                select from bgjob_dead_job d where {_IN_GROUP} limit 10000
            ) as died
        ) + (
            select count(*)
            from unnest(%(ids)s::text[]) as moved (id) cross join lateral (
                select d.id, d.fingerprint from bgjob_dead_job d where d.job_id = moved.id offset 0
            ) as d
            where d.id > %(after)s and d.fingerprint <> %(fingerprint)s
        ) + (
            select count(*)
            from unnest(%(ids)s::text[]) as moved (id) cross join lateral (
                select j.attempt, j.token from bgjob_job j where j.id = moved.id limit 1
            ) as j
            where j.attempt > 1 or (j.attempt = 1 and j.token is null)
        )
        """,
        {"fingerprint": fingerprint, "after": since, "upto": _LAST, "ids": text_array(ids)},
        scalar,
    )
