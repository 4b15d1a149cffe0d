"""Where the next claim of a queue starts.

A claim that starts at the left edge of the index walks over every running row and
every dead row that an old snapshot keeps: measured, 82,000 jobs/s fell to 28,000
after 200,000 jobs. So each claim starts at the last due time that was claimed, by
priority: its mark.

Rows do appear behind a mark: producers commit late, and leases end. There are three
ways back. Each claim that moves the marks reads which transactions are in progress.
When one of these has ended, the next claim starts where it may have begun to
write: when the last claim began that had not seen it. A transaction that was in
progress while a worker held the notify lock notifies it when it began, and the next
claim starts there. And a sweep over everything, which alone finds ended leases, is
due at the poll interval, or at forty times its own cost if that is longer: the
cost of the cheaper one of the last two. If its rows took over 50 ms, as many dead rows
do, or if many jobs have been claimed since, the next sweep goes in parts: ranges of due
times whose rows take about 20 ms each, from the latest back. A part claims nothing. It
frees ended leases, and returns where the next claim must start.

What is measured is the wall-clock time of an exchange, from its sending to its answer. On
a busy host that is long without any row. The rows' time is what a sweep takes beyond twice
the usual time of an exchange: three of four of the last eight small exchanges that were no
sweep, such as polls, took no longer than the usual time. If there was none yet, all of a
sweep's time counts as its rows'. A part rests for forty times the rows' time; or, while that
is less than 50 ms, for forty times its whole time, but at most 2 s.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from math import inf

from bgjob._sql.claims import Window
from bgjob._sql.survey import Line, OpenTransactions
from bgjob.job import Job

_SLACK = timedelta(milliseconds=20)
"""A row's due time may be read a moment before its transaction gets a number."""

_WALKS = 20
"""How often claims that look back walk over one row at most: a claim that looks back over
a second comes a twentieth of a second after the one before."""

REST = 40
"""Times the cost of a sweep until the next: sweeps take at most a fortieth of the time, but for
a part that is slow for once."""
_OLDEST = datetime(1, 1, 2, tzinfo=UTC)

_LATEST = datetime(9999, 12, 30, tzinfo=UTC)

_MOST_COST = 0.05
"""Seconds that a sweep may take in one piece: the worker claims nothing meanwhile."""

_MANY = 5000
"""Claimed jobs whose dead rows would make a sweep take that long."""

_PART = 0.02
"""Seconds that one part of a sweep takes, about."""

_AFTER_REFUSAL = 1.0
"""The least seconds from a refused sweep to the next."""

_MOST_OTHERS = 8
"""Small exchanges whose times are kept: on a host whose times vary, the least of them is too
little, and a single slow one is too much."""

_SWEEP = 2
"""A sweep's statements, of a poll's: on a host whose processors are all busy, parts without rows
took 1.5 to 1.7 times as long as polls."""

_NARROWEST = timedelta(milliseconds=1)
_FIRST_WIDTH = timedelta(seconds=0.1)
_WIDEST = timedelta(days=366)

_MOST_UNUSED = 50
"""Priorities without a job that keep their marks. With the marks of 20,000 priorities, each used
once, a claim took 123 ms; sweeps find the jobs of forgotten marks."""


class Watermarks:
    """The marks of one queue, and when to look behind them."""

    def __init__(self, poll_interval: float) -> None:
        self.poll_interval = poll_interval
        self._marks: dict[int, datetime] = {}
        self._told_since: dict[int, datetime] = {}
        # For each sent claim, where it starts before the marks.
        self._looking: deque[dict[int, datetime]] = deque()
        # Transactions that the last claim that moved the marks has not seen have not
        # written before it; the begin of those in progress at the start is unknown.
        self._seen_at = _OLDEST
        self._under_way: dict[int, datetime] = {}  # their earliest begin
        self._late_since = _OLDEST
        self._looked_back_at = -inf
        self._look_back_at = inf
        self._swept_at = -inf
        self._cost = 0.0
        self._last_cost = poll_interval / REST  # affordable at every poll
        self.sweep_at = -inf
        """When the next sweep is due."""
        self._in_parts = False
        self._claimed = 0  # since the last full sweep
        self._until = _LATEST  # where the next part ends
        self._width = self._first_width = _FIRST_WIDTH
        self._parts_cost = 0.0  # of their rows
        self._slowest = self._slowest_before = 0.0  # rows of a part, of this pass and of the last
        self._others: deque[float] = deque(maxlen=_MOST_OTHERS)

    @property
    def known(self) -> bool:
        """Whether there is any mark to claim from."""
        return bool(self._marks)

    @property
    def has_seen(self) -> bool:
        """Whether the transactions in progress at some time are known."""
        return self._seen_at > _OLDEST

    @property
    def early_sweep_at(self) -> float:
        """When a sweep can be afforded; not later than when it is due."""
        return min(self.sweep_at, self._swept_at + REST * self._cost)

    @property
    def look_back_at(self) -> float:
        """When to start at the begin of a transaction that has ended."""
        if self._look_back_at == inf or any(m > self._late_since for m in self._marks.values()):
            return self._look_back_at
        return inf  # its rows are after the marks, as in a backlog

    def start(self, now: float) -> dict[int, datetime]:
        """Return the due time to claim from, by priority."""
        marks, told = dict(self._marks), self._told_since
        # A claim that is sent before the last is answered may have to continue where that ends.
        for since in (told, *self._looking):
            marks.update((p, min(at, marks[p])) for p, at in since.items() if p in marks)
        told.clear()
        if self._look_back_at <= now:
            marks = {p: min(mark, self._late_since) for p, mark in marks.items()}
            self._looked_back_at, self._look_back_at = now, inf
        self._looking.append({p: m for p, m in marks.items() if m < self._marks[p]})
        return marks

    def answered(self) -> None:
        """Record that the first sent claim was answered."""
        self._looking.popleft()

    def again(self, starts: Mapping[int, datetime]) -> None:
        """Record that the last sent claim was not answered: the next starts there again."""
        self._looking.pop()
        self.told(starts)

    def told(self, since: Mapping[int, datetime]) -> bool:
        """Record when enqueuing transactions began; True if the priorities are known."""
        known = since.keys() <= self._marks.keys()
        told = self._told_since
        for priority in since.keys() & self._marks.keys():
            told[priority] = min(since[priority], told.get(priority, since[priority]))
        return known

    def saw(self, seen: OpenTransactions, now: float) -> None:
        """Record the transactions in progress after a claim.

        If it claimed nothing the marks have not moved: rows of transactions that it may not
        have seen will be after them.
        """
        followed = self._under_way
        ended = followed.keys() - seen.numbers
        if ended:
            self._look_back(min(followed.pop(number) for number in ended), seen.at, now)
        if seen.is_complete:
            since = self._seen_at - _SLACK if self.has_seen else _OLDEST
            self._under_way = {number: followed.get(number, since) for number in seen.numbers}
            self._seen_at = seen.at

    def notifications_on(self, now: float, *, polled_since: bool) -> None:
        """Record that every later enqueue notifies, so its transaction needs no tracking.

        If the queue was not polled since the lock was taken, look back once more.
        """
        if self._under_way and not polled_since:
            self._look_back(min(self._under_way.values()), self._seen_at, now)
        self._under_way.clear()

    def notifications_off(self, at: datetime) -> None:
        """Record until when every enqueue has notified."""
        self._seen_at = at

    def _look_back(self, since: datetime, until: datetime, now: float) -> None:
        if self._look_back_at < inf:
            since = min(since, self._late_since)
        rest = min((until - since).total_seconds() / _WALKS, self.poll_interval)
        self._late_since, self._look_back_at = since, max(now, self._looked_back_at + rest)

    def freed(self, since: datetime) -> None:
        """Record that jobs due from then on are free again, of any priority."""
        self.told(dict.fromkeys(self._marks, since))

    def retried(self, priority: int) -> None:
        """Record that a job was retried with this priority, which may have no mark yet."""
        self._marks.setdefault(priority, _OLDEST)

    def claimed(
        self, jobs: Sequence[Job], starts: Mapping[int, datetime] | None = None, *, full: bool
    ) -> None:
        """Move the marks to the jobs of a claim, in its order.

        A full claim has seen no job behind its last one, so that the mark of that
        priority moves there even if that is back; and for the priorities behind it the
        next claim has to start where this one would have.
        """
        if not jobs:
            return
        self._claimed += len(jobs)
        # The last job of each priority is its latest; usually there is one priority.
        one = jobs[0].priority == jobs[-1].priority
        for job in jobs[-1:] if one else jobs:
            mark = self._marks.get(job.priority)
            if mark is None or job.next_run_at > mark:
                self._marks[job.priority] = job.next_run_at
        if full:
            last = jobs[-1].priority
            self._marks[last] = jobs[-1].next_run_at
            if starts is not None and len(starts) > 1:
                self.told({priority: starts[priority] for priority in starts if priority > last})
        if self._claimed > _MANY and len(self._marks) <= _MOST_UNUSED:
            self._in_parts = True

    def took(self, seconds: float) -> None:
        """Record how long a small exchange took that was no sweep."""
        self._others.append(seconds)

    def _beyond_usual(self, seconds: float) -> float:
        """Return how much longer a sweep took than one without rows does on this host now."""
        others = sorted(self._others)
        usual = others[(len(others) - 1) * 3 // 4] if others else 0.0
        return max(seconds - _SWEEP * usual, 0.0)

    def swept(
        self,
        lines: Sequence[Line],
        seen: OpenTransactions | None,
        *,
        full: bool,
        began: float,
        now: float,
    ) -> None:
        """Record a sweep: the priorities in use, and the transactions in progress after it."""
        # Rows that it did not see are of tracked transactions, or were written since then.
        seen_at = seen.at if seen is not None and seen.is_complete else self._seen_at
        for line in lines:
            since = _OLDEST if full else min(line.since, seen_at)
            self._marks.setdefault(line.priority, since)
        if not full:
            self._look_back_at = inf
            self._forget_all_but({line.priority for line in lines})
        self._swept_at = now
        # A single slow sweep shows a busy host or cold pages, and must not keep the worker
        # from sweeping for forty times as long.
        self._cost, self._last_cost = min(self._last_cost, now - began), now - began
        self.sweep_at = now + max(self.poll_interval, REST * self._cost)
        self._in_parts, self._claimed = self._beyond_usual(self._last_cost) > _MOST_COST, 0
        if self._in_parts:  # that sweep saw everything: the first part need not come soon
            self._until, self._parts_cost = _LATEST, 0.0
            self.sweep_at = now + max(self.poll_interval, REST * _PART)

    def refused(self, window: Window | None, *, began: float, now: float) -> None:
        """Record that the server refused a sweep: claims go on, and the next one comes later.

        If it took long it may have been too much for the server: the next one is smaller.
        Otherwise the refused part is left to the next pass.
        """
        cost = now - began
        of_rows = self._beyond_usual(cost)
        if window is None:
            self._in_parts = of_rows > _MOST_COST
        elif of_rows > 2 * _PART:
            self._width = max(self._width / 2, _NARROWEST)
        else:
            self._until = _LATEST if window.since == _OLDEST else window.since
        rest = max(min(self.poll_interval, _AFTER_REFUSAL), cost)
        self._swept_at, self.sweep_at = now, now + rest
        self._cost = max(self._cost, rest / REST)

    def start_again(self) -> None:
        """Start again with the part of the latest due times, where claims start."""
        self._until, self._width, self._parts_cost = _LATEST, self._first_width, 0.0

    def window(self) -> Window | None:
        """Return the range of the next sweep; None for the whole queue.

        Over many dead rows that an old snapshot keeps, a full sweep takes seconds. Then it goes
        in parts, from the latest due times back.
        """
        if not self._in_parts or not self._marks:
            return None
        # A backlog lies between the marks and the present.
        end = min(self._until, max(self._seen_at, *self._marks.values()))
        is_last = self._width > _WIDEST or end - _OLDEST <= self._width
        since = _OLDEST if is_last else end - self._width
        return Window(since, self._until, tuple(sorted(self._marks)))

    def swept_part(
        self, window: Window, lines: Sequence[Line], *, began: float, now: float
    ) -> bool:
        """Record a sweep within a window; True if it found new priorities.

        The rows of the next window take about as long as those of a part may.
        """
        is_new = any(line.priority not in self._marks for line in lines)
        for line in lines:
            self._marks.setdefault(line.priority, _OLDEST)
        cost = now - began
        of_rows = self._beyond_usual(cost)
        if of_rows > 1.5 * _PART:
            self._width *= _PART / of_rows
        else:  # over few rows it soon reaches the beginning
            self._width *= 8 if of_rows < _PART / 10 else 2
        self._width = max(min(self._width, 2 * _WIDEST), _NARROWEST)
        if window.until == _LATEST:  # rows may be dense there: the next pass begins with this width
            self._first_width = min(self._width, _FIRST_WIDTH)
        self._parts_cost += of_rows
        self._until = window.since
        # A single slow part shows a busy host or cold pages, and must not put off the freeing of
        # jobs for forty times as long; one in each pass shows many dead rows. On a host where all
        # exchanges are slow only the time of the rows counts for a longer rest.
        most = max(of_rows, min(cost, _MOST_COST))
        rest = REST * min(most, max(self._slowest_before, _MOST_COST))
        self._slowest = max(self._slowest, of_rows)
        if window.since == _OLDEST:
            self._in_parts, self._claimed = self._parts_cost > _MOST_COST, 0
            self._slowest_before, self._slowest = self._slowest, 0.0
            self.start_again()
            rest = max(rest, self.poll_interval)
        self._swept_at, self._cost, self._last_cost = now, cost, cost
        self.sweep_at = now + rest
        return is_new

    def _forget_all_but(self, used: set[int]) -> None:
        """Forget the marks of priorities without a job, except for those used last."""
        unused = self._marks.keys() - used
        if len(unused) > _MOST_UNUSED:
            for priority in sorted(unused, key=self._marks.__getitem__)[:-_MOST_UNUSED]:
                del self._marks[priority]
                self._told_since.pop(priority, None)
