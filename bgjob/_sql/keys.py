"""Exclusive keys: who may have one, who waits for it.

Decisions about a key are made while its row is locked, by a statement that begins after
the lock was taken, so that it sees all earlier decisions. Rows are locked in the order of
their keys, and no transaction locks twice. Meanwhile it does not wait for rows of jobs, so
that no session waits for long.

The row of a key says at which job to start (`queue`, `since`, `since_id`): in that queue no
job that waits for the key was due before. An old snapshot keeps the index entries of all
completed jobs of the key, and a search from the left edge would walk over them for each job.
A job before that point, for example one that was committed late, only loses its place in
line: a key's row is deleted only after a search from the left edge.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from bgjob._sql.notices import LOCK_CLASS, NOTIFY, bucket, channel
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement, column, in_range, nothing

# Whether its job is claimed: the claim's token vanishes when the job is settled or freed. Not
# `exists`: without nested loops that becomes a hash of the whole table.
_IS_HELD = """
    (select true from bgjob_job h where h.id = e.job_id and h.token = e.token) is not null
"""


# The due time and id from which to search the jobs of the key e in a queue. After the clock was
# set back, jobs may be due before a stored time in the future.
_IS_BOUNDED = "(e.queue = {queue} and e.since <= now())"
_SINCE = f"""
    case when {_IS_BOUNDED} then e.since else '-infinity' end,
    case when {_IS_BOUNDED} then e.since_id else '' end
"""

# Another job of the key and the queue of f that was due before it. Only one index has this
# order, here and below: with statistics of a drained table the planner took bgjob_job_due,
# and walked over all due jobs of the queue.
_EARLIER = """
    (
        select true from bgjob_job o
        where o.exclusive = f.key and {which} and o.queue = f.queue
            and (o.next_run_at, o.id) >= ({since})
            and (o.next_run_at, o.id) < (f.next_run_at, f.id)
        order by o.next_run_at, o.id
        limit 1
    ) is not null
"""
_SINCE_OF_F = _SINCE.format(queue="f.queue")
_EARLIER_WAITS = _EARLIER.format(which="o.waits", since=_SINCE_OF_F)
_EARLIER_IS_DUE = _EARLIER.format(which="not o.waits", since=_SINCE_OF_F)
_EARLIER_IS_DUE_SINCE = _EARLIER.format(which="not o.waits", since="line.since, line.since_id")


_OF_KEY = """
    (
        select true from bgjob_job j
        where j.exclusive = e.key and {which}
        order by {order}
        limit 1
    )
"""
_OF_KEY_SINCE = _OF_KEY.format(
    which="{which} and (j.next_run_at, j.id) >= ({since})", order="j.next_run_at, j.id"
)
_WAITS_SINCE = _OF_KEY_SINCE.format(
    which="j.waits and j.queue = e.queue", since="e.since, e.since_id"
)
_WAITS_ANYWHERE = _OF_KEY.format(which="j.waits", order="j.queue")
_SINCE_HERE = _SINCE.format(queue="%(queue)s")
_WAITS_HERE = """
    select j.next_run_at, j.id from bgjob_job j
    where j.exclusive = e.key and j.waits and j.queue = %(queue)s and {which}
    order by j.next_run_at, j.id
    limit 1
"""
_FIRST_HERE = "({}) union all ({}) limit 1".format(
    _WAITS_HERE.format(which=f"(j.next_run_at, j.id) >= ({_SINCE_HERE})"),
    _WAITS_HERE.format(which="true"),
)
_EARLIER_IS_DUE_HERE = _OF_KEY_SINCE.format(
    which="""
        not j.waits and j.queue = %(queue)s and j.next_run_at <= now()
        and (j.next_run_at, j.id)
            < (coalesce(first.next_run_at, 'infinity'), coalesce(first.id, ''))
    """,
    since=_SINCE_HERE,
)


def lock_keys(keys: Iterable[str]) -> Statement[None]:
    """Lock the rows of keys; insert the missing ones.

    A row that is only selected might be deleted while the statement waits for it, and inserted
    again by another session: then it would exist, and not be locked. An existing row is locked
    but not written, so that an old snapshot keeps one dead row of it for each job, not three.
    """
    return Statement(
        """
        insert into bgjob_exclusive (key)
        select key from unnest(%(keys)s::text[]) as k (key)
        on conflict (key) do update set job_id = excluded.job_id where false
        returning key
        """,
        {"keys": sorted(set(keys))},
        nothing,
    )


def barred_keys(keys: Iterable[str]) -> Statement[list[str]]:
    """List the keys whose rows other sessions have locked, without waiting."""
    return Statement(
        """
        with free as materialized (
            select key from bgjob_exclusive where key = any (%(keys)s::text[])
            for update skip locked
        )
        select key from bgjob_exclusive
        where key = any (%(keys)s::text[]) and key not in (select key from free)
        """,
        {"keys": sorted(set(keys))},
        column,
        prepare=False,
    )


def acquire(
    queue: str, claimed: Sequence[Claimed]
) -> Statement[dict[tuple[str, int], bool | None]]:
    """Grant locked keys to claimed jobs; return by id and token whether each job holds its key.

    None means undecided: another session has locked the job's row, as a claim does that meets
    it a moment too late. A job that is no longer held is missing. Jobs that are not granted
    their keys are released and wait aside, and with them the other due jobs of a held key, so
    that no claim meets them. Of one key and queue the job that was due first gets the key first,
    even if it waits or another worker has just claimed it.
    """
    return Statement(
        f"""
        with wanted as materialized (
            select w.key, w.charged, j.id, j.token, j.queue, j.next_run_at,
                coalesce(e.job_id = j.id and e.token = j.token, false) as has_it
            from unnest(
                %(ids)s::text[], %(tokens)s::bigint[], %(keys)s::text[], %(charged)s::int[]
            ) as w (id, token, key, charged)
            join bgjob_job j on j.id = w.id and j.token = w.token
            join bgjob_exclusive e on e.key = w.key
            where j.id = any (%(ids)s::text[]) and e.key = any (%(keys)s::text[])
            for update of j skip locked
        ), first as materialized (
            select distinct on (key) key, id, token, queue, next_run_at, has_it
            from wanted order by key, has_it desc, next_run_at, id
        ), granted as materialized (
            select f.*
            from first f join bgjob_exclusive e on e.key = f.key
            where e.key = any (%(keys)s::text[]) and (
                f.has_it or not ({_IS_HELD} or {_EARLIER_WAITS} or {_EARLIER_IS_DUE})
            )
        ), taken as (
            -- A job that already had its key may have others that wait before it.
            update bgjob_exclusive e
            set job_id = g.id, token = g.token, queue = g.queue, since_id = g.id,
                since = case when not g.has_it then g.next_run_at end
            from granted g
            where e.key = any (%(keys)s::text[]) and e.key = g.key
        ), lowered as (
            update bgjob_exclusive e
            set since = case when e.since <= now() then w.since end, since_id = ''
            from (
                select key, min(next_run_at) as since from wanted
                where key not in (select key from granted)
                group by key
            ) as w
            where e.key = any (%(keys)s::text[]) and e.key = w.key
                and e.queue = %(queue)s and e.since >= w.since
                and (e.since > w.since or e.since_id > '')
        ), aside as materialized (
            select o.ctid
            from (
                select e.key, {_SINCE_HERE}
                from bgjob_exclusive e
                where e.key = any (%(keys)s::text[])
                    and ({_IS_HELD} or e.key in (select key from granted))
                    -- Where no claim has met such jobs there may be none: an old snapshot
                    -- keeps the entries of all that were put aside, and this walks over them.
                    and e.key in (select key from wanted where id not in (select id from granted))
            ) as k (key, since, since_id)
            -- Jobs of this queue only: they are a range of the index, however many are not
            -- due. The workers of another queue find theirs.
            cross join lateral (
                select j.ctid from bgjob_job j
                where j.exclusive = k.key and not j.waits and j.queue = %(queue)s
                    and (j.next_run_at, j.id) >= (k.since, k.since_id)
                    and j.next_run_at <= now() and j.token is null
                order by j.next_run_at, j.id
                limit %(most)s
                for update skip locked
            ) as o
            limit %(most)s
        ), put_aside as (
            update bgjob_job set waits = true where ctid = any (array(select ctid from aside))
        ), named as (
            update bgjob_job j set exclusive = w.key
            from wanted w
            where j.id = any (array(select id from granted)) and j.id = w.id
                and j.exclusive is distinct from w.key
        ), set_aside as (
            update bgjob_job j
            set exclusive = w.key,
                waits = true,
                token = null,
                lease_until = null,
                attempt = greatest(j.attempt, w.charged) - w.charged
            from wanted w
            where j.id = any (array(
                select id from wanted where id not in (select id from granted)
            )) and j.id = w.id
        )
        select j.id, j.token, case
            when j.id in (select id from granted) then true
            when j.id in (select id from wanted) then false
        end
        from bgjob_job j
        where j.id = any (%(ids)s::text[]) and j.token = any (%(tokens)s::bigint[])
        """,
        {
            "queue": queue,
            "ids": [c.job.id for c in claimed],
            "tokens": [c.token for c in claimed],
            "keys": [c.job.exclusive for c in claimed],
            "charged": [int(c.is_charged) for c in claimed],
            "most": 1000,
        },
        lambda rows: {(id_, token): has_it for id_, token, has_it in rows},
    )


class Woken(NamedTuple):
    """A due job that has waited for a key."""

    priority: int
    since: datetime


_NEXT_QUEUE = """
    coalesce((
        select j.queue from bgjob_job j
        where j.exclusive = other.key and j.waits
            and j.queue > other.queue and j.queue < other.known
        order by j.queue limit 1
    ), (
        select j.queue from bgjob_job j
        where j.exclusive = other.key and j.waits
            and j.queue > greatest(other.queue, other.known)
        order by j.queue limit 1
    ))::text
"""
_NOTIFY_OF_WOKEN = NOTIFY.format(
    channel="%(channel)s", payload="concat_ws(' ', extract(epoch from since), priority, queue)"
)


def release(queue: str, keys: Iterable[str]) -> Statement[list[Woken]]:
    """Wake the first job that waits for each of these locked keys, if the key is free.

    One job for each queue. Returns the jobs of this queue, whose workers are notified as by an
    enqueue. Workers of other queues find theirs when they poll.
    """
    return Statement(
        f"""
        with recursive free as materialized (
            select e.* from bgjob_exclusive e
            where e.key = any (%(keys)s::text[]) and not ({_IS_HELD})
        ), known as materialized (
            select e.key, e.queue, e.since, e.since_id from free e
            where e.since <= now() and {_WAITS_SINCE} is not null
        ), other (key, queue, known) as (
            -- Queues that are not known, in their order, without the known one.
            select other.key, {_NEXT_QUEUE}, other.known
            from (
                select free.key, '' collate "C", coalesce(known.queue, '') collate "C"
                from free left join known on known.key = free.key
            ) as other (key, queue, known)
            union all
            select other.key, {_NEXT_QUEUE}, other.known
            from other where other.queue is not null
        ), line (key, queue, since, since_id) as materialized (
            select key, queue, since, since_id from known
            union all
            select key, queue, '-infinity', '' from other where queue > ''
        ), unused as (
            delete from bgjob_exclusive
            where key = any (array(select key from free where key not in (select key from line)))
        ), first as materialized (
            select f.id
            from line
            cross join lateral (
                select line.key, j.id, j.queue, j.next_run_at from bgjob_job j
                where j.exclusive = line.key and j.waits and j.queue = line.queue
                    and (j.next_run_at, j.id) >= (line.since, line.since_id)
                order by j.next_run_at, j.id
                limit 1
                for update skip locked
            ) as f
            where not ({_EARLIER_IS_DUE_SINCE})
        ), woken as (
            update bgjob_job set waits = false where id = any (array(select id from first))
            returning queue, priority, {in_range("next_run_at")} as since
        )
        select priority, since, case
            when not pg_try_advisory_xact_lock_shared(%(class)s, %(bucket)s)
            then {_NOTIFY_OF_WOKEN}
        end from woken where queue = %(queue)s
        """,
        {
            "queue": queue,
            "keys": sorted(set(keys)),
            "class": LOCK_CLASS,
            "bucket": bucket(queue),
            "channel": channel(queue),
        },
        lambda rows: [Woken(*row[:2]) for row in rows],
    )


class Blocked(NamedTuple):
    """Free keys whose jobs still wait."""

    keys: list[str]
    after: str
    """The key after which to continue; empty at the end."""


def blocked(
    queue: str, *, after: str, limit: int, served: Collection[str] = ()
) -> Statement[Blocked]:
    """Find free keys whose jobs in this queue still wait.

    Their holder died or was deleted, or its worker died before it had released them. A
    holder of another queue, which may have no worker left, is freed here when its lease
    has ended. A holder of a queue in `served`, the queues of the same worker, is not: that
    worker frees it in its own sweep, and not while it holds it. Keys that no job needs any
    more are found as well. The statement checks the first `limit` keys after `after`, so
    that no sweep walks over all of them.
    """
    return Statement(
        f"""
        with looked_at as materialized (
            select * from bgjob_exclusive where key > %(after)s
            order by key limit %(limit)s
        ), ended as (
            update bgjob_job
            set token = null, lease_until = null, deaths = least(deaths, 32766) + 1
            where ctid = any (array(
                select h.ctid from looked_at e
                cross join lateral (
                    select j.ctid from bgjob_job j
                    where j.id = e.job_id and j.token = e.token
                        and j.queue <> all (%(served)s::text[]) and j.lease_until <= now()
                    limit 1
                    for update skip locked
                ) as h
            ))
            returning id
        ), free as materialized (
            select * from looked_at e
            where not ({_IS_HELD}) or e.job_id = any (array(select id from ended))
        )
        select array(
            select e.key from free e
            left join lateral ({_FIRST_HERE}) as first on true
            -- Only those before it: an old snapshot keeps the entries of all jobs that were
            -- put aside, and they come after it.
            where {_EARLIER_IS_DUE_HERE} is null
                and (first.id is not null or {_WAITS_ANYWHERE} is null)
        ), case when count(*) = %(limit)s then max(key) else '' end
        from looked_at
        """,
        {"queue": queue, "after": after, "limit": limit, "served": [queue, *served]},
        lambda rows: Blocked(*rows[0]),
    )
