"""`bgjob pause`, `bgjob resume` and `bgjob paused`: pause queues."""

import argparse
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, table
from bgjob._cli.arguments import UsageError, add_command
from bgjob._sql.session import clock

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

ENDLESS = "it is resumed"
"""Shown as the end of a pause without an end."""


def add(commands: "Commands") -> None:
    """Add the commands."""
    each = add_command(
        commands,
        "pause",
        run_pause,
        help="pause a queue: no worker claims from it",
        description="Pauses a queue, until it is resumed or until a time: no worker on any host "
        "claims from it; running jobs go on. Pausing a paused queue replaces its pause. It returns "
        "when no claim is in progress; if a transaction that may have claimed before goes on for "
        "30 s it exits with 1, and the queue is paused.",
    )
    each.add_argument("queue", type=arguments.name("queue"), metavar="QUEUE")
    end = each.add_mutually_exclusive_group()
    end.add_argument(
        "--until",
        type=arguments.moment,
        metavar="TIME",
        help="when the pause ends, such as 2030-01-31T09:00Z or 2030-01-31T09:00+01:00 "
        "(default: when the queue is resumed)",
    )
    end.add_argument(
        "--for",
        dest="duration",
        type=arguments.duration,
        metavar="DURATION",
        help="how long the pause lasts: seconds, or 90s, 15m, 2h, 30d",
    )
    _add_common(each)
    each = add_command(
        commands,
        "resume",
        run_resume,
        help="end the pause of a queue",
        description="Ends the pause of a queue, and notifies its workers. If the queue is not "
        "paused, nothing changes, and the exit status is 0.",
    )
    each.add_argument("queue", type=arguments.name("queue"), metavar="QUEUE")
    _add_common(each)
    each = add_command(
        commands,
        "paused",
        run_paused,
        help="list the paused queues",
        description="Lists the paused queues, and until when they are paused.",
    )
    _add_common(each)


def _add_common(parser: argparse.ArgumentParser) -> None:
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run_pause(args: argparse.Namespace) -> int:
    """Carry it out."""
    until = args.until
    with database.opened(database.find(args.dsn)) as client:
        if until is not None or args.duration is not None:
            now = client._run(clock(), None)  # noqa: SLF001
            until = until or now + timedelta(seconds=args.duration)
            if until <= now:
                raise UsageError("the pause would end before it begins: choose a later time")
        client.pause(args.queue, until)
    if args.json:
        table.write_json({"queue": args.queue, "until": until})
    else:
        end = "" if until is None else f" until {table.shown(until)}"
        sys.stdout.write(f"paused {table.printable(args.queue)}{end}\n")
    return 0


def run_resume(args: argparse.Namespace) -> int:
    """Carry it out."""
    with database.opened(database.find(args.dsn)) as client:
        was_paused = client.resume(args.queue)
    if args.json:
        table.write_json({"queue": args.queue, "was_paused": was_paused})
    else:
        queue = table.printable(args.queue)
        sys.stdout.write(f"resumed {queue}\n" if was_paused else f"{queue} was not paused\n")
    return 0


def run_paused(args: argparse.Namespace) -> int:
    """Carry it out."""
    with database.opened(database.find(args.dsn)) as client:
        paused = client.paused()
    if args.json:
        table.write_json([{"queue": queue, "until": until} for queue, until in paused.items()])
    else:
        rows = [(queue, until or ENDLESS) for queue, until in paused.items()]
        table.write_table(("queue", "paused until"), rows)
    return 0
