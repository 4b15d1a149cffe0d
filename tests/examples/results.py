import os
from datetime import timedelta

from bgjob import (
    Client,
    Complete,
    EnqueueRequest,
    Job,
    JobAlreadyExistsError,
    JobFailedError,
    Mux,
    Result,
    Worker,
)

mux = Mux()


@mux.handler("price", max_attempts=1)
def price(job: Job) -> Result:
    net = job.json()
    if net < 0:
        raise ValueError("a price below 0")
    return Complete({"gross": net * 2})


request = EnqueueRequest("prices", "price", 21, id="of order 7", keep=timedelta(hours=1))
with Client(os.environ["DATABASE_URL"]) as client:
    with Worker(client, "prices", mux, observer=[]):
        client.enqueue(request)
        print(client.wait("of order 7", timeout=60))
        try:
            client.enqueue(request)
        except JobAlreadyExistsError:
            print("enqueued before")
        id = client.enqueue(EnqueueRequest("prices", "price", -1, keep=60))
        try:
            client.wait(id, timeout=60)
        except JobFailedError as error:
            print(error.error.splitlines()[0])
    print(client.result("of order 7").state)
