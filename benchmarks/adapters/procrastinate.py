"""Procrastinate, with its asynchronous connector and tasks: "the recommended way to use it"."""

# mypy: disable-error-code="import-not-found, untyped-decorator"
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from adapters.on_postgres import OnPostgres
from adapters.peer import QUEUE, Ran
from procrastinate import App, PsycopgConnector

_CONCURRENCY = 10  # 5 and 30 were not faster


class System(OnPostgres):
    """It deletes finished jobs, so that the table stays small."""

    packages = "procrastinate", "psycopg", "psycopg-binary"
    settings = {
        "connector": "PsycopgConnector",
        "concurrency": _CONCURRENCY,
        "max_size of the pool": _CONCURRENCY + 2,
        "delete_jobs": "always",
    }
    has_keys = True
    unfinished = "select count(*) from procrastinate_jobs where status in ('todo', 'doing')"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._ran: Ran = lambda _: None
        # One connection for each job that ends, one to fetch and one to listen.
        self._app = App(connector=PsycopgConnector(conninfo=url, max_size=_CONCURRENCY + 2))

        @self._app.task(queue=QUEUE, name="noop")
        async def noop(n: int) -> None:
            self._ran(n)

        self._task: Any = noop

    async def setup(self) -> None:
        async with self._app.open_async():
            await self._app.schema_manager.apply_schema_async()

    def make(self, numbers: Sequence[int]) -> Sequence[Any]:
        return [{"n": n} for n in numbers]

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[Callable[[Sequence[Any]], Awaitable[object]]]:
        async with self._app.open_async():
            await self._app.check_connection_async()
            yield lambda jobs: self._task.batch_defer_async(*jobs)

    async def enqueue_keyed(self, count: int, keys: int) -> None:
        async with self._app.open_async():
            for key in range(keys):
                jobs = [{"n": n} for n in range(key, count, keys)]
                await self._task.configure(lock=str(key)).batch_defer_async(*jobs)

    @asynccontextmanager
    async def producer(self) -> AsyncIterator[Callable[[int], Awaitable[object]]]:
        async with self._app.open_async():
            yield lambda number: self._task.defer_async(n=number)

    @asynccontextmanager
    async def worker(self, ran: Ran) -> AsyncIterator[None]:
        self._ran = ran
        async with self._app.open_async():
            running = asyncio.create_task(
                self._app.run_worker_async(
                    queues=[QUEUE],
                    concurrency=_CONCURRENCY,
                    delete_jobs="always",
                    install_signal_handlers=False,
                )
            )
            yield
            running.cancel()  # running jobs end first
            with suppress(asyncio.CancelledError):
                await running
