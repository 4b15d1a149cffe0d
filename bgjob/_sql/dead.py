"""The dead-letter table."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._headers import read
from bgjob._sql.results import pending_again
from bgjob._sql.statement import Row, Statement, column, in_range, scalar
from bgjob.job import DeadJob
from bgjob.stats import CappedCount
from bgjob.triage import DeadGroup

_FINGERPRINT = re.compile(r"[0-9a-f]{12,16}")
_WORD = 1 << 64

_NEAR: LiteralString = "100"
"""The latest jobs of a group whose queues are named."""

LONGEST_ERROR: LiteralString = "2000"
"""Characters of an error that a group or a canary shows."""

DEAD_COLUMNS = f"""
    job_id, queue, type, arg, attempt, last_error, priority, {in_range("next_run_at")},
    {in_range("job_created_at")}, {in_range("job_updated_at")}, exclusive,
    {in_range("moved_at")}, id, fingerprint, worker,
    case when expires is not null then {in_range("expires")} end, checkpoint, group_id,
    group_dead, slots, headers::text
"""

_DEAD_CONDITIONS: Mapping[str, LiteralString] = {
    "ids": "job_id = any (%(ids)s::text[])",
    "queue": "queue = %(queue)s",
    "type": "type = %(type)s",
    "group": "group_id = %(group)s",
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
    group: str | None = None

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
        select {DEAD_COLUMNS} from {where.source} where {where.condition}
        order by {order} limit %(limit)s
        """,
        {**where.params, "limit": limit},
        lambda rows: [dead_job(row) for row in rows],
    )


def dead_job(row: Row) -> DeadJob:
    *columns, fingerprint, worker, expires, checkpoint, group, group_dead, slots, headers = row
    number = fingerprint_of(fingerprint)
    rest = (number, worker, expires, read(headers), checkpoint, group, group_dead, slots)
    return DeadJob._make((*columns, *rest))


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
            coalesce(left(l.last_error, {LONGEST_ERROR}), '')
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
            coalesce(left(l.last_error, {LONGEST_ERROR}), ''), g.jobs
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


def requeue(where: DeadFilter, *, keep_checkpoint: bool = True) -> Statement[Requeued]:
    """Move dead jobs back to their queues, due now, with their checkpoints or without them.

    One that waited for its group when it was cancelled waits for it again.

    Of several dead jobs with one id only the latest is requeued. A job whose id a live job
    has stays dead. The results of those with `keep` are pending again. The
    statement waits for jobs that another session moves or purges, and leaves them to it.
    """
    latest: LiteralString = f"""
        select distinct on (job_id) id from {where.source} where {where.condition}
        order by job_id, id desc
    """
    checkpoint: LiteralString = "checkpoint" if keep_checkpoint else "null::bytea"
    return Statement(
        f"""
        with locked as materialized ({_LOCKED.format(which=latest, others="")}), back as (
            insert into bgjob_job (
                id, queue, type, arg, last_error, priority, exclusive, created_at, headers, expires,
                checkpoint, group_id, group_dead, next_run_at, keep, slots
            )
            select job_id, queue, type, arg, last_error, priority, exclusive, job_created_at,
                headers, case when expires > clock_timestamp() then expires end, {checkpoint},
                group_id, group_dead,
                case when group_id = job_id and group_dead is null then 'infinity'
                    else clock_timestamp() end, keep, slots
            from bgjob_dead_job
            where id = any (array(select id from locked))
            order by job_id collate "C"
            on conflict (id) do nothing
            returning id, next_run_at, keep
        ), {pending_again("back")}
        delete from bgjob_dead_job
        where id = any (array(
            -- Not a join: with statistics of a drained table it compared each with each.
            select id from locked where (job_id in (select id from back)) is true
        ))
        returning job_id, queue, (
            select next_run_at from back where next_run_at < 'infinity' limit 1
        )
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
