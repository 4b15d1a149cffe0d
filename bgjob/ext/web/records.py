"""Permissions are checked, and actions recorded."""

import logging
from inspect import isawaitable

from starlette.exceptions import HTTPException

from bgjob.ext.web.frame import Permission
from bgjob.ext.web.views import Done
from bgjob.ext.web.visit import Visit, database_of

_logger = logging.getLogger("bgjob.web")


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
    database = database_of(visit.request)
    _logger.info(
        "%s: %s",
        f"{user or 'anyone'} in {database}" if database else user or "anyone",
        done.done,
        extra={
            "web_user": user,
            "web_action": name,
            "web_targets": done.targets,
            **({"web_database": database} if database else {}),
        },
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


async def is_revealed(visit: Visit, id_: str) -> bool:
    """Whether the user asks to see the masked values of a payload, and may; that is recorded."""
    if visit.field("payload") != "show" or "payloads" not in visit.can:
        return False
    if visit.site.redaction.payloads == "mask":
        await record(visit, "show payload", Done(f"the payload of job {id_} was shown", 1, (id_,)))
    return True
