"""Settle claimed jobs, and extend their leases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import LiteralString, NamedTuple

from bgjob._postgres.connection import ErrorTexts, Floats, Smallints
from bgjob._sql.notices import LOCK_CLASS, NOTIFY, bucket, channel
from bgjob._sql.session import IS_OURS
from bgjob._sql.statement import (
    Row,
    Statement,
    column,
    in_range,
    nothing,
    number_array,
    scalar,
    text_array,
)
from bgjob.job import Job
from bgjob.result import Complete, MoveToDlq, Reschedule, Result, Retry, error_text


class Claimed(NamedTuple):
    """A job and the token of the claim that holds it."""

    job: Job
    token: int
    is_charged: bool = True
    """Whether the claim charged an attempt; only a claim of several suspects does not."""


@dataclass(slots=True)
class Settlements:
    """Jobs to settle, by what happens to their rows; only `store` says what a result does."""

    complete: list[Claimed] = field(default_factory=list)
    places: dict[int, Sequence[str]] = field(default_factory=dict)
    """By token, the positions of the rows of claims that `complete` has as a whole."""
    postpone: "list[Postponed]" = field(default_factory=list)
    dead_letter: "list[DeadLettered]" = field(default_factory=list)
    give_back: list[Claimed] = field(default_factory=list)
    """Jobs that did not start."""
    holds_notify_lock: bool = False
    """Whether this session holds the notify lock, so that the lock does not show
    whether another worker sleeps."""

    def store(self, claimed: Claimed, result: Result) -> None:
        """Add a job that has ended."""
        match result:
            case Complete():
                self.complete.append(claimed)
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
                self.dead_letter.append(DeadLettered(claimed, error_text(error) or ""))

    def settlements(self, queue: str) -> list[Statement[list[str]]]:
        """Return the statements; each returns the ids of those of its jobs that are still held."""
        statements = []
        others = self.complete
        if self.places:
            ids = [c.job.id for c in others if c.token in self.places]
            statements.append(complete_at(self.places, ids))
            others = [c for c in others if c.token not in self.places]
        if others:
            statements.append(complete(others))
        if self.postpone:
            statements.append(postpone(self.postpone))
        if self.dead_letter:
            statements.append(dead_letter(self.dead_letter))
        if self.give_back:
            statements.append(give_back(queue, self.give_back, tell=self.holds_notify_lock))
        return statements


def delay_of(result: object) -> float:
    """Return the seconds until the job is due again; the delay of a retry is already decided."""
    match result:
        case Retry(delay) | Reschedule(delay) if delay is not None:
            return float(delay) if isinstance(delay, float | int) else delay.total_seconds()
        case _:
            return 0.0


_COMPLETE: LiteralString = """
    with gone as (
        delete from bgjob_job
        where {found} and token = any (%(tokens)s::bigint[])
        returning id
    )
    -- Usually all were deleted, and need not be listed.
    select case when (select count(*) from gone) < %(count)s then array(select id from gone) end
"""
_COMPLETE_BY_ID = _COMPLETE.format(found="id = any (%(ids)s::text[])")
_COMPLETE_AT = _COMPLETE.format(found="ctid = any (%(places)s::tid[])")


def complete(claimed: Sequence[Claimed]) -> Statement[list[str]]:
    """Delete completed jobs; return the ids of those still held."""
    ids = [c.job.id for c in claimed]
    return Statement(
        _COMPLETE_BY_ID,
        {**_held(claimed, ids), "count": len(ids)},
        partial(_all_or_some, ids),
    )


def complete_at(places: Mapping[int, Sequence[str]], ids: list[str]) -> Statement[list[str]]:
    """Delete all jobs of completed claims by the positions of their rows; return the found ids.

    Unlike `complete` it descends no index for each row. A row that was written since has moved,
    and stays. Every job with the token of such a claim is completed, whatever its position.

    Args:
        places: the rows' positions by token.
        ids: the ids of all these jobs.

    """
    return Statement(
        _COMPLETE_AT,
        {
            "places": text_array([*chain.from_iterable(places.values())]),
            "tokens": number_array([*places]),
            "count": len(ids),
        },
        partial(_all_or_some, ids),
    )


def _all_or_some(ids: list[str], rows: Sequence[Row]) -> list[str]:
    [[some]] = rows
    return ids if some is None else some


def payload(claimed: Claimed) -> Statement[list[bytes | None]]:
    """Return the payload of a job in a list, which is empty if the job is no longer held."""
    return Statement(
        "select arg from bgjob_job where id = %(id)s and token = %(token)s",
        {"id": claimed.job.id, "token": claimed.token},
        column,
    )


def session_name(claimed: Claimed, codec: str = "utf-8") -> str:
    """Return the name of a transactional handler's session while it holds this claim.

    It is unique over all workers and schemas, because tokens are random. It is ASCII, as
    `application_name` has to be. SQL computes it as SESSION_NAME.

    Args:
        claimed: the claim.
        codec: Python's name of the server's encoding. Both digest the stored bytes, because
            the server may store ids that it cannot convert.

    """
    stored = claimed.job.id.encode(codec, "backslashreplace")
    return f"bgjob {claimed.token:d} {sha256(stored).hexdigest()[:16]}"


SESSION_NAME: LiteralString = """
    format(
        'bgjob %%s %%s', {0},
        left(encode(sha256(convert_to({1}, getdatabaseencoding())), 'hex'), 16)
    )
"""
"""The name of the session that holds the claim of a token (0) and an id (1); see `session_name`."""

# An unused connection whose other end has vanished would keep its locks for two hours.
_KEEPALIVE = (
    "; set local tcp_keepalives_idle = 30; set local tcp_keepalives_interval = 10; "
    "set local tcp_keepalives_count = 3"
)


# This limit ends an active transaction as well; since version 17.
_NO_LIMIT = "; set local transaction_timeout = 0"
_LIMITED_SINCE = 17_00_00


def begin(claimed: Claimed, *, over_tcp: bool, server_version: int, codec: str = "utf-8") -> bytes:
    """Open a handler's transaction, and mark it with its claim.

    One mark (bgjob.claim) lasts until the transaction ends. The other (bgjob.committed) is
    undone by a rollback and survives a commit. The lease limits how long the handler may take
    and be idle: the worker that frees the claim ends the session, which it knows by its name.
    Read committed, whatever the default is, because an extension of the lease must not make
    the settlement fail.
    """
    return (
        "begin isolation level read committed; "
        f"set local bgjob.claim = '{claimed.token:d}'; "
        f"set bgjob.committed = '{claimed.token:d}'; "
        f"set local application_name = '{session_name(claimed, codec)}'; "
        f"set local idle_in_transaction_session_timeout = 0{_KEEPALIVE if over_tcp else ''}"
        f"{_NO_LIMIT if server_version >= _LIMITED_SINCE else ''}"
    ).encode()


_IDLE: LiteralString = "10000"
"""Milliseconds that a transaction whose handler has ended may wait for its worker."""


def claim_of_transaction() -> Statement[str | None]:
    """Return the token of the claim that this transaction was opened for.

    The next statement locks the job's row, which a sweep then skips: a worker that is stopped
    now must not keep the transaction open.
    """
    return Statement(
        "select current_setting('bgjob.claim', true), "
        f"set_config('idle_in_transaction_session_timeout', '{_IDLE}', true)",
        None,
        scalar,
        prepare=None,
    )


def end_sessions(claims: Sequence[Claimed]) -> Statement[None]:
    """End the sessions of handlers whose claims were freed or given up, with their locks.

    Sessions of other roles are left alone.
    """
    return Statement(
        f"""
        select pg_terminate_backend(a.pid) from pg_stat_activity a
        where {IS_OURS} and a.application_name = any (array(
            select {SESSION_NAME.format("c.token", "c.id")}
            from unnest(%(ids)s::text[], %(tokens)s::bigint[]) as c (id, token)
        ))
        """,
        {
            "ids": text_array([claimed.job.id for claimed in claims]),
            "tokens": number_array([claimed.token for claimed in claims]),
        },
        nothing,
        prepare=False,
    )


COMMIT = (
    b"commit; close all; set session authorization default; reset all; unlisten *; "
    b"select pg_advisory_unlock_all(); discard temp; discard sequences"
)
"""Commits, and resets the session that the handler used: everything that `discard all` resets,
except for prepared statements."""

DEALLOCATE = b"; deallocate all"
"""Drops the prepared statements too, after COMMIT."""

ROLLBACK = b"rollback; select current_setting('bgjob.committed', true)"
"""Rolls back; the second result is the token of a claim whose transaction had committed."""


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


def postpone(postponed: Sequence[Postponed]) -> Statement[list[str]]:
    """Release jobs to run again later; return the ids of those still held."""
    return Statement(
        """
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
        returning j.id
        """,
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


def give_back(queue: str, claimed: Sequence[Claimed], *, tell: bool) -> Statement[list[str]]:
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


class DeadLettered(NamedTuple):
    """A job to move to the dead-letter table."""

    claimed: Claimed
    error: str


def dead_letter(dead_lettered: Sequence[DeadLettered]) -> Statement[list[str]]:
    """Move jobs to the dead-letter table; return the ids of those still held."""
    return Statement(
        """
        with gone as (
            delete from bgjob_job
            where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
            returning id, queue, type, arg, attempt, priority, exclusive, next_run_at,
                created_at, updated_at
        )
        insert into bgjob_dead_job (
            job_id, queue, type, arg, attempt, last_error, priority, exclusive, next_run_at,
            job_created_at, job_updated_at
        )
        select gone.id, queue, type, arg, attempt, b.error, priority, exclusive, next_run_at,
            created_at, updated_at
        from gone
        join unnest(%(ids)s::text[], %(errors)s::text[]) as b (id, error) on b.id = gone.id
        returning job_id
        """,
        {
            **_held([b.claimed for b in dead_lettered]),
            "errors": ErrorTexts(b.error for b in dead_lettered),
        },
        column,
    )


# As bytes, non-ASCII ones in octal: text that no session can read must not prevent the
# dead-letter table from being listed.
def _bytes_of(column: LiteralString) -> LiteralString:
    return f"encode(convert_to({column}, getdatabaseencoding()), 'escape')"


_DEAD_LETTER_UNREAD = f"""
    with gone as (
        delete from bgjob_job
        where ctid = any (%(places)s::tid[]) and token = any (%(tokens)s::bigint[])
        returning *
    )
    insert into bgjob_dead_job (
        job_id, queue, type, arg, attempt, last_error, priority, exclusive, next_run_at,
        job_created_at, job_updated_at
    )
    select {_bytes_of("id")}, {_bytes_of("queue")}, {_bytes_of("type")}, arg, attempt,
        %(error)s, priority, {_bytes_of("exclusive")}, next_run_at, created_at, updated_at
    from gone
    returning true
"""


def dead_letter_unread(places: Sequence[str], tokens: Sequence[int], error: str) -> Statement[None]:
    """Move claimed jobs that cannot be read to the dead-letter table, by their positions."""
    params = {"places": text_array(places), "tokens": number_array(tokens), "error": error}
    return Statement(_DEAD_LETTER_UNREAD, params, nothing)


def catch_up(queue: str, *, limit: int) -> Statement[int]:
    """Restore the delays of jobs that were written before the server's clock was set back.

    Their rows say that they were written in the future. This restores jobs that were due when
    they were written, and jobs that were attempted and run again after a delay. A time that an
    enqueue named stays: it may be a calendar time. Returns how many jobs, at most `limit`.
    """
    return Statement(
        """
        with moved as (
            update bgjob_job
            set next_run_at = now() + greatest(next_run_at - updated_at, interval '0'),
                updated_at = now()
            where ctid = any (array(
                select j.ctid from bgjob_job j
                where j.queue = %(queue)s and j.next_run_at > now()
                    and j.next_run_at < 'infinity' and j.lease_until is null
                    and j.updated_at > now() + interval '30 s' and (
                        j.next_run_at <= j.updated_at
                        or j.attempt > 0
                        or j.updated_at > j.created_at + interval '10 ms'
                    )
                limit %(limit)s
                for update skip locked
            ))
            returning 1
        )
        select count(*) from moved
        """,
        {"queue": queue, "limit": limit},
        scalar,
    )


def dead_letter_refused(place: str, error: str) -> Statement[None]:
    """Move a job that cannot be claimed to the dead-letter table, by its position."""
    return Statement(
        """
        with gone as (
            delete from bgjob_job where ctid = %(place)s::tid returning *
        )
        insert into bgjob_dead_job (
            job_id, queue, type, arg, attempt, last_error, priority, exclusive, next_run_at,
            job_created_at, job_updated_at
        )
        select id, queue, type, arg, attempt, (%(errors)s::text[])[1], priority, exclusive,
            next_run_at, created_at, updated_at
        from gone
        """,
        {"place": place, "errors": ErrorTexts([error])},
        nothing,
        prepare=False,
    )


def extend(claimed: Sequence[Claimed], *, lease: float) -> Statement[list[str]]:
    """Extend leases to `lease` seconds from now; return the ids of the jobs still held.

    Rows that another session has locked are skipped: usually the handler's transaction settles
    the job, and the other leases must not wait for that.
    """
    return Statement(
        """
        with extended as (
            update bgjob_job
            set lease_until = clock_timestamp() + %(lease)s * interval '1 second'
            where ctid = any (array(
                select ctid from bgjob_job
                where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
                for update skip locked
            ))
        )
        select id from bgjob_job
        where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
        """,
        {**_held(claimed), "lease": lease},
        column,
    )


def barred(claimed: Sequence[Claimed]) -> Statement[list[str]]:
    """List the ids of jobs, still held, whose rows other sessions have locked.

    It does not wait. The rows that it locks are unlocked when its transaction ends.
    """
    return Statement(
        """
        with free as materialized (
            select id from bgjob_job
            where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
            for update skip locked
        )
        select id from bgjob_job
        where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
            and id not in (select id from free)
        """,
        _held(claimed),
        column,
        prepare=False,
    )


def abandon(claimed: Sequence[Claimed]) -> Statement[list[str]]:
    """Refund the attempts of jobs that run when their worker ends; return the ids of those held.

    They keep their lease, because their handlers may run until the process ends. That end is
    not a job's fault, so the deaths start at -1. The error counts how often that happened in a
    row, so that a job that never ends is found. Rows that another session has locked are
    skipped: usually the handler's transaction settles the job.
    """
    return Statement(
        """
        update bgjob_job
        set attempt = greatest(attempt, 1) - 1,
            deaths = -1,
            last_error = 'abandoned at the end of a grace period, ' || 1 + coalesce(
                substring(
                    last_error from '^abandoned at the end of a grace period, ([0-9]{1,6}) in a row'
                )::int, 0
            ) || ' in a row: it was still running; its attempt is given back',
            updated_at = clock_timestamp()
        where ctid = any (array(
            select ctid from bgjob_job
            where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
                and deaths >= 0  -- once, though it may be sent twice
            for update skip locked
        ))
        returning id
        """,
        _held(claimed),
        column,
        prepare=False,
    )


def _held(claimed: Sequence[Claimed], ids: Sequence[str] | None = None) -> dict[str, object]:
    return {
        "ids": text_array(ids or [c.job.id for c in claimed]),
        # Ids and tokens identify the pairs, because a worker never holds one id twice.
        "tokens": number_array(list({c.token for c in claimed})),
    }
