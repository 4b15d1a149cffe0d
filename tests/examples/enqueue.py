import os
from datetime import UTC, datetime, timedelta

from bgjob import Client, Complete, EnqueueRequest, Job, JobAlreadyExistsError, Mux
from bgjob import Reschedule, Result

mux = Mux()
answers: list[Result] = [Reschedule(delay=0), Complete()]


@mux.handler("fetch")
def fetch(job: Job) -> Result:
    print("fetching", job.json()["page"], "attempt", job.attempt)
    return answers.pop(0)


with Client(os.environ["DATABASE_URL"]) as client:
    client.enqueue(EnqueueRequest("pages", "fetch", {"page": 1}, id="page-1"))
    try:
        client.enqueue(EnqueueRequest("pages", "fetch", {"page": 1}, id="page-1"))
    except JobAlreadyExistsError as error:
        print(error)

    again = EnqueueRequest("pages", "fetch", {"page": 1}, id="page-1")
    later = EnqueueRequest("pages", "fetch", {"page": 2}, id="page-2", delay=3600)
    print(client.bulk_enqueue([again, later], on_conflict="skip"))

    tomorrow = datetime.now(UTC) + timedelta(days=1)
    client.enqueue(EnqueueRequest("pages", "fetch", {"page": 3}, run_at=tomorrow))

    for _ in range(2):
        client.do("pages", mux)
