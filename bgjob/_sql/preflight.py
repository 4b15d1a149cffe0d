"""Reads waiting and dead jobs in pages, and schedules, for `bgjob.preflight`.

Every statement is short and its own transaction. A page is a range of the primary key: no
cursor and no snapshot outlives it, so jobs that workers claim and complete meanwhile keep no
dead rows.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, LiteralString, NamedTuple, TypeAlias

from bgjob._sql.session import SETTINGS, Lack, lacks
from bgjob._sql.statement import Row, Statement, in_range

Key: TypeAlias = str | int
"""What pages are ordered by: the id of a live job, the number of a dead one."""

INSPECTION_SETTINGS = SETTINGS | {
    "application_name": "bgjob preflight",
    "default_transaction_read_only": "on",
    "statement_timeout": "5s",
    "lock_timeout": "1s",
    "idle_in_transaction_session_timeout": "5s",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
    # A page is a walk along the primary key, whatever the statistics say.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
}
"""Settings of the session that reads jobs and changes nothing."""

_LIVE_NEEDS = (
    (
        "bgjob_job",
        "select",
        (
            "id queue type arg attempt priority next_run_at created_at updated_at exclusive "
            "last_error lease_until headers"
        ),
    ),
)
_DEAD_NEEDS = (
    (
        "bgjob_dead_job",
        "select",
        (
            "id job_id queue type arg attempt priority next_run_at job_created_at job_updated_at "
            "exclusive last_error headers"
        ),
    ),
)
_SCHEDULE_NEEDS = (("bgjob_schedule", "select", "name spec queue type arg priority exclusive"),)
_WORKER_NEEDS = (("bgjob_worker", "select", "number release program queues types state seen_at"),)


def live_lacks() -> Statement[list[Lack]]:
    """List the missing columns and privileges without which no job can be read."""
    return lacks((), _LIVE_NEEDS)


def dead_lacks() -> Statement[list[Lack]]:
    """List the missing columns and privileges without which no dead job can be read."""
    return lacks((), _DEAD_NEEDS)


def schedule_lacks() -> Statement[list[Lack]]:
    """List the missing columns and privileges without which no schedule can be read."""
    return lacks((), _SCHEDULE_NEEDS)


def worker_lacks() -> Statement[list[Lack]]:
    """List the missing columns and privileges without which no worker's row can be read."""
    return lacks((), _WORKER_NEEDS)


class Wanted(NamedTuple):
    """Which jobs of a page are returned, and with which columns."""

    queues: Sequence[str] | None
    """None for all queues."""
    known: Sequence[str]
    """The types with a handler; dead jobs of other types are left out."""
    read: Sequence[str]
    """The types whose payloads are returned."""
    keyed: Sequence[str]
    """The types whose jobs are returned with everything that a handler sees."""
    most: int
    """The most bytes of a payload that is returned; a larger one has only its size."""

    @property
    def params(self) -> dict[str, object]:
        """The parameters of the statements."""
        return {
            "queues": None if self.queues is None else list(self.queues),
            "known": list(self.known),
            "read": list(self.read),
            "keyed": list(self.keyed),
            "most": self.most,
        }


class Candidate(NamedTuple):
    """A job as it is stored; some columns only if they are wanted."""

    key: Key
    id: str
    queue: str
    type: str
    attempt: int
    """How many attempts have ended: the one that runs is not counted."""
    priority: int
    next_run_at: datetime
    exclusive: str | None
    created_at: datetime | None
    updated_at: datetime | None
    last_error: str | None
    """Of a dead job only its beginning."""
    size: int | None
    """The payload's bytes; None if there is none or if it is not wanted."""
    arg: bytes | None
    """None also if it is too large."""
    headers: str | None = None


class Page(NamedTuple):
    """A range of a table."""

    looked_at: int
    """Rows in it; the last page has fewer than were asked for."""
    last: Key | None
    """Where the next page starts."""
    candidates: list[Candidate]
    """Those of them that are wanted."""


class Table(NamedTuple):
    """How one of the two tables of jobs is read, in the order of its column `id`."""

    name: LiteralString
    columns: LiteralString
    error: LiteralString
    condition: LiteralString
    """Which rows are candidates."""
    keys: LiteralString
    """The type of an array of keys."""
    first: Key
    """Before every key."""


LIVE = Table(
    "bgjob_job",
    """
    id as key, id, queue, type, priority, next_run_at, exclusive, created_at, updated_at,
    last_error, arg, headers,
    attempt::bigint - (lease_until is not null and lease_until > now())::int as attempt
    """,
    "case when p.type = any (%(keyed)s::text[]) then p.last_error end",
    "true",
    "text[]",
    "",
)

DEAD = Table(
    "bgjob_dead_job",
    """
    id as key, job_id as id, queue, type, attempt, priority, next_run_at, exclusive,
    job_created_at as created_at, job_updated_at as updated_at, left(last_error, 20) as last_error,
    arg, headers
    """,
    "p.last_error",
    # Another release may accept them: it has their handler, or another form of their payload.
    """
    p.type = any (%(known)s::text[])
        and (p.last_error like 'PayloadError%%' or p.last_error like 'UnknownTypeError%%')
    """,
    "bigint[]",
    -(2**63),
)

_WANTED = "(%(queues)s::text[] is null or p.queue = any (%(queues)s::text[]))"

_CANDIDATE: LiteralString = f"""
    p.key, p.id, p.queue, p.type, p.attempt, p.priority, {in_range("p.next_run_at")}, p.exclusive,
    case when p.type = any (%(keyed)s::text[]) then {in_range("p.created_at")} end,
    case when p.type = any (%(keyed)s::text[]) then {in_range("p.updated_at")} end,
    {{error}},
    case when p.type = any (%(read)s::text[]) then octet_length(p.arg) end,
    case when p.type = any (%(read)s::text[]) and octet_length(p.arg) <= %(most)s then p.arg end,
    case when p.type = any (%(keyed)s::text[]) then p.headers::text end
"""


def page(table: Table, after: Key, wanted: Wanted, *, rows: int) -> Statement[Page]:
    """Return the wanted jobs among the next `rows` rows of a table.

    It looks at that many rows and no more, also if none of them is wanted.
    """
    return Statement(
        f"""
        with page as materialized (
            select {table.columns} from {table.name} where id > %(after)s
            order by key limit %(rows)s
        )
        select e.looked_at, e.last, {_CANDIDATE.format(error=table.error)}
        from (select count(*) as looked_at, max(key) as last from page) as e
        left join page p on {_WANTED} and {table.condition}
        """,
        {**wanted.params, "after": after, "rows": rows},
        _read_page,
    )


def _read_page(rows: Sequence[Row]) -> Page:
    looked_at, last = rows[0][:2]
    return Page(looked_at, last, [Candidate(*row[2:]) for row in rows if row[2] is not None])


def candidates(table: Table, keys: Sequence[Key], wanted: Wanted) -> Statement[list[Candidate]]:
    """Return the jobs with these keys that still exist."""
    return Statement(
        f"""
        select {_CANDIDATE.format(error=table.error)}
        from (select {table.columns} from {table.name}) as p
        where p.key = any (%(keys)s::{table.keys})
        """,
        {**wanted.params, "keys": list(keys)},
        lambda rows: [Candidate(*row) for row in rows],
    )


def payloads(table: Table, keys: Sequence[Key]) -> Statement[dict[Key, bytes | None]]:
    """Return the payloads of the jobs with these keys that still exist."""
    return Statement(
        f"select id, arg from {table.name} where id = any (%(keys)s::{table.keys})",
        {"keys": list(keys)},
        dict,
    )


class StoredSchedule(NamedTuple):
    """A schedule as it is stored."""

    name: str
    spec: str
    queue: str
    type: str
    arg: bytes | None
    priority: int
    exclusive: str | None


def stored_schedules() -> Statement[list[StoredSchedule]]:
    """List all schedules with the jobs that they enqueue."""
    return Statement(
        "select name, spec, queue, type, arg, priority, exclusive from bgjob_schedule order by 1",
        None,
        lambda rows: [StoredSchedule(*row) for row in rows],
    )


def local_settings() -> Statement[Any]:
    """Set the limits for one transaction, behind a pooler that shares sessions."""
    names = [name for name in INSPECTION_SETTINGS if name not in SETTINGS]
    names.remove("default_transaction_read_only")  # too late in a transaction
    return Statement(
        "select set_config(name, value, true) "
        "from unnest(%(names)s::text[], %(values)s::text[]) as s (name, value)",
        {"names": names, "values": [INSPECTION_SETTINGS[name] for name in names]},
        lambda _: None,
    )
