"""The worker of `manage.py bgjob worker`."""

import os
from copy import copy
from functools import partial

import django
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured

from bgjob.client import Client
from bgjob.ext.django._database import checked
from bgjob.ext.django._database import dsn as dsn_of
from bgjob.ext.django._mux import autodiscover, mux, task_queues
from bgjob.ext.django._settings import imported, options
from bgjob.mux import Mux
from bgjob.worker import Worker

__all__ = ["DATABASE", "worker"]

DATABASE = "BGJOB_DJANGO_DATABASE"
"""The variable with the alias of the database, for the processes of `--processes`."""


def worker(
    dsn: str | None = None, queues: dict[str, int] | None = None, concurrency: int | None = None
) -> Worker:
    """Make a worker with the handlers of all apps, and what the setting BGJOB says.

    Args:
        dsn: the database; that of settings.DATABASES by default, which is read at each connect.
        queues: the queues with their slots; BGJOB["QUEUES"] by default, or without it those of
            bgjob's backends in TASKS.
        concurrency: the slots of a queue of BGJOB["QUEUES"] without a number;
            BGJOB["CONCURRENCY"] by default.

    Raises:
        ImproperlyConfigured: the setting is wrong, or no queue is named.

    """
    if not apps.ready:
        django.setup()
    chosen = options()
    autodiscover()
    if queues is None:
        each = concurrency or chosen.concurrency
        named = chosen.queues or dict.fromkeys(task_queues() or ())
        queues = {queue: slots or each for queue, slots in named.items()}
    if not queues:
        raise ImproperlyConfigured(
            "no queue is named: set BGJOB = {'QUEUES': ['default']}, or pass --queue"
        )
    using = os.environ.get(DATABASE, "default")
    client = Client(partial(dsn_of, checked(using).alias) if dsn is None else dsn)
    given = {name: imported(value) for name, value in chosen.worker.items() if name != "release"}
    if "release" in chosen.worker:
        given["release"] = chosen.worker["release"]
    handlers = mux
    if chosen.unknown_for:
        handlers = copy(mux)
        handlers._unknown = Mux(unknown_for=chosen.unknown_for)._unknown  # noqa: SLF001
    return Worker(client, queues, handlers, grace=chosen.grace, **given)
