"""The command line: `bgjob`, or `python -m bgjob`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict

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
    for add in (_add_demo,):
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
        conninfo_to_dict(text)
    except psycopg.ProgrammingError:
        # The text and libpq's complaint may both hold a password.
        raise argparse.ArgumentTypeError(
            "this is no connection string; it looks like postgresql://user@host/database "
            "or like 'host=... user=... dbname=...'"
        ) from None
    return text


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
