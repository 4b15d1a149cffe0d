"""What several pages show: rows of tables, texts, buttons; see `views`."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from bgjob.ext.web.frame import Permission
from bgjob.stats import CappedCount
from bgjob.workers import WorkerCounts, WorkerState

Seconds: TypeAlias = float


@dataclass(frozen=True, slots=True)
class Trouble:
    """In place of a part that could not be read."""

    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Button:
    """A form with one button.

    `action` is its path below the root, without a query. With `is_confirmed` the answer is a page
    that asks. `asks` are fields that the user fills in: "reason", "priority".
    """

    label: str
    action: str
    permission: Permission
    fields: tuple[tuple[str, str], ...] = ()
    asks: tuple[str, ...] = ()
    is_dangerous: bool = False
    is_confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A payload or an error, as this user may see it.

    `state`: "none" there is none; "shown" as it is; "masked" some values are dots; "hidden" not
    for this user or for no one; "binary" not text: `text` is then its first bytes in hex.
    `size` is in bytes, and that of all of it. `is_cut` if `text` is only its beginning. `reveal`:
    the query that shows what is masked; `download`: the path of the whole. Empty if not allowed.
    """

    state: Literal["none", "shown", "masked", "hidden", "binary"]
    text: str = ""
    size: int = 0
    lines: int = 0
    is_cut: bool = False
    reveal: str = ""
    download: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """The trace that a job belongs to; `url` is the address that shows it, of another site."""

    id: str
    url: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """A part of the sentence at the top; `link` is a path below the root with its query.

    `since`: for how long, to be written after the text; None if that is not of interest.
    """

    text: str
    link: str
    is_alarm: bool = False
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A queue. `state`: "paused", "no worker" (and jobs), "open".

    `busy`, `slots` and `workers` are of the registered live workers. `completed` are the jobs
    completed in each of the last 60 minutes, the latest last; None without minute counters.
    `failed_percent` is of the last 10 minutes; None without them or without attempts.
    """

    queue: str
    state: Literal["open", "paused", "no worker"]
    paused_until: datetime | None
    due: CappedCount
    oldest_due_at: datetime | None
    delayed: CappedCount
    running: CappedCount
    waiting_for_keys: CappedCount
    dead_last_hour: CappedCount
    busy: int
    slots: int
    workers: int
    is_alarm: bool
    completed: tuple[int, ...] | None = None
    failed_percent: float | None = None


@dataclass(frozen=True, slots=True)
class QueueTable:
    """At most 100 queues, what hurts first; `more` are left out. `prefix` filters the names."""

    rows: tuple[QueueRow, ...]
    more: int
    prefix: str
    has_minutes: bool


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Dead jobs with one fingerprint (hex). `queues`, `type` and `error` are of the latest.

    `error` is its first line. `hours` are the jobs that died in each of the last 24 hours, the
    latest last; None if that was not counted.
    """

    fingerprint: str
    jobs: CappedCount
    queues: tuple[str, ...]
    type: str
    error: str
    first_at: datetime
    last_at: datetime
    hours: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class LongestRow:
    """A job that has run for long. `number` and `host` are its worker's."""

    id: str
    since: datetime
    number: int
    host: str


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A registered worker; the attributes of bgjob.workers.WorkerStatus.

    `queues` are (queue, busy, slots). `note` is its last error.
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
    queues: tuple[tuple[str, int, int], ...]
    types: tuple[str, ...]
    lease: Seconds
    every: Seconds
    counts: WorkerCounts
    longest: tuple[LongestRow, ...]
    note: str | None

    @property
    def is_alive(self) -> bool:
        """Whether it works or shuts down."""
        return self.state in {"working", "stopping"}


@dataclass(frozen=True, slots=True)
class ReasonRow:
    """A reason why a job does not run; `button` does what lifts it, if a page can."""

    code: str
    blocks: bool
    text: str
    remedy: str
    button: Button | None = None


@dataclass(frozen=True, slots=True)
class Why:
    """The answer to "why does it not run?". `id` is None if the queue has no due job.

    `state`: see bgjob.explanation.JobState.
    """

    id: str | None
    state: str
    reasons: tuple[ReasonRow, ...]


@dataclass(frozen=True, slots=True)
class JobRow:
    """A live job in a list. `error` is the first line of its last error, at most 200 characters."""

    id: str
    queue: str
    type: str
    priority: int
    attempt: int
    state: Literal["due", "delayed", "retry", "running", "key", "limited", "suspect"]
    due_at: datetime
    error: str | None


@dataclass(frozen=True, slots=True)
class DeadRow:
    """A dead job in a list. `error` as in JobRow."""

    number: int
    id: str
    queue: str
    type: str
    attempt: int
    died_at: datetime
    error: str | None
