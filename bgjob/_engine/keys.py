"""The exclusive keys of claimed jobs: which to ask for, and which to release."""

from collections import deque
from math import inf

from bgjob._engine.leases import Leases
from bgjob._engine.outcome import Outcome
from bgjob._engine.pause import FIRST, Pause
from bgjob._engine.protocol import MOST, Exchange
from bgjob._engine.reply import Reply
from bgjob._handlers.route import NeedsKey
from bgjob._sql.settlements import Claimed

_MOMENT = 0.002
"""Seconds before the worker asks again for a key whose row is locked; doubles."""


class Keys:
    """The jobs that need a key, and the keys to release.

    A job that needs a key is in `wanting` or in a sent exchange until the server grants it, and
    is not handed out before. A key in `free` is held by no job of this worker.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self.wanting: deque[Claimed] = deque()
        self.free: dict[str, None] = {}  # in order
        self.are_used = False
        """Whether some job has had a key."""
        self._limit = MOST // 2
        self._ask_at = -inf
        self._pause = Pause(FIRST, first=_MOMENT)

    @property
    def ask_at(self) -> float:
        """When to ask for them again."""
        return self._ask_at if self.wanting else inf

    def want(self, claimed: list[Claimed]) -> list[Claimed]:
        """Take those of the claimed jobs that need a key; return the others."""
        keyed = [c for c in claimed if c.job.exclusive is not None]
        if not keyed:
            return claimed
        self.are_used = True
        self.wanting.extend(keyed)
        return [c for c in claimed if c.job.exclusive is None]

    def wants(self, outcome: Outcome) -> bool:
        """Take a job whose handler named a key for it; False if it ended, or is lost."""
        if not isinstance(outcome.result, NeedsKey):
            return False
        job, token, is_charged = outcome.claimed
        claimed = Claimed(job._replace(exclusive=outcome.result.key), token, is_charged)
        if not self._leases.replace(claimed):
            return False
        self.want([claimed])
        return True

    def add_releases(self, exchange: Exchange) -> None:
        """Release the keys of the jobs that an exchange settles."""
        if self.are_used:
            keys = (outcome.claimed.job.exclusive for outcome in exchange.outcomes)
            exchange.release += [key for key in keys if key is not None]

    def add_wanting(self, exchange: Exchange, now: float) -> None:
        """Release free keys, and ask for others."""
        if self.free:
            exchange.freed = [*self.free][: self._limit]
            exchange.release += exchange.freed
            for key in exchange.freed:
                del self.free[key]
        if now >= self.ask_at:
            count = min(len(self.wanting), self._limit)
            exchange.acquire = [self.wanting.popleft() for _ in range(count)]

    def answered(
        self, exchange: Exchange, reply: Reply, run: list[Claimed], now: float
    ) -> list[Claimed]:
        """Add the jobs that were granted their keys to `run`; return those that are not held.

        Those wait in the table, or were lost meanwhile. Jobs whose keys are locked ask again.
        """
        gone: list[Claimed] = []
        locked: list[Claimed] = []
        for claimed in exchange.acquire:
            has_key = reply.acquired.get((claimed.job.id, claimed.token), False)
            if has_key is False or self._leases.batch(claimed) is None:
                gone.append(claimed)
            else:
                (run if has_key else locked).append(claimed)
        if exchange.acquire:
            self.wanting += locked
            self._ask_at = now + self._pause.seconds if locked else -inf
            if locked:
                self._pause.grow()
            else:
                self._pause.reset()
        if reply.blocked.keys:
            self.free.update(dict.fromkeys(reply.blocked.keys))
        if exchange.acquire or exchange.release:
            self._limit = min(2 * self._limit, MOST // 2)
        return gone

    def rejected(self, exchange: Exchange) -> None:
        """Record that the server refused an exchange: a key that is refused ends up alone."""
        wanting, free = exchange.acquire, exchange.freed
        if wanting or free:
            self._limit = max(max(len(wanting), len(free)) // 2, 1)
            self.wanting += wanting
            self.free.update(dict.fromkeys(free))

    def take_back(self, exchange: Exchange) -> None:
        """Record that an exchange was not answered."""
        self.wanting.extendleft(reversed(exchange.acquire))
        self.free.update(dict.fromkeys(exchange.freed))

    def drop(self, lost: set[Claimed]) -> set[Claimed]:
        """Drop lost jobs; return these."""
        dropped = lost.intersection(self.wanting)
        if dropped:
            self.wanting = deque(c for c in self.wanting if c not in dropped)
        return dropped
