"""The templates, and what they may call."""

import re
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bgjob import _words
from bgjob.ext.web import drawing
from bgjob.ext.web.parts import Trouble

_LONGEST = 200
"""The most characters of an error in a list, and of a name anywhere."""

_KEPT = frozenset("\n\t")
"""Control characters that a text may have."""

_COMMAND = re.compile(
    r"(bgjob|select|rollback|alter|create|grant|reindex|vacuum|analyze) [^;]*$", re.DOTALL
)
"""A remedy that can be typed as it is; the others are sentences."""

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))

_COARSE = 600
"""Seconds from which an age is not given to the second."""


def environment() -> Environment:
    """Return the templates of the page.

    Every value is escaped, whatever its type: first the characters that are not printable, such as
    those that turn the direction of a text, then those of HTML. A name that a template does not get
    is an error.
    """
    templates = Environment(
        loader=PackageLoader("bgjob.ext.web"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    templates.filters.update(
        number=_number,
        line=_line,
        utc=_utc,
        iso=_iso,
        since=_since,
        count=_words.count,
        size=_words.size,
    )
    templates.tests.update(
        trouble=lambda value: isinstance(value, Trouble),
        command=lambda text: _COMMAND.match(text) is not None,
    )
    templates.globals.update(
        sparkline=drawing.sparkline, bar=drawing.bar, chart=drawing.chart, key=drawing.key
    )
    return templates


def _visible(value: object) -> object:
    """Return a value with escapes in place of control characters, but for line ends and tabs."""
    if isinstance(value, Markup) or not isinstance(value, str) or value.isprintable():
        return value
    return "".join(c if c in _KEPT else _words.printable(c) for c in value)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _line(text: str, most: int = _LONGEST) -> str:
    """Return a name or the first words of an error as one line, cut."""
    shown = _words.printable(text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _utc(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _iso(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _since(at: datetime, now: datetime) -> str:
    """Return the time between two moments in its two largest units; `lasting` of app.js."""
    whole = int(abs((now - at).total_seconds()))
    for n, (name, size) in enumerate(_UNITS):
        if whole >= size:
            text = f"{whole // size} {name}"
            if size == 1 or (size == 60 and whole >= _COARSE):  # noqa: PLR2004 (a minute)
                return text
            below, size_below = _UNITS[n + 1]
            rest = whole % size // size_below
            return f"{text} {rest} {below}" if rest else text
    return "0 s"
