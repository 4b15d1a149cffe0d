"""Enqueues that meet are written by one insert, and each caller gets an answer of its own."""

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import psycopg
import pytest
from support.clients import HOSTILE, Colour
from support.database import count
from support.meetings import LOCKED, asked, meeting
from support.waiting import PATIENCE, eventually

from bgjob import AsyncClient, Client, EnqueueRequest, JobAlreadyExistsError
from bgjob._shared import SharedInserts, may_share
from bgjob._sql.notices import LOCK_CLASS, bucket, channel

HELD_UP = """
    create function hold_up() returns trigger language plpgsql
        as $$ begin perform pg_advisory_xact_lock(7); return new; end $$;
    create trigger hold_up before insert on bgjob_job
        for each row when (new.queue <> 'first') execute function hold_up()
"""
"""Holds up the inserts of all jobs but the first while a test has lock 7."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing begin beside an insert that a test holds up."""
    monkeypatch.setattr("bgjob._shared._SLOW", PATIENCE)


def inserts(conn: psycopg.Connection) -> int:
    """Count the transactions that wrote the jobs."""
    row = conn.execute("select count(distinct cast(xmin as text)) from bgjob_job").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.both_colours
def test_enqueues_that_meet_are_one_insert_and_each_has_its_own_answer(
    colour: Colour, conn: psycopg.Connection
) -> None:
    client = colour.client()
    twice = EnqueueRequest("q", "t")
    requests = [
        EnqueueRequest("q", "t", {"n": 1}),
        EnqueueRequest("other", "u", b"\0", priority=5, delay=60, headers={"a": 1}),
        twice,
    ]
    calls = [asked(client, request) for request in requests]
    calls += [asked(client, twice), asked(client, twice, on_conflict="skip")]
    _, *answers = meeting(colour, conn, client, calls)
    assert answers[:2] == [request.id for request in requests[:2]]
    # Exactly one of them is written, whichever came first.
    told = [a.ids[0] if isinstance(a, JobAlreadyExistsError) else a for a in answers[2:]]
    assert answers[2:].count(twice.id) == 1 and set(told) <= {twice.id, None}
    rows = conn.execute(
        "select id, queue, type, arg, priority, headers, next_run_at > now() + interval '50 s'"
        " from bgjob_job where queue <> 'first' and id <> %s order by priority",
        [twice.id],
    ).fetchall()
    assert rows == [
        (requests[0].id, "q", "t", b'{"n":1}', 0, None, False),
        (requests[1].id, "other", "u", b"\0", 5, {"a": 1}, True),
    ]
    assert (count(conn), inserts(conn)) == (4, 2)


PAYLOADS = None, b"", b"\0\xff", b"x" * 10_000, b"\\x41", b"null", b"{}"


@pytest.mark.both_colours
@pytest.mark.parametrize("notify", [True, False])
def test_plain_jobs_that_meet_are_one_prepared_insert(
    colour: Colour, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, notify: bool
) -> None:
    monkeypatch.setattr("bgjob._sql.execute._FEW", 1)
    client = colour.client(notify=notify)
    requests = [
        EnqueueRequest(name, name, payload, priority=n)
        for n, (name, payload) in enumerate(zip(HOSTILE, cycle(PAYLOADS), strict=False))
    ]
    twice = EnqueueRequest("q", "t", priority=-1)
    notices: list[str] = []
    conn.add_notify_handler(lambda notice: notices.append(notice.payload.split(" ", 1)[1]))
    conn.execute(f"listen {channel('q')}")
    conn.execute("select pg_advisory_lock(%s, %s)", [LOCK_CLASS, bucket("q")])  # as a worker
    calls = [asked(client, request) for request in [*requests, twice, twice]]
    _, *answers, one, other = meeting(colour, conn, client, calls)
    assert answers == [request.id for request in requests]
    assert {type(one), type(other)} == {str, JobAlreadyExistsError}
    rows = conn.execute(
        "select id, queue, type, arg, priority from bgjob_job where queue <> 'first'"
        " and next_run_at <= now() order by priority"
    ).fetchall()
    assert rows == [(r.id, r.queue, r.type, r.payload, r.priority) for r in [twice, *requests]]
    assert inserts(conn) == 2
    assert any(b"bgjob_enqueue_any" in each.prepared for each in client.target._pool._idle)
    assert notices == (["-1 q"] if notify else [])


@pytest.mark.both_colours
def test_a_job_that_the_server_refuses_fails_alone(
    colour: Colour, conn: psycopg.Connection
) -> None:
    conn.execute("alter table bgjob_job add constraint no_bad check (queue <> 'bad')")
    client = colour.client()
    calls = [asked(client, EnqueueRequest(queue, "t")) for queue in ("q", "bad", "q")]
    _, *answers = meeting(colour, conn, client, calls)
    assert [type(answer) for answer in answers] == [str, psycopg.errors.CheckViolation, str]
    assert count(conn) == 3


@pytest.mark.both_colours
def test_each_of_a_shared_insert_is_told_that_its_session_was_terminated(
    colour: Colour, conn: psycopg.Connection
) -> None:
    conn.execute(HELD_UP)
    conn.execute("select pg_advisory_lock(7)")
    client = colour.client()

    def terminate() -> None:
        held_up = """
            select pg_terminate_backend(pid) from pg_stat_activity
            where wait_event = 'advisory' and datname = current_database()
        """
        assert eventually(lambda: conn.execute(held_up).fetchall())

    calls = [asked(client, EnqueueRequest("q", "t")) for _ in range(5)]
    _, *answers = meeting(colour, conn, client, calls, terminate)
    assert all(isinstance(answer, psycopg.OperationalError) for answer in answers)
    assert all("terminating connection" in str(answer) for answer in answers)
    assert len({id(answer) for answer in answers}) == 5 and count(conn) == 1
    conn.execute("select pg_advisory_unlock(7)")
    assert client.enqueue(EnqueueRequest("q", "t"))


def test_a_task_that_is_cancelled_takes_no_other_with_it(
    dsn: str, conn: psycopg.Connection
) -> None:
    async def run() -> list[Any]:
        async with AsyncClient(dsn) as client, await psycopg.AsyncConnection.connect(dsn) as block:
            await client.dlq.list(limit=1)
            await block.execute("lock table bgjob_job in share mode")
            tasks = [
                asyncio.create_task(client.enqueue(EnqueueRequest("q", f"t{n}"))) for n in range(5)
            ]
            while not conn.execute(LOCKED).fetchone():
                await asyncio.sleep(0)
            tasks[1].cancel()  # it waits for the next insert
            tasks[0].cancel()  # it is the insert under way
            while not (shared := client._shared._loops[asyncio.get_running_loop()])._tasks:
                await asyncio.sleep(0)
            while not conn.execute(LOCKED).fetchone() or shared._waiting:
                await asyncio.sleep(0)
            tasks[2].cancel()  # it is being written, with the others
            await block.rollback()
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 3 + [str] * 2
    types = {row[0] for row in conn.execute("select type from bgjob_job")}
    assert {"t3", "t4"} <= types <= {"t0", "t2", "t3", "t4"}  # t1 was never sent


@pytest.mark.both_colours
def test_an_enqueue_with_an_id_of_the_programs_holds_up_no_other(
    colour: Colour, conn: psycopg.Connection
) -> None:
    client = colour.client()
    with psycopg.connect(colour.dsn) as blocker, ThreadPoolExecutor(1) as thread:
        Client(colour.dsn).enqueue(EnqueueRequest("q", "t", id="a"), conn=blocker)

        async def free_async(c: AsyncClient) -> Any:
            return await c.enqueue(EnqueueRequest("q", "t"))

        def free(c: Client) -> Any:
            return c.enqueue(EnqueueRequest("q", "t"))

        taken = asked(client, EnqueueRequest("q", "t", id="a"), on_conflict="skip")
        running = thread.submit(
            colour.at_once, taken, free_async if colour.is_async else free, client=client
        )
        assert eventually(lambda: count(conn) == 1)  # while the other one waits
        blocker.commit()
        assert running.result()[0] is None
    assert not may_share(EnqueueRequest("q", "t", id="a"))
    assert not may_share(EnqueueRequest("q", "t", bytes(100_000)))
    assert not may_share(EnqueueRequest("q", "t", keep=60))
    assert may_share(EnqueueRequest("q", "t", delay=5))


# -- without a database ------------------------------------------------------------------


class Inserts:
    """Inserts that a test holds up and answers."""

    def __init__(self) -> None:
        self.alone: list[EnqueueRequest] = []
        self.together: list[list[EnqueueRequest]] = []
        self.go = threading.Event()
        self.error: BaseException | None = None
        self.shared = SharedInserts(self._alone, self._together)

    def _alone(self, request: EnqueueRequest) -> bool:
        self.alone.append(request)
        assert self.go.wait(PATIENCE)
        return True

    def _together(self, requests: Sequence[EnqueueRequest]) -> set[str]:
        self.together.append(list(requests))
        if self.error is not None:
            raise self.error
        return {request.id for request in requests}


def test_an_insert_that_takes_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bgjob._shared._SLOW", 0.001)
    inserts = Inserts()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(inserts.shared.write, EnqueueRequest("q", "slow"))
        assert eventually(lambda: inserts.alone)
        assert inserts.shared.write(EnqueueRequest("q", "t"))
        assert [len(batch) for batch in inserts.together] == [1] and not first.done()
        # The newest one has ended: nothing is waited for.
        inserts.go.set()
        assert inserts.shared.write(EnqueueRequest("q", "t")) and first.result()
    assert len(inserts.alone) == 2


def test_a_thread_that_is_interrupted_leaves_the_others_with_the_truth() -> None:
    inserts = Inserts()
    inserts.error = KeyboardInterrupt()
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(inserts.shared.write, EnqueueRequest("q", "first"))
        assert eventually(lambda: inserts.alone)
        others = [
            threads.submit(inserts.shared.write, EnqueueRequest("q", f"t{n}")) for n in range(2)
        ]
        assert eventually(lambda: len(inserts.shared._waiting) == 2)
        inserts.go.set()
        assert first.result()
        errors = sorted((type(other.exception()).__name__ for other in others), key=str)
    assert errors in (["KeyboardInterrupt", "OperationalError"], ["KeyboardInterrupt"] * 2)
    inserts.error = None
    assert inserts.shared.write(EnqueueRequest("q", "t"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_waits_for_no_insert_of_its_parent() -> None:
    inserts = Inserts()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(inserts.shared.write, EnqueueRequest("q", "t"))
        assert eventually(lambda: inserts.alone)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            inserts.go.set()
            os._exit(not inserts.shared.write(EnqueueRequest("q", "t")))
        _, status = os.waitpid(child, 0)
        inserts.go.set()
        assert os.waitstatus_to_exitcode(status) == 0 and first.result()
