"""Observers watch a worker; they never change what it does."""

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast, overload, runtime_checkable

from typing_extensions import override

from bgjob._logger import log
from bgjob.job import Job
from bgjob.workers import WorkerHealth


class Observer(Protocol):
    """Receives the events of a worker.

    `job_started` is called on the thread or event loop that is about to run
    the handler. All other events are called one at a time, in order, on a
    thread of their own, and an outcome only after it was committed. An
    exception from an observer is logged. A method that blocks delays other
    events, also those of other observers, but never a job. Derive from
    NoopObserver to write only the methods you need: an event that no observer
    handles costs nothing.

    Payloads of over 64 KiB are not kept for observers: `job.arg` is None there,
    except in `job_started`. While an observer is behind by 100,000 events or by
    payloads of 64 MiB, later events are dropped, and the log has their number. So that a burst
    of failures takes little memory, only some of the errors that wait keep the variables of
    their frames (8), and their traceback (250); the error text that is stored has the places.

    A plain function that takes an event (bgjob.Event: JobCompleted and so on) is
    an observer too, and receives all events. Their values also have how long the
    handler ran and how long the job waited, which the methods do not receive.
    `bgjob.only` restricts either to some events, queues, job types or schedules.
    """

    def job_started(self, job: Job, /) -> None:
        """Observe that a handler is about to run `job`."""

    def job_completed(self, job: Job, /) -> None:
        """Observe that `job` is done and its row deleted."""

    def job_rescheduled(self, job: Job, delay: float, /) -> None:
        """Observe that the handler returned Reschedule; `job` runs again in `delay` seconds."""

    def job_will_be_retried(
        self, job: Job, delay: float, error: str | BaseException | None, /
    ) -> None:
        """Observe that an attempt failed; `job` runs again in `delay` seconds."""

    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        """Observe that `job` was moved to the dead-letter table."""

    def job_lease_lost(self, job: Job, /) -> None:
        """Observe that the lease of `job` ended while it ran; its result is dropped.

        Another worker may have the job by now.
        """

    def job_cancelled(self, job: Job, /) -> None:
        """Observe that `job` was cancelled while this worker had it; its result is dropped."""

    def job_timed_out(self, job: Job, seconds: float, /) -> None:
        """Observe that the handler of `job` ran for longer than its timeout of `seconds`."""

    def queue_is_empty(self, queue: str, /) -> None:
        """Observe that no job of `queue` is due and the worker begins to wait."""

    def worker_error(self, error: BaseException, /) -> None:
        """Observe an error, mostly of the database; the worker tries again on its own."""


class NoopObserver(Observer):
    """Does nothing: the base for an observer that handles some of Observer's events."""

    @override
    def job_started(self, job: Job, /) -> None:
        pass

    @override
    def job_completed(self, job: Job, /) -> None:
        pass

    @override
    def job_rescheduled(self, job: Job, delay: float, /) -> None:
        pass

    @override
    def job_will_be_retried(
        self, job: Job, delay: float, error: str | BaseException | None, /
    ) -> None:
        pass

    @override
    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        pass

    @override
    def job_lease_lost(self, job: Job, /) -> None:
        pass

    @override
    def job_cancelled(self, job: Job, /) -> None:
        pass

    @override
    def job_timed_out(self, job: Job, seconds: float, /) -> None:
        pass

    @override
    def queue_is_empty(self, queue: str, /) -> None:
        pass

    @override
    def worker_error(self, error: BaseException, /) -> None:
        pass


class Times(Protocol):
    """How long a handler ran and its job waited, as bgjob.event has them."""

    @property
    def ran(self) -> float | None:
        """Seconds in the handler."""

    @property
    def waited(self) -> float | None:
        """Seconds for which the job was due; computed when it is asked for."""


_S = TypeVar("_S")
_A = TypeVar("_A")
_B = TypeVar("_B")
_C = TypeVar("_C")


@overload
def with_times(method: Callable[[_S, _A, Times], None]) -> Callable[[_S, _A], None]: ...
@overload
def with_times(method: Callable[[_S, _A, _B, Times], None]) -> Callable[[_S, _A, _B], None]: ...
@overload
def with_times(
    method: Callable[[_S, _A, _B, _C, Times], None],
) -> Callable[[_S, _A, _B, _C], None]: ...


def with_times(method: Callable[..., None]) -> Callable[..., None]:
    """Mark a method of bgjob's own observers: its last argument is the Times of the job.

    Only `job_started` and the events of a job's end have Times. To type checkers the method has
    the signature of Observer, like the methods of users: a subclass that overrides a marked
    method receives no Times.
    """
    return given_times(method)


def given_times(function: Callable[..., _S]) -> Callable[..., _S]:
    """Mark a function that is called like a method `with_times`."""
    cast("Any", function).takes_times = True
    return function


def takes_times(method: Callable[..., object]) -> bool:
    """Whether a method is marked by `with_times`."""
    return getattr(method, "takes_times", None) is True


@runtime_checkable
class WatchesWorker(Protocol):
    """An observer of bgjob's own that also sees how each worker is."""

    def watch_worker(self, health: Callable[[], WorkerHealth]) -> None:
        """Take the method of a worker that it observes; it can be called from any thread."""


class LoggingObserver(NoopObserver):
    """Logs through the standard `logging`.

    What goes well is DEBUG, so that it does not flood a log. A retry, a lost lease,
    a cancel or a timeout is a WARNING, a dead job or a worker's error is an ERROR. Each
    record's `extra` has `job_id`, `job_queue`, `job_type` and `job_attempt`;
    `job_event`, for example "completed"; `job_delay`, the seconds until the next
    run; and `job_timeout`, the timeout in seconds. Those of a job's end also have
    `job_seconds`, how long its handler ran, and `job_waited`, for how many seconds
    it was due before; neither if it did not run.

    Args:
        logger: where to log; the logger `bgjob` by default. A configuration that
            disables existing loggers does not silence that one; its level does.

    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = log if logger in (None, log.logger) else logger
        given = self._logger
        self._plain = given.logger if isinstance(given, logging.LoggerAdapter) else given

    def _log(
        self,
        level: int,
        event: str,
        message: str,
        job: Job,
        *details: object,
        error: object = None,
        times: Times | None = None,
        **fields: float,
    ) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(
                level,
                f"%s %s (attempt %d) {message}",  # noqa: G004 (the literals below)
                job.type,
                job.id,
                job.attempt,
                *details,
                exc_info=error if isinstance(error, BaseException) else None,
                extra={
                    "job_id": job.id,
                    "job_queue": job.queue,
                    "job_type": job.type,
                    "job_attempt": job.attempt,
                    "job_event": event,
                    **fields,
                    **_fields(times),
                },
            )

    # Of each job: an adapter's answer takes twice as long as its logger's.

    @override
    def job_started(self, job: Job, /) -> None:
        if self._plain.isEnabledFor(logging.DEBUG) or self._plain.disabled:
            self._log(logging.DEBUG, "started", "started", job)

    @override
    @with_times
    def job_completed(self, job: Job, times: Times | None = None, /) -> None:
        if self._plain.isEnabledFor(logging.DEBUG) or self._plain.disabled:
            self._log(logging.DEBUG, "completed", "completed", job, times=times)

    @override
    @with_times
    def job_rescheduled(self, job: Job, delay: float, times: Times | None = None, /) -> None:
        self._log(
            logging.DEBUG,
            "rescheduled",
            "runs again in %.3g s",
            job,
            delay,
            times=times,
            job_delay=delay,
        )

    @override
    @with_times
    def job_will_be_retried(
        self,
        job: Job,
        delay: float,
        error: str | BaseException | None,
        times: Times | None = None,
        /,
    ) -> None:
        self._log(
            logging.WARNING,
            "will_be_retried",
            "failed and runs again in %.3g s: %s",
            job,
            delay,
            error,
            error=error,
            times=times,
            job_delay=delay,
        )

    @override
    @with_times
    def job_moved_to_dlq(
        self, job: Job, error: str | BaseException, times: Times | None = None, /
    ) -> None:
        self._log(
            logging.ERROR,
            "moved_to_dlq",
            "moved to the dead-letter table: %s",
            job,
            error,
            error=error,
            times=times,
        )

    @override
    @with_times
    def job_lease_lost(self, job: Job, times: Times | None = None, /) -> None:
        self._log(
            logging.WARNING,
            "lease_lost",
            "outlived its lease; its result is dropped",
            job,
            times=times,
        )

    @override
    @with_times
    def job_cancelled(self, job: Job, times: Times | None = None, /) -> None:
        self._log(
            logging.WARNING, "cancelled", "was cancelled; its result is dropped", job, times=times
        )

    @override
    def job_timed_out(self, job: Job, seconds: float, /) -> None:
        self._log(
            logging.WARNING,
            "timed_out",
            "outlived its timeout of %.3g s",
            job,
            seconds,
            job_timeout=seconds,
        )

    @override
    def queue_is_empty(self, queue: str, /) -> None:
        self._logger.debug("queue %s is empty", queue, extra={"job_queue": queue})

    @override
    def worker_error(self, error: BaseException, /) -> None:
        self._logger.error("worker: %s", error)


def _fields(times: Times | None) -> dict[str, float]:
    if times is None:
        return {}
    given = {"job_seconds": times.ran, "job_waited": times.waited}
    return {name: seconds for name, seconds in given.items() if seconds is not None}
