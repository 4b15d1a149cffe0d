"""Every SQL string that bgjob runs, each a value that knows its parameters and its rows.

The rules they keep:

- Only the database's clock decides. The due predicate compares with now(),
  which is stable and bounds the index scan; clock_timestamp() does not, and
  halves the rate over a large backlog. Due times and lease ends are written
  from clock_timestamp(), so that the rows of one call stay in order and a
  watermark can pass between them.
- A claim finds rows by position: `ctid = any (array(...))`. With statistics
  taken while the table was empty and 70,000 dead rows under an old snapshot, a
  claim of 500 took 8 to 10 ms so, 1.4 s as `id = any (array(...))`, and 68 s as
  `id in (select ...)`.
- Every write that ends or extends a claim carries the claim's token.
- Arrays instead of loops, and always `id = any (...)` on bgjob_job beside a join
  with an unnested array: the plan is then an index scan whatever is guessed
  of the array.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from operator import itemgetter
from typing import Any, Generic, LiteralString, NamedTuple, TypeVar
from zlib import crc32

from bgjob._duration import seconds
from bgjob.job import DeadJob, EnqueueRequest, Job
from bgjob.stats import QueueStats

T_co = TypeVar("T_co", covariant=True)
Row = tuple[Any, ...]


class Statement(NamedTuple, Generic[T_co]):
    """SQL, its parameters, and how to read its rows."""

    text: LiteralString | bytes
    params: Mapping[str, object] | None
    parse: Callable[[Sequence[Row]], T_co]
    binary: bool = False
    prepare: bool | None = None
    """False where a session with PostgreSQL's own settings must plan it each time: a plan that
    it keeps from a table of one page scans the whole table when that has grown. A worker's
    connection plans for any size, and keeps its plans."""


# -- notification ---------------------------------------------------------------

LOCK_CLASS = 0x62676A62
"""The first key of bgjob's advisory locks; the second is the queue's bucket."""

BUCKETS = 128
"""Queues share this many locks and channels, so that 10,000 queues do not fill the lock table."""


def bucket(queue: str) -> int:
    """Give the number of the lock and channel that `queue` shares with others."""
    return crc32(queue.encode()) % BUCKETS


def channel(queue: str) -> str:
    """Give the channel on which enqueues to `queue` are notified; for the payload see Notice."""
    return f"bgjob_{bucket(queue)}"


def listen(queue: str) -> Statement[None]:
    """Receive the notifications of `queue` on this connection."""
    return Statement(f"listen {channel(queue)}".encode(), None, _nothing)


def park(queue: str) -> Statement[str]:
    """Ask every later enqueue to `queue` to notify, before this worker goes to sleep.

    An enqueue shares the lock until its transaction ends, and notifies where it
    cannot. 'parked': the lock is held, no enqueue is in flight unseen.
    'covered': another worker sleeps and holds it. 'contended': enqueues are in
    flight; look again soon.
    """
    return Statement(
        """
        select case
            when pg_try_advisory_lock(%(class)s, %(bucket)s) then 'parked'
            when not pg_try_advisory_lock_shared(%(class)s, %(bucket)s) then 'covered'
            when pg_advisory_unlock_shared(%(class)s, %(bucket)s) then 'contended'
        end
        """,
        {"class": LOCK_CLASS, "bucket": bucket(queue)},
        _scalar,
    )


def unpark(queue: str) -> Statement[None]:
    """Stop asking for notifications, and wake whoever relied on it: one of them parks next.

    The session holds no other lock of this kind; but this one twice where the
    transaction that took it first was refused, which does not undo it.
    """
    return Statement(
        "select pg_advisory_unlock_all(), pg_notify(%(channel)s, '')",
        {"channel": channel(queue)},
        _nothing,
    )


# -- enqueue --------------------------------------------------------------------

# The lock is taken after the insert and before the commit; it is let go after
# the row is visible. So a worker that gets it exclusively sees the row.
_ENQUEUE = """
    insert into bgjob_job (id, queue, type, arg, priority)
    values (%(id)s, %(queue)s, %(type)s, %(arg)b, %(priority)s)
    on conflict (id) do nothing
    returning
"""

_ENQUEUE_OTHERS = """
    insert into bgjob_job (id, queue, type, arg, priority, exclusive, next_run_at)
    values (
        %(id)s, %(queue)s, %(type)s, %(arg)b, %(priority)s, %(exclusive)s,
        greatest(%(run_at)s::timestamptz, clock_timestamp()) + %(delay)s * interval '1 second'
    )
    on conflict (id) do nothing
    returning
"""

# Since when its transaction has been under way: how far behind the others it may be; the
# priority, or where it is due later only a sign for that; the queue.
_TELL = """
    case when not pg_try_advisory_xact_lock_shared(%(class)s, %(bucket)s)
        then pg_notify(
            %(channel)s, concat_ws(' ', extract(epoch from now()), %(what)s::text, queue)
        ) end
"""

# By whether it is plain, and whether to tell; made once, and as fast as a bare insert.
_ENQUEUES: Mapping[tuple[bool, bool], LiteralString] = {
    (True, False): _ENQUEUE + "true",
    (True, True): _ENQUEUE + _TELL,
    (False, False): _ENQUEUE_OTHERS + "true",
    (False, True): _ENQUEUE_OTHERS + _TELL,
}


def enqueue(request: EnqueueRequest, *, notify: bool) -> Statement[bool]:
    """Write one job; whether it was written, False where its id is taken."""
    plain = request.exclusive is None and not _is_later(request)
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
        }
    if notify:
        number = bucket(request.queue)
        params |= {"class": LOCK_CLASS, "bucket": number, "channel": f"bgjob_{number}"}
        params["what"] = _what(request)
    return Statement(_ENQUEUES[plain, notify], params, bool)


_TELL_MANY = """
    (
        select count(pg_notify(channel, concat_ws(' ', extract(epoch from now()), what, queue)))
        from unnest(
            %(told_queues)s::text[], %(told_whats)s::text[], %(told_channels)s::text[],
            %(told_buckets)s::int[]
        ) as told (queue, what, channel, bucket)
        where {condition}
            and not pg_try_advisory_xact_lock_shared(%(class)s, told.bucket)
    )
"""


def enqueue_many(requests: Sequence[EnqueueRequest], *, notify: bool) -> Statement[set[str]]:
    """Write jobs; the ids that were written, without those that are taken.

    The rows are written in the order of their ids, so that two calls with the
    same ids wait for each other and do not deadlock; their due times keep the
    order of the call.
    """
    tell = "," + _TELL_MANY.format(condition="exists (select from written)")
    return Statement(
        f"""
        with request as (
            select id, queue, type, arg, priority, exclusive, position,
                greatest(run_at, clock_timestamp()) + delay * interval '1 second' as next_run_at
            from unnest(
                %(ids)s::text[], %(queues)s::text[], %(types)s::text[], %(args)b::bytea[],
                %(priorities)s::smallint[], %(exclusives)s::text[],
                %(run_ats)s::timestamptz[], %(delays)s::float8[]
            ) with ordinality as r (
                id, queue, type, arg, priority, exclusive, run_at, delay, position
            )
        ), written as (
            insert into bgjob_job (id, queue, type, arg, priority, exclusive, next_run_at)
            select id, queue, type, arg, priority, exclusive, next_run_at from request
            order by id, position
            on conflict (id) do nothing
            returning id
        )
        select array(select id from written) {tell if notify else ""}
        """,
        {
            "ids": _text_array([r.id for r in requests]),
            "queues": _text_array([r.queue for r in requests]),
            "types": _text_array([r.type for r in requests]),
            "args": [r.payload for r in requests],
            "priorities": _number_array([r.priority for r in requests]),
            "exclusives": [r.exclusive for r in requests],
            "run_ats": [r.run_at for r in requests],
            "delays": _number_array([seconds(r.delay, "delay") for r in requests]),
            **_told({(r.queue, _what(r)) for r in requests}),
        },
        lambda rows: set(rows[0][0]),
        binary=True,
    )


def _told(told: Collection[tuple[str, str]]) -> dict[str, object]:
    return {
        "class": LOCK_CLASS,
        "told_queues": [queue for queue, _ in told],
        "told_whats": [what for _, what in told],
        "told_channels": [channel(queue) for queue, _ in told],
        "told_buckets": [bucket(queue) for queue, _ in told],
    }


def _what(request: EnqueueRequest) -> str:
    return "-" if _is_later(request) else str(request.priority)


def _is_later(request: EnqueueRequest) -> bool:
    return bool(request.delay or request.run_at)


class Copy(NamedTuple):
    """Rows for a binary COPY, which takes half the time of an insert."""

    text: LiteralString
    types: Sequence[str]
    rows: Iterable[Row]


def copy_many(requests: Sequence[EnqueueRequest]) -> Copy | None:
    """Write jobs that are due now; unlike `enqueue_many` it fails where an id is taken.

    None where COPY does not do it: it computes no due times, writes rows in the
    order in which they come, which has to be that of their ids, and no keys.
    """
    ids = [r.id for r in requests]
    others = any(r.delay or r.run_at or r.exclusive is not None for r in requests)
    if others or ids != sorted(ids):
        return None
    return Copy(
        "copy bgjob_job (id, queue, type, arg, priority) from stdin (format binary)",
        ("text", "text", "text", "bytea", "int2"),
        [(r.id, r.queue, r.type, r.payload, r.priority) for r in requests],
    )


def tell_many(requests: Sequence[EnqueueRequest]) -> Statement[None]:
    """Wake the workers of these requests' queues when the transaction commits."""
    return _tell({(r.queue, _what(r)) for r in requests})


def tell_all(queues: Iterable[str]) -> Statement[None]:
    """Let the workers of these queues look at all that is there when the transaction commits."""
    return _tell({(queue, "-") for queue in queues})


def _tell(told: Collection[tuple[str, str]]) -> Statement[None]:
    return Statement(f"select {_TELL_MANY.format(condition='true')}", _told(told), _nothing)


# -- claim ----------------------------------------------------------------------


# A column spoiled by hand must not stop its neighbours: infinite times are
# brought into Python's range, and an attempt at the end of integer stays there.
def _in_range(column: LiteralString) -> LiteralString:
    return f"least(greatest({column}, '0001-01-02 00:00+00'), '9999-12-30 00:00+00')"


_JOB_COLUMNS = f"""
    id, queue, type, arg, attempt, last_error, priority,
    {_in_range("next_run_at")}, {_in_range("created_at")}, {_in_range("updated_at")}, exclusive
"""

# Each priority in use, without a scan over its rows.
_PRIORITIES = """
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

_FRESH = "j.lease_until is null and j.deaths <= 0"
_ENDED = "j.lease_until <= now()"

# Of no row: looked up once a statement, and nothing is read where the queue is paused.
_UNPAUSED = """
    not exists (select from bgjob_pause p where p.queue = %(queue)s and p.until > now())
"""


def _due(lines: LiteralString, which: LiteralString) -> LiteralString:
    return f"""
        {lines}
        cross join lateral (
            select j.ctid, j.lease_until is not null as ended from bgjob_job j
            where j.queue = %(queue)s and j.priority = line.priority
                and j.next_run_at >= line.since and j.next_run_at <= now() and not j.waits
                and ({which})
            order by j.next_run_at
            limit %(limit)s
            for update skip locked
        ) as due
        limit %(limit)s
    """


_LINES_FROM_MARKS = """
    select due.ctid
    from (
        select priority, least(mark, now() - %(back)s * interval '1 second') as since
        from unnest(%(priorities)s::smallint[], %(marks)s::timestamptz[]) as m (priority, mark)
    ) as line
"""

_CLAIM = f"""
    update bgjob_job set {_TAKE}
    where ctid = any (array({_due(_LINES_FROM_MARKS, f"{_FRESH} and {_UNPAUSED}")}))
    returning {_JOB_COLUMNS}
"""

# Most queues have one priority. Without the join an idle worker claims a job in 0.6
# instead of 0.75 ms.
_CLAIM_OF_ONE_PRIORITY = f"""
    update bgjob_job set {_TAKE}
    where ctid = any (array(
        select j.ctid from bgjob_job j
        where j.queue = %(queue)s and j.priority = %(priority)s
            and j.next_run_at >=
                least(%(mark)s::timestamptz, now() - %(back)s * interval '1 second')
            and j.next_run_at <= now() and not j.waits and {_FRESH} and {_UNPAUSED}
        order by j.next_run_at
        limit %(limit)s
        for update skip locked
    ))
    returning {_JOB_COLUMNS}
"""

_LINES = f"""
    {_PRIORITIES}
    select due.ctid, due.ended
    from (
        select priority, timestamptz '-infinity' as since from line where priority is not null
    ) as line
"""

# What was in flight when its worker died is only set free here: whichever of
# those jobs killed it, the next attempt of each is a claim of its own. It is set
# free while the queue is paused, too.
_SWEEP = f"""
    with due as materialized ({_due(_LINES, f"{_FRESH} and {_UNPAUSED} or {_ENDED}")}),
    freed as (
        update bgjob_job
        set token = null, lease_until = null, deaths = least(deaths, 32766) + 1
        where ctid = any (array(select ctid from due where ended))
        returning 1
    ), claimed as (
        update bgjob_job set {_TAKE}
        where ctid = any (array(select ctid from due where not ended))
        returning {_JOB_COLUMNS}
    )
    select claimed.*, freed.count
    from (select count(*) from freed) as freed left join claimed on true
"""

_FREE = f"""
    with freed as (
        update bgjob_job
        set token = null, lease_until = null, deaths = least(deaths, 32766) + 1
        where ctid = any (array(
            select due.ctid from ({_due(_LINES, _ENDED)}) as due
        ))
        returning 1
    )
    select count(*) from freed
"""

_CLAIM_SUSPECT = f"""
    update bgjob_job set {_TAKE}
    where ctid = any (array(
        select j.ctid from bgjob_job j
        where j.queue = %(queue)s and j.deaths > 0 and j.lease_until is null
            and j.next_run_at <= now() and not j.waits and {_UNPAUSED}
        order by j.priority, j.next_run_at, j.deaths
        limit 1
        for update skip locked
    ))
    returning {_JOB_COLUMNS}, deaths
"""

_CLAIM_ANY = f"""
    update bgjob_job set {_TAKE}, deaths = least(deaths, 32766) + (lease_until is not null)::int
    where ctid = any (array(
        select due.ctid from (
            {_due(_LINES, f"(j.lease_until is null or {_ENDED}) and {_UNPAUSED}")}
        ) as due
    ))
    returning {_JOB_COLUMNS}, deaths
"""


def claim(
    queue: str,
    *,
    limit: int,
    lease: float,
    token: int,
    marks: Mapping[int, datetime],
    back: float,
) -> Statement[list[Job]]:
    """Claim due jobs of these priorities, from their marks or the last `back` seconds on.

    They are taken in (priority, next_run_at) order, and come sorted so.
    """
    params: dict[str, object] = {
        "queue": queue,
        "limit": limit,
        "lease": lease,
        "token": token,
        "back": back,
    }
    if len(marks) == 1:
        [(priority, mark)] = marks.items()
        params |= {"priority": priority, "mark": mark}
        return Statement(_CLAIM_OF_ONE_PRIORITY, params, _jobs_of_one_priority, binary=True)
    priorities = sorted(marks)
    params |= {"priorities": priorities, "marks": [marks[priority] for priority in priorities]}
    return Statement(_CLAIM, params, _jobs, binary=True)


class Horizon(NamedTuple):
    """Which transactions may still bring rows, by their numbers."""

    oldest: int
    """All before this one have ended."""
    next: int
    """This one, and all after it, had not begun."""


def horizon() -> Statement[Horizon]:
    """Tell which transactions are under way."""
    return Statement(
        "select pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint "
        "from pg_current_snapshot() as s",
        None,
        lambda rows: Horizon(*rows[0]),
    )


class Swept(NamedTuple):
    """What a sweep found: jobs it claimed, and how many it set free as suspects."""

    jobs: list[Job]
    freed: int


def sweep(queue: str, *, limit: int, lease: float, token: int) -> Statement[Swept]:
    """Claim due jobs of every priority, wherever they lie; set free those whose lease has ended."""
    return Statement(
        _SWEEP,
        {"queue": queue, "limit": limit, "lease": lease, "token": token},
        _swept,
        binary=True,
    )


def free(queue: str, *, limit: int) -> Statement[Swept]:
    """Set free jobs whose lease has ended, and claim nothing."""
    return Statement(_FREE, {"queue": queue, "limit": limit}, lambda rows: Swept([], rows[0][0]))


class Suspect(NamedTuple):
    """A job whose worker died, or lost the lease, so many times in a row."""

    job: Job
    deaths: int


def claim_suspect(queue: str, *, lease: float, token: int) -> Statement[list[Suspect]]:
    """Claim the first due job of those that were in flight when their worker died."""
    return Statement(
        _CLAIM_SUSPECT,
        {"queue": queue, "lease": lease, "token": token},
        _suspects,
        binary=True,
    )


def claim_any(queue: str, *, lease: float, token: int) -> Statement[list[Suspect]]:
    """Claim the first due job, whatever became of its last worker."""
    return Statement(
        _CLAIM_ANY,
        {"queue": queue, "limit": 1, "lease": lease, "token": token},
        _suspects,
        binary=True,
        prepare=False,
    )


# The same jobs by the clock that goes on while a transaction is open, where now() stands still.
_CLAIM_NOW = _CLAIM_ANY.replace("now()", "clock_timestamp()")


def claim_now(queue: str, *, lease: float, token: int) -> Statement[list[Suspect]]:
    """Claim the first due job, also one that this transaction has made due; as claim_any."""
    return claim_any(queue, lease=lease, token=token)._replace(text=_CLAIM_NOW)


class Line(NamedTuple):
    """One priority of a queue."""

    priority: int
    since: datetime
    """What was due earlier has been claimed, or may not be: long ago where the queue is paused."""
    wait: float | None
    """Seconds until the next job that is not due yet."""
    deaths: int | None
    """Those of the first suspect that may be claimed."""


def survey(queue: str) -> Statement[list[Line]]:
    """List the priorities in use, and of each when the next job is due, and the first suspect."""
    return Statement(
        f"""
        {_PRIORITIES}
        select line.priority,
            case when {_UNPAUSED} then now() else '0001-01-02 00:00+00' end,
            extract(epoch from (
            select j.next_run_at from bgjob_job j
            where j.queue = %(queue)s and j.priority = line.priority
                and j.next_run_at > now() and j.next_run_at < 'infinity' and not j.waits
            order by j.next_run_at limit 1
        ) - clock_timestamp())::float8, (
            select j.deaths from bgjob_job j
            where j.queue = %(queue)s and j.priority = line.priority and j.deaths > 0
                and j.lease_until is null and j.next_run_at <= now() and not j.waits
                and {_UNPAUSED}
            order by j.next_run_at, j.deaths limit 1
        )
        from line where line.priority is not null
        """,
        {"queue": queue},
        lambda rows: [Line(*row) for row in rows],
    )


# -- settle and extend ----------------------------------------------------------


class Claimed(NamedTuple):
    """A job and the token of the claim that holds it."""

    job: Job
    token: int
    deaths: int = 0
    """How many workers in a row died, or lost the lease, before this claim."""


def complete(claimed: Sequence[Claimed]) -> Statement[list[str]]:
    """Delete jobs that are done; the ids of those still held."""
    ids = [c.job.id for c in claimed]

    def all_or_some(rows: Sequence[Row]) -> list[str]:
        [(some, count)] = rows
        return ids if count == len(ids) else some or []

    return Statement(
        """
        with gone as (
            delete from bgjob_job
            where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
            returning id
        )
        -- Mostly all of them are, and need not be told one by one.
        select case when count(*) < %(count)s then array_agg(id) end, count(*) from gone
        """,
        {**_held(claimed, ids), "count": len(ids)},
        all_or_some,
        prepare=False,
    )


def begin(token: int) -> bytes:
    """Open the transaction of a handler, and mark it as the one that belongs to a claim.

    One mark ends with the transaction, however that ends. The other is undone
    by a rollback and outlives a commit. How long the handler may be idle in it
    is for the lease to say.
    """
    return (
        f"begin; set local bgjob.claim = '{token:d}'; set bgjob.committed = '{token:d}'; "
        "set local idle_in_transaction_session_timeout = 0"
    ).encode()


def claim_of_transaction() -> Statement[str | None]:
    """Give the token of the claim that this transaction was opened for."""
    return Statement("select current_setting('bgjob.claim', true)", None, _scalar)


COMMIT = (
    b"commit; close all; set session authorization default; reset all; unlisten *; "
    b"select pg_advisory_unlock_all(); discard temp; discard sequences"
)
"""Ends it, and what the handler may have left in the session: all that `discard all` would end,
but for prepared statements."""

ROLLBACK = b"rollback; select current_setting('bgjob.committed', true)"
"""Ends it otherwise; its second result is the token of a claim whose transaction was committed."""


class Postponed(NamedTuple):
    """A job that goes back to its queue."""

    claimed: Claimed
    delay: float | None
    """Seconds from now; None keeps the due time."""
    error: str | None
    """None keeps the last one."""
    refund: bool
    """Whether the attempt is given back."""
    deaths: int = 0
    """What stays on record of workers that died."""
    priority: int | None = None
    """None keeps its own."""


def postpone(postponed: Sequence[Postponed]) -> Statement[list[str]]:
    """Give jobs back to their queue; the ids of those still held."""
    return Statement(
        """
        update bgjob_job j
        set token = null,
            lease_until = null,
            next_run_at = coalesce(
                clock_timestamp() + p.delay * interval '1 second', j.next_run_at
            ),
            attempt = greatest(j.attempt, p.refund) - p.refund,
            deaths = p.deaths,
            last_error = coalesce(p.error, j.last_error),
            priority = coalesce(p.priority, j.priority),
            updated_at = clock_timestamp()
        from unnest(
            %(ids)s::text[], %(tokens)s::bigint[], %(delays)s::float8[],
            %(errors)s::text[], %(refunds)s::int[], %(deaths)s::smallint[],
            %(priorities)s::smallint[]
        ) as p (id, token, delay, error, refund, deaths, priority)
        where j.id = any (%(ids)s::text[]) and j.id = p.id and j.token = p.token
        returning j.id
        """,
        {
            "ids": [p.claimed.job.id for p in postponed],
            "tokens": [p.claimed.token for p in postponed],
            "delays": [p.delay for p in postponed],
            "errors": [p.error for p in postponed],
            "refunds": [int(p.refund) for p in postponed],
            "deaths": [p.deaths for p in postponed],
            "priorities": [p.priority for p in postponed],
        },
        _column,
        prepare=False,
    )


class Buried(NamedTuple):
    """A job that goes to the dead-letter table."""

    claimed: Claimed
    error: str


def bury(buried: Sequence[Buried]) -> Statement[list[str]]:
    """Move jobs to the dead-letter table; the ids of those still held."""
    return Statement(
        """
        with gone as (
            delete from bgjob_job
            where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
            returning id, queue, type, arg, attempt, priority, exclusive, next_run_at,
                created_at, updated_at
        )
        insert into bgjob_dead_job (
            job_id, queue, type, arg, attempt, last_error, priority, exclusive, next_run_at,
            job_created_at, job_updated_at
        )
        select gone.id, queue, type, arg, attempt, b.error, priority, exclusive, next_run_at,
            created_at, updated_at
        from gone
        join unnest(%(ids)s::text[], %(errors)s::text[]) as b (id, error) on b.id = gone.id
        returning job_id
        """,
        {**_held([b.claimed for b in buried]), "errors": [b.error for b in buried]},
        _column,
        prepare=False,
    )


def extend(claimed: Sequence[Claimed], *, lease: float) -> Statement[list[str]]:
    """Let leases end `lease` seconds from now; the ids of those still held.

    A row that somebody has locked is passed over: the handler whose transaction
    settles it, mostly, and the other leases must not wait for that.
    """
    return Statement(
        """
        with extended as (
            update bgjob_job
            set lease_until = clock_timestamp() + %(lease)s * interval '1 second'
            where ctid = any (array(
                select ctid from bgjob_job
                where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
                for update skip locked
            ))
        )
        select id from bgjob_job
        where id = any (%(ids)s::text[]) and token = any (%(tokens)s::bigint[])
        """,
        {**_held(claimed), "lease": lease},
        _column,
    )


# -- exclusive keys ---------------------------------------------------------------

# What is decided about a key is decided while its row is locked, by a statement that
# begins after that, so that it sees all that was decided before. Rows are locked in the
# order of their keys, and no transaction locks twice. Rows of jobs are not waited for
# meanwhile, so that nobody has to wait for long.

# Its job is claimed: the claim's token is gone as soon as that is settled or freed. Not
# `exists`: where a nested loop is off that becomes a hash of the whole table.
_IS_HELD = """
    (select true from bgjob_job h where h.id = e.job_id and h.token = e.token) is not null
"""


# Another job of the key and the queue of f, that was due before it. The order, here and
# below, is that of one index only: with statistics of a drained table the planner took
# bgjob_job_due, and walked over all that was due in the queue.
_EARLIER = """
    (
        select true from bgjob_job o
        where o.exclusive = f.key and {which} and o.queue = f.queue
            and (o.next_run_at, o.id) < (f.next_run_at, f.id)
        order by o.next_run_at, o.id
        limit 1
    ) is not null
"""
_EARLIER_WAITS = _EARLIER.format(which="o.waits")
_EARLIER_IS_DUE = _EARLIER.format(which="not o.waits")


def lock_keys(keys: Iterable[str]) -> Statement[None]:
    """Lock the rows of keys; those that are not there are made.

    One that was only looked for might be deleted while it is waited for, and made anew by
    somebody else: then it would be there, and not locked. Where one is there it is locked
    and not written, so that an old snapshot keeps one dead row of it a job, not three.
    """
    return Statement(
        """
        insert into bgjob_exclusive (key)
        select key from unnest(%(keys)s::text[]) as k (key)
        on conflict (key) do update set job_id = excluded.job_id where false
        returning key
        """,
        {"keys": sorted(set(keys))},
        _nothing,
        prepare=False,
    )


def acquire(
    queue: str, claimed: Sequence[Claimed]
) -> Statement[dict[tuple[str, int], bool | None]]:
    """Let claimed jobs have their keys, which are locked; tell by id and token who has its own.

    Nothing was decided, None, where others have locked the job's row, as a claim
    does that meets it a moment too late; one that is held no more is missing.
    Those that cannot have theirs go back and wait aside, and with them the other
    due jobs of a key that is held, so that no claim meets them. Of one key and
    queue the job that was due first goes first, also where it waits or another
    worker has just claimed it.
    """
    return Statement(
        f"""
        with wanted as materialized (
            select w.key, w.deaths, j.id, j.token, j.queue, j.next_run_at,
                coalesce(e.job_id = j.id and e.token = j.token, false) as has_it
            from unnest(
                %(ids)s::text[], %(tokens)s::bigint[], %(keys)s::text[], %(deaths)s::smallint[]
            ) as w (id, token, key, deaths)
            join bgjob_job j on j.id = w.id and j.token = w.token
            join bgjob_exclusive e on e.key = w.key
            where j.id = any (%(ids)s::text[]) and e.key = any (%(keys)s::text[])
            for update of j skip locked
        ), first as materialized (
            select distinct on (key) key, id, token, queue, next_run_at, has_it
            from wanted order by key, has_it desc, next_run_at, id
        ), granted as materialized (
            select f.key, f.id, f.token
            from first f join bgjob_exclusive e on e.key = f.key
            where e.key = any (%(keys)s::text[]) and (
                f.has_it or not ({_IS_HELD} or {_EARLIER_WAITS} or {_EARLIER_IS_DUE})
            )
        ), taken as (
            update bgjob_exclusive e set job_id = g.id, token = g.token
            from granted g
            where e.key = any (%(keys)s::text[]) and e.key = g.key
        ), aside as materialized (
            select o.ctid
            from (
                select e.key from bgjob_exclusive e
                where e.key = any (%(keys)s::text[])
                    and ({_IS_HELD} or e.key in (select key from granted))
            ) as k
            -- Those of this queue only: they are a range of the index, however many are not
            -- due. Another queue's workers find theirs.
            cross join lateral (
                select j.ctid from bgjob_job j
                where j.exclusive = k.key and not j.waits and j.queue = %(queue)s
                    and j.next_run_at <= now() and j.token is null
                order by j.next_run_at, j.id
                limit %(most)s
                for update skip locked
            ) as o
            limit %(most)s
        ), put_aside as (
            update bgjob_job set waits = true where ctid = any (array(select ctid from aside))
        ), named as (
            update bgjob_job j set exclusive = w.key
            from wanted w
            where j.id = any (array(select id from granted)) and j.id = w.id
                and j.exclusive is distinct from w.key
        ), parked as (
            update bgjob_job j
            set exclusive = w.key,
                waits = true,
                token = null,
                lease_until = null,
                attempt = greatest(j.attempt, 1) - 1,
                deaths = w.deaths
            from wanted w
            where j.id = any (array(
                select id from wanted where id not in (select id from granted)
            )) and j.id = w.id
        )
        select j.id, j.token, case
            when j.id in (select id from granted) then true
            when j.id in (select id from wanted) then false
        end
        from bgjob_job j
        where j.id = any (%(ids)s::text[]) and j.token = any (%(tokens)s::bigint[])
        """,
        {
            "queue": queue,
            "ids": [c.job.id for c in claimed],
            "tokens": [c.token for c in claimed],
            "keys": [c.job.exclusive for c in claimed],
            "deaths": [c.deaths for c in claimed],
            "most": 1000,
        },
        lambda rows: {(id_, token): has_it for id_, token, has_it in rows},
        prepare=False,
    )


class Woken(NamedTuple):
    """A job that has waited for a key, and is due."""

    priority: int
    since: datetime


def release(queue: str, keys: Iterable[str]) -> Statement[list[Woken]]:
    """Wake the first job that waits for each of these keys, which are locked and may be free.

    Of each queue; gives those of this one, whose workers are notified as of an
    enqueue. Those of others look when they poll.
    """
    return Statement(
        f"""
        with recursive free as materialized (
            select e.key from bgjob_exclusive e
            where e.key = any (%(keys)s::text[]) and not ({_IS_HELD})
        ), line (key, queue) as (
            select free.key, (
                select j.queue from bgjob_job j where j.exclusive = free.key and j.waits
                order by j.queue limit 1
            ) from free
            union all
            select line.key, (
                select j.queue from bgjob_job j
                where j.exclusive = line.key and j.waits and j.queue > line.queue
                order by j.queue limit 1
            ) from line where line.queue is not null
        ), unused as (
            delete from bgjob_exclusive
            where key = any (array(
                select key from line group by key having count(queue) = 0
            ))
        ), first as materialized (
            select f.id
            from line
            cross join lateral (
                select line.key, j.id, j.queue, j.next_run_at from bgjob_job j
                where j.exclusive = line.key and j.waits and j.queue = line.queue
                order by j.next_run_at, j.id
                limit 1
                for update skip locked
            ) as f
            where not ({_EARLIER_IS_DUE})
        ), woken as (
            update bgjob_job set waits = false where id = any (array(select id from first))
            returning queue, priority, {_in_range("next_run_at")} as since
        )
        select priority, since, case
            when not pg_try_advisory_xact_lock_shared(%(class)s, %(bucket)s)
            then pg_notify(
                %(channel)s, concat_ws(' ', extract(epoch from since), priority, queue)
            )
        end from woken where queue = %(queue)s
        """,
        {
            "queue": queue,
            "keys": sorted(set(keys)),
            "class": LOCK_CLASS,
            "bucket": bucket(queue),
            "channel": channel(queue),
        },
        lambda rows: [Woken(*row[:2]) for row in rows],
        prepare=False,
    )


_OF_KEY = """
    (
        select true from bgjob_job j
        where j.exclusive = e.key and {which}
        order by {order}
        limit 1
    )
"""
_WAITS_ANYWHERE = _OF_KEY.format(which="j.waits", order="j.queue")
_WAITS_HERE = _OF_KEY.format(which="j.waits and j.queue = %(queue)s", order="j.next_run_at, j.id")
_IS_DUE_HERE = _OF_KEY.format(
    which="not j.waits and j.queue = %(queue)s and j.next_run_at <= now()",
    order="j.next_run_at, j.id",
)


class Blocked(NamedTuple):
    """Keys whose jobs wait for nothing."""

    keys: list[str]
    after: str
    """Where to go on looking; empty at the end."""


def blocked(queue: str, *, after: str, limit: int) -> Statement[Blocked]:
    """Find keys whose jobs in this queue wait for nothing: nobody has them, or is about to.

    Their holder died or was deleted, or its worker died before it had released them. A
    holder of another queue, which may have no worker left, is set free here when its lease
    has ended. Keys that nobody wants any more are found as well. It looks at the first `limit`
    keys after one, so that no sweep walks over all of them.
    """
    return Statement(
        f"""
        with looked_at as materialized (
            select key, job_id, token from bgjob_exclusive where key > %(after)s
            order by key limit %(limit)s
        ), ended as (
            update bgjob_job
            set token = null, lease_until = null, deaths = least(deaths, 32766) + 1
            where ctid = any (array(
                select h.ctid from looked_at e
                cross join lateral (
                    select j.ctid from bgjob_job j
                    where j.id = e.job_id and j.token = e.token and j.queue <> %(queue)s
                        and j.lease_until <= now()
                    limit 1
                    for update skip locked
                ) as h
            ))
            returning id
        )
        select array(
            select e.key from looked_at e
            where (not ({_IS_HELD}) or e.job_id = any (array(select id from ended)))
                and {_IS_DUE_HERE} is null
                and ({_WAITS_HERE} is not null or {_WAITS_ANYWHERE} is null)
        ), case when count(*) = %(limit)s then max(key) else '' end
        from looked_at
        """,
        {"queue": queue, "after": after, "limit": limit},
        lambda rows: Blocked(*rows[0]),
        prepare=False,
    )


# -- tests ----------------------------------------------------------------------


_WAITS = """
    j.queue = %(queue)s and j.lease_until is null
    and j.next_run_at > clock_timestamp() and j.next_run_at < 'infinity'
"""


def let_pass(queue: str, seconds: float) -> Statement[float]:
    """Move the due times of waiting jobs back until one is due; by how much, at most `seconds`."""
    return Statement(
        f"""
        with step as materialized (
            select greatest(0, least(
                %(seconds)s::float8,
                extract(epoch from min(j.next_run_at) - clock_timestamp())::float8
            )) as seconds
            from bgjob_job j where {_WAITS}
        ), moved as (
            update bgjob_job j set next_run_at = j.next_run_at - step.seconds * interval '1 second'
            from step where {_WAITS}
        )
        select seconds from step
        """,
        {"queue": queue, "seconds": seconds},
        _scalar,
    )


def live_jobs() -> Statement[list[Job]]:
    """List every job that waits or runs, of all queues."""
    return Statement(
        f"select {_JOB_COLUMNS} from bgjob_job order by queue, priority, next_run_at, id",
        None,
        lambda rows: list(map(_job, rows)),
        binary=True,
    )


# -- pause --------------------------------------------------------------------------


def pause(queue: str, until: datetime | None) -> Statement[None]:
    """Let nothing be claimed from a queue before this time, or before it is resumed."""
    return Statement(
        """
        insert into bgjob_pause (queue, until)
        values (%(queue)s, coalesce(%(until)s, timestamptz 'infinity'))
        on conflict (queue) do update set until = excluded.until
        returning true
        """,
        {"queue": queue, "until": until},
        _nothing,
    )


def claims_under_way() -> Statement[set[str]]:
    """List the transactions that may have looked for a pause earlier, and may still claim.

    A claim locks both tables, in these modes, before it looks, and until its
    transaction ends: one that looked before a pause was committed is among them.
    """
    return Statement(
        """
        select virtualtransaction from pg_locks
        where locktype = 'relation' and granted
            and database = (select oid from pg_database where datname = current_database())
            and (
                relation = 'bgjob_job'::regclass and mode = 'RowExclusiveLock'
                or relation = 'bgjob_pause'::regclass and mode = 'AccessShareLock'
            )
        group by virtualtransaction
        having count(distinct relation) = 2
        """,
        None,
        lambda rows: {row[0] for row in rows},
    )


def resume(queue: str) -> Statement[bool]:
    """Let a queue's jobs be claimed again, and wake its workers; whether it was paused."""
    return Statement(
        """
        with gone as (
            delete from bgjob_pause where queue = %(queue)s returning until > now() as was_paused
        )
        select exists (select from gone where was_paused),
            pg_notify(%(channel)s, concat_ws(' ', extract(epoch from now()), '-', %(queue)s::text))
        """,
        {"queue": queue, "channel": channel(queue)},
        _scalar,
    )


def paused() -> Statement[dict[str, datetime | None]]:
    """List the queues that are paused, each with its end, None for that of a resume."""
    return Statement(
        f"""
        select queue, case when until < 'infinity' then {_in_range("until")} end
        from bgjob_pause where until > clock_timestamp() order by queue
        """,
        None,
        lambda rows: {queue: until for queue, until in rows},  # noqa: C416 (typed)
    )


# -- dead-letter table ----------------------------------------------------------

_DEAD_COLUMNS = f"""
    job_id, queue, type, arg, attempt, last_error, priority, {_in_range("next_run_at")},
    {_in_range("job_created_at")}, {_in_range("job_updated_at")}, exclusive,
    {_in_range("moved_at")}, id
"""

_DEAD_CONDITIONS: Mapping[str, LiteralString] = {
    "ids": "job_id = any (%(ids)s::text[])",
    "queue": "queue = %(queue)s",
    "type": "type = %(type)s",
    "error": "position(%(error)s in last_error) > 0",
    "moved_before": "moved_at < %(moved_before)s",
    "moved_after": "moved_at >= %(moved_after)s",
    "older_than": "moved_at < clock_timestamp() - %(older_than)s * interval '1 second'",
    "before": "id < %(before)s",
}


class DeadFilter(NamedTuple):
    """Which dead jobs; what is None does not restrict."""

    ids: Sequence[str] | None = None
    queue: str | None = None
    type: str | None = None
    error: str | None = None
    moved_before: datetime | None = None
    moved_after: datetime | None = None
    older_than: float | None = None
    before: int | None = None

    @property
    def params(self) -> dict[str, object]:
        """The parameters of the condition."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @property
    def condition(self) -> LiteralString:
        """The condition that they fulfil."""
        return " and ".join(["true", *(_DEAD_CONDITIONS[name] for name in self.params)])


def dlq_list(where: DeadFilter, *, limit: int) -> Statement[list[DeadJob]]:
    """List dead jobs, the latest first."""
    return Statement(
        f"""
        select {_DEAD_COLUMNS} from bgjob_dead_job where {where.condition}
        order by id desc limit %(limit)s
        """,
        {**where.params, "limit": limit},
        lambda rows: [DeadJob._make(row) for row in rows],
        prepare=False,
    )


def dlq_ids(where: DeadFilter) -> Statement[list[str]]:
    """List the ids of dead jobs, each once, in the order in which they died."""
    return Statement(
        f"""
        select job_id from bgjob_dead_job where {where.condition}
        group by job_id order by min(id)
        """,
        where.params,
        _column,
    )


class Requeued(NamedTuple):
    """What went back from the dead-letter table."""

    ids: list[str]
    queues: set[str]


def dlq_requeue(where: DeadFilter) -> Statement[Requeued]:
    """Move dead jobs back to their queues, due now.

    Of several dead jobs with one id the latest goes back. One whose id a live
    job has stays dead.
    """
    return Statement(
        f"""
        with latest as (
            select distinct on (job_id) id from bgjob_dead_job where {where.condition}
            order by job_id, id desc
        ), back as (
            insert into bgjob_job (
                id, queue, type, arg, last_error, priority, exclusive, created_at
            )
            select job_id, queue, type, arg, last_error, priority, exclusive, job_created_at
            from bgjob_dead_job
            where id = any (array(select id from latest))
            order by job_id
            on conflict (id) do nothing
            returning id
        )
        delete from bgjob_dead_job d
        using latest, back
        where d.id = latest.id and d.job_id = back.id
        returning d.job_id, d.queue
        """,
        where.params,
        lambda rows: Requeued(_column(rows), {queue for _, queue in rows}),
        prepare=False,
    )


def dlq_purge(where: DeadFilter) -> Statement[int]:
    """Delete dead jobs; how many."""
    return Statement(
        f"""
        with gone as (delete from bgjob_dead_job where {where.condition} returning id)
        select count(*) from gone
        """,
        where.params,
        _scalar,
        prepare=False,
    )


def dlq_expire(age: float, *, limit: int) -> Statement[int]:
    """Delete those of the first `limit` dead jobs that died longer ago than `age`; how many.

    They are numbered as they die: where the first of them are younger, all are.
    """
    return Statement(
        """
        with gone as (
            delete from bgjob_dead_job
            where id = any (array(select id from bgjob_dead_job order by id limit %(limit)s))
                and moved_at < clock_timestamp() - %(age)s * interval '1 second'
            returning id
        )
        select count(*) from gone
        """,
        {"age": age, "limit": limit},
        _scalar,
    )


# -- stats ------------------------------------------------------------------------

_COUNTED = """
    select coalesce(live.queue, dead.queue), coalesce(live.type, dead.type),
        coalesce(live.waiting - live.delayed, 0), coalesce(live.delayed, 0),
        coalesce(live.jobs - live.waiting, 0), coalesce(dead.jobs, 0),
        extract(epoch from statement_timestamp() - live.oldest)::float8, coalesce(live.retries, 0)
    from (
        select queue, type, count(*) as jobs,
            count(*) filter (where {waits}) as waiting,
            count(*) filter (where {waits} and next_run_at > statement_timestamp()) as delayed,
            count(*) filter (where {waits} and attempt > 0) as retries,
            min(greatest(next_run_at, '0001-01-02 00:00+00')) filter (
                where {waits} and next_run_at <= statement_timestamp()
            ) as oldest
        from bgjob_job {where} group by queue, type
    ) as live
    full join (
        select queue, type, count(*) as jobs from bgjob_dead_job {where} group by queue, type
    ) as dead on (dead.queue, dead.type) = (live.queue, live.type)
    order by 1, 2
"""


def stats(queue: str | None) -> Statement[list[QueueStats]]:
    """Count the jobs of each queue and type, or of one queue only."""
    # Not now(): in the caller's transaction its own jobs would lie in the future.
    waits = "(lease_until is null or lease_until <= statement_timestamp())"
    where = "" if queue is None else "where queue = %(queue)s"
    return Statement(
        _COUNTED.format(waits=waits, where=where),
        None if queue is None else {"queue": queue},
        lambda rows: [QueueStats._make(row) for row in rows],
        prepare=False,
    )


# -- schema and session -----------------------------------------------------------


def schema_comment() -> Statement[str | None]:
    """Give the comment that carries the schema's version; None without the table."""
    return Statement(
        "select obj_description(to_regclass('bgjob_job'), 'pg_class') "
        "where to_regclass('bgjob_job') is not null "
        "and to_regclass('bgjob_dead_job') is not null "
        "and to_regclass('bgjob_exclusive') is not null "
        "and to_regclass('bgjob_pause') is not null",
        None,
        lambda rows: (rows[0][0] or "") if rows else None,
    )


class Lack(NamedTuple):
    """A column that is not there, or a privilege that the role has not."""

    relation: str
    column: str | None
    """None if it is about the whole table."""
    privilege: str
    role: str
    is_absent: bool


# What is selected by position needs the whole table's privilege.
_TABLE_NEEDS = (
    ("bgjob_job", "select"),
    ("bgjob_job", "delete"),
    ("bgjob_exclusive", "select"),
    ("bgjob_exclusive", "delete"),
)
_COLUMN_NEEDS = (
    ("bgjob_job", "select", "id queue type arg priority created_at"),
    (
        "bgjob_job",
        "update",
        (
            "attempt last_error priority deaths exclusive waits next_run_at token lease_until "
            "updated_at"
        ),
    ),
    ("bgjob_exclusive", "insert", "key"),
    ("bgjob_exclusive", "update", "job_id token"),
    (
        "bgjob_dead_job",
        "insert",
        (
            "job_id queue type arg attempt last_error priority exclusive next_run_at "
            "job_created_at job_updated_at"
        ),
    ),
    ("bgjob_dead_job", "select", "job_id"),
    ("bgjob_pause", "select", "queue until"),
)


def lacks(
    table_needs: Iterable[tuple[str, str]] = _TABLE_NEEDS,
    column_needs: Iterable[tuple[str, str, str]] = _COLUMN_NEEDS,
) -> Statement[list[Lack]]:
    """List what a worker (by default) needs of the tables and has not; whole tables first."""
    needs: list[tuple[str, str | None, str]] = [
        (relation, None, privilege) for relation, privilege in table_needs
    ]
    needs += [
        (relation, column, privilege)
        for relation, privilege, columns in column_needs
        for column in columns.split()
    ]
    relations, columns, privileges = zip(*needs, strict=True)
    return Statement(
        """
        select n.relation, n.name, n.privilege, current_user::text,
            n.name is not null and a.attnum is null
        from unnest(%(relations)s::text[], %(columns)s::text[], %(privileges)s::text[])
            with ordinality as n (relation, name, privilege, position)
        left join pg_attribute a on a.attrelid = to_regclass(n.relation) and a.attname = n.name
            and not a.attisdropped
        where case
            when n.name is null then not has_table_privilege(to_regclass(n.relation), n.privilege)
            when a.attnum is null then true
            else not has_column_privilege(n.relation, a.attnum, n.privilege)
        end
        order by n.position
        """,
        {
            "relations": list(relations),
            "columns": list(columns),
            "privileges": list(privileges),
        },
        lambda rows: [Lack(*row) for row in rows],
    )


class Backend(NamedTuple):
    """The server's process that answers."""

    pid: int
    """Behind a pooler it is not the one connected to."""
    is_read_only: bool


def backend() -> Statement[Backend]:
    """Tell who answers."""
    return Statement(
        "select pg_backend_pid(), current_setting('transaction_read_only')::bool",
        None,
        lambda rows: Backend(*rows[0]),
    )


def clock() -> Statement[datetime]:
    """Tell the database's time."""
    return Statement("select clock_timestamp()", None, _scalar)


def session(settings: Mapping[str, str]) -> Statement[None]:
    """Set parameters for the rest of the session."""
    return Statement(
        "select set_config(name, value, false) "
        "from unnest(%(names)s::text[], %(values)s::text[]) as s (name, value)",
        {"names": list(settings), "values": list(settings.values())},
        _nothing,
    )


# -- rows -------------------------------------------------------------------------


def _nothing(_: Sequence[Row]) -> None:
    return None


def _scalar(rows: Sequence[Row]) -> Any:
    return rows[0][0]


def _column(rows: Sequence[Row]) -> list[Any]:
    return [row[0] for row in rows]


# An update returns rows in no order. Of one priority they are sorted twice as fast.


def _jobs(rows: Sequence[Row]) -> list[Job]:
    return list(map(_job, sorted(rows, key=_by_due)))


def _jobs_of_one_priority(rows: Sequence[Row]) -> list[Job]:
    return list(map(_job, sorted(rows, key=_by_next_run_at)))


def _swept(rows: Sequence[Row]) -> Swept:
    return Swept(_jobs([row[:-1] for row in rows if row[0] is not None]), rows[0][-1])


def _suspects(rows: Sequence[Row]) -> list[Suspect]:
    return [Suspect(_job(row[:-1]), row[-1]) for row in rows]


_by_due = itemgetter(6, 7)  # priority and due time
_by_next_run_at = itemgetter(7)
_job = partial(tuple.__new__, Job)  # a third of the time of Job(*row)


def _held(claimed: Sequence[Claimed], ids: Sequence[str] | None = None) -> dict[str, object]:
    return {
        "ids": _text_array(ids or [c.job.id for c in claimed]),
        # Together these say which pairs may match: a worker never holds one id twice.
        "tokens": list({c.token for c in claimed}),
    }


def _number_array(items: Sequence[float]) -> str:
    return f"{{{','.join(map(str, items))}}}"


def _text_array(items: Sequence[str]) -> str:
    # PostgreSQL's array literal in one join: psycopg dumps a list item by item,
    # about 1 µs each, and these arrays are on the hot path.
    joined = '","'.join(items)
    if "\\" in joined or joined.count('"') != 2 * (len(items) - 1):
        joined = '","'.join(i.replace("\\", "\\\\").replace('"', '\\"') for i in items)
    return f'{{"{joined}"}}'
