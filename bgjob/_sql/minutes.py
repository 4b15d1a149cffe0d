"""The counts of each minute: what ended, by queue and type.

A worker adds what it has counted to the rows of the minute in which it writes. So the clock is
the database's, and a minute that has passed is complete, because each worker has written once in
it. Workers lock the rows in the order of their key. They do not wait for the disk: a server that
crashes loses the counts of its last moments.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import LiteralString, NamedTuple

from bgjob._postgres.cursor import ErrorTexts
from bgjob._sql.session import Lack, lacks
from bgjob._sql.statement import QUIET, Row, Statement, nothing, number_array, scalar
from bgjob.stats import MinuteCounts, MinuteReport, MinuteSeries

_INTEGERS: tuple[LiteralString, ...] = (
    "completed",
    "retried",
    "rescheduled",
    "dead",
    "lost",
    "timed_out",
    "cancelled",
    "runs",
)
_SECONDS: tuple[LiteralString, ...] = ("run_seconds", "wait_seconds")
_LONGEST: tuple[LiteralString, ...] = ("longest_run", "longest_wait")
_COUNTS: tuple[LiteralString, ...] = (*_INTEGERS, *_SECONDS, *_LONGEST)

_COLUMNS: LiteralString = ", ".join(_COUNTS)


def _lists(*parts: tuple[LiteralString, tuple[LiteralString, ...]]) -> LiteralString:
    """Return SQL with each column's name in the place of each {0} of its pattern."""
    return ", ".join(pattern.format(name) for pattern, names in parts for name in names)


_GIVEN = _lists(("%({0})s::bigint[]", _INTEGERS), ("%({0})s::float8[]", _SECONDS + _LONGEST))
_ADDED = _lists(
    ("{0} = m.{0} + excluded.{0}", _INTEGERS + _SECONDS),
    ("{0} = greatest(m.{0}, excluded.{0})", _LONGEST),
)
_TOTALS = _lists(
    ("sum(m.{0})::bigint", _INTEGERS), ("sum(m.{0})", _SECONDS), ("max(m.{0})", _LONGEST)
)

Counted = Mapping[tuple[str, str], MinuteCounts]
"""What ended, by queue and type."""


def minutes_lack() -> Statement[list[Lack]]:
    """List the columns and privileges that counting minutes needs and that are missing."""
    return lacks(
        (("bgjob_minute", "select"), ("bgjob_minute", "delete")),
        (
            ("bgjob_minute", "insert", f"minute queue type {' '.join(_COUNTS)}"),
            ("bgjob_minute", "update", " ".join(_COUNTS)),
        ),
    )


def add(counted: Counted) -> Statement[float]:
    """Add counts to the current minute; return how many of its seconds have passed."""
    rows = sorted(counted.items())
    return Statement(
        f"""
        with {QUIET}, clock as materialized (select clock_timestamp() as now from quiet), added as (
            insert into bgjob_minute as m (minute, queue, type, {_COLUMNS})
            select date_bin('1 minute', clock.now, {_ORIGIN}), c.*
            from clock, unnest(%(queues)s::text[], %(types)s::text[], {_GIVEN}) as c
            on conflict (minute, queue, type) do update set {_ADDED}
        )
        select mod(extract(epoch from now)::numeric, 60)::float8 from clock
        """,
        {
            "queues": ErrorTexts(queue for (queue, _), _ in rows),
            "types": ErrorTexts(type_ for (_, type_), _ in rows),
        }
        | {name: number_array([getattr(c, name) for _, c in rows]) for name in _COUNTS},
        scalar,
    )


def expire(days: float, *, limit: int) -> Statement[int]:
    """Delete rows of minutes that were longer ago, at most `limit`; return their number.

    It skips rows that another worker is deleting.
    """
    return Statement(
        f"""
        with {QUIET}, gone as (
            delete from bgjob_minute using quiet where bgjob_minute.ctid = any (array(
                select ctid from bgjob_minute
                where minute < statement_timestamp() - %(days)s * interval '1 day'
                order by minute limit %(limit)s for update skip locked
            ))
            returning 1
        )
        select count(*) from gone
        """,
        {"days": days, "limit": limit},
        scalar,
    )


# -- reading ---------------------------------------------------------------------------

_ORIGIN: LiteralString = "timestamptz '2020-01-01 00:00+00'"

_BEGIN = f"""
    date_bin(%(step)s * interval '1 second', statement_timestamp(), {_ORIGIN})
    - %(before)s * interval '1 second'
"""

_KEYS: Mapping[str | None, tuple[LiteralString, LiteralString]] = {
    None: ("null::text as queue, null::text as type", ""),
    "queue": ("m.queue, null::text as type", ", m.queue"),
    "type": ("m.queue, m.type", ", m.queue, m.type"),
}


class Span(NamedTuple):
    """The time to report on."""

    step: int
    """Seconds, a multiple of a minute."""
    steps: int
    is_whole: bool = False
    """Whether the steps are added up to one."""


def plan_in_memory() -> Statement[None]:
    """Make the next report of this transaction read by the key, and group without sorting.

    There are few groups, but the planner does not know that. For a week it sorted 600,000 rows,
    which wrote 75 MB of temporary files and took 0.8 to 1.1 s in place of 0.5.
    """
    return Statement(
        """
        select set_config('enable_seqscan', 'off', true),
            set_config('enable_bitmapscan', 'off', true), set_config('enable_sort', 'off', true),
            set_config('jit', 'off', true)
        """,
        None,
        nothing,
    )


def report(
    span: Span, *, by: str | None, queue: str | None, type_: str | None
) -> Statement[MinuteReport]:
    """Add up the counts of each step.

    It reads the rows of that time by the primary key, and none of others.
    """
    keys, group_by = _KEYS[by]
    at: LiteralString = (
        "null::timestamptz"
        if span.is_whole
        else f"date_bin(%(step)s * interval '1 second', m.minute, {_ORIGIN})"
    )
    where: LiteralString = " and m.queue = %(queue)s" if queue is not None else ""
    if type_ is not None:
        where += " and m.type = %(type)s"
    return Statement(
        f"""
        select statement_timestamp(), {_BEGIN}, ended.*
        from (select) as one left join (
            select {at} as at, {keys}, {_TOTALS}
            from bgjob_minute m
            where m.minute >= {_BEGIN} and m.minute <= statement_timestamp(){where}
            group by 1{group_by}
        ) as ended on true
        order by ended.queue collate "C", ended.type collate "C", ended.at
        """,
        {
            "step": span.step,
            "before": (span.steps - 1) * span.step,
            "queue": queue,
            "type": type_,
        },
        lambda rows: _report(span, rows),
    )


_NOTHING = MinuteCounts()


def _report(span: Span, rows: Sequence[Row]) -> MinuteReport:
    now, since = rows[0][:2]
    found: dict[tuple[str | None, str | None], dict[int, MinuteCounts]] = {}
    for _, _, at, queue, type_, *counts in rows:
        if counts[0] is None:
            continue
        place = 0 if at is None else _place(at, since, span.step)
        found.setdefault((queue, type_), {})[place] = MinuteCounts(
            **dict(zip(_COUNTS, counts, strict=True))
        )
    length = 1 if span.is_whole else span.steps
    series = []
    for (queue, type_), steps in found.items():
        total = _NOTHING
        for counted in steps.values():
            total = total.plus(counted)
        all_steps = tuple(steps.get(place, _NOTHING) for place in range(length))
        series.append(MinuteSeries(queue, type_, all_steps, total))
    return MinuteReport(since, now, span.step * span.steps / length, tuple(series))


def _place(at: datetime, since: datetime, step: int) -> int:
    return round((at - since).total_seconds() / step)
