"""The headers of a job: a small JSON object beside its payload.

They are kept in a column of type json, in ASCII, which a database of any encoding can hold. That
type keeps the text as it is, so that a number comes back as it was written and the server need
not write it anew for each claim.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn, Self, TypeAlias, cast

import orjson
from typing_extensions import override

from bgjob.codec import has_non_finite

MOST_BYTES = 4096
"""Each claim, extension and retry of a job writes its row anew, with its headers."""

_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

_Items: TypeAlias = Mapping[str, Any] | Iterable[tuple[str, Any]]


class Headers(dict[str, Any]):
    """A dict that cannot be changed."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "headers cannot be changed: make others, for example {**job.headers, 'tenant': 7}"
        )

    __setitem__ = __delitem__ = _refuse
    clear = pop = popitem = setdefault = update = cast("Any", _refuse)

    @override
    def __ior__(self, other: _Items) -> Self:  # type: ignore[override]
        self._refuse()

    @override
    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self))  # the values may be lists

    @override
    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


NO_HEADERS: Final = Headers()


def checked(headers: Mapping[str, Any]) -> Headers:
    """Return headers as a claim will return them.

    Raises:
        TypeError: not a mapping from str, or a value that JSON cannot express.
        ValueError: too long, or a value that PostgreSQL cannot hold.

    """
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers must be a mapping from str, not {type(headers).__name__}")
    plain = dict(headers)
    for name in plain:
        if not isinstance(name, str):
            raise TypeError(f"headers must have names of type str, not {name!r}")
    try:
        data = orjson.dumps(plain)
    except TypeError as error:  # orjson's JSONEncodeError is one
        raise TypeError(f"headers cannot be encoded as JSON: {error}") from error
    if b"null" in data and has_non_finite(plain):
        raise ValueError("headers hold NaN or infinity, which JSON cannot express")
    if b"\\u0000" in data and _NUL.search(data):
        raise ValueError("headers must not contain NUL, which PostgreSQL cannot hold in a text")
    found = Headers(orjson.loads(data))
    size = len(data) if data.isascii() else len(stored(found) or "")
    if size > MOST_BYTES:
        raise ValueError(
            f"headers must have at most {MOST_BYTES:,} bytes as JSON in ASCII, not {size:,}, "
            "because each claim and retry writes them again: pass larger values in arg"
        )
    return found


def stored(headers: Mapping[str, Any]) -> str | None:
    """Return the text to store; None for no headers."""
    if not headers:
        return None
    data = orjson.dumps(headers)
    return data.decode() if data.isascii() else json.dumps(headers, separators=(",", ":"))


def read(text: str | None) -> Headers:
    """Return stored headers; none if a row that was written by hand has no JSON object."""
    if text is None:
        return NO_HEADERS
    try:
        value = orjson.loads(text)
    except ValueError:
        return NO_HEADERS
    return Headers(value) if isinstance(value, dict) else NO_HEADERS
