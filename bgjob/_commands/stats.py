"""`bgjob stats`: what waits, runs and is dead."""

import argparse
from typing import TYPE_CHECKING

from bgjob import _arguments, _database, _table

if TYPE_CHECKING:
    from bgjob._arguments import Commands

_COLUMNS = ("queue", "type", "due", "delayed", "running", "dead", "oldest_due_age", "retries")


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = _arguments.add_command(
        commands,
        "stats",
        run,
        help="show what waits, runs and is dead, for each queue and type",
        description="Counts the jobs of each queue and type: due, delayed, running and dead, those "
        "that wait for a retry, and for how many seconds the oldest due one has waited.",
    )
    parser.add_argument("--queue", type=_arguments.name("queue"), help="only of this queue")
    _arguments.add_dsn(parser)
    _arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry it out."""
    with _database.opened(_database.find(args.dsn)) as client:
        stats = client.stats(queue=args.queue)
    rows = [[getattr(row, column) for column in _COLUMNS] for row in stats]
    if args.json:
        _table.write_json([dict(zip(_COLUMNS, row, strict=True)) for row in rows])
    else:
        _table.write_table([column.replace("_", " ") for column in _COLUMNS], rows)
    return 0
