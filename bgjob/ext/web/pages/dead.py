"""Dead jobs: their groups, one group, and one dead job."""

from collections.abc import Mapping
from dataclasses import replace

from starlette.exceptions import HTTPException

from bgjob._sql import pages as statements
from bgjob._sql.dead import number_of
from bgjob._sql.pages import DeadListed, DeadStep
from bgjob._triage.died_on import DiedOn, died_on
from bgjob.ext.web.frame import path
from bgjob.ext.web.pages.rows import brief, dead_rows
from bgjob.ext.web.pages.workers import number_in
from bgjob.ext.web.parts import Button, GroupRow, Trouble
from bgjob.ext.web.records import is_revealed
from bgjob.ext.web.redaction import Shown
from bgjob.ext.web.views import Chip, DeadFacts, DeadJobPage, DeadPage, GroupPage
from bgjob.ext.web.visit import Visit, tried
from bgjob.job import DeadJob
from bgjob.stats import CappedCount
from bgjob.triage import DeadGroup

_LATEST = 20
"""Jobs of a group on its page."""

MOST_REPLAYED = 10_000
"""More than that a page does not requeue or purge: then it shows the command."""


async def dead(visit: Visit) -> DeadPage:
    """Return the groups of dead jobs, and a page of the single ones."""
    given = {name: visit.field(name) for name in ("queue", "type", "error")}
    given = {name: value for name, value in given.items() if value}
    queue, type_, error = (given.get(name, "") for name in ("queue", "type", "error"))
    chips = tuple(
        Chip(name, value, path("dead", **{n: v for n, v in given.items() if n != name}))
        for name, value in given.items()
    )
    page = DeadPage(queue, type_, error, chips)
    if visit.wants("groups"):
        page = replace(page, groups=await tried(groups(visit, queue or None, type_ or None)))
    if visit.part is not None:
        return page
    before = visit.field("before")
    if before and not (before.isascii() and before.isdecimal() and len(before) < 19):  # noqa: PLR2004
        raise HTTPException(400, "before must be the number of a dead job.")
    found = await tried(
        visit.site.reader.read(
            statements.dead_list(
                int(before) if before else None,
                queue=queue or None,
                type_=type_ or None,
                error=error or None,
            )
        )
    )
    if isinstance(found, Trouble):
        return replace(page, latest=found)
    last = _last(found)
    fields = (*given.items(),)
    return replace(
        page,
        latest=dead_rows(found.found[: statements.SHOWN], visit.site.redaction),
        older=path("dead", **given, before=last) if last is not None else None,
        first=path("dead", **given) if before else None,
        buttons=(
            Button(
                "Requeue all of these",
                path("dead", "requeue"),
                "requeue",
                fields,
                is_confirmed=True,
            ),
            Button(
                "Purge all of these",
                path("dead", "purge"),
                "purge",
                fields,
                is_dangerous=True,
                is_confirmed=True,
            ),
        )
        if given and found.found
        else (),
    )


def _last(found: DeadStep) -> int | None:
    """Return the number before which the next page begins; None on the last."""
    if len(found.found) > statements.SHOWN:
        return found.found[statements.SHOWN - 1].number
    return found.last if found.looked == statements.LOOKED else None


async def groups(
    visit: Visit, queue: str | None = None, type_: str | None = None, *, limit: int = 50
) -> tuple[GroupRow, ...]:
    """Return groups of dead jobs, the largest first."""

    async def ask() -> list[DeadGroup]:
        return await visit.site.reader.dlq.groups(limit=limit, queue=queue, type=type_)

    found = await visit.site.keep(("groups", queue, type_, limit), ask)
    hours = await _hours(visit, found)
    return tuple(_group_row(group, visit, hours.get(group.fingerprint)) for group in found)


async def _hours(visit: Visit, groups: list[DeadGroup]) -> Mapping[str, tuple[int, ...]]:
    """Return how many jobs of groups died in each of the last 24 hours, if that can be told."""
    numbers = {number_of(group.fingerprint): group.fingerprint for group in groups}
    key = ("hours", *sorted(numbers))
    statement = statements.hours_of([*numbers])
    found = await tried(visit.site.keep(key, lambda: visit.site.reader.read(statement)))
    if isinstance(found, Trouble):
        return {}
    return {numbers[number]: hours for number, hours in found.items()}


def _group_row(group: DeadGroup, visit: Visit, hours: tuple[int, ...] | None) -> GroupRow:
    shown = Shown(group.id, next(iter(group.queues), ""), group.type, None, group.error)
    redaction = visit.site.redaction
    error = redaction.error(shown)
    if error == group.error:
        error = group.title
    return GroupRow(
        group.fingerprint,
        CappedCount(group.jobs, is_exact=True),
        group.queues,
        group.type,
        brief(error) or "",
        group.first,
        group.last,
        hours,
    )


async def group(visit: Visit) -> GroupPage:
    """Return the page of a group."""
    fingerprint: str = visit.request.path_params["fingerprint"]
    replays, redaction = visit.site.replays, visit.site.redaction
    canary = replays.canary(fingerprint)
    if canary is not None and canary.error:
        shown = Shown(canary.id, canary.queue, canary.type, None, canary.error)
        canary = replace(canary, error=redaction.error(shown))
    page = GroupPage(fingerprint, canary=canary, rest=replays.rest(fingerprint))
    found = await tried(_group(visit, fingerprint))
    if isinstance(found, Trouble):
        return replace(page, group=found)
    if found is not None:
        hours = await _hours(visit, [found])
        page = replace(page, group=_group_row(found, visit, hours.get(fingerprint)))
        if found.jobs > MOST_REPLAYED:
            page = replace(page, command=f"bgjob triage {fingerprint} --rest")
        shown = Shown(found.id, next(iter(found.queues), ""), found.type, None, found.error)
        page = replace(page, sample=redaction.whole_error(shown))
    if visit.part is not None:
        return page
    latest = await tried(_latest(visit, fingerprint))
    if isinstance(latest, Trouble):
        return replace(page, latest=latest)
    return replace(
        page,
        latest=dead_rows(latest, redaction),
        died_on=await _died_on(visit, [job.worker for job in latest]),
    )


async def _group(visit: Visit, fingerprint: str) -> DeadGroup | None:
    async def ask() -> list[DeadGroup]:
        return await visit.site.reader.dlq.groups(fingerprint=fingerprint, limit=1)

    try:
        found = await visit.site.keep(("group", fingerprint), ask)
    except ValueError as error:
        raise HTTPException(404, str(error)) from None
    return found[0] if found else None


async def _latest(visit: Visit, fingerprint: str) -> list[DeadListed]:
    statement = statements.latest_of(number_of(fingerprint), limit=_LATEST)
    return await visit.site.reader.read(statement)


async def _died_on(visit: Visit, workers: list[int | None]) -> tuple[DiedOn, ...]:
    known = await tried(visit.site.workers())
    return (*died_on(workers, [] if isinstance(known, Trouble) else known),)


async def dead_job(visit: Visit) -> DeadJobPage:
    """Return the page of a dead job."""
    number = number_in(visit, "number")
    job = await dead_of_number(visit, number)
    live = await tried(visit.site.reader.jobs.get(job.id))
    redaction = visit.site.redaction
    shown = Shown(job.id, job.queue, job.type, job.arg, job.last_error)
    fields = (("numbers", str(number)),)
    may_reveal, revealed = "payloads" in visit.can, await is_revealed(visit, job.id)
    at = path("dead", number)
    payload = redaction.payload(shown, may_reveal=may_reveal, is_revealed=revealed, at=at)
    headers = redaction.headers(
        replace(shown, headers=job.headers), may_reveal=may_reveal, is_revealed=revealed, at=at
    )
    checkpoint = redaction.checkpoint(
        shown, job.checkpoint, may_reveal=may_reveal, is_revealed=revealed, at=at
    )
    return DeadJobPage(
        DeadFacts(
            number,
            job.id,
            job.queue,
            job.type,
            job.priority,
            job.attempt,
            job.exclusive,
            job.created_at,
            job.next_run_at,
            job.expires,
            job.updated_at,
            job.moved_at,
            job.fingerprint,
            next(iter(await _died_on(visit, [job.worker])), None),
            job.group,
        ),
        payload,
        headers,
        checkpoint,
        redaction.whole_error(shown),
        visit.site.trace_of(replace(shown, headers=job.headers)),
        live is not None and not isinstance(live, Trouble),
        (
            Button("Requeue", path("dead", "requeue"), "requeue", fields),
            Button(
                "Purge",
                path("dead", "purge"),
                "purge",
                fields,
                is_dangerous=True,
                is_confirmed=True,
            ),
        ),
    )


async def dead_of_number(visit: Visit, number: int) -> DeadJob:
    """Return a dead job; raise 404 if it is not there any more."""
    found = await visit.site.reader.dlq.list(numbers=[number], limit=1)
    if not found:
        raise HTTPException(404, f"There is no dead job {number}: it was requeued or purged.")
    return found[0]
