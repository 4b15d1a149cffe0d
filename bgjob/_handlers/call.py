"""How a handler is called: with the arguments that it has parameters for, inside its middleware.

Decided once, when the handler is registered or gets its state. A handler that takes only
a job, without middleware, is called directly.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from inspect import Parameter
from typing import TYPE_CHECKING, Any, Concatenate, TypeAlias, TypeVar, cast

from psycopg import AsyncConnection, Connection

from bgjob._handlers.definition import definition_of, is_again
from bgjob.codec import Codec, exact
from bgjob.errors import PayloadError
from bgjob.job import Job
from bgjob.result import MoveToDlq, Result

if TYPE_CHECKING:
    from bgjob._handlers.checkpoints import Kind

T = TypeVar("T")

Middleware: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes a handler (called with a job, and with a connection if it is transactional) and returns
one of the same kind: a coroutine function for a coroutine function, a plain one for a plain
one."""

Handles: TypeAlias = (
    Callable[Concatenate[T, ...], Result | None]
    | Callable[Concatenate[T, ...], Awaitable[Result | None]]
)
"""A plain function, run on a thread, or a coroutine function, run on an event loop; arguments
passed by name follow."""

HandlesInTransaction: TypeAlias = (
    Callable[Concatenate[T, Connection[Any], ...], Result | None]
    | Callable[Concatenate[T, AsyncConnection[Any], ...], Awaitable[Result | None]]
)
"""A handler with a connection (async for a coroutine function) in a transaction."""

BatchResult: TypeAlias = Result | Mapping[str, Result | None] | None
"""What a batch handler returns: None completes all its jobs, a Result holds for all, and a mapping
from ids to results tells them apart; a job that is not in it completes."""

HandlesBatch: TypeAlias = (
    Callable[Concatenate[list[T], ...], BatchResult]
    | Callable[Concatenate[list[T], ...], Awaitable[BatchResult]]
)
"""A handler of several jobs at once."""

HandlesBatchInTransaction: TypeAlias = (
    Callable[Concatenate[list[T], Connection[Any], ...], BatchResult]
    | Callable[Concatenate[list[T], AsyncConnection[Any], ...], Awaitable[BatchResult]]
)
"""The same with a connection (async for a coroutine function) in a transaction."""

NO_STATE = object()

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class Calling:
    """A registered handler and what is needed to call it."""

    job_type: str
    handler: Callable[..., Any]
    is_coroutine: bool
    codec: Codec[Any] | None
    cls: type[Any] | None
    middleware: tuple[Middleware, ...]
    """The outermost first."""
    asks_job: bool
    asks_state: bool
    needs_state: bool
    """Whether its parameter `state` has no default."""
    checkpoint: "Kind | None" = None
    """What its parameter `checkpoint` is given; None without one."""
    is_batch: bool = False
    """Whether it takes several jobs."""

    @classmethod
    def of(
        cls,
        job_type: str,
        handler: Callable[..., Any],
        *,
        transactional: bool,
        codec: Codec[Any] | None,
        value_type: type[Any] | None,
        middleware: tuple[Middleware, ...],
        is_batch: bool = False,
    ) -> "Calling":
        """Inspect a handler's parameters; raise TypeError if it cannot be called."""
        job, value = ("jobs", "values") if is_batch else ("job", "value")
        by_position = [value if codec else job, *(["conn"] if transactional else [])]
        by_name = [job, "state"] if codec else ["state"]
        if not transactional:
            by_name.append("checkpoint")
        asked = _asked(job_type, handler, by_position, by_name)
        state, checkpoint = asked.get("state"), asked.get("checkpoint")
        if is_batch and checkpoint is not None:
            raise TypeError(
                f"{_named(job_type, handler)} has both batch= and a parameter checkpoint: a call "
                "of several jobs has no checkpoint; leave out one of the two"
            )
        return cls(
            job_type,
            handler,
            is_coroutine(handler),
            codec,
            value_type,
            middleware,
            asks_job=job in asked,
            asks_state=state is not None,
            needs_state=state is not None and state.default is Parameter.empty,
            checkpoint=None if checkpoint is None else _kind(job_type, handler, checkpoint),
            is_batch=is_batch,
        )

    @property
    def name(self) -> str:
        """The handler's name and its job type, for messages."""
        return _named(self.job_type, self.handler)

    def payload(self, arg: Any) -> Any:
        """Encode a job's payload; raise TypeError if that is not possible."""
        if self.cls is not None and not isinstance(arg, self.cls):
            if is_again(type(arg), self.cls):
                raise TypeError(
                    f"the payload of job type {self.job_type!r} is a value of "
                    f"{definition_of(type(arg))} as it was before {definition_of(self.cls)} was "
                    "registered again: make a new one, of the class that is registered"
                )
            raise TypeError(
                f"the payload of job type {self.job_type!r} must be a {self.cls.__qualname__}, "
                f"not {arg!r}"
            )
        if self.codec is None or arg is None:
            return arg
        payload = self.codec.encode(arg)
        if not isinstance(payload, bytes):
            raise TypeError(
                f"{self.codec!r} encoded a payload of job type {self.job_type!r} to "
                f"{type(payload).__name__}; it must return bytes"
            )
        return exact(payload)

    @property
    def decoder(self) -> Callable[[bytes | None], Any] | None:
        """A function that returns the value of a stored payload; None without a codec.

        A job whose payload makes it raise goes to the dead-letter table.
        """
        return None if self.codec is None else self._value_of(self.codec.decode)

    def with_state(self, state: object) -> Callable[..., Any]:
        """Return the callable that takes a job, and the connection if it is transactional.

        That of a batch handler takes a list of jobs.
        """
        call = self.handler
        if self.asks_state and state is not NO_STATE:
            call = _like(partial(call, state=state), self.handler)
        if self.checkpoint is not None:
            from bgjob._handlers.checkpoints import asking, asking_async  # noqa: PLC0415 (few jobs have one)

            ask = asking_async if self.is_coroutine else asking
            refuse = partial(self._refuse, what="checkpoint")
            call = _like(ask(call, self.checkpoint, refuse), self.handler)
        if self.codec is not None:
            decoding = self._decoding_all if self.is_batch else self._decoding
            call = _like(decoding(self.codec.decode, call), self.handler)
        for wrap in reversed(self.middleware):
            call = self._wrapped(wrap, call)
        return call

    def _wrapped(self, wrap: Middleware, call: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = wrap(call)
        name = getattr(wrap, "__qualname__", repr(wrap))
        if not callable(wrapped):
            raise TypeError(
                f"middleware {name} returned {wrapped!r} for {self.name}; it must return a "
                "function with the parameters of the handler"
            )
        if is_coroutine(wrapped) != self.is_coroutine:
            has, gave = ("coroutine", "plain") if self.is_coroutine else ("plain", "coroutine")
            raise TypeError(
                f"middleware {name} returned a {gave} function for {self.name}, which is a {has} "
                f"function; it must return a {has} function for a {has} function"
            )
        return wrapped

    def _decoding(
        self, decode: Callable[[bytes], Any], call: Callable[..., Any]
    ) -> Callable[..., Any]:
        value_of, refuse, asks_job = self._value_of(decode), self._refuse, self.asks_job
        if self.is_coroutine:

            async def awaited(job: Job, *conn: object) -> Any:
                try:
                    value = value_of(job.arg)
                except Exception as error:
                    return refuse(error)
                return await (call(value, *conn, job=job) if asks_job else call(value, *conn))

            return awaited

        def called(job: Job, *conn: object) -> Any:
            try:
                value = value_of(job.arg)
            except Exception as error:
                return refuse(error)
            return call(value, *conn, job=job) if asks_job else call(value, *conn)

        return called

    def _decoding_all(
        self, decode: Callable[[bytes], Any], call: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Call with the payloads of several jobs; those that cannot be decoded fail apart."""
        value_of, refuse, asks_jobs = self._value_of(decode), self._refuse, self.asks_job

        def decoded(jobs: Sequence[Job]) -> tuple[dict[str, MoveToDlq], list[Job], list[Any]]:
            refused: dict[str, MoveToDlq] = {}
            good, values = [], []
            for job in jobs:
                try:
                    values.append(value_of(job.arg))
                    good.append(job)
                except Exception as error:
                    refused[job.id] = refuse(error)
            return refused, good, values

        if self.is_coroutine:

            async def awaited(jobs: Sequence[Job], *conn: object) -> Any:
                refused, good, values = decoded(jobs)
                if not good:
                    return refused
                named = {"jobs": good} if asks_jobs else {}
                return _together(await call(values, *conn, **named), good, refused)

            return awaited

        def called(jobs: Sequence[Job], *conn: object) -> Any:
            refused, good, values = decoded(jobs)
            if not good:
                return refused
            named = {"jobs": good} if asks_jobs else {}
            return _together(call(values, *conn, **named), good, refused)

        return called

    def _value_of(self, decode: Callable[[bytes], Any]) -> Callable[[bytes | None], Any]:
        if self.cls is None:
            return lambda payload: None if payload is None else decode(payload)
        wanted = self.cls.__name__

        def value_of(payload: bytes | None) -> Any:
            if payload is None:
                raise PayloadError(
                    f"payload of job type {self.job_type!r} is missing: it must be a {wanted}"
                )
            return decode(payload)

        return value_of

    def _refuse(self, error: Exception, what: str = "payload") -> MoveToDlq:
        if not isinstance(error, PayloadError):
            cause, text = error, f"{type(error).__name__}: {error}"
            of = f"{what} of job type {self.job_type!r}"
            error = PayloadError(f"{of} cannot be decoded: {text}")
            error.__cause__ = cause
        return MoveToDlq(error)


def _together(returned: Any, jobs: Sequence[Job], refused: dict[str, MoveToDlq]) -> Any:
    """Return what a batch handler has answered, and the results of jobs that it did not get."""
    if not refused:
        return returned
    if isinstance(returned, Mapping):
        return {**returned, **refused}
    if returned is None or isinstance(returned, Result):
        return {**dict.fromkeys([job.id for job in jobs], returned), **refused}
    return returned  # it is not an answer: all fail


def in_order(middleware: Sequence[Middleware]) -> tuple[Middleware, ...]:
    """Return middleware, the outermost first; raise TypeError if it is not a sequence."""
    if callable(middleware):
        raise TypeError(f"middleware must be a sequence of functions: [{middleware!r}]")
    return tuple(middleware)


def is_coroutine(function: Callable[..., Any]) -> bool:
    """Whether its result must be awaited."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def can_be_called(function: object, *arguments: object) -> bool:
    """Whether a function takes these arguments; True for a builtin without a signature."""
    try:
        inspect.signature(cast("Callable[..., Any]", function)).bind(*arguments)
    except TypeError:  # also where it is not callable at all
        return False
    except ValueError:
        return True
    return True


def _asked(
    job_type: str, handler: Callable[..., Any], by_position: list[str], by_name: list[str]
) -> dict[str, Parameter]:
    """Return the parameters to pass by name; raise TypeError if the handler cannot be called."""
    try:
        signature = inspect.signature(handler)
    except ValueError:  # a builtin without a signature: the call will show
        return {}
    positional = [p for p in signature.parameters.values() if p.kind in _POSITIONAL]
    taken = [p.name for p in positional[: len(by_position)]]
    set_already = handler.keywords if isinstance(handler, partial) else {}
    if "conn" in by_position and "checkpoint" in signature.parameters.keys() - set_already:
        raise TypeError(
            f"{_named(job_type, handler)} has a parameter checkpoint and is transactional: its one "
            "transaction would undo what it saves; register it without transactional=True, and "
            "commit each part of the work in a `with checkpoint.transaction() as conn`"
        )
    asked = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if name in by_name
        and parameter.kind in _NAMED
        and name not in taken
        and name not in set_already
    }
    try:
        signature.bind(*by_position, **dict.fromkeys(asked))
        # A parameter with a reserved name was not meant for the connection.
        fits = "state" not in taken and not {"job", "jobs"}.intersection(taken[1:])
    except TypeError:
        fits = False
    if not fits:
        expected = f"handler({', '.join(by_position)})"
        names = " and ".join(", ".join(by_name).rsplit(", ", 1))
        raise TypeError(
            f"{_named(job_type, handler)} takes {signature}, but is called as {expected}, with "
            f"{names} by name if it has parameters of these names; transactional=True adds the "
            "connection, a class or a codec passes the decoded value, batch=... passes lists"
        )
    return asked


def _kind(job_type: str, handler: Callable[..., Any], checkpoint: Parameter) -> "Kind":
    from bgjob._handlers.checkpoints import Kind  # noqa: PLC0415 (few jobs have one)

    named, is_async = _named(job_type, handler), is_coroutine(handler)
    return Kind.of(handler, checkpoint, job_type, named, is_coroutine=is_async)


def _named(job_type: str, handler: Callable[..., Any]) -> str:
    return f"handler {getattr(handler, '__qualname__', repr(handler))} of job type {job_type!r}"


def _like(call: Callable[..., Any], handler: Callable[..., Any]) -> Callable[..., Any]:
    """Copy the handler's name, for middleware that shows it, but not its signature."""
    update_wrapper(call, handler, updated=())
    del call.__dict__["__wrapped__"]
    return call
