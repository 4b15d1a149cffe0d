"""The database of `bgjob top`: a connection that never waits for long."""

from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psycopg
from psycopg.errors import InsufficientPrivilege, UndefinedColumn, UndefinedTable

from bgjob import schema
from bgjob._cli import database, explained
from bgjob._cli.top.seen import MINUTE, MINUTES, Flow, Seen, Server, flows_of
from bgjob._explanation.steps import explain_queue
from bgjob._postgres.connection import Connection
from bgjob._running.drive import drive
from bgjob._sql.dead import LastDeath, last_death
from bgjob._sql.execute import read_all, run, send_all
from bgjob._sql.limits import limits
from bgjob._sql.minutes import Span, report
from bgjob._sql.overviews import overview, plan_by_index
from bgjob._sql.server import Holder, holders
from bgjob._sql.session import SETTINGS, schema_comment, session
from bgjob._sql.statement import Statement
from bgjob._sql.workers import workers

if TYPE_CHECKING:
    from bgjob.limit import LimitStatus

T = TypeVar("T")
R = TypeVar("R")

_CAP = 1000
_PATIENCE = 10.0

_SLOW = 10.0
"""Seconds between two looks at what changes slowly: minutes, deaths, old transactions."""

_FLOWS = report(Span(MINUTE, MINUTES), by="queue", queue=None, type_=None)
_DEATH = last_death(within=3600.0, cap=_CAP)

_SETTINGS = SETTINGS | {
    "application_name": "bgjob top",
    # It must not wait in line behind a lock, where others would wait behind it.
    "lock_timeout": "1s",
    "statement_timeout": "5s",
    "default_transaction_read_only": "on",
}


class Source:
    """Answers with overviews, over a connection that is made again after an error.

    Args:
        dsn: the database.

    Raises:
        SchemaError: the tables are missing or of another version.
        psycopg.Error: the server cannot be reached.

    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection = self._connect()
        self._slow_at = 0.0
        self._flows: dict[str, Flow] = {}
        self._death: LastDeath | None = None
        self._limits: Sequence[LimitStatus] = ()
        self._holder: Holder | None = None
        info = self._connection.info
        # The host of a socket is its folder.
        host = "" if info.host.startswith("/") else f"@{info.host}"
        self.server = Server(
            f"{info.dbname}{host}", (info.parameter_status("server_version") or "?").split()[0]
        )

    def ask(self) -> Seen:
        """Return what the queues hold at this moment, the workers, and what is read more rarely.

        Raises:
            psycopg.Error: the database's; the next call connects again.

        """
        if self._connection.closed:
            self._connection = self._connect()
        try:
            found = self._run(overview(None, cap=_CAP))
            if monotonic() >= self._slow_at:
                self._flows = self._optional(_FLOWS, flows_of) or {}
                self._death = self._optional(_DEATH, lambda death: death)
                self._limits = self._optional(limits(), tuple) or ()
                self._holder = self._optional(holders(), _oldest)
                self._slow_at = monotonic() + _SLOW
            listed = self._optional(workers(), lambda listed: listed) or []
        except psycopg.Error:
            self.close()
            raise
        return Seen(found, listed, self._flows, self._holder, self._death, self._limits)

    def explain(self, queue: str) -> list[tuple[str, str]]:
        """Return why the first due job of a queue does not run, as labels and texts.

        Raises:
            psycopg.Error: the database's; the next call connects again.

        """
        if self._connection.closed:
            self._connection = self._connect()
        try:
            return explained.lines(drive(explain_queue(queue), self._run))
        except psycopg.Error:
            self.close()
            raise

    def _run(self, statement: Statement[T]) -> T:
        statements: list[Statement[Any]] = [plan_by_index(), statement]
        with self._connection.pipeline():
            cursors = send_all(self._connection, statements)
        _, answer = read_all(cursors, statements)
        return cast("T", answer)

    def _optional(self, statement: Statement[T], read: Callable[[T], R]) -> R | None:
        """Ask for what can be left out; None where this role or this schema does not have it."""
        try:
            return read(self._run(statement))
        except (InsufficientPrivilege, UndefinedTable, UndefinedColumn):
            return None

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()

    def _connect(self) -> Connection:
        connection = database.connect(self._dsn)
        connection.patience = _PATIENCE
        try:
            schema.check_version(run(connection, schema_comment()))
            run(connection, session(connection.info.backend_pid, _SETTINGS))
        except BaseException:
            connection.close()
            raise
        return connection


def _oldest(held: Sequence[Holder]) -> Holder | None:
    return max(held, key=lambda holder: holder.seconds or 0.0, default=None)
