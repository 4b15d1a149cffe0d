"""`bgjob top`: what the queues hold, renewed every few seconds."""

import argparse
import sys
from argparse import ArgumentTypeError
from contextlib import closing
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, table
from bgjob._cli.top import live
from bgjob._cli.top.frame import frame
from bgjob._cli.top.history import History
from bgjob._cli.top.seen import SORTS, View
from bgjob._cli.top.source import Source

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_EVERY = 2.0
_LEAST = 0.1


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "top",
        run,
        help="watch the queues: what waits, for how long, and what dies",
        description="Shows what each queue holds, and renews it every few seconds: due, running "
        "and delayed jobs and those that wait for an exclusive key, counted up to 1,000 for each "
        "priority; for how long the oldest job has been due, and whether that grows or shrinks; "
        "the jobs that died within the last hour; the workers that are seen, their slots and "
        "their rates; and, where workers count minutes, what each queue completed and the share "
        "that failed. It costs the database some milliseconds, whatever the tables hold. Keys: "
        "the arrows choose a queue, Enter tells why its first due job does not run, s sorts by "
        "another column, p freezes the screen, q quits. Over a pipe it prints one frame and ends. "
        "NO_COLOR=1 switches colours off.",
    )
    parser.add_argument(
        "--every",
        type=_pause,
        default=_EVERY,
        metavar="DURATION",
        help="the time between two looks (2s by default); longer where a look takes over a "
        "fortieth of it",
    )
    parser.add_argument(
        "--sort", choices=SORTS, default=SORTS[0], help="by what to sort the queues at first"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    source = Source(database.find(args.dsn))
    if not (args.json or args.once) and live.can_draw():
        # Its connection ends with the process: another thread may be waiting for an answer.
        live.show(source, source.server, every=args.every, sort=args.sort)
        return 0
    with closing(source):
        seen = source.ask()
    if args.json:
        table.write_json(seen.overview)
    else:
        view = View(width=live.width(), sort=args.sort)
        for line in live.texts(frame(seen, source.server, History(), view)):
            sys.stdout.write(f"{line}\n")
    return 0


def _pause(text: str) -> float:
    seconds = arguments.duration(text)
    if seconds < _LEAST:
        raise ArgumentTypeError(f"at least {_LEAST} s are needed, not {text!r}")
    return seconds
