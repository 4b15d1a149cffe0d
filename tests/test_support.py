"""Tests import helpers from tests/support/, not from one another, and have databases of their own."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import psycopg
import pytest
from support.combinations import fewest
from support.databases import Databases

TESTS = Path(__file__).parent
MODULES = [*TESTS.glob("*.py"), *TESTS.glob("support/*.py"), *TESTS.glob("faults/*.py")]


IMPORT = re.compile(r"^ *(?:from ([\w.]+) )?import (\([^)]*\)|.*)", re.MULTILINE)


def imported(module: Path) -> set[str]:
    """The last parts of the names of all modules that may be imported, and other words."""
    found = IMPORT.findall(module.read_text("utf-8"))
    return {
        word for name, names in found for word in re.findall(r"\w+(?![\w.])", f"{name} {names}")
    }


def test_no_test_module_imports_another() -> None:
    tests = {path.stem for path in MODULES if path.stem.startswith("test_")}
    assert len(tests) > 40
    found = {str(path.relative_to(TESTS)): imported(path) & tests for path in MODULES}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_helper_is_defined_twice() -> None:
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for path in MODULES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
                node.name.startswith("test_")
            ):
                body = node.body[ast.get_docstring(node) is not None :]
                if len(body) > 1 or any(isinstance(part, ast.Call) for part in ast.walk(body[0])):
                    text = "\n".join(map(ast.unparse, body))
                    places[text][str(path.relative_to(TESTS))] = node.name
    assert [found for found in places.values() if len(found) > 1] == []


def test_few_combinations_have_each_value_of_each_parameter() -> None:
    whole = {
        (host, style, n): {("host", host), ("style", style), ("n", n)}
        for host in ("Worker", "AsyncWorker")
        for style in ("plain", "coroutine")
        for n in range(5)
    }
    some = fewest(whole)
    assert {n for _, _, n in some} == set(range(5)) and len(some) == 5
    for values in zip(*some, strict=True):
        assert sorted(map(values.count, set(values))) in ([1] * 5, [2, 3])


def lent(databases: Databases, template: str, *statements: str) -> tuple[str, str]:
    """Run statements in a lent database; return its DSN, and that of the next one."""
    with databases.lend(template, may_keep=lambda: True) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            for statement in statements:
                conn.execute(statement.replace("DATABASE", conn.info.dbname).encode())
    with databases.lend(template, may_keep=lambda: True) as other:
        return dsn, other


def test_a_database_is_kept_for_the_next_test_without_its_rows_and_sessions(
    databases: Databases, template: str
) -> None:
    insert = "insert into bgjob_job (id, queue, type) values ('a', 'q', 't')"
    with databases.lend(template, may_keep=lambda: True) as dsn:
        left = psycopg.connect(dsn, autocommit=True)
        left.execute(insert.encode())
        left.execute(
            "insert into bgjob_dead_job (job_id, queue, type, attempt, priority, next_run_at, "
            "job_created_at, job_updated_at) values ('a', 'q', 't', 1, 0, now(), now(), now())"
        )
    with databases.lend(template, may_keep=lambda: True) as other:
        assert other == dsn
        with psycopg.connect(other) as conn:
            for table in ("bgjob_job", "bgjob_dead_job"):
                assert conn.execute(f"select from {table}".encode()).rowcount == 0
            dead = "select last_value, is_called from bgjob_dead_job_id_seq"
            assert conn.execute(dead.encode()).fetchall() == [(1, False)]
    with pytest.raises(psycopg.OperationalError):
        left.execute("select 1")


@pytest.mark.parametrize(
    "change",
    [
        "create table more ()",
        "create function f() returns int language sql as 'select 1'",
        "create schema more",
        "alter table bgjob_job add check (id <> 'b')",
        "alter table bgjob_job set (autovacuum_enabled = off)",
        "alter table bgjob_job rename column deaths to lives",
        "alter table bgjob_job alter id type text",
        "comment on table bgjob_job is 'ours'",
        "comment on table bgjob_job is null",
        "grant select on bgjob_job to public",
        "revoke all on schema public from public",
        "drop index bgjob_job_due",
        "insert into bgjob_job (id, queue, type) values ('a', 'q', 't'); analyze bgjob_job",
        "alter database \"DATABASE\" set timezone = 'UTC'",
        'alter role postgres in database "DATABASE" set jit = off',
        'revoke connect on database "DATABASE" from public',
    ],
)
def test_a_database_that_a_test_has_changed_is_not_kept(
    databases: Databases, template: str, change: str
) -> None:
    dsn, other = lent(databases, template, change)
    assert dsn != other


def test_a_database_whose_test_has_failed_is_not_kept(databases: Databases, template: str) -> None:
    with databases.lend(template, may_keep=lambda: False) as dsn:
        pass
    with databases.lend(template, may_keep=lambda: True) as other:
        assert dsn != other
