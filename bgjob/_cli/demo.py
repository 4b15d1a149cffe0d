"""The demo: a few thousand jobs with every kind of outcome, and a check of the results.

Each source file of Python's standard library is a job: its handler counts the
file and stores the result. Other jobs wait, fail, are retried and die. The
results are compared with a count that was made without the queue.
"""

import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import NamedTuple

from psycopg_pool import ConnectionPool
from typing_extensions import override

from bgjob._cli import demo_jobs
from bgjob._cli.demo_jobs import QUEUE, SINGLES, Check, FileCount, Start
from bgjob._cli.demo_place import DemoError, interrupts, place
from bgjob._cli.progress import progress, say
from bgjob.client import Client
from bgjob.job import EnqueueRequest, Job
from bgjob.observer import NoopObserver
from bgjob.worker import Worker

_OUTCOMES = ("completed", "retried", "rescheduled", "dead")
_RATE = "each reads and hashes a file, and commits a row"
_PICK_UP = f"from an enqueue's return to its handler's start, {SINGLES} times"

_PATIENCE = 60.0
"""Seconds without a job's start or end after which the demo gives up."""

_GRACE = 5.0  # seconds for the handlers that run when the demo is interrupted
_MOST_CONNECTIONS = 10


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
    with interrupts() as hold_off, ExitStack() as stack:
        try:
            return _run(stack, dsn, concurrency)
        finally:
            hold_off()  # the clean-up has a time limit, and must not be interrupted


def _run(stack: ExitStack, dsn: str | None, concurrency: int) -> Report:
    root = Path(sysconfig.get_path("stdlib"))
    files = list(demo_jobs.find_files(root))
    if not files:
        raise DemoError(f"Python's standard library has no source files in {root}: nothing to do")
    dsn = stack.enter_context(place(dsn, demo_jobs.CREATE_TABLE))
    size = min(concurrency, _MOST_CONNECTIONS)
    pool = stack.enter_context(
        ConnectionPool(dsn, kwargs={"autocommit": True}, min_size=size, max_size=size, open=False)
    )
    pool.wait()
    client = stack.enter_context(Client(dsn))
    watch = _Watch()
    worker = Worker(
        client, QUEUE, demo_jobs.make_mux(root, pool), concurrency=concurrency, observer=watch
    )

    began = perf_counter()
    client.bulk_enqueue(EnqueueRequest(QUEUE, "count_file", {"file": name}) for name in files)
    say(f"enqueued {len(files):,} jobs in {perf_counter() - began:.2f} s")
    others = demo_jobs.enqueue_others(client)

    stack.callback(worker.shutdown, _GRACE)
    began = perf_counter()
    worker.run()
    total = len(files) + len(others)
    with progress(total, "jobs") as tell:
        watch.wait(lambda: len(watch.ended) >= total, tell)
    seconds = watch.ended_at["count_file"] - began
    watch.wait(lambda: watch.idle)
    pick_up = sorted(_pick_up(client, watch) for _ in range(SINGLES))

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
            demo_jobs.check_counts(counted, demo_jobs.direct_count(root)),
            demo_jobs.check_outcomes(watch.outcomes, files=len(files)),
            demo_jobs.check_delayed(watch.starts[others["delayed"].id], others["delayed"].at),
            demo_jobs.check_flaky(watch.starts[others["flaky"].id]),
            demo_jobs.check_patient(watch.starts[others["patient"].id]),
            demo_jobs.check_dead(dead),
            Check(not left, f"{len(left):,} jobs are left in the queue"),
        ],
    )


def _pick_up(client: Client, watch: "_Watch") -> float:
    """Return the seconds from an enqueue's return to its handler's start."""
    id_ = client.enqueue(EnqueueRequest(QUEUE, "pick_up"))
    returned = perf_counter()
    watch.wait(lambda: id_ in watch.ended)
    # The handler may have started before the enqueue returned.
    return max(watch.starts[id_][0].at - returned, 0.0)


def _times(outcomes: Counter[tuple[str, str]], outcome: str) -> int:
    return sum(times for (name, _), times in outcomes.items() if name == outcome)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[ceil(share * len(ordered)) - 1]


# -- watching -----------------------------------------------------------------------------


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
        self.starts: defaultdict[str, list[Start]] = defaultdict(list)  # by job id
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
                self.starts[job.id].append(Start(job.attempt, at))
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
