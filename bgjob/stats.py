"""The number of jobs by queue and type."""

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
