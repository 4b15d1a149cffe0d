"""For tests of jobs: run due jobs, assert which jobs are enqueued, record events.

Nothing here needs a test framework. Fixtures for pytest, with a PostgreSQL
server of their own, are in `bgjob.ext.pytest_plugin`.
"""

import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import orjson

from bgjob._checks import Duration, seconds
from bgjob._sql.execute import run, run_async
from bgjob._sql.views import live_jobs
from bgjob.event import Event
from bgjob.job import EnqueueRequest, Job
from bgjob.testing._draining import Ran, adrain, drain
from bgjob.testing._source import AsyncSource, Source, connected, connected_async

__all__ = [
    "Ran",
    "RecordingObserver",
    "aassert_enqueued",
    "aassert_not_enqueued",
    "adrain",
    "assert_enqueued",
    "assert_not_enqueued",
    "drain",
]

E = TypeVar("E", bound=Event)

_SHOWN = 20  # jobs or events that a failure shows


class RecordingObserver:
    """An observer that records every event, for a test to inspect. Thread-safe.

    Pass it to a Worker, `Worker(..., observer=recording)`, alone or in a list.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._heard = threading.Condition()

    def __call__(self, event: Event, /) -> None:
        """Record an event."""
        with self._heard:
            self._events.append(event)
            self._heard.notify_all()

    @property
    def events(self) -> list[Event]:
        """The events so far, in order."""
        with self._heard:
            return self._events.copy()

    def of(self, event: type[E], *, id: str | None = None) -> list[E]:  # noqa: A002
        """Return the events of this class so far; with an id, those of that job."""
        return [
            each
            for each in self.events
            if isinstance(each, event)
            and (id is None or getattr(getattr(each, "job", None), "id", None) == id)
        ]

    def wait_for(
        self,
        event: type[E],
        *,
        id: str | None = None,  # noqa: A002
        count: int = 1,
        timeout: Duration = 10.0,
    ) -> list[E]:
        """Wait until there are events of this class, and return them.

        Args:
            event: the class, for example bgjob.JobCompleted.
            id: only events of the job with this id.
            count: the least number of events; 1 by default.
            timeout: seconds or a timedelta; 10 s by default, far more than a
                job on an idle worker takes.

        Raises:
            AssertionError: there were fewer; the text shows the recorded events.

        """
        __tracebackhide__ = True
        limit = seconds(timeout, "timeout")
        with self._heard:
            if self._heard.wait_for(lambda: len(self.of(event, id=id)) >= count, limit):
                return self.of(event, id=id)
            wanted = f"{count} {event.__name__}" + ("" if id is None else f" of job {id!r}")
            heard = [_event_text(each) for each in self._events]
        raise AssertionError(
            f"no {wanted} within {limit:g} s; "
            + (f"recorded:\n{_listed(heard)}" if heard else "no event was recorded")
        )

    def reset(self) -> None:
        """Delete the recorded events."""
        with self._heard:
            self._events.clear()


# -- async -----------------------------------------------------------------------------


async def aassert_enqueued(
    source: AsyncSource,
    type: str | None = None,  # noqa: A002
    *,
    queue: str | None = None,
    id: str | None = None,  # noqa: A002
    arg: Any = ...,
    count: int | None = None,
) -> list[Job]:
    """Assert that jobs are enqueued; return the matching ones.

    Enqueued jobs are those that wait, are delayed or run; completed and dead ones are not. The
    result is sorted by queue, priority and due time.

    Args:
        source: the test's own connection, whose uncommitted jobs count, an
            AsyncClient or a connection string.
        type: only jobs of this type; an argument that is not given matches any job.
        queue: only jobs of this queue.
        id: only the job with this id.
        arg: only jobs with this payload, compared as JSON; bytes and None exactly.
        count: the exact number; by default at least one.

    Raises:
        AssertionError: there are none, or another number; the text shows the enqueued jobs.

    """
    __tracebackhide__ = True
    async with connected_async(source) as (conn, _):
        jobs = await run_async(conn, live_jobs())
    return _asserted(jobs, _Wanted(type, queue, id, arg), count)


async def aassert_not_enqueued(
    source: AsyncSource,
    type: str | None = None,  # noqa: A002
    *,
    queue: str | None = None,
    id: str | None = None,  # noqa: A002
    arg: Any = ...,
) -> None:
    """Assert that no matching job is enqueued; the arguments are those of aassert_enqueued."""
    __tracebackhide__ = True
    await aassert_enqueued(source, type, queue=queue, id=id, arg=arg, count=0)


# -- sync: made from the async text by .ci/colours.py; do not edit ---------------------


def assert_enqueued(
    source: Source,
    type: str | None = None,  # noqa: A002
    *,
    queue: str | None = None,
    id: str | None = None,  # noqa: A002
    arg: Any = ...,
    count: int | None = None,
) -> list[Job]:
    """Assert that jobs are enqueued; return the matching ones.

    Enqueued jobs are those that wait, are delayed or run; completed and dead ones are not. The
    result is sorted by queue, priority and due time.

    Args:
        source: the test's own connection, whose uncommitted jobs count, a
            Client or a connection string.
        type: only jobs of this type; an argument that is not given matches any job.
        queue: only jobs of this queue.
        id: only the job with this id.
        arg: only jobs with this payload, compared as JSON; bytes and None exactly.
        count: the exact number; by default at least one.

    Raises:
        AssertionError: there are none, or another number; the text shows the enqueued jobs.

    """
    __tracebackhide__ = True
    with connected(source) as (conn, _):
        jobs = run(conn, live_jobs())
    return _asserted(jobs, _Wanted(type, queue, id, arg), count)


def assert_not_enqueued(
    source: Source,
    type: str | None = None,  # noqa: A002
    *,
    queue: str | None = None,
    id: str | None = None,  # noqa: A002
    arg: Any = ...,
) -> None:
    """Assert that no matching job is enqueued; the arguments are those of assert_enqueued."""
    __tracebackhide__ = True
    assert_enqueued(source, type, queue=queue, id=id, arg=arg, count=0)


# -- both colours ----------------------------------------------------------------------


class _Wanted:
    """The jobs that a test expects."""

    def __init__(
        self,
        type: str | None,  # noqa: A002
        queue: str | None,
        id: str | None,  # noqa: A002
        arg: Any,
    ) -> None:
        self._names = {
            name: value
            for name, value in (("type", type), ("queue", queue), ("id", id))
            if value is not None
        }
        self._arg = arg
        # Encoded as by an enqueue, so that for example a tuple equals the list that it becomes.
        self._payload = None if arg is ... else EnqueueRequest("q", "t", arg).payload

    def fits(self, job: Job) -> bool:
        if any(getattr(job, name) != value for name, value in self._names.items()):
            return False
        if self._arg is ... or job.arg == self._payload:
            return True
        if job.arg is None or self._payload is None or isinstance(self._arg, bytes):
            return False
        try:
            return bool(job.json() == orjson.loads(self._payload))
        except ValueError:
            return False

    def __str__(self) -> str:
        told = [f"{name}={value!r}" for name, value in self._names.items()]
        if self._arg is not ...:
            told.append(f"arg={self._arg!r}")
        return f" with {', '.join(told)}" if told else ""


def _asserted(jobs: Sequence[Job], wanted: _Wanted, count: int | None) -> list[Job]:
    __tracebackhide__ = True
    found = [job for job in jobs if wanted.fits(job)]
    if found if count is None else len(found) == count:
        return found
    raise AssertionError(
        f"{len(found) or 'no'} job{'' if len(found) == 1 else 's'}{wanted} enqueued, not "
        f"{'one at least' if count is None else count or 'none'}; "
        + (
            f"enqueued:\n{_listed([_job_text(job) for job in jobs])}"
            if jobs
            else "nothing is enqueued"
        )
    )


def _job_text(job: Job) -> str:
    arg = "" if job.arg is None else _cut(job.arg.decode(errors="backslashreplace"))
    return f"{job.queue}: {job.type}({arg}), id {job.id!r}, due {job.next_run_at.isoformat()}"


def _event_text(event: Event) -> str:
    job: Job | None = getattr(event, "job", None)
    about = [] if job is None else [f"{job.type} {job.id!r}, attempt {job.attempt}"]
    # Times would make each run's text another one.
    others = [name for name in event.__slots__ if name not in {"job", "ran", "waited"}]
    about += [_cut(repr(getattr(event, name))) for name in others]
    return f"{type(event).__name__}({', '.join(about)})"


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(f"  {line}" for line in [*lines[:_SHOWN], *more])


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"  # noqa: PLR2004
