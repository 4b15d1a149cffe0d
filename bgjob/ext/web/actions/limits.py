"""Set and remove limits of queues and types."""

from starlette.exceptions import HTTPException

from bgjob.ext.web.actions.action import Answer, action
from bgjob.ext.web.form import Form
from bgjob.ext.web.views import Done
from bgjob.ext.web.visit import Visit
from bgjob.limit import Limit, Scope


@action("limits", "set limit")
async def set_limit(visit: Visit, form: Form) -> Answer:
    """Set the limit of a queue or a type; without a number and a rate, that it has none."""
    name, scope = form.needed("name"), _scope(form)
    try:
        limit = Limit(
            _number(form, "concurrency"), form.text("rate") or None, _number(form, "burst")
        )
        await visit.site.writer.limits.set(scope, name, limit)
    except ValueError as error:
        raise HTTPException(400, f"{error}.") from None
    return Done(f"{scope.capitalize()} {name} is limited: {limit}.", 1, (scope, name, str(limit)))


@action("limits", "remove limit")
async def remove_limit(visit: Visit, form: Form) -> Answer:
    """Remove a limit that was set."""
    name, scope = form.needed("name"), _scope(form)
    try:
        was_set = await visit.site.writer.limits.remove(scope, name)
    except ValueError as error:
        raise HTTPException(400, f"{error}.") from None
    if was_set:
        return Done(f"The limit of {scope} {name} is removed.", 1, (scope, name))
    return Done(f"{scope.capitalize()} {name} had no limit that was set.", 0, (scope, name))


def _scope(form: Form) -> Scope:
    match form.needed("scope"):
        case "queue" | "type" as scope:
            return scope
        case other:
            raise HTTPException(400, f"scope must be queue or type, not {other!r}.")


def _number(form: Form, name: str) -> int | None:
    return form.integer(name) if form.text(name) else None
