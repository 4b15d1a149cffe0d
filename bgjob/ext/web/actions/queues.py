"""Pause and resume queues; run, pause, resume and remove schedules."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC

from starlette.exceptions import HTTPException

from bgjob.errors import UnknownScheduleError
from bgjob.ext.web.actions.action import Answer, action
from bgjob.ext.web.form import Form
from bgjob.ext.web.frame import path
from bgjob.ext.web.views import ConfirmPage, Done
from bgjob.ext.web.visit import Visit


@action("pause", "pause")
async def pause(visit: Visit, form: Form) -> Answer:
    """Pause a queue, for a while or until it is resumed."""
    queue = visit.name("queue")
    until = form.until()
    await visit.site.writer.pause(queue, until)
    end = "" if until is None else f" until {until.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return Done(f"Queue {queue} is paused{end}.", 1, (queue,))


@action("pause", "resume")
async def resume(visit: Visit, form: Form) -> Answer:  # noqa: ARG001 (it has no fields)
    """Resume a queue."""
    queue = visit.name("queue")
    if await visit.site.writer.resume(queue):
        return Done(f"Queue {queue} is resumed.", 1, (queue,))
    return Done(f"Queue {queue} was not paused.", 0, (queue,))


@action("schedules", "run")
async def run(visit: Visit, form: Form) -> Answer:  # noqa: ARG001
    """Enqueue a schedule's job once."""
    name = visit.name("name")
    with _known():
        id_ = await visit.site.writer.schedules.run(name)
    return Done(f"Schedule {name} runs once: job {id_}.", 1, (name, id_))


@action("schedules", "pause schedule")
async def pause_schedule(visit: Visit, form: Form) -> Answer:  # noqa: ARG001
    """Pause a schedule."""
    name = visit.name("name")
    with _known():
        await visit.site.writer.schedules.pause(name)
    return Done(f"Schedule {name} is paused.", 1, (name,))


@action("schedules", "resume schedule")
async def resume_schedule(visit: Visit, form: Form) -> Answer:  # noqa: ARG001
    """Resume a schedule."""
    name = visit.name("name")
    with _known():
        await visit.site.writer.schedules.resume(name)
    return Done(f"Schedule {name} is resumed.", 1, (name,))


@action("schedules", "remove schedule")
async def remove(visit: Visit, form: Form) -> Answer:
    """Remove a schedule, once that is confirmed."""
    name = visit.name("name")
    if not form.text("sure"):
        return ConfirmPage(
            f"Remove schedule {name}?",
            "It is for a schedule that no worker has any more. If one has it, the schedule "
            "is written again when that worker starts.",
            path("schedules", name, "remove"),
            (("sure", "yes"), ("next", form.back)),
            f"Remove {name}",
            visit.back(form.back),
        )
    with _known():
        await visit.site.writer.schedules.remove(name)
    return Done(f"Schedule {name} is removed.", 1, (name,))


@contextmanager
def _known() -> Iterator[None]:
    """Answer 404 for a schedule that does not exist."""
    try:
        yield
    except UnknownScheduleError as error:
        raise HTTPException(404, str(error)) from None
