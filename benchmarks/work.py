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

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

QUEUE = "benchmark"
CONCURRENCY = 10
PATIENCE = 120.0
"""Seconds before a run that does not end is given up."""

_PAUSE = 0.005, 0.03  # seconds between two jobs for an idle worker, the least and the most

_ANY_OF = "select from bgjob_job where id between %s and %s limit 1"

_SPAWN = multiprocessing.get_context("spawn")

Handler = Callable[[Job], Any]


def requests(count: int) -> list[EnqueueRequest]:
    """Make the requests of jobs that do nothing."""
    return [EnqueueRequest(QUEUE, "noop", {"n": n}) for n in range(count)]


def fill(bench: Bench, count: int) -> list[str]:
    """Make new tables that hold so many jobs; give the jobs' ids."""
    batch = requests(count)
    with Client(bench.dsn) as client:
        bench.fresh(lambda: client.bulk_enqueue(batch))
    return [request.id for request in batch]


def write(bench: Bench, count: int, how: Callable[[], object]) -> Figures:
    """Write so many rows into the empty table."""
    began = perf_counter()
    how()
    took = perf_counter() - began
    check_left(bench, count)
    return {"jobs_per_s": count / took}


class Ran:
    """The ids of the jobs that ran; tells when the last one has."""

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

    def wait(self) -> None:
        """Wait until as many jobs have run as are expected."""
        if not self._all.wait(PATIENCE):
            raise RuntimeError(f"{len(self.ids)} of {self._expected} jobs ran in {PATIENCE:g} s")

    def expect(self, count: int) -> None:
        """Begin anew."""
        self.ids = []
        self._all.clear()
        self._expected = count


def check(ran: Sequence[str], ids: Sequence[str]) -> None:
    """Raise unless each job ran exactly once."""
    if sorted(ran) != sorted(ids):
        raise RuntimeError(
            f"{len(ran)} runs of {len(set(ran))} jobs, where {len(ids)} jobs were to run once"
        )


def check_left(bench: Bench, count: int = 0) -> None:
    """Raise unless just so many jobs are in the table."""
    if bench.jobs() != count:
        raise RuntimeError(f"{bench.jobs()} jobs are in the table, not {count}")


def settled_at(
    bench: Bench, ids: Sequence[str], *, others: int = 0, pause: float = 0.0005
) -> float:
    """Wait until the jobs are gone, and only so many others are left; give the time.

    It looks again after a pause in seconds.
    """
    # The jobs that are settled last are among those that were enqueued last; to look
    # at the whole table would take longer than the settlement.
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


def drain(bench: Bench, ids: Sequence[str], handler: Callable[[Ran], Handler]) -> Figures:
    """Let a worker of this process run the jobs, which are all in the table besides others."""
    ran, others = Ran(len(ids)), bench.jobs() - len(ids)
    mux = Mux().register("noop", handler(ran))
    with Client(bench.dsn) as client:
        worker = Worker(client, QUEUE, mux, concurrency=CONCURRENCY)
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
    """When the job that was written last was started."""

    def __init__(self) -> None:
        self.at = 0.0
        self.runs = 0
        self._event = threading.Event()

    def now(self) -> None:
        """Tell that it starts now."""
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
        """Wait until it has started, and give the time."""
        if not self._event.wait(PATIENCE):
            raise RuntimeError(f"no job was started within {PATIENCE:g} s")
        self._event.clear()
        return self.at


Producer = Callable[[str], AbstractContextManager[Callable[[], object]]]
"""Connects to a database; gives what enqueues a job."""


def pick_up(
    bench: Bench, count: int, chance: random.Random, producer: Producer, started: Started
) -> Figures:
    """Enqueue at random intervals, each job for an idle worker; from the return to the start.

    The producer is a process by itself. In this one it would contend with the worker for
    the interpreter, and the later it were told of its commit the quicker were the start.
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
    """A new process that runs a function, and gives what the function returns.

    It is spawned, not forked: it shares no connection, no thread and no memory with this one.
    """

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._here, there = _SPAWN.Pipe(duplex=False)
        self._process = _SPAWN.Process(target=_tell, args=(there, function, args), daemon=True)
        self._process.start()
        there.close()

    def result(self, patience: float = PATIENCE) -> Any:
        """Wait for the end; raise where the function raised, which is on stderr."""
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
