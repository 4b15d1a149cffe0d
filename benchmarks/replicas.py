"""Processes with many workers each, which a benchmark starts, reads and stops."""

import multiprocessing
import os
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from time import monotonic, process_time, sleep
from typing import Any

import psycopg
from memory import resident
from typing_extensions import override
from work import PATIENCE, QUEUE

from bgjob import BgjobError, Client, Job, Limit, Mux, NoopObserver, Worker
from bgjob.limit import Scope

_SPAWN = multiprocessing.get_context("spawn")

_AT_ONCE = 16
"""The threads of a process that start its workers; each waits for the server most of the time."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a process says of itself and its workers."""

    cpu_s: float
    mib: float
    threads: int
    errors: int
    """What its observers were told."""
    connected: int
    """Workers that have a connection."""
    ran: Sequence[int]
    """By worker, how many jobs it has run."""
    starts: Sequence[tuple[str, float]]
    """Which jobs started when, by the clock of all processes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers of one process."""

    workers: int
    concurrency: int = 1
    handler_s: float = 0.0
    """How long a handler waits."""
    notes_starts: bool = False
    limit_of: tuple[Scope, Limit] | None = None
    """A limit of the queue, or of the jobs' type, over all processes."""


class Replicas:
    """Processes with workers of one queue."""

    def __init__(self, dsn: str, plans: Sequence[Plan]) -> None:
        self.workers = sum(plan.workers for plan in plans)
        self._pipes: list[Connection] = []
        self._processes = []
        for plan in plans:
            here, there = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_serve, args=(there, dsn, plan), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._ask(None)  # all have imported what they need

    def start(self) -> None:
        """Start all workers, and wait until each has started."""
        self._ask("start")

    def read(self) -> list[Reading]:
        """Ask every process."""
        return self._ask("read")

    def stop(self) -> None:
        """Shut the workers down, and end the processes."""
        self._ask("stop")
        for process in self._processes:
            process.join()

    def _ask(self, command: str | None) -> list[Any]:
        for pipe in self._pipes:
            if command is not None:
                pipe.send(command)
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(PATIENCE):
                raise RuntimeError(f"a process has not answered within {PATIENCE:g} s")
            answers.append(pipe.recv())
        return answers


@contextmanager
def running(dsn: str, plans: Sequence[Plan]) -> Iterator[Replicas]:
    """Yield replicas whose workers have started."""
    replicas = Replicas(dsn, plans)
    replicas.start()
    yield replicas
    replicas.stop()


def spread(workers: int, processes: int, **options: Any) -> list[Plan]:
    """Plan processes with equally many workers."""
    return [Plan(workers // processes, **options) for _ in range(processes)]


class _Errors(NoopObserver):
    def __init__(self) -> None:
        self.count = 0

    @override
    def worker_error(self, error: BaseException) -> None:
        self.count += 1


def _serve(pipe: Connection, dsn: str, plan: Plan) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    errors, starts, workers = _Errors(), list[tuple[str, float]](), list[Worker]()
    ran = [0] * plan.workers
    limits = dict([plan.limit_of] if plan.limit_of else [])

    def mux(number: int) -> Mux:
        def handler(job: Job) -> None:
            if plan.notes_starts:
                starts.append((job.id, monotonic()))
            if plan.handler_s:
                sleep(plan.handler_s)
            ran[number] += 1  # one thread at a time, as far as a count of shares needs

        return Mux().register("noop", handler, limit=limits.get("type"))

    with Client(dsn) as client:
        pipe.send(None)
        while True:
            match pipe.recv():
                case "start":
                    for number in range(plan.workers):
                        worker = Worker(
                            client,
                            QUEUE,
                            mux(number),
                            concurrency=plan.concurrency,
                            observer=errors,
                            limits=limits.get("queue"),
                        )
                        workers.append(worker)
                    _each(workers, partial(_run, errors=errors))
                    pipe.send(None)
                case "read":
                    pipe.send(
                        Reading(
                            cpu_s=process_time(),
                            mib=resident(),
                            threads=threading.active_count(),
                            errors=errors.count,
                            connected=sum(
                                all(queue.is_connected for queue in worker.health().queues.values())
                                for worker in workers
                            ),
                            ran=tuple(ran),
                            starts=tuple(starts),
                        )
                    )
                case _:
                    _each(workers, Worker.shutdown)
                    pipe.send(None)
                    return


def _run(worker: Worker, errors: _Errors) -> None:
    """Start a worker, again and again, as a supervisor does."""
    while True:
        try:
            worker.run()
        except (psycopg.OperationalError, BgjobError) as error:
            errors.worker_error(error)
        else:
            return


def _each(workers: Sequence[Worker], do: Any) -> None:
    """Do it with every worker, with several at once."""
    left = iter(workers)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                worker = next(left, None)
            if worker is None:
                return
            do(worker)

    threads = [threading.Thread(target=work) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def processes_of(pid: int) -> list[int]:
    """Return the children of a process: of the server's main one, its sessions and helpers."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def cpu_of(pid: int) -> float:
    """Return the processor time of a server in seconds, with that of ended sessions."""
    ticks = sum(_times(pid, 11, 15))
    for child in processes_of(pid):
        try:
            ticks += sum(_times(child, 11, 13))
        except OSError:
            continue  # it has just ended
    return ticks / os.sysconf("SC_CLK_TCK")


def _times(pid: int, first: int, end: int) -> list[int]:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return [int(number) for number in fields[first:end]]
