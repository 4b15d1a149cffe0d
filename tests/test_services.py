"""A worker runs its services alongside its jobs, also if they fail."""

import threading
from collections.abc import Callable
from math import inf, nan
from typing import Any

import psycopg
import pytest
from support.database import all_done, terminate_workers
from support.waiting import NEVER, PATIENCE, eventually
from support.workers import Launcher, Gate, Recorder

from bgjob import BgjobError, Job, Mux, Reschedule
from bgjob.service import ServiceTimer, Service


class Calls:
    """A service that calls a function, and counts the calls."""

    def __init__(self, body: Callable[[psycopg.Connection[Any]], Any] = lambda _: 0.01) -> None:
        self._body = body
        self.runs = 0

    def run(self, conn: psycopg.Connection[Any], /) -> float:
        self.runs += 1
        wait: float = self._body(conn)
        return wait


# -- when they run ------------------------------------------------------------------------


class Clock:
    """A timer with a clock that is set by hand, and an unused connection."""

    def __init__(self, *services: Service) -> None:
        self.now = 100.0
        self.errors: list[BaseException] = []
        self.timer = ServiceTimer(services)

    def go_to(self, now: float) -> None:
        self.now = now
        conn: Any = None
        self.timer.run(lambda use: use(conn), lambda: self.now, self.errors.append)


def test_each_service_is_run_when_it_asked_to_be() -> None:
    short, long = Calls(lambda _: 1), Calls(lambda _: 3)
    clock = Clock(short, long)
    for now in (100, 100.5, 101, 102, 103):
        clock.go_to(now)
    assert (short.runs, long.runs) == (4, 2)
    assert clock.timer.due_at == 104


def test_a_worker_without_services_never_has_one_due() -> None:
    clock = Clock()
    assert (clock.timer.due_at, clock.timer.pressing_at) == (inf, inf)
    clock.go_to(200)
    assert (clock.timer.due_at, clock.timer.pressing_at) == (inf, inf)


def test_while_jobs_flow_services_are_run_at_most_every_50_ms() -> None:
    clock = Clock(Calls(lambda _: 0))
    clock.go_to(100)
    assert (clock.timer.due_at, clock.timer.pressing_at) == (100, 100.05)


def test_a_service_that_fails_is_run_again_after_a_second_that_doubles_to_a_minute() -> None:
    fails = True

    def body(_: object) -> float:
        if fails:
            raise SystemExit("no")
        return 5

    clock = Clock(Calls(body), Calls(lambda _: NEVER))
    waits = []
    for _ in range(8):
        clock.go_to(max(clock.now, clock.timer.due_at))
        waits.append(clock.timer.due_at - clock.now)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert [type(error) for error in clock.errors] == [SystemExit] * 8
    fails = False
    clock.go_to(clock.timer.due_at)
    assert clock.timer.due_at == clock.now + 5
    fails = True
    clock.go_to(clock.timer.due_at)
    assert clock.timer.due_at == clock.now + 1


@pytest.mark.parametrize("wait", [None, "1", -1, nan, True])
def test_a_service_that_does_not_return_its_next_run_is_reported(wait: Any) -> None:
    clock = Clock(Calls(lambda _: wait))
    clock.go_to(100)
    [error] = clock.errors
    assert isinstance(error, TypeError)
    assert "must return the seconds until its next run" in str(error)
    assert clock.timer.due_at == 101


def test_an_object_that_is_not_a_service_is_refused_by_the_constructor(launcher: Launcher) -> None:
    with pytest.raises(TypeError, match="'nightly' has none"):
        launcher.make(Mux(), services=["nightly"])


# -- in a worker --------------------------------------------------------------------------


def test_an_idle_worker_runs_its_services_on_its_own_connection(launcher: Launcher) -> None:
    seen: list[tuple[str, str, bool]] = []

    def body(conn: psycopg.Connection[Any]) -> float:
        [(name,)] = conn.execute("select current_setting('application_name')").fetchall()
        seen.append((name, threading.current_thread().name, conn.autocommit))
        return 0.01

    launcher.start(Mux(), services=[Calls(body)], poll_interval=NEVER)
    assert eventually(lambda: len(seen) >= 5)
    names, threads, autocommits = (set(values) for values in zip(*seen[1:], strict=True))
    assert (names, threads, autocommits) == ({"bgjob"}, {"bgjob-worker-q"}, {True})


def test_a_worker_that_is_never_idle_runs_its_services(launcher: Launcher) -> None:
    service = Calls()
    observer = Recorder()
    launcher.enqueue(*(f"{n:04}" for n in range(3000)))
    mux = Mux().register("t", lambda _: Reschedule(0.0))
    worker = launcher.start(mux, services=[service], observer=observer, concurrency=4)
    assert eventually(lambda: service.runs >= 10 and len(observer.of("rescheduled")) > 10_000)
    assert observer.of("empty") == []
    launcher.shutdown(worker, timeout=5)


def test_a_worker_whose_exchanges_follow_one_another_runs_its_services_between(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    count = 40_000
    left: list[int] = []

    def look(conn: psycopg.Connection[Any]) -> float:
        left.extend(n for (n,) in conn.execute("select count(*) from bgjob_job").fetchall())
        return 0.0

    launcher.enqueue(*(f"{n:05}" for n in range(count)))
    mux = Mux().register("t", lambda _: None)
    launcher.start(mux, services=[Calls(look)], concurrency=10, poll_interval=NEVER)
    assert all_done(conn)
    assert len([n for n in left if 0 < n < count]) >= 3


def test_services_that_fail_are_reported_and_harm_neither_jobs_nor_each_other(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    def refused(conn: psycopg.Connection[Any]) -> float:
        conn.execute("begin")
        conn.execute("create table left_open ()")
        conn.execute("select 1 / 0")
        return 0.0

    def open_ended(conn: psycopg.Connection[Any]) -> float:
        conn.execute("begin")
        conn.execute("create table left_open ()")
        return 0.0

    good = Calls()
    observer = Recorder()
    services = [Calls(refused), Calls(open_ended), good]
    launcher.start(Mux().register("t", lambda _: None), services=services, observer=observer)
    assert eventually(lambda: good.runs >= 3)
    launcher.enqueue("a")
    observer.wait_for("completed", "a")
    assert any("division by zero" in str(error) for _, error in observer.of("error"))
    assert conn.execute("select to_regclass('left_open')").fetchall() == [(None,)]


def test_a_service_that_breaks_the_connection_is_survived(
    launcher: Launcher, conn: psycopg.Connection
) -> None:
    def close(conn: psycopg.Connection[Any]) -> float:
        if service.runs == 2:
            conn.close()
        return 0.01

    service = Calls(close)
    observer = Recorder()
    mux = Mux().register("t", lambda _: None)
    launcher.start(mux, services=[service], observer=observer, poll_interval=NEVER)
    assert eventually(lambda: service.runs >= 4)
    assert any("a service closed the connection" in str(e) for _, e in observer.of("error"))
    assert terminate_workers(conn) == 1
    runs = service.runs
    assert eventually(lambda: service.runs >= runs + 3)
    launcher.enqueue("a")
    observer.wait_for("completed", "a")


@pytest.mark.both_colours
def test_no_service_runs_while_the_worker_shuts_down(launcher: Launcher) -> None:
    service = Calls()
    gate = Gate()
    launcher.enqueue("a")
    worker = launcher.start(Mux().register("t", gate), services=[service], lease=1.0)
    gate.wait()
    launcher.run(worker.shutdown(0.0)) if launcher.is_async else worker._group.stop(PATIENCE)
    assert eventually(lambda: worker._group._controls[0]._service_timer.due_at == inf)
    runs = service.runs
    gate.released.set()
    launcher.shutdown(worker, timeout=PATIENCE)
    assert service.runs == runs


def test_a_service_that_lacks_a_grant_keeps_the_worker_from_starting(launcher: Launcher) -> None:
    def body(_: object) -> float:
        if service.runs == 1:
            raise BgjobError("grant this, and start again")
        return NEVER

    service = Calls(body)
    observer = Recorder()
    worker = launcher.make(
        Mux().register("t", lambda _: None), services=[service], observer=observer
    )
    with pytest.raises(BgjobError, match="grant this"):
        launcher.run(worker.run())
    service.runs = 1
    worker = launcher.start(
        Mux().register("t", lambda _: None), services=[service], observer=observer
    )
    launcher.enqueue("a")
    observer.wait_for("completed", "a")


def test_other_errors_of_a_service_at_the_start_are_reported(launcher: Launcher) -> None:
    def body(_: object) -> float:
        raise RuntimeError("out of luck")

    def handle(_: Job) -> None:
        return None

    observer = Recorder()
    launcher.start(Mux().register("t", handle), services=[Calls(body)], observer=observer)
    launcher.enqueue("a")
    observer.wait_for("completed", "a")
    assert "out of luck" in str(observer.of("error")[0][1])
