"""Workers: those that are registered in a database, and how one in this process is."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

MISSED = 3
"""After so many beats that did not come a worker is lost."""

LATE = 15.0
"""Seconds by which a control thread may be late: it waits for a silent server for up to 10."""

NO_TABLE = (
    "table bgjob_worker is not in the search_path: apply its statement in migration/init.sql "
    "(bgjob.schema.init_sql()) to this database"
)

WorkerState: TypeAlias = Literal["working", "stopping", "ended", "failed", "lost"]
"""What a worker does: it works, shuts down, was shut down, ended on its own, or is not seen."""


class WorkerCounts(NamedTuple):
    """The events of a worker since its start.

    Attributes:
        completed: jobs that were completed.
        retried: attempts that failed, and will be repeated.
        rescheduled: jobs whose handlers returned Reschedule.
        dead: jobs that were moved to the dead-letter table.
        lost: jobs whose lease ended while this worker had them.
        timed_out: handlers that exceeded their timeout, and were given up.
        errors: errors of the worker itself, such as a lost connection.
        cancelled: jobs that were cancelled while this worker had them.

    """

    completed: int = 0
    retried: int = 0
    rescheduled: int = 0
    dead: int = 0
    lost: int = 0
    timed_out: int = 0
    errors: int = 0
    cancelled: int = 0


class RunningJob(NamedTuple):
    """A job in a handler.

    Attributes:
        id: the job's id.
        since: when the worker claimed it.

    """

    id: str
    since: datetime


class WorkerStatus(NamedTuple):
    """A worker, as it was when it last wrote its row.

    Attributes:
        number: the number of its row, which is also in the tokens of its claims.
        state: "working", "stopping" or "ended", which a shutdown leads to; "failed", if it ended
            on its own; "lost", if it is in one of the first two states and was not seen for
            three beats: it was killed, or its host or its connection is down. A lost worker
            may still run: only a lease that ends frees its jobs.
        host: the name of its host.
        pid: the number of its process there.
        program: the name of its program.
        release: the program's version, as the worker was told; None if it was not.
        version: the version of bgjob.
        started_at: when it started.
        seen_at: when it last wrote its row.
        not_seen: seconds since then, by the database's clock.
        queues: the slots of each of its queues.
        running: how many handlers are busy, by queue.
        types: the job types that it has handlers for.
        lease: the seconds of its leases.
        every: seconds between two beats.
        counts: its events.
        longest: the jobs that have run longest, at most five.
        note: its last error; None if there was none.

    """

    number: int
    state: WorkerState
    host: str
    pid: int
    program: str
    release: str | None
    version: str
    started_at: datetime
    seen_at: datetime
    not_seen: float
    queues: Mapping[str, int]
    running: Mapping[str, int]
    types: Sequence[str]
    lease: float
    every: float
    counts: WorkerCounts
    longest: Sequence[RunningJob]
    note: str | None

    @property
    def is_alive(self) -> bool:
        """Whether it works or shuts down, and was seen within three beats."""
        return self.state in {"working", "stopping"}


class QueueHealth(NamedTuple):
    """How the control thread of one queue is.

    Attributes:
        slots: how many handlers may run at the same time.
        busy: how many run.
        is_connected: whether it has a connection to the database.
        turned: seconds since its last turn. It turns for each exchange, and at least once in
            a poll interval, also while the database is away.
        late: seconds since it should have turned; 0 if that is still to come.
        claimed: seconds since it last claimed a job; None if it has not claimed any.

    """

    slots: int
    busy: int
    is_connected: bool
    turned: float
    late: float
    claimed: float | None


class WorkerHealth(NamedTuple):
    """How a worker of this process is; known without asking the database.

    Attributes:
        has_started: whether `run` has returned: it was connected, and the schema fits.
        is_stopping: whether it shuts down, or has ended.
        has_ended: whether it has ended.
        queues: how each of its queues is.
        number: the number of its row in the list of workers; None if it has none.
        note: its last error; None if there was none.
        program: the name of its program.
        release: the program's version; None if the worker was not told.

    """

    has_started: bool
    is_stopping: bool
    has_ended: bool
    queues: Mapping[str, QueueHealth]
    number: int | None
    note: str | None
    program: str
    release: str | None

    @property
    def is_live(self) -> bool:
        """Whether no control thread is late by over 15 s: then a restart would not help.

        Neither an outage of the database nor a handler that runs for hours makes it False.
        It is True before the start, and after the end.
        """
        return all(queue.late <= LATE for queue in self.queues.values())

    @property
    def is_ready(self) -> bool:
        """Whether it has started, is connected for each queue, and does not shut down."""
        connected = all(queue.is_connected for queue in self.queues.values())
        return self.has_started and connected and not self.is_stopping
