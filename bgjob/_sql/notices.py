"""Notifications of enqueues: a lock and a channel for each bucket of queues.

A session listens to up to three kinds of channels: cancels, always; enqueues, unless it is a spare
or has been busy; and calls, if it has a seat. `_engine/notify_lock.py` has the rules.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import LiteralString, NamedTuple
from zlib import crc32

from bgjob._sql.statement import Row, Statement, nothing

LOCK_CLASS = 0x62676A62
"""The first key of the notify lock; the second is the queue's bucket."""

DEPUTY_CLASS = LOCK_CLASS + 1
"""The first key of the deputy's lock: that worker notices if the notify lock's holder ends."""

BUCKETS = 128
"""The number of locks and channels that all queues share: 10,000 would fill the lock table."""

POSTS = 16
"""The posts of a queue: so many of its idle workers poll at the poll interval, others rarely."""

SEATS = 240
"""The seats of a queue: so many of its spares can be called."""

CALLED = 2
"""How many spares are called at once: while there is work for all, the fleet wakes by doubling."""

CHANNEL = "bgjob_"
"""The prefix of a channel's name; the bucket follows."""

_CANCELS = "bgjob_cancel_"
"""The prefix of a channel of cancelled claims; the bucket follows."""

_CALLS: LiteralString = "bgjob_call_"
"""The prefix of a seat's channel; its key follows."""

_PLACES = 512
"""The keys of a queue's posts and seats, and of what the seated share: a power of two."""

BY_HAND = "bgjob"
"""The channel of inserts by hand, which know no bucket: the payload is the queue. Public."""

LATER = "+"
"""Follows the priority if a job is due later."""

EVERYTHING = "-"
"""Instead of a priority: the jobs may have any due time and priority."""

CANCELLED: LiteralString = "x"
"""Begins a notification of a cancelled claim; its token and the job's id follow."""

NOTIFY: LiteralString = """
    case when pg_notification_queue_usage() < 0.5 then pg_notify({channel}, {payload}) end
"""
"""Notifies if there is room: when the queue of notifications is full a commit fails.

A session that listens and stays in a transaction keeps all later notifications. Without a
notification a worker polls. Reading the usage costs 1 µs, only when it would notify.
"""


def bucket(queue: str) -> int:
    """Return the number of the lock and channel that `queue` shares with others."""
    return crc32(queue.encode()) % BUCKETS


def channel(queue: str) -> str:
    """Return the channel of enqueues to `queue`; for the payload see Notice."""
    return f"{CHANNEL}{bucket(queue)}"


def cancel_channel(queue: str) -> str:
    """Return the channel of cancelled claims of `queue`."""
    return f"{_CANCELS}{bucket(queue)}"


class Subscription(NamedTuple):
    """The notifications that a session receives, besides those of cancelled claims."""

    enqueues: bool = True
    """Whether those of enqueues, and of releases of the notify lock."""
    seat: int | None = None
    """The key of the seat at which the worker can be called."""


def subscribe(queue: str, to: Subscription) -> list[Statement[None]]:
    """Receive these notifications on this connection, and no others; in one transaction."""
    names = [cancel_channel(queue)]
    if to.enqueues:
        names += channel(queue), BY_HAND
    if to.seat is not None:
        names.append(f"{_CALLS}{to.seat}")
    texts = ["unlisten *", *(f'listen "{name}"' for name in names)]
    return [Statement(text.encode(), None, nothing) for text in texts]


class LockAnswer(NamedTuple):
    """The answer to a try for the notify lock."""

    answer: str
    """'taken': this worker holds the lock, and no unseen enqueue is in progress. 'deputy':
    another worker holds it, and this one is the deputy. 'contended': enqueues are in progress,
    and this one is the deputy. 'covered': another worker is the deputy."""
    has_post: bool
    """Whether it has taken a post."""
    seat: int | None
    """The key of the seat that it has taken or kept."""
    has_spares: bool
    """Whether another session has a seat."""


def take_notify_lock(
    queue: str,
    *,
    is_deputy: bool = False,
    relieve: bool = False,
    asks_post: bool = False,
    seat: int | None = None,
) -> Statement[LockAnswer]:
    """Ask every later enqueue to `queue` to notify, before this worker goes to sleep.

    This takes the notify lock. An enqueue shares the lock until its transaction ends, and
    notifies if it cannot. Of the workers that cannot take the lock one is the deputy, and
    tries again soon.

    Args:
        queue: the queue.
        is_deputy: whether this session is known to be the deputy.
        relieve: notify the other workers if the lock is taken, because no worker may have
            been notified for a while.
        asks_post: take a post of the queue if the lock is not taken: a worker that is alone needs
            none. If all posts are taken too, and the session is not the deputy, take a seat. A
            session that has a post must not ask, or it takes another.
        seat: the key of the seat that the session has; it must ask. It leaves the seat for the
            lock, a post, or the place of the deputy.

    """
    return Statement(
        """
        select answer, place,
            case when pg_try_advisory_lock(%(seated)s)
                then not pg_advisory_unlock(%(seated)s) else true end,
            case when answer = 'taken' and %(relieve)s then pg_notify(%(channel)s, '') end,
            case when answer = 'taken' and %(is_deputy)s
                then pg_advisory_unlock(%(deputy)s, %(bucket)s) end,
            case when place >= %(first)s and %(seat)s::bigint is null
                then pg_advisory_lock_shared(%(seated)s) end,
            case when place is distinct from %(seat)s and pg_advisory_unlock(%(seat)s::bigint)
                then pg_advisory_unlock_shared(%(seated)s) end
        from (
            select answer, case when answer <> 'taken' and %(asks_post)s then coalesce(
                (
                    select post from generate_series(
                        %(post)s::bigint, %(first)s::bigint - 1
                    ) as post
                    where pg_try_advisory_lock(post)
                    limit 1
                ),
                case when answer = 'covered' then coalesce(%(seat)s::bigint, (
                    select seat from generate_series(
                        %(first)s::bigint, %(last)s::bigint
                    ) as seat
                    where pg_try_advisory_lock(seat)
                    limit 1
                )) end
            ) end as place
            from (
                select case
                    when pg_try_advisory_lock(%(class)s, %(bucket)s) then 'taken'
                    when not (%(is_deputy)s or pg_try_advisory_lock(%(deputy)s, %(bucket)s))
                        then 'covered'
                    when not pg_try_advisory_lock_shared(%(class)s, %(bucket)s) then 'deputy'
                    when pg_advisory_unlock_shared(%(class)s, %(bucket)s) then 'contended'
                end as answer
            ) as lock
            offset 0
        ) as taken
        """,
        {
            "class": LOCK_CLASS,
            "deputy": DEPUTY_CLASS,
            "bucket": bucket(queue),
            "channel": channel(queue),
            "is_deputy": is_deputy,
            "relieve": relieve,
            "asks_post": asks_post,
            "post": first_post(queue),
            "first": first_post(queue) + POSTS,
            "last": first_post(queue) + POSTS + SEATS - 1,
            "seat": seat,
            "seated": _seated(queue),
        },
        _lock_answer,
    )


def _lock_answer(rows: Sequence[Row]) -> LockAnswer:
    answer, place, has_spares = rows[0][:3]
    has_post = place is not None and place % _PLACES < POSTS
    return LockAnswer(answer, has_post, None if has_post else place, has_spares)


def first_post(queue: str) -> int:
    """Return the key of the first post of `queue`; the others follow it.

    Of 64 bits: queues that shared posts would be polled by one another's workers.
    """
    digest = blake2b(queue.encode(), digest_size=8, person=b"bgjob").digest()
    return int.from_bytes(digest, "big", signed=True) & -_PLACES


def _seated(queue: str) -> int:
    """Return the key of the lock that all sessions share that have a seat."""
    return first_post(queue) + _PLACES - 1


def call(queue: str) -> Statement[None]:
    """Wake some spares, by their seats: they try for the notify lock, and claim.

    Chosen at random, so that two calls at once wake different ones. A lock that can be shared is
    that of an empty seat; so is this session's own. Without spares it is one try.
    """
    return Statement(
        f"""
        select {NOTIFY.format(channel=f"'{_CALLS}' || seat", payload="''")}
        from (
            select seat from (
                select where not case when pg_try_advisory_lock(%(seated)s)
                    then pg_advisory_unlock(%(seated)s) else false end
                offset 0
            ) as are_spares, generate_series(%(first)s::bigint, %(last)s::bigint) as seat
            where not case when pg_try_advisory_lock_shared(seat)
                then pg_advisory_unlock_shared(seat) else false end
            order by random()
            limit %(called)s
        ) as called
        """,
        {
            "first": first_post(queue) + POSTS,
            "last": first_post(queue) + POSTS + SEATS - 1,
            "called": CALLED,
            "seated": _seated(queue),
        },
        nothing,
    )


def leave_post() -> Statement[None]:
    """Leave the post or seat to another worker, and the place of the deputy with it."""
    return Statement("select pg_advisory_unlock_all()", None, nothing)


def release_notify_lock(queue: str) -> Statement[None]:
    """Release the notify lock, and wake the workers that relied on it: one takes it next.

    The session holds no other advisory locks than the deputy's and those of a post or seat. It may
    hold this one twice: a rollback does not release it, so that a repeated statement takes it
    again.
    """
    return Statement(
        "select pg_advisory_unlock_all(), " + NOTIFY.format(channel="%(channel)s", payload="''"),
        {"channel": channel(queue)},
        nothing,
    )
