"""What a statement is, and what several of them share."""

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
    """None where a session of PostgreSQL's own settings may keep its plan, False where not: the
    plan of a table of one page scans the whole table when that has grown, and one whose answer
    has columns fails for ever when one of them changes its type. A worker's connection plans for
    any size, keeps its plans, and forgets those that fail."""


# A column spoiled by hand must not stop its neighbours: infinite times are
# brought into Python's range, and an attempt at the end of integer stays there.
def in_range(column: LiteralString) -> LiteralString:
    return f"least(greatest({column}, '0001-01-02 00:00+00'), '9999-12-30 00:00+00')"


def finite(column: LiteralString) -> LiteralString:
    """Return null where Python has no such time."""
    return (
        f"case when {column} > '0001-01-02 00:00+00' and {column} < '9999-12-30' then {column} end"
    )


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
