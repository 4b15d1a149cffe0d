import asyncio
import os

import asyncpg

from bgjob import Client, EnqueueRequest, Job, JobAlreadyExistsError, Mux
from bgjob.ext.asyncpg import bulk_enqueue, enqueue

mux = Mux()


@mux.handler("confirm")
def confirm(job: Job) -> None:
    print("confirming", job.id)


def request(order: int) -> EnqueueRequest:
    return EnqueueRequest("mail", "confirm", {"order": order}, id=f"order-{order}")


async def main() -> None:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1) as pool:
        await pool.execute("create table orders (id int primary key)")
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("insert into orders (id) values (2)")
            await enqueue(connection, request(2))
            try:
                await enqueue(connection, request(2))
            except JobAlreadyExistsError as error:
                print(error)
        await bulk_enqueue(pool, [request(3), request(4)])  # committed when it returns


asyncio.run(main())
with Client(os.environ["DATABASE_URL"]) as client:
    for _ in range(3):
        client.do("mail", mux)
