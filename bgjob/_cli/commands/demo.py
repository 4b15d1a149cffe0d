"""`bgjob demo`: watch bgjob work."""

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from bgjob._cli import arguments, table

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_STATUS = arguments.STATUS.replace("it succeeded", "every check agrees").replace(
    "it failed, for", "a check does not agree, or it failed, for"
)


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "demo",
        run,
        help="watch bgjob run some thousands of jobs, and check the result",
        description="Counts every file of Python's standard library, a job each, while other "
        "jobs wait, fail, are retried and die as they should; then compares the results with a "
        "count that was made without the queue. Takes a few seconds, and cleans up. With --web "
        "the jobs of a small shop keep flowing instead, and their page is served.",
        status=_STATUS,
    )
    parser.add_argument(
        "--dsn",
        type=arguments.conninfo,
        help="work in this database, in a schema that is dropped at the end, instead of a private "
        "PostgreSQL that is started for the demo",
    )
    parser.add_argument(
        "--concurrency",
        type=arguments.positive,
        default=8,
        metavar="N",
        help="how many handlers run at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--web",
        action="store_true",
        help="serve the web page over a world of jobs until Ctrl-C, and print its address",
    )
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.web:
        from bgjob._cli import demo_web  # noqa: PLC0415 (only what a command needs is imported)

        demo_web.serve(args.dsn)
        return 0
    from bgjob._cli import demo  # noqa: PLC0415

    report = demo.run(args.dsn, concurrency=args.concurrency)
    if args.json:
        table.write_json({"ok": report.ok, **asdict(report)})
    else:
        sys.stdout.write(report.table())
    return 0 if report.ok else 1
