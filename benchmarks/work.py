"""The jobs of the benchmarks, their handlers, and the processes that some of them need."""

import multiprocessing
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from time import monotonic, perf_counter, sleep
from typing import Any

from figures import Figures, percentile
from harness import Bench

from bgjob import Client, EnqueueRequest, Job, Limit, Mux, Worker
from bgjob.service import Service

QUEUE = "benchmark"
CONCURRENCY = 10
PATIENCE = 120.0
"""Seconds after which a run that does not end fails."""

_PAUSE = 0.005, 0.03  # seconds between two jobs for an idle worker, least and most

_ANY_OF = "select from bgjob_job where id between %s and %s limit 1"

_SPAWN = multiprocessing.get_context("spawn")

Handler = Callable[[Job], Any]


def requests(count: int) -> list[EnqueueRequest]:
    """Make the requests of jobs that do nothing."""
    return [EnqueueRequest(QUEUE, "noop", {"n": n}) for n in range(count)]


def fill(bench: Bench, count: int) -> list[str]:
    """Make new tables with `count` jobs; return their ids."""
    batch = requests(count)
    with Client(bench.dsn) as client:
        bench.fresh(lambda: client.bulk_enqueue(batch))
    return [request.id for request in batch]


def write(bench: Bench, count: int, how: Callable[[], object]) -> Figures:
    """Write `count` rows into the empty table."""
    began = perf_counter()
    how()
    took = perf_counter() - began
    check_left(bench, count)
    return {"jobs_per_s": count / took}


class Ran:
    """Handlers that record the ids of the jobs that ran, and when the last one did."""

    def __init__(self, expected: int) -> None:
        self.ids: list[str] = []
        self.ended_at = 0.0
        self._all = threading.Event()
        self._expected = expected

    def plain(self, job: Job) -> None:
        """Handle a job on a thread."""
        self.ids.append(job.id)
        if len(self.ids) == self._expected:
            self.ended_at = perf_counter()
            self._all.set()

    async def coroutine(self, job: Job) -> None:
        """Handle a job on an event loop."""
        self.plain(job)

    def batch(self, ids: Sequence[str]) -> None:
        """Handle the jobs of a call on a thread."""
        self.ids.extend(ids)
        if len(self.ids) == self._expected:
            self.ended_at = perf_counter()
            self._all.set()

    def wait(self) -> None:
        """Wait until all expected jobs have run."""
        if not self._all.wait(PATIENCE):
            raise RuntimeError(f"{len(self.ids)} of {self._expected} jobs ran in {PATIENCE:g} s")

    def expect(self, count: int) -> None:
        """Start again, with `count` expected jobs."""
        self.ids = []
        self._all.clear()
        self._expected = count


def check(ran: Sequence[str], ids: Sequence[str]) -> None:
    """Raise unless each job ran exactly once."""
    if sorted(ran) != sorted(ids):
        raise RuntimeError(
            f"{len(ran)} runs of {len(set(ran))} jobs; each of {len(ids)} jobs must run once"
        )


def check_left(bench: Bench, count: int = 0) -> None:
    """Raise unless the table has exactly `count` jobs."""
    if bench.jobs() != count:
        raise RuntimeError(f"{bench.jobs()} jobs are in the table, not {count}")


def settled_at(
    bench: Bench, ids: Sequence[str], *, others: int = 0, pause: float = 0.0005
) -> float:
    """Wait until the jobs are gone and only `others` jobs are left; return the time.

    It checks again after `pause` seconds.
    """
    # The last jobs to be settled are among the last that were enqueued. A query of the
    # whole table would take longer than the settlement.
    last = ids[-min(len(ids), 5000)], ids[-1]
    give_up_at = monotonic() + PATIENCE
    while True:
        bench.admin.execute("set enable_seqscan = off")
        while bench.admin.execute(_ANY_OF, last).rowcount:
            sleep(pause)
            if monotonic() > give_up_at:
                raise RuntimeError(f"jobs are left after {PATIENCE:g} s")
        gone_at = perf_counter()
        bench.admin.execute("reset enable_seqscan")
        left = bench.jobs() - others
        if not left:
            return gone_at
        if left < 0 or monotonic() > give_up_at:
            raise RuntimeError(f"{left} jobs are left")
        sleep(pause)


def drain(
    bench: Bench,
    ids: Sequence[str],
    handler: Callable[[Ran], Handler],
    *,
    services: Sequence[Service] = (),
    keep: bool = False,
    limits: Limit | None = None,
    type_limit: Limit | None = None,
) -> Figures:
    """Run the jobs with a worker of this process; the table may have others as well."""
    ran, others = Ran(len(ids)), bench.jobs() - len(ids)
    mux = Mux().register("noop", handler(ran), keep=keep, limit=type_limit)
    with Client(bench.dsn) as client:
        worker = Worker(
            client, QUEUE, mux, concurrency=CONCURRENCY, services=services, limits=limits
        )
        began = perf_counter()
        with worker:
            ran.wait()
            drained_at = settled_at(bench, ids, others=others)
    check(ran.ids, ids)
    return {
        "jobs_per_s": len(ids) / (drained_at - began),
        "jobs_per_s_to_last_handler": len(ids) / (ran.ended_at - began),
    }


class Started:
    """Handlers that record when the last job was started."""

    def __init__(self) -> None:
        self.at = 0.0
        self.runs = 0
        self._event = threading.Event()

    def now(self) -> None:
        """Record a start."""
        self.at = perf_counter()
        self.runs += 1
        self._event.set()

    def plain(self, _: Job) -> None:
        """Handle a job on a thread."""
        self.now()

    async def coroutine(self, _: Job) -> None:
        """Handle a job on an event loop."""
        self.now()

    def wait(self) -> float:
        """Wait until a job has started; return the time."""
        if not self._event.wait(PATIENCE):
            raise RuntimeError(f"no job was started within {PATIENCE:g} s")
        self._event.clear()
        return self.at


Producer = Callable[[str], AbstractContextManager[Callable[[], object]]]
"""Connects to a database, and yields a function that enqueues a job."""


def pick_up(
    bench: Bench, count: int, chance: random.Random, producer: Producer, started: Started
) -> Figures:
    """Measure from the return of an enqueue to the start of the job, on an idle worker.

    The jobs are enqueued at random intervals, by another process. A producer in this
    process would compete with the worker for the interpreter: the later it noticed its
    commit, the shorter the measured time.
    """
    here, there = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_enqueue, args=(there, producer, bench.dsn), daemon=True)
    process.start()
    there.close()
    here.recv()  # it is connected
    waited = []
    for _ in range(count):
        sleep(chance.uniform(*_PAUSE))
        here.send(None)
        at = started.wait()
        waited.append((at - here.recv()) * 1000)
    here.close()
    process.join()
    if started.runs != count:
        raise RuntimeError(f"{started.runs} runs of {count} jobs")
    return {"p50_ms": percentile(waited, 0.5), "p99_ms": percentile(waited, 0.99)}


def _enqueue(pipe: Connection, producer: Producer, dsn: str) -> None:
    with producer(dsn) as enqueue, suppress(EOFError):
        pipe.send(None)
        while True:
            pipe.recv()
            enqueue()
            pipe.send(perf_counter())  # one clock for all processes


class Child:
    """A new process that runs a function and sends back its result.

    It is spawned, not forked: it shares no connection, thread or memory with this one.
    """

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._here, there = _SPAWN.Pipe(duplex=False)
        self._process = _SPAWN.Process(target=_tell, args=(there, function, args), daemon=True)
        self._process.start()
        there.close()

    def result(self, patience: float = PATIENCE) -> Any:
        """Wait for the result; raise if the function raised, whose traceback is on stderr."""
        if not self._here.poll(patience):
            raise RuntimeError(f"a process has not ended within {patience:g} s")
        try:
            result = self._here.recv()
        except EOFError:
            raise RuntimeError("a process failed") from None
        self._process.join()
        return result


def _tell(pipe: Connection, function: Callable[..., object], args: tuple[object, ...]) -> None:
    pipe.send(function(*args))
