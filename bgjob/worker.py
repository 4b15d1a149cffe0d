"""Workers: run the jobs of queues until they are shut down.

The module has over 400 lines because both colours are here; only the async one is written.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import EllipsisType
from typing import Any, Protocol, Self

from bgjob._checks import Duration, seconds
from bgjob._worker.group import WorkerGroup
from bgjob._worker.observers import Observers
from bgjob._worker.options import Queues, WorkerOptions
from bgjob._worker.state import State
from bgjob.client import AsyncClient, Client
from bgjob.limit import Limit
from bgjob.mux import Mux
from bgjob.service import Service
from bgjob.workers import WorkerHealth

_LOOK = 0.2
"""Seconds between two checks of `run_until` whether the worker has ended on its own."""


class Event(Protocol):
    """An event that a program sets to end the worker."""

    def wait(self, timeout: float | None = None, /) -> bool:
        """Wait until it is set, for at most `timeout` seconds; True if it is set."""
        ...


class AsyncEvent(Protocol):
    """An event that a program sets to end the worker."""

    def wait(self) -> Coroutine[Any, Any, object]:
        """Wait until it is set."""
        ...


def _until(event: Event, group: WorkerGroup) -> None:
    """Wait until the event is set or the worker ends."""
    while not event.wait(_LOOK) and not group.ended_within(0):
        pass


async def _until_async(event: AsyncEvent, group: WorkerGroup) -> None:
    waiting: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
    ended: asyncio.Future[Any] = asyncio.wrap_future(group.done)
    try:
        await asyncio.wait([waiting, ended], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


# -- async -----------------------------------------------------------------------------


class AsyncWorker:
    """Runs the due jobs of queues with the handlers of a Mux, until it is shut down.

    Args:
        client: of the database with the queues. The worker opens one connection of
            its own for each queue, and uses none from the client's pool.
        queue: the queue to work on; or several, as a mapping from each to its
            concurrency, such as `{"high": 10, "low": 2}`: a busy queue never
            takes another's slots.
        mux: the handlers.
        concurrency: the number of slots: how many handlers run at the same time; 1
            by default, so that handlers need not be thread-safe. Not allowed with
            a mapping. Plain handlers run on as many threads, coroutine handlers on
            the caller's event loop, both within this bound.
        poll_interval: seconds or a timedelta between two looks at an idle
            queue; 1 s by default. Enqueues of a Client wake the worker
            immediately; the interval bounds the delay after a lost notification, a
            retry of another worker or an ended lease. Of more than 16 idle workers
            of a queue, 16 look so often and the others about ten times as rarely.
            At least 0.001 s.
        lease: seconds or a timedelta after which the jobs of a worker that died
            are due again; 30 s by default: longer than most pauses of a host,
            short enough to wait for. The worker extends it while it holds the job,
            so handlers may run for any time. At least 1 s.
        observer: receives the events: an Observer, a plain function that takes an
            event, or a list of these, each optionally restricted by `only`. By
            default a LoggingObserver; a list without one logs nothing.
        notify: whether enqueues wake the worker; True by default. Behind a
            pooler in transaction mode it polls regardless.
        services: what the worker runs alongside its jobs, such as Schedules; see
            bgjob.service.Service. None by default.
        state: a callable without arguments that makes an object which the handlers
            share, such as a connection pool or a model; each handler with a
            parameter `state` receives it. None by default. run() calls it once,
            before the worker claims jobs. A context manager is entered, and
            exited when the last handler or the grace period has ended.
        init_timeout: seconds or a timedelta within which run() connects or
            raises; 10 s by default, so that a wrong address shows immediately. At
            least 1 s; each host of the connection string gets at least 2 s.
        grace: seconds or a timedelta for which the end of the context manager,
            `run_until` and `shutdown` wait for running handlers, and then abandon them.
            30 s by default, as most supervisors allow; None waits without limit.
            `shutdown(timeout=...)` takes precedence for that call.
        registry: whether `Client.workers` and `bgjob workers` list the worker, which writes
            a row at its start, every 10 s and at its end; True by default: a beat
            is one small statement. If the table or a grant is missing, the worker
            works without a row, and the observer is told once.
        release: the version of your program, for that list; that of the environment
            variable BGJOB_RELEASE by default.
        limits: how many jobs of the queue run at once, or start in a time, over all workers
            that have the limit: a Limit; or a mapping from queues to theirs. None by default.
            One that an operator sets (`client.limits`, `bgjob limit`) takes precedence, and
            binds every worker.

    Jobs run at least once: a job whose worker dies before its result is stored
    runs again elsewhere. An async context manager: entering runs the worker, leaving
    shuts it down. Safe to share between tasks. A worker runs once, and not across a fork.

    The caller's event loop also makes, enters and exits `state`, which may be a
    coroutine function, or make an async context manager. A handler that blocks the loop
    delays other coroutines, but ends no lease: a thread extends those.
    """

    def __init__(
        self,
        client: AsyncClient,
        queue: Queues,
        mux: Mux,
        *,
        concurrency: int | None = None,
        poll_interval: Duration = 1.0,
        lease: Duration = 30.0,
        observer: Observers | None = None,
        notify: bool = True,
        services: Iterable[Service] = (),
        state: Callable[[], Any] | None = None,
        init_timeout: Duration = 10.0,
        grace: Duration | None = 30.0,
        registry: bool = True,
        release: str | None = None,
        limits: Mapping[str, Limit] | Limit | None = None,
    ) -> None:
        self._group = WorkerGroup(
            client,
            mux,
            WorkerOptions.checked(
                queue,
                concurrency=concurrency,
                poll_interval=poll_interval,
                lease=lease,
                notify=notify,
                init_timeout=init_timeout,
                grace=grace,
                limits=limits,
            ),
            observer=observer,
            services=services,
            state=None if state is None else State(state, has_loop=True),
            registry=registry,
            release=release,
        )

    async def run(self) -> None:
        """Connect, check the schema, and start to work; do not block.

        If the call is cancelled, the worker does not start, or ends.

        Raises:
            SchemaError: the tables or a grant are missing, or of another version.
            psycopg.Error: the server cannot be reached, or refuses.
            StateRequiredError: a handler has a parameter `state`, and the worker none.
            RuntimeError: the worker has been run or shut down before.
            Exception: whatever `state` raises. The worker can be run again.

        """
        await self._group.open_async()

    async def shutdown(self, timeout: Duration | EllipsisType | None = ...) -> bool:
        """Stop claiming, release jobs that have not started, finish the running ones.

        After the grace period a coroutine that still runs is cancelled, and its job is
        due again immediately. A thread cannot be cancelled: its job is due again when its
        lease ends. Neither attempt is counted. The call returns within the grace period and
        2 s, whatever hangs.

        Idempotent, from any task. It does not wait where it would wait for
        itself: in a handler, in an observer, and where it interrupts `run`.

        Args:
            timeout: the grace period, seconds or a timedelta; the worker's `grace` by
                default. None waits without limit.

        Returns:
            True if the worker has ended and stored a result for every job that had
            started.

        """
        self._group.stop(timeout)
        if self._group.is_inside:
            return not self._group.abandoned
        await self._group.join_async()
        return self._group.has_finished

    async def wait(self, timeout: Duration | None = None) -> bool:
        """Wait until the worker has ended, by a shutdown or by a fault of its own.

        Args:
            timeout: seconds or a timedelta; None (the default) waits without limit.

        Returns:
            True if it has ended.

        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        return await self._group.ended_within_async(limit)

    async def run_until(self, event: AsyncEvent) -> None:
        """Run until an event is set or the worker ends on its own, and shut it down.

        For a worker alongside other work in one program, in the main thread or any other.
        An exception that interrupts the call, for example a cancellation, shuts the
        worker down as well, and is raised.

        Args:
            event: an asyncio.Event, or an object with the same `wait`.

        Raises:
            BaseException: `failure`, if the worker has ended on its own; and whatever
                `run` raises.

        """
        await self.run()
        try:
            await _until_async(event, self._group)
        finally:
            await self.shutdown()
        if self.failure is not None:
            raise self.failure

    def health(self) -> WorkerHealth:
        """Return how the worker is, for a probe of yours: `is_live` and `is_ready`.

        From any thread or task, also before `run` and after the end. It asks no database and
        waits for nothing. `bgjob worker --health` serves it by HTTP.
        """
        return self._group.health()

    @property
    def failure(self) -> BaseException | None:
        """Why the worker ended on its own; None while it works, or after a shutdown.

        A worker survives an outage of the database of any length. It ends on its own, with
        all its queues, after more than 5 faults of its own within 10 s. The failure is set
        shortly before the worker ends.

        The caller's event loop has to outlast the worker, which ends with it.
        """
        return self._group.failure

    async def __aenter__(self) -> Self:
        await self.run()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


class Worker:
    """Runs the due jobs of queues with the handlers of a Mux, until it is shut down.

    Args:
        client: of the database with the queues. The worker opens one connection of
            its own for each queue, and uses none from the client's pool.
        queue: the queue to work on; or several, as a mapping from each to its
            concurrency, such as `{"high": 10, "low": 2}`: a busy queue never
            takes another's slots.
        mux: the handlers.
        concurrency: the number of slots: how many handlers run at the same time; 1
            by default, so that handlers need not be thread-safe. Not allowed with
            a mapping. Plain handlers run on as many threads, coroutine handlers on
            an event loop of its own, both within this bound.
        poll_interval: seconds or a timedelta between two looks at an idle
            queue; 1 s by default. Enqueues of a Client wake the worker
            immediately; the interval bounds the delay after a lost notification, a
            retry of another worker or an ended lease. Of more than 16 idle workers
            of a queue, 16 look so often and the others about ten times as rarely.
            At least 0.001 s.
        lease: seconds or a timedelta after which the jobs of a worker that died
            are due again; 30 s by default: longer than most pauses of a host,
            short enough to wait for. The worker extends it while it holds the job,
            so handlers may run for any time. At least 1 s.
        observer: receives the events: an Observer, a plain function that takes an
            event, or a list of these, each optionally restricted by `only`. By
            default a LoggingObserver; a list without one logs nothing.
        notify: whether enqueues wake the worker; True by default. Behind a
            pooler in transaction mode it polls regardless.
        services: what the worker runs alongside its jobs, such as Schedules; see
            bgjob.service.Service. None by default.
        state: a callable without arguments that makes an object which the handlers
            share, such as a connection pool or a model; each handler with a
            parameter `state` receives it. None by default. run() calls it once,
            before the worker claims jobs. A context manager is entered, and
            exited when the last handler or the grace period has ended.
        init_timeout: seconds or a timedelta within which run() connects or
            raises; 10 s by default, so that a wrong address shows immediately. At
            least 1 s; each host of the connection string gets at least 2 s.
        grace: seconds or a timedelta for which the end of the context manager,
            `run_until` and `shutdown` wait for running handlers, and then abandon them.
            30 s by default, as most supervisors allow; None waits without limit.
            `shutdown(timeout=...)` takes precedence for that call.
        registry: whether `Client.workers` and `bgjob workers` list the worker, which writes
            a row at its start, every 10 s and at its end; True by default: a beat
            is one small statement. If the table or a grant is missing, the worker
            works without a row, and the observer is told once.
        release: the version of your program, for that list; that of the environment
            variable BGJOB_RELEASE by default.
        limits: how many jobs of the queue run at once, or start in a time, over all workers
            that have the limit: a Limit; or a mapping from queues to theirs. None by default.
            One that an operator sets (`client.limits`, `bgjob limit`) takes precedence, and
            binds every worker.

    Jobs run at least once: a job whose worker dies before its result is stored
    runs again elsewhere. A context manager: entering runs the worker, leaving
    shuts it down. Thread-safe. A worker runs once, and not across a fork.
    """

    def __init__(
        self,
        client: Client,
        queue: Queues,
        mux: Mux,
        *,
        concurrency: int | None = None,
        poll_interval: Duration = 1.0,
        lease: Duration = 30.0,
        observer: Observers | None = None,
        notify: bool = True,
        services: Iterable[Service] = (),
        state: Callable[[], Any] | None = None,
        init_timeout: Duration = 10.0,
        grace: Duration | None = 30.0,
        registry: bool = True,
        release: str | None = None,
        limits: Mapping[str, Limit] | Limit | None = None,
    ) -> None:
        self._group = WorkerGroup(
            client,
            mux,
            WorkerOptions.checked(
                queue,
                concurrency=concurrency,
                poll_interval=poll_interval,
                lease=lease,
                notify=notify,
                init_timeout=init_timeout,
                grace=grace,
                limits=limits,
            ),
            observer=observer,
            services=services,
            state=None if state is None else State(state, has_loop=False),
            registry=registry,
            release=release,
        )

    def run(self) -> None:
        """Connect, check the schema, and start to work; do not block.

        Raises:
            SchemaError: the tables or a grant are missing, or of another version.
            psycopg.Error: the server cannot be reached, or refuses.
            StateRequiredError: a handler has a parameter `state`, and the worker none.
            RuntimeError: the worker has been run or shut down before.
            Exception: whatever `state` raises. The worker can be run again.

        """
        self._group.open()

    def shutdown(self, timeout: Duration | EllipsisType | None = ...) -> bool:
        """Stop claiming, release jobs that have not started, finish the running ones.

        After the grace period a coroutine that still runs is cancelled, and its job is
        due again immediately. A thread cannot be cancelled: its job is due again when its
        lease ends. Neither attempt is counted. The call returns within the grace period and
        2 s, whatever hangs.

        Idempotent, from any thread or signal handler. It does not wait where it would wait for
        itself: in a handler, in an observer, and where it interrupts `run`.

        Args:
            timeout: the grace period, seconds or a timedelta; the worker's `grace` by
                default. None waits without limit.

        Returns:
            True if the worker has ended and stored a result for every job that had
            started.

        """
        self._group.stop(timeout)
        if self._group.is_inside:
            return not self._group.abandoned
        self._group.join()
        return self._group.has_finished

    def wait(self, timeout: Duration | None = None) -> bool:
        """Wait until the worker has ended, by a shutdown or by a fault of its own.

        Args:
            timeout: seconds or a timedelta; None (the default) waits without limit.

        Returns:
            True if it has ended.

        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        return self._group.ended_within(limit)

    def run_until(self, event: Event) -> None:
        """Run until an event is set or the worker ends on its own, and shut it down.

        For a worker alongside other work in one program, in the main thread or any other.
        An exception that interrupts the call, for example a KeyboardInterrupt, shuts the
        worker down as well, and is raised.

        Args:
            event: a threading.Event, or an object with the same `wait`.

        Raises:
            BaseException: `failure`, if the worker has ended on its own; and whatever
                `run` raises.

        """
        self.run()
        try:
            _until(event, self._group)
        finally:
            self.shutdown()
        if self.failure is not None:
            raise self.failure

    def health(self) -> WorkerHealth:
        """Return how the worker is, for a probe of yours: `is_live` and `is_ready`.

        From any thread or task, also before `run` and after the end. It asks no database and
        waits for nothing. `bgjob worker --health` serves it by HTTP.
        """
        return self._group.health()

    @property
    def failure(self) -> BaseException | None:
        """Why the worker ended on its own; None while it works, or after a shutdown.

        A worker survives an outage of the database of any length. It ends on its own, with
        all its queues, after more than 5 faults of its own within 10 s. The failure is set
        shortly before the worker ends.
        """
        return self._group.failure

    def __enter__(self) -> Self:
        self.run()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
