"""`bgjob stats`: count jobs, exactly or for a scaler."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from bgjob._cli import arguments, database, table
from bgjob._cli.commands.pauses import ENDLESS
from bgjob.stats import QueueStats

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_SCALE_CAP = 5000
"""More replicas than their jobs need are not wanted."""


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "stats",
        run,
        help="count waiting, running and dead jobs exactly, by queue and type",
        description="Counts the jobs of each queue and type exactly: due, delayed, running and "
        "dead, and those that wait for a retry; shows how many seconds the oldest due job has "
        "waited, and until when a queue is paused. A paused queue without jobs has a row without "
        "a type. It reads both tables from end to end, which takes a second or more with a "
        "million jobs; `bgjob top --once` counts up to a cap, within milliseconds.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--queue", type=arguments.name("queue"), help="only jobs of this queue")
    which.add_argument(
        "--scale",
        type=arguments.name("queue"),
        metavar="QUEUE",
        help="print one number for a scaler: how many jobs of this queue are due or running, "
        f"counted up to {_SCALE_CAP:,} for each priority, within milliseconds",
    )
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with database.opened(database.find(args.dsn)) as client:
        if args.scale is not None:
            queues = client.overview(args.scale, cap=_SCALE_CAP).queues
            sys.stdout.write(f"{sum(queue.load for queue in queues)}\n")
            return 0
        stats = client.stats(queue=args.queue)
        paused = client.paused()
    with_jobs = {row.queue for row in stats}
    rows: list[tuple[Any, ...]] = [
        *stats,
        *(
            (queue, None, 0, 0, 0, 0, None, 0)
            for queue in paused
            if queue not in with_jobs and args.queue in (None, queue)
        ),
    ]
    if args.json:
        table.write_json(
            [
                QueueStats._make(row)._asdict()
                | {"paused": row[0] in paused, "paused_until": paused.get(row[0])}
                for row in rows
            ]
        )
    else:
        ends = {queue: until or ENDLESS for queue, until in paused.items()}
        columns = [column.replace("_", " ") for column in QueueStats._fields]
        table.write_table([*columns, "paused until"], [(*row, ends.get(row[0])) for row in rows])
    return 0
