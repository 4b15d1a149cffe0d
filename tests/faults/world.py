"""One test's database, with its ledger, its producer and its workers."""

import asyncio
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import psycopg
from psycopg.conninfo import make_conninfo
from support.nursery import TESTS, Forked, fork
from support.waiting import PATIENCE, eventually

from bgjob import AsyncClient, AsyncWorker, Client, EnqueueRequest, Mux, Worker
from faults import oracle
from faults.app import ENVIRONMENT, LEDGER, Event, Handlers, Ledger, Recorder, Settings, children_of

T = TypeVar("T")


class Heard:
    """A worker whose events can be asked for; see Recorder for their names."""

    def events(self) -> list[Event]:
        """All so far, in order."""
        raise NotImplementedError

    def of(self, *names: str) -> list[Event]:
        """The events with these names."""
        return [event for event in self.events() if event[0] in names]

    def heard(self, name: str, id: str | None = None, *, times: int = 1) -> bool:
        """Whether an event (of a job, or whose text contains `id`) has happened so often."""

        def fits(event: Event) -> bool:
            return id is None or event[1] == id or (name == "error" and id in event[1])

        return sum(map(fits, self.of(name))) >= times

    def wait_for(
        self, name: str, id: str | None = None, *, times: int = 1, timeout: float = PATIENCE
    ) -> None:
        """Wait until an event has happened so often; fail if it does not."""
        happened = eventually(lambda: self.heard(name, id, times=times), timeout)
        assert happened, f"{name} {id or ''} did not happen {times} times: {self.tail()}"

    @property
    def ended_well(self) -> bool:
        """Whether it had the time to report all its events."""
        raise NotImplementedError

    def tail(self) -> str:
        """The last events, for a message."""
        return "\n".join(map(str, self.events()[-40:]))


class Process(Heard):
    """A worker in a process of its own."""

    def __init__(self, argv: Sequence[str], settings: Settings, env: Mapping[str, str]) -> None:
        self.settings = settings
        self.is_stopped = False
        self.must_end_well = True
        """Whether the world is to ask for an exit code of 0 in the end."""
        self._events: list[Event] = []
        self._read = 0
        self._file = Path(settings.events)
        self._file.touch()
        self._output = self._file.with_suffix(".log")
        variables = {**os.environ, **env, ENVIRONMENT: settings.dump()}
        with self._output.open("wb") as output:
            # The worker ends itself when the other end of its standard input closes.
            self._popen: Forked | subprocess.Popen[bytes]
            if argv[0] == "-m" and not any(name.startswith("PYTHON") for name in env):
                self._popen = fork(*argv[1:], env=variables, output=output)
            else:  # what an interpreter has to see when it starts
                self._popen = subprocess.Popen(
                    [sys.executable, *argv],
                    cwd=TESTS,
                    env=variables,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
        self.pid = self._popen.pid

    def __repr__(self) -> str:
        return f"<worker process {self.pid}, exit code {self._popen.poll()}>"

    @property
    def alive(self) -> bool:
        """Whether it has not ended; a stopped one has not."""
        return self._popen.poll() is None

    @property
    def runs(self) -> bool:
        """Whether it is alive and not stopped."""
        return self.alive and not self.is_stopped

    @property
    def ended_well(self) -> bool:
        return self._popen.poll() == 0

    @property
    def output(self) -> str:
        """What it wrote on its standard output and error."""
        return self._output.read_text(errors="replace")

    def events(self) -> list[Event]:
        with self._file.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._events.append(tuple(json.loads(line)))
        return list(self._events)

    def signal(self, number: int) -> None:
        """Send a signal, if it is alive."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self._popen.wait(PATIENCE)
        self.close()

    def stop(self) -> None:
        """Stop it, as a host that sleeps does; wait until it has stopped."""
        if isinstance(self._popen, Forked):
            stopped = self._popen.stop()
        else:
            self.signal(signal.SIGSTOP)
            stopped = os.WIFSTOPPED(os.waitpid(self.pid, os.WUNTRACED)[1])
        assert stopped, f"{self!r} ended: {self.output}"
        self.is_stopped = True

    def cont(self) -> None:
        """Continue it."""
        self.signal(signal.SIGCONT)
        self.is_stopped = False

    def terminate(self) -> None:
        """Ask it to shut down: SIGTERM."""
        self.signal(signal.SIGTERM)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait until it has ended, and return its exit code, negative for a signal."""
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self!r} is alive after {timeout:g} s:\n{self.tail()}\n{self.output}"
            ) from None
        self.close()
        return code

    def wait_for(
        self, name: str, id: str | None = None, *, times: int = 1, timeout: float = PATIENCE
    ) -> None:
        def settled() -> bool:
            # A dead process says nothing more, and all that it said is in the file.
            return not self.alive or self.heard(name, id, times=times)

        eventually(settled, timeout)
        happened = self.heard(name, id, times=times)
        assert happened, (
            f"{name} {id or ''} did not happen {times} times in {self!r}:\n"
            f"{self.tail()}\n{self.output}"
        )

    def close(self) -> None:
        """Close the pipe; one that is alive ends."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()


class Local(Heard):
    """A worker in this process."""

    def __init__(
        self, worker: Worker | AsyncWorker, run: Callable[[Any], Any], heard: list[Event]
    ) -> None:
        self.worker = worker
        self._run = run
        self._heard = heard
        self._ended = False

    def events(self) -> list[Event]:
        return list(self._heard)

    @property
    def runs(self) -> bool:
        """Whether it has not been shut down by `shutdown`."""
        return not self._ended

    @property
    def ended_well(self) -> bool:
        return True

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Shut it down; whether every job that had started is settled."""
        self._ended = True
        return bool(self._run(self.worker.shutdown(timeout)))


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A job whose enqueue was acknowledged, and the traces that the oracle looks for."""

    id: str
    type: str
    arg: dict[str, Any] = field(default_factory=dict)
    ledger: bool = True
    """Whether its handler writes the ledger."""


class Watch:
    """Measures continually, on a thread of its own, how long claims outlive their leases."""

    def __init__(self, dsn: str) -> None:
        self.longest = 0.0
        """Seconds by which a lease had ended, at most, before its job was freed or claimed."""
        self._dsn = dsn
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.is_set():
            # A server that is away frees no job either: ask again when it is back.
            with (
                contextlib.suppress(psycopg.OperationalError),
                psycopg.connect(self._dsn, autocommit=True) as conn,
            ):
                while not self._end.wait(0.05):
                    [[late]] = conn.execute(
                        "select coalesce(extract(epoch from max(clock_timestamp() - lease_until)),"
                        " 0)::float8 from bgjob_job"
                    ).fetchall()
                    self.longest = max(self.longest, late)
            self._end.wait(0.05)


class World:
    """One test's database, with its ledger, its producer and its workers.

    Made by the fixtures `world` (on the run's server) and `hurt` (on a server of the module's
    own), which ask the oracle in the end. Thread-safe.

    Args:
        dsn: a database that holds the schema.
        lease: of the workers, in seconds.
        poll_interval: of the workers, in seconds.

    Attributes:
        dsn: the database, directly.
        client: a Client on it.
        jobs: what was acknowledged, by id.
        ended: the jobs whose end the test saw, where no worker of the world tells of it.
        named: the errors and events that the test named and saw.

    """

    def __init__(self, dsn: str, *, lease: float = 1.0, poll_interval: float = 0.1) -> None:
        self.threads = set(threading.enumerate())
        self.dsn = dsn
        self.lease = lease
        self.poll_interval = poll_interval
        self.jobs: dict[str, Acknowledged] = {}
        self.ended: set[str] = set()
        self.named: list[str] = []
        self.processes: list[Process] = []
        self.locals: list[Local] = []
        self.client = Client(dsn)
        self._async_clients: list[AsyncClient] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._admin: psycopg.Connection[tuple[Any, ...]] | None = None
        self._closed = contextlib.ExitStack()
        self._folder = self._closed.enter_context(tempfile.TemporaryDirectory(prefix="bgjob-"))
        self.query(LEDGER)

    # -- the database -----------------------------------------------------------------

    def query(self, query: str, params: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run a statement as administrator; again and again while the server is away."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with self._lock:
                    if self._admin is None or self._admin.closed:
                        self._admin = psycopg.connect(
                            # Not "bgjob": tests end the sessions of workers by that name.
                            make_conninfo(self.dsn, application_name="test"),
                            autocommit=True,
                        )
                    cursor = self._admin.execute(query.encode(), params or None)
                    return cursor.fetchall() if cursor.description else []
            except psycopg.OperationalError:
                away = self._admin is None or self._admin.closed
                if not away or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def value(self, query: str, params: Sequence[object] = ()) -> Any:
        """Return the only value of a query's result."""
        [[value]] = self.query(query, params)
        return value

    def live(self, *ids: str) -> int:
        """How many of these jobs (by default: of all) are live."""
        if not ids:
            return int(self.value("select count(*) from bgjob_job"))
        return int(self.value("select count(*) from bgjob_job where id = any(%s)", [list(ids)]))

    def rows(self, id: str, kind: str | None = None) -> int:
        """How many ledger rows a job has."""
        return int(
            self.value(
                "select count(*) from ledger where job_id = %s and kind = coalesce(%s, kind)",
                [id, kind],
            )
        )

    def end_sessions(self) -> None:
        """End half-open sessions, as only the server's keepalive would."""
        self.query(
            "select pg_terminate_backend(pid, 30000) from pg_stat_activity "
            "where datname = current_database() and application_name ^@ 'bgjob'"
        )

    def release(self, gate: str, *attempts: int) -> None:
        """Open a gate, to the jobs that wait there (`hold`) in one of these attempts."""
        self.query(
            "insert into ledger (job_id, attempt, kind, pid) select %s, unnest(%s::int[]), 'gate', 0",
            [gate, list(attempts)],
        )

    def watch(self) -> Watch:
        """Measure, during a `with` block, for how long ended leases are not freed."""
        return Watch(self.dsn)

    # -- jobs ---------------------------------------------------------------------------

    def enqueue(
        self,
        type: str,
        *ids: str,
        conn: psycopg.Connection[Any] | None = None,
        client: Client | None = None,
        queue: str = "q",
        delay: float = 0.0,
        priority: int = 0,
        exclusive: str | None = None,
        slots: int | None = None,
        ledger: bool = True,
        **arg: Any,
    ) -> list[str]:
        """Enqueue jobs with these ids, or one with an id of its own; see Handlers for `arg`.

        They count as acknowledged when this has returned. In a transaction of yours (`conn`) they
        do not: call `acknowledge` when it is committed.
        """
        made: dict[str, Any] = {"delay": delay, "priority": priority}
        made |= {"exclusive": exclusive, "slots": slots}
        if ids:
            requests = [EnqueueRequest(queue, type, arg or None, id=id, **made) for id in ids]
        else:
            requests = [EnqueueRequest(queue, type, arg or None, **made)]
        return self._enqueue(requests, conn=conn, client=client, ledger=ledger, arg=arg)

    def enqueue_many(
        self,
        type: str,
        count: int,
        *,
        client: Client | None = None,
        queue: str = "q",
        delay: float = 0.0,
        priority: int = 0,
        ledger: bool = True,
        **arg: Any,
    ) -> list[str]:
        """Enqueue so many jobs with ids of their own; as `enqueue`."""
        made: dict[str, Any] = {"delay": delay, "priority": priority}
        requests = [EnqueueRequest(queue, type, arg or None, **made) for _ in range(count)]
        return self._enqueue(requests, conn=None, client=client, ledger=ledger, arg=arg)

    def _enqueue(
        self,
        requests: list[EnqueueRequest],
        *,
        conn: psycopg.Connection[Any] | None,
        client: Client | None,
        ledger: bool,
        arg: dict[str, Any],
    ) -> list[str]:
        ids = cast("list[str]", (client or self.client).bulk_enqueue(requests, conn=conn))
        if conn is None:
            self.acknowledge(*ids, type=requests[0].type, ledger=ledger, **arg)
        return ids

    def acknowledge(self, *ids: str, type: str = "plain", ledger: bool = True, **arg: Any) -> None:
        """Record that these jobs were enqueued; the oracle checks that none is lost.

        `ledger=False` is for jobs whose handlers write no ledger: then one that is neither live
        nor dead counts as done where a worker of the world told of its end, or the test (`end`).
        """
        for id in ids:
            self.jobs[id] = Acknowledged(id, type, arg, ledger)

    def end(self, *ids: str) -> None:
        """Record that the test itself saw these jobs end, which no worker of the world ran."""
        self.ended.update(ids)

    def children(self, id: str) -> list[str]:
        """The ids of the children that a job enqueues."""
        return children_of(id, self.jobs[id].arg.get("children", 0))

    def done(self, *ids: str, timeout: float = PATIENCE) -> None:
        """Wait until none of these jobs (by default: of all acknowledged) is live."""
        wanted = list(ids or self.jobs)
        if not eventually(lambda: not wanted or self.live(*wanted) == 0, timeout):
            left = self.query(
                "select id, type, attempt, token, lease_until, next_run_at, last_error "
                "from bgjob_job where id = any(%s) order by next_run_at limit 20",
                [wanted],
            )
            raise AssertionError(
                f"{self.live(*wanted)} jobs are live after {timeout:g} s, such as "
                + "\n".join(map(str, left))
                + "".join(f"\n{process!r}:\n{process.tail()}" for process in self.processes)
            )

    # -- what the test says that it saw ---------------------------------------------------

    def saw(self, what: str, seen: object = True) -> None:
        """Name an error or event that the fault must bring, and say whether it did."""
        assert seen, f"not seen: {what}"
        self.named.append(what)

    def witness(self, worker: Heard, name: str, id: str | None = None, *, times: int = 1) -> None:
        """Wait for an event of a worker, and name it."""
        worker.wait_for(name, id, times=times)
        self.saw(f"{name} {id or ''}".strip())

    # -- workers in processes ---------------------------------------------------------------

    def start(self, *, env: Mapping[str, str] | None = None, **options: Any) -> Process:
        """Start a worker process, and wait until it says that it runs.

        Args:
            env: environment variables of its own.
            options: fields of Settings: dsn (a proxy's, say), queue, colour ("thread" or
                "async"), concurrency, lease, poll_interval, notify, max_attempts, backoff, grace.

        """
        process = self.command("-m", "faults.app", env=env, **options)
        process.wait_for("running")
        return process

    def command(self, *argv: str, env: Mapping[str, str] | None = None, **options: Any) -> Process:
        """Start a Python process with these arguments, that makes its worker of faults.app.

        Like `start`, without waiting.
        """
        name = f"{len(self.processes)}.events"
        defaults = Settings(
            dsn=self.dsn,
            ledger=self.dsn,
            events=str(Path(self._folder, name)),
            lease=self.lease,
            poll_interval=self.poll_interval,
        )
        process = Process(argv, replace(defaults, **options), env or {})
        self.processes.append(process)
        return process

    # -- workers in this process ----------------------------------------------------------

    def run(self, awaitable: Awaitable[T]) -> T:
        """Wait for a coroutine, or what else can be awaited, on the world's own event loop."""
        with self._lock:  # of two threads only one makes the loop
            loop = self._loop = self._loop or self._new_loop()

        async def wait() -> T:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(wait(), loop).result(2 * PATIENCE)

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="world-loop")
        thread.start()

        def end() -> None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

        self._closed.callback(end)
        return loop

    def answer(self, answer: Any) -> Any:
        """Return the result of a method of either colour."""
        return self.run(answer) if inspect.isawaitable(answer) else answer

    def make(
        self, mux: Mux, *, is_async: bool = False, dsn: str | None = None, **options: Any
    ) -> Local:
        """Make a worker in this process without running it; the world shuts it down."""
        heard: list[Event] = []
        settings: dict[str, Any] = {
            "lease": self.lease,
            "poll_interval": self.poll_interval,
            "observer": Recorder(heard.append),
            **options,
        }
        queue = settings.pop("queue", "q")
        if is_async:
            client = AsyncClient(dsn or self.dsn)
            self._async_clients.append(client)
            local = Local(AsyncWorker(client, queue, mux, **settings), self.run, heard)
        else:
            plain = Client(dsn or self.dsn)
            self._closed.callback(plain.close)
            local = Local(Worker(plain, queue, mux, **settings), lambda answer: answer, heard)
        self.locals.append(local)
        return local

    def worker(self, mux: Mux, *, is_async: bool = False, **options: Any) -> Local:
        """Run a Worker, or an AsyncWorker on the world's loop, in this process."""
        local = self.make(mux, is_async=is_async, **options)
        running = local.worker.run()
        if running is not None:
            self.run(running)
        return local

    def mux(
        self,
        *,
        is_async: bool = False,
        max_attempts: int | None = 25,
        backoff: float = 0.05,
        tell: Callable[[Event], object] = lambda _: None,
    ) -> Mux:
        """The handlers of the worker processes, for a worker in this process."""
        client: Client | AsyncClient = self.client
        if is_async:
            client = AsyncClient(self.dsn)
            self._async_clients.append(client)
        handlers = Handlers(client, Ledger(self.dsn), tell)
        return handlers.register(Mux(), max_attempts=max_attempts, backoff=backoff)

    @property
    def is_working(self) -> bool:
        """Whether any worker runs."""
        return any(process.runs for process in self.processes) or any(
            local.runs for local in self.locals
        )

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        """The tasks that are left on the world's loop."""
        if self._loop is None:
            return set()

        async def others() -> set[asyncio.Task[Any]]:
            return asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}

        return self.run(others())

    # -- the end --------------------------------------------------------------------------

    def close(self, *, judge: bool = True) -> None:
        """Shut everything down; with `judge`, ask the oracle on the way."""
        try:
            if judge:
                oracle.check_claims(self)
            if not judge:
                # The test has failed already: what hangs now adds nothing to that.
                for process in self.processes:
                    process.kill()
            codes = self._end_workers()
            self._end_async_clients()
            if judge:
                for process, code in codes:
                    assert code == 0, f"{process!r}:\n{process.tail()}\n{process.output}"
                for process in self.processes:
                    # Whatever is raised where no handler is to blame is printed or logged.
                    assert "Traceback" not in process.output, f"{process!r}: {process.output}"
                oracle.check(self)
        finally:
            self._end_workers()
            for process in self.processes:
                process.close()
            self._end_clients()
        if judge:
            oracle.check_threads(self)

    def _end_workers(self) -> list[tuple[Process, int]]:
        """End the processes and workers, and return the exit codes of those that ended well."""
        ended: list[tuple[Process, int]] = []
        running = [process for process in self.processes if process.alive]
        for process in running:
            process.cont()
            process.terminate()
        for process in running:
            with contextlib.ExitStack() as stack:
                stack.callback(process.kill)
                code = process.wait(process.settings.grace + PATIENCE)
                stack.pop_all()
            if process.must_end_well:
                ended.append((process, code))
        for local in self.locals:
            if local.runs:
                local.shutdown()
        return ended

    def _end_async_clients(self) -> None:
        for client in self._async_clients:
            self.run(client.close())
        self._async_clients.clear()

    def _end_clients(self) -> None:
        self._end_async_clients()
        self.client.close()
        if self._admin is not None:
            self._admin.close()
        self._closed.close()
