"""The test database of pytest-django, for the fixtures of bgjob.ext.pytest_plugin.

A test that uses it has its jobs there, beside the rows of the program that it tests. By default
pytest-django runs a test in a transaction that it rolls back, and no other connection sees the
jobs: these tests get Django's own. The others commit, and their jobs are deleted here: Django
only empties the tables of its models.
"""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from bgjob.schema import init_sql

_TABLES = """
    select oid::regclass::text from pg_class
    where relname like 'bgjob\\_%' and relkind in ('r', 'p') and not relispartition
        and pg_table_is_visible(oid)
"""


def connection_of(request: pytest.FixtureRequest) -> Any:
    """Return Django's connection `default`, if the test uses it and it is to PostgreSQL.

    Before, pytest-django has set up the test's database, and bgjob's tables are there. Otherwise
    return None.
    """
    if not _is_used(request):
        return None
    from django.db import connection  # noqa: PLC0415 (only where it is used)

    if connection.vendor != "postgresql":
        return None
    with connection.cursor() as cursor:
        cursor.execute("select to_regclass('bgjob_job') is null")
        [is_missing] = cursor.fetchone()
    if is_missing:
        with psycopg.connect(_dsn()) as conn:
            conn.execute(init_sql().encode())
    return connection


@contextmanager
def emptied() -> Iterator[str]:
    """Yield the DSN of Django's test database, without jobs before and afterwards."""
    dsn = _dsn()
    _delete_jobs(dsn)
    try:
        yield dsn
    finally:
        _delete_jobs(dsn)


def _is_used(request: pytest.FixtureRequest) -> bool:
    django_conf = sys.modules.get("django.conf")
    if (
        not request.config.pluginmanager.hasplugin("django")
        or django_conf is None
        or not django_conf.settings.configured
    ):
        return False
    from django.test import SimpleTestCase  # noqa: PLC0415 (only where it is used)

    if request.cls is not None and issubclass(request.cls, SimpleTestCase):
        return _has_default(request.cls.databases)
    marker = request.node.get_closest_marker("django_db")
    if marker is not None:
        is_used = _has_default(marker.kwargs.get("databases"))
    else:
        is_used = not {"db", "transactional_db", "live_server"}.isdisjoint(request.fixturenames)
    if is_used:
        request.getfixturevalue("db")  # also sets up the others, if the test asks for them
    return is_used


def _has_default(databases: Collection[str] | None) -> bool:
    return databases is None or databases == "__all__" or "default" in databases


def _dsn() -> str:
    from bgjob.ext.django import dsn  # noqa: PLC0415 (only where it is used)

    return dsn()


def _delete_jobs(dsn: str) -> None:
    # Not truncate: it would wait for every transaction that has read the tables.
    with psycopg.connect(dsn) as conn:
        for (table,) in conn.execute(_TABLES).fetchall():
            conn.execute(sql.SQL("delete from {}").format(sql.SQL(table)))
