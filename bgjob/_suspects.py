"""When a worker takes jobs whose last worker died with them in flight.

One of them may have killed it, so each starts alone: a worker that knows of a
suspect claims nothing else, waits until its handlers have ended, and claims the
one. While that proves itself nothing else is claimed, so that a killer dies
alone and it alone runs out of attempts.

Neither wait is longer than the proof: a second after the first death and twice
as long after each further one, since most killers kill at once, and a slow job
must not keep a hundred others waiting, of which most are innocent. A killer
that takes longer finds itself alone a few deaths later.
"""

from math import inf

_PROOF = 1.0
"""Seconds, after one death."""

_DOUBLINGS = 12
"""Over an hour: longer than that nobody is kept waiting."""


def proof(deaths: int) -> float:
    """Give the seconds for which a suspect has the worker for itself."""
    return float(_PROOF * 2 ** min(max(deaths - 1, 0), _DOUBLINGS))


class Suspects:
    """Those of one queue, as this worker knows of them."""

    def __init__(self) -> None:
        self._deaths = 0  # of the next one; 0: none is known
        self._claim_at = inf  # when the next one is claimed even if handlers still run
        self._proved_at = -inf  # when the last one that was claimed has proved itself

    def hold_up(self, now: float) -> bool:
        """Whether nothing else may be claimed."""
        return self._deaths > 0 or now < self._proved_at

    def are_wanted(self, now: float, *, running: int) -> bool:
        """Whether it is time to claim one."""
        return self._deaths > 0 and (not running or now >= self._claim_at)

    def wake_at(self, *, running: int) -> float:
        """Give the time at which either may change by itself."""
        if self._deaths:
            return self._claim_at if running else -inf
        return self._proved_at

    def surveyed(self, deaths: int | None, now: float) -> None:
        """Learn of the first suspect, or that there is none."""
        if deaths is None:
            self._deaths, self._claim_at = 0, inf
        elif not self._deaths:
            self._deaths = deaths
            self._claim_at = max(now + proof(deaths), self._proved_at)

    def claimed(self, deaths: int, now: float) -> None:
        """Learn that one was claimed; there may be more of the same worker."""
        self._deaths = deaths
        self._claim_at = self._proved_at = now + proof(deaths)

    def ended(self) -> None:
        """Learn that no handler runs any more."""
        self._proved_at = -inf
