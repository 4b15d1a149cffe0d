"""The prepared statements of plain enqueues, of one job and of several.

They are executed without a cursor (see `execute`), so their parameters are converted here.
"""

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import LiteralString

from bgjob._postgres.commands import Prepared
from bgjob._sql.enqueues import ENQUEUES, TELL_MANY_IF_WRITTEN, whats
from bgjob._sql.notices import LOCK_CLASS, bucket, channel
from bgjob._sql.paramstyles import translated
from bgjob._sql.statement import Statement, number_array, text_array
from bgjob.job import EnqueueRequest

_BYTEA = 17
_TEXTS, _BYTEAS, _SMALLINTS, _INTEGERS = 1009, 1001, 1005, 1007
_TYPES = {
    "id": 25,
    "queue": 25,
    "type": 25,
    "arg": _BYTEA,
    "priority": 21,
    "class": 23,
    "bucket": 23,
}
"""The parameters of a plain enqueue in their order, with the numbers of their types in pg_type."""


def _prepared(name: bytes, text: LiteralString, types: Mapping[str, int]) -> Prepared:
    names = {name: name for name in types}
    text, order = translated(Statement(text, names, bool), "dollar")
    numbers = list(types.values())[: len(order)]
    return Prepared(name, text.encode(), numbers, [n in (_BYTEA, _BYTEAS) for n in numbers])


ENQUEUE: Mapping[bool, Prepared] = {
    notify: _prepared(b"bgjob_enqueue", ENQUEUES["plain", False, False, notify], _TYPES)
    for notify in (True, False)
}
"""By whether it notifies, the statement of a plain enqueue; a row if the job was written."""


def values(request: EnqueueRequest, *, notify: bool) -> list[bytes | None]:
    """Return the parameters of the prepared statement, texts in UTF-8."""
    found = [
        request.id.encode(),
        request.queue.encode(),
        request.type.encode(),
        request.payload,
        b"%d" % request.priority,
    ]
    if notify:
        found += b"%d" % LOCK_CLASS, b"%d" % bucket(request.queue)
    return found


# The transaction gets its number before the first due time is read; see enqueue_many. A plan is of
# no use any more when the type or collation of a result column changes, as that of `id` may.
_MANY: LiteralString = """
    with written as (
        insert into bgjob_job (id, queue, type, arg, priority)
        select * from unnest(%(ids)s, %(queues)s, %(types)s, %(args)b, %(priorities)s)
        where pg_current_xact_id() is not null
        {}
        returning id
    )
    select array_to_string(array(select cast(id as text) collate "default" from written), ' ')
"""

_TYPES_OF_MANY = {
    "ids": _TEXTS,
    "queues": _TEXTS,
    "types": _TEXTS,
    "args": _BYTEAS,
    "priorities": _SMALLINTS,
    "told_queues": _TEXTS,
    "told_whats": _TEXTS,
    "told_channels": _TEXTS,
    "told_buckets": _INTEGERS,
    "class": _TYPES["class"],
}
"""As _TYPES."""


def _many(name: bytes, on_conflict: LiteralString) -> Mapping[bool, Prepared]:
    text = _MANY.format(on_conflict)
    return {
        True: _prepared(name, f"{text}, {TELL_MANY_IF_WRITTEN}", _TYPES_OF_MANY),
        False: _prepared(name, text, _TYPES_OF_MANY),
    }


ENQUEUE_ANY = _many(b"bgjob_enqueue_any", "on conflict (id) do nothing")
"""By whether it notifies, the statement of plain enqueues with generated ids that were made
together. Returns the written ids, with blanks between them."""

ENQUEUE_ALL = _many(b"bgjob_enqueue_all", "")
"""The same for ids in ascending order, of which none may be taken: otherwise it fails."""


def values_of_many(requests: Sequence[EnqueueRequest], *, notify: bool) -> list[bytes | None]:
    """Return the parameters of the prepared statement, texts in UTF-8."""
    found: list[bytes | None] = [
        text_array([r.id for r in requests]).encode(),
        text_array([r.queue for r in requests]).encode(),
        text_array([r.type for r in requests]).encode(),
        _bytea_array([r.payload for r in requests]),
        number_array([r.priority for r in requests]).encode(),
    ]
    if notify:
        told = whats(requests)
        found += (
            text_array([queue for queue, _ in told]).encode(),
            text_array([what for _, what in told]).encode(),
            text_array([channel(queue) for queue, _ in told]).encode(),
            number_array([bucket(queue) for queue, _ in told]).encode(),
            b"%d" % LOCK_CLASS,
        )
    return found


_ARRAY = Struct("!iiIii")
"""The number of dimensions, whether there are nulls, the type's number in pg_type, the length, and
the first index."""
_NULL = b"\xff\xff\xff\xff"


def _bytea_array(items: Sequence[bytes | None]) -> bytes:
    """Return an array as it travels in binary, which needs no escapes."""
    values = (_NULL if i is None else len(i).to_bytes(4, "big") + i for i in items)
    return _ARRAY.pack(1, None in items, _BYTEA, len(items), 1) + b"".join(values)
