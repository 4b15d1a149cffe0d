"""Django: an app with the tables, jobs in `transaction.atomic`, `manage.py bgjob`, an admin.

    INSTALLED_APPS = [..., "bgjob.ext.django"]  # then: manage.py migrate

    with transaction.atomic():
        order = Order.objects.create()
        enqueue(EnqueueRequest("mail", "confirm", {"order": order.pk}))

Needs `bgjob[django]`: Django 5.2 or later, on PostgreSQL.

Who does what: `_enqueues` writes jobs on Django's connections. `_database` has what libpq needs of
settings.DATABASES. The other modules belong to Django, which imports them by their names: `apps`,
`migrations`, `models`.
"""

from bgjob.ext.django._database import dsn
from bgjob.ext.django._enqueues import abulk_enqueue, aenqueue, bulk_enqueue, enqueue

__all__ = ["abulk_enqueue", "aenqueue", "bulk_enqueue", "dsn", "enqueue"]
