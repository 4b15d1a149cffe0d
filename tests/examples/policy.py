import os

from bgjob import Backoff, Client, Job, Mux

mux = Mux()


@mux.handler("fetch", queue="slow", priority=5, max_attempts=3, backoff=Backoff.constant(0.0))
def fetch(job: Job) -> None:
    print("attempt", job.attempt, "priority", job.priority)
    raise OSError("not today")


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(mux.request("fetch"))
    client.enqueue(mux.request("fetch", priority=1, id="sooner"))
    for _ in range(6):
        client.do("slow", mux)
    dead = client.dlq.list()[0]
    print("dead after attempt", dead.attempt)
    print(dead.last_error)
