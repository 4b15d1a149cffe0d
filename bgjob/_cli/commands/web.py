"""`bgjob web`: see and steer the queues in a browser."""

import argparse
import getpass
import logging
import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bgjob._cli import arguments, database, page
from bgjob._cli.arguments import UsageError
from bgjob._cli.page import Listen
from bgjob._cli.worker import log

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_logger = logging.getLogger("bgjob.web")

_COLOURS = ("grey", "blue", "green", "orange", "red", "purple")


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "web",
        run,
        help="serve a page that shows and steers the queues in a browser",
        description="Serves a page on this host and prints its address, with a token that lets the "
        "browser in. It shows what hurts first; why a job does not run; live jobs, dead jobs by "
        "how they died, schedules, workers and what the doctor finds; and it does what the other "
        "commands do. It needs the extra `web`. The role needs the privileges of bgjob_operator, "
        "and of bgjob_editor to change live jobs.",
    )
    parser.add_argument(
        "--listen",
        type=_listen,
        default=Listen("127.0.0.1", 8080),
        metavar="HOST:PORT",
        help="where to listen (127.0.0.1:8080 by default); :PORT for all interfaces",
    )
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which the page is asked for, besides localhost and this host's; for "
        "each other one it answers 421",
    )
    _add_access(parser)
    parser.add_argument(
        "--read-only", action="store_true", help="change nothing, whatever a user is allowed"
    )
    parser.add_argument(
        "--payloads",
        choices=("mask", "show", "hide"),
        default="mask",
        help="mask (the default) shows dots for values whose names look secret, until a user who "
        "may asks for them; show shows all; hide shows no payload to anybody",
    )
    parser.add_argument(
        "--metrics",
        action="store_true",
        help="answer on /metrics what the database holds, for a Prometheus that sends the token; "
        "needs the extra prometheus. One exporter for a database is enough",
    )
    parser.add_argument(
        "--trace-url",
        default="",
        metavar="URL",
        help="where another site shows a trace, such as https://traces.example.com/{trace_id}: the "
        "page of a job with a trace's context in its headers links to it",
    )
    parser.add_argument("--name", default="", help="the installation's name, such as production")
    parser.add_argument("--colour", choices=_COLOURS, default="grey", help="its colour")
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="the prefix under which a proxy shows the page, such as /bgjob",
    )
    parser.add_argument(
        "--database",
        dest="databases",
        type=_named,
        action="append",
        metavar="NAME=DSN",
        help="one of several databases, whose pages are below its name; may be repeated. All users "
        "of the host can see arguments: name a service of libpq, such as mail=service=mail",
    )
    arguments.add_dsn(parser)


def _named(text: str) -> tuple[str, str]:
    name, equals, dsn = text.partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"NAME=DSN is needed, such as mail=service=mail, not {text!r}")
    return name, arguments.conninfo(dsn)


def _databases(args: argparse.Namespace) -> str | Mapping[str, str]:
    if args.databases is None:
        return database.find(args.dsn)
    if args.dsn is not None:
        raise UsageError("--dsn is for a page of one database: leave it out beside --database")
    if len(dict(args.databases)) < len(args.databases):
        raise UsageError("--database has a name twice")
    return dict(args.databases)


def _add_access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--auth",
        choices=("token", "users", "proxy", "none"),
        default="token",
        help="token (the default): the one of the printed address, or of BGJOB_WEB_TOKEN; users: a "
        "file with names and passwords; proxy: a header that a reverse proxy sets; none: anybody "
        "who can reach the page, on a loopback address only",
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="a file with the token, so that it stays the same"
    )
    parser.add_argument(
        "--users", metavar="FILE", help="the file of --auth users, with lines of --hash"
    )
    parser.add_argument(
        "--hash",
        metavar="USER",
        help="ask for a password, print the user's line for that file, with the permissions of "
        "--allow, and end",
    )
    parser.add_argument(
        "--user-header",
        default="X-Forwarded-User",
        metavar="NAME",
        help="the header of --auth proxy with the user's name (X-Forwarded-User by default)",
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="NETWORK",
        help="the addresses of the proxy, such as 127.0.0.1/32: its headers count",
    )
    parser.add_argument(
        "--allow",
        type=lambda text: frozenset(text.replace(" ", "").split(",")),
        metavar="PERMISSION,...",
        help="what a user may do, of: look, payloads, jobs, abandon, pause, limits, requeue, "
        "purge, schedules; all by default. With --auth users the file says it",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    page.check_extra()
    if args.hash is not None:
        return _hash(args)
    access = _access(args)
    dsn = _databases(args)
    log.set_up(None, None)
    if not (args.listen.is_local or args.trust):
        _logger.warning(
            "other hosts can reach the page, over plain HTTP, where its token can be read: put "
            "a proxy with TLS in front of it, and name its addresses with --trust"
        )
    try:
        page.serve(
            dsn,
            listen=args.listen,
            access=access,
            hosts=args.host,
            trust=args.trust,
            read_only=args.read_only,
            payloads=args.payloads,
            name=args.name,
            colour=args.colour,
            root_path=args.root_path.rstrip("/"),
            metrics=args.metrics,
            trace_url=args.trace_url,
        )
    except ImportError as error:
        raise UsageError(
            f"--metrics needs the extra prometheus ({error}): pip install 'bgjob[prometheus]'"
        ) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


def _access(args: argparse.Namespace) -> Any:
    """Return who may do what; raise UsageError if the options contradict each other."""
    from bgjob.ext.web import (  # noqa: PLC0415 (an extra)
        Anyone,
        ProxyAccess,
        TokenAccess,
        UsersAccess,
    )
    from bgjob.ext.web.frame import PERMISSIONS  # noqa: PLC0415

    allowed = PERMISSIONS if args.allow is None else args.allow
    try:
        match args.auth:
            case "token":
                return TokenAccess(page.fixed_token(args.token_file), permissions=allowed)
            case "users":
                if args.users is None:
                    raise UsageError("--auth users needs --users FILE")
                if args.allow is not None:
                    raise UsageError("with --auth users the file has the permissions: no --allow")
                return UsersAccess(args.users)
            case "proxy":
                return ProxyAccess(args.user_header, args.trust, permissions=allowed)
            case _ if not args.listen.is_local:
                raise UsageError(
                    "--auth none is for a loopback address: anybody who can reach "
                    f"{args.listen.host or 'this host'} could delete jobs"
                )
            case _:
                return Anyone(allowed)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _hash(args: argparse.Namespace) -> int:
    from bgjob.ext.web.access import check_permissions  # noqa: PLC0415 (an extra)
    from bgjob.ext.web.frame import PERMISSIONS  # noqa: PLC0415
    from bgjob.ext.web.users import hashed  # noqa: PLC0415

    allowed = PERMISSIONS if args.allow is None else args.allow
    if not args.hash or ":" in args.hash or args.hash.startswith("#"):
        raise UsageError(f"a user's name has no colon, and does not begin with #: {args.hash!r}")
    try:
        check_permissions(allowed)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if sys.stdin.isatty():
        password = getpass.getpass()
        if getpass.getpass("Again: ") != password:
            raise UsageError("these are two passwords")
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not password:
        raise UsageError("a password is needed")
    sys.stdout.write(f"{args.hash}:{hashed(password)}:{','.join(sorted(allowed))}\n")
    return 0


def _listen(text: str) -> Listen:
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if port.isdecimal() and int(port) < 1 << 16 and (host == f"[{bare}]" or ":" not in host):
        return Listen(bare, int(port))
    raise ArgumentTypeError(f"HOST:PORT is needed, such as 127.0.0.1:8080, not {text!r}")
