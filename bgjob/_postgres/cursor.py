"""Cursors for the library's statements, and the values that they write and read.

They use psycopg's own adapters, whatever the program has registered for its own SQL.
"""

from collections.abc import Iterable
from datetime import datetime
from functools import cache
from typing import Any

import psycopg
from psycopg import postgres
from psycopg._encodings import pg2pyenc
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import AdaptersMap, Dumper, Loader
from psycopg.errors import UntranslatableCharacter
from psycopg.pq import Format
from psycopg.rows import TupleRow, tuple_row
from psycopg.types import TypesRegistry
from psycopg.types.array import ListBinaryDumper, register_all_arrays
from typing_extensions import override


class Texts(list[str | None]):
    """A parameter of type text[] that may hold None.

    psycopg writes lists as text, where a null is read as the word under `array_nulls = off`.
    """


class Payloads(list[bytes | None]):
    """A parameter of type bytea[]; see Texts; also for `standard_conforming_strings = off`."""


class Times(list[datetime | None]):
    """A parameter of type timestamptz[]; see Texts."""


class Floats(list[float | None]):
    """A parameter of type float8[]; see Texts."""


class Smallints(list[int | None]):
    """A parameter of type int2[]; see Texts."""


class ErrorTexts(list[str | None]):
    r"""A parameter of type text[]; characters that the server cannot hold become `\u2713`."""


_ARRAYS = {
    Texts: "text",
    ErrorTexts: "text",
    Payloads: "bytea",
    Times: "timestamptz",
    Floats: "float8",
    Smallints: "int2",
}


_SHOWN = 40  # characters


class _ErrorTextDumper(Dumper):
    """Writes text in the characters that both the server's and the client's encoding have."""

    format = Format.BINARY

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        self._codecs = ["utf-8"]
        if self.connection is not None:
            names = "server_encoding", "client_encoding"
            found = [_codec(self.connection.pgconn.parameter_status(n.encode())) for n in names]
            self._codecs = found

    @override
    def dump(self, obj: str) -> bytes:
        data = b""
        for codec in self._codecs:
            data = obj.encode(codec, "backslashreplace")
            obj = data.decode(codec)
        return data


@cache
def _codec(name: bytes | None) -> str:
    """Return Python's name of an encoding; UTF-8 for SQL_ASCII, ASCII for an unknown one."""
    try:
        return pg2pyenc(name or b"SQL_ASCII").replace("ascii", "utf-8")
    except psycopg.NotSupportedError:
        return "ascii"


def server_codec(connection: psycopg.BaseConnection[Any]) -> str:
    """Return Python's name of the encoding in which the server stores text."""
    return _codec(connection.pgconn.parameter_status(b"server_encoding"))


def client_codec(connection: psycopg.BaseConnection[Any]) -> str:
    """Return Python's name of the encoding in which text is sent to the server."""
    return _codec(connection.pgconn.parameter_status(b"client_encoding"))


class _ArrayDumper(ListBinaryDumper):
    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        if cls is ErrorTexts:
            self.sub_dumper = _ErrorTextDumper(str, context)


class _Context:
    """psycopg's own adapters, without those that a program has registered globally."""

    connection = None

    def __init__(self) -> None:
        types = TypesRegistry()
        postgres.register_default_types(types)
        self.adapters = AdaptersMap(types=types)
        postgres.register_default_adapters(self)
        register_all_arrays(self)
        for cls, name in _ARRAYS.items():
            info = types[name]
            attributes = {"oid": info.array_oid, "element_oid": info.oid}
            dumper = type(f"_{cls.__name__}Dumper", (_ArrayDumper,), attributes)
            self.adapters.register_dumper(cls, dumper)


class _TextLoader(Loader):
    """Reads text if the client's encoding is SQL_ASCII; psycopg would return bytes."""

    @override
    def load(self, data: Buffer) -> str:
        return str(data, "utf-8")


class _BinaryTextLoader(_TextLoader):
    format = Format.BINARY


_ADAPTERS = _Context().adapters

_ADAPTERS_OF_SQL_ASCII = AdaptersMap(_ADAPTERS)
for _name in ("text", "varchar", "bpchar", "name"):
    _ADAPTERS_OF_SQL_ASCII.register_loader(_name, _TextLoader)
    _ADAPTERS_OF_SQL_ASCII.register_loader(_name, _BinaryTextLoader)


def _adapters(connection: psycopg.BaseConnection[Any]) -> AdaptersMap:
    is_ascii = connection.pgconn.parameter_status(b"client_encoding") == b"SQL_ASCII"
    return _ADAPTERS_OF_SQL_ASCII if is_ascii else _ADAPTERS


class Cursor(psycopg.Cursor[TupleRow]):
    """A cursor for the library's statements, on any connection."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        super().__init__(connection, row_factory=tuple_row)

    @property
    @override
    def adapters(self) -> AdaptersMap:
        return _adapters(self.connection)


class AsyncCursor(psycopg.AsyncCursor[TupleRow]):
    """A cursor for the library's statements. Async variant of Cursor."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        super().__init__(connection, row_factory=tuple_row)

    @property
    @override
    def adapters(self) -> AdaptersMap:
        return _adapters(self.connection)


UNENCODABLE = (UntranslatableCharacter, UnicodeEncodeError)
"""The errors of a parameter with characters that the database cannot hold."""


def unencodable(
    connection: psycopg.BaseConnection[Any], values: Iterable[object], error: Exception
) -> Exception:
    """Return an error that names the text that the database cannot hold."""
    texts = [text for v in values for text in (v if isinstance(v, list) else (v,))]
    for name in (b"server_encoding", b"client_encoding"):
        encoding = connection.pgconn.parameter_status(name) or b""
        codec = _codec(encoding)
        for text in texts:
            if isinstance(text, str) and text.encode(codec, "ignore").decode(codec) != text:
                at = next(i for i, c in enumerate(text) if not c.encode(codec, "ignore"))
                shown = text if len(text) < _SHOWN else text[max(0, at - _SHOWN) : at + _SHOWN]
                return ValueError(
                    f"{shown!r} cannot be stored: the encoding {encoding.decode()} of the "
                    "database, or of the connection, does not have all its characters; use "
                    "another name, or a database in UTF8"
                )
    return error
