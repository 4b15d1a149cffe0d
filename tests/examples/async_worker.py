import asyncio
import os

from bgjob import AsyncClient, AsyncWorker, EnqueueRequest, Job, Mux

mux = Mux()
done = asyncio.Event()


@mux.handler("greet")
async def greet(job: Job) -> None:
    print("hello,", job.json())
    done.set()


async def main() -> None:
    async with AsyncClient(os.environ["DATABASE_URL"]) as client:
        await client.enqueue(EnqueueRequest("greetings", "greet", "world"))
        async with AsyncWorker(client, "greetings", mux, concurrency=100):
            await done.wait()


asyncio.run(main())
