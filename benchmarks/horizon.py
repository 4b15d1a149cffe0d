"""Whether a worker keeps its rate and finds late jobs while a snapshot keeps dead rows."""

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter, sleep

import floor
import harness
import psycopg
import work
from figures import Figures, at_least, at_most, figure
from harness import Bench
from work import CONCURRENCY, QUEUE, Ran, Started

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

_POLL_INTERVAL = 1.0  # seconds; the default
_LATE = 0.1, 0.9  # seconds from the insert to the commit of a straggler, least and most
_FLOW = 20, 0.01  # other jobs at once, and seconds between: up to 2,000/s


def main(bench: Bench) -> Mapping[str, object]:
    """Drain round after round under a pinned snapshot; then commit jobs late."""
    size, rounds = (10_000, 10) if bench.options.quick else (20_000, 50)
    chance = random.Random(bench.options.seed)
    curves: list[list[float]] = []
    runs = bench.repeat("pinned", lambda: _pinned_run(bench, size, rounds, chance, curves))
    patience = 5.0 if bench.options.quick else 60.0
    return {
        "benchmark": "horizon",
        "jobs": size * rounds,
        "round": size,
        "concurrency": CONCURRENCY,
        "poll_interval_s": _POLL_INTERVAL,
        "drain": {
            "floor": "the first tenth",
            "jobs_per_s_of_last_tenth": figure(
                runs["jobs_per_s_of_last_tenth"], runs["jobs_per_s_of_first_tenth"], at_least(0.95)
            ),
        },
        "straggler": {
            "notified_most_ms": figure(runs["notified_most_ms"], goal=at_most(100, "median")),
            "polled_most_ms": figure(
                runs["polled_most_ms"], goal=at_most(_POLL_INTERVAL * 1000, "median")
            ),
        },
        "jobs_per_s_by_tenth": [[round(rate) for rate in curve] for curve in curves],
        "without_watermark": {
            "jobs_per_s_by_round": [round(rate) for rate in _bare(bench, size, rounds, patience)],
        },
    }


@contextmanager
def _pinned(dsn: str) -> Iterator[None]:
    """Hold a snapshot, as a forgotten transaction does: vacuum removes no row that dies now."""
    with psycopg.connect(dsn) as connection:
        connection.execute("set transaction isolation level repeatable read")
        connection.execute("select from bgjob_job limit 1")
        yield


def _pinned_run(
    bench: Bench, size: int, rounds: int, chance: random.Random, curves: list[list[float]]
) -> Figures:
    bench.fresh()
    with _pinned(bench.dsn):
        curve = _rounds(bench, size, rounds)
        curves.append(curve)
        count = 3 if bench.options.quick else 10
        return {
            "jobs_per_s_of_first_tenth": curve[0],
            "jobs_per_s_of_last_tenth": curve[-1],
            "notified_most_ms": max(_stragglers(bench, count, chance, notify=True)),
            "polled_most_ms": max(_stragglers(bench, count, chance, notify=False)),
        }


def _rounds(bench: Bench, size: int, rounds: int) -> list[float]:
    """Enqueue and drain in rounds, with one worker; return the rate of each tenth."""
    ran, took = Ran(size), []
    mux = Mux().register("noop", ran.plain)
    with (
        Client(bench.dsn) as client,
        psycopg.connect(bench.dsn) as connection,
        Worker(client, QUEUE, mux, concurrency=CONCURRENCY, poll_interval=_POLL_INTERVAL),
    ):
        for _ in range(rounds):
            requests = work.requests(size)
            ids = [request.id for request in requests]
            ran.expect(size)
            client.bulk_enqueue(requests, conn=connection)
            began = perf_counter()
            connection.commit()
            ran.wait()
            took.append(work.settled_at(bench, ids) - began)
            work.check(ran.ids, ids)
    tenth = rounds // 10
    return [size * tenth / sum(took[n : n + tenth]) for n in range(0, rounds, tenth)]


def _stragglers(bench: Bench, count: int, chance: random.Random, *, notify: bool) -> list[float]:
    """Commit jobs long after their insert, while others flow; return ms from commit to start."""
    ran, started, waited = Ran(0), Started(), []
    late: list[str] = []

    def straggler(job: Job) -> None:
        started.now()
        ran.plain(job)

    mux = Mux().register("noop", ran.plain).register("straggler", straggler)
    with (
        Client(bench.dsn, notify=notify) as client,
        psycopg.connect(bench.dsn) as connection,
        Worker(
            client,
            QUEUE,
            mux,
            concurrency=CONCURRENCY,
            poll_interval=_POLL_INTERVAL,
            notify=notify,
        ),
    ):
        ran.expect(1)
        first = client.enqueue(EnqueueRequest(QUEUE, "noop"))
        ran.wait()
        sleep(3 * _POLL_INTERVAL)  # it has swept the queue twice, with all dead rows, and rests
        with _flowing(client) as ids:
            for _ in range(count):
                late.append(client.enqueue(EnqueueRequest(QUEUE, "straggler"), conn=connection))
                sleep(chance.uniform(*_LATE))
                connection.commit()
                committed = perf_counter()
                waited.append((started.wait() - committed) * 1000)
        work.settled_at(bench, ids)
    work.check(ran.ids, [first, *ids, *late])
    return waited


@contextmanager
def _flowing(client: Client) -> Iterator[list[str]]:
    """Enqueue jobs until the block ends; yield their ids."""
    ids: list[str] = []
    stopping = threading.Event()
    count, pause = _FLOW

    def flow() -> None:
        while not stopping.wait(pause):
            requests = work.requests(count)
            client.bulk_enqueue(requests)
            ids.extend(request.id for request in requests)

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        yield ids
    finally:
        stopping.set()
        thread.join()


def _bare(bench: Bench, size: int, rounds: int, patience: float) -> list[float]:
    """Drain rounds with the floor for about a minute, each claim from the queue's beginning."""
    bench.fresh()
    rates: list[float] = []
    took = 0.0
    with _pinned(bench.dsn), Client(bench.dsn) as client, floor.connect(bench.dsn) as connection:
        while len(rates) < rounds and took < patience:
            client.bulk_enqueue(work.requests(size))
            began = perf_counter()
            floor.drain(connection, size, watermark=False)
            rates.append(size / (perf_counter() - began))
            took += size / rates[-1]
            harness.say(f"without watermark: {rates[-1]:,.0f} jobs/s")
    return rates


if __name__ == "__main__":
    harness.main(main, __doc__)
