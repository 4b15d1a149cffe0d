"""What the engine decides, one situation at a time."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from math import inf
from random import Random

import pytest

from bgjob._engine import engine, settling
from bgjob._engine.engine import NO_LIMITS, Engine
from bgjob._engine.outcome import Committed, Effects, Event, Fenced, Outcome, Release
from bgjob._engine.protocol import Claim, ClaimGroup, Exchange, Sleep, Step, Stop, Sweep, Withdraw
from bgjob._engine.reply import Notice, Reply
from bgjob._engine.watermarks import Watermarks
from bgjob._handlers.route import NeedsKey
from bgjob._sql.claims import Group, Swept, Window
from bgjob._sql.survey import Line, OpenTransactions
from bgjob._sql.keys import Blocked
from bgjob._sql.notices import Subscription
from bgjob._sql.settlements import Claimed
from bgjob.event import JobCancelled, JobLeaseLost, QueueIsEmpty
from bgjob.job import Job
from bgjob.limit import Limit
from bgjob.result import Complete, Result, Reschedule, Retry

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROUND_TRIP = 0.001


def job(name: str, *, due: datetime = NOON, priority: int = 0) -> Job:
    return Job(name, "q", "t", None, 1, None, priority, due, NOON, NOON)


class Drive:
    """Drives an engine by hand; time passes only as far as it is told to."""

    def __init__(
        self,
        *,
        concurrency: int = 1,
        poll_interval: float = 1.0,
        lease: float = 30.0,
        notify: bool = False,
        names_keys: bool = False,
        transactional: Collection[str] = (),
        limits: Mapping[str, Limit] = NO_LIMITS,
    ) -> None:
        self.now = 100.0
        self.engine = Engine(
            concurrency=concurrency,
            poll_interval=poll_interval,
            lease=lease,
            notify=notify,
            tokens=count(1),
            names_keys=names_keys,
            transactional=transactional,
            type_limits=limits,
        )

    def step(self) -> Step:
        return self.engine.step(self.now)

    def exchange(self) -> Exchange:
        step = self.step()
        assert isinstance(step, Exchange), step
        return step

    def next_exchange(self) -> Exchange:
        """Pass time until there is something to exchange."""
        while isinstance(step := self.step(), Sleep):
            self.now = step.until
        assert isinstance(step, Exchange), step
        return step

    def next_sweep(self) -> tuple[Exchange, Sweep]:
        """Pass time, and answer what else is exchanged, until there is a sweep."""
        while True:
            exchange = self.next_exchange()
            if isinstance(exchange.claim, Sweep):
                return exchange, exchange.claim
            self.answer()

    def sleep(self) -> float:
        step = self.step()
        assert isinstance(step, Sleep), step
        return step.until

    def answer(self, reply: Reply | None = None) -> Effects:
        self.now += ROUND_TRIP
        return self.engine.acknowledge(reply or Reply(), self.now)

    def claim(self, *names: str, waits: tuple[float, ...] = ()) -> list[Claimed]:
        """Answer the engine's claim with these jobs."""
        while self.exchange().claim is None:
            self.answer()
        return self.answer(found(*map(job, names), waits=waits)).run

    def finish(self, *claimed: Claimed, result: Result | None = None, took: float = 1.0) -> None:
        self.engine.finish([Outcome(c, result or Complete(), took) for c in claimed])

    def settle(self) -> list[Event]:
        """Answer the engine's settlements: everything was held."""
        exchange = self.exchange()
        return self.answer(Reply(settled=set(settled(exchange)))).events

    def asked(self, *cancelled: Claimed) -> list[Event]:
        """Answer which of the jobs that are gone were cancelled."""
        exchange = self.exchange()
        assert exchange.ask
        ids = {c.job.id for c in exchange.extend}
        held = set(settled(exchange))
        ended = {(c.job.id, c.token) for c in cancelled}
        return self.answer(Reply(cancelled=ended, settled=held, extended=ids)).events

    def miss(self) -> None:
        """Answer that no row was held, neither a usual one nor that of a replaced job."""
        exchange = self.exchange()
        self.answer(Reply())
        again = self.exchange()
        assert (exchange.follows, again.follows) == (False, True)
        assert settled(again) == settled(exchange)
        assert self.answer(Reply()).events == []

    def lose(self) -> None:
        """Break the connection under the exchange, and mend it."""
        self.engine.disconnect(self.now)
        self.engine.reconnect()

    def drain(self, lock: str = "taken") -> float:
        """Answer everything with nothing until the engine sleeps; until when."""
        while isinstance(step := self.step(), Exchange):
            extended = {c.job.id for c in step.extend}
            self.answer(
                Reply(lock_answer=lock if step.notify_lock == "take" else None, extended=extended)
            )
        assert isinstance(step, Sleep), step
        return step.until


NO_BLOCKED = Blocked([], "")


def found(
    *jobs: Job,
    waits: tuple[float, ...] = (),
    suspects: bool = False,
    freed: int = 0,
    keys: bool = False,
    blocked: Blocked = NO_BLOCKED,
) -> Reply:
    """Make the answer to a claim of any kind but a group's."""
    lines = [Line(0, NOON, wait, suspects) for wait in waits or (None,)]
    swept = Swept(list(jobs), freed, has_keys=keys)
    return Reply(claimed=list(jobs), swept=swept, lines=lines, blocked=blocked)


def settled(exchange: Exchange) -> list[str]:
    return [
        *(c.job.id for c in exchange.complete),
        *(p.claimed.job.id for p in exchange.postpone),
        *(b.claimed.job.id for b in exchange.dead_letter),
        *(c.job.id for c in exchange.release_jobs),
    ]


# -- how much is claimed -------------------------------------------------------------


def test_before_anything_is_known_only_the_free_slots_are_filled() -> None:
    claim = Drive(concurrency=3).exchange().claim
    assert claim is not None
    assert claim.limit == 3


def test_slow_jobs_are_not_claimed_ahead() -> None:
    drive = Drive(concurrency=2)
    a, _ = drive.claim("a", "b")
    drive.finish(a, took=5.0)
    claim = drive.exchange().claim
    assert claim is not None
    assert claim.limit == 1


def test_jobs_of_a_tenth_of_a_second_are_not_claimed_ahead_however_many_slots_there_are() -> None:
    drive = Drive(concurrency=50)
    first, *_ = drive.claim(*(f"job-{n}" for n in range(50)))
    drive.finish(first, took=0.1)
    claim = drive.exchange().claim
    assert claim is not None
    assert claim.limit == 1


def test_quick_jobs_are_claimed_in_large_batches() -> None:
    drive = Drive(concurrency=2)
    limits = []
    for number in range(12):
        drive.finish(*drive.claim(f"job-{number}"), took=0.00001)
        drive.engine.wake(Notice(later=True))
        claim = drive.exchange().claim
        assert claim is not None
        limits.append(claim.limit)
        drive.answer()
        drive.engine.wake(Notice(later=True))
    assert limits == sorted(limits)
    assert limits[-1] >= 500


def test_nothing_is_claimed_while_every_slot_is_taken() -> None:
    drive = Drive(concurrency=1)
    drive.claim("a")
    assert drive.drain() > drive.now


def test_jobs_claimed_ahead_that_do_not_start_are_given_back() -> None:
    drive = Drive(concurrency=1)
    drive.finish(*drive.claim("a"), took=0.001)
    drive.settle()
    drive.engine.wake(Notice(later=True))
    _, waiting = drive.claim("b", "c")
    claimed_at = drive.now
    while not isinstance(step := drive.step(), Withdraw):
        match step:
            case Exchange():
                drive.answer()
            case Sleep(until):
                drive.now = until
    assert drive.now <= claimed_at + 0.5
    drive.engine.withdrawn([waiting])
    assert drive.engine.pace.running == 1
    exchange = drive.exchange()
    assert exchange.release_jobs == [waiting]
    assert drive.answer(Reply(settled={"c"})).events == []


# -- leases --------------------------------------------------------------------------------


def test_a_lease_is_extended_after_a_third() -> None:
    drive = Drive(lease=3.0, poll_interval=10.0)
    sent_at = drive.now
    claimed = drive.claim("a")
    assert drive.sleep() == sent_at + 1.0
    drive.now = sent_at + 1.0
    assert drive.exchange().extend == claimed


def test_a_lease_is_extended_again_a_third_after_its_extension() -> None:
    drive = Drive(lease=3.0, poll_interval=10.0)
    drive.claim("a")
    drive.now = drive.sleep()
    sent_at = drive.now
    drive.exchange()
    drive.answer(Reply(extended={"a"}))
    assert drive.sleep() == sent_at + 1.0


def test_a_job_whose_lease_another_worker_took_is_told_lost_once_and_its_result_dropped() -> None:
    drive = Drive(lease=3.0, poll_interval=10.0)
    claimed = drive.claim("a")
    drive.now = drive.sleep()
    drive.exchange()
    assert drive.answer(Reply()).events == []
    drive.finish(*claimed)
    assert drive.engine.pace.running == 0
    exchange = drive.exchange()
    assert (settled(exchange), exchange.ask) == ([], claimed)
    assert drive.answer(Reply()).events[0] == JobLeaseLost(claimed[0].job)
    drive.sleep()  # it asks once


def cancel(drive: Drive, *claimed: Claimed) -> list[Event]:
    """Notify the engine of cancelled claims."""
    return drive.engine.cancelled([(c.token, c.job.id) for c in claimed])


def test_a_cancelled_job_is_told_once_and_interrupted_until_its_handler_ends() -> None:
    drive = Drive(concurrency=2)
    a, b = drive.claim("a", "b")
    assert cancel(drive, a) == [JobCancelled(a.job)]
    assert cancel(drive, a) == []
    assert cancel(drive, Claimed(b.job, b.token + 1)) == []  # another claim of it
    assert set(drive.engine.to_interrupt) == {a}
    drive.drain()
    drive.finish(a, b)
    assert not drive.engine.to_interrupt
    exchange = drive.exchange()
    assert exchange.complete == [b]
    assert drive.answer(Reply(settled={"b"})).events[0] == Outcome(b, Complete(), 1.0)
    assert drive.engine.pace.running == 0


def test_a_cancel_drops_a_result_that_is_not_stored_yet() -> None:
    drive = Drive(concurrency=2)
    a, b = drive.claim("a", "b")
    drive.finish(a, took=2.0)
    assert cancel(drive, a) == [JobCancelled(a.job, ran=2.0)]
    assert not drive.engine.to_interrupt
    drive.finish(b, took=2.0)
    assert drive.exchange().complete == [b]
    assert cancel(drive, b) == [JobCancelled(b.job, ran=2.0)]  # it was sent, and came too late
    assert not any(isinstance(e, Outcome | JobLeaseLost) for e in drive.answer(Reply()).events)
    drive.drain()


@pytest.mark.parametrize("kind", ["t", "other"])  # ordinary, and transactional
def test_without_a_notification_a_cancel_is_found_at_the_next_extension(kind: str) -> None:
    drive = Drive(lease=3.0, poll_interval=10.0, transactional={"t"} if kind == "t" else ())
    (a,) = drive.claim("a")
    drive.now = drive.sleep()
    assert drive.exchange().extend == [a]
    assert drive.answer(Reply()).events == []
    assert drive.asked(a)[0] == JobCancelled(a.job)
    assert set(drive.engine.to_interrupt) == {a}
    drive.finish(a)
    assert not drive.engine.to_interrupt
    assert drive.exchange().outcomes == []
    drive.answer()
    assert drive.engine.pace.running == 0


def test_a_transactional_job_that_its_own_transaction_has_settled_is_not_told_lost() -> None:
    drive = Drive(lease=3.0, poll_interval=10.0, transactional={"t"})
    (a,) = drive.claim("a")
    drive.now = drive.sleep()
    drive.exchange()
    drive.answer(Reply())
    assert drive.asked() == []
    assert drive.engine.finish([Outcome(a, Committed(Complete()), 1.0)]) == [
        Outcome(a, Complete(), 1.0)
    ]


def test_a_handler_that_was_given_up_counts_for_nothing_when_it_returns() -> None:
    drive = Drive(concurrency=1)
    (a,) = drive.claim("a")
    cancel(drive, a)
    drive.engine.handlers_given_up([a])
    assert not drive.engine.to_interrupt
    assert drive.engine.pace.running == 0
    (b,) = drive.claim("b")
    drive.finish(a)
    assert drive.engine.pace.running == 1
    drive.sleep()
    drive.finish(b)
    assert drive.exchange().complete == [b]


def test_where_the_server_refuses_to_say_what_was_cancelled_the_job_counts_as_lost() -> None:
    drive = Drive(lease=3.0, poll_interval=1.0)
    (a,) = drive.claim("a")
    drive.finish(a)
    drive.exchange()
    drive.answer(Reply())
    events: list[Event] = []
    for _ in range(20):
        exchange = drive.next_exchange()
        if exchange.ask:
            drive.engine.reject(drive.now)
            events += drive.engine.refused()
        else:
            events += drive.answer().events
    assert JobLeaseLost(a.job, ran=1.0) in events
    assert not drive.next_exchange().ask


def test_after_an_outage_longer_than_the_lease_a_worker_settles_and_extends_before_it_claims() -> (
    None
):
    drive = Drive(concurrency=3, lease=2.0)
    finished, running = drive.claim("finished", "running")
    drive.engine.disconnect(drive.now)
    drive.finish(finished)
    drive.now += 5.0
    drive.engine.reconnect()
    first = drive.exchange()
    assert settled(first) == ["finished"]
    assert first.extend == [running]
    assert first.claim is None
    drive.answer(Reply(settled={"finished"}, extended={"running"}))
    assert isinstance(drive.exchange().claim, Sweep)


def test_no_sweep_frees_what_the_worker_itself_holds() -> None:
    drive = Drive(concurrency=3, lease=2.0)
    (held,) = drive.claim("a")
    drive.engine.reconnect()
    claim = drive.exchange().claim
    assert isinstance(claim, Sweep)
    assert claim.held == (held.token,)


def test_a_worker_without_a_slot_frees_none_of_its_own_leases_either() -> None:
    drive = Drive(concurrency=1, lease=30.0, poll_interval=2.0)
    (held,) = drive.claim("a")
    claim = drive.next_exchange().claim
    assert isinstance(claim, Sweep)
    assert (claim.limit, claim.held) == (0, (held.token,))


def test_what_was_claimed_without_an_answer_is_freed_by_each_sweep_for_a_lease() -> None:
    drive = Drive(concurrency=3, lease=30.0)
    (held,) = drive.claim("a")
    drive.drain()
    drive.engine.wake(Notice())
    lost = drive.exchange().claim
    assert isinstance(lost, Claim)
    sent_at = drive.now
    drive.lose()
    sweeps = 0
    while drive.now < sent_at + 40.0:
        exchange = drive.next_exchange()
        if isinstance(exchange.claim, Sweep):
            sweeps += 1
            unanswered = (lost.token,) if drive.now < sent_at + 30.0 else ()
            assert exchange.claim.unanswered == unanswered
            assert exchange.claim.held == (held.token,)
        # The server shows it only now and then.
        drive.answer(Reply(extended={c.job.id for c in exchange.extend}))
    assert sweeps >= 20


def test_a_sweep_or_a_group_whose_answer_was_lost_is_freed_like_a_claim() -> None:
    drive = Drive()
    sweep = drive.exchange().claim
    assert isinstance(sweep, Sweep)
    drive.lose()
    assert isinstance(again := drive.exchange().claim, Sweep)
    assert again.unanswered == (sweep.token,)
    drive.answer(found(suspects=True))
    while not isinstance(group := drive.next_exchange().claim, ClaimGroup):
        drive.answer(found(suspects=True))
    drive.lose()
    assert isinstance(again := drive.exchange().claim, Sweep)
    assert again.unanswered == (sweep.token, group.token)


def test_what_the_server_answered_or_refused_is_not_freed() -> None:
    drive = Drive(concurrency=2)
    drive.exchange()
    drive.engine.reject(drive.now)
    drive.now += 1.0
    (held,) = drive.claim("a")
    drive.engine.disconnect(drive.now)
    drive.engine.reconnect()
    assert isinstance(claim := drive.next_exchange().claim, Sweep)
    assert claim.unanswered == ()
    assert claim.held == (held.token,)


def test_a_sweep_in_parts_frees_what_was_claimed_without_an_answer_and_nothing_that_is_held() -> (
    None
):
    drive = Drive(concurrency=3, lease=300.0)
    (held,) = drive.claim("a")
    while not isinstance(lost := (exchange := drive.next_exchange()).claim, Claim):
        drive.now += 0.2 if isinstance(lost, Sweep) else 0.0
        drive.answer(Reply(extended={c.job.id for c in exchange.extend}))
        if drive.engine._lookout.marks.window() is not None:
            drive.engine.wake(Notice())
    drive.lose()
    sweep = drive.exchange().claim
    assert isinstance(sweep, Sweep)
    assert sweep.window is not None
    assert sweep.unanswered == (lost.token,)
    assert sweep.held == (held.token,)


def test_after_a_lost_claim_a_sweep_in_parts_begins_where_claims_start() -> None:
    marks = Watermarks(1.0)
    marks.claimed([job("a")], full=False)
    for now in (0.0, 50.0):
        marks.swept([Line(0, NOON, None, False)], None, full=False, began=now, now=now + 0.2)
    first = marks.window()
    assert first is not None
    marks.swept_part(first, [], began=100.0, now=100.02)
    then = marks.window()
    assert then is not None
    assert then.until == first.since
    marks.start_again()
    again = marks.window()
    assert again is not None
    assert again.until == first.until


def test_a_claim_is_held_before_it_is_acknowledged() -> None:
    drive = Drive(concurrency=2)
    drive.engine.bulky = 1
    drive.finish(*drive.claim("quick"), took=1e-6)
    claimed = flowing(drive, *map(str, range(10)))
    in_progress = drive.exchange().claim
    drive.finish(claimed[0], took=1e-6)
    drive.engine.reconnect()  # the next look is a sweep
    ahead = drive.engine.ahead(drive.now)
    assert ahead is not None
    assert isinstance(ahead.claim, Sweep)
    assert in_progress is not None
    assert in_progress.token in ahead.claim.held


def test_an_extension_that_is_refused_again_and_again_does_not_stop_claims() -> None:
    drive = Drive(concurrency=3, lease=2.0)
    drive.claim("a")
    drive.now += 5.0
    for _ in range(20):
        if drive.exchange().claim is not None:
            break
        drive.engine.reject(drive.now)
        drive.now += 0.5
    else:
        raise AssertionError("nothing is claimed")


# -- settlements --------------------------------------------------------------------------


def test_an_outcome_is_told_once_its_settlement_is_acknowledged() -> None:
    drive = Drive()
    (a,) = drive.claim("a")
    drive.finish(a)
    assert drive.settle() == [Outcome(a, Complete(), 1.0), QueueIsEmpty("")]


def test_a_settlement_that_finds_nothing_means_that_the_lease_was_lost() -> None:
    drive = Drive()
    (a,) = drive.claim("a")
    drive.finish(a)
    drive.miss()
    assert JobLeaseLost(a.job, ran=1.0) in drive.asked()


def test_a_job_that_was_replaced_while_it_ran_is_settled_by_a_second_statement() -> None:
    drive = Drive(concurrency=3)
    a, b, c = drive.claim("a", "b", "c")
    drive.finish(a, b)
    assert settled(drive.exchange()) == ["a", "b"]
    assert drive.answer(Reply(settled={"b"})).events == [Outcome(b, Complete(), 1.0)]
    drive.finish(c)
    assert drive.engine.ahead(drive.now) is None
    exchange = drive.exchange()
    assert (exchange.follows, settled(exchange)) == (True, ["a"])
    drive.engine.reject(drive.now)  # then it is settled as usual, and missed again
    found = drive.next_exchange()
    while not found.follows:
        drive.answer(Reply(settled=set(settled(found)) - {"a"}))
        found = drive.next_exchange()
    assert settled(found) == ["a"]
    assert drive.answer(Reply(settled={"a"})).events[0] == Outcome(a, Complete(), 1.0)
    assert drive.engine.unsettled == 0


def test_a_settlement_whose_answer_was_lost_counts_if_asked_again_within_the_lease() -> None:
    drive = Drive()
    (a,) = drive.claim("a")
    drive.finish(a)
    drive.exchange()
    drive.lose()
    drive.miss()
    assert drive.asked() == [Outcome(a, Complete(), 1.0), QueueIsEmpty("")]


def test_a_retry_whose_answer_was_lost_is_told_although_the_job_was_claimed_again() -> None:
    drive = Drive(concurrency=2)
    (a,) = drive.claim("a")
    drive.finish(a, result=Retry(0.0, "why"))
    drive.exchange()
    drive.lose()
    exchange = drive.exchange()
    assert exchange.claim is not None
    assert settled(exchange) == ["a"]
    effects = drive.answer(found(a.job))
    assert [claimed.job.id for claimed in effects.run] == ["a"]
    assert effects.events == []
    assert drive.asked() == [Outcome(a, Retry(0.0, "why"), 1.0)]


def test_a_settlement_that_was_lost_before_a_cancel_is_told_as_cancelled() -> None:
    drive = Drive()
    (a,) = drive.claim("a")
    drive.finish(a)
    drive.exchange()
    drive.lose()  # and it never arrived
    drive.miss()
    assert drive.asked(a)[0] == JobCancelled(a.job, ran=1.0)


def test_a_job_that_was_told_as_cancelled_is_not_told_as_completed_by_a_later_answer() -> None:
    drive = Drive(concurrency=2)
    a, b = drive.claim("a", "b")
    drive.finish(a, b)
    assert settled(drive.exchange()) == ["a", "b"]
    assert cancel(drive, a)  # any session can send a notification
    events = drive.answer(Reply(settled={"a", "b"})).events
    assert [event for event in events if isinstance(event, Outcome)] == [
        Outcome(b, Complete(), 1.0)
    ]


def test_a_settlement_whose_answer_was_lost_does_not_count_after_the_lease() -> None:
    drive = Drive(lease=3.0)
    (a,) = drive.claim("a")
    drive.finish(a)
    drive.exchange()
    drive.engine.disconnect(drive.now)
    drive.now += 3.0
    drive.engine.reconnect()
    drive.miss()
    assert JobLeaseLost(a.job, ran=1.0) in drive.asked()


def flowing(drive: Drive, *names: str) -> list[Claimed]:
    """Answer the engine's claim from its marks with these jobs."""
    drive.engine.wake(Notice(since={0: NOON}))
    while not isinstance((exchange := drive.next_exchange()).claim, Claim):
        drive.answer(replace(found(), settled=set(settled(exchange))))
        drive.engine.wake(Notice(since={0: NOON}))
    return drive.answer(replace(found(*map(job, names)), settled=set(settled(exchange)))).run


def test_what_was_lost_does_not_count_for_what_still_runs() -> None:
    drive = Drive(concurrency=2, lease=3.0)
    drive.engine.bulky = 1
    drive.finish(*drive.claim("quick"), took=1e-6)
    claimed = flowing(drive, *map(str, range(10)))  # as many as were asked for: there are more
    drive.exchange()
    drive.finish(claimed[0], took=1e-6)
    ahead = drive.engine.ahead(drive.now)
    assert ahead is not None
    assert ahead.complete == claimed[:1]
    drive.now += 3.0
    assert drive.answer(found(claimed[0].job)).events == [JobLeaseLost(claimed[0].job)]
    drive.lose()
    drive.finish(*claimed[1:-1])
    exchange = drive.next_exchange()
    assert exchange.complete == claimed[:-1]
    ids = {c.job.id for c in claimed}
    events = drive.answer(Reply(settled=ids - {"0"}, extended=ids)).events
    assert events == [Outcome(c, Complete(), 1.0) for c in claimed[1:-1]]
    assert claimed[-1] in drive.engine.running()


def test_jobs_are_claimed_ahead_when_half_of_those_that_waited_have_started() -> None:
    drive = Drive(concurrency=4)
    took = 0.01  # seconds: a slot takes two more jobs within the time that is claimed ahead
    drive.finish(*drive.claim("first"), took=took)
    claimed = flowing(drive, *map(str, range(12)))
    assert len(claimed) == 12
    claims = []
    for each in claimed:
        drive.finish(each, took=took)
        exchange = drive.exchange()
        claims.append(exchange.claim.limit if exchange.claim else 0)
        drive.answer(replace(found(), settled=set(settled(exchange))) if exchange.claim else None)
        if exchange.claim:
            break
    assert claims == [0, 0, 0, 4]


def test_a_sweep_without_room_does_not_forget_a_job_whose_time_was_known() -> None:
    drive = Drive(concurrency=1, poll_interval=60.0)
    drive.exchange()
    drive.now += 0.1  # so much that sweeps are rare
    drive.answer(found(waits=(0.5,)))
    assert isinstance(drive.next_exchange().claim, Claim)
    drive.answer()  # the server's clock says that it is due a moment later
    drive.engine.slots = 0
    sweep = drive.next_exchange().claim
    assert isinstance(sweep, Sweep)
    assert sweep.limit == 0
    drive.answer(found())  # it shows the jobs that are due later, and that one no more
    drive.engine.slots = 1
    assert drive.exchange().claim is not None


def test_more_is_claimed_ahead_once_all_claims_have_been_full_for_a_tenth_of_a_second() -> None:
    drive = Drive(concurrency=2)
    took, tenth = 0.01, 0.1  # seconds
    numbers = count()

    def claim(*, is_full: bool, after: float) -> int:
        drive.now += after
        drive.engine.wake(Notice(later=True))
        wanted = drive.exchange().claim
        assert wanted is not None
        jobs = [job(f"job-{next(numbers)}") for _ in range(wanted.limit if is_full else 1)]
        drive.finish(*drive.answer(found(*jobs)).run, took=took)
        return wanted.limit

    claim(is_full=True, after=0.0)
    at_first = [claim(is_full=True, after=tenth / 4) for _ in range(4)]
    with_backlog = claim(is_full=False, after=tenth)
    afterwards = claim(is_full=True, after=tenth)
    two_slots = 2
    assert max(at_first) == two_slots + two_slots * 2
    assert with_backlog == two_slots + two_slots * 5
    assert afterwards == max(at_first)


def test_a_refused_settlement_is_halved_until_the_poisonous_outcome_stands_alone() -> None:
    drive = Drive(concurrency=8)
    drive.finish(*drive.claim(*"abcdefgh"))
    told: set[str] = set()
    alone = 0
    for _ in range(100):
        match drive.step():
            case Sleep(until):
                drive.now = until
            case Exchange() as exchange if "c" in settled(exchange):
                alone += settled(exchange) == ["c"]
                drive.engine.reject(drive.now)
            case Exchange() as exchange:
                news = drive.answer(Reply(settled=set(settled(exchange))))
                told |= {e.claimed.job.id for e in news.events if isinstance(e, Outcome)}
    assert told == set("abdefgh")
    assert alone


def test_halving_goes_on_while_claims_succeed_in_between() -> None:
    drive = Drive(concurrency=20)
    drive.finish(*drive.claim(*"abcdefgh"))
    told: set[str] = set()
    for _ in range(100):
        drive.engine.wake(Notice(later=True))
        match drive.step():
            case Sleep(until):
                drive.now = until
            case Exchange() as exchange if "c" in settled(exchange):
                drive.engine.reject(drive.now)
            case Exchange() as exchange:
                news = drive.answer(Reply(settled=set(settled(exchange))))
                told |= {e.claimed.job.id for e in news.events if isinstance(e, Outcome)}
    assert told == set("abdefgh")


def test_a_poisonous_outcome_does_not_keep_its_slot() -> None:
    drive = Drive(concurrency=1)
    drive.finish(*drive.claim("poisonous"))
    ends = drive.now + 5.0
    while drive.now < ends:
        drive.engine.wake(Notice(later=True))
        match drive.step():
            case Sleep(until):
                drive.now = until
            case Exchange() as exchange if settled(exchange):
                drive.engine.reject(drive.now)
            case Exchange(claim=claim) if claim is not None:
                return
            case Exchange():
                drive.answer(Reply(extended={"poisonous"}))
    raise AssertionError("nothing was claimed beside it")


def test_of_what_was_refused_for_a_lock_only_the_locked_rows_wait() -> None:
    drive = Drive(concurrency=4)
    jobs = drive.claim("a", "b", "locked", "c")
    drive.finish(*jobs)
    exchange = drive.exchange()
    assert len(settled(exchange)) == 4
    assert not drive.engine.reject(drive.now, for_lock=True)
    probe = drive.exchange()
    assert [c.job.id for c in probe.probe] == settled(exchange)
    assert settled(probe) == []
    refused_at = drive.now
    drive.answer(Reply(barred=["locked"]))
    while not settled(exchange := drive.next_exchange()):
        drive.answer()
    assert settled(exchange) == ["a", "b", "c"]
    assert drive.now - refused_at < 0.05
    drive.answer(Reply(settled={"a", "b", "c"}))
    asked: list[float] = []
    while len(asked) < 5:  # ever more seldom, and nothing waits for it
        exchange = drive.next_exchange()
        assert "locked" not in settled(exchange)
        if exchange.probe:
            asked.append(drive.now)
        drive.answer(Reply(barred=["locked"] if exchange.probe else ()))
    pauses = [after - before for before, after in pairwise(asked)]
    assert pauses == sorted(pauses)
    while not drive.next_exchange().probe:
        drive.answer()
    drive.answer()
    while not settled(exchange := drive.next_exchange()):
        drive.answer()
    assert settled(exchange) == ["locked"]
    assert [
        e.claimed.job.id
        for e in drive.answer(Reply(settled={"locked"})).events[:1]
        if isinstance(e, Outcome)
    ] == ["locked"]


def test_a_lock_that_is_on_none_of_its_rows_makes_the_engine_halve_what_was_refused() -> None:
    drive = Drive(concurrency=4)
    drive.finish(*drive.claim("a", "b", "poisonous", "c"))
    done: set[str] = set()
    ends = drive.now + 3.0
    while drive.now < ends:
        match drive.step():
            case Sleep(until):
                drive.now = until
            case Exchange() as exchange if "poisonous" in settled(exchange):
                drive.now += 0.1
                drive.engine.reject(drive.now, for_lock=True)
            case Exchange() as exchange:
                done |= set(settled(exchange))
                drive.answer(Reply(settled=set(settled(exchange))))
    assert done == {"a", "b", "c"}


def test_a_row_that_stays_locked_is_told_after_some_seconds() -> None:
    drive = Drive(concurrency=1)
    drive.finish(*drive.claim("a"))
    drive.exchange()
    refused_at = drive.now
    drive.engine.reject(drive.now, for_lock=True)
    told: list[str] = []
    while not told:
        exchange = drive.next_exchange()
        barred = [c.job.id for c in exchange.probe]
        told = drive.answer(Reply(barred=barred, extended={"a"})).locked
    assert told == ["a"]
    assert 5.0 <= drive.now - refused_at < 8.0


@pytest.mark.parametrize("for_data", [True, False])
def test_outcomes_that_are_refused_for_good_do_not_stop_the_worker_as_a_full_disk_does(
    monkeypatch: pytest.MonkeyPatch, for_data: bool
) -> None:
    monkeypatch.setattr(engine, "MOST", 8)
    monkeypatch.setattr(settling, "MOST", 8)
    drive = Drive(concurrency=2, poll_interval=0.1)
    lost: list[JobLeaseLost] = []
    names = iter(range(100))
    ends = drive.now + 20.0
    claims = 0
    while drive.now < ends:
        drive.engine.wake(Notice(later=True))
        match drive.step():
            case Sleep(until):
                drive.now = until
            case Exchange() as exchange if settled(exchange):
                drive.now += ROUND_TRIP
                drive.engine.reject(drive.now, for_data=for_data)
            case Exchange() as exchange:
                jobs = [job(str(next(names)))] if exchange.claim and exchange.claim.limit else []
                claims += len(jobs)
                news = drive.answer(
                    replace(found(*jobs), extended={c.job.id for c in exchange.extend})
                )
                drive.finish(*news.run)
                lost += [event for event in news.events if isinstance(event, JobLeaseLost)]
                if claims == 40:
                    break
    assert (claims == 40) is for_data
    assert bool(lost) is for_data
    if for_data:
        assert lost[0].job.id == "0"  # the oldest
        assert drive.engine.unsettled < 10


def test_what_was_to_follow_a_refused_exchange_comes_again() -> None:
    drive = Drive(concurrency=200)
    names = [f"job-{n}" for n in range(200)]
    claimed = drive.claim(*names)
    drive.finish(*claimed[:100], took=1e-6)
    drive.exchange()
    drive.finish(*claimed[100:], took=1e-6)
    assert drive.engine.ahead(drive.now)
    drive.engine.reject(drive.now)
    told: list[str] = []
    while len(told) < len(names):
        news = drive.answer(Reply(settled=set(settled(drive.next_exchange()))))
        told += [e.claimed.job.id for e in news.events if isinstance(e, Outcome)]
    assert sorted(told) == sorted(names)
    assert not drive.engine.unsettled


def test_a_known_due_time_is_kept_when_a_claim_for_another_reason_finds_nothing() -> None:
    # Of a sweep it would not learn it soon: that is put off for forty times what the last took.
    drive = Drive(poll_interval=3600.0)
    (a,) = drive.claim("a")
    drive.finish(a, result=Retry(5.0))
    drive.settle()
    due_at = drive.now + 5.0
    while drive.now < due_at - 1.0:
        drive.engine.wake(Notice(later=True))
        match drive.step():
            case Sleep(until):
                drive.now = min(until, due_at - 1.0)
            case Exchange(claim=Sweep()):
                drive.now += 0.5
                drive.answer(found(waits=(due_at - drive.now,)))
            case Exchange():
                drive.answer()
    while isinstance(step := drive.step(), Exchange):
        drive.answer()
    assert isinstance(step, Sleep)
    assert step.until <= due_at + ROUND_TRIP


def test_a_refused_settlement_is_not_tried_again_at_once() -> None:
    drive = Drive()
    (a,) = drive.claim("a")
    drive.finish(a)
    drive.exchange()
    drive.engine.reject(drive.now)
    step = drive.step()
    assert isinstance(step, Sleep) or (isinstance(step, Exchange) and not settled(step))


def test_pauses_after_refusals_leave_time_to_extend() -> None:
    drive = Drive(concurrency=2, lease=3.0, poll_interval=60.0)
    a, _ = drive.claim("a", "b")
    claimed_at = drive.now
    drive.finish(a)
    while drive.now < claimed_at + 2.0:
        match drive.step():
            case Sleep(until):
                drive.now = until
            case Exchange() as exchange if settled(exchange):
                drive.engine.reject(drive.now)
            case Exchange(extend=[_, *_]):
                return
            case Exchange():
                drive.answer()
    raise AssertionError("not extended in two thirds of the lease")


def test_a_job_that_was_cancelled_requeued_and_claimed_again_has_one_claim() -> None:
    drive = Drive(concurrency=2, lease=3.0)
    (old,) = drive.claim("a")
    drive.engine.wake(Notice(later=True))
    drive.exchange()
    effects = drive.answer(found(job("a")))
    (new,) = effects.run
    assert effects.events == [JobLeaseLost(old.job)]  # long before the lease has ended
    drive.finish(old)
    drive.now += 1.0
    exchange = drive.next_exchange()
    assert (exchange.outcomes, exchange.extend) == ([], [new])


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (Committed(Reschedule(0)), "Outcome"),  # the claim is of the job that it has put back
        (Fenced(), "JobLeaseLost"),
        (Retry(0.0), "JobLeaseLost"),
    ],
)
def test_a_transactional_job_claimed_again_is_told_by_what_its_own_transaction_did(
    result: Committed | Fenced | Retry, told: str
) -> None:
    drive = Drive(concurrency=2, lease=3.0, transactional={"t"})
    (old,) = drive.claim("a")
    drive.engine.wake(Notice(later=True))
    drive.exchange()
    effects = drive.answer(found(job("a")))
    (new,) = effects.run
    assert effects.events == []
    events = drive.engine.finish([Outcome(old, result, 0.0)])
    drive.now += 1.0
    exchange = drive.next_exchange()
    assert (exchange.outcomes, exchange.extend) == ([], [new])
    events += drive.answer().events
    assert [type(event).__name__ for event in events] == [told]


def test_a_job_claimed_again_by_the_same_worker_ends_its_older_claim() -> None:
    drive = Drive(concurrency=2, lease=3.0)
    (old,) = drive.claim("a")
    drive.engine.disconnect(drive.now)
    drive.now += 3.0
    drive.engine.reconnect()
    # The extension is refused for a passing reason, until the claim is next in turn.
    while drive.exchange().extend == [old]:
        drive.engine.reject(drive.now)
        drive.now = drive.sleep()
    assert drive.answer(found(job("a"))).events == [JobLeaseLost(old.job)]
    drive.finish(old)
    assert settled(drive.exchange()) == []


# -- groups --------------------------------------------------------------------------------


def members(drive: Drive, **groups: str | None) -> list[Claimed]:
    """Claim jobs of these names, each in a group."""
    while drive.next_exchange().claim is None:
        drive.answer()
    jobs = (job(name)._replace(group=group) for name, group in groups.items())
    return drive.answer(found(*jobs)).run


def test_the_exchange_after_a_settlement_asks_about_its_groups_once() -> None:
    drive = Drive(concurrency=5)
    a, b, c, retried, then = members(drive, a="g", b="g", c="h", d="i", then="then")
    drive.finish(a, b, c, then)
    drive.finish(retried, result=Retry(1.0))
    settlement = drive.exchange()
    assert (settled(settlement)[0], list(settlement.groups)) == ("a", [])
    drive.answer(Reply(settled=set(settled(settlement))))
    asking = drive.exchange()
    assert list(asking.groups) == ["g", "h"]
    drive.answer(Reply(ended=["g"]))
    looking = drive.exchange()  # `then` may be one of this queue
    assert (looking.claim is not None, list(looking.groups)) == (True, [])


def test_of_jobs_without_a_group_nothing_is_asked() -> None:
    drive = Drive(concurrency=2)
    for _ in range(3):
        drive.finish(*members(drive, a=None, b=None))
        exchange = drive.exchange()
        assert not exchange.groups
        drive.answer(Reply(settled=set(settled(exchange))))
    while isinstance(step := drive.step(), Exchange):
        assert not step.groups
        drive.answer()


@pytest.mark.parametrize("how", ["refused", "lost"])
def test_a_question_without_an_answer_comes_again_with_a_look_at_the_queue_of_then(
    how: str,
) -> None:
    drive = Drive()
    drive.finish(*members(drive, a="g"))
    drive.settle()
    assert drive.exchange().groups
    if how == "refused":
        drive.engine.reject(drive.now)
    else:
        drive.lose()
    exchange = drive.next_exchange()
    while not isinstance(exchange.claim, Sweep):
        assert not exchange.groups
        drive.answer()
        exchange = drive.next_exchange()
    drive.answer(Reply(lines=[Line(0, NOON, None, False, ["g", "k"])]))
    while not exchange.groups:
        exchange = drive.next_exchange()
        drive.answer()
    assert list(exchange.groups) == ["g", "k"]


def test_a_worker_stops_when_it_has_asked_about_the_groups_of_its_last_jobs() -> None:
    drive = Drive(transactional={"t"})
    claimed = members(drive, a="g")
    drive.engine.shutdown()
    assert isinstance(drive.step(), Withdraw)
    drive.engine.finish([Outcome(claimed[0], Committed(Complete()), 1.0)])
    asking = drive.exchange()
    assert (settled(asking), list(asking.groups)) == ([], ["g"])
    drive.answer()
    assert isinstance(drive.step(), Stop)


# -- waking ------------------------------------------------------------------------------------


def test_a_notification_wakes() -> None:
    drive = Drive()
    drive.drain()
    drive.engine.wake(Notice(later=True))
    assert drive.exchange().claim is not None


LATER = NOON + timedelta(minutes=1)


def idle(*, limits: Mapping[str, Limit] = NO_LIMITS) -> Drive:
    """Drive an engine that has run a job, holds the notify lock, and sleeps."""
    drive = Drive(notify=True, concurrency=2, limits=limits)
    drive.finish(*drive.claim("a"))
    drive.settle()
    drive.drain()
    return drive


@pytest.mark.parametrize("since", [{0: LATER}, {0: NOON - timedelta(1)}, {0: LATER, 7: LATER}])
def test_an_idle_worker_claims_at_once_what_it_would_claim_next(since: dict[int, datetime]) -> None:
    drive, usual, notice = idle(), idle(), Notice(since)
    usual.engine.wake(notice)
    assert drive.engine.at_once(notice, drive.now) == usual.exchange()
    assert [c.job.id for c in drive.answer(found(job("b", due=LATER))).run] == ["b"]


@pytest.mark.parametrize(
    "notice",
    [
        Notice({0: LATER}, later=True),
        Notice({0: LATER}, relief=True),
        Notice({0: LATER}, cancelled=frozenset({(1, "a")})),
    ],
    ids=["due later", "a released lock", "a cancel"],
)
def test_what_else_a_notification_says_is_not_answered_at_once(notice: Notice) -> None:
    drive = idle()
    assert drive.engine.at_once(notice, drive.now) is None
    assert drive.engine.at_once(Notice({0: LATER}), drive.now) is not None


def has_a_job(drive: Drive) -> None:
    drive.engine.wake(Notice({0: LATER}))
    drive.claim("b")


def is_refused(drive: Drive) -> None:
    drive.engine.wake(Notice({0: LATER}))
    drive.exchange()
    drive.engine.reject(drive.now)


def lets_go(drive: Drive) -> None:
    drive.engine.disconnect(drive.now)


@pytest.mark.parametrize("event", [has_a_job, is_refused, lets_go, lambda d: d.engine.shutdown()])
def test_a_worker_that_may_have_other_work_claims_nothing_at_once(
    event: Callable[[Drive], object],
) -> None:
    drive = idle()
    event(drive)
    assert drive.engine.at_once(Notice({0: LATER}), drive.now) is None


def test_a_worker_with_a_limit_claims_nothing_at_once() -> None:
    drive = idle(limits={"t": Limit(1)})
    assert drive.engine.at_once(Notice({0: LATER}), drive.now) is None


def test_a_delayed_job_is_claimed_when_it_is_due() -> None:
    drive = Drive(poll_interval=10.0)
    drive.claim(waits=(0.5,))
    assert drive.sleep() == drive.now + 0.5
    drive.now = drive.sleep()
    assert drive.exchange().claim is not None


def test_a_retry_is_claimed_when_it_is_due() -> None:
    drive = Drive(poll_interval=10.0)
    (a,) = drive.claim("a")
    drive.finish(a, result=Retry(0.25))
    drive.settle()
    assert abs(drive.drain() - drive.now - 0.25) < 5 * ROUND_TRIP


def test_a_retry_of_another_priority_is_looked_for_while_there_is_more_of_the_first() -> None:
    drive = Drive(poll_interval=3600.0)
    (a,) = drive.claim("a")
    drive.finish(a, result=Retry(0.0, priority=-5))
    exchange = drive.exchange()
    assert exchange.claim is not None and settled(exchange) == ["a"]
    names = [f"b{n}" for n in range(exchange.claim.limit)]
    reply = found(*map(job, names))
    reply.settled.add("a")
    drive.finish(*drive.answer(reply).run)
    claim = drive.exchange().claim
    assert isinstance(claim, Claim)
    assert sorted(claim.marks) == [-5, 0]


def test_an_idle_queue_is_looked_at_every_poll_interval() -> None:
    drive = Drive(poll_interval=2.0)
    drive.claim()
    assert drive.sleep() == drive.now + 2.0
    drive.now += 2.0
    claim = drive.exchange().claim
    assert isinstance(claim, Sweep)


def test_a_worker_parks_and_looks_once_more_before_it_sleeps() -> None:
    drive = Drive(notify=True)
    drive.claim()
    assert drive.exchange().notify_lock == "take"
    drive.answer(Reply(lock_answer="taken"))
    exchange = drive.exchange()
    assert exchange.notify_lock is None
    assert exchange.claim is not None
    drive.answer(Reply())
    assert drive.sleep() > drive.now


def test_a_poll_that_is_a_sweep_parks_in_the_same_exchange() -> None:
    drive = Drive(notify=True, poll_interval=1.0)
    drive.drain(lock="covered")
    polls = []
    for _ in range(10):
        exchange = drive.next_exchange()
        assert isinstance(exchange.claim, Sweep)
        assert exchange.notify_lock == "take"
        polls.append(drive.now)
        drive.answer(Reply(lock_answer="covered"))
    assert polls[-1] - polls[0] >= 9.0


def test_the_look_after_parking_travels_with_it_where_a_sweep_can_be_afforded() -> None:
    drive = Drive(notify=True, poll_interval=10.0)
    drive.drain()
    drive.engine.disconnect(drive.now)
    drive.now += 1.0
    drive.engine.reconnect()
    exchange = drive.exchange()
    assert isinstance(exchange.claim, Sweep)
    assert exchange.notify_lock == "take"
    answers = [store for _, store in exchange.statements("q", 30.0)]
    claims = [Reply.set_lock, Reply.set_swept]
    surveys = [Reply.set_lines, Reply.set_seen]
    assert answers == claims + surveys
    drive.answer(Reply(lock_answer="taken"))
    assert drive.sleep() > drive.now + 9.0


def test_a_claim_starts_where_the_notification_says_and_only_once() -> None:
    drive = Drive(concurrency=2)
    drive.exchange()
    news = drive.answer(found(job("a"), job("b", due=NOON + timedelta(seconds=9))))
    drive.finish(*news.run)
    for seconds in (7, 3, 5):
        since = NOON + timedelta(seconds=seconds)
        drive.engine.wake(Notice({0: since}))
    claim = drive.exchange().claim
    assert isinstance(claim, Claim)
    assert claim.marks == {0: NOON + timedelta(seconds=3)}
    drive.answer(Reply(settled={"a", "b"}))
    drive.engine.wake(Notice(later=True))
    claim = drive.exchange().claim
    assert isinstance(claim, Claim)
    assert claim.marks == {0: NOON + timedelta(seconds=9)}


def test_a_worker_that_cannot_park_looks_again_after_pauses_that_double() -> None:
    drive = Drive(notify=True, poll_interval=10.0)
    pauses = []
    for _ in range(4):
        drive.claim()
        assert drive.exchange().notify_lock == "take"
        drive.answer(Reply(lock_answer="contended"))
        contended_at = drive.now
        drive.claim()
        pauses.append(round(drive.sleep() - contended_at, 6))
        drive.now = drive.sleep()
        drive.engine.wake(Notice(later=True))
    assert pauses == [0.002, 0.004, 0.008, 0.016]


@pytest.mark.parametrize(("answer", "rest"), [("deputy", 0.5), ("covered", 1.0)])
def test_a_worker_that_relies_on_another_tries_for_its_lock_and_then_lets_all_look(
    answer: str, rest: float
) -> None:
    drive = Drive(notify=True, poll_interval=10.0)
    drive.drain(lock=answer)
    for _ in range(3):
        slept_at = drive.now
        exchange = drive.next_exchange()
        assert rest - 0.01 < drive.now - slept_at < rest + 0.01
        assert (exchange.notify_lock, exchange.claim, exchange.relieve) == ("take", None, True)
        assert exchange.is_deputy is (answer == "deputy")
        drive.answer(Reply(lock_answer=answer))
    drive.next_exchange()
    drive.answer(Reply(lock_answer="taken"))
    assert drive.exchange().claim is not None  # nobody was notified meanwhile
    drive.answer()
    assert drive.sleep() > drive.now + 5.0


def exchanges_of_a_minute(drive: Drive, reply: Reply) -> int:
    until, exchanges = drive.now + 60.0, 0
    while drive.next_exchange().notify_lock is None or drive.now < until:
        drive.answer(reply)
        exchanges += 1
    drive.answer(reply)
    return exchanges


def test_an_idle_worker_beside_enough_others_polls_ten_times_as_rarely() -> None:
    usual, spare = Drive(notify=True), Drive(notify=True)
    polls = exchanges_of_a_minute(usual, Reply(lock_answer="covered", has_post=True))
    rarely = exchanges_of_a_minute(spare, Reply(lock_answer="covered", has_post=False))
    assert 50 <= polls <= 130
    assert 4 <= rarely <= 16


def test_a_deputy_exchanges_no_more_than_its_tries_which_are_part_of_its_polls() -> None:
    deputy = Drive(notify=True, poll_interval=1.0)
    assert 110 <= exchanges_of_a_minute(deputy, Reply(lock_answer="deputy")) <= 130


def test_a_worker_that_polls_rarely_claims_as_soon_as_it_is_notified() -> None:
    drive = Drive(notify=True)
    while isinstance(drive.step(), Exchange):
        drive.answer(Reply(lock_answer="covered", has_post=False))
    assert drive.sleep() > drive.now + 4.0
    drive.engine.wake(Notice({0: NOON}))
    assert drive.exchange().claim is not None


@pytest.mark.parametrize("answer", ["taken", "deputy", "contended"])
def test_the_workers_that_others_rely_on_poll_often_even_without_a_post(answer: str) -> None:
    drive = Drive(notify=True, poll_interval=0.5)
    for _ in range(5):
        drive.next_exchange()
        drive.answer(Reply(lock_answer=answer, has_post=False))
    assert drive.sleep() <= drive.now + 0.5


def test_a_worker_without_a_free_slot_leaves_its_post_after_a_second() -> None:
    drive = Drive(notify=True)
    drive.drain(lock="covered")
    drive.engine.wake(Notice(later=True))
    drive.claim("a")
    busy_at = drive.now
    while (exchange := drive.next_exchange()).notify_lock != "leave":
        drive.answer()
    assert 0.9 < drive.now - busy_at < 1.5
    drive.answer()
    assert drive.next_exchange().notify_lock is None  # it has none to leave


def test_before_a_try_for_a_post_that_was_refused_is_made_again_the_worker_leaves_what_it_may_have() -> (
    None
):
    drive = Drive(notify=True)
    drive.claim()
    assert drive.exchange().asks_post
    drive.engine.reject(drive.now)  # the locks outlive the transaction
    asked = []
    while "take" not in asked:
        exchange = drive.next_exchange()
        asked += [exchange.notify_lock] if exchange.notify_lock else []
        drive.answer()
    assert (asked, exchange.asks_post, exchange.seat) == (["leave", "take"], True, None)


@pytest.mark.parametrize("has_spares", [False, True])
def test_a_worker_without_a_free_slot_is_not_disturbed_if_there_are_spares(
    has_spares: bool,
) -> None:
    drive = Drive(notify=True, concurrency=2)
    while isinstance(drive.step(), Exchange):
        drive.answer(Reply(lock_answer="covered", has_post=True, has_spares=has_spares))
    drive.engine.wake(Notice(later=True))
    drive.claim("a")
    assert drive.engine.subscription == Subscription()
    drive.engine.wake(Notice(later=True))
    busy_at = drive.now
    drive.claim("b")
    while (exchange := drive.next_exchange()).notify_lock != "leave":
        drive.answer()
    assert drive.engine.subscription == Subscription()
    drive.answer()
    assert drive.engine.subscription == Subscription(enqueues=not has_spares)
    # Beside spares, the last slot is taken by a full claim, and there may be more.
    assert (exchange.calls, drive.now - busy_at < 0.1) == (has_spares, has_spares)


@pytest.mark.parametrize("has_spares", [False, True])
def test_while_jobs_flow_spares_are_called_before_anything_is_sent_ahead(has_spares: bool) -> None:
    drive = Drive(notify=True, concurrency=2)
    drive.engine.bulky = 1
    while isinstance(drive.step(), Exchange):
        drive.answer(Reply(lock_answer="covered", has_post=True, has_spares=has_spares))
    drive.engine.wake(Notice({0: NOON}))
    drive.finish(*drive.claim("a", "b"), took=1e-6)
    claimed = flowing(drive, *map(str, range(10)))
    drive.exchange()
    drive.finish(claimed[0], took=1e-6)
    assert (drive.engine.ahead(drive.now) is None) is has_spares


def test_a_spare_pauses_for_long_unless_it_has_jobs() -> None:
    drive = Drive(notify=True, concurrency=2)
    while isinstance(drive.step(), Exchange):
        drive.answer(Reply(lock_answer="covered", has_post=False, seat=5, has_spares=True))
    assert drive.engine.subscription == Subscription(enqueues=False, seat=5)
    assert drive.engine.rarity >= 5.0
    drive.engine.wake(Notice({0: NOON}))
    [claimed] = drive.claim("a")
    assert drive.engine.rarity == 1.0
    drive.finish(claimed)
    assert drive.engine.rarity == 1.0  # it has to settle
    drive.settle()
    assert drive.engine.rarity >= 5.0
    drive.engine.disconnect(drive.now)
    assert drive.engine.rarity == 1.0
    assert drive.engine.subscription == Subscription()


def test_a_lock_that_was_given_up_is_taken_without_a_word() -> None:
    drive = Drive(notify=True, poll_interval=10.0)
    drive.drain(lock="covered")
    drive.engine.wake(Notice(relief=True))
    while (exchange := drive.exchange()).notify_lock is None:
        drive.answer()
    assert not exchange.relieve


def test_beside_an_enqueue_that_stays_open_a_worker_looks_five_times_a_second() -> None:
    drive = Drive(notify=True, poll_interval=10.0)
    until, exchanges = drive.now + 20.0, 0
    while drive.now < until:
        exchange = drive.next_exchange()
        exchanges += 1
        drive.answer(Reply(lock_answer="contended" if exchange.notify_lock else None))
    assert exchanges < 220


def test_a_worker_that_stopped_relying_on_notifications_looks_while_jobs_flow() -> None:
    drive = Drive(concurrency=300, notify=True)
    drive.drain()
    drive.engine.wake(Notice(later=True))
    drive.claim(*(f"job-{n}" for n in range(200)))
    drive.now = drive.drain()
    assert drive.exchange().notify_lock == "release"
    drive.answer()
    assert drive.now < drive.sleep() < drive.now + 0.01
    drive.now = drive.sleep()
    assert drive.exchange().claim is not None


# -- where a claim starts ----------------------------------------------------------------------


def test_a_claim_starts_at_the_last_due_time_that_was_claimed() -> None:
    drive = Drive(concurrency=2)
    late = NOON + timedelta(seconds=1)
    drive.exchange()
    news = drive.answer(found(job("a"), job("b", due=late)))
    drive.finish(*news.run)
    claim = drive.exchange().claim
    assert isinstance(claim, Claim)
    assert claim.marks == {0: late}


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def saw(seconds: float, *numbers: int, claimed: bool = True) -> OpenTransactions:
    return OpenTransactions(at(seconds), frozenset(numbers), is_complete=claimed)


def moved_to(seconds: float) -> Watermarks:
    """Make marks that a claim has moved; whatever was under way then has ended."""
    marks = Watermarks(poll_interval=1.0)
    marks.saw(saw(seconds), seconds)
    marks.claimed([job("a", due=at(seconds))], full=False)
    return marks


def test_a_claim_looks_back_to_where_a_transaction_may_have_begun_that_has_ended() -> None:
    marks = moved_to(1.0)
    for tenth in range(20, 50):  # transaction 11 goes on among others
        marks.saw(saw(tenth / 10, 11, tenth), tenth / 10)
        marks.claimed([job("b", due=at(tenth / 10))], full=False)
        since = marks.start(tenth / 10)[0]
        marks.answered()
        assert tenth <= 21 or since > at(tenth / 10 - 0.3)
    marks.saw(saw(5.0), 5.0)
    assert marks.look_back_at < 5.2
    assert at(0.9) < marks.start(5.2)[0] < at(1.0)
    marks.answered()
    assert marks.start(5.3)[0] == at(4.9)


def test_what_was_under_way_before_anybody_looked_may_have_begun_at_any_time() -> None:
    marks = Watermarks(poll_interval=1.0)
    marks.saw(saw(1.0, 11), 1.0)
    marks.claimed([job("a", due=at(1.0))], full=False)
    assert marks.start(1.1)[0] == at(1.0)
    marks.saw(saw(2.0), 2.0)
    assert marks.start(2.0)[0] < at(-1e9)


def test_a_transaction_that_no_claim_has_overtaken_needs_no_look_back() -> None:
    marks = moved_to(1.0)
    marks.saw(saw(2.0, 11, claimed=False), 2.0)
    marks.saw(saw(3.0, claimed=False), 3.0)
    assert marks.look_back_at == inf
    assert marks.start(3.0)[0] == at(1.0)


def test_through_a_backlog_nothing_lies_behind_the_marks() -> None:
    marks = moved_to(1.0)
    marks.saw(saw(100.0, 11), 100.0)
    marks.saw(saw(101.0, 12), 101.0)  # 11 began after 1.0
    marks.start(101.0)
    marks.answered()
    marks.claimed([job("b", due=at(2.0))], full=True)
    marks.saw(saw(102.0, 13), 102.0)  # 12 began after 100.0
    assert marks.look_back_at == inf
    assert marks.start(102.0)[0] == at(2.0)


def test_looks_back_rest_a_twentieth_of_what_they_look_back_over() -> None:
    marks = moved_to(1.0)
    marks.saw(saw(2.0, 11, 12), 2.0)
    marks.claimed([job("b", due=at(2.0))], full=False)
    marks.saw(saw(5.0, 12), 5.0)
    assert marks.look_back_at == 5.0
    marks.start(5.0)
    marks.answered()
    marks.claimed([job("c", due=at(5.0))], full=False)
    marks.saw(saw(5.0), 5.01)
    assert marks.look_back_at == pytest.approx(5.2, abs=0.002)
    assert marks.start(5.1)[0] == at(5.0)
    assert marks.start(5.3)[0] < at(1.0)


def test_a_worker_that_parks_looks_back_to_what_has_ended_before() -> None:
    for looked in (False, True):
        marks = moved_to(1.0)
        marks.saw(saw(2.0, 11), 2.0)
        marks.claimed([job("b", due=at(2.0))], full=False)
        marks.notifications_on(3.0, polled_since=looked)
        assert (marks.start(3.0)[0] < at(1.0)) is not looked


def test_of_what_enqueued_while_a_worker_was_parked_it_has_been_told() -> None:
    marks = moved_to(1.0)
    marks.notifications_on(2.0, polled_since=True)
    marks.notifications_off(at(3600.0))
    marks.saw(saw(3601.0, 11), 3601.0)
    marks.claimed([job("b", due=at(3601.0))], full=False)
    marks.saw(saw(3602.0), 3602.0)
    assert at(3599.0) < marks.start(3602.0)[0] < at(3600.0)


def test_a_priority_that_a_sweep_finds_begins_where_something_may_have_been_overlooked() -> None:
    marks = moved_to(1.0)
    line = Line(5, at(3.0), None, has_suspects=False)
    marks.swept([line], saw(3.0, claimed=False), full=False, began=3.0, now=3.0)
    assert marks.start(3.0)[5] == at(1.0)
    marks.swept([line._replace(priority=6)], saw(4.0), full=False, began=4.0, now=4.0)
    assert marks.start(4.0)[6] == at(3.0)


def test_a_worker_that_polls_does_not_wait_for_a_poll_to_look_back() -> None:
    drive = Drive(concurrency=2, poll_interval=10.0)
    drive.exchange()
    drive.answer(replace(found(), seen=saw(0.0)))
    drive.now += 10.0
    drive.exchange()
    reply = found(job("a", due=at(10.0)))
    drive.finish(*drive.answer(replace(reply, seen=saw(10.0, 11))).run)
    drive.answer(Reply(settled=set(settled(drive.exchange()))))
    drive.now += 5.0
    drive.engine.wake(Notice({0: at(14.0)}))
    assert isinstance(drive.exchange().claim, Claim)
    drive.answer(replace(found(), seen=saw(15.0, claimed=False)))
    assert drive.exchange().claim is not None  # at once
    drive.answer(replace(found(), seen=saw(15.0, claimed=False)))
    assert drive.sleep() > drive.now + 4.0


def test_an_idle_worker_that_polls_pays_no_heed_to_the_transactions_of_others() -> None:
    drive = Drive(poll_interval=1.0)
    drive.exchange()
    drive.answer(replace(found(), seen=saw(0.0, 11)))
    polls = 0
    for number in range(12, 1000):
        if isinstance(drive.step(), Exchange):
            polls += 1
            drive.answer(replace(found(), seen=saw(drive.now, number, claimed=False)))
        drive.now += 0.01
    assert polls <= 11


def test_a_full_claim_leaves_what_it_was_told_of_a_later_priority_to_the_next() -> None:
    drive = Drive(concurrency=1)
    drive.exchange()
    news = drive.answer(found(job("a", due=at(9.0), priority=5), job("b", due=at(9.0))))
    drive.finish(*news.run)
    drive.answer(Reply(settled=set(settled(drive.exchange()))))
    drive.engine.wake(Notice({5: at(3.0)}))
    drive.finish(*drive.claim("c"))
    claim = drive.exchange().claim
    assert isinstance(claim, Claim)
    assert claim.marks[5] == at(3.0)


def test_a_claim_sent_ahead_starts_where_the_one_before_it_was_told_to() -> None:
    marks = moved_to(5.0)
    marks.told({0: at(1.0)})
    assert marks.start(6.0) == marks.start(6.0) == {0: at(1.0)}
    marks.claimed([job("a", due=at(2.0))], {0: at(1.0)}, full=True)
    marks.answered()
    marks.claimed([job("b", due=at(3.0))], {0: at(1.0)}, full=True)
    marks.answered()
    assert marks.start(6.0) == {0: at(3.0)}


def test_where_there_are_more_keys_than_a_sweep_looks_at_the_next_comes_soon() -> None:
    drive = Drive(poll_interval=10.0)
    began = drive.now
    after: str | None = None
    for n in range(31):  # the first finds out that there are keys: 60,000
        _, sweep = drive.next_sweep()
        assert sweep.after == after
        after = "" if n in (0, 30) else f"key {n}"
        drive.answer(found(keys=True, blocked=Blocked([], after)))
    assert drive.now - began < 2.0
    assert drive.sleep() > drive.now + 5.0


def test_sweeps_look_for_blocked_keys_while_there_are_keys() -> None:
    drive = Drive(poll_interval=10.0)

    def asks_next(*, keys: bool) -> tuple[bool, float]:
        """Answer whether there are keys; return whether it was asked, and when to sweep again."""
        exchange, _ = drive.next_sweep()
        stores = [store for _, store in exchange.statements("q", 30.0)]
        drive.answer(found(keys=keys))
        return Reply.set_blocked in stores, drive.sleep() - drive.now

    assert asks_next(keys=False) == (False, 10.0)
    assert asks_next(keys=False) == (False, 10.0)
    is_asked, wait = asks_next(keys=True)
    assert not is_asked
    assert wait < 1.0  # one may be blocked since a worker died
    assert asks_next(keys=True) == (True, 10.0)
    assert asks_next(keys=False) == (True, 10.0)  # the last key was given back
    assert asks_next(keys=False) == (False, 10.0)


def test_a_sweep_that_takes_long_goes_in_parts_that_do_not() -> None:
    drive = Drive(concurrency=4, poll_interval=1.0)
    parts: list[float] = []
    first, dead_rows = NOON - timedelta(minutes=10), 10.0  # seconds that it takes to walk them

    def sweep_takes(window: Window | None) -> float:
        if window is None:
            return dead_rows
        seconds = (min(window.until, NOON) - max(window.since, first)).total_seconds()
        return max(seconds, 0.0) / 600 * dead_rows

    drive.exchange()
    drive.now += dead_rows  # where claims have to start is not known before
    drive.answer(found(job("a")))
    passes = 0
    while passes < 2:
        exchange = drive.next_exchange()
        if isinstance(claim := exchange.claim, Sweep):
            assert claim.window is not None
            assert claim.limit == 0
            parts.append(sweep_takes(claim.window))
            passes += claim.window.since.year == 1
            drive.now += sweep_takes(claim.window)
        extended = {c.job.id for c in exchange.extend}
        drive.answer(replace(found(), extended=extended))
    assert max(parts) < 0.1
    assert sum(parts) == pytest.approx(2 * dead_rows, rel=0.1)  # it leaves nothing out


def test_a_job_that_becomes_due_is_claimed_also_while_sweeps_go_in_parts() -> None:
    drive = Drive(concurrency=2, poll_interval=1000.0)
    drive.exchange()
    drive.now += 0.1  # so long that the next sweeps go in parts
    drive.answer(found(job("a"), waits=(5.0,)))
    due_at = drive.now + 5.0
    drive.now = due_at + 0.1
    part = drive.exchange().claim
    assert isinstance(part, Sweep)
    assert part.window is not None
    drive.answer(found())  # the survey shows only jobs that are not due yet
    assert isinstance(drive.exchange().claim, Claim)
    assert drive.now < due_at + 0.2


def test_a_delayed_job_of_a_notification_is_claimed_also_if_it_is_due_before_the_next_part() -> (
    None
):
    drive = Drive(concurrency=2, poll_interval=1000.0)
    drive.exchange()
    drive.now += 0.1  # so long that the next sweeps go in parts
    drive.answer(found(job("a")))
    drive.now += 5.0
    drive.engine.wake(Notice(later=True))
    assert isinstance(drive.exchange().claim, Claim)
    drive.answer()
    part = drive.next_exchange().claim
    assert isinstance(part, Sweep)
    drive.now += 0.04
    drive.answer(found())
    drive.engine.wake(Notice({0: NOON}, later=True))  # due in half a second
    assert isinstance(drive.exchange().claim, Claim)
    drive.answer()
    began = drive.now
    following = drive.next_exchange().claim
    assert isinstance(following, Sweep)
    assert following.window is not None
    assert following.window.until < NOON
    assert drive.now > began + 0.5  # parts rest
    drive.answer(found())
    assert isinstance(drive.exchange().claim, Claim)


def test_a_sweep_goes_in_parts_where_many_jobs_have_been_claimed_since_the_last() -> None:
    marks = Watermarks(poll_interval=1.0)
    lines = [Line(0, at(0), None, has_suspects=False)]
    marks.swept(lines, None, full=True, began=1.0, now=1.001)
    for n in range(6):  # an old snapshot may keep them all
        assert marks.window() is None
        marks.claimed([job(f"{i}", due=at(float(n))) for i in range(1000)], full=True)
    while window := marks.window():
        assert not marks.swept_part(window, lines, began=2.0, now=2.001)
        last = window
    assert last.since.year == 1
    # Where many priorities have marks, a sweep of everything forgets those that are not used.
    marks.claimed([job(f"{n}", priority=n, due=at(9.0)) for n in range(9000)], full=True)
    assert marks.window() is None


def test_the_parts_of_a_sweep_begin_at_what_is_due_now_however_long_the_backlog_is() -> None:
    marks = Watermarks(poll_interval=1.0)
    lines = [Line(0, at(0), None, has_suspects=False)]
    marks.swept(lines, None, full=True, began=1.0, now=1.1)
    marks.saw(OpenTransactions(at(900.0), frozenset(), True), 1.1)
    starts = [900.0]
    while starts[-1] > 0.0:
        window = marks.window()
        assert window is not None
        starts.append(max((window.since - NOON).total_seconds(), 0.0))
        seconds = starts[-2] - starts[-1]
        marks.swept_part(window, lines, began=2.0, now=2.0 + seconds / 900)
    assert max(a - b for a, b in pairwise(starts)) < 200.0


def test_the_parts_of_a_sweep_stay_short_where_all_dead_rows_lie_in_its_first_part() -> None:
    marks = Watermarks(1.0)
    marks.claimed([job("a")], full=False)
    first, dead_rows = NOON - timedelta(seconds=0.5), 10.0
    for now in (0.0, 500.0):
        marks.swept([], None, full=True, began=now, now=now + dead_rows)
    rounds: list[list[float]] = [[]]
    while len(rounds) < 4:
        window = marks.window()
        assert window is not None
        seconds = (min(window.until, NOON) - max(window.since, first)).total_seconds()
        rounds[-1].append(took := max(seconds, 0.0) / 0.5 * dead_rows + 0.001)
        marks.swept_part(window, [], began=1000.0, now=1000.0 + took)
        if window.since.year == 1:
            rounds.append([])
    assert all(sum(costs) == pytest.approx(dead_rows, rel=0.1) for costs in rounds[:3])
    assert max(rounds[1] + rounds[2]) < 0.1


@pytest.mark.parametrize("cost", [0.02, 0.03, 0.045, 0.06, 0.3])
def test_the_parts_of_a_sweep_reach_old_rows_soon_on_a_host_where_each_is_slow(cost: float) -> None:
    marks, many = Watermarks(1.0), [job("a")] * 6000
    marks.claimed(many, full=False)
    now, ends = 1000.0, [1000.0]
    while len(ends) < 5:
        window = marks.window()
        assert window is not None
        marks.swept_part(window, [], began=now, now=now + 1.6 * cost)
        marks.took(cost)  # a poll
        now = marks.sweep_at
        assert now - ends[-1] < 60.0
        if window.since.year == 1:
            ends.append(now)
            marks.claimed(many, full=False)  # the next pass goes in parts, too


def test_an_idle_worker_looks_at_old_rows_soon_on_a_host_where_exchanges_take_from_45_to_300_ms() -> (
    None
):
    drive, random = Drive(concurrency=2), Random(1)
    drive.exchange()
    drive.now += 1.0  # over many dead rows, which are gone then
    drive.answer(found(job("a")))
    ends, has_parts = [drive.now], False
    while len(ends) < 20:
        exchange = drive.next_exchange()
        drive.now += random.uniform(0.045, 0.3)
        if isinstance(sweep := exchange.claim, Sweep):
            has_parts |= sweep.window is not None
            if sweep.window is None or sweep.window.since.year == 1:
                ends.append(drive.now)
        assert drive.now - ends[-1] < 120.0
        drive.answer(replace(found(), extended={c.job.id for c in exchange.extend}))
    assert has_parts


def test_the_parts_of_a_sweep_over_dead_rows_stay_short_and_rest_also_on_a_slow_host() -> None:
    marks = Watermarks(1.0)
    marks.claimed([job("a")], full=False)
    first, dead_rows, poll = NOON - timedelta(minutes=10), 10.0, 0.045
    for now in (0.0, 500.0):
        marks.swept([], None, full=True, began=now, now=now + dead_rows)
    passes, costs, now = 0, list[float](), 1000.0
    began = now
    while passes < 3:
        window = marks.window()
        assert window is not None
        marks.took(poll)
        seconds = (min(window.until, NOON) - max(window.since, first)).total_seconds()
        rows = max(seconds, 0.0) / 600 * dead_rows
        marks.swept_part(window, [], began=now, now=now + 1.6 * poll + rows)
        costs.append(rows)
        now = marks.sweep_at
        passes += window.since.year == 1
    assert max(costs) < 0.2
    assert sum(costs) == pytest.approx(passes * dead_rows, rel=0.1)
    assert sum(costs) < (now - began) / 40


def test_a_part_of_a_sweep_that_was_slow_for_once_does_not_put_off_the_next_for_long() -> None:
    marks = Watermarks(1.0)
    marks.claimed([job("a")], full=False)
    for now in (0.0, 500.0):
        marks.swept([], None, full=True, began=now, now=now + 0.1)
    rests: list[list[float]] = [[]]
    while len(rests) < 4:
        window = marks.window()
        assert window is not None
        cost = 0.5 if len(rests[-1]) == 1 else 0.03 if not rests[-1] else 0.001
        marks.swept_part(window, [], began=600.0, now=600.0 + cost)
        rests[-1].append(marks.sweep_at - 600.0 - cost)
        if window.since.year == 1:
            rests.append([])
    slow = [a_pass[1] for a_pass in rests[:3]]
    # In the first pass the host may be busy. In each, it is the rows.
    assert slow == pytest.approx([2.0, 20.0, 20.0])


def test_the_marks_of_priorities_that_were_used_once_are_forgotten_by_a_sweep() -> None:
    marks = Watermarks(poll_interval=1.0)
    used_once = [job(str(n), priority=n, due=at(n)) for n in range(500)]
    marks.claimed(used_once, full=False)
    lines = [Line(0, at(0), None, has_suspects=False)]
    marks.swept(lines, None, full=True, began=1.0, now=1.0)
    assert len(marks.start(1.0)) == 500  # it has not seen everything
    marks.swept(lines, None, full=False, began=2.0, now=2.0)
    # What is in use stays, and what was used last.
    assert sorted(marks.start(2.0)) == [0, *range(450, 500)]
    assert not marks.told({7: at(0)})


def test_a_claim_that_is_refused_starts_there_again() -> None:
    drive = Drive(concurrency=2, poll_interval=100.0)
    drive.exchange()
    news = drive.answer(found(job("a"), job("b", due=at(9.0))))
    drive.finish(*news.run)
    drive.engine.wake(Notice({0: at(3.0)}))
    drive.exchange()
    drive.engine.reject(drive.now)
    while not isinstance(claim := drive.next_exchange().claim, Claim):
        drive.answer(Reply(settled={"a", "b"}))
    assert claim.marks == {0: at(3.0)}


def test_a_full_sweep_takes_the_mark_back_to_where_it_ended() -> None:
    drive = Drive(concurrency=1)
    later, earlier = NOON + timedelta(seconds=9), NOON - timedelta(seconds=9)
    drive.exchange()
    news = drive.answer(found(job("a", due=later)))
    drive.now += 1.5
    drive.finish(*news.run)
    claim = drive.exchange().claim
    assert isinstance(claim, Sweep)
    reply = found(job("b", due=earlier))
    reply.settled = {"a"}
    drive.finish(*drive.answer(reply).run)
    claim = drive.exchange().claim
    assert isinstance(claim, Claim)
    assert claim.marks == {0: earlier}


@pytest.mark.parametrize(
    ("costs", "rest"), [([0.04], 1.0), ([0.04, 0.045], 1.6), ([0.04, 0.01], 1.0)]
)
def test_sweeps_that_cost_much_time_and_again_come_at_forty_times_their_cost(
    costs: list[float], rest: float
) -> None:
    drive = Drive(poll_interval=1.0)
    for cost in costs:
        while not isinstance(drive.next_exchange().claim, Sweep):
            drive.answer()
        drive.now += cost
        drive.engine.acknowledge(found(), drive.now)
    swept_at = drive.now
    while not isinstance(drive.next_exchange().claim, Sweep):
        drive.answer()
    assert drive.now == pytest.approx(swept_at + rest)


@pytest.mark.parametrize("key", ["k", None])
def test_what_goes_back_unstarted_is_looked_for_where_it_stays_and_nothing_claimed_before(
    key: str | None,
) -> None:
    drive = Drive(concurrency=2)
    drive.exchange()
    late = NOON + timedelta(seconds=9)
    news = drive.answer(found(job("a")._replace(exclusive=key), job("b", due=late)))
    drive.finish(*(c for c in news.run if c.job.id == "b"))
    drive.engine.withdrawn([c for c in news.run if c.job.id == "a"])  # or it wanted its key
    exchange = drive.exchange()
    assert [c.job.id for c in exchange.release_jobs] == ["a"]
    assert exchange.claim is None
    assert drive.engine.ahead(drive.now) is None
    drive.answer(Reply(settled={"a", "b"}))
    claim = drive.next_exchange().claim
    assert isinstance(claim, Claim)
    assert claim.marks == {0: NOON}


def test_nothing_is_claimed_ahead_while_jobs_go_back() -> None:
    drive = Drive(concurrency=200)
    jobs = drive.claim(*(f"{n:03}" for n in range(200)))
    drive.finish(*jobs[:150], took=0.0001)
    drive.engine.withdrawn(jobs[150:])
    exchange = drive.exchange()
    assert len(exchange.release_jobs) == 50
    assert drive.engine.ahead(drive.now) is None
    drive.answer(Reply(settled=set(settled(exchange))))
    claim = drive.exchange().claim
    assert claim is not None
    assert claim.limit >= drive.engine.bulky  # it would have been sent ahead


# -- suspects -----------------------------------------------------------------------------------


def group(*names: str, deaths: int = 2) -> Reply:
    """Make the answer to the claim of a group."""
    return Reply(group=Group([job(name) for name in names], deaths))


def group_claim(drive: Drive) -> ClaimGroup:
    """Pass time until a group is claimed."""
    claim = drive.next_exchange().claim
    assert isinstance(claim, ClaimGroup), claim
    return claim


def test_suspects_are_claimed_in_groups_one_after_the_other() -> None:
    drive = Drive(concurrency=4)
    drive.exchange()
    drive.answer(found(suspects=True))
    for names, before in ((["a", "b"], set()), (["c"], {"a", "b"})):
        assert group_claim(drive).limit == 4
        suspects = drive.answer(replace(group(*names), settled=before)).run
        assert [claimed.is_charged for claimed in suspects] == [len(names) == 1] * len(names)
        assert isinstance(drive.step(), Sleep)  # until they have ended
        drive.finish(*suspects)
    exchange = drive.exchange()
    assert isinstance(exchange.claim, ClaimGroup)
    assert settled(exchange) == ["c"]
    drive.answer(Reply(settled={"c"}))
    # There are no more: nothing is held up.
    assert isinstance(drive.exchange().claim, Sweep | Claim)


def test_a_group_waits_for_running_handlers_for_half_a_second_at_most() -> None:
    drive = Drive(concurrency=4, poll_interval=9.0, lease=300.0)
    drive.claim("slow")
    drive.now += 9.0
    assert isinstance(drive.exchange().claim, Sweep)
    drive.answer(found(suspects=True))
    known_at = drive.now
    drive.engine.wake(Notice(later=True))
    assert group_claim(drive).limit == 3
    assert drive.now == known_at + 0.5


def test_others_are_held_up_by_a_group_for_a_second_at_most_and_run_beside_it_after_that() -> None:
    drive = Drive(concurrency=4, poll_interval=9.0)
    drive.exchange()
    drive.answer(found(suspects=True))
    known_at = drive.now
    group_claim(drive)
    drive.answer(group("a", "b"))
    drive.engine.wake(Notice(later=True))
    claim = drive.next_exchange().claim
    assert isinstance(claim, Claim | Sweep)
    assert claim.limit == 2
    assert known_at < drive.now <= known_at + 1.0


@pytest.mark.parametrize(("deaths", "alone"), [(2, 30.0), (3, 60.0), (6, 480.0), (32_766, 7_680.0)])
def test_a_second_group_is_claimed_beside_one_that_has_run_for_a_time_that_doubles_with_deaths(
    deaths: int, alone: float
) -> None:
    drive = Drive(concurrency=4, poll_interval=9.0, lease=1e6)
    drive.exchange()
    drive.answer(found(suspects=True))
    group_claim(drive)
    drive.answer(group("a", "b", deaths=deaths))
    claimed_at = drive.now
    while not isinstance(drive.next_exchange().claim, ClaimGroup):
        drive.answer(found(suspects=True))
    # After others have had their turn, and in vain until the handlers end.
    assert drive.now == pytest.approx(claimed_at + alone + 0.5)
    drive.answer(group("c"))
    claimed_at = drive.now
    while not isinstance(drive.next_exchange().claim, ClaimGroup):
        drive.answer(found(suspects=True))
    assert drive.now >= claimed_at + 30.0


def test_a_suspect_that_is_alone_is_charged_where_no_group_runs_beside_it() -> None:
    drive = Drive(concurrency=4, poll_interval=9.0, lease=1e6)
    drive.exchange()
    drive.answer(found(suspects=True))
    assert group_claim(drive).charge
    slow = drive.answer(group("a", "b")).run
    while not isinstance(claim := drive.next_exchange().claim, ClaimGroup):
        drive.answer(found(suspects=True))
    assert not claim.charge
    [alone] = drive.answer(group("c")).run
    assert not alone.is_charged
    drive.finish(*slow, alone)
    while not isinstance(claim := drive.next_exchange().claim, ClaimGroup):
        drive.answer(found(suspects=True))
    assert claim.charge
    [alone] = drive.answer(group("d")).run
    assert alone.is_charged
    # Beside it no group is claimed, however long it runs.
    for _ in range(20):
        assert not isinstance(drive.next_exchange().claim, ClaimGroup)
        drive.answer(found(suspects=True))
        drive.now += 1.0


def test_between_two_hold_ups_others_are_claimed_for_as_long_as_they_were_held_up() -> None:
    drive = Drive(concurrency=1, poll_interval=0.1)
    drive.exchange()
    drive.answer(found(suspects=True))
    turns: list[tuple[str, float]] = []
    while len(turns) < 40:
        match drive.step():
            case Exchange(claim=ClaimGroup()):
                turns.append(("group", drive.now))
                suspects = drive.answer(group(f"job-{len(turns)}")).run
                drive.now += 0.4
                drive.finish(*suspects)
            case Exchange() as exchange:
                if exchange.claim is not None and exchange.claim.limit:
                    turns.append(("others", drive.now))
                drive.answer(replace(found(suspects=True), settled=set(settled(exchange))))
            case Sleep(until):
                drive.now = until
    # Two groups fit into the first half of a second.
    kinds = [kind for kind, _ in turns]
    assert "group group group" not in " ".join(kinds)
    for (kind, at), (following, then) in pairwise(turns):
        if (kind, following) == ("group", "others"):
            since = then
        elif (kind, following) == ("others", "group"):
            assert then >= since + 0.4
        assert then - at <= 1.0


def test_a_worker_whose_suspects_others_have_claimed_holds_nothing_up() -> None:
    drive = Drive(concurrency=4)
    drive.exchange()
    drive.answer(found(suspects=True))
    group_claim(drive)
    drive.engine.wake(Notice(later=True))
    drive.answer(group())
    assert isinstance(drive.exchange().claim, Claim | Sweep)


def test_of_one_slot_suspects_and_others_have_it_in_turn() -> None:
    drive = Drive(concurrency=1, poll_interval=1.0, lease=300.0)
    running: list[Claimed] = []
    kinds: list[str] = []
    ends_at = 0.0
    while len(kinds) < 9:
        drive.engine.wake(Notice(later=True))
        match drive.step():
            case Exchange(claim=claim, extend=extend) as exchange:
                reply = Reply(lines=found(suspects=True).lines)
                if claim is not None and claim.limit:
                    reply = group("a") if isinstance(claim, ClaimGroup) else found(job("b"))
                    kinds.append(type(claim).__name__)
                    ends_at = drive.now + 10.0  # longer than anything is held up
                reply.lines = found(suspects=True).lines
                reply.settled = set(settled(exchange))
                reply.extended = {c.job.id for c in extend}
                running += drive.answer(reply).run
            case Sleep(until):
                drive.now = min(until, ends_at)
                if drive.now == ends_at:
                    drive.finish(*running, took=10.0)
                    running.clear()
    turns = [kind == "ClaimGroup" for kind in kinds[1:]]
    assert turns == [True, False] * 4


@pytest.mark.parametrize("refused", [(Sweep,), (Sweep, Claim)])
def test_refused_looks_at_others_keep_no_suspect_from_its_turn(
    refused: tuple[type, ...],
) -> None:
    drive = Drive(concurrency=4)
    drive.exchange()
    drive.answer(found(suspects=True))
    groups: list[float] = []
    others = drive.now
    began = drive.now
    while drive.now < began + 30.0:
        exchange = drive.next_exchange()
        claim = exchange.claim
        if isinstance(claim, ClaimGroup):
            groups.append(drive.now)
            suspects = drive.answer(group(f"suspect-{len(groups)}")).run
            drive.now += 0.2
            drive.finish(*suspects)
        elif isinstance(claim, refused):
            drive.engine.reject(drive.now)
        else:
            if claim is not None:
                assert drive.now - others < 5.0
                others = drive.now
            drive.answer(Reply(settled=set(settled(exchange))))
        drive.engine.wake(Notice())
    assert max(b - a for a, b in pairwise([began, *groups, drive.now])) < 3.0
    assert Claim in refused or drive.now - others < 5.0


def test_a_sweep_that_is_refused_again_and_again_does_not_stop_claims() -> None:
    drive = Drive(concurrency=4, poll_interval=5.0)
    drive.claim("a")
    claims: list[float] = []
    sweeps = 0
    began = drive.now
    while drive.now < began + 60.0:
        exchange = drive.next_exchange()
        if isinstance(exchange.claim, Sweep):
            sweeps += 1
            drive.engine.reject(drive.now)
        else:
            if exchange.claim is not None:
                claims.append(drive.now)
            drive.answer(Reply(extended={c.job.id for c in exchange.extend}))
    assert max(b - a for a, b in pairwise([began, *claims, drive.now])) < 10.0
    assert 5 < sweeps < 100


def test_what_a_dead_worker_held_is_claimed_as_soon_as_it_is_freed() -> None:
    drive = Drive(concurrency=3, poll_interval=9.0)
    drive.exchange()
    drive.answer(found(job("a", due=at(8))))
    drive.engine.reconnect()
    assert isinstance(drive.exchange().claim, Sweep)
    # No second sweep, which may be dear: the claim starts where it lies.
    freed = Swept([], 1, at(3))
    drive.answer(Reply(swept=freed, lines=[Line(0, at(9), None, has_suspects=False)]))
    claim = drive.exchange().claim
    assert isinstance(claim, Claim)
    assert claim.marks == {0: at(3)}


def test_a_worker_without_a_free_slot_frees_what_others_hold_no_more() -> None:
    drive = Drive(concurrency=1, poll_interval=2.0)
    drive.claim("slow")
    swept_at = drive.now
    assert drive.next_exchange().claim == Sweep(0, 2, held=(1,))
    assert drive.now == swept_at + 2.0


def test_a_group_that_did_not_start_goes_back_as_it_was() -> None:
    for names in (["a"], ["a", "b"]):
        drive = Drive(concurrency=4)
        drive.exchange()
        drive.answer(found(suspects=True))
        group_claim(drive)
        suspects = drive.answer(group(*names)).run
        drive.engine.shutdown()
        assert drive.step() == Withdraw()
        drive.engine.withdrawn(suspects)
        given = drive.exchange().release_jobs
        # What charged nothing refunds nothing.
        assert [claimed.is_charged for claimed in given] == [len(names) == 1] * len(names)


# -- the end ------------------------------------------------------------------------------------


def test_shutdown_gives_back_what_has_not_started_and_waits_for_what_has() -> None:
    drive = Drive(concurrency=2)
    a, b = drive.claim("a", "b")
    drive.engine.shutdown()
    assert drive.step() == Withdraw()
    drive.engine.withdrawn([b])
    exchange = drive.exchange()
    assert exchange.release_jobs == [b]
    drive.answer(Reply(settled={"b"}))
    assert drive.sleep() > drive.now
    drive.finish(a)
    assert drive.settle() == [Outcome(a, Complete(), 1.0)]
    assert drive.step() == Stop(0)


def test_nothing_is_claimed_after_shutdown() -> None:
    drive = Drive()
    drive.engine.shutdown()
    drive.engine.wake(Notice(later=True))
    assert drive.step() == Withdraw()
    assert drive.step() == Stop(0)


def test_the_lock_is_given_back_before_the_end() -> None:
    drive = Drive(notify=True)
    drive.drain()
    drive.engine.shutdown()
    assert drive.step() == Withdraw()
    assert drive.exchange().notify_lock == "release"
    drive.answer()
    assert drive.step() == Stop(0)


def test_abandoned_handlers_are_counted_and_left_to_their_leases() -> None:
    drive = Drive(concurrency=2)
    a, b = drive.claim("a", "b")
    drive.engine.abandon()
    assert drive.step() == Withdraw()
    drive.finish(a)
    exchange = drive.exchange()
    assert exchange.abandon == [b]  # a has ended meanwhile
    assert drive.answer(Reply(settled={"a"})).events == [Outcome(a, Complete(), 1.0)]
    assert drive.step() == Stop(1)


def test_attempts_are_given_back_though_the_connection_breaks_at_the_end() -> None:
    drive = Drive(concurrency=2)
    a, b = drive.claim("a", "b")
    drive.engine.abandon()
    assert drive.step() == Withdraw()
    assert drive.exchange().abandon == [a, b]
    drive.engine.disconnect(drive.now)
    drive.engine.reconnect()
    assert drive.exchange().abandon == [a, b]
    drive.answer()
    assert drive.step() == Stop(2)


def test_attempts_that_cannot_be_given_back_do_not_keep_the_worker() -> None:
    drive = Drive(concurrency=2)
    (a,) = drive.claim("a")
    drive.engine.abandon()
    assert drive.step() == Withdraw()
    for _ in range(2):
        assert drive.exchange().abandon == [a]
        drive.engine.reject(drive.now)
        drive.now += 1
    assert drive.step() == Stop(1)


def test_a_released_job_is_no_event() -> None:
    drive = Drive()
    (a,) = drive.claim("a")
    drive.engine.finish([Outcome(a, Release(), 0.0)])
    assert not [e for e in drive.settle() if isinstance(e, Outcome)]


# -- slots that are lost ----------------------------------------------------------------------


def test_an_engine_without_slots_gives_back_what_waits_and_claims_nothing() -> None:
    drive = Drive(concurrency=2)
    # Quick ones, after which more is claimed than there are slots.
    first = drive.claim("a", "b")
    drive.finish(*first, took=0.0001)
    waiting = drive.claim("c", "d", "e")
    drive.engine.slots = 0
    assert drive.engine.pace.capacity == 0
    while not isinstance(step := drive.step(), Withdraw):
        if isinstance(step, Exchange):
            drive.answer(Reply(settled=set(settled(step))))
        else:
            assert isinstance(step, Sleep)
            drive.now = step.until
    drive.engine.withdrawn(waiting)
    released = drive.exchange()
    assert released.release_jobs == waiting
    assert released.claim is None or released.claim.limit == 0
    drive.answer(Reply(settled=set(settled(released))))
    for _ in range(20):  # sweeps free suspects all the while
        exchange = drive.next_exchange()
        assert exchange.claim is None or exchange.claim.limit == 0
        drive.answer()


def test_an_engine_claims_again_as_soon_as_a_slot_is_back() -> None:
    drive = Drive(concurrency=3)
    drive.engine.slots = 0
    drive.drain()
    drive.engine.slots = 1
    claim = drive.exchange().claim
    assert claim is not None
    assert claim.limit == 1


# -- sessions of transactional handlers that do not end -------------------------------------


def given_up(drive: Drive) -> Claimed:
    """Give up the handler of a transactional job."""
    [claimed] = drive.claim("a")
    drive.engine.give_up([claimed])
    drive.finish(claimed, result=Retry(0.0))
    return claimed


def test_the_session_of_a_handler_that_is_given_up_is_ended_before_its_job_is_settled() -> None:
    drive = Drive(transactional={"t"})
    claimed = given_up(drive)
    exchange = drive.exchange()
    assert (exchange.end, settled(exchange), exchange.claim) == ([claimed], [], None)
    drive.answer()
    assert settled(drive.exchange()) == [claimed.job.id]


def test_a_session_is_ended_once_more_where_nobody_knows_whether_it_was() -> None:
    drive = Drive(transactional={"t"})
    claimed = given_up(drive)
    assert drive.exchange().end == [claimed]
    drive.lose()
    assert drive.exchange().end == [claimed]


def test_a_server_that_refuses_to_end_a_session_refuses_nothing_else() -> None:
    drive = Drive(transactional={"t"})
    claimed = given_up(drive)
    assert drive.exchange().end == [claimed]
    drive.engine.reject(drive.now)
    exchange = drive.next_exchange()
    assert not exchange.end
    assert settled(exchange) == [claimed.job.id]


def test_a_handler_without_a_transaction_has_no_session_to_end() -> None:
    drive = Drive()
    claimed = given_up(drive)
    assert settled(drive.exchange()) == [claimed.job.id]


def severed(drive: Drive) -> Claimed:
    """Lose the connection of a transactional job."""
    [claimed] = drive.claim("a")
    drive.finish(claimed, result=Retry(0.0))
    drive.engine.sever(claimed)
    return claimed


def test_a_session_whose_connection_was_lost_is_ended_once_its_job_is_settled() -> None:
    drive = Drive(transactional={"t"})
    claimed = severed(drive)
    exchange = drive.exchange()
    assert not exchange.end
    assert settled(exchange) == [claimed.job.id]
    drive.answer(Reply(settled={claimed.job.id}))
    exchange = drive.exchange()
    assert (exchange.end, exchange.claim) == ([claimed], None)
    drive.answer()
    assert not drive.exchange().end


def test_a_session_whose_connection_was_lost_is_not_ended_where_its_job_is_gone() -> None:
    drive = Drive(transactional={"t"})
    severed(drive)
    drive.miss()
    for _ in range(3):
        assert not drive.next_exchange().end
        drive.answer()


def test_a_worker_that_stops_ends_the_session_whose_connection_was_lost() -> None:
    drive = Drive(transactional={"t"})
    claimed = severed(drive)
    drive.engine.shutdown()
    assert isinstance(drive.step(), Withdraw)
    drive.settle()
    assert drive.exchange().end == [claimed]
    drive.answer()
    assert isinstance(drive.step(), Stop)


# -- claims that are too much -----------------------------------------------------------------


def test_a_claim_that_is_refused_is_halved_until_it_is_not() -> None:
    drive = Drive(concurrency=100)
    limits = []
    for _ in range(9):
        claim = drive.next_exchange().claim
        assert isinstance(claim, Sweep)
        limits.append(claim.limit)
        drive.engine.reject(drive.now)
    assert limits == [100, 50, 25, 12, 6, 3, 1, 1, 1]
    taken = 0
    while taken < 100:
        exchange = drive.next_exchange()
        limit = exchange.claim.limit if exchange.claim is not None else 0
        assert limit <= 2 * taken + 2
        jobs = [job(f"{taken + n}") for n in range(limit)]
        drive.answer(found(*jobs))
        taken += limit


def test_a_group_of_suspects_that_is_refused_is_halved_until_it_is_not() -> None:
    drive = Drive(concurrency=40)
    drive.exchange()
    drive.answer(found(suspects=True))
    limits: list[int] = []
    while len(limits) < 7:
        claim = drive.next_exchange().claim
        if isinstance(claim, ClaimGroup):
            limits.append(claim.limit)
            drive.engine.reject(drive.now)
        else:
            drive.answer(found(suspects=True))
    assert limits[0] == 40
    assert limits[-1] == 1
    assert limits == sorted(limits, reverse=True)


def test_jobs_with_large_payloads_are_not_claimed_ahead_by_the_thousand() -> None:
    payload = bytes(65536)
    drive = Drive(concurrency=10)
    most = 0
    for _ in range(20):
        claim = drive.next_exchange().claim
        limit = 0 if claim is None else claim.limit
        most = max(most, limit)
        jobs = [job(f"{n}")._replace(arg=payload) for n in range(limit)]
        claimed = drive.answer(found(*jobs)).run
        drive.finish(*claimed, took=1e-6)
        drive.settle()
    assert 100 <= most <= 300
