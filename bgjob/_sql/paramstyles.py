"""The parameters of a statement as other drivers write them.

The statements here are psycopg's: %(name)s, or %(name)b for a value that travels in binary. A
translated one has a cast where the server could not infer a parameter's type, and never the
shorthand for it, whose colons other drivers take for a parameter.
"""

import re
from typing import Any, Literal, LiteralString, TypeAlias, cast

from bgjob._sql.statement import Statement

Paramstyle: TypeAlias = Literal["pyformat", "named", "numeric", "dollar"]
"""How a driver writes parameters: %(id)s, :id, :1, or $1."""

_PARAMETER = re.compile(r"%\((\w+)\)[sb]")

_LINE = re.compile(r"\s*\n\s*")

_WRITTEN = {"pyformat": "%({0})s", "named": ":{0}", "numeric": ":{1}", "dollar": "${1}"}

_texts: dict[tuple[LiteralString | bytes, str], tuple[LiteralString, tuple[str, ...]]] = {}


def translated(
    statement: Statement[Any], paramstyle: Paramstyle
) -> tuple[LiteralString, dict[str, object]] | tuple[LiteralString, list[object]]:
    """Return the text of a statement, and its parameters by name or in order.

    Raises:
        ValueError: an unknown style.

    """
    key = statement.text, paramstyle
    if key not in _texts:  # there are a dozen
        _texts[key] = _translated(*key)
    text, names = _texts[key]
    # A list of psycopg's own type is a plain one for other drivers.
    values = {name: _plain((statement.params or {})[name]) for name in names}
    return (text, values) if paramstyle in ("pyformat", "named") else (text, list(values.values()))


def _translated(text: LiteralString | bytes, style: str) -> tuple[LiteralString, tuple[str, ...]]:
    if style not in _WRITTEN:
        raise ValueError(f"paramstyle must be one of {', '.join(_WRITTEN)}, not {style!r}")
    source = _LINE.sub(" ", cast("str", text)).strip()
    numbers: dict[str, int] = {}
    for name in _PARAMETER.findall(source):
        numbers.setdefault(name, len(numbers) + 1)
    translated: Any = _PARAMETER.sub(  # of constants, like the text
        lambda found: _WRITTEN[style].format(found[1], numbers[found[1]]), source
    )
    return translated, tuple(numbers)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, list) else value
