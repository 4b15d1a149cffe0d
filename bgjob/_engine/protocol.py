"""The engine's steps: what the control thread does next."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, TypeAlias

from bgjob._engine.notify_lock import LockWish
from bgjob._engine.outcome import CommitUnknown, Release, Unsettled
from bgjob._engine.reply import Part, Plan, Reply
from bgjob._sql.claims import (
    NO_RATIONS,
    Rations,
    Window,
    claim,
    claim_group,
    claim_limited,
    claim_others,
    free,
    free_within,
    sweep,
)
from bgjob._sql.groups import end_groups
from bgjob._sql.key_rows import barred_keys, lock_keys
from bgjob._sql.keys import NO_SLOTS, acquire, blocked, release
from bgjob._sql.leases import abandon, barred, extend
from bgjob._sql.limits import Take
from bgjob._sql.notices import call, leave_post, release_notify_lock, take_notify_lock
from bgjob._sql.settlements import Claimed, Settlements
from bgjob._sql.steering import were_cancelled
from bgjob._sql.survey import open_transactions, strays, survey, survey_known
from bgjob._sql.transactions import end_sessions

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
    """0 claims nothing."""
    token: int
    after: str | None = None
    """The key after which to search for blocked keys; None: the last sweep found no key."""
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


@dataclass(frozen=True, slots=True)
class ClaimGroup:
    """Claim up to `limit` suspects, one of which may have killed workers."""

    limit: int
    token: int
    charge: bool
    """Whether a job that is claimed alone is charged an attempt."""
    is_told: ClassVar = False
    looks: ClassVar = False


class Spent(NamedTuple):
    """Tokens that a claim has taken of a ration."""

    number: int
    start_by: float
    """When the jobs that it claims have to start."""
    since: datetime
    """When the tokens were taken, by the server's clock."""


_NO_TOKENS: Mapping[str, Spent | None] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ClaimLimited:
    """Claim up to `limit` jobs of a type that wait for its limit."""

    type: str
    limit: int
    token: int
    start_by: float
    """When they have to start."""
    of_type: Spent | None
    of_queue: Spent | None


@dataclass(slots=True)
class Exchange(Settlements):
    """One round trip in one transaction; an empty part is left out."""

    abandon: list[Claimed] = field(default_factory=list)
    """Jobs that still run when the worker ends."""
    extend: list[Claimed] = field(default_factory=list)
    acquire: list[Claimed] = field(default_factory=list)
    """Jobs that need their keys."""
    holding: Sequence[int] = ()
    """This worker's claims, which may hold these keys."""
    ahead: list[int] = field(default_factory=list)
    """For each its number among the jobs of its key that the worker has, or asks for."""
    places: int = 1
    """The most slots of a key that this worker uses."""
    slots: Mapping[str, int] = field(default_factory=lambda: NO_SLOTS)
    """By type, the slots of the keys that its jobs' handlers name."""
    release: list[str] = field(default_factory=list)
    """Keys whose jobs are settled, or that have a slot that no job of this worker uses."""
    in_a_row: int = 1
    """The most jobs to have, or to wake, for each slot of a key; the others are put aside."""
    probe: list[Claimed] = field(default_factory=list)
    """Jobs whose rows other sessions may have locked."""
    probe_keys: list[str] = field(default_factory=list)
    """Keys whose rows other sessions may have locked."""
    ask: list[Claimed] = field(default_factory=list)
    """Jobs that are not held any more: were they cancelled?"""
    groups: Sequence[str] = ()
    """Groups of which a job has ended: are they over?"""
    end: Sequence[Claimed] = ()
    """Claims that were given up: end the sessions of their handlers."""
    notify_lock: LockWish | None = None
    is_deputy: bool = False
    """With "take": whether this session is the deputy already."""
    relieve: bool = False
    """With "take": whether to notify the other workers if the lock is taken."""
    asks_post: bool = False
    """With "take": whether to take a post or a seat if another worker has the lock."""
    seat: int | None = None
    """With "take": the key of the seat that the worker has."""
    calls: bool = False
    """With "release" and "leave": whether to call spares."""
    claim: Claim | Sweep | ClaimGroup | None = None
    limited: ClaimLimited | None = None
    rations: Rations = NO_RATIONS
    """The limits that the worker knows: with others it may not claim."""
    takes: list[Take] = field(default_factory=list)
    """The rations that it takes for later claims, renews, or gives back; in their order."""
    watch: Literal["claims", "all"] | None = None
    """Whether to read the transactions in progress: as far as claims need, or all."""

    # What the engine needs for the answer.
    outcomes: list[Unsettled] = field(default_factory=list)
    """Those that it settles."""
    again: bool = False
    """Whether that is one which was refused alone."""
    passed_on: dict[str, None] = field(default_factory=dict)
    """Keys that its outcomes leave, and for which its jobs ask."""
    freed: Sequence[str] = ()
    """The part of `release` that belongs to none of its outcomes."""
    at: float = 0.0
    """When it was sent."""
    spent: Spent | None = None
    """The tokens of its claim."""
    ample: Mapping[str, Spent | None] = field(default_factory=lambda: _NO_TOKENS)
    """Its tokens by type, for each type with a limit whose jobs it claims like others."""

    @property
    def claims_only(self) -> bool:
        """Whether only its claim can be refused."""
        ended = (self.complete, self.returned, self.postpone, self.dead_letter)
        others = (*ended, self.release_jobs, self.extend, self.limited)
        keys = (self.acquire, self.release, self.probe, self.probe_keys, self.ask)
        is_alone = not (any(others) or any(keys) or self.groups or self.takes)
        return self.claim is not None and is_alone

    def settle(self, outcome: Unsettled) -> None:
        """Add the settlement of a job."""
        claimed, result = outcome.claimed, outcome.result
        match result.otherwise if isinstance(result, CommitUnknown) else result:
            case Release():
                self.release_jobs.append(claimed)
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
            taking = take_notify_lock(
                queue,
                is_deputy=self.is_deputy,
                relieve=self.relieve,
                asks_post=self.asks_post,
                seat=self.seat,
            )
            plan.append(Part(taking, Reply.set_lock))
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
                plan.append(
                    Part(survey_known(queue, window, rations=self.rations), Reply.set_lines)
                )
                plan.append(Part(strays(queue, window, rations=self.rations), Reply.set_strays))
                if after is not None:
                    unheld = blocked(queue, after=after, limit=MOST_LOOKED_AT, served=served)
                    plan.append(Part(unheld, Reply.set_blocked))
            case Sweep(0, held=held, unanswered=unanswered):
                frees = free(queue, limit=MOST_FREED, held=held, unanswered=unanswered)
                plan.append(Part(frees, Reply.set_swept))
                plan.append(Part(survey(queue, rations=self.rations), Reply.set_lines))
            case Sweep(limit, token, after, held, unanswered=unanswered):
                sweeps = sweep(
                    queue,
                    limit=limit,
                    lease=lease,
                    token=token,
                    held=held,
                    unanswered=unanswered,
                    rations=self.rations,
                )
                plan.append(Part(sweeps, Reply.set_swept))
                plan.append(Part(survey(queue, rations=self.rations), Reply.set_lines))
                if after is not None:
                    unheld = blocked(queue, after=after, limit=MOST_LOOKED_AT, served=served)
                    plan.append(Part(unheld, Reply.set_blocked))
            case ClaimGroup(limit, token, charge):
                group = claim_group(
                    queue,
                    limit=limit,
                    lease=lease,
                    token=token,
                    charge=charge,
                    rations=self.rations,
                )
                plan.append(Part(group, Reply.set_group))
            case Claim(limit, token, marks) if self.rations.limited:
                others = claim_others(
                    queue,
                    limit=limit,
                    lease=lease,
                    token=token,
                    marks=marks,
                    rations=self.rations,
                )
                plan.append(Part(others, Reply.set_others))
            case Claim(limit, token, marks):
                statement = claim(
                    queue,
                    limit=limit,
                    lease=lease,
                    token=token,
                    marks=marks,
                    rations=self.rations,
                )
                plan.append(Part(statement, Reply.set_claimed))
        if self.limited:
            of_type = claim_limited(
                queue,
                self.limited.type,
                limit=self.limited.limit,
                lease=lease,
                token=self.limited.token,
                rations=self.rations,
            )
            plan.append(Part(of_type, Reply.set_of_type))
        if self.extend:
            plan += self._taking(lease)  # before: no lease may outlast the ration
        if self.watch:
            plan.append(Part(open_transactions(surely=self.watch == "all"), Reply.set_seen))
        plan += [Part(statement, Reply.add_settled) for statement in self.settlements(queue)]
        if self.abandon:
            plan.append(Part(abandon(self.abandon), Reply.ignore))
        if self.extend:
            plan.append(Part(extend(self.extend, lease=lease), Reply.add_extended))
        if self.acquire or self.release:
            plan.append(Part(lock_keys(self.release, self.acquire), Reply.ignore))
        if self.acquire:
            acquires = acquire(
                queue,
                self.acquire,
                holding=self.holding,
                ahead=self.ahead,
                in_a_row=self.in_a_row,
                most=self.places,
                slots=self.slots,
            )
            plan.append(Part(acquires, Reply.set_acquired))
        if self.release:
            plan.append(Part(release(queue, self.release, most=self.in_a_row), Reply.set_woken))
        if self.probe:
            plan.append(Part(barred(self.probe), Reply.set_barred))
        if self.probe_keys:
            plan.append(Part(barred_keys(self.probe_keys), Reply.set_barred_keys))
        if self.ask:
            plan.append(Part(were_cancelled(self.ask), Reply.set_cancelled))
        if self.groups:
            plan.append(Part(end_groups(self.groups, notify=True), Reply.set_ended))
        if self.calls:
            plan.append(Part(call(queue), Reply.ignore))
        if self.notify_lock == "release":
            plan.append(Part(release_notify_lock(queue), Reply.ignore))
        elif self.notify_lock == "leave":
            plan.append(Part(leave_post(), Reply.ignore))
        if not self.extend:
            plan += self._taking(lease)  # at last: others may wait for the limit's row
        return plan

    def _taking(self, lease: float) -> Plan:
        plan: Plan = []
        for take in self.takes:
            *first, taking = take.statements(lease)
            plan += [*(Part(each, Reply.ignore) for each in first), Part(taking, Reply.add_ration)]
        return plan

    def __bool__(self) -> bool:
        """Whether it has any work."""
        return bool(
            self.complete
            or self.returned
            or self.postpone
            or self.dead_letter
            or self.release_jobs
            or self.abandon
            or self.extend
            or self.acquire
            or self.release
            or self.probe
            or self.probe_keys
            or self.ask
            or self.groups
            or self.end
            or self.notify_lock
            or self.claim
            or self.limited
            or self.takes
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
