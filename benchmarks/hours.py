"""Hours at a steady rate beside another system, a snapshot pinned for half of the time.

`--hours` is the length of the run, 2 by default, and `--rate` the jobs a second of each system,
1,000. `--cache`, `--python` and `--peers` are those of `peers.py`; the peer is pgqueuer by default,
the fastest of the others. Each system has its own database on one server with default settings.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

    def __init__(self, runner: Runner, stack: ExitStack, rate: int, seconds: float) -> None:
        stack.enter_context(runner.fresh())
        talk, patience = runner.environment.conversation, seconds + 2 * _PATIENCE
        self.name = runner.system.name
        self.samples: list[Sample] = []
        self._url, self._enqueued, self._ran = runner.url, 0, 0
        self._admin = stack.enter_context(psycopg.connect(runner.url, autocommit=True))
        self._worker = stack.enter_context(talk("watch", runner.url, patience=patience))
        self._worker[1]()  # waits until it works
        self._flow = stack.enter_context(talk("flow", runner.url, rate, patience=patience))
        self._flow[1]()

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

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Hold a snapshot of the system's database, as a forgotten transaction does."""
        with psycopg.connect(self._url) as holder:
            holder.execute("set transaction isolation level repeatable read")
            holder.execute("select 1")
            yield

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

    def _sizes(self) -> Sample:
        names = "table_mb", "index_mb", "dead_rows", "vacuums"
        row = self._admin.execute(_SIZES).fetchone()
        assert row is not None
        table, index, *rest = map(int, row)
        return dict(zip(names, [round(table / 1e6, 2), round(index / 1e6, 2), *rest], strict=True))


def main(
    bench: Bench, hours: float, rate: int, runners: Callable[[ExitStack], Sequence[Runner]]
) -> Mapping[str, object]:
    """Run all systems side by side; compare what they leave behind."""
    seconds = hours * 3600
    pinned = seconds / 4, seconds * 3 / 4
    with ExitStack() as stack:
        watched = [Watched(runner, stack, rate, seconds) for runner in runners(stack)]
        _run(watched, seconds, pinned)
        for system in watched:
            system.end()
    ours, *others = (_summary(system.samples, pinned) for system in watched)
    best = {name: min(other[name] for other in others) for name in ours}
    return {
        "benchmark": "hours",
        "hours": hours,
        "jobs_per_s": rate,
        "pinned_minutes": [moment / 60 for moment in pinned],
        "floor": " and ".join(system.name for system in watched[1:]),
        **{name: figure([value], [best[name]], at_most(1.0)) for name, value in ours.items()},
        "samples": {system.name: system.samples for system in watched},
    }


def _run(watched: Sequence[Watched], seconds: float, pinned: tuple[float, float]) -> None:
    began, interval = monotonic(), seconds / _SAMPLES
    with ExitStack() as holders:
        held = False
        for number in range(1, _SAMPLES + 1):
            sleep(max(0.0, began + number * interval - monotonic()))
            elapsed = monotonic() - began
            for system in watched:
                system.sample(elapsed / 60)
            if not held and pinned[0] <= elapsed < pinned[1]:
                held = True
                for system in watched:
                    holders.enter_context(system.pinned())
            elif held and elapsed >= pinned[1]:
                held = False
                holders.close()


def _summary(samples: Sequence[Sample], pinned: tuple[float, float]) -> dict[str, float]:
    """Return a system's times, and what grew for each of its jobs while the snapshot was held."""
    first, last = (moment / 60 for moment in pinned)
    parts = {
        "before": [sample for sample in samples if sample["minute"] <= first],
        "pinned": [sample for sample in samples if first < sample["minute"] <= last],
        "after": [sample for sample in samples if sample["minute"] > last],
    }
    begin, end = parts["before"][-1], parts["pinned"][-1]
    jobs = end["enqueued"] - begin["enqueued"]

    def grown(*names: str) -> float:
        return sum(end[name] - begin[name] for name in names)

    return {
        f"{name}_{part}": median(sample[name] for sample in of if name in sample)
        for name in ("p50_ms", "p99_ms")
        for part, of in parts.items()
    } | {
        "dead_rows_per_job_pinned": grown("dead_rows") / jobs,
        "pages_per_job_pinned": grown("table_mb", "index_mb") * 1e6 / _BLOCK / jobs,
        "mb_at_the_end": samples[-1]["table_mb"] + samples[-1]["index_mb"],
    }


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

    harness.main(
        lambda bench: main(bench, own.hours, own.rate, lambda stack: runners(bench, stack)), __doc__
    )
