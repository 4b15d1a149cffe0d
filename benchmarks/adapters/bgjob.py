"""bgjob, under the same rules as the other systems."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter

import psycopg

from adapters.on_postgres import OnPostgres
from adapters.peer import QUEUE, Enqueued, Ran
from bgjob import AsyncClient, Client, EnqueueRequest, Job, Mux, Worker
from bgjob.schema import init_sql


class System(OnPostgres):
    """All options but the concurrency have their defaults."""

    packages = "bgjob", "psycopg", "psycopg-binary"
    settings = {"handlers": "plain functions on threads", "concurrency": 10}
    has_keys = True
    unfinished = "select count(*) from bgjob_job"

    async def setup(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(init_sql())

    async def enqueue(self, count: int) -> Enqueued:
        began = perf_counter()
        requests = [EnqueueRequest(QUEUE, "noop", {"n": n}) for n in range(count)]
        made = perf_counter()
        with Client(self.url) as client:
            client.dlq.list(limit=1)  # connects
            asked = perf_counter()
            client.bulk_enqueue(requests)
            return Enqueued(made - began, perf_counter() - asked)

    async def enqueue_keyed(self, count: int, keys: int) -> None:
        with Client(self.url) as client:
            client.bulk_enqueue(
                [
                    EnqueueRequest(QUEUE, "noop", {"n": n}, exclusive=str(n % keys))
                    for n in range(count)
                ]
            )

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[Callable[[], Awaitable[object]]]:
        async with AsyncClient(self.url) as client:
            yield lambda: client.enqueue(EnqueueRequest(QUEUE, "noop", {"n": 0}))

    @asynccontextmanager
    async def worker(self, ran: Ran) -> AsyncIterator[None]:
        def noop(job: Job) -> None:
            ran(job.json()["n"])

        mux = Mux().register("noop", noop)
        with Client(self.url) as client, Worker(client, QUEUE, mux, concurrency=10):
            yield
