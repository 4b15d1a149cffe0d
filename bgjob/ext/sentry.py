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
            next attempt overcomes needs no attention.

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
        name, data = "bulk enqueue", {}
        if isinstance(requests, Sized) and len(requests) == 1:
            [request] = requests = [*requests]
            name = request.queue
            data = _message(request.id, request.queue)
        with _publish_span(name, data):
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
            data = {
                "messaging.destination.name": queue,
                "messaging.batch.message_count": len(jobs),
            }
            with _process_span(type_, {}, data):
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
        data = _message(job.id, job.queue)
        data["messaging.message.retry.count"] = job.attempt - 1
        if start.waited is not None:
            data["messaging.message.receive.latency"] = start.waited * 1000
        with _scope_of(job) as headers, _process_span(job.type, headers, data) as has_failed:
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
                    has_failed()
                    if not start.is_observed:
                        self._capture_result(run.result)
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
    """Open an isolation scope that names a job, and yield the headers of its trace."""
    with sentry_sdk.isolation_scope() as scope:
        scope.clear_breadcrumbs()
        headers = {
            name: value
            for name in (_TRACE, _BAGGAGE)
            if isinstance(value := job.headers.get(name), str)
        }
        sentry_sdk.continue_trace(headers)  # also for errors, without a span
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
        yield headers


@contextmanager
def _publish_span(name: str, data: dict[str, Any]) -> Iterator[None]:
    if traces := _streaming():
        with traces.start_span(name, data | {"sentry.op": "queue.publish"}):
            yield
        return
    with sentry_sdk.start_span(op="queue.publish") as span:
        span.description = name
        for key, value in data.items():
            span.set_data(key, value)
        yield


@contextmanager
def _process_span(
    name: str, headers: dict[str, str], data: dict[str, Any]
) -> Iterator[Callable[[], None]]:
    """Open the span of a handler, and yield a function that marks it as failed."""
    if traces := _streaming():
        traces.continue_trace(headers)
        data |= {"sentry.op": "queue.process", "sentry.segment.name.source": "task"}
        with traces.start_span(name, data, parent_span=None) as streamed:
            yield lambda: setattr(streamed, "status", "error")
        return
    transaction = sentry_sdk.continue_trace(headers, op="queue.process", name=name, source="task")
    for key, value in data.items():
        transaction.set_data(key, value)
    transaction.set_status("ok")
    with sentry_sdk.start_transaction(transaction):
        yield lambda: transaction.set_status("internal_error")


def _streaming() -> Any:
    """Return the functions for spans that are sent one by one, if the SDK has and uses them."""
    try:
        from sentry_sdk import traces  # noqa: PLC0415 (of later versions)
        from sentry_sdk.tracing_utils import has_span_streaming_enabled  # noqa: PLC0415
    except ImportError:
        return None
    return traces if has_span_streaming_enabled(sentry_sdk.get_client().options) else None


def _message(id_: str, queue: str) -> dict[str, Any]:
    return {"messaging.message.id": id_, "messaging.destination.name": queue}


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
