import os
from threading import Event

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

mux = Mux()
done = Event()


@mux.handler("order", keep=True)
def order(job: Job) -> None:
    done.set()


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("kept", "order", id="order-2"))
    with Worker(client, "kept", mux, observer=[]):
        done.wait()
    [past] = client.history("order-2")
    print(past.id, "was completed in attempt", past.attempt)
    print(past.started_at is not None and past.started_at < past.ended_at)
    print(client.explain("order-2").state)
