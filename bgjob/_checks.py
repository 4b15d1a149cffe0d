"""Durations: seconds or a timedelta, checked where they are written."""

from datetime import timedelta
from typing import TypeAlias

Duration: TypeAlias = float | timedelta
"""Seconds, or a timedelta."""

# PostgreSQL's timestamps end in the year 294276 and Python's in 9999. A longer delay is a
# mistake, which is refused where it is made.
_LONGEST = 100 * 366 * 86400.0


def seconds(value: Duration, name: str) -> float:
    """Return a duration in seconds; an error names it by `name`.

    Raises:
        TypeError: neither a number nor a timedelta.
        ValueError: negative, NaN or over 100 years.

    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name} must be seconds (int or float) or a timedelta, not {type(value).__name__}"
        )
    if not 0 <= value <= _LONGEST:  # nor is NaN
        raise ValueError(f"{name} must be from 0 seconds to 100 years, not {value!r}")
    return float(value)
