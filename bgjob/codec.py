"""STUB: stands in for the module of this name until it is merged."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

import orjson

from bgjob.errors import PayloadError

T = TypeVar("T")


class Codec(Protocol[T]):
    """Turns values into payloads and back."""

    def encode(self, value: T, /) -> bytes:
        """Give the payload of a value."""
        ...

    def decode(self, data: bytes, /) -> T:
        """Give the value of a payload."""
        ...


@dataclass(frozen=True, slots=True)
class JsonCodec:
    """JSON."""

    def encode(self, value: Any, /) -> bytes:
        """Give the payload of a value."""
        return orjson.dumps(value)

    def decode(self, data: bytes, /) -> Any:
        """Give the value of a payload."""
        return orjson.loads(data)


@dataclass(frozen=True, slots=True)
class RawCodec:
    """Bytes."""

    def encode(self, value: bytes, /) -> bytes:
        """Give the payload of a value."""
        return value

    def decode(self, data: bytes, /) -> bytes:
        """Give the value of a payload."""
        return data


@dataclass(frozen=True, slots=True)
class _DataclassCodec(Generic[T]):
    cls: type[T]

    def encode(self, value: T, /) -> bytes:
        return orjson.dumps(value)

    def decode(self, data: bytes, /) -> T:
        found = orjson.loads(data)
        for field in fields(self.cls):  # type: ignore[arg-type]
            kind: Any = field.type
            if (
                field.name in found
                and isinstance(kind, type)
                and not isinstance(found[field.name], kind)
            ):
                raise PayloadError(
                    f"payload of job type {type_name(self.cls)!r}: field {field.name!r} "
                    f"must be {kind.__name__}"
                )
        return self.cls(**found)


def codec_of(cls: type[T]) -> Codec[T]:
    """Give the codec of a class."""
    if not is_dataclass(cls):
        raise TypeError(f"{cls!r} is no dataclass")
    return _DataclassCodec(cls)


def type_name(cls: type) -> str:
    """Give the job type that a class names."""
    return getattr(cls, "job_type", cls.__name__)


def class_option(cls: type, option: str, default: Any = None) -> Any:
    """Give what a class says about its jobs, or the default; a field is none."""
    names = [field.name for field in fields(cls)] if is_dataclass(cls) else []
    return default if option in names else getattr(cls, option, default)
