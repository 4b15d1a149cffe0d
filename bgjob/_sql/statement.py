"""Statements as values, and helpers that several of them share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, LiteralString, NamedTuple, TypeVar

T_co = TypeVar("T_co", covariant=True)
Row = tuple[Any, ...]


class Statement(NamedTuple, Generic[T_co]):
    """SQL, its parameters, and how to read its rows."""

    text: LiteralString | bytes
    params: Mapping[str, object] | None
    parse: Callable[[Sequence[Row]], T_co]
    prepare: bool | None = False
    """Whether the driver may prepare it: None if a session with default settings may keep its plan,
    False if not: the plan for a table of one page scans the whole table when that has grown, and a
    statement with result columns fails forever when one of them changes its type. A worker's
    connection plans for any size, keeps its plans, and drops those that fail."""


# A value that was edited by hand must not stop other jobs: infinite times are
# brought into Python's range, and an attempt at the end of integer stays there.
def in_range(column: LiteralString) -> LiteralString:
    return f"least(greatest({column}, '0001-01-02 00:00+00'), '9999-12-30 00:00+00')"


def in_range_or_null(column: LiteralString) -> LiteralString:
    """Return SQL as `in_range` for a column that may be null, which least() would ignore."""
    return f"case when {column} is not null then {in_range(column)} end"


def as_text(column: LiteralString) -> LiteralString:
    return f"({column})::text"


def finite(column: LiteralString) -> LiteralString:
    """Return SQL that is null if Python cannot represent the time."""
    return (
        f"case when {column} > '0001-01-02 00:00+00' and {column} < '9999-12-30' then {column} end"
    )


QUIET: LiteralString = """
    quiet as materialized (select set_config('synchronous_commit', 'off', true))
"""
"""A common table expression after which its statement's commit does not wait for the disk."""


def nothing(_: Sequence[Row]) -> None:
    return None


def scalar(rows: Sequence[Row]) -> Any:
    return rows[0][0]


def column(rows: Sequence[Row]) -> list[Any]:
    return [row[0] for row in rows]


def number_array(items: Sequence[float]) -> str:
    return f"{{{','.join(map(str, items))}}}"


def text_array(items: Sequence[str]) -> str:
    # PostgreSQL's array literal in one join: psycopg dumps a list item by item,
    # about 1 µs each, and these arrays are on the hot path.
    joined = '","'.join(items)
    if "\\" in joined or joined.count('"') != 2 * (len(items) - 1):
        joined = '","'.join(i.replace("\\", "\\\\").replace('"', '\\"') for i in items)
    return f'{{"{joined}"}}'
