"""The worker's decisions, as a pure state machine.

The engine reads no clock, opens no socket and starts no thread. The control thread reports what
happened and the time, in seconds of any monotonic clock, and asks for the next step. That has
something to do, or names the time to sleep to.

Each part of the engine has one kind of work, and its docstring says what always holds for it.
The engine puts together what they add to an exchange, and reports to each of them what became
of it: the answer, a refusal, or that it is unknown. What concerns several parts is here: which
kinds of work are next, the end of the worker, and a job that leaves all parts since it is lost. It
has over 400 lines, because each of its verbs goes through all parts.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from math import inf
from random import random
from types import MappingProxyType

from bgjob._engine.batch_pace import BatchPace
from bgjob._engine.cancels import Cancels
from bgjob._engine.claims import Claims
from bgjob._engine.isolation import Isolation
from bgjob._engine.keys import Keys
from bgjob._engine.leases import Leases
from bgjob._engine.locked import Locked
from bgjob._engine.lookout import Lookout
from bgjob._engine.outcome import Committed, Effects, Event, Outcome, Release
from bgjob._engine.over import Over
from bgjob._engine.pace import Pace
from bgjob._engine.pause import FIRST, Pause
from bgjob._engine.protocol import MOST, Exchange, Sleep, Step, Stop, Withdraw
from bgjob._engine.reply import Notice, Reply
from bgjob._engine.settling import Settling
from bgjob._engine.throttle import Throttle
from bgjob._sql.keys import NO_SLOTS
from bgjob._sql.notices import Subscription
from bgjob._sql.settlements import Claimed
from bgjob.event import JobLeaseLost, QueueIsEmpty
from bgjob.limit import Limit

NO_LIMITS: Mapping[str, Limit] = MappingProxyType({})

_MANY = 100
"""Jobs beyond the slots from which those of each type with a limit are not counted each time."""

_CAREFUL = 6
"""Exchanges after a refusal that carry one kind of work each."""


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
        checkpointed: Collection[str] = (),
        names_keys: bool = False,
        slots: Mapping[str, int] = NO_SLOTS,
        kept: Collection[str] = (),
        batches: Mapping[str, int] | None = None,
        only_batches: bool = False,
        limit: Limit | None = None,
        type_limits: Mapping[str, Limit] = NO_LIMITS,
        holder: int = 0,
        chance: Callable[[], float] = random,
    ) -> None:
        self._queue = queue  # for its events
        self._slots = concurrency
        self._transactional = transactional
        self._in_transactions = {*transactional, *checkpointed}  # while handlers run, or at times
        self._kept = kept
        self._names_keys = names_keys  # whether handlers may find a key for a job that has none
        # Never so long that a lease could end meanwhile.
        longest_pause = max(FIRST, min(poll_interval, lease / 12))

        self._sent: deque[Exchange] = deque()  # and not answered
        self.pace = (
            BatchPace(concurrency, batches, only_batches=only_batches)
            if batches
            else Pace(concurrency)
        )
        self._leases = Leases(lease)
        self._cancels = Cancels()
        self._settling = Settling(self._leases, self._cancels, Pause(longest_pause), transactional)
        self._keys = Keys(self._leases, self.pace, concurrency, slots)
        self._locked = Locked(Pause(longest_pause))
        self._over = Over()
        self._lookout = Lookout(poll_interval, notify=notify, chance=chance)
        self._isolation = Isolation()
        self.throttle = Throttle(
            self.pace,
            queue,
            limit,
            type_limits,
            concurrency=concurrency,
            batches=batches or (),
            lease=lease,
            holder=holder,
        )
        self._tokens = tokens
        self._claims = Claims(
            self.pace, self._leases, self._lookout, self._isolation, self._sent, tokens
        )

        self._doomed: list[Claimed] = []  # claims whose sessions are to end
        self._severed: set[Claimed] = set()  # whose connections were lost
        self._leaving: list[Claimed] = []  # abandoned, and the server has not been told
        self._stopping = self._abandoned = self._withdrew = False
        self._is_idle = False  # the observer knows that the queue is empty
        self._answered_at = -inf
        # After a refusal.
        self._pause = Pause(longest_pause)
        self._not_before = -inf
        self._careful = 0  # exchanges that carry one kind of work, each in turn
        self._turn = 0

    @property
    def slots(self) -> int:
        """How many handlers may run, as far as the worker is concerned."""
        return self._slots

    @slots.setter
    def slots(self, slots: int) -> None:
        self._slots = slots
        limit, pace = self.throttle.queue, self.pace
        pace.slots = limit.places(slots) if limit.is_on else slots
        pace.is_bounded = limit.is_on and limit.is_tight(slots)

    @property
    def unsettled(self) -> int:
        """Jobs that are claimed and not settled."""
        return self.pace.running + self.unsettled_outcomes

    @property
    def unsettled_outcomes(self) -> int:
        """Jobs that have ended and are not settled."""
        unsettled = len(self._settling) + len(self._locked)
        for exchange in self._sent:
            unsettled += len(exchange.outcomes)
        return unsettled

    def running(self) -> list[Claimed]:
        """Return the claimed jobs that have no outcome yet, also those that were lost."""
        sent = [outcome for exchange in self._sent for outcome in exchange.outcomes]
        outcomes = [*self._settling.outcomes, *self._locked.outcomes, *sent]
        others = {o.claimed for o in outcomes} | {*self._keys.wanting, *self._locked.wanting}
        others.update(self.throttle.held)
        others.update(claimed for exchange in self._sent for claimed in exchange.acquire)
        return [*self._leases.lost, *(c for c in self._leases.jobs if c not in others)]

    @property
    def suspects(self) -> Collection[int]:
        """The tokens of claims whose jobs may have killed workers."""
        return self._isolation.tokens

    @property
    def ends_sessions(self) -> bool:
        """Whether sessions of handlers that were given up are still to end."""
        return bool(self._doomed) or any(exchange.end for exchange in self._sent)

    # -- what happened --------------------------------------------------------------

    def finish(self, outcomes: Sequence[Outcome]) -> list[Event]:
        """Record that handlers ended; the results of lost jobs are dropped.

        Returns the events of jobs that their own transactions have settled.
        """
        outcomes = self._cancels.but_abandoned(outcomes)
        if self._names_keys:
            outcomes = [outcome for outcome in outcomes if not self._keys.wants(outcome)]
        if self._isolation.has_group:
            self._isolation.ended(outcome.claimed for outcome in outcomes)
        self.pace.finished(outcomes)
        if self._keys.are_used:
            self._keys.finished(outcomes)
        events = self._settling.finish(outcomes)
        if events:
            self._lookout.look()  # they may have been rescheduled
        if events and self._over.are_used:
            self._over.ended(outcome for outcome in outcomes if type(outcome.result) is Committed)
        return events

    def take_startable(self) -> list[Claimed]:
        """Return the claimed jobs that had no place of their type's limit, and have one now."""
        if not self.throttle.has_types or not self.throttle.held:
            return []
        self._count_types()
        return self._keys.want(self.throttle.take_startable(self.slots))

    def cancelled(self, claims: Iterable[tuple[int, str]]) -> list[Event]:
        """Record which claims were cancelled, by their tokens and ids; return the events."""
        for token, id_ in claims:
            claimed = self._leases.find(token, id_)
            if claimed is not None:
                self._cancels.told(claimed, self._outcome_of(claimed))
                self._cancel([claimed])
        return self._cancels.take_events()

    def refused(self) -> list[Event]:
        """Return what to tell after `reject`: of jobs that are gone, for an unknown reason."""
        return self._cancels.take_events()

    @property
    def to_interrupt(self) -> Collection[Claimed]:
        """The cancelled jobs whose handlers still run."""
        return self._cancels.still_running(self._leases.lost) if self._cancels.running else ()

    def handlers_given_up(self, claims: Collection[Claimed]) -> None:
        """Record that handlers of cancelled jobs were given up, without an outcome."""
        self._leases.forget(claims)
        self._leave_flight(claims)
        self._cancels.abandon(claims)

    @property
    def lost(self) -> Collection[Claimed]:
        """The jobs that other workers may have, but whose handlers still run."""
        return self._leases.lost

    @property
    def uses_keys(self) -> bool:
        """Whether some job has had a key."""
        return self._keys.are_used

    @property
    def keeps_results(self) -> bool:
        """Whether some job had a result to keep."""
        return self._settling.keeps_results

    @property
    def places(self) -> Mapping[str, int]:
        """How many jobs of a key run at once here; one of those that are not in it."""
        return self._keys.places

    @property
    def held_until(self) -> float:
        """When the first of its leases ends."""
        return self._leases.held_until

    def give_up(self, claims: Iterable[Claimed]) -> None:
        """End the sessions of handlers whose jobs have failed before they end."""
        self._doomed += [c for c in claims if c.job.type in self._in_transactions]

    def sever(self, claimed: Claimed) -> None:
        """Record that the connection of a job's transaction was lost; its session may go on.

        The session is ended, with its locks, once the job is settled, because it cannot commit any
        more then. Before that its commit may wait for a standby: to end the session would make the
        commit visible without the standby.
        """
        self._severed.add(claimed)

    def withdrawn(self, claimed: Iterable[Claimed]) -> None:
        """Record that jobs were taken back before they started: release them."""
        if not self._stopping:
            self.throttle.refund(claimed := [*claimed])
        self._give_back([*claimed, *self._keys.wanting, *self.throttle.give_back()])
        self._keys.wanting.clear()
        self._keys.gives_back = False
        self.throttle.withdrawn()

    def _give_back(self, claimed: Iterable[Claimed]) -> None:
        pending, finished = self._settling.pending, len(self._settling.pending)
        self.finish([Outcome(each, Release(), None) for each in claimed])
        # They go first: nothing is claimed before they are released.
        pending.rotate(len(pending) - finished)

    def wake(self, notice: Notice) -> None:
        """Record a notification: jobs were enqueued, or the notify lock was released."""
        self._lookout.wake(notice)
        if notice.later:
            self.throttle.look()

    @property
    def subscription(self) -> Subscription:
        """The notifications that the worker needs."""
        return self._lookout.notify_lock.subscription

    @property
    def rarity(self) -> float:
        """How many times as long as those of others its pauses may be: more than 1 for a spare."""
        return 1.0 if self.unsettled else self._lookout.notify_lock.rarity

    def shutdown(self) -> None:
        """Stop claiming, release jobs that have not started, finish the others, stop."""
        self._stopping = True

    def abandon(self) -> None:
        """Stop without waiting for handlers; their jobs are left to their leases.

        Each gets its attempt back, because the end of a grace period is not its fault.
        """
        if not self._abandoned:
            lost = self._leases.lost
            self._leaving = [claimed for claimed in self.running() if claimed not in lost]
        self._stopping = self._abandoned = True

    # -- the next step ----------------------------------------------------------------

    def step(self, now: float) -> Step:
        """Return the next step; an Exchange must be answered before the next call."""
        if self._stopping and not self._withdrew:
            self._withdrew = True
            return Withdraw()
        if self._stopping and (self._keys.wanting or self._locked.wanting):
            self._want_again(self._locked.release_wanting())
            self.withdrawn([])
        if now >= self.pace.stale_at:
            self.pace.slow_down(now)
            return Withdraw()
        if self._keys.gives_back or self.throttle.gives_back:
            return Withdraw()
        done = self._stopping and self._is_done
        if done and not self._must_give_back:
            return Stop(self.pace.running)
        if now < self._not_before:
            return Sleep(self._not_before)

        exchange = Exchange(holds_notify_lock=self._lookout.notify_lock.is_held, kept=self._kept)
        if self._doomed:
            # Alone: if the server refuses it, it must not refuse settlements.
            exchange.end, self._doomed = self._doomed, []
        elif now >= self._locked.probe_at:
            self._locked.add_probe(exchange)
        elif now >= self._settling.retry_at:
            self._settling.add_refused(exchange, now)
        else:
            if self.throttle.has_types:
                self._count_types()
                if not self._careful:
                    self._add_claim_of_type(exchange, now)
            self._add_work(exchange, now)
            if self._careful and not exchange and self.throttle.has_types:
                self._add_claim_of_type(exchange, now)
            if self._stopping:
                exchange.calls = done and self._lookout.notify_lock.is_held
                exchange.notify_lock = "release" if exchange.calls else None
            elif not (self._careful and exchange):
                room = 0 if exchange or self._careful else self._worthwhile_room()
                waits = self.throttle.waits_for_ration(now)
                room = min(room, self.throttle.most(now))
                self._claims.add_notify_lock(exchange, room, now, waits=waits)
            if self.throttle.is_used:
                self.throttle.spend(exchange, now)
                if not (self._careful and exchange):
                    self._add_takes(exchange, now, done=done)
        return self._send(exchange, now) if exchange else Sleep(self._wake_at(now))

    def at_once(self, notice: Notice, now: float) -> Exchange | None:
        """Return the claim that answers a notification of an idle worker; None if it is not idle.

        It is the exchange that `step` would return after `wake`. The worker has slept since the
        last step, for less time than that allowed, and has reported nothing else.
        """
        lookout = self._lookout
        is_ready = notice.is_usual and lookout.notify_lock.is_held and lookout.marks.known
        is_busy = self._leases.tokens or self._careful or self._stopping
        is_bound = self.throttle.is_used or self._isolation.is_needed
        room = min(self.pace.room, self._claims.limit)
        if not is_ready or is_busy or is_bound or room <= 0:
            return None
        lookout.wake(notice)
        exchange = Exchange(holds_notify_lock=True, kept=self._kept)
        self._claims.add_from_marks(exchange, room, now)
        return self._send(exchange, now)

    @property
    def _is_done(self) -> bool:
        """Whether nothing is left to tell the server of jobs, and no handler runs to wait for."""
        held = self._settling or self._keys.free or self._locked.outcomes or self._over
        settled = not (held or self._doomed or self._leaving or self._cancels)
        return settled and (self._abandoned or not self.pace.running)

    @property
    def _must_give_back(self) -> bool:
        """Whether it has the notify lock, or rations, to give back at its end."""
        has_rations = not (self.pace.running or self.throttle.has_left)
        return self._lookout.notify_lock.is_held or has_rations

    def _add_work(self, exchange: Exchange, now: float) -> None:
        for turn in range(5):
            match (self._turn + turn) % 5:
                case 0:
                    self._settling.add_pending(exchange)
                case 1:
                    self._add_extensions(exchange, now)
                case 2:
                    self._over.add(exchange)
                case 3:
                    self._add_claim(exchange, self._worthwhile_room(), now)
                case _:
                    self._keys.add_wanting(exchange, now)
            if self._careful and exchange:
                # One kind of work at a time, each in turn, so that a failing one does not
                # stop the others.
                self._turn += turn + 1
                return

    def _count_types(self) -> None:
        """Count the jobs of types with a limit.

        Not each time while many wait for slots, and there are places for all slots: each claim
        adds its own, so the last count is not too low.
        """
        if self.pace.running > self.slots + _MANY and not self.throttle.needs_count:
            return
        sent = (sent for each in self._sent for sent in each.outcomes)
        ended = {o.claimed for o in (*self._settling.outcomes, *self._locked.outcomes, *sent)}
        held = (*self._leases.lost, *self._leases.jobs)
        self.throttle.count(claimed for claimed in held if claimed not in ended)

    def _add_claim_of_type(self, exchange: Exchange, now: float) -> None:
        throttle = self.throttle
        if not self._claims.is_held_up(now) and self._may_claim(exchange, now):
            room = throttle.share(self._worthwhile_room(), has_others=self._lookout.has_more)
            throttle.add_claim(exchange, room, now, slots=self.slots, tokens=self._tokens)

    def _may_claim(self, exchange: Exchange, now: float) -> bool:
        """Whether nothing has to be done before."""
        if self._stopping or exchange.release_jobs or self._settling.has_releases:
            return False  # jobs that did not start are due before those that it would claim
        # First settle and extend jobs that another worker may free.
        return bool(self._careful) or not self._leases.are_overdue(now)

    def flows(self, exchange: Exchange) -> bool:
        """Whether sending the next exchange ahead of this one's answer is worth it."""
        claim = exchange.claim
        return self._lookout.has_more and claim is not None and claim.limit >= self.bulky

    def ahead(self, now: float) -> Exchange | None:
        """Return the next exchange while the last one is not acknowledged.

        It is sent as soon as that one is answered, so that the server works while the answer
        is processed. None unless jobs flow and there is no other work.
        """
        exchange = Exchange(kept=self._kept)
        is_quiet = not (
            self._careful
            or self._stopping
            or self._lookout.notify_lock.is_held
            or self._lookout.notify_lock.may_call
            or self._cancels
            or self._doomed
            or self._settling.has_releases
            or self._settling.missed
            or any(sent.release_jobs for sent in self._sent)
            or self._claims.is_held_up(now)
            or (self.throttle.has_types and self.throttle.wants(now, self.slots))
            or self._leases.extend_at <= now
        )
        room = min(self._room(), self.throttle.most(now))
        if is_quiet and self._lookout.has_more and room >= self.bulky:
            self._add_claim(exchange, room, now)
            if self.flows(exchange):
                self.throttle.spend(exchange, now)
                self._settling.add_pending(exchange)
                self._keys.add_wanting(exchange, now)
                self._over.add(exchange)
                return self._send(exchange, now)
        return None

    def _send(self, exchange: Exchange, now: float) -> Exchange:
        self._keys.add_releases(exchange)
        exchange.at = now
        self._sent.append(exchange)
        return exchange

    def _add_extensions(self, exchange: Exchange, now: float) -> None:
        if self._leaving:
            ended = {o.claimed for o in [*exchange.outcomes, *self._settling.pending]}
            exchange.abandon = [c for c in self._leaving if c not in ended]
            self._leaving = []
        self._leases.add_extensions(exchange, now)
        if not (self._careful and exchange):
            self._cancels.add_question(exchange)

    def _add_claim(self, exchange: Exchange, room: int, now: float) -> None:
        if not self._may_claim(exchange, now):
            return
        if exchange.limited is not None:
            room -= exchange.limited.limit
        most = self.throttle.most(now)
        self._claims.add(exchange, min(room, most), now, most=most)

    def _add_takes(self, exchange: Exchange, now: float, *, done: bool) -> None:
        """Take rations of limits for the next claims, where they are needed."""
        if done:
            if not self.pace.running:
                self.throttle.add_leaves(exchange, now)
            return
        of_type = exchange.limited.limit if exchange.limited else 0
        asked = of_type + (exchange.claim.limit if exchange.claim else 0)
        room = self._worthwhile_room(asked)
        wants = not self._stopping and self._claims.wants(now, room)
        self.throttle.add_takes(
            exchange,
            now,
            slots=self.slots,
            room=room if wants else 0,
            has_more=self._lookout.has_more,
            # The next exchange claims jobs of a type first, and leaves the others the rest.
            free=0 if self._stopping else self._worthwhile_room(of_type),
        )

    def _room(self, asked: int = 0) -> int:
        """Return how many jobs the next exchange may claim, beside those `asked` for in this."""
        if len(self._settling.refused) + len(self._locked) >= MOST:
            return 0
        for exchange in self._sent:
            asked += exchange.claim.limit if exchange.claim else 0
            asked += exchange.limited.limit if exchange.limited else 0
        room = self.pace.room
        if self._keys.are_used:
            wanting = sum(len(exchange.acquire) for exchange in self._sent)
            room = self.pace.room_beside(len(self._keys.wanting) + wanting)
        return min(room - asked, self._claims.limit)

    def _worthwhile_room(self, asked: int = 0) -> int:
        """Return how many jobs the next exchange may claim, or 0 if it is better to wait."""
        room = self._room(asked)
        return room if room >= min(self.pace.worthwhile, self._claims.limit) else 0

    def _wake_at(self, now: float) -> float:
        times = [
            now + self._lookout.poll_interval,
            self._settling.retry_at,
            self._locked.probe_at,
            self._keys.ask_at,
            self._leases.extend_at,
        ]
        if not self._stopping:
            room = self._worthwhile_room()
            limit = self.throttle.queue
            allowed = min(room, self.throttle.most(now))
            waits = self.throttle.waits_for_ration(now)
            times += [self._claims.wake_at(now, allowed, waits=waits), self.pace.stale_at]
            if limit.is_on:
                times.append(limit.wake_at(wants_claim=self._claims.wants(now, room)))
            if self.throttle.has_types:
                free = 0 if self._claims.is_held_up(now) else room
                wants = self._claims.wants(now, room)
                times.append(self.throttle.wake_at(now, slots=self.slots, free=free, wants=wants))
        return min(times)

    # -- answers ------------------------------------------------------------------------

    def acknowledge(self, reply: Reply, now: float) -> Effects:
        """Process the answer to an exchange, which was committed."""
        exchange, effects = self._answered(), Effects()
        self.pace.exchanged(now - max(exchange.at, self._answered_at))
        self._answered_at, self._not_before = now, -inf
        self._pause.reset()
        self._careful = max(self._careful - 1, 0)
        if not self._careful:
            self._turn = 0
        self._settling.accepted(exchange)
        self._locked.accepted(exchange)
        if exchange.probes:
            self._probed(reply, effects, now)
        if spilled := self._settling.spill():
            self._lose(spilled)
        run_again = self._settling.settled(exchange, reply, effects.events)
        if self._severed:
            over = {claimed for claimed in self._severed if self._leases.batch(claimed) is None}
            self._doomed += [claimed for claimed in over if claimed.job.id in reply.settled]
            self._severed -= over
        gone = self._keys.answered(exchange, reply, effects.run, now)
        if gone:
            self.throttle.refund(gone)
            self._leave_flight(gone)
            self._leases.forget(gone)
        if exchange.acquire:
            self._give_back_too(effects)
        if exchange.extend:
            missing = self._leases.extended(exchange, reply.extended)
            self._drop([c for c in missing if c.job.type not in self._transactional])
            for each in missing:
                # A transactional job's own transaction notices a lost lease.
                is_own = each.job.type in self._transactional
                self._cancels.gone(each, None if is_own else JobLeaseLost(each.job))
        if exchange.ask:
            self._cancel(self._cancels.answered(exchange, reply))
        self._over.answered(exchange, reply)
        self._lookout.answered(exchange, reply, run_again, now)
        self.pace.looked(now, has_more=self._lookout.has_more)
        if (exchange.follows and reply.settled) or reply.ended:
            self._lookout.wake(Notice(later=True))  # jobs were made due, after the claim
        claimed = self._claims.answered(exchange, reply, now)
        of_type = self._claims.of_type(exchange, reply)
        self.throttle.answered(exchange, reply, claimed, now)
        self.slots = self._slots
        if of_type:
            self._hold(of_type, exchange, now)
            self.throttle.hold(of_type)
            self._count_types()
            effects.run += self._keys.want(self.throttle.take_startable(self.slots))
        if claimed:
            self._hold(claimed, exchange, now)
            effects.run += self._keys.want(self.throttle.admit(claimed, exchange))
        if claimed or of_type:
            self._over.claimed(reply)
            if self.throttle.is_used:
                self.throttle.forget(self._leases.tokens)
        effects.events += self._cancels.take_events()
        is_busy = self.pace.running or self._settling.is_busy or self._sent or self._cancels
        is_busy = is_busy or (self.throttle.has_types and self.throttle.has_waiting)
        if not (self._is_idle or is_busy or self._isolation.is_needed) and self._lookout.waits(now):
            self._is_idle = True
            effects.events.append(QueueIsEmpty(self._queue))
        return effects

    def _hold(self, claimed: list[Claimed], exchange: Exchange, now: float) -> None:
        """Record the jobs of a claim."""
        self._is_idle = False
        self.pace.claimed(claimed, now)
        again = self._leases.claimed_before(claimed)
        if again:
            self._claimed_again(self._settling.claimed_again(again, exchange.at))
        self._leases.hold(claimed, exchange.at)

    def _give_back_too(self, effects: Effects) -> None:
        """Release jobs that were granted a key while one before them is released."""
        claims = (claimed for sent in self._sent for claimed in sent.release_jobs)
        pending = (o.claimed for o in self._settling.pending if type(o.result) is Release)
        keys = {claimed.job.exclusive for claimed in (*claims, *pending)} - {None}
        if keys:
            late = [claimed for claimed in effects.run if claimed.job.exclusive in keys]
            effects.run = [claimed for claimed in effects.run if claimed.job.exclusive not in keys]
            self._give_back(late)

    def _probed(self, reply: Reply, effects: Effects, now: float) -> None:
        unlocked = self._locked.probed(reply, now)
        self._settling.pending.extend(unlocked.outcomes)
        self._want_again(unlocked.wanting)
        self._keys.free.update(dict.fromkeys(unlocked.keys))
        effects.locked = self._locked.overdue(now)

    def _lose(self, claims: list[Claimed]) -> None:
        """Drop claims that this worker has left to others."""
        self._drop(claims)
        self._cancels.lost(claims)

    def _claimed_again(self, claims: list[Claimed]) -> None:
        """Drop claims whose jobs this worker has claimed again.

        The transaction of a transactional one has put the job back, or will find it lost: so its
        handler's end tells which, and not the claim that came before it.
        """
        self._drop(claims)
        own = {c for c in claims if c.job.type in self._transactional} & self._leases.lost
        self._settling.superseded |= own
        self._cancels.lost([claimed for claimed in claims if claimed not in own])

    def _cancel(self, claims: list[Claimed]) -> None:
        """Drop claims that were cancelled; their handlers are to be interrupted."""
        self._drop([claimed for claimed in claims if self._leases.batch(claimed) is not None])
        self._cancels.running.update(self._leases.lost.intersection(claims))

    def _outcome_of(self, claimed: Claimed) -> Outcome | None:
        sent = [outcome for exchange in self._sent for outcome in exchange.outcomes]
        outcomes = [*self._settling.outcomes, *self._locked.outcomes, *sent]
        return next((outcome for outcome in outcomes if outcome.claimed == claimed), None)

    def _drop(self, claims: list[Claimed]) -> None:
        """Drop claims, with their present and later outcomes."""
        if not claims:
            return
        lost = set(claims)
        ended = {outcome.claimed for sent in self._sent for outcome in sent.outcomes} & lost
        ended |= self._settling.drop(lost) | self._locked.drop(lost)
        unstarted = self._keys.drop(lost) | self.throttle.drop(lost)
        self._leave_flight(unstarted)
        running = lost - ended - unstarted
        self._leases.lose(claims, running)
        if running:
            self.pace.hurry_back()  # those that have not started must not start now

    def _want_again(self, claimed: Sequence[Claimed]) -> None:
        self._keys.wanting += claimed
        self.pace.running += len(claimed)
        self._isolation.resumed(claimed)

    def _leave_flight(self, claimed: Collection[Claimed]) -> None:
        self.pace.running -= len(claimed)
        self._isolation.ended(claimed)

    def reject(self, now: float, *, for_lock: bool = False, for_data: bool = False) -> bool:
        """Record that the server refused the exchange: nothing of it happened.

        If it was refused for a lock, the engine asks which rows are locked. Only those are
        set apart. Returns False in that case: the observer is not told.
        """
        exchange = self._answered()
        while self._sent:
            self._take_back(self._sent.pop())
        if exchange.probes:
            self._locked.probe_rejected(now)
        elif for_lock and self._locked.add(exchange, now):
            self._leave_flight(exchange.acquire)
            self._lookout.take_back(exchange)
            self.throttle.take_back(exchange, is_refused=True)
            self._careful = _CAREFUL
            return False
        self._keys.rejected(exchange)
        self._lookout.rejected(exchange, now)
        self._claims.rejected(exchange, now)
        self._settling.rejected(exchange, now, for_data=for_data)
        self.throttle.take_back(exchange, is_refused=True)
        if exchange.ask and self._careful:
            self._cancels.refused(exchange)  # it was refused alone
        if not self._careful:  # refused again, they are left to their leases
            self._leaving += exchange.abandon
        self._careful = _CAREFUL
        if len(exchange.outcomes) != 1:
            self._rest(now)
        return True

    def disconnect(self, now: float) -> None:
        """Record that the connection is gone; a sent exchange may have happened or not."""
        while self._sent:
            exchange = self._sent.pop()
            self._leases.unsure.update(outcome.claimed for outcome in exchange.outcomes)
            self._claims.answer_lost(exchange, now)
            self._take_back(exchange)
        self._lookout.notify_lock.lose()
        self._lookout.look()
        self._rest(now)

    def reconnect(self) -> None:
        """Record that there is a connection again: sweep."""
        self._not_before = -inf
        self._lookout.marks.sweep_at = -inf

    def _answered(self) -> Exchange:
        if not self._sent:
            raise RuntimeError("no exchange was sent")
        return self._sent.popleft()

    def _take_back(self, exchange: Exchange) -> None:
        self._doomed += exchange.end
        self._leaving += exchange.abandon
        self.throttle.take_back(exchange, is_refused=False)
        for part in (self._locked, self._keys, self._settling, self._lookout):
            part.take_back(exchange)

    def _rest(self, now: float) -> None:
        self._not_before = now + self._pause.seconds
        self._pause.grow()
