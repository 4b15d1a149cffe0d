"""Rules of a live job: its claim, its time, and what it waits behind."""

from collections.abc import Sequence

from bgjob._explanation import words
from bgjob._explanation.seen import Reasons, Seen
from bgjob._sql.looks import CAP, KeyHolder, Live
from bgjob._words import count, lasting, literal
from bgjob.explanation import Reason
from bgjob.limit import LimitStatus

_NAMED = 5
"""The holders of a key that are named, besides the first."""


def running(seen: Seen) -> Reasons:
    """Yield which worker holds it, and since when."""
    job = seen.job
    if job is None or not seen.is_running:
        return
    since, whom, facts = words.claim(job.token, seen.claimant, seen)
    left = f"in {lasting(job.lease_left or 0)}"
    text = f"It runs{words.since_when(since, seen.now)}, attempt {job.attempt}, on {whom}; "
    text += "its lease ends "
    if seen.claimant is None:
        text += left
    elif seen.claimant.state in {"working", "stopping"}:
        text += f"{left} and is extended while it runs"
    else:
        text += f"{left}; unless it is extended, the job is then due again"
    facts |= {
        "attempt": job.attempt,
        "lease_until": job.lease_until,
        "is_replaced": job.is_replaced,
        "checkpoint": job.saved,
    }
    text += "." + " A newer request with its id waits for its end." * job.is_replaced
    yield Reason("running", False, text + _saved(job), facts=facts)


def lease_ended(seen: Seen) -> Reasons:
    """Yield that its lease has ended, and that no worker has freed it yet."""
    job = seen.job
    if job is None or job.lease_left is None or seen.is_running:
        return
    since, whom, facts = words.claim(job.token, seen.claimant, seen)
    at = "" if since is None else f" at {words.moment(since)}"
    yield Reason(
        "lease_ended",
        False,
        f"It was claimed{at} by {whom}, for attempt {job.attempt}; its lease ended "
        f"{lasting(-job.lease_left)} ago. The next full look of a worker of its queue sets it "
        "free, and it is due again.",
        facts=facts | {"attempt": job.attempt, "lease_until": job.lease_until},
    )


def group(seen: Seen) -> Reasons:
    """Yield which jobs of its group are live."""
    job, members = seen.job, seen.members
    if job is None or not job.waits_for_group:
        return
    if members is None or members.last is None:
        text = "It runs when no job of its group is live any more"
        if members is not None:
            text += ", which is so: the next full look of a worker of its queue makes it due"
        yield Reason("group", False, f"{text}.", facts={"live": members and members.live})
        return
    are = "is" if members.live == 1 else "are"
    yield Reason(
        "group",
        False,
        f"It runs when no job of its group is live any more: {words.capped(members.live)} {are}, "
        f"{members.running:,} of them running; the last one is {members.last!r}.",
        f"see what holds that one up: bgjob explain {words.argument(members.last)}",
        {**members._asdict(), "is_exact": members.live < CAP},
    )


def not_due(seen: Seen) -> Reasons:
    """Yield when it is due, at first or after an attempt that failed."""
    job = seen.job
    if job is None or seen.is_running or job.due_in <= 0 or job.waits_for_group:
        return
    is_retry = job.attempt > 0 and job.last_error is not None
    facts: dict[str, object] = {"next_run_at": job.next_run_at, "attempt": job.attempt}
    text = ""
    if is_retry:
        error = words.first_line(job.last_error)
        text = f"Attempt {job.attempt} ended with: {error}. "
        facts["last_error"] = job.last_error
    code = "retry" if is_retry else "not_due"
    if job.is_never_due:
        yield Reason(
            code,
            True,
            f"{text}It is never due: its time is infinite.",
            "to run it now: update bgjob_job set next_run_at = clock_timestamp() "
            f"where id = {literal(job.id)}",
            facts,
        )
        return
    text += f"It is due in {lasting(job.due_in)}, at {words.moment(job.next_run_at)}"
    text += f", for attempt {job.attempt + 1}." if job.attempt else "."
    yield Reason(code, False, text + _saved(job), facts=facts | {"checkpoint": job.saved})


def _saved(job: Live) -> str:
    """Return how far it is, in words; the checkpoint itself may be private, as a payload is."""
    if job.saved is None:
        return ""
    size = count(job.saved, "byte")
    return f" It has saved a checkpoint of {size}: bgjob job show {words.argument(job.id)}"


def expires(seen: Seen) -> Reasons:
    """Yield when it expires, or that it has expired."""
    job = seen.job
    if job is None or seen.is_running or job.expires is None or job.expires_in is None:
        return
    facts: dict[str, object] = {"expires": job.expires}
    if job.expires_in > 0:
        yield Reason(
            "expires",
            False,
            f"It expires in {lasting(job.expires_in)}, at {words.moment(job.expires)}: started "
            "later it is not run, but moved to the dead-letter table.",
            facts=facts,
        )
        return
    yield Reason(
        "expired",
        False,
        f"It expired {lasting(-job.expires_in)} ago, at {words.moment(job.expires)}: the worker "
        "that claims it does not run it, but moves it to the dead-letter table.",
        "to run it once it is there, without an expiry: bgjob dlq requeue "
        f"{words.option('--id', job.id)}",
        facts,
    )


def paused(seen: Seen) -> Reasons:
    """Yield that its queue is paused."""
    job, pause = seen.job, seen.pause
    if job is None or pause is None:
        return
    text = f"Queue {job.queue!r} is paused "
    if pause.until is None:
        text += "until it is resumed."
    else:
        left = (pause.until - seen.now).total_seconds()
        text += f"until {words.moment(pause.until)}, for another {lasting(left)}."
    yield Reason(
        "paused",
        pause.until is None,
        text,
        f"bgjob resume {words.argument(job.queue)}",
        {"until": pause.until},
    )


def limited(seen: Seen) -> Reasons:
    """Yield which limits, of its queue or type, have no room for another start or running job."""
    if seen.job is not None:
        for status in seen.limits:
            yield from _limited(status)


def _limited(found: LimitStatus) -> Reasons:
    limit = found.limit
    waits: list[str] = []
    if limit.concurrency is not None and found.places >= limit.concurrency:
        waits.append(
            f"{count(found.workers, 'worker')} {'has' if found.workers == 1 else 'have'} all "
            f"{count(limit.concurrency, 'place')}"
        )
    if found.next_in > 0:
        waits.append(f"the next job may start in {lasting(found.next_in)}")
    if not waits:
        return
    where = "set" if found.is_set else "in the code of its workers"
    yield Reason(
        "limited",
        False,
        f"{found.scope.capitalize()} {found.name!r} has a limit ({where}): {limit}; "
        f"{', and '.join(waits)}.",
        f"to change it: bgjob limit set {found.scope} {words.argument(found.name)}",
        {
            "scope": found.scope,
            "concurrency": limit.concurrency,
            "rate": limit.rate,
            "burst": limit.burst_size,
            "is_set": found.is_set,
            "places": found.places,
            "tokens": found.tokens,
            "next_in": found.next_in,
        },
    )


def key(seen: Seen) -> Reasons:
    """Yield which jobs hold its exclusive key, or that it is free."""
    job, key = seen.job, seen.key
    if job is None or key is None:
        return
    before = f"; {words.capped(key.before)} of its queue come before it" if key.before else ""
    facts: dict[str, object] = {"key": job.exclusive, "slots": key.slots, "before": key.before}
    verb = "waits for" if job.waits else "needs"
    name, which, holds = f"the exclusive key {job.exclusive!r}", "which", "holds"
    if key.slots > 1:
        name, which, holds = f"one of the {key.slots:,} slots of {name}", "of which", "holds one"
    if key.is_free:
        if job.waits:
            free = "which nobody holds"
            if key.slots > 1:
                free = f"of which {key.slots - len(key.holders):,} are free"
            yield Reason(
                "key_free",
                False,
                f"It waits for {name}, {free}: the next full look of a worker of its queue finds "
                f"that{before}.",
                facts=facts,
            )
        return
    if job.id in {each.id for each in key.holders}:
        return
    holder, *others = key.holders
    since, whom, claim = words.claim(holder.token, seen.key_claimant, seen)
    if holder.lease_left > 0:
        lease = f"its lease ends in {lasting(holder.lease_left)}"
    else:
        lease = (
            f"its lease ended {lasting(-holder.lease_left)} ago, and the next full look of a "
            "worker of either queue sets the key free"
        )
    also = f"; {_hold(others)} {'it too' if key.slots == 1 else 'the others'}" if others else ""
    yield Reason(
        "key_held",
        False,
        f"It {verb} {name}, {which} job {holder.id!r} (queue {holder.queue!r}, type "
        f"{holder.type!r}) {holds}{words.since_when(since, seen.now)} on {whom}; "
        f"{lease}{also}{before}.",
        f"see what holds that one up: bgjob explain {words.argument(holder.id)}",
        facts
        | {"holder": holder.id, "holder_queue": holder.queue}
        | {"others": [other.id for other in others[:_NAMED]]}
        | claim,
    )


def _hold(others: Sequence[KeyHolder]) -> str:
    """Return which jobs hold a key, in words."""
    names = [repr(each.id) for each in others[:_NAMED]]
    if len(others) > _NAMED:
        names.append(f"{len(others) - _NAMED:,} more")
    *first, last = names
    return f"{', '.join(first)} and {last} hold" if first else f"{last} holds"


def suspect(seen: Seen) -> Reasons:
    """Yield that workers died with it."""
    job = seen.job
    if job is None or seen.is_running or not job.is_suspect:
        return
    yield Reason(
        "suspect",
        False,
        f"{job.deaths:,} workers in a row died while they held it: it is claimed with few other "
        "jobs, and finally alone, until the one that kills its worker is found.",
        f"see what it is: select type, arg, last_error from bgjob_job where id = {literal(job.id)}",
        {"deaths": job.deaths},
    )


def behind(seen: Seen) -> Reasons:
    """Yield how many due jobs are claimed before it."""
    job, ahead = seen.job, seen.ahead
    if job is None or ahead is None or not (ahead.lower or ahead.earlier):
        return
    parts = []
    if ahead.lower:
        lower = words.capped(ahead.lower)
        parts.append(f"{lower} of a lower priority number than {job.priority}")
    if ahead.earlier:
        parts.append(f"{words.capped(ahead.earlier)} that were due earlier")
    total = ahead.lower + ahead.earlier
    is_capped = CAP in ahead
    jobs = f"{total:,} or more due jobs" if is_capped else count(total, "due job")
    come = "comes" if jobs == "1 due job" else "come"
    yield Reason(
        "behind",
        False,
        f"{jobs} of queue {job.queue!r} {come} first: {', '.join(parts)}.",
        f"if that takes too long, start more workers: {words.worker_command(job.queue)}",
        {**ahead._asdict(), "is_exact": not is_capped, "priority": job.priority},
    )
