"""A process that forks while its client or worker is open: `python -m faults.forking CASE`.

The child ends as the case wants it: normally, with all that Python does then, where it is no child
of a running event loop.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

from psycopg import AsyncConnection, Connection
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from bgjob import AsyncClient, AsyncWorker, BgjobError, Client, EnqueueRequest, Job, Mux, Worker
from faults.app import (
    ENVIRONMENT,
    EventFile,
    Handlers,
    Ledger,
    Recorder,
    Settings,
    build,
    end_with_parent,
    serve,
    serve_async,
)

SETTINGS = Settings(**json.loads(os.environ[ENVIRONMENT]))
FILE = EventFile(SETTINGS.events)


def request(id: str) -> EnqueueRequest:
    return EnqueueRequest(SETTINGS.queue, "plain", id=id)


def fork(body: Callable[[], object], *, end: Callable[[int], Any]) -> None:
    """Run a function in a child, and wait until the child has ended."""
    child = os.fork()
    if child == 0:
        body()
        end(0)
    _, status = os.waitpid(child, 0)
    FILE.tell(("child", os.waitstatus_to_exitcode(status)))


def tried(what: str, call: Callable[[], object]) -> bool:
    """Run a call that may be refused, and report which; return whether it was done."""
    try:
        call()
    except (BgjobError, RuntimeError) as error:
        FILE.tell(("refused", what, str(error)))
        return False
    FILE.tell(("accepted", what))
    return True


def client() -> None:
    """Enqueue before the fork, in the child, and after it."""
    with Client(SETTINGS.dsn) as client:

        def body() -> None:
            client.enqueue(request("child"))
            client.close()

        client.enqueue(request("before"))
        fork(body, end=sys.exit)
        client.enqueue(request("after"))


async def async_client() -> None:
    async with AsyncClient(SETTINGS.dsn) as client:

        async def in_child() -> None:
            await client.enqueue(request("child"))
            await client.close()

        await client.enqueue(request("before"))
        fork(lambda: asyncio.run(in_child()), end=os._exit)
        await client.enqueue(request("after"))


def pool() -> None:
    """Like `client`, with a pool of the program's own."""
    with ConnectionPool(SETTINGS.dsn, min_size=1, max_size=1) as pool:
        client = Client(pool)
        client.enqueue(request("before"))
        fork(lambda: tried("enqueue", lambda: client.enqueue(request("child"))), end=os._exit)
        client.enqueue(request("after"))


def unused_pool() -> None:
    """Use a pool that was opened before the fork for the first time in the child.

    With a client that was made before the fork, as under `gunicorn --preload`, and with another.
    """
    with ConnectionPool(SETTINGS.dsn, min_size=1, max_size=1) as pool:
        pool.wait()
        client = Client(pool)

        def body() -> None:
            tried("enqueue", lambda: client.enqueue(request("child")))
            tried("enqueue", lambda: Client(pool).enqueue(request("child")))

        fork(body, end=os._exit)
        client.enqueue(request("after"))


async def async_unused_pool() -> None:
    async with AsyncConnectionPool(SETTINGS.dsn, min_size=1, max_size=1) as pool:
        await pool.wait()
        client = AsyncClient(pool)
        fork(
            lambda: tried("enqueue", lambda: asyncio.run(client.enqueue(request("child")))),
            end=os._exit,
        )
        await client.enqueue(request("after"))


def pool_of_child() -> None:
    """Make a pool before the fork, and open it in the child."""
    pool = ConnectionPool(SETTINGS.dsn, min_size=1, max_size=1, open=False)
    client = Client(pool)

    def body() -> None:
        with pool:
            tried("enqueue", lambda: client.enqueue(request("child")))
            tried("enqueue", lambda: Client(pool).enqueue(request("of a client of the child")))

    fork(body, end=os._exit)


async def async_pool() -> None:
    async with AsyncConnectionPool(SETTINGS.dsn, min_size=1, max_size=1) as pool:
        client = AsyncClient(pool)
        await client.enqueue(request("before"))
        fork(
            lambda: tried("enqueue", lambda: asyncio.run(client.enqueue(request("child")))),
            end=os._exit,
        )
        await client.enqueue(request("after"))


def worker() -> None:
    """Run a worker before the fork, use it in the child, and let it go on."""
    worker = build(SETTINGS, FILE)
    assert isinstance(worker, Worker)

    def body() -> None:
        tried("run", worker.run)
        tried("shutdown", worker.shutdown)

    worker.run()
    with Client(SETTINGS.dsn) as client:
        client.enqueue(request("before"))
        await_completion("before")
        fork(body, end=sys.exit)
        client.enqueue(request("after"))
        await_completion("after")
    worker.shutdown()


async def async_worker() -> None:
    worker = build(SETTINGS, FILE)
    assert isinstance(worker, AsyncWorker)

    def body() -> None:
        tried("run", lambda: asyncio.run(worker.run()))
        tried("shutdown", lambda: asyncio.run(worker.shutdown()))

    async with worker, AsyncClient(SETTINGS.dsn) as client:
        await client.enqueue(request("before"))
        await asyncio.to_thread(await_completion, "before")
        fork(body, end=os._exit)
        await client.enqueue(request("after"))
        await asyncio.to_thread(await_completion, "after")


def made() -> None:
    """Make a worker, and run it in a child, as servers do that fork their workers."""
    worker = build(SETTINGS, FILE)
    assert isinstance(worker, Worker)

    def body() -> None:
        if tried("run", worker.run):
            await_completion("before")
            FILE.tell(("stopped", worker.shutdown()))

    with Client(SETTINGS.dsn) as client:
        client.enqueue(request("before"))
        fork(body, end=sys.exit)


async def async_made() -> None:
    worker = build(SETTINGS, FILE)
    assert isinstance(worker, AsyncWorker)

    async def in_child() -> None:
        try:
            await worker.run()
        except BgjobError as error:
            FILE.tell(("refused", "run", str(error)))
        else:
            FILE.tell(("accepted", "run"))
            await asyncio.to_thread(await_completion, "before")
            FILE.tell(("stopped", await worker.shutdown()))

    async with AsyncClient(SETTINGS.dsn) as client:
        await client.enqueue(request("before"))
        fork(lambda: asyncio.run(in_child()), end=os._exit)


def fork_in_handler() -> int | None:
    """Fork, end the child as programs end, and return its exit code, or None if it lives on."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # the end of one that lives on, and whose parent is killed
        sys.exit(0)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


_ROW = "insert into ledger (job_id, attempt, kind, pid) values (%s, %s, 'forked', %s)"


def forker(job: Job, conn: Connection[Any] | None = None) -> None:
    if conn is not None:
        conn.execute(_ROW, [job.id, job.attempt, os.getpid()])
    FILE.tell(("child", fork_in_handler()))


async def async_forker(job: Job, conn: AsyncConnection[Any] | None = None) -> None:
    if conn is not None:
        await conn.execute(_ROW, [job.id, job.attempt, os.getpid()])
    FILE.tell(("child", fork_in_handler()))


OPTIONS: dict[str, Any] = {
    "poll_interval": SETTINGS.poll_interval,
    "lease": SETTINGS.lease,
    "observer": Recorder(FILE.tell),
}


def handler() -> None:
    """Fork in handlers, while the next jobs wait for the slot."""
    with Client(SETTINGS.dsn) as client:
        handlers = Handlers(client, Ledger(SETTINGS.ledger), FILE.tell)
        mux = handlers.register(Mux(), max_attempts=3, backoff=0.1)
        mux.register("fork", forker)
        mux.register("fork in a transaction", forker, transactional=True)
        worker = Worker(client, SETTINGS.queue, mux, **OPTIONS)
        serve(worker, FILE, SETTINGS.grace)


async def async_handler() -> None:
    async with AsyncClient(SETTINGS.dsn) as client:
        handlers = Handlers(client, Ledger(SETTINGS.ledger), FILE.tell)
        mux = handlers.register(Mux(), max_attempts=3, backoff=0.1)
        mux.register("fork", async_forker)
        mux.register("fork in a transaction", async_forker, transactional=True)
        worker = AsyncWorker(client, SETTINGS.queue, mux, **OPTIONS)
        await serve_async(worker, FILE, SETTINGS.grace)


def await_completion(id: str) -> None:
    """Wait for an event."""
    wanted = json.dumps(("completed", id, 1))
    with open(SETTINGS.events) as file:
        while wanted not in file.read():
            time.sleep(0.02)
            file.seek(0)


CASES: dict[str, Callable[[], None] | Callable[[], Coroutine[Any, Any, None]]] = {
    case.__name__: case
    for case in (
        client,
        async_client,
        pool,
        async_pool,
        unused_pool,
        async_unused_pool,
        pool_of_child,
        worker,
        async_worker,
        made,
        async_made,
        handler,
        async_handler,
    )
}

if __name__ == "__main__":
    end_with_parent()
    running = CASES[sys.argv[1]]()
    if running is not None:
        asyncio.run(running)
