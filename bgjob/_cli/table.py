"""The output of commands: tables for people, JSON for programs."""

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime

import orjson

from bgjob import _words

printable = _words.printable
"""What this module writes, and its callers too, has no control characters."""

_LONGEST = 100
"""The most characters of a cell: the first words of an error identify it."""


def write_json(value: object) -> None:
    """Print a value as JSON."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def write_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: numbers aligned right, text without control characters.

    On a terminal `rich` draws it, if it is installed. Otherwise the columns are aligned, to
    be read by people and by `awk`.
    """
    table = [list(row) for row in rows]
    numeric = [
        bool(table) and all(isinstance(row[n], int | float | None) for row in table)
        for n in range(len(columns))
    ]
    cells = [[shown(value) for value in row] for row in table]
    if not (sys.stdout.isatty() and _drawn(columns, cells, numeric)):
        _write_plain(columns, cells, numeric)


def shown(value: object) -> str:
    """Return the text of a cell."""
    match value:
        case None:
            return "-"
        case float():
            return f"{value:,.1f}"
        case int():
            return f"{value:,}"
        case datetime():
            return f"{value.astimezone():%Y-%m-%d %H:%M:%S%z}"
    text = str(value)
    line = text.splitlines()[0] if text else ""
    cell = printable(line)[:_LONGEST]
    return cell if cell == text else f"{cell[: _LONGEST - 3]}..."


def _write_plain(
    columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]
) -> None:
    lines = [columns, *cells]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    for line in lines:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def _drawn(columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]) -> bool:
    """Draw a table on the terminal; False without `rich`."""
    try:
        from rich.console import Console  # noqa: PLC0415 (an extra)
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        return False
    table = Table()
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))  # plain text, without markup
    Console().print(table)
    return True
