import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from bgjob import Client, EnqueueRequest, Job, Mux

tenant = ContextVar("tenant", default="nobody")
mux = Mux()


@contextmanager
def of_tenant(requests: Iterable[EnqueueRequest]) -> Iterator[Iterable[EnqueueRequest]]:
    yield (request.with_headers({"tenant": tenant.get()}) for request in requests)


@mux.handler("greet")
def greet(job: Job) -> None:
    print("hello,", job.json(), dict(job.headers))


with Client(os.environ["DATABASE_URL"], on_enqueue=of_tenant) as client:
    tenant.set("acme")
    client.enqueue(EnqueueRequest("greetings", "greet", "Ann", headers={"request": "r-1"}))
    client.bulk_enqueue(EnqueueRequest("greetings", "greet", name) for name in ("Bob", "Cat"))
    for _ in range(3):
        client.do("greetings", mux)
