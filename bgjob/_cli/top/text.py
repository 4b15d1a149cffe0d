"""Styled texts that fit into a number of columns."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from unicodedata import combining, east_asian_width

_BARS = "▁▂▃▄▅▆▇█"


class Style(Enum):
    """How a text looks: the numbers of the terminal's control sequence."""

    PLAIN = ""
    BOLD = "1"
    DIM = "2"
    GOOD = "32"
    WARN = "33"
    BAD = "1;31"
    TITLES = "7"


@dataclass(frozen=True, slots=True)
class Text:
    """A text in one style, without control characters."""

    text: str
    style: Style = Style.PLAIN


Line = Sequence[Text]


def width_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Cut or fill a text, so that it takes this many columns."""
    if width_of(text) > width:
        while text and width_of(text) >= width:
            text = text[:-1]
        text += "…" if width else ""
    room = " " * (width - width_of(text))
    return room + text if right else text + room


def cut(line: Line, width: int | None) -> Line:
    """Cut a line that takes more columns."""
    if width is None:
        return line
    kept: list[Text] = []
    for part in line:
        room = width - sum(width_of(p.text) for p in kept)
        if width_of(part.text) > room:
            return [*kept, Text(fit(part.text, room), part.style)]
        kept.append(part)
    return kept


def wrapped(text: str, width: int | None) -> list[str]:
    """Break a text into lines."""
    return textwrap.wrap(text, max(width, 1)) if width is not None else [text]


def bars(values: Sequence[float]) -> str:
    """Return a bar for each value, relative to the largest; none for 0."""
    largest = max(values, default=0)
    return "".join(
        _BARS[round(value / largest * (len(_BARS) - 1))] if value > 0 else " " for value in values
    )


def render(line: Line, *, is_coloured: bool) -> str:
    """Return a line with the control sequences of its styles, or without."""
    return "".join(
        f"\x1b[{part.style.value}m{part.text}\x1b[0m"
        if is_coloured and part.style is not Style.PLAIN
        else part.text
        for part in line
    ).rstrip()
