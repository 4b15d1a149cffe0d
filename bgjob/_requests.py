"""The part of an enqueue that does not depend on the driver."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, TypeAlias, cast, get_args

from bgjob._checks import Duration, seconds
from bgjob.codec import TypedJob
from bgjob.errors import JobAlreadyExistsError, RequestsRequiredError
from bgjob.job import EnqueueOptions, EnqueueRequest

OnConflict: TypeAlias = Literal["raise", "skip", "replace"]
"""What an enqueue does if a live job has the id: raise an error, write nothing, or let the new
request replace it."""

OnEnqueue: TypeAlias = Callable[
    [Iterable[EnqueueRequest]], AbstractContextManager[Iterable[EnqueueRequest]]
]
"""Wraps an enqueue: a function of its requests that returns a context manager, within which they
are written. It yields the requests to write: as many, in the same order, for example with more
headers. One request of an enqueue; those of a bulk enqueue, which it must not consume before
they are written. What it raises, the enqueue raises, and nothing is written; an error of the
enqueue passes through it, and it must not suppress that. Called in the thread or task of the
caller, by a Client and by an AsyncClient alike; from any thread."""

_CHUNK = 10_000
"""Requests in one statement, so that a million in one call need bounded memory."""


def request_of(request: EnqueueRequest | TypedJob, options: EnqueueOptions) -> EnqueueRequest:
    """Return the request of a job, which may be typed and have options."""
    if not isinstance(request, EnqueueRequest):
        return EnqueueRequest.of(request, **options)
    if options:
        raise TypeError(
            f"{', '.join(options)} given together with a request: these options are for typed "
            "jobs; set them on the EnqueueRequest"
        )
    return request


def check_on_conflict(on_conflict: OnConflict) -> None:
    """Raise ValueError unless it is one of the three."""
    if on_conflict not in get_args(OnConflict):
        raise ValueError(f"on_conflict must be 'raise', 'skip' or 'replace', not {on_conflict!r}")


def debounced(
    request: EnqueueRequest | TypedJob,
    delay: Duration,
    at_most: Duration | None,
    options: Mapping[str, Any],
) -> tuple[EnqueueRequest, float | None]:
    """Return the request of a debounced job, and its limit in seconds.

    Raises:
        TypeError: a typed job without an id.
        ValueError: the request has a due time, or the limit is below the delay.

    """
    if not isinstance(request, EnqueueRequest) and "id" not in options:
        raise TypeError(
            "id is required: debounce(..., id=...) moves the due time of the job with that id"
        )
    request = request_of(request, cast("EnqueueOptions", options))
    if request.delay or request.run_at is not None:
        raise ValueError("the request must have no delay and no run_at: debounce has the delay")
    wait = seconds(delay, "delay")
    limit = None if at_most is None else seconds(at_most, "at_most")
    if limit is not None and limit < wait:
        raise ValueError(f"at_most ({at_most}) must not be below the delay ({delay})")
    return replace(request, delay=wait), limit


def in_chunks(
    requests: Iterable[EnqueueRequest], *, may_be_none: bool = False
) -> Iterator[list[EnqueueRequest]]:
    """Divide the requests of a bulk enqueue; raise RequestsRequiredError if there are none."""
    pending = iter(requests)
    first = list(islice(pending, _CHUNK))
    if not first and may_be_none:
        return iter(())
    if not first:
        raise RequestsRequiredError("requests are required: a bulk enqueue needs at least one")

    def rest() -> Iterator[list[EnqueueRequest]]:
        yield first
        while chunk := list(islice(pending, _CHUNK)):
            yield chunk

    return rest()


def placed(
    chunk: list[EnqueueRequest], written: set[str], on_conflict: OnConflict
) -> list[str | None]:
    """Return the ids in the order of the requests, None for each that was not written.

    Raises:
        JobAlreadyExistsError: one was not written, and `on_conflict` is "raise".

    """
    if on_conflict == "replace":
        return [request.id for request in chunk]
    ids: list[str | None] = []
    taken = []
    for request in chunk:
        if request.id in written:
            written.discard(request.id)  # a second request with this id was not written
            ids.append(request.id)
        else:
            taken.append(request.id)
            ids.append(None)
    if taken and on_conflict == "raise":
        raise JobAlreadyExistsError(taken)
    return ids


def wrappers(on_enqueue: OnEnqueue | Sequence[OnEnqueue]) -> tuple[OnEnqueue, ...]:
    """Return what wraps each enqueue, the outermost first; raise TypeError if it is no function."""
    each = (*on_enqueue,) if isinstance(on_enqueue, Sequence) else (on_enqueue,)
    for wrapper in each:
        if not callable(wrapper):
            raise TypeError(
                "on_enqueue must be a function of requests that returns a context manager, or a "
                f"sequence of such, not {wrapper!r}"
            )
    return each


@contextmanager
def wrapped(
    on_enqueue: Sequence[OnEnqueue], requests: Iterable[EnqueueRequest]
) -> Iterator[Iterable[EnqueueRequest]]:
    """Yield the requests to write, within all wrappers."""
    with ExitStack() as stack:
        for wrapper in on_enqueue:
            manager = wrapper(requests)
            if not isinstance(manager, AbstractContextManager):
                raise TypeError(
                    f"on_enqueue {_name(wrapper)} returned {type(manager).__name__}, not a context "
                    "manager: write it as a generator with one yield, and decorate it with "
                    "contextlib.contextmanager"
                )
            requests = stack.enter_context(manager)
            if not isinstance(requests, Iterable):
                raise TypeError(
                    f"on_enqueue {_name(wrapper)} must yield the requests to write, not "
                    f"{type(requests).__name__}"
                )
        yield map(_checked, requests)
        return
    raise RuntimeError("an on_enqueue suppressed the error of an enqueue: it must raise it again")


def _checked(request: EnqueueRequest) -> EnqueueRequest:
    if not isinstance(request, EnqueueRequest):
        raise TypeError(
            f"an on_enqueue yielded {type(request).__name__}: it must yield requests, for example "
            "[request.with_headers({...}) for request in requests]"
        )
    return request


def only(requests: Iterable[EnqueueRequest]) -> EnqueueRequest:
    """Return the one request that wrappers made of one."""
    found = list(requests)
    if len(found) != 1:
        raise TypeError(f"an on_enqueue yielded {len(found)} requests for one: it must yield one")
    return found[0]


def _name(wrapper: OnEnqueue) -> str:
    return getattr(wrapper, "__qualname__", None) or repr(wrapper)
