"""What the overviews of one run said, one after the other."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from bgjob.stats import Overview
from bgjob.workers import WorkerStatus

_KEPT = 60
_STRETCH = 30.0
"""Seconds over which a trend is taken."""

_BEATS = 4
"""Beats of a worker, which come every 10 s, over which a rate is taken."""

_STEADY = 0.05
"""Seconds by which an age may change each second while it counts as steady."""


class Rates(NamedTuple):
    """What the workers did each second."""

    completed: float
    failed: float


class History:
    """The ages of the oldest due jobs, by queue, and the counts of the workers.

    Where the oldest due job of a queue stays the same, its age grows by a second each second. It
    grows more slowly where workers take jobs, but too few, and shrinks where they catch up.
    """

    def __init__(self) -> None:
        self._overviews: deque[tuple[float, dict[str, float]]] = deque(maxlen=_KEPT)
        self._dead: deque[tuple[float, int | None]] = deque(maxlen=_KEPT)
        self._workers: dict[int, deque[WorkerStatus]] = {}

    def add(self, overview: Overview, workers: Sequence[WorkerStatus] = ()) -> None:
        """Remember an overview, and what its workers have counted."""
        ages = {queue.queue: queue.oldest_due_age or 0.0 for queue in overview.queues}
        at = overview.at.timestamp()
        self._overviews.append((at, ages))
        dead = [queue.dead for queue in overview.queues]
        is_exact = all(count.is_exact for count in dead)
        self._dead.append((at, sum(count.number for count in dead) if is_exact else None))
        before, self._workers = self._workers, {}
        for worker in workers:
            seen = before.get(worker.number, deque(maxlen=_BEATS))
            if seen and seen[-1].seen_at == worker.seen_at:
                seen.pop()  # no beat since; it may count as lost now
            seen.append(worker)
            self._workers[worker.number] = seen

    def trend(self, queue: str) -> int:
        """Return 1 if the age has grown recently, -1 if it has shrunk, and 0 otherwise."""
        if not self._overviews:
            return 0
        now, ages = self._overviews[-1]
        then, earlier = next(o for o in self._overviews if now - o[0] <= _STRETCH)
        if now <= then:
            return 0
        change = (ages.get(queue, 0.0) - earlier.get(queue, 0.0)) / (now - then)
        return (change > _STEADY) - (change < -_STEADY)

    def dead_trend(self) -> int:
        """Return 1 if more jobs died within an hour than recently, -1 if fewer, and 0 otherwise."""
        if not self._dead:
            return 0
        now, dead = self._dead[-1]
        _, earlier = next(d for d in self._dead if now - d[0] <= _STRETCH)
        if dead is None or earlier is None:
            return 0
        return (dead > earlier) - (dead < earlier)

    def rates(self, queue: str | None = None) -> Rates | None:
        """Return what the workers did each second; None until one has told it twice.

        Args:
            queue: only the workers of this queue; None is returned if one of them also has
                another queue, since a worker counts all its queues together.

        """
        completed = failed = 0.0
        has_rate = False
        for seen in self._workers.values():
            first, last = seen[0], seen[-1]
            if queue is not None and last.is_alive:
                if queue not in last.queues:
                    continue
                if len(last.queues) > 1:
                    return None
            seconds = (last.seen_at - first.seen_at).total_seconds()
            if seconds > 0 and last.is_alive:
                has_rate = True
                completed += (last.counts.completed - first.counts.completed) / seconds
                failed += (_failures(last) - _failures(first)) / seconds
        return Rates(completed, failed) if has_rate else None


def _failures(worker: WorkerStatus) -> int:
    return worker.counts.retried + worker.counts.dead
