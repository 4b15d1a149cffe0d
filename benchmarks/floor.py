"""The floors: the least that bare psycopg needs for the same rows in the same table."""

import select
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from operator import itemgetter
from queue import SimpleQueue
from typing import Any, LiteralString
from uuid import uuid4

import psycopg
from work import QUEUE

from bgjob import EnqueueRequest

Row = tuple[str, str, str, bytes | None, int, datetime]

_COPY = """
    copy bgjob_job (id, queue, type, arg, priority, next_run_at) from stdin (format binary)
"""
_COPY_TYPES = ["text", "text", "text", "bytea", "int2", "timestamptz"]

_INSERT = """
    insert into bgjob_job (id, queue, type, arg, priority, next_run_at)
    values (%s, %s, %s, %s, %s, %s)
"""

_INSERT_MANY = """
    insert into bgjob_job (id, queue, type, arg, priority, next_run_at)
    select * from unnest(
        %s::text[], %s::text[], %s::text[], %s::bytea[], %s::smallint[], %s::timestamptz[]
    )
"""

# The fastest of those that were tried. Binary results, prepared statements, and one array
# literal instead of a list that psycopg dumps item by item each make it faster. 1000 jobs a
# claim are faster than 500; 2000 are not.
BATCH = 1000

_TAKE = "lease_until = clock_timestamp() + interval '30 s', attempt = attempt + 1"
_FREE = "(lease_until is null or lease_until <= now())"

_CLAIM = f"""
    update bgjob_job
    set token = %(token)s, {_TAKE}
    where ctid = any (array(
        select ctid from bgjob_job
        where queue = '{QUEUE}' and priority = 0
            and next_run_at >= %(mark)s and next_run_at <= now() and not waits and {_FREE}
        order by next_run_at
        limit {BATCH}
        for update skip locked
    ))
    returning id, type, arg, attempt, next_run_at
"""

_CLAIM_KEYED = _CLAIM.replace("attempt, next_run_at", "attempt, exclusive, next_run_at")

_DELETE = "delete from bgjob_job where id = any (%s::text[]) and token = %s"

# A key is a row: inserted before the jobs of the key run, unless another one of it comes first, and
# deleted when they are settled, unless others wait.
_HOLD_KEYS = """
    insert into bgjob_exclusive (key, tokens)
    select key, array[%(token)s::bigint] from unnest(%(keys)s::text[]) as k (key)
    on conflict (key, place) do update set tokens = excluded.tokens
"""
_COMES_FIRST = f"""
    select from unnest(%s::text[], %s::timestamptz[]) as k (key, last)
    cross join lateral (
        select from bgjob_job j
        where j.exclusive = k.key and not j.waits and j.queue = '{QUEUE}' and j.next_run_at < k.last
            and j.token is distinct from %s
        order by j.next_run_at
        limit 1
    ) as first
"""
_LOCK_KEYS = "select from bgjob_exclusive where key = any (%s::text[]) order by key for update"
_FREE_KEYS = """
    delete from bgjob_exclusive e
    where e.key = any (%s::text[]) and not exists (
        select from bgjob_job j where j.exclusive = e.key and j.waits
    )
"""

_TELL = f"""
    with written as (
        insert into bgjob_job (id, queue, type) values (%s, '{QUEUE}', 'noop') returning queue
    )
    select pg_notify('bgjob_benchmark', queue) from written
"""

_CLAIM_ONE = f"""
    update bgjob_job
    set token = 1, {_TAKE}
    where ctid = any (array(
        select ctid from bgjob_job
        where queue = '{QUEUE}' and priority = 0 and next_run_at <= now()
            and not waits and {_FREE}
        order by next_run_at
        limit 1
        for update skip locked
    ))
    returning id, type, arg, attempt
"""


def connect(dsn: str) -> psycopg.Connection[Any]:
    """Open a connection that prepares statements immediately, each one a transaction."""
    return psycopg.connect(dsn, autocommit=True, prepare_threshold=0)


async def connect_async(dsn: str) -> psycopg.AsyncConnection[Any]:
    """Open a connection. Async variant of `connect`."""
    return await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=0)


def rows(requests: Sequence[EnqueueRequest]) -> list[Row]:
    """Return the rows of the requests, due now."""
    now = datetime.now(UTC)
    return [(r.id, r.queue, r.type, r.payload, r.priority, now) for r in requests]


def copy(connection: psycopg.Connection[Any], rows: Sequence[Row]) -> None:
    """Write all rows by a binary copy."""
    with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(_COPY_TYPES)
        for row in rows:
            copy.write_row(row)


def insert(connection: psycopg.Connection[Any], rows: Sequence[Row]) -> None:
    """Write the rows one by one."""
    with connection.cursor() as cursor:
        for row in rows:
            cursor.execute(_INSERT, row)


def insert_many(connection: psycopg.Connection[Any], rows: Sequence[Row], size: int) -> None:
    """Write so many rows by each statement."""
    with connection.cursor() as cursor:
        for start in range(0, len(rows), size):
            cursor.execute(
                _INSERT_MANY, [*map(list, zip(*rows[start : start + size], strict=True))]
            )


async def insert_async(connection: psycopg.AsyncConnection[Any], rows: Sequence[Row]) -> None:
    """Write the rows one by one. Async variant of `insert`."""
    async with connection.cursor() as cursor:
        for row in rows:
            await cursor.execute(_INSERT, row)


def drain(connection: psycopg.Connection[Any], count: int, *, watermark: bool = True) -> None:
    """Claim a batch and delete it, until none is left; raise unless `count` were deleted.

    Args:
        watermark: whether a claim starts where the last one ended, or at the queue's
            beginning.

    """
    claim, delete = connection.cursor(binary=True), connection.cursor()
    mark: object = "-infinity"
    token = deleted = 0
    while True:
        token += 1
        claimed = claim.execute(_CLAIM, {"token": token, "mark": mark}).fetchall()
        if not claimed:
            break
        if watermark:
            mark = max(row[4] for row in claimed)
        ids = ",".join([row[0] for row in claimed])
        deleted += delete.execute(_DELETE, [f"{{{ids}}}", token]).rowcount
    if deleted != count:
        raise RuntimeError(f"the floor deleted {deleted} of {count} jobs")


def drain_keyed(connection: psycopg.Connection[Any], count: int) -> None:
    """Drain jobs that have keys; each key is held from the claim of its jobs to their deletion."""
    claim, write = connection.cursor(binary=True), connection.cursor()
    mark: object = "-infinity"
    token = deleted = 0
    while True:
        token += 1
        claimed = claim.execute(_CLAIM_KEYED.encode(), {"token": token, "mark": mark}).fetchall()
        if not claimed:
            break
        last = dict(sorted((row[-2:] for row in claimed), key=itemgetter(1)))
        mark = max(last.values())
        keys, ids = f"{{{','.join(last)}}}", f"{{{','.join([row[0] for row in claimed])}}}"
        with connection.transaction():
            write.execute(_HOLD_KEYS, {"keys": keys, "token": token})
            if write.execute(_COMES_FIRST, [keys, [*last.values()], token]).rowcount:
                raise RuntimeError("another job of a key comes first")
        with connection.transaction():
            deleted += write.execute(_DELETE, [ids, token]).rowcount
            write.execute(_LOCK_KEYS, [keys])
            write.execute(_FREE_KEYS, [keys])
    if deleted != count:
        raise RuntimeError(f"the floor deleted {deleted} of {count} jobs")


def drain_with_effects(
    connection: psycopg.Connection[Any], count: int, batch: int, effect: LiteralString
) -> None:
    """Claim a batch; write its effect and delete it in one transaction; until none is left.

    Args:
        connection: the connection, which commits each claim.
        count: the number of jobs; raise unless as many were deleted.
        batch: the most jobs in a claim.
        effect: a statement that takes the ids as an array.

    """
    claim, write = connection.cursor(binary=True), connection.cursor()
    claiming = _CLAIM.replace(f"limit {BATCH}", f"limit {batch}")
    mark: object = "-infinity"
    token = deleted = 0
    while True:
        token += 1
        claimed = claim.execute(claiming.encode(), {"token": token, "mark": mark}).fetchall()
        if not claimed:
            break
        mark = max(row[4] for row in claimed)
        ids = [row[0] for row in claimed]
        with connection.transaction():
            write.execute(effect, [ids])  # a list, as any program passes it
            deleted += write.execute(_DELETE, [f"{{{','.join(ids)}}}", token]).rowcount
    if deleted != count:
        raise RuntimeError(f"the floor deleted {deleted} of {count} jobs")


@contextmanager
def listening(dsn: str, start: Callable[[], object]) -> Iterator[None]:
    """Run a thread that listens, and claims a row and starts it when it is notified."""
    stopping = threading.Event()
    with connect(dsn) as consumer:
        consumer.execute("listen bgjob_benchmark")
        thread = threading.Thread(target=_listen, args=(consumer, start, stopping))
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            with connect(dsn) as waker:
                waker.execute("notify bgjob_benchmark")
            thread.join()


@contextmanager
def another_thread(start: Callable[[], object]) -> Iterator[Callable[[], object]]:
    """Yield a function that runs `start` on another thread and waits for it."""
    asked: SimpleQueue[bool] = SimpleQueue()
    answered: SimpleQueue[None] = SimpleQueue()

    def serve() -> None:
        while asked.get():
            start()
            answered.put(None)

    def hand_over() -> None:
        asked.put(True)
        answered.get()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield hand_over
    finally:
        asked.put(False)
        thread.join()


@contextmanager
def telling(dsn: str) -> Iterator[Callable[[], object]]:
    """Yield a function that writes a row and notifies the listening thread."""
    with connect(dsn) as producer:
        yield lambda: producer.execute(_TELL, [str(uuid4())])


def _listen(
    connection: psycopg.Connection[Any], start: Callable[[], object], stopping: threading.Event
) -> None:
    # Not connection.notifies(): it takes a lock and a selector for each wait.
    told: list[psycopg.Notify] = []  # notifications that came with the answer to a statement
    connection.add_notify_handler(told.append)
    while not stopping.is_set():
        if not told:
            select.select([connection], [], [])
            connection.pgconn.consume_input()
            while connection.pgconn.notifies():
                pass
        told.clear()
        for row in connection.execute(_CLAIM_ONE).fetchall():
            start()
            connection.execute("delete from bgjob_job where id = %s and token = 1", [row[0]])
