"""The values that the engine and the control thread exchange."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from bgjob._engine.outcome import CommitUnknown, Release, Unsettled
from bgjob._sql.claims import (
    Group,
    Swept,
    Taken,
    Window,
    claim,
    claim_group,
    free,
    free_within,
    sweep,
)
from bgjob._sql.keys import (
    Blocked,
    Woken,
    acquire,
    barred_keys,
    blocked,
    lock_keys,
    release,
)
from bgjob._sql.leases import abandon, barred, extend
from bgjob._sql.notices import EVERYTHING, LATER, release_notify_lock, take_notify_lock
from bgjob._sql.settlements import Claimed, Settlements
from bgjob._sql.statement import Statement
from bgjob._sql.survey import Line, Stray, UnderWay, strays, survey, survey_known, under_way
from bgjob._sql.transactions import end_sessions

# -- the engine's steps -------------------------------------------------------------


MOST = 2000
"""Jobs in one settlement, and in two claims: one runs while the next is fetched."""

MOST_FREED = 1000
"""The most jobs that a sweep without a claim frees."""

MOST_LOOKED_AT = 2000
"""The most keys that one sweep checks."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim up to `limit` jobs from the marks on."""

    limit: int
    token: int
    marks: dict[int, datetime]
    """The first due time by priority."""
    is_told: bool = False
    """Whether it answers a notification, or the end of a delay."""
    is_vague: bool = False
    """Whether it may miss some of these jobs."""
    looks: ClassVar = True
    """Whether it answers a notification."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Claim up to `limit` jobs regardless of marks; free ended leases; survey."""

    limit: int
    """0 frees ended leases only."""
    token: int
    after: str = ""
    """The key after which to search for blocked keys."""
    held: tuple[int, ...] = ()
    """The worker's own tokens, whose jobs it does not free."""
    window: Window | None = None
    """Restricts the search for ended leases and strays; such a sweep claims nothing."""
    unanswered: tuple[int, ...] = ()
    """Tokens of the worker's claims whose answers were lost; frees their jobs immediately."""
    is_told: bool = False
    """See Claim."""

    @property
    def looks(self) -> bool:
        """Whether it answers a notification."""
        return self.limit > 0

    @property
    def surveys(self) -> bool:
        """Whether it finds out when the next job is due."""
        return self.limit > 0 or self.window is not None


@dataclass(frozen=True, slots=True)
class ClaimGroup:
    """Claim up to `limit` suspects, one of which may have killed workers."""

    limit: int
    token: int
    charge: bool
    """Whether a job that is claimed alone is charged an attempt."""
    is_told: ClassVar = False
    looks: ClassVar = False


T = TypeVar("T")


class Part(NamedTuple, Generic[T]):
    """A statement of an exchange, and the method of Reply that takes its answer."""

    statement: Statement[T]
    store: "Callable[[Reply, T], None]"


Plan: TypeAlias = list[Part[Any]]
"""The statements of an exchange in their order."""


@dataclass(slots=True)
class Exchange(Settlements):
    """One round trip in one transaction; an empty part is left out."""

    abandon: list[Claimed] = field(default_factory=list)
    """Jobs that still run when the worker ends."""
    extend: list[Claimed] = field(default_factory=list)
    acquire: list[Claimed] = field(default_factory=list)
    """Jobs that need their keys."""
    release: list[str] = field(default_factory=list)
    """Keys whose jobs are settled, or that no job holds."""
    probe: list[Claimed] = field(default_factory=list)
    """Jobs whose rows other sessions may have locked."""
    probe_keys: list[str] = field(default_factory=list)
    """Keys whose rows other sessions may have locked."""
    end: Sequence[Claimed] = ()
    """Claims that were given up: end the sessions of their handlers."""
    notify_lock: Literal["take", "release"] | None = None
    is_deputy: bool = False
    """With "take": whether this session is the deputy already."""
    relieve: bool = False
    """With "take": whether to notify the other workers if the lock is taken."""
    claim: Claim | Sweep | ClaimGroup | None = None
    watch: Literal["claims", "all"] | None = None
    """Whether to read the transactions in progress: as far as claims need, or all."""

    # What the engine needs for the answer.
    outcomes: list[Unsettled] = field(default_factory=list)
    """Those that it settles."""
    again: bool = False
    """Whether that is one which was refused alone."""
    freed: Sequence[str] = ()
    """The part of `release` that belongs to none of its outcomes."""
    at: float = 0.0
    """When it was sent."""

    @property
    def claims_only(self) -> bool:
        """Whether only its claim can be refused."""
        others = (self.complete, self.postpone, self.dead_letter, self.give_back, self.extend)
        keys = (self.acquire, self.release, self.probe, self.probe_keys)
        return self.claim is not None and not any(others) and not any(keys)

    def settle(self, outcome: Unsettled) -> None:
        """Add the settlement of a job."""
        claimed, result = outcome.claimed, outcome.result
        match result.otherwise if isinstance(result, CommitUnknown) else result:
            case Release():
                self.give_back.append(claimed)
            case stored:
                self.store(claimed, stored)

    @property
    def probes(self) -> bool:
        """Whether it asks which rows are locked."""
        return bool(self.probe or self.probe_keys)

    def statements(self, queue: str, lease: float, served: Collection[str] = ()) -> Plan:
        """Return the SQL; `served` are the queues of the same worker."""
        plan: Plan = []
        if self.end:
            plan.append(Part(end_sessions(self.end), Reply.ignore))
        if self.notify_lock == "take":
            # Before the claim: a job that the claim does not see notifies.
            taking = take_notify_lock(queue, is_deputy=self.is_deputy, relieve=self.relieve)
            plan.append(Part(taking, Reply.set_lock_answer))
        # The claim comes before settlements: its jobs are read while the server settles.
        match self.claim:
            case Sweep(0, after=after, window=Window() as window) as part:
                frees = free_within(
                    queue,
                    window,
                    limit=MOST_FREED,
                    held=part.held,
                    unanswered=part.unanswered,
                )
                plan.append(Part(frees, Reply.set_swept))
                plan.append(Part(survey_known(queue, window), Reply.set_lines))
                plan.append(Part(strays(queue, window), Reply.set_strays))
                unheld = blocked(queue, after=after, limit=MOST_LOOKED_AT, served=served)
                plan.append(Part(unheld, Reply.set_blocked))
            case Sweep(0, held=held, unanswered=unanswered):
                frees = free(queue, limit=MOST_FREED, held=held, unanswered=unanswered)
                plan.append(Part(frees, Reply.set_swept))
                plan.append(Part(survey(queue), Reply.set_lines))
            case Sweep(limit, token, after, held, unanswered=unanswered):
                sweeps = sweep(
                    queue,
                    limit=limit,
                    lease=lease,
                    token=token,
                    held=held,
                    unanswered=unanswered,
                )
                plan.append(Part(sweeps, Reply.set_swept))
                plan.append(Part(survey(queue), Reply.set_lines))
                unheld = blocked(queue, after=after, limit=MOST_LOOKED_AT, served=served)
                plan.append(Part(unheld, Reply.set_blocked))
            case ClaimGroup(limit, token, charge):
                group = claim_group(queue, limit=limit, lease=lease, token=token, charge=charge)
                plan.append(Part(group, Reply.set_group))
            case Claim(limit, token, marks):
                statement = claim(queue, limit=limit, lease=lease, token=token, marks=marks)
                plan.append(Part(statement, Reply.set_claimed))
        if self.watch:
            plan.append(Part(under_way(surely=self.watch == "all"), Reply.set_seen))
        plan += [Part(statement, Reply.add_settled) for statement in self.settlements(queue)]
        if self.abandon:
            plan.append(Part(abandon(self.abandon), Reply.ignore))
        if self.extend:
            plan.append(Part(extend(self.extend, lease=lease), Reply.add_extended))
        if self.acquire or self.release:
            keys = [str(claimed.job.exclusive) for claimed in self.acquire]
            plan.append(Part(lock_keys([*keys, *self.release]), Reply.ignore))
        if self.acquire:
            plan.append(Part(acquire(queue, self.acquire), Reply.set_acquired))
        if self.release:
            plan.append(Part(release(queue, self.release), Reply.set_woken))
        if self.probe:
            plan.append(Part(barred(self.probe), Reply.set_barred))
        if self.probe_keys:
            plan.append(Part(barred_keys(self.probe_keys), Reply.set_barred_keys))
        if self.notify_lock == "release":
            plan.append(Part(release_notify_lock(queue), Reply.set_lock_answer))
        return plan

    def __bool__(self) -> bool:
        """Whether it has any work."""
        return bool(
            self.complete
            or self.postpone
            or self.dead_letter
            or self.give_back
            or self.abandon
            or self.extend
            or self.acquire
            or self.release
            or self.probes
            or self.end
            or self.notify_lock
            or self.claim
        )


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take back the jobs that no handler has started."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """There is nothing to do before this time, unless an event comes."""

    until: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Everything is settled, but for the jobs that are abandoned to their leases."""

    abandoned: int


Step: TypeAlias = Exchange | Withdraw | Sleep | Stop


# -- events for the engine ------------------------------------------------------------


class Notice(NamedTuple):
    """The content of notifications for a queue."""

    since: Mapping[int, datetime] = {}
    """By priority, when the first enqueuing transaction began."""
    later: bool = False
    """Whether a job is due later, or may have any due time."""
    relief: bool = False
    """Whether another worker released the notify lock."""

    @classmethod
    def read(cls, payload: str, queue: str) -> "Notice | None":
        """Parse a notification; None if it is not for `queue`, or not bgjob's.

        Other queues share its channel, and any session can send anything.
        """
        if not payload:
            return cls(relief=True)
        try:
            began, what, told = payload.split(" ", 2)
            if told != queue:
                return None
            if what == EVERYTHING:
                return cls(later=True)
            since = {int(what.removesuffix(LATER)): datetime.fromtimestamp(float(began), UTC)}
            return cls(since, later=what.endswith(LATER))
        except (ValueError, OverflowError, OSError):
            return None

    def __or__(self, other: "Notice") -> "Notice":
        """Combine two notices."""
        both = self.since.keys() & other.since.keys()
        first = {p: min(self.since[p], other.since[p]) for p in both}
        return Notice(
            {**self.since, **other.since, **first},
            self.later or other.later,
            self.relief or other.relief,
        )


_NOTHING_TAKEN = Taken([], [])
_NOTHING_SWEPT = Swept([], 0)
_NO_GROUP = Group([], 0)
_NOTHING_BLOCKED = Blocked([], "")


@dataclass(slots=True)
class Reply:
    """The server's answer to an exchange."""

    settled: set[str] = field(default_factory=set)
    extended: set[str] = field(default_factory=set)
    lock_answer: str | None = None
    claimed: Taken = _NOTHING_TAKEN
    seen: UnderWay | None = None
    swept: Swept = _NOTHING_SWEPT
    lines: list[Line] = field(default_factory=list)
    group: Group = _NO_GROUP
    acquired: Mapping[tuple[str, int], bool | None] = field(default_factory=dict)
    """Whether the job of an id and token has its key; see `acquire`."""
    woken: list[Woken] = field(default_factory=list)
    blocked: Blocked = _NOTHING_BLOCKED
    strays: list[Stray] = field(default_factory=list)
    barred: Sequence[str] = ()
    barred_keys: Sequence[str] = ()
    unread: int = 0
    """The number of claimed jobs that could not be read."""

    # The answers to the statements of an exchange.

    def add_settled(self, ids: Iterable[str]) -> None:
        self.settled.update(ids)

    def add_extended(self, ids: Iterable[str]) -> None:
        self.extended.update(ids)

    def set_lock_answer(self, answer: str | None) -> None:
        self.lock_answer = answer

    def set_claimed(self, taken: Taken) -> None:
        self.claimed = taken

    def set_seen(self, seen: UnderWay) -> None:
        self.seen = seen

    def set_swept(self, swept: Swept) -> None:
        self.swept = swept

    def set_lines(self, lines: list[Line]) -> None:
        self.lines = lines

    def set_strays(self, strays: list[Stray]) -> None:
        self.strays = strays

    def set_blocked(self, blocked: Blocked) -> None:
        self.blocked = blocked

    def set_group(self, group: Group) -> None:
        self.group = group

    def set_acquired(self, acquired: Mapping[tuple[str, int], bool | None]) -> None:
        self.acquired = acquired

    def set_woken(self, woken: list[Woken]) -> None:
        self.woken = woken

    def set_barred(self, ids: list[str]) -> None:
        self.barred = ids

    def set_barred_keys(self, keys: list[str]) -> None:
        self.barred_keys = keys

    def ignore(self, answer: object) -> None:
        """Drop an answer that says nothing to the engine."""
