"""The tables of schema version 1.

Of the models, which are unmanaged, it notes what `makemigrations` compares: not their fields.
"""

from typing import Any, ClassVar

from django.db import migrations, models

from bgjob.ext.django._schema import ApplySchema


def _model(name: str, table: str, key: tuple[str, Any], **options: Any) -> migrations.CreateModel:
    unmanaged = {"managed": False, "default_permissions": ("view",)}
    return migrations.CreateModel(name, [key], {"db_table": table, **unmanaged, **options})


class Migration(migrations.Migration):
    """Applies init.sql."""

    initial = True
    operations: ClassVar[list[Any]] = [
        ApplySchema(
            [
                _model(
                    "Job",
                    "bgjob_job",
                    ("id", models.CharField(max_length=255, primary_key=True)),
                    verbose_name="job",
                    verbose_name_plural="jobs",
                ),
                _model(
                    "DeadJob",
                    "bgjob_dead_job",
                    ("id", models.BigIntegerField(primary_key=True)),
                    permissions=[("requeue_deadjob", "Can requeue dead jobs")],
                    verbose_name="dead job",
                    verbose_name_plural="dead jobs",
                ),
                _model(
                    "Schedule",
                    "bgjob_schedule",
                    ("name", models.TextField(primary_key=True)),
                    verbose_name="schedule",
                    verbose_name_plural="schedules",
                ),
                _model(
                    "Queue",
                    "bgjob_queue",
                    ("name", models.TextField(primary_key=True)),
                    permissions=[("pause_queue", "Can pause and resume queues")],
                    verbose_name="queue",
                    verbose_name_plural="queues",
                ),
            ]
        )
    ]
