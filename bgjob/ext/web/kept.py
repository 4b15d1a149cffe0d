"""Answers that all viewers share, so that a page costs the same for one as for a hundred."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")

_SHORTEST = 2.0
"""Seconds for which an answer is kept at least."""

_SHARE = 40
"""It is kept for so many times as long as it took: so it takes at most 2.5 % of a connection."""

_MOST = 500
"""The most answers that are kept."""


@dataclass(slots=True)
class _Answer:
    loop: asyncio.AbstractEventLoop
    task: "asyncio.Task[Any]"
    until: float = float("inf")
    """When it is to be asked for again; unknown while it is under way."""


class Kept:
    """Keeps answers, also those that are errors, and asks for each only once at a time."""

    def __init__(self) -> None:
        self._answers: OrderedDict[object, _Answer] = OrderedDict()

    async def get(
        self, key: object, ask: Callable[[], Awaitable[T]], *, at_least: float = _SHORTEST
    ) -> T:
        """Return the kept answer, or ask for it.

        Args:
            key: what is asked.
            ask: how to ask. A viewer who leaves does not end it for the others.
            at_least: seconds for which the answer is kept.

        """
        loop = asyncio.get_running_loop()
        answer = self._answers.get(key)
        if answer is None or answer.until <= monotonic() or answer.loop is not loop:
            answer = _Answer(loop, loop.create_task(self._ask(key, ask, at_least)))
            self._answers[key] = answer
            if len(self._answers) > _MOST:
                self._answers.popitem(last=False)
        self._answers.move_to_end(key)
        found: T = await asyncio.shield(answer.task)
        return found

    async def _ask(self, key: object, ask: Callable[[], Awaitable[T]], at_least: float) -> T:
        start = monotonic()
        try:
            return await ask()
        finally:
            end = monotonic()
            answer = self._answers.get(key)
            if answer is not None and answer.task is asyncio.current_task():
                answer.until = end + max(at_least, _SHARE * (end - start))

    def forget(self) -> None:
        """Ask for everything again: something was changed here."""
        self._answers.clear()

    async def close(self) -> None:
        """End what is under way on this loop."""
        loop = asyncio.get_running_loop()
        tasks = [a.task for a in self._answers.values() if a.loop is loop and not a.task.done()]
        self._answers.clear()
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
