"""Waiting for the results of jobs: all waiters of a client share one connection.

A waiter first adds itself, and then looks once by itself. From the first waiter on a thread, or a
task of the event loop, has a connection of its own. It listens, then looks for all that wait, and
goes on: after a notification for those that it names, and every half a second for all of them,
because a notification may be lost, or a pooler in between carries none. So no end falls between:
one that comes after the waiter's own look is notified, or found by a look of all. Half a second
after the last waiter the connection is closed.

A connection that is lost is opened again; only if there is none for 30 s the waiters fail.
"""

import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import orjson
import psycopg

from bgjob._checks import Duration, seconds
from bgjob._postgres import polling
from bgjob._postgres.connection import (
    AsyncConnection,
    Connection,
    ConnectionParameters,
    options,
    options_async,
)
from bgjob._sql.execute import run, run_async
from bgjob._sql.results import Outcome, listen, outcomes
from bgjob._sql.statement import Statement
from bgjob.errors import ClientClosedError, JobFailedError, UnknownResultError
from bgjob.job import JobResult

_POLL = 0.5
"""Seconds between two looks for all that wait."""

_AWAY = 30.0
"""Seconds without a connection after which the waiters fail."""

_PATIENCE = 10.0
"""Seconds without an answer after which a connection is lost."""

_PAUSE = 0.2
"""Seconds between two attempts to connect."""

_NAMED = {"fallback_application_name": "bgjob results"}
"""What the connection is called in pg_stat_activity, unless the program names its own."""

_Outcomes: TypeAlias = Statement[dict[str, Outcome]]


def result_of(id_: str, outcome: Outcome | None) -> JobResult:
    """Return what is known of a job; raise UnknownResultError if that is nothing."""
    if outcome is None:
        raise UnknownResultError(
            f"no result of job {id_!r} is kept: it was not enqueued with keep=…, its transaction "
            "is not committed, or the time for which its result was kept is over"
        )
    if outcome.until is None:
        return JobResult(id_, "pending")
    last = outcome.attempt or 0, outcome.ended_at, outcome.until
    if outcome.error is not None:
        return JobResult(id_, "failed", None, outcome.error, *last)
    value = None if outcome.value is None else orjson.loads(outcome.value)
    return JobResult(id_, "completed", value, None, *last)


def value_of(result: JobResult) -> Any:
    """Return the value of a job that has ended; raise JobFailedError if it failed."""
    if result.state == "failed":
        raise JobFailedError(result.id, result.error or "")
    return result.value


class _Waiters:
    """Who waits for which job; not thread-safe."""

    def __init__(self) -> None:
        self.by_id: dict[str, list[Any]] = {}
        self._poll_at = self._lost_at = 0.0

    def add(self, id_: str, future: Any) -> None:
        self.by_id.setdefault(id_, []).append(future)

    def remove(self, id_: str, future: Any) -> None:
        with suppress(KeyError, ValueError):
            self.by_id[id_].remove(future)
            if not self.by_id[id_]:
                del self.by_id[id_]

    def connected(self) -> None:
        self._poll_at = self._lost_at = 0.0

    def to_look_for(self, notified: Collection[str]) -> list[str]:
        """Return the ids to look for after these notifications."""
        if monotonic() >= self._poll_at:
            self._poll_at = monotonic() + _POLL
            return [*self.by_id]
        return [id_ for id_ in dict.fromkeys(notified) if id_ in self.by_id]

    def found(self, ids: Collection[str], known: Mapping[str, Outcome]) -> None:
        """Answer those whose jobs have ended, or are not known any more."""
        for id_ in ids:
            outcome = known.get(id_)
            if outcome is None or outcome.until is not None:
                for future in [*self.by_id.get(id_, ())]:
                    if not future.done():
                        future.set_result(outcome)

    def failed(self, error: BaseException) -> None:
        """Fail all."""
        for futures in [*self.by_id.values()]:
            for future in [*futures]:
                if not future.done():
                    future.set_exception(error)

    def lost(self, error: Exception) -> None:
        """Record that there is no connection; let all fail if that cannot, or does not, pass."""
        now = monotonic()
        self._lost_at = self._lost_at or now
        if not isinstance(error, psycopg.OperationalError) or now >= self._lost_at + _AWAY:
            self.failed(error)


class AsyncWaiting:
    """Waits for results.

    Args:
        ask: runs a statement on a connection of the client's.
        connection_parameters: returns how to open a connection.

    """

    def __init__(
        self,
        ask: Callable[[_Outcomes, None], Awaitable[dict[str, Outcome]]],
        connection_parameters: Callable[[], ConnectionParameters],
    ) -> None:
        self._ask = ask
        self._connection_parameters = connection_parameters
        self._waiters: WeakKeyDictionary[asyncio.AbstractEventLoop, _Waiters] = WeakKeyDictionary()
        self._tasks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[None]] = (
            WeakKeyDictionary()
        )

    async def wait(self, id_: str, timeout: Duration | None) -> Any:
        """Wait for a job's end; see AsyncClient.wait."""
        limit = None if timeout is None else seconds(timeout, "timeout")
        loop = asyncio.get_running_loop()
        end = None if limit is None else loop.time() + limit
        waiters = self._waiters.setdefault(loop, _Waiters())
        future: asyncio.Future[Outcome | None] = loop.create_future()
        waiters.add(id_, future)
        try:
            known = await self._ask(outcomes([id_]), None)
            waiters.found([id_], known)
            task = self._tasks.get(loop)
            if not future.done() and (task is None or task.done()):
                self._tasks[loop] = loop.create_task(self._look(waiters))
            async with asyncio.timeout_at(end):
                found = await future
        except TimeoutError as error:
            if limit is None:
                raise
            raise _timed_out(id_, limit) from error
        finally:
            waiters.remove(id_, future)
        return value_of(result_of(id_, found))

    async def _look(self, waiters: _Waiters) -> None:
        while waiters.by_id:
            try:
                asked = await options_async(self._connection_parameters())
                connection = await AsyncConnection.connect(
                    **{**_NAMED, **asked, "autocommit": True, "prepare_threshold": None}
                )
                async with connection:
                    connection.patience = _PATIENCE
                    await connection.execute(listen())
                    waiters.connected()
                    await self._serve(waiters, connection)
            except Exception as error:
                waiters.lost(error)
                await asyncio.sleep(_PAUSE)

    async def _serve(self, waiters: _Waiters, connection: AsyncConnection) -> None:
        notified: list[str] = []
        while waiters.by_id:
            if ids := waiters.to_look_for(notified):
                waiters.found(ids, await run_async(connection, outcomes(ids)))
            heard = connection.notifies(timeout=_POLL, stop_after=1)
            notified = [notice.payload async for notice in heard]

    async def close(self) -> None:
        """Fail all waiters of this event loop."""
        loop = asyncio.get_running_loop()
        if waiters := self._waiters.get(loop):
            waiters.failed(_closed())
        if task := self._tasks.pop(loop, None):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class Waiting:
    """Waits for results. Thread-safe.

    Args:
        ask: runs a statement on a connection of the client's.
        connection_parameters: returns how to open a connection.

    """

    def __init__(
        self,
        ask: Callable[[_Outcomes, None], dict[str, Outcome]],
        connection_parameters: Callable[[], ConnectionParameters],
    ) -> None:
        self._ask = ask
        self._connection_parameters = connection_parameters
        self._is_closed = False
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._waiters = _Waiters()
        self._thread: threading.Thread | None = None
        self._end: socket.socket | None = None
        """Wakes the thread when it is closed."""

    def wait(self, id_: str, timeout: Duration | None) -> Any:
        """Wait for a job's end; see Client.wait."""
        limit = None if timeout is None else seconds(timeout, "timeout")
        end = None if limit is None else monotonic() + limit
        if self._pid != os.getpid():
            self._begin()  # the threads that wait are those of the parent
        future: Future[Outcome | None] = Future()
        with self._lock:
            self._waiters.add(id_, future)
        try:
            known = self._ask(outcomes([id_]), None)
            with self._lock:
                self._waiters.found([id_], known)
                if not future.done() and self._is_closed:
                    raise _closed()
                if not future.done() and self._thread is None:
                    self._end, ends = socket.socketpair()
                    self._thread = threading.Thread(
                        target=self._look, args=(ends,), name="bgjob-results", daemon=True
                    )
                    self._thread.start()
            found = future.result(None if end is None else max(end - monotonic(), 0.0))
        except TimeoutError as error:
            if limit is None:
                raise
            raise _timed_out(id_, limit) from error
        finally:
            with self._lock:
                self._waiters.remove(id_, future)
        return value_of(result_of(id_, found))

    def _look(self, ends: socket.socket) -> None:
        waiters = self._waiters
        while not self._has_ended(waiters):
            try:
                asked = options(self._connection_parameters())
                connection = Connection.connect(
                    **{**_NAMED, **asked, "autocommit": True, "prepare_threshold": None}
                )
                with connection:
                    connection.patience = _PATIENCE
                    connection.execute(listen())
                    waiters.connected()
                    self._serve(waiters, connection, ends)
            except Exception as error:
                with self._lock:
                    waiters.lost(error)
                sleep(_PAUSE)
        ends.close()

    def _has_ended(self, waiters: _Waiters) -> bool:
        """Whether there is no waiter: the next one starts another thread."""
        with self._lock:
            if not waiters.by_id and self._end is not None:
                self._end.close()
                self._end = self._thread = None
            return not waiters.by_id

    def _serve(self, waiters: _Waiters, connection: Connection, ends: socket.socket) -> None:
        notified: list[str] = []
        poll = polling.poll()
        poll.register(connection.fileno(), polling.READ)
        poll.register(ends.fileno(), polling.READ)
        while True:
            with self._lock:
                ids = waiters.to_look_for(notified)
                if not waiters.by_id:
                    return
            if ids:
                known = run(connection, outcomes(ids))
                with self._lock:
                    waiters.found(ids, known)
            notified = _notified(connection)
            if not notified:
                poll.poll(_POLL * 1000)
                notified = _notified(connection)

    def close(self) -> None:
        """Fail all waiters."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_closed = True
            self._waiters.failed(_closed())
            thread = self._thread
            if self._end is not None:
                self._end.close()
        if thread is not None:
            thread.join(_PAUSE + _POLL)


def _notified(connection: Connection) -> list[str]:
    """Return what has been notified, without waiting for more."""
    return [notice.payload for notice in connection.notifies(timeout=0.001)]


def _timed_out(id_: str, limit: float) -> TimeoutError:
    return TimeoutError(f"job {id_!r} has not ended within {limit:g} s; it goes on")


def _closed() -> ClientClosedError:
    return ClientClosedError("the client was closed while somebody waited for a result")
