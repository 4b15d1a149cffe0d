"""How the jobs of a type are run: the options of a registration, checked, as one value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from types import EllipsisType
from typing import TypeAlias, TypedDict

from bgjob._checks import Duration, seconds
from bgjob._handlers.call import Middleware, can_be_called
from bgjob._logger import log as _log
from bgjob.job import Job, check_key, check_name, check_priority, check_slots
from bgjob.limit import Limit
from bgjob.result import Backoff, BackoffPolicy, MoveToDlq

Exclusive: TypeAlias = bool | Callable[[Job], str | None]
"""True: jobs of the type run one at a time. A callable: jobs with the same key do. `slots` lets
more of them run."""

MAX_ATTEMPTS = 25
"""The default of a job type."""

BACKOFF = Backoff()
"""The default of a job type, and the delay after a backoff that failed."""

MOST_AT_ONCE = 1000
"""The largest batch: as many jobs as one claim brings."""

BATCH_WAIT = 0.05
"""The default of a job type with a batch, in seconds: little beside the rate that a fuller call
gains, and no one waits for a job that is one of hundreds."""

_GRANTED = 2
"""Attempts beyond the last one for a job whose worker died during it.

Other jobs may have caused these deaths: a job is first claimed alone at its third death; see
_engine/isolation.py.
"""


class Policy(TypedDict, total=False):
    """The options of a job type; see Mux.register."""

    queue: str | None
    max_attempts: int | EllipsisType | None
    backoff: BackoffPolicy | None
    timeout: Duration | None
    priority: int | None
    retry_priority: int | None
    exclusive: Exclusive | None
    slots: int | None
    limit: Limit | None
    keep: bool
    middleware: Sequence[Middleware]


@dataclass(frozen=True, slots=True)
class TypePolicy:
    """The policy of a job type; see Mux.register."""

    job_type: str
    queue: str | None
    """The default of `Mux.request`."""
    max_attempts: int | None
    backoff: BackoffPolicy
    timeout: float | None
    """Seconds."""
    priority: int
    """The default of `Mux.request`."""
    retry_priority: int | None
    exclusive: Exclusive | None
    slots: int | None = None
    """How many jobs of a key run at once; None for one."""
    limit: Limit | None = None
    """Of its jobs over all workers."""
    keep: bool = False
    """Whether completed jobs are written to bgjob_history."""
    batch: int | None = None
    """The most jobs in one call of the handler; None for a handler of single jobs."""
    batch_wait: float = 0.0
    """Seconds for which a claimed job waits for others."""
    last_attempt: float = field(init=False)
    """The last attempt that is run: max_attempts, and two that are granted after deaths."""

    def __post_init__(self) -> None:
        of_type = f"of job type {self.job_type!r}"
        most, backoff, exclusive = self.max_attempts, self.backoff, self.exclusive
        if self.queue is not None:
            check_name(f"queue {of_type}", self.queue)
        if most is not None and (type(most) is not int or most < 1):
            raise ValueError(
                f"max_attempts {of_type} must be at least 1, or None for no limit, not {most!r}"
            )
        if isinstance(backoff, type) or not can_be_called(backoff, 1):
            raise TypeError(
                f"backoff {of_type} must be a Backoff() or another callable from the number of an "
                f"attempt to seconds, such as Backoff.constant(5), not {backoff!r}"
            )
        if self.timeout == 0:
            raise ValueError(f"timeout {of_type} must be over 0 s, or None for no timeout")
        check_priority(self.priority, f"priority {of_type}")
        if self.retry_priority is not None:
            check_priority(self.retry_priority, f"retry_priority {of_type}")
        if not (exclusive is None or isinstance(exclusive, bool) or callable(exclusive)):
            raise TypeError(
                f"exclusive {of_type} must be True for one job at a time, or a callable from a "
                f"job to its key, not {exclusive!r}"
            )
        if self.slots is not None:
            check_slots(self.slots, f"slots {of_type}")
            if not exclusive:
                raise ValueError(
                    f"slots {of_type} is the number of jobs of a key that run at once, and the "
                    "type has none: pass exclusive=True too, or a callable from a job to its key"
                )
        if self.limit is not None and not isinstance(self.limit, Limit):
            raise TypeError(
                f"limit {of_type} must be a Limit, such as Limit(rate='14/s'), not {self.limit!r}"
            )
        if not isinstance(self.keep, bool):
            raise TypeError(f"keep {of_type} must be True or False, not {self.keep!r}")
        self._check_batch(of_type)
        last = inf if most is None else most + _GRANTED
        object.__setattr__(self, "last_attempt", last)

    def _check_batch(self, of_type: str) -> None:
        batch = self.batch
        if batch is None:
            return
        if type(batch) is not int or not 1 <= batch <= MOST_AT_ONCE:
            raise ValueError(
                f"batch {of_type} must be from 1 to {MOST_AT_ONCE} jobs, or None for a handler of "
                f"single jobs, not {batch!r}"
            )
        if self.exclusive:
            raise ValueError(
                f"job type {self.job_type!r} has both exclusive= and batch=: jobs that run "
                "together must have their keys before; name the key in the request, "
                "EnqueueRequest(exclusive=...), or leave out one of the two"
            )

    def exhausted(self, job: Job) -> MoveToDlq:
        """Return the result of a job that had used all its attempts before this one."""
        return MoveToDlq(
            f"out of attempts: {self.max_attempts} of {self.max_attempts} were charged, the last "
            "without a result; its worker died or lost the lease"
            + (f"; last error: {job.last_error}" if job.last_error else "")
        )

    def key(self, job: Job) -> str | None:
        """Return the key of a job whose request names none; None for no key.

        Raises:
            ValueError, TypeError: the type's callable returned an invalid key; and whatever it
                raises.

        """
        if not callable(self.exclusive):
            return f"type:{self.job_type}" if self.exclusive else None
        key = self.exclusive(job)
        if key is not None:
            what = f"the exclusive key of a job of type {self.job_type!r}"
            check_key(what, key, job.queue, job.id)
        return key

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait after this attempt failed."""
        try:
            return seconds(self.backoff(attempt), "backoff")
        except BaseException:  # whatever it raises, even SystemExit
            _log.exception("the backoff of job type %r failed; the default is used", self.job_type)
            return BACKOFF(attempt)
