"""Enqueue jobs over those with the same ids: the newest request wins.

What becomes of a live job with the id depends on its claim, which the statement sees under the
row's lock, as it is after whatever was about to commit:

    waits      the row becomes the new request's, and keeps its id. It also keeps the time of
               its enqueue, from which `at_most` counts, unless an attempt of it has failed
    is claimed the request becomes its successor (`successors`), over an earlier one
"""

from collections.abc import Sequence
from typing import LiteralString

from bgjob._checks import seconds
from bgjob._headers import stored
from bgjob._postgres.cursor import Floats, Payloads, Texts, Times
from bgjob._sql.enqueues import TELL_MANY_IF_WRITTEN, told_of
from bgjob._sql.groups import WAITS_FOR_GROUP
from bgjob._sql.statement import Statement, number_array, text_array
from bgjob.job import EnqueueRequest

_LIMIT: LiteralString = "+ cast(%(at_most)s as float8) * interval '1 second'"
"""Null without a limit, which `least` passes over."""


def _of_waiting(column: LiteralString, new: LiteralString) -> LiteralString:
    """Return the assignment of a column that changes only while no claim holds the job."""
    return f"{column} = case when j.token is null then {new} else j.{column} end"


_BORN: LiteralString = "case when j.attempt > 0 then clock_timestamp() else j.created_at end"
_NEXT_BORN: LiteralString = (
    "coalesce(cast(j.successor ->> 'created_at' as timestamptz), clock_timestamp())"
)

# A job of a group stays in it, and the one that waits for its group goes on waiting.
#
# Never into the past, where no claim would look for it. A job that waits for its exclusive key
# looks for it again: it may have another one, or be due earlier than what the key's row says.
_WAITING: LiteralString = f"""
    {_of_waiting("queue", "excluded.queue")},
    {_of_waiting("type", "excluded.type")},
    {_of_waiting("arg", "excluded.arg")},
    {_of_waiting("priority", "excluded.priority")},
    {_of_waiting("exclusive", "excluded.exclusive")},
    {_of_waiting("headers", "excluded.headers")},
    {_of_waiting("expires", "excluded.expires")},
    {_of_waiting("slots", "excluded.slots")},
    {
    _of_waiting(
        "next_run_at",
        f"case when {WAITS_FOR_GROUP} then j.next_run_at else "
        f"greatest(least(excluded.next_run_at, {_BORN} {_LIMIT}), clock_timestamp()) end",
    )
},
    {_of_waiting("created_at", _BORN)},
    {_of_waiting("updated_at", "clock_timestamp()")},
    {_of_waiting("attempt", "0")},
    {_of_waiting("last_error", "null")},
    {_of_waiting("deaths", "0")},
    {_of_waiting("checkpoint", "null")},
    {_of_waiting("waits", "false")}
"""

_CLAIMED: LiteralString = f"""
    successor_arg = case when j.token is not null then excluded.arg end,
    successor = case when j.token is not null then json_build_object(
        'queue', excluded.queue, 'type', excluded.type, 'priority', excluded.priority,
        'exclusive', excluded.exclusive, 'headers', cast(excluded.headers as text),
        'expires', excluded.expires, 'slots', excluded.slots, 'created_at', {_NEXT_BORN},
        'next_run_at', least(excluded.next_run_at, {_NEXT_BORN} {_LIMIT})
    ) end
"""

# In the order of their ids' bytes, as `enqueue_many`, so that two calls do not deadlock.
_REPLACE: LiteralString = f"""
    with request as (
        select id, queue, type, arg, priority, exclusive, slots, position,
            cast(headers as json) as headers,
            greatest(
                run_at, case when pg_current_xact_id() is not null then clock_timestamp() end
            ) + delay * interval '1 second' as next_run_at,
            coalesce(expires_at, clock_timestamp() + expires_in * interval '1 second') as expires
        from unnest(
            cast(%(ids)s as text[]), cast(%(queues)s as text[]), cast(%(types)s as text[]),
            cast(%(args)s as bytea[]), cast(%(priorities)s as smallint[]),
            cast(%(exclusives)s as text[]), cast(%(headers)s as text[]),
            cast(%(run_ats)s as timestamptz[]), cast(%(delays)s as float8[]),
            cast(%(expires_ats)s as timestamptz[]), cast(%(expires_ins)s as float8[]),
            cast(%(slots)s as smallint[])
        ) with ordinality as r (
            id, queue, type, arg, priority, exclusive, headers, run_at, delay, expires_at,
            expires_in, slots, position
        )
    ), written as (
        insert into bgjob_job as j (
            id, queue, type, arg, priority, exclusive, next_run_at, headers, expires, slots
        )
        select id, queue, type, arg, priority, exclusive,
            least(next_run_at, clock_timestamp() {_LIMIT}), headers, expires, slots
        from request
        order by id collate "C", position
        on conflict (id) do update set {_WAITING}, {_CLAIMED}
        returning id
    )
    select array(select cast(id as text) collate "default" from written)
"""
_REPLACE_AND_TELL: LiteralString = f"{_REPLACE}, {TELL_MANY_IF_WRITTEN}"


def replace(
    requests: Sequence[EnqueueRequest],
    *,
    notify: bool,
    at_most: float | None = None,
    has_literals: bool = True,
) -> Statement[set[str]]:
    """Write jobs over those with the same ids; return the ids, which are all.

    Raises:
        ValueError: a request has `keep`. Of a job that has it, it stays.

    Args:
        requests: the jobs. Of several with the same id the last one counts.
        notify: whether sleeping workers are notified.
        at_most: the seconds after the first enqueue within which the job is due, however late
            the due time of the newest request is.
        has_literals: as for `enqueue_many`.

    """
    if any(request.keep is not None for request in requests):
        raise ValueError(
            "keep cannot be given together with on_conflict='replace', or to debounce: with keep a "
            "later request with the id is refused, and with replace it wins"
        )
    newest = list({request.id: request for request in requests}.values())
    texts = text_array if has_literals else list[str]
    numbers = number_array if has_literals else list[float]
    return Statement(
        _REPLACE_AND_TELL if notify else _REPLACE,
        {
            "ids": texts([r.id for r in newest]),
            "queues": texts([r.queue for r in newest]),
            "types": texts([r.type for r in newest]),
            "args": Payloads(r.payload for r in newest),
            "priorities": numbers([r.priority for r in newest]),
            "exclusives": Texts(r.exclusive for r in newest),
            "headers": Texts(stored(r.headers) for r in newest),
            "run_ats": Times(r.run_at for r in newest),
            "delays": numbers([seconds(r.delay, "delay") for r in newest]),
            "expires_ats": Times(r.expires_at for r in newest),
            "expires_ins": Floats(r.expires_in for r in newest),
            "slots": [r.slots for r in newest],
            "at_most": at_most,
            **told_of(newest),
        },
        lambda rows: set(rows[0][0]),
        prepare=None,
    )
