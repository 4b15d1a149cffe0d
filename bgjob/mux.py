"""Routes job types to handlers, and judges what a handler returned or raised."""

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, TypeAlias, TypeVar, overload

from psycopg import AsyncConnection, Connection

from bgjob._duration import seconds
from bgjob.errors import BgjobError, TypeRequiredError, UnknownTypeError
from bgjob.job import Job, check_name
from bgjob.result import Backoff, BackoffPolicy, Complete, MoveToDlq, Reschedule, Result, Retry

Handler: TypeAlias = Callable[[Job], Result | None] | Callable[[Job], Awaitable[Result | None]]
"""A plain function, run on a thread, or a coroutine function, run on an event loop."""

TransactionalHandler: TypeAlias = (
    Callable[[Job, Connection[Any]], Result | None]
    | Callable[[Job, AsyncConnection[Any]], Awaitable[Result | None]]
)
"""A handler that is given a connection, async for a coroutine function, in a transaction."""

_H = TypeVar("_H", bound=Callable[..., Any])

_log = logging.getLogger("bgjob")


@dataclass(frozen=True, slots=True)
class Route:
    """A job type's handler and policy."""

    type: str
    handler: Callable[..., Any]
    is_coroutine: bool
    is_transactional: bool
    max_attempts: int | None
    backoff: BackoffPolicy

    def exhausted(self, job: Job) -> MoveToDlq:
        """Give the result of a job whose attempts were all charged before this one."""
        return MoveToDlq(
            f"out of attempts: {self.max_attempts} of {self.max_attempts} were charged, the last "
            "without a result; its worker died or lost the lease"
            + (f"; last error: {job.last_error}" if job.last_error else "")
        )

    def run(self, job: Job) -> Result:
        """Run a plain handler; nothing it raises escapes."""
        try:
            returned = self.handler(job)
            return _COMPLETE if returned is None else self.judge(job, returned)
        except BaseException as error:
            return self.failed(job, error)

    def judge(self, job: Job, returned: object) -> Result:
        """Turn what the handler returned into the result to store."""
        match returned:
            case None:
                return _COMPLETE
            case Complete() | Reschedule() | MoveToDlq():
                return returned
            case Retry(delay, error):
                if self.max_attempts is not None and job.attempt >= self.max_attempts:
                    return MoveToDlq(error if error is not None else "out of attempts")
                return Retry(self._delay(job.attempt) if delay is None else delay, error)
            case _:
                if inspect.iscoroutine(returned):
                    returned.close()
                return self.failed(
                    job,
                    TypeError(
                        f"{self._named} returned {type(returned).__name__}; "
                        "return Complete(), Retry(), Reschedule(), MoveToDlq() or None"
                    ),
                )

    def failed(self, job: Job, error: BaseException) -> Result:
        """Turn what the handler raised into the result to store."""
        return self.judge(job, Retry(error=error))

    def transaction_ended(self) -> BgjobError:
        """Make the error of a handler that ended the transaction it was given."""
        return BgjobError(
            f"{self._named} ended the transaction it was given, and what it may have committed "
            "stays; the job is not run again: leave commit and rollback to the worker"
        )

    @property
    def _named(self) -> str:
        name = getattr(self.handler, "__qualname__", repr(self.handler))
        return f"handler {name} of job type {self.type!r}"

    def _delay(self, attempt: int) -> float:
        try:
            return seconds(self.backoff(attempt), "backoff")
        except Exception:
            _log.exception("the backoff of job type %r failed; the default one is used", self.type)
            return _BACKOFF(attempt)


def _is_coroutine(handler: Callable[..., Any]) -> bool:
    while isinstance(handler, partial):
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
        type(handler).__call__
    )


_COMPLETE = Complete()
_BACKOFF = Backoff()


@dataclass(frozen=True, slots=True)
class Wants:
    """What is given for a job that must not start before it has a key."""

    key: str


class Mux:
    """Routes job types to handlers.

    A job whose type is not registered goes to the dead-letter table. Thread-safe
    once registration is over; register everything before the worker runs.
    """

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self.transactional: set[str] = set()
        """The job types whose handlers take part in a transaction."""

    @overload
    def register(
        self,
        type: str,
        handler: Handler,
        *,
        transactional: Literal[False] = ...,
        max_attempts: int | None = ...,
        backoff: BackoffPolicy = ...,
    ) -> Self: ...

    @overload
    def register(
        self,
        type: str,
        handler: TransactionalHandler,
        *,
        transactional: Literal[True],
        max_attempts: int | None = ...,
        backoff: BackoffPolicy = ...,
    ) -> Self: ...

    def register(
        self,
        type: str,  # noqa: A002
        handler: Callable[..., Any],
        *,
        transactional: bool = False,
        max_attempts: int | None = 25,
        backoff: BackoffPolicy = _BACKOFF,
    ) -> Self:
        """Route jobs of `type` to `handler`; chainable.

        Args:
            type: the job type; 1 to 255 characters.
            handler: a plain function, run on a thread, or a coroutine function,
                run on an event loop. One that raises, or whose worker dies,
                has used up an attempt.
            transactional: whether the handler is called as `handler(job, conn)`
                with a connection of the worker's, a psycopg.Connection or for a
                coroutine function an AsyncConnection, in an open transaction.
                Its SQL, the jobs it enqueues with `conn=conn` and its result
                commit together; Retry() and exceptions roll back. It must not
                end the transaction itself. False by default: no transaction is
                open and no connection is held while a handler runs.
            max_attempts: how often a job may fail before it goes to the
                dead-letter table; 25 by default, half a day with the default
                backoff. None: endlessly.
            backoff: seconds to wait after failed attempt n, for a handler that
                raises or returns Retry() without a delay; Backoff() by default.

        Raises:
            TypeRequiredError: an empty type.
            ValueError: the type is registered already, or max_attempts is below 1.
            TypeError: the handler is not callable.

        """
        self._register(type, handler, transactional, max_attempts, backoff)
        return self

    def handler(
        self,
        type: str,  # noqa: A002
        *,
        transactional: bool = False,
        max_attempts: int | None = 25,
        backoff: BackoffPolicy = _BACKOFF,
    ) -> Callable[[_H], _H]:
        """Register the decorated function; the arguments are those of `register`."""

        def decorate(function: _H) -> _H:
            self._register(type, function, transactional, max_attempts, backoff)
            return function

        return decorate

    def _register(
        self,
        type_: str,
        handler: Callable[..., Any],
        transactional: bool,
        max_attempts: int | None,
        backoff: BackoffPolicy,
    ) -> None:
        if not type_:
            raise TypeRequiredError("type is required: name the jobs that the handler runs")
        check_name("type", type_)
        if type_ in self._routes:
            raise ValueError(f"job type {type_!r} is registered already: one handler a type")
        if not callable(handler):
            raise TypeError(f"the handler of job type {type_!r} is not callable: {handler!r}")
        if max_attempts is not None and max_attempts < 1:
            raise ValueError(
                f"max_attempts must be at least 1, or None for endless, not {max_attempts!r}"
            )
        self._routes[type_] = Route(
            type_, handler, _is_coroutine(handler), transactional, max_attempts, backoff
        )
        if transactional:
            self.transactional.add(type_)

    def route(self, job: Job, deaths: int = 0) -> Route | MoveToDlq:
        """Give the route of a claimed job, or the result of one that must not run.

        Args:
            job: the job.
            deaths: how many workers in a row died with it. One proves nothing
                against it, for it was not alone: it then gets its last run again.

        """
        route = self._routes.get(job.type)
        if route is None:
            return MoveToDlq(
                UnknownTypeError(
                    f"no handler is registered for job type {job.type!r}; register it, "
                    "then requeue the job"
                )
            )
        if route.max_attempts is None or job.attempt <= route.max_attempts or deaths == 1:
            return route
        return route.exhausted(job)

    @property
    def has_coroutines(self) -> bool:
        """Whether any handler is a coroutine function."""
        return any(route.is_coroutine for route in self._routes.values())
