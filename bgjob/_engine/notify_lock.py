"""Whether enqueues have to notify a worker.

A notification serialises the commits of all producers, so it is asked for only
while a worker sleeps: measured with 8 producers, 14,900 commits/s without it
and 4,200 with it. A worker that is about to sleep takes the queue's lock; enqueues
share it until their transactions end, and notify if they cannot. After it has taken
the lock the worker claims once more, so that no job is missed in between.

The other sleeping workers rely on the holder. It notifies them when it releases the lock. If it
dies they are not notified, and enqueues do not notify until one of them has the lock. So
one of them is the deputy: it holds a second lock, and tries for the first one twice
a second. The others try for both once a second. So of 2,000 sleeping workers only one
asks often, and the death of the holder costs 0.5 s, that of both a second, whatever the
poll interval is. A worker that takes a lock which was not released notifies the others.

Each queue with two workers has a deputy, and so have two queues that share a lock. When a try is
nearly due, the next poll contains it. With five tries a second, each an exchange of its own, each
of 100 idle workers made 1.54 exchanges a second, and not 1.27 (benchmarks/queues.py).

A queue has 16 posts. An idle worker that finds the lock taken takes one, and leaves it when it has
had no free slot for a second. Those with a post, the holder and the deputy poll at the poll
interval, and are notified. A worker that finds all posts taken is a spare: it polls, and tries for
the locks, ten times as rarely, at times of its own, and is not notified. Each poll is an exchange
of four statements or five; 2,000 workers that polled once a second used more than one core of the
server, and when each of them looked after each enqueue, both cores for minutes
(benchmarks/fleet.py).

So that no job waits beside an idle spare, some spares can be called: a queue has 240 seats, each
with a channel of its own. A spare that is called tries for the lock, and claims. A worker that was
idle calls two of them when its claims have been full for 10 ms. So one of them takes the lock if
all notified workers are busy; and as long as there are more jobs, each round doubles the number of
workers that are awake. A holder that ends calls, too.

A spare without a seat takes one, or a post, within ten polls of the moment at which one is free.
Beside spares, a worker that has had no free slot for a second is not notified of enqueues. The
answer to an exchange changes the worker's subscription. It looks once more after it has subscribed,
so that it misses nothing in between.

Enqueues that do not commit keep all workers from taking the lock. Then, too, only the deputy
tries often; the others poll.

While jobs flow, a worker polls every few milliseconds and does not hold the lock, although it is
often idle for a moment. The flow is an estimate that fades. The simpler rule, to do without the
lock only after a full claim, holds it nearly always, because a worker that keeps up makes no
full claim. At 2,000 jobs/s (benchmarks/notifications.py) nearly each enqueue then notifies, and
not one in 30; the worker's process needs 1.9 times the processor time, the server 1.5 times; half
of the jobs start within 2.6 ms instead of 3.9, but 1 % after 37 ms instead of 12. Eight producers
enqueue 0.7 times as fast (benchmarks/producers.py). At 200 jobs/s, in a drain and when idle
the rules do the same.
"""

from collections.abc import Callable
from math import exp, inf
from typing import Literal, TypeAlias

from bgjob._sql.notices import Subscription

LockWish: TypeAlias = Literal["take", "release", "leave"]
"""What to do with the notify lock, or with a post or seat only."""

_FLOW = 1000.0
"""Jobs/s from which the worker polls often and does not take the lock."""

_LOOK = 0.002
"""Seconds between two claims while jobs flow, and the first pause if the lock is contended."""

_WATCH = 0.5
"""Seconds between two tries of the deputy while another worker holds the lock."""

_CONTENDED = 0.2
"""The most seconds between two of its tries while an uncommitted enqueue shares the lock."""

_WITH_POLL = 0.1
"""How many seconds earlier a try is made if a poll is due."""

_COVERED = 1.0
"""The most seconds between two tries of any other worker."""

_LEAVE = 1.0
"""Seconds without need of polls before the worker leaves its post."""

_SPARE = 10.0
"""By which factor a worker without a post polls more rarely, on average."""

_RELEASE = 0.01
"""Seconds without need of notifications before the worker releases the lock, which notifies, or
calls spares. While its claims are full it needs none."""

_FADE = 0.1
"""Seconds in which the estimated flow falls to a third."""


class NotifyLock:
    """One worker's state of the notify lock of its queue."""

    def __init__(self, poll_interval: float, *, enabled: bool, chance: Callable[[], float]) -> None:
        self._poll_interval = poll_interval
        self._enabled = enabled
        self._chance = chance
        self.is_held = False
        """Whether this worker holds the lock, so that enqueues notify."""
        self.look_at = inf
        """When to claim again, while jobs flow."""
        self.is_covered = False
        """Whether another worker holds the lock, or is the deputy."""
        self.is_deputy = False
        self.relieves = False
        """Whether enqueues may have notified no worker for a while before the lock is taken."""
        self.has_post = False
        self.rarity = 1.0
        """How many poll intervals lie between two polls: more than one for a spare."""
        self.subscription = Subscription()
        """The notifications that the worker needs."""
        self._has_spares = False  # when it tried last
        self.may_call = False
        """Whether it was idle, beside spares, and has called none since."""
        self._is_unknown = False  # whether it has a place
        self._take_at = -inf
        self._pause = _LOOK
        self._unneeded_since = inf
        self._flow = 0.0
        self._flow_at = -inf

    def wish(
        self, now: float, *, free: bool, has_more: bool, polls: bool = False
    ) -> LockWish | None:
        """Return what to do with the lock.

        Args:
            now: the time.
            free: whether a slot is free.
            has_more: whether there are more jobs than the worker has claimed.
            polls: whether the worker polls now, so that a try costs no exchange.

        """
        if self._is_unknown:
            return "leave"
        if free and not has_more and not self._flows(now):
            self._unneeded_since = inf
            take_at = self._take_at - _WITH_POLL if polls else self._take_at
            is_time = self._enabled and not self.is_held and now >= take_at
            return "take" if is_time else None
        self._unneeded_since = min(self._unneeded_since, now)
        if now < self._unneeded_since + self._rest(has_more=has_more):
            return None
        return "release" if self.is_held else "leave"

    def _rest(self, *, has_more: bool) -> float:
        """Return the seconds without need after which to release the lock, or to leave."""
        if self.is_held or (self.may_call and has_more):
            return _RELEASE
        is_in_the_way = self.has_post or self.seat is not None or self._is_disturbed
        return _LEAVE if is_in_the_way else inf

    @property
    def _is_disturbed(self) -> bool:
        """Whether it is notified while a spare is not."""
        return self.subscription.enqueues and self._has_spares

    @property
    def may_leave(self) -> bool:
        """Whether there is something to release, or to leave."""
        has_place = self.has_post or self.seat is not None or self._is_unknown
        return self.is_held or has_place or self.may_call or self._is_disturbed

    @property
    def seat(self) -> int | None:
        """The key of its seat."""
        return self.subscription.seat

    @property
    def is_spare(self) -> bool:
        """Whether others poll often enough, and are notified."""
        return self.rarity > 1.0

    @property
    def polls(self) -> bool:
        """Whether a try for the lock has to sweep too: it is as rare as a poll, or may succeed."""
        return not self.is_covered or (self._poll_interval <= _COVERED and not self.is_deputy)

    def wake_at(self, now: float, *, free: bool, has_more: bool) -> float:
        """Return when `wish` may change."""
        if self._is_unknown:
            return now
        if self.is_held or not free or has_more:
            return self._unneeded_since + self._rest(has_more=has_more)
        if not self._enabled:
            return inf
        return max(self._take_at, self.look_at if self.look_at < inf else now)

    def settled(self, now: float) -> bool:
        """Whether the lock needs no try now, so that the worker may sleep."""
        return self.is_held or not self._enabled or now < self._take_at

    def answered(
        self,
        asked: LockWish,
        answer: str | None,
        now: float,
        *,
        has_post: bool = True,
        seat: int | None = None,
        has_spares: bool = False,
    ) -> None:
        """Record the server's answer; after a try, its place, and whether there are spares."""
        self._unneeded_since, self._is_unknown = inf, False
        self.may_call = asked == "take" and has_spares
        self.has_post = asked == "take" and has_post
        self.is_held = asked == "take" and answer == "taken"
        self.is_covered = answer in ("covered", "deputy")
        self.is_deputy = answer in ("contended", "deputy")
        is_spare = asked == "take" and answer == "covered" and not has_post
        if asked == "take":
            self._has_spares = has_spares
            self.subscription = Subscription(enqueues=not is_spare, seat=seat)
        elif asked == "leave" and (self._has_spares or not self.subscription.enqueues):
            self.subscription = Subscription(enqueues=False)
        if answer == "contended":
            self.rarity = 1.0
            self._take_at = now + self._pause
            longest = min(self._poll_interval, _CONTENDED)
            self.relieves |= self._pause >= longest
            self._pause = min(2 * self._pause, longest)
            return
        self.relieves, self._pause = self.is_covered or asked == "leave", _LOOK
        self.rarity = _SPARE * (0.5 + self._chance()) if is_spare else 1.0
        if asked != "take":
            self._take_at = now
            self.look_at = now + _LOOK if self._flows(now) else inf
        else:
            rest = _WATCH if self.is_deputy else _COVERED
            self._take_at = now + min(rest, self._poll_interval) * self.rarity

    def place_unknown(self) -> None:
        """Record that a try was not answered: leave a place that it may have, or take no second."""
        self.has_post, self._is_unknown = False, True
        self.subscription = Subscription()

    def arrived(self, jobs: int, now: float) -> None:
        """Record how many jobs a claim returned."""
        self._flow = self._flow_now(now) + jobs / _FADE
        self._flow_at = now
        self.look_at = now + _LOOK if self._flow > _FLOW and not self.is_held else inf

    def relieve(self) -> None:
        """Record that another worker released the lock, or calls: try for it soon."""
        self._take_at, self.is_covered, self.relieves = -inf, False, False

    def lose(self) -> None:
        """Record that the connection is gone, and the lock with it."""
        self.is_held, self._take_at, self._unneeded_since = False, -inf, inf
        self.is_covered = self.is_deputy = self.relieves = self.has_post = False
        self._has_spares = self.may_call = self._is_unknown = False
        self.rarity, self.subscription = 1.0, Subscription()

    def _flows(self, now: float) -> bool:
        return self._flow_now(now) > _FLOW

    def _flow_now(self, now: float) -> float:
        return self._flow * exp((self._flow_at - now) / _FADE) if self._flow else 0.0
