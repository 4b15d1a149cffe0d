"""Observers: an instance, a function, several of them, or only some of the events."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias, cast

from bgjob._logger import log as _log
from bgjob.event import (
    Event,
    JobCancelled,
    JobCompleted,
    JobLeaseLost,
    JobMovedToDlq,
    JobRescheduled,
    JobStarted,
    JobTimedOut,
    JobWillBeRetried,
    QueueIsEmpty,
    WorkerError,
)
from bgjob.job import Job, check_name
from bgjob.observer import (
    LoggingObserver,
    NoopObserver,
    Observer,
    WatchesWorker,
    given_times,
    takes_times,
)

Listener: TypeAlias = Observer | Callable[[Event], object]
"""An Observer, or a plain function of an event."""

Observers: TypeAlias = Listener | Iterable[Listener]
"""One observer or function, or several."""

_METHODS: Mapping[str, Callable[..., Event]] = {
    "job_started": JobStarted,
    "job_completed": JobCompleted,
    "job_rescheduled": JobRescheduled,
    "job_will_be_retried": JobWillBeRetried,
    "job_moved_to_dlq": JobMovedToDlq,
    "job_lease_lost": JobLeaseLost,
    "job_cancelled": JobCancelled,
    "job_timed_out": JobTimedOut,
    "queue_is_empty": QueueIsEmpty,
    "worker_error": WorkerError,
}

_Tell: TypeAlias = Callable[..., object]


def combined(observer: Observers | None) -> Observer:
    """Return one observer that has every method, and passes events to all.

    An event without an observer stays NoopObserver's own method: it costs nothing.

    Raises:
        TypeError: an item is not an observer.

    """
    if observer is None:
        return LoggingObserver()
    if not _is_observer(observer) and isinstance(observer, Iterable) and not callable(observer):
        return _Several([_one(each) for each in observer])
    return _one(cast("Listener", observer))


def only(
    observer: Observer | Callable[[Any], object],
    /,
    *events: type[Event],
    queue: str | Collection[str] | None = None,
    type: str | Collection[str] | None = None,  # noqa: A002
    schedule: str | Collection[str] | None = None,
) -> Observer:
    """Restrict an observer to some events, queues, types or schedules; others cost nothing.

    Args:
        observer: an Observer, or a function of an event.
        events: the classes of the events to pass on, for example JobMovedToDlq; by
            default all.
        queue: only jobs of this queue or these queues, and QueueIsEmpty of them.
        type: only jobs of this type or these types.
        schedule: only jobs that this schedule or these schedules enqueued.

    Of several filters all must match. Events without a job do not match filters of
    jobs: WorkerError matches none of the three, QueueIsEmpty neither a type nor a
    schedule.

    Raises:
        TypeError: not an observer, or not an event class.
        ValueError: an invalid name.

    """
    for event in events:
        if event not in _METHODS.values():
            raise TypeError(
                f"{event!r} is not an event: pass classes such as bgjob.JobCompleted, and names as "
                "queue=, type= or schedule="
            )
    return _Only(_one(observer), events, _names("queue", queue), _names("type", type), schedule)


def listener(observer: Observer, method: str) -> _Tell | None:
    """Return the observer's method; None if it has none, or one that does nothing."""
    found: _Tell | None = getattr(observer, method, None)
    body = getattr(found, "__func__", None)
    silent = body is getattr(NoopObserver, method) or body is getattr(Observer, method)
    return None if silent else found


def watchers(observer: Observer) -> list[WatchesWorker]:
    """Return those of an observer's parts that also see how the worker is."""
    match observer:
        case _Several(parts=parts):
            return [watcher for part in parts for watcher in watchers(part)]
        case _Only(observer=part):
            return watchers(part)
        case WatchesWorker():
            return [observer]
        case _:
            return []


class _Several(NoopObserver):
    """Passes events to several observers; one that raises does not affect the others."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.parts = observers = list(observers)
        for method in _METHODS:
            heard = [tell for o in observers if (tell := listener(o, method)) is not None]
            if heard:
                setattr(self, method, heard[0] if len(heard) == 1 else _each(method, heard))


class _Function(NoopObserver):
    """Passes events to a function."""

    def __init__(self, function: Callable[[Event], object]) -> None:
        for method, event in _METHODS.items():
            setattr(self, method, _made(event, function))


class _Only(NoopObserver):
    """Passes on some of the events."""

    def __init__(
        self,
        observer: Observer,
        events: Collection[type[Event]],
        queues: frozenset[str] | None,
        types: frozenset[str] | None,
        schedule: str | Collection[str] | None,
    ) -> None:
        self.observer = observer
        schedules = _names("schedule", schedule)
        ids = None if schedules is None else frozenset(f"schedule:{name}" for name in schedules)
        prefixes = tuple(f"{id_}:" for id_ in ids or ())

        def fits(job: Job) -> bool:
            return (
                (queues is None or job.queue in queues)
                and (types is None or job.type in types)
                and (ids is None or job.id in ids or job.id.startswith(prefixes))
            )

        for method, event in _METHODS.items():
            tell = listener(observer, method)
            if tell is None or (events and event not in events):
                continue
            if queues is types is ids is None:
                setattr(self, method, tell)
            elif event is QueueIsEmpty:
                if queues is not None and types is ids is None:
                    setattr(self, method, _where(queues.__contains__, tell))
            elif event is not WorkerError:
                setattr(self, method, _where(fits, tell))


def _each(method: str, heard: list[_Tell]) -> _Tell:
    """Return what calls several methods; those that take times receive them."""
    timed = [(one, takes_times(one)) for one in heard]

    def tell(*args: object) -> None:
        for one in heard:
            try:
                one(*args)
            except BaseException:  # whatever it raises, even SystemExit
                _log.exception("observer failed in %s", method)

    @given_times
    def tell_with_times(*args: object) -> None:
        without = args[:-1]
        for one, takes in timed:
            try:
                one(*(args if takes else without))
            except BaseException:
                _log.exception("observer failed in %s", method)

    return tell_with_times if any(takes for _, takes in timed) else tell


def _made(event: Callable[..., Event], function: Callable[[Event], object]) -> _Tell:
    """Return what calls a function with the event's value."""
    # The first two, which most events are, without the arguments of the last.
    if event is JobStarted:
        return given_times(lambda job, times: function(JobStarted(job, times.waited)))
    if event is JobCompleted:
        return given_times(lambda job, times: function(JobCompleted(job, times.ran, times.waited)))
    if event in (QueueIsEmpty, WorkerError, JobTimedOut):
        return lambda *args: function(event(*args))

    return given_times(
        lambda *args: function(event(*args[:-1], args[-1].ran, args[-1].waited)),
    )


def _where(fits: Callable[[Any], bool], tell: _Tell) -> _Tell:
    def chosen(about: Any, *rest: object) -> None:
        if fits(about):
            tell(about, *rest)

    return given_times(chosen) if takes_times(tell) else chosen


def _one(observer: object) -> Observer:
    if inspect.isclass(observer):
        raise TypeError(f"an observer is an instance, not a class: pass {observer.__name__}()")
    if _is_observer(observer):
        whole = all(hasattr(observer, method) for method in _METHODS)
        some = cast("Observer", observer)
        return some if whole else _Several([some])
    if not callable(observer):
        raise TypeError(
            f"{observer!r} is not an observer: pass an Observer, a function of an event, "
            "or a list of them"
        )
    if inspect.iscoroutinefunction(observer) or inspect.iscoroutinefunction(
        type(observer).__call__
    ):
        raise TypeError(
            f"{observer!r} cannot observe: events come on threads; pass a plain function"
        )
    return _Function(observer)


def _is_observer(observer: object) -> bool:
    return any(hasattr(observer, method) for method in _METHODS)


def _names(what: str, names: str | Collection[str] | None) -> frozenset[str] | None:
    if names is None:
        return None
    one = isinstance(names, str) or not isinstance(names, Iterable)
    chosen: frozenset[Any] = frozenset([names] if one else names)
    if not chosen:
        raise ValueError(f"{what} names nothing: pass a name, several, or None for all")
    for name in chosen:
        check_name(what, name)
    return chosen
