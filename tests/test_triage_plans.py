"""Dead jobs are found and grouped by an index, whatever is known of their table."""

from typing import Any, LiteralString, cast

import psycopg
import pytest
from support.plans import (
    PLAN_CACHE_MODES,
    filled,
    handled,
    nodes,
    prepare,
    run,
)

from bgjob._sql import dead, triage
from bgjob._sql.dead import DeadFilter
from bgjob._sql.statement import Statement

MANY = 10_000
GROUPS = 10
RARE = 77
"""A group of one job, which died first."""

FILL: LiteralString = """
    insert into bgjob_dead_job (
        job_id, queue, type, attempt, last_error, priority, next_run_at, job_created_at,
        job_updated_at, fingerprint
    )
    select 'dead ' || n, 'q' || n %% 3, 't', 1, 'ValueError: ' || n, 0, now(), now(), now(),
        case n when 1 then %(rare)s else 1 + n %% %(groups)s end
    from generate_series(1, %(jobs)s) n
"""

FILL_LIVE: LiteralString = """
    insert into bgjob_job (id, queue, type, attempt)
    select 'live ' || n, 'q', 't', 1 from generate_series(1, %(jobs)s) n
"""


def fill(conn: psycopg.Connection, jobs: int) -> None:
    conn.execute(FILL, {"jobs": jobs, "groups": GROUPS, "rare": RARE})
    conn.execute(FILL_LIVE, {"jobs": jobs})


tables, conn = filled(fill, MANY, {"bgjob_dead_job", "bgjob_job"})


def check(conn: psycopg.Connection, statement: Statement[Any], most: float) -> Any:
    """Fail unless no step that reads the table handles more rows; return the answer."""
    explain = prepare(conn, "look", statement)
    for mode in PLAN_CACHE_MODES:
        for node in nodes(run(conn, explain, mode)):
            if any(below.get("Relation Name") for below in nodes(node)):
                assert handled(node) <= most, node
    conn.execute("deallocate look")
    return statement.parse(
        conn.execute(cast(Any, statement.text), statement.params, binary=True).fetchall()
    )


def test_a_dead_job_is_found_by_its_id_its_number_or_its_group(conn: psycopg.Connection) -> None:
    [first] = check(conn, dead.listed(DeadFilter(["dead 1"]), limit=1), 2)
    assert (first.id, first.fingerprint) == ("dead 1", f"{RARE:012x}")
    for where in (DeadFilter(fingerprint=RARE), DeadFilter(numbers=[first.number])):
        assert check(conn, dead.listed(where, limit=100), 2) == [first]
    where = DeadFilter(fingerprint=2, before=first.number + MANY // 2)
    found = check(conn, dead.listed(where, limit=5), 6)
    assert [job.id for job in found] == [f"dead {MANY // 2 + 1 - GROUPS * n}" for n in range(1, 6)]


def test_the_dead_are_grouped_in_one_pass(conn: psycopg.Connection) -> None:
    found = check(conn, dead.groups(DeadFilter(), limit=100), MANY)
    each = MANY // GROUPS
    assert sorted(group.jobs for group in found) == [1, each - 1, *[each] * (GROUPS - 1)]


def test_a_canary_and_a_batch_look_at_their_own_jobs_only(conn: psycopg.Connection) -> None:
    canary = check(conn, triage.canary(2), 2)
    assert canary.id == f"dead {MANY - 9}"
    state = check(conn, triage.state("dead 1", 0), 2)
    assert (state.attempt, state.number, state.error) == (
        None,
        canary.number - MANY + 10,
        "ValueError: 1",
    )
    last = canary.number + 9
    assert check(conn, triage.start(2, None), MANY // GROUPS) == (last, MANY // GROUPS - 1)
    numbers = check(conn, triage.batch(2, state.number, last, limit=100), 2 * 100)
    assert numbers == [state.number + GROUPS * n for n in range(1, 101)]
    requeued = check(conn, dead.requeue(DeadFilter(numbers=numbers[:20])), 3 * 20)
    assert len(requeued.ids) == 20
    ids = [f"live {n}" for n in range(1000)]
    assert check(conn, triage.failed_again(2, last - 500, ids), 2 * 1000 + 1) == 50 + 999
