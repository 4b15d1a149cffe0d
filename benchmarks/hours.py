"""Hours at a steady rate beside another system, a snapshot pinned for half of the time.

`--hours` is the length of the run, 2 by default, and `--rate` the jobs a second of each system,
1,000. `--cache`, `--python` and `--peers` are those of `peers.py`; the peer is pgqueuer by default,
the fastest of the others. Each system has its own database on one server with default settings.

Another system leaves the run once its median wait is over two minutes: it would need ever more of
the machine, and would measure its own backlog. It is compared up to there.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, date, datetime
from statistics import median
from time import monotonic, sleep
from typing import IO, Any

import harness
import psycopg
from figures import at_most, figure
from harness import Bench, say
from peers import Runner, own_arguments, runners_of

_SAMPLES = 120  # of a run
_PATIENCE = 600.0  # seconds for what is left at the end
_TOO_LATE = 120_000.0  # milliseconds of the median wait at which another system leaves
_BLOCK = 8192

Sample = dict[str, float]

_SIZES = """
select
    sum(pg_relation_size(relid)) as table_bytes,
    sum(pg_indexes_size(relid)) as index_bytes,
    sum(n_dead_tup) as dead_rows,
    sum(autovacuum_count) as vacuums
from pg_stat_user_tables"""


class Watched:
    """A system at work: its producer, its worker, and its tables."""

    def __init__(self, runner: Runner, rate: int, seconds: float) -> None:
        self.name = runner.system.name
        self.samples: list[Sample] = []
        self._url, self._enqueued, self._ran = runner.url, 0, 0
        talk, patience = runner.environment.conversation, seconds + 2 * _PATIENCE
        with ExitStack() as stack:
            stack.enter_context(runner.fresh())
            self._admin = stack.enter_context(psycopg.connect(self._url, autocommit=True))
            self._holder = stack.enter_context(psycopg.connect(self._url))
            self._worker = stack.enter_context(talk("watch", self._url, patience=patience))
            self._worker[1]()  # waits until it works
            self._flow = stack.enter_context(talk("flow", self._url, rate, patience=patience))
            self._flow[1]()
            self._stack = stack.pop_all()

    @property
    def is_too_late(self) -> bool:
        """Whether its jobs wait for minutes."""
        return self.samples[-1].get("p50_ms", 0.0) > _TOO_LATE

    def sample(self, minute: float) -> None:
        """Ask for what happened since the last sample."""
        enqueued, seen = _ask(self._flow), _ask(self._worker)
        self._enqueued = enqueued
        self._ran += seen["ran"]
        self.samples.append(
            {"minute": round(minute, 2), "enqueued": enqueued, **seen, **self._sizes()}
        )
        latest = ", ".join(f"{value:,.10g} {name}" for name, value in self.samples[-1].items())
        say(f"{self.name}: {latest}")

    def pin(self) -> None:
        """Hold a snapshot of the system's database, as a forgotten transaction does."""
        self._holder.execute("set transaction isolation level repeatable read")
        self._holder.execute("select 1")

    def release(self) -> None:
        """Release the snapshot."""
        self._holder.rollback()

    def end(self) -> None:
        """Stop the producer, and wait until each of its jobs ran."""
        self._flow[0].close()
        self._enqueued = self._flow[1]()
        deadline = monotonic() + _PATIENCE
        while self._ran < self._enqueued and monotonic() < deadline:
            sleep(0.2)
            self._ran += _ask(self._worker)["ran"]
        if self._ran != self._enqueued:
            raise RuntimeError(f"{self.name}: {self._ran} runs of {self._enqueued} jobs")

    def leave(self) -> None:
        """End its producer and its worker, and drop its database."""
        self._stack.close()

    def _sizes(self) -> Sample:
        names = "table_mb", "index_mb", "dead_rows", "vacuums"
        row = self._admin.execute(_SIZES).fetchone()
        assert row is not None
        table, index, *rest = map(int, row)
        return dict(zip(names, [round(table / 1e6, 2), round(index / 1e6, 2), *rest], strict=True))


def main(hours: float, rate: int, runners: Sequence[Runner]) -> Mapping[str, object]:
    """Run all systems side by side; compare what they leave behind."""
    seconds = hours * 3600
    pinned = seconds / 4, seconds * 3 / 4
    with ExitStack() as stack:
        watched: list[Watched] = []
        for runner in runners:
            watched.append(Watched(runner, rate, seconds))
            stack.callback(watched[-1].leave)
        for system in _run(watched, seconds, pinned):
            system.end()
    samples = {system.name: system.samples for system in watched}
    return report(hours, rate, pinned, samples, datetime.now(UTC).date())


def report(
    hours: float,
    rate: int,
    pinned: tuple[float, float],
    samples: Mapping[str, Sequence[Sample]],
    day: date,
) -> Mapping[str, object]:
    """Compare the first system with the best of the others, as long as all are there."""
    until = min(of[-1]["minute"] for of in samples.values())
    ours, *others = (_summary(of, pinned, until) for of in samples.values())
    figures = {}
    for name, value in ours.items():
        floor = min((other[name] for other in others if name in other), default=None)
        figures[name] = figure([value]) if floor is None else figure([value], [floor], at_most(1.0))
    return {
        "benchmark": "hours",
        "day": day.isoformat(),
        "hours": hours,
        "jobs_per_s": rate,
        "pinned_minutes": [moment / 60 for moment in pinned],
        "compared_minutes": until,
        "floor": " and ".join([*samples][1:]),
        **figures,
        "samples": samples,
    }


def _run(
    watched: Sequence[Watched], seconds: float, pinned: tuple[float, float]
) -> Sequence[Watched]:
    """Take samples of all; return those that are still there at the end."""
    began, interval, there = monotonic(), seconds / _SAMPLES, list(watched)
    held = False
    for number in range(1, _SAMPLES + 1):
        sleep(max(0.0, began + number * interval - monotonic()))
        elapsed = monotonic() - began
        for system in there.copy():
            system.sample(elapsed / 60)
            if system.is_too_late:
                say(f"{system.name} leaves the run")
                system.leave()
                there.remove(system)
        if held != (pinned[0] <= elapsed < pinned[1]):
            held = not held
            for system in there:
                system.pin() if held else system.release()
    if watched[0] not in there:
        raise RuntimeError(f"{watched[0].name} was minutes late")
    return there


def _summary(
    samples: Sequence[Sample], pinned: tuple[float, float], until: float
) -> dict[str, float]:
    """Return a system's times, and what grew for each of its jobs while the snapshot was held."""
    first, last = (moment / 60 for moment in pinned)
    parts = {
        "before": [sample for sample in samples if sample["minute"] <= first],
        "pinned": [sample for sample in samples if first < sample["minute"] <= min(last, until)],
        "after": [sample for sample in samples if sample["minute"] > last],
    }
    found = {
        f"{name}_{part}": median(sample[name] for sample in of if name in sample)
        for name in ("p50_ms", "p99_ms")
        for part, of in parts.items()
        if of
    }
    if parts["pinned"]:
        begin, end = parts["before"][-1], parts["pinned"][-1]
        jobs = end["enqueued"] - begin["enqueued"]

        def grown(*names: str) -> float:
            return sum(end[name] - begin[name] for name in names)

        found["dead_rows_per_job_pinned"] = grown("dead_rows") / jobs
        found["pages_per_job_pinned"] = grown("table_mb", "index_mb") * 1e6 / _BLOCK / jobs
    if parts["after"]:
        found["mb_at_the_end"] = samples[-1]["table_mb"] + samples[-1]["index_mb"]
    return found


def _ask(conversation: tuple[IO[str], Callable[[], Any]]) -> Any:
    conversation[0].write("now\n")
    return conversation[1]()


def _own_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--rate", type=int, default=1_000)
    own, sys.argv[1:] = parser.parse_known_args()
    return own


if __name__ == "__main__":
    own, others = _own_arguments(), own_arguments()

    def runners(bench: Bench, stack: ExitStack) -> Sequence[Runner]:
        """Return bgjob and the peers."""
        names = others.peers or ["pgqueuer"]
        found, left_out = runners_of(bench, others.cache.resolve(), others.python, names, stack)
        if left_out:
            sys.exit(f"left out: {left_out}")
        return found

    def whole(bench: Bench) -> Mapping[str, object]:
        """Make the environments, and run."""
        with ExitStack() as stack:
            return main(own.hours, own.rate, runners(bench, stack))

    harness.main(whole, __doc__)
