"""Each hot statement has a good plan for any size of the table and any statistics.

These tests share one database, which the first to come makes. It holds a table of 250,000 jobs,
and other tables of the same definition, each of which was analyzed when it held something else. A
test works in a transaction that it rolls back: there it hands the statistics of one table to
another, and runs a statement as the driver prepares it, with a plan for its parameters or with a
generic one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, cast

import psycopg
import pytest
from conftest import MIGRATION, server_dsn_key
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import Escaping
from support.database import row
from support.plans import (
    PLAN_CACHE_MODES,
    STATISTICS,
    apply,
    buffers,
    enter_bounds,
    fill_with_statistics,
    handled,
    nodes,
    prepare,
    run,
)
from support.jobs import a_job
from support.statements import LONG_AGO
from support.waiting import eventually

from bgjob import Client, Complete, EnqueueRequest, Job, Mux
from bgjob._engine.protocol import MOST_FREED
from bgjob._sql import backlog, preflight
from bgjob._sql.claims import Window, claim, claim_any, claim_group, free, free_within, sweep
from bgjob._sql.survey import strays, survey, survey_known
from bgjob._sql.dead import DeadFilter, expire, listed
from bgjob._sql.enqueues import enqueue, enqueue_many
from bgjob._sql import replacements, results
from bgjob._sql.groups import end_groups, hold, open_group
from bgjob._sql.key_rows import lock_keys
from bgjob._sql.keys import acquire, blocked, release
from bgjob._sql.session import WORKER_SETTINGS, session
from bgjob._sql.settlements import (
    DeadLettered,
    Claimed,
    Postponed,
    Returned,
    dead_letter,
    complete,
    keep_results,
    release_jobs,
    postpone,
)
from bgjob._sql.leases import extend
from bgjob._sql.statement import Statement
from bgjob._sql.transactions import PREPARE, complete_and_commit

LARGE = 250_000
BATCH = 500

# -- tables and statistics ------------------------------------------------------------------

MARK = datetime(2021, 1, 1, tzinfo=UTC)
"""Where the next claim of a worker starts; see FILL."""

EDGE = 3 * BATCH
"""The most jobs that lie before the mark."""

# A five-hundredth of the jobs are held, for as many the lease has ended, and as many are suspects:
# all three lie before the mark. Of the others a quarter is due, a quarter is delayed, a quarter is
# due in a queue that has nothing else, and a quarter is spread over a thousand queues. Four
# priorities have few jobs, and one has most of them, so that a batch spans several.
FILL = """
    insert into bgjob_job (
        id, queue, type, arg, priority, next_run_at, attempt, token, lease_until, deaths
    )
    select lpad(n::text, 7, '0'),
        case
            when n <= 3 * part or n %% 4 < 2 then 'q'
            when n %% 4 = 2 then 'fresh'
            else 'other ' || n %% 999
        end,
        't', '{}', least(n %% 997, 4),
        case
            when n <= 3 * part then timestamptz '2020-01-01 00:00+00'
            when n %% 4 = 1 then '2100-01-01 00:00+00'
            else '2021-01-01 00:00+00'
        end + n * interval '1 ms',
        (n <= 3 * part)::int,
        case when n <= 2 * part then 1 end,
        case
            when n <= part then timestamptz '2100-01-01 00:00+00'
            when n <= 2 * part then '2020-01-02 00:00+00'
        end,
        2 * (n > 2 * part and n <= 3 * part)::int
    from generate_series(1, %(jobs)s) n, greatest(1, %(jobs)s / 500) part
"""

# And almost as many jobs that have a key, in a queue of their own: most of them wait for one key
# that is held; others for one that is free, whose holder is gone; and there are jobs of one key
# that are delayed, and 100,000 keys with one job each, which waits for nothing, or
# does not wait. A batch of each kind is claimed, as by a worker that wants their keys.
FILL_KEYS = """
    with job (n, id, key, waits, due, claimed) as (
        select n, 'behind ' || n, 'held', true, '2021', false
        from generate_series(1, %(jobs)s / 10) n
        union all select n, 'beside ' || n, 'held', false, '2021', false
        from generate_series(1, least(2 * %(batch)s, %(jobs)s / 10)) n
        union all select n, 'late ' || n, 'held', false, '2022', true
        from generate_series(1, least(%(batch)s, %(jobs)s / 10)) n
        union all select 0, 'holder', 'held', false, '2020', true
        union all select n, 'after ' || n, 'free', true, '2021', false
        from generate_series(1, %(jobs)s / 10) n
        union all select n, 'delayed ' || n, 'delayed', false, '2100', false
        from generate_series(1, greatest(1, %(jobs)s / 20)) n
        union all select 0, 'not delayed', 'delayed', false, '2021', true
        union all select n, 'single ' || n, 'single ' || n, false, '2021', n <= %(batch)s
        from generate_series(1, 4 * %(jobs)s / 10) n
        -- Of three slots one worker has two, and asks for the third; others wait.
        union all select n, 'slot ' || n, 'slots', n > 3, '2021', n < 4
        from generate_series(1, %(jobs)s / 10) n
        union all select n, 'next ' || n, 'next ' || n, true, '2021', false
        from generate_series(1, least(%(batch)s, %(jobs)s / 10)) n
    ), written as (
        insert into bgjob_job (
            id, queue, type, exclusive, waits, next_run_at, attempt, token, lease_until, slots
        )
        select id, 'keyed', 't', key, waits, (due || '-01-01 00:00+00')::timestamptz
            + n * interval '1 ms', claimed::int,
            case when claimed then case when key = 'slots' then n else 1 end end,
            case when claimed then timestamptz '2100-01-01 00:00+00' end,
            case when key = 'slots' then 3 end
        from job
    )
    insert into bgjob_exclusive (
        key, tokens, queue, since, since_id, until, until_id, places, slots
    )
    select distinct on (job.key) job.key, h.tokens, h.queue, h.since, h.since_id, h.until,
        h.until_id, coalesce(h.places, 1), coalesce(h.slots, 1)
    from job left join (
        values ('held', '{1}'::bigint[], 'keyed', timestamptz '2020-01-01 00:00+00', 'holder',
                timestamptz '2020-01-01 00:00+00', 'holder', 1, 1),
            ('free', '{1}', 'keyed', '2020-01-01 00:00+00', 'gone', '2020-01-01 00:00+00', 'gone',
                1, 1),
            ('slots', '{1,2}', 'keyed', '2021-01-01 00:00:00.001+00', 'slot 1',
                '2021-01-01 00:00:00.002+00', 'slot 2', 2, 3)
    ) as h (key, tokens, queue, since, since_id, until, until_id, places, slots) using (key)
"""

# And jobs of groups: of one all are live, and as many are dead; of another none is live, and a
# few are dead. The jobs that wait for these lie in the same queue.
FILL_GROUPS = """
    with dead (id, of) as (
        select 'dead ' || n, 'live' from generate_series(1, %(jobs)s / 10) n
        union all select 'gone ' || n, 'over' from generate_series(1, 10) n
    ), written as (
        insert into bgjob_job (id, queue, type, next_run_at, group_id)
        select 'member ' || n, 'grouped', 't', timestamptz '2100-01-01 00:00+00', 'live'
        from generate_series(1, %(jobs)s / 10) n
        union all select id, 'grouped', 't', 'infinity', id from unnest('{live,over}'::text[]) id
    )
    insert into bgjob_dead_job (
        job_id, queue, type, attempt, priority, next_run_at, job_created_at, job_updated_at,
        group_id
    )
    select id, 'grouped', 't', 1, 0, now(), '2100-01-01 00:00+00', now(), of from dead
"""

STATISTICS = [
    "none",
    "of an empty table",
    "of a drained table",
    "of ten jobs",
    "of other queues",
    "of suspects",
    "of many jobs",
]


def make_table(conn: psycopg.Connection, schema: str, jobs: int) -> None:
    """Make the tables in a schema of their own, and put jobs there."""
    name = sql.Identifier(schema)
    conn.execute(sql.SQL("create schema {0}; set local search_path to {0}").format(name))
    conn.execute(MIGRATION.read_bytes())
    conn.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    conn.execute("alter table bgjob_exclusive set (autovacuum_enabled = off)")
    conn.execute(FILL, {"jobs": jobs})
    if jobs:
        conn.execute(FILL_KEYS, {"jobs": jobs, "batch": BATCH})
        conn.execute(FILL_GROUPS, {"jobs": jobs})


def make_tables(conn: psycopg.Connection) -> None:
    """Make a table for each of the statistics; the last is the one that statements work on."""
    make_table(conn, "none", 0)
    make_table(conn, "of an empty table", 0)
    conn.execute("analyze bgjob_job, bgjob_exclusive")
    # It has its pages but no rows: the planner assumes that they stay empty.
    make_table(conn, "of a drained table", 10_000)
    conn.execute("delete from bgjob_job")
    conn.execute("delete from bgjob_exclusive")
    conn.execute("analyze bgjob_job, bgjob_exclusive")
    make_table(conn, "of ten jobs", 10)
    conn.execute("analyze bgjob_job, bgjob_exclusive")
    make_table(conn, "of other queues", 10_000)
    conn.execute("delete from bgjob_job where queue in ('q', 'fresh', 'keyed')")
    conn.execute("delete from bgjob_exclusive where key not like 'next%'")
    conn.execute("analyze bgjob_job, bgjob_exclusive")
    make_table(conn, "of suspects", 10_000)
    conn.execute("update bgjob_job set deaths = 2, token = null, lease_until = null")
    conn.execute("analyze bgjob_job")
    make_table(conn, "of many jobs", LARGE)
    conn.execute("analyze bgjob_job, bgjob_exclusive")


@pytest.fixture(scope="module")
def shared(pytestconfig: pytest.Config) -> Iterator[psycopg.Connection]:
    """A connection to the database, which stays for the other processes that run these tests."""
    server_dsn = pytestconfig.stash[server_dsn_key]
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        admin.execute("select pg_advisory_lock(1)")
        made = admin.execute("select from pg_database where datname = 'plans'").rowcount
        if not made:
            admin.execute("create database plans")
        with psycopg.connect(make_conninfo(server_dsn, dbname="plans"), autocommit=True) as conn:
            if not made:
                with conn.transaction():
                    make_tables(conn)
            admin.execute("select pg_advisory_unlock(1)")
            yield conn


@pytest.fixture
def plans(shared: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """The same connection, in a transaction that is rolled back, and alone in the database."""
    shared.execute("deallocate all")
    with shared.transaction(force_rollback=True):
        shared.execute("select pg_advisory_xact_lock(1)")
        yield shared


def choose_table(conn: psycopg.Connection, jobs: int, statistics: str) -> None:
    """Select a table of so many jobs, and replace its statistics by those of another."""
    name = {10: "of ten jobs", LARGE: "of many jobs"}[jobs]
    conn.execute(sql.SQL("set local search_path to {}").format(sql.Identifier(name)))
    pairs = """
        from pg_class mine, pg_class theirs
        where mine.relname = theirs.relname and mine.oid <> theirs.oid
            and mine.relnamespace = quote_ident(current_schema())::regnamespace
            and theirs.relnamespace = quote_ident(%s)::regnamespace
    """
    for change in (
        f"delete from pg_statistic where starelid in (select mine.oid {pairs})",
        f"update pg_statistic set starelid = mine.oid {pairs} and starelid = theirs.oid",
        "update pg_class set relpages = theirs.relpages, reltuples = theirs.reltuples, "
        f"relallvisible = theirs.relallvisible {pairs} and pg_class.oid = mine.oid",
    ):
        conn.execute(cast(Any, change), [statistics])


# -- plans ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hot:
    """A hot statement, and its limits."""

    statement: Statement[Any]
    rows: int
    """The most that any step of the plan handles."""
    locked: int = 0
    """The most that are locked before they are changed."""

    def check(self, plan: dict[str, Any], name: str) -> None:
        """Fail if the plan costs more."""
        for node in nodes(plan):
            assert handled(node) <= self.rows, (name, plan)
            loops = node["Actual Loops"]
            assert node.get("Relation Name") != "bgjob_pause" or loops <= 1, (name, plan)
        locked = [handled(node) for node in nodes(plan) if node["Node Type"] == "LockRows"]
        assert sum(locked) <= self.locked, (name, plan)


HELD = [
    Claimed(Job(f"{n:07}", "q", "t", None, 1, None, 0, LONG_AGO, LONG_AGO, LONG_AGO), 1)
    for n in range(1, BATCH + 1)
]
REQUESTS = [EnqueueRequest("q", "t", {"n": n}) for n in range(2 * BATCH)]
LIVE = EnqueueRequest("q", "t", id=f"{BATCH + 1:07}")
KEEPING = [EnqueueRequest("q", "t", {"n": n}, keep=60) for n in range(BATCH)]
PRIORITIES = 5
FEW = 4 * PRIORITIES


def claim_from(mark: datetime, limit: int) -> Statement[list[Job]]:
    marks = dict.fromkeys(range(PRIORITIES), mark)
    return claim("q", limit=limit, lease=60, token=2, marks=marks)


def settlements(held: list[Claimed]) -> dict[str, Hot]:
    count = len(held)
    retries = [Postponed(c, 1.0, "why", refund=False) for c in held]
    return {
        f"complete {count}": Hot(complete(held), count),
        f"postpone {count}": Hot(postpone(retries), count),
        f"release {count}": Hot(release_jobs("q", held, tell=False), count),
        f"dead_letter {count}": Hot(dead_letter([DeadLettered(c, "why", 1) for c in held]), count),
        f"keep results {count}": Hot(keep_results([Returned(c, b"1") for c in held]), count),
        f"keep errors {count}": Hot(
            dead_letter([DeadLettered(c, "why", 1) for c in held], keeps=True), count
        ),
    }


WINDOW = Window(
    MARK + timedelta(milliseconds=0.9 * LARGE),
    MARK + timedelta(milliseconds=0.9 * LARGE + 4 * BATCH),
    tuple(range(PRIORITIES)),
)

WORKERS = {
    "claim": Hot(claim_from(MARK, BATCH), BATCH, BATCH),
    "claim one": Hot(claim_from(MARK, 1), PRIORITIES, 1),
    "claim from the left edge": Hot(claim_from(LONG_AGO, BATCH), BATCH + EDGE, BATCH),
    "sweep": Hot(sweep("q", limit=BATCH, lease=60, token=2), BATCH + EDGE, BATCH),
    # It looks at all that is due.
    "free": Hot(free("q", limit=MOST_FREED), LARGE // 4 + EDGE, MOST_FREED),
    "survey": Hot(survey("q"), FEW),
    "survey of known priorities": Hot(survey_known("q", WINDOW), FEW),
    # As far as the window goes, and no farther.
    "free within a window": Hot(free_within("q", WINDOW, limit=MOST_FREED), BATCH),
    "strays within a window": Hot(strays("q", WINDOW), FEW),
    "survey without suspects": Hot(survey("fresh"), FEW),
    "survey with groups": Hot(survey("grouped"), FEW),
    "end groups": Hot(end_groups(["live", "over", "none"], notify=True), FEW, 1),
    "claim a group": Hot(claim_group("q", limit=50, lease=60, token=2, charge=True), 100, 100),
    "claim a group where there is none": Hot(
        claim_group("fresh", limit=50, lease=60, token=2, charge=True), PRIORITIES, 0
    ),
    "extend": Hot(extend(HELD, lease=60), BATCH, BATCH),
    **settlements(HELD),
    **settlements(HELD[:1]),
}

CLIENTS = {
    "claim any": Hot(claim_any("q", lease=60, token=2), FEW + EDGE, 1),
    "enqueue": Hot(enqueue(REQUESTS[0], notify=True), 1),
    "enqueue many": Hot(enqueue_many(REQUESTS, notify=True), len(REQUESTS)),
    "enqueue a group": Hot(enqueue_many(REQUESTS, notify=True, group="live"), len(REQUESTS)),
    "open a group": Hot(open_group(REQUESTS[0]), 1),
    "hold a job of a group": Hot(hold("member 1", "live"), 1, 1),
    "end groups": Hot(end_groups(["live", "over", "none"], notify=True), FEW, 1),
    "enqueue with keep": Hot(enqueue(KEEPING[0], notify=True), 1),
    "enqueue a live one with keep": Hot(enqueue(replace(LIVE, keep=60), notify=True), FEW),
    "enqueue many with keep": Hot(enqueue_many(KEEPING, notify=True), len(KEEPING)),
    "replace": Hot(replacements.replace([LIVE], notify=True), 1),
    "replace many": Hot(replacements.replace([*REQUESTS, LIVE], notify=True), len(REQUESTS) + 1),
    # A table of one page is read whole.
    **{name: Hot(hot.statement, FEW) for name, hot in settlements(HELD[:1]).items()},
}

# Nothing of the queue is looked at, but for its priorities; for which a client may read the
# whole of a small table.
PAUSED = {
    **{name: Hot(hot.statement, FEW) for name, hot in WORKERS.items() if "claim" in name},
    "claim any": Hot(CLIENTS["claim any"].statement, FEW * PRIORITIES),
}

ASIDE = 1000
"""The most jobs that are put aside by one statement."""


def wanting(key: str, *ids: str) -> list[Claimed]:
    job = HELD[0].job._replace(queue="keyed", exclusive=key)
    return [Claimed(job._replace(id=id_), 1) for id_ in ids]


def each(kind: str) -> list[str]:
    return [f"{kind} {n}" for n in range(1, BATCH + 1)]


SINGLES = [claimed for id_ in each("single") for claimed in wanting(id_, id_)]
CHAIN = wanting("held", "holder", *each("late"))
THIRD = [claimed._replace(token=3) for claimed in wanting("slots", "slot 3")]
WORKERS_KEYS = {
    "lock": Hot(lock_keys([*each("single"), *each("next"), "new"]), 2 * BATCH + 1),
    "lock the keys of single jobs": Hot(lock_keys([], SINGLES), 2 * BATCH),
    "acquire": Hot(acquire("keyed", SINGLES), BATCH, BATCH),
    "acquire what is held here": Hot(
        acquire("keyed", CHAIN[1:], in_a_row=BATCH), BATCH + ASIDE, BATCH + ASIDE
    ),
    "acquire what is held": Hot(
        acquire("keyed", wanting("held", *each("late"))), BATCH + ASIDE, BATCH + ASIDE
    ),
    "acquire a slot": Hot(acquire("keyed", THIRD, most=3), FEW, 2),
    "release what has a slot": Hot(release("keyed", ["slots"]), FEW, 1),
    "release": Hot(release("keyed", each("next")), 2 * BATCH, BATCH),
    "release what nobody waits for": Hot(release("keyed", each("single")), 2 * BATCH, 0),
    "sweep": Hot(sweep("keyed", limit=BATCH, lease=60, token=2), BATCH + EDGE, BATCH),
    "survey": Hot(survey("keyed"), FEW),
}
KEYS_OF_ONE = {
    "lock one": Hot(lock_keys(["held"]), 1),
    "acquire one": Hot(acquire("keyed", SINGLES[:1]), FEW, 2),
    "acquire one that is held": Hot(
        acquire("keyed", wanting("held", "late 1")), 1 + ASIDE, 1 + ASIDE
    ),
    "acquire among the delayed": Hot(acquire("keyed", wanting("delayed", "not delayed")), FEW, 2),
    "release one that many wait for": Hot(release("keyed", ["free"]), FEW, 1),
    "release what is held": Hot(release("keyed", ["held"]), FEW, 0),
    "blocked": Hot(blocked("keyed", after="", limit=BATCH), BATCH, 0),
    "blocked after a key": Hot(blocked("keyed", after="single 1", limit=BATCH), BATCH, 0),
    "blocked elsewhere": Hot(blocked("q", after="", limit=BATCH), BATCH, 0),
}

EVERY_STATISTICS = pytest.mark.parametrize("statistics", STATISTICS)
EVERY_SIZE = pytest.mark.parametrize("jobs", [10, LARGE])


def enter_session(conn: psycopg.Connection) -> None:
    """Apply the settings of a worker's session."""
    apply(conn, session(conn.info.backend_pid, WORKER_SETTINGS))


def few(jobs: int) -> int:
    """Count what a client reads of a small table: its one page, for each thing that it looks up."""
    return 0 if jobs == LARGE else FEW * jobs


def check_walks(plan: dict[str, Any], name: str) -> None:
    """Fail unless jobs are found by their position or in the order of an index."""
    for node in nodes(plan):
        found = {below.get("Relation Name") for below in nodes(node)} & {
            "bgjob_job",
            "bgjob_dead_job",
        }
        kind = node["Node Type"]
        assert not found or kind != "Seq Scan", (name, plan)
        assert not found or "Bitmap" not in kind, (name, plan)
        assert not found or "Sort" not in kind, (name, plan)


def check_each(conn: psycopg.Connection, hots: Mapping[str, Hot], *, walks: bool = False) -> None:
    """Check the plans of these statements; with `walks`, how they find their jobs as well."""
    for name, hot in hots.items():
        explain = prepare(conn, name, hot.statement)
        for mode in PLAN_CACHE_MODES:
            plan = run(conn, explain, mode)
            if walks:
                check_walks(plan, name)
            hot.check(plan, name)


@EVERY_STATISTICS
@EVERY_SIZE
def test_a_workers_statement_handles_no_more_rows_than_requested(
    plans: psycopg.Connection, jobs: int, statistics: str
) -> None:
    choose_table(plans, jobs, statistics)
    enter_session(plans)
    check_each(plans, WORKERS, walks=True)


@EVERY_STATISTICS
@EVERY_SIZE
def test_a_clients_statement_handles_no_more_rows_than_requested(
    plans: psycopg.Connection, jobs: int, statistics: str
) -> None:
    choose_table(plans, jobs, statistics)
    check_each(plans, CLIENTS)


ENDED = 20_000


@pytest.mark.parametrize("is_analyzed", [False, True])
def test_a_statement_about_results_handles_only_those_that_it_names_or_deletes(
    plans: psycopg.Connection, is_analyzed: bool
) -> None:
    plans.execute('set local search_path to "of many jobs"')
    plans.execute(
        "insert into bgjob_result (id, until, value) select lpad(n::text, 7, '0'), "
        "case when n %% 2 = 0 then now() + (n - %s) * interval '1 s' end, '1' "
        "from generate_series(1, %s) n",
        [ENDED // 2, ENDED],
    )
    if is_analyzed:
        plans.execute("analyze bgjob_result")
    ids = [f"{n:07}" for n in range(1, BATCH // 10)]
    again = [EnqueueRequest("q", "t", id=id_, keep=60) for id_ in ids]
    check_each(
        plans,
        {
            "result": Hot(results.outcomes(["0000002"]), FEW),
            "results": Hot(results.outcomes(ids), len(ids)),
            "enqueue": Hot(enqueue(again[0], notify=True), FEW),
            "enqueue many": Hot(enqueue_many(again, notify=True), 2 * len(ids)),
        },
    )
    enter_session(plans)
    held = [c._replace(job=c.job._replace(keep=60.0)) for c in HELD]
    plans.execute("update bgjob_job set keep = 60 where id = any (%s)", [[c.job.id for c in HELD]])
    check_each(
        plans,
        {
            "expire": Hot(results.expire(limit=BATCH), BATCH, BATCH),
            **settlements(held),
        },
        walks=True,
    )


@EVERY_STATISTICS
@EVERY_SIZE
def test_a_claim_looks_at_no_job_of_a_paused_queue(
    plans: psycopg.Connection, jobs: int, statistics: str
) -> None:
    choose_table(plans, jobs, statistics)
    plans.execute("insert into bgjob_pause (queue) values ('q'), ('fresh')")
    clients = {name: hot for name, hot in PAUSED.items() if name not in WORKERS}
    check_each(plans, {n: replace(h, rows=max(h.rows, few(jobs))) for n, h in clients.items()})
    enter_session(plans)
    check_each(plans, {name: hot for name, hot in PAUSED.items() if name in WORKERS})


@pytest.mark.parametrize("analyzed", [False, True])
def test_a_page_of_dead_jobs_and_a_batch_of_a_retention_are_all_that_is_read(
    plans: psycopg.Connection, analyzed: bool
) -> None:
    make_table(plans, "chosen", 0)
    plans.execute(
        "insert into bgjob_dead_job (job_id, queue, type, attempt, priority, next_run_at, "
        "job_created_at, job_updated_at, group_id) select n, 'q', 't', 1, 0, now(), now(), now(), "
        "case when n <= 100 then 'g' end from generate_series(1, 20000) n"
    )
    if analyzed:
        plans.execute("analyze bgjob_dead_job")
    pages = {
        "the first page": DeadFilter(),
        "a page": DeadFilter(before=10_000),
        "a group": DeadFilter(group="g"),
    }
    if analyzed:  # without statistics the planner assumes that a queue has few
        pages["a page of a queue"] = DeadFilter(queue="q", before=10_000)
    for name, where in pages.items():
        explain = prepare(plans, name, listed(where, limit=100))
        plan = run(plans, explain, "force_custom_plan")
        Hot(listed(where, limit=100), 100).check(plan, name)
    enter_session(plans)
    for age in (0.0, 3600.0):
        expiry = expire(age, limit=1000)
        for mode in PLAN_CACHE_MODES:
            plan = run(plans, prepare(plans, f"expire {age} {mode}", expiry), mode)
            check_walks(plan, "expire")
            Hot(expiry, 1000, 0 if age else 1000).check(plan, "expire")


PAGE = 1000

WANTED = {
    "all": preflight.Wanted(None, ["t"], ["t"], [], 4096),
    "a queue of few jobs": preflight.Wanted(["other 7"], ["t"], ["t"], ["t"], 4096),
    "no payload": preflight.Wanted(None, [], [], [], -1),
}
"""What a preflight wants of a page: it costs the same if hardly a row is wanted."""

PREFLIGHT = {
    f"{place} page, {name}": Hot(preflight.page(preflight.LIVE, after, wanted, rows=PAGE), PAGE)
    for name, wanted in WANTED.items()
    for place, after in {"first": "", "middle": "0100000", "last": "0249900"}.items()
} | {
    "jobs by id": Hot(
        preflight.candidates(preflight.LIVE, [c.job.id for c in HELD], WANTED["all"]), BATCH
    ),
    "payloads by id": Hot(preflight.payloads(preflight.LIVE, [c.job.id for c in HELD]), BATCH),
}


@EVERY_STATISTICS
@EVERY_SIZE
def test_a_page_of_a_preflight_looks_at_its_rows_and_no_more(
    plans: psycopg.Connection, jobs: int, statistics: str
) -> None:
    choose_table(plans, jobs, statistics)
    settings = session(plans.info.backend_pid, preflight.INSPECTION_SETTINGS)
    plans.execute(cast(Any, settings.text), settings.params)
    # The test undoes each run, which would need a transaction number otherwise.
    plans.execute("set local default_transaction_read_only = off")
    for name, hot in PREFLIGHT.items():
        explain = prepare(plans, name, hot.statement)
        for mode in PLAN_CACHE_MODES:
            plan = run(plans, explain, mode)
            check_walks(plan, name)
            hot.check(plan, name)


@pytest.mark.parametrize("analyzed", [False, True])
def test_a_page_of_dead_jobs_for_a_preflight_looks_at_its_rows_and_no_more(
    plans: psycopg.Connection, analyzed: bool
) -> None:
    make_table(plans, "chosen", 0)
    plans.execute(
        "insert into bgjob_dead_job (job_id, queue, type, attempt, last_error, priority, "
        "next_run_at, job_created_at, job_updated_at) select n, 'q', 't', 1, case "
        "when n % 5000 = 0 then 'PayloadError: x' else 'ValueError: x' end, 0, now(), now(), now() "
        "from generate_series(1, 20000) n"
    )
    if analyzed:
        plans.execute("analyze bgjob_dead_job")
    settings = session(plans.info.backend_pid, preflight.INSPECTION_SETTINGS)
    plans.execute(cast(Any, settings.text), settings.params)
    numbers = list(range(1, 500))
    hots = {
        f"{name} after {after}": Hot(preflight.page(preflight.DEAD, after, wanted, rows=PAGE), PAGE)
        for name, wanted in WANTED.items()
        for after in (preflight.DEAD.first, 10_000)
    } | {
        "jobs": Hot(preflight.candidates(preflight.DEAD, numbers, WANTED["all"]), 500),
        "payloads": Hot(preflight.payloads(preflight.DEAD, numbers), 500),
    }
    for name, hot in hots.items():
        explain = prepare(plans, name, hot.statement)
        for mode in PLAN_CACHE_MODES:
            plan = run(plans, explain, mode)
            check_walks(plan, name)
            hot.check(plan, name)


@EVERY_STATISTICS
@EVERY_SIZE
@pytest.mark.parametrize("is_worker", [True, False], ids=["worker", "client"])
def test_statements_about_keys_handle_only_the_jobs_of_those_keys(
    plans: psycopg.Connection, is_worker: bool, jobs: int, statistics: str
) -> None:
    choose_table(plans, jobs, statistics)
    hots = KEYS_OF_ONE
    if is_worker:
        hots = KEYS_OF_ONE | WORKERS_KEYS
        enter_session(plans)
    for name, hot in hots.items():
        explain = prepare(plans, name, hot.statement)
        for mode in PLAN_CACHE_MODES:
            plan = run(plans, explain, mode)
            replace(hot, rows=max(hot.rows, 0 if is_worker else few(jobs))).check(plan, name)
            for node in nodes(plan):
                at_jobs = node.get("Relation Name") == "bgjob_job" and jobs == LARGE
                assert not at_jobs or node["Node Type"] != "Seq Scan", (name, plan)


def test_a_worker_can_keep_the_plans_of_a_small_table_when_it_grows(
    plans: psycopg.Connection,
) -> None:
    choose_table(plans, 10, "of ten jobs")
    enter_session(plans)
    hots = WORKERS | KEYS_OF_ONE | {f"keyed, {name}": hot for name, hot in WORKERS_KEYS.items()}
    explains = {name: prepare(plans, name, hot.statement) for name, hot in hots.items()}
    for explain in explains.values():
        run(plans, explain, "force_generic_plan")
    plans.execute("delete from bgjob_job")
    plans.execute("delete from bgjob_exclusive")
    plans.execute(FILL, {"jobs": 40_000})
    plans.execute(FILL_KEYS, {"jobs": 40_000, "batch": BATCH})
    for name, explain in explains.items():
        plan = run(plans, explain, "force_generic_plan")
        if name in WORKERS:
            check_walks(plan, name)
        hots[name].check(plan, name)


def test_a_client_keeps_no_plan_of_a_small_table_when_it_grows(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    mux = Mux().register("t", lambda _: Complete())
    # The driver prepares a statement that it ran five times; after five more the server may
    # keep a plan.
    runs, large = 15, 10_000
    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(runs)])
        conn.execute("analyze bgjob_job")
        for _ in range(runs):
            client.do("q", mux)
        client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(large)])
        client.do("q", mux)
    # What a session read is counted when it has ended.
    counts: LiteralString = "from pg_stat_user_tables where relname = 'bgjob_job'"
    assert eventually(lambda: row(conn, f"select n_tup_del {counts}")[0] == runs + 1)
    assert row(conn, f"select seq_tup_read {counts}")[0] < large


@EVERY_STATISTICS
@EVERY_SIZE
def test_the_doctor_looks_at_each_priority_of_a_queue_and_not_at_its_jobs(
    plans: psycopg.Connection, jobs: int, statistics: str
) -> None:
    choose_table(plans, jobs, statistics)
    [[lines]] = plans.execute(
        "select count(*) from (select distinct queue, priority from bgjob_job where not waits) _"
    ).fetchall()
    enter_bounds(plans)
    # Each line is looked for once, and in each its first due job. Before the first due one are
    # those that are held.
    check_each(plans, {"due": Hot(backlog.due(), 2 * lines + EDGE)})


@EVERY_STATISTICS
def test_the_doctor_reads_the_table_for_leases_once_and_no_more_pages_than_it_may(
    plans: psycopg.Connection, statistics: str
) -> None:
    choose_table(plans, LARGE, statistics)
    enter_bounds(plans)
    for pages, most in (backlog.MOST_PAGES, 2 * LARGE), (100, 100 * 100):
        explain = prepare(plans, f"leases {pages}", backlog.leases(pages))
        for mode in PLAN_CACHE_MODES:
            plan = run(plans, explain, mode)
            Hot(backlog.leases(pages), most).check(plan, "leases")
            scans = [n for n in nodes(plan) if n.get("Relation Name") == "bgjob_job"]
            assert [n["Node Type"] for n in scans] == ["Tid Range Scan"], plan


@pytest.mark.parametrize("analyzed", [False, True])
def test_the_doctor_looks_at_the_latest_dead_jobs_only(
    plans: psycopg.Connection, analyzed: bool
) -> None:
    make_table(plans, "chosen", 0)
    plans.execute(
        "insert into bgjob_dead_job (job_id, queue, type, attempt, priority, next_run_at, "
        "job_created_at, job_updated_at) select n, 'q', 't', 1, 0, now(), now(), now() "
        "from generate_series(1, %s::int) n",
        [3 * backlog.MOST_DEAD],
    )
    if analyzed:
        plans.execute("analyze bgjob_dead_job")
    enter_bounds(plans)
    check_each(plans, {"died": Hot(backlog.died(), backlog.MOST_DEAD)})


@pytest.mark.parametrize("priorities", [1, 2])
def test_a_claim_reads_the_snapshot_once_and_not_for_each_row_that_others_claim(
    dsn: str, conn: psycopg.Connection, priorities: int
) -> None:
    conn.execute(FILL, {"jobs": 100})
    enter_session(conn)
    with psycopg.connect(dsn) as other:
        other.execute("update bgjob_job set lease_until = now()")
        marks = dict.fromkeys(range(priorities), MARK - timedelta(days=1))
        claims = claim("q", limit=BATCH, lease=60, token=2, marks=marks)
        plan = run(conn, prepare(conn, "claim", claims), "force_generic_plan")
    filters = [node["Filter"] for node in nodes(plan) if "xmax" in node.get("Filter", "")]
    assert len(filters) == 1
    assert "pg_current_snapshot" not in filters[0]


# -- dead rows ------------------------------------------------------------------------------

DEAD = 70_000


@pytest.mark.parametrize("plan_cache_mode", PLAN_CACHE_MODES)
def test_a_claim_from_its_mark_does_not_look_at_what_an_old_snapshot_keeps(
    dsn: str, conn: psycopg.Connection, plan_cache_mode: str
) -> None:
    conn.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    conn.execute("analyze bgjob_job")
    # Their due times are scattered over the pages, so that a look at each is a look at a page.
    conn.execute(
        "insert into bgjob_job (id, queue, type, priority, next_run_at) "
        "select n, 'q', 't', 0, %s - interval '1 s' * (n * 7919 %% 70001) "
        "from generate_series(1, %s::int) n",
        [MARK, DEAD],
    )
    with psycopg.connect(dsn) as old:
        old.execute("set transaction isolation level repeatable read")
        old.execute("select from bgjob_job limit 1")
        conn.execute("delete from bgjob_job")
        conn.execute(FILL, {"jobs": 10_000})
        enter_session(conn)
        explain = prepare(conn, "from the mark", claim_from(MARK, BATCH))
        assert buffers(run(conn, explain, plan_cache_mode)) < DEAD / 10
        # A sweep walks over them for the priorities and for the jobs, and not once for each job.
        explain = prepare(conn, "sweep", WORKERS["sweep"].statement)
        assert DEAD < buffers(run(conn, explain, plan_cache_mode)) < 3 * DEAD


DEAD_OF_KEY = 5_000


@pytest.mark.every_combination
@pytest.mark.parametrize("more", [False, True], ids=["few wait", "many were put aside"])
@pytest.mark.parametrize("due", ["one after the other", "at one time"])
def test_a_key_is_passed_on_without_a_look_at_what_an_old_snapshot_keeps(
    dsn: str, conn: psycopg.Connection, due: str, more: bool
) -> None:
    def carry_out(*statements: Statement[Any]) -> list[Any]:
        answers = []
        for s in statements:
            answers.append(s.parse(conn.execute(cast(Any, s.text), s.params).fetchall()))
        return answers

    def check(name: str, statement: Statement[Any]) -> None:
        for mode in PLAN_CACHE_MODES:
            explain = prepare(conn, f"{name} {mode}", statement)
            plan = run(conn, explain, mode)
            for node in nodes(plan):
                read = node["Shared Hit Blocks"] + node["Shared Read Blocks"]
                assert read < DEAD_OF_KEY / 10, (name, node)

    conn.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    conn.execute("analyze bgjob_job")
    step = timedelta(seconds=due == "one after the other")
    insert = (
        "insert into bgjob_job (id, queue, type, exclusive, waits, next_run_at) "
        "select %(kind)s || n, 'q', 't', 'k', {}, %(since)s + %(step)s * {} "
        "from generate_series(1, %(jobs)s::int) n"
    )
    # Half of them wait. They are scattered over the pages, so that to look at each is to look
    # at a page.
    done = {"kind": "done", "since": LONG_AGO, "step": step, "jobs": DEAD_OF_KEY}
    conn.execute(cast(Any, insert.format("n %% 2 = 0", "(n * 1237 %% 5003)")), done)
    since = MARK if step else LONG_AGO
    to_come = {"kind": "job", "since": since, "step": step, "jobs": 9}
    with psycopg.connect(dsn) as old:
        old.execute("set transaction isolation level repeatable read")
        old.execute("select from bgjob_job limit 1")
        conn.execute("delete from bgjob_job")
        conn.execute(cast(Any, insert.format("n > 1", "n")), to_come)
        if more:
            # Due behind those that will have the key.
            later = to_come | {"kind": "later", "since": since + 9 * step, "jobs": DEAD_OF_KEY}
            conn.execute(cast(Any, insert.format("false", "(n * 1237 %% 5003)")), later)
            conn.execute("update bgjob_job set waits = true where id like 'later%'")
        enter_session(conn)
        for n in range(1, 4):
            conn.execute("update bgjob_job set token = 1 where id = %s", [f"job{n}"])
            [wanted] = wanting("k", f"job{n}")
            carry_out(lock_keys(["k"]))
            if n > 1:  # the first holder looks at all
                check(f"acquire {n}", acquire("q", [wanted]))
            assert carry_out(acquire("q", [wanted])) == [{(f"job{n}", 1): True}]
            conn.execute("delete from bgjob_job where id = %s", [f"job{n}"])
            check(f"blocked {n}", blocked("q", after="", limit=BATCH))
            check(f"release {n}", release("q", ["k"]))
            [woken] = carry_out(release("q", ["k"]))
            assert len(woken) == 1


@pytest.mark.every_combination
@pytest.mark.parametrize(("jobs", "is_prepared"), [(1, False), (1, True), (20, True)])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_transaction_finds_the_rows_of_its_jobs_by_their_ids(
    conn: psycopg.Connection, statistics: str, jobs: int, is_prepared: bool
) -> None:
    def fill(conn: psycopg.Connection, jobs: int) -> None:
        conn.execute(
            "insert into bgjob_job (id, queue, type, token) "
            "select n::text, 'q', 't', 1 from generate_series(1, %s) n",
            [jobs],
        )

    fill_with_statistics(conn, statistics, fill, 5000, ["bgjob_job"])
    claims = [Claimed(a_job(id=str(2500 + number)), 1) for number in range(jobs)]
    quote = Escaping(conn.pgconn).escape_literal
    text = complete_and_commit(claims, quote, "utf-8", is_prepared=is_prepared)
    statements = text.split(b"; ")
    [at] = [n for n, each in enumerate(statements) if re.search(rb"bgjob_(complete|job)", each)]
    if is_prepared:
        conn.execute(PREPARE.removeprefix(b"; "))
    with conn.transaction(force_rollback=True):
        conn.execute("set local bgjob.claim = '1'")
        for statement in statements[:at]:
            conn.execute(statement)
        for number in range(10 if is_prepared else 0):  # until the server keeps a plan
            conn.execute(f"execute bgjob_complete ('{number + 1}', 1)".encode())
        explained = conn.execute(b"explain (analyze, buffers, format json)" + statements[at])
        [[[plan]]] = explained.fetchall()
    assert buffers(plan["Plan"]) < 10 * jobs
    assert not any(node["Node Type"] == "Seq Scan" for node in nodes(plan["Plan"]))
