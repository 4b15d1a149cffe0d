"""What a worker counts for each queue and type, as one list of numbers, which can be added up."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from operator import add
from typing import TypeAlias

OUTCOMES = ("completed", "retried", "rescheduled", "dead", "lost", "cancelled")
"""The first numbers."""

TIMEOUTS = len(OUTCOMES)
"""Where the number of timeouts is; two histograms follow."""

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Seconds: the upper bounds of the buckets; the last one has none."""

_SIZE = len(BUCKETS) + 2  # and the last bucket, and the sum
RUN = TIMEOUTS + 1
WAIT = RUN + _SIZE
_RUN_SUM, _WAIT_SUM = WAIT - 1, WAIT + _SIZE - 1
_NUMBERS = WAIT + _SIZE

Pair: TypeAlias = tuple[str, str]
"""A queue and a type."""

Numbers: TypeAlias = list[float]

OTHER = "_other"
"""Instead of a type or class beyond the first ones."""


class Counts:
    """The numbers of each queue and type, and the errors; its user locks it.

    Args:
        most: the pairs that have numbers of their own.

    """

    def __init__(self, most: int) -> None:
        self.pairs: dict[Pair, Numbers] = {}
        self.errors: dict[str, float] = {}
        self._most = most

    def numbers(self, queue: str, type_: str) -> Numbers:
        """Return the numbers of a pair, to be changed."""
        found = self.pairs.get((queue, type_))
        if found is None:
            pair = (queue, type_ if len(self.pairs) < self._most else OTHER)
            found = self.pairs.setdefault(pair, [0] * _NUMBERS)
        return found

    def error(self, name: str) -> None:
        """Count an error by its class."""
        name = name if name in self.errors or len(self.errors) < self._most else OTHER
        self.errors[name] = self.errors.get(name, 0) + 1

    def copy(self) -> "Counts":
        """Return a copy that does not change."""
        return total([self], self._most)


def ran(numbers: Numbers, seconds: float) -> None:
    """Add a run of a handler."""
    numbers[RUN + bisect_left(BUCKETS, seconds)] += 1
    numbers[_RUN_SUM] += seconds


def waited(numbers: Numbers, seconds: float) -> None:
    """Add the wait of a job."""
    numbers[WAIT + bisect_left(BUCKETS, seconds)] += 1
    numbers[_WAIT_SUM] += seconds


def total(all_: Iterable[Counts], most: int) -> Counts:
    """Return the sum of counts."""
    summed = Counts(most)
    for counts in all_:
        for (queue, type_), numbers in counts.pairs.items():
            into = summed.numbers(queue, type_)
            into[:] = map(add, into, numbers)
        for name, number in counts.errors.items():
            summed.errors[name] = summed.errors.get(name, 0) + number
    return summed


def histogram(numbers: Numbers, start: int) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets and the sum of the histogram that starts there."""
    buckets, below = [], 0.0
    for place, bound in enumerate([*map(str, BUCKETS), "+Inf"]):
        below += numbers[start + place]
        buckets.append((bound, below))
    return buckets, numbers[start + _SIZE - 1]


class Changes:
    """The changes of counts, for a program that keeps a copy elsewhere."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._told: dict[Pair, Numbers] = {}

    def take(self) -> list[tuple[str, str, Numbers]]:
        """Return the pairs that have changed since the last call, with all their numbers."""
        changed = [
            (queue, type_, numbers.copy())
            for (queue, type_), numbers in self._counts.pairs.items()
            if self._told.get((queue, type_)) != numbers
        ]
        self._told |= {(queue, type_): numbers for queue, type_, numbers in changed}
        return changed


def take_over(
    counts: Counts,
    changed: Iterable[tuple[str, str, Numbers]],
    errors: Mapping[str, float],
) -> None:
    """Write changes into a copy of the counts."""
    for queue, type_, numbers in changed:
        counts.pairs[queue, type_] = numbers
    counts.errors = dict(errors)
