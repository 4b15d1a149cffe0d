"""Workers: they run the jobs of queues until they are shut down."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from typing import Any, Self

from bgjob._audience import Audience
from bgjob._control import LAST_WORDS
from bgjob._crew import Crew, Queues
from bgjob._duration import Duration, seconds
from bgjob._state import State
from bgjob.client import AsyncClient, Client
from bgjob.mux import Mux
from bgjob.service import Service


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
            threads, coroutine handlers on one event loop for each queue, both
            within this bound.
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

    def shutdown(self, timeout: Duration | None = 30.0) -> bool:
        """Claim nothing more, give back what has not started, finish what runs, return.

        Idempotent, from any thread. From inside a handler or the observer it
        does not wait, for it would wait for itself.

        Args:
            timeout: the grace period, seconds or a timedelta, after which what
                still runs is left to its lease; 30 s by default, what most
                supervisors grant. None waits for as long as it takes.

        Returns:
            Whether every job that had started is settled.

        """
        self._crew.stop(timeout)
        if not self._crew.is_inside:
            self._crew.done.result()
        return not self._crew.abandoned

    def wait(self, timeout: Duration | None = None) -> bool:
        """Wait until the worker has ended, by a shutdown from elsewhere or a fault of its own.

        Args:
            timeout: seconds or a timedelta; None (the default) waits for as long as it takes.

        Returns:
            Whether it has ended.

        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        return self._crew.done in wait([self._crew.done], limit).done

    @property
    def failure(self) -> BaseException | None:
        """Why the worker has ended by itself, or is about to; None while it works, or was asked.

        It survives an outage of the database for as long as that takes. It ends
        where its event loop was closed under it, and after more than 5 faults of
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
        )

    async def run(self) -> None:
        """Connect, check the schema, and start to work; as Worker.run."""
        await asyncio.to_thread(self._crew.open, asyncio.get_running_loop())

    async def shutdown(self, timeout: Duration | None = 30.0) -> bool:  # noqa: ASYNC109
        """Finish what runs and return; as Worker.shutdown.

        A coroutine that still runs after the grace period is cancelled.
        """
        self._crew.stop(timeout)
        if not self._crew.is_inside:
            await asyncio.shield(asyncio.wrap_future(self._crew.done))
            if tasks := self._crew.tasks:
                await asyncio.wait(tasks, timeout=LAST_WORDS)
        return not self._crew.abandoned

    async def wait(self, timeout: Duration | None = None) -> bool:  # noqa: ASYNC109
        """Wait until the worker has ended; as Worker.wait."""
        limit = None if timeout is None else seconds(timeout, "timeout")
        ended = asyncio.shield(asyncio.wrap_future(self._crew.done))
        return ended in (await asyncio.wait([ended], timeout=limit))[0]

    @property
    def failure(self) -> BaseException | None:
        """Why the worker has ended by itself; as Worker.failure."""
        return self._crew.failure

    async def __aenter__(self) -> Self:
        await self.run()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()
