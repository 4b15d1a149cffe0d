import os

from bgjob import Client, EnqueueRequest, MoveToDlq, Mux

with Client(os.environ["DATABASE_URL"]) as client:
    mux = Mux().register("pay", lambda job: MoveToDlq(f"card {job.id} declined"))
    for n in range(5):
        client.enqueue(EnqueueRequest("dead", "pay", id=f"order-{n}"))
        client.do("dead", mux)

    page = client.dlq.list(queue="dead", limit=3)
    print([dead.id for dead in page])
    page = client.dlq.list(queue="dead", limit=3, before=page[-1])
    print([dead.id for dead in page])

    dead = client.dlq.get("order-2")
    print(dead.last_error if dead else "it is gone")
    print(client.dlq.requeue(queue="dead", error="order-2"))
    print(client.dlq.purge(queue="dead", older_than=0), "purged")
