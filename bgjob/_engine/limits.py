"""The worker's ration of a limit: when to ask for one, and what it allows."""

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from math import inf

from bgjob._engine.protocol import Exchange, Spent
from bgjob._sql.limits import LEASES, Ask, Ration, Subject, Take
from bgjob._sql.settlements import Claimed
from bgjob.limit import Limit

_RENEW = 5.0
"""The most seconds between two looks at a limit: so soon a change of it is noticed."""

_LOOK = 1.0
"""The same while the worker has fewer places than it can use, and there is more to do."""

_MOST = 1_000_000
"""The most tokens of one ration."""

_NEVER = datetime.max.replace(tzinfo=UTC)

_ENOUGH = 1 << 30
"""Stands for no limit."""


class Limits:
    """Decides when the worker takes a ration, and how many jobs it may claim and run with it.

    Without a limit in the program's code, and before a survey has told of one that an operator
    has set, it adds nothing to any exchange. From then on no job is claimed without a ration.
    Each handler has one of its places, and each claimed job one of its tokens; jobs that have no
    token any more when they would start are given back. What is not known after a lost
    answer is taken as used.

    Args:
        of: what has the limit, its queue or a type.
        code: the limit in the program's code, if it has one.
        lease: seconds of a lease.
        holder: tells this worker from others.

    """

    def __init__(self, of: Subject, code: Limit | None, *, lease: float, holder: int) -> None:
        self._of = of
        self._code = code
        self._lease = lease
        self._holder = holder
        self.is_on = code is not None
        """Whether there is a limit, as far as is known."""
        self.busy = 0
        """The slots that are in use."""
        self.start_by: dict[int, float] = {}
        """When the jobs of a claim have to start, by its token."""
        self._declares = code is not None
        self.gives_back = False
        """Whether to give back jobs that have not started: they would keep its places in use."""
        self._sent: Take | None = None
        self._ration: Ration | None = None  # the last one; None: nothing is known
        self._has_left = False
        # Places.
        self._places = 0  # that handlers may use
        self._target = 0  # that they should use
        self._told = 0  # that the server knows of
        self._wanted = 0
        self._has_more = False
        self._renewed_at = -inf
        self._look_at = -inf  # the limit may have been changed
        # Tokens, of which those of one time can be used.
        self._tokens = 0
        self._start_by = -inf  # of jobs with these tokens
        self._usable_until = -inf
        self._unused = 0  # tokens of earlier times
        self._unused_since = _NEVER
        self._taken_when: dict[int, datetime] = {}  # the tokens of a claim
        self._used = 0  # since the last were taken
        self._taken_at = -inf
        self._ask_at = -inf

    # -- what it allows ------------------------------------------------------------------

    def places(self, slots: int) -> int:
        """Return how many of the slots may run handlers."""
        return min(self._places, slots) if self.bounds_places else slots

    @property
    def is_known(self) -> bool:
        """Whether the server has told what it allows."""
        return self._ration is not None

    @property
    def bounds_places(self) -> bool:
        """Whether it bounds how many handlers run, as far as is known."""
        return self.is_on and (self._ration is None or self._ration.places is not None)

    def is_tight(self, slots: int) -> bool:
        """Whether its places alone bound how many of the slots run handlers.

        Jobs with tokens have to start soon, so they are not claimed ahead of a place.
        """
        return self.places(slots) < slots and not self._has_tokens

    @property
    def run_until(self) -> float:
        """When handlers must not start any more, because others may have the places."""
        has_places = self.is_on and self._ration is not None and self._ration.places is not None
        return self._renewed_at + LEASES * self._lease if has_places else inf

    @property
    def patience(self) -> float:
        """Seconds for which a claimed job may wait for others of its type."""
        ration = self._ration
        return ration.good_for / 4 if self._has_tokens and ration is not None else inf

    def most(self, now: float) -> int:
        """Return how many jobs may be claimed now."""
        if not self.is_on:
            return _ENOUGH
        ration = self._ration
        if ration is None or self.is_shrinking:
            return 0
        if ration.places is not None and now >= self._renewed_at + (LEASES - 1) * self._lease:
            return 0  # their leases would outlast it
        if ration.tokens is None:
            return _ENOUGH
        return self._tokens if now < self._usable_until else 0

    @property
    def is_shrinking(self) -> bool:
        """Whether more handlers run than should: nothing is claimed until they have ended."""
        return self._places > self._target

    def must_ask(self, now: float) -> bool:
        """Whether nothing may be claimed before a ration is taken, and one may be taken now."""
        return self._sent is None and self.most(now) == 0 and not self.waits(now)

    @property
    def got_all(self) -> bool:
        """Whether the last ration was all that was asked for."""
        return self._ration is not None and self._ration.wait == 0.0

    def waits(self, now: float) -> bool:
        """Whether nothing may be claimed, and asking again would not help yet."""
        return self.is_on and self.most(now) == 0 and now < self._ask_at

    # -- what it asks for ------------------------------------------------------------------

    def spend(self, count: int) -> Spent | None:
        """Take so many tokens for a claim; None if it needs none."""
        ration = self._ration
        if not count or not self._has_tokens or ration is None:
            return None
        self._tokens -= count
        self._used += count
        return Spent(count, self._start_by, ration.at)

    def add_take(
        self, exchange: Exchange, now: float, *, asked: int, slots: int, room: int, has_more: bool
    ) -> None:
        """Take, renew or give back a ration, if it is time to.

        Args:
            exchange: where it is added.
            now: the time.
            asked: how many jobs this exchange claims.
            slots: the slots that can run handlers.
            room: how many more jobs the worker would claim, were there no limit; 0 if it
                would not claim.
            has_more: whether the last claim was full.

        """
        if not self.is_on or self._sent is not None:
            return
        self._has_more = has_more
        # A stream of claims goes on without waiting for the next ration.
        is_short = self.most(now) < (asked if has_more and asked else 1)
        needs = room > 0 and is_short and now >= self._ask_at
        is_over = not room and not asked and self._tokens + self._unused > 0
        is_less = self._told > self._places
        if needs or is_over or is_less or exchange.extend or now >= self._renew_at:
            self._add(exchange, now, slots, room if needs else 0)

    def add_leave(self, exchange: Exchange, now: float) -> None:
        """Return the ration: the worker ends, and none of its handlers runs."""
        self._has_left = True
        self._add(exchange, now, 0, 0)

    def rest(self, exchange: Exchange, now: float) -> None:
        """Return the ration until it is needed again: none of its handlers runs."""
        if self._sent is None:
            self._places = self._target = 0
            self._add(exchange, now, 0, 0)

    @property
    def has_left(self) -> bool:
        """Whether there is nothing to give back at the worker's end."""
        return self._has_left or not (self._told or self._tokens or self._unused)

    def _add(self, exchange: Exchange, now: float, slots: int, need: int) -> None:
        ration = self._ration
        if ration is None or ration.places is None or now >= self.run_until:
            # It has no places, or others may have them; but some are in use.
            self._places = self._target = self.busy
        wish = need
        if need and ration is not None and ration.tokens is not None:
            rate = self._used / max(now - self._taken_at, 1e-3)
            wish = min(max(need, int(rate * ration.good_for)), _MOST)
        unused = self._tokens + self._unused
        since = [self._unused_since] if self._unused else []
        if self._tokens and ration is not None:
            since.append(ration.at)
        ask = Ask(self._holder, self._places, slots, need, wish, unused, min(since, default=None))
        self._tokens = self._unused = 0
        self._wanted = slots
        self._sent = Take(self._of, ask, self._code, self._declares)
        exchange.takes.append(self._sent)

    @property
    def _renew_at(self) -> float:
        ration = self._ration
        if ration is not None and ration.places is None:
            return self._look_at
        wants_more = self._has_more and self._target < self._wanted
        rest = min(_LOOK if wants_more else _RENEW, self._lease / 3)
        return min(self._renewed_at + rest, self._look_at)

    def wake_at(self, *, wants_claim: bool) -> float:
        """Return when to ask again without an event."""
        if not self.is_on or self._sent is not None:
            return inf
        return min(self._renew_at, self._ask_at) if wants_claim else self._renew_at

    # -- what became of it -----------------------------------------------------------------

    @property
    def _has_tokens(self) -> bool:
        return self.is_on and self._ration is not None and self._ration.tokens is not None

    def claimed(self, token: int, spent: Spent | None, count: int, start_by: float) -> None:
        """Record that a claim has brought so many jobs, and when they have to start."""
        if spent is not None:
            self.unspend(spent, spent.number - count)
            if count:
                self._taken_when[token] = spent.since
        if count and start_by < inf:
            self.start_by[token] = start_by

    def unspend(self, spent: Spent, count: int) -> None:
        """Record that so many tokens of a claim were not used."""
        if spent.start_by == self._start_by:
            self._tokens += count
        else:
            self._add_unused(count, spent.since)
        self._used -= count

    def turn_on(self) -> None:
        """Record that there is a limit."""
        if not self.is_on:
            self.is_on, self._ask_at = True, -inf
            self._places = self.busy

    def _add_unused(self, count: int, since: datetime) -> None:
        if count:
            self._unused_since = min(self._unused_since, since) if self._unused else since
            self._unused += count

    def took(self, take: Take, ration: Ration | None, at: float, now: float) -> None:
        """Record the answer to the exchange that was sent at a time to take a ration."""
        self._sent = None
        self._declares = self._code is not None and ration is None
        if ration is None and self._code is None:
            self.is_on = False
        self._ration = ration
        if ration is None:
            self._places = self._target = self._told = self._tokens = self._unused = 0
            return
        if ration.places is None:
            self._places = self._target = self._told = 0
        else:
            self._told = max(ration.places, take.ask.held)
            self.gives_back |= ration.places < min(self._places, self.busy)
            self._target = ration.places
            self._places = max(self._target, min(self._places, self.busy))
        self._renewed_at, self._look_at = at, inf
        self._ask_at = now + min(ration.wait, _RENEW)
        if ration.tokens is not None:
            self._tokens, self._start_by = ration.tokens, at + ration.good_for
            self._usable_until = at + ration.good_for / 2
            self._used, self._taken_at = 0, at

    def look(self) -> None:
        """Ask again at the next need: the limit may have been changed."""
        self._ask_at = self._look_at = -inf

    def shrink(self, busy: int) -> None:
        """Record how many slots are in use, by fewer handlers as they end."""
        self.busy = busy
        if self.is_shrinking:
            self._places = max(self._target, min(self._places, busy))

    def refund(self, claims: Iterable[Claimed]) -> None:
        """Record that jobs are given back unstarted: their tokens were not used."""
        if self._taken_when:
            for claimed in claims:
                if claimed.token in self._taken_when:
                    self._add_unused(1, self._taken_when[claimed.token])

    def forget(self, held: Collection[int]) -> None:
        """Forget the claims that have no more jobs."""
        if self.start_by:
            self.start_by = {token: at for token, at in self.start_by.items() if token in held}
            self._taken_when = {t: at for t, at in self._taken_when.items() if t in held}

    def not_taken(self, take: Take, *, is_refused: bool) -> None:
        """Record that an exchange was refused, or that its answer is lost."""
        self._sent = None
        if is_refused and take.ask.since is not None:
            self._add_unused(take.ask.unused, take.ask.since)
