"""One queue."""

from dataclasses import replace

from bgjob._sql import pages as statements
from bgjob.ext.web.pages.minutes import chart
from bgjob.ext.web.pages.overview import with_hours
from bgjob.ext.web.pages.rows import queue_rows, why, worker_rows
from bgjob.ext.web.parts import QueueRow, Trouble, Why, WorkerRow
from bgjob.ext.web.views import PriorityRow, QueuePage
from bgjob.ext.web.visit import Visit, tried
from bgjob.stats import CappedCount

_CAP = 10_000
"""Due jobs of a priority are counted up to it."""


async def queue(visit: Visit) -> QueuePage:
    """Return the page of a queue."""
    name = visit.name("queue")
    page = QueuePage(name)
    if visit.wants("now"):
        page = replace(
            page,
            row=await tried(_row(visit, name)),
            lines=await tried(visit.site.keep(("lines", name), lambda: _lines(visit, name))),
            workers=await tried(_workers(visit, name)),
        )
    if visit.wants("chart"):
        page = replace(page, chart=await tried(chart(visit, name)))
    if visit.part is None:
        page = replace(page, why=await tried(_why(visit, name)))
    return page


async def _row(visit: Visit, name: str) -> QueueRow | None:
    workers = await tried(visit.site.workers())
    rows = queue_rows(await visit.site.overview(), [] if isinstance(workers, Trouble) else workers)
    found = await with_hours(visit, [row for row in rows if row.queue == name])
    return found[0] if found else None


async def _lines(visit: Visit, name: str) -> tuple[PriorityRow, ...]:
    found = await visit.site.reader.read(statements.lines_of(name, cap=_CAP))
    return tuple(
        PriorityRow(line.priority, CappedCount(line.due, line.due < _CAP), line.oldest)
        for line in found
    )


async def _workers(visit: Visit, name: str) -> tuple[WorkerRow, ...]:
    workers = [worker for worker in await visit.site.workers() if name in worker.queues]
    return worker_rows(workers, visit.site.redaction)


async def _why(visit: Visit, name: str) -> Why:
    key = ("why of", name)
    found = await visit.site.keep(key, lambda: visit.site.reader.explain(queue=name))
    return why(found, visit)
