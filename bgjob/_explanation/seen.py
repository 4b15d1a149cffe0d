"""What is known of a job: the answers of all statements."""

from dataclasses import dataclass, field
from datetime import datetime

from bgjob._sql.looks import (
    Ahead,
    Claimant,
    Dead,
    Key,
    Live,
    Scheduled,
    Serving,
    Writer,
)
from bgjob._sql.session import Hidden
from bgjob.explanation import JobState


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
    claimant: Claimant | None = None
    """The worker that holds the job, or held it until its lease ended."""
    pause: Pause | None = None
    key: Key | None = None
    key_claimant: Claimant | None = None
    """The worker that holds the holder of the key."""
    ahead: Ahead | None = None
    serving: Serving | None = None
    sessions: int = 0
    """The sessions of workers, registered or not; counted if no worker is known."""
    schedule_name: str | None = None
    """The name of the schedule that the id tells of."""
    schedule: Scheduled | None = None
    writers: tuple[Writer, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    """The tables that may hide rows from this role."""
    unread: tuple[Unread, ...] = field(default=())

    @property
    def is_running(self) -> bool:
        """Whether a worker holds the job."""
        return self.job is not None and (self.job.lease_left or 0) > 0

    @property
    def state(self) -> JobState:
        """What the job is."""
        if self.job is None:
            return "dead" if self.dead else "absent"
        if self.is_running:
            return "running"
        return "due" if self.job.due_in <= 0 else "delayed"
