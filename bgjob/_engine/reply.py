"""What the server says: its answer to an exchange, and notifications."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from bgjob._sql.claims import Group, Others, Swept
from bgjob._sql.keys import Blocked, Woken
from bgjob._sql.limits import Ration
from bgjob._sql.notices import CANCELLED, EVERYTHING, LATER, LockAnswer
from bgjob._sql.statement import Statement
from bgjob._sql.survey import Line, OpenTransactions, Stray
from bgjob.job import Job

T = TypeVar("T")

_NOTHING_SWEPT = Swept([], 0)
_NO_GROUP = Group([], 0)
_NOTHING_BLOCKED = Blocked([], "")


@dataclass(slots=True)
class Reply:
    """The server's answer to an exchange."""

    settled: set[str] = field(default_factory=set)
    extended: set[str] = field(default_factory=set)
    lock_answer: str | None = None
    has_post: bool = True
    """Whether the worker has a post, if it asked for one."""
    seat: int | None = None
    """The key of the seat that it has, if it asked for a post."""
    has_spares: bool = False
    """Whether another worker has a seat, after a try for the lock."""
    claimed: list[Job] = field(default_factory=list)
    seen: OpenTransactions | None = None
    swept: Swept = _NOTHING_SWEPT
    lines: list[Line] = field(default_factory=list)
    group: Group = _NO_GROUP
    acquired: Mapping[tuple[str, int], int | None] = field(default_factory=dict)
    """The slots that this worker may use of the key of a job, by id and token; see `acquire`."""
    woken: list[Woken] = field(default_factory=list)
    blocked: Blocked = _NOTHING_BLOCKED
    strays: list[Stray] = field(default_factory=list)
    barred: Sequence[str] = ()
    barred_keys: Sequence[str] = ()
    cancelled: Collection[tuple[str, int]] = ()
    """The doubtful claims that a cancel has ended, by id and token."""
    ended: Sequence[str] = ()
    """The groups that have ended: the jobs that waited for them are due."""
    of_type: list[Job] = field(default_factory=list)
    """The claimed jobs of a type with a limit."""
    held_back: Sequence[str] = ()
    """The types of which jobs wait for their limit."""
    met: int = 0
    """How many jobs of these types the claim met instead of others, and put aside."""
    rations: list[Ration | None] = field(default_factory=list)
    """What it got of limits, in the order of `takes`; None: there is no limit."""
    unread: int = 0
    """The number of claimed jobs that could not be read."""

    # The answers to the statements of an exchange.

    def add_settled(self, ids: Iterable[str]) -> None:
        self.settled.update(ids)

    def add_extended(self, ids: Iterable[str]) -> None:
        self.extended.update(ids)

    def set_lock(self, lock: LockAnswer) -> None:
        self.lock_answer, self.has_post, self.seat, self.has_spares = lock

    def set_claimed(self, jobs: list[Job]) -> None:
        self.claimed = jobs

    def set_others(self, others: Others) -> None:
        self.claimed, self.met, self.held_back = others

    def set_of_type(self, jobs: list[Job]) -> None:
        self.of_type = jobs

    def set_seen(self, seen: OpenTransactions) -> None:
        self.seen = seen

    def set_swept(self, swept: Swept) -> None:
        self.swept, self.met, self.held_back = swept, swept.met, swept.held_back

    def set_lines(self, lines: list[Line]) -> None:
        self.lines = lines

    def set_strays(self, strays: list[Stray]) -> None:
        self.strays = strays

    def set_blocked(self, blocked: Blocked) -> None:
        self.blocked = blocked

    def set_group(self, group: Group) -> None:
        self.group = group

    def set_acquired(self, acquired: Mapping[tuple[str, int], int | None]) -> None:
        self.acquired = acquired

    def set_woken(self, woken: list[Woken]) -> None:
        self.woken = woken

    def set_barred(self, ids: list[str]) -> None:
        self.barred = ids

    def set_barred_keys(self, keys: list[str]) -> None:
        self.barred_keys = keys

    def set_cancelled(self, cancelled: set[tuple[str, int]]) -> None:
        self.cancelled = cancelled

    def set_ended(self, ids: list[str]) -> None:
        self.ended = ids

    def add_ration(self, ration: Ration | None) -> None:
        self.rations.append(ration)

    def ignore(self, answer: object) -> None:
        """Drop an answer that says nothing to the engine."""


class Part(NamedTuple, Generic[T]):
    """A statement of an exchange, and the method of Reply that takes its answer."""

    statement: Statement[T]
    store: Callable[[Reply, T], None]


Plan: TypeAlias = list[Part[Any]]
"""The statements of an exchange in their order."""


class Notice(NamedTuple):
    """The content of notifications for a queue."""

    since: Mapping[int, datetime] = {}
    """By priority, when the first enqueuing transaction began."""
    later: bool = False
    """Whether a job is due later, or may have any due time."""
    relief: bool = False
    """Whether another worker released the notify lock, or calls this one."""
    cancelled: frozenset[tuple[int, str]] = frozenset()
    """The claims that were cancelled, by their tokens and their jobs' ids."""

    @classmethod
    def read(cls, payload: str, queue: str) -> "Notice | None":
        """Parse a notification; None if it is not for `queue`, or not bgjob's.

        Other queues share its channel, and any session can send anything.
        """
        if not payload:
            return cls(relief=True)
        try:
            began, what, told = payload.split(" ", 2)
            if began == CANCELLED:  # of any queue: a token is of one claim
                return cls(cancelled=frozenset({(int(what), told)}))
            if told != queue:
                return None
            if what == EVERYTHING:
                return cls(later=True)
            since = {int(what.removesuffix(LATER)): datetime.fromtimestamp(float(began), UTC)}
            return cls(since, later=what.endswith(LATER))
        except (ValueError, OverflowError, OSError):
            return None

    @classmethod
    def read_by_hand(cls, payload: str, queue: str) -> "Notice | None":
        """Parse a notification of an insert by hand; None if it is not for `queue`."""
        return cls(later=True) if payload in ("", queue) else None

    def __or__(self, other: "Notice") -> "Notice":
        """Combine two notices."""
        both = self.since.keys() & other.since.keys()
        first = {p: min(self.since[p], other.since[p]) for p in both}
        return Notice(
            {**self.since, **other.since, **first},
            self.later or other.later,
            self.relief or other.relief,
            self.cancelled | other.cancelled,
        )

    @property
    def wakes(self) -> bool:
        """Whether there may be something to claim, or the notify lock to take."""
        return bool(self.since or self.later or self.relief)

    @property
    def is_usual(self) -> bool:
        """Whether it says nothing but that due jobs were enqueued."""
        return bool(self.since) and not (self.later or self.relief or self.cancelled)
