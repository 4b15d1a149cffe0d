"""The tables as models, to look at: for the admin, and for queries of a program's own.

They are unmanaged: the migration makes the tables from init.sql. Write through `enqueue`, the
admin's actions or a Client, and not through models: a save would undo what a worker does meanwhile.
Queue is no table, but what an overview of the queues tells.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from django.db import models
from django.db.models.sql import Query
from django.db.models.sql.datastructures import BaseTable
from django.utils.translation import gettext_lazy as _

from bgjob._sql.overviews import QUEUES
from bgjob._sql.statement import as_text, in_range_or_null

_NAME = 255


class Moment(models.DateTimeField):
    """A time that is brought into Python's range: a row may have been edited by hand."""

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:  # noqa: ARG002
        """Return the expression that is selected in place of the column."""
        return in_range_or_null(cast("Any", sql)), [*params, *params]


class Headers(models.JSONField):
    """A column of the type json, which psycopg would decode before Django does."""

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:  # noqa: ARG002
        """Return the expression that is selected in place of the column."""
        return as_text(cast("Any", sql)), params


class Job(models.Model):
    """A live job: one that waits, is delayed or runs."""

    id = models.CharField(max_length=_NAME, primary_key=True)
    queue = models.CharField(max_length=_NAME)
    type = models.CharField(max_length=_NAME)
    arg = models.BinaryField(_("payload"), null=True)
    headers = Headers(null=True)
    attempt = models.IntegerField()
    last_error = models.TextField(null=True)
    priority = models.SmallIntegerField()
    exclusive = models.CharField(_("exclusive key"), max_length=_NAME, null=True)
    slots = models.SmallIntegerField(_("slots of the key"), null=True)
    waits = models.BooleanField(_("waits for its key, or for the limit of its type"))
    limited = models.BooleanField(_("waits for the limit of its type"))
    next_run_at = Moment(_("due"))
    lease_until = Moment(null=True)
    expires = Moment(null=True)
    checkpoint = models.BinaryField(null=True)
    group_id = models.CharField(_("group"), max_length=_NAME, null=True)
    group_dead = models.IntegerField(_("dead of its group"), null=True)
    created_at = Moment(_("enqueued"))
    updated_at = Moment(_("updated"))

    class Meta:
        managed = False
        db_table = "bgjob_job"
        default_permissions = ("view",)
        verbose_name = _("job")
        verbose_name_plural = _("jobs")

    def __str__(self) -> str:
        return f"{self.type} {self.id}"


class DeadJob(models.Model):
    """A job in the dead-letter table."""

    id = models.BigIntegerField(_("number"), primary_key=True)
    job_id = models.TextField(_("job"))
    queue = models.TextField()
    type = models.TextField()
    arg = models.BinaryField(_("payload"), null=True)
    headers = Headers(null=True)
    attempt = models.IntegerField()
    last_error = models.TextField(null=True)
    priority = models.SmallIntegerField()
    exclusive = models.TextField(_("exclusive key"), null=True)
    slots = models.SmallIntegerField(_("slots of the key"), null=True)
    next_run_at = Moment(_("due"))
    expires = Moment(null=True)
    checkpoint = models.BinaryField(null=True)
    group_id = models.TextField(_("group"), null=True)
    group_dead = models.IntegerField(_("dead of its group"), null=True)
    job_created_at = Moment(_("enqueued"))
    job_updated_at = Moment(_("updated"))
    moved_at = Moment(_("died"))

    class Meta:
        managed = False
        db_table = "bgjob_dead_job"
        default_permissions = ("view",)
        permissions: ClassVar[Sequence[tuple[str, str]]] = [
            ("requeue_deadjob", "Can requeue dead jobs")
        ]
        verbose_name = _("dead job")
        verbose_name_plural = _("dead jobs")

    def __str__(self) -> str:
        return f"{self.type} {self.job_id}"


class Schedule(models.Model):
    """A schedule, which a worker wrote."""

    name = models.TextField(primary_key=True)
    spec = models.TextField()
    queue = models.TextField()
    type = models.TextField()
    priority = models.SmallIntegerField()
    last_run_at = Moment(_("last run"), null=True)
    last_job_id = models.TextField(_("last job"), null=True)
    next_run_at = Moment(_("next run"), null=True)
    paused = models.BooleanField()

    class Meta:
        managed = False
        db_table = "bgjob_schedule"
        default_permissions = ("view",)
        verbose_name = _("schedule")
        verbose_name_plural = _("schedules")

    def __str__(self) -> str:
        return str(self.name)


class _QueuesTable(BaseTable):
    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, list[Any]]:  # noqa: ARG002
        return f"({QUEUES}) {connection.ops.quote_name(self.table_alias)}", []


class _QueuesQuery(Query):
    base_table_class = _QueuesTable


class _Queues(models.Manager):
    def get_queryset(self) -> Any:
        return models.QuerySet(self.model, query=_QueuesQuery(self.model), using=self._db)


class Queue(models.Model):
    """A queue that has jobs, is paused, or lost a job within the last hour.

    Its numbers are counted up to 1,000 in each priority.
    """

    name = models.TextField(primary_key=True)
    due = models.BigIntegerField()
    running = models.BigIntegerField()
    delayed = models.BigIntegerField()
    waiting = models.BigIntegerField(_("waiting for a key"))
    dead = models.BigIntegerField(_("dead within an hour"))
    since = models.DateTimeField(_("oldest due"), null=True)
    is_paused = models.BooleanField(_("paused"))
    paused_until = models.DateTimeField(null=True)

    objects = _Queues()

    class Meta:
        managed = False
        db_table = "bgjob_queue"
        default_permissions = ("view",)
        permissions: ClassVar[Sequence[tuple[str, str]]] = [
            ("pause_queue", "Can pause and resume queues")
        ]
        verbose_name = _("queue")
        verbose_name_plural = _("queues")

    def __str__(self) -> str:
        return str(self.name)
