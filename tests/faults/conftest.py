"""Worlds: each fault test has one, which the oracle checks afterwards."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from conftest import has_failed
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support.databases import Databases

from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql
from faults.app import LEDGER
from faults.proxy import Proxy
from faults.world import World

HERE = Path(__file__).parent

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that the oracle would not check."""
    for item in items:
        worlds = {"world", "hurt"} & set(getattr(item, "fixturenames", ()))
        if HERE in item.path.parents and not worlds:
            raise pytest.UsageError(f"{item.nodeid} takes neither the world nor the hurt fixture")


@pytest.fixture(scope="session")
def world_template(databases: Databases) -> Iterator[str]:
    """The name of a database that holds the schema and the ledger, without rows."""
    with databases.make_template(init_sql().encode(), LEDGER.encode()) as name:
        yield name


@pytest.fixture
def dsn(request: pytest.FixtureRequest, databases: Databases, world_template: str) -> Iterator[str]:
    """The DSN of a database of the test's own, with the schema and the ledger."""
    with databases.lend(world_template, may_keep=lambda: not has_failed(request)) as dsn:
        yield dsn


@pytest.fixture
def world(request: pytest.FixtureRequest, dsn: str) -> Iterator[World]:
    """A world on the run's shared server; a module's LEASE is the lease of its workers."""
    world = World(dsn, lease=getattr(request.module, "LEASE", 1.0))
    yield world
    world.close(judge=not has_failed(request))


@pytest.fixture
def hurt(request: pytest.FixtureRequest, server: EmbeddedServer) -> Iterator[World]:
    """A world on a server that the test may hurt; it runs again in the end."""
    name = f"hurt_{next(_numbers)}"
    dsn = make_conninfo(server.dsn, dbname=name)
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    with psycopg.connect(dsn) as conn:
        conn.execute(init_sql().encode())
    world = World(dsn)
    yield world
    server.start()
    world.close(judge=not has_failed(request))
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    with Proxy(dsn) as proxy:
        yield proxy


@pytest.fixture
def other_proxy(dsn: str) -> Iterator[Proxy]:
    with Proxy(dsn) as proxy:
        yield proxy
