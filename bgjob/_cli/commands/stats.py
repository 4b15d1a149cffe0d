"""`bgjob stats`: count jobs, exactly or for a scaler."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from bgjob._cli import arguments, database, table
from bgjob._cli.commands.pauses import ENDLESS
from bgjob.stats import MinuteReport, QueueStats

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_SCALE_CAP = 5000
"""More replicas than their jobs need are not wanted."""


_ENDED = (
    *("queue", "type", "completed", "retried", "rescheduled", "dead", "lost", "timed out"),
    *("cancelled", "failed %", "run ms", "longest run ms", "wait ms", "longest wait ms"),
)


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
        "million jobs; `bgjob top --once` counts up to a cap, within milliseconds. With --last it "
        "shows instead what ended, as workers have counted it minute by minute.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--queue", type=arguments.name("queue"), help="only jobs of this queue")
    parser.add_argument(
        "--last",
        type=arguments.duration,
        metavar="DURATION",
        help="show what ended within this time, such as 6h, instead: jobs by outcome, the share of "
        "attempts that failed, how long handlers ran, and how long jobs had been due before",
    )
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
    if args.last is not None and args.scale is not None:
        raise arguments.UsageError("--scale counts what is there, and --last what ended")
    if args.last == 0:
        raise arguments.UsageError("--last must be over 0 s")
    with database.opened(database.find(args.dsn)) as client:
        if args.scale is not None:
            queues = client.overview(args.scale, cap=_SCALE_CAP).queues
            sys.stdout.write(f"{sum(queue.load for queue in queues)}\n")
            return 0
        if args.last is not None:
            _write_ended(client.minutes(args.last, by="type", queue=args.queue), args)
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


def _write_ended(report: MinuteReport, args: argparse.Namespace) -> None:
    if args.json:
        series = [
            {"queue": each.queue, "type": each.type, **each.total._asdict()}
            for each in report.series
        ]
        table.write_json({"since": report.since, "now": report.now, "series": series})
        return
    rows = []
    for each in report.series:
        total, ratio = each.total, each.total.failure_ratio
        run, wait = (total.longest_run, total.longest_wait) if total.runs else (None, None)
        rows.append(
            (
                each.queue,
                each.type,
                *total[: total._fields.index("runs")],
                None if ratio is None else 100 * ratio,
                *map(_milliseconds, (total.mean_run, run, total.mean_wait, wait)),
            )
        )
    table.write_table(_ENDED, rows)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
