import asyncio
import os

from bgjob import AsyncClient, Client, EnqueueRequest, Job, Mux

client = Client(os.environ["DATABASE_URL"])
mux = Mux()


@mux.handler("greet")
async def greet(job: Job) -> None:
    print("hello,", job.json())


async def notebook() -> None:  # a notebook runs its cells within an event loop, as here
    client.enqueue(EnqueueRequest("greetings", "greet", "notebook"))
    client.do("greetings", mux)  # on an event loop of the client's own

    async with AsyncClient(os.environ["DATABASE_URL"]) as async_client:
        await async_client.enqueue(EnqueueRequest("greetings", "greet", "loop"))
        await async_client.do("greetings", mux)  # on the notebook's


asyncio.run(notebook())
