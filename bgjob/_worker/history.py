"""Empties the partition of bgjob_history for tomorrow, which has the jobs of a week ago.

A worker with types that are kept has this service; another has none of it. Any worker may
empty the partition, once a day: the others find it empty.
"""

from secrets import randbelow
from typing import Any

import psycopg
from psycopg.errors import LockNotAvailable

from bgjob import schema
from bgjob._sql.execute import run
from bgjob._sql.history import NO_TABLE, empty, history_lacks, old, wait_for_no_lock
from bgjob.errors import SchemaError

_HOUR = 3600.0
_SPREAD = 600
_SOON = 60.0
"""Seconds after which it tries again, where another session has the partition."""


class HistoryKeeper:
    """The service of a worker with types that are kept; see bgjob.service.Service."""

    def __init__(self) -> None:
        self._is_checked = False

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        """Empty the partition of tomorrow, if it is not; return the seconds until the next look.

        Raises:
            SchemaError: the table or a privilege is missing. Then no kept job could be settled.

        """
        if not self._is_checked:
            lacks = run(conn, history_lacks())
            if any(lack.is_absent and lack.column for lack in lacks):
                raise SchemaError(NO_TABLE)
            schema.check_lacks(lacks)
            self._is_checked = True
        day, is_empty, until_tomorrow = run(conn, old())
        if not is_empty:
            try:
                with conn.transaction():
                    run(conn, wait_for_no_lock())
                    run(conn, empty(day))
            except LockNotAvailable:
                return _SOON
        # Not all workers together, when the day begins.
        return min(_HOUR, until_tomorrow + randbelow(_SPREAD))
