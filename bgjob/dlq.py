"""The dead-letter table: what could not be handled, to look at, requeue or purge."""

import builtins
from collections.abc import Awaitable, Iterable
from datetime import datetime
from typing import Any, Protocol, TypeVar

from psycopg import AsyncConnection, Connection

from bgjob import _statements
from bgjob._statements import DeadFilter, Statement
from bgjob.job import DeadJob

T = TypeVar("T")


class _Run(Protocol):
    def __call__(self, statement: Statement[T], conn: Connection[Any] | None, /) -> T: ...


class _RunAsync(Protocol):
    def __call__(
        self, statement: Statement[T], conn: AsyncConnection[Any] | None, /
    ) -> Awaitable[T]: ...


class Dlq:
    """The dead-letter table of a client; thread-safe.

    Every method takes `conn`, to work inside the caller's transaction, and
    raises psycopg's errors.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run

    def list(
        self,
        *,
        queue: str | None = None,
        type: str | None = None,  # noqa: A002
        limit: int = 100,
        offset: int = 0,
        conn: Connection[Any] | None = None,
    ) -> builtins.list[DeadJob]:
        """List dead jobs, the latest first.

        Args:
            queue: only of this queue.
            type: only of this type.
            limit: at most so many; 100 by default, a screenful or two.
            offset: how many to pass over.
            conn: a connection of the caller's.

        """
        return self._run(_list(queue, type, limit, offset), conn)

    def get(self, id: str, *, conn: Connection[Any] | None = None) -> DeadJob | None:  # noqa: A002
        """Give the dead job with this id, the latest if it died more than once, or None."""
        found = self._run(_get(id), conn)
        return found[0] if found else None

    def requeue(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        queue: str | None = None,
        type: str | None = None,  # noqa: A002
        conn: Connection[Any] | None = None,
    ) -> builtins.list[str]:
        """Move dead jobs back to their queues, due now, with every setting and a fresh attempt.

        A worker finds them at its next poll. Of several dead jobs with one id
        the latest goes back; one whose id a live job has stays dead.

        Args:
            ids: one id or several; None takes all that the filters leave.
            queue: only of this queue.
            type: only of this type.
            conn: a connection of the caller's.

        Returns:
            The ids that went back.

        """
        return self._run(_statements.dlq_requeue(_filter(ids, queue, type)), conn)

    def purge(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        queue: str | None = None,
        type: str | None = None,  # noqa: A002
        moved_before: datetime | None = None,
        conn: Connection[Any] | None = None,
    ) -> int:
        """Delete dead jobs for good; give their number.

        Args:
            ids: one id or several; None takes all that the filters leave.
            queue: only of this queue.
            type: only of this type.
            moved_before: only those that died before this aware datetime.
            conn: a connection of the caller's.

        """
        return self._run(_statements.dlq_purge(_filter(ids, queue, type, moved_before)), conn)


class AsyncDlq:
    """The dead-letter table of an async client; as Dlq, awaited."""

    def __init__(self, run: _RunAsync) -> None:
        self._run = run

    async def list(
        self,
        *,
        queue: str | None = None,
        type: str | None = None,  # noqa: A002
        limit: int = 100,
        offset: int = 0,
        conn: AsyncConnection[Any] | None = None,
    ) -> builtins.list[DeadJob]:
        """List dead jobs, the latest first; as Dlq.list."""
        return await self._run(_list(queue, type, limit, offset), conn)

    async def get(
        self,
        id: str,  # noqa: A002
        *,
        conn: AsyncConnection[Any] | None = None,
    ) -> DeadJob | None:
        """Give the dead job with this id, or None; as Dlq.get."""
        found = await self._run(_get(id), conn)
        return found[0] if found else None

    async def requeue(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        queue: str | None = None,
        type: str | None = None,  # noqa: A002
        conn: AsyncConnection[Any] | None = None,
    ) -> builtins.list[str]:
        """Move dead jobs back to their queues; as Dlq.requeue."""
        return await self._run(_statements.dlq_requeue(_filter(ids, queue, type)), conn)

    async def purge(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        queue: str | None = None,
        type: str | None = None,  # noqa: A002
        moved_before: datetime | None = None,
        conn: AsyncConnection[Any] | None = None,
    ) -> int:
        """Delete dead jobs for good; as Dlq.purge."""
        return await self._run(_statements.dlq_purge(_filter(ids, queue, type, moved_before)), conn)


def _list(
    queue: str | None, type_: str | None, limit: int, offset: int
) -> Statement[list[DeadJob]]:
    return _statements.dlq_list(_filter(None, queue, type_), limit=limit, offset=offset)


def _get(id_: str) -> Statement[list[DeadJob]]:
    return _statements.dlq_list(DeadFilter([id_]), limit=1, offset=0)


def _filter(
    ids: str | Iterable[str] | None,
    queue: str | None,
    type_: str | None,
    moved_before: datetime | None = None,
) -> DeadFilter:
    if moved_before is not None and moved_before.utcoffset() is None:
        raise ValueError(
            f"moved_before must be an aware datetime: {moved_before!r} has no time zone"
        )
    chosen = [ids] if isinstance(ids, str) else None if ids is None else list(ids)
    return DeadFilter(chosen, queue, type_, moved_before)
