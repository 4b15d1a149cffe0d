"""The demo: a few thousand jobs with every kind of outcome, and a check of the results."""

from bgjob._cli.demo import Report, run
from bgjob._cli.demo_jobs import Check
from bgjob._cli.demo_place import DemoError

__all__ = ["Check", "DemoError", "Report", "run"]
