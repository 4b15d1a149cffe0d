"""Where the next claim of a queue starts.

A claim that starts at the left edge of the index walks over every row that is
running and over every dead row that some old snapshot keeps: measured, 82,000
jobs/s fell to 28,000 after 200,000 jobs. So each claim starts at the last due
time that was claimed, by priority.

Rows do appear behind that mark: producers commit late, and leases end. Three
ways lead back. A claim may look back over the last moments before now, by a
window: windows double, and each is due at an interval of its own length, so
that a row that became visible d seconds late is found within about d again, at
a cost that grows with the logarithm of d. Through a backlog, whose marks lie
further back than the window, this costs nothing: a row behind them is later
than that. When a transaction that was under way for longer has ended, the next
claim looks back to where it may have begun: a job that was committed long
after it was written starts at once, and not only when its window is due. (An
older one that goes on hides the end of others: then the windows have to do.) A
notification tells when its transaction began, and the next claim starts there.
And a sweep over everything, which alone finds ended leases, is
due at the poll interval, or at forty times its own cost where that is longer:
that of the cheaper one of the last two.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import inf

from bgjob._statements.claims import Horizon, Line
from bgjob.job import Job

_FIRST_WINDOW = 1 / 64  # seconds
_LONG = 0.05
"""Seconds from which on a transaction is looked after; shorter ones are the windows'."""

_AGES = 1e9  # seconds

_SLACK = 0.02
"""Seconds between a worker's clock and the server's view of it."""

REST = 40  # times the cost of a sweep: at most a fortieth of the time is spent on them
_OLDEST = datetime(1, 1, 2, tzinfo=UTC)


class Watermarks:
    """The marks of one queue, and when to look behind them."""

    def __init__(self, poll_interval: float) -> None:
        self._poll_interval = poll_interval
        self._marks: dict[int, datetime] = {}
        # Windows from the longest to the shortest, each with the time it is due.
        self._windows: list[tuple[float, float]] = []
        window = _FIRST_WINDOW
        while window < poll_interval:
            self._windows.insert(0, (window, -inf))
            window *= 2
        # Transactions are followed by epochs: one lasts until all that were under way
        # when it began have ended. Those began after the beginning of the one before.
        self._epoch_began = self._epoch_before = inf
        self._epoch_next = 0
        # When all that had not ended told by itself. Never yet: of what is under way at
        # first nobody knows since when.
        self._unwatched_at = -_AGES
        self._late_since = inf
        self._told_since: dict[int, datetime] = {}
        self._swept_at = -inf
        self._cost = 0.0
        self._last_cost = poll_interval / REST  # what is affordable at every poll
        self.sweep_at = -inf
        """When the next sweep is due."""

    @property
    def known(self) -> bool:
        """Whether there is any mark to claim from."""
        return bool(self._marks)

    @property
    def early_sweep_at(self) -> float:
        """When a sweep can be afforded, before it is due."""
        return min(self.sweep_at, self._swept_at + REST * self._cost)

    def start(self, now: float) -> tuple[dict[int, datetime], float]:
        """Give the due time to claim from, by priority, and how far to look back from now."""
        back = 0.0
        for longest, (window, due) in enumerate(self._windows):
            if due <= now:
                # Looking back so far covers every shorter window as well.
                self._windows[longest:] = [(w, now + w) for w, _ in self._windows[longest:]]
                back = window
                break
        if self._late_since < now:
            back = max(back, now - self._late_since + _SLACK)
            self._late_since = inf
        marks, told = dict(self._marks), self._told_since
        if told:
            marks.update((p, min(since, marks[p])) for p, since in told.items())
            told.clear()
        return marks, back

    def told(self, since: Mapping[int, datetime]) -> bool:
        """Learn when a transaction began that has enqueued; whether the priorities are known."""
        known = since.keys() <= self._marks.keys()
        told = self._told_since
        for priority in since.keys() & self._marks.keys():
            told[priority] = min(since[priority], told.get(priority, since[priority]))
        return known

    def watched(self, horizon: Horizon, asked_at: float) -> None:
        """Learn which transactions were under way when a claim was sent."""
        if horizon.oldest >= self._epoch_next:
            if asked_at - min(self._epoch_before, self._epoch_began) > _LONG:
                first = self._epoch_before == inf
                since = self._unwatched_at if first else self._epoch_before
                self._late_since = min(self._late_since, since)
            self._epoch_before, self._epoch_began = self._epoch_began, asked_at
            self._epoch_next = horizon.next

    def unwatched(self, now: float) -> None:
        """Learn that all that is under way is going to tell since when."""
        self._epoch_began = self._epoch_before = inf
        self._epoch_next = 0
        self._unwatched_at = now

    def retried(self, priority: int) -> None:
        """Learn that a job went back with this priority, which may have had none yet."""
        self._marks.setdefault(priority, _OLDEST)

    def claimed(self, jobs: Sequence[Job], *, full: bool) -> None:
        """Move the marks to what a claim brought, in its order.

        A full claim has seen nothing behind its last job, so that the mark of
        that priority goes there even if that is back.
        """
        if not jobs:
            return
        # The last job of each priority is its latest; mostly there is one priority.
        one = jobs[0].priority == jobs[-1].priority
        for job in jobs[-1:] if one else jobs:
            mark = self._marks.get(job.priority)
            if mark is None or job.next_run_at > mark:
                self._marks[job.priority] = job.next_run_at
        if full:
            self._marks[jobs[-1].priority] = jobs[-1].next_run_at

    def swept(self, lines: Sequence[Line], *, full: bool, began: float, now: float) -> None:
        """Learn the priorities in use from a sweep."""
        for line in lines:
            self._marks.setdefault(line.priority, _OLDEST if full else line.since)
        self._swept_at = now
        # One that took long by itself tells of a busy host, or of the first look at cold
        # pages, and must not keep the worker blind for forty times as long.
        self._cost, self._last_cost = min(self._last_cost, now - began), now - began
        self.sweep_at = now + max(self._poll_interval, REST * self._cost)
