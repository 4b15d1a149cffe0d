import os
import threading
import time

from bgjob import Client, EnqueueRequest, Job, Limit, Mux, Worker

sent = threading.Semaphore(0)


def send(job: Job) -> None:
    time.sleep(0.05)
    sent.release()


mux = Mux().register("send", send)

with Client(os.environ["DATABASE_URL"]) as client:
    client.bulk_enqueue([EnqueueRequest("mail", "send") for _ in range(30)])
    worker = Worker(client, "mail", mux, concurrency=8, limits=Limit(concurrency=3))
    with worker:
        sent.acquire()
        for status in client.limits.list():
            print(status.name, "in code:", status.limit, "-", status.places, "places in use")

        client.limits.set("queue", "mail", Limit(rate="6000/m", burst=20))
        for status in client.limits.list():
            print(status.name, "set:", status.limit, "-", status.limit.per_second, "a second")
        for _ in range(29):
            sent.acquire()
    client.limits.remove("queue", "mail")
    print("all sent")
