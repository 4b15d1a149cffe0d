"""Cancel, hasten and reorder a live job."""

from bgjob.ext.web.actions.action import Answer, action
from bgjob.ext.web.form import Form
from bgjob.ext.web.frame import path
from bgjob.ext.web.views import ConfirmPage, Done
from bgjob.ext.web.visit import Visit
from bgjob.jobs import JobChanges, Unchanged

_WHY: dict[Unchanged, str] = {
    "absent": "it is not there any more: it was completed or purged",
    "dead": "it is in the dead-letter table already",
    "running": "a worker has it",
    "waiting": "no worker has it",
    "due": "it is due already",
    "same": "it has that priority already",
    "locked": "another transaction has locked it: try again",
    "unmatched": "it has changed meanwhile",
}


@action("jobs", "cancel")
async def cancel(visit: Visit, form: Form) -> Answer:
    """Cancel a job, waiting or running; asks for the reason."""
    id_, reason = visit.name("id"), form.text("reason")
    if not reason:
        return _question(
            visit,
            form,
            "cancel",
            f"Cancel job {id_}?",
            "It moves to the dead-letter table, from which it can be requeued. If it runs, its "
            "worker is told, and nothing that it does from now on counts.",
            "Cancel the job",
        )
    found = await visit.site.writer.jobs.cancel(id_, reason=reason, by=visit.access.user or None)
    was = "while it was running" if found.running else "before it ran"
    return _done(id_, found, f"Job {id_} was cancelled {was}.", "not cancelled")


@action("abandon", "abandon")
async def abandon(visit: Visit, form: Form) -> Answer:
    """Give up a running job; asks for the reason."""
    id_, reason = visit.name("id"), form.text("reason")
    if not reason:
        return _question(
            visit,
            form,
            "abandon",
            f"Abandon job {id_}?",
            "It moves to the dead-letter table. Its handler is not interrupted and runs on, "
            "but its result counts for nothing; its exclusive key is free immediately.",
            "Abandon the job",
        )
    found = await visit.site.writer.jobs.abandon(id_, reason=reason, by=visit.access.user or None)
    return _done(id_, found, f"Job {id_} is abandoned.", "not abandoned")


@action("jobs", "run now")
async def now(visit: Visit, form: Form) -> Answer:  # noqa: ARG001 (it has no fields)
    """Make a delayed job due."""
    id_ = visit.name("id")
    found = await visit.site.writer.jobs.run_now(id_)
    return _done(id_, found, f"Job {id_} is due now.", "not changed")


@action("jobs", "priority")
async def priority(visit: Visit, form: Form) -> Answer:
    """Change the priority of a job that waits."""
    id_, number = visit.name("id"), form.integer("priority")
    found = await visit.site.writer.jobs.set_priority(id_, priority=number)
    return _done(id_, found, f"Job {id_} has priority {number}.", "not changed")


def _done(id_: str, found: JobChanges, text: str, failure: str) -> Done:
    if found.changed:
        return Done(text, 1, (id_,))
    return Done(f"Job {id_} was {failure}: {_WHY[found.unchanged[id_]]}.", 0, (id_,))


def _question(
    visit: Visit, form: Form, name: str, title: str, text: str, button: str
) -> ConfirmPage:
    return ConfirmPage(
        title,
        text,
        path("jobs", visit.name("id"), name),
        (("next", form.back),),
        button,
        visit.back(form.back),
        asks=("reason",),
    )
