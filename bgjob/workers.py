"""The registered workers of a database."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

MISSED = 3
"""After so many beats that did not come a worker is lost."""

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

    """

    completed: int = 0
    retried: int = 0
    rescheduled: int = 0
    dead: int = 0
    lost: int = 0
    timed_out: int = 0
    errors: int = 0


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
