"""The types of the decorators that `Mux.handler` returns, for type checkers only.

The decorator of a plain job type keeps the type of its function whole. That of a class or a codec
cannot: a type variable has no bound that depends on another one. It takes the function apart into
parameters and result, and puts it together again, whereby the first parameter loses its name.

`T_co | W` is the type of a first parameter that accepts T_co and more: a function for two classes
keeps both. pyright does not infer W where there is nothing more, hence the second overload of each
pair. mypy takes both for possible when the function is for two classes and has a parameter
`Connection[Any]`: it checks the function, but regards the result as Callable[..., Any].
"""

from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from psycopg import AsyncConnection, Connection

from bgjob._handlers.call import (
    BatchResult,
    Handles,
    HandlesBatch,
    HandlesBatchInTransaction,
    HandlesInTransaction,
)
from bgjob.job import Job
from bgjob.result import Result

P = ParamSpec("P")
"""The parameters that follow."""
T_co = TypeVar("T_co", covariant=True)
"""What the first parameter must accept. mypy wants it covariant, pyright does not."""
W = TypeVar("W")
"""What else the first parameter accepts."""
R = TypeVar("R", bound=Result | None)
A = TypeVar("A", bound=Awaitable[Result | None])
E = TypeVar("E", bound=Result | Awaitable[Result | None] | None)

C = TypeVar("C", bound=Connection[Any])
AC = TypeVar("AC", bound=AsyncConnection[Any])

H = TypeVar("H", bound=Handles[Job])
HT = TypeVar("HT", bound=HandlesInTransaction[Job])

HB = TypeVar("HB", bound=HandlesBatch[Job])
HBT = TypeVar("HBT", bound=HandlesBatchInTransaction[Job])

T = TypeVar("T")
RB = TypeVar("RB", bound=BatchResult)
AB = TypeVar("AB", bound=Awaitable[BatchResult])
EB = TypeVar("EB", bound=BatchResult | Awaitable[BatchResult])


class Decorator(Protocol[T_co]):  # pyright: ignore[reportInvalidTypeVarUse]
    """Registers a function that takes a decoded payload, and returns it."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[T_co | W, P], E], /
    ) -> Callable[Concatenate[T_co | W, P], E]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[T_co, P], E], /
    ) -> Callable[Concatenate[T_co, P], E]: ...


class TransactionalDecorator(Protocol[T_co]):  # pyright: ignore[reportInvalidTypeVarUse]
    """Registers a function that takes a decoded payload and a connection, and returns it."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[T_co | W, C, P], R], /
    ) -> Callable[Concatenate[T_co | W, C, P], R]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[T_co, C, P], R], /
    ) -> Callable[Concatenate[T_co, C, P], R]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[T_co | W, AC, P], A], /
    ) -> Callable[Concatenate[T_co | W, AC, P], A]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[T_co, AC, P], A], /
    ) -> Callable[Concatenate[T_co, AC, P], A]: ...


class BatchDecorator(Protocol[T]):
    """Registers a function that takes a list of decoded payloads, and returns it."""

    def __call__(
        self, function: Callable[Concatenate[list[T], P], EB], /
    ) -> Callable[Concatenate[list[T], P], EB]: ...


class TransactionalBatchDecorator(Protocol[T]):
    """Registers a function that takes a list of decoded payloads and a connection."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[list[T], C, P], RB], /
    ) -> Callable[Concatenate[list[T], C, P], RB]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[list[T], AC, P], AB], /
    ) -> Callable[Concatenate[list[T], AC, P], AB]: ...
