"""Which groups may be over, so that the jobs that wait for them may be due."""

from collections.abc import Iterable
from operator import itemgetter

from bgjob._engine.outcome import Committed, CommitUnknown, Outcome
from bgjob._engine.protocol import Exchange
from bgjob._engine.reply import Reply
from bgjob.job import Job
from bgjob.result import Complete, MoveToDlq

_group = itemgetter(Job._fields.index("group"))

_MOST = 1000
"""The most groups in one exchange."""


class Over:
    """Groups of which a job has ended, until the next exchange asks whether others are live.

    That is a later transaction than the one that settled the job: of two workers that settle the
    last two, the one that asks last sees neither. A question whose exchange is refused or lost is
    dropped, because the next sweep of the queue in which `then` waits finds the group as well.
    """

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}
        self.are_used = False
        """Whether a claimed job had a group."""

    def __bool__(self) -> bool:
        """Whether there is something to ask."""
        return bool(self._ids)

    def claimed(self, reply: Reply) -> None:
        """Record claimed jobs."""
        if not self.are_used:
            jobs = reply.claimed or reply.swept.jobs or reply.group.jobs
            # Of jobs without a group this takes a quarter of the time of a loop.
            self.are_used = any(map(_group, jobs)) or any(map(_group, reply.of_type))

    def ended(self, outcomes: Iterable[Outcome]) -> None:
        """Record which jobs were settled."""
        for outcome in outcomes:
            job, result = outcome.claimed.job, outcome.result
            if isinstance(result, Committed | CommitUnknown):
                result = result.result
            if job.group not in (None, job.id) and isinstance(result, Complete | MoveToDlq):
                self._ids[job.group] = None

    def answered(self, exchange: Exchange, reply: Reply) -> None:
        """Record the answer to an exchange."""
        if self.are_used:
            self.ended(exchange.outcomes)
        for line in reply.lines:
            if line.over:
                self._ids.update(dict.fromkeys(line.over))

    def add(self, exchange: Exchange) -> None:
        """Ask about the groups."""
        if self._ids:
            exchange.groups = [*self._ids][:_MOST]
            for group in exchange.groups:
                del self._ids[group]
