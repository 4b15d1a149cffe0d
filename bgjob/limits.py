"""The limits of a database's queues: set, look at, list or remove them, for all workers."""

import builtins
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

from psycopg import AsyncConnection, Connection

from bgjob._postgres.connection import is_two_phase
from bgjob._sql import limits as statements
from bgjob._sql.statement import Statement
from bgjob.job import check_name
from bgjob.limit import Limit, LimitStatus

T = TypeVar("T")


# -- async -----------------------------------------------------------------------------


class _RunAsync(Protocol):
    def __call__(
        self, statement: Statement[T], conn: AsyncConnection[Any] | None, /
    ) -> Awaitable[T]: ...


class AsyncQueueLimits:
    """The limits of an async client's database; safe to share between tasks.

    A limit that is set here binds all workers of its queue, and takes precedence over
    one in a program's code. It is kept in the database, until it is removed. Every method takes
    `conn`, to work inside the caller's transaction, and raises psycopg's errors.
    """

    def __init__(self, run: _RunAsync, *, notify: bool) -> None:
        self._run = run
        self._notify = notify

    async def set(
        self, queue: str, limit: Limit, *, conn: AsyncConnection[Any] | None = None
    ) -> None:
        """Set the limit of a queue, in place of one that it has.

        From its commit on no worker without a ration of it claims a job. Jobs that
        were claimed before run, and count as soon as their workers have noticed, within two
        seconds. A change of a limit is noticed within five.

        Args:
            queue: the queue. It need not exist yet.
            limit: the limit; `Limit()` for none, whatever the code of programs says.
            conn: a connection of the caller's: it holds when its transaction commits.

        Raises:
            TypeError: it is not a Limit.
            ValueError, QueueRequiredError: no queue can have this name.

        """
        _check(queue, limit)
        notify = self._notify and not is_two_phase(conn)
        await self._run(statements.set_limit(queue, limit, notify=notify), conn)

    async def get(
        self, queue: str, *, conn: AsyncConnection[Any] | None = None
    ) -> LimitStatus | None:
        """Return the limit of a queue and what of it is in use; None if it has none."""
        check_name("queue", queue)
        return next(iter(await self._run(statements.limits(queue), conn)), None)

    async def list(self, *, conn: AsyncConnection[Any] | None = None) -> builtins.list[LimitStatus]:
        """List the limits by queue: those that were set, and those in the code of live programs.

        One in code is listed while a worker uses it, and for a minute afterwards.
        """
        return await self._run(statements.limits(), conn)

    async def remove(self, queue: str, *, conn: AsyncConnection[Any] | None = None) -> bool:
        """End a limit that was set; True if there was one.

        One in a program's code holds again.
        """
        check_name("queue", queue)
        notify = self._notify and not is_two_phase(conn)
        return await self._run(statements.remove_limit(queue, notify=notify), conn)


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class _Run(Protocol):
    def __call__(self, statement: Statement[T], conn: Connection[Any] | None, /) -> T: ...


class QueueLimits:
    """The limits of a client's database; thread-safe.

    A limit that is set here binds all workers of its queue, and takes precedence over
    one in a program's code. It is kept in the database, until it is removed. Every method takes
    `conn`, to work inside the caller's transaction, and raises psycopg's errors.
    """

    def __init__(self, run: _Run, *, notify: bool) -> None:
        self._run = run
        self._notify = notify

    def set(self, queue: str, limit: Limit, *, conn: Connection[Any] | None = None) -> None:
        """Set the limit of a queue, in place of one that it has.

        From its commit on no worker without a ration of it claims a job. Jobs that
        were claimed before run, and count as soon as their workers have noticed, within two
        seconds. A change of a limit is noticed within five.

        Args:
            queue: the queue. It need not exist yet.
            limit: the limit; `Limit()` for none, whatever the code of programs says.
            conn: a connection of the caller's: it holds when its transaction commits.

        Raises:
            TypeError: it is not a Limit.
            ValueError, QueueRequiredError: no queue can have this name.

        """
        _check(queue, limit)
        notify = self._notify and not is_two_phase(conn)
        self._run(statements.set_limit(queue, limit, notify=notify), conn)

    def get(self, queue: str, *, conn: Connection[Any] | None = None) -> LimitStatus | None:
        """Return the limit of a queue and what of it is in use; None if it has none."""
        check_name("queue", queue)
        return next(iter(self._run(statements.limits(queue), conn)), None)

    def list(self, *, conn: Connection[Any] | None = None) -> builtins.list[LimitStatus]:
        """List the limits by queue: those that were set, and those in the code of live programs.

        One in code is listed while a worker uses it, and for a minute afterwards.
        """
        return self._run(statements.limits(), conn)

    def remove(self, queue: str, *, conn: Connection[Any] | None = None) -> bool:
        """End a limit that was set; True if there was one.

        One in a program's code holds again.
        """
        check_name("queue", queue)
        notify = self._notify and not is_two_phase(conn)
        return self._run(statements.remove_limit(queue, notify=notify), conn)


# -- both colours ----------------------------------------------------------------------


def _check(queue: str, limit: Limit) -> None:
    check_name("queue", queue)
    if not isinstance(limit, Limit):
        raise TypeError(
            f"limit must be a Limit, such as Limit(rate='14/s', burst=28), not {limit!r}"
        )
