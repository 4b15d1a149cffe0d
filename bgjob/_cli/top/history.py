"""What the overviews of one run said, one after the other."""

from collections import deque

from bgjob.stats import Overview

_KEPT = 60
_STRETCH = 30.0
"""Seconds over which a trend is taken."""

_STEADY = 0.05
"""Seconds by which an age may change each second while it counts as steady."""


class History:
    """The ages of the oldest due jobs, by queue.

    Where the oldest due job of a queue stays the same, its age grows by a second each second. It
    grows more slowly where workers take jobs, but too few, and shrinks where they catch up.
    """

    def __init__(self) -> None:
        self._overviews: deque[tuple[float, dict[str, float]]] = deque(maxlen=_KEPT)

    def add(self, overview: Overview) -> None:
        """Remember an overview."""
        ages = {queue.queue: queue.oldest_due_age or 0.0 for queue in overview.queues}
        self._overviews.append((overview.at.timestamp(), ages))

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
