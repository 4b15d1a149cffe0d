"""A hot standby: what can be read there is what the primary says, and nothing else is tried."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import ReadOnlySqlTransaction
from support.pages import opened
from support.standby import standby_of
from support.waiting import eventually

from bgjob import Client, EnqueueRequest, Job, Mux, Retry, Worker, WorkerStatus, cli
from bgjob.ext.embedded import EmbeddedServer
from bgjob.jobs import LiveJob
from bgjob.schema import init_sql


def _fail(_: Job) -> None:
    raise ValueError("as asked")


class Pair(NamedTuple):
    """The DSNs of one database on two servers."""

    primary: str
    standby: str


@pytest.fixture(scope="module")
def pair(second_server: EmbeddedServer, bin_dir: Path | None) -> Iterator[Pair]:
    """A primary with live, dead and completed jobs, a schedule, a worker; and its standby."""
    second_server.start()
    with psycopg.connect(second_server.dsn, autocommit=True) as conn:
        conn.execute("create database read_only")
    primary = make_conninfo(second_server.dsn, dbname="read_only")
    with psycopg.connect(primary) as conn:
        conn.execute(init_sql().encode())
    mux = Mux().register("bad", _fail, max_attempts=1)
    mux.register("again", lambda _: Retry(3600))
    with Client(primary) as client, standby_of(second_server, bin_dir) as standby:
        for id in ("bad", "again", "unknown"):
            client.enqueue(EnqueueRequest("q", id, id=id))
        client.enqueue(EnqueueRequest("q", "keyed", id="first", exclusive="k", delay=3600))
        worker = Worker(client, "q", mux)
        worker.run()
        assert eventually(lambda: len(client.dlq.list()) == 2)
        client.enqueue(EnqueueRequest("other", "t", id="due"))
        client.pause("other")
        yield Pair(primary, make_conninfo(standby.dsn, dbname="read_only"))
        worker.shutdown()
    with psycopg.connect(second_server.dsn, autocommit=True) as conn:
        conn.execute("drop database read_only with (force)")


def caught_up(pair: Pair) -> None:
    """Wait until the standby has all that was written on the primary so far."""
    with psycopg.connect(pair.primary) as conn, psycopg.connect(pair.standby) as other:
        [[at]] = conn.execute("select pg_current_wal_lsn()").fetchall()
        has = "select pg_last_wal_replay_lsn() >= %s"
        assert eventually(lambda: other.execute(has, [at]).fetchall() == [(True,)])


def known(worker: WorkerStatus) -> Any:
    """What does not change from one moment to the next."""
    return worker.number, worker.state, worker.started_at, worker.host


READS: dict[str, Callable[[Client], Any]] = {
    "stats": lambda c: [(s.queue, s.type, s.due, s.delayed, s.dead) for s in c.stats()],
    "overview": lambda c: [
        (q.queue, q.due, q.delayed, q.paused_until) for q in c.overview().queues
    ],
    "explain a live job": lambda c: [r.code for r in c.explain("again").reasons],
    "explain a dead job": lambda c: [r.code for r in c.explain("bad").reasons],
    "explain a queue": lambda c: [r.code for r in c.explain(queue="other").reasons],
    "jobs": lambda c: [job.id for job in c.jobs.list(queue="q").jobs],
    "job": lambda c: replace(cast(LiveJob, c.jobs.get("first")), due_in=0),
    "dead jobs": lambda c: c.dlq.list(),
    "dead groups": lambda c: c.dlq.groups(),
    "history": lambda c: c.history("again"),
    "minutes": lambda c: c.minutes().series,
    "schedules": lambda c: c.schedules.list(),
    "workers": lambda c: [known(w) for w in c.workers()],
}


def test_a_standby_says_what_its_primary_says(pair: Pair) -> None:
    caught_up(pair)
    with Client(pair.primary) as primary, Client(pair.standby) as standby:
        for what, ask in READS.items():
            assert ask(standby) == ask(primary), what


@pytest.mark.parametrize(
    "command",
    [
        "stats",
        "top --once",
        "explain again",
        "explain --queue other",
        "job show first",
        "triage",
        "workers",
        "metrics",
        "dlq list",
        "schedules list",
    ],
)
def test_a_command_that_reads_works_on_a_standby(
    pair: Pair, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    caught_up(pair)
    statuses = [cli.main([*command.split(), "--dsn", dsn]) for dsn in pair]
    assert statuses[0] == statuses[1]
    told = capsys.readouterr()
    assert told.out
    assert "bgjob:" not in told.err


def test_the_doctor_says_that_it_is_a_standby(pair: Pair) -> None:
    with Client(pair.standby) as client:
        bad = [finding for finding in client.doctor() if finding.severity == "bad"]
    assert "target_session_attrs=read-write" in bad[0].remedy
    assert bad[0].check == "server"


def test_the_page_of_a_standby_shows_all_and_changes_nothing(pair: Pair) -> None:
    caught_up(pair)
    with opened(pair.standby) as pages:
        for url in ("/", "/queues/q", "/jobs/again", "/jobs/bad", "/dead", "/workers", "/doctor"):
            found = pages.get(url)
            assert found.status_code == 200, url
            assert 'method="post"' not in found.text, url
        assert ">read-only<" in pages.get("/").text
        assert pages.post("/queues/q/pause").status_code == 403


@pytest.mark.parametrize(
    "write",
    [
        lambda c: c.enqueue(EnqueueRequest("q", "t")),
        lambda c: c.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(600)]),
        lambda c: c.pause("q"),
        lambda c: c.jobs.cancel("again"),
        lambda c: c.dlq.requeue("bad"),
        lambda c: Worker(c, "q", Mux()).run(),
    ],
    ids=["enqueue", "bulk enqueue", "pause", "cancel", "requeue", "worker"],
)
def test_a_write_is_refused_at_once(pair: Pair, write: Callable[[Client], object]) -> None:
    with Client(pair.standby) as client, pytest.raises(ReadOnlySqlTransaction):
        write(client)


@pytest.mark.parametrize("command", ["enqueue q t", "pause q", "job cancel again"])
def test_a_command_that_writes_says_where_it_can(
    pair: Pair, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--dsn", pair.standby]) == 1
    assert "connect to the primary: target_session_attrs=read-write" in capsys.readouterr().err
