"""Connections with the library's defaults, which give up on a silent server."""

import contextlib
import time
from collections.abc import Mapping
from math import ceil, inf
from typing import Any, TypeAlias

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.conninfo import conninfo_to_dict, timeout_from_conninfo
from typing_extensions import override

ConnectionParameters: TypeAlias = tuple[str, Mapping[str, Any]]
"""How to connect: a connection string, and keyword arguments."""

_DEFAULTS: dict[str, Any] = {
    "connect_timeout": 10,  # seconds
    # Without keepalives a lost network is noticed after two hours by default.
    "keepalives_idle": 30,  # seconds
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
    # The only setting that poolers know; psycopg needs it while it connects.
    "client_encoding": "UTF8",
}


def check_conninfo(text: str) -> str:
    """Return a connection string, or raise ValueError if it is not one.

    The error shows neither the text nor libpq's complaint: both may contain a password.
    """
    try:
        host = conninfo_to_dict(text).get("host")
    except psycopg.Error:
        pass
    else:
        if "@" not in str(host):  # an unescaped @ in the password ends up in the host
            return text
    raise ValueError(
        "this is not a connection string; it looks like postgresql://user:password@host/database, "
        "with %40 for an @ in the password, or like 'host=... user=... dbname=...'"
    )


def options(
    connection_parameters: ConnectionParameters, *, within: float | None = None
) -> dict[str, Any]:
    """Return the keyword arguments for connecting.

    Args:
        connection_parameters: of the user; they come before the library's defaults.
        within: seconds for all hosts together. Each one is given its part of them, rounded
            up, and 2 s at least, by psycopg. By default each has 10 s, or what the
            connection string says.

    """
    conninfo, kwargs = connection_parameters
    chosen = _DEFAULTS | conninfo_to_dict(conninfo) | dict(kwargs)
    if within is not None:
        hosts = str(chosen.get("host", "")).count(",") + 1
        limit = max(ceil(within / hosts), 1)
        chosen["connect_timeout"] = min(timeout_from_conninfo(chosen), limit)
    return chosen


def is_two_phase(connection: psycopg.BaseConnection[Any] | None) -> bool:
    """Whether a two-phase transaction (`tpc_begin`) is open: it must not notify."""
    return connection is not None and connection._tpc is not None  # noqa: SLF001


class Silence(psycopg.OperationalError):
    """The server did not answer."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer from the server within {seconds:g} s")


class Connection(psycopg.Connection[Any]):
    """A connection that fails after `patience` seconds without an answer."""

    patience: float = inf
    """Seconds; any thread may change it while another one waits."""

    @override
    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        return super().wait(_patient(gen, self), *args, **kwargs)


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """A connection that fails after `patience` seconds. Async variant of Connection."""

    patience: float = inf
    """Seconds; see Connection.patience."""

    @override
    async def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        return await super().wait(_patient(gen, self), *args, **kwargs)


def give_up(connection: Connection | AsyncConnection, gen: PQGen[Any]) -> None:
    """Close a connection whose query is open: nothing else can be sent on it."""
    connection.pgconn.finish()
    with contextlib.suppress(psycopg.Error):
        gen.close()


def _patient(gen: PQGen[RV], connection: Connection | AsyncConnection) -> PQGen[RV]:
    # Both ways of waiting for the socket, sync and async, return from time to time without data.
    try:
        wanted = next(gen)
        since = time.monotonic()
        while True:
            ready = yield wanted
            if ready:
                since = time.monotonic()
            elif time.monotonic() >= since + connection.patience:
                give_up(connection, gen)
                raise Silence(connection.patience)
            wanted = gen.send(ready)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
