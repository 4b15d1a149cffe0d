"""The commands other than the worker: effect, output and exit status."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from support.documents import ROOT
from support.waiting import PATIENCE

from bgjob import Client, EnqueueRequest, Schedule, Schedules, cli, schema
from bgjob._cli import database, progress, table
from bgjob._cli.commands import dlq

Run = Callable[..., tuple[int, str, str]]

READ = [
    "stats",
    "top",
    "triage",
    "dlq list",
    "dlq show a",
    "dlq requeue --all",
    "dlq purge --all",
    "job list",
    "job show a",
    "job cancel a",
    "job priority 1 a",
    "enqueue q t",
]
READ += [f"schedules {rest}" for rest in ("list", "pause a", "resume a", "run a", "remove a")]
READ += ["pause q", "resume q", "paused", "workers", "metrics"]
"""Commands that need the tables."""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in {"BGJOB_DSN", "DATABASE_URL"} or name.startswith("PG"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Run a command, and return its exit status and output."""
    monkeypatch.setenv("BGJOB_DSN", dsn)

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(args)
        return status, *capsys.readouterr()

    yield run


def dead_letter(conn: psycopg.Connection, *ids: str, **columns: Any) -> None:
    """Put dead jobs into the dead-letter table."""
    row = {"queue": "q", "type": "t", "arg": None, "last_error": None, "ago": 0.0} | columns
    for id_ in ids:
        conn.execute(
            "insert into bgjob_dead_job (job_id, queue, type, arg, attempt, last_error, priority,"
            " next_run_at, job_created_at, job_updated_at, moved_at)"
            " select %(id)s, %(queue)s, %(type)s, %(arg)s, 3, %(last_error)s, 0, now(), now(),"
            " now(), clock_timestamp() - make_interval(secs => %(ago)s)",
            row | {"id": id_},
        )


def dead(conn: psycopg.Connection) -> list[str]:
    return [id_ for (id_,) in conn.execute("select job_id from bgjob_dead_job order by id")]


def live(conn: psycopg.Connection) -> list[str]:
    return [id_ for (id_,) in conn.execute("select id from bgjob_job order by id")]


# -- which database ------------------------------------------------------------------------


def test_the_database_is_the_first_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "of-libpq")
    assert database.find(None) == ""
    monkeypatch.setenv("DATABASE_URL", "postgresql://of-database-url/db")
    assert database.find(None) == "postgresql://of-database-url/db"
    monkeypatch.setenv("BGJOB_DSN", "host=of-bgjob-dsn")
    assert database.find(None) == "host=of-bgjob-dsn"
    assert database.find("host=given") == "host=given"
    monkeypatch.setenv("BGJOB_DSN", "")
    assert database.find(None) == "postgresql://of-database-url/db"


@pytest.mark.parametrize("command", READ)
def test_without_a_database_a_command_names_the_places_where_it_looked(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command.split()) == 1
    told = capsys.readouterr().err
    for place in ("--dsn", "BGJOB_DSN", "DATABASE_URL", "PGHOST"):
        assert place in told
    assert told.count("\n") == 1


def test_libpqs_variables_are_enough(run: Run, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BGJOB_DSN")
    for key, value in conninfo_to_dict(dsn).items():
        variable = {"dbname": "PGDATABASE"}.get(key, f"PG{key.upper()}")
        monkeypatch.setenv(variable, str(value))
    assert run("enqueue", "q", "t", "--id", "a") == (0, "a\n", "")


@pytest.mark.parametrize("variable", ["BGJOB_DSN", "DATABASE_URL"])
def test_a_variable_without_a_valid_connection_string_is_named_and_not_shown(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "postgresql://u:s3cret@word@host/db")
    assert cli.main(["stats"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"bgjob: {variable}: this is not a connection string")
    assert "s3cret" not in told


@pytest.mark.parametrize("command", READ)
def test_a_server_that_cannot_be_reached_is_reported_immediately_and_without_the_password(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dsn = "postgresql://somebody:s3cret@127.0.0.1:1/db"
    assert cli.main([*command.split(), "--dsn", dsn]) == 1
    told = capsys.readouterr().err
    assert told.startswith("bgjob: ")
    assert "127.0.0.1" in told
    assert "s3cret" not in told


@pytest.mark.parametrize("command", [*READ, "schema --check", "playground"])
def test_missing_tables_are_reported_with_the_remedy(
    command: str, empty_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--dsn", empty_dsn]) == 1
    assert "migration/init.sql" in capsys.readouterr().err


# -- enqueue -------------------------------------------------------------------------------


def job(conn: psycopg.Connection) -> tuple[Any, ...]:
    [row] = conn.execute(
        "select id, queue, type, arg, priority, round(extract(epoch from next_run_at - created_at))"
        " from bgjob_job"
    ).fetchall()
    return row


def test_the_command_enqueues_a_job(run: Run, conn: psycopg.Connection) -> None:
    status, out, err = run("enqueue", "mail", "confirm", '{"order":  1}')
    id_, *rest = job(conn)
    assert (status, out, err) == (0, f"{id_}\n", "")
    assert rest == ["mail", "confirm", b'{"order":  1}', 0, 0]


def test_the_command_enqueues_with_every_option(run: Run, conn: psycopg.Connection) -> None:
    args = ["--delay", "1.5h", "--priority", "-7", "--exclusive", "user:42", "--id", "a", "--json"]
    status, out, _ = run("enqueue", "q", "t", *args)
    assert (status, json.loads(out)) == (0, {"id": "a"})
    assert job(conn) == ("a", "q", "t", None, -7, 5400)
    assert conn.execute("select exclusive from bgjob_job").fetchall() == [("user:42",)]


@pytest.mark.parametrize(
    ("args", "stdin", "stored"),
    [
        (["-"], b'["from stdin"]\n', b'["from stdin"]\n'),
        (["--raw", "-"], b"\0\xff", b"\0\xff"),
        (["--raw", "FILE"], b"", b"\0\1"),
    ],
)
def test_the_command_reads_the_payload_from_a_file_or_the_standard_input(
    run: Run,
    conn: psycopg.Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    stdin: bytes,
    stored: bytes,
) -> None:
    file = tmp_path / "payload"
    file.write_bytes(b"\0\1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert run("enqueue", "q", "t", *(str(file) if arg == "FILE" else arg for arg in args))[0] == 0
    assert job(conn)[3] == stored


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["{"], "'{' is not JSON"),
        (["{}", "--raw", "x"], "pass JSON or --raw, not both"),
        (["--raw", "/nowhere"], "--raw: "),
        (["--priority", "40000"], "priority must be an integer from -32768 to 32767"),
    ],
)
def test_a_job_with_invalid_options_is_wrong_usage(
    run: Run, conn: psycopg.Connection, args: list[str], told: str
) -> None:
    status, out, err = run("enqueue", "q", "t", *args)
    assert (status, out) == (2, "")
    assert err.startswith(f"bgjob: {told}")
    assert live(conn) == []


def test_an_id_that_is_taken_is_reported(run: Run) -> None:
    assert run("enqueue", "q", "t", "--id", "a")[0] == 0
    status, out, err = run("enqueue", "q", "t", "--id", "a")
    assert (status, out) == (1, "")
    assert "job already exists: 'a'" in err


# -- stats ---------------------------------------------------------------------------------


def test_stats_are_a_table_or_json(run: Run, conn: psycopg.Connection) -> None:
    run("enqueue", "mail", "confirm")
    run("enqueue", "mail", "confirm", "--delay", "1h")
    dead_letter(conn, "a", "b", queue="other", type="x")

    status, out, err = run("stats")
    assert (status, err) == (0, "")
    head, *lines = [line.split() for line in out.splitlines()]
    told = "queue type due delayed running dead oldest due age retries paused until"
    assert " ".join(head) == told
    assert [line[:6] for line in lines] == [
        ["mail", "confirm", "1", "1", "0", "0"],
        ["other", "x", "0", "0", "0", "2"],
    ]

    status, out, _ = run("stats", "--json", "--queue", "mail")
    [row] = json.loads(out)
    assert row.pop("oldest_due_age") >= 0
    counts = {"due": 1, "delayed": 1, "running": 0, "dead": 0, "retries": 0}
    pause = {"paused": False, "paused_until": None}
    assert row == {"queue": "mail", "type": "confirm", **counts, **pause}


def test_stats_show_paused_queues_including_those_without_jobs(run: Run) -> None:
    for queue in ("busy", "timed", "runs"):
        run("enqueue", queue, "t")
    end = "2100-01-01T00:00:00+00:00"
    run("pause", "busy")
    run("pause", "timed", "--until", end)
    run("pause", "idle")

    _, *lines = run("stats")[1].splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["busy", "t"],
        ["runs", "t"],
        ["timed", "t"],
        ["idle", "-"],
    ]
    assert [line.endswith("  it is resumed") for line in lines] == [True, False, False, True]
    assert lines[1].endswith("  -")
    assert lines[2].endswith(f"{datetime.fromisoformat(end).astimezone():%Y-%m-%d %H:%M:%S%z}")

    rows = {row["queue"]: row for row in json.loads(run("stats", "--json")[1])}
    assert {queue: row["paused"] for queue, row in rows.items()} == {
        "busy": True,
        "timed": True,
        "runs": False,
        "idle": True,
    }
    assert rows["busy"]["paused_until"] is None
    assert datetime.fromisoformat(rows["timed"]["paused_until"]) == datetime.fromisoformat(end)
    assert (rows["idle"]["type"], rows["idle"]["due"]) == (None, 0)
    assert rows["idle"].keys() == rows["busy"].keys()
    [row] = json.loads(run("stats", "--json", "--queue", "busy")[1])
    assert row["queue"] == "busy"


# -- dlq -----------------------------------------------------------------------------------


def test_the_command_lists_dead_jobs_the_latest_first(run: Run, conn: psycopg.Connection) -> None:
    dead_letter(conn, "a", last_error="it broke\nat line 1")
    dead_letter(conn, "b", "c", queue="other")
    status, out, err = run("dlq", "list")
    assert (status, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["id", "queue", "type", "attempt", "moved_at", "last_error"]
    assert [line.split()[0] for line in lines] == ["c", "b", "a"]
    assert lines[-1].endswith("it broke...")
    assert len(run("dlq", "list", "--limit", "2")[1].splitlines()) == 1 + 2
    assert [job["id"] for job in json.loads(run("dlq", "list", "--json")[1])] == ["c", "b", "a"]


def test_pages_follow_each_other_and_a_page_shows_how_to_get_the_next(
    run: Run, conn: psycopg.Connection
) -> None:
    dead_letter(conn, *"abcdef")
    dead_letter(conn, "x", queue="other")
    args = ["dlq", "list", "--queue", "q", "--limit", "2"]
    pages: list[list[str]] = []
    more: list[str] = []
    while True:
        status, out, err = run(*args, *more)
        assert status == 0
        pages.append([line.split()[0] for line in out.splitlines()[1:]])
        if not err:  # the last page is full: there are no more
            break
        assert err.startswith("for the next page add: --before ")
        more = err.split()[-2:]
        dead_letter(conn, "later")
    assert pages == [["f", "e"], ["d", "c"], ["b", "a"]]
    # A program finds the number in the last job of a page.
    page = json.loads(run(*args, "--json")[1])
    page = json.loads(run(*args, "--json", "--before", str(page[-1]["number"]))[1])
    assert [job["id"] for job in page] == ["f", "e"]


@pytest.mark.parametrize(
    ("args", "ids"),
    [
        ("--queue other", "b"),
        ("--type u", "c"),
        ("--id a --id c", "ca"),
        ("--older-than 1h", "d"),
        ("--older-than 7200 --queue q", "d"),
        ("--older-than 1w", ""),
        ("--queue other --type u", ""),
    ],
)
def test_the_commands_filters_restrict_list_requeue_and_purge(
    run: Run, conn: psycopg.Connection, args: str, ids: str
) -> None:
    for command in ("purge", "requeue"):
        dead_letter(conn, "a")
        dead_letter(conn, "b", queue="other")
        dead_letter(conn, "c", type="u")
        dead_letter(conn, "d", ago=10_000)
        listed = json.loads(run("dlq", "list", *args.split(), "--json")[1])
        assert [job["id"] for job in listed] == list(ids)
        status, out, _ = run("dlq", command, *args.split())
        counted = "1 dead job" if len(ids) == 1 else f"{len(ids)} dead jobs"
        assert (status, out) == (0, f"{command}d {counted}\n")
        assert sorted(dead(conn)) == sorted(set("abcd") - set(ids))
        conn.execute("delete from bgjob_dead_job")
    assert live(conn) == sorted(ids)


@pytest.mark.parametrize("command", ["requeue", "purge"])
@pytest.mark.parametrize("args", [[], ["--all", "--queue", "q"], ["--all", "--older-than", "0"]])
def test_requeue_and_purge_need_ids_a_filter_or_all(
    run: Run, conn: psycopg.Connection, command: str, args: list[str]
) -> None:
    dead_letter(conn, "a")
    status, out, err = run("dlq", command, *args)
    assert (status, out) == (2, "")
    assert "or --all instead" in err
    assert dead(conn) == ["a"]


def test_a_dead_job_whose_id_lives_stays_dead_and_is_counted(
    run: Run, conn: psycopg.Connection
) -> None:
    dead_letter(conn, "a", "b")
    run("enqueue", "q", "t", "--id", "a")
    assert run("dlq", "requeue", "--all", "--json")[:2] == (
        0,
        '{\n  "requeued": 1,\n  "left": 1\n}\n',
    )
    told = "requeued 0 dead jobs\nleft 1 dead job, whose ids live jobs have\n"
    assert run("dlq", "requeue", "--all") == (0, told, "")
    assert (live(conn), dead(conn)) == (["a", "b"], ["a"])


@pytest.mark.parametrize("command", ["requeue", "purge"])
def test_many_jobs_go_in_batches_and_progress_is_shown(
    run: Run, conn: psycopg.Connection, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dlq, "_BATCH", 3)
    ids = [f"{n:02}" for n in range(10)]
    dead_letter(conn, *ids)
    dead_letter(conn, "00")  # it has died twice
    run("enqueue", "q", "t", "--id", "01")
    status, out, err = run("dlq", command, "--all")
    assert status == 0
    assert err.splitlines() == [f"{n} of 10 ids" for n in (3, 6, 9, 10)]
    if command == "purge":
        assert out == "purged 11 dead jobs\n"
        assert dead(conn) == []
    else:
        assert out == "requeued 9 dead jobs\nleft 1 dead job, whose ids live jobs have\n"
        assert live(conn) == ids
        assert dead(conn) == ["00", "01"]
        [[transactions]] = conn.execute("select count(distinct xmin::text) from bgjob_job")
        assert transactions == 1 + 4


def test_an_interrupted_purge_reports_how_many_it_deleted(
    run: Run, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dlq, "_BATCH", 2)
    dead_letter(conn, *"abcdef")

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "say", interrupt)
    status, out, err = run("dlq", "purge", "--all")
    assert (status, out) == (130, "")
    assert err == "2 dead jobs done before\nbgjob: interrupted\n"
    assert dead(conn) == list("cdef")


def test_the_command_shows_all_of_a_dead_job(run: Run, conn: psycopg.Connection) -> None:
    dead_letter(conn, "a", arg=b'{"n": 1}', last_error="it broke\nat line 1")
    status, out, err = run("dlq", "show", "a")
    assert (status, err) == (0, "")
    shown = dict(line.split(None, 1) for line in out.splitlines() if not line.startswith(" "))
    assert shown["arg"] == '{"n": 1}'
    assert shown["attempt"] == "3"
    assert "it broke\n    at line 1\n" in out
    assert run("dlq", "show", "b") == (1, "", "bgjob: no dead job has the id 'b'\n")


@pytest.mark.parametrize(
    ("arg", "shown", "value"),
    [
        (b'{"n":  18446744073709551616}', None, None),
        (b"\xff\0", repr(b"\xff\0"), {"base64": "/wA="}),
        (b"", repr(b""), {"base64": ""}),
        (None, None, None),
    ],
)
def test_any_payload_can_be_shown(
    run: Run, conn: psycopg.Connection, arg: bytes | None, shown: str | None, value: object
) -> None:
    dead_letter(conn, "a", arg=arg)
    out = run("dlq", "show", "a")[1]
    if arg is None:
        assert "\narg " not in out
    else:
        assert f"\narg           {shown or arg.decode()}\n" in out
    told = run("dlq", "show", "a", "--json")[1]
    if shown is None and arg is not None:
        assert arg.decode() in told  # as it is stored, not as a parser understands it
    else:
        assert json.loads(told)["arg"] == value


def test_control_sequences_of_a_terminal_are_shown_as_escapes(
    run: Run, conn: psycopg.Connection
) -> None:
    dead_letter(
        conn, "\x1b[31mred", last_error="\x1b]0;title\x07[bold]bold[/bold]\r\u202e", arg=b'"\x7f"'
    )
    for out in (run("dlq", "list")[1], run("dlq", "show", "\x1b[31mred")[1]):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", out)
        assert r"\x1b[31mred" in out
        assert r"\x1b]0;title\x07[bold]bold[/bold]" in out


# -- pauses --------------------------------------------------------------------------------


def test_a_queue_is_paused_and_resumed(run: Run, dsn: str) -> None:
    assert run("paused") == (0, "queue  paused until\n", "")
    assert run("pause", "mail") == (0, "paused mail\n", "")
    with Client(dsn) as client:
        assert client.paused() == {"mail": None}
    assert run("paused") == (0, "queue  paused until\nmail   it is resumed\n", "")
    assert json.loads(run("paused", "--json")[1]) == [{"queue": "mail", "until": None}]
    assert run("resume", "mail") == (0, "resumed mail\n", "")
    assert run("resume", "mail") == (0, "mail was not paused\n", "")
    assert json.loads(run("pause", "mail", "--json")[1]) == {"queue": "mail", "until": None}
    for was_paused in (True, False):
        told = json.loads(run("resume", "mail", "--json")[1])
        assert told == {"queue": "mail", "was_paused": was_paused}


@pytest.mark.parametrize("text", ["2100-01-01T00:00Z", "2100-01-01 02:30+02:30"])
def test_a_pause_ends_at_the_time_that_is_given(run: Run, dsn: str, text: str) -> None:
    end = datetime(2100, 1, 1, tzinfo=UTC)
    told = f"paused mail until {end.astimezone():%Y-%m-%d %H:%M:%S%z}\n"
    assert run("pause", "mail", "--until", text) == (0, told, "")
    with Client(dsn) as client:
        assert client.paused() == {"mail": end}
    shown = run("paused")[1].splitlines()[1].split(None, 1)[1]
    assert datetime.fromisoformat(shown) == end  # and so it can be given again
    [row] = json.loads(run("paused", "--json")[1])
    assert datetime.fromisoformat(row["until"]) == end


def test_a_pause_lasts_for_the_given_time_by_the_databases_clock(
    run: Run, conn: psycopg.Connection
) -> None:
    [[before]] = conn.execute("select clock_timestamp()").fetchall()
    told = json.loads(run("pause", "mail", "--for", "1.5h", "--json")[1])
    [[after]] = conn.execute("select clock_timestamp()").fetchall()
    end = datetime.fromisoformat(told["until"])
    assert before <= end - timedelta(hours=1.5) <= after
    assert conn.execute("select until from bgjob_pause").fetchall() == [(end,)]


@pytest.mark.parametrize("args", ["--for 0", "--until 2020-01-01T00:00Z"])
def test_a_pause_that_ends_in_the_past_is_refused_and_ends_no_other(
    run: Run, dsn: str, args: str
) -> None:
    run("pause", "mail")
    status, out, err = run("pause", "mail", *args.split())
    assert (status, out) == (2, "")
    assert err == "bgjob: the pause would end before it begins: choose a later time\n"
    with Client(dsn) as client:
        assert client.paused() == {"mail": None}


def test_a_pause_that_waits_for_a_transaction_is_reported(
    run: Run, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgjob.client.PATIENCE", 0.1)
    with conn.transaction():
        conn.execute("lock table bgjob_job in row exclusive mode")
        conn.execute("select from bgjob_pause")
        status, out, err = run("pause", "mail")
    assert (status, out) == (1, "")
    assert "'mail' is paused, but a transaction" in err


# -- schedules -----------------------------------------------------------------------------


@pytest.fixture
def daily(conn: psycopg.Connection) -> None:
    """Two schedules that a worker has had."""
    request = EnqueueRequest("reports", "report", {"n": 1}, priority=3, exclusive="report")
    Schedules(
        [
            Schedule("daily", every=timedelta(days=1), request=request),
            Schedule("hourly", every=3600, request=EnqueueRequest("q", "t")),
        ]
    ).run(conn)


def schedules(run: Run) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(run("schedules", "list", "--json")[1])}


def test_schedules_are_a_table_or_json(
    run: Run, daily: None, conn: psycopg.Connection, dsn: str
) -> None:
    run("schedules", "pause", "hourly")
    status, out, err = run("schedules", "list")
    assert (status, err) == (0, "")
    head, *lines = out.splitlines()
    names = ["name", "spec", "queue", "type", "paused", "last_run_at", "next_run_at"]
    assert head.split() == names
    daily_line, hourly_line = (re.split("  +", line) for line in lines)
    with Client(dsn) as client:
        at, _ = [status.next_run_at for status in client.schedules.list()]
    assert at
    shown = f"{at.astimezone():%Y-%m-%d %H:%M:%S%z}"
    assert daily_line == ["daily", "every 1 day, 0:00:00", "reports", "report", "no", "-", shown]
    assert hourly_line == ["hourly", "every 1:00:00", "q", "t", "yes", "-", "-"]
    found = schedules(run)
    assert datetime.fromisoformat(found["daily"].pop("next_run_at")) == at
    assert found["daily"] == {
        "name": "daily",
        "spec": "every 1 day, 0:00:00",
        "queue": "reports",
        "type": "report",
        "paused": False,
        "last_run_at": None,
    }
    assert found["hourly"]["paused"] is True


def test_schedules_are_paused_resumed_and_removed_by_name(run: Run, daily: None) -> None:
    def paused() -> dict[str, bool]:
        return {name: schedule["paused"] for name, schedule in schedules(run).items()}

    told = "paused hourly\npaused daily\n"
    assert run("schedules", "pause", "hourly", "daily", "hourly") == (0, told, "")
    assert paused() == {"daily": True, "hourly": True}
    assert run("schedules", "resume", "daily") == (0, "resumed daily\n", "")
    assert paused() == {"daily": False, "hourly": True}
    assert json.loads(run("schedules", "resume", "hourly", "--json")[1]) == {"resumed": ["hourly"]}
    assert paused() == {"daily": False, "hourly": False}
    assert json.loads(run("schedules", "pause", "daily", "--json")[1]) == {"paused": ["daily"]}
    assert run("schedules", "remove", "daily", "daily") == (0, "removed daily\n", "")
    assert paused() == {"hourly": False}
    assert json.loads(run("schedules", "remove", "hourly", "--json")[1]) == {"removed": ["hourly"]}
    assert paused() == {}


def test_a_schedule_is_run_once_also_while_it_is_paused(
    run: Run, daily: None, conn: psycopg.Connection
) -> None:
    run("schedules", "pause", "daily")
    status, out, err = run("schedules", "run", "daily")
    assert (status, err) == (0, "")
    other = json.loads(run("schedules", "run", "daily", "--json")[1])["id"]
    assert live(conn) == sorted([out.strip(), other])
    assert conn.execute(
        "select distinct queue, type, arg, priority, exclusive from bgjob_job"
    ).fetchall() == [("reports", "report", b'{"n":1}', 3, "report")]


@pytest.mark.parametrize("command", ["pause", "resume", "remove", "run"])
def test_an_unknown_schedule_is_an_error_that_lists_the_known_ones(
    run: Run, daily: None, conn: psycopg.Connection, command: str
) -> None:
    conn.execute("update bgjob_schedule set paused = name = 'daily'")
    before = schedules(run)
    names = ["weekly"] if command == "run" else ["daily", "weekly", "hourly", "yearly"]
    status, out, err = run("schedules", command, *names)
    assert (status, out) == (1, "")
    unknown = "'weekly'" if command == "run" else "'weekly', 'yearly'"
    assert err.startswith(
        f"bgjob: there is no schedule {unknown}; there are 'daily', 'hourly'; a worker writes"
    )
    assert (schedules(run), live(conn)) == (before, [])


def test_an_error_lists_a_screenful_of_schedules_or_states_that_there_are_none(
    run: Run, conn: psycopg.Connection
) -> None:
    assert "no schedule 'x'; there are none; " in run("schedules", "run", "x")[2]
    request = EnqueueRequest("q", "t")
    Schedules([Schedule(f"s{n:02}", every=60, request=request) for n in range(23)]).run(conn)
    assert "'s18', 's19' and 3 more; " in run("schedules", "run", "x")[2]


def test_the_name_of_a_schedule_is_printed_with_escapes(run: Run, conn: psycopg.Connection) -> None:
    name = "\x1b[31mred"
    Schedules([Schedule(name, every=60, request=EnqueueRequest("q", "t"))]).run(conn)
    for args in (["list"], ["pause", name], ["run", name], ["run", "x"], ["pause", name + "?"]):
        _, out, err = run("schedules", *args)
        assert r"\x1b[31mred" in out + err
        assert "\x1b" not in out + err


# -- schema --------------------------------------------------------------------------------


def test_the_command_prints_the_schema_without_a_database(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "migration" / "init.sql").read_text("utf-8")
    assert cli.main(["schema", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"version": schema.VERSION, "sql": schema.init_sql()}


def test_the_command_checks_the_databases_schema(run: Run, conn: psycopg.Connection) -> None:
    version = schema.VERSION
    told = f"the tables have schema version {version}, as needed\n"
    assert run("schema", "--check") == (0, told, "")
    assert json.loads(run("schema", "--check", "--json")[1]) == {
        "ok": True,
        "version": version,
        "needed": version,
        "lists_workers": True,
        "error": None,
    }
    conn.execute("comment on table bgjob_job is 'bgjob schema 3, works with 1'")
    told = "the tables have schema version 3, which works with 1\n"
    assert run("schema", "--check") == (0, told, "")
    conn.execute("comment on table bgjob_job is 'bgjob schema 99'")
    status, out, err = run("schema", "--check", "--json")
    found = json.loads(out)
    assert (status, found["ok"], found["version"]) == (1, False, 99)
    assert err == f"bgjob: {found['error']}\n"
    assert "upgrade the bgjob package" in err


# -- output ----------------------------------------------------------------------------------


def command(*args: str, **options: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "error", "-m", "bgjob", *args],
        stderr=subprocess.PIPE,
        **options,
    )


def environment(dsn: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "BGJOB_DSN": dsn, "TERM": "xterm"}


def test_a_reader_that_closes_the_pipe_early_is_not_reported_as_an_error(
    dsn: str, conn: psycopg.Connection
) -> None:
    dead_letter(conn, "a", last_error=100 * "x")
    conn.execute(
        "insert into bgjob_dead_job (job_id, queue, type, attempt, last_error, priority,"
        " next_run_at, job_created_at, job_updated_at) select job_id, queue, type, attempt,"
        " last_error, priority, now(), now(), now()"
        " from bgjob_dead_job, generate_series(1, 3000)"
    )
    args = ["dlq", "list", "--limit", "3000"]
    with command(*args, stdout=subprocess.PIPE, env=environment(dsn)) as process:
        assert process.stdout
        assert process.stdout.read(1) == b"i"
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == 1


def test_a_table_is_drawn_on_a_terminal(dsn: str, conn: psycopg.Connection) -> None:
    dead_letter(conn, "a", last_error="[bold]no markup[/bold]")
    ours, theirs = pty.openpty()
    with command(
        "dlq", "list", stdout=theirs, env=environment(dsn) | {"COLUMNS": "120"}
    ) as process:
        os.close(theirs)
        told = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 4096):
                told += chunk
        assert process.wait(PATIENCE) == 0
    os.close(ours)
    assert "─" in told.decode()
    assert "[bold]no markup[/bold]" in told.decode()


def test_columns_stand_in_line(capsys: pytest.CaptureFixture[str]) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    table.write_table(["name", "count", "at"], [["a", 1234, moment], ["long", None, moment]])
    at = f"{moment.astimezone():%Y-%m-%d %H:%M:%S%z}"
    assert capsys.readouterr().out.splitlines() == [
        "name  count  at",
        f"a     1,234  {at}",
        f"long      -  {at}",
    ]
    table.write_table(["none"], [])
    assert capsys.readouterr().out == "none\n"


# -- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        "",
        "nothing",
        "enqueue q",
        "enqueue q t --delay -1",
        "enqueue q t --delay 1y",
        "enqueue q t --delay 999999w",
        "enqueue q t --priority high",
        "job",
        "job show",
        "job priority high a",
        "job priority 40000 a",
        "job list --state dead",
        "job list --limit 0",
        "dlq",
        "dlq show",
        "dlq list --limit 0",
        "dlq purge --older-than nan",
        "stats --dsn nonsense",
        "dlq list --before 0",
        "enqueue q t --exclusive=",
        "schedules",
        "schedules pause",
        "schedules run a b",
        "pause",
        "pause q --for 1y",
        "pause q --for 1h --until 2100-01-01T00:00Z",
        "pause q --until tomorrow",
        "pause q --until 2100-01-01T00:00",
        "pause q --until 0001-01-01T00:00+14:00",
        "resume",
        "resume q r",
    ],
)
def test_wrong_usage_exits_with_2(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(args.split())
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: bgjob")


@pytest.mark.parametrize(
    "args",
    [
        "",
        "enqueue",
        "stats",
        "top",
        "dlq",
        "dlq list",
        "dlq show",
        "dlq requeue",
        "dlq purge",
        "job",
        "job list",
        "job cancel",
        "job abandon",
        "job now",
        "job priority",
        "schema",
    ]
    + ["health", "metrics", "dashboards"]
    + ["playground", "demo", "worker", "pause", "resume", "paused", "schedules", "schedules list"]
    + [f"schedules {command}" for command in ("pause", "resume", "remove", "run")],
)
def test_help_describes_the_exit_status(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*args.split(), "--help"])
    assert exit.value.code == 0
    told = capsys.readouterr().out
    assert "exit status:\n  0 " in told
    for status in "1", "2", "130":
        assert f"\n  {status}" in told


# -- the playground ----------------------------------------------------------------------------


def play(dsn: str | None, *lines: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "bgjob",
            "playground",
            *(["--dsn", dsn] if dsn else []),
        ],
        input="".join(f"{line}\n" for line in lines),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_examples_in_the_playgrounds_banner_work(dsn: str) -> None:
    banner = play(dsn).stderr
    tries = re.findall(r"^  (\S.*)$", banner, re.MULTILINE)
    assert len(tries) == 3
    wait = "import time; any(time.sleep(0.01) for _ in iter(client.stats, []))"
    played = play(dsn, *tries, wait)
    assert played.returncode == 0
    assert "HELLO" in played.stdout
    assert "Traceback" not in played.stderr


def test_the_playground_has_a_server_of_its_own_and_exit_leaves() -> None:
    played = play(None, "print(client.enqueue(EnqueueRequest('q', 't', id='a')))", "exit()")
    assert played.returncode == 0
    assert "a\n" in played.stdout
    assert "Traceback" not in played.stderr
    assert "a private PostgreSQL" in played.stderr


def test_the_playground_ends_at_the_terminals_end_of_file(dsn: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "bgjob", "playground", "--dsn", dsn],
        env=environment(dsn),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    told, deadline = "", time.monotonic() + PATIENCE

    def until(text: str) -> None:
        nonlocal told
        while text not in told:
            assert time.monotonic() < deadline, told
            told += os.read(ours, 4096).decode(errors="replace")

    until(">>> ")
    os.write(ours, b"6 * 7, worker.run()\n")
    until("(42, None)")
    told = told.partition("(42, None)")[2]
    until(">>> ")
    os.write(ours, b"\x04")
    with contextlib.suppress(OSError):  # the other end is closed
        until("nothing more")
    assert process.wait(PATIENCE) == 0
    os.close(ours)
    assert "Traceback" not in told
