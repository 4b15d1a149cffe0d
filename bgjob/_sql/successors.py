"""The successor of a running job: the newest request that replaced it, and waits for its end.

An enqueue that replaces a job whose row is claimed cannot change what runs. It writes the new
request into two columns of that row (`replace` in `enqueues`), over an earlier one. The statement
that ends the claim, in whatever way, deletes the row and inserts the successor under the same id
as a fresh job. Both happen in one statement, whose delete waits for a replacement that is about to
commit and returns the newest columns, so nothing comes between and no value is lost. A
replacement that comes later finds no row, or that of the successor.

Where a claim is undone without having run (a release, a key that another job has) the successor
stays in the row and waits further.
"""

from typing import LiteralString

from bgjob._sql.notices import BY_HAND, NOTIFY

SUCCESSOR: LiteralString = "successor, successor_arg"
"""The columns that a statement returns of the rows that it deletes."""

_TELL: LiteralString = NOTIFY.format(channel=f"'{BY_HAND}'", payload="queue")

_COLUMNS: LiteralString = (
    "id, queue, type, arg, priority, exclusive, next_run_at, created_at, headers, expires"
)


def followed(gone: LiteralString) -> LiteralString:
    """Return the CTEs that write the successors of deleted rows as fresh jobs.

    One of them, `tally`, has the number of the deleted rows (`all`).

    Args:
        gone: the CTE that returns the columns `id` and SUCCESSOR of these rows.

    """
    # Usually there is none. Counting them takes less than passing all rows to the insert.
    return f"""
        tally as materialized (
            select count(*) as all, count(successor) as followed from {gone}
        ), followed as (
            insert into bgjob_job ({_COLUMNS})
            select id, successor ->> 'queue', successor ->> 'type', successor_arg,
                (successor ->> 'priority')::smallint, successor ->> 'exclusive',
                greatest((successor ->> 'next_run_at')::timestamptz, clock_timestamp()),
                (successor ->> 'created_at')::timestamptz,
                (successor ->> 'headers')::json,
                (successor ->> 'expires')::timestamptz
            from {gone}
            where (select followed from tally) > 0 and successor is not null
            order by id
            returning {_TELL}
        )
    """
