"""How jobs join a group: with the job that runs afterwards, or by another job of the group."""

from collections.abc import Sequence
from typing import Any

from bgjob._requests import request_of
from bgjob._sql.groups import hold, open_group
from bgjob._sql.statement import Statement
from bgjob.codec import TypedJob
from bgjob.errors import JobAlreadyExistsError, LeaseLostError
from bgjob.group import Group
from bgjob.job import EnqueueRequest, Job


def grouped(
    then: EnqueueRequest | TypedJob | None, of: Job | None
) -> tuple[Group, Sequence[EnqueueRequest]]:
    """Return a group, and the job that runs afterwards, if that is to be written.

    Raises:
        TypeError, ValueError: as Client.group.

    """
    if (then is None) == (of is None):
        raise TypeError("a group needs then=request, or of=job to add to the group of that job")
    if then is None:
        if not isinstance(of, Job):
            raise TypeError(f"of must be the Job of a handler, not {type(of).__name__}")
        if of.group is None or of.group == of.id:
            raise ValueError(
                f"job {of.id!r} is not one of a group: give the job of a handler whose job.group "
                "is the id of another job"
            )
        return Group(of.group, of=of.id), ()
    request = request_of(then, {})
    if request.delay or request.run_at is not None:
        raise ValueError(
            "then must have no delay and no run_at: it is due when no job of its group is live"
        )
    return Group(request.id), (request,)


def joins(group: Group, then: EnqueueRequest | None) -> Statement[Any]:
    """Return the statement that begins to write a group's jobs; `check_joined` has its answer."""
    if then is not None:
        return open_group(then)
    assert group.of is not None  # noqa: S101 (one of the two; see grouped)
    return hold(group.of, group.id)


def check_joined(group: Group, then: EnqueueRequest | None, answer: object) -> None:
    """Raise the error of a group whose jobs cannot be written.

    Raises:
        JobAlreadyExistsError: the id of `then` is taken.
        LeaseLostError: the job that adds jobs is over.

    """
    if answer:
        return
    if then is not None:
        raise JobAlreadyExistsError([then.id])
    raise LeaseLostError(
        f"job {group.of!r} is over, as another worker has had it or it was cancelled: nothing was "
        f"added to its group {group.id!r}"
    )
