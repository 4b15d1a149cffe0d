"""Live jobs: look at them, list them, cancel them, make them due, change their priority.

The module has over 400 lines because both colours are here; only the async one is written.
"""

import asyncio
import builtins
from collections.abc import Awaitable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import sleep
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    cast,
    get_args,
)

from psycopg import AsyncConnection, Connection
from psycopg.errors import LockNotAvailable
from typing_extensions import Unpack

from bgjob._failure import error_text
from bgjob._headers import NO_HEADERS
from bgjob._postgres.connection import is_two_phase
from bgjob._running.drive import drive, drive_async
from bgjob._sql import enqueues, job_pages, key_rows, keys, looks, steering
from bgjob._sql import jobs as sql
from bgjob._sql.job_pages import Looked, Way
from bgjob._sql.jobs import JobFilter, Live
from bgjob._sql.looks import Claimant
from bgjob._sql.server import bounds
from bgjob._sql.statement import Statement
from bgjob._sql.steering import Steered
from bgjob._sql.tokens import Origin, origin
from bgjob.job import check_name, check_priority
from bgjob.workers import WorkerState

T = TypeVar("T")

LiveState: TypeAlias = Literal["running", "due", "delayed", "retry", "key", "limited", "suspect"]
"""`running`: a worker holds it, or held it until its lease ended. `due`: its time has come.
`delayed`: it has not. `retry`: the next attempt's has not. `key`: it waits for its exclusive key.
`limited`: it is due, and waits for the limit of its type.
`suspect`: two workers or more died with it, so it runs alone. Each job is in one state."""

Unchanged: TypeAlias = Literal[
    "absent", "dead", "running", "waiting", "due", "same", "locked", "unmatched"
]
"""Why an action did not change a job. `absent`: there is no such job, so it was completed, purged,
or never written. `dead`: it is in the dead-letter table. `running`: a worker holds it. `waiting`:
none does. `due`: its time has come already. `same`: it has that priority. `locked`: another
transaction had its row for over a second. `unmatched`: the filters do not match it."""

_Answers: TypeAlias = list[Any]

_PATIENCE = 1.0
"""Seconds for which an action asks again for rows that other transactions have locked."""

_FIRST_PAUSE = 0.005
"""Seconds before it asks again; doubles."""

_PAGE = 1000
"""Jobs in one look for those that match a filter."""

_SKEW = timedelta(minutes=1)
"""A claim later than now by more is none: its token was not made by this version."""


class JobFilters(TypedDict, total=False):
    """Filters of live jobs; a job has to match all of them.

    Attributes:
        queue: jobs of this queue.
        type: jobs of this type.
        state: jobs in this state, one of LiveState.
        prefix: jobs whose ids begin with this text.
        exclusive: jobs with this exclusive key.
        error: jobs whose last error contains this text; case-sensitive.

    """

    queue: str | None
    type: str | None
    state: LiveState | None
    prefix: str | None
    exclusive: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class JobWorker:
    """The worker that holds a job.

    Attributes:
        number: the number of its row in bgjob_worker.
        host: the name of its host.
        pid: its process.
        program: the name of its program.
        release: the release of that, if it was given.
        state: "working", "stopping", "ended", "failed" or "lost".
        not_seen: seconds since it last wrote its row.

    """

    number: int
    host: str
    pid: int
    program: str
    release: str | None
    state: WorkerState
    not_seen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveJob:
    """A job that waits or runs.

    Attributes:
        id: its id.
        queue: its queue.
        type: its type.
        state: what it does; see LiveState.
        priority: lower runs first.
        attempt: the attempts that have begun; of a running job its present one.
        deaths: how many workers in a row died with it, or lost its lease.
        exclusive: its exclusive key, if it has one.
        next_run_at: when it is or was due.
        due_in: seconds until then, by the database's clock; negative if it is due.
        created_at: when it was enqueued.
        updated_at: when a result was last stored.
        last_error: the error of the last failed attempt; in a list its first 200 characters.
        size: the bytes of its payload; None without one.
        expires: when it expires; None if it never does.
        is_replaced: whether a newer request with its id waits for its end.
        slots: how many jobs of its key may run at once; None for one.
        arg: its payload; None also in a list.
        headers: its headers, a dict that cannot be changed; empty also in a list.
        checkpoint: the bytes that its handler saved last, as JSON unless its class has another
            codec; None if there are none, and in a list. See bgjob.checkpoint.
        group: the id of its group, which is that of the job that runs when no job of the group is
            live any more; None without one. That job has its own id here, and until then it is
            never due.
        group_dead: of that job: how many jobs of its group died; None for others, and before.
        claimed_at: since when a worker holds it; None if none does, or if its claim does not
            tell.
        worker: the worker that holds it; None if none does, or if it is not in bgjob_worker.
        lease_until: when its lease ends, which is extended while it runs.
        lease_left: seconds until then; negative if it has ended: the worker died, or was cut
            off, and the job is freed by the next full look for due jobs.

    """

    id: str
    queue: str
    type: str
    state: LiveState
    priority: int
    attempt: int
    deaths: int
    exclusive: str | None
    next_run_at: datetime
    due_in: float
    created_at: datetime
    updated_at: datetime
    last_error: str | None
    size: int | None
    expires: datetime | None = None
    is_replaced: bool = False
    slots: int | None = None
    arg: bytes | None = None
    headers: Mapping[str, Any] = NO_HEADERS
    checkpoint: bytes | None = None
    group: str | None = None
    group_dead: int | None = None
    claimed_at: datetime | None = None
    worker: JobWorker | None = None
    lease_until: datetime | None = None
    lease_left: float | None = None

    @property
    def waits_for_group(self) -> bool:
        """Whether it is due when no job of its group is live any more."""
        is_told = self.group_dead is not None
        return self.group == self.id and not is_told and self.attempt == 0 and self.due_in > 0


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of a list of live jobs.

    Attributes:
        jobs: the jobs. There may be fewer than asked for, also none, and still more pages.
        next: pass it as `after` for the next page; None if there is no more.
        looked_at: the number of jobs that were looked at to find these; an estimate where
            `about` is given.
        about: about how many jobs there are, as far as the statistics of the table know, if
            the table was searched.

    """

    jobs: tuple[LiveJob, ...]
    next: str | None
    looked_at: int
    about: int | None = None


@dataclass(frozen=True, slots=True)
class JobChanges:
    """What an action changed, and what it did not, and why.

    Attributes:
        waiting: the ids of changed jobs that waited.
        running: the ids of changed jobs that were running.
        unchanged: the others by id, and why; see Unchanged.

    """

    waiting: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    unchanged: Mapping[str, Unchanged] = field(default_factory=dict)

    @property
    def changed(self) -> tuple[str, ...]:
        """The ids of all changed jobs."""
        return self.waiting + self.running


# -- async -----------------------------------------------------------------------------


class _RunAsync(Protocol):
    def __call__(
        self,
        statement: Statement[T],
        conn: AsyncConnection[Any] | None,
        /,
        *,
        before: Statement[None] | None = None,
    ) -> Awaitable[T]: ...


class _RunAllAsync(Protocol):
    def __call__(self, statements: Sequence[Statement[Any]], /) -> Awaitable[_Answers]: ...


class AsyncJobs:
    """The live jobs of an async client; safe to share between tasks.

    Every method takes `conn`, to work inside the caller's transaction, and raises psycopg's
    errors. The filters are those of JobFilters. Looking needs the privileges of
    `bgjob_operator`, changing those of `bgjob_editor`.
    """

    def __init__(self, run: _RunAsync, run_all: _RunAllAsync, *, notify: bool) -> None:
        self._run = run
        self._run_all = run_all
        self._notify = notify

    async def get(
        self,
        id: str,  # noqa: A002
        *,
        conn: AsyncConnection[Any] | None = None,
    ) -> LiveJob | None:
        """Return the live job with this id, with its payload and whole error; None without one.

        A job that is completed does not exist any more, and a dead one is in `client.dlq`.
        `client.explain` says why a job does not run.

        Raises:
            ValueError: an invalid id.

        """
        return await drive_async(_get(id), lambda step: self._take(step, conn))

    async def list(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        after: str | None = None,
        limit: int = 100,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobPage:
        """List live jobs, page by page, without their payloads.

        A page costs the same however many jobs there are: up to 0.3 s at a million, and a
        few milliseconds where an index finds the jobs. With a filter for which there is no
        index, such as `error`, a page ends after so many jobs looked at, even if it has
        found none: as long as it has a `next`, there may be more.

        The order follows from the filters. Without any, or with `prefix` or ids: by id, the
        last first, which is the newest first of generated ids. With `queue`: the order in
        which they are claimed, then those that wait for keys. With `exclusive`: the order
        in which they get the key. Otherwise that of the table, where a job that is changed
        while pages are read may be listed twice, or not at all.

        Args:
            ids: one id or several: all of these jobs, as far as they live, in one page.
            after: the `next` of a page with the same filters: lists the page after it.
            limit: the most jobs to return; 100 by default, a screenful or two.
            conn: a connection of the caller's.
            filters: those of JobFilters.

        Raises:
            ValueError: an invalid filter or limit, or `after` is of a page with others.

        """
        steps = _list(ids, after, limit, filters)
        return await drive_async(steps, lambda step: self._take(step, conn))

    async def matching(
        self, *, conn: AsyncConnection[Any] | None = None, **filters: Unpack[JobFilters]
    ) -> builtins.list[str]:
        """Return the ids of all jobs that match the filters, to confirm their number and act.

        It reads page after page, so it takes about a second for a million jobs.

        Args:
            conn: a connection of the caller's.
            filters: those of JobFilters; at least one.

        Raises:
            TypeError: there is no filter.
            ValueError: an invalid filter.

        """
        steps = _matching(_filter(filters, needed=True))
        return await drive_async(steps, lambda step: self._take(step, conn))

    async def cancel(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        reason: str = "",
        by: str | None = None,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobChanges:
        """Cancel jobs, waiting or running: move them to the dead-letter table.

        Their error there is `cancelled by NAME: REASON`, and a requeue undoes it. From the
        commit on a running attempt changes nothing: its result is refused, and the
        transaction of a transactional handler is rolled back. What its handler did
        elsewhere stays. Its worker is notified, or finds out at the next extension of the
        lease, a third of it later at most: it then cancels the coroutine, or gives up the
        thread as after a timeout, and the observer is told `job_cancelled`.

        It waits for no lock. A job whose row another transaction has locked, as a claim or
        a settlement does for a moment, is looked at again for up to a second. Of several
        jobs a thousand are cancelled in a transaction; if that fails, the earlier ones stay
        cancelled.

        Args:
            ids: one id or several; None (the default) for any id that matches the filters.
            reason: why, for those who find the job in the dead-letter table.
            by: the name of who cancels; by default the database role.
            conn: a connection of the caller's. Until its transaction ends, workers wait
                for the exclusive keys of the cancelled jobs, and no other transaction
                should cancel jobs of the same keys in between.
            filters: those of JobFilters. With ids too a job has to match them, for example
                `state="running"`.

        Returns:
            Which jobs were cancelled while they waited, which while they were running, and
            why the others were not.

        Raises:
            TypeError: neither an id nor a filter is given.
            ValueError: an invalid id or filter.

        """
        return await self._act(ids, filters, _Cancel(by, reason), conn)

    async def abandon(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        reason: str = "",
        by: str | None = None,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobChanges:
        """Give up running jobs without notice to their workers; their handlers run on.

        As `cancel`, but for jobs that are running only, and nothing is interrupted: the
        worker finds the lease lost at its next extension, and drops the result. It is meant
        for a handler that must not be interrupted, or whose worker is believed to be gone
        for good. The job's exclusive key is free immediately, so the next job of that key
        may run while this handler still does.

        Args:
            ids: one id or several; None (the default) for any id that matches the filters.
            reason: why, for those who find the job in the dead-letter table, where its
                error is `abandoned by NAME: REASON`.
            by: the name of who gives it up; by default the database role.
            conn: a connection of the caller's; see `cancel`.
            filters: those of JobFilters.

        Returns:
            Which jobs were given up, and why the others were not.

        Raises:
            TypeError: neither an id nor a filter is given.
            ValueError: an invalid id or filter.

        """
        return await self._act(ids, filters, _Abandon(by, reason), conn)

    async def run_now(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobChanges:
        """Make delayed jobs due now, also those that wait for a retry; tell their workers.

        A job keeps its attempts and its priority, and takes its turn behind those that are
        due already.

        Args:
            ids: one id or several; None (the default) for any id that matches the filters.
            conn: a connection of the caller's.
            filters: those of JobFilters.

        Returns:
            Which jobs are due now, and why the others were not changed.

        Raises:
            TypeError: neither an id nor a filter is given.
            ValueError: an invalid id or filter.

        """
        return await self._act(ids, filters, _RunNow(), conn)

    async def set_priority(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        priority: int,
        conn: AsyncConnection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobChanges:
        """Change the priority of jobs that are not running; tell their workers.

        A due job takes its turn behind those of its new priority that are due already. One
        that waits for an exclusive key keeps its place among the jobs of the key. A job that
        has the priority already is not changed, so that it keeps its turn.

        Args:
            ids: one id or several; None (the default) for any id that matches the filters.
            priority: -32768 to 32767; lower runs first.
            conn: a connection of the caller's.
            filters: those of JobFilters.

        Returns:
            Which jobs were changed, and why the others were not.

        Raises:
            TypeError: neither an id nor a filter is given.
            ValueError: an invalid id, filter or priority.

        """
        check_priority(priority, "priority")
        return await self._act(ids, filters, _SetPriority(priority), conn)

    async def _act(
        self,
        ids: str | Iterable[str] | None,
        filters: JobFilters,
        action: "_Action",
        conn: AsyncConnection[Any] | None,
    ) -> JobChanges:
        notify = self._notify and not is_two_phase(conn)
        steps = _act(ids, filters, action, notify=notify, is_own=conn is None)
        return await drive_async(steps, lambda step: self._take(step, conn))

    async def _take(self, step: "_Step", conn: AsyncConnection[Any] | None) -> Any:
        match step:
            case _Ask(statement, before):
                return await self._run(statement, conn, before=before)
            case _Together(statements, own) if conn is None:
                return await self._run_all([*own, *statements])
            case _Together(statements, _):
                return [await self._run(statement, conn) for statement in statements]
            case _Sleep(seconds):
                return await asyncio.sleep(seconds)


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class _Run(Protocol):
    def __call__(
        self,
        statement: Statement[T],
        conn: Connection[Any] | None,
        /,
        *,
        before: Statement[None] | None = None,
    ) -> T: ...


class _RunAll(Protocol):
    def __call__(self, statements: Sequence[Statement[Any]], /) -> _Answers: ...


class Jobs:
    """The live jobs of a client; thread-safe.

    Every method takes `conn`, to work inside the caller's transaction, and raises psycopg's
    errors. The filters are those of JobFilters. Looking needs the privileges of
    `bgjob_operator`, changing those of `bgjob_editor`.
    """

    def __init__(self, run: _Run, run_all: _RunAll, *, notify: bool) -> None:
        self._run = run
        self._run_all = run_all
        self._notify = notify

    def get(
        self,
        id: str,  # noqa: A002
        *,
        conn: Connection[Any] | None = None,
    ) -> LiveJob | None:
        """Return the live job with this id, with its payload and whole error; None without one.

        A job that is completed does not exist any more, and a dead one is in `client.dlq`.
        `client.explain` says why a job does not run.

        Raises:
            ValueError: an invalid id.

        """
        return drive(_get(id), lambda step: self._take(step, conn))

    def list(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        after: str | None = None,
        limit: int = 100,
        conn: Connection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobPage:
        """List live jobs, page by page, without their payloads.

        A page costs the same however many jobs there are: up to 0.3 s at a million, and a
        few milliseconds where an index finds the jobs. With a filter for which there is no
        index, such as `error`, a page ends after so many jobs looked at, even if it has
        found none: as long as it has a `next`, there may be more.

        The order follows from the filters. Without any, or with `prefix` or ids: by id, the
        last first, which is the newest first of generated ids. With `queue`: the order in
        which they are claimed, then those that wait for keys. With `exclusive`: the order
        in which they get the key. Otherwise that of the table, where a job that is changed
        while pages are read may be listed twice, or not at all.

        Args:
            ids: one id or several: all of these jobs, as far as they live, in one page.
            after: the `next` of a page with the same filters: lists the page after it.
            limit: the most jobs to return; 100 by default, a screenful or two.
            conn: a connection of the caller's.
            filters: those of JobFilters.

        Raises:
            ValueError: an invalid filter or limit, or `after` is of a page with others.

        """
        steps = _list(ids, after, limit, filters)
        return drive(steps, lambda step: self._take(step, conn))

    def matching(
        self, *, conn: Connection[Any] | None = None, **filters: Unpack[JobFilters]
    ) -> builtins.list[str]:
        """Return the ids of all jobs that match the filters, to confirm their number and act.

        It reads page after page, so it takes about a second for a million jobs.

        Args:
            conn: a connection of the caller's.
            filters: those of JobFilters; at least one.

        Raises:
            TypeError: there is no filter.
            ValueError: an invalid filter.

        """
        steps = _matching(_filter(filters, needed=True))
        return drive(steps, lambda step: self._take(step, conn))

    def cancel(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        reason: str = "",
        by: str | None = None,
        conn: Connection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobChanges:
        """Cancel jobs, waiting or running: move them to the dead-letter table.

        Their error there is `cancelled by NAME: REASON`, and a requeue undoes it. From the
        commit on a running attempt changes nothing: its result is refused, and the
        transaction of a transactional handler is rolled back. What its handler did
        elsewhere stays. Its worker is notified, or finds out at the next extension of the
        lease, a third of it later at most: it then cancels the coroutine, or gives up the
        thread as after a timeout, and the observer is told `job_cancelled`.

        It waits for no lock. A job whose row another transaction has locked, as a claim or
        a settlement does for a moment, is looked at again for up to a second. Of several
        jobs a thousand are cancelled in a transaction; if that fails, the earlier ones stay
        cancelled.

        Args:
            ids: one id or several; None (the default) for any id that matches the filters.
            reason: why, for those who find the job in the dead-letter table.
            by: the name of who cancels; by default the database role.
            conn: a connection of the caller's. Until its transaction ends, workers wait
                for the exclusive keys of the cancelled jobs, and no other transaction
                should cancel jobs of the same keys in between.
            filters: those of JobFilters. With ids too a job has to match them, for example
                `state="running"`.

        Returns:
            Which jobs were cancelled while they waited, which while they were running, and
            why the others were not.

        Raises:
            TypeError: neither an id nor a filter is given.
            ValueError: an invalid id or filter.

        """
        return self._act(ids, filters, _Cancel(by, reason), conn)

    def abandon(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        reason: str = "",
        by: str | None = None,
        conn: Connection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobChanges:
        """Give up running jobs without notice to their workers; their handlers run on.

        As `cancel`, but for jobs that are running only, and nothing is interrupted: the
        worker finds the lease lost at its next extension, and drops the result. It is meant
        for a handler that must not be interrupted, or whose worker is believed to be gone
        for good. The job's exclusive key is free immediately, so the next job of that key
        may run while this handler still does.

        Args:
            ids: one id or several; None (the default) for any id that matches the filters.
            reason: why, for those who find the job in the dead-letter table, where its
                error is `abandoned by NAME: REASON`.
            by: the name of who gives it up; by default the database role.
            conn: a connection of the caller's; see `cancel`.
            filters: those of JobFilters.

        Returns:
            Which jobs were given up, and why the others were not.

        Raises:
            TypeError: neither an id nor a filter is given.
            ValueError: an invalid id or filter.

        """
        return self._act(ids, filters, _Abandon(by, reason), conn)

    def run_now(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        conn: Connection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobChanges:
        """Make delayed jobs due now, also those that wait for a retry; tell their workers.

        A job keeps its attempts and its priority, and takes its turn behind those that are
        due already.

        Args:
            ids: one id or several; None (the default) for any id that matches the filters.
            conn: a connection of the caller's.
            filters: those of JobFilters.

        Returns:
            Which jobs are due now, and why the others were not changed.

        Raises:
            TypeError: neither an id nor a filter is given.
            ValueError: an invalid id or filter.

        """
        return self._act(ids, filters, _RunNow(), conn)

    def set_priority(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        priority: int,
        conn: Connection[Any] | None = None,
        **filters: Unpack[JobFilters],
    ) -> JobChanges:
        """Change the priority of jobs that are not running; tell their workers.

        A due job takes its turn behind those of its new priority that are due already. One
        that waits for an exclusive key keeps its place among the jobs of the key. A job that
        has the priority already is not changed, so that it keeps its turn.

        Args:
            ids: one id or several; None (the default) for any id that matches the filters.
            priority: -32768 to 32767; lower runs first.
            conn: a connection of the caller's.
            filters: those of JobFilters.

        Returns:
            Which jobs were changed, and why the others were not.

        Raises:
            TypeError: neither an id nor a filter is given.
            ValueError: an invalid id, filter or priority.

        """
        check_priority(priority, "priority")
        return self._act(ids, filters, _SetPriority(priority), conn)

    def _act(
        self,
        ids: str | Iterable[str] | None,
        filters: JobFilters,
        action: "_Action",
        conn: Connection[Any] | None,
    ) -> JobChanges:
        notify = self._notify and not is_two_phase(conn)
        steps = _act(ids, filters, action, notify=notify, is_own=conn is None)
        return drive(steps, lambda step: self._take(step, conn))

    def _take(self, step: "_Step", conn: Connection[Any] | None) -> Any:
        match step:
            case _Ask(statement, before):
                return self._run(statement, conn, before=before)
            case _Together(statements, own) if conn is None:
                return self._run_all([*own, *statements])
            case _Together(statements, _):
                return [self._run(statement, conn) for statement in statements]
            case _Sleep(seconds):
                return sleep(seconds)


# -- both colours ----------------------------------------------------------------------


class _Ask(NamedTuple):
    """A step that runs a statement; the answer is its."""

    statement: Statement[Any]
    before: Statement[None] | None = None
    """What is sent with it on a connection of the client's own."""


class _Together(NamedTuple):
    """A step that runs statements in one transaction."""

    statements: Sequence[Statement[Any]]
    own: Sequence[Statement[None]] = ()
    """What comes before them in a transaction of the client's own."""


class _Sleep(NamedTuple):
    """A step that waits."""

    seconds: float


_Step: TypeAlias = _Ask | _Together | _Sleep
_Steps: TypeAlias = Generator[_Step, Any, T]


# -- actions ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cancel:
    by: str | None
    reason: str
    tells: ClassVar = True  # the workers of running jobs

    def statement(self, ids: Sequence[str], where: JobFilter) -> Statement[list[Steered]]:
        return steering.cancel(ids, where, by=_clean(self.by), reason=_clean(self.reason) or "")


@dataclass(frozen=True, slots=True)
class _Abandon:
    by: str | None
    reason: str
    tells: ClassVar = False

    def statement(self, ids: Sequence[str], where: JobFilter) -> Statement[list[Steered]]:
        return steering.abandon(ids, where, by=_clean(self.by), reason=_clean(self.reason) or "")


@dataclass(frozen=True, slots=True)
class _RunNow:
    def statement(self, ids: Sequence[str], where: JobFilter) -> Statement[list[Steered]]:
        return steering.run_now(ids, where)


@dataclass(frozen=True, slots=True)
class _SetPriority:
    priority: int

    def statement(self, ids: Sequence[str], where: JobFilter) -> Statement[list[Steered]]:
        return steering.set_priority(ids, where, self.priority)


_Action: TypeAlias = _Cancel | _Abandon | _RunNow | _SetPriority


def _clean(text: str | None) -> str | None:
    """Return a text that the database can store."""
    return error_text(text) or None


def _act(
    ids: str | Iterable[str] | None,
    filters: JobFilters,
    action: _Action,
    *,
    notify: bool,
    is_own: bool,
) -> _Steps[JobChanges]:
    chosen = _ids(ids)
    where = _filter(filters, needed=chosen is None)
    if chosen is None:
        chosen = yield from _matching(where)
    done: dict[str, Steered] = {}
    for start in range(0, len(chosen), steering.MOST):
        some = yield from _steered(chosen[start : start + steering.MOST], where, action)
        yield from _told(some, action, notify=notify)
        done.update((steered.id, steered) for steered in some)
    # Of all batches together: no transaction locks keys twice.
    if notify:
        yield from _keys_passed_on(done.values(), is_own=is_own)
    steered = [done[id_] for id_ in chosen]
    return JobChanges(
        tuple(s.id for s in steered if s.is_changed and s.answer == "waiting"),
        tuple(s.id for s in steered if s.is_changed and s.answer == "running"),
        {s.id: cast("Unchanged", s.answer) for s in steered if not s.is_changed},
    )


def _steered(ids: list[str], where: JobFilter, action: _Action) -> _Steps[list[Steered]]:
    """Act on some jobs; ask again for those that are locked."""
    done: list[Steered] = []
    pause, left = _FIRST_PAUSE, _PATIENCE
    while True:
        answers: list[Steered] = yield _Ask(action.statement(ids, where))
        locked = [steered for steered in answers if steered.answer == "locked"]
        done += [steered for steered in answers if steered.answer != "locked"]
        if not locked or left <= 0:
            return done + locked
        yield _Sleep(pause)
        left -= pause
        pause = min(2 * pause, max(left, _FIRST_PAUSE))
        ids = [steered.id for steered in locked]


def _told(steered: Iterable[Steered], action: _Action, *, notify: bool) -> _Steps[None]:
    """Notify the workers of what was done."""
    changed = [s for s in steered if s.is_changed]
    if not (notify and changed):
        return
    if isinstance(action, _RunNow | _SetPriority):
        yield _Ask(enqueues.tell_all({str(s.queue) for s in changed}))
    elif action.tells and (running := [s for s in changed if s.token is not None]):
        yield _Ask(steering.tell_cancelled(running))


def _keys_passed_on(steered: Iterable[Steered], *, is_own: bool) -> _Steps[None]:
    """Wake the next job of each key that a cancelled job had, or was to get next.

    Where this does not come about, as after the death of this process, the workers find such
    keys at their next full look.
    """
    freed = [(s.key, s.queue) for s in steered if s.key is not None and s.queue is not None]
    most = steering.MOST if is_own else max(len(freed), 1)
    for start in range(0, len(freed), most):
        by_queue: dict[str, list[str]] = {}
        for key, queue in freed[start : start + most]:
            by_queue.setdefault(queue, []).append(key)
        locked = key_rows.lock_keys(key for key, _ in freed[start : start + most])
        releases = [keys.release(queue, its_keys) for queue, its_keys in by_queue.items()]
        try:
            yield _Together([locked, *releases], own=[steering.brief_waits()])
        except LockNotAvailable:
            if not is_own:
                raise


# -- looks -----------------------------------------------------------------------------


def _ask(statement: Statement[Any]) -> _Ask:
    return _Ask(statement, bounds("bgjob job"))


def _get(id_: str) -> _Steps[LiveJob | None]:
    check_name("id", id_)
    row: Live | None = yield _ask(sql.get(id_))
    jobs = yield from _live([] if row is None else [row])
    return jobs[0] if jobs else None


def _list(
    ids: str | Iterable[str] | None, after: str | None, limit: int, filters: JobFilters
) -> _Steps[JobPage]:
    chosen, where = _ids(ids), _filter(filters)
    if type(limit) is not int or limit < 1:
        raise ValueError(f"limit must be a number from 1, not {limit!r}")
    if chosen is not None:
        if after is not None:
            raise ValueError("after continues a list of filters; jobs with given ids are one page")
        rows: list[Live] = (yield _ask(sql.listed(chosen, where))) if chosen else []
        return JobPage((yield from _live(rows)), None, len(chosen))
    way = job_pages.first_way(where) if after is None else job_pages.parsed(after, where)
    found = yield from _page(way, where, limit)
    following = None if found.at is None else job_pages.written(found.at)
    return JobPage((yield from _live(found.jobs)), following, found.rows, found.about)


def _page(way: Way, where: JobFilter, limit: int) -> _Steps[Looked]:
    """Look until there are enough jobs, or enough was looked at for one page."""
    jobs: list[Live] = []
    rows, about = 0, None
    blocks, most = job_pages.FIRST_BLOCKS, job_pages.MOST_BLOCKS
    step, left = job_pages.FIRST_ROWS, job_pages.MOST_ROWS
    at: Way | None = way
    while at is not None:
        if isinstance(at, job_pages.Blocks):
            blocks = min(blocks, most)
            statement = at.look(where, limit - len(jobs), blocks)
        else:
            step = min(step, left)
            statement = at.look(where, limit - len(jobs), step)
        looked: Looked = yield _ask(statement)
        jobs += looked.jobs
        rows += looked.rows
        about = looked.about
        before, at = at, looked.at
        if len(jobs) == limit:
            break
        if at is None:
            at = job_pages.next_way(before, where)
        elif isinstance(at, job_pages.Blocks):
            most, blocks = most - blocks, 2 * blocks
            if most <= 0:
                break
        else:
            left, step = left - looked.rows, 8 * step
            if left <= 0:
                break
    else:
        return Looked(jobs, None, rows, about)
    return Looked(jobs, at or job_pages.next_way(before, where), rows, about)


def _matching(where: JobFilter) -> _Steps[list[str]]:
    """Return the ids of all jobs that match, each once."""
    ids: dict[str, None] = {}
    at: Way | None = job_pages.first_way(where)
    while at is not None:
        found = yield from _page(at, where, _PAGE)
        ids.update((job.id, None) for job in found.jobs)
        at = found.at
    return [*ids]


def _live(rows: Sequence[Live]) -> _Steps[tuple[LiveJob, ...]]:
    """Return jobs with the workers that hold them."""
    origins = {row.token: origin(row.token) for row in rows if row.token is not None}
    numbers = {
        (made.number, made.at)
        for made in origins.values()
        if made is not None and made.number is not None
    }
    workers: dict[tuple[int, datetime], Claimant] = {}
    may_read = bool(numbers) and (yield _ask(looks.may_read_workers()))
    if may_read:
        workers = yield _ask(looks.claimants(numbers))
    return tuple(_job(row, origins.get(row.token or 0), workers, may_read=may_read) for row in rows)


def _job(
    row: Live,
    made: Origin | None,
    workers: Mapping[tuple[int, datetime], Claimant],
    *,
    may_read: bool,
) -> LiveJob:
    worker, claimed_at = None, None
    if made is not None and made.at <= row.now + _SKEW:
        claimed_at = made.at
        if made.number is not None:
            found = workers.get((made.number, made.at))
            if found is not None:
                worker = JobWorker(*found[:5], cast("WorkerState", found.state), found.not_seen)
            elif may_read:
                claimed_at = None  # its number is no worker's, so its time need not be one
    return LiveJob(
        claimed_at=claimed_at,
        worker=worker,
        **{name: value for name, value in row._asdict().items() if name not in ("now", "token")},
    )


# -- arguments -------------------------------------------------------------------------


def _ids(ids: str | Iterable[str] | None) -> list[str] | None:
    if ids is None:
        return None
    chosen = [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
    for id_ in chosen:
        check_name("id", id_)
    return chosen


def _filter(filters: JobFilters, *, needed: bool = False) -> JobFilter:
    if unknown := filters.keys() - JobFilters.__annotations__.keys():
        raise TypeError(
            f"{unknown.pop()!r} is not a filter; there are {', '.join(JobFilters.__annotations__)}"
        )
    where = JobFilter(**filters)
    for name in ("queue", "type", "prefix", "exclusive"):
        value = getattr(where, name)
        if value is not None:
            check_name(name, value)
    if where.error is not None and (not isinstance(where.error, str) or "\0" in where.error):
        raise ValueError(f"error must be a str without NUL, not {where.error!r}")
    if where.state is not None and where.state not in get_args(LiveState):
        states = ", ".join(get_args(LiveState))
        raise ValueError(f"state must be one of {states}, not {where.state!r}")
    if needed and where == JobFilter():
        raise TypeError(
            "which jobs? give ids, or a filter, such as queue=…: all jobs of a database are never "
            "meant"
        )
    return where
