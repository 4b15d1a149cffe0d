"""The first page over several databases: how each is, and the way to it."""

import asyncio
from dataclasses import dataclass

from bgjob.ext.web import troubles
from bgjob.ext.web.pages.overview import summary
from bgjob.ext.web.parts import Phrase, Trouble
from bgjob.ext.web.site import Site
from bgjob.ext.web.visit import trouble_of
from bgjob.stats import CappedCount

_WITHIN = 2.0
"""Seconds for one database: one that does not answer does not hold up the page."""


@dataclass(frozen=True, slots=True)
class DatabaseRow:
    """A database; what its queues hold is None if `summary` says why it is not known.

    The links of its phrases are paths below the database's own root.
    """

    name: str
    summary: tuple[Phrase, ...] | Trouble
    queues: int | None = None
    due: CappedCount | None = None
    running: CappedCount | None = None

    @property
    def is_alarm(self) -> bool:
        """Whether it hurts."""
        if isinstance(self.summary, Trouble):
            return True
        return any(phrase.is_alarm for phrase in self.summary)


@dataclass(frozen=True, slots=True)
class DatabasesPage:
    """All databases that a user may see (databases.html)."""

    databases: tuple[DatabaseRow, ...]


async def row(name: str, site: Site) -> DatabaseRow:
    """Return how a database is; a Trouble if it does not answer in time."""
    try:
        async with asyncio.timeout(_WITHIN):
            return await _row(name, site)
    except TimeoutError:
        return DatabaseRow(name, Trouble(f"It does not answer within {_WITHIN:g} s.", ""))
    except Exception as error:
        trouble = trouble_of(error)
        if trouble is None:
            page, _ = troubles.of(error)
            assert page is not None  # noqa: S101 (only a redirect has none)
            trouble = Trouble(f"{page.title}.", page.remedy)
        return DatabaseRow(name, trouble)


async def _row(name: str, site: Site) -> DatabaseRow:
    await site.server()
    found, workers = await asyncio.gather(site.overview(), site.workers())
    return DatabaseRow(
        name,
        summary(found, workers),
        len(found.queues),
        _sum([queue.due for queue in found.queues]),
        _sum([queue.running for queue in found.queues]),
    )


def _sum(counts: list[CappedCount]) -> CappedCount:
    return CappedCount(sum(count.number for count in counts), all(c.is_exact for c in counts))
