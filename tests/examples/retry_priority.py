import os

from bgjob import Client, EnqueueRequest, Job, Mux

mux = Mux()


@mux.handler("step", retry_priority=-1, backoff=lambda attempt: 0.0)
def step(job: Job) -> None:
    print(job.id, "attempt", job.attempt)
    if job.id == "first" and job.attempt == 1:
        raise ConnectionError("try again")


with Client(os.environ["DATABASE_URL"]) as client:
    for name in ("first", "second", "third"):
        client.enqueue(EnqueueRequest("steps", "step", id=name))
    for _ in range(4):
        client.do("steps", mux)
