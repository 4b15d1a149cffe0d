"""Figures: the summary of their runs, and their goals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal

Figures = Mapping[str, float]
"""The results of one run, by name; the names end in the unit."""

Of = Literal["median", "ratio", "difference"]
"""The median of the runs; its ratio to the median of the floor; or their difference."""


@dataclass(frozen=True, slots=True)
class Goal:
    """The bound that a figure should reach."""

    of: Of
    bound: Literal["at least", "at most"]
    value: float

    def reached(self, got: float, *, slack: float = 1.0) -> bool:
        """Whether `got` reaches the goal, or the goal made easier by the factor `slack`."""
        if self.bound == "at least":
            return got >= self.value / slack
        return got <= self.value * slack


def at_least(value: float, of: Of = "ratio") -> Goal:
    """Make a goal of `value` or more."""
    return Goal(of, "at least", value)


def at_most(value: float, of: Of = "ratio") -> Goal:
    """Make a goal of `value` or less."""
    return Goal(of, "at most", value)


def figure(
    measured: Sequence[float], floor: Sequence[float] = (), goal: Goal | None = None
) -> dict[str, object]:
    """Summarise the runs of one figure, with those of its floor, and its goal."""
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
    """Return the smallest value that this share of the values does not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def far_off(report: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of the figures that miss even half of their goal."""
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
