"""PgQueuer, with the driver and the loop of its own benchmark."""

# mypy: disable-error-code="import-not-found, untyped-decorator"
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from adapters.on_postgres import OnPostgres
from adapters.peer import QUEUE, Ran
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries

# "Increase batch_size when jobs are short-lived" (guides/performance-tuning): 500 was the
# fastest of 50, 100, 200, 500 and 2000, and one consumer faster than two or five in the process.
_BATCH_SIZE = 500


class System(OnPostgres):
    """Durable tables, the default; "a single connection for QueueManager"."""

    packages = "pgqueuer", "asyncpg", "uvloop"
    settings = {
        "driver": "asyncpg, one connection",
        "event loop": "uvloop",
        "batch_size": _BATCH_SIZE,
        "concurrency": "not limited",
        "durability": "durable",
        "tables": "`pgq autovac` applied, as recommended",
    }
    unfinished = "select count(*) from pgqueuer"

    async def setup(self) -> None:
        async with self._queries() as queries:
            await queries.install()
            await queries.optimize_autovacuum()

    def make(self, numbers: Sequence[int]) -> Sequence[Any]:
        return [str(n).encode() for n in numbers]

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[Callable[[Sequence[Any]], Awaitable[object]]]:
        async with self._queries() as queries:
            yield lambda jobs: queries.enqueue([QUEUE] * len(jobs), jobs, [0] * len(jobs))

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[Callable[[int], Awaitable[object]]]:
        async with self._queries() as queries:
            yield lambda number: queries.enqueue(QUEUE, str(number).encode())

    @asynccontextmanager
    async def worker(self, ran: Ran) -> AsyncIterator[None]:
        async with self._queries() as queries:
            pgq = PgQueuer(queries.driver)

            @pgq.entrypoint(QUEUE)
            async def noop(job: Any) -> None:
                ran(int(job.payload))

            running = asyncio.create_task(pgq.run(batch_size=_BATCH_SIZE))
            yield
            pgq.shutdown.set()
            await running

    @asynccontextmanager
    async def _queries(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.url)
        try:
            yield Queries(AsyncpgDriver(connection))
        finally:
            await connection.close()
