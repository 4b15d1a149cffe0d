"""`bgjob enqueue`: write a job."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from bgjob._cli import arguments, database, table
from bgjob._cli.arguments import UsageError
from bgjob.job import EnqueueRequest

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "enqueue",
        run,
        help="write a job, and print its id",
        description="Writes a job, notifies a worker of its queue, and prints the job's id.",
    )
    parser.add_argument("queue", type=arguments.name("queue"), metavar="QUEUE")
    parser.add_argument("type", type=arguments.name("type"), metavar="TYPE")
    parser.add_argument(
        "arg",
        nargs="?",
        metavar="JSON",
        help="the payload, stored unchanged; - reads it from the standard input",
    )
    parser.add_argument(
        "--raw",
        metavar="FILE",
        help="use the bytes of this file as the payload; - for the standard input",
    )
    parser.add_argument(
        "--delay",
        type=arguments.duration,
        default=0.0,
        metavar="DURATION",
        help="the time until it is due: seconds, or 90s, 15m, 2h, 30d (default: due now)",
    )
    parser.add_argument(
        "--priority",
        type=int,
        default=0,
        metavar="N",
        help="-32768 to 32767, lower runs first (default: %(default)s)",
    )
    parser.add_argument(
        "--exclusive",
        type=arguments.name("exclusive"),
        metavar="KEY",
        help="of the jobs with this key one runs at a time, on any host (default: none)",
    )
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="with --exclusive: so many jobs of the key run at once (default: 1)",
    )
    parser.add_argument(
        "--headers",
        metavar="JSON",
        help="a small object beside the payload, for example a tenant or a trace's context",
    )
    parser.add_argument(
        "--expires",
        type=arguments.duration_or_moment,
        metavar="DURATION|TIME",
        help="do not run it if it is started later than this after now, or than this time "
        "(default: never)",
    )
    parser.add_argument(
        "--keep",
        type=arguments.duration,
        metavar="DURATION",
        help="keep the job's result, and its id, for this long after its end (default: not)",
    )
    parser.add_argument(
        "--id",
        type=arguments.name("id"),
        help="unique among live jobs, so that enqueuing twice is harmless (default: a new UUID)",
    )
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    options: dict[str, Any] = {} if args.id is None else {"id": args.id}
    if args.headers is not None:
        options["headers"] = _headers(args.headers)
    try:
        request = EnqueueRequest(
            args.queue,
            args.type,
            _payload(args),
            delay=args.delay,
            priority=args.priority,
            exclusive=args.exclusive,
            slots=args.slots,
            expires=args.expires,
            keep=args.keep,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    with database.opened(database.find(args.dsn)) as client:
        id_ = client.enqueue(request)
    if args.json:
        table.write_json({"id": id_})
    else:
        sys.stdout.write(f"{id_}\n")
    return 0


def _payload(args: argparse.Namespace) -> bytes | None:
    if args.raw is not None:
        if args.arg is not None:
            raise UsageError("pass JSON or --raw, not both")
        try:
            return _stdin() if args.raw == "-" else Path(args.raw).read_bytes()
        except OSError as error:
            raise UsageError(f"--raw: {error}") from None
    if args.arg is None:
        return None
    payload = _stdin() if args.arg == "-" else args.arg.encode("utf-8", "surrogateescape")
    try:
        orjson.loads(payload)
    except ValueError as error:
        where = "the standard input" if args.arg == "-" else repr(args.arg)
        raise UsageError(f"{where} is not JSON: {error}; for other bytes use --raw") from None
    return bytes(payload)


def _headers(text: str) -> Any:
    try:
        return orjson.loads(text.encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise UsageError(f"--headers: {text!r} is not JSON: {error}") from None


def _stdin() -> bytes:
    return sys.stdin.buffer.read()
