"""Statements, sent to a connection as the library sends them."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import psycopg
import pytest

from bgjob._sql.session import WORKER_SETTINGS, session
from bgjob._sql.statement import Statement

T = TypeVar("T")


LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def ask(conn: psycopg.Connection, statement: Statement[T]) -> T:
    cursor = conn.execute(cast(Any, statement.text), statement.params, binary=True)
    return statement.parse(cursor.fetchall() if cursor.description else [])


@pytest.fixture
def worker(dsn: str) -> Iterator[psycopg.Connection]:
    """A connection with the session of a worker."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        ask(conn, session(conn.info.backend_pid, WORKER_SETTINGS))
        yield conn
