"""Exclusive keys: which claim may have one, and which jobs wait for it.

A key is held by a claim: by all its jobs that were granted the key, until the last of them is
settled, given back or lost. They are a range of the key's jobs in their due order, and their worker
runs them one after the other. More of its claims may join while it holds the key: the key's row has
their tokens, and the first and the last job of the range. So a key is free as soon as no job of
that range has one of these tokens, however its jobs ended, without another statement.

Decisions about a key are made while its row is locked, by a statement that begins after
the lock was taken, so that it sees all earlier decisions. Rows are locked in the order of
their keys, and no transaction locks twice. Meanwhile it does not wait for rows of jobs, so
that no session waits for long.

The range begins at `since`, and no job of its queue that waits for the key was due before. An old
snapshot keeps the index entries of all completed jobs of the key, and a search from the left edge
would walk over them each time. A job before that point, for example one that was committed late,
only loses its place in line: a key's row is deleted only after a search from the left edge.

What was tried. A key that is held by a job, and the next one woken at its end, needs three writes
of each job and three round trips between two of them: 20,000 jobs of 100 keys took 158 µs of
processor time each, and a claim's chain takes 27 (benchmarks/exclusive.py has the rates). To ask
for each job whether it is locked by another session cost a tuple lock a job, and told nothing that
the end of its lease does not tell.

It has over 400 lines: its statements are put together from the same parts.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._sql.notices import LOCK_CLASS, NOTIFY, bucket, channel
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement, column, in_range, nothing, number_array, text_array

MOST_ASIDE = 1000
"""The most jobs that are put aside with those of a claim."""

HOLDING: LiteralString = """
    select {columns} from bgjob_job h
    where h.exclusive = e.key and not h.waits and h.queue = e.queue
        and (h.next_run_at, h.id) >= (e.since, e.since_id)
        and (h.next_run_at, h.id) <= (e.until, e.until_id)
        and h.token = any (e.tokens) {which}
    order by h.next_run_at, h.id
    limit 1
"""
"""The first job that holds the key e: usually the one that runs.

Only one index has this order, here and below: with statistics of a drained table the planner
took bgjob_job_due, and walked over all due jobs of the queue. Not `exists`, for the same reason.
"""

_IS_HELD = f"({HOLDING.format(columns='true', which='')}) is not null"

# The due time and id from which to search the jobs of the key e in a queue. After the clock was
# set back, jobs may be due before a stored time in the future.
_IS_BOUNDED = "(e.queue = %(queue)s and e.since <= now())"
_SINCE = f"""
    case when {_IS_BOUNDED} then e.since else '-infinity' end,
    case when {_IS_BOUNDED} then e.since_id else '' end
"""

_PLACE: LiteralString = "j.next_run_at, j.id"
_FIRST_HERE = """
    select {columns} from bgjob_job j
    where j.exclusive = e.key and {which} and j.queue = %(queue)s
        and (j.next_run_at, j.id) >= ({since})
    order by j.next_run_at, j.id
    limit 1
"""
_FIRST_WAITS = _FIRST_HERE.format(columns=_PLACE, which="j.waits", since=_SINCE)
# Up to the last of the claimed jobs: an old snapshot keeps the entries of all jobs that were put
# aside, and they come after it. From the last job that holds the key, where this worker has it.
_BEFORE_LAST = "(j.next_run_at, j.id) < (e.wanted_until, e.wanted_until_id)"
_FIRST_WAITS_BEFORE = _FIRST_HERE.format(
    columns=_PLACE, which=f"j.waits and {_BEFORE_LAST}", since=_SINCE
)
_FIRST_OTHER = _FIRST_HERE.format(
    columns=_PLACE,
    which=f"""
        not j.waits and {_BEFORE_LAST}
        and (j.token is null or j.token <> all (%(holding)s::bigint[]))
    """,
    since=f"""
        case when h.id is not null then e.until
            when {_IS_BOUNDED} then e.since else '-infinity' end,
        case when h.id is not null then e.until_id when {_IS_BOUNDED} then e.since_id else '' end
    """,
)


def lock_keys(keys: Iterable[str]) -> Statement[None]:
    """Lock the rows of keys; insert the missing ones.

    A row that is only selected might be deleted while the statement waits for it, and inserted
    again by another session: then it would exist, and not be locked. An existing row is locked
    but not written, so that an old snapshot keeps one dead row of it for each claim, not three.
    """
    return Statement(
        """
        insert into bgjob_exclusive (key)
        select key from unnest(%(keys)s::text[]) as k (key)
        on conflict (key) do update set since_id = excluded.since_id where false
        returning key
        """,
        {"keys": text_array(sorted(set(keys)))},
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
        {"keys": text_array(sorted(set(keys)))},
        column,
        prepare=False,
    )


def acquire(
    queue: str,
    claimed: Sequence[Claimed],
    *,
    holding: Collection[int] = (),
    surplus: Collection[Claimed] = (),
) -> Statement[dict[tuple[str, int], bool | None]]:
    """Grant locked keys to claimed jobs; return by id and token whether each job has its key.

    A key that is free, or held by claims in `holding`, is granted to those of its claimed jobs that
    come before any other due job of the key and the queue, whether that waits or another worker has
    just claimed it. So the jobs of a key and a queue run in the order in which they are due.

    Jobs that are not granted their keys are released and wait aside, and with them other due jobs
    of a key that another worker holds, or of which this one has enough, so that no claim meets
    them. None means undecided: another session has locked the job's row, as a claim does that meets
    it a moment too late. A job that is no longer held is missing.

    Args:
        queue: the queue of the jobs.
        claimed: jobs with their keys.
        holding: this worker's claims.
        surplus: the jobs to put aside even if their key is free, because the worker has
            enough of that key. They come after the others.

    """
    kept_out = {(c.job.id, c.token) for c in surplus}
    tokens = {c.token for c in claimed}
    return Statement(
        f"""
        with wanted as materialized (
            select w.key, w.charged, w.fits, j.id, j.token, j.next_run_at,
                j.exclusive is distinct from w.key as is_named
            from unnest(
                %(ids)s::text[], %(claims)s::bigint[], %(keys)s::text[], %(charged)s::int[],
                %(fits)s::bool[]
            ) as w (id, token, key, charged, fits)
            join bgjob_job j on j.id = w.id and j.token = w.token
            where j.id = any (%(ids)s::text[])
        ), nameless as materialized (
            -- Their handlers have named the keys. Without it they would not hold them.
            select id from bgjob_job
            where id = any (array(select id from wanted where is_named))
            for update skip locked
        ), held as materialized (
            -- Bounds of the wanted jobs: of several due at the first or last time, the id may be
            -- another's.
            select e.*, w.*
            from bgjob_exclusive e
            join (
                select key as wanted_key,
                    min(next_run_at) as wanted_since, min(id) as wanted_since_id,
                    max(next_run_at) as wanted_until, max(id) as wanted_until_id
                from wanted group by key
            ) as w on w.wanted_key = e.key
            where e.key = any (%(keys)s::text[])
        ), line as materialized (
            select e.*, h.next_run_at as first_at, h.id as first_id, o.next_run_at as other_at,
                o.id as other_id, h.id is null or e.tokens && %(holding)s::bigint[] as is_open,
                (o.next_run_at, o.id) < (h.next_run_at, h.id) as other_is_first
            from held e
            left join lateral ({HOLDING.format(columns="h.next_run_at, h.id", which="")}) as h
                on true
            left join lateral (
                select * from (({_FIRST_WAITS_BEFORE}) union all ({_FIRST_OTHER})) as o
                order by next_run_at, id limit 1
            ) as o on true
        ), judged as materialized (
            select w.*, not (w.fits and l.is_open) as is_surplus, coalesce(
                l.is_open and w.fits
                    and (not w.is_named or w.id in (select id from nameless))
                    and (l.other_id is null or (w.next_run_at, w.id) < (l.other_at, l.other_id))
                -- Or it had its key before.
                or w.token = any (l.tokens)
                    and (w.next_run_at, w.id) >= (l.first_at, l.first_id)
                    and (w.next_run_at, w.id) <= (l.until, l.until_id), false
            ) as has_key
            from wanted w join line l on l.key = w.key
        ), asked as materialized (
            select l.key, a.is_granted, a.until, a.until_id, l.first_id is not null as was_held,
                l.wanted_since as since, l.wanted_since_id as since_id,
                case when l.other_is_first then l.other_at else l.first_at end as start_at,
                case when l.other_is_first then l.other_id else l.first_id end as start_id
            from line l
            join (
                select key, bool_or(has_key) as is_granted,
                    max(next_run_at) filter (where has_key) as until,
                    max(id) filter (where has_key) as until_id
                from judged group by key
            ) as a on a.key = l.key
        ), taken as (
            update bgjob_exclusive e
            set queue = %(queue)s,
                tokens = case
                    when not a.is_granted then e.tokens
                    when not a.was_held then %(tokens)s::bigint[]
                    else array(
                        select unnest(%(tokens)s::bigint[]) union
                        select unnest(e.tokens) intersect select unnest(%(holding)s::bigint[])
                    )
                end,
                -- After the clock was set back nothing is known.
                since = case
                    when e.since > now() then '-infinity'
                    when (a.start_at, a.start_id) < (a.since, a.since_id) then a.start_at
                    else a.since
                end,
                since_id = case
                    when (a.start_at, a.start_id) < (a.since, a.since_id) then a.start_id
                    else a.since_id
                end,
                until = case
                    when a.is_granted and not (a.was_held and e.until > a.until) then a.until
                    else e.until
                end,
                until_id = case
                    when a.is_granted
                        and not (a.was_held and (e.until, e.until_id) > (a.until, a.until_id))
                    then a.until_id
                    else e.until_id
                end
            from asked a
            where e.key = any (%(keys)s::text[]) and e.key = a.key and (
                a.is_granted
                -- One that was committed late waits before those that hold the key.
                or e.queue = %(queue)s and (a.since, a.since_id) < (e.since, e.since_id)
            )
        ), refused as materialized (
            select id from bgjob_job
            where id = any (array(select id from judged where not has_key))
                and token = any (%(tokens)s::bigint[])
            for update skip locked
        ), changed as (
            update bgjob_job j
            set exclusive = w.key,
                waits = not w.has_key,
                token = case when w.has_key then j.token end,
                lease_until = case when w.has_key then j.lease_until end,
                attempt = case when w.has_key then j.attempt
                    else greatest(j.attempt, w.charged) - w.charged end
            from judged w
            where j.id = w.id and j.id = any (array(
                select id from refused
                union all select id from judged where has_key and is_named
            ))
        ), others_aside as (
            -- Jobs of this queue only: they are a range of the index, however many are not
            -- due. The workers of another queue find theirs. Only where a claim has met such
            -- jobs: an old snapshot keeps the entries of all that were put aside.
            update bgjob_job set waits = true
            where ctid = any (array(
                select o.ctid
                from bgjob_exclusive e
                cross join lateral (
                    select j.ctid from bgjob_job j
                    where j.exclusive = e.key and not j.waits and j.queue = %(queue)s
                        and (j.next_run_at, j.id) >= ({_SINCE})
                        and j.next_run_at <= now() and j.token is null
                    order by j.next_run_at, j.id
                    limit %(most)s
                    for update skip locked
                ) as o
                where e.key = any (array(
                    select a.key from asked a
                    where (a.was_held or a.is_granted)
                        and a.key in (select key from judged where is_surplus)
                ))
                limit %(most)s
            ))
        )
        select id, token, case when has_key then true
            when id in (select id from refused) then false end
        from judged
        """,
        {
            "queue": queue,
            "ids": text_array([c.job.id for c in claimed]),
            "claims": number_array([c.token for c in claimed]),
            "tokens": number_array(list(tokens)),
            "keys": text_array([str(c.job.exclusive) for c in claimed]),
            "charged": number_array([int(c.is_charged) for c in claimed]),
            "fits": text_array(
                ["f" if (c.job.id, c.token) in kept_out else "t" for c in claimed]
                if kept_out
                else ["t"] * len(claimed)
            ),
            "most": MOST_ASIDE,
            "holding": number_array(list(tokens.union(holding))),
        },
        lambda rows: {(id_, token): has_key for id_, token, has_key in rows},
    )


class Woken(NamedTuple):
    """Due jobs of a priority that have waited for keys."""

    priority: int
    since: datetime
    """The first due time."""


_WAITS_ANYWHERE = """
    (select true from bgjob_job j where j.exclusive = e.key and j.waits order by j.queue limit 1)
"""
_WAITS_IN = """
    select {columns} from bgjob_job j
    where j.exclusive = {line}.key and j.waits and j.queue = {line}.queue
        and (j.next_run_at, j.id) >= ({line}.since, {line}.since_id)
    order by j.next_run_at, j.id
    limit {limit}
"""
_WAITS_SINCE = _WAITS_IN.format(line="e", columns="true", limit="1")
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


def release(queue: str, keys: Iterable[str], *, most: int = 1) -> Statement[list[Woken]]:
    """Wake the first jobs that wait for each of these locked keys, if the key is free.

    At most so many for each queue. Returns the jobs of this queue, whose workers are notified as by
    an enqueue. Workers of other queues find theirs when they poll.
    """
    return Statement(
        f"""
        with recursive free as materialized (
            select e.*, coalesce(e.is_known, {_WAITS_ANYWHERE}) is not null as is_needed
            from (
                select e.*, case when e.since <= now() then ({_WAITS_SINCE}) end as is_known
                from bgjob_exclusive e
                where e.key = any (%(keys)s::text[]) and not ({_IS_HELD})
                offset 0
            ) as e
        ), known as (
            select key, queue, since, since_id from free where is_known
        ), other (key, queue, known) as (
            -- Queues that are not known, in their order, without the known one.
            select other.key, {_NEXT_QUEUE}, other.known
            from (
                select free.key, '' collate "C", coalesce(known.queue, '') collate "C"
                from free left join known on known.key = free.key where free.is_needed
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
            where key = any (array(select key from free where not is_needed))
        ), first as materialized (
            select line.key, line.queue, line.since, line.since_id, f.next_run_at, f.id,
                lead(f.id) over (
                    partition by line.key, line.queue order by f.next_run_at, f.id
                ) is null as is_last
            from line
            cross join lateral (
                {_WAITS_IN.format(line="line", columns=_PLACE, limit="%(most)s")}
                for update skip locked
            ) as f
        ), due as materialized (
            -- Jobs that do not wait and come before some of those: they have the key first.
            select l.key, l.queue, o.next_run_at, o.id
            from first as l
            cross join lateral (
                select o.next_run_at, o.id from bgjob_job o
                where o.exclusive = l.key and not o.waits and o.queue = l.queue
                    and (o.next_run_at, o.id) >= (l.since, l.since_id)
                    and (o.next_run_at, o.id) < (l.next_run_at, l.id)
                order by o.next_run_at, o.id
                limit 1
            ) as o
            where l.is_last
        ), woken as (
            update bgjob_job set waits = false
            where id = any (array(
                select f.id from first f
                left join due on due.key = f.key and due.queue = f.queue
                where due.id is null or (f.next_run_at, f.id) < (due.next_run_at, due.id)
            ))
            returning queue, priority, {in_range("next_run_at")} as since
        ), here as materialized (
            select queue, priority, min(since) as since from woken
            where queue = %(queue)s group by queue, priority
        )
        select priority, since, case
            when not pg_try_advisory_xact_lock_shared(%(class)s, %(bucket)s)
            then {_NOTIFY_OF_WOKEN}
        end from here
        """,
        {
            "queue": queue,
            "keys": text_array(sorted(set(keys))),
            "most": most,
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


_FIRST_OF_ALL = _FIRST_HERE.format(columns=_PLACE, which="j.waits", since="'-infinity', ''")
# Only those before the first that waits: an old snapshot keeps the entries of all jobs that were
# put aside, and they come after it.
_IS_DUE_BEFORE = _FIRST_HERE.format(
    columns="true",
    which="""
        not j.waits and j.next_run_at <= now() and (j.next_run_at, j.id)
            < (coalesce(first.next_run_at, 'infinity'), coalesce(first.id, ''))
    """,
    since=_SINCE,
)
_HOLDERS_THAT_ENDED = HOLDING.format(columns="h.ctid", which="and h.lease_until <= now()").replace(
    "limit 1", "for update skip locked"
)
_HAS_NOT_ENDED = "and h.id <> all (array(select id from ended))"


def blocked(
    queue: str, *, after: str, limit: int, served: Collection[str] = ()
) -> Statement[Blocked]:
    """Find free keys whose jobs in this queue still wait.

    Their holders died or were deleted, or their worker died before it had released them. Holders of
    another queue, which may have no worker left, are freed here when their lease has
    ended. Holders of a queue in `served`, the queues of the same worker, are not: that
    worker frees them in its own sweep, and not while it holds them. Keys that no job needs any
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
                cross join lateral ({_HOLDERS_THAT_ENDED}) as h
                where e.queue <> all (%(served)s::text[])
            ))
            returning id
        ), free as materialized (
            select * from looked_at e
            where ({HOLDING.format(columns="true", which=_HAS_NOT_ENDED)}) is null
        )
        select array(
            select e.key from free e
            left join lateral (
                ({_FIRST_WAITS}) union all ({_FIRST_OF_ALL}) limit 1
            ) as first on true
            where ({_IS_DUE_BEFORE}) is null
                and (first.id is not null or {_WAITS_ANYWHERE} is null)
        ), case when count(*) = %(limit)s then max(key) else '' end
        from looked_at
        """,
        {"queue": queue, "after": after, "limit": limit, "served": [queue, *served]},
        lambda rows: Blocked(*rows[0]),
    )
