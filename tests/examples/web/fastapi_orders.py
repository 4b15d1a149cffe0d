import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated

import psycopg
from fastapi import Depends, FastAPI
from sqlalchemy import make_url, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from bgjob import AsyncClient, AsyncWorker, EnqueueRequest, Job, Mux
from bgjob.ext.sqlalchemy import aenqueue, asession_of, dsn

url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg")
engine = create_async_engine(url)
new_session = async_sessionmaker(engine, expire_on_commit=False)
mux = Mux()


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    confirmed: Mapped[bool] = mapped_column(default=False)


@mux.handler("confirm", transactional=True)
async def confirm(job: Job, conn: psycopg.AsyncConnection) -> None:
    async with asession_of(conn) as session:
        order = job.json()["order"]
        await session.execute(update(Order).where(Order.id == order).values(confirmed=True))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    try:
        async with (
            AsyncClient(dsn(engine)) as client,
            AsyncWorker(client, "mail", mux, concurrency=10, grace=20),
        ):
            yield
    finally:
        await engine.dispose()


async def session_of_request() -> AsyncIterator[AsyncSession]:
    async with new_session() as session:
        yield session


Session = Annotated[AsyncSession, Depends(session_of_request)]


async def enqueue_in(session: Session) -> Callable[[EnqueueRequest], Awaitable[str]]:
    return partial(aenqueue, session)


Enqueue = Annotated[Callable[[EnqueueRequest], Awaitable[str]], Depends(enqueue_in)]

app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=201)
async def place_order(session: Session, enqueue: Enqueue) -> dict[str, int]:
    order = Order()
    session.add(order)
    await session.flush()  # the order gets its id
    await enqueue(EnqueueRequest("mail", "confirm", {"order": order.id}))
    await session.commit()  # the order and its job, before the response is sent
    return {"id": order.id}


@app.get("/orders/confirmed")
async def confirmed_orders(session: Session) -> list[int]:
    return list(await session.scalars(select(Order.id).where(Order.confirmed)))
