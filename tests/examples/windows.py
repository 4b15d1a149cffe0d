import asyncio
import os

from bgjob import AsyncClient, EnqueueRequest, Job, Mux

mux = Mux()


@mux.handler("greet")
def greet(job: Job) -> None:
    print("hello,", job.json())


async def main() -> None:
    async with AsyncClient(os.environ["DATABASE_URL"]) as client:
        await client.enqueue(EnqueueRequest("greetings", "greet", "everywhere"))
        await client.do("greetings", mux)


with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
    runner.run(main())
