"""Results: what became of jobs with `keep`, and the ids that they take until then.

The row of such a job is written together with it, so that the id is taken from then on, whether
the job waits, runs or has ended. An enqueue that looked only for a row of an ended job could miss
one: its snapshot may be of a moment in which the job was live, and its insert of a moment in which
the job is gone.

The statement that deletes the job, for any reason, also writes the outcome: both happen, or
neither. From then on the row stays for `keep` seconds. A later enqueue with `keep` takes
the row over once they have passed, also where no worker has deleted it. A row without an outcome
and without a live job is free too: somebody has deleted the job by hand.

    row                           live job   state
    ---------------------------   --------   ------------------------------------
    no outcome (until is null)    yes        pending
    no outcome                    no         free
    outcome, until is to come     any        completed; failed, if it has an error
    outcome, until has passed     any        free
"""

from collections.abc import Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._sql.history import Kept
from bgjob._sql.notices import NOTIFY
from bgjob._sql.statement import Row, Statement, in_range_or_null, scalar, text_array

ENDED_CHANNEL: LiteralString = "bgjob_ended"
"""Where each end of such a job is notified, with its id."""

_OUTCOME: tuple[LiteralString, ...] = (
    "until",
    "value",
    "error",
    "queue",
    "type",
    "arg",
    "attempt",
    "token",
    "created_at",
    "ended_at",
)
_NEW: LiteralString = ", ".join(f"{name} = excluded.{name}" for name in _OUTCOME)
_NONE: LiteralString = ", ".join(f"{name} = null" for name in _OUTCOME)

_TELL: LiteralString = NOTIFY.format(channel=f"'{ENDED_CHANNEL}'", payload="r.id")

OF_ENDED: LiteralString = "queue, type, arg, attempt, token, created_at, keep"
"""The columns, beside the id, that a statement returns of the rows that it deletes."""


def ended(
    gone: LiteralString, *, value: LiteralString = "null::bytea", error: LiteralString = "null"
) -> LiteralString:
    """Return a CTE that writes the outcome of deleted jobs, as far as they have `keep`.

    Args:
        gone: where these jobs are, with the columns `id` and OF_ENDED.
        value: SQL of what the handler gave.
        error: SQL of why they failed.

    """
    return f"""
        ended as (
            insert into bgjob_result as r (id, {", ".join(_OUTCOME)})
            select id, clock_timestamp() + least(keep, 3155760000) * interval '1 second',
                {value}, {error}, queue, type, arg, attempt, token, created_at, clock_timestamp()
            from {gone} where keep is not null
            order by id
            on conflict (id) do update set {_NEW}
            returning {_TELL}
        )
    """


def reserved(wanted: LiteralString) -> LiteralString:
    """Return CTEs that take the ids of jobs with `keep`; `reserved` has those that were free.

    Ids that are taken are found before any row is locked: an enqueue within a long transaction
    must not hold up the end of the job whose id it asks for.

    Args:
        wanted: SQL of the ids, as an array.

    """
    return f"""
        taken as materialized (
            select id from bgjob_job where id = any ({wanted})
            union all
            select id from bgjob_result where id = any ({wanted}) and until > clock_timestamp()
        ), reserved as (
            insert into bgjob_result as r (id)
            select distinct w.id collate "C" from unnest({wanted}) as w (id)
            where w.id not in (select id from taken)
            order by 1
            on conflict (id) do update set {_NONE}
                where (r.until > clock_timestamp()) is not true
            returning id
        )
    """


def pending_again(back: LiteralString) -> LiteralString:
    """Return a CTE that makes the results of jobs pending which are live again.

    Args:
        back: the CTE that returns their columns `id` and `keep`.

    """
    return f"""
        pending as (
            insert into bgjob_result (id)
            select id from {back} where keep is not null order by id
            on conflict (id) do update set {_NONE}
        )
    """


class Outcome(NamedTuple):
    """A row of the table, if it is not free."""

    id: str
    until: datetime | None
    """None: the job is live."""
    value: bytes | None
    error: str | None
    queue: str | None
    type: str | None
    arg: bytes | None
    attempt: int | None
    token: int | None
    created_at: datetime | None
    ended_at: datetime | None

    @property
    def completed(self) -> list[Kept]:
        """The completed job, if it is one; one that was written by hand may lack what that has."""
        values = (self.queue, self.type, self.attempt, self.token, self.ended_at)
        if self.until is None or self.error is not None or None in values:
            return []
        return [Kept._make((self.id, *values))]


_READ: LiteralString = f"""
    r.id, {in_range_or_null("r.until")}, r.value, r.error, r.queue, r.type, r.arg, r.attempt,
    r.token, {in_range_or_null("r.created_at")}, {in_range_or_null("r.ended_at")}
"""


def outcomes(ids: Sequence[str]) -> Statement[dict[str, Outcome]]:
    """Return what is known of these ids, those that are free left out."""
    return Statement(
        f"""
        select {_READ} from bgjob_result r
        where r.id = any (%(ids)s::text[]) and case when r.until is null
            then exists (select from bgjob_job j where j.id = r.id)
            else r.until > clock_timestamp() end
        """,
        {"ids": text_array(ids)},
        _outcomes,
    )


def _outcomes(rows: Sequence[Row]) -> dict[str, Outcome]:
    return {row[0]: Outcome(*row) for row in rows}


class Task(NamedTuple):
    """A job with `keep`, live or ended, with its request."""

    outcome: Outcome
    queue: str
    type: str
    arg: bytes | None
    attempt: int
    token: int | None
    """The last claim; None while a live job waits."""
    created_at: datetime | None
    last_error: str | None
    """Why its last attempt failed, while it is live."""


def task(id_: str) -> Statement[Task | None]:
    """Return what is known of a job with `keep`."""
    return Statement(
        f"""
        select {_READ}, coalesce(r.queue, j.queue), coalesce(r.type, j.type),
            case when r.until is null then j.arg else r.arg end,
            coalesce(r.attempt, j.attempt), case when r.until is null then j.token else r.token end,
            {in_range_or_null("coalesce(r.created_at, j.created_at)")},
            case when r.until is null then j.last_error end
        from bgjob_result r left join bgjob_job j on j.id = r.id and r.until is null
        where r.id = %(id)s and case when r.until is null then j.id is not null
            else r.until > clock_timestamp() end
        """,
        {"id": id_},
        _task,
    )


def _task(rows: Sequence[Row]) -> Task | None:
    outcome = len(Outcome._fields)
    return next((Task(Outcome(*row[:outcome]), *row[outcome:]) for row in rows), None)


def expire(*, limit: int) -> Statement[int]:
    """Delete up to `limit` rows whose time has passed; return their number.

    Rows that other sessions have locked, to take them over, are skipped.
    """
    return Statement(
        """
        with gone as (
            delete from bgjob_result where id = any (array(
                select id from bgjob_result where until <= now()
                order by until limit %(limit)s
                for update skip locked
            ))
            returning 1
        )
        select count(*) from gone
        """,
        {"limit": limit},
        scalar,
    )


def listen() -> LiteralString:
    """Return the text that listens for ends."""
    return f"listen {ENDED_CHANNEL}"
