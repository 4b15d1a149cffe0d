"""The findings of `client.doctor()` and `bgjob doctor`: what is wrong, and how to end it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["ok", "note", "warn", "bad"]
"""`ok`: as it should be. `note`: to know. `warn`: look at it. `bad`: act now."""

_STATUS: Mapping[Severity, int] = {"ok": 0, "note": 0, "warn": 3, "bad": 4}


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of a check.

    Attributes:
        check: the check's name, such as `horizon`.
        severity: `ok`, `note`, `warn` or `bad`.
        text: what was found, in a sentence; it names the culprit.
        remedy: what to do: SQL, a command, or a sentence. Empty only if all is well.
        facts: the values behind the text, such as `pid`, for programs. What is in it
            depends on the check.

    """

    check: str
    severity: Severity
    text: str
    remedy: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.severity != "ok" and not self.remedy:
            raise ValueError(f"remedy of {self.check} is required: {self.text}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What counts as too much: above a limit a finding is a warning, or bad where it says so.

    Attributes:
        horizon_seconds: the age of a transaction that keeps dead rows; 60 s.
        horizon_transactions: how many transactions it is behind; 10,000.
        horizon_dead_rows: the dead rows of bgjob's tables from which an old
            transaction is bad; 100,000.
        lock_seconds: the wait for a lock on bgjob's tables that is bad; 5 s.
        table_dead_rows: the dead rows of a table that has fewer live ones; 50,000.
        index_bytes: the size from which an index may be called bloated; 64 MB.
        lease_seconds: how long a lease has ended without a worker that sets its job
            free; 60 s.
        due_seconds: the age of the oldest due job of a queue; 300 s.
        stuck_seconds: the same, bad if its workers have free slots; 3,600 s.
        unserved_seconds: the same, bad if it has no worker; 60 s.
        schedule_seconds: how late a schedule is; 60 s.
        died: jobs that died within the last hour; 100.
        connections: the part of the allowed connections that is in use; 0.8.
        connections_bad: the same, bad; 0.95.
        notify: the part of the queue of notifications that is full; 0.05.
        notify_bad: the same, bad; 0.5.

    """

    horizon_seconds: float = 60
    horizon_transactions: int = 10_000
    horizon_dead_rows: int = 100_000
    lock_seconds: float = 5
    table_dead_rows: int = 50_000
    index_bytes: int = 64_000_000
    lease_seconds: float = 60
    due_seconds: float = 300
    stuck_seconds: float = 3600
    unserved_seconds: float = 60
    schedule_seconds: float = 60
    died: int = 100
    connections: float = 0.8
    connections_bad: float = 0.95
    notify: float = 0.05
    notify_bad: float = 0.5


LIMITS = Limits()
"""The default limits."""


def exit_status(findings: Iterable[Finding]) -> int:
    """Return 4 if a finding is bad, else 3 if one is a warning, else 0."""
    return max((_STATUS[finding.severity] for finding in findings), default=0)
