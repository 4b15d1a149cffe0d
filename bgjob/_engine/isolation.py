"""How a job that kills its worker is found, and what its neighbours pay for it.

A worker that dies leaves up to some thousand jobs in flight. Mostly no job has killed
it: a deploy did, or the kernel, or the host. So the first death of a job changes
nothing: `deaths` is 1, and the job is claimed in its place, beside others.

A job with two deaths or more is a suspect. Ordinary claims pass it over. Suspects are
claimed in groups: of those with the most deaths that are due and free, the first half,
as many as there are free slots at most. If the worker dies, the deaths of its group
are the most, and half of the group comes next. So the killer among n jobs is alone
after two deaths and log2(n) more, whatever the jobs cost and whichever workers take
them. Groups that survive complete, and are suspects no more.

Attempts: the claim after the first death is charged as any other. A group of several
is charged nothing: it repeats the attempt that was interrupted. A suspect that is
claimed alone is charged, so that a killer runs out of attempts. A job that was charged
for the deaths of others is granted two attempts beyond its last; see Mux.route.

Isolation is bounded in time. When a worker knows of suspects it claims nothing else
until its handlers have ended, for half a second at most; then it claims a group, and
leaves that alone until it has ended, or a second has passed since a slot was free.
While half of that second is left it claims the next group. Then it is the turn of
others: from the next look at them on, even one that the server refuses, they are
claimed for as long as they were held up, and beside the group for as long as it runs.
A group that still runs is the worker's only one. If a worker's claim finds no suspect,
because other workers have them, it holds nothing up.

A killer that strikes later than that takes others with it. Those have one death, and
no isolation. At most half of the jobs of its class are in flight with it, so it comes
to be alone all the same.

What was tried: each suspect alone, with a second to prove itself that doubled with each
death. Sixty coroutines of 10 s that had been in flight at one `kill -9` kept all other
jobs waiting for a minute.
"""

from collections.abc import Iterable
from math import inf

from bgjob._sql.settlements import Claimed

LONGEST = 1.0
"""Seconds for which others are held up at most, before it is their turn."""

_WAIT = LONGEST / 2
"""Seconds of those in which a group waits for running handlers to end."""


class Isolation:
    """What one worker knows of the suspects of one queue, and whose turn it is."""

    def __init__(self) -> None:
        self._known = False  # the last look found suspects that can be claimed
        self._token = 0  # of the group's claim
        self._running = 0  # jobs of the group that have not ended
        self._since = inf  # since when others are held up, although a slot is free
        self._has_brought = False  # a group has been claimed since then
        self._owed = 0.0  # seconds for which others were held up last
        self._others_until = -inf  # inf: they have not had a look since then

    @property
    def is_needed(self) -> bool:
        """Whether there is a suspect, a group or a hold-up."""
        return self._known or self._running > 0 or self._since < inf

    @property
    def has_begun(self) -> bool:
        """Whether others are held up, as far as `holds_up` has said."""
        return self._since < inf

    @property
    def has_group(self) -> bool:
        """Whether jobs of a group have not ended."""
        return self._running > 0

    def holds_up(self, now: float, *, is_free: bool) -> bool:
        """Whether nothing but a group may be claimed.

        Args:
            now: the time.
            is_free: whether a slot is free. Time in which none is is not counted.

        """
        if self._running:
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
        """Whether to claim a group, while others are held up and so many jobs run."""
        return not self._running and (not running or now >= self._since + _WAIT)

    def wake_at(self, now: float) -> float:
        """Return the time at which an answer above may change by itself."""
        if self._since < inf:
            waited = self._running or now >= self._since + _WAIT
            return self._since + (LONGEST if waited else _WAIT)
        return self._others_until if self._known and now < self._others_until else inf

    def surveyed(self, known: bool) -> None:
        """Record whether a look found suspects that can be claimed."""
        self._known = known

    def claimed(self, token: int, jobs: int) -> None:
        """Record how many jobs the claim of a group brought."""
        self._token, self._running = token, jobs
        self._known = self._has_brought = jobs > 0

    def ended(self, claims: Iterable[Claimed]) -> None:
        """Record that claims are not in flight any more; some may be of the group."""
        self._running -= sum(claimed.token == self._token for claimed in claims)

    def resumed(self, claims: Iterable[Claimed]) -> None:
        """Record that claims are in flight again."""
        self._running += sum(claimed.token == self._token for claimed in claims)

    def others_looked(self, now: float) -> None:
        """Record a look for jobs that are not suspects, whether the server took it or not."""
        if self._others_until == inf:
            self._others_until = now + self._owed
