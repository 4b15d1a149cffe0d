"""Connections that give up on a server that has gone silent."""

import contextlib
import time
from collections.abc import Mapping
from math import inf
from typing import Any, TypeAlias

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.conninfo import conninfo_to_dict
from typing_extensions import override

Recipe: TypeAlias = tuple[str, Mapping[str, Any]]
"""How to connect: a connection string, and keyword arguments."""

_CONNECT_TIMEOUT = 10  # seconds


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
    return {"connect_timeout": _CONNECT_TIMEOUT, **conninfo_to_dict(conninfo), **kwargs}


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
