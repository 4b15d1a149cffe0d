"""Try one dead job of a group again, and tell how it ends."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from time import monotonic
from typing import NamedTuple

from bgjob._failure import fingerprint as fingerprint_of_text
from bgjob._failure import normalised
from bgjob._sql import dead, enqueues, looks, pauses, session, triage
from bgjob._sql.dead import DeadFilter
from bgjob._sql.tokens import origin
from bgjob._triage import Pause, Steps
from bgjob.errors import CanaryRefusedError
from bgjob.job import DeadJob
from bgjob.triage import Canary

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
"""Seconds between two looks; each is half as long again as the one before."""


class Options(NamedTuple):
    """The arguments of `canary`; see AsyncDlq."""

    wait: float
    one_try: bool
    force: bool
    notify: bool
    progress: Callable[[Canary], object] | None


def canary(fingerprint: str, options: Options) -> Steps[Canary]:
    """Move the latest job of a group back, and watch it."""
    job: DeadJob | None = yield triage.canary(dead.number_of(fingerprint))
    if job is None:
        raise CanaryRefusedError(
            f"no dead job has the fingerprint {fingerprint!r}, or all of them are in their queues "
            "again: bgjob triage lists the groups"
        )
    if options.one_try:
        yield from _check_privileges()
    if not options.force:
        yield from _check_workers(job)
    requeued: dead.Requeued = yield dead.requeue(DeadFilter(numbers=[job.number]))
    if not requeued.ids:
        raise CanaryRefusedError(
            f"dead job {job.id!r} was moved or purged, or its id was enqueued again, in this very "
            "moment: try again"
        )
    began = monotonic()
    if options.notify:
        yield enqueues.tell_all(requeued.queues)
    seen = Canary("undecided", job.id, job.queue, job.type, fingerprint, None, None, 0.0, "")
    _tell(options, seen)
    pause = _FIRST_PAUSE
    while True:
        found: triage.State = yield triage.state(job.id, job.number)
        took = monotonic() - began
        last, seen = seen, _judged(seen, found, job, requeued.due, took)
        if seen.verdict == "failed" and options.one_try:
            number: int | None = yield triage.give_up(
                job.id, found.attempt or 0, _group_of(job, seen.error)
            )
            if number is None:  # a worker has claimed it again meanwhile
                seen = replace(seen, verdict="undecided")
            else:
                seen = replace(seen, number=number)
        if seen.verdict != "undecided" or took >= options.wait:
            return replace(seen, took=took)
        if seen != last:
            _tell(options, seen)
        yield Pause(min(pause, options.wait - took))
        pause = min(1.5 * pause, _LONGEST_PAUSE)


def _tell(options: Options, seen: Canary) -> None:
    if options.progress is not None:
        options.progress(seen)


def _check_privileges() -> Steps[None]:
    lacks: list[session.Lack] = yield session.lacks([("bgjob_job", "delete")], [])
    if lacks:
        raise CanaryRefusedError(
            f"role {lacks[0].role!r} may not delete jobs, so it cannot give up a canary that "
            "failed: take one that also has bgjob_editor of privileges.sql, or do without one_try"
        )


def _check_workers(job: DeadJob) -> Steps[None]:
    paused = yield pauses.paused()
    if job.queue in paused:
        raise CanaryRefusedError(
            f"queue {job.queue!r} is paused, so nothing would run the canary; resume it (bgjob "
            "resume), or pass force"
        )
    known: looks.QueueWorkers = yield looks.workers_of(job.queue, job.type)
    working = [worker for worker in known.workers if worker.state == "working"]
    if not any(worker.has_handler for worker in working):
        lack = (
            f"none of the {len(working):,} live workers of queue {job.queue!r} has a handler for "
            f"type {job.type!r}"
            if working
            else f"no live worker is known that claims from queue {job.queue!r}"
        )
        raise CanaryRefusedError(
            f"{lack}, so nothing would run the canary; start one, or pass force (bgjob workers "
            "lists them)"
        )


def _judged(
    seen: Canary, found: triage.State, job: DeadJob, due: datetime | None, took: float
) -> Canary:
    if found.number is not None:
        return replace(seen, verdict="dead", number=found.number, error=found.error)
    if found.attempt is None or found.created_at != job.created_at:
        return replace(seen, verdict="completed")  # a new job may have its id
    if found.token is not None:
        made = origin(found.token)
        worker = None if made is None else made.number
        return seen if seen.claimed else replace(seen, claimed=took, worker=worker)
    if found.attempt > 0:
        return replace(seen, verdict="failed", error=found.error)
    if found.next_run_at != due and not found.waits:
        return replace(seen, verdict="rescheduled")
    return seen


def _group_of(job: DeadJob, error: str) -> int:
    """Return the fingerprint of a canary that is given up: the old one if the error is the same.

    Only its text is known here.
    """
    if normalised(error) == normalised(job.last_error or ""):
        return dead.number_of(job.fingerprint)
    return fingerprint_of_text(job.type, error)
