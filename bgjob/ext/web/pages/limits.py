"""The limits of queues and types."""

from bgjob._sql import limits as statements
from bgjob.ext.web.views import LimitsPage
from bgjob.ext.web.visit import Visit, tried
from bgjob.limit import LimitStatus


async def limits(visit: Visit) -> LimitsPage:
    """Return the list of limits."""
    return LimitsPage(await tried(visit.site.keep("limits", lambda: _rows(visit))))


async def _rows(visit: Visit) -> tuple[LimitStatus, ...]:
    return tuple(await visit.site.reader.read(statements.limits()))
