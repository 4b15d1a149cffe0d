"""Words of reasons: times, workers, claims, arguments of commands."""

import shlex
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from bgjob._explanation.seen import THE_WORKERS, Seen
from bgjob._sql.looks import CAP, Claimant, QueueWorker
from bgjob._sql.tokens import origin
from bgjob._words import count, lasting

_WORKER = "bgjob worker MODULE:NAME"

_LONGEST = 300
"""Characters of an error: its first line, as a rule."""

_SKEW = timedelta(minutes=1)
"""A claim that is later than now by more is none: its token was made at random."""

_UNKNOWN_WORKER = "a worker that is not in bgjob_worker"

Facts: TypeAlias = dict[str, object]


def claim(token: int | None, by: Claimant | None, seen: Seen) -> tuple[datetime | None, str, Facts]:
    """Return since when a claim is, whose it is in words, and both as facts."""
    made = None if token is None else origin(token)
    since = None if made is None or made.at > seen.now + _SKEW else made.at
    if by is not None:
        facts: Facts = {"since": since, "worker": by.number, "host": by.host, "pid": by.pid}
        facts |= {"program": by.program, "release": by.release}
        facts |= {"worker_state": by.state, "not_seen": by.not_seen}
        return since, _named(by), facts
    nobody: Facts = {"worker": None}
    if made is None or since is None:
        return None, _UNKNOWN_WORKER, {"since": None} | nobody
    if made.number is None:
        whom = "a worker without a row in bgjob_worker, or in a client's do()"
        return since, whom, {"since": since} | nobody
    if not seen.has_read(THE_WORKERS):
        return since, f"worker {made.number}", {"since": since, "worker": made.number}
    # Its number is nobody's, so its time need not be one either: an older version of bgjob made
    # tokens at random.
    return None, _UNKNOWN_WORKER, {"since": None} | nobody


def _named(by: Claimant) -> str:
    release = f", release {by.release}" if by.release else ""
    named = f"worker {by.number} ({by.host}, pid {by.pid}, {by.program}{release})"
    end: dict[str, str] = {
        "lost": f", which has not been seen for {lasting(by.not_seen)}",
        "ended": f", which ended {lasting(by.not_seen)} ago",
        "failed": f", which failed {lasting(by.not_seen)} ago",
        "stopping": ", which shuts down",
    }
    return named + end.get(by.state, "")


def last_of(worker: QueueWorker) -> str:
    """Return a worker, and what became of it."""
    named = f"worker {worker.number} ({worker.host}, pid {worker.pid})"
    match worker.state:
        case "lost":
            return f"{named}, has not been seen for {lasting(worker.not_seen)}"
        case "stopping":
            return f"{named}, shuts down"
    return f"{named}, {worker.state} {lasting(worker.not_seen)} ago"


def working(seen: Seen) -> list[QueueWorker]:
    """Return the workers that claim from the queue."""
    if seen.workers is None or seen.is_running:
        return []
    return [worker for worker in seen.workers.workers if worker.state == "working"]


def number_of(working: list[QueueWorker]) -> str:
    """Return how many workers there are, with the verb."""
    return f"{count(len(working), 'worker')} {'is' if len(working) == 1 else 'are'}"


def since_when(at: datetime | None, now: datetime) -> str:
    """Return since when, and for how long; empty if that is unknown."""
    if at is None:
        return ""
    return f" since {moment(at)} ({lasting((now - at).total_seconds())})"


def moment(at: datetime) -> str:
    """Return a time."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def capped(number: int) -> str:
    """Return a number of jobs that were counted up to the cap."""
    return f"{number:,} or more" if number >= CAP else f"{number:,}"


def first_line(error: str | None) -> str:
    """Return the first line of an error."""
    line = next((line for line in (error or "").splitlines() if line.strip()), "no error").strip()
    line = line.removesuffix(".")
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def worker_command(queue: str) -> str:
    """Return the command that starts a worker of a queue."""
    return f"{_WORKER} {option('--queue', queue)}"


def argument(value: str) -> str:
    """Return a value as an argument of a command."""
    return f"-- {shlex.quote(value)}" if value.startswith("-") else shlex.quote(value)


def option(name: str, value: str) -> str:
    """Return an option of a command with its value."""
    return f"{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"
