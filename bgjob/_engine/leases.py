"""The leases of a worker's claims, and the jobs whose lease is lost or in doubt."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from bgjob._engine.outcome import Outcome
from bgjob._engine.protocol import Exchange
from bgjob._sql.settlements import Claimed


@dataclass(slots=True)
class Batch:
    """The lease of the jobs of one claim, which share its token."""

    expires: float
    extend_at: float
    size: int
    """How many of its jobs are held."""


class Leases:
    """The jobs that a worker holds, by id, and the leases of their claims.

    A job is held from the answer that brings it until it is settled, released or lost, and a
    batch has at least one job. Of two claims of one job the later has it, so that no statement
    names both.

    Args:
        seconds: the length of a lease. It is extended when a third of it has passed, whatever
            its jobs wait for.

    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._batches: dict[int, Batch] = {}
        self._held: dict[str, Claimed] = {}
        self.lost: set[Claimed] = set()
        """Not held: another worker may have them, but their handlers still run."""
        self.unsure: set[Claimed] = set()
        """Held, and perhaps gone: their settlement was sent, its answer was lost."""

    @property
    def tokens(self) -> Collection[int]:
        """The claims that have jobs."""
        return self._batches.keys()

    @property
    def jobs(self) -> Collection[Claimed]:
        """The jobs of all claims."""
        return self._held.values()

    def hold(self, claimed: Sequence[Claimed], sent_at: float) -> None:
        """Record the jobs of an answered claim; `claimed_before` are not held any more."""
        self._batches[claimed[0].token] = Batch(
            sent_at + self.seconds, sent_at + self.seconds / 3, len(claimed)
        )
        self._held.update({c.job.id: c for c in claimed})

    def claimed_before(self, claimed: Iterable[Claimed]) -> list[Claimed]:
        """Return the older claims of jobs that the worker has just claimed again.

        Two claims of one job must not be in one statement, which would affect either. There are
        two after the older lease has ended, after a settlement whose answer was lost, and
        whenever a job was cancelled and requeued before its worker heard of it.
        """
        held = self._held
        return [held[c.job.id] for c in claimed if c.job.id in held] if held else []

    def batch(self, claimed: Claimed) -> Batch | None:
        """Return the batch of a job that is held; None if it is gone or lost."""
        held = self._held.get(claimed.job.id)
        is_held = held is not None and held.token == claimed.token
        return self._batches[claimed.token] if is_held else None

    def find(self, token: int, id_: str) -> Claimed | None:
        """Return the job of a claim, if it is held."""
        held = self._held.get(id_)
        return held if held is not None and held.token == token else None

    def replace(self, claimed: Claimed) -> bool:
        """Record the key that a handler names for a job; False if the job is lost."""
        if self.batch(claimed) is None:
            return False
        self._held[claimed.job.id] = claimed
        return True

    def drop(self, claimed: Claimed) -> Batch | None:
        """Remove a job; return its batch, or None if it is gone already."""
        batch = self.batch(claimed)
        if batch is not None:
            del self._held[claimed.job.id]
            self._shrink(claimed.token, 1)
        return batch

    def drop_all(self, claims: Collection[Claimed]) -> set[Claimed]:
        """Remove jobs that the server has settled; return those that were gone already."""
        pop = self._held.pop
        gone = {claimed for claimed in claims if pop(claimed.job.id, None) is None}
        dropped = claims if not gone else [c for c in claims if c not in gone]
        for token, count in Counter([claimed.token for claimed in dropped]).items():
            self._shrink(token, count)
        return gone

    def _shrink(self, token: int, count: int) -> None:
        batch = self._batches[token]
        batch.size -= count
        if not batch.size:
            del self._batches[token]

    def lose(self, claims: Collection[Claimed], running: Iterable[Claimed]) -> None:
        """Remove jobs that other workers may have; `running` are in handlers, or waiting."""
        for claimed in claims:
            self.drop(claimed)
        self.unsure.difference_update(claims)
        self.lost.update(running)

    def but_lost(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Return the outcomes but those of lost jobs, whose handlers have ended."""
        if not self.lost:
            return outcomes
        lost = {outcome.claimed for outcome in outcomes} & self.lost
        self.lost -= lost
        return [outcome for outcome in outcomes if outcome.claimed not in lost]

    def forget(self, claims: Collection[Claimed]) -> None:
        """Remove jobs that no handler has, whether they are held or lost."""
        for claimed in claims:
            self.drop(claimed)
        self.lost.difference_update(claims)

    # -- extensions -----------------------------------------------------------------

    @property
    def extend_at(self) -> float:
        """When the next extension is due."""
        return min((batch.extend_at for batch in self._batches.values()), default=inf)

    @property
    def held_until(self) -> float:
        """When the first lease ends."""
        return min((batch.expires for batch in self._batches.values()), default=inf)

    def are_overdue(self, now: float) -> bool:
        """Whether other workers may free a job whose lease is not being extended."""
        batches = self._batches
        return bool(batches) and any(
            batch.expires <= now and batch.extend_at <= now for batch in batches.values()
        )

    def add_extensions(self, exchange: Exchange, now: float) -> None:
        """Extend the leases that are due, of jobs that are not settled at the same time."""
        if not self._batches:
            return
        due = {token for token, batch in self._batches.items() if batch.extend_at <= now}
        if due:
            settled = {outcome.claimed for outcome in exchange.outcomes}
            held = self._held.values()
            exchange.extend = [c for c in held if c.token in due and c not in settled]

    def extended(self, exchange: Exchange, extended: Collection[str]) -> list[Claimed]:
        """Record an extension; return the jobs that other workers may have."""
        missing = []
        for claimed in exchange.extend:
            batch = self.batch(claimed)
            if batch is None:
                continue  # its own transaction settled it meanwhile
            batch.extend_at = exchange.at + self.seconds / 3
            if claimed.job.id in extended:
                batch.expires = exchange.at + self.seconds
            elif claimed not in self.unsure:
                missing.append(claimed)
        return missing
