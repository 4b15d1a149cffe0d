"""What is in the tables, counted by queue and type."""

from typing import NamedTuple


class QueueStats(NamedTuple):
    """The jobs of one type in one queue, counted at one moment.

    Attributes:
        queue: the queue.
        type: the type.
        due: waiting, and due: a worker with a free slot takes them now, unless the
            queue is paused. What a dead worker held is due when its lease has ended.
        delayed: waiting for a time to come: of their delay, or of their next attempt.
        running: claimed by a worker, and held: in a handler, or next in line for one.
        dead: in the dead-letter table.
        oldest_due_age: seconds for which the oldest of the due has been due, None
            where there is none.
        retries: those of the due and the delayed that have been tried before.

    """

    queue: str
    type: str
    due: int
    delayed: int
    running: int
    dead: int
    oldest_due_age: float | None
    retries: int
