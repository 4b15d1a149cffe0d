"""The database of `bgjob metrics`: a connection that fails sooner than Prometheus gives up."""

from typing import Any, TypeVar

import psycopg

from bgjob._diagnosis.measuring import measure
from bgjob._postgres.connection import Connection, options
from bgjob._running.drive import drive
from bgjob._sql.execute import run
from bgjob._sql.server import bounds
from bgjob._sql.statement import Statement
from bgjob._sql.views import stats
from bgjob.measurements import Measurements
from bgjob.stats import QueueStats

T = TypeVar("T")

_PATIENCE = 5.0
"""Seconds to connect, and for each answer. Prometheus waits for 10 by default."""


class Source:
    """Measures over a connection that is made again after an error; as a Client.

    A Client's own pool would wait for 30 s for a database that is away.

    Args:
        dsn: the database, which may be away.

    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: Connection | None = None

    def measure(self, *, cap: int) -> Measurements:
        """Measure the database; as Client.measure."""
        return drive(measure(cap), self._ask_bounded)

    def stats(self) -> list[QueueStats]:
        """Count exactly; as Client.stats."""
        counted: list[QueueStats] = self._ask(stats(None))
        return counted

    def close(self) -> None:
        """Close the connection. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _ask_bounded(self, statement: Statement[T]) -> T:
        answer: T = self._ask(bounds("bgjob metrics"), statement)
        return answer

    def _ask(self, *statements: Statement[Any]) -> Any:
        """Run statements in one transaction; return the last one's answer."""
        if self._connection is None:
            self._connection = Connection.connect(
                **options((self._dsn, {}), within=_PATIENCE), autocommit=True
            )
            self._connection.patience = _PATIENCE
        connection = self._connection
        try:
            with connection.transaction():
                return [run(connection, statement) for statement in statements][-1]
        except psycopg.Error:
            if connection.closed:
                self.close()
            raise
