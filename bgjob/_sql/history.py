"""Completed jobs of the types that are kept, for a week.

`settlements` writes a row with the delete of its job, so that both are committed or none. Each
day has a partition, of eight; that of tomorrow, which is the one of a week ago, is emptied. So no
row is ever deleted, and a look for an id goes through eight small indexes.
"""

from datetime import datetime, timedelta
from typing import LiteralString, NamedTuple

from bgjob._sql.session import Lack, lacks
from bgjob._sql.statement import Statement, in_range, nothing
from bgjob._sql.tokens import origin
from bgjob.job import PastJob

_DAYS = 8
"""The partitions."""

DAY: LiteralString = "mod(floor(extract(epoch from {0}) / 86400)::bigint, 8)::smallint"
"""The partition of a time (0)."""

NO_TABLE = (
    "table bgjob_history, for jobs that are registered with keep=True, is not in the search_path: "
    "apply its statements in migration/init.sql (bgjob.schema.init_sql()) to this database"
)

_SKEW = timedelta(minutes=1)
"""By how much a worker's idea of the database's time may be wrong."""

TODAY = DAY.format("clock_timestamp()")


class Kept(NamedTuple):
    """A completed job."""

    id: str
    queue: str
    type: str
    attempt: int
    token: int
    ended_at: datetime

    @property
    def past(self) -> PastJob:
        """The job, with what its token tells."""
        made = origin(self.token)
        if made is None or made.at > self.ended_at + _SKEW:
            made = None
        return PastJob(
            self.id,
            self.queue,
            self.type,
            self.attempt,
            None if made is None else made.at,
            self.ended_at,
            None if made is None else made.number,
        )


def of_job(id_: str, *, limit: int) -> Statement[list[Kept]]:
    """List the completed jobs with an id, the latest first."""
    return Statement(
        f"""
        select job_id, queue, type, attempt, token, {in_range("ended_at")}
        from bgjob_history where job_id = %(id)s
        order by ended_at desc limit %(limit)s
        """,
        {"id": id_, "limit": limit},
        lambda rows: [Kept(*row) for row in rows],
    )


def history_lacks() -> Statement[list[Lack]]:
    """List the columns and privileges that keeping jobs needs and that are missing."""
    return lacks(
        [(f"bgjob_history_{day}", "truncate") for day in range(_DAYS)],
        (
            ("bgjob_history", "select", "day"),
            ("bgjob_history", "insert", "day job_id queue type attempt token"),
        ),
    )


class Old(NamedTuple):
    """The partition of tomorrow, which has the rows of a week ago."""

    day: int
    is_empty: bool
    until_tomorrow: float
    """Seconds until it is that of today."""


def old() -> Statement[Old]:
    """Look whether the partition of tomorrow has rows."""
    tomorrow = DAY.format("clock.now + interval '1 day'")
    return Statement(
        f"""
        select day, not exists (select from bgjob_history h where h.day = clock.day),
            86400 - mod(extract(epoch from now), 86400)::float8
        from (
            select now, {tomorrow} as day from (select clock_timestamp() as now) as clock
        ) as clock
        """,
        None,
        lambda rows: Old(*rows[0]),
    )


def wait_for_no_lock() -> Statement[None]:
    """Give up soon, in this transaction, where another session has the lock that is needed."""
    return Statement("select set_config('lock_timeout', '100ms', true)", None, nothing)


_TRUNCATE: tuple[LiteralString, ...] = (
    "truncate bgjob_history_0",
    "truncate bgjob_history_1",
    "truncate bgjob_history_2",
    "truncate bgjob_history_3",
    "truncate bgjob_history_4",
    "truncate bgjob_history_5",
    "truncate bgjob_history_6",
    "truncate bgjob_history_7",
)


def empty(day: int) -> Statement[None]:
    """Remove the rows of a partition; it locks that one, and no other."""
    return Statement(_TRUNCATE[day], None, nothing)
