"""How a handler gets its checkpoint.

A worker, `do` and `drain` set the store of a job's checkpoint around the call (`holding`). The
innermost part of the call, inside all middleware, makes the checkpoint from it (`asking`). Between
the two the store is in a context variable, so that middleware is called with the job alone.
"""

import inspect
import types
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from inspect import Parameter
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from bgjob.checkpoint import (
    AsyncCheckpoint,
    AsyncStore,
    Checkpoint,
    Store,
    end,
    end_async,
)
from bgjob.codec import Codec, codec_of_checkpoint
from bgjob.errors import BgjobError
from bgjob.result import MoveToDlq

_store: ContextVar[Any] = ContextVar("bgjob_checkpoint")
"""The store of the running job's checkpoint."""


class Kind(NamedTuple):
    """What the checkpoints of a job type have in common."""

    codec: Codec[Any]
    name: str
    """For messages."""
    handler: str
    """Likewise."""

    @classmethod
    def of(
        cls,
        handler: Callable[..., Any],
        parameter: Parameter,
        job_type: str,
        named: str,
        *,
        is_coroutine: bool,
    ) -> "Kind":
        """Read the annotation of a handler's parameter; raise TypeError if it does not fit."""
        value = _annotation_of_value(handler, parameter, named, is_coroutine=is_coroutine)
        try:
            codec = codec_of_checkpoint(value, job_type)
        except TypeError as error:
            raise TypeError(f"the checkpoint of {named}: {error}") from error
        return cls(codec, f"checkpoint of job type {job_type!r}", named)


def _annotation_of_value(
    handler: Callable[..., Any], parameter: Parameter, named: str, *, is_coroutine: bool
) -> Any:
    wanted, has = (
        (AsyncCheckpoint, "a coroutine function is given an AsyncCheckpoint")
        if is_coroutine
        else (Checkpoint, "a plain function is given a Checkpoint")
    )
    annotation = _annotation(handler, parameter, named)
    if annotation is Parameter.empty or annotation is Any:
        return Any
    if (get_origin(annotation) or annotation) is not wanted:
        shown = annotation.__qualname__ if isinstance(annotation, type) else repr(annotation)
        raise TypeError(
            f"the parameter checkpoint of {named} is annotated {shown}, but {has}: annotate it "
            f"{wanted.__name__}[int], or with another type of its value; or rename it"
        )
    return next(iter(get_args(annotation)), Any)


def _annotation(handler: Callable[..., Any], parameter: Parameter, named: str) -> Any:
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    while isinstance(handler, partial):
        handler = handler.func
    function = inspect.unwrap(handler)
    if not hasattr(function, "__globals__"):
        function = type(function).__call__
    written = types.SimpleNamespace(__annotations__={"checkpoint": parameter.annotation})
    try:
        return get_type_hints(written, getattr(function, "__globals__", {}))["checkpoint"]
    except Exception as error:
        raise TypeError(
            f"the annotation {parameter.annotation!r} of the parameter checkpoint of {named} "
            f"cannot be read: {error}; define its names in the module, outside of functions and "
            "of `if TYPE_CHECKING`"
        ) from error


# -- async -----------------------------------------------------------------------------


def holding_async(handler: Callable[..., Any], store: AsyncStore) -> Callable[..., Any]:
    """Return a handler for one run, whose checkpoint is in this store."""

    async def held(*args: Any) -> Any:
        token = _store.set(store)
        try:
            return await handler(*args)
        finally:
            _store.reset(token)

    return held


def asking_async(
    call: Callable[..., Any], kind: Kind, refuse: Callable[[Exception], MoveToDlq]
) -> Callable[..., Any]:
    """Return a call that passes the checkpoint to the handler.

    Args:
        call: the handler.
        kind: of its checkpoint.
        refuse: returns the result of a job whose checkpoint cannot be decoded.

    """

    async def asked(*args: Any, **named: Any) -> Any:
        store = _of_context(kind)
        try:
            checkpoint = AsyncCheckpoint(store, kind.codec, kind.name)
        except Exception as error:
            return refuse(error)
        try:
            returned = await call(*args, checkpoint=checkpoint, **named)
        except BaseException:
            if (why := await end_async(checkpoint)) is None:
                raise
            return MoveToDlq(why)  # another run would repeat what the handler has committed
        why = await end_async(checkpoint)
        return _returned(returned, kind) if why is None else MoveToDlq(why)

    return asked


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


def holding(handler: Callable[..., Any], store: Store) -> Callable[..., Any]:
    """Return a handler for one run, whose checkpoint is in this store."""

    def held(*args: Any) -> Any:
        token = _store.set(store)
        try:
            return handler(*args)
        finally:
            _store.reset(token)

    return held


def asking(
    call: Callable[..., Any], kind: Kind, refuse: Callable[[Exception], MoveToDlq]
) -> Callable[..., Any]:
    """Return a call that passes the checkpoint to the handler.

    Args:
        call: the handler.
        kind: of its checkpoint.
        refuse: returns the result of a job whose checkpoint cannot be decoded.

    """

    def asked(*args: Any, **named: Any) -> Any:
        store = _of_context(kind)
        try:
            checkpoint = Checkpoint(store, kind.codec, kind.name)
        except Exception as error:
            return refuse(error)
        try:
            returned = call(*args, checkpoint=checkpoint, **named)
        except BaseException:
            if (why := end(checkpoint)) is None:
                raise
            return MoveToDlq(why)  # another run would repeat what the handler has committed
        why = end(checkpoint)
        return _returned(returned, kind) if why is None else MoveToDlq(why)

    return asked


# -- both colours ----------------------------------------------------------------------


def _of_context(kind: Kind) -> Any:
    try:
        return _store.get()
    except LookupError:
        raise BgjobError(
            f"{kind.handler} was called outside of its job's context, where its checkpoint is: "
            "middleware that calls it on another thread must do so in a copy of the context"
        ) from None


def _returned(returned: object, kind: Kind) -> object:
    """Return what a handler has returned, unless a wrapper hides a coroutine."""
    if not inspect.isawaitable(returned):
        return returned
    if inspect.iscoroutine(returned):
        returned.close()
    return MoveToDlq(
        TypeError(
            f"{kind.handler} is a plain function that returned {type(returned).__name__}: what "
            "has a checkpoint must be a coroutine function itself, or be wrapped in one that is "
            "written with async def and awaits it"
        )
    )
