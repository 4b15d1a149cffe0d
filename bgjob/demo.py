"""The demo: a few thousand jobs with every kind of outcome, and a check of the results."""

from bgjob._cli.demo import Check, DemoError, Report, run

__all__ = ["Check", "DemoError", "Report", "run"]
