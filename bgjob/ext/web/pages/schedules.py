"""The schedules."""

from bgjob._sql import pages as statements
from bgjob.doctor import LIMITS
from bgjob.ext.web.views import ScheduleRow, SchedulesPage
from bgjob.ext.web.visit import Visit, tried


async def schedules(visit: Visit) -> SchedulesPage:
    """Return the list of schedules."""
    return SchedulesPage(await tried(visit.site.keep("schedules", lambda: _rows(visit))))


async def _rows(visit: Visit) -> tuple[ScheduleRow, ...]:
    found = await visit.site.reader.read(statements.schedules(late=LIMITS.schedule_seconds))
    return tuple(
        ScheduleRow(
            row.name,
            row.spec,
            row.queue,
            row.type,
            row.is_paused,
            row.next_run_at,
            row.next_run_at if row.is_late else None,
            row.last_run_at,
            row.last_job_id,
            row.last_state,
        )
        for row in found
    )
