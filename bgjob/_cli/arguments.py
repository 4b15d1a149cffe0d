"""The arguments of commands, checked as they are parsed."""

import re
import socket
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from datetime import datetime
from math import inf
from pathlib import Path
from textwrap import dedent, fill
from typing import TYPE_CHECKING, TypeVar

from bgjob._checks import seconds
from bgjob._cli.listener import Address, TcpAddress
from bgjob._postgres.connection import check_conninfo
from bgjob.errors import BgjobError
from bgjob.job import check_name, check_priority

if TYPE_CHECKING:
    # A subparsers action is generic to a type checker, and has no public name.
    from argparse import _SubParsersAction

    Commands = _SubParsersAction[ArgumentParser]

T = TypeVar("T")
R = TypeVar("R")

STATUS = dedent("""\
    exit status:
      0    it succeeded
      1    it failed, for the reason on the standard error
      2    the arguments are wrong
      130  Ctrl-C interrupted it
    """)

_WIDTH = 88
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)([smhdw]?)", re.ASCII)


class UsageError(BgjobError):
    """The arguments contradict each other, or one is missing."""


def add_command(
    commands: "Commands",
    name: str,
    run: Callable[..., int],
    *,
    help: str,  # noqa: A002
    description: str,
    status: str = STATUS,
) -> ArgumentParser:
    """Add a command that `run` executes; return its parser."""
    parser = commands.add_parser(
        name,
        help=help,
        description=fill(description, _WIDTH),
        formatter_class=RawDescriptionHelpFormatter,
        epilog=status,
    )
    parser.set_defaults(command=run)
    return parser


def add_dsn(parser: ArgumentParser) -> None:
    """Add --dsn, for `database.find`."""
    parser.add_argument(
        "--dsn",
        type=conninfo,
        help="the database; by default that of BGJOB_DSN, DATABASE_URL or libpq's PG* variables, "
        "the first that is set. All users of the host can see arguments: pass a password in a "
        "variable",
    )


def add_json(parser: ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs to read")


def conninfo(text: str) -> str:
    """Check a connection string."""
    return _checked(check_conninfo, text)


def name(what: str) -> Callable[[str], str]:
    """Return a function that checks a name, for example of a queue."""

    def take(text: str) -> str:
        _checked(lambda text: check_name(what, text), text)
        return text

    return take


def priority(text: str) -> int:
    """Parse a priority."""
    try:
        number = int(text)
    except ValueError:
        raise ArgumentTypeError(f"a whole number is needed, not {text!r}") from None
    _checked(lambda number: check_priority(number, "priority"), number)
    return number


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ArgumentTypeError(f"a whole number from 1 is needed, not {text!r}")
    return number


def whole(text: str) -> int:
    """Parse a whole number from 0."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"a whole number from 0 is needed, not {text!r}")
    return int(text)


def rate(text: str) -> float:
    """Parse a number of jobs a second."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < inf:
        raise ArgumentTypeError(f"a number of jobs a second above 0 is needed, not {text!r}")
    return number


def duration(text: str) -> float:
    """Parse a duration; return seconds."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ArgumentTypeError(
            f"a number of seconds from 0, or one such as 90s, 15m, 2h, 30d or 1w is needed, "
            f"not {text!r}"
        )
    number, unit = found.groups()
    return _checked(lambda value: seconds(value, "a duration"), float(number) * _UNITS[unit])


def moment(text: str) -> datetime:
    """Parse a time with its offset from UTC."""
    try:
        value = datetime.fromisoformat(text)
        value.astimezone()  # raises unless it can be shown
        if value.utcoffset() is not None:
            return value
    except (ValueError, OverflowError):
        pass
    raise ArgumentTypeError(
        "a time with its offset from UTC is needed, such as 2030-01-31T09:00Z or "
        f"2030-01-31T09:00+01:00, not {text!r}"
    )


def duration_or_moment(text: str) -> float | datetime:
    """Parse a duration, or a time with its offset from UTC."""
    return duration(text) if _DURATION.fullmatch(text) else moment(text)


def queue(text: str) -> tuple[str, int | None]:
    """Parse NAME or NAME=N."""
    queue, equals, number = text.rpartition("=")
    if not equals:
        return name("queue")(text), None
    return name("queue")(queue), positive(number)


def address(text: str) -> Address:
    """Parse HOST:PORT, [HOST]:PORT, :PORT or unix:PATH."""
    if text.startswith("unix:") and len(text) > len("unix:"):
        if not hasattr(socket, "AF_UNIX"):
            raise ArgumentTypeError(
                f"Python has no Unix sockets on this system: HOST:PORT is needed, not {text!r}"
            )
        return Path(text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_bracketed = host == f"[{bare}]"
    if colon and port.isdecimal() and int(port) < 1 << 16 and (is_bracketed or ":" not in host):
        return TcpAddress(bare, int(port))
    raise ArgumentTypeError(
        f"HOST:PORT, :PORT for all interfaces, or unix:PATH is needed, such as 127.0.0.1:8321, "
        f"not {text!r}"
    )


def folder(text: str) -> Path:
    """Check that a text names a folder; return its absolute path."""
    path = Path(text)
    if not path.is_dir():
        raise ArgumentTypeError(f"there is no folder {text!r}")
    return path.resolve()


def target(text: str) -> str:
    """Check that a text has the form MODULE:NAME; the module is not imported."""
    module, colon, name = text.partition(":")
    if not (colon and all(part.isidentifier() for part in (module + "." + name).split("."))):
        raise ArgumentTypeError(f"MODULE:NAME is needed, such as app.jobs:mux, not {text!r}")
    return text


def _checked(check: Callable[[T], R], value: T) -> R:
    try:
        return check(value)
    except (ValueError, TypeError) as error:
        raise ArgumentTypeError(str(error)) from None
