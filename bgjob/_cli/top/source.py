"""The database of `bgjob top`: a connection that never waits for long."""

import psycopg
from psycopg.errors import InsufficientPrivilege, UndefinedTable

from bgjob import schema
from bgjob._cli import database
from bgjob._cli.top.frame import Seen, Server
from bgjob._postgres.connection import Connection
from bgjob._sql.execute import read_all, run, send_all
from bgjob._sql.overviews import overview, plan_by_index
from bgjob._sql.session import SETTINGS, schema_comment, session
from bgjob._sql.workers import workers
from bgjob.workers import WorkerStatus

_CAP = 1000
_PATIENCE = 10.0

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
        info = self._connection.info
        # The host of a socket is its folder.
        host = "" if info.host.startswith("/") else f"@{info.host}"
        self.server = Server(
            f"{info.dbname}{host}", (info.parameter_status("server_version") or "?").split()[0]
        )

    def ask(self) -> Seen:
        """Return what the queues hold at this moment, and the workers.

        Raises:
            psycopg.Error: the database's; the next call connects again.

        """
        if self._connection.closed:
            self._connection = self._connect()
        statements = [plan_by_index(), overview(None, cap=_CAP)]
        try:
            with self._connection.pipeline():
                cursors = send_all(self._connection, statements)
            _, answer = read_all(cursors, statements)
            return Seen(answer, self._workers())
        except psycopg.Error:
            self.close()
            raise

    def _workers(self) -> list[WorkerStatus]:
        try:
            return run(self._connection, workers())
        except (InsufficientPrivilege, UndefinedTable):
            return []  # the rest can be shown without

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
