"""How much faster two worker processes drain a queue than one does."""

from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier, Event
from time import perf_counter

import harness
import work
from figures import Figures, at_least
from harness import Bench
from work import CONCURRENCY, PATIENCE, QUEUE, Child, Ran

from bgjob import Client, Mux, Worker


def main(bench: Bench) -> Mapping[str, object]:
    """Drain the same jobs with two processes and with one."""
    count = 20_000 if bench.options.quick else 100_000
    return {
        "benchmark": "processes",
        "jobs": count,
        "concurrency": CONCURRENCY,
        "floor": "the same by one process",
        "two": bench.compare(
            "two processes",
            lambda: _drain(bench, count, processes=2),
            lambda: _drain(bench, count, processes=1),
            {"jobs_per_s": at_least(1.4)},
        ),
    }


def _drain(bench: Bench, count: int, *, processes: int) -> Figures:
    ids = work.fill(bench, count)
    context = get_context("spawn")
    begin, end = context.Barrier(processes + 1), context.Event()
    children = [Child(_work, bench.dsn, begin, end) for _ in range(processes)]
    begin.wait(PATIENCE)
    began = perf_counter()
    drained_at = work.settled_at(bench, ids, pause=0.005)  # rarely: the processes need the cores
    end.set()
    work.check([ran for child in children for ran in child.result()], ids)
    return {"jobs_per_s": count / (drained_at - began)}


def _work(dsn: str, begin: Barrier, end: Event) -> list[str]:
    """Run a worker between the two signals; return the ids of the jobs that it ran."""
    ran = Ran(0)
    with Client(dsn) as client:
        worker = Worker(client, QUEUE, Mux().register("noop", ran.plain), concurrency=CONCURRENCY)
        begin.wait(PATIENCE)
        with worker:
            if not end.wait(PATIENCE):
                raise RuntimeError(f"the jobs were not drained within {PATIENCE:g} s")
    return ran.ids


if __name__ == "__main__":
    harness.main(main, __doc__)
