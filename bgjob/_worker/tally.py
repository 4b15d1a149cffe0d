"""The number of a worker's events, and its last error."""

from collections.abc import Sequence
from typing import assert_never

from bgjob._engine.outcome import Event, Outcome
from bgjob.event import JobLeaseLost, JobTimedOut, QueueIsEmpty, WorkerError
from bgjob.result import Complete, MoveToDlq, Reschedule, Retry
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
        completed, retried, rescheduled, dead, lost, timed_out, errors = self.counts
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
                case JobTimedOut():
                    timed_out += 1
                case QueueIsEmpty():
                    pass
                case WorkerError(error):
                    errors += 1
                    self.note = shortened(error)
                case _:
                    assert_never(event)
        self.counts = WorkerCounts(completed, retried, rescheduled, dead, lost, timed_out, errors)


def shortened(error: BaseException) -> str:
    """Return the beginning of an error's text, in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".replace("\0", "\\0").split())
    return text[:_LONGEST_NOTE]
