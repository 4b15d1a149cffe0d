"""The database of a command: find it, connect to it and check it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from bgjob import schema
from bgjob._postgres.connection import (
    Connection,
    ConnectionParameters,
    check_conninfo,
    options,
)
from bgjob._postgres.pool import PATIENCE
from bgjob._sql.execute import run
from bgjob._sql.session import schema_comment
from bgjob.client import Client
from bgjob.errors import BgjobError

VARIABLE = "BGJOB_DSN"

_LIBPQS = ("PGSERVICE", "PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER")


class DatabaseError(BgjobError):
    """The database is not given, or its connection string is invalid."""


def find(given: str | None) -> str:
    """Return the connection string to use; an empty one means libpq's own variables.

    Args:
        given: that of the command line, which takes precedence.

    Raises:
        DatabaseError: there is none, or a variable contains an invalid one.

    """
    if given is not None:
        return given
    for variable in (VARIABLE, "DATABASE_URL"):
        if text := os.environ.get(variable):
            try:
                return check_conninfo(text)
            except ValueError as error:
                raise DatabaseError(f"{variable}: {error}") from None
    if any(map(os.environ.get, _LIBPQS)):
        return ""
    raise DatabaseError(
        "no database is given: pass --dsn, or set BGJOB_DSN, DATABASE_URL, or libpq's variables, "
        "such as PGHOST and PGDATABASE"
    )


def connect(dsn: str) -> Connection:
    """Connect in autocommit; every wait for the server has a limit."""
    conn = Connection.connect(**options((dsn, {})), autocommit=True)
    conn.patience = PATIENCE
    return conn


@contextmanager
def opened(dsn: str) -> Iterator[Client]:
    """Yield a client.

    Raises:
        SchemaError: the tables are missing or of another version.
        psycopg.Error: the server cannot be reached; this fails sooner than a client's 30 s.

    """
    with connect(dsn) as conn:
        schema.check_version(run(conn, schema_comment()))
    with Client(dsn) as client:
        yield client


def name_of(parameters: ConnectionParameters) -> str:
    """Return the name of a database, with its host and port: shop@db1:5433; without a password."""
    if any(map(callable, parameters)):
        return "a database that a function names"  # for each connection anew
    given = options(parameters)
    name = given.get("dbname") or given.get("service") or os.environ.get("PGDATABASE") or "postgres"
    host = str(given.get("host") or os.environ.get("PGHOST") or "")
    port = str(given.get("port") or os.environ.get("PGPORT") or "")
    where = "" if host.startswith("/") else host  # the host of a socket is its folder
    if port and port != "5432":
        where += f":{port}"
    return f"{name}@{where}" if where else str(name)
