"""Steer live jobs: cancel, abandon, run now, set the priority.

Each statement acts on up to a thousand ids, and says of each what became of it. It waits for no
lock: a row that another session has locked, as a claim does that is about to commit, is told as
'locked', and the caller asks again. Rows are locked in the order of their ids, and what a job has
to be is checked again once its row is locked.

A job that is cancelled leaves its table in the same statement. So its worker, which settles by id
and token, changes nothing from that commit on: the fence is the one of every claim.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import LiteralString, NamedTuple

from bgjob._failure import fingerprint
from bgjob._postgres.cursor import ErrorTexts
from bgjob._sql.jobs import JobFilter
from bgjob._sql.notices import CANCELLED, NOTIFY, cancel_channel
from bgjob._sql.results import ended
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Row, Statement, nothing, text_array

MOST = 1000
"""The most ids in a statement: no other session waits long for one of them."""


class Steered(NamedTuple):
    """What became of one job."""

    id: str
    answer: str
    """'waiting' or 'running': it was changed, and was that before. Otherwise why it was not."""
    is_changed: bool
    queue: str | None
    token: int | None
    """The claim that a cancel has ended."""
    key: str | None
    """Its exclusive key, if the next job of that key may have to be woken."""


_IS_RUNNING: LiteralString = "j.token is not null"

# Why a job that matches the filter is not changed, and is not locked by another session either.
_WHY_NOT: dict[str, LiteralString] = {
    "cancel": "'locked'",
    "abandon": f"case when not {_IS_RUNNING} then 'waiting' else 'locked' end",
    "run_now": f"""
        case when {_IS_RUNNING} then 'running'
            when j.next_run_at <= clock_timestamp() then 'due' else 'locked' end
    """,
    "set_priority": f"""
        case when {_IS_RUNNING} then 'running'
            when j.priority = %(priority)s then 'same' else 'locked' end
    """,
}


def _steer(changed: LiteralString, why_not: LiteralString, where: JobFilter) -> LiteralString:
    """Return the statement; `changed` follows `locked`, and is the CTE of the changed rows.

    The filter is within a case, so that no index but that of the ids is used: with the one of a
    queue's due jobs a plan walked over all of them. Each job that was not changed is looked up by
    itself, so that no plan joins whole tables.
    """
    return f"""
        with locked as materialized (
            select j.id from bgjob_job j
            where j.id = any (%(ids)s::text[])
                and case when {where.condition} then {why_not} end = 'locked'
            order by j.id
            for update skip locked
        ), {changed}
        select id, case when token is null then 'waiting' else 'running' end, true, queue, token,
            key
        from changed
        union all
        select asked.id, coalesce(
            (
                select case when {where.condition} then {why_not} else 'unmatched' end
                from bgjob_job j where j.id = asked.id limit 1
            ),
            case when (
                select true from bgjob_dead_job d where d.job_id = asked.id limit 1
            ) then 'dead' else 'absent' end
        ), false, null, null, null
        from unnest(%(ids)s::text[]) as asked (id)
        where asked.id not in (select id from changed)
    """


# The successor of a running job goes with it: who cancels an id does not expect it to run again. It
# comes later in the table, so that a requeue takes that one.
#
# Of a key that other jobs wait for, a job that does not wait is the holder, or is next.
_DEAD_LETTERED: LiteralString = """
    gone as (
        delete from bgjob_job
        where id = any (array(select id from locked))
        returning id, queue, type, arg, attempt, priority, exclusive, next_run_at,
            created_at, updated_at, token, waits, checkpoint, headers, expires, group_id,
            group_dead, successor, successor_arg, keep, slots
    ), {ended}, dead as (
        insert into bgjob_dead_job (
            job_id, queue, type, arg, attempt, last_error, fingerprint, priority, exclusive,
            next_run_at, job_created_at, job_updated_at, token, checkpoint, headers, expires,
            group_id, group_dead, keep, slots
        )
        select id, queue, type, arg, attempt, {error}, %(fingerprint)s, priority, exclusive,
            next_run_at, created_at, updated_at, {claim}, checkpoint, headers, expires, group_id,
            group_dead, keep, slots
        from gone
        union all
        select id, successor ->> 'queue', successor ->> 'type', successor_arg, 0, {error},
            %(fingerprint)s, (successor ->> 'priority')::smallint, successor ->> 'exclusive',
            (successor ->> 'next_run_at')::timestamptz,
            (successor ->> 'created_at')::timestamptz, (successor ->> 'created_at')::timestamptz,
            null, null, (successor ->> 'headers')::json,
            (successor ->> 'expires')::timestamptz, nullif(group_id, id), null, keep,
            (successor ->> 'slots')::smallint
        from gone where successor is not null
        order by 1, 5 desc
    ), changed as (
        select id, queue, token, case when not waits then exclusive end as key from gone
    )
"""

# The name is that of the role, unless the caller passes one.
_ERROR: LiteralString = """
    concat('{done} by ', coalesce((%(texts)s::text[])[1], session_user), (%(texts)s::text[])[2])
"""


def _dead_lettered(error: LiteralString, *, claim: LiteralString) -> LiteralString:
    return _DEAD_LETTERED.format(error=error, claim=claim, ended=ended("gone", error=error))


def cancel(
    ids: Sequence[str], where: JobFilter, *, by: str | None, reason: str
) -> Statement[list[Steered]]:
    """Move jobs to the dead-letter table, whether they wait or run.

    A running one takes the token of its claim with it, so that its worker can ask why it has
    lost the job.
    """
    changed = _dead_lettered(_ERROR.format(done="cancelled"), claim="token")
    why = _Why("cancelled", by, reason)
    return _dead_lettering(changed, _WHY_NOT["cancel"], ids, where, why)


def abandon(
    ids: Sequence[str], where: JobFilter, *, by: str | None, reason: str
) -> Statement[list[Steered]]:
    """Move running jobs to the dead-letter table; their workers find their leases lost."""
    changed = _dead_lettered(_ERROR.format(done="abandoned"), claim="null::bigint")
    why = _Why("abandoned", by, reason)
    return _dead_lettering(changed, _WHY_NOT["abandon"], ids, where, why)


class _Why(NamedTuple):
    done: str
    by: str | None
    reason: str


def _dead_lettering(
    changed: LiteralString,
    why_not: LiteralString,
    ids: Sequence[str],
    where: JobFilter,
    why: _Why,
) -> Statement[list[Steered]]:
    return Statement(
        _steer(changed, why_not, where),
        {
            **where.params,
            "ids": text_array(ids),
            "texts": ErrorTexts([why.by, f": {why.reason}" if why.reason else None]),
            # The same for all types.
            "fingerprint": fingerprint("", f"{why.done}: {why.reason}"),
        },
        _read,
    )


def run_now(ids: Sequence[str], where: JobFilter) -> Statement[list[Steered]]:
    """Make delayed jobs due; never into the past, where no claim would look for them."""
    changed: LiteralString = """
        changed as (
            update bgjob_job
            set next_run_at = clock_timestamp(), updated_at = clock_timestamp()
            where id = any (array(select id from locked))
            returning id, queue, token, null::text as key
        )
    """
    return Statement(
        _steer(changed, _WHY_NOT["run_now"], where),
        {**where.params, "ids": text_array(ids)},
        _read,
    )


def set_priority(ids: Sequence[str], where: JobFilter, priority: int) -> Statement[list[Steered]]:
    """Change the priority of jobs that wait; each goes behind the due ones of its new priority.

    A job that waits for its key keeps its place among the jobs of the key, which have no order
    by priority.
    """
    changed: LiteralString = """
        changed as (
            update bgjob_job
            set priority = %(priority)s,
                next_run_at = case when waits then next_run_at
                    else greatest(next_run_at, clock_timestamp()) end,
                updated_at = clock_timestamp()
            where id = any (array(select id from locked))
            returning id, queue, token, null::text as key
        )
    """
    return Statement(
        _steer(changed, _WHY_NOT["set_priority"], where),
        {**where.params, "ids": text_array(ids), "priority": priority},
        _read,
    )


def _read(rows: Sequence[Row]) -> list[Steered]:
    return [Steered(*row) for row in rows]


def tell_cancelled(cancelled: Iterable[Steered]) -> Statement[None]:
    """Notify the workers that hold these jobs, when the transaction commits."""
    told = [(job.queue, job.token, job.id) for job in cancelled if job.queue is not None]
    notify = NOTIFY.format(
        channel="c.channel", payload=f"concat_ws(' ', '{CANCELLED}', c.token, c.id)"
    )
    return Statement(
        f"""
        select {notify} from unnest(
            %(channels)s::text[], %(tokens)s::bigint[], %(ids)s::text[]
        ) as c (channel, token, id)
        """,
        {
            "channels": [cancel_channel(queue) for queue, _, _ in told],
            "tokens": [token for _, token, _ in told],
            "ids": text_array([id_ for _, _, id_ in told]),
        },
        nothing,
    )


def brief_waits() -> Statement[None]:
    """Wait at most a second for locks in this transaction."""
    return Statement("select set_config('lock_timeout', '1s', true)", None, nothing)


def were_cancelled(claimed: Collection[Claimed]) -> Statement[set[tuple[str, int]]]:
    """Return the ids and tokens of those claims that a cancel has ended."""
    return Statement(
        """
        select job_id, token from bgjob_dead_job
        where job_id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
        """,
        {
            "ids": text_array([c.job.id for c in claimed]),
            "tokens": [c.token for c in claimed],
        },
        lambda rows: {(id_, token) for id_, token in rows},
        prepare=False,
    )
