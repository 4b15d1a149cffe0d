"""Deletes the results whose time has passed.

A worker has this service from the first job on whose result it keeps; another has none of it. Any
worker may delete any of them.
"""

from random import uniform
from typing import Any

import psycopg

from bgjob._sql.execute import run
from bgjob._sql.results import expire

_BATCH = 1000
_SOON = 0.1
"""Seconds until the next batch, where there are more."""

_EVERY = 60.0
"""Seconds between two looks: a result may stay for that much longer, but frees its id in time."""


class ResultExpiry:
    """The service of a worker that keeps results; see bgjob.service.Service."""

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        """Delete up to 1,000 results; return the seconds until the next run."""
        is_full = run(conn, expire(limit=_BATCH)) == _BATCH
        return _SOON if is_full else uniform(0.9, 1.1) * _EVERY  # noqa: S311 (not all workers together)
