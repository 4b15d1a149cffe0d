"""The limits of queues and types: set, look at, list or remove them, for all workers."""

import builtins
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar, get_args

from psycopg import AsyncConnection, Connection

from bgjob._postgres.connection import is_two_phase
from bgjob._sql import limits as statements
from bgjob._sql.limits import Subject
from bgjob._sql.statement import Statement
from bgjob.job import check_name
from bgjob.limit import Limit, LimitStatus, Scope

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
        self,
        scope: Scope,
        name: str,
        limit: Limit,
        *,
        conn: AsyncConnection[Any] | None = None,
    ) -> None:
        """Set the limit of a queue, or of a type in all queues, in place of one that it has.

        From its commit on no worker claims a job of it without a ration. Jobs that were claimed
        before run, and count as soon as their workers have noticed, within two seconds. A change
        of a limit is noticed within five. Jobs that wait for the limit of their type hold up no
        job of another type.

        Args:
            scope: what has the limit, "queue" or "type".
            name: the name of the queue or the type. It need not exist yet.
            limit: the limit; `Limit()` for none, whatever the code of programs says.
            conn: a connection of the caller's: it holds when its transaction commits.

        Raises:
            TypeError: it is not a Limit.
            ValueError, QueueRequiredError, TypeRequiredError: no queue or type can have this
                name, or the scope is another.

        """
        of = _subject(scope, name)
        if not isinstance(limit, Limit):
            raise TypeError(
                f"limit must be a Limit, such as Limit(rate='14/s', burst=28), not {limit!r}"
            )
        notify = self._notify and not is_two_phase(conn)
        await self._run(statements.set_limit(of, limit, notify=notify), conn)

    async def get(
        self, scope: Scope, name: str, *, conn: AsyncConnection[Any] | None = None
    ) -> LimitStatus | None:
        """Return the limit of a queue or a type and what of it is in use; None if it has none."""
        found = await self._run(statements.limits(_subject(scope, name)), conn)
        return found[0] if found else None

    async def list(self, *, conn: AsyncConnection[Any] | None = None) -> builtins.list[LimitStatus]:
        """List the limits that were set, and those in the code of live programs, by name.

        One in code is listed while a worker uses it, and for a minute afterwards.
        """
        return await self._run(statements.limits(), conn)

    async def remove(
        self, scope: Scope, name: str, *, conn: AsyncConnection[Any] | None = None
    ) -> bool:
        """End the limit of a queue or a type that was set; True if there was one.

        One in a program's code holds again.
        """
        of, notify = _subject(scope, name), self._notify and not is_two_phase(conn)
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

    def set(
        self,
        scope: Scope,
        name: str,
        limit: Limit,
        *,
        conn: Connection[Any] | None = None,
    ) -> None:
        """Set the limit of a queue, or of a type in all queues, in place of one that it has.

        From its commit on no worker claims a job of it without a ration. Jobs that were claimed
        before run, and count as soon as their workers have noticed, within two seconds. A change
        of a limit is noticed within five. Jobs that wait for the limit of their type hold up no
        job of another type.

        Args:
            scope: what has the limit, "queue" or "type".
            name: the name of the queue or the type. It need not exist yet.
            limit: the limit; `Limit()` for none, whatever the code of programs says.
            conn: a connection of the caller's: it holds when its transaction commits.

        Raises:
            TypeError: it is not a Limit.
            ValueError, QueueRequiredError, TypeRequiredError: no queue or type can have this
                name, or the scope is another.

        """
        of = _subject(scope, name)
        if not isinstance(limit, Limit):
            raise TypeError(
                f"limit must be a Limit, such as Limit(rate='14/s', burst=28), not {limit!r}"
            )
        notify = self._notify and not is_two_phase(conn)
        self._run(statements.set_limit(of, limit, notify=notify), conn)

    def get(
        self, scope: Scope, name: str, *, conn: Connection[Any] | None = None
    ) -> LimitStatus | None:
        """Return the limit of a queue or a type and what of it is in use; None if it has none."""
        found = self._run(statements.limits(_subject(scope, name)), conn)
        return found[0] if found else None

    def list(self, *, conn: Connection[Any] | None = None) -> builtins.list[LimitStatus]:
        """List the limits that were set, and those in the code of live programs, by name.

        One in code is listed while a worker uses it, and for a minute afterwards.
        """
        return self._run(statements.limits(), conn)

    def remove(self, scope: Scope, name: str, *, conn: Connection[Any] | None = None) -> bool:
        """End the limit of a queue or a type that was set; True if there was one.

        One in a program's code holds again.
        """
        of, notify = _subject(scope, name), self._notify and not is_two_phase(conn)
        return self._run(statements.remove_limit(of, notify=notify), conn)


# -- both colours ----------------------------------------------------------------------


def _subject(scope: Scope, name: str) -> Subject:
    if scope not in get_args(Scope):
        raise ValueError(f'scope of a limit must be "queue" or "type", not {scope!r}')
    check_name(scope, name)
    return Subject(scope, name)
