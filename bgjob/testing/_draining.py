"""Runs the due jobs of a queue for tests, with the library's own claims and settlements.

The logic is one generator of steps, with a sync and an async driver. The module has over 400
lines because both drivers are here; only the async one is written.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, NamedTuple

import psycopg
from psycopg import AsyncConnection, Connection

from bgjob._checks import Duration, seconds
from bgjob._handlers.unknown import unknown_type
from bgjob._postgres.connection import ConnectionParameters
from bgjob._postgres.event_loop import new_event_loop
from bgjob._running.checkpoints import ended, lost
from bgjob._running.drive import drive, drive_async
from bgjob._running.ending import Ending, NotBegun
from bgjob._running.one_job import Run, Step, Steps, ask, hold, run_in_task, run_on_thread, settle
from bgjob._running.sessions import is_over
from bgjob._running.transaction_steps import (
    Call,
    End,
    Finish,
    Settle,
    Settled,
    TransactionStep,
    in_transaction,
)
from bgjob._sql.claims import claim_now
from bgjob._sql.execute import run, run_async
from bgjob._sql.settlements import Claimed
from bgjob._sql.transactions import checkpoint, save_checkpoint
from bgjob._sql.views import let_pass
from bgjob.checkpoint import AsyncSaving, Saving
from bgjob.errors import BgjobError, LeaseLostError, QueueRequiredError
from bgjob.job import Job, check_name
from bgjob.mux import Mux, Route
from bgjob.result import MoveToDlq, Reschedule, Result, Retry
from bgjob.testing._source import AsyncSource, Source, connected, connected_async

OnError = Literal["raise", "store"]

_LEASE = 300.0  # seconds, as for Client.do; no worker claims a job that the test has not committed

_ENDLESS = 10_000
"""The runs after which a drain without a limit fails, because it would never end."""


class Ran(NamedTuple):
    """A job that ran, and its stored result."""

    job: Job
    result: Result


@dataclass(slots=True)
class _Answer:
    """The value that a handler returned."""

    value: object = None


class _Plan(NamedTuple):
    """The options of a drain, checked."""

    queue: str
    mux: Mux
    limit: int | None
    within: float
    on_error: OnError


class _Drained(NamedTuple):
    ran: list[Ran]
    error: BaseException | None
    """The exception to raise in the test."""


# -- async -----------------------------------------------------------------------------


async def adrain(
    source: AsyncSource,
    queue: str,
    mux: Mux,
    *,
    limit: int | None = None,
    within: Duration = 0.0,
    on_error: OnError = "raise",
) -> list[Ran]:
    """Run the due jobs of a queue, one after the other, until none is due.

    Jobs run as by a worker with a concurrency of 1: by priority and due time, including
    the jobs that handlers enqueue meanwhile, and with the same results, attempts, backoff
    and dead-letter table. The drain runs coroutine handlers on the caller's event loop, and
    plain ones on another thread. Timeouts are not enforced.

    Args:
        source: the test's own connection, a connection string or an AsyncClient. On
            a connection everything happens in its transaction, which is neither
            committed nor rolled back: uncommitted jobs run too. A transactional
            handler receives this connection, inside a savepoint. On a client or
            a connection string each step is committed, as in a worker.
        queue: the queue.
        mux: the handlers.
        limit: runs after which to return; None (the default) runs until no job
            is due.
        within: seconds or a timedelta to skip without waiting: jobs that become
            due meanwhile run too, in order. The due times of the queue's
            waiting jobs are moved back for that. 0 by default: delayed jobs
            do not run.
        on_error: "raise" (the default) raises the exception of a handler, or
            the error of an unknown type (also if it is put back), as soon as
            it is stored, so that the test shows its traceback. "store" continues,
            as a worker does. Retry and MoveToDlq that a handler returned are never
            raised.

    Returns:
        The jobs that ran, in order, each with its stored result.

    Raises:
        BgjobError: 10,000 jobs ran and there was no limit.
        LeaseLostError: a handler outlived the lease of 300 s, or its row was removed.
        TypeError: the test's own connection is of another colour than a transactional
            handler.
        RuntimeError: the mux of `drain` has coroutine handlers, and a loop runs in this
            thread.
        KeyboardInterrupt, SystemExit: the handler's, whatever `on_error` says.
        psycopg.Error: the database's. If a transactional handler got no connection, its job
            is due again, and its attempt is not counted.

    """
    __tracebackhide__ = True
    plan = _planned(queue, mux, limit, within, on_error)
    async with (
        connected_async(source) as (conn, connection_parameters),
        _handlers_async(mux, conn, connection_parameters) as handled,
    ):

        async def take(step: Step) -> object:
            __tracebackhide__ = True
            if isinstance(step, Run):
                return await handled(step)
            return [await run_async(conn, statement) for statement in step]

        drained = await drive_async(_steps(plan), take)
    if drained.error is not None:
        raise drained.error
    return drained.ran


async def _run_within_async(route: Route, claimed: Claimed, conn: AsyncConnection[Any]) -> Ending:
    """Run a transactional handler in the test's transaction, inside a savepoint."""
    savepoint, token, has_ended = AsyncExitStack(), str(claimed.token), False

    async def take(step: TransactionStep) -> object:
        __tracebackhide__ = True
        nonlocal has_ended
        match step:
            case Call():
                await savepoint.enter_async_context(conn.transaction())
                returned = await route.handler(claimed.job, conn)
                has_ended = is_over(conn)
                return returned
            case Finish():
                return False  # its transaction is not to be committed
            case Settle(statements):
                if has_ended:
                    return None
                settled = [id_ for each in statements for id_ in await run_async(conn, each)]
                return Settled(token, settled)
            case End.COMMIT:
                await savepoint.aclose()
            case End.ROLLBACK:
                with suppress(psycopg.Error):
                    await savepoint.__aexit__(psycopg.Rollback, psycopg.Rollback(), None)
        return token if has_ended else None

    return await drive_async(in_transaction(route, claimed), take)


class _AsyncGivenStore:
    """A job's checkpoint, in the transaction of the test's own connection."""

    is_stopping = False

    def __init__(self, conn: AsyncConnection[Any], claimed: Claimed, lease: float) -> None:
        self._conn = conn
        self._claimed = claimed
        self._lease = lease
        self.data: bytes | None = None

    async def load(self) -> None:
        [self.data] = await run_async(self._conn, checkpoint(self._claimed))

    async def save(self, data: bytes) -> None:
        await self._store(data, "nothing was saved")

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSaving]:
        saving = AsyncSaving(self._conn)
        async with self._conn.transaction():
            yield saving
            if is_over(self._conn):
                raise ended(self._claimed)
            await self._store(saving.data, "the transaction was rolled back")

    async def end(self) -> None:
        pass

    async def _store(self, data: bytes | None, otherwise: str) -> None:
        statement = save_checkpoint(self._claimed, data, lease=self._lease)
        if not await run_async(self._conn, statement):
            raise lost(self._claimed, otherwise)
        self.data = self.data if data is None else data


async def _hold_async(route: Route, claimed: Claimed, conn: AsyncConnection[Any]) -> Route:
    """Return the route of a run whose checkpoint is kept on the test's connection."""
    store = _AsyncGivenStore(conn, claimed, _LEASE)
    await store.load()
    return route.holding(store)


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


def drain(
    source: Source,
    queue: str,
    mux: Mux,
    *,
    limit: int | None = None,
    within: Duration = 0.0,
    on_error: OnError = "raise",
) -> list[Ran]:
    """Run the due jobs of a queue, one after the other, until none is due.

    Jobs run as by a worker with a concurrency of 1: by priority and due time, including
    the jobs that handlers enqueue meanwhile, and with the same results, attempts, backoff
    and dead-letter table. The drain runs coroutine handlers on an event loop of its own, and
    plain ones on the calling thread. Timeouts are not enforced.

    Args:
        source: the test's own connection, a connection string or a Client. On
            a connection everything happens in its transaction, which is neither
            committed nor rolled back: uncommitted jobs run too. A transactional
            handler receives this connection, inside a savepoint. On a client or
            a connection string each step is committed, as in a worker.
        queue: the queue.
        mux: the handlers.
        limit: runs after which to return; None (the default) runs until no job
            is due.
        within: seconds or a timedelta to skip without waiting: jobs that become
            due meanwhile run too, in order. The due times of the queue's
            waiting jobs are moved back for that. 0 by default: delayed jobs
            do not run.
        on_error: "raise" (the default) raises the exception of a handler, or
            the error of an unknown type (also if it is put back), as soon as
            it is stored, so that the test shows its traceback. "store" continues,
            as a worker does. Retry and MoveToDlq that a handler returned are never
            raised.

    Returns:
        The jobs that ran, in order, each with its stored result.

    Raises:
        BgjobError: 10,000 jobs ran and there was no limit.
        LeaseLostError: a handler outlived the lease of 300 s, or its row was removed.
        TypeError: the test's own connection is of another colour than a transactional
            handler.
        RuntimeError: the mux of `drain` has coroutine handlers, and a loop runs in this
            thread.
        KeyboardInterrupt, SystemExit: the handler's, whatever `on_error` says.
        psycopg.Error: the database's. If a transactional handler got no connection, its job
            is due again, and its attempt is not counted.

    """
    __tracebackhide__ = True
    plan = _planned(queue, mux, limit, within, on_error)
    with (
        connected(source) as (conn, connection_parameters),
        _handlers(mux, conn, connection_parameters) as handled,
    ):

        def take(step: Step) -> object:
            __tracebackhide__ = True
            if isinstance(step, Run):
                return handled(step)
            return [run(conn, statement) for statement in step]

        drained = drive(_steps(plan), take)
    if drained.error is not None:
        raise drained.error
    return drained.ran


def _run_within(route: Route, claimed: Claimed, conn: Connection[Any]) -> Ending:
    """Run a transactional handler in the test's transaction, inside a savepoint."""
    savepoint, token, has_ended = ExitStack(), str(claimed.token), False

    def take(step: TransactionStep) -> object:
        __tracebackhide__ = True
        nonlocal has_ended
        match step:
            case Call():
                savepoint.enter_context(conn.transaction())
                returned = route.handler(claimed.job, conn)
                has_ended = is_over(conn)
                return returned
            case Finish():
                return False  # its transaction is not to be committed
            case Settle(statements):
                if has_ended:
                    return None
                settled = [id_ for each in statements for id_ in run(conn, each)]
                return Settled(token, settled)
            case End.COMMIT:
                savepoint.close()
            case End.ROLLBACK:
                with suppress(psycopg.Error):
                    savepoint.__exit__(psycopg.Rollback, psycopg.Rollback(), None)
        return token if has_ended else None

    return drive(in_transaction(route, claimed), take)


class _GivenStore:
    """A job's checkpoint, in the transaction of the test's own connection."""

    is_stopping = False

    def __init__(self, conn: Connection[Any], claimed: Claimed, lease: float) -> None:
        self._conn = conn
        self._claimed = claimed
        self._lease = lease
        self.data: bytes | None = None

    def load(self) -> None:
        [self.data] = run(self._conn, checkpoint(self._claimed))

    def save(self, data: bytes) -> None:
        self._store(data, "nothing was saved")

    @contextmanager
    def transaction(self) -> Iterator[Saving]:
        saving = Saving(self._conn)
        with self._conn.transaction():
            yield saving
            if is_over(self._conn):
                raise ended(self._claimed)
            self._store(saving.data, "the transaction was rolled back")

    def end(self) -> None:
        pass

    def _store(self, data: bytes | None, otherwise: str) -> None:
        statement = save_checkpoint(self._claimed, data, lease=self._lease)
        if not run(self._conn, statement):
            raise lost(self._claimed, otherwise)
        self.data = self.data if data is None else data


def _hold(route: Route, claimed: Claimed, conn: Connection[Any]) -> Route:
    """Return the route of a run whose checkpoint is kept on the test's connection."""
    store = _GivenStore(conn, claimed, _LEASE)
    store.load()
    return route.holding(store)


# -- both colours ----------------------------------------------------------------------


def _planned(queue: str, mux: Mux, limit: int | None, within: Duration, on_error: OnError) -> _Plan:
    if not queue:
        raise QueueRequiredError("queue is required: name the queue to drain")
    check_name("queue", queue)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None, not {limit!r}")
    if on_error not in ("raise", "store"):
        raise ValueError(f"on_error must be 'raise' or 'store', not {on_error!r}")
    return _Plan(queue, mux, limit, seconds(within, "within"), on_error)


def _steps(plan: _Plan) -> Steps[_Drained]:
    ran: list[Ran] = []
    left = plan.within
    while len(ran) != plan.limit:
        step = yield from hold(plan.queue, plan.mux, _LEASE, claim_now, frees_keys=False)
        if step is None:
            if not left:
                break
            left -= yield from ask(let_pass(plan.queue, left))
            continue
        job = step.claimed.job
        if plan.limit is None and len(ran) == _ENDLESS:
            endless = BgjobError(
                f"{_ENDLESS} jobs ran and another is due, {job.id!r} of type {job.type!r}: does "
                "it enqueue or reschedule itself without a delay? Give drain() a limit"
            )
            yield from settle(step, NotBegun(endless))
            raise endless
        answer = _Answer()
        ending = yield _overheard(step, answer)
        try:
            ended = yield from settle(step, ending)
        except psycopg.errors.InFailedSqlTransaction:
            # An ordinary handler made the test's transaction fail: raise its error.
            if (error := _not_returned(ending, answer)) is not None:
                raise error from None
            raise
        match ended.stored:
            case None:
                raise LeaseLostError(
                    f"job {job.id!r} of type {job.type!r} was gone or no longer held when "
                    f"its handler had ended: it took over {_LEASE:g} s, or its row was changed "
                    "meanwhile"
                )
            case NotBegun(error):
                raise error
            case result:
                ran.append(Ran(job, result))
        error = _not_returned(result, answer)
        if isinstance(step.route, Reschedule):  # in a test its handler has been forgotten
            error = unknown_type(job.type)
        if error is not None and (plan.on_error == "raise" or not isinstance(error, Exception)):
            error.add_note(f"of job {job.id!r} of type {job.type!r}, attempt {job.attempt}")
            return _Drained(ran, error)
    return _Drained(ran, None)


def _overheard(step: Run, answer: _Answer) -> Run:
    """Return a step whose handler has no timeout, and records its return value in `answer`."""
    route = step.route
    if not isinstance(route, Route):
        return step
    handler = route.handler

    async def awaited(value: Awaitable[object]) -> object:
        __tracebackhide__ = True
        answer.value = await value
        return answer.value

    @wraps(handler)
    def heard(*args: Any) -> object:
        __tracebackhide__ = True
        answer.value = value = handler(*args)
        return awaited(value) if inspect.isawaitable(value) else value

    policy = route.policy
    if policy.timeout is not None:
        policy = replace(policy, timeout=None)
    return step._replace(route=replace(route, handler=heard, policy=policy))


def _not_returned(ending: object, answer: _Answer) -> BaseException | None:
    error = ending.error if isinstance(ending, Retry | MoveToDlq) else None
    returned = answer.value.error if isinstance(answer.value, Retry | MoveToDlq) else None
    return error if isinstance(error, BaseException) and error is not returned else None


# -- running a handler ----------------------------------------------------------------


@contextmanager
def _handlers(
    mux: Mux, conn: Connection[Any], connection_parameters: ConnectionParameters | None
) -> Iterator[Callable[[Run], Ending]]:
    """Yield what runs a handler, in a context of its own and not the test's."""
    if mux.has_coroutines and _runs_a_loop():
        raise RuntimeError(
            "drain() cannot run coroutine handlers while an event loop runs in its thread, as in "
            "a coroutine or a notebook: use adrain(), with await"
        )
    with closing(
        asyncio.Runner(loop_factory=new_event_loop)
    ) as runner:  # makes its loop for the first coroutine, if any
        yield lambda step: copy_context().run(_run, step, conn, connection_parameters, runner)


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@asynccontextmanager
async def _handlers_async(
    _: Mux, conn: AsyncConnection[Any], connection_parameters: ConnectionParameters | None
) -> AsyncIterator[Callable[[Run], Awaitable[Ending]]]:
    yield lambda step: asyncio.create_task(_run_async(step, conn, connection_parameters))


def _run(
    step: Run,
    conn: Connection[Any],
    connection_parameters: ConnectionParameters | None,
    runner: asyncio.Runner,
) -> Ending:
    claimed, route = step.claimed, step.route
    if isinstance(route, Route) and route.needs_session and connection_parameters is None:
        if route.is_coroutine:
            raise _wrong_colour(
                route, "a coroutine function and needs an AsyncConnection: use adrain"
            )
        if route.is_transactional:
            return _run_within(route, claimed, conn)
        step = step._replace(route=_hold(route, claimed, conn))
    return run_on_thread(
        step,
        lambda: connection_parameters or _UNUSED,
        lambda coroutine: runner.run(coroutine, context=copy_context()),
    )


async def _run_async(
    step: Run, conn: AsyncConnection[Any], connection_parameters: ConnectionParameters | None
) -> Ending:
    claimed, route = step.claimed, step.route
    if isinstance(route, Route) and route.needs_session and connection_parameters is None:
        if not route.is_coroutine:
            raise _wrong_colour(route, "a plain function and needs a psycopg.Connection: use drain")
        if route.is_transactional:
            return await _run_within_async(route, claimed, conn)
        step = step._replace(route=await _hold_async(route, claimed, conn))
    return await run_in_task(step, lambda: connection_parameters or _UNUSED, asyncio.to_thread)


_UNUSED: ConnectionParameters = ("", {})
"""Only a handler with a transaction or a checkpoint needs connection parameters."""


def _wrong_colour(route: Route, why: str) -> TypeError:
    return TypeError(
        f"the handler of job type {route.policy.job_type!r}, which has a "
        f"{'transaction' if route.is_transactional else 'checkpoint'}, is {why}(), or give a "
        "connection string"
    )
