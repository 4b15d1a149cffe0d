"""Chooses some jobs of each type: the first, the last, and others at random."""

import random
from collections import deque
from collections.abc import Iterator

from bgjob._sql.preflight import Key


class _OfType:
    __slots__ = ("first", "last", "others", "passed", "room")

    def __init__(self, size: int) -> None:
        edge = size // 3
        self.first: list[Key] = []
        self.room = size - 2 * edge  # of the random ones
        self.last: deque[Key] = deque(maxlen=edge or None)
        self.others: list[Key] = []
        self.passed = 0  # neither among the first nor, now, among the last


class Sample:
    """Keys of at most `size` jobs of each type, from all of them in their order.

    A third are the first ones and a third the last ones, which old and new code wrote. The rest is
    chosen at random of those between, each with the same chance.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._edge = size // 3
        self._types: dict[str, _OfType] = {}
        self._random = random.Random()  # noqa: S311 (no secret)

    def add(self, type: str, key: Key) -> None:  # noqa: A002
        """Take the next job of a type into account."""
        of_type = self._types.get(type)
        if of_type is None:
            of_type = self._types[type] = _OfType(self._size)
        if len(of_type.first) < self._edge:
            of_type.first.append(key)
            return
        if self._edge:
            if len(of_type.last) < self._edge:
                of_type.last.append(key)
                return
            passed = of_type.last[0]
            of_type.last.append(key)
            key = passed
        of_type.passed += 1
        if len(of_type.others) < of_type.room:
            of_type.others.append(key)
        elif (place := self._random.randrange(of_type.passed)) < of_type.room:
            of_type.others[place] = key

    def keys(self) -> Iterator[Key]:
        """Yield the chosen keys."""
        for of_type in self._types.values():
            yield from of_type.first
            yield from of_type.others
            yield from of_type.last
