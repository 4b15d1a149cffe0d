"""Codecs turn values into a job's bytes and back, the library's own and a user's."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import psycopg
import pydantic
import pytest
import yaml

import bgjob
from bgjob import BgjobError, Client, Codec, EnqueueRequest, JsonCodec, PayloadError, RawCodec
from bgjob.codec import check_codec, codec_of, type_name

NAN = float("nan")


class Yaml:
    """A codec of a user's own."""

    def encode(self, value: Any, /) -> bytes:
        text: str = yaml.safe_dump(value)
        return text.encode()

    def decode(self, data: bytes, /) -> Any:
        return yaml.safe_load(data)


# -- JSON, raw bytes, and a user's own ----------------------------------------------------


@pytest.mark.parametrize("value", [None, True, 0, -1.5, "é\0", [], {"a": [1, {"b": None}]}])
def test_json_is_the_default_codec(value: Any) -> None:
    codec = JsonCodec()
    assert codec.decode(codec.encode(value)) == value
    if value is not None:
        assert EnqueueRequest("q", "t", value).payload == codec.encode(value)
        assert EnqueueRequest("q", "t", value, codec=codec).payload == codec.encode(value)


def test_the_json_codec_refuses_the_values_that_the_default_refuses() -> None:
    with pytest.raises(TypeError, match="the value cannot be encoded as JSON"):
        JsonCodec().encode(object())
    with pytest.raises(ValueError, match="the value holds NaN or infinity"):
        JsonCodec().encode([NAN])
    with pytest.raises(ValueError, match="invalid literal"):
        JsonCodec().decode(b"no json")


@pytest.mark.parametrize("data", [b"", bytes(range(256)), bytearray(b"x"), memoryview(b"y")])
def test_the_raw_codec_leaves_bytes_as_they_are(data: bytes) -> None:
    codec = RawCodec()
    assert codec.decode(codec.encode(data)) == bytes(data)
    assert type(EnqueueRequest("q", "t", data, codec=codec).payload) is bytes


def test_the_raw_codec_refuses_values_that_are_not_bytes() -> None:
    with pytest.raises(TypeError, match="RawCodec takes bytes, not str"):
        EnqueueRequest("q", "t", "text", codec=RawCodec())


def test_a_request_encodes_its_arg_with_a_codec_of_the_users() -> None:
    request = EnqueueRequest("q", "t", {"title": "é", "pages": [1, 2]}, codec=Yaml())
    assert request.payload is not None
    assert b"pages:\n- 1\n- 2" in request.payload
    assert Yaml().decode(request.payload) == {"title": "é", "pages": [1, 2]}


def test_a_users_codec_receives_bytes_as_well_but_never_none() -> None:
    request = EnqueueRequest("q", "t", b"\xff", codec=Yaml())
    assert request.payload == b"!!binary |\n  /w==\n"
    assert EnqueueRequest("q", "t", None, codec=Yaml()).payload is None


def test_a_copy_of_a_request_is_not_encoded_again() -> None:
    request = EnqueueRequest("q", "t", {"a": 1}, codec=Yaml())
    copy = replace(request, delay=5)
    assert (copy.payload, copy.delay) == (b"a: 1\n", 5)
    assert copy.arg == request.arg == b"a: 1\n"


@pytest.mark.parametrize("codec", [Yaml, None, object(), "json", yaml])
def test_an_object_that_is_not_a_codec_is_refused(codec: Any) -> None:
    with pytest.raises(TypeError, match=r"codec must be an object with the methods encode"):
        EnqueueRequest("q", "t", 1, codec=codec)
    with pytest.raises(TypeError, match=r"codec must be an object with the methods encode"):
        check_codec(codec)


def test_a_codec_that_does_not_return_bytes_is_reported() -> None:
    class Text(Yaml):
        def encode(self, value: Any, /) -> Any:
            return str(value)

    with pytest.raises(TypeError, match="returned str for the arg of job type 't': encode"):
        EnqueueRequest("q", "t", 1, codec=Text())


def test_an_exception_of_a_codec_is_raised_by_the_enqueue() -> None:
    with pytest.raises(yaml.representer.RepresenterError):
        EnqueueRequest("q", "t", object(), codec=Yaml())


class Thumbnail:
    """No dataclass, and bytes: its own codec makes it a job type."""

    class Bytes:
        def encode(self, value: "Thumbnail", /) -> bytes:
            return value.image

        def decode(self, data: bytes, /) -> "Thumbnail":
            return Thumbnail(data)

    codec: ClassVar[Codec[Any]] = Bytes()
    queue: ClassVar[str] = "images"

    def __init__(self, image: bytes) -> None:
        self.image = image


def test_a_class_can_have_a_codec_of_its_own() -> None:
    request = EnqueueRequest.of(Thumbnail(b"\xff\xd8"))
    assert (request.queue, request.type, request.payload) == ("images", "Thumbnail", b"\xff\xd8")
    assert codec_of(Thumbnail).decode(b"\xff").image == b"\xff"


def test_a_class_s_codec_is_checked() -> None:
    @dataclass(frozen=True)
    class Forgetful:
        codec: ClassVar[Any] = Yaml

    with pytest.raises(TypeError, match="codec must be an object with the methods"):
        codec_of(Forgetful)


def test_an_encoded_job_is_stored_byte_for_byte(dsn: str, conn: psycopg.Connection) -> None:
    with Client(dsn) as client:
        client.enqueue(EnqueueRequest("q", "yaml", {"a": 1}, id="1", codec=Yaml()))
        client.enqueue(Thumbnail(bytes(range(256))), id="2")
        client.bulk_enqueue([EnqueueRequest("q", "raw", b"\0", id="3", codec=RawCodec())])
    stored = conn.execute("select arg from bgjob_job order by id").fetchall()
    assert stored == [(b"a: 1\n",), (bytes(range(256)),), (b"\0",)]


def test_the_library_never_unpickles_or_evaluates() -> None:
    forbidden = re.compile(r"\b(pickle|marshal|shelve|dill|cloudpickle)\b|(?<![\w.])(eval|exec)\(")
    sources = list(Path(bgjob.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    assert [str(path) for path in sources if forbidden.search(path.read_text("utf-8"))] == []


# -- pydantic and msgspec -----------------------------------------------------------------


class PydanticItem(pydantic.BaseModel):
    price: float


class PydanticOrder(pydantic.BaseModel):
    job_type: ClassVar[str] = "order"
    queue: ClassVar[str] = "shop"
    number: int = pydantic.Field(alias="orderNumber", gt=0)
    items: list[PydanticItem] = []
    note: str | None = None


class MsgspecItem(msgspec.Struct, frozen=True):
    price: float


class MsgspecOrder(msgspec.Struct, frozen=True, rename={"number": "orderNumber"}):
    job_type: ClassVar[str] = "order"
    queue: ClassVar[str] = "shop"
    number: int
    items: list[MsgspecItem] = []
    note: str | None = None


both = pytest.mark.parametrize("cls", [PydanticOrder, MsgspecOrder])


def an_order(cls: Any, *prices: Any) -> Any:
    if cls is PydanticOrder:
        return PydanticOrder(orderNumber=7, items=[PydanticItem(price=price) for price in prices])
    return MsgspecOrder(number=7, items=[MsgspecItem(price) for price in prices])


@both
def test_a_model_is_a_job(cls: Any) -> None:
    order = an_order(cls, 1.5, 2)
    request = EnqueueRequest.of(order, delay=3)
    assert (request.queue, request.type, request.delay) == ("shop", "order", 3)
    assert request.payload is not None
    assert b'"orderNumber":7' in request.payload
    decoded = codec_of(cls).decode(request.payload)
    assert type(decoded) is cls and decoded == order


@both
@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'{"orderNumber":"many"}', r"field 'orderNumber': .*int"),
        (b'{"orderNumber":1,"items":[{"price":1},{"price":[]}]}', r"field 'items\[1\].price': "),
        (b"{}", "orderNumber"),
        (b"[]", ": .*object"),
        (b'{"orderNumber":1', ": "),
        (b"\xff", ": "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_payload_that_does_not_fit_a_model_is_refused_by_type_and_field(
    cls: Any, data: bytes, complaint: str
) -> None:
    with pytest.raises(PayloadError, match=f"^payload of job type 'order'.*{complaint}"):
        codec_of(cls).decode(data)


@both
def test_a_model_tolerates_fields_that_came_or_went(cls: Any) -> None:
    decoded = codec_of(cls).decode(b'{"orderNumber":7,"colour":"red"}')
    assert (decoded.number, decoded.items, decoded.note) == (7, [], None)


def test_a_models_own_validation_error_is_shown() -> None:
    with pytest.raises(PayloadError, match=r"field 'orderNumber': .*greater than 0 \(and 1 more\)"):
        codec_of(PydanticOrder).decode(b'{"orderNumber":-1,"note":5}')


def test_a_structs_own_validation_error_is_shown() -> None:
    class Positive(msgspec.Struct):
        n: int

        def __post_init__(self) -> None:
            if self.n < 0:
                raise ValueError("n is negative")

    with pytest.raises(PayloadError, match="payload of job type 'Positive': n is negative"):
        codec_of(Positive).decode(b'{"n":-1}')


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (MsgspecOrder(number="7"), "orderNumber"),  # type: ignore[arg-type]
        (an_order(MsgspecOrder, 1, math.inf), "items[1].price"),
        (an_order(PydanticOrder, 1, NAN), "items[1].price"),
        (PydanticOrder.model_construct(number="many"), "orderNumber"),
    ],
    ids=["struct", "struct inf", "model nan", "model"],
)
def test_a_model_that_would_not_be_decoded_is_refused_at_the_enqueue(
    value: Any, field: str
) -> None:
    complaint = re.escape(f"payload of job type 'order': field '{field}'")
    with pytest.raises(PayloadError, match=complaint):
        EnqueueRequest.of(value)


def test_a_model_that_cannot_be_written_is_refused_at_the_enqueue() -> None:
    items: Any = [object()]
    with pytest.raises(PayloadError, match="payload of job type 'order'"):
        EnqueueRequest.of(PydanticOrder.model_construct(number=1, items=items))
    with pytest.raises(PayloadError, match="payload of job type 'order': Encoding objects"):
        EnqueueRequest.of(MsgspecOrder(1, items))


def test_a_model_s_field_called_queue_is_no_option() -> None:
    class Line(pydantic.BaseModel):
        queue: str = "of people"
        priority: int = 3

    class Row(msgspec.Struct):
        queue: str = "of people"
        priority: int = 3

    for value in (Line(), Row()):
        request = EnqueueRequest.of(value, queue="real")
        assert (request.queue, request.priority) == ("real", 0)


def test_a_struct_that_msgspec_cannot_decode_is_refused_at_registration() -> None:
    class Odd(msgspec.Struct):
        both: int | str | MsgspecItem | dict[str, int]

    with pytest.raises(TypeError, match="more than one dict-like type"):
        codec_of(Odd)


@pytest.mark.parametrize("cls", [int, dict, object, type, Yaml, Client])
def test_a_class_that_is_no_job_type_is_refused_with_the_remedy(cls: Any) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__} is not a job type: make it a dataclass"):
        codec_of(cls)


@pytest.mark.parametrize("cls", ["SendMail", list[int], None])
def test_a_value_that_is_not_a_class_is_not_a_job_type(cls: Any) -> None:
    with pytest.raises(TypeError, match="a job's class must be a class"):
        codec_of(cls)


def test_a_payload_error_is_bgjob_s_and_a_value_error() -> None:
    assert issubclass(PayloadError, BgjobError) and issubclass(PayloadError, ValueError)


def test_a_type_s_name_is_a_str() -> None:
    @dataclass
    class Misnamed:
        job_type: ClassVar[Any] = 5

    with pytest.raises(TypeError, match="job_type of .*Misnamed must be a str, not int"):
        type_name(Misnamed)
