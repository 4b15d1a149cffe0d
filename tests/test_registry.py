"""Each worker has a row that people can read, and that decides nothing."""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest
from conftest import MIGRATION
from faults.pooler import Pooler
from support.database import all_done, clock, row, rows, terminate_workers
from support.databases import Databases
from support.documents import ROOT
from support.nursery import Forked, fork
from support.waiting import PATIENCE, eventually
from support.workers import Gate, Launcher, Recorder, Style, both_styles

from bgjob import (
    Client,
    Job,
    MoveToDlq,
    Mux,
    NoopObserver,
    Reschedule,
    Result,
    Retry,
    RunningJob,
    SchemaError,
    WorkerCounts,
    WorkerStatus,
    __version__,
    cli,
)
from bgjob._sql.tokens import Tokens, origin
from bgjob._worker.control import QueueControl
from bgjob._worker.events import Events
from bgjob._worker.registry import EVERY, Registry


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the workers of this process beat often."""
    monkeypatch.setattr("bgjob._worker.registry.EVERY", 0.02)


@pytest.fixture
def listed(dsn: str) -> Iterator[Callable[[], list[WorkerStatus]]]:
    with Client(dsn) as client:
        yield client.workers


List = Callable[[], list[WorkerStatus]]

TABLE = MIGRATION.read_text("utf-8").partition("create table bgjob_worker")
TABLE_SQL = (TABLE[1] + TABLE[2].partition(";")[0]).encode()


def only(workers: list[WorkerStatus]) -> WorkerStatus:
    [worker] = workers
    return worker


def age(conn: psycopg.Connection, seconds: float = 60) -> None:
    """Make all workers last seen so long ago."""
    conn.execute("update bgjob_worker set seen_at = seen_at - make_interval(secs => %s)", [seconds])


def test_workers_that_start_together_do_not_beat_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "_begin", lambda *_: None)

    def first_beat() -> float:
        events = Events(NoopObserver(), "q")
        registry = Registry(
            {"q": 1}, list, lease=30.0, release=None, tokens=Tokens(), events=events
        )
        registry.enter("q", list)
        registry.write(lambda _: pytest.fail("it asks the server"))
        return registry.due_at("q") - monotonic()

    beats = [first_beat() for _ in range(50)]
    assert max(beats) <= EVERY
    assert max(beats) - min(beats) > EVERY / 4


# -- a life ----------------------------------------------------------------------------------------


def test_a_worker_is_listed_while_it_works_and_after_it_has_ended(
    launcher: Launcher, conn: psycopg.Connection, listed: List, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BGJOB_RELEASE", "2026.11")
    before = clock(conn)
    mux = Mux().register("t", lambda _: None).register("s", lambda _: None)
    worker = launcher.start(mux, {"q": 3, "r": 1}, lease=7.5)
    seen = only(listed())
    assert seen._replace(number=0, started_at=before, seen_at=before, not_seen=0.0) == WorkerStatus(
        0,
        "working",
        socket.gethostname(),
        os.getpid(),
        seen.program,
        "2026.11",
        __version__,
        before,
        before,
        0.0,
        {"q": 3, "r": 1},
        {},
        ["s", "t"],
        7.5,
        10.0,
        WorkerCounts(),
        [],
        None,
    )
    assert seen.program
    assert before <= seen.started_at <= seen.seen_at <= clock(conn)
    assert seen.is_alive
    assert launcher.shutdown(worker)
    ended = only(listed())
    assert (ended.number, ended.state, ended.is_alive) == (seen.number, "ended", False)
    age(conn)
    assert only(listed()).state == "ended"


def test_the_release_is_the_workers_own_before_that_of_the_environment(
    launcher: Launcher, listed: List, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BGJOB_RELEASE", "theirs")
    launcher.start(Mux(), release="its own")
    assert only(listed()).release == "its own"


def test_the_rows_of_two_workers_of_one_process_differ(launcher: Launcher, listed: List) -> None:
    for _ in range(2):
        launcher.start(Mux())
    first, second = listed()
    assert (first.pid, second.pid) == (os.getpid(), os.getpid())
    assert first.number != second.number


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("heard", [True, False], ids=["observed", "not observed"])
def test_a_row_counts_the_events_of_the_worker(
    launcher: Launcher, listed: List, heard: bool
) -> None:
    def handle(job: Job) -> Result | None:
        match job.id:
            case "retried" if job.attempt == 1:
                return Retry(delay=0)
            case "rescheduled" if job.attempt == 1 and not again:
                again.append(job.id)
                return Reschedule(0)
            case "dead":
                return MoveToDlq("why")
        return None

    again: list[str] = []
    observer: Any = Recorder() if heard else []
    launcher.start(Mux().register("t", handle), {"q": 2, "r": 1}, observer=observer)
    launcher.enqueue("a", "b", "retried", "rescheduled", "dead")
    launcher.enqueue("c", queue="r")
    expected = WorkerCounts(completed=5, retried=1, rescheduled=1, dead=1)
    assert eventually(lambda: only(listed()).counts == expected), only(listed()).counts


@pytest.mark.usefixtures("often")
def test_a_row_has_the_last_error_of_the_worker(launcher: Launcher, listed: List) -> None:
    class Broken:
        def run(self, _: psycopg.Connection, /) -> float:
            raise ValueError("it broke \0 here\n" + "x" * 500)

    launcher.start(Mux(), services=[Broken()])
    assert eventually(lambda: only(listed()).note is not None)
    note = only(listed()).note
    assert note is not None
    assert note.startswith("ValueError: it broke \\0 here xxx")
    assert len(note) == 200
    assert only(listed()).counts.errors >= 1


@pytest.mark.usefixtures("often")
@both_styles
def test_a_row_tells_which_handlers_are_busy_and_since_when(
    style: Style, launcher: Launcher, conn: psycopg.Connection, listed: List
) -> None:
    gate = Gate()
    launcher.enqueue(*"abcdef")
    launcher.enqueue("x", queue="r")
    worker = launcher.start(Mux().register("t", gate.of(style)), {"q": 7, "r": 2, "s": 1})
    for _ in range(7):
        gate.wait()
    busy = {"q": 6, "r": 1, "s": 0}
    assert eventually(lambda: only(listed()).running == busy), only(listed())
    seen = only(listed())
    tokens: dict[str, int] = dict(rows(conn, "select id, token from bgjob_job"))
    made = {id_: origin(token) for id_, token in tokens.items()}
    assert all(each is not None and each.number == seen.number for each in made.values())
    oldest = sorted(tokens, key=lambda id_: tokens[id_])[:5]
    assert len(seen.longest) == 5
    # Those of one claim have the same token.
    assert [job.since for job in seen.longest] == [made[id_].at for id_ in oldest]  # type: ignore[union-attr]
    assert {job.id for job in seen.longest} <= set(tokens)
    gate.released.set()
    assert all_done(conn)
    assert launcher.shutdown(worker)
    ended = only(listed())
    assert (ended.state, ended.longest, ended.counts.completed) == ("ended", [], 7)


@pytest.mark.usefixtures("often")
@both_styles
def test_a_worker_that_shuts_down_is_seen_as_stopping_by_any_of_its_queues(
    style: Style, launcher: Launcher, listed: List
) -> None:
    gate = Gate()
    launcher.enqueue("a", queue="r")
    worker = launcher.start(Mux().register("t", gate.of(style)), {"q": 1, "r": 1})
    gate.wait()
    worker._group.stop(60)  # q has nothing to do, and ends
    assert eventually(lambda: only(listed()).state == "stopping")
    seen = only(listed()).seen_at
    assert eventually(lambda: only(listed()).seen_at > seen)
    assert only(listed()).running == {"q": 0, "r": 1}
    gate.released.set()
    assert launcher.shutdown(worker)
    assert only(listed()).state == "ended"


def test_a_worker_that_ends_on_its_own_is_listed_as_failed(
    launcher: Launcher, listed: List, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = launcher.start(Mux(), {"q": 1, "r": 1})

    def broken(_: QueueControl) -> bool:
        raise RuntimeError("a fault of its own")

    monkeypatch.setattr(QueueControl, "_turn", broken)
    launcher.enqueue("a")
    assert launcher.run(worker.wait(PATIENCE))
    failed = only(listed())
    assert failed.state == "failed"
    assert failed.note == "RuntimeError: a fault of its own"


@both_styles
def test_a_worker_that_abandons_handlers_has_ended(
    style: Style, launcher: Launcher, listed: List
) -> None:
    gate = Gate()
    launcher.enqueue("a", "b")
    worker = launcher.start(Mux().register("t", gate.of(style)), {"q": 2, "r": 1})
    for _ in range(2):
        gate.wait()
    launcher.shutdown(worker, timeout=0)
    assert only(listed()).state == "ended"
    gate.released.set()


def test_a_worker_whose_start_fails_has_no_row_or_one_that_ended(
    launcher: Launcher, listed: List
) -> None:
    def state() -> object:
        raise RuntimeError("no state")

    worker = launcher.make(Mux(), {"q": 1, "r": 1}, state=state)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no state"):
            launcher.run(worker.run())
    assert {seen.state for seen in listed()} == {"ended"}


def test_a_worker_without_a_registry_writes_nothing(
    launcher: Launcher, conn: psycopg.Connection, listed: List
) -> None:
    conn.execute("drop table bgjob_worker")
    recorder = Recorder()
    launcher.start(Mux().register("t", lambda _: None), registry=False, observer=recorder)
    launcher.enqueue("a")
    assert all_done(conn)
    assert recorder.of("error") == []
    with pytest.raises(SchemaError, match="bgjob_worker"):
        listed()


# -- the cost --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("often")
def test_each_beat_is_a_heap_only_update_that_waits_for_no_disk(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    mux = Mux()
    for n in range(500):
        mux.register(f"a type of a certain length {n}", lambda _: None)
    launcher.start(mux)
    launcher.start(Mux().register("t", lambda _: None))

    def beats() -> tuple[int, int]:
        query = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = %s"
        updates, hot = row(conn, query, "bgjob_worker")
        return updates, hot

    assert eventually(lambda: beats()[0] >= 200)
    updates, hot = beats()
    # So often, and beside other tests, an old snapshot may keep three versions of a row for once.
    assert hot >= 0.9 * updates
    # Two hundred versions of the larger row would need over sixty pages.
    assert row(conn, "select pg_relation_size('bgjob_worker') <= 30 * 8192") == (True,)


# -- kill -9, and other ends without a word --------------------------------------------------------

APP = """
import os
from bgjob import Mux
mux = Mux()

@mux.handler("t")
def handle(job):
    os.write(1, b"entered\\n")
    while not os.path.exists("open"):
        import time
        time.sleep(0.01)
"""


@pytest.fixture
def start(dsn: str, tmp_path: Path) -> Iterator[Callable[..., Forked]]:
    """Run `bgjob worker app:mux` with these arguments."""
    (tmp_path / "app.py").write_text(APP)
    started = []

    def start(*args: str) -> Forked:
        with (tmp_path / "out").open("ab") as output:
            env = {**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": dsn}
            process = fork(
                "bgjob", "worker", "app:mux", *args, env=env, output=output, cwd=tmp_path
            )
        assert process.stdin is not None
        process.stdin.close()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)


def test_a_killed_worker_is_lost_once_three_beats_did_not_come(
    start: Callable[..., Forked], conn: psycopg.Connection, listed: List, launcher: Launcher
) -> None:
    launcher.enqueue("a")
    process = start("--queue", "q", "--release", "v7")
    assert eventually(lambda: rows(conn, "select from bgjob_job where token is not null") != [])
    seen = only(listed())
    token = row(conn, "select token from bgjob_job")[0]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)
    assert (seen.pid, seen.program, seen.release) == (process.pid, "bgjob worker app:mux", "v7")
    assert only(listed()).state == "working"
    age(conn, 3 * seen.every + 1)
    lost = only(listed())
    assert (lost.state, lost.is_alive) == ("lost", False)
    assert timedelta(seconds=lost.not_seen) > timedelta(seconds=3 * seen.every)
    found = origin(token)
    assert found is not None
    assert found.number == lost.number  # so its job can be told from others


def test_a_worker_process_that_is_asked_to_end_is_listed_as_ended(
    start: Callable[..., Forked], conn: psycopg.Connection, listed: List
) -> None:
    process = start("--queue", "q")
    assert eventually(lambda: listed() != [])
    os.kill(process.pid, signal.SIGTERM)
    process.wait(PATIENCE)
    assert only(listed()).state == "ended"


def test_each_of_several_processes_has_a_row_and_a_killed_one_gets_a_successor(
    start: Callable[..., Forked], conn: psycopg.Connection, listed: List
) -> None:
    parent = start("--queue", "q=2", "--processes", "2", "--release", "v8")
    assert eventually(lambda: len(listed()) == 2)
    first, second = listed()
    assert {first.pid, second.pid}.isdisjoint({parent.pid})
    assert first.pid != second.pid
    assert {first.release, second.release} == {"v8"}
    os.kill(first.pid, signal.SIGKILL)
    assert eventually(lambda: len(listed()) == 3)
    age(conn)
    conn.execute("update bgjob_worker set seen_at = clock_timestamp() where pid <> %s", [first.pid])
    assert [seen.state for seen in listed()] == ["lost", "working", "working"]
    assert listed()[0].pid == first.pid
    os.kill(parent.pid, signal.SIGTERM)
    parent.wait(PATIENCE)
    assert [seen.state for seen in listed()] == ["lost", "ended", "ended"]


@pytest.mark.usefixtures("often")
def test_a_worker_that_is_not_seen_for_a_while_is_listed_again_with_its_next_beat(
    launcher: Launcher, conn: psycopg.Connection, listed: List
) -> None:
    launcher.start(Mux())
    age(conn)
    assert eventually(lambda: only(listed()).state == "working")


@pytest.mark.usefixtures("often")
def test_a_worker_that_lost_its_connections_keeps_its_row(
    launcher: Launcher, conn: psycopg.Connection, listed: List
) -> None:
    recorder = Recorder()
    launcher.start(Mux(), {"q": 1, "r": 1}, observer=recorder)
    number = only(listed()).number
    assert terminate_workers(conn) == 2
    recorder.wait_for("error")
    now = clock(conn)
    assert eventually(lambda: only(listed()).seen_at > now)
    assert only(listed()).number == number
    assert only(listed()).counts.errors >= 1


# -- old rows --------------------------------------------------------------------------------------


def test_a_worker_that_starts_removes_the_rows_of_those_not_seen_for_a_day(
    launcher: Launcher, conn: psycopg.Connection, listed: List
) -> None:
    for _ in range(4):
        assert launcher.shutdown(launcher.start(Mux()))
    old, locked, young, _ = [seen.number for seen in listed()]
    ago = "update bgjob_worker set seen_at = now() - %s * interval '1 hour' where number = any (%s)"
    conn.execute(ago, [25, [old, locked]])
    conn.execute(ago, [23, [young]])
    with psycopg.connect(launcher.dsn) as other:
        other.execute("select from bgjob_worker where number = %s for update", [locked])
        launcher.start(Mux())
    numbers = [seen.number for seen in listed()]
    assert old not in numbers
    assert {locked, young} < set(numbers)
    launcher.start(Mux())
    assert locked not in [seen.number for seen in listed()]


@pytest.mark.usefixtures("often")
def test_a_worker_whose_row_was_removed_gets_another(
    launcher: Launcher, conn: psycopg.Connection, listed: List
) -> None:
    recorder, gate = Recorder(), Gate()
    launcher.start(Mux().register("t", gate), observer=recorder)
    before = only(listed())
    assert eventually(lambda: only(listed()).seen_at > before.seen_at)
    conn.execute("delete from bgjob_worker")
    assert eventually(lambda: listed() != [])
    after = only(listed())
    assert after.number != before.number
    launcher.enqueue("a")
    gate.wait()
    made = origin(row(conn, "select token from bgjob_job")[0])
    assert made is not None
    assert made.number == after.number
    gate.released.set()
    assert recorder.of("error") == []


# -- no table, no grant, no session ----------------------------------------------------------------


@pytest.mark.usefixtures("often")
def test_without_the_table_a_worker_says_so_once_and_works_until_it_is_there(
    launcher: Launcher,
    conn: psycopg.Connection,
    listed: List,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bgjob._worker.registry.LOOK_AGAIN", 0.02)
    conn.execute("drop table bgjob_worker")
    recorder, gate = Recorder(), Gate()
    launcher.start(Mux().register("t", gate), observer=recorder)
    launcher.enqueue("a")
    gate.wait()
    made = origin(row(conn, "select token from bgjob_job")[0])
    assert made is not None
    assert made.number is None
    gate.released.set()
    assert all_done(conn)
    conn.execute(TABLE_SQL)
    assert eventually(lambda: listed() != [])
    launcher.enqueue("b")
    assert all_done(conn)
    [(_, error)] = recorder.of("error")
    assert "bgjob_worker is not in the search_path" in str(error)
    assert "init.sql" in str(error)
    conn.execute("drop table bgjob_worker")
    launcher.enqueue("c")
    assert all_done(conn)
    conn.execute(TABLE_SQL)
    assert eventually(lambda: listed() != [])
    assert len(recorder.of("error")) == 1


@pytest.mark.usefixtures("often")
def test_a_worker_goes_on_while_its_row_cannot_be_written(
    launcher: Launcher, conn: psycopg.Connection, listed: List
) -> None:
    recorder = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=recorder)
    with psycopg.connect(launcher.dsn) as other:
        other.execute("lock table bgjob_worker")
        recorder.wait_for("error")
        launcher.enqueue("a")
        assert all_done(conn)
    now = clock(conn)
    assert eventually(lambda: only(listed()).seen_at > now)


@pytest.mark.usefixtures("often")
def test_a_worker_whose_row_vanishes_at_once_says_so_once_and_does_not_write_it_at_each_beat(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute("create sequence written")
    conn.execute(
        "create function forget() returns trigger language plpgsql as "
        "'begin perform nextval(''written''); delete from bgjob_worker; return null; end'"
    )
    conn.execute(
        "create trigger forget after insert on bgjob_worker for each row execute function forget()"
    )
    recorder = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=recorder)
    recorder.wait_for("error")
    launcher.enqueue("a")
    assert all_done(conn)
    [(_, error)] = recorder.of("error")
    assert "vanishes" in str(error)
    assert row(conn, "select last_value from written") == (1,)


@pytest.mark.usefixtures("often")
def test_a_worker_behind_a_pooler_is_listed(
    launcher: Launcher, dsn: str, conn: psycopg.Connection, listed: List
) -> None:
    with Pooler(dsn) as pooler:
        worker = launcher.start(
            Mux().register("t", lambda _: None), dsn=pooler.dsn(dsn), poll_interval=0.05
        )
        seen = only(listed()).seen_at
        assert eventually(lambda: only(listed()).seen_at > seen)
        launcher.enqueue("a")
        assert eventually(lambda: only(listed()).counts.completed == 1)
        assert launcher.shutdown(worker)
        assert only(listed()).state == "ended"
        # Nothing is left behind in the sessions that it shared.
        with psycopg.connect(pooler.dsn(dsn), autocommit=True) as other:
            for _ in range(2):
                assert row(other, "show lock_timeout") == ("0",)
                assert row(other, "show synchronous_commit") == row(conn, "show synchronous_commit")


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_row_holds_what_the_databases_encoding_can_hold(
    databases: Databases, encoding: str
) -> None:
    with databases.make(template="template0", encoding=encoding) as (_, dsn):
        with psycopg.connect(dsn) as conn:
            conn.execute(MIGRATION.read_bytes())
        with Client(dsn) as client:
            launcher = Launcher(dsn, is_async=False)
            try:
                launcher.start(Mux().register("é✓", lambda _: None), release="5 €")
                seen = only(client.workers())
            finally:
                launcher.close()
    is_latin = encoding == "LATIN1"
    assert seen.types == ([r"é\u2713"] if is_latin else ["é✓"])
    assert seen.release == (r"5 \u20ac" if is_latin else "5 €")


# -- reading ---------------------------------------------------------------------------------------


def test_a_client_lists_workers_within_a_transaction_of_the_callers(
    client: Any, colour: Any, launcher: Launcher
) -> None:
    launcher.start(Mux())
    conn = colour.connect()
    before = client.workers(conn=conn)
    conn.execute("delete from bgjob_worker")
    assert client.workers(conn=conn) == []
    conn.rollback()
    assert [seen.number for seen in client.workers()] == [seen.number for seen in before]


def test_a_client_names_the_remedy_for_a_missing_table(
    client: Any, conn: psycopg.Connection
) -> None:
    conn.execute("drop table bgjob_worker")
    with pytest.raises(SchemaError, match="init.sql"):
        client.workers()


def test_a_row_that_was_edited_by_hand_is_listed(conn: psycopg.Connection, listed: List) -> None:
    conn.execute(
        "insert into bgjob_worker (host, pid, program, version, queues, slots, types, lease, every,"
        " seen_at, started_at, counts, running, longest, longest_since, state)"
        " values ('h', 1, 'p', 'v', '{q,r}', '{1}', '{}', 1, 1, 'infinity', '-infinity',"
        " '{1,2,3,4,5,6,7,8,9}', '{}', '{a,b}', '{2026-01-01 00:00+00}', 'odd')"
    )
    seen = only(listed())
    assert (seen.queues, seen.running) == ({"q": 1}, {})
    assert seen.counts == WorkerCounts(1, 2, 3, 4, 5, 6, 7, 8)
    assert [job.id for job in seen.longest] == ["a"]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command, and return its exit status and output."""
    monkeypatch.setenv("BGJOB_DSN", dsn)

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(args)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def three(conn: psycopg.Connection, listed: List) -> list[WorkerStatus]:
    """A worker that ended, one that works, and one that is lost."""
    for host, queue, state, ago in (
        ("one", "q", "ended", 100),
        ("two\x1b[2J", "q", "working", 2),
        ("three", "r", "stopping", 100),
    ):
        conn.execute(
            "insert into bgjob_worker (host, pid, program, release, version, queues, slots, running,"
            " types, lease, every, seen_at, state, counts, longest, longest_since, note)"
            " values (%s, 4121, 'p', null, '1', %s, '{8}', '{5}', '{t}', 30, 10,"
            " clock_timestamp() - make_interval(secs => %s), %s, '{7,1,0,2,0,0,3}', '{job}',"
            " array[clock_timestamp() - interval '10 minutes'], 'ValueError: no')",
            [host, [queue], ago, state],
        )
    return listed()


@pytest.mark.usefixtures("three")
def test_the_command_lists_the_lost_workers_first_and_how_long_they_are_not_seen(run: Run) -> None:
    status, out, err = run("workers")
    header, lost, working, ended = (line.split() for line in out.splitlines())
    assert (status, err) == (0, "")
    assert header[:3] == ["number", "state", "host"]
    assert lost[1:4] == ["not", "seen", "for"]
    assert 100 <= int(lost[4]) < 100 + PATIENCE
    assert lost[5:7] == ["s", "three"]
    assert working[1:6] == ["working", "two\\x1b[2J...", "4121", "p", "-"]
    assert "5/8" in working
    assert ended[1:3] == ["ended", "one"]
    assert "5/8" not in ended
    assert working[-2:] == ["ValueError:", "no"]


def test_the_command_filters_workers(run: Run, three: list[WorkerStatus]) -> None:
    lost, working, ended = three
    numbers = {
        (): [lost, working, ended],
        ("--lost",): [lost],
        ("--queue", "q"): [working, ended],
        ("--queue", "q", "--lost"): [],
    }
    for args, expected in numbers.items():
        found = json.loads(run("workers", "--json", *args)[1])
        assert [worker["number"] for worker in found] == [worker.number for worker in expected]


def test_the_command_prints_json_with_all_fields(run: Run, three: list[WorkerStatus]) -> None:
    lost = three[0]
    found = json.loads(run("workers", "--json")[1])[0]
    assert set(found) == set(WorkerStatus._fields)
    assert found["state"] == "lost"
    assert found["queues"] == {"r": 8}
    assert found["counts"] == {**WorkerCounts(7, 1, 0, 2, 0, 0, 3)._asdict()}
    assert [set(job) for job in found["longest"]] == [set(RunningJob._fields)]
    assert found["number"] == lost.number


def test_the_commands_name_the_remedy_for_a_missing_table(
    run: Run, conn: psycopg.Connection
) -> None:
    assert json.loads(run("schema", "--check", "--json")[1])["lists_workers"] is True
    conn.execute("drop table bgjob_worker")
    status, out, err = run("workers")
    assert (status, out) == (1, "")
    assert "init.sql" in err
    status, out, err = run("schema", "--check")
    assert (status, err) == (0, "")
    assert "without table bgjob_worker" in out
    found = json.loads(run("schema", "--check", "--json")[1])
    assert (found["ok"], found["lists_workers"]) == (True, False)
