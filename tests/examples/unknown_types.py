import logging
import os
from datetime import timedelta

from bgjob import Client, EnqueueRequest, Job, Mux

logging.getLogger("bgjob").setLevel(logging.ERROR)  # no warning here
old = Mux(unknown_for=timedelta(hours=1))
new = Mux(unknown_for=timedelta(hours=1))


@new.handler("invoice")
def invoice(job: Job) -> None:
    print("attempt", job.attempt)


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("billing", "invoice", id="invoice-7"))
    put_back = client.do("billing", old)
    print(type(put_back).__name__, "dead:", len(client.dlq.list()))
    client.jobs.run_now("invoice-7")  # instead of waiting a second
    client.do("billing", new)
