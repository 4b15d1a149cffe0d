"""The part of an enqueue that does not depend on the driver."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal, TypeAlias

from bgjob.codec import TypedJob
from bgjob.errors import JobAlreadyExistsError, RequestsRequiredError
from bgjob.job import EnqueueOptions, EnqueueRequest

OnConflict: TypeAlias = Literal["raise", "skip"]
"""What a bulk enqueue does with a job whose id is taken."""

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


def in_chunks(requests: Iterable[EnqueueRequest]) -> Iterator[list[EnqueueRequest]]:
    """Divide the requests of a bulk enqueue; raise RequestsRequiredError if there are none."""
    pending = iter(requests)
    first = list(islice(pending, _CHUNK))
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
