"""The errors bgjob raises itself; each says what to do about it.

Errors of the database are psycopg's own and pass through unchanged, but for one that says more.
"""

from collections.abc import Mapping, Sequence

from psycopg.errors import SerializationFailure


class BgjobError(Exception):
    """The root of every error that bgjob raises itself."""


class QueueRequiredError(BgjobError, ValueError):
    """A queue name is empty."""


class TypeRequiredError(BgjobError, ValueError):
    """A job type is empty."""


class RequestsRequiredError(BgjobError, ValueError):
    """A bulk enqueue was given no request."""


class StateRequiredError(BgjobError):
    """A handler asks for a state, and the worker or the call has none to give."""


class UnknownTypeError(BgjobError, LookupError):
    """No handler is registered for a job's type; the job goes to the dead-letter table."""


class PayloadError(BgjobError, ValueError):
    """A payload does not fit its job type; the text names the type and the field.

    The job goes to the dead-letter table.
    """


class JobAlreadyExistsError(BgjobError):
    """A live job has this id already; nothing was written.

    Attributes:
        ids: the ids that are taken, in the order in which they were asked for.

    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        super().__init__(
            f"job already exists: {_shown(self.ids)}; choose another id, or treat the job as "
            "enqueued"
        )


class EnqueueConflictError(BgjobError, SerializationFailure):
    """The caller's transaction cannot enqueue a job, and has to be repeated.

    Its isolation level is repeatable read or serializable, and another transaction has taken the
    id since it began. In read committed that is a JobAlreadyExistsError, and nothing is lost.

    Attributes:
        ids: the ids that were to be enqueued.

    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        super().__init__(
            f"this transaction cannot enqueue {_shown(self.ids)}: since it began another one has "
            "taken an id that it does not see (or, under serializable, has written what it read); "
            "roll back and repeat the whole transaction, or begin it in read committed"
        )


class ClientClosedError(BgjobError):
    """The client was closed; a new one has to be made."""


class ScheduleError(BgjobError):
    """Some schedules of a worker could not be enqueued, or had to be set right; the others were.

    Told to the observer (`worker_error`). Each is tried again after a second, which
    doubles up to a minute.

    Attributes:
        problems: what happened, by the name of the schedule.
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
    """No schedule of this name is in the database: no worker that has it was started yet."""


class LeaseLostError(BgjobError):
    """A job ran for longer than its lease, and its result was not applied."""


class LoopBlockedError(BgjobError):
    """An event loop has not turned for a third of the lease; told to the observer, not raised.

    Attributes:
        job_id: whose handler blocks it; None if it is other code on the caller's loop.
        job_type: the type of that job, or None.

    """

    def __init__(self, job_id: str | None, job_type: str | None, blocked_for: float) -> None:
        self.job_id, self.job_type = job_id, job_type
        culprit = (
            f"the handler of job {job_id!r} of type {job_type!r}"
            if job_id is not None
            else "code that is no job's"
        )
        super().__init__(
            f"{culprit} has blocked the event loop for {blocked_for:.3g} s; the jobs beside it "
            "wait: await what takes long, or make it a plain handler"
        )


class JobTimeoutError(BgjobError, TimeoutError):
    """A handler ran for longer than its type's timeout; the attempt has failed."""


class SchemaError(BgjobError):
    """The tables are missing, not this library's version, or not granted to the role."""


def _shown(ids: Sequence[str]) -> str:
    shown = ", ".join(map(repr, ids[:5]))
    return f"{shown} and {len(ids) - 5} more" if len(ids) > 5 else shown  # noqa: PLR2004
