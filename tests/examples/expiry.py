import os
from datetime import timedelta

from bgjob import Client, EnqueueRequest, Job, Mux

mux = Mux()


@mux.handler("price")
def price(job: Job) -> None:
    print("sent", job.id)


with Client(os.environ["DATABASE_URL"]) as client:
    five_minutes = timedelta(minutes=5)
    client.enqueue(EnqueueRequest("prices", "price", id="new", expires=five_minutes))
    client.enqueue(EnqueueRequest("prices", "price", id="old", expires=0.001))
    for _ in range(2):
        client.do("prices", mux)
    [dead] = client.dlq.list(queue="prices")
    print("dead:", str(dead.last_error).split(":")[0])
    client.dlq.requeue("old")
    client.do("prices", mux)
