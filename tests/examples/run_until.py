import os
import signal
import threading

from bgjob import Client, EnqueueRequest, Job, Mux, Worker

mux = Mux()
stop = threading.Event()


@mux.handler("last")
def last(job: Job) -> None:
    print("working")
    os.kill(os.getpid(), signal.SIGTERM)


signal.signal(signal.SIGTERM, lambda *_: stop.set())
with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("work", "last"))
    Worker(client, "work", mux, grace=10).run_until(stop)
    print("shut down")
