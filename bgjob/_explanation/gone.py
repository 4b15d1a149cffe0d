"""Rules of an id without a live job, and of what could not be looked at."""

import uuid
from datetime import UTC, datetime, timedelta

from bgjob._explanation import words
from bgjob._explanation.seen import ITS_SCHEDULE, Reasons, Seen
from bgjob._sql.looks import Oldest, Writer
from bgjob._words import count, identifier, lasting, literal, one_line
from bgjob.explanation import Reason

_ENDED_BY_HAND = ("cancelled", "abandoned")
"""How the error of a job begins that `client.jobs` has moved to the dead-letter table."""

_UUID7 = 7
_UNIX = datetime(1970, 1, 1, tzinfo=UTC)


def dead(seen: Seen) -> Reasons:
    """Yield since when it is in the dead-letter table."""
    if seen.job is not None or not seen.dead:
        return
    last = seen.dead[0]
    error = words.first_line(last.last_error) if last.last_error else ""
    at, ago = words.moment(last.moved_at), lasting(last.seconds)
    attempt = f"after attempt {last.attempt}" if last.attempt else "before its first attempt"
    ended = next((done for done in _ENDED_BY_HAND if error.startswith(f"{done} by ")), None)
    if ended is not None:
        text = f"It was {error} (at {at}, {ago} ago, {attempt})"
    else:
        text = f"It has been dead since {at} ({ago}), {attempt}"
        text += f": {error}" if error else ""
    if len(seen.dead) > 1:
        text += f"; jobs with this id died {'twice' if len(seen.dead) == 2 else 'several times'}"  # noqa: PLR2004
    yield Reason(
        "dead",
        True,
        f"{text}.",
        f"bgjob dlq requeue {words.option('--id', seen.id)}; it and all that died in the same way: "
        f"bgjob triage {last.fingerprint}",
        {
            "number": last.number,
            "type": last.type,
            "attempt": last.attempt,
            "moved_at": last.moved_at,
            "last_error": last.last_error,
            "fingerprint": last.fingerprint,
            "ended_by_hand": ended,
        },
    )


def completed(seen: Seen) -> Reasons:
    """Yield when it was completed, and where."""
    if seen.state != "completed":
        return
    last = seen.kept[0]
    since, whom, facts = words.claim(last.token, seen.claimant, seen)
    text = f"It was completed at {words.moment(last.ended_at)} ({_ago(last.ended_at, seen.now)}), "
    text += f"attempt {last.attempt}, on {whom}"
    if since is not None:
        text += f", {lasting((last.ended_at - since).total_seconds())} after it was claimed"
    if (others := len(seen.kept) - 1) > 0:
        text += f"; a job with this id was also completed {_ago(seen.kept[1].ended_at, seen.now)}"
        text += f", and {count(others - 1, 'time')} before that" if others > 1 else ""
    if seen.taken_until is not None:
        text += (
            f". Its result is kept until {words.moment(seen.taken_until)}, and until then a "
            "request with keep and this id is refused"
        )
    facts |= {"type": last.type, "attempt": last.attempt, "ended_at": last.ended_at}
    yield Reason("completed", False, f"{text}.", facts=facts)


def _ago(at: datetime, now: datetime) -> str:
    return f"{lasting((now - at).total_seconds())} ago"


def absent(seen: Seen) -> Reasons:
    """Yield that there is no such job."""
    if seen.state != "absent":
        return
    text = "No job with this id waits, runs or is dead."
    made = _made_at(seen.id)
    if made is not None:
        text += f" The id was made at {words.moment(made)}."
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
        told = [one_line(text) for text in (writer.role, writer.application, writer.state) if text]
        named = f"session {writer.pid}" + (f" ({', '.join(told)})" if told else "")
    return named if writer.seconds is None else f"{named}, for {lasting(writer.seconds)}"


def _end(writer: Writer) -> str:
    if writer.prepared is not None:
        return f"rollback prepared {literal(writer.prepared)}"
    return f"select pg_terminate_backend({writer.pid})"


def schedule(seen: Seen) -> Reasons:
    """Yield its schedule."""
    name, found = seen.schedule_name, seen.schedule
    if name is None:
        return
    if found is None:
        if seen.has_read(ITS_SCHEDULE):
            text = f"Its id is that of a job of schedule {name!r}, which does not exist any more."
            yield Reason("schedule", False, text, facts={"schedule": name})
        return
    text = f"It is a job of schedule {name!r} ({found.spec})"
    if found.paused:
        text += ", which is paused"
        remedy = f"bgjob schedules resume {words.argument(name)}"
    else:
        remedy = ""
        if found.next_run_at is not None:
            text += f", whose next tick is at {words.moment(found.next_run_at)}"
    if found.last_run_at is not None:
        text += f"; its last job was of {words.moment(found.last_run_at)}"
    facts = {"schedule": name, "spec": found.spec, "paused": found.paused}
    facts |= {"next_run_at": found.next_run_at, "last_run_at": found.last_run_at}
    yield Reason("schedule", False, f"{text}.", remedy, facts)


def unread(seen: Seen) -> Reasons:
    """Yield what could not be looked at."""
    for part in seen.unread:
        yield Reason(
            "unread",
            False,
            f"Not looked at: {part.what}: {part.why}.",
            part.remedy,
            {"what": part.what, "sqlstate": part.sqlstate},
        )
    if seen.hidden:
        relation, role = seen.hidden[0]
        tables = [hidden.relation for hidden in seen.hidden]
        yield Reason(
            "unread",
            False,
            f"Row-level security hides rows of table {', '.join(tables)} from role {role!r}, "
            "unless a policy shows them.",
            f"ask as the tables' owner; or: create policy bgjob_explain on {relation} to "
            f"{identifier(role)} using (true)",
            {"what": "hidden rows", "tables": tables},
        )


def empty(queue: str, found: Oldest) -> Reason:
    """Return that a queue has no due job."""
    text = f"No job of queue {queue!r} is due, or waits for a key"
    if not found.is_exact:
        text += ", as far as the first 1,000 keys tell"
    if found.next_in is not None:
        text += f"; the next one is due in {lasting(found.next_in)}"
    return Reason(
        "empty", False, f"{text}.", facts={"next_in": found.next_in, "is_exact": found.is_exact}
    )


def flowing(queue: str, rounds: int) -> Reason:
    """Return that due jobs of a queue were done before they could be explained."""
    text = (
        f"The jobs of queue {queue!r} go through: {rounds} that were due, one after the other, had "
        "ended when they were looked at."
    )
    return Reason("empty", False, text, facts={"next_in": None, "is_exact": False})
