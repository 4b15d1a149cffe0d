"""A dataclass is a job: an enqueued value comes back equal, and other payloads are refused."""

import dataclasses
import random
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from typing import Annotated, Any, ClassVar, Generic, Literal, NewType, Optional, TypeVar, Union
from uuid import UUID

import orjson
import psycopg
import pytest
from support.clients import Colour
from support.database import row, rows
from support.waiting import eventually
from typing_extensions import TypeAliasType

from bgjob import Client as PlainClient
from bgjob import (
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    Mux,
    PayloadError,
    QueueRequiredError,
    TypeRequiredError,
    Worker,
)
from bgjob.codec import class_option, codec_of, type_name

T = TypeVar("T")

# To a type checker, annotations made at run time are not types.
LIST: Any = list
SET: Any = set
FROZENSET: Any = frozenset
TUPLE: Any = tuple
DICT: Any = dict
OPTIONAL: Any = Optional

Ids = TypeAliasType("Ids", list[int])
UserId = NewType("UserId", int)


class Colours(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Size(StrEnum):
    BIG = "big"


@dataclass(frozen=True)
class SendMail:
    to: str
    copies: int = 1


@dataclass(frozen=True)
class Urgent:
    text: str
    job_type: ClassVar[str] = "urgent.v2"
    queue: ClassVar[str] = "fast"
    priority: ClassVar[int] = -5


@dataclass(frozen=True)
class Item:
    price: Decimal
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    number: int
    items: list[Item]
    by_name: dict[str, Item] = field(default_factory=dict)


@dataclass(frozen=True)
class Tree:
    value: int
    left: "Tree | None" = None
    children: "tuple[Tree, ...]" = ()


def one_field(annotation: Any, **options: Any) -> Any:
    """Make a dataclass `Sample` with a field `x`."""
    return dataclasses.make_dataclass("Sample", [("x", annotation, field(**options))], frozen=True)


def there_and_back(annotation: Any, value: Any) -> Any:
    cls = one_field(annotation)
    codec = codec_of(cls)
    return codec.decode(codec.encode(cls(value))).x


def identical(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of the same types throughout."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, list | tuple):
        return all(map(identical, one, other))
    if isinstance(one, dict):
        return all(map(identical, one.items(), other.items()))
    if isinstance(one, set | frozenset):
        return {(type(item), item) for item in one} == {(type(item), item) for item in other}
    if dataclasses.is_dataclass(one):
        names = [f.name for f in dataclasses.fields(one)]
        return all(identical(getattr(one, name), getattr(other, name)) for name in names)
    return True


# -- there and back -----------------------------------------------------------------------


class Random:
    """Draws annotations and values of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        r = self.rng
        self.scalars: dict[Any, Callable[[], Any]] = {
            str: self.text,
            int: lambda: r.choice([0, -1, 2**64 - 1, -(2**63), r.randrange(-(10**6), 10**6)]),
            float: lambda: r.choice([0.0, -0.0, 1e-300, 1.7e308, r.uniform(-1e6, 1e6), 3.0]),
            bool: lambda: r.random() < 0.5,
            None: lambda: None,
            datetime: lambda: datetime(
                r.randrange(1, 9999), r.randrange(1, 13), r.randrange(1, 29), r.randrange(24)
            ).replace(microsecond=r.choice([0, 1, 123_000, 999_999]), tzinfo=self.zone()),
            date: lambda: date(r.randrange(1, 10_000), r.randrange(1, 13), r.randrange(1, 29)),
            time: lambda: time(r.randrange(24), 5, 6, r.choice([0, 7]), tzinfo=self.zone()),
            timedelta: lambda: r.choice(
                [timedelta.min, timedelta(r.randrange(-9999, 9999), r.random(), r.choice([0, 1]))]
            ),
            UUID: lambda: UUID(int=r.getrandbits(128)),
            Decimal: lambda: Decimal(r.choice(["0", "-0.00", "1E+400", "1.10", f"{r.random()}"])),
            Colours: lambda: r.choice(list(Colours)),
            Level: lambda: r.choice(list(Level)),
            Size: lambda: Size.BIG,
            Literal["a", 1, True, None, Colours.RED]: lambda: r.choice(
                ["a", 1, True, None, Colours.RED]
            ),
        }

    def zone(self) -> timezone | None:
        minutes = self.rng.choice([0, 60, -345, 1439])
        return self.rng.choice([None, timezone(timedelta(minutes=minutes, seconds=17)), UTC])

    def text(self) -> str:
        characters = string.printable + '"\\\0é\u2028\uffff\U0001f600'
        return "".join(self.rng.choices(characters, k=self.rng.randrange(6)))

    def draw(self, depth: int = 3, *, hashable: bool = False) -> tuple[Any, Callable[[], Any]]:
        """Return an annotation, and a function that draws a value of it."""
        r = self.rng
        kinds = ["scalar"] * 2 + ["optional", "union", "tuple", "row", "frozenset"]
        kinds += [] if hashable else ["list", "set", "dict", "dataclass", "any"]
        kind = r.choice(kinds) if depth else "scalar"

        def size() -> range:
            return range(r.randrange(4))

        if kind == "scalar":
            annotation: Any = r.choice(list(self.scalars))
            return annotation, self.scalars[annotation]
        if kind == "any":
            return Any, lambda: self.json(2)
        if kind == "union":
            of = [r.choice([str, datetime, UUID, Size]), int, r.choice([float, bool]), None]
            r.shuffle(of)
            return Union[*of], lambda: self.scalars[r.choice(of)]()
        if kind == "row":
            parts = [self.draw(depth - 1, hashable=hashable) for _ in size()]
            return TUPLE[*(a for a, _ in parts)], lambda: tuple(make() for _, make in parts)
        if kind == "dict":
            key = r.choice([str, int, UUID, date, Decimal, Colours, Size])
            inner, make = self.draw(depth - 1)
            return DICT[key, inner], lambda: {self.scalars[key](): make() for _ in size()}
        if kind == "dataclass":
            parts = [self.draw(depth - 1) for _ in size()]
            cls: Any = dataclasses.make_dataclass(
                "Part", [(f"f{n}", annotation) for n, (annotation, _) in enumerate(parts)]
            )
            return cls, lambda: cls(*(make() for _, make in parts))
        inner, make = self.draw(depth - 1, hashable=hashable or kind in ("set", "frozenset"))
        if kind == "optional":
            if inner in (None, Any) or type(None) in getattr(inner, "__args__", ()):
                return inner, make
            return OPTIONAL[inner], lambda: make() if r.random() < 0.7 else None
        if kind == "tuple":
            return TUPLE[inner, ...], lambda: tuple(make() for _ in size())
        return {
            "list": (LIST[inner], lambda: [make() for _ in size()]),
            "set": (SET[inner], lambda: {make() for _ in size()}),
            "frozenset": (FROZENSET[inner], lambda: frozenset(make() for _ in size())),
        }[kind]

    def json(self, depth: int = 3) -> Any:
        r = self.rng
        kind = r.choice(
            ["str", "int", "float", "bool", "none", "list", "dict"][: 7 if depth else 5]
        )
        match kind:
            case "list":
                return [self.json(depth - 1) for _ in range(r.randrange(3))]
            case "dict":
                return {self.text(): self.json(depth - 1) for _ in range(r.randrange(3))}
        return self.scalars[
            {"none": None, "str": str, "int": int, "float": float}.get(kind, bool)
        ]()


@pytest.mark.parametrize("seed", range(20))
def test_an_enqueued_value_comes_back_equal_and_of_the_same_types(seed: int) -> None:
    draw = Random(seed)
    for _ in range(40):
        annotation, make = draw.draw()
        cls = one_field(annotation)
        codec = codec_of(cls)
        for _ in range(5):
            value = cls(make())
            decoded = codec.decode(codec.encode(value))
            assert identical(decoded, value), (annotation, value, decoded)


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_are_decoded_or_refused_by_type_and_never_half(seed: int) -> None:
    draw = Random(seed)
    refused = 0
    for _ in range(40):
        annotation, make = draw.draw()
        cls = one_field(annotation)
        codec = codec_of(cls)
        fitting = orjson.loads(codec.encode(cls(make())))
        for _ in range(5):
            other = draw.json() if draw.rng.random() < 0.5 else mutated(fitting, draw)
            data = orjson.dumps(draw.rng.choice([other, {"x": other}]))
            try:
                value = codec.decode(data)
            except PayloadError as error:
                assert str(error).startswith("payload of job type 'Sample'")
                refused += 1
            else:
                assert identical(codec.decode(codec.encode(value)), value), (annotation, data)
    assert refused > 50


def mutated(value: Any, draw: Random) -> Any:
    match value:
        case dict() if value:
            key = draw.rng.choice(list(value))
            return value | {key: mutated(value[key], draw)}
        case list() if value:
            return [*value[:-1], mutated(value[-1], draw)]
    return draw.json(1)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (UserId, UserId(5)),
        (Annotated[list[Annotated[int, "positive"]], "many"], [1]),
        (Ids, [1, 2]),
        (object, {"a": [1, None]}),
        (list, [1, "a", [None]]),
        (dict, {"a": {"b": 1.5}}),
        (tuple, (1, "a", {})),
        (tuple[()], ()),
        (Any | None, None),
        (dict[Any, int], {"a": 1}),
        (Literal["auto"] | int | None, "auto"),
        (Literal["auto"] | int | None, 5),
        (SendMail | list[int], SendMail("x")),
        (SendMail | list[int], [1]),
        (Tree, Tree(1, Tree(2, None, (Tree(3),)), (Tree(4), Tree(5)))),
        (Order, Order(number=1, items=[Item(Decimal("1.5"))], by_name={"a": Item(Decimal(2))})),
    ],
    ids=str,
)
def test_all_the_ways_to_write_an_annotation_work(annotation: Any, value: Any) -> None:
    assert identical(there_and_back(annotation, value), value)


@pytest.mark.parametrize("value", [3, 2**53, Level.LOW])
def test_an_int_is_taken_for_a_float_and_becomes_one(value: int) -> None:
    decoded = there_and_back(float, value)
    assert (type(decoded), decoded) == (float, value)


@pytest.mark.parametrize("annotation", [int | float, float | int])
def test_an_int_stays_an_int_where_both_may_be(annotation: Any) -> None:
    assert [type(there_and_back(annotation, value)) for value in (3, 3.0)] == [int, float]


def test_members_of_an_enum_are_accepted_as_their_plain_values() -> None:
    assert there_and_back(str, Size.BIG) == "big"
    assert there_and_back(dict[str, int], {Size.BIG: Level.HIGH}) == {"big": 2}


def test_fields_that_the_class_computes_are_not_stored() -> None:
    @dataclass
    class Square:
        side: float
        unit: InitVar[str] = "cm"
        area: float = field(init=False)
        label: bytes = field(init=False, default=b"")

        def __post_init__(self, unit: str) -> None:
            self.area = self.side**2

    codec = codec_of(Square)
    assert codec.encode(Square(3)) == b'{"side":3.0}'
    assert codec.decode(b'{"side":3}') == Square(3)


def test_the_fields_of_an_ancestor_come_along() -> None:
    @dataclass(frozen=True)
    class Letter(SendMail):
        stamp: Decimal = Decimal(1)

    value = Letter("x", 2, Decimal("0.85"))
    assert identical(codec_of(Letter).decode(codec_of(Letter).encode(value)), value)


# -- what does not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "data", "complaint"),
    [
        (SendMail, b'{"to":5}', "field 'to' must be str, not int"),
        (SendMail, b'{"to":"x","copies":true}', "field 'copies' must be int, not bool"),
        (SendMail, b'{"to":"x","copies":1.0}', "field 'copies' must be int, not float"),
        (SendMail, b'{"to":null}', "field 'to' must be str, not None"),
        (SendMail, b'{"copies":1}', "field 'to' is missing"),
        (Order, b'{"number":1,"items":[{"price":"1"},{"price":2}]}', r"field 'items[1].price' "),
        (Order, b'{"number":1,"items":[{"tags":[]}]}', "field 'items[0].price' is missing"),
        (
            Order,
            b'{"number":1,"items":[],"by_name":{"a":{"price":"1","tags":[1]}}}',
            "field \"by_name['a'].tags[0]\" must be str, not int",
        ),
        (Order, b'{"number":1,"items":{}}', "field 'items' must be list, not dict"),
        (Order, b'{"number":1,"items":[5]}', "field 'items[0]' must be a dict with the fields of"),
        (Tree, b'{"value":1,"left":{"value":""}}', "field 'left.value' must be int, not str"),
        (Tree, b'{"value":1,"left":[]}', "field 'left' must be Tree | None, not list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_payload_that_does_not_fit_is_refused_by_type_and_path(
    cls: Any, data: bytes, complaint: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        codec_of(cls).decode(data)
    assert str(caught.value).startswith(f"payload of job type '{cls.__name__}': ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"to": NaN}', b"'x'"])
def test_a_payload_that_is_not_json_is_refused_by_type(data: bytes) -> None:
    with pytest.raises(PayloadError, match="payload of job type 'SendMail' is not JSON: "):
        codec_of(SendMail).decode(data)


@pytest.mark.parametrize("data", [b"[]", b"null", b'"x"', b"1"])
def test_a_payload_that_is_not_an_object_is_refused_by_type(data: bytes) -> None:
    with pytest.raises(PayloadError, match="'SendMail' must be a dict with the fields of SendMail"):
        codec_of(SendMail).decode(data)


@pytest.mark.parametrize(
    ("annotation", "data", "complaint"),
    [
        (datetime, "tomorrow", "must be a datetime in ISO 8601"),
        (datetime, 1_700_000_000, "must be a datetime in ISO 8601, not int"),
        (date, "2030-02-30", "must be a date in ISO 8601"),
        (time, "25:00", "must be a time in ISO 8601"),
        (timedelta, "PT1S", "must be float, not str"),
        (timedelta, 1e300, "must be seconds that a timedelta can hold"),
        (UUID, "12", "must be a UUID"),
        (Decimal, "one", "must be a decimal number in a str"),
        (Decimal, "sNaN", "must be a finite Decimal"),
        (Colours, "green", "must be one of 'red', 'blue'"),
        (Colours, ["red"], "must be one of 'red', 'blue'"),
        (Level, True, "must be one of 1, 2"),
        (Literal[1, 2], 1.0, "must be one of 1, 2"),
        (Literal["a"], "b", "must be one of 'a'"),
        (int | None, "1", r"must be int \| None, not str"),
        (set[Any], [[1]], "must be a list of what a set can hold"),
        (tuple[int, str], [1], "must have 2 items, not 1"),
        (tuple[int, str], [1, 2], r"\[1\]' must be str, not int"),
        (tuple[int, ...], "ab", "must be list, not str"),
        (dict[int, str], {"01": "a"}, "must have an int as its key"),
        (dict[int, str], {"a": "a"}, "must have an int as its key"),
        (dict[str, int], [], "must be dict, not list"),
        (dict[UUID, int], {"a": 1}, "must be a UUID"),
        (float, 2**70, "must be"),
        (None, 0, "must be None, not int"),
    ],
    ids=str,
)
def test_the_error_about_a_field_describes_its_type(
    annotation: Any, data: Any, complaint: str
) -> None:
    codec = codec_of(one_field(annotation))
    if isinstance(data, int) and data > 2**64:
        assert codec.decode(b'{"x": %d}' % data).x == float(data)  # JSON has but numbers
        data = "1"
    with pytest.raises(
        PayloadError, match=rf"^payload of job type 'Sample': field ['\"]x.*{complaint}"
    ):
        codec.decode(orjson.dumps({"x": data}))


@pytest.mark.parametrize(
    ("annotation", "value", "complaint"),
    [
        (str, 5, "field 'x' must be str, not int"),
        (str, "\ud800", "field 'x' must be valid Unicode"),
        (list[str], ["", "\udfff"], r"field 'x\[1\]' must be valid Unicode"),
        (int, True, "must be int, not bool"),
        (int, 2**64, "must be an int from"),
        (bool, 1, "must be bool, not int"),
        (float, float("nan"), "must be a finite float"),
        (float, 10**400, "must be a finite float"),
        (float, 2**53 + 1, "must be an int that a float can hold"),
        (Any, [{"a": (1,)}], r"x\[0\]\['a'\].* must be a JSON value .*, not tuple"),
        (Any, {1: 2}, r"field 'x\[1\]' must be str, not int"),
        (Any, float("inf"), "must be a finite float"),
        (Any, Size.BIG, "must be a JSON value"),
        (date, datetime(2030, 1, 1), "must be date, not datetime"),
        (datetime, "2030-01-01", "must be datetime, not str"),
        (timedelta, 5, "must be timedelta, not int"),
        (timedelta, timedelta.max, "must be a timedelta whose seconds a float can hold"),
        (Decimal, Decimal("nan"), "must be a finite Decimal"),
        (Decimal, 5, "must be Decimal, not int"),
        (Colours, "red", "must be one of 'red', 'blue'"),
        (Literal[1], True, "must be one of 1"),
        (Literal[1], [], "must be one of 1"),
        (list[int], (1,), "must be list, not tuple"),
        (tuple[int, int], (1,), "must have 2 items, not 1"),
        (tuple[int], [1], "must be tuple, not list"),
        (set[int], frozenset(), "must be set, not frozenset"),
        (dict[int, int], {"1": 1}, "must be int, not str"),
        (SendMail | None, 5, r"must be SendMail \| None, not int"),
        (SendMail | None, SendMail(5), r"field 'x.to' must be str"),  # type: ignore[arg-type]
        (SendMail, Item(Decimal(1)), "must be SendMail, not Item"),
        (int | None, True, r"must be int, not bool"),
        (None, 0, "must be None, not int"),
        (dict[str, int], [], "must be dict, not list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_would_not_come_back_equal_is_refused_at_the_enqueue(
    annotation: Any, value: Any, complaint: str
) -> None:
    cls = one_field(annotation)
    with pytest.raises(PayloadError, match=f"^payload of job type 'Sample': .*{complaint}"):
        EnqueueRequest.of(cls(value), queue="q")


def test_a_value_of_a_subclass_is_not_cut_short() -> None:
    @dataclass(frozen=True)
    class Parcel(Item):
        weight: int = 0

    with pytest.raises(PayloadError, match=r"'items\[0\]' must be Item, not Parcel"):
        codec_of(Order).encode(Order(number=1, items=[Parcel(Decimal(1))]))


def test_a_classs_own_validation_error_is_shown_with_its_path() -> None:
    @dataclass(frozen=True)
    class Percent:
        value: int

        def __post_init__(self) -> None:
            if self.value > 100:
                raise ValueError(f"{self.value} is over 100")

    codec: Any = codec_of(dataclasses.make_dataclass("Sale", [("off", list[Percent])]))
    with pytest.raises(PayloadError) as caught:
        codec.decode(b'{"off":[{"value":1},{"value":101}]}')
    assert str(caught.value) == (
        "payload of job type 'Sale': field 'off[1]' is refused by Percent: 101 is over 100"
    )
    assert type(caught.value.__cause__) is ValueError


def test_a_payload_of_any_depth_is_decoded_or_refused() -> None:
    deep = b'{"value":1,"left":' * 5000 + b"null" + b"}" * 5000
    with pytest.raises(PayloadError, match="payload of job type 'Tree'"):
        codec_of(Tree).decode(deep)
    within = b'{"value":1,"left":' * 900 + b"null" + b"}" * 900
    with pytest.raises(PayloadError, match="payload of job type 'Tree' is nested too deeply"):
        codec_of(Tree).decode(within)
    tree = Tree(0)
    for n in range(2000):
        tree = Tree(n, tree)
    with pytest.raises(PayloadError, match="payload of job type 'Tree'"):
        codec_of(Tree).encode(tree)


def test_an_error_never_shows_the_value_of_the_field() -> None:
    secret = "hunter2"
    codec = codec_of(one_field(datetime | int | None))
    for data in ({"x": secret}, {"x": [secret]}, {secret: 1}):
        with pytest.raises(PayloadError) as caught:
            codec.decode(orjson.dumps(data))
        assert secret not in str(caught.value)


# -- a rolling deploy ---------------------------------------------------------------------


def test_a_field_that_was_added_with_a_default_gets_it() -> None:
    assert codec_of(SendMail).decode(b'{"to":"x"}') == SendMail("x")
    decoded = codec_of(Order).decode(b'{"number":1,"items":[]}')
    assert decoded == Order(number=1, items=[])


def test_a_field_that_the_class_does_not_have_is_passed_over() -> None:
    data = b'{"to":"x","subject":"added by a newer release"}'
    assert codec_of(SendMail).decode(data) == SendMail("x")


# -- at registration ----------------------------------------------------------------------


# What Python 3.12's `type Endless = list[Endless]` is, also for 3.11.
Endless = type(
    "TypeAliasType",
    (),
    {"__value__": property(lambda self: LIST[self]), "__repr__": lambda self: "Endless"},
)()


@dataclass
class Holder(Generic[T]):
    x: T


@pytest.mark.parametrize(
    ("annotation", "complaint"),
    [
        (bytes, "JSON has no form for bytes: store text, for example base64, or give the class a"),
        (list[bytearray], "JSON has no form for bytearray"),
        (complex, "complex is not a type that decodes to an equal value; use str, int"),
        (Callable[[], int], "is not a type that decodes"),
        (type[int], "is not a type that decodes"),
        (PlainClient, "Client is not a type that decodes"),
        (Holder[int], "Holder.int. is not a type that decodes"),
        (Holder, "field 'x' of Holder: ~T is not a type that decodes"),
        (Flag("Bits", "A B"), "Bits is not a type that decodes"),
        (Enum("Odd", {"A": (1, 2)}), "JSON has no form for the value"),
        (Enum("Odd", {"A": float("nan")}), "must be a finite float"),
        (Literal[b"x"], "JSON has no form for the value b'x'"),
        (datetime | str, "JSON has str for both datetime and str: use a field of its own"),
        (SendMail | Item, "JSON has dict for both SendMail and Item"),
        (list[int] | set[int], "JSON has list for both"),
        (bool | Literal[True], "JSON has bool for both"),
        (timedelta | float, "JSON has (int|float) for both timedelta and float"),
        (dict[bool, int], "JSON has only text for the keys of a dict, and none for bool"),
        (dict[int | None, int], "JSON has only text for the keys"),
        (Endless, "a type alias that contains itself cannot be read"),
        (int | list[Order | bytes], "JSON has no form for bytes"),
    ],
    ids=str,
)
def test_an_annotation_that_cannot_come_back_is_refused_by_class_and_field(
    annotation: Any, complaint: str
) -> None:
    with pytest.raises(TypeError, match=f"^field 'x' of Sample: .*{complaint}"):
        codec_of(one_field(annotation))


def test_annotations_that_cannot_be_resolved_are_reported() -> None:
    class Local: ...

    with pytest.raises(TypeError, match="annotations of Sample cannot be read: name 'Local' is"):
        codec_of(one_field("Local"))


def test_a_class_that_its_fields_cannot_make_again_is_refused() -> None:
    @dataclass
    class Locked:
        name: str
        key: InitVar[str]

    with pytest.raises(TypeError, match="Locked cannot be made from its fields: 'key' is"):
        codec_of(Locked)


# -- enqueue ------------------------------------------------------------------------------


def test_the_class_names_the_type_and_may_name_more() -> None:
    assert (type_name(SendMail), type_name(Urgent)) == ("SendMail", "urgent.v2")
    request = EnqueueRequest.of(Urgent("now"))
    assert (request.queue, request.type, request.priority) == ("fast", "urgent.v2", -5)
    assert request.payload == b'{"text":"now"}'


def test_options_of_the_enqueue_override_those_of_the_class() -> None:
    noon = datetime(2030, 1, 1, 12, tzinfo=UTC)
    request = EnqueueRequest.of(Urgent("now"), queue="slow", priority=7, id="1", run_at=noon)
    assert (request.queue, request.priority, request.id) == ("slow", 7, "1")
    assert request.run_at == noon
    assert EnqueueRequest.of(Urgent("now"), priority=0).priority == 0


def test_a_field_of_a_typed_job_is_not_an_option() -> None:
    @dataclass(frozen=True, slots=True)
    class Row:
        queue: str
        priority: int = 9
        job_type: str = "field"

    request = EnqueueRequest.of(Row("of people"), queue="q")
    assert (request.queue, request.priority, request.type) == ("q", 0, "Row")
    assert class_option(Row, "queue") is None
    with pytest.raises(QueueRequiredError):
        EnqueueRequest.of(Row("of people"))


def test_a_typed_job_without_a_queue_is_refused_with_both_remedies() -> None:
    with pytest.raises(QueueRequiredError) as caught:
        EnqueueRequest.of(SendMail("x"))
    assert "`queue: ClassVar[str]` in SendMail" in str(caught.value)
    assert "(queue=...)" in str(caught.value)


def test_a_bad_option_is_refused_where_it_is_written() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'dely'"):
        EnqueueRequest.of(Urgent("now"), dely=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="delay must be from 0 seconds"):
        EnqueueRequest.of(Urgent("now"), delay=-1)
    with pytest.raises(TypeRequiredError):
        EnqueueRequest.of(unnamed(job_type=""))
    with pytest.raises(ValueError, match="priority must be an integer"):
        EnqueueRequest.of(unnamed(priority=10**6))


def unnamed(**options: Any) -> Any:
    cls = dataclasses.make_dataclass("Unnamed", [], namespace={"queue": "q"} | options)
    return cls()


@pytest.mark.parametrize("value", [SendMail, EnqueueRequest("q", "t")], ids=["class", "request"])
def test_an_object_that_is_not_a_typed_job_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="a typed job is a value of a class of yours"):
        EnqueueRequest.of(value, queue="q")


def test_a_typed_job_has_the_options_of_its_class_and_of_the_call(
    client: Any, conn: psycopg.Connection
) -> None:
    id_ = client.enqueue(SendMail("x"), queue="mail", delay=timedelta(hours=1), priority=3)
    client.enqueue(Urgent("now"), id="1")
    query = """
        select queue, type, arg, priority, next_run_at > clock_timestamp() from bgjob_job
        where id = %s
    """
    assert row(conn, query, id_) == ("mail", "SendMail", b'{"to":"x","copies":1}', 3, True)
    assert row(conn, query, "1") == ("fast", "urgent.v2", b'{"text":"now"}', -5, False)
    with pytest.raises(JobAlreadyExistsError):
        client.enqueue(Urgent("now"), id="1")


def test_a_typed_job_can_join_the_caller_s_transaction(
    colour: Colour, conn: psycopg.Connection
) -> None:
    caller = colour.connect()
    colour.client().enqueue(Urgent("now"), conn=caller)
    assert rows(conn, "select id from bgjob_job") == []
    caller.commit()
    assert len(rows(conn, "select id from bgjob_job")) == 1


def test_typed_jobs_are_written_in_bulk(client: Any, conn: psycopg.Connection) -> None:
    requests = [EnqueueRequest.of(SendMail(f"{n}"), queue="mail") for n in range(1000)]
    assert client.bulk_enqueue(requests) == [request.id for request in requests]
    stored = rows(conn, "select arg from bgjob_job order by id")
    decode = codec_of(SendMail).decode
    assert [decode(arg) for (arg,) in stored] == [SendMail(f"{n}") for n in range(1000)]


def test_options_beside_a_request_are_refused(client: Any, conn: psycopg.Connection) -> None:
    with pytest.raises(
        TypeError, match="delay, queue given together with a request: these options are"
    ):
        client.enqueue(EnqueueRequest("q", "t"), delay=5, queue="other")
    assert rows(conn, "select id from bgjob_job") == []


@pytest.mark.parametrize("value", ["text", 5, None, {"to": "x"}, [SendMail("x")]])
def test_an_object_that_is_not_a_job_is_refused(
    client: Any, conn: psycopg.Connection, value: Any
) -> None:
    with pytest.raises(TypeError, match="is not a job type: make it a dataclass"):
        client.enqueue(value, queue="q")
    assert rows(conn, "select id from bgjob_job") == []


def test_a_type_checker_knows_the_types_that_can_be_enqueued() -> None:
    client = PlainClient("host=nowhere")

    def checked() -> None:
        client.enqueue(EnqueueRequest("q", "t"))
        client.enqueue(SendMail("x"), queue="q", delay=1)
        client.enqueue("text")  # type: ignore[call-overload]
        client.enqueue(SendMail("x"), dely=1)  # type: ignore[call-overload]
        client.enqueue(SendMail("x"), delay="1")  # type: ignore[call-overload]

    assert callable(checked)


def test_a_worker_s_handler_decodes_what_another_thread_enqueued(dsn: str) -> None:
    received: list[SendMail] = []

    def handle(job: Job) -> None:
        assert job.arg is not None
        received.append(codec_of(SendMail).decode(job.arg))

    mux = Mux().register(type_name(SendMail), handle)
    with PlainClient(dsn) as client, Worker(client, "mail", mux):
        client.enqueue(SendMail("x", copies=2), queue="mail")
        assert eventually(lambda: received == [SendMail("x", copies=2)])


def test_a_codec_is_made_once_a_class() -> None:
    assert codec_of(SendMail) is codec_of(SendMail)


def test_neither_pydantic_nor_msgspec_is_imported_by_bgjob() -> None:
    program = """if True:
        import sys, dataclasses, bgjob
        cls = dataclasses.make_dataclass("Sample", [("x", int)])
        bgjob.EnqueueRequest.of(cls(1), queue="q")
        print({"pydantic", "msgspec", "pickle"} & set(sys.modules))
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("set()\n", "")
