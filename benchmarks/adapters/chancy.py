"""Chancy, with the executor that it recommends for many small jobs."""

# mypy: disable-error-code="import-not-found, untyped-decorator"
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from adapters.on_postgres import OnPostgres
from adapters.peer import QUEUE, Ran
from chancy import Chancy, Queue, Worker, job

# A fetch fills the free slots, after each job (eager_polling) or 5 s later. A concurrency of 10
# drained 1,700 jobs/s; 100, the executor's default, 3,100; 1000 drained 3,700.
_CONCURRENCY = 1000
_SEND_OUTGOING_INTERVAL = 0.1

_ran: Ran = lambda _: None


@job(queue=QUEUE)
async def noop(*, n: int) -> None:
    """Found by its path, so its callback is an attribute and not an argument."""
    _ran(n)


class System(OnPostgres):
    """Results are stored more often than once a second, the default."""

    packages = "chancy", "psycopg", "psycopg-binary"
    settings = {
        "executor": "Async",
        "concurrency": _CONCURRENCY,
        "eager_polling": True,
        "send_outgoing_interval": _SEND_OUTGOING_INTERVAL,
        "batch_size of push_many": 1000,
        "logging": "warnings",
    }
    unfinished = "select count(*) from chancy_jobs where state <> 'succeeded'"

    async def setup(self) -> None:
        async with self._chancy() as chancy:
            await chancy.migrate()
            await chancy.declare(
                Queue(
                    QUEUE,
                    concurrency=_CONCURRENCY,
                    executor=Chancy.Executor.Async,
                    eager_polling=True,
                )
            )

    def make(self, numbers: Sequence[int]) -> Sequence[Any]:
        return [noop.job.with_kwargs(n=n) for n in numbers]

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[Callable[[Sequence[Any]], Awaitable[object]]]:
        async with self._chancy() as chancy:
            await chancy.get_all_queues()  # connects

            async def write(jobs: Sequence[Any]) -> None:
                async for _ in chancy.push_many(jobs, batch_size=1000):
                    pass

            yield write

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[Callable[[int], Awaitable[object]]]:
        async with self._chancy() as chancy:
            yield lambda number: chancy.push(noop.job.with_kwargs(n=number))

    @asynccontextmanager
    async def worker(self, ran: Ran) -> AsyncIterator[None]:
        global _ran
        _ran = ran
        async with self._chancy() as chancy:
            worker = Worker(chancy, register_signal_handlers=False)
            worker.send_outgoing_interval = _SEND_OUTGOING_INTERVAL
            async with worker:
                yield

    def _chancy(self) -> Any:
        return Chancy(self.url, log=logging.getLogger("chancy"))
