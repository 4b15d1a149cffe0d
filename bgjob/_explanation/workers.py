"""Rules of the workers that would run a job."""

from datetime import datetime, timedelta

from bgjob._explanation import words
from bgjob._explanation.seen import Reasons, Seen
from bgjob._sql.looks import QueueWorker
from bgjob._words import count, lasting
from bgjob.explanation import Reason

_MOST_RELEASES = 5


def no_worker(seen: Seen) -> Reasons:
    """Yield that no worker claims from its queue."""
    job, known = seen.job, seen.workers
    if job is None or known is None or words.working(seen):
        return
    # A worker need not be in the registry. If one may be missing there, nothing is certain.
    is_certain = not seen.sessions or bool(known.alive)
    text = f"No worker claims from queue {job.queue!r}"
    if known.workers:
        text += f"; the last, {words.last_of(known.workers[0])}"
    elif is_certain:
        text += ", and none of the last day did"
    if not is_certain:
        text += (
            f", as far as bgjob_worker has them; but {count(seen.sessions, 'session')} of workers "
            f"{'is' if seen.sessions == 1 else 'are'} connected"
        )
    facts: dict[str, object] = {"sessions": seen.sessions}
    if known.workers:
        last = known.workers[0]
        facts |= {"last_worker": last.number, "last_state": last.state, "not_seen": last.not_seen}
    yield Reason(
        "no_worker",
        is_certain,
        f"{text}.",
        f"start a worker: {words.worker_command(job.queue)}",
        facts,
    )


def busy(seen: Seen) -> Reasons:
    """Yield that the workers on its queue have no free slot."""
    job, working = seen.job, words.working(seen)
    if job is None or not working or job.due_in > 0:
        return
    slots = sum(worker.slots for worker in working)
    busy = sum(worker.busy for worker in working)
    if busy < slots:
        return
    yield Reason(
        "busy",
        False,
        f"{words.number_of(working)} on queue {job.queue!r}; {busy:,} of their "
        f"{count(slots, 'slot')} {'is' if slots == 1 else 'are'} busy.",
        f"if they stay so, start more workers: {words.worker_command(job.queue)}; what they run: "
        f"bgjob workers {words.option('--queue', job.queue)}",
        {"workers": len(working), "slots": slots, "busy": busy},
    )


def no_handler(seen: Seen) -> Reasons:
    """Yield that workers on its queue have no handler for its type."""
    job, working = seen.job, words.working(seen)
    if job is None:
        return
    without = [worker for worker in working if not worker.has_handler]
    if not without:
        return
    releases = list(dict.fromkeys(worker.release or "without a name" for worker in without))
    named = ", ".join(releases[:_MOST_RELEASES]) + (", …" * (len(releases) > _MOST_RELEASES))
    release = f"release{'s' * (len(releases) > 1)} {named}"
    facts: dict[str, object] = {
        "type": job.type,
        "without": len(without),
        "workers": len(working),
        "releases": releases,
    }
    place = f"queue {job.queue!r} ({release})"
    fate, until = _fate(seen, without)
    facts["put_back_until"] = until
    if len(without) == len(working):
        nobody = (
            f"The only worker on {place} has no"
            if len(working) == 1
            else f"None of the {len(working):,} workers on {place} has a"
        )
        yield Reason(
            "no_handler",
            True,
            f"{nobody} handler for type {job.type!r}: whichever claims it {fate}.",
            "start workers of a release that has the type; to keep the job until then: bgjob "
            f"pause {words.argument(job.queue)}",
            facts,
        )
        return
    have = "has" if len(without) == 1 else "have"
    yield Reason(
        "no_handler",
        False,
        f"{len(without):,} of the {len(working):,} workers on {place} {have} no handler for type "
        f"{job.type!r}: whichever claims it first decides whether it runs; such a worker {fate}.",
        f"restart the old ones: bgjob workers {words.option('--queue', job.queue)}",
        facts,
    )


def _fate(seen: Seen, without: list[QueueWorker]) -> tuple[str, datetime | None]:
    """Return what these workers do with the job, and until when one of them puts it back."""
    job = seen.job
    assert job is not None  # noqa: S101 (the caller checks)
    ends = [
        end
        for worker in without
        if worker.unknown_for is not None
        and (end := job.created_at + timedelta(seconds=worker.unknown_for)) > seen.now
    ]
    buries = "moves it to the dead-letter table"
    if not ends:
        return buries, None
    until = max(ends)
    left = lasting((until - seen.now).total_seconds())
    back = f"puts it back until {words.moment(until)}, for another {left}"
    if len(ends) == len(without):
        return f"{back}, and then {buries}", until
    return f"{buries}, or {back}: {len(ends):,} of the {len(without):,} put it back", until


def ready(seen: Seen) -> Reason:
    """Return that nothing is in its way."""
    working = words.working(seen)
    slots = sum(worker.slots for worker in working)
    busy = sum(worker.busy for worker in working)
    return Reason(
        "ready",
        False,
        "Nothing is in its way: a worker with a free slot takes it within its poll interval. "
        f"{words.number_of(working)} on its queue, with {slots - busy:,} of "
        f"{count(slots, 'slot')} free.",
        facts={"workers": len(working), "slots": slots, "busy": busy},
    )
