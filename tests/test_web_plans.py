"""A page looks at a few rows, whatever the tables hold and whatever is known of them."""

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
from support.statements import ask

from bgjob._sql import pages
from bgjob._sql.dead import DeadFilter
from bgjob._sql.statement import Statement

MANY = 40_000
CAP = 100
GROUPS = 4
TABLES = {"bgjob_job", "bgjob_dead_job"}

# Half of the jobs are due, in two priorities, and the others are delayed with a lower number.
FILL: LiteralString = """
    insert into bgjob_job (id, queue, type, priority, next_run_at)
    select 'job ' || n, 'q', 't', case when n %% 2 = 0 then -1 else n %% 4 end,
        now() + case when n %% 2 = 0 then interval '1 h' else n * interval '-1 s' end
    from generate_series(1, %(jobs)s) n
"""
# In each hour 360 jobs died, 90 of each group, a quarter of an hour at least from its ends.
FILL_DEAD: LiteralString = """
    insert into bgjob_dead_job (
        job_id, queue, type, attempt, priority, next_run_at, job_created_at, job_updated_at,
        fingerprint, moved_at, last_error
    )
    select 'dead ' || n, 'q', 't', 1, 0, now(), now(), now(), n %% 4,
        now() - (%(jobs)s - n) / 360 * interval '1 h'
            - interval '15 min' - (%(jobs)s - n) %% 360 * interval '5 s', 'why'
    from generate_series(1, %(jobs)s) n
"""


def fill(conn: psycopg.Connection, jobs: int) -> None:
    for statement in (FILL, FILL_DEAD):
        conn.execute(statement, {"jobs": jobs})


tables, conn = filled(fill, MANY, TABLES)


def check(conn: psycopg.Connection, statement: Statement[Any], most: int) -> Any:
    """Fail unless no step handles more rows; return what the statement returns."""
    enter_bounds(conn)
    explain = prepare(conn, "look", statement)
    for mode in PLAN_CACHE_MODES:
        for node in nodes(run(conn, explain, mode)):
            below = {node.get("Relation Name") for node in nodes(node)} & TABLES
            assert not below or handled(node) <= most, node
            assert node.get("Relation Name") not in TABLES or "Index" in node["Node Type"], node
    conn.execute("deallocate look")
    return statement.parse(conn.execute(cast(Any, statement.text), statement.params).fetchall())


def test_a_page_looks_at_few_rows(conn: psycopg.Connection) -> None:
    [dead] = check(conn, pages.dead_of(f"dead {MANY // 2}"), 2)
    assert dead.id == f"dead {MANY // 2}"
    lines = check(conn, pages.lines_of("q", cap=CAP), 3 * CAP)
    assert [(line.priority, line.due) for line in lines] == [(-1, 0), (1, CAP), (3, CAP)]
    number = ask(conn, pages.last_dead())
    latest = check(conn, pages.dead_list(None, queue=None, type_=None, error=None), 60)
    assert latest.found[0].number == number
    earlier = check(conn, pages.dead_list(number - 99, queue=None, type_=None, error=None), 60)
    assert earlier.found[0].number == number - 100
    [last, *_] = check(conn, pages.latest_of(1, limit=20), 20)
    assert last.number == number - 3
    group = check(conn, pages.count_dead(DeadFilter(fingerprint=1, upto=number), most=CAP), CAP)
    assert group == CAP
    # Each hour's first number is found by halves, in at most 17 looks at each of 24.
    hours = check(conn, pages.hours_of([*range(GROUPS), 99]), 24 * 90 * (GROUPS + 1))
    assert hours == {n: (90,) * 24 for n in range(GROUPS)} | {99: (0,) * 24}


def test_a_search_of_dead_jobs_looks_at_some_at_a_time(
    conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LOOKED", 1000)
    last = ask(conn, pages.last_dead())
    for queue, error in (("none", None), (None, "nowhere"), ("q", "nowhere")):
        step = check(conn, pages.dead_list(None, queue=queue, type_="t", error=error), 1001)
        assert (step.found, step.looked, step.last) == ([], 1000, last - 999)
    step = check(conn, pages.dead_list(None, queue="q", type_="t", error="why"), 1001)
    assert len(step.found) == pages.SHOWN + 1


def test_the_page_of_schedules_finds_their_last_jobs_by_id(conn: psycopg.Connection) -> None:
    conn.execute(
        """
        insert into bgjob_schedule (name, spec, queue, type, priority, last_job_id, next_run_at)
        values ('a', '', 'q', 't', 0, 'job 1', now() - interval '1 h'),
            ('b', '', 'q', 't', 0, 'dead 1', now() - interval '1 s'),
            ('c', '', 'q', 't', 0, 'gone', 'infinity'), ('d', '', 'q', 't', 0, null, null)
        """
    )
    found = check(conn, pages.schedules(late=60.0), 8)
    assert [(row.name, row.last_state, row.is_late) for row in found] == [
        ("a", "due", True),
        ("b", "dead", False),
        ("c", "absent", False),
        ("d", None, False),
    ]
