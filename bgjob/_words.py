"""Words for people: durations, sizes, quoted names."""

import re

_FEW = 10
"""Seconds below which tenths are told."""
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_KB, _MB, _GB = 1e3, 1e6, 1e9


def lasting(seconds: float) -> str:
    """Return a duration in its two largest units, such as '10 min 20 s'."""
    if seconds < _FEW:
        return f"{max(seconds, 0):.1f} s"
    whole = int(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    for unit, name, below, name_below in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "min"),
        (_MINUTE, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // below
            return f"{whole // unit:,} {name}" + (f" {rest} {name_below}" if rest else "")
    raise AssertionError(seconds)


def size(number: int) -> str:
    """Return a number of bytes, such as '635 MB'."""
    for unit, name in ((_GB, "GB"), (_MB, "MB"), (_KB, "kB")):
        if number >= unit:
            value = number / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:,.0f} {name}"  # noqa: PLR2004
    return f"{number} bytes"


def count(number: int, noun: str) -> str:
    """Return a number and a noun, such as '1 job' or '2 jobs'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def literal(text: str) -> str:
    """Return a text as a literal of SQL."""
    quoted = text.replace("'", "''")
    return f"E'{quoted}'".replace("\\", "\\\\") if "\\" in text else f"'{quoted}'"


def identifier(name: str) -> str:
    """Return a name as an identifier of SQL."""
    if re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        return name
    quoted = name.replace('"', '""')
    return f'"{quoted}"'


def one_line(text: str) -> str:
    """Return a text with each run of white space as one space."""
    return " ".join(text.split())


def printable(text: str) -> str:
    """Return a text with escapes in place of control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
