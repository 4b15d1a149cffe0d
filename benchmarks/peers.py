"""bgjob and other systems: bulk enqueue, drain, pick-up, jobs with keys, a pinned snapshot.

`--cache FOLDER` keeps the environments (by default `.venvs` beside this file), `--python PATH`
is the interpreter that makes them, and `--peers A,B` runs only these and bgjob.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple
from urllib.parse import quote

import harness
import psycopg
from figures import at_least, figure, percentile
from harness import Bench, say
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from systems import SYSTEMS, Environment, LeftOutError

_PAUSE = 0.01, 0.05  # seconds between two jobs, least and most
_KEYS = 100
_MOST = 100_000  # jobs of a run; slower systems get as many as fit in the time budget


class Round(NamedTuple):
    """Rates of one bulk enqueue and one drain."""

    enqueue_jobs_per_s: float
    made_jobs_per_s: float
    """The same, with the time that it takes to make the jobs."""
    drain_jobs_per_s: float


class PickedUp(NamedTuple):
    """Percentiles of some times."""

    p50_ms: float
    p99_ms: float


class Runner:
    """Runs one system, each time in a new database."""

    def __init__(self, bench: Bench, environment: Environment, store: str | None) -> None:
        self.system = environment.system
        self.runs: dict[str, list[float]] = {}
        self.has_keys = False
        self._bench = bench
        self.environment = environment
        self._database = f"bgjob_benchmark_{self.system.adapter}"
        self.url = _url_of(bench.dsn, self._database) if store is None else store

    def about(self) -> dict[str, Any]:
        """Return versions and settings."""
        about: dict[str, Any] = self.environment.run("about", self.url)
        self.has_keys = about.pop("has_keys")
        return about

    def drain(self, count: int) -> Round:
        """Return the rates of a bulk enqueue, and of the drain of its jobs."""
        with self.fresh():
            return self._round(count)

    def drain_keyed(self, count: int) -> float:
        """Return the jobs/s of a drain of jobs with a key, of which one runs at a time."""
        with self.fresh():
            self.environment.run("enqueue_keyed", self.url, count, _KEYS)
            return self._drain(count)

    def pick_up(self, count: int, chance: random.Random) -> PickedUp:
        """Return the times from an enqueue's return to its handler's start."""
        waited = []
        with (
            self.fresh(),
            self.environment.conversation("work", self.url) as (_, started),
            self.environment.conversation("produce", self.url) as (ask, returned),
        ):
            started()  # waits until the worker works
            for number in range(-5, count):  # the first few wait for connections
                sleep(chance.uniform(*_PAUSE))
                ask.write("one more\n")
                back = returned()
                ms = (started() - back) * 1000
                if number >= 0:
                    waited.append(ms)
        return PickedUp(percentile(waited, 0.5), percentile(waited, 0.99))

    def pinned(self, count: int, rounds: int, longest: float) -> list[float]:
        """Return the jobs/s of each round while another session holds a snapshot.

        It ends after a round that takes longer than `longest` seconds.
        """
        rates: list[float] = []
        with self.fresh(), psycopg.connect(self.url) as holder:
            holder.execute("set transaction isolation level repeatable read")
            holder.execute("select 1")
            while len(rates) < rounds and not (rates and count / rates[-1] > longest):
                rates.append(self._round(count).drain_jobs_per_s)
        return rates

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Make the system's tables in a new database, and drop that at the end."""
        name = sql.Identifier(self._database)
        drop = sql.SQL("drop database if exists {} with (force)").format(name)
        if self.system.on_postgres:
            self._bench.admin.execute(drop)
            self._bench.admin.execute(sql.SQL("create database {}").format(name))
        self.environment.run("setup", self.url)
        yield
        if self.system.on_postgres:
            self._bench.admin.execute(drop)

    def _round(self, count: int) -> Round:
        took = self.environment.run("enqueue", self.url, count)
        making, writing = took["making"], took["writing"]
        return Round(count / writing, count / (making + writing), self._drain(count))

    def _drain(self, count: int) -> float:
        if self.system.on_postgres:
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute("vacuum (analyze)")
                connection.execute("checkpoint")
        seconds: float = self.environment.run("drain", self.url, count)["seconds"]
        return count / seconds


def main(bench: Bench, cache: Path, python: str, names: Sequence[str]) -> Mapping[str, object]:
    """Run all systems in turn, in rounds; then each one under a pinned snapshot."""
    with ExitStack() as stack:
        runners, left_out = runners_of(bench, cache, python, names, stack)
        report = {runner.system.name: runner.about() for runner in runners}
        _measure(bench, runners, report)
        _pin(bench, runners, report)
    return {
        "benchmark": "peers",
        **_against_the_fastest(runners),
        "systems": report,
        "left_out": left_out,
    }


def runners_of(
    bench: Bench, cache: Path, python: str, names: Sequence[str], stack: ExitStack
) -> tuple[list[Runner], dict[str, str]]:
    runners, left_out = [], {}
    for system in SYSTEMS:
        if system.requirements and names and system.adapter not in names:
            continue
        try:
            environment = Environment(system, cache, python)
        except LeftOutError as error:
            say(f"{system.name} is left out: {error}")
            left_out[system.name] = str(error)
            continue
        store = None if system.on_postgres else stack.enter_context(environment.store())
        runners.append(Runner(bench, environment, store))
    return runners, left_out


def _measure(bench: Bench, runners: Sequence[Runner], report: dict[str, Any]) -> None:
    """Run in turns, after a first run that finds how many jobs fit in the budget."""
    quick = bench.options.quick
    picked_up, chance = 30 if quick else 200, random.Random(bench.options.seed)
    counts, keyed = {}, {}
    for runner in runners:
        counts[runner] = _fitting(
            runner.drain(2_000 if quick else 5_000).drain_jobs_per_s, is_quick=quick
        )
        if runner.has_keys:
            rate = runner.drain_keyed(2_000)
            keyed[runner] = report[runner.system.name]["keyed_jobs"] = _fitting(
                rate, is_quick=quick
            )
        report[runner.system.name] |= {"jobs": counts[runner], "picked_up": picked_up}
    for number in range(1, bench.options.rounds + 1):
        for runner in runners:
            figures = runner.drain(counts[runner])._asdict()
            figures |= runner.pick_up(picked_up, chance)._asdict()
            if runner in keyed:
                figures["keyed_jobs_per_s"] = runner.drain_keyed(keyed[runner])
            for name, value in figures.items():
                runner.runs.setdefault(name, []).append(value)
            said = ", ".join(f"{value:,.2f} {name}" for name, value in figures.items())
            say(f"{runner.system.name}, round {number}: {said}")
    for runner in runners:
        report[runner.system.name] |= {n: figure(runs) for n, runs in runner.runs.items()}


def _fitting(rate: float, *, is_quick: bool) -> int:
    """Return how many jobs fit in a run's time."""
    fit = int(rate * (2 if is_quick else 10)) // 1_000 * 1_000
    return max(1_000, min(fit, _MOST // 5 if is_quick else _MOST))


def _pin(bench: Bench, runners: Sequence[Runner], report: dict[str, Any]) -> None:
    count, rounds, longest = (1_000, 3, 10.0) if bench.options.quick else (10_000, 10, 60.0)
    for runner in runners:
        if runner.system.on_postgres:
            rates = [round(rate) for rate in runner.pinned(count, rounds, longest)]
            report[runner.system.name]["pinned"] = {"round": count, "jobs_per_s_by_round": rates}
            say(f"{runner.system.name}, pinned: {rates} jobs/s")


def _against_the_fastest(runners: Sequence[Runner]) -> dict[str, object]:
    """Compare with the best of the others on PostgreSQL."""
    ours, *others = (runner for runner in runners if runner.system.on_postgres)
    if not others:
        raise RuntimeError("there is nothing to compare with")
    compared: dict[str, object] = {}
    for part, name, goal in (
        ("drain", "drain_jobs_per_s", 5),
        ("enqueue", "enqueue_jobs_per_s", 3),
        ("enqueue_made", "made_jobs_per_s", 3),
        ("keyed", "keyed_jobs_per_s", 5),
    ):
        having = [other for other in others if name in other.runs]
        if not having:
            continue
        best = max(having, key=lambda other: sorted(other.runs[name])[len(other.runs[name]) // 2])
        compared[part] = {
            "floor": best.system.name,
            "jobs_per_s": figure(ours.runs[name], best.runs[name], at_least(goal)),
        }
    return compared


def _url_of(dsn: str, database: str) -> str:
    """Return the server's address in a form that every driver reads alike."""
    given = {name: quote(str(value), safe="") for name, value in conninfo_to_dict(dsn).items()}
    password = f":{given['password']}" if "password" in given else ""
    host = f"{given.get('host', 'localhost')}:{given.get('port', 5432)}"
    return f"postgresql://{given.get('user', 'postgres')}{password}@{host}/{database}"


def own_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".venvs")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--peers", type=lambda names: names.split(","), default=())
    own, sys.argv[1:] = parser.parse_known_args()
    return own


if __name__ == "__main__":
    own = own_arguments()
    harness.main(lambda bench: main(bench, own.cache.resolve(), own.python, own.peers), __doc__)
