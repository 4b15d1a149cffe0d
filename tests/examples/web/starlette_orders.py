import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from bgjob import AsyncClient, AsyncWorker, EnqueueRequest, Job, Mux

mux = Mux()


@mux.handler("confirm", transactional=True)
async def confirm(job: Job, conn: psycopg.AsyncConnection) -> None:
    order = job.json()["order"]
    await conn.execute("update orders set confirmed = true where id = %s", [order])


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    async with (
        AsyncConnectionPool(os.environ["DATABASE_URL"], open=False) as pool,
        AsyncClient(pool) as client,
        AsyncWorker(client, "mail", mux, concurrency=10, grace=20),
    ):
        yield {"pool": pool, "client": client}


async def place_order(request: Request) -> JSONResponse:
    pool, client = request.state.pool, request.state.client
    async with pool.connection() as conn:  # commits at its end, or rolls back
        cursor = await conn.execute("insert into orders default values returning id")
        [order] = await cursor.fetchone()
        await client.enqueue(EnqueueRequest("mail", "confirm", {"order": order}), conn=conn)
    return JSONResponse({"id": order}, status_code=201)


async def confirmed_orders(request: Request) -> JSONResponse:
    async with request.state.pool.connection() as conn:
        cursor = await conn.execute("select id from orders where confirmed")
        return JSONResponse([order async for (order,) in cursor])


app = Starlette(
    routes=[
        Route("/orders", place_order, methods=["POST"]),
        Route("/orders/confirmed", confirmed_orders),
    ],
    lifespan=lifespan,
)
