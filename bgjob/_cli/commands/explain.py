"""`bgjob explain`: why a job does not run, and what would end that."""

import argparse
import sys
from textwrap import dedent
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, explained, table
from bgjob.explanation import Explanation

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

STATUS = dedent("""\
    exit status:
      0    it runs, is ready, or only needs time
      1    it failed, for the reason on the standard error
      2    the arguments are wrong
      3    it waits for somebody to act
      4    there is no such job
      130  Ctrl-C interrupted it
    """)


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "explain",
        run,
        help="tell why a job does not run, and what would end that",
        description="Tells why a job does not run: every reason that holds, in the order in which "
        "they matter, each with its remedy in a line that begins with `do`. Of a running job it "
        "tells who runs it, and since when. Nothing is changed.",
        status=STATUS,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "id", nargs="?", type=arguments.name("id"), metavar="ID", help="the job's id"
    )
    which.add_argument(
        "--queue",
        type=arguments.name("queue"),
        metavar="QUEUE",
        help="instead of an id: the job of this queue that has been due for longest",
    )
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with database.opened(database.find(args.dsn)) as client:
        explanation = client.explain(args.id, queue=args.queue)
    if args.json:
        table.write_json(explanation.as_json())
    else:
        _write(explanation)
    return explanation.status


def _write(explanation: Explanation) -> None:
    lines = explained.lines(explanation)
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        sys.stdout.write(f"{label:<{width}}  {table.printable(text)}\n")
