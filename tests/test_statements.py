"""Each hot statement keeps its plan, its fence and its promise, for any statistics."""

import ast
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString, cast

import psycopg
import pytest
from support.plans import PLAN_CACHE_MODES, buffers, prepare, run
from support.statements import LONG_AGO, ask
from support.waiting import eventually

import bgjob
from bgjob import EnqueueRequest, Job
from bgjob._engine.reply import Notice
from bgjob._engine.watermarks import Watermarks
from bgjob._sql.survey import (
    Line,
    OpenTransactions,
    strays,
    survey,
    survey_known,
    open_transactions,
)
from bgjob._sql.claims import (
    Rations,
    Swept,
    Window,
    claim,
    claim_any,
    claim_group,
    free,
    free_within,
    sweep,
)
from bgjob._sql.enqueues import enqueue, enqueue_many
from bgjob._sql.key_rows import barred_keys
from bgjob._sql.notices import (
    CALLED,
    POSTS,
    SEATS,
    LockAnswer,
    Subscription,
    call,
    cancel_channel,
    channel,
    first_post,
    leave_post,
    release_notify_lock,
    subscribe,
    take_notify_lock,
)
from bgjob._sql.session import WORKER_SETTINGS, session
from bgjob._sql.settlements import (
    DeadLettered,
    Claimed,
    Postponed,
    dead_letter,
    complete,
    release_jobs,
    postpone,
)
from bgjob._sql.leases import barred, extend
from bgjob._sql.statement import Statement, text_array


def listen(conn: psycopg.Connection, statements: list[Statement[None]]) -> None:
    with conn.transaction():
        for statement in statements:
            ask(conn, statement)


def fill(conn: psycopg.Connection, count: int, *, queue: str = "q") -> None:
    """Write due jobs of five priorities, each due a millisecond after the one before."""
    conn.execute(
        "insert into bgjob_job (id, queue, type, arg, priority, next_run_at) "
        "select %s || lpad(n::text, 6, '0'), %s, 't', '{}', n %% 5, "
        "now() - interval '1 hour' + n * interval '1 ms' from generate_series(1, %s) n",
        (queue, queue, count),
    )


def claimed(conn: psycopg.Connection, limit: int, *, token: int = 1) -> list[Claimed]:
    jobs = ask(conn, sweep("q", limit=limit, lease=60, token=token)).jobs
    return [Claimed(job, token) for job in jobs]


# -- heap-only updates --------------------------------------------------------------------


def test_claims_and_extensions_are_heap_only_updates(worker: psycopg.Connection) -> None:
    def counts() -> tuple[int, int]:
        # Counts of finished transactions stay here until they are flushed.
        [found] = worker.execute(
            "select n_tup_upd, n_tup_hot_upd from pg_stat_xact_user_tables "
            "where relname = 'bgjob_job'"
        )
        return cast(tuple[int, int], found)

    def counted(statement: Statement[Any]) -> tuple[int, int]:
        with worker.transaction():
            before = counts()
            ask(worker, statement)
            after = counts()
        return after[0] - before[0], after[1] - before[1]

    fill(worker, 5_000)
    marks = dict.fromkeys(range(5), LONG_AGO)
    assert counted(sweep("q", limit=100, lease=60, token=1)) == (100, 100)
    assert counted(claim("q", limit=100, lease=60, token=2, marks=marks)) == (100, 100)
    held = [
        Claimed(Job._make([id_, *[None] * (len(Job._fields) - 1)]), token)
        for id_, token in worker.execute("select id, token from bgjob_job where token is not null")
    ]
    # No more of them than the pages have room for: transactions in other databases of
    # the server may keep the versions that are dead from being pruned.
    for _ in range(3):
        assert counted(extend(held, lease=60)) == (200, 200)


def test_no_index_covers_a_column_that_a_claim_changes(conn: psycopg.Connection) -> None:
    indexed = {
        column
        for (column,) in conn.execute(
            "select a.attname from pg_index i join pg_attribute a on a.attrelid = i.indrelid "
            "and a.attnum = any (i.indkey) where i.indrelid = 'bgjob_job'::regclass"
        )
    }
    assert indexed == {
        "id",
        "queue",
        "type",
        "priority",
        "next_run_at",
        "deaths",
        "exclusive",
        "waits",
        "group_id",
    }


# -- claims -----------------------------------------------------------------------------


def test_concurrent_claims_never_overlap(dsn: str, conn: psycopg.Connection) -> None:
    fill(conn, 4_000)
    got: list[list[str]] = [[] for _ in range(6)]
    start = threading.Barrier(len(got))

    def work(number: int) -> None:
        marks = dict.fromkeys(range(5), LONG_AGO)
        with psycopg.connect(dsn, autocommit=True) as mine:
            ask(mine, session(conn.info.backend_pid, WORKER_SETTINGS))
            start.wait(10)
            while True:
                if number % 2:
                    jobs = ask(mine, sweep("q", limit=37, lease=60, token=number)).jobs
                else:
                    marked = claim("q", limit=37, lease=60, token=number, marks=marks)
                    jobs = ask(mine, marked)
                if not jobs:
                    return
                got[number] += [job.id for job in jobs]

    threads = [threading.Thread(target=work, args=[number]) for number in range(len(got))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = Counter(id_ for ids in got for id_ in ids)
    assert len(runs) == 4_000
    assert set(runs.values()) == {1}
    held = conn.execute("select token, count(*) from bgjob_job group by token").fetchall()
    assert dict(held) == {number: len(ids) for number, ids in enumerate(got) if ids}
    assert conn.execute("select distinct attempt from bgjob_job").fetchall() == [(1,)]


@pytest.mark.parametrize("marks", [{0: LONG_AGO}, {0: LONG_AGO, 1: LONG_AGO}])
def test_a_claim_passes_over_uncommitted_claims_without_a_try_for_their_locks(
    dsn: str, conn: psycopg.Connection, marks: dict[int, datetime]
) -> None:
    fill(conn, 10)
    conn.execute("update bgjob_job set priority = 0")
    statement = claim("q", limit=4, lease=60, token=2, marks=marks)
    with psycopg.connect(dsn) as rival:
        assert len(ask(rival, claim("q", limit=3, lease=60, token=1, marks=marks))) == 3
        with conn.transaction(force_rollback=True):
            plan = conn.execute(
                cast(Any, "explain (analyze) " + cast(str, statement.text)), statement.params
            ).fetchall()
        assert any("Rows Removed by Filter: 3" in line for (line,) in plan)
        assert len(ask(conn, statement)) == 4
        rival.rollback()
    # What a claim has locked that was rolled back is claimed by the next one.
    assert len(ask(conn, claim("q", limit=9, lease=60, token=3, marks=marks))) == 6


def test_a_claim_takes_jobs_in_order_of_priority_and_due_time(worker: psycopg.Connection) -> None:
    fill(worker, 100)
    expected = [
        id_ for (id_,) in worker.execute("select id from bgjob_job order by priority, next_run_at")
    ]
    marks = dict.fromkeys(range(5), LONG_AGO)
    jobs = ask(worker, sweep("q", limit=30, lease=60, token=1)).jobs
    jobs += ask(worker, claim("q", limit=70, lease=60, token=1, marks=marks))
    assert [job.id for job in jobs] == expected


def test_a_claim_starts_at_its_marks(worker: psycopg.Connection) -> None:
    worker.execute(
        "insert into bgjob_job (id, queue, type, priority, next_run_at) "
        "select ago::text, 'q', 't', 0, now() - ago * interval '1 s' "
        "from unnest('{10, 100, 1000}'::int[]) ago"
    )
    [(mark,)] = worker.execute("select now() - interval '1 s'")

    def found(**options: Any) -> list[str]:
        with worker.transaction(force_rollback=True):
            statement = claim("q", limit=9, lease=60, token=1, **options)
            return [job.id for job in ask(worker, statement)]

    assert found(marks={0: mark}) == []
    assert found(marks={0: mark - timedelta(seconds=50)}) == ["10"]
    assert found(marks={0: mark - timedelta(seconds=500)}) == ["100", "10"]
    assert found(marks={1: LONG_AGO}) == []
    assert found(marks={0: LONG_AGO, 1: LONG_AGO}) == ["1000", "100", "10"]


def spoil_leases(conn: psycopg.Connection) -> None:
    """Hold the first job, end the second one's lease, and leave the third."""
    conn.execute(
        "update bgjob_job set token = 9, attempt = 1, lease_until = clock_timestamp() + case id "
        "when 'q000001' then interval '1 hour' when 'q000002' then interval '-1 ms' end "
        "where id < 'q000003'"
    )


def test_a_sweep_skips_held_jobs_and_frees_those_whose_lease_has_ended(
    worker: psycopg.Connection,
) -> None:
    fill(worker, 3)
    spoil_leases(worker)
    assert not any(line.has_suspects for line in ask(worker, survey("q")))
    swept = ask(worker, sweep("q", limit=9, lease=60, token=1))
    assert [(job.id, job.attempt) for job in swept.jobs] == [("q000003", 1)]
    assert swept.freed == 1
    assert worker.execute(
        "select token, attempt, deaths from bgjob_job where id = 'q000002'"
    ).fetchall() == [(None, 1, 1)]
    # One death makes no suspect.
    assert not any(line.has_suspects for line in ask(worker, survey("q")))
    worker.execute("update bgjob_job set deaths = 2 where deaths = 1")
    assert all(line.has_suspects for line in ask(worker, survey("q")))


def test_a_sweep_that_frees_nothing_names_no_place_to_look_at(worker: psycopg.Connection) -> None:
    window = Window(LONG_AGO, datetime.now(UTC), (0,))
    found = [
        sweep("q", limit=9, lease=60, token=1),
        free("q", limit=9),
        free_within("q", window, limit=9),
    ]
    assert [ask(worker, each) for each in found] == [Swept([], 0, held_back=[])] * 3
    fill(worker, 3)
    spoil_leases(worker)
    worker.execute("update bgjob_job set deaths = 1 where id = 'q000002'")
    # What was freed is a suspect now, which a group claims and no look finds.
    assert ask(worker, free("q", limit=9)) == Swept([], 1, held_back=[])


def test_every_sweep_says_whether_there_are_exclusive_keys(worker: psycopg.Connection) -> None:
    others = Rations(limited=["limited"])
    sweeps: list[Statement[Swept]] = [
        sweep("q", limit=9, lease=60, token=1),
        sweep("q", limit=9, lease=60, token=1, rations=others),
        free("q", limit=9),
        free_within("q", Window(LONG_AGO, datetime.now(UTC), (0,)), limit=9),
    ]
    assert [ask(worker, each).has_keys for each in sweeps] == [False] * 4
    worker.execute("insert into bgjob_exclusive (key) values ('k')")
    assert [ask(worker, each).has_keys for each in sweeps] == [True] * 4


def test_jobs_whose_lease_has_ended_are_freed_without_claiming_anything(
    worker: psycopg.Connection,
) -> None:
    fill(worker, 3)
    spoil_leases(worker)
    assert ask(worker, free("q", limit=9))[:2] == ([], 1)
    assert worker.execute("select token, deaths from bgjob_job order by id").fetchall() == [
        (9, 0),
        (None, 1),
        (None, 0),
    ]


def test_jobs_that_the_worker_itself_holds_are_not_freed(worker: psycopg.Connection) -> None:
    fill(worker, 3)
    worker.execute(
        "update bgjob_job set lease_until = clock_timestamp() - interval '1 ms', attempt = 1, "
        "token = case id when 'q000001' then 8 when 'q000002' then 9 end"
    )
    tokens = "select token from bgjob_job order by id"
    assert ask(worker, free("q", limit=9, held=[8, 9]))[:2] == ([], 1)  # spoiled: it has no token
    assert worker.execute(tokens).fetchall() == [(8,), (9,), (None,)]
    assert ask(worker, sweep("q", limit=9, lease=60, token=1, held=[8])).freed == 1
    assert worker.execute(tokens).fetchall()[:2] == [(8,), (None,)]


@pytest.mark.parametrize("way", ["sweep", "free", "free_within"])
def test_a_job_claimed_without_an_answer_is_restored_before_its_lease_ends(
    worker: psycopg.Connection, way: str
) -> None:
    fill(worker, 5)
    marks = dict.fromkeys(range(5), LONG_AGO)
    assert len(ask(worker, claim("q", limit=9, lease=60, token=7, marks=marks))) == 5
    worker.execute(
        "update bgjob_job set deaths = case id when 'q000002' then 1 when 'q000003' then 2 "
        "else 0 end, token = case id when 'q000004' then 8 when 'q000005' then null else 7 end"
    )
    window = Window(LONG_AGO, datetime(9000, 1, 1, tzinfo=UTC), tuple(range(5)))
    statement = {
        "sweep": sweep("q", limit=9, lease=60, token=1, held=[3], unanswered=[6, 7]),
        "free": free("q", limit=9, held=[3], unanswered=[6, 7]),
        "free_within": free_within("q", window, limit=9, held=[3], unanswered=[6, 7]),
    }[way]
    swept = ask(worker, statement)
    assert (swept.jobs, swept.freed) == ([], 3)
    assert swept.since is not None
    rows = worker.execute(
        "select token, lease_until is null, attempt, deaths from bgjob_job order by id"
    ).fetchall()
    # Whether a group of suspects was charged is unknown.
    assert rows == [
        (None, True, 0, 0),
        (None, True, 0, 1),
        (None, True, 1, 2),
        (8, False, 1, 0),
        (None, False, 1, 0),
    ]


def test_half_of_the_suspects_with_the_most_deaths_are_claimed_and_by_no_other_claim(
    worker: psycopg.Connection,
) -> None:
    fill(worker, 20)
    # One of them has one death, as a fresh job may.
    worker.execute(
        "update bgjob_job set attempt = 2, deaths = case when id < 'q000009' then 3 "
        "when id < 'q000019' then 2 when id = 'q000019' then 1 else 0 end"
    )
    marks = dict.fromkeys(range(5), LONG_AGO)
    others = ask(worker, claim("q", limit=9, lease=60, token=1, marks=marks))
    assert {job.id for job in others} == {"q000019", "q000020"}
    assert ask(worker, sweep("q", limit=9, lease=60, token=2))[:2] == ([], 0)
    claims = [claim_group("q", limit=9, lease=60, token=n, charge=True) for n in (4, 5, 6, 7, 8)]
    groups = [ask(worker, claim).jobs for claim in claims]
    # Half of the rest of 8 with three deaths and 10 with two: of the larger class at an even
    # token, of the first at 5, and of the second at 7.
    assert [(len(group), group[0].id < "q000009") for group in groups] == [
        (5, False),
        (4, True),
        (3, False),
        (1, False),
        (2, True),
    ]
    groups += [
        ask(worker, claim_group("q", limit=9, lease=60, token=n, charge=True)).jobs
        for n in range(9, 15)
    ]
    # A suspect that is alone is charged an attempt.
    assert [len(group) for group in groups[5:]] == [1, 1, 1, 0, 0, 0]
    for group in groups:
        assert {job.attempt for job in group} <= {3 if len(group) == 1 else 2}
    assert worker.execute("select count(*) from bgjob_job where token is null").fetchall() == [(0,)]


def test_a_group_is_no_larger_than_the_free_slots(worker: psycopg.Connection) -> None:
    fill(worker, 20)
    worker.execute("update bgjob_job set deaths = 2")
    assert len(ask(worker, claim_group("q", limit=7, lease=60, token=1, charge=True)).jobs) == 7
    assert len(ask(worker, claim_group("q", limit=1, lease=60, token=2, charge=True)).jobs) == 1
    assert len(ask(worker, claim_group("q", limit=9, lease=60, token=3, charge=True)).jobs) == 6


def test_what_did_not_start_goes_back_with_what_it_was_charged(
    worker: psycopg.Connection,
) -> None:
    fill(worker, 3)
    worker.execute("update bgjob_job set deaths = 5, attempt = 4")
    before = worker.execute("select id, attempt, deaths from bgjob_job order by id").fetchall()
    group = ask(worker, claim_group("q", limit=9, lease=60, token=1, charge=True)).jobs
    alone = ask(worker, claim_group("q", limit=9, lease=60, token=2, charge=True)).jobs
    assert (len(group), len(alone)) == (2, 1)
    claims = [
        *(Claimed(job, 1, is_charged=False) for job in group),
        *(Claimed(job, 2) for job in alone),
    ]
    ask(worker, release_jobs("q", claims, tell=False))
    after = worker.execute("select id, attempt, deaths from bgjob_job order by id").fetchall()
    assert after == before


def test_one_job_is_claimed_even_if_its_last_worker_died(
    worker: psycopg.Connection,
) -> None:
    fill(worker, 3)
    spoil_leases(worker)
    worker.execute("update bgjob_job set deaths = 4 where id = 'q000003'")
    taken = [ask(worker, claim_any("q", lease=60, token=3)) for _ in range(3)]
    assert [(job.id, job.attempt) for jobs in taken for job in jobs] == [
        ("q000002", 2),
        ("q000003", 1),
    ]


def test_a_lease_ends_by_the_databases_clock(worker: psycopg.Connection) -> None:
    fill(worker, 1)
    [(before,)] = worker.execute("select clock_timestamp()")
    held = claimed(worker, 1)
    [(first,)] = worker.execute("select lease_until from bgjob_job")
    assert first >= before + timedelta(seconds=60)
    ask(worker, extend(held, lease=3600))
    [(second,)] = worker.execute("select lease_until from bgjob_job")
    assert second >= before + timedelta(seconds=3600)


def test_a_survey_lists_the_priorities_in_use_and_when_the_next_job_of_each_is_due(
    worker: psycopg.Connection,
) -> None:
    requests = [
        EnqueueRequest("q", "t", priority=-7),
        EnqueueRequest("q", "t", priority=3, delay=1000),
        EnqueueRequest("q", "t", priority=3, delay=2000),
        EnqueueRequest("other", "t", priority=5),
    ]
    ask(worker, enqueue_many(requests, notify=False))
    lines = ask(worker, survey("q"))
    assert [(line.priority, line.wait is None) for line in lines] == [(-7, True), (3, False)]
    assert lines[1].wait is not None
    assert 0 < lines[1].wait <= 1000


# -- jobs that are delayed --------------------------------------------------------------------

DELAYED = 100_000

DEEPER = 20
"""The most pages more that a statement touches in a larger index: a level for each of its looks."""

LOOKS: dict[str, Statement[Any]] = {
    "claim": claim("q", limit=100, lease=60, token=1, marks={0: LONG_AGO, 1: LONG_AGO}),
    "claim of one priority": claim("q", limit=100, lease=60, token=1, marks={1: LONG_AGO}),
    "claim of a group": claim_group("q", limit=9, lease=60, token=1, charge=True),
    "sweep": sweep("q", limit=100, lease=60, token=1),
    "survey of a sweep": survey("q"),
    "free": free("q", limit=100),
}
"""The statements of a worker that looks for jobs."""


def delay(conn: psycopg.Connection, first: int, last: int) -> None:
    """Write jobs of the highest priority that are due in an hour."""
    conn.execute(
        "insert into bgjob_job (id, queue, type, arg, priority, next_run_at) "
        "select 'delayed ' || n, 'q', 't', '{}', 0, "
        "now() + interval '1 hour' + n * interval '1 ms' from generate_series(%s::int, %s) n",
        [first, last],
    )


def test_delayed_jobs_of_a_higher_priority_in_front_are_not_looked_at(
    worker: psycopg.Connection, conn: psycopg.Connection
) -> None:
    conn.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    conn.execute(
        "insert into bgjob_job (id, queue, type, arg, priority, next_run_at, deaths) "
        "select 'due ' || n, 'q', 't', '{}', 1, "
        "now() - interval '1 hour' + n * interval '1 ms', 2 * (n <= 5)::int "
        "from generate_series(1, 1000) n"
    )
    explains = {name: prepare(worker, name, statement) for name, statement in LOOKS.items()}
    of_a_client = prepare(conn, "any", claim_any("q", lease=60, token=1))

    def look(conn: psycopg.Connection, explain: str, mode: str) -> int:
        # What the run before this one undid would be looked at again.
        conn.execute("vacuum (index_cleanup on) bgjob_job")
        return buffers(run(conn, explain, mode))

    def touched() -> dict[tuple[str, str], int]:
        pages = {
            (name, mode): look(worker, explain, mode)
            for name, explain in explains.items()
            for mode in PLAN_CACHE_MODES
        }
        # The driver does not prepare it: it is planned each time.
        mode = "force_custom_plan"
        return pages | {("claim of any", mode): look(conn, of_a_client, mode)}

    delay(conn, 1, 1)
    touched()  # a row that was locked before takes a page more
    few = touched()
    delay(conn, 2, DELAYED)
    many = touched()
    assert {look: pages for look, pages in many.items() if pages > few[look] + DEEPER} == {}
    conn.execute("analyze bgjob_job")
    many = touched()
    assert {look: pages for look, pages in many.items() if pages > few[look] + DEEPER} == {}


# -- fences ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settle",
    [
        complete,
        lambda held: postpone([Postponed(c, 0.0, "why", refund=True) for c in held]),
        lambda held: release_jobs("q", held, tell=False),
        lambda held: dead_letter([DeadLettered(c, "why", 1) for c in held]),
        lambda held: extend(held, lease=3600),
    ],
    ids=["complete", "postpone", "release_jobs", "dead_letter", "extend"],
)
def test_a_settlement_changes_only_jobs_that_its_token_still_holds(
    worker: psycopg.Connection, settle: Callable[[list[Claimed]], Statement[list[str]]]
) -> None:
    fill(worker, 6)
    held = claimed(worker, 3, token=1) + claimed(worker, 3, token=2)
    stolen = {held[0].job.id, held[4].job.id}
    worker.execute("update bgjob_job set token = 3 where id = any (%s)", [list(stolen)])
    theirs = "select * from bgjob_job where token = 3 order by id"
    before = worker.execute(theirs).fetchall()
    assert set(ask(worker, settle(held))) == {c.job.id for c in held} - stolen
    assert worker.execute(theirs).fetchall() == before
    assert ask(worker, settle([Claimed(held[0].job, 4)])) == []


def test_a_postponed_job_is_free_due_and_charged_as_requested(
    worker: psycopg.Connection,
) -> None:
    fill(worker, 3)
    worker.execute("update bgjob_job set last_error = 'before'")
    one, two, three = sorted(claimed(worker, 3))
    [(before,)] = worker.execute("select clock_timestamp()")
    ask(
        worker,
        postpone(
            [
                Postponed(one, 0.0, "why", refund=False),
                Postponed(two, 50.5, None, refund=False),
                Postponed(three, 100.0, None, refund=True),
            ]
        ),
    )
    found = worker.execute(
        "select attempt, last_error, token, lease_until, next_run_at, updated_at "
        "from bgjob_job order by id"
    ).fetchall()
    assert [row[:4] for row in found] == [
        (1, "why", None, None),
        (1, "before", None, None),
        (0, "before", None, None),
    ]
    for row, delay in zip(found, (0.0, 50.5, 100.0), strict=True):
        assert row[4] >= before + timedelta(seconds=delay)
        assert row[5] >= before


@pytest.mark.parametrize("sleeper", ["nobody", "another session", "its own session"])
def test_a_released_job_is_as_before_its_claim_and_wakes_sleeping_workers(
    worker: psycopg.Connection, dsn: str, sleeper: str
) -> None:
    fill(worker, 3)
    worker.execute("update bgjob_job set priority = 2, deaths = 0")
    columns = (
        "select id, attempt, token, lease_until, next_run_at, priority from bgjob_job order by id"
    )
    before = worker.execute(columns).fetchall()
    held = claimed(worker, 3)
    with psycopg.connect(dsn, autocommit=True) as other:
        listen(other, subscribe("q", Subscription()))
        if sleeper != "nobody":
            assert (
                ask(other if sleeper == "another session" else worker, take_notify_lock("q")).answer
                == "taken"
            )
        told = ask(worker, release_jobs("q", held, tell=sleeper == "its own session"))
        assert sorted(told) == sorted(c.job.id for c in held)
        assert worker.execute(columns).fetchall() == before
        since = min(c.job.next_run_at for c in held)
        heard = (
            [n.payload for n in other.notifies(timeout=5, stop_after=1)]
            if (sleeper != "nobody")
            else [n.payload for n in other.notifies(timeout=0)]
        )
    expected = [] if sleeper == "nobody" else [Notice({2: since})]
    assert [Notice.read(payload, "q") for payload in heard] == expected


def test_an_extension_passes_over_a_row_that_others_have_locked(
    worker: psycopg.Connection, dsn: str
) -> None:
    fill(worker, 3)
    locked, *others = sorted(claimed(worker, 3))
    before: dict[str, datetime] = dict(
        worker.execute("select id, lease_until from bgjob_job").fetchall()
    )
    worker.execute("set lock_timeout = '50ms'")
    with psycopg.connect(dsn) as other:
        other.execute("select from bgjob_job where id = %s for update", [locked.job.id])
        held = ask(worker, extend([locked, *others], lease=7200))
    assert set(held) == before.keys()  # it is held as before
    after: dict[str, datetime] = dict(
        worker.execute("select id, lease_until from bgjob_job").fetchall()
    )
    longer = {id_ for id_ in before if after[id_] > before[id_]}
    assert longer == {c.job.id for c in others}


def test_rows_and_keys_that_others_have_locked_are_reported_without_waiting(
    worker: psycopg.Connection, dsn: str
) -> None:
    fill(worker, 4)
    held = claimed(worker, 4)
    taken, gone, locked, free = sorted(held)
    worker.execute("update bgjob_job set token = 9 where id = %s", [taken.job.id])
    worker.execute("delete from bgjob_job where id = %s", [gone.job.id])
    worker.execute("insert into bgjob_exclusive (key) values ('k'), ('l')")
    with psycopg.connect(dsn) as other:
        other.execute(
            "select from bgjob_job where id = any (%s) for update", [[taken.job.id, locked.job.id]]
        )
        other.execute("select from bgjob_exclusive where key = 'l' for update")
        assert ask(worker, barred(held)) == [locked.job.id]
        assert ask(worker, barred_keys(["k", "l", "m"])) == ["l"]
    assert ask(worker, barred([locked, free])) == []
    assert ask(worker, barred_keys(["k", "l", "m"])) == []


def test_a_postponed_job_has_the_requested_priority_or_keeps_its_own(
    worker: psycopg.Connection,
) -> None:
    fill(worker, 3)
    worker.execute("update bgjob_job set priority = 7")
    one, two, three = sorted(claimed(worker, 3))
    ask(
        worker,
        postpone(
            [
                Postponed(one, 0.0, None, refund=False, priority=-5),
                Postponed(two, 0.0, None, refund=False),
                Postponed(three, 0.0, None, refund=True, priority=0),
            ]
        ),
    )
    found = worker.execute("select priority from bgjob_job order by id").fetchall()
    assert found == [(-5,), (7,), (0,)]


def test_hostile_ids_and_errors_pass_through_every_settlement(worker: psycopg.Connection) -> None:
    texts = ["NULL", "", "{}", 'a"b', "a\\b", "a,b", "'", " ", "%s", "é\U0001f600", "\n"]
    assert worker.execute("select %s::text[]", [text_array(texts)]).fetchall() == [(texts,)]
    ids = [f"{text}!" for text in texts]
    for id_ in ids:
        assert ask(worker, enqueue(EnqueueRequest("q", "t", id=id_), notify=False))
    held = claimed(worker, 99)
    assert sorted(ask(worker, extend(held, lease=60))) == sorted(ids)
    errors = {c.job.id: c.job.id[:-1] for c in held}
    back = [Postponed(c, 0.0, errors[c.job.id], refund=False) for c in held]
    assert sorted(ask(worker, postpone(back))) == sorted(ids)
    assert dict(worker.execute("select id, last_error from bgjob_job").fetchall()) == errors
    held = claimed(worker, 99)
    dead = [DeadLettered(c, errors[c.job.id], 1) for c in held[:5]]
    assert sorted(ask(worker, dead_letter(dead))) == sorted(b.claimed.job.id for b in dead)
    stored: dict[str, str] = dict(
        worker.execute("select job_id, last_error from bgjob_dead_job").fetchall()
    )
    assert stored == {b.claimed.job.id: b.error for b in dead}
    assert len(ask(worker, complete(held[5:]))) == len(ids) - 5


# -- notification -----------------------------------------------------------------------------


def test_an_enqueue_notifies_only_while_somebody_sleeps(dsn: str, conn: psycopg.Connection) -> None:
    def told(statement: Statement[Any]) -> list[str]:
        ask(conn, statement)
        conn.execute("notify sentinel")
        payloads: list[str] = []
        for notice in sleeper.notifies(timeout=20):
            if notice.channel == "sentinel":
                return payloads
            payloads.append(notice.payload)
        raise AssertionError("no sentinel")

    def queues(statement: Statement[Any]) -> list[str]:
        return [payload.split(" ", 2)[2] for payload in told(statement)]

    one, many = EnqueueRequest("q", "t"), [EnqueueRequest("q", "t"), EnqueueRequest("r", "t")]
    with psycopg.connect(dsn, autocommit=True) as sleeper:
        sleeper.execute("listen sentinel")
        sleeper.execute(f"listen {channel('q')}".encode())
        sleeper.execute(f"listen {channel('r')}".encode())
        assert told(enqueue(one, notify=True)) == []
        assert ask(sleeper, take_notify_lock("q")).answer == "taken"
        assert told(enqueue(one, notify=True)) == []  # the id is taken: nothing was written
        assert queues(enqueue(EnqueueRequest("q", "t"), notify=True)) == ["q"]
        assert told(enqueue(EnqueueRequest("q", "t"), notify=False)) == []
        assert queues(enqueue_many(many, notify=True)) == ["q"]
        assert told(enqueue_many(many, notify=True)) == []
        assert ask(sleeper, take_notify_lock("r")).answer == "taken"
        more = [EnqueueRequest("q", "t"), EnqueueRequest("r", "t")]
        assert sorted(queues(enqueue_many(more, notify=True))) == ["q", "r"]
        assert ask(conn, take_notify_lock("q")).answer == "deputy"
        ask(sleeper, release_notify_lock("q"))
        assert told(enqueue(EnqueueRequest("q", "t"), notify=True)) == [""]
        assert told(enqueue(EnqueueRequest("q", "t"), notify=True)) == []


def test_a_notification_carries_the_start_of_its_transaction(
    dsn: str, conn: psycopg.Connection
) -> None:
    queue = "a queue, or two"
    with psycopg.connect(dsn, autocommit=True) as sleeper:
        listen(sleeper, subscribe(queue, Subscription()))
        assert ask(sleeper, take_notify_lock(queue)).answer == "taken"
        for write in (enqueue, lambda r, notify: enqueue_many([r], notify=notify)):
            with conn.transaction():
                [(began,)] = conn.execute("select extract(epoch from now())::float8")
                conn.execute("select pg_sleep(0.01)")
                for _ in range(3):  # they are one notification
                    ask(conn, write(EnqueueRequest(queue, "t"), notify=True))
            [notice] = sleeper.notifies(timeout=30, stop_after=1)
            since, priority, told = notice.payload.split(" ", 2)
            assert (float(since), priority, told) == (began, "0", queue)
        assert list(sleeper.notifies(timeout=0)) == []


def test_a_worker_that_took_the_notify_lock_twice_releases_it_once(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as sleeper:
        for _ in range(2):  # an exchange that is refused leaves the lock behind
            assert ask(sleeper, take_notify_lock("q")).answer == "taken"
        ask(sleeper, release_notify_lock("q"))
        locks = "select count(*) from pg_locks where locktype = 'advisory' and pid = %s"
        [(held,)] = sleeper.execute(locks, [sleeper.info.backend_pid])
        assert held == 0


def test_one_deputy_watches_for_the_end_of_the_worker_that_is_notified(dsn: str) -> None:
    with ExitStack() as stack:
        holder, deputy, other = (
            stack.enter_context(psycopg.connect(dsn, autocommit=True)) for _ in range(3)
        )
        assert ask(holder, take_notify_lock("q")).answer == "taken"
        assert ask(deputy, take_notify_lock("q")).answer == "deputy"
        assert ask(deputy, take_notify_lock("q", is_deputy=True)).answer == "deputy"
        assert ask(other, take_notify_lock("q")).answer == "covered"
        listen(other, subscribe("q", Subscription()))
        holder.close()
        locks: LiteralString = (
            "select count(*) from pg_locks where locktype = 'advisory' "
            "and database = (select oid from pg_database where datname = current_database())"
        )
        assert eventually(lambda: deputy.execute(locks).fetchall() == [(1,)])
        assert ask(deputy, take_notify_lock("q", is_deputy=True, relieve=True)).answer == "taken"
        assert [n.payload for n in other.notifies(timeout=30, stop_after=1)] == [""]
        assert ask(other, take_notify_lock("q")).answer == "deputy"  # its place was free
        deputy.close()
        assert eventually(lambda: other.execute(locks).fetchall() == [(1,)])


def test_a_queue_has_sixteen_posts_and_a_worker_that_leaves_one_frees_it(dsn: str) -> None:
    locks = "select count(*) from pg_locks where locktype = 'advisory' and pid = %s"

    def has_post(worker: psycopg.Connection, queue: str = "q") -> bool:
        return ask(worker, take_notify_lock(queue, asks_post=True)).has_post

    with ExitStack() as stack:
        holder, *workers = (
            stack.enter_context(psycopg.connect(dsn, autocommit=True)) for _ in range(POSTS + 2)
        )
        assert ask(holder, take_notify_lock("q", asks_post=True)) == ("taken", False, None, False)
        assert holder.execute(locks, [holder.info.backend_pid]).fetchall() == [(1,)]
        assert [has_post(worker) for worker in workers] == [True] * POSTS + [False]
        ask(holder, take_notify_lock("another"))
        assert has_post(workers[-1], "another")
        ask(workers[-1], leave_post())
        ask(workers[3], leave_post())
        assert has_post(workers[-1])
        assert not has_post(workers[3])
        workers[5].close()  # as if it had died
        assert eventually(lambda: has_post(workers[3]))
        ask(workers[3], release_notify_lock("q"))
        assert workers[3].execute(locks, [workers[3].info.backend_pid]).fetchall() == [(0,)]


def test_a_spare_has_a_seat_until_it_has_the_lock_a_post_or_the_place_of_the_deputy(
    dsn: str,
) -> None:
    locks = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"

    def take(worker: psycopg.Connection, **has: Any) -> tuple[LockAnswer, int]:
        answer = ask(worker, take_notify_lock("q", asks_post=True, **has))
        [(held,)] = worker.execute(locks)
        return answer, held

    with ExitStack() as stack:
        holder, deputy, *posted, one, other = (
            stack.enter_context(psycopg.connect(dsn, autocommit=True)) for _ in range(POSTS + 3)
        )
        assert take(holder) == (("taken", False, None, False), 1)
        assert take(deputy) == (("deputy", True, None, False), 2)
        for worker in posted:
            assert take(worker) == (("covered", True, None, False), 1)
        seat = first_post("q") + POSTS
        assert take(one) == (("covered", False, seat, False), 2)
        assert take(one, seat=seat) == (("covered", False, seat, False), 2)
        assert take(other) == (("covered", False, seat + 1, True), 2)
        ask(posted[0], leave_post())
        assert take(other, seat=seat + 1) == (("covered", True, None, True), 1)
        assert take(posted[0]) == (("covered", False, seat + 1, True), 2)
        ask(deputy, leave_post())
        ask(posted[1], take_notify_lock("q"))  # is the deputy
        assert take(deputy) == (("covered", True, None, True), 1)
        ask(posted[1], leave_post())
        assert take(posted[2]) == (("deputy", True, None, True), 3)
        ask(posted[2], leave_post())
        for worker in (posted[1], posted[3]):
            ask(worker, take_notify_lock("q", is_deputy=True, asks_post=True))
        assert take(one, seat=seat) == (("deputy", False, None, True), 1)
        ask(holder, release_notify_lock("q"))
        assert take(posted[0], seat=seat + 1) == (("taken", False, None, False), 1)


def test_spares_have_as_many_seats_as_there_are_and_each_is_called_by_its_own(
    dsn: str, conn: psycopg.Connection
) -> None:
    def heard(workers: list[psycopg.Connection]) -> list[int]:
        conn.execute("notify sentinel")
        calls: list[int] = []
        for number, worker in enumerate(workers):
            for notice in worker.notifies(timeout=20):
                if notice.channel == "sentinel":
                    break
                assert notice.payload == ""
                calls.append(number)
        return calls

    with ExitStack() as stack:
        ask(conn, take_notify_lock("q"))
        conn.execute(
            "select pg_advisory_lock(post) from generate_series(%s, %s) as post",
            [first_post("q"), first_post("q") + POSTS - 1],
        )
        deputy, *spares, last = (
            stack.enter_context(psycopg.connect(dsn, autocommit=True)) for _ in range(5)
        )
        ask(deputy, take_notify_lock("q"))
        ask(conn, call("q"))  # nobody
        for spare in spares:
            seat = ask(spare, take_notify_lock("q", asks_post=True)).seat
            listen(spare, subscribe("q", Subscription(enqueues=False, seat=seat)))
            spare.execute("listen sentinel")
        called: set[int] = set()
        for _ in range(40):
            ask(conn, call("q"))
            each = heard(spares)
            assert len(each) == len(set(each)) == CALLED
            called.update(each)
        assert called == {0, 1, 2}  # all of 40 would leave out one of three once in 3 ** 40
        ask(spares[0], call("q"))  # not itself
        assert heard(spares) == [1, 2]
        ask(spares[0], leave_post())
        listen(spares[1], subscribe("q", Subscription()))
        ask(spares[1], leave_post())
        spares[1].execute("listen sentinel")
        ask(conn, call("q"))
        assert heard(spares) == [2]
        conn.execute(  # but for the last seat, and that of the third spare
            "select pg_try_advisory_lock(seat) from generate_series(%s, %s) as seat",
            [first_post("q") + POSTS, first_post("q") + POSTS + SEATS - 2],
        )
        asks = take_notify_lock("q", asks_post=True)
        assert ask(spares[0], asks).seat == first_post("q") + POSTS + SEATS - 1
        assert ask(last, asks) == ("covered", False, None, True)


def test_a_session_is_notified_of_what_it_has_subscribed_to_and_of_nothing_else(
    dsn: str, conn: psycopg.Connection
) -> None:
    channels = 'select channel from pg_listening_channels() as channel order by channel collate "C"'
    with psycopg.connect(dsn, autocommit=True) as worker:
        for to, also in (
            (Subscription(), ["bgjob", channel("q")]),
            (Subscription(enqueues=False, seat=-5), ["bgjob_call_-5"]),
            (Subscription(enqueues=False), []),
            (Subscription(), ["bgjob", channel("q")]),
        ):
            listen(worker, subscribe("q", to))
            found = [name for (name,) in worker.execute(channels)]
            assert found == sorted([*also, cancel_channel("q")])


def test_no_worker_sleeps_while_an_enqueue_is_in_flight(dsn: str, conn: psycopg.Connection) -> None:
    with psycopg.connect(dsn, autocommit=True) as sleeper:
        with conn.transaction():
            ask(conn, enqueue(EnqueueRequest("q", "t"), notify=True))
            assert ask(sleeper, take_notify_lock("q")).answer == "contended"
        assert ask(sleeper, take_notify_lock("q", is_deputy=True)).answer == "taken"
        locks = "select count(*) from pg_locks where locktype = 'advisory' and pid = %s"
        [(held,)] = conn.execute(locks, [sleeper.info.backend_pid])
        assert held == 1


def test_a_sweep_within_a_window_frees_and_finds_only_jobs_of_that_window(
    worker: psycopg.Connection,
) -> None:
    fill(worker, 12)  # of priorities 0 to 4, a millisecond apart
    due: dict[str, datetime] = dict(
        worker.execute("select id, next_run_at from bgjob_job").fetchall()
    )
    first, second, *others = sorted(due, key=due.__getitem__)
    worker.execute(
        "update bgjob_job set token = 1, lease_until = now() - interval '1 s', attempt = 1 "
        "where id = any (%s)",
        [[first, second, others[0], others[-1]]],
    )
    window = Window(due[second], due[others[-1]], (0, 2, 3, 4))
    assert ask(worker, free_within("q", window, limit=9, held=[])).freed == 2
    assert ask(worker, free_within("q", window, limit=9, held=[])).freed == 0
    held = worker.execute("select id from bgjob_job where token = 1 order by next_run_at")
    assert held.fetchall() == [(first,), (others[-1],)]
    found = {stray.priority: stray.since for stray in ask(worker, strays("q", window))}
    fresh: dict[int, datetime] = {}
    for id_, priority in worker.execute(
        "select id, priority from bgjob_job where id = any (%s) order by next_run_at",
        [[second, *others[:-1]]],
    ).fetchall():
        fresh.setdefault(priority, due[id_])
    fresh.pop(1)
    assert found == fresh


@pytest.mark.parametrize("known", [(), (0,), (2, 3), (-(2**15), 0, 4, 2**15 - 1)])
def test_a_survey_that_knows_priorities_finds_the_others_too(
    worker: psycopg.Connection, known: tuple[int, ...]
) -> None:
    fill(worker, 12)
    expected = {line.priority: line[2:] for line in ask(worker, survey("q"))}
    lines: dict[int, Any] = {}
    while True:  # one between two known ones at a time
        window = Window(LONG_AGO, LONG_AGO, tuple(sorted({*known, *lines})))
        found = {line.priority: line[2:] for line in ask(worker, survey_known("q", window))}
        if found.keys() == lines.keys():
            break
        lines = found
    assert {p: line for p, line in lines.items() if p in expected} == expected
    assert lines.keys() - expected.keys() <= set(known)


# -- watermarks -------------------------------------------------------------------------------


def number_of(conn: psycopg.Connection) -> int:
    [(number,)] = conn.execute("select pg_current_xact_id()::text::bigint").fetchall()
    return int(number)


def test_after_a_claim_each_transaction_is_seen_that_is_under_way(
    dsn: str, conn: psycopg.Connection
) -> None:
    with psycopg.connect(dsn) as earlier, psycopg.connect(dsn) as other:
        ask(earlier, enqueue(EnqueueRequest("q", "t"), notify=False))
        with conn.transaction():
            # None that began later has ended: a snapshot alone does not show it.
            mine = number_of(conn)
            seen = ask(conn, open_transactions(surely=False))
        assert number_of(earlier) in seen.numbers
        assert mine not in seen.numbers
        assert seen.is_complete
        ask(other, enqueue(EnqueueRequest("q", "t"), notify=False))
        assert number_of(other) not in seen.numbers
        earlier.commit()
        with conn.transaction():
            number_of(conn)
            seen = ask(conn, open_transactions(surely=False))
        assert number_of(other) in seen.numbers
        assert number_of(earlier) not in seen.numbers


def test_every_transaction_under_way_is_seen_by_a_session_with_a_number_of_its_own(
    dsn: str, conn: psycopg.Connection
) -> None:
    with psycopg.connect(dsn) as other:
        ask(other, enqueue(EnqueueRequest("q", "t"), notify=False))
        seen = ask(conn, open_transactions(surely=True))
        assert number_of(other) in seen.numbers
        assert seen.is_complete
        assert not ask(conn, open_transactions(surely=False)).is_complete
        assert ask(conn, open_transactions(surely=False)).at >= seen.at


def test_many_savepoints_of_others_are_not_all_listed(dsn: str, conn: psycopg.Connection) -> None:
    with psycopg.connect(dsn) as other:
        number_of(other)
        other.execute(
            """
            create temp table t ();
            do $$ begin for n in 1..3000 loop
                begin insert into t default values;
                exception when division_by_zero then null; end;
            end loop; end $$
            """
        )
        seen = ask(conn, open_transactions(surely=True))
        assert number_of(other) in seen.numbers
        assert len(seen.numbers) < 2000


def job_due(at: datetime, *, priority: int = 0) -> Job:
    return Job("id", "q", "t", None, 1, None, priority, at, at, at)


def test_a_mark_follows_the_last_due_time_that_was_claimed() -> None:
    marks = Watermarks(poll_interval=1.0)
    second = timedelta(seconds=1)
    assert not marks.known
    marks.claimed([job_due(LONG_AGO), job_due(LONG_AGO + second, priority=5)], full=False)
    assert marks.known
    assert marks.start(0.0) == {0: LONG_AGO, 5: LONG_AGO + second}
    marks.claimed([job_due(LONG_AGO - second)], full=False)  # one found behind the mark
    assert marks.start(0.0)[0] == LONG_AGO


def test_the_mark_of_a_full_claim_goes_back_to_its_last_job() -> None:
    marks = Watermarks(poll_interval=1.0)
    marks.claimed([job_due(LONG_AGO)], full=False)
    marks.claimed([job_due(LONG_AGO - timedelta(seconds=1))], full=True)
    assert marks.start(0.0) == {0: LONG_AGO - timedelta(seconds=1)}


def test_a_sweep_teaches_priorities_and_rests_forty_times_its_cost() -> None:
    marks = Watermarks(poll_interval=1.0)
    assert marks.sweep_at < 0  # immediately
    seen = OpenTransactions(LONG_AGO, frozenset(), is_complete=True)
    marks.swept(
        [Line(3, LONG_AGO, None, has_suspects=False)], seen, full=False, began=10.0, now=10.01
    )
    assert marks.start(20.0) == {3: LONG_AGO}
    assert marks.sweep_at == pytest.approx(11.01)
    marks.swept(
        [Line(3, LONG_AGO, None, has_suspects=False)], None, full=False, began=12.0, now=12.02
    )
    assert marks.sweep_at == pytest.approx(13.02)
    assert marks.early_sweep_at == pytest.approx(12.42)
    for began in (20.0, 70.0):
        marks.swept(
            [Line(3, LONG_AGO, None, has_suspects=False)],
            None,
            full=False,
            began=began,
            now=began + 0.04,
        )
    assert marks.sweep_at == marks.early_sweep_at == pytest.approx(71.64)


def test_a_full_sweep_claims_nothing_for_other_priorities() -> None:
    marks = Watermarks(poll_interval=1.0)
    marks.swept([Line(3, LONG_AGO, None, has_suspects=False)], None, full=True, began=0.0, now=0.0)
    assert marks.start(0.0)[3] < LONG_AGO


def test_statements_are_sent_in_one_place() -> None:
    package = Path(bgjob.__file__).parent
    senders = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "statement.text" in (source := path.read_text("utf-8"))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr == "text"
        if isinstance(node.value, ast.Name) and node.value.id == "statement"
    }
    assert senders == {"_sql/execute.py", "_sql/paramstyles.py"}


def test_a_module_of_over_400_lines_says_why() -> None:
    package = Path(bgjob.__file__).parent
    for path in package.rglob("*.py"):
        source = path.read_text("utf-8")
        text = ast.get_docstring(ast.parse(source)) or ""
        assert len(source.splitlines()) <= 400 or "400 lines" in " ".join(text.split()), path
