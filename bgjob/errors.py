"""The errors that bgjob raises itself; each text says what to do.

Errors of the database are psycopg's own and pass through unchanged, except for
EnqueueConflictError and PoolerError, which add the remedy.
"""

from collections.abc import Mapping, Sequence
from typing import Self

from psycopg.errors import SerializationFailure


class BgjobError(Exception):
    """The root of every error that bgjob raises itself."""


class QueueRequiredError(BgjobError, ValueError):
    """A queue name is empty."""


class TypeRequiredError(BgjobError, ValueError):
    """A job type is empty."""


class RequestsRequiredError(BgjobError, ValueError):
    """A bulk enqueue had no request."""


class StateRequiredError(BgjobError):
    """A handler has a parameter for a state, and the worker or the call has no state."""


class UnknownTypeError(BgjobError, LookupError):
    """No handler is registered for a job's type; the job goes to the dead-letter table."""


class JobExpiredError(BgjobError):
    """A job was claimed after it had expired; it was not run, and goes to the dead-letter table."""


class JobFailedError(BgjobError):
    """A job that somebody waits for has failed; see Client.wait.

    Attributes:
        id: the job's id.
        error: why it failed, as in the dead-letter table.

    """

    def __init__(self, id: str, error: str) -> None:  # noqa: A002
        self.id, self.error = id, error
        super().__init__(f"job {id!r} has failed: {error}")

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.id, self.error)


class UnknownResultError(BgjobError, LookupError):
    """No result of a job with this id is kept, or will be."""


class PayloadError(BgjobError, ValueError):
    """A payload does not fit its job type; the text names the type and the field.

    The job goes to the dead-letter table.
    """


class JobAlreadyExistsError(BgjobError):
    """A live job has this id already, or a kept result has it; nothing was written.

    Attributes:
        ids: the ids that are taken, in the order of the requests.

    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        super().__init__(
            f"job already exists: {_shown(self.ids)}; choose another id, or treat the job as "
            "enqueued"
        )


class EnqueueConflictError(BgjobError, SerializationFailure):
    """The caller's transaction cannot enqueue a job; repeat the transaction.

    Its isolation level is repeatable read or serializable, and another transaction has taken the
    id since it began. In read committed the same conflict is a JobAlreadyExistsError, and the
    transaction can go on.

    Attributes:
        ids: the ids of the requests.

    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        super().__init__(
            f"this transaction cannot enqueue {_shown(self.ids)}: since it began another one has "
            "taken an id that it does not see (or, under serializable, has written what it read); "
            "roll back and repeat the whole transaction, or begin it in read committed"
        )


class ClientClosedError(BgjobError):
    """The client was closed; make a new one."""


class CanaryRefusedError(BgjobError):
    """No dead job could be tried, or nothing would have run it; none was moved."""


class ScheduleError(BgjobError):
    """Some schedules of a worker failed to enqueue, or were corrected; the others enqueued.

    Passed to the observer's `worker_error`. Each failed schedule is tried again after a
    second, which doubles up to a minute.

    Attributes:
        problems: the errors by the name of the schedule.
        wait: seconds until the others are due again.

    """

    def __init__(self, problems: Mapping[str, Exception], wait: float) -> None:
        self.problems = dict(problems)
        self.wait = wait
        [name, error], *more = self.problems.items()
        others = f"; and {len(more)} more" if more else ""
        super().__init__(f"schedule {name!r}{others}: {error}")


class EmptyQueueError(BgjobError):
    """No job of the queue is due now."""


class UnknownScheduleError(BgjobError, LookupError):
    """The database has no schedule of this name: a worker writes it when it starts."""


class LeaseLostError(BgjobError):
    """A job is not held any more: it ran for longer than its lease, or was cancelled.

    Raised by `do` if its result was not stored, and to a handler by its checkpoint.
    """


class LoopBlockedError(BgjobError):
    """An event loop was blocked for a third of the lease; observed, not raised.

    Passed to the observer's `worker_error`.

    Attributes:
        job_id: the job whose handler blocks it; None if other code on the loop does.
        job_type: the type of that job, or None.

    """

    def __init__(self, job_id: str | None, job_type: str | None, blocked_for: float) -> None:
        self.job_id, self.job_type = job_id, job_type
        culprit = (
            f"the handler of job {job_id!r} of type {job_type!r}"
            if job_id is not None
            else "code outside any job"
        )
        super().__init__(
            f"{culprit} has blocked the event loop for {blocked_for:.3g} s, and its other jobs "
            "wait: await slow calls, or make the handler a plain function"
        )


class JobTimeoutError(BgjobError, TimeoutError):
    """A handler ran for longer than its type's timeout, and the attempt failed."""


class SchemaError(BgjobError):
    """The tables are missing, have another version, or are not granted to the role."""


class PoolerError(BgjobError):
    """Through this pooler bgjob cannot work as it is asked to; the text has the remedy."""


def _shown(ids: Sequence[str]) -> str:
    shown = ", ".join(map(repr, ids[:5]))
    return f"{shown} and {len(ids) - 5} more" if len(ids) > 5 else shown  # noqa: PLR2004
