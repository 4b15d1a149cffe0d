"""Run every benchmark, keep its output, and write RESULTS.md and the chart."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import chart
import results

_HERE = Path(__file__).parent


def main() -> None:
    """Run the programs one after the other; report at the end which of them failed."""
    given = _parse()
    failed = []
    if given.kept is None:
        given.out.mkdir(parents=True, exist_ok=True)
        for name in given.only or (name for name in results.WORK if name != "hours"):
            print(f"{name}.py", file=sys.stderr, flush=True)
            ended = subprocess.run(
                [sys.executable, str(_HERE / f"{name}.py"), *_options(given, name)],
                check=False,
                stdout=subprocess.PIPE,
            )
            if ended.returncode:
                failed.append(name)
            if ended.stdout:  # also where only --check failed
                (given.out / f"{name}.json").write_bytes(ended.stdout)
    kept = _kept(given.kept or given.out)
    if not kept:
        sys.exit("there are no results")
    reports = {name: json.loads(path.read_text()) for name, path in kept.items()}
    day = date.fromtimestamp(max(path.stat().st_mtime for path in kept.values()))
    given.to.mkdir(parents=True, exist_ok=True)
    drawn = chart.draw(reports, given.to)
    (given.to / "RESULTS.md").write_text(results.text(reports, drawn, day), "utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _options(given: argparse.Namespace, name: str) -> Iterator[str]:
    """Yield the options of a program."""
    yield f"--rounds={given.rounds}"
    yield f"--seed={given.seed}"
    if given.quick:
        yield "--quick"
    if given.check:
        yield "--check"
    if given.dsn is not None:
        yield f"--dsn={given.dsn}"
    if name in ("peers", "hours"):
        for option in ("cache", "python", "peers"):
            if getattr(given, option) is not None:
                yield f"--{option}={getattr(given, option)}"


def _kept(folder: Path) -> dict[str, Path]:
    paths = {name: folder / f"{name}.json" for name in results.WORK}
    return {name: path for name, path in paths.items() if path.exists()}


def _programs(names: str) -> Sequence[str]:
    programs = names.split(",")
    if unknown := set(programs) - set(results.WORK):
        raise argparse.ArgumentTypeError(f"not among {', '.join(results.WORK)}: {unknown}")
    return programs


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=_programs, help="these programs, separated by commas")
    parser.add_argument("--out", type=Path, default=_HERE / ".results", help="folder for the JSON")
    parser.add_argument(
        "--from", dest="kept", type=Path, help="run nothing; use the JSON of this folder"
    )
    parser.add_argument("--to", type=Path, default=_HERE, help="for RESULTS.md and the chart")
    parser.add_argument("--quick", action="store_true", help="fewer jobs; for a first look")
    parser.add_argument("--check", action="store_true", help="fail under half of a goal")
    parser.add_argument("--rounds", type=int, default=5, help="of runs; 5 by default")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers; 1 by default")
    parser.add_argument("--dsn", help="a superuser's; by default embedded servers are started")
    parser.add_argument("--cache", help="folder of the peers' environments")
    parser.add_argument("--python", help="interpreter of the peers")
    parser.add_argument("--peers", help="these peers, separated by commas")
    return parser.parse_args()


if __name__ == "__main__":
    main()
