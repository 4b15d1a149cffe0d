"""Set and remove limits of queues and types."""

from starlette.exceptions import HTTPException

from bgjob.ext.web.actions.action import Answer, action
from bgjob.ext.web.form import Form
from bgjob.ext.web.views import Done
from bgjob.ext.web.visit import Visit
from bgjob.limit import Limit


@action("limits", "set limit")
async def set_limit(visit: Visit, form: Form) -> Answer:
    """Set the limit of a queue or a type; without a number and a rate, that it has none."""
    limits = visit.site.writer.limits
    name, scope = form.needed("name"), _scope(form)
    try:
        limit = Limit(
            _number(form, "concurrency"), form.text("rate") or None, _number(form, "burst")
        )
        await (limits.set_type if scope == "type" else limits.set)(name, limit)
    except ValueError as error:
        raise HTTPException(400, f"{error}.") from None
    return Done(f"{scope.capitalize()} {name} is limited: {limit}.", 1, (scope, name, str(limit)))


@action("limits", "remove limit")
async def remove_limit(visit: Visit, form: Form) -> Answer:
    """Remove a limit that was set."""
    limits = visit.site.writer.limits
    name, scope = form.needed("name"), _scope(form)
    try:
        was_set = await (limits.remove_type if scope == "type" else limits.remove)(name)
    except ValueError as error:
        raise HTTPException(400, f"{error}.") from None
    if was_set:
        return Done(f"The limit of {scope} {name} is removed.", 1, (scope, name))
    return Done(f"{scope.capitalize()} {name} had no limit that was set.", 0, (scope, name))


def _scope(form: Form) -> str:
    scope = form.needed("scope")
    if scope not in {"queue", "type"}:
        raise HTTPException(400, f"scope must be queue or type, not {scope!r}.")
    return scope


def _number(form: Form, name: str) -> int | None:
    return form.integer(name) if form.text(name) else None
