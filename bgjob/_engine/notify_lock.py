"""Whether enqueues have to notify a worker.

A notification serialises the commits of all producers, so it is asked for only
while a worker sleeps: measured with 8 producers, 14,900 commits/s without it
and 4,200 with it. A worker that is about to sleep takes the queue's lock; enqueues
share it until their transactions end, and notify if they cannot. After it has taken
the lock the worker claims once more, so that no job is missed in between.

The other sleeping workers rely on the holder. It notifies them when it releases the lock. If it
dies they are not notified, and enqueues do not notify until one of them has the lock. So
one of them is the deputy: it holds a second lock, and tries for the first one five times
a second. The others try for both once a second. So of 2,000 sleeping workers only one
asks often, and the death of the holder costs 0.2 s, that of both a second, whatever the
poll interval is. A worker that takes a lock which was not released notifies the others.

A queue has 16 posts. An idle worker that finds the lock taken takes one, and leaves it when it has
had no free slot for a second. Those with a post, the holder and the deputy poll at the poll
interval. A worker that finds all posts taken is a spare: it polls, and tries for the locks, ten
times as rarely, at times of its own. Each poll is an exchange of five statements; 2,000 workers
that polled once a second used more than one core of the server (benchmarks/fleet.py). A spare is
notified like the others. It finds within ten polls that a post is free.

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

LockWish: TypeAlias = Literal["take", "release", "leave"]
"""What to do with the notify lock, or with a post only."""

_FLOW = 1000.0
"""Jobs/s from which the worker polls often and does not take the lock."""

_LOOK = 0.002
"""Seconds between two claims while jobs flow, and the first pause if the lock is contended."""

_WATCH = 0.2
"""Seconds between two tries of the deputy while another worker holds the lock, and at most
while an uncommitted enqueue shares it."""

_COVERED = 1.0
"""The most seconds between two tries of any other worker."""

_LEAVE = 1.0
"""Seconds without need of polls before the worker leaves its post."""

_SPARE = 10.0
"""By which factor a worker without a post polls more rarely, on average."""

_RELEASE = 0.01
"""Seconds without need of notifications before the worker releases the lock, which notifies."""

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
        self._take_at = -inf
        self._pause = _LOOK
        self._unneeded_since = inf
        self._flow = 0.0
        self._flow_at = -inf

    def wish(self, now: float, *, free: bool) -> LockWish | None:
        """Return what to do with the lock; `free` says whether a slot is free."""
        if free and not self._flows(now):
            self._unneeded_since = inf
            is_time = self._enabled and not self.is_held and now >= self._take_at
            return "take" if is_time else None
        self._unneeded_since = min(self._unneeded_since, now)
        if self.is_held:
            return "release" if now >= self._unneeded_since + _RELEASE else None
        return "leave" if self.has_post and now >= self._unneeded_since + _LEAVE else None

    @property
    def polls(self) -> bool:
        """Whether a try for the lock has to sweep too: it is as rare as a poll, or may succeed."""
        return not self.is_covered or (self._poll_interval <= _COVERED and not self.is_deputy)

    def wake_at(self, now: float, *, free: bool) -> float:
        """Return when `wish` may change."""
        if self.is_held:
            return self._unneeded_since + _RELEASE
        if self.has_post and not free:
            return self._unneeded_since + _LEAVE
        if not self._enabled or not free:
            return inf
        return max(self._take_at, self.look_at if self.look_at < inf else now)

    def settled(self, now: float) -> bool:
        """Whether the lock needs no try now, so that the worker may sleep."""
        return self.is_held or not self._enabled or now < self._take_at

    def answered(
        self, asked: LockWish, answer: str | None, now: float, *, has_post: bool = True
    ) -> None:
        """Record the server's answer; `has_post` says whether it has a post after a try."""
        self._unneeded_since = inf
        self.has_post = asked == "take" and has_post
        self.is_held = asked == "take" and answer == "taken"
        self.is_covered = answer in ("covered", "deputy")
        self.is_deputy = answer in ("contended", "deputy")
        if answer == "contended":
            self.rarity = 1.0
            self._take_at = now + self._pause
            longest = min(self._poll_interval, _WATCH)
            self.relieves |= self._pause >= longest
            self._pause = min(2 * self._pause, longest)
            return
        self.relieves, self._pause = self.is_covered or asked == "leave", _LOOK
        is_spare = asked == "take" and answer == "covered" and not has_post
        self.rarity = _SPARE * (0.5 + self._chance()) if is_spare else 1.0
        if asked != "take":
            self._take_at = now
            self.look_at = now + _LOOK if self._flows(now) else inf
        else:
            rest = _WATCH if self.is_deputy else _COVERED
            self._take_at = now + min(rest, self._poll_interval) * self.rarity

    def post_unknown(self) -> None:
        """Record that a try for a post was not answered: a second post must not be taken."""
        self.has_post = True

    def arrived(self, jobs: int, now: float) -> None:
        """Record how many jobs a claim returned."""
        self._flow = self._flow_now(now) + jobs / _FADE
        self._flow_at = now
        self.look_at = now + _LOOK if self._flow > _FLOW and not self.is_held else inf

    def relieve(self) -> None:
        """Record that another worker released the lock: try for it soon."""
        self._take_at, self.is_covered, self.relieves = -inf, False, False

    def lose(self) -> None:
        """Record that the connection is gone, and the lock with it."""
        self.is_held, self._take_at, self._unneeded_since = False, -inf, inf
        self.is_covered = self.is_deputy = self.relieves = self.has_post = False
        self.rarity = 1.0

    def _flows(self, now: float) -> bool:
        return self._flow_now(now) > _FLOW

    def _flow_now(self, now: float) -> float:
        return self._flow * exp((self._flow_at - now) / _FADE) if self._flow else 0.0
