"""A job type's handler and policy, and the result of what the handler returned or raised."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from bgjob._handlers.call import Calling
from bgjob._handlers.policy import TypePolicy
from bgjob.errors import BgjobError, JobTimeoutError, QueueRequiredError
from bgjob.job import EnqueueRequest, Job
from bgjob.result import Complete, MoveToDlq, Reschedule, Result, Retry

if TYPE_CHECKING:
    from bgjob.checkpoint import AsyncStore, Store

COMPLETE = Complete()
"""What a handler that returns None has answered; nearly all do."""

_RESULTS = (Complete, Retry, Reschedule, MoveToDlq)


def has_bad_value(returned: object, result: Result) -> bool:
    """Whether a handler has completed its job with a value that cannot be kept."""
    return isinstance(returned, Complete) and not isinstance(result, Complete)


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

    policy: TypePolicy
    calling: Calling
    handler: Callable[..., Any]
    """Takes the job, and the connection if it is transactional."""
    is_coroutine: bool
    is_transactional: bool
    has_store: bool = False
    """Whether it is the route of one run, whose checkpoint has its store."""
    is_simple: bool = field(init=False)
    """Whether it needs only a call: no transaction, no checkpoint, no timeout and no batch."""
    needs_session: bool = field(init=False)
    """Whether it begins once a session was opened for it, and not before."""
    needs_store: bool = field(init=False)
    """Whether it has a checkpoint, which is yet to be fetched."""

    reports_start: bool = field(init=False)
    """Whether its job starts later than its slot takes it: with a session, or in a batch."""

    expected: ClassVar[str] = "Complete(), Retry(), Reschedule(), MoveToDlq() or None"
    """What its handler may return, for messages."""

    def __post_init__(self) -> None:
        needs_store = self.calling.checkpoint is not None and not self.has_store
        needs_session = self.is_transactional or needs_store
        object.__setattr__(self, "needs_store", needs_store)
        object.__setattr__(self, "needs_session", needs_session)
        reports_start = needs_session or self.policy.batch is not None
        object.__setattr__(self, "reports_start", reports_start)
        object.__setattr__(self, "is_simple", not reports_start and self.policy.timeout is None)

    def request(
        self, arg: Any, *, queue: str | None, priority: int | None, **options: Any
    ) -> EnqueueRequest:
        """Make a request; see Mux.request."""
        policy = self.policy
        queue = policy.queue if queue is None else queue
        if queue is None:
            raise QueueRequiredError(
                f"job type {policy.job_type!r} has no queue: pass request(queue=...) or "
                "register(queue=...)"
            )
        request = EnqueueRequest(
            queue,
            policy.job_type,
            self.calling.payload(arg),
            priority=policy.priority if priority is None else priority,
            **options,
        )
        if not policy.exclusive or "exclusive" in options:
            return request
        arg, now = request.payload, datetime.now(UTC)
        job = Job(
            request.id,
            queue,
            request.type,
            arg,
            0,
            None,
            request.priority,
            now,
            now,
            now,
            headers=request.headers,
        )
        key = policy.key(job)
        return replace(request, arg=arg, exclusive=key, slots=None if key is None else policy.slots)

    def holding(self, store: "Store | AsyncStore") -> "Route":
        """Return the route of one run, whose checkpoint is in this store."""
        from bgjob._handlers.checkpoints import holding, holding_async  # noqa: PLC0415 (few jobs have one)

        hold: Callable[..., Any] = holding_async if self.is_coroutine else holding
        return replace(self, handler=hold(self.handler, store), has_store=True)

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

    async def awaited(self, job: Job | Sequence[Job], *conn: Any) -> object:
        """Await a coroutine handler, and cancel it at its timeout.

        That of a batch takes several jobs.

        Raises:
            JobTimeoutError: the timeout was reached, whatever the handler returned.

        """
        limit = asyncio.timeout(self.policy.timeout)
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
        """Turn what the handler returned into the result to store.

        The value of a Complete of a job with `keep` is its JSON then, as bytes.
        """
        match returned:
            case None:
                return COMPLETE
            case Complete(value) if value is not None and job.keep is not None:
                from bgjob._handlers.value import encoded  # noqa: PLC0415 (few jobs have one)

                try:
                    return Complete(encoded(value, job))
                except (TypeError, ValueError) as error:
                    return self.failed(job, error)
            case Complete() | Reschedule() | MoveToDlq():
                return returned
            case Retry(delay, error, priority=priority):
                policy = self.policy
                if policy.max_attempts is not None and job.attempt >= policy.max_attempts:
                    return MoveToDlq(error if error is not None else "out of attempts")
                return Retry(
                    policy.delay(job.attempt) if delay is None else delay,
                    error,
                    priority=policy.retry_priority if priority is None else priority,
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
                        f"return {self.expected}"
                    ),
                )

    def failed(self, job: Job, error: BaseException) -> Result:
        """Turn what the handler raised into the result to store."""
        return self.judge(job, Retry(error=error))

    def timed_out(self, job: Job | Sequence[Job]) -> JobTimeoutError:
        """Make the error of a handler that ran for longer than its timeout."""
        if not isinstance(job, Job):
            first, count = job[0], len(job)
            what = (
                f"a call with {count} jobs of type {first.type!r}, from {first.id!r} on,"
                if count > 1
                else f"job {first.id!r} of type {first.type!r}"
            )
        else:
            what = f"job {job.id!r} of type {job.type!r}"
        return JobTimeoutError(
            f"{what} did not end within its timeout of {self.policy.timeout:g} s"
        )

    def transaction_ended(self) -> BgjobError:
        """Make the error of a handler that ended the transaction it was given."""
        return BgjobError(
            f"{self.calling.name} ended the transaction it was given, and anything that it "
            "committed stays; the job does not run again: leave commit and rollback to the worker"
        )
