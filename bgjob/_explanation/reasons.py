"""What is known of a job to reasons: one rule each, in the order in which they are told.

A rule yields its reason if it holds. The texts speak of "it": the job.
"""

import shlex
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from bgjob._explanation.seen import Seen
from bgjob._sql.looks import CAP, Claimant, Live, Oldest, Server, Writer
from bgjob._sql.tokens import origin
from bgjob._words import count, lasting, literal, one_line
from bgjob.explanation import Reason
from bgjob.schema import hidden_text

_WORKER = "bgjob worker MODULE:NAME --queue"

_LONGEST = 300
"""Characters of an error: its first line, as a rule."""

_SKEW = timedelta(minutes=1)
"""A claim that is later than now by more is none: its token was made at random."""

_MOST_RELEASES = 5
_UUID7 = 7
_UNKNOWN_WORKER = "a worker that is not in bgjob_worker"
_UNIX = datetime(1970, 1, 1, tzinfo=UTC)

Reasons: TypeAlias = Iterator[Reason]


def reasons(seen: Seen) -> tuple[Reason, ...]:
    """Return all reasons that hold, in order; at least one."""
    found = [reason for rule in _RULES for reason in rule(seen)]
    obstacles = [reason for reason in found if reason.code != "schedule"]
    return tuple([*found] if obstacles else [_ready(seen), *found])


def is_suspect(job: Live) -> bool:
    """Whether two workers or more died with a job."""
    return job.deaths > 1


# -- its claim -------------------------------------------------------------------------


def _running(seen: Seen) -> Reasons:
    job = seen.job
    if job is None or not seen.is_running:
        return
    since, whom, facts = _claim(job.token, seen.claimant, seen)
    left = _in(job.lease_left or 0)
    text = f"It runs{_since(since, seen.now)}, attempt {job.attempt}, on {whom}; its lease ends "
    if seen.claimant is None:
        text += left
    elif seen.claimant.state in {"working", "stopping"}:
        text += f"{left} and is extended while it runs"
    else:
        text += f"{left}; unless it is extended, the job is then due again"
    yield Reason(
        "running",
        False,
        f"{text}.",
        facts=facts | {"attempt": job.attempt, "lease_until": job.lease_until},
    )


def _lease_ended(seen: Seen) -> Reasons:
    job = seen.job
    if job is None or job.lease_left is None or seen.is_running:
        return
    since, whom, facts = _claim(job.token, seen.claimant, seen)
    yield Reason(
        "lease_ended",
        False,
        f"It was claimed{_at(since)} by {whom}, for attempt {job.attempt}; its lease ended "
        f"{lasting(-job.lease_left)} ago. The next full look of a worker of its queue sets it "
        "free, and it is due again.",
        facts=facts | {"attempt": job.attempt, "lease_until": job.lease_until},
    )


# -- its time --------------------------------------------------------------------------


def _not_due(seen: Seen) -> Reasons:
    job = seen.job
    if job is None or seen.is_running or job.due_in <= 0:
        return
    is_retry = job.attempt > 0 and job.last_error is not None
    facts: dict[str, object] = {"next_run_at": job.next_run_at, "attempt": job.attempt}
    text = ""
    if is_retry:
        error = _first_line(job.last_error)
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
    text += f"It is due {_in(job.due_in)}, at {_time(job.next_run_at)}"
    text += f", for attempt {job.attempt + 1}." if job.attempt else "."
    yield Reason(code, False, text, facts=facts)


def _paused(seen: Seen) -> Reasons:
    job, pause = seen.job, seen.pause
    if job is None or pause is None:
        return
    text = f"Queue {job.queue!r} is paused "
    if pause.until is None:
        text += "until it is resumed."
    else:
        left = (pause.until - seen.now).total_seconds()
        text += f"until {_time(pause.until)}, for another {lasting(left)}."
    yield Reason(
        "paused",
        pause.until is None,
        text,
        f"bgjob resume {_argument(job.queue)}",
        {"until": pause.until},
    )


# -- what holds it up ------------------------------------------------------------------


def _key(seen: Seen) -> Reasons:
    job, key = seen.job, seen.key
    if job is None or key is None:
        return
    before = f"; {_capped(key.before)} of its queue come before it" if key.before else ""
    facts: dict[str, object] = {"key": job.exclusive, "before": key.before}
    holder = key.holder
    verb = "waits for" if job.waits else "needs"
    if holder is None:
        if job.waits:
            yield Reason(
                "key_free",
                False,
                f"It waits for the exclusive key {job.exclusive!r}, which nobody holds: the next "
                f"full look of a worker of its queue finds that{before}.",
                facts=facts,
            )
        return
    if holder.id == job.id:
        return
    since, whom, claim = _claim(holder.token, seen.key_claimant, seen)
    if holder.lease_left > 0:
        lease = f"its lease ends {_in(holder.lease_left)}"
    else:
        lease = (
            f"its lease ended {lasting(-holder.lease_left)} ago, and the next full look of a "
            "worker of either queue sets the key free"
        )
    yield Reason(
        "key_held",
        False,
        f"It {verb} the exclusive key {job.exclusive!r}, which job {holder.id!r} (queue "
        f"{holder.queue!r}, type {holder.type!r}) holds{_since(since, seen.now)} on {whom}; "
        f"{lease}{before}.",
        f"see what holds that one up: bgjob explain {_argument(holder.id)}",
        facts | {"holder": holder.id, "holder_queue": holder.queue} | claim,
    )


def _suspect(seen: Seen) -> Reasons:
    job = seen.job
    if job is None or seen.is_running or not is_suspect(job):
        return
    yield Reason(
        "suspect",
        False,
        f"{job.deaths:,} workers in a row died while they held it: it is claimed with few other "
        "jobs, and finally alone, until the one that kills its worker is found.",
        f"see what it is: select type, arg, last_error from bgjob_job where id = {literal(job.id)}",
        {"deaths": job.deaths},
    )


def _behind(seen: Seen) -> Reasons:
    job, ahead = seen.job, seen.ahead
    if job is None or ahead is None or not (ahead.lower or ahead.earlier):
        return
    parts = []
    if ahead.lower:
        parts.append(f"{_capped(ahead.lower)} of a lower priority number than {job.priority}")
    if ahead.earlier:
        parts.append(f"{_capped(ahead.earlier)} that were due earlier")
    total = ahead.lower + ahead.earlier
    is_capped = CAP in ahead
    jobs = f"{total:,} or more due jobs" if is_capped else count(total, "due job")
    come = "comes" if jobs == "1 due job" else "come"
    yield Reason(
        "behind",
        False,
        f"{jobs} of queue {job.queue!r} {come} first: {', '.join(parts)}.",
        f"if that takes too long, start more workers: {_of(job.queue)}",
        {**ahead._asdict(), "is_exact": not is_capped, "priority": job.priority},
    )


# -- who would run it ------------------------------------------------------------------


def _no_worker(seen: Seen) -> Reasons:
    job, serving = seen.job, seen.serving
    if job is None or serving is None or _working(seen):
        return
    # A worker need not be in the registry. If one may be missing there, nothing is certain.
    is_certain = not seen.sessions or bool(serving.alive)
    text = f"No worker claims from queue {job.queue!r}"
    if serving.workers:
        text += f"; the last, {_last(serving.workers[0])}"
    elif is_certain:
        text += ", and none of the last day did"
    if not is_certain:
        text += (
            f", as far as bgjob_worker has them; but {count(seen.sessions, 'session')} of workers "
            f"{'is' if seen.sessions == 1 else 'are'} connected"
        )
    facts: dict[str, object] = {"sessions": seen.sessions}
    if serving.workers:
        last = serving.workers[0]
        facts |= {"last_worker": last.number, "last_state": last.state, "not_seen": last.not_seen}
    yield Reason("no_worker", is_certain, f"{text}.", f"start a worker: {_of(job.queue)}", facts)


def _busy(seen: Seen) -> Reasons:
    job, working = seen.job, _working(seen)
    if job is None or not working or job.due_in > 0:
        return
    slots = sum(worker.slots for worker in working)
    busy = sum(worker.busy for worker in working)
    if busy < slots:
        return
    yield Reason(
        "busy",
        False,
        f"{_workers(working)} on queue {job.queue!r}; {busy:,} of their {count(slots, 'slot')} "
        f"{'is' if slots == 1 else 'are'} busy.",
        f"if they stay so, start more workers: {_of(job.queue)}; what they run: bgjob workers",
        {"workers": len(working), "slots": slots, "busy": busy},
    )


def _no_handler(seen: Seen) -> Reasons:
    job, working = seen.job, _working(seen)
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
    if len(without) == len(working):
        yield Reason(
            "no_handler",
            True,
            f"None of the {count(len(working), 'worker')} on queue {job.queue!r} ({release}) has a "
            f"handler for type {job.type!r}: whichever claims it moves it to the dead-letter "
            "table.",
            "start workers of a release that has the type; to keep the job until then: bgjob "
            f"pause {_argument(job.queue)}",
            facts,
        )
        return
    have = "has" if len(without) == 1 else "have"
    yield Reason(
        "no_handler",
        False,
        f"{len(without):,} of the {count(len(working), 'worker')} on queue {job.queue!r} "
        f"({release}) {have} no handler for type {job.type!r}: whichever claims it first decides "
        "whether it runs, or moves to the dead-letter table.",
        f"restart the old ones: bgjob workers {_option('--queue', job.queue)}",
        facts,
    )


# -- no live job -----------------------------------------------------------------------


def _dead(seen: Seen) -> Reasons:
    if seen.job is not None or not seen.dead:
        return
    dead = seen.dead[0]
    error = f": {_first_line(dead.last_error)}" if dead.last_error else ""
    text = (
        f"It is dead since {_time(dead.moved_at)} ({lasting(dead.seconds)}), after attempt "
        f"{dead.attempt}{error}"
    )
    if len(seen.dead) > 1:
        text += f"; jobs with this id died {'twice' if len(seen.dead) == 2 else 'several times'}"  # noqa: PLR2004
    yield Reason(
        "dead",
        True,
        f"{text}.",
        f"bgjob dlq requeue {_option('--id', seen.id)}",
        {
            "number": dead.number,
            "type": dead.type,
            "attempt": dead.attempt,
            "moved_at": dead.moved_at,
            "last_error": dead.last_error,
        },
    )


def _absent(seen: Seen) -> Reasons:
    if seen.job is not None or seen.dead:
        return
    text = "No job with this id waits, runs or is dead."
    made = _made_at(seen.id)
    if made is not None:
        text += f" The id was made at {_time(made)}."
    facts: dict[str, object] = {"made_at": made}
    if seen.writers:
        text += (
            " A transaction that is still open may have written it: "
            f"{'; '.join(map(_writer, seen.writers))}."
        )
        facts["writers"] = [writer._asdict() for writer in seen.writers]
        remedy = f"commit or roll back that transaction; to end it: {_end(seen.writers[0])}"
    else:
        remedy = "see the workers' logs; enqueue it again only if it has not run"
    text += (
        " Completed jobs are deleted: it was completed, or purged, or its transaction "
        f"{'has not committed' if seen.writers else 'never committed'}."
    )
    yield Reason("absent", False, text, remedy, facts)


def _made_at(id_: str) -> datetime | None:
    """Return the time in a time-ordered UUID; None for another id."""
    try:
        number = uuid.UUID(id_)
        if number.version != _UUID7:
            return None
        return _UNIX + timedelta(milliseconds=number.int >> 80)
    except (ValueError, OverflowError):
        return None


def _writer(writer: Writer) -> str:
    if writer.prepared is not None:
        named = f"prepared transaction {writer.prepared!r} ({writer.role})"
    else:
        words = [word for word in (writer.role, writer.application, writer.state) if word]
        named = f"session {writer.pid}" + (f" ({', '.join(map(one_line, words))})" if words else "")
    return named if writer.seconds is None else f"{named}, for {lasting(writer.seconds)}"


def _end(writer: Writer) -> str:
    if writer.prepared is not None:
        return f"rollback prepared {literal(writer.prepared)}"
    return f"select pg_terminate_backend({writer.pid})"


# -- besides ---------------------------------------------------------------------------


def _schedule(seen: Seen) -> Reasons:
    name, found = seen.schedule_name, seen.schedule
    if name is None:
        return
    if found is None:
        if not any(unread.what == "its schedule" for unread in seen.unread):
            text = f"Its id is that of a job of schedule {name!r}, which does not exist any more."
            yield Reason("schedule", False, text, facts={"schedule": name})
        return
    text = f"It is a job of schedule {name!r} ({found.spec})"
    if found.paused:
        text += ", which is paused"
        remedy = f"bgjob schedules resume {_argument(name)}"
    else:
        remedy = ""
        if found.next_run_at is not None:
            text += f", whose next tick is at {_time(found.next_run_at)}"
    if found.last_run_at is not None:
        text += f"; its last job was of {_time(found.last_run_at)}"
    facts = {"schedule": name, "spec": found.spec, "paused": found.paused}
    facts |= {"next_run_at": found.next_run_at, "last_run_at": found.last_run_at}
    yield Reason("schedule", False, f"{text}.", remedy, facts)


def _unread(seen: Seen) -> Reasons:
    for unread in seen.unread:
        yield Reason(
            "unread",
            False,
            f"Not looked at: {unread.what}: {unread.why}.",
            unread.remedy,
            {"what": unread.what, "sqlstate": unread.sqlstate},
        )
    if (warning := hidden_text(seen.hidden)) is not None:
        text, _, remedy = warning.partition("; ")
        facts = {"what": "hidden rows", "tables": [hidden.relation for hidden in seen.hidden]}
        yield Reason("unread", False, f"{text}.", remedy, facts)


def _ready(seen: Seen) -> Reason:
    working = _working(seen)
    slots = sum(worker.slots for worker in working)
    busy = sum(worker.busy for worker in working)
    return Reason(
        "ready",
        False,
        "Nothing is in its way: a worker with a free slot takes it within its poll interval. "
        f"{_workers(working)} on its queue, with {slots - busy:,} of {count(slots, 'slot')} free.",
        facts={"workers": len(working), "slots": slots, "busy": busy},
    )


_RULES: tuple[Callable[[Seen], Reasons], ...] = (
    _running,
    _lease_ended,
    _not_due,
    _paused,
    _key,
    _suspect,
    _behind,
    _no_worker,
    _busy,
    _no_handler,
    _dead,
    _absent,
    _schedule,
    _unread,
)


# -- a queue without a due job ---------------------------------------------------------


def empty(queue: str, found: Oldest) -> Reason:
    """Return that a queue has no due job."""
    text = f"No job of queue {queue!r} is due, or waits for a key"
    if found.next_in is not None:
        text += f"; the next one is due {_in(found.next_in)}"
    return Reason("empty", False, f"{text}.", facts={"next_in": found.next_in})


def flowing(queue: str, rounds: int) -> Reason:
    """Return that due jobs of a queue were done before they could be explained."""
    text = (
        f"The jobs of queue {queue!r} go through: {rounds} that were due, one after the other, had "
        "ended when they were looked at."
    )
    return Reason("empty", False, text, facts={"next_in": None})


# -- words -----------------------------------------------------------------------------


_Facts: TypeAlias = dict[str, object]


def _claim(
    token: int | None, by: Claimant | None, seen: Seen
) -> tuple[datetime | None, str, _Facts]:
    """Return since when a claim is, whose it is in words, and both as facts."""
    made = None if token is None else origin(token)
    since = None if made is None or made.at > seen.now + _SKEW else made.at
    if by is not None:
        facts: _Facts = {"since": since, "worker": by.number, "host": by.host, "pid": by.pid}
        facts |= {"program": by.program, "release": by.release}
        facts |= {"worker_state": by.state, "not_seen": by.not_seen}
        return since, _named(by), facts
    nobody: _Facts = {"worker": None}
    if made is None or since is None:
        return None, _UNKNOWN_WORKER, {"since": None} | nobody
    if made.number is None:
        whom = "a worker without a row in bgjob_worker, or in a client's do()"
        return since, whom, {"since": since} | nobody
    if any(unread.what == "the workers" for unread in seen.unread):
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


def _last(worker: Server) -> str:
    named = f"worker {worker.number} ({worker.host}, pid {worker.pid})"
    match worker.state:
        case "lost":
            return f"{named}, has not been seen for {lasting(worker.not_seen)}"
        case "stopping":
            return f"{named}, shuts down"
    return f"{named}, {worker.state} {lasting(worker.not_seen)} ago"


def _working(seen: Seen) -> list[Server]:
    """Return the workers that claim from the queue."""
    if seen.serving is None or seen.is_running:
        return []
    return [worker for worker in seen.serving.workers if worker.state == "working"]


def _workers(working: list[Server]) -> str:
    return f"{count(len(working), 'worker')} {'is' if len(working) == 1 else 'are'}"


def _since(at: datetime | None, now: datetime) -> str:
    if at is None:
        return ""
    return f" since {_time(at)} ({lasting((now - at).total_seconds())})"


def _at(at: datetime | None) -> str:
    return "" if at is None else f" at {_time(at)}"


def _time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _in(seconds: float) -> str:
    return f"in {lasting(seconds)}"


def _capped(number: int) -> str:
    return f"{number:,} or more" if number >= CAP else f"{number:,}"


def _first_line(error: str | None) -> str:
    line = next((line for line in (error or "").splitlines() if line.strip()), "no error").strip()
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _of(queue: str) -> str:
    return f"{_WORKER} {shlex.quote(queue)}"


def _argument(value: str) -> str:
    """Return a value as an argument of a command."""
    return f"-- {shlex.quote(value)}" if value.startswith("-") else shlex.quote(value)


def _option(name: str, value: str) -> str:
    """Return an option of a command with its value."""
    return f"{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"
