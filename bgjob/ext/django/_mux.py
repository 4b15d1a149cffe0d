"""The handlers of all apps, on one Mux."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from django.conf import settings
from django.utils.module_loading import autodiscover_modules, import_string

from bgjob._handlers.call import is_coroutine
from bgjob.ext.django._connections import tidy_connections
from bgjob.ext.django._settings import options
from bgjob.mux import Mux


def _chosen(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler in BGJOB['MIDDLEWARE'], the first outermost.

    With the first job: a handler may be registered before the apps are loaded.
    """
    if not getattr(settings, "BGJOB", {}).get("MIDDLEWARE"):
        return handler

    @cache
    def wrapped() -> Callable[..., Any]:
        call = handler
        for path in reversed(options().middleware):
            call = import_string(path)(call)
        return call

    if is_coroutine(handler):

        @wraps(handler)
        async def awaited(*args: Any) -> Any:
            return await wrapped()(*args)

        return awaited

    @wraps(handler)
    def called(*args: Any) -> Any:
        return wrapped()(*args)

    return called


mux = Mux(middleware=[tidy_connections, _chosen])
"""The handlers that `manage.py bgjob worker` runs. Register them in a module `jobs` of an app:

    from bgjob.ext.django import mux

    @mux.handler("confirm")
    def confirm(job: Job) -> None: ...
"""


def autodiscover() -> None:
    """Import the modules `jobs` of the installed apps, which register their handlers on `mux`.

    And the modules `tasks`, if a backend of TASKS is bgjob's.
    """
    autodiscover_modules("jobs")
    if task_queues() is not None:
        autodiscover_modules("tasks")


def task_queues() -> list[str] | None:
    """Return the queues of bgjob's backends in TASKS; None if there is no such backend."""
    queues: list[str] | None = None
    for given in getattr(settings, "TASKS", {}).values():
        classes = import_string(given["BACKEND"]).__mro__
        if any(each.__module__ == f"{__package__}.task_backend" for each in classes):
            queues = [*(queues or ()), *given.get("QUEUES", ["default"])]
    return queues
