"""How many jobs a second are enqueued one by one, and ten by ten; and in how many round trips."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import floor
import harness
import psycopg
import work
from figures import Figures, at_least, at_most, figure
from harness import Bench
from proxy import Proxy

from bgjob import AsyncClient, Client, EnqueueRequest

_COUNTED = 100  # enqueues whose round trips are counted
_FEW = 10  # jobs in a bulk enqueue


def main(bench: Bench) -> Mapping[str, object]:
    """Write the same rows both ways, then count round trips."""
    count = 500 if bench.options.quick else 3000
    return {
        "benchmark": "single",
        "jobs": count,
        "floor": "prepared insert on one connection",
        "single": bench.compare(
            "single",
            lambda: _by_client(bench, count, _enqueue),
            lambda: _bare(bench, count, floor.insert),
            {"jobs_per_s": at_least(0.95)},
        ),
        "coroutine": bench.compare(
            "coroutine",
            lambda: _single_async(bench, count),
            lambda: _insert_async(bench, count),
            {"jobs_per_s": at_least(0.95)},
        ),
        "ten": bench.compare(
            "ten",
            lambda: _by_client(bench, count * _FEW, _enqueue_few),
            lambda: _bare(bench, count * _FEW, partial(floor.insert_many, size=_FEW)),
            {"jobs_per_s": at_least(0.95)},
        ),
        "round_trips": {
            "per_enqueue": figure(
                bench.repeat("round trips", lambda: _round_trips(bench))["per_enqueue"],
                goal=at_most(1, "median"),
            )
        },
    }


def _by_client(
    bench: Bench, count: int, enqueue: Callable[[Client, Sequence[EnqueueRequest]], None]
) -> Figures:
    bench.fresh()
    requests = work.requests(count)
    with Client(bench.dsn) as client:
        client.dlq.list(limit=1)
        return work.write(bench, count, lambda: enqueue(client, requests))


def _bare(
    bench: Bench,
    count: int,
    insert: Callable[[psycopg.Connection[Any], Sequence[floor.Row]], None],
) -> Figures:
    bench.fresh()
    rows = floor.rows(work.requests(count))
    with floor.connect(bench.dsn) as connection:
        return work.write(bench, count, lambda: insert(connection, rows))


def _enqueue_few(client: Client, requests: Sequence[EnqueueRequest]) -> None:
    for start in range(0, len(requests), _FEW):
        client.bulk_enqueue(requests[start : start + _FEW])


def _single_async(bench: Bench, count: int) -> Figures:
    bench.fresh()
    requests = work.requests(count)
    client = AsyncClient(bench.dsn)

    async def enqueue() -> None:
        for request in requests:
            await client.enqueue(request)

    with asyncio.Runner() as runner:
        runner.run(client.dlq.list(limit=1))
        figures = work.write(bench, count, lambda: runner.run(enqueue()))
        runner.run(client.close())
    return figures


def _insert_async(bench: Bench, count: int) -> Figures:
    bench.fresh()
    rows = floor.rows(work.requests(count))
    with asyncio.Runner() as runner:
        connection = runner.run(floor.connect_async(bench.dsn))
        figures = work.write(bench, count, lambda: runner.run(floor.insert_async(connection, rows)))
        runner.run(connection.close())
    return figures


def _round_trips(bench: Bench) -> Figures:
    bench.fresh()
    with Proxy(bench.admin.info) as proxy, Client(proxy.through(bench.dsn)) as client:
        # After the first few, with which psycopg opens the connection and prepares the statement.
        _enqueue(client, work.requests(10))
        before = proxy.round_trips
        _enqueue(client, work.requests(_COUNTED))
        return {"per_enqueue": (proxy.round_trips - before) / _COUNTED}


def _enqueue(client: Client, requests: Sequence[EnqueueRequest]) -> None:
    for request in requests:
        client.enqueue(request)


if __name__ == "__main__":
    harness.main(main, __doc__)
