"""awa-pg, on its append-only storage."""

# mypy: disable-error-code="import-not-found, untyped-decorator"
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from adapters.on_postgres import OnPostgres
from adapters.peer import QUEUE, Ran
from awa import AsyncClient

_QUEUE_CONFIG = {"name": QUEUE, "max_workers": 1000, "claim_batch_size": 500}
_CONNECTIONS = 20


@dataclass
class Noop:
    n: int


class System(OnPostgres):
    """`max_workers` limits a claim: 10 drained 700 jobs/s, 1000 and 2000 drained 6,500."""

    packages = "awa-pg", "psycopg", "psycopg-binary"
    settings = {
        "storage": "queue storage",
        **{name: value for name, value in _QUEUE_CONFIG.items() if name != "name"},
        "max_connections": _CONNECTIONS,
        "bulk enqueue": "enqueue_many_copy",
    }
    # The view awa.jobs and the client's queue_stats() return the same, but took 40 s for
    # 20,000 completed jobs. These are the tables that they read.
    unfinished = """
        select (select count(*) from awa.ready_entries)
            - (select coalesce(sum(completed_count), 0) from awa.receipt_completion_batches)
    """

    async def setup(self) -> None:
        async with self._client() as client:
            await client.migrate()
            await client.install_queue_storage(schema="awa")

    def make(self, numbers: Sequence[int]) -> Sequence[Any]:
        return [Noop(n) for n in numbers]

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[Callable[[Sequence[Any]], Awaitable[object]]]:
        async with self._client() as client:
            await client.health_check()  # connects
            yield lambda jobs: client.enqueue_many_copy(jobs, queue=QUEUE)

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[Callable[[int], Awaitable[object]]]:
        async with self._client() as client:
            yield lambda number: client.insert(Noop(number), queue=QUEUE)

    @asynccontextmanager
    async def worker(self, ran: Ran) -> AsyncIterator[None]:
        async with self._client() as client:

            @client.task(Noop, queue=QUEUE)
            async def noop(job: Any) -> None:
                ran(job.args.n)

            await client.start([_QUEUE_CONFIG])
            yield
            await client.shutdown()

    def _client(self) -> Any:
        return AsyncClient(self.url, max_connections=_CONNECTIONS)
