"""The worker process of the tests: `python -m faults.app`, or `bgjob worker faults.app:make`.

Its settings are in the environment, its jobs' actions in their arguments. It writes its events to a
file, a line an event, so that nothing is forgotten when it is killed.
"""

import asyncio
import atexit
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Literal, TypeVar

import psycopg

from bgjob import (
    AsyncClient,
    AsyncWorker,
    Client,
    Complete,
    EnqueueRequest,
    Job,
    LeaseLostError,
    MoveToDlq,
    Mux,
    NoopObserver,
    Reschedule,
    Result,
    Retry,
    Worker,
)

from bgjob._sql import session, transactions
from bgjob.checkpoint import AsyncCheckpoint, Checkpoint
from faults.places import ask_for_places, last_place, place, place_async

Event = tuple[Any, ...]
AnyConnection = TypeVar("AnyConnection", psycopg.Connection[Any], psycopg.AsyncConnection[Any])
Colour = Literal["thread", "async"]

ENVIRONMENT = "BGJOB_FAULTS_APP"
"""The variable that holds the settings of a worker process."""

LEDGER = """
    create table if not exists ledger (
        job_id  text        not null,
        attempt integer     not null,
        kind    text        not null,
        pid     integer     not null,
        token   text        not null default gen_random_uuid(),
        at      timestamptz not null default clock_timestamp()
    );
    create table if not exists run (
        job_id  text        not null,
        key     text,
        attempt integer     not null,
        pid     integer     not null,
        began   timestamptz not null default clock_timestamp(),
        ended   timestamptz
    )
"""
"""The tables that handlers write. No constraint: a row too many must be seen, not refused."""

_KEPT = 5.0
"""Seconds for which an idle connection is kept: after a change of a frozen primary none leads there."""

_INSERT = "insert into ledger (job_id, attempt, kind, pid) values (%s, %s, %s, %s)"
_CHUNK = "insert into ledger (job_id, attempt, kind, pid, token) values (%s, %s, 'chunks', %s, %s)"
_GATE = "select 1 from ledger where job_id = %s and attempt = %s and kind = 'gate'"
_BEGIN = "insert into run (job_id, key, attempt, pid) values (%s, %s, %s, %s)"
_END = "update run set ended = clock_timestamp() where (job_id, attempt, pid) = (%s, %s, %s) and ended is null"
_RESCHEDULED = "select count(*) from ledger where job_id = %s and kind = 'rescheduled'"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a worker process."""

    dsn: str
    """Where the worker works; a proxy may lie between."""
    ledger: str
    """Where its ordinary handlers write the ledger: directly, not through the worker's network."""
    events: str
    """The file of its events."""
    queue: str = "q"
    colour: Colour = "thread"
    concurrency: int = 4
    lease: float = 1.0
    poll_interval: float = 0.1
    notify: bool = True
    max_attempts: int | None = 25
    backoff: float = 0.05
    timeout: float | None = None
    batch: int | None = None
    """The most jobs in a call; None for a job a call."""
    grace: float = 5.0
    without: str | None = None
    """A type that it has no handler for."""
    unknown_for: float | None = None
    keep: bool = False
    """Whether completed jobs are kept, in the transaction that ends them."""
    tells_places: bool = False
    """Whether ordinary handlers tell where their commits are in the write-ahead log: events
    "written" and "enqueued", with the place. An attempt that cannot tell fails."""
    server_patience: float | None = None
    """Seconds after which the server ends a transaction that its worker leaves open, so that no
    test has to wait as long as it does by default."""

    def dump(self) -> str:
        return json.dumps(asdict(self))


class Recorder(NoopObserver):
    """Reports each event as a tuple: name, job id, attempt, and further values."""

    def __init__(self, tell: Callable[[Event], object]) -> None:
        self._tell = tell

    def job_started(self, job: Job, /) -> None:
        self._tell(("started", job.id, job.attempt))

    def job_completed(self, job: Job, /) -> None:
        self._tell(("completed", job.id, job.attempt))

    def job_rescheduled(self, job: Job, delay: float, /) -> None:
        self._tell(("rescheduled", job.id, job.attempt, delay))

    def job_will_be_retried(
        self, job: Job, delay: float, error: str | BaseException | None, /
    ) -> None:
        self._tell(("retried", job.id, job.attempt, delay, _text(error)))

    def job_moved_to_dlq(self, job: Job, error: str | BaseException, /) -> None:
        self._tell(("dead", job.id, job.attempt, _text(error)))

    def job_lease_lost(self, job: Job, /) -> None:
        self._tell(("lost", job.id, job.attempt))

    def job_cancelled(self, job: Job, /) -> None:
        self._tell(("cancelled", job.id, job.attempt))

    def job_timed_out(self, job: Job, seconds: float, /) -> None:
        self._tell(("timed_out", job.id, job.attempt, seconds))

    def queue_is_empty(self, queue: str, /) -> None:
        self._tell(("empty", queue))

    def worker_error(self, error: BaseException, /) -> None:
        self._tell(("error", _text(error)))


def _text(error: str | BaseException | None) -> str:
    if isinstance(error, BaseException):
        return f"{type(error).__name__}: {error}"
    return str(error)


class Ledger:
    """Connections to the ledger. To open one takes longer than all else that a handler does.

    A worker process keeps them for a while. Elsewhere each is closed after its use.
    """

    def __init__(self, dsn: str, *, keeps: bool = False) -> None:
        self._dsn = dsn
        self._keeps = keeps
        self._idle: list[tuple[psycopg.Connection[Any], float]] = []
        self._async_idle: list[tuple[psycopg.AsyncConnection[Any], float]] = []
        if keeps:
            atexit.register(self._finish)

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        conn = self._kept(self._idle) or psycopg.connect(self._dsn, autocommit=True)
        try:
            yield conn
        except BaseException:
            conn.close()
            raise
        if self._keeps:
            self._idle.append((conn, time.monotonic()))
        else:
            conn.close()

    @asynccontextmanager
    async def async_connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        conn = self._kept(self._async_idle)
        conn = conn or await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
        try:
            yield conn
        except BaseException:
            await conn.close()
            raise
        if self._keeps:
            self._async_idle.append((conn, time.monotonic()))
        else:
            await conn.close()

    @staticmethod
    def _kept(idle: list[tuple[AnyConnection, float]]) -> AnyConnection | None:
        with suppress(IndexError):
            while True:
                conn, since = idle.pop()
                is_old = time.monotonic() > since + _KEPT
                if not is_old and not select.select([conn.fileno()], [], [], 0)[0]:
                    return conn
                conn.pgconn.finish()  # the server has ended it and says so, or may be frozen
        return None

    def _finish(self) -> None:
        for conn, _ in [*self._idle, *self._async_idle]:
            conn.pgconn.finish()


class Handlers:
    """The handlers, which do what the job's argument says.

    Three types, all coroutines where the colour is "async": "plain" writes its ledger row on a
    connection of its own, "transactional" on the one it is given. "chunks" has a checkpoint, and
    writes a row for each of its `count` chunks, whose number is the row's token; event "chunk" with
    that number before each. Where `saves_only` is true it writes no row, and only saves. It sleeps
    for `sleep` seconds in each, and waits (event "held") at the gate of its own id within the chunk
    `hold_within`, or before the chunk `hold_between`. What the others do, in their order:

    timed: true to write when it begins and ends in the table `run`, whatever it is part of
    sleep: seconds to wait before the row
    kind: the kind of its row, instead of its type
    told: true for the kind "told N": it was told that N jobs of its group had died
    mute: true for no row and no event, and nothing after the sleep: a job that is quick
    children: how many jobs of type "plain" to enqueue, in the transaction where there is one; the
        ids are `<id of the job>/<n>`
    linger: seconds to wait after the row (event "effect")
    block: seconds to sleep then with time.sleep, in a coroutine too
    hold: the name of a gate to wait at then, until World.release() opens it to this attempt
    then: what to do while the attempt is below `until` (always, where that is not given), instead
        of completing: "retry", "raise", "dlq", "kill" (SIGKILL to the own process), "exit"
        (os._exit(1)); or "reschedule", `times` times (once by default), each with a row of the
        kind "rescheduled"
    """

    def __init__(
        self,
        client: Client | AsyncClient,
        ledger: Ledger,
        tell: Callable[[Event], object],
        *,
        queue: str = "q",
        tells_places: bool = False,
    ) -> None:
        self._client = client
        self._ledger = ledger
        self._tell = tell
        self._queue = queue
        self._tells_places = tells_places
        if tells_places:
            ask_for_places(client)

    def register(
        self,
        mux: Mux,
        *,
        max_attempts: int | None,
        backoff: float,
        timeout: float | None = None,
        batch: int | None = None,
        without: str | None = None,
        keep: bool = False,
    ) -> Mux:
        """Register all types but the one that is left out."""
        policy: dict[str, Any] = {
            "keep": keep,
            "max_attempts": max_attempts,
            "backoff": lambda _: backoff,
            "timeout": timeout,
            "batch": batch,
        }
        alone = {**policy, "batch": None}  # with a checkpoint
        handler: Any = self.coroutine if isinstance(self._client, AsyncClient) else self.plain
        if batch is not None:
            handler = self.coroutines if handler == self.coroutine else self.plain_batch
        if without != "plain":
            mux.register("plain", handler, **policy)
        if without != "transactional":
            mux.register("transactional", handler, transactional=True, **policy)
        if isinstance(self._client, AsyncClient):
            mux.register("chunks", self.coroutine_of_chunks, **alone)
        else:
            mux.register("chunks", self.chunks, **alone)
        return mux

    def plain_batch(
        self, jobs: list[Job], conn: psycopg.Connection[Any] | None = None
    ) -> dict[str, Result]:
        """Do the same for several jobs, one after the other."""
        return {job.id: self.plain(job, conn) for job in jobs}

    async def coroutines(
        self, jobs: list[Job], conn: psycopg.AsyncConnection[Any] | None = None
    ) -> dict[str, Result]:
        """Do the same for several jobs, one after the other."""
        return {job.id: await self.coroutine(job, conn) for job in jobs}

    def plain(self, job: Job, conn: psycopg.Connection[Any] | None = None) -> Result:
        arg = job.json() or {}
        if not arg.get("timed"):
            return self._plain(job, arg, conn)
        with self._ledger.connection() as own:
            own.execute(_BEGIN, [job.id, job.exclusive, job.attempt, os.getpid()])
            result = self._plain(job, arg, conn)
            own.execute(_END, [job.id, job.attempt, os.getpid()])
            return result

    def _plain(self, job: Job, arg: Any, conn: psycopg.Connection[Any] | None) -> Result:
        time.sleep(arg.get("sleep", 0))
        if arg.get("mute"):
            return Complete()
        if conn is None:
            with self._ledger.connection() as own:
                kind = self._kind(job, arg, own.execute(_RESCHEDULED, [job.id]).fetchall())
                own.execute(_INSERT, [job.id, job.attempt, kind, os.getpid()])
                if self._tells_places:
                    self._tell(("written", job.id, job.attempt, *place(own)))
        else:
            kind = self._kind(job, arg, conn.execute(_RESCHEDULED, [job.id]).fetchall())
            conn.execute(_INSERT, [job.id, job.attempt, kind, os.getpid()])
        if children := self._children(job, arg):
            assert isinstance(self._client, Client)
            self._client.bulk_enqueue(children, on_conflict="skip", conn=conn)
            if self._tells_places and conn is None:
                self._tell(("enqueued", job.id, job.attempt, *last_place()))
        self._tell(("effect", job.id, job.attempt))
        time.sleep(arg.get("linger", 0) + arg.get("block", 0))
        if gate := arg.get("hold"):
            with self._ledger.connection() as own:
                while not own.execute(_GATE, [gate, job.attempt]).fetchall():
                    time.sleep(0.02)
        return self._act(job, arg, kind)

    def chunks(self, job: Job, checkpoint: Checkpoint[int]) -> Result:
        arg = job.json()
        for number in range(checkpoint.value or 0, arg["count"]):
            if number == arg.get("hold_between"):
                self._wait(job)
            self._tell(("chunk", job.id, job.attempt, number))
            time.sleep(arg.get("sleep", 0))
            try:
                if arg.get("saves_only"):
                    checkpoint.save(number + 1)
                    continue
                with checkpoint.transaction() as conn:
                    conn.execute(_CHUNK, [job.id, job.attempt, os.getpid(), str(number)])
                    if number == arg.get("hold_within"):
                        self._wait(job)
                    checkpoint.save(number + 1)
            except LeaseLostError:
                self._tell(("told", job.id, job.attempt))
                raise
            if checkpoint.stopping:
                return Reschedule(0)
        return Complete()

    def _wait(self, job: Job) -> None:
        self._tell(("held", job.id, job.attempt))
        with self._ledger.connection() as own:
            while not own.execute(_GATE, [job.id, job.attempt]).fetchall():
                time.sleep(0.02)

    async def coroutine_of_chunks(self, job: Job, checkpoint: AsyncCheckpoint[int]) -> Result:
        arg = job.json()
        for number in range(checkpoint.value or 0, arg["count"]):
            if number == arg.get("hold_between"):
                await asyncio.to_thread(self._wait, job)
            self._tell(("chunk", job.id, job.attempt, number))
            await asyncio.sleep(arg.get("sleep", 0))
            try:
                if arg.get("saves_only"):
                    await checkpoint.save(number + 1)
                    continue
                async with checkpoint.transaction() as conn:
                    await conn.execute(_CHUNK, [job.id, job.attempt, os.getpid(), str(number)])
                    if number == arg.get("hold_within"):
                        await asyncio.to_thread(self._wait, job)
                    await checkpoint.save(number + 1)
            except LeaseLostError:
                self._tell(("told", job.id, job.attempt))
                raise
            if checkpoint.stopping:
                return Reschedule(0)
        return Complete()

    async def coroutine(self, job: Job, conn: psycopg.AsyncConnection[Any] | None = None) -> Result:
        arg = job.json() or {}
        if not arg.get("timed"):
            return await self._coroutine(job, arg, conn)
        async with self._ledger.async_connection() as own:
            await own.execute(_BEGIN, [job.id, job.exclusive, job.attempt, os.getpid()])
            result = await self._coroutine(job, arg, conn)
            await own.execute(_END, [job.id, job.attempt, os.getpid()])
            return result

    async def _coroutine(
        self, job: Job, arg: Any, conn: psycopg.AsyncConnection[Any] | None
    ) -> Result:
        await asyncio.sleep(arg.get("sleep", 0))
        if arg.get("mute"):
            return Complete()
        if conn is None:
            async with self._ledger.async_connection() as own:
                kind = await self._write(job, arg, own)
                if self._tells_places:
                    self._tell(("written", job.id, job.attempt, *await place_async(own)))
        else:
            kind = await self._write(job, arg, conn)
        if children := self._children(job, arg):
            assert isinstance(self._client, AsyncClient)
            await self._client.bulk_enqueue(children, on_conflict="skip", conn=conn)
            if self._tells_places and conn is None:
                self._tell(("enqueued", job.id, job.attempt, *last_place()))
        self._tell(("effect", job.id, job.attempt))
        await asyncio.sleep(arg.get("linger", 0))
        time.sleep(arg.get("block", 0))
        if gate := arg.get("hold"):
            async with self._ledger.async_connection() as own:
                while not await (await own.execute(_GATE, [gate, job.attempt])).fetchall():
                    await asyncio.sleep(0.02)
        return self._act(job, arg, kind)

    async def _write(self, job: Job, arg: Any, conn: psycopg.AsyncConnection[Any]) -> str:
        rescheduled = await (await conn.execute(_RESCHEDULED, [job.id])).fetchall()
        kind = self._kind(job, arg, rescheduled)
        await conn.execute(_INSERT, [job.id, job.attempt, kind, os.getpid()])
        return kind

    def _kind(self, job: Job, arg: Any, rescheduled: list[Any]) -> str:
        if arg.get("told"):
            return f"told {job.group_dead}"
        wanted = arg.get("times", 1) if arg.get("then") == "reschedule" else 0
        return "rescheduled" if rescheduled[0][0] < wanted else arg.get("kind", job.type)

    def _children(self, job: Job, arg: Any) -> Iterable[EnqueueRequest]:
        return [
            EnqueueRequest(self._queue, "plain", id=child)
            for child in children_of(job.id, arg.get("children", 0))
        ]

    def _act(self, job: Job, arg: Any, kind: str) -> Result:
        if kind == "rescheduled":
            return Reschedule(0.05)
        if job.attempt < arg.get("until", inf):
            match arg.get("then"):
                case "retry":
                    return Retry(error="not yet")
                case "raise":
                    raise RuntimeError("the handler fails")
                case "dlq":
                    return MoveToDlq("the handler gives up")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                    threading.Event().wait()  # the signal is on its way
                case "exit":
                    os._exit(1)
        return Complete({"attempt": job.attempt})  # kept if its request has asked for that


def children_of(id_: str, count: int) -> list[str]:
    """The ids of a job's children."""
    return [f"{id_}/{n}" for n in range(count)]


class EventFile:
    """Appends events to a file, each in one write."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def tell(self, event: Event) -> None:
        os.write(self._fd, json.dumps(event).encode() + b"\n")


def end_with_parent() -> None:
    """End when the test is gone: its end of the pipe that is the standard input closes."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(3)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def build(settings: Settings, file: EventFile) -> Worker | AsyncWorker:
    """Make a worker of these settings."""
    if settings.server_patience is not None:
        transactions._IDLE = f"{settings.server_patience * 1000:.0f}"
        session.WORKER_SETTINGS["transaction_timeout"] = f"{settings.server_patience:g}s"
    options: dict[str, Any] = {
        "concurrency": settings.concurrency,
        "poll_interval": settings.poll_interval,
        "lease": settings.lease,
        "notify": settings.notify,
        "observer": Recorder(file.tell),
    }
    policy: dict[str, Any] = {
        "max_attempts": settings.max_attempts,
        "backoff": settings.backoff,
        "timeout": settings.timeout,
        "batch": settings.batch,
        "without": settings.without,
        "keep": settings.keep,
    }
    shown: dict[str, Any] = {"queue": settings.queue, "tells_places": settings.tells_places}
    mux = Mux(unknown_for=settings.unknown_for)
    ledger = Ledger(settings.ledger, keeps=True)
    if settings.colour == "async":
        async_client = AsyncClient(settings.dsn, notify=settings.notify)
        handlers = Handlers(async_client, ledger, file.tell, **shown)
        handlers.register(mux, **policy)
        return AsyncWorker(async_client, settings.queue, mux, **options)
    client = Client(settings.dsn, notify=settings.notify)
    handlers = Handlers(client, ledger, file.tell, **shown)
    return Worker(client, settings.queue, handlers.register(mux, **policy), **options)


def make() -> Worker | AsyncWorker:
    """Make the worker that the environment asks for, for `bgjob worker faults.app:make`."""
    end_with_parent()
    settings = Settings(**json.loads(os.environ[ENVIRONMENT]))
    return build(settings, EventFile(settings.events))


def serve(worker: Worker, file: EventFile, grace: float) -> None:
    """Run a worker until SIGTERM, then shut it down."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    worker.run()
    file.tell(("running", os.getpid()))
    stop.wait()
    file.tell(("stopping",))
    file.tell(("stopped", worker.shutdown(grace)))


async def serve_async(worker: AsyncWorker, file: EventFile, grace: float) -> None:
    """Like `serve`."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run()
    file.tell(("running", os.getpid()))
    await stop.wait()
    file.tell(("stopping",))
    file.tell(("stopped", await worker.shutdown(grace)))


def main() -> None:
    """Serve the worker that the environment asks for."""
    end_with_parent()
    settings = Settings(**json.loads(os.environ[ENVIRONMENT]))
    file = EventFile(settings.events)
    match build(settings, file):
        case Worker() as worker:
            serve(worker, file, settings.grace)
        case AsyncWorker() as worker:
            asyncio.run(serve_async(worker, file, settings.grace))


def leave() -> None:
    """End as the interpreter does, but without its visit to every object.

    A fork shares its memory until it writes there. So that visit would take 30 ms of a core, three
    quarters of what a fork takes that does nothing. What it might say is tested by the command.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()
