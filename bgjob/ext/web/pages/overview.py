"""The first page: what hurts, in a sentence and in a table."""

from dataclasses import replace

from bgjob._words import count
from bgjob.doctor import LIMITS
from bgjob.ext.web.frame import path
from bgjob.ext.web.pages.dead import groups
from bgjob.ext.web.pages.minutes import completed, failed_percent, hours
from bgjob.ext.web.pages.rows import longest_rows, matches, queue_rows
from bgjob.ext.web.parts import GroupRow, LongestRow, Phrase, QueueRow, QueueTable, Trouble
from bgjob.ext.web.views import OverviewPage
from bgjob.ext.web.visit import Visit, tried
from bgjob.stats import CappedCount, Overview
from bgjob.workers import WorkerStatus

_MOST = 100
"""Queues in the table."""

_FEW = 5
"""Groups of dead, and jobs that run long."""


async def overview(visit: Visit) -> OverviewPage:
    """Return the overview."""
    workers = await tried(visit.site.workers())
    found = [] if isinstance(workers, Trouble) else workers
    page = OverviewPage(has_workers=bool(found) or isinstance(workers, Trouble))
    if visit.wants("summary"):
        page = replace(page, summary=await tried(_summary(visit, found)))
    if visit.wants("queues"):
        page = replace(page, queues=await tried(_queues(visit, found)))
    if visit.wants("groups"):
        page = replace(page, groups=await tried(_groups(visit)))
    if visit.wants("longest"):
        longest = workers if isinstance(workers, Trouble) else _longest(workers)
        page = replace(page, longest=longest)
    return page


def _longest(workers: list[WorkerStatus]) -> tuple[LongestRow, ...]:
    return longest_rows(worker for worker in workers if worker.is_alive)[:_FEW]


async def _groups(visit: Visit) -> tuple[GroupRow, ...]:
    found = await groups(visit)
    return tuple(sorted(found, key=lambda group: group.last_at, reverse=True)[:_FEW])


async def _queues(visit: Visit, workers: list[WorkerStatus]) -> QueueTable:
    rows = queue_rows(await visit.site.overview(), workers)
    prefix = visit.field("queue")
    rows = [row for row in rows if matches(row.queue, prefix)]
    shown = await with_hours(visit, rows[:_MOST])
    has_minutes = any(row.completed is not None for row in shown)
    return QueueTable(shown, max(len(rows) - _MOST, 0), prefix, has_minutes)


async def with_hours(visit: Visit, rows: list[QueueRow]) -> tuple[QueueRow, ...]:
    """Return rows with what the minute counters tell, if they can be read."""
    found = await tried(hours(visit))
    if found is None or isinstance(found, Trouble):
        return tuple(rows)
    return tuple(
        replace(
            row,
            completed=completed(found.get(row.queue)),
            failed_percent=failed_percent(found.get(row.queue)),
        )
        for row in rows
    )


async def _summary(visit: Visit, workers: list[WorkerStatus]) -> tuple[Phrase, ...]:
    return summary(await visit.site.overview(), workers)


def summary(found: Overview, workers: list[WorkerStatus]) -> tuple[Phrase, ...]:
    """Return what hurts in a database, in a sentence."""
    return tuple(_phrases(found, queue_rows(found, workers), workers))


def _phrases(found: Overview, rows: list[QueueRow], workers: list[WorkerStatus]) -> list[Phrase]:
    alive = sum(worker.is_alive for worker in workers)
    lost = sum(worker.state == "lost" for worker in workers)
    phrases = [Phrase(count(alive, "worker"), path("workers"), alive == 0 and bool(rows))]
    if lost:
        phrases.append(Phrase(f"{lost:,} lost", path("workers"), is_alarm=True))
    unserved = [row for row in rows if row.state == "no worker"]
    if unserved:
        text = f"{count(len(unserved), 'queue')} with jobs and no worker"
        is_alarm = any(row.is_alarm for row in unserved)
        phrases.append(Phrase(text, path("queues", unserved[0].queue), is_alarm))
    oldest = min(
        (row for row in rows if row.oldest_due_at is not None and row.state != "paused"),
        key=lambda row: row.oldest_due_at or found.at,
        default=None,
    )
    if oldest is not None and oldest.oldest_due_at is not None:
        age = (found.at - oldest.oldest_due_at).total_seconds()
        link = path("queues", oldest.queue)
        is_alarm = age > LIMITS.due_seconds
        phrases.append(Phrase(f"Oldest due: {oldest.queue}", link, is_alarm, oldest.oldest_due_at))
    paused = [row for row in rows if row.state == "paused"]
    if paused:
        text = f"{count(len(paused), 'queue')} paused"
        phrases.append(Phrase(text, path("queues", paused[0].queue)))
    dead = dead_last_hour(found)
    text = f"{dead} died in the last hour" if dead.number else "Nothing died in the last hour"
    phrases.append(Phrase(text, path("dead"), dead.number > LIMITS.died))
    return phrases


def dead_last_hour(found: Overview) -> CappedCount:
    """Return how many jobs of all queues died in the last hour."""
    number = sum(queue.dead.number for queue in found.queues)
    return CappedCount(number, all(queue.dead.is_exact for queue in found.queues))
