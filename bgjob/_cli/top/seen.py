"""What `bgjob top` has been told: by the database, and by the user."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bgjob._sql.dead import LastDeath
from bgjob._sql.server import Holder
from bgjob.limit import LimitStatus
from bgjob.stats import CappedCount, MinuteCounts, MinuteReport, Overview, QueueOverview
from bgjob.workers import WorkerStatus

Sort = Literal["oldest", "due", "dead", "rate", "name"]
SORTS: tuple[Sort, ...] = ("oldest", "due", "dead", "rate", "name")

MINUTE = 60
MINUTES = 61
"""Steps of the report: the last hour, and the current minute."""

_RECENT = 11
"""Steps over which failures are counted: the last ten minutes, and the current one."""

_BAR = 5
"""Minutes of a bar."""

_NONE = CappedCount(0, is_exact=True)


@dataclass(frozen=True, slots=True)
class Server:
    """The database that is shown."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Flow:
    """What ended in a queue, as its workers have counted it by minute."""

    per_second: float
    """Completed jobs, in the last minute that is over."""
    recent: MinuteCounts
    """Within some ten minutes."""
    bars: tuple[int, ...]
    """Completed jobs of the last hour, in five minutes each."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the database answered.

    Attributes:
        overview: what the queues hold.
        workers: the registered workers; empty if the role cannot read them.
        flows: by queue, what ended in the last hour, where workers count minutes.
        holder: the oldest transaction, if there is any.
        death: the job that died last, if one did within an hour.

    """

    overview: Overview
    workers: Sequence[WorkerStatus] = ()
    flows: dict[str, Flow] = field(default_factory=dict)
    holder: Holder | None = None
    death: LastDeath | None = None
    limits: Sequence[LimitStatus] = ()

    @property
    def queues(self) -> list[QueueOverview]:
        """The queues of the overview, and those that are empty and have workers, or had jobs."""
        found = list(self.overview.queues)
        names = {queue.queue for queue in found}
        served = {queue for worker in self.workers if worker.is_alive for queue in worker.queues}
        flowed = {queue for queue, flow in self.flows.items() if flow.recent.ended}
        return found + [
            QueueOverview(
                name, _NONE, _NONE, _NONE, _NONE, _NONE, None, is_paused=False, paused_until=None
            )
            for name in sorted((served | flowed) - names)
        ]


def flows_of(report: MinuteReport) -> dict[str, Flow]:
    """Return the flows of a report by minute and queue."""
    flows = {}
    for series in report.series:
        if series.queue is None:
            continue
        *over, _current = series.steps
        recent = MinuteCounts()
        for counts in series.steps[-_RECENT:]:
            recent = recent.plus(counts)
        done = [counts.completed for counts in over]
        flows[series.queue] = Flow(
            done[-1] / MINUTE,
            recent,
            tuple(sum(done[n : n + _BAR]) for n in range(0, len(done), _BAR)),
        )
    return flows


@dataclass(frozen=True, slots=True)
class Pane:
    """Why the first due job of a queue does not run, in place of the queues.

    Attributes:
        queue: the queue.
        lines: labels and texts; None as long as there is no answer.

    """

    queue: str
    lines: Sequence[tuple[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What the user has chosen, and what the screen has room for.

    Attributes:
        width: columns of the screen; None for as many as it takes.
        height: lines of the screen; None for as many as it takes, and no keys to press.
        sort: the order of the queues.
        first: how many queues are scrolled away.
        chosen: the queue that the cursor is on; None before a key was pressed.
        is_frozen: whether the user has stopped the renewal.
        trouble: why the frame is not renewed; None if it is.
        pane: what is shown in place of the queues.

    """

    width: int | None = None
    height: int | None = None
    sort: Sort = "oldest"
    first: int = 0
    chosen: str | None = None
    is_frozen: bool = False
    trouble: str | None = None
    pane: Pane | None = None
