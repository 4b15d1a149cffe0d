"""Which claim, sweep or group of suspects goes into the next exchange."""

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from itertools import repeat
from math import inf

from bgjob._engine.isolation import Isolation
from bgjob._engine.leases import Leases
from bgjob._engine.lookout import Lookout
from bgjob._engine.pace import Pace
from bgjob._engine.protocol import MOST, Claim, ClaimGroup, Exchange, Sweep
from bgjob._engine.reply import Reply
from bgjob._sql.settlements import Claimed
from bgjob.job import Job

_make_claimed = partial(tuple.__new__, Claimed)  # half the time of Claimed(...)


def _claimed(jobs: Iterable[Job], token: int) -> list[Claimed]:
    return list(map(_make_claimed, zip(jobs, repeat(token), repeat(True))))


class Claims:
    """Decides what the worker asks for.

    An exchange claims at most as many jobs as there is room for. No sweep frees a job that the
    worker holds. Each frees the jobs of claims whose answers were lost, until a lease has passed:
    no handler has them. While suspects hold up other jobs, only groups are claimed.
    """

    def __init__(
        self,
        pace: Pace,
        leases: Leases,
        lookout: Lookout,
        isolation: Isolation,
        sent: Collection[Exchange],
        tokens: Iterator[int],
    ) -> None:
        self._pace = pace
        self._leases = leases
        self._sent = sent  # and not answered
        self._lookout = lookout
        self._isolation = isolation
        self._tokens = tokens
        self.limit = MOST // 2
        """The most jobs in one claim."""
        # Claims whose answers were lost, by token, and when their leases end. The server may commit
        # or show them later: it may wait for a synchronous standby.
        self._unanswered: dict[int, float] = {}

    def wants(self, now: float, room: int) -> bool:
        """Whether it would claim, were there no limit."""
        if self.is_held_up(now):
            pace = self._pace
            return pace.has_free_slot and self._isolation.wants_group(now, running=pace.running)
        return room > 0 and self._lookout.wants_claim(now)

    def add(self, exchange: Exchange, room: int, now: float, *, most: int) -> None:
        """Claim up to `room` jobs, or sweep, if it is time to; or up to `most` suspects."""
        pace, lookout = self._pace, self._lookout
        held_up = self.is_held_up(now)
        is_groups_turn = (
            held_up
            and pace.has_free_slot
            and most > 0
            and self._isolation.wants_group(now, running=pace.running)
        )
        # The jobs of a group whose answer was lost are freed before the next group.
        claims = room > 0 and (not held_up or (is_groups_turn and not self._unanswered))
        if lookout.wants_sweep(now, claims=claims):
            self._add_sweep(exchange, 0, now)
        elif is_groups_turn:
            free = min(pace.free_slots, self.limit, most)
            charge = not self._isolation.has_group
            exchange.claim = ClaimGroup(free, next(self._tokens), charge)
        elif claims and lookout.wants_claim(now):
            if lookout.prefers_sweep(now):
                self._add_sweep(exchange, room, now)
            else:
                self.add_from_marks(exchange, room, now)

    def add_from_marks(self, exchange: Exchange, room: int, now: float) -> None:
        """Claim up to `room` jobs from the marks on."""
        lookout = self._lookout
        marks, (is_told, is_vague) = lookout.marks.start(now), lookout.begin_claim(now)
        exchange.claim = Claim(room, next(self._tokens), marks, is_told, is_vague)
        exchange.watch = lookout.watch

    def _add_sweep(self, exchange: Exchange, limit: int, now: float) -> None:
        window = self._lookout.marks.window()
        if window is not None:
            limit = 0
        self._unanswered = {token: end for token, end in self._unanswered.items() if now < end}
        is_told, _ = self._lookout.begin_claim(now) if limit else (False, False)
        sent = [sent.claim.token for sent in self._sent if sent.claim]
        sent += [sent.limited.token for sent in self._sent if sent.limited]
        exchange.claim = Sweep(
            limit,
            next(self._tokens),
            self._lookout.blocked_after,
            (*self._leases.tokens, *sent),
            window,
            (*self._unanswered,),
            is_told,
        )
        if limit:
            exchange.watch = self._lookout.watch

    def add_notify_lock(self, exchange: Exchange, room: int, now: float, *, waits: bool) -> None:
        """Take or release the notify lock, if it is time; with a sweep, or alone.

        While the worker `waits` for a limit, it can do nothing about a notification.
        """
        lock, is_alone = self._lookout.notify_lock, not exchange
        is_idle = isinstance(exchange.claim, Sweep) and not self._lookout.has_more
        if not (is_alone or is_idle or lock.may_leave):
            return
        free, has_more = self.has_room_for_others(now) and not waits, self._lookout.has_more
        wish = lock.wish(now, free=free, has_more=has_more, polls=is_idle)
        exchange.notify_lock = wish if wish != "take" or is_alone or is_idle else None
        exchange.calls = has_more and (wish == "release" or (wish == "leave" and lock.may_call))
        if exchange.notify_lock == "release":
            exchange.watch = "claims"  # from here on enqueues do not notify
        if exchange.notify_lock == "take":
            exchange.is_deputy, exchange.relieve = lock.is_deputy, lock.relieves
            exchange.asks_post, exchange.seat = not lock.has_post, lock.seat
            # The sweep that has to follow is part of the exchange. Its survey shows even the
            # jobs that become due between the transaction's begin and the lock.
            early_sweep_at = self._lookout.marks.early_sweep_at
            if is_alone and lock.polls and room > 0 and now >= early_sweep_at:
                self._add_sweep(exchange, room, now)

    # -- suspects and others -------------------------------------------------------------

    def has_room_for_others(self, now: float) -> bool:
        """Whether a job that is not a suspect would start now."""
        return self._pace.has_free_slot and not self.is_held_up(now)

    def is_held_up(self, now: float) -> bool:
        """Whether only a group of suspects may be claimed."""
        isolation = self._isolation
        if not isolation.is_needed:
            return False
        was_held_up = isolation.has_begun
        is_held_up = isolation.holds_up(now, is_free=self._pace.has_free_slot)
        if was_held_up and not is_held_up:
            self._lookout.look()
        return is_held_up

    def wake_at(self, now: float, room: int, *, waits: bool) -> float:
        """Return when to claim, sweep, or take or release the notify lock without an event."""
        claims = not self.is_held_up(now) and room > 0
        free = self.has_room_for_others(now) and not waits
        return min(
            self._isolation.wake_at(now) if self._isolation.is_needed else inf,
            self._lookout.wake_at(now, claims=claims, free=free),
        )

    # -- answers ---------------------------------------------------------------------------

    def answered(self, exchange: Exchange, reply: Reply, now: float) -> list[Claimed]:
        """Record the answer to an exchange; return the jobs that it has claimed."""
        claim, isolation = exchange.claim, self._isolation
        if claim is not None and claim.limit:
            self.limit = min(self.limit + self.limit // 8 + 1, MOST // 2)
        if claim is not None and claim.looks:
            isolation.others_looked(now)
        match claim:
            case Claim(token=token):
                return _claimed(reply.claimed, token)
            case Sweep(token=token):
                isolation.surveyed(any(line.has_suspects for line in reply.lines))
                return _claimed(reply.swept.jobs, token)
            case ClaimGroup(token=token, charge=charge):
                jobs, deaths = reply.group
                is_charged = charge and len(jobs) + reply.unread == 1
                isolation.claimed(token, len(jobs), deaths=deaths, is_charged=is_charged, now=now)
                return [Claimed(job, token, is_charged) for job in jobs]
            case None:
                return []

    def of_type(self, exchange: Exchange, reply: Reply) -> list[Claimed]:
        """Return the claimed jobs of a type with a limit."""
        return _claimed(reply.of_type, exchange.limited.token) if exchange.limited else []

    def rejected(self, exchange: Exchange, now: float) -> None:
        """Record that the server refused an exchange."""
        claim = exchange.claim
        if claim is not None and claim.looks:
            self._isolation.others_looked(now)  # or the suspects would never get their turn
        if claim is not None and claim.limit and not exchange.outcomes:
            # The claim may have been too large for the server or a slow network.
            self.limit = max(claim.limit // 2, 1)

    def answer_lost(self, exchange: Exchange, now: float) -> None:
        """Record that the answer to an exchange was lost."""
        claim = exchange.claim
        if exchange.limited is not None:
            self._unanswered[exchange.limited.token] = exchange.at + self._leases.seconds
        if claim is not None and claim.limit:
            self._unanswered[claim.token] = exchange.at + self._leases.seconds
            self._lookout.marks.start_again()
            self._isolation.others_looked(now)
