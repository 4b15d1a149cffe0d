"""A job type's handler and policy, and the result of what the handler returned or raised."""

import asyncio
import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from bgjob._checks import seconds
from bgjob._handlers.call import Calling, can_be_called
from bgjob._logger import log as _log
from bgjob.errors import BgjobError, JobTimeoutError
from bgjob.job import Job, check_key, check_name, check_priority
from bgjob.result import (
    Backoff,
    BackoffPolicy,
    Complete,
    MoveToDlq,
    Reschedule,
    Result,
    Retry,
)

Exclusive: TypeAlias = bool | Callable[[Job], str | None]
"""True: jobs of the type run one at a time. A callable: jobs with the same key do."""

BACKOFF = Backoff()
"""The default backoff."""

COMPLETE = Complete()
"""What a handler that returns None has answered; nearly all do."""

_RESULTS = (Complete, Retry, Reschedule, MoveToDlq)


@dataclass(frozen=True, slots=True)
class NeedsKey:
    """Returned for a job that must not start before it holds a key."""

    key: str


@dataclass(frozen=True, slots=True)
class Awaiting:
    """Returned for a job whose plain handler returned an awaitable: a wrapper hid a coroutine.

    Its route awaits it on an event loop.
    """

    route: "Route"


@dataclass(frozen=True, slots=True)
class Route:
    """A job type's handler and policy."""

    type: str
    handler: Callable[..., Any]
    """Takes the job, and the connection if it is transactional."""
    is_coroutine: bool
    is_transactional: bool
    max_attempts: int | None
    backoff: BackoffPolicy
    retry_priority: int | None
    timeout: float | None
    """Seconds."""
    exclusive: Exclusive | None
    queue: str | None
    """The default of `Mux.request`."""
    priority: int
    """The default of `Mux.request`."""
    calling: Calling
    is_simple: bool = field(init=False)
    """Whether it needs only a call: it has no transaction and no timeout."""

    def __post_init__(self) -> None:
        simple = not self.is_transactional and self.timeout is None
        object.__setattr__(self, "is_simple", simple)
        of_type = f"of job type {self.type!r}"
        most, backoff, exclusive = self.max_attempts, self.backoff, self.exclusive
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
        if not (exclusive is None or isinstance(exclusive, bool) or callable(exclusive)):
            raise TypeError(
                f"exclusive {of_type} must be True for one job at a time, or a callable from a "
                f"job to its key, not {exclusive!r}"
            )
        if self.queue is not None:
            check_name(f"queue {of_type}", self.queue)
        check_priority(self.priority, f"priority {of_type}")
        if self.retry_priority is not None:
            check_priority(self.retry_priority, f"retry_priority {of_type}")

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
            return f"type:{self.type}" if self.exclusive else None
        key = self.exclusive(job)
        if key is not None:
            what = f"the exclusive key of a job of type {self.type!r}"
            check_key(what, key, job.queue, job.id)
        return key

    def run(self, job: Job) -> Result | Awaiting:
        """Run a plain handler; its exceptions become results."""
        try:
            returned = self.handler(job)
            if returned is None:
                return COMPLETE
            if not isinstance(returned, _RESULTS) and inspect.isawaitable(returned):
                return Awaiting(replace(self, handler=lambda _: returned, is_coroutine=True))
            return self.judge(job, returned)
        except BaseException as error:
            return self.failed(job, error)

    async def awaited(self, job: Job, *conn: Any) -> object:
        """Await a coroutine handler, and cancel it at its timeout.

        Raises:
            JobTimeoutError: the timeout was reached, whatever the handler returned.

        """
        limit = asyncio.timeout(self.timeout)
        try:
            async with limit:
                returned = await self.handler(job, *conn)
        except Exception as error:
            if limit.expired():
                raise self.timed_out(job) from error  # its traceback shows where the handler was
            raise
        if limit.expired():
            raise self.timed_out(job)
        return returned

    def judge(self, job: Job, returned: object) -> Result:
        """Turn what the handler returned into the result to store."""
        match returned:
            case None:
                return COMPLETE
            case Complete() | Reschedule() | MoveToDlq():
                return returned
            case Retry(delay, error, priority=priority):
                if self.max_attempts is not None and job.attempt >= self.max_attempts:
                    return MoveToDlq(error if error is not None else "out of attempts")
                return Retry(
                    self._delay(job.attempt) if delay is None else delay,
                    error,
                    priority=self.retry_priority if priority is None else priority,
                )
            case _ if inspect.isawaitable(returned):
                if inspect.iscoroutine(returned):
                    returned.close()
                # Every attempt would return the same.
                return MoveToDlq(
                    TypeError(
                        f"{self.calling.name} returned {type(returned).__name__}, which is not "
                        "awaited here: register the coroutine function itself, or wrap it in one "
                        "that is written with async def and awaits it"
                    )
                )
            case _:
                return self.failed(
                    job,
                    TypeError(
                        f"{self.calling.name} returned {type(returned).__name__}; "
                        "return Complete(), Retry(), Reschedule(), MoveToDlq() or None"
                    ),
                )

    def failed(self, job: Job, error: BaseException) -> Result:
        """Turn what the handler raised into the result to store."""
        return self.judge(job, Retry(error=error))

    def timed_out(self, job: Job) -> JobTimeoutError:
        """Make the error of a handler that ran for longer than its timeout."""
        return JobTimeoutError(
            f"job {job.id!r} of type {job.type!r} did not end within its timeout of "
            f"{self.timeout:g} s"
        )

    def around(self, handler: Callable[..., Any]) -> "Route":
        """Return a copy of the route with another handler of the same kind (plain or coroutine)."""
        other = copy(self)
        object.__setattr__(other, "handler", handler)
        return other

    def transaction_ended(self) -> BgjobError:
        """Make the error of a handler that ended the transaction it was given."""
        return BgjobError(
            f"{self.calling.name} ended the transaction it was given, and anything that it "
            "committed stays; the job does not run again: leave commit and rollback to the worker"
        )

    def _delay(self, attempt: int) -> float:
        try:
            return seconds(self.backoff(attempt), "backoff")
        except BaseException:  # whatever it raises, even SystemExit
            _log.exception("the backoff of job type %r failed; the default is used", self.type)
            return BACKOFF(attempt)
