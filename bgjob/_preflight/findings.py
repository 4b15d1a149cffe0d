"""From counts to sentences, each with what to do."""

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from bgjob._preflight.judge import Group, Judge, Kind, Tally, misfit
from bgjob._preflight.report import Finding, Severity, TypeFit
from bgjob._sql.preflight import StoredSchedule
from bgjob._sql.session import Hidden, Lack
from bgjob._words import lasting
from bgjob.schedule import Schedule

_ORDER: Mapping[Severity, int] = {"bad": 0, "warn": 1, "note": 2}

_SEVERITIES: Mapping[str, Severity] = {
    "no_handler": "bad",
    "payload": "bad",
    "attempts_over": "bad",
    "last_attempt": "warn",
    "key_raises": "warn",
    "key_differs": "warn",
}


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings, the worst first; otherwise in their order."""
    return tuple(sorted(findings, key=lambda finding: _ORDER[finding.severity]))


def fits(judge: Judge) -> tuple[TypeFit, ...]:
    """Return the counts of each queue and type, in their order."""
    return tuple(
        TypeFit(
            tally.queue,
            tally.type,
            tally.jobs,
            tally.fit,
            tally.lost,
            has_handler=tally.kind.policy is not None,
            is_decoded=tally.kind.decode is not None,
        )
        for _, tally in sorted(judge.tallies.items())
    )


# -- jobs ------------------------------------------------------------------------------


def of_jobs(judge: Judge, now: datetime) -> Iterator[Finding]:
    """Yield what is wrong with live jobs, and which dead ones would be handled."""
    for _, tally in sorted(judge.tallies.items()):
        for (code, problem), group in tally.groups.items():
            yield _of_group(tally, code, problem, group, now, judge.unknown_for)
    for (queue, type_), group in sorted(judge.revived.items()):
        yield Finding(
            "dead_fit",
            "note",
            f"{_jobs(group, dead=True)} of type {type_!r} in queue {queue!r}, refused by an "
            f"earlier release, would be handled; {_first(group)}",
            f"find their groups: bgjob triage --queue {shlex.quote(queue)} --type "
            f"{shlex.quote(type_)}; then try one (--canary) before the others (--rest)",
            queue,
            type_,
            group.count,
            tuple(group.ids),
            "would be handled",
        )


def _of_group(
    tally: Tally,
    code: str,
    problem: str,
    group: Group,
    now: datetime,
    unknown_for: float | None,
) -> Finding:
    which = f"{_jobs(group)} of type {tally.type!r} in queue {tally.queue!r}"
    have = "has" if group.count == 1 else "have"
    policy = tally.kind.policy
    most = None if policy is None else policy.max_attempts
    match code:
        case "no_handler":
            text = f"{which} {have} no handler; {_first(group)}, {_due(tally.next_run_at, now)}"
            if unknown_for is not None:
                text += f"; put back until {lasting(unknown_for)} after its enqueue"
            remedy = (
                "register a handler; or, if another program works on this queue, name only the "
                "queues of this one (--queue)"
            )
        case "payload":
            text = f"{which} {have} a payload that does not fit: {problem}; {_first(group)}"
            remedy = (
                "make the type accept it, for example by a default for the field, or let the "
                "release that accepts it work them off first"
            )
            if tally.kind.has_middleware:
                remedy += (
                    "; middleware was not run: if it changes the payload, leave the type out "
                    f"(--skip {shlex.quote(tally.type)})"
                )
        case "attempts_over":
            text = (
                f"{which} {have} used all attempts (max_attempts is {most}, and 2 more after "
                f"deaths): dead-lettered without a run; {_first(group)}"
            )
            remedy = "raise max_attempts of the type, or requeue them afterwards (bgjob triage)"
        case "last_attempt":
            text = (
                f"{which} {have} had at least max_attempts ({most}) attempts: the next failure is "
                f"the last; {_first(group)}"
            )
            remedy = "raise max_attempts of the type, if they should be tried as often as before"
        case "key_raises":
            text = f"{which}: the callable exclusive= raised {problem}; {_first(group)}"
            remedy = (
                "mend the callable: without a key of its own such a job fails each attempt before "
                "its handler"
            )
        case _:
            text = f"{which} {have} another exclusive key than this release gives; {_first(group)}"
            remedy = (
                "jobs with the old and the new key may run at the same time: let the old ones end "
                "first, unless their requests name the key themselves"
            )
    return Finding(
        code,
        _SEVERITIES[code],
        text,
        remedy,
        tally.queue,
        tally.type,
        group.count,
        tuple(group.ids),
        problem,
    )


def _jobs(group: Group, *, dead: bool = False) -> str:
    noun = "dead job" if dead else "job"
    return f"1 {noun}" if group.count == 1 else f"{group.count:,} {noun}s"


def _first(group: Group) -> str:
    return f"the first is {group.ids[0]!r}"


def _due(at: datetime, now: datetime) -> str:
    """Return since or until when the earliest of some jobs is due."""
    ago = (now - at).total_seconds()
    return f"due for {lasting(ago)}" if ago >= 0 else f"due in {lasting(-ago)}"


# -- schedules -------------------------------------------------------------------------


def of_schedules(
    stored: Sequence[StoredSchedule],
    coded: Iterable[Schedule] | None,
    judge: Judge,
    queues: Collection[str] | None,
) -> Iterator[Finding]:
    """Yield what is wrong with schedules, those in the database and those in the code.

    Args:
        stored: the rows.
        coded: the schedules of this release; None if they are not known.
        judge: knows the types.
        queues: the queues to look at; None for all.

    """
    code = {schedule.name: _as_stored(schedule) for schedule in coded or ()}
    rows = {row.name: row for row in stored}
    for name in sorted(rows.keys() | code.keys()):
        row, new = rows.get(name), code.get(name)
        effective = new or row
        assert effective is not None  # noqa: S101 (it is in one of the two)
        if queues is not None and effective.queue not in queues:
            continue
        if coded is not None and new is None:
            yield _schedule(
                "schedule_gone",
                "warn",
                effective,
                "is not in this release: nothing runs it any more, unless another program has it",
                f"bgjob schedules remove {shlex.quote(name)}",
            )
            continue
        yield from _job_of_schedule(effective, judge.kind(effective.type))
        if row is not None and new is not None and row != new:
            yield _schedule(
                "schedule_changes",
                "note",
                effective,
                f"changes with this release: {_difference(row, new)}",
                "nothing, if that is meant; in a rolling deploy each release follows its own",
            )


def _job_of_schedule(schedule: StoredSchedule, kind: Kind) -> Iterator[Finding]:
    if kind.policy is None:
        yield _schedule(
            "schedule_no_handler",
            "warn",
            schedule,
            f"enqueues jobs of type {schedule.type!r}, which has no handler",
            f"register a handler, or: bgjob schedules remove {shlex.quote(schedule.name)}",
        )
    elif problem := misfit(kind, schedule.type, schedule.arg):
        yield _schedule(
            "schedule_payload",
            "warn",
            schedule,
            f"enqueues jobs of type {schedule.type!r} with a payload that does not fit: {problem}",
            "change the request of the schedule, or the type",
        )


def _as_stored(schedule: Schedule) -> StoredSchedule:
    request = schedule.request
    return StoredSchedule(
        schedule.name,
        schedule.spec,
        request.queue,
        request.type,
        request.payload,
        request.priority,
        request.exclusive,
    )


def _difference(old: StoredSchedule, new: StoredSchedule) -> str:
    changed = []
    for name, before, after in zip(StoredSchedule._fields, old, new, strict=True):
        if before != after and name == "arg":
            changed.append("another payload")
        elif before != after:
            changed.append(f"{name} {before!r} becomes {after!r}")
    return ", ".join(changed)


def _schedule(
    code: str, severity: Severity, schedule: StoredSchedule, what: str, remedy: str
) -> Finding:
    return Finding(
        code,
        severity,
        f"schedule {schedule.name!r} {what}",
        remedy,
        schedule.queue,
        schedule.type,
        1,
        (schedule.name,),
        what,
    )


# -- what could not be read ------------------------------------------------------------


def unread(what: str, lack: Lack) -> Finding:
    """Return that this role may not read a table."""
    grant = f"grant select on {lack.relation} to {lack.role}"
    return Finding(
        "unread",
        "note",
        f"{what} were not looked at: role {lack.role!r} may not read table {lack.relation}",
        "apply migration/init.sql completely"
        if lack.is_absent
        else f"run it as a member of bgjob_operator, or: {grant}",
        problem="not allowed",
    )


def hidden(tables: Sequence[Hidden]) -> Iterator[Finding]:
    """Yield that row-level security may hide live jobs."""
    for relation, role in tables:
        if relation == "bgjob_job":
            yield Finding(
                "hidden",
                "warn",
                f"row-level security hides rows of table {relation} from role {role!r}, unless a "
                "policy shows them: hidden jobs were not looked at",
                f"as its owner: create policy bgjob_preflight on {relation} to {role} using (true)",
                problem="row-level security",
            )
