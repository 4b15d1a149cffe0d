"""Workers: they run the jobs of queues until they are shut down."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import wait
from types import EllipsisType
from typing import Any, Protocol, Self

from bgjob._checks import Duration, seconds
from bgjob._worker.control import LAST_WORDS
from bgjob._worker.group import Crew, Queues
from bgjob._worker.observers import Audience
from bgjob._worker.state import State
from bgjob.client import AsyncClient, Client
from bgjob.mux import Mux
from bgjob.service import Service

_LOOK = 0.2
"""Seconds between two looks of `run_until` whether the worker has ended by itself."""


class Event(Protocol):
    """What a program sets when it is to end."""

    def wait(self, timeout: float | None = None, /) -> bool:
        """Wait until it is set, for at most so many seconds; True if it is."""
        ...


class AsyncEvent(Protocol):
    """What a program sets when it is to end."""

    def wait(self) -> Coroutine[Any, Any, object]:
        """Wait until it is set."""
        ...


class Worker:
    """Runs the due jobs of queues with the handlers of a Mux, until it is shut down.

    Args:
        client: where the queues are. The worker opens one connection of its own
            for each queue, and takes none from the client's pool.
        queue: the queue to work on; or several, as a mapping from each to its
            concurrency, such as `{"high": 10, "low": 2}`: a busy queue never
            takes another's slots.
        mux: the handlers.
        concurrency: handlers at once; 1 by default, so that nobody's code meets
            itself unasked. Not beside a mapping. Plain handlers run on so many
            threads, coroutine handlers on one event loop, that of all queues,
            both within this bound.
        poll_interval: seconds or a timedelta between two looks at an idle
            queue; 1 s by default. Enqueues of a Client wake the worker at
            once; this bounds what a lost notification, a retry of another
            worker or an ended lease costs. At least 0.001 s.
        lease: seconds or a timedelta after which the jobs of a worker that died
            are due again; 30 s by default: longer than most pauses of a host,
            short enough to wait for. It is extended while the job is held, so
            that handlers may run for as long as they like. At least 1 s.
        observer: receives the events: an Observer, a plain function of an
            event, or a list of such, each perhaps restricted by `only`. By
            default a LoggingObserver; a list without one logs nothing.
        notify: whether enqueues wake the worker; True by default. Behind a
            pooler in transaction mode it polls whatever this says.
        services: what the worker does beside its jobs, such as Schedules; see
            bgjob.service.Service. None by default.
        state: a callable without arguments that makes what the handlers share,
            a connection pool or a model, given to each that has a parameter
            `state`; none by default. It is called once, by run(), before a job
            is claimed. What is a context manager is entered, and left when the
            last handler has ended, or the grace period with it.
        init_timeout: seconds or a timedelta within which run() connects or
            raises; 10 s by default, so that a wrong address shows at once. At
            least 1 s; each host of the connection string is given 2 s at least.
        grace: seconds or a timedelta for which a shutdown waits for running handlers;
            30 s by default, what most supervisors grant. None waits for as long as it
            takes.

    Jobs run at least once: a handler whose worker dies before its result is
    stored runs again elsewhere. A context manager: entering runs it, leaving
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
        observer: Audience | None = None,
        notify: bool = True,
        services: Iterable[Service] = (),
        state: Callable[[], Any] | None = None,
        init_timeout: Duration = 10.0,
        grace: Duration | None = 30.0,
    ) -> None:
        self._crew = Crew(
            client,
            queue,
            mux,
            concurrency=concurrency,
            poll_interval=poll_interval,
            lease=lease,
            observer=observer,
            notify=notify,
            services=services,
            state=None if state is None else State(state, is_async=False),
            init_timeout=init_timeout,
            grace=grace,
        )

    def run(self) -> None:
        """Connect, check the schema, and start to work; returns at once.

        Raises:
            SchemaError: the tables are missing or of another version, or a grant is.
            psycopg.Error: the server cannot be reached, or refuses.
            StateRequiredError: a handler asks for a state, and there is none.
            RuntimeError: the worker has been run or shut down before.
            Exception: whatever `state` raises. The worker can be run again.

        """
        self._crew.open(None)

    def shutdown(self, timeout: Duration | EllipsisType | None = ...) -> bool:
        """Claim nothing more, give back what has not started, finish what runs, return.

        After the grace period a coroutine that still runs is cancelled, and its job is
        due again immediately. A thread cannot be cancelled: its job is left to its
        lease. Both get their attempt back. It returns within the grace period and 2 s,
        whatever hangs.

        Idempotent, from any thread. From inside a handler or the observer it
        does not wait, for it would wait for itself; nor in a signal handler that
        interrupts `run`.

        Args:
            timeout: the grace period, seconds or a timedelta; the worker's `grace` by
                default. None waits for as long as it takes.

        Returns:
            Whether the worker has ended, and every job that had started has a result
            that is stored.

        """
        self._crew.stop(timeout)
        if self._crew.is_inside:
            return not self._crew.abandoned
        self._crew.join()
        return self._crew.has_finished

    def wait(self, timeout: Duration | None = None) -> bool:
        """Wait until the worker has ended, by a shutdown from elsewhere or a fault of its own.

        Args:
            timeout: seconds or a timedelta; None (the default) waits for as long as it takes.

        Returns:
            Whether it has ended.

        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        return self._crew.done in wait([self._crew.done], limit).done

    def run_until(self, event: Event) -> None:
        """Run until an event is set or the worker ends by itself; shut it down.

        For a worker beside other work in one program, in the main thread or in any
        other. An exception that interrupts it, a KeyboardInterrupt for example, shuts
        the worker down as well, and is passed on.

        Args:
            event: a threading.Event, or what waits as one.

        Raises:
            BaseException: `failure`, where the worker has ended by itself; and whatever
                `run` raises.

        """
        self.run()
        try:
            while not event.wait(_LOOK) and not self.wait(0):
                pass
        finally:
            self.shutdown()
        if self.failure is not None:
            raise self.failure

    @property
    def failure(self) -> BaseException | None:
        """Why the worker has ended by itself, or is about to; None while it works, or was asked.

        It survives an outage of the database for as long as that takes. It ends
        where its caller's event loop ends under it, and after more than 5 faults of
        its own within 10 s; with all its queues, for they end together.
        """
        return self._crew.failure

    def __enter__(self) -> Self:
        self.run()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


class AsyncWorker:
    """Runs the due jobs of queues; as Worker, with coroutine handlers on the caller's loop.

    The arguments are Worker's, with an AsyncClient. A handler that blocks the
    loop delays other coroutines, but no lease: those are extended by a thread.
    `state` may be a coroutine function too, or make an async context manager;
    it is called, entered and left on the loop.
    An async context manager.
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
        observer: Audience | None = None,
        notify: bool = True,
        services: Iterable[Service] = (),
        state: Callable[[], Any] | None = None,
        init_timeout: Duration = 10.0,
        grace: Duration | None = 30.0,
    ) -> None:
        self._crew = Crew(
            client,
            queue,
            mux,
            concurrency=concurrency,
            poll_interval=poll_interval,
            lease=lease,
            observer=observer,
            notify=notify,
            services=services,
            state=None if state is None else State(state, is_async=True),
            init_timeout=init_timeout,
            grace=grace,
        )

    async def run(self) -> None:
        """Connect, check the schema, and start to work; as Worker.run.

        Where it is cancelled meanwhile, the worker does not start, or ends.
        """
        opening = asyncio.create_task(
            asyncio.to_thread(self._crew.open, asyncio.get_running_loop())
        )
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._crew.stop(0)
            with contextlib.suppress(BaseException):  # whatever kept it from starting
                await asyncio.wait([opening], timeout=self._crew.time_left)
                await self._join()
            if opening.done() and not opening.cancelled():
                opening.exception()  # retrieved: no other code asks
            raise

    async def shutdown(
        self,
        timeout: Duration | EllipsisType | None = ...,  # noqa: ASYNC109
    ) -> bool:
        """Finish what runs and return; as Worker.shutdown."""
        self._crew.stop(timeout)
        if self._crew.is_inside:
            return not self._crew.abandoned
        await self._join()
        return self._crew.has_finished

    async def _join(self) -> None:
        crew = self._crew
        ended = asyncio.wrap_future(crew.done)
        while not ended.done() and (left := crew.time_left):
            await asyncio.wait([ended], timeout=min(left, 1.0))
        if tasks := crew.tasks:
            await asyncio.wait(tasks, timeout=min(LAST_WORDS, max(crew.time_left, 0.1)))

    async def wait(self, timeout: Duration | None = None) -> bool:  # noqa: ASYNC109
        """Wait until the worker has ended; as Worker.wait."""
        limit = None if timeout is None else seconds(timeout, "timeout")
        ended = asyncio.shield(asyncio.wrap_future(self._crew.done))
        return ended in (await asyncio.wait([ended], timeout=limit))[0]

    async def run_until(self, event: AsyncEvent) -> None:
        """Run until an event is set or the worker ends by itself; as Worker.run_until.

        Args:
            event: an asyncio.Event, or what waits as one.

        """
        await self.run()
        waiting: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
        ended: asyncio.Future[Any] = asyncio.wrap_future(self._crew.done)
        try:
            await asyncio.wait([waiting, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            await self.shutdown()
        if self.failure is not None:
            raise self.failure

    @property
    def failure(self) -> BaseException | None:
        """Why the worker has ended by itself; as Worker.failure."""
        return self._crew.failure

    async def __aenter__(self) -> Self:
        await self.run()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()
