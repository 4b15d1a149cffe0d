"""What a worker with this Mux would do with each job."""

import re
from collections.abc import Callable, Collection
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bgjob._failure import message_of
from bgjob._handlers.policy import TypePolicy
from bgjob._headers import read
from bgjob._sql.preflight import Candidate
from bgjob.errors import PayloadError
from bgjob.job import Job
from bgjob.mux import Mux, Route

_SHOWN = 3
"""The ids that a finding names."""

_MOST_PROBLEMS = 20
"""Problems of one type in one queue that are told apart; texts may contain anything."""

_LONGEST = 200
"""Characters of a problem: enough for the field and what is expected."""

_PLACE = re.compile(r": line \d+ column \d+ \(char \d+\)")
"""Where JSON is broken, which differs from payload to payload."""

_OTHER = "other problems"

Problem = tuple[str, str]
"""A finding's code, and what is wrong in a few words."""


@dataclass(slots=True)
class Group:
    """Jobs with the same problem."""

    count: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, id_: str) -> None:
        self.count += 1
        if len(self.ids) < _SHOWN:
            self.ids.append(id_)


@dataclass(slots=True)
class Kind:
    """A registered type, or one without a handler."""

    policy: TypePolicy | None
    """None without a handler."""
    decode: Callable[[bytes | None], Any] | None
    """None if payloads are not decoded."""
    has_middleware: bool
    is_keyed: bool
    last: float
    """From this attempt on, another failure is the last."""
    over: float
    """From this attempt on, the job is dead-lettered without another attempt."""

    @property
    def is_read(self) -> bool:
        """Whether its payloads are needed."""
        return self.decode is not None or self.is_keyed


def kind_of(route: Route | None, *, is_left_out: bool) -> Kind:
    """Return how jobs of a type are judged."""
    if route is None:
        return Kind(None, None, has_middleware=False, is_keyed=False, last=0, over=0)
    policy = route.policy
    most = float("inf") if policy.max_attempts is None else policy.max_attempts
    return Kind(
        policy,
        None if is_left_out else route.calling.decoder,
        has_middleware=bool(route.calling.middleware),
        is_keyed=bool(policy.exclusive) and not is_left_out,
        last=most,
        over=policy.last_attempt,
    )


@dataclass(slots=True)
class Tally:
    """The live jobs of one type in one queue."""

    queue: str
    type: str
    kind: Kind
    next_run_at: datetime
    """The earliest due time."""
    jobs: int = 0
    fit: int = 0
    lost: int = 0
    groups: dict[Problem, Group] = field(default_factory=dict)

    def add(self, code: str, problem: str, id_: str) -> None:
        """Record that a job has a problem."""
        group = self.groups.get((code, problem))
        if group is None:
            if len(self.groups) >= _MOST_PROBLEMS:
                problem = _OTHER
            group = self.groups.setdefault((code, problem), Group())
        group.add(id_)


class Judge:
    """Judges jobs one by one; keeps counts and a few ids, and no job."""

    def __init__(self, mux: Mux, left_out: Collection[str] = ()) -> None:
        self._kinds = {
            name: kind_of(mux.route_of(name), is_left_out=name in left_out) for name in mux.types
        }
        self._unknown = kind_of(None, is_left_out=False)
        self.unknown_for = mux.unknown_for
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.revived: dict[tuple[str, str], Group] = {}
        """Dead jobs that this release would handle, by queue and type."""

    @property
    def read(self) -> list[str]:
        """The types whose payloads are needed."""
        return [name for name, kind in self._kinds.items() if kind.is_read]

    @property
    def keyed(self) -> list[str]:
        """The types whose jobs are given to a callable."""
        return [name for name, kind in self._kinds.items() if kind.is_keyed]

    def kind(self, type: str) -> Kind:  # noqa: A002
        """Return how jobs of a type are judged."""
        return self._kinds.get(type, self._unknown)

    def count(self, job: Candidate) -> bool:
        """Count a live job; True if it is to be examined, with its payload."""
        place = job.queue, job.type
        tally = self.tallies.get(place)
        if tally is None:
            tally = Tally(job.queue, job.type, self.kind(job.type), job.next_run_at)
            self.tallies[place] = tally
        tally.jobs += 1
        tally.next_run_at = min(tally.next_run_at, job.next_run_at)
        kind = tally.kind
        if kind.policy is None:
            tally.lost += 1
            tally.add("no_handler", "no handler", job.id)
            return False
        if job.attempt >= kind.last:
            if job.attempt >= kind.over:
                tally.lost += 1
                tally.add("attempts_over", "attempts are over", job.id)
                return False
            tally.add("last_attempt", "next failure is the last", job.id)
        if kind.is_read:
            return True
        tally.fit += 1
        return False

    def examine(self, job: Candidate) -> None:
        """Decode the payload of a live job that was counted, and compute its key."""
        tally = self.tallies[job.queue, job.type]
        kind = tally.kind
        if kind.is_keyed:
            _compare_key(tally, job)
        if kind.decode is None:
            tally.fit += 1
            return
        problem = misfit(kind, job.type, job.arg)
        if problem is None:
            tally.fit += 1
        else:
            tally.lost += 1
            tally.add("payload", problem, job.id)

    def gone(self, job: Candidate) -> None:
        """Take back that a live job was counted: it ended before it was examined."""
        self.tallies[job.queue, job.type].jobs -= 1

    def revive(self, job: Candidate) -> None:
        """Record whether this release would handle a dead job whose payload or type was refused."""
        kind = self.kind(job.type)
        was_unknown = (job.last_error or "").startswith("UnknownTypeError")
        if kind.decode is None and not was_unknown:
            return  # the handler itself refused it, and may do so again
        if kind.decode is None or misfit(kind, job.type, job.arg) is None:
            self.revived.setdefault((job.queue, job.type), Group()).add(job.id)


def misfit(kind: Kind, type_: str, payload: bytes | None) -> str | None:
    """Return what is wrong with a payload in a few words; None if the handler would receive it."""
    if kind.decode is None:
        return None
    try:
        kind.decode(payload)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a codec raises, even SystemExit
        return _problem(error, type_)
    return None


def _compare_key(tally: Tally, job: Candidate) -> None:
    policy = tally.kind.policy
    assert policy is not None  # noqa: S101 (it has a key)
    now = job.next_run_at
    seen = Job(
        job.id,
        job.queue,
        job.type,
        job.arg,
        job.attempt + 1,
        job.last_error,
        job.priority,
        now,
        job.created_at or now,
        job.updated_at or now,
        headers=read(job.headers),
    )
    try:
        key = copy_context().run(policy.key, seen)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as a worker, which turns it into a failed attempt
        tally.add("key_raises", _problem(error, job.type), job.id)
        return
    if job.exclusive is not None and key != job.exclusive:
        tally.add("key_differs", "another exclusive key", job.id)


def _problem(error: BaseException, type_: str) -> str:
    text = message_of(error)
    if isinstance(error, PayloadError):
        text = text.removeprefix(f"{type(error).__name__}: ")
        text = text.removeprefix(f"payload of job type {type_!r}").lstrip(": ")
    line = _PLACE.sub("", " ".join(text[: 5 * _LONGEST].split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
