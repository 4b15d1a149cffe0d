"""The schedules of a database: list, pause, resume, run once or remove them."""

import builtins
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

from psycopg import AsyncConnection, Connection

from bgjob._sql import schedules as statements
from bgjob._sql.statement import Statement
from bgjob.errors import UnknownScheduleError
from bgjob.job import EnqueueRequest, new_id
from bgjob.schedule import ScheduleStatus

T = TypeVar("T")


# -- async -----------------------------------------------------------------------------


class _RunAsync(Protocol):
    def __call__(
        self, statement: Statement[T], conn: AsyncConnection[Any] | None, /
    ) -> Awaitable[T]: ...


class _EnqueueAsync(Protocol):
    def __call__(
        self, request: EnqueueRequest, *, conn: AsyncConnection[Any] | None
    ) -> Awaitable[str]: ...


class AsyncTimetable:
    """The schedules of an async client's database; safe to share between tasks.

    A schedule exists once the first worker that has it was started. A change made
    here holds for all workers and over all restarts. Every method takes `conn`, to
    work inside the caller's transaction, and raises psycopg's errors.
    """

    def __init__(self, run: _RunAsync, enqueue: _EnqueueAsync) -> None:
        self._run = run
        self._enqueue = enqueue

    async def list(
        self, *, conn: AsyncConnection[Any] | None = None
    ) -> builtins.list[ScheduleStatus]:
        """List the schedules by name, with their last and next ticks."""
        return await self._run(statements.listed(), conn)

    async def pause(self, name: str, *, conn: AsyncConnection[Any] | None = None) -> None:
        """Pause a schedule: once this returns, it enqueues nothing; its jobs go on.

        Raises:
            UnknownScheduleError: there is none of this name.

        """
        _check(name, found=await self._run(statements.pause(name), conn))

    async def resume(self, name: str, *, conn: AsyncConnection[Any] | None = None) -> None:
        """Resume a schedule from its next tick; the ticks of the pause are dropped.

        Raises:
            UnknownScheduleError: there is none of this name.

        """
        _check(name, found=await self._run(statements.resume(name), conn))

    async def run(self, name: str, *, conn: AsyncConnection[Any] | None = None) -> str:
        """Enqueue a schedule's job once, now, and return its id; its ticks do not change.

        This works while the schedule is paused, and while another of its jobs is in the queue.

        Raises:
            UnknownScheduleError: there is none of this name.

        """
        request = _request(name, await self._run(statements.request_of(name), conn))
        return await self._enqueue(request, conn=conn)

    async def remove(self, name: str, *, conn: AsyncConnection[Any] | None = None) -> None:
        """Delete a schedule that no worker has any more; with a worker it starts again.

        Raises:
            UnknownScheduleError: there is none of this name.

        """
        _check(name, found=await self._run(statements.remove(name), conn))


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class _Run(Protocol):
    def __call__(self, statement: Statement[T], conn: Connection[Any] | None, /) -> T: ...


class _Enqueue(Protocol):
    def __call__(self, request: EnqueueRequest, *, conn: Connection[Any] | None) -> str: ...


class Timetable:
    """The schedules of a client's database; thread-safe.

    A schedule exists once the first worker that has it was started. A change made
    here holds for all workers and over all restarts. Every method takes `conn`, to
    work inside the caller's transaction, and raises psycopg's errors.
    """

    def __init__(self, run: _Run, enqueue: _Enqueue) -> None:
        self._run = run
        self._enqueue = enqueue

    def list(self, *, conn: Connection[Any] | None = None) -> builtins.list[ScheduleStatus]:
        """List the schedules by name, with their last and next ticks."""
        return self._run(statements.listed(), conn)

    def pause(self, name: str, *, conn: Connection[Any] | None = None) -> None:
        """Pause a schedule: once this returns, it enqueues nothing; its jobs go on.

        Raises:
            UnknownScheduleError: there is none of this name.

        """
        _check(name, found=self._run(statements.pause(name), conn))

    def resume(self, name: str, *, conn: Connection[Any] | None = None) -> None:
        """Resume a schedule from its next tick; the ticks of the pause are dropped.

        Raises:
            UnknownScheduleError: there is none of this name.

        """
        _check(name, found=self._run(statements.resume(name), conn))

    def run(self, name: str, *, conn: Connection[Any] | None = None) -> str:
        """Enqueue a schedule's job once, now, and return its id; its ticks do not change.

        This works while the schedule is paused, and while another of its jobs is in the queue.

        Raises:
            UnknownScheduleError: there is none of this name.

        """
        request = _request(name, self._run(statements.request_of(name), conn))
        return self._enqueue(request, conn=conn)

    def remove(self, name: str, *, conn: Connection[Any] | None = None) -> None:
        """Delete a schedule that no worker has any more; with a worker it starts again.

        Raises:
            UnknownScheduleError: there is none of this name.

        """
        _check(name, found=self._run(statements.remove(name), conn))


# -- both colours ----------------------------------------------------------------------


def _check(name: str, *, found: bool) -> None:
    if not found:
        raise UnknownScheduleError(
            f"there is no schedule {name!r}: a worker writes its schedules when it starts"
        )


def _request(name: str, found: dict[str, Any] | None) -> EnqueueRequest:
    _check(name, found=found is not None)
    return EnqueueRequest(**(found or {}), id=f"schedule:{name}:{new_id()}")
