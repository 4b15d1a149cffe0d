"""The only way to an action: it checks the permission, does it, and records it."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from inspect import isawaitable
from typing import TypeAlias

from starlette.exceptions import HTTPException

from bgjob.ext.web.form import Form
from bgjob.ext.web.frame import Permission
from bgjob.ext.web.views import ConfirmPage, Done
from bgjob.ext.web.visit import Visit

_logger = logging.getLogger("bgjob.web")

Answer: TypeAlias = Done | ConfirmPage
Act: TypeAlias = Callable[[Visit, Form], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Action:
    """An action, with the permission that it needs."""

    name: str
    permission: Permission
    run: Act


def action(permission: Permission, name: str) -> Callable[[Act], Action]:
    """Make an action of a function.

    Args:
        permission: what the user needs for it; without it the answer is 403.
        name: the action's name, for the log and `on_action`.

    """

    def wrap(act: Act) -> Action:
        @wraps(act)
        async def run(visit: Visit, form: Form) -> Answer:
            check(visit, permission)
            answer = await act(visit, form)
            if isinstance(answer, Done):
                visit.site.kept.forget()
                await record(visit, name, answer)
            return answer

        return Action(name, permission, run)

    return wrap


def check(visit: Visit, permission: Permission) -> None:
    """Raise 403 unless the user has a permission, and things can be changed here."""
    if permission in visit.can:
        return
    if permission in visit.access.permissions:
        raise HTTPException(403, "Nothing can be changed here: this page is read-only.")
    raise HTTPException(403, f"You need the permission {permission!r} for this.")


def check_reading(visit: Visit, permission: Permission) -> None:
    """Raise 403 unless the user has a permission that changes nothing."""
    if permission not in visit.can:
        raise HTTPException(403, f"You need the permission {permission!r} for this.")


async def record(visit: Visit, name: str, done: Done) -> None:
    """Log an action, and tell the program that the page belongs to."""
    user = visit.access.user
    _logger.info(
        "%s: %s",
        user or "anyone",
        done.done,
        extra={"web_user": user, "web_action": name, "web_targets": done.targets},
    )
    on_action = visit.site.settings.on_action
    if on_action is None:
        return
    try:
        told = on_action(user, name, done.targets, done.count)
        if isawaitable(told):
            await told
    except Exception:  # the action is done, and cannot be undone
        _logger.exception("on_action raised for %s", name)
