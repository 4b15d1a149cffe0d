import os

import psycopg

from bgjob import Client, EnqueueRequest, Job, Mux, Retry
from bgjob.testing import assert_enqueued, assert_not_enqueued, drain

mux = Mux()


@mux.handler("confirm")
def confirm(job: Job) -> Retry | None:
    return Retry(delay=60, error="mail server is away") if job.attempt == 1 else None


client = Client(os.environ["DATABASE_URL"])
with psycopg.connect(os.environ["DATABASE_URL"]) as conn:
    client.enqueue(EnqueueRequest("mail", "confirm", {"order": 1}), conn=conn)
    assert_enqueued(conn, "confirm", arg={"order": 1}, count=1)
    for job, result in drain(conn, "mail", mux):
        print("attempt", job.attempt, type(result).__name__)
    for job, result in drain(conn, "mail", mux, within=60):
        print("attempt", job.attempt, type(result).__name__)
    assert_not_enqueued(conn, "confirm")
    conn.rollback()
