"""The values that a preflight returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["note", "warn", "bad"]
"""`note`: to know. `warn`: look at it. `bad`: this release would dead-letter jobs unhandled."""

_STATUS: Mapping[Severity, int] = {"note": 0, "warn": 3, "bad": 4}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that this release would do to jobs or schedules, or could not be read.

    Attributes:
        code: what kind it is: `no_handler`, `payload`, `attempts_over`, `last_attempt`,
            `key_raises`, `key_differs`, `schedule_gone`, `schedule_no_handler`,
            `schedule_payload`, `schedule_changes`, `dead_fit`, `other_release`, `unread`,
            `hidden`.
        severity: `note`, `warn` or `bad`.
        text: what was found, in a sentence.
        remedy: what to do.
        queue: the queue; None if it concerns none in particular.
        type: the job type; None likewise.
        count: the jobs or schedules that it concerns; at least so many with a sample.
        ids: the ids of the first three, or the name of the schedule.
        problem: the same in a few words, such as the field that does not fit.

    """

    code: str
    severity: Severity
    text: str
    remedy: str
    queue: str | None = None
    type: str | None = None
    count: int = 0
    ids: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TypeFit:
    """The live jobs of one type in one queue.

    Attributes:
        queue: the queue.
        type: the job type.
        jobs: how many there are, waiting or running.
        fit: how many were looked at and would be handled; with a sample at most that many.
        lost: how many were looked at and would be dead-lettered unhandled: their type has
            no handler, their payload does not fit, or their attempts are over.
        has_handler: whether the type has a handler.
        is_decoded: whether payloads were decoded: the type has a codec and is not left out.

    """

    queue: str
    type: str
    jobs: int
    fit: int
    lost: int
    has_handler: bool
    is_decoded: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What a preflight found.

    Attributes:
        findings: the worst first.
        types: the live jobs by queue and type.
        jobs: the live jobs that were counted.
        dead: the dead jobs that were looked through.
        seconds: how long it took.
        is_complete: False if the time limit ended it: then nothing is known about the rest.

    """

    findings: tuple[Finding, ...]
    types: tuple[TypeFit, ...]
    jobs: int
    dead: int
    seconds: float
    is_complete: bool

    @property
    def lost(self) -> int:
        """The live jobs that this release would dead-letter unhandled."""
        return sum(fit.lost for fit in self.types)

    @property
    def status(self) -> int:
        """The exit status of the command: 4 if a finding is bad, else 3 for a warning, else 0."""
        return max((_STATUS[finding.severity] for finding in self.findings), default=0)
