"""How the worker of this process is, and what it counts."""

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from bgjob._cli.listener import Answer
from bgjob._cli.worker.health import Report
from bgjob._cli.worker.stalls import Stalls
from bgjob._worker.group import WorkerGroup
from bgjob.workers import WorkerHealth

if TYPE_CHECKING:
    from bgjob._cli.worker import metering

NO_METRICS = Answer(
    HTTPStatus.NOT_IMPLEMENTED,
    b"metrics need the extra prometheus: pip install 'bgjob[prometheus]'\n",
    "text/plain; charset=utf-8",
)


def load_metering() -> "type[metering.Metering] | None":
    """Import what needs prometheus-client; None without the extra: the rest works."""
    try:
        from bgjob._cli.worker.metering import Metering  # noqa: PLC0415 (only where it is used)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("prometheus_client"):
            raise
        return None
    return Metering


class Probe:
    """Reports on the worker of this process; before there is one, on the start.

    Args:
        live_within: as for HealthOptions.
        counts: whether it counts the worker's events.
        is_asked_to_end: whether a signal has come.

    """

    def __init__(
        self, live_within: float | None, *, counts: bool, is_asked_to_end: Callable[[], bool]
    ) -> None:
        self._live_within = live_within
        metering = load_metering() if counts else None
        self._is_asked_to_end = is_asked_to_end
        self._group: WorkerGroup | None = None
        self._stalls: Stalls | None = None
        self.metering = None if metering is None else metering()
        """What counts the worker's events, if anything does."""

    def attach(self, group: WorkerGroup) -> None:
        """Take the worker, before it runs."""
        if self.metering is not None:
            self.metering.attach(group)
        if self._live_within is not None:
            self._stalls = Stalls(self._live_within, group)
        self._group = group

    def report(self) -> Report:
        """Return how it is, to any thread."""
        is_stopping = self._is_asked_to_end()
        if self._group is None:
            details = {"stopping": is_stopping, "queues": {}}
            return Report(is_live=True, is_ready=False, has_started=False, details=details)
        health = self._group.health()
        stalled = {} if self._stalls is None else dict(self._stalls.queues)
        return Report(
            is_live=health.is_live and not stalled,
            is_ready=health.is_ready and not is_stopping,
            has_started=health.has_started,
            details=_details(health, stalled, is_stopping=is_stopping or health.is_stopping),
        )

    def render(self, accept: str) -> Answer:
        """Return the metrics of this process."""
        return NO_METRICS if self.metering is None else self.metering.render(accept)


def _details(
    health: WorkerHealth, stalled: dict[str, float], *, is_stopping: bool
) -> dict[str, Any]:
    details: dict[str, Any] = {
        "stopping": is_stopping,
        "number": health.number,
        "program": health.program,
        "release": health.release,
        "note": health.note,
        "queues": {
            name: {
                "slots": queue.slots,
                "busy": queue.busy,
                "connected": queue.is_connected,
                "turned": round(queue.turned, 3),
                "late": round(queue.late, 3),
                "claimed": None if queue.claimed is None else round(queue.claimed, 3),
            }
            for name, queue in health.queues.items()
        },
    }
    return details | ({"stalled": stalled} if stalled else {})
