"""Observers watch a worker; they never change what it does."""

import logging
from typing import Protocol

from typing_extensions import override

from bgjob.job import Job


class Observer(Protocol):
    """Receives the events of a worker.

    `job_started` is called on the thread or event loop that is about to run
    the handler. All other events are called one at a time, in order, on a
    thread of their own, and an outcome only after it was committed. An
    observer that raises is logged; one that blocks delays other events, never
    a job. Derive from NoopObserver to write only the methods you need.
    """

    def job_started(self, job: Job, /) -> None:
        """Tell that a handler is about to run `job`."""

    def job_completed(self, job: Job, /) -> None:
        """Tell that `job` is done and its row deleted."""

    def job_rescheduled(self, job: Job, delay: float, /) -> None:
        """Tell that `job` will run again in `delay` seconds, by its own wish."""

    def job_will_be_retried(
        self, job: Job, delay: float, error: str | BaseException | None, /
    ) -> None:
        """Tell that an attempt failed, and that `job` will run again in `delay` seconds."""

    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        """Tell that `job` rests in the dead-letter table."""

    def job_lease_lost(self, job: Job, /) -> None:
        """Tell that `job` outlived its lease: another worker has it, this result is dropped."""

    def queue_is_empty(self, queue: str, /) -> None:
        """Tell that no job of `queue` is due, and that the worker begins to wait."""

    def worker_error(self, error: BaseException, /) -> None:
        """Tell of trouble, mostly with the database; the worker tries again by itself."""


class NoopObserver(Observer):
    """Does nothing: the base for observers that need some of the events; see Observer for them."""

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
    def queue_is_empty(self, queue: str, /) -> None:
        pass

    @override
    def worker_error(self, error: BaseException, /) -> None:
        pass


class LoggingObserver(NoopObserver):
    """Logs through the standard `logging`.

    Levels do not flood: what goes well is DEBUG, a retry or a lost lease
    WARNING, a dead job or trouble with the database ERROR. Job id, queue, type
    and attempt are in each record's `extra` as `job_id`, `job_queue`,
    `job_type` and `job_attempt`.

    Args:
        logger: where to log; the logger `bgjob` by default.

    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("bgjob")

    def _log(
        self, level: int, message: str, job: Job, *details: object, error: object = None
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
                },
            )

    @override
    def job_started(self, job: Job, /) -> None:
        if self._logger.isEnabledFor(logging.DEBUG):
            self._log(logging.DEBUG, "started", job)

    @override
    def job_completed(self, job: Job, /) -> None:
        if self._logger.isEnabledFor(logging.DEBUG):
            self._log(logging.DEBUG, "completed", job)

    @override
    def job_rescheduled(self, job: Job, delay: float, /) -> None:
        self._log(logging.DEBUG, "runs again in %.3g s", job, delay)

    @override
    def job_will_be_retried(
        self, job: Job, delay: float, error: str | BaseException | None, /
    ) -> None:
        self._log(
            logging.WARNING, "failed and runs again in %.3g s: %s", job, delay, error, error=error
        )

    @override
    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        self._log(logging.ERROR, "moved to the dead-letter table: %s", job, error, error=error)

    @override
    def job_lease_lost(self, job: Job, /) -> None:
        self._log(logging.WARNING, "outlived its lease; its result is dropped", job)

    @override
    def queue_is_empty(self, queue: str, /) -> None:
        self._logger.debug("queue %s is empty", queue)

    @override
    def worker_error(self, error: BaseException, /) -> None:
        self._logger.error("worker: %s", error)
