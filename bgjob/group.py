"""Groups: jobs, and one that runs when none of them is live any more."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Unpack

from bgjob._requests import request_of
from bgjob.codec import TypedJob
from bgjob.job import EnqueueOptions, EnqueueRequest

__all__ = ["Group"]


class Group:
    """The jobs of a group, which the end of its block writes; see `Client.group`.

    Attributes:
        id: the id of the group: that of the job that runs afterwards.
        of: the id of the job of the group that adds these; None for those that begin a group.

    Belongs to one thread or task.
    """

    def __init__(self, id: str, *, of: str | None = None) -> None:  # noqa: A002
        self.id = id
        self.of = of
        self._parts: list[Iterable[EnqueueRequest]] = []
        self._is_open = True

    def enqueue(self, request: EnqueueRequest | TypedJob, **options: Unpack[EnqueueOptions]) -> str:
        """Add a job, and return its id; the end of the block writes it.

        Args:
            request: the job, as for Client.enqueue.
            options: those of a typed job, as for Client.enqueue.

        Raises:
            QueueRequiredError, PayloadError, TypeError, ValueError: as Client.enqueue.
            RuntimeError: the block has ended.

        """
        request = request_of(request, options)
        self._add([request])
        return request.id

    def enqueue_many(self, requests: Iterable[EnqueueRequest]) -> None:
        """Add jobs; the end of the block writes them.

        Args:
            requests: the jobs; none adds nothing. They are consumed at the end of the block,
                in chunks of 10,000, so that a generator of a million needs bounded memory.
                Make those of typed jobs with EnqueueRequest.of.

        Raises:
            RuntimeError: the block has ended.

        """
        self._add(requests)

    def _add(self, requests: Iterable[EnqueueRequest]) -> None:
        if not self._is_open:
            raise RuntimeError(
                f"group {self.id!r} has been written: add its jobs within the block; a job of the "
                "group adds more with client.group(of=job)"
            )
        self._parts.append(requests)

    def close(self, *first: EnqueueRequest) -> Iterable[EnqueueRequest]:
        """End the group; return its jobs after these: a list if they can be read twice."""
        self._is_open = False
        parts: Sequence[Iterable[EnqueueRequest]] = [first, *self._parts]
        jobs = chain.from_iterable(parts)
        return list(jobs) if all(isinstance(part, list | tuple) for part in parts) else jobs
