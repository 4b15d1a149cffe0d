"""Enqueue jobs, and notify the workers of their queues."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import add
from typing import Literal, LiteralString, NamedTuple, TypeAlias

from bgjob._checks import seconds
from bgjob._headers import stored
from bgjob._postgres.cursor import Floats, Payloads, Texts, Times
from bgjob._sql.notices import (
    CHANNEL,
    EVERYTHING,
    LATER,
    LOCK_CLASS,
    NOTIFY,
    bucket,
    channel,
)
from bgjob._sql.results import reserved
from bgjob._sql.statement import Row, Statement, nothing, number_array, text_array
from bgjob.job import EnqueueRequest

# The lock is taken after the insert and before the commit, and released after
# the row is visible. So a worker that gets it exclusively sees the row.
_ENQUEUE = """
    insert into bgjob_job (id, queue, type, arg, priority)
    values (%(id)s, %(queue)s, %(type)s, %(arg)b, %(priority)s)
    on conflict (id) do nothing
    returning
"""

_OTHERS: LiteralString = """
    insert into bgjob_job (
        id, queue, type, arg, priority, exclusive, next_run_at, headers, expires{column}
    )
    values (
        %(id)s, %(queue)s, %(type)s, %(arg)b, %(priority)s, %(exclusive)s,
        greatest(cast(%(run_at)s as timestamptz), clock_timestamp())
            + %(delay)s * interval '1 second',
        cast(cast(%(headers)s as text) as json),
        coalesce(
            cast(%(expires_at)s as timestamptz),
            clock_timestamp() + cast(%(expires_in)s as float8) * interval '1 second'
        ){value}
    )
    on conflict (id) do nothing
    returning
"""


# A statement of its own: no other looks into bgjob_result.
_WITH_KEEP: LiteralString = """
    with {reserved}
    insert into bgjob_job (
        id, queue, type, arg, priority, exclusive, next_run_at, headers, expires, keep{column}
    )
    select id, cast(%(queue)s as text), cast(%(type)s as text), cast(%(arg)b as bytea),
        cast(%(priority)s as smallint), cast(%(exclusive)s as text),
        greatest(cast(%(run_at)s as timestamptz), clock_timestamp())
            + cast(%(delay)s as float8) * interval '1 second',
        cast(cast(%(headers)s as text) as json),
        coalesce(
            cast(%(expires_at)s as timestamptz),
            clock_timestamp() + cast(%(expires_in)s as float8) * interval '1 second'
        ),
        cast(%(keep)s as float8){value}
    from reserved
    on conflict (id) do nothing
    returning
"""


_Columns: TypeAlias = tuple[Literal["plain", "others", "keep"], bool]


def _inserts() -> Iterator[tuple[_Columns, LiteralString]]:
    yield ("plain", False), _ENQUEUE
    for has_slots in (False, True):
        column: LiteralString = ", slots" if has_slots else ""
        value: LiteralString = ", cast(%(slots)s as smallint)" if has_slots else ""
        taking = reserved("array[cast(%(id)s as text)]")
        yield ("others", has_slots), _OTHERS.format(column=column, value=value)
        yield ("keep", has_slots), _WITH_KEEP.format(reserved=taking, column=column, value=value)


_INSERTS: Mapping[_Columns, LiteralString] = dict(_inserts())
"""By what is written, and whether there are slots: few columns for a plain job."""


# When its transaction began, which says how far behind the others it may be; the
# priority, with a sign if the job is due later; the queue.
def _tell_of(sign: LiteralString) -> LiteralString:
    payload: LiteralString = (
        f"concat_ws(' ', extract(epoch from now()), concat(%(priority)s, '{sign}'), queue)"
    )
    notify = NOTIFY.format(channel=f"concat('{CHANNEL}', %(bucket)s)", payload=payload)
    return f"""
        case when not pg_try_advisory_xact_lock_shared(%(class)s, %(bucket)s) then {notify} end
    """


_TELL_NOW = _tell_of("")
_TELL_LATER = _tell_of(LATER)

ENQUEUES: Mapping[tuple[str, bool, bool, bool], LiteralString] = {
    (*columns, later, notify): insert
    + ((_TELL_LATER if later else _TELL_NOW) if notify else "true")
    for columns, insert in _INSERTS.items()
    for later in (True, False)
    for notify in (True, False)
}
"""By its columns, which are few for a plain job, and whether it is due later, and notifies. Made
once: as fast as a bare insert."""


def enqueue(request: EnqueueRequest, *, notify: bool) -> Statement[bool]:
    """Write one job; True if it was written, False if its id is taken."""
    plain = request.is_plain
    keeps = request.keep is not None
    later = not plain and bool(request.delay or request.run_at)
    params: dict[str, object] = {
        "id": request.id,
        "queue": request.queue,
        "type": request.type,
        "arg": request.payload,
        "priority": request.priority,
    }
    if not plain:
        params |= {
            "exclusive": request.exclusive,
            "run_at": request.run_at,
            "delay": seconds(request.delay, "delay"),
            "headers": stored(request.headers),
            "expires_at": request.expires_at,
            "expires_in": request.expires_in,
        }
    if keeps:
        params["keep"] = request.keep_for
    if notify:
        params |= {"class": LOCK_CLASS, "bucket": bucket(request.queue)}
    if request.slots is not None:
        params["slots"] = request.slots
    columns = "plain" if plain else "keep" if keeps else "others"
    text = ENQUEUES[columns, request.slots is not None, later, notify]
    return Statement(text, params, bool, prepare=False if keeps else None)


_TELL_MANY = """
    (
        select count({notify})
        from unnest(
            cast(%(told_queues)s as text[]), cast(%(told_whats)s as text[]),
            cast(%(told_channels)s as text[]), cast(%(told_buckets)s as int[])
        ) as told (queue, what, channel, bucket)
        where {condition}
            and not pg_try_advisory_xact_lock_shared(%(class)s, told.bucket)
    )
"""
_TELL_MANY_ON = NOTIFY.format(
    channel="channel", payload="concat_ws(' ', extract(epoch from now()), what, queue)"
)

TELL_MANY_IF_WRITTEN = _TELL_MANY.format(
    notify=_TELL_MANY_ON, condition="exists (select from written)"
)
"""Notifies the workers of several jobs, for a statement whose CTE `written` has them."""


def enqueue_many(
    requests: Sequence[EnqueueRequest],
    *,
    notify: bool,
    group: str | None = None,
    waits_for_group: bool = False,
    has_literals: bool = True,
    skips_taken: bool = True,
) -> Statement[set[str]]:
    """Write jobs; return the written ids, without those that were taken.

    The rows are written in the order of their ids' bytes, as by COPY, so that two calls with
    the same ids wait for each other and do not deadlock; their due times keep the order of the
    call. The transaction gets its number before the first due time is read: workers assume that
    a transaction with a higher number has not written before.

    With `group` they are jobs of that group; with `waits_for_group` those that run after it, which
    are due at infinity.

    Without `skips_taken` a taken id makes it fail. Requests with `keep` need it.

    With `has_literals` some parameters are PostgreSQL's array literals, which are quick to make;
    without, all arrays are lists, which every driver can send.
    """
    others = [r for r in requests if not r.is_plain]
    has_headers = any(r.headers for r in others)
    can_expire = any(r.expires is not None for r in others)
    headers = ", headers" if has_headers else ""
    expires = ", expires_at, expires_in" if can_expire else ""
    keeps = [r.id for r in others if r.keep is not None]
    keep = ", keep" if keeps else ""
    slots = ", slots" if any(r.slots is not None for r in others) else ""
    columns = headers + (", expires" if can_expire else "") + keep + slots
    columns += ", group_id" if group else ""
    texts = text_array if has_literals else list[str]
    numbers = number_array if has_literals else list[float]
    return Statement(
        f"""
        with request as (
            select id, queue, type, arg, priority, exclusive, position,
                greatest(
                    run_at, case when pg_current_xact_id() is not null then clock_timestamp() end
                ) + delay * interval '1 second' as next_run_at{headers}{keep}{slots}{
            ", coalesce(expires_at, clock_timestamp() + expires_in * interval '1 second')"
            " as expires"
            if can_expire
            else ""
        }
            from unnest(
                cast(%(ids)s as text[]), cast(%(queues)s as text[]), cast(%(types)s as text[]),
                cast(%(args)s as bytea[]), cast(%(priorities)s as smallint[]),
                cast(%(exclusives)s as text[]), cast(%(run_ats)s as timestamptz[]),
                cast(%(delays)s as float8[])
                {", cast(%(headers)s as text[])" if has_headers else ""}
                {
            ", cast(%(expires_ats)s as timestamptz[]), cast(%(expires_ins)s as float8[])"
            if can_expire
            else ""
        }
                {", cast(%(keeps)s as float8[])" if keeps else ""}
                {", cast(%(slots)s as smallint[])" if slots else ""}
            ) with ordinality as r (
                id, queue, type, arg, priority, exclusive, run_at,
                delay{headers}{expires}{keep}{slots}, position
            )
        ){f", {reserved('cast(%(kept)s as text[])')}" if keeps else ""}, written as (
            insert into bgjob_job (id, queue, type, arg, priority, exclusive, next_run_at{columns})
            select id, queue, type, arg, priority, exclusive,
                {"timestamptz 'infinity'" if waits_for_group else "next_run_at"}
                {", cast(headers as json)" if has_headers else ""}{
            ", expires" if can_expire else ""
        }{keep}{slots}{", %(group)s" if group else ""}
            from request
            {"where keep is null or id in (select id from reserved)" if keeps else ""}
            order by id collate "C", position
            {"on conflict (id) do nothing" if skips_taken else ""}
            returning id
        )
        select array(select cast(id as text) collate "default" from written)
            {f", {TELL_MANY_IF_WRITTEN}" if notify else ""}
        """,
        {
            **({"group": group} if group else {}),
            "ids": texts([r.id for r in requests]),
            "queues": texts([r.queue for r in requests]),
            "types": texts([r.type for r in requests]),
            "args": Payloads(r.payload for r in requests),
            "priorities": numbers([r.priority for r in requests]),
            "exclusives": Texts(r.exclusive for r in requests),
            "run_ats": Times(r.run_at for r in requests),
            "delays": numbers([seconds(r.delay, "delay") for r in requests]),
            **({"headers": Texts(stored(r.headers) for r in requests)} if has_headers else {}),
            **(
                {
                    "expires_ats": Times(r.expires_at for r in requests),
                    "expires_ins": Floats(r.expires_in for r in requests),
                }
                if can_expire
                else {}
            ),
            **({"keeps": Floats(r.keep_for for r in requests), "kept": keeps} if keeps else {}),
            **({"slots": [r.slots for r in requests]} if slots else {}),
            **told_of(requests),
        },
        lambda rows: set(rows[0][0]),
        prepare=False if keeps else None,
    )


def told_of(requests: Iterable[EnqueueRequest]) -> dict[str, object]:
    """Return the parameters that notify the workers of these requests' queues."""
    return _told(whats(requests))


def _told(told: Collection[tuple[str, str]]) -> dict[str, object]:
    return {
        "class": LOCK_CLASS,
        "told_queues": [queue for queue, _ in told],
        "told_whats": [what for _, what in told],
        "told_channels": [channel(queue) for queue, _ in told],
        "told_buckets": [bucket(queue) for queue, _ in told],
    }


def whats(requests: Iterable[EnqueueRequest]) -> set[tuple[str, str]]:
    """Return the queues whose workers are to be notified, and what each is told."""
    told = {(r.queue, r.priority, not r.is_plain and bool(r.delay or r.run_at)) for r in requests}
    return {(queue, f"{priority}{LATER if later else ''}") for queue, priority, later in told}


def begin_copy() -> Statement[None]:
    """Assign the transaction's number before the first due time is read; see enqueue_many."""
    return Statement("select pg_current_xact_id() is null", None, nothing, prepare=None)


_COPY: LiteralString = (
    "copy bgjob_job (id, queue, type, arg, priority{}) from stdin (format binary)"
)
_COPIED: tuple[str, ...] = ("text", "text", "text", "bytea", "int2")


class Copy(NamedTuple):
    """Rows for a binary COPY, which takes half the time of an insert."""

    text: LiteralString
    types: Sequence[str]
    rows: Iterable[Row]


def copy_many(requests: Sequence[EnqueueRequest], group: str | None = None) -> Copy | None:
    """Write jobs that are due now; unlike `enqueue_many` it fails if an id is taken.

    None if COPY is not possible: it computes no times, writes no keys, and writes rows in the
    given order, which must be the order of their ids.
    """
    others = [r for r in requests if not r.is_plain]
    if any(
        r.delay
        or r.run_at
        or r.exclusive is not None
        or r.expires is not None
        or r.keep is not None
        for r in others
    ):
        return None
    ids = [r.id for r in requests]
    if ids != sorted(ids):
        return None
    # Made one at a time, while the server writes the ones before.
    rows: Iterable[Row] = ((r.id, r.queue, r.type, r.payload, r.priority) for r in requests)
    columns, types = "", _COPIED
    if others:  # they have headers
        columns, types = ", headers", (*types, "text")  # json has the same binary form
        rows = map(add, rows, ((stored(r.headers),) for r in requests))
    if group is not None:
        columns, types = f"{columns}, group_id", (*types, "text")
        rows = map(add, rows, repeat((group,)))
    return Copy(_COPY.format(columns), types, rows)


def tell_many(requests: Sequence[EnqueueRequest]) -> Statement[None]:
    """Notify the workers of these requests' queues when the transaction commits."""
    return _tell(whats(requests))


def tell_all(queues: Iterable[str]) -> Statement[None]:
    """Notify the workers of these queues, at commit, to check all jobs."""
    return _tell({(queue, EVERYTHING) for queue in queues})


def _tell(told: Collection[tuple[str, str]]) -> Statement[None]:
    return Statement(
        f"select {_TELL_MANY.format(notify=_TELL_MANY_ON, condition='true')}", _told(told), nothing
    )
