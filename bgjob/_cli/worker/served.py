"""Runs the workers of the process: one, or several, as of several databases.

Each is opened on a thread of its own, so that none waits for another's server. Where there are
several:

- One whose database is away at the start is tried again while another one works.
- What time does not mend, such as missing tables, ends all of them. So does a worker that ends on
  its own. If the program shuts one down, the others go on.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import psycopg

from bgjob._cli.database import name_of
from bgjob._cli.worker.signals import Ending, Notice
from bgjob._cli.worker.target import AnyWorker, TargetError, check
from bgjob._logger import log as _log
from bgjob._postgres.event_loop import new_event_loop
from bgjob.worker import AsyncWorker

if TYPE_CHECKING:
    from bgjob._cli.worker.probe import Probe

_FIRST_PAUSE = 1.0
"""Seconds before a worker whose database is away is opened again; doubles."""

_LONGEST_PAUSE = 10.0


class _Served:
    """One worker."""

    def __init__(self, worker: AnyWorker, number: int) -> None:
        self.worker = worker
        # The part that both workers share: AsyncWorker's own shutdown() has to be
        # awaited on the loop, which a handler may block.
        self.group = worker._group  # noqa: SLF001
        self.works: Future[bool] = Future()
        """Whether it was opened; False if it will not be."""
        self.ended: Future[None] = Future()
        """When it has ended after that."""
        self.name = f"worker {number}, of {name_of(self.group.connection_parameters)},"

    @property
    def has_started(self) -> bool:
        """Whether it was opened."""
        return self.works.done() and self.works.result()

    def stop(self, grace: float | EllipsisType) -> None:
        """Begin its shutdown; if it has not started, it will not."""
        self.group.stop(grace)
        with suppress(InvalidStateError):
            self.works.set_result(False)


class Serving:
    """Runs the workers on a thread, with the event loop of AsyncWorkers.

    Args:
        loaded: the workers; or an awaitable for what a factory makes.
        target: what the command line names.
        ending: is told when they run, and when they have ended.
        set_up_logging: called before they run.
        probe: learns which workers there are.

    """

    def __init__(
        self,
        loaded: Sequence[AnyWorker] | Awaitable[Any],
        target: str,
        ending: Ending,
        set_up_logging: Callable[[], None],
        probe: "Probe | None",
    ) -> None:
        self.error: BaseException | None = None
        self.is_of_start = False
        """Whether the error kept a worker from its start."""
        self.is_stopping = False
        self.was_asked = True
        """Whether no worker has ended but by a signal or the program itself."""
        self.failure: BaseException | None = None
        """Why the first one that did has ended."""
        self._loaded = loaded
        self._target = target
        self._ending = ending
        self._set_up_logging = set_up_logging
        self._probe = probe
        self._served: Sequence[_Served] = ()
        self._lock = threading.Lock()
        self._untried = 0
        self._refusal: psycopg.OperationalError | None = None
        self._is_over = threading.Event()

    def start(self) -> None:
        """Start the thread; it reports when the workers run and when they have ended."""
        _on_thread(self._run)

    def stop(self, grace: float) -> None:
        """Begin the shutdown immediately, even if a handler blocks the event loop."""
        self.is_stopping = True
        self._end(grace)

    def _end(self, grace: float | EllipsisType = ...) -> None:
        """End all; by default with the grace period of each."""
        self._is_over.set()
        for served in self._served:
            served.stop(grace)

    def _fail(self, error: BaseException, *, is_of_start: bool) -> None:
        with self._lock:
            if self.error is None:
                self.error, self.is_of_start = error, is_of_start
        self._end()

    def _run(self) -> None:
        try:
            if isinstance(self._loaded, Sequence) and not any(map(_is_async, self._loaded)):
                self._begin(self._loaded, None)
                for served in self._served:
                    if served.works.result():
                        served.ended.result()
                        served.worker.shutdown()
            else:
                with asyncio.Runner(loop_factory=new_event_loop) as runner:
                    runner.run(self._run_on_loop(self._loaded))
        except BaseException as error:
            self._fail(error, is_of_start=not self._ending.has_served)
            if self._are_several:
                for served in self._served:
                    served.group.join()
        finally:
            self._ending.tell(Notice.ENDED)

    async def _run_on_loop(self, loaded: Sequence[AnyWorker] | Awaitable[Any]) -> None:
        workers = loaded if isinstance(loaded, Sequence) else await self._make(loaded)
        self._begin(workers, asyncio.get_running_loop())
        for served in self._served:
            # Shielded: if the loop is stopped, asyncio cancels this task, and with it would cancel
            # the futures that the worker's threads still set.
            if await asyncio.shield(asyncio.wrap_future(served.works)):
                await asyncio.shield(asyncio.wrap_future(served.ended))
                if isinstance(served.worker, AsyncWorker):
                    await served.worker.shutdown()  # it waits for the cancelled handlers
                else:
                    served.worker.shutdown()

    async def _make(self, factory: Awaitable[Any]) -> Sequence[AnyWorker]:
        try:
            made = await factory
        except Exception as error:
            raise TargetError(f"{self._target} failed") from error
        return check(made, self._target)

    # -- the start -----------------------------------------------------------------------------

    def _begin(self, workers: Sequence[AnyWorker], loop: asyncio.AbstractEventLoop | None) -> None:
        """Open each worker on a thread of its own."""
        self._set_up_logging()
        self._served = [_Served(worker, number) for number, worker in enumerate(workers, 1)]
        self._untried = len(self._served)
        if self._probe is not None:
            self._probe.attach([served.group for served in self._served])
        for served in self._served:
            _on_thread(self._open, served, loop if _is_async(served.worker) else None)

    @property
    def _are_several(self) -> bool:
        return len(self._served) > 1

    def _open(self, served: _Served, loop: asyncio.AbstractEventLoop | None) -> None:
        """Open a worker; again while its database is away, if another one works."""
        pause = 0.0
        while not self._is_over.wait(pause):
            try:
                # Like AsyncWorker.run(), which has to be awaited on the loop and may not
                # return before the first handlers do, because they may block the loop.
                served.group.open(loop)
            except psycopg.OperationalError as error:
                pause, is_first = min(2 * pause or _FIRST_PAUSE, _LONGEST_PAUSE), not pause
                if self._are_several:
                    _log.error("%s cannot start: %s", served.name, error)
                if is_first:
                    self._tried(error)
            except BaseException as error:
                if not self._is_over.is_set():
                    if self._are_several:
                        _log.error("%s cannot start", served.name)
                    self._fail(error, is_of_start=True)
                return
            else:
                self._has_started(served, is_first=not pause)
                return

    def _has_started(self, served: _Served, *, is_first: bool) -> None:
        self._ending.has_served = True
        if self._ending.signum:  # it came before that was known
            self._ending.tell(Notice.ASKED_TO_END)
        with suppress(InvalidStateError):
            served.works.set_result(True)
        served.group.done.add_done_callback(lambda _: self._has_ended(served))
        if is_first:
            self._tried(None)
        else:
            _log.info("%s has started", served.name)

    def _tried(self, refusal: psycopg.OperationalError | None) -> None:
        """Record a first try. After those of all, the process runs, or has no server at all."""
        with self._lock:
            self._untried -= 1
            self._refusal = self._refusal or refusal
            is_last = not self._untried
        if not is_last:
            return
        if self._ending.has_served:
            self._ending.tell(Notice.RUNNING)
        elif self._refusal is not None:
            self._fail(self._refusal, is_of_start=True)

    # -- the end -------------------------------------------------------------------------------

    def _has_ended(self, served: _Served) -> None:
        was_asked = served.group.was_asked
        if not was_asked and self.was_asked:
            self.was_asked, self.failure = False, served.group.failure
            if self._are_several:
                _log.error("%s has ended on its own", served.name)
        served.ended.set_result(None)
        if not was_asked:
            self._end()

    @property
    def abandoned(self) -> int:
        """The number of jobs that still run although their worker has ended."""
        return sum(served.group.abandoned for served in self._started)

    @property
    def _started(self) -> Sequence[_Served]:
        return [served for served in self._served if served.has_started]

    @property
    def remains(self) -> str:
        """What is left behind if the process ends now, for the log."""
        if not self._started:
            return "its start was broken off"
        if all(served.ended.done() for served in self._started) and not self.abandoned:
            return "a task or a thread of the program still runs, and is abandoned"
        count = self.abandoned
        jobs = "jobs" if count == 0 else "1 job" if count == 1 else f"{count} jobs"
        return f"{jobs} still running, left to the lease"


def _is_async(worker: AnyWorker) -> bool:
    return isinstance(worker, AsyncWorker)


def _on_thread(function: Callable[..., None], *args: object) -> None:
    # A daemon: one that waits for a server does not hold up the end of the process.
    threading.Thread(target=function, args=args, name="bgjob-serving", daemon=True).start()
