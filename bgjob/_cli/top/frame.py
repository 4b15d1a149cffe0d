"""One frame of `bgjob top`: lines of styled text, from what was seen and the size of the screen."""

from collections.abc import Iterable, Sequence

from bgjob._cli.table import printable
from bgjob._cli.top.columns import Column, Slots, columns, is_reached, late, per_second
from bgjob._cli.top.history import History
from bgjob._cli.top.seen import Pane, Seen, Server, Sort, View
from bgjob._cli.top.text import Line, Style, Text, cut, fit, width_of, wrapped
from bgjob._words import count, lasting
from bgjob.stats import CappedCount, QueueOverview

_NARROWEST = 12
"""The least columns of a queue's name."""

_GAP = 2

_LEAST = 1.0
"""Seconds from which a running job is one of the longest."""

_OLD = 60.0
_VERY_OLD = 3600.0
"""Seconds for which a transaction may be open; that for which an alert should be set."""

_LOW = 12
"""Lines of a screen that has no room for notes."""

_NOTHING = (
    "No queue has jobs or a worker, is paused, or lost a job to the dead-letter table in the last "
    "hour."
)


def frame(seen: Seen, server: Server, history: History, view: View) -> list[Line]:
    """Return the lines of a frame, none longer and no more than the screen has room for."""
    slots = Slots(seen.workers)
    queues = ordered(seen, history, view.sort)
    lines: list[Line] = [_header(seen, server, slots, history), _totals(queues, history)]
    if view.pane is not None:
        lines += _pane(view.pane, view.width)
    elif not queues:
        lines += [[], *([Text(line)] for line in wrapped(_NOTHING, view.width))]
    else:
        room = None if view.height is None else rows(view.height)
        shown = queues[view.first :][:room]
        table = columns(seen, queues, slots, history, view.chosen)
        lines += _table(table, shown, view.width)
    notes = _notes(seen)
    if view.height is None:
        lines += [[], *notes] if notes else []
    else:
        notes = notes[: view.height - rows(view.height) - 4]
        above = view.height - 1 - len(notes)
        lines = lines[:above]
        lines += [[]] * (above - len(lines))
        lines += [*notes, _footer(len(queues), view)]
    return [cut(line, view.width) for line in lines][: view.height]


def rows(height: int) -> int:
    """Return how many queues a screen of this height shows."""
    return max(1, height - (4 if height < _LOW else 6))


def ordered(seen: Seen, history: History, sort: Sort) -> list[QueueOverview]:
    """Return the queues in the order of the screen."""
    by_name = sorted(seen.queues, key=lambda q: q.queue)
    match sort:
        case "name":
            return by_name
        case "due":
            return sorted(by_name, key=lambda q: -q.due.number)
        case "dead":
            return sorted(by_name, key=lambda q: -q.dead.number)
        case "rate":
            return sorted(by_name, key=lambda q: -(per_second(seen, history, q.queue) or 0.0))
        case "oldest":
            return sorted(by_name, key=lambda q: -(q.oldest_due_age or 0.0))


def _header(seen: Seen, server: Server, slots: Slots, history: History) -> Line:
    at = seen.overview.at.astimezone()
    line = [
        Text(f"bgjob {printable(server.name)}", Style.BOLD),
        Text(f"  {at:%H:%M:%S}", Style.DIM),
    ]
    alive = sum(worker.is_alive for worker in seen.workers)
    lost = sum(worker.state == "lost" for worker in seen.workers)
    if alive or lost:
        line.append(Text(f"  {count(alive, 'worker')}"))
    if lost:
        line.append(Text(f"  {lost:,} lost", Style.BAD))
    if alive:
        line.append(Text(f"  {slots.busy.total():,}/{slots.all.total():,} busy"))
    if (rates := history.rates()) is not None:
        line.append(Text(f"  {rates.completed:,.1f} done/s"))
        if rates.failed:
            line.append(Text(f"  {rates.failed:,.1f} failed/s", Style.WARN))
    return [*line, Text(f"  PostgreSQL {printable(server.version)}", Style.DIM)]


def _totals(queues: Sequence[QueueOverview], history: History) -> Line:
    dead = _total(q.dead for q in queues)
    paused = sum(q.is_paused for q in queues)
    # That of a paused queue is as wanted.
    ages = [q.oldest_due_age for q in queues if q.oldest_due_age is not None and not q.is_paused]
    parts = [Text(count(len(queues), "queue")), Text(f"{_total(q.due for q in queues)} due")]
    if ages:
        parts.append(Text(f"oldest {lasting(max(ages))}", late(max(ages))))
    trend = {1: " ▲", 0: "", -1: " ▼"}[history.dead_trend()]
    parts += [
        Text(f"{_total(q.running for q in queues)} running"),
        Text(f"{dead} dead/h{trend}", Style.BAD if dead.number else Style.PLAIN),
    ]
    if paused:
        parts.append(Text(f"{paused:,} paused", Style.WARN))
    return [text for part in parts for text in (part, Text("  "))]


def _total(counts: Iterable[CappedCount]) -> CappedCount:
    known = list(counts)
    return CappedCount(sum(c.number for c in known), all(c.is_exact for c in known))


def _table(shown: list[Column], queues: Sequence[QueueOverview], width: int | None) -> list[Line]:
    cells = {column.title: [column.cell(queue) for queue in queues] for column in shown}

    def widest(column: Column) -> int:
        return max(
            width_of(text) for text in (column.title, *(c.text for c in cells[column.title]))
        )

    def others() -> int:
        return sum(_GAP + widest(column) for column in shown[1:])

    name = widest(shown[0])
    if width is not None:
        while others() + min(name, _NARROWEST) > width and any(c.rank for c in shown):
            shown.remove(max(shown, key=lambda column: column.rank))
        name = min(name, max(_NARROWEST, width - others()))
    widths = [name, *map(widest, shown[1:])]
    titles = (" " * _GAP).join(
        fit(column.title, n, right=column.is_number)
        for column, n in zip(shown, widths, strict=True)
    )
    lines: list[Line] = [[Text(fit(titles, width or width_of(titles)), Style.TITLES)]]
    for row in range(len(queues)):
        line: list[Text] = []
        for column, n in zip(shown, widths, strict=True):
            cell = cells[column.title][row]
            line.append(Text(fit(cell.text, n, right=column.is_number), cell.style))
            line.append(Text(" " * _GAP))
        lines.append(line[:-1])
    return lines


def _pane(pane: Pane, width: int | None) -> list[Line]:
    title = f"the first due job of queue {printable(pane.queue)}"
    lines: list[Line] = [[Text(fit(title, width or width_of(title)), Style.TITLES)]]
    if pane.lines is None:
        return [*lines, [Text("asking the database …", Style.DIM)]]
    labels = max((width_of(label) for label, _ in pane.lines), default=0)
    for label, text in pane.lines:
        is_remedy = label == "do"
        room = None if width is None else width - labels - _GAP
        for n, line in enumerate(wrapped(printable(text), room)):
            lines.append(
                [
                    Text(fit(label if n == 0 else "", labels + _GAP), Style.DIM),
                    Text(line, Style.GOOD if is_remedy else Style.PLAIN),
                ]
            )
    return lines


# -- below the queues ----------------------------------------------------------------------


def _notes(seen: Seen) -> list[Line]:
    """Return the lines about single jobs and sessions; none where there is nothing to say."""
    notes: list[Line] = []
    if longest := _longest(seen):
        notes.append([Text("longest    ", Style.DIM), Text(" · ".join(longest))])
    if types := [each for each in seen.limits if each.scope == "type"]:
        line = [Text("limits     ", Style.DIM)]
        for each in types:
            style = Style.WARN if is_reached(each) else Style.PLAIN
            line += [Text(f"{printable(each.name)}: {each.limit}", style), Text(" · ", Style.DIM)]
        notes.append(line[:-1])
    last: list[Text] = []
    if (death := seen.death) is not None:
        first = next(iter(death.error.splitlines()), "") or "no error is told"
        passed = lasting((seen.overview.at - death.at).total_seconds())
        jobs = count(death.jobs.number, "job") if death.jobs.is_exact else f"{death.jobs} jobs"
        last = [
            Text("last dead  ", Style.DIM),
            Text(f"{passed} ago, {printable(death.queue)}/{printable(death.type)}: "),
            Text(printable(first), Style.BAD),
            Text(f" ({jobs} like it)"),
        ]
    if (holder := seen.holder) is not None and (holder.seconds or 0) > _OLD:
        seconds = holder.seconds or 0.0
        what = f"{holder.kind} {printable(holder.name)}"
        style = Style.BAD if seconds > _VERY_OLD else Style.WARN
        notes.append(
            [
                Text("horizon    ", Style.DIM),
                Text(f"{what} keeps dead rows for {lasting(seconds)}", style),
                Text(": bgjob doctor --check horizon"),
            ]
        )
    return [*notes, last] if last else notes


def _longest(seen: Seen) -> list[str]:
    running = []
    for worker in seen.workers:
        if worker.is_alive:
            for job in worker.longest:
                passed = (worker.seen_at - job.since).total_seconds() + worker.not_seen
                running.append((passed, printable(job.id), printable(worker.host)))
    running.sort(reverse=True)
    return [
        f"{job} {lasting(passed)} on {host}" for passed, job, host in running[:3] if passed > _LEAST
    ]


def _footer(number: int, view: View) -> Line:
    if view.trouble is not None:
        return [Text(printable(view.trouble), Style.BAD)]
    last = min(number, view.first + rows(view.height or 0))
    keys = [("q", "quit"), ("p", "freeze"), ("s", f"sort: {view.sort}")]
    if view.pane is not None:
        keys = [("q", "quit"), ("Esc", "back to the queues"), ("Enter", "ask again")]
    elif number:
        keys += [("↑↓", f"{view.first + 1:,} to {last:,} of {number:,}"), ("Enter", "explain")]
    line = [
        part
        for key, what in keys
        for part in (Text(key, Style.BOLD), Text(f" {what}   ", Style.DIM))
    ]
    return [Text("FROZEN  ", Style.WARN), *line] if view.is_frozen else line
