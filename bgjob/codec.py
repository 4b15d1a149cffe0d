"""Encodes what a job is about as bytes, and decodes it. Nothing here unpickles or evaluates."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar, cast

import orjson

from bgjob._payload.models import dataclass_codec, msgspec_codec, pydantic_codec

T = TypeVar("T")


class Codec(Protocol[T]):
    """How values become a job's bytes and come back; two methods, called from any thread.

    One of your own (YAML, MessagePack, Protocol Buffers) is any object that has
    them. It is given to the requests and to the handler, or once and for all to
    a class, as its `codec: ClassVar`.
    """

    def encode(self, value: T, /) -> bytes:
        """Give the bytes to store; what it raises, the enqueue raises."""
        ...

    def decode(self, data: bytes, /) -> T:
        """Give the value again.

        Raises:
            ValueError: the bytes do not fit. Whatever it raises moves the job to
                the dead-letter table at once, for another attempt would raise it
                again; the bytes are kept.

        """
        ...


@dataclass(frozen=True, slots=True)
class JsonCodec:
    """JSON, the default: all that orjson writes, and when it is decoded JSON's own types.

    Bytes are taken for JSON already, and stored as they are.
    """

    def encode(self, value: object, /) -> bytes:
        """Give the JSON.

        Raises:
            TypeError: JSON cannot express the value.
            ValueError: it holds NaN or infinity.

        """
        payload = json_payload(value, None)
        return b"null" if payload is None else payload

    def decode(self, data: bytes, /) -> Any:
        """Give the value; a ValueError (orjson.JSONDecodeError) says what is no JSON."""
        return orjson.loads(data)


@dataclass(frozen=True, slots=True)
class RawCodec:
    """Bytes in, the same bytes out."""

    def encode(self, value: bytes, /) -> bytes:
        """Give the bytes; anything else raises TypeError."""
        if not isinstance(value, bytes | bytearray | memoryview):
            raise TypeError(f"RawCodec takes bytes, not {type(value).__name__}: encode it before")
        return bytes(value)

    def decode(self, data: bytes, /) -> bytes:
        """Give the bytes."""
        return data


# -- classes ------------------------------------------------------------------------


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class _Pydantic(Protocol):
    def model_dump_json(self) -> str: ...


class _Msgspec(Protocol):
    __struct_fields__: ClassVar[tuple[str, ...]]


class _Coded(Protocol):
    codec: ClassVar[Codec[Any]]


TypedJob: TypeAlias = _Dataclass | _Pydantic | _Msgspec | _Coded
"""A value whose class is a job type: of a dataclass, a pydantic model, a msgspec Struct, or any
class with a `codec`."""


def type_name(cls: type) -> str:
    """Give the job type of a class: its name, or its `job_type: ClassVar[str]`."""
    name = class_option(cls, "job_type", cls.__name__)
    if not isinstance(name, str):
        raise TypeError(f"job_type of {cls.__qualname__} must be a str, not {type(name).__name__}")
    return name


_NOTHING = object()


def class_option(cls: type, option: str, default: Any = None) -> Any:
    """Give what a class says about its jobs, such as `queue: ClassVar[str]`, or the default.

    A field of that name is none: it belongs to the payload.
    """
    said = getattr(cls, option, _NOTHING)
    if said is _NOTHING:
        return default
    names: Any
    if is_dataclass(cls):
        names = [field.name for field in fields(cls)]
    else:
        names = getattr(cls, "model_fields", None) or getattr(cls, "__struct_fields__", ())
    return default if option in names else said


def codec_of(cls: type[T]) -> Codec[T]:
    """Give the codec of a class whose values are jobs; made once a class.

    It is the class's own, `codec: ClassVar[Codec]`, if it has one. Otherwise it is
    JSON, checked in both directions: a value is refused when it is enqueued if
    it would not fit when it is decoded.

    - A dataclass: an object of its fields. They may be str, int, float, bool,
      None, datetime, date and time (as ISO 8601), timedelta (as seconds), UUID,
      Decimal (as text), Enum (as its value), Literal, list, tuple, set,
      frozenset, dict, unions of what JSON tells apart, other dataclasses, also
      the class itself, and Any, which is JSON's own types. Types are exact, but
      for an int where a float is asked for. What was written comes back equal;
      an aware datetime keeps its offset, not the name of its zone.
    - A pydantic model or a msgspec Struct: what it itself reads and writes, with
      its own validation.

    So that old and new workers can run side by side, a field that is missing in
    the bytes gets its default, and one that the class does not have is passed
    over (pydantic and msgspec can be told otherwise).

    Raises:
        TypeError: no such class, or a field whose annotation has no form in JSON.

    The codec raises PayloadError, which names the field.
    """
    codec: Codec[T] = _codec_of(cast("Any", cls))
    return codec


def check_codec(codec: object) -> None:
    """Raise TypeError if this is not a codec."""
    if isinstance(codec, type) or not all(
        callable(getattr(codec, method, None)) for method in ("encode", "decode")
    ):
        raise TypeError(
            "codec must be an object with the methods encode(value) and decode(data), such as "
            f"JsonCodec() or RawCodec(), not {codec!r}"
        )


@lru_cache(maxsize=1000)
def _codec_of(cls: type) -> Codec[Any]:
    if not isinstance(cls, type):
        raise TypeError(f"a job's class must be a class, not {cls!r}")
    own: Codec[Any] | None = class_option(cls, "codec")
    if own is not None:
        check_codec(own)
        return own
    name = type_name(cls)
    if is_dataclass(cls):
        return dataclass_codec(cls, name)
    # A module that the program has not imported has no classes.
    if _is_a(cls, "pydantic", "BaseModel") and hasattr(cls, "model_validate_json"):
        return pydantic_codec(cls, name)
    if _is_a(cls, "msgspec", "Struct"):
        return msgspec_codec(cls, name)
    raise TypeError(
        f"{cls.__qualname__} is no job type: let it be a dataclass, a model of pydantic (2 or "
        "newer) or a msgspec Struct, give it a codec of its own (`codec: ClassVar`), or make an "
        "EnqueueRequest"
    )


def _is_a(cls: type, module: str, base: str) -> bool:
    there = getattr(sys.modules.get(module), base, None)
    return there is not None and issubclass(cls, there)


# -- JSON ---------------------------------------------------------------------------


def json_payload(arg: object, type_: str | None) -> bytes | None:
    """Give an arg as it is stored by default; errors name its job type."""
    match arg:
        case None:
            return None
        case bytes():
            return arg
        case bytearray() | memoryview():
            return bytes(arg)
    try:
        payload = orjson.dumps(arg)
    except TypeError as error:  # orjson's JSONEncodeError is one
        raise TypeError(
            f"{_named(type_)} cannot be encoded as JSON: {error}; "
            "give bytes, or values that JSON has"
        ) from error
    # orjson writes NaN and infinities as null: what comes back would differ.
    if b"null" in payload and _has_non_finite(arg):
        raise ValueError(f"{_named(type_)} holds NaN or infinity, which JSON cannot express")
    return payload


def _named(type_: str | None) -> str:
    return "the value" if type_ is None else f"arg of job type {type_!r}"


def _has_non_finite(arg: object) -> bool:
    pending: list[object] = [arg]
    while pending:
        match pending.pop():
            case float(value) if not math.isfinite(value):
                return True
            case Mapping() as mapping:
                pending.extend(mapping.values())
            case str() | bytes():
                pass
            case Enum() as member:
                pending.append(member.value)
            case Iterable() as items:
                pending.extend(items)
            case other if is_dataclass(other):
                pending.extend(getattr(other, field.name) for field in fields(other))
    return False
