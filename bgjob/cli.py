"""The command line: `bgjob`, or `python -m bgjob`."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, cast

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
    limit,
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

_NONE: Mapping[str, Any] = MappingProxyType({})

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
    limit,
    pauses,
    schedules,
    schema,
    playground,
    demo,
)


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "bgjob",
    worker_defaults: Mapping[str, Any] = _NONE,
) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the arguments without the program's name; the process's by default.
        prog: how the program is called, for its help.
        worker_defaults: of `bgjob worker`, by the names of its options, for a program that wraps
            it: with "target" none need be given, and "module" is what the processes of
            --processes run with python -m.

    Returns:
        0 if the command succeeded, 1 if it failed (or the reader of its output is gone), 2 for
        arguments that contradict each other, 130 after Ctrl-C. A command that diagnoses returns
        3 for something to look at, and 4 for something to act on.

    Raises:
        SystemExit: with 2 for arguments that it does not understand, with 0 for --help.

    """
    try:
        status = _run(_parser(prog, worker_defaults).parse_args(argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, for example `head`, has read enough: discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(args: argparse.Namespace) -> int:
    command = cast("Command", args.command)
    try:
        return command(args)
    except KeyboardInterrupt:
        _tell("interrupted")
        return INTERRUPTED
    except UsageError as error:
        _tell(str(error))
        return 2
    except psycopg.errors.ReadOnlySqlTransaction as error:
        _tell(f"{error}: connect to the primary: target_session_attrs=read-write")
        return 1
    except (BgjobError, psycopg.Error) as error:
        _tell(str(error))
        return 1


def _parser(
    prog: str = "bgjob", worker_defaults: Mapping[str, Any] = _NONE
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Background jobs on PostgreSQL.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=STATUS,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands, **(worker_defaults if command is worker else {}))
    return parser


def _tell(message: str) -> None:
    with suppress(BrokenPipeError):
        sys.stderr.write(f"bgjob: {message}\n")
