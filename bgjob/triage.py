"""The values of a triage: groups of dead jobs, one that is tried, and the rest."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

from bgjob._failure import normalised

Verdict: TypeAlias = Literal["completed", "dead", "failed", "rescheduled", "undecided"]
"""`completed`: it is gone. `dead`: it died again. `failed`: its attempt failed, and it will be
retried. `rescheduled`: its handler returned Reschedule. `undecided`: it still waits or runs."""

_LEAF = re.compile(r"^- (?:\d+ times )?(.*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class DeadGroup:
    """Dead jobs that died in the same way.

    The worker that moves a job to the dead-letter table makes its fingerprint: of an exception
    from the job's type, the error's class, the module and function of the last frame of your own
    code, and the first line without quoted text, hashes and numbers; of another error from the
    type and that line.

    Attributes:
        fingerprint: 12 hexadecimal digits, for the filter `fingerprint`; 000000000000 for jobs
            that something else than bgjob has moved.
        jobs: how many they are; exact.
        queues: the queues of its latest 100 jobs, sorted.
        type: the job type of the latest.
        first: when the first died, by the database's clock.
        last: when the latest died.
        number: the number of the latest; for the filter `upto`.
        id: the id of the latest.
        error: the error of the latest: its first 2,000 characters.

    """

    fingerprint: str
    jobs: int
    queues: tuple[str, ...]
    type: str
    first: datetime
    last: datetime
    number: int
    id: str
    error: str

    @property
    def title(self) -> str:
        """The error's first line, with `<>` for quoted text and hashes, and `0` for numbers.

        That of an exception group also has its first leaf.
        """
        title = normalised(self.error)
        leaf = _LEAF.search(self.error) if title.endswith(("-exception)", "-exceptions)")) else None
        return f"{title}: {normalised(leaf[1])}" if leaf else title


@dataclass(frozen=True, slots=True)
class Canary:
    """A dead job that was moved back to its queue to see whether its group can be handled now.

    Attributes:
        verdict: how it ended: `completed`, `dead`, `failed`, `rescheduled` or `undecided`.
        id: its id.
        queue: its queue.
        type: its job type.
        fingerprint: that of the group from which it was taken.
        claimed: the seconds after which it was seen to run; None if that was not seen, as
            of a quick job.
        worker: the number of the worker that ran it then, as in `client.workers()`; None if
            it is not known.
        took: the seconds until the verdict.
        error: the new error, if it died or failed again; else empty.
        number: its number in the dead-letter table, if it is there again; else None.

    """

    verdict: Verdict
    id: str
    queue: str
    type: str
    fingerprint: str
    claimed: float | None
    worker: int | None
    took: float
    error: str
    number: int | None = None

    @property
    def status(self) -> int:
        """The exit status of `bgjob triage --canary`: 0 if completed, 4 if undecided, else 3."""
        return {"completed": 0, "undecided": 4}.get(self.verdict, 3)


class Rest(NamedTuple):
    """The dead jobs of a group that were moved back to their queues.

    Attributes:
        fingerprint: that of the group.
        jobs: how many there were when it began.
        moved: how many are back.
        left: how many stay dead: live jobs have their ids, or another program moved them.
        failed: how many failed again: those of this group that have died since it began, and
            of the last 1,000 that were moved those that died otherwise or will be retried.
        upto: the number of the last of these jobs: those that die meanwhile have greater
            ones, and stay dead.
        is_stopped: whether it ended because too many failed again.

    """

    fingerprint: str
    jobs: int
    moved: int
    left: int
    failed: int
    upto: int
    is_stopped: bool

    @property
    def status(self) -> int:
        """The exit status of `bgjob triage --rest`: 3 if it was stopped, else 0."""
        return 3 if self.is_stopped else 0
