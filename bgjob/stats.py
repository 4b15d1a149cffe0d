"""The numbers of jobs: exact ones by queue and type, and capped ones by queue."""

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
