"""When the worker looks for jobs, and where: claims, sweeps, and the notify lock."""

from collections.abc import Callable
from datetime import datetime
from math import inf
from typing import Literal

from bgjob._engine.notify_lock import NotifyLock
from bgjob._engine.outcome import Release, Unsettled
from bgjob._engine.protocol import MOST_FREED, Claim, Exchange, Sweep
from bgjob._engine.reply import Notice, Reply
from bgjob._engine.watermarks import Watermarks
from bgjob.job import Job
from bgjob.result import Retry

_MOMENT = 0.002
"""Seconds before the sweep that follows a claim which found jobs."""

_SOON = 1.0
"""Seconds within which a surveyed job may be the one whose time has come by the worker's clock."""

_FEW = 50
"""The most jobs of an exchange that takes as long as one without any."""


class Lookout:
    """What the worker knows of the jobs that it may claim.

    While there may be a due job that no claim has seen, `wants_claim` is true, or becomes true
    at `wake_at`: for a poll, a known due time, the end of a transaction, or a sweep. The claim
    after one that was not answered starts where that did, and answers the same notifications.
    """

    def __init__(self, poll_interval: float, *, notify: bool, chance: Callable[[], float]) -> None:
        self._poll_interval = poll_interval
        self.notify_lock = NotifyLock(poll_interval, enabled=notify, chance=chance)
        self.marks = Watermarks(poll_interval)
        self.has_more = True
        """Whether the last claim was full: there is more."""
        self._told = False  # something was enqueued since the last claim
        self._vague = False  # it may be behind the marks, or be due later
        self._poll_at = -inf
        self._due_at = inf  # when the next known job is due
        self._is_unsurveyed = False  # jobs were enqueued that may be due later, and not surveyed
        self._has_more_to_free = False
        self.blocked_after: str | None = None
        """The key after which the search for blocked keys continues; None: there were no keys."""

    @property
    def poll_interval(self) -> float:
        """Seconds between two polls: that of the worker, or longer where others poll enough."""
        return self._poll_interval * self.notify_lock.rarity

    def look(self, *, thoroughly: bool = True) -> None:
        """Claim next; and sweep soon, unless the jobs are at the marks."""
        self._told = True
        self._vague |= thoroughly

    def wake(self, notice: Notice) -> None:
        """Record that jobs were enqueued, or that another worker released the notify lock."""
        known = self.marks.told(notice.since)
        self.look(thoroughly=notice.later or notice.relief or not known)
        if notice.relief:
            self.notify_lock.relieve()

    def wants_claim(self, now: float) -> bool:
        """Whether to claim, if there is room."""
        return self.has_more or self._told or now >= min(self._look_at, self.marks.sweep_at)

    def wants_sweep(self, now: float, *, claims: bool) -> bool:
        """Whether to sweep without a claim; `claims` says whether one could be made instead."""
        return now >= self.marks.sweep_at and (self._has_more_to_free or not claims)

    def waits(self, now: float) -> bool:
        """Whether the worker may sleep, as far as the queue is concerned."""
        return not (self.has_more or self._told) and self.notify_lock.settled(now)

    def wake_at(self, now: float, *, claims: bool, free: bool) -> float:
        """Return when an answer above may change without an event, if a claim can be made."""
        lock_at = self.notify_lock.wake_at(now, free=free, has_more=self.has_more)
        return min(self.marks.sweep_at, lock_at, self._look_at if claims else inf)

    @property
    def _look_at(self) -> float:
        return min(self._poll_at, self._due_at, self.notify_lock.look_at, self.marks.look_back_at)

    def prefers_sweep(self, now: float) -> bool:
        """Whether the next claim is a sweep.

        While there are more jobs, sweep when it is due. After a wait, before a sleep,
        or without marks, sweep as soon as it can be afforded. A job that was notified
        is nearly always at the mark: it must not wait for a sweep.
        """
        marks = self.marks
        at = marks.sweep_at if self.has_more or self._told else marks.early_sweep_at
        return now >= at or not marks.known

    def begin_claim(self, now: float) -> tuple[bool, bool]:
        """Record a claim; return whether it answers a notification, and whether a vague one."""
        is_vague, self._vague = self._vague or self._due_at <= now, False
        is_told, self._told = self._told or is_vague, False
        return is_told, is_vague

    @property
    def watch(self) -> Literal["claims", "all"] | None:
        """Which transactions in progress a claim has to read."""
        if self.notify_lock.is_held:
            return None  # while it is held, no unseen enqueue is in progress
        return "claims" if self.marks.has_seen else "all"

    def answered(
        self, exchange: Exchange, reply: Reply, run_again: list[Unsettled], now: float
    ) -> None:
        """Record the answer to an exchange; `run_again` are the jobs that it has put back."""
        due_at = self._put_back(run_again, now)
        claim, wish, seen = exchange.claim, exchange.notify_lock, reply.seen
        lock, was_covered = self.notify_lock, self.notify_lock.is_covered
        for priority, since in reply.woken:
            self.wake(Notice({priority: since}))
        if wish:
            has_post = reply.has_post if exchange.asks_post else lock.has_post
            lock.answered(
                wish,
                reply.lock_answer,
                now,
                has_post=has_post,
                seat=reply.seat,
                has_spares=reply.has_spares,
            )
        if isinstance(claim, Claim):
            self._claimed(claim, reply, now)
        elif isinstance(claim, Sweep):
            self._swept(claim, reply, exchange.at, now)
        if not isinstance(claim, Sweep) and len(reply.claimed) + len(exchange.outcomes) <= _FEW:
            self.marks.took(now - exchange.at)
        if seen is not None and wish == "release":
            self.marks.notifications_off(seen.at)
        elif seen is not None:
            self.marks.saw(seen, now)
        if wish == "take":
            looked = claim is not None and claim.looks
            if lock.is_held:
                self.marks.notifications_on(now, polled_since=looked and not self.has_more)
            if not looked and not (was_covered and lock.is_covered):
                self.look()  # for jobs that were committed before the lock was taken
        self._due_at = min(self._due_at, due_at)  # its survey ran before the settlements

    def _put_back(self, outcomes: list[Unsettled], now: float) -> float:
        due_at = inf
        for outcome in outcomes:
            job, result = outcome.claimed.job, outcome.result
            if isinstance(result, Release):
                # It keeps its due time, which is behind the marks.
                known = self.marks.told({job.priority: job.next_run_at})
                self.look(thoroughly=not known)
                continue
            due_at = min(due_at, now + outcome.delay)
            if isinstance(result, Retry) and result.priority is not None:
                self.marks.retried(result.priority)
        return due_at

    def _claimed(self, claim: Claim, reply: Reply, now: float) -> None:
        jobs, marks = reply.claimed, self.marks
        marks.answered()
        self.has_more = len(jobs) + reply.unread + reply.met == claim.limit
        self._looked(jobs, claim.marks, now)
        if claim.is_vague and not self.has_more:
            # The notified job may be behind the marks, or have an unknown priority, and
            # only a sweep finds out when the next job is due; what is known of later stays so.
            if self._due_at <= now:
                self._due_at = inf
            # Not immediately: the thread that was woken for a job needs the interpreter,
            # and its settlement may be part of the sweep's exchange.
            soon = max(marks.early_sweep_at, now + _MOMENT if jobs else now)
            marks.sweep_at = min(marks.sweep_at, soon)
            self._is_unsurveyed = True

    def _swept(self, sweep: Sweep, reply: Reply, began: float, now: float) -> None:
        marks, (jobs, freed, since, *_) = self.marks, reply.swept
        marks.poll_interval = self.poll_interval
        if sweep.limit:
            self.has_more = len(jobs) + freed + reply.unread + reply.met == sweep.limit
            self._looked(jobs, None, now)
        has_found = bool(reply.strays) or since is not None
        if sweep.window is None:
            full = self.has_more or not sweep.limit
            marks.swept(reply.lines, reply.seen, full=full, began=began, now=now)
        else:
            has_found |= marks.swept_part(sweep.window, reply.lines, began=began, now=now)
            marks.told({stray.priority: stray.since for stray in reply.strays})
        if since is not None:
            marks.freed(since)  # start the next claim at the freed jobs that are not suspects
        if has_found:
            self.look(thoroughly=False)
        if sweep.limit == 0 and sweep.window is None:
            self._has_more_to_free = False
            if freed == MOST_FREED:
                marks.sweep_at = marks.early_sweep_at
        else:
            if sweep.limit and freed and self.has_more:
                # There may be more to free than there are slots.
                self._has_more_to_free, marks.sweep_at = True, -inf
            self.blocked_after = reply.blocked.after if reply.swept.has_keys else None
            # There are keys that no sweep has checked, or more than one sweep checks.
            if self.blocked_after or (self.blocked_after is not None and sweep.after is None):
                marks.sweep_at = min(marks.sweep_at, marks.early_sweep_at)
        waits = [line.wait for line in reply.lines if line.wait is not None]
        due_at = now + max(min(waits), 0.0) if waits else inf
        if self.notify_lock.is_spare:
            # Others know it too, and call. Of what the spare itself put back only it knows; the
            # server's clock may say that it is due a moment later.
            if self._due_at > now:
                due_at = self._due_at
            elif due_at > now + _SOON:
                due_at = inf
        if sweep.limit:
            self._due_at = due_at
        else:
            # Such a sweep claims nothing, and a survey shows no job that has become due since the
            # last claim: look for those of a time that was known, and for those that were not
            # surveyed.
            self._due_at = min(self._due_at, due_at)
            if self._is_unsurveyed:
                self.look(thoroughly=False)
        self._is_unsurveyed = False

    def _looked(self, jobs: list[Job], starts: dict[int, datetime] | None, now: float) -> None:
        self._poll_at = now + self.poll_interval
        self.notify_lock.arrived(len(jobs), now)
        self.marks.claimed(jobs, starts, full=self.has_more)

    def rejected(self, exchange: Exchange, now: float) -> None:
        """Record that the server refused an exchange."""
        self.take_back(exchange)
        if isinstance(exchange.claim, Sweep):
            self.marks.refused(exchange.claim.window, began=exchange.at, now=now)

    def take_back(self, exchange: Exchange) -> None:
        """Record that an exchange was not answered: the next claim starts where its claim did."""
        claim = exchange.claim
        if exchange.asks_post:
            self.notify_lock.place_unknown()
        if isinstance(claim, Claim):
            self.marks.again(claim.marks)
        if claim is not None and claim.is_told:
            self.look()
