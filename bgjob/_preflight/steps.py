"""What is read, in which order."""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Any, TypeAlias, TypeVar, cast

from psycopg.errors import QueryCanceled

from bgjob import schema
from bgjob._preflight import findings
from bgjob._preflight.judge import Judge
from bgjob._preflight.releases import of_workers
from bgjob._preflight.report import Finding, Report, TypeFit
from bgjob._preflight.sample import Sample
from bgjob._sql import preflight as statements
from bgjob._sql.preflight import DEAD, LIVE, Candidate, Key, Page, Table, Wanted
from bgjob._sql.session import clock, hidden, schema_comment
from bgjob._sql.statement import Statement
from bgjob._sql.workers import workers
from bgjob.mux import Mux
from bgjob.schedule import Schedule

T = TypeVar("T")

Steps: TypeAlias = Generator[Statement[Any], Any, T]
"""Yields statements, and receives their answers or what the server raised."""

_ROWS = 5_000
"""Rows of a page: 10 to 30 ms on the server."""

_FEWEST = 100
"""Rows of a page below which a server that is too slow is an error."""

_INLINE = 4096
"""The most bytes of a payload that comes with its page, so that a page is at most 20 MB."""

_LARGE = 8_000_000
"""Bytes of larger payloads that are read together, if they are several."""

_CHOSEN = 1_000
"""Chosen jobs that are read together."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to look at; see bgjob.preflight.check."""

    queues: Collection[str] | None = None
    schedules: Sequence[Schedule] | None = None
    sample: int | None = None
    limit_time: float | None = None
    left_out: Collection[str] = ()


class _TimeIsUpError(Exception):
    """The time limit was reached."""


def inspect(mux: Mux, options: Options, now: Callable[[], float] = monotonic) -> Steps[Report]:
    """Read schedules, live jobs and dead jobs; return what was found.

    Raises:
        SchemaError: the tables are missing, of another version, or the role may not read jobs.

    """
    inspection = _Inspection(mux, options, now)
    return (yield from inspection.steps())


class _Inspection:
    def __init__(self, mux: Mux, options: Options, now: Callable[[], float]) -> None:
        self._mux = mux
        self._options = options
        self._now = now
        self._since = now()
        self._judge = Judge(mux, options.left_out)
        self._findings: list[Finding] = []
        self._dead = 0

    def steps(self) -> Steps[Report]:
        schema.check_version((yield from _ask(schema_comment())))
        schema.check_lacks((yield from _ask(statements.live_lacks())))
        self._findings += findings.hidden((yield from _ask(hidden())))
        at = yield from _ask(clock())
        is_complete = True
        try:
            yield from self._look_at_schedules()
            yield from self._look_at(LIVE)
            yield from self._look_at_dead()
        except _TimeIsUpError:
            is_complete = False
        self._findings += findings.of_jobs(self._judge, at)
        fits = findings.fits(self._judge)
        yield from self._look_at_workers(fits)
        return Report(
            findings.in_order(self._findings),
            fits,
            sum(fit.jobs for fit in fits),
            self._dead,
            self._now() - self._since,
            is_complete,
        )

    def _check_time(self) -> None:
        limit = self._options.limit_time
        if limit is not None and self._now() >= self._since + limit:
            raise _TimeIsUpError

    def _look_at_schedules(self) -> Steps[None]:
        stored: list[statements.StoredSchedule] = []
        if lacks := (yield from _ask(statements.schedule_lacks())):
            self._findings.append(findings.unread("the database's schedules", lacks[0]))
        else:
            stored = yield from _ask(statements.stored_schedules())
        self._findings += findings.of_schedules(
            stored, self._options.schedules, self._judge, self._options.queues
        )

    def _look_at_workers(self, fits: Iterable[TypeFit]) -> Steps[None]:
        if lacks := (yield from _ask(statements.worker_lacks())):
            self._findings.append(findings.unread("the workers that run", lacks[0]))
            return
        self._findings += of_workers(
            (yield from _ask(workers())),
            self._mux.types,
            self._options.queues,
            {(fit.queue, fit.type): fit.jobs for fit in fits},
        )

    def _look_at_dead(self) -> Steps[None]:
        if lacks := (yield from _ask(statements.dead_lacks())):
            self._findings.append(findings.unread("dead jobs", lacks[0]))
            return
        yield from self._look_at(DEAD)

    def _look_at(self, table: Table) -> Steps[None]:
        if self._options.sample is None:
            yield from self._walk(table, _INLINE, self._examine)
            return
        sample = Sample(self._options.sample)

        def choose(table: Table, jobs: list[Candidate]) -> Steps[None]:
            for job in jobs:
                if table is DEAD or self._judge.count(job):
                    sample.add(job.type, job.key)
            yield from ()

        yield from self._walk(table, -1, choose)
        for keys in _chunks(sample.keys(), _CHOSEN):
            self._check_time()
            wanted = self._wanted(_INLINE)
            jobs = yield from _ask(statements.candidates(table, keys, wanted))
            yield from self._with_payloads(table, jobs)

    def _walk(
        self, table: Table, most: int, take: Callable[[Table, list[Candidate]], Steps[None]]
    ) -> Steps[None]:
        """Hand each page of a table to `take`."""
        wanted, after, rows = self._wanted(most), table.first, _ROWS
        while True:
            self._check_time()
            try:
                page: Page = yield from _ask(statements.page(table, after, wanted, rows=rows))
            except QueryCanceled:
                if (rows := rows // 4) < _FEWEST:
                    raise
                continue
            if table is DEAD:
                self._dead += page.looked_at
            yield from take(table, page.candidates)
            if page.looked_at < rows or page.last is None:
                return
            after = page.last
            del page  # before the next one comes

    def _wanted(self, most: int) -> Wanted:
        queues = None if self._options.queues is None else list(self._options.queues)
        return Wanted(queues, sorted(self._mux.types), self._judge.read, self._judge.keyed, most)

    def _examine(self, table: Table, jobs: list[Candidate]) -> Steps[None]:
        if table is LIVE:
            jobs = [job for job in jobs if self._judge.count(job)]
        yield from self._with_payloads(table, jobs)

    def _with_payloads(self, table: Table, jobs: list[Candidate]) -> Steps[None]:
        """Judge jobs; read the payloads that were too large for their page."""
        judge = self._judge.examine if table is LIVE else self._judge.revive
        large = []
        for job in jobs:
            if job.size is None or job.arg is not None:
                judge(job)
            else:
                large.append(job)
        for together in _by_size(large):
            self._check_time()
            keys = [job.key for job in together]
            found = yield from _ask(statements.payloads(table, keys))
            for job in together:
                if job.key in found:
                    judge(job._replace(arg=found[job.key]))
                elif table is LIVE:
                    self._judge.gone(job)


def _ask(statement: Statement[T]) -> Steps[T]:
    return cast("T", (yield statement))


def _by_size(jobs: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Yield groups of jobs whose payloads together are not too large; a larger one is alone."""
    group: list[Candidate] = []
    size = 0
    for job in jobs:
        if group and size + (job.size or 0) > _LARGE:
            yield group
            group, size = [], 0
        group.append(job)
        size += job.size or 0
    if group:
        yield group


def _chunks(keys: Iterator[Key], size: int) -> Iterator[list[Key]]:
    while chunk := list(islice(keys, size)):
        yield chunk
