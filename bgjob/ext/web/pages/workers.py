"""The workers."""

from starlette.exceptions import HTTPException

from bgjob.ext.web.pages.rows import worker_rows
from bgjob.ext.web.parts import Trouble, WorkerRow
from bgjob.ext.web.views import WorkerPage, WorkersPage
from bgjob.ext.web.visit import Visit, tried

_LONGEST = 18
"""Digits of a bigint that are safe to send."""


async def workers(visit: Visit) -> WorkersPage:
    """Return the list of workers."""
    return WorkersPage(await tried(_rows(visit)))


async def worker(visit: Visit) -> WorkerPage:
    """Return the page of a worker."""
    number = number_in(visit, "number")
    rows = await tried(_rows(visit))
    if isinstance(rows, Trouble):
        return WorkerPage(number, rows)
    found = next((row for row in rows if row.number == number), None)
    if found is None:
        raise HTTPException(404, f"There is no worker {number}: rows are kept for a day.")
    return WorkerPage(number, found)


async def _rows(visit: Visit) -> tuple[WorkerRow, ...]:
    return worker_rows(await visit.site.workers(), visit.site.redaction)


def number_in(visit: Visit, name: str) -> int:
    """Return a number from the path; raise 404 if it is none."""
    text: str = visit.request.path_params[name]
    if not (text.isascii() and text.isdecimal() and len(text) <= _LONGEST):
        raise HTTPException(404, f"{text!r} is not a number.")
    return int(text)
