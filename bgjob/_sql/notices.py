"""Who is notified of an enqueue: a lock and a channel for each bucket of queues."""

from typing import LiteralString
from zlib import crc32

from bgjob._sql.statement import Statement, nothing, scalar

LOCK_CLASS = 0x62676A62
"""The first key of the notify lock; the second is the queue's bucket."""

DEPUTY_CLASS = LOCK_CLASS + 1
"""The first key of the lock of the deputy, who watches for the end of the notify lock's holder."""

BUCKETS = 128
"""Queues share this many locks and channels, so that 10,000 queues do not fill the lock table."""

CHANNEL = "bgjob_"
"""What the name of a channel begins with; the bucket follows."""

LATER = "+"
"""Follows the priority where a job is due later."""

EVERYTHING = "-"
"""Instead of a priority: jobs may lie anywhere."""

NOTIFY: LiteralString = """
    case when pg_notification_queue_usage() < 0.5 then pg_notify({channel}, {payload}) end
"""
"""Notifies where there is room: where the queue of notifications is full a commit fails.

A session that listens and sits in a transaction keeps all notifications since. Without one
a worker polls. To ask for the usage costs 1 µs, where a notification would be sent.
"""


def bucket(queue: str) -> int:
    """Give the number of the lock and channel that `queue` shares with others."""
    return crc32(queue.encode()) % BUCKETS


def channel(queue: str) -> str:
    """Give the channel on which enqueues to `queue` are notified; for the payload see Notice."""
    return f"{CHANNEL}{bucket(queue)}"


def listen(queue: str) -> Statement[None]:
    """Receive the notifications of `queue` on this connection."""
    return Statement(f"listen {channel(queue)}".encode(), None, nothing)


def park(queue: str, *, is_deputy: bool = False, relieve: bool = False) -> Statement[str]:
    """Ask every later enqueue to `queue` to notify, before this worker goes to sleep.

    An enqueue shares the lock until its transaction ends, and notifies where it
    cannot. Of the workers that cannot have the lock one is the deputy, and tries again soon.

    Returns 'parked': the lock is held, no enqueue is in flight unseen. 'deputy': another worker
    holds it, and this one is the deputy. 'contended': enqueues are in flight, and this one is
    the deputy. 'covered': another worker is the deputy.

    Args:
        queue: the queue.
        is_deputy: whether this session is known to be the deputy.
        relieve: let the other workers look if the lock is taken, because nobody may have been
            notified for a while.

    """
    return Statement(
        """
        select answer,
            case when answer = 'parked' and %(relieve)s then pg_notify(%(channel)s, '') end,
            case when answer = 'parked' and %(is_deputy)s
                then pg_advisory_unlock(%(deputy)s, %(bucket)s) end
        from (
            select case
                when pg_try_advisory_lock(%(class)s, %(bucket)s) then 'parked'
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
        },
        scalar,
    )


def unpark(queue: str) -> Statement[None]:
    """Stop asking for notifications, and wake the workers that relied on it: one parks next.

    The session holds no other locks of this kind than the deputy's; but this one twice where
    the transaction that took it first was refused, which does not undo it.
    """
    return Statement(
        "select pg_advisory_unlock_all(), " + NOTIFY.format(channel="%(channel)s", payload="''"),
        {"channel": channel(queue)},
        nothing,
    )
