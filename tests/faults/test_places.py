"""Fault 72: a program whose workers have several databases, one of which goes away."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from support.waiting import eventually

from bgjob.ext.embedded import EmbeddedServer
from faults.world import Local, World

both_workers = pytest.mark.parametrize("is_async", [False, True], ids=["Worker", "AsyncWorker"])


class Program:
    """Runs the workers of two databases as the program of the guide does.

    Attributes:
        refused: the errors of workers that could not start.
        runs: a future for each worker, which is done when the worker has ended.

    """

    def __init__(self, hurt: World, world: World, *, is_async: bool) -> None:
        self.away = hurt.make(hurt.mux(is_async=is_async), is_async=is_async)
        self.near = hurt.make(world.mux(is_async=is_async), is_async=is_async, dsn=world.dsn)
        self.refused: list[psycopg.OperationalError] = []
        self.runs: list[Future[None]] = []
        self._world = hurt
        self._stop = asyncio.Event() if is_async else threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(2) as threads:
            self.runs = [threads.submit(self._work, each) for each in (self.away, self.near)]
            try:
                yield
                assert not any(run.done() for run in self.runs)
            finally:
                self._world.run(self._end())
        for run in self.runs:
            run.result()

    def _work(self, local: Local) -> None:
        while not self._stop.is_set():
            try:
                self._world.answer(local.worker.run_until(self._stop))  # type: ignore[arg-type]
            except psycopg.OperationalError as error:
                self.refused.append(error)
                self._world.run(asyncio.sleep(0.05))
            else:
                return

    async def _end(self) -> None:
        self._stop.set()


@both_workers
def test_a_database_that_goes_away_stops_no_worker_of_another(
    world: World, hurt: World, server: EmbeddedServer, is_async: bool
) -> None:
    program = Program(hurt, world, is_async=is_async)
    with program.running():
        for each in (hurt, world):
            each.enqueue_many("plain", 20)
            each.done()
        server.stop("fast")
        hurt.witness(program.away, "error")
        world.enqueue_many("plain", 100)
        world.done()
        assert not program.near.of("error", "lost", "retried")
        server.start()
        hurt.enqueue_many("plain", 20)
        hurt.done()
    world.saw("the other worker did all its jobs meanwhile")
    assert not program.refused


@both_workers
def test_a_database_that_is_away_at_the_start_keeps_no_other_worker_from_its_jobs(
    world: World, hurt: World, server: EmbeddedServer, is_async: bool
) -> None:
    program = Program(hurt, world, is_async=is_async)
    for each in (hurt, world):
        each.enqueue_many("plain", 20)
    server.stop("fast")
    with program.running():
        world.done()
        hurt.saw("a worker could not start", eventually(lambda: bool(program.refused)))
        server.start()
        hurt.done()
    world.saw("the other worker did all its jobs meanwhile")
