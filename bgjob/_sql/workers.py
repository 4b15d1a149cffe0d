"""The registry of workers: a row for each, which decides nothing.

A beat updates columns that no index covers, in pages that are filled to a quarter, so it is a
heap-only update. It does not wait for the disk: what a crash of the server loses is written
again with the next beat.
"""

from collections.abc import Mapping, Sequence
from typing import LiteralString, NamedTuple

from bgjob._postgres.cursor import ErrorTexts
from bgjob._sql.session import Lack, lacks
from bgjob._sql.statement import QUIET, Row, Statement, in_range, number_array, scalar
from bgjob._sql.tokens import MADE_AT
from bgjob.workers import MISSED, RunningJob, WorkerCounts, WorkerStatus

_KEPT = "interval '1 day'"
"""For how long the row of a worker that was not seen any more is kept."""

_MOST_REMOVED = "1000"
"""The most old rows that one start removes."""

IS_LOST: LiteralString = """(
    state in ('working', 'stopping')
    and seen_at < now - %(missed)s::integer * every * interval '1 second'
)"""
"""Whether a row is that of a worker that is not seen any more, at the time `now`."""

_INSERTED = "host pid program release version queues slots types unknown_for lease every"
_UPDATED = "seen_at state running counts longest longest_since note"


def registry_lacks() -> Statement[list[Lack]]:
    """List the columns and privileges that a worker's own row needs and that are missing."""
    return lacks(
        (("bgjob_worker", "delete"),),
        (
            ("bgjob_worker", "select", "number seen_at"),
            ("bgjob_worker", "insert", _INSERTED),
            ("bgjob_worker", "update", _UPDATED),
        ),
    )


class Registration(NamedTuple):
    """What a worker says of itself when it starts."""

    host: str
    pid: int
    program: str
    release: str | None
    version: str
    queues: Mapping[str, int]
    """The slots of each."""
    types: Sequence[str]
    lease: float
    every: float
    unknown_for: float | None = None


class Beat(NamedTuple):
    """What a worker says of itself while it works."""

    state: str
    running: Sequence[int]
    """By queue, in the order of the registration."""
    counts: WorkerCounts
    longest: Sequence[tuple[str, int]]
    """Jobs and the tokens of their claims."""
    note: str | None


def register(worker: Registration) -> Statement[int]:
    """Write the row of a worker that starts; return its number.

    The rows of workers that have not been seen for a day are removed.
    """
    return Statement(
        f"""
        with {QUIET}, gone as (
            delete from bgjob_worker where number = any (array(
                select number from bgjob_worker where seen_at < clock_timestamp() - {_KEPT}
                limit {_MOST_REMOVED} for update skip locked
            ))
        )
        insert into bgjob_worker (
            host, pid, program, release, version, queues, slots, types, unknown_for, lease, every
        )
        select t[1], %(pid)s::integer, t[2], t[3], t[4], %(queues)s::text[], %(slots)s::integer[],
            %(types)s::text[], %(unknown_for)s::real, %(lease)s::real, %(every)s::real
        from quiet, (select %(texts)s::text[] as t) as texts
        returning number
        """,
        {
            "pid": worker.pid,
            "texts": ErrorTexts([worker.host, worker.program, worker.release, worker.version]),
            "queues": ErrorTexts(worker.queues),
            "slots": number_array([*worker.queues.values()]),
            "types": ErrorTexts(worker.types),
            "unknown_for": worker.unknown_for,
            "lease": worker.lease,
            "every": worker.every,
        },
        scalar,
    )


def beat(number: int, seen: Beat) -> Statement[bool]:
    """Update the row of a worker; False if it has none any more."""
    return Statement(
        f"""
        with {QUIET}
        update bgjob_worker
        set seen_at = clock_timestamp(), state = %(state)s, running = %(running)s::integer[],
            counts = %(counts)s::bigint[], longest = %(longest)s::text[],
            longest_since = array(
                select {MADE_AT.format("l.token")}
                from unnest(%(tokens)s::bigint[]) with ordinality as l (token, place)
                order by l.place
            ),
            note = (%(note)s::text[])[1]
        from quiet
        where number = %(number)s
        returning true
        """,
        {
            "number": number,
            "state": seen.state,
            "running": number_array(seen.running),
            "counts": number_array(seen.counts),
            "longest": ErrorTexts(id_ for id_, _ in seen.longest),
            "tokens": number_array([token for _, token in seen.longest]),
            "note": ErrorTexts([seen.note]),
        },
        bool,
    )


def workers() -> Statement[list[WorkerStatus]]:
    """List the registered workers: the lost ones, those that work, those that have ended."""
    return Statement(
        f"""
        with seen as materialized (
            select w.*, extract(epoch from now - {in_range("seen_at")})::float8 as not_seen,
                {IS_LOST} as is_lost
            from bgjob_worker w, (select clock_timestamp() as now) as clock
        )
        select number, case when is_lost then 'lost' else state end, host, pid, program, release,
            version, {in_range("started_at")}, {in_range("seen_at")}, not_seen, queues, running,
            types, lease, every, counts, longest, note, slots, longest_since
        from seen
        order by not is_lost, state not in ('working', 'stopping'), number
        """,
        {"missed": MISSED},
        lambda rows: list(map(_status, rows)),
    )


def _status(row: Row) -> WorkerStatus:
    *told, slots, since = row
    found = dict(zip(WorkerStatus._fields, told, strict=True))
    return WorkerStatus(
        **found
        | {
            "queues": dict(zip(found["queues"], slots, strict=False)),
            "running": dict(zip(found["queues"], found["running"], strict=False)),
            "counts": WorkerCounts(*found["counts"][: len(WorkerCounts._fields)]),
            "longest": [RunningJob(*job) for job in zip(found["longest"], since, strict=False)],
        }
    )
