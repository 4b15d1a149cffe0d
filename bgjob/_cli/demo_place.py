"""Where a demo works: a schema of its own, on the user's server or on a private one."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import LiteralString, NoReturn

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bgjob import schema
from bgjob._cli.progress import say
from bgjob.errors import BgjobError

_CONNECT_TIMEOUT = 10


class DemoError(BgjobError):
    """The demo cannot run here, or made no progress."""


@contextmanager
def place(dsn: str | None, *statements: LiteralString) -> Iterator[str]:
    """Yield a connection string whose search_path is a new schema with bgjob's tables.

    At the end the schema is dropped, or the private server ends.

    Args:
        dsn: the database; None for a private server.
        statements: what else is made there.

    Raises:
        DemoError: the schema could not be dropped.
        EmbeddedServerError: the private server is not installed, or did not start.
        psycopg.Error: the server cannot be reached, or refuses.

    """
    if dsn is not None:
        with _own_schema(dsn, statements) as inside:
            yield inside
        return
    from bgjob.ext.embedded import EmbeddedServer  # noqa: PLC0415 (an extra)

    say("starting a private PostgreSQL server")
    with EmbeddedServer() as server, _own_schema(server.dsn, statements) as inside:
        yield inside


@contextmanager
def _own_schema(dsn: str, statements: Iterable[LiteralString]) -> Iterator[str]:
    params = conninfo_to_dict(dsn)
    dsn = make_conninfo(dsn, connect_timeout=params.get("connect_timeout", _CONNECT_TIMEOUT))
    options = params.get("options", os.environ.get("PGOPTIONS", ""))
    name = f"bgjob_demo_{token_hex(8)}"
    inside = make_conninfo(dsn, options=f"{options} -c search_path={name}".strip())
    schema_name = sql.Identifier(name)
    conn = psycopg.connect(inside, autocommit=True)
    try:
        with conn:
            conn.execute(sql.SQL("create schema {}").format(schema_name))
            conn.execute(schema.init_sql().encode())
            for statement in statements:
                conn.execute(statement)
        yield inside
    finally:
        try:
            with psycopg.connect(dsn, autocommit=True) as last:
                last.execute("set lock_timeout = '10s'")
                last.execute(sql.SQL("drop schema if exists {} cascade").format(schema_name))
        except psycopg.Error as error:
            raise DemoError(
                f"schema {name} may be left behind: {error}; remedy: drop schema {name} cascade"
            ) from error


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt once; yield a function to ignore both."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def ignore() -> None:
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)

    def interrupt(*_: object) -> NoReturn:
        ignore()
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, interrupt) for signum in signals}
    try:
        yield ignore
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
