"""What each page shows: a template gets one of these values as `view`, JSON is made of it.

The module has over 400 lines because each page is here, beside the others; `parts` are its rows.

Times are aware datetimes. Names and texts are as they are in the database: the templates escape
them. Payloads and errors are redacted already. A field with `Trouble` in its type could not be
read; None means that this part was not asked for, or that there is nothing of the kind.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from bgjob._triage.died_on import DiedOn
from bgjob.ext.web.parts import (
    Button,
    DeadRow,
    GroupRow,
    JobRow,
    LongestRow,
    Phrase,
    QueueRow,
    QueueTable,
    Text,
    Trace,
    Trouble,
    Why,
    WorkerRow,
)
from bgjob.limit import LimitStatus
from bgjob.stats import CappedCount

# -- pages: the overview and queues ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class OverviewPage:
    """`/` (overview.html). Parts: summary, queues, groups, longest.

    `has_workers`: whether any worker was ever seen (for the empty state).
    """

    summary: tuple[Phrase, ...] | Trouble | None = None
    queues: QueueTable | Trouble | None = None
    groups: tuple[GroupRow, ...] | Trouble | None = None
    longest: tuple[LongestRow, ...] | Trouble | None = None
    has_workers: bool = True


@dataclass(frozen=True, slots=True)
class PriorityRow:
    """The due jobs of one priority of a queue."""

    priority: int
    due: CappedCount
    oldest_due_at: datetime | None


@dataclass(frozen=True, slots=True)
class TypeRow:
    """What became of the attempts at a type, within the chart's span."""

    type: str
    completed: int
    retried: int
    dead: int


@dataclass(frozen=True, slots=True)
class Chart:
    """Attempts over time, in bars of `seconds` each, the first from `since` on."""

    span: Literal["1h", "6h", "24h", "7d"]
    since: datetime
    seconds: int
    completed: tuple[int, ...]
    retried: tuple[int, ...]
    dead: tuple[int, ...]
    types: tuple[TypeRow, ...]


@dataclass(frozen=True, slots=True)
class QueuePage:
    """`/queues/NAME` (queue.html). Parts: now, chart.

    `row` is None in a queue without jobs, pause and worker. `chart` is None without minute
    counters. `spans` are the choices of the chart (?span=).
    """

    queue: str
    row: QueueRow | Trouble | None = None
    lines: tuple[PriorityRow, ...] | Trouble | None = None
    workers: tuple[WorkerRow, ...] | Trouble | None = None
    why: Why | Trouble | None = None
    chart: Chart | Trouble | None = None
    spans: tuple[str, ...] = ("1h", "6h", "24h", "7d")


# -- pages: jobs -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobFilter:
    """The fields of the filter form; empty strings do not filter."""

    id: str = ""
    queue: str = ""
    type: str = ""
    state: str = ""
    key: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Chip:
    """A filter in force; `without` is the path with the query of the list without it."""

    name: str
    value: str
    without: str


@dataclass(frozen=True, slots=True)
class Looked:
    """How far a search without an index came: rows looked at, of about so many."""

    rows: int
    of_about: int
    is_done: bool


@dataclass(frozen=True, slots=True)
class JobsPage:
    """`/jobs` (jobs.html).

    `older` is the link (path and query) to the next page, or to look further; None on the last.
    `first`: to the first page, if this is not it. `order` says by what it is sorted.
    """

    filter: JobFilter
    chips: tuple[Chip, ...]
    states: tuple[str, ...]
    rows: tuple[JobRow, ...] | Trouble | None = None
    order: str = ""
    older: str | None = None
    first: str | None = None
    looked: Looked | None = None


@dataclass(frozen=True, slots=True)
class JobFacts:
    """A live job. `state` as in JobRow. `worker` is the number of the one that holds it."""

    id: str
    queue: str
    type: str
    state: str
    priority: int
    attempt: int
    deaths: int
    key: str | None
    created_at: datetime
    updated_at: datetime
    due_at: datetime
    expires: datetime | None
    lease_until: datetime | None
    running_since: datetime | None
    worker: int | None
    group: str | None
    waits_for_group: bool


@dataclass(frozen=True, slots=True)
class JobPage:
    """`/jobs/ID` (job.html). Part: why.

    `job` is None if no live job has the id; `dead` are the dead ones with it. `buttons` are those
    that make sense for its state, dangerous ones last.
    """

    id: str
    job: JobFacts | Trouble | None = None
    why: Why | Trouble | None = None
    payload: Text | None = None
    headers: Text | None = None
    checkpoint: Text | None = None
    error: Text | None = None
    trace: Trace | None = None
    dead: tuple[DeadRow, ...] = ()
    buttons: tuple[Button, ...] = ()


# -- pages: dead jobs ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeadPage:
    """`/dead` (dead.html). Part: groups.

    `latest` is the list of single dead jobs; it alone follows `type` and `error` too.
    `older`, `first`: see JobsPage. `buttons` requeue or purge what the filter finds.
    """

    queue: str
    type: str
    error: str
    chips: tuple[Chip, ...]
    groups: tuple[GroupRow, ...] | Trouble | None = None
    latest: tuple[DeadRow, ...] | Trouble | None = None
    older: str | None = None
    first: str | None = None
    buttons: tuple[Button, ...] = ()


@dataclass(frozen=True, slots=True)
class Canary:
    """One dead job of a group that was put back to try.

    `state`: "waiting", "running", "completed", "dead", "failed" (it waits for a retry),
    "rescheduled", "undecided" (it was watched for a minute). `is_good` is None while undecided.
    """

    id: str
    queue: str
    type: str
    started_at: datetime
    state: str
    is_good: bool | None
    error: str | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Rest:
    """The replay of a group's rest. `state`: "running", "done", "stopped", "braked", "failed".

    `left` stay dead, because live jobs have their ids. `rate` is in jobs a second.
    """

    state: Literal["running", "done", "stopped", "braked", "failed"]
    total: int
    back: int
    left: int
    died: int
    rate: float
    stop_after: int
    started_at: datetime
    ended_at: datetime | None
    by: str | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GroupPage:
    """`/dead/groups/FINGERPRINT` (group.html). Part: steps (canary, rest and their state).

    `group` is None once nothing of it is dead. `command` is what to type instead of the rest if
    that is too much for a page; empty otherwise. `died_on` counts the latest ones by worker.
    """

    fingerprint: str
    group: GroupRow | Trouble | None = None
    sample: Text | None = None
    latest: tuple[DeadRow, ...] | Trouble | None = None
    died_on: tuple[DiedOn, ...] = ()
    canary: Canary | None = None
    rest: Rest | None = None
    command: str = ""


@dataclass(frozen=True, slots=True)
class DeadFacts:
    """A dead job."""

    number: int
    id: str
    queue: str
    type: str
    priority: int
    attempt: int
    key: str | None
    created_at: datetime
    due_at: datetime
    expires: datetime | None
    updated_at: datetime
    died_at: datetime
    fingerprint: str | None
    died_on: DiedOn | None
    group: str | None


@dataclass(frozen=True, slots=True)
class DeadJobPage:
    """`/dead/NUMBER` (dead_job.html). `is_alive`: whether a live job has the id again."""

    job: DeadFacts
    payload: Text
    headers: Text
    checkpoint: Text
    error: Text
    trace: Trace | None
    is_alive: bool
    buttons: tuple[Button, ...] = ()


# -- pages: schedules, workers, doctor -------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """A schedule. `late_since` if its tick was to come by then. `last_state`: see JobState."""

    name: str
    spec: str
    queue: str
    type: str
    is_paused: bool
    next_run_at: datetime | None
    late_since: datetime | None
    last_run_at: datetime | None
    last_job_id: str | None
    last_state: str | None


@dataclass(frozen=True, slots=True)
class LimitsPage:
    """`/limits` (limits.html). Part: limits."""

    limits: tuple[LimitStatus, ...] | Trouble | None = None


@dataclass(frozen=True, slots=True)
class SchedulesPage:
    """`/schedules` (schedules.html). Part: schedules."""

    schedules: tuple[ScheduleRow, ...] | Trouble | None = None


@dataclass(frozen=True, slots=True)
class WorkersPage:
    """`/workers` (workers.html). Part: workers. The lost ones first."""

    workers: tuple[WorkerRow, ...] | Trouble | None = None


@dataclass(frozen=True, slots=True)
class WorkerPage:
    """`/workers/NUMBER` (worker.html). Part: worker."""

    number: int
    worker: WorkerRow | Trouble | None = None


@dataclass(frozen=True, slots=True)
class FindingRow:
    """A finding of the doctor; `severity`: "bad", "warn", "note", "ok"."""

    check: str
    severity: Literal["ok", "note", "warn", "bad"]
    text: str
    remedy: str


@dataclass(frozen=True, slots=True)
class DoctorPage:
    """`/doctor` (doctor.html). Asked on request (?run=1): before that `findings` is None.

    The worst findings first; an answer is kept for 30 s. `at` is when it was made.
    """

    findings: tuple[FindingRow, ...] | Trouble | None = None
    at: datetime | None = None
    seconds: float = 0.0


# -- answers that are no page of their own ---------------------------------------------


@dataclass(frozen=True, slots=True)
class ConfirmPage:
    """The question before what cannot be undone, or is much (confirm.html).

    `action` is a path below the root, `back` a path with its query, root included. `asks`: see
    Button. `sample` are a few of what it is about.
    """

    title: str
    text: str
    action: str
    fields: tuple[tuple[str, str], ...]
    button: str
    back: str
    is_dangerous: bool = True
    asks: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorPage:
    """Anything but an answer (error.html). `command` is selectable code, may be empty."""

    status: int
    title: str
    text: str
    remedy: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer of an action to a program; a browser is sent back to its page."""

    done: str
    count: int
    targets: tuple[str, ...] = field(default=())
