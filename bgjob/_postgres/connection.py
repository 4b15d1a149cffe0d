"""Connections with the library's defaults, which give up on a silent server."""

import asyncio
import contextlib
import inspect
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from math import ceil, inf
from typing import Any, Self, TypeAlias, cast

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.conninfo import conninfo_to_dict, timeout_from_conninfo
from psycopg.errors import ProtocolViolation
from psycopg.waiting import Ready, Wait
from typing_extensions import override

from bgjob._postgres import hosts, polling
from bgjob._postgres.event_loop import check_event_loop
from bgjob._postgres.pooler import check_mode

Given: TypeAlias = str | Mapping[str, Any]

Source: TypeAlias = str | Callable[[], Given]
"""A connection string; or a function that returns one, or the parameters by their names."""

AsyncSource: TypeAlias = str | Callable[[], Given | Awaitable[Given]]
"""The same of an AsyncClient, which also takes a coroutine function."""

ConnectionParameters: TypeAlias = tuple[AsyncSource, Mapping[str, Any] | Callable[[], Any]]
"""How to connect: a connection string, and keyword arguments. A function in the place of either
is called for each connection."""

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

WORKER_PATIENCE = 10.0
"""Seconds without an answer after which a worker gives up a connection."""

_MOMENT = 0.001
"""Seconds of waiting for the server after which `meanwhile` is called."""

_SLICE = 0.25
"""Seconds after which a wait checks whether the worker's time is over."""

_EVENTS = {
    Wait.R: polling.READ,
    Wait.W: polling.WRITE,
    Wait.RW: polling.READ | polling.WRITE,
}
_READY = {
    0: Ready.RW,  # an error or a hang-up: reading shows which
    polling.READ: Ready.R,
    polling.WRITE: Ready.W,
    polling.READ | polling.WRITE: Ready.RW,
}


_OF_SQLALCHEMY = re.compile(r"\Apostgres(?:ql)?\+\w+(?=://)")

_HIDDEN = "***"
"""Stands for the password in the text of SQLAlchemy's URLs."""


def check_conninfo(text: str) -> str:
    """Return a connection string for libpq, or raise ValueError if it is not one.

    The driver in a URL of SQLAlchemy (postgresql+psycopg://...) is left out. The error shows
    neither the text nor libpq's complaint: both may contain a password.
    """
    text, has_driver = _OF_SQLALCHEMY.subn("postgresql", text, count=1)
    try:
        parameters = conninfo_to_dict(text)
    except psycopg.Error:
        if has_driver:
            raise ValueError(
                "this URL of SQLAlchemy has parameters that libpq does not know: pass "
                "bgjob.ext.sqlalchemy.dsn(url), which translates them"
            ) from None
    else:
        if parameters.get("password") == _HIDDEN:
            raise ValueError(
                "the password is ***, which str() of a URL of SQLAlchemy shows in place of the "
                "real one: pass bgjob.ext.sqlalchemy.dsn(engine), or "
                "url.render_as_string(hide_password=False)"
            )
        # An unescaped @ in the password ends up in the host.
        if "@" not in str(parameters.get("host")):
            return text
    raise ValueError(
        "this is not a connection string; it looks like postgresql://user:password@host/database, "
        "with %40 for an @ in the password, or like 'host=... user=... dbname=...'"
    )


def checked_source(source: object, pool: type[Any]) -> Any:
    """Return a client's source; raise TypeError or ValueError if it is not one."""
    if isinstance(source, str):
        return check_conninfo(source)
    if isinstance(source, pool):
        return source
    text = (
        "source must be a connection string, a function that returns the connection parameters, "
        f"or a psycopg_pool.{pool.__name__}, not {type(source).__name__}"
    )
    if _package(source) == "sqlalchemy":
        raise TypeError(f"{text}: pass bgjob.ext.sqlalchemy.dsn() of it")
    if not callable(source):
        raise TypeError(text)
    if inspect.iscoroutinefunction(source) and not inspect.iscoroutinefunction(pool.getconn):
        raise TypeError(
            f"source is a coroutine function, which only an AsyncClient takes: {source}"
        )
    try:
        inspect.signature(source).bind()
    except TypeError:
        raise TypeError(f"source must be a function without arguments: {source!r}") from None
    except ValueError:
        pass  # a builtin: the call will show
    return source


def not_a_connection(conn: object, expected: type) -> str:
    """Return the text of the error for what is no connection of psycopg and of this colour."""
    package = _package(conn)
    if package in ("asyncpg", "sqlalchemy"):
        remedy = f"bgjob.ext.{package} enqueues on it"
    elif isinstance(conn, psycopg.BaseConnection):
        remedy = "a Client takes a Connection, an AsyncClient an AsyncConnection"
    else:
        remedy = "bgjob.sql.enqueue returns the statement for other drivers"
    return f"conn must be a psycopg.{expected.__name__}, not {type(conn).__name__}: {remedy}"


def _package(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def options(
    connection_parameters: ConnectionParameters, *, within: float | None = None
) -> dict[str, Any]:
    """Return the keyword arguments for connecting.

    Args:
        connection_parameters: of the user; they come before the library's defaults.
            Functions among them are called.
        within: seconds for all hosts together. Each one is given its part of them, rounded
            up, and 2 s at least, by psycopg. By default each has 10 s, or what the
            connection string says.

    """
    conninfo, kwargs = connection_parameters
    return _chosen(_asked(conninfo), _asked(kwargs), within)


async def options_async(connection_parameters: ConnectionParameters) -> dict[str, Any]:
    """Return the keyword arguments for connecting. Async variant of `options`.

    Raises:
        psycopg.InterfaceError: psycopg cannot work on this event loop.

    """
    check_event_loop()
    conninfo, kwargs = connection_parameters
    return _chosen(await _asked_async(conninfo), await _asked_async(kwargs), None)


class SourceError(psycopg.OperationalError):
    """A function that gives the connection parameters raised, or returned something else."""


def _asked(part: Any) -> Given:
    """Call a function that gives parameters; await what a coroutine function returned."""
    if not callable(part):
        return cast("Given", part)
    try:
        answer = part()
        # Here no event loop runs: on the threads of a worker, and on those of plain handlers.
        return _checked(asyncio.run(_of(answer)) if inspect.isawaitable(answer) else answer)
    except Exception as error:
        raise _source_failed(error) from error


async def _asked_async(part: Any) -> Given:
    if not callable(part):
        return cast("Given", part)
    try:
        answer = part()
        return _checked(await answer if inspect.isawaitable(answer) else answer)
    except Exception as error:
        raise _source_failed(error) from error


async def _of(answer: Awaitable[Any]) -> Any:
    return await answer


def _checked(answer: object) -> Given:
    if isinstance(answer, str):
        return check_conninfo(answer)
    if isinstance(answer, Mapping):
        return answer
    raise TypeError(
        "it must return a connection string, or a mapping such as {'host': ..., 'password': ...}, "
        f"not {type(answer).__name__}"
    )


def _source_failed(error: Exception) -> SourceError:
    return SourceError(
        "cannot connect: the function that gives the connection parameters failed: "
        f"{type(error).__name__}: {error}"
    )


def _chosen(conninfo: Given, kwargs: Given, within: float | None) -> dict[str, Any]:
    chosen = dict(_DEFAULTS)
    for given in (conninfo, kwargs):
        chosen |= conninfo_to_dict(given) if isinstance(given, str) else dict(given)
    if within is not None:
        hosts = str(chosen.get("host", "")).count(",") + 1
        limit = max(ceil(within / hosts), 1)
        chosen["connect_timeout"] = min(timeout_from_conninfo(chosen), limit)
    return chosen


def is_two_phase(connection: psycopg.BaseConnection[Any] | None) -> bool:
    """Whether a two-phase transaction (`tpc_begin`) is open: it must not notify."""
    return getattr(connection, "_tpc", None) is not None


class Silence(psycopg.OperationalError):
    """The server did not answer."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer from the server within {seconds:g} s")


class Connection(psycopg.Connection[Any]):
    """A connection that fails after `patience` seconds without an answer."""

    patience: float = inf
    """Seconds; any thread may change it while another one waits."""

    @classmethod
    @override
    def connect(cls, *args: Any, **kwargs: Any) -> Self:
        kwargs = hosts.ordered(kwargs)
        try:
            connection = super().connect(*args, **kwargs)
        except psycopg.OperationalError as error:
            hosts.not_connected(kwargs)
            _forget_attempt(error)
            raise
        hosts.connected(kwargs, connection)
        return connection

    @override
    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        return super().wait(_patient(gen, self), *args, **kwargs)


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """A connection that fails after `patience` seconds. Async variant of Connection."""

    patience: float = inf
    """Seconds; see Connection.patience."""

    @classmethod
    @override
    async def connect(cls, *args: Any, **kwargs: Any) -> Self:
        kwargs = hosts.ordered(kwargs)
        try:
            connection = await super().connect(*args, **kwargs)
        except psycopg.OperationalError as error:
            hosts.not_connected(kwargs)
            _forget_attempt(error)
            raise
        hosts.connected(kwargs, connection)
        return connection

    @override
    async def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        return await super().wait(_patient(gen, self), *args, **kwargs)


def _forget_attempt(error: psycopg.OperationalError) -> None:
    """Close the connection of an attempt that timed out.

    psycopg leaves it to the garbage collector: its variables are in the traceback, and that is in
    one of them. A server that answers late then keeps a session for each attempt, until it has no
    more for anybody (benchmarks/fleet.py).
    """
    traceback.clear_frames(error.__traceback__)


def _give_up(connection: Connection | AsyncConnection, gen: PQGen[Any]) -> None:
    """Close a connection whose query is open: nothing else can be sent on it."""
    connection.pgconn.finish()
    with contextlib.suppress(psycopg.Error):
        gen.close()


def _sends(connection: psycopg.BaseConnection[Any], wanted: Wait) -> bool:
    """Send what waits to be sent. True if a generator can continue that wants to write.

    psycopg asks the system whether the socket is writable, twice for each statement of a pipeline.
    Each such call may hand the interpreter to another thread.
    """
    return wanted & Wait.W > 0 and connection.pgconn.flush() == 0


def _patient(gen: PQGen[RV], connection: Connection | AsyncConnection) -> PQGen[RV]:
    # Both ways of waiting for the socket, sync and async, return from time to time without data.
    try:
        wanted = next(gen)
        since = time.monotonic()
        while True:
            ready = Ready.W if _sends(connection, wanted) else (yield wanted)
            if ready:
                since = time.monotonic()
            elif time.monotonic() >= since + connection.patience:
                hosts.silent(connection)
                _give_up(connection, gen)
                raise Silence(connection.patience)
            wanted = gen.send(ready)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    except ProtocolViolation as error:
        check_mode(error)
        raise


class WorkerConnection(Connection):
    """The connection of a control thread: each wait for the server ends."""

    patience = WORKER_PATIENCE

    meanwhile: Callable[[], object] = staticmethod(lambda: None)
    """Called when an answer takes more than a moment."""

    ends_at: Callable[[], float] = staticmethod(lambda: inf)
    """When to stop waiting for any answer."""

    @override
    def wait(self, gen: PQGen[RV], *_: Any, **__: Any) -> RV:
        # Only poll(): each system call here releases the interpreter to the handlers'
        # threads, and has to get it back.
        try:
            wanted = next(gen)
            while _sends(self, wanted):
                wanted = gen.send(Ready.W)
            poll = polling.poll()
            poll.register(self.pgconn.socket, _EVENTS[wanted])
            while True:
                ready = poll.poll(_MOMENT * 1000)
                if not ready:
                    self.meanwhile()
                    ready = self._wait_long(poll)
                if not ready:
                    hosts.silent(self)
                    raise Silence(self.patience)
                event = ready[0][1]
                again = gen.send(_READY[event & (polling.READ | polling.WRITE)])
                if again != wanted:
                    wanted = again
                    poll.modify(self.pgconn.socket, _EVENTS[wanted])
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        except BaseException:
            if inspect.getgeneratorstate(gen) == inspect.GEN_SUSPENDED:
                _give_up(self, gen)  # interrupted between a query and its answer
            raise

    def _wait_long(self, poll: polling.poll) -> list[tuple[int, int]]:
        end = time.monotonic() + self.patience
        while (left := min(end, self.ends_at()) - time.monotonic()) > 0:
            if ready := poll.poll(min(left, _SLICE) * 1000):
                return ready
        return []
