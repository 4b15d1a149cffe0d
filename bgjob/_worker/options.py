"""A worker's options, checked once and passed on as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self, TypeAlias

from bgjob._checks import Duration, seconds
from bgjob.errors import QueueRequiredError
from bgjob.job import check_name
from bgjob.limit import Limit

Queues: TypeAlias = str | Mapping[str, int]
"""A queue, or several, each with its concurrency."""

_SHORTEST_POLL = 0.001
"""Seconds."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The checked options of a worker; durations in seconds."""

    concurrency: Mapping[str, int]
    """The slots of each queue, by its name."""
    poll_interval: float
    lease: float
    notify: bool
    init_timeout: float
    grace: float | None
    """None waits without limit."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """By queue."""

    @classmethod
    def checked(
        cls,
        queues: Queues,
        *,
        concurrency: int | None,
        poll_interval: Duration,
        lease: Duration,
        notify: bool,
        init_timeout: Duration,
        grace: Duration | None,
        limits: Mapping[str, Limit] | Limit | None = None,
    ) -> Self:
        """Return the options; raise TypeError or ValueError with the name of a wrong one."""
        return cls(
            concurrency=_slots(queues, concurrency),
            poll_interval=_at_least(_SHORTEST_POLL, poll_interval, "poll_interval"),
            lease=_at_least(1, lease, "lease"),
            notify=notify,
            init_timeout=_at_least(1, init_timeout, "init_timeout"),
            grace=None if grace is None else seconds(grace, "grace"),
            limits=_limits(queues, limits),
        )


def _at_least(least: float, value: Duration, name: str) -> float:
    given = seconds(value, name)
    if given < least:
        raise ValueError(f"{name} must be at least {least} s, not {value!r}")
    return given


def _slots(queues: Queues, concurrency: int | None) -> dict[str, int]:
    """Return the slots of each queue; raise if the arguments are wrong."""
    if isinstance(queues, str):
        slots = {queues: 1 if concurrency is None else concurrency}
    elif isinstance(queues, Mapping):
        if concurrency is not None:
            raise ValueError("pass concurrency, or a mapping from queues to theirs, not both")
        slots = dict(queues)
    else:
        raise TypeError(
            f"queue must be a str, not {type(queues).__name__}; or, for several queues, a mapping "
            "from their names to their concurrency, such as {'high': 10, 'low': 2}"
        )
    if not slots or not all(slots):
        raise QueueRequiredError("queue is required: name the queue to work on")
    for queue, count in slots.items():
        check_name("queue", queue)
        if type(count) is not int or count < 1:
            raise ValueError(f"concurrency must be at least 1, not {count!r}: of queue {queue!r}")
    return slots


def _limits(queues: Queues, limits: Mapping[str, Limit] | Limit | None) -> dict[str, Limit]:
    """Return the limit of each queue that has one; raise if the argument is wrong."""
    if limits is None:
        return {}
    if isinstance(limits, Limit):
        if not isinstance(queues, str):
            raise TypeError(
                "limits of a worker with several queues must be a mapping from their names, such "
                "as {'mail': Limit(rate='14/s')}"
            )
        limits = {queues: limits}
    if not isinstance(limits, Mapping):
        raise TypeError(
            "limits must be a Limit, or a mapping from queues to theirs, such as "
            f"{{'mail': Limit(rate='14/s')}}, not {limits!r}"
        )
    names = {queues} if isinstance(queues, str) else {*queues}
    for queue, limit in limits.items():
        if queue not in names:
            raise ValueError(f"limits names queue {queue!r}, which is none of this worker's")
        if not isinstance(limit, Limit):
            raise TypeError(f"the limit of queue {queue!r} must be a Limit, not {limit!r}")
    return {queue: limit for queue, limit in limits.items() if limit != Limit()}
