"""The processor time of a job, in this process and in its server sessions."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic, perf_counter, process_time, sleep
from typing import Any

import floor
import harness
import work
from figures import Figures
from harness import Bench
from work import PATIENCE, Handler, Ran

from bgjob import Client

Run = Callable[[], object]


def main(bench: Bench) -> Mapping[str, object]:
    """Do the work of drain.py, bulk.py and single.py, each in turn with its floor."""
    if not Path(f"/proc/{bench.admin.info.backend_pid}/stat").exists():
        raise SystemExit("costs.py reads /proc: it needs Linux, and a server on this machine")
    drained, written, single = (
        (20_000, 10_000, 1000) if bench.options.quick else (100_000, 50_000, 5000)
    )
    return {
        "benchmark": "costs",
        "floor": "those of drain.py, bulk.py and single.py",
        "threads": bench.compare(
            "threads",
            lambda: _drain(bench, drained, lambda ran: ran.plain),
            lambda: _drain_bare(bench, drained),
        ),
        "coroutines": bench.compare(
            "coroutines",
            lambda: _drain(bench, drained, lambda ran: ran.coroutine),
            lambda: _drain_bare(bench, drained),
        ),
        "bulk": bench.compare(
            "bulk",
            lambda: _write(bench, written, Client.bulk_enqueue),
            lambda: _write_bare(bench, written, floor.copy),
        ),
        "single": bench.compare(
            "single",
            lambda: _write(bench, single, _one_by_one),
            lambda: _write_bare(bench, single, floor.insert),
        ),
    }


def _drain(bench: Bench, count: int, handler: Callable[[Ran], Handler]) -> Figures:
    ids = work.fill(bench, count)
    return _cost(bench, count, lambda: work.drain(bench, ids, handler))


def _drain_bare(bench: Bench, count: int) -> Figures:
    work.fill(bench, count)

    def drain() -> None:
        with floor.connect(bench.dsn) as connection:
            floor.drain(connection, count)

    return _cost(bench, count, drain)


def _write(bench: Bench, count: int, how: Callable[[Client, Any], object]) -> Figures:
    bench.fresh()
    requests = work.requests(count)

    def write() -> None:
        with Client(bench.dsn) as client:
            how(client, requests)

    return _cost(bench, count, write)


def _write_bare(bench: Bench, count: int, how: Callable[[Any, Any], object]) -> Figures:
    bench.fresh()
    rows = floor.rows(work.requests(count))

    def write() -> None:
        with floor.connect(bench.dsn) as connection:
            how(connection, rows)

    return _cost(bench, count, write)


def _one_by_one(client: Client, requests: Any) -> None:
    for request in requests:
        client.enqueue(request)


def _cost(bench: Bench, count: int, run: Run) -> Figures:
    """Run it, with all its connections; return the microseconds of each job."""
    postmaster = _stat(bench.admin.info.backend_pid)[0]
    children, server = _children(postmaster), _of_ended_children(postmaster)
    began, process = perf_counter(), process_time()
    run()
    took, process = perf_counter() - began, process_time() - process
    give_up_at = monotonic() + PATIENCE
    while not _children(postmaster) <= children:
        sleep(0.01)
        if monotonic() > give_up_at:
            raise RuntimeError("sessions of this run, or of another program, are still open")
    server = _of_ended_children(postmaster) - server
    return {
        "process_us": process / count * 1e6,
        "server_us": server / count * 1e6,
        "cores_busy": (process + server) / took,
    }


def _children(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split())


def _of_ended_children(pid: int) -> float:
    """Return the processor time, in seconds, of the ended children of a process."""
    user, system = _stat(pid)[12:14]
    return (user + system) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[int]:
    """Return the numbers after name and state in a process's /proc/PID/stat."""
    text = Path(f"/proc/{pid}/stat").read_text("utf-8")
    return [int(number) for number in text.rpartition(")")[2].split()[1:]]


if __name__ == "__main__":
    harness.main(main, __doc__)
