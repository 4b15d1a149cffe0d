"""Spans and metrics, by the real SDK of OpenTelemetry and its exporters in memory."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.clients import Colour
from support.database import rows
from support.waiting import PATIENCE, eventually
from support.workers import Gate, Launcher, Recorder, Style, both_styles, handler

from bgjob import (
    AsyncClient,
    Backoff,
    Client,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
)
from bgjob.ext.opentelemetry import Relation, Telemetry


class Spans:
    """A telemetry whose spans and metrics stay in memory."""

    def __init__(self, **options: Any) -> None:
        self.provider = TracerProvider()
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        meters = MeterProvider([self._reader])
        self.tracer = self.provider.get_tracer("test")
        self.telemetry = Telemetry(tracer_provider=self.provider, meter_provider=meters, **options)

    def mux(self, body: Any, **options: Any) -> Mux:
        return Mux(middleware=[self.telemetry.middleware]).register("t", body, **options)

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span

    def metrics(self) -> dict[str, list[tuple[dict[str, Any], float]]]:
        data: Any = self._reader.get_metrics_data()
        return {
            metric.name: [
                (dict(point.attributes), getattr(point, "value", None) or point.count)
                for point in metric.data.data_points
            ]
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def spans() -> Spans:
    return Spans()


def ids(span: ReadableSpan | None) -> tuple[int, int]:
    assert span is not None
    found = span.get_span_context()
    assert found is not None
    return found.trace_id, found.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def links(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


SEND = {
    "messaging.system": "bgjob",
    "messaging.operation.name": "send",
    "messaging.operation.type": "send",
}
PROCESS = {
    "messaging.system": "bgjob",
    "messaging.operation.name": "process",
    "messaging.operation.type": "process",
    "messaging.destination.name": "q",
}


@both_styles
def test_a_handlers_span_is_a_child_of_the_enqueues(
    colour: Colour, spans: Spans, style: Style
) -> None:
    if style == "coroutine" and not colour.is_async:
        style = "plain"
    seen: list[Any] = []

    def body(job: Job) -> None:
        seen.append((trace.get_current_span(), baggage.get_baggage("user")))

    client = colour.client(on_enqueue=spans.telemetry.on_enqueue)
    request = EnqueueRequest("q", "t", id="a", priority=3)

    @contextmanager
    def inside() -> Iterator[None]:
        token = context.attach(baggage.set_baggage("user", "ann"))
        with spans.tracer.start_as_current_span("request"):
            yield
        context.detach(token)

    async def awaited() -> None:
        with inside():
            await client.target.enqueue(request)

    if colour.is_async:
        colour.run(awaited())
    else:
        with inside():
            client.enqueue(request)
    client.do("q", spans.mux(handler(style, body)))
    send, process = spans.one("send q"), spans.one("process q t")
    assert (parent(send), parent(process)) == (ids(spans.one("request")), ids(send))
    assert (send.kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert send.attributes == {
        **SEND,
        "messaging.destination.name": "q",
        "messaging.message.id": "a",
        "bgjob.job.type": "t",
    }
    attributes = dict(process.attributes or {})
    assert attributes.pop("bgjob.job.waited_s") >= 0  # type: ignore[operator]
    assert attributes == {
        **PROCESS,
        "messaging.message.id": "a",
        "bgjob.job.type": "t",
        "bgjob.job.attempt": 1,
        "bgjob.job.priority": 3,
        "bgjob.outcome": "completed",
    }
    assert send.status.status_code == process.status.status_code == StatusCode.UNSET
    [(span, user)] = seen
    assert (ids(span), user) == (ids(process), "ann")
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_failed_enqueue_is_an_error(colour: Colour, spans: Spans) -> None:
    client = colour.client(on_enqueue=spans.telemetry.on_enqueue)
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    with pytest.raises(JobAlreadyExistsError):
        client.enqueue(EnqueueRequest("q", "t", id="a"))
    first, second = spans.named("send q")
    assert second.status.status_code == StatusCode.ERROR
    assert (second.attributes or {})["error.type"] == "JobAlreadyExistsError"
    assert [event.name for event in second.events] == ["exception"]
    sent = spans.metrics()["messaging.client.sent.messages"]
    labels = {**SEND, "messaging.destination.name": "q"}
    assert sorted(sent, key=str) == sorted(
        [(labels, 1), (labels | {"error.type": "JobAlreadyExistsError"}, 1)], key=str
    )


@pytest.mark.parametrize("size", [2, 600])
def test_a_bulk_enqueue_is_one_span_of_all_its_jobs(
    colour: Colour, spans: Spans, conn: psycopg.Connection, size: int
) -> None:
    client = colour.client(on_enqueue=spans.telemetry.on_enqueue)
    client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(size)])
    client.bulk_enqueue(EnqueueRequest(queue, "t", priority=1) for queue in "qr")
    one, several = spans.all
    assert (one.name, several.name) == ("send q", "send")
    count = "messaging.batch.message_count"
    assert one.attributes == {
        **SEND, count: size, "messaging.destination.name": "q", "bgjob.job.type": "t"
    }  # fmt: skip
    assert several.attributes == {**SEND, count: 2, "bgjob.job.type": "t"}
    [(written, total)] = rows(
        conn,
        "select headers->>'traceparent', count(*) from bgjob_job where priority = 0 group by 1",
    )
    assert total == size
    trace_id, span_id = ids(one)
    assert written.startswith(f"00-{trace_id:032x}-{span_id:016x}-0")
    client.do("q", spans.mux(lambda job: None))
    assert parent(spans.one("process q t")) == ids(one)


def test_later_attempts_and_a_requeue_are_linked_to_the_request_that_made_the_job(
    colour: Colour, spans: Spans, conn: psycopg.Connection
) -> None:
    answers: Iterator[Result | None] = iter(
        [Reschedule(0), Retry(0, error="busy"), MoveToDlq(KeyError("x")), None]
    )
    mux = spans.mux(lambda job: next(answers))
    client = colour.client(on_enqueue=spans.telemetry.on_enqueue)
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    for _ in range(3):
        client.do("q", mux)
    conn.execute("update bgjob_dead_job set job_created_at = job_created_at - interval '1 h'")
    client.dlq.requeue("a")
    client.do("q", mux)
    send = spans.one("send q")
    runs = spans.named("process q t")
    assert [parent(run) for run in runs] == [ids(send), ids(send), None, None]
    assert [links(run) for run in runs] == [[], [], [ids(send)], [ids(send)]]
    assert len({ids(run)[0] for run in runs}) == 3
    told = [
        ((run.attributes or {})["bgjob.outcome"], (run.attributes or {}).get("error.type"))
        for run in runs
    ]
    assert told == [
        ("rescheduled", None),
        ("retried", "retried"),
        ("dead", "KeyError"),
        ("completed", None),
    ]
    codes = [(run.status.status_code, run.status.description) for run in runs]
    assert codes == [
        (StatusCode.UNSET, None),
        (StatusCode.ERROR, "busy"),
        (StatusCode.ERROR, "KeyError: 'x'"),
        (StatusCode.UNSET, None),
    ]


@pytest.mark.parametrize(
    ("relation", "delay", "is_child"),
    [
        ("auto", 0, True),
        ("auto", 61, False),
        ("link", 0, False),
        ("parent", 61, True),
    ],
)
def test_the_relation_can_be_chosen(
    plain_client: Client, conn: psycopg.Connection, relation: Relation, delay: int, is_child: bool
) -> None:
    spans = Spans(relation=relation)
    with spans.telemetry.on_enqueue([EnqueueRequest("q", "t")]) as [request]:  # by hand
        plain_client.enqueue(request)
    conn.execute("update bgjob_job set created_at = created_at - %s", (timedelta(seconds=delay),))
    plain_client.do("q", spans.mux(lambda job: None))
    send, process = ids(spans.one("send q")), spans.one("process q t")
    assert (parent(process), links(process)) == ((send, []) if is_child else (None, [send]))


@both_styles
def test_a_child_of_a_transactional_job_continues_the_trace(
    launcher: Launcher, dsn: str, spans: Spans, style: Style
) -> None:
    async_client = AsyncClient(dsn, on_enqueue=spans.telemetry.on_enqueue)
    with Client(dsn, on_enqueue=spans.telemetry.on_enqueue) as client:

        def plain(job: Job, conn: psycopg.Connection[Any]) -> None:
            client.enqueue(EnqueueRequest("q", "child"), conn=conn)

        async def coroutine(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
            await async_client.enqueue(EnqueueRequest("q", "child"), conn=conn)

        body: Any = plain if style == "plain" else coroutine
        mux = spans.mux(body, transactional=True).register("child", lambda job: None)
        client.enqueue(EnqueueRequest("q", "t"))
        launcher.start(mux, observer=[spans.telemetry, recorder := Recorder()])
        recorder.wait_for("completed", times=2)
    first, second = spans.named("send q")
    assert parent(spans.one("process q t")) == ids(first)
    assert parent(second) == ids(spans.one("process q t"))
    assert parent(spans.one("process q child")) == ids(second)


def test_a_workers_spans_tell_how_the_job_ended(
    launcher: Launcher, spans: Spans, conn: psycopg.Connection
) -> None:
    gate = Gate()
    recorder = Recorder()

    def body(job: Job) -> None:
        if job.id == "fails":
            raise ValueError("bad")
        if job.id != "works":
            gate(job)

    async def hangs(job: Job) -> None:
        import asyncio

        await asyncio.sleep(PATIENCE)

    mux = spans.mux(body, max_attempts=1).register(
        "hangs", hangs, timeout=0.01, backoff=Backoff.constant(3600)
    )
    launcher.start(mux, observer=[recorder, spans.telemetry], poll_interval=0.02, concurrency=4)
    launcher.client.bulk_enqueue(
        [EnqueueRequest("q", "t", id=id_) for id_ in ("works", "fails", "lost", "cancelled")]
    )
    launcher.client.enqueue(EnqueueRequest("q", "hangs", id="hangs"))
    gate.wait()
    gate.wait()
    launcher.client.jobs.cancel("cancelled")
    conn.execute("update bgjob_job set token = token + 1 where id = 'lost'")
    recorder.wait_for("cancelled")
    gate.released.set()
    for event, id_ in (("lost", "lost"), ("dead", "fails"), ("retried", "hangs")):
        recorder.wait_for(event, id_)
    assert eventually(lambda: len(spans.all) == 5)
    told = {
        str((span.attributes or {})["messaging.message.id"]): (
            (span.attributes or {})["bgjob.outcome"],
            (span.attributes or {}).get("error.type"),
            span.status.status_code,
        )
        for span in spans.all
    }
    assert told == {
        "works": ("completed", None, StatusCode.UNSET),
        "fails": ("dead", "ValueError", StatusCode.ERROR),
        "lost": ("lost", "lost", StatusCode.ERROR),
        "cancelled": ("cancelled", None, StatusCode.UNSET),
        "hangs": ("timed_out", "JobTimeoutError", StatusCode.ERROR),
    }
    [fails] = [s for s in spans.all if s.status.description == "ValueError: bad"]
    [raised] = fails.events
    assert (raised.attributes or {})["exception.type"] == "ValueError"
    [(number,)] = rows(conn, "select number from bgjob_worker")
    assert (spans.all[-1].attributes or {}).get("bgjob.job.worker") in (None, number)
    assert len(spans.telemetry._runs) == 0
    metrics = spans.metrics()
    assert sum(n for _, n in metrics["messaging.client.consumed.messages"]) == 5
    outcomes = {
        (labels["bgjob.job.type"], labels["bgjob.outcome"]): n
        for labels, n in metrics["messaging.process.duration"]
    }
    assert outcomes == {
        **{("t", name): 1 for name in ("completed", "dead", "lost", "cancelled")},
        ("hangs", "timed_out"): 1,
    }
    assert all("messaging.message.id" not in labels for m in metrics.values() for labels, _ in m)


def test_verbose_telemetry_has_a_span_of_the_settlement(launcher: Launcher) -> None:
    spans = Spans(verbose=True)
    launcher.client.enqueue(EnqueueRequest("q", "t", id="a"))
    launcher.start(spans.mux(lambda job: None), observer=spans.telemetry)
    assert eventually(lambda: len(spans.all) == 2)
    process, settle = spans.one("process q t"), spans.one("settle q")
    assert (parent(settle), settle.kind) == (ids(process), SpanKind.CLIENT)
    assert settle.start_time == process.end_time


HOSTILE = [
    {"traceparent": 7},
    {"traceparent": ["00-1-2-3"]},
    {"traceparent": "00-00000000000000000000000000000000-0000000000000000-01"},
    {"traceparent": "x" * 4000},
    {
        "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        "tracestate": "é=,;",
        "baggage": "%",
    },
    {"baggage": {"a": 1}},
]


@pytest.mark.parametrize("headers", HOSTILE, ids=range(len(HOSTILE)))
def test_headers_that_are_no_context_do_no_harm(
    plain_client: Client, spans: Spans, headers: dict[str, Any]
) -> None:
    plain_client.enqueue(EnqueueRequest("q", "t", headers=headers))
    plain_client.do("q", spans.mux(lambda job: None))
    assert (spans.one("process q t").attributes or {})["bgjob.outcome"] == "completed"


def test_a_job_whose_headers_have_no_room_is_enqueued_all_the_same(
    dsn: str, spans: Spans, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(dsn, on_enqueue=spans.telemetry.on_enqueue) as client:
        token = context.attach(baggage.set_baggage("user", "x" * 4000))
        try:
            client.enqueue(EnqueueRequest("q", "t", id="a", headers={"tenant": "x" * 1000}))
            client.enqueue(EnqueueRequest("q", "t", id="b", headers={"tenant": "x" * 4080}))
        finally:
            context.detach(token)
    a, b = (headers for (headers,) in rows(conn, "select headers from bgjob_job order by id"))
    assert (set(a), set(b)) == ({"tenant", "traceparent"}, {"tenant"})
    assert "job 'b' is enqueued without a trace context" in caplog.text


def test_without_an_sdk_nothing_is_written(dsn: str, conn: psycopg.Connection) -> None:
    telemetry = Telemetry()
    mux = Mux(middleware=[telemetry.middleware]).register("t", lambda job: None)
    with Client(dsn, on_enqueue=telemetry.on_enqueue) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        assert rows(conn, "select headers from bgjob_job") == [(None,)]
        client.do("q", mux)


def test_an_unknown_relation_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, parent and link, not 'child'"):
        Telemetry(relation="child")  # type: ignore[arg-type]


PRODUCER = """
import json, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from bgjob import Client, EnqueueRequest
from bgjob.ext.opentelemetry import Telemetry

trace.set_tracer_provider(TracerProvider())
with Client(sys.argv[1], on_enqueue=Telemetry().on_enqueue) as client:
    with trace.get_tracer("app").start_as_current_span("request") as span:
        client.enqueue(EnqueueRequest("q", "t"))
print(json.dumps(span.get_span_context().trace_id))
"""


def test_a_trace_continues_in_another_process(launcher: Launcher, dsn: str, spans: Spans) -> None:
    program = [sys.executable, "-c", PRODUCER, dsn]
    done = subprocess.run(program, capture_output=True, timeout=PATIENCE, check=True)
    launcher.start(spans.mux(lambda job: None), observer=spans.telemetry)
    assert eventually(lambda: spans.all)
    assert ids(spans.one("process q t"))[0] == json.loads(done.stdout)


@both_styles
def test_many_jobs_at_once_do_not_mix_their_spans(
    launcher: Launcher, dsn: str, spans: Spans, style: Style
) -> None:
    together = threading.Barrier(4)

    def plain(job: Job) -> None:
        together.wait(PATIENCE)
        with spans.tracer.start_as_current_span(f"work {job.id}"):
            pass

    async def coroutine(job: Job) -> None:
        import asyncio

        await asyncio.sleep(0)
        with spans.tracer.start_as_current_span(f"work {job.id}"):
            await asyncio.sleep(0)

    body: Any = plain if style == "plain" else coroutine
    with Client(dsn, on_enqueue=spans.telemetry.on_enqueue) as client:
        for id_ in "abcd":
            client.enqueue(EnqueueRequest("q", "t", id=id_))
    launcher.start(spans.mux(body), observer=spans.telemetry, concurrency=4)
    assert eventually(lambda: len(spans.named("process q t")) == 4)
    runs = {(s.attributes or {})["messaging.message.id"]: s for s in spans.named("process q t")}
    for id_ in "abcd":
        assert parent(spans.one(f"work {id_}")) == ids(runs[id_])
    assert len({ids(run)[0] for run in runs.values()}) == 4


@both_styles
def test_a_call_of_a_batch_handler_is_one_span_that_links_to_each_enqueue(
    launcher: Launcher, spans: Spans, style: Style
) -> None:
    observer = Recorder()

    def plain(jobs: list[Job]) -> dict[str, Retry]:
        return {"b": Retry(60.0)}

    async def coroutine(jobs: list[Job]) -> dict[str, Retry]:
        return plain(jobs)

    mux = spans.mux(plain if style == "plain" else coroutine, batch=3, batch_wait=60)
    with Client(launcher.dsn, on_enqueue=spans.telemetry.on_enqueue) as client:
        for id_ in "abc":
            client.enqueue(EnqueueRequest("q", "t", id=id_))
    launcher.start(mux, observer=[observer, spans.telemetry])
    observer.wait_for("completed", times=2)
    observer.wait_for("retried", "b")
    span = spans.one("process q t")
    assert sorted(links(span)) == sorted(ids(each) for each in spans.named("send q"))
    assert span.attributes == {
        **PROCESS,
        "messaging.batch.message_count": 3,
        "bgjob.job.type": "t",
        "bgjob.outcome": "completed",
    }
    assert spans.metrics()["messaging.client.consumed.messages"] == [(PROCESS, 3)]
