"""Counts a worker's events, and collects them with how the worker is."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from typing_extensions import override

from bgjob import __version__
from bgjob._prometheus import counts as counting
from bgjob._prometheus import families
from bgjob._prometheus.counts import OUTCOMES, Counts
from bgjob._prometheus.families import Found
from bgjob.job import Job
from bgjob.observer import NoopObserver, Times, with_times
from bgjob.workers import QueueHealth, WorkerHealth

MOST = 200
"""The pairs of a queue and a type that are told apart."""

_COMPLETED, _RETRIED, _RESCHEDULED, _DEAD, _LOST, _CANCELLED = range(len(OUTCOMES))


class Metrics(NoopObserver):
    """Counts what the workers of this process do, for Prometheus.

    An observer of any number of workers, and a collector of prometheus-client. Also the
    slots, the connection and the liveness of each worker that it observes are exported; the
    operations guide lists all metrics. Thread-safe.

    A job costs about two microseconds, on the thread that calls the observers, and no
    statement. Labels are queues and types, never an id or an error's text.

    Args:
        registry: where it is registered; by default the one that prometheus-client's own
            functions serve. None registers it nowhere.
        most: the number of pairs of a queue and a type that are told apart; 200 by default,
            which is far more than most programs have. The jobs of further types are counted
            under the type `_other`.

    """

    def __init__(self, *, registry: CollectorRegistry | None = REGISTRY, most: int = MOST) -> None:
        self.registry = registry
        """Where it is registered."""
        self.lock = threading.Lock()
        self._most = most
        self.counts = Counts(most)
        self._watched: list[Callable[[], WorkerHealth]] = []
        if registry is not None:
            registry.register(self)

    def watch_worker(self, health: Callable[[], WorkerHealth]) -> None:
        """Export how a worker is, too; each worker that it observes calls this.

        Args:
            health: the worker's method.

        """
        with self.lock:
            alive = [watched for watched in self._watched if not watched().has_ended]
            self._watched = [*alive, health]

    def describe(self) -> Iterable[Found]:
        """Return the metrics without samples: registering needs their names."""
        return [family.empty() for family in families.OF_WORKERS]

    def collect(self) -> Iterable[Found]:
        """Return the metrics with their samples."""
        with self.lock:
            counts = self.counts.copy()
            found = [(watched, watched()) for watched in self._watched]
            self._watched = [watched for watched, health in found if not health.has_ended]
        return [*jobs(counts), *workers([health for _, health in found])]

    # -- events ----------------------------------------------------------------------------

    def _ended(self, outcome: int, job: Job, times: Times | None) -> None:
        ran, waited = (None, None) if times is None else (times.ran, times.waited)
        with self.lock:  # several workers may have one
            numbers = self.counts.numbers(job.queue, job.type)
            numbers[outcome] += 1
            if ran is not None:
                counting.ran(numbers, ran)
            if waited is not None:
                counting.waited(numbers, waited)

    @override
    @with_times
    def job_completed(self, job: Job, times: Times | None = None, /) -> None:
        self._ended(_COMPLETED, job, times)

    @override
    @with_times
    def job_rescheduled(self, job: Job, delay: float, times: Times | None = None, /) -> None:
        self._ended(_RESCHEDULED, job, times)

    @override
    @with_times
    def job_will_be_retried(
        self,
        job: Job,
        delay: float,
        error: str | BaseException | None,
        times: Times | None = None,
        /,
    ) -> None:
        self._ended(_RETRIED, job, times)

    @override
    @with_times
    def job_moved_to_dlq(
        self, job: Job, error: str | BaseException, times: Times | None = None, /
    ) -> None:
        self._ended(_DEAD, job, times)

    @override
    @with_times
    def job_lease_lost(self, job: Job, times: Times | None = None, /) -> None:
        self._ended(_LOST, job, times)

    @override
    @with_times
    def job_cancelled(self, job: Job, times: Times | None = None, /) -> None:
        self._ended(_CANCELLED, job, times)

    @override
    def job_timed_out(self, job: Job, seconds: float, /) -> None:
        with self.lock:
            self.counts.numbers(job.queue, job.type)[counting.TIMEOUTS] += 1

    @override
    def worker_error(self, error: BaseException, /) -> None:
        with self.lock:
            self.counts.error(type(error).__name__)


# -- collecting ----------------------------------------------------------------------------


def jobs(counts: Counts) -> Iterator[Found]:
    """Return the metrics of jobs and errors."""
    pairs = counts.pairs.items()
    yield families.JOBS.of(
        ((*pair, outcome), numbers[place])
        for pair, numbers in pairs
        for place, outcome in enumerate(OUTCOMES)
    )
    yield families.TIMEOUTS.of((pair, numbers[counting.TIMEOUTS]) for pair, numbers in pairs)
    for family, start in ((families.RUN, counting.RUN), (families.WAIT, counting.WAIT)):
        found = family.empty()
        assert isinstance(found, HistogramMetricFamily)  # noqa: S101 (the family says so)
        for pair, numbers in pairs:
            buckets, sum_ = counting.histogram(numbers, start)
            found.add_metric(pair, buckets, sum_)
        yield found
    yield families.ERRORS.of(((name,), number) for name, number in counts.errors.items())


class Health(Protocol):
    """What is exported of a worker; a WorkerHealth."""

    @property
    def queues(self) -> Mapping[str, QueueHealth]: ...
    @property
    def number(self) -> int | None: ...
    @property
    def program(self) -> str: ...
    @property
    def release(self) -> str | None: ...


def workers(healths: Iterable[Health]) -> Iterator[Found]:
    """Return the metrics of workers: sums, and the worst."""
    healths = list(healths)
    of_queue: dict[str, list[QueueHealth]] = {}
    for health in healths:
        for queue, each in health.queues.items():
            of_queue.setdefault(queue, []).append(each)
    now = time.time()
    queues = of_queue.items()
    yield families.SLOTS.of(((queue,), sum(e.slots for e in each)) for queue, each in queues)
    yield families.BUSY.of(((queue,), sum(e.busy for e in each)) for queue, each in queues)
    yield families.CONNECTED.of(
        ((queue,), min(e.is_connected for e in each)) for queue, each in queues
    )
    yield families.TURNED.of(
        ((queue,), now - max(e.turned for e in each)) for queue, each in queues
    )
    yield families.INFO.of(
        (
            (
                __version__,
                health.release or "",
                health.program,
                "" if health.number is None else str(health.number),
            ),
            1,
        )
        for health in healths
    )
