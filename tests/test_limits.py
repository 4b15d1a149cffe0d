"""Limits of a queue over all workers."""

import json
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import count
from math import floor, inf
from random import Random
from time import monotonic
from typing import Any, LiteralString

import psycopg
import pytest
from support.database import rows
from support.plans import PLAN_CACHE_MODES, buffers, handled, nodes, prepare
from support.plans import run as explained
from support.statements import ask as run
from support.waiting import eventually
from support.workers import Gate, Launcher

from bgjob import Client, EnqueueRequest, Limit, Mux, Worker, cli
from bgjob._engine.engine import Engine
from bgjob._engine.outcome import Outcome, Release
from bgjob._engine.protocol import Claim, ClaimGroup, Exchange, Sleep, Stop, Sweep, Withdraw
from bgjob._engine.reply import Reply
from bgjob._sql.claims import NO_RATIONS, Rations, Swept, claim, sweep
from bgjob._sql.limits import (
    Ask,
    Ration,
    Subject,
    declare,
    limits,
    lock,
    remove_limit,
    set_limit,
    take,
)
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob._sql.survey import Line, survey
from bgjob._worker.slots import Slots
from bgjob.job import Job
from bgjob.limit import rate_text
from bgjob.result import Complete, Retry

Q = Subject("queue", "q")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def beyond(starts: list[tuple[float, float, int]], rate: float) -> float:
    """Return by how many starts, each within a time, exceed at most what the rate allows."""
    most = 0.0
    for first, (_, latest, _) in enumerate(starts):
        number = 0
        for earliest, _, jobs in starts[first:]:
            number += jobs
            # The first ones as late as they may be, and the last ones as early.
            most = max(most, number - rate * max(earliest - latest, 0.0))
    return most


# -- the value ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "per_second", "burst", "text"),
    [
        (Limit(), 0, None, "no limit"),
        (Limit(3), 0, None, "3 at once"),
        (Limit(rate="14/s"), 14, 14, "14/s, burst 14"),
        (Limit(rate="600/m", burst=28), 10, 28, "600/m, burst 28"),
        (Limit(rate="1000/h"), 1000 / 3600, 1, "1000/h, burst 1"),
        (Limit(2, "0.5/s"), 0.5, 1, "2 at once, 0.5/s, burst 1"),
        (Limit(rate="5/d"), 5 / 86400, 1, "5/d, burst 1"),
    ],
)
def test_a_limit_is_read_as_it_is_written(
    limit: Limit, per_second: float, burst: int | None, text: str
) -> None:
    assert (limit.per_second, limit.burst_size, str(limit)) == (per_second, burst, text)


@pytest.mark.parametrize("rate", ["14/s", "601/m", "1000/h", "5/d", "0.25/s", "7/h", "1.5/d"])
def test_a_rate_that_was_stored_is_shown_with_the_largest_unit_that_fits(rate: str) -> None:
    stored = Limit(rate=rate).per_second
    assert Limit(rate=rate_text(stored)).per_second == pytest.approx(stored, rel=1e-6)
    if rate in {"14/s", "601/m", "1000/h", "5/d"}:
        assert rate_text(stored) == rate


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"concurrency": 0}, "concurrency of a limit must be an int from 1"),
        ({"concurrency": True}, "concurrency of a limit must be an int from 1"),
        ({"concurrency": 2.0}, "concurrency of a limit must be an int from 1"),
        ({"rate": 14}, 'must be a str such as "14/s"'),
        ({"rate": "14 / s"}, "must be a number of jobs, a slash, and s, m, h or d"),
        ({"rate": "-1/s"}, "must be a number of jobs, a slash, and s, m, h or d"),
        ({"rate": "0/s"}, "must be over 0"),
        ({"rate": "9999999999/s"}, "must be over 0 and under"),
        ({"rate": "14/s", "burst": 0}, "burst of a limit must be an int from 1"),
        ({"burst": 3}, "burst of a limit is for a rate"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_where_it_is_written(
    arguments: dict[str, Any], error: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        Limit(**arguments)


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"other": Limit(1)}, "limits names queue 'other', which is none of this worker's"),
        ({"q": "14/s"}, "the limit of queue 'q' must be a Limit"),
        (Limit(1), "must be a mapping from their names"),
        ("14/s", "limits must be a Limit, or a mapping"),
    ],
)
def test_limits_of_a_worker_are_checked_when_it_is_made(limits: Any, error: str) -> None:
    with Client("") as client, pytest.raises((TypeError, ValueError), match=error):
        Worker(client, {"q": 1, "r": 1}, Mux(), limits=limits)


# -- rations -----------------------------------------------------------------------------------


class Taker:
    """Takes rations as workers do, and lets time pass by changing when the last one was taken."""

    def __init__(self, conn: psycopg.Connection, limit: Limit) -> None:
        self.conn = conn
        self.passed = 0.0
        run(conn, set_limit(Q, limit, notify=False))

    def take(self, **wants: Any) -> Ration:
        wish = wants.get("need", 0)
        usual = Ask(holder=1, held=0, wanted=1, need=0, wish=wish, unused=0, since=None)
        with self.conn.transaction():
            run(self.conn, lock(Q))
            got = run(self.conn, take(Q, usual._replace(**wants), code=None, lease=30))
        assert got is not None
        return got

    def wait(self, seconds: float) -> None:
        self.passed += seconds
        self.conn.execute(
            "update bgjob_limit set used_at = used_at - %s * interval '1 second'", [seconds]
        )

    @property
    def now(self) -> float:
        """When the last ration was taken, in this time."""
        [(at,)] = rows(self.conn, "select extract(epoch from used_at)::float8 from bgjob_limit")
        return float(at) + self.passed


@pytest.mark.parametrize("seed", range(6))
def test_a_rate_is_never_exceeded_wherever_jobs_start_within_their_time(
    worker: psycopg.Connection, seed: int
) -> None:
    dice = Random(seed)
    rate, burst = dice.choice([(14.0, 14), (2.0, 1), (50.0, 3), (300.0, 150), (0.5, 2), (7.0, 30)])
    taker = Taker(worker, Limit(rate=f"{rate}/s", burst=burst))
    starts: list[tuple[float, float, int]] = []
    left, passed, since = 0, 0.0, NOON
    for _ in range(60):
        need = dice.choice([1, 1, 5, burst, 2 * burst])
        back: dict[str, Any] = {}
        if dice.random() < 0.5 and left:
            away = taker.passed - passed
            back = {"unused": left, "since": since - timedelta(seconds=away)}
            left = 0
        got = taker.take(need=need, wish=dice.choice([need, 3 * need]), **back)
        assert got.tokens is not None
        used = got.tokens if dice.random() < 0.8 else dice.randint(0, got.tokens)
        if used < got.tokens and not left:
            since, passed = got.at, taker.passed
        left += got.tokens - used
        starts.append((taker.now, taker.now + got.good_for, used))
        if dice.random() < 0.1:  # the clock is set back
            step = dice.uniform(0, 10)
            taker.wait(-step)
            taker.passed += step
        taker.wait(got.wait if dice.random() < 0.7 else dice.expovariate(rate / burst))
    assert beyond(starts, rate) <= burst + 1e-6
    assert sum(used for *_, used in starts) > burst


@pytest.mark.parametrize(
    ("limit", "reached"),
    [
        (Limit(rate="14/s"), 0.99),
        (Limit(rate="14/s", burst=28), 0.99),
        (Limit(rate="1/s"), 0.95),
        (Limit(rate="600/h"), 0.95),
        (Limit(rate="1000/s", burst=100), 0.99),
        (Limit(rate="100/s", burst=10), 0.99),
        (Limit(rate="20/s", burst=1), 0.5),  # as documented
    ],
)
def test_a_bucket_fills_as_fast_as_its_rate(
    worker: psycopg.Connection, limit: Limit, reached: float
) -> None:
    taker = Taker(worker, limit)
    level: LiteralString = "select tokens, extract(epoch from used_at)::float8 from bgjob_limit"
    taker.take(need=5000)
    fills = []
    for _ in range(10):
        [(before, since)] = rows(worker, level)
        got = taker.take(need=5000)
        [(after, at)] = rows(worker, level)
        fills.append((after + got.tokens - before) / (at - since))
    assert max(fills) >= reached * limit.per_second  # on a slow host some find it full


def test_tokens_that_were_not_used_are_as_if_not_taken(worker: psycopg.Connection) -> None:
    taker = Taker(worker, Limit(rate="1/h", burst=10))
    assert taker.take(need=6).tokens == 6
    taker.wait(-60)  # nothing comes back meanwhile, on however slow a host
    assert taker.take(need=6).tokens == 3  # half a second before each start is left out
    now = worker.execute("select now()").fetchone()
    assert now is not None
    assert taker.take(need=9, unused=5, since=now[0]).tokens == 5
    assert taker.take(need=9, unused=50, since=now[0]).tokens == 9  # never more than the burst
    # In the hours for which they were away a full bucket would have lost as many.
    since = now[0] - timedelta(hours=3)
    assert taker.take(need=9, unused=5, since=since).tokens == 2


def test_places_are_shared_and_those_of_a_dead_worker_lapse(worker: psycopg.Connection) -> None:
    taker = Taker(worker, Limit(10))
    assert taker.take(holder=1, wanted=10).places == 10
    assert taker.take(holder=2, wanted=10).places == 0
    # The first one should have half of them, and keeps those that are in use.
    assert taker.take(holder=1, held=10, wanted=10).places == 5
    assert taker.take(holder=2, wanted=10).places == 0
    taker.take(holder=1, held=7, wanted=10)
    assert taker.take(holder=2, wanted=10).places == 3
    taker.take(holder=1, held=5, wanted=10)
    assert taker.take(holder=2, held=3, wanted=10).places == 5
    # One that needs fewer leaves them to the others.
    taker.take(holder=1, held=2, wanted=2)
    assert taker.take(holder=2, held=5, wanted=10).places == 8
    worker.execute("update bgjob_ration set until = now() where holder = 2")
    assert taker.take(holder=1, held=2, wanted=10).places == 10
    assert rows(worker, "select holder, places from bgjob_ration") == [(1, 10)]
    taker.take(holder=1, held=0, wanted=0)
    assert rows(worker, "select from bgjob_ration") == []


def test_a_limit_in_code_binds_those_who_have_it_unless_an_operator_has_set_one(
    worker: psycopg.Connection,
) -> None:
    wants = Ask(holder=1, held=0, wanted=3, need=3, wish=3, unused=0, since=None)

    def taken(code: Limit | None) -> Ration | None:
        return run(worker, take(Q, wants, code=code, lease=30))

    assert taken(Limit(2)) is None  # the row is yet to be made
    run(worker, declare(Q))
    run(worker, declare(Q))
    got = taken(Limit(2, "1/h", 5))
    assert got is not None
    assert (got.places, got.tokens) == (2, 3)
    assert taken(None) is None
    assert [(s.limit, s.is_set) for s in run(worker, limits())] == [(Limit(2, "1/h", 5), False)]
    run(worker, set_limit(Q, Limit(1)))
    got = taken(Limit(2, "1/h", 5))
    assert got is not None
    assert (got.places, got.tokens) == (1, None)
    got = taken(None)
    assert got is not None
    assert (got.places, got.tokens) == (1, None)
    run(worker, set_limit(Q, Limit()))
    got = taken(Limit(2))
    assert got is not None
    assert (got.places, got.tokens) == (None, None)
    assert run(worker, remove_limit(Q))
    assert not run(worker, remove_limit(Q))
    assert run(worker, limits()) == []
    got = taken(Limit(rate="1/h", burst=5))
    assert got is not None
    assert (got.places, got.tokens) == (None, 1)  # it goes on from where it was
    worker.execute("update bgjob_limit set used_at = used_at - interval '2 minutes'")
    assert run(worker, limits()) == []  # no program has it any more


def test_no_claim_without_a_ration_takes_a_job_of_a_limited_queue(
    client: Any, worker: psycopg.Connection
) -> None:
    client.bulk_enqueue([EnqueueRequest("q", "t", id=id) for id in "abc"])

    def one(*, rations: Rations = NO_RATIONS) -> list[Job]:
        return run(
            worker,
            claim("q", limit=1, lease=60, token=1, marks={0: LONG_AGO}, rations=rations),
        )

    def several(*, rations: Rations = NO_RATIONS) -> list[Job]:
        marks = {0: LONG_AGO, 1: LONG_AGO}
        return run(worker, claim("q", limit=1, lease=60, token=2, marks=marks, rations=rations))

    def swept(*, rations: Rations = NO_RATIONS) -> list[Job]:
        return run(worker, sweep("q", limit=1, lease=60, token=3, rations=rations)).jobs

    run(worker, set_limit(Q, Limit(1)))
    run(worker, set_limit(Subject("queue", "other"), Limit(1)))
    assert (one(), several(), swept()) == ([], [], [])
    [line] = run(worker, survey("q"))
    assert (line.is_limited, line.since.year) == (True, 1)  # the next claim looks at all of it
    [line] = run(worker, survey("q", rations=Rations(True)))
    assert (line.is_limited, line.since.year > 1) == (False, True)
    assert [len(each(rations=Rations(True))) for each in (one, several, swept)] == [1, 1, 1]


@pytest.mark.every_combination
@pytest.mark.parametrize("plan_cache_mode", PLAN_CACHE_MODES)
@pytest.mark.parametrize("is_analyzed", [False, True])
def test_a_ration_is_taken_without_a_walk_over_those_of_other_limits(
    worker: psycopg.Connection, plan_cache_mode: str, is_analyzed: bool
) -> None:
    worker.execute(
        """
        insert into bgjob_limit (scope, name, is_set, concurrency, rate, burst, tokens)
        select 'queue', 'queue ' || n, true, 7, 14, 28, 3 from generate_series(1, 5000) n
        """
    )
    worker.execute(
        """
        insert into bgjob_ration (scope, name, holder, places, wanted, until)
        select 'queue', 'queue ' || n, m, 1, 3, now() + case when m < 5 then 1 else -1 end
                * interval '1 minute'
        from generate_series(1, 5000) n, generate_series(1, 7) m
        """
    )
    if is_analyzed:
        worker.execute("analyze bgjob_limit, bgjob_ration")
    wants = Ask(holder=1, held=0, wanted=3, need=3, wish=3, unused=0, since=None)
    statements: dict[str, Statement[Any]] = {
        "lock": lock(Subject("queue", "queue 9")),
        "take": take(Subject("queue", "queue 9"), wants, code=None, lease=30),
    }
    for name, statement in statements.items():
        plan = explained(worker, prepare(worker, name, statement), plan_cache_mode)
        assert buffers(plan) <= 60, plan
        assert sum(map(handled, nodes(plan))) <= 150, plan


# -- workers -----------------------------------------------------------------------------------


def test_a_limit_in_code_holds_from_the_first_claim_on(launcher: Launcher) -> None:
    gate = Gate()
    launcher.enqueue(*"abcdef")
    mux = Mux().register("t", gate)
    for _ in range(2):
        launcher.start(mux, concurrency=4, limits=Limit(3))
    for _ in range(3):
        gate.wait()
    assert eventually(lambda: [s.workers for s in launcher.client.limits.list()] == [2])
    [status] = launcher.client.limits.list()
    assert (status.limit, status.is_set, status.places) == (Limit(3), False, 3)
    assert len(gate.runs) == 3
    gate.released.set()
    assert eventually(lambda: len(gate.runs) == 6)


def test_a_limit_that_is_set_changed_and_removed_at_run_time_is_obeyed(launcher: Launcher) -> None:
    gate = Gate()
    launcher.start(Mux().register("t", gate), concurrency=4)
    launcher.client.limits.set("queue", "q", Limit(2))
    launcher.enqueue(*"abcdef")
    gate.wait()
    gate.wait()
    # It has no other places, and says so.
    explained = launcher.client.explain(launcher.client.explain(queue="q").id)
    [reason] = [reason for reason in explained.reasons if reason.code == "limited"]
    assert "Queue 'q' has a limit (set): 2 at once; 1 worker has all 2 places" in reason.text
    assert not reason.blocks
    launcher.client.limits.set("queue", "q", Limit(3))
    gate.wait()
    assert len(gate.runs) == 3
    assert launcher.client.limits.remove("queue", "q")
    gate.wait()
    assert len(gate.runs) == 4
    gate.released.set()
    assert eventually(lambda: len(gate.runs) == 6)
    assert launcher.client.limits.get("queue", "q") is None


def test_a_worker_gives_its_ration_back_when_it_ends(launcher: Launcher, dsn: str) -> None:
    ran: list[str] = []
    mux = Mux().register("t", lambda job: ran.append(job.id))
    launcher.enqueue("a")
    worker = launcher.start(mux, concurrency=5, limits={"q": Limit(5, "1/h", 8)})
    assert eventually(lambda: ran == ["a"])
    assert launcher.shutdown(worker)
    with psycopg.connect(dsn) as conn:
        assert rows(conn, "select from bgjob_ration") == []
        assert rows(conn, "select round(tokens) from bgjob_limit") == [(7,)]


@pytest.mark.parametrize("batch", [None, 3])
def test_a_rate_counts_each_job_also_of_a_batch_and_of_a_retry(
    launcher: Launcher, batch: int | None
) -> None:
    starts: list[str] = []

    def one(job: Job) -> Retry | None:
        starts.append(job.id)
        return Retry(0) if job.id == "a" and job.attempt == 1 else None

    def several(jobs: list[Job]) -> dict[str, Retry | None]:
        return {job.id: one(job) for job in jobs}

    mux = Mux().register("t", one)
    if batch:
        mux = Mux().register("t", several, batch=batch, batch_wait=60.0)
    launcher.enqueue(*"abcdefgh")
    launcher.client.limits.set("queue", "q", Limit(rate="1/h", burst=6))
    launcher.start(mux, concurrency=2)
    assert eventually(lambda: len(starts) == 5)  # half a second of the burst is left out
    [status] = launcher.client.limits.list()
    assert (status.tokens, status.next_in > 0) == (0, True)
    [reason] = [r for r in launcher.client.explain(queue="q").reasons if r.code == "limited"]
    assert "1/h, burst 6; the next job may start in " in reason.text
    launcher.client.limits.set("queue", "q", Limit(rate="100/s"))
    assert eventually(lambda: len(starts) == 9)


def test_jobs_that_would_start_too_late_are_given_back_unstarted(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a process that was stopped after a claim."""
    ran: list[str] = []
    late = monotonic() + 1.0

    def next_in_time(slots: Slots) -> Claimed:
        if monotonic() < late:
            slots.start_by = dict.fromkeys(slots.start_by, -inf)
        return original(slots)

    original = Slots._next_in_time
    monkeypatch.setattr(Slots, "_next_in_time", next_in_time)
    launcher.enqueue(*"abc")
    launcher.start(
        Mux().register("t", lambda job: ran.append(f"{job.id}{job.attempt}")),
        concurrency=3,
        limits=Limit(rate="50/s"),
    )
    assert eventually(lambda: sorted(ran) == ["a1", "b1", "c1"])
    assert monotonic() >= late


# -- operators ---------------------------------------------------------------------------------


def test_the_command_sets_lists_and_removes_limits(
    dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*argv: str) -> tuple[int, str]:
        status = cli.main(["limit", *argv, "--dsn", dsn])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    assert command("set", "queue", "mail", "--rate", "14/s", "--burst", "28") == (
        0,
        "limited mail: 14/s, burst 28\n",
    )
    assert command("set", "queue", "slow", "--concurrency", "3")[0] == 0
    assert command("set", "queue", "free", "--none") == (0, "limited free: no limit\n")
    status, listed = command("list")
    assert [line.split() for line in listed.splitlines()] == [
        "of name at once rate burst by workers places starts next".split(),
        "queue free - - - operator - - - -".split(),
        "queue mail - 14/s 28 operator - - 21 -".split(),
        "queue slow 3 - - operator 0 0 - -".split(),
    ]
    status, listed = command("list", "--json")
    assert json.loads(listed)[1]["burst"] == 28
    assert command("remove", "queue", "mail") == (0, "removed the limit of mail\n")
    assert command("remove", "queue", "mail") == (0, "mail had no limit that was set\n")
    assert command("set", "queue", "mail") == (
        2,
        "bgjob: say what the limit is: --concurrency, --rate, or --none for no limit\n",
    )
    assert command("set", "queue", "mail", "--rate", "14")[0] == 2
    assert command("set", "queue", "mail", "--none", "--rate", "14/s")[0] == 2


def test_a_limit_joins_the_callers_transaction(client: Any, dsn: str) -> None:
    with psycopg.connect(dsn) as conn, Client(dsn) as own:
        own.limits.set("queue", "q", Limit(3), conn=conn)
        assert client.limits.get("queue", "q") is None
        conn.rollback()
        assert client.limits.list() == []
        own.limits.set("queue", "q", Limit(3), conn=conn)
        conn.commit()
        assert client.limits.get("queue", "q").limit == Limit(3)


def test_bad_input_of_the_limits_of_a_client_is_refused(client: Any) -> None:
    with pytest.raises(TypeError, match="limit must be a Limit"):
        client.limits.set("queue", "q", "14/s")
    with pytest.raises(ValueError, match="queue must have 1 to"):
        client.limits.set("queue", "", Limit(1))
    with pytest.raises(ValueError, match='scope of a limit must be "queue" or "type", not '):
        client.limits.set("mail", "queue", Limit(1))


# -- a fleet of engines ------------------------------------------------------------------------


class Server:
    """Jobs without end, and the limit of their queue or type, as _sql/limits.py has it."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.numbers = count()
        self.returned: deque[str] = deque()
        self.claims: dict[str, int] = {}
        self.aside = 0
        """Jobs of the type that were put aside."""
        self.put_aside = self.direct = 0
        """How many were put aside, and how many claimed without that, by an ample ration."""
        self.rations: dict[int, tuple[int, int, float]] = {}
        self.rate, self.burst = limit.per_second, limit.burst_size or 0
        if self.rate:
            self.good_for = min(
                0.5, max(0.04, (self.burst - 1) / (2 * self.rate), 0.04 / self.rate)
            )
            self.capacity = max(1.0, self.burst - self.rate * self.good_for)
            self.refill = min(self.rate, self.rate * self.burst / (1 + self.rate * self.good_for))
            self.tokens, self.used_at = self.capacity, -inf

    def give_back(self, claims: Iterable[Claimed]) -> None:
        """Release jobs whose claims still hold them: the same release may come twice."""
        for claimed in claims:
            if self.claims.get(claimed.job.id) == claimed.token:
                del self.claims[claimed.job.id]
                self.returned.append(claimed.job.id)

    def jobs(self, number: int, token: int) -> list[Job]:
        ids = [
            self.returned.popleft() if self.returned else f"job-{next(self.numbers)}"
            for _ in range(number)
        ]
        self.claims |= dict.fromkeys(ids, token)
        return [Job(id, "q", "t", None, 1, None, 0, NOON, NOON, NOON) for id in ids]

    def take(self, ask: Ask, lease: float, now: float) -> Ration:
        tokens, wait, good_for, places = None, 0.0, 0.0, None
        if self.rate:
            filled = self.refill * (now - self.used_at) if self.used_at > -inf else 0.0
            away = 0.0 if ask.since is None else now - (ask.since - NOON).total_seconds()
            unused = max(ask.unused - self.refill * away, 0.0)
            level = min(self.capacity, self.tokens + unused + filled)
            is_plenty = ask.wish <= level - self.capacity / 2
            tokens = ask.wish if is_plenty else min(ask.need, floor(level))
            if tokens < ask.need:
                more = max(1.0, min(self.capacity / 2, self.refill / 20, ask.need))
                wait = max((more - level + tokens) / self.refill, 0.0)
            self.tokens, self.used_at, good_for = level - tokens, now, self.good_for
        most = self.limit.concurrency
        if most is not None:
            live = {h: r for h, r in self.rations.items() if h != ask.holder and r[2] > now}
            share = -(-most // (len(live) + 1))
            others = sum(wanted for _, wanted, _ in live.values())
            free = most - sum(held for held, _, _ in live.values())
            places = max(min(ask.wanted, free, max(share, most - others)), 0)
            live[ask.holder] = max(places, ask.held), ask.wanted, now + 2 * lease
            if not ask.wanted:
                del live[ask.holder]
            self.rations = live
        return Ration(places, tokens, good_for, wait, NOON + timedelta(seconds=now))


class Fleet:
    """Five workers and their server, in simulated time, with whatever can go wrong."""

    lease = 3.0

    def __init__(
        self,
        seed: int,
        limit: Limit,
        *,
        calm: bool,
        in_code: bool = True,
        of_type: bool = False,
        is_aside: bool = False,
        slots: int | None = None,
        takes: float | None = None,
    ) -> None:
        self.dice = Random(seed)
        self.slots, self.takes = slots, takes
        self.limit, self.calm, self.in_code, self.of_type = limit, calm, in_code, of_type
        self.is_aside = is_aside
        self.server = Server(limit)
        self.server.aside = 10**9 if is_aside else 0
        self.now = 1000.0
        self.holders = count(1)
        self.tokens = count(1)
        self.starts: list[float] = []
        self.workers = [Member(self) for _ in range(5)]

    def live(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            member = min(self.workers, key=lambda worker: worker.at)
            self.now = max(self.now, member.at)
            if not self.calm and self.dice.random() < 0.002:
                if self.dice.random() < 0.5:  # killed
                    self.server.give_back(member.engine.running())
                    self.workers[self.workers.index(member)] = Member(self)
                else:  # stopped, or starved
                    member.at += self.dice.choice([0.3, 1.0, 10.0])
                continue
            member.turn()

    @property
    def running(self) -> int:
        """How many handlers run, of workers whose rations are alive."""
        return sum(len(worker.ends) for worker in self.workers if worker.is_alive)


class Member:
    """One worker: its engine and its handlers."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, dice = fleet, fleet.dice
        self.slots = fleet.slots or dice.choice([1, 3, 10])
        self.takes = fleet.takes or dice.choice([0.001, 0.02, 0.3])
        self.holder = next(fleet.holders)
        self.engine = Engine(
            concurrency=self.slots,
            poll_interval=0.5,
            lease=fleet.lease,
            notify=False,
            tokens=fleet.tokens,
            limit=fleet.limit if fleet.in_code and not fleet.of_type else None,
            type_limits={"t": fleet.limit} if fleet.in_code and fleet.of_type else {},
            holder=self.holder,
        )
        self.at = fleet.now + dice.random()
        self.waiting: deque[Claimed] = deque()
        self.ends: list[tuple[float, Claimed]] = []
        self.sent: Exchange | None = None
        self.reply: Reply | None = None

    @property
    def is_alive(self) -> bool:
        ration = self.fleet.server.rations.get(self.holder)
        return ration is not None and ration[2] > self.fleet.now

    def turn(self) -> None:
        fleet, engine, now, dice = self.fleet, self.engine, self.fleet.now, self.fleet.dice
        if self.sent is not None and self.reply is None:  # it reaches the server
            if not fleet.calm and dice.random() < 0.02:
                sent, self.sent = self.sent, None
                if dice.random() < 0.5:
                    self.carry_out(sent)  # and its answer is lost
                    engine.disconnect(now)
                    engine.reconnect()
                else:
                    engine.reject(now)
            else:
                self.reply = self.carry_out(self.sent)
            self.at = now + dice.choice([0.0002, 0.001, 0.001 if fleet.calm else 0.1])
            return
        ended = [claimed for end, claimed in self.ends if end <= now]
        self.ends = [(end, claimed) for end, claimed in self.ends if end > now]
        engine.finish([Outcome(claimed, Complete(), self.takes) for claimed in ended])
        engine.throttle.queue.shrink(len(self.ends))
        engine.slots = self.slots
        self.waiting.extend(engine.take_startable())
        if self.reply is not None:
            self.sent, reply, self.reply = None, self.reply, None
            self.waiting.extend(engine.acknowledge(reply, now).run)
        self.start()
        match engine.step(now):
            case Exchange() as exchange:
                self.sent = exchange
                self.at = now + dice.choice([0.0002, 0.001, 0.001 if fleet.calm else 0.2])
            case Withdraw():
                engine.withdrawn(self.waiting)
                self.waiting.clear()
            case Sleep(until):
                self.at = max(min([until, *(end for end, _ in self.ends)]), now + 1e-4)
            case Stop():
                raise AssertionError("nobody has asked it to stop")

    def start(self) -> None:
        throttle, now = self.engine.throttle, self.fleet.now
        limits, start_by = throttle.queue, throttle.start_by
        while self.waiting and len(self.ends) < limits.places(self.slots):
            claimed = self.waiting.popleft()
            if now < min(limits.run_until, start_by.get(claimed.token, inf)):
                self.ends.append((now + self.takes, claimed))
                self.fleet.starts.append(now)
                most = self.fleet.limit.concurrency
                assert most is None or (self.is_alive and self.fleet.running <= most)
            else:
                self.engine.finish([Outcome(claimed, Release(), None)])

    def carry_out(self, exchange: Exchange) -> Reply:
        server, now = self.fleet.server, self.fleet.now
        reply = Reply(settled={outcome.claimed.job.id for outcome in exchange.outcomes})
        reply.extended = {claimed.job.id for claimed in exchange.extend}
        server.give_back(exchange.release_jobs)
        claim_of = exchange.claim
        if self.fleet.of_type and exchange.limited is not None:
            number = min(exchange.limited.limit, server.aside)
            server.aside -= number
            reply.of_type = server.jobs(number, exchange.limited.token)
        self.claim(exchange, reply)
        for take in exchange.takes:
            reply.add_ration(server.take(take.ask, self.fleet.lease, now))
        return reply

    def claim(self, exchange: Exchange, reply: Reply) -> None:
        claim_of = exchange.claim
        server, rations, of_type = self.fleet.server, exchange.rations, self.fleet.of_type
        is_known = "t" in (*rations.limited, *rations.ample) if of_type else rations.has_queue
        number = claim_of.limit if claim_of and is_known else 0
        if not self.fleet.calm:  # there is not always so much to do
            number = min(number, self.fleet.dice.choice([0, 1, 20, number]))
        elif self.fleet.is_aside:
            number = 0
        server.direct += number if "t" in rations.ample else 0
        if number and "t" in rations.limited:
            server.aside += number + 20  # and the next ones
            reply.met, number = number, 0
            server.put_aside += reply.met + 20
        jobs = server.jobs(number, claim_of.token) if claim_of else []
        if server.aside and (reply.met or isinstance(claim_of, Sweep)):
            reply.held_back = ["t"]
        match claim_of:
            case Claim():
                reply.claimed = jobs
            case Sweep():
                reply.swept = Swept(jobs, 0)
                limited = ("t",) if of_type and not is_known else ()
                is_limited = not (of_type or is_known)
                reply.lines = [Line(0, NOON, None, False, (), is_limited, limited)]
            case ClaimGroup():
                raise AssertionError("there are no suspects")


LIMITS = [
    Limit(rate="14/s"),
    Limit(rate="1/s"),
    Limit(rate="300/s", burst=100),
    Limit(rate="20000/s"),
    Limit(4),
    Limit(7, "100/s"),
]
AMPLE = Limit(25)
"""One that fewer than all workers do not reach."""


def test_a_worker_that_waits_for_its_limit_beside_free_slots_sleeps() -> None:
    engine = Engine(
        concurrency=2,
        poll_interval=1.0,
        lease=30.0,
        notify=True,
        tokens=count(1),
        limit=Limit(rate="1/m"),
        holder=1,
    )
    now, turns, end = 100.0, 0, 130.0
    while now < end and turns < 200:
        turns += 1
        match engine.step(now):
            case Exchange() as exchange:
                now += 0.001
                ration = Ration(None, 0, 0.5, end - now, NOON)
                taken = "taken" if exchange.notify_lock == "take" else None
                reply = Reply(lock_answer=taken, rations=[ration for _ in exchange.takes])
                reply.lines = [Line(0, NOON, None, False, (), True)]
                engine.acknowledge(reply, now)
            case Sleep(until):
                now = max(until, now)
    assert turns < 200


@pytest.mark.parametrize("limit", [*LIMITS, AMPLE, Limit(30, "900/s")], ids=str)
@pytest.mark.parametrize("of_type", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_workers_that_are_killed_stopped_and_cut_off_never_exceed_a_limit(
    limit: Limit, seed: int, of_type: bool
) -> None:
    fleet = Fleet(seed, limit, calm=False, in_code=seed % 2 == 0, of_type=of_type)
    fleet.live(2.0 if limit.per_second > 1000 else 20.0)
    assert fleet.starts
    if of_type and limit == AMPLE:
        assert fleet.server.direct
    if limit.rate is not None:
        assert limit.burst_size is not None
        assert beyond_exactly(fleet.starts, limit.per_second) <= limit.burst_size + 1e-6


@pytest.mark.parametrize(
    "limit", [each for each in [*LIMITS, AMPLE] if each.per_second < 1000], ids=str
)
@pytest.mark.parametrize("of_type", [False, True])
@pytest.mark.parametrize("takes", [0.005, 0.022, 0.05])
def test_workers_under_load_reach_their_limit(limit: Limit, of_type: bool, takes: float) -> None:
    fleet = Fleet(1, limit, calm=True, of_type=of_type, is_aside=of_type, slots=10, takes=takes)
    seconds = 200 * takes if limit.rate is None else 5.0 if limit.per_second != 1 else 100.0
    fleet.live(max(seconds, 3.0))
    fleet.starts.clear()
    fleet.live(seconds)
    places = min(limit.concurrency or inf, 5 * 10)
    rate = min(limit.per_second or inf, places / takes)
    assert len(fleet.starts) >= 0.95 * rate * seconds


@pytest.mark.parametrize("limit", [Limit(rate="20000/s"), Limit(50), Limit(50, "20000/s")], ids=str)
def test_jobs_of_a_type_far_from_its_limit_are_not_put_aside(limit: Limit) -> None:
    fleet = Fleet(1, limit, calm=True, of_type=True, slots=10, takes=0.01)
    fleet.live(4.0)
    assert fleet.server.put_aside < 0.05 * fleet.server.direct
    if limit.rate is not None:
        assert beyond_exactly(fleet.starts, limit.per_second) <= (limit.burst_size or 0) + 1e-6


def beyond_exactly(starts: list[float], rate: float) -> float:
    """Return by how many these starts exceed at most what the rate allows."""
    most, least = 0.0, inf
    for number, at in enumerate(starts):
        least = min(least, number - rate * at)
        most = max(most, number + 1 - rate * at - least)
    return most
