"""What a queue holds, for the next claims: its priorities, strays, open transactions."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from bgjob._sql.claims import (
    FRESH,
    HAS_SUSPECTS,
    NO_RATIONS,
    OPEN,
    PRIORITIES,
    WITHIN,
    Rations,
    Window,
    within,
)
from bgjob._sql.groups import IS_OVER
from bgjob._sql.statement import Row, Statement, as_text, in_range, number_array


class Line(NamedTuple):
    """One priority of a queue."""

    priority: int
    since: datetime
    """Jobs that were due earlier have been claimed; long ago if nothing is claimed of the queue."""
    wait: float | None
    """Seconds until the next job that is not due yet."""
    has_suspects: bool
    """Whether the queue has suspects that can be claimed."""
    over: Sequence[str] = ()
    """Groups that are over, and the jobs that wait for them are not due yet; at most 100."""
    is_limited: bool = False
    """Whether the queue has a limit that an operator has set, and the worker no ration of it."""
    limited: Sequence[str] = ()
    """The types with a limit that an operator has set, and that the worker did not know."""


# The known priorities, and the first one in each gap between them, found without reading the
# rows of a known one.
_KNOWN_PRIORITIES = """
    with line (priority) as (
        select priority from unnest(%(priorities)s::smallint[]) as k (priority)
        union all
        select (
            select j.priority from bgjob_job j
            where j.queue = %(queue)s and j.priority >= gap.low and j.priority <= gap.high
                and not j.waits
            order by j.priority limit 1
        ) from unnest(%(lows)s::smallint[], %(highs)s::smallint[]) as gap (low, high)
    )
"""


def survey_known(
    queue: str, window: Window, *, rations: Rations = NO_RATIONS
) -> Statement[list[Line]]:
    """List lines as `survey` does, without walking over the rows of known priorities."""
    ends = [-(2**15) - 1, *window.priorities, 2**15]
    gaps = [(low + 1, high - 1) for low, high in pairwise(ends) if low + 1 <= high - 1]
    return Statement(
        _KNOWN_PRIORITIES + _SURVEY,
        {
            "queue": queue,
            **rations.params,
            "priorities": number_array(window.priorities),
            "lows": number_array([low for low, _ in gaps]),
            "highs": number_array([high for _, high in gaps]),
        },
        _lines,
    )


def survey(queue: str, *, rations: Rations = NO_RATIONS) -> Statement[list[Line]]:
    """List the priorities in use, the next due time of each, and whether there are suspects."""
    return Statement(PRIORITIES + _SURVEY, {"queue": queue, **rations.params}, _lines)


# The groups that are over are looked for in the order of the index of due jobs. Without the order
# the planner, with statistics of a drained table, took an index of all jobs.
_SURVEY = f"""
        select line.priority,
            case when {OPEN} then now() else '0001-01-02 00:00+00' end,
            extract(epoch from (
            select j.next_run_at from bgjob_job j
            where j.queue = %(queue)s and j.priority = line.priority
                and j.next_run_at > now() and j.next_run_at < 'infinity' and not j.waits
            order by j.next_run_at limit 1
        ) - clock_timestamp())::float8, {HAS_SUSPECTS},
            array(
                select {as_text("j.id")} from bgjob_job j
                where j.queue = %(queue)s and j.priority = line.priority
                    and j.next_run_at >= 'infinity' and j.group_id = j.id and not j.waits
                    and {IS_OVER}
                order by j.next_run_at limit 100
            ), exists (
                select from bgjob_limit l
                where l.scope = 'queue' and l.name = %(queue)s and l.is_set and not %(has_ration)s
            ), array(
                select l.name from bgjob_limit l
                where l.scope = 'type' and l.is_set and l.name <> all (%(known)s::text[])
            )
        from line where line.priority is not null
"""


def _lines(rows: Sequence[Row]) -> list[Line]:
    return [Line(*row) for row in rows]


class Stray(NamedTuple):
    """The first due, fresh job of a priority within a window."""

    priority: int
    since: datetime


def strays(queue: str, window: Window, *, rations: Rations = NO_RATIONS) -> Statement[list[Stray]]:
    """Find where claims must start to take jobs that were written behind the marks."""
    return Statement(
        f"""
        select w.priority, {in_range("due.next_run_at")}
        from unnest(%(priorities)s::smallint[]) as w (priority)
        cross join lateral (
            select j.next_run_at from bgjob_job j
            where j.queue = %(queue)s and j.priority = w.priority
                and j.next_run_at >= %(since)s::timestamptz and {WITHIN}
                and j.next_run_at <= now() and not j.waits and {FRESH} and {OPEN}
            order by j.next_run_at limit 1
        ) as due
        """,
        within(queue, window) | rations.params,
        lambda rows: [Stray(*row) for row in rows],
    )


class OpenTransactions(NamedTuple):
    """The transactions that have written something and not ended."""

    at: datetime
    """When the transaction of the preceding claim began."""
    numbers: frozenset[int]
    is_complete: bool
    """Whether it contains all transactions with lower numbers than the future ones."""


_MOST_HIDDEN = 1000  # a transaction uses one number for each of its savepoints

_OPEN = """
    select now(), pg_current_xact_id_if_assigned()::text::bigint, pg_current_snapshot()::text
"""
_SURELY_OPEN = _OPEN.replace("_if_assigned", "")


def open_transactions(*, surely: bool) -> Statement[OpenTransactions]:
    """List the transactions in progress after a claim.

    Args:
        surely: make it complete even if this transaction has not claimed anything, which
            uses one transaction number.

    """
    return Statement(_SURELY_OPEN if surely else _OPEN, None, _read_open_transactions)


def _read_open_transactions(rows: Sequence[Row]) -> OpenTransactions:
    [(at, own, snapshot)] = rows
    # The snapshot: the lowest number, the one after the highest ended, and the active ones between.
    # Later transactions have numbers between that one and this transaction's own.
    _, after, between = snapshot.split(":")
    numbers = {int(number) for number in between.split(",") if number}
    if own is not None:
        numbers.update(range(int(after), min(own, int(after) + _MOST_HIDDEN)))
    return OpenTransactions(at, frozenset(numbers), own is not None)
