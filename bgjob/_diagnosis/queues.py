"""Rows to findings: leases, due jobs, pauses, schedules, dead jobs."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

from bgjob._sql.backlog import MOST_DEAD, MOST_PAGES, Died, Due, Held, LateSchedule
from bgjob._words import count, lasting, literal
from bgjob.doctor import Finding, Limits
from bgjob.workers import WorkerStatus

_WORKER = "bgjob worker MODULE:NAME --queue"

_RECENT = 3600.0
"""Seconds for which a worker that has died or failed is reported."""

_MOST = 100
"""The most findings of the check workers."""


def leases(held: Held, limits: Limits, *, pages: int = MOST_PAGES) -> list[Finding]:
    """Report jobs whose worker died, and suspects.

    Args:
        held: the leases.
        limits: how long a lease may have ended.
        pages: how many pages of the table were read at most.

    """
    found = []
    for row in held.queues:
        facts = row._asdict()
        if row.ended:
            ago = row.ended_ago or 0
            found.append(
                Finding(
                    "leases",
                    "warn" if ago > limits.lease_seconds else "note",
                    f"queue {row.queue!r}: {count(row.ended, 'job')} of workers that died wait "
                    f"for a worker that sets them free; the first lease ended {lasting(ago)} ago",
                    f"start a worker: {_of(row.queue)}",
                    facts,
                )
            )
        if row.suspects:
            found.append(
                Finding(
                    "leases",
                    "note",
                    f"queue {row.queue!r}: two workers or more died with "
                    f"{count(row.suspects, 'job')}; one of these may kill its worker",
                    "select id, type, deaths, last_error from bgjob_job "
                    f"where queue = {literal(row.queue)} and deaths > 1 order by deaths desc",
                    facts,
                )
            )
    if held.pages > pages:
        found.append(
            Finding(
                "leases",
                "note",
                f"bgjob_job has {held.pages:,} pages, of which only the first {pages:,} were read",
                "for all of them: select queue, count(*), min(lease_until) from bgjob_job "
                "where lease_until <= now() group by queue",
                {"pages": held.pages},
            )
        )
    running = sum(row.held for row in held.queues)
    text = f"{count(running, 'job')} held by workers, no lease has ended"
    return found or [Finding("leases", "ok", text, facts={"held": running})]


def due(rows: Sequence[Due], workers: Sequence[WorkerStatus], limits: Limits) -> list[Finding]:
    """Report queues whose oldest due job waits for too long; not paused ones.

    Args:
        rows: the queues with due jobs, the one with the oldest first.
        workers: the registered workers.
        limits: how long a job may be due.

    """
    late = [row for row in rows if not row.is_paused and row.seconds > limits.due_seconds]
    found = []
    for row in late:
        of_queue = [w for w in workers if w.is_alive and row.queue in w.queues]
        free = sum(max(w.queues[row.queue] - w.running.get(row.queue, 0), 0) for w in of_queue)
        slots = sum(w.queues[row.queue] for w in of_queue)
        unlimited = row.unlimited_seconds or 0.0
        is_stuck = free > 0 and unlimited > limits.stuck_seconds
        text = f"queue {row.queue!r}: its oldest due job has waited for {lasting(row.seconds)}"
        if of_queue:
            text += f"; {free:,} of the {count(slots, 'slot')} of its workers are free"
        if unlimited <= limits.due_seconds:
            text += "; it waits for a limit of its queue or its type"
            remedy = "bgjob limit list shows what of it is in use; bgjob limit set changes it"
        elif is_stuck:
            remedy = "see the errors of its workers (bgjob workers --json), and restart them"
        else:
            remedy = f"start {'more workers' if of_queue else 'a worker'}: {_of(row.queue)}"
        facts = row._asdict() | {"workers": len(of_queue), "slots": slots, "free": free}
        found.append(Finding("due", "bad" if is_stuck else "warn", text, remedy, facts))
    if found:
        return found + _rest("due", rows, "queues with due jobs")
    oldest = max((row.seconds for row in rows if not row.is_paused), default=None)
    text = "no job is due" if oldest is None else f"the oldest due job waits {lasting(oldest)}"
    return [Finding("due", "ok", text, facts={"seconds": oldest})]


def workers(
    rows: Sequence[Due], workers: Sequence[WorkerStatus], sessions: int, limits: Limits
) -> list[Finding]:
    """Report queues without a worker, and workers that died, failed or differ.

    Args:
        rows: the queues with due jobs.
        workers: the registered workers, of the last day.
        sessions: the sessions of workers that are connected, registered or not.
        limits: how long a job may be due in a queue without a worker.

    """
    alive = [worker for worker in workers if worker.is_alive]
    served = {queue for worker in alive for queue in worker.queues}
    found = []
    # A worker need not be in the registry. If one may be missing there, nothing is certain.
    is_certain = not sessions or bool(alive)
    for row in rows:
        if row.queue in served or row.is_paused or row.seconds <= limits.unserved_seconds:
            continue
        found.append(
            Finding(
                "workers",
                "bad" if is_certain else "warn",
                f"queue {row.queue!r} has due jobs, the oldest for {lasting(row.seconds)}, and no "
                "worker" + ("" if is_certain else " in bgjob_worker, which misses some"),
                f"start a worker: {_of(row.queue)}",
                row._asdict() | {"sessions": sessions},
            )
        )
    for worker in workers:
        if worker.state not in {"lost", "failed"} or worker.not_seen > _RECENT:
            continue
        if worker.state == "failed":
            text = f"{_named(worker)} ended on its own {lasting(worker.not_seen)} ago"
            text += f": {worker.note}" if worker.note else ""
            remedy = "start it again; a supervisor does (systemd, Kubernetes)"
        else:
            text = (
                f"{_named(worker)} has not been seen for {lasting(worker.not_seen)}: it was "
                "killed, or is cut off; its jobs run again when their leases have ended"
            )
            remedy = f"look at process {worker.pid} on {worker.host}, and start another worker"
        facts = {"number": worker.number, "host": worker.host, "pid": worker.pid}
        facts |= {"state": worker.state, "not_seen": worker.not_seen, "note": worker.note}
        found.append(
            Finding("workers", "warn" if worker.state == "failed" else "note", text, remedy, facts)
        )
    releases = Counter((worker.release, worker.version) for worker in alive)
    if len(releases) > 1:
        each = ", ".join(
            f"{number:,} of {release or 'no release'} (bgjob {version})"
            for (release, version), number in releases.most_common(10)
        )
        remedy = "if no roll-out is in progress, restart the old ones, which `bgjob workers` lists"
        found.append(Finding("workers", "note", f"several releases at once: {each}", remedy))
    text = f"{count(len(alive), 'worker')} at work"
    return found[:_MOST] or [Finding("workers", "ok", text, facts={"workers": len(alive)})]


def _named(worker: WorkerStatus) -> str:
    return f"worker {worker.number} ({worker.host}, pid {worker.pid}, {worker.program})"


def _of(queue: str) -> str:
    return f"{_WORKER} {shlex.quote(queue)}"


def pauses(paused: Mapping[str, datetime | None], rows: Sequence[Due]) -> list[Finding]:
    """Report paused queues; a warning for those with due jobs and without an end."""
    waiting = {row.queue: row.seconds for row in rows}
    found = []
    for queue, until in paused.items():
        end = "until it is resumed" if until is None else f"until {until:%Y-%m-%d %H:%M:%S%z}"
        text = f"queue {queue!r} is paused {end}"
        if queue in waiting:
            text += f"; its oldest due job has waited for {lasting(waiting[queue])}"
        is_stuck = until is None and queue in waiting
        facts = {"queue": queue, "until": until, "seconds": waiting.get(queue)}
        found.append(
            Finding(
                "pauses",
                "warn" if is_stuck else "note",
                text,
                f"bgjob resume {shlex.quote(queue)}",
                facts,
            )
        )
    found.sort(key=lambda finding: finding.severity, reverse=True)  # "warn" before "note"
    return found or [Finding("pauses", "ok", "no queue is paused")]


def schedules(rows: Sequence[LateSchedule]) -> list[Finding]:
    """Report schedules that no worker runs."""
    found = [
        Finding(
            "schedules",
            "warn",
            f"schedule {row.name!r} ({row.spec}) was to run {lasting(row.seconds)} ago: no worker "
            "has it",
            "start a worker that has it; or, if none shall: bgjob schedules remove "
            f"{shlex.quote(row.name)}",
            row._asdict(),
        )
        for row in rows
    ]
    if found:
        more = rows[0].schedules - len(rows)
        return found + _more("schedules", more, "late schedules", "bgjob schedules list")
    return [Finding("schedules", "ok", "no schedule is late")]


def died(rows: Sequence[Died], limits: Limits) -> list[Finding]:
    """Report that many jobs died within the last hour, or that any had no handler."""
    found = []
    for row in rows:
        options = f"--queue {shlex.quote(row.queue)} --type {shlex.quote(row.type)}"
        if row.unknown:
            found.append(
                Finding(
                    "dead",
                    "warn",
                    f"queue {row.queue!r}: {count(row.unknown, 'job')} of type {row.type!r} died "
                    "within the last hour because a worker has no handler for it",
                    "deploy a worker that registers the type, or queue these jobs elsewhere; "
                    f"then: bgjob triage {options}",
                    row._asdict(),
                )
            )
    jobs = sum(row.jobs for row in rows)
    is_capped = bool(rows) and jobs >= MOST_DEAD
    text = f"{count(jobs, 'job')}{' or more' if is_capped else ''} died within the last hour"
    facts = {"jobs": jobs, "queues": [row._asdict() for row in rows]}
    if jobs > limits.died:
        most = rows[0]
        found.append(
            Finding(
                "dead",
                "warn",
                f"{text}; most, {most.jobs:,}, of type {most.type!r} in queue {most.queue!r}",
                f"bgjob triage --since 1h --queue {shlex.quote(most.queue)} "
                f"--type {shlex.quote(most.type)}",
                facts,
            )
        )
    return found or [Finding("dead", "ok", text, facts=facts)]


def _rest(check: str, rows: Sequence[Due], noun: str) -> list[Finding]:
    more = rows[0].queues - len(rows) if rows else 0
    return _more(check, more, noun, "bgjob stats")


def _more(check: str, more: int, noun: str, remedy: str) -> list[Finding]:
    if more <= 0:
        return []
    return [Finding(check, "note", f"{more:,} more {noun}", remedy, {"more": more})]
