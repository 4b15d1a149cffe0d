"""Look at one job, and at what may keep it from running.

Each statement is bounded in what it reads, whatever the tables hold: an index finds the job,
and what comes before it is counted up to a cap. The session's settings are those of
`server.bounds`, so that plans do not depend on the statistics. All these answers are about the one
job, so they lie in one module of over 400 lines.

Infinite times are brought into Python's range before they are subtracted: before PostgreSQL 17
an infinite time has no difference to another one.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from functools import partial
from operator import itemgetter
from typing import LiteralString, NamedTuple

from bgjob._sql.dead import fingerprint_of
from bgjob._sql.groups import WAITS_FOR_GROUP
from bgjob._sql.key_rows import HOLDING
from bgjob._sql.statement import Row, Statement, as_text, finite, in_range, scalar
from bgjob._sql.workers import IS_LOST
from bgjob.schedule import ScheduleStatus
from bgjob.workers import MISSED

CAP = 10_000
"""The most jobs that are counted before one."""

_LINES: LiteralString = "10000"
"""The most priorities in which the oldest due job of a queue is looked for."""

_KEYS: LiteralString = "1000"
"""The most keys at which a job of a queue is looked for that waits for one."""

_MOST_WORKERS: LiteralString = "1000"
_NUMBERS: LiteralString = "1048576"
"""A token has the number of its worker modulo this; see `tokens`."""

_ERROR: LiteralString = "left(last_error, 2000)"


class Live(NamedTuple):
    """A job that waits or runs."""

    id: str
    queue: str
    type: str
    priority: int
    attempt: int
    deaths: int
    exclusive: str | None
    waits: bool
    """Whether it was put aside, until its key is free."""
    next_run_at: datetime
    due_in: float
    """Seconds; negative if it is due."""
    is_never_due: bool
    token: int | None
    lease_until: datetime | None
    lease_left: float | None
    """Seconds; negative if the lease has ended, None without one."""
    last_error: str | None
    created_at: datetime
    expires: datetime | None
    expires_in: float | None
    """Seconds; negative if it has expired."""
    is_replaced: bool
    """Whether a newer request waits for its end."""
    saved: int | None
    """The bytes of its checkpoint; None without one."""
    group: str | None
    waits_for_group: bool
    """Whether it is due when no job of its group is live."""
    slots: int | None
    """How many jobs of its key may run at once; None for one."""

    @property
    def is_suspect(self) -> bool:
        """Whether two workers or more died with it."""
        return self.deaths > 1


class Dead(NamedTuple):
    """A job in the dead-letter table."""

    number: int
    queue: str
    type: str
    attempt: int
    last_error: str | None
    moved_at: datetime
    seconds: float
    """Since then."""
    fingerprint: str


class Found(NamedTuple):
    """What there is of an id, at one moment."""

    now: datetime
    job: Live | None
    dead: list[Dead]
    """The latest first, at most three."""


def find(id_: str) -> Statement[Found]:
    """Find a job, alive or dead. One statement: none can slip through between the tables."""
    return Statement(
        f"""
        select clock.now, j.*, d.*
        from (select clock_timestamp() as now) as clock
        left join lateral (
            select id, queue, type, priority, attempt, deaths, exclusive, waits,
                {in_range("next_run_at")},
                extract(epoch from {in_range("next_run_at")} - clock.now)::float8,
                next_run_at = 'infinity', token,
                case when lease_until is not null then {in_range("lease_until")} end,
                case when lease_until is not null
                    then extract(epoch from {in_range("lease_until")} - clock.now)::float8 end,
                {_ERROR}, {in_range("created_at")},
                case when expires is not null then {in_range("expires")} end,
                case when expires is not null
                    then extract(epoch from {in_range("expires")} - clock.now)::float8 end,
                successor is not null, octet_length(checkpoint), group_id,
                {WAITS_FOR_GROUP}, slots
            from bgjob_job j where id = %(id)s
        ) as j on true
        left join lateral (
            select d.id, d.queue, d.type, d.attempt, {_ERROR}, {in_range("moved_at")},
                extract(epoch from clock.now - {in_range("moved_at")})::float8, d.fingerprint
            -- All with this id first: in the order of the other index, which a plan preferred with
            -- statistics of an empty table, it would walk over all later dead jobs.
            from (select * from bgjob_dead_job where job_id = %(id)s offset 0) as d
            order by d.id desc limit 3
        ) as d on true
        """,
        {"id": id_},
        _found,
    )


def _found(rows: Sequence[Row]) -> Found:
    end = 1 + len(Live._fields)
    first = rows[0]
    return Found(
        first[0],
        None if first[1] is None else Live(*first[1:end]),
        [
            Dead._make((*row[end:-1], fingerprint_of(row[-1])))
            for row in rows
            if row[end] is not None
        ],
    )


class Members(NamedTuple):
    """The live jobs of a group, up to CAP."""

    live: int
    running: int
    last: str | None
    """One of them, that with the last id."""


def members(group: str, *, cap: int = CAP) -> Statement[Members]:
    """Count the live jobs of a group, up to a cap."""
    return Statement(
        f"""
        select count(*), count(token), max(id)
        from (
            select j.token, {as_text("j.id")} as id from bgjob_job j
            where j.group_id >= %(group)s and j.group_id <= %(group)s and j.id <> %(group)s
            order by j.group_id desc, j.id desc limit %(cap)s
        ) as live
        """,
        {"group": group, "cap": cap},
        lambda rows: Members(*rows[0]),
    )


class Oldest(NamedTuple):
    """The job of a queue that has been due for longest."""

    now: datetime
    id: str | None
    next_in: float | None
    """Without a due job: the seconds until the next one is."""
    is_exact: bool
    """Whether all keys were looked at."""


def oldest(queue: str) -> Statement[Oldest]:
    """Find the job of a queue that has been due for longest, also one that waits for a key.

    Each priority is found by one look into the index, and its first due job by another. A job that
    waits for a key is in no index of its queue: it is looked for at the first 1,000 keys.
    """
    return Statement(
        f"""
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
        ), known as materialized (
            select priority from line where priority is not null limit {_LINES}
        ), due as materialized (
            select first.id, first.next_run_at
            from known cross join lateral (
                select j.id, j.next_run_at from bgjob_job j
                where j.queue = %(queue)s and j.priority = known.priority
                    and j.next_run_at <= now() and not j.waits
                    and (j.lease_until is null or j.lease_until <= now())
                order by j.next_run_at limit 1
            ) as first
        ), key as materialized (
            select key from bgjob_exclusive where place = 0 order by key limit {_KEYS}
        ), waiting as materialized (
            select first.id, first.next_run_at
            from key cross join lateral (
                select j.id, j.next_run_at from bgjob_job j
                where j.exclusive = key.key and j.waits and j.queue = %(queue)s
                    and j.next_run_at <= now() and j.lease_until is null
                order by j.next_run_at, j.id limit 1
            ) as first
        ), limited as materialized (
            select j.id, j.next_run_at from bgjob_job j
            where j.queue = %(queue)s and j.limited and j.waits
            order by j.type, j.priority, j.next_run_at limit 1
        )
        select clock_timestamp(), (
            select id from (
                select * from due union all select * from waiting union all select * from limited
            ) as job
            order by next_run_at, id limit 1
        ), (
            select min(extract(epoch from {in_range("first.next_run_at")} - now())::float8)
            from known cross join lateral (
                select j.next_run_at from bgjob_job j
                where j.queue = %(queue)s and j.priority = known.priority
                    and j.next_run_at > now() and not j.waits
                order by j.next_run_at limit 1
            ) as first
        ), (select count(*) from key) < {_KEYS}
        """,
        {"queue": queue},
        lambda rows: Oldest(*rows[0]),
    )


class Ahead(NamedTuple):
    """How many due jobs come before a job, each counted up to a cap."""

    lower: int
    """Of lower priority numbers."""
    earlier: int
    """Of its own priority, due before it."""


def ahead(queue: str, priority: int, next_run_at: datetime, *, cap: int = CAP) -> Statement[Ahead]:
    """Count the due jobs of a queue that workers claim before one.

    Priority by priority: a comparison of (priority, next_run_at) would walk over all the jobs of
    a lower priority number that are not due.
    """
    return Statement(
        """
        with recursive line (priority) as (
            (
                select priority from bgjob_job
                where queue = %(queue)s and priority < %(priority)s and not waits
                order by priority limit 1
            )
            union all
            select (
                select j.priority from bgjob_job j
                where j.queue = %(queue)s and j.priority > line.priority
                    and j.priority < %(priority)s and not j.waits
                order by j.priority limit 1
            ) from line where line.priority is not null
        )
        select (
            select count(*) from (
                select from line cross join lateral (
                    select from bgjob_job j
                    where j.queue = %(queue)s and j.priority = line.priority and not j.waits
                        and j.next_run_at <= now() and j.lease_until is null and j.deaths <= 1
                    order by j.next_run_at limit %(cap)s
                ) as due
                where line.priority is not null
                limit %(cap)s
            ) as lower
        ), (
            select count(*) from (
                select from bgjob_job j
                where j.queue = %(queue)s and j.priority = %(priority)s and not j.waits
                    and j.next_run_at < least(%(next_run_at)s::timestamptz, now())
                    and j.lease_until is null and j.deaths <= 1
                order by j.next_run_at limit %(cap)s
            ) as earlier
        )
        """,
        {"queue": queue, "priority": priority, "next_run_at": next_run_at, "cap": cap},
        lambda rows: Ahead(*rows[0]),
    )


class KeyHolder(NamedTuple):
    """A job that holds an exclusive key, or one of its slots."""

    id: str
    queue: str
    type: str
    attempt: int
    token: int
    lease_left: float
    """Seconds; negative if the lease has ended."""


class Key(NamedTuple):
    """An exclusive key, as a job meets it."""

    holders: Sequence[KeyHolder]
    """In the order in which they are due; up to a cap."""
    slots: int
    """How many there may be: the smallest number of them and of the job."""
    before: int
    """The jobs of the same queue that get the key first; counted up to a cap."""

    @property
    def is_free(self) -> bool:
        """Whether it has a slot left."""
        return len(self.holders) < self.slots


_HOLDER = HOLDING.format(
    columns=f"""
        {in_range("h.next_run_at")}, h.id, h.queue, h.type, h.attempt, h.token,
        extract(epoch from {in_range("h.lease_until")} - clock_timestamp())::float8
    """,
    which="",
)


def key(job: Live, *, cap: int = CAP) -> Statement[Key]:
    """Return who holds the key of a job, and how many of its queue come before it."""
    return Statement(
        f"""
        select h.*, (
            select count(*) from (
                select from bgjob_job o
                where o.exclusive = %(key)s and o.waits and o.queue = %(queue)s
                    and (o.next_run_at, o.id) < (%(next_run_at)s::timestamptz, %(id)s)
                order by o.next_run_at, o.id limit %(cap)s
            ) as waiting
        ) + (
            select count(*) from (
                select from bgjob_job o
                where o.exclusive = %(key)s and not o.waits and o.queue = %(queue)s
                    and (o.next_run_at, o.id) < (%(next_run_at)s::timestamptz, %(id)s)
                    and o.token is null
                order by o.next_run_at, o.id limit %(cap)s
            ) as due
        )
        from (select 1) as one
        left join lateral (
            select h.*, e.slots from bgjob_exclusive e cross join lateral ({_HOLDER}) as h
            where e.key = %(key)s
            limit %(cap)s
        ) as h on true
        """,
        {
            "key": job.exclusive,
            "queue": job.queue,
            "next_run_at": job.next_run_at,
            "id": job.id,
            "cap": cap,
        },
        partial(_key, job.slots or 1),
    )


def _key(slots: int, rows: Sequence[Row]) -> Key:
    before = rows[0][-1]
    found = sorted((row[:-1] for row in rows if row[0] is not None), key=itemgetter(0, 1))
    holders = [KeyHolder(*holder) for _, *holder, _ in found]
    return Key(holders, min([slots, *(row[-1] for row in found)]), before)


class Claimant(NamedTuple):
    """The worker that made a claim."""

    number: int
    host: str
    pid: int
    program: str
    release: str | None
    state: str
    not_seen: float
    """Seconds since its last beat."""


_CLAIMANT: LiteralString = f"""
    select number, host, pid, program, release, case when is_lost then 'lost' else state end,
        not_seen
    from (
        select w.*, {IS_LOST} as is_lost,
            extract(epoch from clock.now - {in_range("seen_at")})::float8 as not_seen
        from bgjob_worker w, (select clock_timestamp() as now) as clock
        where mod(number, {_NUMBERS}) = {{number}}
            and started_at <= {{at}} + interval '1 minute'
    ) as w
    order by w.number desc limit 1
"""


def claimant(number: int, at: datetime) -> Statement[Claimant | None]:
    """Find the worker of a token's number and time; None if its row is gone.

    Of several workers whose numbers end alike it is the last that had started by then.
    """
    return Statement(
        _CLAIMANT.format(number="%(number)s", at="%(at)s::timestamptz"),
        {"number": number, "at": at, "missed": MISSED},
        lambda rows: Claimant(*rows[0]) if rows else None,
    )


def claimants(
    made: Collection[tuple[int, datetime]],
) -> Statement[dict[tuple[int, datetime], Claimant]]:
    """Find the workers of several tokens; see `claimant`."""
    return Statement(
        f"""
        select made.number, made.at, w.*
        from unnest(%(numbers)s::bigint[], %(ats)s::timestamptz[]) as made (number, at)
        cross join lateral ({_CLAIMANT.format(number="made.number", at="made.at")}) as w
        """,
        {
            "numbers": [number for number, _ in made],
            "ats": [at for _, at in made],
            "missed": MISSED,
        },
        lambda rows: {(number, at): Claimant(*worker) for number, at, *worker in rows},
    )


def may_read_workers() -> Statement[bool]:
    """Return whether this role may read the workers, and there is a table of them."""
    return Statement(
        "select coalesce(has_table_privilege(to_regclass('bgjob_worker'), 'select'), false)",
        None,
        scalar,
    )


class QueueWorker(NamedTuple):
    """A worker of a queue, as one of its jobs meets it."""

    number: int
    host: str
    pid: int
    release: str | None
    state: str
    not_seen: float
    slots: int
    busy: int
    has_handler: bool
    unknown_for: float | None = None
    """The seconds after its enqueue within which it puts back a job of an unknown type."""


class QueueWorkers(NamedTuple):
    """The registered workers of a queue."""

    alive: int
    """The live workers of all queues."""
    workers: list[QueueWorker]
    """Those of this queue: the working ones, then those that were seen last; at most 1,000."""


def workers_of(queue: str, type_: str) -> Statement[QueueWorkers]:
    """List the workers of a queue, and whether each has a handler for a type."""
    return Statement(
        f"""
        with seen as materialized (
            select w.number, w.host, w.pid, w.release,
                case when {IS_LOST} then 'lost' else w.state end as state,
                extract(epoch from clock.now - {in_range("w.seen_at")})::float8 as not_seen,
                array_position(w.queues, %(queue)s::text) as place, w.slots, w.running,
                %(type)s = any (w.types) as has_handler, w.unknown_for
            from bgjob_worker w, (select clock_timestamp() as now) as clock
        )
        select alive.n, s.*
        from (
            select count(*) as n from seen where state in ('working', 'stopping')
        ) as alive
        left join (
            select number, host, pid, release, state, not_seen, coalesce(slots[place], 0),
                coalesce(running[place], 0), has_handler, unknown_for
            from seen where place is not null
            order by state <> 'working', not_seen limit {_MOST_WORKERS}
        ) as s on true
        """,
        {"queue": queue, "type": type_, "missed": MISSED},
        lambda rows: QueueWorkers(
            rows[0][0], [QueueWorker(*row[1:]) for row in rows if row[1] is not None]
        ),
    )


def schedule(name: str) -> Statement[ScheduleStatus | None]:
    """Return the schedule of this name; None if there is none."""
    return Statement(
        f"""
        select name, spec, queue, type, paused, {finite("last_run_at")}, {finite("next_run_at")}
        from bgjob_schedule where name = %(name)s
        """,
        {"name": name},
        lambda rows: ScheduleStatus(*rows[0]) if rows else None,
    )


class Writer(NamedTuple):
    """An open transaction that has written jobs, or has locked some."""

    pid: int | None
    """None if it is prepared."""
    prepared: str | None
    """The identifier of a prepared transaction."""
    role: str | None
    application: str | None
    state: str | None
    seconds: float | None
    """Its age; None if it is hidden from this role."""


def writers() -> Statement[list[Writer]]:
    """List transactions over a second old that have written jobs, the oldest first, at most five.

    No other session sees a job that such a transaction wrote until it commits.
    """
    return Statement(
        """
        with lock as materialized (
            select * from pg_locks where database is null or database = (
                select oid from pg_database where datname = current_database()
            )
        ), writer as materialized (
            select distinct l.pid, l.virtualtransaction from lock l
            where l.locktype = 'relation' and l.relation = to_regclass('bgjob_job') and l.granted
                and l.mode = 'RowExclusiveLock' and l.pid is distinct from pg_backend_pid()
        )
        select * from (
            select a.pid, null::text, a.usename::text, a.application_name, a.state,
                extract(epoch from clock_timestamp() - a.xact_start)::float8 as seconds
            from writer w join pg_stat_activity a on a.pid = w.pid
            union all
            select null, p.gid, p.owner::text, null, 'prepared',
                extract(epoch from clock_timestamp() - p.prepared)::float8
            from pg_prepared_xacts p
            where p.database = current_database() and exists (
                -- It keeps the virtual number of its session, until the server restarts.
                select from writer w join lock x on x.virtualtransaction = w.virtualtransaction
                where w.pid is null and x.pid is null and x.locktype = 'transactionid'
                    and x.granted and x.transactionid = p.transaction
            )
        ) as open
        where seconds is null or seconds > 1
        order by seconds desc nulls last limit 5
        """,
        {},
        lambda rows: [Writer(*row) for row in rows],
    )
