"""`bgjob top`: its frames, and the command on a terminal, over a pipe and in trouble."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from support.clients import HOSTILE
from support.plans import (
    PLAN_CACHE_MODES,
    fill_with_statistics,
    handled,
    nodes,
    prepare,
    run,
)
from support.waiting import PATIENCE, eventually

from bgjob import (
    CappedCount,
    Client,
    EnqueueRequest,
    Job,
    MinuteCounts,
    MinuteReport,
    MinuteSeries,
    Minutes,
    MoveToDlq,
    Mux,
    Overview,
    QueueOverview,
    Result,
    Worker,
    cli,
)
from bgjob._cli.top.frame import frame
from bgjob._cli.top.history import History
from bgjob._cli.top.keys import pressed
from bgjob._cli.top.seen import MINUTES, SORTS, Flow, Pane, Seen, Server, Sort, View, flows_of
from bgjob._cli.top.text import Line, Style, bars, render, width_of
from bgjob._cli.top.terminal import split_keys
from bgjob._sql.dead import LastDeath, last_death
from bgjob._sql.overviews import plan_by_index
from bgjob._sql.server import Holder
from bgjob.limit import Limit, LimitStatus
from bgjob.workers import RunningJob, WorkerCounts, WorkerStatus

NOW = datetime(2026, 11, 29, 3, 14, 7, tzinfo=UTC)
SERVER = Server("shop@db1", "18.6")

NONE = CappedCount(0, is_exact=True)
MANY = CappedCount(1000, is_exact=False)


def a_queue(
    name: str, due: int | CappedCount = 0, oldest: float | None = None, **other: Any
) -> QueueOverview:
    if isinstance(due, int):
        due = CappedCount(due, is_exact=True)
    queue = QueueOverview(name, due, NONE, NONE, NONE, NONE, oldest, False, None)
    return replace(queue, **other)


def an_overview(*queues: QueueOverview, after: float = 0) -> Overview:
    return Overview(NOW + timedelta(seconds=after), queues)


def plain(line: Line) -> str:
    return render(line, is_coloured=False)


def drawn(
    *queues: QueueOverview,
    history: History | None = None,
    workers: Sequence[WorkerStatus] = (),
    flows: dict[str, Flow] | None = None,
    death: LastDeath | None = None,
    holder: Holder | None = None,
    **view: Any,
) -> list[str]:
    seen = Seen(an_overview(*queues), workers, flows or {}, holder, death)
    return [plain(line) for line in frame(seen, SERVER, history or History(), View(**view))]


def a_worker(
    number: int, *, after: float = 0, done: int = 0, failed: int = 0, **other: Any
) -> WorkerStatus:
    told: dict[str, Any] = dict.fromkeys(WorkerStatus._fields)
    told |= {
        "number": number,
        "state": "working",
        "seen_at": NOW + timedelta(seconds=after),
        "queues": {"mail": 8},
        "running": {"mail": 5},
        "counts": WorkerCounts(completed=done, retried=failed, dead=failed),
        "longest": [],
        "host": "web-2",
        "not_seen": 0.0,
    }
    return WorkerStatus(**told | other)


def a_flow(per_second: float = 0.0, failed: int = 0, bars: tuple[int, ...] = ()) -> Flow:
    return Flow(per_second, MinuteCounts(completed=90, retried=failed), bars)


def names(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines[3:] if line]


# -- a frame --------------------------------------------------------------------------------


def test_a_frame_shows_what_each_queue_holds() -> None:
    mail = a_queue(
        "mail",
        MANY,
        3 * 3600 + 780,
        running=CappedCount(536, is_exact=True),
        delayed=MANY,
        dead=CappedCount(9449, is_exact=True),
    )
    idle = a_queue("idle")
    head, totals, titles, *rows = drawn(idle, mail, width=80)
    assert re.fullmatch(r"bgjob shop@db1  \d\d:14:07  PostgreSQL 18\.6", head)
    assert totals == "2 queues  1,000+ due  oldest 3 h 13 min  536 running  9,449 dead/h"
    assert titles.split() == ["queue", "due", "oldest", "running", "delayed", "dead/h"]
    assert [row.split() for row in rows] == [
        ["mail", "1,000+", "3", "h", "13", "min", "536", "1,000+", "9,449"],
        ["idle", "0", "-", "0", "0", "0"],
    ]


def test_a_column_that_says_nothing_is_left_out() -> None:
    paused = a_queue("a", is_paused=True)
    until = a_queue("b", is_paused=True, paused_until=NOW)
    waits = a_queue("c", waiting_for_keys=CappedCount(7, is_exact=True))
    assert "state" not in drawn(waits)[2]
    assert "for keys" not in drawn(paused)[2]
    *_, a, b, c = drawn(paused, until, waits)
    assert a.split()[:2] == ["a", "PAUSED"]
    assert b.split()[:3] == ["b", "until", f"{NOW.astimezone():%m-%d}"]
    assert c.split() == ["c", "open", "0", "-", "0", "0", "7", "0"]


def test_without_a_queue_a_frame_says_so() -> None:
    assert "No queue has jobs" in "".join(drawn(width=80, height=24))


@pytest.mark.parametrize("sort", SORTS)
def test_queues_are_sorted_as_asked_and_then_by_name(sort: Sort) -> None:
    queues = [
        a_queue("d", 5),
        a_queue("c", 1, 90.0),
        a_queue("b", 9, 10.0),
        a_queue("a", 0, dead=CappedCount(3, is_exact=True)),
    ]
    expected = {"oldest": "cbad", "due": "bdca", "dead": "abcd", "rate": "cabd", "name": "abcd"}
    flows = {"c": a_flow(5.0)}
    assert "".join(names(drawn(*queues, sort=sort, flows=flows))) == expected[sort]


def test_a_screen_shows_the_queues_that_it_has_room_for_and_scrolls() -> None:
    queues = [a_queue(f"q{n:03}") for n in range(100)]
    lines = drawn(*queues, width=80, height=24, sort="name", first=7)
    assert len(lines) == 24
    assert names(lines[:-1]) == [f"q{n:03}" for n in range(7, 25)]
    assert "8 to 25 of 100" in lines[-1]
    assert len(drawn(*queues)) == 103  # a pipe has room for all


WIDE = [
    a_queue(
        name,
        CappedCount(32_768_000, is_exact=False),
        86_400.0 * 999,
        delayed=MANY,
        running=MANY,
        dead=MANY,
        waiting_for_keys=MANY,
        is_paused=True,
        paused_until=NOW,
    )
    for name in [*HOSTILE, "請求書" * 30, "a"]
]


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 10, 200])
@pytest.mark.parametrize("width", [1, 2, 11, 40, 79, 80, 100, 400])
@pytest.mark.parametrize("trouble", [None, "not renewed: the database is away " * 20])
def test_no_frame_is_larger_than_the_screen(width: int, height: int, trouble: str | None) -> None:
    history = History()
    for second in range(100):
        history.add(an_overview(*WIDE, after=second))
    lines = drawn(*WIDE, history=history, width=width, height=height, trouble=trouble)
    assert len(lines) == height
    assert max(map(width_of, lines)) <= width
    assert all(c.isprintable() for line in lines for c in line)


def test_a_narrow_screen_leaves_out_the_columns_that_matter_least() -> None:
    flows = {queue.queue: a_flow(1, 2, (3, *[4] * 11)) for queue in WIDE}
    workers = [a_worker(1, queues={queue.queue: 8 for queue in WIDE}, running={})]
    shown = {
        width: drawn(*WIDE, width=width, flows=flows, workers=workers)[2]
        for width in (160, 120, 110, 100, 90, 80, 70, 60)
    }
    for title, widths in (
        ("oldest", {*shown}),
        ("dead/h", {*shown} - {60}),
        ("done/s", {*shown} - {60}),
        ("busy", {*shown} - {60, 70}),
        ("fail%", {160, 120, 110, 100, 90}),
        ("last hour", {160, 120, 110, 100}),
        ("running", {160, 120, 110}),
        ("delayed", {160, 120}),
        ("for keys", {160}),
    ):
        assert {width for width, titles in shown.items() if title in titles} == widths


def test_a_long_name_is_cut_and_a_short_one_is_not() -> None:
    *_, short, long = drawn(a_queue("x" * 100, MANY), a_queue("short"), width=80)
    assert short.startswith("short ")
    assert re.match(r"x{12,}… ", long)


def test_what_is_late_is_coloured_unless_the_queue_is_paused() -> None:
    def styles(queue: QueueOverview) -> set[Style]:
        lines = frame(Seen(an_overview(queue)), SERVER, History(), View())
        return {part.style for line in (lines[1], lines[3]) for part in line}

    assert Style.BAD in styles(a_queue("q", 1, 301.0))
    assert Style.WARN in styles(a_queue("q", 1, 61.0))
    assert not {Style.BAD, Style.WARN} & styles(a_queue("q", 1, 59.0))
    assert Style.BAD not in styles(a_queue("q", 1, 301.0, is_paused=True))


# -- workers --------------------------------------------------------------------------------


def test_the_slots_of_the_workers_that_are_seen_are_shown_by_queue() -> None:
    workers = [
        a_worker(1, queues={"mail": 8, "idle": 4}, running={"mail": 8}),
        a_worker(2, state="stopping", running={"mail": 3}),
        a_worker(3, state="lost"),
        a_worker(4, state="ended"),
    ]
    queues = [a_queue("idle"), a_queue("mail", 5, 1.0), a_queue("other")]
    head, _, titles, mail, idle, other = drawn(*queues, workers=workers, width=80)
    assert "  2 workers  1 lost  11/20 busy  " in head
    assert "busy" in titles
    assert ["busy" in line for line in drawn(*queues)] == [False] * 6
    assert [line.split()[-2] for line in (mail, idle, other)] == ["11/16", "0/4", "0/0"]


def test_a_queue_with_due_jobs_and_no_worker_is_said_to_have_none() -> None:
    def states(*queues: QueueOverview, workers: Sequence[WorkerStatus]) -> list[bool]:
        return ["NO WORKER" in line for line in drawn(*queues, workers=workers)[3:]]

    runs = CappedCount(1, is_exact=True)
    queues = [
        a_queue("mail", 5, 5.0),
        a_queue("nobody", 4, 4.0),
        a_queue("paused", 3, 3.0, is_paused=True),
        a_queue("unregistered", 2, 2.0, running=runs),
        a_queue("quiet"),
    ]
    assert states(*queues, workers=[a_worker(1)]) == [False, True, False, False, False]
    # Whoever was there is not any more.
    assert states(*queues, workers=[a_worker(1, state="lost")]) == [True, True, *[False] * 3]
    # Where no worker has a row, all may work without.
    assert states(*queues, workers=[]) == [False] * 5


def test_what_workers_did_each_second_is_shown_once_they_have_told_it_twice() -> None:
    history = History()

    def head(*workers: WorkerStatus) -> str:
        history.add(an_overview(), workers)
        return drawn(history=history, workers=workers)[0]

    assert "done/s" not in head(a_worker(1, done=100), a_worker(2, done=9))
    # Not every look finds a new beat.
    assert "done/s" not in head(a_worker(1, done=100), a_worker(2, done=9))
    assert "10.0 done/s" in head(a_worker(1, after=10, done=200), a_worker(2, done=9))
    both = a_worker(1, after=20, done=300, failed=2), a_worker(2, after=10, done=14, failed=1)
    assert "  10.5 done/s  0.4 failed/s  " in head(*both)
    lost = a_worker(2, after=10, done=14, state="lost")
    assert "10.0 done/s" in head(a_worker(1, after=20, done=300), lost)
    assert "done/s" not in head()


def test_without_minutes_the_rate_of_a_queue_is_that_of_workers_that_have_no_other() -> None:
    history = History()

    def shown(*workers: WorkerStatus) -> list[list[str]]:
        history.add(an_overview(a_queue("mail")), workers)
        lines = drawn(a_queue("mail"), history=history, workers=workers)
        return [line.split() for line in lines[2:4]]

    shown(a_worker(1), a_worker(2, queues={"other": 1}))
    both = a_worker(1, after=10, done=50), a_worker(2, after=10, done=9, queues={"other": 1})
    assert shown(*both)[1] == ["mail", *"0 - 0 0 10/8 5.0 0".split()]
    mixed = a_worker(3, queues={"mail": 1, "other": 1})
    assert "done/s" not in shown(*both, mixed)[0]


# -- what minutes tell ----------------------------------------------------------------------


def test_minutes_tell_the_rate_the_failures_and_the_last_hour_of_a_queue() -> None:
    steps = [MinuteCounts()] * 20
    steps += [MinuteCounts(completed=60)] * 30 + [MinuteCounts(completed=120)] * 9
    steps += [MinuteCounts(completed=600, retried=150, dead=50), MinuteCounts(completed=1)]
    assert len(steps) == MINUTES
    series = MinuteSeries("mail", None, tuple(steps), MinuteCounts())
    flows = flows_of(MinuteReport(NOW, NOW, 60, (series,)))
    assert flows["mail"].bars == (0, 0, 0, 0, *[300] * 6, 600, 1080)
    titles, mail, other = drawn(a_queue("mail"), a_queue("other"), flows=flows)[2:]
    assert (
        titles.split() == "queue due oldest running delayed done/s fail% dead/h last hour".split()
    )
    assert mail.split() == ["mail", *"0 - 0 0 10.0 10.6 0 ▃▃▃▃▃▃▅█".split()]
    assert other.split() == ["other", *"0 - 0 0 - - 0".split()]
    assert bars([]) == ""
    assert bars([0, 1, 100]) == " ▁█"


def test_a_queue_that_is_empty_is_shown_while_it_has_workers_or_jobs_flow() -> None:
    shown = drawn(
        flows={"flows": a_flow(), "idle": Flow(0, MinuteCounts(), ())}, workers=[a_worker(1)]
    )
    assert names(shown) == ["flows", "mail"]
    assert shown[1].startswith("2 queues  0 due")


# -- below the queues -----------------------------------------------------------------------


def a_holder(seconds: float) -> Holder:
    told: dict[str, Any] = dict.fromkeys(Holder._fields)
    return Holder(**told | {"kind": "session", "name": "16527", "seconds": seconds})


def test_the_longest_jobs_the_last_death_and_an_old_transaction_are_told_below() -> None:
    since = NOW - timedelta(seconds=60)
    jobs = [RunningJob("old", since), RunningJob("new", NOW)]
    workers = [a_worker(1, longest=jobs), a_worker(2, longest=jobs, state="lost")]
    died = LastDeath(NOW - timedelta(seconds=90), "mail", "confirm", "No: \x1b\nTraceback", MANY)
    lines = drawn(a_queue("mail"), workers=workers, death=died, holder=a_holder(3700))
    assert lines[-4:] == [
        "",
        "longest    old 1 min on web-2",
        "horizon    session 16527 keeps dead rows for 1 h 1 min: bgjob doctor --check horizon",
        "last dead  1 min 30 s ago, mail/confirm: No: \\x1b (1,000+ jobs like it)",
    ]
    assert len(drawn(a_queue("mail"), workers=[a_worker(1)], holder=a_holder(59))) == 4
    assert drawn(a_queue("mail"), death=died, height=12, width=80)[-2].startswith("last dead")
    assert "last dead" not in "".join(drawn(a_queue("mail"), death=died, height=11, width=80))


def test_limits_of_queues_are_a_column_and_those_of_types_are_told_below() -> None:
    seen = Seen(
        an_overview(a_queue("mail"), a_queue("free")),
        limits=[
            LimitStatus("queue", "mail", Limit(3), True, NOW, 1, 3, None, 0.0),
            LimitStatus("type", "send", Limit(rate="14/s"), False, NOW, 0, 0, 0, 0.5),
            LimitStatus("type", "call", Limit(2), True, NOW, 1, 1, None, 0.0),
        ],
    )
    lines = frame(seen, SERVER, History(), View())
    text = "\n".join(map(plain, lines))
    assert "limit" in text and "3 at once" in text
    assert "limits     send: 14/s, burst 14 · call: 2 at once" in text
    styles = {each.text.strip(): each.style for line in lines for each in line}
    assert styles["3 at once"] == styles["send: 14/s, burst 14"] == Style.WARN
    assert styles["call: 2 at once"] == Style.PLAIN


def test_more_deaths_than_recently_are_marked() -> None:
    history = History()
    for n, dead in enumerate((3, 5, 5)):
        queue = a_queue("mail", dead=CappedCount(dead, is_exact=True))
        history.add(an_overview(queue, after=2 * n))
    assert "5 dead/h ▲" in drawn(queue, history=history)[1]
    history.add(an_overview(a_queue("mail", dead=MANY), after=8))
    assert "1,000+ dead/h" in drawn(a_queue("mail", dead=MANY), history=history)[1]
    assert history.dead_trend() == 0


# -- a trend --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ages", "trend"),
    [
        ([], 0),
        ([10.0], 0),
        ([10.0, 12.0, 14.0], 1),
        ([10.0, 10.4, 11.0], 1),
        ([10.0, 9.0, 10.0], 0),
        ([10.0, 9.0, 8.0], -1),
        ([10.0, None], -1),
        ([None, 10.0], 1),
        ([*[500.0] * 30, 400.0, *[400.0] * 16], 0),  # the fall was long ago
    ],
)
def test_a_trend_says_whether_the_oldest_job_gets_older(
    ages: list[float | None], trend: int
) -> None:
    history = History()
    for n, oldest in enumerate(ages):
        history.add(an_overview(a_queue("q", 1, oldest), after=2 * n))
    assert history.trend("q") == trend
    arrow = {1: "▲", 0: " ", -1: "▼"}[trend]
    [*_, row] = drawn(a_queue("q", 1, 5.0), history=history)
    assert f"5.0 s {arrow}" in row


# -- keys -----------------------------------------------------------------------------------


def test_keys_are_told_apart_that_arrive_together() -> None:
    assert [*split_keys("q\x1b[Aj\x1b[6~\x1bOB\x1b\x1b[1~é")] == [
        *("q", "up", "down", "page down", "down", "\x1b", "home", "é")
    ]


def test_the_cursor_follows_its_queue_and_esc_takes_it_away() -> None:
    queues = [*"abcdef"]
    view = pressed(View(), "enter", queues, 3)
    assert view.pane == Pane("a")
    assert pressed(view, "down", queues, 3) == view
    asked_again = pressed(view, "enter", queues, 3)
    assert asked_again.pane is not view.pane
    view = pressed(view, "\x1b", queues, 3)
    assert (view.pane, view.chosen) == (None, "a")
    view = pressed(view, "down", [*"bcadef"], 3)
    assert (view.chosen, view.first) == ("d", 1)
    view = pressed(view, "up", [*"xyz"], 3)  # its queue is gone
    assert view.chosen == "x"
    assert pressed(view, "\x1b", queues, 3).chosen is None
    assert pressed(View(), "enter", [], 3) == pressed(View(), "down", [], 3) == View()


# -- the command, over a pipe ---------------------------------------------------------------


def test_workers_are_shown_if_the_role_can_read_them(
    filled: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    def head() -> str:
        assert cli.main(["top", "--dsn", filled]) == 0
        return capsys.readouterr().out.splitlines()[0]

    with Client(filled) as client, Worker(client, "idle", Mux(), registry=True):
        assert eventually(client.workers)
        assert "1 worker  0/" in head()
        conn.execute("alter table bgjob_worker rename to elsewhere")
        assert "worker" not in head()
        conn.execute("alter table elsewhere rename to bgjob_worker")


def fill(client: Client) -> None:
    client.bulk_enqueue([EnqueueRequest("mail", "t") for _ in range(3)])
    client.enqueue(EnqueueRequest("reports", "t", delay=3600))
    client.pause("reports")


@pytest.fixture
def filled(dsn: str) -> str:
    with Client(dsn) as client:
        fill(client)
    return dsn


@pytest.mark.parametrize("args", [[], ["--once"]])
def test_over_a_pipe_it_prints_one_frame_without_control_sequences(
    filled: str, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["top", "--dsn", filled, *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    *_, mail, reports = [line.split() for line in out.splitlines()]
    assert (mail[:3], reports[:3]) == (["mail", "open", "3"], ["reports", "PAUSED", "0"])
    assert "q quit" not in out


def test_json_has_the_numbers_and_whether_they_are_exact(
    filled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["top", "--dsn", filled, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert datetime.fromisoformat(told["at"]).tzinfo is not None
    mail, reports = told["queues"]
    assert (mail["queue"], mail["due"]) == ("mail", {"number": 3, "is_exact": True})
    assert (reports["is_paused"], reports["paused_until"]) == (True, None)
    assert set(mail) == set(QueueOverview.__slots__)


def test_it_changes_nothing_and_waits_for_no_lock(
    filled: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    with conn.transaction():
        conn.execute("lock table bgjob_job in access exclusive mode")
        assert cli.main(["top", "--dsn", filled]) == 1
    assert "lock timeout" in capsys.readouterr().err


@pytest.mark.parametrize("args", ["--every 0", "--every 1x", "--sort color", "mail"])
def test_wrong_usage_exits_with_2(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["top", *args.split()])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: bgjob")


def test_missing_tables_are_reported_with_the_remedy(
    empty_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["top", "--dsn", empty_dsn]) == 1
    assert "migration/init.sql" in capsys.readouterr().err


@pytest.mark.parametrize("statistics", ["none", "of ten jobs", "of these jobs"])
def test_the_last_death_is_found_among_many_and_its_group_is_counted_up_to_a_cap(
    conn: psycopg.Connection, statistics: str
) -> None:
    def fill(conn: psycopg.Connection, jobs: int) -> None:
        conn.execute(
            "insert into bgjob_dead_job (job_id, queue, type, attempt, priority, next_run_at, "
            "job_created_at, job_updated_at, fingerprint) select n, 'q', 't', 1, 0, now(), now(), "
            "now(), mod(n, 2) from generate_series(1, %(jobs)s) as n",
            {"jobs": jobs},
        )

    fill_with_statistics(conn, statistics, fill, 20_000, ["bgjob_dead_job"])
    text: Any = plan_by_index().text
    conn.execute(text.replace(", true", ", false"))
    explain = prepare(conn, "last death", last_death(within=60, cap=100))
    for mode in PLAN_CACHE_MODES:
        for node in nodes(run(conn, explain, mode)):
            assert handled(node) <= 100, node


# -- the command, on a terminal -------------------------------------------------------------

MAIN = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from bgjob.cli import main
sys.exit(main(sys.argv[1:]))
"""

STYLE = re.compile(r"\x1b\[[0-9;]*m")
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LEFT = "\x1b[?7h\x1b[?25h\x1b[?1049l"


class Screen:
    """A terminal with the command on it."""

    def __init__(self, *args: str, columns: int = 80, lines: int = 24, **env: str) -> None:
        self.keyboard, terminal = pty.openpty()
        self.before = termios.tcgetattr(terminal)
        self._terminal = terminal
        self.resize(columns, lines)
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "top", "--every", "0.1", *args],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if k != "NO_COLOR"}
            | {"TERM": "xterm", "LC_ALL": "C.UTF-8"}
            | env,
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def frame(self) -> list[str]:
        """Return the lines that are shown, without control sequences."""
        self._read()
        shown = self.text.rpartition("\x1b[J")[0].rpartition("\x1b[H")[2]
        return [SEQUENCE.sub("", line) for line in re.split("\r+\n", shown)]

    def shows(self, pattern: str) -> bool:
        """Wait until a frame has a line that matches."""
        return eventually(lambda: any(re.search(pattern, line) for line in self.frame()))

    def has(self, lines: int) -> bool:
        """Wait until a frame has this many lines."""
        return eventually(lambda: len(self.frame()) == lines)

    def status(self) -> int:
        """Wait for the end of the process; return its status."""
        give_up_at = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < give_up_at:
            self._read()
        self._read()
        return self.process.wait(0)

    def is_as_it_was(self) -> bool:
        """Whether the terminal has the settings from before, and its own screen."""
        return termios.tcgetattr(self._terminal) == self.before and LEFT in self.text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)
        os.close(self._terminal)

    def _read(self) -> None:
        while select.select([self.keyboard], [], [], 0.01)[0]:
            self.text += os.read(self.keyboard, 65536).decode("utf-8", "ignore")


@contextlib.contextmanager
def on_a_terminal(*args: str, **options: Any) -> Iterator[Screen]:
    screen = Screen(*args, **options)
    try:
        yield screen
    finally:
        screen.close()


def test_on_a_terminal_it_renews_the_screen_until_q_is_pressed(filled: str) -> None:
    with on_a_terminal("--dsn", filled) as screen, Client(filled) as client:
        assert screen.shows(r"^mail +open +3 ")
        assert len(screen.frame()) == 24
        assert screen.frame()[-1].startswith("q quit")
        client.enqueue(EnqueueRequest("mail", "t"))
        assert screen.shows(r"^mail +open +4 ")
        assert STYLE.search(screen.text)
        screen.press("q")
        assert screen.status() == 0
        assert screen.is_as_it_was()


def test_it_draws_anew_when_the_terminal_is_resized(filled: str) -> None:
    with on_a_terminal("--dsn", filled, "--every", "1h") as screen:
        assert screen.shows("^mail ")
        for columns, lines in ((40, 10), (132, 50)):
            screen.resize(columns, lines)
            assert screen.has(lines)
            assert max(map(len, screen.frame())) <= columns


def test_keys_sort_and_scroll(dsn: str) -> None:
    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest(f"q{n:02}", "t", delay=99) for n in range(40)])
    with on_a_terminal("--dsn", dsn, "--sort", "name", lines=14) as screen:
        assert screen.shows(r"sort: name +↑↓ 1 to 8 of 40")
        for keys, first, chosen in (
            ("\x1b[B", 0, 0),
            ("j", 0, 1),
            ("\x1b[6~", 2, 9),
            ("\x1b[F", 32, 39),
            ("kk", 32, 37),
            ("\x1b[H", 0, 0),
        ):
            screen.press(keys)
            assert screen.shows(f" {first + 1} to {first + 8} of 40")
            assert screen.shows(f"^▸ q{chosen:02} ")
            assert screen.frame()[3].startswith(("▸ ", "  ")) is True
        screen.press("s")
        assert screen.shows(r"sort: oldest +↑↓ 1 to 8 of 40")


def test_enter_tells_why_the_first_job_of_a_queue_does_not_run(dsn: str) -> None:
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("mail", "t", id="order-1", delay=99))
        client.enqueue(EnqueueRequest("reports", "t", id="order-2"))
        client.pause("reports")
        with on_a_terminal("--dsn", dsn, "--sort", "name") as screen:
            assert screen.shows("^reports ")
            screen.press("jj\r")
            assert screen.shows("^the first due job of queue reports")
            assert screen.shows("^do +bgjob resume reports")
            assert screen.frame()[-1].startswith("q quit   Esc back")
            screen.press("\x1b")
            assert screen.shows("^▸ reports ")
            screen.press("k\r")
            assert screen.shows("^queue +mail: empty")


def test_minutes_deaths_and_long_jobs_come_from_the_database(
    dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = threading.Event()

    def handle(job: Job) -> Result:
        done.set()
        return MoveToDlq("no such address")

    mux = Mux().register("t", handle)
    with Client(dsn) as client:
        with Worker(client, "mail", mux, observer=[], services=[Minutes()]):
            client.enqueue(EnqueueRequest("mail", "t"))
            assert done.wait(PATIENCE)
        assert cli.main(["top", "--dsn", dsn]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^mail .* 100\.0 +1$", out, re.MULTILINE)
    assert re.search(
        r"^last dead .* ago, mail/t: no such address \(1 job like it\)", out, re.MULTILINE
    )


def test_a_role_that_may_only_read_jobs_sees_the_rest(
    filled: str, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    conn.execute("alter table bgjob_minute rename to elsewhere")
    conn.execute("alter table bgjob_dead_job drop column fingerprint")
    assert cli.main(["top", "--dsn", filled]) == 0
    assert "mail" in capsys.readouterr().out


def test_a_frozen_screen_stays_until_it_is_thawed(filled: str) -> None:
    with on_a_terminal("--dsn", filled) as screen, Client(filled) as client:
        assert screen.shows(r"^mail +open +3 ")
        screen.press("p")
        assert screen.shows("^FROZEN")
        client.enqueue(EnqueueRequest("mail", "t"))
        frames = screen.text.count("\x1b[H")
        # It goes on drawing, at every second.
        assert eventually(lambda: screen.frame() and screen.text.count("\x1b[H") > frames + 1)
        assert screen.shows(r"^mail +open +3 ")
        screen.press("p")
        assert screen.shows(r"^mail +open +4 ")
        assert "FROZEN" not in screen.frame()[-1]


@pytest.mark.parametrize(
    ("how", "status"),
    [("ctrl-c", 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["ctrl-c", "SIGTERM", "SIGHUP"],
)
def test_a_signal_that_ends_it_leaves_the_terminal_as_it_was(
    filled: str, how: str | signal.Signals, status: int
) -> None:
    with on_a_terminal("--dsn", filled) as screen:
        assert screen.shows("^mail ")
        if isinstance(how, str):
            screen.press("\x03")
        else:
            screen.process.send_signal(how)
        assert screen.status() == status
        assert screen.is_as_it_was()
        assert "Traceback" not in screen.text


def test_it_can_be_stopped_and_continued(filled: str) -> None:
    with on_a_terminal("--dsn", filled) as screen:
        assert screen.shows("^mail ")
        screen.process.send_signal(signal.SIGTSTP)
        os.waitid(os.P_PID, screen.process.pid, os.WSTOPPED | os.WNOWAIT)
        screen.frame()
        assert screen.is_as_it_was()
        entered = screen.text.count("\x1b[?1049h")
        screen.process.send_signal(signal.SIGCONT)
        assert eventually(lambda: screen.frame() and screen.text.count("\x1b[?1049h") > entered)
        assert screen.shows("^mail ")
        screen.press("q")
        assert screen.status() == 0
        assert termios.tcgetattr(screen._terminal) == screen.before


def test_without_colours_it_moves_the_cursor_only(filled: str) -> None:
    with on_a_terminal("--dsn", filled, NO_COLOR="1") as screen:
        assert screen.shows("^mail ")
        screen.press("q")
        assert screen.status() == 0
        assert not STYLE.search(screen.text)


def test_a_terminal_that_cannot_be_drawn_on_gets_one_frame(filled: str) -> None:
    with on_a_terminal("--dsn", filled, TERM="dumb") as screen:
        assert screen.status() == 0
        assert "mail" in screen.text
        assert "\x1b" not in screen.text


def test_an_encoding_without_the_signs_gets_others(filled: str) -> None:
    with on_a_terminal("--dsn", filled, PYTHONIOENCODING="ascii") as screen:
        assert screen.shows("^mail ")
        assert screen.shows(r"sort: oldest +\^v 1 to 2 of 2")
        assert screen.text.isascii()


def test_trouble_is_said_and_the_last_frame_stays(filled: str, conn: psycopg.Connection) -> None:
    with on_a_terminal("--dsn", filled) as screen:
        assert screen.shows(r"^mail +open +3 ")
        with conn.transaction():
            conn.execute("lock table bgjob_job in access exclusive mode")
            assert screen.shows("^not renewed: canceling statement due to lock timeout")
            assert screen.shows(r"^mail +open +3 ")
        with Client(filled) as client:
            client.enqueue(EnqueueRequest("mail", "t"))
        assert screen.shows(r"^mail +open +4 ")
        assert screen.frame()[-1].startswith("q quit")


def test_it_goes_on_after_its_session_was_ended(filled: str, conn: psycopg.Connection) -> None:
    with on_a_terminal("--dsn", filled) as screen, Client(filled) as client:
        assert screen.shows(r"^mail +open +3 ")
        ended = conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where application_name = 'bgjob top' and datname = current_database()"
        ).fetchall()
        assert ended == [(True,)]
        client.enqueue(EnqueueRequest("mail", "t"))
        assert screen.shows(r"^mail +open +4 ")
