"""Clients of both colours, to be used without `await`."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from bgjob import AsyncClient, Client, EnqueueRequest, MoveToDlq, Mux

HOSTILE = [
    "'; drop table bgjob_job; --",
    'say "x", {NULL}',
    "back\\slash\\",
    "%s %(id)s %%",
    "line\nfeed\ttab\x7f",
    "null",
    " ",
    "é \u202e \U0001f600 \uffff",
    "x" * 255,
    "\U0001f600" * 255,
]


class Blocking:
    """An object whose coroutines are run to their end, so that a test is written once."""

    def __init__(self, target: Any, run: Callable[[Any], Any]) -> None:
        self.target = target
        self._run = run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.target, name)
        if not callable(value):
            return Blocking(value, self._run) if name in ("dlq", "jobs", "limits") else value

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs = {k: getattr(v, "target", v) for k, v in kwargs.items()}
            answer = value(*args, **kwargs)
            if isinstance(answer, AbstractAsyncContextManager):
                return self._entered(answer)
            return self._run(answer) if inspect.isawaitable(answer) else answer

        return call

    @contextmanager
    def _entered(self, manager: AbstractAsyncContextManager[Any]) -> Iterator[Any]:
        with ExitStack() as stack:
            entered = self._run(manager.__aenter__())
            stack.push(lambda *error: self._run(manager.__aexit__(*error)))
            yield entered


class Colour:
    """Makes clients, pools and connections of one colour, all to be used without `await`."""

    def __init__(self, dsn: str, *, is_async: bool) -> None:
        self.dsn = dsn
        self.is_async = is_async
        self._stack = ExitStack()
        if is_async:
            self._runner = self._stack.enter_context(asyncio.Runner())

    def run(self, awaitable: Any) -> Any:
        async def awaited() -> Any:
            return await awaitable

        return self._runner.run(awaited())

    def client(self, source: Any = None, **options: Any) -> Any:
        source = getattr(source, "target", source or self.dsn)
        made = AsyncClient(source, **options) if self.is_async else Client(source, **options)
        return self._closed_later(made)

    def connect(self, **options: Any) -> Any:
        if self.is_async:
            return self._closed_later(
                self.run(psycopg.AsyncConnection.connect(self.dsn, **options))
            )
        return self._closed_later(psycopg.connect(self.dsn, **options))

    def pool(self, *, size: int = 1, **kwargs: Any) -> Any:
        kind: Any = AsyncConnectionPool if self.is_async else ConnectionPool
        pool = kind(self.dsn, min_size=1, max_size=size, timeout=10, open=False, kwargs=kwargs)
        blocking = self._closed_later(pool)
        blocking.open()
        return blocking

    @contextmanager
    def pipeline(self, caller: Blocking) -> Iterator[None]:
        """Put a connection into pipeline mode."""
        pipeline = caller.target.pipeline()
        with ExitStack() as stack:
            if self.is_async:
                self.run(pipeline.__aenter__())
                stack.callback(lambda: self.run(pipeline.__aexit__(None, None, None)))
            else:
                stack.enter_context(pipeline)
            yield

    def at_once(self, *calls: Callable[[Any], Any], client: Any = None) -> list[Any]:
        """Make concurrent calls of one client; each is passed the client."""
        client = (client or self.client()).target
        if self.is_async:

            async def gathered() -> list[Any]:
                return await asyncio.gather(*(call(client) for call in calls))

            return list(self.run(gathered()))
        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(lambda call: call(client), calls))

    def _closed_later(self, target: Any) -> Blocking:
        blocking = Blocking(target, self.run)
        self._stack.callback(blocking.close)
        return blocking

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(params=[False, True], ids=["Client", "AsyncClient"])
def colour(request: pytest.FixtureRequest, dsn: str) -> Iterator[Colour]:
    colour = Colour(dsn, is_async=request.param)
    try:
        yield colour
    finally:
        colour.close()


@pytest.fixture
def client(colour: Colour) -> Any:
    return colour.client()


@pytest.fixture
def plain_client(dsn: str) -> Iterator[Client]:
    with Client(dsn) as client:
        yield client


def dead_letter(client: Any, *requests: EnqueueRequest, error: str = "why") -> None:
    """Move new jobs to the dead-letter table, one after another."""
    for request in requests:
        client.enqueue(request)
        client.do(request.queue, Mux().register(request.type, lambda _: MoveToDlq(error)))
