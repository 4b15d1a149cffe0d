"""Would this release handle the jobs that are there? Ask before a deploy; nothing is run.

`check` reads the waiting, running and dead jobs of a database, decodes each payload with the codec
of its type, and computes the keys of types with a callable `exclusive=`. It calls no handler, no
middleware and no service, and writes nothing. `bgjob preflight` is the same from a shell.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from psycopg import IsolationLevel

from bgjob._checks import Duration, seconds
from bgjob._postgres.connection import Connection, check_conninfo, options
from bgjob._postgres.cursor import Cursor
from bgjob._postgres.pool import PATIENCE
from bgjob._preflight.report import Finding, Report, Severity, TypeFit
from bgjob._preflight.steps import Options, Steps, inspect
from bgjob._sql.execute import run, send
from bgjob._sql.preflight import INSPECTION_SETTINGS, local_settings
from bgjob._sql.session import session
from bgjob._sql.statement import Statement
from bgjob.job import check_name
from bgjob.mux import Mux
from bgjob.schedule import Schedule

__all__ = ["Finding", "Report", "Severity", "TypeFit", "check"]

T = TypeVar("T")


def check(
    dsn: str,
    mux: Mux,
    *,
    queues: Collection[str] | None = None,
    schedules: Iterable[Schedule] | None = None,
    sample: int | None = None,
    limit_time: Duration | None = None,
    skip: Collection[str] = (),
) -> Report:
    """Report what workers with this Mux would do with the jobs of a database.

    It opens a connection of its own, which is read-only and in autocommit, and reads pages of
    5,000 rows, each by a statement of at most 5 s. No transaction stays open, no row is locked,
    and memory does not depend on the number of jobs. It takes as long as the codecs need: some
    seconds for a million jobs.

    Args:
        dsn: a connection string. The role needs to read `bgjob_job`; where it may not read
            `bgjob_dead_job`, `bgjob_schedule` or `bgjob_worker`, the report says so.
        mux: the handlers of the release.
        queues: the queues that its workers work on; None (the default) for all. Name them if
            other programs share the database: their types have no handler here.
        schedules: the schedules of the release, such as its `Schedules`; with them the
            report tells which ones of the database it no longer has. None if they are
            not known.
        sample: decode at most so many payloads of each type: the first, the last, and others
            at random. All jobs are counted in any case. None (the default) for all payloads.
        limit_time: seconds or a timedelta after which it stops between two pages; the report
            is then not complete. None (the default) for no limit.
        skip: job types whose payloads are neither decoded nor given to `exclusive=`, for
            example because middleware decrypts them.

    Raises:
        ValueError: `dsn` is not a connection string, or `sample` or a name is out of range.
        SchemaError: the tables are missing or of another version, or the role may not read jobs.
        psycopg.Error: the database's.

    """
    if isinstance(queues, str) or isinstance(skip, str):
        raise TypeError("queues and skip must be collections of names, not a str")
    for queue in queues or ():
        check_name("queue", queue)
    if sample is not None and (type(sample) is not int or sample < 1):
        raise ValueError(f"sample must be a whole number from 1, not {sample!r}")
    chosen = Options(
        queues,
        None if schedules is None else tuple(schedules),
        sample,
        None if limit_time is None else seconds(limit_time, "limit_time"),
        skip,
    )
    with Connection.connect(**options((check_conninfo(dsn), {})), autocommit=True) as conn:
        conn.patience = PATIENCE
        return _drive(inspect(mux, chosen), _sender(conn))


def _sender(conn: Connection) -> Callable[[Statement[Any]], Any]:
    """Return a function that sends a statement within the limits of a preflight."""
    settings = session(conn.info.backend_pid, INSPECTION_SETTINGS)
    if send(Cursor(conn), settings).rowcount:
        return lambda statement: run(conn, statement)
    # A pooler may use another session for each transaction.
    conn.prepare_threshold = None
    conn.read_only = True
    conn.isolation_level = IsolationLevel.READ_COMMITTED

    def in_transaction(statement: Statement[T]) -> T:
        with conn.transaction():
            run(conn, local_settings())
            return run(conn, statement)

    return in_transaction


def _drive(steps: Steps[T], ask: Callable[[Statement[Any]], Any]) -> T:
    """Send the statements of some steps, and return their result."""
    try:
        statement = next(steps)
        while True:
            try:
                answer = ask(statement)
            except Exception as error:
                statement = steps.throw(error)
            else:
                statement = steps.send(answer)
                del answer  # a page; before the next one comes
    except StopIteration as stop:
        result: T = stop.value
        return result
