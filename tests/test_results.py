"""Results of jobs that were enqueued with keep, and the ids that they take."""

import asyncio
import re
import threading
from datetime import UTC, datetime, timedelta
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from support.clients import Colour
from support.database import clock, row, rows
from support.documents import SCRIPT
from support.roles import Roles
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Gate, Launcher, Recorder, Style, both_styles, handler

from bgjob import (
    AsyncClient,
    Client,
    ClientClosedError,
    Complete,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    JobFailedError,
    MoveToDlq,
    Mux,
    Reschedule,
    Result,
    Retry,
    Schedule,
    UnknownResultError,
    sql,
    testing,
)
from bgjob._handlers.value import MOST_BYTES
from bgjob._postgres.cursor import Cursor
from bgjob._running import waiting
from bgjob._sql import enqueues, results, settlements

HOUR = timedelta(hours=1)


def request(id: str = "a", type: str = "t", **options: Any) -> EnqueueRequest:
    return EnqueueRequest("q", type, id=id, **{"keep": HOUR, **options})


def giving(value: object) -> Mux:
    return returning(Complete(value))


def returning(result: Result | None) -> Mux:
    def handle(_: Job) -> Result | None:
        return result

    return Mux().register("t", handle)


FAILING = returning(MoveToDlq("why"))


def let_pass(conn: psycopg.Connection, id: str = "a") -> None:
    """Let the time for which a result is kept pass."""
    conn.execute("update bgjob_result set until = clock_timestamp() where id = %s", [id])


# -- requests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "error", "text"),
    [
        (0, ValueError, "keep must be more than 0"),
        (-1, ValueError, "keep must be from 0 seconds"),
        (float("nan"), ValueError, "keep must be from 0 seconds"),
        ("1h", TypeError, "keep must be seconds"),
        (True, TypeError, "keep must be seconds"),
    ],
)
def test_a_bad_time_is_refused_where_it_is_written(
    keep: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        request(keep=keep)


def test_a_schedule_keeps_no_results() -> None:
    with pytest.raises(ValueError, match="schedule 's': .* cannot have keep"):
        Schedule("s", every=60, request=request())


def test_a_job_without_keep_costs_nothing(plain_client: Client, conn: psycopg.Connection) -> None:
    usual = EnqueueRequest("q", "t", id="a")
    other = EnqueueRequest("q", "t", id="b", exclusive="k", headers={"a": 1}, delay=1)
    claimed = settlements.Claimed(job("a"), 1)
    dead = settlements.DeadLettered(claimed, "", 0)
    for statement in (
        enqueues.enqueue(usual, notify=True),
        enqueues.enqueue(other, notify=True),
        enqueues.enqueue_many([usual, other], notify=True),
        settlements.complete([claimed]),
        settlements.dead_letter([dead]),
    ):
        assert b"bgjob_result" not in str(statement.text).encode()
        assert "keep" not in str(statement.text)
    assert enqueues.copy_many([usual]) is not None
    assert enqueues.copy_many([usual, request("c")]) is None
    plain_client.enqueue(usual)
    # The value of a job without it is not even looked at.
    assert plain_client.do("q", giving(value := object())) == Complete(value)
    assert rows(conn, "select * from bgjob_result") == []


def job(id: str, **changes: Any) -> Job:
    now = datetime.now(UTC)
    return Job(id, "q", "t", None, 1, None, 0, now, now, now, **changes)


# -- what a job has come to ----------------------------------------------------------------


def test_a_result_is_pending_then_completed_and_then_forgotten(
    client: Any, conn: psycopg.Connection
) -> None:
    client.enqueue(request(keep=60))
    assert client.result("a") == ("a", "pending", None, None, 0, None, None)
    with pytest.raises(TimeoutError, match="job 'a' has not ended within 0 s"):
        client.wait("a", timeout=0)

    answers: Iterator[Result] = iter(
        [Retry(0, error="x"), Reschedule(0), Complete({"n": [1, "ü", None]})]
    )
    mux = Mux().register("t", lambda _: next(answers))
    for _ in range(2):
        client.do("q", mux)
        assert client.result("a").state == "pending"
    assert client.do("q", mux) == Complete({"n": [1, "ü", None]})

    found = client.result("a")
    assert found[:5] == ("a", "completed", {"n": [1, "ü", None]}, None, 2)
    assert found.until - found.ended_at == timedelta(seconds=60) or (
        abs(found.until - found.ended_at - timedelta(seconds=60)) < timedelta(seconds=1)
    )
    assert client.wait("a", timeout=0) == {"n": [1, "ü", None]}
    let_pass(conn)
    for call in (client.result, client.wait):
        with pytest.raises(UnknownResultError, match="no result of job 'a' is kept"):
            call("a")


def test_explain_tells_that_a_job_was_completed_and_until_when_its_id_is_taken(
    client: Any, conn: psycopg.Connection
) -> None:
    client.enqueue(request())
    client.do("q", giving(1))
    found = client.explain("a")
    [reason] = found.reasons
    until = client.result("a").until
    assert (found.state, reason.code, reason.facts["attempt"]) == ("completed", "completed", 1)
    assert f"Its result is kept until {until:%Y-%m-%d %H:%M:%S} UTC" in reason.text
    let_pass(conn)
    assert client.explain("a").state == "absent"


def test_what_has_no_result_is_told(client: Any) -> None:
    client.enqueue(request(keep=None))
    for id_ in ("a", "never"):
        for call in (client.result, client.wait):
            with pytest.raises(UnknownResultError, match="it was not enqueued with keep"):
                call(id_)
        with pytest.raises(ValueError, match="id must"):
            client.result("")


@pytest.mark.parametrize("how", ["dead", "raises", "unknown", "expired", "cancelled", "abandoned"])
def test_a_job_that_fails_for_good_has_its_error_as_its_result(
    client: Any, conn: psycopg.Connection, how: str
) -> None:
    def raises(_: Job) -> None:
        raise ValueError("broken")

    client.enqueue(request(expires=HOUR))
    match how:
        case "dead":
            client.do("q", FAILING)
        case "raises":
            client.do("q", Mux().register("t", raises, max_attempts=1))
        case "unknown":
            client.do("q", Mux())
        case "expired":
            conn.execute("update bgjob_job set expires = clock_timestamp()")
            client.do("q", FAILING)
        case "cancelled":
            client.jobs.cancel("a", reason="no more")
        case _:
            conn.execute("update bgjob_job set token = 1, lease_until = 'infinity'")
            client.jobs.abandon("a", reason="no more")
    error = row(conn, "select last_error from bgjob_dead_job")[0]
    found = client.result("a")
    assert (found.state, found.value, found.error) == ("failed", None, error)
    with pytest.raises(JobFailedError) as failed:
        client.wait("a", timeout=0)
    assert (failed.value.id, failed.value.error) == ("a", error)
    assert str(failed.value) == f"job 'a' has failed: {error}"


def test_a_requeued_job_is_pending_again_and_keeps_its_second_result(
    client: Any, conn: psycopg.Connection
) -> None:
    for id_ in ("a", "b", "usual"):
        client.enqueue(request(id_, keep=HOUR if id_ != "usual" else None))
        client.do("q", FAILING)
    conn.execute("delete from bgjob_result where id = 'b'")  # as when its time is over
    client.dlq.requeue()
    assert {client.result(id_).state for id_ in ("a", "b")} == {"pending"}
    for _ in range(3):
        client.do("q", giving(7))
    assert [client.wait(id_) for id_ in ("a", "b")] == [7, 7]
    assert row(conn, "select count(*) from bgjob_result") == (2,)


# -- ids that stay taken ---------------------------------------------------------------------


@pytest.mark.parametrize("end", [giving(None), FAILING], ids=["completed", "failed"])
def test_an_enqueue_that_is_repeated_after_the_end_is_refused_until_keep_is_over(
    client: Any, conn: psycopg.Connection, end: Mux
) -> None:
    bulk = client.bulk_enqueue
    client.enqueue(request())
    for _ in range(2):  # first live, then ended
        with pytest.raises(JobAlreadyExistsError):
            client.enqueue(request())
        with pytest.raises(JobAlreadyExistsError) as taken:
            bulk([request("b"), request(), request("c", keep=None)])
        assert taken.value.ids == ("a",)
        assert client.enqueue(request(), on_conflict="skip") is None
        assert bulk([request()], on_conflict="skip") == [None]
        client.do("q", end) if client.result("a").state == "pending" else None
    assert rows(conn, "select id from bgjob_job") == []
    let_pass(conn)
    assert client.enqueue(request()) == "a"
    assert client.result("a") == ("a", "pending", None, None, 0, None, None)
    client.do("q", giving(2))
    let_pass(conn)
    assert bulk(
        [request(), request("b"), request("c", keep=None), request("b")], on_conflict="skip"
    ) == [
        "a",
        "b",
        "c",
        None,
    ]
    assert client.result("a").state == "pending"


def test_a_request_without_keep_does_not_look_at_results_and_one_with_it_sees_live_jobs(
    client: Any, conn: psycopg.Connection
) -> None:
    client.enqueue(request())
    client.do("q", giving(1))
    usual = request(keep=None)
    client.enqueue(usual)
    with pytest.raises(JobAlreadyExistsError):
        client.enqueue(usual)
    assert client.wait("a") == 1
    client.enqueue(request("b", keep=None))
    for id_ in ("a", "b"):
        with pytest.raises(JobAlreadyExistsError):
            client.enqueue(request(id_))
    assert client.bulk_enqueue([request("b"), request("c")], on_conflict="skip") == [None, "c"]
    # The refused ones have left nothing.
    assert rows(conn, "select id, value from bgjob_result order by id") == [
        ("a", b"1"),
        ("c", None),
    ]
    # A job that was deleted by hand leaves no id taken.
    conn.execute("delete from bgjob_job")
    with pytest.raises(UnknownResultError):
        client.result("c")
    assert client.enqueue(request("c")) == "c"


def test_of_enqueues_that_meet_one_is_written_also_in_a_transaction_that_stays_open(
    colour: Colour, conn: psycopg.Connection
) -> None:
    calls = [lambda client: client.enqueue(request(), on_conflict="skip") for _ in range(8)]
    assert sorted(map(str, colour.at_once(*calls))) == ["None"] * 7 + ["a"]
    with psycopg.connect(conn.info.dsn) as other, Client(colour.dsn) as client:
        client.enqueue(request("b"))
        # The end of a job does not wait for a transaction that was refused its id.
        for id_ in ("a", "b"):
            assert client.enqueue(request(id_), on_conflict="skip", conn=other) is None
        conn.execute("set statement_timeout = '5s'")
        [client.do("q", giving(3)) for _ in range(2)]
        assert client.wait("b", timeout=0) == 3
        other.rollback()
    client = colour.client()
    with pytest.raises(ZeroDivisionError), psycopg.connect(colour.dsn) as other:
        Client(colour.dsn).enqueue(request("c"), conn=other)
        raise ZeroDivisionError
    with pytest.raises(UnknownResultError):
        client.result("c")


@pytest.mark.parametrize("paramstyle", ["pyformat", "named", "numeric", "dollar"])
def test_the_public_statements_refuse_a_taken_id(
    plain_client: Client, conn: psycopg.Connection, paramstyle: Any
) -> None:
    plain_client.enqueue(request())
    plain_client.do("q", giving(1))
    if paramstyle == "pyformat":
        for text, params in (
            sql.enqueue(request(), paramstyle),
            sql.enqueue_many([request()], paramstyle),
        ):
            assert conn.execute(text, params).fetchall() in ([], [([], None)], [([], 0)])
        text, params = sql.enqueue(request("b"), paramstyle)
        assert len(conn.execute(text, params).fetchall()) == 1
    else:
        text, parameters = sql.enqueue(request("c"), paramstyle)
        assert "%(" not in text
        assert len(parameters) == len({*parameters}) if isinstance(parameters, dict) else True


# -- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        0,
        False,
        "",
        [],
        {},
        1.5,
        "€\u2028\0 \U0001f600",
        2**53 + 1,
        {"ü": [{"x": None}]},
        "x" * 900_000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_comes_back_as_it_was_given(client: Any, value: object) -> None:
    client.enqueue(request())
    client.do("q", giving(value))
    assert client.result("a").value == value
    assert type(client.wait("a")) is type(value)


def test_nothing_is_null(client: Any) -> None:
    for result in (None, Complete(), Complete(None)):
        id_ = client.enqueue(EnqueueRequest("q", "t", keep=1))
        client.do("q", returning(result))
        assert client.wait(id_) is None
        assert client.result(id_).state == "completed"


BAD = [
    (object(), TypeError, "cannot be encoded as JSON"),
    (b"bytes", TypeError, "cannot be encoded as JSON"),
    ({"a": [float("nan")]}, ValueError, "holds NaN or infinity"),
    ("x" * MOST_BYTES, ValueError, r"has 1,000,002 bytes as JSON, and at most 1,000,000 are kept"),
]


@pytest.mark.parametrize(("value", "error", "text"), BAD, ids=["object", "bytes", "nan", "large"])
def test_a_value_that_cannot_be_kept_fails_the_attempt_and_names_the_job(
    client: Any, value: object, error: type[Exception], text: str
) -> None:
    client.enqueue(request())
    result = client.do("q", giving(value))
    assert isinstance(result, Retry)
    assert type(result.error) is error
    assert re.search(f"the value of job 'a' of type 't'.*{text}", str(result.error))
    assert client.result("a").state == "pending"


# -- workers -----------------------------------------------------------------------------------


@both_styles
def test_a_worker_keeps_what_handlers_of_every_kind_give(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    conn.execute("create table effect (id text)")

    def single(job: Job) -> Result:
        return Complete(["single", job.id])

    mux = Mux().register("single", handler(style, single)).register("usual", handler(style, single))
    if style == "plain":

        def effect(job: Job, conn: Any) -> Result:
            conn.execute("insert into effect values (%s)", [job.id])
            return Complete(object() if job.id == "bad" else ["effect", job.id])

        def many(jobs: list[Job]) -> dict[str, Result]:
            return {job.id: Complete(["many", job.id]) for job in jobs}

        def effects(jobs: list[Job], conn: Any) -> dict[str, Result]:
            for job in jobs:
                effect(job, conn)
            return {job.id: Complete(object() if job.id == "w" else job.id) for job in jobs}

        mux.register("effect", effect, transactional=True, max_attempts=1)
        mux.register("many", many, batch=10, batch_wait=0.01)
        mux.register("effects", effects, batch=10, transactional=True, max_attempts=1)
    else:

        async def effect_of(job: Job, conn: Any) -> Result:
            await conn.execute("insert into effect values (%s)", [job.id])
            return Complete(object() if job.id == "bad" else ["effect", job.id])

        async def many_of(jobs: list[Job]) -> dict[str, Result]:
            return {job.id: Complete(["many", job.id]) for job in jobs}

        async def effects_of(jobs: list[Job], conn: Any) -> dict[str, Result]:
            for job in jobs:
                await effect_of(job, conn)
            return {job.id: Complete(object() if job.id == "w" else job.id) for job in jobs}

        mux.register("effect", effect_of, transactional=True, max_attempts=1)
        mux.register("many", many_of, batch=10, batch_wait=0.01)
        mux.register("effects", effects_of, batch=10, transactional=True, max_attempts=1)
    client = launcher.client
    jobs = {"s": "single", "e": "effect", "bad": "effect", "m1": "many", "m2": "many"}
    jobs |= {"v": "effects", "w": "effects", "x": "effects"}
    client.bulk_enqueue([request(id_, type) for id_, type in jobs.items()])
    client.enqueue(request("u", "usual", keep=None))
    launcher.start(mux)
    assert client.wait("s", timeout=NEVER) == ["single", "s"]
    assert client.wait("e", timeout=NEVER) == ["effect", "e"]
    assert [client.wait(id_, timeout=NEVER) for id_ in ("m1", "m2")] == [
        ["many", "m1"],
        ["many", "m2"],
    ]
    assert [client.wait(id_, timeout=NEVER) for id_ in ("v", "x")] == ["v", "x"]
    # With what cannot be kept the effect was rolled back.
    for id_ in ("bad", "w"):
        with pytest.raises(JobFailedError, match=f"the value of job '{id_}'"):
            client.wait(id_, timeout=NEVER)
    assert rows(conn, "select id from effect order by id") == [("e",), ("v",), ("x",)]
    assert row(conn, "select count(*) from bgjob_result") == (len(jobs),)


@pytest.mark.parametrize("transactional", [False, True])
def test_one_value_for_all_jobs_of_a_batch_is_that_of_those_whose_results_are_kept(
    launcher: Launcher, conn: psycopg.Connection, transactional: bool
) -> None:
    def same(jobs: list[Job], *_: object) -> Result:
        return Complete(["same"])

    def bad(jobs: list[Job], *_: object) -> Result:
        return Complete(object())

    observer = Recorder()
    mux: Any = Mux()
    mux.register("same", same, batch=10, batch_wait=0.05, transactional=transactional)
    mux.register("bad", bad, batch=10, batch_wait=0.05, transactional=transactional, max_attempts=1)
    client = launcher.client
    ids = [f"{type} {n}" for type in ("same", "bad") for n in range(3)]
    keeps = [id_ for id_ in ids if not id_.endswith("0")]
    client.bulk_enqueue(
        [request(id_, id_.split()[0], keep=HOUR if id_ in keeps else None) for id_ in ids]
    )
    launcher.start(mux, observer=observer)
    assert [client.wait(f"same {n}", timeout=NEVER) for n in (1, 2)] == [["same"]] * 2
    for n in (1, 2):
        with pytest.raises(JobFailedError, match=f"the value of job 'bad {n}'"):
            client.wait(f"bad {n}", timeout=NEVER)
    for id_ in ("same 0", "bad 0"):
        observer.wait_for("completed", id_)
    assert rows(conn, "select id from bgjob_result order by id") == [
        (id_,) for id_ in sorted(keeps)
    ]


def test_many_large_values_are_settled_in_several_exchanges(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    ids = launcher.client.bulk_enqueue([request(f"{n:02}") for n in range(12)])
    launcher.start(Mux().register("t", lambda job: Complete([job.id, "x" * 900_000])))
    for id_ in ids:
        assert launcher.client.wait(str(id_), timeout=NEVER)[0] == id_


def test_a_kept_job_that_is_replaced_keeps_the_result_of_its_last_run(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    client, gate, observer = launcher.client, Gate(Complete(1)), Recorder()
    replace: Any = {"on_conflict": "replace"}

    def run(job: Job) -> Result | None:
        return gate(job) if job.json() == "first" else Complete(job.json())

    client.enqueue(request(arg="old"))
    for refused in (
        lambda: client.enqueue(request(), **replace),
        lambda: client.debounce(request(), 1),
    ):
        with pytest.raises(ValueError, match="keep cannot be given together with on_conflict"):
            refused()
    client.enqueue(request(arg="first", keep=None), on_conflict="replace")
    launcher.start(Mux().register("t", run), observer=observer)
    gate.wait()
    client.enqueue(request(arg="second", keep=None), on_conflict="replace")
    gate.released.set()
    assert client.wait("a", timeout=NEVER) == "second"
    assert row(conn, "select count(*) from bgjob_result where value = '\"second\"'") == (1,)
    observer.wait_for("completed", "a", times=2)


def test_the_job_after_a_group_and_the_jobs_of_the_group_have_results(launcher: Launcher) -> None:
    mux = Mux().register("t", lambda job: Complete([job.id, job.group_dead]))
    mux.register("dies", lambda _: MoveToDlq("why"))
    with launcher.client.group(then=request("then")) as group:
        group.enqueue(request("a"))
        group.enqueue(request("b", "dies"))
    with pytest.raises(JobAlreadyExistsError), launcher.client.group(then=request("then")) as group:
        group.enqueue(request("c"))
    launcher.start(mux)
    assert launcher.client.wait("a", timeout=NEVER) == ["a", None]
    assert launcher.client.wait("then", timeout=NEVER) == ["then", 1]
    with pytest.raises(JobFailedError):
        launcher.client.wait("b", timeout=NEVER)
    with pytest.raises(JobAlreadyExistsError), launcher.client.group(then=request("then")) as group:
        group.enqueue(request("c"))
    with pytest.raises(UnknownResultError):
        launcher.client.result("c")


def test_a_worker_that_keeps_results_deletes_those_whose_time_is_over(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_result (id, until) select n::text, clock_timestamp() - n * interval '1 s' "
        "from generate_series(1, 2500) n union all select 'later', clock_timestamp() + interval '1 h' "
        "union all select 'live', null"
    )
    observer = Recorder()
    launcher.start(giving(1), observer=observer)
    launcher.client.enqueue(request("usual", keep=None))
    observer.wait_for("completed", "usual")
    assert row(conn, "select count(*) from bgjob_result") == (2502,)
    launcher.client.enqueue(request())
    assert eventually(lambda: row(conn, "select count(*) from bgjob_result") == (3,))
    assert rows(conn, "select id from bgjob_result order by id") == [("a",), ("later",), ("live",)]


def test_drain_keeps_results(dsn: str, conn: psycopg.Connection) -> None:
    with Client(dsn) as client, psycopg.connect(dsn) as caller:
        client.enqueue(request(), conn=caller)
        client.enqueue(request("b"), conn=caller)
        mux = Mux().register(
            "t", lambda job: Complete(job.id) if job.id == "a" else MoveToDlq("no")
        )
        ran = testing.drain(caller, "q", mux, on_error="store")
        assert [each.result for each in ran] == [Complete("a"), MoveToDlq("no")]
        assert client.result("a", conn=caller).value == "a"
        assert client.result("b", conn=caller).error == "no"
        caller.rollback()
    assert rows(conn, "select * from bgjob_result") == []


# -- waiting ------------------------------------------------------------------------------------


def test_a_thousand_waiters_of_a_client_share_a_connection(
    dsn: str, conn: psycopg.Connection
) -> None:
    async def main() -> None:
        ids = [f"{n}" for n in range(1000)]
        async with AsyncClient(dsn) as client:
            await client.bulk_enqueue([request(id_) for id_ in ids])
            waiting = [asyncio.create_task(client.wait(id_)) for id_ in ids]
            found: set[int] = set()
            while not listeners(conn):
                await asyncio.sleep(0.01)
            async with launched(client, Mux().register("t", echo)):
                while not all(task.done() for task in waiting):
                    found.add(listeners(conn))
                    await asyncio.sleep(0.01)
            assert await asyncio.gather(*waiting) == ids
            assert found <= {0, 1}

    asyncio.run(main())


async def echo(job: Job) -> Result:
    return Complete(job.id)


def launched(client: AsyncClient, mux: Mux) -> Any:
    from bgjob import AsyncWorker

    return AsyncWorker(client, "q", mux, concurrency=10)


_OURS = (
    "from pg_stat_activity where datname = current_database() "
    "and application_name = 'bgjob results'"
)


def listeners(conn: psycopg.Connection) -> int:
    return len(rows(conn, f"select {_OURS}"))


def close_after(closing: threading.Event, client: Client) -> None:
    closing.wait(PATIENCE)
    client.close()


@pytest.fixture(params=[False, True], ids=["Client", "AsyncClient"])
def waiter(request: pytest.FixtureRequest, dsn: str) -> Any:
    """Call `wait` of a client on a thread; return the thread's answer by `result()`."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as threads:

        def wait(id_: str, closing: threading.Event | None = None) -> Any:
            async def wait_async() -> Any:
                async with AsyncClient(dsn) as client:
                    task = asyncio.create_task(client.wait(id_, timeout=PATIENCE))
                    if closing is not None:
                        while not closing.is_set():
                            await asyncio.sleep(0.01)
                        await client.close()
                    return await task

            def wait_plain() -> Any:
                with Client(dsn) as client:
                    if closing is not None:
                        threads.submit(close_after, closing, client)
                    return client.wait(id_, timeout=PATIENCE)

            return threads.submit(
                lambda: asyncio.run(wait_async()) if request.param else wait_plain()
            )

        yield wait


def waits(conn: psycopg.Connection) -> bool:
    """Whether the waiters have looked, and listen."""
    return bool(rows(conn, f"select {_OURS} and state = 'idle' and query ~ 'bgjob_result r'"))


def test_a_waiter_is_notified_and_polls_where_it_is_not(
    waiter: Any, plain_client: Client, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(waiting, "_POLL", NEVER)  # nothing happens because of polling
        plain_client.enqueue(request())
        waits_for_a = waiter("a")
        assert eventually(lambda: waits(conn))
        plain_client.do("q", giving(1))
        assert waits_for_a.result() == 1
    plain_client.enqueue(request("b"))
    waits_for_b = waiter("b")
    assert eventually(lambda: waits(conn))
    conn.execute("delete from bgjob_job")
    conn.execute(
        "update bgjob_result set until = 'infinity', ended_at = now(), value = '2' where id = 'b'"
    )
    assert waits_for_b.result() == 2


def test_a_waiter_survives_the_loss_of_its_connection_and_learns_that_a_job_is_gone(
    waiter: Any, plain_client: Client, conn: psycopg.Connection
) -> None:
    for id_ in ("a", "b"):
        plain_client.enqueue(request(id_))
        answer = waiter(id_)
        for _ in range(2):
            assert eventually(lambda: waits(conn))
            conn.execute(f"select pg_terminate_backend(pid) {_OURS}")
        if id_ == "a":
            plain_client.do("q", giving(1))
            assert answer.result() == 1
        else:
            conn.execute("delete from bgjob_job")
            with pytest.raises(UnknownResultError):
                answer.result()


def test_a_client_that_is_closed_lets_its_waiters_fail(
    waiter: Any, plain_client: Client, conn: psycopg.Connection
) -> None:
    plain_client.enqueue(request())
    closing = threading.Event()
    answer = waiter("a", closing)
    assert eventually(lambda: waits(conn))
    closing.set()
    with pytest.raises(ClientClosedError):
        answer.result()
    assert eventually(lambda: "bgjob-results" not in {t.name for t in threading.enumerate()})


# -- roles, plans and the schema ----------------------------------------------------------------


def test_a_producer_may_keep_results_and_read_them_with_the_optional_grant(roles: Roles) -> None:
    with Client(roles.login("producer")) as client:
        client.enqueue(request())
        client.bulk_enqueue([request("b")])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            client.result("a")
        [optional] = re.findall(r"^-- (grant select on bgjob_result .*)", SCRIPT, re.MULTILINE)
        roles.conn.execute(roles.named(optional))
        assert client.result("a").state == "pending"
        with pytest.raises(TimeoutError):
            client.wait("a", timeout=0)


def test_an_outcome_is_read_whatever_was_written_by_hand(
    plain_client: Client, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into bgjob_result (id, until, ended_at) values ('a', 'infinity', '-infinity')"
    )
    found = plain_client.result("a")
    assert (found.state, found.attempt) == ("completed", 0)
    assert found.until is not None
    assert found.until.year == 9999
    statement = results.outcomes(["a", "b"])
    assert [
        *statement.parse(Cursor(conn).execute(statement.text, statement.params).fetchall())
    ] == ["a"]


def test_times_are_those_of_the_database(plain_client: Client, conn: psycopg.Connection) -> None:
    plain_client.enqueue(request())
    before = clock(conn)
    plain_client.do("q", giving(1))
    found = plain_client.result("a")
    times = (before, found.ended_at, clock(conn), found.until)
    assert all(a is not None and b is not None and a <= b for a, b in pairwise(times))
