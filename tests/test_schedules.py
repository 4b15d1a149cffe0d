"""Schedules enqueue one job a tick, for any number of workers, clocks and outages."""

import asyncio
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, cast
from zoneinfo import ZoneInfo

import psycopg
import pytest
from support.database import row, rows
from support.plans import nodes
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Launcher, Recorder

from bgjob import (
    AsyncClient,
    Client,
    EnqueueRequest,
    MoveToDlq,
    Mux,
    Schedule,
    ScheduleError,
    Schedules,
    ScheduleStatus,
    SchemaError,
    UnknownScheduleError,
    cron,
)
from bgjob._sql.schedules import fire, look
from bgjob._sql.session import WORKER_SETTINGS
from bgjob.cron import Cron
from bgjob.schedule import MOST_AT_ONCE, Firing, State

REQUEST = EnqueueRequest("q", "t", {"n": 1}, priority=3)
MINUTE = timedelta(minutes=1)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# -- cron over the steps of daylight saving ---------------------------------------------------

BERLIN, NEW_YORK, LORD_HOWE = "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"

STEPS = [
    # Berlin, 31 March 2024: 02:00 becomes 03:00 at 01:00 UTC.
    (BERLIN, "30 2 * * *", "2024-03-30 12:00", "03-31 01:00", "04-01 00:30"),
    (BERLIN, "0 30 2 * * *", "2024-03-30 12:00", "03-31 01:00", "04-01 00:30"),
    (BERLIN, "0,30 2 * * *", "2024-03-30 12:00", "03-31 01:00", "04-01 00:00", "04-01 00:30"),
    (BERLIN, "30 1-3 * * *", "2024-03-30 12:00", "03-31 00:30", "03-31 01:00", "03-31 01:30"),
    (BERLIN, "0 * * * *", "2024-03-30 23:30", "03-31 00:00", "03-31 01:00", "03-31 02:00"),
    (BERLIN, "*/30 * * * *", "2024-03-31 00:00", "03-31 00:30", "03-31 01:00", "03-31 01:30"),
    (BERLIN, "*/30 2 * * *", "2024-03-30 12:00", "04-01 00:00", "04-01 00:30"),
    # Berlin, 27 October 2024: 03:00 becomes 02:00 at 01:00 UTC.
    (BERLIN, "30 2 * * *", "2024-10-26 12:00", "10-27 00:30", "10-28 01:30"),
    (BERLIN, "0 30 2 * * *", "2024-10-26 12:00", "10-27 00:30", "10-28 01:30"),
    (BERLIN, "30 2 * * *", "2024-10-27 01:15", "10-28 01:30"),
    (BERLIN, "0 * * * *", "2024-10-26 23:30", "10-27 00:00", "10-27 01:00", "10-27 02:00"),
    (BERLIN, "0 */2 * * *", "2024-10-26 23:30", "10-27 00:00", "10-27 01:00", "10-27 03:00"),
    (BERLIN, "*/30 2 * * *", "2024-10-27 00:15", "10-27 00:30", "10-27 01:00", "10-27 01:30"),
    (BERLIN, "0 0 3 * * *", "2024-10-26 12:00", "10-27 02:00", "10-28 02:00"),
    # New York, 10 March 2024: 02:00 becomes 03:00 at 07:00 UTC.
    (NEW_YORK, "15 2 * * *", "2024-03-09 12:00", "03-10 07:00", "03-11 06:15"),
    (NEW_YORK, "15 * * * *", "2024-03-10 06:00", "03-10 06:15", "03-10 07:15"),
    # New York, 3 November 2024: 02:00 becomes 01:00 at 06:00 UTC.
    (NEW_YORK, "15 1 * * *", "2024-11-02 12:00", "11-03 05:15", "11-04 06:15"),
    (NEW_YORK, "15 * * * *", "2024-11-03 05:00", "11-03 05:15", "11-03 06:15", "11-03 07:15"),
    # Lord Howe, 6 October 2024: 02:00 becomes 02:30 at 15:30 UTC of the day before.
    (LORD_HOWE, "15 2 * * *", "2024-10-05 00:00", "10-05 15:30", "10-06 15:15"),
    (LORD_HOWE, "45 2 * * *", "2024-10-05 00:00", "10-05 15:45", "10-06 15:45"),
    (LORD_HOWE, "*/15 2 * * *", "2024-10-05 00:00", "10-05 15:30", "10-05 15:45", "10-06 15:00"),
    # Lord Howe, 7 April 2024: 02:00 becomes 01:30 at 15:00 UTC of the day before.
    (LORD_HOWE, "45 1 * * *", "2024-04-06 00:00", "04-06 14:45", "04-07 15:15"),
    (LORD_HOWE, "15 2 * * *", "2024-04-06 00:00", "04-06 15:45", "04-07 15:45"),
    (LORD_HOWE, "*/15 2 * * *", "2024-04-06 00:00", "04-06 15:30", "04-06 15:45", "04-06 16:00"),
    (LORD_HOWE, "*/15 1 * * *", "2024-04-06 14:35", "04-06 14:45", "04-06 15:00", "04-06 15:15"),
    (LORD_HOWE, "*/15 1 * * *", "2024-04-06 15:15", "04-07 14:30"),
]


@pytest.mark.parametrize(("tz", "expression", "start", "ticks"), [(*s[:3], s[3:]) for s in STEPS])
def test_a_tick_over_a_step_of_the_clock_is_where_debians_cron_has_it(
    tz: str, expression: str, start: str, ticks: tuple[str, ...]
) -> None:
    cron, instant = Cron(expression, tz), utc(start)
    for tick in ticks:
        instant = cron.after(instant)
        assert f"{instant:%m-%d %H:%M}" == tick


ZONES = (BERLIN, NEW_YORK, LORD_HOWE, "America/Havana", "Africa/Casablanca", "Asia/Kathmandu")


def steps_of(tz: str) -> Iterator[datetime]:
    """The hours of two years in which the clock steps."""
    zone = ZoneInfo(tz)
    hour = utc("2023-01-01 00:00")
    while hour.year < 2025:
        later = hour + timedelta(hours=1)
        if hour.astimezone(zone).utcoffset() != later.astimezone(zone).utcoffset():
            yield hour
        hour = later


@pytest.mark.parametrize("tz", ZONES)
def test_an_expression_with_a_star_comes_whenever_the_clock_shows_it(tz: str) -> None:
    zone, dice = ZoneInfo(tz), random.Random(tz)
    starts = [*steps_of(tz), utc("2024-05-05 05:00")]
    for start in starts:
        modulus, hours = dice.choice([7, 15, 20]), dice.sample(range(24), 8) + [0, 1, 2, 3]
        cron = Cron(f"*/{modulus} {','.join(map(str, hours))} * * *", tz)
        expected = []
        for minutes in range(-180, 360):
            instant = start + minutes * MINUTE
            shown = instant.astimezone(zone)
            if shown.minute % modulus == 0 and shown.hour in hours:
                expected.append(instant)
        tick = start - 180 * MINUTE - timedelta(seconds=1)
        found = [tick := cron.after(tick) for _ in expected]
        assert found == expected, (tz, cron)


@pytest.mark.parametrize("tz", ZONES)
def test_a_time_of_the_day_comes_once_a_day_the_first_time_or_when_the_clock_has_stepped(
    tz: str,
) -> None:
    zone = ZoneInfo(tz)
    for hour, minute in [(0, 0), (0, 30), (1, 30), (1, 45), (2, 0), (2, 15), (3, 0), (12, 0)]:
        cron = Cron(f"{minute} {hour} * * *", tz)
        tick = datetime(2023, 1, 1, tzinfo=zone) - timedelta(seconds=1)
        for day in range(365):
            tick = cron.after(tick)
            date = (datetime(2023, 1, 1) + timedelta(days=day)).date()
            meant = datetime(date.year, date.month, date.day, hour, minute, tzinfo=zone)
            shown = tick.astimezone(zone)
            if meant.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == meant.replace(
                tzinfo=None
            ):
                assert tick == meant.astimezone(UTC)
            else:  # skipped: the first instant after the step
                before = (tick - timedelta(seconds=1)).astimezone(zone)
                assert before.replace(tzinfo=None) < meant.replace(tzinfo=None)
                assert shown.replace(tzinfo=None) > meant.replace(tzinfo=None)
                assert before.utcoffset() != shown.utcoffset()


@pytest.mark.parametrize("tz", ZONES)
def test_the_latest_tick_is_the_last_of_all(tz: str) -> None:
    dice = random.Random(tz)
    for expression in ("*/20 * * * * *", "0 */3 * * *", "30 2 * * *", "10 5-7 * * * *"):
        cron = Cron(expression, tz)
        start = dice.choice([*steps_of(tz), utc("2024-05-05 05:00")]) - timedelta(hours=5)
        ticks = [start]
        while ticks[-1] <= start + timedelta(hours=12):
            ticks.append(cron.after(ticks[-1]))
        ticks = ticks[1:]
        for _ in range(50):
            until = start + timedelta(seconds=dice.uniform(0, 12 * 3600))
            seen = [tick for tick in ticks if tick <= until]
            assert cron.latest(start, until) == (seen[-1] if seen else None)
            if seen:
                assert cron.latest(start, seen[-1]) == seen[-1]


def test_a_tick_is_a_whole_second_later_than_any_instant_before_it() -> None:
    cron = Cron("* * * * * *")
    assert cron.after(utc("2024-01-01 00:00:00")) == utc("2024-01-01 00:00:01")
    assert cron.after(utc("2024-01-01 00:00:00.999999")) == utc("2024-01-01 00:00:01")


# -- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"cron": "0 9 * *"},
            ValueError,
            "schedule 's': '0 9 . .' is not a cron expression of five",
        ),
        ({"cron": "61 9 * * *"}, ValueError, "'61 9 . . .' is not a cron expression.*Bad minute"),
        ({"cron": "0 0 30 2 *"}, ValueError, "Bad day-of-month"),
        ({"cron": ""}, ValueError, "'' is not a cron expression"),
        ({"cron": 9}, ValueError, "exactly one of cron"),
        ({"cron": "@daily"}, ValueError, "'@daily' is not a cron expression"),
        ({"cron": "0 9 * * *", "tz": "Mars"}, ValueError, "there is no time zone 'Mars'"),
        ({"cron": "0 9 * * *", "tz": "../etc"}, ValueError, "there is no time zone"),
        ({"cron": "0 9 * * *", "tz": None}, ValueError, "there is no time zone None"),
        ({"every": 60, "tz": BERLIN}, ValueError, "tz is for cron"),
        ({}, ValueError, "give exactly one of cron"),
        ({"cron": "0 9 * * *", "every": 60}, ValueError, "give exactly one of cron"),
        ({"every": 0.5}, ValueError, "every must be at least 1 s, not 0.5"),
        ({"every": "60"}, TypeError, "every must be seconds"),
        ({"after_completion": 0}, ValueError, "after_completion must be at least 1 s"),
        ({"every": 60, "missed": "none"}, ValueError, "missed must be 'one', 'all' or 'skip'"),
        ({"every": 60, "request": "t"}, TypeError, "request must be an EnqueueRequest, not str"),
        (
            {"every": 60, "request": EnqueueRequest("q", "t", delay=1)},
            ValueError,
            "no delay and no run_at",
        ),
    ],
)
def test_a_schedule_that_is_invalid_is_refused_by_its_name(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as raised:
        Schedule("s", **{"request": REQUEST, **options})
    assert str(raised.value).startswith("schedule 's': ")


@pytest.mark.parametrize("name", ["", "a:b", "x" * 201, "nul\0", "\ud800"])
def test_a_schedule_name_that_a_job_id_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the name of a schedule must"):
        Schedule(name, every=60, request=REQUEST)


def test_two_schedules_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two schedules are named 'a'"):
        Schedules([Schedule("a", every=n, request=REQUEST) for n in (60, 90)])
    wrong: Any = ["a"]
    with pytest.raises(TypeError, match="must be Schedule values, not 'a'"):
        Schedules(wrong)
    with pytest.raises(ValueError, match=r"poll_interval must be at least 0.05 s"):
        Schedules([], poll_interval=0.01)


def test_cron_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cronsim", None)
    with pytest.raises(ImportError, match=r"pip install 'bgjob\[cron\]'"):
        Schedule("s", cron="0 9 * * *", request=REQUEST)
    assert Schedule("s", every=60, request=REQUEST).spec == "every 0:01:00"


# -- due ticks, as a function of the last tick and now ---------------------------------------


def state(tick: str, now: str, planned: str | None = None, **options: bool) -> State:
    flags = {"paused": False, "running": False, **options}
    return State("s", utc(tick), utc(planned) if planned else None, now=utc(now), **flags)


def fired(schedule: Schedule, tick: str, now: str) -> list[str]:
    """What is enqueued until nothing is due."""
    current = state(tick, now, now)
    ticks: list[datetime] = []
    while (firing := schedule.firing(current)) is not None:
        assert firing.tick > current.tick
        ticks += firing.ticks
        current = current._replace(tick=firing.tick, next_run_at=firing.next_run_at)
    assert schedule.wait(current, None) == pytest.approx(
        (schedule.rule.after(current.tick) - current.now).total_seconds()  # type: ignore[union-attr]
    )
    return [f"{tick:%m-%d %H:%M}" for tick in ticks]


@pytest.mark.parametrize(
    ("missed", "expected"),
    [
        ("one", ["10-27 02:00"]),
        ("all", ["10-27 00:00", "10-27 00:30", "10-27 01:00", "10-27 01:30", "10-27 02:00"]),
        ("skip", []),
    ],
)
def test_an_outage_over_the_repeated_hour_misses_each_tick_once(
    missed: Any, expected: list[str]
) -> None:
    schedule = Schedule("s", cron="*/30 2,3 * * *", tz=BERLIN, missed=missed, request=REQUEST)
    assert fired(schedule, "2024-10-26 23:59", "2024-10-27 02:20") == expected
    of_the_day = Schedule("s", cron="30 2 * * *", tz=BERLIN, missed=missed, request=REQUEST)
    once = ["10-27 00:30"] if missed != "skip" else []
    assert fired(of_the_day, "2024-10-26 12:00", "2024-10-27 04:00") == once
    assert fired(of_the_day, "2024-10-27 00:30", "2024-10-27 04:00") == []


@pytest.mark.parametrize("missed", ["one", "all", "skip"])
def test_an_outage_over_the_skipped_hour_misses_its_ticks_once(missed: Any) -> None:
    schedule = Schedule("s", cron="30 2 * * *", tz=BERLIN, missed=missed, request=REQUEST)
    once = ["03-31 01:00"] if missed != "skip" else []
    assert fired(schedule, "2024-03-30 12:00", "2024-03-31 04:00") == once
    assert fired(schedule, "2024-03-30 12:00", "2024-03-31 01:00:05") == ["03-31 01:00"]
    assert fired(schedule, "2024-03-31 01:00", "2024-03-31 04:00") == []


@pytest.mark.parametrize("missed", ["one", "all", "skip"])
@pytest.mark.parametrize("rule", [{"cron": "0 * * * *"}, {"every": 3600}])
def test_a_tick_that_is_less_than_a_minute_late_is_not_missed(missed: Any, rule: Any) -> None:
    schedule = Schedule("s", **rule, missed=missed, request=REQUEST)
    assert fired(schedule, "2024-05-05 05:00", "2024-05-05 06:00:59") == ["05-05 06:00"]
    late = fired(schedule, "2024-05-05 05:00", "2024-05-05 06:01:01")
    assert late == ([] if missed == "skip" else ["05-05 06:00"])


def test_nothing_is_due_before_its_tick_or_while_paused() -> None:
    for rule in ({"cron": "0 * * * *"}, {"every": 3600}, {"after_completion": 3600}):
        schedule = Schedule("s", **rule, missed="all", request=REQUEST)
        planned = "2024-05-05 06:00"
        early = state("2024-05-05 05:00", "2024-05-05 05:59:59.999", planned)
        assert schedule.firing(early) is None
        assert schedule.wait(early, None) == pytest.approx(0.001)
        paused = state("2024-05-05 05:00", "2024-05-05 08:00", planned, paused=True)
        assert schedule.firing(paused) is None
        assert schedule.wait(paused, None) is None


def test_an_interval_after_completion_waits_for_the_end_of_the_run() -> None:
    schedule = Schedule("s", after_completion=60, request=REQUEST)
    now, later = "2024-05-05 05:00:00", "2024-05-05 05:01:00"
    assert schedule.firing(state(now, later, running=True)) is None
    assert schedule.firing(state(now, now)) == Firing(utc(now), utc(later))
    assert schedule.firing(state(now, later, later)) == Firing(utc(later), None, (utc(later),))


# -- in the database ------------------------------------------------------------------------


def schedule(name: str = "s", *, exclusive: str | None = None, **options: Any) -> Schedule:
    rule = {} if {"cron", "after_completion"} & set(options) else {"every": 300}
    request = replace(REQUEST, arg=REQUEST.payload, exclusive=exclusive)
    return Schedule(name, **{"request": request, **rule, **options})


def jobs(conn: psycopg.Connection, name: str = "s") -> list[str]:
    found = rows(
        conn, "select id from bgjob_job where id like %s order by id", f"schedule:{name}:%"
    )
    return [id_ for (id_,) in found]


def tick(conn: psycopg.Connection, name: str = "s") -> datetime:
    found = row(conn, "select tick from bgjob_schedule where name = %s", name)[0]
    assert isinstance(found, datetime)
    return found


def set_back(conn: psycopg.Connection, ago: str, name: str = "s") -> datetime:
    """Set the last tick back by so long, and return it."""
    conn.execute(
        "update bgjob_schedule set tick = clock_timestamp() - %s::interval, "
        "next_run_at = clock_timestamp() where name = %s",
        [ago, name],
    )
    return tick(conn, name)


def test_the_first_look_starts_from_now_and_runs_nothing_for_the_past(
    conn: psycopg.Connection,
) -> None:
    before = row(conn, "select clock_timestamp()")[0]
    service = Schedules(
        [schedule(), schedule("c", cron="0 9 * * *"), schedule("d", after_completion=60)]
    )
    assert service.run(conn) == 1.0
    assert rows(conn, "select id from bgjob_job") == []
    for name in "scd":
        assert before <= tick(conn, name) <= row(conn, "select clock_timestamp()")[0]
    [(planned,)] = rows(conn, "select next_run_at - tick from bgjob_schedule where name = 's'")
    assert planned == timedelta(minutes=5)


@pytest.mark.parametrize(("missed", "count"), [("one", 1), ("all", 36), ("skip", 0)])
def test_after_an_outage_of_three_hours_the_policy_is_followed(
    conn: psycopg.Connection, missed: Any, count: int
) -> None:
    service = Schedules([schedule(missed=missed)])
    service.run(conn)
    last = set_back(conn, "3 hours 2 minutes 30 seconds")
    service.run(conn)
    latest = last + 36 * timedelta(minutes=5)
    expected = [schedule().job_id(latest - n * timedelta(minutes=5)) for n in range(count)]
    assert jobs(conn) == sorted(expected)
    assert tick(conn) == latest
    service.run(conn)
    assert len(jobs(conn)) == count
    written = rows(conn, "select queue, type, arg, priority from bgjob_job")
    assert written == [("q", "t", b'{"n":1}', 3)] * count


def test_a_long_outage_is_made_up_for_in_parts(conn: psycopg.Connection) -> None:
    service = Schedules([schedule(every=1, missed="all")])
    service.run(conn)
    last = set_back(conn, "450 seconds")
    assert service.run(conn) == 0.0
    assert len(jobs(conn)) == MOST_AT_ONCE
    while service.run(conn) == 0.0:
        pass
    passed = (tick(conn) - last) // timedelta(seconds=1)
    assert passed >= 450
    assert len(jobs(conn)) == passed


def test_many_workers_that_look_concurrently_enqueue_one_job_a_tick(
    dsn: str, conn: psycopg.Connection
) -> None:
    names = [f"s{n}" for n in range(20)]
    service = Schedules([schedule(name, every=1, missed="all") for name in names])

    def look(_: int) -> None:
        # Each as a process of its own has it.
        own = Schedules([schedule(name, every=1, missed="all") for name in names])
        with psycopg.connect(dsn, autocommit=True) as session:
            for _ in range(20):
                own.run(session)

    service.run(conn)
    conn.execute("update bgjob_schedule set tick = tick - interval '30 s'")
    began = {name: tick(conn, name) for name in names}

    async def look_together() -> None:
        await asyncio.gather(*(asyncio.to_thread(look, n) for n in range(5)))

    asyncio.run(look_together())
    for name in names:
        passed = (tick(conn, name) - began[name]) // timedelta(seconds=1)
        assert passed >= 30
        assert len(jobs(conn, name)) == passed


def test_a_step_that_was_taken_meanwhile_or_paused_is_not_taken(
    conn: psycopg.Connection, dsn: str
) -> None:
    taken, paused = schedule("taken"), schedule("paused")
    Schedules([taken, paused]).run(conn)
    seen = {name: tick(conn, name) for name in ("taken", "paused")}
    with Client(dsn) as client:
        client.schedules.pause("paused")
    for late in (1, 2):
        at = {name: instant + late * MINUTE for name, instant in seen.items()}
        steps = [
            (s, seen[s.name], Firing(at[s.name], None, (at[s.name],))) for s in (taken, paused)
        ]
        statement = fire(steps)
        conn.execute(cast(Any, statement.text), statement.params)
    assert jobs(conn, "taken") == [taken.job_id(seen["taken"] + MINUTE)]
    assert jobs(conn, "paused") == []
    assert tick(conn, "paused") == seen["paused"]


def test_a_row_that_another_worker_is_about_to_move_is_passed_over(
    dsn: str, conn: psycopg.Connection
) -> None:
    service = Schedules([schedule(), schedule("free")])
    service.run(conn)
    set_back(conn, "5 minutes")
    set_back(conn, "5 minutes", "free")
    with psycopg.connect(dsn) as other:
        other.execute("select from bgjob_schedule where name = 's' for update")
        conn.execute("set lock_timeout = '10s'")
        service.run(conn)
        assert (len(jobs(conn)), len(jobs(conn, "free"))) == (0, 1)
    service.run(conn)
    assert len(jobs(conn)) == 1


def test_a_job_and_its_tick_are_written_together_or_not_at_all(conn: psycopg.Connection) -> None:
    service = Schedules([schedule()])
    service.run(conn)
    last = set_back(conn, "5 minutes")
    conn.execute("alter table bgjob_job add constraint full_up check (false)")
    with pytest.raises(ScheduleError, match="full_up"):
        service.run(conn)
    assert (tick(conn), jobs(conn)) == (last, [])
    conn.execute("alter table bgjob_job drop constraint full_up")
    Schedules([schedule()]).run(conn)
    assert jobs(conn) == [schedule().job_id(last + timedelta(minutes=5))]


def test_an_interval_does_not_drift_however_late_its_ticks_are_seen(
    conn: psycopg.Connection,
) -> None:
    service = Schedules([schedule()])
    service.run(conn)
    for late in ("5 minutes 7 seconds", "9 minutes 50 seconds", "2 hours 3 minutes"):
        before = set_back(conn, late)
        wait = service.run(conn)
        assert (tick(conn) - before) % timedelta(minutes=5) == timedelta()
        [(left,)] = rows(conn, "select next_run_at - tick from bgjob_schedule")
        assert left == timedelta(minutes=5)
        assert wait <= 1.0


def test_an_interval_after_completion_begins_when_the_job_is_gone(
    conn: psycopg.Connection, dsn: str
) -> None:
    service = Schedules([schedule(after_completion=60)], poll_interval=0.5)
    service.run(conn)
    planned = "select next_run_at - clock_timestamp() from bgjob_schedule"
    assert timedelta(seconds=50) < row(conn, planned)[0] <= timedelta(seconds=60)
    conn.execute("update bgjob_schedule set next_run_at = clock_timestamp()")
    assert service.run(conn) == 0.5
    for _ in range(3):
        assert service.run(conn) == 0.5
        assert len(jobs(conn)) == 1
        assert row(conn, planned) == (None,)
    with Client(dsn) as client:
        client.do("q", Mux().register("t", lambda _: MoveToDlq("dead is over, too")))
    service.run(conn)
    assert timedelta(seconds=50) < row(conn, planned)[0] <= timedelta(seconds=60)
    assert jobs(conn) == []


def test_a_changed_schedule_goes_on_from_its_last_tick_and_runs_nothing_for_its_past(
    conn: psycopg.Connection,
) -> None:
    Schedules([schedule(cron="0 0 1 1 *")]).run(conn)
    last = set_back(conn, "20 days")
    changed = Schedules([schedule(cron="* * * * * *", missed="all")])
    changed.run(conn)
    while changed.run(conn) == 0.0:
        pass
    assert len(jobs(conn)) <= 60 + PATIENCE
    assert tick(conn) > last
    [(spec, next_run_at)] = rows(conn, "select spec, next_run_at from bgjob_schedule")
    assert (spec, next_run_at) == ("* * * * * * UTC", tick(conn) + timedelta(seconds=1))


def test_an_unchanged_schedule_goes_on_over_a_restart_and_its_new_request_counts(
    conn: psycopg.Connection,
) -> None:
    Schedules([schedule()]).run(conn)
    last = set_back(conn, "5 minutes 5 seconds")
    request = EnqueueRequest("other", "t2", b"\0\xff", priority=-1)
    Schedules([schedule(missed="skip", request=request)]).run(conn)
    assert jobs(conn) == [schedule().job_id(last + timedelta(minutes=5))]
    new = ("other", "t2", b"\0\xff", -1)
    assert rows(conn, "select queue, type, arg, priority from bgjob_job") == [new]
    assert rows(conn, "select queue, type, arg, priority from bgjob_schedule") == [new]


def test_a_worker_with_schedules_names_the_grant_or_table_that_it_lacks(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute("drop table bgjob_schedule")
    worker = launcher.make(Mux(), services=[Schedules([schedule()])])
    with pytest.raises(SchemaError, match=r"bgjob_schedule has no column name.*migration/init.sql"):
        launcher.run(worker.run())
    launcher.start(Mux())  # others do not need it


@pytest.mark.parametrize(
    "settings", [{}, WORKER_SETTINGS], ids=["any session", "a worker's session"]
)
def test_a_look_does_not_read_all_jobs_for_any_statistics(
    conn: psycopg.Connection, settings: dict[str, str]
) -> None:
    conn.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    conn.execute("insert into bgjob_job (id, queue, type) values ('x', 'q', 't')")
    conn.execute("analyze bgjob_job")
    conn.execute(
        "insert into bgjob_job (id, queue, type) select n, 'q', 't' from generate_series(1, 20000) n"
    )
    names = [f"s{n}" for n in range(200)]
    service = Schedules([schedule(name) for name in names])
    service.run(conn)
    conn.execute("update bgjob_schedule set tick = tick - interval '5 min'")
    service.run(conn)
    conn.execute("analyze bgjob_schedule")
    for name, value in settings.items():
        known = "current_setting(%s, true) is not null"  # not each version has all of them
        conn.execute(f"select set_config(%s, %s, false) where {known}", [name, value, name])
    statement = look(names)
    explain = cast(Any, f"explain (analyze, format json) {statement.text!s}")
    [[[found]]] = conn.execute(explain, statement.params).fetchall()
    [reads] = [n for n in nodes(found["Plan"]) if n.get("Relation Name") == "bgjob_job"]
    assert reads["Actual Loops"] == len(names)
    assert reads["Actual Rows"] == 1


# -- one that cannot go on ------------------------------------------------------------------

AHEAD = pytest.mark.parametrize(
    "tick", ["'infinity'", "clock_timestamp() + interval '1 hour'", "'9999-12-31 00:00+00'"]
)


@AHEAD
@pytest.mark.parametrize(
    "options", [{"every": 300}, {"cron": "*/5 * * * *"}, {"missed": "all", "every": 300}]
)
def test_a_schedule_that_is_ahead_of_the_clock_is_corrected_and_reported_and_stops_no_other(
    conn: psycopg.Connection, tick: LiteralString, options: dict[str, Any]
) -> None:
    service = Schedules([schedule("a"), schedule("s", **options), schedule("z")])
    service.run(conn)
    before = set_back(conn, "1 hour")
    conn.execute(f"update bgjob_schedule set tick = {tick} where name = 's'")
    for name in "az":
        set_back(conn, "6 minutes", name)
    with pytest.raises(ScheduleError, match="schedule 's': it was ahead of the database's clock"):
        service.run(conn)
    assert len(jobs(conn, "a")) == len(jobs(conn, "z")) == 1
    [(state, next_run_at)] = rows(
        conn,
        "select clock_timestamp() - tick between '0 s' and '5 min', next_run_at "
        "from bgjob_schedule where name = 's'",
    )
    assert state
    assert next_run_at - datetime.now(UTC) <= 5 * MINUTE
    if "cron" not in options and tick.startswith("clock"):
        # An interval keeps its step: its ticks are whole intervals from those before.
        seen = row(conn, "select tick from bgjob_schedule where name = 's'")[0]
        assert (seen - before) % (5 * MINUTE) > timedelta(0)
    assert service.run(conn) <= 1.0  # and tells it once
    set_back(conn, "6 minutes")
    service.run(conn)
    assert len(jobs(conn)) >= 1


@pytest.mark.parametrize("step", ["infinity", "1 hour"])
def test_an_interval_after_completion_that_is_ahead_of_the_clock_is_corrected(
    conn: psycopg.Connection, step: str
) -> None:
    service = Schedules([schedule(after_completion=300)])
    service.run(conn)
    at = "'infinity'" if step == "infinity" else "next_run_at + interval '1 hour'"
    conn.execute(cast(Any, f"update bgjob_schedule set next_run_at = {at}"))
    with pytest.raises(ScheduleError, match="ahead"):
        service.run(conn)
    [(wait,)] = rows(conn, "select next_run_at - clock_timestamp() from bgjob_schedule")
    assert 4 * MINUTE < wait <= 5 * MINUTE
    service.run(conn)


def test_a_clock_that_was_set_back_by_seconds_is_waited_for_and_no_tick_is_repeated(
    conn: psycopg.Connection,
) -> None:
    service = Schedules([schedule()])
    service.run(conn)
    ahead = row(
        conn,
        "update bgjob_schedule set tick = clock_timestamp() + interval '30 s' returning tick",
    )
    service.run(conn)
    assert row(conn, "select tick from bgjob_schedule") == ahead


@pytest.mark.parametrize("tick", ["-infinity", "0001-01-01 00:00+00 BC"])
def test_a_tick_of_long_ago_is_a_missed_one(conn: psycopg.Connection, tick: str) -> None:
    service = Schedules([schedule()])
    service.run(conn)
    conn.execute("update bgjob_schedule set tick = %s::text::timestamptz", [tick])
    service.run(conn)
    assert len(jobs(conn)) == 1
    assert service.run(conn) <= 1.0


def test_a_schedule_whose_job_is_refused_stops_no_other_and_goes_on_when_it_is_not(
    conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"s{n:02}" for n in range(40)]
    bad = {"s07", "s21"}
    service = Schedules([schedule(name, exclusive=name) for name in names])
    service.run(conn)
    conn.execute("alter table bgjob_job add check (exclusive not in ('s07', 's21'))")
    now = [1000.0]
    monkeypatch.setattr("bgjob.schedules.monotonic", lambda: now[0])

    def tick_all() -> set[str]:
        conn.execute("delete from bgjob_job")
        for name in names:
            set_back(conn, "6 minutes", name)
        try:
            service.run(conn)
        finally:
            found = {key for (key,) in rows(conn, "select exclusive from bgjob_job")}
        return found

    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        with pytest.raises(ScheduleError, match=r"schedule 's07'; and 1 more: .*check") as caught:
            tick_all()
        assert caught.value.problems.keys() == bad
        assert {key for (key,) in rows(conn, "select exclusive from bgjob_job")} == {*names} - bad
        now[0] += pause - 0.01
        assert tick_all() == {*names} - bad  # they rest, and the others go on
        now[0] += 0.02
    conn.execute("alter table bgjob_job drop constraint bgjob_job_exclusive_check1")
    assert tick_all() == {*names}


def test_a_schedule_that_cannot_be_registered_stops_no_other(conn: psycopg.Connection) -> None:
    conn.execute("alter table bgjob_schedule add check (name <> 'bad')")
    service = Schedules([schedule(name) for name in ("a", "bad", "c")])
    for _ in range(2):
        with pytest.raises(ScheduleError, match="schedule 'bad'"):
            Schedules([schedule(name) for name in ("a", "bad", "c")]).run(conn)
    with pytest.raises(ScheduleError):
        service.run(conn)
    for name in "ac":
        set_back(conn, "6 minutes", name)
    service.run(conn)
    assert len(jobs(conn, "a")) == len(jobs(conn, "c")) == 1


def test_a_worker_starts_with_a_bad_schedule_and_reports_it(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute("alter table bgjob_schedule add check (name <> 'bad')")
    recorder = Recorder()
    services = [Schedules([schedule("bad", every=1), schedule("good", every=1)])]
    launcher.start(Mux().register("t", lambda _: None), observer=recorder, services=services)
    recorder.wait_for("completed")
    [_, error] = recorder.of("error")[0]
    assert isinstance(error, ScheduleError)
    assert "bad" in str(error)


# -- from a client --------------------------------------------------------------------------


class Timetable:
    """The schedules of a client of either colour."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        client: Any = AsyncClient(launcher.dsn) if launcher.is_async else launcher.client
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client.schedules, name)
        return lambda *args, **options: self._launcher.run(method(*args, **options))

    def close(self) -> None:
        if self._launcher.is_async:
            self._launcher.run(self._client.close())


@pytest.fixture
def timetable(launcher: Launcher) -> Iterator[Timetable]:
    timetable = Timetable(launcher)
    yield timetable
    timetable.close()


def test_schedules_are_listed_with_their_last_and_next_ticks(
    timetable: Timetable, conn: psycopg.Connection
) -> None:
    assert timetable.list() == []
    service = Schedules([schedule("b"), schedule("a", cron="0  9 * * *", tz=BERLIN)])
    service.run(conn)
    last = set_back(conn, "6 minutes", "b")
    service.run(conn)
    nine = Cron("0 9 * * *", BERLIN).after(tick(conn, "a"))
    five = timedelta(minutes=5)
    assert timetable.list() == [
        ScheduleStatus("a", "0 9 * * * Europe/Berlin", "q", "t", False, None, nine),
        ScheduleStatus("b", "every 0:05:00", "q", "t", False, last + five, last + 2 * five),
    ]


def test_a_schedule_of_infinite_times_is_listed_with_the_others(
    timetable: Timetable, conn: psycopg.Connection
) -> None:
    Schedules([schedule("a"), schedule("b")]).run(conn)
    conn.execute(
        "update bgjob_schedule set tick = 'infinity', last_run_at = '-infinity', "
        "next_run_at = 'infinity' where name = 'a'"
    )
    a, b = timetable.list()
    assert (a.name, a.last_run_at, a.next_run_at) == ("a", None, None)
    assert b.next_run_at is not None


def test_a_column_that_changes_its_type_under_live_sessions_stops_nothing(
    launcher: Launcher, timetable: Timetable, conn: psycopg.Connection
) -> None:
    done: list[str] = []
    mux = Mux().register("t", lambda job: done.append(job.id))
    services = [Schedules([schedule(every=1)])]
    launcher.start(mux, services=services, poll_interval=0.1)
    with Client(launcher.dsn) as client:

        def use() -> None:
            """Run each statement often enough to be prepared and to keep its plan."""
            for n in range(12):
                client.enqueue(EnqueueRequest("q", "t"))
                client.enqueue(EnqueueRequest("q", "t", delay=0.01, exclusive="k"))
                client.bulk_enqueue([EnqueueRequest("q", "t")] * 1)
                client._insert_many([EnqueueRequest("q", "t")])  # as those that meet
                timetable.list()
                client.dlq.list()
                client.dlq.requeue(ids="none")
                client.stats()
                client.paused()
                client.resume(f"q{n}")
            assert eventually(lambda: not client.stats())

        use()
        for change in (
            "bgjob_job alter id type varchar(300), alter queue type text, alter type type text",
            "bgjob_job alter attempt type bigint, alter deaths type int, alter last_error type varchar",
            "bgjob_dead_job alter job_id type varchar, alter attempt type bigint",
            "bgjob_schedule alter name type varchar, alter spec type varchar",
            "bgjob_schedule alter queue type varchar, alter last_job_id type varchar",
            "bgjob_pause alter queue type varchar",
            "bgjob_exclusive alter key type varchar",
        ):
            conn.execute(cast(Any, f"alter table {change}"))
            use()
        ticks = sum(id_.startswith("schedule:") for id_ in done)
        assert eventually(lambda: sum(id_.startswith("schedule:") for id_ in done) > ticks)


def test_a_paused_schedule_enqueues_nothing_and_its_ticks_are_not_missed(
    timetable: Timetable, conn: psycopg.Connection
) -> None:
    service = Schedules([schedule(missed="all"), schedule("late", after_completion=60)])
    service.run(conn)
    for name in ("s", "late"):
        timetable.pause(name)
        timetable.pause(name)
        set_back(conn, "3 hours", name)
    assert service.run(conn) == 1.0
    assert [(s.paused, s.next_run_at) for s in timetable.list()] == [(True, None)] * 2
    Schedules([schedule(missed="all")]).run(conn)  # a restart
    assert rows(conn, "select id from bgjob_job") == []
    for name in ("s", "late"):
        timetable.resume(name)
    service.run(conn)
    assert rows(conn, "select id from bgjob_job") == []
    now = row(conn, "select clock_timestamp()")[0]
    for status in timetable.list():
        assert not status.paused
        assert status.next_run_at > now
    last = set_back(conn, "10 minutes")
    timetable.resume("s")  # is not paused: nothing is forgotten
    service.run(conn)
    five = timedelta(minutes=5)
    assert jobs(conn) == [schedule().job_id(last + five), schedule().job_id(last + 2 * five)]


def test_a_schedule_can_be_run_once_and_its_ticks_stay_as_they_are(
    timetable: Timetable, conn: psycopg.Connection
) -> None:
    Schedules([schedule()]).run(conn)
    timetable.pause("s")
    before = rows(conn, "select * from bgjob_schedule")
    ids = [timetable.run("s"), timetable.run("s")]
    assert jobs(conn) == sorted(ids)
    assert rows(conn, "select distinct queue, type, arg, priority from bgjob_job") == [
        ("q", "t", b'{"n":1}', 3)
    ]
    assert rows(conn, "select * from bgjob_schedule") == before


def test_a_removed_schedule_is_gone_unless_a_worker_has_it(
    timetable: Timetable, conn: psycopg.Connection
) -> None:
    service = Schedules([schedule()])
    service.run(conn)
    set_back(conn, "1 hour")
    timetable.remove("s")
    assert timetable.list() == []
    service.run(conn)
    assert jobs(conn) == []
    assert [status.name for status in timetable.list()] == ["s"]


@pytest.mark.parametrize("method", ["pause", "resume", "run", "remove"])
def test_a_schedule_that_is_not_there_is_named(timetable: Timetable, method: str) -> None:
    with pytest.raises(UnknownScheduleError, match="there is no schedule 'nightly'"):
        getattr(timetable, method)("nightly")


def test_a_pause_in_a_transaction_of_the_caller_counts_when_that_commits(
    dsn: str, conn: psycopg.Connection
) -> None:
    Schedules([schedule()]).run(conn)
    with Client(dsn) as client:
        with psycopg.connect(dsn) as own:
            client.schedules.pause("s", conn=own)
            client.schedules.run("s", conn=own)
            assert client.schedules.list(conn=own)[0].paused
            own.rollback()
        assert not client.schedules.list()[0].paused
    assert jobs(conn) == []


# -- in a worker ----------------------------------------------------------------------------


def test_the_job_of_a_tick_starts_immediately_in_the_worker_that_enqueued_it(
    launcher: Launcher,
) -> None:
    observer = Recorder()
    every_second = schedule(cron="* * * * * *", missed="all")
    launcher.start(
        Mux().register("t", lambda _: None),
        services=[Schedules([every_second])],
        observer=observer,
        poll_interval=NEVER,
    )
    observer.wait_for("completed", times=3)
    assert observer.of("error") == []
    ids = [event[1] for event in observer.of("completed")]
    ticks = [datetime.fromisoformat(id_.removeprefix("schedule:s:")) for id_ in ids]
    assert {later - early for early, later in zip(ticks, ticks[1:])} == {timedelta(seconds=1)}


def test_the_job_of_a_tick_wakes_the_worker_of_another_queue(launcher: Launcher) -> None:
    observer = Recorder()
    mux = Mux().register("t", lambda _: None)
    launcher.start(mux, "q", observer=observer, poll_interval=NEVER)
    observer.wait_for("empty")
    every_second = schedule(cron="* * * * * *")
    launcher.start(Mux(), "elsewhere", services=[Schedules([every_second])], poll_interval=NEVER)
    observer.wait_for("completed", times=2)


def test_no_tick_is_enqueued_once_a_pause_has_returned(
    launcher: Launcher, conn: psycopg.Connection, timetable: Timetable
) -> None:
    launcher.start(Mux(), "elsewhere", services=[Schedules([schedule(cron="* * * * * *")])])
    assert eventually(lambda: len(jobs(conn)) >= 1)
    timetable.pause("s")
    paused = jobs(conn)
    [(last,)] = rows(conn, "select tick from bgjob_schedule")
    still: LiteralString = "select clock_timestamp() > %s + interval '2.5 s'"
    assert eventually(lambda: bool(row(conn, still, last)[0]))
    assert jobs(conn) == paused
    timetable.resume("s")
    assert eventually(lambda: len(jobs(conn)) > len(paused))


def test_a_look_does_not_compute_future_ticks_again(
    conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However many there are: no cache helps over 4,096 of them.
    made = [Schedule(f"{n:02}", cron=f"{n} 3 1 1 *", request=REQUEST) for n in range(50)]
    service = Schedules(made)
    for _ in range(2):  # the first writes their next ticks
        assert service.run(conn) == 1.0
    found: list[str] = []
    real = cron._next

    def find(expression: str, wall: datetime) -> datetime:
        found.append(expression)
        return real(expression, wall)

    monkeypatch.setattr(cron, "_next", find)
    cron._after.cache_clear()
    assert service.run(conn) == 1.0
    assert found == []
    conn.execute("update bgjob_schedule set tick = tick - interval '2 years' where name = '42'")
    service.run(conn)
    assert set(found) == {made[42].cron}
    [(id_,)] = conn.execute("select id from bgjob_job").fetchall()
    assert id_.startswith("schedule:42:")
