"""The number of a worker's events, its last error, and what ends by queue and type."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, assert_never

from bgjob._engine.outcome import Event, Outcome, wait_of
from bgjob._sql.minutes import Counted
from bgjob.event import JobCancelled, JobLeaseLost, JobTimedOut, QueueIsEmpty, WorkerError
from bgjob.result import Complete, MoveToDlq, Reschedule, Retry
from bgjob.stats import MinuteCounts
from bgjob.workers import WorkerCounts

_LONGEST_NOTE = 200
"""Characters."""


class Tally:
    """Counts the events of a worker; its user locks it."""

    def __init__(self) -> None:
        self.counts = WorkerCounts()
        self.note: str | None = None

    def completed(self, jobs: int) -> None:
        """Count completed jobs."""
        self.counts = self.counts._replace(completed=self.counts.completed + jobs)

    def add(self, events: Sequence[Event]) -> None:
        """Count events that are not completions."""
        completed, retried, rescheduled, dead, lost, timed_out, errors, cancelled = self.counts
        for event in events:
            match event:
                case Outcome(result=result):
                    match result:
                        case Complete():
                            completed += 1
                        case Retry():
                            retried += 1
                        case Reschedule():
                            rescheduled += 1
                        case MoveToDlq():
                            dead += 1
                        case _:
                            assert_never(result)
                case JobLeaseLost():
                    lost += 1
                case JobCancelled():
                    cancelled += 1
                case JobTimedOut():
                    timed_out += 1
                case QueueIsEmpty():
                    pass
                case WorkerError(error):
                    errors += 1
                    self.note = shortened(error)
                case _:
                    assert_never(event)
        self.counts = WorkerCounts(
            completed, retried, rescheduled, dead, lost, timed_out, errors, cancelled
        )


class MinuteCounter:
    """What ended since it was taken the last time, by queue and type. Thread-safe.

    Events of an exchange are counted together: 0.6 µs for each of many (benchmarks/minutes.py).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], MinuteCounts] = {}

    def add(self, events: Iterable[Event]) -> None:
        """Count events."""
        ended: dict[tuple[str, str], list[Outcome[Any]]] = defaultdict(list)
        for event in events:
            if type(event) is Outcome:
                job = event.claimed.job
                ended[job.queue, job.type].append(event)
            elif isinstance(event, JobLeaseLost):
                self._add({(event.job.queue, event.job.type): MinuteCounts(lost=1)})
            elif isinstance(event, JobCancelled):
                self._add({(event.job.queue, event.job.type): MinuteCounts(cancelled=1)})
            elif isinstance(event, JobTimedOut):
                self._add({(event.job.queue, event.job.type): MinuteCounts(timed_out=1)})
        if ended:
            self._add({key: _counts_of(outcomes) for key, outcomes in ended.items()})

    def take(self) -> Counted:
        """Return what was counted, and begin again."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return counts

    def put_back(self, counted: Counted) -> None:
        """Take back what could not be written."""
        self._add(counted)

    def _add(self, counted: Counted) -> None:
        with self._lock:
            for key, counts in counted.items():
                before = self._counts.get(key)
                self._counts[key] = counts if before is None else before.plus(counts)


def _counts_of(outcomes: Sequence[Outcome[Any]]) -> MinuteCounts:
    results = Counter([type(outcome.result) for outcome in outcomes])
    runs = [outcome.ran for outcome in outcomes if outcome.ran is not None]
    waits = [wait_of(o.claimed.job, o.started) for o in outcomes if o.started is not None]
    return MinuteCounts(
        completed=results[Complete],
        retried=results[Retry],
        rescheduled=results[Reschedule],
        dead=results[MoveToDlq],
        runs=len(runs),
        run_seconds=sum(runs),
        longest_run=max(runs, default=0.0),
        wait_seconds=sum(waits),
        longest_wait=max(waits, default=0.0),
    )


def shortened(error: BaseException) -> str:
    """Return the beginning of an error's text, in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".replace("\0", "\\0").split())
    return text[:_LONGEST_NOTE]
