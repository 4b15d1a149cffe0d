"""`bgjob playground`: try bgjob at a prompt."""

import argparse
from typing import TYPE_CHECKING

from bgjob._cli import arguments

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "playground",
        run,
        help="try bgjob at a Python prompt",
        description="A Python prompt with a client, a mux and a worker on a private PostgreSQL, "
        "which is removed when you leave.",
    )
    parser.add_argument(
        "--dsn",
        type=arguments.conninfo,
        help="use this database, which must have the tables; it is kept",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from bgjob._cli import playground  # noqa: PLC0415 (only what a command needs is imported)

    playground.play(args.dsn)
    return 0
