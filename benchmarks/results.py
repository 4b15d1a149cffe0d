"""RESULTS.md, from the output of the programs."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any

WORK = {
    "drain": "drain no-op jobs, one process",
    "processes": "drain no-op jobs, two processes",
    "bulk": "bulk enqueue",
    "single": "enqueue one by one",
    "meeting": "enqueues of 64 tasks, and of 16 threads",
    "costs": "processor time of a job",
    "pickup": "idle pick-up",
    "loaded": "pick-up at 5,000 jobs/s",
    "horizon": "drain under a pinned snapshot",
    "crowd": "drain a crowded table",
    "batches": "transactional jobs, 500 in a call",
    "transactional": "transactional jobs, one by one",
    "exclusive": "jobs beside 20,000 that wait for a key, and jobs of 100 keys",
    "limits": "limits over all workers",
    "queues": "100 of 10,000 queues watched",
    "fleet": "2,000 idle workers",
    "shares": "a busy queue shared by 2 and by 100 workers",
    "producers": "8 producers beside a worker",
    "notifications": "notifications at a steady rate",
    "overview": "overview of 1,000,000 jobs",
    "page": "pages of `bgjob web` over 1,000,000 jobs",
    "minutes": "counts of minutes, and jobs that are kept",
    "preflight": "preflight of 1,000,000 jobs",
    "triage": "triage of 1,000,000 dead jobs",
    "wal": "write-ahead log, enqueue to settled",
    "memory": "memory of a worker",
    "failures": "memory in a burst of failures",
    "startup": "import and start",
    "peers": "against the fastest other system on PostgreSQL",
    "hours": "1,000 jobs/s for hours, a snapshot pinned for half of them",
}
"""What each program does, in the order of the rows."""


def text(reports: Mapping[str, Any], drawn: Sequence[str], day: date) -> str:
    """Return the page: environment, one table of all figures, the other systems."""
    lines = ["# Results", "", *_environment(reports, day), ""]
    if "results.svg" in drawn:
        about = "Drain throughput, pick-up latency and drain under a pinned snapshot"
        lines += [f"![{about}](results.svg)", ""]
    lines += [
        "Each figure is the median of its runs. The ratio is that of the medians; its spread goes",
        "from the smallest to the largest of the pairs, or of the runs where there is no floor.",
        "",
        "| work | figure | goal | measured | floor | ratio | spread | reached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    of_all = {program: report for program, report in reports.items() if program != "hours"}
    for program, report in of_all.items():
        for path, figure in _figures(report):
            lines.append(f"| {WORK[program]} | {_row(path, figure)} |")
    lines += _floors(of_all)
    if "peers" in reports:
        lines += _peers(reports["peers"])
    if "hours" in reports:
        lines += _hours(reports["hours"])
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Return a number with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _environment(reports: Mapping[str, Any], day: date) -> Iterator[str]:
    first = next(iter(reports.values()))
    said = first["environment"]
    yield (
        f"{day}. bgjob {said['bgjob']}, {said['python']}, psycopg"
        f" {said['psycopg']}, PostgreSQL {said['server']}, {said['cores']} cores,"
        f" seed {first['seed']}. {_rounds(reports)}"
    )
    yield ""
    yield ", ".join(f"`{name}={value}`" for name, value in said["settings"].items())


def _rounds(reports: Mapping[str, Any]) -> str:
    """Return how many rounds each program ran, and which ran with `--quick`."""
    runs: dict[str, list[str]] = {}
    for program, report in reports.items():
        count = "1 round" if report["rounds"] == 1 else f"{report['rounds']} rounds"
        runs.setdefault(count + (" of `--quick`" if report["quick"] else ""), []).append(program)
    return "; ".join(f"{count}: {', '.join(programs)}" for count, programs in runs.items()) + "."


def _figures(report: Mapping[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the figures of a report in order, without the systems, which have another table."""
    for name, part in report.items():
        if isinstance(part, dict) and name not in ("systems", "samples"):
            if "measured" in part:
                yield (*path, name), part
            else:
                yield from _figures(part, *path, name)


def _row(path: tuple[str, ...], figure: Mapping[str, Any]) -> str:
    measured = figure["measured"]
    ratios = figure.get("ratio_of_pairs")
    spread = (min(ratios), max(ratios)) if ratios else (measured["min"], measured["max"])
    return " | ".join(
        (
            ": ".join(filter(None, (" ".join(path[:-1]), path[-1]))).replace("_", " "),
            _goal(figure),
            number(measured["median"]),
            number(figure["floor"]["median"]) if "floor" in figure else "",
            number(figure["ratio"]) if "ratio" in figure else "",
            f"{number(spread[0])} to {number(spread[1])}",
            {True: "yes", False: "**no**", None: ""}[figure.get("reached")],
        )
    )


def _goal(figure: Mapping[str, Any]) -> str:
    if "goal" not in figure:
        return "stated"
    goal = figure["goal"]
    of = {"ratio": " × the floor", "difference": " more than the floor", "median": ""}[goal["of"]]
    return f"{goal['bound']} {goal['value']:g}{of}"


def _floors(reports: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "The floors:", "")
    for program, report in reports.items():
        floors = [report, *(part for part in report.values() if isinstance(part, dict))]
        for floor in (part["floor"] for part in floors if isinstance(part.get("floor"), str)):
            yield f"- {WORK[program]}: {floor}"


_FIGURES = (
    "drain_jobs_per_s",
    "enqueue_jobs_per_s",
    "made_jobs_per_s",
    "p50_ms",
    "p99_ms",
    "keyed_jobs_per_s",
)


def _peers(report: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        "## Other systems",
        "",
        "In turns, each in a new database. The drain is of one process, from the start of its",
        "worker until the store says that the last job is done. Pick-up is from the return of an",
        "enqueue in one process to the start of the handler in another. The second rate of the bulk",
        "enqueue includes the making of the jobs. Of jobs with one of 100 keys, one of each key runs at",
        "a time; the systems without a figure have no such keys. No other system has a handler of many",
        "jobs in the edition that is free.",
        "",
        "| system | drain, jobs/s | bulk enqueue, jobs/s | with the making | pick-up p50, ms | p99, ms"
        " | drain with keys, jobs/s | pinned snapshot, first and last round, jobs/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    systems: Mapping[str, Any] = report["systems"]
    for name, system in systems.items():
        curve = system.get("pinned", {}).get("jobs_per_s_by_round", ())
        medians = (
            number(system[figure]["measured"]["median"]) if figure in system else ""
            for figure in _FIGURES
        )
        pinned = f"{number(curve[0])}, {number(curve[-1])} (round {len(curve)})" if curve else ""
        yield f"| {' | '.join((name, *medians, pinned))} |"
    yield ""
    for name, system in systems.items():
        versions = ", ".join(f"{package} {v}" for package, v in system["versions"].items())
        settings = ", ".join(f"{setting}: {value}" for setting, value in system["settings"].items())
        yield (
            f"- **{name}**: Python {system['python']}, {versions}; {settings}."
            f" {number(system['jobs'])} jobs a run."
        )
    for name, reason in report["left_out"].items():
        yield f"- **{name}** was left out: {reason}."


def _hours(report: Mapping[str, Any]) -> Iterator[str]:
    said, samples = report["environment"], report["samples"]
    begin, end = report["pinned_minutes"]
    yield from (
        "",
        "## Hours",
        "",
        "![Waits, dead rows and table sizes over hours, a snapshot pinned for half of them](hours.svg)",
        "",
        f"{report['day']}. {report['hours']:g} hours at {report['jobs_per_s']:,} jobs/s of each system,"
        f" side by side on one PostgreSQL {said['server']} with its default settings, {said['cores']}"
        f" cores. A snapshot was pinned from minute {begin:g} to {end:g}. A system leaves the run once"
        " half of its jobs wait for over two minutes.",
        "",
    )
    until = report["compared_minutes"]
    for name, of in samples.items():
        left = of[-1]["minute"]
        yield f"- **{name}**: {of[-1]['enqueued']:,} jobs" + (
            f". It left in minute {left:.0f}." if left < report["hours"] * 60 - 1 else "."
        )
    yield from (
        "",
        f"While the snapshot is pinned, what is compared ends with minute {until:.0f}.",
        "",
        "| figure | bgjob | the other | ratio |",
        "| --- | --- | --- | --- |",
    )
    for path, figure in _figures(report):
        other = number(figure["floor"]["median"]) if "floor" in figure else ""
        ratio = number(figure["ratio"]) if "ratio" in figure else ""
        measured = number(figure["measured"]["median"])
        yield f"| {path[-1].replace('_', ' ')} | {measured} | {other} | {ratio} |"
