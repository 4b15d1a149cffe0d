"""Rows that several pages have: queues, workers, jobs, reasons."""

from collections.abc import Iterable, Sequence

from bgjob._explanation.words import first_line
from bgjob._sql.pages import DeadListed
from bgjob.doctor import LIMITS
from bgjob.explanation import Explanation, Reason
from bgjob.ext.web.frame import path
from bgjob.ext.web.parts import (
    Button,
    DeadRow,
    JobRow,
    LongestRow,
    QueueRow,
    ReasonRow,
    Why,
    WorkerRow,
)
from bgjob.ext.web.redaction import Redaction, Shown
from bgjob.ext.web.visit import Visit, seconds_ago
from bgjob.jobs import LiveJob
from bgjob.stats import CappedCount, Overview, QueueOverview
from bgjob.workers import WorkerStatus

_NONE = CappedCount(0, True)
_LONGEST = 200
"""Characters of an error in a list."""


def queue_rows(overview: Overview, workers: Sequence[WorkerStatus]) -> list[QueueRow]:
    """Return the queues that have jobs, a pause or a live worker; what hurts comes first."""
    slots: dict[str, list[int]] = {}
    for worker in workers:
        if worker.is_alive:
            for queue, number in worker.queues.items():
                counts = slots.setdefault(queue, [0, 0, 0])
                counts[0] += 1
                counts[1] += number
                counts[2] += worker.running.get(queue, 0)
    known = {queue.queue: queue for queue in overview.queues}
    for name in slots.keys() - known.keys():
        known[name] = QueueOverview(name, _NONE, _NONE, _NONE, _NONE, _NONE, None, False, None)
    rows = [
        _queue_row(overview, queue, *slots.get(name, (0, 0, 0))) for name, queue in known.items()
    ]
    return sorted(rows, key=_hurts)


def _queue_row(
    overview: Overview, queue: QueueOverview, workers: int, slots: int, busy: int
) -> QueueRow:
    is_waiting = bool(queue.due.number or queue.waiting_for_keys.number)
    state = "paused" if queue.is_paused else "no worker" if is_waiting and not workers else "open"
    age = queue.oldest_due_age or 0.0
    # As the alerts have it: a job that has been due for long, and a queue without workers.
    is_alarm = state != "paused" and (
        age > LIMITS.due_seconds or (state == "no worker" and age > LIMITS.unserved_seconds)
    )
    return QueueRow(
        queue.queue,
        state,  # type: ignore[arg-type]
        queue.paused_until,
        queue.due,
        seconds_ago(overview.at, queue.oldest_due_age),
        queue.delayed,
        queue.running,
        queue.waiting_for_keys,
        queue.dead,
        busy,
        slots,
        workers,
        is_alarm,
    )


def _hurts(row: QueueRow) -> tuple[object, ...]:
    oldest = -row.oldest_due_at.timestamp() if row.oldest_due_at else float("-inf")
    return (row.state != "no worker", -oldest, row.state != "paused", row.queue)


def worker_rows(workers: Iterable[WorkerStatus], redaction: Redaction) -> tuple[WorkerRow, ...]:
    """Return workers as they are listed: the lost ones first."""
    return tuple(
        WorkerRow(
            worker.number,
            worker.state,
            worker.host,
            worker.pid,
            worker.program,
            worker.release,
            worker.version,
            worker.started_at,
            worker.seen_at,
            tuple((name, worker.running.get(name, 0), n) for name, n in worker.queues.items()),
            tuple(worker.types),
            worker.lease,
            worker.every,
            worker.counts,
            longest_rows([worker]),
            None if worker.note is None else redaction.text(worker.note),
        )
        for worker in sorted(workers, key=lambda w: (w.state != "lost", not w.is_alive, w.number))
    )


def longest_rows(workers: Iterable[WorkerStatus]) -> tuple[LongestRow, ...]:
    """Return the jobs that have run longest, the first first."""
    rows = [
        LongestRow(job.id, job.since, worker.number, worker.host)
        for worker in workers
        for job in worker.longest
    ]
    return tuple(sorted(rows, key=lambda row: row.since))


def job_rows(jobs: Iterable[LiveJob], redaction: Redaction) -> tuple[JobRow, ...]:
    """Return live jobs as they are listed."""
    return tuple(
        JobRow(
            job.id,
            job.queue,
            job.type,
            job.priority,
            job.attempt,
            job.state,
            job.next_run_at,
            brief(redaction.error(Shown(job.id, job.queue, job.type, None, job.last_error))),
        )
        for job in jobs
    )


def dead_rows(jobs: Iterable[DeadListed], redaction: Redaction) -> tuple[DeadRow, ...]:
    """Return dead jobs as they are listed."""
    return tuple(
        DeadRow(
            job.number,
            job.id,
            job.queue,
            job.type,
            job.attempt,
            job.moved_at,
            brief(redaction.error(Shown(job.id, job.queue, job.type, None, job.last_error))),
        )
        for job in jobs
    )


def brief(error: str | None) -> str | None:
    """Return the first line of an error, as a list shows it."""
    if error is None:
        return None
    line = first_line(error)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def why(explanation: Explanation, visit: Visit) -> Why:
    """Return the reasons of an explanation, those that block first, with what lifts them."""
    rows = [_reason(reason, explanation, visit) for reason in explanation.reasons]
    rows.sort(key=lambda row: not row.blocks)
    return Why(explanation.id, explanation.state, tuple(rows))


def _reason(reason: Reason, explanation: Explanation, visit: Visit) -> ReasonRow:
    text = reason.text
    raw = reason.facts.get("last_error")
    if isinstance(raw, str):
        # The text quotes the error.
        kind = reason.facts.get("type")
        shown = visit.site.redaction.error(
            Shown(explanation.id or "", explanation.queue or "", str(kind or ""), None, raw)
        )
        text = text.replace(first_line(raw), first_line(shown) if shown else "")
    text = visit.site.redaction.text(text)
    return ReasonRow(reason.code, reason.blocks, text, reason.remedy, _button(reason, explanation))


def _button(reason: Reason, explanation: Explanation) -> Button | None:
    match reason.code:
        case "paused" if explanation.queue:
            action = path("queues", explanation.queue, "resume")
            return Button(f"Resume {explanation.queue}", action, "pause")
        case "dead":
            number = reason.facts.get("number")
            fields = (("numbers", str(number)),)
            return Button("Requeue", path("dead", "requeue"), "requeue", fields)
        case "schedule" if reason.facts.get("paused"):
            name = str(reason.facts.get("schedule"))
            return Button(f"Resume {name}", path("schedules", name, "resume"), "schedules")
        case "not_due" | "retry" if explanation.id and not reason.blocks:
            return Button("Run now", path("jobs", explanation.id, "now"), "jobs")
    return None


def matches(name: str, prefix: str) -> bool:
    """Whether a name begins with a prefix, whatever the case."""
    return name.casefold().startswith(prefix.casefold())
