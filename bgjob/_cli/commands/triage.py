"""`bgjob triage`: the dead by how they died; try one, then the rest, or purge them."""

import argparse
import sys
from dataclasses import asdict
from textwrap import dedent
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, table
from bgjob._cli.arguments import UsageError
from bgjob._cli.dead_groups import show_list, show_one
from bgjob._cli.progress import progress, say
from bgjob._explanation.words import argument
from bgjob._sql.dead import number_of
from bgjob._sql.triage import numbers
from bgjob.client import Client
from bgjob.triage import Canary, DeadGroup, Rest

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from bgjob._cli.arguments import Commands

STATUS = dedent("""\
    exit status:
      0    it succeeded; a canary completed
      1    it failed, or the canary was refused, for the reason on the standard error
      2    the arguments are wrong
      3    the canary failed, died again or was rescheduled; too many of the rest failed again
      4    the canary still waits or runs
      130  Ctrl-C interrupted it
    """)

_BATCH = 1000
"""Jobs purged in one transaction."""

_VERDICTS = {
    "completed": "completed",
    "dead": "died again",
    "failed": "failed again, and will be retried",
    "rescheduled": "was rescheduled",
    "undecided": "still undecided",
}


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "triage",
        run,
        help="group dead jobs by how they died, try one, then the rest",
        description="Groups dead jobs by how they died: by their type, the error's class, the "
        "place in your code, and the error's first line without quoted text, hashes and numbers. "
        "With a group: shows it, moves its latest job back and waits for how it ends (--canary), "
        "moves all back (--rest), or deletes them (--purge).",
        status=STATUS,
    )
    parser.add_argument(
        "group",
        nargs="?",
        metavar="GROUP",
        help="one group: the 12 digits that the list shows; by default all are listed",
    )
    _add_filters(parser)
    _add_actions(parser)
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def _add_filters(parser: "ArgumentParser") -> None:
    listed = parser.add_argument_group("for the list")
    listed.add_argument("--queue", type=arguments.name("queue"), help="only jobs of this queue")
    listed.add_argument("--type", type=arguments.name("type"), help="only jobs of this type")
    listed.add_argument(
        "--since",
        type=arguments.duration,
        metavar="DURATION",
        help="only jobs that died within it: seconds, or 90s, 15m, 2h, 30d, 1w",
    )
    listed.add_argument(
        "--limit",
        type=arguments.positive,
        metavar="N",
        help="list at most N groups, the largest (default: 100)",
    )


def _add_actions(parser: "ArgumentParser") -> None:
    actions = parser.add_argument_group("for a group").add_mutually_exclusive_group()
    actions.add_argument(
        "--canary",
        action="store_true",
        help="move its latest job back to its queue, and wait for how it ends",
    )
    actions.add_argument(
        "--rest", action="store_true", help="move all its jobs back, those first that died first"
    )
    actions.add_argument("--purge", action="store_true", help="delete its jobs; with --yes")
    canary = parser.add_argument_group("for --canary")
    canary.add_argument(
        "--wait",
        type=arguments.duration,
        metavar="DURATION",
        help="how long to wait for the verdict (default: 60s)",
    )
    canary.add_argument(
        "--one-try",
        action="store_true",
        help="if it fails, move it back to the dead instead of leaving it to its next attempt",
    )
    canary.add_argument(
        "--force",
        action="store_true",
        help="also if its queue is paused, or no live worker is known that has its type",
    )
    rest = parser.add_argument_group("for --rest")
    rest.add_argument(
        "--rate",
        type=arguments.rate,
        metavar="N",
        help="jobs a second (default: 100)",
    )
    rest.add_argument(
        "--stop-after",
        type=arguments.whole,
        metavar="N",
        help="stop when more than N have failed again (default: 5)",
    )
    rest.add_argument(
        "--upto",
        type=arguments.positive,
        metavar="NUMBER",
        help="only jobs up to this number: a rest that was stopped prints it, to go on without "
        "those that failed again",
    )
    parser.add_argument_group("for --purge").add_argument(
        "--yes", action="store_true", help="delete them"
    )


_BELONGS = {
    "wait": "canary",
    "one_try": "canary",
    "force": "canary",
    "rate": "rest",
    "stop_after": "rest",
    "upto": "rest",
    "yes": "purge",
}


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    actions = [name for name in ("canary", "rest", "purge") if getattr(args, name)]
    filters = [name for name in ("queue", "type", "since", "limit") if getattr(args, name)]
    if actions and args.group is None:
        raise UsageError(f"--{actions[0]} needs a GROUP: bgjob triage lists them")
    if filters and args.group is not None:
        raise UsageError(f"--{filters[0]} is for the list, not for a group")
    for name, action in _BELONGS.items():
        is_given = getattr(args, name) is not None and getattr(args, name) is not False
        if is_given and action not in actions:
            raise UsageError(f"--{name.replace('_', '-')} needs --{action}")
    if args.group is not None:
        try:
            number_of(args.group)
        except ValueError as error:
            raise UsageError(str(error)) from None
    with database.opened(database.find(args.dsn)) as client:
        if args.group is None:
            return show_list(client, args)
        if args.canary:
            return _canary(client, args)
        found = client.dlq.groups(fingerprint=args.group)
        if not found:
            say(f"bgjob: no dead job has the fingerprint {args.group}")
            return 1
        [group] = found
        if args.rest:
            return _rest(client, group, args)
        if args.purge:
            return _purge(client, group, args)
        return show_one(client, group, args)


def _canary(client: Client, args: argparse.Namespace) -> int:
    said = ""

    def tell(seen: Canary) -> None:
        nonlocal said
        text = f"canary {seen.id} went back to {seen.queue!r}"
        if seen.claimed is not None:
            by = f" by worker {seen.worker}" if seen.worker is not None else ""
            text += f" … claimed{by} after {seen.claimed:.1f} s"
        if not args.json:
            sys.stdout.write(table.printable(text.removeprefix(said)))
            sys.stdout.flush()
        said = text

    try:
        canary = client.dlq.canary(
            args.group,
            wait=60.0 if args.wait is None else args.wait,
            one_try=args.one_try,
            force=args.force,
            progress=tell,
        )
    except BaseException:
        if said and not args.json:
            sys.stdout.write("\n")
        raise
    if args.json:
        table.write_json(asdict(canary))
        return canary.status
    verdict = _VERDICTS[canary.verdict]
    if canary.verdict == "failed" and canary.number is not None:
        verdict = "failed again, and is dead again"
    sys.stdout.write(f" … {verdict} after {canary.took:.1f} s\n")
    for line in canary.error.splitlines():
        sys.stdout.write(f"  {table.printable(line)}\n")
    if canary.verdict == "completed":
        say(f"the others: bgjob triage {args.group} --rest")
    elif canary.verdict == "undecided":
        say(f"how it goes on: bgjob explain {argument(canary.id)}")
    return canary.status


def _rest(client: Client, group: DeadGroup, args: argparse.Namespace) -> int:
    seen: Rest | None = None
    with progress(group.jobs, "jobs") as show:

        def tell(rest: Rest) -> None:
            nonlocal seen
            seen = rest
            show(min(rest.moved + rest.left, group.jobs))

        try:
            rest = client.dlq.rest(
                group.fingerprint,
                upto=args.upto,
                rate=100.0 if args.rate is None else args.rate,
                stop_after=5 if args.stop_after is None else args.stop_after,
                progress=tell,
            )
        except BaseException:
            if seen is not None:
                say(f"{seen.moved:,} of {seen.jobs:,} back before")
            raise
    if args.json:
        table.write_json(rest._asdict())
        return rest.status
    sys.stdout.write(f"{rest.moved:,} of {rest.jobs:,} back; {rest.failed:,} failed again\n")
    if rest.left:
        sys.stdout.write(f"{rest.left:,} stay dead: live jobs have their ids\n")
    if rest.is_stopped:
        say(
            "stopped, the others stay dead; to go on without those that failed again: bgjob triage "
            f"{group.fingerprint} --rest --upto {rest.upto}"
        )
    return rest.status


def _purge(client: Client, group: DeadGroup, args: argparse.Namespace) -> int:
    if not args.yes:
        jobs = "its dead job" if group.jobs == 1 else f"its {group.jobs:,} dead jobs"
        raise UsageError(f"--purge deletes {jobs} permanently: add --yes")
    done, after = 0, 0
    with progress(group.jobs, "jobs") as show:
        while batch := client._run(  # noqa: SLF001
            numbers(number_of(group.fingerprint), after, group.number, limit=_BATCH), None
        ):
            done += client.dlq.purge(numbers=batch)
            after = batch[-1]
            show(min(done, group.jobs))
    if args.json:
        table.write_json({"purged": done})
    else:
        sys.stdout.write(f"purged {done:,} dead job{'' if done == 1 else 's'}\n")
    return 0
