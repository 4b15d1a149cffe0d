"""The exclusive keys of claimed jobs: which to ask for, and which to release."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter

from bgjob._engine.leases import Leases
from bgjob._engine.outcome import Committed, Fenced, Outcome, Release
from bgjob._engine.pace import Pace
from bgjob._engine.pause import FIRST, Pause
from bgjob._engine.protocol import MOST, Exchange
from bgjob._engine.reply import Reply
from bgjob._handlers.route import NeedsKey
from bgjob._sql.settlements import Claimed

_MOMENT = 0.002
"""Seconds before the worker asks again for a key whose row is locked; doubles."""

_BY_DUE = attrgetter("job.next_run_at", "job.id")


@dataclass(slots=True)
class _Chain:
    """The jobs of this worker that have a key, by id and token."""

    unsent: set[tuple[str, int]] = field(default_factory=set)
    """They hold the key, and no settlement of them was sent."""
    running: set[tuple[str, int]] = field(default_factory=set)
    """Those without an outcome. Up to `places` run, the others wait for their end."""
    places: int = 1
    """How many of the key's slots this worker has."""

    @property
    def behind(self) -> int:
        """How many jobs wait for one before them."""
        return max(len(self.running) - self.places, 0)

    @property
    def leaves_slot(self) -> bool:
        """Whether it has too few jobs for its places, so that others may have the rest."""
        return len(self.unsent) < self.places


class Keys:
    """The jobs that need a key, those that have one, and the keys to release.

    A job that needs a key is in `wanting` or in a sent exchange until the server grants it, and
    is not handed out before. Then it is in the chain of its key until its settlement is sent.
    The exchange with a settlement after which a chain uses fewer slots of its key, mostly the
    last one, releases the key, and so does each that repeats one: the server knows whether the key
    is free. If the same exchange asks for the key, for the next jobs, the next one releases it
    unless these have it. A key in `free` has a slot that no job of this worker uses.

    Jobs of a key run one after the other in each of its slots, so the worker has as many as these
    will run soon; the others are put aside. All that wait for one before them take no slot of the
    worker, so that a chain behind a slow job holds up no other job.
    """

    def __init__(
        self, leases: Leases, pace: Pace, concurrency: int, slots: Mapping[str, int]
    ) -> None:
        self._leases = leases
        self._pace = pace
        self._concurrency = concurrency  # always the same: a holder never gives up a used place
        self._slots = slots  # of the keys that handlers name, by type
        self.wanting: deque[Claimed] = deque()
        self._chains: dict[str, _Chain] = {}
        self.free: dict[str, None] = {}  # in order
        self.places: dict[str, int] = {}
        """How many jobs of a key run at once here; one of those that are not in it."""
        self.are_used = False
        """Whether some job has had a key."""
        self.gives_back = False
        """Whether jobs that wait for a slot or a key are to be given back: one before them is lost
        or given back itself."""
        self._limit = MOST // 2
        self._ask_at = -inf
        self._pause = Pause(FIRST, first=_MOMENT)

    @property
    def ask_at(self) -> float:
        """When to ask for them again."""
        return self._ask_at if self.wanting else inf

    def want(self, claimed: list[Claimed]) -> list[Claimed]:
        """Take those of the claimed jobs that need a key; return the others."""
        keyed = [c for c in claimed if c.job.exclusive is not None]
        if not keyed:
            return claimed
        self.are_used = True
        self.wanting.extend(keyed)
        return [c for c in claimed if c.job.exclusive is None]

    def wants(self, outcome: Outcome) -> bool:
        """Take a job whose handler named a key for it; False if it ended, or is lost."""
        if not isinstance(outcome.result, NeedsKey):
            return False
        job, token, is_charged = outcome.claimed
        claimed = Claimed(job._replace(exclusive=outcome.result.key), token, is_charged)
        if not self._leases.replace(claimed):
            return False
        self.want([claimed])
        return True

    def finished(self, outcomes: Iterable[Outcome]) -> None:
        """Record that jobs have ended; a key that only settled jobs had is to be released.

        What comes after a job that did not start is given back as well, to keep its place.
        """
        chains = self._chains
        for outcome in outcomes:
            claimed, result = outcome.claimed, outcome.result
            chain = chains.get(claimed.job.exclusive or "")
            if chain is not None:
                if type(result) is Committed or type(result) is Fenced:
                    self._leave(claimed)
                else:
                    self._ends(claimed, chain)
                if type(result) is Release and chain.running:
                    self.gives_back = True

    # -- what goes into an exchange -----------------------------------------------------

    def add_releases(self, exchange: Exchange) -> None:
        """Release the keys whose last jobs an exchange settles."""
        if not self.are_used:
            return
        asked = {claimed.job.exclusive for claimed in exchange.acquire}
        for outcome in exchange.outcomes:
            job, token, _ = outcome.claimed
            if job.exclusive is None:
                continue
            chain = self._chains.get(job.exclusive)
            if chain is not None:
                chain.unsent.discard((job.id, token))
                if not chain.leaves_slot:
                    continue
                if not chain.unsent:
                    self._end_chain(job.exclusive)
            if job.exclusive in asked:
                exchange.passed_on[job.exclusive] = None
            else:
                exchange.release.append(job.exclusive)
        exchange.in_a_row = self._pace.in_a_row

    def add_wanting(self, exchange: Exchange, now: float) -> None:
        """Release free keys, and ask for others."""
        if self.free:
            exchange.freed = [*self.free][: self._limit]
            exchange.release += exchange.freed
            for key in exchange.freed:
                del self.free[key]
        if now >= self.ask_at:
            count = min(len(self.wanting), self._limit)
            self._ask([self.wanting.popleft() for _ in range(count)], exchange)
            exchange.holding = [*self._leases.tokens]
            exchange.places, exchange.slots = self._concurrency, self._slots

    def _ask(self, claimed: Sequence[Claimed], exchange: Exchange) -> None:
        """Ask for the jobs of each key as they are due; each key keeps its places."""
        lines: dict[str | None, list[Claimed]] = {}
        for each in claimed:
            key = each.job.exclusive
            if key in lines:
                lines[key].append(each)
            else:
                lines[key] = [each]
        ends: dict[str | None, int] = {}
        for key, line in lines.items():
            chain = self._chains.get(key or "")
            ends[key] = len(line) if chain is None else len(line) + len(chain.running)
            line.sort(key=_BY_DUE, reverse=True)
        for each in claimed:
            key = each.job.exclusive
            line = lines[key]
            exchange.acquire.append(line.pop())
            exchange.ahead.append(ends[key] - len(line))

    # -- answers ------------------------------------------------------------------------

    def answered(
        self, exchange: Exchange, reply: Reply, run: list[Claimed], now: float
    ) -> list[Claimed]:
        """Add the jobs that were granted their keys to `run`; return those that are not held.

        Those wait in the table, or were lost meanwhile. Jobs whose keys are locked ask again.
        """
        gone: list[Claimed] = []
        locked: list[Claimed] = []
        granted: dict[str, list[tuple[str, int]]] = {}
        slots_of: dict[str, int] = {}
        acquired, find = reply.acquired, self._leases.find
        for claimed in exchange.acquire:
            each = claimed.job.id, claimed.token
            slots = acquired.get(each, 0)
            if slots == 0 or find(claimed.token, claimed.job.id) is None:
                gone.append(claimed)
            elif slots is None:
                locked.append(claimed)
            else:
                key = str(claimed.job.exclusive)
                if key in granted:
                    granted[key].append(each)
                else:
                    granted[key] = [each]
                slots_of[key] = slots
                run.append(claimed)
        for key, jobs in granted.items():
            slots = slots_of[key]
            self._grant(key, jobs, min(slots, exchange.places))
            chain = self._chains[key]
            if chain.places > 1 or key in self.places:
                self.places[key] = chain.places
            if min(len(chain.unsent), chain.places) < slots:
                self.free[key] = None  # others may have the rest
        for key in exchange.passed_on:
            held = self._chains.get(key)
            if held is None or held.leaves_slot:
                self.free[key] = None  # it was not granted again
        if exchange.acquire:
            self.wanting += locked
            self._ask_at = now + self._pause.seconds if locked else -inf
            if locked:
                self._pause.grow()
            else:
                self._pause.reset()
        if reply.blocked.keys:
            self.free.update(dict.fromkeys(reply.blocked.keys))
        if exchange.acquire or exchange.release:
            self._limit = min(2 * self._limit, MOST // 2)
        return gone

    def rejected(self, exchange: Exchange) -> None:
        """Record that the server refused an exchange: a key that is refused ends up alone."""
        wanting, free = exchange.acquire, exchange.freed
        if wanting or free:
            self._limit = max(max(len(wanting), len(free)) // 2, 1)
            self.wanting += wanting
            self.free.update(dict.fromkeys(free))

    def take_back(self, exchange: Exchange) -> None:
        """Record that an exchange was not answered."""
        self.wanting.extendleft(reversed(exchange.acquire))
        self.free.update(dict.fromkeys(exchange.freed))

    def drop(self, lost: set[Claimed]) -> set[Claimed]:
        """Drop lost jobs; return those that have not got their keys."""
        dropped = lost.intersection(self.wanting)
        if dropped:
            self.wanting = deque(c for c in self.wanting if c not in dropped)
        if self.are_used:
            for claimed in lost - dropped:
                key = claimed.job.exclusive
                chain = self._chains.get(key or "")
                if chain is not None:
                    self.gives_back |= (claimed.job.id, claimed.token) in chain.running
                    self._leave(claimed)
                elif key is not None:  # its first settlement may have passed over it
                    self.free[key] = None
        return dropped

    # -- chains -------------------------------------------------------------------------

    def _grant(self, key: str, jobs: Collection[tuple[str, int]], places: int) -> None:
        chain = self._chains.get(key)
        if chain is None:
            chain = self._chains[key] = _Chain()
        before = chain.behind
        chain.places = places
        chain.running.update(jobs)
        chain.unsent.update(jobs)
        self._pace.behind += chain.behind - before

    def _ends(self, claimed: Claimed, chain: _Chain) -> None:
        running, each = chain.running, (claimed.job.id, claimed.token)
        if each in running:
            running.remove(each)
            if len(running) >= chain.places:
                self._pace.behind -= 1

    def _leave(self, claimed: Claimed) -> None:
        """Forget a job that holds its key no longer, or is another worker's."""
        key = claimed.job.exclusive
        chain = None if key is None else self._chains.get(key)
        if key is not None and chain is not None:
            self._ends(claimed, chain)
            chain.unsent.discard((claimed.job.id, claimed.token))
            if chain.leaves_slot:
                self.free[key] = None
            if not chain.unsent:
                self._end_chain(key)

    def _end_chain(self, key: str) -> None:
        del self._chains[key]
        self.places.pop(key, None)
