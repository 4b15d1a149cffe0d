"""Requeue and purge dead jobs, by number or by filter."""

from typing import Any, cast

from starlette.exceptions import HTTPException

from bgjob._explanation.words import option
from bgjob._sql import pages as statements
from bgjob._sql.dead import DeadFilter, number_of
from bgjob._words import count
from bgjob.dlq import DeadFilters
from bgjob.ext.web.actions.action import Answer, action
from bgjob.ext.web.form import Form
from bgjob.ext.web.frame import path
from bgjob.ext.web.pages.dead import MOST_REPLAYED
from bgjob.ext.web.views import ConfirmPage, Done
from bgjob.ext.web.visit import Visit

_TOLERANCE = 0.01
"""How many jobs more or fewer than confirmed there may be, as a part of them."""

_SAMPLE = 10


@action("requeue", "requeue")
async def requeue(visit: Visit, form: Form) -> Answer:
    """Requeue dead jobs: numbers immediately, those of a filter once that is confirmed."""
    numbers = form.numbers("numbers")
    if numbers:
        return _requeued(await visit.site.writer.dlq.requeue(numbers=numbers), numbers)
    filters, question = await _confirmed(visit, form, "requeue", "Requeue")
    if question is not None:
        return question
    ids = await visit.site.writer.dlq.requeue(**filters)
    return _requeued(ids, [])


def _requeued(ids: list[str], numbers: list[int]) -> Done:
    left = len(numbers) - len(ids)
    text = (
        f"{count(len(ids), 'job')} went back to {'its queue' if len(ids) == 1 else 'the queues'}."
    )
    if left > 0:
        text += f" {count(left, 'job')} stayed dead: gone meanwhile, or a live job has the id."
    return Done(text, len(ids), tuple(ids) or tuple(map(str, numbers)))


@action("purge", "purge")
async def purge(visit: Visit, form: Form) -> Answer:
    """Delete dead jobs permanently, once that is confirmed."""
    filters, question = await _confirmed(visit, form, "purge", "Purge")
    if question is not None:
        return question
    number = await visit.site.writer.dlq.purge(**filters)
    return Done(
        f"{count(number, 'dead job')} purged.",
        number,
        tuple(f"{name}={value}" for name, value in filters.items()),
    )


async def _confirmed(
    visit: Visit, form: Form, name: str, verb: str
) -> tuple[DeadFilters, ConfirmPage | None]:
    """Return the filters to act on, or the question to ask first.

    It is asked with the number of jobs, and the answer brings that number back (`expect`). What
    died after the question is left alone (`upto`).
    """
    numbers = form.numbers("numbers")
    filters: dict[str, Any] = {
        field: form.text(field)
        for field in ("queue", "type", "error", "fingerprint")
        if form.text(field)
    }
    if numbers:
        filters["numbers"] = numbers
    if not filters:
        raise HTTPException(
            400, "Select jobs (numbers), or give a filter: queue, type, error, fingerprint."
        )
    upto = form.integer("upto", 0) or await visit.site.reader.read(statements.last_dead())
    filters["upto"] = upto
    found = await visit.site.reader.read(
        statements.count_dead(_where(filters), most=MOST_REPLAYED + 1)
    )
    if found > MOST_REPLAYED:
        raise too_many(_command(name, filters))
    expected = form.integer("expect", -1)
    if is_confirmed(expected, found):
        return cast("DeadFilters", filters), None
    changed = "" if expected < 0 else f" It was {count(expected, 'job')} when you were asked first."
    fields = [(field, str(value)) for field, value in filters.items() if field != "numbers"] + [
        ("numbers", str(number)) for number in numbers
    ]
    is_purge = name == "purge"
    return cast("DeadFilters", filters), ConfirmPage(
        f"{verb} {count(found, 'dead job')}?",
        (
            "They are deleted permanently."
            if is_purge
            else "They are due immediately, and their attempts are counted from 0."
        )
        + changed,
        path("dead", name),
        (*fields, ("expect", str(found)), ("next", form.back)),
        f"{verb} {count(found, 'job')}",
        visit.back(form.back),
        is_dangerous=is_purge,
        sample=tuple(f"{field}: {value}" for field, value in fields if field != "upto")[:_SAMPLE],
    )


def is_confirmed(expected: int, found: int) -> bool:
    """Whether the number that was confirmed is about the number that there is."""
    return expected >= 0 and abs(found - expected) <= expected * _TOLERANCE


def too_many(command: str) -> HTTPException:
    """Return the refusal to act on too many jobs."""
    return HTTPException(
        409,
        f"These are more than {MOST_REPLAYED:,} jobs, which is too much for a page. From a shell: "
        f"{command}",
    )


def _where(filters: dict[str, Any]) -> DeadFilter:
    given = filters.copy()
    if "fingerprint" in given:
        try:
            given["fingerprint"] = number_of(given["fingerprint"])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
    return DeadFilter(**given)


def _command(name: str, filters: dict[str, Any]) -> str:
    given = [
        option(f"--{field}", str(value))
        for field, value in filters.items()
        if field not in {"numbers", "upto"}
    ]
    return " ".join([f"bgjob dlq {name}", *given])
