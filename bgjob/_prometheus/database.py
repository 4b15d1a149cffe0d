"""Collects the measurements of a database."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Protocol

import psycopg
from prometheus_client import REGISTRY, CollectorRegistry

from bgjob._checks import Duration, seconds
from bgjob._logger import log as _log
from bgjob._prometheus import families
from bgjob._prometheus.families import Found
from bgjob.client import Client
from bgjob.errors import BgjobError
from bgjob.measurements import PARTS, Measurements
from bgjob.stats import QueueStats
from bgjob.workers import WorkerStatus

_CAP = 10_000
_STATES = ("working", "stopping", "ended", "failed", "lost")


class Measured(Protocol):
    """What a Client has of it."""

    def measure(self, *, cap: int) -> Measurements: ...
    def stats(self) -> list[QueueStats]: ...


class DatabaseMetrics:
    """Collects what a database holds, for Prometheus: depths, ages, workers, tables.

    A collector of prometheus-client for *one* program a database, such as `bgjob metrics`;
    the operations guide lists all metrics. Thread-safe. A collection asks seven statements, each
    of at most 5 s. If the database does not answer, `bgjob_scrape_success` is 0, and the
    others are left out.

    Args:
        client: of the database.
        registry: where it is registered; by default the one that prometheus-client's own
            functions serve. None registers it nowhere.
        keep: seconds or a timedelta for which an answer is given again; 5 s by default, so that
            several Prometheus servers cost as much as one.
        exact: whether to count due, delayed and running jobs exactly, by `client.stats()`,
            which takes a second or more with a million jobs. False by default: counts stop at
            10,000 for each priority of a queue, and ages are exact in any case.

    """

    def __init__(
        self,
        client: Client | Measured,
        *,
        registry: CollectorRegistry | None = REGISTRY,
        keep: Duration = 5.0,
        exact: bool = False,
    ) -> None:
        self._client = client
        self._keep = seconds(keep, "keep")
        self._exact = exact
        self._lock = threading.Lock()
        self._kept: list[Found] = []
        self._kept_until = float("-inf")
        self._vanished = _Vanished()
        if registry is not None:
            registry.register(self)

    def describe(self) -> Iterable[Found]:
        """Return the metrics without samples: registering asks no database."""
        return [family.empty() for family in families.OF_DATABASES]

    def collect(self) -> Iterable[Found]:
        """Return the metrics with their samples."""
        with self._lock:  # those who come meanwhile get the same answer
            if time.monotonic() >= self._kept_until:
                self._kept = self._ask()
                self._kept_until = time.monotonic() + self._keep
            return self._kept

    def _ask(self) -> list[Found]:
        began = time.perf_counter()
        found: Measurements | None = None
        exact: list[QueueStats] | None = None
        try:
            found = self._client.measure(cap=_CAP)
            if self._exact:
                exact = self._client.stats()
        except (psycopg.Error, BgjobError) as error:
            _log.warning("cannot collect the metrics of the database: %s", error)
            found = None
        failed = PARTS if found is None else tuple(found.failures)
        if found is not None:
            for part, why in found.failures.items():
                _log.warning("cannot collect the metrics of %s: %s", part, why)
        collected = [] if found is None else [*_database(found, exact)]
        if found is not None and "workers" not in failed:
            collected.append(families.LOST.of([((), self._vanished.count(found.workers))]))
        return [
            *collected,
            families.SCRAPE_SECONDS.of([((), time.perf_counter() - began)]),
            families.SCRAPE_SUCCESS.of(((part,), float(part not in failed)) for part in PARTS),
        ]


class _Vanished:
    """Counts the workers that vanish, each time once."""

    def __init__(self) -> None:
        self._lost: set[int] | None = None
        self._total = 0

    def count(self, workers: Iterable[WorkerStatus]) -> int:
        """Return how many have vanished since the first call."""
        lost = {worker.number for worker in workers if worker.state == "lost"}
        if self._lost is not None:
            self._total += len(lost - self._lost)
        self._lost = lost
        return self._total


def _database(found: Measurements, exact: list[QueueStats] | None) -> Iterator[Found]:
    queues = found.queues
    counted = {
        families.DUE: {queue.queue: queue.due.number for queue in queues},
        families.DELAYED: {queue.queue: queue.delayed.number for queue in queues},
        families.RUNNING: {queue.queue: queue.running.number for queue in queues},
    }
    if exact is not None:
        sums: dict[str, Counter[str]] = defaultdict(Counter)
        for stats in exact:
            sums[stats.queue].update(due=stats.due, delayed=stats.delayed, running=stats.running)
        counted = {
            families.DUE: {queue: sum_["due"] for queue, sum_ in sums.items()},
            families.DELAYED: {queue: sum_["delayed"] for queue, sum_ in sums.items()},
            families.RUNNING: {queue: sum_["running"] for queue, sum_ in sums.items()},
        }
    for family, numbers in counted.items():
        yield family.of(((queue,), number) for queue, number in numbers.items())
    yield families.WAITING.of(((q.queue,), q.waiting_for_keys.number) for q in queues)
    yield families.OLDEST.of(((q.queue,), q.oldest_due_age or 0.0) for q in queues)
    yield families.PAUSED.of(((q.queue,), float(q.is_paused)) for q in queues)
    if "workers" not in found.failures:
        yield from _workers(found)
    yield families.DEAD.of(((dead.queue, dead.type), dead.jobs) for dead in found.dead)
    yield families.LATE.of(((late.name,), late.seconds) for late in found.schedules)
    yield families.HORIZON_SECONDS.of(
        ((held.holder,), held.seconds or 0.0)
        for held in found.horizon
        if held.seconds is not None or not held.transactions
    )
    yield families.HORIZON_TRANSACTIONS.of(
        ((held.holder,), held.transactions) for held in found.horizon
    )
    yield families.TABLE_ROWS.of(((table.name,), table.rows) for table in found.tables)
    yield families.DEAD_ROWS.of(((table.name,), table.dead_rows) for table in found.tables)
    yield families.TABLE_BYTES.of(((table.name,), table.bytes) for table in found.tables)
    yield families.INDEX_BYTES.of(((table.name,), table.index_bytes) for table in found.tables)
    usage = found.notify_queue
    yield families.NOTIFY.of([] if usage is None else [((), usage)])


def _workers(found: Measurements) -> Iterator[Found]:
    states: Counter[str] = Counter(worker.state for worker in found.workers)
    yield families.WORKERS.of(((state,), states[state]) for state in _STATES)
    # A queue without a worker has a zero, which an alert can compare.
    number = dict.fromkeys((queue.queue for queue in found.queues), 0)
    slots = number.copy()
    for worker in found.workers:
        if worker.is_alive:
            for queue, each in worker.queues.items():
                number[queue] = number.get(queue, 0) + 1
                slots[queue] = slots.get(queue, 0) + each
    yield families.QUEUE_WORKERS.of(((queue,), workers) for queue, workers in number.items())
    yield families.QUEUE_SLOTS.of(((queue,), each) for queue, each in slots.items())
