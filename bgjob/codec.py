"""Encodes payloads as bytes and decodes them. Nothing here unpickles or evaluates."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import orjson

from bgjob._payload.models import (
    ModelCodec,
    annotation_codec,
    dataclass_codec,
    msgspec_codec,
    pydantic_codec,
)

T = TypeVar("T")


class Codec(Protocol[T]):
    """Encodes values as a job's bytes, and decodes them; called from any thread.

    A codec of your own (YAML, MessagePack, Protocol Buffers) is any object with
    these two methods. Pass it to the requests and to the handler, or set it once on a
    class, as its `codec: ClassVar`.
    """

    def encode(self, value: T, /) -> bytes:
        """Return the bytes to store; the enqueue raises whatever this raises."""
        ...

    def decode(self, data: bytes, /) -> T:
        """Return the value of stored bytes.

        Raises:
            ValueError: the bytes do not fit. Any exception moves the job to the
                dead-letter table immediately, because another attempt would raise
                it again; the bytes are kept.

        """
        ...


@dataclass(frozen=True, slots=True)
class JsonCodec:
    """JSON, the default: encodes what orjson encodes, and decodes to JSON's own types.

    Bytes count as JSON already, and are stored as they are.
    """

    def encode(self, value: object, /) -> bytes:
        """Return the JSON of a value.

        Raises:
            TypeError: JSON cannot express the value.
            ValueError: it holds NaN or infinity.

        """
        payload = json_payload(value, None)
        return b"null" if payload is None else payload

    def decode(self, data: bytes, /) -> Any:
        """Return the value; raise ValueError (orjson.JSONDecodeError) if it is not JSON."""
        return orjson.loads(data)


@dataclass(frozen=True, slots=True)
class RawCodec:
    """Bytes in, the same bytes out."""

    def encode(self, value: bytes, /) -> bytes:
        """Return the bytes; raise TypeError for anything else."""
        if not isinstance(value, bytes | bytearray | memoryview):
            raise TypeError(
                f"RawCodec takes bytes, not {type(value).__name__}: encode the value first"
            )
        return bytes(value)

    def decode(self, data: bytes, /) -> bytes:
        """Return the bytes."""
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
"""A value whose class is a job type: a dataclass, a pydantic model, a msgspec Struct, or any
class with a `codec`."""


def type_name(cls: type) -> str:
    """Return the job type of a class: its `job_type: ClassVar[str]`, or its name."""
    return _type_name(cast("Any", cls))


@lru_cache(maxsize=1000)
def _type_name(cls: type) -> str:
    name = class_option(cls, "job_type", cls.__name__)
    if not isinstance(name, str):
        raise TypeError(f"job_type of {cls.__qualname__} must be a str, not {type(name).__name__}")
    return name


_NOTHING = object()


def class_option(cls: type, option: str, default: Any = None) -> Any:
    """Return a class's option for its jobs, such as `queue: ClassVar[str]`, or the default.

    A field of that name is not an option: it belongs to the payload.
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
    """Return the codec of a class whose values are jobs; made once for each class.

    It is the class's own, `codec: ClassVar[Codec]`, if it has one. Otherwise it is
    JSON, checked in both directions: the enqueue refuses a value that could not be
    decoded.

    - A dataclass: an object of its fields. They may be str, int, float, bool,
      None, datetime, date and time (as ISO 8601), timedelta (as seconds), UUID,
      Decimal (as text), Enum (as its value), Literal, list, tuple, set,
      frozenset, dict, unions of types that JSON distinguishes, other dataclasses,
      the class itself, and Any, which is JSON's own types. Types are exact,
      except that an int may stand where a float is expected. A decoded value equals
      the encoded one; an aware datetime keeps its offset, not the name of its zone.
    - A pydantic model or a msgspec Struct: its own JSON, with its own validation.

    So that old and new workers can run side by side, a field that is missing in the
    bytes gets its default, and an unknown field is ignored (unless pydantic or
    msgspec are configured otherwise).

    Raises:
        TypeError: the class has no codec, or a field's annotation has no form in JSON.

    The codec raises PayloadError, which names the field.
    """
    codec: Codec[T] = _codec_of(cast("Any", cls))
    return codec


class Defaults(NamedTuple):
    """What a class says of its jobs."""

    codec: Codec[Any]
    type: str
    queue: str | None
    priority: int


@lru_cache(maxsize=1000)
def defaults_of(cls: type) -> Defaults:
    """Return what a class says of its jobs; read once for each class.

    Raises:
        TypeError: as for codec_of.

    """
    codec: Codec[Any] = codec_of(cls)
    return Defaults(
        codec, type_name(cls), class_option(cls, "queue"), class_option(cls, "priority", 0)
    )


def codec_of_checkpoint(annotation: Any, job_type: str) -> Codec[Any]:
    """Return the codec of a checkpoint whose value has this annotation.

    That of a class with a codec, as of a typed job, or of a pydantic model or msgspec Struct;
    otherwise any annotation that a field of a dataclass may have, such as `int` or `list[str]`.

    Raises:
        TypeError: the annotation has no form in JSON.

    """
    is_model = isinstance(annotation, type) and (
        _is_a(annotation, "pydantic", "BaseModel") or _is_a(annotation, "msgspec", "Struct")
    )
    if is_model or (isinstance(annotation, type) and hasattr(annotation, "codec")):
        codec = codec_of(annotation)
        if isinstance(codec, ModelCodec):
            return replace(codec, name=job_type, what="checkpoint")
        return codec
    return annotation_codec(annotation, job_type, "checkpoint")


def check_codec(codec: object) -> None:
    """Raise TypeError unless this is a codec."""
    if isinstance(codec, ModelCodec):
        return
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
    # A module that was never imported has no classes, so it need not be imported here.
    if _is_a(cls, "pydantic", "BaseModel") and hasattr(cls, "model_validate_json"):
        return pydantic_codec(cls, name)
    if _is_a(cls, "msgspec", "Struct"):
        return msgspec_codec(cls, name)
    raise TypeError(
        f"{cls.__qualname__} is not a job type: make it a dataclass, a pydantic model (2 or "
        "newer) or a msgspec Struct, give it a codec of its own (`codec: ClassVar`), or make an "
        "EnqueueRequest"
    )


def _is_a(cls: type, module: str, base: str) -> bool:
    there = getattr(sys.modules.get(module), base, None)
    return there is not None and issubclass(cls, there)


# -- JSON ---------------------------------------------------------------------------


_PAGE = 4096
"""Bytes that orjson allocates at least, and that its shorter results keep."""


def json_payload(arg: object, type_: str | None) -> bytes | None:
    """Return the default payload of an arg; errors name its job type."""
    if arg is None or isinstance(arg, bytes):
        return arg
    try:
        payload = orjson.dumps(arg)
    except TypeError as error:  # orjson's JSONEncodeError is one
        if isinstance(arg, bytearray | memoryview):
            return bytes(arg)
        raise TypeError(
            f"{_named(type_)} cannot be encoded as JSON: {error}; "
            "pass bytes, or values that JSON can express"
        ) from error
    # orjson writes NaN and infinities as null: the decoded value would differ.
    if b"null" in payload and has_non_finite(arg):
        raise ValueError(f"{_named(type_)} holds NaN or infinity, which JSON cannot express")
    return exact(payload)


def exact(data: bytes) -> bytes:
    """Copy short bytes that orjson made: each keeps a page, and 10,000 of them 40 MB.

    The copy takes 0.1 µs, and the page took 2 µs (benchmarks/bulk.py).
    """
    return b"".join((data, b"")) if len(data) < _PAGE else data


def _named(type_: str | None) -> str:
    return "the value" if type_ is None else f"arg of job type {type_!r}"


def has_non_finite(arg: object) -> bool:
    """Whether a value, or a part of it, is NaN or infinite."""
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
