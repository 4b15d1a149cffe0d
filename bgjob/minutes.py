"""Counts of what ended in each minute, which a worker keeps for charts and ratios."""

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from psycopg import Connection

from bgjob._checks import Duration, seconds
from bgjob._sql import execute
from bgjob._sql import minutes as statements
from bgjob._sql.minutes import Span
from bgjob._sql.statement import Statement
from bgjob.job import check_name
from bgjob.stats import MinuteReport

NO_TABLE = (
    "table bgjob_minute is not in the search_path: apply its statement in migration/init.sql "
    "(bgjob.schema.init_sql()) to this database, and grant it as privileges.sql does"
)

By = Literal["queue", "type"]

_MINUTE = 60
_MOST_STEPS = 10_080
"""The minutes of a week."""

_PIECE = 1000
_SOON = 0.05
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Minutes:
    """A worker's service that counts what ends in each minute, by queue and type.

    Pass it to `Worker(..., services=[Minutes()])`; `bgjob worker` has one by default.
    `Client.minutes` reads the counts of all workers that have it. They are for people:
    no decision depends on them.

    The worker writes its counts once a minute, in one statement, and when it is shut down.
    They belong to the minute in which they are written, which may be the one after a job
    ended. A worker that is killed loses the counts of up to a minute. If the connection is
    lost while it writes, the counts of that minute may be added twice.

    If the table bgjob_minute or a privilege on it is missing, the observer is told once, and
    the worker works without counting. It looks again every few minutes.

    Attributes:
        days: for how long the counts are kept; 7 by default, a week to compare with.
            Any worker with the service deletes older ones, 1,000 at a time, so that its jobs do
            not wait.

    """

    days: float = 7

    def __post_init__(self) -> None:
        if isinstance(self.days, bool) or not isinstance(self.days, int | float):
            raise TypeError(f"days must be a number, not {self.days!r}")
        if not 0 < self.days < float("inf"):
            raise ValueError(f"days must be more than 0, not {self.days!r}")

    def run(self, conn: Connection[Any], /) -> float:
        """Delete up to 1,000 old counts; return the seconds until the next run.

        The worker itself writes them.
        """
        deleted = execute.run(conn, statements.expire(self.days, limit=_PIECE))
        return _SOON if deleted == _PIECE else _HOUR


def report(
    last: Duration, *, step: Duration | None, by: By | None, queue: str | None, type_: str | None
) -> Statement[MinuteReport]:
    """Return the statement of `Client.minutes`; check its arguments."""
    length = seconds(last, "last")
    if length <= 0:
        raise ValueError(f"last must be more than 0 seconds, not {last!r}")
    size = _MINUTE if step is None else seconds(step, "step")
    if size < _MINUTE or size % _MINUTE:
        raise ValueError(f"step must be one or more whole minutes, not {step!r}")
    steps = ceil(length / size)
    if step is not None and steps > _MOST_STEPS:
        raise ValueError(
            f"{steps:,} steps are too many: the most are {_MOST_STEPS:,}; choose a longer step"
        )
    if by not in {None, "queue", "type"}:
        raise ValueError(f"by must be 'queue', 'type' or None, not {by!r}")
    if queue is not None:
        check_name("queue", queue)
    if type_ is not None:
        check_name("type", type_)
    span = Span(int(size), steps, is_whole=step is None)
    return statements.report(span, by=by, queue=queue, type_=type_)
