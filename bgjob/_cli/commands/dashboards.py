"""`bgjob dashboards`: print the alerts for Prometheus, or the dashboard for Grafana."""

import argparse
import sys
from importlib.resources import files
from typing import TYPE_CHECKING

from bgjob._cli import arguments

if TYPE_CHECKING:
    from bgjob._cli.arguments import Commands

_FILES = {"alerts": "alerts.yaml", "grafana": "grafana.json"}


def add(commands: "Commands") -> None:
    """Add the command."""
    parser = arguments.add_command(
        commands,
        "dashboards",
        run,
        help="print the alerts for Prometheus, or the dashboard for Grafana",
        description="Prints a file of rules for Prometheus, or the JSON model of a dashboard to "
        "import into Grafana, both on the metrics of `bgjob worker --health` and `bgjob metrics`.",
    )
    parser.add_argument("name", choices=[*_FILES], help="what to print")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    sys.stdout.write(files("bgjob.ext").joinpath(_FILES[args.name]).read_text("utf-8"))
    return 0
