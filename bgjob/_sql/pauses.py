"""Pause and resume queues."""

from datetime import datetime

from bgjob._sql.notices import NOTIFY, channel
from bgjob._sql.statement import Statement, in_range, nothing, scalar


def pause(queue: str, until: datetime | None) -> Statement[None]:
    """Pause a queue until this time, or until it is resumed."""
    return Statement(
        """
        insert into bgjob_pause (queue, until)
        values (%(queue)s, coalesce(%(until)s, timestamptz 'infinity'))
        on conflict (queue) do update set until = excluded.until
        returning true
        """,
        {"queue": queue, "until": until},
        nothing,
    )


def claiming_transactions() -> Statement[set[str]]:
    """List the transactions that may have read the pauses earlier, and may still claim.

    A claim locks both tables in these modes before it reads them and until its transaction
    ends, so a claim that read before a pause was committed is among them.
    """
    return Statement(
        """
        select virtualtransaction from pg_locks
        where locktype = 'relation' and granted
            and database = (select oid from pg_database where datname = current_database())
            and (
                relation = 'bgjob_job'::regclass and mode = 'RowExclusiveLock'
                or relation = 'bgjob_pause'::regclass and mode = 'AccessShareLock'
            )
        group by virtualtransaction
        having count(distinct relation) = 2
        """,
        None,
        lambda rows: {row[0] for row in rows},
    )


_NOTIFY_OF_RESUMED = NOTIFY.format(
    channel="%(channel)s",
    payload="concat_ws(' ', extract(epoch from now()), '-', %(queue)s::text)",
)


def resume(queue: str, *, notify: bool = True) -> Statement[bool]:
    """End the pause of a queue and notify its workers; True if it was paused."""
    return Statement(
        f"""
        with gone as (
            delete from bgjob_pause where queue = %(queue)s returning until > now() as was_paused
        )
        select exists (select from gone where was_paused),
            {_NOTIFY_OF_RESUMED if notify else "null"}
        """,
        {"queue": queue, "channel": channel(queue)},
        scalar,
    )


def paused() -> Statement[dict[str, datetime | None]]:
    """List the paused queues, each with the end of its pause; None until it is resumed."""
    return Statement(
        f"""
        select queue, case when until < 'infinity' then {in_range("until")} end
        from bgjob_pause where until > clock_timestamp() order by queue
        """,
        None,
        lambda rows: {queue: until for queue, until in rows},  # noqa: C416 (typed)
    )
