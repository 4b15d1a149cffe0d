"""What the benchmarks share: new tables, runs in turn with a floor, goals, a JSON report.

A rate alone says more about the machine than about the library. So each program also
measures a floor: the least that bare psycopg needs for the same rows in the same table,
on the same server, in the same minute.
"""

import argparse
import gc
import json
import os
import platform
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psycopg
from figures import Figures, Goal, far_off, figure
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bgjob.ext.embedded import EmbeddedServer
from bgjob.schema import init_sql

_SCHEMA = "bgjob_benchmark"

_SETTINGS = (
    "autovacuum",
    "fsync",
    "full_page_writes",
    "max_connections",
    "max_wal_size",
    "shared_buffers",
    "synchronous_commit",
    "wal_compression",
    "wal_level",
    "wal_sync_method",
)

_NO_GOALS: Mapping[str, Goal] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    dsn: str | None
    quick: bool
    check: bool
    rounds: int
    seed: int


@dataclass(frozen=True, slots=True)
class Bench:
    """A server, and a schema on it that is new for each run."""

    options: Options
    dsn: str
    """Connects with bgjob's tables in the search_path."""
    admin: psycopg.Connection[Any]
    schema: str

    def fresh(self, fill: Callable[[], object] | None = None) -> None:
        """Make new tables, fill them, and do the maintenance that follows from it."""
        self.admin.execute(f"drop schema if exists {self.schema} cascade")
        self.admin.execute(f"create schema {self.schema}")
        self.admin.execute(init_sql())
        if fill is not None:
            fill()
        self.settle()

    def settle(self) -> None:
        """Do the maintenance now that the server or this process would do during the run."""
        self.admin.execute("vacuum (analyze) bgjob_job")
        self.admin.execute("checkpoint")
        gc.collect()
        gc.freeze()  # as `bgjob worker` does after its imports

    def jobs(self) -> int:
        """Count the live jobs."""
        row = self.admin.execute("select count(*) from bgjob_job").fetchone()
        assert row is not None
        return int(row[0])

    @contextmanager
    def beside(self) -> Iterator["Bench"]:
        """Yield a second schema on the same server, for tables that stay as they are."""
        with bench_in(f"{self.schema}_beside", self.dsn, self.options) as bench:
            yield bench

    def compare(
        self,
        title: str,
        measured: Callable[[], Figures],
        floor: Callable[[], Figures],
        goals: Mapping[str, Goal] = _NO_GOALS,
    ) -> dict[str, object]:
        """Run both in turn, after a pair that does not count; summarise each figure."""
        runs: list[tuple[Figures, Figures]] = []
        for number in range(self.options.rounds + 1):
            pair = measured(), floor()
            if number:
                runs.append(pair)
            said = "  |  floor: ".join(map(_said, pair))
            say(f"{title}, {f'round {number}' if number else 'warm-up'}: {said}")
        return {
            name: figure(
                [m[name] for m, _ in runs], [f[name] for _, f in runs if name in f], goals.get(name)
            )
            for name in runs[0][0]
        }

    def repeat(self, title: str, measured: Callable[[], Figures]) -> dict[str, list[float]]:
        """Run a measurement without a floor; return the runs of each figure."""
        runs = []
        for number in range(1, self.options.rounds + 1):
            runs.append(measured())
            say(f"{title}, round {number}: {_said(runs[-1])}")
        return {name: [run[name] for run in runs] for name in runs[0]}


@contextmanager
def bench_in(schema: str, dsn: str, options: Options) -> Iterator[Bench]:
    """Yield a bench whose tables are in this schema; drop the schema at the end."""
    own = conninfo_to_dict(dsn).get("options") or ""
    dsn = make_conninfo(dsn, options=f"{own} -c search_path={schema}".strip())
    with psycopg.connect(dsn, autocommit=True) as admin:
        try:
            yield Bench(options, dsn, admin, schema)
        finally:
            admin.execute(f"drop schema if exists {schema} cascade")


def main(program: Callable[[Bench], Mapping[str, object]], description: str | None) -> None:
    """Run a benchmark from the command line, and print its results as JSON."""
    options = _parse(description)
    with _server(options) as dsn, bench_in(_SCHEMA, dsn, options) as bench:
        report = {
            "environment": environment(bench.admin),
            "quick": options.quick,
            "rounds": options.rounds,
            "seed": options.seed,
            **program(bench),
        }
    json.dump(report, sys.stdout, indent=2)
    print()
    missed = list(far_off(report)) if options.check else []
    if missed:
        sys.exit(f"less than half of the goal is reached by: {', '.join(missed)}")


def say(text: str) -> None:
    """Print progress to stderr, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def environment(admin: psycopg.Connection[Any]) -> dict[str, object]:
    """Return the versions and settings on which the figures depend."""
    return {
        "bgjob": _bgjob_version(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "psycopg": f"{psycopg.__version__} ({pq.__impl__})",
        "server": admin.info.parameter_status("server_version"),
        "cores": os.cpu_count(),
        "settings": dict(
            admin.execute(
                "select name, current_setting(name) from pg_settings where name = any (%s)",
                [list(_SETTINGS)],
            ).fetchall()
        ),
    }


def _parse(description: str | None) -> Options:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dsn", help="a superuser's; by default an embedded server is started")
    parser.add_argument("--quick", action="store_true", help="fewer jobs; for a first look")
    parser.add_argument("--check", action="store_true", help="fail under half of a goal")
    parser.add_argument("--rounds", type=int, default=5, help="of runs; 5 by default")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers; 1 by default")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    return Options(given.dsn, given.quick, given.check, given.rounds, given.seed)


@contextmanager
def _server(options: Options) -> Iterator[str]:
    if options.dsn is not None:
        yield options.dsn
        return
    # PostgreSQL's default of 100 is too few for a hundred workers.
    with EmbeddedServer(settings={"max_connections": "200"}) as server:
        yield server.dsn


def _bgjob_version() -> str:
    try:
        return version("bgjob")
    except PackageNotFoundError:  # run from a source checkout that is not installed
        text = Path(__file__).parent.parent.joinpath("pyproject.toml").read_text("utf-8")
        return str(tomllib.loads(text)["project"]["version"])


def _said(figures: Figures) -> str:
    return ", ".join(f"{value:,.3f} {name}" for name, value in figures.items())
