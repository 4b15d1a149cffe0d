"""The worker's decisions, as a pure state machine.

The engine reads no clock, opens no socket and starts no thread. The control thread
reports what happened and the time, and asks for the next step:

    step(now)        what to do: Exchange, Withdraw, Sleep or Stop
    ahead(now)       while jobs flow: the next exchange, to send when the current one is
                     answered, before that is acknowledged
    acknowledge()    the exchange was committed; returns jobs to run, and events
    reject()         the server refused the exchange, for a lock or another reason:
                     nothing of it happened, and the following one was not sent
    disconnect()     the connection broke: the exchange may have happened or not
    reconnect()      there is a connection again
    finish()         handlers ended; returns events
    give_up()        handlers did not end in time: end their transactions
    withdrawn()      the jobs that a Withdraw took back
    wake()           a notification came
    slots            their number: some may be lost, and recover
    shutdown()       stop claiming, finish, stop
    abandon()        do not wait for handlers

Times are seconds of any monotonic clock. Its rules:

- Each claimed job is settled or released once. An outcome is kept until its
  settlement is acknowledged, and sent again as often as needed.
- No more jobs are claimed than free slots and the jobs' duration justify.
- A row that another session has locked delays its own settlement only. When an exchange
  was refused for a lock, the engine asks which of its rows are locked. Those are set apart.
- A lease is extended when a third of it has passed, whether its job runs,
  waits for a slot, or waits for its settlement to be accepted.
- After an outage that was longer than the lease the worker settles and extends
  before it claims. Its sweeps never free a job that it holds itself.
- An attempt begins with its handler: jobs that were claimed by an exchange whose
  answer was lost are freed by the worker's own sweeps, and are charged nothing.
- Jobs that two workers died with are claimed in groups, until the killer is
  alone; see isolation.py.
- A job with an exclusive key is handed out once the server has granted the key.
- Every step has something to do, or names the time to sleep to.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import repeat
from math import inf
from operator import itemgetter
from typing import cast

from bgjob._engine.isolation import Isolation
from bgjob._engine.notify_lock import NotifyLock
from bgjob._engine.outcome import (
    Committed,
    CommitUnknown,
    Effects,
    Event,
    Fenced,
    Outcome,
    Release,
    Unsettled,
)
from bgjob._engine.pace import Pace
from bgjob._engine.protocol import (
    MOST_FREED,
    Claim,
    ClaimGroup,
    Exchange,
    Notice,
    Reply,
    Sleep,
    Step,
    Stop,
    Sweep,
    Withdraw,
)
from bgjob._engine.watermarks import Watermarks
from bgjob._handlers.route import NeedsKey
from bgjob._sql.claims import Window
from bgjob._sql.settlements import Claimed
from bgjob.event import JobLeaseLost, QueueIsEmpty
from bgjob.job import Job
from bgjob.result import Complete, MoveToDlq, Retry

_MOST = 2000
"""Jobs in one settlement, and in two claims: one runs while the next is fetched."""

_PAUSE = 0.05
"""Seconds before a refused exchange is tried again; doubles up to the poll interval."""

_MOMENT = 0.002
"""Seconds before the sweep that follows a claim which found jobs."""

_CAREFUL = 6
"""Exchanges after a refusal that carry one kind of work each."""


_LONG_LOCKED = 5.0
"""Seconds for which rows are set apart before the observer is told."""


_token = itemgetter(1)
_make_claimed = partial(tuple.__new__, Claimed)  # half the time of Claimed(...)


def _claimed(jobs: Iterable[Job], token: int) -> list[Claimed]:
    return list(map(_make_claimed, zip(jobs, repeat(token), repeat(True))))


def _keys(outcomes: Iterable[Outcome]) -> list[str]:
    keys = (outcome.claimed.job.exclusive for outcome in outcomes)
    return [key for key in keys if key is not None]


@dataclass(slots=True)
class _Batch:
    """The jobs of one claim: they share its token and its lease."""

    expires: float
    extend_at: float
    jobs: dict[str, Claimed]
    places: Sequence[str]
    """The positions of their rows, if known."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """An exchange that was sent and is not acknowledged; its outcomes have left pending."""

    exchange: Exchange
    outcomes: list[Unsettled]
    at: float
    again: bool
    """Whether it repeats an outcome that was refused alone."""
    told: bool
    """Whether its claim answers a notification, or the end of a delay."""
    vague: bool
    """Whether it may miss some of these jobs."""


class Engine:
    """Decides what a worker does next for one queue."""

    bulky = 100
    """The least jobs in a claim for which sending exchanges ahead is worth it."""

    def __init__(
        self,
        *,
        concurrency: int,
        poll_interval: float,
        lease: float,
        notify: bool,
        tokens: Iterator[int],
        queue: str = "",
        transactional: Collection[str] = (),
        names_keys: bool = False,
    ) -> None:
        self._queue = queue  # for its events
        self._poll_interval = poll_interval
        self._lease = lease
        self._tokens = tokens
        self._transactional = transactional
        self._names_keys = names_keys  # whether handlers may find a key for a job that has none
        self._pace = Pace(concurrency)
        self._notify_lock = NotifyLock(poll_interval, enabled=notify)

        self._batches: dict[int, _Batch] = {}
        self._lost: set[Claimed] = set()  # another worker may have it, but its handler still runs
        self._running = 0  # claimed and not finished: in a handler, or waiting for a slot
        self._pending: deque[Unsettled] = deque()  # finished and not settled, the oldest first
        self._refused: deque[Unsettled] = deque()  # refused alone: kept apart from the others
        self._refused_at = inf  # when the first of them is tried again
        self._refused_pause = _PAUSE
        self._spilled = 0  # how many of the oldest refused ones to leave to their leases
        # Rows and keys that other sessions may have locked; none of these jobs uses a slot.
        self._apart: list[Unsettled] = []
        self._apart_wanting: list[Claimed] = []
        self._apart_free: dict[str, None] = {}
        self._apart_at = inf  # when to ask again which of them are locked
        self._apart_pause = _PAUSE
        self._apart_since = inf
        self._has_probed = False  # a probe found no lock, so the refusal had another cause
        self._unsure: set[Claimed] = set()  # their settlement was sent, its answer was lost
        self._sent: deque[_Sent] = deque()
        # Claims whose answers were lost, by token, and when their leases end. The server may commit
        # or show them later: it may wait for a synchronous standby.
        self._unanswered: dict[int, float] = {}
        self._answered_at = -inf
        self._wanting: deque[Claimed] = deque()  # their keys are not granted yet
        self._keys_limit = _MOST // 2
        self._keys_at = -inf  # when to ask for them again
        self._keys_pause = _MOMENT
        self._has_keys = False  # some job has had a key
        self._free: dict[str, None] = {}  # keys to release, in order
        self._doomed: list[Claimed] = []  # claims that were given up: end their sessions
        self._blocked_after = ""  # the key after which the search for blocked keys continues
        self._stopping = self._abandoned = self._withdrew = False
        self._leaving: list[Claimed] = []  # abandoned, and the server has not been told

        self._marks = Watermarks(poll_interval)
        self._isolation = Isolation()
        self._has_more_to_free = False
        self._idle = False  # the observer knows that the queue is empty
        self._more = True  # the last claim was full: there is more
        self._told = False  # something was enqueued since the last claim
        self._vague = False  # it may be behind the marks, or be due later
        self._poll_at = -inf
        self._due_at = inf  # when the next known job is due

        self._not_before = -inf
        self._pause = _PAUSE
        self._settle_limit = _MOST
        self._claim_limit = _MOST // 2
        self._careful = 0
        self._turn = 0

    @property
    def in_flight(self) -> int:
        """Jobs that are claimed and not finished."""
        return self._running

    @property
    def unsettled(self) -> int:
        """Jobs that are claimed and not settled."""
        sent = sum(len(sent.outcomes) for sent in self._sent)
        apart = len(self._apart) + len(self._apart_wanting)
        return self._running + len(self._pending) + len(self._refused) + apart + sent

    def running(self) -> list[Claimed]:
        """Return the claimed jobs that have no outcome yet, also those that were lost."""
        sent = [outcome for sent in self._sent for outcome in sent.outcomes]
        outcomes = [*self._pending, *self._refused, *self._apart, *sent]
        others = {o.claimed for o in outcomes} | {*self._wanting, *self._apart_wanting}
        others.update(claimed for sent in self._sent for claimed in sent.exchange.acquire)
        jobs = [c for batch in self._batches.values() for c in batch.jobs.values()]
        return [*self._lost, *(claimed for claimed in jobs if claimed not in others)]

    @property
    def slots(self) -> int:
        """How many jobs may be in handlers; fewer than configured if some do not end."""
        return self._pace.slots

    @slots.setter
    def slots(self, count: int) -> None:
        self._pace.slots = count

    @property
    def capacity(self) -> int:
        """How many jobs may be in flight: one for each slot, and more while they are quick."""
        return self._pace.capacity

    @property
    def is_quick(self) -> bool:
        """Whether jobs recently ended sooner than a thread wakes up."""
        return self._pace.is_quick

    # -- what happened --------------------------------------------------------------

    def finish(self, outcomes: Sequence[Outcome]) -> list[Event]:
        """Record that handlers ended; the results of lost jobs are dropped.

        Returns the events of jobs that their own transactions have settled.
        """
        if self._names_keys:
            outcomes = [outcome for outcome in outcomes if not self._wants(outcome)]
        if self._isolation.has_group:
            self._isolation.ended(outcome.claimed for outcome in outcomes)
        self._running -= len(outcomes)
        self._pace.finished(outcomes)
        if self._lost:
            lost = {outcome.claimed for outcome in outcomes} & self._lost
            outcomes = [outcome for outcome in outcomes if outcome.claimed not in lost]
            self._lost -= lost
        events: list[Event] = []
        if self._transactional:
            events = [e for o in outcomes if (e := self._settled_itself(o)) is not None]
            outcomes = [o for o in outcomes if not isinstance(o.result, Committed | Fenced)]
        self._pending.extend(cast("Sequence[Unsettled]", outcomes))
        return events

    def _settled_itself(self, outcome: Outcome) -> Event | None:
        claimed, result, took = outcome
        match result:
            case Committed(result):
                event: Event = Outcome(claimed, result, took)
            case Fenced():
                event = JobLeaseLost(claimed.job)
            case _:
                return None
        self._drop(claimed)
        if claimed.job.exclusive is not None and not isinstance(result, Fenced):
            self._free[claimed.job.exclusive] = None
        self._look()  # it may have been rescheduled
        return event

    def _wants(self, outcome: Outcome) -> bool:
        if not isinstance(outcome.result, NeedsKey):
            return False
        job, token, is_charged = outcome.claimed
        claimed = Claimed(job._replace(exclusive=outcome.result.key), token, is_charged)
        batch = self._batches.get(token)
        if batch is None or job.id not in batch.jobs:
            return False  # lost: dropped with the others
        batch.jobs[job.id] = claimed
        batch.places = ()  # writing the key moves the row
        self._wanting.append(claimed)
        self._has_keys = True
        return True

    def give_up(self, claims: Iterable[Claimed]) -> None:
        """End the sessions of transactional handlers whose jobs have failed before they end."""
        self._doomed += [c for c in claims if c.job.type in self._transactional]

    def withdrawn(self, claimed: Iterable[Claimed]) -> None:
        """Record that jobs were taken back before they started: release them."""
        claimed = [*claimed, *self._wanting]
        self._wanting.clear()
        finished = len(self._pending)
        self.finish([Outcome(c, Release(), None) for c in claimed])
        # They go first: nothing is claimed before they are released.
        self._pending.rotate(len(self._pending) - finished)

    def wake(self, notice: Notice) -> None:
        """Record a notification: jobs were enqueued, or the notify lock was released."""
        known = self._marks.told(notice.since)
        self._look(thoroughly=notice.later or notice.relief or not known)
        if notice.relief:
            self._notify_lock.relieve()

    def _look(self, *, thoroughly: bool = True) -> None:
        """Claim next; and sweep soon, unless the jobs are at the marks."""
        self._told = True
        self._vague |= thoroughly

    def shutdown(self) -> None:
        """Stop claiming, release jobs that have not started, finish the others, stop."""
        self._stopping = True

    def abandon(self) -> None:
        """Stop without waiting for handlers; their jobs are left to their leases.

        Each gets its attempt back, because the end of a grace period is not its fault.
        """
        if not self._abandoned:
            lost = self._lost
            self._leaving = [claimed for claimed in self.running() if claimed not in lost]
        self._stopping = self._abandoned = True

    # -- the next step ----------------------------------------------------------------

    def step(self, now: float) -> Step:
        """Return the next step; an Exchange must be answered before the next call."""
        if self._stopping and not self._withdrew:
            self._withdrew = True
            return Withdraw()
        if self._stopping and (self._wanting or self._apart_wanting):
            self._want_again(self._apart_wanting)
            self._apart_wanting = []
            self.withdrawn([])
        if now >= self._pace.stale_at(self._running):
            self._pace.slow_down(now)
            return Withdraw()
        held = self._pending or self._refused or self._free or self._apart
        settled = not (held or self._doomed or self._leaving)
        done = settled and (self._abandoned or not self._running)
        if self._stopping and done and not self._notify_lock.is_held:
            return Stop(self._running)
        if now < self._not_before:
            return Sleep(self._not_before)

        exchange = Exchange()
        outcomes: list[Unsettled] = []
        if self._doomed:
            # Alone: if the server refuses it, it must not refuse settlements.
            exchange.end, self._doomed = self._doomed, []
            return self._send(exchange, outcomes, now)
        if now >= self._apart_at:
            self._add_probe(exchange)
            return self._send(exchange, outcomes, now)
        if now >= self._refused_at:
            outcomes.append(self._refused.popleft())
            exchange.settle(outcomes[0])
            self._add_releases(exchange, outcomes)
            self._refused_at = now + self._refused_pause if self._refused else inf
            return self._send(exchange, outcomes, now, again=True)
        for turn in range(4):
            match (self._turn + turn) % 4:
                case 0:
                    self._add_settlements(exchange, outcomes, self._settle_limit)
                    self._add_releases(exchange, outcomes)
                case 1:
                    self._add_extensions(exchange, outcomes, now)
                case 2:
                    self._add_keys(exchange, now)
                case _:
                    self._add_claim(exchange, now)
            if self._careful and exchange:
                # One kind of work at a time, each in turn, so that a failing one does not
                # stop the others.
                self._turn += turn + 1
                break
        if self._stopping:
            exchange.notify_lock = "release" if done else None
        else:
            self._add_notify_lock(exchange, now)
        if exchange:
            return self._send(exchange, outcomes, now)
        return Sleep(self._wake_at(now))

    def flows(self, exchange: Exchange) -> bool:
        """Whether sending the next exchange ahead of this one's answer is worth it."""
        return self._more and exchange.claim is not None and exchange.claim.limit >= self.bulky

    def ahead(self, now: float) -> Exchange | None:
        """Return the next exchange while the last one is not acknowledged.

        It is sent as soon as that one is answered, so that the server works while the answer
        is processed. None unless jobs flow and there is no other work.
        """
        exchange = Exchange()
        outcomes: list[Unsettled] = []
        quiet = not (
            self._careful
            or self._stopping
            or self._notify_lock.is_held
            or self._wanting
            or self._doomed
            or self._gives_back
            or any(sent.exchange.give_back for sent in self._sent)
            or self._is_held_up(now)
            or any(batch.extend_at <= now for batch in self._batches.values())
        )
        if self._more and quiet and self._claimable >= self.bulky:
            self._add_claim(exchange, now)
            if self.flows(exchange):
                self._add_settlements(exchange, outcomes, self._settle_limit)
                self._add_releases(exchange, outcomes)
                return self._send(exchange, outcomes, now)
        return None

    def _send(
        self, exchange: Exchange, outcomes: list[Unsettled], now: float, *, again: bool = False
    ) -> Exchange:
        told = vague = False
        if exchange.claim and exchange.claim.looks:
            vague, self._vague = self._vague or self._due_at <= now, False
            told, self._told = self._told or vague, False
        self._sent.append(_Sent(exchange, outcomes, now, again, told, vague))
        return exchange

    def _add_settlements(self, exchange: Exchange, outcomes: list[Unsettled], limit: int) -> None:
        pending, completed = self._pending, exchange.complete
        for _ in range(min(limit, len(pending))):
            outcome = pending.popleft()
            outcomes.append(outcome)
            if type(outcome.result) is Complete:  # nearly all are
                completed.append(outcome.claimed)
            else:
                exchange.settle(outcome)
        exchange.holds_notify_lock = self._notify_lock.is_held
        if completed:
            self._add_places(exchange)

    def _add_places(self, exchange: Exchange) -> None:
        """Add the positions of rows whose whole claim is completed."""
        for token, count in Counter(map(_token, exchange.complete)).items():
            batch = self._batches.get(token)
            if batch is not None and batch.places and count == len(batch.jobs):
                exchange.places[token] = batch.places

    def _add_releases(self, exchange: Exchange, outcomes: list[Unsettled]) -> None:
        if self._has_keys:
            exchange.release += _keys(outcomes)

    def _add_keys(self, exchange: Exchange, now: float) -> None:
        if self._free:
            free = [*self._free][: self._keys_limit]
            exchange.release += free
            for key in free:
                del self._free[key]
        if self._wanting and now >= self._keys_at:
            count = min(len(self._wanting), self._keys_limit)
            exchange.acquire = [self._wanting.popleft() for _ in range(count)]

    def _add_probe(self, exchange: Exchange) -> None:
        """Ask which of the rows that are set apart are locked."""
        exchange.probe = [outcome.claimed for outcome in self._apart]
        wanting = [str(claimed.job.exclusive) for claimed in self._apart_wanting]
        exchange.probe_keys = [*_keys(self._apart), *wanting, *self._apart_free]
        self._apart_at = inf

    def _add_extensions(self, exchange: Exchange, outcomes: list[Unsettled], now: float) -> None:
        if self._leaving:
            ended = {o.claimed for o in [*outcomes, *self._pending]}
            exchange.abandon = [c for c in self._leaving if c not in ended]
            self._leaving = []
        due = [batch for batch in self._batches.values() if batch.extend_at <= now]
        if due:
            leaving = {outcome.claimed for outcome in outcomes}
            exchange.extend = [c for batch in due for c in batch.jobs.values() if c not in leaving]

    def _add_claim(self, exchange: Exchange, now: float) -> None:
        if self._stopping or exchange.give_back or self._gives_back:
            return  # jobs that did not start are due before those that it would claim
        if not self._careful and any(
            batch.expires <= now and batch.extend_at <= now for batch in self._batches.values()
        ):
            return  # first settle and extend jobs that another worker may free
        limit = self._claimable
        held_up = self._is_held_up(now)
        is_groups_turn = (
            held_up
            and self._has_free_slot
            and self._isolation.wants_group(now, running=self._running)
        )
        if now >= self._marks.sweep_at and (
            # The jobs of a group whose answer was lost are freed before the next group.
            (held_up and (self._unanswered or not is_groups_turn))
            or limit <= 0
            or self._has_more_to_free
        ):
            self._add_sweep(exchange, 0, next(self._tokens), now)
            return
        if is_groups_turn:
            free = min(self._pace.slots - self._running, self._claim_limit)
            charge = not self._isolation.has_group
            exchange.claim = ClaimGroup(free, next(self._tokens), charge)
        if limit <= 0 or held_up:
            return
        if not self._wants_claim(now):
            return
        # While there are more jobs, sweep when it is due. After a wait, before a sleep,
        # or without marks, sweep as soon as it can be afforded. A job that was notified
        # is nearly always at the mark: it must not wait for a sweep.
        marks = self._marks
        at = marks.sweep_at if self._more or self._told else marks.early_sweep_at
        token = next(self._tokens)
        if now >= at or not marks.known:
            self._add_sweep(exchange, limit, token, now)
        else:
            exchange.claim = Claim(limit, token, marks.start(now))
            self._watch(exchange)

    def _add_sweep(self, exchange: Exchange, limit: int, token: int, now: float) -> None:
        window = self._marks.window()
        if window is not None:
            limit = 0
        for gone in [gone for gone, until in self._unanswered.items() if until <= now]:
            del self._unanswered[gone]
        unanswered = tuple(self._unanswered)
        exchange.claim = Sweep(limit, token, self._blocked_after, self._held, window, unanswered)
        if limit:
            self._watch(exchange)

    @property
    def _held(self) -> tuple[int, ...]:
        """Tokens whose jobs no sweep of this worker may free, even after their lease."""
        sent = (sent.exchange.claim.token for sent in self._sent if sent.exchange.claim)
        return *self._batches, *sent

    def _watch(self, exchange: Exchange) -> None:
        if not self._notify_lock.is_held:  # while it is held, no unseen enqueue is in progress
            exchange.watch = "claims" if self._marks.has_seen else "all"

    def _add_notify_lock(self, exchange: Exchange, now: float) -> None:
        alone = not exchange
        idle = isinstance(exchange.claim, Sweep) and not self._more
        if not alone and (self._careful or not (idle or self._notify_lock.is_held)):
            return
        exchange.notify_lock = self._notify_lock.wish(now, free=self._has_room_for_others(now))
        if exchange.notify_lock == "release":
            exchange.watch = "claims"  # from here on enqueues do not notify
        if exchange.notify_lock == "take":
            exchange.is_deputy = self._notify_lock.is_deputy
            exchange.relieve = self._notify_lock.relieves
        if (
            exchange.notify_lock == "take"
            and alone
            and self._notify_lock.polls
            and not self._careful
        ):
            # The sweep that has to follow is part of the exchange. Its survey shows even the
            # jobs that become due between the transaction's begin and the lock.
            limit = self._claimable
            if limit > 0 and now >= self._marks.early_sweep_at:
                self._add_sweep(exchange, limit, next(self._tokens), now)

    @property
    def _gives_back(self) -> bool:
        return bool(self._pending) and type(self._pending[0].result) is Release

    @property
    def _claimable(self) -> int:
        return min(self._room(), self._claim_limit)

    def _room(self) -> int:
        if len(self._refused) + len(self._apart) + len(self._apart_wanting) >= _MOST:
            return 0
        asked = sum(sent.exchange.claim.limit for sent in self._sent if sent.exchange.claim)
        return self.capacity - self._running - asked

    def _wants_claim(self, now: float) -> bool:
        return (
            self._more
            or self._told
            or now >= min(self._poll_at, self._due_at, self._notify_lock.look_at)
            or now >= min(self._marks.sweep_at, self._marks.look_back_at)
        )

    @property
    def _has_free_slot(self) -> bool:
        return self._running < self._pace.slots

    def _has_room_for_others(self, now: float) -> bool:
        return self._has_free_slot and not self._is_held_up(now)

    def _is_held_up(self, now: float) -> bool:
        """Whether only a group of suspects may be claimed."""
        isolation = self._isolation
        if not isolation.is_needed:
            return False
        was_held_up = isolation.has_begun
        is_held_up = isolation.holds_up(now, is_free=self._has_free_slot)
        if was_held_up and not is_held_up:
            self._look()
        return is_held_up

    def _wake_at(self, now: float) -> float:
        times = [now + self._poll_interval, self._refused_at, self._apart_at]
        if self._wanting:
            times.append(self._keys_at)
        times += [batch.extend_at for batch in self._batches.values()]
        if not self._stopping:
            is_held_up = self._is_held_up(now)
            if self._isolation.is_needed:
                times.append(self._isolation.wake_at(now))
            if not is_held_up and self._room() > 0:
                times += [self._poll_at, self._due_at, self._notify_lock.look_at]
                times.append(self._marks.look_back_at)
            times.append(self._marks.sweep_at)
            free = self._has_room_for_others(now)
            times.append(self._notify_lock.wake_at(now, free=free))
            times.append(self._pace.stale_at(self._running))
        return min(times)

    # -- answers ------------------------------------------------------------------------

    def acknowledge(self, reply: Reply, now: float) -> Effects:
        """Process the answer to an exchange, which was committed."""
        sent, effects = self._answered(), Effects()
        self._pace.exchanged(now - max(sent.at, self._answered_at))
        self._answered_at = now
        self._not_before, self._pause = -inf, _PAUSE
        self._careful = max(self._careful - 1, 0)
        if not self._careful:
            self._turn = 0
        if sent.outcomes:
            self._settle_limit = min(2 * self._settle_limit, _MOST)
            if sent.again:
                # A refused outcome was accepted: the others may be accepted too.
                self._pending.extend(self._refused)
                self._refused.clear()
                self._refused_at, self._refused_pause, self._settle_limit = inf, _PAUSE, 1
            self._has_probed = False
        if sent.exchange.claim is not None and sent.exchange.claim.limit:
            self._claim_limit = min(self._claim_limit + self._claim_limit // 8 + 1, _MOST // 2)
        if sent.exchange.probes:
            self._probed(reply, effects, now)
        if self._spilled:
            self._lose([o.claimed for o in [*self._refused][: self._spilled]], effects)
            self._spilled = 0
        due_at = self._settled(sent, reply, effects, now)
        self._granted(sent, reply, now, effects)
        self._extended(sent, reply, effects)
        wish, seen = sent.exchange.notify_lock, reply.seen
        was_covered = self._notify_lock.is_covered
        if wish:
            self._notify_lock.answered(wish, reply.lock_answer, now)
        self._claimed(sent, reply, now, effects)
        if seen is not None and wish == "release":
            self._marks.notifications_off(seen.at)
        elif seen is not None:
            self._marks.saw(seen, now)
        if wish == "take":
            claim = sent.exchange.claim
            looked = claim is not None and claim.looks
            if self._notify_lock.is_held:
                self._marks.notifications_on(now, polled_since=looked and not self._more)
            if not looked and not (was_covered and self._notify_lock.is_covered):
                self._look()  # for jobs that were committed before the lock was taken
        # Its claim and its survey ran before the settlements.
        self._due_at = min(self._due_at, due_at)
        if not self._idle and self._waits(now):
            self._idle = True
            effects.events.append(QueueIsEmpty(self._queue))
        return effects

    def reject(self, now: float, *, for_lock: bool = False, for_data: bool = False) -> bool:
        """Record that the server refused the exchange: nothing of it happened.

        Its outcomes are tried again in smaller parts and after the others, until the one
        that is refused is alone. That one is kept apart, and uses no slot and delays no
        other job.

        If it was refused for a lock, the engine asks which rows are locked. Only those are
        set apart. Returns False in that case: the observer is not told.

        Outcomes that are refused for their data, for example by a user's foreign key, may be
        refused forever: only so many are kept, and the oldest are left to their leases. Outcomes
        refused for other reasons are all kept; too many of them stop the claims.
        """
        sent = self._answered()
        while self._sent:
            self._take_back(self._sent.pop())
        if sent.exchange.probes:
            self._apart_at = now + self._apart_pause
        elif for_lock and not self._has_probed and self._leave_apart(sent):
            self._apart_at = now
            self._claim_again(sent)
            self._careful = _CAREFUL
            return False
        wanting, free = sent.exchange.acquire, self._freed(sent)
        if wanting or free:
            # As with outcomes: a key that cannot be locked ends up alone, and last.
            self._keys_limit = max(max(len(wanting), len(free)) // 2, 1)
            self._wanting += wanting
            self._free.update(free)
        self._claim_again(sent)
        claim = sent.exchange.claim
        if claim is not None and claim.looks:
            self._isolation.others_looked(now)  # or the suspects would never get their turn
        if isinstance(claim, Sweep):
            self._marks.refused(claim.window, began=sent.at, now=now)
        if claim is not None and claim.limit and not sent.outcomes:
            # The claim may have been too large for the server or a slow network.
            self._claim_limit = max(claim.limit // 2, 1)
        if not self._careful:  # refused again, they are left to their leases
            self._leaving += sent.exchange.abandon
        self._careful = _CAREFUL
        if len(sent.outcomes) == 1:
            self._refused += sent.outcomes
            if for_data and len(self._refused) > _MOST // 2:
                self._spilled += 1
            if sent.again:
                self._refused_pause = self._longer(self._refused_pause)
            if sent.again or self._refused_at == inf:
                self._refused_at = now + self._refused_pause
            return True
        if sent.outcomes:
            self._settle_limit = len(sent.outcomes) // 2
            self._pending += sent.outcomes
        self._rest(now)
        return True

    def _leave_apart(self, sent: _Sent) -> bool:
        """Set apart the rows that an exchange locks; False if there are none."""
        wanting, free = sent.exchange.acquire, self._freed(sent)
        self._apart += sent.outcomes
        self._apart_wanting += wanting
        self._apart_free.update(free)
        self._running -= len(wanting)
        self._isolation.ended(wanting)
        return bool(sent.outcomes or wanting or free)

    def _probed(self, reply: Reply, effects: Effects, now: float) -> None:
        """Continue with unlocked rows; ask for the others again, at growing intervals."""
        barred, keys = {*reply.barred}, {*reply.barred_keys}

        def is_barred(claimed: Claimed) -> bool:
            return claimed.job.id in barred or claimed.job.exclusive in keys

        self._pending.extend(o for o in self._apart if not is_barred(o.claimed))
        self._apart = [o for o in self._apart if is_barred(o.claimed)]
        self._want_again([c for c in self._apart_wanting if c.job.exclusive not in keys])
        self._apart_wanting = [c for c in self._apart_wanting if c.job.exclusive in keys]
        self._free.update(dict.fromkeys(key for key in self._apart_free if key not in keys))
        self._apart_free = {key: None for key in self._apart_free if key in keys}
        # If an exchange is refused for a lock now, it waits for rows of other tables.
        self._has_probed = not (barred or keys)
        if self._has_probed:
            self._apart_pause, self._apart_since = _PAUSE, inf
            return
        self._apart_at = now + self._apart_pause
        self._apart_pause = self._longer(self._apart_pause)
        self._apart_since = min(self._apart_since, now)
        if now >= self._apart_since + _LONG_LOCKED:
            self._apart_since = now
            ids = [o.claimed.job.id for o in self._apart]
            effects.locked = [*ids, *(c.job.id for c in self._apart_wanting)]

    def _want_again(self, claimed: Sequence[Claimed]) -> None:
        self._wanting += claimed
        self._running += len(claimed)
        self._isolation.resumed(claimed)

    def disconnect(self, now: float) -> None:
        """Record that the connection is gone; a sent exchange may have happened or not."""
        while self._sent:
            sent = self._sent.pop()
            self._unsure.update(outcome.claimed for outcome in sent.outcomes)
            if sent.exchange.claim is not None and sent.exchange.claim.limit:
                self._unanswered[sent.exchange.claim.token] = sent.at + self._lease
                self._marks.start_again()
                self._isolation.others_looked(now)
            self._take_back(sent)
        self._notify_lock.lose()
        self._look()
        self._rest(now)

    def _take_back(self, sent: _Sent) -> None:
        if sent.exchange.probes:
            self._apart_at = -inf
        self._doomed += sent.exchange.end
        self._leaving += sent.exchange.abandon
        self._wanting.extendleft(reversed(sent.exchange.acquire))
        self._free.update(self._freed(sent))
        self._pending.extendleft(reversed(sent.outcomes))
        self._claim_again(sent)

    def _claim_again(self, sent: _Sent) -> None:
        if isinstance(sent.exchange.claim, Claim):
            self._marks.again(sent.exchange.claim.marks)
        if sent.told:
            self._look()

    def reconnect(self) -> None:
        """Record that there is a connection again: sweep."""
        self._not_before = -inf
        self._marks.sweep_at = -inf

    @staticmethod
    def _freed(sent: _Sent) -> dict[str, None]:
        """Return the keys that it releases in addition to those of its outcomes."""
        return dict.fromkeys(sent.exchange.release[len(_keys(sent.outcomes)) :])

    def _answered(self) -> _Sent:
        if not self._sent:
            raise RuntimeError("no exchange was sent")
        return self._sent.popleft()

    def _rest(self, now: float) -> None:
        self._not_before = now + self._pause
        self._pause = self._longer(self._pause)

    def _longer(self, pause: float) -> float:
        # Never so long that a lease could end meanwhile.
        return min(2 * pause, max(_PAUSE, min(self._poll_interval, self._lease / 12)))

    def _settled(self, sent: _Sent, reply: Reply, effects: Effects, now: float) -> float:
        """Report the settled jobs; return when the first of them is due again."""
        settled, due_at = reply.settled, inf
        # Of the outcomes those are told whose results are a handler's.
        events = cast("list[Event | Unsettled]", effects.events)
        outcomes, places = sent.outcomes, sent.exchange.places
        if places and len(settled) < len(outcomes):
            outcomes = self._found(sent, settled)
        elif places and not self._unsure:
            batches = [b for t in places if (b := self._batches.get(t)) is not None]
            if len(outcomes) == sum(len(batch.jobs) for batch in batches):
                # Only whole claims: no need to process each job.
                for token in places:
                    del self._batches[token]
                events += outcomes
                return due_at
        for outcome in outcomes:
            claimed, result, took = outcome
            batch = self._drop(claimed)
            if batch is None:
                continue  # lost meanwhile
            if type(result) is Complete and not self._unsure and claimed.job.id in settled:
                events.append(outcome)  # nearly all go this way
                continue
            unsure = claimed in self._unsure
            if unsure:
                self._unsure.discard(claimed)
            commit_unknown = isinstance(result, CommitUnknown)
            if claimed.job.id not in settled:
                # The job is gone, and no other worker can have had it: the settlement whose
                # answer was lost had been committed. With two lost answers that is unknown.
                if unsure == commit_unknown or sent.at >= batch.expires:
                    events.append(JobLeaseLost(claimed.job))
                    continue
                result = result.result if isinstance(result, CommitUnknown) else result
            elif isinstance(result, CommitUnknown):
                result = result.otherwise
            if isinstance(result, Release):
                # It keeps its due time, which is behind the marks.
                known = self._marks.told({claimed.job.priority: claimed.job.next_run_at})
                self._look(thoroughly=not known)
                continue
            events.append(Outcome(claimed, result, took) if commit_unknown else outcome)
            if not isinstance(result, Complete | MoveToDlq):
                due_at = min(due_at, now + outcome.delay)
                if isinstance(result, Retry) and result.priority is not None:
                    self._marks.retried(result.priority)
        return due_at

    def _found(self, sent: _Sent, settled: set[str]) -> list[Unsettled]:
        """Return the outcomes whose rows were found; settle the others by id next."""
        found: list[Unsettled] = []
        astray: list[Unsettled] = []
        for outcome in sent.outcomes:
            job, token, _ = outcome.claimed
            batch = self._batches.get(token) if token in sent.exchange.places else None
            if batch is None or job.id in settled or job.id not in batch.jobs:
                found.append(outcome)
            else:
                batch.places = ()
                astray.append(outcome)
        self._pending.extendleft(reversed(astray))
        return found

    def _granted(self, sent: _Sent, reply: Reply, now: float, effects: Effects) -> None:
        """Hand out the jobs that were granted their keys; the others wait, or ask again soon."""
        locked: list[Claimed] = []
        for claimed in sent.exchange.acquire:
            batch = self._batches.get(claimed.token)
            if batch is None or claimed.job.id not in batch.jobs:
                self._running -= 1  # lost meanwhile
                self._isolation.ended([claimed])
                self._lost.discard(claimed)
                continue
            has_key = reply.acquired.get((claimed.job.id, claimed.token), False)
            if has_key:
                effects.run.append(claimed)
            elif has_key is None:
                locked.append(claimed)
            else:
                self._running -= 1
                self._isolation.ended([claimed])
                self._drop(claimed)
        if sent.exchange.acquire:
            self._wanting += locked
            self._keys_at = now + self._keys_pause if locked else -inf
            self._keys_pause = min(2 * self._keys_pause, _PAUSE) if locked else _MOMENT
        if sent.exchange.acquire or sent.exchange.release:
            self._keys_limit = min(2 * self._keys_limit, _MOST // 2)
        if reply.woken:
            since = {
                priority: min(w.since for w in reply.woken if w.priority == priority)
                for priority in {w.priority for w in reply.woken}
            }
            self.wake(Notice(since))

    def _drop(self, claimed: Claimed) -> _Batch | None:
        """Remove a claim; return its batch, or None if it is gone already."""
        batch = self._batches.get(claimed.token)
        if batch is None or batch.jobs.pop(claimed.job.id, None) is None:
            return None
        if not batch.jobs:
            del self._batches[claimed.token]
        return batch

    def _extended(self, sent: _Sent, reply: Reply, effects: Effects) -> None:
        lost = []
        for claimed in sent.exchange.extend:
            batch = self._batches.get(claimed.token)
            if batch is None or claimed.job.id not in batch.jobs:
                continue  # its own transaction settled it meanwhile
            batch.extend_at = sent.at + self._lease / 3
            batch.places = ()
            if claimed.job.id in reply.extended:
                batch.expires = sent.at + self._lease
            elif claimed not in self._unsure and claimed.job.type not in self._transactional:
                lost.append(claimed)  # a transactional job's own transaction notices
        if lost:
            self._lose(lost, effects)

    def _lose(self, claims: list[Claimed], effects: Effects) -> None:
        """Drop claims that other workers may have, with their present and later outcomes."""
        lost = set(claims)
        sent = [outcome for sent in self._sent for outcome in sent.outcomes]
        waiting = [*self._pending, *self._refused, *self._apart]
        finished = {o.claimed for o in [*waiting, *sent]} & lost
        apart = lost & set(self._apart_wanting)  # counted as if they had ended
        self._apart = [o for o in self._apart if o.claimed not in lost]
        self._apart_wanting = [c for c in self._apart_wanting if c not in apart]
        self._pending = deque(o for o in self._pending if o.claimed not in lost)
        self._refused = deque(o for o in self._refused if o.claimed not in lost)
        if not self._refused:
            self._refused_at = inf
        self._unsure -= lost
        wanting = lost & set(self._wanting)  # they are in no handler
        if wanting:
            self._wanting = deque(c for c in self._wanting if c not in wanting)
            self._running -= len(wanting)
            self._isolation.ended(wanting)
        self._lost |= lost - finished - wanting - apart
        if lost - finished:
            self._pace.hurry_back()  # lost jobs that have not started must not start now
        for claimed in claims:
            if (batch := self._drop(claimed)) is not None:
                batch.places = ()  # a sent outcome may be of a job that the batch no longer has
            effects.events.append(JobLeaseLost(claimed.job))

    def _waits(self, now: float) -> bool:
        return not (
            self._running
            or self._pending
            or self._sent
            or self._more
            or self._told
            or self._isolation.is_needed
            or not self._notify_lock.settled(now)
        )

    def _claimed(self, sent: _Sent, reply: Reply, now: float, effects: Effects) -> None:
        match sent.exchange.claim:
            case ClaimGroup(_, token, charge):
                suspects, deaths = reply.group
                is_charged = charge and len(suspects) + reply.unread == 1
                self._isolation.claimed(
                    token, len(suspects), deaths=deaths, is_charged=is_charged, now=now
                )
                group = [Claimed(job, token, is_charged) for job in suspects]
                self._hold(group, sent, now, effects)
            case Sweep(window=Window() as window):
                is_new = self._marks.swept_part(window, reply.lines, began=sent.at, now=now)
                self._isolation.surveyed(any(line.has_suspects for line in reply.lines))
                found = {stray.priority: stray.since for stray in reply.strays}
                self._marks.told(found)
                self._freed_by(reply)
                if found or is_new:
                    self._look(thoroughly=False)
                self._surveyed(reply, now)
            case Sweep(0):
                self._swept(reply, sent, now, full=True)
                self._has_more_to_free = False
                if reply.swept.freed == MOST_FREED:
                    self._marks.sweep_at = self._marks.early_sweep_at
            case Sweep(limit, token):
                jobs, freed, _ = reply.swept
                self._looked(jobs, now, full=len(jobs) + freed + reply.unread == limit)
                self._swept(reply, sent, now, full=self._more)
                if freed and self._more:
                    # There may be more to free than there are slots.
                    self._has_more_to_free, self._marks.sweep_at = True, -inf
                self._surveyed(reply, now)
                self._hold(_claimed(jobs, token), sent, now, effects)
            case Claim(limit, token, starts):
                jobs, places = reply.claimed
                self._marks.answered()
                self._looked(jobs, now, starts, full=len(jobs) + reply.unread == limit)
                if sent.vague and not self._more:
                    # The notified job may be behind the marks, or have an unknown priority, and
                    # only a sweep finds out when the next job is due.
                    self._due_at = inf
                    # Not immediately: the thread that was woken for a job needs the interpreter,
                    # and its settlement may be part of the sweep's exchange.
                    soon = max(self._marks.early_sweep_at, now + _MOMENT if jobs else now)
                    self._marks.sweep_at = min(self._marks.sweep_at, soon)
                self._hold(_claimed(jobs, token), sent, now, effects, places)

    def _surveyed(self, reply: Reply, now: float) -> None:
        self._free.update(dict.fromkeys(reply.blocked.keys))
        self._blocked_after = reply.blocked.after
        if reply.blocked.after:  # there are more keys than one sweep checks
            self._marks.sweep_at = min(self._marks.sweep_at, self._marks.early_sweep_at)
        waits = [line.wait for line in reply.lines if line.wait is not None]
        self._due_at = now + max(min(waits), 0.0) if waits else inf

    def _swept(self, reply: Reply, sent: _Sent, now: float, *, full: bool) -> None:
        self._marks.swept(reply.lines, reply.seen, full=full, began=sent.at, now=now)
        self._freed_by(reply)
        self._isolation.surveyed(any(line.has_suspects for line in reply.lines))

    def _freed_by(self, reply: Reply) -> None:
        """Start the next claim at the freed jobs that are not suspects."""
        if reply.swept.since is not None:
            self._marks.freed(reply.swept.since)
            self._look(thoroughly=False)

    def _looked(
        self,
        jobs: list[Job],
        now: float,
        starts: Mapping[int, datetime] | None = None,
        *,
        full: bool,
    ) -> None:
        self._isolation.others_looked(now)
        self._more = full
        self._poll_at = now + self._poll_interval
        self._notify_lock.arrived(len(jobs), now)
        self._marks.claimed(jobs, starts, full=full)

    def _hold(
        self,
        claimed: list[Claimed],
        sent: _Sent,
        now: float,
        effects: Effects,
        places: Sequence[str] = (),
    ) -> None:
        if not claimed:
            return
        self._idle = False
        self._pace.claimed(claimed, now)
        expired = [b for b in self._batches.values() if b.expires <= now]
        if expired or self._unsure:
            # Two claims of one job must not be in one statement, which would affect either.
            again = {c.job.id for c in claimed}
            unsure = (b for c in self._unsure if (b := self._batches.get(c.token)) is not None)
            batches = {id(b): b for b in [*expired, *unsure]}.values()
            ours = [c for b in batches for c in b.jobs.values() if c.job.id in again]
            if ours:
                self._lose(ours, effects)  # this worker claimed them again
        self._batches[claimed[0].token] = _Batch(
            sent.at + self._lease,
            sent.at + self._lease / 3,
            {c.job.id: c for c in claimed},
            places,
        )
        self._running += len(claimed)
        keyed = [c for c in claimed if c.job.exclusive is not None]
        if keyed:
            self._has_keys = True
            self._wanting.extend(keyed)
            claimed = [c for c in claimed if c.job.exclusive is None]
        effects.run.extend(claimed)
