"""The handlers of all apps, on one Mux."""

from collections.abc import Callable
from typing import Any

from django.utils.module_loading import autodiscover_modules, import_string

from bgjob.ext.django._connections import tidy_connections
from bgjob.ext.django._settings import options
from bgjob.mux import Mux


def _chosen(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler in BGJOB['MIDDLEWARE'], the first outermost."""
    for path in reversed(options().middleware):
        handler = import_string(path)(handler)
    return handler


mux = Mux(middleware=[tidy_connections, _chosen])
"""The handlers that `manage.py bgjob worker` runs. Register them in a module `jobs` of an app:

    from bgjob.ext.django import mux

    @mux.handler("confirm")
    def confirm(job: Job) -> None: ...
"""


def autodiscover() -> None:
    """Import the modules `jobs` of the installed apps, which register their handlers on `mux`."""
    autodiscover_modules("jobs")
