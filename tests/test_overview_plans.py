"""An overview, and the query for a scaler, look at a few rows of each queue, whatever is known.

The tests work in a database for each of the statistics: those of what the tables held before.
There they run the statement as the driver prepares it, with a plan for its parameters or with a
generic one.
"""

import re
from typing import Any, LiteralString, cast

import psycopg
import pytest
from support.documents import DOCS
from support.plans import (
    PLAN_CACHE_MODES,
    filled,
    handled,
    nodes,
    prepare,
    run,
)

from bgjob._sql.overviews import overview, plan_by_index

CAP = 100
QUEUES = 50
RUNNING = 300
"""They lie before the due jobs of their queue."""

MOST = 3 * (CAP + 2 * RUNNING) + 625
"""The most rows that a step handles: those of three large queues, and all of the small ones."""

TABLES = {"bgjob_job", "bgjob_dead_job", "bgjob_exclusive"}

# Half of the jobs are due in one queue, a quarter is delayed in another, and almost as many wait
# for two keys. Some queues have a few jobs of three priorities.
FILL: LiteralString = """
    insert into bgjob_job (
        id, queue, type, arg, priority, exclusive, waits, next_run_at, token, lease_until
    )
    select n,
        case
            when n %% 64 = 63 then 'tenant ' || n / 64 %% %(queues)s
            when n %% 8 < 4 then 'mail'
            when n %% 8 < 6 then 'later'
            else 'keyed'
        end,
        't', '{}', case when n %% 64 = 63 then n / 64 %% 3 else 0 end,
        case when n %% 64 < 63 and n %% 8 > 5 then 'key ' || n / 8 %% 2 end,
        n %% 64 < 63 and n %% 8 > 5,
        now() + case when n %% 8 in (4, 5) then 1 else -1 end * n * interval '1 s',
        case when n > %(jobs)s - 2 * %(running)s then 1 end,
        case when n > %(jobs)s - 2 * %(running)s then now() + interval '1 h' end
    from generate_series(1, %(jobs)s) n
"""
FILL_KEYS: LiteralString = """
    insert into bgjob_exclusive (key)
    select 'key ' || n from generate_series(0, %(jobs)s / 10) n
"""
FILL_DEAD: LiteralString = """
    insert into bgjob_dead_job (
        job_id, queue, type, attempt, priority, next_run_at, job_created_at, job_updated_at
    )
    select n, 'mail', 't', 1, 0, now(), now(), now() from generate_series(1, %(jobs)s) n
"""

MANY = 40_000


def fill(conn: psycopg.Connection, jobs: int) -> None:
    for statement in (FILL, FILL_KEYS, FILL_DEAD):
        conn.execute(statement, {"jobs": jobs, "queues": QUEUES, "running": min(RUNNING, jobs)})


tables, conn = filled(fill, MANY, TABLES)


def check(plan: dict[str, Any]) -> None:
    """Fail unless every look is an index scan in order that ends at the cap."""
    for node in nodes(plan):
        below = {node.get("Relation Name") for node in nodes(node)} & TABLES
        kind = node["Node Type"]
        assert not below or handled(node) <= MOST, node
        assert node.get("Relation Name") not in TABLES or "Index" in kind, node
        assert "Bitmap" not in kind, node


ANALYZED = pytest.mark.parametrize("tables", ["of ten jobs", "of these jobs"], indirect=True)

QUEUES_OF_INTEREST = (None, "mail", "later", "keyed")


def test_an_overview_looks_at_no_more_rows_of_a_queue_than_its_cap(
    conn: psycopg.Connection,
) -> None:
    with conn.transaction(force_rollback=True):
        conn.execute(cast(Any, plan_by_index().text))
        for queue in QUEUES_OF_INTEREST:
            explain = prepare(conn, f"overview of {queue}", overview(queue, cap=CAP))
            for mode in PLAN_CACHE_MODES:
                check(run(conn, explain, mode))


@ANALYZED
def test_nor_in_the_session_of_a_caller_once_the_tables_have_been_analyzed(
    conn: psycopg.Connection,
) -> None:
    for queue in QUEUES_OF_INTEREST:
        explain = prepare(conn, f"overview of {queue}", overview(queue, cap=CAP))
        for mode in PLAN_CACHE_MODES:
            check(run(conn, explain, mode))


@ANALYZED
def test_the_scalers_query_looks_at_no_more_rows_than_its_limit(conn: psycopg.Connection) -> None:
    [query] = re.findall(r"query: >\n(.*?)```", (DOCS / "operations.md").read_text(), re.DOTALL)
    query = query.replace("limit 1000", f"limit {CAP}")
    explain = f"explain (analyze, buffers, timing off, format json) {query}"
    [[[plan]]] = conn.execute(explain.encode()).fetchall()
    check(plan["Plan"])
