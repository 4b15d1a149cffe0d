"""The command line: `bgjob`, or `python -m bgjob`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

import psycopg

from bgjob._cli.arguments import STATUS, UsageError
from bgjob._cli.commands import (
    dashboards,
    demo,
    dlq,
    doctor,
    enqueue,
    explain,
    health,
    job,
    metrics,
    pauses,
    playground,
    preflight,
    schedules,
    schema,
    stats,
    top,
    triage,
    web,
    worker,
    workers,
)
from bgjob.errors import BgjobError

Command = Callable[[argparse.Namespace], int]

INTERRUPTED = 130
"""The exit status that a shell reports for a command ended by Ctrl-C."""

_COMMANDS = (
    worker,
    workers,
    health,
    metrics,
    dashboards,
    preflight,
    enqueue,
    stats,
    top,
    web,
    explain,
    doctor,
    job,
    triage,
    dlq,
    pauses,
    schedules,
    schema,
    playground,
    demo,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the arguments without the program's name; the process's by default.

    Returns:
        0 if the command succeeded, 1 if it failed (or the reader of its output is gone), 2 for
        arguments that contradict each other, 130 after Ctrl-C. A command that diagnoses returns
        3 for something to look at, and 4 for something to act on.

    Raises:
        SystemExit: with 2 for arguments that it does not understand, with 0 for --help.

    """
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, for example `head`, has read enough: discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    command = cast("Command", args.command)
    try:
        return command(args)
    except KeyboardInterrupt:
        _tell("interrupted")
        return INTERRUPTED
    except UsageError as error:
        _tell(str(error))
        return 2
    except (BgjobError, psycopg.Error) as error:
        _tell(str(error))
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bgjob",
        description="Background jobs on PostgreSQL.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=STATUS,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser


def _tell(message: str) -> None:
    with suppress(BrokenPipeError):
        sys.stderr.write(f"bgjob: {message}\n")
