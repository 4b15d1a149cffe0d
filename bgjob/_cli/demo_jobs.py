"""The demo's jobs: what they do, and the checks of their results."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import ge
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from psycopg_pool import ConnectionPool

from bgjob.client import Client
from bgjob.errors import UnknownTypeError
from bgjob.job import EnqueueRequest, Job
from bgjob.mux import Mux
from bgjob.result import Backoff, Complete, MoveToDlq, Reschedule, Result

QUEUE = "bgjob_demo"

SINGLES = 100
"""Jobs enqueued one by one, while the worker is idle, to measure its pick-up time."""

_DELAY = 0.5  # seconds before the delayed job is due
_FAILURES = 2  # of the flaky job
_BACKOFF = Backoff(base=0.1, factor=2, jitter=0)  # between them
_LATER = 0.2  # seconds by which the patient job reschedules itself
_HOPELESS = "this job always fails, on purpose"

CREATE_TABLE = """
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


def make_mux(root: Path, pool: ConnectionPool[Any]) -> Mux:
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


class Sent(NamedTuple):
    id: str
    at: float  # just before the enqueue


def enqueue_others(client: Client) -> dict[str, Sent]:
    """Enqueue one job of each other type; they run before the files."""
    sent = {}
    for type_ in ("delayed", "flaky", "patient", "hopeless", "unheard_of"):
        delay = _DELAY if type_ == "delayed" else 0
        at = perf_counter()
        id_ = client.enqueue(EnqueueRequest(QUEUE, type_, delay=delay, priority=-1))
        sent[type_] = Sent(id_, at)
    return sent


# -- the checks ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """A check, and whether it passed."""

    ok: bool
    text: str


class Start(NamedTuple):
    attempt: int
    at: float


def check_counts(counted: dict[str, FileCount], direct: dict[str, FileCount]) -> Check:
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


def check_outcomes(outcomes: Counter[tuple[str, str]], *, files: int) -> Check:
    expected = Counter(
        {
            ("completed", "count_file"): files,
            ("completed", "pick_up"): SINGLES,
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


def check_delayed(starts: Sequence[Start], enqueued_at: float) -> Check:
    waits = [start.at - enqueued_at for start in starts]
    return Check(
        len(waits) == 1 and waits[0] >= _DELAY,
        f"delayed: started after {_listed(waits)}, delay {_DELAY:g} s",
    )


def check_flaky(starts: Sequence[Start]) -> Check:
    attempts, waits = [start.attempt for start in starts], _waits(starts)
    backoff = [_BACKOFF(attempt) for attempt in range(1, _FAILURES + 1)]
    return Check(
        attempts == [*range(1, _FAILURES + 2)] and all(map(ge, waits, backoff)),
        f"flaky: attempts {attempts}, retried after {_listed(waits)}, backoff {_listed(backoff)}",
    )


def check_patient(starts: Sequence[Start]) -> Check:
    attempts, waits = [start.attempt for start in starts], _waits(starts)
    return Check(
        attempts == [1, 1] and waits[0] >= _LATER,
        f"patient: attempts {attempts}, ran again after {_listed(waits)}, delay {_LATER:g} s",
    )


def check_dead(dead: dict[str, str | None]) -> Check:
    return Check(
        dead.keys() == {"hopeless", "unheard_of"}
        and dead["hopeless"] == _HOPELESS
        and (dead["unheard_of"] or "").startswith(UnknownTypeError.__name__),
        f"dead: {', '.join(sorted(dead)) or 'none'}, each with its error",
    )


def _waits(starts: Sequence[Start]) -> list[float]:
    return [after.at - before.at for before, after in pairwise(starts)]


def _listed(seconds: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in seconds) + " s"
