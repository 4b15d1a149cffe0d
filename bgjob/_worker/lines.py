"""The lines of jobs with exclusive keys: of each key one job may have a slot, the others wait.

A worker has claimed them together, and holds their key until the last of them is settled. So the
next one starts as soon as the one before it ends, on the same slot if that is free, without the
control thread and without the server. A job with a key is in no batch, so that it need not be
gathered with others before.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from math import inf
from time import monotonic

from bgjob._sql.settlements import Claimed


class Lines:
    """The jobs of each key, in the order in which they were granted it. Thread-safe.

    The first of a line runs or waits for a slot; it leaves when its handler has ended or was given
    up. The next one starts unless the lease may have ended meanwhile, as after the process was
    frozen, or the first was given back. Then the whole line is given back.

    Args:
        jobs: the jobs that wait for a slot.
        clock: of the leases' ends.

    """

    def __init__(self, jobs: deque[Claimed], clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._jobs = jobs
        self._lock = threading.Lock()
        self._first: dict[str, Claimed] = {}
        self._behind: dict[str, deque[Claimed]] = {}
        self._ended: list[Claimed] = []
        self.held_until = inf
        """When the first lease of the worker ends."""
        self.is_used = False

    @property
    def waiting(self) -> list[Claimed]:
        """The jobs behind the first of their line."""
        with self._lock:
            return [*self._ended, *(c for line in self._behind.values() for c in line)]

    def enter(self, batch: Sequence[Claimed]) -> list[Claimed]:
        """Add jobs to the ends of their lines; return those that may run now."""
        runs: list[Claimed] = []
        with self._lock:
            for claimed in batch:
                key = claimed.job.exclusive
                if key is None:
                    runs.append(claimed)
                elif key not in self._first:
                    self.is_used = True
                    self._first[key] = claimed
                    runs.append(claimed)
                else:
                    self._behind.setdefault(key, deque()).append(claimed)
        return runs

    def leave(self, claimed: Claimed, *, goes_on: bool = True) -> bool:
        """Record that the first job of a line has ended. Idempotent.

        Args:
            claimed: the job, which has a key.
            goes_on: whether the next one may start.

        Returns:
            Whether the line is to be given back.

        """
        key = str(claimed.job.exclusive)
        if not _is_same(self._first.get(key), claimed):
            return False
        with self._lock:
            if not _is_same(self._first.get(key), claimed):
                return False
            line = self._behind.get(key)
            if not line:
                del self._first[key]
                self._behind.pop(key, None)
                return False
            if goes_on and self._clock() < self.held_until:
                self._first[key] = following = line.popleft()
                self._jobs.appendleft(following)
                return False
            del self._first[key]
            self._ended += self._behind.pop(key)
            return True

    def take_ended(self) -> list[Claimed]:
        """Return the jobs of lines that were ended since the last call."""
        if not self._ended:
            return []
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def withdraw(self, lost: Collection[Claimed]) -> list[Claimed]:
        """Take back the jobs that have not started, also those that wait for a slot.

        The handlers of lost jobs may run on; they are in no line any more.
        """
        jobs: list[Claimed] = []
        with self._lock:
            try:
                while True:
                    jobs.append(self._jobs.popleft())
            except IndexError:
                pass
            for claimed in (*jobs, *lost):
                key = claimed.job.exclusive
                if key is not None and _is_same(self._first.get(key), claimed):
                    del self._first[key]
            jobs += self._ended
            self._ended = []
            for line in self._behind.values():
                jobs += line
            self._behind.clear()
        return jobs


def _is_same(one: Claimed | None, other: Claimed) -> bool:
    return one is other or (
        one is not None and (one.token, one.job.id) == (other.token, other.job.id)
    )
