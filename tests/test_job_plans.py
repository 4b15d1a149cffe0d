"""A page of live jobs, and an action on some of them, look at a few rows of a large table.

The tests work in a database for each of the statistics: those of what the tables held before.
There they run the statements as the driver prepares them, with a plan for their parameters or with
a generic one: pages within the bounds that `client.jobs` sets, actions in a client's
session as it is.
"""

from datetime import UTC, datetime
from typing import Any, LiteralString, cast

import psycopg
import pytest
from support.database import count
from support.plans import (
    PLAN_CACHE_MODES,
    enter_bounds,
    filled,
    handled,
    nodes,
    prepare,
    run,
)

from bgjob._sql import job_pages, jobs, looks, steering
from bgjob._sql.job_pages import Blocks, Ids, Keyed, Line, Looked, Waiting
from bgjob._sql.jobs import JobFilter
from bgjob._sql.key_rows import lock_keys
from bgjob._sql.keys import release
from bgjob._sql.session import WORKER_SETTINGS
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob.job import Job

MANY = 40_000
PAGE = 50
ROWS = 500
"""The most rows that a page looks at here."""

TABLES = {"bgjob_job", "bgjob_dead_job", "bgjob_exclusive"}

# Of queue q a third is due at one time, in two priorities, and a third delayed with a lower
# priority number; a hundred run. The others, of queue keyed, wait for ten keys.
FILL: LiteralString = """
    insert into bgjob_job (
        id, queue, type, priority, exclusive, waits, next_run_at, token, lease_until
    )
    select 'job ' || n, case n %% 3 when 2 then 'keyed' else 'q' end, 't',
        case n %% 3 when 1 then -1 else n %% 2 end,
        case n %% 3 when 2 then 'key ' || n %% 10 end, n %% 3 = 2,
        case when n %% 3 = 1 then now() + n * interval '1 s'
            else date_trunc('hour', now()) - interval '1 d' end,
        case when n %% 3 = 0 and n <= 300 then n end,
        case when n %% 3 = 0 and n <= 300 then now() + interval '1 h' end
    from generate_series(1, %(jobs)s) n
"""
FILL_KEYS: LiteralString = """
    insert into bgjob_exclusive (key) select 'key ' || n from generate_series(0, %(jobs)s / 10) n
"""
FILL_DEAD: LiteralString = """
    insert into bgjob_dead_job (
        job_id, queue, type, attempt, priority, next_run_at, job_created_at, job_updated_at, token
    )
    select 'dead ' || n, 'q', 't', 1, 0, now(), now(), now(), n from generate_series(1, %(jobs)s) n
"""

Found = tuple[Statement[Looked], int]
"""A page, and how many jobs it must find."""


def fill(conn: psycopg.Connection, jobs: int) -> None:
    for statement in (FILL, FILL_KEYS, FILL_DEAD):
        conn.execute(statement, {"jobs": jobs})


tables, conn = filled(fill, MANY, TABLES)


def check(
    conn: psycopg.Connection, statement: Statement[Any], most: int, *scans: str
) -> list[tuple[Any, ...]]:
    """Fail unless each step handles few rows, found in one of these ways; return the answer."""
    explain = prepare(conn, "look", statement)
    for mode in PLAN_CACHE_MODES:
        for node in nodes(run(conn, explain, mode)):
            if node["Node Type"] == "ModifyTable":
                continue
            assert handled(node) <= most, (statement.params, node)
            if node.get("Relation Name") in TABLES:
                kind = node["Node Type"]
                assert "Index" in kind or "Bitmap" in kind or kind in scans, (
                    statement.params,
                    node,
                )
    conn.execute("deallocate look")
    with conn.transaction(force_rollback=True):
        return conn.execute(cast(Any, statement.text), statement.params).fetchall()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_pages, "MOST_ROWS", ROWS)


@pytest.mark.usefixtures("small")
def test_a_page_looks_at_no_more_rows_than_it_may(conn: psycopg.Connection) -> None:
    enter_bounds(conn)

    def page(way: job_pages.Way, limit: int = PAGE, **filters: Any) -> Statement[Looked]:
        return way.look(JobFilter(**filters), limit)

    soon = datetime.now(UTC).isoformat()
    tied = (datetime.now(UTC).replace(minute=0, second=0, microsecond=0)).isoformat()
    found: list[Found] = [
        (page(Ids()), PAGE),
        (page(Ids("job 5")), PAGE),
        (page(Ids(), prefix="job 39"), PAGE),
        (page(Ids(), prefix="job 39", type="none"), 0),
        (page(Line(), queue="q"), PAGE),
        (page(Line(), queue="q", state="due"), PAGE),
        (page(Line(), queue="q", state="running"), PAGE),
        (page(Line(), queue="q", state="delayed"), PAGE),
        (page(Line(), queue="q", state="due", error="none"), 0),
        (page(Line(-1, soon), queue="q", state="delayed"), PAGE),
        (page(Line(0, tied, 200), queue="q"), PAGE),
        (page(Line(), queue="none"), 0),
        (page(Waiting(), queue="keyed"), PAGE),
        (page(Waiting("key 5", tied, "job 4"), queue="keyed"), PAGE),
        (page(Keyed(), exclusive="key 5"), PAGE),
        (page(Keyed(True, "keyed", tied, "job 4"), exclusive="key 5", error="none"), 0),
    ]
    for statement, expected in found:
        looked = statement.parse(check(conn, statement, 4 * ROWS, "Tid Scan"))
        assert len(looked.jobs) == expected, statement.params
        assert looked.rows <= ROWS
    for id_ in ("job 5", "none"):
        check(conn, jobs.get(id_), 1)
    check(conn, jobs.listed(["job 5", "job 7", "none"], JobFilter(type="t")), 3)
    made = {(number, datetime.now(UTC)) for number in range(PAGE)}
    check(conn, looks.claimants(made), PAGE)
    # Pages of the table: rows of four of them, whatever the filter.
    for way in (Blocks(), Blocks(20, 3)):
        statement = way.look(JobFilter(type="none"), PAGE, 4)
        check(conn, statement, 4 * 100, "Tid Range Scan", "Index Scan")


def test_an_action_looks_at_the_jobs_that_it_is_given_and_no_others(
    conn: psycopg.Connection,
) -> None:
    ids = [f"job {n}" for n in range(0, MANY, MANY // PAGE)] + ["none", "dead 7"]
    most = 3 * len(ids)
    where = JobFilter(queue="q", state="due")
    for statement in (
        steering.cancel(ids, JobFilter(), by=None, reason="why"),
        steering.cancel(ids, where, by=None, reason="why"),
        steering.abandon(ids, JobFilter(), by=None, reason="why"),
        steering.run_now(ids, JobFilter()),
        steering.set_priority(ids, where, 3),
    ):
        answers = statement.parse(check(conn, statement, most))
        assert len(answers) == len(ids)
    held = [Claimed(Job._make([id_, *[None] * (len(Job._fields) - 1)]), 7) for id_ in ids]
    for name, value in WORKER_SETTINGS.items():  # a worker asks
        if name.startswith("enable_"):
            conn.execute("select set_config(%s, %s, true)", [name, value], prepare=False)
    asked = steering.were_cancelled(held)
    assert asked.parse(check(conn, asked, most)) == {("dead 7", 7)}


def test_the_keys_of_cancelled_jobs_are_passed_on_without_a_look_at_others(
    conn: psycopg.Connection,
) -> None:
    keys = [f"key {n}" for n in range(5)]
    check(conn, lock_keys(keys), 20)
    check(conn, release("keyed", keys), 200, "Tid Scan")
    waiting = count(conn, "bgjob_job where waits")
    woken = conn.execute(cast(Any, release("keyed", keys).text), release("keyed", keys).params)
    assert len(woken.fetchall()) == 2  # one for each priority
    assert count(conn, "bgjob_job where waits") == waiting - 5
