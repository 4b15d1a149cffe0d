"""`bgjob preflight`: ask before a deploy whether the release would handle the jobs there."""

import argparse
import sys
import traceback
from dataclasses import asdict
from textwrap import dedent
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, table

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands
    from bgjob.preflight import Report

_STATUS = dedent("""\
    findings:
      BAD   this release would dead-letter jobs without handling them: their type has no
            handler, their payload does not fit, or their attempts are over
      warn  look at it: jobs on their last attempt, exclusive keys that differ, schedules
            that are gone or cannot run
      note  to know: dead jobs that this release would handle, schedules that change, live
            workers of another release with types that this one lacks

    exit status:
      0    nothing to do, perhaps with notes
      3    a warning: look at it
      4    BAD: do not deploy
      1    it failed, for the reason on the standard error
      2    the arguments are wrong
      130  Ctrl-C interrupted it
    """)

_WORDS = {"bad": "BAD", "warn": "warn", "note": "note"}


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "preflight",
        run,
        help="before a deploy: would this release handle the jobs that are there?",
        description="Imports a Mux, reads the live and dead jobs of the database, decodes each "
        "payload and compares attempts, exclusive keys and schedules. It runs no handler, no "
        "middleware and no service, and its session is read-only. The current directory is on "
        "the module path.",
        status=_STATUS,
    )
    parser.add_argument(
        "target", type=arguments.target, metavar="MODULE:MUX", help="a Mux, such as app.jobs:mux"
    )
    parser.add_argument(
        "--queue",
        dest="queues",
        type=arguments.name("queue"),
        action="append",
        metavar="NAME",
        help="only this queue; may be repeated. Name the queues that the workers of this Mux work "
        "on if other programs share the database",
    )
    parser.add_argument(
        "--schedules",
        type=arguments.target,
        metavar="MODULE:NAME",
        help="the schedules of the release, a Schedules or a list: also show those of the "
        "database that it no longer has or changes",
    )
    parser.add_argument(
        "--sample",
        type=arguments.positive,
        metavar="N",
        help="decode at most N payloads of each type: the first, the last, and others at random; "
        "all jobs are counted",
    )
    parser.add_argument(
        "--limit-time",
        type=arguments.duration,
        metavar="DURATION",
        help="stop after this time, such as 60s, and judge what was read until then",
    )
    parser.add_argument(
        "--skip",
        type=arguments.name("type"),
        action="append",
        default=[],
        metavar="TYPE",
        help="do not decode the payloads of this type, for example because middleware decrypts "
        "them; may be repeated",
    )
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from bgjob import preflight  # noqa: PLC0415 (only what a command needs is imported)
    from bgjob._cli.worker import target  # noqa: PLC0415

    dsn = database.find(args.dsn)
    try:
        mux = target.load_mux(args.target)
        schedules = None if args.schedules is None else target.load_schedules(args.schedules)
    except target.TargetError as error:
        if error.__cause__ is not None:  # where the program's own code failed
            traceback.print_exception(error.__cause__)
        raise
    report = preflight.check(
        dsn,
        mux,
        queues=args.queues,
        schedules=schedules,
        sample=args.sample,
        limit_time=args.limit_time,
        skip=args.skip,
    )
    if args.json:
        table.write_json(_as_json(report))
    else:
        _write(report, is_sample=args.sample is not None)
    return report.status


def _as_json(report: "Report") -> dict[str, object]:
    value = asdict(report)
    return {"status": report.status, "lost": report.lost, **value}


def _write(report: "Report", *, is_sample: bool) -> None:
    problems: dict[tuple[str | None, str | None], str] = {}
    for finding in report.findings:
        if finding.code != "dead_fit" and not finding.code.startswith("schedule"):
            problems.setdefault(
                (finding.queue, finding.type), f"{finding.count:,} \u00d7 {finding.problem}"
            )
    table.write_table(
        ["queue", "type", "jobs", "fit", "without handler", "problem"],
        [
            (
                fit.queue,
                fit.type,
                fit.jobs,
                fit.fit if fit.has_handler else None,
                None if fit.has_handler else fit.jobs,
                problems.get((fit.queue, fit.type)),
            )
            for fit in report.types
        ],
    )
    for finding in report.findings:
        sys.stdout.write(f"{_WORDS[finding.severity]:<4}  {table.printable(finding.text)}\n")
        sys.stdout.write(f"do    {table.printable(finding.remedy)}\n")
    if opaque := sorted({f.type for f in report.types if f.has_handler and not f.is_decoded}):
        names = ", ".join(repr(name) for name in opaque[:10])
        more = f" and {len(opaque) - 10:,} more" if len(opaque) > 10 else ""  # noqa: PLR2004
        sys.stdout.write(
            f"not decoded, because the type has no codec or is left out: {table.printable(names)}"
            f"{more}\n"
        )
    sys.stdout.write(f"{_summary(report, is_sample=is_sample)}\n")


def _summary(report: "Report", *, is_sample: bool) -> str:
    jobs = "1 job" if report.jobs == 1 else f"{report.jobs:,} jobs"
    looked = f"{jobs} in {report.seconds:,.1f} s"
    if not report.is_complete:
        looked += ", then the time was up: nothing is known about the others"
    at_least = "at least " if is_sample or not report.is_complete else ""
    verdict = (
        f"{at_least}{report.lost:,} of them"
        if report.lost
        else f"none{' found' if at_least else ''}"
    )
    return f"{looked}: this release would dead-letter {verdict}"
