"""The rows of exclusive keys: their locks, and the parts that statements about keys share."""

from collections.abc import Iterable
from typing import LiteralString

from bgjob._sql.statement import Statement, column, nothing, text_array

HOLDING: LiteralString = """
    select {columns} from bgjob_job h
    where h.exclusive = e.key and not h.waits and h.queue = e.queue
        and (h.next_run_at, h.id) >= (e.since, e.since_id)
        and (h.next_run_at, h.id) <= (e.until, e.until_id)
        and h.token = any (e.tokens) {which}
    order by h.next_run_at, h.id
    limit e.places
"""
"""The first jobs of a holder, the row e: usually those that run.

Only one index has this order, here and below: with statistics of a drained table the planner
took bgjob_job_due, and walked over all due jobs of the queue. Not `exists`, for the same reason.
"""

FIRST_HERE: LiteralString = """
    select {columns} from bgjob_job j
    where j.exclusive = e.key and {which} and j.queue = %(queue)s
        and (j.next_run_at, j.id) >= ({since})
    order by j.next_run_at, j.id
    limit 1
"""
"""The first job of the key e in a queue."""

BEFORE_LAST: LiteralString = "(j.next_run_at, j.id) < (e.wanted_until, e.wanted_until_id)"
"""Up to the last of the claimed jobs.

An old snapshot keeps the entries of all jobs that were put aside, and they come after it."""

JOINED: LiteralString = """
    array(
        select unnest(%(tokens)s::bigint[]) union
        select unnest(e.tokens) intersect select unnest(%(holding)s::bigint[])
    )
"""
"""The claims of the holder e of this worker, and those that join it."""


def lock_keys(keys: Iterable[str]) -> Statement[None]:
    """Lock the first rows of keys; insert the missing ones.

    A row that is only selected might be deleted while the statement waits for it, and inserted
    again by another session: then it would exist, and not be locked. An existing row is locked
    but not written, so that an old snapshot keeps one dead row of it for each claim, not three.
    """
    return Statement(
        """
        insert into bgjob_exclusive (key)
        select key from unnest(%(keys)s::text[]) as k (key)
        on conflict (key, place) do update set since_id = excluded.since_id where false
        returning key
        """,
        {"keys": text_array(sorted(set(keys)))},
        nothing,
    )


def barred_keys(keys: Iterable[str]) -> Statement[list[str]]:
    """List the keys whose first rows other sessions have locked, without waiting."""
    return Statement(
        """
        with free as materialized (
            select key from bgjob_exclusive where key = any (%(keys)s::text[]) and place = 0
            for update skip locked
        )
        select key from bgjob_exclusive
        where key = any (%(keys)s::text[]) and place = 0 and key not in (select key from free)
        """,
        {"keys": text_array(sorted(set(keys)))},
        column,
        prepare=False,
    )
