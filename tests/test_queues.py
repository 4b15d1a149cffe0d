"""One worker works on several queues, each with slots and a connection of its own."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from support.database import all_done, row, terminate_workers
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Launcher, Gate, Recorder, Style, both_styles, handler

from bgjob import Client, Job, Mux, NoopObserver, QueueRequiredError, Worker
from bgjob._worker.control import QueueControl
from bgjob._worker.session import Session


def connections(conn: psycopg.Connection) -> int:
    """How many connections of workers there are."""
    number: int = row(
        conn,
        "select count(*) from pg_stat_activity "
        "where datname = current_database() and application_name = 'bgjob'",
    )[0]
    return number


class Service:
    """Counts how often it is run."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        self.runs += 1
        return NEVER


class State:
    """Counts how often it is opened and closed."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @contextmanager
    def __call__(self) -> Iterator["State"]:
        self.told.append("opened")
        yield self
        self.told.append("closed")


# -- slots -----------------------------------------------------------------------------------


@both_styles
def test_each_queue_has_its_own_concurrency(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    gate = Gate()
    queues = {"high": 3, "default": 2, "low": 1}
    for queue in queues:
        launcher.enqueue(*[f"{queue}{n}" for n in range(5)], queue=queue)
    launcher.start(Mux().register("t", gate.of(style)), queues)
    for _ in range(6):
        gate.wait()
    assert Counter(job.queue for job in gate.runs) == queues
    assert row(conn, "select count(*) from bgjob_job where token is not null") == (6,)
    gate.released.set()
    assert all_done(conn)


@both_styles
def test_a_busy_queue_takes_no_slot_of_another(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    gate, observer = Gate(), Recorder()
    mux = Mux().register("slow", gate.of(style)).register("t", handler(style, lambda _: None))
    launcher.enqueue(*[f"slow{n}" for n in range(10)], queue="low", type="slow")
    launcher.start(mux, {"high": 1, "low": 1}, observer=observer, poll_interval=NEVER)
    gate.wait()
    launcher.enqueue(*[f"fast{n}" for n in range(50)], queue="high")
    observer.wait_for("completed", times=50)
    assert len(gate.runs) == 1
    gate.released.set()
    assert all_done(conn)


def test_each_queue_has_one_connection(launcher: Launcher, conn: psycopg.Connection) -> None:
    worker = launcher.start(Mux(), {"a": 5, "b": 5, "c": 5})
    assert connections(conn) == 3
    launcher.shutdown(worker)
    assert eventually(lambda: connections(conn) == 0)


def test_a_worker_survives_the_loss_of_all_its_connections(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    observer = Recorder()
    launcher.start(Mux().register("t", lambda _: None), {"a": 1, "b": 1}, observer=observer)
    assert terminate_workers(conn) == 2
    for queue in "ab":
        launcher.enqueue(queue, queue=queue)
        observer.wait_for("completed", queue)


def test_coroutines_of_all_queues_of_an_async_worker_run_on_the_callers_loop(dsn: str) -> None:
    launcher = Launcher(dsn, is_async=True)
    try:
        loops: list[asyncio.AbstractEventLoop] = []

        async def handle(job: Job) -> None:
            loops.append(asyncio.get_running_loop())

        for queue in "abc":
            launcher.enqueue(queue, queue=queue)
        launcher.start(Mux().register("t", handle), {"a": 1, "b": 1, "c": 1})
        assert eventually(lambda: len(loops) == 3)
        assert set(loops) == {launcher._loop}
    finally:
        launcher.close()


# -- events ------------------------------------------------------------------------------------


def test_events_name_their_queue_and_are_delivered_one_at_a_time(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    completed: list[tuple[str, str]] = []
    empty: list[str] = []
    threads: set[threading.Thread] = set()

    class Observer(NoopObserver):
        def job_completed(self, job: Job, /) -> None:
            threads.add(threading.current_thread())
            completed.append((job.id, job.queue))

        def queue_is_empty(self, queue: str, /) -> None:
            threads.add(threading.current_thread())
            empty.append(queue)

    for queue in "abc":
        launcher.enqueue(f"in {queue}", queue=queue)
    launcher.start(
        Mux().register("t", lambda _: None), {"a": 1, "b": 1, "c": 1}, observer=Observer()
    )
    assert eventually(lambda: len(completed) == 3 and set(empty) == {"a", "b", "c"})
    assert set(completed) == {("in a", "a"), ("in b", "b"), ("in c", "c")}
    assert len(threads) == 1


# -- what the queues share --------------------------------------------------------------------


@both_styles
def test_the_state_is_made_once_and_closed_after_the_last_handler_of_the_last_queue(
    launcher: Launcher, style: Style
) -> None:
    state, gate, observer = State(), Gate(), Recorder()
    given: list[Any] = []
    told: list[list[str]] = []

    def plain(job: Job, state: State) -> None:
        given.append(state)
        if job.queue == "b":
            gate(job)
        told.append([*state.told])

    async def coroutine(job: Job, state: State) -> None:
        given.append(state)
        if job.queue == "b":
            await gate.coroutine(job)
        told.append([*state.told])

    mux = Mux().register("t", plain if style == "plain" else coroutine)
    launcher.enqueue("a", queue="a")
    launcher.enqueue("b", queue="b")
    worker = launcher.start(mux, {"a": 1, "b": 1}, state=state, observer=observer)
    observer.wait_for("completed", "a")
    gate.wait()
    ending = threading.Thread(target=launcher.shutdown, args=(worker,), kwargs={"timeout": None})
    ending.start()
    # The queue without a job has ended; the state is there for the other's.
    assert eventually(lambda: worker._group._at_work == 1)
    assert state.told == ["opened"]
    gate.released.set()
    ending.join(PATIENCE)
    assert not ending.is_alive()
    assert told == [["opened"]] * 2
    assert given == [state] * 2
    assert state.told == ["opened", "closed"]


def test_services_are_run_by_one_queue(launcher: Launcher, conn: psycopg.Connection) -> None:
    service, observer = Service(), Recorder()
    launcher.start(Mux(), {"a": 1, "b": 1, "c": 1}, services=[service], observer=observer)
    observer.wait_for("empty", times=3)
    assert service.runs == 1


# -- starts and ends --------------------------------------------------------------------------


@both_styles
def test_a_shutdown_waits_for_the_handlers_of_all_queues(
    launcher: Launcher, conn: psycopg.Connection, style: Style
) -> None:
    gates = {"a": Gate(), "b": Gate()}
    mux = Mux().register("a", gates["a"].of(style)).register("b", gates["b"].of(style))
    for queue in "ab":
        launcher.enqueue(queue, f"{queue} waits", queue=queue, type=queue)
    worker = launcher.start(mux, {"a": 1, "b": 1})
    for gate in gates.values():
        gate.wait()
    settled: list[bool] = []
    ending = threading.Thread(
        target=lambda: settled.append(launcher.shutdown(worker, timeout=None))
    )
    ending.start()
    # Asked a moment later, the queue would have claimed the job that waits.
    assert eventually(lambda: all(c._give_up_at is not None for c in worker._group._controls))
    gates["a"].released.set()
    assert eventually(lambda: row(conn, "select count(*) from bgjob_job where id = 'a'") == (0,))
    assert ending.is_alive()
    assert settled == []
    gates["b"].released.set()
    ending.join(PATIENCE)
    assert settled == [True]
    left = "select array_agg(id order by id), max(attempt), count(token) from bgjob_job"
    assert row(conn, left) == (["a waits", "b waits"], 0, 0)


def test_a_job_that_outlives_the_grace_period_in_one_queue_is_reported(launcher: Launcher) -> None:
    gate = Gate()
    launcher.enqueue("a", queue="a")
    worker = launcher.start(Mux().register("t", gate), {"a": 1, "b": 1})
    gate.wait()
    assert not launcher.shutdown(worker, timeout=0)
    gate.released.set()


@pytest.mark.both_colours
def test_a_shutdown_from_inside_a_handler_of_any_queue_does_not_wait(launcher: Launcher) -> None:
    workers: list[Any] = []
    ended: list[str] = []

    def handle(job: Job) -> None:
        if not launcher.is_async:
            workers[0].shutdown()
            ended.append(job.queue)

    async def coroutine(job: Job) -> None:
        await workers[0].shutdown()
        ended.append(job.queue)

    mux = Mux().register("t", coroutine if launcher.is_async else handle)
    workers.append(launcher.start(mux, {"a": 1, "b": 1}))
    launcher.enqueue("b", queue="b")
    assert launcher.run(workers[0].wait(PATIENCE))
    assert ended == ["b"]


class Refusal:
    """Refuses one queue's connection until it is allowed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, queue: str) -> None:
        self.is_over = False
        before = Session.open

        def refuse(session: Session, *args: Any) -> None:
            if session._queue == queue and not self.is_over:
                raise psycopg.OperationalError("too many connections")
            before(session, *args)

        monkeypatch.setattr(Session, "open", refuse)


@pytest.mark.parametrize("refused", ["a", "b", "c"])
def test_a_run_that_fails_for_one_queue_leaves_nothing_behind_and_can_be_repeated(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    refusal = Refusal(monkeypatch, refused)
    state, service, observer = State(), Service(), Recorder()
    mux = Mux().register("t", lambda _: None)
    queues = {"a": 1, "b": 1, "c": 1}
    threads = set(threading.enumerate())
    worker = launcher.make(mux, queues, state=state, services=[service], observer=observer)
    with pytest.raises(psycopg.OperationalError, match="too many connections"):
        launcher.run(worker.run())
    assert eventually(lambda: connections(conn) == 0)
    assert eventually(lambda: not _of_bgjob(threads))
    assert state.told == []
    assert service.runs == 0
    assert worker.failure is None
    refusal.is_over = True
    launcher.run(worker.run())
    for queue in queues:
        launcher.enqueue(queue, queue=queue)
        observer.wait_for("completed", queue)
    assert launcher.shutdown(worker)
    assert state.told == ["opened", "closed"]
    assert service.runs == 1


def test_a_service_that_refuses_is_asked_again_by_the_next_run(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    answers: list[Any] = [QueueRequiredError("not yet"), QueueRequiredError("nor now"), NEVER]

    class Refuses:
        def run(self, conn: psycopg.Connection[Any], /) -> float:
            answer = answers.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            wait: float = answer
            return wait

    worker = launcher.make(Mux(), {"a": 1, "b": 1}, services=[Refuses()])
    for message in ("not yet", "nor now"):
        with pytest.raises(QueueRequiredError, match=message):
            launcher.run(worker.run())
        assert eventually(lambda: connections(conn) == 0)
    launcher.run(worker.run())
    assert answers == []
    launcher.shutdown(worker)


@pytest.mark.parametrize("refused", ["a", "b"])
def test_a_run_that_gets_no_thread_leaves_nothing_behind(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == f"bgjob-worker-{refused}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    state = State()
    threads = set(threading.enumerate())
    mux = Mux().register("t", handler("coroutine", lambda _: None))
    worker = launcher.make(mux, {"a": 1, "b": 1}, state=state)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        launcher.run(worker.run())
    assert launcher.run(worker.wait(PATIENCE))
    assert launcher.shutdown(worker)
    assert eventually(lambda: connections(conn) == 0)
    assert eventually(lambda: not _of_bgjob(threads))
    assert state.told == ["opened", "closed"]
    with pytest.raises(RuntimeError, match="make a new one"):
        launcher.run(worker.run())


def _of_bgjob(before: set[threading.Thread]) -> list[str]:
    return [t.name for t in set(threading.enumerate()) - before if t.name.startswith("bgjob")]


def test_a_queue_that_fails_takes_the_others_with_it(
    launcher: Launcher, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RuntimeError("a fault")
    turn = QueueControl._turn
    is_broken = threading.Event()

    def broken(control: QueueControl) -> bool:
        if control._queue == "b" and is_broken.is_set():
            raise fault
        return turn(control)

    monkeypatch.setattr(QueueControl, "_turn", broken)
    observer = Recorder()
    worker = launcher.start(
        Mux().register("t", lambda _: None), {"a": 1, "b": 1, "c": 1}, observer=observer
    )
    launcher.enqueue("a", queue="a")
    observer.wait_for("completed", "a")
    assert worker.failure is None
    is_broken.set()
    launcher.enqueue("b", queue="b")  # it wakes up
    assert launcher.run(worker.wait(PATIENCE))
    assert worker.failure is fault
    assert ("error", fault) in observer.events
    assert eventually(lambda: connections(conn) == 0)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queue", "options", "error", "message"),
    [
        ({}, {}, QueueRequiredError, "queue is required"),
        ("", {}, QueueRequiredError, "queue is required"),
        ({"": 1}, {}, QueueRequiredError, "queue is required"),
        ({"a": 1}, {"concurrency": 1}, ValueError, "pass concurrency, or a mapping .* not both"),
        ({"a": 0}, {}, ValueError, "concurrency must be at least 1, not 0: of queue 'a'"),
        ({"a": 1, "b": -1}, {}, ValueError, "at least 1, not -1: of queue 'b'"),
        ({"a": True}, {}, ValueError, "at least 1, not True: of queue 'a'"),
        ({"a": "2"}, {}, ValueError, "at least 1, not '2': of queue 'a'"),
        ({"a": 1.5}, {}, ValueError, "at least 1, not 1.5: of queue 'a'"),
        ({"a": None}, {}, ValueError, "at least 1, not None: of queue 'a'"),
        ({7: 1}, {}, TypeError, "queue must be a str, not int"),
        ({"a\0": 1}, {}, ValueError, "queue must not contain NUL"),
        (["a", "b"], {}, TypeError, "queue must be a str, not list; or, for several queues"),
        (None, {}, TypeError, "queue must be a str, not NoneType; or, for several queues"),
    ],
)
def test_invalid_queues_are_refused_immediately(
    dsn: str, queue: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with Client(dsn) as client, pytest.raises(error, match=message):
        Worker(client, queue, Mux(), **options)
