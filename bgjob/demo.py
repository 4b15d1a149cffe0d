"""The demo: a few thousand real jobs, every kind of outcome, and a check of all of it."""

from bgjob._cli.demo import Check, DemoError, Report, run

__all__ = ["Check", "DemoError", "Report", "run"]
