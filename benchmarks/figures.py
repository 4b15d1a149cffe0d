"""Figures: how their runs are summarised, and which goals they are to reach."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal

Figures = Mapping[str, float]
"""What one run measured, by name; the names carry the unit."""

Of = Literal["median", "ratio", "difference"]
"""The median of the runs; its ratio to the floor's; how much more than the floor's it is."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure is to reach."""

    of: Of
    bound: Literal["at least", "at most"]
    value: float

    def reached(self, got: float, *, slack: float = 1.0) -> bool:
        """Tell whether `got` reaches the goal, or the goal made easier by the factor `slack`."""
        if self.bound == "at least":
            return got >= self.value / slack
        return got <= self.value * slack


def at_least(value: float, of: Of = "ratio") -> Goal:
    """Make a goal that more than `value` reaches as well."""
    return Goal(of, "at least", value)


def at_most(value: float, of: Of = "ratio") -> Goal:
    """Make a goal that less than `value` reaches as well."""
    return Goal(of, "at most", value)


def figure(
    measured: Sequence[float], floor: Sequence[float] = (), goal: Goal | None = None
) -> dict[str, object]:
    """Summarise the runs of one figure, beside those of its floor and its goal."""
    got = {"median": median(measured)}
    summary: dict[str, object] = {"measured": _spread(measured)}
    if floor:
        got["ratio"] = median(measured) / median(floor)
        got["difference"] = median(measured) - median(floor)
        summary |= {
            "floor": _spread(floor),
            "ratio": round(got["ratio"], 4),
            "ratio_of_pairs": [round(m / f, 4) for m, f in zip(measured, floor, strict=True)],
        }
    if goal is not None:
        if goal.of == "difference":
            summary["difference"] = round(got["difference"], 3)
        summary |= {
            "goal": asdict(goal),
            "reached": goal.reached(got[goal.of]),
            "half_reached": goal.reached(got[goal.of], slack=2),
        }
    return summary


def percentile(values: Sequence[float], share: float) -> float:
    """Give the smallest value that this share of the values does not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def far_off(report: Mapping[str, object]) -> Iterator[str]:
    """Name the figures that miss even half of their goal."""
    for name, part in report.items():
        if isinstance(part, Mapping):
            if part.get("half_reached") is False:
                yield name
            yield from (f"{name}.{below}" for below in far_off(part))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        name: round(statistic(values), 3)
        for name, statistic in (("median", median), ("min", min), ("max", max))
    }
