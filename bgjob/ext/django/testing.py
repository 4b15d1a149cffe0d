"""For tests of a Django project: run the due jobs, assert which jobs are enqueued.

    class Orders(TestCase):
        def test_an_order_is_confirmed(self):
            self.client.post("/orders", {"number": "5"})
            assert_enqueued("confirm", arg={"order": "5"})
            drain("mail")
            self.assertTrue(Order.objects.get(number="5").confirmed)

In a TestCase everything happens in the transaction of the test. In a TransactionTestCase jobs are
committed, and Django does not empty their tables between tests: `self.addCleanup(clear)`. With
pytest-django the fixtures `db` and `transactional_db` do the same.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NoReturn

import psycopg
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections, transaction
from psycopg.pq import TransactionStatus

from bgjob import testing
from bgjob._checks import Duration
from bgjob._sql.session import empty_tables
from bgjob.checkpoint import Store
from bgjob.ext.django._database import checked, driver, dsn
from bgjob.ext.django._mux import autodiscover
from bgjob.ext.django._mux import mux as _mux
from bgjob.job import Job
from bgjob.mux import Mux, Route
from bgjob.testing import Ran

__all__ = ["Ran", "adrain", "assert_enqueued", "assert_not_enqueued", "clear", "drain"]


def drain(
    queue: str,
    mux: Mux | None = None,
    *,
    using: str = "default",
    limit: int | None = None,
    within: Duration = 0.0,
    on_error: Literal["raise", "store"] = "raise",
) -> list[Ran]:
    """Run the due jobs of a queue, one after the other, until none is due.

    In a transaction, such as that of a TestCase, the jobs are run within it. An ordinary handler
    runs inside of a savepoint, to which a failed query is rolled back, because a worker would
    run it in autocommit; what it passes to `transaction.on_commit` is called when it has ended.
    The queries of coroutine handlers are in the transaction, too. Otherwise each step is
    committed, as in a worker. A batch handler is called for each job, with a list of it alone. A
    handler with a checkpoint finds what its job has saved.

    Args:
        queue: the queue.
        mux: the handlers; those of all apps by default.
        using: the alias of the database.
        limit: as for `bgjob.testing.drain`.
        within: as there.
        on_error: as there.

    Returns:
        The jobs that ran, in order, each with its stored result.

    Raises:
        TypeError: in a transaction, a transactional handler is a coroutine function: use a
            TransactionTestCase. Or a coroutine handler opens a transaction of its checkpoint:
            use a TransactionTestCase and `bgjob.testing.drain(dsn(), queue, mux)`. Or Django
            uses psycopg2.
        Exception: what a handler raised, and what `bgjob.testing.drain` raises.

    """
    __tracebackhide__ = True
    if mux is None:
        autodiscover()
        mux = _mux
    options: dict[str, Any] = {"limit": limit, "within": within, "on_error": on_error}
    if not checked(using).in_atomic_block:
        return testing.drain(dsn(using), queue, _on_this_thread(mux, _run), **options)
    mux = _on_this_thread(mux, partial(_run_within, using))
    return testing.drain(_of_test(using), queue, mux, **options)


async def adrain(
    queue: str,
    mux: Mux | None = None,
    *,
    using: str = "default",
    limit: int | None = None,
    within: Duration = 0.0,
    on_error: Literal["raise", "store"] = "raise",
) -> list[Ran]:
    """Run the due jobs of a queue, from a coroutine. Async variant of `drain`."""
    __tracebackhide__ = True
    options: dict[str, Any] = {"limit": limit, "within": within, "on_error": on_error}
    return await sync_to_async(drain)(queue, mux, using=using, **options)


def assert_enqueued(
    type: str | None = None,  # noqa: A002
    *,
    using: str = "default",
    queue: str | None = None,
    id: str | None = None,  # noqa: A002
    arg: Any = ...,
    count: int | None = None,
) -> list[Job]:
    """Assert that jobs are enqueued; return the matching ones.

    The arguments are those of `bgjob.testing.assert_enqueued`, with an alias in place of the
    source; uncommitted jobs of the test count.
    """
    __tracebackhide__ = True
    source = driver(using) or dsn(using)
    return testing.assert_enqueued(source, type, queue=queue, id=id, arg=arg, count=count)


def assert_not_enqueued(
    type: str | None = None,  # noqa: A002
    *,
    using: str = "default",
    queue: str | None = None,
    id: str | None = None,  # noqa: A002
    arg: Any = ...,
) -> None:
    """Assert that no matching job is enqueued; the arguments are those of assert_enqueued."""
    __tracebackhide__ = True
    assert_enqueued(type, using=using, queue=queue, id=id, arg=arg, count=0)


def clear(using: str = "default") -> None:
    """Delete all jobs, dead jobs, schedules and pauses: after a TransactionTestCase."""
    with checked(using).cursor() as cursor:
        cursor.execute(empty_tables())


def _of_test(using: str) -> psycopg.Connection[Any]:
    own = driver(using)
    if own is None:
        raise TypeError(
            "Django uses psycopg2 here, and jobs are run in the transaction of a test by psycopg "
            "3: install it, or use a TransactionTestCase"
        )
    return own


def _on_this_thread(mux: Mux, run: Callable[[Callable[..., Any], Job], Any]) -> Mux:
    """Return a Mux whose ordinary handlers are called by `run`, all of them plain functions.

    Under async_to_sync the queries of a coroutine use the connection of the calling thread.
    """

    def mapped(route: Route) -> Route:
        if not route.is_coroutine:
            return replace(route, handler=partial(run, route.handler))
        given = {each.name: getattr(route, each.name) for each in fields(route) if each.init}
        call: Any = async_to_sync(route.handler)
        return _OfCoroutine(**given | {"handler": partial(run, call), "is_coroutine": False})

    within = copy(mux)
    within._routes = {  # noqa: SLF001
        name: route if route.is_transactional else mapped(route)
        for name, route in mux._routes.items()  # noqa: SLF001
    }
    return within


@dataclass(frozen=True, slots=True)
class _OfCoroutine(Route):
    """The route of a coroutine handler that a plain function calls."""

    def holding(self, store: Any) -> Route:
        awaited: Any = _AwaitedStore(store)
        return Route.holding(self, awaited)


class _AwaitedStore:
    """A job's checkpoint for a coroutine, in a store of plain functions."""

    is_stopping = False

    def __init__(self, store: Store) -> None:
        self._store = store
        self.data = store.data

    async def save(self, data: bytes) -> None:
        await sync_to_async(self._store.save)(data)

    def transaction(self) -> NoReturn:
        raise TypeError(
            "checkpoint.transaction() gives a coroutine an AsyncConnection, and here everything "
            "happens on the connections of this thread: test the handler in a "
            "TransactionTestCase with bgjob.testing.drain(dsn(), queue, mux), or make it a plain "
            "function"
        )

    async def end(self) -> None:
        await sync_to_async(self._store.end)()


def _run_within(using: str, call: Callable[[Job], Any], job: Job) -> Any:
    """Run a handler inside of a savepoint of the test's transaction."""
    connection: Any = connections[using]
    before = len(connection.run_on_commit)
    answer, failure = None, None
    block: Any = transaction.atomic(using)
    with block:
        try:
            answer = call(job)
            while len(connection.run_on_commit) > before:
                _, hook, *_ = connection.run_on_commit.pop(before)
                hook()
        except BaseException as error:
            failure = error  # what the handler has written stays, as in autocommit
        if connection.connection.info.transaction_status == TransactionStatus.INERROR:
            transaction.set_rollback(True, using)
        del connection.run_on_commit[before:]
    if failure is not None:
        raise failure
    return answer


def _run(call: Callable[[Job], Any], job: Job) -> Any:
    return call(job)
