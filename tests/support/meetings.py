"""Enqueues that meet: calls that wait while a test holds up the insert of another one."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg

from bgjob import AsyncClient, Client, EnqueueRequest
from bgjob._shared import SharedInserts
from support.clients import Colour
from support.waiting import eventually

Call = Callable[[Any], Any]

LOCKED = """
    select pid from pg_stat_activity
    where wait_event_type = 'Lock' and datname = current_database()
"""
"""The sessions of the test's own database that wait for a lock."""


def asked(client: Any, request: EnqueueRequest, **options: Any) -> Call:
    """Return a call that enqueues, and returns the answer or the error."""

    async def enqueue(client: AsyncClient) -> Any:
        try:
            return await client.enqueue(request, **options)
        except Exception as error:
            return error

    def enqueue_here(client: Client) -> Any:
        try:
            return client.enqueue(request, **options)
        except Exception as error:
            return error

    return enqueue if isinstance(client.target, AsyncClient) else enqueue_here


def joined(client: Any) -> int:
    """Count the calls that wait for the next insert."""
    shared = client.target._shared
    if isinstance(shared, SharedInserts):
        return len(shared._waiting)
    return sum(len(inserts._waiting) for inserts in shared._loops.values())


def meeting(
    colour: Colour,
    conn: psycopg.Connection,
    client: Any,
    calls: Sequence[Call],
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Hold up the insert of a first call until all others wait; return all answers."""
    first = EnqueueRequest("first", "plain")
    with psycopg.connect(colour.dsn) as blocker, ThreadPoolExecutor(1) as thread:
        blocker.execute("lock table bgjob_job in share mode")
        running = thread.submit(
            colour.at_once, asked(client, first), *map(delayed, calls), client=client
        )
        assert eventually(lambda: joined(client) == len(calls) and conn.execute(LOCKED).fetchone())
        blocker.rollback()
        meanwhile()
        answers = running.result()
    assert answers[0] == first.id
    return answers


def delayed(call: Call) -> Call:
    """Return the call, made after the first one's insert has begun."""

    def later(client: Any) -> Any:
        if isinstance(client, Client):
            assert eventually(lambda: client._shared._newest is not None)
        return call(client)

    return later
