"""A worker's state is made before a job is claimed, shared by its handlers, and closed at its end."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import pytest
from support.database import count, row, rows
from support.waiting import PATIENCE, eventually
from support.workers import Launcher, Gate, Recorder

from bgjob import (
    AsyncClient,
    AsyncWorker,
    Client,
    EnqueueRequest,
    Job,
    Mux,
    StateRequiredError,
    Worker,
)


class Pool:
    """A state that records its calls, and their threads."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.threads: list[threading.Thread] = []
        self.given: list[Any] = []

    def tell(self, what: str) -> None:
        self.told.append(what)
        self.threads.append(threading.current_thread())

    @contextmanager
    def opened(self) -> Iterator[str]:
        self.tell("opened")
        yield "state"
        self.tell("closed")

    @asynccontextmanager
    async def opened_async(self) -> AsyncIterator[str]:
        self.tell("opened")
        await asyncio.sleep(0)
        yield "state"
        await asyncio.sleep(0)
        self.tell("closed")

    def handle(self, job: Job, state: str) -> None:
        self.given.append(state)
        self.tell(job.id)


class Awaitable:
    """Like the pools of some drivers: it can be awaited and entered."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __await__(self) -> Iterator[Any]:
        raise AssertionError("it is entered")

    async def __aenter__(self) -> str:
        self._pool.tell("opened")
        return "state"

    async def __aexit__(self, *_: object) -> None:
        self._pool.tell("closed")


async def awaited(state: Any) -> Any:
    await asyncio.sleep(0)
    return state


def test_a_state_is_made_once_given_to_handlers_that_ask_and_closed_after_the_last(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    pool, observer = Pool(), Recorder()
    calls: list[Job] = []

    async def coroutine(job: Job, *, state: str) -> None:
        pool.handle(job, state)

    mux = Mux().register("t", pool.handle).register("coroutine", coroutine)
    mux.register("other", calls.append)
    launcher.enqueue("a", "b")
    launcher.enqueue("c", type="coroutine")
    launcher.enqueue("d", type="other")
    worker = launcher.start(mux, state=pool.opened, observer=observer, concurrency=4)
    observer.wait_for("completed", times=4)
    assert pool.told[0] == "opened" and sorted(pool.told[1:]) == ["a", "b", "c"]
    assert launcher.shutdown(worker)
    assert pool.told[-1] == "closed" and pool.told.count("opened") == 1
    assert pool.given == ["state"] * 3
    assert [job.id for job in calls] == ["d"]


def test_a_state_that_is_not_a_context_manager_is_passed_as_it_is(launcher: Launcher) -> None:
    pool, observer = Pool(), Recorder()
    state = {"shared": True}
    launcher.enqueue("a", "b")
    launcher.start(Mux().register("t", pool.handle), state=lambda: state, observer=observer)
    observer.wait_for("completed", times=2)
    assert pool.given[0] is pool.given[1] is state


def test_each_worker_has_a_state_of_its_own(launcher: Launcher) -> None:
    pool, observer = Pool(), Recorder()
    numbers = iter(range(9))
    mux = Mux().register("t", pool.handle)
    for queue in ("one", "two"):
        launcher.start(mux, queue, state=lambda: next(numbers), observer=observer)
        launcher.enqueue(f"in {queue}", queue=queue)
        observer.wait_for("completed", f"in {queue}")
    assert pool.given == [0, 1]


def test_a_transactional_handler_and_one_of_a_class_are_given_the_state(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    conn.execute("create table given (state text)")
    observer = Recorder()

    def handle(job: Job, conn: psycopg.Connection, state: str) -> None:
        conn.execute("insert into given values (%s)", [state])

    launcher.enqueue("a")
    mux = Mux().register("t", handle, transactional=True)
    launcher.start(mux, state=lambda: "state", observer=observer)
    observer.wait_for("completed", "a")
    assert row(conn, "select state from given") == ("state",)


@pytest.mark.parametrize(
    "make",
    [
        lambda pool: pool.opened,
        lambda pool: pool.opened_async,
        lambda pool: lambda: awaited(pool.opened_async()),
        lambda pool: lambda: awaited(pool.opened()),
        lambda pool: lambda: Awaitable(pool),
    ],
    ids=["plain", "async", "a coroutine's async", "a coroutine's plain", "awaitable too"],
)
def test_the_state_of_an_async_worker_is_made_and_closed_on_its_loop(
    dsn: str, make: Callable[[Pool], Callable[[], Any]]
) -> None:
    pool, observer = Pool(), Recorder()

    async def handle(job: Job, state: str) -> None:
        pool.handle(job, state)

    async def main() -> None:
        async with AsyncClient(dsn) as client:
            await client.enqueue(EnqueueRequest("q", "t", id="a"))
            mux = Mux().register("t", handle)
            async with AsyncWorker(client, "q", mux, state=make(pool), observer=observer):
                await asyncio.to_thread(observer.wait_for, "completed")

    asyncio.run(main())
    assert pool.told == ["opened", "a", "closed"]
    assert pool.given == ["state"]
    assert set(pool.threads) == {threading.current_thread()}


def test_a_coroutine_that_is_cancelled_after_the_grace_period_ends_before_its_state(
    dsn: str,
) -> None:
    pool, entered = Pool(), asyncio.Event()

    async def handle(job: Job, state: str) -> None:
        entered.set()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            await asyncio.sleep(0)
            pool.tell("handler ended")

    async def main() -> None:
        async with AsyncClient(dsn) as client:
            await client.enqueue(EnqueueRequest("q", "t"))
            worker = AsyncWorker(client, "q", Mux().register("t", handle), state=pool.opened_async)
            await worker.run()
            await asyncio.wait_for(entered.wait(), PATIENCE)
            assert not await worker.shutdown(timeout=0)

    asyncio.run(main())
    assert pool.told == ["opened", "handler ended", "closed"]


def test_a_state_is_there_until_a_slow_handler_has_ended(launcher: Launcher) -> None:
    pool, gate = Pool(), Gate()

    def handle(job: Job, state: str) -> None:
        gate(job)
        pool.tell("handler ended")

    launcher.enqueue("a")
    worker = launcher.start(Mux().register("t", handle), state=pool.opened)
    gate.wait()
    stopping = threading.Thread(target=launcher.shutdown, args=(worker,), kwargs={"timeout": None})
    stopping.start()
    assert pool.told == ["opened"]
    gate.released.set()
    stopping.join(PATIENCE)
    assert pool.told == ["opened", "handler ended", "closed"]


# -- what goes wrong -------------------------------------------------------------------------


def test_run_raises_the_factorys_exception_and_the_worker_can_be_run_again(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    states: list[Any] = [OSError("no model"), "state"]
    pool, observer = Pool(), Recorder()

    def make() -> Any:
        state = states.pop(0)
        if isinstance(state, OSError):
            raise state
        return state

    launcher.enqueue("a")
    worker = launcher.make(Mux().register("t", pool.handle), state=make, observer=observer)
    with pytest.raises(OSError, match="no model"):
        launcher.run(worker.run())
    assert count(conn) == 1 and observer.events == []
    connections = (
        "select from pg_stat_activity where application_name = 'bgjob' "
        "and datname = current_database()"
    )
    assert eventually(lambda: not rows(conn, connections))
    launcher.run(worker.run())
    observer.wait_for("completed", "a")
    assert launcher.shutdown(worker)
    assert pool.given == ["state"]


def test_a_state_whose_enter_fails_is_raised_by_run(launcher: Launcher) -> None:
    @contextmanager
    def failing() -> Iterator[None]:
        raise OSError("no entry")
        yield

    worker = launcher.make(Mux(), state=failing)
    with pytest.raises(OSError, match="no entry"):
        launcher.run(worker.run())
    assert launcher.shutdown(worker)


def test_a_state_is_closed_where_middleware_fails_on_a_handler_that_is_given_it(
    launcher: Launcher,
) -> None:
    pool, fails = Pool(), False

    def middleware(handler: Callable[..., Any]) -> Callable[..., Any]:
        if fails:
            raise OSError("not twice")
        return handler

    mux = Mux(middleware=[middleware]).register("t", pool.handle)
    fails = True
    worker = launcher.make(mux, state=pool.opened)
    with pytest.raises(OSError, match="not twice"):
        launcher.run(worker.run())
    assert pool.told == ["opened", "closed"]


def test_a_worker_without_the_state_that_a_handler_asks_for_does_not_start(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    pool = Pool()
    launcher.enqueue("a")
    worker = launcher.make(Mux().register("t", pool.handle))
    with pytest.raises(
        StateRequiredError, match=r"handle of job type 't' has a parameter state: make"
    ):
        launcher.run(worker.run())
    assert row(conn, "select attempt from bgjob_job") == (0,)
    bound = launcher.start(Mux().register("t", pool.handle).bound("bound"))
    assert eventually(lambda: pool.given == ["bound"])
    assert launcher.shutdown(bound)


def test_an_exception_while_a_state_is_closed_is_reported_to_the_observer(
    launcher: Launcher,
) -> None:
    observer = Recorder()
    failure = OSError("cannot close")

    @contextmanager
    def failing() -> Iterator[None]:
        yield
        raise failure

    worker = launcher.start(Mux(), state=failing, observer=observer)
    assert launcher.shutdown(worker)
    assert observer.of("error") == [("error", failure)]


@pytest.mark.both_colours
def test_a_state_that_does_not_close_is_left_after_the_grace_period(launcher: Launcher) -> None:
    observer, released = Recorder(), threading.Event()

    @contextmanager
    def stuck() -> Iterator[None]:
        yield
        assert released.wait(PATIENCE)

    @asynccontextmanager
    async def stuck_async() -> AsyncIterator[None]:
        yield
        while not released.is_set():
            await asyncio.sleep(0.01)

    worker = launcher.start(
        Mux(), state=stuck_async if launcher.is_async else stuck, observer=observer
    )
    try:
        assert launcher.shutdown(worker, timeout=0)
        [(_, error)] = observer.of("error")
        assert isinstance(error, TimeoutError)
        assert "the state was not closed within 1 s" in str(error)
    finally:
        released.set()


@pytest.mark.parametrize("state", [5, {"a": 1}, lambda needed: needed], ids=["5", "dict", "lambda"])
def test_a_state_that_cannot_be_made_is_refused_by_the_constructor(dsn: str, state: Any) -> None:
    with pytest.raises(TypeError, match="state must be a callable without arguments"):
        Worker(Client(dsn), "q", Mux(), state=state)
    with pytest.raises(TypeError, match="state must be a callable without arguments"):
        AsyncWorker(AsyncClient(dsn), "q", Mux(), state=state)


def test_a_worker_without_a_loop_of_the_callers_refuses_a_state_that_has_to_be_awaited(
    dsn: str,
) -> None:
    async def coroutine() -> None: ...

    with Client(dsn) as client:
        with pytest.raises(TypeError, match="coroutine function: only an AsyncWorker awaits"):
            Worker(client, "q", Mux(), state=coroutine)
        for make, kind in (
            (lambda: coroutine(), "coroutine"),
            (Pool().opened_async, "_AsyncGeneratorContextManager"),
        ):
            with pytest.raises(TypeError, match=f"returned {kind}: only an AsyncWorker awaits"):
                Worker(client, "q", Mux(), state=make).run()


# -- one job at a time ------------------------------------------------------------------------


def test_do_needs_a_bound_mux_and_claims_nothing_without(
    dsn: str, conn: psycopg.Connection
) -> None:
    pool = Pool()
    mux = Mux().register("t", pool.handle)

    async def do(mux: Mux) -> Any:
        async with AsyncClient(dsn) as client:
            return await client.do("q", mux)

    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t") for _ in range(2)])
        with pytest.raises(StateRequiredError, match=r"call do\(\) with mux\.bound\(state\)"):
            client.do("q", mux)
        with pytest.raises(StateRequiredError, match=r"call do\(\) with mux\.bound\(state\)"):
            asyncio.run(do(mux))
        assert row(conn, "select max(attempt) from bgjob_job") == (0,)
        client.do("q", mux.bound("one"))
        asyncio.run(do(mux.bound("two")))
    assert pool.given == ["one", "two"]
    assert count(conn) == 0
