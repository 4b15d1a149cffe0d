"""Schedules: which job is enqueued at which ticks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Literal, NamedTuple, TypeAlias, get_args

from bgjob._checks import Duration, seconds
from bgjob.cron import Cron
from bgjob.job import EnqueueRequest, check_key, check_name

Missed: TypeAlias = Literal["one", "all", "skip"]

_LONGEST_NAME = 200  # a job's id contains it, and has room for 255 characters

GRACE = timedelta(seconds=60)
"""How late a tick may be without counting as missed: a deploy takes some seconds."""

MOST_AT_ONCE = 200
"""The most missed ticks that one statement enqueues."""


@dataclass(frozen=True, slots=True)
class Every:
    """An interval from tick to tick."""

    interval: timedelta

    def after(self, instant: datetime) -> datetime:
        """Return the tick after this one."""
        return instant + self.interval

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        """Return the last tick after `after` and up to `until`; None if there is none."""
        count = (until - after) // self.interval
        return after + count * self.interval if count > 0 else None

    def __str__(self) -> str:
        return f"every {self.interval}"


@dataclass(frozen=True, slots=True)
class AfterCompletion:
    """An interval from the end of a run to the next."""

    interval: timedelta

    def __str__(self) -> str:
        return f"{self.interval} after completion"


class ScheduleStatus(NamedTuple):
    """A schedule in the database.

    Attributes:
        name: the schedule's name.
        spec: when its ticks are, in words.
        queue: the queue of its jobs.
        type: the type of its jobs.
        paused: whether it is paused and enqueues nothing.
        last_run_at: the last tick for which a job was enqueued; None before the first.
        next_run_at: the next tick; None while it is unknown: the schedule is paused, its
            last job has not ended, or no worker has seen it since it was resumed.

    """

    name: str
    spec: str
    queue: str
    type: str
    paused: bool
    last_run_at: datetime | None
    next_run_at: datetime | None


class State(NamedTuple):
    """The progress of a schedule, as a worker reads it."""

    name: str
    tick: datetime
    """All ticks up to this one are processed."""
    next_run_at: datetime | None
    paused: bool
    running: bool
    """Whether the job of the last tick is still in the queue."""
    now: datetime
    """By the database's clock."""


class Firing(NamedTuple):
    """A step of a schedule; it does nothing if another worker took the step before."""

    tick: datetime
    """All ticks up to this one are processed by this step."""
    next_run_at: datetime | None
    """None while it is unknown."""
    ticks: tuple[datetime, ...] = ()
    """The ticks for which to enqueue a job, in order."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A job that is enqueued again and again, by workers with `Schedules`.

    The first tick is the first one after a worker has seen the schedule for the
    first time. The job of a tick has the id `schedule:<name>:<tick>`.

    Attributes:
        name: identifies the schedule for all workers and over all restarts; 1 to
            200 characters, without a colon.
        request: the job; without delay and run_at. Its id is not used. If it expires, then
            after a duration from its tick's enqueue.
        cron: five fields (minute, hour, day of the month, month, day of the
            week), or six, with the second first. Needs the extra `cron`. Where
            neither minute nor hour begins with a star, a time that the clock
            skips runs when the clock has stepped, and one that it shows twice runs
            once; any other expression means real time, as in Debian's cron.
        every: seconds or a timedelta from tick to tick, without drift, over restarts too.
            At least 1 s.
        after_completion: seconds or a timedelta from the end of a run (completed
            or dead) to the next, so that at most one is in the queue. At least
            1 s; the poll interval of `Schedules` may be added to it.
        tz: the time zone of `cron`; "UTC" by default, which has no daylight saving.
        missed: what to do about ticks while no worker ran: "one" (the default)
            enqueues one job, for the last of them; "all" enqueues one for each, in
            order; "skip" enqueues none, unless the last is less than 60 s late, as
            after a deploy.

    Raises:
        ValueError: an invalid name, expression, time zone or interval; not exactly
            one of cron, every and after_completion; a request with a delay.
        TypeError: a value of a wrong type.
        ImportError: cron without the extra.

    """

    name: str
    request: EnqueueRequest = field(kw_only=True)
    cron: str | None = field(default=None, kw_only=True)
    every: Duration | None = field(default=None, kw_only=True)
    after_completion: Duration | None = field(default=None, kw_only=True)
    tz: str = field(default="UTC", kw_only=True)
    missed: Missed = field(default="one", kw_only=True)
    rule: Cron | Every | AfterCompletion = field(init=False, repr=False, compare=False)
    """Computes its ticks."""

    def __post_init__(self) -> None:
        check_name("the name of a schedule", self.name)
        if len(self.name) > _LONGEST_NAME or ":" in self.name:
            raise ValueError(
                f"the name of a schedule must have at most {_LONGEST_NAME} characters and no "
                f"colon, not {self.name!r}"
            )
        try:
            self._check()
            object.__setattr__(self, "rule", self._rule())
        except (ValueError, TypeError) as error:
            raise type(error)(f"schedule {self.name!r}: {error}") from None

    def _check(self) -> None:
        if not isinstance(self.request, EnqueueRequest):
            raise TypeError(f"request must be an EnqueueRequest, not {type(self.request).__name__}")
        if self.request.delay or self.request.run_at is not None:
            raise ValueError(
                "its request must have no delay and no run_at: its job is due immediately"
            )
        if self.request.keep is not None:
            raise ValueError(
                "the request of a schedule cannot have keep: nothing waits for its jobs; "
                "write their results to a table of yours, in a transactional handler"
            )
        if self.request.expires_at is not None:
            raise ValueError(
                "its request must expire after a duration, such as timedelta(hours=1), not at a "
                "time: each of its jobs has a time of its own"
            )
        if self.request.headers:
            raise ValueError(
                "its request must have no headers, which a schedule does not store: nothing asked "
                "for its job; pass what the job needs in arg"
            )
        if self.request.exclusive is not None:
            id_ = self.job_id(datetime.max.replace(tzinfo=UTC))
            check_key("exclusive", self.request.exclusive, self.request.queue, id_)
        if self.missed not in get_args(Missed):
            raise ValueError(f"missed must be 'one', 'all' or 'skip', not {self.missed!r}")
        if self.cron is None and self.tz != "UTC":
            raise ValueError("tz is for cron: an interval has no time zone")

    def _rule(self) -> Cron | Every | AfterCompletion:
        match self.cron, self.every, self.after_completion:
            case str(), None, None:
                return Cron(self.cron, self.tz)
            case None, every, None if every is not None:
                return Every(_interval(every, "every"))
            case None, None, after if after is not None:
                return AfterCompletion(_interval(after, "after_completion"))
            case _:
                raise ValueError("give exactly one of cron (a str), every and after_completion")

    @property
    def spec(self) -> str:
        """When its ticks are, in words; a changed spec starts the schedule again."""
        return str(self.rule)

    def job_id(self, tick: datetime) -> str:
        """Return the id of the job of a tick."""
        return f"schedule:{self.name}:{tick.astimezone(UTC).isoformat().replace('+00:00', 'Z')}"

    def firing(self, state: State) -> Firing | None:
        """Return the next step; None if there is nothing to do now."""
        if state.paused:
            return None
        tick, planned, now = state.tick, state.next_run_at, state.now
        if self.is_ahead(state):
            return self._set_back(tick, now)
        if isinstance(self.rule, AfterCompletion):
            if planned is None:
                ended = not state.running
                return Firing(tick, now + self.rule.interval) if ended else None
            if planned > now:
                return None
            return Firing(planned, None, () if self._is_too_late(planned, now) else (planned,))
        if self.missed == "all":
            ticks = tuple(islice(self._ticks(self.rule, tick, now), MOST_AT_ONCE))
        else:
            last = self.rule.latest(tick, now)
            ticks = () if last is None else (last,)
        if not ticks:
            return None if planned is not None else Firing(tick, self.rule.after(tick))
        last = ticks[-1]
        if self._is_too_late(last, now):
            ticks = ()
        return Firing(last, self.rule.after(last), ticks)

    def is_ahead(self, state: State) -> bool:
        """Whether its next tick cannot come: the clock was set back, or the row edited by hand.

        After a clock step of less than a minute it waits instead, so that no tick comes twice.
        """
        latest = state.now + GRACE
        if isinstance(self.rule, AfterCompletion):
            planned = state.next_run_at
            return planned is not None and planned > latest + self.rule.interval
        return state.tick > latest

    def _set_back(self, tick: datetime, now: datetime) -> Firing:
        match self.rule:
            case AfterCompletion(interval):
                return Firing(min(tick, now), now + interval)
            case Every(interval):  # keep the phase of the earlier ticks
                tick -= -((now - tick) // interval) * interval
            case _:
                tick = now
        return Firing(tick, self.rule.after(tick))

    def wait(self, state: State, firing: Firing | None) -> float | None:
        """Return the seconds until the next step, after `firing`; None if unknown."""
        if state.paused:
            return None
        if isinstance(self.rule, AfterCompletion):
            next_run_at = firing.next_run_at if firing else state.next_run_at
        else:  # the stored tick may come from another version of the spec
            next_run_at = self.rule.after(firing.tick if firing else state.tick)
        return None if next_run_at is None else (next_run_at - state.now).total_seconds()

    def _is_too_late(self, tick: datetime, now: datetime) -> bool:
        return self.missed == "skip" and now - tick > GRACE

    @staticmethod
    def _ticks(rule: Cron | Every, tick: datetime, now: datetime) -> Iterator[datetime]:
        while (tick := rule.after(tick)) <= now:
            yield tick


def _interval(value: Duration, name: str) -> timedelta:
    interval = timedelta(seconds=seconds(value, name))
    if interval < timedelta(seconds=1):
        raise ValueError(f"{name} must be at least 1 s, not {value!r}")
    return interval
