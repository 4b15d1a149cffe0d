"""`bgjob dlq`: list, show, requeue and purge dead jobs."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

from bgjob._cli import arguments, database, payload, table
from bgjob._cli.arguments import UsageError, add_command
from bgjob._cli.progress import progress, say
from bgjob._headers import stored
from bgjob._sql.dead import DeadFilter, matching
from bgjob.client import Client
from bgjob.job import DeadJob

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from bgjob._cli.arguments import Commands

_BATCH = 1000
"""Jobs requeued or purged in one transaction: no other session waits long, and progress shows."""

_SHOWN = ("id", "queue", "type", "attempt", "moved_at", "last_error")


def add(commands: "Commands") -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "dlq",
        help="list, show, requeue and purge dead jobs",
        description="The dead-letter table: jobs that could not be handled, with their errors.\n"
        "`bgjob triage` groups them by how they died, and tries one before the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=arguments.STATUS,
    )
    dead = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    each = add_command(
        dead, "list", run_list, help="list dead jobs", description="Lists dead jobs, latest first."
    )
    _add_filters(each)
    each.add_argument(
        "--limit",
        type=arguments.positive,
        default=100,
        metavar="N",
        help="list at most N jobs (default: %(default)s)",
    )
    each.add_argument(
        "--before",
        type=arguments.positive,
        metavar="NUMBER",
        help="the next page: the jobs before this number, which a full page prints",
    )
    each = add_command(
        dead,
        "show",
        run_show,
        help="show a dead job, with its payload and its whole error",
        description="Shows a dead job; if jobs with this id died more than once, the latest.",
    )
    each.add_argument("id", metavar="ID")
    _add_common(each)
    each = add_command(
        dead,
        "requeue",
        run_requeue,
        help="move dead jobs back to their queues",
        description="Moves dead jobs back to their queues, due now, with every setting, fresh "
        "attempts and their checkpoints. A job whose id a live job has stays dead.",
    )
    _add_filters(each)
    _add_all(each)
    each.add_argument(
        "--drop-checkpoint",
        action="store_true",
        help="without their checkpoints: they begin again from the start",
    )
    each = add_command(
        dead,
        "purge",
        run_purge,
        help="delete dead jobs permanently",
        description="Deletes dead jobs permanently.",
    )
    _add_filters(each)
    _add_all(each)


def _add_filters(parser: "ArgumentParser") -> None:
    parser.add_argument("--queue", type=arguments.name("queue"), help="only jobs of this queue")
    parser.add_argument("--type", type=arguments.name("type"), help="only jobs of this type")
    parser.add_argument(
        "--id",
        dest="ids",
        type=arguments.name("id"),
        action="append",
        help="only the job with this id; may be repeated",
    )
    parser.add_argument(
        "--older-than",
        type=arguments.duration,
        metavar="DURATION",
        help="only jobs that died longer ago: seconds, or 90s, 15m, 2h, 30d, 1w",
    )
    _add_common(parser)


def _add_common(parser: "ArgumentParser") -> None:
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def _add_all(parser: "ArgumentParser") -> None:
    parser.add_argument(
        "--all", action="store_true", help="all dead jobs; required without a filter"
    )


class _Filters(TypedDict):
    queue: str | None
    type: str | None
    older_than: float | None


def _filters(args: argparse.Namespace) -> _Filters:
    return {"queue": args.queue, "type": args.type, "older_than": args.older_than}


def run_list(args: argparse.Namespace) -> int:
    """Carry it out."""
    with database.opened(database.find(args.dsn)) as client:
        jobs = client.dlq.list(args.ids, before=args.before, limit=args.limit + 1, **_filters(args))
    there_are_more = len(jobs) > args.limit
    jobs = jobs[: args.limit]
    if args.json:
        table.write_json([_as_json(job) for job in jobs])
    else:
        table.write_table(_SHOWN, [[getattr(job, name) for name in _SHOWN] for job in jobs])
    if there_are_more:
        say(f"for the next page add: --before {jobs[-1].number}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Carry it out."""
    with database.opened(database.find(args.dsn)) as client:
        job = client.dlq.get(args.id)
    if job is None:
        say(f"bgjob: no dead job has the id {args.id!r}")
        return 1
    if args.json:
        table.write_json(_as_json(job))
        return 0
    shown = job._asdict() | {"headers": stored(job.headers)}
    for name, value in shown.items():
        text = payload.as_text(value) if isinstance(value, bytes) else str(value)
        if value is not None:
            lines = "\n    ".join(map(table.printable, text.splitlines()))
            sys.stdout.write(f"{name:<12}  {lines}\n")
    return 0


def _as_json(job: DeadJob) -> dict[str, Any]:
    return job._asdict() | {
        "arg": payload.as_json(job.arg),
        "checkpoint": payload.as_json(job.checkpoint),
    }


def run_requeue(args: argparse.Namespace) -> int:
    """Carry it out."""

    def requeue(client: Client, ids: list[str], filters: _Filters) -> int:
        keep = not args.drop_checkpoint
        return len(client.dlq.requeue(ids, keep_checkpoint=keep, **filters))

    found, done = _in_batches(args, requeue)
    if args.json:
        table.write_json({"requeued": done, "left": found - done})
    else:
        sys.stdout.write(f"requeued {_counted(done)}\n")
        if left := found - done:
            sys.stdout.write(f"left {_counted(left)}, whose ids live jobs have\n")
    return 0


def run_purge(args: argparse.Namespace) -> int:
    """Carry it out."""

    def purge(client: Client, ids: list[str], filters: _Filters) -> int:
        return client.dlq.purge(ids, **filters)

    _, done = _in_batches(args, purge)
    if args.json:
        table.write_json({"purged": done})
    else:
        sys.stdout.write(f"purged {_counted(done)}\n")
    return 0


def _in_batches(
    args: argparse.Namespace, act: Callable[[Client, list[str], _Filters], int]
) -> tuple[int, int]:
    """Act on the selected jobs; return the number of their ids, and of the jobs done."""
    filters = _filters(args)
    if args.all == any(choice is not None for choice in (args.ids, *filters.values())):
        raise UsageError("pass --queue, --type, --id or --older-than, or --all instead of them")
    with database.opened(database.find(args.dsn)) as client:
        ids = client._run(matching(DeadFilter(args.ids, **filters)), None)  # noqa: SLF001
        if len(ids) <= _BATCH:
            return len(ids), act(client, ids, filters) if ids else 0
        done = 0
        try:
            with progress(len(ids), "ids") as tell:
                for start in range(0, len(ids), _BATCH):
                    done += act(client, ids[start : start + _BATCH], filters)
                    tell(min(start + _BATCH, len(ids)))
        except BaseException:
            say(f"{_counted(done)} done before")
            raise
        return len(ids), done


def _counted(count: int) -> str:
    return "1 dead job" if count == 1 else f"{count:,} dead jobs"
