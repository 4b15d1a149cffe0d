"""What a hundred idle workers of one process cost, among ten thousand queues."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from time import monotonic, sleep

import floor
import harness
import work
from figures import Figures, at_most, figure
from harness import Bench
from proxy import Proxy
from work import Started

from bgjob import Client, EnqueueRequest, Mux, Worker

_POLL_INTERVAL = 1.0  # seconds; the default
_HISTORY = 5  # jobs enqueued in each queue; the last is delayed by a day, the others are gone

_FILL = f"""
    insert into bgjob_job (id, queue, type, next_run_at)
    select 'history-' || queue || '-' || n, 'queue-' || queue, 'noop',
        now() + case when n = {_HISTORY} then interval '1 day' else interval '0' end
    from generate_series(1, %s) as queue, generate_series(1, {_HISTORY}) as n
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Count round trips of idle workers; compare the latency of random ones with the floor."""
    queues, watched, count, seconds = (
        (1000, 20, 100, 5) if bench.options.quick else (10_000, 100, 400, 10)
    )
    _check_connections(bench, watched)
    chance = random.Random(bench.options.seed)
    idle = bench.repeat("idle", lambda: _idle(bench, queues, watched, seconds))
    return {
        "benchmark": "queues",
        "queues": queues,
        "watched": watched,
        "poll_interval_s": _POLL_INTERVAL,
        "idle": {name: figure(values, goal=at_most(1, "median")) for name, values in idle.items()},
        "floor": "a thread that listens, and claims one row when told",
        "pickup": bench.compare(
            "pickup",
            lambda: _worker(bench, queues, watched, count, chance),
            lambda: _floor(bench, queues, count, chance),
            {"p50_ms": at_most(0.3, "difference"), "p99_ms": at_most(1.5)},
        ),
    }


def _check_connections(bench: Bench, watched: int) -> None:
    row = bench.admin.execute("select current_setting('max_connections')::int").fetchone()
    if row is None or row[0] < watched + 20:
        raise RuntimeError(f"set the server's max_connections to {watched + 20} at least")


def _fill(bench: Bench, queues: int) -> None:
    def fill() -> None:
        bench.admin.execute(_FILL, [queues])
        bench.admin.execute("delete from bgjob_job where next_run_at <= now()")

    bench.fresh(fill)


@contextmanager
def _watching(client: Client, watched: int, started: Started) -> Iterator[None]:
    """Run a worker for each of the first queues."""
    mux = Mux().register("noop", started.plain)
    with ExitStack() as workers:
        for number in range(1, watched + 1):
            workers.enter_context(
                Worker(client, f"queue-{number}", mux, poll_interval=_POLL_INTERVAL)
            )
        sleep(2 * _POLL_INTERVAL)  # all have started, swept their queues, and gone to sleep
        yield


def _idle(bench: Bench, queues: int, watched: int, seconds: int) -> Figures:
    _fill(bench, queues)
    before = _connections(bench)
    with (
        Proxy(bench.admin.info) as proxy,
        Client(proxy.through(bench.dsn)) as client,
        _watching(client, watched, Started()),
    ):
        connections = _connections(bench) - before
        trips, began = proxy.round_trips, monotonic()
        sleep(seconds)
        polls = (monotonic() - began) / _POLL_INTERVAL * watched
        return {
            "connections_per_worker": connections / watched,
            "round_trips_per_poll_interval": (proxy.round_trips - trips) / polls,
        }


def _connections(bench: Bench) -> int:
    row = bench.admin.execute(
        "select count(*) from pg_stat_activity where backend_type = 'client backend'"
    ).fetchone()
    assert row is not None
    return int(row[0])


def _worker(bench: Bench, queues: int, watched: int, count: int, chance: random.Random) -> Figures:
    _fill(bench, queues)
    started = Started()
    with Client(bench.dsn) as client, _watching(client, watched, started):
        producer = partial(_producer, watched, chance.random())
        figures = work.pick_up(bench, count, chance, producer, started)
    work.check_left(bench, queues)  # the delayed jobs
    return figures


def _floor(bench: Bench, queues: int, count: int, chance: random.Random) -> Figures:
    _fill(bench, queues)
    started = Started()
    with floor.listening(bench.dsn, started.now):
        figures = work.pick_up(bench, count, chance, floor.telling, started)
    work.check_left(bench, queues)
    return figures


@contextmanager
def _producer(watched: int, seed: float, dsn: str) -> Iterator[Callable[[], object]]:
    chance = random.Random(seed)
    with Client(dsn) as client:
        yield lambda: client.enqueue(EnqueueRequest(f"queue-{chance.randint(1, watched)}", "noop"))


if __name__ == "__main__":
    harness.main(main, __doc__)
