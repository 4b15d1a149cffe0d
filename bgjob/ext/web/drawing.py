"""Sparklines, bars and charts as SVG.

Only attributes and the classes of app.css: the page's policy allows no inline style. Each drawing
is an image with a label, which says in words what it shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from markupsafe import Markup

from bgjob import _words

_SPARK = (120, 24)
_BAR = (96, 8)
_CHART = (720, 150)
_FOOT = 18
"""The height of the times below a chart."""

_HEAD = 14
"""The height of the text above it."""

_MANY = 0.95
"""The part of the slots from which a bar is drawn as full."""


_CLASSES = ("done", "again", "died")
"""The classes of the outcomes, from the bottom of a bar to its top."""

_WORDS = ("completed", "retried", "dead")

Steps: TypeAlias = Sequence[Sequence[int]]
"""For each outcome the numbers of jobs in each step, the oldest first."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where bars are drawn: the least y is at the top."""

    width: float
    top: float
    bottom: float
    most: int

    def bars(self, steps: Steps, classes: Sequence[str]) -> Markup:
        """Return a path for each outcome, with the bars of all steps."""
        each = self.width / max(len(steps[0]), 1)
        gap = 1 if each >= 4 else 0  # noqa: PLR2004 (thinner bars are drawn without gaps)
        bases = [self.bottom] * len(steps[0])
        drawn = []
        for numbers, class_ in zip(steps, classes, strict=True):
            path = ""
            for n, number in enumerate(numbers):
                if number:
                    base, bases[n] = bases[n], bases[n] - self._height(number)
                    path += (
                        f"M{n * each:.4g} {base:.4g}V{bases[n]:.4g}h{each - gap:.4g}V{base:.4g}z"
                    )
            if path:
                drawn.append(Markup('<path class="{}" d="{}"/>').format(class_, path))
        return Markup("").join(drawn)

    def _height(self, number: int) -> float:
        """Return the height of a number of jobs; a single one can be seen."""
        return max(number / self.most * (self.bottom - self.top), 1.0)


def sparkline(numbers: Sequence[int], *, name: str, each: str, class_: str = "done") -> Markup:
    """Return small bars, without axes.

    Args:
        numbers: the numbers of jobs, the oldest first.
        name: what they are, for the label.
        each: the time of a bar, such as "a minute".
        class_: their class in the style sheet.

    """
    width, height = _SPARK
    most = max(numbers, default=0)
    frame = _Frame(width, 1, height, max(most, 1))
    label = f"{name}: {sum(numbers):,}, at most {most:,} {each}"
    return _image(
        width,
        height,
        label,
        _rule(0, height - 0.5, width),
        frame.bars([numbers], [class_]),
    )


def bar(used: int, slots: int, *, name: str) -> Markup:
    """Return a bar of the slots that are in use."""
    width, height = _BAR
    part = min(used / slots, 1.0) if slots else 0.0
    fill = Markup('<rect class="{}" width="{}" height="{}" rx="2"/>').format(
        "full" if part >= _MANY else "busy", f"{part * width:.4g}", height
    )
    track = Markup('<rect class="track" width="{}" height="{}" rx="2"/>').format(width, height)
    return _image(width, height, f"{name}: {used:,} of {slots:,} slots are busy", track, fill)


def key(outcome: int) -> Markup:
    """Return the square of an outcome in a chart's key: 0 completed, 1 retried, 2 dead."""
    return Markup(
        '<svg width="10" height="10" aria-hidden="true">'
        '<rect class="{}" width="10" height="10" rx="2"/></svg>'
    ).format(_CLASSES[outcome])


def chart(steps: Steps, *, name: str, since: datetime, seconds: int) -> Markup:
    """Return stacked bars of completed, retried and dead jobs.

    The largest number and the times are beside them.

    Args:
        steps: the completed, the retried and the dead jobs of each step.
        name: what they belong to, for the label.
        since: the start of the first step.
        seconds: the length of a step.

    """
    width, height = _CHART
    most = max(map(sum, zip(*steps, strict=True)), default=0)
    foot = height - _FOOT
    frame = _Frame(width, _HEAD, foot, max(most, 1))
    every = "a minute" if seconds == 60 else f"in {seconds // 60} min"  # noqa: PLR2004
    start = since.astimezone(UTC)
    until = start + timedelta(seconds=seconds * len(steps[0]))
    days = until - start >= timedelta(days=1)
    sums = ", ".join(f"{sum(n):,} {word}" for n, word in zip(steps, _WORDS, strict=True))
    return _image(
        width,
        height,
        f"{name}, {start:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC: {sums}, "
        f"at most {most:,} {every}",
        _rule(0, _HEAD, width),
        _rule(0, (_HEAD + foot) / 2, width),
        _rule(0, foot, width),
        frame.bars(steps, _CLASSES),
        _text(0, _HEAD - 4, "start", f"{most:,} {every}"),
        _text(0, height - 4, "start", _moment(start, days=days)),
        _text(width / 2, height - 4, "middle", _moment(start + (until - start) / 2, days=days)),
        _text(width, height - 4, "end", _moment(until, days=days) + " UTC"),
    )


def _moment(at: datetime, *, days: bool) -> str:
    return f"{at:%b %d %H:%M}" if days else f"{at:%H:%M}"


def _rule(x: float, y: float, width: float) -> Markup:
    return Markup('<path class="rule" d="M{} {}h{}"/>').format(x, f"{y:.4g}", width)


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
        f"{x:.4g}", f"{y:.4g}", anchor, text
    )


def _image(width: int, height: int, label: str, *parts: Markup) -> Markup:
    return Markup(
        '<svg role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">{}</svg>'
    ).format(_words.printable(label), width, height, width, height, Markup("").join(parts))
