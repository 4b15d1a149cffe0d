import os
from threading import Event

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from bgjob import Client, EnqueueRequest, Job, LoggingObserver, Mux, Worker
from bgjob.ext.opentelemetry import Telemetry


def line(span: ReadableSpan) -> str:
    outcome = (span.attributes or {}).get("bgjob.outcome", "")
    return f"{span.name}, {'child' if span.parent else 'root'} {outcome}".strip() + "\n"


provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=line)))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("shop")

telemetry = Telemetry()
mux = Mux(middleware=[telemetry.middleware])
written = Event()


@mux.handler("confirm")
def confirm(job: Job) -> None:
    with tracer.start_as_current_span("write mail"):
        written.set()


with Client(os.environ["DATABASE_URL"], on_enqueue=telemetry.on_enqueue) as client:
    with tracer.start_as_current_span("POST /orders"):
        client.enqueue(EnqueueRequest("mail", "confirm"))
    observers = [LoggingObserver(), telemetry]
    Worker(client, "mail", mux, observer=observers).run_until(written)
