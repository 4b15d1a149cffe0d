"""Questions to the database that workers and clients share."""

from datetime import datetime
from typing import Any, LiteralString

import psycopg

from bgjob._sql.notices import LOCK_CLASS
from support.waiting import eventually


def rows(conn: psycopg.Connection, query: LiteralString, *params: object) -> list[tuple[Any, ...]]:
    return conn.execute(query, params).fetchall()


def row(conn: psycopg.Connection, query: LiteralString, *params: object) -> tuple[Any, ...]:
    [only] = rows(conn, query, *params)
    return only


def count(conn: psycopg.Connection, table: LiteralString = "bgjob_job") -> int:
    return int(row(conn, f"select count(*) from {table}")[0])


def all_done(conn: psycopg.Connection) -> bool:
    return eventually(lambda: count(conn) == 0)


def clock(conn: psycopg.Connection) -> datetime:
    now = row(conn, "select clock_timestamp()")[0]
    assert isinstance(now, datetime)
    return now


def sleeper(conn: psycopg.Connection) -> int | None:
    """The session of the worker that sleeps, and asks enqueues to notify, if any does."""
    found = rows(
        conn,
        "select pid from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' "
        f"and granted and classid = {LOCK_CLASS} and database = "
        "(select oid from pg_database where datname = current_database())",
    )
    return found[0][0] if found else None


def terminate_workers(conn: psycopg.Connection) -> int:
    """Kill the connections of the workers; their number."""
    return len(
        rows(
            conn,
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and application_name = 'bgjob'",
        )
    )
