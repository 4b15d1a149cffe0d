"""Plans: statements prepared as the driver does, and the rows and pages they look at."""

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import psycopg
import pytest
from psycopg import ClientCursor
from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer
from psycopg.pq import ExecStatus

from bgjob._sql.server import bounds
from bgjob._sql.statement import Statement
from support.databases import Databases


def prepare(conn: psycopg.Connection, name: str, statement: Statement[Any]) -> str:
    """Prepare a statement as the driver does, and return the SQL that explains it."""
    assert statement.params is not None
    query = PostgresQuery(Transformer(conn))
    query.convert(statement.text, statement.params)
    result = conn.pgconn.prepare(name.encode(), query.query, query.types)
    assert result.status == ExecStatus.COMMAND_OK, result.error_message
    params = dict.fromkeys(re.findall(r"%\((\w+)\)[sbt]", cast(str, statement.text)))
    values = ClientCursor(conn).mogrify(
        cast(Any, ", ".join(f"%({param})s" for param in params)), statement.params
    )
    return f'explain (analyze, buffers, timing off, format json) execute "{name}" ({values})'


def run(conn: psycopg.Connection, explain: str, plan_cache_mode: str) -> dict[str, Any]:
    """Run the SQL of `prepare`, undo it, and return the plan with its actual rows and pages."""
    with conn.transaction(force_rollback=True):
        conn.execute("select set_config('plan_cache_mode', %s, true)", [plan_cache_mode])
        [[[plan]]] = conn.execute(cast(Any, explain)).fetchall()
    return cast(dict[str, Any], plan["Plan"])


def apply(conn: psycopg.Connection, settings: Statement[None]) -> None:
    """Apply the settings of a session that matter to the planner.

    Those that limit how long a statement may take are left out, as the host of a test may be slow.
    So is the one that forbids to write: a test fills tables.
    """
    params = settings.params
    assert params is not None
    names, values = cast(list[str], params["names"]), cast(list[str], params["values"])
    pairs = [
        (name, value)
        for name, value in zip(names, values, strict=True)
        if not name.endswith("_timeout") and name != "transaction_read_only"
    ]
    mine = {"names": [name for name, _ in pairs], "values": [value for _, value in pairs]}
    conn.execute(cast(Any, settings.text), {**params, **mine})


def enter_bounds(conn: psycopg.Connection) -> None:
    """Apply the settings of a read-only look, as `apply` does, in this transaction."""
    apply(conn, bounds())


STATISTICS = ["none", "of empty tables", "of drained tables", "of ten jobs", "of these jobs"]
"""What the server may know of tables that `fill_with_statistics` fills."""


def fill_with_statistics(
    conn: psycopg.Connection,
    statistics: str,
    fill: Callable[[psycopg.Connection, int], None],
    jobs: int,
    tables: Collection[str],
) -> None:
    """Fill tables with jobs, and leave what the server knows of them as it was before."""
    for table in tables:
        conn.execute(f"alter table {table} set (autovacuum_enabled = off)".encode())
    if statistics in ("of drained tables", "of ten jobs"):
        fill(conn, 10 if statistics == "of ten jobs" else jobs)
    if statistics == "of drained tables":
        for table in tables:
            conn.execute(f"delete from {table}".encode())
    if statistics not in ("none", "of these jobs"):
        conn.execute("analyze")
    if statistics == "of ten jobs":
        conn.execute(f"truncate {', '.join(tables)}".encode())
    fill(conn, jobs)
    if statistics == "of these jobs":
        conn.execute("analyze")


def filled(
    fill: Callable[[psycopg.Connection, int], None], jobs: int, tables: Collection[str]
) -> tuple[Any, Any]:
    """Make the fixtures `tables` and `conn` of a module: connections to such tables.

    Filling takes longer than all plans. So the tests of a module share a database for each of
    STATISTICS, and `conn` rolls back in the end what a test has done, and forgets what it prepared.
    """

    @pytest.fixture(scope="module", params=STATISTICS)
    def shared(
        request: pytest.FixtureRequest, databases: Databases, template: str
    ) -> Iterator[psycopg.Connection]:
        with (
            databases.make(template=template) as (_, dsn),
            psycopg.connect(dsn, autocommit=True) as conn,
        ):
            fill_with_statistics(conn, request.param, fill, jobs, tables)
            yield conn

    @pytest.fixture
    def undone(tables: psycopg.Connection) -> Iterator[psycopg.Connection]:
        with tables.transaction(force_rollback=True):
            yield tables
        tables.execute("deallocate all")

    return shared, undone


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every step of a plan."""
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


def handled(node: dict[str, Any]) -> float:
    """Count the rows that a step returned or dropped."""
    if node["Node Type"] == "Bitmap Index Scan":  # counts dead rows too; the step above does not
        return 0
    dropped = sum(rows for key, rows in node.items() if key.startswith("Rows Removed"))
    return cast(float, (node["Actual Rows"] + dropped) * node["Actual Loops"])


def buffers(plan: dict[str, Any]) -> int:
    """Count the pages that were looked at to find the rows.

    What writing them took is left out: it depends on the room that undone runs left in the
    pages, which another test's transaction can keep from being cleaned up.
    """

    def pages(node: dict[str, Any]) -> int:
        return cast(int, node["Shared Hit Blocks"] + node["Shared Read Blocks"])

    written = [node for node in nodes(plan) if node["Node Type"] == "ModifyTable"]
    read = [n for node in written for n in node["Plans"] if n["Parent Relationship"] == "Outer"]
    return pages(plan) - sum(map(pages, written)) + sum(map(pages, read))


PLAN_CACHE_MODES = ["force_custom_plan", "force_generic_plan"]
