"""A notification that cannot be sent costs latency only."""

import asyncio
from typing import Any

import psycopg
from psycopg import sql
from support.waiting import eventually
from support.workers import Launcher, Recorder

from bgjob import AsyncClient, Client, EnqueueRequest, Job, MoveToDlq, Mux, Schedule, Schedules

# Before version 17 the queue of notifications has 8 GB, and cannot be filled here.
FULL = """
    create schema full_queue;
    create function full_queue.pg_notification_queue_usage() returns float8
        language sql as 'select 1.0::float8';
    create function full_queue.pg_notify(text, text) returns void language plpgsql as $$ begin
        raise program_limit_exceeded using message = 'too many notifications in the NOTIFY queue';
    end $$;
"""


def fill_queue(conn: psycopg.Connection[Any]) -> None:
    """Make notifications of later sessions fail, as when the notification queue is full."""
    conn.execute(FULL)
    conn.execute(
        sql.SQL("alter database {} set search_path = full_queue, pg_catalog, public").format(
            sql.Identifier(conn.info.dbname)
        )
    )


def holds_notify_lock(conn: psycopg.Connection[Any]) -> bool:
    [[held]] = conn.execute(
        "select count(*) from pg_locks l join pg_database d on d.oid = l.database "
        "where locktype = 'advisory' and granted and mode = 'ExclusiveLock' "
        "and datname = current_database()"
    ).fetchall()
    return bool(held)


def test_where_the_queue_of_notifications_is_full_all_goes_on_by_polling(
    launcher: Launcher, dsn: str, conn: psycopg.Connection
) -> None:
    fill_queue(conn)
    done: list[str] = []

    def handle(job: Job) -> MoveToDlq | None:
        done.append(job.id)
        return MoveToDlq("no") if job.id == "dies" and done.count("dies") == 1 else None

    recorder = Recorder()
    schedules = Schedules([Schedule("s", request=EnqueueRequest("q", "t"), every=1)])
    with Client(dsn) as client:
        worker = launcher.start(
            Mux().register("t", handle),
            observer=recorder,
            services=[schedules],
            poll_interval=0.2,
            concurrency=3,
        )
        assert eventually(lambda: holds_notify_lock(conn))
        client.enqueue(EnqueueRequest("q", "t", id="a"))
        assert eventually(lambda: holds_notify_lock(conn))
        client.enqueue(EnqueueRequest("q", "t", id="b", delay=0.01))
        client.bulk_enqueue([EnqueueRequest("q", "t", id=id_) for id_ in "cd"])
        client.bulk_enqueue([EnqueueRequest("q", "t", id=f"x{n:03}") for n in range(600)])
        keyed = [EnqueueRequest("q", "t", id=f"k{n}", exclusive="k") for n in range(5)]
        client.bulk_enqueue(keyed)
        client.enqueue(EnqueueRequest("q", "t", id="dies"))
        assert eventually(lambda: len(client.dlq.list()) == 1)
        assert eventually(lambda: holds_notify_lock(conn))
        assert client.dlq.requeue() == ["dies"]
        client.pause("q")
        client.enqueue(EnqueueRequest("q", "t", id="e"))
        assert client.resume("q")
        expected = {*"abcde", *(f"x{n:03}" for n in range(600)), *(r.id for r in keyed)}
        assert eventually(lambda: expected <= set(done) and done.count("dies") == 2)
        assert eventually(lambda: any(id_.startswith("schedule:") for id_ in done))
        assert eventually(lambda: holds_notify_lock(conn))
        assert launcher.shutdown(worker)
        assert sorted(id_ for id_ in done if id_ in expected) == sorted(expected)
    assert not recorder.of("error"), recorder.of("error")


def test_a_two_phase_transaction_enqueues_and_does_not_notify(
    launcher: Launcher, dsn: str, conn: psycopg.Connection
) -> None:
    done: list[str] = []

    def handle(job: Job) -> MoveToDlq | None:
        done.append(job.id)
        return MoveToDlq("no") if job.id == "dead" and len(done) == 1 else None

    launcher.start(Mux().register("t", handle), poll_interval=0.2)
    with Client(dsn) as client, psycopg.connect(dsn) as own:
        client.enqueue(EnqueueRequest("q", "t", id="dead"))
        assert eventually(lambda: len(client.dlq.list()) == 1)
        assert eventually(lambda: holds_notify_lock(conn))
        own.tpc_begin(conn.info.dbname)
        client.enqueue(EnqueueRequest("q", "t", id="a"), conn=own)
        client.bulk_enqueue([EnqueueRequest("q", "t", id="b")], conn=own)
        many = [EnqueueRequest("q", "t", id=f"x{n:03}") for n in range(600)]
        client.bulk_enqueue(many, conn=own)
        client.dlq.requeue(conn=own)
        client.resume("q", conn=own)
        own.tpc_prepare()
        assert done == ["dead"]
        own.tpc_commit()
        assert eventually(lambda: len(done) == 604)


def test_an_async_two_phase_transaction_enqueues_and_does_not_notify(
    launcher: Launcher, dsn: str, conn: psycopg.Connection
) -> None:
    done: list[str] = []
    launcher.start(Mux().register("t", lambda job: done.append(job.id)), poll_interval=0.2)
    assert eventually(lambda: holds_notify_lock(conn))

    async def enqueue() -> None:
        async with AsyncClient(dsn) as client, await psycopg.AsyncConnection.connect(dsn) as own:
            await own.tpc_begin(conn.info.dbname)
            await client.enqueue(EnqueueRequest("q", "t", id="a"), conn=own)
            await client.bulk_enqueue([EnqueueRequest("q", "t", id="b")], conn=own)
            await client.resume("q", conn=own)
            await own.tpc_prepare()
            await own.tpc_commit()

    asyncio.run(enqueue())
    assert eventually(lambda: set(done) == {"a", "b"})
