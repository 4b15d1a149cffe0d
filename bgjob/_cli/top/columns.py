"""The columns of the queues in a frame of `bgjob top`."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bgjob._cli.table import printable
from bgjob._cli.top.history import History
from bgjob._cli.top.seen import Seen
from bgjob._cli.top.text import Style, Text, bars
from bgjob._words import lasting
from bgjob.limit import LimitStatus
from bgjob.stats import CappedCount, QueueOverview
from bgjob.workers import WorkerStatus

_LATE = 60.0
_VERY_LATE = 300.0
"""Seconds for which the oldest job may be due; that for which an alert should be set."""

_FAILING = 0.01
_BROKEN = 0.1
"""The share of attempts that may fail; that for which an alert should be set."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table.

    Attributes:
        title: its title.
        cell: returns the text for a queue.
        is_number: whether it is aligned right.
        rank: the columns of the highest rank are the first that a narrow screen leaves out.

    """

    title: str
    cell: Callable[[QueueOverview], Text]
    is_number: bool = True
    rank: int = 0


class Slots:
    """The slots of the workers that are seen, and how many are busy, by queue."""

    def __init__(self, workers: Sequence[WorkerStatus]) -> None:
        self.are_known = bool(workers)
        """Whether any worker has a row, though it may have ended or be lost."""
        self.all: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        for worker in workers:
            if worker.is_alive:
                self.all.update(worker.queues)
                self.busy.update(worker.running)

    def of(self, queue: str) -> str:
        """Return the busy ones of a queue and all of them."""
        return f"{self.busy[queue]:,}/{self.all[queue]:,}"

    def are_missing(self, queue: QueueOverview) -> bool:
        """Whether the queue has due jobs, and no worker that could be seen here."""
        # A worker may do without a row. Then it runs jobs.
        is_served = self.all[queue.queue] or queue.running.number
        return bool(self.are_known and queue.due.number and not queue.is_paused and not is_served)


def late(seconds: float) -> Style:
    """Return the style of the age of a due job."""
    return Style.BAD if seconds > _VERY_LATE else Style.WARN if seconds > _LATE else Style.PLAIN


def per_second(seen: Seen, history: History, queue: str) -> float | None:
    """Return how many jobs of a queue were completed each second; None if that is unknown."""
    if queue in seen.flows:
        return seen.flows[queue].per_second
    rates = history.rates(queue)
    return None if rates is None else rates.completed


def columns(
    seen: Seen, queues: Sequence[QueueOverview], slots: Slots, history: History, chosen: str | None
) -> list[Column]:
    """Return the columns; those that would be empty are left out."""
    found = [
        Column("queue", lambda q: _name(q, chosen), is_number=False),
        Column("due", lambda q: _count(q.due)),
        Column("oldest  ", lambda q: _oldest(q, history)),
        Column("running", lambda q: _count(q.running, Style.GOOD), rank=5 if slots.all else 0),
        Column("delayed", lambda q: _count(q.delayed), rank=6),
    ]
    if any(queue.is_paused or slots.are_missing(queue) for queue in queues):
        found.insert(1, Column("state", lambda q: _state(q, slots), is_number=False))
    if any(queue.waiting_for_keys.number for queue in queues):
        found.append(Column("for keys", lambda q: _count(q.waiting_for_keys), rank=7))
    limits = {each.name: each for each in seen.limits if each.scope == "queue"}
    if any(queue.queue in limits for queue in queues):
        found.append(
            Column("limit", lambda q: _limit(limits.get(q.queue)), is_number=False, rank=4)
        )
    if slots.all:
        found.append(Column("busy", lambda q: _busy(q, slots), rank=2))
    if any(per_second(seen, history, queue.queue) is not None for queue in queues):
        found.append(Column("done/s", lambda q: _rate(per_second(seen, history, q.queue)), rank=1))
    if seen.flows:
        found.append(Column("fail%", lambda q: _failing(seen, q), rank=3))
    found.append(Column("dead/h", lambda q: _count(q.dead, Style.BAD), rank=1))
    if any(any(flow.bars) for flow in seen.flows.values()):
        found.append(Column("last hour", lambda q: _bars(seen, q), is_number=False, rank=4))
    return found


# -- cells ----------------------------------------------------------------------------------


def _name(queue: QueueOverview, chosen: str | None) -> Text:
    name = printable(queue.queue)
    if chosen is None:
        return Text(name, Style.BOLD)
    return (
        Text(f"▸ {name}", Style.TITLES) if queue.queue == chosen else Text(f"  {name}", Style.BOLD)
    )


def _count(count: CappedCount, style: Style = Style.PLAIN) -> Text:
    # `0+` in each row would say nothing: that there may be more is said by the total.
    if not count.number:
        return Text("0", Style.DIM)
    return Text(str(count), style)


def _state(queue: QueueOverview, slots: Slots) -> Text:
    if slots.are_missing(queue):
        return Text("NO WORKER", Style.BAD)
    if not queue.is_paused:
        return Text("open", Style.DIM)
    if queue.paused_until is None:
        return Text("PAUSED", Style.WARN)
    return Text(f"until {queue.paused_until.astimezone():%m-%d %H:%M}", Style.WARN)


def _oldest(queue: QueueOverview, history: History) -> Text:
    if queue.oldest_due_age is None:
        return Text("-  ", Style.DIM)
    seconds = queue.oldest_due_age
    arrow = {1: "▲", 0: " ", -1: "▼"}[history.trend(queue.queue)]
    return Text(f"{lasting(seconds)} {arrow}", Style.PLAIN if queue.is_paused else late(seconds))


def _limit(status: LimitStatus | None) -> Text:
    if status is None:
        return Text("-", Style.DIM)
    return Text(str(status.limit), Style.WARN if is_reached(status) else Style.PLAIN)


def is_reached(status: LimitStatus) -> bool:
    """Whether no place is free, or no job may start now."""
    most = status.limit.concurrency
    return status.next_in > 0 or (most is not None and status.places >= most)


def _busy(queue: QueueOverview, slots: Slots) -> Text:
    count = slots.all[queue.queue]
    if not count:
        return Text("0/0", Style.DIM)
    is_full = slots.busy[queue.queue] >= count
    return Text(slots.of(queue.queue), Style.WARN if is_full else Style.PLAIN)


def _rate(rate: float | None) -> Text:
    if rate is None:
        return Text("-", Style.DIM)
    text = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"  # noqa: PLR2004
    return Text(text, Style.PLAIN if rate else Style.DIM)


def _failing(seen: Seen, queue: QueueOverview) -> Text:
    flow = seen.flows.get(queue.queue)
    ratio = None if flow is None else flow.recent.failure_ratio
    if ratio is None:
        return Text("-", Style.DIM)
    style = Style.BAD if ratio > _BROKEN else Style.WARN if ratio > _FAILING else Style.PLAIN
    return Text(f"{100 * ratio:.1f}", style if ratio else Style.DIM)


def _bars(seen: Seen, queue: QueueOverview) -> Text:
    flow = seen.flows.get(queue.queue)
    return Text("" if flow is None else bars(flow.bars))
