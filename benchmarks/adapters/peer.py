"""What a system must do to be compared."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

QUEUE = "benchmark"

Ran = Callable[[int], None]
"""What a handler calls first, and once, with the number of its job; from any thread."""


class Peer(ABC):
    """A system, set up as its own documentation recommends for throughput."""

    packages: ClassVar[Sequence[str]]
    """Whose versions are stated; the system's own is the first."""
    settings: ClassVar[Mapping[str, object]]
    """What was chosen, where there was a choice."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    async def setup(self) -> None:
        """Make the tables in an empty database."""

    @abstractmethod
    async def enqueue(self, count: int) -> float:
        """Write jobs numbered from 0 in the fastest documented way; give the seconds it took.

        What has to be done once in a process, such as to connect, does not count.
        """

    @abstractmethod
    def producer(self) -> AbstractAsyncContextManager[Callable[[], Awaitable[object]]]:
        """Give a function that enqueues one job, number 0."""

    @abstractmethod
    def worker(self, ran: Ran) -> AbstractAsyncContextManager[None]:
        """Run a worker until the block is left."""

    @abstractmethod
    def counter(self) -> AbstractAsyncContextManager[Callable[[], Awaitable[int]]]:
        """Give a function that counts the jobs which are not done, from outside the system."""
