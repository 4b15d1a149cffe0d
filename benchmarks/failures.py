"""The resident memory of a worker during a burst of failing jobs, against one of jobs that complete."""

import logging
import os
import resource
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import harness
import work
from figures import Figures, at_most, figure
from harness import Bench
from work import CONCURRENCY, QUEUE, Child

from bgjob import Client, EnqueueRequest, Job, LoggingObserver, Mux, Worker

_LOCALS = 200_000
"""Bytes that a frame of each handler holds, as one with a decoded payload or a response does."""

_DEEP = 10
"""Calls between the handler and the place that fails."""


def main(bench: Bench) -> Mapping[str, object]:
    """Run both bursts, each in a process of its own that measures itself."""
    jobs = 2_000 if bench.options.quick else 20_000
    runs = bench.repeat("failures", lambda: _run(bench, jobs))
    return {
        "benchmark": "failures",
        "jobs": jobs,
        "memory": {
            "floor": "jobs that complete",
            "peak_mib": figure(runs["peak_of_failures"], runs["peak_of_successes"], at_most(1.5)),
        },
    }


def _run(bench: Bench, jobs: int) -> Figures:
    peaks = {}
    for name, work_of in (("successes", _complete), ("failures", _fail)):
        bench.fresh(lambda: _fill(bench, jobs))
        peaks[f"peak_of_{name}"] = Child(_work, bench.dsn, jobs, work_of).result(work.PATIENCE)
    return peaks


def _fill(bench: Bench, jobs: int) -> None:
    with Client(bench.dsn) as client:
        client.bulk_enqueue(EnqueueRequest(QUEUE, "noop", b"%d" % n) for n in range(jobs))


class _Told(LoggingObserver):
    """Logs, and knows when it was told of all jobs."""

    def __init__(self, jobs: int) -> None:
        super().__init__()
        self._left = jobs
        self.all = threading.Event()

    def job_completed(self, job: Job, /) -> None:
        super().job_completed(job)
        self._count()

    def job_moved_to_dlq(self, job: Job, error: BaseException | str, /) -> None:
        super().job_moved_to_dlq(job, error)
        self._count()

    def _count(self) -> None:
        self._left -= 1
        if not self._left:
            self.all.set()


def _work(dsn: str, jobs: int, handler: Callable[[Job], None]) -> float:
    """Work until each job was told; return the peak of the resident memory."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # the log is formatted, not shown
        logging.basicConfig(stream=nowhere, level=logging.INFO)
        mux, told = Mux().register("noop", handler, max_attempts=1), _Told(jobs)
        with (
            Client(dsn) as client,
            Worker(client, QUEUE, mux, concurrency=CONCURRENCY, observer=told),
        ):
            if not told.all.wait(work.PATIENCE):
                raise RuntimeError("not all jobs were told")
    return _peak()


def _peak() -> float:
    """Return the peak of the resident memory in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: the other one may have the parent's
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _complete(job: Job) -> None:
    _call(_DEEP, job, None)


def _fail(job: Job) -> None:
    _call(_DEEP, job, ValueError(f"no such account: {job.id}"))


def _call(deep: int, job: Job, error: Exception | None) -> int:
    body = bytearray(_LOCALS // _DEEP)
    if deep:
        return _call(deep - 1, job, error) + len(body)
    if error is not None:
        raise error
    return 0


if __name__ == "__main__":
    harness.main(main, __doc__)
