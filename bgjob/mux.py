"""Routes job types to handlers, each with its policy.

The module has over 400 lines because each kind of handler has a signature of its own, for type
checkers.
"""

import builtins
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from types import EllipsisType
from typing import Any, Literal, Self, TypeAlias, TypeVar, Unpack, cast, overload

from bgjob._checks import Duration, seconds
from bgjob._handlers.batch import BatchRoute, one_by_one
from bgjob._handlers.call import (
    NO_STATE,
    BatchResult,
    Calling,
    Handles,
    HandlesBatch,
    HandlesBatchInTransaction,
    HandlesInTransaction,
    Middleware,
    in_order,
)
from bgjob._handlers.decorator import (
    HB,
    HBT,
    HT,
    BatchDecorator,
    Decorator,
    H,
    TransactionalBatchDecorator,
    TransactionalDecorator,
)
from bgjob._handlers.definition import is_again, told_again
from bgjob._handlers.expiry import Expiring, Routed
from bgjob._handlers.policy import (
    BACKOFF,
    BATCH_WAIT,
    MAX_ATTEMPTS,
    Exclusive,
    Policy,
    TypePolicy,
)
from bgjob._handlers.route import NeedsKey, Route
from bgjob._handlers.unknown import Unknown, UnknownTypes, unknown_type
from bgjob._logger import log
from bgjob.codec import Codec, class_option, codec_of, type_name
from bgjob.errors import StateRequiredError, TypeRequiredError, UnknownTypeError
from bgjob.job import EnqueueRequest, Job, check_name
from bgjob.limit import Limit
from bgjob.result import BackoffPolicy, MoveToDlq, Retry

__all__ = [
    "BatchHandler",
    "BatchResult",
    "Handler",
    "Middleware",
    "Mux",
    "Policy",
    "Route",
    "TransactionalBatchHandler",
    "TransactionalHandler",
]

T = TypeVar("T")

Handler: TypeAlias = Handles[Job]
TransactionalHandler: TypeAlias = HandlesInTransaction[Job]
BatchHandler: TypeAlias = HandlesBatch[Job]
TransactionalBatchHandler: TypeAlias = HandlesBatchInTransaction[Job]

F = TypeVar("F", bound=Callable[..., Any])


class Mux:
    """Routes job types to handlers.

    A job whose type is not registered goes to the dead-letter table, or is put back
    for some time. Thread-safe once all types are registered; register them before
    the worker runs: it keeps the handlers that it began with.

    Args:
        unknown_for: seconds or a timedelta after its enqueue within which a job of
            an unknown type is put back, by the database's clock, without counting
            an attempt: in a rolling deploy another worker may have its handler. It
            is due again after a quarter of its age, at least a second and at most a
            minute, and a warning is logged once a minute for each type. By default
            it goes to the dead-letter table immediately, where a typing mistake
            shows at once.
        middleware: wraps the handlers of all types, the first outermost, and
            outside the middleware of a type; none by default. A middleware is a
            function that takes a handler and returns one, a coroutine function for
            a coroutine function and a plain one for a plain one. The returned
            handler is called with the job (and with the connection if the handler
            is transactional); it calls the other or not, and returns a result or
            raises. The payload is decoded inside the middleware, so that it may
            change `job.arg`; for a payload that cannot be decoded it receives a
            MoveToDlq. A middleware is called when a handler is registered, and
            again for each worker if the handler has a parameter `state`.

    """

    def __init__(
        self,
        *,
        unknown_for: Duration | None = None,
        middleware: Sequence[Middleware] = (),
    ) -> None:
        window = 0.0 if unknown_for is None else seconds(unknown_for, "unknown_for")
        self._unknown = UnknownTypes(window) if window else None
        self._routes: dict[str, Route] = {}
        self._middleware = in_order(middleware)
        self._state: object = NO_STATE
        self.transactional: set[str] = set()
        """The job types with a transactional handler."""
        self.checkpointed: set[str] = set()
        """The job types whose handler has a checkpoint."""
        self.kept: set[str] = set()
        """The job types whose completed jobs are kept."""
        self.batches: dict[str, BatchRoute] = {}
        """By job type, how handlers of several jobs are called."""

    @property
    def unknown_for(self) -> float | None:
        """Seconds after its enqueue within which a job of an unknown type is put back."""
        return None if self._unknown is None else self._unknown.window

    @property
    def types(self) -> frozenset[str]:
        """The job types with a handler."""
        return frozenset(self._routes)

    @overload
    def register(
        self,
        type: str,
        handler: Handler,
        *,
        transactional: Literal[False] = ...,
        codec: None = ...,
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: str,
        handler: TransactionalHandler,
        *,
        transactional: Literal[True],
        codec: None = ...,
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: str,
        handler: Handles[T],
        *,
        transactional: Literal[False] = ...,
        codec: Codec[T],
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: str,
        handler: HandlesInTransaction[T],
        *,
        transactional: Literal[True],
        codec: Codec[T],
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: type[T],
        handler: Handles[T],
        *,
        transactional: Literal[False] = ...,
        codec: Codec[T] | None = ...,
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: type[T],
        handler: HandlesInTransaction[T],
        *,
        transactional: Literal[True],
        codec: Codec[T] | None = ...,
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: str,
        handler: BatchHandler,
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[False] = ...,
        codec: None = ...,
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: str,
        handler: TransactionalBatchHandler,
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[True],
        codec: None = ...,
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: str,
        handler: HandlesBatch[T],
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[False] = ...,
        codec: Codec[T],
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: str,
        handler: HandlesBatchInTransaction[T],
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[True],
        codec: Codec[T],
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: type[T],
        handler: HandlesBatch[T],
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[False] = ...,
        codec: Codec[T] | None = ...,
        **policy: Unpack[Policy],
    ) -> Self: ...

    @overload
    def register(
        self,
        type: type[T],
        handler: HandlesBatchInTransaction[T],
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[True],
        codec: Codec[T] | None = ...,
        **policy: Unpack[Policy],
    ) -> Self: ...

    def register(
        self,
        type: str | builtins.type[Any],  # noqa: A002
        handler: Callable[..., Any],
        *,
        queue: str | None = None,
        max_attempts: int | EllipsisType | None = ...,
        backoff: BackoffPolicy | None = None,
        timeout: Duration | None = None,
        priority: int | None = None,
        retry_priority: int | None = None,
        exclusive: Exclusive | None = None,
        slots: int | None = None,
        limit: Limit | None = None,
        keep: bool = False,
        batch: int | None = None,
        batch_wait: Duration | None = None,
        transactional: bool = False,
        codec: Codec[Any] | None = None,
        middleware: Sequence[Middleware] = (),
    ) -> Self:
        """Route jobs of `type` to `handler`; chainable.

        The handler's first argument is the job; or the decoded payload, if the type
        is a class or has a codec. A transactional handler's second argument is the
        connection. Further parameters are passed by name: `state`, the worker's; `job`, if the
        first argument is the payload; and `checkpoint`, what earlier attempts have saved (see
        bgjob.checkpoint), for a handler that is not transactional.

        A type has one handler. The same one may be registered again, as a cell of a
        notebook and a module that is reloaded do: a function, and a class, with the same
        module (or the same file, such as that of `__main__`) and qualified name. It
        takes the place of the one before, with its options, and a warning is logged.
        A worker that runs keeps the one that it began with.

        A registered class may set `queue`, `max_attempts`, `backoff` and `priority`
        as class attributes; the arguments given here take precedence.

        Args:
            type: the job type, 1 to 255 characters; or a class, which names the
                type and whose values are the payloads.
            handler: a plain function, run on a thread, or a coroutine function,
                run on an event loop. An exception and a worker's death both use
                up an attempt.
            queue: the queue to which `request` enqueues jobs of this type; none by
                default, because only the caller knows which workers run the type.
            max_attempts: how often a job may fail before it goes to the
                dead-letter table; 25 by default, half a day with the default
                backoff. None: without limit.
            backoff: seconds to wait after failed attempt n, for a handler that
                raises or returns Retry() without a delay; Backoff() by default.
            timeout: seconds or a timedelta after which an attempt fails with a
                JobTimeoutError; none by default, because only you know how long a
                job may take. A coroutine is cancelled. A thread cannot be cancelled,
                nor a coroutine that ignores it for a second: the worker replaces
                its slot, drops its result and rolls back its transaction. When more
                of these hang than there are slots, further ones are not replaced. A
                job that hangs no longer holds its exclusive key.
            priority: the priority of the jobs that `request` makes; 0 by default.
                Lower runs first.
            retry_priority: the priority of a job after it failed, unless its handler
                returned a Retry(priority=...). By default a job keeps its
                priority. A job whose worker died always keeps it.
            exclusive: True runs the jobs of this type one at a time, on any
                host. A callable returns the key of a job, or None: of the jobs with
                the same key one runs at a time. By default there is no limit.
            slots: with `exclusive`, how many jobs of a key run at once, 1 to 32,767; 1
                by default. It holds for jobs whose key this type has named; see
                EnqueueRequest.
            limit: how many jobs of the type run at once, or start in a time, over all
                workers and queues that have the limit; see Limit. One that an operator
                sets for the type (`client.limits`, `bgjob limit`) takes precedence. Jobs
                that wait for it hold up no other type. None by default.
            keep: whether a completed job is written to the table bgjob_history in
                the statement that deletes it, and kept for a week, so that
                `Client.history` and `Client.explain` tell when and where it ran. It
                costs a fifth to a quarter of the rate of jobs that do nothing, and 220
                bytes of WAL for each. False by default. Dead jobs are in the dead-letter
                table in any case.
            batch: the most jobs, 1 to 1,000, in one call of the handler, whose first
                argument is then a list of jobs; or of decoded payloads, with the jobs by
                name as `jobs`. It returns None to complete them all, a Result for all of
                them, or a mapping from job ids to results; a job that is not in it
                completes. If it raises, the jobs are run again in halves until the one
                that fails is alone, and only that one has failed. The timeout limits a
                call. Middleware gets the list. Not with exclusive=. None by default: a
                job a call.
            batch_wait: seconds or a timedelta for which a claimed job waits for others,
                until the batch is full; 0.05 s by default. Less is quicker for a job
                that comes alone, more makes larger batches.
            transactional: whether the handler receives a connection of the
                worker's in an open transaction: a psycopg.Connection, or an
                AsyncConnection for a coroutine function. Its SQL, the jobs that it
                enqueues with `conn=conn` and its result commit together; Retry()
                and exceptions roll back. It must not end the transaction itself.
                False by default: an ordinary handler holds no transaction and no
                connection while it runs.
            codec: encodes payloads in `request`, and decodes them for the
                handler; the codec of the class by default. Without a class it
                is not called for a missing payload, which is None. A payload that
                it cannot decode goes to the dead-letter table immediately, unchanged.
            middleware: wraps this handler, the first outermost, inside the
                middleware of the Mux; see Mux. None by default.

        Raises:
            TypeRequiredError: the type is empty.
            ValueError: the type is registered already, with another handler, or an option
                is out of range.
            TypeError: the handler does not accept these arguments, middleware made a
                plain handler of a coroutine function or the reverse, or an option has
                a wrong type.

        """
        name, cls = _name_of(type)
        if not callable(handler):
            raise TypeError(f"the handler of job type {name!r} is not callable: {handler!r}")
        before = self._routes.get(name)
        if before is not None:
            _check_is_again(name, cls, handler, before.calling)
        declared = partial(class_option, cls or object)
        if isinstance(max_attempts, EllipsisType):
            max_attempts = cast("int | None", declared("max_attempts", MAX_ATTEMPTS))
        policy = TypePolicy(
            name,
            queue=declared("queue") if queue is None else queue,
            max_attempts=max_attempts,
            backoff=declared("backoff", BACKOFF) if backoff is None else backoff,
            timeout=None if timeout is None else seconds(timeout, f"timeout of job type {name!r}"),
            priority=declared("priority", 0) if priority is None else priority,
            retry_priority=retry_priority,
            exclusive=exclusive,
            slots=slots,
            limit=limit,
            keep=keep,
            batch=batch,
            batch_wait=_batch_wait(name, batch, batch_wait),
        )
        calling = Calling.of(
            name,
            handler,
            transactional=transactional,
            codec=codec if codec is not None or cls is None else codec_of(cls),
            value_type=cls,
            middleware=self._middleware + in_order(middleware),
            is_batch=batch is not None,
        )
        self._route(policy, calling, transactional=transactional)
        for names, has in (
            (self.transactional, transactional),
            (self.checkpointed, calling.checkpoint is not None),
            (self.kept, keep),
        ):
            (names.add if has else names.discard)(name)
        if before is not None:
            log.warning("%s", told_again(name, handler, before.calling.handler))
        return self

    @overload
    def handler(
        self,
        type: str,
        *,
        transactional: Literal[False] = ...,
        codec: None = ...,
        **policy: Unpack[Policy],
    ) -> Callable[[H], H]: ...

    @overload
    def handler(
        self,
        type: str,
        *,
        transactional: Literal[True],
        codec: None = ...,
        **policy: Unpack[Policy],
    ) -> Callable[[HT], HT]: ...

    @overload
    def handler(
        self,
        type: str,
        *,
        transactional: Literal[False] = ...,
        codec: Codec[T],
        **policy: Unpack[Policy],
    ) -> Decorator[T]: ...

    @overload
    def handler(
        self,
        type: str,
        *,
        transactional: Literal[True],
        codec: Codec[T],
        **policy: Unpack[Policy],
    ) -> TransactionalDecorator[T]: ...

    @overload
    def handler(
        self,
        type: type[T],
        *,
        transactional: Literal[False] = ...,
        codec: Codec[T] | None = ...,
        **policy: Unpack[Policy],
    ) -> Decorator[T]: ...

    @overload
    def handler(
        self,
        type: type[T],
        *,
        transactional: Literal[True],
        codec: Codec[T] | None = ...,
        **policy: Unpack[Policy],
    ) -> TransactionalDecorator[T]: ...

    @overload
    def handler(
        self,
        type: str,
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[False] = ...,
        codec: None = ...,
        **policy: Unpack[Policy],
    ) -> Callable[[HB], HB]: ...

    @overload
    def handler(
        self,
        type: str,
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[True],
        codec: None = ...,
        **policy: Unpack[Policy],
    ) -> Callable[[HBT], HBT]: ...

    @overload
    def handler(
        self,
        type: str,
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[False] = ...,
        codec: Codec[T],
        **policy: Unpack[Policy],
    ) -> BatchDecorator[T]: ...

    @overload
    def handler(
        self,
        type: str,
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[True],
        codec: Codec[T],
        **policy: Unpack[Policy],
    ) -> TransactionalBatchDecorator[T]: ...

    @overload
    def handler(
        self,
        type: type[T],
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[False] = ...,
        codec: Codec[T] | None = ...,
        **policy: Unpack[Policy],
    ) -> BatchDecorator[T]: ...

    @overload
    def handler(
        self,
        type: type[T],
        *,
        batch: int,
        batch_wait: Duration | None = ...,
        transactional: Literal[True],
        codec: Codec[T] | None = ...,
        **policy: Unpack[Policy],
    ) -> TransactionalBatchDecorator[T]: ...

    def handler(
        self,
        type: str | builtins.type[Any],  # noqa: A002
        *,
        transactional: bool = False,
        codec: Codec[Any] | None = None,
        **policy: Any,
    ) -> Any:
        """Return a decorator that registers a function, and returns it unchanged.

        The arguments are those of `register`. Type checkers check the function as they do
        that of `register`, and report an error in the line of the decorator.
        """

        def decorate(function: F) -> F:
            options: dict[str, Any] = {"transactional": transactional, "codec": codec, **policy}
            self.register(type, function, **options)
            return function

        return decorate

    def _route(self, policy: TypePolicy, calling: Calling, *, transactional: bool) -> None:
        name, call = policy.job_type, calling.with_state(self._state)
        self.batches.pop(name, None)
        if policy.batch is not None:
            self.batches[name] = BatchRoute(
                policy, calling, call, calling.is_coroutine, transactional
            )
            call = one_by_one(calling, call)
        self._routes[name] = Route(policy, calling, call, calling.is_coroutine, transactional)

    def bound(self, state: object) -> Self:
        """Return a copy whose handlers receive this state as their parameter `state`.

        A worker with a state does so itself; `do` and tests need it.
        """
        mux = self.copy()
        mux._state = state  # noqa: SLF001 (its own class)
        for route in self._routes.values():
            if route.calling.asks_state:
                is_transactional = route.is_transactional
                mux._route(route.policy, route.calling, transactional=is_transactional)  # noqa: SLF001
        return mux

    def copy(self) -> Self:
        """Return a copy, which later registrations do not change: a worker runs on one."""
        mux = copy(self)
        mux._routes = dict(self._routes)  # noqa: SLF001 (its own class)
        mux.batches = dict(self.batches)
        mux.transactional, mux.kept = set(self.transactional), set(self.kept)
        mux.checkpointed = set(self.checkpointed)
        return mux

    def check_bound(self) -> None:
        """Raise StateRequiredError if a handler has a parameter `state` without a value."""
        if self._state is not NO_STATE:
            return
        for route in self._routes.values():
            if route.calling.needs_state:
                raise StateRequiredError(
                    f"{route.calling.name} has a parameter state: make the worker with "
                    "state=..., or call do() with mux.bound(state)"
                )

    def route(self, job: Job, *, may_expire: bool = True) -> Routed:
        """Return the route of a claimed job, or the result of a job that must not run (yet)."""
        if job.expires is not None and may_expire:
            return Expiring(job, partial(self.route, job, may_expire=False))
        route = self._routes.get(job.type)
        if route is None:
            if self._unknown is not None:
                return Unknown(job, self._unknown)
            return MoveToDlq(unknown_type(job.type))
        policy = route.policy
        if job.attempt > policy.last_attempt:
            return policy.exhausted(job)
        if policy.exclusive and job.exclusive is None:
            try:
                key = policy.key(job)
            except BaseException as error:
                return cast("Retry | MoveToDlq", route.failed(job, error))
            if key is not None:
                return NeedsKey(key)
        return route

    def route_of(self, type: str) -> Route | None:  # noqa: A002
        """Return how jobs of a type are run, whatever the job; None for an unknown type."""
        return self._routes.get(type)

    def runs_on_loop(self, job: Job) -> bool:
        """Whether the handler of a job is a coroutine function."""
        route = self._routes.get(job.type)
        return route is not None and route.is_coroutine

    @property
    def names_keys(self) -> bool:
        """Whether any type gives its jobs an exclusive key."""
        return any(route.policy.exclusive for route in self._routes.values())

    @property
    def slots(self) -> dict[str, int]:
        """The slots of the keys that types give their jobs, by type, if they have several."""
        policies = (route.policy for route in self._routes.values())
        return {policy.job_type: policy.slots for policy in policies if policy.slots is not None}

    @property
    def limits(self) -> dict[str, Limit]:
        """The limits of types, by type."""
        limits = ((type_, route.policy.limit) for type_, route in self._routes.items())
        return {type_: each for type_, each in limits if each not in (None, Limit())}

    def request(
        self,
        type: object,  # noqa: A002
        arg: Any = None,
        *,
        queue: str | None = None,
        priority: int | None = None,
        **options: Any,
    ) -> EnqueueRequest:
        """Make an EnqueueRequest with the defaults of its type.

        Args:
            type: the job type, or its class; or a value of that class, which is
                then the payload.
            arg: the payload, encoded with the type's codec; for a class a value
                of it. None (the default) for no payload.
            queue: by default the queue of the registered type.
            priority: by default the priority of the registered type. The same
                holds for `exclusive`, with its `slots`.
            options: the other options of EnqueueRequest, except for the codec,
                which is the type's.

        Raises:
            UnknownTypeError: the type is not registered.
            QueueRequiredError: neither the call nor the type names a queue.
            TypeError: the payload is not a value of the type's class, or the
                codec does not encode it to bytes.
            ValueError, TypeError: as for EnqueueRequest.

        """
        if not isinstance(type, str | builtins.type):
            if arg is not None:
                raise TypeError(f"pass a job type and its arg, or a value: {type!r} is a value")
            type, arg = builtins.type(type), type  # noqa: A001
        name, _ = _name_of(type)
        route = self._routes.get(name)
        if route is None:
            raise UnknownTypeError(
                f"no handler is registered for job type {name!r}; register it before you request "
                "it, or make an EnqueueRequest"
            )
        return route.request(arg, queue=queue, priority=priority, **options)

    @property
    def has_coroutines(self) -> bool:
        """Whether any handler is a coroutine function."""
        return any(route.is_coroutine for route in self._routes.values())


def _check_is_again(
    name: str, cls: type[Any] | None, handler: Callable[..., Any], before: Calling
) -> None:
    """Raise ValueError unless a handler and its class are those before, defined again."""
    other = before.cls
    if cls is not None and other is not None and not (cls is other or is_again(cls, other)):
        raise ValueError(
            f"job type {name!r} is registered already, for {other.__module__}."
            f"{other.__qualname__}; {cls.__module__}.{cls.__qualname__} has the same name: "
            "give one of them another, with a class attribute job_type"
        )
    if not is_again(handler, before.handler):
        raise ValueError(f"job type {name!r} is registered already: a type has one handler")


def _batch_wait(name: str, batch: int | None, wait: Duration | None) -> float:
    if wait is None:
        return BATCH_WAIT
    if batch is None:
        raise ValueError(
            f"job type {name!r} has batch_wait= and no batch=: name the most jobs in one call"
        )
    return seconds(wait, f"batch_wait of job type {name!r}")


def _name_of(type_: str | type[Any]) -> tuple[str, type[Any] | None]:
    if isinstance(type_, type):
        name, cls = type_name(type_), type_
    else:
        name, cls = type_, None
    if not name:
        raise TypeRequiredError("type is required: name the jobs that the handler runs")
    check_name("type", name)
    return name, cls
