"""The limits of queues and types: set, look at, list or remove them, for all workers."""

import builtins
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

from psycopg import AsyncConnection, Connection

from bgjob._postgres.connection import is_two_phase
from bgjob._sql import limits as statements
from bgjob._sql.limits import Subject
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

    A limit that is set here binds all workers of its queue, or all that have jobs of its type, and
    takes precedence over one in a program's code. It is kept in the database, until it is removed.
    Every method takes `conn`, to work inside the caller's transaction, and raises psycopg's errors.
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
        await self._set(_queue(queue), limit, conn)

    async def set_type(
        self,
        type: str,  # noqa: A002
        limit: Limit,
        *,
        conn: AsyncConnection[Any] | None = None,
    ) -> None:
        """Set the limit of a job type, in all queues, in place of one that it has.

        From its commit on no worker claims a job that does not know of it; otherwise as `set`.
        Its jobs that wait hold up no job of another type.

        Args:
            type: the job type. It need not be known yet.
            limit: the limit; `Limit()` for none, whatever the code of programs says.
            conn: a connection of the caller's: it holds when its transaction commits.

        Raises:
            TypeError: it is not a Limit.
            ValueError, TypeRequiredError: no type can have this name.

        """
        await self._set(_type(type), limit, conn)

    async def _set(self, of: Subject, limit: Limit, conn: AsyncConnection[Any] | None) -> None:
        _check(limit)
        notify = self._notify and not is_two_phase(conn)
        await self._run(statements.set_limit(of, limit, notify=notify), conn)

    async def get(
        self, queue: str, *, conn: AsyncConnection[Any] | None = None
    ) -> LimitStatus | None:
        """Return the limit of a queue and what of it is in use; None if it has none."""
        return next(iter(await self._run(statements.limits(_queue(queue)), conn)), None)

    async def get_type(
        self,
        type: str,  # noqa: A002
        *,
        conn: AsyncConnection[Any] | None = None,
    ) -> LimitStatus | None:
        """Return the limit of a job type and what of it is in use; None if it has none."""
        return next(iter(await self._run(statements.limits(_type(type)), conn)), None)

    async def list(self, *, conn: AsyncConnection[Any] | None = None) -> builtins.list[LimitStatus]:
        """List the limits that were set, and those in the code of live programs, by name.

        One in code is listed while a worker uses it, and for a minute afterwards.
        """
        return await self._run(statements.limits(), conn)

    async def remove(self, queue: str, *, conn: AsyncConnection[Any] | None = None) -> bool:
        """End the limit of a queue that was set; True if there was one.

        One in a program's code holds again.
        """
        return await self._remove(_queue(queue), conn)

    async def remove_type(
        self,
        type: str,  # noqa: A002
        *,
        conn: AsyncConnection[Any] | None = None,
    ) -> bool:
        """End the limit of a job type that was set; True if there was one.

        One in a program's code holds again.
        """
        return await self._remove(_type(type), conn)

    async def _remove(self, of: Subject, conn: AsyncConnection[Any] | None) -> bool:
        notify = self._notify and not is_two_phase(conn)
        return await self._run(statements.remove_limit(of, notify=notify), conn)


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class _Run(Protocol):
    def __call__(self, statement: Statement[T], conn: Connection[Any] | None, /) -> T: ...


class QueueLimits:
    """The limits of a client's database; thread-safe.

    A limit that is set here binds all workers of its queue, or all that have jobs of its type, and
    takes precedence over one in a program's code. It is kept in the database, until it is removed.
    Every method takes `conn`, to work inside the caller's transaction, and raises psycopg's errors.
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
        self._set(_queue(queue), limit, conn)

    def set_type(
        self,
        type: str,  # noqa: A002
        limit: Limit,
        *,
        conn: Connection[Any] | None = None,
    ) -> None:
        """Set the limit of a job type, in all queues, in place of one that it has.

        From its commit on no worker claims a job that does not know of it; otherwise as `set`.
        Its jobs that wait hold up no job of another type.

        Args:
            type: the job type. It need not be known yet.
            limit: the limit; `Limit()` for none, whatever the code of programs says.
            conn: a connection of the caller's: it holds when its transaction commits.

        Raises:
            TypeError: it is not a Limit.
            ValueError, TypeRequiredError: no type can have this name.

        """
        self._set(_type(type), limit, conn)

    def _set(self, of: Subject, limit: Limit, conn: Connection[Any] | None) -> None:
        _check(limit)
        notify = self._notify and not is_two_phase(conn)
        self._run(statements.set_limit(of, limit, notify=notify), conn)

    def get(self, queue: str, *, conn: Connection[Any] | None = None) -> LimitStatus | None:
        """Return the limit of a queue and what of it is in use; None if it has none."""
        return next(iter(self._run(statements.limits(_queue(queue)), conn)), None)

    def get_type(
        self,
        type: str,  # noqa: A002
        *,
        conn: Connection[Any] | None = None,
    ) -> LimitStatus | None:
        """Return the limit of a job type and what of it is in use; None if it has none."""
        return next(iter(self._run(statements.limits(_type(type)), conn)), None)

    def list(self, *, conn: Connection[Any] | None = None) -> builtins.list[LimitStatus]:
        """List the limits that were set, and those in the code of live programs, by name.

        One in code is listed while a worker uses it, and for a minute afterwards.
        """
        return self._run(statements.limits(), conn)

    def remove(self, queue: str, *, conn: Connection[Any] | None = None) -> bool:
        """End the limit of a queue that was set; True if there was one.

        One in a program's code holds again.
        """
        return self._remove(_queue(queue), conn)

    def remove_type(
        self,
        type: str,  # noqa: A002
        *,
        conn: Connection[Any] | None = None,
    ) -> bool:
        """End the limit of a job type that was set; True if there was one.

        One in a program's code holds again.
        """
        return self._remove(_type(type), conn)

    def _remove(self, of: Subject, conn: Connection[Any] | None) -> bool:
        notify = self._notify and not is_two_phase(conn)
        return self._run(statements.remove_limit(of, notify=notify), conn)


# -- both colours ----------------------------------------------------------------------


def _queue(name: str) -> Subject:
    check_name("queue", name)
    return Subject("queue", name)


def _type(name: str) -> Subject:
    check_name("type", name)
    return Subject("type", name)


def _check(limit: Limit) -> None:
    if not isinstance(limit, Limit):
        raise TypeError(
            f"limit must be a Limit, such as Limit(rate='14/s', burst=28), not {limit!r}"
        )
