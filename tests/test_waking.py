"""Which idle workers of a fleet wake for a job: real engines, simulated server and time."""

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from heapq import heappop, heappush
from itertools import count
from random import Random

import pytest

from bgjob._engine.engine import Engine
from bgjob._engine.outcome import Outcome
from bgjob._engine.protocol import Claim, Exchange, Sleep, Stop, Sweep, Withdraw
from bgjob._engine.reply import Notice, Reply
from bgjob._sql.claims import Swept
from bgjob._sql.notices import CALLED, POSTS, Subscription
from bgjob._sql.settlements import Claimed
from bgjob._sql.survey import Line
from bgjob.job import Job
from bgjob.result import Complete

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROUND_TRIP = 0.001
SEATS = 64  # fewer than there are: a simulated fleet is small
POLL = 1.0
NOTIFIED = POSTS + 1
"""The most idle workers that are notified of an enqueue: the holder, and those with a post."""


class Fleet:
    """Workers of one queue, and its server."""

    def __init__(self, seed: int, workers: int, *, slots: int = 1) -> None:
        self.random = Random(seed)
        self.slots = slots
        self.now = 0.0
        self._numbers = count()
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self.tokens = count(1)
        self.jobs: dict[str, tuple[float, float]] = {}
        """Those that nobody has claimed: when each is due, and how long it takes."""
        self.waited: list[float] = []
        self.holder: Member | None = None
        self.deputy: Member | None = None
        self.posts: set[Member] = set()
        self.seats: dict[int, Member] = {}
        self.exchanges = 0
        self.members: list[Member] = []
        for _ in range(workers):
            self.add()

    def add(self) -> None:
        member = Member(self)
        self.members.append(member)
        self.at(self.random.random(), member.turn)

    def at(self, delay: float, event: Callable[[], object]) -> None:
        heappush(self._events, (self.now + delay, next(self._numbers), event))

    def live(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, event = heappop(self._events)
            event()
        self.now = end

    def enqueue(self, takes: float, *, delay: float = 0.0, is_told: bool = True) -> None:
        self.jobs[f"job-{next(self._numbers)}"] = self.now + delay, takes
        if self.holder is not None and is_told:
            self.notify(Notice({0: NOON}, later=delay > 0))

    def notify(self, notice: Notice, *, but: "Member | None" = None) -> None:
        for member in self.members:
            if member.subscription.enqueues and member is not but:
                self.at(ROUND_TRIP / 2, partial(member.hear, notice))

    def call(self, caller: "Member") -> None:
        seats = [seat for seat, member in self.seats.items() if member is not caller]
        for seat in self.random.sample(seats, min(CALLED, len(seats))):
            member = self.seats[seat]
            if member.subscription.seat == seat:
                self.at(ROUND_TRIP / 2, partial(member.hear, Notice(relief=True)))

    def take(self, member: "Member", exchange: Exchange, reply: Reply) -> None:
        if self.holder in (None, member):
            self.holder, reply.lock_answer = member, "taken"
            if exchange.relieve:
                self.notify(Notice(relief=True), but=member)
            self.deputy = None if self.deputy is member else self.deputy
        elif self.deputy in (None, member):
            self.deputy, reply.lock_answer = member, "deputy"
        else:
            reply.lock_answer = "covered"
        assert (exchange.seat is None) is (member not in self.seats.values())
        reply.has_post = False
        if exchange.asks_post and reply.lock_answer != "taken":
            assert member not in self.posts
            reply.has_post = len(self.posts) < POSTS
        if reply.has_post:
            self.posts.add(member)
        elif exchange.asks_post and reply.lock_answer == "covered":
            free = [seat for seat in range(SEATS) if seat not in self.seats]
            reply.seat = exchange.seat if exchange.seat is not None else min(free, default=None)
            if reply.seat is not None:
                self.seats[reply.seat] = member
        if exchange.seat is not None and reply.seat is None:
            del self.seats[exchange.seat]
        reply.has_spares = any(each is not member for each in self.seats.values())

    def leave(self, member: "Member") -> None:
        """Release all locks of a session."""
        self.holder = None if self.holder is member else self.holder
        self.deputy = None if self.deputy is member else self.deputy
        self.posts.discard(member)
        self.seats = {seat: each for seat, each in self.seats.items() if each is not member}

    def kill(self, member: "Member") -> None:
        self.members.remove(member)
        self.leave(member)
        member.is_dead = True

    def carry_out(self, member: "Member", exchange: Exchange) -> Reply:
        self.exchanges += 1
        member.exchanges += 1
        reply = Reply(settled={outcome.claimed.job.id for outcome in exchange.outcomes})
        reply.extended = {claimed.job.id for claimed in exchange.extend}
        if exchange.notify_lock == "take":
            self.take(member, exchange, reply)
        match exchange.claim:
            case Claim(limit, token):
                reply.claimed = self.claim(limit, token, member)
            case Sweep(limit, token):
                reply.swept = Swept(self.claim(limit, token, member), 0)
                waits = [due - self.now for due, _ in self.jobs.values() if due > self.now]
                reply.lines = [Line(0, NOON, min(waits, default=None), False)]
        if exchange.calls:
            self.call(member)
        if exchange.notify_lock == "release":
            assert self.holder is member
            self.notify(Notice(relief=True), but=member)
        if exchange.notify_lock in ("release", "leave"):
            self.leave(member)
        return reply

    def claim(self, limit: int, token: int, member: "Member") -> list[Job]:
        due = sorted((due, id_) for id_, (due, _) in self.jobs.items() if due <= self.now)[:limit]
        claimed = []
        for at, id_ in due:
            _, member.takes[id_] = self.jobs.pop(id_)
            self.waited.append(self.now - at)
            claimed.append(Job(id_, "q", "t", None, 1, None, 0, NOON, NOON, NOON))
        return claimed

    @property
    def idle(self) -> "list[Member]":
        return [member for member in self.members if not member.running]

    def seconds_until_all_have_started(self, most: float) -> float:
        began = self.now
        while self.jobs and self.now < began + most:
            self.live(0.001)
        return self.now - began


class Member:
    """One worker: as its control thread, but for what concerns slots."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.engine = Engine(
            concurrency=fleet.slots,
            poll_interval=POLL,
            lease=3600.0,
            notify=True,
            tokens=fleet.tokens,
            chance=fleet.random.random,
        )
        self.subscription = Subscription()
        self.takes: dict[str, float] = {}
        self.waiting: deque[Claimed] = deque()
        self.running = 0
        self.ended: list[Outcome] = []
        self.heard: Notice | None = None
        self.exchanges = 0
        self.is_dead = self.is_busy = False  # busy: with an exchange
        self.sleep = 0  # the number of the last

    def hear(self, notice: Notice) -> None:
        self.heard = notice | self.heard if self.heard else notice
        self.wake(self.sleep)

    def wake(self, sleep: int) -> None:
        if sleep == self.sleep and not self.is_busy:
            self.turn()

    def turn(self) -> None:
        self.is_busy = False
        if self.is_dead:
            return
        fleet, engine = self.fleet, self.engine
        self.sleep += 1
        engine.finish(self.ended)
        self.ended = []
        if self.heard:
            engine.wake(self.heard)
            self.heard = None
        if self.subscription != engine.subscription:
            before, self.subscription = self.subscription, engine.subscription
            if before.enqueues < self.subscription.enqueues or self.subscription.seat is not None:
                engine.wake(Notice(relief=True))
            self.is_busy = True
            fleet.at(ROUND_TRIP, self.turn)
            return
        match engine.step(fleet.now):
            case Exchange() as exchange:
                self.is_busy = True
                fleet.at(ROUND_TRIP / 2, partial(self.arrive, exchange))
            case Withdraw():
                engine.withdrawn(self.waiting)
                self.waiting.clear()
                fleet.at(0.0, self.turn)
            case Sleep(until):
                fleet.at(max(until - fleet.now, 1e-5), partial(self.wake, self.sleep))
            case Stop():
                fleet.kill(self)

    def arrive(self, exchange: Exchange) -> None:
        if not self.is_dead:
            reply = self.fleet.carry_out(self, exchange)
            self.fleet.at(ROUND_TRIP / 2, partial(self.answer, reply))

    def answer(self, reply: Reply) -> None:
        self.waiting.extend(self.engine.acknowledge(reply, self.fleet.now).run)
        self.start()
        self.turn()

    def start(self) -> None:
        while self.waiting and self.running < self.fleet.slots:
            claimed = self.waiting.popleft()
            self.running += 1
            takes = self.takes[claimed.job.id]
            self.fleet.at(takes, partial(self.end, claimed, takes))

    def end(self, claimed: Claimed, takes: float) -> None:
        self.running -= 1
        self.ended.append(Outcome(claimed, Complete(), takes))
        self.start()
        self.wake(self.sleep)


@pytest.mark.parametrize("workers", [1, 5, 30, 150])
def test_an_enqueue_wakes_the_notified_workers_of_an_idle_fleet_and_no_others(workers: int) -> None:
    fleet = Fleet(workers, workers)
    fleet.live(40.0)
    told = [member for member in fleet.members if member.subscription.enqueues]
    assert len(told) == min(workers, NOTIFIED)
    assert len(fleet.seats) == max(0, min(workers - NOTIFIED, SEATS))
    for member in fleet.members:
        member.exchanges = 0
    fleet.enqueue(0.001)
    fleet.live(0.05)
    assert fleet.waited == [pytest.approx(1.5 * ROUND_TRIP, abs=ROUND_TRIP)]
    looked = [member for member in fleet.members if member.exchanges]
    polls = (workers - len(told)) * 0.05 / POLL  # at most twice as many as usual, by chance
    assert len(looked) <= len(told) + polls


@pytest.mark.parametrize("seed", [2, 4, 7, 10])
def test_a_job_does_not_wait_while_a_worker_is_idle(seed: int) -> None:
    random = Random(seed)
    workers = random.choice([2, 17, 18, 19, 25, 40, NOTIFIED + SEATS])
    fleet = Fleet(seed, workers)
    fleet.live(40.0)
    pause = random.choice([0.03, 0.5])  # seconds between two jobs
    takes = workers * pause  # as many are busy as there are, at times
    late, jobs = [], 100
    for _ in range(jobs):
        fleet.enqueue(takes * random.uniform(0.5, 1.2))
        idle = len(fleet.idle)
        fleet.live(pause * random.uniform(0.5, 1.5))
        if idle and fleet.jobs:
            fleet.live(0.05)
            late += [id_ for id_ in fleet.jobs if fleet.idle]
            fleet.seconds_until_all_have_started(60.0)
    assert (late, len(fleet.waited)) == ([], jobs)


@pytest.mark.parametrize("slots", [1, 3])
def test_jobs_for_all_wake_a_fleet_by_doubling(slots: int) -> None:
    workers = NOTIFIED + SEATS
    fleet = Fleet(slots, workers, slots=slots)
    fleet.live(30.0)
    for _ in range(workers * slots):
        fleet.enqueue(30.0)
    assert fleet.seconds_until_all_have_started(30.0) < 0.3


def test_of_a_large_fleet_those_without_a_seat_find_jobs_by_polls() -> None:
    fleet = Fleet(1, 140)
    fleet.live(30.0)
    for _ in range(140):
        fleet.enqueue(60.0)
    assert fleet.seconds_until_all_have_started(30.0) < 16 * POLL


def test_a_job_is_found_after_all_who_are_notified_were_killed() -> None:
    fleet = Fleet(2, 60)
    fleet.live(40.0)
    for member in [member for member in fleet.members if member.subscription.enqueues]:
        fleet.kill(member)
    fleet.enqueue(0.001)
    assert fleet.seconds_until_all_have_started(30.0) < 15 * POLL / 10
    fleet.live(20.0)
    assert len([member for member in fleet.members if member.subscription.enqueues]) == NOTIFIED
    fleet.enqueue(0.001)
    assert fleet.seconds_until_all_have_started(30.0) < 0.01


def test_a_holder_that_ends_beside_busy_workers_calls_a_spare() -> None:
    fleet = Fleet(4, 30)
    fleet.live(30.0)
    holder = fleet.holder
    assert holder is not None
    told = [each for each in fleet.members if each.subscription.enqueues and each is not holder]
    for member in told:  # as if their slots were taken
        fleet.leave(member)
        fleet.members.remove(member)
    holder.engine.shutdown()
    holder.wake(holder.sleep)
    fleet.live(0.01)
    fleet.enqueue(0.001)
    assert fleet.seconds_until_all_have_started(30.0) < 0.01


def test_a_job_that_is_due_later_wakes_no_spare() -> None:
    fleet = Fleet(3, 60)
    fleet.live(40.0)
    fleet.enqueue(0.001, delay=30.0)
    fleet.live(29.9)
    spares = [member for member in fleet.members if not member.subscription.enqueues]
    for member in spares:
        member.exchanges = 0
    fleet.live(0.2)
    assert fleet.waited == [pytest.approx(ROUND_TRIP, abs=2 * ROUND_TRIP)]
    assert sum(member.exchanges > 0 for member in spares) <= 4  # by their polls
