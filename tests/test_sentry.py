"""Errors, scopes and traces, by the real SDK of Sentry with a transport in memory."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sentry_sdk
from opentelemetry import baggage, context
from opentelemetry.sdk.trace import TracerProvider
from sentry_sdk.scope import Scope
from sentry_sdk.transport import Transport
from support.clients import Colour
from support.database import rows
from support.jobs import a_job
from support.waiting import PATIENCE, eventually
from support.workers import Launcher, Recorder, Style, both_styles, handler

from bgjob import (
    AsyncClient,
    Client,
    EnqueueRequest,
    Job,
    LoggingObserver,
    MoveToDlq,
    Mux,
    Result,
    Retry,
)
from bgjob.ext.opentelemetry import Telemetry
from bgjob.ext.sentry import Sentry


class Inbox(Transport):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.all += [item.payload.json for item in envelope.items if item.payload.json]

    def capture_event(self, event: Any) -> None:  # of older versions
        self.all.append(event)

    @property
    def events(self) -> list[Any]:
        return [each for each in self.all if each.get("type") != "transaction"]

    @property
    def transactions(self) -> list[Any]:
        return [each for each in self.all if each.get("type") == "transaction"]


@contextmanager
def initialized(**options: Any) -> Iterator[Inbox]:
    """Initialize the SDK with a transport in memory, for one test."""
    inbox = Inbox()
    sentry_sdk.init(
        "http://key@localhost/1",
        transport=inbox,
        traces_sample_rate=1.0,
        auto_enabling_integrations=False,
        auto_session_tracking=False,
        enable_backpressure_handling=False,
        **options,
    )
    try:
        yield inbox
    finally:
        sentry_sdk.get_client().close(timeout=0)
        Scope.get_global_scope().set_client(None)


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with initialized() as inbox:
        yield inbox


@pytest.fixture
def sentry(inbox: Inbox) -> Sentry:
    return Sentry()


def mux_of(sentry: Sentry, body: Any, **options: Any) -> Mux:
    return Mux(middleware=[sentry.middleware]).register("t", body, **options)


def started(launcher: Launcher, sentry: Sentry, mux: Mux) -> Recorder:
    recorder = Recorder()
    observers = [LoggingObserver(), sentry, recorder]
    launcher.start(mux, observer=observers, poll_interval=0.02, concurrency=4)
    return recorder


@both_styles
def test_only_the_last_attempt_is_an_event_with_the_scope_of_its_job(
    launcher: Launcher, sentry: Sentry, inbox: Inbox, style: Style
) -> None:
    def body(job: Job) -> Result | None:
        sentry_sdk.set_tag("own", job.attempt)
        sentry_sdk.add_breadcrumb(message=f"attempt {job.attempt}")
        if job.id == "good":
            return None
        try:
            raise ValueError(f"attempt {job.attempt}")
        except ValueError:
            if job.attempt < 2:
                return Retry(0, error="soon")
            raise

    recorder = started(launcher, sentry, mux_of(sentry, handler(style, body), max_attempts=2))
    launcher.client.enqueue(EnqueueRequest("q", "t", id="bad", priority=3))
    recorder.wait_for("dead")
    launcher.client.enqueue(EnqueueRequest("q", "t", id="good"))
    recorder.wait_for("completed")
    assert eventually(lambda: inbox.events)
    [event] = inbox.events
    [exception] = event["exception"]["values"]
    assert (exception["type"], exception["value"]) == ("ValueError", "attempt 2")
    assert exception["mechanism"] == {"type": "bgjob", "handled": False}
    assert exception["stacktrace"]["frames"][-1]["function"] == "body"
    assert event["tags"] == {"bgjob.queue": "q", "bgjob.type": "t", "own": 2}
    assert event["contexts"]["bgjob"] == {
        "id": "bad", "queue": "q", "type": "t", "attempt": 2, "priority": 3
    }  # fmt: skip
    assert event["transaction"] == "t"
    assert [crumb["message"] for crumb in event["breadcrumbs"]["values"]] == ["attempt 2"]
    assert sentry_sdk.get_isolation_scope()._tags == {}
    assert len(sentry._runs) == 0


@both_styles
def test_if_asked_each_failed_attempt_is_an_event(
    launcher: Launcher, inbox: Inbox, style: Style
) -> None:
    answers: Iterator[Any] = iter([ValueError("a"), Retry(0, error="b"), MoveToDlq("c")])

    def body(job: Job) -> Result:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    sentry = Sentry(capture="failed")
    mux = mux_of(sentry, handler(style, body), backoff=lambda attempt: 0)
    recorder = started(launcher, sentry, mux)
    launcher.client.enqueue(EnqueueRequest("q", "t"))
    recorder.wait_for("dead")
    assert eventually(lambda: len(inbox.events) == 3)
    first, *others = inbox.events
    assert first["exception"]["values"][0]["value"] == "a"
    assert [event["message"] for event in others] == ["b", "c"]
    assert [event["level"] for event in inbox.events] == ["error"] * 3
    assert [event["contexts"]["bgjob"]["attempt"] for event in inbox.events] == [1, 2, 3]


@both_styles
def test_an_error_that_the_handler_logged_is_not_captured_twice(
    launcher: Launcher, sentry: Sentry, inbox: Inbox, style: Style
) -> None:
    def body(job: Job) -> None:
        try:
            raise KeyError("x")
        except KeyError:
            logging.getLogger("shop").exception("it failed")
            raise

    recorder = started(launcher, sentry, mux_of(sentry, handler(style, body), max_attempts=1))
    launcher.client.enqueue(EnqueueRequest("q", "t"))
    recorder.wait_for("dead")
    logging.getLogger("bgjob").error("of the worker, not of a job")
    logged, other = (event["logentry"]["message"] for event in inbox.events)
    assert (logged, other) == ("it failed", "of the worker, not of a job")


def test_a_job_that_never_ran_or_timed_out_is_an_event_too(
    launcher: Launcher, sentry: Sentry, inbox: Inbox
) -> None:
    async def hangs(job: Job) -> None:
        sentry_sdk.set_tag("own", "hangs")
        await asyncio.sleep(PATIENCE)

    mux = mux_of(sentry, hangs, timeout=0.01, max_attempts=1)
    recorder = started(launcher, sentry, mux)
    launcher.client.enqueue(EnqueueRequest("q", "unknown", id="a"))
    launcher.client.enqueue(EnqueueRequest("q", "t", id="b"))
    recorder.wait_for("dead", times=2)
    assert eventually(lambda: len(inbox.events) == 2)
    told = {
        event["contexts"]["bgjob"]["id"]: (
            event["exception"]["values"][-1]["type"],
            event["tags"].get("own"),
        )
        for event in inbox.events
    }
    assert told == {"a": ("UnknownTypeError", None), "b": ("JobTimeoutError", "hangs")}


@both_styles
def test_a_job_continues_the_trace_of_its_enqueue(
    colour: Colour, launcher: Launcher, sentry: Sentry, inbox: Inbox, style: Style
) -> None:
    def body(job: Job) -> None:
        raise ValueError("x")

    async def enqueue() -> None:
        async with AsyncClient(colour.dsn, on_enqueue=sentry.on_enqueue) as client:
            with sentry_sdk.start_transaction(name="request"):
                await client.enqueue(EnqueueRequest("q", "t", id="a"))

    if colour.is_async:
        colour.run(enqueue())
    else:
        with Client(colour.dsn, on_enqueue=sentry.on_enqueue) as client:
            with sentry_sdk.start_transaction(name="request"):
                client.enqueue(EnqueueRequest("q", "t", id="a"))
    recorder = started(launcher, sentry, mux_of(sentry, handler(style, body), max_attempts=1))
    recorder.wait_for("dead")
    assert eventually(lambda: inbox.events)
    [event] = inbox.events
    request, process = (each["contexts"]["trace"] for each in inbox.transactions)
    [publish] = inbox.transactions[0]["spans"]
    assert (publish["op"], publish["description"]) == ("queue.publish", "q")
    assert process["trace_id"] == request["trace_id"] == event["contexts"]["trace"]["trace_id"]
    assert process["parent_span_id"] == publish["span_id"]
    assert (process["op"], process["status"]) == ("queue.process", "internal_error")
    assert inbox.transactions[1]["transaction"] == "t"
    data = process["data"]
    assert data["messaging.message.id"] == "a" and data["messaging.destination.name"] == "q"
    assert data["messaging.message.retry.count"] == 0
    assert data["messaging.message.receive.latency"] >= 0


def test_a_bulk_enqueue_and_a_transaction_carry_the_trace_and_keep_others_baggage(
    dsn: str, conn: psycopg.Connection, sentry: Sentry
) -> None:
    with Client(dsn, on_enqueue=sentry.on_enqueue) as client:
        caller = psycopg.connect(dsn)
        with caller, sentry_sdk.start_transaction(name="request"):
            client.bulk_enqueue(
                [
                    EnqueueRequest("q", "t", id="a", headers={"baggage": "x=1,sentry-y=2"}),
                    EnqueueRequest("q", "t", id="b", headers={"tenant": "x" * 4000}),
                    EnqueueRequest("q", "t", id="c", headers={"tenant": "x" * 4080}),
                ],
                conn=caller,
            )
        a, b, c = (found for (found,) in rows(conn, "select headers from bgjob_job order by id"))
    assert set(a) == {"baggage", "sentry-trace"}
    assert a["baggage"].startswith("x=1,sentry-") and "sentry-y" not in a["baggage"]
    assert (set(b), set(c)) == ({"tenant", "sentry-trace"}, {"tenant"})


def test_it_can_be_used_together_with_opentelemetry(
    dsn: str, conn: psycopg.Connection, sentry: Sentry, inbox: Inbox
) -> None:
    provider = TracerProvider()
    telemetry = Telemetry(tracer_provider=provider)
    seen: list[Any] = []
    for on_enqueue in (
        [telemetry.on_enqueue, sentry.on_enqueue],
        [sentry.on_enqueue, telemetry.on_enqueue],
    ):
        mux = Mux(middleware=[telemetry.middleware, sentry.middleware]).register(
            "t", lambda job: seen.append(baggage.get_baggage("user"))
        )
        token = context.attach(baggage.set_baggage("user", "ann"))
        try:
            with Client(dsn, on_enqueue=on_enqueue) as client:
                with sentry_sdk.start_transaction(name="request") as request:
                    client.enqueue(EnqueueRequest("q", "t"))
                [(headers,)] = rows(conn, "select headers from bgjob_job")
        finally:
            context.detach(token)
        assert set(headers) == {"baggage", "sentry-trace", "traceparent"}
        with Client(dsn) as client:
            client.do("q", mux)
        assert inbox.transactions[-1]["contexts"]["trace"]["trace_id"] == request.trace_id
    assert seen == ["ann", "ann"]


@pytest.mark.parametrize("wrong", [7, "x", "0-0-0", ["a"], {"a": 1}], ids=str)
def test_headers_that_are_no_trace_do_no_harm(
    plain_client: Client, sentry: Sentry, inbox: Inbox, wrong: Any
) -> None:
    headers = {"sentry-trace": wrong, "baggage": wrong}
    plain_client.enqueue(EnqueueRequest("q", "t", headers=headers))
    plain_client.do("q", mux_of(sentry, lambda job: None))
    [process] = inbox.transactions
    assert process["contexts"]["trace"]["status"] == "ok"


def test_in_do_what_is_surely_dead_is_an_event(
    colour: Colour, sentry: Sentry, inbox: Inbox
) -> None:
    client = colour.client()
    answers: Iterator[Any] = iter([Retry(0, error="x"), MoveToDlq(KeyError("y"))])
    mux = mux_of(sentry, lambda job: next(answers))
    client.enqueue(EnqueueRequest("q", "t"))
    client.do("q", mux)
    assert inbox.events == []
    client.do("q", mux)
    [event] = inbox.events
    assert event["exception"]["values"][0]["type"] == "KeyError"
    assert event["contexts"]["bgjob"]["attempt"] == 2


@both_styles
def test_jobs_at_once_do_not_mix_their_scopes(
    launcher: Launcher, sentry: Sentry, inbox: Inbox, style: Style
) -> None:
    together = threading.Barrier(4)

    def plain(job: Job) -> None:
        sentry_sdk.set_tag("own", job.id)
        together.wait(PATIENCE)
        raise ValueError(job.id)

    async def coroutine(job: Job) -> None:
        sentry_sdk.set_tag("own", job.id)
        await asyncio.sleep(0.001)
        raise ValueError(job.id)

    body: Any = plain if style == "plain" else coroutine
    launcher.client.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in "abcd"])
    recorder = started(launcher, sentry, mux_of(sentry, body, max_attempts=1))
    recorder.wait_for("dead", times=4)
    assert eventually(lambda: len(inbox.events) == 4)
    for event in inbox.events:
        assert event["tags"]["own"] == event["exception"]["values"][0]["value"]


@pytest.mark.skipif(not hasattr(sentry_sdk, "traces"), reason="the SDK streams no spans")
def test_where_the_sdk_streams_spans_they_are_of_one_trace(dsn: str) -> None:
    answers: Iterator[Any] = iter([None, MoveToDlq(KeyError("x"))])
    with initialized(trace_lifecycle="stream") as inbox:
        sentry = Sentry()
        mux = mux_of(sentry, lambda job: next(answers))
        with Client(dsn, on_enqueue=sentry.on_enqueue) as client:
            with sentry_sdk.traces.start_span(name="request") as request:
                client.bulk_enqueue([EnqueueRequest("q", "t", id="a")])
                client.bulk_enqueue(EnqueueRequest("q", "t", id=id_) for id_ in "b")
            client.do("q", mux)
            client.do("q", mux)
        sentry.middleware(lambda jobs: None)([a_job(type="many"), a_job(type="many")])
        sentry_sdk.flush(PATIENCE)
        [event] = [each for each in inbox.all if "exception" in each]
        spans = [span for each in inbox.all for span in each.get("items", ())]
    told = [
        (span["attributes"]["sentry.op"]["value"], span["name"], span["status"])
        for span in spans
        if "sentry.op" in span["attributes"]
    ]
    assert sorted(told) == [
        ("queue.process", "many", "ok"),
        ("queue.process", "t", "error"),
        ("queue.process", "t", "ok"),
        ("queue.publish", "bulk enqueue", "ok"),
        ("queue.publish", "q", "ok"),
    ]
    of_one = {span["trace_id"] for span in spans if span["name"] != "many"}
    assert of_one == {request.trace_id} != {span["trace_id"] for span in spans}
    assert event["contexts"]["trace"]["trace_id"] == request.trace_id


def test_before_init_nothing_is_written_or_captured(dsn: str, conn: psycopg.Connection) -> None:
    sentry = Sentry()
    with Client(dsn, on_enqueue=sentry.on_enqueue) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        assert rows(conn, "select headers from bgjob_job") == [(None,)]
        client.do("q", mux_of(sentry, lambda job: MoveToDlq("x")))


def test_an_unknown_capture_is_refused() -> None:
    with pytest.raises(ValueError, match="capture must be dead or failed, not 'all'"):
        Sentry(capture="all")  # type: ignore[arg-type]


PRODUCER = """
import json, sys
import sentry_sdk
from sentry_sdk.transport import Transport
from bgjob import Client, EnqueueRequest
from bgjob.ext.sentry import Sentry

class Nowhere(Transport):
    def capture_envelope(self, envelope): pass

sentry_sdk.init(
    "http://key@localhost/1", transport=Nowhere, traces_sample_rate=1.0, default_integrations=False
)
with Client(sys.argv[1], on_enqueue=Sentry().on_enqueue) as client:
    with sentry_sdk.start_transaction(name="request") as transaction:
        client.enqueue(EnqueueRequest("q", "t"))
print(json.dumps(transaction.trace_id))
"""


def test_a_trace_continues_in_another_process(
    launcher: Launcher, dsn: str, sentry: Sentry, inbox: Inbox
) -> None:
    program = [sys.executable, "-c", PRODUCER, dsn]
    done = subprocess.run(program, capture_output=True, timeout=PATIENCE, check=True)
    recorder = started(launcher, sentry, mux_of(sentry, lambda job: MoveToDlq(KeyError("x"))))
    recorder.wait_for("dead")
    assert eventually(lambda: inbox.events)
    [event], [process] = inbox.events, inbox.transactions
    for each in (event, process):
        assert each["contexts"]["trace"]["trace_id"] == json.loads(done.stdout)


@both_styles
def test_of_a_batch_only_the_job_that_fails_is_an_event(
    launcher: Launcher, sentry: Sentry, inbox: Inbox, style: Style
) -> None:
    def plain(jobs: list[Job]) -> None:
        if any(job.id == "bad" for job in jobs):
            raise ValueError("cannot do it")

    async def coroutine(jobs: list[Job]) -> None:
        plain(jobs)

    body = plain if style == "plain" else coroutine
    launcher.client.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in ("a", "bad", "c")])
    mux = mux_of(sentry, body, max_attempts=1, batch=3, batch_wait=60)
    recorder = started(launcher, sentry, mux)
    recorder.wait_for("dead", "bad")
    recorder.wait_for("completed", times=2)
    assert eventually(lambda: inbox.events)
    [event] = inbox.events
    assert event["contexts"]["bgjob"]["id"] == "bad"
    assert event["tags"] == {"bgjob.queue": "q", "bgjob.type": "t"}
