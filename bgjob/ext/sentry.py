"""Errors and traces of jobs for Sentry; needs `bgjob[sentry]`.

    sentry_sdk.init(...)
    sentry = Sentry()

    client = Client(dsn, on_enqueue=sentry.on_enqueue)
    mux = Mux(middleware=[sentry.middleware])
    worker = Worker(client, "mail", mux, observer=[LoggingObserver(), sentry])

Each job runs in an isolation scope of its own, with its queue, type, id and attempt, and continues
the trace of its enqueue. A job that is moved to the dead-letter table is an event, in that scope:
an attempt that is retried is none. What the LoggingObserver logs of the same is no second event.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from functools import wraps
from typing import Any, Literal, TypeAlias, get_args

import sentry_sdk
from sentry_sdk.scope import add_global_event_processor
from sentry_sdk.utils import event_from_exception
from typing_extensions import override

from bgjob._handlers.call import is_coroutine
from bgjob.ext._runs import Runs
from bgjob.job import EnqueueRequest, Job
from bgjob.observer import NoopObserver, Times, with_times
from bgjob.result import MoveToDlq, Retry

__all__ = ["Capture", "Sentry"]

Capture: TypeAlias = Literal["dead", "failed"]
"""What becomes an event. `dead`: a job that was moved to the dead-letter table. `failed`: also each
attempt that failed and will be retried."""

_TRACE, _BAGGAGE = "sentry-trace", "baggage"

_LOGGED = frozenset({"moved_to_dlq", "will_be_retried", "timed_out"})
"""The events that a LoggingObserver logs, and that are captured here or left out on purpose."""


class Sentry(NoopObserver):
    """Scopes, traces and errors of jobs.

    One object for all clients, muxes and workers of a process; thread-safe. Until
    `sentry_sdk.init` was called it does nothing. Payloads are not sent.

    Args:
        capture: what becomes an event; see Capture. "dead" by default, because an error that the
            next attempt overcomes needs nobody.

    Raises:
        ValueError: an unknown `capture`.

    """

    def __init__(self, *, capture: Capture = "dead") -> None:
        if capture not in get_args(Capture):
            raise ValueError(f"capture must be dead or failed, not {capture!r}")
        self._captures_failed = capture == "failed"
        self._runs: Runs[_Run] = Runs()
        _leave_out_log_records()

    @contextmanager
    def on_enqueue(self, requests: Iterable[EnqueueRequest]) -> Iterator[Iterable[EnqueueRequest]]:
        """Write the current trace into the headers of the jobs.

        For `Client(on_enqueue=...)`, or around any other enqueue:

            with sentry.on_enqueue([request]) as [request]:
                enqueue(session, request)

        Where the headers have no room for all of it, the sampling decision stays behind.
        """
        if not sentry_sdk.is_initialized():
            yield requests
            return
        with sentry_sdk.start_span(op="queue.publish") as span:
            if isinstance(requests, Sized) and len(requests) == 1:
                [request] = requests = [*requests]
                span.description = request.queue
                span.set_data("messaging.message.id", request.id)
                span.set_data("messaging.destination.name", request.queue)
            trace = sentry_sdk.get_traceparent()
            baggage = sentry_sdk.get_baggage()
            yield (_with_trace(request, trace, baggage) for request in requests)

    def middleware(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Run a handler in a scope of its own; for `Mux(middleware=[...])`.

        A call of a batch handler has one scope, of its type. An event has that of its job.
        """
        if is_coroutine(handler):

            @wraps(handler)
            async def awaited(job: Job | Sequence[Job], *conn: Any) -> Any:
                with self._run(job) as run:
                    run.result = await handler(job, *conn)
                return run.result

            return awaited

        @wraps(handler)
        def called(job: Job | Sequence[Job], *conn: Any) -> Any:
            with self._run(job) as run:
                run.result = handler(job, *conn)
            return run.result

        return called

    @contextmanager
    def _run_call(self, jobs: Sequence[Job]) -> Iterator["_Run"]:
        """Run a batch handler with several jobs, which may end in different ways."""
        for job in jobs:
            self._runs.start(job)
        if not sentry_sdk.is_initialized():
            yield _Run()
            return
        queue, type_ = jobs[0].queue, jobs[0].type
        with sentry_sdk.isolation_scope() as scope:
            scope.clear_breadcrumbs()
            scope.set_tag("bgjob.queue", queue)
            scope.set_tag("bgjob.type", type_)
            with sentry_sdk.start_transaction(
                op="queue.process", name=type_, source="task"
            ) as transaction:
                transaction.set_data("messaging.destination.name", queue)
                transaction.set_data("messaging.batch.message_count", len(jobs))
                yield _Run()

    @contextmanager
    def _run(self, job: Job | Sequence[Job]) -> Iterator["_Run"]:
        if not isinstance(job, Job):
            if len(job) > 1:
                with self._run_call(job) as run:
                    yield run
                return
            [job] = job
        start = self._runs.start(job)
        run = _Run()
        if not sentry_sdk.is_initialized():
            yield run
            return
        with _scope_of(job) as transaction, sentry_sdk.start_transaction(transaction):
            if start.waited is not None:
                transaction.set_data("messaging.message.receive.latency", start.waited * 1000)
            run.context = copy_context()
            if start.is_observed:
                self._runs.keep(job, run)
            try:
                yield run
            except BaseException as error:
                if not start.is_observed and self._captures_failed:
                    _capture(error)
                raise
            else:
                if isinstance(run.result, Retry | MoveToDlq):
                    transaction.set_status("internal_error")
                    if not start.is_observed:
                        self._capture_result(run.result)
                else:
                    transaction.set_status("ok")
            finally:
                # In it the error may have been captured already, which is not repeated.
                run.context = copy_context()

    def _capture_result(self, result: Retry | MoveToDlq) -> None:
        if result.error is not None and (self._captures_failed or isinstance(result, MoveToDlq)):
            _capture(result.error)

    # -- events ----------------------------------------------------------------------------

    @override
    @with_times
    def job_started(self, job: Job, times: Times | None = None, /) -> None:
        self._runs.started(job, None if times is None else times.waited)

    @override
    def job_completed(self, job: Job, /) -> None:
        self._runs.take(job)

    @override
    def job_rescheduled(self, job: Job, delay: float, /) -> None:
        self._runs.take(job)

    @override
    def job_lease_lost(self, job: Job, /) -> None:
        self._runs.take(job)

    @override
    def job_cancelled(self, job: Job, /) -> None:
        self._runs.take(job)

    @override
    def job_will_be_retried(
        self, job: Job, delay: float, error: str | BaseException | None, /
    ) -> None:
        run = self._runs.take(job)
        if self._captures_failed and error is not None:
            _capture_of(job, run, error)

    @override
    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        _capture_of(job, self._runs.take(job), error)


class _Run:
    """A run of a handler: the context with its scope, and what it returned."""

    __slots__ = ("context", "result")

    def __init__(self) -> None:
        self.context: Context | None = None
        self.result: object = None


@contextmanager
def _scope_of(job: Job) -> Iterator[Any]:
    """Open an isolation scope that names a job, and yield its transaction, not started."""
    with sentry_sdk.isolation_scope() as scope:
        scope.clear_breadcrumbs()
        headers = {
            name: value
            for name in (_TRACE, _BAGGAGE)
            if isinstance(value := job.headers.get(name), str)
        }
        transaction = sentry_sdk.continue_trace(
            headers, op="queue.process", name=job.type, source="task"
        )
        transaction.set_data("messaging.message.id", job.id)
        transaction.set_data("messaging.destination.name", job.queue)
        transaction.set_data("messaging.message.retry.count", job.attempt - 1)
        scope.set_transaction_name(job.type, source="task")
        scope.set_tag("bgjob.queue", job.queue)
        scope.set_tag("bgjob.type", job.type)
        scope.set_context(
            "bgjob",
            {
                "id": job.id,
                "queue": job.queue,
                "type": job.type,
                "attempt": job.attempt,
                "priority": job.priority,
            },
        )
        yield transaction


def _capture_of(job: Job, run: _Run | None, error: BaseException | str) -> None:
    if not sentry_sdk.is_initialized():
        return
    if run is not None and run.context is not None:
        # Not the context itself: a handler that was abandoned may still be in it.
        run.context.copy().run(_capture, error)
        return
    Context().run(_capture_unrun, job, error)  # not that of the thread, nor of another job


def _capture_unrun(job: Job, error: BaseException | str) -> None:
    """Capture the error of a job whose handler was not called."""
    with _scope_of(job):
        _capture(error)


def _capture(error: BaseException | str) -> None:
    if isinstance(error, str):
        sentry_sdk.capture_message(error, level="error")
        return
    event, hint = event_from_exception(
        error,
        client_options=sentry_sdk.get_client().options,
        mechanism={"type": "bgjob", "handled": False},
    )
    sentry_sdk.capture_event(event, hint=hint)


def _with_trace(request: EnqueueRequest, trace: str | None, baggage: str | None) -> EnqueueRequest:
    if not trace:
        return request
    # Other libraries have their own entries in it.
    others = request.headers.get(_BAGGAGE)
    entries = others.split(",") if isinstance(others, str) else []
    entries = [entry for entry in entries if not entry.strip().startswith("sentry-")]
    whole = ",".join([*entries, *([baggage] if baggage else [])])
    for headers in ({_TRACE: trace} | ({_BAGGAGE: whole} if whole else {}), {_TRACE: trace}):
        with suppress(ValueError):  # no room
            return request.with_headers(headers)
    return request


def _leave_out_log_records() -> None:
    from sentry_sdk.scope import global_event_processors  # noqa: PLC0415 (private to this)

    if _is_not_logged not in global_event_processors:
        add_global_event_processor(_is_not_logged)


def _is_not_logged(event: Any, hint: Mapping[str, Any]) -> Any:
    """Leave out the record of a LoggingObserver about a failed job, whatever its logger."""
    record = hint.get("log_record")
    if getattr(record, "job_event", None) in _LOGGED and hasattr(record, "job_attempt"):
        return None
    return event
