"""`bgjob playground`: try it at a prompt."""

import argparse
from typing import TYPE_CHECKING

from bgjob import _arguments

if TYPE_CHECKING:
    from bgjob._arguments import Commands


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = _arguments.add_command(
        commands,
        "playground",
        run,
        help="try it at a Python prompt",
        description="A Python prompt with a client, a mux and a worker on a private PostgreSQL, "
        "which goes away when you leave.",
    )
    parser.add_argument(
        "--dsn",
        type=_arguments.conninfo,
        help="work in this database, which has the tables already, and stays",
    )


def run(args: argparse.Namespace) -> int:
    """Carry it out."""
    from bgjob import _playground  # noqa: PLC0415 (only what a command needs is imported)

    _playground.play(args.dsn)
    return 0
