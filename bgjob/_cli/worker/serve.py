"""Runs the worker of `bgjob worker` until a signal ends it.

The main thread loads the worker and then only waits for signals, so that it
answers them whatever handlers and event loops do. Another thread runs the
worker, and the event loop of an AsyncWorker. A third one ends the process when
its time is over, whatever still hangs in it.
"""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

from bgjob._cli.health import HealthOptions
from bgjob._cli.worker.signals import Ending, Notice, flush
from bgjob._cli.worker.target import AnyWorker, Choice, TargetError, check, load
from bgjob._logger import log as _log
from bgjob._postgres.event_loop import new_event_loop
from bgjob._worker.group import WorkerGroup
from bgjob._worker.registry import Registry
from bgjob.errors import BgjobError
from bgjob.worker import AsyncWorker, Worker

if TYPE_CHECKING:
    from bgjob._cli.worker.health import Health
    from bgjob._cli.worker.probe import Probe


class Reports(NamedTuple):
    """How a process reports to its parent."""

    fd: int
    """One end of a pipe."""
    counts: bool
    """Whether it also counts the worker's events."""


class ServeError(BgjobError):
    """The worker ended on its own; the cause says why, if that is known."""


def serve(
    target: str,
    *,
    grace: float,
    choice: Choice,
    set_up_logging: Callable[[], None],
    lifeline: int | None = None,
    health: HealthOptions,
    reports: Reports | None = None,
) -> None:
    """Load a worker and run it until it has ended; return after a requested shutdown.

    It takes over the process: its signals, and the way it ends. From the main thread.

    Args:
        target: `package.module:name` of a worker, of a callable that makes one, or of a Mux.
        grace: seconds that running handlers have after a signal.
        choice: the worker options of the command line.
        set_up_logging: called when the program has been loaded, before the worker runs.
        lifeline: one end of a pipe; the worker is shut down when the other end is closed.
        health: where the process tells how it is.
        reports: how to report to a parent, which answers for it instead.

    Raises:
        TargetError: the target could not be loaded.
        ServeError: the worker ended on its own.
        ListenError: the address of the probes is in use, for example.
        BgjobError: the worker could not start; for example a SchemaError.
        psycopg.Error: the worker could not start.

    """
    ending = Ending(grace)
    try:
        with _told(health, reports, ending) as told:
            _serve(target, ending, choice, set_up_logging, lifeline, told)
    except BaseException:
        if not ending.signum or ending.has_served:
            ending.status = 1
            raise
        # A signal came before it had started; then it does not matter how it ended.
    finally:
        ending.begin()  # non-daemon threads and atexit functions may hang
        flush()


class _Told(NamedTuple):
    """Who learns how this process is, if anybody does."""

    probe: "Probe | None" = None
    health: "Health | None" = None


@contextmanager
def _told(options: HealthOptions, reports: Reports | None, ending: Ending) -> Iterator[_Told]:
    """Report to others how this process is, meanwhile."""
    if reports is None and not options.is_wanted:
        yield _Told()
        return
    # Only what is used is imported.
    from bgjob._cli.worker.health import Health  # noqa: PLC0415
    from bgjob._cli.worker.probe import Probe  # noqa: PLC0415

    probe = Probe(
        options.live_within,
        counts=options.address is not None or (reports is not None and reports.counts),
        is_asked_to_end=lambda: bool(ending.signum),
    )
    if reports is None:
        with closing(Health(options, probe.report, probe.render)) as health:
            yield _Told(probe, health)
    else:
        from bgjob._cli.worker.reports import Reporter  # noqa: PLC0415

        with closing(Reporter(reports.fd, probe)):
            yield _Told(probe)


def _serve(
    target: str,
    ending: Ending,
    choice: Choice,
    set_up_logging: Callable[[], None],
    lifeline: int | None,
    told: "_Told",
) -> None:
    Registry.program = f"bgjob worker {target}"
    WorkerGroup.minutes = choice.minutes
    ending.obey_signals()
    with ending.interruptions():
        if lifeline is not None:
            ending.follow(lifeline)
        loaded = load(target, choice)
        # Imported objects live as long as the process: walking over them at each full
        # collection only delays handlers and server.
        gc.collect()
        gc.freeze()
    ending.obey_signals()  # also where the program has set up handlers of its own
    if ending.signum:  # and the program caught the interruption
        return
    service = _Service(loaded, target, ending, set_up_logging, told.probe)
    service.start()
    while (notice := ending.next()) is Notice.RUNNING or notice is Notice.ASKED_TO_END:
        if notice is Notice.RUNNING:
            _log.info("%s is running", target)
            if told.health is not None:
                told.health.running()
        if ending.signum and told.health is not None:
            told.health.stopping()
        if ending.signum and ending.has_served and not service.is_stopping:
            _log.info("%s: %s, shutting down", target, ending.reason)
            service.stop(ending.grace_left)
    if service.error is not None:
        if isinstance(service.error, BgjobError | psycopg.Error) and not ending.has_served:
            raise service.error
        raise ServeError(f"{target} broke") from service.error
    if not (ending.signum or service.was_asked):
        raise ServeError(f"{target} has ended on its own") from service.failure
    if notice is None or service.abandoned:
        _log.warning("%s: %s", target, service.remains)
        ending.end_now()
    _log.info("%s has ended", target)


class _Service:
    """Runs the worker on a thread, with the event loop of an AsyncWorker."""

    def __init__(
        self,
        loaded: AnyWorker | Awaitable[Any],
        target: str,
        ending: Ending,
        set_up_logging: Callable[[], None],
        probe: "Probe | None",
    ) -> None:
        self.error: BaseException | None = None
        self.is_stopping = False
        self.was_asked = False
        """Whether the program itself has shut its worker down."""
        self.failure: BaseException | None = None
        """Why the worker has ended on its own."""
        self._loaded = loaded
        self._target = target
        self._ending = ending
        self._set_up_logging = set_up_logging
        self._probe = probe
        self._group: Any = None

    def start(self) -> None:
        """Start the thread; it reports when the worker runs and when it has ended."""
        threading.Thread(target=self._run, name="bgjob-serving", daemon=True).start()

    def stop(self, grace: float) -> None:
        """Begin the shutdown immediately, even if a handler blocks the event loop."""
        self.is_stopping = True
        self._group.stop(grace)

    def _run(self) -> None:
        try:
            if isinstance(self._loaded, Worker):
                self._run_plain(self._loaded)
            else:
                with asyncio.Runner(loop_factory=new_event_loop) as runner:
                    runner.run(self._run_on_loop(self._loaded))
        except BaseException as error:
            self.error = error
        finally:
            self._ending.tell(Notice.ENDED)

    def _run_plain(self, worker: Worker) -> None:
        self._set_up_logging()
        if self._probe is not None:
            self._probe.attach(worker._group)  # noqa: SLF001
        worker.run()
        self._is_running(worker)
        worker.wait()
        self._has_ended()
        worker.shutdown()

    async def _run_on_loop(self, loaded: AsyncWorker | Awaitable[Any]) -> None:
        worker = loaded if isinstance(loaded, AsyncWorker) else await self._make(loaded)
        if isinstance(worker, Worker):
            await asyncio.to_thread(self._run_plain, worker)
            return
        self._set_up_logging()
        if self._probe is not None:
            self._probe.attach(worker._group)  # noqa: SLF001
        await asyncio.to_thread(self._open, worker, asyncio.get_running_loop())
        await worker.wait()
        self._has_ended()
        await worker.shutdown()  # it waits for the cancelled handlers

    def _open(self, worker: AsyncWorker, loop: asyncio.AbstractEventLoop) -> None:
        # Like AsyncWorker.run(), which has to be awaited on the loop and may not
        # return before the first handlers do, because they may block the loop.
        worker._group.open(loop)  # noqa: SLF001
        self._is_running(worker)

    async def _make(self, factory: Awaitable[Any]) -> AnyWorker:
        try:
            made = await factory
        except Exception as error:
            raise TargetError(f"{self._target} failed") from error
        return check(made, self._target)

    def _is_running(self, worker: AnyWorker) -> None:
        # The part that both workers share: AsyncWorker's own shutdown() has to be
        # awaited on the loop, which a handler may block.
        self._group = worker._group  # noqa: SLF001
        self._ending.has_served = True
        self._ending.tell(Notice.RUNNING)

    def _has_ended(self) -> None:
        self.was_asked, self.failure = self._group.was_asked, self._group.failure

    @property
    def abandoned(self) -> int:
        """The number of jobs that still run although the worker has ended."""
        return self._group.abandoned if self._group is not None else 0

    @property
    def remains(self) -> str:
        """What is left behind if the process ends now, for the log."""
        if self._group is None:
            return "its start was broken off"
        if self._group.done.done() and not self.abandoned:
            return "a task or a thread of the program still runs, and is abandoned"
        count = self.abandoned
        jobs = "jobs" if count == 0 else "1 job" if count == 1 else f"{count} jobs"
        return f"{jobs} still running, left to the lease"
