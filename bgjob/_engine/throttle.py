"""The limits that a worker obeys: its queue's, and those of types.

A limit of the queue bounds its claims. A limit of a type must not, since the queue's other types
go on: so a claim puts jobs of such a type aside, in the table, and they are claimed from there when
the worker has a ration of that limit. What is put aside is met by no other claim, however many.

While the ration is ample nothing is put aside: with places for all slots, and as many tokens as
were asked for, jobs of the type are claimed like others, and its tokens bound the claims as those
of a queue's limit do. Putting each job aside costs a version of its row, and jobs that are aside
were claimed one for each slot: a type with a limit that was never reached drained at 0.04 of the
rate without one (benchmarks/limits.py).

It has over 400 lines because what limits add to an exchange, and what its answer says of them,
belong together.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import inf

from bgjob._engine.limits import Limits
from bgjob._engine.pace import Pace
from bgjob._engine.protocol import ClaimLimited, Exchange
from bgjob._engine.reply import Reply
from bgjob._engine.type_limit import TypeLimit
from bgjob._sql.claims import Rations
from bgjob._sql.limits import Subject
from bgjob._sql.settlements import Claimed
from bgjob.limit import Limit

_IDLE = 1.0
"""Seconds without a job of a type before its ration is given back."""


_NONE: Counter[str] = Counter()


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
        concurrency: the worker's slots.
        batches: the types of batch handlers.
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
        concurrency: int,
        batches: Collection[str],
        lease: float,
        holder: int,
    ) -> None:
        self._pace = pace
        self._make = partial(Limits, lease=lease, holder=holder)
        self._code = types
        self.queue = self._make(Subject("queue", queue), code)
        self._types: dict[str, TypeLimit] = {}
        self._concurrency = concurrency
        self._batches = batches
        self._rounds_up = False
        for type_ in types:
            self._of(type_)

    def _of(self, type_: str) -> TypeLimit:
        if type_ not in self._types:
            limits = self._make(Subject("type", type_), self._code.get(type_))
            is_batch = type_ in self._batches
            self._types[type_] = TypeLimit(
                limits, self._pace, self._concurrency, in_batches=is_batch
            )
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
            for token, at in limits.start_by.items():
                start_by[token] = min(at, start_by.get(token, inf))
        return start_by

    @property
    def patience(self) -> float:
        """Seconds for which a claimed job may wait for others of its type."""
        return min(limits.patience for limits in self._all)

    @property
    def needs_count(self) -> bool:
        """Whether what may be claimed depends on how many jobs of a type have ended."""
        types = self._types.values()
        return any(each.is_bound or each.held or each.limits.is_shrinking for each in types)

    def count(self, claims: Iterable[Claimed]) -> None:
        """Record which jobs this worker has, that have not ended."""
        busy = Counter(claimed.job.type for claimed in claims)
        for type_, each in self._types.items():
            each.count(busy[type_] - len(each.held))

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

    def admit(self, claimed: list[Claimed], exchange: Exchange) -> list[Claimed]:
        """Return the claimed jobs that may be handed out.

        The others are held: a ration that was ample when they were claimed is not any more.
        """
        types = self._types.items()
        bound = {type_ for type_, each in types if type_ in exchange.ample and each.is_bound}
        if not bound:
            return claimed
        self.hold(one for one in claimed if one.job.type in bound)
        return [one for one in claimed if one.job.type not in bound]

    def take_startable(self, slots: int) -> list[Claimed]:
        """Return the held jobs for which there are places, as far as the last count says."""
        startable: list[Claimed] = []
        for each in self._types.values():
            count = max(min(each.free(slots), len(each.held)), 0)
            startable += [each.held.popleft() for _ in range(count)]
            each.count(each.busy + count)
        self._pace.behind -= len(startable)
        return startable

    def drop(self, claims: Collection[Claimed]) -> set[Claimed]:
        """Drop claims that are lost; return those that had no place yet."""
        dropped: set[Claimed] = set()
        for each in self._types.values():
            dropped.update(each.drop(claims))
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
        """Whether jobs of a type wait that may be claimed now, or may be once a ration is taken."""
        return any(
            each.most(now, slots) > 0 or each.limits.must_ask(now)
            for each in self._types.values()
            if each.waits
        )

    def most(self, now: float) -> int:
        """Return how many jobs may be claimed that do not wait aside."""
        most = self.queue.most(now)
        for each in self._types.values():
            if each.is_ample:
                most = min(most, each.limits.most(now))
        return most

    def waits_for_ration(self, now: float) -> bool:
        """Whether no such job may be claimed, and asking again would not help yet."""
        if self.queue.waits(now):
            return True
        types = self._types
        return bool(types) and any(
            each.limits.waits(now) for each in types.values() if each.is_ample
        )

    @property
    def has_waiting(self) -> bool:
        """Whether jobs wait aside, as far as is known."""
        return any(each.waits for each in self._types.values())

    def add_claim(
        self, exchange: Exchange, room: int, now: float, *, slots: int, tokens: Iterator[int]
    ) -> None:
        """Claim up to `room` jobs of a type that wait aside, if some may be claimed."""
        room = min(room, self.queue.most(now))
        for type_, each in self._types.items():
            limit = min(room, each.most(now, slots)) if each.waits else 0
            if limit <= 0:
                continue
            of_type, of_queue = each.limits.spend(limit), self.queue.spend(limit)
            times = [spent.start_by for spent in (of_type, of_queue) if spent is not None]
            start_by = min([each.limits.run_until, *times])
            exchange.limited = ClaimLimited(type_, limit, next(tokens), start_by, of_type, of_queue)
            self._types[type_] = self._types.pop(type_)  # the others come first next time
            return

    def spend(self, exchange: Exchange, now: float) -> None:
        """Record that an exchange is about to be sent: its claim needs tokens."""
        if exchange.claim is not None:
            number = exchange.claim.limit  # 0 of a sweep that only looks: for suspects, too
            exchange.spent = self.queue.spend(number)
            exchange.ample = {
                type_: each.limits.spend(number)
                for type_, each in self._types.items()
                if each.is_ample and each.limits.most(now) >= number
            }
        known = [type_ for type_, each in self._types.items() if each.limits.is_on]
        limited = [type_ for type_ in known if type_ not in exchange.ample]
        exchange.rations = Rations(self.queue.is_on, limited, [*exchange.ample])

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
        claimed = exchange.claim.limit if exchange.claim else 0
        self.queue.add_take(exchange, now, asked=claimed, slots=slots, room=room, has_more=has_more)
        for type_, each in sorted(self._types.items()):  # rows are locked in this order
            limits, limited = each.limits, exchange.limited
            asked = limited.limit if limited is not None and limited.type == type_ else 0
            if each.is_used or asked:
                each.idle_at, each.rests = now + _IDLE, False
            if each.is_used or asked or (each.is_ample and now < each.idle_at):
                needed, more = min(free, each.room(slots)) if each.waits else 0, each.waits
                if each.is_ample:
                    asked, needed, more = asked + claimed, max(needed, room), more or has_more
                limits.add_take(exchange, now, asked=asked, slots=slots, room=needed, has_more=more)
            elif now >= each.idle_at:
                each.rests = True
                if limits.is_on and not limits.has_left:
                    limits.rest(exchange, now)

    def add_leaves(self, exchange: Exchange, now: float) -> None:
        """Return all rations: the worker ends, and none of its handlers runs."""
        for limits in (self.queue, *(each.limits for _, each in sorted(self._types.items()))):
            if not limits.has_left:
                limits.add_leave(exchange, now)

    def wake_at(self, now: float, *, slots: int, free: int, wants: bool) -> float:
        """Return when to claim jobs of a type, or to ask for a ration of one, without an event.

        Args:
            now: the time.
            slots: the slots that can run handlers.
            free: how many more jobs could be claimed.
            wants: whether the worker would claim jobs that do not wait aside.

        """
        return min(
            (self._wake_at(each, now, slots, free, wants) for each in self._types.values()),
            default=inf,
        )

    def _wake_at(self, each: TypeLimit, now: float, slots: int, free: int, wants: bool) -> float:
        limits = each.limits
        if not each.is_used:
            return inf if each.rests and limits.has_left else each.idle_at
        wants_more = wants and each.is_ample
        wants = each.waits and min(free, each.room(slots)) > 0
        if wants and each.most(now, slots) > 0:
            return now if self.queue.most(now) > 0 else inf
        return limits.wake_at(wants_claim=wants or wants_more)

    # -- what became of it -----------------------------------------------------------------------

    def answered(
        self, exchange: Exchange, reply: Reply, claimed: Sequence[Claimed], now: float
    ) -> None:
        """Record the answer to an exchange whose claim has brought these jobs."""
        counts = Counter(one.job.type for one in claimed) if exchange.ample else _NONE
        if exchange.claim is not None:
            number = len(claimed) + reply.unread
            self._claimed(exchange, exchange.claim.token, number, counts, reply.unread)
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
            if type_ in exchange.ample and not each.is_bound:
                each.count(each.busy + counts[type_])
            if counts[type_]:
                each.idle_at = now + _IDLE  # no exchange of a stream takes a ration
            if not (each.limits.is_on or each.is_used):
                del self._types[type_]

    def _claimed(
        self,
        exchange: Exchange,
        token: int,
        number: int,
        counts: Mapping[str, int],
        unread: int,
    ) -> None:
        if (spent := exchange.spent) is not None:
            self.queue.claimed(token, spent, number, spent.start_by)
        for type_, of_type in exchange.ample.items():
            limits = self._of(type_).limits
            start_by = inf if of_type is None else of_type.start_by
            count = counts[type_] + unread  # of what cannot be read the type is unknown
            limits.claimed(token, of_type, count, min(start_by, limits.run_until))

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
        if is_refused:
            for type_, of_type in exchange.ample.items():
                if of_type is not None:
                    self._of(type_).limits.unspend(of_type, of_type.number)
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
        self.queue.refund(claims)
        for type_, each in self._types.items():
            each.limits.refund(claimed for claimed in claims if claimed.job.type == type_)

    def forget(self, held: Collection[int]) -> None:
        """Forget the claims that have no more jobs."""
        for limits in self._all:
            limits.forget(held)
