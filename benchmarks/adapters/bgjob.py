"""bgjob, under the same rules as the other systems."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from adapters.on_postgres import OnPostgres
from adapters.peer import QUEUE, Ran
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

    def make(self, numbers: Sequence[int]) -> Sequence[Any]:
        return [EnqueueRequest(QUEUE, "noop", {"n": n}) for n in numbers]

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[Callable[[Sequence[Any]], Awaitable[object]]]:
        with Client(self.url) as client:
            client.dlq.list(limit=1)  # connects

            async def write(jobs: Sequence[Any]) -> None:
                client.bulk_enqueue(jobs)

            yield write

    async def enqueue_keyed(self, count: int, keys: int) -> None:
        with Client(self.url) as client:
            client.bulk_enqueue(
                [
                    EnqueueRequest(QUEUE, "noop", {"n": n}, exclusive=str(n % keys))
                    for n in range(count)
                ]
            )

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[Callable[[int], Awaitable[object]]]:
        async with AsyncClient(self.url) as client:
            yield lambda number: client.enqueue(EnqueueRequest(QUEUE, "noop", {"n": number}))

    @asynccontextmanager
    async def worker(self, ran: Ran) -> AsyncIterator[None]:
        def noop(job: Job) -> None:
            ran(job.json()["n"])

        mux = Mux().register("noop", noop)
        with Client(self.url) as client, Worker(client, QUEUE, mux, concurrency=10):
            yield
