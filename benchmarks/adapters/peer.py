"""The interface of a system that is compared."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar

QUEUE = "benchmark"

Ran = Callable[[int], None]
"""Each handler calls it first, once, with the number of its job; from any thread."""


class Peer(ABC):
    """A system, set up as its own documentation recommends for throughput."""

    packages: ClassVar[Sequence[str]]
    """The packages whose versions are reported; the system's own is the first."""
    settings: ClassVar[Mapping[str, object]]
    """The settings that were chosen."""

    has_keys: ClassVar[bool] = False
    """Whether jobs may have a key, of which one runs at a time."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    async def setup(self) -> None:
        """Make the tables in an empty database."""

    @abstractmethod
    def make(self, numbers: Sequence[int]) -> Sequence[Any]:
        """Make the objects that are written, a job for each number."""

    @abstractmethod
    def writer(self) -> AbstractAsyncContextManager[Callable[[Sequence[Any]], Awaitable[object]]]:
        """Connect, and yield a function that writes jobs in the fastest documented way."""

    async def enqueue_keyed(self, count: int, keys: int) -> None:
        """Write jobs of which only one with the same key runs at a time, where `has_keys`."""
        raise NotImplementedError

    @abstractmethod
    def producer(self) -> AbstractAsyncContextManager[Callable[[int], Awaitable[object]]]:
        """Yield a function that enqueues one job of this number."""

    @abstractmethod
    def worker(self, ran: Ran) -> AbstractAsyncContextManager[None]:
        """Run a worker until the block ends."""

    @abstractmethod
    def counter(self) -> AbstractAsyncContextManager[Callable[[], Awaitable[int]]]:
        """Yield a function that counts the unfinished jobs, from outside the system."""
