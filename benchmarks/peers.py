"""bgjob and other systems: bulk enqueue, drain, pick-up, and drain under a pinned snapshot.

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
from typing import Any
from urllib.parse import quote

import harness
import psycopg
from figures import at_least, figure, percentile
from harness import Bench, say
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from systems import SYSTEMS, Environment, LeftOutError

_PAUSE = 0.01, 0.05  # seconds between two jobs, least and most
_MOST = 100_000  # jobs of a run; slower systems get as many as fit in the time budget


class Runner:
    """Runs one system, each time in a new database."""

    def __init__(self, bench: Bench, environment: Environment, store: str | None) -> None:
        self.system = environment.system
        self.runs: dict[str, list[float]] = {}
        self._bench = bench
        self._environment = environment
        self._database = f"bgjob_benchmark_{self.system.adapter}"
        self._url = _url_of(bench.dsn, self._database) if store is None else store

    def about(self) -> dict[str, Any]:
        """Return versions and settings."""
        about: dict[str, Any] = self._environment.run("about", self._url)
        return about

    def drain(self, count: int) -> tuple[float, float]:
        """Return the jobs/s of a bulk enqueue, and of the drain of its jobs."""
        with self._fresh():
            return self._round(count)

    def pick_up(self, count: int, chance: random.Random) -> tuple[float, float]:
        """Return p50 and p99 of the ms from an enqueue's return to its handler's start."""
        waited = []
        with (
            self._fresh(),
            self._environment.conversation("work", self._url) as (_, started),
            self._environment.conversation("produce", self._url) as (ask, returned),
        ):
            started()  # waits until the worker works
            for number in range(-5, count):  # the first few wait for connections
                sleep(chance.uniform(*_PAUSE))
                ask.write("one more\n")
                back = returned()
                ms = (started() - back) * 1000
                if number >= 0:
                    waited.append(ms)
        return percentile(waited, 0.5), percentile(waited, 0.99)

    def pinned(self, count: int, rounds: int, longest: float) -> list[float]:
        """Return the jobs/s of each round while another session holds a snapshot.

        It ends after a round that takes longer than `longest` seconds.
        """
        rates: list[float] = []
        with self._fresh(), psycopg.connect(self._url) as holder:
            holder.execute("set transaction isolation level repeatable read")
            holder.execute("select 1")
            while len(rates) < rounds and not (rates and count / rates[-1] > longest):
                rates.append(self._round(count)[1])
        return rates

    def _round(self, count: int) -> tuple[float, float]:
        wrote = self._environment.run("enqueue", self._url, count)["seconds"]
        if self.system.on_postgres:
            with psycopg.connect(self._url, autocommit=True) as connection:
                connection.execute("vacuum (analyze)")
                connection.execute("checkpoint")
        drained = self._environment.run("drain", self._url, count)["seconds"]
        return count / wrote, count / drained

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        name = sql.Identifier(self._database)
        drop = sql.SQL("drop database if exists {} with (force)").format(name)
        if self.system.on_postgres:
            self._bench.admin.execute(drop)
            self._bench.admin.execute(sql.SQL("create database {}").format(name))
        self._environment.run("setup", self._url)
        yield
        if self.system.on_postgres:
            self._bench.admin.execute(drop)


def main(bench: Bench, cache: Path, python: str, names: Sequence[str]) -> Mapping[str, object]:
    """Run all systems in turn, in rounds; then each one under a pinned snapshot."""
    with ExitStack() as stack:
        runners, left_out = _runners(bench, cache, python, names, stack)
        report = {runner.system.name: runner.about() for runner in runners}
        _measure(bench, runners, report)
        _pin(bench, runners, report)
    return {
        "benchmark": "peers",
        **_against_the_fastest(runners),
        "systems": report,
        "left_out": left_out,
    }


def _runners(
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
    counts = {}
    for runner in runners:
        rate = runner.drain(2_000 if quick else 5_000)[1]
        fit = int(rate * (2 if quick else 10)) // 1_000 * 1_000
        counts[runner] = max(1_000, min(fit, _MOST // 5 if quick else _MOST))
        report[runner.system.name] |= {"jobs": counts[runner], "picked_up": picked_up}
    for number in range(1, bench.options.rounds + 1):
        for runner in runners:
            values = *runner.drain(counts[runner]), *runner.pick_up(picked_up, chance)
            names = "enqueue_jobs_per_s", "drain_jobs_per_s", "p50_ms", "p99_ms"
            for name, value in zip(names, values, strict=True):
                runner.runs.setdefault(name, []).append(value)
            said = ", ".join(f"{v:,.2f} {n}" for n, v in zip(names, values, strict=True))
            say(f"{runner.system.name}, round {number}: {said}")
    for runner in runners:
        report[runner.system.name] |= {n: figure(runs) for n, runs in runner.runs.items()}


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
    ):
        best = max(others, key=lambda other: sorted(other.runs[name])[len(other.runs[name]) // 2])
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


def _own_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".venvs")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--peers", type=lambda names: names.split(","), default=())
    own, sys.argv[1:] = parser.parse_known_args()
    return own


if __name__ == "__main__":
    own = _own_arguments()
    harness.main(lambda bench: main(bench, own.cache.resolve(), own.python, own.peers), __doc__)
