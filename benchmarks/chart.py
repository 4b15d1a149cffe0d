"""The charts: all systems beside each other, and two of them over hours."""

# mypy: disable-error-code="import-not-found"
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from results import number

_OURS, _FLOOR, _OTHERS = "#1f6feb", "#8c959f", "#d4a72c"
_CYCLE = "#d4a72c", "#1a7f37", "#cf222e", "#8250df", "#57606a"
_SIZE = 13.0, 4.2  # inches


def draw(reports: Mapping[str, Any], folder: Path) -> Sequence[str]:
    """Draw as PNG and SVG what peers.py and hours.py measured; return the files' names."""
    drawn: list[str] = []
    if "peers" in reports:
        parts = _throughput, _latency, _horizon
        drawn += _save(folder / "results", _SIZE, reports, parts)
    if "hours" in reports:
        drawn += _save(folder / "hours", _SIZE, reports["hours"], (_waits, _dead_rows, _sizes))
    return drawn


def _save(
    path: Path,
    size: tuple[float, float],
    report: Mapping[str, Any],
    parts: Sequence[Callable[[Any, Mapping[str, Any]], None]],
) -> Sequence[str]:
    """Draw the parts side by side."""
    # Imported here, because the table can be written without it.
    import matplotlib as mpl

    mpl.use("Agg")
    # The same results give the same file.
    mpl.rcParams["svg.hashsalt"] = "bgjob"
    mpl.rcParams["font.size"] = 9
    from matplotlib import pyplot as plt

    figure, row = plt.subplots(1, len(parts), figsize=size, facecolor="white", layout="constrained")
    for axes, part in zip(row, parts, strict=True):
        part(axes, report)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, axis="x" if part in (_throughput, _latency) else "both", alpha=0.25)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(lambda value, _: f"{value:,g}")
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return f"{path.name}.png", f"{path.name}.svg"


def _throughput(axes: Any, reports: Mapping[str, Any]) -> None:
    rates = {
        name: system["drain_jobs_per_s"]["measured"]["median"]
        for name, system in reports["peers"]["systems"].items()
    }
    rates = dict(sorted(rates.items(), key=itemgetter(1), reverse=True))
    if "drain" in reports:
        floor = reports["drain"]["threads"]["jobs_per_s"]["floor"]["median"]
        rates = {"bare psycopg": floor} | rates
    names = list(rates)
    axes.barh(names, rates.values(), color=[_color(name) for name in names])
    for row, rate in enumerate(rates.values()):
        axes.annotate(number(rate), (rate, row), (3, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(100, max(rates.values()) * 6)
    axes.set_title("No-op jobs drained by one process")
    axes.set_xlabel("jobs/s (logarithmic)")


def _latency(axes: Any, reports: Mapping[str, Any]) -> None:
    waits = {
        name: (system["p50_ms"]["measured"]["median"], system["p99_ms"]["measured"]["median"])
        for name, system in reports["peers"]["systems"].items()
    }
    waits = dict(sorted(waits.items(), key=itemgetter(1)))
    if "pickup" in reports:
        floor = reports["pickup"]["threads"]
        waits = {
            "bare LISTEN loop": (
                floor["p50_ms"]["floor"]["median"],
                floor["p99_ms"]["floor"]["median"],
            )
        } | waits
    names = list(waits)
    rows = range(len(names))
    colors = [_color(name) for name in names]
    for part, (label, height) in enumerate((("p50", -0.2), ("p99", 0.2))):
        values = [wait[part] for wait in waits.values()]
        axes.barh(
            [row + height for row in rows], values, 0.38, color=colors, alpha=(1.0, 0.45)[part]
        )
        for row, value in zip(rows, values, strict=True):
            axes.annotate(
                f"{label} {number(value)}",
                (value, row + height),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axes.set_yticks(list(rows), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.1, max(wait[1] for wait in waits.values()) * 5)
    axes.set_title("Idle pick-up, from enqueue to handler")
    axes.set_xlabel("ms (logarithmic)")


def _horizon(axes: Any, reports: Mapping[str, Any]) -> None:
    axes.set_prop_cycle(color=_CYCLE)
    for name, system in reports["peers"]["systems"].items():
        if "pinned" in system:
            _curve(axes, name, system["pinned"]["round"], system["pinned"]["jobs_per_s_by_round"])
    if "horizon" in reports:
        long = reports["horizon"]
        _curve(axes, "bgjob, a longer run", long["jobs"] // 10, long["jobs_per_s_by_tenth"][0])
        bare = long["without_watermark"]["jobs_per_s_by_round"]
        _curve(axes, "bare psycopg, no watermark", long["round"], bare)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title("Drain under a pinned snapshot")
    axes.set_xlabel("thousands of jobs so far (logarithmic)")
    axes.set_ylabel("jobs/s of the round (logarithmic)")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _curve(axes: Any, name: str, size: int, rates: Sequence[float]) -> None:
    """Draw one curve; the other systems take their colours from the cycle."""
    own: dict[str, Any] = {}
    if name == "bgjob":
        own = {"color": _OURS, "linewidth": 2.5}
    elif name.startswith("bgjob"):
        own = {"color": _OURS, "linestyle": ":"}
    elif name.startswith("bare"):
        own = {"color": _FLOOR, "linestyle": "--"}
    thousands = [size * (row + 1) / 1000 for row in range(len(rates))]
    axes.plot(thousands, rates, marker="o", markersize=3, label=name, **own)


def _waits(axes: Any, report: Mapping[str, Any]) -> None:
    _over_time(axes, report, {"p50_ms": "-", "p99_ms": ":"})
    axes.set_yscale("log")
    axes.set_title("From the call of an enqueue to its handler")
    axes.set_ylabel("ms (logarithmic); p50, and p99 dotted")
    axes.figure.legend(loc="outside lower center", ncols=9, frameon=False)  # of all three


def _dead_rows(axes: Any, report: Mapping[str, Any]) -> None:
    _over_time(axes, report, {"dead_rows": "-"})
    axes.set_title("Dead rows")
    axes.set_ylabel("millions")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")


def _sizes(axes: Any, report: Mapping[str, Any]) -> None:
    _over_time(axes, report, {"table_mb": "-", "index_mb": ":"})
    axes.set_title("Tables, and indexes dotted")
    axes.set_ylabel("MB")


def _over_time(axes: Any, report: Mapping[str, Any], lines: Mapping[str, str]) -> None:
    """Draw these figures of all systems; what is behind them is shaded while a snapshot was held."""
    axes.axvspan(*report["pinned_minutes"], color=_FLOOR, alpha=0.15, label="a snapshot is pinned")
    last = max(samples[-1]["minute"] for samples in report["samples"].values())
    for color, (name, samples) in zip((_OURS, *_CYCLE), report["samples"].items(), strict=False):
        left = samples[-1]["minute"]
        label = name if left == last else f"{name}, which left in minute {left:.0f}"
        for figure, style in lines.items():
            seen = [sample for sample in samples if figure in sample]
            axes.plot(
                [sample["minute"] for sample in seen],
                [sample[figure] for sample in seen],
                style,
                color=color,
                label=label if style == "-" else None,
            )
    axes.set_xlabel("minutes")


def _color(name: str) -> str:
    if name == "bgjob":
        return _OURS
    return _FLOOR if name.startswith("bare") else _OTHERS
