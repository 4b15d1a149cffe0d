"""An explanation looks at a few rows, whatever the tables hold and whatever is known of them.

The tests work in a database for each of the statistics: those of what the tables held before.
There they run the statements as the driver prepares them, with a plan for their parameters or with
a generic one, within the bounds that an explanation sets.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, cast

import psycopg
import pytest
from support.plans import (
    PLAN_CACHE_MODES,
    enter_bounds,
    filled,
    handled,
    nodes,
    prepare,
    run,
)

from bgjob._sql import looks
from bgjob._sql.statement import Statement

CAP = 100
MANY = 40_000
RUNNING = 300
"""They lie before the due jobs of their queue."""

TABLES = {"bgjob_job", "bgjob_dead_job", "bgjob_exclusive"}

# Of queue q half of the jobs are due, in two priorities, and a quarter is delayed with a lower
# priority number. The others, of queue keyed, wait for one key.
FILL: LiteralString = """
    insert into bgjob_job (
        id, queue, type, priority, exclusive, waits, next_run_at, token, lease_until,
        group_id
    )
    select 'job ' || n, case when n %% 4 = 3 then 'keyed' else 'q' end, 't',
        case n %% 4 when 0 then 0 when 1 then 1 when 2 then -1 else 0 end,
        case when n %% 4 = 3 or n = %(jobs)s then 'key' end, n %% 4 = 3,
        now() + case when n %% 4 = 2 then 1 else -1 end * n * interval '1 s',
        case when n > %(jobs)s - %(running)s and n %% 4 < 3 then 1 end,
        case when n > %(jobs)s - %(running)s and n %% 4 < 3 then now() + interval '1 h' end,
        case when n %% 10 = 0 then 'group' end
    from generate_series(1, %(jobs)s) n
"""
FILL_KEYS: LiteralString = """
    insert into bgjob_exclusive
    select case n when 0 then 'key' else 'key ' || n end, '{1}', queue, next_run_at, id,
        next_run_at, id
    from generate_series(0, %(jobs)s / 10) n
    left join bgjob_job on id = 'job ' || %(jobs)s
"""
FILL_DEAD: LiteralString = """
    insert into bgjob_dead_job (
        job_id, queue, type, attempt, priority, next_run_at, job_created_at, job_updated_at
    )
    select 'dead ' || n, 'q', 't', 1, 0, now(), now(), now() from generate_series(1, %(jobs)s) n
"""


def fill(conn: psycopg.Connection, jobs: int) -> None:
    for statement in (FILL, FILL_KEYS, FILL_DEAD):
        conn.execute(statement, {"jobs": jobs, "running": min(RUNNING, jobs)})


def check(conn: psycopg.Connection, statement: Statement[Any], most: int) -> list[Any]:
    """Fail unless no step handles more rows; return what the statement returns."""
    enter_bounds(conn)
    explain = prepare(conn, "look", statement)
    for mode in PLAN_CACHE_MODES:
        for node in nodes(run(conn, explain, mode)):
            below = {node.get("Relation Name") for node in nodes(node)} & TABLES
            assert not below or handled(node) <= most, node
            assert node.get("Relation Name") not in TABLES or "Index" in node["Node Type"], node
    conn.execute("deallocate look")
    return conn.execute(cast(Any, statement.text), statement.params).fetchall()


tables, conn = filled(fill, MANY, TABLES)


def test_a_job_alive_or_dead_is_found_by_its_id(conn: psycopg.Connection) -> None:
    for id_ in (f"job {MANY // 2}", f"dead {MANY // 2}", "none"):
        found = looks.find(id_).parse(check(conn, looks.find(id_), 4))
        assert (found.job is not None, bool(found.dead)) == (
            id_.startswith("job"),
            id_.startswith("dead"),
        )


def test_the_jobs_before_one_are_counted_up_to_a_cap(conn: psycopg.Connection) -> None:
    now = datetime.now(UTC)
    for priority, at in ((1, now), (1, now - timedelta(days=1)), (0, now), (2, now)):
        statement = looks.ahead("q", priority, at, cap=CAP)
        check(conn, statement, 2 * (CAP + RUNNING))
    assert check(conn, statement, 2 * (CAP + RUNNING)) == [(CAP, 0)]
    statement = looks.ahead("q", 1, now, cap=CAP)
    assert check(conn, statement, 2 * (CAP + RUNNING)) == [(CAP, CAP)]


def test_the_jobs_before_one_at_a_key_are_counted_up_to_a_cap(conn: psycopg.Connection) -> None:
    found = looks.find("job 3").parse(
        conn.execute(cast(Any, looks.find("job 3").text), {"id": "job 3"}).fetchall()
    )
    assert found.job is not None
    statement = looks.key(found.job, cap=CAP)
    key = statement.parse(check(conn, statement, CAP + 4))
    assert key.before == CAP
    assert [holder.id for holder in key.holders] == [f"job {MANY}"]


def test_the_live_jobs_of_a_group_are_counted_up_to_a_cap(conn: psycopg.Connection) -> None:
    statement = looks.members("group", cap=CAP)
    assert statement.parse(check(conn, statement, CAP))[0] == CAP
    assert looks.members("none").parse(check(conn, looks.members("none"), CAP)) == (0, 0, None)


@pytest.mark.parametrize(("queue", "id_"), [("q", MANY - RUNNING), ("keyed", MANY - 1)])
def test_the_oldest_due_job_of_a_queue_is_found_behind_the_running_ones_only(
    conn: psycopg.Connection, queue: str, id_: int
) -> None:
    statement = looks.oldest(queue)
    # The first 1,000 keys, a look at each, and the running jobs of each priority.
    [(_, found, _, _)] = check(conn, statement, 2 * 1000 + 4 + RUNNING)
    assert found == f"job {id_}"
