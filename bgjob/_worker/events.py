"""Passes events to the observer, on a thread of its own.

The events are the values of bgjob.event, except that a settled job is its Outcome: the
engine appends those of a whole claim as one list. The event thread calls a method of the
observer with each. A value for each completion as well would be made only for functions that
observe, and cost every other observer an object a job.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, assert_never

from bgjob._engine.outcome import Event, Outcome, wait_of
from bgjob._logger import log as _log
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.clock import ServerClock
from bgjob._worker.failures import drop_tracebacks
from bgjob._worker.observers import combined, listener
from bgjob._worker.tally import MinuteCounter, Tally
from bgjob.event import JobCancelled, JobLeaseLost, JobTimedOut, QueueIsEmpty, WorkerError
from bgjob.job import Job
from bgjob.observer import Observer, Times, takes_times
from bgjob.result import Complete, MoveToDlq, Reschedule, Retry

_MOST = 100_000
"""The most events that wait for a blocked observer; later ones are dropped and counted."""
_MOST_BYTES = 64 * 1024 * 1024
"""The most bytes of payloads that wait with them; the same holds beyond it."""
_UNCOUNTED = 1000
"""Waiting events from which payloads are counted: claims return no large ones."""
_MOST_TRACEBACKS = 250
"""Waiting events from which failures wait without tracebacks, which hold a frame for each call."""


class Events:
    """The events of a worker, queued for an observer that may raise or block.

    Args:
        observer: the observer.
        queue: the queue, or the queues, for the log.

    """

    def __init__(self, observer: Observer, queue: str) -> None:
        self.tally = Tally()
        """What has been told so far."""
        self.minutes: MinuteCounter | None = None
        """Counts them by queue and type, while the worker writes minutes."""
        self._observe(observer)
        self._queue = queue
        self._waiting: deque[Event] = deque()
        self._ready = threading.Condition()
        self._closed = False
        self._bytes = 0  # of waiting payloads, as far as they are counted
        self._dropped = 0
        self._error_at = float("-inf")
        self.thread: threading.Thread | None = None
        """The thread that calls the observer."""

    def _observe(self, observer: Observer) -> None:
        self._observer = observer
        self._job_started = listener(observer, "job_started")
        self._job_completed = listener(observer, "job_completed")

    def add(self, observer: Observer) -> None:
        """Add an observer, before the start."""
        self._observe(combined([self._observer, observer]))

    def open(self) -> None:
        """Start the thread."""
        self.thread = threading.Thread(
            target=self._run, name=f"bgjob-events-{self._queue}", daemon=True
        )
        self.thread.start()

    def started(self, clock: ServerClock) -> Callable[[Job], None] | None:
        """Return job_started, for a handler's thread; None if no observer handles it."""
        tell = self._job_started
        if tell is None:
            return None
        needs_times = takes_times(tell)

        def started(job: Job) -> None:
            try:
                if needs_times:
                    tell(job, Started(wait_of(job, clock.now())))
                else:
                    tell(job)
            except BaseException:  # whatever it raises, even SystemExit: the job goes on
                _log.exception("observer failed in job_started")

        return started

    @property
    def waiting(self) -> int:
        """How many events wait for the observer."""
        return len(self._waiting)

    def tell(self, events: Sequence[Event]) -> None:
        """Count events, and queue them for the observer, in order."""
        # Most events are completions.
        others = [e for e in events if type(e) is not Outcome or type(e.result) is not Complete]
        completed = len(events) - len(others)
        if (minutes := self.minutes) is not None:
            minutes.add(events)
        with self._ready:
            if completed:
                self.tally.completed(completed)
            if others:
                self.tally.add(others)
            if self._job_completed is None:
                events = others
                if not events:
                    return
            before = len(self._waiting)
            self._waiting.extend(events)
            if len(self._waiting) > _MOST_TRACEBACKS:
                for event in others:
                    drop_tracebacks(event.result if type(event) is Outcome else None)
            if len(self._waiting) > _UNCOUNTED:
                self._bytes += sum(map(_size, islice(self._waiting, before, None)))
                while len(self._waiting) > _MOST or self._bytes > _MOST_BYTES:
                    self._bytes -= _size(self._waiting.pop())
                    self._dropped += 1
            self._ready.notify()

    def error(self, error: BaseException) -> None:
        """Report an error, at most once a second: an outage repeats its error."""
        now = time.monotonic()
        with self._ready:  # several slots may fail together
            if now < self._error_at + 1:
                return
            self._error_at = now
        self.tell([WorkerError(error)])

    def close(self, timeout: float) -> None:
        """Deliver the waiting events, for at most `timeout` seconds, and end the thread."""
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
            needs_times = completed is not None and takes_times(completed)
            for event in waiting:
                # This loop competes with the handlers for the interpreter. So nearly all events,
                # the completions, are unpacked here.
                try:
                    if completed is not None and type(event) is Outcome:
                        (job, _, _), result, _, _ = event
                        if type(result) is Complete:
                            if job.arg is ELSEWHERE:
                                job = _without_payload(job)
                            if needs_times:
                                completed(job, event)
                            else:
                                completed(job)
                            continue
                    self._tell(event)
                except BaseException:
                    _log.exception("observer failed on %s", _name(event))

    def _tell(self, event: Event) -> None:
        observer = self._observer
        match event:
            case Outcome(Claimed(job), result):
                job = _without_payload(job)
                match result:
                    case Complete():
                        _call(observer.job_completed, event, job)
                    case Retry(_, error):
                        _call(observer.job_will_be_retried, event, job, event.delay, error)
                    case Reschedule():
                        _call(observer.job_rescheduled, event, job, event.delay)
                    case MoveToDlq(error):
                        _call(observer.job_moved_to_dlq, event, job, error)
                    case _:
                        assert_never(result)
            case JobLeaseLost(job):
                _call(observer.job_lease_lost, event, _without_payload(job))
            case JobCancelled(job):
                _call(observer.job_cancelled, event, _without_payload(job))
            case JobTimedOut(job, seconds):
                observer.job_timed_out(_without_payload(job), seconds)
            case QueueIsEmpty(queue):
                observer.queue_is_empty(queue)
            case WorkerError():
                observer.worker_error(event.error)
            case _:
                assert_never(event)


class Started(NamedTuple):
    """The times of a job whose handler is about to be called."""

    waited: float
    ran: None = None


def _call(method: Callable[..., object], times: Times, *about: object) -> None:
    method(*about, *((times,) if takes_times(method) else ()))


def _without_payload(job: Job) -> Job:
    """Return a job for observers, without a large payload."""
    return job._replace(arg=None) if job.arg is ELSEWHERE else job


def _size(event: Event) -> int:
    match event:
        case Outcome(claimed=claimed):
            return len(claimed.job.arg or b"")
        case JobLeaseLost(job) | JobCancelled(job) | JobTimedOut(job):
            return len(job.arg or b"")
        case _:
            return 0


def _name(event: Event) -> str:
    return type(event.result if isinstance(event, Outcome) else event).__name__
