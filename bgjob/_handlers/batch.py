"""Handlers of several jobs at once: what their answer means for each of the jobs.

A batch handler has two routes. The Mux's ordinary one calls it with one job, for `Client.do` and
tests. A BatchRoute calls it with a list, and judges its answer job by job, by the same rules as
that of a handler of single jobs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bgjob._handlers.call import Calling
from bgjob._handlers.route import Route, has_bad_value
from bgjob._logger import log as _log
from bgjob.job import Job
from bgjob.result import Complete, MoveToDlq, Reschedule, Result

_KEPT = (Complete, Reschedule, MoveToDlq)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a batch handler has answered."""

    results: dict[str, Result]
    """The result of each job, by its id, in the order of the jobs."""
    undone: set[str] = field(default_factory=set)
    """The ids of jobs that failed, or have a Retry: a transaction rolls back."""
    strangers: list[object] = field(default_factory=list)
    """Keys that are not the id of a job of the batch."""


@dataclass(frozen=True, slots=True)
class BatchRoute(Route):
    """The route of a batch handler; its handler takes a list of jobs."""

    expected: ClassVar[str] = (
        "Complete(), Retry(), Reschedule(), MoveToDlq(), None, or a mapping from ids to these"
    )

    def answer(self, jobs: Sequence[Job], returned: object) -> Answer:
        """Turn what the handler returned into the results of its jobs."""
        has_value = isinstance(returned, Complete) and returned.value is not None
        # The same for all, whatever they are.
        if returned is None or (isinstance(returned, _KEPT) and not has_value):
            result = self.judge(jobs[0], returned)
            return Answer(dict.fromkeys([job.id for job in jobs], result))
        each: dict[str, object]
        strangers: list[object] = []
        if isinstance(returned, Mapping):
            each = {job.id: returned.get(job.id) for job in jobs}
            strangers = [key for key in returned if key not in each]
        else:
            each = dict.fromkeys([job.id for job in jobs], returned)
        results = {job.id: self.judge(job, each[job.id]) for job in jobs}
        undone = {
            id_
            for id_, it in each.items()
            if not (it is None or isinstance(it, _KEPT)) or has_bad_value(it, results[id_])
        }
        return Answer(results, undone, strangers)


def strangers_text(calling: Calling, strangers: Sequence[object]) -> str:
    """Return what to say of ids that a batch handler answered for, and that it was not given."""
    shown = ", ".join(repr(key) for key in strangers[:5])
    more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""  # noqa: PLR2004
    return (
        f"{calling.name} returned results for {shown}{more}, which are not ids of its jobs; the "
        "others are stored: let the mapping have the ids of the jobs, job.id, as its keys"
    )


def one_by_one(calling: Calling, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the callable that passes a batch handler one job, for a route of single jobs."""

    def only(job: Job, returned: object) -> object:
        if not isinstance(returned, Mapping):
            return returned
        if strangers := [key for key in returned if key != job.id]:
            _log.warning("%s", strangers_text(calling, strangers))
        return returned.get(job.id)

    if calling.is_coroutine:

        async def awaited(job: Job, *conn: object) -> object:
            return only(job, await call([job], *conn))

        return awaited

    def called(job: Job, *conn: object) -> object:
        return only(job, call([job], *conn))

    return called
