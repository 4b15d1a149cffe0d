"""`manage.py bgjob`: the command line of bgjob on settings.DATABASES."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db.utils import ConnectionDoesNotExist

from bgjob.cli import main
from bgjob.ext.django._database import dsn
from bgjob.ext.django._settings import options
from bgjob.ext.django.worker import DATABASE, worker

_WORKER = f"{worker.__module__}:{worker.__name__}"


class Command(BaseCommand):
    """Passes its arguments to bgjob's command line, with the database of Django's settings."""

    help = "The command line of bgjob, on a database of settings.DATABASES."
    requires_system_checks: Sequence[str] = ["bgjob"]

    def run_from_argv(self, argv: list[str]) -> None:
        """Take --database out of the arguments, and Django's own; pass on the others."""
        self._called_from_command_line = True
        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        own.add_argument("--database", default="default")
        for option in ("--settings", "--pythonpath"):  # manage.py has seen to them
            own.add_argument(option)
        given, others = own.parse_known_args(argv[2:])
        prog = f"{os.path.basename(argv[0])} {argv[1]}"  # noqa: PTH119
        try:
            self.check(tags=self.requires_system_checks)
            status = self._run(others, given.database, prog)
        except CommandError as error:
            self.stderr.write(str(error))
            status = 1
        sys.exit(status)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of call_command."""
        parser.add_argument("--database", default="default")
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def handle(self, *_: Any, **given: Any) -> None:
        """Run a command for call_command("bgjob", "stats", database="default").

        Raises:
            CommandError: it failed, and has said why.

        """
        if status := self._run(given["arguments"], given["database"], "manage.py bgjob"):
            raise CommandError("it failed", returncode=status)

    def _run(self, arguments: Sequence[str], using: str, prog: str) -> int:
        try:
            os.environ["BGJOB_DSN"] = dsn(using)  # not an argument, which all users can see
        except (ConnectionDoesNotExist, ImproperlyConfigured) as error:
            raise CommandError(str(error)) from None
        os.environ[DATABASE] = using
        # A process of --processes has the module path of this one.
        paths = [os.path.abspath(path) for path in sys.path[:2]]  # noqa: PTH100
        paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, dict.fromkeys(paths)))
        chosen = options()
        return main(
            arguments,
            prog=prog,
            worker_defaults={
                "module": "bgjob.ext.django",
                "target": _WORKER,
                "processes": 1 if "--reload" in arguments else chosen.processes,
                "grace": chosen.grace,
            },
        )
