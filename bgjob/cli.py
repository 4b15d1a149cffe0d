"""The command line: `bgjob`, or `python -m bgjob`."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from textwrap import dedent
from typing import TYPE_CHECKING, cast

import orjson
import psycopg

from bgjob._connection import check_conninfo
from bgjob._duration import seconds
from bgjob.errors import BgjobError

if TYPE_CHECKING:
    # A subparsers action is generic to a type checker, and has no public name.
    from argparse import _SubParsersAction

    Commands = _SubParsersAction[argparse.ArgumentParser]

Command = Callable[[argparse.Namespace], int]

INTERRUPTED = 130
"""The exit status of a shell's command that Ctrl-C ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; give its exit status.

    Args:
        argv: the arguments, without the program's name; those of the process by default.

    Returns:
        0 if the command succeeded, 1 if it did not, 130 after Ctrl-C.

    Raises:
        SystemExit: with 2 for arguments that cannot be understood, with 0 for --help.

    """
    args = _parser().parse_args(argv)
    command = cast("Command", args.command)
    try:
        return command(args)
    except KeyboardInterrupt:
        _tell("interrupted")
        return INTERRUPTED
    except (BgjobError, psycopg.Error) as error:
        _tell(str(error))
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bgjob", description="Background jobs on PostgreSQL.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_worker, _add_demo):
        add(commands)
    return parser


def _tell(message: str) -> None:
    sys.stderr.write(f"bgjob: {message}\n")


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is needed, not {text!r}")
    return number


def _dsn(text: str) -> str:
    try:
        return check_conninfo(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# -- worker -----------------------------------------------------------------------------


def _add_worker(commands: "Commands") -> None:
    parser = commands.add_parser(
        "worker",
        help="run a worker until a signal ends it",
        description="Imports a worker of yours, or calls what makes one, and runs it until SIGTERM "
        "or SIGINT. The current directory is on the module path.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=dedent("""\
            signals:
              SIGTERM, SIGINT  shut down: claim nothing more, give back what has not started,
                               finish what runs; what still runs after the grace period is left
                               to its lease, and the process ends within 2 s, whatever hangs in it
              a second one     exit at once; what runs is left to its lease

            exit status:
              0         after a shutdown that was asked for, by a signal or by the program
              1         the worker could not be loaded or started, or it ended by itself
              2         the arguments cannot be understood
              130, 143  after a second signal, SIGINT or SIGTERM
            """),
    )
    parser.add_argument(
        "target",
        type=_target,
        metavar="MODULE:NAME",
        help="a Worker or an AsyncWorker, such as app.jobs:worker, or a callable without arguments "
        "that returns one; a coroutine function is awaited on the loop that the AsyncWorker "
        "then runs on",
    )
    parser.add_argument(
        "--grace",
        type=_grace,
        default=30.0,
        metavar="SECONDS",
        help="how long a shutdown waits for handlers that run (default: %(default)g); less than "
        "the supervisor waits before it kills",
    )
    parser.set_defaults(command=_worker)


def _target(text: str) -> str:
    module, colon, name = text.partition(":")
    if not (colon and all(part.isidentifier() for part in (module + "." + name).split("."))):
        raise argparse.ArgumentTypeError(
            f"MODULE:NAME is needed, such as app.jobs:worker, not {text!r}"
        )
    return text


def _grace(text: str) -> float:
    try:
        return seconds(float(text), "grace")
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a number of seconds from 0 is needed, not {text!r}"
        ) from None


def _worker(args: argparse.Namespace) -> int:
    from bgjob import _serve  # noqa: PLC0415
    from bgjob._target import TargetError  # noqa: PLC0415

    try:
        _serve.serve(args.target, grace=args.grace)
    except (BgjobError, psycopg.Error) as error:
        if isinstance(error, TargetError | _serve.ServeError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)  # where the program's own code failed
        _tell(" ".join(str(error).split()))
        return 1
    return 0


# -- demo -------------------------------------------------------------------------------


def _add_demo(commands: "Commands") -> None:
    parser = commands.add_parser(
        "demo",
        help="watch it work through some thousands of jobs, and check the result",
        description="Counts every file of Python's standard library, a job each, while other "
        "jobs wait, fail, come back and die as they should; then checks all of it against a "
        "count that was made without the queue. Takes a few seconds, and leaves nothing behind.",
        epilog="Exits with 0 if every check agrees, with 1 if any does not.",
    )
    parser.add_argument(
        "--dsn",
        type=_dsn,
        help="work in this database, in a schema that is dropped at the end, instead of a private "
        "PostgreSQL that is started for the demo",
    )
    parser.add_argument(
        "--concurrency",
        type=_positive,
        default=8,
        metavar="N",
        help="handlers at once (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.set_defaults(command=_demo)


def _demo(args: argparse.Namespace) -> int:
    from bgjob import demo  # noqa: PLC0415 (only what a command needs is imported)

    report = demo.run(args.dsn, concurrency=args.concurrency)
    if args.json:
        value = {"ok": report.ok, **asdict(report)}
        sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        sys.stdout.write(report.table())
    return 0 if report.ok else 1
