"""What is known of a job: the answers of all statements."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from bgjob._sql.history import Kept
from bgjob._sql.looks import Ahead, Claimant, Dead, Key, Live, Members, QueueWorkers, Writer
from bgjob._sql.session import Hidden
from bgjob.explanation import JobState, Reason
from bgjob.limit import LimitStatus
from bgjob.schedule import ScheduleStatus

Reasons: TypeAlias = Iterator[Reason]
"""What a rule yields: its reason, or nothing."""

THE_WORKERS = "the workers"
ITS_SCHEDULE = "its schedule"


@dataclass(frozen=True, slots=True)
class Unread:
    """What could not be looked at, and why."""

    what: str
    why: str
    remedy: str
    sqlstate: str | None


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause of the job's queue."""

    until: datetime | None
    """None until it is resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A job and its surroundings; None for what was not needed, or could not be looked at."""

    id: str
    now: datetime
    job: Live | None = None
    dead: tuple[Dead, ...] = ()
    """The latest first."""
    kept: tuple[Kept, ...] = ()
    """The times it was completed, the latest first; looked for if there is no such job."""
    taken_until: datetime | None = None
    """Until when its result is kept, and its id taken."""
    claimant: Claimant | None = None
    """The worker that holds the job, held it until its lease ended, or completed it."""
    pause: Pause | None = None
    limits: tuple[LimitStatus, ...] = ()
    """Those of its queue and of its type."""
    key: Key | None = None
    key_claimant: Claimant | None = None
    """The worker that holds the first holder of the key."""
    ahead: Ahead | None = None
    members: Members | None = None
    """The live jobs of the group that it waits for."""
    workers: QueueWorkers | None = None
    sessions: int = 0
    """The sessions of workers, registered or not; counted if no worker is known."""
    schedule_name: str | None = None
    """The name of the schedule that the id tells of."""
    schedule: ScheduleStatus | None = None
    writers: tuple[Writer, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    """The tables that may hide rows from this role."""
    unread: tuple[Unread, ...] = ()

    def has_read(self, what: str) -> bool:
        """Whether something could be looked at."""
        return all(part.what != what for part in self.unread)

    @property
    def is_running(self) -> bool:
        """Whether a worker holds the job."""
        return self.job is not None and (self.job.lease_left or 0) > 0

    @property
    def state(self) -> JobState:
        """What the job is."""
        if self.job is None:
            return "dead" if self.dead else "completed" if self.kept else "absent"
        if self.is_running:
            return "running"
        return "due" if self.job.due_in <= 0 else "delayed"
