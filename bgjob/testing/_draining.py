"""Runs the due jobs of a queue for tests, with the library's own claims and settlements.

The logic is one generator of steps, with a sync and an async driver.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Generator
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import wraps
from secrets import randbits
from typing import Any, Literal, NamedTuple, TypeAlias

import psycopg
from psycopg import AsyncConnection, Connection
from psycopg.pq import TransactionStatus

from bgjob._checks import Duration, seconds
from bgjob._engine.outcome import Committed, CommitUnknown, Fenced, Release
from bgjob._handlers.route import Awaiting
from bgjob._postgres.connection import ConnectionParameters
from bgjob._postgres.fork import ForkGuard
from bgjob._running.transaction import (
    Ending,
    NotBegun,
    Transactions,
    acquisition,
    conclusion,
    has_key,
    routed,
    settlement,
)
from bgjob._sql.claims import claim_now
from bgjob._sql.execute import run, run_async
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob._sql.views import let_pass
from bgjob.errors import BgjobError, LeaseLostError, QueueRequiredError
from bgjob.job import Job, check_name
from bgjob.mux import Mux, Route
from bgjob.result import Complete, MoveToDlq, Reschedule, Result, Retry
from bgjob.testing._source import AsyncSource, Source, connected, connected_async

OnError = Literal["raise", "store"]

_LEASE = 300.0  # seconds, as for Client.do; no worker claims a job that the test has not committed

_ENDLESS = 10_000
"""The runs after which a drain without a limit fails, because it would never end."""


class Ran(NamedTuple):
    """A job that ran, and its stored result."""

    job: Job
    result: Result


class _Run(NamedTuple):
    """A step that runs a job's handler; the answer is how it ended."""

    route: Route
    claimed: Claimed


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


_Steps: TypeAlias = Generator[Statement[Any] | _Run, Any, _Drained]


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
    and dead-letter table. Plain handlers run on the caller's thread, coroutine handlers on
    one event loop. Timeouts are not enforced.

    Args:
        source: the test's own connection, a connection string or a Client. On
            a connection everything happens in its transaction, which is neither
            committed nor rolled back: uncommitted jobs run too. A transactional
            handler receives this connection, inside a savepoint. On a Client or
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
            the error of an unknown type, as soon as it is stored, so that the
            test shows its traceback. "store" continues, as a worker does. Retry
            and MoveToDlq that a handler returned are never raised.

    Returns:
        The jobs that ran, in order, each with its stored result.
            and MoveToDlq that a handler returned are never raised.

    Raises:
        BgjobError: 10,000 jobs ran and there was no limit.
        LeaseLostError: a handler outlived the lease of 300 s, or its row was removed.
        TypeError: a coroutine handler needs the test's transaction: use adrain.
        RuntimeError: the mux has coroutine handlers, and a loop runs in this thread.
        KeyboardInterrupt, SystemExit: the handler's, whatever `on_error` says.
        psycopg.Error: the database's. If a transactional handler got no connection, its job
            is due again, and its attempt is not counted.

    """
    __tracebackhide__ = True
    plan = _planned(queue, mux, limit, within, on_error)
    if mux.has_coroutines and _runs_a_loop():
        raise RuntimeError("drain() cannot run coroutine handlers inside a loop: use adrain()")
    steps = _steps(plan)
    runner = asyncio.Runner()  # makes its loop for the first coroutine, if any
    with connected(source) as (conn, connection_parameters), closing(runner), closing(steps):
        try:
            step = next(steps)
            while True:
                try:
                    if isinstance(step, _Run):
                        # Each handler runs in its own context, not the test's.
                        answer: object = copy_context().run(
                            _run, step, conn, connection_parameters, runner
                        )
                    else:
                        answer = run(conn, step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            drained: _Drained = stop.value
    if drained.error is not None:
        raise drained.error
    return drained.ran


async def adrain(
    source: AsyncSource,
    queue: str,
    mux: Mux,
    *,
    limit: int | None = None,
    within: Duration = 0.0,
    on_error: OnError = "raise",
) -> list[Ran]:
    """Run the due jobs of a queue. Async variant of drain.

    The source is an AsyncConnection, an AsyncClient or a connection string. Coroutine
    handlers are awaited here, plain ones run on a thread.

    Raises:
        TypeError: a plain handler needs the test's transaction: use drain.

    """
    __tracebackhide__ = True
    plan = _planned(queue, mux, limit, within, on_error)
    steps = _steps(plan)
    async with connected_async(source) as (conn, connection_parameters):
        with closing(steps):
            try:
                step = next(steps)
                while True:
                    try:
                        if isinstance(step, _Run):
                            answer: object = await asyncio.create_task(
                                _run_async(step, conn, connection_parameters)
                            )
                        else:
                            answer = await run_async(conn, step)
                    except BaseException as error:
                        step = steps.throw(error)
                    else:
                        step = steps.send(answer)
            except StopIteration as stop:
                drained: _Drained = stop.value
    if drained.error is not None:
        raise drained.error
    return drained.ran


# -- steps ----------------------------------------------------------------------------


def _planned(queue: str, mux: Mux, limit: int | None, within: Duration, on_error: OnError) -> _Plan:
    if not queue:
        raise QueueRequiredError("queue is required: name the queue to drain")
    check_name("queue", queue)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None, not {limit!r}")
    if on_error not in ("raise", "store"):
        raise ValueError(f"on_error must be 'raise' or 'store', not {on_error!r}")
    return _Plan(queue, mux, limit, seconds(within, "within"), on_error)


def _steps(plan: _Plan) -> _Steps:
    ran: list[Ran] = []
    left = plan.within
    while len(ran) != plan.limit:
        token = randbits(63)
        jobs = yield claim_now(plan.queue, lease=_LEASE, token=token)
        if not jobs:
            if not left:
                break
            left -= yield let_pass(plan.queue, left)
            continue
        [job] = jobs
        if plan.limit is None and len(ran) == _ENDLESS:
            yield from _all(conclusion(Claimed(job, token), Release()))
            raise BgjobError(
                f"{_ENDLESS} jobs ran and another is due, {job.id!r} of type {job.type!r}: does "
                "it enqueue or reschedule itself without a delay? Give drain() a limit"
            )
        claimed, route = copy_context().run(routed, Claimed(job, token), plan.mux)
        if claimed.job.exclusive is not None:
            granted = has_key((yield from _all(acquisition(claimed))))
            if granted is None:
                yield from _all(settlement(claimed, Release()))
            if not granted:
                continue  # another job holds its key, and it waits
        result, error = yield from _one(route, claimed)
        ran.append(Ran(job, result))
        if error is not None and (plan.on_error == "raise" or not isinstance(error, Exception)):
            error.add_note(f"of job {job.id!r} of type {job.type!r}, attempt {job.attempt}")
            return _Drained(ran, error)
    return _Drained(ran, None)


def _all(statements: list[Statement[Any]]) -> Generator[Statement[Any], Any, list[Any]]:
    answers = []
    for statement in statements:
        answers.append((yield statement))  # noqa: PERF401 (a comprehension cannot yield)
    return answers


def _one(
    route: Route | Retry | MoveToDlq, claimed: Claimed
) -> Generator[Statement[Any] | _Run, Any, tuple[Result, BaseException | None]]:
    """Run one job and store its result; return it, and an error that the handler did not return."""
    job, answer = claimed.job, _Answer()
    ending: Ending
    if not isinstance(route, Route):
        ending = route
    else:
        ending = yield _Run(_overheard(route, answer), claimed)
    try:
        answers = yield from _all(conclusion(claimed, ending))
    except psycopg.errors.InFailedSqlTransaction:
        # An ordinary handler made the test's transaction fail: raise its error.
        if (error := _not_returned(ending, answer)) is not None:
            raise error from None
        raise
    if isinstance(ending, Committed):
        return ending.result, None
    if isinstance(ending, NotBegun):
        raise ending.error
    held = any(answers[:1])
    if isinstance(ending, CommitUnknown):
        ending = ending.otherwise if held else ending.result
    elif isinstance(ending, Fenced) or not held:
        raise LeaseLostError(
            f"job {job.id!r} of type {job.type!r} was gone or no longer held when its handler "
            f"had ended: it took over {_LEASE:g} s, or its row was changed meanwhile"
        )
    return ending, _not_returned(ending, answer)


def _overheard(route: Route, answer: _Answer) -> Route:
    """Return a route whose handler records its return value in `answer`."""
    handler = route.handler
    if route.is_coroutine:

        @wraps(handler)
        async def coroutine(*args: Any) -> object:
            __tracebackhide__ = True
            answer.value = await handler(*args)
            return answer.value

        return replace(route, handler=coroutine, policy=replace(route.policy, timeout=None))

    @wraps(handler)
    def plain(*args: Any) -> object:
        __tracebackhide__ = True
        value = handler(*args)
        if inspect.isawaitable(value):
            return heard(value)
        answer.value = value
        return value

    async def heard(value: Awaitable[object]) -> object:
        answer.value = await value
        return answer.value

    return replace(route, handler=plain)


def _not_returned(ending: object, answer: _Answer) -> BaseException | None:
    error = ending.error if isinstance(ending, Retry | MoveToDlq) else None
    returned = answer.value.error if isinstance(answer.value, Retry | MoveToDlq) else None
    return error if isinstance(error, BaseException) and error is not returned else None


# -- sync driver ----------------------------------------------------------------------


def _run(
    step: _Run,
    conn: Connection[Any],
    connection_parameters: ConnectionParameters | None,
    runner: asyncio.Runner,
) -> Ending:
    route, claimed = step
    if not route.is_transactional:
        ending = Awaiting(route) if route.is_coroutine else route.run(claimed.job)
        if isinstance(ending, Awaiting):
            return runner.run(_awaited(ending.route, claimed.job), context=copy_context())
        return ending
    if connection_parameters is not None:
        with closing(Transactions(connection_parameters, ForkGuard())) as transactions:
            if route.is_coroutine:
                return runner.run(transactions.run_async(route, claimed), context=copy_context())
            return transactions.run(route, claimed)
    if route.is_coroutine:
        raise _wrong_colour(route, "a coroutine function and needs an AsyncConnection: use adrain")
    job, ended, fenced = claimed.job, False, False
    try:
        with conn.transaction():
            returned = route.handler(job, conn)
            ended = _is_over(conn)
            result = route.judge(job, returned)
            if ended or not _commits(returned):
                raise psycopg.Rollback
            answers = [run(conn, statement) for statement in settlement(claimed, result)]
            if answers[0]:
                return Committed(result)
            fenced = True
            raise psycopg.Rollback
    except BaseException as error:
        result = route.failed(job, error)
    if ended:
        return MoveToDlq(route.transaction_ended())
    return Fenced() if fenced else result


# -- async driver -------------------------------------------------------------------------


async def _run_async(
    step: _Run, conn: AsyncConnection[Any], connection_parameters: ConnectionParameters | None
) -> Ending:
    route, claimed = step
    if not route.is_transactional:
        if not route.is_coroutine:
            ending = await asyncio.to_thread(route.run, claimed.job)
            if not isinstance(ending, Awaiting):
                return ending
            route = ending.route
        return await _awaited(route, claimed.job)
    if connection_parameters is not None:
        with closing(Transactions(connection_parameters, ForkGuard())) as transactions:
            if route.is_coroutine:
                return await transactions.run_async(route, claimed)
            return await asyncio.to_thread(transactions.run, route, claimed)
    if not route.is_coroutine:
        raise _wrong_colour(route, "a plain function and needs a psycopg.Connection: use drain")
    job, ended, fenced = claimed.job, False, False
    try:
        async with conn.transaction():
            returned = await route.handler(job, conn)
            ended = _is_over(conn)
            result = route.judge(job, returned)
            if ended or not _commits(returned):
                raise psycopg.Rollback
            answers = [await run_async(conn, s) for s in settlement(claimed, result)]
            if answers[0]:
                return Committed(result)
            fenced = True
            raise psycopg.Rollback
    except BaseException as error:
        result = route.failed(job, error)
    if ended:
        return MoveToDlq(route.transaction_ended())
    return Fenced() if fenced else result


async def _awaited(route: Route, job: Job) -> Result:
    try:
        return route.judge(job, await route.handler(job))
    except BaseException as error:
        return route.failed(job, error)


# -- shared by both drivers -----------------------------------------------------------------


def _commits(returned: object) -> bool:
    return returned is None or isinstance(returned, Complete | Reschedule | MoveToDlq)


def _is_over(conn: psycopg.BaseConnection[Any]) -> bool:
    return conn.info.transaction_status == TransactionStatus.IDLE


def _wrong_colour(route: Route, why: str) -> TypeError:
    return TypeError(
        f"the transactional handler of job type {route.policy.job_type!r} is {why}(), or give a "
        "connection string"
    )


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
