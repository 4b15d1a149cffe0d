"""A slot leaves nothing of one job to the next, and is missed where it ends."""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from test_worker import (
    Crew,
    Recorder,
    Style,
    all_done,
    both_styles,
    crew,
)

from bgjob import AsyncClient, Client, EnqueueRequest, Job, Mux
from bgjob.testing import adrain, drain

__all__ = ["crew"]


# -- context variables -----------------------------------------------------------------------------

tenant: contextvars.ContextVar[Any] = contextvars.ContextVar("tenant", default=None)


class Incomparable:
    """As an array of numpy: nobody can say whether two are equal."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]


def of_style(style: Style, body: Callable[[Job], Any], *, transactional: bool = False) -> Any:
    """Make a handler that changes its context before and after it has waited."""
    if style == "plain":
        return (lambda job, _: body(job)) if transactional else body

    async def coroutine(job: Job) -> Any:
        answer = body(job)
        await asyncio.sleep(0)
        return answer

    async def with_connection(job: Job, _: object) -> Any:
        return await coroutine(job)

    return with_connection if transactional else coroutine


def leaver(seen: list[Any], value: Callable[[], Any] = object) -> Callable[[Job], None]:
    """Make a body that tells what it finds, and leaves something."""

    def body(job: Job) -> None:
        seen.append(tenant.get())
        tenant.set(value())
        if job.id == "a3":
            raise ValueError("with the variable set")

    return body


@both_styles
@pytest.mark.parametrize(
    "policy",
    [{}, {"timeout": 60}, {"transactional": True}, {"exclusive": lambda job: job.id[-1]}],
    ids=["simple", "timeout", "transactional", "exclusive"],
)
def test_what_a_job_sets_in_its_context_is_not_seen_by_the_next(
    crew: Crew, conn: psycopg.Connection, style: Style, policy: dict[str, Any]
) -> None:
    seen: list[Any] = []
    body = leaver(seen)
    if "exclusive" in policy:

        def key(job: Job) -> str:
            seen.append(tenant.get())
            tenant.set("the key's")
            return job.id[-1]

        policy = {"exclusive": key}
    handler = of_style(style, body, transactional="transactional" in policy)
    register: Any = Mux().register
    mux = register("t", handler, backoff=lambda _: 0.0, max_attempts=2, **policy)
    crew.enqueue(*(f"a{n}" for n in range(20)))
    crew.start(mux, observer=[])
    assert all_done(conn)
    assert len(seen) >= 21
    assert set(seen) == {None}


@both_styles
@pytest.mark.parametrize("value", [Incomparable, list], ids=["incomparable", "equal"])
def test_values_of_any_kind_stay_behind(
    crew: Crew, conn: psycopg.Connection, style: Style, value: Callable[[], Any]
) -> None:
    seen: list[Any] = []
    crew.enqueue(*(f"b{n}" for n in range(10)))
    crew.start(Mux().register("t", of_style(style, leaver(seen, value))))
    assert all_done(conn)
    assert all(found is None for found in seen)


@both_styles
def test_what_the_observer_sets_for_a_job_is_seen_by_that_job_only(
    crew: Crew, conn: psycopg.Connection, style: Style
) -> None:
    class Tagger(Recorder):
        def job_started(self, job: Job, /) -> None:
            assert tenant.get() is None
            tenant.set(job.id)

    seen: list[tuple[str, Any]] = []
    crew.enqueue(*(f"b{n}" for n in range(10)))
    mux = Mux().register("t", of_style(style, lambda job: seen.append((job.id, tenant.get()))))
    crew.start(mux, observer=Tagger())
    assert all_done(conn)
    assert len(seen) == 10
    assert all(id == found for id, found in seen)


@both_styles
@pytest.mark.parametrize("transactional", [False, True], ids=["simple", "transactional"])
def test_do_gives_nothing_of_the_jobs_context_to_its_caller(
    dsn: str, style: Style, transactional: bool
) -> None:
    seen: list[Any] = []

    def body(job: Job) -> None:
        seen.append(tenant.get())
        tenant.set(job.id)

    def key(job: Job) -> str:
        tenant.set("the key's")
        return job.id

    handler = of_style(style, body, transactional=transactional)
    register: Any = Mux().register
    mux = register("t", handler, transactional=transactional, exclusive=key)

    async def do_async() -> Any:
        async with AsyncClient(dsn) as client:
            tenant.set("the caller's")
            for _ in range(2):
                await client.do("q", mux)
            for _ in range(2):
                await adrain(client, "q", mux, limit=1)
            return tenant.get()

    def do() -> Any:
        tenant.set("the caller's")
        for _ in range(2):
            client.do("q", mux)
        for _ in range(2):
            drain(client, "q", mux, limit=1)
        drain(client, "q", mux, limit=2)
        return tenant.get()

    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", id=f"c{n}") for n in range(10)])
        assert contextvars.copy_context().run(do) == "the caller's"
        assert asyncio.run(do_async()) == "the caller's"
    assert seen == ["the caller's"] * 10


@both_styles
def test_a_drain_on_the_tests_connection_leaves_its_context_alone(dsn: str, style: Style) -> None:
    seen: list[Any] = []
    mux = Mux().register("t", of_style(style, leaver(seen)))

    async def drain_async() -> Any:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            await adrain(conn, "q", mux)
        return tenant.get()

    with Client(dsn) as client:
        client.bulk_enqueue([EnqueueRequest("q", "t", id=f"d{n}") for n in range(5)])
        with psycopg.connect(dsn) as conn:
            contextvars.copy_context().run(drain, conn, "q", mux)
            assert tenant.get() is None
            conn.rollback()
        assert asyncio.run(drain_async()) is None
    assert seen == [None] * 10
