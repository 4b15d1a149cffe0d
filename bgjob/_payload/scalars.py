"""How a value is encoded as JSON: either it decodes to an equal value, or it is refused."""

import math
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import Any, NamedTuple
from uuid import UUID

_INT64 = range(-(2**63), 2**64)
"""The integers that orjson writes, and reads as an int."""


class Misfit(Exception):  # noqa: N818 (it never reaches a user)
    """A value does not match its annotation; it collects its path as it is raised."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self._path: list[str] = []

    def inside(self, step: str) -> "Misfit":
        """Prepend a field or an item to the path."""
        self._path.append(step)
        return self

    @property
    def path(self) -> str:
        """Where the value is, such as `items[2].price`; empty for the payload itself."""
        return "".join(reversed(self._path)).removeprefix(".")


class Shape(NamedTuple):
    """An annotation: its name, and how its values are encoded as JSON and decoded."""

    name: str
    takes: tuple[type, ...]
    """The classes whose values `dump` takes."""
    kinds: frozenset[type]
    """The JSON classes of their encoded values."""
    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]


def not_a(expected: str, value: object) -> Misfit:
    got = "None" if value is None else type(value).__name__
    return Misfit(f"must be {expected}, not {got}")


def _same(cls: type, name: str, dump: Callable[[Any], Any]) -> Shape:
    """Make the shape of a JSON class."""

    def load(data: Any) -> Any:
        if type(data) is not cls:
            raise not_a(name, data)
        return data

    return Shape(name, (cls,), frozenset({cls}), dump, load)


def dump_str(value: Any) -> str:
    if not isinstance(value, str):
        raise not_a("str", value)
    text = value if type(value) is str else str.__str__(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Misfit("must be valid Unicode, without surrogates") from None
    return text


def dump_int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise not_a("int", value)
    number = int(value)  # a range tests a member of an IntEnum item by item
    if number not in _INT64:
        raise Misfit("must be an int from -2**63 to 2**64 - 1, as those that orjson writes")
    return number


def _dump_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise not_a("bool", value)
    return value


def _dump_none(value: Any) -> None:
    if value is not None:
        raise not_a("None", value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise not_a("float", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Misfit("must be a finite float")
    return number


def _dump_float(value: Any) -> float:
    number = _number(value)
    if number != value:
        raise Misfit("must be an int that a float can hold")
    return number


def _dump_timedelta(value: Any) -> float:
    if not isinstance(value, timedelta):
        raise not_a("timedelta", value)
    seconds = value.total_seconds()
    try:
        same = timedelta(seconds=seconds) == value
    except OverflowError:
        same = False
    if not same:
        raise Misfit("must be a timedelta whose seconds a float can hold")
    return seconds


def _load_timedelta(data: Any) -> timedelta:
    try:
        return timedelta(seconds=_number(data))
    except OverflowError:
        raise Misfit("must be seconds that a timedelta can hold") from None


def _text(
    cls: type,
    expected: str,
    dump: Callable[[Any], str],
    load: Callable[[str], Any],
    *,
    but: tuple[type, ...] = (),
) -> Shape:
    """Make the shape of a class that is text in JSON."""

    def dump_text(value: Any) -> str:
        if not isinstance(value, cls) or isinstance(value, but):
            raise not_a(cls.__name__, value)
        return dump(value)

    def load_text(data: Any) -> Any:
        if type(data) is not str:
            raise not_a(expected, data)
        try:
            return load(data)
        except (ValueError, ArithmeticError):
            raise Misfit(f"must be {expected}") from None

    return Shape(cls.__name__, (cls,), frozenset({str}), dump_text, load_text)


def _finite(value: Decimal) -> Decimal:
    if not value.is_finite():
        raise Misfit("must be a finite Decimal")
    return value


SCALARS: dict[type, Shape] = {
    str: _same(str, "str", dump_str),
    int: _same(int, "int", dump_int),
    bool: _same(bool, "bool", _dump_bool),
    NoneType: _same(NoneType, "None", _dump_none),
    float: Shape("float", (float, int), frozenset({float, int}), _dump_float, _number),
    timedelta: Shape(
        "timedelta", (timedelta,), frozenset({float, int}), _dump_timedelta, _load_timedelta
    ),
    datetime: _text(datetime, "a datetime in ISO 8601", datetime.isoformat, datetime.fromisoformat),
    date: _text(date, "a date in ISO 8601", date.isoformat, date.fromisoformat, but=(datetime,)),
    time: _text(time, "a time in ISO 8601", time.isoformat, time.fromisoformat),
    UUID: _text(UUID, "a UUID", str, UUID),
    Decimal: _text(
        Decimal,
        "a decimal number in a str",
        lambda d: str(_finite(d)),
        lambda s: _finite(Decimal(s)),
    ),
}
