"""The rules, in the order in which their reasons are told.

A rule yields its reason if it holds. The texts speak of "it": the job.
"""

from collections.abc import Callable

from bgjob._explanation import gone, job, workers
from bgjob._explanation.seen import Reasons, Seen
from bgjob.explanation import Reason

_RULES: tuple[Callable[[Seen], Reasons], ...] = (
    job.running,
    job.lease_ended,
    job.group,
    job.not_due,
    job.expires,
    job.paused,
    job.limited,
    job.key,
    job.suspect,
    job.behind,
    workers.no_worker,
    workers.busy,
    workers.no_handler,
    gone.dead,
    gone.completed,
    gone.absent,
    gone.schedule,
    gone.unread,
)


_NO_OBSTACLES = ("expires", "schedule")


def reasons(seen: Seen) -> tuple[Reason, ...]:
    """Return all reasons that hold, in order; at least one."""
    found = [reason for rule in _RULES for reason in rule(seen)]
    obstacles = [reason for reason in found if reason.code not in _NO_OBSTACLES]
    return tuple([*found] if obstacles else [workers.ready(seen), *found])
