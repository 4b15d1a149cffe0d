"""The only way to an action: it checks the permission, does it, and records it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from typing import TypeAlias

from bgjob.ext.web.form import Form
from bgjob.ext.web.frame import Permission
from bgjob.ext.web.records import check, record
from bgjob.ext.web.views import ConfirmPage, Done
from bgjob.ext.web.visit import Visit

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
