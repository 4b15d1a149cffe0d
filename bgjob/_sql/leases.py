"""Extend the leases of running jobs, look which rows are locked, and leave jobs to their leases."""

from collections.abc import Sequence

from bgjob._sql.settlements import Claimed, held
from bgjob._sql.statement import Statement, column


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
        {**held(claimed), "lease": lease},
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
        held(claimed),
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
        held(claimed),
        column,
        prepare=False,
    )
