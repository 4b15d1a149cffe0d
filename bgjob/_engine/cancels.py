"""The attempts that a cancel has ended, told apart from those whose lease is lost."""

from collections.abc import Collection, Iterable, Sequence

from bgjob._engine.outcome import Event, Outcome
from bgjob._engine.protocol import MOST, Exchange
from bgjob._engine.reply import Reply
from bgjob._sql.settlements import Claimed
from bgjob.event import JobCancelled, JobLeaseLost


class Cancels:
    """What becomes known of jobs that this worker does not hold any more.

    A notification names the claim that a cancel has ended. Without one the worker finds a job
    gone when it extends or settles it. The server is asked once whether that was a cancel, in
    the next exchange, before the observer is told. So a worker none of whose jobs are gone asks
    nothing.
    """

    def __init__(self) -> None:
        self._doubtful: dict[Claimed, Event | None] = {}
        """To ask about, with what to tell if it was no cancel; None: nothing."""
        self._events: list[Event] = []
        self.running: set[Claimed] = set()
        """Cancelled, and in a handler that is to be interrupted."""
        self._abandoned: set[Claimed] = set()
        """Their handlers were given up: what these return later counts for nothing."""

    def __bool__(self) -> bool:
        """Whether there is anything to ask."""
        return bool(self._doubtful)

    def gone(self, claimed: Claimed, otherwise: Event | None) -> None:
        """Record that a job is not held any more; if it was not cancelled, tell `otherwise`."""
        self._doubtful[claimed] = otherwise

    def lost(self, claims: Iterable[Claimed]) -> None:
        """Record that other workers may have these jobs, for a reason that is known."""
        self._events += [JobLeaseLost(claimed.job) for claimed in claims]

    def told(self, claimed: Claimed, ended: Outcome | None) -> None:
        """Record that a notification named a job; `ended` is its outcome, if it has one."""
        self._doubtful.pop(claimed, None)
        times = (None, None) if ended is None else (ended.ran, ended.waited)
        self._events.append(JobCancelled(claimed.job, *times))

    def add_question(self, exchange: Exchange) -> None:
        """Ask which of the doubtful jobs were cancelled."""
        exchange.ask = [*self._doubtful][:MOST]

    def answered(self, exchange: Exchange, reply: Reply) -> list[Claimed]:
        """Record the answer; return the cancelled jobs."""
        cancelled = []
        for claimed in exchange.ask:
            if claimed not in self._doubtful:
                continue  # a notification has told it meanwhile
            otherwise = self._doubtful.pop(claimed)
            if (claimed.job.id, claimed.token) in reply.cancelled:
                cancelled.append(claimed)
                ran = waited = None
                if isinstance(otherwise, Outcome | JobLeaseLost):
                    ran, waited = otherwise.ran, otherwise.waited
                self._events.append(JobCancelled(claimed.job, ran, waited))
            elif otherwise is not None:
                self._events.append(otherwise)
        return cancelled

    def refused(self, exchange: Exchange) -> None:
        """Record that the server refuses the question: none of these counts as cancelled."""
        for claimed in exchange.ask:
            if (otherwise := self._doubtful.pop(claimed, None)) is not None:
                self._events.append(otherwise)

    def take_events(self) -> list[Event]:
        """Return what to tell the observer."""
        events, self._events = self._events, []
        return events

    # -- handlers that are given up --------------------------------------------------------

    def abandon(self, claims: Iterable[Claimed]) -> None:
        """Record that handlers were given up without an outcome, and may return one later."""
        self.running.difference_update(claims)
        self._abandoned.update(claims)

    def but_abandoned(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Return the outcomes but those of handlers that were given up."""
        if not self._abandoned:
            return outcomes
        late = {outcome.claimed for outcome in outcomes} & self._abandoned
        self._abandoned -= late
        return [outcome for outcome in outcomes if outcome.claimed not in late]

    def still_running(self, lost: Collection[Claimed]) -> set[Claimed]:
        """Return the cancelled jobs whose handlers have not ended: those among `lost`."""
        self.running.intersection_update(lost)
        return self.running
