"""Limits of a job type over all workers."""

import threading
from collections import Counter
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from itertools import count
from math import inf
from typing import Any, LiteralString

import psycopg
import pytest
from support.database import rows
from support.plans import PLAN_CACHE_MODES, buffers, handled, nodes, prepare
from support.plans import run as explained
from support.statements import ask as run
from support.waiting import eventually
from support.workers import Gate, Launcher

from bgjob import EnqueueRequest, Limit, Mux
from bgjob._engine.engine import Engine
from bgjob._engine.pace import Pace
from bgjob._engine.protocol import Claim, Exchange, Sleep, Sweep
from bgjob._engine.reply import Reply
from bgjob._engine.throttle import Throttle
from bgjob._sql.claims import (
    Rations,
    claim,
    claim_any,
    claim_group,
    claim_limited,
    claim_others,
    free,
    sweep,
)
from bgjob._sql.limits import Ration, Subject, set_limit
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement, text_array
from bgjob._sql.survey import Line, survey
from bgjob.job import Job

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
KNOWS = Rations(limited=("slow",))
ASIDE: LiteralString = "select id from bgjob_job where limited and waits order by id"


def slow(*ids: str, **options: Any) -> list[EnqueueRequest]:
    return [EnqueueRequest("q", "slow", id=id, **options) for id in ids]


def quick(*ids: str, **options: Any) -> list[EnqueueRequest]:
    return [EnqueueRequest("q", "quick", id=id, **options) for id in ids]


# -- claims ------------------------------------------------------------------------------------


def claims_of(
    worker: psycopg.Connection, limit: int, rations: Rations = KNOWS
) -> dict[str, Callable[[], list[Job]]]:
    marks = {0: LONG_AGO}
    return {
        "claim": lambda: (
            run(
                worker,
                claim_others("q", limit=limit, lease=60, token=1, marks=marks, rations=rations),
            ).jobs
        ),
        "sweep": lambda: (
            run(worker, sweep("q", limit=limit, lease=60, token=1, rations=rations)).jobs
        ),
    }


@pytest.mark.parametrize("which", ["claim", "sweep"])
def test_a_claim_puts_jobs_of_a_limited_type_aside_and_takes_the_others(
    client: Any, worker: psycopg.Connection, which: str
) -> None:
    client.bulk_enqueue([*slow("a", "b"), *quick("c"), *slow("d"), *quick("e")])
    found = claims_of(worker, 4)[which]()
    assert [job.id for job in found] == ["c"]
    assert [id for (id,) in rows(worker, ASIDE)] == ["a", "b", "d"]
    assert [job.id for job in claims_of(worker, 4)[which]()] == ["e"]
    # Claimed from there in their order, and due again when they are given back.
    first = run(worker, claim_limited("q", "slow", limit=2, lease=60, token=2, rations=KNOWS))
    assert [(job.id, job.attempt) for job in first] == [("a", 1), ("b", 1)]
    assert [id for (id,) in rows(worker, ASIDE)] == ["d"]
    assert run(worker, sweep("q", limit=9, lease=60, token=3)).held_back == ["slow"]
    assert run(worker, free("q", limit=9)).held_back == ["slow"]


def test_even_a_claim_of_one_job_soon_meets_other_types(
    client: Any, worker: psycopg.Connection
) -> None:
    client.bulk_enqueue([*slow(*(f"s{n:04}" for n in range(1200))), *quick("x")])
    take = claims_of(worker, 1)["claim"]
    assert [len(take()) for _ in range(2)] == [0, 0]
    assert [job.id for job in take()] == ["x"]


def test_a_suspect_of_a_limited_type_is_claimed_alone_and_in_no_group(
    client: Any, worker: psycopg.Connection
) -> None:
    client.bulk_enqueue(slow("a", "b", "c", "d"))
    worker.execute(
        """
        update bgjob_job set deaths = case when id in ('b', 'c') then 2 else 0 end,
            next_run_at = next_run_at - (200 - ascii(id)) * interval '1 second'
        """
    )
    group = claim_group("q", limit=9, lease=60, token=1, charge=True, rations=KNOWS)
    assert run(worker, group).jobs == []
    assert claims_of(worker, 9)["claim"]() == []
    assert len(rows(worker, ASIDE)) == 4
    found = []
    while one := run(worker, claim_limited("q", "slow", limit=9, lease=60, token=2, rations=KNOWS)):
        found.append([job.id for job in one])
    assert found == [["a"], ["b"], ["c"], ["d"]]


def test_a_claim_of_any_job_takes_what_waits_for_the_limit_of_its_type(
    client: Any, worker: psycopg.Connection
) -> None:
    """As `do` and `drain` claim."""
    client.bulk_enqueue([*slow("a", "b"), *quick("c", "d")])
    assert [job.id for job in claims_of(worker, 3)["claim"]()] == ["c"]
    found = [run(worker, claim_any("q", lease=60, token=2)) for _ in range(4)]
    assert [[job.id for job in jobs] for jobs in found] == [["d"], ["a"], ["b"], []]
    assert rows(worker, ASIDE) == []


def test_no_claim_that_does_not_know_of_a_types_limit_takes_a_job(
    client: Any, worker: psycopg.Connection
) -> None:
    client.bulk_enqueue([*slow("a"), *quick("b")])
    run(worker, set_limit(Subject("type", "slow"), Limit(1)))
    unaware = claim("q", limit=9, lease=60, token=1, marks={0: LONG_AGO})
    assert run(worker, unaware) == []
    assert run(worker, sweep("q", limit=9, lease=60, token=1)).jobs == []
    [line] = run(worker, survey("q"))
    assert (line.limited, line.is_limited) == (["slow"], False)
    [line] = run(worker, survey("q", rations=KNOWS))
    assert line.limited == []
    assert [job.id for job in claims_of(worker, 9)["claim"]()] == ["b"]


@pytest.mark.parametrize("plan_cache_mode", PLAN_CACHE_MODES)
def test_100_000_jobs_that_wait_for_their_limit_are_met_by_no_claim_of_others(
    worker: psycopg.Connection, plan_cache_mode: str
) -> None:
    worker.execute(
        """
        insert into bgjob_job (id, queue, type, next_run_at, limited, waits)
        select 's' || n, 'q', 'slow', now() - interval '1 hour', true, true
        from generate_series(1, 100000) n
        """
    )
    worker.execute(
        """
        insert into bgjob_job (id, queue, type, next_run_at)
        select 'x' || n, 'q', 'quick', now() from generate_series(1, 50) n
        """
    )
    worker.execute("analyze bgjob_job")
    marks = {0: LONG_AGO}
    statements: dict[str, Statement[Any]] = {
        "others": claim_others("q", limit=10, lease=60, token=1, marks=marks, rations=KNOWS),
        "sweep": sweep("q", limit=10, lease=60, token=2, rations=KNOWS),
        "usual_sweep": sweep("q", limit=10, lease=60, token=3),
        "limited": claim_limited("q", "slow", limit=10, lease=60, token=4, rations=KNOWS),
        "survey": survey("q"),
    }
    for name, statement in statements.items():
        plan = explained(worker, prepare(worker, name, statement), plan_cache_mode)
        assert buffers(plan) <= 600, plan
        assert sum(map(handled, nodes(plan))) <= 1000, plan


# -- the engine --------------------------------------------------------------------------------


def answer(exchange: Exchange) -> Reply:
    """Return what the server says where only jobs of the limited type are due, and none is left."""
    reply = Reply(settled={outcome.claimed.job.id for outcome in exchange.outcomes})
    if isinstance(exchange.claim, Sweep):
        reply.lines, reply.held_back = [Line(0, LONG_AGO, None, has_suspects=False)], ["slow"]
    for _ in exchange.takes:
        reply.add_ration(Ration(None, 5, 10.0, 0.0, LONG_AGO))
    return reply


def test_after_a_refusal_jobs_that_wait_for_their_limit_are_claimed_without_a_busy_wait() -> None:
    now, refused, claimed = 0.0, 0, 0
    engine = Engine(
        concurrency=2,
        poll_interval=60.0,
        lease=60.0,
        notify=False,
        tokens=count(1),
        type_limits={"slow": Limit(rate="1000/s")},
    )
    for _ in range(60):
        match engine.step(now):
            case Exchange() as exchange if exchange.limited and not refused:
                engine.reject(now)
                refused += 1
            case Exchange() as exchange:
                claimed += exchange.limited is not None
                now += 0.001
                engine.acknowledge(answer(exchange), now)
            case Sleep(until):
                assert until > now
                now = until
    assert refused and claimed


def test_jobs_of_a_type_without_a_limit_of_places_are_claimed_by_the_hundred() -> None:
    throttle = Throttle(
        Pace(2),
        "q",
        None,
        {"slow": Limit(rate="9/s")},
        concurrency=2,
        batches=(),
        lease=60,
        holder=1,
    )
    exchange = Exchange()
    throttle.answered(exchange, Reply(held_back=["slow"]), [], 0.0)
    throttle.add_takes(exchange, 0.0, slots=2, room=0, has_more=False, free=500)
    [take] = exchange.takes
    assert (take.subject, take.ask.need) == (Subject("type", "slow"), 2)  # nothing is known yet
    throttle.answered(exchange, Reply(rations=[Ration(None, 300, 1.0, 0.0, LONG_AGO)]), [], 0.0)
    throttle.add_claim(exchange, 500, 0.0, slots=2, tokens=count(1))
    assert exchange.limited is not None
    assert exchange.limited.limit == 300


def known(ration: Ration | None, *, slots: int = 2, batches: Collection[str] = ()) -> Throttle:
    """Return a throttle with a ration of the limit of the type "slow", all of whose jobs ended."""
    limits = {"slow": Limit(4, "9/s")}
    throttle = Throttle(
        Pace(slots), "q", None, limits, concurrency=slots, batches=batches, lease=60, holder=1
    )
    exchange = Exchange()
    throttle.answered(exchange, Reply(held_back=["slow"]), [], 0.0)
    throttle.add_takes(exchange, 0.0, slots=slots, room=0, has_more=False, free=9)
    throttle.answered(exchange, Reply(rations=[ration]), [], 0.0)
    throttle.add_claim(exchange, 1, 0.0, slots=slots, tokens=count(1))
    throttle.answered(exchange, Reply(rations=[ration]), [], 0.0)
    return throttle


def job_of(type_: str, id_: str) -> Claimed:
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    return Claimed(Job(id_, "q", type_, None, 1, None, 0, noon, noon, noon), 7)


ENOUGH = Ration(2, 300, 1.0, 0.0, LONG_AGO)


def claiming(throttle: Throttle, limit: int = 200) -> Exchange:
    exchange = Exchange(claim=Claim(limit, 7, {0: LONG_AGO}))
    throttle.spend(exchange, 0.1)
    return exchange


@pytest.mark.parametrize(
    ("ration", "is_ample"),
    [
        (ENOUGH, True),
        (ENOUGH._replace(tokens=None), True),
        (ENOUGH._replace(tokens=199), False),
        (ENOUGH._replace(places=1), False),
        (ENOUGH._replace(places=None), True),
    ],
)
def test_a_claim_puts_no_jobs_aside_within_an_ample_ration(ration: Ration, is_ample: bool) -> None:
    rations = claiming(known(ration)).rations
    assert (rations.limited, rations.ample) == (([], ["slow"]) if is_ample else (["slow"], []))
    assert rations.params["known"] == text_array(["slow"])
    looks = Exchange(claim=Sweep(0, 7))
    throttle = known(ration)
    throttle.spend(looks, 0.1)
    # Suspects among them are found if a claim may have them.
    assert ("slow" in looks.rations.ample) == (is_ample or ration.tokens == 199)


def test_jobs_of_batches_are_put_aside_while_each_takes_a_place() -> None:
    assert claiming(known(ENOUGH, batches=["slow"])).rations.limited == ["slow"]
    assert claiming(known(ENOUGH._replace(places=None), batches=["slow"])).rations.limited == []


def test_tokens_that_a_claim_within_an_ample_ration_did_not_use_are_left() -> None:
    throttle = known(ENOUGH)
    for _ in range(3):  # 200 tokens of 300
        exchange = claiming(throttle)
        claimed = [job_of("slow", "a"), job_of("other", "b")]
        throttle.answered(exchange, Reply(), claimed, 0.1)
        assert throttle.admit(claimed, exchange) == claimed
        assert exchange.ample.keys() == {"slow"}
    throttle.take_back(claiming(throttle), is_refused=True)
    assert claiming(throttle).ample  # a refused claim has used none
    assert not claiming(throttle).ample  # what became of the last one is not known


def test_a_type_that_has_had_no_jobs_for_a_while_bounds_no_claim() -> None:
    throttle = known(Ration(None, 1, 1.0, 0.0, LONG_AGO))
    exchange = claiming(throttle, 1)
    throttle.answered(exchange, Reply(), [job_of("slow", "a")], 0.1)
    throttle.count([])  # it has ended
    assert throttle.most(0.2) == 0  # there is no token left
    assert throttle.wake_at(0.2, slots=2, free=9, wants=True) < 2.0
    throttle.add_takes(Exchange(), 2.0, slots=2, room=9, has_more=True, free=9)
    assert throttle.most(2.0) > 9
    assert throttle.wake_at(2.0, slots=2, free=9, wants=True) == inf


def test_a_stream_of_claims_ends_for_the_first_ration_of_a_type() -> None:
    throttle = known(ENOUGH)
    assert not throttle.wants(0.1, 2)  # none waits aside
    throttle.answered(claiming(throttle), Reply(held_back=["slow"]), [], 0.1)
    assert throttle.wants(0.1, 2)
    unknown = Throttle(
        Pace(2), "q", None, {"slow": Limit(4)}, concurrency=2, batches=(), lease=60, holder=1
    )
    assert not unknown.wants(0.0, 2)
    unknown.answered(Exchange(), Reply(held_back=["slow"]), [], 0.0)
    assert unknown.wants(0.0, 2)
    exchange = Exchange()
    unknown.add_takes(exchange, 0.0, slots=2, room=9, has_more=True, free=9)
    assert exchange.takes and not unknown.wants(0.0, 2)  # it has been asked for


def test_a_type_keeps_its_ration_for_a_while_after_a_stream_of_its_jobs() -> None:
    throttle = known(ENOUGH)
    exchange = Exchange(claim=Claim(9, 7, {0: LONG_AGO}))
    throttle.spend(exchange, 0.4)
    throttle.answered(exchange, Reply(), [job_of("slow", "a")], 5.0)
    throttle.count([])  # it has ended
    later = Exchange()
    throttle.add_takes(later, 5.1, slots=2, room=0, has_more=False, free=9)
    assert not any(take.ask.wanted == 0 for take in later.takes)


def test_only_jobs_of_the_type_give_their_tokens_back() -> None:
    throttle = known(ENOUGH)
    exchange = claiming(throttle)
    claimed = [job_of("slow", "a"), *(job_of("other", f"b{n}") for n in range(9))]
    throttle.answered(exchange, Reply(), claimed, 0.1)
    throttle.refund(claimed)
    later = Exchange()
    throttle.add_leaves(later, 0.2)
    [take] = later.takes
    assert take.ask.unused == 300 - 1 + 1


def test_jobs_of_an_ample_ration_have_places_before_they_are_counted() -> None:
    throttle = known(ENOUGH)
    throttle.answered(claiming(throttle), Reply(), [job_of("slow", "a"), job_of("slow", "b")], 0.1)
    for _ in range(2):
        exchange = Exchange()
        throttle.look()
        throttle.add_takes(exchange, 0.2, slots=2, room=9, has_more=True, free=9)
        throttle.answered(exchange, Reply(rations=[ENOUGH._replace(places=0)]), [], 0.2)
        [take] = exchange.takes
        assert take.ask.held == 2


def test_jobs_are_counted_while_more_of_them_run_than_should() -> None:
    throttle = known(ENOUGH)
    throttle.answered(claiming(throttle), Reply(), [job_of("slow", "a"), job_of("slow", "b")], 0.1)
    assert not throttle.needs_count
    exchange = Exchange()
    throttle.look()
    throttle.add_takes(exchange, 0.2, slots=2, room=9, has_more=True, free=9)
    throttle.answered(exchange, Reply(rations=[ENOUGH._replace(places=1)]), [], 0.2)
    assert throttle.needs_count
    assert throttle.most(0.2) == 0  # no slot is free
    throttle.count([job_of("slow", "b")])
    assert throttle.most(0.2) > 9  # other types' jobs


def test_jobs_whose_ration_was_taken_away_meanwhile_wait_for_places() -> None:
    throttle = known(ENOUGH)
    exchange = claiming(throttle)
    throttle.count([job_of("slow", "before")])
    throttle.look()
    throttle.add_takes(exchange, 0.1, slots=2, room=9, has_more=True, free=9)
    throttle.count([])
    claimed = [job_of("slow", "a"), job_of("other", "b"), job_of("slow", "c")]
    reply = Reply(rations=[ENOUGH._replace(places=1)])
    throttle.answered(exchange, reply, claimed, 0.1)
    assert throttle.admit(claimed, exchange) == claimed[1:2]
    assert throttle.take_startable(2) == claimed[:1]
    assert throttle.held == claimed[2:]
    throttle.count(claimed[1:])  # the first has ended
    assert throttle.take_startable(2) == claimed[2:]


# -- workers -----------------------------------------------------------------------------------


def test_jobs_that_wait_for_the_limit_of_their_type_hold_up_no_other_type(
    launcher: Launcher,
) -> None:
    gate, ran = Gate(), threading.Semaphore(0)
    mux = Mux().register("slow", gate, limit=Limit(2))
    mux.register("quick", lambda _: ran.release())
    client = launcher.client
    client.bulk_enqueue(slow(*(f"s{n:04}" for n in range(1500))))
    client.bulk_enqueue(quick(*(f"x{n}" for n in range(20))))
    for _ in range(2):
        launcher.start(mux, concurrency=3)
    for _ in range(20):
        assert ran.acquire(timeout=30)
    gate.wait()
    gate.wait()
    assert len(gate.runs) == 2
    [status] = [s for s in client.limits.list() if s.scope == "type"]
    assert (status.name, status.limit, status.is_set, status.places) == ("slow", Limit(2), False, 2)
    [reason] = [r for r in client.explain("s1000").reasons if r.code == "limited"]
    assert "Type 'slow' has a limit (in the code of its workers): 2 at once;" in reason.text
    gate.released.set()


def test_the_limit_of_a_type_is_set_changed_and_removed_at_run_time(launcher: Launcher) -> None:
    gate = Gate()
    client = launcher.client
    launcher.start(Mux().register("slow", gate), concurrency=4)
    client.limits.set("type", "slow", Limit(1))
    client.bulk_enqueue(slow(*"abcdef"))
    gate.wait()
    assert len(gate.runs) == 1
    client.limits.set("type", "slow", Limit(2))
    gate.wait()
    assert len(gate.runs) == 2
    status = client.limits.get("type", "slow")
    assert status is not None and status.limit == Limit(2)
    assert client.limits.remove("type", "slow")
    gate.wait()
    gate.wait()
    gate.released.set()
    assert eventually(lambda: len(gate.runs) == 6)
    assert sorted(job.id for job in gate.runs) == [*"abcdef"]
    assert client.limits.list() == []


def test_the_rate_of_a_type_holds_beside_the_limit_of_its_queue(launcher: Launcher) -> None:
    ran: list[str] = []
    mux = Mux()
    for type_ in ("slow", "quick"):
        mux.register(type_, lambda job: ran.append(job.type))
    client = launcher.client
    client.bulk_enqueue([*slow(*"abcdefgh"), *quick(*"ijklmnopqr")])
    client.limits.set("type", "slow", Limit(rate="1/h", burst=4))
    client.limits.set("queue", "q", Limit(rate="1/h", burst=10))
    launcher.start(mux, concurrency=4)
    assert eventually(lambda: len(ran) == 9)  # half a second of the burst is left out
    assert Counter(ran)["slow"] <= 4
    client.limits.remove("queue", "q")
    assert eventually(lambda: Counter(ran)["quick"] == 10)
    assert Counter(ran)["slow"] <= 4
    client.limits.remove("type", "slow")
    assert eventually(lambda: Counter(ran)["slow"] == 8)


def test_a_worker_gives_the_ration_of_a_type_back_when_it_ends(
    launcher: Launcher, dsn: str
) -> None:
    ran: list[str] = []
    mux = Mux().register("slow", lambda job: ran.append(job.id), limit=Limit(5, "1/h", 8))
    launcher.client.bulk_enqueue(slow("a"))
    worker = launcher.start(mux, concurrency=5)
    assert eventually(lambda: ran == ["a"])
    assert launcher.shutdown(worker)
    with psycopg.connect(dsn) as conn:
        assert rows(conn, "select from bgjob_ration") == []
        assert rows(conn, "select round(tokens) from bgjob_limit") == [(7,)]


def test_a_limit_of_a_type_that_is_none_is_refused() -> None:
    wrong: Any = "14/s"
    with pytest.raises(TypeError, match="limit of job type 't' must be a Limit"):
        Mux().register("t", lambda _: None, limit=wrong)
