"""The checks in their order: the statements that each asks, and what it makes of their rows."""

from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from time import time
from typing import Any, NamedTuple, TypeAlias

import psycopg
from psycopg import errors

from bgjob import schema
from bgjob._diagnosis import blueprint, queues, server, sessions, tables
from bgjob._sql import backlog, pauses, storage, workers
from bgjob._sql import server as server_sql
from bgjob._sql import session as session_sql
from bgjob._sql.statement import Statement
from bgjob.doctor import Finding, Limits

Steps: TypeAlias = Generator[Statement[Any], Any, list[Finding]]
"""Statements to execute, each in a transaction of its own; their answers; and the findings."""


class Database(NamedTuple):
    """What all checks know."""

    limits: Limits
    plan: blueprint.Blueprint
    comment: str | None
    """That of bgjob_job; None if tables are missing."""
    pid: int
    """The server process of the connection, as the driver knows it."""
    prepares: bool
    """Whether the driver may prepare statements on the connection."""

    @property
    def names(self) -> list[str]:
        """The names of bgjob's tables."""
        return [*self.plan.tables]


class _Timed(NamedTuple):
    server: server_sql.Server
    ahead: float
    round_trip: float


def _server_and_clock() -> Generator[Statement[Any], Any, _Timed]:
    before = time()
    found = yield server_sql.server()
    after = time()
    return _Timed(found, (before + after) / 2 - found.now, max(after - before, 0))


def _server(_: Database) -> Steps:
    found = yield from _server_and_clock()
    return server.server(found.server, found.round_trip)


def _clock(_: Database) -> Steps:
    found = yield from _server_and_clock()
    return server.clock(found.ahead, found.round_trip)


def _pooler(database: Database) -> Steps:
    found = yield server_sql.server()
    return server.pooler(found, database.pid, prepares=database.prepares)


def _connections(database: Database) -> Steps:
    return server.connections((yield server_sql.connections()), database.limits)


def _notify(database: Database) -> Steps:
    return server.notify((yield server_sql.notify_queue()), database.limits)


def _rights(_: Database) -> Steps:
    return server.rights((yield server_sql.rights()))


def _schema(database: Database) -> Steps:
    found = tables.version(database.comment)
    if database.comment is not None:
        found += tables.columns((yield storage.columns(database.names)), database.plan)
        described = yield storage.tables(database.names)
        indexes = yield storage.indexes(database.names)
        found += tables.definitions(described, indexes, database.plan)
        if not any(finding.severity == "bad" for finding in found):
            lacks = yield session_sql.lacks()
            found += tables.grants(lacks, (yield session_sql.hidden()))
    return found or [
        Finding("schema", "ok", f"the tables are as version {schema.VERSION} has them")
    ]


def _horizon(database: Database) -> Steps:
    holders = yield server_sql.holders()
    described = yield storage.tables(database.names)
    return sessions.horizon(holders, sum(table.dead for table in described), database.limits)


def _locks(database: Database) -> Steps:
    waits = yield server_sql.lock_waits(database.names)
    return sessions.locks(waits, (yield server_sql.table_locks(database.names)), database.limits)


def _tables(database: Database) -> Steps:
    return tables.tables((yield storage.tables(database.names)), database.limits)


def _indexes(database: Database) -> Steps:
    indexes = yield storage.indexes(database.names)
    return tables.indexes(indexes, (yield storage.tables(database.names)), database.limits)


def _leases(database: Database) -> Steps:
    return queues.leases((yield backlog.leases()), database.limits)


def _workers(database: Database) -> Steps:
    due = yield backlog.due()
    registered = yield workers.workers()
    sessions = yield server_sql.worker_sessions()
    return queues.workers(due, registered, sessions, database.limits)


def _due(database: Database) -> Steps:
    due = yield backlog.due()
    registered = []
    if due:
        # Ages are exact without the registry: only who could take the jobs is then not told.
        with suppress(errors.UndefinedTable, errors.InsufficientPrivilege):
            registered = yield workers.workers()
    return queues.due(due, registered, database.limits)


def _pauses(_: Database) -> Steps:
    paused = yield pauses.paused()
    return queues.pauses(paused, (yield backlog.due()) if paused else [])


def _schedules(database: Database) -> Steps:
    return queues.schedules((yield backlog.late_schedules(database.limits.schedule_seconds)))


def _dead(database: Database) -> Steps:
    return queues.died((yield backlog.died()), database.limits)


class _Check(NamedTuple):
    steps: Callable[[Database], Steps]
    needs_tables: bool


_CHECKS = {
    "server": _Check(_server, needs_tables=False),
    "clock": _Check(_clock, needs_tables=False),
    "pooler": _Check(_pooler, needs_tables=False),
    "connections": _Check(_connections, needs_tables=False),
    "notify": _Check(_notify, needs_tables=False),
    "rights": _Check(_rights, needs_tables=False),
    "schema": _Check(_schema, needs_tables=False),
    "horizon": _Check(_horizon, needs_tables=False),
    "locks": _Check(_locks, needs_tables=False),
    "tables": _Check(_tables, needs_tables=True),
    "indexes": _Check(_indexes, needs_tables=True),
    "leases": _Check(_leases, needs_tables=True),
    "workers": _Check(_workers, needs_tables=True),
    "due": _Check(_due, needs_tables=True),
    "pauses": _Check(_pauses, needs_tables=True),
    "schedules": _Check(_schedules, needs_tables=True),
    "dead": _Check(_dead, needs_tables=True),
}

CHECKS = tuple(_CHECKS)
"""The names of the checks, in their order."""


def examine(names: Iterable[str], limits: Limits, *, pid: int, prepares: bool) -> Steps:
    """Return the findings of these checks, or of all if none is named.

    A generator: it yields statements, is sent their answers, or thrown their errors.

    Args:
        names: of the checks.
        limits: what counts as too much.
        pid: the server process of the connection, as the driver knows it.
        prepares: whether the driver may prepare statements on the connection.

    Raises:
        ValueError: there is no check of such a name.
        psycopg.Error: the connection is lost.

    """
    chosen = set(names)
    if unknown := chosen - set(CHECKS):
        raise ValueError(f"there is no check {min(unknown)!r}; the checks are {', '.join(CHECKS)}")
    plan = blueprint.read(schema.init_sql())
    comment = yield session_sql.schema_comment()
    database = Database(limits, plan, comment, pid, prepares)
    found: list[Finding] = []
    for name, check in _CHECKS.items():
        if (name in chosen or not chosen) and not (check.needs_tables and comment is None):
            found += yield from _checked(name, check, database)
    return found


def _checked(name: str, check: _Check, database: Database) -> Steps:
    try:
        return (yield from check.steps(database))
    except psycopg.Error as error:
        if error.sqlstate is None:  # not the server's answer: the connection is lost
            raise
        text = f"not checked: {error.diag.message_primary}"
        return [Finding(name, "warn", text, _remedy(error), {"sqlstate": error.sqlstate})]


def _remedy(error: psycopg.Error) -> str:
    match error:
        case errors.InsufficientPrivilege():
            return "give this role what privileges.sql gives to bgjob_operator"
        case errors.LockNotAvailable():
            return "see the check locks for who has the table"
        case errors.QueryCanceled():
            return "the statement took over 5 s: repeat it when the server is less busy"
        case errors.UndefinedTable() | errors.UndefinedColumn():
            return "see the check schema"
    return "repeat it with the tables' owner; the server's log has more"
