"""Durations: seconds or a timedelta, checked where they are written."""

from datetime import timedelta
from typing import TypeAlias

Duration: TypeAlias = float | timedelta
"""Seconds, or a timedelta."""

# PostgreSQL's timestamps end in the year 294276 and Python's in 9999; a delay
# that nobody can wait for is a mistake, and is told to whoever makes it.
_LONGEST = 100 * 366 * 86400.0


def seconds(value: Duration, name: str) -> float:
    """Give `value` in seconds; raise ValueError or TypeError that names it if it is no duration."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name} must be seconds (int or float) or a timedelta, not {type(value).__name__}"
        )
    if not 0 <= value <= _LONGEST:  # nor is NaN
        raise ValueError(f"{name} must be from 0 seconds to 100 years, not {value!r}")
    return float(value)
