"""`bgjob worker`: run a worker, in this process or in several."""

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import psycopg

from bgjob._cli import arguments
from bgjob._cli.database import VARIABLE
from bgjob._cli.health import HEALTH, HealthOptions, from_environment
from bgjob._cli.listener import shown
from bgjob.errors import BgjobError

if TYPE_CHECKING:
    from bgjob._cli.worker.target import Choice

_DAY = 86400.0

_STATUS = dedent("""\
    signals:
      SIGTERM, SIGINT  shut down: stop claiming, release jobs that have not started, finish
                       the running ones; jobs that still run after the grace period are left
                       to their leases, and the process ends within 2 s, whatever hangs in it;
                       on Windows SIGINT (Ctrl-C) and SIGBREAK
      a second one     exit immediately; running jobs are left to their leases

    reload:
      With --reload the worker ends as after a signal when a file changes, and is started again.
      A program that cannot be loaded waits for the next change, after its traceback.

    several processes:
      A process that ends is started again after 0.1 s, doubling up to 10 s while it lives
      for less than 10 s. If more than 5 die within 10 s the others are shut down. If the
      parent is killed they shut down, too.

    exit status:
      0         after a shutdown by a signal or by the program
      1         the worker could not be loaded or started, or it ended on its own; or too
                many processes died
      2         the arguments are wrong
      130, 143  after a second signal, SIGINT or SIGTERM
    """)


def add(commands: "arguments.Commands", **defaults: Any) -> None:
    """Add the command, with defaults of a program that wraps it; see cli.main."""
    parser = arguments.add_command(
        commands,
        "worker",
        run,
        help="run a worker until a signal ends it",
        description="Imports a worker or several, or makes them from a callable or a Mux, and runs "
        "them until SIGTERM or SIGINT. The current directory is on the module path.",
        status=_STATUS,
    )
    parser.add_argument(
        "target",
        nargs="?" if "target" in defaults else None,
        type=arguments.target,
        metavar="MODULE:NAME",
        help="a Mux, such as app.jobs:mux; a Worker or an AsyncWorker; a list of these, as of "
        "several databases; or a callable that returns a worker or a list. It receives those of "
        "--dsn, --queue and --concurrency that it has parameters for: dsn, queues (a dict from "
        "names to their slots) and concurrency. A coroutine function is awaited on the loop that "
        "AsyncWorkers then run on",
    )
    parser.add_argument(
        "--queue",
        dest="queues",
        type=arguments.queue,
        action="append",
        metavar="NAME[=N]",
        help="work on this queue, with N slots: handlers at the same time; may be repeated",
    )
    parser.add_argument(
        "--concurrency",
        type=arguments.positive,
        metavar="N",
        help="slots of each queue that has no N of its own (default: 1, as for Worker)",
    )
    parser.add_argument(
        "--processes",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="run N processes, each with such a worker (default: %(default)s); for work that "
        "computes use one for each core",
    )
    parser.add_argument(
        "--reload",
        action="store_true",
        help="for development: start the worker again when a Python file changes; needs "
        "bgjob[reload]",
    )
    parser.add_argument(
        "--reload-dir",
        dest="folders",
        type=arguments.folder,
        action="append",
        metavar="PATH",
        help="a folder to watch, with all in it (default: the current directory); may be repeated",
    )
    parser.add_argument(
        "--grace",
        type=arguments.duration,
        default=30.0,
        metavar="DURATION",
        help="how long a shutdown waits for running handlers: seconds, or 5m (default: "
        "%(default)g); less than the supervisor waits before it kills",
    )
    parser.add_argument(
        "--release",
        metavar="TEXT",
        help="the version of the program, for `bgjob workers` (default: that of BGJOB_RELEASE)",
    )
    parser.add_argument(
        "--minutes",
        type=arguments.duration,
        default=7 * _DAY,
        metavar="DURATION",
        help="how long to keep the counts of what ends in each minute, by queue and type, for "
        "charts, `bgjob top` and client.minutes() (default: 7d); 0 counts nothing. A worker with "
        "a service Minutes of its own uses that",
    )
    parser.add_argument(
        "--health",
        type=arguments.address,
        metavar="HOST:PORT",
        help="answer probes by HTTP there, or on unix:PATH: /livez, /readyz, /startupz, and "
        f"/metrics for Prometheus (default: {HEALTH}, if it is set)",
    )
    parser.add_argument(
        "--alive-file",
        type=Path,
        metavar="PATH",
        help="touch this file every 5 s while the process is live, and remove it at the end",
    )
    parser.add_argument(
        "--live-within",
        type=arguments.duration,
        metavar="DURATION",
        help="not to be live if a queue has due jobs and free slots, and nothing was claimed for "
        "so long (default: that is not looked at)",
    )
    arguments.add_dsn(parser)
    parser.add_argument(
        "--log-level",
        type=str.upper,
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        help="the lowest level to log (default: INFO, unless the program sets up logging)",
    )
    parser.add_argument(
        "--log-format",
        choices=["text", "json"],
        help="json: one object a line, with time, level, logger, pid and message, and for a job "
        "job_id, job_queue, job_type and job_attempt (default: text, unless the program sets up "
        "logging)",
    )
    # For a parent's children only.
    parser.add_argument("--lifeline", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--with-pid", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dsn-in-environment", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(**{"module": "bgjob", **defaults})


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from bgjob._cli.worker import log  # noqa: PLC0415 (only what a command needs is imported)
    from bgjob._cli.worker.serve import ServeError  # noqa: PLC0415
    from bgjob._cli.worker.target import TargetError  # noqa: PLC0415
    from bgjob._worker.registry import RELEASE  # noqa: PLC0415

    _check(args)
    choice, health = _choice(args), _health(args)
    if args.release is not None:
        os.environ[RELEASE] = args.release  # also for children
    try:
        if args.reload:
            return _run_reloaded(args)
        if args.processes > 1:
            _run_several(args, health)
        else:
            _run_one(args, choice, health)
    except (BgjobError, psycopg.Error) as error:
        message = " ".join(str(error).split())
        is_theirs = isinstance(error, TargetError | ServeError)
        cause = error.__cause__ if is_theirs else None  # where the program's own code failed
        if args.log_format == "json":
            sys.stderr.write(log.as_json(message, cause) + "\n")
        else:
            if cause is not None:
                traceback.print_exception(cause)
            sys.stderr.write(f"bgjob: {message}\n")
        return 1
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.folders is not None and not args.reload:
        raise arguments.UsageError("--reload-dir has no effect on its own: pass --reload, too")
    if args.processes > 1 and args.reload:
        raise arguments.UsageError("--reload runs one process: leave out --processes")
    if args.processes > 1 and not hasattr(os, "fork"):
        raise arguments.UsageError(
            "--processes needs a POSIX system, such as Linux or macOS: start several workers here"
        )


def _choice(args: argparse.Namespace) -> "Choice":
    from bgjob._cli.worker.target import Choice  # noqa: PLC0415
    from bgjob.minutes import Minutes  # noqa: PLC0415

    if args.queues is not None and len(dict(args.queues)) < len(args.queues):
        raise arguments.UsageError("--queue names a queue twice")
    dsn = os.environ[VARIABLE] if args.dsn_in_environment else args.dsn
    minutes = Minutes(args.minutes / _DAY) if args.minutes else None
    return Choice(dsn, dict(args.queues) if args.queues else None, args.concurrency, minutes)


def _run_one(args: argparse.Namespace, choice: "Choice", health: HealthOptions) -> None:
    from bgjob._cli.worker import log, serve  # noqa: PLC0415

    set_up = partial(log.set_up, args.log_level, args.log_format, with_pid=args.with_pid)
    serve.serve(
        args.target,
        grace=args.grace,
        choice=choice,
        set_up_logging=set_up,
        lifeline=args.lifeline,
        health=health,
        reports=None if args.report is None else serve.Reports(args.report, args.counted),
    )


def _run_several(args: argparse.Namespace, health: HealthOptions) -> None:
    from bgjob._cli.worker import log, processes  # noqa: PLC0415

    log.set_up(args.log_level, args.log_format, with_pid=True)
    processes.supervise(
        _arguments_of(args),
        module=args.module,
        count=args.processes,
        grace=args.grace,
        env=_environment_of(args),
        health=health._replace(live_within=None),
    )


def _run_reloaded(args: argparse.Namespace) -> int:
    from bgjob._cli.worker import log, reload  # noqa: PLC0415

    reload.check_extra()
    log.set_up(args.log_level, args.log_format)
    own = []  # of the process that answers for itself
    if args.health is not None:
        own.append(f"--health={shown(args.health)}")
    if args.alive_file is not None:
        own.append(f"--alive-file={args.alive_file}")
    return reload.reload(
        [*_arguments_of(args), *own],
        module=args.module,
        folders=args.folders or [Path.cwd()],
        grace=args.grace,
        env=_environment_of(args),
    )


def _health(args: argparse.Namespace) -> HealthOptions:
    if args.report is not None:  # the parent answers
        return HealthOptions(live_within=args.live_within)
    address = args.health or from_environment()
    is_watched = address or args.alive_file or os.environ.get("NOTIFY_SOCKET")
    if args.live_within is not None and not is_watched:
        raise arguments.UsageError(
            "--live-within has no effect on its own: pass --health or --alive-file, too"
        )
    return HealthOptions(address, args.alive_file, args.live_within)


def _environment_of(args: argparse.Namespace) -> Mapping[str, str]:
    """Return the environment of a child; its arguments are what all users of the host can see."""
    return os.environ if args.dsn is None else {**os.environ, VARIABLE: args.dsn}


def _arguments_of(args: argparse.Namespace) -> Sequence[str]:
    """Return the arguments of a child."""
    arguments = ["worker", args.target, f"--grace={args.grace!r}"]
    arguments += [
        f"--queue={queue}" if number is None else f"--queue={queue}={number}"
        for queue, number in args.queues or ()
    ]
    for option in ("concurrency", "minutes", "log_level", "log_format", "live_within"):
        if (value := getattr(args, option)) is not None:
            arguments.append(f"--{option.replace('_', '-')}={value}")
    if args.dsn is not None:
        arguments.append("--dsn-in-environment")
    return arguments
