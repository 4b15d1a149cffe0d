"""Compare two checkouts: run their programs in turn, on one server, with one interpreter."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psycopg
from figures import figure
from harness import environment, say

from bgjob.ext.embedded import EmbeddedServer

_PROGRAMS = "costs,drain,bulk,single,pickup,horizon,memory"


def main() -> None:
    """Run each program of both trees in turn; compare the second's figures with the first's."""
    given = _parse()
    # For use without a DSN: by default of this interpreter's package.
    server = EmbeddedServer(bin_dir=given.bin_dir, settings={"max_connections": "200"})
    with nullcontext(given) if given.dsn else server as at:
        with psycopg.connect(at.dsn, autocommit=True) as admin:
            report: dict[str, object] = {"environment": environment(admin), "rounds": given.rounds}
        for program in given.only.split(","):
            report[program] = _compare(program, given, at.dsn)
    json.dump(report, sys.stdout, indent=2)
    print()


def _compare(program: str, given: argparse.Namespace, dsn: str) -> dict[str, object]:
    first, second = given.trees
    runs: dict[Path, list[dict[str, float]]] = {first: [], second: []}
    for number in range(given.rounds):
        # They take turns at the begin: the second one may find a warmer machine.
        for tree in given.trees if number % 2 == 0 else given.trees[::-1]:
            runs[tree].append(_run(tree, program, dsn, quick=given.quick))
            say(f"{program}, round {number + 1}, {tree}: {json.dumps(runs[tree][-1])}")
    return {
        name: figure([run[name] for run in runs[second]], [run[name] for run in runs[first]])
        for name in runs[first][0]
        if name in runs[second][0]
    }


def _run(tree: Path, program: str, dsn: str, *, quick: bool) -> dict[str, float]:
    """Run a tree's program with its own library; return each figure's median and ratio."""
    ended = subprocess.run(
        [
            sys.executable,
            str(tree / "benchmarks" / f"{program}.py"),
            f"--dsn={dsn}",
            "--rounds=1",
            *(["--quick"] if quick else []),
        ],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(tree)},
    )
    return dict(_figures(json.loads(ended.stdout), ""))


def _figures(part: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    """Yield the figures of a program's report, each with its path."""
    if "measured" in part:
        yield path, part["measured"]["median"]
        if "ratio" in part:
            yield f"{path}, ratio to its floor", part["ratio"]
        return
    for name, below in part.items():
        if isinstance(below, Mapping):
            yield from _figures(below, f"{path}.{name}".strip("."))


def _tree(path: str) -> Path:
    tree = Path(path).resolve()
    if not (tree / "benchmarks" / "harness.py").exists():
        raise argparse.ArgumentTypeError(f"{path} is not a checkout of bgjob")
    return tree


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", type=_tree, nargs=2, metavar="TREE", help="before, and after")
    parser.add_argument("--only", default=_PROGRAMS, help=f"by default {_PROGRAMS}")
    parser.add_argument("--quick", action="store_true", help="fewer jobs; for a first look")
    parser.add_argument("--rounds", type=int, default=5, help="of pairs; 5 by default")
    at = parser.add_mutually_exclusive_group()
    at.add_argument("--dsn", help="a superuser's; by default an embedded server is started")
    at.add_argument("--bin-dir", type=Path, help="of another PostgreSQL, for that server")
    return parser.parse_args()


if __name__ == "__main__":
    main()
