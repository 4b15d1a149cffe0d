"""`bgjob health`: whether the database, or a worker of this host, is ready; for probes."""

import argparse
import socket
import sys
from http import HTTPStatus
from textwrap import dedent
from typing import TYPE_CHECKING

import psycopg

from bgjob import schema
from bgjob._cli import arguments, database
from bgjob._cli.health import HEALTH, from_environment
from bgjob._cli.listener import Address, shown
from bgjob._sql.execute import run as execute
from bgjob._sql.session import schema_comment
from bgjob._sql.workers import workers
from bgjob.errors import BgjobError, SchemaError

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

NOT_READY = 3

_STATUS = dedent("""\
    exit status:
      0    it is ready; with --probe live or startup: it is live, or has started
      1    it cannot be asked: the database or the worker does not answer
      2    the arguments are wrong
      3    it is not ready, not live, or has not started
      130  Ctrl-C interrupted it
    """)

_PROBES = {"live": "/livez", "ready": "/readyz", "startup": "/startupz"}
_ANY = object()
"""Given for --worker without an address."""


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "health",
        run,
        help="whether the database, or a worker of this host, is ready; for probes",
        description="Without --worker it connects to the database and checks the version of its "
        "tables. With --worker it asks a worker that has --health; if no address is known, it "
        "looks into the list of workers for one that works on this host.",
        status=_STATUS,
    )
    parser.add_argument(
        "--worker",
        nargs="?",
        const=_ANY,
        type=arguments.address,
        metavar="HOST:PORT",
        help=f"a worker that answers there, or on unix:PATH (default: {HEALTH}, if it is set; "
        "else a worker in the list)",
    )
    parser.add_argument(
        "--probe",
        choices=[*_PROBES],
        help="what to ask a worker that has --health (default: ready)",
    )
    parser.add_argument(
        "--queue", type=arguments.name("queue"), help="only a worker of this queue, in the list"
    )
    parser.add_argument(
        "--timeout",
        type=arguments.duration,
        default=5.0,
        metavar="DURATION",
        help="how long to wait for an answer (default: %(default)g s)",
    )
    arguments.add_dsn(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    address: Address | None = from_environment() if args.worker is _ANY else args.worker
    is_listed = args.worker is _ANY and address is None
    if args.probe is not None and address is None:
        raise arguments.UsageError(
            f"--probe asks a worker: pass --worker HOST:PORT, or set {HEALTH}"
        )
    if args.queue is not None and not is_listed:
        raise arguments.UsageError("--queue is for a worker in the list: pass --worker alone")
    if address is not None:
        from bgjob._cli.probing import ask  # noqa: PLC0415 (only what a command needs is imported)

        status, body = ask(address, _PROBES[args.probe or "ready"], args.timeout)
        _write(body)
        return _exit_status(status, address)
    return _look(args, of_worker=is_listed)


def _exit_status(status: int, address: Address) -> int:
    match status:
        case HTTPStatus.OK:
            return 0
        case HTTPStatus.SERVICE_UNAVAILABLE:
            return NOT_READY
        case _:
            raise BgjobError(f"{shown(address)} answers {status}: no worker with --health is there")


def _look(args: argparse.Namespace, *, of_worker: bool) -> int:
    with database.connect(database.find(args.dsn)) as connection:
        connection.patience = args.timeout
        try:
            schema.check_version(execute(connection, schema_comment()))
        except SchemaError as error:
            _write(f"not ready: {error}")
            return NOT_READY
        if not of_worker:
            _write("ready")
            return 0
        try:
            found = execute(connection, workers())
        except psycopg.errors.UndefinedTable as error:
            raise BgjobError("there is no list of workers, which migration/init.sql has") from error
    host = socket.gethostname()
    here = [
        worker
        for worker in found
        if worker.host == host and (args.queue is None or args.queue in worker.queues)
    ]
    at_work = sum(worker.state == "working" for worker in here)
    lost = sum(worker.state == "lost" for worker in here)
    told = f"on {host}: {at_work} at work, {lost} not seen for three beats"
    _write(f"ready {told}" if at_work else f"not ready {told}")
    return 0 if at_work else NOT_READY


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
