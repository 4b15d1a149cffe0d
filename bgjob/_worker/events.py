"""Tells an observer of events, on a thread of its own."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeGuard, assert_never

from bgjob._engine.protocol import (
    Committed,
    CommitUnknown,
    Event,
    Fenced,
    LeaseLost,
    Outcome,
    QueueIsEmpty,
    Release,
    TimedOut,
)
from bgjob._handlers.route import NeedsKey
from bgjob._logger import log as _log
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.observers import listener
from bgjob.job import Job
from bgjob.observer import Observer
from bgjob.result import Complete, MoveToDlq, Reschedule, Retry

_MOST = 100_000
"""Events that wait for a blocked observer; later ones are dropped, and counted in the log."""
_MOST_BYTES = 64 * 1024 * 1024
"""Payloads that wait with them, as above."""
_UNCOUNTED = 1000
"""Events that wait before their payloads are counted: claims bring no large ones."""


class Events:
    """The events of a worker, on their way to an observer that may raise or block.

    Args:
        observer: it.
        queue: the queue, or the queues, for the log.

    """

    def __init__(self, observer: Observer, queue: str) -> None:
        self._observer = observer
        self._job_started = listener(observer, "job_started")
        self._job_completed = listener(observer, "job_completed")
        self._queue = queue
        self._waiting: deque[Event | BaseException] = deque()
        self._ready = threading.Condition()
        self._closed = False
        self._bytes = 0  # of payloads that wait, as far as they are counted
        self._dropped = 0
        self._error_at = float("-inf")
        self.thread: threading.Thread | None = None
        """On which the observer is told."""

    def open(self) -> None:
        """Start the thread."""
        self.thread = threading.Thread(
            target=self._run, name=f"bgjob-events-{self._queue}", daemon=True
        )
        self.thread.start()

    @property
    def started(self) -> Callable[[Job], None] | None:
        """What tells that a handler is about to run, on the caller's thread; None if unheard."""
        return None if self._job_started is None else self._tell_started

    def _tell_started(self, job: Job) -> None:
        assert self._job_started is not None  # noqa: S101 (started() checks)
        try:
            self._job_started(job)
        except BaseException:  # whatever it raises, even SystemExit: the job goes on
            _log.exception("observer failed in job_started")

    def tell(self, events: Iterable[Event | BaseException]) -> None:
        """Tell of events, in order, soon."""
        if self._job_completed is None:
            # Most events are completions: to hear none of them is to be left in peace.
            events = [event for event in events if not _is_completion(event)]
            if not events:
                return
        with self._ready:
            before = len(self._waiting)
            self._waiting.extend(events)
            if len(self._waiting) > _UNCOUNTED:
                self._bytes += sum(map(_size, islice(self._waiting, before, None)))
                while len(self._waiting) > _MOST or self._bytes > _MOST_BYTES:
                    self._bytes -= _size(self._waiting.pop())
                    self._dropped += 1
            self._ready.notify()

    def error(self, error: BaseException) -> None:
        """Tell of trouble, at most once a second: a database that is away stays away."""
        now = time.monotonic()
        with self._ready:  # slots may be in trouble together
            if now < self._error_at + 1:
                return
            self._error_at = now
        self.tell([error])

    def close(self, timeout: float) -> None:
        """Tell what waits, for at most so many seconds, and end the thread."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        thread = self.thread
        if thread is not None and threading.current_thread() is not thread:
            thread.join(timeout)
            if thread.is_alive():
                _log.warning(
                    "observer of queue %r blocks; its last events are not told", self._queue
                )

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._waiting:
                    if self._closed:
                        return
                    self._ready.wait()
                waiting, self._waiting, self._bytes = self._waiting, deque(), 0
                dropped, self._dropped = self._dropped, 0
            if dropped:
                _log.warning(
                    "observer of queue %r is behind: %d events dropped", self._queue, dropped
                )
            completed = self._job_completed
            for event in waiting:
                # This loop competes with the handlers.
                try:
                    if completed is not None and _is_completion(event):
                        job = event.claimed.job
                        completed(job if job.arg is not ELSEWHERE else _without_payload(job))
                    else:
                        self._tell(event)
                except BaseException:
                    _log.exception("observer failed on %s", _name(event))

    def _tell(self, event: Event | BaseException) -> None:
        observer = self._observer
        match event:
            case Outcome(Claimed(job), result):
                job = _without_payload(job)
                match result:
                    case Complete():
                        observer.job_completed(job)
                    case Retry(_, error):
                        observer.job_will_be_retried(job, event.delay, error)
                    case Reschedule():
                        observer.job_rescheduled(job, event.delay)
                    case MoveToDlq(error):
                        observer.job_moved_to_dlq(job, error)
                    case Release() | NeedsKey() | Committed() | Fenced() | CommitUnknown():
                        raise AssertionError("that is no event")
                    case _:
                        assert_never(result)
            case LeaseLost(job):
                observer.job_lease_lost(_without_payload(job))
            case TimedOut(job, seconds):
                observer.job_timed_out(_without_payload(job), seconds)
            case QueueIsEmpty(queue):
                observer.queue_is_empty(queue)
            case BaseException():
                observer.worker_error(event)
            case _:
                assert_never(event)


def _without_payload(job: Job) -> Job:
    """Return a job as observers see it: a large payload is not kept for them."""
    return job._replace(arg=None) if job.arg is ELSEWHERE else job


def _size(event: Event | BaseException) -> int:
    match event:
        case Outcome(claimed):
            return len(claimed.job.arg or b"")
        case LeaseLost(job) | TimedOut(job):
            return len(job.arg or b"")
        case _:
            return 0


def _is_completion(event: Event | BaseException) -> TypeGuard[Outcome]:
    return type(event) is Outcome and type(event.result) is Complete


def _name(event: Event | BaseException) -> str:
    return type(event.result if isinstance(event, Outcome) else event).__name__
