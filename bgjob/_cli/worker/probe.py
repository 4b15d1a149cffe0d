"""How the workers of this process are, and what they count."""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from bgjob._cli.database import name_of
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
    """Reports on the workers of this process; before there is one, on the start.

    Args:
        live_within: as for HealthOptions.
        counts: whether it counts the workers' events.
        is_asked_to_end: whether a signal has come.

    """

    def __init__(
        self, live_within: float | None, *, counts: bool, is_asked_to_end: Callable[[], bool]
    ) -> None:
        self._live_within = live_within
        metering = load_metering() if counts else None
        self._is_asked_to_end = is_asked_to_end
        self._groups: Sequence[WorkerGroup] = ()
        self._stalls: Sequence[Stalls] = ()
        self.metering = None if metering is None else metering()
        """What counts the workers' events, if anything does."""

    def attach(self, groups: Sequence[WorkerGroup]) -> None:
        """Take the workers, before they run."""
        if self.metering is not None:
            self.metering.attach(groups)
        if self._live_within is not None:
            self._stalls = [Stalls(self._live_within, group) for group in groups]
        self._groups = groups

    def report(self) -> Report:
        """Return how they are, to any thread."""
        is_stopping = self._is_asked_to_end()
        if not self._groups:
            details = {"stopping": is_stopping, "queues": {}}
            return Report(is_live=True, is_ready=False, has_started=False, details=details)
        healths = [group.health() for group in self._groups]
        stalled = [dict(each.queues) for each in self._stalls] or [{} for _ in healths]
        found = [
            _details(health, stalls, is_stopping=is_stopping or health.is_stopping)
            for health, stalls in zip(healths, stalled, strict=True)
        ]
        return Report(
            is_live=all(health.is_live for health in healths) and not any(stalled),
            is_ready=all(health.is_ready for health in healths) and not is_stopping,
            # One whose database is away at the start does not hold up the others.
            has_started=any(health.has_started for health in healths),
            details=found[0] if len(found) == 1 else self._several(found, is_stopping=is_stopping),
        )

    def _several(self, found: Sequence[dict[str, Any]], *, is_stopping: bool) -> dict[str, Any]:
        workers = [
            {"database": name_of(group.connection_parameters), **details}
            for group, details in zip(self._groups, found, strict=True)
        ]
        return {"stopping": is_stopping, "workers": workers}

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
