"""Runs the workers of `bgjob worker` until a signal ends them.

The main thread loads the workers and then only waits for signals, so that it
answers them whatever handlers and event loops do. Another thread runs the
workers, and the event loop of AsyncWorkers; see `served`. A third one ends the
process when its time is over, even if a part of it hangs.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from bgjob._cli.health import HealthOptions
from bgjob._cli.worker.served import Serving
from bgjob._cli.worker.signals import Ending, Notice, flush
from bgjob._cli.worker.target import Choice, load
from bgjob._logger import log as _log
from bgjob._worker.group import WorkerGroup
from bgjob._worker.registry import Registry
from bgjob.errors import BgjobError

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
    """Load workers and run them until they have ended; return after a requested shutdown.

    It takes over the process: its signals, and the way it ends. From the main thread.

    Args:
        target: `package.module:name` of a worker or several, of a callable that makes them, or of
            a Mux.
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
    service = Serving(loaded, target, ending, set_up_logging, told.probe)
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
        if isinstance(service.error, BgjobError | psycopg.Error) and service.is_of_start:
            raise service.error
        raise ServeError(f"{target} broke") from service.error
    if not (ending.signum or service.was_asked):
        raise ServeError(f"{target} has ended on its own") from service.failure
    if notice is None or service.abandoned:
        _log.warning("%s: %s", target, service.remains)
        ending.end_now()
    _log.info("%s has ended", target)
