"""`bgjob schedules`: list, pause, resume, run and remove schedules."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bgjob._cli import arguments, database, table
from bgjob._cli.arguments import add_command
from bgjob.errors import UnknownScheduleError
from bgjob.schedule import ScheduleStatus
from bgjob.timetable import Timetable

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_MOST = 20
"""The most schedules that an error lists: a screenful."""


def add(commands: "Commands") -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "schedules",
        help="list, pause, resume, run and remove schedules",
        description="The schedules of the database. A worker writes its schedules when it starts.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=arguments.STATUS,
    )
    schedules = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    each = add_command(
        schedules,
        "list",
        run_list,
        help="list schedules",
        description="Lists the schedules by name, with their last and next ticks.",
    )
    _add_common(each)
    _add_each(
        schedules,
        "pause",
        run_pause,
        help="pause schedules",
        description="Pauses schedules: they enqueue nothing until they are resumed; the jobs that "
        "they have enqueued go on.",
    )
    _add_each(
        schedules,
        "resume",
        run_resume,
        help="resume schedules",
        description="Resumes schedules from their next ticks; the ticks of the pause are dropped.",
    )
    _add_each(
        schedules,
        "remove",
        run_remove,
        help="delete schedules that no worker has any more",
        description="Deletes schedules that no worker has any more; with a worker a schedule "
        "starts again.",
    )
    each = add_command(
        schedules,
        "run",
        run_once,
        help="enqueue a schedule's job once, now, and print its id",
        description="Enqueues a schedule's job once, now, and prints its id; also while the "
        "schedule is paused. Its ticks do not change.",
    )
    each.add_argument("name", metavar="NAME")
    _add_common(each)


def _add_each(
    schedules: "Commands",
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,  # noqa: A002
    description: str,
) -> None:
    unknown = "If there is no schedule of one of the names, none is changed."
    description = f"{description} {unknown}"
    parser = add_command(schedules, name, run, help=help, description=description)
    parser.add_argument("names", nargs="+", metavar="NAME")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    arguments.add_dsn(parser)
    arguments.add_json(parser)


def run_list(args: argparse.Namespace) -> int:
    """Carry it out."""
    with database.opened(database.find(args.dsn)) as client:
        schedules = client.schedules.list()
    if args.json:
        table.write_json([schedule._asdict() for schedule in schedules])
    else:
        shown = [s._asdict() | {"paused": "yes" if s.paused else "no"} for s in schedules]
        table.write_table(ScheduleStatus._fields, [list(row.values()) for row in shown])
    return 0


def run_pause(args: argparse.Namespace) -> int:
    """Carry it out."""
    return _run_each(args, Timetable.pause, "paused")


def run_resume(args: argparse.Namespace) -> int:
    """Carry it out."""
    return _run_each(args, Timetable.resume, "resumed")


def run_remove(args: argparse.Namespace) -> int:
    """Carry it out."""
    return _run_each(args, Timetable.remove, "removed")


def _run_each(args: argparse.Namespace, act: Callable[[Timetable, str], None], done: str) -> int:
    names = list(dict.fromkeys(args.names))
    with _timetable(args, names) as timetable:
        for name in names:
            act(timetable, name)
    if args.json:
        table.write_json({done: names})
    else:
        sys.stdout.writelines(f"{done} {table.printable(name)}\n" for name in names)
    return 0


def run_once(args: argparse.Namespace) -> int:
    """Carry it out."""
    with _timetable(args, [args.name]) as timetable:
        id_ = timetable.run(args.name)
    if args.json:
        table.write_json({"id": id_})
    else:
        sys.stdout.write(f"{table.printable(id_)}\n")
    return 0


@contextmanager
def _timetable(args: argparse.Namespace, names: Iterable[str]) -> Iterator[Timetable]:
    """Yield the client's schedules; raise UnknownScheduleError for a missing name."""
    with database.opened(database.find(args.dsn)) as client:
        known = [schedule.name for schedule in client.schedules.list()]
        if unknown := [name for name in names if name not in known]:
            raise UnknownScheduleError(
                f"there is no schedule {_quoted(unknown)}; {_told(known)}; a worker writes its "
                "schedules when it starts"
            )
        yield client.schedules


def _told(known: list[str]) -> str:
    if not known:
        return "there are none"
    more = len(known) - _MOST
    return f"there are {_quoted(known[:_MOST])}" + (f" and {more} more" if more > 0 else "")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
