"""What the minute counters tell: the last hour of each queue, and the chart of one."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from bgjob.errors import SchemaError
from bgjob.ext.web.views import Chart, TypeRow
from bgjob.ext.web.visit import Visit
from bgjob.stats import MinuteCounts, MinuteReport, MinuteSeries

Span: TypeAlias = Literal["1h", "6h", "24h", "7d"]

SPANS: tuple[Span, ...] = get_args(Span)

_SPANS: Mapping[Span, tuple[int, int]] = {
    "1h": (3600, 60),
    "6h": (6 * 3600, 300),
    "24h": (24 * 3600, 1200),
    "7d": (7 * 86400, 7200),
}
"""How long each is, and one of its bars."""

_HOUR = 3600
_RECENT = 10
"""Minutes of which the failures are told."""


async def hours(visit: Visit) -> Mapping[str, MinuteSeries] | None:
    """Return the last hour of each queue, minute by minute; None if nothing is counted."""
    found = await _report(visit, ("hour",), _HOUR, 60, queue=None)
    if found is None:
        return None
    if not found.series:
        # Nothing ended within the hour; or no worker counts.
        week = await _report(visit, ("week",), 7 * 86400, None, queue=None)
        if week is None or not week.series:
            return None
    return {series.queue: series for series in found.series if series.queue is not None}


def completed(series: MinuteSeries | None) -> tuple[int, ...]:
    """Return how many jobs were completed in each minute."""
    if series is None:
        return (0,) * 60
    return tuple(step.completed for step in series.steps)


def failed_percent(series: MinuteSeries | None) -> float | None:
    """Return the share of failed attempts of the last ten minutes; None without attempts."""
    total = _sum(series.steps[-_RECENT:]) if series else MinuteCounts()
    ratio = total.failure_ratio
    return None if ratio is None else round(ratio * 100, 1)


async def chart(visit: Visit, queue: str) -> Chart | None:
    """Return the chart of a queue; None if nothing is counted."""
    asked = visit.field("span")
    span = asked if asked in SPANS else SPANS[0]
    length, step = _SPANS[span]
    found = await _report(visit, ("chart", queue, span), length, step, queue=queue)
    if found is None or (not found.series and await hours(visit) is None):
        return None
    number = length // step
    steps = [MinuteCounts()] * number
    for series in found.series:
        steps = [a.plus(b) for a, b in zip(steps, series.steps, strict=False)]
    return Chart(
        span,
        found.since,
        step,
        tuple(each.completed for each in steps),
        tuple(each.retried for each in steps),
        tuple(each.dead for each in steps),
        tuple(
            TypeRow(s.type or "", s.total.completed, s.total.retried, s.total.dead)
            for s in sorted(found.series, key=lambda s: -s.total.ended)
        ),
    )


async def _report(
    visit: Visit, key: tuple[str, ...], last: int, step: int | None, *, queue: str | None
) -> MinuteReport | None:
    reader = visit.site.reader

    async def ask() -> MinuteReport | None:
        by: Literal["queue", "type"] = "queue" if queue is None else "type"
        try:
            return await reader.minutes(last, step=step, by=by, queue=queue)
        except SchemaError:  # of before the counters: they are not needed
            return None

    return await visit.site.keep(("minutes", *key), ask)


def _sum(steps: Sequence[MinuteCounts]) -> MinuteCounts:
    total = MinuteCounts()
    for step in steps:
        total = total.plus(step)
    return total
