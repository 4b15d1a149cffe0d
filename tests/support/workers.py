"""Workers of both colours, with handlers and observers to watch them by."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Literal

import pytest

from bgjob import (
    AsyncClient,
    AsyncWorker,
    Client,
    EnqueueRequest,
    Job,
    Mux,
    NoopObserver,
    Result,
    Worker,
)
from bgjob._postgres.fork import ForkGuard
from bgjob._running.loop import Loop
from bgjob._running.transaction import Transactions
from bgjob._sql.settlements import Claimed
from bgjob._worker.clock import ServerClock
from bgjob._worker.options import Queues, WorkerOptions
from bgjob._worker.session import Session
from bgjob._worker.slots import Slots
from bgjob._worker.executor import Executor
from bgjob.mux import Handler
from support.jobs import a_job
from support.waiting import PATIENCE, eventually

Style = Literal["plain", "coroutine"]


both_styles = pytest.mark.parametrize("style", ["plain", "coroutine"])


def handler(style: Style, body: Callable[[Job], Any]) -> Handler:
    """Make a plain or a coroutine handler of a function; both block where it does."""
    if style == "plain":
        return body

    async def coroutine(job: Job) -> Result | None:
        result: Result | None = body(job)
        return result

    return coroutine


def session_of(dsn: str, *, notify: bool = True) -> Session:
    """Make the session of a worker of queue q with a lease of 30 s."""
    options = WorkerOptions(
        {"q": 1}, poll_interval=1.0, lease=30.0, notify=notify, init_timeout=10.0, grace=30.0
    )
    return Session(lambda: (dsn, {}), "q", options)


@contextmanager
def running(body: Handler, *ids: str) -> Iterator[tuple[Slots, Executor]]:
    """Run jobs in a slot without a worker, one after the other."""
    slots = Slots(
        Mux().register("t", body),
        Transactions(("", {}), fork_guard := ForkGuard()),
        fork_guard,
        queue="q",
        clock=ServerClock(),
        concurrency=1,
        lease=30.0,
        started=None,
        timed_out=lambda *_: None,
        finished=lambda: None,
        idle=lambda: None,
        hindered=lambda _: None,
    )
    executor = Executor(slots, loop := Loop("loop"))
    try:
        executor.submit([Claimed(a_job(id=id_), 1) for id_ in ids])
        yield slots, executor
    finally:
        executor.close()
        loop.close(PATIENCE)


class Gate:
    """A handler that reports that it was entered, and waits for its release."""

    def __init__(self, result: Result | None = None) -> None:
        self.entered = threading.Semaphore(0)
        self.released = threading.Event()
        self.runs: list[Job] = []
        self._result = result

    def __call__(self, job: Job) -> Result | None:
        self.runs.append(job)
        self.entered.release()
        assert self.released.wait(PATIENCE)
        return self._result

    async def coroutine(self, job: Job) -> Result | None:
        self.runs.append(job)
        self.entered.release()
        while not self.released.is_set():
            await asyncio.sleep(0.005)
        return self._result

    def of(self, style: Style) -> Handler:
        return self.__call__ if style == "plain" else self.coroutine

    def wait(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)


class Recorder(NoopObserver):
    """Records the events in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def job_started(self, job: Job, /) -> None:
        self.events.append(("started", job.id, job.attempt))

    def job_completed(self, job: Job, /) -> None:
        self.events.append(("completed", job.id, job.attempt))

    def job_rescheduled(self, job: Job, delay: float, /) -> None:
        self.events.append(("rescheduled", job.id, job.attempt, delay))

    def job_will_be_retried(self, job: Job, delay: float, error: Any, /) -> None:
        self.events.append(("retried", job.id, job.attempt, delay, str(error)))

    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        self.events.append(("dead", job.id, job.attempt, str(error)))

    def job_lease_lost(self, job: Job, /) -> None:
        self.events.append(("lost", job.id, job.attempt))

    def job_cancelled(self, job: Job, /) -> None:
        self.events.append(("cancelled", job.id, job.attempt))

    def job_timed_out(self, job: Job, seconds: float, /) -> None:
        self.events.append(("timed_out", job.id, job.attempt, seconds))

    def queue_is_empty(self, queue: str, /) -> None:
        self.events.append(("empty", queue))

    def worker_error(self, error: BaseException, /) -> None:
        self.events.append(("error", error))

    def of(self, *names: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] in names]

    def wait_for(self, name: str, id_: str | None = None, *, times: int = 1) -> None:
        def happened() -> bool:
            found = [e for e in self.events if e[0] == name and (id_ is None or e[1] == id_)]
            return len(found) >= times

        assert eventually(happened), (name, id_, self.events)


class Launcher:
    """Starts workers of one colour on a database, and shuts them down in the end."""

    def __init__(self, dsn: str, *, is_async: bool) -> None:
        self.dsn = dsn
        self.is_async = is_async
        self._threads = set(threading.enumerate())
        self._stack = ExitStack()
        self.client = self._stack.enter_context(Client(dsn))
        if is_async:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._loop.run_forever)
            thread.start()
            self._stack.callback(self._end_loop, thread)

    def _end_loop(self, thread: threading.Thread) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join()
        self._loop.close()

    def run(self, answer: Any) -> Any:
        """Wait for a coroutine of the async colour; return any other value."""
        if not self.is_async:
            return answer
        return asyncio.run_coroutine_threadsafe(answer, self._loop).result(2 * PATIENCE)

    def make(self, mux: Mux, queue: Queues = "q", dsn: str | None = None, **options: Any) -> Any:
        kind: Any = AsyncWorker if self.is_async else Worker
        source = dsn or self.dsn
        client = AsyncClient(source) if self.is_async else Client(source)
        return kind(client, queue, mux, **options)

    def start(self, mux: Mux, queue: Queues = "q", **options: Any) -> Any:
        worker = self.make(mux, queue, **options)
        self.run(worker.run())
        self._stack.callback(self.shutdown, worker, timeout=5)
        return worker

    def shutdown(self, worker: Any, **options: Any) -> bool:
        settled = self.run(worker.shutdown(**options))
        assert isinstance(settled, bool)
        return settled

    def enqueue(self, *ids: str, queue: str = "q", type: str = "t", **options: Any) -> None:
        self.client.bulk_enqueue([EnqueueRequest(queue, type, id=id_, **options) for id_ in ids])

    def close(self) -> None:
        self._stack.close()
        assert eventually(lambda: set(threading.enumerate()) <= self._threads), (
            set(threading.enumerate()) - self._threads
        )


@pytest.fixture(params=[False, True], ids=["Worker", "AsyncWorker"])
def launcher(request: pytest.FixtureRequest, dsn: str) -> Iterator[Launcher]:
    """A launcher of either colour; every test that takes it also proves that no thread is left."""
    with closing(Launcher(dsn, is_async=request.param)) as launcher:
        yield launcher
