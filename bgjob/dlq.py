"""The dead-letter table: list, group, try again, requeue and purge jobs that could not be handled.

The module has over 400 lines because both colours are here; only the async one is written.
"""

import asyncio
import builtins
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from time import sleep
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from psycopg import AsyncConnection, Connection
from typing_extensions import Unpack

from bgjob._checks import Duration, seconds
from bgjob._postgres.connection import is_two_phase
from bgjob._sql import dead, enqueues, execute
from bgjob._sql.dead import DeadFilter
from bgjob._sql.statement import Statement
from bgjob.job import DeadJob
from bgjob.triage import Canary, DeadGroup, Rest

if TYPE_CHECKING:
    from bgjob._triage import Steps

T = TypeVar("T")

_BATCH = 1000
"""Dead jobs that a retention deletes in one run, so that its worker's exchanges do not wait."""

_SOON = 0.05
"""Seconds between two batches."""


class DeadFilters(TypedDict, total=False):
    """Filters of dead jobs; a dead job has to match all of them.

    Attributes:
        queue: jobs of this queue.
        type: jobs of this type.
        error: jobs whose error contains this text; case-sensitive.
        moved_before: jobs that died before this aware datetime.
        moved_after: jobs that died at this aware datetime or later.
        older_than: jobs that died longer ago than these seconds or this
            timedelta, by the database's clock.
        fingerprint: jobs that died in the same way: that of a DeadGroup or a DeadJob.
        numbers: jobs with these numbers.
        upto: jobs up to this number: of those that died up to then.
        group: jobs of this group of `client.group`, by its id.

    """

    queue: str | None
    type: str | None
    error: str | None
    moved_before: datetime | None
    moved_after: datetime | None
    older_than: Duration | None
    fingerprint: str | None
    numbers: Iterable[int] | None
    upto: int | None
    group: str | None


# -- async -----------------------------------------------------------------------------


class _RunAsync(Protocol):
    def __call__(
        self, statement: Statement[T], conn: AsyncConnection[Any] | None, /
    ) -> Awaitable[T]: ...


class AsyncDlq:
    """The dead-letter table of an async client; safe to share between tasks.

    Every method but `canary` and `rest`, which are several transactions, takes `conn`, to
    work inside the caller's transaction. They raise psycopg's errors. The filters are those
    of DeadFilters.
    """

    def __init__(self, run: _RunAsync, *, notify: bool) -> None:
        self._run = run
        self._notify = notify

    async def list(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        before: DeadJob | int | None = None,
        limit: int = 100,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[DeadFilters],
    ) -> builtins.list[DeadJob]:
        """List dead jobs, the latest first.

        Args:
            ids: one id or several; None (the default) for any id. A job that died more
                than once is listed as often.
            before: the last dead job of a page, or its number: lists the next page.
                Jobs that die meanwhile do not shift pages.
            limit: the most jobs to return; 100 by default, a screenful or two.
            conn: a connection of the caller's.
            filters: those of DeadFilters.

        """
        return await self._run(_list(ids, before, limit, filters), conn)

    async def get(
        self,
        id: str,  # noqa: A002
        *,
        conn: AsyncConnection[Any] | None = None,
    ) -> DeadJob | None:
        """Return the dead job with this id, the latest of several; None without one."""
        found = await self._run(_list(id, None, 1, {}), conn)
        return found[0] if found else None

    async def groups(
        self,
        *,
        limit: int = 100,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[DeadFilters],
    ) -> builtins.list[DeadGroup]:
        """Group dead jobs by how they died, the largest group first.

        With a million dead jobs it takes 0.1 to 0.2 s; with a filter other than `fingerprint`,
        `numbers` and `upto` it reads all their rows, and takes longer.

        Args:
            limit: the most groups to return; 100 by default.
            conn: a connection of the caller's.
            filters: those of DeadFilters.

        """
        where = _filter(None, filters)
        return await self._run(dead.groups(where, limit=limit), conn)

    async def requeue(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        keep_checkpoint: bool = True,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[DeadFilters],
    ) -> builtins.list[str]:
        """Move dead jobs back to their queues, due now, with attempts counted from 0.

        All their settings are kept. Of several dead jobs with one id only the latest is
        requeued; one whose id a live job has stays dead. Sleeping workers are notified.

        Args:
            ids: one id or several; None (the default) for any id.
            keep_checkpoint: whether they go on from what their handlers saved (see
                bgjob.checkpoint); True by default. False: they begin again.
            conn: a connection of the caller's.
            filters: those of DeadFilters.

        Returns:
            The ids of the requeued jobs.

        """
        moved = dead.requeue(_filter(ids, filters), keep_checkpoint=keep_checkpoint)
        requeued = await self._run(moved, conn)
        if self._notify and requeued.queues and not is_two_phase(conn):
            await self._run(enqueues.tell_all(requeued.queues), conn)
        return requeued.ids

    async def canary(
        self,
        fingerprint: str,
        *,
        wait: Duration = 60.0,
        one_try: bool = False,
        force: bool = False,
        progress: Callable[[Canary], object] | None = None,
    ) -> Canary:
        """Move the latest dead job of a group back to its queue, and wait for how it ends.

        Call `rest` once it has completed. The job is requeued as by `requeue`: if it fails, it is
        retried by the policy of its type. Each look is a statement of its own, every 0.02 to
        0.5 s.

        Args:
            fingerprint: that of a DeadGroup or a DeadJob.
            wait: seconds or a timedelta until the verdict is `undecided`; a minute by
                default. The job stays in its queue.
            one_try: whether a job that fails goes back to the dead-letter table, with its
                new error, instead of waiting for its next attempt; False by default. It
                needs the privileges of `bgjob_editor` in addition.
            force: whether to move it even if its queue is paused, or no live worker is
                known that has a handler for its type; False by default.
            progress: called when the job is in its queue, and when it is seen to run, with
                what is known by then.

        Returns:
            The verdict, and the new error if there is one.

        Raises:
            CanaryRefusedError: there is no such dead job, or nothing would run it.
            ValueError: what is given is not a fingerprint.

        """
        from bgjob._triage import canary  # noqa: PLC0415 (only those who ask need it)

        limit = seconds(wait, "wait")
        options = canary.Options(limit, one_try, force, self._notify, progress)
        return await self._walk(canary.canary(fingerprint, options))

    async def rest(
        self,
        fingerprint: str,
        *,
        upto: int | None = None,
        rate: float | None = 100.0,
        stop_after: int | None = 5,
        progress: Callable[[Rest], object] | None = None,
    ) -> Rest:
        """Move all dead jobs of a group back to their queues, and stop if they fail again.

        Those that died first come first, in batches of 10 to 100, each in a transaction of its
        own. It has no state but the table: what ends it, be it an exception of `progress` or
        the process's end, leaves the others dead, and a later call goes on with them.

        Args:
            fingerprint: that of a DeadGroup or a DeadJob.
            upto: a number: jobs that died later stay dead. By default those that die from
                now on do. To go on later without those that failed again, pass that of the
                first call's result.
            rate: jobs a second; 100 by default, so that the brake sees failures before most
                are moved. None for no limit.
            stop_after: ends it, before the next batch, when more than so many have failed
                again; 5 by default. None for no brake.
            progress: called after each batch.

        Raises:
            ValueError: what is given is not a fingerprint, a rate is not above 0, or
                stop_after is negative.

        """
        from bgjob._triage import rest  # noqa: PLC0415 (as above)

        options = rest.Options(upto, rate, stop_after, self._notify, progress)
        return await self._walk(rest.rest(fingerprint, options))

    async def _walk(self, steps: "Steps[T]") -> T:
        answer: Any = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                returned: T = stop.value
                return returned
            if isinstance(step, Statement):
                answer = await self._run(step, None)
            else:
                await asyncio.sleep(step.seconds)

    async def purge(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[DeadFilters],
    ) -> int:
        """Delete dead jobs permanently; return their number.

        Args:
            ids: one id or several; None (the default) for any id.
            conn: a connection of the caller's.
            filters: those of DeadFilters.

        """
        return await self._run(dead.purge(_filter(ids, filters)), conn)


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class _Run(Protocol):
    def __call__(self, statement: Statement[T], conn: Connection[Any] | None, /) -> T: ...


class Dlq:
    """The dead-letter table of a client; thread-safe.

    Every method but `canary` and `rest`, which are several transactions, takes `conn`, to
    work inside the caller's transaction. They raise psycopg's errors. The filters are those
    of DeadFilters.
    """

    def __init__(self, run: _Run, *, notify: bool) -> None:
        self._run = run
        self._notify = notify

    def list(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        before: DeadJob | int | None = None,
        limit: int = 100,
        conn: Connection[Any] | None = None,
        **filters: Unpack[DeadFilters],
    ) -> builtins.list[DeadJob]:
        """List dead jobs, the latest first.

        Args:
            ids: one id or several; None (the default) for any id. A job that died more
                than once is listed as often.
            before: the last dead job of a page, or its number: lists the next page.
                Jobs that die meanwhile do not shift pages.
            limit: the most jobs to return; 100 by default, a screenful or two.
            conn: a connection of the caller's.
            filters: those of DeadFilters.

        """
        return self._run(_list(ids, before, limit, filters), conn)

    def get(
        self,
        id: str,  # noqa: A002
        *,
        conn: Connection[Any] | None = None,
    ) -> DeadJob | None:
        """Return the dead job with this id, the latest of several; None without one."""
        found = self._run(_list(id, None, 1, {}), conn)
        return found[0] if found else None

    def groups(
        self,
        *,
        limit: int = 100,
        conn: Connection[Any] | None = None,
        **filters: Unpack[DeadFilters],
    ) -> builtins.list[DeadGroup]:
        """Group dead jobs by how they died, the largest group first.

        With a million dead jobs it takes 0.1 to 0.2 s; with a filter other than `fingerprint`,
        `numbers` and `upto` it reads all their rows, and takes longer.

        Args:
            limit: the most groups to return; 100 by default.
            conn: a connection of the caller's.
            filters: those of DeadFilters.

        """
        where = _filter(None, filters)
        return self._run(dead.groups(where, limit=limit), conn)

    def requeue(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        keep_checkpoint: bool = True,
        conn: Connection[Any] | None = None,
        **filters: Unpack[DeadFilters],
    ) -> builtins.list[str]:
        """Move dead jobs back to their queues, due now, with attempts counted from 0.

        All their settings are kept. Of several dead jobs with one id only the latest is
        requeued; one whose id a live job has stays dead. Sleeping workers are notified.

        Args:
            ids: one id or several; None (the default) for any id.
            keep_checkpoint: whether they go on from what their handlers saved (see
                bgjob.checkpoint); True by default. False: they begin again.
            conn: a connection of the caller's.
            filters: those of DeadFilters.

        Returns:
            The ids of the requeued jobs.

        """
        moved = dead.requeue(_filter(ids, filters), keep_checkpoint=keep_checkpoint)
        requeued = self._run(moved, conn)
        if self._notify and requeued.queues and not is_two_phase(conn):
            self._run(enqueues.tell_all(requeued.queues), conn)
        return requeued.ids

    def canary(
        self,
        fingerprint: str,
        *,
        wait: Duration = 60.0,
        one_try: bool = False,
        force: bool = False,
        progress: Callable[[Canary], object] | None = None,
    ) -> Canary:
        """Move the latest dead job of a group back to its queue, and wait for how it ends.

        Call `rest` once it has completed. The job is requeued as by `requeue`: if it fails, it is
        retried by the policy of its type. Each look is a statement of its own, every 0.02 to
        0.5 s.

        Args:
            fingerprint: that of a DeadGroup or a DeadJob.
            wait: seconds or a timedelta until the verdict is `undecided`; a minute by
                default. The job stays in its queue.
            one_try: whether a job that fails goes back to the dead-letter table, with its
                new error, instead of waiting for its next attempt; False by default. It
                needs the privileges of `bgjob_editor` in addition.
            force: whether to move it even if its queue is paused, or no live worker is
                known that has a handler for its type; False by default.
            progress: called when the job is in its queue, and when it is seen to run, with
                what is known by then.

        Returns:
            The verdict, and the new error if there is one.

        Raises:
            CanaryRefusedError: there is no such dead job, or nothing would run it.
            ValueError: what is given is not a fingerprint.

        """
        from bgjob._triage import canary  # noqa: PLC0415 (only those who ask need it)

        limit = seconds(wait, "wait")
        options = canary.Options(limit, one_try, force, self._notify, progress)
        return self._walk(canary.canary(fingerprint, options))

    def rest(
        self,
        fingerprint: str,
        *,
        upto: int | None = None,
        rate: float | None = 100.0,
        stop_after: int | None = 5,
        progress: Callable[[Rest], object] | None = None,
    ) -> Rest:
        """Move all dead jobs of a group back to their queues, and stop if they fail again.

        Those that died first come first, in batches of 10 to 100, each in a transaction of its
        own. It has no state but the table: what ends it, be it an exception of `progress` or
        the process's end, leaves the others dead, and a later call goes on with them.

        Args:
            fingerprint: that of a DeadGroup or a DeadJob.
            upto: a number: jobs that died later stay dead. By default those that die from
                now on do. To go on later without those that failed again, pass that of the
                first call's result.
            rate: jobs a second; 100 by default, so that the brake sees failures before most
                are moved. None for no limit.
            stop_after: ends it, before the next batch, when more than so many have failed
                again; 5 by default. None for no brake.
            progress: called after each batch.

        Raises:
            ValueError: what is given is not a fingerprint, a rate is not above 0, or
                stop_after is negative.

        """
        from bgjob._triage import rest  # noqa: PLC0415 (as above)

        options = rest.Options(upto, rate, stop_after, self._notify, progress)
        return self._walk(rest.rest(fingerprint, options))

    def _walk(self, steps: "Steps[T]") -> T:
        answer: Any = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                returned: T = stop.value
                return returned
            if isinstance(step, Statement):
                answer = self._run(step, None)
            else:
                sleep(step.seconds)

    def purge(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        conn: Connection[Any] | None = None,
        **filters: Unpack[DeadFilters],
    ) -> int:
        """Delete dead jobs permanently; return their number.

        Args:
            ids: one id or several; None (the default) for any id.
            conn: a connection of the caller's.
            filters: those of DeadFilters.

        """
        return self._run(dead.purge(_filter(ids, filters)), conn)


# -- both colours ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DlqRetention:
    """A worker's service that deletes dead jobs of a certain age.

    Any number of workers may have it. It deletes 1,000 jobs at a time, so that its
    worker's jobs do not wait. Its role needs the privileges of an operator in addition
    to those of a worker.

    Attributes:
        age: seconds or a timedelta for which a dead job is kept, by the
            database's clock.
        every: seconds or a timedelta between two runs, at least 1 s; an hour by
            default: a dead job may stay for that much longer.

    """

    age: Duration
    every: Duration = field(default=3600.0, kw_only=True)

    def __post_init__(self) -> None:
        seconds(self.age, "age")
        if seconds(self.every, "every") < 1:
            raise ValueError(f"every must be at least 1 second, not {self.every!r}")

    def run(self, conn: Connection[Any], /) -> float:
        """Delete up to 1,000 dead jobs; return the seconds until the next run."""
        statement = dead.expire(seconds(self.age, "age"), limit=_BATCH)
        full = execute.run(conn, statement) == _BATCH
        return _SOON if full else seconds(self.every, "every")


def _list(
    ids: str | Iterable[str] | None, before: DeadJob | int | None, limit: int, filters: DeadFilters
) -> Statement[list[DeadJob]]:
    number = before.number if isinstance(before, DeadJob) else before
    return dead.listed(_filter(ids, filters)._replace(before=number), limit=limit)


def _filter(ids: str | Iterable[str] | None, filters: DeadFilters) -> DeadFilter:
    if unknown := filters.keys() - DeadFilters.__annotations__.keys():
        raise TypeError(
            f"{unknown.pop()!r} is not a filter; there are {', '.join(DeadFilters.__annotations__)}"
        )
    for name in ("moved_before", "moved_after"):
        moved = filters.get(name)
        if isinstance(moved, datetime) and moved.utcoffset() is None:
            raise ValueError(f"{name} must be an aware datetime: {moved!r} has no time zone")
    older_than, numbers = filters.get("older_than"), filters.get("numbers")
    fingerprint = filters.get("fingerprint")
    return DeadFilter(
        [ids] if isinstance(ids, str) else None if ids is None else list(ids),
        filters.get("queue"),
        filters.get("type"),
        filters.get("error"),
        filters.get("moved_before"),
        filters.get("moved_after"),
        None if older_than is None else seconds(older_than, "older_than"),
        upto=filters.get("upto"),
        numbers=None if numbers is None else [*numbers],
        fingerprint=None if fingerprint is None else dead.number_of(fingerprint),
        group=filters.get("group"),
    )
