"""The roles of privileges.sql, and logins that have only those."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from support.documents import SCRIPT

GROUPS = ("producer", "worker", "scheduler", "operator", "editor")


class Grant(NamedTuple):
    """One privilege of the script."""

    group: str
    privilege: str
    columns: str
    """In parentheses; empty for the whole table."""
    table: str

    def __str__(self) -> str:
        return f"{self.privilege} {self.columns} on {self.table}".replace("  ", " ")

    @property
    def single(self) -> "list[Grant]":
        """The same, column by column."""
        columns = re.findall(r"\w+", self.columns)
        return [self._replace(columns=f"({column})") for column in columns] or [self]


class Roles:
    """The script's roles, and logins that have only those.

    Roles belong to the whole server: their names carry that of the test's database.
    """

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.conn = psycopg.connect(dsn, autocommit=True)
        self._suffix = f"_{self.conn.info.dbname}"
        self._made: list[str] = []

    def name(self, group: str) -> str:
        return f"bgjob_{group}{self._suffix}"

    def named(self, script: str) -> bytes:
        """Return SQL in which the roles have this test's names."""
        # A table has the name of a role.
        return re.sub(
            r"\b((?:role|to|from)\s+bgjob_(?:producer|worker|scheduler|operator|editor))\b",
            rf"\g<1>{self._suffix}",
            script,
        ).encode()

    def apply(self, script: str = SCRIPT) -> None:
        self.conn.execute(self.named(script))
        self._made += [self.name(group) for group in GROUPS]

    def login(self, *groups: str) -> str:
        """Make a login that is a member of these groups, and return its DSN."""
        name = f"app_{len(self._made)}{self._suffix}"
        members = sql.SQL(", ").join(sql.Identifier(self.name(group)) for group in groups)
        self.conn.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
        self._made.append(name)
        if groups:
            self.conn.execute(sql.SQL("grant {} to {}").format(members, sql.Identifier(name)))
        return make_conninfo(self.dsn, user=name)

    def revoke(self, grant: Grant) -> None:
        statement = f"revoke {grant} from bgjob_{grant.group}"
        self.conn.execute(self.named(statement))

    def close(self) -> None:
        for name in reversed(self._made):
            identifier = sql.Identifier(name)
            self.conn.execute(sql.SQL("drop owned by {}").format(identifier))
            self.conn.execute(sql.SQL("drop role {}").format(identifier))
        self.conn.close()


@pytest.fixture
def roles(dsn: str) -> Iterator[Roles]:
    roles = Roles(dsn)
    try:
        roles.apply()
        yield roles
    finally:
        roles.close()
