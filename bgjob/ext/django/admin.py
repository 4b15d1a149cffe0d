"""The tables in Django's admin: to look at, to requeue dead jobs, to pause and resume queues.

Nothing is added, changed or deleted there. Lists stay quick whatever the tables hold: nothing is
counted beyond 10,000 rows, the order is that of an index, and payloads are read for one job only,
and only their beginning.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.paginator import Paginator
from django.db.models import BinaryField, Q
from django.db.models.functions import Left, Length, Substr
from django.utils import timezone
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from bgjob.client import Client
from bgjob.ext.django._database import driver, dsn
from bgjob.ext.django.models import DeadJob, Job, Queue, Schedule

_MOST = 10_000
"""Rows that a list counts and shows, and that an action takes."""

_SHOWN = 10_000
"""Bytes of a payload that are shown."""

_CUT = 120
"""Characters of an error in a list."""


class CappedPaginator(Paginator):
    """Counts no more than 10,000 rows, and has no pages after them."""

    @cached_property
    def count(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of rows, or 10,000."""
        rows: Any = self.object_list
        return int(rows.order_by()[:_MOST].count())


class _Looking(admin.ModelAdmin):
    paginator = CappedPaginator
    show_full_result_count = False
    sortable_by: ClassVar[Sequence[str]] = ()
    """No column: another order than that of an index would sort the whole table."""

    def has_add_permission(self, request: Any) -> bool:  # noqa: ARG002
        """Return False: programs enqueue."""
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:  # noqa: ARG002
        """Return False: a worker may be changing the row."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:  # noqa: ARG002
        """Return False: a running job may not vanish."""
        return False

    def _may(self, request: Any, permission: str) -> bool:
        return bool(request.user.has_perm(f"bgjob.{permission}"))

    def _log(self, request: Any, rows: Sequence[Any], done: str) -> None:
        LogEntry.objects.log_actions(request.user.pk, rows, CHANGE, done)


class _QueueFilter(admin.SimpleListFilter):
    title = _("queue")
    parameter_name = "queue"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:  # noqa: ARG002
        return [(name, name) for name in Queue.objects.values_list("name", flat=True)]

    def queryset(self, request: Any, queryset: Any) -> Any:  # noqa: ARG002
        if self.value() is None:
            return queryset
        # Always true, and each part is the condition of an index.
        indexed: Any = Q(waits=False) | Q(waits=True, exclusive__isnull=False)
        indexed |= Q(waits=True, limited=True)
        return queryset.filter(indexed, queue=self.value())


class _DeadQueueFilter(_QueueFilter):
    title = _("queue, of the last 10,000")  # no index has the queues

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:  # noqa: ARG002
        rows = _last(model_admin.model._base_manager.all())  # noqa: SLF001
        return [(name, name) for name in sorted(rows.values_list("queue", flat=True).distinct())]

    def queryset(self, request: Any, queryset: Any) -> Any:  # noqa: ARG002
        return queryset if self.value() is None else _last(queryset).filter(queue=self.value())


def _last(rows: Any) -> Any:
    return rows.filter(pk__in=rows.model._base_manager.order_by("-pk").values("pk")[:_MOST])  # noqa: SLF001


class _Jobs(_Looking):
    ordering: ClassVar[Sequence[str]] = ["-id"]

    def get_queryset(self, request: Any) -> Any:
        """Leave out what may be large."""
        rows = super().get_queryset(request).defer("arg", "headers", "checkpoint", "last_error")
        return rows.annotate(error_start=Left("last_error", _CUT))

    def get_search_results(self, request: Any, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """Find jobs by their whole id, which may have spaces."""
        if search_term:
            fields: Any = self.get_search_fields(request)
            queryset = queryset.filter(**{fields[0]: search_term})
        return queryset, False

    @admin.display(description=_("error"))
    def error(self, row: Any) -> str:
        """Return the beginning of the error."""
        return row.error_start or ""

    @admin.display(description=_("error"))
    def whole_error(self, row: Any) -> Any:
        """Return the error, in lines."""
        return format_html("<pre>{}</pre>", row.last_error) if row.last_error else ""

    @admin.display(description=_("payload"))
    def payload(self, row: Any) -> Any:
        """Return the payload as JSON or as text, or its beginning."""
        return _beginning(row, "arg")

    @admin.display(description=_("checkpoint"))
    def saved(self, row: Any) -> Any:
        """Return the checkpoint as JSON or as text, or its beginning."""
        return _beginning(row, "checkpoint")


def _beginning(row: Any, column: str) -> Any:
    start = Substr(column, 1, _SHOWN, output_field=BinaryField())
    rows = type(row)._base_manager.using(row._state.db).filter(pk=row.pk)  # noqa: SLF001
    data, size = rows.values_list(start, Length(column))[0]
    if data is None:
        return ""
    text = bytes(data).decode(errors="backslashreplace")
    if size > len(data):
        text += f"… ({size:,} bytes)"
    else:
        with suppress(ValueError, RecursionError):
            text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return format_html("<pre>{}</pre>", text)


@admin.register(Job)
class JobAdmin(_Jobs):
    """The live jobs, the newest ids first."""

    list_filter = (_QueueFilter,)
    list_display = ("id", "queue", "type", "state", "priority", "attempt", "next_run_at", "error")
    search_fields = ("id",)
    search_help_text = _("The whole id of a job")
    fields = (
        *("id", "queue", "type", "state", "priority", "exclusive", "slots", "group_id"),
        *("attempt", "next_run_at", "lease_until", "expires", "created_at", "updated_at"),
        *("headers", "payload", "saved", "whole_error"),
    )
    readonly_fields = ("state", "payload", "saved", "whole_error")

    @admin.display(description=_("state"))
    def state(self, job: Job) -> Any:
        """Return what the job does, by this host's clock."""
        now: Any = timezone.now()
        if job.lease_until is not None and job.lease_until > now:
            return _("running")
        if job.waits and job.limited:
            return _("waits for the limit of its type")
        if job.waits:
            return _("waits for its key")
        if job.group_id == job.id and job.group_dead is None and not job.attempt:
            return _("waits for its group")
        return _("delayed") if job.next_run_at > now else _("due")


@admin.register(DeadJob)
class DeadJobAdmin(_Jobs):
    """The dead jobs, the latest first."""

    list_filter = (_DeadQueueFilter,)
    list_display = ("job_id", "queue", "type", "attempt", "moved_at", "error")
    search_fields = ("job_id",)
    search_help_text = _("The whole id of a job")
    fields = (
        *("job_id", "queue", "type", "priority", "exclusive", "slots", "group_id", "attempt"),
        *("moved_at",),
        *("next_run_at", "expires", "job_created_at", "job_updated_at", "headers", "payload"),
        *("saved", "whole_error"),
    )
    readonly_fields = ("payload", "saved", "whole_error")
    actions = ("requeue",)

    def has_requeue_permission(self, request: Any) -> bool:
        """Whether the user may requeue dead jobs."""
        return self._may(request, "requeue_deadjob")

    @admin.action(permissions=["requeue"], description=_("Requeue selected dead jobs"))
    def requeue(self, request: Any, queryset: Any) -> None:
        """Move the jobs back to their queues, due now, with fresh attempts."""
        rows = list(queryset[:_MOST])
        with _client(queryset.db) as (client, conn):
            done = len(client.dlq.requeue([row.job_id for row in rows], conn=conn))
        self._log(request, rows, "Requeued.")
        text = ngettext("%d job was requeued.", "%d jobs were requeued.", done) % done
        if left := len({row.job_id for row in rows}) - done:
            text += (
                " "
                + ngettext(
                    "%d stays dead: a live job has its id.",
                    "%d stay dead: live jobs have their ids.",
                    left,
                )
                % left
            )
        self.message_user(request, text, messages.WARNING if left else messages.SUCCESS)


@admin.register(Schedule)
class ScheduleAdmin(_Looking):
    """The schedules that workers wrote."""

    list_display = ("name", "spec", "queue", "type", "last_run_at", "next_run_at", "paused")
    ordering = ("name",)


@admin.register(Queue)
class QueueAdmin(_Looking):
    """The queues that have jobs, are paused, or lost a job within the last hour."""

    list_display = ("name", "due", "running", "delayed", "waiting", "dead", "since", "is_paused")
    ordering = ("name",)
    actions = ("pause", "resume")

    def has_pause_permission(self, request: Any) -> bool:
        """Whether the user may pause and resume queues."""
        return self._may(request, "pause_queue")

    @admin.action(permissions=["pause"], description=_("Pause selected queues"))
    def pause(self, request: Any, queryset: Any) -> None:
        """Pause the queues, for all workers."""
        rows = list(queryset)
        with _client(queryset.db) as (client, conn):
            for row in rows:
                client.pause(row.name, conn=conn)
        self._log(request, rows, "Paused.")
        self.message_user(request, _("The queues are paused."), messages.SUCCESS)

    @admin.action(permissions=["pause"], description=_("Resume selected queues"))
    def resume(self, request: Any, queryset: Any) -> None:
        """End the pauses of the queues."""
        rows = list(queryset)
        with _client(queryset.db) as (client, conn):
            for row in rows:
                client.resume(row.name, conn=conn)
        self._log(request, rows, "Resumed.")
        self.message_user(request, _("The queues are resumed."), messages.SUCCESS)


@contextmanager
def _client(using: str) -> Iterator[tuple[Client, Any]]:
    """Yield a client, and the connection of the request, whose transaction it joins."""
    with closing(Client(dsn(using))) as client:
        yield client, driver(using)  # without psycopg 3 the client has a connection of its own
