"""Commands on a session by libpq's own functions, where psycopg's cursors cost too much.

Statements that are sent as one string are one message, and one system call: a process that is
stopped has sent all of them, or none. The generators are for `Connection.wait`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import psycopg
from psycopg import generators
from psycopg.abc import RV, PQGen
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult


def execute(pgconn: PGconn, text: bytes) -> PQGen[None]:
    """Send statements as one string, and wait for their answers."""
    for result in (yield from results_of(pgconn, text)):
        check(pgconn, result)


def results_of(pgconn: PGconn, text: bytes) -> PQGen[list[PGresult]]:
    """Send statements as one string; return their results, the last of which may be an error."""
    pgconn.send_query(text)
    yield from generators.send(pgconn)
    results = yield from _results(pgconn)
    if not results:
        raise psycopg.OperationalError("the connection was lost")
    return results


def _results(pgconn: PGconn) -> PQGen[list[PGresult]]:
    """Wait for all results of what was sent.

    Those of one message usually come together. psycopg's generators read the socket for each of
    them, and twice let other threads have the interpreter. The message that ends a transactional
    job has twenty: by psycopg's generators ten coroutines ran 7 % fewer such jobs
    (benchmarks/transactional.py). How threads wait for it is in `messages`.

    What was tried: not to ask whether the next result has come, which lets others have the
    interpreter once for each. But if an answer came in parts, and the network were lost between
    them, the wait for the rest would stop the whole process.
    """
    results: list[PGresult] = []
    result = yield from generators.fetch(pgconn)
    while result is not None:
        results.append(result)
        if pgconn.is_busy():
            result = yield from generators.fetch(pgconn)
        else:
            result = pgconn.get_result()
    return results


def send_only(pgconn: PGconn, text: bytes) -> None:
    """Send statements as one string; `after_answers` waits for their answers."""
    pgconn.send_query(text)
    pgconn.flush()


def after_answers(pgconn: PGconn, following: PQGen[RV]) -> PQGen[RV]:
    """Wait for the answers to `send_only`, which have usually come, then go on."""
    pgconn.consume_input()
    for result in (yield from _results(pgconn)):
        check(pgconn, result)
    return (yield from following)


class Prepared(NamedTuple):
    """A statement that a session keeps prepared."""

    name: bytes
    text: bytes
    """With $1, $2, … as its parameters."""
    types: Sequence[int]
    """Of the parameters, by their numbers in pg_type."""
    formats: Sequence[int]
    """0 for a parameter that is sent as text, 1 for bytes."""


def prepare(pgconn: PGconn, kept: Prepared) -> PQGen[None]:
    """Prepare a statement, in a round trip of its own."""
    pgconn.send_prepare(kept.name, kept.text, kept.types)
    for result in (yield from generators.execute(pgconn)):
        check(pgconn, result)


def execute_prepared(
    pgconn: PGconn, kept: Prepared, params: Sequence[bytes | None]
) -> PQGen[PGresult]:
    """Execute a prepared statement; return its result."""
    pgconn.send_query_prepared(kept.name, params, kept.formats)
    results: list[PGresult] = yield from generators.execute(pgconn)
    for result in results:
        check(pgconn, result)
    return results[-1]


def check(pgconn: PGconn, result: PGresult) -> None:
    """Raise the error of a result, if it is one."""
    if result.status == ExecStatus.FATAL_ERROR:
        raise error_from_result(result, encoding=pgconn._encoding)  # noqa: SLF001
