import os

from bgjob import Client, EnqueueRequest, Job, Mux

mux = Mux()


@mux.handler("resize")
def resize(job: Job) -> None:
    print("resizing", job.id)


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("images", "resize", id="of last year", priority=10))
    client.enqueue(EnqueueRequest("images", "resize", id="of an upload"))
    client.enqueue(EnqueueRequest("images", "resize", id="of the front page", priority=-10))
    client.enqueue(EnqueueRequest("images", "resize", id="not yet", priority=-20, delay=3600))
    for _ in range(3):
        client.do("images", mux)
