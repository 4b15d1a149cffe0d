"""Limits over all workers: how many jobs run at once, and how many start in a time."""

import re
from dataclasses import dataclass
from datetime import datetime
from math import ceil, isfinite
from typing import Literal, TypeAlias

Scope: TypeAlias = Literal["queue", "type"]
"""What has a limit: a queue, with jobs of all types; or a type, in all queues."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RATE = re.compile(r"(\d+(?:\.\d+)?)/([smhd])", re.ASCII)
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limit:
    """How many jobs may run at once, or start in a time, over all workers.

    Args:
        concurrency: how many handlers run at once, at least 1. A call of a batch handler is one.
        rate: how many jobs start, such as "14/s", "600/m", "1000/h" or "5/d". Each start of an
            attempt counts, also of a retry, and each job of a batch.
        burst: with a rate, how many may start at once after a time without any: in any
            time t at most `rate * t + burst` jobs start. By default as many as the rate allows
            in a second, and at least 1. A burst of less than a tenth of a second's jobs is kept as
            well, but then the rate is not reached: each start may come some milliseconds late.

    Without any of them it does not limit: `Limit()` set by an operator takes precedence over
    a limit in a program's code.

    Raises:
        TypeError, ValueError: an argument is not like that.

    """

    concurrency: int | None = None
    rate: str | None = None
    burst: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("concurrency", self.concurrency), ("burst", self.burst)):
            if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
                raise ValueError(
                    f"{name} of a limit must be an int from 1 to {_MOST}, not {value!r}"
                )
        if self.rate is not None and not isinstance(self.rate, str):
            raise TypeError(
                f'rate of a limit must be a str such as "14/s" or "600/m", not {self.rate!r}'
            )
        if self.rate is not None and not (0 < self.per_second < _MOST):
            raise ValueError(
                f"rate of a limit must be over 0 and under {_MOST} a second, not {self.rate!r}"
            )
        if self.burst is not None and self.rate is None:
            raise ValueError("burst of a limit is for a rate: add one, such as rate='14/s'")

    @property
    def per_second(self) -> float:
        """The starts a second; 0 without a rate."""
        if self.rate is None:
            return 0.0
        match = _RATE.fullmatch(self.rate)
        if match is None:
            raise ValueError(
                "rate of a limit must be a number of jobs, a slash, and s, m, h or d, such as "
                f'"14/s" or "600/m", not {self.rate!r}'
            )
        number = float(match[1]) / _UNITS[match[2]]
        return number if isfinite(number) else 0.0

    @property
    def burst_size(self) -> int | None:
        """The burst, or its default; None without a rate."""
        if self.rate is None:
            return None
        return max(1, ceil(self.per_second)) if self.burst is None else self.burst

    def __str__(self) -> str:
        parts = [] if self.concurrency is None else [f"{self.concurrency:,} at once"]
        if self.rate is not None:
            parts.append(f"{self.rate}, burst {self.burst_size:,}")
        return ", ".join(parts) or "no limit"


def rate_text(per_second: float) -> str:
    """Return a rate as a Limit takes it, with the largest unit that makes it a whole number."""
    for unit, seconds in _UNITS.items():
        number = per_second * seconds
        if number >= 1 and abs(number - round(number)) < 1e-6 * number:
            return f"{round(number)}/{unit}"
    unit = next((u for u, seconds in _UNITS.items() if per_second * seconds >= 1), "d")
    return f"{per_second * _UNITS[unit]:.6f}".rstrip("0").rstrip(".") + f"/{unit}"


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """A limit, and what of it is in use.

    Attributes:
        scope: what has the limit, "queue" or "type".
        name: the name of the queue or the type.
        limit: the limit.
        is_set: whether an operator has set it, for all workers; otherwise it is in a program's
            code, and binds the workers of that program.
        used_at: when a worker last asked for a ration, or the limit was set.
        workers: how many workers have places, or wait for one.
        places: how many handlers they may run at once; of a dead worker for up to two leases.
        tokens: how many jobs could start at once now; None without a rate.
        next_in: seconds until another job may start; 0.0 if one may now.

    """

    scope: Scope
    name: str
    limit: Limit
    is_set: bool
    used_at: datetime
    workers: int
    places: int
    tokens: int | None
    next_in: float
