"""Messages of several statements, of whose results only the last one counts.

A plain call waits for it in one call of libpq. psycopg's generators read result by result, and
each reading may hand the interpreter to another thread: ten threads whose transactional jobs end
by messages of twenty results ran a third fewer jobs (benchmarks/transactional.py). But libpq waits
without limit, so another thread ends what is overdue.
"""

import contextlib
import socket
from math import inf
from time import monotonic

import psycopg
from psycopg.pq import ConnStatus
from psycopg.pq.abc import PGconn, PGresult

from bgjob._postgres import hosts
from bgjob._postgres.commands import results_of
from bgjob._postgres.connection import WORKER_PATIENCE, AsyncConnection, Connection, Silence


class _Call:
    """A call of libpq that waits for the server."""

    __slots__ = ("is_given_up", "pgconn", "since")

    def __init__(self, pgconn: PGconn) -> None:
        self.pgconn = pgconn
        self.since = monotonic()
        self.is_given_up = False


class Messages:
    """Sends messages and waits for their last results. Thread-safe.

    Args:
        has_watch: whether another thread calls `end_overdue`, so that plain calls may block.

    """

    def __init__(self, *, has_watch: bool = False) -> None:
        self._has_watch = has_watch
        self._calls: set[_Call] = set()

    async def last_result_async(self, connection: AsyncConnection, text: bytes) -> PGresult:
        """Send statements as one string; return the last result, which may be an error."""
        results = await connection.wait(results_of(connection.pgconn, text))
        return results[-1]

    def last_result(self, connection: Connection, text: bytes) -> PGresult:
        """Send statements as one string; return the last result, which may be an error.

        Raises:
            psycopg.OperationalError: the connection was lost, or there was no answer.

        """
        call = _Call(connection.pgconn)
        try:
            self._calls.add(call)  # first, so that `close` misses none
            if not self._has_watch:
                return connection.wait(results_of(connection.pgconn, text))[-1]
            result = call.pgconn.exec_(text)
        finally:
            self._calls.discard(call)
        if call.is_given_up:
            hosts.silent(connection)
            raise Silence(WORKER_PATIENCE)
        if call.pgconn.status == ConnStatus.BAD:
            raise psycopg.OperationalError(result.get_error_message())
        return result

    @property
    def overdue_at(self) -> float:
        """When to call `end_overdue` next."""
        if not self._calls:
            return inf
        waiting = [call.since for call in self._calls.copy() if not call.is_given_up]
        return min(waiting, default=inf) + WORKER_PATIENCE

    def end_overdue(self, now: float) -> None:
        """Fail the calls that have waited for too long."""
        for call in self._calls.copy():
            if now >= call.since + WORKER_PATIENCE and not call.is_given_up:
                call.is_given_up = True
                hang_up(call.pgconn)

    def close(self) -> None:
        """End all calls: no thread calls `end_overdue` any more. Later calls do not block."""
        self._has_watch = False
        for call in self._calls.copy():
            hang_up(call.pgconn)


def hang_up(pgconn: PGconn) -> None:
    """Shut down the socket of a connection, which wakes the thread that waits for it."""
    with contextlib.suppress(psycopg.Error, OSError):  # it has been lost meanwhile
        number = pgconn.socket
        # A duplicate, since libpq closes a lost connection, and the number is soon another's.
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as duplicate:
            if pgconn.socket == number:
                duplicate.shutdown(socket.SHUT_RDWR)
