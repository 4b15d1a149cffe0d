import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import psycopg
from litestar import Litestar, get, post
from litestar.datastructures import State
from litestar.di import Provide

from bgjob import AsyncClient, AsyncWorker, EnqueueRequest, Job, Mux
from bgjob.ext.asyncpg import enqueue

mux = Mux()


@mux.handler("confirm", transactional=True)
async def confirm(job: Job, conn: psycopg.AsyncConnection) -> None:
    order = job.json()["order"]
    await conn.execute("update orders set confirmed = true where id = %s", [order])


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    dsn = os.environ["DATABASE_URL"]
    async with (
        asyncpg.create_pool(dsn, min_size=1) as app.state.pool,
        AsyncClient(dsn) as client,
        AsyncWorker(client, "mail", mux, concurrency=10, grace=20),
    ):
        yield


async def connection(state: State) -> AsyncIterator[asyncpg.Connection]:
    async with state.pool.acquire() as conn:
        yield conn


@post("/orders")
async def place_order(conn: asyncpg.Connection) -> dict[str, int]:
    async with conn.transaction():
        order = await conn.fetchval("insert into orders default values returning id")
        await enqueue(conn, EnqueueRequest("mail", "confirm", {"order": order}))
    return {"id": order}


@get("/orders/confirmed")
async def confirmed_orders(conn: asyncpg.Connection) -> list[int]:
    return [order for (order,) in await conn.fetch("select id from orders where confirmed")]


app = Litestar(
    [place_order, confirmed_orders], dependencies={"conn": Provide(connection)}, lifespan=[lifespan]
)
