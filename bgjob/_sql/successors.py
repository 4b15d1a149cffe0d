"""The successor of a running job: the newest request that replaced it, and waits for its end.

An enqueue that replaces a job whose row is claimed cannot change what runs. It writes the new
request into two columns of that row (`replacements`), over an earlier one. The statement that ends
the claim, in whatever way, makes the row a fresh job of that request, with the same id. Both happen
in one statement, which waits for a replacement that is about to commit and reads the newest
columns, so nothing comes between and no value is lost. A replacement that comes later finds no row,
or that of the successor.

Hardly any job is replaced while it runs, so the usual settlements pass over rows with a successor,
as if another worker had them, and only then those of this module are sent: the usual ones need not
prepare an insert that hardly ever writes.

Where a claim ends without an outcome (a release, a key that another job has, a dead worker) the
successor stays in the row, and waits until the job has run again.
"""

from collections.abc import Mapping
from typing import LiteralString

from bgjob._sql.notices import BY_HAND, NOTIFY

SUCCESSOR: LiteralString = "successor, successor_arg, group_id, keep"
"""The columns that a statement returns of the rows that it deletes."""

_NEW: Mapping[LiteralString, LiteralString] = {
    "queue": "successor ->> 'queue'",
    "type": "successor ->> 'type'",
    "arg": "successor_arg",
    "priority": "(successor ->> 'priority')::smallint",
    "exclusive": "successor ->> 'exclusive'",
    "next_run_at": "greatest((successor ->> 'next_run_at')::timestamptz, clock_timestamp())",
    "created_at": "(successor ->> 'created_at')::timestamptz",
    "headers": "(successor ->> 'headers')::json",
    "expires": "(successor ->> 'expires')::timestamptz",
    # The id stays in its group. That of a group's own job is a plain job afterwards.
    "group_id": "nullif(group_id, id)",
    # It is the same id, whose result is that of the last run.
    "keep": "keep",
    "slots": "(successor ->> 'slots')::smallint",
}

_TELL: LiteralString = NOTIFY.format(channel=f"'{BY_HAND}'", payload="queue")


def followed(gone: LiteralString) -> LiteralString:
    """Return a CTE that writes the successors of deleted rows as fresh jobs.

    Args:
        gone: the CTE that returns the columns `id` and SUCCESSOR of these rows.

    """
    return f"""
        followed as (
            insert into bgjob_job (id, {", ".join(_NEW)})
            select id, {", ".join(_NEW.values())} from {gone} where successor is not null
            order by id
            returning {_TELL}
        )
    """
