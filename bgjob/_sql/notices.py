"""Notifications of enqueues: a lock and a channel for each bucket of queues."""

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

CHANNEL = "bgjob_"
"""The prefix of a channel's name; the bucket follows."""

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


def listen(channel: str) -> Statement[None]:
    """Receive the notifications of a channel on this connection."""
    return Statement(f"listen {channel}".encode(), None, nothing)


class LockAnswer(NamedTuple):
    """The answer to a try for the notify lock."""

    answer: str
    """'taken': this worker holds the lock, and no unseen enqueue is in progress. 'deputy':
    another worker holds it, and this one is the deputy. 'contended': enqueues are in progress,
    and this one is the deputy. 'covered': another worker is the deputy."""
    has_post: bool
    """Whether it has taken a post."""


def take_notify_lock(
    queue: str, *, is_deputy: bool = False, relieve: bool = False, asks_post: bool = False
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
        asks_post: take a post of the queue, if one is free and the lock is not taken: a worker
            that is alone needs none. A session that has one must not ask, or it takes another.

    """
    return Statement(
        """
        select answer,
            case when answer <> 'taken' and %(asks_post)s then exists (
                select from generate_series(%(first)s::bigint, %(last)s::bigint) as post
                where pg_try_advisory_lock(post)
            ) else false end,
            case when answer = 'taken' and %(relieve)s then pg_notify(%(channel)s, '') end,
            case when answer = 'taken' and %(is_deputy)s
                then pg_advisory_unlock(%(deputy)s, %(bucket)s) end
        from (
            select case
                when pg_try_advisory_lock(%(class)s, %(bucket)s) then 'taken'
                when not (%(is_deputy)s or pg_try_advisory_lock(%(deputy)s, %(bucket)s))
                    then 'covered'
                when not pg_try_advisory_lock_shared(%(class)s, %(bucket)s) then 'deputy'
                when pg_advisory_unlock_shared(%(class)s, %(bucket)s) then 'contended'
            end as answer
        ) as lock
        """,
        {
            "class": LOCK_CLASS,
            "deputy": DEPUTY_CLASS,
            "bucket": bucket(queue),
            "channel": channel(queue),
            "is_deputy": is_deputy,
            "relieve": relieve,
            "asks_post": asks_post,
            "first": first_post(queue),
            "last": first_post(queue) + POSTS - 1,
        },
        _lock_answer,
    )


def _lock_answer(rows: Sequence[Row]) -> LockAnswer:
    return LockAnswer(*rows[0][:2])


def first_post(queue: str) -> int:
    """Return the key of the first post of `queue`; the others follow it.

    Of 64 bits: queues that shared posts would be polled by one another's workers.
    """
    digest = blake2b(queue.encode(), digest_size=8, person=b"bgjob").digest()
    return int.from_bytes(digest, "big", signed=True) & -POSTS


def leave_post() -> Statement[None]:
    """Leave the post to another worker, and the place of the deputy with it."""
    return Statement("select pg_advisory_unlock_all()", None, nothing)


def release_notify_lock(queue: str) -> Statement[None]:
    """Release the notify lock, and wake the workers that relied on it: one takes it next.

    The session holds no other advisory locks than the deputy's and a post. It may hold this one
    twice: a rollback does not release it, so that a repeated statement takes it again.
    """
    return Statement(
        "select pg_advisory_unlock_all(), " + NOTIFY.format(channel="%(channel)s", payload="''"),
        {"channel": channel(queue)},
        nothing,
    )
