"""The worker's own row in bgjob_worker: written at its start, every 10 s, and at its end.

It is for people. No decision of any worker depends on it: what a dead worker held is freed by its
leases. The row costs no connection and no thread: the control thread of one queue writes it
between two exchanges, that of the first queue that has not ended.

If the table or a privilege is missing, the observer is told once, and the worker works without
a row. It looks again every few minutes.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from secrets import randbelow
from time import monotonic
from typing import ClassVar, Protocol, TypeVar

from psycopg.errors import InsufficientPrivilege, UndefinedColumn, UndefinedTable

from bgjob import schema
from bgjob._sql.session import Lack
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob._sql.tokens import Tokens
from bgjob._sql.workers import Beat, Registration, beat, register, registry_lacks
from bgjob._worker.events import Events
from bgjob._worker.tally import shortened
from bgjob.errors import BgjobError, SchemaError
from bgjob.event import WorkerError
from bgjob.workers import NO_TABLE

T = TypeVar("T")

EVERY = 10.0
"""Seconds between two beats."""

LOOK_AGAIN = 300.0
"""Seconds after which a worker without a table or a privilege tries again."""

UNAVAILABLE = (SchemaError, UndefinedTable, UndefinedColumn, InsufficientPrivilege)
"""The errors of a table that decides nothing, without which the worker works."""

_LONGEST = 5
"""The jobs that have run longest, in a row."""

_LONGEST_TEXT = 200
"""The most characters of a text that the program gives."""

RELEASE = "BGJOB_RELEASE"
"""The environment variable with the program's version."""


class Ask(Protocol):
    """Runs a statement on the connection of a queue."""

    def __call__(self, statement: Statement[T], /) -> T: ...


class Registry:
    """A worker's row. Each control thread uses it; one at a time writes.

    Args:
        queues: the slots of each queue.
        types: returns the job types that have handlers.
        unknown_for: the seconds within which jobs of other types are put back.
        lease: seconds.
        release: the program's version.
        tokens: receives the number of the row.
        events: what the worker counts, and the observer that is told.

    """

    program: ClassVar[str | None] = None
    """What the process runs, if its main script does not say it."""

    def __init__(
        self,
        queues: Mapping[str, int],
        types: Callable[[], Iterable[str]],
        *,
        unknown_for: float | None = None,
        lease: float,
        release: str | None,
        tokens: Tokens,
        events: Events,
    ) -> None:
        self._queues = queues
        self._types = types
        self._unknown_for = unknown_for
        self._lease = lease
        self._release = release
        self._tokens = tokens
        self._events = events
        self._lock = threading.Lock()
        self._alive: dict[str, Callable[[], Iterable[Claimed]]] = {}
        self._writer: str | None = None  # the queue whose thread writes
        self._due_at = inf
        self._has_beaten = False  # since the row was written
        self._is_told = False
        self._failure: BaseException | None = None

    def enter(self, queue: str, running: Callable[[], Iterable[Claimed]]) -> None:
        """Record that a queue is connected.

        Args:
            queue: its name.
            running: returns the jobs in its handlers, to any thread.

        """
        with self._lock:
            self._alive[queue] = running
            self._choose()

    def _choose(self) -> None:
        self._writer = next((queue for queue in self._queues if queue in self._alive), None)

    def due_at(self, queue: str) -> float:
        """When this queue's control thread has to write the row; inf if another one does."""
        return self._due_at if queue == self._writer else inf

    def write(self, ask: Ask, *, is_stopping: bool = False) -> None:
        """Write the row, for the first time or again.

        Raises:
            psycopg.Error: the database's; the next beat comes all the same.

        """
        pause = EVERY
        try:
            if self._tokens.number is None:
                self._begin(ask)
                # Workers that start together must not beat together.
                pause *= randbelow(1000) / 1000
            elif self._beat(ask, "stopping" if is_stopping else "working"):
                self._has_beaten = True
            else:  # someone has removed it, or a policy hides it
                self._tokens.number = None
                if not self._has_beaten:
                    raise SchemaError("its row in bgjob_worker vanishes, or is hidden from it")
                self._begin(ask)
        except UNAVAILABLE as error:
            self._tokens.number = None
            pause = LOOK_AGAIN
            if not self._is_told:
                self._is_told = True
                told = BgjobError(
                    f"`bgjob workers` does not list this worker, which works all the same: {error}"
                )
                told.__cause__ = error
                self._events.tell([WorkerError(told)])
        finally:
            self._due_at = monotonic() + pause

    def leave(self, queue: str, ask: Ask, failure: BaseException | None) -> None:
        """Record that a queue has ended; the last one writes that the worker has.

        Args:
            queue: its name.
            ask: runs a statement.
            failure: why the queue ended on its own.

        Raises:
            psycopg.Error: the database's.

        """
        with self._lock:
            self._failure = self._failure or failure
            is_last = self._alive.pop(queue, None) is not None and not self._alive
            self._choose()
        if is_last and self._tokens.number is not None:
            if self._failure is not None:
                self._events.tally.note = shortened(self._failure)
            self._due_at = inf
            self._beat(ask, "ended" if self._failure is None else "failed")
            self._tokens.number = None

    def _begin(self, ask: Ask) -> None:
        check_table(ask(registry_lacks()), NO_TABLE)
        self._tokens.number = ask(register(self._registration()))
        self._has_beaten = False

    def _beat(self, ask: Ask, state: str) -> bool:
        number = self._tokens.number
        assert number is not None  # noqa: S101 (the callers check)
        with self._lock:
            alive = self._alive.copy()
        running = {queue: list(alive[queue]()) for queue in self._queues if queue in alive}
        longest = sorted((claimed for jobs in running.values() for claimed in jobs), key=_by_token)[
            :_LONGEST
        ]
        tally = self._events.tally
        return ask(
            beat(
                number,
                Beat(
                    state,
                    [len(running.get(queue, ())) for queue in self._queues],
                    tally.counts,
                    [(claimed.job.id, claimed.token) for claimed in longest],
                    tally.note,
                ),
            )
        )

    def _registration(self) -> Registration:
        return Registration(
            host=_text(socket.gethostname()),
            pid=os.getpid(),
            program=program(),
            release=self._release,
            version=_version(),
            queues=self._queues,
            types=sorted(self._types()),
            lease=self._lease,
            every=EVERY,
            unknown_for=self._unknown_for,
        )


def check_table(lacks: Sequence[Lack], no_table: str) -> None:
    """Raise SchemaError if a table, or what a worker needs of it, is missing."""
    if lacks and all(lack.is_absent for lack in lacks):
        raise SchemaError(no_table)
    schema.check_lacks(lacks)


def _by_token(claimed: Claimed) -> int:
    return claimed.token


def program() -> str:
    """Return what this process runs."""
    return _text(Registry.program or Path(sys.argv[0] if sys.argv else "").name)


def release(given: str | None) -> str | None:
    """Return the program's version: the given one, or that of the environment, if it has one."""
    chosen = os.environ.get(RELEASE) if given is None else given
    return _text(chosen) if chosen else None


def _text(text: str) -> str:
    return text.replace("\0", "")[:_LONGEST_TEXT]


def _version() -> str:
    # The package imports this module, so this module cannot import the package.
    return str(sys.modules["bgjob"].__version__)
