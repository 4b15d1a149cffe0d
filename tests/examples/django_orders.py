import os

import django
import psycopg
from django.conf import settings
from django.core.management import call_command
from django.db import connection, models, transaction
from psycopg.conninfo import conninfo_to_dict

from bgjob import Client, EnqueueRequest, Job
from bgjob.ext.django import dsn, enqueue, mux, orm_of

given = conninfo_to_dict(os.environ["DATABASE_URL"])
settings.configure(  # settings.py
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": given["dbname"],
            "USER": given["user"],
            "HOST": given["host"],
            "PORT": given["port"],
        }
    },
    INSTALLED_APPS=["bgjob.ext.django"],
    BGJOB={"QUEUES": {"mail": 4}},
)
django.setup()


class Order(models.Model):  # models.py
    confirmed = models.BooleanField(default=False)

    class Meta:
        app_label = "shop"


@mux.handler("confirm")  # jobs.py
def confirm(job: Job) -> None:
    Order.objects.filter(pk=job.json()["order"]).update(confirmed=True)


@mux.handler("thank", transactional=True)
def thank(job: Job, conn: psycopg.Connection) -> None:
    with orm_of(conn):  # commits with the job
        Order.objects.filter(pk=job.json()["order"]).delete()


call_command("migrate", "bgjob", fake=True, verbosity=0)  # this database has the tables already
with connection.schema_editor() as editor:
    editor.create_model(Order)

with transaction.atomic():  # views.py
    order = Order.objects.create()
    enqueue(EnqueueRequest("mail", "confirm", {"order": order.pk}))
    enqueue(EnqueueRequest("mail", "thank", {"order": order.pk}))

with Client(dsn()) as client:  # manage.py bgjob worker
    client.do("mail", mux)
    print("confirmed:", Order.objects.get().confirmed)
    client.do("mail", mux)
    print("orders:", Order.objects.count())
connection.close()
