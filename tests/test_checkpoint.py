"""A handler saves how far it is, and the next attempt goes on from there."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.checkpoints import ended, with_checkpoint
from support.database import all_done, count, row, rows
from support.jobs import a_job
from support.pages import opened
from support.plans import PLAN_CACHE_MODES, buffers, prepare, run
from support.statements import ask
from support.turns import Turns
from support.waiting import PATIENCE, eventually
from support.workers import Launcher, Recorder, Style, both_styles

from bgjob import (
    AsyncClient,
    BgjobError,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    LeaseLostError,
    MoveToDlq,
    Mux,
    PayloadError,
    Reschedule,
    Result,
    Retry,
    cli,
)
from bgjob._sql import repairs, settlements, steering, transactions, triage
from bgjob._sql.claims import CLAIMED_COLUMNS
from bgjob._sql.jobs import JobFilter
from bgjob._sql.settlements import Claimed
from bgjob._sql.statement import Statement
from bgjob.checkpoint import AsyncCheckpoint, Checkpoint
from bgjob.ext.web.redaction import MASK
from bgjob.testing import adrain, drain

EFFECT = "create table effect (job_id text, chunk int)"

INSERT = "insert into effect values (%s, %s)"


def saved(conn: psycopg.Connection, id_: str = "a") -> bytes | None:
    [value] = row(conn, "select checkpoint from bgjob_job where id = %s", id_)
    assert value is None or isinstance(value, bytes)
    return value


async def until(style: Style, condition: Callable[[], bool]) -> None:
    """Wait within a handler."""
    if style == "plain":
        assert eventually(condition)
        return
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


class Chunks:
    """A job of some chunks, each of which is an effect; `at` is awaited after each."""

    def __init__(self, count: int, at: Callable[[Job, int, Any], Awaitable[Result | None]]) -> None:
        self.count = count
        self.at = at
        self.began: list[int | None] = []
        """The value with which each attempt began."""

    async def __call__(self, job: Job, checkpoint: Any) -> Result | None:
        self.began.append(checkpoint.value)
        for number in range(checkpoint.value or 0, self.count):
            async with checkpoint.transaction() as conn:
                await conn.execute(INSERT, [job.id, number])
                await checkpoint.save(number + 1)
            assert checkpoint.value == number + 1
            if (result := await self.at(job, number, checkpoint)) is not None:
                return result
        return Complete()


@both_styles
def test_each_attempt_goes_on_where_the_one_before_was_and_each_chunk_has_its_effect_once(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)

    async def at(job: Job, number: int, _: Any) -> Result | None:
        if number == 3 and job.attempt == 1:
            raise RuntimeError("broken")
        if number == 5 and job.attempt == 2:
            return Retry(0, error="once more")
        if number == 7:
            return Reschedule(0)
        return None

    chunks = Chunks(10, at)
    mux = Mux().register("t", with_checkpoint(style, chunks), backoff=lambda _: 0)
    launcher.enqueue("a")
    launcher.start(mux)
    assert all_done(conn)
    assert chunks.began == [None, 4, 6, 8]
    assert rows(conn, "select * from effect order by 2") == [("a", n) for n in range(10)]


@both_styles
def test_what_fails_in_a_transaction_leaves_neither_its_effect_nor_its_value(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)
    seen: list[Any] = []

    async def body(job: Job, checkpoint: Any) -> Result | None:
        await checkpoint.save(1)
        with pytest.raises(ZeroDivisionError):
            async with checkpoint.transaction() as conn:
                await conn.execute(INSERT, [job.id, 2])
                await checkpoint.save(2)
                seen.append(checkpoint.value)  # not yet
                1 / 0
        seen.append(checkpoint.value)
        async with checkpoint.transaction() as conn:  # without a new value
            await conn.execute(INSERT, [job.id, 3])
        seen.append(checkpoint.value)
        return MoveToDlq("enough")

    launcher.enqueue("a")
    launcher.start(Mux().register("t", with_checkpoint(style, body)))
    assert eventually(lambda: count(conn, "bgjob_dead_job"))
    assert seen == [1, 1, 1]
    assert rows(conn, "select * from effect") == [("a", 3)]
    assert row(conn, "select checkpoint from bgjob_dead_job") == (b"1",)


@both_styles
def test_a_worker_that_lost_a_job_learns_it_at_its_next_save_and_changes_nothing(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)
    errors: list[BaseException] = []

    async def body(job: Job, checkpoint: Any) -> Result | None:
        await checkpoint.save(1)
        # As another worker's claim does, whose lease this one's had ended before.
        await taken(job)
        with pytest.raises(LeaseLostError, match="'a' of type 't' is not held any more") as lost:
            await checkpoint.save(2)
        errors.append(lost.value)
        async with checkpoint.transaction() as its:
            await its.execute(INSERT, [job.id, 2])
            await checkpoint.save(3)
        return Complete()

    async def taken(job: Job) -> None:
        conn.execute("update bgjob_job set token = 1, lease_until = now() + interval '1 h'")

    recorder = Recorder()
    launcher.enqueue("a")
    launcher.start(Mux().register("t", with_checkpoint(style, body)), observer=recorder)
    recorder.wait_for("lost", "a")
    assert errors
    assert saved(conn) == b"1"
    assert not count(conn, "effect")
    assert row(conn, "select attempt, token from bgjob_job") == (1, 1)
    assert not recorder.of("completed", "retried", "dead")


@both_styles
def test_a_job_that_is_cancelled_in_the_middle_keeps_what_it_saved_for_a_requeue(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)
    go_on, ended = threading.Event(), threading.Event()
    stopping: list[bool] = []

    async def body(job: Job, checkpoint: Any) -> Result | None:
        if job.attempt == 1 and checkpoint.value is None:
            try:
                async with checkpoint.transaction() as its:
                    await its.execute(INSERT, [job.id, 1])
                    await checkpoint.save(1)
                async with checkpoint.transaction() as its:
                    await its.execute(INSERT, [job.id, 2])
                    await checkpoint.save(2)
                    go_on.set()
                    if style == "coroutine":
                        await its.execute("select pg_sleep(60)")
                    else:
                        assert eventually(lambda: checkpoint.stopping)
            finally:
                stopping.append(checkpoint.stopping)
                ended.set()
        return Complete()

    recorder = Recorder()
    launcher.enqueue("a")
    launcher.start(Mux().register("t", with_checkpoint(style, body)), observer=recorder)
    assert go_on.wait(PATIENCE)
    launcher.client.jobs.cancel("a")
    recorder.wait_for("cancelled", "a")
    assert ended.wait(PATIENCE)
    assert stopping == [True] or style == "coroutine"  # which is cancelled first
    assert eventually(lambda: rows(conn, "select * from effect") == [("a", 1)])
    assert row(conn, "select checkpoint from bgjob_dead_job") == (b"1",)
    assert launcher.client.dlq.requeue("a") == ["a"]
    recorder.wait_for("completed", "a")
    assert rows(conn, "select * from effect") == [("a", 1)]


@both_styles
def test_a_shutdown_in_the_middle_gives_the_job_to_the_next_worker_with_its_attempt(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)
    enough = threading.Event()

    async def at(job: Job, number: int, checkpoint: Any) -> Result | None:
        if number == 2 and not enough.is_set():
            enough.set()
            await until(style, lambda: checkpoint.stopping)
        return Reschedule(0) if checkpoint.stopping else None

    chunks = Chunks(5, at)
    mux = Mux().register("t", with_checkpoint(style, chunks))
    launcher.enqueue("a")
    first = launcher.start(mux)
    assert enough.wait(PATIENCE)
    assert launcher.shutdown(first)
    assert row(conn, "select attempt, token, checkpoint from bgjob_job") == (0, None, b"3")
    launcher.start(mux)
    assert all_done(conn)
    assert chunks.began == [None, 3]
    assert rows(conn, "select * from effect order by 2") == [("a", n) for n in range(5)]


@both_styles
def test_a_shutdown_in_the_middle_gives_back_what_comes_after_it_of_its_key(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    """It is due later then, and so runs last, from where it was."""
    conn.execute(EFFECT)
    enough = threading.Event()

    async def at(job: Job, number: int, checkpoint: Any) -> Result | None:
        if number == 2 and not enough.is_set():
            enough.set()
            await until(style, lambda: checkpoint.stopping)
        return Reschedule(0) if checkpoint.stopping else None

    chunks = Chunks(4, at)
    mux = Mux().register("t", with_checkpoint(style, chunks))
    launcher.enqueue("a", "b", "c", exclusive="k")
    first = launcher.start(mux)
    assert enough.wait(PATIENCE)
    assert launcher.shutdown(first)
    query = "select id, attempt, token, checkpoint from bgjob_job order by id"
    assert rows(conn, query) == [("a", 0, None, b"3"), ("b", 0, None, None), ("c", 0, None, None)]
    launcher.start(mux)
    assert all_done(conn)
    assert chunks.began == [None, None, None, 3]
    order = [*("aaabbbbcccca")]
    assert [id_ for (id_,) in rows(conn, "select job_id from effect order by ctid")] == order


@both_styles
def test_a_timeout_ends_the_transaction_and_the_next_attempt_goes_on(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)
    began: list[Any] = []
    late: list[BaseException] = []
    go_on = threading.Event()

    async def body(job: Job, checkpoint: Any) -> Result | None:
        began.append(checkpoint.value)
        if job.attempt == 1:
            async with checkpoint.transaction() as its:
                await its.execute(INSERT, [job.id, 1])
                await checkpoint.save(1)
            try:
                async with checkpoint.transaction() as its:
                    await its.execute(INSERT, [job.id, 2])
                    await until(style, lambda: checkpoint.stopping or go_on.is_set())
                    await checkpoint.save(2)
                    await until(style, go_on.is_set)
            except BaseException as error:
                late.append(error)
                raise
        return Complete()

    recorder = Recorder()
    mux = Mux().register(
        "t", with_checkpoint(style, body), timeout=0.2, backoff=lambda _: 0, max_attempts=5
    )
    launcher.enqueue("a")
    launcher.start(mux, observer=recorder)
    recorder.wait_for("completed", "a")
    go_on.set()
    assert eventually(lambda: late)
    assert began == [None, 1]
    if style == "plain":
        assert isinstance(late[0], LeaseLostError)
    assert rows(conn, "select * from effect") == [("a", 1)]


@both_styles
def test_what_cannot_be_saved_is_refused_and_the_checkpoint_can_be_used_further(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    kept: list[Any] = []

    async def body(job: Job, checkpoint: Any) -> Result | None:
        kept.append(checkpoint)
        with pytest.raises(PayloadError, match="checkpoint of job type 't' must be int, not str"):
            await checkpoint.save("1")
        async with checkpoint.transaction():
            with pytest.raises(BgjobError, match="a transaction .* is open: end it"):
                async with checkpoint.transaction():
                    raise AssertionError
            await checkpoint.save(1)
        await checkpoint.save(2)
        return MoveToDlq("enough")

    launcher.enqueue("a")
    launcher.start(Mux().register("t", with_checkpoint(style, body)))
    assert eventually(lambda: count(conn, "bgjob_dead_job"))
    assert row(conn, "select checkpoint from bgjob_dead_job") == (b"2",)

    async def late() -> None:
        with pytest.raises(BgjobError, match="cannot be used: its handler has ended"):
            await kept[0].save(3)

    ended(late())


def test_a_value_of_over_a_million_bytes_is_refused(client: Client) -> None:
    def handle(job: Job, checkpoint: Checkpoint[str]) -> None:
        checkpoint.save("x" * 999_998)
        with pytest.raises(ValueError, match="has 1,000,001 bytes, and at most 1,000,000"):
            checkpoint.save("x" * 999_999)

    client.enqueue(EnqueueRequest("q", "t"))
    assert client.do("q", Mux().register("t", handle)) == Complete()


@both_styles
def test_a_handler_that_ends_its_transaction_itself_does_not_run_again(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)

    async def body(job: Job, checkpoint: Any) -> Result | None:
        async with checkpoint.transaction() as its:
            with pytest.raises(psycopg.ProgrammingError, match="a handler cannot commit"):
                await its.commit()
            await its.execute(INSERT, [job.id, 1])
            await its.execute("commit")
            await checkpoint.save(1)
        return Complete()

    recorder = Recorder()
    launcher.enqueue("a")
    launcher.start(Mux().register("t", with_checkpoint(style, body)), observer=recorder)
    recorder.wait_for("dead", "a")
    [(*_, error)] = recorder.of("dead")
    assert "ended the transaction of its checkpoint" in error
    assert row(conn, "select checkpoint from bgjob_dead_job") == (None,)


@both_styles
def test_a_transaction_that_a_handler_leaves_open_is_rolled_back(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute(EFFECT)
    left: list[Any] = []

    async def body(job: Job, checkpoint: Any) -> Result | None:
        context = checkpoint.transaction()
        left.append(context)
        its = await context.__aenter__()
        await its.execute(INSERT, [job.id, 1])
        return Complete()

    launcher.enqueue("a")
    launcher.start(Mux().register("t", with_checkpoint(style, body)))
    assert all_done(conn)
    assert count(conn, "effect") == 0
    opened = (
        "select pid from pg_stat_activity "
        "where datname = current_database() and state ~ 'in transaction'"
    )
    assert eventually(lambda: not rows(conn, opened))
    left.clear()


# -- where it is kept ------------------------------------------------------------------------


def test_a_requeue_keeps_a_checkpoint_unless_it_is_told_otherwise(
    colour: Any, conn: psycopg.Connection
) -> None:
    client = colour.client()
    conn.execute(
        "insert into bgjob_job (id, queue, type, checkpoint) values ('a', 'q', 't', '7'), "
        "('b', 'q', 't', '8')"
    )
    assert client.jobs.get("a").checkpoint == b"7"
    assert client.jobs.list().jobs[0].checkpoint is None
    client.jobs.cancel(["a", "b"])
    assert [dead.checkpoint for dead in client.dlq.list()] == [b"8", b"7"]
    client.dlq.requeue("a")
    client.dlq.requeue("b", keep_checkpoint=False)
    assert (saved(conn, "a"), saved(conn, "b")) == (b"7", None)


def test_a_newer_request_in_the_place_of_a_job_begins_from_the_start(
    plain_client: Client, conn: psycopg.Connection
) -> None:
    began: list[Any] = []

    def handle(job: Job, checkpoint: Checkpoint[int]) -> Result | None:
        began.append((job.json(), checkpoint.value))
        checkpoint.save(7)
        if len(began) == 1:
            return Reschedule(0)
        if len(began) == 2:  # while it runs
            plain_client.enqueue(EnqueueRequest("q", "t", 3, id="a"), on_conflict="replace")
        return None

    mux = Mux().register("t", handle)
    plain_client.enqueue(EnqueueRequest("q", "t", 1, id="a"))
    plain_client.do("q", mux)
    assert saved(conn) == b"7"
    plain_client.enqueue(EnqueueRequest("q", "t", 2, id="a"), on_conflict="replace")
    plain_client.do("q", mux)
    plain_client.do("q", mux)
    assert began == [(1, None), (2, None), (3, None)]


def test_a_save_is_a_heap_only_update_and_one_round_trip_on_a_session_that_is_kept(
    dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counted = """
        select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'bgjob_job'
    """

    def handle(job: Job, checkpoint: Checkpoint[int]) -> None:
        turns.begin()
        for number in range(30):
            checkpoint.save(number)
        counted_turns.append(turns.count())

    counted_turns: list[int] = []
    with Client(dsn) as client, closing(Turns(tmp_path, monkeypatch)) as turns:
        client.enqueue(EnqueueRequest("q", "t"))
        client.do("q", Mux().register("t", handle))
    assert eventually(lambda: row(conn, counted)[0] >= 31)  # when their session has ended
    assert row(conn, counted) == (31, 31)  # the claim, and each save
    assert counted_turns == [30]
    assert len(turns.sessions) == 1


@pytest.mark.both_colours
@both_styles
def test_handlers_may_hold_the_only_connection_of_the_pool_while_they_save(
    colour: Any, style: Style
) -> None:
    pool = colour.pool(size=1)
    client = colour.client(pool)

    async def body(job: Job, checkpoint: Any) -> Result | None:
        if style == "plain" and not colour.is_async:
            with pool.target.connection():
                await checkpoint.save(1)
        elif style == "coroutine" and colour.is_async:
            async with pool.target.connection():
                await checkpoint.save(1)
        else:
            await checkpoint.save(1)
        return None

    client.enqueue(EnqueueRequest("q", "t"))
    assert client.do("q", Mux().register("t", with_checkpoint(style, body))) == Complete()


# -- jobs without a worker ---------------------------------------------------------------------


@both_styles
def test_do_gives_a_checkpoint_too(colour: Any, conn: psycopg.Connection, style: Style) -> None:
    conn.execute(EFFECT)

    async def at(job: Job, number: int, checkpoint: Any) -> Result | None:
        return Reschedule(0) if number == 1 and not checkpoint.stopping else None

    chunks = Chunks(4, at)
    client, mux = colour.client(), Mux().register("t", with_checkpoint(style, chunks))
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    assert client.do("q", mux) == Reschedule(0)
    assert client.do("q", mux) == Complete()
    assert chunks.began == [None, 2]
    assert rows(conn, "select * from effect order by 2") == [("a", n) for n in range(4)]


@pytest.mark.parametrize("on", ["dsn", "connection"])
@both_styles
def test_drain_gives_a_checkpoint_too_also_within_the_transaction_of_the_test(
    dsn: str, conn: psycopg.Connection, style: Style, on: str
) -> None:
    conn.execute(EFFECT)

    async def at(job: Job, number: int, _: Any) -> Result | None:
        return Retry(0) if number == 1 else None

    chunks = Chunks(3, at)
    mux = Mux().register("t", with_checkpoint(style, chunks))

    async def drained() -> None:
        if on == "dsn":
            async with AsyncClient(dsn) as client:
                await client.enqueue(EnqueueRequest("q", "t", id="a"))
            assert len(await adrain(dsn, "q", mux)) == 2
            return
        async with await psycopg.AsyncConnection.connect(dsn) as its:
            async with AsyncClient(dsn) as client:
                await client.enqueue(EnqueueRequest("q", "t", id="a"), conn=its)
            assert len(await adrain(its, "q", mux)) == 2

    if style == "coroutine":
        asyncio.run(drained())
    elif on == "dsn":
        with Client(dsn) as client:
            client.enqueue(EnqueueRequest("q", "t", id="a"))
        assert len(drain(dsn, "q", mux)) == 2
    else:
        with psycopg.connect(dsn) as its, Client(dsn) as client:
            client.enqueue(EnqueueRequest("q", "t", id="a"), conn=its)
            assert len(drain(its, "q", mux)) == 2
            assert count(its) == 0
    assert chunks.began == [None, 2]
    assert rows(conn, "select chunk from effect order by 1") == [(0,), (1,), (2,)]


def test_a_drain_on_a_connection_of_the_other_colour_is_refused(dsn: str) -> None:
    async def handle(job: Job, checkpoint: AsyncCheckpoint) -> None: ...

    with psycopg.connect(dsn) as its, Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t"), conn=its)
        with pytest.raises(TypeError, match="which has a checkpoint, is a coroutine function"):
            drain(its, "q", Mux().register("t", handle))


# -- what it is --------------------------------------------------------------------------------


@dataclass
class Progress:
    files: list[str]
    at: datetime


def typed(job: Job, checkpoint: Checkpoint[Progress]) -> Result | None: ...
def written(job: Job, checkpoint: "Checkpoint[list[Progress]]") -> Result | None: ...
def bare(job: Job, *, checkpoint: Checkpoint) -> Result | None: ...
def without(job: Job, checkpoint) -> Result | None: ...  # type: ignore[no-untyped-def]


AT = datetime(2026, 11, 29, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    ("like", "value", "stored"),
    [
        (typed, Progress(["a"], AT), b'{"files":["a"],"at":"2026-11-29T03:00:00+00:00"}'),
        (written, [Progress([], AT)], b'[{"files":[],"at":"2026-11-29T03:00:00+00:00"}]'),
        (bare, {"n": [1, None]}, b'{"n":[1,null]}'),
        (without, "text", b'"text"'),
    ],
)
def test_a_value_comes_back_as_the_annotation_says(
    client: Client, conn: psycopg.Connection, like: Any, value: Any, stored: bytes
) -> None:
    seen: list[Any] = []

    @wraps(like)
    def handle(job: Job, checkpoint: Any) -> Result | None:
        seen.append(checkpoint.value)
        checkpoint.save(value)
        return Reschedule(0) if len(seen) == 1 else None

    client.enqueue(EnqueueRequest("q", "t", id="a"))
    mux = Mux().register("t", handle)
    client.do("q", mux)
    assert saved(conn) == stored
    client.do("q", mux)
    assert seen == [None, value]


def test_a_checkpoint_that_does_not_fit_moves_the_job_to_the_dead_letter_table_unchanged(
    client: Client, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, checkpoint) values ('a', 'q', 't', '{\"files\": 5}')"
    )
    result = client.do("q", Mux().register("t", typed))
    assert isinstance(result, MoveToDlq)
    assert isinstance(result.error, PayloadError)
    assert str(result.error) == ("checkpoint of job type 't': field 'files' must be list, not int")
    assert row(conn, "select checkpoint from bgjob_dead_job") == (b'{"files": 5}',)


def of_the_other_kind(job: Job, checkpoint: AsyncCheckpoint[int]) -> None: ...
async def of_the_plain_kind(job: Job, checkpoint: Checkpoint[int]) -> None: ...
def of_no_kind(job: Job, checkpoint: int) -> None: ...
def of_bytes(job: Job, checkpoint: Checkpoint[bytes]) -> None: ...
def unreadable(job: Job, checkpoint: "Checkpoint[Nowhere]") -> None: ...  # type: ignore[name-defined] # noqa: F821
def in_a_transaction(job: Job, conn: psycopg.Connection, checkpoint: Checkpoint) -> None: ...
def in_a_batch(jobs: list[Job], *, checkpoint: Checkpoint) -> None: ...


def in_its_place(job: Job, checkpoint: Checkpoint) -> None: ...


@pytest.mark.parametrize(
    ("handler", "options", "error"),
    [
        (of_the_other_kind, {}, r"a plain function is given a Checkpoint: annotate it Checkpoint"),
        (of_the_plain_kind, {}, r"a coroutine function is given an AsyncCheckpoint"),
        (of_no_kind, {}, r"checkpoint of handler of_no_kind .* is annotated int, but"),
        (of_bytes, {}, r"the checkpoint of handler of_bytes .*: JSON has no form for bytes"),
        (unreadable, {}, r"'Checkpoint\[Nowhere\]' .* cannot be read: name 'Nowhere'"),
        (in_a_transaction, {"transactional": True}, r"without transactional=True, and commit each"),
        (in_its_place, {"transactional": True}, r"without transactional=True, and commit each"),
        (in_a_batch, {"batch": 5}, r"has both batch= and a parameter checkpoint"),
    ],
)
def test_a_parameter_that_cannot_be_given_a_checkpoint_is_refused_at_the_registration(
    handler: Any, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(TypeError, match=error):
        Mux().register("t", handler, **options)


@both_styles
def test_middleware_is_called_with_the_job_alone(client: Client, style: Style) -> None:
    async def body(job: Job, checkpoint: Any) -> Result | None:
        await checkpoint.save(5)
        return None

    seen: list[Any] = []

    def middleware(call: Any) -> Any:
        if style == "plain":

            def plain(*args: Any) -> Any:
                seen.append(args)
                call(*args)
                return call(*args)  # which finds what was saved

            return plain

        async def coroutine(*args: Any) -> Any:
            seen.append(args)
            return await call(*args)

        return coroutine

    client.enqueue(EnqueueRequest("q", "t", id="a"))
    mux = Mux(middleware=[middleware]).register("t", with_checkpoint(style, body))
    assert client.do("q", mux) == Complete()
    [[job]] = seen
    assert job.id == "a"


def test_a_wrapper_that_hides_a_coroutine_is_refused_with_the_remedy(client: Client) -> None:
    async def hidden(job: Job, checkpoint: Any) -> None: ...

    def wrapper(job: Job, checkpoint: Any) -> Any:
        return hidden(job, checkpoint)

    client.enqueue(EnqueueRequest("q", "t"))
    result = client.do("q", Mux().register("t", wrapper))
    assert isinstance(result, MoveToDlq)
    assert "must be a coroutine function itself" in str(result.error)


def test_a_job_that_was_lost_before_its_handler_began_is_not_run(
    dsn: str, conn: psycopg.Connection
) -> None:
    def parameters() -> str:  # asked for each session: for that of the checkpoint, too
        conn.execute("update bgjob_job set token = 1 where token is not null")
        return dsn

    ran: list[Job] = []

    def handle(job: Job, checkpoint: Checkpoint) -> None:
        ran.append(job)

    with Client(parameters) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        with pytest.raises(LeaseLostError, match="it had not started"):
            client.do("q", Mux().register("t", handle))
    assert not ran


# -- who sees it -------------------------------------------------------------------------------


def test_whatever_moves_a_job_to_the_dead_letter_table_takes_its_checkpoint_along(
    conn: psycopg.Connection,
) -> None:
    held = Claimed(a_job(id="a"), 1)

    def gone(statement: Statement[Any]) -> bytes | None:
        with conn.transaction(force_rollback=True):
            conn.execute(
                "insert into bgjob_job (id, queue, type, token, attempt, checkpoint) "
                "values ('a', 'q', 't', %s, 1, '7')",
                [None if statement.params and "attempt" in statement.params else 1],
            )
            [(place,)] = rows(conn, "select ctid::text from bgjob_job")
            params = {
                name: place if name == "place" else f'{{"{place}"}}' if name == "places" else value
                for name, value in (statement.params or {}).items()
            }
            ask(conn, statement._replace(params=params))
            [value] = row(conn, "select checkpoint from bgjob_dead_job")
            assert isinstance(value, bytes)
            return value

    one = JobFilter()
    for statement in (
        settlements.dead_letter([settlements.DeadLettered(held, "e", 1)]),
        steering.cancel(["a"], one, by=None, reason=""),
        steering.abandon(["a"], one, by=None, reason=""),
        repairs.dead_letter_unread([""], [1], "e"),
        repairs.dead_letter_refused("", "e"),
        triage.give_up("a", 1, 1),
    ):
        assert gone(statement) == b"7"


def test_the_commands_show_a_checkpoint_and_can_drop_it(
    dsn: str,
    conn: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*args: str) -> str:
        assert cli.main([*args]) == 0
        return capsys.readouterr().out

    monkeypatch.setenv("BGJOB_DSN", dsn)
    conn.execute(
        "insert into bgjob_job (id, queue, type, token, lease_until, attempt, checkpoint) "
        "values ('a', 'q', 't', 1, now() + interval '1 h', 1, '{\"line\": 7}')"
    )
    assert 'checkpoint    {"line": 7}' in run("job", "show", "a")
    assert json.loads(run("job", "show", "a", "--json"))["checkpoint"] == {"line": 7}
    assert "It has saved a checkpoint of 11 bytes: bgjob job show a" in run("explain", "a")
    run("job", "cancel", "a")
    assert 'checkpoint    {"line": 7}' in run("dlq", "show", "a")
    assert json.loads(run("dlq", "show", "a", "--json"))["checkpoint"] == {"line": 7}
    run("dlq", "requeue", "--id", "a")
    assert saved(conn) == b'{"line": 7}'
    run("job", "cancel", "a")
    run("dlq", "requeue", "--id", "a", "--drop-checkpoint")
    assert saved(conn) is None


def test_the_page_shows_a_checkpoint_as_it_shows_a_payload(
    dsn: str, conn: psycopg.Connection, plain_client: Client
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, checkpoint) select id, 'q', 't', "
        '\'{"line": "</pre><b>", "token": "hunter2"}\' from unnest(\'{a,b}\'::text[]) as id'
    )
    plain_client.jobs.cancel("b")
    for url in ("/jobs/a", "/dead/1"):
        with opened(dsn) as pages:
            shown = pages.json(url)["checkpoint"]
            assert json.loads(shown["text"]) == {"line": "</pre><b>", "token": MASK}
            assert not shown["download"]
            assert "hunter2" in pages.json(f"{url}?payload=show")["checkpoint"]["text"]
            text = pages.get(url).text
            assert "<h2>Checkpoint</h2>" in text and "&lt;/pre&gt;" in text and "<b>" not in text
        with opened(dsn, payloads="hide") as pages:
            assert pages.json(url)["checkpoint"]["state"] == "hidden"
    plain_client.enqueue(EnqueueRequest("q", "t", id="c"))
    with opened(dsn) as pages:
        assert "<h2>Checkpoint</h2>" not in pages.get("/jobs/c").text


# -- what nobody uses costs nothing ------------------------------------------------------------


def test_a_handler_without_a_checkpoint_costs_no_column_no_statement_and_no_import() -> None:
    assert "checkpoint" not in CLAIMED_COLUMNS
    assert "checkpoint" not in settlements.complete([Claimed(a_job(), 1)]).text
    program = (
        "import sys, bgjob, bgjob.worker; bgjob.Mux().register('t', lambda job: None); "
        "print([name for name in sys.modules if 'checkpoint' in name])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert said.stdout.strip() == b"[]"


@pytest.mark.parametrize("mode", PLAN_CACHE_MODES)
def test_a_save_finds_its_row_by_its_id_whatever_the_statistics_say(
    conn: psycopg.Connection, mode: str
) -> None:
    conn.execute("alter table bgjob_job set (autovacuum_enabled = off)")
    conn.execute("analyze bgjob_job")
    conn.execute(
        "insert into bgjob_job (id, queue, type, token) "
        "select n::text, 'q', 't', 1 from generate_series(1, 5000) n"
    )
    held = Claimed(a_job(id="2500"), 1)
    for name, statement in {
        "load": transactions.checkpoint(held),
        "save": transactions.save_checkpoint(held, b"7", lease=30),
        "extend": transactions.save_checkpoint(held, None, lease=30),
    }.items():
        assert buffers(run(conn, prepare(conn, name, statement), mode)) < 10
