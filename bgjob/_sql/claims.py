"""Claim due jobs, and free the jobs of dead workers.

All these statements are put together from the same parts: due jobs, ended leases, and
what a claim writes. So they lie in one module of over 400 lines.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import repeat
from operator import add, itemgetter
from typing import LiteralString, NamedTuple

from bgjob._headers import read
from bgjob._sql.session import IS_OURS
from bgjob._sql.statement import (
    Row,
    Statement,
    in_range,
    in_range_or_null,
    nothing,
    number_array,
    text_array,
)
from bgjob._sql.tokens import CHOICE
from bgjob._sql.transactions import SESSION_NAME
from bgjob.job import Job

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _time(microseconds: str | None) -> datetime | None:
    return None if microseconds is None else _EPOCH + timedelta(microseconds=int(microseconds))


def _same(text: str | None) -> str | None:
    return text


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _seconds(text: str | None) -> float | None:
    return None if text is None else float(text)


class _Rare(NamedTuple):
    """A column that is null for the usual job."""

    name: LiteralString
    text: LiteralString
    """Its value as text, whatever the settings of the session."""
    read: Callable[[str | None], object]


# The last fields of Job, in their order. A claim returns them as one column, an array of their
# texts. For the usual job it is null, and costs the same however many there are.
_RARE = (
    _Rare(
        "expires",
        f"(extract(epoch from {in_range_or_null('expires')}) * 1000000)::bigint::text",
        _time,
    ),
    _Rare("headers", "headers::text", read),
    _Rare("group_id", "group_id", _same),
    _Rare("group_dead", "group_dead::text", _number),
    _Rare("keep", "keep::text", _seconds),
)
_IS_RARE: LiteralString = " or ".join(f"{rare.name} is not null" for rare in _RARE)

JOB_COLUMNS = f"""
    id, queue, type, arg, attempt, last_error, priority,
    {in_range("next_run_at")}, {in_range("created_at")}, {in_range("updated_at")}, exclusive,
    case when {_IS_RARE} then array[{", ".join(rare.text for rare in _RARE)}] end
"""

_LARGEST: LiteralString = "65536"
"""The most bytes of a payload that a claim returns; a larger one is fetched before its handler."""

_ELSEWHERE: LiteralString = "62676a6f62207061796c6f616420d98d1f06b15e4c7a9e3302c468af70e5"
ELSEWHERE = bytes.fromhex(_ELSEWHERE)
"""Stands for a large payload in a claim's result. A payload that equals it is fetched too.

In a claimed job it is always this object, so that `is` finds it without comparing payloads."""

# PostgreSQL knows the size of an out-of-line payload without reading it.
_SMALL_ARG = f"""
    case when octet_length(arg) > {_LARGEST} then decode('{_ELSEWHERE}', 'hex') else arg end
"""
CLAIMED_COLUMNS = JOB_COLUMNS.replace(" arg,", f" {_SMALL_ARG},")

# The priorities in use, without a scan over their rows.
PRIORITIES = """
    with recursive line (priority) as (
        (
            select priority from bgjob_job where queue = %(queue)s and not waits
            order by priority limit 1
        )
        union all
        select (
            select j.priority from bgjob_job j
            where j.queue = %(queue)s and j.priority > line.priority and not j.waits
            order by j.priority limit 1
        ) from line where line.priority is not null
    )
"""


_TAKE = """
    token = %(token)s,
    lease_until = clock_timestamp() + %(lease)s * interval '1 second',
    attempt = least(attempt, 2147483646) + 1
"""

# After one death, which is usually not the job's fault, a job is claimed like any other. After
# more it is a suspect; see _engine/isolation.py.
FRESH = "j.lease_until is null and j.deaths <= 1"

# A worker that was starved, or had no server, finds its own leases ended. It extends or settles
# the jobs that it holds, and never frees them. A row edited by hand may have no token.
_ENDED = "j.lease_until <= now() and (j.token <> all (%(held)s::bigint[])) is not false"

# Jobs of this worker's claims whose answer was lost never started, whatever their lease.
_FREEABLE = f"({_ENDED} or j.token = any (%(unanswered)s::bigint[]))"

# Independent of the row: evaluated once a statement; a paused queue's rows are not read.
UNPAUSED: LiteralString = """
    not exists (select from bgjob_pause p where p.queue = %(queue)s and p.until > now())
"""

# A worker that does not know of a limit claims nothing, until a survey tells it: of its queue, or
# of any type. Usually the table is empty.
WITHIN_LIMITS: LiteralString = """
    not exists (
        select from bgjob_limit l where l.is_set and (
            l.scope = 'queue' and l.name = %(queue)s and not %(has_ration)s
            or l.scope = 'type' and l.name <> all (%(known)s::text[])
        )
    )
"""

OPEN: LiteralString = f"{UNPAUSED} and {WITHIN_LIMITS}"


def _due(lines: LiteralString, which: LiteralString, more: LiteralString = "") -> LiteralString:
    return f"""
        {lines}
        cross join lateral (
            select j.ctid, j.lease_until is not null as ended, j.id, j.token {more}
            from bgjob_job j
            where j.queue = %(queue)s and j.priority = line.priority
                and j.next_run_at >= line.since and j.next_run_at <= now() and not j.waits
                and ({which})
            order by j.next_run_at
            limit %(limit)s
            for update skip locked
        ) as due
        limit %(limit)s
    """


# Whether no transaction in progress has claimed or locked the row: then xmax is 0, or of one that
# has ended without a change. `skip locked` alone tries for two locks of each row that another
# session's uncommitted claim has, in the same partition of the lock table. Where 100 workers
# drained one queue these tries took most of the sessions' time (LWLock:LockManager in
# benchmarks/shares.py), which kept the claims open for longer. The snapshot is read once for the
# claim, in selects of its own: it has the numbers of 100 workers' transactions, and reading it for
# each row halved what they drained. A sweep does without this, so it finds the rows whose old xmax
# is misread, of an earlier epoch or with several lockers.
_UNTOUCHED: LiteralString = """(
    j.xmax = '0'::xid or pg_visible_in_snapshot(
        ((select pg_snapshot_xmax(pg_current_snapshot())::text::bigint >> 32 << 32)
            + j.xmax::text::bigint)::text::xid8,
        (select pg_current_snapshot())
    )
)"""

_MARKS: LiteralString = """
    (
        select priority, since
        from unnest(%(priorities)s::smallint[], %(marks)s::timestamptz[]) as m (priority, since)
    ) as line
"""
_LINES_FROM_MARKS = f"select due.ctid from {_MARKS}"

_CLAIM = f"""
    update bgjob_job set {_TAKE}
    where ctid = any (array({_due(_LINES_FROM_MARKS, f"{FRESH} and {_UNTOUCHED} and {OPEN}")}))
    returning {CLAIMED_COLUMNS}, ctid::text
"""

# Most queues have one priority. Without the join an idle worker claims a job in 0.6
# instead of 0.75 ms.
_CLAIM_OF_ONE_PRIORITY = f"""
    update bgjob_job set {_TAKE}
    where ctid = any (array(
        select j.ctid from bgjob_job j
        where j.queue = %(queue)s and j.priority = %(priority)s
            and j.next_run_at >= %(mark)s::timestamptz and j.next_run_at <= now()
            and not j.waits and {FRESH} and {_UNTOUCHED} and {OPEN}
        order by j.next_run_at
        limit %(limit)s
        for update skip locked
    ))
    returning {CLAIMED_COLUMNS}, ctid::text
"""

_LINES = f"""
    {PRIORITIES}
    select due.ctid, due.ended, due.id, due.token
    from (
        select priority, timestamptz '-infinity' as since from line where priority is not null
    ) as line
"""

# The handler of a freed claim may still run in its transaction, in a worker that is stopped
# or cut off, and keep locks that the next attempt needs: end its session. Usually there is
# none.
_END_SESSIONS = f"""
    case when exists (select from due where ended) then (
        select count(pg_terminate_backend(a.pid)) from pg_stat_activity a
        where {IS_OURS} and a.application_name = any (array(
            select {SESSION_NAME.format("token", "id")} from due where ended
        ))
    ) end
"""

# A claim whose answer was lost is undone. A group, the only claim of rows with more than one
# death, may or may not have charged an attempt, so its attempts stay as they are.
_SET_FREE = """
    update bgjob_job
    set token = null,
        lease_until = null,
        attempt = attempt
            - (deaths <= 1 and attempt > 0 and token = any (%(unanswered)s::bigint[]))::int,
        deaths = least(deaths, 32766)
            + ((token = any (%(unanswered)s::bigint[])) is not true)::int
"""

# The first due time of the freed jobs that the next claim may take.
_FIRST_FREED = f"min({in_range('next_run_at')}) filter (where deaths <= 1)"

# The types of which jobs wait for their limit, by a skip scan: of the usual queue, none.
_HELD_BACK: LiteralString = """
    array(
        with recursive held (type) as (
            (
                select j.type from bgjob_job j
                where j.queue = %(queue)s and j.limited and j.waits order by j.type limit 1
            )
            union all
            select (
                select j.type from bgjob_job j
                where j.queue = %(queue)s and j.type > held.type and j.limited and j.waits
                order by j.type limit 1
            ) from held where held.type is not null
        )
        select type::text from held where type is not null limit 1000
    )
"""

_HAS_KEYS: LiteralString = "exists (select from bgjob_exclusive)"

# The jobs of a dead worker are only freed here, also while the queue is paused, and claimed
# by a later claim.
_SWEEP = f"""
    with due as materialized ({_due(_LINES, f"{FRESH} and {OPEN} or {_FREEABLE}")}),
    freed as (
        {_SET_FREE}
        where ctid = any (array(select ctid from due where ended))
        returning deaths, next_run_at
    ), claimed as (
        update bgjob_job set {_TAKE}
        where ctid = any (array(select ctid from due where not ended))
        returning {CLAIMED_COLUMNS}, ctid::text
    )
    select claimed.*, freed.ended, freed.since, freed.count, freed.held_back, freed.has_keys
    from (
        select count(*), {_END_SESSIONS} as ended, {_FIRST_FREED} as since,
            {_HELD_BACK} as held_back, {_HAS_KEYS} as has_keys
        from freed
    ) as freed
    left join claimed on true
"""

_FREED = f"""
    freed as (
        {_SET_FREE}
        where ctid = any (array(select ctid from due))
        returning deaths, next_run_at
    )
    select {_END_SESSIONS}, {_FIRST_FREED}, count(*), {_HELD_BACK}, {_HAS_KEYS} from freed
"""
_FREE = f"with due as materialized ({_due(_LINES, _FREEABLE)}), {_FREED}"

_LINES_OF_WINDOW = """
    select due.ctid, due.ended, due.id, due.token
    from (
        select priority, %(since)s::timestamptz as since
        from unnest(%(priorities)s::smallint[]) as w (priority)
    ) as line
"""
WITHIN = "j.next_run_at < %(until)s::timestamptz"
_FREE_WITHIN = f"""
    with due as materialized ({_due(_LINES_OF_WINDOW, f"{_FREEABLE} and {WITHIN}")}), {_FREED}
"""

# For a worker that knows of types with a limit. Their jobs are not claimed here, but put aside, and
# claimed from there (`claim_limited`), suspects one by one. A claim that meets one puts aside those
# of the next thousand due jobs, so that even claims of one job soon meet other types.
_MOST_ASIDE: LiteralString = "1000"
_IS_LIMITED: LiteralString = ", j.type = any (%(limited)s::text[]) as is_limited"
_FRESH_OR_LIMITED: LiteralString = """
    j.lease_until is null and (j.deaths <= 1 or j.type = any (%(limited)s::text[]))
"""
_PUT_ASIDE = "update bgjob_job set waits = true, limited = true where ctid = any"

_CLAIM_OTHERS = f"""
    with due as materialized (
        {
    _due(
        f"select due.ctid, due.is_limited from {_MARKS}",
        f"{_FRESH_OR_LIMITED} and {OPEN}",
        _IS_LIMITED,
    )
}
    ), next as materialized (
        select next.ctid
        from {_MARKS}
        cross join lateral (
            select j.ctid, j.type from bgjob_job j
            where j.queue = %(queue)s and j.priority = line.priority
                and j.next_run_at >= line.since and j.next_run_at <= now() and not j.waits
            order by j.next_run_at
            limit {_MOST_ASIDE}
        ) as next
        where next.type = any (%(limited)s::text[]) and exists (select from due where is_limited)
        limit {_MOST_ASIDE}
    ), aside as (
        {_PUT_ASIDE} (array(select ctid from due where is_limited) || array(
            select j.ctid from bgjob_job j
            where j.ctid = any (array(select ctid from next)) and j.lease_until is null
            for update skip locked
        ))
        returning type
    ), claimed as (
        update bgjob_job set {_TAKE}
        where ctid = any (array(select ctid from due where not is_limited))
        returning {CLAIMED_COLUMNS}, ctid::text
    )
    select claimed.*, aside.met, aside.types
    from (
        select array(select distinct type::text from aside) as types,
            (select count(*) from due where is_limited) as met
    ) as aside
    left join claimed on true
"""

_SWEEP_OTHERS = f"""
    with due as materialized ({
    _due(
        _LINES.replace("due.token", "due.token, due.is_limited"),
        f"{_FRESH_OR_LIMITED} and {OPEN} or {_FREEABLE}",
        _IS_LIMITED,
    )
}),
    freed as (
        {_SET_FREE}
        where ctid = any (array(select ctid from due where ended))
        returning deaths, next_run_at
    ), aside as (
        {_PUT_ASIDE} (array(select ctid from due where not ended and is_limited))
        returning type
    ), claimed as (
        update bgjob_job set {_TAKE}
        where ctid = any (array(select ctid from due where not ended and not is_limited))
        returning {CLAIMED_COLUMNS}, ctid::text
    )
    select claimed.*, freed.ended, freed.met, freed.since, freed.count, freed.held_back,
        freed.has_keys
    from (
        select count(*), {_END_SESSIONS} as ended, {_FIRST_FREED} as since,
            (select count(*) from aside) as met,
            array(select distinct type::text from aside) || {_HELD_BACK} as held_back,
            {_HAS_KEYS} as has_keys
        from freed
    ) as freed
    left join claimed on true
"""

# The jobs before the first suspect, or that one alone.
_CLAIM_LIMITED = f"""
    with due as materialized (
        select j.ctid, j.deaths > 1 as is_suspect from bgjob_job j
        where j.queue = %(queue)s and j.type = %(type)s and j.limited and j.waits
            and j.lease_until is null and j.next_run_at <= now() and {OPEN}
        order by j.priority, j.next_run_at
        limit %(limit)s
        for update skip locked
    ), line as materialized (
        select *, row_number() over () as n from due
    )
    update bgjob_job set {_TAKE}, waits = false, limited = false
    where ctid = any (array(
        select ctid from line
        where n = 1 or n < coalesce((select min(n) from line where is_suspect), 2147483647)
    ))
    returning {CLAIMED_COLUMNS}, ctid::text
"""

_SUSPECTS = f"""
    j.queue = %(queue)s and j.deaths > 1 and j.lease_until is null
    and j.next_run_at <= now() and not j.waits and {OPEN}
    and j.type <> all (%(limited)s::text[])
"""

# The order of bgjob_job_suspect, which no other index has, so that the plan walks over no due
# jobs that are not suspects. Not `deaths =`: then bgjob_job_due would have that order as well.
_SUSPECTS_IN_ORDER = "order by j.deaths desc, j.priority, j.next_run_at"

HAS_SUSPECTS = f"""
    (select true from bgjob_job j where {_SUSPECTS} {_SUSPECTS_IN_ORDER} limit 1) is not null
"""

# Suspects with as many deaths are a class, and a group is the first half of one. The token chooses
# the class, as if at random: the largest, or any. What was tried, by long runs in which a kill
# every two seconds and 320 jobs of 4 to 7 s a minute made suspects of up to half of these: that
# with the most deaths always first kept 446 suspects waiting for over 190 s behind a killer and
# what had died with it. Always any, of which most were single jobs: 1,500 were left after 1,000 s.
#
# Twice the limit is enough to count them. Choosing the half at random was no better: three
# killers that all strike immediately took 120 to 160 deaths instead of 105 to use up their 25
# attempts each. A job that is claimed alone is charged an attempt.
_FIRST_CLASS = f"""
    select j.deaths from bgjob_job j where {_SUSPECTS} {{which}} {_SUSPECTS_IN_ORDER} limit 1
"""
_CHOICE = CHOICE.format("%(token)s")
_CLAIM_GROUP = f"""
    with recursive line (deaths) as (
        ({_FIRST_CLASS.format(which="")})
        union all
        select ({_FIRST_CLASS.format(which="and j.deaths < line.deaths")})
        from line where line.deaths is not null
    ), size as materialized (
        select deaths, (
            select count(*) from (
                select from bgjob_job j
                where {_SUSPECTS} and j.deaths >= line.deaths and j.deaths <= line.deaths
                {_SUSPECTS_IN_ORDER}
                limit 2 * %(limit)s
            ) as one
        ) as jobs
        from line where line.deaths is not null
    ), chosen as materialized (
        select deaths from size
        order by case when mod({_CHOICE}, 2) = 0 then jobs end desc, deaths desc
        offset case when mod({_CHOICE}, 2) = 1
            then mod({_CHOICE} / 2, greatest((select count(*) from size), 1)) else 0
        end
        limit 1
    ), class as materialized (
        select j.ctid from bgjob_job j
        where {_SUSPECTS}
            and j.deaths >= (select deaths from chosen)
            and j.deaths <= (select deaths from chosen)
        {_SUSPECTS_IN_ORDER}
        limit 2 * %(limit)s
        for update skip locked
    ), half as (
        select (count(*) + 1) / 2 as jobs from class
    )
    update bgjob_job
    set token = %(token)s,
        lease_until = clock_timestamp() + %(lease)s * interval '1 second',
        attempt = least(attempt, 2147483646) + (select (jobs = 1 and %(charge)s)::int from half)
    where ctid = any (array(select ctid from class limit (select jobs from half)))
    returning {CLAIMED_COLUMNS}, deaths
"""

# Where none is due, one that waits for the limit of its type.
_CLAIM_ANY = f"""
    with due as materialized (
        {_due(_LINES, f"(j.lease_until is null or {_ENDED}) and {UNPAUSED}")}
    ), aside as materialized (
        select j.ctid from bgjob_job j
        where j.queue = %(queue)s and j.limited and j.waits
            and j.lease_until is null and j.next_run_at <= now() and {UNPAUSED}
            and not exists (select from due)
        order by j.type, j.priority, j.next_run_at
        limit %(limit)s
        for update skip locked
    ), taken as (
        update bgjob_job
        set {_TAKE}, deaths = least(deaths, 32766) + (lease_until is not null)::int,
            waits = false, limited = false
        where ctid = any (array(select ctid from due) || array(select ctid from aside))
        returning {JOB_COLUMNS}
    )
    select taken.*, {_END_SESSIONS} from taken
"""


class Rations(NamedTuple):
    """What a worker has rations of, and which limits it knows."""

    has_queue: bool = False
    """Whether it has one of its queue's limit."""
    limited: Sequence[str] = ()
    """The types whose jobs are put aside, and claimed by `claim_limited`."""
    ample: Sequence[str] = ()
    """The types with a limit whose jobs are claimed like others: the ration is enough."""

    @property
    def params(self) -> dict[str, object]:
        """The parameters of statements that obey the limits."""
        limited, ample = self.limited, self.ample
        return {
            "has_ration": self.has_queue,
            "limited": text_array(limited) if limited else _NO_TYPES,
            "known": text_array([*limited, *ample]) if limited or ample else _NO_TYPES,
        }


_NO_TYPES = text_array([])
NO_RATIONS = Rations()


def claim(
    queue: str,
    *,
    limit: int,
    lease: float,
    token: int,
    marks: Mapping[int, datetime],
    rations: Rations = NO_RATIONS,
) -> Statement[list[Job]]:
    """Claim due jobs of these priorities, from their marks on.

    Claimed and returned in (priority, next_run_at) order. None where there is a limit that the
    worker has no ration of, or does not know.
    """
    params: dict[str, object] = {
        "queue": queue,
        **rations.params,
        "limit": limit,
        "lease": lease,
        "token": token,
    }
    if len(marks) == 1:
        [(priority, mark)] = marks.items()
        params |= {"priority": priority, "mark": mark}
        return Statement(_CLAIM_OF_ONE_PRIORITY, params, _in_order_of_due)
    priorities = sorted(marks)
    params |= {"priorities": priorities, "marks": [marks[priority] for priority in priorities]}
    return Statement(_CLAIM, params, _in_order)


class Others(NamedTuple):
    """Claimed jobs of types without a limit, and what the claim put aside."""

    jobs: list[Job]
    met: int
    """How many jobs of limited types it met instead of others."""
    held_back: Sequence[str]
    """Their types, and those of the next jobs."""


def claim_others(
    queue: str,
    *,
    limit: int,
    lease: float,
    token: int,
    marks: Mapping[int, datetime],
    rations: Rations,
) -> Statement[Others]:
    """Claim due jobs of types without a limit; put those of the others aside."""
    priorities = sorted(marks)
    params = {
        "queue": queue,
        **rations.params,
        "limit": limit,
        "lease": lease,
        "token": token,
        "priorities": priorities,
        "marks": [marks[priority] for priority in priorities],
    }
    return Statement(_CLAIM_OTHERS, params, _others)


def _others(rows: Sequence[Row]) -> Others:
    found = [row for row in rows if row[0] is not None]
    return Others(_jobs(sorted(found, key=_by_due)), *rows[0][-2:])


def claim_limited(
    queue: str,
    type_: str,
    *,
    limit: int,
    lease: float,
    token: int,
    rations: Rations,
) -> Statement[list[Job]]:
    """Claim jobs of a type that were put aside; a suspect alone.

    The worker has a ration of the type's limit, or the type has no limit any more.
    """
    params = {
        "queue": queue,
        "type": type_,
        **rations.params,
        "limit": limit,
        "lease": lease,
        "token": token,
    }
    return Statement(_CLAIM_LIMITED, params, _in_order)


class Swept(NamedTuple):
    """The jobs that a sweep claimed, and how many it freed."""

    jobs: list[Job]
    freed: int
    since: datetime | None = None
    """The first due time of the freed jobs that are not suspects, which any claim may take."""
    held_back: Sequence[str] = ()
    """The types of which jobs wait for their limit."""
    has_keys: bool = False
    """Whether the table of exclusive keys has a row."""
    met: int = 0
    """How many jobs of limited types it met instead of others, and put aside."""


def sweep(
    queue: str,
    *,
    limit: int,
    lease: float,
    token: int,
    held: Sequence[int] = (),
    unanswered: Sequence[int] = (),
    rations: Rations = NO_RATIONS,
) -> Statement[Swept]:
    """Claim due jobs of all priorities, whatever their marks; free those whose lease has ended.

    Jobs with a token in `held` are not freed: the worker itself holds them. Jobs with a token
    in `unanswered` are freed before their lease ends, without a death, and their attempt is
    given back: the answer to their claim was lost, so they never started.
    """
    return Statement(
        _SWEEP_OTHERS if rations.limited else _SWEEP,
        {
            "queue": queue,
            **rations.params,
            "limit": limit,
            "lease": lease,
            "token": token,
            "held": number_array(held),
            "unanswered": number_array(unanswered),
        },
        _swept_others if rations.limited else _swept,
    )


_NEXT = f"""
    with due as materialized (
        {_due(_LINES, f"(j.lease_until is null or {_ENDED}) and {UNPAUSED}")}
    )
    select ctid::text, id from due
"""


def next_due(queue: str, *, limit: int) -> Statement[list[tuple[str, str]]]:
    """Lock the jobs that the next claim takes; return their positions and ids."""
    return Statement(
        _NEXT, {"queue": queue, "limit": limit, "held": number_array([])}, _pairs, prepare=False
    )


def try_claim(places: Sequence[str]) -> Statement[None]:
    """Claim the jobs at these positions, to test whether the server refuses that."""
    return Statement(
        f"update bgjob_job set {_TAKE} where ctid = any (%(places)s::tid[])",
        {"places": text_array(places), "token": 0, "lease": 1.0},
        nothing,
        prepare=False,
    )


def _pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(place, id_) for place, id_ in rows]


def free(
    queue: str, *, limit: int, held: Sequence[int] = (), unanswered: Sequence[int] = ()
) -> Statement[Swept]:
    """Free jobs as `sweep` does, without claiming."""
    return Statement(
        _FREE,
        {
            "queue": queue,
            "limit": limit,
            "held": number_array(held),
            "unanswered": number_array(unanswered),
        },
        _only_freed,
    )


def _only_freed(rows: Sequence[Row]) -> Swept:
    [(_, since, freed, held_back, has_keys)] = rows
    return Swept([], freed, since, held_back, has_keys)


class Window(NamedTuple):
    """The part of a queue that a sweep checks if the whole would take too long."""

    since: datetime
    until: datetime
    """The end of the due times; exclusive."""
    priorities: tuple[int, ...]
    """The known priorities, in order."""


def free_within(
    queue: str,
    window: Window,
    *,
    limit: int,
    held: Sequence[int] = (),
    unanswered: Sequence[int] = (),
) -> Statement[Swept]:
    """Free jobs whose lease has ended, within a window; see `free`."""
    params = {
        **within(queue, window),
        "limit": limit,
        "held": number_array(held),
        "unanswered": number_array(unanswered),
    }
    return Statement(_FREE_WITHIN, params, _only_freed)


def within(queue: str, window: Window) -> dict[str, object]:
    """Return the parameters of a window."""
    return {
        "queue": queue,
        "since": window.since,
        "until": window.until,
        "priorities": number_array(window.priorities),
    }


class Group(NamedTuple):
    """Suspects that were claimed together."""

    jobs: list[Job]
    deaths: int
    """The most deaths of one of them."""


def claim_group(
    queue: str,
    *,
    limit: int,
    lease: float,
    token: int,
    charge: bool,
    rations: Rations = NO_RATIONS,
) -> Statement[Group]:
    """Claim the first half of the due suspects with as many deaths; at most `limit`.

    Of several numbers of deaths the token chooses that of most suspects, or any.

    A job that is claimed alone is charged an attempt if `charge`; several are charged nothing.
    """
    return Statement(
        _CLAIM_GROUP,
        {
            "queue": queue,
            **rations.params,
            "limit": limit,
            "lease": lease,
            "token": token,
            "charge": charge,
        },
        _group,
    )


def _group(rows: Sequence[Row]) -> Group:
    return Group(_in_order(rows), max((row[-1] for row in rows), default=0))


def claim_any(queue: str, *, lease: float, token: int) -> Statement[list[Job]]:
    """Claim the first due job, also one whose last worker died; regardless of limits."""
    return Statement(
        _CLAIM_ANY,
        {"queue": queue, "limit": 1, "lease": lease, "token": token, "held": number_array(())},
        _in_order,
    )


# The same by the running clock: now() stands still while a transaction is open.
_CLAIM_NOW = _CLAIM_ANY.replace("now()", "clock_timestamp()")


def claim_now(queue: str, *, lease: float, token: int) -> Statement[list[Job]]:
    """Claim the first due job, also one that this transaction made due; see claim_any."""
    return claim_any(queue, lease=lease, token=token)._replace(text=_CLAIM_NOW)


# An update returns rows unordered. Rows of one priority are sorted twice as fast.


def _in_order_of_due(rows: Sequence[Row]) -> list[Job]:
    return _jobs(sorted(rows, key=_by_next_run_at))


def _jobs(rows: Sequence[Row]) -> list[Job]:
    jobs = jobs_of(rows)
    if ELSEWHERE in map(_payload, jobs):
        jobs = [job._replace(arg=ELSEWHERE) if job.arg == ELSEWHERE else job for job in jobs]
    return jobs


def jobs_of(rows: Sequence[Row]) -> list[Job]:
    """Return the jobs of rows that begin with JOB_COLUMNS."""
    if any(map(_rare, rows)):
        return [_make_job((*row[:_USUAL], *_read_rare(row[_USUAL]))) for row in rows]
    columns = map(add, map(_usual, rows), repeat(_NOTHING_RARE))
    return list(map(_make_job, columns))


def _read_rare(texts: Sequence[str | None] | None) -> tuple[object, ...]:
    if texts is None:
        return _NOTHING_RARE
    return tuple(rare.read(text) for rare, text in zip(_RARE, texts, strict=True))


def _swept(rows: Sequence[Row]) -> Swept:
    found = [row for row in rows if row[0] is not None]
    since, freed, held_back, has_keys = rows[0][-4:]
    return Swept(_jobs(sorted(found, key=_by_due)), freed, since, held_back, has_keys)


def _swept_others(rows: Sequence[Row]) -> Swept:
    return _swept(rows)._replace(met=rows[0][-5])


def _in_order(rows: Sequence[Row]) -> list[Job]:
    return _jobs(sorted(rows, key=_by_due))


_USUAL = len(Job._fields) - len(_RARE)
_NOTHING_RARE = tuple(rare.read(None) for rare in _RARE)
_usual = itemgetter(slice(_USUAL))
_rare = itemgetter(_USUAL)
_payload = itemgetter(3)
_by_due = itemgetter(6, 7)  # priority and due time
_by_next_run_at = itemgetter(7)
_make_job = partial(tuple.__new__, Job)  # a third of the time of Job(*row)
