"""Every reason why a job does not run is told, with its remedy: each situation is made for real."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString, cast

import psycopg
import pytest
from support.clients import HOSTILE, Colour, dead_letter
from support.database import row, rows
from support.documents import DOCS, ROOT
from support.nursery import Forked, fork
from support.roles import Roles
from support.waiting import PATIENCE, eventually
from support.workers import Launcher

from bgjob import (
    Client,
    EnqueueRequest,
    Job,
    Mux,
    Reschedule,
    Result,
    Retry,
    Schedule,
    Schedules,
    cli,
)
from bgjob._explanation.reasons import reasons
from bgjob._explanation.seen import Pause, Seen
from bgjob._explanation.steps import explain
from bgjob._sql import looks
from bgjob._sql.tokens import origin
from bgjob.explanation import Explanation, Reason

LONG = 3600.0
"""Seconds that are far from over when a test ends."""


def codes(explanation: Explanation) -> list[str]:
    return [reason.code for reason in explanation.reasons]


def only(explanation: Explanation) -> Reason:
    [reason] = explanation.reasons
    return reason


def of(explanation: Explanation, code: str) -> Reason:
    [reason] = [reason for reason in explanation.reasons if reason.code == code]
    return reason


def follow(remedy: str, dsn: str) -> int:
    """Run the command of a remedy as a person would who copies it; return its exit status."""
    found = re.search(r"bgjob ([^;]*)", remedy)
    assert found is not None, remedy
    return cli.main([*found[1].split(), "--dsn", dsn])


Ask = Callable[..., Explanation]


@pytest.fixture
def ask(plain_client: Client) -> Ask:
    return plain_client.explain


def enqueue(client: Client, *ids: str, queue: str = "q", type: str = "t", **options: Any) -> None:
    client.bulk_enqueue([EnqueueRequest(queue, type, id=id_, **options) for id_ in ids])


# -- workers in processes of their own -----------------------------------------------------

APP = """
import os, time
import bgjob._worker.registry
from bgjob import Client, Mux, Worker

bgjob._worker.registry.EVERY = float(os.environ.get("EVERY", "1"))
mux = Mux()

@mux.handler("t")
def handle(job):
    while not os.path.exists("open"):
        time.sleep(0.01)

if "OTHER" in os.environ:
    mux.register("other", print)

def make(dsn, queues):
    return Worker(
        Client(dsn), queues, mux, lease=float(os.environ.get("LEASE", "30")), poll_interval=0.05,
        registry="UNKNOWN" not in os.environ,
    )
"""

Start = Callable[..., Forked]


@pytest.fixture
def start(dsn: str, tmp_path: Path) -> Iterator[Start]:
    """Run workers of `app:make` on a queue, each in a process of its own."""
    (tmp_path / "app.py").write_text(APP)
    started = []

    def start(*queues: str, **env: str) -> Forked:
        options = [option for queue in queues for option in ("--queue", queue)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": dsn, **env}
        with (tmp_path / "out").open("ab") as output:
            process = fork(
                "bgjob", "worker", "app:make", *options, env=env, output=output, cwd=tmp_path
            )
        assert process.stdin is not None
        process.stdin.close()
        started.append(process)
        return process

    yield start
    for process in started:
        kill(process)


def kill(process: Forked) -> None:
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)


def working(conn: psycopg.Connection, number: int) -> bool:
    found = rows(conn, "select count(*) from bgjob_worker where state = 'working'")
    return bool(found[0][0] == number)


def holds_key(conn: psycopg.Connection) -> bool:
    """Whether a job holds a key; it is claimed a moment earlier."""
    return row(conn, "select count(tokens) from bgjob_exclusive") == (1,)


# -- it runs -------------------------------------------------------------------------------


def test_of_a_running_job_it_tells_since_when_and_which_process_has_it(
    start: Start, ask: Ask, plain_client: Client, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "a")
    other, process = start("r", BGJOB_RELEASE="v6"), start("q", BGJOB_RELEASE="v7")
    assert eventually(lambda: ask("a").state == "running")
    explanation = ask("a")
    reason = only(explanation)
    made = origin(row(conn, "select token from bgjob_job")[0])
    assert made is not None
    number = reason.facts["worker"]
    assert (reason.code, reason.blocks, reason.remedy, explanation.status) == (
        "running",
        False,
        "",
        0,
    )
    assert (reason.facts["pid"], reason.facts["release"]) == (process.pid, "v7")
    assert (reason.facts["since"], number) == (made.at, made.number)
    assert other.pid != process.pid
    since = f"{made.at:%Y-%m-%d %H:%M:%S} UTC"
    assert re.fullmatch(
        rf"It runs since {since} \(\d+\.\d s\), attempt 1, on worker {number} \(\S+, pid "
        rf"{process.pid}, bgjob worker app:make, release v7\); its lease ends in \d+ s and is "
        r"extended while it runs\.",
        reason.text,
    ), reason.text


def test_of_a_running_job_it_tells_that_its_worker_is_not_seen_any_more(
    start: Start, ask: Ask, plain_client: Client
) -> None:
    enqueue(plain_client, "a")
    process = start("q", EVERY="0.1")
    assert eventually(lambda: ask("a").state == "running")
    kill(process)
    assert eventually(lambda: "which has not been seen for" in only(ask("a")).text)
    reason = only(ask("a"))
    assert reason.text.endswith("; unless it is extended, the job is then due again.")
    assert reason.facts["worker_state"] == "lost"


def test_of_a_job_of_do_it_tells_that_no_worker_has_it(client: Any, ask: Ask) -> None:
    def handle(_: Job) -> None:
        found.append(ask("a"))

    found: list[Explanation] = []
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    client.do("q", Mux().register("t", handle))
    reason = only(found[0])
    assert (reason.code, reason.facts["worker"]) == ("running", None)
    assert "on a worker without a row in bgjob_worker, or in a client's do();" in reason.text
    assert isinstance(reason.facts["since"], datetime)


def test_a_token_that_was_made_at_random_tells_neither_a_time_nor_a_worker(
    ask: Ask, plain_client: Client, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "a")
    claim: LiteralString = "update bgjob_job set token = %s, lease_until = now() + interval '1 h'"
    for token in ((1 << 40) | 77, (1 << 62) | 77, -5, None):
        conn.execute(claim, [token])
        text = only(ask("a")).text
        assert text.startswith("It runs, attempt 0, on a worker that is not in bgjob_worker;")


# -- its worker died -----------------------------------------------------------------------


def test_a_lease_that_has_ended_and_a_suspect_are_told_until_another_worker_runs_it(
    start: Start, ask: Ask, plain_client: Client, tmp_path: Path, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "a")
    for death in (1, 2):
        process = start("q", LEASE="1", EVERY="0.1")
        assert eventually(lambda: ask("a").state == "running")
        number = only(ask("a")).facts["worker"]
        kill(process)
        assert eventually(lambda: codes(ask("a"))[0] == "lease_ended")
        explanation = ask("a")
        reason = explanation.reasons[0]
        assert explanation.state == "due"
        assert f"by worker {number} (" in reason.text
        assert f", for attempt {death}; its lease ended " in reason.text
        assert not reason.blocks
        assert eventually(lambda: of(ask("a"), "no_worker").blocks)
        assert explanation.status == 3
    # A worker frees it, and because of the pause runs it not.
    plain_client.pause("q")
    process = start("q", LEASE="1")
    assert eventually(lambda: "suspect" in codes(ask("a")))
    assert codes(ask("a")) == ["paused", "suspect"]
    reason = of(ask("a"), "suspect")
    assert reason.text.startswith("2 workers in a row died while they held it")
    assert conn.execute(cast(Any, reason.remedy.partition(": ")[2])).fetchall() != []
    plain_client.resume("q")
    assert eventually(lambda: ask("a").state == "running")
    (tmp_path / "open").touch()
    assert eventually(lambda: ask("a").state == "absent")


# -- its time ------------------------------------------------------------------------------


def test_a_job_that_is_not_due_is_told_its_time(client: Any, launcher: Launcher) -> None:
    launcher.start(Mux().register("t", print))
    client.enqueue(EnqueueRequest("q", "t", id="a", delay=LONG))
    explanation = client.explain("a")
    reason = only(explanation)
    assert (explanation.state, explanation.status, reason.code) == ("delayed", 0, "not_due")
    assert re.fullmatch(r"It is due in 59 min 5\d s, at [-\d]+ [:\d]+ UTC\.", reason.text)
    assert isinstance(reason.facts["next_run_at"], datetime)


def test_a_job_whose_attempt_failed_is_told_the_error_and_its_time(client: Any) -> None:
    answers: list[Result] = [Retry(LONG, ValueError("no such user\nline 2")), Reschedule(LONG)]
    for id_ in ("retried", "rescheduled"):
        client.enqueue(EnqueueRequest("q", "t", id=id_))
        client.do("q", Mux().register("t", lambda _: answers.pop(0)))
    reason = client.explain("retried").reasons[0]
    assert (reason.code, reason.blocks) == ("retry", False)
    assert reason.text.startswith("Attempt 1 ended with: ValueError: no such user. It is due in 59")
    assert reason.text.endswith(" UTC, for attempt 2.")
    assert client.explain("rescheduled").reasons[0].code == "not_due"


def test_infinite_times_are_told_as_such(
    ask: Ask, plain_client: Client, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "a", "-a'b")
    conn.execute("update bgjob_job set next_run_at = 'infinity'")
    explanation = ask("-a'b")
    assert codes(explanation) == ["not_due", "no_worker"]
    assert explanation.reasons[0].text == "It is never due: its time is infinite."
    assert explanation.reasons[0].blocks
    conn.execute(cast(Any, explanation.reasons[0].remedy.partition(": ")[2]))
    assert ask("-a'b").state == "due"
    conn.execute("update bgjob_job set next_run_at = '-infinity', exclusive = 'k', waits = true")
    assert codes(ask("a")) == ["key_free", "no_worker"]
    conn.execute("update bgjob_job set token = 1, lease_until = 'infinity'")
    assert ask("a").state == "running"
    conn.execute("update bgjob_job set lease_until = '-infinity'")
    assert codes(ask("a")) == ["lease_ended", "key_free", "no_worker"]
    conn.execute("update bgjob_job set waits = false where id = 'a'")
    conn.execute(
        "insert into bgjob_exclusive select 'k', '{1}', 'q', t, '', t, '~' "
        "from (values ('-infinity'::timestamptz)) as one (t)"
    )
    assert codes(ask("-a'b")) == ["lease_ended", "key_held", "no_worker"]
    conn.execute("insert into bgjob_pause (queue, until) values ('q', '-infinity')")
    conn.execute(
        "insert into bgjob_worker (host, pid, program, version, queues, slots, types, lease, every,"
        " seen_at, started_at) select 'h', 1, 'p', '1', '{q}', '{1}', '{t}', 1, 1, s, s "
        "from unnest('{infinity,-infinity}'::timestamptz[]) s"
    )
    assert "paused" not in codes(ask("a"))
    assert "no_worker" not in codes(ask("a"))
    conn.execute("update bgjob_pause set until = '9999-12-31 23:00+00'")
    assert of(ask("a"), "paused").text.startswith("Queue 'q' is paused until 9999-12-3")
    conn.execute("delete from bgjob_job")
    dead_letter(plain_client, EnqueueRequest("other", "t", id="dead"))
    for moved_at in ("infinity", "-infinity"):
        conn.execute("update bgjob_dead_job set moved_at = %s", [moved_at])
        assert ask("dead").state == "dead"
        assert json.loads(json.dumps(ask("dead").as_json(), default=str))


# -- its queue -----------------------------------------------------------------------------


def test_a_pause_blocks_if_it_has_no_end(
    client: Any, launcher: Launcher, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.start(Mux().register("t", print))
    client.pause("q", datetime.now(UTC) + timedelta(hours=2))
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    explanation = client.explain("a")
    reason = only(explanation)
    assert (reason.code, reason.blocks, explanation.status) == ("paused", False, 0)
    assert re.fullmatch(
        r"Queue 'q' is paused until [-\d]+ [:\d]+ UTC, for another 1 h 59 min\.", reason.text
    )
    client.pause("q")
    explanation = client.explain("a")
    reason = only(explanation)
    assert (reason.code, reason.blocks, explanation.status) == ("paused", True, 3)
    assert reason.text == "Queue 'q' is paused until it is resumed."
    assert follow(reason.remedy, dsn) == 0
    assert eventually(lambda: client.explain("a").state == "absent")


def test_the_due_jobs_before_it_are_counted_by_their_reason(client: Any) -> None:
    def bulk(number: int, *, queue: str = "q", **options: Any) -> None:
        client.bulk_enqueue([EnqueueRequest(queue, "t", **options) for _ in range(number)])

    bulk(3)
    bulk(2, priority=-1)
    bulk(4, priority=-2, delay=LONG)
    bulk(5, priority=1)
    bulk(6, queue="other", priority=-3)
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    bulk(7)
    reason = of(client.explain("a"), "behind")
    assert reason.text == (
        "5 due jobs of queue 'q' come first: 2 of a lower priority number than 0, 3 that were due "
        "earlier."
    )
    assert (reason.facts["lower"], reason.facts["earlier"]) == (2, 3)
    assert reason.facts["is_exact"]
    assert not reason.blocks
    client.enqueue(EnqueueRequest("r", "t", priority=-1))
    client.enqueue(EnqueueRequest("r", "t", id="b"))
    assert of(client.explain("b"), "behind").text == (
        "1 due job of queue 'r' comes first: 1 of a lower priority number than 0."
    )
    client.enqueue(EnqueueRequest("r", "t", id="first", priority=-2))
    assert "behind" not in codes(client.explain("first"))


def test_running_jobs_and_suspects_do_not_come_before_it(
    ask: Ask, plain_client: Client, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "runs", "suspect", "a", priority=-1)
    enqueue(plain_client, "b")
    conn.execute("update bgjob_job set token = 1, lease_until = now() + '1 h' where id = 'runs'")
    conn.execute("update bgjob_job set deaths = 2 where id = 'suspect'")
    assert of(ask("b"), "behind").facts["lower"] == 1
    assert "behind" not in codes(ask("a"))
    assert codes(ask("suspect")) == ["suspect", "no_worker"]


def test_over_ten_thousand_jobs_before_it_are_ten_thousand_or_more(
    ask: Ask, plain_client: Client, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, priority) "
        "select n, 'q', 't', -1 - n %% 2 from generate_series(1, %s::int) n",
        [looks.CAP + 1],
    )
    enqueue(plain_client, "a")
    reason = of(ask("a"), "behind")
    assert reason.text == (
        "10,000 or more due jobs of queue 'q' come first: 10,000 or more of a lower priority "
        "number than 0."
    )
    assert not reason.facts["is_exact"]


# -- its exclusive key ---------------------------------------------------------------------


def test_a_held_key_is_told_with_its_holder_in_another_process(
    start: Start,
    ask: Ask,
    plain_client: Client,
    conn: psycopg.Connection,
    tmp_path: Path,
    dsn: str,
) -> None:
    holding = start("r")
    enqueue(plain_client, "holder", queue="r", exclusive="user:286")
    assert eventually(lambda: holds_key(conn))
    enqueue(plain_client, "before", "a", exclusive="user:286")
    # Before any worker has claimed it, it is known that it needs the key.
    reason = ask("a").reasons[0]
    assert reason.code == "key_held"
    assert reason.text.startswith("It needs the exclusive key 'user:286', which job 'holder'")
    waiting = start("q")
    assert eventually(lambda: "waits for" in ask("a").reasons[0].text)
    explanation = ask("a")
    reason = explanation.reasons[0]
    number = only(ask("holder")).facts["worker"]
    assert holding.pid != waiting.pid
    assert re.fullmatch(
        r"It waits for the exclusive key 'user:286', which job 'holder' \(queue 'r', type 't'\) "
        rf"holds since [-\d]+ [:\d]+ UTC \(\S+ s\) on worker {number} \(\S+, pid {holding.pid}, "
        r"bgjob worker app:make\); its lease ends in \S+ s; 1 of its queue come before it\.",
        reason.text,
    ), reason.text
    assert (reason.facts["holder"], reason.facts["worker"]) == ("holder", number)
    assert (explanation.state, explanation.status) == ("due", 0)
    assert follow(reason.remedy, dsn) == 0
    assert [r.code for r in ask("before").reasons] == ["key_held"]
    assert "come before it" not in ask("before").reasons[0].text
    (tmp_path / "open").touch()
    assert eventually(lambda: ask("a").state == "absent")


def test_a_key_whose_holder_died_is_told_and_then_free(
    start: Start, ask: Ask, plain_client: Client, conn: psycopg.Connection, tmp_path: Path
) -> None:
    holding = start("r", LEASE="1")
    enqueue(plain_client, "holder", queue="r", exclusive="k")
    assert eventually(lambda: holds_key(conn))
    waiting = start("q")
    enqueue(plain_client, "a", exclusive="k")
    assert eventually(lambda: row(conn, "select waits from bgjob_job where id = 'a'") == (True,))
    kill(waiting)
    kill(holding)
    assert eventually(lambda: "its lease ended" in of(ask("a"), "key_held").text)
    conn.execute("delete from bgjob_job where id = 'holder'")
    reason = of(ask("a"), "key_free")
    assert reason.text == (
        "It waits for the exclusive key 'k', which nobody holds: the next full look of a worker of "
        "its queue finds that."
    )
    assert not reason.blocks
    (tmp_path / "open").touch()
    start("q")
    assert eventually(lambda: ask("a").state == "absent")


# -- its workers ---------------------------------------------------------------------------


def test_a_queue_without_a_worker_is_told_with_the_last_one(
    start: Start, ask: Ask, plain_client: Client, tmp_path: Path, conn: psycopg.Connection
) -> None:
    enqueue(plain_client, "a", queue="q 1")
    reason = only(ask("a"))
    assert (reason.code, reason.blocks, ask("a").status) == ("no_worker", True, 3)
    assert reason.text == "No worker claims from queue 'q 1', and none of the last day did."
    assert reason.remedy == "start a worker: bgjob worker MODULE:NAME --queue 'q 1'"
    enqueue(plain_client, "runs")
    first, second = start("q"), start("r", EVERY="0.1")
    assert eventually(lambda: ask("runs").state == "running" and working(conn, 2))
    enqueue(plain_client, "b")
    os.kill(first.pid, signal.SIGTERM)
    assert eventually(lambda: "no_worker" in codes(ask("b")))
    assert f"pid {first.pid}), shuts down." in of(ask("b"), "no_worker").text
    (tmp_path / "open").touch()
    first.wait(PATIENCE)
    assert re.search(
        rf"worker \d+ \(\S+, pid {first.pid}\), ended \S+ s ago\.", only_text(ask, "b")
    )
    kill(second)  # before it could run the job
    enqueue(plain_client, "c", queue="r")
    assert eventually(lambda: f"pid {second.pid}), has not been seen for" in only_text(ask, "c"))


def only_text(ask: Ask, id_: str) -> str:
    found = [reason.text for reason in ask(id_).reasons if reason.code == "no_worker"]
    return found[0] if found else ""


def test_a_worker_that_has_no_row_makes_it_uncertain(
    start: Start, ask: Ask, plain_client: Client
) -> None:
    plain_client.pause("q")
    enqueue(plain_client, "a")
    start("q", UNKNOWN="1")
    assert eventually(lambda: "but 1 session of workers is" in of(ask("a"), "no_worker").text)
    reason = of(ask("a"), "no_worker")
    assert not reason.blocks
    assert "as far as bgjob_worker has them" in reason.text


def test_busy_workers_are_counted_with_their_slots(
    start: Start, ask: Ask, plain_client: Client, tmp_path: Path
) -> None:
    enqueue(plain_client, *"abc")
    start("q=1")
    start("q=2")
    start("r=5")
    assert eventually(lambda: [ask(id_).state for id_ in "abc"] == ["running"] * 3)
    enqueue(plain_client, "d")
    assert eventually(lambda: codes(ask("d")) == ["busy"])
    reason = only(ask("d"))
    assert reason.text == "2 workers are on queue 'q'; 3 of their 3 slots are busy."
    assert reason.facts == {"workers": 2, "slots": 3, "busy": 3}
    assert (reason.blocks, ask("d").status) == (False, 0)
    enqueue(plain_client, "later", delay=LONG)
    assert codes(ask("later")) == ["not_due"]
    (tmp_path / "open").touch()
    assert eventually(lambda: ask("d").state == "absent")


def test_workers_without_a_handler_are_told_with_their_releases(
    start: Start, ask: Ask, plain_client: Client, conn: psycopg.Connection, dsn: str
) -> None:
    plain_client.pause("q")
    enqueue(plain_client, "a", type="other")
    start("q", BGJOB_RELEASE="2026.10")
    start("q", BGJOB_RELEASE="2026.09")
    start("r")
    assert eventually(lambda: working(conn, 3))
    explanation = ask("a")
    assert codes(explanation) == ["paused", "no_handler"]
    reason = explanation.reasons[1]
    assert reason.blocks
    assert sorted(cast(list[str], reason.facts["releases"])) == ["2026.09", "2026.10"]
    assert re.fullmatch(
        r"None of the 2 workers on queue 'q' \(releases 2026\.\d+, 2026\.\d+\) has a handler for "
        r"type 'other': whichever claims it moves it to the dead-letter table\.",
        reason.text,
    )
    assert follow(reason.remedy, dsn) == 0
    start("q", BGJOB_RELEASE="2026.11", OTHER="1")
    assert eventually(lambda: working(conn, 4))
    reason = of(ask("a"), "no_handler")
    assert not reason.blocks
    assert reason.text.startswith("2 of the 3 workers on queue 'q' (releases 2026.")
    assert reason.text.endswith(
        "have no handler for type 'other': whichever claims it first decides whether it runs; such a "
        "worker moves it to the dead-letter table."
    )
    assert follow(reason.remedy, dsn) == 0


def test_what_nothing_keeps_from_running_is_ready(
    start: Start, ask: Ask, plain_client: Client, conn: psycopg.Connection
) -> None:
    # Frozen for a moment, so that none takes it before it is asked about.
    frozen = [start("q=3", EVERY="10"), start("q=1", EVERY="10")]
    assert eventually(lambda: working(conn, 2))
    assert all(process.stop() for process in frozen)
    enqueue(plain_client, "a")
    explanation = ask("a")
    reason = only(explanation)
    assert (explanation.state, explanation.status, reason.code) == ("due", 0, "ready")
    assert reason.text == (
        "Nothing is in its way: a worker with a free slot takes it within its poll interval. "
        "2 workers are on its queue, with 4 of 4 slots free."
    )


# -- no live job ---------------------------------------------------------------------------


def test_a_dead_job_is_told_its_error_and_can_be_requeued(client: Any, dsn: str) -> None:
    for n in (1, 2):
        dead_letter(client, EnqueueRequest("q", "t", id="a"), error=f"error {n}\nmore")
    explanation = client.explain("a")
    reason = only(explanation)
    assert (explanation.state, explanation.queue, explanation.status) == ("dead", "q", 3)
    assert (reason.code, reason.blocks) == ("dead", True)
    assert re.fullmatch(
        r"It has been dead since [-\d]+ [:\d]+ UTC \(\S+ s\), after attempt 1: error 2; jobs with this "
        r"id died twice\.",
        reason.text,
    ), reason.text
    assert reason.facts["last_error"] == "error 2\nmore"
    assert follow(reason.remedy, dsn) == 0
    assert client.explain("a").state == "due"


def test_a_cancelled_job_says_who_cancelled_it_and_why(
    client: Any, plain_client: Client, dsn: str
) -> None:
    plain_client.enqueue(EnqueueRequest("q", "t", id="a"))
    plain_client.jobs.cancel("a", by="ann", reason="a wrong customer")
    explanation = client.explain("a")
    reason = only(explanation)
    assert (explanation.state, reason.code) == ("dead", "dead")
    assert re.fullmatch(
        r"It was cancelled by ann: a wrong customer \(at [-\d]+ [:\d]+ UTC, \S+ s ago, before its "
        r"first attempt\)\.",
        reason.text,
    ), reason.text
    assert reason.facts["ended_by_hand"] == "cancelled"
    assert follow(reason.remedy, dsn) == 0
    assert client.explain("a").state == "due"


def test_a_completed_job_is_absent_with_the_time_of_its_id(client: Any) -> None:
    id_ = client.enqueue(EnqueueRequest("q", "t"))
    client.do("q", Mux().register("t", lambda _: None))
    explanation = client.explain(id_)
    assert (explanation.state, explanation.queue, explanation.status) == ("absent", None, 4)
    reason = only(explanation)
    assert re.fullmatch(
        r"No job with this id waits, runs or is dead\. The id was made at [-\d]+ [:\d]+ UTC\. "
        r"Completed jobs are deleted: it was completed, or purged, or its transaction never "
        r"committed\.",
        reason.text,
    )
    made = cast(datetime, reason.facts["made_at"])
    assert abs(made - explanation.now) < timedelta(minutes=5)
    for other in ("order-1", "ffffffff-ffff-7fff-bfff-ffffffffffff", str(psycopg)):
        reason = only(client.explain(other))
        assert reason.facts["made_at"] is None
        assert "The id was made" not in reason.text


def test_a_transaction_that_may_have_written_an_absent_job_is_named_and_can_be_ended(
    ask: Ask, plain_client: Client, dsn: str, conn: psycopg.Connection
) -> None:
    def told() -> str:
        return only(ask("a")).text

    with closing(psycopg.connect(dsn, application_name="shop")) as writer:
        plain_client.enqueue(EnqueueRequest("q", "t", id="a"), conn=writer)
        assert eventually(lambda: "A transaction that is still open" in told())
        assert re.search(
            rf"may have written it: session {writer.info.backend_pid} \(\S+, shop, idle in "
            r"transaction\), for \S+ s\. .* has not committed\.$",
            told(),
        ), told()
        conn.execute(cast(Any, only(ask("a")).remedy.partition("to end it: ")[2]))
        assert eventually(lambda: "never committed" in told())
    with closing(psycopg.connect(dsn)) as writer:
        writer.tpc_begin(writer.xid(1, f"of {conn.info.dbname}", ""))
        plain_client.enqueue(EnqueueRequest("q", "t", id="a"), conn=writer)
        writer.tpc_prepare()
    assert eventually(lambda: "may have written it: prepared transaction '" in told())
    conn.execute(cast(Any, only(ask("a")).remedy.partition("to end it: ")[2]))
    assert "never committed" in told()


def test_a_job_of_a_schedule_has_the_line_of_its_schedule(
    ask: Ask, conn: psycopg.Connection, dsn: str
) -> None:
    Schedules([Schedule("my report", every=60, request=EnqueueRequest("q", "t"))]).run(conn)
    explanation = ask("schedule:my report:2026-11-29T03:00:00Z")
    assert codes(explanation) == ["absent", "schedule"]
    reason = explanation.reasons[1]
    assert reason.text.startswith(
        "It is a job of schedule 'my report' (every 0:01:00), whose next tick is at "
    )
    with Client(dsn) as client:
        id_ = client.schedules.run("my report")
        client.schedules.pause("my report")
    assert id_
    explanation = ask("schedule:my report:x")
    reason = explanation.reasons[1]
    assert ", which is paused" in reason.text
    assert reason.remedy == "bgjob schedules resume 'my report'"
    conn.execute("insert into bgjob_job (id, queue, type) values ('schedule:none:x', 'q', 't')")
    explanation = ask("schedule:none:x")
    assert codes(explanation)[-2:] == ["no_worker", "schedule"]
    assert explanation.reasons[-1].text == (
        "Its id is that of a job of schedule 'none', which does not exist any more."
    )
    for id_ in ("schedule:", "schedule:none", "schedule::x", "schedule:none:"):
        assert codes(ask(id_)) == ["absent"]


# -- what cannot be seen -------------------------------------------------------------------


def test_without_the_registry_the_other_reasons_are_told(
    client: Any, conn: psycopg.Connection
) -> None:
    client.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in ("runs", "first", "a")])
    conn.execute("drop table bgjob_worker")
    conn.execute(
        "update bgjob_job set token = (400000000000::bigint << 21) | 7, "
        "lease_until = now() + interval '1 h' where id = 'runs'"
    )
    explanation = client.explain("runs")
    assert codes(explanation) == ["running", "unread"]
    explanation = client.explain("a")
    assert codes(explanation) == ["behind", "unread"]
    reason = explanation.reasons[1]
    assert reason.text == 'Not looked at: the workers: relation "bgjob_worker" does not exist.'
    assert "migration/init.sql" in reason.remedy
    assert explanation.status == 0


def test_a_locked_table_is_a_reason_and_the_others_are_told(client: Any, dsn: str) -> None:
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    with psycopg.connect(dsn) as locking:
        locking.execute("lock table bgjob_pause in access exclusive mode")
        explanation = client.explain("a")
    assert codes(explanation) == ["no_worker", "unread"]
    assert explanation.reasons[1].text.startswith("Not looked at: pauses: canceling statement")
    assert explanation.reasons[1].remedy == "who has the table: bgjob doctor --check locks"


def test_a_lost_connection_is_an_error_and_no_reason() -> None:
    steps = explain("a")
    next(steps)
    steps.send(looks.Found(datetime.now(UTC), None, []))
    with pytest.raises(psycopg.OperationalError, match="gone"):
        steps.throw(psycopg.OperationalError("gone"))


def test_an_operator_gets_every_reason_with_only_its_role(
    roles: Roles, conn: psycopg.Connection, plain_client: Client, dsn: str, start: Start
) -> None:
    start("r")
    enqueue(plain_client, "holder", queue="r", exclusive="k")
    enqueue(plain_client, "first", "a", exclusive="k")
    with Client(roles.login("operator")) as operator:
        assert eventually(lambda: holds_key(conn))
        assert codes(operator.explain("holder")) == ["running"]
        plain_client.pause("q")
        assert codes(operator.explain("a")) == ["paused", "key_held", "behind", "no_worker"]
        assert operator.explain(queue="q").id == "first"
        assert codes(operator.explain("schedule:x:y")) == ["absent", "schedule"]
        with closing(psycopg.connect(dsn, application_name="shop")) as writer:
            plain_client.enqueue(EnqueueRequest("q", "t", id="b"), conn=writer)
            # When the transaction began is hidden from this role, and who has it is not.
            reason = only(operator.explain("b"))
            session = f"session {writer.info.backend_pid} (postgres, shop)"
            assert f"may have written it: {session}" in reason.text
        dead_letter(plain_client, EnqueueRequest("dead", "t", id="dead"))
        assert codes(operator.explain("dead")) == ["dead"]
        conn.execute("alter table bgjob_job enable row level security")
        reason = operator.explain("a").reasons[-1]
        assert (reason.code, reason.facts["tables"]) == ("unread", ["bgjob_job"])
        assert reason.text.startswith("Row-level security hides rows of table bgjob_job from role")


@pytest.mark.parametrize("role", ["producer", "worker", "scheduler", "nobody"])
def test_a_role_that_may_not_read_jobs_is_refused(roles: Roles, role: str) -> None:
    groups = {role} - {"nobody"}
    with (
        Client(roles.login(*groups)) as client,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        client.explain("a")


def test_what_a_role_may_not_read_besides_jobs_is_told(
    roles: Roles, conn: psycopg.Connection, plain_client: Client
) -> None:
    enqueue(plain_client, "a", exclusive="k")
    for table in ("bgjob_pause", "bgjob_exclusive", "bgjob_worker", "bgjob_schedule"):
        statement = f"revoke select on {table} from {roles.name('operator')}"
        conn.execute(cast(Any, statement))
    with Client(roles.login("operator")) as operator:
        explanation = operator.explain("a")
        assert codes(explanation) == ["unread"] * 3
        assert [reason.facts["what"] for reason in explanation.reasons] == [
            "pauses",
            "its exclusive key",
            "the workers",
        ]
        for reason in explanation.reasons:
            assert "permission denied" in reason.text
            assert "bgjob_operator" in reason.remedy
        assert codes(operator.explain("schedule:x:y")) == ["absent", "unread"]


# -- the first due job of a queue ----------------------------------------------------------


def test_of_a_queue_the_job_is_explained_that_has_been_due_for_longest(
    client: Any, conn: psycopg.Connection
) -> None:
    assert only(client.explain(queue="q")).text == "No job of queue 'q' is due, or waits for a key."
    client.enqueue(EnqueueRequest("q", "t", id="later", delay=LONG))
    explanation = client.explain(queue="q")
    assert (explanation.id, explanation.queue, explanation.state) == (None, "q", "empty")
    assert explanation.status == 0
    assert only(explanation).text.endswith("; the next one is due in 59 min 59 s.")
    client.enqueue(EnqueueRequest("q", "t", id="oldest", priority=5))
    client.enqueue(EnqueueRequest("q", "t", id="next"))
    client.enqueue(EnqueueRequest("other", "t", id="other", priority=-1))
    explanation = client.explain(queue="q")
    assert explanation.id == "oldest"
    assert codes(explanation) == ["behind", "no_worker"]
    conn.execute(
        "update bgjob_job set exclusive = 'k', waits = true, next_run_at = now() - interval '1 h' "
        "where id = 'next'"
    )
    conn.execute("insert into bgjob_exclusive (key) values ('k')")
    assert client.explain(queue="q").id == "next"
    conn.execute("update bgjob_job set token = 1, lease_until = now() + '1 h', waits = false")
    assert client.explain(queue="q").state == "empty"


def test_a_queue_whose_jobs_go_through_is_told_so(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.enqueue(EnqueueRequest("q", "t", id="a"))

    def find(_: str) -> Any:
        return real("gone")

    real = looks.find
    monkeypatch.setattr(looks, "find", find)
    explanation = client.explain(queue="q")
    assert (explanation.id, explanation.state, explanation.status) == (None, "empty", 0)
    assert only(explanation).text.startswith("The jobs of queue 'q' go through: 3 that were due")


# -- arguments, and what it leaves ---------------------------------------------------------


def test_an_id_or_a_queue_is_needed_and_not_both(client: Any) -> None:
    for given in ({}, {"id": "a", "queue": "q"}):
        with pytest.raises(TypeError, match="give the id of a job, or a queue"):
            client.explain(**given)
    for name in ("id", "queue"):
        for value in ("", "x" * 256, "a\0b", "\udc80"):
            with pytest.raises(ValueError, match=name):
                client.explain(**{name: value})
        with pytest.raises(TypeError, match=f"{name} must be a str"):
            client.explain(**{name: 7})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_found_and_their_remedies_work(
    name: str, client: Any, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    queue, key = name[:200], f"key {name}"[:100]
    client.bulk_enqueue(
        [EnqueueRequest(queue, name, id=f"{name}{n}"[-255:], exclusive=key) for n in (1, 2)]
    )
    id_ = f"{name}2"[-255:]
    explanation = client.explain(id_)
    assert (explanation.id, explanation.queue) == (id_, queue)
    assert codes(explanation) == ["behind", "no_worker"]
    assert client.explain(queue=queue).id == f"{name}1"[-255:]
    assert cli.main(["explain", "--dsn", dsn, "--", id_]) == 3
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 5
    assert all(character.isprintable() for line in told.splitlines() for character in line)


def test_it_leaves_no_setting_no_transaction_and_no_lock_behind(colour: Colour) -> None:
    pool = colour.pool(autocommit=False)
    client = colour.client(pool)

    def read() -> dict[str, str]:
        conn = pool.getconn()
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert not conn.autocommit
        answer = conn.execute("select name, setting from pg_settings")
        found = (colour.run(answer) if colour.is_async else answer).fetchall()
        found = dict(colour.run(found) if colour.is_async else found)
        ended = conn.rollback()
        if colour.is_async:
            colour.run(ended)
        pool.putconn(conn)
        return found

    before = read()
    client.enqueue(EnqueueRequest("q", "t", id="a", exclusive="k"))
    client.explain("a")
    client.explain(queue="q")
    client.explain("none")
    assert read() == before


def test_an_explanation_waits_for_no_row_and_locks_none(client: Any, dsn: str) -> None:
    client.enqueue(EnqueueRequest("q", "t", id="a", exclusive="k"))
    with psycopg.connect(dsn) as locking:
        locking.execute("insert into bgjob_exclusive (key) values ('k')")
        locking.execute("select from bgjob_job for update").fetchall()
        assert codes(client.explain("a")) == ["no_worker"]


def test_a_reason_that_blocks_needs_a_remedy() -> None:
    Reason("ready", False, "fine")
    with pytest.raises(ValueError, match="remedy of paused is required"):
        Reason("paused", True, "not fine")


# -- rules without a database --------------------------------------------------------------

NOW = datetime(2026, 11, 29, 3, tzinfo=UTC)

LIVE = looks.Live(
    id="a",
    queue="-q",
    type="t",
    priority=0,
    attempt=0,
    deaths=0,
    exclusive=None,
    waits=False,
    next_run_at=NOW,
    due_in=-1.0,
    is_never_due=False,
    token=None,
    lease_until=None,
    lease_left=None,
    last_error=None,
    created_at=NOW,
    expires=None,
    expires_in=None,
    is_replaced=False,
    saved=None,
    group=None,
    waits_for_group=False,
    slots=None,
)


def reason_of(code: str, job: looks.Live = LIVE, **facts: Any) -> Reason:
    [reason] = [r for r in reasons(Seen(id="a", now=NOW, job=job, **facts)) if r.code == code]
    return reason


def test_an_argument_that_begins_with_a_dash_is_kept_from_being_an_option() -> None:
    assert reason_of("paused", pause=Pause(None)).remedy == "bgjob resume -- -q"
    dead = looks.Dead(1, "q", "t", 1, None, NOW, 1.0, "4f1c9a0e2b77")
    [reason] = reasons(Seen(id="-a", now=NOW, dead=(dead,)))
    assert reason.remedy == (
        "bgjob dlq requeue --id=-a; it and all that died in the same way: bgjob triage 4f1c9a0e2b77"
    )
    assert reason.text == "It has been dead since 2026-11-29 03:00:00 UTC (1.0 s), after attempt 1."


def test_a_long_error_is_cut_and_an_empty_one_is_named() -> None:
    late = LIVE._replace(due_in=5.0, attempt=2)
    text = reason_of("retry", late._replace(last_error="\n  x" + "y" * 400)).text
    assert text.startswith("Attempt 2 ended with: xyyy")
    assert "y…. It is due in 5.0 s" in text
    assert "ended with: no error." in reason_of("retry", late._replace(last_error="\n\n")).text


def test_an_only_worker_without_a_handler_is_told_as_one() -> None:
    worker = looks.QueueWorker(1, "h", 1, "7", "working", 0.1, 1, 0, has_handler=False)
    assert reason_of("no_handler", workers=looks.QueueWorkers(1, [worker])).text.startswith(
        "The only worker on queue '-q' (release 7) has no handler for type 't': whichever claims it"
    )


def test_until_when_workers_put_a_job_of_an_unknown_type_back_is_told() -> None:
    buries = looks.QueueWorker(1, "h", 1, "7", "working", 0.1, 1, 0, has_handler=False)
    backs, knows = buries._replace(unknown_for=3600.0), buries._replace(has_handler=True)
    old = LIVE._replace(created_at=NOW - timedelta(minutes=18))

    def told(job: looks.Live, *workers: looks.QueueWorker) -> Reason:
        return reason_of("no_handler", job, workers=looks.QueueWorkers(1, [*workers]))

    reason = told(old, backs)
    assert reason.text.endswith(
        ": whichever claims it puts it back until 2026-11-29 03:42:00 UTC, for another 42 min, and "
        "then moves it to the dead-letter table."
    )
    assert reason.blocks
    assert reason.facts["put_back_until"] == NOW + timedelta(minutes=42)
    reason = told(old, backs, knows)
    assert not reason.blocks
    assert "; such a worker puts it back until 2026-11-29 03:42:00 UTC" in reason.text
    assert told(old, backs, buries).text.endswith(
        "moves it to the dead-letter table, or puts it back until 2026-11-29 03:42:00 UTC, for "
        "another 42 min: 1 of the 2 put it back."
    )
    late = LIVE._replace(created_at=NOW - timedelta(hours=2))
    assert told(late, backs).text.endswith("claims it moves it to the dead-letter table.")
    assert told(late, backs).facts["put_back_until"] is None


def test_of_many_releases_a_few_are_named() -> None:
    worker = looks.QueueWorker(1, "h", 1, None, "working", 0.1, 1, 0, False)
    known = looks.QueueWorkers(8, [worker._replace(release=f"{n}") for n in range(8)])
    assert "(releases 0, 1, 2, 3, 4, …)" in reason_of("no_handler", workers=known).text
    assert len(cast(list[str], reason_of("no_handler", workers=known).facts["releases"])) == 8


# -- the command ---------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("BGJOB_DSN", dsn)

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["explain", *args])
        return status, *capsys.readouterr()

    return run


def test_the_command_prints_a_line_for_each_reason_and_one_for_its_remedy(
    run: Run, plain_client: Client
) -> None:
    enqueue(plain_client, "a", delay=LONG)
    plain_client.pause("q")
    status, told, errors = run("a")
    assert (status, errors) == (3, "")
    lines = told.splitlines()
    assert lines[0] == "job        a: delayed"
    assert [line.split()[0] for line in lines] == [
        *("job", "not_due", "paused", "do", "no_worker", "do")
    ]
    assert lines[3] == "do         bgjob resume q"
    assert run("none")[0] == 4
    assert run("none")[1].startswith("job     none: absent\nabsent  No job with this id")
    status, told, _ = run("--queue", "empty")
    assert (status, told.splitlines()[0]) == (0, "queue  empty: empty")
    enqueue(plain_client, "b", queue="r")
    assert run("--queue", "r")[1].startswith("job        b: due\n")


def test_the_command_prints_json(run: Run, plain_client: Client) -> None:
    enqueue(plain_client, "a\x1b")
    plain_client.pause("q", datetime.now(UTC) + timedelta(hours=1))
    status, told, _ = run("--json", "a\x1b")
    answer = json.loads(told)
    assert status == 3
    assert list(answer) == ["id", "queue", "state", "now", "reasons"]
    assert (answer["id"], answer["queue"], answer["state"]) == ("a\x1b", "q", "due")
    assert datetime.fromisoformat(answer["now"]).tzinfo is not None
    first, second = answer["reasons"]
    assert list(first) == ["code", "blocks", "text", "remedy", "until"]
    assert (first["code"], first["blocks"]) == ("paused", False)
    assert datetime.fromisoformat(first["until"]) > datetime.now(UTC)
    assert (second["code"], second["blocks"], second["sessions"]) == ("no_worker", True, 0)
    assert json.loads(run("--json", "none")[1])["reasons"][0]["code"] == "absent"


def test_no_fact_hides_a_field_of_its_reason(client: Any, start: Start) -> None:
    start("r")
    client.enqueue(EnqueueRequest("r", "t", id="holder", exclusive="k"))
    client.bulk_enqueue([EnqueueRequest("q", "t", id=id_, exclusive="k") for id_ in ("x", "a")])
    assert eventually(lambda: client.explain("holder").state == "running")
    dead_letter(client, EnqueueRequest("dead", "t", id="dead"))
    for id_ in ("holder", "a", "dead", "none", "schedule:x:y"):
        explanation = client.explain(id_)
        for reason, told in zip(explanation.reasons, explanation.as_json()["reasons"], strict=True):
            assert not {"code", "blocks", "text", "remedy"} & set(reason.facts)
            assert told["text"] == reason.text


@pytest.mark.parametrize("args", [[], ["a", "--queue", "q"], ["a", "b"], [""], ["--queue", ""]])
def test_the_command_refuses_other_arguments(run: Run, args: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(*args)
    assert exit.value.code == 2


def test_the_help_names_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["explain", "--help"])
    assert exit.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for text in ("--queue", "3 it waits for somebody to act", "4 there is no such job"):
        assert text in told


def test_the_command_reports_a_database_without_tables(
    empty_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", "a", "--dsn", empty_dsn]) == 1
    assert "migration/init.sql" in capsys.readouterr().err


def test_the_operations_guide_lists_each_reason() -> None:
    rules = sorted((ROOT / "bgjob/_explanation").glob("*.py"))
    source = "".join(path.read_text("utf-8") for path in rules)
    told = (DOCS / "operations.md").read_text("utf-8")
    found = set(re.findall(r'Reason\(\s*"(\w+)"', source)) | {"retry", "not_due"}
    assert len(found) >= 17
    for code in found:
        assert f"\n| `{code}` |" in told
