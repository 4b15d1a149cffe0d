"""Jobs that may have expired when they are started."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from bgjob._handlers.route import NeedsKey, Route
from bgjob._handlers.unknown import Unknown
from bgjob._words import lasting
from bgjob.errors import JobExpiredError
from bgjob.job import Job
from bgjob.result import MoveToDlq, Reschedule, Retry

Decided: TypeAlias = Route | NeedsKey | Retry | Reschedule | MoveToDlq
"""The route of a job, or the result of one that must not run (yet)."""


@dataclass(frozen=True, slots=True)
class Expiring:
    """Returned for a job that expires: whether it has expired only the server's time tells."""

    job: Job
    route: Callable[[], "Routed"]
    """Returns its route, if it has not."""

    def decide(self, now: float) -> Decided:
        """Return its route at this time of the server, in seconds since 1970."""
        expires = self.job.expires
        assert expires is not None  # noqa: S101 (the Mux checks)
        late = now - expires.timestamp()
        if late >= 0:
            return MoveToDlq(_expired(self.job, expires, late))
        return decided(self.route(), now)


Routed: TypeAlias = Decided | Unknown | Expiring
"""What a Mux says about a job."""


def decided(route: Routed, now: float) -> Decided:
    """Decide what depends on the server's time, given in seconds since 1970."""
    return route.decide(now) if isinstance(route, Unknown | Expiring) else route


def _expired(job: Job, expires: datetime, late: float) -> JobExpiredError:
    """Make the error of a job that has expired."""
    error = JobExpiredError(
        f"the job expired at {expires.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, and was not run"
    )
    # Not in the first line, which makes the fingerprint.
    error.add_note(f"a worker was about to start it {lasting(late)} later")
    if job.last_error:
        error.add_note(f"its last attempt had failed: {job.last_error}")
    return error
