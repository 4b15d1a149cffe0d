"""Django's queries on the connection of a transactional handler.

The connection is psycopg's, in a transaction that the worker began and will end. For the block it
replaces Django's own connection of the alias in this thread: a wrapper of Django's class for it,
which takes itself to be inside of `atomic` and ends nothing. psycopg's connection is not changed;
the cursors bring Django's adapters with them.
"""

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, NoReturn

import psycopg
from django.conf import settings
from django.db import NotSupportedError, connections, transaction
from django.db.backends.postgresql import base
from psycopg.adapt import AdaptersMap
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from bgjob._sql.session import time_zone
from bgjob.ext.django._database import checked


def orm_of(conn: psycopg.Connection[Any], using: str = "default") -> AbstractContextManager[None]:
    """Return a context manager in which Django's queries are a part of a handler's transaction.

        @mux.handler("confirm", transactional=True)
        def confirm(job: Job, conn: psycopg.Connection) -> None:
            with orm_of(conn):
                Order.objects.filter(pk=job.json()["order"]).update(confirmed=True)
                enqueue(EnqueueRequest("mail", "thank"))

    The worker commits the transaction, with the job's settlement, or rolls it back. `atomic` makes
    savepoints, and the block is one: an exception that leaves it undoes what was done in it.
    `transaction.on_commit` raises, because Django does not learn of the commit: enqueue a job
    instead. Elsewhere in the handler, and in other threads, Django has its own connection.

    Args:
        conn: the connection; any other one of psycopg that is in a transaction will do.
        using: the alias whose queries it takes. The handler's connection is that of the worker's
            database, and the alias should be of the same one.

    Raises:
        TypeError: it is not such a connection; a coroutine handler's is none. Make the handler a
            plain function, or write SQL.
        ValueError: the connection is in no transaction.

    """
    return _orm_of(conn, using)


@contextmanager
def _orm_of(conn: psycopg.Connection[Any], using: str) -> Iterator[None]:
    if not isinstance(conn, psycopg.Connection):
        raise TypeError(
            f"conn must be a psycopg.Connection, not {type(conn).__name__}: make the transactional "
            "handler a plain function, because Django's queries cannot use an AsyncConnection"
        )
    if conn.info.transaction_status == TransactionStatus.IDLE:
        raise ValueError(
            "the connection is in no transaction: pass that of a transactional handler"
        )
    own: Any = checked(using)
    if own.connection is not conn:  # as it is in a test that drains its own transaction
        if not base.is_psycopg3:
            raise TypeError("Django uses psycopg2 here, and the connection is one of psycopg 3")
        kind: Any = type(own)
        wrapper = _borrowing(kind)(own.settings_dict, using)
        wrapper.borrow(conn)
        connections[using] = wrapper
    try:
        whole: Any = transaction.atomic(using)
        with whole:
            yield
    finally:
        connections[using] = own


@cache
def _borrowing(kind: Hashable) -> Any:
    """Return a subclass of Django's connection that has a transaction, and never ends it."""
    base_class: Any = kind

    class Borrowing(base_class):
        def borrow(self, conn: psycopg.Connection[Any]) -> None:
            self.connection = conn
            self.autocommit = False
            self.in_atomic_block = True
            if conn.info.parameter_status("TimeZone") != self.timezone_name:
                # Django reads times as in this zone. The transaction's end undoes it.
                with self.cursor() as cursor:
                    cursor.execute(time_zone(), [self.timezone_name])

        def create_cursor(self, name: str | None = None) -> Any:
            if name:
                server_side: Any = base.ServerSideCursor
                return _with_adapters(server_side)(
                    self.timezone, self.connection, name, scrollable=False, row_factory=tuple_row
                )
            binds = self.settings_dict["OPTIONS"].get("server_side_binding") is True
            cursor: Any = base.ServerBindingCursor if binds else base.Cursor
            return _with_adapters(cursor)(self.timezone, self.connection, row_factory=tuple_row)

        def on_commit(self, *_: Any, **__: Any) -> NoReturn:
            raise NotSupportedError(
                "transaction.on_commit does nothing inside of orm_of(): the worker commits, and "
                "Django does not learn of it. Enqueue a job, which the same commit makes visible"
            )

        def connect(self) -> NoReturn:
            raise NotSupportedError("the worker has ended this connection: the job's is over")

        def _nothing(self, *_: Any) -> None:
            pass

        close = close_if_unusable_or_obsolete = _commit = _rollback = _close = _nothing

    return Borrowing


@cache
def _with_adapters(kind: Hashable) -> Any:
    """Return a subclass of a cursor that has Django's adapters, and not its connection's."""
    base_class: Any = kind

    class Adapted(base_class):
        def __init__(self, zone: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._adapters = AdaptersMap(base.get_adapters_template(settings.USE_TZ, zone))
            self._reset()

    return Adapted
