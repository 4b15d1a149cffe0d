"""The demo: a few thousand jobs with every kind of outcome, and a check of the results.

Each source file of Python's standard library is a job: its handler counts the
file and stores the result. Other jobs wait, fail, are retried and die. The
results are compared with a count that was made without the queue.
"""

import hashlib
import os
import signal
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from operator import ge
from pathlib import Path
from queue import Empty, SimpleQueue
from secrets import token_hex
from time import perf_counter
from typing import Any, NamedTuple, NoReturn

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool
from typing_extensions import override

from bgjob import schema
from bgjob._cli.progress import progress, say
from bgjob.client import Client
from bgjob.errors import BgjobError, UnknownTypeError
from bgjob.job import EnqueueRequest, Job
from bgjob.mux import Mux
from bgjob.observer import NoopObserver
from bgjob.result import Backoff, Complete, MoveToDlq, Reschedule, Result
from bgjob.worker import Worker

QUEUE = "bgjob_demo"

_DELAY = 0.5  # seconds before the delayed job is due
_FAILURES = 2  # of the flaky job
_BACKOFF = Backoff(base=0.1, factor=2, jitter=0)  # between them
_LATER = 0.2  # seconds by which the patient job reschedules itself
_HOPELESS = "this job always fails, on purpose"

_SINGLES = 100
"""Jobs enqueued one by one, while the worker is idle, to measure its pick-up time."""

_OUTCOMES = ("completed", "retried", "rescheduled", "dead")
_RATE = "each reads and hashes a file, and commits a row"
_PICK_UP = f"from an enqueue's return to its handler's start, {_SINGLES} times"

_PATIENCE = 60.0
"""Seconds without a job's start or end after which the demo gives up."""

_CONNECT_TIMEOUT = 10
_GRACE = 5.0  # seconds for the handlers that run when the demo is interrupted
_MOST_CONNECTIONS = 10

_CREATE = """
create table demo_file (
    path   text    primary key,
    lines  integer not null,
    bytes  integer not null,
    sha256 text    not null
)
"""

# A job may run twice, so storing its result twice must have the effect of once.
_STORE = """
insert into demo_file (path, lines, bytes, sha256)
values (%s, %s, %s, %s)
on conflict (path) do update
set lines = excluded.lines, bytes = excluded.bytes, sha256 = excluded.sha256
"""


class DemoError(BgjobError):
    """The demo cannot run here, or made no progress."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check, and whether it passed."""

    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """The results of the demo.

    Attributes:
        postgresql: the server's version.
        concurrency: the worker's slots.
        files: the number of source files, a job each.
        lines: their lines, as counted by the jobs.
        bytes: their bytes, as counted by the jobs.
        outcomes: how often a job completed, was retried, was rescheduled or died.
        seconds: from the worker's start to the last file's end.
        jobs_per_second: files a second.
        pick_up_p50_ms: from an enqueue's return to its handler's start, on an idle worker.
        pick_up_p99_ms: the same, for the slowest in a hundred.
        dead: the types of the dead jobs, and their errors.
        checks: the checks.

    """

    postgresql: str
    concurrency: int
    files: int
    lines: int
    bytes: int
    outcomes: dict[str, int]
    seconds: float
    jobs_per_second: float
    pick_up_p50_ms: float
    pick_up_p99_ms: float
    dead: dict[str, str | None]
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every check agrees."""
        return all(check.ok for check in self.checks)

    def table(self) -> str:
        """Return the report as text."""
        wrong = sum(not check.ok for check in self.checks)
        lines = [
            self._headline(),
            "",
            *(f"  {outcome:<14}{count:>9,}" for outcome, count in self.outcomes.items()),
            "",
            f"  {'jobs/s':<14}{self.jobs_per_second:>9,.0f}     {_RATE}",
            f"  {'pick-up p50':<14}{self.pick_up_p50_ms:>9.2f} ms  {_PICK_UP}",
            f"  {'pick-up p99':<14}{self.pick_up_p99_ms:>9.2f} ms",
            "",
            "dead-letter table",
            *(f"  {type_:<14}{error}" for type_, error in self.dead.items()),
            "",
            "checks",
            *(f"  {'ok' if check.ok else 'WRONG':<7}{check.text}" for check in self.checks),
            "",
            f"{wrong} of {len(self.checks)} checks failed" if wrong else "every check agrees",
        ]
        return "\n".join(lines) + "\n"

    def _headline(self) -> str:
        return (
            f"counted {self.lines:,} lines and {self.bytes:,} bytes in {self.files:,} files, "
            f"{self.concurrency} at a time, on PostgreSQL {self.postgresql}"
        )


def run(dsn: str | None = None, *, concurrency: int = 8) -> Report:
    """Run the demo, show its progress on stderr, and return its results.

    For the main thread only: SIGTERM interrupts it as Ctrl-C does. However it
    ends, it removes what it made on the server, or the server itself.

    Args:
        dsn: the database, in which it works in a schema of its own; by default a private
            server that lives as long as the demo.
        concurrency: the worker's slots; 8 by default.

    Raises:
        DemoError: there are no files to count, or no job moved for a minute.
        EmbeddedServerError: the private server is not installed, or did not start.
        psycopg.Error: the server cannot be reached, or refuses.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything is removed already.

    """
    with _interrupts() as hold_off, ExitStack() as stack:
        try:
            return _run(stack, dsn, concurrency)
        finally:
            hold_off()  # the clean-up has a time limit, and must not be interrupted


def _run(stack: ExitStack, dsn: str | None, concurrency: int) -> Report:
    root = Path(sysconfig.get_path("stdlib"))
    files = list(find_files(root))
    if not files:
        raise DemoError(f"Python's standard library has no source files in {root}: nothing to do")
    if dsn is None:
        from bgjob.ext.embedded import EmbeddedServer  # noqa: PLC0415 (an extra)

        say("starting a private PostgreSQL server")
        dsn = stack.enter_context(EmbeddedServer()).dsn
    dsn = stack.enter_context(_own_schema(dsn))
    size = min(concurrency, _MOST_CONNECTIONS)
    pool = stack.enter_context(
        ConnectionPool(dsn, kwargs={"autocommit": True}, min_size=size, max_size=size, open=False)
    )
    pool.wait()
    client = stack.enter_context(Client(dsn))
    watch = _Watch()
    worker = Worker(client, QUEUE, _mux(root, pool), concurrency=concurrency, observer=watch)

    began = perf_counter()
    client.bulk_enqueue(EnqueueRequest(QUEUE, "count_file", {"file": name}) for name in files)
    say(f"enqueued {len(files):,} jobs in {perf_counter() - began:.2f} s")
    others = _enqueue_others(client)

    stack.callback(worker.shutdown, _GRACE)
    began = perf_counter()
    worker.run()
    total = len(files) + len(others)
    with progress(total, "jobs") as tell:
        watch.wait(lambda: len(watch.ended) >= total, tell)
    seconds = watch.ended_at["count_file"] - began
    watch.wait(lambda: watch.idle)
    pick_up = sorted(_pick_up(client, watch) for _ in range(_SINGLES))

    say("counting the files again, without the queue")
    with pool.connection() as conn:
        version = conn.info.parameter_status("server_version") or "?"
        rows = conn.execute("select path, lines, bytes, sha256 from demo_file").fetchall()
        left = conn.execute("select type from bgjob_job").fetchall()
    counted = {path: FileCount(*count) for path, *count in rows}
    dead = {job.type: job.last_error for job in client.dlq.list()}
    return Report(
        postgresql=version,
        concurrency=concurrency,
        files=len(files),
        lines=sum(count.lines for count in counted.values()),
        bytes=sum(count.bytes for count in counted.values()),
        outcomes={outcome: _times(watch.outcomes, outcome) for outcome in _OUTCOMES},
        seconds=seconds,
        jobs_per_second=len(files) / seconds,
        pick_up_p50_ms=1000 * _quantile(pick_up, 0.50),
        pick_up_p99_ms=1000 * _quantile(pick_up, 0.99),
        dead=dead,
        checks=[
            _check_counts(counted, direct_count(root)),
            _check_outcomes(watch.outcomes, files=len(files)),
            _check_delayed(watch.starts[others["delayed"].id], others["delayed"].at),
            _check_flaky(watch.starts[others["flaky"].id]),
            _check_patient(watch.starts[others["patient"].id]),
            _check_dead(dead),
            Check(not left, f"{len(left):,} jobs are left in the queue"),
        ],
    )


# -- the work -----------------------------------------------------------------------------


class FileCount(NamedTuple):
    """The counts of a file."""

    lines: int
    bytes: int
    sha256: str


def find_files(root: Path) -> Iterator[str]:
    """Find the standard library's source files, as paths below `root`."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in {"site-packages", "dist-packages"}]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and path.is_file() and os.access(path, os.R_OK):
                yield path.relative_to(root).as_posix()


def count_file(path: Path) -> FileCount:
    """Count a file."""
    content = path.read_bytes()
    return FileCount(content.count(b"\n"), len(content), hashlib.sha256(content).hexdigest())


def direct_count(root: Path) -> dict[str, FileCount]:
    """Count all files, without the queue."""
    return {name: count_file(root / name) for name in find_files(root)}


def _mux(root: Path, pool: ConnectionPool[Any]) -> Mux:
    mux = Mux()
    put_off: set[str] = set()

    @mux.handler("count_file", max_attempts=3)
    def count(job: Job) -> None:
        name = job.json()["file"]
        counted = count_file(root / name)
        with pool.connection() as conn:
            conn.execute(_STORE, (name, *counted))

    @mux.handler("delayed")
    @mux.handler("pick_up")
    def nothing(_: Job) -> Result:
        return Complete()

    @mux.handler("flaky", backoff=_BACKOFF)
    async def flaky(job: Job) -> Result:
        if job.attempt <= _FAILURES:
            raise ConnectionError(f"attempt {job.attempt} is made to fail")
        return Complete()

    @mux.handler("patient")
    async def patient(job: Job) -> Result:
        if job.id in put_off:
            return Complete()
        put_off.add(job.id)
        return Reschedule(_LATER)

    @mux.handler("hopeless")
    def hopeless(_: Job) -> Result:
        return MoveToDlq(_HOPELESS)

    return mux


class _Sent(NamedTuple):
    id: str
    at: float  # just before the enqueue


def _enqueue_others(client: Client) -> dict[str, _Sent]:
    """Enqueue one job of each other type; they run before the files."""
    sent = {}
    for type_ in ("delayed", "flaky", "patient", "hopeless", "unheard_of"):
        delay = _DELAY if type_ == "delayed" else 0
        at = perf_counter()
        id_ = client.enqueue(EnqueueRequest(QUEUE, type_, delay=delay, priority=-1))
        sent[type_] = _Sent(id_, at)
    return sent


def _pick_up(client: Client, watch: "_Watch") -> float:
    """Return the seconds from an enqueue's return to its handler's start."""
    id_ = client.enqueue(EnqueueRequest(QUEUE, "pick_up"))
    returned = perf_counter()
    watch.wait(lambda: id_ in watch.ended)
    # The handler may have started before the enqueue returned.
    return max(watch.starts[id_][0].at - returned, 0.0)


# -- the checks ---------------------------------------------------------------------------


def _check_counts(counted: dict[str, FileCount], direct: dict[str, FileCount]) -> Check:
    wrong = sorted(
        name for name in counted.keys() | direct.keys() if counted.get(name) != direct.get(name)
    )
    if not wrong:
        return Check(
            ok=True, text=f"{len(direct):,} files: lines, bytes and SHA-256 as in a direct count"
        )
    shown = "; ".join(
        f"{name}: {_shown(counted.get(name))} by its job, {_shown(direct.get(name))} directly"
        for name in wrong[:3]
    )
    return Check(ok=False, text=f"{len(wrong):,} of {len(direct):,} files differ: {shown}")


def _shown(count: FileCount | None) -> str:
    if count is None:
        return "not counted"
    return f"{count.lines} lines, {count.bytes} bytes, SHA-256 {count.sha256[:8]}..."


def _check_outcomes(outcomes: Counter[tuple[str, str]], *, files: int) -> Check:
    expected = Counter(
        {
            ("completed", "count_file"): files,
            ("completed", "pick_up"): _SINGLES,
            ("completed", "delayed"): 1,
            ("completed", "flaky"): 1,
            ("completed", "patient"): 1,
            ("retried", "flaky"): _FAILURES,
            ("rescheduled", "patient"): 1,
            ("dead", "hopeless"): 1,
            ("dead", "unheard_of"): 1,
        }
    )
    wrong = [
        f"{type_} {name}: {outcomes[name, type_]:,}, not {expected[name, type_]:,}"
        for name, type_ in outcomes | expected
        if outcomes[name, type_] != expected[name, type_]
    ]
    if wrong:
        return Check(ok=False, text=f"outcomes differ: {'; '.join(wrong)}")
    return Check(ok=True, text=f"{expected.total():,} outcomes, each as often as expected")


def _check_delayed(starts: "Sequence[_Start]", enqueued_at: float) -> Check:
    waits = [start.at - enqueued_at for start in starts]
    return Check(
        len(waits) == 1 and waits[0] >= _DELAY,
        f"delayed: started after {_listed(waits)}, delay {_DELAY:g} s",
    )


def _check_flaky(starts: "Sequence[_Start]") -> Check:
    attempts, waits = [start.attempt for start in starts], _waits(starts)
    backoff = [_BACKOFF(attempt) for attempt in range(1, _FAILURES + 1)]
    return Check(
        attempts == [*range(1, _FAILURES + 2)] and all(map(ge, waits, backoff)),
        f"flaky: attempts {attempts}, retried after {_listed(waits)}, backoff {_listed(backoff)}",
    )


def _check_patient(starts: "Sequence[_Start]") -> Check:
    attempts, waits = [start.attempt for start in starts], _waits(starts)
    return Check(
        attempts == [1, 1] and waits[0] >= _LATER,
        f"patient: attempts {attempts}, ran again after {_listed(waits)}, delay {_LATER:g} s",
    )


def _check_dead(dead: dict[str, str | None]) -> Check:
    return Check(
        dead.keys() == {"hopeless", "unheard_of"}
        and dead["hopeless"] == _HOPELESS
        and (dead["unheard_of"] or "").startswith(UnknownTypeError.__name__),
        f"dead: {', '.join(sorted(dead)) or 'none'}, each with its error",
    )


def _waits(starts: "Sequence[_Start]") -> list[float]:
    return [after.at - before.at for before, after in pairwise(starts)]


def _listed(seconds: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in seconds) + " s"


def _times(outcomes: Counter[tuple[str, str]], outcome: str) -> int:
    return sum(times for (name, _), times in outcomes.items() if name == outcome)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[ceil(share * len(ordered)) - 1]


# -- watching -----------------------------------------------------------------------------


class _Start(NamedTuple):
    attempt: int
    at: float


class _Event(NamedTuple):
    name: str
    at: float
    job: Job | None = None


class _Watch(NoopObserver):
    """Passes the worker's events to the main thread, which waits for them and records them."""

    def __init__(self) -> None:
        # Not a condition: an interrupt may leave its lock held.
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._trouble = ""
        self.outcomes: Counter[tuple[str, str]] = Counter()  # by outcome and job type
        self.starts: defaultdict[str, list[_Start]] = defaultdict(list)  # by job id
        self.ended: set[str] = set()  # ids of jobs that completed or died
        self.ended_at: dict[str, float] = {}  # by job type, the last one's
        self.idle = False

    def wait(self, ready: Callable[[], bool], tell: Callable[[int], None] | None = None) -> None:
        """Wait until `ready`, and report how many jobs have ended meanwhile."""
        give_up_at = perf_counter() + _PATIENCE
        while not ready():
            try:
                event = self._events.get(timeout=max(give_up_at - perf_counter(), 0.0))
            except Empty:
                raise DemoError(
                    f"no job started or ended within {_PATIENCE:g} s{self._trouble}"
                ) from None
            self._note(event)
            if event.job is not None:  # an idle worker reports so at every poll
                give_up_at = event.at + _PATIENCE
            if tell is not None:
                tell(len(self.ended))

    def _note(self, event: _Event) -> None:
        match event:
            case _Event("started", at, Job() as job):
                self.idle = False
                self.starts[job.id].append(_Start(job.attempt, at))
            case _Event(outcome, at, Job() as job):
                self.outcomes[outcome, job.type] += 1
                if outcome in {"completed", "dead"}:
                    self.ended.add(job.id)
                    self.ended_at[job.type] = at
            case _:
                self.idle = True

    @override
    def job_started(self, job: Job, /) -> None:
        self._events.put(_Event("started", perf_counter(), job))

    @override
    def job_completed(self, job: Job, /) -> None:
        self._events.put(_Event("completed", perf_counter(), job))

    @override
    def job_will_be_retried(
        self, job: Job, _delay: float, _error: str | BaseException | None, /
    ) -> None:
        self._events.put(_Event("retried", perf_counter(), job))

    @override
    def job_rescheduled(self, job: Job, _delay: float, /) -> None:
        self._events.put(_Event("rescheduled", perf_counter(), job))

    @override
    def job_moved_to_dlq(self, job: Job, _error: str | BaseException, /) -> None:
        self._events.put(_Event("dead", perf_counter(), job))

    @override
    def queue_is_empty(self, _queue: str, /) -> None:
        self._events.put(_Event("idle", perf_counter()))

    @override
    def job_lease_lost(self, job: Job, /) -> None:
        self._trouble = f"; job {job.id} of type {job.type} outlived its lease"

    @override
    def worker_error(self, error: BaseException, /) -> None:
        self._trouble = f"; the worker's last error: {error}"


# -- cleaning up ----------------------------------------------------------------------------


@contextmanager
def _own_schema(dsn: str) -> Iterator[str]:
    """Yield a connection string whose search_path is a new schema with bgjob's tables."""
    params = conninfo_to_dict(dsn)
    dsn = make_conninfo(dsn, connect_timeout=params.get("connect_timeout", _CONNECT_TIMEOUT))
    options = params.get("options", os.environ.get("PGOPTIONS", ""))
    name = f"{QUEUE}_{token_hex(8)}"
    inside = make_conninfo(dsn, options=f"{options} -c search_path={name}".strip())
    schema_name = sql.Identifier(name)
    conn = psycopg.connect(inside, autocommit=True)
    try:
        with conn:
            conn.execute(sql.SQL("create schema {}").format(schema_name))
            conn.execute(schema.init_sql().encode())
            conn.execute(_CREATE)
        yield inside
    finally:
        try:
            with psycopg.connect(dsn, autocommit=True) as last:
                last.execute("set lock_timeout = '10s'")
                last.execute(sql.SQL("drop schema if exists {} cascade").format(schema_name))
        except psycopg.Error as error:
            raise DemoError(
                f"schema {name} may be left behind: {error}; remedy: drop schema {name} cascade"
            ) from error


@contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt once; yield a function to ignore both."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def ignore() -> None:
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)

    def interrupt(*_: object) -> NoReturn:
        ignore()
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, interrupt) for signum in signals}
    try:
        yield ignore
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
