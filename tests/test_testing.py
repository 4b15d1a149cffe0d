"""Jobs are run and asserted in a test's own transaction."""

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeAlias

import psycopg
import pytest
from psycopg import AsyncConnection, Connection
from psycopg.rows import dict_row
from support.jobs import a_job

import bgjob
from bgjob import (
    AsyncClient,
    BgjobError,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    JobCompleted,
    JobStarted,
    LeaseLostError,
    MoveToDlq,
    Mux,
    QueueIsEmpty,
    QueueRequiredError,
    Reschedule,
    Result,
    Retry,
    UnknownTypeError,
    WorkerError,
)
from bgjob._sql.claims import _CLAIM_ANY, _CLAIM_NOW
from bgjob.testing import (
    Ran,
    RecordingObserver,
    aassert_enqueued,
    aassert_not_enqueued,
    adrain,
    assert_enqueued,
    assert_not_enqueued,
    drain,
)

Place: TypeAlias = Literal["transaction", "autocommit", "client", "string"]
"""The source that a test drains: its own connection, in two ways, or one that connects."""


class Bench:
    """Drains in either colour, from any source that a test has."""

    def __init__(self, dsn: str, place: Place, *, is_async: bool) -> None:
        self.dsn, self.place, self.is_async = dsn, place, is_async
        self._runner = asyncio.Runner()
        self._stack, self._async_stack = ExitStack(), AsyncExitStack()
        own = place in ("transaction", "autocommit")
        autocommit = place == "autocommit"
        self.conn: Any = None
        self.client: Any
        if is_async:
            self.client = self._run(self._async_stack.enter_async_context(AsyncClient(dsn)))
            if own:
                opened = self._run(AsyncConnection.connect(dsn, autocommit=autocommit))
                self.conn = self._run(self._async_stack.enter_async_context(opened))
        else:
            self.client = self._stack.enter_context(Client(dsn))
            if own:
                opened = Connection.connect(dsn, autocommit=autocommit)
                self.conn = self._stack.enter_context(opened)
        self.source: Any = self.conn or {"client": self.client, "string": dsn}[place]

    def _run(self, answer: Any) -> Any:
        return self._runner.run(answer) if inspect.iscoroutine(answer) else answer

    def enqueue(self, type: str = "t", arg: Any = None, **options: Any) -> None:
        request = EnqueueRequest(options.pop("queue", "q"), type, arg, **options)
        self._run(self.client.enqueue(request, conn=self.conn))

    def drain(self, mux: Mux, queue: str = "q", **options: Any) -> list[Ran]:
        ran: list[Ran] = self._run(
            (adrain if self.is_async else drain)(self.source, queue, mux, **options)
        )
        return ran

    def query(self, text: str) -> list[tuple[Any, ...]]:
        """Run a query where the jobs are visible."""

        async def ask() -> Any:
            return await (await self.conn.execute(text)).fetchall()

        if self.conn is None:
            with psycopg.connect(self.dsn) as conn:
                return conn.execute(text.encode()).fetchall()
        found: list[tuple[Any, ...]] = (
            self._run(ask()) if self.is_async else self.conn.execute(text).fetchall()
        )
        return found

    def rollback(self) -> None:
        self._run(self.conn.rollback())

    def handler(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """Make a handler of this colour."""
        if not self.is_async:
            return body

        async def coroutine(*args: Any) -> Any:
            answer = body(*args)
            return await answer if inspect.isawaitable(answer) else answer

        return coroutine

    def close(self) -> None:
        self._run(self._async_stack.aclose())
        self._stack.close()
        self._runner.close()


PLACES: list[Place] = ["transaction", "autocommit", "client", "string"]


def benches(*places: Place) -> pytest.MarkDecorator:
    """Parametrize by colour, and by where the jobs are."""
    return pytest.mark.parametrize(
        "bench",
        [(place, is_async) for place in places for is_async in (False, True)],
        indirect=True,
        ids=lambda p: f"{'async' if p[1] else 'plain'}-{p[0]}",
    )


@pytest.fixture
def bench(request: pytest.FixtureRequest, dsn: str) -> Iterator[Bench]:
    place, is_async = request.param
    bench = Bench(dsn, place, is_async=is_async)
    try:
        yield bench
    finally:
        bench.close()


def ids(ran: list[Ran]) -> list[str]:
    return [job.id for job, _ in ran]


def noop(_: Job) -> None: ...


# -- drain: what runs -------------------------------------------------------------------------


@benches(*PLACES)
def test_due_jobs_run_by_priority_and_due_time_and_others_stay(bench: Bench) -> None:
    seen: list[Job] = []
    bench.query("select 1")  # a transaction whose now() stands still from here on
    bench.enqueue(id="second", arg={"n": 1})
    bench.enqueue(id="third")
    bench.enqueue(id="first", priority=-1)
    bench.enqueue(id="later", delay=3600)
    bench.enqueue(id="elsewhere", queue="other")

    ran = bench.drain(Mux().register("t", bench.handler(seen.append)))

    assert ids(ran) == [job.id for job in seen] == ["first", "second", "third"]
    assert all(result == Complete() for _, result in ran)
    assert [job.attempt for job, _ in ran] == [1, 1, 1]
    assert seen[1].json() == {"n": 1}
    assert sorted(bench.query("select id from bgjob_job")) == [("elsewhere",), ("later",)]
    assert bench.drain(Mux()) == []


@benches("transaction")
def test_nothing_is_left_of_it_when_the_test_rolls_back(
    bench: Bench, conn: psycopg.Connection
) -> None:
    conn.execute("insert into bgjob_job (id, queue, type) values ('committed', 'q', 't')")
    bench.enqueue(id="uncommitted")
    bench.enqueue("bad", id="bad")
    mux = Mux().register("t", noop).register("bad", lambda _: MoveToDlq("why"))
    assert ids(bench.drain(mux)) == ["committed", "uncommitted", "bad"]
    assert bench.query("select id from bgjob_job") == []
    # Not even a worker that looks meanwhile has the job that was there before.
    with Client(bench.dsn) as client, pytest.raises(bgjob.EmptyQueueError):
        client.do("q", mux)
    bench.rollback()
    assert conn.execute("select id, attempt, token from bgjob_job").fetchall() == [
        ("committed", 0, None)
    ]
    assert conn.execute("select count(*) from bgjob_dead_job").fetchone() == (0,)


@benches("transaction", "client")
def test_jobs_that_handlers_enqueue_run_too(bench: Bench) -> None:
    def parent(job: Job) -> Any:
        if job.arg is None:
            return None
        left = job.json()
        request = EnqueueRequest("q", "t", left - 1 or None, id=f"child-{left}")
        return bench.client.enqueue(request, conn=bench.conn)

    def body(job: Job) -> Any:
        answer = parent(job)
        if not inspect.isawaitable(answer):
            return None

        async def enqueue() -> None:
            await answer

        return enqueue()

    bench.enqueue(arg=3, id="root")
    assert ids(bench.drain(Mux().register("t", bench.handler(body)))) == [
        "root",
        "child-3",
        "child-2",
        "child-1",
    ]


@benches(*PLACES)
def test_plain_and_coroutine_handlers_mix(bench: Bench) -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    threads: list[int] = []

    async def coroutine(_: Job) -> None:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())

    mux = Mux().register("plain", lambda _: threads.append(threading.get_ident()))
    mux.register("coroutine", coroutine)
    for number, type_ in enumerate(["coroutine", "plain", "coroutine"]):
        bench.enqueue(type_, id=str(number))
    assert ids(bench.drain(mux)) == ["0", "1", "2"]
    assert loops[0] is loops[1]
    assert bench.is_async or threads == [threading.get_ident()]


@benches("transaction", "string")
def test_a_limit_ends_it(bench: Bench) -> None:
    for number in range(3):
        bench.enqueue(id=str(number))
    mux = Mux().register("t", noop)
    assert ids(bench.drain(mux, limit=2)) == ["0", "1"]
    assert ids(bench.drain(mux, limit=2)) == ["2"]


def test_a_job_that_is_rescheduled_without_end_is_reported(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgjob.testing._draining._ENDLESS", 50)
    runs: list[Job] = []
    with psycopg.connect(dsn) as conn, Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "again", id="it"), conn=conn)

        def again(job: Job) -> Result:
            runs.append(job)
            return Reschedule(0)

        mux = Mux().register("again", again)
        with pytest.raises(BgjobError, match="50 jobs ran and another is due, 'it' of type 'agai"):
            drain(conn, "q", mux)
        assert len(runs) == 50
        assert len(drain(conn, "q", mux, limit=60)) == 60


# -- drain: results ---------------------------------------------------------------------------


@benches("transaction", "client")
def test_every_result_is_stored_as_by_a_worker(bench: Bench) -> None:
    def act(job: Job) -> Result | None:
        match job.id:
            case "retry":
                return Retry(60, ValueError("why"))
            case "at once" if job.attempt == 1:
                return Retry(0, "once")
            case "reschedule":
                return Reschedule(timedelta(minutes=1))
            case "dlq":
                return MoveToDlq(ValueError("never"))
        return None

    for id_ in ("retry", "at once", "reschedule", "dlq"):
        bench.enqueue(id=id_)
    mux = Mux().register("t", bench.handler(act))
    results = [(job.id, job.attempt, type(result)) for job, result in bench.drain(mux)]
    assert results == [
        ("retry", 1, Retry),
        ("at once", 1, Retry),
        ("reschedule", 1, Reschedule),
        ("dlq", 1, MoveToDlq),
        ("at once", 2, Complete),
    ]
    waiting = bench.query(
        "select id, attempt, last_error, token, lease_until, "
        "next_run_at > clock_timestamp() + interval '50 seconds' from bgjob_job order by id"
    )
    assert waiting == [
        ("reschedule", 0, None, None, None, True),
        ("retry", 1, "ValueError: why", None, None, True),
    ]
    dead = bench.query("select job_id, last_error from bgjob_dead_job")
    assert dead == [("dlq", "ValueError: never")]


class Boom(Exception):
    pass


@benches(*PLACES)
@pytest.mark.parametrize("transactional", [False, True])
def test_a_handlers_exception_is_stored_and_raised_with_its_traceback(
    bench: Bench, transactional: bool
) -> None:
    def explode(*_: Any) -> None:
        raise Boom("why")

    bench.enqueue(id="bad")
    bench.enqueue(id="next")
    mux = Mux().register("t", bench.handler(explode), transactional=transactional)  # type: ignore[call-overload]
    with pytest.raises(Boom, match="why") as caught:
        bench.drain(mux)
    assert [frame.name for frame in caught.traceback][-1] == "explode"
    assert caught.value.__notes__ == ["of job 'bad' of type 't', attempt 1"]
    stored = bench.query(
        "select id, attempt, split_part(last_error, e'\\n', 1), token from bgjob_job order by id"
    )
    assert stored == [("bad", 1, "Boom: why", None), ("next", 0, None, None)]


@benches("transaction", "client")
def test_an_exception_is_stored_and_the_rest_runs_with_on_error_store(bench: Bench) -> None:
    def explode(job: Job) -> None:
        if job.id == "bad":
            raise Boom("why")

    bench.enqueue(id="bad")
    bench.enqueue(id="next")
    mux = Mux().register("t", bench.handler(explode), max_attempts=2, backoff=lambda _: 0.0)
    ran = bench.drain(mux, on_error="store")
    assert ids(ran) == ["bad", "next", "bad"]
    assert [type(result) for _, result in ran] == [Retry, Complete, MoveToDlq]
    assert bench.query("select job_id, attempt from bgjob_dead_job") == [("bad", 2)]


@benches("transaction", "client")
@pytest.mark.parametrize("on_error", ["raise", "store"])
def test_an_interrupt_is_always_raised(bench: Bench, on_error: str) -> None:
    class Stop(BaseException):
        pass

    def stop(_: Job) -> None:
        raise Stop

    bench.enqueue(id="a")
    with pytest.raises(Stop):
        bench.drain(Mux().register("t", bench.handler(stop)), on_error=on_error)
    assert bench.query("select attempt, token from bgjob_job") == [(1, None)]


@benches("transaction", "string")
def test_a_value_that_is_not_a_result_and_an_unknown_type_are_raised(bench: Bench) -> None:
    bench.enqueue("odd")
    mux = Mux().register("odd", bench.handler(lambda _: 7))
    with pytest.raises(TypeError, match="of job type 'odd' returned int"):
        bench.drain(mux)
    bench.enqueue("strange", id="s")
    with pytest.raises(UnknownTypeError, match="no handler is registered for job type 'strange'"):
        bench.drain(mux)
    assert bench.query("select job_id from bgjob_dead_job") == [("s",)]


def test_a_job_whose_worker_died_at_its_last_attempt_goes_to_the_dlq(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, attempt, deaths, token, lease_until) "
        "values ('killer', 'q', 't', 4, 3, 7, clock_timestamp() - interval '1 s')"
    )
    [(job, result)] = drain(dsn, "q", Mux().register("t", noop, max_attempts=2))
    assert job.attempt == 5
    assert isinstance(result, MoveToDlq) and "out of attempts" in str(result.error)


@benches("transaction", "autocommit", "client")
def test_a_job_that_another_worker_holds_is_left_alone(
    bench: Bench, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_job (id, queue, type, attempt, token, lease_until) "
        "values ('held', 'q', 't', 1, 7, clock_timestamp() + interval '30 s')"
    )
    mux = Mux().register("t", noop)
    assert bench.drain(mux, within=3600) == []
    assert conn.execute("select token from bgjob_job").fetchone() == (7,)


@benches("autocommit", "client")
def test_a_job_that_was_taken_away_meanwhile_is_an_error(
    bench: Bench, conn: psycopg.Connection
) -> None:
    bench.enqueue(id="a")
    mux = Mux().register("t", lambda _: (conn.execute("delete from bgjob_job"), None)[1])
    with pytest.raises(LeaseLostError, match="job 'a' of type 't' was gone or no longer held"):
        bench.drain(mux)


# -- drain: transactions ------------------------------------------------------------------------


@benches(*PLACES)
def test_a_transactional_handler_shares_the_tests_transaction(bench: Bench) -> None:
    given: list[Any] = []

    def body(job: Job, conn: Any) -> Any:
        given.append(conn)
        insert = conn.execute("insert into effect values (%s)", [f"{job.id} {job.attempt}"])
        enqueue = bench.client.enqueue(EnqueueRequest("q", "child", id=f"of {job.id}"), conn=conn)
        result = {"retry": Retry(60), "dlq": MoveToDlq("why")}.get(job.id)
        if not inspect.isawaitable(insert):
            return result

        async def both() -> Any:
            await insert
            await enqueue
            return result

        return both()

    with psycopg.connect(bench.dsn) as conn:
        conn.execute("create table effect (what text)")
    for id_ in ("done", "retry", "dlq"):
        bench.enqueue(id=id_)
    mux = Mux().register("child", noop)
    mux.register("t", bench.handler(body), transactional=True)
    ran = bench.drain(mux)
    assert sorted(ids(ran)) == ["dlq", "done", "of dlq", "of done", "retry"]
    assert sorted(bench.query("select what from effect")) == [("dlq 1",), ("done 1",)]
    assert bench.query("select id, attempt from bgjob_job") == [("retry", 1)]
    own = bench.place in ("transaction", "autocommit")
    assert all((conn is bench.conn) is own for conn in given)
    if bench.place == "transaction":
        bench.rollback()
        assert bench.query("select what from effect") == []


@benches("transaction", "autocommit", "client")
def test_sql_that_fails_in_a_transactional_handler_leaves_the_transaction_usable(
    bench: Bench,
) -> None:
    def body(_: Job, conn: Any) -> Any:
        answer = conn.execute("insert into nowhere values (1)")

        async def swallow() -> None:
            with suppress(psycopg.Error):
                await answer

        return swallow() if inspect.isawaitable(answer) else None

    def swallowing(job: Job, conn: Any) -> Any:
        with suppress(psycopg.Error):
            return body(job, conn)

    bench.enqueue(id="bad")
    bench.enqueue("plain", id="good")
    mux = Mux().register("plain", noop)
    mux.register("t", bench.handler(swallowing), transactional=True)
    ran = bench.drain(mux, on_error="store")
    assert ids(ran) == ["bad", "good"]
    assert isinstance(ran[0].result, Retry)
    assert isinstance(ran[0].result.error, psycopg.errors.InFailedSqlTransaction)
    assert bench.query("select id, attempt from bgjob_job") == [("bad", 1)]


@benches("transaction")
def test_an_answer_that_could_not_be_stored_does_not_hide_why(bench: Bench) -> None:
    def swallowing(_: Job, conn: Any) -> Any:
        answer: Any = None
        with suppress(psycopg.Error):
            answer = conn.execute("insert into nowhere values (1)")

        async def swallow() -> Result:
            with suppress(psycopg.Error):
                await answer
            return MoveToDlq("never")

        return swallow() if inspect.isawaitable(answer) else MoveToDlq("never")

    bench.enqueue(id="bad")
    mux = Mux().register("t", bench.handler(swallowing), transactional=True)
    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        bench.drain(mux)
    assert bench.query("select id, attempt from bgjob_job") == [("bad", 1)]


@benches("transaction")
def test_the_error_is_the_handlers_where_it_spoiled_the_tests_transaction(bench: Bench) -> None:
    bench.enqueue(id="bad")
    wrong = bench.handler(lambda _: bench.conn.execute("insert into nowhere values (1)"))
    with pytest.raises(psycopg.errors.UndefinedTable):
        bench.drain(Mux().register("t", wrong))


@benches("transaction", "autocommit")
def test_a_transactional_handler_that_ends_the_transaction_gets_an_error_that_names_it(
    bench: Bench,
) -> None:
    def commit(_: Job, conn: Any) -> Any:
        answer = conn.execute("commit")

        async def nothing() -> None:
            await answer

        return nothing() if inspect.isawaitable(answer) else None

    bench.enqueue(id="bad")
    mux = Mux().register("t", bench.handler(commit), transactional=True)
    with pytest.raises(BgjobError, match="ended the transaction it was given"):
        bench.drain(mux)
    assert bench.query("select job_id from bgjob_dead_job") == [("bad",)]


@benches("transaction")
def test_a_transactional_handler_may_not_commit(bench: Bench) -> None:
    bench.enqueue(id="bad")
    mux = Mux().register("t", bench.handler(lambda _, conn: conn.commit()), transactional=True)
    with pytest.raises(psycopg.ProgrammingError, match=r"commit\(\) forbidden"):
        bench.drain(mux)


@benches("autocommit")
def test_a_transactional_handler_that_lost_its_job_has_no_effect(
    bench: Bench, conn: psycopg.Connection
) -> None:
    conn.execute("create table effect (what text)")

    def body(job: Job, own: Any) -> Any:
        answer = own.execute("insert into effect values ('late')")
        conn.execute("update bgjob_job set token = 7")

        async def late() -> None:
            await answer

        return late() if inspect.isawaitable(answer) else None

    bench.enqueue(id="a")
    mux = Mux().register("t", bench.handler(body), transactional=True)
    with pytest.raises(LeaseLostError):
        bench.drain(mux)
    assert bench.query("select what from effect") == []


@pytest.mark.both_colours
@benches("transaction")
def test_a_handler_of_the_other_colour_cannot_have_the_tests_transaction(bench: Bench) -> None:
    async def coroutine(_: Job, __: Any) -> None: ...

    def plain(_: Job, __: Any) -> None: ...

    bench.enqueue(id="a")
    wrong: Any = plain if bench.is_async else coroutine
    mux = Mux().register("t", wrong, transactional=True)
    remedy = "use drain()" if bench.is_async else "use adrain()"
    with pytest.raises(TypeError) as caught:
        bench.drain(mux)
    assert remedy in str(caught.value) and "connection string" in str(caught.value)


@benches("client", "string")
def test_transactional_handlers_of_both_colours_run_elsewhere(bench: Bench) -> None:
    given: list[type] = []

    async def coroutine(_: Job, conn: AsyncConnection[Any]) -> None:
        await conn.execute("select 1")
        given.append(AsyncConnection if isinstance(conn, AsyncConnection) else type(conn))

    def plain(_: Job, conn: Connection[Any]) -> None:
        conn.execute("select 1")
        given.append(Connection if isinstance(conn, Connection) else type(conn))

    mux = Mux().register("coroutine", coroutine, transactional=True)
    mux.register("plain", plain, transactional=True)
    bench.enqueue("coroutine")
    bench.enqueue("plain")
    assert [result for _, result in bench.drain(mux)] == [Complete()] * 2
    assert given == [AsyncConnection, Connection]


@benches("client")
def test_a_commit_that_fails_is_raised(bench: Bench, conn: psycopg.Connection) -> None:
    conn.execute("create table effect (what text unique deferrable initially deferred)")
    conn.execute("insert into effect values ('x')")

    def body(_: Job, own: Any) -> Any:
        answer = own.execute("insert into effect values ('x')")

        async def insert() -> None:
            await answer

        return insert() if inspect.isawaitable(answer) else None

    bench.enqueue(id="a")
    mux = Mux().register("t", bench.handler(body), transactional=True)
    with pytest.raises(psycopg.errors.UniqueViolation):
        bench.drain(mux)
    assert conn.execute("select id, attempt, token from bgjob_job").fetchall() == [("a", 1, None)]


def test_factories_of_the_tests_connection_do_not_matter(dsn: str) -> None:
    found: list[Any] = []

    def look(_: Job, conn: Connection[Any]) -> None:
        found.append(conn.execute("select 1 as one").fetchone())

    with psycopg.connect(dsn, row_factory=dict_row) as conn, Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="a"), conn=conn)
        assert [job.id for job in assert_enqueued(conn)] == ["a"]
        ran = drain(conn, "q", Mux().register("t", look, transactional=True), within=1)
        assert (ids(ran), found) == (["a"], [{"one": 1}])


# -- drain: time ----------------------------------------------------------------------------------


@benches(*PLACES)
def test_time_passes_without_waiting(bench: Bench) -> None:
    order: list[tuple[str, int]] = []

    def act(job: Job) -> Result | None:
        order.append((job.id, job.attempt))
        if job.id == "failing":
            return Retry(error="again")
        return Reschedule(1200) if job.id == "periodic" else None

    backoff = [60, 600, 6000].__getitem__
    mux = Mux().register("t", bench.handler(act), backoff=lambda attempt: backoff(attempt - 1))
    bench.enqueue(id="soon", delay=30, priority=5)
    bench.enqueue(id="failing", priority=-1)
    bench.enqueue(id="periodic", delay=600)
    bench.enqueue(id="tomorrow", delay=86400, priority=-1)
    bench.enqueue(id="other", queue="other", delay=1)
    ran = bench.drain(mux, within=timedelta(hours=1))
    assert order == [
        ("failing", 1),  # at 0 s
        ("soon", 1),  # at 30 s, though its priority is the last
        ("failing", 2),  # at 60 s
        ("periodic", 1),  # at 600 s
        ("failing", 3),  # at 660 s
        ("periodic", 1),  # at 1800 s
        ("periodic", 1),  # at 3000 s
    ]
    assert ids(ran) == [id_ for id_, _ in order]
    left = "extract(epoch from next_run_at - clock_timestamp())"
    waits = dict(bench.query(f"select id, {left}::float8 from bgjob_job"))
    # An hour has passed, and what the test took.
    due = {"failing": 3060, "periodic": 600, "tomorrow": 82800, "other": 1}
    assert waits.keys() == due.keys()
    assert all(due[id_] - 60 < wait <= due[id_] + 0.001 for id_, wait in waits.items())


@benches("transaction", "client")
def test_a_delay_in_a_handler_counts_from_the_handlers_time(bench: Bench) -> None:
    def act(job: Job) -> Any:
        if int(job.id) == 100:
            return None
        request = EnqueueRequest("q", "t", id=str(int(job.id) + 1), delay=600)
        return bench.client.enqueue(request, conn=bench.conn)

    def body(job: Job) -> Any:
        answer = act(job)

        async def enqueue() -> None:
            await answer

        return enqueue() if inspect.isawaitable(answer) else None

    bench.enqueue(id="0")
    ran = bench.drain(Mux().register("t", bench.handler(body)), within=3599)
    assert ids(ran) == ["0", "1", "2", "3", "4", "5"]


@benches("transaction")
def test_time_passes_though_nothing_waits(bench: Bench) -> None:
    assert bench.drain(Mux(), within=3600) == []
    bench.enqueue(id="never", run_at=datetime(9999, 12, 1, tzinfo=UTC))
    bench.query(
        "insert into bgjob_job (id, queue, type, next_run_at) "
        "values ('infinite', 'q', 't', 'infinity') returning id"
    )
    assert bench.drain(Mux(), within=timedelta(days=36500)) == []
    assert bench.query("select id from bgjob_job where next_run_at = 'infinity'") == [("infinite",)]


def test_the_claim_of_a_drain_is_that_of_do_by_another_clock() -> None:
    assert "now()" in _CLAIM_ANY and "now()" not in _CLAIM_NOW
    assert _CLAIM_NOW.replace("clock_timestamp()", "now()") == _CLAIM_ANY.replace(
        "clock_timestamp()", "now()"
    )


# -- drain: arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queue", "options", "error", "text"),
    [
        ("", {}, QueueRequiredError, "name the queue to drain"),
        ("q\0", {}, ValueError, "queue must not contain NUL"),
        ("q", {"limit": 0}, ValueError, "limit must be at least 1, or None, not 0"),
        ("q", {"within": -1}, ValueError, "within must be from 0 seconds"),
        ("q", {"on_error": "ignore"}, ValueError, "on_error must be 'raise' or 'store'"),
    ],
)
@benches("transaction")
def test_options_that_make_no_sense_are_refused(
    bench: Bench, queue: str, options: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        bench.drain(Mux(), queue, **options)


def test_a_source_of_the_other_colour_is_refused(dsn: str) -> None:
    asynchronous: Any = AsyncClient(dsn)
    plain: Any = Client(dsn)
    with pytest.raises(TypeError, match=r"not AsyncClient; .*adrain\(\)"):
        drain(asynchronous, "q", Mux())
    with pytest.raises(TypeError, match="not AsyncClient"):
        assert_enqueued(asynchronous)
    with pytest.raises(TypeError, match=r"not Client; .*drain\(\)"):
        asyncio.run(adrain(plain, "q", Mux()))
    with pytest.raises(ValueError, match="this is not a connection string"):
        drain("nonsense", "q", Mux())


def test_coroutine_handlers_cannot_be_drained_inside_a_loop_by_drain(dsn: str) -> None:
    async def coroutine(_: Job) -> None: ...

    async def test() -> None:
        with pytest.raises(RuntimeError, match=r"use adrain\(\)"):
            drain(dsn, "q", Mux().register("t", coroutine))
        assert drain(dsn, "q", Mux().register("t", noop)) == []

    asyncio.run(test())


# -- enqueued jobs -------------------------------------------------------------------------------


@benches(*PLACES)
def test_enqueued_jobs_can_be_asserted(bench: Bench) -> None:
    def check(name: str, *args: Any, **options: Any) -> Any:
        function: Any = {
            "is": aassert_enqueued if bench.is_async else assert_enqueued,
            "is not": aassert_not_enqueued if bench.is_async else assert_not_enqueued,
        }[name]
        return bench._run(function(bench.source, *args, **options))

    check("is not")
    bench.enqueue("mail", {"to": "a", "cc": ("b", "c")}, id="1", queue="out", delay=60)
    bench.enqueue("mail", {"to": "d"}, id="2", queue="out")
    bench.enqueue("raw", b'{"to": "d"}', id="3", queue="in")
    bench.enqueue("bytes", b"\xff\0", id="4", queue="in")
    bench.enqueue("empty", id="5", queue="in", priority=-1)
    assert [job.id for job in check("is")] == ["5", "3", "4", "2", "1"]
    assert [job.id for job in check("is", "mail")] == ["2", "1"]
    assert [job.id for job in check("is", "mail", count=2)] == ["2", "1"]
    assert [job.id for job in check("is", queue="in", count=3)] == ["5", "3", "4"]
    assert [job.id for job in check("is", "mail", arg={"cc": ["b", "c"], "to": "a"})] == ["1"]
    assert [job.id for job in check("is", arg={"to": "d"})] == ["3", "2"]
    assert [job.id for job in check("is", arg=b"\xff\0")] == ["4"]
    assert [job.id for job in check("is", arg=None)] == ["5"]
    assert check("is", id="1")[0].json() == {"to": "a", "cc": ["b", "c"]}
    check("is not", "mail", queue="in")
    check("is not", arg=b'{"to":"d","cc":1}')
    check("is not", id="6")
    with pytest.raises(AssertionError) as none:
        check("is", "mail", queue="in", arg={"to": "x"})
    text = str(none.value)
    assert text.startswith(
        "no jobs with type='mail', queue='in', arg={'to': 'x'} enqueued, not one at least; "
        "enqueued:\n  in: empty(), id '5', due "
    )
    assert """\n  out: mail({"to":"d"}), id '2', due """ in text
    assert "\n  in: bytes(\\xff\0), id '4'" in text
    with pytest.raises(AssertionError, match="2 jobs with type='mail' enqueued, not 1; enq"):
        check("is", "mail", count=1)
    with pytest.raises(AssertionError, match="1 job with id='1' enqueued, not none; enqueued:"):
        check("is not", id="1")


def test_a_failure_message_is_short_enough_to_be_read(dsn: str) -> None:
    with Client(dsn) as client:
        with pytest.raises(AssertionError, match="^no jobs enqueued, not one at least; nothing"):
            assert_enqueued(client)
        client.bulk_enqueue([EnqueueRequest("q", "t", "x" * 1000) for _ in range(50)])
        with pytest.raises(AssertionError) as caught:
            assert_enqueued(client, "other")
        assert len(str(caught.value).splitlines()) == 22
        assert str(caught.value).endswith("\n  and 30 more")
        assert len(str(caught.value)) < 10_000


# -- a recording observer ---------------------------------------------------------------------------


def test_a_recording_observer_waits_for_events_of_other_threads() -> None:
    recording = RecordingObserver()
    expected = [JobCompleted(a_job(id="b")), JobCompleted(a_job(id="b"))]

    def tell() -> None:
        recording(JobCompleted(a_job(id="a")))
        for event in expected:
            recording(event)

    thread = threading.Timer(0.05, tell)
    thread.start()
    assert recording.wait_for(JobCompleted, id="b", count=2, timeout=20) == expected
    thread.join()
    assert [e.job.id for e in recording.of(JobCompleted)] == ["a", "b", "b"]
    assert not recording.of(JobStarted) and not recording.of(JobCompleted, id="c")
    recording.reset()
    assert recording.events == []


def test_the_recorded_events_are_shown_if_the_expected_one_does_not_come() -> None:
    recording = RecordingObserver()
    with pytest.raises(
        AssertionError, match="^no 1 JobCompleted within 0 s; no event was recorded$"
    ):
        recording.wait_for(JobCompleted, timeout=0)
    recording(JobStarted(a_job(id="a")))
    recording(QueueIsEmpty("mail"))
    recording(WorkerError(OSError("gone")))
    began = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        recording.wait_for(JobStarted, id="b", count=2, timeout=timedelta(seconds=0.1))
    assert time.monotonic() - began >= 0.1
    assert str(caught.value) == (
        "no 2 JobStarted of job 'b' within 0.1 s; recorded:\n"
        "  JobStarted(t 'a', attempt 1)\n"
        "  QueueIsEmpty('mail')\n"
        "  WorkerError(OSError('gone'))"
    )


def test_the_module_for_tests_needs_no_pytest() -> None:
    code = "import sys, bgjob.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
