"""Try dead jobs again: a canary, then the rest of its group."""

from collections.abc import Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._sql.dead import DEAD_COLUMNS, LONGEST_ERROR, dead_job
from bgjob._sql.results import ended
from bgjob._sql.statement import Statement, column, in_range, scalar, text_array
from bgjob.job import DeadJob

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
        select {DEAD_COLUMNS} from bgjob_dead_job d
        where {_IN_GROUP}
            and not exists (select from (select from bgjob_job j where j.id = d.job_id offset 0) j)
            and not {died_later}
        order by fingerprint desc, id desc limit 1
        """,
        {"fingerprint": fingerprint, "after": 0, "upto": _LAST},
        lambda rows: dead_job(rows[0]) if rows else None,
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
                {LONGEST_ERROR}), '')
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
        f"""
        with gone as (
            delete from bgjob_job
            where id = %(id)s and attempt = %(attempt)s and token is null
            returning *
        ), {ended("gone", error="coalesce(last_error, '')")}
        insert into bgjob_dead_job (
            job_id, queue, type, arg, attempt, last_error, fingerprint, priority, exclusive,
            next_run_at, job_created_at, job_updated_at, checkpoint, headers, expires, group_id,
            group_dead, keep, slots
        )
        select id, queue, type, arg, attempt, last_error, %(fingerprint)s, priority, exclusive,
            next_run_at, created_at, updated_at, checkpoint, headers, expires, group_id,
            group_dead, keep, slots
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


# One by one: with statistics of a smaller table the planner read and sorted the whole group.
_NEXT: LiteralString = """
    with recursive step (id) as (
        select %(after)s::bigint
        union all
        select (
            select d.id from bgjob_dead_job d
            where (d.fingerprint, d.id) > (%(fingerprint)s, step.id)
                and (d.fingerprint, d.id) <= (%(fingerprint)s, %(upto)s) {which}
            order by d.fingerprint, d.id limit 1
        ) from step where step.id is not null
    )
    select id from step where id is not null offset 1 limit %(limit)s
"""


def batch(fingerprint: int, after: int, upto: int, *, limit: int) -> Statement[list[int]]:
    """Return the next numbers of a group; of several with one id only the latest."""
    died_later = _DIED_LATER.format(
        and_in_group="and o.fingerprint = %(fingerprint)s and o.id <= %(upto)s"
    )
    return Statement(
        _NEXT.format(which=f"and not {died_later}"),
        {"fingerprint": fingerprint, "after": after, "upto": upto, "limit": limit},
        column,
    )


def numbers(fingerprint: int, after: int, upto: int, *, limit: int) -> Statement[list[int]]:
    """Return the next numbers of a group."""
    return Statement(
        _NEXT.format(which=""),
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
