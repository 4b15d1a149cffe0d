"""A slot keeps nothing of one job for the next, and is replaced if it ends."""

import asyncio
import contextvars
import ctypes
import functools
import gc
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from math import inf
from random import Random
from time import monotonic
from types import CoroutineType
from typing import Any

import psycopg
import pytest
from faults.proxy import Proxy
from psycopg.conninfo import make_conninfo
from support.database import all_done, row, rows
from support.jobs import a_job
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Launcher, Gate, Recorder, Style, both_styles, running

from bgjob import (
    AsyncClient,
    AsyncWorker,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    Mux,
    Retry,
    Worker,
)
from bgjob._engine.outcome import Outcome, Release
from bgjob._handlers.route import COMPLETE
from bgjob._postgres.fork import ForkGuard
from bgjob._running import loop
from bgjob._running.loop import Loop
from bgjob._running.transaction import Transactions
from bgjob._sql.claims import ELSEWHERE
from bgjob._sql.settlements import Claimed
from bgjob._worker.clock import ServerClock
from bgjob._worker.control import QueueControl
from bgjob._worker.session import Session
from bgjob._worker.executor import Executor
from bgjob._worker.slots import Slot, Slots
from bgjob._worker.tasks import _Move
from bgjob._worker.threads import Threads, _HasBegun
from bgjob._worker.timeouts import Timeouts
from bgjob.testing import adrain, drain

# -- context variables -----------------------------------------------------------------------------

tenant: contextvars.ContextVar[Any] = contextvars.ContextVar("tenant", default=None)


class Incomparable:
    """Like an array of numpy: comparing two of them raises."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]


def of_style(style: Style, body: Callable[[Job], Any], *, transactional: bool = False) -> Any:
    """Make a handler that changes its context before and after it has waited."""
    if style == "plain":
        return (lambda job, _: body(job)) if transactional else body

    async def coroutine(job: Job) -> Any:
        answer = body(job)
        await asyncio.sleep(0)
        return answer

    async def with_connection(job: Job, _: object) -> Any:
        return await coroutine(job)

    return with_connection if transactional else coroutine


def leaver(seen: list[Any], value: Callable[[], Any] = object) -> Callable[[Job], None]:
    """Return a body that records the variable that it finds, and sets it."""

    def body(job: Job) -> None:
        seen.append(tenant.get())
        tenant.set(value())
        if job.id == "a3":
            raise ValueError("with the variable set")

    return body


@both_styles
@pytest.mark.parametrize(
    "policy",
    [{}, {"timeout": 60}, {"transactional": True}, {"exclusive": lambda job: job.id[-1]}],
    ids=["simple", "timeout", "transactional", "exclusive"],
)
def test_context_variables_of_a_job_are_not_seen_by_the_next(
    launcher: Launcher, conn: psycopg.Connection, style: Style, policy: dict[str, Any]
) -> None:
    seen: list[Any] = []
    body = leaver(seen)
    if "exclusive" in policy:

        def key(job: Job) -> str:
            seen.append(tenant.get())
            tenant.set("the key's")
            return job.id[-1]

        policy = {"exclusive": key}
    handler = of_style(style, body, transactional="transactional" in policy)
    register: Any = Mux().register
    mux = register("t", handler, backoff=lambda _: 0.0, max_attempts=2, **policy)
    launcher.enqueue(*(f"a{n}" for n in range(20)))
    launcher.start(mux, observer=[])
    assert all_done(conn)
    assert len(seen) >= 21
    assert set(seen) == {None}


@both_styles
@pytest.mark.parametrize("value", [Incomparable, list], ids=["incomparable", "equal"])
def test_values_of_any_kind_stay_behind(
    launcher: Launcher, conn: psycopg.Connection, style: Style, value: Callable[[], Any]
) -> None:
    seen: list[Any] = []
    launcher.enqueue(*(f"b{n}" for n in range(10)))
    launcher.start(Mux().register("t", of_style(style, leaver(seen, value))))
    assert all_done(conn)
    assert all(found is None for found in seen)


@both_styles
def test_context_variables_that_the_observer_sets_for_a_job_are_seen_by_that_job_only(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    class Tagger(Recorder):
        def job_started(self, job: Job, /) -> None:
            assert tenant.get() is None
            tenant.set(job.id)

    seen: list[tuple[str, Any]] = []
    launcher.enqueue(*(f"b{n}" for n in range(10)))
    mux = Mux().register("t", of_style(style, lambda job: seen.append((job.id, tenant.get()))))
    launcher.start(mux, observer=Tagger())
    assert all_done(conn)
    assert len(seen) == 10
    assert all(id == found for id, found in seen)


@both_styles
@pytest.mark.parametrize("transactional", [False, True], ids=["simple", "transactional"])
def test_do_leaks_no_context_variable_of_the_job_to_its_caller(
    dsn: str, style: Style, transactional: bool
) -> None:
    seen: list[Any] = []

    def body(job: Job) -> None:
        seen.append(tenant.get())
        tenant.set(job.id)

    def key(job: Job) -> str:
        tenant.set("the key's")
        return job.id

    handler = of_style(style, body, transactional=transactional)
    register: Any = Mux().register
    mux = register("t", handler, transactional=transactional, exclusive=key)

    async def do_async() -> Any:
        async with AsyncClient(dsn) as client:
            tenant.set("the caller's")
            for _ in range(2):
                await client.do("q", mux)
            for _ in range(2):
                await adrain(client, "q", mux, limit=1)
            return tenant.get()

    def do() -> Any:
        tenant.set("the caller's")
        for _ in range(2):
            client.do("q", mux)
        for _ in range(2):
            drain(client, "q", mux, limit=1)
        drain(client, "q", mux, limit=2)
        return tenant.get()

    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", id=f"c{n}") for n in range(10)])
        assert contextvars.copy_context().run(do) == "the caller's"
        assert asyncio.run(do_async()) == "the caller's"
    assert seen == ["the caller's"] * 10


@both_styles
def test_a_drain_on_the_tests_connection_leaves_its_context_alone(dsn: str, style: Style) -> None:
    seen: list[Any] = []
    mux = Mux().register("t", of_style(style, leaver(seen)))

    async def drain_async() -> Any:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            await adrain(conn, "q", mux)
        return tenant.get()

    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", id=f"d{n}") for n in range(5)])
        with psycopg.connect(dsn) as conn:
            contextvars.copy_context().run(drain, conn, "q", mux)
            assert tenant.get() is None
            conn.rollback()
        assert asyncio.run(drain_async()) is None
    assert seen == [None] * 10


# -- wrappers that hide a coroutine ------------------------------------------------------------------


def hidden(body: Callable[[Job], Any], how: str) -> Any:
    """Make a plain function that returns an awaitable."""

    async def coroutine(job: Job) -> Any:
        await asyncio.sleep(0)
        return body(job)

    @functools.wraps(coroutine)
    def wrapper(job: Job) -> Any:
        tenant.set("the wrapper's")
        return coroutine(job)

    class Later:
        def __init__(self, job: Job) -> None:
            self.job = job

        def __await__(self) -> Any:
            return coroutine(self.job).__await__()

    return {"wraps": wrapper, "lambda": lambda job: coroutine(job), "awaitable": Later}[how]


each_way = pytest.mark.parametrize("how", ["wraps", "lambda", "awaitable"])


@each_way
@pytest.mark.parametrize("policy", [{}, {"timeout": 60}], ids=["simple", "timeout"])
def test_an_awaitable_that_a_plain_handler_returns_is_awaited_on_the_loop(
    launcher: Launcher, conn: psycopg.Connection, how: str, policy: dict[str, Any]
) -> None:
    loops: set[int] = set()
    found: list[Any] = []

    def body(job: Job) -> Any:
        loops.add(id(asyncio.get_running_loop()))
        found.append(tenant.get())
        if job.id == "fails" and job.attempt == 1:
            raise ValueError("as any handler")
        return Retry(0.0, "once more") if job.id == "again" and job.attempt == 1 else None

    observer = Recorder()
    launcher.enqueue("a", "fails", "again", *(f"n{n}" for n in range(20)))
    mux = Mux().register("t", hidden(body, how), backoff=lambda _: 0.0, **policy)
    launcher.start(mux, observer=observer, concurrency=3)
    assert all_done(conn)
    assert len(loops) == 1
    assert len(observer.of("started")) == 25
    assert eventually(lambda: len(observer.of("completed", "retried")) == 25)
    assert set(found) == {"the wrapper's" if how == "wraps" else None}


def test_a_hidden_coroutine_is_held_to_its_timeout(launcher: Launcher) -> None:
    async def forever(job: Job) -> None:
        await asyncio.sleep(NEVER)

    observer = Recorder()
    launcher.enqueue("a")
    mux = Mux().register("t", lambda job: forever(job), timeout=0.1, max_attempts=1)
    launcher.start(mux, observer=observer)
    observer.wait_for("timed_out", "a")
    observer.wait_for("dead", "a")


@each_way
def test_do_and_drain_await_a_coroutine_that_a_plain_handler_returns(dsn: str, how: str) -> None:
    seen: list[str] = []
    mux = Mux().register("t", hidden(lambda job: seen.append(job.id), how))

    async def do_async() -> None:
        async with AsyncClient(dsn) as client:
            assert await client.do("q", mux) == Complete()
            assert len(await adrain(client, "q", mux, limit=1)) == 1

    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", id=f"e{n}") for n in range(4)])
        assert client.do("q", mux) == Complete()
        assert len(drain(client, "q", mux, limit=1)) == 1
        asyncio.run(do_async())
    assert sorted(seen) == ["e0", "e1", "e2", "e3"]


def test_a_coroutine_that_nothing_can_await_is_refused_immediately_with_the_remedy(
    launcher: Launcher,
) -> None:
    async def coroutine(*_: object) -> None: ...

    async def forgets_await(job: Job) -> Any:
        return coroutine(job)

    observer = Recorder()
    mux = Mux().register("forgets", forgets_await)
    register: Any = mux.register
    register("transactional", lambda job, conn: coroutine(job, conn), transactional=True)
    launcher.enqueue("a", type="forgets")
    launcher.enqueue("b", type="transactional")
    launcher.start(mux, observer=observer)
    for id_ in "ab":
        observer.wait_for("dead", id_)
        [(_, _, attempt, text)] = [e for e in observer.of("dead") if e[1] == id_]
        assert attempt == 1
        assert "register the coroutine function itself" in text


# -- one loop -----------------------------------------------------------------------------------------


def test_the_coroutines_of_all_queues_run_on_one_loop(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    loops: set[tuple[int, int]] = set()

    async def handle(job: Job) -> None:
        await asyncio.sleep(0)
        loops.add((id(asyncio.get_running_loop()), threading.get_ident()))

    for queue in ("a", "b"):
        launcher.enqueue(*(f"{queue}{n}" for n in range(20)), queue=queue)
    launcher.start(Mux().register("t", handle), {"a": 4, "b": 4})
    assert all_done(conn)
    assert len(loops) == 1


def test_do_keeps_its_loop_until_the_client_is_closed(dsn: str) -> None:
    loops: set[Any] = set()
    left: list[asyncio.Task[None]] = []
    ended: list[str] = []

    async def stay(id_: str) -> None:
        try:
            await asyncio.sleep(NEVER)
        finally:
            await asyncio.sleep(0)
            ended.append(id_)

    async def handle(job: Job) -> None:
        loops.add(asyncio.get_running_loop())
        left.append(asyncio.create_task(stay(job.id)))
        await asyncio.sleep(0)

    mux = Mux().register("t", handle)
    threads = set(threading.enumerate())
    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", id=f"f{n}") for n in range(5)])
        for _ in range(4):
            client.do("q", mux)
        thread = threading.Thread(target=client.do, args=("q", mux))
        thread.start()
        thread.join()
        assert ended == []
    assert len(loops) == 1
    assert sorted(ended) == ["f0", "f1", "f2", "f3", "f4"]
    assert all(task.cancelled() for task in left)
    assert {loop.is_closed() for loop in loops} == {True}
    assert eventually(lambda: set(threading.enumerate()) <= threads)


def test_do_goes_on_after_an_exit_in_a_child_task(dsn: str) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    async def handle(job: Job) -> None:
        if job.attempt == 1:
            await asyncio.gather(leave())

    mux = Mux().register("t", handle, backoff=lambda _: 0.0)
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        with pytest.raises(SystemExit):
            client.do("q", mux)
        assert client.do("q", mux) == Complete()


def test_an_interrupt_cancels_the_coroutine_of_do_and_its_attempt_is_stored(dsn: str) -> None:
    async def handle(job: Job) -> None:
        if job.attempt == 1:
            signal.raise_signal(signal.SIGINT)  # which the main thread gets
            await asyncio.sleep(NEVER)

    mux = Mux().register("t", handle, backoff=lambda _: 0.0)
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        with pytest.raises(KeyboardInterrupt):
            client.do("q", mux)
        assert client.do("q", mux) == Complete()


def test_tasks_that_handlers_left_behind_are_cancelled_and_awaited_at_the_end_of_the_loop(
    dsn: str,
) -> None:
    ended: list[str] = []
    left: list[asyncio.Task[None]] = []
    entered = threading.Event()

    async def stay() -> None:
        entered.set()
        try:
            await asyncio.sleep(NEVER)
        finally:
            await asyncio.sleep(0.01)
            ended.append("cleaned up")

    async def handle(_: Job) -> None:
        left.append(asyncio.create_task(stay()))

    with Client(dsn) as client, warnings.catch_warnings():
        warnings.simplefilter("error")
        client.enqueue(EnqueueRequest("q", "t"))
        with Worker(client, "q", Mux().register("t", handle)):
            assert entered.wait(PATIENCE)
    assert ended == ["cleaned up"]
    assert left[0].cancelled()


def test_a_loop_that_is_stopped_while_it_unwinds_leaves_nothing_unawaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A thread that sees the end of its loop by itself still gets the stop that `close` sends.
    complaints: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", complaints.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stopped = asyncio.new_event_loop()
        stopped.call_soon(stopped.stop)
        loop._unwind(stopped)
        gc.collect()
    assert stopped.is_closed()
    assert complaints == []


# -- slots that die -------------------------------------------------------------------------------------


async def _exit(error: type[BaseException]) -> None:
    await asyncio.sleep(0)
    raise error("in a child")


async def _gather() -> None:
    await asyncio.gather(_exit(SystemExit))


async def _gather_interrupt() -> None:
    await asyncio.gather(_exit(KeyboardInterrupt))


async def _wait() -> None:
    child = asyncio.create_task(_exit(SystemExit))
    await asyncio.wait([child])
    child.result()


async def _forgotten() -> None:
    child = asyncio.create_task(_exit(SystemExit))
    await asyncio.sleep(0.05)
    child.result()


async def _task_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_exit(SystemExit))


async def _callback() -> None:
    def leave() -> None:
        raise SystemExit("in a callback")

    asyncio.get_running_loop().call_soon(leave)
    await asyncio.sleep(0.01)
    raise ValueError("after the callback")


async def _stop() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.01)
    raise ValueError("after the stop")


async def _break() -> None:
    """Make the loop fail each time that it is run."""

    def broken() -> None:
        raise OSError("the loop is broken")

    loop: Any = asyncio.get_running_loop()
    loop._run_once = broken
    await asyncio.sleep(NEVER)


ENDS = [
    _gather,
    _gather_interrupt,
    _wait,
    _forgotten,
    _task_group,
    _callback,
    _stop,
    _break,
]


class Thrown(Exception):
    """An exception that some libraries raise in other threads."""


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__.strip("_"))
def test_an_exception_that_ends_the_loop_of_a_worker_ends_only_the_attempt(
    dsn: str, conn: psycopg.Connection, end: Any
) -> None:
    observer, neighbour = Recorder(), Gate()

    async def handle(job: Job) -> None:
        if job.id == "ends" and job.attempt == 1:
            await end()

    mux = Mux().register("t", handle, backoff=lambda _: 0.0).register("gate", neighbour.coroutine)
    threads = set(threading.enumerate())
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "gate", id="neighbour"))
        options: Any = {"concurrency": 4, "lease": 2, "observer": observer, "poll_interval": 0.1}
        with Worker(client, "q", mux, **options) as worker:
            neighbour.wait()
            client.bulk_enqueue([EnqueueRequest("q", "t", id=f"h{n}") for n in range(5)])
            client.enqueue(EnqueueRequest("q", "t", id="ends"))
            observer.wait_for("retried", "ends")
            observer.wait_for("completed", "ends")
            client.bulk_enqueue([EnqueueRequest("q", "t", id=f"i{n}") for n in range(5)])
            neighbour.released.set()
            assert all_done(conn)
            assert worker.failure is None
        assert client.dlq.list() == []
    assert len([e for e in observer.of("retried") if e[1] == "ends"]) == 1
    assert observer.of("lost") == []
    assert eventually(lambda: set(threading.enumerate()) <= threads)


def test_slots_whose_threads_were_killed_come_back(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Recorder()
    before, kills = Threads._work, 6

    def work(threads: Threads, me: Any, context: contextvars.Context) -> bool:
        nonlocal kills
        if kills:
            kills -= 1
            if kills % 2:  # with its job, which is in nobody's hands any more
                threads.slots.jobs.popleft()
            else:
                me.claimed = threads.slots.jobs.popleft()
            raise Thrown("outside of any handler")
        return before(threads, me, context)

    monkeypatch.setattr(Threads, "_work", work)
    barrier = threading.Barrier(2)

    def meet(_: Job) -> None:
        barrier.wait(PATIENCE)

    launcher.enqueue(*(f"l{n}" for n in range(6)))
    mux = Mux().register("t", meet, backoff=lambda _: 0.0)
    worker = launcher.start(mux, observer=observer, concurrency=2, lease=1, poll_interval=0.05)
    assert all_done(conn)
    assert worker.failure is None
    assert observer.of("lost") == []
    assert len(observer.of("retried")) == 3
    for event in observer.of("retried"):
        assert "was ended, by Thrown: outside of any handler" in event[4]


def test_a_job_on_its_way_to_the_loop_is_not_given_back_when_slots_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claimed, before = Claimed(a_job(), 1), vars(Threads)["busy"].fget

    def moves(threads: Threads) -> Any:
        # From a thread that is idle now.
        executor.tasks.moving[Slot(claimed)] = _Move(executor._loop.event_loop())
        return before(threads)

    monkeypatch.setattr(Threads, "busy", property(moves))
    with running(lambda _: None) as (slots, executor):
        executor.suspect()
        executor.watch(lambda: [claimed], PATIENCE)
        assert slots.collect() == []
        executor.tasks.moving.clear()


# -- slots without a worker ----------------------------------------------------------------------------


class Control:
    """Does the control thread's part for a queue's slots, without a database."""

    def __init__(self, mux: Mux, loop: Loop, *, concurrency: int) -> None:
        self.errors: list[BaseException] = []
        self.timed_out: list[str] = []
        self.rings = 0
        self.ended: dict[str, list[Outcome]] = {}
        self._held: dict[str, Claimed] = {}
        self._tokens = count()
        self.slots = Slots(
            mux,
            Transactions(("", {}), fork_guard := ForkGuard()),
            fork_guard,
            queue="q",
            clock=ServerClock(),
            concurrency=concurrency,
            lease=30.0,
            started=None,
            timed_out=lambda job, _: self.timed_out.append(job.id),
            finished=self._ring,
            idle=lambda: None,
            hindered=self.errors.append,
        )
        self.executor = Executor(self.slots, loop)

    def _ring(self) -> None:
        self.rings += 1

    def submit(self, *jobs: Job) -> None:
        batch = [Claimed(job, next(self._tokens)) for job in jobs]
        self._held |= {claimed.job.id: claimed for claimed in batch}
        self.executor.submit(batch)

    def turn(self) -> None:
        """Settle what has ended, check the slots, and claim released jobs again."""
        self._collect()
        if self.executor.next_timeout <= monotonic():
            self.executor.expire(monotonic())
        self.executor.watch(lambda: [*self._held.values()], PATIENCE)
        self._collect()

    def _collect(self) -> None:
        for outcome in self.slots.collect():
            job = outcome.claimed.job
            assert self._held.pop(job.id, None) is outcome.claimed, f"settled twice: {outcome}"
            if isinstance(outcome.result, Release):
                self.submit(job)
            else:
                self.ended.setdefault(job.id, []).append(outcome)

    @property
    def is_idle(self) -> bool:
        """Take a turn; whether all jobs are settled and all slots free."""
        self.turn()
        return not self._held and self.slots.free == self.slots.concurrency

    def error_of(self, id_: str) -> str:
        (outcome,) = self.ended[id_]
        return str(getattr(outcome.result, "error", ""))


@contextmanager
def controls(mux: Mux, number: int = 1, *, concurrency: int) -> Iterator[tuple[Loop, Any]]:
    """Make the controls of some queues with one loop."""
    loop = Loop("bgjob-loop")
    made = [Control(mux, loop, concurrency=concurrency) for _ in range(number)]
    try:
        yield loop, made[0] if number == 1 else made
    finally:
        for control in made:
            control.executor.close()
        loop.close(PATIENCE)


@pytest.fixture
def dead_loops() -> Iterator[None]:
    """Collect the coroutines of dead loops here, and not in another test.

    Not within the test either: where a named tuple is being made, a coroutine cannot be closed.
    """
    gc.disable()
    try:
        yield
        gc.collect()
        # What a record of the log still refers to is collected much later.
        for left in gc.get_objects():
            # By its type: `isinstance` asks an object for its class, and some raise, for
            # example Django's settings.
            kind: type = type(left)
            if issubclass(kind, asyncio.Task) and not left.done():
                left._log_destroy_pending = False
            elif kind is CoroutineType and left.cr_code.co_filename == __file__:
                left.close()
    finally:
        gc.enable()


def breaks_loops(test: Any) -> Any:
    """Mark a test that calls `broken`: some coroutines of that loop are never awaited."""
    ignore = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    return pytest.mark.usefixtures("dead_loops")(ignore(test))


def broken(loop: Loop, turns: int = 0) -> bool:
    """End an own loop after so many turns, so that it cannot be run again; wait for that."""
    event_loop: Any = loop.event_loop()
    thread = loop._thread
    assert thread is not None

    def fail() -> None:
        raise OSError("the loop is broken")

    def break_it(turns: int) -> None:
        if turns:
            event_loop.call_soon(break_it, turns - 1)
        else:
            event_loop._run_once = fail

    event_loop.call_soon_threadsafe(break_it, turns)
    thread.join(PATIENCE)
    return not thread.is_alive()


@breaks_loops
def test_only_jobs_of_the_former_loop_are_lost_when_another_queue_has_replaced_it() -> None:
    gate = Gate()
    with controls(Mux().register("t", gate.coroutine), 2, concurrency=2) as (loop, queues):
        faster, slower = queues
        slower.submit(a_job(id="before"))
        gate.wait()
        assert broken(loop)
        faster.turn()
        slower.submit(a_job(id="after"))
        gate.wait()
        slower.turn()
        slower.turn()
        assert slower.slots.free == 1
        assert "was ended" in slower.error_of("before")
        gate.released.set()
        assert eventually(lambda: slower.is_idle)
        assert slower.ended["after"][0].result is COMPLETE


@breaks_loops
@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "unnoticed"])
@pytest.mark.parametrize("type", ["coroutine", "moves"])
def test_a_slot_on_its_way_to_a_loop_that_dies_is_freed_once(type: str, is_noticed: bool) -> None:
    ran: list[str] = []
    was_late = threading.Event()

    async def handle(job: Job) -> None:
        ran.append(job.id)

    mux = Mux().register("coroutine", handle).register("moves", lambda job: handle(job))
    with controls(mux, concurrency=1) as (loop, control):
        event_loop: Any = loop.event_loop()
        schedule = event_loop.call_soon_threadsafe

        def too_late(*args: Any) -> Any:
            event_loop.call_soon_threadsafe = schedule
            assert broken(loop)
            event_loop.close()
            if is_noticed:
                control.turn()
            was_late.set()
            return schedule(*args)

        event_loop.call_soon_threadsafe = too_late
        control.submit(a_job(type, id="a"))
        assert was_late.wait(PATIENCE)
        assert eventually(lambda: control.is_idle)
        assert ran == ["a"]


@breaks_loops
def test_no_slot_is_won_or_lost_however_often_the_loop_is_replaced() -> None:
    random = Random(7)
    concurrency = 3
    running: dict[str, set[tuple[str, object]]] = {"a": set(), "b": set()}
    most = dict.fromkeys(running, 0)

    @contextmanager
    def counted(job: Job) -> Iterator[None]:
        """Count the handlers that run beside this; those of a dead loop do not."""
        where = asyncio.get_running_loop()
        queue, me = job.id[0], (job.id, where)
        running[queue].add(me)
        beside = sum(other is where for _, other in running[queue].copy())
        most[queue] = max(most[queue], beside)
        try:
            yield
        finally:
            running[queue].remove(me)

    async def coroutine(job: Job) -> None:
        with counted(job):
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0.0005)

    async def hanging(job: Job) -> None:
        with counted(job):
            await asyncio.sleep(NEVER)

    mux = (
        Mux()
        .register("coroutine", coroutine)
        .register("moves", lambda job: coroutine(job))
        .register("plain", lambda _: None)
        .register("hangs", hanging)
        .register("hangs later", lambda job: hanging(job))
    )
    types = ["coroutine", "moves", "plain", "hangs", "hangs later"]
    with controls(mux, 2, concurrency=concurrency) as (loop, queues):
        submitted = 0
        for _ in range(100):
            for name, control in zip("ab", queues, strict=True):
                jobs = [
                    a_job(id=f"{name}{submitted + n}", type=type)
                    for n, type in enumerate(random.choices(types, k=random.randrange(1, 9)))
                ]
                submitted += len(jobs)
                control.submit(*jobs)
            for _ in range(random.randrange(6)):
                random.choice(queues).turn()
            assert broken(loop, random.randrange(6))
            for _ in range(random.randrange(6)):
                random.choice(queues).turn()
        while not all([control.is_idle for control in queues]):
            if any(control.executor.tasks.is_unwinding for control in queues):
                assert broken(loop, 6)  # the last of those that hang
        assert sum(len(control.ended) for control in queues) == submitted
        assert most == dict.fromkeys(running, concurrency)


# -- exceptions that other threads raise in a slot's thread ---------------------------------------------


def throw(ident: int, error: type[BaseException] | None = Thrown) -> bool:
    """Raise an exception in another thread at its next instruction, or do not; whether it lives."""
    what = None if error is None else ctypes.py_object(error)
    return bool(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), what))


def raising(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> list[Any]:
    """Raise an exception once, after a method has done its work on a slot's thread."""
    before, left = getattr(owner, method), ["once"]

    def call(*args: Any, **options: Any) -> Any:
        answer = before(*args, **options)
        if left and threading.current_thread().name.startswith("bgjob-q-"):
            left.pop()
            raise Thrown(method)
        return answer

    monkeypatch.setattr(owner, method, call)
    return left


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_slot_whose_thread_dies_while_it_moves_to_the_loop_moves_once(when: str) -> None:
    ran: list[str] = []

    async def later(job: Job) -> None:
        ran.append(job.id)

    with controls(Mux().register("t", lambda job: later(job)), concurrency=1) as (loop, control):
        event_loop: Any = loop.event_loop()
        schedule = event_loop.call_soon_threadsafe

        def die(*args: Any) -> None:
            event_loop.call_soon_threadsafe = schedule
            if when == "after":
                schedule(*args)
            raise Thrown("on the way")

        event_loop.call_soon_threadsafe = die
        control.submit(a_job(id="a"), a_job(id="b"))
        assert eventually(lambda: control.is_idle)
        assert ran == ["a", "b"]


@pytest.mark.parametrize("arg", [None, ELSEWHERE], ids=["here", "elsewhere"])
def test_a_job_that_moves_to_a_thread_that_dies_fails(
    monkeypatch: pytest.MonkeyPatch, arg: bytes | None
) -> None:
    async def coroutine(job: Job) -> None: ...

    mux = Mux().register("t", lambda _: None).register("c", coroutine)
    with controls(mux, concurrency=1) as (_, control):
        control.submit(a_job(id="before"))
        assert eventually(lambda: control.is_idle)
        threads = control.executor._threads
        (thread,) = threads.resting
        assert throw(thread.thread.ident)  # as soon as it has the next job
        start = threads.start

        def start_and_check(claimed: Claimed | None) -> None:
            start(claimed)
            if claimed is not None:
                assert eventually(lambda: thread.is_over)
                control.turn()  # while the task that handed over its job still exists

        monkeypatch.setattr(threads, "start", start_and_check)
        control.submit(a_job("c", id="a"), a_job(id="b", arg=arg))
        assert eventually(lambda: control.is_idle)
        assert "was ended, by Thrown" in control.error_of("b")


def test_a_thread_that_dies_without_a_word_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    run, deaths = Threads._thread, ["before its first job"]

    def dies(threads: Threads, me: Any) -> None:
        if not deaths:
            run(threads, me)
        deaths.clear()

    monkeypatch.setattr(Threads, "_thread", dies)
    with controls(Mux().register("t", lambda _: None), concurrency=1) as (_, control):
        control.submit(a_job(id="a"))
        assert eventually(lambda: control.is_idle)
        assert control.ended["a"][0].result is COMPLETE


def test_a_thread_that_reports_its_death_is_replaced_immediately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    mux = Mux().register("t", lambda job: ran.append(job.id))
    with controls(mux, concurrency=1) as (_, control):
        reported = threading.Event()

        def check() -> None:
            monkeypatch.undo()
            assert control.slots.needs_watch
            control.turn()  # while the thread that calls this still exists
            reported.set()

        monkeypatch.setattr(control.slots, "finished", check)
        monkeypatch.setattr(Threads, "_work", lambda *_: 1 / 0)
        control.submit(a_job(id="a"))
        assert reported.wait(PATIENCE)
        assert eventually(lambda: ran == ["a"])
        assert eventually(lambda: control.is_idle)


def test_an_idle_thread_that_dies_gets_no_more_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    left = raising(monkeypatch, Threads, "_work")
    with controls(Mux().register("t", lambda _: None), concurrency=1) as (_, control):
        control.submit(a_job(id="a"))
        assert eventually(lambda: not left and control.is_idle)
        assert eventually(lambda: control.turn() or not control.executor._threads.all)
        assert control.executor._threads.resting == []
        control.submit(a_job(id="b"))
        assert eventually(lambda: control.is_idle)
        assert control.ended["b"][0].result is COMPLETE


def test_a_run_that_an_exception_ends_before_its_handler_does_not_time_out_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = raising(monkeypatch, Timeouts, "began")
    with controls(Mux().register("t", lambda _: None, timeout=60), concurrency=1) as (_, control):
        control.submit(a_job(id="a"))
        assert eventually(lambda: control.is_idle)
        assert not left
        assert "began" in control.error_of("a")
        assert control.executor.next_timeout == inf


@pytest.mark.parametrize("method", ["ended", "slot_recovered"])
def test_a_run_that_was_given_up_comes_back_once_though_its_thread_dies_then(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    gates = {name: Gate() for name in "abc"}
    mux = Mux().register("t", lambda job: gates[job.id](job), timeout=0.01)
    with controls(mux, concurrency=1) as (_, control):

        def is_given_up(id_: str) -> bool:
            control.turn()
            return id_ in control.ended

        control.submit(a_job(id="a"))
        assert eventually(lambda: is_given_up("a"))
        left = raising(monkeypatch, Timeouts, method)
        gates["a"].released.set()
        assert eventually(lambda: not left)
        assert eventually(lambda: control.is_idle and not control.executor._threads.busy)
        # One slot is replaced, and not two.
        control.submit(a_job(id="b"), a_job(id="c"))
        assert eventually(lambda: is_given_up("b"))
        assert control.executor.usable == 1
        assert eventually(lambda: is_given_up("c"))
        assert (control.executor.usable, control.slots.free) == (0, 0)
        for gate in gates.values():
            gate.released.set()
        assert eventually(lambda: control.is_idle)


def test_a_thread_that_gets_a_job_while_it_becomes_idle_is_idle_once_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late, gate = Gate(), Gate()
    mux = Mux().register("late", late, timeout=0.01).register("t", gate)
    with controls(mux, concurrency=1) as (_, control):
        control.submit(a_job("late", id="a"))
        assert eventually(lambda: control.turn() or control.ended)  # another slot replaces its own

        def submit() -> None:
            monkeypatch.undo()
            assert control.executor._threads.resting  # the thread that calls this
            control.submit(a_job(id="b"))

        monkeypatch.setattr(control.slots, "finished", submit)
        late.released.set()
        gate.wait()
        gate.released.set()
        assert eventually(lambda: control.is_idle)
        assert len(control.executor._threads.resting) == 1


@breaks_loops
def test_a_thread_whose_cancelled_job_finds_no_loop_is_idle_once_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, gate = NoThreads(monkeypatch, "bgjob-loop"), Gate()

    async def coroutine(_: Job) -> None: ...

    def moves(job: Job) -> Any:
        gate(job)
        return coroutine(job)

    with controls(Mux().register("t", moves), concurrency=1) as (_, control):
        control.submit(a_job(id="a"))
        gate.wait()
        threads.are_refused = True
        assert control.executor.interrupt([*control._held.values()], monotonic()).silent
        gate.released.set()
        assert eventually(lambda: control.errors)
        threads.are_refused = False
        assert eventually(lambda: control.is_idle)
        assert len(control.executor._threads.resting) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_thread_that_dies_before_it_begins_could_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bootstrap, deaths = threading.Thread._bootstrap, 2  # type: ignore[attr-defined]

    def dies(thread: threading.Thread) -> None:
        nonlocal deaths
        if deaths and thread.name.startswith("bgjob-q-"):
            deaths -= 1
            raise MemoryError
        bootstrap(thread)

    monkeypatch.setattr(threading.Thread, "_bootstrap", dies)
    monkeypatch.setattr("bgjob._worker.threads._BEGINS_WITHIN", 0.01)
    with controls(Mux().register("t", lambda _: None), concurrency=1) as (_, control):
        control.submit(a_job(id="a"))
        assert eventually(lambda: control.is_idle)
        assert not deaths
        assert len(control.errors) == 2
        assert "did not begin" in str(control.errors[0])
        assert control.ended["a"][0].result is COMPLETE


def test_a_thread_that_begins_too_late_takes_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    run, gate, late = Threads._thread, Gate(), threading.Event()
    bootstrap, ended = threading.Thread._bootstrap, []  # type: ignore[attr-defined]
    monkeypatch.setattr("bgjob._worker.threads._BEGINS_WITHIN", 0.01)

    def begins(thread: threading.Thread) -> None:
        if thread.name == "bgjob-q-1":
            assert late.wait(PATIENCE)
        bootstrap(thread)

    def ends(threads: Threads, me: Any) -> None:
        run(threads, me)
        ended.append(threading.current_thread().name)

    monkeypatch.setattr(threading.Thread, "_bootstrap", begins)
    monkeypatch.setattr(Threads, "_thread", ends)
    with controls(Mux().register("t", gate), concurrency=1) as (_, control):
        control.submit(a_job(id="a"), a_job(id="b"))
        assert eventually(lambda: control.turn() or gate.runs)
        late.set()
        assert eventually(lambda: ended == ["bgjob-q-1"])
        gate.released.set()
        assert eventually(lambda: control.is_idle)
        assert [job.id for job in gate.runs] == ["a", "b"]


def test_a_thread_that_has_begun_when_its_start_is_given_up_keeps_its_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    wait = _HasBegun.wait

    def misses(begun: _HasBegun, timeout: float | None = None) -> bool:
        wait(begun, timeout)
        gate.wait()
        raise RuntimeError("a new thread did not begin")

    monkeypatch.setattr(_HasBegun, "wait", misses)
    with controls(Mux().register("t", gate), concurrency=1) as (_, control):
        control.submit(a_job(id="a"))
        assert (control.slots.free, control.executor.usable) == (0, 1)
        gate.released.set()
        assert eventually(lambda: control.is_idle)
        assert control.errors == []


@breaks_loops
def test_exceptions_at_any_place_of_slots_threads_lose_no_job_and_no_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bgjob._worker.threads._BEGINS_WITHIN", 0.05)
    # Threads that die before they run a job tell these, and pytest would keep their frames.
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    random, concurrency, thrown = Random(7), 4, 0
    is_over, is_ready, barrier = threading.Event(), threading.Event(), threading.Barrier(4)

    def plain(_: Job) -> None:
        sum(range(random.randrange(500)))

    async def coroutine(_: Job) -> None:
        await asyncio.sleep(0)

    def changes(job: Job) -> None:
        tenant.set(job.id)

    def late(_: Job) -> None:
        time.sleep(0.004)  # not with an event, whose lock such an exception leaves locked

    def meets(_: Job) -> None:
        barrier.wait(PATIENCE)

    def throw_in_slots() -> None:
        nonlocal thrown
        jitter, others = Random(11), set(sys._current_frames())
        is_ready.set()
        while not is_over.wait(jitter.random() * 0.002):
            # Also threads that have not begun: their control thread waits for that.
            threads = sorted(sys._current_frames().keys() - others)
            thrown += bool(threads) and throw(jitter.choice(threads))
        for thread in sys._current_frames().keys() - others:
            throw(thread, None)

    mux = Mux().register("plain", plain).register("coroutine", coroutine)
    mux.register("moves", lambda job: coroutine(job)).register("changes", changes)
    mux.register("limited", plain, timeout=PATIENCE).register("late", late, timeout=0.002)
    mux.register("meets", meets)
    types = ["plain", "coroutine", "moves", "changes", "limited", "late"]
    interval = sys.getswitchinterval()
    with controls(mux, concurrency=concurrency) as (loop, control):
        loop.open()
        thread = threading.Thread(target=throw_in_slots)
        thread.start()
        assert is_ready.wait(PATIENCE)
        submitted = 0
        sys.setswitchinterval(1e-5)
        try:
            while thrown < 400:
                for _ in range(random.randrange(8)):
                    control.submit(a_job(random.choice(types), id=f"a{submitted}"))
                    submitted += 1
                control.turn()
                assert control.slots.free <= concurrency
        finally:
            sys.setswitchinterval(interval)
            is_over.set()
            thread.join()
        assert eventually(lambda: control.is_idle and not control.executor._threads.busy)
        assert len(control.ended) == submitted
        control.submit(*(a_job("meets", id=f"b{n}") for n in range(concurrency)))
        assert eventually(lambda: control.is_idle)
        assert not barrier.broken


# -- threads that cannot start -----------------------------------------------------------------------


class NoThreads:
    """Refuses to start threads whose name begins so, while it is switched on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
        self.refused = 0
        self.are_refused = False
        before = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if self.are_refused and thread.name.startswith(prefix):
                self.refused += 1
                raise RuntimeError("can't start new thread")
            before(thread)

        monkeypatch.setattr(threading.Thread, "start", start)


def test_where_no_thread_can_start_jobs_go_back_with_their_attempt_and_run_later(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer, threads = Recorder(), NoThreads(monkeypatch, "bgjob-q-")
    attempts: list[int] = []
    barrier = threading.Barrier(3)

    def handle(job: Job) -> None:
        attempts.append(job.attempt)
        barrier.wait(PATIENCE)

    threads.are_refused = True
    worker = launcher.start(
        Mux().register("t", handle, max_attempts=1), observer=observer, concurrency=3
    )
    launcher.enqueue("a", "b", "c")
    assert eventually(lambda: threads.refused >= 3)
    assert eventually(
        lambda: rows(conn, "select distinct attempt, token from bgjob_job") == [(0, None)]
    )
    threads.are_refused = False
    assert all_done(conn)  # all slots are there
    assert attempts == [1, 1, 1]
    assert worker.failure is None
    assert 1 <= len(observer.of("error")) <= 4  # once a second at most
    assert "no thread can start for a handler of queue 'q'" in str(observer.of("error")[0][1])
    assert launcher.client.dlq.list() == []


def test_jobs_run_on_the_threads_that_there_are(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, gate = NoThreads(monkeypatch, "bgjob-q-"), Gate()

    async def coroutine(_: Job) -> None:
        await asyncio.sleep(0)

    mux = Mux().register("t", lambda _: None).register("gate", gate).register("c", coroutine)
    worker = launcher.start(mux, concurrency=10, lease=1, poll_interval=0.05)
    launcher.enqueue("first", type="gate")
    gate.wait()
    threads.are_refused = True
    launcher.enqueue(*(f"m{n}" for n in range(20)))
    assert eventually(lambda: threads.refused > 0)
    gate.released.set()  # its thread is the only one
    launcher.enqueue(*(f"n{n}" for n in range(20)))
    launcher.enqueue(*(f"o{n}" for n in range(20)), type="c")
    assert all_done(conn)
    assert worker.failure is None


def test_the_start_of_a_thread_is_tried_again_after_pauses_that_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, gate, now = NoThreads(monkeypatch, "bgjob-q-"), Gate(), 1000.0
    monkeypatch.setattr("bgjob._worker.threads.monotonic", lambda: now)

    with controls(Mux().register("t", gate), concurrency=2) as (_, control):
        executor = control.executor

        def pauses(number: int) -> Iterator[float]:
            nonlocal now
            for _ in range(number):
                at, before = executor.next_timeout, threads.refused
                yield at - now
                executor.expire((now + at) / 2)
                assert threads.refused == before
                now = at
                executor.expire(now)
                assert threads.refused == before + 1

        threads.are_refused = True
        control.submit(a_job(id="a"))
        assert executor.usable == 0
        assert [*pauses(8)] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2])
        assert len(control.errors) == threads.refused == 9
        threads.are_refused = False
        now = executor.next_timeout
        executor.expire(now)
        gate.wait()
        assert (executor.usable, executor.next_timeout) == (2, inf)
        threads.are_refused = True
        control.submit(a_job(id="b"))
        assert executor.usable == 1
        assert [*pauses(2)] == pytest.approx([0.05, 0.1])  # as the first time
        threads.are_refused = False
        now = executor.next_timeout
        executor.expire(now)
        gate.wait()  # beside the first
        gate.released.set()
        assert eventually(lambda: control.is_idle)


def test_a_job_that_finds_no_thread_goes_back_to_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, ran = NoThreads(monkeypatch, "bgjob-q-"), []

    async def coroutine(job: Job) -> None:
        ran.append(job.id)

    mux = Mux().register("t", lambda job: ran.append(job.id)).register("c", coroutine)
    with controls(mux, concurrency=1) as (_, control):
        threads.are_refused = True
        control.submit(a_job("c", id="a"), a_job(id="b"), a_job(id="c"))
        # It reports the end of the first job, and then that the second needs a thread.
        assert eventually(lambda: control.rings == 2)
        assert control.slots.free == 1
        threads.are_refused = False
        assert eventually(lambda: control.is_idle)
    assert ran == ["a", "b", "c"]


@breaks_loops
def test_a_loop_whose_thread_cannot_start_again_is_tried_again_at_each_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, gate = NoThreads(monkeypatch, "bgjob-loop"), Gate()
    with controls(Mux().register("t", gate.coroutine), concurrency=1) as (loop, control):
        control.submit(a_job(id="a"), a_job(id="b"))
        gate.wait()
        threads.are_refused = True
        assert broken(loop)
        for n in range(1, 4):
            control.turn()
            assert threads.refused == n
            assert str(control.errors[-1]) == "can't start new thread"
        assert len(control.errors) == 3
        assert "was ended" in control.error_of("a")
        threads.are_refused = False
        gate.released.set()
        assert eventually(lambda: control.is_idle)
        assert control.ended["b"][0].result is COMPLETE


@pytest.mark.parametrize("name", ["bgjob-events", "bgjob-loop", "bgjob-worker"])
def test_a_worker_that_lacks_a_thread_of_its_own_does_not_start_and_explains_why(
    dsn: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async def handle(_: Job) -> None: ...

    threads = NoThreads(monkeypatch, name)
    before = set(threading.enumerate())
    with Client(dsn) as client:
        worker = Worker(client, {"a": 1, "b": 1}, Mux().register("t", handle))
        threads.are_refused = True
        with pytest.raises(RuntimeError, match="can't start new thread"):
            worker.run()
        assert worker.shutdown(0)
    assert eventually(lambda: set(threading.enumerate()) <= before)


def test_a_state_is_closed_though_no_thread_can_start(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, closed = NoThreads(monkeypatch, "bgjob-state"), []

    @contextmanager
    def state() -> Iterator[str]:
        yield "state"
        closed.append("closed")

    threads.are_refused = True
    with Client(dsn) as client, Worker(client, "q", Mux(), state=state):
        pass
    assert (threads.refused, closed) == (1, ["closed"])


# -- loops and starts that end early -------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_worker_ends_with_the_loop_that_asyncio_run_ends_and_releases_its_jobs(
    dsn: str, conn: psycopg.Connection, busy: bool
) -> None:
    entered = threading.Event()
    workers: list[AsyncWorker] = []
    threads = set(threading.enumerate())

    async def handle(_: Job) -> None:
        entered.set()
        await asyncio.sleep(NEVER)

    async def main() -> None:
        client = AsyncClient(dsn)
        worker = AsyncWorker(client, "q", Mux().register("t", handle), concurrency=2)
        workers.append(worker)
        await worker.run()
        if busy:
            await client.bulk_enqueue([EnqueueRequest("q", "t", id=f"p{n}") for n in range(3)])
            await asyncio.to_thread(entered.wait, PATIENCE)
        await client.close()

    asyncio.run(main())
    assert workers[0]._group.done.result(PATIENCE) is None
    assert isinstance(workers[0].failure, RuntimeError)
    assert "the event loop of the worker is ending" in str(workers[0].failure)
    assert rows(conn, "select attempt from bgjob_job where token is not null or attempt > 0") == []
    assert eventually(lambda: set(threading.enumerate()) <= threads)


def test_an_exit_in_a_child_task_ends_the_callers_loop_and_its_worker_reports_it(
    dsn: str, conn: psycopg.Connection
) -> None:
    workers: list[AsyncWorker] = []

    async def handle(job: Job) -> None:
        if job.id == "leaves":
            await asyncio.gather(_exit(SystemExit))
        await asyncio.sleep(NEVER)

    async def main() -> None:
        async with AsyncClient(dsn) as client:
            worker = AsyncWorker(client, "q", Mux().register("t", handle), concurrency=2)
            workers.append(worker)
            await worker.run()
            await client.bulk_enqueue([EnqueueRequest("q", "t", id=i) for i in ("a", "leaves")])
            await asyncio.sleep(NEVER)

    with pytest.raises(SystemExit):
        asyncio.run(main())
    workers[0]._group.done.result(PATIENCE)
    assert "the event loop of the worker is ending" in str(workers[0].failure)
    assert rows(conn, "select id, attempt from bgjob_job where token is not null") == []


@pytest.mark.parametrize("when", ["between two turns", "between two looks"])
def test_a_worker_whose_loop_was_closed_under_its_jobs_ends_and_releases_them(
    dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    loop = asyncio.new_event_loop()
    entered = asyncio.Event()

    async def handle(_: Job) -> None:
        entered.set()
        await asyncio.sleep(NEVER)

    async def begin() -> AsyncWorker:
        async with AsyncClient(dsn) as client:
            worker = AsyncWorker(client, "q", Mux().register("t", handle), poll_interval=0.1)
            await worker.run()
            await client.enqueue(EnqueueRequest("q", "t"))
            await entered.wait()
            return worker

    worker = loop.run_until_complete(begin())
    if when == "between two looks":
        # The control thread sees it stopped, and then closed.
        before = Loop.failure

        def failure(watched: Loop, *args: Any, **options: Any) -> RuntimeError | None:
            found = before(watched, *args, **options)
            loop.close()
            return found

        monkeypatch.setattr(Loop, "failure", failure)
    else:
        loop.close()
    worker._group.done.result(PATIENCE)
    assert "the event loop of the worker was closed" in str(worker.failure)
    assert rows(conn, "select attempt, token from bgjob_job") == [(0, None)]


def test_a_run_that_is_cancelled_leaves_no_worker(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()
    before = Session.open

    def slow(session: Session, *args: Any) -> None:
        before(session, *args)
        opening.set()
        assert go_on.wait(PATIENCE)

    threads = set(threading.enumerate())

    async def main() -> None:
        async with AsyncClient(dsn) as client:
            worker = AsyncWorker(client, "q", Mux())
            with monkeypatch.context() as patch:
                patch.setattr(Session, "open", slow)
                running = asyncio.create_task(worker.run())
                await asyncio.to_thread(opening.wait, PATIENCE)
                running.cancel()
                asyncio.get_running_loop().call_later(0.05, go_on.set)
                with pytest.raises(asyncio.CancelledError):
                    await running
            assert await worker.wait(0)
            assert worker.failure is None
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    async with AsyncWorker(client, "q", Mux()) as worker:
                        await asyncio.sleep(NEVER)
            assert await worker.wait(PATIENCE)

    asyncio.run(main())
    assert eventually(lambda: set(threading.enumerate()) <= threads)


def test_a_shutdown_in_a_signal_handler_while_run_connects_leaves_no_worker(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Session.open

    def interrupted(session: Session, *args: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)
        before(session, *args)
        signal.raise_signal(signal.SIGUSR1)

    threads = set(threading.enumerate())
    answers: list[bool] = []
    monkeypatch.setattr(Session, "open", interrupted)
    with Client(dsn) as client:
        worker = Worker(client, {"a": 1, "b": 1}, Mux(), state=lambda: pytest.fail("not needed"))
        handler = signal.signal(signal.SIGUSR1, lambda *_: answers.append(worker.shutdown()))
        try:
            worker.run()
        finally:
            signal.signal(signal.SIGUSR1, handler)
    assert worker.wait(0)
    assert answers == [True, True]  # the second queue did not connect any more
    assert not {t.name for t in set(threading.enumerate()) - threads if t.name != "never"}


# -- the bound of a shutdown -----------------------------------------------------------------------------

BOUND = 2.0
"""Seconds after the grace period."""


def ends_in_time(worker: Worker, grace: float) -> bool:
    began = time.monotonic()
    finished = worker.shutdown(grace)
    took = time.monotonic() - began
    assert took < grace + BOUND, f"{took} s for a grace period of {grace} s"
    return finished


def test_a_shutdown_does_not_wait_for_a_silent_server(dsn: str) -> None:
    gate = Gate()
    with Proxy(dsn) as proxy, Client(dsn) as client, Client(proxy.dsn(dsn)) as proxied:
        worker = Worker(proxied, "q", Mux().register("t", gate), lease=1, poll_interval=0.1)
        worker.run()
        client.enqueue(EnqueueRequest("q", "t"))
        gate.wait()
        proxy.silence()
        gate.released.set()
        assert not ends_in_time(worker, 0.2)
        proxy.forward()
        assert worker.wait(PATIENCE)


@pytest.mark.parametrize("what", ["service", "observer", "state"])
def test_a_shutdown_does_not_wait_for_a_handler_that_hangs(dsn: str, what: str) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hang(*_: object) -> float:
        entered.set()
        assert go_on.wait(PATIENCE)
        return NEVER

    class Hangs:
        def run(self, conn: psycopg.Connection[Any], /) -> float:
            return hang() if worker.has_begun else 0.01

    @contextmanager
    def state() -> Iterator[str]:
        yield "state"
        hang()

    class Begun(Worker):
        has_begun = False

    options: dict[str, dict[str, Any]] = {
        "service": {"services": [Hangs()]},
        "observer": {"observer": hang},
        "state": {"state": state},
    }
    with Client(dsn) as client:
        worker = Begun(client, "q", Mux().register("t", lambda _: None), **options[what])
        worker.run()
        worker.has_begun = True
        client.enqueue(EnqueueRequest("q", "t"))
        try:
            if what != "state":
                assert entered.wait(PATIENCE)
            ends_in_time(worker, 0.3)
        finally:
            go_on.set()
        assert worker.wait(PATIENCE)


def test_a_shutdown_does_not_wait_for_a_server_that_does_not_answer_a_start(dsn: str) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        with Client(make_conninfo(dsn, host="127.0.0.1", port=port)) as client:
            worker = Worker(client, "q", Mux(), init_timeout=4)
            errors: list[BaseException] = []

            def run() -> None:
                try:
                    worker.run()
                except psycopg.Error as error:
                    errors.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            accepted, _ = mute.accept()
            with accepted:
                ends_in_time(worker, 0.1)
                thread.join()
            assert worker.wait(0)
            assert len(errors) == 1


# -- the grace period ------------------------------------------------------------------------------------


def test_jobs_that_outlast_grace_periods_keep_their_attempts_and_record_how_often(
    dsn: str, conn: psycopg.Connection
) -> None:
    gates = [Gate(), Gate(), Gate()]
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t", id="long"))
        for n, gate in enumerate(gates, 1):
            mux = Mux().register("t", gate, max_attempts=1)
            with Worker(client, "q", mux, lease=1, poll_interval=0.05, grace=0):
                gate.wait()
            attempt, error, is_leased = row(
                conn, "select attempt, last_error, lease_until > clock_timestamp() from bgjob_job"
            )
            assert (attempt, is_leased) == (0, True)  # no worker starts it while the handler runs
            assert f"abandoned at the end of a grace period, {n} in a row" in error
            gate.released.set()
        observer = Recorder()
        options: Any = {"lease": 1, "poll_interval": 0.05, "observer": observer}
        with Worker(client, "q", Mux().register("t", lambda _: None, max_attempts=1), **options):
            assert all_done(conn)
        assert observer.of("completed") == [("completed", "long", 1)]
        assert client.dlq.list() == []


@pytest.mark.parametrize("policy", [{}, {"timeout": 60}, {"transactional": True}])
def test_a_coroutine_that_is_cancelled_at_the_end_is_due_again_immediately(
    launcher: Launcher, conn: psycopg.Connection, policy: dict[str, Any]
) -> None:
    entered = threading.Event()

    async def handle(job: Job, *_: object) -> None:
        entered.set()
        await asyncio.sleep(NEVER)

    async def transactional(job: Job, _: object) -> None:
        await handle(job)

    register: Any = Mux().register
    mux = register(
        "t", transactional if "transactional" in policy else handle, max_attempts=1, **policy
    )
    launcher.enqueue("a")
    worker = launcher.start(mux)
    assert entered.wait(PATIENCE)
    assert not launcher.shutdown(worker, timeout=0)  # it was cut short
    assert rows(conn, "select id, attempt, token, lease_until, deaths from bgjob_job") == [
        ("a", 0, None, None, 0)
    ]


def test_a_coroutine_that_ends_while_it_is_cancelled_is_settled(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    entered = threading.Event()

    async def handle(job: Job) -> None:
        entered.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(NEVER)

    launcher.enqueue("a")
    worker = launcher.start(Mux().register("t", handle))
    assert entered.wait(PATIENCE)
    assert launcher.shutdown(worker, timeout=0)
    assert rows(conn, "select id from bgjob_job") == []


# -- a worker alongside other work -----------------------------------------------------------------------


def test_a_worker_runs_until_an_event_and_is_shut_down(dsn: str, conn: psycopg.Connection) -> None:
    stop = threading.Event()
    threads = set(threading.enumerate())
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        worker = Worker(client, "q", Mux().register("t", lambda _: stop.set()))
        worker.run_until(stop)
        assert worker.wait(0)
        assert rows(conn, "select id from bgjob_job") == []

        async def main() -> None:
            done = asyncio.Event()

            async def handle(_: Job) -> None:
                done.set()

            async with AsyncClient(dsn) as client:
                await client.enqueue(EnqueueRequest("q", "t"))
                worker = AsyncWorker(client, "q", Mux().register("t", handle))
                await worker.run_until(done)
                assert await worker.wait(0)

        asyncio.run(main())
    assert rows(conn, "select id from bgjob_job") == []
    assert eventually(lambda: set(threading.enumerate()) <= threads)


@pytest.mark.both_colours
def test_a_worker_that_ends_by_itself_raises_its_failure_where_it_is_waited_for(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bool:
        raise ValueError("broken")

    monkeypatch.setattr(QueueControl, "_turn", broken)
    worker = launcher.make(Mux())
    never = asyncio.Event() if launcher.is_async else threading.Event()
    with pytest.raises(ValueError, match="broken"):
        launcher.run(worker.run_until(never))


def test_an_interrupt_of_a_program_shuts_its_worker_down(dsn: str) -> None:
    def interrupt(_: Job) -> None:
        signal.raise_signal(signal.SIGINT)

    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "t"))
        worker = Worker(client, "q", Mux().register("t", interrupt))
        with pytest.raises(KeyboardInterrupt):
            worker.run_until(threading.Event())
        assert worker.wait(0)
