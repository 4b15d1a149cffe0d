"""Runs of handlers whose outcome the worker tells later, as an observer's event.

A middleware sees how a handler ended, but not what became of its job: whether it is retried or
dead is decided after it, and a lease may have been lost. An integration that has to know is both a
middleware and an observer, and keeps what it knows of a run from one to the other.
"""

from threading import Lock
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from bgjob.job import Job

R = TypeVar("R")

_Key: TypeAlias = tuple[object, ...]

_MOST = 100_000
"""As many runs are kept as events wait for an observer before some are dropped."""


class Start(NamedTuple):
    """What an event has told before a handler is called."""

    is_observed: bool
    """Whether an event will tell how it ends: not in `do` and `drain`."""
    waited: float | None
    """Seconds for which the job was due."""


class Runs(Generic[R]):
    """What an integration knows of the runs that have begun. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._started: dict[_Key, float | None] = {}
        self._runs: dict[_Key, R] = {}

    def __len__(self) -> int:
        return len(self._started) + len(self._runs)

    def started(self, job: Job, waited: float | None) -> None:
        """Record that a handler is about to be called; the observer's part."""
        with self._lock:
            self._started[_key(job)] = waited
            if len(self._started) > _MOST:  # released before their handlers were called
                del self._started[next(iter(self._started))]

    def start(self, job: Job) -> Start:
        """Return what is known of a run that begins; the middleware's part."""
        key = _key(job)
        with self._lock:
            return Start(key in self._started, self._started.pop(key, None))

    def keep(self, job: Job, run: R) -> R | None:
        """Keep a run until its outcome is told; return one whose events were dropped, if any."""
        with self._lock:
            self._runs[_key(job)] = run
            return self._runs.pop(next(iter(self._runs))) if len(self._runs) > _MOST else None

    def get(self, job: Job) -> R | None:
        """Return a run that goes on."""
        with self._lock:
            return self._runs.get(_key(job))

    def take(self, job: Job) -> R | None:
        """Return a run that has ended, and forget it."""
        key = _key(job)
        with self._lock:
            self._started.pop(key, None)
            return self._runs.pop(key, None)


def _key(job: Job) -> _Key:
    """Return what tells a run from others: a rescheduled job has the same attempt again."""
    return job.id, job.attempt, job.updated_at
