"""Worlds: each fault test has one, which the oracle checks afterwards."""

import itertools
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql
from faults.world import World

failed_key = pytest.StashKey[bool]()

HERE = Path(__file__).parent

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that the oracle would not check."""
    for item in items:
        worlds = {"world", "hurt"} & set(getattr(item, "fixturenames", ()))
        if HERE in item.path.parents and not worlds:
            raise pytest.UsageError(f"{item.nodeid} takes neither the world nor the hurt fixture")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember which test has failed: the oracle does not check it."""
    report = yield
    if report.failed:
        item.stash[failed_key] = True
    return report


def _failed(request: pytest.FixtureRequest) -> bool:
    node: Any = request.node
    return bool(node.stash.get(failed_key, False))


@pytest.fixture
def world(request: pytest.FixtureRequest, dsn: str) -> Iterator[World]:
    """A world on the run's shared server; a module's LEASE is the lease of its workers."""
    world = World(dsn, lease=getattr(request.module, "LEASE", 1.0))
    yield world
    world.close(judge=not _failed(request))


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
    world.close(judge=not _failed(request))
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
