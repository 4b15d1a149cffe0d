"""No worker claims from a paused queue, and none of its jobs is lost."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from support.clients import HOSTILE, Colour
from support.database import clock, count, row, rows, sleeper
from support.jobs import requests
from support.statements import LONG_AGO, ask
from support.waiting import NEVER, eventually
from support.workers import Launcher, Gate, Recorder

from bgjob import BgjobError, Client, EmptyQueueError, EnqueueRequest, Job, Mux
from bgjob._sql.claims import claim, claim_any, claim_group, free, sweep
from bgjob._sql.pauses import claiming_transactions
from bgjob._sql.statement import Statement
from bgjob._sql.survey import survey

HELD: LiteralString = "select id from bgjob_job where token is not null order by id"

CLAIMS: dict[str, Statement[Any]] = {
    "claim": claim("q", limit=9, lease=60, token=1, marks=dict.fromkeys((0, 1), LONG_AGO)),
    "claim of one priority": claim("q", limit=9, lease=60, token=1, marks={0: LONG_AGO}),
    "sweep": sweep("q", limit=9, lease=60, token=1),
    "claim of a group": claim_group("q", limit=9, lease=60, token=1, charge=True),
    "claim of any": claim_any("q", lease=60, token=1),
}


# -- claims ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLAIMS)
def test_no_claim_takes_a_job_of_a_paused_queue(
    client: Any, worker: psycopg.Connection, name: str
) -> None:
    client.bulk_enqueue(requests("fresh", "suspect"))
    worker.execute("update bgjob_job set deaths = 2 where id = 'suspect'")
    client.pause("other")
    client.pause("q")
    ask(worker, CLAIMS[name])
    assert rows(worker, HELD) == []
    client.resume("q")
    ask(worker, CLAIMS[name])
    assert len(rows(worker, HELD)) == 1


def test_a_dead_workers_job_is_freed_while_its_queue_is_paused(
    client: Any, worker: psycopg.Connection
) -> None:
    client.bulk_enqueue(requests(*"abcdef"))
    worker.execute(
        "update bgjob_job set token = 1, attempt = 1, lease_until = now() - interval '1 s' "
        "where id in ('d', 'e', 'f')"
    )
    client.pause("q")
    # Due jobs come first, and leave the same room for those that are to be freed.
    assert ask(worker, sweep("q", limit=2, lease=60, token=2))[:2] == ([], 2)
    assert ask(worker, free("q", limit=9))[:2] == ([], 1)
    assert rows(worker, "select id, deaths from bgjob_job where deaths > 0 order by id") == [
        ("d", 1),
        ("e", 1),
        ("f", 1),
    ]
    assert rows(worker, HELD) == []


def test_a_suspect_of_a_paused_queue_keeps_no_worker_busy(
    client: Any, worker: psycopg.Connection
) -> None:
    client.bulk_enqueue(requests("a"))
    worker.execute("update bgjob_job set deaths = 2")
    client.pause("q")
    assert [line.has_suspects for line in ask(worker, survey("q"))] == [False]
    client.resume("q")
    assert [line.has_suspects for line in ask(worker, survey("q"))] == [True]


# -- workers --------------------------------------------------------------------------------


def test_a_worker_leaves_a_paused_queue_alone_and_is_woken_by_its_resume(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    launcher.client.pause("q")
    launcher.enqueue("before")
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)
    observer.wait_for("empty")
    assert eventually(lambda: sleeper(conn) is not None)
    launcher.enqueue("while", "elsewhere")
    conn.execute("update bgjob_job set queue = 'other' where id = 'elsewhere'")
    launcher.start(Mux().register("t", lambda _: None), "other", observer=observer)
    observer.wait_for("completed", "elsewhere")
    assert rows(conn, "select id, attempt from bgjob_job order by id") == [
        ("before", 0),
        ("while", 0),
    ]
    assert launcher.client.resume("q")
    for id_ in ("before", "while"):
        observer.wait_for("completed", id_)
    assert observer.of("error") == []


def test_a_backlog_of_several_priorities_that_was_never_seen_before_is_found_after_a_resume(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    launcher.client.pause("q")
    for priority in range(4):
        launcher.enqueue(*(f"{priority} {n}" for n in range(50)), priority=priority)
    observer = Recorder()
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=NEVER)
    observer.wait_for("empty")
    assert eventually(lambda: sleeper(conn) is not None)
    launcher.client.resume("q")
    observer.wait_for("completed", times=200)
    ids = [id_ for _, id_, _ in observer.of("started")]
    assert ids == sorted(ids, key=lambda id_: id_[0])


def test_running_jobs_go_on_through_a_pause_and_keep_their_lease(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    gate, observer = Gate(), Recorder()
    launcher.enqueue("a")
    handler = gate.of("coroutine" if launcher.is_async else "plain")
    launcher.start(
        Mux().register("t", handler), observer=observer, concurrency=2, lease=1, poll_interval=0.05
    )
    gate.wait()
    launcher.client.pause("q")
    launcher.enqueue("b")
    [(first,)] = rows(conn, "select lease_until from bgjob_job where id = 'a'")
    lease: LiteralString = "select lease_until from bgjob_job where id = 'a'"
    assert eventually(lambda: row(conn, lease)[0] > first + timedelta(seconds=2))
    gate.released.set()
    observer.wait_for("completed", "a")
    assert rows(conn, "select id, attempt, token from bgjob_job") == [("b", 0, None)]
    launcher.client.resume("q")
    observer.wait_for("completed", "b")
    assert observer.of("lost", "error") == []


def test_a_timed_pause_ends_by_itself_and_a_worker_polls_for_its_end(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    began: list[datetime] = []
    observer = Recorder()
    launcher.enqueue("a")
    end = clock(conn) + timedelta(seconds=0.7)
    launcher.client.pause("q", end)
    mux = Mux().register("t", lambda _: began.append(clock(conn)))
    launcher.start(mux, observer=observer, poll_interval=0.05)
    observer.wait_for("completed", "a")
    assert began[0] >= end
    assert launcher.client.paused() == {}
    assert not launcher.client.resume("q")


def test_the_observer_is_notified_once_that_a_paused_queue_is_empty(launcher: Launcher) -> None:
    observer = Recorder()
    launcher.client.pause("q")
    launcher.enqueue("a")
    launcher.start(Mux().register("t", lambda _: None), observer=observer, poll_interval=0.01)
    observer.wait_for("empty")
    launcher.client.resume("q")
    observer.wait_for("completed", "a")
    observer.wait_for("empty", times=2)
    names = [name for name, *_ in observer.events]
    assert names == ["empty", "started", "completed", "empty"]


# -- clients --------------------------------------------------------------------------------


def test_paused_queues_are_listed_with_the_end_of_their_pause(
    client: Any, conn: psycopg.Connection
) -> None:
    end = datetime(2100, 1, 1, tzinfo=UTC)
    assert client.paused() == {}
    client.pause("b")
    client.pause("a", until=end)
    client.pause("over", until=datetime(2020, 1, 1, tzinfo=UTC))
    assert list(client.paused().items()) == [("a", end), ("b", None)]
    client.pause("b", until=end)
    client.pause("a")
    assert client.paused() == {"a": None, "b": end}
    assert (client.resume("a"), client.resume("a"), client.resume("over")) == (True, False, False)
    conn.execute("update bgjob_pause set until = '100000-01-01'")
    assert list(client.paused()) == ["b"]


def test_do_claims_nothing_from_a_paused_queue(client: Any, conn: psycopg.Connection) -> None:
    seen: list[Job] = []
    mux = Mux().register("t", seen.append)
    client.bulk_enqueue(requests("a"))
    client.pause("q")
    with pytest.raises(EmptyQueueError, match="'q' is due now, or the queue is paused"):
        client.do("q", mux)
    assert row(conn, "select attempt, token from bgjob_job") == (0, None)
    client.resume("q")
    client.do("q", mux)
    assert [job.attempt for job in seen] == [1]


def test_a_pause_and_a_resume_are_part_of_the_callers_transaction(
    colour: Colour, client: Any, conn: psycopg.Connection
) -> None:
    caller = colour.connect()
    client.bulk_enqueue(requests("a", "b", "c"))
    mux = Mux().register("t", lambda _: None)
    client.pause("q", conn=caller)
    assert client.paused(conn=caller) == {"q": None}
    client.do("q", mux)
    caller.rollback()
    client.do("q", mux)
    client.pause("q", conn=caller)
    caller.commit()
    with pytest.raises(EmptyQueueError):
        client.do("q", mux)
    assert client.resume("q", conn=caller)
    with pytest.raises(EmptyQueueError):
        client.do("q", mux)
    caller.commit()
    client.do("q", mux)
    assert count(conn) == 0


@pytest.mark.parametrize("text", HOSTILE)
def test_a_queue_of_any_name_can_be_paused_and_resumed(client: Any, text: str) -> None:
    client.enqueue(EnqueueRequest(text, "t"))
    client.pause(text)
    assert client.paused() == {text: None}
    with pytest.raises(EmptyQueueError):
        client.do(text, Mux())
    assert client.resume(text)
    client.do(text, Mux().register("t", lambda _: None))


def test_a_bad_pause_is_refused_by_name(client: Any) -> None:
    with pytest.raises(ValueError, match="queue must have 1 to 255 characters, not 0"):
        client.pause("")
    with pytest.raises(ValueError, match="queue must not contain NUL"):
        client.pause("a\0b")
    with pytest.raises(ValueError, match="until must be an aware datetime"):
        client.pause("q", datetime(2100, 1, 1))
    assert client.paused() == {}


# -- claims that were under way -------------------------------------------------------------


def test_a_pause_returns_when_the_claims_that_did_not_see_it_have_ended(
    colour: Colour, worker: psycopg.Connection, conn: psycopg.Connection
) -> None:
    with Client(colour.dsn) as producer:
        producer.bulk_enqueue(requests("a", "b"))
    pausing: Callable[[], Any] = lambda: colour.client().pause("q")
    with ThreadPoolExecutor(1) as pool:
        with worker.transaction():
            assert len(ask(worker, sweep("q", limit=1, lease=60, token=1)).jobs) == 1
            paused = pool.submit(pausing)
            assert eventually(lambda: rows(conn, "select queue from bgjob_pause") == [("q",)])
            with pytest.raises(TimeoutError):
                paused.result(0.3)
            # Whoever looks from now on sees the pause, that transaction as well.
            assert ask(worker, sweep("q", limit=1, lease=60, token=2)).jobs == []
        paused.result(20)
    assert len(rows(conn, HELD)) == 1


def test_a_pause_waits_for_no_other_kind_of_transaction(
    dsn: str, client: Any, worker: psycopg.Connection, conn: psycopg.Connection
) -> None:
    client.bulk_enqueue(requests("a"))
    with (
        psycopg.connect(dsn) as producer,
        psycopg.connect(dsn) as reader,
        psycopg.connect(dsn) as owner,
        Client(dsn) as other,
    ):
        other.bulk_enqueue(requests("b"), conn=producer)
        reader.execute("select from bgjob_job, bgjob_pause, bgjob_dead_job")
        owner.execute("delete from bgjob_job where id = 'a'")
        assert ask(conn, claiming_transactions()) == set()
        with worker.transaction():
            ask(worker, sweep("other", limit=1, lease=60, token=1))
            assert len(ask(conn, claiming_transactions())) == 1
        client.pause("q")
    assert list(client.paused()) == ["q"]


def test_a_pause_that_waits_too_long_for_a_transaction_fails_and_names_it(
    colour: Colour, worker: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    pausing = colour.client()
    monkeypatch.setattr("bgjob.client.PATIENCE", 0.1)
    with worker.transaction():
        ask(worker, sweep("q", limit=1, lease=60, token=1))
        with pytest.raises(
            BgjobError, match="'q' is paused, but a transaction .* pg_stat_activity"
        ):
            pausing.pause("q")
    assert pausing.paused() == {"q": None}
