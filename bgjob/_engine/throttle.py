"""The limits that a worker obeys: its queue's, and those of types.

A limit of the queue bounds its claims. A limit of a type must not, since the queue's other types
go on: so a claim puts jobs of such a type aside, in the table, and they are claimed from there when
the worker has a ration of that limit. What is put aside is met by no other claim, however many.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from math import inf

from bgjob._engine.limits import Limits
from bgjob._engine.pace import Pace
from bgjob._engine.protocol import ClaimLimited, Exchange
from bgjob._engine.reply import Reply
from bgjob._sql.claims import Rations
from bgjob._sql.limits import Subject
from bgjob._sql.settlements import Claimed
from bgjob.limit import Limit

_IDLE = 1.0
"""Seconds without a job of a type before its ration is given back."""


class _OfType:
    """The limit of a type, as far as this worker's queue is concerned."""

    __slots__ = ("busy", "held", "idle_at", "limits", "waits")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waits = False
        """Whether jobs of the type wait aside, as far as is known."""
        self.busy = 0
        """Its jobs that have a place of this worker's, and have not ended."""
        self.held: deque[Claimed] = deque()
        """Its claimed jobs that wait for a place."""
        self.idle_at = -inf

    @property
    def is_used(self) -> bool:
        """Whether it has jobs, here or aside."""
        return self.waits or self.busy > 0 or bool(self.held)


_ENOUGH = 1 << 30
"""Stands for no limit."""


def _free(each: _OfType, slots: int) -> int:
    """Return how many more jobs of a type may run, as far as its places are concerned."""
    return each.limits.places(slots) - each.busy if each.limits.bounds_places else _ENOUGH


class Throttle:
    """Adds to exchanges what limits need, and says how much may be claimed.

    Without a limit it adds nothing. Jobs that wait aside are found as long as there are any:
    a sweep finds their types, also those whose limit has ended, and these are claimed without a
    ration. A job has a place of its type's limit from when it is handed out until it has ended.
    While jobs are quick, as many as there are places are claimed ahead, and held here: so a place
    that becomes free is used without an exchange before.

    Args:
        pace: how quick jobs are.
        queue: the queue's name.
        code: the limit of the queue in the program's code, if it has one.
        types: those of types.
        lease: seconds of a lease.
        holder: tells this worker from others.

    """

    def __init__(
        self,
        pace: Pace,
        queue: str,
        code: Limit | None,
        types: Mapping[str, Limit],
        *,
        lease: float,
        holder: int,
    ) -> None:
        self._pace = pace
        self._make = partial(Limits, lease=lease, holder=holder)
        self._code = types
        self.queue = self._make(Subject("queue", queue), code)
        self._types: dict[str, _OfType] = {}
        self._rounds_up = False
        for type_ in types:
            self._of(type_)

    def _of(self, type_: str) -> _OfType:
        if type_ not in self._types:
            limits = self._make(Subject("type", type_), self._code.get(type_))
            self._types[type_] = _OfType(limits)
            limits.turn_on()
        return self._types[type_]

    @property
    def _all(self) -> Iterable[Limits]:
        return (self.queue, *(each.limits for each in self._types.values()))

    @property
    def is_used(self) -> bool:
        """Whether there is any limit, as far as is known."""
        return self.queue.is_on or bool(self._types)

    @property
    def has_types(self) -> bool:
        """Whether there is one of a type."""
        return bool(self._types)

    @property
    def has_left(self) -> bool:
        """Whether there is nothing to give back at the worker's end."""
        return all(limits.has_left for limits in self._all)

    @property
    def gives_back(self) -> bool:
        """Whether to give back jobs that have not started: they would keep places in use."""
        return self.queue.gives_back

    @property
    def start_by(self) -> Mapping[int, float]:
        """When the jobs of a claim have to start, by its token."""
        if not self._types:
            return self.queue.start_by
        start_by: dict[int, float] = {}
        for limits in self._all:
            start_by |= limits.start_by  # of one claim they are the same
        return start_by

    @property
    def patience(self) -> float:
        """Seconds for which a claimed job may wait for others of its type."""
        return min(limits.patience for limits in self._all)

    def count(self, claims: Iterable[Claimed]) -> None:
        """Record which jobs this worker has, that have not ended."""
        busy = Counter(claimed.job.type for claimed in claims)
        for type_, each in self._types.items():
            each.busy = busy[type_] - len(each.held)
            each.limits.shrink(each.busy)

    # -- places --------------------------------------------------------------------------------

    @property
    def held(self) -> list[Claimed]:
        """The claimed jobs that wait for a place of the limit of their type."""
        return [claimed for each in self._types.values() for claimed in each.held]

    def hold(self, claimed: Iterable[Claimed]) -> None:
        """Hold claimed jobs of a type until there are places for them."""
        for one in claimed:
            self._of(one.job.type).held.append(one)
            self._pace.behind += 1

    def take_startable(self, slots: int) -> list[Claimed]:
        """Return the held jobs for which there are places, as far as the last count says."""
        startable: list[Claimed] = []
        for each in self._types.values():
            count = max(min(_free(each, slots), len(each.held)), 0)
            startable += [each.held.popleft() for _ in range(count)]
            each.busy += count
            each.limits.shrink(each.busy)
        self._pace.behind -= len(startable)
        return startable

    def drop(self, claims: Collection[Claimed]) -> set[Claimed]:
        """Drop claims that are lost; return those that had no place yet."""
        dropped: set[Claimed] = set()
        for each in self._types.values():
            if each.held:
                dropped.update(claimed for claimed in each.held if claimed in claims)
                each.held = deque(claimed for claimed in each.held if claimed not in claims)
        self._pace.behind -= len(dropped)
        return dropped

    def give_back(self) -> list[Claimed]:
        """Return the held jobs, which are to be released."""
        held = self.held
        self.drop(held)
        return held

    # -- claims --------------------------------------------------------------------------------

    def share(self, room: int, *, has_others: bool) -> int:
        """Return how much of the room is for types with a limit: half, if others need it too.

        The last place is theirs in every other exchange.
        """
        if not has_others:
            return room
        self._rounds_up = not self._rounds_up
        return (room + self._rounds_up) // 2

    def wants(self, now: float, slots: int) -> bool:
        """Whether jobs of a type wait that may be claimed now."""
        return any(self._most(each, now, slots) > 0 for each in self._types.values() if each.waits)

    @property
    def has_waiting(self) -> bool:
        """Whether jobs wait aside, as far as is known."""
        return any(each.waits for each in self._types.values())

    def _most(self, each: _OfType, now: float, slots: int) -> int:
        return min(each.limits.most(now), self._room(each, slots))

    def _room(self, each: _OfType, slots: int) -> int:
        """Return how many more jobs of a type may be claimed, as far as places are concerned."""
        limits = each.limits
        if not limits.bounds_places:
            return _ENOUGH
        if not limits.is_known:
            return slots - each.busy
        places = limits.places(slots)
        ahead = self._pace.ahead(places, is_bounded=True) if limits.is_tight(slots) else 0
        return places + ahead - each.busy - len(each.held)

    def add_claim(
        self, exchange: Exchange, room: int, now: float, *, slots: int, tokens: Iterator[int]
    ) -> None:
        """Claim up to `room` jobs of a type that wait aside, if some may be claimed."""
        room = min(room, self.queue.most(now))
        for type_, each in self._types.items():
            limit = min(room, self._most(each, now, slots)) if each.waits else 0
            if limit <= 0:
                continue
            of_type, of_queue = each.limits.spend(limit), self.queue.spend(limit)
            times = [spent.start_by for spent in (of_type, of_queue) if spent is not None]
            start_by = min([each.limits.run_until, *times])
            exchange.limited = ClaimLimited(type_, limit, next(tokens), start_by, of_type, of_queue)
            self._types[type_] = self._types.pop(type_)  # the others come first next time
            return

    def spend(self, exchange: Exchange) -> None:
        """Record that an exchange is about to be sent: its claim needs tokens."""
        if exchange.claim is not None:
            exchange.spent = self.queue.spend(exchange.claim.limit)
        limited = [type_ for type_, each in self._types.items() if each.limits.is_on]
        exchange.rations = Rations(self.queue.is_on, limited)

    # -- rations -------------------------------------------------------------------------------

    def add_takes(
        self, exchange: Exchange, now: float, *, slots: int, room: int, has_more: bool, free: int
    ) -> None:
        """Take, renew or give back rations, where it is time to.

        Args:
            exchange: where they are added.
            now: the time.
            slots: the slots that can run handlers.
            room: how many more jobs the worker would claim, were there no limit; 0 if it
                would not claim.
            has_more: whether the last claim was full.
            free: how many more jobs it could claim.

        """
        asked = exchange.claim.limit if exchange.claim else 0
        self.queue.add_take(exchange, now, asked=asked, slots=slots, room=room, has_more=has_more)
        for type_, each in sorted(self._types.items()):  # rows are locked in this order
            limits, limited = each.limits, exchange.limited
            asked = limited.limit if limited is not None and limited.type == type_ else 0
            if each.is_used or asked:
                each.idle_at = now + _IDLE
                room = min(free, self._room(each, slots)) if each.waits else 0
                limits.add_take(
                    exchange, now, asked=asked, slots=slots, room=room, has_more=each.waits
                )
            elif limits.is_on and now >= each.idle_at and not limits.has_left:
                limits.rest(exchange, now)

    def add_leaves(self, exchange: Exchange, now: float) -> None:
        """Return all rations: the worker ends, and none of its handlers runs."""
        for limits in (self.queue, *(each.limits for _, each in sorted(self._types.items()))):
            if not limits.has_left:
                limits.add_leave(exchange, now)

    def wake_at(self, now: float, *, slots: int, free: int) -> float:
        """Return when to claim jobs of a type, or to ask for a ration of one, without an event."""
        return min(
            (self._wake_at(each, now, slots, free) for each in self._types.values()), default=inf
        )

    def _wake_at(self, each: _OfType, now: float, slots: int, free: int) -> float:
        limits = each.limits
        if not each.is_used:
            return inf if limits.has_left else each.idle_at
        wants = each.waits and min(free, self._room(each, slots)) > 0
        if wants and self._most(each, now, slots) > 0:
            return now if self.queue.most(now) > 0 else inf
        return limits.wake_at(wants_claim=wants)

    # -- what became of it -----------------------------------------------------------------------

    def answered(self, exchange: Exchange, reply: Reply, claimed: int, now: float) -> None:
        """Record the answer to an exchange whose claim has brought so many jobs."""
        if exchange.claim is not None and (spent := exchange.spent) is not None:
            self.queue.claimed(exchange.claim.token, spent, claimed, spent.start_by)
        if (limited := exchange.limited) is not None:
            count, each = len(reply.of_type), self._of(limited.type)
            each.limits.claimed(limited.token, limited.of_type, count, limited.start_by)
            self.queue.claimed(limited.token, limited.of_queue, count, limited.start_by)
            each.waits = count == limited.limit
        for take, ration in zip(exchange.takes, reply.rations, strict=True):
            self._limits(take.subject).took(take, ration, exchange.at, now)
        for line in reply.lines:
            if line.is_limited:
                self.queue.turn_on()
            for type_ in line.limited:
                self._of(type_).limits.turn_on()
        for type_ in reply.held_back:
            self._of(type_).waits = True
        for type_, each in [*self._types.items()]:
            if not (each.limits.is_on or each.is_used):
                del self._types[type_]

    def _limits(self, subject: Subject) -> Limits:
        return self.queue if subject.scope == "queue" else self._of(subject.name).limits

    def take_back(self, exchange: Exchange, *, is_refused: bool) -> None:
        """Record that an exchange was refused, or that its answer is lost."""
        limited = exchange.limited
        if is_refused and exchange.spent is not None:
            self.queue.unspend(exchange.spent, exchange.spent.number)
        if is_refused and limited is not None:
            if limited.of_queue is not None:
                self.queue.unspend(limited.of_queue, limited.limit)
            if limited.of_type is not None:
                self._of(limited.type).limits.unspend(limited.of_type, limited.limit)
        for take in exchange.takes:
            self._limits(take.subject).not_taken(take, is_refused=is_refused)

    def look(self) -> None:
        """Ask again at the next need: a limit may have been changed."""
        for limits in self._all:
            limits.look()

    def withdrawn(self) -> None:
        """Record that the jobs that have not started were given back."""
        self.queue.gives_back = False

    def refund(self, claims: Collection[Claimed]) -> None:
        """Record that jobs are given back unstarted: their tokens were not used."""
        for limits in self._all:
            limits.refund(claims)

    def forget(self, held: Collection[int]) -> None:
        """Forget the claims that have no more jobs."""
        for limits in self._all:
            limits.forget(held)
