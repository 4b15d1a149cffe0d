"""The measurements of a database, part by part: which statement, and what becomes of its rows."""

from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import Any

import psycopg

from bgjob import schema
from bgjob._diagnosis import blueprint
from bgjob._sql import backlog, overviews, server, storage, workers
from bgjob._sql.server import Holder
from bgjob._sql.statement import Statement
from bgjob.measurements import (
    DeadCount,
    Horizon,
    Measurements,
    ScheduleDelay,
    TableMeasure,
)

_HOLDERS = ("session", "standby", "slot", "prepared")

_OF_CONNECTION = ("08", "57P")
"""Errors after which the connection is lost."""


def measure(cap: int) -> Generator[Statement[Any], Any, Measurements]:
    """Return the measurements; a generator of statements, which receives their answers.

    Args:
        cap: the number of jobs after which each count of a queue stops.

    Raises:
        psycopg.Error: the connection is lost.

    """
    found: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, (statement, made) in _parts(cap).items():
        try:
            answer = yield statement
        except psycopg.Error as error:
            if error.sqlstate is None or error.sqlstate.startswith(_OF_CONNECTION):
                raise
            failures[name] = error.diag.message_primary or type(error).__name__
        else:
            found["notify_queue" if name == "notify" else name] = made(answer)
    return Measurements(**found, failures=failures)


def _parts(cap: int) -> dict[str, tuple[Statement[Any], Callable[[Any], Any]]]:
    return {
        "queues": (overviews.overview(None, cap=cap), lambda overview: overview.queues),
        "workers": (workers.workers(), tuple),
        "dead": (
            backlog.died(),
            lambda rows: tuple(DeadCount(row.queue, row.type, row.jobs) for row in rows),
        ),
        "schedules": (
            backlog.late_schedules(0.0),
            lambda rows: tuple(ScheduleDelay(row.name, row.seconds) for row in rows),
        ),
        "horizon": (server.holders(), horizon),
        "tables": (
            storage.tables(_tables()),
            lambda rows: tuple(
                TableMeasure(row.name, row.rows, row.dead, row.bytes, row.index_bytes)
                for row in rows
            ),
        ),
        "notify": (server.notify_queue(), lambda row: row.usage),
    }


@cache
def _tables() -> list[str]:
    return [*blueprint.read(schema.init_sql()).tables]


def horizon(holders: Sequence[Holder]) -> tuple[Horizon, ...]:
    """Return the oldest holder of each kind."""
    return tuple(
        Horizon(
            kind,
            max((holder.transactions or 0 for holder in holders if holder.kind == kind), default=0),
            max(
                (h.seconds for h in holders if h.kind == kind and h.seconds is not None),
                default=None,
            ),
        )
        for kind in _HOLDERS
    )
