"""Schedules as a service of workers: any number of them, one job a tick."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg.errors import ReadOnlySqlTransaction
from psycopg.pq import TransactionStatus

from bgjob import schema
from bgjob._checks import Duration, seconds
from bgjob._sql import schedules as statements
from bgjob._sql.execute import run
from bgjob._sql.statement import Statement
from bgjob.errors import BgjobError, ScheduleError
from bgjob.schedule import Schedule, State

T = TypeVar("T")

_FIRST_PAUSE = 1.0
"""Seconds before a schedule that failed is tried again; doubles."""

_LONGEST_PAUSE = 60.0

_OF_NONE = (psycopg.OperationalError, psycopg.InterfaceError, ReadOnlySqlTransaction)
"""Errors that do not concern one schedule in particular."""

_AHEAD = (
    "it was ahead of the database's clock, which has been set back, or its row was written by "
    "hand; it goes on from now, and its ticks since then may come a second time"
)


class Schedules:
    """Enqueues the jobs of schedules: `Worker(..., services=[Schedules([...])])`.

    Any number of workers may have the same schedules; there is no leader. The worker
    that moves a schedule's tick forward in the database enqueues its job, in the
    same statement. A schedule that fails stops no other, and the observer receives a
    ScheduleError. The code defines the ticks, and the database's clock the time. In a
    rolling deploy with two versions of a schedule each worker follows its own version,
    from a common last tick. A schedule that no worker has any more enqueues nothing, and
    is listed until it is removed.

    Args:
        schedules: the schedules, with distinct names.
        poll_interval: seconds or a timedelta between two looks at the table, 1 s by
            default, at least 0.05 s: how long a resumed schedule waits, or one that
            counts from the end of its last job. Ticks do not wait for it.

    Raises:
        ValueError: two schedules have one name.
        TypeError: an item is not a Schedule.

    Thread-safe; may be given to several workers.
    """

    def __init__(self, schedules: Iterable[Schedule], *, poll_interval: Duration = 1.0) -> None:
        self._schedules = tuple(schedules)
        for schedule in self._schedules:
            if not isinstance(schedule, Schedule):
                raise TypeError(f"schedules must be Schedule values, not {schedule!r}")
        self._names = [schedule.name for schedule in self._schedules]
        twice = [name for name, count in Counter(self._names).items() if count > 1]
        if twice:
            raise ValueError(f"two schedules are named {twice[0]!r}: give each a name of its own")
        self._poll_interval = seconds(poll_interval, "poll_interval")
        if self._poll_interval < 0.05:  # noqa: PLR2004
            raise ValueError(f"poll_interval must be at least 0.05 s, not {poll_interval!r}")
        self._registered = False
        # By name, for schedules that wait for a tick: their state when it was read, and the tick.
        self._coming: dict[str, tuple[State, datetime]] = {}
        self._retry_at: dict[str, float] = {}  # for schedules that failed
        self._pauses: dict[str, float] = {}

    def __iter__(self) -> Iterator[Schedule]:
        """Iterate over the schedules, in the order in which they were given."""
        return iter(self._schedules)

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        """Enqueue the jobs of due ticks; return the seconds until the next run.

        Raises:
            SchemaError: the table or a grant is missing.
            ScheduleError: some schedules could not be enqueued; the others were.
            psycopg.Error: the database's; the ticks stay due.

        """
        now = monotonic()
        problems: dict[str, Exception] = {}
        schedules = [s for s in self._schedules if self._retry_at.get(s.name, now) <= now]
        if not self._registered:
            schema.check_lacks(run(conn, statements.schedule_lacks()))
            problems |= _apart(conn, statements.register, [(s.name, s) for s in schedules])
            self._registered = True
        names = [s.name for s in schedules]
        states = run(conn, statements.look(names))
        missing = [(s.name, s) for s in schedules if s.name not in states.keys() | problems.keys()]
        if missing:  # a schedule in use was removed
            problems |= _apart(conn, statements.register, missing)
            states |= run(conn, statements.look([name for name, _ in missing]))
        firings, waits = [], [self._poll_interval]
        for schedule in schedules:
            state = states.get(schedule.name)
            if state is None:
                continue
            if (until := self._waits_until(state)) is not None:
                waits.append((until - state.now).total_seconds())
                continue
            try:
                firing = schedule.firing(state)
                wait = schedule.wait(state, firing)
            except Exception as error:  # concerns this schedule only
                problems[schedule.name] = error
                continue
            if firing is not None:
                firings.append((schedule.name, (schedule, state.tick, firing)))
                if schedule.is_ahead(state):
                    problems[schedule.name] = BgjobError(_AHEAD)
            if wait is not None:
                waits.append(max(wait, 0.0))
                if firing is None:
                    until = state.now + timedelta(seconds=wait)
                    self._coming[schedule.name] = state, until
        if firings:
            problems |= _apart(conn, statements.fire, firings)
        self._put_off(names, problems)
        if problems:
            raise ScheduleError(problems, min(waits)) from next(iter(problems.values()))
        return min(waits)

    def _waits_until(self, state: State) -> datetime | None:
        """Return the next tick of a schedule if it is in the future.

        The tick is remembered: computing it took 0.1 ms for each schedule at each look.
        """
        seen, until = self._coming.get(state.name, (None, state.now))
        if (
            seen is not None
            and seen._replace(now=state.now) == state
            and (seen.now <= state.now < until)
        ):
            return until
        return None

    def _put_off(self, names: Iterable[str], problems: Mapping[str, Exception]) -> None:
        """Delay the next attempt of schedules that failed."""
        for name in names:
            if name not in problems or isinstance(problems[name], BgjobError):
                self._pauses.pop(name, None)
                self._retry_at.pop(name, None)
            else:
                pause = self._pauses.get(name, _FIRST_PAUSE)
                self._retry_at[name] = monotonic() + pause
                self._pauses[name] = min(2 * pause, _LONGEST_PAUSE)


def _apart(
    conn: psycopg.Connection[Any],
    make: Callable[[Sequence[T]], Statement[None]],
    items: Sequence[tuple[str, T]],
) -> dict[str, Exception]:
    """Run a statement for all items; return the errors of the refused ones, by name.

    If it fails, it is run for each half: one bad item among n takes 2 log n statements.
    An error that does not concern an item is raised.
    """
    try:
        run(conn, make([item for _, item in items]))
    except _OF_NONE:
        raise
    except Exception as error:
        if conn.info.transaction_status != TransactionStatus.IDLE:
            raise
        if len(items) == 1:
            return {items[0][0]: error}
        half = len(items) // 2
        return _apart(conn, make, items[:half]) | _apart(conn, make, items[half:])
    return {}
