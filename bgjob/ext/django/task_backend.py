"""The backend of Django's tasks: TASKS = {"default": {"BACKEND": "….TaskBackend"}}.

The tasks are those of django.tasks, since Django 6; before, those of the package django-tasks. A
task is a job, whose type is the task's module path. Its function is registered on `mux` when the
module is imported that defines it, and nothing is imported because a job names it: `manage.py
bgjob worker` imports the modules `tasks` and `jobs` of all apps.
"""

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from traceback import format_exception
from typing import Any

import django
from django.core.checks import CheckMessage, Error
from django.core.exceptions import ImproperlyConfigured
from django.db.utils import ConnectionDoesNotExist
from django.utils import timezone

from bgjob._handlers.call import is_coroutine
from bgjob._handlers.value import encoded
from bgjob._sql import results
from bgjob._sql.paramstyles import translated
from bgjob._sql.tokens import origin
from bgjob.ext.django._database import checked
from bgjob.ext.django._enqueues import aenqueue, enqueue
from bgjob.ext.django._mux import mux
from bgjob.job import EnqueueRequest, Job
from bgjob.result import Complete, MoveToDlq, Result

__all__ = ["TaskBackend"]

_SINCE = 6

try:
    if django.VERSION[0] >= _SINCE:
        from django.tasks import base as _base  # pyright: ignore[reportMissingImports]
        from django.tasks import exceptions as _exceptions  # pyright: ignore[reportMissingImports]
        from django.tasks import signals as _signals  # pyright: ignore[reportMissingImports]
        from django.tasks.backends import base as _backends  # pyright: ignore[reportMissingImports]
    else:
        from django_tasks import base as _base  # pyright: ignore[reportMissingImports]
        from django_tasks import exceptions as _exceptions  # pyright: ignore[reportMissingImports]
        from django_tasks import signals as _signals  # pyright: ignore[reportMissingImports]
        from django_tasks.backends import base as _backends  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as _missing:
    raise ImproperlyConfigured(
        "the task backend needs Django 6, or for Django 5.2 the package django-tasks: "
        "pip install 'django-tasks>=0.12'"
    ) from _missing

_BaseTaskBackend: Any = _backends.BaseTaskBackend
_InvalidTask: Any = getattr(_exceptions, "InvalidTask", None) or _exceptions.InvalidTaskError

_OWN = ("database", "keep_results")
_POLICY = ("backoff", "exclusive", "keep", "max_attempts", "retry_priority", "slots", "timeout")


class TaskBackend(_BaseTaskBackend):
    """Runs Django's tasks as jobs.

        TASKS = {"default": {"BACKEND": "bgjob.ext.django.task_backend.TaskBackend"}}

    A task that is enqueued inside of `transaction.atomic` is a part of the transaction. One that
    raises is run again, by the policy, and goes to the dead-letter table in the end. A worker runs
    the task at least once.

    Django's priorities are from -100 to 100, and a higher one runs first; the job's priority is
    the same with the other sign.

    OPTIONS: `database`, the alias ("default" by default); `keep_results`, seconds or a timedelta
    for which what a task returned, or why it failed, is kept after its end, for `get_result` and
    `refresh` (None, the default: not at all, and the backend does not support them); and of the
    policy of the tasks that are
    declared with this backend `max_attempts`, `backoff`, `timeout`, `retry_priority`, `exclusive`,
    `slots` and `keep`, as for Mux.register.
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = False
    supports_priority = True

    def __init__(self, alias: str, params: Mapping[str, Any]) -> None:
        super().__init__(alias, params)
        self.database: str = self.options.get("database", "default")
        self.keep_results: Any = self.options.get("keep_results")
        self.supports_get_result = self.keep_results is not None

    def check(self, **_: Any) -> Iterable[CheckMessage]:
        """Report unknown options, and a database that is not PostgreSQL."""
        name = f"TASKS[{self.alias!r}]['OPTIONS']"
        for key in self.options:
            if key not in (*_OWN, *_POLICY):
                known = ", ".join((*_OWN, *_POLICY))
                yield Error(f"{name} has no key {key!r}: the keys are {known}", id="bgjob.E004")
        if self.keep_results is not None:
            try:
                EnqueueRequest("queue", "type", keep=self.keep_results)
            except (TypeError, ValueError) as error:
                yield Error(f"{name}['keep_results']: {error}", id="bgjob.E006")
        try:
            checked(self.database)
        except (ImproperlyConfigured, ConnectionDoesNotExist) as error:
            yield Error(f"{name}['database']: {error}", id="bgjob.E005")

    def validate_task(self, task: Any) -> None:
        """Raise InvalidTask unless the task can be run; register its function for workers."""
        super().validate_task(task)
        path = task.module_path
        known = _declared.get(path)
        if known is None or known.func is not task.func:
            if mux.route_of(path) is None:
                policy = {name: self.options[name] for name in _POLICY if name in self.options}
                try:
                    mux.register(path, _handler(task), codec=_CODEC, **policy)
                except (TypeError, ValueError) as error:
                    raise _InvalidTask(str(error)) from error
            _declared[path] = task

    def enqueue(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Write the job of a task, and return its result, which is not known yet.

        Raises:
            InvalidTask: the task cannot be run.
            TypeError, ValueError: the arguments are not JSON.
            SynchronousOnlyOperation: in a coroutine: await the task's `aenqueue`.

        """
        request, result = self._requested(task, args, kwargs)
        enqueue(request, using=self.database)
        _signals.task_enqueued.send_robust(type(self), task_result=result)
        return result

    async def aenqueue(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Write the job of a task. Async variant of `enqueue`."""
        request, result = self._requested(task, args, kwargs)
        await aenqueue(request, using=self.database)
        await _signals.task_enqueued.asend_robust(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> Any:
        """Return what is known of a task that was enqueued with `keep_results`.

        Of earlier attempts only the number is known, and of a failure the text and the error's
        name, as the dead-letter table has them.

        Raises:
            TaskResultDoesNotExist: it had no `keep_results`, that time is over, or the module of
                the task is not imported here.
            NotImplementedError: the backend has no `keep_results`.
            SynchronousOnlyOperation: in a coroutine: await the task's `aget_result`.

        """
        if not self.supports_get_result:
            return super().get_result(result_id)
        statement = results.task(result_id)
        cursor: Any
        with checked(self.database).cursor() as cursor:
            cursor.execute(*translated(statement, "pyformat"))
            found = statement.parse(cursor.fetchall())
        declared = None if found is None else _declared.get(found.type)
        if found is None or declared is None:
            raise _exceptions.TaskResultDoesNotExist(
                f"no result of task {result_id!r} is kept, or its module is not imported here"
            )
        return _known(declared, found)

    def _requested(
        self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[EnqueueRequest, Any]:
        self.validate_task(task)
        run_at = task.run_after
        if run_at is not None and timezone.is_naive(run_at):  # without USE_TZ
            run_at = timezone.make_aware(run_at)
        result = _result(task, "", datetime.now(UTC), args, kwargs)
        arg = _CODEC.encode((result.args, result.kwargs))
        request = EnqueueRequest(
            task.queue_name,
            task.module_path,
            arg,
            priority=-task.priority,
            run_at=run_at,
            keep=self.keep_results,
        )
        object.__setattr__(result, "id", request.id)
        return request, result


class _Codec:
    """Encodes the arguments of a call."""

    def encode(self, value: tuple[list[Any], dict[str, Any]], /) -> bytes:
        args, kwargs = value
        return json.dumps({"args": args, "kwargs": kwargs}, allow_nan=False).encode()

    def decode(self, data: bytes, /) -> tuple[list[Any], dict[str, Any]]:
        match json.loads(data):
            case {"args": list(args), "kwargs": dict(kwargs)}:
                return args, kwargs
        raise ValueError('the arguments of a task look like {"args": [...], "kwargs": {...}}')


_CODEC = _Codec()

_MISSING = MoveToDlq("the arguments of the task are missing")

_declared: dict[str, Any] = {}
"""The tasks by their module paths, each as it was declared."""


def _handler(declared: Any) -> Callable[..., Any]:
    """Return the handler of a task, whose function a reload may replace."""
    path = declared.module_path
    if is_coroutine(declared.func):

        async def awaited(value: Any, *, job: Job) -> Result | None:
            if value is None:
                return _MISSING
            run = _Run(_declared[path], job, *value)
            await _signals.task_started.asend_robust(TaskBackend, task_result=run.result)
            try:
                completed = run.succeeded(await run.call())
            except BaseException as error:
                if run.has_failed(error):
                    await _signals.task_finished.asend_robust(TaskBackend, task_result=run.result)
                raise
            await _signals.task_finished.asend_robust(TaskBackend, task_result=run.result)
            return completed

        return awaited

    def called(value: Any, *, job: Job) -> Result | None:
        if value is None:
            return _MISSING
        run = _Run(_declared[path], job, *value)
        _signals.task_started.send_robust(TaskBackend, task_result=run.result)
        try:
            completed = run.succeeded(run.call())
        except BaseException as error:
            if run.has_failed(error):
                _signals.task_finished.send_robust(TaskBackend, task_result=run.result)
            raise
        _signals.task_finished.send_robust(TaskBackend, task_result=run.result)
        return completed

    return called


class _Run:
    """An attempt of a task, as its context and the receivers of Django's signals see it."""

    def __init__(self, task: Any, job: Job, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.task, self.kwargs = task, kwargs
        self._job = job
        result = self.result = _result(task, job.id, job.created_at, args, kwargs)
        # The workers of earlier attempts are not known, but their number is.
        result.worker_ids[:] = ["unknown"] * (job.attempt - 1) + [_WORKER]
        if job.last_error is not None:
            result.errors.append(_error(job.last_error.partition(":")[0], job.last_error))
        now = datetime.now(UTC)
        _change(result, status=_Status.RUNNING, started_at=now, last_attempted_at=now)
        self.args = [_base.TaskContext(task_result=result), *args] if task.takes_context else args

    def call(self) -> Any:
        return self.task.func(*self.args, **self.kwargs)

    def succeeded(self, returned: object) -> Result | None:
        """Record that the task has succeeded; raise if what it returned cannot be kept."""
        completed = None
        if self._job.keep is not None:
            value = json.loads(json.dumps(returned, allow_nan=False))
            encoded(value, self._job)
            completed = Complete(value)
            _change(self.result, _return_value=value)
        _change(self.result, status=_Status.SUCCESSFUL, finished_at=datetime.now(UTC))
        return completed

    def has_failed(self, error: BaseException) -> bool:
        """Whether it was the last attempt, and the task has failed."""
        route = mux.route_of(self._job.type)
        if route is None or not isinstance(route.failed(self._job, error), MoveToDlq):
            return False
        kind = type(error)
        path = f"{kind.__module__}.{kind.__qualname__}"
        self.result.errors.append(_error(path, "".join(format_exception(error))))
        _change(self.result, status=_Status.FAILED, finished_at=datetime.now(UTC))
        return True


_Status: Any = _base.TaskResultStatus

_WORKER = f"{socket.gethostname()}:{os.getpid()}"


def _result(
    task: Any, id_: str, enqueued_at: datetime, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    return _base.TaskResult(
        task=task,
        id=id_,
        status=_Status.READY,
        enqueued_at=enqueued_at,
        started_at=None,
        finished_at=None,
        last_attempted_at=None,
        args=list(args),
        kwargs=dict(kwargs),
        backend=task.backend,
        errors=[],
        worker_ids=[],
    )


def _known(task: Any, found: results.Task) -> Any:
    """Return the result of a task that is live, or has ended."""
    outcome = found.outcome
    try:
        args, kwargs = _CODEC.decode(bytes(found.arg or b""))  # psycopg2 has its own type
    except ValueError:
        args, kwargs = [], {}
    result = _result(task, outcome.id, found.created_at or datetime.now(UTC), args, kwargs)
    made = None if found.token is None else origin(found.token)
    result.worker_ids[:] = ["unknown"] * found.attempt
    error = found.last_error if outcome.until is None else outcome.error
    if error is not None:
        result.errors.append(_error(error.partition(":")[0], error))
    started_at = None if made is None else made.at
    _change(result, started_at=started_at, last_attempted_at=started_at)
    if outcome.until is None:
        _change(result, status=_Status.READY if found.token is None else _Status.RUNNING)
    elif outcome.error is not None:
        _change(result, status=_Status.FAILED, finished_at=outcome.ended_at)
    else:
        value = None if outcome.value is None else json.loads(bytes(outcome.value))
        _change(
            result,
            status=_Status.SUCCESSFUL,
            finished_at=outcome.ended_at,
            _return_value=value,
        )
    return result


def _change(result: Any, **changes: Any) -> None:
    for name, value in changes.items():
        object.__setattr__(result, name, value)  # as Django's own backends do


def _error(path: str, text: str) -> Any:
    return _base.TaskError(
        exception_class_path=path if "." in path else f"builtins.{path}", traceback=text
    )
