"""Whether a worker's resident memory stays constant over a million jobs."""

import os
import resource
import sys
import threading
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import harness
import work
from figures import Figures, at_most, figure
from harness import Bench
from work import CONCURRENCY, QUEUE, Child

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

_BATCH = 10_000


def main(bench: Bench) -> Mapping[str, object]:
    """Drain the jobs with a worker in another process, which measures itself."""
    jobs = 100_000 if bench.options.quick else 1_000_000
    curves: list[list[float]] = []
    runs = bench.repeat("memory", lambda: _run(bench, jobs, curves))
    return {
        "benchmark": "memory",
        "jobs": jobs,
        "concurrency": CONCURRENCY,
        "memory": {
            "floor": "the second tenth",
            "mib_of_last_tenth": figure(
                runs["mib_of_last_tenth"], runs["mib_of_second_tenth"], at_most(1.05)
            ),
        },
        "mib_by_tenth": curves,
    }


def _run(bench: Bench, jobs: int, curves: list[list[float]]) -> Figures:
    bench.fresh(lambda: _fill(bench, jobs))
    curve = Child(_work, bench.dsn, jobs).result(10 * work.PATIENCE)
    work.check_left(bench)
    curves.append([round(size, 1) for size in curve])
    return {"mib_of_second_tenth": curve[1], "mib_of_last_tenth": curve[-1]}


def _fill(bench: Bench, jobs: int) -> None:
    with Client(bench.dsn) as client:
        for first in range(0, jobs, _BATCH):
            client.bulk_enqueue(
                EnqueueRequest(QUEUE, "noop", b"%d" % number)
                for number in range(first, first + _BATCH)
            )


def _work(dsn: str, jobs: int) -> list[float]:
    """Drain the queue; return the resident memory after each tenth."""
    runs = bytearray(jobs)  # of each job: to remember their ids would take memory of its own
    done, curve, all_ran = count(1), [], threading.Event()

    def handler(job: Job) -> None:
        runs[int(job.arg or b"")] += 1
        number = next(done)
        if number % (jobs // 10) == 0:
            curve.append(resident())
        if number == jobs:
            all_ran.set()

    mux = Mux().register("noop", handler)
    with Client(dsn) as client, Worker(client, QUEUE, mux, concurrency=CONCURRENCY):
        if not all_ran.wait(10 * work.PATIENCE):
            raise RuntimeError(f"{sum(runs)} of {jobs} jobs ran")
    if runs.count(1) != jobs:
        raise RuntimeError(f"{sum(runs)} runs of {jobs} jobs, of which {runs.count(1)} ran once")
    return curve


def resident() -> float:
    """Return the resident memory in MiB; where the system only shows its peak, that."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    harness.main(main, __doc__)
