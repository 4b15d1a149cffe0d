"""Try one dead job of a group again, then the rest."""

from starlette.exceptions import HTTPException

from bgjob._sql import pages as statements
from bgjob._sql.dead import DeadFilter, number_of
from bgjob._words import count
from bgjob.errors import CanaryRefusedError
from bgjob.ext.web.actions.action import Answer, action
from bgjob.ext.web.actions.dead import is_confirmed, too_many
from bgjob.ext.web.form import Form
from bgjob.ext.web.frame import path
from bgjob.ext.web.pages.dead import MOST_REPLAYED
from bgjob.ext.web.views import ConfirmPage, Done
from bgjob.ext.web.visit import Visit

_RATE = 100.0
_STOP_AFTER = 5
_MOST_RATE = 10_000


@action("requeue", "canary")
async def canary(visit: Visit, form: Form) -> Answer:
    """Put the latest job of a group back, and watch it from then on."""
    fingerprint = _fingerprint(visit)
    is_forced = bool(form.text("force"))
    try:
        found = await visit.site.replays.start_canary(
            fingerprint, force=is_forced, by=visit.access.user or None
        )
    except CanaryRefusedError as error:
        if is_forced or not await _has_jobs(visit, fingerprint):
            return Done(str(error), 0, (fingerprint,))
        return ConfirmPage(
            "Put one back although nothing would run it?",
            f"{error}.",
            path("dead", "groups", fingerprint, "canary"),
            (("force", "yes"), ("next", form.back)),
            "Put one back",
            visit.back(form.back),
            is_dangerous=False,
        )
    return Done(f"Job {found.id} is back in queue {found.queue}.", 1, (fingerprint, found.id))


@action("requeue", "rest")
async def rest(visit: Visit, form: Form) -> Answer:
    """Put the rest of a group back, once that is confirmed with its number."""
    fingerprint = _fingerprint(visit)
    if visit.site.replays.is_running(fingerprint):
        return Done("The rest of this group is on its way already.", 0, (fingerprint,))
    rate = form.number("rate", _RATE)
    stop_after = form.integer("stop_after", _STOP_AFTER)
    if not 0 < rate <= _MOST_RATE or stop_after < 0:
        raise HTTPException(
            400, f"rate must be above 0 and at most {_MOST_RATE:,}, and stop_after from 0."
        )
    reader = visit.site.reader
    upto = form.integer("upto", 0) or await reader.read(statements.last_dead())
    where = DeadFilter(fingerprint=number_of(fingerprint), upto=upto)
    found = await reader.read(statements.count_dead(where, most=MOST_REPLAYED + 1))
    if found > MOST_REPLAYED:
        raise too_many(f"bgjob triage {fingerprint} --rest")
    if not found:
        return Done("Nothing of this group is dead any more.", 0, (fingerprint,))
    expected = form.integer("expect", -1)
    if not is_confirmed(expected, found):
        changed = "" if expected < 0 else f" It was {count(expected, 'job')} when you were asked."
        return ConfirmPage(
            f"Put {count(found, 'dead job')} back?",
            f"{rate:g} a second go back to their queues, and it stops when more than "
            f"{stop_after:,} died again. That takes about {found / rate:,.0f} s.{changed}",
            path("dead", "groups", fingerprint, "rest"),
            (
                ("rate", f"{rate:g}"),
                ("stop_after", str(stop_after)),
                ("upto", str(upto)),
                ("expect", str(found)),
                ("next", form.back),
            ),
            f"Put {count(found, 'job')} back",
            visit.back(form.back),
            is_dangerous=False,
        )
    visit.site.replays.start_rest(
        fingerprint,
        upto=upto,
        total=found,
        rate=rate,
        stop_after=stop_after,
        by=visit.access.user or None,
    )
    return Done(f"{count(found, 'job')} of the group go back.", found, (fingerprint,))


@action("requeue", "stop")
async def stop(visit: Visit, form: Form) -> Answer:  # noqa: ARG001 (it has no fields)
    """Stop putting the rest back."""
    fingerprint = _fingerprint(visit)
    if not await visit.site.replays.stop(fingerprint):
        return Done("Nothing of this group is on its way.", 0, (fingerprint,))
    rest = visit.site.replays.rest(fingerprint)
    back = rest.back if rest is not None else 0
    return Done(f"Stopped: {count(back, 'job')} went back.", 1, (fingerprint,))


def _fingerprint(visit: Visit) -> str:
    fingerprint: str = visit.request.path_params["fingerprint"]
    try:
        number_of(fingerprint)
    except ValueError as error:
        raise HTTPException(404, str(error)) from None
    return fingerprint


async def _has_jobs(visit: Visit, fingerprint: str) -> bool:
    where = DeadFilter(fingerprint=number_of(fingerprint))
    return bool(await visit.site.reader.read(statements.count_dead(where, most=1)))
