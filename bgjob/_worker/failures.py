"""What a failure keeps in memory until it is settled and told."""

import traceback
from collections.abc import Iterator


def error_of(result: object) -> object:
    """Return the error of a result that has one, an exception or a text."""
    return getattr(result, "error", None)


def drop_locals(result: object) -> None:
    """Drop the variables that the frames of a result's error would keep."""
    for error in _errors(result):
        traceback.clear_frames(error.__traceback__)


def drop_tracebacks(result: object) -> None:
    """Drop the frames of a result's error."""
    for error in _errors(result):
        error.__traceback__ = None


def _errors(result: object) -> Iterator[BaseException]:
    """Yield the error of a result, those that led to it, and the leaves of groups."""
    left, seen = [error_of(result)], set[int]()
    while left:
        error = left.pop()
        if isinstance(error, BaseException) and id(error) not in seen:
            seen.add(id(error))
            yield error
            left += [error.__cause__, error.__context__]
            if isinstance(error, BaseExceptionGroup):
                left += error.exceptions
