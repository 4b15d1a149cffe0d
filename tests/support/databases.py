"""The databases of the run's server: made for a test, and kept for others if it changed only rows."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import LiteralString
from urllib.parse import urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from support.waiting import eventually

MOST_USES = 50
"""Tests that may have the same database, which grows a little with each."""

CATALOGS = [
    "pg_class",
    "pg_attribute where attrelid >= 16384",
    "pg_depend",  # with functions, triggers, constraints, policies, types
    "pg_description where objoid >= 16384",
    "pg_namespace",
    "pg_statistic where starelid >= 16384",
]
SHAPE = " union all ".join(
    f"select count(*) as found, min(age(xmin)) as age from {catalog}" for catalog in CATALOGS
)
STATE = f"""
    select array_agg(found)::text, coalesce(min(age) < age(%s::xid), false), (
        select string_agg(oid::regclass::text, ', ') from pg_class
        where oid >= 16384 and relkind = 'r' and (pg_relation_size(oid) > 0 or reltuples <> -1)
    ) from ({SHAPE}) _
"""
"""How many objects there are; whether any has changed since a transaction; the tables that were
written or analyzed since they were made or truncated."""

TERMINATE = """
    select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> %s
"""

KEEPER = "keeper of the tests"
"""The application name of the sessions that empty databases, for tests that count all others."""

SETTINGS_CHANGED = """
    select age(d.xmin) < age(%s::xid)
        or exists (select from pg_db_role_setting where setdatabase = d.oid)
    from pg_database d where datname = %s
"""


def url_of(dsn: str) -> str:
    """Return a connection string as a URL, which SQLAlchemy reads too."""
    parts = conninfo_to_dict(dsn)
    query = urlencode({name: parts[name] for name in ("host", "port")})
    return f"postgresql://{parts['user']}@/{parts['dbname']}?{query}"


def read(cursor: psycopg.Cursor) -> list[bytes | None]:
    """Return the only row as the server sent it: a test may have registered loaders."""
    assert cursor.pgresult is not None
    return [cursor.pgresult.get_value(0, n) for n in range(cursor.pgresult.nfields)]


@dataclass
class Kept:
    """A database that a test may have, as it is after its creation."""

    name: str
    since: str
    """The last transaction that changed its catalogs."""
    uses: int = 0
    keeper: psycopg.Connection | None = None
    """The session that empties it. A new one would take 6 ms of a core, this one takes one."""

    def close(self) -> None:
        if self.keeper is not None:
            self.keeper.close()


class Databases:
    """Makes and drops the databases of one worker; the names of two workers never meet."""

    def __init__(self, server_dsn: str, worker: str, admin: psycopg.Connection) -> None:
        self._server_dsn = server_dsn
        self._worker = worker
        self._admin = admin
        self._numbers = itertools.count(1)
        self._kept: dict[str, list[Kept]] = {}
        self._shapes: dict[str, bytes | None] = {}
        # Copying files beats logging every page, and before version 15 was the only way.
        new_enough = admin.info.server_version >= 15_00_00
        self._strategy: LiteralString = "strategy file_copy" if new_enough else ""

    @contextlib.contextmanager
    def make(
        self, *, template: str = "template1", prefix: str = "t", encoding: str | None = None
    ) -> Iterator[tuple[str, str]]:
        """Yield the name and the DSN of a new database, and drop it afterwards.

        An encoding of its own needs the template `template0`.
        """
        name = self._create(template, prefix, encoding)
        try:
            yield name, self._dsn(name)
        finally:
            self._drop(name)

    @contextlib.contextmanager
    def make_template(self, *scripts: bytes) -> Iterator[str]:
        """Yield the name of a database that `lend` may copy, in which these scripts were run."""
        with self.make(prefix="tmpl") as (name, dsn):
            with psycopg.connect(dsn) as conn:
                for script in scripts:
                    conn.execute(script)
                self._shapes[name], _, _ = read(conn.execute(STATE.encode(), ["3"]))
            self._kept[name] = []
            try:
                yield name
            finally:
                for kept in self._kept.pop(name):
                    kept.close()

    @contextlib.contextmanager
    def lend(self, template: str, *, may_keep: Callable[[], bool]) -> Iterator[str]:
        """Yield the DSN of a database that is a copy of the template.

        To make and drop a database takes 40 ms of a core. So it is kept for another test, unless
        the test failed (`may_keep`) or has changed more than rows: then it is dropped.
        """
        if self._kept[template]:
            database = self._kept[template].pop()
        else:
            name = self._create(template)
            [[since]] = self._admin.execute("select pg_current_xact_id()::xid::text").fetchall()
            database = Kept(name, since)
        may_stay = False
        try:
            yield self._dsn(database.name)
            if may_keep() and database.uses < MOST_USES:
                with contextlib.suppress(psycopg.OperationalError):
                    may_stay = self._empty(database, self._shapes[template])
        finally:
            if may_stay:
                self._kept[template].append(database)
            else:
                database.close()
                self._drop(database.name)

    def _empty(self, database: Kept, shape: bytes | None) -> bool:
        """End the sessions, and empty the tables; False if more than rows has changed."""
        name, since = database.name, database.since
        if database.keeper is None or database.keeper.closed:
            database.keeper = psycopg.connect(
                self._dsn(name), autocommit=True, application_name=KEEPER
            )
        keeper = database.keeper
        # With a timeout, the function itself would look for their end ten times a second.
        own = keeper.info.backend_pid
        ended = eventually(lambda: not self._admin.execute(TERMINATE, [name, own]).rowcount)
        assert ended, f"sessions of {name} outlive their termination"
        if self._admin.execute(SETTINGS_CHANGED, [since, name]).fetchall() != [(False,)]:
            return False
        found, has_changed, tables = read(keeper.execute(STATE.encode(), [since]))
        if found != shape or has_changed != b"f":
            return False
        if tables:
            cursor = keeper.execute(
                b"truncate %b restart identity; "
                b"select pg_current_xact_id()::xid, pg_stat_reset()" % tables
            )
            cursor.nextset()
            database.since = (read(cursor)[0] or b"").decode()
        database.uses += 1
        return True

    def _create(self, template: str, prefix: str = "t", encoding: str | None = None) -> str:
        name = f"{prefix}_{self._worker}_{next(self._numbers)}"
        self._admin.execute(
            sql.SQL("create database {} template {} {} {}").format(
                sql.Identifier(name),
                sql.Identifier(template),
                sql.SQL(self._strategy),
                sql.SQL("encoding {} locale 'C'").format(encoding) if encoding else sql.SQL(""),
            )
        )
        return name

    def _drop(self, name: str) -> None:
        self._admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

    def _dsn(self, name: str) -> str:
        return make_conninfo(self._server_dsn, dbname=name)
