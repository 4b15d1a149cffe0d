"""One frame of `bgjob top`: lines of styled text, from an overview and the size of the screen."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal
from unicodedata import combining, east_asian_width

from bgjob._cli.table import printable
from bgjob._cli.top.history import History
from bgjob.stats import CappedCount, Overview, QueueOverview
from bgjob.workers import WorkerStatus

Sort = Literal["oldest", "due", "dead", "name"]
SORTS: tuple[Sort, ...] = ("oldest", "due", "dead", "name")

_LATE = 60.0
_VERY_LATE = 300.0
"""Seconds for which the oldest job may be due; that for which an alert should be set."""

_NARROWEST = 12
"""The least columns of a queue's name."""

_GAP = 2

_NOTHING = "No queue has jobs, is paused, or lost a job to the dead-letter table in the last hour."


class Style(Enum):
    """How a text looks: the numbers of the terminal's control sequence."""

    PLAIN = ""
    BOLD = "1"
    DIM = "2"
    GOOD = "32"
    WARN = "33"
    BAD = "1;31"
    TITLES = "7"


@dataclass(frozen=True, slots=True)
class Text:
    """A text in one style, without control characters."""

    text: str
    style: Style = Style.PLAIN


Line = Sequence[Text]


@dataclass(frozen=True, slots=True)
class Server:
    """The database that is shown."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What the database answered.

    Attributes:
        overview: what the queues hold.
        workers: the registered workers; empty if the role cannot read them.

    """

    overview: Overview
    workers: Sequence[WorkerStatus] = ()


@dataclass(frozen=True, slots=True)
class View:
    """What the user has chosen, and what the screen has room for.

    Attributes:
        width: columns of the screen; None for as many as it takes.
        height: lines of the screen; None for as many as it takes, and no keys to press.
        sort: the order of the queues.
        first: how many queues are scrolled away.
        is_frozen: whether the user has stopped the renewal.
        trouble: why the frame is not renewed; None if it is.

    """

    width: int | None = None
    height: int | None = None
    sort: Sort = "oldest"
    first: int = 0
    is_frozen: bool = False
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cell: Callable[[QueueOverview], Text]
    is_number: bool = True
    rank: int = 0
    """The columns of the highest rank are the first that a narrow screen leaves out."""


# -- texts ----------------------------------------------------------------------------------


def width_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Cut or fill a text, so that it takes this many columns."""
    if width_of(text) > width:
        while text and width_of(text) >= width:
            text = text[:-1]
        text += "…" if width else ""
    room = " " * (width - width_of(text))
    return room + text if right else text + room


def age(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days:,} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    if minutes:
        return f"{minutes} min {whole % 60} s"
    return f"{whole} s"


def _total(counts: Iterable[CappedCount]) -> CappedCount:
    known = list(counts)
    return CappedCount(sum(c.number for c in known), all(c.is_exact for c in known))


# -- cells ----------------------------------------------------------------------------------


def _count(count: CappedCount, style: Style = Style.PLAIN) -> Text:
    # `0+` in each row would say nothing: that there may be more is said by the total.
    if not count.number:
        return Text("0", Style.DIM)
    return Text(str(count), style)


class _Slots:
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
        return f"{self.busy[queue]:,}/{self.all[queue]:,}"

    def are_missing(self, queue: QueueOverview) -> bool:
        """Whether the queue has due jobs, and no worker that could be seen here."""
        # A worker may do without a row. Then it runs jobs.
        is_served = self.all[queue.queue] or queue.running.number
        return bool(self.are_known and queue.due.number and not queue.is_paused and not is_served)


def _state(queue: QueueOverview, slots: _Slots) -> Text:
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
    return Text(f"{age(seconds)} {arrow}", Style.PLAIN if queue.is_paused else _late(seconds))


def _late(seconds: float) -> Style:
    return Style.BAD if seconds > _VERY_LATE else Style.WARN if seconds > _LATE else Style.PLAIN


def _busy(queue: QueueOverview, slots: _Slots) -> Text:
    count = slots.all[queue.queue]
    if not count:
        return Text("0/0", Style.DIM)
    is_full = slots.busy[queue.queue] >= count
    return Text(slots.of(queue.queue), Style.WARN if is_full else Style.PLAIN)


def _columns(queues: Sequence[QueueOverview], slots: _Slots, history: History) -> list[_Column]:
    """Return the columns; those that would be empty are left out."""
    columns = [
        _Column("queue", lambda q: Text(printable(q.queue), Style.BOLD), is_number=False),
        _Column("due", lambda q: _count(q.due)),
        _Column("oldest  ", lambda q: _oldest(q, history)),
        _Column("running", lambda q: _count(q.running, Style.GOOD)),
        _Column("delayed", lambda q: _count(q.delayed), rank=3),
        _Column("dead/h", lambda q: _count(q.dead, Style.BAD), rank=1),
    ]
    if any(queue.is_paused or slots.are_missing(queue) for queue in queues):
        columns.insert(1, _Column("state", lambda q: _state(q, slots), is_number=False))
    if slots.all:
        slots_column = _Column("busy/slots", lambda q: _busy(q, slots), rank=2)
        columns.insert(-2, slots_column)
    if any(queue.waiting_for_keys.number for queue in queues):
        columns.insert(-1, _Column("for keys", lambda q: _count(q.waiting_for_keys), rank=4))
    return columns


# -- the frame ------------------------------------------------------------------------------


def frame(seen: Seen, server: Server, history: History, view: View) -> list[Line]:
    """Return the lines of a frame, none longer and no more than the screen has room for."""
    overview, slots = seen.overview, _Slots(seen.workers)
    lines: list[Line] = [_header(seen, server, slots, history), _totals(overview)]
    queues = _sorted(overview.queues, view.sort)
    if not queues:
        lines += [[], [Text(_NOTHING)]]
    else:
        room = None if view.height is None else rows(view.height)
        shown = queues[view.first :][:room]
        lines += _table(_columns(overview.queues, slots, history), shown, view.width)
    if view.height is not None:
        lines = lines[: view.height - 1]
        lines += [[]] * (view.height - 1 - len(lines))
        lines.append(_footer(len(queues), view))
    return [_cut(line, view.width) for line in lines][: view.height]


def rows(height: int) -> int:
    """Return how many queues a screen of this height shows."""
    return max(1, height - 4)


def render(line: Line, *, is_coloured: bool) -> str:
    """Return a line with the control sequences of its styles, or without."""
    return "".join(
        f"\x1b[{part.style.value}m{part.text}\x1b[0m"
        if is_coloured and part.style is not Style.PLAIN
        else part.text
        for part in line
    ).rstrip()


def _sorted(queues: Iterable[QueueOverview], sort: Sort) -> list[QueueOverview]:
    by_name = sorted(queues, key=lambda q: q.queue)
    match sort:
        case "name":
            return by_name
        case "due":
            return sorted(by_name, key=lambda q: -q.due.number)
        case "dead":
            return sorted(by_name, key=lambda q: -q.dead.number)
        case "oldest":
            return sorted(by_name, key=lambda q: -(q.oldest_due_age or 0.0))


def _header(seen: Seen, server: Server, slots: _Slots, history: History) -> Line:
    at = seen.overview.at.astimezone()
    line = [
        Text(f"bgjob {printable(server.name)}", Style.BOLD),
        Text(f"  {at:%H:%M:%S}", Style.DIM),
    ]
    alive = sum(worker.is_alive for worker in seen.workers)
    lost = sum(worker.state == "lost" for worker in seen.workers)
    if alive or lost:
        line.append(Text(f"  {alive:,} {'worker' if alive == 1 else 'workers'}"))
    if lost:
        line.append(Text(f"  {lost:,} lost", Style.BAD))
    if alive:
        line.append(Text(f"  {slots.busy.total():,}/{slots.all.total():,} busy"))
    if (rates := history.rates()) is not None:
        line.append(Text(f"  {rates.completed:,.1f} done/s"))
        if rates.failed:
            line.append(Text(f"  {rates.failed:,.1f} failed/s", Style.WARN))
    return [*line, Text(f"  PostgreSQL {printable(server.version)}", Style.DIM)]


def _totals(overview: Overview) -> Line:
    queues = overview.queues
    dead = _total(q.dead for q in queues)
    paused = sum(q.is_paused for q in queues)
    # That of a paused queue is as wanted.
    ages = [q.oldest_due_age for q in queues if q.oldest_due_age is not None and not q.is_paused]
    parts = [
        Text(f"{len(queues):,} {'queue' if len(queues) == 1 else 'queues'}"),
        Text(f"{_total(q.due for q in queues)} due"),
    ]
    if ages:
        parts.append(Text(f"oldest {age(max(ages))}", _late(max(ages))))
    parts += [
        Text(f"{_total(q.running for q in queues)} running"),
        Text(f"{dead} dead/h", Style.BAD if dead.number else Style.PLAIN),
    ]
    if paused:
        parts.append(Text(f"{paused:,} paused", Style.WARN))
    return [text for part in parts for text in (part, Text("  "))]


def _table(
    columns: list[_Column], queues: Sequence[QueueOverview], width: int | None
) -> list[Line]:
    cells = {column.title: [column.cell(queue) for queue in queues] for column in columns}

    def widest(column: _Column) -> int:
        return max(
            width_of(text) for text in (column.title, *(c.text for c in cells[column.title]))
        )

    def others() -> int:
        return sum(_GAP + widest(column) for column in columns[1:])

    name = widest(columns[0])
    if width is not None:
        while others() + min(name, _NARROWEST) > width and any(c.rank for c in columns):
            columns.remove(max(columns, key=lambda column: column.rank))
        name = min(name, max(_NARROWEST, width - others()))
    widths = [name, *map(widest, columns[1:])]
    titles = (" " * _GAP).join(
        fit(column.title, n, right=column.is_number)
        for column, n in zip(columns, widths, strict=True)
    )
    lines: list[Line] = [[Text(fit(titles, width or width_of(titles)), Style.TITLES)]]
    for row in range(len(queues)):
        line: list[Text] = []
        for column, n in zip(columns, widths, strict=True):
            cell = cells[column.title][row]
            line.append(Text(fit(cell.text, n, right=column.is_number), cell.style))
            line.append(Text(" " * _GAP))
        lines.append(line[:-1])
    return lines


def _footer(count: int, view: View) -> Line:
    if view.trouble is not None:
        return [Text(printable(view.trouble), Style.BAD)]
    last = min(count, view.first + rows(view.height or 0))
    keys = [
        ("q", "quit"),
        ("p", "freeze"),
        ("s", f"sort: {view.sort}"),
        ("↑↓", f"{view.first + 1:,} to {last:,} of {count:,}" if count else "scroll"),
    ]
    line = [
        part
        for key, what in keys
        for part in (Text(key, Style.BOLD), Text(f" {what}   ", Style.DIM))
    ]
    return [Text("FROZEN  ", Style.WARN), *line] if view.is_frozen else line


def _cut(line: Line, width: int | None) -> Line:
    if width is None:
        return line
    cut: list[Text] = []
    for part in line:
        room = width - sum(width_of(p.text) for p in cut)
        if width_of(part.text) > room:
            return [*cut, Text(fit(part.text, room), part.style)]
        cut.append(part)
    return cut
