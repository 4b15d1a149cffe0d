"""How a job that kills its worker is found, and what that costs other jobs.

A worker that dies leaves up to some thousand jobs in flight. Usually no job has killed
it: a deploy did, or the kernel, or the host. So the first death of a job changes
nothing: `deaths` is 1, and the job is claimed in its place, alongside others.

A job with two deaths or more is a suspect. Ordinary claims skip it. Suspects are
claimed in groups: of those with the same number of deaths that are due and free, the
first half, at most as many as there are free slots. If the worker dies, its group has
one death more, and is halved when its turn comes. So the killer among n jobs is alone
after two deaths and log2(n) more, whatever the jobs cost and whichever workers claim
them. Jobs of groups that survive complete, and are no longer suspects. Which number of
deaths is next is chosen at random, in half of all cases that of most suspects, so that
none waits for a killer to use up its attempts.

Attempts: the claim after the first death is charged like any other. A group of several
is charged nothing: it repeats the attempt that was interrupted. A suspect that is
claimed alone is charged, so that a killer runs out of attempts. A job that was charged
for the deaths of others is granted two attempts beyond its last; see Mux.route.

Isolation is bounded in time. When a worker knows of suspects it claims nothing else
until its handlers have ended, for half a second at most. Then it claims a group, and
leaves that alone until it has ended, or a second has passed since a slot was free.
While half of that second is left it claims the next group. Then other jobs have their
turn: from the next claim of them on, even one that the server refuses, they are
claimed for as long as they were held up, and alongside the group while it runs.
If a worker's claim finds no suspect, because other workers have them, it holds nothing
up.

A group that has run for half a minute is not proved harmless, but suspects must not wait
for a job of an hour. So the next group may be claimed alongside it. After each further
death that takes twice as long: a killer that strikes after S seconds takes other groups
with it log2(S / 30) times at most. A suspect that is claimed alone alongside a group is
charged nothing, and no group is claimed alongside one that was charged.

A killer that strikes late takes other jobs with it, too. Those have one death, and no
isolation. At most half of the jobs with its number of deaths are in flight with it, so it
still ends up alone.

What was tried: each suspect alone, for a second that doubled with each death. Sixty
coroutines of 10 s that had been in flight at one `kill -9` kept all other jobs waiting
for a minute. And the next group after a second: under a kill every two seconds more
suspects were in flight at each, so that they waited for up to 66 s instead of 16 s.
"""

from collections.abc import Collection, Iterable
from math import inf

from bgjob._sql.settlements import Claimed

LONGEST = 1.0
"""The most seconds for which other jobs are held up, before their turn."""

_WAIT = LONGEST / 2
"""The part of these seconds in which a group waits for running handlers to end."""

ALONE = 30.0
"""Seconds for which a group is alone after two deaths, if it has not ended before: killers
mostly strike sooner."""

_MOST_DOUBLED = 8
"""The most doublings of that time: to two hours."""


class Isolation:
    """A worker's knowledge of one queue's suspects, and whether they or other jobs are next."""

    def __init__(self) -> None:
        self._known = False  # the last survey found suspects that can be claimed
        self._groups: dict[int, int] = {}  # by token: how many jobs of a group have not ended
        self._token = 0  # of the last group
        self._alone_until = -inf  # when the next group may be claimed alongside it
        self._since = inf  # since when other jobs are held up although a slot is free
        self._has_brought = False  # a group has been claimed since then
        self._owed = 0.0  # seconds for which other jobs were last held up
        self._others_until = -inf  # inf: no claim of others since then

    @property
    def tokens(self) -> Collection[int]:
        """The tokens of groups."""
        return self._groups.keys()

    @property
    def is_needed(self) -> bool:
        """Whether there is a suspect, a group or a hold-up."""
        return self._known or self.has_group or self._since < inf

    @property
    def has_begun(self) -> bool:
        """Whether other jobs are held up, by the last answer of `holds_up`."""
        return self._since < inf

    @property
    def has_group(self) -> bool:
        """Whether jobs of a group have not ended."""
        return bool(self._groups) and any(self._groups.values())

    def holds_up(self, now: float, *, is_free: bool) -> bool:
        """Whether only a group may be claimed.

        Args:
            now: the time.
            is_free: whether a slot is free. Only time with a free slot counts.

        """
        if self._is_alone(now):
            holds = now < self._since + LONGEST < inf
        else:
            is_their_turn = self._known and now >= self._others_until
            longest = _WAIT if self._has_brought else LONGEST
            holds = is_their_turn and now < self._since + longest
        if holds:
            if is_free:
                self._since = min(self._since, now)
        elif self._since < inf:
            self._owed = min(now - self._since, LONGEST)
            self._others_until, self._since, self._has_brought = inf, inf, False
        return holds

    def wants_group(self, now: float, *, running: int) -> bool:
        """Whether to claim a group, while others are held up and `running` jobs run."""
        return not self._is_alone(now) and (not running or now >= self._since + _WAIT)

    def wake_at(self, now: float) -> float:
        """Return when an answer above may change without an event."""
        if self._since < inf:
            waited = self._is_alone(now) or now >= self._since + _WAIT
            return self._since + (LONGEST if waited else _WAIT)
        turn = max(self._others_until, self._alone_until if self._is_running else -inf)
        return turn if self._known and now < turn else inf

    def _is_alone(self, now: float) -> bool:
        """Whether a group runs alongside which no other may be claimed."""
        return self._is_running and now < self._alone_until

    @property
    def _is_running(self) -> bool:
        return self._groups.get(self._token, 0) > 0

    def surveyed(self, known: bool) -> None:
        """Record whether a survey found suspects that can be claimed."""
        self._known = known

    def claimed(self, token: int, jobs: int, *, deaths: int, is_charged: bool, now: float) -> None:
        """Record the claim of a group.

        Args:
            token: the claim's token.
            jobs: the number of claimed jobs.
            deaths: the most deaths of one of them.
            is_charged: whether it is a single job that was charged an attempt.
            now: the time.

        """
        self._groups = {token: count for token, count in self._groups.items() if count}
        self._groups[token], self._token = jobs, token
        doublings = min(max(deaths - 2, 0), _MOST_DOUBLED)
        self._alone_until = inf if is_charged else now + ALONE * 2.0**doublings
        self._known = self._has_brought = jobs > 0

    def ended(self, claims: Iterable[Claimed]) -> None:
        """Record that claims are no longer in flight; some may be of groups."""
        for claimed in claims:
            if claimed.token in self._groups:
                self._groups[claimed.token] -= 1

    def resumed(self, claims: Iterable[Claimed]) -> None:
        """Record that claims are in flight again."""
        for claimed in claims:
            if claimed.token in self._groups:
                self._groups[claimed.token] += 1

    def others_looked(self, now: float) -> None:
        """Record a claim of jobs that are not suspects, even if the server refused it."""
        if self._others_until == inf:
            self._others_until = now + self._owed
