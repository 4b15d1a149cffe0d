"""Live jobs: the list, and one of them."""

from dataclasses import asdict, replace
from typing import cast, get_args

from starlette.exceptions import HTTPException

from bgjob._sql import pages as statements
from bgjob.ext.web.frame import path
from bgjob.ext.web.pages.rows import dead_rows, job_rows, why
from bgjob.ext.web.parts import Button, Trouble, Why
from bgjob.ext.web.records import is_revealed
from bgjob.ext.web.redaction import Shown
from bgjob.ext.web.views import Chip, JobFacts, JobFilter, JobPage, JobsPage, Looked
from bgjob.ext.web.visit import Visit, tried
from bgjob.jobs import JobPage as Found
from bgjob.jobs import LiveJob, LiveState

_SHOWN = 50
"""Jobs on a page."""

STATES: tuple[LiveState, ...] = get_args(LiveState)

_ORDERS = {
    "exclusive": "in the order in which they get the key",
    "prefix": "by id, the last first",
    "queue": "in the order in which they are claimed, then those that wait for keys",
    "other": "in the order of the table: a job that changes meanwhile may be met twice, or missed",
    "none": "by id, the last first: of generated ids the newest first",
}


async def jobs(visit: Visit) -> JobsPage:
    """Return a page of the list of live jobs."""
    wanted = JobFilter(
        visit.field("id"),
        visit.field("queue"),
        visit.field("type"),
        visit.field("state"),
        visit.field("key"),
        visit.field("error"),
    )
    if wanted.id and wanted == JobFilter(wanted.id) and not visit.is_api:
        await _lead_to(visit, wanted.id)
    if wanted.state and wanted.state not in STATES:
        raise HTTPException(400, f"state must be one of {', '.join(STATES)}.")
    given = {name: value for name, value in asdict(wanted).items() if value}
    after = visit.request.query_params.get("after", "")
    chips = tuple(
        Chip(name, value, path("jobs", **{n: v for n, v in given.items() if n != name}))
        for name, value in given.items()
    )
    page = JobsPage(wanted, chips, STATES, order=_order(wanted))
    found = await tried(_found(visit, wanted, after))
    if isinstance(found, Trouble):
        return replace(page, rows=found)
    return replace(
        page,
        rows=job_rows(found.jobs, visit.site.redaction),
        older=path("jobs", **given, after=found.next) if found.next else None,
        first=path("jobs", **given) if after else None,
        looked=_looked(found),
    )


async def _lead_to(visit: Visit, id_: str) -> None:
    """Lead to the page of a job, if the text that is looked for is the whole id of one."""
    reader = visit.site.reader
    found: object = await tried(reader.jobs.get(id_))
    if found is None:
        found = await tried(reader.read(statements.dead_of(id_)))
    if found and not isinstance(found, Trouble):
        raise HTTPException(303, headers={"location": visit.root + path("jobs", id_)})


async def _found(visit: Visit, wanted: JobFilter, after: str) -> Found:
    try:
        return await visit.site.reader.jobs.list(
            after=after or None,
            limit=_SHOWN,
            prefix=wanted.id or None,
            queue=wanted.queue or None,
            type=wanted.type or None,
            state=cast("LiveState", wanted.state) or None,
            exclusive=wanted.key or None,
            error=wanted.error or None,
        )
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


def _looked(found: Found) -> Looked | None:
    """Return how far a search came; None if nothing was passed over."""
    if found.looked_at <= len(found.jobs) and found.about is None:
        return None
    return Looked(found.looked_at, found.about or 0, found.next is None)


def _order(wanted: JobFilter) -> str:
    """Return the order of the list; see client.jobs.list."""
    if wanted.key:
        return _ORDERS["exclusive"]
    if wanted.id:
        return _ORDERS["prefix"]
    if wanted.queue:
        return _ORDERS["queue"]
    return _ORDERS["none" if wanted == JobFilter() else "other"]


async def job(visit: Visit) -> JobPage:
    """Return the page of one job."""
    id_ = visit.name("id")
    page = JobPage(id_)
    if visit.wants("why"):
        page = replace(page, why=await tried(_why(visit, id_)))
    if visit.part is not None:
        return page
    found = await tried(visit.site.reader.jobs.get(id_))
    dead = await tried(visit.site.reader.read(statements.dead_of(id_)))
    if not isinstance(dead, Trouble):
        page = replace(page, dead=dead_rows(dead, visit.site.redaction))
    if found is None or isinstance(found, Trouble):
        return replace(page, job=found)
    shown = Shown(id_, found.queue, found.type, found.arg, found.last_error)
    redaction, at = visit.site.redaction, path("jobs", id_)
    may_reveal, revealed = "payloads" in visit.can, await is_revealed(visit, id_)
    return replace(
        page,
        job=_facts(found),
        payload=redaction.payload(shown, may_reveal=may_reveal, is_revealed=revealed, at=at),
        headers=redaction.headers(
            replace(shown, headers=found.headers),
            may_reveal=may_reveal,
            is_revealed=revealed,
            at=at,
        ),
        checkpoint=redaction.checkpoint(
            shown, found.checkpoint, may_reveal=may_reveal, is_revealed=revealed, at=at
        ),
        error=redaction.whole_error(shown),
        trace=visit.site.trace_of(replace(shown, headers=found.headers)),
        buttons=_buttons(found),
    )


async def _why(visit: Visit, id_: str) -> Why:
    return why(await visit.site.keep(("why", id_), lambda: visit.site.reader.explain(id_)), visit)


def _facts(found: LiveJob) -> JobFacts:
    return JobFacts(
        found.id,
        found.queue,
        found.type,
        found.state,
        found.priority,
        found.attempt,
        found.deaths,
        found.exclusive,
        found.created_at,
        found.updated_at,
        found.next_run_at,
        found.expires,
        found.lease_until,
        found.claimed_at,
        None if found.worker is None else found.worker.number,
        found.group,
        found.waits_for_group,
    )


def _buttons(found: LiveJob) -> tuple[Button, ...]:
    id_ = found.id
    if found.state == "running":
        return (
            Button(
                "Cancel",
                path("jobs", id_, "cancel"),
                "jobs",
                is_dangerous=True,
                is_confirmed=True,
            ),
            Button(
                "Abandon",
                path("jobs", id_, "abandon"),
                "abandon",
                is_dangerous=True,
                is_confirmed=True,
            ),
        )
    buttons = []
    if found.due_in > 0:
        buttons.append(Button("Run now", path("jobs", id_, "now"), "jobs"))
    return (
        *buttons,
        Button("Set priority", path("jobs", id_, "priority"), "jobs", asks=("priority",)),
        Button(
            "Cancel",
            path("jobs", id_, "cancel"),
            "jobs",
            is_dangerous=True,
            is_confirmed=True,
        ),
    )
