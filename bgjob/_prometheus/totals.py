"""Adds up the metrics of several processes, which send them as lines of JSON."""

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from bgjob._prometheus import families
from bgjob._prometheus.counts import Changes, Counts, take_over, total
from bgjob._prometheus.families import Found
from bgjob._prometheus.metrics import MOST, Health, Metrics, jobs, workers


class Sender:
    """What a process sends of its metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._changes = Changes(metrics.counts)

    def take(self) -> dict[str, Any]:
        """Return what has changed since the last call, for `Totals.take_over`."""
        with self._metrics.lock:
            return {"pairs": self._changes.take(), "errors": self._metrics.counts.errors.copy()}


class Totals:
    """The sum of several processes, also of those that have ended; a collector. Thread-safe.

    Args:
        healths: returns how the workers of the processes are.

    """

    def __init__(self, healths: Callable[[], Iterable[Health]]) -> None:
        self._healths = healths
        self._lock = threading.Lock()
        self._alive: dict[Hashable, Counts] = {}
        self._ended = Counts(MOST)

    def take_over(self, process: Hashable, sent: Mapping[str, Any]) -> None:
        """Take what a process has sent."""
        with self._lock:
            counts = self._alive.setdefault(process, Counts(MOST))
            take_over(counts, sent["pairs"], sent["errors"])

    def ended(self, process: Hashable) -> None:
        """Keep the counts of a process that has ended: a counter never decreases."""
        with self._lock:
            counts = self._alive.pop(process, None)
            if counts is not None:
                self._ended = total([self._ended, counts], MOST)

    def describe(self) -> Iterable[Found]:
        """Return the metrics without samples."""
        return [family.empty() for family in families.OF_WORKERS]

    def collect(self) -> Iterable[Found]:
        """Return the metrics with their samples."""
        with self._lock:
            counts = total([self._ended, *self._alive.values()], MOST)
        return [*jobs(counts), *workers(self._healths())]
