"""Enqueues that meet share a round trip and a commit.

While one insert of a client is under way, those that other threads or tasks ask for wait
together, and the next insert writes them all:

    alone      no insert is under way: it is sent immediately, as if nothing was shared
    waiting    for the end of the newest insert, and no longer than `_SLOW`
    together   written with all that waited, by a thread of theirs, or by a task of its own, so
               that no cancellation reaches the others
    apart      the server refused the insert and nothing was written: each is sent alone, so that
               an error concerns only its own job

Each caller gets the answer that it would have got alone. After a lost connection all of an
insert get the error: their jobs may or may not have been written.

Only jobs with generated ids are shared. An insert with an id of the program's may wait for
another transaction that has the id, and would hold up its neighbours; if that transaction is
one of the same program and waits for a neighbour, forever.

Measured with benchmarks/meeting.py. What was tried, without gain on two processors: two inserts
at a time, each of half of those that wait; threads that wake each other in turn, instead of all at
once by the one that wrote.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from threading import Lock
from typing import TypeAlias
from weakref import WeakKeyDictionary

import psycopg

from bgjob._postgres import fork
from bgjob.job import EnqueueRequest

_MOST = 500
"""Jobs in one insert."""

_LARGEST = 65_536
"""Bytes of a payload that may wait for others, and others for it."""

_SLOW = 0.01
"""Seconds of an insert after which those that wait for its end begin the next one beside it."""

_Answer: TypeAlias = bool | BaseException | None
"""Whether the job was written, or why not; None if it is to be sent alone."""


def may_share(request: EnqueueRequest) -> bool:
    """Whether a job may be written together with others."""
    if request.has_own_id or request.keep is not None:  # which writes a row of its result, too
        return False
    return request.payload is None or len(request.payload) <= _LARGEST


def _answers(
    requests: Iterable[EnqueueRequest], written: set[str] | BaseException
) -> list[_Answer]:
    """Return the answer to each, where one insert wrote these ids or raised this."""
    if isinstance(written, BaseException):
        is_refused = _is_refused(written)
        return [None if is_refused else _copied(written) for _ in requests]
    answers: list[_Answer] = []
    for request in requests:
        answers.append(request.id in written)
        written.discard(request.id)  # a second request with this id was not written
    return answers


def _is_refused(error: BaseException) -> bool:
    """Whether nothing was written, and the fault may be that of one job."""
    if isinstance(error, psycopg.Error):
        return error.diag.severity_nonlocalized == "ERROR"  # the session goes on
    return isinstance(error, Exception)


def _copied(error: BaseException) -> BaseException:
    """Return an equal error, because each thread adds its traceback to the one that it raises."""
    if not isinstance(error, Exception):
        copy: BaseException = psycopg.OperationalError(
            "the insert of this job and others was interrupted: they may or may not have been "
            "written"
        )
    else:
        copy = type(error).__new__(type(error), *error.args)
        copy.__dict__.update(error.__dict__)
    copy.__cause__ = error
    return copy


# -- tasks -----------------------------------------------------------------------------


class AsyncSharedInserts:
    """The inserts of an async client; those of each event loop are shared."""

    def __init__(
        self,
        alone: Callable[[EnqueueRequest], Awaitable[bool]],
        together: Callable[[Sequence[EnqueueRequest]], Awaitable[set[str]]],
    ) -> None:
        self._alone = alone
        self._together = together
        self.in_child()
        fork.watch(self)

    def in_child(self) -> None:
        """Start empty: what is under way and who waits is the parent's."""
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _OfLoop] = WeakKeyDictionary()

    async def write(self, request: EnqueueRequest) -> bool:
        """Write a job; True if it was written, False if its id is taken."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return await self._alone(request)  # which raises the error that names the remedy
        inserts = self._loops.get(loop)
        if inserts is None:
            inserts = self._loops[loop] = _OfLoop(self._together)
        if inserts.newest is None:
            inserts.newest = request
            try:
                return await self._alone(request)
            finally:
                inserts.ended(request)
        answer = await inserts.join(request, loop)
        if answer is None:
            return await self._alone(request)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class _OfLoop:
    """The inserts of one event loop."""

    def __init__(self, together: Callable[[Sequence[EnqueueRequest]], Awaitable[set[str]]]) -> None:
        self._together = together
        self.newest: object | None = None
        """Of the inserts under way, the one whose end is waited for."""
        self._waiting: list[tuple[EnqueueRequest, asyncio.Future[_Answer]]] = []
        self._slow: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # an event loop keeps none

    def join(
        self, request: EnqueueRequest, loop: asyncio.AbstractEventLoop
    ) -> asyncio.Future[_Answer]:
        """Wait for the next insert; return its answer to this request."""
        answer: asyncio.Future[_Answer] = loop.create_future()
        self._waiting.append((request, answer))
        if self._slow is None:
            self._slow = loop.call_later(_SLOW, self._begin, loop)
        return answer

    def ended(self, insert: object) -> None:
        """Begin the next insert if this was the newest."""
        if insert is self.newest:
            self.newest = None
            if self._waiting:
                self._begin(self._waiting[0][1].get_loop())

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        if loop.is_closed():
            return
        self.newest = insert = object()
        task = loop.create_task(self._write(insert, loop))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, insert: object, loop: asyncio.AbstractEventLoop) -> None:
        # Only now: tasks that the insert before has answered may have asked for more. Those that
        # were cancelled do not wait any more.
        waiting = [each for each in self._waiting if not each[1].done()]
        batch, self._waiting = waiting[:_MOST], waiting[_MOST:]
        if self._waiting and self._slow is None:
            self._slow = loop.call_later(_SLOW, self._begin, loop)
        requests = [request for request, _ in batch]
        written: set[str] | BaseException = set()
        try:
            if requests:
                written = await self._together(requests)
        except BaseException as error:
            written = error
            if not isinstance(error, Exception):
                raise
        finally:
            for (_, future), answer in zip(batch, _answers(requests, written), strict=True):
                if not future.done():
                    future.set_result(answer)
            self.ended(insert)


# -- threads ---------------------------------------------------------------------------


class _Insert:
    """A thread's request, and where it is."""

    __slots__ = ("answer", "is_waiting", "request", "told", "writes")

    def __init__(self, request: EnqueueRequest) -> None:
        self.request = request
        self.is_waiting = False
        self.writes = False
        """Whether its thread is to write what waits, and its own."""
        self.answer: _Answer = None
        self.told = Lock()  # the standard library's Event takes ten times as long
        self.told.acquire()


class SharedInserts:
    """The inserts of a client; thread-safe."""

    def __init__(
        self,
        alone: Callable[[EnqueueRequest], bool],
        together: Callable[[Sequence[EnqueueRequest]], set[str]],
    ) -> None:
        self._alone = alone
        self._together = together
        self.in_child()
        fork.watch(self)

    def in_child(self) -> None:
        """Start empty; see AsyncSharedInserts.in_child."""
        self._lock = Lock()
        self._newest: object | None = None
        self._waiting: list[_Insert] = []

    def write(self, request: EnqueueRequest) -> bool:
        """Write a job; True if it was written, False if its id is taken."""
        with self._lock:
            is_alone = self._newest is None
            if is_alone:
                self._newest = request
        if is_alone:
            try:
                return self._alone(request)
            finally:
                self._ended(request)
        mine = _Insert(request)
        try:
            self._wait(mine)
            if mine.writes:
                self._write(mine)
        finally:
            self._leave(mine)
        if mine.answer is None:
            return self._alone(request)
        if isinstance(mine.answer, BaseException):
            raise mine.answer
        return mine.answer

    def _wait(self, mine: _Insert) -> None:
        with self._lock:
            mine.is_waiting = True
            self._waiting.append(mine)
            if self._newest is None:  # it has just ended
                self._begin(mine)
                return
        if mine.told.acquire(timeout=_SLOW):
            return
        with self._lock:
            if mine.is_waiting:
                self._begin(mine)
        if not mine.writes:
            mine.told.acquire()

    def _write(self, mine: _Insert) -> None:
        with self._lock:
            # Only now: threads that the insert before has answered may have asked for more.
            batch = [mine, *self._waiting[: _MOST - 1]]
            del self._waiting[: _MOST - 1]
            for each in batch:
                each.is_waiting = False
        requests = [each.request for each in batch]
        written: set[str] | BaseException = set()
        try:
            written = self._together(requests)
        except BaseException as error:
            written = error
            if not isinstance(error, Exception):
                raise
        finally:
            for each, answer in zip(batch, _answers(requests, written), strict=True):
                each.answer = answer
                if each is not mine:
                    each.told.release()
            self._leave(mine)

    def _leave(self, mine: _Insert) -> None:
        with self._lock:
            if mine.is_waiting:  # its thread was interrupted
                self._waiting.remove(mine)
                mine.is_waiting = False
        self._ended(mine)

    def _ended(self, insert: object) -> None:
        """Wake a waiting thread for the next insert, if this was the newest."""
        with self._lock:
            if insert is self._newest:
                self._newest = None
                if self._waiting:
                    first = self._waiting[0]
                    self._begin(first)
                    first.told.release()

    def _begin(self, mine: _Insert) -> None:
        self._waiting.remove(mine)
        mine.is_waiting = False
        mine.writes = True
        self._newest = mine
