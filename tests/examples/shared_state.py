import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

mux = Mux()
done = threading.Event()


@contextmanager
def prices() -> Iterator[dict[str, int]]:
    print("opened")
    yield {"tea": 3}
    print("closed")


@mux.handler("order")
def order(job: Job, state: dict[str, int]) -> None:
    print("costs", state[job.json()])
    done.set()


client = Client(os.environ["DATABASE_URL"])
client.enqueue(EnqueueRequest("orders", "order", "tea"))
with Worker(client, "orders", mux, state=prices):
    done.wait(10)
client.close()
