"""The statements that explain a job, each in a transaction of its own."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any, TypeAlias

import psycopg
from psycopg import errors

from bgjob._explanation import gone
from bgjob._explanation.reasons import reasons
from bgjob._explanation.seen import ITS_SCHEDULE, THE_WORKERS, Pause, Seen, Unread
from bgjob._sql import history, limits, looks, pauses, results
from bgjob._sql import server as server_sql
from bgjob._sql import session as session_sql
from bgjob._sql.limits import Subject
from bgjob._sql.statement import Statement
from bgjob._sql.tokens import origin
from bgjob.explanation import Explanation
from bgjob.workers import NO_TABLE

Steps: TypeAlias = Generator[Statement[Any], Any, Explanation]
"""Statements to execute; their answers; and the explanation."""

_ROUNDS = 3
"""How often to look for a due job that is not taken meanwhile."""

_SCHEDULE = "schedule:"

_KEPT = 100
"""The most completed jobs with one id that are counted."""


def explain(id_: str) -> Steps:
    """Explain a job.

    A generator: it yields statements, is sent their answers, or thrown their errors.

    Raises:
        psycopg.Error: this role may not read jobs, or the connection is lost.

    """
    seen = yield from _look(id_)
    queues = [*(dead.queue for dead in seen.dead), *(kept.queue for kept in seen.kept)]
    queue = seen.job.queue if seen.job else next(iter(queues), None)
    return Explanation(seen.id, queue, seen.state, seen.now, reasons(seen))


def explain_queue(queue: str) -> Steps:
    """Explain the job of a queue that has been due for longest; see `explain`."""
    rounds = 0
    while True:
        found: looks.Oldest = yield looks.oldest(queue)
        if found.id is None:
            return Explanation(None, queue, "empty", found.now, (gone.empty(queue, found),))
        explanation = yield from explain(found.id)
        if explanation.state not in {"absent", "dead"}:
            return explanation
        rounds += 1
        if rounds == _ROUNDS:
            return Explanation(None, queue, "empty", found.now, (gone.flowing(queue, rounds),))


def _look(id_: str) -> Generator[Statement[Any], Any, Seen]:
    found: looks.Found = yield looks.find(id_)
    unread: dict[str, Unread] = {}

    def ask(statement: Statement[Any], what: str) -> Generator[Statement[Any], Any, Any]:
        try:
            return (yield statement)
        except psycopg.Error as error:
            if error.sqlstate is None:  # not the server's answer: the connection is lost
                raise
            unread[what] = _unread(what, error)
            return None

    def claimant(token: int | None) -> Generator[Statement[Any], Any, looks.Claimant | None]:
        made = None if token is None else origin(token)
        if made is None or made.number is None:
            return None
        worker: looks.Claimant | None = yield from ask(
            looks.claimant(made.number, made.at), THE_WORKERS
        )
        return worker

    def complete(seen: Seen) -> Seen:
        return replace(seen, unread=tuple(unread.values()))

    job = found.job
    seen = Seen(id=id_, now=found.now, job=job, dead=tuple(found.dead))
    if (name := _schedule_of(id_)) is not None:
        schedule = yield from ask(looks.schedule(name), ITS_SCHEDULE)
        seen = replace(seen, schedule_name=name, schedule=schedule)
    if job is not None:
        seen = replace(seen, claimant=(yield from claimant(job.token)))
    if seen.state in {"running", "dead"}:
        return complete(seen)
    hidden = (yield from ask(session_sql.hidden(), "policies")) or ()
    seen = replace(seen, hidden=tuple(hidden))
    if job is None and not seen.dead:
        kept = (yield from ask(history.of_job(id_, limit=_KEPT), "completed jobs")) or ()
        result = ((yield from ask(results.outcomes([id_]), "results")) or {}).get(id_)
        if result is not None and result.until is not None:
            kept = kept or result.completed
            seen = replace(seen, taken_until=result.until)
        seen = replace(seen, kept=tuple(kept))
        if kept:
            return complete(replace(seen, claimant=(yield from claimant(kept[0].token))))
    if job is None:
        writers = (yield from ask(looks.writers(), "open transactions")) or ()
        return complete(replace(seen, writers=tuple(writers)))

    paused = (yield from ask(pauses.paused(), "pauses")) or {}
    if job.queue in paused:
        seen = replace(seen, pause=Pause(paused[job.queue]))
    if job.due_in <= 0:
        subjects = Subject("queue", job.queue), Subject("type", job.type)
        for subject in subjects:
            found_limits = (yield from ask(limits.limits(subject), "limits")) or ()
            seen = replace(seen, limits=(*seen.limits, *found_limits))
    if job.exclusive is not None:
        key: looks.Key | None = yield from ask(looks.key(job), "its exclusive key")
        holders = () if key is None else key.holders
        by = (yield from claimant(holders[0].token)) if holders else None
        seen = replace(seen, key=key, key_claimant=by)
    if job.waits_for_group:
        members = yield from ask(looks.members(job.id), "the jobs of its group")
        seen = replace(seen, members=members)
    if job.due_in <= 0 and not job.waits and job.lease_until is None and not job.is_suspect:
        ahead = looks.ahead(job.queue, job.priority, job.next_run_at)
        seen = replace(seen, ahead=(yield from ask(ahead, "the jobs before it")))
    known: looks.QueueWorkers | None = yield from ask(
        looks.workers_of(job.queue, job.type), THE_WORKERS
    )
    seen = replace(seen, workers=known)
    if known is not None and not known.alive:
        sessions = (yield from ask(server_sql.worker_sessions(), "sessions")) or 0
        seen = replace(seen, sessions=sessions)
    return complete(seen)


def _schedule_of(id_: str) -> str | None:
    """Return the name in the id of a schedule's job; None for another id."""
    if not id_.startswith(_SCHEDULE):
        return None
    name, colon, tick = id_.removeprefix(_SCHEDULE).partition(":")
    return name if name and colon and tick else None


def _unread(what: str, error: psycopg.Error) -> Unread:
    match error:
        case errors.InsufficientPrivilege():
            remedy = "give this role what privileges.sql gives to bgjob_operator"
        case errors.UndefinedTable() if what == THE_WORKERS:
            remedy = NO_TABLE
        case errors.UndefinedTable() | errors.UndefinedColumn():
            remedy = "bgjob doctor --check schema"
        case errors.LockNotAvailable():
            remedy = "who has the table: bgjob doctor --check locks"
        case errors.QueryCanceled():
            remedy = "the statement took over 5 s: repeat it when the server is less busy"
        case _:
            remedy = "repeat it with the tables' owner; the server's log has more"
    return Unread(what, error.diag.message_primary or str(error), remedy, error.sqlstate)
