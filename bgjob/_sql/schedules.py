"""The SQL of schedules.

There is no leader. Each worker reads the schedules, and the one that moves a schedule's
tick forward from the value it read enqueues the jobs, in the same statement. A row that
another one is about to move is skipped, so that no worker waits at a tick.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, LiteralString

from bgjob._postgres.cursor import Floats, Payloads, Texts, Times
from bgjob._sql.notices import NOTIFY, channel
from bgjob._sql.session import Lack, lacks
from bgjob._sql.statement import Statement, finite, in_range
from bgjob.schedule import GRACE, Firing, Schedule, ScheduleStatus, State

_NEEDS = (
    (
        "bgjob_schedule",
        "select",
        (
            "name spec queue type arg priority exclusive expires slots tick last_run_at "
            "last_job_id next_run_at paused"
        ),
    ),
    ("bgjob_schedule", "insert", "name spec queue type arg priority exclusive expires slots"),
    (
        "bgjob_schedule",
        "update",
        (
            "spec queue type arg priority exclusive expires slots tick last_run_at last_job_id "
            "next_run_at"
        ),
    ),
    ("bgjob_job", "select", "id"),
    ("bgjob_job", "insert", "id queue type arg priority exclusive expires slots"),
)


def schedule_lacks() -> Statement[list[Lack]]:
    """List the missing columns and privileges that only a worker with schedules needs."""
    return lacks((), _NEEDS)


def register(schedules: Sequence[Schedule]) -> Statement[None]:
    """Write schedules that are new or have changed.

    A schedule with a changed spec continues from its last tick; earlier ticks of the new spec
    are not missed. Rows are written in the order of their names, so that workers that start
    together wait for each other and do not deadlock.
    """
    return Statement(
        """
        insert into bgjob_schedule as s (
            name, spec, queue, type, arg, priority, exclusive, expires, slots
        )
        select name, spec, queue, type, arg, priority, exclusive, expires, slots
        from unnest(
            %(names)s::text[], %(specs)s::text[], %(queues)s::text[], %(types)s::text[],
            %(args)s::bytea[], %(priorities)s::smallint[], %(exclusives)s::text[],
            %(expires)s::float8[], %(slots)s::smallint[]
        ) as r (name, spec, queue, type, arg, priority, exclusive, expires, slots)
        order by name
        on conflict (name) do update
        set spec = excluded.spec, queue = excluded.queue, type = excluded.type,
            arg = excluded.arg, priority = excluded.priority, exclusive = excluded.exclusive,
            expires = excluded.expires, slots = excluded.slots,
            tick = case when s.spec = excluded.spec then s.tick
                else greatest(s.tick, clock_timestamp() - %(grace)s) end,
            next_run_at = case when s.spec = excluded.spec then s.next_run_at end
        where (s.spec, s.queue, s.type, s.arg, s.priority, s.exclusive, s.expires, s.slots)
            is distinct from (
                excluded.spec, excluded.queue, excluded.type, excluded.arg, excluded.priority,
                excluded.exclusive, excluded.expires, excluded.slots
            )
        """,
        {
            "names": [s.name for s in schedules],
            "specs": [s.spec for s in schedules],
            "queues": [s.request.queue for s in schedules],
            "types": [s.request.type for s in schedules],
            "args": Payloads(s.request.payload for s in schedules),
            "priorities": [s.request.priority for s in schedules],
            "exclusives": Texts(s.request.exclusive for s in schedules),
            "expires": Floats(s.request.expires_in for s in schedules),
            "slots": [s.request.slots for s in schedules],
            "grace": GRACE,
        },
        lambda _: None,
    )


# An infinite time must not prevent the others from being read: it is brought into Python's range.
_NEXT_RUN_AT = f"case when next_run_at is not null then {in_range('next_run_at')} end"


def look(names: Sequence[str]) -> Statement[dict[str, State]]:
    """Read the progress of schedules, by name."""
    return Statement(
        f"""
        select name, {in_range("tick")}, {_NEXT_RUN_AT}, paused,
            -- Not `exists`: with statistics of an empty table that may be planned as a hash of all.
            coalesce((select true from bgjob_job j where j.id = s.last_job_id), false),
            clock_timestamp()
        from bgjob_schedule s
        where name = any (%(names)s::text[])
        """,
        {"names": list(names)},
        lambda rows: {row[0]: State(*row) for row in rows},
    )


_NOTIFY_OF_FIRED = NOTIFY.format(
    channel="told.channel",
    payload="concat_ws(' ', extract(epoch from now()), told.priority, told.queue)",
)


def fire(firings: Sequence[tuple[Schedule, datetime, Firing]]) -> Statement[None]:
    """Move schedules on, each from the tick that was read, and enqueue their jobs.

    The jobs are always notified: the lock that shows an enqueue whether a worker
    sleeps may be held by this very session.
    """
    jobs = [(s, tick) for s, _, firing in firings for tick in firing.ticks]
    return Statement(
        f"""
        with due as materialized (
            select d.*
            from unnest(
                %(names)s::text[], %(seens)s::timestamptz[], %(ticks)s::timestamptz[],
                %(last_run_ats)s::timestamptz[], %(last_job_ids)s::text[],
                %(next_run_ats)s::timestamptz[]
            ) as d (name, seen, tick, last_run_at, last_job_id, next_run_at)
            join bgjob_schedule s on s.name = d.name and {in_range("s.tick")} = d.seen
                and not s.paused
            where s.name = any (%(names)s::text[])
            for update of s skip locked
        ), moved as (
            update bgjob_schedule s
            set tick = due.tick,
                last_run_at = coalesce(due.last_run_at, s.last_run_at),
                last_job_id = coalesce(due.last_job_id, s.last_job_id),
                next_run_at = due.next_run_at
            from due
            where s.name = any (%(names)s::text[]) and s.name = due.name
        ), written as (
            insert into bgjob_job (id, queue, type, arg, priority, exclusive, expires, slots)
            select j.id, j.queue, j.type, j.arg, j.priority, j.exclusive,
                clock_timestamp() + j.expires * interval '1 second', j.slots
            from unnest(
                %(job_names)s::text[], %(ids)s::text[], %(queues)s::text[], %(types)s::text[],
                %(args)s::bytea[], %(priorities)s::smallint[], %(exclusives)s::text[],
                %(expires)s::float8[], %(slots)s::smallint[]
            ) with ordinality as j (
                name, id, queue, type, arg, priority, exclusive, expires, slots, position
            )
            join due on due.name = j.name
            order by j.position
            on conflict (id) do nothing
            returning id
        )
        select count({_NOTIFY_OF_FIRED})
        from written
        join unnest(
            %(ids)s::text[], %(queues)s::text[], %(priorities)s::smallint[], %(channels)s::text[]
        ) as told (id, queue, priority, channel) on told.id = written.id
        """,
        {
            "names": [s.name for s, _, _ in firings],
            "seens": [seen for _, seen, _ in firings],
            "ticks": [firing.tick for _, _, firing in firings],
            "last_run_ats": Times(f.ticks[-1] if f.ticks else None for _, _, f in firings),
            "last_job_ids": Texts(
                s.job_id(f.ticks[-1]) if f.ticks else None for s, _, f in firings
            ),
            "next_run_ats": Times(firing.next_run_at for _, _, firing in firings),
            "job_names": [s.name for s, _ in jobs],
            "ids": [s.job_id(tick) for s, tick in jobs],
            "queues": [s.request.queue for s, _ in jobs],
            "types": [s.request.type for s, _ in jobs],
            "args": Payloads(s.request.payload for s, _ in jobs),
            "priorities": [s.request.priority for s, _ in jobs],
            "exclusives": Texts(s.request.exclusive for s, _ in jobs),
            "expires": Floats(s.request.expires_in for s, _ in jobs),
            "slots": [s.request.slots for s, _ in jobs],
            "channels": [channel(s.request.queue) for s, _ in jobs],
        },
        lambda _: None,
    )


# -- for clients ------------------------------------------------------------------


def listed() -> Statement[list[ScheduleStatus]]:
    """List all schedules."""
    return Statement(
        f"""
        select name, spec, queue, type, paused, {finite("last_run_at")},
            case when not paused then {finite("next_run_at")} end
        from bgjob_schedule order by name
        """,
        None,
        lambda rows: [ScheduleStatus._make(row) for row in rows],
    )


def pause(name: str) -> Statement[bool]:
    """Pause a schedule; True if it exists."""
    return Statement(
        "update bgjob_schedule set paused = true where name = %(name)s returning true",
        {"name": name},
        bool,
    )


def resume(name: str) -> Statement[bool]:
    """Resume a schedule from its next tick; True if it exists."""
    return Statement(
        """
        update bgjob_schedule
        set paused = false,
            tick = case when paused then greatest(tick, clock_timestamp()) else tick end,
            next_run_at = case when not paused then next_run_at end
        where name = %(name)s
        returning true
        """,
        {"name": name},
        bool,
    )


def remove(name: str) -> Statement[bool]:
    """Delete a schedule; True if it existed."""
    return Statement(
        "delete from bgjob_schedule where name = %(name)s returning true", {"name": name}, bool
    )


_REQUEST: tuple[LiteralString, ...] = (
    *("queue", "type", "arg", "priority", "exclusive", "expires", "slots"),
)


def request_of(name: str) -> Statement[dict[str, Any] | None]:
    """Return the request of a schedule; None if it does not exist."""
    return Statement(
        f"select {', '.join(_REQUEST)} from bgjob_schedule where name = %(name)s",
        {"name": name},
        lambda rows: dict(zip(_REQUEST, rows[0], strict=True)) if rows else None,
    )
