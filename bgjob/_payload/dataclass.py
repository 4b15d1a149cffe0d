"""The shape of a dataclass, made once from its annotations."""

import dataclasses
import inspect
import typing
from enum import Enum, Flag
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NewType,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from bgjob._payload.containers import ANY, choice, collection, mapping, row, union
from bgjob._payload.scalars import SCALARS, Misfit, Shape, not_a

_BYTES = (bytes, bytearray, memoryview)


def dataclass_shape(cls: type, known: dict[type, Shape]) -> Shape:
    """Return the shape of a dataclass.

    Args:
        cls: the dataclass.
        known: the dataclasses met so far; each may contain itself.

    Raises:
        TypeError: an annotation has no form in JSON, or the constructor needs an argument
            that is not a field.

    """
    if cls in known:
        return known[cls]
    stored = [field for field in dataclasses.fields(cls) if field.init]
    optional = {
        field.name
        for field in stored
        if field.default is not dataclasses.MISSING
        or field.default_factory is not dataclasses.MISSING
    }
    rows: list[tuple[str, Shape]] = []  # filled below: a field may be of this very class

    def dump(value: Any) -> Any:
        if type(value) is not cls:
            raise not_a(cls.__name__, value)
        data = {}
        for name, shape in rows:
            try:
                data[name] = shape.dump(getattr(value, name))
            except Misfit as misfit:
                misfit.inside(f".{name}")
                raise
        return data

    def load(data: Any) -> Any:
        if type(data) is not dict:
            raise not_a(f"a dict with the fields of {cls.__name__}", data)
        values = {}
        for name, shape in rows:
            try:
                if name in data:
                    values[name] = shape.load(data[name])
                elif name not in optional:
                    raise Misfit("is missing")
            except Misfit as misfit:
                misfit.inside(f".{name}")
                raise
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise Misfit(f"is refused by {cls.__name__}: {error}") from error

    known[cls] = shape = Shape(cls.__name__, (cls,), frozenset({dict}), dump, load)
    _check_constructor(cls, {field.name for field in stored})
    annotations = _annotations(cls)
    for field in stored:
        try:
            rows.append((field.name, _shape(annotations[field.name], known)))
        except TypeError as error:
            raise TypeError(f"field {field.name!r} of {cls.__qualname__}: {error}") from None
        except RecursionError:
            raise TypeError(
                f"field {field.name!r} of {cls.__qualname__}: a type alias that contains itself "
                "cannot be read; make it a dataclass, which may contain itself"
            ) from None
    return shape


def shape_of(annotation: Any) -> Shape:
    """Return the shape of an annotation; raise TypeError if it has no form in JSON."""
    return _shape(annotation, {})


def _annotations(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError as error:
        raise TypeError(
            f"the annotations of {cls.__qualname__} cannot be read: {error}; define their names "
            "in the module, outside of functions and of `if TYPE_CHECKING`"
        ) from error


def _check_constructor(cls: type, names: set[str]) -> None:
    for parameter in inspect.signature(cls).parameters.values():
        if (
            parameter.name not in names
            and parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ):
            raise TypeError(
                f"{cls.__qualname__} cannot be made from its fields: {parameter.name!r} is not a "
                "field; make it one, or give it a default"
            )


def _shape(annotation: Any, known: dict[type, Shape]) -> Shape:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any or annotation is object:
        return ANY
    if annotation is None:
        return SCALARS[type(None)]
    if isinstance(annotation, NewType):
        return _shape(annotation.__supertype__, known)
    if type(annotation).__name__ == "TypeAliasType":  # `type X = ...`, of Python 3.12
        return _shape(annotation.__value__, known)
    if origin is Annotated:
        return _shape(args[0], known)
    if origin is Literal:
        return choice(args)
    if origin is Union or origin is UnionType:
        return union([_shape(arg, known) for arg in args])
    if annotation is tuple or annotation is typing.Tuple:  # noqa: UP006
        return collection(tuple, ANY)
    cls = origin or annotation
    if cls in (list, set, frozenset):
        return collection(cls, _shape(args[0], known) if args else ANY)
    if cls is tuple:
        if args[1:] == (...,):
            return collection(tuple, _shape(args[0], known))
        return row([_shape(arg, known) for arg in args])
    if cls is dict:
        return mapping(*(_shape(arg, known) for arg in args or (str, object)))
    if isinstance(annotation, type) and origin is None:
        if annotation in SCALARS:
            return SCALARS[annotation]
        if issubclass(annotation, Enum) and not issubclass(annotation, Flag):
            return choice(annotation)
        if dataclasses.is_dataclass(annotation):
            return dataclass_shape(annotation, known)
    shown = annotation.__qualname__ if isinstance(annotation, type) else repr(annotation)
    if annotation in _BYTES:
        raise TypeError(
            f"JSON has no form for {shown}: store text, for example base64, or give the class a "
            "codec of its own (`codec: ClassVar`)"
        )
    raise TypeError(
        f"{shown} is not a type that decodes to an equal value; use str, int, float, bool, None, "
        "datetime, date, time, timedelta, UUID, Decimal, Enum, Literal, list, tuple, set, "
        "frozenset, dict, unions of types that JSON distinguishes, dataclasses or Any; or give "
        "the class a codec of its own (`codec: ClassVar`)"
    )
