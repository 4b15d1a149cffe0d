"""The rows and keys that other sessions may have locked."""

from collections.abc import Iterable
from math import inf
from typing import NamedTuple

from bgjob._engine.outcome import Unsettled
from bgjob._engine.pause import Pause
from bgjob._engine.protocol import Exchange
from bgjob._engine.reply import Reply
from bgjob._sql.settlements import Claimed

_LONG = 5.0
"""Seconds for which rows are locked before the observer is told."""


class Unlocked(NamedTuple):
    """The rows that no other session has locked."""

    outcomes: list[Unsettled]
    wanting: list[Claimed]
    keys: list[str]


class Locked:
    """The jobs and keys of exchanges that were refused for a lock.

    They use no slot and delay no other job. A probe asks which of their rows are locked, at
    growing intervals; the others continue. If none is, the lock was on another row, such as one
    that a trigger writes: then no job is set apart until a settlement was accepted.
    """

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self.outcomes: list[Unsettled] = []
        self.wanting: list[Claimed] = []
        self._keys: dict[str, None] = {}  # to release
        self.probe_at = inf
        """When to ask again which of them are locked."""
        self._since = inf
        self._found_none = False

    def __len__(self) -> int:
        return len(self.outcomes) + len(self.wanting)

    def add(self, exchange: Exchange, now: float) -> bool:
        """Set apart what a refused exchange locks.

        False, without effect, if it locks nothing, or the last probe found nothing locked.
        """
        if self._found_none or not (exchange.outcomes or exchange.acquire or exchange.freed):
            return False
        self.outcomes += exchange.outcomes
        self.wanting += exchange.acquire
        self._keys.update(dict.fromkeys(exchange.freed))
        self.probe_at = now
        return True

    def add_probe(self, exchange: Exchange) -> None:
        """Ask which of the rows are locked."""
        exchange.probe = [outcome.claimed for outcome in self.outcomes]
        keys = (claimed.job.exclusive for claimed in [*exchange.probe, *self.wanting])
        exchange.probe_keys = [*(key for key in keys if key is not None), *self._keys]
        self.probe_at = inf

    def accepted(self, exchange: Exchange) -> None:
        """Record that the server did not refuse an exchange."""
        if exchange.outcomes:
            self._found_none = False

    def probe_rejected(self, now: float) -> None:
        """Record that the server refused a probe."""
        self.probe_at = now + self._pause.seconds

    def take_back(self, exchange: Exchange) -> None:
        """Record that an exchange was not answered."""
        if exchange.probes:
            self.probe_at = -inf

    def probed(self, reply: Reply, now: float) -> Unlocked:
        """Record the answer to a probe; return what continues."""
        barred, barred_keys = {*reply.barred}, {*reply.barred_keys}

        def is_barred(claimed: Claimed) -> bool:
            return claimed.job.id in barred or claimed.job.exclusive in barred_keys

        outcomes, wanting, keys = self.outcomes, self.wanting, self._keys
        self.outcomes = [o for o in outcomes if is_barred(o.claimed)]
        self.wanting = [c for c in wanting if c.job.exclusive in barred_keys]
        self._keys = {key: None for key in keys if key in barred_keys}
        self._found_none = not (barred or barred_keys)
        if self._found_none:
            self._pause.reset()
            self._since = inf
        else:
            self.probe_at = now + self._pause.seconds
            self._pause.grow()
            self._since = min(self._since, now)
        return Unlocked(
            [o for o in outcomes if not is_barred(o.claimed)],
            [c for c in wanting if c.job.exclusive not in barred_keys],
            [key for key in keys if key not in barred_keys],
        )

    def overdue(self, now: float) -> list[str]:
        """Return the jobs that have waited for so long that the observer is told."""
        if now < self._since + _LONG:
            return []
        self._since = now
        return [claimed.job.id for claimed in self._claims()]

    def release_wanting(self) -> list[Claimed]:
        """Remove the jobs that need their keys."""
        wanting, self.wanting = self.wanting, []
        return wanting

    def drop(self, lost: set[Claimed]) -> set[Claimed]:
        """Drop lost jobs; return these."""
        dropped = lost.intersection(self._claims())
        self.outcomes = [o for o in self.outcomes if o.claimed not in lost]
        self.wanting = [c for c in self.wanting if c not in lost]
        if not (self or self._keys):
            self.probe_at = inf
        return dropped

    def _claims(self) -> Iterable[Claimed]:
        return [*(outcome.claimed for outcome in self.outcomes), *self.wanting]
