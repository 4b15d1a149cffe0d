"""Cron expressions: when the next tick is, also across daylight saving."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

_SECOND = timedelta(seconds=1)
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression in a time zone; needs the extra `cron`.

    Daylight saving follows the rules of Debian's cron. Where neither the minute
    nor the hour begins with a star, the expression means times of the day: a time
    that the clock skips runs when the clock has stepped, and one that it shows twice
    runs once. Any other expression means real time: it runs whenever the clock
    shows it.

    Attributes:
        expression: minute, hour, day of the month, month, day of the week; or
            six fields, of which the first is the second.
        tz: the name of a time zone.

    Raises:
        ValueError: the expression or the zone is invalid, or never matches.
        TypeError: the expression is not a str.
        ImportError: the extra is not installed.

    """

    expression: str
    tz: str = "UTC"
    _zone: ZoneInfo = field(init=False, repr=False, compare=False)
    _is_of_the_day: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.expression, str):
            raise TypeError(f"cron must be a str, not {type(self.expression).__name__}")
        object.__setattr__(self, "_zone", _zone(self.tz))
        _next(self.expression, datetime(2024, 1, 1))  # noqa: DTZ001 (any day: it checks)
        minute, hour = self.expression.split()[-5:-3]
        of_the_day = not minute.startswith("*") and not hour.startswith("*")
        object.__setattr__(self, "_is_of_the_day", of_the_day)

    def __str__(self) -> str:
        return f"{' '.join(self.expression.split())} {self.tz}"

    def after(self, instant: datetime) -> datetime:
        """Return the first tick after an aware datetime: in UTC, a whole second."""
        return _after(self, instant)

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        """Return the last tick after `after` and up to `until`; None if there is none."""
        tick = self.after(after)
        if tick > until:
            return None
        # Bisection: 25 steps for a year of seconds.
        end = until
        while end - tick >= _SECOND:
            middle = tick + (end - tick) / 2
            later = self.after(middle)
            if later <= until:
                tick = later
            else:
                end = middle
        return tick


@lru_cache(maxsize=4096)
def _after(cron: Cron, instant: datetime) -> datetime:
    instant = instant.astimezone(UTC)
    find = _by_the_day if cron._is_of_the_day else _by_real_time  # noqa: SLF001 (of this module)
    return find(cron.expression, cron._zone, instant)  # noqa: SLF001


def _by_the_day(expression: str, zone: ZoneInfo, instant: datetime) -> datetime:
    wall = _wall(instant, zone)
    while True:
        wall = _next(expression, wall)
        # If the clock shows the time twice, this is the first; if it skips the time, this lies
        # after the step and fold=1 before it.
        tick = wall.replace(tzinfo=zone).astimezone(UTC)
        if _wall(tick, zone) != wall:
            before = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
            tick = _step(zone, before, tick) or tick
        if tick > instant:
            return tick


def _by_real_time(expression: str, zone: ZoneInfo, instant: datetime) -> datetime:
    wall = _wall(instant, zone)
    while True:
        # Assume that the clock does not step before the tick; if it does, start again there.
        tick = instant + (_next(expression, wall) - _wall(instant, zone))
        step = _step(zone, instant, tick)
        if step is None:
            return tick
        instant, wall = step, _wall(step, zone) - _SECOND


def _wall(instant: datetime, zone: ZoneInfo) -> datetime:
    """Return the wall clock's time, without a zone."""
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)


def _step(zone: ZoneInfo, start: datetime, end: datetime) -> datetime | None:
    """Return the first instant after `start` and up to `end` with another offset."""
    start, offset = start.replace(microsecond=0), start.astimezone(zone).utcoffset()
    while start < end:
        stop = min(start + _DAY, end)
        if stop.astimezone(zone).utcoffset() != offset:
            while stop - start > _SECOND:
                middle = start + (stop - start) // _SECOND // 2 * _SECOND
                if middle.astimezone(zone).utcoffset() == offset:
                    start = middle
                else:
                    stop = middle
            return stop
        start = stop
    return None


def _next(expression: str, wall: datetime) -> datetime:
    # Without a zone: cronsim's own handling of the steps is made for five fields, and drops
    # ticks in zones that step by half an hour.
    try:
        from cronsim import CronSim, CronSimError  # noqa: PLC0415 (only in the extra)
    except ModuleNotFoundError as error:
        raise ImportError("cron expressions need cronsim: pip install 'bgjob[cron]'") from error
    try:
        return next(CronSim(expression, wall))
    except CronSimError as error:
        raise ValueError(
            f"{expression!r} is not a cron expression of five fields, or of six with the second "
            f"first: {error}"
        ) from None
    except StopIteration:
        raise ValueError(f"the cron expression {expression!r} never matches") from None


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError, TypeError):  # ZoneInfoNotFoundError is a LookupError
        raise ValueError(
            f"there is no time zone {name!r}; name one such as 'Europe/Berlin', or, if the "
            "system has no time zones at all: pip install tzdata"
        ) from None
