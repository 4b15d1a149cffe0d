"""How many jobs a second tasks or threads of one process enqueue, each one job after the other."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from time import perf_counter

import harness
import work
from figures import Figures, at_least, at_most, percentile
from harness import Bench

from bgjob import AsyncClient, Client, EnqueueRequest
from bgjob.job import new_id

_TASKS, _THREADS = 64, 16

Make = Callable[[], EnqueueRequest]


def main(bench: Bench) -> Mapping[str, object]:
    """Let many enqueue with one client, in turn with one alone, and with no insert shared."""
    count = 2000 if bench.options.quick else 10_000
    few = count // 10
    return {
        "benchmark": "meeting",
        "jobs": count,
        "floor": "one task, then one thread; of the waits, inserts that are not shared",
        "tasks": bench.compare(
            "tasks",
            lambda: _tasks(bench, _TASKS, count, _shared),
            lambda: _tasks(bench, 1, few, _shared),
            {"jobs_per_s": at_least(8)},
        ),
        "tasks_waits": bench.compare(
            "tasks' waits",
            lambda: _tasks(bench, _TASKS, count, _shared),
            lambda: _tasks(bench, _TASKS, count, _apart),
            {"p99_ms": at_most(1)},
        ),
        "threads": bench.compare(
            "threads",
            lambda: _threads(bench, _THREADS, count, _shared),
            lambda: _threads(bench, 1, few, _shared),
            {"jobs_per_s": at_least(4)},
        ),
        "threads_waits": bench.compare(
            "threads' waits",
            lambda: _threads(bench, _THREADS, count, _shared),
            lambda: _threads(bench, _THREADS, count, _apart),
            {"p99_ms": at_most(1)},
        ),
    }


def _shared() -> EnqueueRequest:
    return EnqueueRequest(work.QUEUE, "noop")


def _apart() -> EnqueueRequest:
    return EnqueueRequest(work.QUEUE, "noop", id=new_id())  # an id of the program's


def _tasks(bench: Bench, tasks: int, count: int, make: Make) -> Figures:
    bench.fresh()
    each, waits = count // tasks, list[float]()

    async def enqueue(client: AsyncClient) -> None:
        for _ in range(each):
            began = perf_counter()
            await client.enqueue(make())
            waits.append(perf_counter() - began)

    async def run() -> float:
        async with AsyncClient(bench.dsn) as client:
            await asyncio.gather(*(client.dlq.list(limit=1) for _ in range(tasks)))
            began = perf_counter()
            await asyncio.gather(*(enqueue(client) for _ in range(tasks)))
            return perf_counter() - began

    return _figures(bench, each * tasks, asyncio.run(run()), waits)


def _threads(bench: Bench, threads: int, count: int, make: Make) -> Figures:
    bench.fresh()
    each, waits = count // threads, list[float]()
    ready = threading.Barrier(threads + 1)

    with Client(bench.dsn) as client:

        def enqueue() -> None:
            client.dlq.list(limit=1)
            ready.wait()
            for _ in range(each):
                began = perf_counter()
                client.enqueue(make())
                waits.append(perf_counter() - began)

        running = [threading.Thread(target=enqueue) for _ in range(threads)]
        for thread in running:
            thread.start()
        ready.wait()
        began = perf_counter()
        for thread in running:
            thread.join()
        took = perf_counter() - began
    return _figures(bench, each * threads, took, waits)


def _figures(bench: Bench, count: int, took: float, waits: list[float]) -> Figures:
    work.check_left(bench, count)
    return {
        "jobs_per_s": count / took,
        "p50_ms": percentile(waits, 0.5) * 1000,
        "p99_ms": percentile(waits, 0.99) * 1000,
    }


if __name__ == "__main__":
    harness.main(main, __doc__)
