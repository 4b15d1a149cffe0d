"""The results of a handler: complete, retry, reschedule, or dead-letter the job."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

from bgjob._checks import Duration, seconds
from bgjob._failure import Error
from bgjob.job import check_priority


@dataclass(frozen=True, slots=True)
class Complete:
    """The job is done: its row is deleted.

    Attributes:
        value: what the job has come to, as JSON: kept for `Client.result` and `Client.wait` if
            the job was enqueued with `keep`. Then one that orjson cannot encode, or of more
            than 1,000,000 bytes as JSON, fails the attempt. Of another job it is not even
            looked at. None by default.

    """

    value: Any = None


@dataclass(frozen=True, slots=True)
class Retry:
    """The attempt failed: run the job again after a delay.

    The attempt counts. After the last of the type's `max_attempts` the job goes
    to the dead-letter table instead.

    Attributes:
        delay: seconds or a timedelta, from the moment the result is stored, by
            the database's clock. None (the default) uses the type's backoff.
        error: why it failed; stored, and passed to the next attempt as
            `job.last_error`.
        priority: the job's priority from now on, -32768 to 32767, lower first: once
            it is due again it runs before jobs of a higher one. None (the
            default) uses the type's `retry_priority`; without one the job keeps its
            priority, so that a failed job does not overtake others.

    Raises:
        ValueError: a delay that is negative, NaN, infinite or over 100 years,
            or a priority out of range.

    """

    delay: Duration | None = None
    error: Error | None = None
    priority: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.delay is not None:
            seconds(self.delay, "Retry(delay)")
        if self.priority is not None:
            check_priority(self.priority, "Retry(priority)")


@dataclass(frozen=True, slots=True)
class Reschedule:
    """The job is not finished and nothing failed: run it again after a delay.

    The attempt is not counted, so a job may be rescheduled forever.

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
    """The job cannot be handled: move it to the dead-letter table, with the error.

    Attributes:
        error: why it cannot be handled; stored as the dead job's `last_error`.

    """

    error: Error


Result: TypeAlias = Complete | Retry | Reschedule | MoveToDlq
"""What a handler returns. A handler that returns None completes its job."""


BackoffPolicy: TypeAlias = Callable[[int], float]
"""Returns the seconds to wait after the attempt with this number (from 1) failed."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff: `base * factor ** (attempt - 1)`, at most `maximum`, spread by jitter.

    `Backoff.linear` and `Backoff.constant` make the other two usual policies. A
    policy is any callable from the number of the failed attempt to seconds;
    `Backoff()` is the default.

    Attributes:
        base: seconds or a timedelta after the first attempt; 1 s by default,
            enough for a deadlock or a dropped connection to pass.
        factor: growth from attempt to attempt; 2 by default.
        maximum: seconds or a timedelta, the longest delay; an hour by default,
            so that a job resumes soon after a long outage has ended.
        jitter: the share of a delay by which it is shortened at random, 0 to 1;
            0.1 by default, so that jobs that failed together do not return
            together.
        step: seconds or a timedelta that each further attempt adds; none by
            default.

    Raises:
        ValueError: a value is outside these ranges.

    """

    base: Duration = 1.0
    factor: float = 2.0
    maximum: Duration = 3600.0
    jitter: float = 0.1
    step: Duration = field(default=0.0, kw_only=True)

    @classmethod
    def linear(cls, step: Duration, *, maximum: Duration = 3600.0, jitter: float = 0.1) -> Self:
        """Make a policy that waits `step`, then twice that, then three times, and so on.

        The maximum, the jitter and their defaults are those of Backoff.
        """
        return cls(step, 1.0, maximum, jitter, step=step)

    @classmethod
    def constant(cls, delay: Duration, *, jitter: float = 0.1) -> Self:
        """Make a policy that waits equally long after each attempt, except for the jitter."""
        return cls(delay, 1.0, delay, jitter)

    def __post_init__(self) -> None:
        seconds(self.base, "Backoff(base)")
        seconds(self.maximum, "Backoff(maximum)")
        seconds(self.step, "Backoff(step)")
        if not 1 <= self.factor <= 1000:  # noqa: PLR2004
            raise ValueError(f"Backoff(factor) must be from 1 to 1000, not {self.factor!r}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"Backoff(jitter) must be from 0 to 1, not {self.jitter!r}")

    def __call__(self, attempt: int) -> float:
        """Return the seconds to wait after this attempt (the first is 1)."""
        base, step = seconds(self.base, "base"), seconds(self.step, "step")
        # The exponent is bounded: a job without a limit of attempts would overflow a float.
        delay = base * self.factor ** min(attempt - 1, 100) + step * (attempt - 1)
        delay = min(seconds(self.maximum, "maximum"), delay)
        return delay * random.uniform(1 - self.jitter, 1)  # noqa: S311
