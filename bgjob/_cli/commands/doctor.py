"""`bgjob doctor`: look for what is wrong, and print the remedies."""

import argparse
import sys
from textwrap import dedent
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, table
from bgjob._diagnosis.checks import CHECKS
from bgjob.client import Client
from bgjob.doctor import Finding, exit_status

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

STATUS = dedent("""\
    exit status:
      0    nothing to do
      1    it failed, for the reason on the standard error
      2    the arguments are wrong
      3    look at it: there is a warning
      4    act now: something is bad
      130  Ctrl-C interrupted it
    """)

_LABELS = {"ok": "ok", "note": "note", "warn": "warn", "bad": "BAD"}


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "doctor",
        run,
        help="look for what is wrong with the database, and print the remedies",
        description="Looks for what is wrong: the server and its clock, connections, the schema, "
        "old transactions that keep dead rows, locks, vacuum, indexes, leases of dead workers, "
        "due jobs, pauses, late schedules, dead jobs. Each finding names the culprit, and has its "
        "remedy in a line that begins with `do`. Nothing is changed.",
        status=STATUS,
    )
    parser.add_argument(
        "--check",
        action="append",
        choices=CHECKS,
        default=[],
        metavar="NAME",
        help=f"only this check; may be repeated. The checks: {', '.join(CHECKS)}",
    )
    parser.add_argument("--quiet", action="store_true", help="leave out what is as it should be")
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    dsn = database.find(args.dsn)
    # Fails sooner than a client, which waits for a server that is away.
    database.connect(dsn).close()
    with Client(dsn) as client:
        findings = client.doctor(*args.check)
    status = exit_status(findings)
    if args.quiet:
        findings = [finding for finding in findings if finding.severity != "ok"]
    if args.json:
        table.write_json({"status": status, "findings": findings})
    else:
        for finding in findings:
            _write(finding)
    return status


def _write(finding: Finding) -> None:
    width = max(map(len, CHECKS))
    for label, text in ((_LABELS[finding.severity], finding.text), ("do", finding.remedy)):
        if text:
            sys.stdout.write(f"{label:<4}  {finding.check:<{width}}  {table.printable(text)}\n")
