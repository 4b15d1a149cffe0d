"""The rows of exclusive keys: their locks, and the parts that statements about keys share."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import LiteralString

from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement, column, nothing, number_array, text_array

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


_LOCK: LiteralString = """
    insert into bgjob_exclusive ({columns})
    select {values} from {keys}
    on conflict (key, place) do update set since_id = excluded.since_id where false
    returning key
"""
_LOCK_ONLY = _LOCK.format(columns="key", values="key", keys="unnest(%(keys)s::text[]) as k (key)")
_LOCK_OR_GRANT = _LOCK.format(
    columns="key, tokens, queue, since, since_id, until, until_id",
    values="k.key, j.tokens, j.queue, j.due, j.id, j.due, j.id",
    keys="""
        unnest(
            %(keys)s::text[], %(alone)s::text[], %(ids)s::text[], %(claims)s::bigint[]
        ) as k (key, alone, id, token)
        left join lateral (
            select array[k.token] as tokens, min(queue) as queue, min(next_run_at) as due,
                min(id) as id
            from (
                select j.queue, j.next_run_at, j.id, j.token, j.slots from bgjob_job j
                where j.exclusive = k.alone
                order by j.waits, j.queue, j.next_run_at, j.id
                limit 2
            ) as j
            having count(*) = 1
                and bool_and(j.id = k.id and j.token = k.token and j.slots is null)
        ) as j on true
    """,
)


def lock_keys(keys: Iterable[str], claimed: Collection[Claimed] = ()) -> Statement[None]:
    """Lock the first rows of keys, and of the keys of claimed jobs; insert the missing ones.

    A row that is only selected might be deleted while the statement waits for it, and inserted
    again by another session: then it would exist, and not be locked. An existing row is locked
    but not written, so that an old snapshot keeps one dead row of it for each claim, not three.

    A missing row is inserted with its holder if the key has no job but the claimed one. No job
    held the key, or waited for it, while there was no row. `acquire` need not write the row again.
    """
    alone = only_ones(claimed)
    locked = sorted({*keys, *[str(c.job.exclusive) for c in claimed]})
    if not alone:
        return Statement(_LOCK_ONLY, {"keys": text_array(locked)}, nothing)
    found = [alone.get(key) for key in locked]
    return Statement(
        _LOCK_OR_GRANT,
        {
            "keys": text_array(locked),
            "alone": text_array([key if key in alone else "" for key in locked]),
            "ids": text_array([c.job.id if c else "" for c in found]),
            "claims": number_array([c.token if c else 0 for c in found]),
        },
        nothing,
    )


def only_ones(claimed: Collection[Claimed]) -> dict[str, Claimed]:
    """Return those of claimed jobs that are the only ones of their key, by key."""
    counts = Counter([c.job.exclusive for c in claimed])
    return {str(c.job.exclusive): c for c in claimed if counts[c.job.exclusive] == 1}


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
