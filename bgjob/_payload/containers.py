"""Shapes made of other shapes: choices, unions and containers."""

from collections.abc import Callable, Iterable
from enum import Enum
from types import NoneType
from typing import Any, TypeAlias

from bgjob._payload.scalars import SCALARS, Misfit, Shape, dump_int, dump_str, not_a

_Way: TypeAlias = Callable[[Any], Any]

_SHOWN = 10


def choice(values: Iterable[Any]) -> Shape:
    """Make the shape of the members of an Enum, or the values of a Literal."""
    written: dict[tuple[type, Any], Any] = {}
    for value in values:
        data = value.value if isinstance(value, Enum) else value
        scalar = SCALARS.get(type(data))
        if scalar is None or type(data) not in scalar.kinds:
            raise TypeError(f"JSON has no form for the value {value!r}")
        try:
            written[type(value), value] = scalar.dump(data)
        except Misfit as misfit:
            raise TypeError(f"the value {value!r} {misfit.problem}") from None
    read = {(type(data), data): value for (_, value), data in written.items()}
    takes = tuple({type_ for type_, _ in written})
    kinds = frozenset(type_ for type_, _ in read)
    shown = [repr(data) for _, data in read]
    more = f" or {len(shown) - _SHOWN} others" if len(shown) > _SHOWN else ""
    problem = f"must be one of {', '.join(shown[:_SHOWN])}{more}"

    def dump(value: Any) -> Any:
        # Check the class first: a value of another class may not be hashable.
        if type(value) not in takes or (type(value), value) not in written:
            raise Misfit(problem)
        return written[type(value), value]

    def load(data: Any) -> Any:
        if type(data) not in kinds or (type(data), data) not in read:
            raise Misfit(problem)
        return read[type(data), data]

    return Shape(" | ".join(shown[:_SHOWN]), takes, kinds, dump, load)


def union(members: list[Shape]) -> Shape:
    """Make the shape of a union whose members JSON distinguishes."""
    if any(member is ANY for member in members):
        return ANY
    integer, floating = SCALARS[int], SCALARS[float]
    members = sorted(members, key=lambda member: member is floating)
    dumps: dict[type, Shape] = {}
    loads: dict[type, Shape] = {}
    for member in members:
        for kind in member.kinds:
            other = loads.setdefault(kind, member)
            # In a union of int and float an int stays an int, and all members share one None.
            if not (
                other is member or kind is NoneType or (other is integer and member is floating)
            ):
                raise TypeError(
                    f"JSON has {kind.__name__} for both {other.name} and {member.name}: use "
                    "a field of its own for each"
                )
        for type_ in member.takes:
            dumps.setdefault(type_, member)
    name = " | ".join(member.name for member in members)

    def dump(value: Any) -> Any:
        member = dumps.get(type(value))
        if member is None:
            member = next((m for m in members if isinstance(value, m.takes)), None)
        if member is None:
            raise not_a(name, value)
        return member.dump(value)

    def load(data: Any) -> Any:
        member = loads.get(type(data))
        if member is None:
            raise not_a(name, data)
        return member.load(data)

    takes = tuple(type_ for member in members for type_ in member.takes)
    return Shape(name, takes, frozenset(loads), dump, load)


def collection(cls: Any, item: Shape) -> Shape:
    """Make the shape of a list, a set, a frozenset or a tuple of any length."""

    def dump(value: Any) -> Any:
        if not isinstance(value, cls):
            raise not_a(cls.__name__, value)
        return _each(item.dump, value)

    def load(data: Any) -> Any:
        if type(data) is not list:
            raise not_a("list", data)
        items = _each(item.load, data)
        if cls is list:
            return items
        try:
            return cls(items)
        except TypeError:
            raise Misfit("must be a list of what a set can hold") from None

    return Shape(f"{cls.__name__}[{item.name}]", (cls,), frozenset({list}), dump, load)


def row(items: list[Shape]) -> Shape:
    """Make the shape of a tuple with a shape for each item."""

    def each(values: Any, ways: list[_Way]) -> list[Any]:
        if len(values) != len(ways):
            raise Misfit(f"must have {len(ways)} items, not {len(values)}")
        return _each(lambda pair: pair[0](pair[1]), zip(ways, values, strict=True))

    def dump(value: Any) -> Any:
        if not isinstance(value, tuple):
            raise not_a("tuple", value)
        return each(value, [item.dump for item in items])

    def load(data: Any) -> Any:
        if type(data) is not list:
            raise not_a("list", data)
        return tuple(each(data, [item.load for item in items]))

    name = f"tuple[{', '.join(item.name for item in items)}]"
    return Shape(name, (tuple,), frozenset({list}), dump, load)


def mapping(key: Shape, item: Shape) -> Shape:
    """Make the shape of a dict, whose keys are text in JSON."""
    dump_key, load_key = key.dump, key.load
    if key is ANY:
        dump_key, load_key = dump_str, SCALARS[str].load
    elif key is SCALARS[int]:
        dump_key, load_key = lambda value: str(dump_int(value)), _load_int_key
    elif key.kinds != {str}:
        raise TypeError(
            f"JSON has only text for the keys of a dict, and none for {key.name}: let them be "
            "str, int, or of a class that is a str in JSON"
        )

    def dump(value: Any) -> Any:
        if not isinstance(value, dict):
            raise not_a("dict", value)
        return _each_item(dump_key, item.dump, value)

    def load(data: Any) -> Any:
        if type(data) is not dict:
            raise not_a("dict", data)
        return _each_item(load_key, item.load, data)

    return Shape(f"dict[{key.name}, {item.name}]", (dict,), frozenset({dict}), dump, load)


def _each(way: _Way, values: Iterable[Any]) -> list[Any]:
    items: list[Any] = []
    try:
        for value in values:
            items.append(way(value))  # noqa: PERF401 (the path needs their number)
    except Misfit as misfit:
        misfit.inside(f"[{len(items)}]")
        raise
    return items


def _each_item(key_way: _Way, way: _Way, values: dict[Any, Any]) -> dict[Any, Any]:
    items: dict[Any, Any] = {}
    for key, value in values.items():
        try:
            items[key_way(key)] = way(value)
        except Misfit as misfit:
            misfit.inside(f"[{key!r}]")
            raise
    return items


def _load_int_key(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise Misfit("must have an int as its key") from None
    if str(number) != text:
        raise Misfit("must have an int as its key")
    return number


def _plain(value: Any) -> Any:
    """Return a JSON value unchanged; refuse one that would be decoded to another."""
    if type(value) is list:
        return _each(_plain, value)
    if type(value) is dict:
        return _each_item(dump_str, _plain, value)
    if type(value) not in _PLAIN:
        raise not_a("a JSON value (str, int, float, bool, None, list, dict)", value)
    return SCALARS[type(value)].dump(value)


_PLAIN: frozenset[type] = frozenset({str, int, float, bool, NoneType})

ANY = Shape("Any", (object,), _PLAIN | {list, dict}, _plain, lambda data: data)
"""Any JSON value."""
