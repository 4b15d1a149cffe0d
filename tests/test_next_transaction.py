"""A slot's next transaction begins in the message that commits its last one."""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, LiteralString

import psycopg
import pytest
from support.database import rows
from support.jobs import a_job
from support.waiting import PATIENCE, eventually
from support.workers import Style, both_styles
from typing_extensions import override

from bgjob import Client, Complete, EnqueueRequest, Job, Mux
from bgjob._engine.outcome import Committed, CommitUnknown, Fenced, Outcome
from bgjob._postgres.fork import ForkGuard
from bgjob._running.drive import drive, drive_async
from bgjob._running.loop import Loop
from bgjob._running.sessions import AsyncHandlerConnection, HandlerConnection
from bgjob._running.transaction import Transactions
from bgjob._sql.settlements import Claimed
from bgjob._worker.clock import ServerClock
from bgjob._worker.executor import Executor
from bgjob._worker.slots import Slots

TOKEN = 7

Statements = Generator[LiteralString, list[tuple[Any, ...]], None]
Run = Callable[[Job], Statements]
"""What a handler of either colour does: it yields statements, and receives their rows."""


class Counting(Transactions):
    """Counts the messages that only begin a transaction."""

    begun = 0

    @override
    def begin(self, claimed: Claimed) -> HandlerConnection:
        self.begun += 1
        return super().begin(claimed)

    @override
    async def begin_async(self, claimed: Claimed) -> AsyncHandlerConnection:
        self.begun += 1
        return await super().begin_async(claimed)


def _rows_of(cursor: psycopg.Cursor[Any]) -> list[tuple[Any, ...]]:
    return cursor.fetchall() if cursor.description else []


class Queue:
    """The slots of a queue, without a control thread, and what has become of their jobs."""

    def __init__(self, dsn: str, style: Style, run: Run, *, concurrency: int = 1) -> None:
        self._dsn = dsn
        self.ended: dict[str, Outcome] = {}
        self.transactions = Counting((dsn, {}), fork_guard := ForkGuard(), has_watch=True)

        def plain(job: Job, conn: psycopg.Connection[Any]) -> None:
            drive(run(job), lambda text: _rows_of(conn.execute(text)))

        async def coroutine(job: Job, conn: psycopg.AsyncConnection[Any]) -> None:
            async def take(text: LiteralString) -> list[tuple[Any, ...]]:
                cursor = await conn.execute(text)
                return await cursor.fetchall() if cursor.description else []

            await drive_async(run(job), take)

        handler: Any = plain if style == "plain" else coroutine
        self.slots = Slots(
            Mux().register("t", handler, transactional=True),
            self.transactions,
            fork_guard,
            queue="q",
            clock=ServerClock(),
            concurrency=concurrency,
            lease=30.0,
            started=None,
            timed_out=lambda *_: None,
            finished=lambda: None,
            idle=lambda: None,
            hindered=lambda _: None,
        )
        self.loop = Loop("loop")
        self.executor = Executor(self.slots, self.loop)

    def submit(self, *ids: str) -> None:
        """Enqueue, claim and hand out jobs."""
        with Client(self._dsn) as client, psycopg.connect(self._dsn, autocommit=True) as conn:
            client.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in ids])
            conn.execute(f"update bgjob_job set token = {TOKEN}, attempt = 1 where token is null")
        self.executor.submit([Claimed(a_job(id=id_), TOKEN) for id_ in ids])

    def turn(self) -> None:
        """Do what the control thread does between its exchanges."""
        self.executor.spread()
        for outcome in self.slots.collect():
            assert outcome.claimed.job.id not in self.ended
            self.ended[outcome.claimed.job.id] = outcome

    def wait(self, *ids: str) -> None:
        """Wait until jobs have ended."""

        def have_ended() -> bool:
            self.turn()
            return self.ended.keys() >= {*ids}

        assert eventually(have_ended), self.ended

    def close(self) -> None:
        self.executor.close()
        self.loop.close(PATIENCE)
        self.transactions.close()


@contextmanager
def working(dsn: str, style: Style, run: Run, *ids: str, concurrency: int = 1) -> Iterator[Queue]:
    queue = Queue(dsn, style, run, concurrency=concurrency)
    try:
        queue.submit(*ids)
        yield queue
    finally:
        queue.close()


def is_in_transaction(conn: psycopg.Connection) -> bool:
    """Whether a handler's session has an open transaction and runs no statement."""
    return bool(
        rows(
            conn,
            "select from pg_stat_activity where datname = current_database() "
            "and state like 'idle in transaction%%'",
        )
    )


@both_styles
def test_of_jobs_in_a_row_only_the_first_sends_a_message_to_begin(
    dsn: str, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute("create table ledger (job_id text, pid int)")
    conn.commit()
    ids = [f"job-{n}" for n in range(5)]

    def run(job: Job) -> Statements:
        yield f"insert into ledger values ('{job.id}', pg_backend_pid())"

    with working(dsn, style, run, *ids) as queue:
        queue.wait(*ids)
        assert queue.transactions.begun == 1
        assert all(isinstance(outcome.result, Committed) for outcome in queue.ended.values())
        assert eventually(lambda: not is_in_transaction(conn))
    written = rows(conn, "select job_id, pid from ledger order by 1")
    assert [id_ for id_, _ in written] == ids
    assert len({pid for _, pid in written}) == 1
    assert rows(conn, "select from bgjob_job") == []


LEFT: list[LiteralString] = [
    "set work_mem = '1MB'",
    "set my.own = 'set'",
    "set session characteristics as transaction isolation level serializable",
    "create temp table kept (n int)",
    "prepare p as select 1",
    "declare c cursor with hold for select 1",
    "select pg_advisory_lock(7)",
    "listen news",
]

STATE: LiteralString = """
    select current_setting('work_mem'), coalesce(current_setting('my.own', true), ''),
        current_setting('default_transaction_isolation'), to_regclass('kept')::text,
        (select count(*) from pg_prepared_statements where name not like 'bgjob%'),
        (select count(*) from pg_cursors where name <> ''),
        (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
        array(select pg_listening_channels()), current_setting('bgjob.claim'),
        current_setting('bgjob.committed')
"""


@both_styles
def test_what_a_handler_left_in_its_session_does_not_come_back_with_a_rollback(
    dsn: str, style: Style
) -> None:
    states: dict[str, list[tuple[Any, ...]]] = {}

    def run(job: Job) -> Statements:
        states[job.id] = yield STATE
        if job.id in ("first", "third"):
            for text in LEFT:
                yield text
        if job.id == "second":
            raise ValueError(job.id)

    ids = ["clean", "first", "second", "third", "fourth"]
    with working(dsn, style, run, *ids) as queue:
        queue.wait(*ids)
        assert queue.transactions.begun == 2  # a session whose transaction failed is closed
    assert [states[id_] for id_ in ids] == [states["clean"]] * len(ids)


@both_styles
def test_a_handler_may_choose_the_isolation_of_a_transaction_that_has_begun(
    dsn: str, style: Style
) -> None:
    levels: list[str] = []

    def run(_: Job) -> Statements:
        yield "set transaction isolation level repeatable read"
        levels.append((yield "show transaction_isolation")[0][0])

    with working(dsn, style, run, "a", "b", "c") as queue:
        queue.wait("a", "b", "c")
        assert queue.transactions.begun == 1
        assert all(isinstance(outcome.result, Committed) for outcome in queue.ended.values())
    assert levels == ["repeatable read"] * 3


@both_styles
def test_a_job_whose_claim_is_lost_begins_no_transaction_for_the_next(
    dsn: str, conn: psycopg.Connection, style: Style
) -> None:
    conn.autocommit = True
    lost = threading.Event()

    def run(job: Job) -> Statements:
        if job.id == "a" and not lost.is_set():
            conn.execute("update bgjob_job set token = token + 1 where id = 'a'")
            lost.set()
        yield "select 1"

    with working(dsn, style, run, "a", "b") as queue:
        queue.wait("a", "b")
        assert isinstance(queue.ended["a"].result, Fenced)
        assert isinstance(queue.ended["b"].result, Committed)
        assert queue.transactions.begun == 2
    assert rows(conn, "select id from bgjob_job") == [("a",)]


@both_styles
@pytest.mark.parametrize("ids", [["first", "spoiled"], ["first", "spoiled", "next"]])
def test_a_reset_that_fails_after_the_commit_leaves_it_to_the_row_what_has_become_of_the_job(
    dsn: str, conn: psycopg.Connection, style: Style, ids: list[str]
) -> None:
    conn.execute("create table ledger (job_id text)")
    conn.commit()

    def run(job: Job) -> Statements:
        yield f"insert into ledger values ('{job.id}')"
        if job.id == "spoiled":
            yield "deallocate bgjob_prepared"
            yield "prepare bgjob_prepared as select 1 / 0"

    with working(dsn, style, run, *ids) as queue:
        queue.wait(*ids)
        unknown = queue.ended.pop("spoiled").result
        assert isinstance(unknown, CommitUnknown)
        assert unknown.result == Complete()
        assert all(isinstance(outcome.result, Committed) for outcome in queue.ended.values())
        # The session is not used again.
        assert queue.transactions.begun == len(ids) - 1
    assert rows(conn, "select job_id from ledger") == [(id_,) for id_ in ids]
    assert rows(conn, "select from bgjob_job") == []


SLOW_COMMIT: LiteralString = """
    create table ledger (job_id text);
    create function wait() returns trigger language plpgsql as $$ begin
        perform pg_advisory_xact_lock(1); return null;
    end $$;
    create constraint trigger wait after insert on ledger
        deferrable initially deferred for each row execute function wait()
"""


@contextmanager
def slow_commit(
    dsn: str, conn: psycopg.Connection, style: Style
) -> Iterator[tuple[Queue, threading.Event]]:
    """Yield two slots: the first commits for as long as a lock is held, and `b` waits for that.

    The handler of the second runs until the event is set.
    """
    conn.autocommit = True
    conn.execute(SLOW_COMMIT)
    conn.execute("select pg_advisory_lock(1)")
    entered, released = threading.Event(), threading.Event()

    def run(job: Job) -> Statements:
        if job.id == "a":
            while not entered.is_set():
                yield "select pg_sleep(0.01)"
            yield "insert into ledger values ('a')"
        elif job.id == "other":
            entered.set()
            while not released.is_set():
                yield "select pg_sleep(0.01)"
        else:
            yield "select 1"

    with working(dsn, style, run, "a", "other", "b", concurrency=2) as queue:
        assert eventually(lambda: queue.executor.reservations.jobs)
        yield queue, released


@both_styles
def test_a_commit_that_takes_long_holds_up_no_job_while_another_slot_is_free(
    dsn: str, conn: psycopg.Connection, style: Style
) -> None:
    with slow_commit(dsn, conn, style) as (queue, released):
        assert queue.executor.reservations.overdue_at == inf  # no slot is free
        released.set()
        queue.wait("b", "other")
        assert "a" not in queue.ended
        conn.execute("select pg_advisory_unlock(1)")
        queue.wait("a")
        assert all(isinstance(outcome.result, Committed) for outcome in queue.ended.values())
        assert eventually(lambda: queue.slots.free == 2)
        assert eventually(lambda: not is_in_transaction(conn))


@both_styles
def test_a_job_that_waits_for_a_commit_is_released_by_a_shutdown(
    dsn: str, conn: psycopg.Connection, style: Style
) -> None:
    with slow_commit(dsn, conn, style) as (queue, released):
        withdrawn = queue.executor.withdraw([], is_end=True)
        assert [claimed.job.id for claimed in withdrawn] == ["b"]
        conn.execute("select pg_advisory_unlock(1)")
        released.set()
        queue.wait("a", "other")
        assert eventually(lambda: queue.slots.free == 2)
        assert eventually(lambda: not is_in_transaction(conn))
        assert "b" not in queue.ended


@both_styles
def test_a_reserved_job_is_not_taken_for_a_lost_one_when_slots_are_checked(
    dsn: str, style: Style
) -> None:
    ids = [f"job-{n}" for n in range(200)]

    def run(_: Job) -> Statements:
        yield "select 1"

    with working(dsn, style, run, *ids, concurrency=3) as queue:
        claims = [Claimed(a_job(id=id_), TOKEN) for id_ in ids]

        def all_ended() -> bool:
            queue.turn()
            held = [claimed for claimed in claims if claimed.job.id not in queue.ended]
            queue.executor.suspect()
            queue.executor.watch(lambda: held, PATIENCE)
            return not held

        assert eventually(all_ended), queue.ended
        assert all(isinstance(outcome.result, Committed) for outcome in queue.ended.values())
        assert queue.transactions.begun < len(ids) / 2
