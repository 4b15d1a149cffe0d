"""Codecs of dataclasses, pydantic models and msgspec Structs; imports neither package."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import orjson

from bgjob._payload.dataclass import dataclass_shape, shape_of
from bgjob._payload.scalars import Misfit
from bgjob.errors import PayloadError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class ModelCodec(Generic[T]):
    """JSON of a class; a value that does not fit is a PayloadError that names the field."""

    cls: type[T] | None
    """The class of its values; None: `dump` takes those of its annotation."""
    name: str
    dump: Callable[[T], bytes] = field(repr=False)
    load: Callable[[bytes], T] = field(repr=False)
    what: str = "payload"
    """What a job of the type has in this form."""

    def encode(self, value: T, /) -> bytes:
        """Return the JSON of a value; raise PayloadError if it does not fit."""
        try:
            if self.cls is not None and type(value) is not self.cls:
                raise Misfit(f"must be {self.cls.__name__}, not {type(value).__name__}")
            return self.dump(value)
        except (Misfit, ValueError, TypeError, RecursionError) as error:
            raise self._refused(error) from _cause(error)

    def decode(self, data: bytes, /) -> T:
        """Return the value of JSON; raise PayloadError if it does not fit."""
        try:
            return self.load(data)
        except (Misfit, ValueError, TypeError, RecursionError) as error:
            raise self._refused(error) from _cause(error)

    def _refused(self, error: Exception) -> PayloadError:
        return PayloadError(f"{self.what} of job type {self.name!r}{_problem(error)}")


def dataclass_codec(cls: type[T], name: str) -> ModelCodec[T]:
    """Make the codec of a dataclass; a TypeError names the field without a form in JSON."""
    shape = dataclass_shape(cls, {})

    def load(data: bytes) -> T:
        value: T = shape.load(orjson.loads(data))
        return value

    return ModelCodec(cls, name, lambda value: orjson.dumps(shape.dump(value)), load)


def annotation_codec(annotation: Any, name: str, what: str) -> ModelCodec[Any]:
    """Make the codec of an annotation; a TypeError says that it has no form in JSON."""
    shape = shape_of(annotation)
    return ModelCodec(
        None,
        name,
        lambda value: orjson.dumps(shape.dump(value)),
        lambda data: shape.load(orjson.loads(data)),
        what,
    )


def pydantic_codec(cls: Any, name: str) -> ModelCodec[Any]:
    """Make the codec of a pydantic model."""
    cls.model_rebuild()  # raises now if an annotation cannot be resolved

    def dump(value: Any) -> bytes:
        # By alias, because validation expects it. load() checks the values.
        data: bytes = value.model_dump_json(by_alias=True, round_trip=True, warnings=False).encode()
        load(data)
        return data

    load: Callable[[bytes], Any] = cls.model_validate_json
    return ModelCodec(cls, name, dump, load)


def msgspec_codec(cls: Any, name: str) -> ModelCodec[Any]:
    """Make the codec of a msgspec Struct."""
    json: Any = sys.modules["msgspec"].json
    json.Decoder(cls)  # raises now for a type that it cannot decode

    def dump(value: Any) -> bytes:
        data: bytes = json.encode(value)
        load(data)  # making a Struct checks no types
        return data

    def load(data: bytes) -> Any:
        return json.decode(data, type=cls)

    return ModelCodec(cls, name, dump, load)


def _cause(error: Exception) -> BaseException | None:
    return error.__cause__ if isinstance(error, Misfit) else error


def _problem(error: Exception) -> str:
    match error:
        case Misfit():
            return f": field {error.path!r} {error.problem}" if error.path else f" {error.problem}"
        case RecursionError():
            return " is nested too deeply"
        case orjson.JSONDecodeError():
            return f" is not JSON: {error}"
    path, text = "", str(error)
    errors: Any = getattr(error, "errors", None)
    if errors is not None:  # pydantic's ValidationError; shown without the field's value
        first, *more = errors(include_url=False, include_context=False, include_input=False)
        steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]]
        path, text = "".join(steps), first["msg"]
        text += f" (and {len(more)} more)" if more else ""
    elif " - at `$" in text:  # msgspec's
        text, _, path = text.rpartition(" - at `$")
    path = path.rstrip("`").removeprefix(".")
    return f": field {path!r}: {text}" if path else f": {text}"
