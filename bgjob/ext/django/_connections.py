"""Middleware that leaves nothing of a job in Django's connections.

Around each job it does what Django does around a request: connections that are too old
(CONN_MAX_AGE) or do not work are closed, health checks are due, and in DEBUG the list of queries is
emptied. A web server has one request after another of the same code; a worker has strangers in a
row. So a connection that is kept is also brought to the state of a new one, in one round trip, and
one that a job left in a transaction is closed. A connection that was in a transaction before the
job belongs to a test, and is left alone.

A plain handler runs on a thread of the worker, and connections belong to threads. The queries of a
coroutine run on a thread of asgiref, which all coroutines of a process would share: here each job
gets its own, as each request does under ASGI, which ends with the job, and its connections with it.
A job without queries has no such thread.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import wraps
from typing import Any

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from django.db import connections
from django.db.backends.signals import connection_created

from bgjob._handlers.call import is_coroutine
from bgjob._postgres.pool import has_news
from bgjob._sql.session import forget_session


def tidy_connections(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler: close and check Django's connections before and after each job.

    `mux` has it. Pass it to a Mux of your own: Mux(middleware=[tidy_connections]).
    """
    if is_coroutine(handler):

        @wraps(handler)
        async def awaited(*args: Any) -> Any:
            async with _own_thread():
                return await handler(*args)

        return awaited

    @wraps(handler)
    def called(*args: Any) -> Any:
        with _tidied():
            return handler(*args)

    return called


@contextmanager
def _tidied() -> Iterator[None]:
    # The connections of this thread.
    before = connections.all(initialized_only=True)
    held = [connection.alias for connection in before if connection.in_atomic_block]
    for connection in before:
        if connection.alias not in held:
            _begin(connection)
    try:
        yield
    finally:
        for connection in connections.all(initialized_only=True):
            if connection.alias not in held:
                _end(connection)


@asynccontextmanager
async def _own_thread() -> AsyncIterator[None]:
    own: Any = ThreadSensitiveContext()
    await own.__aenter__()
    try:
        yield
    finally:
        try:
            executor = SyncToAsync.context_to_thread_executor.pop(own, None)
            if executor is not None:
                # After what a cancelled handler may have left running there. To leave the context
                # would be to wait for it in the loop.
                closing = executor.submit(_end_thread)
                executor.shutdown(wait=False)
                await asyncio.shield(asyncio.wrap_future(closing))
        finally:
            await own.__aexit__(None, None, None)


def _end_thread() -> None:
    for connection in connections.all(initialized_only=True):
        _end(connection)
        connection.close()


def _begin(connection: Any) -> None:
    connection.queries_log.clear()
    if _is_cut(connection):
        _drop(connection)
    connection.close_if_unusable_or_obsolete()


def _end(connection: Any) -> None:
    try:
        if connection.in_atomic_block or _is_cut(connection):
            _drop(connection)
        pool = getattr(connection, "pool", None)
        if not pool:
            connection.close_if_unusable_or_obsolete()
        if connection.connection is not None and connection.vendor == "postgresql":
            _forget(connection)
        if pool:
            connection.close_if_unusable_or_obsolete()
    except Exception:  # for example the server's end
        _drop(connection)


def _forget(connection: Any) -> None:
    """Bring a session to the state in which Django opens it."""
    own = connection.connection
    if connection.get_autocommit() != connection.settings_dict["AUTOCOMMIT"]:
        raise RuntimeError("a job left its connection without autocommit")
    with own.cursor() as cursor:
        cursor.execute(forget_session())
    if getattr(connection, "pool", None):
        connection._configure_connection(own)  # noqa: SLF001 (as the pool does)
    else:
        connection.init_connection_state()
        # The program's own settings of a session are made by its receivers.
        connection_created.send(sender=type(connection), connection=connection)
    connection.queries_log.clear()


def _drop(connection: Any) -> None:
    """Close a session whose state is unknown, and forget the transaction."""
    with suppress(Exception):
        if connection.connection is not None:
            connection.connection.close()  # a pool would roll back, and lend it again
        connection.in_atomic_block = False
        connection.close()
    with suppress(AttributeError):
        del connections[connection.alias]


def _is_cut(connection: Any) -> bool:
    """Whether the server has ended an idle session; costs no round trip."""
    own = connection.connection
    if own is None or connection.vendor != "postgresql":
        return False
    return has_news(own)
