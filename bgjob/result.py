"""What a handler answers: complete, retry, reschedule, or move to the dead-letter table."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from bgjob._duration import Duration, seconds

Error: TypeAlias = str | BaseException


@dataclass(frozen=True, slots=True)
class Complete:
    """The job is done: its row is deleted."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The attempt failed: run the job again after a delay.

    The attempt counts: when it was the last of the type's `max_attempts`, the
    job goes to the dead-letter table instead.

    Attributes:
        delay: seconds or a timedelta, from the moment the result is stored, by
            the database's clock. None (the default) asks the type's backoff.
        error: why; stored, and given to the next attempt as `job.last_error`.

    Raises:
        ValueError: a delay that is negative, NaN, infinite or over 100 years.

    """

    delay: Duration | None = None
    error: Error | None = None

    def __post_init__(self) -> None:
        if self.delay is not None:
            seconds(self.delay, "Retry(delay)")


@dataclass(frozen=True, slots=True)
class Reschedule:
    """The job is not finished and nothing failed: run it again after a delay.

    The attempt is given back, so a job may be rescheduled for ever.

    Attributes:
        delay: seconds or a timedelta, from the moment the result is stored, by
            the database's clock.

    Raises:
        ValueError: a delay that is negative, NaN, infinite or over 100 years.

    """

    delay: Duration

    def __post_init__(self) -> None:
        seconds(self.delay, "Reschedule(delay)")


@dataclass(frozen=True, slots=True)
class MoveToDlq:
    """The job cannot be handled: it rests in the dead-letter table, with the error.

    Attributes:
        error: why; stored as `last_error` of the dead job.

    """

    error: Error


Result: TypeAlias = Complete | Retry | Reschedule | MoveToDlq
"""What a handler returns. A handler that returns None completes its job."""


BackoffPolicy: TypeAlias = Callable[[int], float]
"""Seconds to wait after the attempt with this number (from 1) failed."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff: `base * factor ** (attempt - 1)`, at most `maximum`, spread by jitter.

    A policy is any callable from the number of the failed attempt to seconds;
    this is the default one.

    Attributes:
        base: seconds after the first attempt; 1 by default, enough for a
            deadlock or a dropped connection to pass.
        factor: growth from attempt to attempt; 2 by default. 1 makes it constant.
        maximum: seconds, the longest delay; an hour by default, so that a job
            resumes soon after a long outage has ended.
        jitter: the share by which a delay is spread at random, 0 to 1; 0.1 by
            default, so that jobs that failed together do not return together.

    Raises:
        ValueError: a value outside these ranges.

    """

    base: float = 1.0
    factor: float = 2.0
    maximum: float = 3600.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        seconds(self.base, "Backoff(base)")
        seconds(self.maximum, "Backoff(maximum)")
        if not 1 <= self.factor <= 1000:  # noqa: PLR2004
            raise ValueError(f"Backoff(factor) must be from 1 to 1000, not {self.factor!r}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"Backoff(jitter) must be from 0 to 1, not {self.jitter!r}")

    def __call__(self, attempt: int) -> float:
        """Give the seconds to wait after this attempt (the first is 1)."""
        # The exponent is bounded because an endless job would overflow a float.
        delay = min(self.maximum, self.base * self.factor ** min(attempt - 1, 100))
        return delay * random.uniform(1 - self.jitter, 1)  # noqa: S311


_LONGEST_ERROR = 10_000


def error_text(error: Error | None) -> str | None:
    """Give an error as text that PostgreSQL can store: no NUL, no surrogates, 10,000 characters."""
    if error is None:
        return None
    try:
        text = error if isinstance(error, str) else _described(error)
        if len(text) > _LONGEST_ERROR:
            text = f"{text[:_LONGEST_ERROR]}… ({len(text)} characters)"
        return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    except BaseException as broken:
        return f"{type(error).__name__} (its text raised {type(broken).__name__})"


def _described(error: BaseException) -> str:
    name, text = type(error).__name__, str(error)
    return f"{name}: {text}" if text else name
