"""The numbers of jobs: exact ones by queue and type, capped ones by queue, and those by minute."""

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple


class QueueStats(NamedTuple):
    """The jobs of one type in one queue, counted at one moment.

    Attributes:
        queue: the queue.
        type: the type.
        due: waiting and due: a worker with a free slot claims them now, unless the
            queue is paused. A dead worker's jobs are due when their lease has ended.
        delayed: waiting for a later time: the end of their delay, or of the wait
            before their next attempt.
        running: claimed by a worker: in a handler, or next in line for a slot.
        dead: in the dead-letter table.
        oldest_due_age: seconds since the oldest due job became due; None if no job
            is due.
        retries: due and delayed jobs that have been attempted before.

    """

    queue: str
    type: str
    due: int
    delayed: int
    running: int
    dead: int
    oldest_due_age: float | None
    retries: int


@dataclass(frozen=True, slots=True)
class CappedCount:
    """A number of jobs, counted up to a cap; its text is `1,000+` if there may be more.

    Attributes:
        number: as many jobs were found.
        is_exact: whether these are all.

    """

    number: int
    is_exact: bool

    def __str__(self) -> str:
        return f"{self.number:,}{'' if self.is_exact else '+'}"


@dataclass(frozen=True, slots=True)
class QueueOverview:
    """The jobs of one queue, counted up to a cap.

    Attributes:
        queue: the queue.
        due: waiting and due: a worker with a free slot claims them now, unless the
            queue is paused. A dead worker's jobs are due when their lease has ended.
        delayed: waiting for a later time.
        running: claimed by a worker.
        waiting_for_keys: put aside until their exclusive key is free. They are not
            among the due or delayed jobs.
        dead: moved to the dead-letter table within the last hour.
        oldest_due_age: seconds since the oldest due job became due; None if no job
            is due. It is exact, whatever the cap.
        is_paused: whether the queue is paused.
        paused_until: the end of its pause; None if it is not paused, or until it is
            resumed.

    """

    queue: str
    due: CappedCount
    delayed: CappedCount
    running: CappedCount
    waiting_for_keys: CappedCount
    dead: CappedCount
    oldest_due_age: float | None
    is_paused: bool
    paused_until: datetime | None

    @property
    def load(self) -> int:
        """The number of jobs that are due or running, for a scaler.

        Unlike that of due jobs alone, it does not fall to 0 while jobs still run.
        """
        return self.due.number + self.running.number


@dataclass(frozen=True, slots=True)
class Overview:
    """What all queues hold, counted up to a cap.

    Attributes:
        at: the time of the count, by the database's clock.
        queues: the queues that have jobs, are paused, or lost a job to the dead-letter
            table within the last hour; sorted by name.

    """

    at: datetime
    queues: tuple[QueueOverview, ...]


class MinuteCounts(NamedTuple):
    """What ended within some minutes.

    Attributes:
        completed: jobs that were completed.
        retried: attempts that failed, and will be repeated.
        rescheduled: jobs whose handlers returned Reschedule.
        dead: jobs that were moved to the dead-letter table.
        lost: jobs whose lease ended while a worker had them.
        timed_out: handlers that exceeded their timeout; the job is also retried or dead.
        cancelled: jobs that were cancelled while a worker had them.
        runs: handlers that ended, in whatever way. A job that dies without a handler
            has none.
        run_seconds: how long all of these took together.
        longest_run: seconds of the longest of them.
        wait_seconds: how long their jobs had been due when they were called, all together.
        longest_wait: seconds of the longest of these.

    """

    completed: int = 0
    retried: int = 0
    rescheduled: int = 0
    dead: int = 0
    lost: int = 0
    timed_out: int = 0
    cancelled: int = 0
    runs: int = 0
    run_seconds: float = 0.0
    longest_run: float = 0.0
    wait_seconds: float = 0.0
    longest_wait: float = 0.0

    @property
    def ended(self) -> int:
        """The number of attempts that ended."""
        return self.completed + self.retried + self.rescheduled + self.dead

    @property
    def failed(self) -> int:
        """The number of attempts that failed: retried and dead ones."""
        return self.retried + self.dead

    @property
    def failure_ratio(self) -> float | None:
        """The share of failed attempts, from 0 to 1; None if none ended."""
        return self.failed / self.ended if self.ended else None

    @property
    def mean_run(self) -> float | None:
        """Seconds that a handler took on average; None if none ended."""
        return self.run_seconds / self.runs if self.runs else None

    @property
    def mean_wait(self) -> float | None:
        """Seconds for which a job had been due, on average; None if no handler ended."""
        return self.wait_seconds / self.runs if self.runs else None

    def plus(self, other: "MinuteCounts") -> "MinuteCounts":
        """Return the counts of both."""
        return MinuteCounts(
            self.completed + other.completed,
            self.retried + other.retried,
            self.rescheduled + other.rescheduled,
            self.dead + other.dead,
            self.lost + other.lost,
            self.timed_out + other.timed_out,
            self.cancelled + other.cancelled,
            self.runs + other.runs,
            self.run_seconds + other.run_seconds,
            max(self.longest_run, other.longest_run),
            self.wait_seconds + other.wait_seconds,
            max(self.longest_wait, other.longest_wait),
        )


@dataclass(frozen=True, slots=True)
class MinuteSeries:
    """What ended of a queue, or of a type, step by step.

    Attributes:
        queue: the queue; None for all of them.
        type: the type; None for all of them.
        steps: the counts of each step, the earliest first; without any where nothing ended.
        total: the counts of all steps together.

    """

    queue: str | None
    type: str | None
    steps: tuple[MinuteCounts, ...]
    total: MinuteCounts


@dataclass(frozen=True, slots=True)
class MinuteReport:
    """What ended recently, as the workers have counted it.

    Attributes:
        since: the begin of the first step.
        now: when it was read, by the database's clock: within the last step, which is
            therefore not complete.
        step: seconds of a step.
        series: one for each queue, or for each queue and type, sorted by both; those
            without counts are left out.

    """

    since: datetime
    now: datetime
    step: float
    series: tuple[MinuteSeries, ...]
