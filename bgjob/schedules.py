"""Schedules as a service of workers: any number of them, one job a tick."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

import psycopg

from bgjob import schema
from bgjob._connection import Cursor
from bgjob._duration import Duration, seconds
from bgjob._statements import schedules as statements
from bgjob._statements.statement import Statement
from bgjob.schedule import Schedule

T = TypeVar("T")


class Schedules:
    """Enqueues the jobs of schedules at their ticks: `Worker(..., services=[Schedules([...])])`.

    Any number of workers may have the same schedules, and none leads: whichever
    moves a schedule's tick forward in the database enqueues its job, in the
    same statement. What a tick is, the code says; when it is, the database's clock. Of two
    versions of a schedule in a rolling deploy each worker goes by its own, from
    one common tick. A schedule that no worker has any more is enqueued no more, and
    listed until it is removed.

    Args:
        schedules: each with another name.
        poll_interval: seconds or a timedelta between two looks, 1 s by default: what a schedule
            that is resumed waits for, or one that counts from the end of its last
            job. Ticks do not wait for it. At least 0.05 s.

    Raises:
        ValueError: two schedules have one name.
        TypeError: something is no Schedule.

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

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        """Enqueue what is due; as Service.run.

        Raises:
            SchemaError: the table is missing, or a grant.
            psycopg.Error: the database's; the ticks are due still.

        """
        if not self._registered:
            schema.check_lacks(_run(conn, statements.schedule_lacks()))
            _run(conn, statements.register(self._schedules))
            self._registered = True
        states = _run(conn, statements.look(self._names))
        if len(states) < len(self._names):  # somebody removed one that is in use
            _run(conn, statements.register([s for s in self._schedules if s.name not in states]))
            states = _run(conn, statements.look(self._names))
        firings, waits = [], [self._poll_interval]
        for schedule in self._schedules:
            state = states.get(schedule.name)
            if state is None:
                continue
            firing = schedule.firing(state)
            if firing is not None:
                firings.append((schedule, state.tick, firing))
            wait = schedule.wait(state, firing)
            if wait is not None:
                waits.append(max(wait, 0.0))
        if firings:
            _run(conn, statements.fire(firings))
        return min(waits)


def _run(conn: psycopg.Connection[Any], statement: Statement[T]) -> T:
    cursor = Cursor(conn).execute(statement.text, statement.params, binary=True)
    return statement.parse(cursor.fetchall() if cursor.description else [])
