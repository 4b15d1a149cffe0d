"""Whether enqueues have to notify a worker.

A notification serialises the commits of all producers, so it is asked for only
while a worker sleeps: measured with 8 producers, 14,900 commits/s without it
and 4,200 with it. A worker that parks holds the queue's lock; enqueues share
it until their transactions end, and notify where they cannot. After it parked
a worker looks once more, and nothing can fall between.

The others that sleep rely on the holder. When it gives the lock up it tells them;
when it dies nobody does, and until one of them has the lock enqueues do not notify. So
one of them is the deputy: it holds a second lock, and tries for the first one five times
a second. The others try for both once a second. Of a fleet of 2,000 workers that sleep the
one asks often, and the death of the holder costs 0.2 s, that of both a second, whatever the
poll interval is. Whoever takes a lock that nobody gave up tells the others to look.

Enqueues that do not commit keep the lock from everyone. Then, too, only the deputy looks
often; the others poll.
"""

from math import exp, inf
from typing import Literal

_FLOW = 1000.0
"""Jobs/s from which the worker looks by itself, every so often, and does not park."""

_LOOK = 0.002
"""Seconds between two looks while jobs flow, and the first pause when the lock is contended."""

_WATCH = 0.2
"""Seconds between two tries of the deputy: while another worker holds the lock, and at the
longest while an enqueue that has not committed keeps it."""

_COVERED = 1.0
"""Seconds between two tries of any other worker, at the longest."""

_RELEASE = 0.01
"""Seconds without need of notifications before the worker says so: each time costs one."""

_FADE = 0.1
"""Seconds in which the flow is forgotten, but for a third."""


class NotifyLock:
    """The lock of one queue, as this worker holds it or wants it."""

    def __init__(self, poll_interval: float, *, enabled: bool) -> None:
        self._poll_interval = poll_interval
        self._enabled = enabled
        self.is_held = False
        """Whether this worker holds the lock: enqueues notify."""
        self.look_at = inf
        """When to look again, while jobs flow."""
        self.is_covered = False
        """Whether another worker holds the lock, or is the deputy."""
        self.is_deputy = False
        self.relieves = False
        """Whether enqueues may have notified nobody for a while, when the lock is had."""
        self._take_at = -inf
        self._pause = _LOOK
        self._unneeded_since = inf
        self._flow = 0.0
        self._flow_at = -inf

    def wish(self, now: float, *, free: bool) -> Literal["take", "release"] | None:
        """Say what to do with the lock, given whether a slot is free."""
        needed = free and not self._flows(now)
        if not self.is_held:
            return "take" if self._enabled and needed and now >= self._take_at else None
        if needed:
            self._unneeded_since = inf
            return None
        self._unneeded_since = min(self._unneeded_since, now)
        return "release" if now >= self._unneeded_since + _RELEASE else None

    @property
    def polls(self) -> bool:
        """Whether a try for the lock comes no more often than a poll, or needs a look."""
        return not self.is_covered or (self._poll_interval <= _COVERED and not self.is_deputy)

    def wake_at(self, now: float, *, free: bool) -> float:
        """Give the time at which `wish` may say something new."""
        if self.is_held:
            return self._unneeded_since + _RELEASE
        if not self._enabled or not free:
            return inf
        return max(self._take_at, self.look_at if self.look_at < inf else now)

    def settled(self, now: float) -> bool:
        """Whether there is nothing to take now, so that the worker may sleep."""
        return self.is_held or not self._enabled or now < self._take_at

    def answered(self, asked: Literal["take", "release"], answer: str | None, now: float) -> None:
        """Take the server's answer."""
        self._unneeded_since = inf
        self.is_held = asked == "take" and answer == "taken"
        self.is_covered = answer in ("covered", "deputy")
        self.is_deputy = answer in ("contended", "deputy")
        if answer == "contended":
            self._take_at = now + self._pause
            longest = min(self._poll_interval, _WATCH)
            self.relieves |= self._pause >= longest
            self._pause = min(2 * self._pause, longest)
            return
        self.relieves, self._pause = self.is_covered, _LOOK
        if asked == "release":
            self._take_at = now
            self.look_at = now + _LOOK if self._flows(now) else inf
        else:
            rest = _WATCH if self.is_deputy else _COVERED
            self._take_at = now + min(rest, self._poll_interval)

    def arrived(self, jobs: int, now: float) -> None:
        """Learn how many jobs a claim brought."""
        self._flow = self._flow_now(now) + jobs / _FADE
        self._flow_at = now
        self.look_at = now + _LOOK if self._flow > _FLOW and not self.is_held else inf

    def relieve(self) -> None:
        """Another worker gave the lock up: try for it soon."""
        self._take_at, self.is_covered, self.relieves = -inf, False, False

    def lose(self) -> None:
        """Take it that the connection is gone, and the lock with it."""
        self.is_held, self._take_at, self._unneeded_since = False, -inf, inf
        self.is_covered = self.is_deputy = self.relieves = False

    def _flows(self, now: float) -> bool:
        return self._flow_now(now) > _FLOW

    def _flow_now(self, now: float) -> float:
        return self._flow * exp((self._flow_at - now) / _FADE) if self._flow else 0.0
