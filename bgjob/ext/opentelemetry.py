"""Traces and metrics by the conventions of OpenTelemetry; needs `bgjob[opentelemetry]`.

    telemetry = Telemetry()

    client = Client(dsn, on_enqueue=telemetry.on_enqueue)
    mux = Mux(middleware=[telemetry.middleware])
    worker = Worker(client, "mail", mux, observer=[LoggingObserver(), telemetry])

An enqueue is a span `send {queue}` of kind PRODUCER; a bulk enqueue is one span for all its jobs.
A run of a handler is a span `process {queue} {type}` of kind CONSUMER. The context travels in the
job's headers, so that it survives retries, the dead-letter table and a requeue.

A span of a handler ends when its result is stored: only then is it known whether the job was
completed, retried or lost. The worker tells that to the telemetry as an observer. The end time is
that of the handler.

The module has over 400 lines because a span is opened, related, described and ended here.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import Any, Literal, TypeAlias, get_args

from opentelemetry import context, metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TracerProvider
from typing_extensions import override

from bgjob import __version__
from bgjob._failure import message_of
from bgjob._handlers.call import is_coroutine
from bgjob._logger import log
from bgjob.ext._runs import Runs
from bgjob.job import EnqueueRequest, Job
from bgjob.observer import NoopObserver, Times, with_times
from bgjob.result import MoveToDlq, Reschedule, Retry
from bgjob.workers import WorkerHealth

__all__ = ["Relation", "Telemetry"]

Relation: TypeAlias = Literal["auto", "parent", "link"]
"""How the span of a handler is related to that of the enqueue. `parent`: it is a child of it, in
the same trace. `link`: it begins a trace of its own, with a link. `auto`: a child if the first
attempt starts within 60 s of the enqueue, and otherwise linked."""

_NEAR = 60.0
"""Seconds: a trace of hours is of no use in the tools that show one, and samplers of whole traces
wait no longer."""

_LONGEST = 1000
"""Characters of an error in the status of a span."""

_LOOK_EVERY = 1.0
"""Seconds between two looks at the numbers of the workers."""

_Attributes: TypeAlias = dict[str, str | int | float]

_FAILED = ("retried", "dead", "timed_out", "lost", "failed")


class _Run:
    """A run of a handler: its span, and what is known of it so far."""

    __slots__ = ("began", "ended", "error", "is_observed", "job", "outcome", "span")

    def __init__(self, job: Job, span: Span, *, is_observed: bool) -> None:
        self.job = job
        self.span = span
        self.is_observed = is_observed
        """Whether an event will tell how it ends."""
        self.began = time.time_ns()
        self.ended: int | None = None
        self.outcome = ""
        self.error: BaseException | str | None = None


class Telemetry(NoopObserver):
    """Spans and metrics of enqueues and handlers.

    One object for all clients, muxes and workers of a process; thread-safe. Without an SDK,
    which the program installs and configures, it does next to nothing.

    Args:
        tracer_provider: the global one by default.
        meter_provider: the global one by default.
        propagator: writes the context into headers, and reads it; the global one by default,
            which is that of W3C (traceparent, tracestate, baggage).
        relation: of a handler's span to that of its enqueue; see Relation. "auto" by default.
        verbose: also a span `settle {queue}` for each job, from the end of its handler until
            its result was stored. False by default: a thousand jobs share one commit.

    Raises:
        ValueError: an unknown relation.

    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        propagator: TextMapPropagator | None = None,
        relation: Relation = "auto",
        verbose: bool = False,
    ) -> None:
        if relation not in get_args(Relation):
            raise ValueError(f"relation must be one of auto, parent and link, not {relation!r}")
        self._tracer = trace.get_tracer("bgjob", __version__, tracer_provider)
        self._propagator = propagator
        self._relation = relation
        self._is_verbose = verbose
        meter = metrics.get_meter("bgjob", __version__, meter_provider)
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Jobs that were to be enqueued."
        )
        self._send_duration = meter.create_histogram(
            "messaging.client.operation.duration", "s", "Duration of enqueues."
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Jobs whose handlers were called."
        )
        self._process_duration = meter.create_histogram(
            "messaging.process.duration", "s", "Duration of handlers."
        )
        self._runs: Runs[_Run] = Runs()
        self._lock = Lock()
        self._watched: list[Callable[[], WorkerHealth]] = []
        self._numbers: dict[str, int] = {}
        """The number of the only worker of a queue."""
        self._look_at = 0.0

    # -- enqueues --------------------------------------------------------------------------

    @contextmanager
    def on_enqueue(self, requests: Iterable[EnqueueRequest]) -> Iterator[Iterable[EnqueueRequest]]:
        """Wrap an enqueue in a span, and write its context into the headers of the jobs.

        For `Client(on_enqueue=...)`, or around any other enqueue:

            with telemetry.on_enqueue([request]) as [request]:
                enqueue(session, request)

        Where the headers have no room for the whole context, only its ids are written, or
        nothing: the job is enqueued all the same.
        """
        batch = _Batch(requests)
        name = f"send {batch.only.queue}" if batch.only else "send"
        attributes = _operation("send")
        if batch.only:
            attributes |= _destination(batch.only.queue) | {
                "messaging.message.id": batch.only.id,
                "bgjob.job.type": batch.only.type,
            }
        began = time.perf_counter()
        error_type: _Attributes = {}
        with self._tracer.start_as_current_span(
            name, kind=SpanKind.PRODUCER, attributes=attributes
        ) as span:
            carrier: dict[str, str] = {}
            self._textmap.inject(carrier)
            try:
                yield batch.written(carrier)
            except BaseException as error:
                error_type = {"error.type": type(error).__name__}
                span.set_attributes(error_type)
                if not isinstance(error, Exception):
                    span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise
            finally:
                if not batch.only:
                    batch.describe(span)
                labels = _operation("send") | batch.destination | error_type
                self._sent.add(batch.count, labels)
                self._send_duration.record(time.perf_counter() - began, labels)

    # -- handlers --------------------------------------------------------------------------

    def middleware(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a handler in a span; for `Mux(middleware=[...])`, as the first of them.

        A call of a batch handler has one span, with a link to the enqueue of each of its jobs.
        """
        if is_coroutine(handler):

            @wraps(handler)
            async def awaited(job: Job | Sequence[Job], *conn: Any) -> Any:
                run, token = self._begin(job)
                try:
                    result = await handler(job, *conn)
                except BaseException as error:
                    self._end(run, error)
                    raise
                else:
                    self._end(run, result)
                    return result
                finally:
                    context.detach(token)

            return awaited

        @wraps(handler)
        def called(job: Job | Sequence[Job], *conn: Any) -> Any:
            run, token = self._begin(job)
            try:
                result = handler(job, *conn)
            except BaseException as error:
                self._end(run, error)
                raise
            else:
                self._end(run, result)
                return result
            finally:
                context.detach(token)

        return called

    def _begin_call(self, jobs: Sequence[Job]) -> tuple[_Run, Any]:
        """Begin the span of a call of a batch handler: one, with a link to each of its jobs."""
        first = jobs[0]
        for job in jobs:
            self._runs.start(job)
        # A bulk enqueue has one span for all its jobs.
        remote = {(each.trace_id, each.span_id): each for each in map(self._remote_of, jobs)}
        span = self._tracer.start_span(
            f"process {first.queue} {first.type}",
            kind=SpanKind.CONSUMER,
            attributes=_operation("process")
            | _destination(first.queue)
            | {"messaging.batch.message_count": len(jobs), "bgjob.job.type": first.type},
            links=[Link(each) for each in remote.values() if each.is_valid],
        )
        self._consumed.add(len(jobs), _operation("process") | _destination(first.queue))
        run = _Run(first, span, is_observed=False)  # its jobs may end in different ways
        return run, context.attach(trace.set_span_in_context(span))

    def _remote_of(self, job: Job) -> trace.SpanContext:
        carrier = {name: value for name, value in job.headers.items() if isinstance(value, str)}
        try:
            found = self._textmap.extract(carrier, Context())
        except Exception:
            log.exception("the headers of job %r have no context that can be read", job.id)
            return trace.INVALID_SPAN_CONTEXT
        return trace.get_current_span(found).get_span_context()

    def _begin(self, job: Job | Sequence[Job]) -> tuple[_Run, Any]:
        if not isinstance(job, Job):
            if len(job) > 1:
                return self._begin_call(job)
            [job] = job
        is_observed, waited = self._runs.start(job)
        if waited is None:  # no observer: by this host's clock
            waited = max(0.0, time.time() - job.next_run_at.timestamp())
        age = (job.next_run_at - job.created_at).total_seconds() + waited
        parent, links = self._related(job, age)
        attributes = (
            _operation("process")
            | _destination(job.queue)
            | {
                "messaging.message.id": job.id,
                "bgjob.job.type": job.type,
                "bgjob.job.attempt": job.attempt,
                "bgjob.job.priority": job.priority,
                "bgjob.job.waited_s": waited,
            }
        )
        number = self._number_of(job.queue)
        if number is not None:
            attributes["bgjob.job.worker"] = number
        span = self._tracer.start_span(
            f"process {job.queue} {job.type}",
            parent,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=links,
        )
        run = _Run(job, span, is_observed=is_observed)
        if is_observed and (dropped := self._runs.keep(job, run)) is not None:
            self._finish(dropped, dropped.outcome or "unknown")
        self._consumed.add(1, _operation("process") | _destination(job.queue))
        return run, context.attach(trace.set_span_in_context(span, parent))

    def _related(self, job: Job, age: float) -> tuple[Context, list[Link]]:
        """Return the context in which a span begins, and its links."""
        # A header that was written by hand may be anything.
        carrier = {name: value for name, value in job.headers.items() if isinstance(value, str)}
        if not carrier:
            return context.get_current(), []
        try:
            found = self._textmap.extract(carrier)
        except Exception:
            log.exception("the headers of job %r have no context that can be read", job.id)
            return context.get_current(), []
        remote = trace.get_current_span(found).get_span_context()
        ours = trace.get_current_span().get_span_context()
        if not remote.is_valid or remote == ours:
            return found, []
        is_near = job.attempt == 1 and age <= _NEAR
        if self._relation == "parent" or (self._relation == "auto" and is_near):
            return found, []
        return trace.set_span_in_context(trace.INVALID_SPAN, found), [Link(remote)]

    @property
    def _textmap(self) -> Any:  # its types are generic without need
        return self._propagator or propagate.get_global_textmap()

    def _end(self, run: _Run, answer: object) -> None:
        """Record how a handler ended, and end its span unless an event will tell more."""
        match answer:
            case BaseException() as error:
                run.span.record_exception(error)
                run.outcome, run.error = "failed", error
            case Retry(error=error):
                run.outcome, run.error = "retried", error
            case MoveToDlq(error):
                run.outcome, run.error = "dead", error
            case Reschedule():
                run.outcome = "rescheduled"
            case _:
                run.outcome = "completed"
        run.ended = time.time_ns()
        if not run.is_observed:
            self._finish(run, run.outcome)

    def _finish(self, run: _Run, outcome: str) -> None:
        now = time.time_ns()
        ended = run.ended or now
        error = run.error
        labels: _Attributes = {"bgjob.outcome": outcome}
        if isinstance(error, BaseException):
            labels["error.type"] = type(error).__name__
        elif outcome in _FAILED:
            labels["error.type"] = outcome
        run.span.set_attributes(labels)
        if outcome in _FAILED:
            text = message_of(error) if isinstance(error, BaseException) else error
            run.span.set_status(Status(StatusCode.ERROR, (text or outcome)[:_LONGEST]))
        run.span.end(ended)
        job = run.job
        self._process_duration.record(
            (ended - run.began) / 1e9,
            _operation("process") | _destination(job.queue) | {"bgjob.job.type": job.type} | labels,
        )
        if self._is_verbose and run.is_observed:
            self._tracer.start_span(
                f"settle {job.queue}",
                trace.set_span_in_context(run.span, Context()),
                kind=SpanKind.CLIENT,
                attributes=_operation("settle")
                | _destination(job.queue)
                | {"messaging.message.id": job.id},
                start_time=ended,
            ).end(now)

    # -- events ----------------------------------------------------------------------------

    def watch_worker(self, health: Callable[[], WorkerHealth]) -> None:
        """Name the worker of a job, too; each worker that it observes calls this."""
        with self._lock:
            self._watched.append(health)

    def _number_of(self, queue: str) -> int | None:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY
            with self._lock:
                watched = self._watched.copy()
            of_queue: dict[str, list[int | None]] = {}
            for health in watched:
                found = health()
                if found.has_ended:
                    with self._lock:
                        self._watched = [each for each in self._watched if each is not health]
                    continue
                for name in found.queues:
                    of_queue.setdefault(name, []).append(found.number)
            only = {name: each[0] for name, each in of_queue.items() if len(each) == 1}
            self._numbers = {name: number for name, number in only.items() if number is not None}
        return self._numbers.get(queue)

    @override
    @with_times
    def job_started(self, job: Job, times: Times | None = None, /) -> None:
        self._runs.started(job, None if times is None else times.waited)

    def _ended(self, job: Job, outcome: str, error: BaseException | str | None = None) -> None:
        run = self._runs.take(job)
        if run is None:
            return
        if error is not None:
            run.error = error
        self._finish(run, "timed_out" if run.outcome == "timed_out" else outcome)

    @override
    def job_completed(self, job: Job, /) -> None:
        self._ended(job, "completed")

    @override
    def job_rescheduled(self, job: Job, delay: float, /) -> None:
        self._ended(job, "rescheduled")

    @override
    def job_will_be_retried(
        self, job: Job, delay: float, error: str | BaseException | None, /
    ) -> None:
        self._ended(job, "retried", error)

    @override
    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        self._ended(job, "dead", error)

    @override
    def job_lease_lost(self, job: Job, /) -> None:
        self._ended(job, "lost")

    @override
    def job_cancelled(self, job: Job, /) -> None:
        self._ended(job, "cancelled")

    @override
    def job_timed_out(self, job: Job, seconds: float, /) -> None:
        run = self._runs.get(job)
        if run is not None:
            run.outcome = "timed_out"


class _Batch:
    """The requests of an enqueue, which are counted as they are written."""

    def __init__(self, requests: Iterable[EnqueueRequest]) -> None:
        self.requests = requests
        self.count = 0
        self.queues: dict[str, None] = {}
        self.types: dict[str, None] = {}
        self.only: EnqueueRequest | None = None
        """The only one; None of a bulk enqueue, whose size may not be known yet."""
        if isinstance(requests, Sized) and len(requests) == 1:
            [self.only] = self.requests = [*requests]

    def written(self, carrier: Mapping[str, str]) -> Iterator[EnqueueRequest]:
        """Yield the requests to write."""
        for request in self.requests:
            self.count += 1
            self.queues[request.queue] = None
            self.types[request.type] = None
            yield _with_context(request, carrier)

    @property
    def destination(self) -> _Attributes:
        """The queue, if there is only one."""
        return _destination(*self.queues) if len(self.queues) == 1 else {}

    def describe(self, span: Span) -> None:
        """Name a span after all requests."""
        span.set_attributes({"messaging.batch.message_count": self.count, **self.destination})
        if len(self.queues) == 1:
            span.update_name(f"send {next(iter(self.queues))}")
        if len(self.types) == 1:
            span.set_attribute("bgjob.job.type", next(iter(self.types)))


def _with_context(request: EnqueueRequest, carrier: Mapping[str, str]) -> EnqueueRequest:
    if not carrier:
        return request
    others = request.headers.get("baggage")  # another library's, for example Sentry's
    if isinstance(others, str) and "baggage" in carrier:
        carrier = {**carrier, "baggage": f"{others},{carrier['baggage']}"}
    for headers in (carrier, {n: v for n, v in carrier.items() if n == "traceparent"}):
        try:
            return request.with_headers(headers)
        except ValueError:
            continue  # no room, or a character that cannot be stored
    log.warning("job %r is enqueued without a trace context: its headers have no room", request.id)
    return request


def _operation(name: str) -> _Attributes:
    return {
        "messaging.system": "bgjob",
        "messaging.operation.name": name,
        "messaging.operation.type": name,
    }


def _destination(queue: str) -> _Attributes:
    return {"messaging.destination.name": queue}
