"""What a fleet of idle workers of one queue costs, and how it starts, also after an outage."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import harness
import psycopg
import replicas
from figures import Figures, at_most, figure, percentile
from harness import Bench
from psycopg.rows import scalar_row
from replicas import Reading, Replicas
from work import PATIENCE, QUEUE

from bgjob import Client, EnqueueRequest
from bgjob._sql.notices import channel
from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql

_SPARE = 50
"""Connections beside those of the workers."""

_SETTLED = 3.0
"""Seconds until all workers have swept the queue and gone to sleep."""

_PAUSE = 1.0
"""Seconds between two jobs for idle workers."""

_OUTAGE = 10.0
"""Seconds for which the server is away."""

_EVERY = 0.05
"""Seconds between two looks at the sessions."""

_RARELY = 1.0
"""The same while a fleet comes back."""

_KINDS = {
    "beats": "%update bgjob_worker%",
    "sweeps": "%bgjob_job%freed%",
    "claims": "%update bgjob_job set%",
    "surveys": "%with recursive line%",
    "looks_at_keys": "%bgjob_exclusive%",
    "open_transactions": "%pg_current_snapshot%",
    "lock_releases": "%pg_advisory_unlock_all%",
    "lock_tries": "%pg_try_advisory_lock%",
}
"""A worker's statements by a part of their text; the first that matches."""

_CALLS = """
    select kind, coalesce(sum(calls), 0)::float8
    from unnest(%s::text[], %s::text[]) with ordinality as k (kind, part, place)
    left join pg_stat_statements on query like part and not exists (
        select from unnest(%s::text[]) with ordinality as e (part, place)
        where e.place < k.place and query like e.part
    )
    group by kind
"""


def main(bench: Bench) -> Mapping[str, object]:
    """Measure a fleet on a server of its own, which is stopped and started."""
    workers, processes, seconds, jobs = (
        (60, 3, 12, 3) if bench.options.quick else (2000, 10, 30, 10)
    )
    settings = {
        "max_connections": str(workers + _SPARE),
        "shared_preload_libraries": "pg_stat_statements",
    }
    runs: list[dict[str, Figures]] = []
    for _ in range(bench.options.rounds):
        with EmbeddedServer(settings=settings) as server:
            runs.append(_Fleet(server, workers, processes).run(seconds, jobs))
    goals = {"connections_per_worker": at_most(1, "median")}
    return {
        "benchmark": "fleet",
        "workers": workers,
        "processes": processes,
        "idle_s": seconds,
        "outage_s": _OUTAGE,
        "max_connections": workers + _SPARE,
        **{
            part: {
                name: figure([run[part][name] for run in runs], goal=goals.get(name))
                for name in runs[0][part]
            }
            for part in runs[0]
        },
    }


class _Fleet:
    def __init__(self, server: EmbeddedServer, workers: int, processes: int) -> None:
        self._server = server
        self._dsn = server.dsn
        self._workers = workers
        self._processes = processes

    def run(self, seconds: float, jobs: int) -> dict[str, Figures]:
        """Start the fleet, watch it idle, give it single jobs, take its server away."""
        plans = replicas.spread(self._workers, self._processes, notes_starts=True)
        with psycopg.connect(self._dsn, autocommit=True) as self._admin:
            self._admin.execute(init_sql())
            self._admin.execute("create extension pg_stat_statements")
            self._replicas = Replicas(self._dsn, plans)
            figures = {"start": self._start(), "idle": self._idle(seconds), "job": self._job(jobs)}
        figures["outage"] = self._outage()
        self._replicas.stop()
        return figures

    def _start(self) -> Figures:
        bare = self._replicas.read()
        began, cpu = monotonic(), self._server_cpu()
        with _sessions(self._dsn) as sessions:
            self._replicas.start()
            took = monotonic() - began
        ready = self._replicas.read()
        return _said(
            "start",
            {
                "seconds": took,
                "server_ms_per_worker": (self._server_cpu() - cpu) / self._workers * 1e3,
                "process_ms_per_worker": self._per_worker("cpu_s", bare, ready) * 1e3,
                "process_kib_per_worker": self._per_worker("mib", bare, ready) * 1024,
                "server_kib_per_worker": self._server_kib(),
                "threads_per_worker": self._per_worker("threads", bare, ready),
                "connections_per_worker": max(sessions) / self._workers,
                "errors": _sum(ready, "errors"),
            },
        )

    def _idle(self, seconds: float) -> Figures:
        sleep(_SETTLED)
        self._admin.execute("select pg_stat_statements_reset()")
        before, cpu, wal, began = (
            self._replicas.read(),
            self._server_cpu(),
            self._wal(),
            monotonic(),
        )
        with _notifications(self._dsn) as heard:
            sleep(seconds)
            calls = self._calls()
            after, took = self._replicas.read(), monotonic() - began
        self._idle_cpu = (
            (self._server_cpu() - cpu) / took,
            (_sum(after, "cpu_s") - _sum(before, "cpu_s")) / took,
        )
        minutes = self._workers * took / 60
        return _said(
            "idle",
            {
                "server_us_per_worker_and_second": self._idle_cpu[0] / self._workers * 1e6,
                "process_us_per_worker_and_second": self._idle_cpu[1] / self._workers * 1e6,
                "wal_bytes_per_worker_and_minute": (self._wal() - wal) / minutes,
                "notifications_per_minute": len(heard) / took * 60,
                **{
                    f"{name}_per_worker_and_minute": count / minutes
                    for name, count in calls.items()
                },
            },
        )

    def _job(self, jobs: int) -> Figures:
        """Enqueue single jobs into the idle fleet: what each costs, beyond idleness."""
        before, cpu, began = self._replicas.read(), self._server_cpu(), monotonic()
        self._admin.execute("select pg_stat_statements_reset()")
        asked: list[tuple[str, float]] = []
        with Client(self._dsn) as client, _notifications(self._dsn) as heard:
            for _ in range(jobs):
                request = EnqueueRequest(QUEUE, "noop")
                asked.append((request.id, monotonic()))
                client.enqueue(request)
                sleep(_PAUSE)
            while len(started := _starts(after := self._replicas.read())) < jobs:
                sleep(_EVERY)
                if monotonic() > began + PATIENCE:
                    raise RuntimeError(f"{len(started)} runs of {jobs} jobs")
        took = monotonic() - began
        waited = [(started[id_] - by) * 1000 for id_, by in asked]
        spent = self._server_cpu() - cpu, _sum(after, "cpu_s") - _sum(before, "cpu_s")
        beyond = [
            (got - idle * took) / jobs for got, idle in zip(spent, self._idle_cpu, strict=True)
        ]
        return _said(
            "one job",
            {
                "p50_ms": percentile(waited, 0.5),
                "most_ms": max(waited),
                # On a host so busy that a lease ends, a job starts twice.
                "starts_per_job": sum(len(each.starts) for each in after) / jobs,
                "server_ms_per_job": beyond[0] * 1e3,
                "process_ms_per_job": beyond[1] * 1e3,
                "notifications_per_job": len(heard) / jobs,
            },
        )

    def _outage(self) -> Figures:
        """Stop the server for a while; measure until all workers are connected again."""
        before = self._replicas.read()
        self._server.stop()
        sleep(_OUTAGE)
        cpu_away = _sum(self._replicas.read(), "cpu_s") - _sum(before, "cpu_s")
        self._server.start()
        began = monotonic()
        with _sessions(self._dsn) as sessions:
            while max(sessions, default=0) < self._workers or not self._are_connected():
                sleep(_RARELY)  # each look asks all workers
                if monotonic() > began + PATIENCE:
                    raise RuntimeError(f"{sessions[-1]} of {self._workers} workers came back")
            took = monotonic() - began
        after = self._replicas.read()
        with Client(self._dsn) as client:
            enqueued_at, request = monotonic(), EnqueueRequest(QUEUE, "noop")
            client.enqueue(request)
            while (last := _starts(self._replicas.read()).get(request.id)) is None:
                sleep(_EVERY)
        return _said(
            "outage",
            {
                "seconds_to_all": took,
                "first_job_ms": (last - enqueued_at) * 1e3,
                "connections_per_worker": max(sessions) / self._workers,
                "errors_per_worker": self._per_worker("errors", before, after),
                "process_us_per_worker_and_second_without": (
                    cpu_away / self._workers / _OUTAGE * 1e6
                ),
                "server_ms_per_worker": self._server_cpu() / self._workers * 1e3,
                "process_ms_per_worker": (
                    self._per_worker("cpu_s", before, after) - cpu_away / self._workers
                )
                * 1e3,
            },
        )

    def _calls(self) -> dict[str, float]:
        kinds, parts = [*_KINDS], [*_KINDS.values()]
        return dict(self._admin.execute(_CALLS, [kinds, parts, parts]).fetchall())

    def _are_connected(self) -> bool:
        return _sum(self._replicas.read(), "connected") == self._workers

    def _per_worker(self, name: str, before: Sequence[Reading], after: Sequence[Reading]) -> float:
        return (_sum(after, name) - _sum(before, name)) / self._workers

    def _server_cpu(self) -> float:
        assert self._server.pid is not None
        return replicas.cpu_of(self._server.pid)

    def _server_kib(self) -> float:
        """Return the memory that no other process shares of a session, on average."""
        assert self._server.pid is not None
        sizes = []
        for pid in replicas.processes_of(self._server.pid):
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
            except OSError:
                continue  # it has just ended
            lines = [line.split() for line in text.splitlines() if line.startswith("Private")]
            sizes.append(sum(int(line[1]) for line in lines))
        return sum(sizes) / len(sizes)

    def _wal(self) -> float:
        row = self._admin.execute("select pg_current_wal_insert_lsn() - '0/0'").fetchone()
        assert row is not None
        return float(row[0])


def _sum(readings: Sequence[Reading], name: str) -> float:
    return float(sum(getattr(reading, name) for reading in readings))


def _starts(readings: Sequence[Reading]) -> dict[str, float]:
    """Return when each job first started."""
    starts = sorted((at, id_) for reading in readings for id_, at in reading.starts)
    return {id_: at for at, id_ in reversed(starts)}


def _said(part: str, figures: Figures) -> Figures:
    harness.say(f"{part}: " + ", ".join(f"{value:,.3f} {name}" for name, value in figures.items()))
    return figures


@contextmanager
def _sessions(dsn: str) -> Iterator[list[int]]:
    """Count the workers' sessions again and again meanwhile."""
    counts: list[int] = []
    with psycopg.connect(dsn, autocommit=True, row_factory=scalar_row) as connection:
        with _meanwhile(lambda: counts.append(_count(connection)), _EVERY):
            yield counts
        counts.append(_count(connection))


def _count(connection: psycopg.Connection[int]) -> int:
    count = connection.execute(
        "select count(*) from pg_stat_activity where application_name = 'bgjob'"
    ).fetchone()
    assert count is not None
    return count


@contextmanager
def _notifications(dsn: str) -> Iterator[list[str]]:
    """Collect the payloads of the queue's channel meanwhile."""
    heard: list[str] = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"listen {channel(QUEUE)}".encode())
        with _meanwhile(
            lambda: heard.extend(n.payload for n in connection.notifies(timeout=_EVERY)), 0
        ):
            yield heard


@contextmanager
def _meanwhile(do: Callable[[], object], pause: float) -> Iterator[None]:
    """Do it in a thread, with a pause between two times."""
    end = threading.Event()

    def repeat() -> None:
        while not end.wait(pause):
            do()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


if __name__ == "__main__":
    harness.main(main, __doc__)
