"""A live job, and the conditions that a filter makes of live jobs. `job_pages` lists them."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._headers import Headers, read
from bgjob._sql.statement import Row, Statement, in_range, text_array

_STATE: LiteralString = """
    case when j.token is not null then 'running'
        when j.waits and j.limited then 'limited'
        when j.waits then 'key'
        when j.deaths > 1 then 'suspect'
        when j.next_run_at <= statement_timestamp() then 'due'
        when j.attempt > 0 then 'retry'
        else 'delayed' end
"""

_STATES: Mapping[str, LiteralString] = {
    "running": "j.token is not null",
    "limited": "j.token is null and j.waits and j.limited",
    "key": "j.token is null and j.waits and not j.limited",
    "suspect": "j.token is null and not j.waits and j.deaths > 1",
    "due": """
        j.token is null and not j.waits and j.deaths <= 1
        and j.next_run_at <= statement_timestamp()
    """,
    "retry": """
        j.token is null and not j.waits and j.deaths <= 1
        and j.next_run_at > statement_timestamp() and j.attempt > 0
    """,
    "delayed": """
        j.token is null and not j.waits and j.deaths <= 1
        and j.next_run_at > statement_timestamp() and j.attempt = 0
    """,
}

_CONDITIONS: Mapping[str, LiteralString] = {
    "queue": "j.queue = %(queue)s",
    "type": "j.type = %(type)s",
    "prefix": "starts_with(j.id, %(prefix)s)",
    "exclusive": "j.exclusive = %(exclusive)s",
    "error": "position(%(error)s in j.last_error) > 0",
}


class JobFilter(NamedTuple):
    """Filters of live jobs; None does not filter."""

    queue: str | None = None
    type: str | None = None
    state: str | None = None
    prefix: str | None = None
    """Of the id."""
    exclusive: str | None = None
    error: str | None = None

    @property
    def params(self) -> dict[str, object]:
        """The parameters of the condition."""
        return {
            name: value
            for name, value in self._asdict().items()
            if value is not None and name != "state"
        }

    @property
    def condition(self) -> LiteralString:
        """The condition that jobs have to meet."""
        conditions: list[LiteralString] = [_CONDITIONS[name] for name in self.params]
        if self.state is not None:
            conditions.append(_STATES[self.state])
        return " and ".join(conditions) or "true"


class Live(NamedTuple):
    """A row of a live job."""

    now: datetime
    id: str
    queue: str
    type: str
    state: str
    priority: int
    attempt: int
    deaths: int
    exclusive: str | None
    next_run_at: datetime
    due_in: float
    created_at: datetime
    updated_at: datetime
    last_error: str | None
    size: int | None
    token: int | None
    lease_until: datetime | None
    lease_left: float | None
    expires: datetime | None
    is_replaced: bool
    slots: int | None
    arg: bytes | None
    checkpoint: bytes | None
    group: str | None
    group_dead: int | None
    headers: Headers


def live(row: Row) -> Live:
    *columns, headers = row
    return Live._make((*columns, read(headers)))


_LIVE = f"""
    clock_timestamp(), j.id, j.queue, j.type, {_STATE}, j.priority, j.attempt, j.deaths,
    j.exclusive,
    {in_range("j.next_run_at")},
    extract(epoch from {in_range("j.next_run_at")} - clock_timestamp())::float8,
    {in_range("j.created_at")}, {in_range("j.updated_at")}, {{error}},
    octet_length(j.arg), j.token,
    case when j.lease_until is not null then {in_range("j.lease_until")} end,
    case when j.lease_until is not null
        then extract(epoch from {in_range("j.lease_until")} - clock_timestamp())::float8 end,
    case when j.expires is not null then {in_range("j.expires")} end,
    j.successor is not null, j.slots,
    {{arg}}, {{checkpoint}}, j.group_id, j.group_dead, {{headers}}
"""
LISTED = _LIVE.format(
    error="left(j.last_error, 200)",
    arg="null::bytea",
    checkpoint="null::bytea",
    headers="null::text",
)
_WHOLE = _LIVE.format(
    error="j.last_error", arg="j.arg", checkpoint="j.checkpoint", headers="j.headers::text"
)


def get(id_: str) -> Statement[Live | None]:
    """Return a live job, with its payload and its whole error."""
    return Statement(
        f"select {_WHOLE} from bgjob_job j where j.id = %(id)s",
        {"id": id_},
        lambda rows: live(rows[0]) if rows else None,
    )


def listed(ids: Sequence[str], where: JobFilter) -> Statement[list[Live]]:
    """Return the live ones of these jobs, by id, the last first."""
    return Statement(
        f"""
        select {LISTED} from bgjob_job j
        where j.id = any (%(ids)s::text[]) and ({where.condition})
        order by j.id desc
        """,
        {**where.params, "ids": text_array(ids)},
        lambda rows: [live(row) for row in rows],
    )
