"""Keys of one slot that no other job has or is to get first: granted to all their claimed jobs.

This is the usual case, and takes one pass over each key: its row, its jobs up to the last one that
was claimed, and one write of the row. No job is read or answered by itself. `keys.acquire` decides
about all other keys, job by job.
"""

from collections import Counter
from collections.abc import Sequence
from typing import LiteralString

from bgjob._sql.key_rows import BEFORE_LAST, FIRST_HERE, HOLDING, JOINED
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Row, number_array, text_array

# From where to search jobs of this queue. After the clock was set back, jobs may be due before a
# stored time in the future.
_IS_BOUNDED: LiteralString = "e.queue = %(queue)s and e.since <= now()"
_SINCE = f"""
    case when {_IS_BOUNDED} then e.since else '-infinity' end,
    case when {_IS_BOUNDED} then e.since_id else '' end
"""
_NONE_WAITS = f"""
    ({FIRST_HERE.format(columns="true", which=f"j.waits and {BEFORE_LAST}", since=_SINCE)}) is null
"""

UNDISPUTED = f"""
    alone as materialized (
        -- `lock_keys` has granted them.
        select key from bgjob_exclusive
        where key = any (%(alone)s::text[]) and place = 0
            and xmin = pg_current_xact_id()::xid and tokens && %(tokens)s::bigint[]
    ), undisputed as materialized (
        -- All jobs up to the last one are asked for, but for those that have the key here already.
        -- With one slot in its first row, a key has no holder in another row.
        select e.ctid, j.*, h.id is not null as is_ours, h.next_run_at as first_at,
            h.id as first_id
        from unnest(
            %(lines)s::text[], %(last_ids)s::text[], %(last_claims)s::bigint[], %(counts)s::int[]
        ) as k (key, id, token, count)
        cross join lateral (
            select e.*, e.ctid, j.next_run_at as wanted_until, j.id as wanted_until_id
            from bgjob_exclusive e
            cross join (
                select next_run_at, id from bgjob_job where id = k.id and token = k.token
            ) as j
            where e.key = k.key and e.place = 0
            limit 1
        ) as e
        left join lateral ({HOLDING.format(columns="h.next_run_at, h.id", which="")}) as h on true
        cross join lateral (
            -- Of several due at the first or last time, the id of a bound may be another's.
            select count(*) as count,
                count(*) filter (where token = any (%(tokens)s::bigint[]) and slots is null) as own,
                min(next_run_at) as since, min(id) as since_id,
                max(next_run_at) as until, max(id) as until_id
            from (
                select j.next_run_at, j.id, j.token, j.slots from bgjob_job j
                where j.exclusive = e.key and not j.waits and j.queue = %(queue)s
                    and (j.next_run_at, j.id) >= ({_SINCE})
                    and (j.next_run_at, j.id) <= (e.wanted_until, e.wanted_until_id)
                    and (h.id is null or (j.next_run_at, j.id) > (e.until, e.until_id))
                order by j.next_run_at, j.id
                limit k.count + 1
            ) as j
        ) as j
        where k.key not in (select key from alone)
            and e.slots = 1 and (h.id is null or e.tokens && %(holding)s::bigint[])
            and j.count = k.count and j.own = k.count and {_NONE_WAITS}
    ), taken_whole as (
        update bgjob_exclusive e
        set queue = %(queue)s,
            since = case when u.is_ours then u.first_at else u.since end,
            since_id = case when u.is_ours then u.first_id else u.since_id end,
            tokens = case when u.is_ours then {JOINED} else %(tokens)s::bigint[] end,
            until = u.until, until_id = u.until_id, places = 1, slots = 1
        from undisputed u
        where e.ctid = any (array(select ctid from undisputed)) and e.ctid = u.ctid
        returning e.key
    ), granted as materialized (
        select key from alone union all select key from taken_whole
    )
"""
"""Grants keys; `granted` has these."""


def lines(claimed: Sequence[Claimed], ahead: Sequence[int], most: int) -> dict[str, object]:
    """Return the parameters: the keys of which no job is to be put aside, for UNDISPUTED.

    Args:
        claimed: jobs with their keys, those of a key as they are due.
        ahead: for each job its number among those of its key.
        most: the last number that is not put aside.

    """
    keys = [c.job.exclusive or "" for c in claimed]
    surplus = {key for key, number in zip(keys, ahead, strict=True) if number > most}
    counts = Counter(keys)
    last = dict(zip(keys, claimed, strict=True))
    whole = [key for key in counts if key not in surplus]
    return {
        "alone": text_array([key for key in whole if counts[key] == 1]),
        "lines": text_array(whole),
        "last_ids": text_array([last[key].job.id for key in whole]),
        "last_claims": number_array([last[key].token for key in whole]),
        "counts": number_array([counts[key] for key in whole]),
    }


def answers(claimed: Sequence[Claimed], rows: Sequence[Row]) -> dict[tuple[str, int], int | None]:
    """Return the slots of each job's key, by id and token.

    Args:
        claimed: the jobs.
        rows: an id, its token and its slots; or a granted key without a token.

    """
    granted = {key for key, token, _ in rows if token is None}
    slots = {(id_, token): slots for id_, token, slots in rows if token is not None}
    if granted:
        slots |= {(c.job.id, c.token): 1 for c in claimed if c.job.exclusive in granted}
    return slots
