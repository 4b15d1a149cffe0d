import asyncio
import os
import threading

from bgjob import Client, EnqueueRequest, Job, JobCancelled, Mux, Worker

mux = Mux()
began, cancelled = threading.Event(), threading.Event()


@mux.handler("report")
async def report(job: Job) -> None:
    began.set()
    await asyncio.sleep(3600)


def watch(event: object) -> None:
    if isinstance(event, JobCancelled):
        cancelled.set()


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("reports", "report", id="march"))
    client.enqueue(EnqueueRequest("reports", "report", id="april", delay=3600))
    with Worker(client, "reports", mux, observer=watch):
        began.wait()
        for job in client.jobs.list(queue="reports").jobs:
            print(job.id, "is", job.state)
        changes = client.jobs.cancel(queue="reports", by="ann", reason="wrong year")
        print("cancelled", changes.waiting, "and, while running,", changes.running)
        cancelled.wait()
    print(client.jobs.cancel(["march", "may"]).unchanged)
    for dead in client.dlq.list("march"):
        print(dead.last_error)
