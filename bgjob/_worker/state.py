"""The state that a worker's handlers share: made before it claims, closed when it has ended."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack
from typing import Any

from bgjob._handlers.call import can_be_called, is_coroutine

_LAST_WORDS = 1.0
"""Seconds that cancelled coroutines have to release it."""


class State:
    """The state of a worker, on its own thread or on the caller's loop.

    Args:
        factory: makes it, or a context manager for it.
        has_loop: whether there is a loop to await on.

    """

    def __init__(self, factory: Callable[[], Any], *, has_loop: bool) -> None:
        if not can_be_called(factory):
            raise TypeError(
                "state must be a callable without arguments that makes the state, such as "
                f"lambda: State(), not {factory!r}"
            )
        if is_coroutine(factory) and not has_loop:
            raise TypeError(f"state {factory!r} is a coroutine function: {_AWAITED}")
        self._factory = factory
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stack = ExitStack()
        self._async_stack = AsyncExitStack()

    def open(self, loop: asyncio.AbstractEventLoop | None) -> Any:
        """Make it, on the loop if there is one; raise whatever the factory raises."""
        self._loop = loop
        if loop is not None:
            return asyncio.run_coroutine_threadsafe(self._enter_async(), loop).result()
        made = self._factory()
        if hasattr(type(made), "__enter__"):
            return self._stack.enter_context(made)
        if _is_awaited(made) or hasattr(type(made), "__aenter__"):
            if inspect.iscoroutine(made):
                made.close()
            raise TypeError(f"state {self._factory!r} returned {type(made).__name__}: {_AWAITED}")
        return made

    async def _enter_async(self) -> Any:
        made = self._factory()
        if _is_awaited(made):
            made = await made
        if hasattr(type(made), "__aenter__"):
            return await self._async_stack.enter_async_context(made)
        if hasattr(type(made), "__enter__"):
            return self._async_stack.enter_context(made)
        return made

    def close(
        self, patience: float | None, tasks: Callable[[], Collection[asyncio.Task[None]]]
    ) -> None:
        """Close it, on the loop after its last tasks; raise whatever that raises.

        Raises:
            TimeoutError: it took longer than `patience` seconds, and goes on.

        """
        if self._loop is not None:
            closing = self._exit_async(tasks)
            try:
                ended = asyncio.run_coroutine_threadsafe(closing, self._loop)
            except RuntimeError:  # the caller closed its loop
                closing.close()
                raise
        else:
            ended = Future()
            # On a thread of its own, which may hang while the worker ends.
            thread = threading.Thread(
                target=self._exit, args=(ended,), name="bgjob-state", daemon=True
            )
            try:
                thread.start()
            except Exception:  # no thread can start: close it here
                self._exit(ended)
        try:
            ended.result(patience)
        except TimeoutError:
            if ended.done():
                raise  # the state's own exception
            raise TimeoutError(
                f"the state was not closed within {patience:.3g} s; the worker ends without it"
            ) from None

    def _exit(self, ended: "Future[None]") -> None:
        try:
            self._stack.close()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    async def _exit_async(self, tasks: Callable[[], Collection[asyncio.Task[None]]]) -> None:
        if cancelled := tasks():
            await asyncio.wait(cancelled, timeout=_LAST_WORDS)
        await self._async_stack.aclose()


_AWAITED = "only an AsyncWorker awaits its state, on its loop"


def _is_awaited(made: object) -> bool:
    # Pools of some drivers can be both awaited and entered; only entering closes them.
    return inspect.isawaitable(made) and not hasattr(type(made), "__aenter__")
