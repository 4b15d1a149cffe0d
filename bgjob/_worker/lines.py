"""The lines of jobs with exclusive keys: of each key some may run, mostly one, the others wait.

A worker has claimed them together, and holds their key until the last of them is settled. So the
next one starts as soon as one before it ends, on the same slot if that is free, without the
control thread and without the server. A job with a key is in no batch, so that it need not be
gathered with others before.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from time import monotonic

from bgjob._engine.outcome import Outcome
from bgjob._sql.keys import NO_SLOTS
from bgjob._sql.settlements import Claimed


class Lines:
    """The jobs of each key, in the order in which they were granted it. Thread-safe.

    The first of a line, as many as it has places, run or wait for a slot of the worker. Each leaves
    when its handler has ended or was given up. The next one starts unless the lease may have ended
    meanwhile, as after the process was frozen, or that job was given back. Then all that wait in
    the line are given back.

    Args:
        jobs: the jobs that wait for a slot.
        clock: of the leases' ends.

    """

    def __init__(self, jobs: deque[Claimed], clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._jobs = jobs
        self._lock = threading.Lock()
        self._first: dict[str, list[Claimed]] = {}
        self._behind: dict[str, deque[Claimed]] = {}
        self._places: dict[str, int] = {}  # of lines that have not one
        self._ended: list[Claimed] = []
        self.held_until = inf
        """When the first lease of the worker ends."""
        self.is_used = False

    @property
    def waiting(self) -> list[Claimed]:
        """The jobs behind the first ones of their line."""
        with self._lock:
            return [*self._ended, *(c for line in self._behind.values() for c in line)]

    def enter(
        self, batch: Sequence[Claimed], places: Mapping[str, int] = NO_SLOTS
    ) -> list[Claimed]:
        """Add jobs to the ends of their lines; return those that may run now.

        Args:
            batch: the jobs.
            places: of their keys, if they have not one.

        """
        runs: list[Claimed] = []
        first, behind = self._first, self._behind
        with self._lock:
            for claimed in batch:
                key = claimed.job.exclusive
                if key is None:
                    runs.append(claimed)
                    continue
                if key in places:
                    self._places[key] = places[key]
                if key not in first:
                    self.is_used = True
                    first[key] = [claimed]
                    runs.append(claimed)
                elif key in behind:
                    behind[key].append(claimed)
                else:
                    behind[key] = deque([claimed])
                if key in places and key in behind:
                    runs += self._start(key)
        return runs

    def _start(self, key: str) -> list[Claimed]:
        first, behind = self._first[key], self._behind[key]
        free = self._places.get(key, 1) - len(first)
        started = [behind.popleft() for _ in range(min(free, len(behind)))]
        first += started
        return started

    def leave(self, claimed: Claimed, *, goes_on: bool = True) -> bool:
        """Record that one of the first jobs of a line has ended. Idempotent.

        Args:
            claimed: the job, which has a key.
            goes_on: whether the next one may start.

        Returns:
            Whether the line is to be given back.

        """
        key = str(claimed.job.exclusive)
        with self._lock:
            first = self._first.get(key)
            if not first:
                return False
            if first[0] is claimed:
                del first[0]
            elif not self._remove(key, claimed):
                return False
            behind = self._behind.get(key)
            if not behind:
                self._forget(key)
                return False
            if goes_on and self._clock() < self.held_until:
                if key in self._places:  # one before them may still wait for a slot
                    self._jobs.extend(self._start(key))
                else:
                    following = behind.popleft()
                    first.append(following)
                    self._jobs.appendleft(following)
                return False
            self._ended += self._behind.pop(key)
            self._forget(key)
            return True

    def still_in(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Return the outcomes of jobs that are among the first of a line.

        Nearly all jobs have left, on the thread that ran them.
        """
        first = self._first
        return [
            outcome
            for outcome in outcomes
            for each in first.get(outcome.claimed.job.exclusive or "", ())
            if each.token == outcome.claimed.token and each.job.id == outcome.claimed.job.id
        ]

    def _remove(self, key: str, claimed: Claimed) -> bool:
        first = self._first.get(key, [])
        for place, each in enumerate(first):
            if (each.token, each.job.id) == (claimed.token, claimed.job.id):
                del first[place]
                return True
        return False

    def _forget(self, key: str) -> None:
        """Forget a line in which nothing waits, if nothing of it runs."""
        if not self._first[key]:
            del self._first[key]
            self._behind.pop(key, None)
            self._places.pop(key, None)

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
            withdrawn = [*jobs, *self._ended]
            self._ended = []
            for line in self._behind.values():
                withdrawn += line
            self._behind.clear()
            for claimed in (*jobs, *lost):
                key = claimed.job.exclusive
                if key is not None and self._remove(key, claimed):
                    self._forget(key)
        return withdrawn
