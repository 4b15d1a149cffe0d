"""How long an idle worker takes to start a job, compared with a bare LISTEN loop."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import floor
import harness
import work
from figures import Figures, at_most
from harness import Bench
from work import QUEUE, Handler, Started

from bgjob import Client, EnqueueRequest, Mux, Worker


def main(bench: Bench) -> Mapping[str, object]:
    """Compare a worker of each colour with the floor."""
    count = 200 if bench.options.quick else 400
    chance = random.Random(bench.options.seed)

    def compare(title: str, handler: Callable[[Started], Handler]) -> dict[str, object]:
        return bench.compare(
            title,
            lambda: _worker(bench, count, chance, handler),
            lambda: _floor(bench, count, chance),
            {"p50_ms": at_most(0.3, "difference"), "p99_ms": at_most(1.5)},
        )

    return {
        "benchmark": "pickup",
        "jobs": count,
        "producer": "another process",
        "floor": "a thread that listens, and claims one row when told",
        "threads": compare("threads", lambda started: started.plain),
        "coroutines": compare("coroutines", lambda started: started.coroutine),
        # The part of it that is the hand-over to a handler's thread.
        "handed_over": bench.compare(
            "handed over",
            lambda: _floor(bench, count, chance, hands_over=True),
            lambda: _floor(bench, count, chance),
        ),
    }


def _worker(
    bench: Bench, count: int, chance: random.Random, handler: Callable[[Started], Handler]
) -> Figures:
    bench.fresh()
    started = Started()
    mux = Mux().register("noop", handler(started))
    with Client(bench.dsn) as client, Worker(client, QUEUE, mux):
        figures = work.pick_up(bench, count, chance, _producer, started)
    work.check_left(bench)
    return figures


def _floor(bench: Bench, count: int, chance: random.Random, *, hands_over: bool = False) -> Figures:
    bench.fresh()
    started = Started()
    way = floor.another_thread(started.now) if hands_over else nullcontext(started.now)
    with way as start, floor.listening(bench.dsn, start):
        figures = work.pick_up(bench, count, chance, floor.telling, started)
    work.check_left(bench)
    return figures


@contextmanager
def _producer(dsn: str) -> Iterator[Callable[[], object]]:
    with Client(dsn) as client:
        yield lambda: client.enqueue(EnqueueRequest(QUEUE, "noop"))


if __name__ == "__main__":
    harness.main(main, __doc__)
