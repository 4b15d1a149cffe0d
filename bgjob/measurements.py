"""The measurements of a database, for an exporter of metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bgjob.stats import QueueOverview
from bgjob.workers import WorkerStatus


class DeadCount(NamedTuple):
    """The jobs of a queue and type that died within the last hour.

    Attributes:
        queue: the queue.
        type: the type.
        jobs: their number, among the latest 10,000 dead jobs.

    """

    queue: str
    type: str
    jobs: int


class ScheduleDelay(NamedTuple):
    """A schedule whose tick has passed without a job.

    Attributes:
        name: the schedule's name.
        seconds: since its next job was to be enqueued.

    """

    name: str
    seconds: float


class Horizon(NamedTuple):
    """The oldest of the holders of one kind that keep dead rows from being removed.

    Attributes:
        holder: "session", "standby", "slot" or "prepared".
        transactions: that have begun since its snapshot; 0 if there is none.
        seconds: the age of its transaction; None if it has none, or is hidden from this role.

    """

    holder: str
    transactions: int
    seconds: float | None


class TableMeasure(NamedTuple):
    """The size of a table, by the server's statistics.

    Attributes:
        name: its name.
        rows: an estimate.
        dead_rows: rows that no vacuum has removed yet; an estimate.
        bytes: its size without indexes.
        index_bytes: the size of its indexes.

    """

    name: str
    rows: int
    dead_rows: int
    bytes: int
    index_bytes: int


@dataclass(frozen=True, slots=True)
class Measurements:
    """What a database says of itself, in parts.

    A part that could not be read, because this role lacks a grant or a statement took too long,
    has its default here, and is named in `failures`.

    Attributes:
        queues: each queue, counted up to the cap ("queues").
        workers: the registered workers ("workers").
        dead: the jobs that died within the last hour ("dead").
        schedules: the late schedules ("schedules").
        horizon: who keeps dead rows ("horizon").
        tables: the tables ("tables").
        notify_queue: how full the server's queue of notifications is, from 0 to 1 ("notify").
        failures: the parts that could not be read, and why.

    """

    queues: tuple[QueueOverview, ...] = ()
    workers: tuple[WorkerStatus, ...] = ()
    dead: tuple[DeadCount, ...] = ()
    schedules: tuple[ScheduleDelay, ...] = ()
    horizon: tuple[Horizon, ...] = ()
    tables: tuple[TableMeasure, ...] = ()
    notify_queue: float | None = None
    failures: Mapping[str, str] = field(default_factory=dict)


PARTS = ("queues", "workers", "dead", "schedules", "horizon", "tables", "notify")
"""The names of the parts."""
