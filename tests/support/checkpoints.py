"""Handlers with a checkpoint, whose bodies are written once for both styles."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, TypeVar

from bgjob import Job, Result
from bgjob.checkpoint import AsyncCheckpoint, Checkpoint
from support.workers import Style

T = TypeVar("T")

Body: TypeAlias = Callable[[Job, Any], Awaitable[Result | None]]
"""A coroutine function, which awaits what the checkpoint and its connections return."""


def with_checkpoint(style: Style, body: Body) -> Callable[..., Any]:
    """Make a plain or a coroutine handler; the body of a plain one awaits nothing else."""
    if style == "coroutine":

        async def coroutine(job: Job, checkpoint: AsyncCheckpoint[int]) -> Result | None:
            return await body(job, checkpoint)

        return coroutine

    def plain(job: Job, checkpoint: Checkpoint[int]) -> Result | None:
        result: Result | None = ended(body(job, _Adapted(checkpoint)))
        return result

    return plain


def ended(coroutine: Any) -> Any:
    """Run a coroutine that never waits."""
    assert isinstance(coroutine, Coroutine)
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it awaits what a plain handler cannot")


class _Adapted:
    """A Checkpoint or a Connection, with the methods of the async one."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not inspect.ismethod(value):
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            return value(*args, **kwargs)

        return call

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["_Adapted"]:
        with self._target.transaction() as conn:
            yield _Adapted(conn)
