"""Django: an app with the tables, jobs in `transaction.atomic`, `manage.py bgjob`, an admin.

    INSTALLED_APPS = [..., "bgjob.ext.django"]  # then: manage.py migrate

    with transaction.atomic():
        order = Order.objects.create()
        enqueue(EnqueueRequest("mail", "confirm", {"order": order.pk}))

Needs `bgjob[django]`: Django 5.2 or later, on PostgreSQL.

Who does what: `_enqueues` writes jobs on Django's connections, `task_backend` Django's tasks as
jobs. `_database` has what libpq needs of settings.DATABASES. `_mux` has the handlers of all apps,
`_connections` what is done around each job, `_orm` queries in the job's transaction, `_settings`
the setting BGJOB, and `worker` what `manage.py bgjob worker` runs. The other modules belong to
Django, which imports them by their names: `admin`, `apps`, `checks`, `management`, `migrations`,
`models`.
"""

from bgjob.ext.django._connections import tidy_connections
from bgjob.ext.django._database import dsn
from bgjob.ext.django._enqueues import abulk_enqueue, aenqueue, bulk_enqueue, enqueue
from bgjob.ext.django._mux import autodiscover, mux
from bgjob.ext.django._orm import orm_of

__all__ = [
    "abulk_enqueue",
    "aenqueue",
    "autodiscover",
    "bulk_enqueue",
    "dsn",
    "enqueue",
    "mux",
    "orm_of",
    "tidy_connections",
]
