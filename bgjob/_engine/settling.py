"""Which outcomes go into the next exchange, and what its answer says about them."""

from collections import deque
from collections.abc import Collection, Sequence
from math import inf
from typing import cast

from bgjob._engine.cancels import Cancels
from bgjob._engine.leases import Batch, Leases
from bgjob._engine.outcome import (
    Committed,
    CommitUnknown,
    Event,
    Fenced,
    Outcome,
    Release,
    Unsettled,
)
from bgjob._engine.pause import Pause
from bgjob._engine.protocol import MOST, Exchange
from bgjob._engine.reply import Reply
from bgjob._sql.settlements import Claimed
from bgjob.event import JobLeaseLost
from bgjob.result import Complete, MoveToDlq, Result

_HEAVIEST = 8_000_000
"""Bytes of the results in an exchange from which on further ones come with the next."""


class Settling:
    """The outcomes that are not settled.

    An outcome is in `pending`, in `missed`, in `refused` or in a sent exchange, until the server
    has answered its settlement or its job is lost. A job that was replaced while it ran is passed
    over by the first settlement, and settled by a second one, in an exchange that has no other.

    A refused exchange is tried again in halves, and after the others, until the outcome that the
    server refuses is alone. That one is kept in `refused`, and tried alone, at growing intervals:
    it delays no other. When one of these is accepted, all are pending again.
    """

    def __init__(
        self,
        leases: Leases,
        cancels: Cancels,
        pause: Pause,
        transactional: Collection[str] = (),
    ) -> None:
        self._leases = leases
        self._cancels = cancels
        self._transactional = transactional
        self._pause = pause
        self.pending: deque[Unsettled] = deque()  # the oldest first
        self.missed: deque[Unsettled] = deque()
        """Their settlement found no row to settle: they were replaced, or are lost."""
        self.refused: deque[Unsettled] = deque()
        self.retry_at = inf
        """When the first refused one is tried again."""
        self.superseded: set[Claimed] = set()
        """Transactional jobs in handlers, which the worker has claimed again meanwhile."""
        self.keeps_results = False
        """Whether some of the settled jobs had results to keep."""
        self._limit = MOST
        self._spilled = 0  # how many of the oldest refused ones to leave to their leases

    def __len__(self) -> int:
        return len(self.pending) + len(self.missed) + len(self.refused)

    @property
    def outcomes(self) -> list[Unsettled]:
        """Those in none of the exchanges."""
        return [*self.pending, *self.missed, *self.refused]

    @property
    def is_busy(self) -> bool:
        """Whether the next exchange settles outcomes."""
        return bool(self.pending or self.missed)

    @property
    def has_releases(self) -> bool:
        """Whether jobs that did not start are next."""
        return bool(self.pending) and type(self.pending[0].result) is Release

    def finish(self, outcomes: Sequence[Outcome]) -> list[Event]:
        """Take outcomes; return the events of jobs that their own transactions have settled."""
        events = self._superseded(outcomes) if self.superseded else []
        outcomes = self._leases.but_lost(outcomes)
        if self._transactional:
            outcomes = self._but_settled(outcomes, events)
        # Those that named a key and were not lost wait for it.
        self.pending.extend(cast("Sequence[Unsettled]", outcomes))
        return events

    def _but_settled(self, outcomes: Sequence[Outcome], events: list[Event]) -> Sequence[Outcome]:
        """Take those that handlers' own transactions have settled; return the others."""
        settled = [o.claimed for o in outcomes if isinstance(o.result, Committed)]
        if settled:  # of a batch, all together
            self._leases.drop_all(settled)
            self.keeps_results |= any(claimed.job.keep is not None for claimed in settled)
            events += [
                o.with_result(o.result.result) for o in outcomes if isinstance(o.result, Committed)
            ]
        others: list[Outcome] = []
        for outcome in outcomes if len(settled) < len(outcomes) else ():
            if isinstance(outcome.result, Fenced):
                lost = JobLeaseLost(outcome.claimed.job, outcome.ran, outcome.waited)
                self._cancels.gone(outcome.claimed, lost)
                self._leases.drop(outcome.claimed)
            elif not isinstance(outcome.result, Committed):
                others.append(outcome)
        return others

    def _superseded(self, outcomes: Sequence[Outcome]) -> list[Event]:
        """Return the events of jobs that were claimed again before these outcomes were known."""
        events: list[Event] = []
        for outcome in outcomes:
            if outcome.claimed in self.superseded:
                if isinstance(outcome.result, Committed):
                    events.append(outcome.with_result(outcome.result.result))
                else:
                    lost = JobLeaseLost(outcome.claimed.job, outcome.ran, outcome.waited)
                    self._cancels.gone(outcome.claimed, lost)
        self.superseded.difference_update(outcome.claimed for outcome in outcomes)
        self.superseded &= self._leases.lost
        return events

    def add_pending(self, exchange: Exchange) -> None:
        """Settle as many as an exchange may, the oldest first."""
        if self.missed:
            exchange.follows = True
            for _ in range(min(self._limit, len(self.missed))):
                outcome = self.missed.popleft()
                exchange.outcomes.append(outcome)
                exchange.settle(outcome)
            return
        pending, outcomes, complete = self.pending, exchange.outcomes, exchange.complete
        for _ in range(min(self._limit, len(pending))):
            outcome = pending.popleft()
            outcomes.append(outcome)
            if type(outcome.result) is Complete and outcome.claimed.job.keep is None:
                complete.append(outcome.claimed)  # nearly all are
            else:
                exchange.settle(outcome)
                self.keeps_results |= outcome.claimed.job.keep is not None
                if exchange.weight > _HEAVIEST:
                    break

    def add_refused(self, exchange: Exchange, now: float) -> None:
        """Settle the first refused one."""
        outcome = self.refused.popleft()
        exchange.outcomes.append(outcome)
        exchange.settle(outcome)
        exchange.again = True
        self.retry_at = now + self._pause.seconds if self.refused else inf

    def accepted(self, exchange: Exchange) -> None:
        """Record that the server did not refuse an exchange: the next may be larger."""
        if exchange.outcomes:
            self._limit = min(2 * self._limit, MOST)
        if exchange.again:  # the others may be accepted too
            self.pending.extend(self.refused)
            self.refused.clear()
            self.retry_at, self._limit = inf, 1
            self._pause.reset()

    def rejected(self, exchange: Exchange, now: float, *, for_data: bool) -> None:
        """Record that the server refused an exchange.

        Outcomes that are refused for their data, for example by a user's foreign key, may be
        refused forever: only so many are kept, and the oldest are left to their leases. Outcomes
        refused for other reasons are all kept; too many of them stop the claims.
        """
        if len(exchange.outcomes) > 1:
            self._limit = len(exchange.outcomes) // 2
            self.pending += exchange.outcomes
        elif exchange.outcomes:
            self.refused += exchange.outcomes
            if for_data and len(self.refused) > MOST // 2:
                self._spilled += 1
            if exchange.again:
                self._pause.grow()
            if exchange.again or self.retry_at == inf:
                self.retry_at = now + self._pause.seconds

    def take_back(self, exchange: Exchange) -> None:
        """Record that an exchange was not answered: its outcomes come first again."""
        self.pending.extendleft(reversed(exchange.outcomes))

    def spill(self) -> list[Claimed]:
        """Return the jobs of the oldest refused outcomes, where too many were kept."""
        if not self._spilled:
            return []
        spilled, self._spilled = self._spilled, 0
        return [outcome.claimed for outcome in [*self.refused][:spilled]]

    def drop(self, lost: set[Claimed]) -> set[Claimed]:
        """Drop the outcomes of lost jobs; return these jobs."""
        dropped = {outcome.claimed for outcome in self.outcomes} & lost
        self.pending = deque(o for o in self.pending if o.claimed not in lost)
        self.missed = deque(o for o in self.missed if o.claimed not in lost)
        self.refused = deque(o for o in self.refused if o.claimed not in lost)
        if not self.refused:
            self.retry_at = inf
        return dropped

    def settled(self, exchange: Exchange, reply: Reply, events: list[Event]) -> list[Unsettled]:
        """Record the answer to an exchange; return the outcomes of jobs that run again.

        `events` gets those that the observer is told.
        """
        if not exchange.outcomes:
            return []
        leases, settled = self._leases, reply.settled
        # Of the outcomes those are told whose results are a handler's.
        told = cast("list[Event | Unsettled]", events)
        run_again: list[Unsettled] = []
        completes_all = len(exchange.complete) == len(exchange.outcomes) == len(settled)
        if completes_all and not leases.unsure:  # nearly always: in one pass
            gone = leases.drop_all(exchange.complete)
            outcomes = exchange.outcomes
            told += [o for o in outcomes if o.claimed not in gone] if gone else outcomes
            return run_again
        for outcome in exchange.outcomes:
            claimed, result = outcome.claimed, outcome.result
            if claimed.job.id not in settled and self._misses(exchange, outcome):
                continue
            batch = leases.drop(claimed)
            if batch is None:
                continue  # lost meanwhile
            if type(result) is Complete and not leases.unsure and claimed.job.id in settled:
                told.append(outcome)
                continue
            last: Outcome[Result | Release] | None
            if claimed.job.id not in settled:
                last = self._gone(outcome, batch, exchange.at)
            else:
                leases.unsure.discard(claimed)
                last = outcome.with_result(
                    result.otherwise if isinstance(result, CommitUnknown) else result
                )
                if not isinstance(last.result, Release):
                    told.append(last)
            if last is not None and not isinstance(last.result, Complete | MoveToDlq):
                run_again.append(last)
        return run_again

    def _gone(
        self, outcome: Unsettled, batch: Batch, at: float
    ) -> Outcome[Result | Release] | None:
        """Record that a job is not held; return its outcome if that was settled before.

        No other worker can have had it within the lease: the settlement whose answer was lost had
        been committed. With two lost answers that is unknown.
        """
        claimed, result = outcome.claimed, outcome.result
        unsure = claimed in self._leases.unsure
        self._leases.unsure.discard(claimed)
        if unsure == isinstance(result, CommitUnknown) or at >= batch.expires:
            self._cancels.gone(claimed, JobLeaseLost(claimed.job, outcome.ran, outcome.waited))
            return None
        last = outcome.with_result(result.result if isinstance(result, CommitUnknown) else result)
        # Or it had not been committed, and then a cancel came.
        is_told = not isinstance(last.result, Release)
        self._cancels.gone(claimed, cast("Event", last) if is_told else None)
        return last

    def claimed_again(self, claims: Sequence[Claimed], at: float) -> list[Claimed]:
        """Record that jobs were claimed again; return those of them that no outcome concerns."""
        missed = {o.claimed: o for o in self.missed if o.claimed in claims} if claims else {}
        self.missed = deque(o for o in self.missed if o.claimed not in missed)
        for claimed, outcome in missed.items():
            batch = self._leases.drop(claimed)
            if batch is not None:
                self._gone(outcome, batch, at)
        return [claimed for claimed in claims if claimed not in missed]

    def _misses(self, exchange: Exchange, outcome: Unsettled) -> bool:
        """Whether an outcome that was not settled is settled once more: it may be replaced."""
        is_released = type(outcome.result) is Release
        if exchange.follows or is_released or self._leases.batch(outcome.claimed) is None:
            return False
        self.missed.append(outcome)
        return True
