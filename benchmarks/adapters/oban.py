"""Oban for Python, the open-source edition, embedded as its guides show."""

# mypy: disable-error-code="import-not-found, untyped-decorator"
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from adapters.on_postgres import OnPostgres
from adapters.peer import QUEUE, Ran
from oban import Oban, worker
from oban.schema import install

# "I/O-bound jobs can often use higher concurrency" (defining_queues): 10 drained 1,700 jobs/s,
# 100 and 300 about 3,000, and 1000 a little more.
_LIMIT = 1000


def _nothing(_: int) -> None: ...


@worker(queue=QUEUE)
class Noop:
    """Found by its name, so its callback is an attribute of the class."""

    new: Callable[..., Any]  # added by the decorator
    ran: Ran = staticmethod(_nothing)

    async def process(self, job: Any) -> None:
        Noop.ran(job.args["n"])


class System(OnPostgres):
    """The loop of its command; the default pool, "comfortable for most deployments"."""

    packages = "oban", "psycopg", "psycopg-binary", "uvloop"
    settings = {
        "event loop": "uvloop",
        "limit of the queue": _LIMIT,
        "connections": "a pool of 1 to 10",
    }
    unfinished = "select count(*) from oban_jobs where state <> 'completed'"

    async def setup(self) -> None:
        async with await Oban.create_pool(self.url) as pool:
            await install(pool)

    def make(self, numbers: Sequence[int]) -> Sequence[Any]:
        return [Noop.new({"n": n}) for n in numbers]

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[Callable[[Sequence[Any]], Awaitable[object]]]:
        async with await Oban.create_pool(self.url) as pool:
            yield Oban(pool=pool).enqueue_many

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[Callable[[int], Awaitable[object]]]:
        async with await Oban.create_pool(self.url) as pool, Oban(pool=pool) as oban:
            yield lambda number: oban.enqueue(Noop.new({"n": number}))

    @asynccontextmanager
    async def worker(self, ran: Ran) -> AsyncIterator[None]:
        Noop.ran = staticmethod(ran)
        async with await Oban.create_pool(self.url) as pool:
            async with Oban(pool=pool, queues={QUEUE: _LIMIT}):
                yield
