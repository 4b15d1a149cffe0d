import asyncio
import os
import threading

from bgjob import Client, EnqueueRequest, Job, JobCompleted, JobTimedOut, Mux, Worker

mux = Mux()
hang, done = threading.Event(), threading.Event()


@mux.handler("fetch", timeout=0.2, max_attempts=1)
async def fetch(job: Job) -> None:
    try:
        await asyncio.sleep(3600)
    finally:
        print("fetch is cancelled")


@mux.handler("parse", timeout=0.2, max_attempts=1)
def parse(job: Job) -> None:
    hang.wait()


@mux.handler("next")
def next_(job: Job) -> None:
    pass


def watch(event: object) -> None:
    if isinstance(event, JobTimedOut):
        print(event.job.type, "has had its", event.seconds, "s")
    if isinstance(event, JobCompleted):
        print(event.job.type, "is completed")
        done.set()


with Client(os.environ["DATABASE_URL"]) as client:
    client.bulk_enqueue([EnqueueRequest("web", type_) for type_ in ("fetch", "parse", "next")])
    with Worker(client, "web", mux, concurrency=1, observer=watch):
        done.wait()
    for dead in reversed(client.dlq.list()):
        print(dead.type, "is dead:", str(dead.last_error).partition(":")[0])
    hang.set()
