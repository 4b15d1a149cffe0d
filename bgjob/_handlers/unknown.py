"""Jobs of unknown types: put back while they are young, or moved to the dead-letter table."""

import random
import threading
from dataclasses import dataclass
from time import monotonic

from bgjob._logger import log as _log
from bgjob._words import lasting
from bgjob.errors import UnknownTypeError
from bgjob.job import Job
from bgjob.result import MoveToDlq, Reschedule

_SHARE = 0.25
"""Of a job's age: how long it is put back.

So a job waits at most a quarter longer than until the new workers came, and the number of its
claims grows only with the logarithm of its age."""
_SHORTEST, _LONGEST = 1.0, 60.0
"""Seconds: a fresh job does not spin, and a new release has all jobs within a minute."""
_SPREAD = 0.2
"""The share of a delay by which it is shortened at random: jobs enqueued together are spread, so
that their claims do not come at one moment, nor all to the same worker."""

_EVERY = 60.0
"""Seconds between two warnings of a type."""
_MOST_TYPES = 100
"""The types of which is known when they were warned of; of more nothing is said."""


class UnknownTypes:
    """What happens to jobs of unknown types. Thread-safe.

    Args:
        window: the seconds after its enqueue within which such a job is put back.

    """

    def __init__(self, window: float) -> None:
        self.window = window
        self._warned: dict[str, float] = {}  # by type: when
        self._lock = threading.Lock()

    def decide(self, job: Job, now: float) -> Reschedule | MoveToDlq:
        """Return the result of a job at this time of the server, in seconds since 1970."""
        age = now - job.created_at.timestamp()
        left = self.window - age
        if left <= 0:
            return MoveToDlq(unknown_type(job.type))
        delay = min(max(_SHARE * age, _SHORTEST), _LONGEST)
        delay *= random.uniform(1 - _SPREAD, 1)  # noqa: S311
        self._warn(job, left)
        # At the end of the window it is claimed once more, and soon.
        return Reschedule(min(delay, max(left, _SHORTEST)))

    def _warn(self, job: Job, left: float) -> None:
        now = monotonic()
        with self._lock:
            if now < self._warned.get(job.type, now - _EVERY) + _EVERY:
                return
            if len(self._warned) >= _MOST_TYPES:
                self._warned = {t: at for t, at in self._warned.items() if now < at + _EVERY}
                if len(self._warned) >= _MOST_TYPES:
                    return
            self._warned[job.type] = now
        _log.warning(
            "no handler is registered for job type %r: job %r of queue %r is put back, for "
            "another %s at most, then it goes to the dead-letter table; start workers of a release "
            "that has the type",
            job.type,
            job.id,
            job.queue,
            lasting(left),
        )


@dataclass(frozen=True, slots=True)
class Unknown:
    """Returned for a job of an unknown type that may be put back."""

    job: Job
    types: UnknownTypes

    def decide(self, now: float) -> Reschedule | MoveToDlq:
        """Return its result at this time of the server, in seconds since 1970."""
        return self.types.decide(self.job, now)


def unknown_type(type_: str) -> UnknownTypeError:
    """Make the error of a job of an unknown type."""
    return UnknownTypeError(
        f"no handler is registered for job type {type_!r}; register it, then requeue the job"
    )
