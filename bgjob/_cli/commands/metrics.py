"""`bgjob metrics`: export what a database holds, for Prometheus."""

import argparse
import signal
import sys
from contextlib import closing
from time import sleep
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database
from bgjob._cli.listener import Answer, HttpServer, Request, shown
from bgjob.errors import BgjobError

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_LOOK = 0.2
"""Seconds between two checks for a signal that did not interrupt the main thread."""


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "metrics",
        run,
        help="export what the database holds, for Prometheus",
        description="Prints depths, ages, workers, schedules, and the state of the tables, as "
        "Prometheus reads them. With --listen it answers there on /metrics, until SIGTERM or "
        "Ctrl-C: run one for a database. The rates and durations of jobs are exported by the "
        "workers themselves (bgjob worker --health).",
    )
    parser.add_argument(
        "--listen",
        type=arguments.address,
        metavar="HOST:PORT",
        help="answer by HTTP there, or on unix:PATH",
    )
    parser.add_argument(
        "--keep",
        type=arguments.duration,
        default=5.0,
        metavar="DURATION",
        help="for how long an answer is given again, so that several Prometheus servers cost as "
        "much as one (default: %(default)g s)",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="count jobs exactly, which takes a second or more with a million jobs; without it "
        "counts stop at 10,000 for each priority of a queue",
    )
    arguments.add_dsn(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    try:
        from prometheus_client import CollectorRegistry  # noqa: PLC0415 (an extra)

        from bgjob._cli.exporting import Source  # noqa: PLC0415
        from bgjob._cli.worker.metering import rendered  # noqa: PLC0415
        from bgjob._prometheus.database import DatabaseMetrics  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("prometheus_client"):
            raise
        raise BgjobError(
            "metrics need the extra prometheus: pip install 'bgjob[prometheus]'"
        ) from None
    dsn = database.find(args.dsn)
    registry = CollectorRegistry()
    if args.listen is None:
        with database.opened(dsn) as client:
            DatabaseMetrics(client, registry=registry, exact=args.exact)
            sys.stdout.write(rendered(registry, "").body.decode())
        return 0

    def answer(request: Request) -> Answer | None:
        return rendered(registry, request.accept) if request.path == "/metrics" else None

    # Before it listens, so that no signal is lost.
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: asked.append(signum))
    try:
        source = Source(dsn)
        DatabaseMetrics(source, registry=registry, keep=args.keep, exact=args.exact)
        with closing(source):
            server = HttpServer(args.listen, answer)
            try:
                sys.stderr.write(f"bgjob: metrics on {shown(server.address)}\n")
                while not asked:
                    sleep(_LOOK)  # a signal interrupts it
            finally:
                server.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
