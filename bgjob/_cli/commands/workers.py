"""`bgjob workers`: list the registered workers."""

import argparse
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, table
from bgjob.workers import WorkerStatus

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_COLUMNS = (
    "number",
    "state",
    "host",
    "pid",
    "program",
    "release",
    "started at",
    "busy",
    "completed",
    "failed",
    "longest",
    "note",
)


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "workers",
        run,
        help="list the workers: what they run, and whether they are seen",
        description="Lists the workers that were seen within a day. Each writes a row when it "
        "starts, every 10 s, and when it has ended. One whose row is older than three times that "
        "is lost: it was killed, or its host or its connection is down. The lost ones come first.",
    )
    parser.add_argument("--lost", action="store_true", help="only lost workers")
    parser.add_argument("--queue", type=arguments.name("queue"), help="only workers of this queue")
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with database.opened(database.find(args.dsn)) as client:
        workers = [
            worker
            for worker in client.workers()
            if (worker.state == "lost" or not args.lost)
            and (args.queue is None or args.queue in worker.queues)
        ]
    if args.json:
        table.write_json([_as_json(worker) for worker in workers])
    else:
        table.write_table(_COLUMNS, map(_row, workers))
    return 0


def _as_json(worker: WorkerStatus) -> dict[str, object]:
    return worker._asdict() | {
        "counts": worker.counts._asdict(),
        "longest": [job._asdict() for job in worker.longest],
    }


def _row(worker: WorkerStatus) -> tuple[object, ...]:
    busy = [f"{queue} {worker.running.get(queue, 0)}/{n}" for queue, n in worker.queues.items()]
    longest = None
    if worker.is_alive and worker.longest:
        job = worker.longest[0]
        seconds = max((worker.seen_at - job.since).total_seconds() + worker.not_seen, 0.0)
        longest = f"{job.id} {seconds:.0f} s"
    counts = worker.counts
    return (
        str(worker.number),
        f"not seen for {worker.not_seen:.0f} s" if worker.state == "lost" else worker.state,
        worker.host,
        str(worker.pid),
        worker.program,
        worker.release,
        worker.started_at,
        ", ".join(busy) if worker.is_alive else None,
        counts.completed,
        counts.retried + counts.dead,
        longest,
        worker.note,
    )
