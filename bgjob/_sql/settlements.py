"""Settle claimed jobs: what a result does to the row, as statements for many jobs at once.

The module has over 400 lines because these statements are put together from the same parts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import LiteralString, NamedTuple

from bgjob._failure import error_text, fingerprint
from bgjob._postgres.cursor import ErrorTexts, Floats, Payloads, Smallints
from bgjob._sql.history import TODAY
from bgjob._sql.notices import LOCK_CLASS, NOTIFY, bucket, channel
from bgjob._sql.results import OF_ENDED, ended
from bgjob._sql.statement import (
    Row,
    Statement,
    column,
    in_range,
    number_array,
    scalar,
    text_array,
)
from bgjob._sql.successors import SUCCESSOR, followed
from bgjob._sql.tokens import NUMBER
from bgjob.job import Job
from bgjob.result import Complete, MoveToDlq, Reschedule, Result, Retry


class Claimed(NamedTuple):
    """A job and the token of the claim that holds it."""

    job: Job
    token: int
    is_charged: bool = True
    """Whether the claim charged an attempt; only a claim of several suspects does not."""


class Returned(NamedTuple):
    """A completed job whose result is kept."""

    claimed: Claimed
    value: bytes | None
    """JSON; None if its handler gave nothing."""


class Postponed(NamedTuple):
    """A job to release with a new due time: retried or rescheduled."""

    claimed: Claimed
    delay: float
    """Seconds from now."""
    error: str | None
    """None keeps the last one."""
    refund: bool
    """Whether the attempt is given back."""
    priority: int | None = None
    """None keeps the job's."""


class DeadLettered(NamedTuple):
    """A job to move to the dead-letter table."""

    claimed: Claimed
    error: str
    fingerprint: int


@dataclass(slots=True)
class Settlements:
    """Jobs to settle, by what happens to their rows; only `store` says what a result does."""

    complete: list[Claimed] = field(default_factory=list)
    returned: list[Returned] = field(default_factory=list)
    postpone: list[Postponed] = field(default_factory=list)
    dead_letter: list[DeadLettered] = field(default_factory=list)
    release_jobs: list[Claimed] = field(default_factory=list)
    """Jobs that did not start."""
    holds_notify_lock: bool = False
    """Whether this session holds the notify lock, so that the lock does not show
    whether another worker sleeps."""
    kept: Collection[str] = ()
    """The types whose completed jobs are kept."""
    follows: bool = False
    """Whether these jobs were replaced while they ran: what ends them writes their successors."""
    weight: int = 0
    """The bytes of the results."""

    def store(self, claimed: Claimed, result: Result) -> None:
        """Add a job that has ended."""
        match result:
            case Complete() if claimed.job.keep is None:
                self.complete.append(claimed)
            case Complete(value):  # a route has encoded it
                self.returned.append(Returned(claimed, value))
                self.weight += len(value or b"")
            case Retry(_, error, priority=priority):
                self.postpone.append(
                    Postponed(
                        claimed,
                        delay_of(result),
                        error_text(error),
                        refund=False,
                        priority=priority,
                    )
                )
            case Reschedule():
                self.postpone.append(Postponed(claimed, delay_of(result), None, refund=True))
            case MoveToDlq(error):
                self.dead_letter.append(
                    DeadLettered(
                        claimed, error_text(error) or "", fingerprint(claimed.job.type, error)
                    )
                )

    def settlements(self, queue: str) -> list[Statement[list[str]]]:
        """Return the statements; each returns the ids of those of its jobs that are still held.

        Of these, a job was replaced while it ran if and only if `follows`.
        """
        statements = []
        if self.complete:
            statements.append(complete(self.complete, self.kept, follows=self.follows))
        if self.returned:
            if self.follows:  # its result is that of its successor
                jobs = [returned.claimed for returned in self.returned]
                statements.append(complete(jobs, self.kept, follows=True))
            else:
                statements.append(keep_results(self.returned, self.kept))
        if self.postpone:
            statements.append(postpone(self.postpone, follows=self.follows))
        if self.dead_letter:
            usual = [dead for dead in self.dead_letter if dead.claimed.job.keep is None]
            others = [dead for dead in self.dead_letter if dead.claimed.job.keep is not None]
            if usual:
                statements.append(dead_letter(usual, follows=self.follows))
            if others:
                statements.append(dead_letter(others, follows=self.follows, keeps=True))
        if self.release_jobs:
            statements.append(release_jobs(queue, self.release_jobs, tell=self.holds_notify_lock))
        return statements


def delay_of(result: object) -> float:
    """Return the seconds until the job is due again; the delay of a retry is already decided."""
    match result:
        case Retry(delay) | Reschedule(delay) if delay is not None:
            return float(delay) if isinstance(delay, float | int) else delay.total_seconds()
        case _:
            return 0.0


# The rows of jobs that are held. The successor is in no index: it is read in a row that is found.
_HELD: LiteralString = """
    id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[]) and successor is null
"""
_REPLACED: LiteralString = _HELD.replace("is null", "is not null")


_WITH_VALUES: LiteralString = """
    (
        select gone.*, v.value from gone
        join unnest(%(ids)s::text[], %(values)s::bytea[]) as v (id, value) on v.id = gone.id
    ) as gone
"""


def _complete(*, follows: bool, keeps: bool, returns: bool = False) -> LiteralString:
    which: LiteralString = _REPLACED if follows else _HELD
    columns: LiteralString = "id" + (", queue, type, attempt, token" if keeps else "")
    ctes: LiteralString = ""
    if returns:
        columns = f"id, {OF_ENDED}"
        ctes += f", {ended(_WITH_VALUES, value='value')}"
    if follows:
        columns += f", {SUCCESSOR}"
        ctes += f", {followed('gone')}"
    if keeps:
        ctes += f"""
            , kept as (
                insert into bgjob_history (day, job_id, queue, type, attempt, token)
                select {TODAY}, id, queue, type, attempt, token
                from gone where type = any (%(kept)s::text[])
            )
        """
    return f"""
        with gone as (
            delete from bgjob_job where {which} returning {columns}
        ){ctes}
        -- Usually all were deleted, and need not be listed.
        select case when (select count(*) from gone) < %(count)s then array(select id from gone) end
    """


_COMPLETES: Mapping[tuple[bool, bool], LiteralString] = {
    (follows, keeps): _complete(follows=follows, keeps=keeps)
    for follows in (False, True)
    for keeps in (False, True)
}


def complete(
    claimed: Sequence[Claimed], kept: Collection[str] = (), *, follows: bool = False
) -> Statement[list[str]]:
    """Delete completed jobs, and keep those of some types; return the ids of those still held.

    By the rows' positions, returned by the claim, the server's time for a job is a fifth less up
    to PostgreSQL 16 and 4 % less from 17 on, which looks up many ids faster
    (benchmarks/costs.py). But a worker has to forget the positions whenever a row may have moved.
    """
    ids = [c.job.id for c in claimed]
    params = {**held(claimed, ids), "count": len(ids)}
    types = {c.job.type for c in claimed}.intersection(kept) if kept else ()
    if types:
        params["kept"] = text_array(sorted(types))
    text = _COMPLETES[follows, bool(types)]
    return Statement(text, params, partial(_all_or_some, ids))


_KEEP_RESULTS: Mapping[bool, LiteralString] = {
    keeps: _complete(follows=False, keeps=keeps, returns=True) for keeps in (False, True)
}


def keep_results(returned: Sequence[Returned], kept: Collection[str] = ()) -> Statement[list[str]]:
    """Delete completed jobs and keep their results, as `complete`; notify who waits for them."""
    ids = [r.claimed.job.id for r in returned]
    params = {**held([r.claimed for r in returned], ids), "count": len(ids)}
    params["values"] = Payloads(r.value for r in returned)
    types = {r.claimed.job.type for r in returned}.intersection(kept) if kept else ()
    if types:
        params["kept"] = text_array(sorted(types))
    return Statement(_KEEP_RESULTS[bool(types)], params, partial(_all_or_some, ids))


def _all_or_some(ids: list[str], rows: Sequence[Row]) -> list[str]:
    [[some]] = rows
    return ids if some is None else some


_POSTPONE: LiteralString = """
    update bgjob_job j
    set token = null,
        lease_until = null,
        next_run_at = clock_timestamp() + p.delay * interval '1 second',
        attempt = greatest(j.attempt, p.refund) - p.refund,
        deaths = 0,
        last_error = coalesce(p.error, j.last_error),
        priority = coalesce(p.priority, j.priority),
        updated_at = clock_timestamp()
    from unnest(
        %(ids)s::text[], %(tokens)s::bigint[], %(delays)s::float8[],
        %(errors)s::text[], %(refunds)s::int[], %(priorities)s::smallint[]
    ) as p (id, token, delay, error, refund, priority)
    where j.id = any (%(ids)s::text[]) and j.id = p.id and j.token = p.token
        and j.successor is null
    returning j.id
"""

# A replaced job does not run again: its successor does.
_FOLLOW: LiteralString = f"""
    with gone as (
        delete from bgjob_job where {_REPLACED}
        returning id, {SUCCESSOR}
    ), {followed("gone")}
    select id from gone
"""


def postpone(postponed: Sequence[Postponed], *, follows: bool = False) -> Statement[list[str]]:
    """Release jobs to run again later; return the ids of those still held."""
    if follows:
        return Statement(_FOLLOW, held([p.claimed for p in postponed]), column)
    return Statement(
        _POSTPONE,
        {
            "ids": [p.claimed.job.id for p in postponed],
            "tokens": [p.claimed.token for p in postponed],
            "delays": Floats(p.delay for p in postponed),
            "errors": ErrorTexts(p.error for p in postponed),
            "refunds": [int(p.refund) for p in postponed],
            "priorities": Smallints(p.priority for p in postponed),
        },
        column,
    )


_NOTIFY_OF_GIVEN = NOTIFY.format(
    channel="%(channel)s",
    payload="concat_ws(' ', extract(epoch from since), priority, %(queue)s::text)",
)


def release_jobs(queue: str, claimed: Sequence[Claimed], *, tell: bool) -> Statement[list[str]]:
    """Release jobs that did not start, unchanged; return the ids of those still held.

    They keep their due times, so that they run before jobs that are due later. Sleeping
    workers are notified where to start, as by an enqueue.

    Args:
        queue: the queue of the jobs.
        claimed: the jobs.
        tell: notify without testing the notify lock, because this session holds it.

    """
    return Statement(
        f"""
        with given as (
            update bgjob_job j
            set token = null,
                lease_until = null,
                attempt = greatest(j.attempt, g.charged) - g.charged,
                updated_at = clock_timestamp()
            from unnest(
                %(ids)s::text[], %(tokens)s::bigint[], %(charged)s::int[]
            ) as g (id, token, charged)
            where j.id = any (%(ids)s::text[]) and j.id = g.id and j.token = g.token
            returning j.id, j.priority, {in_range("j.next_run_at")} as since
        ), told as materialized (
            select priority, min(since) as since from given group by priority
        )
        select array(select id from given), (
            select count({_NOTIFY_OF_GIVEN})
            from told where %(tell)s or not pg_try_advisory_xact_lock_shared(%(class)s, %(bucket)s)
        )
        """,
        {
            "ids": [c.job.id for c in claimed],
            "tokens": [c.token for c in claimed],
            "charged": [int(c.is_charged) for c in claimed],
            "queue": queue,
            "tell": tell,
            "class": LOCK_CLASS,
            "bucket": bucket(queue),
            "channel": channel(queue),
        },
        scalar,
    )


_WITH_ERRORS: LiteralString = """
    (
        select gone.*, b.error from gone
        join unnest(%(ids)s::text[], %(errors)s::text[]) as b (id, error) on b.id = gone.id
    ) as gone
"""


def _dead_letter(*, follows: bool, keeps: bool) -> LiteralString:
    gone = f"delete from bgjob_job where {_REPLACED if follows else _HELD} returning *"
    ctes: LiteralString = ""
    if follows:
        ctes = f", {followed('gone')}"
    elif keeps:
        ctes = f", {ended(_WITH_ERRORS, error='error')}"
    keep: LiteralString = ", keep" if keeps else ""
    return f"""
        with gone as ({gone}){ctes}
        insert into bgjob_dead_job (
            job_id, queue, type, arg, attempt, last_error, fingerprint, worker, priority, exclusive,
            next_run_at, job_created_at, job_updated_at, checkpoint, headers, expires,
            group_id, group_dead, slots{keep}
        )
        select gone.id, queue, type, arg, attempt, b.error, b.fingerprint, {NUMBER.format("token")},
            priority, exclusive, next_run_at, created_at, updated_at, checkpoint, headers, expires,
            group_id, group_dead, slots{keep}
        from gone
        join unnest(
            %(ids)s::text[], %(errors)s::text[], %(fingerprints)s::bigint[]
        ) as b (id, error, fingerprint) on b.id = gone.id
        returning job_id
    """


_DEAD_LETTERS: Mapping[tuple[bool, bool], LiteralString] = {
    (follows, keeps): _dead_letter(follows=follows, keeps=keeps)
    for follows in (False, True)
    for keeps in (False, True)
}


def dead_letter(
    dead_lettered: Sequence[DeadLettered], *, follows: bool = False, keeps: bool = False
) -> Statement[list[str]]:
    """Move jobs to the dead-letter table; return the ids of those still held.

    `keeps` says that they have results, which are kept.
    """
    return Statement(
        _DEAD_LETTERS[follows, keeps],
        {
            **held([b.claimed for b in dead_lettered]),
            "errors": ErrorTexts(b.error for b in dead_lettered),
            "fingerprints": number_array([b.fingerprint for b in dead_lettered]),
        },
        column,
    )


def held(claimed: Sequence[Claimed], ids: Sequence[str] | None = None) -> dict[str, object]:
    """Return the parameters that find claimed jobs."""
    return {
        "ids": text_array(ids or [c.job.id for c in claimed]),
        # Ids and tokens identify the pairs, because a worker never holds one id twice.
        "tokens": number_array(list({c.token for c in claimed})),
    }
