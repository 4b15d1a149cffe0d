"""The statements with which bgjob enqueues, for programs that send them with another driver.

    text, parameters = bgjob.sql.enqueue(request, paramstyle="dollar")
    row = await connection.fetchrow(text, *parameters)  # None if a live job has the id

They need the privileges of `bgjob_producer`, and any isolation level. The guide has the columns
that a program may write on its own, without these statements.
"""

from collections.abc import Iterable
from typing import Literal, LiteralString, overload

from bgjob._requests import OnConflict, check_on_conflict
from bgjob._sql import enqueues
from bgjob._sql.paramstyles import Paramstyle, translated
from bgjob._sql.replacements import replace
from bgjob.errors import RequestsRequiredError
from bgjob.job import EnqueueRequest

__all__ = ["Paramstyle", "enqueue", "enqueue_many"]


@overload
def enqueue(
    request: EnqueueRequest,
    paramstyle: Literal["pyformat", "named"] = "pyformat",
    *,
    notify: bool = True,
    on_conflict: OnConflict = "skip",
) -> tuple[LiteralString, dict[str, object]]: ...


@overload
def enqueue(
    request: EnqueueRequest,
    paramstyle: Literal["numeric", "dollar"],
    *,
    notify: bool = True,
    on_conflict: OnConflict = "skip",
) -> tuple[LiteralString, list[object]]: ...


def enqueue(
    request: EnqueueRequest,
    paramstyle: Paramstyle = "pyformat",
    *,
    notify: bool = True,
    on_conflict: OnConflict = "skip",
) -> tuple[LiteralString, dict[str, object]] | tuple[LiteralString, list[object]]:
    """Return the statement that writes a job, and its parameters.

    It returns one row if the job was written, and no row if a live job has the id: that is no
    error, and the transaction goes on. The row has one column without meaning. Under repeatable
    read or serializable it fails with a serialization failure (SQLSTATE 40001) if the transaction
    cannot see the job that has the id.

    The texts are few and do not depend on the job, so that a driver can keep them prepared.

    Args:
        request: the job; that of a typed job is made by EnqueueRequest.of.
        paramstyle: how the driver writes parameters. "pyformat" is %(id)s, as for psycopg and
            psycopg2; "named" is :id, as in SQLAlchemy's text(); "numeric" is :1; "dollar" is $1,
            as for asyncpg and PostgreSQL itself.
        notify: whether it notifies sleeping workers, when the transaction commits; True by
            default. It must not in a transaction that is to be prepared (two-phase commit).
        on_conflict: "skip" (the default) or "raise", which have the same statement: whether the
            absence of a row is an error is for the program to say. With "replace" the job
            replaces a live one with its id, as for Client.enqueue, and there is always a row.
            It needs more privileges than `bgjob_producer` has, which privileges.sql lists.

    Returns:
        The text, and the parameters: a dict for the first two styles, a list for the others.
        Their types are str, int, float, bytes, datetime and None.

    Raises:
        ValueError: an unknown style.

    """
    check_on_conflict(on_conflict)
    if on_conflict == "replace":
        return translated(replace([request], notify=notify, has_literals=False), paramstyle)
    return translated(enqueues.enqueue(request, notify=notify), paramstyle)


@overload
def enqueue_many(
    requests: Iterable[EnqueueRequest],
    paramstyle: Literal["pyformat", "named"] = "pyformat",
    *,
    notify: bool = True,
    on_conflict: OnConflict = "skip",
) -> tuple[LiteralString, dict[str, object]]: ...


@overload
def enqueue_many(
    requests: Iterable[EnqueueRequest],
    paramstyle: Literal["numeric", "dollar"],
    *,
    notify: bool = True,
    on_conflict: OnConflict = "skip",
) -> tuple[LiteralString, list[object]]: ...


def enqueue_many(
    requests: Iterable[EnqueueRequest],
    paramstyle: Paramstyle = "pyformat",
    *,
    notify: bool = True,
    on_conflict: OnConflict = "skip",
) -> tuple[LiteralString, dict[str, object]] | tuple[LiteralString, list[object]]:
    """Return the statement that writes many jobs, and its parameters.

    It returns one row, whose first column is the array of the ids that were written, in no order.
    Jobs whose ids are taken are left out, as is the second of two with the same id: that is no
    error, and the transaction goes on.

    Args:
        requests: the jobs. All are one statement: 10,000 at a time need some 10 MB.
        paramstyle: as for `enqueue`.
        notify: as for `enqueue`.
        on_conflict: as for `enqueue`. Of several with the same id the last one replaces.

    Returns:
        The text, and the parameters, which are lists, one for each column, and numbers.

    Raises:
        RequestsRequiredError: there are no requests.
        ValueError: an unknown style.

    """
    given = list(requests)
    if not given:
        raise RequestsRequiredError("requests are required: enqueue_many needs at least one")
    check_on_conflict(on_conflict)
    write = replace if on_conflict == "replace" else enqueues.enqueue_many
    statement = write(given, notify=notify, has_literals=False)
    return translated(statement, paramstyle)
