"""What connections of the library and of its users need from psycopg.

Connections here give up on a server that has gone silent. Cursors here read and
write values in psycopg's own ways, whatever the program has registered for its own SQL.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from math import inf
from typing import Any, TypeAlias

import psycopg
from psycopg import postgres
from psycopg._encodings import pg2pyenc
from psycopg.abc import RV, AdaptContext, Buffer, PQGen
from psycopg.adapt import AdaptersMap, Dumper, Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import UntranslatableCharacter
from psycopg.pq import Format
from psycopg.rows import TupleRow, tuple_row
from psycopg.types import TypesRegistry
from psycopg.types.array import ListBinaryDumper, register_all_arrays
from typing_extensions import override

Recipe: TypeAlias = tuple[str, Mapping[str, Any]]
"""How to connect: a connection string, and keyword arguments."""

_DEFAULTS: dict[str, Any] = {
    "connect_timeout": 10,  # seconds
    # Of a network that is gone nobody else tells, for two hours by default.
    "keepalives_idle": 30,  # seconds
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
    # Of all settings this one is known to poolers, and is asked for while connecting.
    "client_encoding": "UTF8",
}


def check_conninfo(text: str) -> str:
    """Give a connection string back, or raise ValueError if it is none.

    Neither the text nor libpq's complaint is shown: both may hold a password.
    """
    try:
        host = conninfo_to_dict(text).get("host")
    except psycopg.Error:
        pass
    else:
        if "@" not in str(host):  # where a password holds one that is not escaped
            return text
    raise ValueError(
        "this is no connection string; it looks like postgresql://user:password@host/database, "
        "with %40 for an @ in the password, or like 'host=... user=... dbname=...'"
    )


def options(recipe: Recipe) -> dict[str, Any]:
    """Give the arguments with which to connect as a recipe says."""
    conninfo, kwargs = recipe
    return _DEFAULTS | conninfo_to_dict(conninfo) | dict(kwargs)


# -- values ---------------------------------------------------------------------------


class Texts(list[str | None]):
    """A parameter of type text[] that may hold None.

    psycopg writes lists as text, where a null is read as the word under `array_nulls = off`.
    """


class Payloads(list[bytes | None]):
    """A parameter of type bytea[]; as Texts, and for `standard_conforming_strings = off`."""


class Times(list[datetime | None]):
    """A parameter of type timestamptz[]; as Texts."""


class Floats(list[float | None]):
    """A parameter of type float8[]; as Texts."""


class Smallints(list[int | None]):
    """A parameter of type int2[]; as Texts."""


class ErrorTexts(list[str | None]):
    r"""A parameter of type text[]; what the server cannot hold is written as in `\u2713`."""


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
    """Writes text in what both the server's and the client's encoding have."""

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


def _codec(name: bytes | None) -> str:
    """Return Python's name of an encoding; what has none, and SQL_ASCII, takes any bytes."""
    try:
        return pg2pyenc(name or b"SQL_ASCII").replace("ascii", "utf-8")
    except psycopg.NotSupportedError:
        return "ascii"


def server_codec(connection: psycopg.BaseConnection[Any]) -> str:
    """Return Python's name of the encoding in which the server stores text."""
    return _codec(connection.pgconn.parameter_status(b"server_encoding"))


class _ArrayDumper(ListBinaryDumper):
    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        if cls is ErrorTexts:
            self.sub_dumper = _ErrorTextDumper(str, context)


class _Context:
    """psycopg's own adapters, without what a program has registered globally."""

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
    """Reads text where the client's encoding is SQL_ASCII; psycopg would give bytes."""

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
    """As Cursor, of an AsyncConnection."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        super().__init__(connection, row_factory=tuple_row)

    @property
    @override
    def adapters(self) -> AdaptersMap:
        return _adapters(self.connection)


UNENCODABLE = (UntranslatableCharacter, UnicodeEncodeError)
"""What is raised where a parameter has characters that the database cannot hold."""


def unencodable(
    connection: psycopg.BaseConnection[Any], values: Iterable[object], error: Exception
) -> Exception:
    """Return the error that names the text, among these, that the database cannot hold."""
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
                    "database, or of the connection, does not have all its characters; give "
                    "another name, or use a database in UTF8"
                )
    return error


# -- connections -----------------------------------------------------------------------


def is_two_phase(connection: psycopg.BaseConnection[Any] | None) -> bool:
    """Whether a two-phase transaction is open, begun with `tpc_begin`: it must not notify."""
    return connection is not None and connection._tpc is not None  # noqa: SLF001


class Silence(psycopg.OperationalError):
    """The server did not answer."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer from the server within {seconds:g} s")


class Connection(psycopg.Connection[Any]):
    """A connection whose `patience` with a silent server ends."""

    patience: float = inf
    """Seconds; may be changed, from any thread, while somebody waits."""

    @override
    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        return super().wait(_patient(gen, self), *args, **kwargs)


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """An async connection whose `patience` with a silent server ends."""

    patience: float = inf
    """As Connection.patience."""

    @override
    async def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        return await super().wait(_patient(gen, self), *args, **kwargs)


def _patient(gen: PQGen[RV], connection: Connection | AsyncConnection) -> PQGen[RV]:
    # Whoever waits for the socket, in either colour, comes back with nothing now and then.
    try:
        wanted = next(gen)
        since = time.monotonic()
        while True:
            ready = yield wanted
            if ready:
                since = time.monotonic()
            elif time.monotonic() >= since + connection.patience:
                connection.pgconn.finish()  # a question is open: nothing else can be asked
                with contextlib.suppress(psycopg.Error):
                    gen.close()
                raise Silence(connection.patience)
            wanted = gen.send(ready)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
