"""`bgjob job`: list, show, cancel, hasten, reorder and abandon live jobs."""

import argparse
import getpass
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from textwrap import dedent
from typing import TYPE_CHECKING, Any, get_args

from bgjob._cli import arguments, database, payload, table
from bgjob._cli.arguments import UsageError, add_command
from bgjob._cli.progress import progress, say
from bgjob._headers import NO_HEADERS, stored
from bgjob._words import count
from bgjob.client import Client
from bgjob.jobs import JobChanges, JobFilters, JobWorker, LiveJob, LiveState

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from bgjob._cli.arguments import Commands

STATUS = dedent("""\
    exit status:
      0    it succeeded: all of these jobs were changed
      1    it failed, for the reason on the standard error
      2    the arguments are wrong
      3    some were not changed; the output says why
      130  Ctrl-C interrupted it
    """)

_NOT_ALL = 3

_BATCH = 1000
"""Jobs changed in one call, so that progress shows."""

_MOST_NAMED = 10
"""Ids that are named for each reason why they were not changed."""

_SHOWN = ("id", "queue", "type", "state", "priority", "attempt", "next_run_at", "last_error")

_WHY = {
    "absent": "not there: completed, purged or never written",
    "dead": "in the dead-letter table",
    "running": "running",
    "waiting": "not running",
    "due": "due already",
    "same": "of that priority already",
    "locked": "locked by another transaction for over a second",
    "unmatched": "not matched by the filters",
}

_Act = Callable[[Client, list[str], JobFilters], JobChanges]


def add(commands: "Commands") -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "job",
        help="list, show, cancel, hasten, reorder and abandon live jobs",
        description="Live jobs: those that wait or run. For dead ones see bgjob dlq.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=arguments.STATUS,
    )
    live = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    each = add_command(
        live,
        "list",
        run_list,
        help="list live jobs",
        description="Lists live jobs. Without a filter, or with --prefix, by id, the last first; "
        "with --queue in the order in which they are claimed, then those that wait for keys; "
        "otherwise as they lie in the table. A filter for which there is no index, such as "
        "--error, searches the table.",
    )
    _add_ids(each, option=True)
    _add_filters(each)
    each.add_argument(
        "--limit",
        type=arguments.positive,
        default=100,
        metavar="N",
        help="list at most N jobs (default: %(default)s)",
    )
    each.add_argument(
        "--after", metavar="PLACE", help="the next page: what a full page prints at its end"
    )
    _add_common(each)
    each = add_command(
        live,
        "show",
        run_show,
        help="show a live job, with its payload and its whole error",
        description="Shows a job that waits or runs. Why it does not run: bgjob explain ID.",
    )
    each.add_argument("id", type=arguments.name("id"), metavar="ID")
    _add_common(each)
    _add_cancel(live)
    _add_abandon(live)
    each = add_command(
        live,
        "now",
        run_now,
        help="make delayed jobs due now",
        description="Makes delayed jobs due now, also those that wait for a retry.",
        status=STATUS,
    )
    _add_choice(each)
    each = add_command(
        live,
        "priority",
        run_priority,
        help="change the priority of jobs that are not running",
        description="Changes the priority of jobs that are not running. A due job takes its turn "
        "behind those of its new priority.",
        status=STATUS,
    )
    each.add_argument("priority", type=arguments.priority, metavar="PRIORITY")
    _add_choice(each)


def _add_cancel(live: "Commands") -> None:
    each = add_command(
        live,
        "cancel",
        run_cancel,
        help="move jobs to the dead-letter table, whether they wait or run",
        description="Moves jobs to the dead-letter table, whether they wait or run; bgjob dlq "
        "requeue undoes it. What a running one returns is dropped, and its transaction rolled "
        "back. Its coroutine is cancelled; its thread, which cannot be stopped, is given up.",
        status=STATUS,
    )
    _add_choice(each)
    _add_reason(each)


def _add_abandon(live: "Commands") -> None:
    each = add_command(
        live,
        "abandon",
        run_abandon,
        help="give up running jobs; their handlers run on",
        description="Moves running jobs to the dead-letter table without notice to their workers: "
        "their results are dropped, their handlers run on. Meanwhile their exclusive keys are "
        "free, so the next job of a key may run beside them.",
        status=STATUS,
    )
    _add_choice(each)
    _add_reason(each)


def _add_ids(parser: "ArgumentParser", *, option: bool = False) -> None:
    check = arguments.name("id")
    if option:
        parser.add_argument(
            "--id", dest="ids", type=check, action="append", help="only this job; may be repeated"
        )
    else:
        parser.add_argument("ids", nargs="*", type=check, metavar="ID", help="the jobs' ids")


def _add_filters(parser: "ArgumentParser") -> None:
    parser.add_argument("--queue", type=arguments.name("queue"), help="only jobs of this queue")
    parser.add_argument("--type", type=arguments.name("type"), help="only jobs of this type")
    parser.add_argument(
        "--state", choices=get_args(LiveState), help="only jobs in this state: %(choices)s"
    )
    parser.add_argument(
        "--prefix", type=arguments.name("prefix"), help="only jobs whose ids begin with this"
    )
    parser.add_argument(
        "--key",
        dest="exclusive",
        type=arguments.name("key"),
        help="only jobs with this exclusive key",
    )
    parser.add_argument("--error", help="only jobs whose last error contains this text")


def _add_choice(parser: "ArgumentParser") -> None:
    _add_ids(parser)
    _add_filters(parser)
    parser.add_argument(
        "--yes",
        action="store_true",
        help="do not ask: needed with filters alone, unless a terminal can answer",
    )
    _add_common(parser)


def _add_reason(parser: "ArgumentParser") -> None:
    parser.add_argument("--reason", default="", help="why, for those who find it as a dead job")
    parser.add_argument("--by", help="who does it; by default your login name")


def _add_common(parser: "ArgumentParser") -> None:
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def _user() -> str | None:
    with suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return None  # the database's role then


def _filters(args: argparse.Namespace) -> JobFilters:
    return {
        "queue": args.queue,
        "type": args.type,
        "state": args.state,
        "prefix": args.prefix,
        "exclusive": args.exclusive,
        "error": args.error,
    }


# -- looks -----------------------------------------------------------------------------


def run_list(args: argparse.Namespace) -> int:
    """Carry it out."""
    jobs: list[LiveJob] = []
    after = args.after
    with database.opened(database.find(args.dsn)) as client:
        while True:
            try:
                page = client.jobs.list(
                    args.ids, after=after, limit=args.limit - len(jobs), **_filters(args)
                )
            except ValueError as error:
                raise UsageError(str(error)) from None
            jobs += page.jobs
            after = page.next
            if after is None or len(jobs) >= args.limit:
                break
    if args.json:
        table.write_json({"jobs": [_as_json(job) for job in jobs], "next": after})
    else:
        table.write_table(_SHOWN, [[getattr(job, name) for name in _SHOWN] for job in jobs])
        if after is not None:
            say(f"for the next page add: --after {shlex.quote(after)}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Carry it out."""
    with database.opened(database.find(args.dsn)) as client:
        job = client.jobs.get(args.id)
    if job is None:
        say(f"bgjob: no live job has the id {args.id!r}; what became of it: bgjob explain ID")
        return 1
    if args.json:
        table.write_json(_as_json(job))
        return 0
    for name, value in _values(job).items():
        if value is None or value == NO_HEADERS:
            continue
        match name, value:
            case (("arg" | "checkpoint"), bytes()):
                text = payload.as_text(value)
            case "headers", _:
                text = stored(value) or ""
            case _, JobWorker(number, host, pid, program):
                text = f"{number} ({host}, pid {pid}, {program})"
            case (("due_in" | "lease_left"), float()):
                text = f"{value:,.1f} s"
            case _:
                text = str(value)
        lines = "\n    ".join(map(table.printable, text.splitlines()))
        sys.stdout.write(f"{name:<12}  {lines}\n")
    return 0


def _values(job: LiveJob) -> dict[str, Any]:
    return {field.name: getattr(job, field.name) for field in fields(job)}


def _as_json(job: LiveJob) -> dict[str, Any]:
    return _values(job) | {  # orjson writes the worker
        "arg": payload.as_json(job.arg),
        "checkpoint": payload.as_json(job.checkpoint),
    }


# -- actions ---------------------------------------------------------------------------


def run_cancel(args: argparse.Namespace) -> int:
    """Carry it out."""

    def cancel(client: Client, ids: list[str], filters: JobFilters) -> JobChanges:
        return client.jobs.cancel(ids, reason=args.reason, by=args.by or _user(), **filters)

    return _act(args, cancel, "cancel", "cancelled")


def run_abandon(args: argparse.Namespace) -> int:
    """Carry it out."""

    def abandon(client: Client, ids: list[str], filters: JobFilters) -> JobChanges:
        return client.jobs.abandon(ids, reason=args.reason, by=args.by or _user(), **filters)

    return _act(args, abandon, "abandon", "abandoned")


def run_now(args: argparse.Namespace) -> int:
    """Carry it out."""

    def now(client: Client, ids: list[str], filters: JobFilters) -> JobChanges:
        return client.jobs.run_now(ids, **filters)

    return _act(args, now, "make due", "made due")


def run_priority(args: argparse.Namespace) -> int:
    """Carry it out."""

    def priority(client: Client, ids: list[str], filters: JobFilters) -> JobChanges:
        return client.jobs.set_priority(ids, priority=args.priority, **filters)

    return _act(args, priority, "reorder", "reordered")


def _act(args: argparse.Namespace, act: _Act, verb: str, done: str) -> int:
    filters = _filters(args)
    ids = list(dict.fromkeys(args.ids))
    if not ids and all(value is None for value in filters.values()):
        raise UsageError("which jobs? give ids, or a filter such as --queue")
    with database.opened(database.find(args.dsn)) as client:
        if not ids:
            ids = client.jobs.matching(**filters)
            if ids and not args.yes and not _confirmed(verb, ids):
                return 1
        changes = _in_batches(client, ids, filters, act, done)
    if args.json:
        table.write_json(
            {
                "waiting": changes.waiting,
                "running": changes.running,
                "unchanged": dict(changes.unchanged),
            }
        )
    else:
        _write(changes, done)
    return _NOT_ALL if changes.unchanged else 0


def _confirmed(verb: str, ids: list[str]) -> bool:
    question = f"{verb} {count(len(ids), 'job')}?"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question} pass --yes to do so without being asked")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    say("nothing was changed")
    return False


def _in_batches(
    client: Client, ids: list[str], filters: JobFilters, act: _Act, done: str
) -> JobChanges:
    if len(ids) <= _BATCH:
        return act(client, ids, filters) if ids else JobChanges()
    changes = JobChanges()
    try:
        with progress(len(ids), "jobs") as tell:
            for start in range(0, len(ids), _BATCH):
                some = act(client, ids[start : start + _BATCH], filters)
                changes = JobChanges(
                    changes.waiting + some.waiting,
                    changes.running + some.running,
                    {**changes.unchanged, **some.unchanged},
                )
                tell(min(start + _BATCH, len(ids)))
    except BaseException:
        say(f"{done} {count(len(changes.changed), 'job')} before")
        raise
    return changes


def _write(changes: JobChanges, done: str) -> None:
    line = f"{done} {count(len(changes.changed), 'job')}"
    if changes.running and done == "cancelled":
        number = len(changes.running)
        line += f", {number:,} of which {'was' if number == 1 else 'were'} running"
    sys.stdout.write(f"{line}\n")
    by_reason: dict[str, list[str]] = {}
    for id_, why in changes.unchanged.items():
        by_reason.setdefault(why, []).append(id_)
    for reason, ids in by_reason.items():
        named = ", ".join(map(repr, ids[:_MOST_NAMED])) + (", …" * (len(ids) > _MOST_NAMED))
        sys.stdout.write(f"left {count(len(ids), 'job')}, {_WHY[reason]}: {named}\n")
