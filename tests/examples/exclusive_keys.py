import os
import threading

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

mux = Mux()
bob_is_done, all_is_done = threading.Event(), threading.Event()


@mux.handler("charge")
def charge(job: Job) -> None:
    if job.id == "ann-1":
        bob_is_done.wait()  # meanwhile ann-2 waits too, though a slot is free
    print("charging", job.id, "for", job.exclusive)
    if job.id == "bob-1":
        bob_is_done.set()
    if job.id == "ann-2":
        all_is_done.set()


with Client(os.environ["DATABASE_URL"]) as client:
    for user, id_ in [("ann", "ann-1"), ("ann", "ann-2"), ("bob", "bob-1")]:
        client.enqueue(EnqueueRequest("charges", "charge", id=id_, exclusive=f"user:{user}"))
    with Worker(client, "charges", mux, concurrency=3):
        all_is_done.wait()
