"""Adds what a worker has counted to bgjob_minute, once a minute.

A worker without the service bgjob.minutes.Minutes has none of this. With it, the control threads
count the events that they tell (`tally`), and the thread of the first queue writes the counts: at
a second of the minute that depends on when the worker started, so that of many workers few write
together. Each thread writes once more when it ends.

If the table or a privilege is missing, the observer is told once, and nothing is counted until
the next look, some minutes later.
"""

from secrets import randbelow
from time import monotonic
from typing import Any, TypeVar

import psycopg

from bgjob._sql import execute
from bgjob._sql.minutes import add, minutes_lack
from bgjob._sql.statement import Statement
from bgjob._worker.events import Events
from bgjob._worker.registry import LOOK_AGAIN, UNAVAILABLE, Ask, check_table
from bgjob._worker.tally import MinuteCounter
from bgjob.errors import BgjobError
from bgjob.event import WorkerError
from bgjob.minutes import NO_TABLE, Minutes

T = TypeVar("T")

EVERY = 60.0
"""Seconds between two writes."""


class MinuteWriter:
    """The service of a worker that has Minutes; see bgjob.service.Service.

    Args:
        minutes: for how long the counts are kept.
        events: counts the events, and tells the observer.

    """

    def __init__(self, minutes: Minutes, events: Events) -> None:
        self._minutes = minutes
        self._events = events
        self._counter = MinuteCounter()
        self._second: float | None = None  # of the database's minutes: when this worker writes
        self._write_at = self._expire_at = 0.0
        self._is_told = False

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        """Write the counts and delete old ones, if it is time; return the seconds until then."""

        def ask(statement: Statement[T]) -> T:
            return execute.run(conn, statement)

        try:
            if self._events.minutes is None:
                check_table(ask(minutes_lack()), NO_TABLE)
                self._write_at = monotonic() + EVERY * randbelow(1000) / 1000
                self._events.minutes = self._counter
            if monotonic() >= self._write_at:
                self._write_at = monotonic() + self._write(ask)
            if monotonic() >= self._expire_at:
                self._expire_at = monotonic() + self._minutes.run(conn)
            return max(min(self._write_at, self._expire_at) - monotonic(), 0.0)
        except UNAVAILABLE as error:
            self._events.minutes = None
            self._counter.take()
            if not self._is_told:
                self._is_told = True
                told = BgjobError(
                    "this worker counts nothing for client.minutes(), and works all the same: "
                    f"{error}"
                )
                told.__cause__ = error
                self._events.tell([WorkerError(told)])
            return LOOK_AGAIN

    def leave(self, ask: Ask) -> None:
        """Write what was counted since the last time: a queue has ended.

        Raises:
            psycopg.Error: the database's.

        """
        if self._events.minutes is not None:
            self._write(ask)

    def _write(self, ask: Ask) -> float:
        """Write the counts, if there are any; return the seconds until the next time."""
        counted = self._counter.take()
        if not counted:
            return EVERY
        try:
            second = ask(add(counted))
        except psycopg.Error:
            # If the connection was lost, they may have been added nevertheless. That is rarer
            # than a server that was away.
            self._counter.put_back(counted)
            raise
        if self._second is None:
            self._second = second
        # The same second again, so that each minute gets the counts of one, and not two or none.
        wait = (self._second - second) % EVERY
        return wait if wait > EVERY / 2 else wait + EVERY
