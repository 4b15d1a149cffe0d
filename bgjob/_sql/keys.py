"""Exclusive keys: which claim may have one, and which jobs wait for it.

A key is held by a claim: by all its jobs that were granted the key, until the last of them is
settled, given back or lost. They are a range of the key's jobs in their due order, and their worker
runs them one after the other. More of its claims may join while it holds the key: a row has
their tokens, and the first and the last job of the range. So a key is free as soon as no job of
that range has one of these tokens, however its jobs ended, without another statement.

A key whose jobs have several slots may have several holders. Each has a row, with a number of
places: its worker runs so many jobs of the range at once. A holder uses as many slots as it has
jobs, but at most its places; and at most as many slots are used as each of these jobs allows. So a
job that ends leaves its slot to any worker. With one slot there is one row, and it has one place.

Decisions about a key are made while its first row is locked, by a statement that begins after
the lock was taken, so that it sees all earlier decisions. Rows are locked in the order of
their keys, and no transaction locks twice. Meanwhile it does not wait for rows of jobs, so
that no session waits for long.

A row begins at `since`, and no job of its queue that waits for the key was due before. An old
snapshot keeps the index entries of all completed jobs of the key, and a search from the left edge
would walk over them each time. A job before that point, for example one that was committed late,
only loses its place in line: a key's row is deleted only after a search from the left edge.

Most keys have one slot, and nothing else to be considered: `undisputed` grants these at once.

What was tried. A key that is held by a job, and the next one woken at its end, needs three writes
of each job and three round trips between two of them: 20,000 jobs of 100 keys took 158 µs of
processor time each, and a claim's chain takes 27 (benchmarks/exclusive.py has the rates). To ask
for each job whether it is locked by another session cost a tuple lock a job, and told nothing that
the end of its lease does not tell.

It has over 400 lines: its statements are put together from the same parts.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import LiteralString, NamedTuple

import orjson

from bgjob._sql.key_rows import BEFORE_LAST, FIRST_HERE, HOLDING, JOINED
from bgjob._sql.notices import LOCK_CLASS, NOTIFY, bucket, channel
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement, in_range, number_array, text_array
from bgjob._sql.undisputed import UNDISPUTED, answers, lines

MOST_ASIDE = 1000
"""The most jobs that are put aside with those of a claim."""

NO_SLOTS: Mapping[str, int] = MappingProxyType({})

_ITS_ROWS: LiteralString = """
    unnest({keys}) as k (key)
    cross join lateral (
        -- Each by itself: without statistics the planner read the table for several.
        select *, ctid from bgjob_exclusive e where e.key = k.key order by e.place limit 32768
    ) as e
"""


def _rows(keys: LiteralString, which: LiteralString = "") -> LiteralString:
    """Return the rows of different keys, with the slots that each uses."""
    first = HOLDING.format(columns="1", which=which)
    return f"""
        select e.*, coalesce(
            case when e.places = 1 then ({first})
                else (select count(*)::int from ({first}) as h) end, 0
        ) as used
        from {_ITS_ROWS.format(keys=keys)}
    """


_LEAST = "min(slots) filter (where used > 0)"
_HAS_ROOM = f"sum(used) < coalesce({_LEAST}, 1)"

_HOLDS_SLOT: LiteralString = """
    {job}.token is not null and (
        select true from bgjob_exclusive g
        where g.key = {key} and {job}.token = any (g.tokens)
            and ({job}.next_run_at, {job}.id) <= (g.until, g.until_id)
        limit 1
    ) is not null
"""

# The due time and id from which to search the jobs of the key e in a queue. After the clock was
# set back, jobs may be due before a stored time in the future. Bounds of several rows or jobs, here
# and below: of several due at the first or last time, the id may be another's.
_IS_BOUNDED = "queue = %(queue)s and since <= now()"
_BOUNDS = f"""
    coalesce(min(since) filter (where {_IS_BOUNDED}), '-infinity') as since,
    coalesce(min(since_id) filter (where {_IS_BOUNDED}), '') as since_id
"""
_SINCE: LiteralString = "e.since, e.since_id"

_PLACE: LiteralString = "j.next_run_at, j.id"
_FIRST_WAITS = FIRST_HERE.format(columns=_PLACE, which="j.waits", since=_SINCE)
_FIRST_WAITS_BEFORE = FIRST_HERE.format(
    columns=_PLACE, which=f"j.waits and {BEFORE_LAST}", since=_SINCE
)
_FIRST_OTHER = FIRST_HERE.format(
    columns=_PLACE,
    which=f"""
        not j.waits and {BEFORE_LAST}
        and (j.token is null or j.token <> all (%(holding)s::bigint[]))
        and (e.slots = 1 or not ({_HOLDS_SLOT.format(job="j", key="e.key")}))
    """,
    since="""
        case when e.is_ours and e.slots = 1 then e.until else e.since end,
        case when e.is_ours and e.slots = 1 then e.until_id else e.since_id end
    """,
)


def acquire(
    queue: str,
    claimed: Sequence[Claimed],
    *,
    holding: Collection[int] = (),
    ahead: Sequence[int] = (),
    in_a_row: int = MOST_ASIDE,
    most: int = 1,
    slots: Mapping[str, int] = NO_SLOTS,
) -> Statement[dict[tuple[str, int], int | None]]:
    """Grant locked keys to claimed jobs; return by id and token the slots of each job's key.

    A key that is free, or held by claims in `holding`, or has a free slot, is granted to those of
    its claimed jobs that come before any other due job of the key and the queue, whether that waits
    or another worker has just claimed it. So the jobs of a key and a queue start in the order in
    which they are due. The answer is the number of slots that other workers do not use; this one
    has up to `most` of them.

    Jobs that are not granted their keys are released and wait aside, and with them other due jobs
    of a key that has no slot for this worker, or of which it has enough, so that no claim meets
    them; but not where other workers have slots for these. Their answer is 0. None means undecided:
    another session has locked the job's row, as a claim does that meets it a moment too late. A job
    that is no longer held is missing.

    Args:
        queue: the queue of the jobs.
        claimed: jobs with their keys.
        holding: this worker's claims.
        ahead: for each job its number among those of its key that this worker has not ended; 1 by
            default.
        in_a_row: the most of them for each slot, if the worker has all slots; else one, because
            other workers start later jobs of the key. The others are put aside even if their key
            is free, because the worker has enough of that key. They come after these.
        most: the most slots of a key that this worker uses; always the same.
        slots: by type, the slots of the keys that its jobs' handlers name; 1 by default.

    """
    tokens = {c.token for c in claimed}
    ahead = ahead or [1] * len(claimed)
    return Statement(
        f"""
        with {UNDISPUTED}, rest as materialized (
            select w.* from unnest(
                %(ids)s::text[], %(claims)s::bigint[], %(keys)s::text[], %(charged)s::int[],
                %(ahead)s::int[]
            ) as w (id, token, key, charged, ahead)
            where key not in (select key from granted)
        ), wanted as materialized (
            select w.key, w.charged, w.ahead, j.id, j.token, j.next_run_at,
                j.exclusive is distinct from w.key as is_named,
                coalesce(
                    case when j.exclusive = w.key then greatest(j.slots, 1)
                        else (%(slots)s::jsonb ->> j.type)::smallint end, 1
                ) as slots
            from rest w
            join bgjob_job j on j.id = w.id and j.token = w.token
            where j.id = any (array(select id from rest))
        ), nameless as materialized (
            -- Their handlers have named the keys. Without it they would not hold them.
            select id from bgjob_job
            where id = any (array(select id from wanted where is_named))
            for update skip locked
        ), held as materialized (
            select e.*, h.*, h.used > 0 and e.tokens && %(holding)s::bigint[] as is_ours
            from {_ITS_ROWS.format(keys="array(select distinct key from wanted)")}
            cross join lateral (
                select count(*)::int as used, min(next_run_at) as first_at, min(id) as first_id
                from ({HOLDING.format(columns="h.next_run_at, h.id", which="")}) as h
            ) as h
        ), free as materialized (
            -- The keys, and in `place` the row of this worker: its own, an unused one, or
            -- a new one.
            select w.*, u.*, s.slots, s.slots - u.others as room,
                least(s.slots - u.others, %(most)s) as places
            from (
                select key as wanted_key, min(slots) as wanted_slots,
                    min(next_run_at) as wanted_since, min(id) as wanted_since_id,
                    max(next_run_at) as wanted_until, max(id) as wanted_until_id
                from wanted group by key
            ) as w
            join (
                select key, sum(used) as used, {_LEAST} as least, bool_or(is_ours) as is_ours,
                    coalesce(sum(used) filter (where not is_ours), 0)::int as others,
                    count(*) as rows, coalesce(
                        min(place) filter (where is_ours), min(place) filter (where used = 0),
                        count(*)
                    ) as place,
                    min(first_at) filter (where queue = %(queue)s) as first_at,
                    min(first_id) filter (where queue = %(queue)s) as first_id,
                    max(until) filter (where is_ours) as until,
                    max(until_id) filter (where is_ours) as until_id,
                    {_BOUNDS}
                from held group by key
            ) as u on u.key = w.wanted_key
            cross join lateral (select least(u.least, w.wanted_slots) as slots) as s
        ), line as materialized (
            select e.*, o.next_run_at as other_at, o.id as other_id,
                (o.next_run_at, o.id) < (e.first_at, e.first_id) as other_is_first
            from free e
            left join lateral (
                select * from (({_FIRST_WAITS_BEFORE}) union all ({_FIRST_OTHER})) as o
                order by next_run_at, id limit 1
            ) as o on true
        ), judged as materialized (
            select w.*, not w.fits as is_surplus,
                h.key is not null or w.fits
                    and (not w.is_named or w.id in (select id from nameless))
                    and (w.other_id is null or (w.next_run_at, w.id) < (w.other_at, w.other_id))
                as has_key,
                case when w.room > 0 then w.room else h.places end as answer
            from (
                select w.*, l.room, l.other_at, l.other_id,
                    w.ahead <= case when l.places = l.slots then %(in_a_row)s * l.slots
                        else l.places end as fits
                from wanted w join line l on l.key = w.key
            ) as w
            -- It had its key before.
            left join held h on h.key = w.key and h.is_ours and w.token = any (h.tokens)
                and (w.next_run_at, w.id) >= (h.since, h.since_id)
                and (w.next_run_at, w.id) <= (h.until, h.until_id)
        ), asked as materialized (
            select l.*, a.is_granted, a.granted_until, a.granted_until_id,
                case when s.is_before then s.at else l.wanted_since end as start_at,
                case when s.is_before then s.id else l.wanted_since_id end as start_id
            from line l
            join (
                select key, bool_or(has_key) as is_granted,
                    max(next_run_at) filter (where has_key) as granted_until,
                    max(id) filter (where has_key) as granted_until_id
                from judged group by key
            ) as a on a.key = l.key
            cross join lateral (
                select *, (at, id) < (l.wanted_since, l.wanted_since_id) as is_before
                from (
                    select case when l.other_is_first then l.other_at else l.first_at end as at,
                        case when l.other_is_first then l.other_id else l.first_id end as id
                ) as s
            ) as s
        ), taken as (
            update bgjob_exclusive e
            set queue = %(queue)s,
                -- After the clock was set back nothing is known.
                since = case when e.since > now() then '-infinity' else a.start_at end,
                since_id = a.start_id,
                tokens = case
                    when not (a.is_granted and e.place = a.place) then e.tokens
                    when not a.is_ours then %(tokens)s::bigint[]
                    else {JOINED}
                end,
                until = case
                    when a.is_granted and e.place = a.place
                        and not (a.is_ours and e.until > a.granted_until)
                    then a.granted_until
                    else e.until
                end,
                until_id = case
                    when a.is_granted and e.place = a.place and not (
                        a.is_ours
                        and (e.until, e.until_id) > (a.granted_until, a.granted_until_id)
                    )
                    then a.granted_until_id
                    else e.until_id
                end,
                places = case
                    when a.is_granted and e.place = a.place and a.room > 0
                    then a.places
                    else e.places
                end,
                slots = case
                    when not (a.is_granted and e.place = a.place and a.room > 0) then e.slots
                    when a.is_ours then least(e.slots, a.wanted_slots)
                    else a.wanted_slots
                end
            from asked a
            where e.key = any (array(select key from asked)) and e.key = a.key and (
                a.is_granted and (e.place = a.place or e.queue = %(queue)s)
                -- One that was committed late waits before those that hold the key.
                or e.queue = %(queue)s
                    and (a.wanted_since, a.wanted_since_id) < (e.since, e.since_id)
            )
        ), another as (
            insert into bgjob_exclusive (
                key, place, tokens, queue, since, since_id, until, until_id, places, slots
            )
            select key, place, %(tokens)s::bigint[], %(queue)s, start_at, start_id,
                granted_until, granted_until_id, places, wanted_slots
            from asked where is_granted and place = rows
        ), refused as materialized (
            select id from bgjob_job
            where id = any (array(select id from judged where not has_key))
                and token = any (%(tokens)s::bigint[])
            for update skip locked
        ), changed as (
            update bgjob_job j
            set exclusive = w.key,
                slots = nullif(w.slots, 1),
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
        ), surplus as materialized (
            -- Those before them are next, and have to be claimed even while the key is held.
            select distinct on (key) key, next_run_at, id
            from judged where is_surplus order by key, ahead
        ), others_aside as (
            -- Jobs of this queue only: they are a range of the index, however many are not
            -- due. The workers of another queue find theirs. Only where a claim has met such
            -- jobs: an old snapshot keeps the entries of all that were put aside.
            update bgjob_job set waits = true
            where ctid = any (array(
                select o.ctid
                from asked e
                join surplus s on s.key = e.key
                cross join lateral (
                    select j.ctid from bgjob_job j
                    where j.exclusive = e.key and not j.waits and j.queue = %(queue)s
                        and (j.next_run_at, j.id) >= (s.next_run_at, s.id)
                        and j.next_run_at <= now() and j.token is null
                    order by j.next_run_at, j.id
                    limit %(aside)s
                    for update skip locked
                ) as o
                where (e.used > 0 or e.is_granted) and e.room <= e.places
                limit %(aside)s
            ))
        )
        select id, token, case when has_key then answer
            when id in (select id from refused) then 0 end
        from judged
        union all select key, null, 1 from granted
        """,
        {
            **lines(claimed, ahead, in_a_row),
            "queue": queue,
            "ids": text_array([c.job.id for c in claimed]),
            "claims": number_array([c.token for c in claimed]),
            "tokens": number_array(list(tokens)),
            "keys": text_array([str(c.job.exclusive) for c in claimed]),
            "charged": number_array([int(c.is_charged) for c in claimed]),
            "ahead": number_array(ahead),
            "in_a_row": in_a_row,
            "most": most,
            "slots": orjson.dumps(dict(slots)).decode(),
            "aside": MOST_ASIDE,
            "holding": number_array(list(tokens.union(holding))),
        },
        partial(answers, claimed),
    )


class Woken(NamedTuple):
    """Due jobs of a priority that have waited for keys."""

    priority: int
    since: datetime
    """The first due time."""


_WAITS_ANYWHERE: LiteralString = """
    (select true from bgjob_job j where j.exclusive = e.key and j.waits order by j.queue limit 1)
"""
_WAITS_IN: LiteralString = """
    select {columns} from bgjob_job j
    where j.exclusive = {line}.key and j.waits and j.queue = {line}.queue
        and (j.next_run_at, j.id) >= ({since})
    order by j.next_run_at, j.id
    limit {limit}
"""
_ITS_SLOTS: LiteralString = "coalesce(greatest(j.slots, 1), 1)"
_FIRST_SINCE = _WAITS_IN.format(line="e", columns=_ITS_SLOTS, since=_SINCE, limit="1")
_FIRST_OF_QUEUE = _WAITS_IN.format(
    line="other", columns=_ITS_SLOTS, since="'-infinity', ''", limit="1"
)
_NEXT_QUEUE: LiteralString = """
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
_WOKEN: LiteralString = "line.room * case when line.used = 0 then %(most)s else 1 end"
_NOTIFY_OF_WOKEN = NOTIFY.format(
    channel="%(channel)s", payload="concat_ws(' ', extract(epoch from since), priority, queue)"
)


def release(queue: str, keys: Iterable[str], *, most: int = 1) -> Statement[list[Woken]]:
    """Wake the first jobs that wait for each of these locked keys, if it has a free slot.

    At most one for each free slot and queue, and so many if no job holds the key. Returns the jobs
    of this queue, whose workers are notified as by an enqueue. Workers of other queues find theirs
    when they poll.
    """
    return Statement(
        f"""
        with recursive held as materialized (
            {_rows("%(keys)s::text[]")}
        ), free as materialized (
            select e.*, e.first_slots is not null or e.used > 0
                or {_WAITS_ANYWHERE} is not null as is_needed
            from (
                select e.*, case when e.since <= now() then ({_FIRST_SINCE}) end as first_slots
                from (
                    -- One queue of its rows, this one if it can be.
                    select key, sum(used)::int as used, {_LEAST} as slots,
                        coalesce(
                            max(queue) filter (where queue = %(queue)s), max(queue)
                        ) as queue,
                        coalesce(
                            min(since) filter (where queue = %(queue)s), min(since)
                        ) as since,
                        coalesce(
                            min(since_id) filter (where queue = %(queue)s), min(since_id)
                        ) as since_id
                    from held
                    group by key having {_HAS_ROOM}
                ) as e
                offset 0
            ) as e
        ), known as (
            select * from free where first_slots is not null
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
        ), line (key, queue, since, since_id, used, room) as materialized (
            select key, queue, since, since_id, used,
                greatest(least(slots, first_slots) - used, 0)
            from known
            union all
            select other.key, other.queue, '-infinity', '', free.used,
                greatest(least(free.slots, ({_FIRST_OF_QUEUE})) - free.used, 0)
            from other join free on free.key = other.key where other.queue > ''
        ), unused as (
            delete from bgjob_exclusive
            where ctid = any (array(
                select ctid from held where key in (select key from free where not is_needed)
            ))
        ), first as materialized (
            select line.*, f.next_run_at, f.id,
                lead(f.id) over (
                    partition by line.key, line.queue order by f.next_run_at, f.id
                ) is null as is_last
            from line
            cross join lateral (
                {
            _WAITS_IN.format(
                line="line", columns=_PLACE, since="line.since, line.since_id", limit=_WOKEN
            )
        }
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
                    and (l.used = 0 or not ({_HOLDS_SLOT.format(job="o", key="l.key")}))
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
    """Keys that have a free slot and whose jobs still wait."""

    keys: list[str]
    after: str
    """The key after which to continue; empty at the end."""


_FIRST_OF_ALL = FIRST_HERE.format(columns=_PLACE, which="j.waits", since="'-infinity', ''")
# Only those before the first that waits: an old snapshot keeps the entries of all jobs that were
# put aside, and they come after it.
_IS_DUE_BEFORE = FIRST_HERE.format(
    columns="true",
    which=f"""
        not j.waits and j.next_run_at <= now() and (j.next_run_at, j.id)
            < (coalesce(first.next_run_at, 'infinity'), coalesce(first.id, ''))
        and (e.used = 0 or not ({_HOLDS_SLOT.format(job="j", key="e.key")}))
    """,
    since=_SINCE,
)
_HOLDERS_THAT_ENDED = HOLDING.format(columns="h.ctid", which="and h.lease_until <= now()").replace(
    "limit e.places", "for update skip locked"
)
_HAS_NOT_ENDED: LiteralString = "and h.id <> all (array(select id from ended))"


def blocked(
    queue: str, *, after: str, limit: int, served: Collection[str] = ()
) -> Statement[Blocked]:
    """Find keys with a free slot whose jobs in this queue still wait.

    Their holders died or were deleted, or their worker died before it had released them. Holders of
    another queue, which may have no worker left, are freed here when their lease has
    ended. Holders of a queue in `served`, the queues of the same worker, are not: that
    worker frees them in its own sweep, and not while it holds them. Keys that no job needs any
    more are found as well. The statement checks the first `limit` rows after the key `after`, so
    that no sweep walks over all of them.
    """
    return Statement(
        f"""
        with looked_at as materialized (
            select key from bgjob_exclusive where key > %(after)s
            order by key limit %(limit)s
        ), ended as (
            update bgjob_job
            set token = null, lease_until = null, deaths = least(deaths, 32766) + 1
            where ctid = any (array(
                select h.ctid from bgjob_exclusive e
                cross join lateral ({_HOLDERS_THAT_ENDED}) as h
                where e.key = any (array(select key from looked_at))
                    and e.queue <> all (%(served)s::text[])
            ))
            returning id
        ), free as materialized (
            select key, sum(used) as used, {_BOUNDS}
            from ({_rows("array(select distinct key from looked_at)", _HAS_NOT_ENDED)}) as e
            group by key having {_HAS_ROOM}
        )
        select array(
            select e.key from free e
            left join lateral (
                ({_FIRST_WAITS}) union all ({_FIRST_OF_ALL}) limit 1
            ) as first on true
            where ({_IS_DUE_BEFORE}) is null
                and (first.id is not null or e.used = 0 and {_WAITS_ANYWHERE} is null)
        ), case when count(*) = %(limit)s then max(key) else '' end
        from looked_at
        """,
        {"queue": queue, "after": after, "limit": limit, "served": [queue, *served]},
        lambda rows: Blocked(*rows[0]),
    )
