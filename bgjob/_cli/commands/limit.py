"""`bgjob limit`: limit how many jobs of a queue or a type run at once, or start in a time."""

import argparse
import sys
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, table
from bgjob._cli.arguments import UsageError, add_command
from bgjob._words import lasting
from bgjob.limit import Limit, LimitStatus

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "limit",
        help="limit the jobs of a queue or a type over all workers",
        description="Limits how many jobs of a queue or a type run at once, or start in a time, "
        "over all workers. Jobs that wait for the limit of their type hold up no other type. A "
        "limit that is set here takes precedence over one in a program's code.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=arguments.STATUS,
    )
    limits = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    each = add_command(
        limits,
        "set",
        run_set,
        help="set the limit of a queue or a type",
        description="Sets the limit of a queue, or of a job type in all queues, in place of one "
        "that it has. From then on no job of it starts without a ration of the limit; workers "
        "notice a change within five seconds. With --none there is no limit, whatever the code of "
        "programs says.",
    )
    _add_subject(each)
    each.add_argument(
        "--concurrency",
        type=arguments.positive,
        metavar="N",
        help="how many of its jobs run at once",
    )
    each.add_argument(
        "--rate",
        metavar="RATE",
        help="how many of its jobs start: 14/s, 600/m, 1000/h or 5/d",
    )
    each.add_argument(
        "--burst",
        type=arguments.positive,
        metavar="N",
        help="how many of them may start at once (default: as many as in a second, at least 1)",
    )
    each.add_argument("--none", action="store_true", help="no limit")
    _add_common(each)
    each = add_command(
        limits,
        "list",
        run_list,
        help="list limits",
        description="Lists the limits, and what of them is in use: those that were set, and those "
        "in the code of programs whose workers used them within the last minute.",
    )
    _add_common(each)
    each = add_command(
        limits,
        "remove",
        run_remove,
        help="end a limit that was set",
        description="Ends a limit that was set. One in the code of programs holds again. If none "
        "was set, nothing changes, and the exit status is 0.",
    )
    _add_subject(each)
    _add_common(each)


def _add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scope", choices=("queue", "type"), help="of what")
    parser.add_argument("name", type=arguments.name("name"), metavar="NAME", help="its name")


def _add_common(parser: argparse.ArgumentParser) -> None:
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run_set(args: argparse.Namespace) -> int:
    """Carry it out."""
    try:
        limit = Limit(args.concurrency, args.rate, args.burst)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if (limit == Limit()) != args.none:
        raise UsageError(
            "--none goes with no other option"
            if args.none
            else "say what the limit is: --concurrency, --rate, or --none for no limit"
        )
    with database.opened(database.find(args.dsn)) as client:
        client.limits.set(args.scope, args.name, limit)
    if args.json:
        table.write_json({"scope": args.scope, "name": args.name, **_as_json(limit)})
    else:
        sys.stdout.write(f"limited {table.printable(args.name)}: {limit}\n")
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Carry it out."""
    with database.opened(database.find(args.dsn)) as client:
        was_set = client.limits.remove(args.scope, args.name)
    if args.json:
        table.write_json({"scope": args.scope, "name": args.name, "was_set": was_set})
    else:
        name = table.printable(args.name)
        done = f"removed the limit of {name}" if was_set else f"{name} had no limit that was set"
        sys.stdout.write(f"{done}\n")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Carry it out."""
    with database.opened(database.find(args.dsn)) as client:
        limits = client.limits.list()
    if args.json:
        table.write_json([_status(each) for each in limits])
    else:
        columns = (
            "of",
            "name",
            "at once",
            "rate",
            "burst",
            "by",
            "workers",
            "places",
            "starts",
            "next",
        )
        table.write_table(columns, [_row(each) for each in limits])
    return 0


def _as_json(limit: Limit) -> dict[str, object]:
    return {"concurrency": limit.concurrency, "rate": limit.rate, "burst": limit.burst_size}


def _status(status: LimitStatus) -> dict[str, object]:
    return {
        "scope": status.scope,
        "name": status.name,
        **_as_json(status.limit),
        "is_set": status.is_set,
        "used_at": status.used_at,
        "workers": status.workers,
        "places": status.places,
        "tokens": status.tokens,
        "next_in": status.next_in,
    }


def _row(status: LimitStatus) -> tuple[object, ...]:
    limit, has_places = status.limit, status.limit.concurrency is not None
    return (
        status.scope,
        status.name,
        limit.concurrency,
        limit.rate,
        limit.burst_size,
        "operator" if status.is_set else "code",
        status.workers if has_places else None,
        status.places if has_places else None,
        status.tokens,
        f"in {lasting(status.next_in)}" if status.next_in else None,
    )
