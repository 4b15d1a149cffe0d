"""Takes the steps of a generator, on a thread or in a task.

Work of several round trips is written once, as a generator. It yields each step as a value,
and receives its answer or its exception. What a step needs is the caller's: `take`.
"""

from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


# -- async -----------------------------------------------------------------------------


async def drive_async(steps: Generator[S, Any, T], take: Callable[[S], Awaitable[object]]) -> T:
    """Take each step, and return what the generator returns."""
    __tracebackhide__ = True
    try:
        step = next(steps)
        while True:
            try:
                answer = await take(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        returned: T = stop.value
        return returned


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


def drive(steps: Generator[S, Any, T], take: Callable[[S], object]) -> T:
    """Take each step, and return what the generator returns."""
    __tracebackhide__ = True
    try:
        step = next(steps)
        while True:
            try:
                answer = take(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        returned: T = stop.value
        return returned
